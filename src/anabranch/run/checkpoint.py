"""Checkpoints: small ones of what changed on top of full ones, written beside the stream, never half."""

import json
import logging
import re
from collections.abc import Hashable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa

from anabranch import state

log = logging.getLogger("anabranch.checkpoint")
_NAME = re.compile(r"(\d{8})-(full|delta)\.safetensors")


class Checkpoints:
    """The checkpoints of one pipeline.

    Each is one file. A full one holds all states; a delta those that changed since the checkpoint before it. To restore
    means to read a full one and the deltas after it, in order. The last `keep` restorable points are kept, and a torn
    or corrupt file is skipped with a warning, with all that build on it.
    """

    def __init__(self, folder: str | Path, keep: int = 3, full_every: int = 16):
        self.folder, self.keep, self.full_every = Path(folder), keep, full_every
        self.folder.mkdir(parents=True, exist_ok=True)
        for torn in self.folder.glob(".*.part"):
            torn.unlink()
        files = self._files()
        self._next = files[-1][0] + 1 if files else 0
        self._since_full = full_every  # whatever is there, begin with a full one
        self._writing: Future | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")

    def _files(self) -> list[tuple[int, str, Path]]:
        found = [(m, p) for p in self.folder.iterdir() if (m := _NAME.fullmatch(p.name))]
        return sorted((int(m[1]), m[2], p) for m, p in found)

    @property
    def wants_everything(self) -> bool:
        """Whether the next checkpoint is to be a full one."""
        return self._since_full >= self.full_every

    @property
    def busy(self) -> bool:
        """Whether the last checkpoint is still being written."""
        return self._writing is not None and not self._writing.done()

    def save(self, arrays: dict[str, Any], meta: dict[str, Any]) -> None:
        """Begin to write a checkpoint; waits only for the one before it.

        A leaf of `arrays` may be a function that gives the array: it is called beside the stream.
        """
        self.wait()
        kind = "full" if self.wants_everything else "delta"
        self._since_full = 1 if kind == "full" else self._since_full + 1
        path = self.folder / f"{self._next:08d}-{kind}.safetensors"
        self._next += 1
        self._writing = self._thread.submit(self._write, path, arrays, meta)

    def _write(self, path: Path, arrays, meta) -> None:
        state.save(path, jax.tree.map(lambda leaf: leaf() if callable(leaf) else leaf, arrays), meta)
        files = self._files()
        fulls = [n for n, kind, _ in files if kind == "full"]
        oldest = files[-self.keep][0] if len(files) >= self.keep else files[0][0]
        base = max((n for n in fulls if n <= oldest), default=0)
        for n, _, old in files:
            if n < base:
                old.unlink()

    def wait(self) -> None:
        """Wait until nothing is being written; raises what went wrong with it, and the next one is a full one."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            try:
                writing.result()
            except BaseException:
                self._since_full = self.full_every
                raise

    def close(self) -> None:
        """Finish writing."""
        self.wait()
        self._thread.shutdown()

    def abandon(self) -> None:
        """Let go after a failure. What is being written is finished, lest it turn up in a later run in this folder."""
        self._thread.shutdown()

    def load(self) -> list[tuple[dict[str, np.ndarray], dict[str, Any]]] | None:
        """The newest restorable chain, oldest first, or None if there is none. Later files are removed."""
        files = self._files()
        good: dict[int, tuple[dict[str, np.ndarray], dict[str, Any]]] = {}
        for chain in _chains([(n, kind) for n, kind, _ in files]):
            try:
                for n in chain:
                    if n not in good:
                        path = next(p for m, _, p in files if m == n)
                        good[n] = (state.load(path), state.read_meta(path))
            except (state.StateError, OSError) as error:
                log.warning("skipping a checkpoint that cannot be read: %s", error)
                continue
            for n, _, path in files:
                if n > chain[-1]:
                    path.unlink()
            return [good[n] for n in chain]
        return None


def _chains(files: list[tuple[int, str]]) -> Iterator[list[int]]:
    """Restorable points, newest first: the numbers from a full checkpoint on."""
    for end in range(len(files) - 1, -1, -1):
        start = next((i for i in range(end, -1, -1) if files[i][1] == "full"), None)
        if start is not None:
            yield [n for n, _ in files[start : end + 1]]


def pack_keys(keys: list[Hashable]) -> np.ndarray:
    """Keys as bytes: strings, numbers, bytes, None, and tuples of these.

    Raises:
        TypeError: for a key of another type.
    """
    kinds = set(map(type, keys))
    if kinds <= {str} or kinds <= {int} or kinds <= {bytes}:
        table = pa.table({"key": pa.array(keys, pa.string() if not keys else None)})
    else:
        table = pa.table({"json": pa.array([json.dumps(_plain(key)) for key in keys])})
    return pack_table(table)


def unpack_keys(data: np.ndarray) -> list[Hashable]:
    """The keys that `pack_keys` packed."""
    table = unpack_table(data)
    if "key" in table.column_names:
        return table["key"].to_pylist()
    return [_hashable(json.loads(text)) for text in table["json"].to_pylist()]


def pack_table(table: pa.Table) -> np.ndarray:
    """A table as bytes."""
    buffer = pa.BufferOutputStream()
    with pa.ipc.new_stream(buffer, table.schema) as writer:
        writer.write_table(table)
    return np.frombuffer(buffer.getvalue(), np.uint8)


def unpack_table(data: np.ndarray) -> pa.Table:
    """The table that `pack_table` packed."""
    return pa.ipc.open_stream(pa.py_buffer(np.ascontiguousarray(data))).read_all()


def _plain(key: Any) -> Any:
    if isinstance(key, tuple):
        return {"t": [_plain(part) for part in key]}
    if isinstance(key, bytes):
        return {"b": key.hex()}
    if key is None or type(key) in (str, int, float, bool):
        return key
    raise TypeError(f"a key of type {type(key).__name__} cannot be saved: {key!r}")


def _hashable(value: Any) -> Hashable:
    if isinstance(value, dict):
        return tuple(_hashable(part) for part in value["t"]) if "t" in value else bytes.fromhex(value["b"])
    return value
