"""transformers' own test mixins. They are in its source distribution, not in its wheel, and are not copied here.

`library_tests("test_modeling_common")` is that module, of exactly the installed version: pip downloads the source
distribution once into the user's cache. Where that is not possible, the tests that ask for it are skipped.
"""

import importlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import types
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import transformers

PACKAGE = "transformers_library_tests"
# What the modules import and the source distribution lacks (its manifest takes only tests/test_*.py). The mixins come
# empty: of them nothing is run. The last is read for configurations without sub-configurations only.
NOT_IN_THE_SOURCE_DISTRIBUTION = {
    "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    "utils.test_configuration_utils": {"config_common_kwargs": {}},
}


PHOTOGRAPH = Path(__file__).parents[1] / "examples" / "sheep.jpg"


def cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "argenseg" / f"transformers-{transformers.__version__}-tests"


def fetch(folder: Path) -> None:
    """Downloads the source distribution and unpacks its tests into `folder`, whole or not at all.

    Raises:
        RuntimeError: pip cannot get it (no network, or no such version in the index).
    """
    with tempfile.TemporaryDirectory() as away:
        options = ["--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--retries", "1", "--timeout", "20"]
        wanted = f"transformers=={transformers.__version__}"
        command = [sys.executable, "-m", "pip", "download", "--quiet", *options, "--dest", away, wanted]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        archives = list(Path(away).glob("transformers-*.tar.gz"))
        if done.returncode or not archives:
            raise RuntimeError(f"pip cannot download the source distribution of {wanted}: {done.stderr.strip()[-200:]}")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(archives[0]) as archive, tempfile.TemporaryDirectory(dir=folder.parent) as part:
            members = [m for m in archive.getmembers() if m.isfile() and m.name.split("/")[1] == "tests"]
            for member in members:
                member.name = member.name.split("/", 2)[2]
            archive.extractall(part, members=members, filter="data")
            Path(part, "__init__.py").touch()
            if not folder.exists():  # two runs may fetch at the same time
                shutil.copytree(part, folder.with_suffix(f".{os.getpid()}"))
                folder.with_suffix(f".{os.getpid()}").rename(folder)


@cache
def _package() -> str:
    """The folder of tests as a package; what it lacks is put beside it in memory."""
    folder = cache_folder()
    if not folder.exists():
        fetch(folder)
    root = ModuleType(PACKAGE)
    root.__path__ = [str(folder)]
    sys.modules[PACKAGE] = root
    for name, content in NOT_IN_THE_SOURCE_DISTRIBUTION.items():
        parent = f"{PACKAGE}.{name.split('.')[0]}"
        sys.modules[parent] = types.ModuleType(parent)
        module = types.ModuleType(f"{PACKAGE}.{name}")
        module.__dict__.update(content)
        sys.modules[module.__name__] = module
    hub_files = types.ModuleType("fetch_hub_objects_for_ci")  # of transformers' CI: files that it has downloaded before
    hub_files.url_to_local_path = lambda url: str(PHOTOGRAPH) if url.endswith((".png", ".jpg")) else url  # type: ignore
    sys.modules.setdefault(hub_files.__name__, hub_files)
    return PACKAGE


def library_tests(name: str) -> ModuleType:
    """A module of transformers' tests; skips the test file that asks for it where it cannot be had."""
    try:
        return importlib.import_module(f"{_package()}.{name}")
    except RuntimeError as error:
        return pytest.skip(f"transformers' own tests are not at hand: {error}", allow_module_level=True)
