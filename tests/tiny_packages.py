"""Debian and npm packages of a few kilobytes, laid out like the ones that the bank of cut-outs is built from."""

import io
import json
import tarfile
import zipfile
from pathlib import Path

from PIL import Image, ImageDraw

from trl_recipes.bank_building import tables
from trl_recipes.bank_building.rows import DRAWN_SETS
from trl_recipes.scenes.bank import SPLITS

STAMPS = "usr/share/tuxpaint/stamps/"
RIGHTS = """Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/

Files: *
Copyright: 2002, Someone Else
License: GPL-2
 Its text.

Files: 16.04/{file}
Copyright: 2018, Ana Lens
License: CC-BY-4.0
"""
TEXTURES = """license=CC-BY \\u00e9
image#1=/textures/tile.png
category#1=Floor
width#1=40
height#1=40
image#2=/textures/grass.png
category#2=Floor
width#2=30
height#2=30
image#3=/textures/brick.png
category#3=Wall
width#3=23
height#3=15
image#4=/textures/blue.png
category#4=Sky
"""
CUBE = """mtllib {name}.mtl
v -1 0 -1
v 1 0 -1
v 1 0 1
v -1 0 1
v -1 2 -1
v 1 2 -1
v 1 2 1
v -1 2 1
usemtl red
f 1 2
f 1 2 3 4
f 5 8 7 6
f 1 5 6 2
f 2 6 7 3
f 3 7 8 4
f 4 8 5 1
"""


def cut_out_bytes(kind: str = "PNG", color: tuple[int, int, int] = (200, 20, 20), size: int = 64) -> bytes:
    """A disc on a transparent background."""
    picture = Image.new("RGBA", (size, size))
    ImageDraw.Draw(picture).ellipse((8, 8, size - 8, size - 8), fill=(*color, 255))
    return _encoded(picture, kind)


def photograph(kind: str, size: tuple[int, int] = (200, 150)) -> bytes:
    """A plain picture."""
    return _encoded(Image.new("RGB", size, (90, 120, 60)), kind)


def _encoded(picture: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind)
    return buffer.getvalue()


def write_tar(target: io.BytesIO, files: dict[str, bytes], mode: str, prefix: str) -> None:
    with tarfile.open(fileobj=target, mode=mode) as tar:  # type: ignore[call-overload]
        for name, content in files.items():
            member = tarfile.TarInfo(prefix + name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def write_deb(path: Path, files: dict[str, bytes]) -> Path:
    """A Debian package: an `ar` archive of debian-binary, control.tar and data.tar.xz."""
    data = io.BytesIO()
    write_tar(data, files, "w:xz", "./")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(b"!<arch>\n")
        for name, content in (("debian-binary", b"2.0\n"), ("control.tar", b"odd"), ("data.tar.xz", data.getvalue())):
            file.write(f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode())
            file.write(content + b"\n" * (len(content) % 2))
    return path


def write_npm(path: Path, files: dict[str, bytes]) -> Path:
    """What `npm pack` downloads."""
    data = io.BytesIO()
    write_tar(data, files, "w:gz", "package/")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.getvalue())
    return path


def zipped(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def some_stamps() -> list[str]:
    """Stamps of all four splits, by the tables."""
    wanted = {"train": 6, "val": 2, "test": 3, "unseen": 1}
    chosen = []
    for stamp in tables.stamps():
        split = tables.splits()[f"tux:{stamp}"]
        if wanted[split]:
            wanted[split] -= 1
            chosen.append(stamp)
    return chosen


def some_emoji() -> list[str]:
    return list(tables.emoji())[:5]


def drawn_emoji() -> list[str]:
    """Two emoji for training, and one of each other split."""
    codes = {split: [code for code in tables.emoji() if tables.splits()[f"fl:{code}"] == split] for split in SPLITS}
    trained = [code for code in codes["train"] if "-fe0f" in code][:2]
    return [*trained, *(codes[split][0] for split in SPLITS if split != "train")]


def drawn_set(name: str) -> dict[str, bytes]:
    """Squares in a set's own size; the second is an alias and cannot be drawn in the set "noto"."""
    square = '<path fill="#1e28dc" d="M4 4h24v12H4z"/>'
    first, second, *kept_back = drawn_emoji()
    icons = {"a-square": {"body": square}, "other": {"body": square if name != "noto" else "<path", "width": 40}}
    aliases = {"alias": {"parent": "another"}, "another": {"parent": "other", "hFlip": True}}
    names = {first.replace("-fe0f", ""): "a-square", second: "alias"} | dict.fromkeys(kept_back, "a-square")
    files = {
        "icons.json": {"icons": icons, "aliases": aliases, "width": 32, "height": 32},
        "chars.json": names,
        "info.json": {"author": {"name": f"Maker of {name}"}, "license": {"title": "CC BY 4.0"}},
    }
    return {file: json.dumps(content).encode() for file, content in files.items()}


def some_models() -> list[str]:
    return list(tables.furniture())[:3]


def write_packages(folder: Path) -> Path:
    """Archives of every source, with a few of the files that the tables name; the second model has no surface."""
    emoji = {f"assets/{code}.webp": cut_out_bytes("WEBP", (30, 40, 220)) for code in some_emoji()}
    write_npm(folder / "lobehub-fluent-emoji-3d-1.1.0.tgz", {"package.json": b"{}", **emoji})
    for name, package in DRAWN_SETS.items():
        write_npm(folder / f"{package[1:].replace('/', '-')}-1.2.0.tgz", drawn_set(name))
    stamps = {f"{STAMPS}{name}.png": cut_out_bytes() for name in some_stamps()}
    stamps[f"{STAMPS}{some_stamps()[0]}.png"] = b"no picture"
    rights = RIGHTS.format(file="none").encode()
    write_deb(
        folder / "tuxpaint-stamps-default_2022-1_all.deb",
        {**stamps, "usr/share/doc/tuxpaint-stamps-default/copyright": rights},
    )
    for source, package in (
        ("plasma", "plasma-workspace-wallpapers"),
        ("mate", "mate-backgrounds"),
        ("lomiri", "lomiri-wallpapers-16.04"),
        ("stellarium", "stellarium-data"),
    ):
        files = {
            one.file: photograph("JPEG") if one.file.endswith("jpg") else cut_out_bytes()
            for one in tables.backdrops(source)
        }
        first = tables.backdrops(source)[0].file.rpartition("/")[2]
        files[f"usr/share/doc/{package}/copyright"] = RIGHTS.format(file=first).encode()
        write_deb(folder / f"{package}_4%3a1.0-1_all.deb", files)
    textures = {f"textures/{name}.png": photograph("PNG", (16, 16)) for name in ("tile", "grass", "brick")}
    jar = zipped({"com/eteks/sweethome3d/io/DefaultTexturesCatalog.properties": TEXTURES.encode(), **textures})
    write_deb(folder / "sweethome3d_7.0-1_all.deb", {"usr/share/sweethome3d/sweethome3d.jar": jar})
    write_deb(folder / "sweethome3d-furniture_1.8-1_all.deb", {"usr/share/sweethome3d/furniture/A.sh3f": catalogue()})
    return folder


def catalogue() -> bytes:
    """Cubes under the first identifiers of the table; the second one has no surface."""
    text, files = ["license=CC-BY 3.0"], {}
    for number, name in enumerate(some_models(), start=1):
        text += [
            f"id#{number}={name}",
            f"model#{number}=/a/m{number}/m{number}.obj",
            f"creator#{number}=Maker {number}",
        ]
        shape = CUBE if number != 2 else "v 0 0 0\n"
        files[f"a/m{number}/m{number}.obj"] = shape.format(name=f"m{number}").encode()
        files[f"a/m{number}/m{number}.mtl"] = b"newmtl red\nKd 0.8 0.1 0.1\n"
    return zipped({"PluginFurnitureCatalog.properties": "\n".join(text).encode("latin-1"), **files})
