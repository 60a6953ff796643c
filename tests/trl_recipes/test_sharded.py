"""FSDP2 in two processes on a CPU: the same run as one process, whole at its end, also where batches have no picture.

accelerate takes FSDP only where it sees GPUs, so the program that is launched says that there are some.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import own_masks
import pytest
import tiny_scenes
import torch
import toy
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from trl_recipes import lora, sharded

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "trl_recipes" / "configs" / "fsdp2.yaml"
AS_ON_GPUS = """
import os, runpy, sys
from accelerate import state
from accelerate.utils import DistributedType

make = state.PartialState.__init__

def as_on_gpus(self, *args, **kwargs):
    make(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU

if os.environ.get("ACCELERATE_USE_FSDP") == "true":
    state.PartialState.__init__ = as_on_gpus
sys.argv.pop(0)
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""
COMMON = dict(max_steps=6, learning_rate=1e-2, logging_steps=1, use_cpu=True, disable_tqdm=True, seed=1, data_seed=1)
MODULES = {
    "trl_recipes.sft": dict(eval_steps=3, save_steps=3, warmup_steps=1, config="trl_recipes/configs/sft_full.yaml"),
    "trl_recipes.lora": dict(eval_steps=3, save_steps=3, max_adapter_share=0.5, lora_rank=4),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    net, processor = toy.build(tiny_scenes.grey_tokenizer((1, 2, 4, 8)))
    net.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return own_masks.as_jsonl(tmp_path_factory.mktemp("data") / "own")


def train(module: str, model: Path, data: Path, output: Path, processes: int) -> Path:
    driver = output.with_suffix(".py")
    driver.write_text(AS_ON_GPUS)
    name = "model" if module == "trl_recipes.lora" else "model_name_or_path"
    options = COMMON | MODULES[module] | {name: model, "data": data, "eval_data": data, "output_dir": output}
    options |= {"per_device_train_batch_size": 2 // processes, "cache_dir": data.parent / "cache"}
    words = [str(word) for option, value in options.items() for word in (f"--{option}", value)]
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "accelerate.commands.launch", "--config_file", str(CONFIG)]
        launch += ["--num_processes", str(processes), "--mixed_precision", "no", "--main_process_port", "0"]
    done = subprocess.run(
        [*launch, str(driver), module, *words],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return output


def losses(output: Path) -> list[float]:
    state = json.loads((output / "checkpoint-6" / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


@pytest.mark.slow
@pytest.mark.parametrize("module", MODULES)
def test_two_processes_with_shards_of_the_model_are_one(module, model, data, tmp_path):
    one, two = (train(module, model, data, tmp_path / str(count), processes=count) for count in (1, 2))
    assert (two / "checkpoint-6" / "pytorch_model_fsdp_0").is_dir()  # it was sharded
    assert losses(two) == pytest.approx(losses(one), rel=1e-3) and len(losses(one)) == 6
    measured = [[json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()] for path in (one, two)]
    assert measured[0] == measured[1] and [entry["step"] for entry in measured[0]] == [0, 3, 6]
    folder = "merged" if module == "trl_recipes.lora" else ""
    nets = [AutoModelForImageTextToText.from_pretrained(path / folder) for path in (one, two)]
    before = load_file(model / "model.safetensors")
    moved = 0
    for (name, a), b in zip(nets[0].state_dict().items(), nets[1].state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3, msg=name)
        moved += name in before and not torch.equal(a, before[name])
        assert "quantizer" not in name or torch.equal(a, before[name])
    assert moved


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fsdp_version": 1, "cpu_ram_efficient_loading": False}, "FSDP1 cannot draw masks.*fsdp_version: 2"),
        ({"fsdp_version": 2, "cpu_ram_efficient_loading": True}, "fsdp_cpu_ram_efficient_loading .* set it to false"),
    ],
)
def test_settings_that_do_not_go_with_drawing(settings, message):
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=SimpleNamespace(**settings)))
    with pytest.raises(ValueError, match=message):
        sharded.adjust_fsdp(SimpleNamespace(accelerator=accelerator, is_fsdp_enabled=True), evaluates=True)


def test_zero_stage_3_is_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(sharded, "is_deepspeed_zero3_enabled", lambda: True)
    words = ["--model", "nowhere", "--data", "nowhere", "--output", str(tmp_path), "--use_cpu", "True"]
    with pytest.raises(SystemExit, match="ZeRO stage 3 is not supported: use stage 2, or FSDP"):
        lora.main(words)
