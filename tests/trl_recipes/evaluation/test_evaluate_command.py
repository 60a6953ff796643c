"""The command: results that tell their origin, runs that go on, the same bits for any number of processes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import tiny_tasks
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from trl_recipes import evaluate
from trl_recipes.evaluation.answers import evaluate_expressions
from trl_recipes.evaluation.predictions import ModelPredictor
from trl_recipes.tasks import load_task, open_source, read_samples

ROOT = Path(__file__).parents[3]


def run(output: Path, *arguments) -> dict:
    """One process, in this one."""
    evaluate.main([*map(str, arguments), "--output", str(output)])
    return json.loads((output / "result.json").read_text())


def launch(processes: int, output: Path, *arguments) -> subprocess.Popen:
    """Several processes on the CPU; `--multi_gpu` is what makes accelerate start them."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
    command += ["--main_process_port", "0", "-m", "trl_recipes.evaluate", *map(str, arguments), "--output", str(output)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=subprocess.STDOUT, text=True, env=environment, cwd=ROOT)


def predictions(folder: Path) -> list[str]:
    """All whole lines of all files, sorted."""
    texts = [path.read_text() for path in folder.glob("predictions-*.jsonl")]
    return sorted(line for text in texts for line in text.splitlines(keepends=True) if line.endswith("\n"))


def numbers(folder: Path) -> dict:
    """The result without what tells of the run itself: who, when, how long."""
    return {name: part for name, part in json.loads((folder / "result.json").read_text()).items() if name != "run"}


@pytest.fixture(scope="module")
def scenes(learned_folder, bank_folder):
    """Arguments: 31 scene expressions in batches of 2, an odd number of samples and of batches."""
    options = [f"--option={one}" for one in ("preset=easy", "seed=5", "expressions=31")]
    arguments = ["--model", learned_folder, "--task", "scenes", "--split", "unseen", "--data", bank_folder]
    return [*arguments, "--batch-size", 2, "--bootstrap", 20, *options]


@pytest.fixture(scope="module")
def alone(scenes, tmp_path_factory):
    """The folder of a run by one process."""
    folder = tmp_path_factory.mktemp("alone")
    run(folder, *scenes)
    return folder


def test_a_result_tells_what_it_is_and_where_it_comes_from(alone, scenes, learned_folder):
    result = numbers(alone)
    assert (result["task"], result["split"], result["protocol"]) == ("scenes", "unseen", "per-expression")
    assert result["protocol_in_words"].startswith("Every expression is asked alone")
    assert result["version"] == 1 and result["complete"]
    found = result["metrics"]["segmentation"]
    assert found["count"] == 31 == result["answers"]["total"]
    low, high = result["confidence"]["intervals"]["segmentation"]["giou"]
    assert low < found["giou"] < high
    assert set(result["kinds"]) == {name[5:] for name in found if name.startswith("giou_")}
    settings = result["settings"]
    assert settings["options"] == {"preset": "easy", "seed": 5, "expressions": 31}
    assert settings["model"] == str(learned_folder) and settings["batch_size"] == 2 and settings["dtype"] == "float32"
    assert re.fullmatch("[0-9a-f]{16}", settings["weights"])
    assert {"python", "torch", "transformers", "accelerate", "pycocotools"} <= result["versions"].keys()
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result["code"]["commit"] == (head.stdout.strip() or None)


def test_the_numbers_are_those_of_the_evaluation_in_memory(alone, learned_folder, bank_folder):
    options = {"preset": "easy", "seed": 5, "expressions": 31}
    samples = read_samples(open_source(load_task("scenes"), bank_folder, split="unseen", options=options))
    rows = [{"image": s.load_image(), "text": s.text, "kind": s.kind, "mask": s.load_mask()} for s in samples]
    model = AutoModelForImageTextToText.from_pretrained(learned_folder).eval()
    expected = evaluate_expressions(model, AutoProcessor.from_pretrained(learned_folder), rows, batch_size=2)
    found = numbers(alone)["metrics"]["segmentation"]
    assert expected == {name: found[name] for name in expected}


def test_following_edges_is_another_setting(alone, scenes, tmp_path):
    """By default as the processor says."""
    assert numbers(alone)["settings"]["follow_edges"] is False
    found = run(tmp_path, *scenes, "--limit", 6, "--follow-edges")
    assert found["settings"]["follow_edges"] is True
    assert not set(predictions(tmp_path)) <= set(predictions(alone))
    with pytest.raises(SystemExit, match="follow_edges was True and is now False"):
        run(tmp_path, *scenes, "--limit", 6, "--no-follow-edges")


def test_zooming_in_is_another_setting(alone, scenes, learned_folder, bank_folder, tmp_path, capsys):
    found = run(tmp_path, *scenes, "--limit", 6, "--zoom")
    assert found["settings"]["zoom"] and not numbers(alone)["settings"]["zoom"]
    assert ", zooming in\n" in capsys.readouterr().out
    samples = read_samples(
        open_source(load_task("scenes"), bank_folder, split="unseen", options=found["settings"]["options"])
    ).first(6)
    rows = [{"image": s.load_image(), "text": s.text, "kind": s.kind, "mask": s.load_mask()} for s in samples]
    model = AutoModelForImageTextToText.from_pretrained(learned_folder).eval()
    processor = AutoProcessor.from_pretrained(learned_folder)
    expected = evaluate_expressions(model, processor, rows, batch_size=2, zoom=True)
    assert expected["giou"] == found["metrics"]["segmentation"]["giou"]
    with pytest.raises(SystemExit, match="zoom was True and is now False"):
        run(tmp_path, *scenes, "--limit", 6)


def test_every_sample_has_a_score_and_a_prediction(alone):
    scores = [json.loads(line) for line in (alone / "scores.jsonl").read_text().splitlines()]
    stored = [json.loads(line) for line in predictions(alone)]
    assert [one["id"] for one in scores] == sorted(one["id"] for one in stored) and len(stored) == 31
    assert np.mean([one["score"] for one in scores]) == pytest.approx(numbers(alone)["metrics"]["segmentation"]["giou"])
    drawn = [one for one in stored if one["mask"]]
    assert drawn and all(one["mask"]["size"] == [256, 256] and 0 <= one["score"] <= 1 for one in drawn)
    assert (alone / "gallery.html").read_text().count("<figure>") == 24


def test_a_complete_run_only_computes_the_scores_again(alone, scenes, tmp_path, monkeypatch):
    before, stored = numbers(alone), predictions(alone)
    (alone / "result.json").unlink()
    monkeypatch.setattr(ModelPredictor, "__call__", lambda *_: pytest.fail("asked again"))
    run(alone, *scenes)
    assert numbers(alone) == before and predictions(alone) == stored


def command_of(process: psutil.Process) -> str:
    """Empty for a helper of the launcher's that has just ended."""
    try:
        return " ".join(process.cmdline())
    except (psutil.ZombieProcess, psutil.NoSuchProcess):
        return ""


def kill_a_process(running: subprocess.Popen, folder: Path) -> int:
    """Waits for the first predictions, and kills one of the processes that make them. Returns how many there are."""
    deadline, workers = time.monotonic() + 240, []
    while len(workers) < 2 or len(predictions(folder)) < 2:
        assert running.poll() is None, running.communicate()[0]
        assert time.monotonic() < deadline, "no predictions after four minutes"
        if len(workers) < 2:
            children = psutil.Process(running.pid).children()
            workers = [one for one in children if "trl_recipes.evaluate" in command_of(one)]
        time.sleep(0.005)
    workers[-1].send_signal(signal.SIGKILL)
    output, _ = running.communicate(timeout=240)
    assert running.returncode != 0, output
    return len(predictions(folder))


@pytest.mark.slow
def test_two_processes_one_killed_and_the_run_resumed_give_the_same_bits(scenes, alone, tmp_path):
    folder = tmp_path / "killed"
    done = kill_a_process(launch(2, folder, *scenes), folder)
    assert 2 <= done < 31 and not (folder / "result.json").exists()
    torn = folder / "predictions-00001.jsonl"
    with torn.open("ab") as file:
        file.write(b'{"id":"000007-0')  # and it was killed in the middle of a line
    resumed = launch(2, folder, *scenes)
    output, _ = resumed.communicate(timeout=240)
    assert resumed.returncode == 0, output
    assert f"going on: {done} predictions" in output, output
    assert "process 1 of 2" in output, output
    assert predictions(folder) == predictions(alone)
    assert numbers(folder) == numbers(alone)
    for name in ("scores.jsonl", "gallery.html"):
        assert (folder / name).read_bytes() == (alone / name).read_bytes()
    assert json.loads((folder / "result.json").read_text())["run"]["processes"] == 2


def test_one_process_goes_on_where_two_were_stopped(scenes, alone, tmp_path):
    lines = predictions(alone)
    (tmp_path / "run.json").write_bytes((alone / "run.json").read_bytes())
    (tmp_path / "predictions-00000.jsonl").write_text("".join(lines[3:8]))  # from the middle of one batch to another's
    (tmp_path / "predictions-00001.jsonl").write_text("".join(lines[17:20]) + lines[30][:40])
    run(tmp_path, *scenes)
    assert predictions(tmp_path) == lines and numbers(tmp_path) == numbers(alone)


def test_batches_of_another_size_give_the_same_masks(scenes, alone, tmp_path):
    run(tmp_path, *scenes, "--batch-size", 5)
    pairs = zip(predictions(alone), predictions(tmp_path), strict=True)
    for one, other in ((json.loads(a), json.loads(b)) for a, b in pairs):
        assert (one["id"], one["text"], one["mask"]) == (other["id"], other["text"], other["mask"])


def test_a_run_does_not_go_on_with_other_settings(scenes, alone):
    with pytest.raises(SystemExit, match=r"other settings: batch_size was 2 and is now 3. Give another --output"):
        run(alone, *scenes, "--batch-size", 3)
    with pytest.raises(SystemExit, match="options.seed was 5 and is now 6"):
        run(alone, *scenes, "--option", "seed=6")


def test_other_weights_are_other_settings(scenes, alone, learned_folder, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(learned_folder)
    next(model.model.generation_projector.parameters()).data += 1e-3
    AutoProcessor.from_pretrained(learned_folder).save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="weights was"):
        run(alone, *scenes, "--model", tmp_path)


def changed_copy(learned_folder, folder: Path, what: str) -> Path:
    """The model with one thing changed that is no parameter of it."""
    model, processor = (
        AutoModelForImageTextToText.from_pretrained(learned_folder),
        AutoProcessor.from_pretrained(learned_folder),
    )
    if what == "weights":
        model.model.quantizer.ema_vocab_hit_SV += 1
    elif what == "generation_config.max_new_tokens":
        model.generation_config.max_new_tokens = 7
    elif what == "processor.visual_tokenizer":
        next(processor.visual_tokenizer.parameters()).data.flatten()[1] += 1
    elif what == "processor.segmentation_prompt":
        processor.segmentation_prompt = "Where is {prompt}?"
    elif what == "processor.chat_template":
        processor.chat_template += " "
    elif what == "processor.image_processor.image_mean":
        processor.image_processor.image_mean = [0, 0, 0]
    else:
        processor.tokenizer.add_tokens(["another word"])
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "what",
    [
        "weights",
        "generation_config.max_new_tokens",
        "processor.visual_tokenizer",
        "processor.segmentation_prompt",
        "processor.chat_template",
        "processor.image_processor.image_mean",
        "processor.text_tokenizer",
    ],
)
def test_whatever_answers_depend_on_is_a_setting(what, scenes, alone, learned_folder, tmp_path):
    with pytest.raises(SystemExit, match=f"{what} was .* and is now"):
        run(alone, *scenes, "--model", changed_copy(learned_folder, tmp_path, what))


def test_other_data_of_the_same_names_are_other_settings(toy_folder, tmp_path):
    data, out = tiny_tasks.write_photographs(tmp_path / "data"), tmp_path / "out"
    arguments = ("--model", toy_folder, "--task", "real", "--data", data, "--bootstrap", 0)
    run(out, *arguments)
    path = data / "real.json"
    content = path.read_text()
    path.write_text(content.replace("the red thing", "the big thing"))  # as many bytes
    with pytest.raises(SystemExit, match="data_files was .*; sample_contents was"):
        run(out, *arguments)
    path.write_text(content)
    others = Path(shutil.copytree(data, tmp_path / "others"))
    Image.new("RGB", (60, 40), (30, 30, 200)).save(others / "images" / "red.jpg")
    with pytest.raises(SystemExit, match="images was None and is now '.*others'; sample_contents was"):
        run(out, *arguments, "--images", others)


def test_a_result_tells_the_code_of_its_predictions(scenes, alone, tmp_path, monkeypatch, capsys):
    lines, before = predictions(alone), json.loads((alone / "run.json").read_text())
    earlier = before["answered_by"][0] | {"commit": "0" * 40}
    (tmp_path / "run.json").write_text(json.dumps(before | {"answered_by": [earlier]}))
    part = tmp_path / "predictions-00000.jsonl"
    part.write_text("".join(lines))
    only_scored = run(tmp_path, *scenes)
    assert only_scored["code"]["commit"] == "0" * 40 and only_scored["went_on_with"] == []
    assert only_scored["scored_by"] == before["answered_by"][0]
    part.write_text("".join(lines[:-1]))
    gone_on = run(tmp_path, *scenes)
    assert gone_on["code"]["commit"] == "0" * 40 and gone_on["went_on_with"] == before["answered_by"]
    assert "another commit" in capsys.readouterr().err


def test_a_run_of_an_earlier_version_does_not_go_on(scenes, alone, tmp_path):
    before = json.loads((alone / "run.json").read_text())
    del before["answered_by"]
    (tmp_path / "run.json").write_text(json.dumps(before))
    with pytest.raises(
        SystemExit, match="run.json was written by an earlier version.*another --output, or --overwrite"
    ):
        run(tmp_path, *scenes)


def test_predictions_of_an_unknown_run_are_not_taken_over(scenes, alone, tmp_path):
    (tmp_path / "predictions-00000.jsonl").write_text("".join(predictions(alone)))
    with pytest.raises(SystemExit, match="holds predictions, but no run.json"):
        run(tmp_path, *scenes)


def test_overwrite_begins_anew(scenes, alone, tmp_path):
    (tmp_path / "run.json").write_bytes((alone / "run.json").read_bytes())
    (tmp_path / "predictions-00003.jsonl").write_text(predictions(alone)[0])
    (tmp_path / "notes.txt").write_text("mine")
    result = run(tmp_path, *scenes, "--limit", 3, "--overwrite")
    assert len(predictions(tmp_path)) == 3 and not (tmp_path / "predictions-00003.jsonl").exists()
    assert (tmp_path / "notes.txt").exists() and not result["complete"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--split", "train"], "scenes has no split 'train'; it has: test, val, unseen"),
        (["--protocol", "merged"], "scenes has no protocol 'merged'"),
        (["--option", "bank=3"], "scenes has no option 'bank'"),
        (["--option", "bank"], "--option takes NAME=VALUE"),
        (["--batch-size", "0"], "--batch-size must be at least 1"),
        (["--bootstrap", "-1", "--model", "nowhere"], "--bootstrap must be at least 0"),
        (["--gallery", "-1", "--model", "nowhere"], "--gallery must be at least 0"),
        (["--seed", "-1", "--model", "nowhere"], "--seed must be at least 0"),
        (["--model", "nowhere"], "no model folder 'nowhere'"),
        (["--metrics", "ahd", "--data", "nowhere"], "the data of scenes .*Where to get it"),
    ],
)
def test_input_at_fault_is_told_in_a_line(scenes, tmp_path, arguments, message):
    with pytest.raises(SystemExit, match=f"(?s)error: .*{message}"):
        run(tmp_path, *scenes, *arguments)


def test_both_protocols_run_on_refcoco_and_are_labelled(toy_folder, tmp_path, capsys):
    root = tiny_tasks.write_refer(tmp_path / "data")
    results = {}
    for protocol, count in (("per-expression", 5), ("merged", 3)):
        arguments = ("--model", toy_folder, "--task", "refcoco", "--data", root, "--bootstrap", 10)
        results[protocol] = run(tmp_path / protocol, *arguments, "--protocol", protocol)
        found = results[protocol]
        assert found["protocol"] == found["settings"]["protocol"] == protocol
        assert found["answers"]["total"] == count
        assert "NOT THE WHOLE TASK" in capsys.readouterr().out and not found["complete"]  # 10834 in the real one
        assert f"refcoco, val, {protocol}" in (tmp_path / protocol / "gallery.html").read_text()
    assert results["per-expression"]["protocol_in_words"].startswith("Every expression of an object is a request")
    assert "all expressions of an object together" in results["merged"]["protocol_in_words"]
    assert results["merged"]["expected_samples"] == 3811
    with pytest.raises(SystemExit, match="protocol was 'merged' and is now 'per-expression'"):
        run(tmp_path / "merged", *arguments, "--protocol", "per-expression")


@pytest.mark.parametrize(
    ("task", "write", "options", "metric"),
    [
        ("rec_refcoco", tiny_tasks.write_refer, (), "box"),
        ("pascal_voc_20", tiny_tasks.write_voc, ("--limit", 1), "semantic"),
        ("pope", tiny_tasks.write_pope, ("--max-new-tokens", 3), "pope"),
        ("coco_interactive", tiny_tasks.write_interactive, ("--metrics", "calibration"), "segmentation"),
        ("reasonseg", tiny_tasks.write_reasonseg, (), "segmentation"),
    ],
)
def test_all_kinds_of_tasks_run_with_a_real_model(toy_folder, tmp_path, task, write, options, metric):
    (tmp_path / "data").mkdir()
    data = write(tmp_path / "data")
    arguments = ("--model", toy_folder, "--task", task, "--data", data, "--bootstrap", 5, *options)
    result = run(tmp_path / "out", *arguments)
    assert metric in result["metrics"] and (tmp_path / "out" / "gallery.html").is_file()
    samples = {"pascal_voc_20": 20, "pope": 6, "coco_interactive": 1, "reasonseg": 2, "rec_refcoco": 5}[task]
    assert result["answers"]["total"] == samples


def test_what_is_marked_in_the_image_is_not_zoomed_into(tmp_path):
    (tmp_path / "data").mkdir()
    data = tiny_tasks.write_interactive(tmp_path / "data")
    arguments = ("--model", "nowhere", "--task", "coco_interactive", "--data", data, "--zoom")
    for split in ("point", "box"):
        with pytest.raises(SystemExit, match="error: --zoom: what is marked in an image"):
            run(tmp_path, *arguments, "--split", split)


class Tagger:
    """Keeps conversations instead of answering them."""

    segmentation_prompt = "Please segment {prompt} in this image."


def test_questions_about_scenes_go_on_where_they_were_stopped(learned_folder, bank_folder, tmp_path, capsys):
    """The model has learned masks alone: what it answers is poor, but all of it is counted, in both runs alike."""
    options = [f"--option={one}" for one in ("preset=easy", "questions=12")]
    command = ["--model", learned_folder, "--task", "scenes-vqa", "--data", bank_folder, "--batch-size", 5, *options]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    result = run(whole, *command)
    assert result["complete"] and result["metrics"]["vqa"]["count"] == result["answers"]["total"] == 12
    assert {kind["count"] for kind in result["kinds"].values()} and "accuracy_yes_no" in result["metrics"]["vqa"]
    low, high = result["confidence"]["intervals"]["vqa"]["accuracy"]
    assert low <= result["metrics"]["vqa"]["accuracy"] <= high
    assert "of kind yes_no (" in capsys.readouterr().out
    assert (whole / "gallery.html").read_text().count("<figure>") == 12
    shutil.copytree(whole, resumed)
    (part,) = resumed.glob("predictions-*.jsonl")
    part.write_text("".join(part.read_text().splitlines(keepends=True)[:7]))
    run(resumed, *command)
    assert numbers(resumed) == numbers(whole) and predictions(resumed) == predictions(whole)


def test_questions_are_worded_as_the_task_says(tmp_path):
    for name in ("real", "pope", "inter"):
        (tmp_path / name).mkdir()
    cases = {
        "real": (
            tiny_tasks.write_photographs(tmp_path / "photographs"),
            {},
            "Please segment the red thing in this image.",
        ),
        "pope": (
            tiny_tasks.write_pope(tmp_path / "pope"),
            {"split": "random"},
            "Is there a snowboard in the image?\nAnswer the question using a single word or phrase.",
        ),
        "coco_interactive": (
            tiny_tasks.write_interactive(tmp_path / "inter"),
            {},
            "Please segment the object marked by the point in this image.",
        ),
    }
    for name, (root, options, expected) in cases.items():
        source = open_source(load_task(name), root, **options)
        sample = read_samples(source)[0]
        model = type("Model", (), {"eval": lambda self: self})()
        predictor = ModelPredictor.for_task(model, Tagger(), source.task, source.protocol)
        (turn,) = predictor.conversation(sample, sample.load_image())
        assert turn["content"][-1] == {"type": "text", "text": expected}
        assert len(turn["content"]) == (3 if name == "coco_interactive" else 2)  # the prompt is a second image


def test_results_go_into_a_folder_named_after_model_and_task(tmp_path):
    source = open_source(load_task("real"), tiny_tasks.write_photographs(tmp_path / "data"))
    (tmp_path / "tiny").mkdir()
    expected = Path("outputs/evaluation/tiny/real-all-per-expression")
    assert evaluate.default_output(str(tmp_path / "tiny"), source) == expected
    assert evaluate.default_output("org/name", source).parts[2] == "org--name"
    assert evaluate.default_output("org/name", source, zoom=True).name == "real-all-per-expression-zoom"
    for follow, ending in ((True, "edges"), (False, "no-edges")):
        name = evaluate.default_output("org/name", source, follow_edges=follow).name
        assert name == f"real-all-per-expression-{ending}"
