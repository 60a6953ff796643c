"""What holds for every metric: order, batches, processes and repeated samples change no bit; intervals are sound."""

import json
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from trl_recipes.metrics import (
    Accumulator,
    AverageHausdorff,
    BoundaryIoU,
    BoxAccuracy,
    MaskCalibration,
    Pope,
    SegmentationMetrics,
    SemanticIoU,
    bootstrap,
)

MASK = arrays(bool, (3, 5))
LABELS = arrays(np.uint8, (2, 3), elements=st.sampled_from([0, 1, 2, 255]))
BOX = st.tuples(st.floats(0, 4), st.floats(0, 4), st.floats(5, 9), st.floats(5, 9))
SHARE = st.floats(0, 1)
KINDS: dict[str, tuple[Callable[[], Accumulator], st.SearchStrategy]] = {
    "segmentation": (lambda: SegmentationMetrics((0.3, 0.7)), st.tuples(st.none() | MASK, MASK)),
    "boundary": (lambda: BoundaryIoU(0.2), st.tuples(st.none() | MASK, MASK)),
    "hausdorff": (lambda: AverageHausdorff((0.2, 0.6), side=7), st.tuples(st.none() | MASK, MASK)),
    "semantic": (lambda: SemanticIoU(3), st.tuples(LABELS, LABELS)),
    "box": (BoxAccuracy, st.tuples(st.none() | BOX, BOX)),
    "pope": (Pope, st.tuples(st.sampled_from(["yes", "no", "?"]), st.booleans())),
    "calibration": (lambda: MaskCalibration(4), st.tuples(SHARE, SHARE)),
}
every_metric = pytest.mark.parametrize("name", KINDS)


def filled(name: str, pairs: list, ids=None) -> Accumulator:
    metrics = KINDS[name][0]()
    for index, pair in enumerate(pairs):
        metrics.add(*pair, sample_id=None if ids is None else ids[index])
    return metrics


@every_metric
@settings(max_examples=40)
@given(data=st.data())
def test_order_processes_and_padding_change_no_bit(name: str, data: st.DataObject):
    """Samples in any order, dealt to any number of processes, some of them twice, sent as JSON and merged."""
    pairs = data.draw(st.lists(KINDS[name][1], min_size=1, max_size=9))
    whole = filled(name, pairs, range(len(pairs)))
    order = data.draw(st.permutations(range(len(pairs))))
    processes = data.draw(st.integers(1, 4))
    padded = order + order[: -len(order) % processes]
    merged = KINDS[name][0]()
    for rank in data.draw(st.permutations(range(processes))):
        mine = padded[rank::processes]
        shard = filled(name, [pairs[i] for i in mine], mine)
        merged.merge(json.loads(json.dumps(shard.state())))
    assert len(merged) == len(pairs)
    assert merged.compute() == whole.compute() == filled(name, pairs).compute()
    assert sorted(merged.sample_ids) == sorted(map(str, range(len(pairs))))


@every_metric
@settings(max_examples=40)
@given(data=st.data())
def test_values_lie_where_they_may(name: str, data: st.DataObject):
    pairs = data.draw(st.lists(KINDS[name][1], min_size=1, max_size=6))
    for key, value in filled(name, pairs).compute().items():
        assert value >= 0 and np.isfinite(value)
        counts = key.startswith(("count", "classes", "undefined", "invalid", "unparsed"))
        assert float(value).is_integer() if counts else type(value) is float
        assert value <= len(pairs) or key == "classes" if counts else value <= 1 or key.startswith("mahd")


@every_metric
@given(data=st.data())
@settings(max_examples=20)
def test_add_returns_what_values_holds(name: str, data: st.DataObject):
    pairs = data.draw(st.lists(KINDS[name][1], min_size=1, max_size=4))
    metrics = KINDS[name][0]()
    returned = {f"s{i}": metrics.add(*pair, sample_id=f"s{i}") for i, pair in enumerate(pairs)}
    assert metrics.values() == returned
    assert KINDS[name][0]().merge(json.loads(json.dumps(metrics.state()))).values() == returned


@every_metric
def test_without_samples_there_is_no_number(name: str):
    with pytest.raises(ValueError, match="no sample was added"):
        KINDS[name][0]().compute()


def test_the_same_id_with_another_result_is_refused():
    metrics = Pope()
    metrics.add("yes", "yes", sample_id="a")
    metrics.add("yes", "yes", sample_id="a")
    assert len(metrics) == 1
    with pytest.raises(ValueError, match="sample 'a' was added before with another result"):
        metrics.add("no", "yes", sample_id="a")
    with pytest.raises(ValueError, match="sample 'a'"):
        other = Pope()
        other.add("yes", "no", sample_id="a")
        metrics.merge(other)


def test_numbers_as_ids_are_their_text():
    metrics = Pope()
    metrics.add("yes", "yes", sample_id=7)
    metrics.add("yes", "yes", sample_id="7")
    assert metrics.sample_ids == ["7"]


def test_only_equals_are_merged():
    with pytest.raises(ValueError, match="different metric.*BoundaryIoU into SegmentationMetrics"):
        SegmentationMetrics().merge(BoundaryIoU())
    with pytest.raises(ValueError, match="different settings"):
        SegmentationMetrics((0.5,)).merge(SegmentationMetrics((0.7,)).state())


def normal_calibration(count: int = 200) -> MaskCalibration:
    rng, metrics = np.random.default_rng(1), MaskCalibration()
    for index, (score, iou) in enumerate(rng.beta(4, 2, (count, 2))):
        metrics.add(score, iou, sample_id=index)
    return metrics


def test_intervals_are_those_of_scipy():
    metrics = SegmentationMetrics()
    rng = np.random.default_rng(2)
    for index in range(150):
        truth = rng.random((6, 6)) < 0.5
        metrics.add(truth ^ (rng.random((6, 6)) < rng.random()), truth, sample_id=index)
    low, high = bootstrap(metrics, repeats=2000)["giou"]
    ious = np.array(list(metrics.values().values()))
    theirs = stats.bootstrap((ious,), np.mean, n_resamples=2000, method="percentile", rng=3).confidence_interval
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=0.006)
    assert low < metrics.compute()["giou"] < high


def test_intervals_depend_on_the_seed_and_not_on_the_order():
    metrics = normal_calibration()
    backwards = MaskCalibration()
    state = metrics.state()
    backwards.merge(state | {"samples": dict(reversed(state["samples"].items()))})
    assert bootstrap(metrics, 50) == bootstrap(backwards, 50) != bootstrap(metrics, 50, seed=1)
    assert set(bootstrap(metrics, 50)) == set(metrics.compute())


def test_clusters_of_equal_samples_widen_the_interval():
    """Ten copies of each of 20 answers know no more than 20 answers do."""
    metrics, alone = Pope(), Pope()
    for index in range(200):
        metrics.add("yes", "yes" if index % 20 < 12 else "no", sample_id=index)
    for index in range(20):
        alone.add("yes", "yes" if index < 12 else "no", sample_id=index)
    widths = [
        np.subtract(*reversed(bootstrap(one, 500, clusters=clusters)["accuracy"]))
        for one, clusters in [(metrics, None), (metrics, {str(i): i % 20 for i in range(200)}), (alone, None)]
    ]
    assert widths[1] > 2 * widths[0]
    assert widths[1] == pytest.approx(widths[2], abs=0.06)


def test_faulty_arguments_of_the_bootstrap():
    metrics = normal_calibration(5)
    with pytest.raises(ValueError, match="without a cluster: \\['0', '1', '2'\\]"):
        bootstrap(metrics, clusters={})
    with pytest.raises(ValueError, match="repeats must be at least 1"):
        bootstrap(metrics, repeats=0)
    with pytest.raises(ValueError, match="no sample"):
        bootstrap(MaskCalibration())
