"""`Keyed`: one state a key, for millions of keys, in one compiled call a micro-batch.

The state of a key is a row of 32-bit words; the rows of all keys are one array. A micro-batch runs in one of two forms:

* `loop`: a compiled loop over the events. Each reads its key's row, steps, and writes the row back in place. Its time
  does not depend on how skewed the keys are. For small cells on a CPU.
* `waves`: the first event of every key, then the second of every key, and so on, each wave one batched step. For cells
  with much arithmetic, and on accelerators.

Keys beyond `capacity` spill, least recently used first, to host memory and then to disk, and come back bit for bit.
"""

import hashlib
import math
import os
from collections.abc import Hashable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
from jaxtyping import Int32, Int64, PyTree, UInt32

from anabranch.cell import Cell, State, noise
from anabranch.run.spill import Spill, grow, oldest
from anabranch.state import Packing

LOOP_FLOPS = 300_000
"""A step with more arithmetic than this runs in waves on a CPU, if a micro-batch has few events of the same key. By
`bench/keyed.py --forms`, uniform keys, a GRU(128) of 0.1 M flops is quicker in the loop, a GRU(512) in waves."""
TICK_FLOPS = 60_000
"""From here on also where a micro-batch is a single wave, one event of each key, as live streams give them: a GRU(128)
then takes 1.7 us an event in place of 2.2 (`bench/serving.py`)."""
WAVE = 64
"""So few that waves are at least as wide. With skewed keys waves take 4 to 10 times as long as the loop."""
SIZES = (256, 4096, 32768, 131_072)
"""Compiled lengths of a loop; a longer micro-batch runs in several."""


class Rows(NamedTuple):
    """States of some keys, outside the runtime: what a checkpoint holds. Every key has a number."""

    named: Int64[np.ndarray, " m"]
    """Numbers that have got a key since the checkpoint before."""
    keys: list[Hashable]
    """The keys of `named`."""
    gone: Int64[np.ndarray, " k"]
    """Numbers whose key has been forgotten."""
    numbers: Int64[np.ndarray, " n"]
    """Whose states these are."""
    rows: UInt32[np.ndarray, "n words"]


class Keyed:
    """A cell with one state for each key.

    Arguments:
        cell: any cell that is not coupled.
        capacity: keys whose state is held ready; the others spill.
        seed: from which each key's random initial state is drawn, if the cell's `init` draws any.
        threads: shards of the keys that run side by side.
        form: "loop" or "waves"; by default chosen by the arithmetic of a step and, on a CPU, how often keys repeat.
        memory: keys held in host memory beyond `capacity`, before the disk is used.
        folder: where keys spill on disk; by default a temporary folder.

    The results equal a plain sequential loop over the events, whatever the size of the batches:

        >>> from anabranch.combine import Delay
        >>> last = Keyed(Delay(1, like=jnp.zeros(())), capacity=100)
        >>> last(["a", "b", "a", "a"], np.array([1.0, 2.0, 3.0, 4.0], np.float32)).tolist()
        [0.0, 0.0, 1.0, 3.0]
        >>> last(["b"], np.array([5.0], np.float32)).tolist(), len(last)
        ([2.0], 2)

    Raises:
        ValueError: if the cell is coupled, or an argument is out of range.
    """

    def __init__(
        self,
        cell: Cell,
        capacity: int,
        *,
        seed: int = 0,
        threads: int | None = None,
        form: str | None = None,
        memory: int = 1_000_000,
        folder: str | Path | None = None,
    ):
        if cell.coupled:
            raise ValueError(f"{type(cell).__name__} is coupled: its rows have no states of their own")
        if capacity < 1:
            raise ValueError(f"capacity must be positive, got {capacity}")
        if form not in (None, "loop", "waves"):
            raise ValueError(f"form must be 'loop' or 'waves', got {form!r}")
        self.cell, self.capacity, self.seed, self._form = cell, capacity, seed, form
        self._by_skew, self._tick = form is None and jax.default_backend() == "cpu", False
        # Every key has a number, free again when the key is forgotten; all else is arrays over these numbers or over
        # slots.
        self._numbers: dict[Hashable, int] = {}
        self._keys: list[Hashable] = []
        self._free: list[int] = []
        self._place = np.empty(0, np.int64)  # its slot if ready, -1 - its row of the spill if not
        self._dirty = np.empty(0, bool)
        self._renamed = np.empty(0, bool)
        self._batch = 0
        if cell.host:
            self._states: dict[Hashable, State] = {}
            return
        # More shards than cores gain nothing; few keys are not worth splitting.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = min(cores, 8) if threads is None else threads
        self._shards = max(1, min(threads, capacity // 64)) if form != "waves" else 1
        self._pool = ThreadPoolExecutor(self._shards)  # starts threads when it is first used
        self._staged: dict[tuple, list[np.ndarray]] = {}
        self._packing = Packing(jax.eval_shape(lambda key: cell.init(key=key), jax.random.PRNGKey(0)))
        self._kind = _Kind(cell)
        self._weights = tuple(jnp.asarray(leaf) for leaf in jax.tree.leaves(cell) if _is_data(leaf))
        per_shard = -(-capacity // self._shards)
        self.capacity = capacity = per_shard * self._shards
        first = [np.asarray(_fresh_rows(cell, seed, np.array([i], np.uint32))) for i in (1, 2, 3)]
        self._template = first[0] if all((row == first[0]).all() for row in first) else None
        # The last row is of no key: what padding reads, a state like any other. What padding writes is dropped.
        blank = np.zeros((per_shard + 1, self._packing.words), np.uint32)
        blank[-1] = first[0][0]
        self._rows = [jnp.array(blank) for _ in range(self._shards)]
        self._out_of_bounds = per_shard + 1
        self._owner = np.full(capacity, -1, np.int64)
        self._used = np.full(capacity, -1, np.int64)
        self._spill = Spill(self._packing.words, memory, folder)
        self._copy = np.empty((0, self._packing.words), np.uint32)

    # The stream

    def __call__(self, keys: Sequence[Hashable] | np.ndarray | pa.Array, xs: PyTree) -> PyTree:
        """Step once for each event, in order; `xs` and the result are stacked on a leading axis.

        A leaf of `xs` that is a plain number stands for all events.

        Raises:
            ValueError: if a key is null, or keys and inputs differ in number.
        """
        keys = _key_array(keys)
        n = len(keys)
        if n == 0:
            raise ValueError("a micro-batch needs at least one event")
        leaves, tree = jax.tree.flatten(xs)
        lengths = {len(leaf) for leaf in leaves if np.ndim(leaf)}
        if lengths - {n}:
            raise ValueError(f"{n} keys came with inputs of length {sorted(lengths)}")
        leaves = [np.asarray(leaf) if np.ndim(leaf) else np.full(n, leaf) for leaf in leaves]
        if self.cell.host:
            keys = keys if isinstance(keys, list) else keys.to_pylist()
            _refuse_null(keys)
            return self._step_host(keys, jax.tree.unflatten(tree, leaves))
        leaves = [np.asarray(leaf, jax.dtypes.canonicalize_dtype(leaf.dtype)) for leaf in leaves]
        if self._form is None:
            self.form(jax.tree.unflatten(tree, [leaf[0] for leaf in leaves]))
        return self._step(self._number(keys), leaves, tree)

    def form(self, x: PyTree) -> str:
        """Which form micro-batches of inputs like `x` run in; on a CPU those with many events of one key do not."""
        if self._form is None:
            flops = _flops(self.cell, x)
            self._form = "loop" if jax.default_backend() == "cpu" and flops <= LOOP_FLOPS else "waves"
            self._tick = flops > TICK_FLOPS
        return self._form

    def _step(self, numbers: Int64[np.ndarray, " n"], xs: list[np.ndarray], tree: Any) -> PyTree:
        n = len(numbers)
        if n > self.capacity and len(np.unique(numbers)) > self.capacity:  # one half after the other
            a = self._step(numbers[: n // 2], [x[: n // 2] for x in xs], tree)
            b = self._step(numbers[n // 2 :], [x[n // 2 :] for x in xs], tree)
            return jax.tree.map(lambda *ys: np.concatenate(ys), a, b)
        self._batch += 1
        self._admit(numbers)
        self._dirty[numbers] = True
        slots = self._place[numbers]
        shard, local = slots % self._shards, (slots // self._shards).astype(np.int32)
        waves = self._form == "waves"
        if self._by_skew and n >= WAVE and (waves or self._tick):
            most = np.unique(slots, return_counts=True)[1].max()
            waves = n >= WAVE * most if waves else most == 1
        elif self._by_skew:
            waves = False
        step, sizes = (_wave, WIDTHS) if waves else (_loop, SIZES)
        done = []

        def run(i: int) -> None:
            mine = np.flatnonzero(shard == i)
            for part in _waves(mine, local) if waves else _cut([mine], SIZES[-1]):
                at, *x = self._stage(i, part, [local, *xs], sizes)
                x = jax.tree.unflatten(tree, x)
                self._rows[i], ys = step(self._kind, self._weights, self._rows[i], at, np.int32(len(part)), x)
                self._rows[i].block_until_ready()  # XLA reads the staged arrays where they are
                done.append((part, jax.tree.map(np.asarray, ys)))

        busy = [i for i in range(self._shards) if (shard == i).any()]
        if len(busy) == 1:
            run(busy[0])
        else:
            list(self._pool.map(run, busy))
        if len(done) == 1:
            return jax.tree.map(lambda leaf: leaf[:n], done[0][1])
        out = jax.tree.map(lambda leaf: np.empty((n, *leaf.shape[1:]), leaf.dtype), done[0][1])
        for part, ys in done:
            jax.tree.map(lambda whole, leaf, e=part: whole.__setitem__(e, leaf[: len(e)]), out, ys)
        return out

    def _stage(self, shard: int, part: np.ndarray, whole: list[np.ndarray], sizes: tuple[int, ...]) -> list[np.ndarray]:
        """These events of `whole`, in arrays of a compiled length that are used again for later ones.

        Fresh arrays for every call cost more than the copy: the system has to make their pages first.
        """
        size = next(s for s in sizes if s >= len(part))
        name = (shard, size, *((leaf.shape[1:], leaf.dtype) for leaf in whole))
        if name not in self._staged:
            self._staged[name] = [_aligned((size, *leaf.shape[1:]), leaf.dtype) for leaf in whole]
        for leaf, staged in zip(whole, self._staged[name]):
            np.take(leaf, part, axis=0, out=staged[: len(part)], mode="clip")  # other modes copy once more
        return self._staged[name]

    def _step_host(self, keys: list, xs: PyTree) -> PyTree:
        ys = []
        for i, key in enumerate(keys):
            if key not in self._states:
                self._states[key] = self.cell.init(key=noise(jax.random.PRNGKey(self.seed), _hash(key), "init"))
            self._states[key], y = self.cell.step(self._states[key], jax.tree.map(lambda leaf, i=i: leaf[i], xs))
            ys.append(y)
        return jax.tree.map(lambda *leaves: np.stack(leaves), *ys)

    # Where the keys are

    def __len__(self) -> int:
        return len(self._states) if self.cell.host else len(self._numbers)

    def __iter__(self) -> Iterator[Hashable]:
        return iter(self._states if self.cell.host else self._numbers)

    def __contains__(self, key: Hashable) -> bool:
        return key in (self._states if self.cell.host else self._numbers)

    @property
    def spilled(self) -> int:
        """Keys that are in host memory or on disk."""
        return 0 if self.cell.host else len(self._numbers) - int((self._owner >= 0).sum())

    @property
    def nbytes(self) -> int:
        """Bytes of all states, wherever they are."""
        return 0 if self.cell.host else 4 * self._packing.words * len(self._numbers)

    @property
    def layout(self) -> dict[str, str]:
        """The dtype and shape of each array of a state."""
        return self._packing.layout

    def state(self, key: Hashable) -> State:
        """The state of one key.

        Raises:
            KeyError: if the key has not been seen.
        """
        if key not in self:
            raise KeyError(f"no event has come with the key {key!r}")
        if self.cell.host:
            return self._states[key]
        place = self._place[[self._numbers[key]]]
        rows = self._gather(place) if place[0] >= 0 else self._spill.read(-1 - place)
        return self._packing.unpack(jnp.asarray(rows[0]))

    def forget(self, keys: Sequence[Hashable]) -> int:
        """Drop the states of these keys; their next event begins anew. Returns how many of them were known."""
        if self.cell.host:
            return sum(self._states.pop(key, None) is not None for key in keys)
        numbers = np.array([n for key in keys if (n := self._numbers.pop(key, None)) is not None], np.int64)
        place = self._place[numbers]
        self._owner[place[place >= 0]] = -1
        self._spill.take(-1 - place[(place < 0) & (place != _NOWHERE)])
        self._place[numbers] = _NOWHERE
        self._dirty[numbers], self._renamed[numbers] = False, True
        for number in numbers.tolist():
            self._keys[number] = None
        self._free += numbers.tolist()
        return len(numbers)

    def _number(self, keys: pa.Array | list) -> Int64[np.ndarray, " n"]:
        """The number of each event's key; new keys get theirs."""
        if not isinstance(keys, list):
            codes, unique = _factorize(keys)
            return self._number(unique)[codes]
        found = list(map(self._numbers.get, keys))
        if None in found:
            _refuse_null(keys)
            self._name(list(dict.fromkeys(key for key, number in zip(keys, found) if number is None)))
            found = [self._numbers[key] for key in keys]
        return np.array(found, np.int64)

    def _name(self, keys: list) -> None:
        """Give these new keys their numbers."""
        again = min(len(keys), len(self._free))
        first = len(self._keys)
        numbers = np.r_[self._free[len(self._free) - again :], first : first + len(keys) - again].astype(np.int64)
        del self._free[len(self._free) - again :]
        for number, key in zip(numbers[:again].tolist(), keys):
            self._keys[number] = key
        self._keys += keys[again:]
        self._numbers.update(zip(keys, numbers.tolist()))
        self._make_room(len(self._keys))
        self._place[numbers], self._renamed[numbers] = _NOWHERE, True

    def _make_room(self, count: int) -> None:
        if count > len(self._place):
            size = max(1024, 2 * count)
            self._place = grow(self._place, size, _NOWHERE)
            self._dirty, self._renamed = grow(self._dirty, size, False), grow(self._renamed, size, False)

    def _admit(self, numbers: np.ndarray) -> None:
        """Make the states of these keys ready: made if new, fetched if spilled."""
        place = self._place[numbers]
        ready = place >= 0
        self._used[place[ready]] = self._batch  # so that none of this batch is sent away
        if ready.all():
            return
        absent = np.unique(numbers[~ready])
        free = np.flatnonzero(self._owner < 0)
        if len(absent) > len(free):
            self._evict(len(absent) - len(free))
            free = np.flatnonzero(self._owner < 0)
        slots = free[: len(absent)]
        rows = np.empty((len(absent), self._packing.words), np.uint32)
        place = self._place[absent]  # again: an eviction may have moved some from memory to disk
        new = place == _NOWHERE
        if new.any():
            rows[new] = self._initial([self._keys[i] for i in absent[new].tolist()])
        if not new.all():
            rows[~new] = self._spill.take(-1 - place[~new])
        self._scatter(slots, rows)
        self._owner[slots] = absent
        self._place[absent] = slots
        self._used[slots] = self._batch

    def _evict(self, need: int) -> None:
        # Some more than needed, so that the search for the oldest is paid once for many.
        old = np.flatnonzero((self._owner >= 0) & (self._used < self._batch))
        leave = oldest(old, self._used[old], max(need, self.capacity // 16))
        moved, places = self._spill.put(self._gather(leave), self._owner[leave])
        self._place[moved] = -1 - places
        self._owner[leave] = -1

    def _initial(self, keys: list) -> np.ndarray:
        if self._template is not None:
            return self._template
        hashes = np.array([_hash(key) for key in keys], np.uint32)
        return np.asarray(_fresh_rows(self.cell, self.seed, _pad(hashes)))[: len(keys)]

    def _gather(self, slots: np.ndarray) -> np.ndarray:
        rows = np.empty((len(slots), self._packing.words), np.uint32)
        for i, shard in enumerate(self._rows):
            mine = np.flatnonzero(slots % self._shards == i)
            if len(mine):
                rows[mine] = np.asarray(_take(shard, _pad((slots[mine] // self._shards).astype(np.int32))))[: len(mine)]
        return rows

    def _scatter(self, slots: np.ndarray, rows: np.ndarray) -> None:
        for i in range(self._shards):
            mine = np.flatnonzero(slots % self._shards == i)
            if len(mine):
                local = (slots[mine] // self._shards).astype(np.int32)
                self._rows[i] = _put(self._rows[i], _pad(local, fill=self._out_of_bounds), _pad(rows[mine]))

    # Checkpoints

    def changed(self) -> Rows:
        """States that have changed since the last call, which is when they count as saved.

        The next call writes into the same arrays: copy what must live longer.

        Raises:
            TypeError: for a cell on the host, whose states are no arrays.
        """
        if self.cell.host:
            raise TypeError(f"{type(self.cell).__name__} runs on the host: its states cannot be saved")
        changed = np.flatnonzero(self._dirty[: len(self._keys)])
        self._dirty[:] = False
        place = self._place[changed]
        shard = np.where(place >= 0, place % self._shards, self._shards)
        parts = [changed[shard == i] for i in range(self._shards + 1)]
        numbers = np.concatenate(parts)
        # The stream waits for this copy. Into fresh memory it would take ten times as long.
        if len(self._copy) < len(numbers):
            self._copy = np.empty(
                (max(len(numbers), min(2 * len(numbers), self.capacity)), self._packing.words), np.uint32
            )
        rows = self._copy[: len(numbers)]
        ends = np.cumsum([len(part) for part in parts])
        rows[ends[-2] :] = self._spill.read(-1 - self._place[parts[-1]])

        def copy(i: int) -> None:
            slots = self._place[parts[i]] // self._shards
            np.take(np.asarray(self._rows[i]), slots, axis=0, out=rows[ends[i] - len(slots) : ends[i]], mode="clip")

        if self._shards == 1:
            copy(0)
        else:
            list(self._pool.map(copy, range(self._shards)))
        renamed = np.flatnonzero(self._renamed[: len(self._keys)])
        self._renamed[renamed] = False
        free = np.zeros(len(self._keys), bool)
        free[self._free] = True
        named, gone = renamed[~free[renamed]], renamed[free[renamed]]
        together = len(named) > 0 and named[-1] - named[0] == len(named) - 1
        keys = self._keys[named[0] : named[-1] + 1] if together else [self._keys[i] for i in named.tolist()]
        return Rows(named, keys, gone, numbers, rows)

    def everything(self) -> Rows:
        """The states of all keys, and the names of all keys."""
        self._dirty[list(self._numbers.values())] = True
        self._renamed[: len(self._keys)] = True
        return self.changed()

    def restore(self, saved: Rows) -> None:
        """Take over saved states; later ones replace earlier ones of the same key.

        Raises:
            ValueError: if the rows are not states of this cell, or are of keys that no rows before them have named.
        """
        if saved.rows.ndim != 2 or saved.rows.shape[1] != self._packing.words:
            raise ValueError(
                f"a state of this cell has {self._packing.words} words, the rows have shape {saved.rows.shape}"
            )
        if len(saved.named) != len(saved.keys):
            raise ValueError(f"{len(saved.named)} numbers come with {len(saved.keys)} keys")
        old = np.concatenate([saved.gone, saved.named])
        self.forget([self._keys[n] for n in old.tolist() if n < len(self._keys) and self._keys[n] is not None])
        last = int(max(old.max(initial=-1), len(self._keys) - 1))
        self._make_room(last + 1)
        self._keys += [None] * (last + 1 - len(self._keys))
        for number, key in zip(saved.named.tolist(), saved.keys):
            if key in self._numbers:
                raise ValueError(f"the key {key!r} is saved under two numbers")
            self._keys[number], self._numbers[key] = key, number
        self._free = [number for number, key in enumerate(self._keys) if key is None]
        unknown = [n for n in saved.numbers.tolist() if n > last or self._keys[n] is None]
        if unknown:
            raise ValueError(f"there is a state of key number {unknown[0]}, but no name of it")
        step = min(self.capacity, SIZES[-1])
        for start in range(0, len(saved.numbers), step):
            numbers = saved.numbers[start : start + step]
            self._batch += 1
            self._admit(numbers)
            self._scatter(self._place[numbers], saved.rows[start : start + step])
        self._dirty[saved.numbers] = False
        self._renamed[:] = False


WIDTHS = (8, 64, 512)
"""Compiled widths of a wave."""


_NOWHERE = np.iinfo(np.int64).min
"""The place of a key whose state has not been made."""


def _aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Zeros that XLA can use where they are: it copies arrays that do not begin on a cache line."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.zeros(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def _cut(parts: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """These parts, none longer than `size`."""
    return (part[at : at + size] for part in parts for at in range(0, len(part), size))


def _waves(events: Int64[np.ndarray, " n"], local: Int32[np.ndarray, " all"]) -> Iterator[np.ndarray]:
    """The first event of every key, then the second of every key, and so on."""
    slots = local[events]
    order = np.argsort(slots, kind="stable")
    again = slots[order][1:] == slots[order][:-1]
    if not again.any():
        return _cut([events], WIDTHS[-1])
    first = np.concatenate([[True], ~again])
    turn = np.empty(len(slots), np.int64)
    turn[order] = np.arange(len(slots)) - np.maximum.accumulate(np.where(first, np.arange(len(slots)), 0))
    by_turn = np.argsort(turn, kind="stable")
    return _cut(np.split(events[by_turn], np.cumsum(np.bincount(turn))[:-1]), WIDTHS[-1])


def _is_data(leaf: Any) -> bool:
    """Whether a leaf of a cell is an array, and not only the description of one."""
    return isinstance(leaf, (jax.Array, np.ndarray, np.generic))


class _Kind:
    """A cell but for its arrays: what a program is compiled for. `jit` asks for its hash at every call."""

    def __init__(self, cell: Cell):
        leaves, self._tree = jax.tree.flatten(cell)
        self._fixed = tuple(None if _is_data(leaf) else leaf for leaf in leaves)
        self._hash = hash((self._tree, self._fixed))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, _Kind) and self._tree == other._tree and self._fixed == other._fixed)

    def cell(self, weights: Sequence[jax.Array]) -> Cell:
        """The cell with these arrays."""
        left = iter(weights)
        return jax.tree.unflatten(self._tree, [next(left) if leaf is None else leaf for leaf in self._fixed])


# Compiled once for a kind of cell, and shared by all `Keyed` of it. Row buffers are donated: they are updated in place.


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _loop(kind, weights, rows, slots, n, xs):
    cell = kind.cell(weights)
    packing = Packing(jax.eval_shape(lambda key: cell.init(key=key), jax.random.PRNGKey(0)))
    at = lambda i: jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, i, keepdims=False), xs)
    first, static = eqx.partition(packing.get(rows, slots[0]), eqx.is_array)
    shape = jax.eval_shape(lambda state, x: cell.step(eqx.combine(state, static), x)[1], first, at(0))
    ys = jax.tree.map(lambda s: jnp.zeros((len(slots), *s.shape), s.dtype), shape)

    # The state of the next event is read at the end of a turn, from the rows as they are then, and carried over. Read
    # where it is used, XLA would fuse the read into its uses, see rows both read and written, and copy all of them.
    def body(i, carry):
        rows, state, ys = carry
        state, y = cell.step(eqx.combine(state, static), at(i))
        rows = packing.put(rows, slots[i], state)
        ys = jax.tree.map(lambda all, new: jax.lax.dynamic_update_index_in_dim(all, new, i, 0), ys, y)
        return rows, eqx.filter(packing.get(rows, slots[i + 1]), eqx.is_array), ys

    rows, _, ys = jax.lax.fori_loop(0, n, body, (rows, first, ys))
    return rows, ys


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _wave(kind, weights, rows, slots, n, xs):
    cell = kind.cell(weights)
    packing = Packing(jax.eval_shape(lambda key: cell.init(key=key), jax.random.PRNGKey(0)))
    slots = jnp.where(jnp.arange(len(slots)) < n, slots, len(rows))  # reads the last row, and writes nowhere
    states = jax.vmap(packing.unpack)(rows[slots])
    states, ys = jax.vmap(lambda state, x: cell.step(state, x))(states, xs)
    return rows.at[slots].set(jax.vmap(packing.pack)(states), mode="drop"), ys


@eqx.filter_jit
def _fresh_rows(cell, seed, hashes):
    key = jax.random.PRNGKey(seed)
    return jax.vmap(lambda h: _pack(cell.init(key=noise(key, h, "init"))))(hashes)


def _pack(state):
    return Packing(state).pack(state)


@jax.jit
def _take(rows, slots):
    return rows[slots]


@eqx.filter_jit(donate="all")
def _put(rows, slots, new):
    return rows.at[slots].set(new, mode="drop")


def _flops(cell: Cell, x: PyTree) -> float:
    """Operations of a step, from the program before it is compiled: compiling it would take longer than the answer."""
    leaves, tree = jax.tree.flatten((cell, x))
    kinds = (jax.Array, np.ndarray, np.generic)
    name = (tree, *((leaf.shape, leaf.dtype) if isinstance(leaf, kinds) else leaf for leaf in leaves))
    if name not in _counted:
        arrays, static = eqx.partition((cell, x), eqx.is_array)

        def step(state, arrays):
            cell, x = eqx.combine(arrays, static)
            return eqx.filter(cell.step(state, x), eqx.is_array)

        state = jax.eval_shape(lambda key: cell.init(key=key), jax.random.PRNGKey(0))
        analysis = jax.jit(step).lower(state, arrays).cost_analysis() or {}
        _counted[name] = float(analysis.get("flops", 0.0))
    return _counted[name]


_counted: dict[tuple, float] = {}


def _pad(tree: PyTree, size: int | None = None, fill: int = 0) -> PyTree:
    """Every array made as long as `size`, by default the next power of two."""

    def pad(leaf):
        leaf = np.asarray(leaf)
        length = max(8, 1 << (len(leaf) - 1).bit_length()) if size is None else size
        if len(leaf) == length:
            return leaf
        out = np.full((length, *leaf.shape[1:]), fill, leaf.dtype)
        out[: len(leaf)] = leaf
        return out

    return jax.tree.map(pad, tree)


def _hash(key: Hashable) -> int:
    """A number for a key that is the same in every process."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=4).digest(), "little")


def _key_array(keys) -> pa.Array | list:
    """Keys as an Arrow array where they come in one, or in an array of NumPy's, else as a list."""
    if isinstance(keys, pa.ChunkedArray):
        keys = keys.combine_chunks()
    if isinstance(keys, np.ndarray):
        keys = pa.array(keys) if keys.dtype != object else keys.tolist()
    if isinstance(keys, pa.Array):
        if keys.null_count:
            raise ValueError(f"the key of event {keys.is_null().to_pylist().index(True)} is null")
        return keys
    return keys if isinstance(keys, list) else list(keys)


def _refuse_null(keys: list) -> None:
    if None in keys:
        raise ValueError(f"the key of event {keys.index(None)} is null")


def _factorize(keys) -> tuple[np.ndarray, list]:
    """Each event's number among the distinct keys, and these keys."""
    if isinstance(keys, list):
        _refuse_null(keys)
        numbers: dict[Hashable, int] = {}
        codes = np.fromiter((numbers.setdefault(key, len(numbers)) for key in keys), np.int64, len(keys))
        return codes, list(numbers)
    coded = keys if isinstance(keys, pa.DictionaryArray) else keys.dictionary_encode()
    codes = coded.indices.to_numpy(zero_copy_only=False)
    if len(coded.dictionary) > len(codes):  # a dictionary that a slice shares with a longer array
        coded = coded.cast(coded.dictionary.type).dictionary_encode()
        codes = coded.indices.to_numpy(zero_copy_only=False)
    return codes, coded.dictionary.to_pylist()
