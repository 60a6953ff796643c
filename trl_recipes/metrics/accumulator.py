"""What all metrics share: records of samples by id, that are merged between processes and resampled for intervals."""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

import numpy as np

Record = tuple[Any, ...]  # of what JSON keeps exactly: int, float, bool, str


class Accumulator(ABC):
    """Records of samples and what is computed of them.

    A subclass says in `columns` what a record holds, has an `add` that ends with `self._store(...)`, and `_measure`.
    `settings` are its arguments: only accumulators with equal ones can be merged.
    """

    columns: tuple[str, ...]

    def __init__(self, **settings: Any) -> None:
        self.settings = settings
        self._named: dict[str, Record] = {}
        self._unnamed: list[Record] = []

    @abstractmethod
    def _measure(self, table: dict[str, np.ndarray]) -> dict[str, float]:
        """The numbers of a table that holds one array (N,) for every name in `columns`, N >= 1."""

    @abstractmethod
    def _value(self, record: Record) -> float | None:
        """What `add` returns for one sample."""

    def compute(self) -> dict[str, float]:
        """The numbers over all samples so far. ValueError if there are none."""
        return self._measure(self._table(self._records()))

    def values(self) -> dict[str, float | None]:
        """What `add` returned, by sample id."""
        return {name: self._value(record) for name, record in self._named.items()}

    @property
    def sample_ids(self) -> list[str]:
        """Ids in the order in which they came; samples without one are not in it."""
        return list(self._named)

    def __len__(self) -> int:
        return len(self._named) + len(self._unnamed)

    def state(self) -> dict[str, Any]:
        """All that is known, as `json.dumps` takes it; see `merge`."""
        return {
            "metric": type(self).__name__,
            "settings": self.settings,
            "samples": {name: list(record) for name, record in self._named.items()},
            "unnamed": [list(record) for record in self._unnamed],
        }

    def merge(self, other: "Accumulator | Mapping[str, Any]") -> Self:
        """Adds the samples of another accumulator or of its `state()`, read from JSON or not; returns self.

        Raises:
            ValueError: another metric, other settings, or a sample that both have with different results.
        """
        state = other.state() if isinstance(other, Accumulator) else other
        for key, mine in (("metric", type(self).__name__), ("settings", self.settings)):
            if _as_json(state[key]) != _as_json(mine):
                raise ValueError(f"cannot merge metrics of different {key}: {state[key]} into {mine}")
        for name, record in state["samples"].items():
            self._store(tuple(record), name)
        for record in state["unnamed"]:
            self._store(tuple(record), None)
        return self

    def _store(self, record: Record, sample_id: str | int | None) -> float | None:
        if sample_id is None:
            self._unnamed.append(record)
        elif self._named.setdefault(str(sample_id), record) != record:
            raise ValueError(
                f"the sample {sample_id!r} was added before with another result; give every sample its own id"
            )
        return self._value(record)

    def _records(self) -> list[Record]:
        """All records, in an order that does not depend on who added them when."""
        return [self._named[name] for name in sorted(self._named)] + sorted(self._unnamed, key=repr)

    def _table(self, records: Sequence[Record]) -> dict[str, np.ndarray]:
        if not records:
            raise ValueError("no sample was added")
        return {name: _column(values) for name, values in zip(self.columns, zip(*records, strict=True), strict=True)}


def _column(values: tuple) -> np.ndarray:
    if isinstance(values[0], (list, tuple, str)):
        column = np.empty(len(values), object)
        column[:] = values
        return column
    return np.asarray(values)


def _as_json(value: Any) -> Any:
    """A value as it comes back from JSON: tuples are lists, keys are strings."""
    return json.loads(json.dumps(value))


def exact_mean(values: Iterable[float] | np.ndarray) -> float:
    """The mean, its sum rounded once: whatever the order, the same bits."""
    found = values.tolist() if isinstance(values, np.ndarray) else list(values)
    return math.fsum(found) / len(found)


def by_kind(
    table: dict[str, np.ndarray], measure: Callable[[dict[str, np.ndarray]], dict[str, float]]
) -> dict[str, float]:
    """`measure` of the rows of every kind apart, as `<name>_<kind>`; rows without a kind are in none."""
    kinds = table["kind"]
    found: dict[str, float] = {}
    for kind in sorted(set(kinds.tolist()) - {""}):
        rows = kinds == kind
        part = measure({name: column[rows] for name, column in table.items()})
        found |= {f"{name}_{kind}": value for name, value in part.items()}
    return found


def bootstrap(
    metrics: Accumulator,
    repeats: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    clusters: Mapping[str, Any] | None = None,
) -> dict[str, tuple[float, float]]:
    """Percentile bootstrap intervals of every number of `metrics.compute()`.

    Samples are drawn with replacement `repeats` times; the same seed gives the same intervals for any order of adding
    and any number of processes.

    Args:
        clusters: sample id -> what is drawn as a whole. Expressions of one image are not independent: with the image
            as the cluster, intervals are as wide as they ought to be. Every id needs an entry.
        level: share of the repeats inside an interval.

    Returns:
        name -> (low, high). A number that is undefined in some of the repeats is judged by the others.
    """
    if repeats < 1 or not 0 < level < 1:
        raise ValueError(f"repeats must be at least 1 and level between 0 and 1, not {repeats} and {level}")
    table = metrics._table(metrics._records())
    groups = _groups(metrics, clusters)
    rng = np.random.default_rng(seed)
    drawn: dict[str, list[float]] = {name: [] for name in metrics.compute()}
    for _ in range(repeats):
        picked = rng.integers(len(groups), size=len(groups))
        rows = np.concatenate([groups[i] for i in picked]) if clusters is not None else picked
        for name, value in metrics._measure({key: column[rows] for key, column in table.items()}).items():
            drawn[name].append(value)
    tail = (1 - level) / 2
    return {
        name: tuple(float(edge) for edge in np.quantile(values, (tail, 1 - tail)))  # type: ignore[misc]
        for name, values in drawn.items()
        if values
    }


def _groups(metrics: Accumulator, clusters: Mapping[str, Any] | None) -> Sequence[Any]:
    """Row numbers of the table that are drawn together."""
    if clusters is None:
        return range(len(metrics))
    names = sorted(metrics.sample_ids)
    missing = [name for name in names if name not in clusters]
    if missing or len(names) != len(metrics):
        raise ValueError(f"clusters need every sample by id; without a cluster: {missing[:3]} or samples without ids")
    members: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        members.setdefault(str(clusters[name]), []).append(row)
    return [np.array(members[key]) for key in sorted(members)]
