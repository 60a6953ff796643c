"""Polygons against what OpenCV 5.0.0 painted: `polylines(mask, points, True, 1, 1)` and `fillPoly(mask, points, 1)`."""

import hashlib

import numpy as np

from trl_recipes.tasks.polygons import paint_polygon

OF_OPENCV = "69f04b6df397ea7051afc48cf29256114a293edf2652fc3b1a27eee253f6c810"  # sha256 of the thousand masks, as bits


def random_polygon(seed: int) -> list[tuple[int, int]]:
    """Three to eleven corners in 160x120 pixels, in no order: most cross themselves."""
    rng, count = np.random.default_rng(seed), 3 + seed % 9
    return [(int(x), int(y)) for x, y in zip(rng.integers(0, 160, count), rng.integers(0, 120, count), strict=True)]


def painted(corners, height=120, width=160) -> np.ndarray:
    canvas = np.zeros((height, width), np.uint8)
    paint_polygon(canvas, corners, 1)
    return canvas


def test_a_thousand_polygons_are_those_of_opencv():
    masks = [np.packbits(painted(random_polygon(seed))).tobytes() for seed in range(1000)]
    assert hashlib.sha256(b"".join(masks)).hexdigest() == OF_OPENCV


def test_a_triangle_of_opencv():
    rows = ["000000000", "011110000", "001111110", "001111100", "000111000", "000010000"]
    found = painted([(1, 1), (7, 2), (4, 5)], 6, 9)
    assert ["".join(map(str, row)) for row in found] == rows


def test_points_lines_and_corners_outside():
    assert painted([(3, 2)], 5, 6).sum() == 1
    assert painted([(1, 1), (4, 1)], 5, 6)[1].tolist() == [0, 1, 1, 1, 1, 0]
    assert painted([(-5, -5), (20, -5), (20, 20), (-5, 20)], 5, 6).all()
    assert not painted([(-5, -5), (-2, -5), (-2, 20)], 5, 6).any()
