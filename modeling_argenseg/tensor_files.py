"""Tensors on disk, one at a time: headers without data, reads of single tensors, writes that stream.

The safetensors format (an 8-byte length, a JSON header, the raw bytes) is read and written here directly and not mapped
into memory, so that the peak of a conversion is a tensor or two, whatever the size of the files.
"""

import hashlib
import json
import pickle
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: `nbytes` bytes at `start` of a safetensors file, or `held`, mapped from a `.pth` file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int = 0
    nbytes: int = 0
    held: torch.Tensor | None = None

    def read(self) -> torch.Tensor:
        """The tensor, in memory of its own.

        Raises:
            ValueError: the file has been cut since its header was read.
        """
        if self.held is not None:
            return self.held.clone(memory_format=torch.contiguous_format)
        data = bytearray(self.nbytes)
        with open(self.file, "rb", buffering=0) as stream:
            stream.seek(self.start)
            view, filled = memoryview(data), 0
            while filled < self.nbytes and (count := stream.readinto(view[filled:])):
                filled += count
        if filled < self.nbytes:
            raise ValueError(f"{self.file} is cut: it ends {self.nbytes - filled} bytes before the end of a tensor")
        return torch.frombuffer(data, dtype=self.dtype).view(self.shape) if data else torch.empty(self.shape)


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name; the data is not read, but must be there in full.

    Raises:
        ValueError: not a safetensors file, or cut; names the file and, if it is known, the first key that is not whole.
    """
    size = file.stat().st_size
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"{file} is no whole safetensors file: {size} bytes do not even hold its header")
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            entries = {key: _entry(file, info, 8 + length) for key, info in header.items()}
        except (UnicodeDecodeError, ValueError, AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{file} has no readable safetensors header ({error!r})") from error
    for key, entry in sorted(entries.items(), key=lambda item: item[1].start):
        if entry.nbytes != entry.dtype.itemsize * torch.Size(entry.shape).numel():
            raise ValueError(f"{file}: {key} has {entry.nbytes} bytes, which do not fit {entry.dtype} {entry.shape}")
        if entry.start + entry.nbytes > size:
            missing = entry.start + entry.nbytes - size
            raise ValueError(f"{file} is cut: {key} ends {missing} bytes after the end of the file; get the file again")
    return entries


def _entry(file: Path, info: dict, data_start: int) -> StoredTensor:
    begin, end = info["data_offsets"]
    return StoredTensor(file, DTYPES[info["dtype"]], tuple(info["shape"]), data_start + begin, end - begin)


def read_folder(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a model folder: `model.safetensors`, or the shards that `model.safetensors.index.json` names.

    Raises:
        ValueError: no weights, a shard that is missing or cut, or one that lacks a key which the index puts there.
    """
    index = folder / INDEX
    if not index.exists():
        if not (folder / WEIGHTS).exists():
            raise ValueError(f"{folder} has neither {WEIGHTS} nor {INDEX}")
        return read_header(folder / WEIGHTS)
    try:
        weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError) as error:
        raise ValueError(f"{index} is not the index of a sharded checkpoint ({error!r})") from error
    entries: dict[str, StoredTensor] = {}
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name or not (folder / name).exists():
            raise ValueError(f"{index} names the shard {name}, and it is not in the folder")
        entries.update(read_header(folder / name))
    for key, name in weight_map.items():
        if key not in entries or entries[key].file.name != name:
            raise ValueError(f"{folder / name} lacks {key}, which {INDEX} puts there")
    return entries


def read_pth(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a `.pth` state dict. Only tensors are unpickled: code in the file is refused, not run.

    Raises:
        ValueError: the file is broken, holds anything but tensors by name, or wants code to be run.
    """
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file) or None)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).strip()
        raise ValueError(f"{file} is refused: it is broken, or holds more than tensors ({reason})") from error
    if not isinstance(state, dict):
        raise ValueError(f"{file} holds a {type(state).__name__}; needed is a state dict: tensors by name")
    for key, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"{file}: {key} is a {type(value).__name__}, not a tensor")
    return {key: StoredTensor(file, value.dtype, tuple(value.shape), held=value) for key, value in state.items()}


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to be written under a name: what it will look like, and how to make it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def write_safetensors(file: Path, plan: dict[str, PlannedTensor]) -> Iterator[tuple[str, int, str]]:
    """Write tensors one after another; yields name, bytes and SHA-256 of each when it is on disk.

    Raises:
        ValueError: a tensor came out otherwise than planned.
    """
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for key, planned in plan.items():
        ends = [offset, offset + planned.nbytes]
        header[key] = {"dtype": DTYPE_NAMES[planned.dtype], "shape": list(planned.shape), "data_offsets": ends}
        offset = ends[1]
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # data begins at a multiple of 8
    with open(file, "wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        for key, planned in plan.items():
            tensor = planned.make()
            if tensor.dtype != planned.dtype or tuple(tensor.shape) != planned.shape:
                raise ValueError(f"{key} became {tensor.dtype} {tuple(tensor.shape)} while {file.name} was written")
            data = tensor.contiguous().flatten().view(torch.uint8).numpy()
            stream.write(data)
            yield key, planned.nbytes, hashlib.sha256(data).hexdigest()
            del tensor, data  # before the next one comes
