"""Folders from the released layout to ours and back: exact, checked, in bounded memory, whole or not at all."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_released
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from modeling_argenseg.convert_checkpoint import MANIFEST, convert_folder, main, revert_folder
from modeling_argenseg.tensor_files import read_folder

REPOSITORY = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "modeling_argenseg.conversion_argenseg"]

# prints how much the peak of the resident memory grows beyond what the imports take
MEASURE = """
import sys
from pathlib import Path
from modeling_argenseg.convert_checkpoint import convert_folder, revert_folder
def peak():  # not ru_maxrss: a child inherits that of its parent
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
before = peak()
{"convert": convert_folder, "revert": revert_folder}[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
print("GROWTH", peak() - before)
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    tensors = tiny_released.write_checkpoint(root / "released", num_shards=3, dtype=torch.bfloat16)
    main([str(root / "released"), str(root / "native")])
    main(["--to-released", str(root / "native"), str(root / "back")])
    return root, tensors


def test_round_trip_is_bit_identical(folders):
    root, tensors = folders
    back = {key: entry.read() for key, entry in read_folder(root / "back").items()}
    assert back.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert back[key].dtype == tensor.dtype and torch.equal(back[key], tensor), key
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (root / "back" / name).read_bytes() == (root / "released" / name).read_bytes()


def test_native_folder_opens_with_the_auto_classes(folders):
    root, _ = folders
    model, info = AutoModelForImageTextToText.from_pretrained(root / "native", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.config.model_type == "argenseg" and model.generation_config.eos_token_id == 256 + 3
    processor = AutoProcessor.from_pretrained(root / "native")
    assert processor.visual_tokenizer is not None and processor.mask_resize_sizes == [512, 256]
    assert processor.visual_tokenizer.dtype == torch.float32


def test_native_shards_follow_the_source(folders):
    files = sorted(file.name for file in (folders[0] / "native").glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors" and len(files) > 1


def test_manifest_tells_the_truth(folders):
    root, _ = folders
    noted = json.loads((root / "native" / MANIFEST).read_text())["tensors"]
    files = {note["file"] for note in noted.values()}
    stored = {file: load_file(root / "native" / file) for file in files}
    assert sum(map(len, stored.values())) == len(noted)
    for name, note in noted.items():
        tensor = stored[note["file"]][name.removeprefix("visual_tokenizer/")]
        assert list(tensor.shape) == note["shape"] and str(tensor.dtype) == "torch." + note["dtype"]
        assert hashlib.sha256(tensor.flatten().view(torch.uint8).numpy()).hexdigest() == note["sha256"]


def test_to_released_without_the_original_files(folders, tmp_path):
    """As for a model that was never released: configuration and tokenizer are written anew."""
    root, tensors = folders
    model = AutoModelForImageTextToText.from_pretrained(root / "native")
    model.save_pretrained(tmp_path / "own")
    AutoProcessor.from_pretrained(root / "native").save_pretrained(tmp_path / "own")
    revert_folder(tmp_path / "own", tmp_path / "released")
    convert_folder(tmp_path / "released", tmp_path / "again")
    first, second = read_folder(tmp_path / "own"), read_folder(tmp_path / "again")
    assert first.keys() == second.keys() and all(torch.equal(first[k].read(), second[k].read()) for k in first)
    assert read_folder(tmp_path / "released").keys() == tensors.keys()


@pytest.mark.parametrize(
    "arguments, message", [(["released", "native"], "exists"), (["back/..", "new"], "no released")]
)
def test_refusals_of_the_command(folders, arguments, message):
    root, _ = folders
    before = sorted(root.rglob("*"))
    with pytest.raises(SystemExit, match=message):
        main([str(root / argument) for argument in arguments])
    with pytest.raises(SystemExit, match="no native folder|exists"):
        main(["--to-released", *(str(root / argument) for argument in arguments)])
    assert sorted(root.rglob("*")) == before


def test_a_missing_native_tensor_is_named(folders, tmp_path):
    (tmp_path / "native").mkdir()
    for file in (folders[0] / "native").rglob("*"):
        target = tmp_path / "native" / file.relative_to(folders[0] / "native")
        target.mkdir() if file.is_dir() else target.write_bytes(file.read_bytes())
    (tmp_path / "native" / "visual_tokenizer" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="visual_tokenizer has neither model.safetensors nor"):
        revert_folder(tmp_path / "native", tmp_path / "back")
    assert [entry.name for entry in tmp_path.iterdir()] == ["native"]


def test_help_teaches(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(word in text for word in ("--to-released", "from_pretrained", "Ctrl-C", "SHA-256", "vae_ch160v4096z32"))


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """230 MB in five files, tensors of 17 MB."""
    return make_large(tmp_path_factory.mktemp("large") / "released", num_layers=4, num_shards=5)


def make_large(folder, num_layers, num_shards, intermediate_size=8192):
    folder.mkdir()
    sizes = dict(hidden_size=512, intermediate_size=intermediate_size, num_hidden_layers=num_layers)
    config = tiny_released.config_json(**sizes)
    (folder / "config.json").write_text(json.dumps(config))
    tiny_released.write_weights(folder, tiny_released.released_tensors(config), num_shards)
    tiny_released.write_tokenizer(folder)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from /proc")
def test_memory_is_bounded(large, tmp_path):
    entries = read_folder(large)
    sizes = {}
    for entry in entries.values():
        sizes[entry.file] = sizes.get(entry.file, 0) + entry.nbytes
    bound = 1.5 * max(sizes.values()) + max(entry.nbytes for entry in entries.values())
    assert sum(sizes.values()) > 1.7 * bound, "else the bound says nothing"
    for way, source, target in (("convert", large, "native"), ("revert", tmp_path / "native", "back")):
        command = [sys.executable, "-c", MEASURE, way, str(source), str(tmp_path / target)]
        output = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout
        growth = int(output.split("GROWTH")[1])
        assert 0 < growth < bound, f"{way}: {growth / 1e6:.0f} MB, allowed are {bound / 1e6:.0f} MB"


@pytest.mark.slow
def test_an_interrupted_run_leaves_nothing(large, tmp_path):
    process = subprocess.Popen(
        [*COMMAND, str(large), str(tmp_path / "native")], cwd=REPOSITORY, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 300
    while not any(tmp_path.glob(".native.partial-*/*.safetensors")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=300) != 0 and "nothing is left behind" in process.stderr.read()
    assert os.listdir(tmp_path) == []
