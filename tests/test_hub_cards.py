"""Published folders carry copies of the code for `trust_remote_code`: they must be the code of the rooms."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COPIES = sorted(path for model in (ROOT / "hub_cards").glob("*/config.json") for path in model.parent.glob("*.py"))


def test_there_are_copies():
    assert {"modeling_argenseg.py", "processing_argenseg.py", "var_tokenizer.py"} <= {path.name for path in COPIES}


@pytest.mark.parametrize("copy", COPIES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_copy_is_its_source(copy):
    """When this fails, write the folder anew: `python -m trl_recipes.export --model FOLDER --output FOLDER`."""
    (source,) = [path for room in ("modeling_argenseg", "processing") for path in (ROOT / room).glob(copy.name)]
    assert copy.read_bytes() == source.read_bytes()
