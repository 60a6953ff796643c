"""Questions about composed scenes on the tiny bank: every answer is checked against the index map, with no lexicon."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from trl_recipes.metrics import box_of_mask
from trl_recipes.metrics.answers import box_iou
from trl_recipes.metrics.vqa import parse_box, parse_list
from trl_recipes.scenes import SceneBank, SceneConfig, SceneDataset, compose_scene
from trl_recipes.scenes.lexicon import Lexicon
from trl_recipes.scenes.questions import QUESTION_WEIGHTS, box, sample_questions, what, where, yes_no
from trl_recipes.scenes.view import SceneView

SIZE = 128
NUMBERS = {"None.": 0, "One.": 1, "Two.": 2, "Three.": 3, "Four.": 4}


@pytest.fixture(scope="module")
def bank(bank_folder):
    return SceneBank.from_folder(bank_folder, "train")


@pytest.fixture(scope="module")
def asked(bank):
    """400 scenes with up to six questions each."""
    dataset = SceneDataset(bank, SceneConfig(image_size=SIZE), 0, 400, 1, questions_per_scene=6)
    scenes = [dataset.scene(index)[0] for index in range(400)]
    return [(scene, dataset.questions(index, scene)) for index, scene in enumerate(scenes)]


def _of_kind(asked, kind: str) -> list:
    found = [(scene, one) for scene, several in asked for one in several if one.kind == kind]
    assert len(found) >= 50, f"too few questions of kind {kind} to test"
    return found


def _shown(scene) -> dict[int, tuple[int, int, int, int]]:
    """Object index -> the box of its pixels in the index map, of all objects with a pixel."""
    boxes = {one.index: box_of_mask(scene.index_map == one.index) for one in scene.objects}
    return {number: box for number, box in boxes.items() if box is not None}


def _middle(box, axis: int) -> float:
    return (box[axis] + box[axis + 2]) / 2 / SIZE


def _noun(scene, number: int) -> str:
    return scene.objects[number - 1].sprite.noun


def _called(scene, word: str) -> list[int]:
    """The objects that show a pixel and that the word names."""
    found = []
    for number in _shown(scene):
        sprite = scene.objects[number - 1].sprite
        if word in {sprite.noun, *sprite.synonyms, *sprite.categories, "solid"}:
            found.append(number)
    return found


def _asked_for(text: str, pattern: str) -> str:
    found = re.fullmatch(pattern, text)
    assert found, text
    return found[1]


def test_what_is_at_an_edge_is_the_outermost_thing(asked):
    seen = Counter()
    for scene, one in _of_kind(asked, "what"):
        shown = _shown(scene)
        edge = re.fullmatch(r"What is (?:on|at) the (left|right|top|bottom)\?", one.text)
        seen[edge and edge[1]] += 1
        if edge is None:
            (number,) = shown  # "What is this?" has no answer where there are several
        else:
            axis, last = {"left": (0, 0), "right": (0, 1), "top": (1, 0), "bottom": (1, 1)}[edge[1]]
            order = sorted(shown, key=lambda it: _middle(shown[it], axis), reverse=bool(last))
            number, second = order[:2]
            here, there = (_middle(shown[it], axis) for it in (number, second))
            assert abs(here - there) >= 0.15 and (here > 0.5) == bool(last), one.text
        assert parse_list(one.answer) == [_noun(scene, number)], one
        assert one.accepted == tuple(sorted({_noun(scene, number), *scene.objects[number - 1].sprite.synonyms}))
    assert len(seen) == 5 and min(seen.values()) >= 5


def test_lists_name_every_thing_from_left_to_right(asked):
    lengths = Counter()
    for scene, one in _of_kind(asked, "list"):
        shown = _shown(scene)
        order = sorted(shown, key=lambda it: _middle(shown[it], 0))
        assert parse_list(one.answer) == [_noun(scene, number) for number in order], one
        middles = [_middle(shown[number], 0) for number in order]
        assert all(b - a >= 0.06 for a, b in zip(middles[:-1], middles[1:], strict=True))
        lengths[len(order)] += 1
    assert {1, 2, 3} <= lengths.keys()


def test_a_background_that_shows_things_leaves_what_is_in_the_picture_open(asked):
    """Nobody can know that the things of a photographed street do not count."""
    with_things = [(scene, several) for scene, several in asked if scene.background.avoid]
    assert len(with_things) > 50
    assert not any(one.kind in ("what", "list") for _, several in with_things for one in several)


def test_nothing_half_hidden_is_left_out_of_what_and_list(asked):
    for kind in ("what", "list"):
        for scene, _ in _of_kind(asked, kind):
            assert all(one.clear for one in scene.objects if one.visible)


def test_where_a_thing_is(asked):
    for scene, one in _of_kind(asked, "where"):
        (number,) = _called(scene, _asked_for(one.text, r"Where is the (.+)\?"))
        third = 3 * _middle(_shown(scene)[number], 0)
        side = "left" if third < 1 else "right" if third > 2 else "middle"
        assert one.answer == f"{'In' if side == 'middle' else 'On'} the {side}."
        assert min(abs(third - 1), abs(third - 2)) >= 0.12  # clear of the border between two thirds
        assert side in one.accepted and not {"left", "middle", "right"} - {side} & set(one.accepted)


def test_boxes_are_those_of_the_things(asked):
    offsets = []
    for scene, one in _of_kind(asked, "box"):
        (number,) = _called(scene, _asked_for(one.text, r"Give the box of the (.+)\."))
        told, true = parse_box(one.answer), [100 * edge / SIZE for edge in _shown(scene)[number]]
        assert told is not None and one.accepted == ()
        offsets += [a - b for a, b in zip(told, true, strict=True) if b <= 99]
        assert all(0 <= edge <= 99 for edge in told)
        assert box_iou(told, true) > 0.75
    assert max(map(abs, offsets)) <= 0.5 + 1e-9  # the nearest hundredth


def test_a_thing_thinner_than_a_hundredth_has_no_box(bank):
    scene = _one_thing(bank)
    thin = replace(scene.objects[0], bbox=(40, 10, 41, 90), targetable=True)
    scene = replace(scene, objects=[thin], index_map=np.zeros((400, 400), np.uint8))
    assert box(SceneView(scene, np.random.default_rng(0))) is None


def test_yes_is_there_and_no_is_not(asked):
    for scene, one in _of_kind(asked, "yes_no"):
        word = _asked_for(one.text, r"Is there an? (.+) in the picture\?")
        assert one.answer == ("Yes." if _called(scene, word) else "No."), one.text
        assert one.answer.lower()[:-1] in one.accepted
        if one.answer == "No.":
            assert word not in scene.background.avoid
            assert not any(word in (it.sprite.noun, *it.sprite.synonyms) for it in scene.objects)  # nor hidden


def test_counts_are_right(asked):
    for scene, one in _of_kind(asked, "count"):
        word = _asked_for(one.text, r"How many (.+) are there\?").replace("benches", "benchs").removesuffix("s")
        number = len(_called(scene, word))
        assert NUMBERS[one.answer] == number, (one, number)
        assert str(number) in one.accepted and one.answer.lower()[:-1] in one.accepted
        assert all(scene.objects[it - 1].clear for it in _called(scene, word))
        assert word not in scene.background.avoid


def test_answers_are_balanced(asked):
    answers = {kind: Counter(one.answer for _, one in _of_kind(asked, kind)) for kind in ("yes_no", "count", "where")}
    assert 0.45 < answers["yes_no"]["Yes."] / answers["yes_no"].total() < 0.55
    for kind, most in (("count", 0.5), ("where", 0.5)):
        assert max(answers[kind].values()) / answers[kind].total() < most, answers[kind]
    assert set(answers["count"]) == set(NUMBERS) and len(answers["where"]) == 3


def test_questions_about_a_scene_differ_and_every_kind_comes_up(asked):
    assert all(len({one.text for one in several}) == len(several) <= 6 for _, several in asked)
    assert {one.kind for _, several in asked for one in several} == set(QUESTION_WEIGHTS)


def test_questions_change_neither_scenes_nor_expressions(bank):
    plain, asking = (SceneDataset(bank, SceneConfig(image_size=64), 3, 6, questions_per_scene=n) for n in (0, 5))
    for index in range(6):
        one, other = plain[index], asking[index]
        assert one["questions"] == [] and other["questions"]
        assert one["image"].tobytes() == other["image"].tobytes()
        for a, b in zip(one["expressions"], other["expressions"], strict=True):
            assert a["text"] == b["text"] and np.array_equal(a["mask"], b["mask"])


def test_questions_depend_on_seed_and_index_alone(bank_folder, bank):
    config = SceneConfig(image_size=64)
    first = SceneDataset(bank, config, 3, 8, questions_per_scene=4)
    again = SceneDataset(SceneBank.from_folder(bank_folder, "train"), config, 3, 50, questions_per_scene=4)
    wanted = [first[index]["questions"] for index in range(5)]
    assert all(wanted[index] == again[index]["questions"] for index in (4, 2, 0, 1, 3))
    assert wanted != [SceneDataset(bank, config, 4, 8, questions_per_scene=4)[i]["questions"] for i in range(5)]


def _one_thing(bank, **changes):
    """A scene of one thing that is clear to see, with another sprite where `changes` say so."""
    config = SceneConfig(image_size=SIZE, min_objects=1, max_objects=1)
    seeds = (np.random.default_rng(seed) for seed in range(20))
    scene = next(it for it in (compose_scene(bank, rng, config) for rng in seeds) if not it.background.avoid)
    sprite = replace(scene.objects[0].sprite, **changes)
    thing = replace(scene.objects[0], sprite=sprite)
    return replace(scene, objects=[thing], lexicon=Lexicon(bank.vocabulary, [sprite]))


@pytest.mark.parametrize(
    ("noun", "phrase"), [("scissors", "a pair of scissors"), ("egg", "an egg"), ("bread", "some bread")]
)
def test_articles_of_questions(bank, noun, phrase):
    scene = _one_thing(bank, noun=noun, name=noun, synonyms=(), categories=())
    scene.lexicon.nouns["disc"] = bank.sprites[0]  # a thing that is not there
    said = [yes_no(SceneView(scene, np.random.default_rng(seed))) for seed in range(20)]
    assert {one.text for one in said if one and one.answer == "Yes."} == {f"Is there {phrase} in the picture?"}
    one = what(SceneView(scene, np.random.default_rng(0)))
    assert one is not None and one.answer == f"{phrase[0].upper()}{phrase[1:]}." and one.accepted == (noun,)


@pytest.mark.parametrize(
    ("noun", "words"), [("scissors", "Where are the"), ("shelves", "Where are the"), ("cheese", "Where is the")]
)
def test_plural_nouns_take_a_plural_verb(bank, noun, words):
    scene = _one_thing(bank, noun=noun, name=noun, synonyms=(), categories=())
    thing = replace(scene.objects[0], bbox=(0, 10, 30, 60), targetable=True)
    one = where(SceneView(replace(scene, objects=[thing]), np.random.default_rng(0)))
    assert one is not None and one.text == f"{words} {noun}?" and one.answer == "On the left."


def test_an_empty_scene_has_no_questions_but_how_many(bank):
    scene = replace(_one_thing(bank), objects=[], index_map=np.zeros((SIZE, SIZE), np.uint8))
    scene = replace(scene, lexicon=Lexicon(bank.vocabulary, bank.sprites))
    found = sample_questions(scene, np.random.default_rng(0), 6)
    assert {one.answer for one in found} == {"None."}
