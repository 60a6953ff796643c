"""Reading a released checkpoint (`inclusionAI/ARGenSeg-8B`) as it is, by `from_pretrained` and by the conversion.

A released folder has a `config.json` of `model_type: internvl_chat` and an ARGenSeg's weights under the released names;
the VQ-VAE may also be there as VAR's `vae_*.pth`. The tokenizer lies in the folder, or in `tokenizer/` beside it.

`internvl_chat` is not registered with the Auto classes: other InternVL repositories have that type too, and the
registration would take them away from their own code. Load a released folder through the classes of this package.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import GenerationConfig, PreTrainedConfig
from transformers.utils import cached_file

from .configuration_argenseg import ARGenSegConfig, VARTokenizerConfig
from .tensor_files import INDEX, StoredTensor, read_folder, read_pth

MODEL_TYPE = "internvl_chat"
PREFIX = "image_tokenizer."
PATCH_NUMS = {680: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16), 2240: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)}
WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HUB_KWARGS = ("cache_dir", "force_download", "token", "local_files_only", "revision")
FILES = ["*.json", "*.safetensors", "*.model", "*.pth"]


@dataclass(frozen=True)
class ReleasedCheckpoint:
    """A released folder: its parsed `config.json` (empty for a `.pth` alone) and its tensors, not yet read."""

    folder: Path
    config_json: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]

    @cached_property
    def token_ids(self) -> dict[str, int]:
        """The added tokens of the tokenizer, as its JSON files give them; empty without a tokenizer."""
        return read_token_ids(tokenizer_folder(self.folder))

    @cached_property
    def config(self) -> ARGenSegConfig:
        """The configuration as ours; sizes of the VQ-VAE and the picture come from the shapes of the weights.

        Raises:
            ValueError: `config.json` lacks something, or the tokenizer's ids do not fit the vocabulary.
        """
        from .conversion_argenseg import convert_config

        file = self.folder / "config.json"
        pictures = infer_visual_tokenizer_config(self.tensors, self._picture_length())
        try:
            first_visual = self.config_json["llm_config"]["vocab_size"] - pictures.vocab_size
            image_token_id = self._image_token_id(first_visual)
            config = convert_config(self.config_json, image_token_id, pictures)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{file} is no configuration of a released ARGenSeg: {error!r}") from error
        config.dtype = self.config_json.get("torch_dtype") or self.config_json.get("dtype")
        config.architectures = ["ARGenSegForConditionalGeneration"]
        return config

    def _picture_length(self) -> int:
        if "pos_1LC" not in self.tensors:
            raise ValueError(f"{_name_of_weights(self.folder)} lacks pos_1LC: these are no weights of ARGenSeg")
        return self.tensors["pos_1LC"].shape[1]

    def _image_token_id(self, first_visual: int) -> int:
        for token, back in (("<ge_start>", 3), ("<ge_end>", 2), ("<MASK_CONTEXT>", 1)):
            found = self.token_ids.get(token, first_visual - back)
            if found != first_visual - back:
                raise ValueError(
                    f"the tokenizer in {tokenizer_folder(self.folder)} does not fit the weights: {token} has the id "
                    f"{found}, and the model has it at {first_visual - back}"
                )
        if "<IMG_CONTEXT>" in self.token_ids:
            return self.token_ids["<IMG_CONTEXT>"]
        if first_visual != 92557:
            raise ValueError(
                f"{self.folder} has no tokenizer that tells the id of <IMG_CONTEXT>, and the vocabulary is not the "
                "released one; put the tokenizer's files into the folder"
            )
        return 92546

    @cached_property
    def generation_config(self) -> GenerationConfig:
        """Text ends at `<|im_end|>`, as in the released chat."""
        text = self.config.text_config
        end = self.token_ids.get("<|im_end|>", 92542 if self.config.image_token_id == 92546 else text.eos_token_id)
        return GenerationConfig(bos_token_id=text.bos_token_id, eos_token_id=end, pad_token_id=text.pad_token_id)

    def check(self) -> None:
        """Compare names, shapes and dtypes with what the configuration asks for.

        Raises:
            ValueError: a key is missing, unknown, of a wrong shape or no floating-point weights.
        """
        expected = released_shapes(self.config)
        for key in expected:
            if key not in self.tensors:
                raise ValueError(
                    f"{_name_of_weights(self.folder)} lacks {key}{_count(set(expected) - {*self.tensors})}"
                )
        for key, entry in self.tensors.items():
            if key not in expected:
                unknown = _count({*self.tensors} - set(expected))
                raise ValueError(f"{entry.file}: {key} is not a name of the released ARGenSeg layout{unknown}")
            if entry.shape != expected[key]:
                raise ValueError(
                    f"{entry.file}: {key} has the shape {entry.shape}, config.json asks for {expected[key]}"
                )
            if entry.dtype not in WEIGHT_DTYPES:
                raise ValueError(f"{entry.file}: {key} is {entry.dtype}; weights are float32, float16 or bfloat16")

    def model_tensors(self) -> dict[str, "LazyTensor"]:
        """The state dict of `ARGenSegForConditionalGeneration`; each tensor is read when it is asked for."""
        from .conversion_argenseg import convert_tensor

        state: dict[str, LazyTensor] = {}
        for key, entry in self.tensors.items():
            on_meta = convert_tensor(key, torch.empty(entry.shape, dtype=entry.dtype, device="meta"), self.config)
            state |= {name: LazyTensor(entry, key, name, like, self.config) for name, like in on_meta.items()}
        return state

    def visual_tokenizer_tensors(self) -> dict[str, StoredTensor]:
        """The state dict of `VARTokenizer`."""
        return {key[len(PREFIX) :]: entry for key, entry in self.tensors.items() if key.startswith(PREFIX)}


class LazyTensor:
    """A tensor under our name that is read and converted on `[...]`, as transformers' loader does with slices."""

    def __init__(
        self, entry: StoredTensor, key: str, name: str, like: torch.Tensor, config: ARGenSegConfig | None
    ) -> None:
        self.entry, self.key, self.name, self.config = entry, key, name, config
        self.dtype, self.shape = like.dtype, tuple(like.shape)

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.read()[index]

    def read(self) -> torch.Tensor:
        from .conversion_argenseg import convert_tensor

        return convert_tensor(self.key, self.entry.read(), self.config)[self.name]


def find_released(path: Any, subfolder: str = "", **kwargs: Any) -> ReleasedCheckpoint | None:
    """The released checkpoint at a path or Hub name, a `.pth` of the VQ-VAE alone included; None if it is none.

    Raises:
        ValueError: it is one, and its files are missing or broken.
    """
    if path is None:
        return None
    if str(path).endswith(".pth"):
        tensors = {PREFIX + key: entry for key, entry in read_pth(Path(path)).items()}
        return ReleasedCheckpoint(Path(path).parent, {}, tensors)
    hub_kwargs = {name: kwargs[name] for name in HUB_KWARGS if kwargs.get(name) is not None}
    quiet = {f"_raise_exceptions_for_{what}": False for what in ("gated_repo", "missing_entries", "connection_errors")}
    file = cached_file(path, "config.json", subfolder=subfolder, **hub_kwargs, **quiet)
    if file is None:
        return None
    config_json = _read_json(Path(file))
    if config_json.get("model_type") != MODEL_TYPE:
        return None
    if os.path.isdir(path):
        folder = Path(path, subfolder)
    else:
        folder = Path(snapshot_download(str(path), allow_patterns=FILES, **hub_kwargs), subfolder)
    return ReleasedCheckpoint(folder, config_json, _tensors_of(folder))


def _tensors_of(folder: Path) -> dict[str, StoredTensor]:
    tensors = read_folder(folder)
    if any(key.startswith(PREFIX) for key in tensors):
        return tensors
    files = sorted(folder.glob("vae_*.pth"))
    if len(files) != 1:
        found = f"has {len(files)} files vae_*.pth" if files else "has no vae_*.pth, such as vae_ch160v4096z32.pth"
        raise ValueError(f"{_name_of_weights(folder)} lacks {PREFIX}*, and {folder} {found}")
    return tensors | {PREFIX + key: entry for key, entry in read_pth(files[0]).items()}


def infer_visual_tokenizer_config(
    tensors: Mapping[str, StoredTensor], picture_length: int | None = None
) -> VARTokenizerConfig:
    """The sizes of the VQ-VAE, read off the shapes of its weights (released names).

    Args:
        picture_length: T, which tells 256 px (680) from 512 px (2240); None for 256 px.

    Raises:
        ValueError: a weight that tells a size is missing, or the sizes are not those of a VAR tokenizer.
    """

    def shape(key: str) -> tuple[int, ...]:
        if PREFIX + key not in tensors:
            raise ValueError(f"the VQ-VAE lacks {key}: {', '.join({str(e.file) for e in tensors.values()})}")
        return tensors[PREFIX + key].shape

    def count(pattern: str) -> int:
        return next(i for i in range(1000) if PREFIX + pattern.format(i) not in tensors)

    if picture_length not in (None, *PATCH_NUMS):
        raise ValueError(f"pos_1LC has {picture_length} positions; released are 680 (256 px) and 2240 (512 px)")
    patch_nums = PATCH_NUMS[picture_length or 680]
    channels, colours = shape("encoder.conv_in.weight")[:2]
    levels = count("encoder.down.{}.block.0.conv1.weight")
    widths = [shape(f"encoder.down.{i}.block.0.conv1.weight")[0] for i in range(levels)]
    codes, latent = shape("quantize.embedding.weight")
    return VARTokenizerConfig(
        image_size=patch_nums[-1] * 2 ** (levels - 1),
        num_channels=colours,
        base_channels=channels,
        channel_multipliers=[width // channels for width in widths],
        num_res_blocks=count("encoder.down.0.block.{}.conv1.weight"),
        latent_channels=latent,
        vocab_size=codes,
        patch_nums=patch_nums,
        num_phi=count("quantize.quant_resi.qresi_ls.{}.weight"),
    )


def released_shapes(config: ARGenSegConfig) -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor of a released checkpoint, found on the meta device."""
    from .conversion_argenseg import revert_state_dict
    from .modeling_argenseg import ARGenSegForConditionalGeneration
    from .var_tokenizer import VARTokenizer

    with torch.device("meta"):
        model = ARGenSegForConditionalGeneration(config)
        visual_tokenizer = VARTokenizer(config.visual_tokenizer_config)
    released = revert_state_dict(model.state_dict(), visual_tokenizer.state_dict(), config)
    return {key: tuple(tensor.shape) for key, tensor in released.items()}


def tokenizer_folder(folder: Path) -> Path:
    """Where the tokenizer of a released folder lies: in it, or in `tokenizer/` beside it."""
    names = ("tokenizer.json", "tokenizer.model", "added_tokens.json", "tokenizer_config.json")
    for place in (folder, folder.parent / "tokenizer"):
        if any((place / name).exists() for name in names):
            return place
    return folder


def read_token_ids(folder: Path) -> dict[str, int]:
    """Ids of the added tokens, from whichever of the tokenizer's JSON files are there."""
    ids: dict[str, int] = {}
    for token in _read_json(folder / "tokenizer.json").get("added_tokens", []):
        ids[token["content"]] = token["id"]
    for number, token in _read_json(folder / "tokenizer_config.json").get("added_tokens_decoder", {}).items():
        ids[token["content"]] = int(number)
    return ids | _read_json(folder / "added_tokens.json")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error


def _name_of_weights(folder: Path) -> Path:
    return folder / (INDEX if (folder / INDEX).exists() else "model.safetensors")


def _count(keys: set[str]) -> str:
    return f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""


class LoadsReleased:
    """Mixin: `from_pretrained` also takes a released checkpoint. Goes before `PreTrainedModel` among the bases.

    `_released_arguments(released, kwargs)` of the class makes the arguments of `from_pretrained(None, ...)`.
    """

    _released_arguments: Callable[[ReleasedCheckpoint, dict[str, Any]], dict[str, Any]]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; a released folder or Hub name loads as it is, a VQ-VAE also from its `.pth`.

        Raises:
            ValueError: a released checkpoint with missing, unknown or broken weights; names the file and the key.
        """
        released = find_released(pretrained_model_name_or_path, **kwargs)
        if released is None:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)  # type: ignore[misc]
        kwargs = {name: value for name, value in kwargs.items() if name not in (*HUB_KWARGS, "subfolder")}
        arguments = cls._released_arguments(released, kwargs)
        loaded = super().from_pretrained(None, *args, **arguments)  # type: ignore[misc]
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.name_or_path = model.config.name_or_path = str(pretrained_model_name_or_path)
        return loaded


def model_arguments(released: ReleasedCheckpoint, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What `ARGenSegForConditionalGeneration.from_pretrained` needs for a released checkpoint.

    Fields of `ARGenSegConfig` among `kwargs` change the configuration, as they do with a native folder.
    """
    released.check()
    config, rest = _with_changes(kwargs.get("config") or released.config, kwargs)
    state = released.model_tensors()
    return {"config": config, "state_dict": state, "generation_config": released.generation_config} | rest


def visual_tokenizer_arguments(released: ReleasedCheckpoint, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What `VARTokenizer.from_pretrained` needs for a released checkpoint or a `.pth`; the weights tell the sizes.

    Fields of `VARTokenizerConfig` among `kwargs` change the configuration; a `config` of another size does not.
    """
    if released.config_json:
        released.check()
        config = released.config.visual_tokenizer_config
    else:
        config = infer_visual_tokenizer_config(released.tensors)
    config, rest = _with_changes(config, kwargs)
    state = {key: entry.read() for key, entry in released.visual_tokenizer_tensors().items()}
    return {"config": config, "state_dict": state} | rest


def _with_changes(config: PreTrainedConfig, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The configuration with those of its fields that are among `kwargs`, and the rest of these."""
    fields = [name for name in type(config).__annotations__ if name in kwargs]
    for name in fields:
        setattr(config, name, kwargs[name])
    return config, {name: value for name, value in kwargs.items() if name not in (*fields, "config")}
