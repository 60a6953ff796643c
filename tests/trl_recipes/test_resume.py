"""A run goes on where it was, and a finished one stays as it is."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments

from trl_recipes.resume import last_checkpoint, train_or_go_on, where_to_go_on


class Line(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x, labels=None):
        return {"loss": ((self.weight * x - labels) ** 2).mean()}


def trainer(output: Path, **changes) -> Trainer:
    """Ten samples, three batches an epoch: the last step of seven is not at the end of an epoch."""
    options = dict(max_steps=7, save_steps=0.5, per_device_train_batch_size=4, learning_rate=0.1)
    rows = [{"x": torch.ones(1), "labels": torch.ones(1)}] * 10
    arguments = TrainingArguments(
        str(output), use_cpu=True, disable_tqdm=True, report_to="none", **(options | changes)
    )  # fmt: skip
    return Trainer(Line(), arguments, train_dataset=rows)


@pytest.mark.parametrize("steps", [{}, {"max_steps": -1, "num_train_epochs": 2}])
def test_a_finished_run_trains_nothing_more(tmp_path, steps, capsys):
    first = trainer(tmp_path, **steps)
    train_or_go_on(first)
    done, weight = first.state.global_step, first.model.weight.item()
    for _ in range(2):
        again = trainer(tmp_path, **steps)
        train_or_go_on(again)
        assert again.state.global_step == done and again.model.weight.item() == weight
        assert f"finished at step {done}" in capsys.readouterr().out
    assert Path(last_checkpoint(tmp_path)).name == f"checkpoint-{done}"


def test_more_steps_go_on_from_the_last_checkpoint(tmp_path, capsys):
    train_or_go_on(trainer(tmp_path))
    longer = trainer(tmp_path, max_steps=9)
    train_or_go_on(longer)
    assert longer.state.global_step == 9 and "finished" not in capsys.readouterr().out


def test_shares_of_the_run_agree_with_the_checkpoint(tmp_path, monkeypatch):
    warned = []
    monkeypatch.setattr("transformers.trainer_utils.logger.warning_once", warned.append)
    train_or_go_on(trainer(tmp_path))
    state = json.loads((tmp_path / "checkpoint-4/trainer_state.json").read_text())
    again = trainer(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    train_or_go_on(again)
    assert again.args.save_steps == state["save_steps"] == 4 and not warned
    assert again.state.global_step == 7


def cut(path: Path) -> None:
    """Leaves half of a file, as a full disk or a power cut does."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


FILES = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]


@pytest.mark.parametrize("name", FILES)
def test_a_broken_checkpoint_is_told_and_the_one_before_is_used(tmp_path, name, capsys):
    first = trainer(tmp_path)
    train_or_go_on(first)
    weight = first.model.weight.item()
    cut(tmp_path / "checkpoint-7" / name)
    again = trainer(tmp_path)
    train_or_go_on(again)
    assert f"checkpoint-7 is broken ({name} is cut off) and passed over: the run goes on from " in (
        told := capsys.readouterr().out
    )
    assert "checkpoint-4\n" in told and "finished" not in told
    assert again.state.global_step == 7 and again.model.weight.item() == pytest.approx(weight, rel=1e-6)
    assert Path(last_checkpoint(tmp_path)).name == "checkpoint-7"  # whole again


def test_a_run_with_nothing_but_a_broken_checkpoint_begins_anew(tmp_path, capsys):
    train_or_go_on(trainer(tmp_path))
    shutil.rmtree(tmp_path / "checkpoint-4")
    (tmp_path / "checkpoint-7/trainer_state.json").unlink()
    again = trainer(tmp_path)
    train_or_go_on(again)
    told = capsys.readouterr().out
    assert "checkpoint-7 is broken (without trainer_state.json) and passed over: the run begins anew" in told
    assert again.state.global_step == 7


def test_the_checkpoint_that_is_named_is_used(tmp_path, capsys):
    train_or_go_on(trainer(tmp_path))
    begun = trainer(tmp_path / "other", resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    train_or_go_on(begun)
    assert begun.state.global_step == 7 and begun.state.log_history[0]["step"] == 7
    cut(tmp_path / "checkpoint-4" / "optimizer.pt")
    broken = TrainingArguments(str(tmp_path), resume_from_checkpoint=str(tmp_path / "checkpoint-4"), use_cpu=True)
    with pytest.raises(ValueError, match=r"checkpoint-4 is no whole checkpoint \(optimizer.pt is cut off\)"):
        where_to_go_on(broken)


def test_checkpoints_without_an_optimizer_are_none_to_go_on_from(tmp_path, capsys):
    train_or_go_on(trainer(tmp_path))
    (tmp_path / "checkpoint-7/optimizer.pt").unlink()
    assert Path(last_checkpoint(tmp_path)).name == "checkpoint-4"
    with pytest.raises(ValueError, match="--save_only_model leaves no checkpoints to go on from"):
        where_to_go_on(TrainingArguments(str(tmp_path), save_only_model=True, use_cpu=True))


def test_the_best_checkpoint_is_found_from_another_folder(tmp_path, monkeypatch):
    """It is written down as seen from where the run began."""
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    train_or_go_on(trainer(Path("run")))
    path = Path("run/checkpoint-7/trainer_state.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"best_model_checkpoint": "run/checkpoint-4"}))
    monkeypatch.chdir(tmp_path)
    again = trainer(Path("a/run"))
    train_or_go_on(again)
    assert again.state.best_model_checkpoint == "a/run/checkpoint-4"
