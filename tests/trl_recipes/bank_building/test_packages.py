"""Fetching by the machine's clients (played by scripts) and unpacking."""

import os
from pathlib import Path

import pytest
from tiny_packages import write_deb, write_npm

from trl_recipes.bank_building.packages import Package, PackageError, fetch, unpack, version

STAMPS = Package("tux-stamps", "debian", ("usr/share/a",))
EMOJI = Package("@lobe/emoji-3d", "npm", ("package/assets",))


def client(folder: Path, name: str, script: str) -> None:
    """Makes `name` on the PATH a shell script."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_fetch_calls_the_client_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    client(tmp_path / "bin", "apt-get", f'echo "$@" >> {tmp_path}/calls; echo x > tux-stamps_1%3a2.0-1_all.deb')
    client(tmp_path / "bin", "npm", f'echo "$@" >> {tmp_path}/calls; echo x > lobe-emoji-3d-1.1.0.tgz')
    for _ in range(2):
        deb, tgz = fetch(STAMPS, tmp_path / "packages"), fetch(EMOJI, tmp_path / "packages")
    assert (tmp_path / "calls").read_text().splitlines() == [
        "download tux-stamps",
        "pack --silent @lobe/emoji-3d",
    ]
    assert (version(deb), version(tgz)) == ("1:2.0-1", "1.1.0")
    assert sorted(path.name for path in (tmp_path / "packages").iterdir()) == sorted([deb.name, tgz.name])


def test_a_failed_download_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    client(tmp_path / "bin", "apt-get", "echo cut > tux-stamps_2.0-1_all.deb; echo 'E: no such package' >&2; exit 100")
    with pytest.raises(PackageError, match=r"failed: E: no such package\..*apt-get update.*tux-stamps_\*\.deb"):
        fetch(STAMPS, tmp_path / "packages")
    assert not list((tmp_path / "packages").iterdir())


def test_unpack_takes_only_the_parts(tmp_path: Path) -> None:
    deb = write_deb(tmp_path / "tux-stamps_1-1_all.deb", {"usr/share/a/x": b"odd", "usr/share/b/y": b"1"})
    folder = unpack(STAMPS, deb, tmp_path / "unpacked")
    assert [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()] == ["usr/share/a/x"]
    assert (folder / "usr/share/a/x").read_bytes() == b"odd"
    deb.unlink()
    assert unpack(STAMPS, deb, tmp_path / "unpacked") == folder  # done before
    tgz = write_npm(tmp_path / "lobe-emoji-3d-1.0.tgz", {"assets/a": b"1", "README.md": b"2"})
    assert (unpack(EMOJI, tgz, tmp_path / "unpacked") / "package/assets/a").read_bytes() == b"1"


def test_a_bad_archive_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    whole = write_deb(tmp_path / "tux-stamps_1-1_all.deb", {"usr/share/a/x": os.urandom(50_000)})
    cases = {
        "cannot be unpacked": whole.read_bytes()[:20_000],
        "is no Debian package": b"<html>not found</html>",
        "has no data.tar": whole.read_bytes()[:140],
        "zstd": whole.read_bytes().replace(b"data.tar.xz ", b"data.tar.zst"),
    }
    for message, content in cases.items():
        whole.write_bytes(content)
        with pytest.raises(PackageError, match=message):
            unpack(STAMPS, whole, tmp_path / "unpacked")
    other = write_deb(tmp_path / "tux-stamps_2-1_all.deb", {"usr/lib/x": b"1"})
    with pytest.raises(PackageError, match="holds none of usr/share/a"):
        unpack(STAMPS, other, tmp_path / "unpacked")
    assert not list((tmp_path / "unpacked").iterdir())


def test_an_archive_cannot_write_elsewhere(tmp_path: Path) -> None:
    deb = write_deb(tmp_path / "tux-stamps_1-1_all.deb", {"usr/share/a/../../../../../evil": b"1"})
    with pytest.raises(PackageError):
        unpack(STAMPS, deb, tmp_path / "a" / "b")
    assert not list(tmp_path.rglob("evil"))
