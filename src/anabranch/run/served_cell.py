"""A bare cell as a server serves it: one state for each stream, bytes in, bytes out."""

import json
import re
import time
from collections.abc import Hashable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, PyTree, UInt8

from anabranch.cell import Cell
from anabranch.run.alarms import Alarms
from anabranch.run.checkpoint import Checkpoints, pack_keys, unpack_keys
from anabranch.run.config import ConfigError, ServedCellConfig, resolve
from anabranch.run.keyed import Keyed, Rows
from anabranch.run.metrics import Spent

START, END = 1, 2
"""Flags of an event: the stream begins anew with it; its state is dropped after it."""


class Counted(Cell):
    """A cell that counts the events of its stream: `n` in the state, and in the answer beside the cell's own.

    It tells a client that comes back which of its events have counted.
    """

    cell: Cell

    def init(self, *, key=None) -> tuple[Int[jax.Array, ""], PyTree]:
        return jnp.int32(0), self.cell.init(key=key)

    def step(self, state, x):
        n, inner = state
        inner, y = self.cell.step(inner, x)
        return (n + 1, inner), (n + 1, y)


class CellBatch(NamedTuple):
    """Events of a bare cell."""

    keys: list[str]
    flags: UInt8[np.ndarray, " n"]
    data: UInt8[np.ndarray, "n width"]
    """Each event's arrays, one after the other, as little-endian bytes. Width 0: the streams only end."""


class CellEvent(NamedTuple):
    """One event of one stream."""

    key: str
    data: bytes
    flags: int = 0


class Tensor(NamedTuple):
    """One array of a cell's input or output."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


class ServedCell:
    """A bare cell, one state for each stream: bytes in, bytes out.

    An answer is (n, bytes): the number of this event in its stream, from 1 on, and the cell's output.
    """

    def __init__(self, config: ServedCellConfig, folder: Path | None = None):
        cell = resolve(config.cell, folder, "cell.cell")
        try:
            cell = cell if isinstance(cell, Cell) else cell(**config.options)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"cell.cell: {config.cell}(**{config.options!r}) failed: {error}") from error
        if not isinstance(cell, Cell) or cell.host:
            raise ConfigError(f"cell.cell: {config.cell} is not a cell that can be compiled and saved")
        example = _example(config.input, folder)
        self.inputs = _tensors(example, "x")
        self._tree = jax.tree.structure(example)
        try:
            self.keyed = Keyed(Counted(cell), config.capacity, seed=config.seed)
            _, y = self.keyed(["."], jax.tree.map(lambda leaf: np.zeros((1, *leaf.shape), leaf.dtype), example))
        except Exception as error:
            raise ConfigError(f"cell.input: {config.cell} cannot step on {config.input}: {error}") from error
        self.keyed.forget(["."])
        self.outputs = _tensors(jax.tree.map(lambda leaf: leaf[0], y), "y")
        self.width = sum(tensor.nbytes for tensor in self.inputs)
        self.out = (config.out or Path("out") / config.name) / "live"
        self._keep, self._idle = config.keep, config.idle
        self._seen: dict[str, float] = {}  # when each stream last had an event, oldest first
        self.spent, self.alarms = Spent(), Alarms()

    def open(self) -> int:
        self._checkpoints = Checkpoints(self.out / "checkpoints", self._keep)
        self.keyed.forget(list(self.keyed))
        batches = 0
        for arrays, meta in self._checkpoints.load() or []:
            if meta["state"] != self.keyed.layout:
                raise ConfigError(
                    f"{self.out}: the checkpoints there are of a cell with the state {meta['state']}, "
                    f"this one has {self.keyed.layout}"
                )
            saved: Any = arrays["keyed"]
            keys = unpack_keys(saved["keys"])
            self.keyed.restore(Rows(saved["named"], keys, saved["gone"], saved["numbers"], saved["rows"]))
            batches = meta["batches"]
        now = time.monotonic()
        self._seen = {str(key): now for key in self.keyed}
        return batches

    def seen(self, key: str) -> int:
        """How many events of a stream have counted."""
        return int(self.keyed.state(key)[0]) if key in self.keyed else 0

    def recent(self, prefix: str, most: int = 50) -> list[dict[str, Any]]:
        """The streams whose name begins so that had events last: name, events, and seconds ago."""
        now, found = time.monotonic(), []
        for key in reversed(self._seen):
            if len(found) == most:
                break
            if key.startswith(prefix):
                found.append({"stream": key[len(prefix) :], "n": self.seen(key), "ago": now - self._seen[key]})
        return found

    def prepare(self, events: list[CellEvent]) -> CellBatch:
        keys = [event.key for event in events]
        flags = np.array([event.flags for event in events], np.uint8)
        data = np.frombuffer(b"".join(event.data for event in events), np.uint8).reshape(len(events), self.width)
        return CellBatch(keys, flags, data)

    def idle(self) -> CellBatch | None:
        """The end of the streams that have been idle for too long."""
        if self._idle is None:
            return None
        since, keys = time.monotonic() - self._idle, []
        for key, when in self._seen.items():
            if when > since:
                break
            keys.append(key)
        return CellBatch(keys, np.full(len(keys), END, np.uint8), np.zeros((len(keys), 0), np.uint8)) if keys else None

    def step(self, batch: CellBatch) -> list[tuple[int, bytes]]:
        if batch.data.shape[1] == 0 and self.width:
            self.keyed.forget(batch.keys)
            for key in batch.keys:
                self._seen.pop(key, None)
            return []
        now = time.monotonic()
        for key, flag in zip(batch.keys, batch.flags.tolist()):
            self._seen.pop(key, None)
            if not flag & END:
                self._seen[key] = now
        answers: list[tuple[int, bytes]] = []
        for part in _uninterrupted(batch):
            keys, flags = batch.keys[part], batch.flags[part]
            self.keyed.forget([key for key, flag in zip(keys, flags.tolist()) if flag & START])
            begin = time.perf_counter()
            n, y = self.keyed(keys, self.read(batch.data[part]))
            self.spent.add(time.perf_counter() - begin, len(keys))
            self.alarms.look("cell", y, np.full(len(keys), time.time()), keys)
            self.keyed.forget([key for key, flag in zip(keys, flags.tolist()) if flag & END])
            answers += zip(n.tolist(), _to_bytes(y))
        return answers

    def read(self, data: UInt8[np.ndarray, "n width"]) -> PyTree:
        """The events that these bytes stand for."""
        leaves, start = [], 0
        for tensor in self.inputs:
            part = np.ascontiguousarray(data[:, start : start + tensor.nbytes])
            leaves.append(part.view(tensor.dtype).reshape(len(data), *tensor.shape))
            start += tensor.nbytes
        return jax.tree.unflatten(self._tree, leaves)

    def pack(self, batch: CellBatch) -> bytes:
        head = json.dumps([batch.keys, batch.data.shape[1]]).encode()
        return len(head).to_bytes(4, "little") + head + batch.flags.tobytes() + batch.data.tobytes()

    def unpack(self, data: bytes) -> CellBatch:
        end = 4 + int.from_bytes(data[:4], "little")
        keys, width = json.loads(data[4:end])
        rest = np.frombuffer(data, np.uint8, offset=end)
        return CellBatch(keys, rest[: len(keys)], rest[len(keys) :].reshape(len(keys), width))

    def save(self, batches: int) -> None:
        self._checkpoints.wait()  # the arrays that it still writes are about to be written to
        saved = self.keyed.everything() if self._checkpoints.wants_everything else self.keyed.changed()
        keys = partial(pack_keys, saved.keys)
        arrays = {"named": saved.named, "keys": keys, "gone": saved.gone, "numbers": saved.numbers, "rows": saved.rows}
        self._checkpoints.save({"keyed": arrays}, {"batches": batches, "state": self.keyed.layout})

    def wait(self) -> None:
        self._checkpoints.wait()

    def close(self) -> None:
        self._checkpoints.close()

    def abandon(self) -> None:
        self._checkpoints.abandon()


def _uninterrupted(batch: CellBatch) -> Iterable[slice]:
    """Parts of a batch in which a stream begins only with its first event, and ends only with its last."""
    if not batch.flags.any():
        return [slice(0, len(batch.keys))]
    parts, start = [], 0
    here: set[Hashable] = set()
    ended: set[Hashable] = set()
    for i, (key, flag) in enumerate(zip(batch.keys, batch.flags.tolist())):
        if key in ended or (flag & START and key in here):
            parts.append(slice(start, i))
            start, here, ended = i, set(), set()
        here.add(key)
        if flag & END:
            ended.add(key)
    return [*parts, slice(start, len(batch.keys))]


def _example(said: str, folder: Path | None) -> PyTree:
    """An input of the cell: of `float32[16]`, or what `module:name` is or returns."""
    if found := re.fullmatch(r"(\w+)\[([\d, ]*)\]", said):
        try:
            return np.zeros([int(size) for size in found[2].split(",") if size.strip()], np.dtype(found[1]))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"cell.input: {said!r}: {error}") from error
    example: Any = resolve(said, folder, "cell.input")
    example = example() if callable(example) else example
    return jax.tree.map(lambda leaf: np.asarray(leaf, jax.dtypes.canonicalize_dtype(np.asarray(leaf).dtype)), example)


def _tensors(tree: PyTree, alone: str) -> list[Tensor]:
    """The arrays of an event: by their place in it, or `alone`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    names = [re.sub(r"[^A-Za-z0-9_]+", "_", jax.tree_util.keystr(path)).strip("_") or alone for path, _ in leaves]
    return [Tensor(name, tuple(leaf.shape), np.dtype(leaf.dtype)) for name, (_, leaf) in zip(names, leaves)]


def _to_bytes(y: PyTree) -> list[bytes]:
    leaves = [np.ascontiguousarray(leaf).reshape(len(leaf), -1).view(np.uint8) for leaf in jax.tree.leaves(y)]
    whole = np.concatenate([leaf.reshape(len(leaf), -1) for leaf in leaves], axis=1)
    data, width = whole.tobytes(), whole.shape[1]
    return [data[i * width : (i + 1) * width] for i in range(len(whole))]
