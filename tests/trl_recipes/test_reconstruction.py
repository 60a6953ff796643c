"""What the visual tokens of a task's masks keep."""

import numpy as np
import pytest
import tiny_tasks
from transformers import AutoProcessor

from trl_recipes import reconstruction
from trl_recipes.reconstruction import by_size, reconstruct, target_masks
from trl_recipes.tasks import load_task, open_source, read_samples


@pytest.fixture(scope="module")
def samples(bank_folder):
    options = {"preset": "easy", "seed": 5, "expressions": 24}
    return read_samples(open_source(load_task("scenes"), bank_folder, "unseen", options=options))


def test_every_mask_counts_once(samples):
    masks = target_masks(samples, None)
    wanted = {np.asarray(sample.load_mask()).tobytes() for sample in samples}
    assert {mask.tobytes() for mask in masks} == {one for one in wanted if any(one)} and len(masks) > 5
    assert [mask.tobytes() for mask in target_masks(samples, 3)] == [mask.tobytes() for mask in masks[:3]]


def test_iou_is_that_of_what_the_tokens_decode_to(samples, learned_folder):
    processor, masks = AutoProcessor.from_pretrained(learned_folder), target_masks(samples, 3)
    ids = processor.encode_masks(masks, search_steps=0)
    _, drawn = processor.decode_masks(ids, [mask.shape for mask in masks])
    expected = [(a & b).sum() / (a | b).sum() for a, b in zip(masks, drawn, strict=True)]
    assert reconstruct(processor, masks, 0) == pytest.approx(expected) and min(expected) > 0.1


def test_columns_by_size():
    masks = [np.zeros((100, 100), bool) for _ in range(3)]
    masks[0][:5, :5], masks[1][:20, :10], masks[2][:10, :15] = True, True, True
    assert by_size(masks, [0.5, 0.8, 0.6]) == pytest.approx([0.5, 0.7, float("nan"), float("nan")], nan_ok=True)


def test_the_command_prints_a_line_for_each_number_of_steps(learned_folder, tmp_path, capsys):
    photographs = tiny_tasks.write_photographs(tmp_path)
    words = ["--model", learned_folder, "--task", "real", "--data", photographs, "--search-steps", 0, 2]
    reconstruction.main([str(word) for word in words])
    title, head, *lines = capsys.readouterr().out.splitlines()
    assert title.startswith("1 masks of real") and head.split()[:3] == ["search", "steps", "all"]
    assert [int(line.split()[0]) for line in lines] == [0, 2]
    assert all(0 < float(line.split()[1]) <= 1 for line in lines)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--option", "preset"], "NAME=VALUE"),
        (["--split", "none"], "split"),
        (["--search-steps", "4", "-1"], "0 or more"),
        (["--limit", "0"], "1 or more"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(learned_folder, bank_folder, words, message):
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        reconstruction.main(["--model", str(learned_folder), "--task", "scenes", "--data", str(bank_folder), *words])
