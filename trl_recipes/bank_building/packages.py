"""Downloads packages with the machine's own clients and unpacks parts of them, without root."""

from __future__ import annotations

import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from urllib.parse import unquote

AR_MAGIC = b"!<arch>\n"


class PackageError(ValueError):
    """A package that cannot be had or read; the message says how to mend it."""


@dataclass(frozen=True)
class Package:
    """A package and the parts of it that are used.

    Attributes:
        name: as its registry knows it.
        registry: "debian" or "npm".
        parts: beginnings of the paths to unpack.
    """

    name: str
    registry: str
    parts: tuple[str, ...]

    @property
    def pattern(self) -> str:
        """What its archive is called, whatever the version."""
        if self.registry == "debian":
            return f"{self.name}_*.deb"
        return f"{self.name.removeprefix('@').replace('/', '-')}-[0-9]*.tgz"

    def archive(self, folder: Path) -> Path | None:
        """The newest archive of it in the folder, None without one."""
        found = sorted(folder.glob(self.pattern), key=lambda path: path.stat().st_mtime)
        return found[-1] if found else None


def version(archive: Path) -> str:
    """The version in the archive's file name: "1.8-1" of "sweethome3d-furniture_1.8-1_all.deb"."""
    if archive.suffix == ".deb":
        return unquote(archive.stem.split("_")[1])
    return archive.stem.rpartition("-")[2]


def fetch(package: Package, folder: Path) -> Path:
    """The archive in `folder`, downloaded if it is not there yet.

    Raises:
        PackageError: the client is missing or fails.
    """
    if present := package.archive(folder):
        return present
    client = ["apt-get", "download"] if package.registry == "debian" else ["npm", "pack", "--silent"]
    program = shutil.which(client[0])
    if not program:
        raise PackageError(f"{package.name}: {client[0]} is not installed. {_by_hand(package, folder)}")
    folder.mkdir(parents=True, exist_ok=True)
    # A download that is cut off never bears the final name.
    with tempfile.TemporaryDirectory(dir=folder, prefix="partial-") as partial:
        done = subprocess.run(
            [program, *client[1:], package.name], cwd=partial, capture_output=True, text=True, check=False
        )
        archive = package.archive(Path(partial))
        if done.returncode or archive is None:
            said = (done.stderr or done.stdout).strip().splitlines()
            lists = " Package lists may be missing: run `apt-get update` as root." if client[0] == "apt-get" else ""
            raise PackageError(
                f"{package.name}: `{' '.join(client)} {package.name}` failed: {said[-1] if said else 'no message'}."
                f"{lists} {_by_hand(package, folder)}"
            )
        return archive.rename(folder / archive.name)


def _by_hand(package: Package, folder: Path) -> str:
    return f"You can also put the archive ({package.pattern}) into {folder} by hand."


def unpack(package: Package, archive: Path, folder: Path) -> Path:
    """Unpacks `package.parts` of the archive into a folder of its own below `folder` and returns that.

    Raises:
        PackageError: the archive is cut off or of an unknown kind.
    """
    target = folder / archive.name.rpartition(".")[0]
    if target.is_dir():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix="partial-") as name:
        partial = Path(name) / "files"
        partial.mkdir()
        try:
            with archive.open("rb") as file, tarfile.open(fileobj=_tarball(file, archive), mode="r|*") as tar:
                tar.extractall(partial, _wanted(tar, package.parts), filter="data")
        except (tarfile.TarError, EOFError, OSError) as error:
            raise PackageError(
                f"{archive} cannot be unpacked ({error}). Delete it and run the command again."
            ) from None
        if not any(partial.iterdir()):
            raise PackageError(f"{archive} holds none of {', '.join(package.parts)}: a version that is laid out anew?")
        partial.rename(target)
    return target


def _wanted(tar: tarfile.TarFile, parts: tuple[str, ...]) -> Iterator[tarfile.TarInfo]:
    for member in tar:
        if not member.isdir() and member.name.removeprefix("./").startswith(parts):
            yield member


def _tarball(file: IO[bytes], archive: Path) -> IO[bytes]:
    # A .deb is an `ar` archive; its last member, data.tar.*, runs to the end.
    if archive.suffix != ".deb":
        return file
    if file.read(len(AR_MAGIC)) != AR_MAGIC:
        raise PackageError(f"{archive} is no Debian package. Delete it and run the command again.")
    while len(header := file.read(60)) == 60:
        name, size = header[:16].decode("ascii", "replace").strip().rstrip("/"), int(header[48:58])
        if name.startswith("data.tar"):
            if name.endswith(".zst"):
                raise PackageError(f"{archive} is compressed with zstd, which cannot be read; use Debian's package.")
            return file
        file.seek(size + size % 2, 1)
    raise PackageError(f"{archive} is cut off: it has no data.tar. Delete it and run the command again.")
