"""The sources of the bank: which packages each needs, and how its rows are made from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec

from PIL import Image
from tqdm import tqdm

from . import tables
from .copyright_file import CopyrightFile
from .drawings import drawing_rows
from .packages import Package
from .pictures import backdrop, cut_out
from .rooms import room_rows
from .rows import DRAWN_SETS, UNREADABLE, Row, Workplace, backdrop_row, reason, sprite_row

STAMPS = "usr/share/tuxpaint/stamps/"
DOC = "usr/share/doc/"


@dataclass(frozen=True)
class Source:
    """A stage: `rows(workplace)` yields rows of sprites, or of backgrounds.

    `needs` are Python modules that it draws with: the module, its name in registries, the extra of this package.
    """

    name: str
    kind: str
    packages: tuple[Package, ...]
    rows: Callable[[Workplace], Iterator[Row]]
    needs: tuple[tuple[str, str, str], ...] = ()

    def lacks(self) -> list[str]:
        """What is not installed of what it needs, as sentences."""
        return [
            f"The source {self.name} needs {known_as}. Install it (`pip install 'argenseg[{extra}]'`), or pass "
            f"--skip {self.name}."
            for module, known_as, extra in self.needs
            if find_spec(module) is None
        ]


def emoji_rows(work: Workplace) -> Iterator[Row]:
    """Fluent Emoji 3D, the ones that show one thing."""
    folder = work.unpacked["@lobehub/fluent-emoji-3d"] / "package" / "assets"
    for code, noun in tqdm(tables.emoji().items(), desc="emoji", unit="picture"):
        path = folder / f"{code}.webp"
        try:
            picture = cut_out(Image.open(path))
        except UNREADABLE as error:
            work.problems.append(f"{path.name}: {reason(error)}")
            continue
        origin = (f"assets/{path.name}", "Microsoft (Fluent Emoji), packaged by LobeHub", "MIT")
        yield sprite_row(picture, noun, f"fl:{code}", "fluent", origin, photo=False)


def stamp_rows(work: Workplace) -> Iterator[Row]:
    """Tux Paint's stamps: photographs mostly, some drawn."""
    folder = work.unpacked["tuxpaint-stamps-default"]
    rights = CopyrightFile.read(folder / DOC / "tuxpaint-stamps-default" / "copyright")
    for name, (noun, photo) in tqdm(tables.stamps().items(), desc="tuxpaint", unit="picture"):
        path = folder / STAMPS / f"{name}.png"
        try:
            picture = cut_out(Image.open(path))
        except UNREADABLE as error:
            work.problems.append(f"{name}.png: {reason(error)}")
            continue
        origin = (f"stamps/{name}.png", *rights.of(f"stamps/{name}.png"))
        yield sprite_row(picture, noun, f"tux:{name}", "tux" if photo else "tux_cartoon", origin, photo)


def furniture_rows(work: Workplace) -> Iterator[Row]:
    """Sweet Home 3D's models, from all sides."""
    from .furniture import rendered_models  # needs vtk

    for model, noun, views in rendered_models(work, tables.furniture()):
        for picture in views:
            identity = f"sh3d:{model.identifier}"
            yield sprite_row(picture, noun, identity, "sh3d", (model.file, model.author, model.licence), photo=False)


def wallpaper_rows(source: str, package: str, kind: str = "photo") -> Callable[[Workplace], Iterator[Row]]:
    """A function that yields the backgrounds that the table names for `source`."""

    def rows(work: Workplace) -> Iterator[Row]:
        folder = work.unpacked[package]
        rights = CopyrightFile.read(folder / DOC / package / "copyright")
        for one in tqdm(tables.backdrops(source), desc=source, unit="picture"):
            try:
                picture = backdrop(Image.open(folder / one.file))
            except UNREADABLE as error:
                work.problems.append(f"{one.file}: {reason(error)}")
                continue
            yield backdrop_row(picture, one, kind, source, rights.of(one.file))

    return rows


def _wallpapers(source: str, package: str, folder: str) -> Source:
    parts = (folder, f"{DOC}{package}/copyright")
    return Source(source, "backgrounds", (Package(package, "debian", parts),), wallpaper_rows(source, package))


SOURCES = (
    Source(
        "emoji",
        "sprites",
        (Package("@lobehub/fluent-emoji-3d", "npm", ("package/assets", "package/package.json")),),
        emoji_rows,
    ),
    Source(
        "drawings",
        "sprites",
        tuple(
            Package(package, "npm", ("package/icons.json", "package/chars.json", "package/info.json"))
            for package in DRAWN_SETS.values()
        ),
        drawing_rows,
        needs=(("resvg_py", "resvg-py", "train"),),
    ),
    Source(
        "tuxpaint",
        "sprites",
        (Package("tuxpaint-stamps-default", "debian", (STAMPS, f"{DOC}tuxpaint-stamps-default/copyright")),),
        stamp_rows,
    ),
    Source(
        "furniture",
        "sprites",
        (Package("sweethome3d-furniture", "debian", ("usr/share/sweethome3d/furniture",)),),
        furniture_rows,
        needs=(("vtkmodules", "vtk", "bank"),),
    ),
    _wallpapers("plasma", "plasma-workspace-wallpapers", "usr/share/wallpapers"),
    _wallpapers("mate", "mate-backgrounds", "usr/share/backgrounds/mate/nature"),
    _wallpapers("lomiri", "lomiri-wallpapers-16.04", "usr/share/backgrounds"),
    _wallpapers("stellarium", "stellarium-data", "usr/share/stellarium/landscapes"),
    Source(
        "rooms",
        "backgrounds",
        (Package("sweethome3d", "debian", ("usr/share/sweethome3d/sweethome3d.jar",)),),
        room_rows,
    ),
)
