"""Predictions on disk: what was appended is there after a kill, half lines are not."""

import json

import pytest

from trl_recipes.evaluation.store import PredictionStore


def prediction(name: str, **fields) -> dict:
    return {"id": name, "text": f"says \u201c{name}\u201d", "mask": None, "score": None, **fields}


def stored(folder, rank, *names, tail=b""):
    store = PredictionStore(folder).read()
    store.open_for(rank)
    store.append([prediction(name) for name in names])
    store.close()
    with (folder / f"predictions-{rank:05d}.jsonl").open("ab") as file:
        file.write(tail)


def test_all_files_together_hold_the_predictions(tmp_path):
    stored(tmp_path, 0, "a", "c")
    stored(tmp_path, 1, "b")
    store = PredictionStore(tmp_path).read()
    assert len(store) == 3 and "a" in store and "d" not in store
    assert [store[name] for name in "bca"] == [prediction(name) for name in "bca"]


def test_what_is_appended_is_on_disk_at_once(tmp_path):
    store = PredictionStore(tmp_path).read()
    store.open_for(0)
    store.append([prediction("a")])
    assert PredictionStore(tmp_path).read()["a"] == prediction("a")  # while the writer is still open


@pytest.mark.parametrize("cut", range(1, len(json.dumps(prediction("zz")))))
def test_a_half_line_is_left_out_and_cut_off_before_more_is_written(tmp_path, cut):
    half = json.dumps(prediction("zz")).encode()[:cut]
    stored(tmp_path, 0, "a", tail=half)
    assert [name in PredictionStore(tmp_path).read() for name in ("a", "zz")] == [True, False]
    stored(tmp_path, 0, "zz", "b")
    store = PredictionStore(tmp_path).read()
    assert len(store) == 3 and store["zz"] == prediction("zz") and store["b"] == prediction("b")


def test_a_whole_line_without_its_line_break_is_half(tmp_path):
    stored(tmp_path, 0, tail=json.dumps(prediction("a")).encode())
    assert "a" not in PredictionStore(tmp_path).read()


def test_half_lines_longer_than_a_block_are_cut_off(tmp_path):
    stored(tmp_path, 0, "a", tail=b'{"id": "' + b"x" * 200_000)
    stored(tmp_path, 0, "b")
    assert len(PredictionStore(tmp_path).read()) == 2


def test_a_half_line_of_another_process_stays_and_is_left_out(tmp_path):
    stored(tmp_path, 0, "a", tail=b'{"id": "b", ')
    stored(tmp_path, 1, "b")
    assert len(PredictionStore(tmp_path).read()) == 2
    assert (tmp_path / "predictions-00000.jsonl").read_bytes().endswith(b'{"id": "b", ')


def test_of_two_predictions_for_a_sample_the_first_counts(tmp_path):
    for rank, text in ((1, "second"), (0, "first")):
        store = PredictionStore(tmp_path)
        store.open_for(rank)
        store.append([prediction("a", text=text)])
    store = PredictionStore(tmp_path).read()
    assert store["a"]["text"] == "first" and store.duplicates == 1 and len(store) == 1


@pytest.mark.parametrize("line", [b"{broken}\n", b"[]\n", b'{"text": "no id"}\n', b'{"id": 3}\n'])
def test_a_broken_line_in_the_middle_is_told(tmp_path, line):
    stored(tmp_path, 0, "a", tail=line)
    with pytest.raises(ValueError, match="predictions-00000.jsonl:2 is no prediction; .* --overwrite"):
        PredictionStore(tmp_path).read()


def test_appending_needs_a_file(tmp_path):
    with pytest.raises(ValueError, match="open_for"):
        PredictionStore(tmp_path).append([])
