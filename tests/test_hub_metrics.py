"""The published metrics, loaded as users load them: from their folder, offline, in one process and in two."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import evaluate
import numpy as np
import pytest
from PIL import Image

from trl_recipes.metrics import (
    AverageHausdorff,
    BoundaryIoU,
    BoxAccuracy,
    MaskCalibration,
    Pope,
    SegmentationMetrics,
    SemanticIoU,
    to_rle,
)

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "hub_cards" / "metrics"
NAMES = sorted(path.name for path in FOLDER.iterdir() if path.is_dir())
MASKS = ("ciou", "giou", "precision_at_iou", "no_target_accuracy", "mahd", "boundary_iou")
ACCUMULATORS = {
    "ciou": SegmentationMetrics,
    "giou": SegmentationMetrics,
    "precision_at_iou": SegmentationMetrics,
    "no_target_accuracy": SegmentationMetrics,
    "mahd": AverageHausdorff,
    "boundary_iou": BoundaryIoU,
    "semantic_miou": SemanticIoU,
    "box_accuracy": BoxAccuracy,
    "pope": Pope,
    "mask_calibration": MaskCalibration,
}
OPTIONS = {"precision_at_iou": {"thresholds": [0.3, 0.7]}, "semantic_miou": {"num_classes": 4}}


def samples(name: str, count: int = 7) -> tuple[list, list]:
    """Random predictions and references of the metric's kind."""
    rng = np.random.default_rng(3)
    if name in MASKS:
        truths = [rng.random((9, 11)) < 0.4 for _ in range(count - 1)] + [np.zeros((9, 11), bool)]
        return [None, *(truth ^ (rng.random((9, 11)) < 0.15) for truth in truths[1:])], truths
    if name == "semantic_miou":
        return [[rng.integers(0, 4, (9, 11)) for _ in range(count)] for _ in "pt"]
    if name == "box_accuracy":
        truths = [[x, y, x + 9.0, y + 7.0] for x, y in rng.integers(0, 30, (count, 2)).tolist()]
        return [None, *([value + rng.random() for value in box] for box in truths[1:])], truths
    if name == "pope":
        answers, truths = ["Yes, one.", "No.", "maybe"], ["yes", "no"]
        return [answers[i % 3] for i in range(count)], [truths[i % 2] for i in range(count)]
    return rng.random(count).tolist(), rng.random(count).tolist()


def load(name: str, cache: Path, **options) -> evaluate.Metric:
    return evaluate.load(str(FOLDER / name), cache_dir=str(cache), **options)


def test_there_is_a_module_and_a_card_for_every_metric():
    assert set(NAMES) == set(ACCUMULATORS)
    for name in NAMES:
        assert {path.name for path in (FOLDER / name).iterdir() if path.is_file()} == {f"{name}.py", "README.md"}


@pytest.mark.parametrize("name", NAMES)
def test_the_module_computes_what_the_accumulator_does_at_once_and_in_parts(name: str, tmp_path: Path):
    predictions, references = samples(name)
    expected = ACCUMULATORS[name](**OPTIONS.get(name, {}))
    for pair in zip(predictions, references, strict=True):
        expected.add(*pair)
    metric = load(name, tmp_path)
    at_once = metric.compute(predictions=predictions, references=references, **OPTIONS.get(name, {}))
    assert at_once and set(at_once.items()) <= set(expected.compute().items())
    metric.add_batch(predictions=predictions[:3], references=references[:3])
    metric.add(prediction=predictions[3], reference=references[3])
    metric.add_batch(predictions=predictions[4:], references=references[4:])
    assert metric.compute(**OPTIONS.get(name, {})) == at_once


@pytest.mark.parametrize("name", NAMES)
def test_texts_of_the_module(name: str, tmp_path: Path):
    metric = load(name, tmp_path)
    assert len(metric.description.strip()) > 20 and "@" in metric.citation
    assert "references" in metric.inputs_description and "ids" in metric.inputs_description


@pytest.mark.parametrize("name", NAMES)
def test_the_program_in_the_card_prints_what_the_card_says(name: str, tmp_path, monkeypatch, capsys):
    card = (FOLDER / name / "README.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"^```python\n(.*?)^```", card, flags=re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path)
    exec(compile(program, f"{name}/README.md", "exec"), {})
    (promised,) = re.findall(r"print\(.*\)  # (.*)$", program, flags=re.MULTILINE)
    assert capsys.readouterr().out.strip() == promised
    for heading in ("## Definition", "## How it differs from what others publish", "## Citation"):
        assert heading in card


def test_all_forms_of_a_mask_give_the_same(tmp_path: Path):
    predictions, references = samples("giou")
    predictions[0] = np.zeros_like(references[0])
    forms = [
        lambda mask: mask,
        lambda mask: mask.astype(np.uint8) * 255,
        to_rle,
        lambda mask: Image.fromarray(mask),
        lambda mask: Image.fromarray(mask).convert("L"),
    ]
    metric = load("giou", tmp_path)
    found = [
        metric.compute(predictions=[form(p) for p in predictions], references=[form(r) for r in references])
        for form in forms
    ]
    assert all(one == found[0] for one in found)


def test_kinds_have_values_of_their_own(tmp_path: Path):
    predictions, references = samples("giou", 3)
    metric = load("giou", tmp_path)
    found = metric.compute(predictions=predictions, references=references, kinds=["noun", None, "noun"])
    assert set(found) == {"giou", "count", "giou_noun"}


def test_a_sample_that_comes_twice_counts_once(tmp_path: Path):
    predictions, references = samples("ciou", 3)
    metric = load("ciou", tmp_path)
    once = metric.compute(predictions=predictions, references=references, ids=[1, 2, 3])
    metric.add_batch(predictions=predictions, references=references, ids=[1, 2, 3])
    metric.add(prediction=predictions[1], reference=references[1], id=2)
    assert metric.compute() == once
    metric.add_batch(predictions=predictions[:2], references=references[:2], ids=["a", "a"])
    with pytest.raises(ValueError, match="'a' was added before with another result"):
        metric.compute()


def test_faulty_calls_say_what_is_wrong(tmp_path: Path):
    metric = load("ciou", tmp_path)
    mask = np.ones((2, 2), bool)
    with pytest.raises(ValueError, match="numbers differ.*'references': 2"):
        metric.add_batch(predictions=[mask], references=[mask, mask])
    with pytest.raises(ValueError, match="predictions must be a list"):
        metric.add_batch(predictions=to_rle(mask), references=[mask])
    with pytest.raises(ValueError, match="resize the prediction"):
        metric.add_batch(predictions=[mask], references=[np.ones((2, 3), bool)])
    with pytest.raises(ValueError, match="labels lie between 0 and 65535"):
        load("semantic_miou", tmp_path).add_batch(predictions=[np.array([[-1]])], references=[np.array([[1]])])


def test_large_labels_survive_the_disk(tmp_path: Path):
    labels = np.array([[0, 300, 459], [459, 65535, 0]])
    metric = load("semantic_miou", tmp_path)
    found = metric.compute(predictions=[labels], references=[labels], num_classes=460, ignore_label=65535)
    assert (found["miou"], found["classes"]) == (1.0, 3)


WORKER = """
import json, sys
import evaluate
sys.path.insert(0, {tests!r})
from test_hub_metrics import OPTIONS, samples
folder, cache, process, mine = {folder!r}, {cache!r}, int(sys.argv[1]), json.loads(sys.argv[2])
for name in json.loads(sys.argv[3]):
    path = f"{{folder}}/{{name}}"
    metric = evaluate.load(path, cache_dir=cache, num_process=2, process_id=process, experiment_id="two")
    predictions, references = samples(name)
    for i in mine:
        metric.add_batch(predictions=[predictions[i]], references=[references[i]], ids=[i])
    print(json.dumps([name, metric.compute(**OPTIONS.get(name, {{}}))]))
"""


@pytest.mark.parametrize("shards", [([0, 2, 4, 6], [1, 3, 5, 0]), ([0, 1, 2, 3, 4, 5, 6], [])], ids=["padded", "idle"])
def test_two_processes_give_the_bits_of_one(shards: tuple[list, list], tmp_path: Path):
    """Seven samples: one process has a sample that the other has too, or no sample at all."""
    names = ["ciou", "giou", "mahd", "semantic_miou", "box_accuracy", "mask_calibration"]
    program = WORKER.format(tests=str(ROOT / "tests"), folder=str(FOLDER), cache=str(tmp_path))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(process), json.dumps(mine), json.dumps(names)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process, mine in enumerate(shards)
    ]
    outputs = [worker.communicate(timeout=300) for worker in workers]
    assert all(worker.returncode == 0 for worker in workers), outputs
    first, second = ([json.loads(line) for line in out.splitlines()] for out, _ in outputs)
    assert [result for _, result in second] == [None] * len(names)
    for name, result in first:
        predictions, references = samples(name)
        alone = load(name, tmp_path / "alone").compute(
            predictions=predictions, references=references, **OPTIONS.get(name, {})
        )
        assert result == alone, name


def test_without_the_package_the_error_says_how_to_get_it(tmp_path: Path):
    program = (
        "import sys, evaluate\nsys.modules['trl_recipes'] = None\n"
        f"evaluate.load({str(FOLDER / 'ciou')!r}, cache_dir={str(tmp_path)!r})"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode != 0 and "needs the package argenseg: pip install 'argenseg[eval]'" in done.stderr
