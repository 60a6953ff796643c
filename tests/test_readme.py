"""The README holds what it promises: its Python runs, its commands have their options, its links lead somewhere."""

import importlib
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
MODEL = ROOT / "hub_cards" / "argenseg-tiny"
SCRIPTS = re.findall(r"^python (examples/\S+\.py)([^#\n]*)", TEXT.replace("\\\n", ""), flags=re.MULTILINE)
COMMANDS = re.findall(r"^(?:python|accelerate launch) -m (\S+) ([^#\n]*)", TEXT.replace("\\\n", ""), flags=re.MULTILINE)


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.skipif(not (MODEL / "config.json").exists(), reason="needs hub_cards/argenseg-tiny")
def test_python_runs(tmp_path: Path) -> None:
    """All Python of the README, in order, offline, in a folder with the checkout's model and photograph.

    Blocks marked `py` need weights that no checkout has.
    """
    for name in ("hub_cards", "examples"):
        (tmp_path / name).symlink_to(ROOT / name, target_is_directory=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    program = [sys.executable, "-c", "\n".join(blocks("python"))]
    done = subprocess.run(program, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "the sheep (371, 512) score" in done.stdout
    assert (tmp_path / "mask.png").is_file()


def test_python_compiles() -> None:
    assert blocks("python")
    for block in blocks("python"):
        compile(block, "README.md", "exec")


@pytest.mark.parametrize(("module", "arguments"), COMMANDS, ids=[f"{m} {a[:40]}" for m, a in COMMANDS])
def test_commands_parse(module: str, arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    if module == "trl_recipes.scenes":
        parser = importlib.import_module("trl_recipes.scenes.__main__")._parser()
    elif module == "trl_recipes.tasks":
        parser = importlib.import_module("trl_recipes.tasks.__main__").make_parser()
    else:
        parser = importlib.import_module(module).make_parser()
    words = shlex.split(arguments)
    if "--config" in words:  # TRL's: a file beside the options
        parser.parse_args_and_config(words)
    else:
        parser.parse_args(words)


@pytest.mark.parametrize(("script", "arguments"), SCRIPTS, ids=[f"{s} {a[:40]}" for s, a in SCRIPTS])
def test_scripts_parse(script: str, arguments: str) -> None:
    spec = importlib.util.spec_from_file_location(Path(script).stem, ROOT / script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    module.make_parser().parse_args(shlex.split(arguments))


@pytest.mark.parametrize("target", sorted({*re.findall(r"make ([a-z]+(?:-[a-z]+)*)", "\n".join(blocks("bash")))}))
def test_make_targets_exist(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#]+)\)", TEXT))
def test_links_lead_somewhere(link: str) -> None:
    assert link.startswith("https://") or (ROOT / link).exists()
