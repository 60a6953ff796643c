"""A bank from tiny packages: what is in it, what is told, and how a second run goes on."""

import io
import shutil
from importlib.util import find_spec
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tiny_packages import drawn_emoji, some_emoji, some_models, some_stamps, write_npm, write_packages

from trl_recipes.bank_building import build, rooms, sources, tables
from trl_recipes.bank_building import rows as bank_rows
from trl_recipes.bank_building.build import _check, build_bank
from trl_recipes.bank_building.packages import unpack
from trl_recipes.bank_building.rows import DRAWN_SETS
from trl_recipes.scenes import SceneBank, SceneConfig, SceneDataset
from trl_recipes.scenes.build_bank import main

SKIP = ["furniture"]
ROOMS = 12


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("bank")
    write_packages(folder / "work" / "packages")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rooms, "COUNT", ROOMS)
        return folder, build_bank(folder, folder / "work", SKIP)


def rows(folder: Path, name: str) -> list[dict]:
    return pq.read_table(folder / f"{name}.parquet").to_pylist()


def test_scenes_can_be_composed(built: tuple[Path, str]) -> None:
    for split in ("train", "val", "test", "unseen"):
        bank = SceneBank.from_folder(built[0], split)
        assert bank.sprites and bank.backgrounds
    bank = SceneBank.from_folder(built[0], "train")
    item = SceneDataset(bank, SceneConfig.preset("easy"), 0, 4, 2)[0]
    assert item["image"].size == (256, 256)
    assert any(one["mask"].any() for one in item["expressions"])


def test_sprites(built: tuple[Path, str]) -> None:
    sprites = {row["id"]: row for row in rows(built[0], "sprites")}
    assert len(sprites) == len(some_emoji()) + len(some_stamps()) - 1 + 7  # one stamp is no picture, one drawing either
    emoji = sprites[f"fl:{some_emoji()[0]}"]
    assert (emoji["noun"], emoji["color"], emoji["photo"]) == (tables.emoji()[some_emoji()[0]], "blue", False)
    stamp = sprites[f"tux:{some_stamps()[1]}"]
    noun, photo = tables.stamps()[some_stamps()[1]]
    assert (stamp["noun"], stamp["color"], stamp["photo"]) == (noun, "red", photo)
    assert (stamp["author"], stamp["lic"]) == ("2002, Someone Else", "GPL-2")
    assert stamp["categories"] == list(tables.nouns()[noun].categories)


def test_drawings_are_of_training_emoji_alone(built: tuple[Path, str]) -> None:
    first, second, *kept_back = drawn_emoji()
    drawn = {row["id"]: row for row in rows(built[0], "sprites") if row["src"] in DRAWN_SETS}
    assert set(drawn) == {f"{name}:{code}" for name in DRAWN_SETS for code in (first, second)} - {f"noto:{second}"}
    assert {row["split"] for row in drawn.values()} == {"train"}
    assert {tables.splits()[f"fl:{code}"] for code in kept_back} == {"val", "test", "unseen"}
    row = drawn[f"openmoji:{second}"]
    assert (row["noun"], row["color"], row["photo"]) == (tables.emoji()[second], "blue", False)
    assert (row["file"], row["author"], row["lic"]) == (
        "@iconify-json/openmoji/alias",
        "Maker of openmoji",
        "CC BY 4.0",
    )
    assert Image.open(io.BytesIO(row["image"]["bytes"])).size == (120, 60)  # of 200 pixels for 40 units
    trained = [code for code in tables.emoji() if tables.splits()[f"fl:{code}"] == "train"]
    assert f"drawings            7      {4 * len(trained) - 7}" in built[1]


def test_black_of_outlines_is_no_colour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bank_rows, "color_name", lambda picture: "black")
    archives = write_packages(tmp_path / "packages")
    source = next(one for one in sources.SOURCES if one.name == "drawings")
    unpacked = {one.name: unpack(one, one.archive(archives), tmp_path / "unpacked") for one in source.packages}
    colors = {(row["src"], row["color"]) for row in source.rows(bank_rows.Workplace(unpacked, tmp_path))}
    assert colors == {(name, None if name == "openmoji" else "black") for name in DRAWN_SETS}


def test_an_emoji_in_two_splits_is_found_in_whatever_style(built: tuple[Path, str], tmp_path: Path) -> None:
    for name in ("sprites.parquet", "backgrounds.parquet", "vocabulary.json"):
        shutil.copy(built[0] / name, tmp_path)
    table = pq.read_table(tmp_path / "sprites.parquet")
    leaked = [
        row | {"id": row["id"].replace("noto:", "fl:"), "split": "test"}
        for row in table.to_pylist()
        if row["src"] == "noto"
    ]
    both = pa.concat_tables([table, pa.Table.from_pylist(leaked, schema=table.schema)])
    pq.write_table(both, tmp_path / "sprites.parquet")
    with pytest.raises(ValueError, match="Identities in two splits: \\['fl:"):
        _check(tmp_path)


def test_what_is_not_installed_is_told_before_anything_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "find_spec", lambda name: None)
    monkeypatch.setattr(build, "fetch", lambda package, folder: pytest.fail(f"fetched {package.name}"))
    with pytest.raises(ValueError, match="needs resvg-py.*--skip drawings.*\n.*needs vtk.*--skip furniture"):
        build_bank(tmp_path, tmp_path / "work")
    with pytest.raises(ValueError, match="needs vtk") as told:
        build_bank(tmp_path, tmp_path / "work", ["drawings"])
    assert "resvg" not in str(told.value)


def test_a_finished_stage_needs_no_library_again(
    built: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(built[0] / "work", tmp_path / "work")
    monkeypatch.setattr(sources, "find_spec", lambda name: None)
    build_bank(tmp_path, tmp_path / "work", SKIP)
    for part in (tmp_path / "work" / "stages").glob("*.parquet"):
        pq.write_table(pq.read_table(part).replace_schema_metadata(), part)  # as if of another recipe
    with pytest.raises(ValueError, match="needs resvg-py"):
        build_bank(tmp_path, tmp_path / "work", SKIP)


def test_backgrounds(built: tuple[Path, str]) -> None:
    found = rows(built[0], "backgrounds")
    photographs = [row for row in found if row["kind"] == "photo"]
    indoors = [row for row in found if row["kind"] == "room"]
    assert len(photographs) == sum(len(tables.backdrops(name)) for name in ("plasma", "mate", "lomiri", "stellarium"))
    assert len(indoors) == ROOMS and all(0.25 < row["floor"] < 0.65 for row in indoors)
    assert all(("plant" in row["avoid"]) == ("grass" in row["file"]) for row in indoors)
    assert {row["lic"] for row in indoors} == {"CC-BY é"}


def test_attribution_names_every_file(built: tuple[Path, str]) -> None:
    text = (built[0] / "ATTRIBUTION.md").read_text(encoding="utf-8")
    for row in rows(built[0], "sprites") + rows(built[0], "backgrounds"):
        assert f"- `{row['file']}`: {row['author']}; {row['lic']}" in text
    assert f"`{tables.backdrops('lomiri')[0].file}`: 2018, Ana Lens; CC-BY-4.0" in text
    assert f"`{tables.backdrops('lomiri')[1].file}`: 2002, Someone Else; GPL-2" in text
    assert "mate-backgrounds 4:1.0-1 (debian)" in text


def test_report_lists_what_is_unusable(built: tuple[Path, str]) -> None:
    lines = built[1].splitlines()
    counts = {line.split()[0]: line.split()[1:] for line in lines if line and line[0] != " "}
    assert counts["emoji"] == [str(len(some_emoji())), str(len(tables.emoji()) - len(some_emoji()))]
    assert counts["tuxpaint"] == [str(len(some_stamps()) - 1), str(len(tables.stamps()) - len(some_stamps()) + 1)]
    assert any(f"{some_stamps()[0]}.png: cannot identify image file" in line for line in lines)
    assert any("it is not in the package" in line for line in lines)


def test_a_second_run_makes_only_what_changed(built: tuple[Path, str]) -> None:
    folder, stages = built[0], built[0] / "work" / "stages"
    before = {path.name: path.stat().st_mtime_ns for path in stages.iterdir()}
    (stages / "mate.parquet").unlink()  # as if the first run had been stopped there
    newer = {"package.json": b"{}", f"assets/{some_emoji()[0]}.webp": b"", f"assets/{some_emoji()[1]}.webp": b""}
    whole = rows(folder, "backgrounds")
    build_bank(folder, folder / "work", SKIP)
    after = {path.name: path.stat().st_mtime_ns for path in stages.iterdir()}
    assert {name for name in before if before[name] != after[name]} == {"mate.parquet"}
    assert rows(folder, "backgrounds") == whole
    write_npm(folder / "work" / "packages" / "lobehub-fluent-emoji-3d-1.2.0.tgz", newer)
    with pytest.raises(ValueError, match="source emoji gave no picture .*--skip emoji"):
        build_bank(folder, folder / "work", SKIP)


def test_bad_requests(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no source sofas; --skip takes emoji, drawings, tuxpaint"):
        build_bank(tmp_path, tmp_path / "work", ["sofas"])
    with pytest.raises(ValueError, match="every source of sprites skipped"):
        build_bank(tmp_path, tmp_path / "work", ["emoji", "drawings", "tuxpaint", "furniture"])


def test_command_without_clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit) as stop:
        main(["--output", str(tmp_path / "bank"), "--skip", "furniture"])
    message = str(stop.value)
    assert "mate-backgrounds: apt-get is not installed" in message and "--skip mate" in message
    assert "@lobehub/fluent-emoji-3d: npm is not installed" in message
    assert f"(lobehub-fluent-emoji-3d-[0-9]*.tgz) into {tmp_path / 'bank' / 'work' / 'packages'} by hand" in message


@pytest.mark.skipif(find_spec("vtkmodules") is None, reason="needs vtk")
def test_furniture_is_rendered_and_a_bad_model_left_out(tmp_path: Path) -> None:
    write_packages(tmp_path / "work" / "packages")
    report = build_bank(tmp_path, tmp_path / "work", ["plasma", "lomiri", "stellarium", "rooms"], views=3)
    names = some_models()
    models = [row for row in rows(tmp_path, "sprites") if row["src"] == "sh3d"]
    assert sorted(row["id"] for row in models) == sorted([f"sh3d:{names[0]}", f"sh3d:{names[2]}"] * 3)
    assert {row["color"] for row in models} <= {"red", "brown"}
    assert {row["author"] for row in models} == {"Maker 1", "Maker 3"}
    assert f"  {names[1]}: the renderer ended with 1 (ValueError: nothing of it can be seen)" in report
