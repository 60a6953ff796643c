"""Where things stand to each other, on scenes laid out by hand in a picture of 100 x 100."""

import numpy as np
import pytest
from PIL import Image
from tiny_scenes import VOCABULARY

from trl_recipes.scenes.bank import Background, Sprite
from trl_recipes.scenes.compose import Scene, SceneObject
from trl_recipes.scenes.lexicon import Lexicon
from trl_recipes.scenes.relations import (
    _behind,
    _extreme,
    _in_front_of,
    _left_of,
    _middle,
    _next_to,
    _right_of,
    _single_side,
    spatial,
)
from trl_recipes.scenes.view import SceneView

Box = tuple[int, int, int, int]  # left, top, right, bottom


def thing(box: Box, hidden_from: int = 100, noun: str = "disc", number: int = 1) -> SceneObject:
    """An object of which nothing shows from a row on."""
    sprite = Sprite(0, noun, noun, (), (), None, False, "drawn", noun, "stylised")
    seen = (*box[:3], min(box[3], hidden_from))
    area, visible = ((b[2] - b[0]) * (b[3] - b[1]) for b in (box, seen))
    return SceneObject(number, sprite, seen, box, area, visible, visible / area, True, True)


def view_of(things: list[SceneObject], seed: int = 0) -> SceneView:
    for number, one in enumerate(things, start=1):
        one.index = number
    lexicon = Lexicon(VOCABULARY, [one.sprite for one in things])
    picture = Image.new("RGB", (100, 100))
    scene = Scene(picture, things, np.zeros((100, 100), np.uint8), Background(0, 0.4, ()), lexicon)
    return SceneView(scene, np.random.default_rng(seed))


def extreme(side: str, *things: SceneObject) -> int | None:
    """Which of them it is, from 0."""
    found = _extreme(view_of(list(things)), list(things), side)
    return None if found is None else found.index - 1


def test_every_side_has_its_outermost_thing():
    near, far = thing((10, 30, 40, 90)), thing((50, 40, 80, 70))  # the near one is taller, but stands lower
    sides = ("front", "back", "left", "right")
    assert [extreme(side, near, far) for side in sides] == [0, 1, 0, 1]
    assert [extreme(side, far, near) for side in sides] == [1, 0, 1, 0]
    high, low = thing((10, 10, 30, 40)), thing((10, 30, 30, 80))
    assert [extreme(side, low, high) for side in ("top", "bottom")] == [1, 0]


@pytest.mark.parametrize("side", ["left", "right", "top", "bottom"])
def test_the_outermost_thing_is_so_by_a_margin_and_with_both_of_its_edges(side):
    """As seen from the side."""

    def placed(low: int, high: int) -> SceneObject:
        if side in ("right", "bottom"):
            low, high = 100 - high, 100 - low
        return thing((low, 40, high, 60) if side in ("left", "right") else (40, low, 60, high))

    assert extreme(side, placed(20, 50), placed(10, 90)) is None  # the other begins farther out
    assert extreme(side, placed(20, 65), placed(55, 60)) is None  # the other ends farther out
    assert extreme(side, placed(20, 50), placed(55, 60)) == 0
    assert extreme(side, placed(20, 50), placed(29, 59)) is None  # by 9 only


def test_the_nearest_thing_is_so_by_what_shows_of_it():
    feet_hidden, other = thing((10, 30, 40, 95), hidden_from=60), thing((50, 40, 80, 75))
    assert extreme("front", feet_hidden, other) is None
    assert extreme("front", thing((10, 30, 40, 95)), other) == 0
    assert extreme("front", thing((10, 30, 40, 95), noun="balloon"), other) is None  # what flies stands nowhere


@pytest.mark.parametrize(("x", "side"), [(34, "left"), (38, None), (62, None), (66, "right")])
def test_a_thing_alone_is_on_a_side_only_if_far_from_the_middle(x, side):
    found = _single_side(view_of([thing((x - 5, 40, x + 5, 60))]))
    assert (found and found.text) == (side and f"the disc on the {side}")


@pytest.mark.parametrize(("x", "said"), [(50, True), (32, True), (28, False), (72, False)])
def test_the_middle_thing_is_clearly_between_the_others(x, said):
    things = [thing((at - 5, 40, at + 5, 60)) for at in (80, x, 20)]
    found = _middle(view_of(things), "disc", things)
    assert (found.object_ids == (2,)) if said else found is None


def test_what_is_said_to_be_near_or_far_is_so():
    words = {"front": 1, "closest": 1, "nearest": 1, "back": 2, "farthest": 2}
    heard = set()
    for seed in range(200):
        found = spatial(view_of([thing((10, 30, 40, 90)), thing((50, 40, 80, 70))], seed))
        for word in (word for word in words if found and word in found.text):
            assert found.object_ids == (words[word],), found.text
            heard.add(word)
    assert heard == set(words)


ANCHOR = thing((40, 40, 60, 60))


@pytest.mark.parametrize(
    ("box", "left", "right"),
    [
        ((0, 40, 20, 60), 1, -1),
        ((80, 40, 100, 60), -1, 1),
        ((45, 70, 55, 90), 0, 0),  # below
        ((20, 0, 36, 4), 0, -1),  # to the left, but far above
        ((64, 0, 80, 4), -1, 0),
    ],
)
def test_left_and_right(box, left, right):
    one = thing(box)
    assert (_left_of(one, ANCHOR, 100), _right_of(one, ANCHOR, 100)) == (left, right)


def test_a_step_aside_is_not_yet_left_or_right():
    anchor = thing((48, 40, 52, 60))
    assert _left_of(thing((41, 40, 49, 60)), anchor, 100) == _right_of(thing((51, 40, 59, 60)), anchor, 100) == 0


@pytest.mark.parametrize(
    ("box", "front", "behind"),
    [
        ((45, 50, 65, 80), 1, -1),
        ((35, 20, 55, 50), -1, 1),
        ((45, 40, 65, 61), 0, 0),  # both stand in one row
        ((80, 50, 99, 80), -1, -1),  # apart
        ((57, 50, 77, 80), 0, -1),  # too little in common
    ],
)
def test_in_front_and_behind(box, front, behind):
    one = thing(box)
    assert (_in_front_of(one, ANCHOR, 100), _behind(one, ANCHOR, 100)) == (front, behind)


@pytest.mark.parametrize(
    ("box", "beside"),
    [
        ((62, 40, 80, 58), 1),
        ((20, 40, 38, 58), 1),
        ((62, 60, 80, 80), 0),
        ((70, 40, 80, 60), 0),
        ((85, 40, 99, 60), -1),
    ],
)
def test_next_to(box, beside):
    assert _next_to(thing(box), ANCHOR, 100) == beside
