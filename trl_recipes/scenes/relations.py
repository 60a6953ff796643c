"""Expressions that compare objects: place, size, order and relations between two things."""

from __future__ import annotations

from itertools import pairwise

from .compose import SceneObject
from .lexicon import FLYING
from .view import Expression, SceneView, definite

# Margins as fractions of the picture's side: below them two people may disagree.
PLACE_MARGIN = 0.1
ORDER_MARGIN = 0.06
SIZE_RATIO = 1.6

SIDE_WORDS: dict[str, tuple[str, ...]] = {
    "left": ("{the} on the left", "the leftmost {t}", "{the} furthest to the left"),
    "right": ("{the} on the right", "the rightmost {t}", "{the} furthest to the right"),
    "top": ("{the} at the top", "the topmost {t}", "the highest {t} in the picture"),
    "bottom": ("{the} at the bottom", "the lowest {t} in the picture"),
    "front": ("{the} in front", "{the} closest to the camera", "the nearest {t}"),
    "back": ("{the} at the back", "{the} farthest from the camera", "the farthest {t}"),
}
SINGLE_WORDS = {"left": "{the} on the left", "right": "{the} on the right"}
SIZE_WORDS = {
    ("area", True): ("the biggest {t}", "the largest {t}"),
    ("area", False): ("the smallest {t}", "the smallest {t}", "the tiniest {t}"),
    ("height", True): ("the tallest {t}",),
    ("height", False): ("the shortest {t}",),
}
PAIR_SIZE_WORDS = {True: ("the bigger {t}", "the larger {t}"), False: ("the smaller {t}",)}
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")


def spatial(view: SceneView) -> Expression | None:
    """ "the mug on the left", "the middle chair", "the nearest dog"."""
    if view.rng.random() < 0.2:
        return _single_side(view)
    term, items = view.pick_set()
    if not items or not view.lexicon.countable(term):
        return None
    if len(items) == 3 and view.rng.random() < 0.3:
        return _middle(view, term, items)
    side = str(view.choice(("left", "left", "right", "right", "top", "bottom", "front", "back")))
    target = _extreme(view, items, side)
    if target is None or not target.targetable:
        return None
    templates = SIDE_WORDS[side]
    if len(items) == 2 and side in ("left", "right"):
        templates = (templates[0], templates[0], f"the {side} {{t}}", f"the {{t}} to the {side}", templates[1])
    return Expression(view.template(templates, term), "spatial", (target.index,))


def _single_side(view: SceneView) -> Expression | None:
    if not view.targets:
        return None
    target = view.choice(view.targets)
    term, x = view.word_for(target), target.center[0] / view.size
    side = "left" if x < 0.36 else "right" if x > 0.64 else ""
    if not side or view.group(term) != [target]:
        return None
    return Expression(view.template((SINGLE_WORDS[side],), term), "spatial", (target.index,))


def _middle(view: SceneView, term: str, items: list[SceneObject]) -> Expression | None:
    left, target, right = sorted(items, key=lambda one: one.center[0])
    margin = PLACE_MARGIN * view.size
    if min(target.center[0] - left.center[0], right.center[0] - target.center[0]) < margin or not target.targetable:
        return None
    return Expression(view.template(("{the} in the middle", "the middle {t}"), term), "spatial", (target.index,))


def _extreme(view: SceneView, items: list[SceneObject], side: str) -> SceneObject | None:
    # The object that lies furthest to one side, if by a clear margin and with both of its edges.
    sign = -1 if side in ("right", "bottom", "front") else 1
    low, high = (0, 2) if side in ("left", "right") else (1, 3)
    if side in ("front", "back") and any(one.sprite.noun in FLYING for one in items):
        return None

    def position(one: SceneObject) -> float:
        if side in ("front", "back"):
            return sign * one.box[3]
        return sign * (one.bbox[low] + one.bbox[high]) / 2

    first, *rest = sorted(items, key=position)
    if position(rest[0]) - position(first) < PLACE_MARGIN * view.size:
        return None
    edges = (3,) if side in ("front", "back") else (low, high)
    ahead = all(sign * first.bbox[edge] < sign * one.bbox[edge] for one in rest for edge in edges)
    return first if ahead else None


def size(view: SceneView) -> Expression | None:
    """ "the biggest dog", "the smaller chair", "the tallest lamp": by a clear ratio, hidden parts or not."""
    term, items = view.pick_set()
    if not items or not view.lexicon.countable(term):
        return None
    large = bool(view.rng.random() < 0.55)
    measure = "height" if view.rng.random() < 0.2 else "area"
    target = _outsize(items, measure, large)
    if target is None or not target.targetable:
        return None
    templates = SIZE_WORDS[measure, large]
    if len(items) == 2 and measure == "area" and view.rng.random() < 0.5:
        templates = PAIR_SIZE_WORDS[large]
    return Expression(view.template(templates, term), "size", (target.index,))


def _outsize(items: list[SceneObject], measure: str, large: bool) -> SceneObject | None:
    def measures(one: SceneObject) -> tuple[tuple[float, float], ...]:
        # (value, ratio that must be kept) pairs; all have to agree.
        height, full_height = one.bbox[3] - one.bbox[1], one.box[3] - one.box[1]
        if measure == "height":
            return (height, 1.25), (full_height, 1.25)
        longest = max(full_height, one.box[2] - one.box[0])
        return (one.visible, SIZE_RATIO), (one.area, SIZE_RATIO), (longest, 1.15)

    first, *rest = sorted(items, key=lambda one: measures(one)[0][0], reverse=large)
    for other in rest:
        for (mine, ratio), (theirs, _) in zip(measures(first), measures(other), strict=True):
            big, small = (mine, theirs) if large else (theirs, mine)
            if big < ratio * small:
                return None
    return first


def ordinal(view: SceneView) -> Expression | None:
    """ "the second mug from the left": three or more in a row, clearly apart."""
    term, items = view.pick_set()
    if len(items) < 3 or len(items) > len(ORDINALS) or not view.lexicon.countable(term):
        return None
    row = sorted(items, key=lambda one: one.center[0])
    gaps = [b.center[0] - a.center[0] for a, b in pairwise(row)]
    if min(gaps) < ORDER_MARGIN * view.size:
        return None
    side = str(view.choice(("left", "right")))
    if side == "right":
        row.reverse()
    # Counting past the middle is unnatural.
    place = int(view.rng.integers(len(row) // 2 + 1))
    if not row[place].targetable:
        return None
    templates = [f"the {ORDINALS[place]} {{t}} from the {side}"]
    if place:
        templates.append(f"the {{t}} that is {ORDINALS[place]} from the {side}")
    return Expression(view.template(templates, term), "ordinal", (row[place].index,))


def relation(view: SceneView) -> Expression | None:
    """ "the dog to the left of the sofa": the anchor is unique, and one object of the name alone stands so to it."""
    if len(view.seen) < 2 or not view.targets:
        return None
    anchor = view.choice(view.seen)
    anchor_term = view.word_for(anchor, wide=0.05)
    if view.group(anchor_term) != [anchor]:
        return None
    sets = [one for one in view.targets if one is not anchor and len(view.group(one.sprite.name)) > 1]
    rest = [one for one in view.targets if one is not anchor]
    if not rest:
        return None
    target = view.choice(sets if sets and view.rng.random() < 0.7 else rest)
    term = view.word_for(target)
    items = view.group(term)
    if target not in items or anchor in items:
        return None
    words = [words for words, holds in _RELATIONS if _only(items, target, anchor, view.size, holds)]
    if not words:
        return None
    text = view.template((f"{{the}} {view.choice(view.choice(words))}",), term, other=definite(view.say(anchor_term)))
    return Expression(text, "relation", (target.index,))


def _only(items: list[SceneObject], target: SceneObject, anchor: SceneObject, side: int, holds) -> bool:
    # `holds` gives +1 for a clear yes, -1 for a clear no, 0 for doubt; doubt about any object spoils the sentence.
    return holds(target, anchor, side) > 0 and all(holds(one, anchor, side) < 0 for one in items if one is not target)


def _left_of(one: SceneObject, anchor: SceneObject, side: int) -> int:
    gap = anchor.center[0] - one.center[0]
    if gap > PLACE_MARGIN * side and one.bbox[2] < anchor.center[0] and one.center[0] < anchor.bbox[0]:
        # Far above or below, "left of" sounds wrong.
        return 1 if abs(one.center[1] - anchor.center[1]) < 1.5 * gap else 0
    return -1 if gap < -0.02 * side else 0


def _right_of(one: SceneObject, anchor: SceneObject, side: int) -> int:
    gap = one.center[0] - anchor.center[0]
    if gap > PLACE_MARGIN * side and one.bbox[0] > anchor.center[0] and one.center[0] > anchor.bbox[2]:
        return 1 if abs(one.center[1] - anchor.center[1]) < 1.5 * gap else 0
    return -1 if gap < -0.02 * side else 0


def _in_front_of(one: SceneObject, anchor: SceneObject, side: int) -> int:
    if one.sprite.noun in FLYING or anchor.sprite.noun in FLYING:
        return 0
    shared = min(one.bbox[2], anchor.bbox[2]) - max(one.bbox[0], anchor.bbox[0])
    ahead = one.box[3] - anchor.box[3]
    if ahead > 0.04 * side and shared > 0.4 * min(one.bbox[2] - one.bbox[0], anchor.bbox[2] - anchor.bbox[0]):
        return 1
    return -1 if ahead < -0.02 * side or shared <= -0.05 * side else 0


def _behind(one: SceneObject, anchor: SceneObject, side: int) -> int:
    return _in_front_of(anchor, one, side)


def _next_to(one: SceneObject, anchor: SceneObject, side: int) -> int:
    across = max(one.bbox[0] - anchor.bbox[2], anchor.bbox[0] - one.bbox[2])
    feet = abs(one.box[3] - anchor.box[3])
    if -0.03 * side < across < 0.08 * side and feet < 0.12 * side:
        return 1
    return -1 if across > 0.2 * side else 0


_RELATIONS = (
    (("to the left of {other}", "left of {other}", "on the left of {other}"), _left_of),
    (("to the right of {other}", "right of {other}", "on the right of {other}"), _right_of),
    (("in front of {other}",), _in_front_of),
    (("behind {other}",), _behind),
    (("next to {other}", "beside {other}"), _next_to),
)
