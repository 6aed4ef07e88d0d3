"""Where `Keyed` keeps the states of keys that it does not hold ready."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np


class Spill:
    """Rows that are not held ready: the most recent `memory` of them in host memory, older ones in a file.

    Rows are numbered; those from `memory` on are on disk.
    """

    def __init__(self, words: int, memory: int, folder: str | Path | None):
        self.words, self.memory, self._folder = words, memory, folder
        self._held = np.empty((0, words), np.uint32)
        self._disk: np.ndarray = np.empty((0, words), np.uint32)
        self._file: Any = None
        self._owner = np.empty(0, np.int64)  # over rows in memory; -1 where free
        self._stamp = np.empty(0, np.int64)
        self._taken = np.empty(0, bool)  # over rows on disk
        self._clock = 0

    def put(self, rows: np.ndarray, owners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Keep these rows. Returns every key that moved, and the row where it is now."""
        live = np.flatnonzero(self._owner >= 0)
        extra = len(live) + len(rows) - self.memory
        moved, places = [], []
        if extra > 0 and len(live):  # what has been here longest goes to disk
            leave = oldest(live, self._stamp[live], max(extra, len(live) // 16))
            moved.append(self._owner[leave])
            places.append(self._to_disk(self.take(leave)))
            extra -= len(leave)
        stay = len(rows) - max(0, extra)
        moved.append(owners)
        places += [self._to_memory(rows[:stay], owners[:stay]), self._to_disk(rows[stay:])]
        return np.concatenate(moved), np.concatenate(places)

    def take(self, ids: np.ndarray) -> np.ndarray:
        """Give these rows back and forget them."""
        rows = self.read(ids)
        self._owner[ids[ids < self.memory]] = -1
        self._taken[ids[ids >= self.memory] - self.memory] = False
        return rows

    def read(self, ids: np.ndarray) -> np.ndarray:
        """Copies of these rows."""
        rows = np.empty((len(ids), self.words), np.uint32)
        disk = ids >= self.memory
        rows[~disk] = self._held[ids[~disk]]
        rows[disk] = self._disk[ids[disk] - self.memory]
        return rows

    def _to_memory(self, rows: np.ndarray, owners: np.ndarray) -> np.ndarray:
        free = np.flatnonzero(self._owner < 0)[: len(rows)]
        if len(free) < len(rows):
            size = min(self.memory, max(1024, 2 * (len(self._owner) + len(rows))))
            self._held = grow(self._held, size, 0)
            self._owner, self._stamp = grow(self._owner, size, -1), grow(self._stamp, size, 0)
            free = np.flatnonzero(self._owner < 0)[: len(rows)]
        self._held[free], self._owner[free] = rows, owners
        self._clock += 1
        self._stamp[free] = self._clock
        return free

    def _to_disk(self, rows: np.ndarray) -> np.ndarray:
        free = np.flatnonzero(~self._taken)[: len(rows)]
        if len(free) < len(rows):
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="anabranch-spill-", dir=self._folder)
            size = max(1024, 2 * (len(self._taken) + len(rows)))
            self._taken = grow(self._taken, size, False)
            self._file.truncate(size * self.words * 4)
            self._disk = np.memmap(self._file, np.uint32, "r+", shape=(size, self.words))
            free = np.flatnonzero(~self._taken)[: len(rows)]
        self._disk[free], self._taken[free] = rows, True
        return free + self.memory


def oldest(ids: np.ndarray, stamps: np.ndarray, count: int) -> np.ndarray:
    """The `count` ids with the smallest stamps."""
    count = min(len(ids), count)
    return ids[np.argpartition(stamps, count - 1)[:count]]


def grow(array: np.ndarray, size: int, fill: Any) -> np.ndarray:
    """The array made longer."""
    out = np.full((size, *array.shape[1:]), fill, array.dtype)
    out[: len(array)] = array
    return out
