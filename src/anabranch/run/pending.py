"""Predictions that wait for their label: what was asked, and all that learning from the answer will need."""

from collections.abc import Hashable
from typing import Any

import numpy as np
import pyarrow as pa


class Pending:
    """A bounded table of open predictions. Columns are arrays over slots; they grow as slots are used."""

    def __init__(self, most: int):
        self.most = most
        self.live = np.zeros(0, bool)
        self.columns: dict[str, np.ndarray] = {
            "row": np.zeros(0, np.int64), "time": np.zeros(0), "due": np.zeros(0), "label": np.zeros(0)
        }  # fmt: skip
        self.by_id: dict[Hashable, int] = {}

    def __len__(self) -> int:
        return int(self.live.sum())

    def __getitem__(self, name: str) -> np.ndarray:
        return self.columns[name]

    def open(self, count: int) -> np.ndarray:
        """Slots for `count` new predictions."""
        free = np.flatnonzero(~self.live)[:count]
        if len(free) < count:
            size = max(1024, 2 * (len(self.live) + count))
            self.live = _longer(self.live, size)
            self.columns = {name: _longer(column, size) for name, column in self.columns.items()}
            free = np.flatnonzero(~self.live)[:count]
        self.live[free] = True
        return free

    def put(self, name: str, slots: np.ndarray, values: np.ndarray) -> None:
        """Set a column at these slots; the column is made when it is first set."""
        if name not in self.columns:
            self.columns[name] = np.zeros((len(self.live), *values.shape[1:]), values.dtype)
        self.columns[name][slots] = values

    def close(self, slots: np.ndarray) -> None:
        """These predictions no longer wait."""
        self.live[slots] = False
        if self.by_id:
            for key in self.columns["id"][slots].tolist():
                self.by_id.pop(key, None)

    def oldest(self, count: int) -> np.ndarray:
        """Slots of the `count` predictions that have waited longest."""
        open_ = np.flatnonzero(self.live)
        return open_[np.argsort(self["row"][open_], kind="stable")[:count]]

    def save(self) -> tuple[dict[str, np.ndarray], pa.Table]:
        """The open predictions: numbers as arrays, all else as a table."""
        open_ = self.oldest(len(self))
        numbers = {n: c[open_] for n, c in self.columns.items() if c.dtype != object}
        other: dict[str, Any] = {n: pa.array(c[open_]) for n, c in self.columns.items() if c.dtype == object}
        other["#slot"] = pa.array(np.arange(len(open_)))
        return numbers, pa.table(other)

    def load(self, numbers: dict[str, np.ndarray], other: pa.Table) -> None:
        """From what `save` gave."""
        slots = self.open(other.num_rows)
        for name, values in numbers.items():
            self.put(name, slots, values)
        for name in other.column_names:
            if name != "#slot":
                values = np.empty(other.num_rows, object)
                values[:] = other[name].to_pylist()
                self.put(name, slots, values)
        if "id" in self.columns:
            self.by_id = dict(zip(self.columns["id"][slots].tolist(), slots.tolist()))


def _longer(column: np.ndarray, size: int) -> np.ndarray:
    out = np.zeros((size, *column.shape[1:]), column.dtype)
    out[: len(column)] = column
    return out
