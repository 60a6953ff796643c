"""What is saved loads with `trust_remote_code=True` in a process without this package, and means the same there.

The clean process cannot import the package (also not an installed one), nor what only training needs.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from toy import BOTH, REQUESTS
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline

import modeling_argenseg
from modeling_argenseg import ARGenSegForConditionalGeneration, VARTokenizer
from processing import ARGenSegProcessor
from trl_recipes.export import export

PROMPTS = [*REQUESTS, "the whale", BOTH]
CLEAN = """
import json, sys
from importlib.util import find_spec

hidden = ["modeling_argenseg", "processing", "trl_recipes", "accelerate", "datasets", "evaluate", "peft", "pycocotools"]
sys.modules.update(dict.fromkeys(hidden))
assert not any(find_spec(name) for name in hidden)

import numpy as np
import torch
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline

torch.set_num_threads(1)
toy, hybrid, image, again, output, repository = sys.argv[1:7]
prompts = sys.argv[7:]
trust = {"trust_remote_code": True}


def masks(pipe):
    found = pipe(image, text=prompts, batch_size=2)
    return [one["label"] for one in found], np.stack([np.asarray(one["mask"]) for one in found])


refused = []
for load in (AutoModelForImageTextToText.from_pretrained, AutoProcessor.from_pretrained):
    try:
        load(toy, trust_remote_code=False)
    except ValueError as error:
        refused.append("trust_remote_code" in str(error))
pipe = pipeline("image-segmentation", model=toy, **trust)
labels, drawn = masks(pipe)
pipe.model.save_pretrained(again)
pipe.processor.save_pretrained(again)
_, drawn_again = masks(pipeline(model=again, **trust))  # the task is the folder's own
_, drawn_hub = masks(pipeline("image-segmentation", model=repository, **trust))
net = AutoModelForImageTextToText.from_pretrained(hybrid, **trust).eval()
parts = [pipe, pipe.model, pipe.processor, pipe.processor.visual_tokenizer, AutoModel.from_pretrained(toy, **trust)]
parts += [net, net.model.vlm, net.model.vlm.vision_tower]
with torch.no_grad():
    logits = net(torch.arange(3, 11)[None]).logits.numpy()
np.savez(output, drawn=drawn, drawn_again=drawn_again, drawn_hub=drawn_hub, logits=logits)
print(json.dumps({"labels": labels, "refused": refused, "modules": [type(part).__module__ for part in parts]}))
"""


@pytest.fixture(scope="module")
def hybrid_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with the small vision tower, whose classes transformers does not know either."""
    folder = tmp_path_factory.mktemp("hybrid")
    tiny.model(tiny.hybrid_config()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def published(toy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(toy_folder, tmp_path_factory.mktemp("hub") / "argenseg-toy")


def as_downloaded(folder: Path, cache: Path) -> str:
    """Puts a folder into a Hub cache as if it had been downloaded; returns the name of its repository."""
    repository, commit = cache / "models--owner--argenseg-toy", "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(folder, repository / "snapshots" / commit)
    return "owner/argenseg-toy"


@pytest.fixture(scope="module")
def clean(
    published: Path, hybrid_folder: Path, toy_image: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], dict[str, np.ndarray], Path]:
    """What the clean process found: its words, its arrays, and the folder that it saved."""
    away = tmp_path_factory.mktemp("away")
    again, output = away / "again", away / "arrays.npz"
    hidden = ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"HF_MODULES_CACHE": str(away / "modules"), "HF_HUB_CACHE": str(away / "hub")}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    repository = as_downloaded(published, away / "hub")
    arguments = [published, hybrid_folder, toy_image, again, output, repository, *PROMPTS]
    command = [sys.executable, "-I", "-c", CLEAN, *arguments]
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, cwd=away, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), dict(np.load(output)), again


def strings(tree: Any) -> bool:
    return all(map(strings, tree.values())) if isinstance(tree, dict) else isinstance(tree, str)


def test_same_masks_without_the_package(clean: tuple, published: Path, toy_image: Path) -> None:
    said, arrays, _ = clean
    here = pipeline("image-segmentation", model=str(published))(toy_image, text=PROMPTS)
    assert said["labels"] == [one["label"] for one in here] == [*REQUESTS, BOTH]
    np.testing.assert_array_equal(arrays["drawn"], np.stack([np.asarray(one["mask"]) for one in here]))
    np.testing.assert_array_equal(arrays["drawn_hub"], arrays["drawn"])
    assert all(name.startswith("transformers_modules.") for name in said["modules"])
    assert said["refused"] == [True, True]


def test_what_remote_code_saves_is_whole_again(clean: tuple, published: Path) -> None:
    _, arrays, again = clean
    np.testing.assert_array_equal(arrays["drawn_again"], arrays["drawn"])
    files = [{str(path.relative_to(folder)) for path in folder.rglob("*.*")} for folder in (published, again)]
    assert files[0] == files[1]
    for name in ("config.json", "visual_tokenizer/config.json", "processor_config.json"):
        entries = [json.loads((folder / name).read_text())["auto_map"] for folder in (published, again)]
        assert entries[0] == entries[1] and strings(entries[0])


def test_own_vision_tower_without_the_package(clean: tuple, hybrid_folder: Path) -> None:
    net = AutoModelForImageTextToText.from_pretrained(hybrid_folder)
    with torch.no_grad():
        logits = net(torch.arange(3, 11)[None]).logits
    torch.testing.assert_close(torch.from_numpy(clean[1]["logits"]), logits)


@pytest.mark.parametrize("trust", [{}, {"trust_remote_code": True}, {"trust_remote_code": False}])
def test_with_the_package_its_own_code_is_used(published: Path, trust: dict) -> None:
    config = AutoConfig.from_pretrained(published, **trust)
    assert type(config) is modeling_argenseg.ARGenSegConfig
    assert not hasattr(config, "auto_map") and not hasattr(config, "custom_pipelines")
    assert type(AutoModelForImageTextToText.from_pretrained(published, **trust)) is ARGenSegForConditionalGeneration
    processor = AutoProcessor.from_pretrained(published, **trust)
    assert type(processor) is ARGenSegProcessor and type(processor.visual_tokenizer) is VARTokenizer
    pipe = pipeline("image-segmentation", model=str(published), **trust)
    assert type(pipe) is modeling_argenseg.ARGenSegPipeline and type(pipe.processor) is ARGenSegProcessor


def test_the_code_is_what_the_parts_need(published: Path, tmp_path: Path) -> None:
    """Of the folder, code only in its root; each part alone brings its own."""
    code = {path.name for path in published.rglob("*.py")}
    assert not list((published / "visual_tokenizer").glob("*.py"))
    assert code >= {"modeling_argenseg.py", "processing_argenseg.py", "pipeline_argenseg.py", "var_tokenizer.py"}
    assert not code & {"__init__.py", "export.py"}
    processor = AutoProcessor.from_pretrained(published)
    processor.visual_tokenizer.save_pretrained(tmp_path / "pictures")
    assert (tmp_path / "pictures" / "var_tokenizer.py").exists()
    processor.save_pretrained(tmp_path / "processor")
    assert {path.name for path in (tmp_path / "processor").glob("*.py")} == code
    assert type(AutoModel.from_pretrained(tmp_path / "pictures")) is VARTokenizer


def test_code_names_no_place_where_it_was_made(published: Path) -> None:
    for path in published.rglob("*.py"):
        assert str(Path(modeling_argenseg.__file__).parents[1]) not in path.read_text()
