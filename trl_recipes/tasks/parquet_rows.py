"""Rows of parquet files, as the Hub mirrors data sets: small columns in memory, images read when they are needed."""

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from PIL import Image

from .samples import open_rgb


class ParquetRows:
    """The rows of several files as one table.

    Args:
        files: in the order of their rows.
        heavy: column that stays on disk (the images); `heavy_cell` reads it.
    """

    def __init__(self, files: Sequence[Path], heavy: str = "image") -> None:
        self.files, self.heavy = tuple(files), heavy
        self.columns = list(pq.ParquetFile(self.files[0]).schema_arrow.names)
        light = [name for name in self.columns if name != heavy]
        self.rows: list[dict[str, Any]] = []
        self._groups: list[tuple[Path, int]] = []  # one for each row group of all files
        sizes: list[int] = []
        for path in self.files:
            file = pq.ParquetFile(path)
            self.rows += file.read(columns=light).to_pylist()
            groups = range(file.num_row_groups)
            self._groups += [(path, group) for group in groups]
            sizes += [file.metadata.row_group(group).num_rows for group in groups]
        self._starts = [0, *accumulate(sizes)]

    def require(self, *names: str) -> None:
        """Raises ValueError if a column is missing."""
        missing = [name for name in names if name not in self.columns]
        if missing:
            raise ValueError(f"{self.files[0]} has no column {missing[0]!r}; it has: {', '.join(self.columns)}")

    def heavy_cell(self, row: int) -> Any:
        group = bisect_right(self._starts, row) - 1
        return _read_group(*self._groups[group], self.heavy)[row - self._starts[group]]

    def image_bytes(self, row: int) -> bytes:
        """The encoded image of a row. Raises ValueError if the table has only its path."""
        cell = self.heavy_cell(row)
        if not isinstance(cell, dict) or not cell.get("bytes"):
            raise ValueError(f"row {row} of {self.files[0]} holds no image, only {cell!r:.100}")
        return cell["bytes"]

    def image(self, row: int) -> Image.Image:
        """The image of a row, RGB."""
        return open_rgb(self.image_bytes(row))


@lru_cache(maxsize=2)  # neighbouring rows share a group
def _read_group(path: Path, group: int, column: str) -> list[Any]:
    return pq.ParquetFile(path).read_row_group(group, columns=[column])[column].to_pylist()
