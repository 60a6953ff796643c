"""Pictures of what a recipe sees and draws: masks laid over images, and grids of them with captions."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

TINT = (255, 0, 80)
SIDE, CAPTION, GAP = 192, 34, 6  # of the tiles of a grid, in pixels


def overlay(image: Image.Image, mask: np.ndarray, color: tuple[int, int, int] = TINT) -> Image.Image:
    """The picture greyed, with the mask (bool, (H, W)) in its own colours under a tint."""
    pixels = np.asarray(image.convert("RGB")).astype(np.float32)
    grey = pixels.mean(-1, keepdims=True) * 0.55 + 40
    shown = np.where(mask[..., None], 0.5 * pixels + 0.5 * np.array(color, dtype=np.float32), grey)
    return Image.fromarray(shown.astype(np.uint8))


def paste_tile(sheet: Image.Image, image: Image.Image, caption: str, left: int, top: int) -> None:
    """Puts an image on the sheet, with at most two lines of text below it."""
    sheet.paste(image, (left, top))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
    words, lines = caption.split(), [""]
    for word in words:
        if draw.textlength(f"{lines[-1]} {word}", font=font) > image.width - 4:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    for number, line in enumerate(lines[:2]):
        draw.text((left + 2, top + image.height + 14 * number), line, fill="black", font=font)


def picture_grid(
    lines: Sequence[tuple[Image.Image, str, np.ndarray, np.ndarray | None, str]], columns: int = 2
) -> Image.Image:
    """One picture of image | truth | drawn for each line.

    Args:
        lines: image, what was asked for, true mask (H, W), drawn mask (None: nothing was drawn), caption of the drawn.
        columns: lines side by side.
    """
    width, height = 3 * (SIDE + GAP) + 2 * GAP, SIDE + CAPTION + GAP
    sheet = Image.new("RGB", (columns * width, max(1, -(-len(lines) // columns)) * height), "white")
    for number, (image, prompt, truth, drawn, caption) in enumerate(lines):
        left, top = (number % columns) * width, (number // columns) * height
        shown = np.zeros_like(truth) if drawn is None else drawn
        tiles = [
            (image.convert("RGB"), prompt),
            (overlay(image, truth), "truth" if truth.any() else "truth: not there"),
            (overlay(image, shown), caption),
        ]
        for place, (picture, text) in enumerate(tiles):
            picture = picture.resize((SIDE, SIDE))  # squashed, as the model sees it
            paste_tile(sheet, picture, text, left + place * (SIDE + GAP), top)
    return sheet


def save_picture(picture: Image.Image, path: Path) -> None:
    """Writes a picture whole or not at all."""
    part = path.with_name(f"{path.stem}.part{path.suffix}")
    picture.save(part)
    part.replace(path)
