"""Polygons as OpenCV paints them with `polylines` and `fillPoly`, pixel by pixel: some data sets' masks are made so.

Differs from pycocotools and from Pillow along every contour. Equal to OpenCV where all corners are in the picture (for
others OpenCV moves the ends of a line to the picture's edge, which can change its slope).
"""

from collections.abc import Sequence

import numpy as np

Corner = tuple[int, int]
ONE = 1 << 16


def paint_polygon(canvas: np.ndarray, corners: Sequence[Corner], value: int) -> None:
    """Sets the pixels of a polygon in `canvas` (H, W), in place: its outline, and what is inside by the even-odd rule.

    Args:
        corners: (x, y) in whole pixels; the last is joined to the first.
    """
    ends = [*corners[1:], corners[0]]
    for start, end in zip(corners, ends, strict=True):
        _paint_line(canvas, start, end, value)
    edges = [sorted(pair, key=_row) for pair in zip(corners, ends, strict=True)]
    tops, bottoms = np.array([top for top, _ in edges]).T, np.array([bottom for _, bottom in edges]).T
    # in units of 1 / 65536 pixel, the step from row to row rounded towards zero, as OpenCV computes
    step = np.trunc((bottoms[0] - tops[0]) * ONE / np.maximum(bottoms[1] - tops[1], 1)).astype(np.int64)
    for row in range(max(0, int(tops[1].min())), min(len(canvas) - 1, int(bottoms[1].max())) + 1):
        crossed = (tops[1] <= row) & (row < bottoms[1])
        found = np.sort(tops[0][crossed] * ONE + (row - tops[1][crossed]) * step[crossed])
        for left, right in zip(found[::2], found[1::2], strict=True):
            canvas[row, max(0, -(-left // ONE)) : max(0, right // ONE + 1)] = value


def _row(corner: Corner) -> int:
    return corner[1]


def _paint_line(canvas: np.ndarray, start: Corner, end: Corner, value: int) -> None:
    """A line of 8-connected pixels, by Bresenham from left to right; a tie stays on the side it comes from."""
    (x0, y0), (x1, y1) = (start, end) if start[0] <= end[0] else (end, start)
    width, height, down = x1 - x0, abs(y1 - y0), 1 if y1 >= y0 else -1
    length = max(width, height)
    steps = np.arange(length + 1)
    aside = (2 * min(width, height) * steps + length - 1) // (2 * length) if length else steps
    xs, ys = (x0 + steps, y0 + down * aside) if width >= height else (x0 + aside, y0 + down * steps)
    inside = (xs >= 0) & (ys >= 0) & (xs < canvas.shape[1]) & (ys < canvas.shape[0])
    canvas[ys[inside], xs[inside]] = value
