"""What recipes show: grids of image, truth and answer, and learning curves."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from trl_recipes.learning_curve import BOTTOM, COLOURS, HEIGHT, LEFT, RIGHT, TOP, WIDTH, learning_curve
from trl_recipes.picture_grid import CAPTION, GAP, SIDE, overlay, paste_tile, picture_grid, save_picture

GREEN = Image.new("RGB", (60, 40), (0, 200, 0))
LEFT_HALF = np.arange(60)[None].repeat(40, 0) < 30


def test_a_mask_is_tinted_and_the_rest_is_grey():
    shown = np.asarray(overlay(GREEN, LEFT_HALF)).astype(int)
    assert (shown[:, :30] == [127, 100, 40]).all()
    assert (shown[:, 30:, 0] == shown[:, 30:, 1]).all() and (shown[:, 30:, 1] == shown[:, 30:, 2]).all()


def test_a_grid_shows_image_truth_and_answer_of_each_line():
    nothing = np.zeros_like(LEFT_HALF)
    lines = [
        (GREEN, "the left half", LEFT_HALF, ~LEFT_HALF, "IoU 0.00"),
        (GREEN, "the whale", nothing, None, "There is no whale."),
        (GREEN, "the right half", ~LEFT_HALF, ~LEFT_HALF, "IoU 1.00"),
    ]
    sheet = np.asarray(picture_grid(lines)).astype(int)

    def is_tinted(number: int, tile: int, half: int) -> bool:
        top = (number // 2) * (SIDE + CAPTION + GAP)
        left = (number % 2) * (sheet.shape[1] // 2) + tile * (SIDE + GAP)
        red, green, _ = sheet[top + SIDE // 2, left + SIDE // 4 + half * SIDE // 2]
        return red > green

    assert sheet.shape[0] == 2 * (SIDE + CAPTION + GAP)
    found = [[[is_tinted(n, tile, half) for half in (0, 1)] for tile in (0, 1, 2)] for n in range(3)]
    assert found[0] == [[False, False], [True, False], [False, True]]
    assert found[1] == [[False, False]] * 3
    assert found[2] == [[False, False], [False, True], [False, True]]
    caption = sheet[SIDE : SIDE + CAPTION, :SIDE]
    assert caption.min() < 100 and caption.max() == 255  # there is text under the image


def test_a_picture_is_written_whole_or_not_at_all(tmp_path):
    save_picture(GREEN, tmp_path / "a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    with pytest.raises(AttributeError):
        save_picture(None, tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").size == (60, 40)


def test_a_curve_goes_through_what_was_measured():
    metrics = [{"step": 0, "giou": 0.2, "ciou": 0.1}, {"step": 50, "giou": 0.6, "ciou": 0.5}]
    picture = learning_curve([(10, 4.0), (90, 1.0), (100, 0.5)], metrics)
    for step, value in ((0, 0.2), (50, 0.6)):
        x = LEFT + (WIDTH - LEFT - RIGHT) * step / 100
        y = HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * value
        assert picture.getpixel((round(x), round(y))) == COLOURS["giou"]
    assert learning_curve([], []).size == (WIDTH, HEIGHT)


@pytest.mark.parametrize(("loss", "lowest"), [(0.2, "0.042"), (4.0, "0.84"), (100.0, "21")])
def test_labels_of_the_loss_differ(loss, lowest, monkeypatch):
    texts = []
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda self, place, text, **_: texts.append((place[0], text)))
    learning_curve([(10, loss)], [])
    labels = [text for x, text in texts if x == WIDTH - RIGHT + 6]
    assert labels[:2] == ["0", lowest] and len(set(labels)) == 6


@pytest.mark.parametrize("caption", ["a dog\n\non grass", "\n", "", "a\tb\r\nc"])
def test_a_caption_of_several_lines(caption):
    sheet, flat = (Image.new("RGB", (100, 140), "white") for _ in range(2))
    paste_tile(sheet, Image.new("RGB", (100, 100)), caption, 0, 0)
    paste_tile(flat, Image.new("RGB", (100, 100)), " ".join(caption.split()), 0, 0)
    assert np.array_equal(sheet, flat)
