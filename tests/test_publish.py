"""Publishing: what is not fit to be seen is refused, a dry run touches nothing, a push arrives whole."""

import importlib.util
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import toy
import yaml
from fake_hub import fake_hub
from huggingface_hub import ModelCard, RepoCard
from PIL import Image
from safetensors.torch import load_file, save_file

from trl_recipes import hub_card, publish
from trl_recipes.export import export
from trl_recipes.publish import inspect

ROOT = Path(__file__).parents[1]
METRICS = sorted(path for path in (ROOT / "hub_cards" / "metrics").iterdir() if path.is_dir())


def facts(kind: str) -> dict:
    """The example, filled in."""
    text = yaml.safe_dump(hub_card.EXAMPLES[kind]).replace("TODO", "Said")
    return yaml.safe_load(text) | {"repo_id": "owner/toy"}


def result_file(path: Path, **changes) -> Path:
    """As `trl_recipes.evaluate` writes them."""
    result = {
        "task": "real", "split": "test", "protocol": "per-expression", "complete": True, "settings": {"samples": 58},
        "metrics": {"segmentation": {"giou": 0.28412, "ciou": 0.35, "count": 58, "giou_noun": 0.5}},
        "kinds": {"noun": {}}, "code": {"commit": "0123456789abcdef" * 2},
    }  # fmt: skip
    path.write_text(json.dumps(result | changes))
    return path


@pytest.fixture(scope="module")
def model_folder(toy_folder, tmp_path_factory) -> Path:
    folder = export(toy_folder, tmp_path_factory.mktemp("publish") / "toy")
    result = result_file(tmp_path_factory.mktemp("results") / "result.json")
    hub_card.make_card("model", facts("model"), folder, [result]).save(folder / "README.md")
    return folder


@pytest.fixture
def folder(model_folder, tmp_path) -> Path:
    return Path(shutil.copytree(model_folder, tmp_path / "toy"))


# ---------------------------------------------------------------------- looking


def test_a_model_folder_is_fit(model_folder):
    found = inspect(model_folder, "model")
    assert found.problems == []
    on_disk = {path.relative_to(model_folder).as_posix() for path in model_folder.rglob("*") if path.is_file()}
    assert found.files.keys() == on_disk and "model.safetensors" in str(found)


def test_what_the_upload_leaves_out_is_not_looked_at(model_folder):
    """As `snapshot_download(local_dir=...)` leaves it."""
    lock = model_folder / ".cache/huggingface/download/README.md.lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    found = publish.inspect(model_folder, "model")
    shutil.rmtree(model_folder / ".cache")
    assert not found.problems and not any(".cache" in name for name in found.files)


def test_what_is_published_from_here_is_fit():
    for path in METRICS:
        assert inspect(path, "metric", f"owner/{path.name}").problems == [], path.name
    assert inspect(ROOT / "hub_cards" / "space", "space").problems == []
    assert inspect(ROOT / "hub_cards" / "argenseg-tiny", "model").problems == []


def add_pickle(folder: Path) -> None:
    (folder / "optimizer.bin").write_bytes(pickle.dumps({"a": 1}))


def add_path(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"_name_or_path": "/home/somebody/out/fine"}))


def add_path_to_weights(folder: Path) -> None:
    save_file({"a": torch.zeros(1)}, folder / "more.safetensors", metadata={"made_from": "/tmp/run-7"})


def add_checkpoint(folder: Path) -> None:
    (folder / "checkpoint-10").mkdir()
    (folder / "checkpoint-10" / "trainer_state.json").write_text("{}")


def add_token(folder: Path) -> None:
    (folder / "notes.md").write_text("login with hf_" + "a1B2" * 8)


def add_link(folder: Path) -> None:
    (folder / "weights.safetensors").symlink_to(folder / "model.safetensors")


def break_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"half of it")


def remove_code(folder: Path) -> None:
    (folder / "modeling_argenseg.py").unlink()


def remove_tokenizer(folder: Path) -> None:
    shutil.rmtree(folder / "visual_tokenizer")


def remove_licence(folder: Path) -> None:
    card = RepoCard.load(folder / "README.md")
    del card.data.license
    card.save(folder / "README.md")


def leave_gap(folder: Path) -> None:
    (folder / "README.md").write_text((folder / "README.md").read_text() + "\nTODO: numbers\n")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (add_pickle, "optimizer.bin: may hold a pickle"),
        (add_path, "config.json: a path of a machine in line 1 (/home/somebody)"),
        (add_path_to_weights, "more.safetensors: a path of a machine"),
        (add_checkpoint, "checkpoint-10/trainer_state.json: a leftover"),
        (add_token, "notes.md: an access token in line 1"),
        (add_link, "weights.safetensors: a link"),
        (break_weights, "model.safetensors: broken"),
        (remove_code, "modeling_argenseg.py is missing"),
        (remove_tokenizer, "visual_tokenizer/*.safetensors is missing"),
        (remove_licence, "README.md: its metadata (the YAML on top) name no license"),
        (leave_gap, "README.md: still to be filled in: TODO"),
    ],
)
def test_what_is_not_fit_is_named(spoil, message, folder):
    spoil(folder)
    problems = inspect(folder, "model").problems
    assert any(message in problem for problem in problems), problems
    assert not any("a1B2" in problem for problem in problems)
    with pytest.raises(ValueError, match="nothing was pushed"):
        publish.push(folder, "owner/toy", "model")


def test_files_above_the_limit_are_refused(tmp_path):
    folder = Path(shutil.copytree(ROOT / "hub_cards" / "space", tmp_path / "space"))
    (folder / "demo.jpg").write_bytes(bytes(11_000_000))
    assert [problem for problem in inspect(folder, "space").problems if "demo.jpg: 11 MB" in problem]


def test_a_metric_keeps_its_name():
    (problem,) = inspect(ROOT / "hub_cards" / "metrics" / "giou", "metric", "owner/mean-iou").problems
    assert "call the repository giou" in problem


def test_there_must_be_a_folder(tmp_path):
    with pytest.raises(SystemExit, match="there is no folder"):
        publish.main([str(tmp_path / "nowhere"), "owner/toy"])


# ---------------------------------------------------------------------- pushing


def run(hub, *arguments: str) -> subprocess.CompletedProcess:
    """The command, as a user runs it, with another Hub."""
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_test", "HF_HUB_OFFLINE": "0"}
    environment |= {"HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-m", "trl_recipes.publish", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_a_dry_run_touches_nothing(model_folder):
    with fake_hub() as hub:
        done = run(hub, str(model_folder), "owner/toy")
        assert done.returncode == 0, done.stderr
        assert "dry run: owner/toy was not touched" in done.stdout and "model.safetensors" in done.stdout
        assert not hub.repositories and not hub.tokens


def test_a_model_arrives_whole(folder):
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "modeling_argenseg.cpython-311.pyc").write_bytes(b"cached")
    with fake_hub() as hub:
        done = run(hub, str(folder), "owner/toy", "--push", "--private", "--message", "First")
        assert done.returncode == 0, done.stderr
        assert hub.files["owner/toy"] == contents(folder)
        assert hub.repositories["owner/toy"]["visibility"] == "private" and hub.commits == ["First"]
        assert hub.tokens == {"Bearer hf_test"} and f"{hub.url}/owner/toy" in done.stdout


def test_a_metric_and_a_space_are_spaces():
    metric, space = ROOT / "hub_cards" / "metrics" / "giou", ROOT / "hub_cards" / "space"
    with fake_hub() as hub:
        done = run(hub, str(metric), "owner/giou", "--kind", "metric", "--push")
        assert done.returncode == 0, done.stderr
        done = run(hub, str(space), "owner/demo", "--kind", "space", "--variable", "MODEL=owner/toy", "--push")
        assert done.returncode == 0, done.stderr
        for name, sdk, folder in (("owner/giou", "static", metric), ("owner/demo", "gradio", space)):
            assert hub.repositories[name]["type"] == "space" and hub.repositories[name]["sdk"] == sdk
            assert hub.files[name] == contents(folder)
        assert hub.variables == {"MODEL": "owner/toy"}


def test_what_is_not_fit_is_not_pushed(folder):
    add_pickle(folder)
    with fake_hub() as hub:
        done = run(hub, str(folder), "owner/toy", "--push")
        assert done.returncode == 1 and "PROBLEM: optimizer.bin" in done.stdout
        assert not hub.repositories


def test_a_wrong_token_is_one_line(model_folder):
    with fake_hub() as hub:
        hub.refuse = True
        done = run(hub, str(model_folder), "owner/toy", "--push")
        assert done.returncode == 1 and "Traceback" not in done.stderr and "401" in done.stderr
        assert not hub.files


# ---------------------------------------------------------------------- cards


def test_the_card_of_a_model_says_what_it_is(model_folder):
    card = ModelCard.load(model_folder / "README.md")
    assert card.data.license == "apache-2.0" and card.data.pipeline_tag == "image-segmentation"
    assert card.data.library_name == "transformers" and "argenseg" in card.data.tags
    for wanted in (
        "30 visual tokens in 4 passes\n(1x1, 2x2, 3x3, 4x4)",
        "| real, test, per-expression | 58 | 0.284 | 0.350 |",
        "commit 0123456789ab;",
        "| visual tokenizer (VAE) | Said |",
        "- Said: data set: Said",
        'model="owner/toy"',
    ):
        assert wanted in card.text, wanted
    assert "giou_noun" not in card.text and "{{" not in card.text
    weights = [load_file(path) for path in model_folder.rglob("*.safetensors")]
    stored = sum(tensor.numel() for tensors in weights for tensor in tensors.values())
    assert f"{stored / 1e6:.1f} M parameters" in card.text


@pytest.mark.parametrize("kind", ["metric", "space"])
def test_the_other_cards_are_read_by_the_hub(kind, tmp_path):
    (tmp_path / "facts.yaml").write_text(yaml.safe_dump(facts(kind)))
    hub_card.main(["--kind", kind, "--folder", str(tmp_path), "--facts", str(tmp_path / "facts.yaml")])
    assert publish.check_card(tmp_path / "README.md") == []
    data = RepoCard.load(tmp_path / "README.md").data.to_dict()
    assert data["sdk"] == {"metric": "static", "space": "gradio"}[kind] and data["license"] == "apache-2.0"


@pytest.mark.parametrize("kind", hub_card.KINDS)
def test_an_example_is_not_a_card_yet(kind, tmp_path, capsys):
    hub_card.main(["--kind", kind, "--example"])
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed).keys() == hub_card.EXAMPLES[kind].keys()
    (tmp_path / "facts.yaml").write_text(printed)
    with pytest.raises(SystemExit, match="still TODO: .*summary"):
        hub_card.main(["--kind", kind, "--folder", str(tmp_path), "--facts", str(tmp_path / "facts.yaml")])


@pytest.mark.parametrize("name", hub_card.LICENCES["model"])
def test_a_card_without_a_licence_is_not_written(name, model_folder):
    given = facts("model")
    del given["licences"][name]
    with pytest.raises(ValueError, match=f"missing: licences.{name}"):
        hub_card.make_card("model", given, model_folder)


@pytest.mark.parametrize(
    ("changes", "message"), [({"complete": False}, "did not answer the whole split"), ({"task": None}, None)]
)
def test_results_must_be_whole(changes, message, model_folder, tmp_path):
    path = result_file(tmp_path / "result.json", **changes)
    if message is None:
        path.write_text("[]")
        message = "is no result.json"
    with pytest.raises(ValueError, match=message):
        hub_card.make_card("model", facts("model"), model_folder, [path])


def test_a_baseline_is_not_taken_for_the_model(tmp_path):
    metrics = {"segmentation": {"giou": 0.512, "ciou": 0.5}, "best_constant": {"giou": 0.266}}
    cells = hub_card.read_result(result_file(tmp_path / "result.json", metrics=metrics))["cells"]
    assert cells == {"giou": 0.512, "ciou": 0.5, "best_constant_giou": 0.266}


def test_lines_of_other_settings_have_other_names(tmp_path):
    usual = {"preset": "full", "seed": 2026, "expressions": 1000}
    settings = [
        {"options": usual},
        {"options": usual, "zoom": True, "follow_edges": False},
        {"options": usual, "zoom": True, "follow_edges": True},
        {"options": usual | {"seed": 7, "preset": "easy"}},
        {"options": usual, "dtype": "bfloat16"},
    ]
    paths = [
        result_file(tmp_path / f"{place}.json", task="scenes", settings={"samples": 1000, "dtype": "float32"} | one)
        for place, one in enumerate(settings)
    ]
    names = [
        result["name"].removeprefix("scenes, test, per-expression")
        for result in hub_card.results_table(paths)["results"]
    ]
    edges = ", zooming in, masks following the edges of the image"
    assert names == [", dtype=float32", ", zooming in", edges, ", preset=easy, seed=7", ", dtype=bfloat16"]
    with pytest.raises(ValueError, match=r"0.json and .*0.json are both 'scenes, test, per-expression'"):
        hub_card.results_table([paths[0], paths[0]])


# ---------------------------------------------------------------------- the Space


@pytest.fixture
def space(monkeypatch, model_folder):
    """The Space's app, imported as it is where gradio is not installed."""
    spec = importlib.util.spec_from_file_location("space_app", ROOT / "hub_cards" / "space" / "app.py")
    app = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(app)
    monkeypatch.setattr(app, "MODEL", str(model_folder))
    return app


def test_the_space_shows_the_masks(space, toy_image, toy_masks):
    image = Image.open(toy_image)
    (shown, parts), said = space.segment(image, f"  {toy.REQUESTS[0]}\n\n{toy.REQUESTS[1]}\nthe whale")
    assert shown.size == image.size
    assert [label.rpartition(" (")[0] for _, label in parts] == toy.REQUESTS
    for mask, _ in parts:
        assert mask.shape == toy_masks[0].shape and set(np.unique(mask)) == {0.0, 1.0}
    assert said.startswith("2 drawn.") and "(the whale)" in said


def test_the_space_looks_closer(space, monkeypatch):
    """With the default model, because what a toy draws of a view says nothing."""
    monkeypatch.setattr(space, "MODEL", str(ROOT / "hub_cards" / "argenseg-tiny"))
    space.load.cache_clear()
    image = Image.open(ROOT / "examples" / "sheep.jpg")
    masks = [space.segment(image, "the sheep", zoom)[0][1][0][0] for zoom in (False, True)]
    space.load.cache_clear()
    assert 0 < np.abs(masks[0] - masks[1]).mean() < 0.05


@pytest.mark.parametrize(
    ("image", "text", "said"),
    [
        (None, "a", "Give an image"),
        (Image.new("RGB", (8, 8)), " \n", "What is to be"),
        (Image.new("RGB", (8, 8)), "a\n" * 9, "At most 8"),
    ],
)
def test_the_space_says_what_is_missing(space, image, text, said):
    shown, answer = space.segment(image, text)
    assert shown is None and said in answer


def test_the_space_needs_a_model(space, monkeypatch):
    monkeypatch.setattr(space, "MODEL", "")
    with pytest.raises(RuntimeError, match="MODEL"):
        space.segment(Image.new("RGB", (8, 8)), "a")


def test_the_page_is_built(space):
    pytest.importorskip("gradio", reason="the page itself needs gradio, which the package does not")
    assert space.build() is not None


def test_the_space_asks_for_nothing_but_what_our_pipeline_needs():
    names = {line.split(">=")[0] for line in (ROOT / "hub_cards/space/requirements.txt").read_text().split()}
    assert names == {"torch", "transformers", "accelerate", "pillow", "numpy"}
