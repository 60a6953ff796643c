"""Cutting out, naming colours, skies, rooms and licences."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from trl_recipes.bank_building.copyright_file import CopyrightFile
from trl_recipes.bank_building.pictures import backdrop, color_name, cut_out, encode
from trl_recipes.bank_building.rooms import Texture, draw_room, read_properties

COLORS = {
    "red": (200, 20, 25), "orange": (245, 140, 20), "yellow": (240, 215, 40), "green": (40, 150, 50),
    "blue": (40, 80, 210), "purple": (120, 50, 190), "pink": (245, 150, 180), "brown": (110, 70, 40),
    "black": (20, 20, 22), "white": (245, 245, 240), "grey": (130, 130, 132),
}  # fmt: skip


def disc(color: tuple[int, int, int], box: tuple[int, int, int, int] = (50, 20, 250, 120)) -> Image.Image:
    picture = Image.new("RGBA", (300, 200))
    ImageDraw.Draw(picture).ellipse(box, fill=(*color, 255))
    return picture


@pytest.mark.parametrize("name", COLORS)
def test_color_names(name: str) -> None:
    assert color_name(disc(COLORS[name])) == name


def test_two_colors_are_none() -> None:
    halves = disc(COLORS["red"], (0, 0, 299, 199))
    ImageDraw.Draw(halves).pieslice((0, 0, 299, 199), 90, 270, fill=(*COLORS["blue"], 255))
    assert color_name(halves) is None
    ImageDraw.Draw(halves).pieslice((0, 0, 299, 199), 45, 315, fill=(*COLORS["blue"], 255))
    assert color_name(halves) == "blue"


def test_cut_out() -> None:
    assert cut_out(disc((1, 2, 3))).size == (160, 80)
    assert Image.open(io.BytesIO(encode(cut_out(disc((1, 2, 3)))))).mode == "RGBA"
    for picture, message in (
        (Image.new("RGB", (20, 20)), "no transparent background"),
        (Image.new("RGBA", (20, 20)), "nothing in it is opaque"),
        (disc((1, 2, 3), (5, 5, 9, 100)), "only 5x96 pixels"),
    ):
        with pytest.raises(ValueError, match=message):
            cut_out(picture)


def test_transparent_sky_becomes_blue() -> None:
    picture = Image.new("RGBA", (100, 100))
    ImageDraw.Draw(picture).rectangle((0, 60, 99, 99), fill=(10, 90, 10, 255))
    pixels = np.asarray(backdrop(picture)).astype(int)
    assert pixels.shape == (100, 100, 3)
    assert pixels[5, 5, 2] > pixels[5, 5, 0] + 60 and tuple(pixels[80, 50]) == (10, 90, 10)
    assert max(backdrop(Image.new("RGB", (3000, 2000))).size) == 640


def test_room_floor_and_wall() -> None:
    floor = Texture("red", "Floor", 40, 40, np.full((8, 8, 3), (200, 0, 0), dtype=np.float32))
    wall = Texture("blue", "Wall", 40, 40, np.full((8, 8, 3), (0, 0, 200), dtype=np.float32))
    picture, edge = draw_room(floor, wall, np.random.default_rng(1))
    pixels = np.asarray(picture).astype(int)
    line = round(edge * picture.height)
    assert (pixels[: line - 2, :, 2] > 50).all() and (pixels[: line - 2, :, 0] == 0).all()
    assert (pixels[line + 2 :, :, 0] > 50).all() and (pixels[line + 2 :, :, 2] == 0).all()


def test_properties() -> None:
    text = "# a=b\nname#1=Caf\\u00e9 = 2\n\nwidth#1 = 40\n"
    assert read_properties(text) == {"name#1": "Café = 2", "width#1": "40"}


def test_copyright(tmp_path: Path) -> None:
    path = tmp_path / "copyright"
    path.write_text(
        "Files: *\nCopyright: 2001, A\n 2002, B\nLicense: GPL-2\n Text.\n\n"
        "Files: nature/*.jpg\n debian/x\nCopyright: 2003, C\nLicense: CC0\n\nLicense: GPL-2\n Text.\n"
    )
    rights = CopyrightFile.read(path)
    assert rights.of("usr/share/mate/nature/Aqua.jpg") == ("2003, C", "CC0")
    assert rights.of("usr/share/mate/other/Aqua.jpg") == ("2001, A; 2002, B", "GPL-2")
    assert CopyrightFile.read(tmp_path / "none").of("x") == ("not stated", "not stated")
