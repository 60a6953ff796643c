"""Questions about a composed scene that are answered in words: what is where, yes or no, how many, and boxes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .compose import Scene, SceneObject
from .expressions import absent_term
from .lexicon import PAIRED, UNCOUNTABLE, with_article
from .view import SceneView, definite

QUESTION_WEIGHTS: dict[str, float] = {"what": 20, "list": 20, "where": 10, "box": 25, "yes_no": 15, "count": 10}
NUMBERS = ("none", "one", "two", "three", "four")
BOX_GRID = 100
# Thirds of the picture's width; nearer than this to a border, two people may disagree.
SIDE_MARGIN = 0.04
PLACES = {
    "left": ("On the left.", ("left",)),
    "middle": ("In the middle.", ("middle", "center", "centre")),
    "right": ("On the right.", ("right",)),
}
EDGE = {"left": (0, 1), "right": (0, -1), "top": (1, 1), "bottom": (1, -1)}


@dataclass(frozen=True)
class Question:
    """A question with its one right answer.

    Attributes:
        text: the question, as a user writes it.
        answer: a sentence or, for boxes, "[left, top, right, bottom]" in hundredths of the picture's sides.
        kind: what, list, where, box, yes_no or count.
        accepted: lower-case words any of which, found in the answer, makes it right (names and synonyms of the thing
            for "what", left, middle or right for "where", the number for "count"); for lists and boxes there are none.
    """

    text: str
    answer: str
    kind: str
    accepted: tuple[str, ...] = ()


def sample_questions(scene: Scene, rng: np.random.Generator, count: int) -> list[Question]:
    """Draw up to `count` different questions by `QUESTION_WEIGHTS`, among those that the scene permits.

    There is at most one of yes or no: more would run out of things that are there, and lean to no.
    """
    view = SceneView(scene, rng)
    kinds, weights = list(QUESTION_WEIGHTS), np.array(list(QUESTION_WEIGHTS.values()))
    found: dict[str, Question] = {}
    for _ in range(8 * count):
        if len(found) == count:
            break
        made = _MAKERS[str(rng.choice(kinds, p=weights / weights.sum()))](view)
        if made is None or (made.kind == "yes_no" and any(one.kind == "yes_no" for one in found.values())):
            continue
        found.setdefault(made.text, made)
    return list(found.values())


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."


def _side(view: SceneView, item: SceneObject) -> str:
    x = item.center[0] / view.size
    if min(abs(x - 1 / 3), abs(x - 2 / 3)) < SIDE_MARGIN:
        return ""
    return "left" if x < 1 / 3 else "right" if x > 2 / 3 else "middle"


def _names(item: SceneObject) -> tuple[str, ...]:
    sprite = item.sprite
    return tuple(sorted({word.lower() for word in (sprite.noun, sprite.name, *sprite.synonyms)}))


def what(view: SceneView) -> Question | None:
    """ "What is on the left?": the only thing there, or the outermost one by a clear margin."""
    items = view.everything()
    if not items:
        return None
    options: tuple[str, ...]
    if len(items) == 1:
        item, options = items[0], ("What is in the picture?", "What is this?", "What do you see?")
    else:
        side = str(view.choice(list(EDGE)))
        axis, sign = EDGE[side]
        order = sorted(items, key=lambda one: sign * one.center[axis])
        # It must be alone in its half, on the asked side, and clearly before the next one.
        first, second = (sign * one.center[axis] / view.size for one in order[:2])
        border = 0.45 if sign > 0 else -0.55
        if first > border or second - first < 0.15:
            return None
        item = order[0]
        options = (f"What is {'on' if axis == 0 else 'at'} the {side}?",)
    name = item.sprite.name
    return Question(str(view.choice(options)), _sentence(with_article(view.say(name))), "what", _names(item))


def listing(view: SceneView) -> Question | None:
    """ "What is in the picture, from left to right?": every thing by name."""
    items = sorted(view.everything(), key=lambda one: one.center[0])
    gaps = [b.center[0] - a.center[0] for a, b in zip(items[:-1], items[1:], strict=True)]
    if not items or (gaps and min(gaps) < 0.06 * view.size):
        return None
    names = [with_article(view.say(one.sprite.name)) for one in items]
    return Question("What is in the picture, from left to right?", _sentence(", ".join(names)), "list")


def where(view: SceneView) -> Question | None:
    """ "Where is the mug?": on the left, in the middle, on the right."""
    item = _single(view)
    side = _side(view, item) if item else ""
    if item is None or not side:
        return None
    place, accepted = PLACES[side]
    said = view.say(item.sprite.name)
    last = said.rpartition(" ")[2]
    verb = "are" if last in PAIRED or (last in UNCOUNTABLE and last.endswith("s")) else "is"
    return Question(f"Where {verb} {definite(said)}?", place, "where", accepted)


def box(view: SceneView) -> Question | None:
    """ "Give the box of the mug.": "[12, 40, 55, 80]"."""
    item = _single(view)
    if item is None:
        return None
    corners = [min(BOX_GRID - 1, round(BOX_GRID * value / view.size)) for value in item.bbox]
    if corners[0] == corners[2] or corners[1] == corners[3]:
        return None
    return Question(f"Give the box of {definite(view.say(item.sprite.name))}.", str(corners), "box")


def yes_no(view: SceneView) -> Question | None:
    """ "Is there a mug in the picture?": as often yes as no."""
    absent = absent_term(view)
    if not absent or not view.targets:
        return None  # where only one answer can be had, it would come up more often than the other
    there = view.rng.random() < 0.5
    term = view.word_for(view.choice(view.targets)) if there else absent
    answer, accepted = ("Yes.", ("yes",)) if there else ("No.", ("no", "not"))
    return Question(f"Is there {with_article(view.say(term))} in the picture?", answer, "yes_no", accepted)


def count(view: SceneView) -> Question | None:
    """ "How many mugs are there?": a number up to four; now and then there are none."""
    chance = view.rng.random()
    term = absent_term(view) if chance < 0.15 else ""
    if not term and view.targets:
        many = view.set_terms() if chance < 0.7 else []
        term = str(view.choice(many)) if many else view.word_for(view.choice(view.targets))
    items = view.group(term) if term else []
    absent = bool(term) and not any(view.parts(term)) and not view.clashes(term)
    if not term or not view.lexicon.countable(term) or len(items) >= len(NUMBERS) or not (items or absent):
        return None
    number = NUMBERS[len(items)]
    accepted = (number, str(len(items))) if items else ("none", "no", "0", "zero")
    return Question(f"How many {view.lexicon.plural(term)} are there?", _sentence(number), "count", accepted)


def _single(view: SceneView) -> SceneObject | None:
    # An object that its plain name means.
    if not view.targets:
        return None
    item = view.choice(view.targets)
    return item if view.group(item.sprite.name) == [item] else None


_MAKERS: dict[str, Callable[[SceneView], Question | None]] = {
    "what": what,
    "list": listing,
    "where": where,
    "box": box,
    "yes_no": yes_no,
    "count": count,
}
