"""The golden fixture: weights and numbers made by the official code (see its README)."""

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modeling_argenseg import ARGenSegConfig, ARGenSegForConditionalGeneration, VARTokenizer, VARTokenizerConfig
from modeling_argenseg.conversion_argenseg import TOKENIZER_PREFIX, convert_config, convert_state_dict

FOLDER = Path(__file__).parents[2].parent / "shared" / "golden" / "tiny256"
IMAGE_TOKEN_ID = 280


@dataclass
class Golden:
    io: dict[str, torch.Tensor]
    meta: dict
    released: dict[str, torch.Tensor]
    config_json: dict

    def __getitem__(self, name: str) -> torch.Tensor:
        """A tensor; integers as int64, so that they can be ids."""
        tensor = self.io[name]
        return tensor.long() if tensor.dtype == torch.int32 else tensor

    def config(self) -> ARGenSegConfig:
        pictures = VARTokenizerConfig(base_channels=32)
        return convert_config(self.config_json, image_token_id=IMAGE_TOKEN_ID, visual_tokenizer_config=pictures)

    def model(self, attention: str) -> ARGenSegForConditionalGeneration:
        model = ARGenSegForConditionalGeneration(self.config())
        model.set_attn_implementation(attention)
        model.load_state_dict(convert_state_dict(self.released, model.config))
        model.generation_config.update(pad_token_id=self.meta["ids"]["pad"], eos_token_id=self.meta["ids"]["im_end"])
        return model.eval()


@pytest.fixture(scope="session")
def golden() -> Golden:
    if not (FOLDER / "io.safetensors").exists():
        pytest.skip(f"no golden fixture in {'/'.join(FOLDER.parts[-3:])}, next to the repository")
    spec = importlib.util.spec_from_file_location("rebuild_checkpoint", FOLDER.parent / "rebuild_checkpoint.py")
    rebuild_checkpoint = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rebuild_checkpoint)
    weights = rebuild_checkpoint.rebuild(str(FOLDER))
    return Golden(
        io=load_file(FOLDER / "io.safetensors"),
        meta=json.loads((FOLDER / "io.json").read_text()),
        released={name: torch.from_numpy(array) for name, array in weights.items()},
        config_json=json.loads((FOLDER / "checkpoint" / "config.json").read_text()),
    )


@pytest.fixture(scope="session")
def golden_tokenizer(golden: Golden) -> VARTokenizer:
    tokenizer = VARTokenizer(golden.config().visual_tokenizer_config)
    released = golden.released.items()
    own = {key.removeprefix(TOKENIZER_PREFIX): value for key, value in released if key.startswith(TOKENIZER_PREFIX)}
    tokenizer.load_state_dict(own)
    return tokenizer.eval()
