"""Scores from stored predictions, worked out by hand for every kind of answer."""

import json

import numpy as np
import pytest
import tiny_tasks
from PIL import Image

from trl_recipes.evaluation.gallery import EXTRA, RIGHT, with_boxes, write_gallery
from trl_recipes.evaluation.predictions import batches, predict
from trl_recipes.evaluation.scoring import Scores, overlay_classes, score
from trl_recipes.evaluation.store import PredictionStore
from trl_recipes.metrics import to_rle
from trl_recipes.metrics.masks import count_overlap
from trl_recipes.tasks import load_task, open_source, read_samples


def prediction(mask=None, text="", score=None, name="x"):
    return {"id": name, "text": text, "mask": None if mask is None else to_rle(mask), "score": score}


def scored(task_name, root, answers, tmp_path, extra=(), **options):
    """Scores of answers, in the order of sample ids, by way of a store."""
    task = load_task(task_name)
    samples = read_samples(open_source(task, root, **options))
    names = task.options.get("names", ())
    store = PredictionStore(tmp_path)
    store.open_for(0)
    answers = [one | {"id": name} for one, name in zip(answers, samples.ids, strict=True)]
    store.append(answers[::-1])  # written in another order
    store.read()
    return score(task, samples, store, extra, names, progress=False), samples, store


@pytest.fixture
def photographs(tmp_path):
    return tiny_tasks.write_photographs(tmp_path / "data")


def part(share: float) -> np.ndarray:
    """The upper part of the true mask, 15 x 15 pixels of (40, 60)."""
    mask = np.zeros((40, 60), bool)
    mask[5 : 5 + round(15 * share), 10:25] = True
    return mask


def test_masks(photographs, tmp_path):
    answers = [
        prediction(part(1), score=0.9),
        prediction(part(0.6), score=0.4),
        prediction(None, "I see none."),
        prediction(None, "There is no whale."),
    ]
    scores, *_ = scored("real", photographs, answers, tmp_path, ["calibration", "boundary_iou", "ahd"])
    result = scores.result(50, 0)
    found = result["metrics"]["segmentation"]
    assert found["giou"] == (1 + 0.6 + 0 + 1) / 4 and found["ciou"] == (225 + 135) / (3 * 225)
    assert found["n_acc"] == 1 and found["t_acc"] == 2 / 3 and found["pr@0.5"] == 2 / 3 and found["pr@0.7"] == 1 / 3
    assert result["kinds"]["noun"]["giou"] == 0.8 and result["kinds"]["noun"]["count"] == 2
    assert result["kinds"]["none"] == {"giou": 1.0, "ciou": 1.0, "count": 1, "n_acc": 1.0}
    assert result["answers"] == {
        "total": 4, "not_drawn": 2, "invalid": 0, "invalid_means": "neither a mask nor words",
    }  # fmt: skip
    assert result["metrics"]["calibration"]["count"] == 2  # of the masks that were drawn
    assert 0.25 <= result["metrics"]["best_constant"]["giou"] < 1
    assert {"boundary_iou", "ahd"} < result["metrics"].keys()
    low, high = result["confidence"]["intervals"]["segmentation"]["giou"]
    assert low <= 0.65 <= high and low < high
    assert scores.values == [("0000-00", 1.0), ("0000-01", 0.6), ("0001-00", 0.0), ("0002-00", 1.0)]
    json.dumps(result)


def test_an_answer_of_nothing_at_all_is_invalid(photographs, tmp_path):
    answers = [prediction(part(1)), prediction(None, "no"), prediction(None, " "), prediction(None, "")]
    scores, *_ = scored("real", photographs, answers, tmp_path)
    assert scores.counts == {"total": 4, "not_drawn": 3, "invalid": 2}


def test_counts_are_numbers_even_of_one_answer(photographs, tmp_path):
    (tmp_path / "data" / "real.json").write_text(
        json.dumps({"items": [{"image": "images/red.jpg", "mask": "masks/a.png", "expressions": ["it"], "kind": "x"}]})
    )
    scores, *_ = scored("real", photographs, [prediction(None, " ")], tmp_path)
    counts = scores.result(0, 0)["answers"]
    assert json.dumps([counts["not_drawn"], counts["invalid"]]) == "[1, 1]"


def test_where_something_is_always_there_an_answer_without_a_mask_is_invalid(tmp_path):
    root = tiny_tasks.write_refer(tmp_path / "data")
    square, empty = tiny_tasks.square(), np.zeros((30, 40), bool)
    answers = [prediction(square), *[prediction(None, "no")] * 2, *[prediction(empty)] * 2]
    scores, *_ = scored("refcoco", root, answers, tmp_path)
    result = scores.result(0, 0)
    assert result["answers"]["invalid"] == 2 and "always" in result["answers"]["invalid_means"]
    assert result["metrics"]["segmentation"]["giou"] == 0.2  # counted, not skipped
    assert result["confidence"]["intervals"] == {}


def test_intervals_draw_images_not_expressions(tmp_path):
    """All expressions of one image: drawing images gives no width, whatever the answers are."""
    root = tiny_tasks.write_refer(tmp_path / "data")
    answers = [prediction(tiny_tasks.square()), *[prediction(None)] * 4]
    scores, *_ = scored("refcoco", root, answers, tmp_path)
    result = scores.result(50, 0)
    assert result["confidence"]["intervals"]["segmentation"]["giou"] == (0.2, 0.2)
    assert result["confidence"]["resampled"] == "images"


def test_no_target_of_grefcoco(tmp_path):
    """Right: IoU 1 and nothing to cIoU. Wrong: IoU 0, its area in the union."""
    root = tiny_tasks.write_grefcoco(tmp_path / "data")
    whole = tiny_tasks.square() | tiny_tasks.two_parts()
    targeted = [prediction(whole), prediction(None), prediction(tiny_tasks.rows())]
    for place, (last, giou, n_acc, extra) in enumerate([(None, 3 / 4, 1, 0), (tiny_tasks.square(), 2 / 4, 0, 100)]):
        (tmp_path / str(place)).mkdir()
        scores, *_ = scored("grefcoco", root, [*targeted, prediction(last, "none")], tmp_path / str(place))
        found = scores.result(0, 0)["metrics"]["segmentation"]
        assert (found["giou"], found["n_acc"], found["t_acc"]) == (giou, n_acc, 2 / 3)
        assert found["ciou"] == (132 + 120) / (132 + 132 + 120 + extra)
        assert found["pr@0.7"] == found["pr@0.8"] == found["pr@0.9"] == 2 / 3  # ReLA's, of samples with a target


def test_reasonseg_ignores_what_is_marked_so(tmp_path):
    root = tiny_tasks.write_reasonseg(tmp_path / "data")
    samples = read_samples(open_source(load_task("reasonseg"), root))
    everything = [sample.load_mask() | sample.load_ignore() for sample in samples]
    scores, *_ = scored("reasonseg", root, [prediction(one) for one in everything], tmp_path, ["boundary_iou"])
    found = scores.result(0, 0)
    assert found["metrics"]["segmentation"]["giou"] == 1 and found["metrics"]["boundary_iou"]["boundary_iou"] == 1
    assert set(found["kinds"]) == {"long", "short"}


def test_boxes_are_those_round_the_masks(tmp_path):
    root = tiny_tasks.write_refer(tmp_path / "data")
    left, half = tiny_tasks.square(), tiny_tasks.square()
    half[:, 10:] = False  # the box has half of the area: IoU 0.5 is enough
    empty = np.zeros((30, 40), bool)
    answers = [
        prediction(left),
        prediction(half),
        prediction(tiny_tasks.two_parts()),
        prediction(None),
        prediction(empty),
    ]
    scores, *_ = scored("rec_refcoco", root, answers, tmp_path)
    result = scores.result(20, 0)
    assert result["metrics"]["box"]["acc@0.5"] == 3 / 5 and result["metrics"]["box"]["invalid"] == 2
    assert result["kinds"]["small"]["acc@0.5"] == 1
    assert result["answers"]["not_drawn"] == 1


def test_questions_answered_in_words(bank_folder, tmp_path):
    """All right, then with faults: a mask where words were asked for, no box, no words."""
    options = {"preset": "easy", "questions": 60, "seed": 1}
    samples = read_samples(open_source(load_task("scenes-vqa"), bank_folder, options=options))
    right = [prediction(text=sample.answer) for sample in samples]
    (tmp_path / "right").mkdir()
    scores, *_ = scored("scenes-vqa", bank_folder, right, tmp_path / "right", options=options)
    result = scores.result(20, 0)
    assert result["metrics"]["vqa"]["accuracy"] == result["metrics"]["vqa"]["mean_iou"] == 1
    assert set(result["kinds"]) == {"what", "list", "where", "box", "yes_no", "count"}
    assert result["kinds"]["list"]["f1"] == 1 and "mean_iou" not in result["kinds"]["list"]
    assert result["answers"]["invalid"] == 0

    answers, boxes = list(right), [i for i, sample in enumerate(samples) if sample.kind == "box"]
    answers[boxes[0]] = prediction(text="On the left.")
    answers[boxes[1]] = prediction(np.ones((256, 256), bool), text=str(samples[boxes[1]].answer))
    what = next(i for i, sample in enumerate(samples) if sample.kind == "what")
    answers[what] = prediction(text=" ")
    (tmp_path / "faults").mkdir()
    scores, samples, store = scored("scenes-vqa", bank_folder, answers, tmp_path / "faults", options=options)
    result = scores.result(20, 0)
    assert result["metrics"]["vqa"]["accuracy"] == 57 / 60
    assert result["kinds"]["box"]["accuracy"] == result["kinds"]["box"]["mean_iou"] == 1 - 2 / len(boxes)
    assert result["answers"]["total"] == 60 and result["answers"]["invalid"] == 3
    assert "no box" in result["answers"]["invalid_means"]
    low, high = result["confidence"]["intervals"]["vqa"]["accuracy"]
    assert low <= 57 / 60 <= high and low < high
    write_gallery(tmp_path / "page.html", "title", [], scores, samples, store, 3)
    page = (tmp_path / "page.html").read_text()
    assert page.count("<figure>") == 6 and "expected: [" in page and "a mask was drawn" in page


def test_boxes_in_words_are_drawn_in_the_gallery():
    image = Image.new("RGB", (200, 100))
    pixels = np.asarray(with_boxes(image, "[10, 10, 50, 60]", "[60, 20, 90, 90]"))
    assert tuple(pixels[10, 50]) == RIGHT and tuple(pixels[30, 20]) == RIGHT  # the true box
    assert tuple(pixels[20, 150]) == EXTRA and not pixels[50, 60].any()
    assert np.asarray(with_boxes(image, "[10, 10, 50, 60]", "none"))[..., 0].max() == RIGHT[0]
    assert not np.asarray(with_boxes(image, "A cow.", "[1, 2, 3, 4]")).any()  # not asked for


def test_yes_and_no(tmp_path):
    root = tiny_tasks.write_pope(tmp_path / "data")
    said = ["Yes", "Yes, a car.", "yes", "No", "Perhaps", "There is no car."]
    scores, *_ = scored("pope", root, [prediction(text=text) for text in said], tmp_path)
    result = scores.result(20, 0)
    found = result["metrics"]["pope"]
    assert found["accuracy"] == 5 / 6 and found["precision"] == 3 / 4 and found["recall"] == 1
    assert result["kinds"]["adversarial"]["accuracy"] == 1 / 2 and result["kinds"]["popular"]["accuracy"] == 1
    assert result["answers"] == {"total": 6, "invalid": 1, "invalid_means": "neither yes nor no"}


def test_overlapping_classes_go_to_the_higher_score():
    left, right = np.zeros((2, 4), bool), np.zeros((2, 4), bool)
    left[:, :3], right[:, 1:3] = True, True
    low, high = prediction(left, score=0.5), prediction(right, score=0.6)
    nothing = prediction(None)
    assert overlay_classes([low, high], (2, 4)).tolist() == [[0, 1, 1, -1]] * 2
    assert overlay_classes([nothing, high, low], (2, 4)).tolist() == [[2, 1, 1, -1]] * 2
    assert overlay_classes([low, high | {"score": 0.5}], (2, 4)).tolist() == [[0, 0, 0, -1]] * 2  # equal: the first
    assert overlay_classes([low, high | {"score": None}], (2, 4)).tolist() == [[0, 0, 0, -1]] * 2
    below_zero = [low | {"score": -0.5}, high | {"score": None}]
    assert overlay_classes(below_zero, (2, 4)).tolist() == [[0, 0, 0, -1]] * 2
    with pytest.raises(ValueError, match=r"the mask is \(2, 4\), the label map \(2, 5\)"):
        overlay_classes([low], (2, 5))


def test_a_vocabulary_is_one_confusion_matrix(tmp_path):
    """Image 0: class 0 and 19 true, image 1: class 1 and 19. Masks: 0 half right, 1 wrong, 19 right in one image."""
    root = tiny_tasks.write_voc(tmp_path / "data")
    sky, square = np.zeros((30, 40), bool), tiny_tasks.square()
    sky[20:25, 5:15] = True
    half = square.copy()
    half[10:] = False
    answers = [prediction(None, "no") for _ in range(40)]
    answers[0], answers[19] = prediction(half, score=0.5), prediction(sky, score=0.5)
    answers[20 + 3] = prediction(square, score=0.5)  # class 3 where class 1 is
    scores, samples, store = scored("pascal_voc_20", root, answers, tmp_path)
    result = scores.result(20, 0)
    found = result["metrics"]["semantic"]
    assert found["iou_aeroplane"] == 0.5 and found["iou_bicycle"] == 0 and found["iou_tv monitor"] == 0.5
    assert found["miou"] == pytest.approx(1 / 3) and found["count"] == 2
    assert [value for _, value in scores.values] == [100 / 150, 0]
    assert result["answers"]["total"] == 40 and result["answers"]["not_drawn"] == 37
    write_gallery(tmp_path / "gallery.html", "t", [], scores, samples, store, 5)
    assert (tmp_path / "gallery.html").read_text().count("<figure>") == 2


def test_a_sample_without_a_prediction_is_told(photographs, tmp_path):
    task = load_task("real")
    samples = read_samples(open_source(task, photographs))
    with pytest.raises(ValueError, match="4 samples have no prediction, among them 0000-00"):
        score(task, samples, PredictionStore(tmp_path).read(), progress=False)


def test_a_mask_of_another_size_is_told_with_its_sample(photographs, tmp_path):
    answers = [prediction(np.ones((4, 4), bool)), *[prediction(None)] * 3]
    with pytest.raises(ValueError, match=r"sample 0000-00: .*\(4, 4\)"):
        scored("real", photographs, answers, tmp_path)


def test_metrics_that_a_task_cannot_have():
    with pytest.raises(ValueError, match="ahd: for tasks that are answered by masks; pope is not"):
        Scores.for_task(load_task("pope"), ["ahd"])


def test_the_gallery_shows_worst_and_best_and_escapes_what_was_said(photographs, tmp_path):
    answers = [
        prediction(part(1)),
        prediction(part(0.6), "<script>alert(1)</script>"),
        prediction(None),
        prediction(None, "no"),
    ]
    scores, samples, store = scored("real", photographs, answers, tmp_path)
    path = tmp_path / "gallery.html"
    write_gallery(path, "a <model>", ["x & y"], scores, samples, store, 2)
    page = path.read_text()
    worst, best = page.split("<h2>Best</h2>")
    assert "all of it" in worst and "0.600" in worst and page.count("<figure>") == 4
    assert "the red thing" in best and "the whale" in best
    assert "<script>" not in page and "a &lt;model&gt;" in page and "x &amp; y" in page
    assert page.count("data:image/jpeg;base64,") == 4 and 'src="http' not in page


@pytest.mark.parametrize(("count", "size"), [(7, 3), (6, 3), (1, 4), (5, 1)])
def test_batches_cover_everything_once(count, size):
    found = list(batches(count, size))
    assert [i for batch in found for i in batch] == list(range(count))
    assert all(len(batch) == size for batch in found[:-1])


class Recorder:
    """Answers everything with nothing, and keeps who was asked together."""

    def __init__(self):
        self.asked = []

    def __call__(self, samples):
        self.asked.append([sample.id for sample in samples])
        return [prediction(None, "no", name=sample.id) for sample in samples]


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_batches_are_the_same_for_any_number_of_processes(photographs, tmp_path, processes):
    samples = read_samples(open_source(load_task("real"), photographs))
    whole = Recorder()
    (tmp_path / "one").mkdir()
    for folder, count, recorder in (("one", 1, whole), ("many", processes, many := Recorder())):
        (tmp_path / folder).mkdir(exist_ok=True)
        for rank in range(count):
            store = PredictionStore(tmp_path / folder)
            store.open_for(rank)
            predict(recorder, samples, store, 3, rank, count, progress=False)
    assert sorted(whole.asked) == sorted(many.asked) == [samples.ids[:3], samples.ids[3:]]


def test_a_batch_that_was_stored_in_part_is_asked_in_the_same_company(photographs, tmp_path):
    samples = read_samples(open_source(load_task("real"), photographs))
    store = PredictionStore(tmp_path)
    store.open_for(1)
    store.append([prediction(None, "before", name=samples.ids[1])])
    again = Recorder()
    store = PredictionStore(tmp_path).read()
    store.open_for(0)
    assert predict(again, samples, store, 3, progress=False) == 3
    assert again.asked == [samples.ids[:3], samples.ids[3:]]
    store = PredictionStore(tmp_path).read()
    assert len(store) == 4 and store.duplicates == 0 and store[samples.ids[1]]["text"] == "before"


def test_runs_are_counted_as_pixels_are():
    """Stored predictions are COCO RLE: their overlap is counted without drawing them, to the same pixel."""
    rng = np.random.default_rng(0)
    for _ in range(1000):
        size = tuple(rng.integers(1, 24, size=2))
        one, other = (rng.random(size) < rng.choice([0, 0.1, 0.5, 0.9, 1]) for _ in range(2))
        assert count_overlap(to_rle(one), to_rle(other)) == count_overlap(one, other)
    assert count_overlap(to_rle(one), other) == count_overlap(None if not one.any() else one, other)
    with pytest.raises(ValueError, match="resize the prediction"):
        count_overlap(to_rle(np.ones((2, 3), bool)), to_rle(np.ones((3, 2), bool)))
