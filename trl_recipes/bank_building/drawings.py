"""Emoji as other sets draw them: more pictures of what the bank has few of.

The sets are npm packages of one format (`@iconify-json/...`): `icons.json` holds the drawings as SVG, `chars.json`
their names by code point, `info.json` author and licence. Only emoji that are for training are taken: one that is kept
back for validation or tests is kept back in every style.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any

from PIL import Image
from tqdm import tqdm

from . import tables
from .pictures import SPRITE_SIDE, cut_out
from .rows import DRAWN_SETS, UNREADABLE, Row, Workplace, reason, sprite_row

OUTLINED = ("openmoji",)  # in black, whatever colour a small thing has
ALL_KINDS = "-fe0f"  # asks for a coloured emoji; not all sets write it


def drawing_rows(work: Workplace) -> Iterator[Row]:
    """The training emoji of all sets."""
    splits = tables.splits()
    wanted = {code: noun for code, noun in tables.emoji().items() if splits[f"fl:{code}"] == "train"}
    for name, package in DRAWN_SETS.items():
        folder = work.unpacked[package] / "package"
        icons, names, about = (
            json.loads((folder / f"{one}.json").read_text(encoding="utf-8")) for one in ("icons", "chars", "info")
        )
        for code, noun in tqdm(wanted.items(), desc=name, unit="picture"):
            called = names.get(code) or names.get(code.replace(ALL_KINDS, ""))
            try:
                picture = cut_out(draw(icons, called))
            except UNREADABLE as error:
                work.problems.append(f"{name} {code}: {reason(error)}")
                continue
            origin = (f"{package}/{called}", about["author"]["name"], about["license"]["title"])
            row = sprite_row(picture, noun, f"{name}:{code}", name, origin, photo=False, split="train")
            if name in OUTLINED and row["color"] == "black":
                row["color"] = None
            yield row


def draw(icons: dict[str, Any], name: str | None) -> Image.Image:
    """A drawing of a set, RGBA, a little larger than the bank keeps it.

    Raises:
        ValueError: there is none of that name, or it cannot be drawn.
    """
    import resvg_py

    aliases = icons.get("aliases", {})
    while name in aliases:
        name = aliases[name]["parent"]  # may be mirrored, which changes nothing here
    icon = icons["icons"].get(name)
    if icon is None:
        raise ValueError("it is not in the package")
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))  # 16: the format's default
    box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    svg = f'<svg {spaces} viewBox="{box}" width="{width}" height="{height}">{icon["body"]}</svg>'
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SPRITE_SIDE + SPRITE_SIDE // 4))
    return Image.open(io.BytesIO(png)).convert("RGBA")
