"""Composed scenes on the tiny bank of `tiny_scenes`."""

from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tiny_scenes import COLORS
from torch.utils.data import DataLoader

from trl_recipes.scenes import KIND_WEIGHTS, SceneBank, SceneConfig, SceneDataset, compose_scene
from trl_recipes.scenes.dataset import flat_expressions
from trl_recipes.scenes.effects import develop, warp_sprite
from trl_recipes.scenes.expressions import absent_term, name_everything, sample_expressions
from trl_recipes.scenes.lexicon import CONFUSABLE_COLORS, regular_plural, with_article
from trl_recipes.scenes.view import SceneView


@pytest.fixture(scope="module")
def bank(bank_folder):
    return SceneBank.from_folder(bank_folder, "train")


@pytest.fixture(scope="module")
def spoken(bank):
    """400 scenes with up to six expressions each."""
    pairs = []
    for seed in range(400):
        rng = np.random.default_rng(seed)
        scene = compose_scene(bank, rng, SceneConfig(image_size=128))
        pairs.append((scene, sample_expressions(scene, bank.vocabulary, rng, 6)))
    return pairs


def _words_of(sprite) -> set[str]:
    return {sprite.noun, *sprite.synonyms, *sprite.categories, "solid", "object", "thing"}


def _named(scene, text: str) -> list:
    """The visible objects that the longest known word in the text names; plain string search, no lexicon."""
    words = {word for one in scene.objects for word in _words_of(one.sprite)}
    inside = [word for word in words if f" {word} " in f" {text} "]
    word = max(inside, key=len)
    return [one for one in scene.objects if one.visible and word in _words_of(one.sprite)]


def _of_kind(spoken, kind: str) -> list:
    found = [(scene, one) for scene, several in spoken for one in several if one.kind == kind]
    assert len(found) >= 5, f"too few expressions of kind {kind} to test"
    return found


def _same(one: dict, other: dict) -> bool:
    def told(item: dict) -> list:
        return [(e["text"], e["kind"], e["missing"], np.asarray(e["mask"]).tobytes()) for e in item["expressions"]]

    return one["image"].tobytes() == other["image"].tobytes() and told(one) == told(other)


def test_an_item_depends_on_seed_and_index_alone(bank_folder, bank):
    config = SceneConfig(image_size=96)
    first = SceneDataset(bank, config, seed=3, length=8)
    again = SceneDataset(SceneBank.from_folder(bank_folder, "train"), config, seed=3, length=50)
    wanted = [first[i] for i in range(4)]
    assert all(_same(wanted[i], again[i]) for i in (3, 1, 0, 2))
    assert not _same(wanted[0], wanted[1])
    assert not _same(wanted[0], SceneDataset(bank, config, seed=4, length=8)[0])


def test_workers_give_the_same_items(bank):
    dataset = SceneDataset(bank, SceneConfig(image_size=64), seed=1, length=6)
    loader = DataLoader(dataset, batch_size=None, num_workers=2)
    assert all(_same(item, dataset[i]) for i, item in enumerate(loader))


def test_a_schedule_that_is_hurried_goes_as_far_as_the_clock_says(bank):
    def dataset():
        return SceneDataset(
            bank, SceneConfig(image_size=64), 1, 1000, schedule=[(0, "easy"), (250, "full"), (500, "names")]
        )

    plain, hurried, share = dataset(), dataset(), torch.zeros(()).share_memory_()
    hurried.hurry(share, 1000)
    loader = iter(DataLoader(hurried, batch_size=None, num_workers=1, prefetch_factor=1))
    assert _same(next(loader), plain[0])
    share.fill_(0.5)
    items = [next(loader) for _ in range(4)]  # one or two of them were composed ahead
    assert hurried.config_at(4) == hurried.config_at(600) == plain.config_at(600) != plain.config_at(4)
    last = SceneDataset(bank, SceneConfig(image_size=64), 1, 1000, schedule=[(0, "names")])[4]
    assert _same(items[-1], last) and not _same(last, plain[4])


def test_a_pickled_bank_is_small_and_gives_the_same_pictures(bank):
    bank.preload()
    copy = pickle.loads(pickle.dumps(bank))
    assert not copy._pixels
    assert np.array_equal(copy.sprite_pixels(2), bank.sprite_pixels(2))


def test_masks_are_the_index_map(spoken):
    for scene, several in spoken:
        for one in several:
            expected = np.zeros(scene.index_map.shape, dtype=bool)
            for number in one.object_ids:
                expected |= scene.index_map == number
            assert np.array_equal(scene.mask(one.object_ids), expected)
            assert expected.any() == (one.kind != "none") == (not one.missing)


def test_boxes_and_areas_are_those_of_the_index_map(spoken):
    for scene, _ in spoken:
        assert set(np.unique(scene.index_map)) <= {0, *(one.index for one in scene.objects)}
        for one in scene.objects:
            ys, xs = np.nonzero(scene.index_map == one.index)
            assert len(ys) == one.visible <= one.area
            if len(ys):
                assert one.bbox == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)


def test_pixels_under_a_mask_show_the_sprite(bank):
    # Without jitter and camera effects an opaque sprite's colour must arrive where the index map says.
    plain = SceneConfig(
        image_size=128, jitter=0, gradient_share=0, blur_share=0, noise_share=0, jpeg_share=0, shadow_share=0
    )
    for seed in range(20):
        scene = compose_scene(bank, np.random.default_rng(seed), plain)
        pixels = np.asarray(scene.image).astype(int)
        for one in scene.objects:
            if one.visible > 50:
                median = np.median(pixels[scene.index_map == one.index], axis=0)
                assert np.abs(median - COLORS[one.sprite.color]).max() <= 3


def test_a_warped_sprite_is_seen_from_elsewhere():
    grid = np.zeros((40, 60, 4), np.uint8)
    grid[..., 0], grid[..., 1], grid[..., 3] = np.arange(60) * 4, np.arange(40)[:, None] * 6, 255
    rng = np.random.default_rng(0)
    warped = np.asarray(warp_sprite(Image.fromarray(grid), rng, 0.2)).astype(int)
    assert warped.shape == grid.shape
    middle = warped[20, 30]
    assert middle[3] == 255 and abs(middle[0] - 120) < 0.2 * 240 and abs(middle[1] - 120) < 0.2 * 240
    corners = np.random.default_rng(0).uniform(-0.2, 0.2, (4, 2))
    assert (warped[0, 0, 3] == 0) == bool((corners[0] < 0).any())  # from outside: transparent
    unmoved = np.asarray(warp_sprite(Image.fromarray(grid), rng, 0.0))
    assert np.abs(unmoved[1:-1, 1:-1].astype(int) - grid[1:-1, 1:-1]).max() <= 6


def test_warping_leaves_scenes_without_it_alone(bank):
    def scene(**changes):
        return compose_scene(bank, np.random.default_rng(5), SceneConfig(image_size=128, **changes))

    plain, warped = scene(), scene(warp=0.2)
    assert plain.image.tobytes() == scene(warp=0.0).image.tobytes()
    assert [one.box for one in warped.objects] == [one.box for one in plain.objects]
    assert not np.array_equal(plain.index_map, warped.index_map)


def test_occluded_objects_are_never_targets(spoken):
    hidden = 0
    for scene, several in spoken:
        buried = {one.index for one in scene.objects if one.visible_fraction < 0.3}
        hidden += len(buried)
        assert not any(buried & set(one.object_ids) for one in several)
    assert hidden > 10


def test_a_noun_means_one_object(spoken):
    for scene, one in _of_kind(spoken, "noun"):
        assert [it.index for it in _named(scene, one.text)] == list(one.object_ids), one.text
        assert "stool" not in one.text or all(it.sprite.noun != "bench" for it in scene.objects if it.visible)


def test_a_coloured_noun_means_one_object(spoken):
    for scene, one in _of_kind(spoken, "colour"):
        color = next(name for name in CONFUSABLE_COLORS if f" {name} " in f" {one.text} ")
        fit = [it for it in _named(scene, one.text) if it.sprite.color in (color, None, *CONFUSABLE_COLORS[color])]
        assert [it.index for it in fit] == list(one.object_ids), one.text


def test_sides_are_the_outermost_object(spoken):
    checked = dict.fromkeys(("middle", "left", "right"), 0)
    for scene, one in _of_kind(spoken, "spatial"):
        side = next((word for word in checked if word in one.text), "")
        (target,) = (it for it in scene.objects if it.index in one.object_ids)
        xs = sorted(it.center[0] for it in _named(scene, one.text))
        if side and len(xs) > 1:
            assert side != "middle" or len(xs) == 3, one.text
            assert target.center[0] == xs[{"left": 0, "middle": 1, "right": -1}[side]], one.text
            checked[side] += 1
    assert min(checked.values()) > 2


def test_near_and_far_high_and_low_are_the_outermost_object(spoken):
    edges = {"closest": 1, "nearest": 1, "in front": 1, "farthest": -1, "at the back": -1}
    middles = {"lowest": 1, "at the bottom": 1, "highest": -1, "topmost": -1, "at the top": -1}
    heard = set()
    for scene, one in _of_kind(spoken, "spatial"):
        for word, sign in (edges | middles).items():
            if word in one.text:
                heights = {it.index: it.box[3] if word in edges else it.center[1] for it in _named(scene, one.text)}
                assert len(heights) > 1 and one.object_ids == (max(heights, key=lambda i: sign * heights[i]),), one.text
                heard.add((word in edges, sign))
    assert len(heard) == 4


def test_sizes_are_the_extreme_object(spoken):
    for scene, one in _of_kind(spoken, "size"):
        (target,) = (it for it in scene.objects if it.index in one.object_ids)
        others = [it for it in _named(scene, one.text) if it is not target]
        assert others, one.text
        if "tallest" in one.text or "shortest" in one.text:
            mine, theirs = target.bbox[3] - target.bbox[1], [it.bbox[3] - it.bbox[1] for it in others]
        else:
            mine, theirs = target.visible, [it.visible for it in others]
        large = any(word in one.text for word in ("big", "larg", "tall"))
        assert mine >= 1.25 * max(theirs) if large else 1.25 * mine <= min(theirs), one.text


def test_ordinals_count_from_the_side(spoken):
    for scene, one in _of_kind(spoken, "ordinal"):
        row = sorted(_named(scene, one.text), key=lambda it: it.center[0], reverse="right" in one.text)
        place = next(i for i, word in enumerate(("first", "second", "third", "fourth")) if word in one.text)
        assert (row[place].index,) == one.object_ids, one.text


def test_relations_point_to_the_right_side(spoken):
    checked = {" left of ": 0, " right of ": 0, " the left of ": 0, " the right of ": 0}
    for scene, one in _of_kind(spoken, "relation"):
        words = next((words for words in checked if words in one.text), None)
        if words is None:
            continue
        head, _, tail = one.text.partition(words)
        (anchor,) = _named(scene, tail)
        sign = 1 if "left" in words else -1
        holding = [it for it in _named(scene, head) if sign * (anchor.center[0] - it.center[0]) > 0]
        assert [it.index for it in holding] == list(one.object_ids), one.text
        checked[words] += 1
    assert checked[" left of "] and checked[" right of "]


def test_plain_plurals_mean_all_of_the_name(spoken):
    checked = 0
    for scene, one in _of_kind(spoken, "plural"):
        assert len(one.object_ids) >= 2
        words = one.text.split()
        if "and" in words or set(words) & set(CONFUSABLE_COLORS) or not words[-1].endswith("s"):
            continue
        fit = _named(scene, one.text.removesuffix("s").replace("benche", "bench"))
        assert tuple(it.index for it in fit) == one.object_ids, one.text
        checked += 1
    assert checked > 5


def test_reasoning_means_all_its_answers(spoken):
    for scene, one in _of_kind(spoken, "reasoning"):
        nouns = {"disc", "egg"} if "roll" in one.text else {"stool"}
        fit = [it.index for it in scene.objects if it.visible and it.sprite.noun in nouns]
        assert tuple(fit) == one.object_ids, one.text
        # A bench is no answer by the vocabulary, but close enough to a stool to make the phrase doubtful.
        assert "roll" in one.text or not any(it.visible and it.sprite.noun == "bench" for it in scene.objects)


def test_what_is_missing_matches_nothing(spoken):
    for scene, one in _of_kind(spoken, "none"):
        assert one.missing and one.object_ids == ()
        color, _, word = one.missing.partition(" ")
        if color not in CONFUSABLE_COLORS:
            color, word = "", one.missing
        near = {color, None, *CONFUSABLE_COLORS.get(color, ())}
        fit = [it for it in scene.objects if it.visible and word in _words_of(it.sprite)]
        assert all(color and it.sprite.color not in near for it in fit), one.text
        assert word not in scene.background.avoid
        assert one.missing.split(" ")[-1][:3] in one.text


def test_what_is_missing_is_not_even_likely_there(spoken):
    """A stool may be taken for a bench: where there is a stool, "the bench" is no request for nothing."""
    drawn = 0
    for scene, _ in spoken[:100]:
        view = SceneView(scene, np.random.default_rng(0))
        for term in filter(None, (absent_term(view) for _ in range(5))):
            assert not any(scene.lexicon.may_fit(term, one.sprite) for one in scene.objects), term
            drawn += 1
    assert drawn > 50


def test_a_background_keeps_its_own_things_out_of_the_sentences(spoken):
    over_eggs = [(scene, several) for scene, several in spoken if "egg" in scene.background.avoid]
    assert len(over_eggs) > 50
    for _, several in over_eggs:
        assert not any(word in one.text for one in several for word in ("egg", "round thing", "object"))


def test_every_kind_comes_up_and_none_stays_rare(spoken):
    assert all(len({one.text for one in several}) == len(several) for _, several in spoken)
    kinds = [one.kind for _, several in spoken for one in several]
    assert set(kinds) == set(KIND_WEIGHTS)
    assert 0.02 < kinds.count("none") / len(kinds) < 0.2


def test_splits_share_no_identity_and_unseen_nouns_stay_unseen(bank_folder):
    banks = {split: SceneBank.from_folder(bank_folder, split) for split in ("train", "val", "test", "unseen")}
    owned = {split: {one.id for one in it.sprites if one.target} for split, it in banks.items()}
    names = list(owned)
    assert all(not owned[a] & owned[b] for i, a in enumerate(names) for b in names[i + 1 :])
    said = {word for one in banks["train"].sprites for word in (one.noun, *one.synonyms)}
    assert "balloon" not in said


def test_unseen_scenes_mean_unseen_nouns(bank_folder):
    unseen = SceneBank.from_folder(bank_folder, "unseen")
    distractors = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        scene = compose_scene(unseen, rng, SceneConfig(image_size=96))
        distractors += sum(not one.sprite.target for one in scene.objects)
        for one in sample_expressions(scene, None, rng, 4):
            nouns = {it.sprite.noun for it in scene.objects if it.index in one.object_ids}
            assert "balloon" in nouns or one.kind == "none"
    assert distractors > 20


def test_missing_files_and_columns_are_named(bank_folder, tmp_path):
    with pytest.raises(ValueError, match=r"sprites\.parquet.*[Bb]uild"):
        SceneBank.from_folder(tmp_path, "train")
    pq.write_table(pa.table({"noun": ["disc"]}), tmp_path / "sprites.parquet")
    with pytest.raises(ValueError, match=r"lacks the column.*image"):
        SceneBank.from_folder(tmp_path, "train")
    with pytest.raises(ValueError, match="Unknown split 'dev'"):
        SceneBank.from_folder(bank_folder, "dev")


def test_a_schedule_changes_the_preset_at_its_indices(bank):
    base = SceneConfig(image_size=64, min_objects=5, max_objects=5)
    dataset = SceneDataset(bank, base, 0, 100, schedule=[(10, "easy"), (20, "medium"), (30, "full")])
    assert dataset.config_at(9) == base
    for index, preset in ((10, "easy"), (19, "easy"), (20, "medium"), (30, "full"), (99, "full")):
        assert dataset.config_at(index) == SceneConfig.preset(preset, image_size=64)
    assert len(dataset.scene(9)[0].objects) == 5
    assert max(len(dataset.scene(index)[0].objects) for index in range(10, 20)) <= 2
    with pytest.raises(ValueError, match="ascend"):
        SceneDataset(bank, base, schedule=[(5, "easy"), (5, "full")])
    with pytest.raises(ValueError, match="Unknown preset 'hard'"):
        SceneDataset(bank, base, schedule=[(0, "hard")])


@pytest.mark.parametrize(("preset", "low", "high"), [("easy", 0.4, 0.85), ("medium", 0.25, 0.7), ("full", 0.15, 0.6)])
def test_presets_keep_their_sizes(bank, preset, low, high):
    for seed in range(30):
        scene = compose_scene(bank, np.random.default_rng(seed), SceneConfig.preset(preset, image_size=200))
        for one in scene.objects:
            longest = max(one.box[2] - one.box[0], one.box[3] - one.box[1]) / 200
            assert low - 0.01 <= longest <= high + 0.01


def test_the_preset_names_asks_for_everything_by_its_name(bank):
    dataset = SceneDataset(bank, SceneConfig(image_size=128).with_preset("names"), 5, 60, 6)
    several = 0
    for index in range(60):
        scene, made = dataset.scene(index)
        assert len({one.text for one in made}) == 6 and any(one.kind == "none" for one in made)
        assert {one.kind for one in made} <= {"noun", "plural", "none"}
        asked = {one.object_ids for one in made if one.kind != "none"}
        assert len(asked) == sum(one.kind != "none" for one in made)
        for ids in asked:
            (name,) = {one.sprite.name for one in scene.objects if one.index in ids}
            assert [one.index for one in scene.objects if one.visible and one.sprite.name == name] == list(ids)
        view = SceneView(scene, np.random.default_rng(0))
        sure = {name for name in {one.sprite.name for one in view.targets} if view.group(name)}
        assert min(len(sure), 5) <= len(asked) <= 5
        several += len(asked) > 1
    assert several > 10


def test_names_that_are_too_many_are_left_out(bank):
    scene = compose_scene(bank, np.random.default_rng(4), SceneConfig(image_size=128).with_preset("names"))
    made = name_everything(scene, np.random.default_rng(0), 2)
    assert sorted(one.kind == "none" for one in made) == [False, True]


@pytest.mark.parametrize("changes", [{"min_objects": 3, "max_objects": 2}, {"min_scale": 0.9}, {"image_size": 8}])
def test_impossible_settings_are_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        SceneConfig(**changes)


def test_items_have_the_promised_shape_and_the_flat_view_repeats_them(bank):
    dataset = SceneDataset(bank, SceneConfig(image_size=80), seed=2, length=3, expressions_per_scene=4)
    flat = flat_expressions(dataset, 10)
    assert len(flat) == 10
    for index in (9, 0, 5):
        item = dataset[index // 4]
        assert item["image"].size == (80, 80) and item["image"].mode == "RGB" and len(item["expressions"]) == 4
        wanted, got = item["expressions"][index % 4], flat[index]
        assert got["mask"].dtype == bool and got["mask"].shape == (80, 80)
        assert (got["text"], got["kind"], got["missing"]) == (wanted["text"], wanted["kind"], wanted["missing"])
        assert np.array_equal(got["mask"], wanted["mask"])
    with pytest.raises(ValueError, match="4 scenes"):
        flat_expressions(dataset, 13)
    with pytest.raises(IndexError):
        dataset[3]


def test_articles():
    said = [with_article(word) for word in ("mug", "orange mug", "grey scissors", "bread")]
    assert said == ["a mug", "an orange mug", "a pair of grey scissors", "some bread"]


def test_presets_joined_by_a_plus_take_turns(bank_folder):
    bank = SceneBank.from_folder(bank_folder, "train")
    dataset = SceneDataset(bank, seed=3, length=12, schedule=[(2, "easy"), (6, "full+medium+full")])
    full, medium, easy = (SceneConfig.preset(name) for name in ("full", "medium", "easy"))
    assert dataset.config_at(1) == dataset.config and dataset.config_at(5) == easy
    assert [dataset.config_at(index) for index in (6, 7, 8, 9, 10)] == [full, medium, full, full, medium]
    with pytest.raises(ValueError, match="huge"):
        SceneDataset(bank, schedule=[(0, "easy+huge")])


def test_english_by_rule():
    plurals = {"monkey": "monkeys", "berry": "berries", "box": "boxes", "fish": "fish", "mug": "mugs"}
    assert {word: regular_plural(word) for word in plurals} == plurals
    assert [with_article(word) for word in ("unicorn", "umbrella", "apple")] == ["a unicorn", "an umbrella", "an apple"]


def test_effects_are_as_likely_and_as_strong_as_asked():
    off = {"gradient_share": 0.0, "jitter": 0.0, "blur_share": 0.0, "noise_share": 0.0, "jpeg_share": 0.0}
    canvas = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)

    def change(**options):
        config = dataclasses.replace(SceneConfig(), **(off | options))
        seen = np.asarray(develop(canvas, np.random.default_rng(1), config), float)
        return np.abs(seen - canvas).mean()

    assert change() == 0.0
    assert min(change(**{name: 1.0}) for name in off) > 0.5
    assert change(jpeg_share=1.0, jpeg_quality=(5, 5)) > 1.2 * change(jpeg_share=1.0, jpeg_quality=(95, 95))
