"""What a server serves: a pipeline or a bare cell, stepped in batches, each written to the journal before it counts.

A batch is recorded, stepped and only then answered, once the record is durable. After a crash the last checkpoint is
read and the records that follow it are stepped again, in the same batches: the states and outputs are bit for bit those
of a server that did not crash, and what was answered has been counted exactly once.
"""

import json
import logging
import re
import time
from collections import deque
from collections.abc import Hashable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, PyTree, UInt8

from anabranch.cell import Cell
from anabranch.run.alarms import Alarms
from anabranch.run.checkpoint import Checkpoints, pack_keys, unpack_keys
from anabranch.run.config import ConfigError, PipelineConfig, ServedCellConfig, resolve
from anabranch.run.journal import Journal
from anabranch.run.keyed import Keyed, Rows
from anabranch.run.metrics import Spent
from anabranch.run.pipeline import Pipeline
from anabranch.run.rows import ROW, TIME, number_of
from anabranch.run.source import records

log = logging.getLogger("anabranch.serve")
AHEAD = 60.0
"""Seconds that the clock of a client may be before the server's."""
START, END = 1, 2
"""Flags of a cell's event: the stream begins anew with it; its state is dropped after it."""


class NotTaken(Exception):
    """A batch was not stepped, and nothing has changed: it may be sent again."""


class Stuck(Exception):
    """A batch is in the journal, but could not be stepped: it will count, once, as soon as it can be."""


class Served(Protocol):
    """What `Live` keeps alive."""

    def open(self) -> int:
        """Take over the last checkpoint, whatever was there before; returns how many batches it holds."""
        ...

    def prepare(self, events: list[Any]) -> Any:
        """A batch of these events, with all that its outcome depends on, such as the time of day."""
        ...

    def step(self, batch: Any) -> list[Any]:
        """The answers, one an event."""
        ...

    def idle(self) -> Any:
        """A batch that ends streams which have been idle for too long, or None."""
        ...

    def pack(self, batch: Any) -> bytes: ...
    def unpack(self, data: bytes) -> Any: ...
    def save(self, batches: int) -> None:
        """Begin a checkpoint that holds this many batches."""
        ...

    def wait(self) -> None:
        """Wait for the checkpoint that was begun last; raises what went wrong with it."""
        ...

    def close(self) -> None: ...
    def abandon(self) -> None: ...


class Live:
    """A served pipeline or cell, with its journal and its checkpoints.

    If a batch cannot be stepped, it goes back to the last checkpoint and steps what the journal holds after it once
    more: what another server would do that starts after a crash. A batch whose outputs could not be written is among
    it; one that failed for another reason is not, and its events count as not taken.

    Arguments:
        served: the pipeline or cell.
        folder: of the journal.
        durable: answer only what the disk has; otherwise a crash forgets what came after the last checkpoint.
        every: seconds between checkpoints.
        keep: checkpoints that can be gone back to; the journal reaches back to the first of them.
    """

    def __init__(self, served: Served, folder: Path, *, durable: bool = True, every: float = 10.0, keep: int = 3):
        self.served, self.durable, self.every = served, durable, every
        self.journal = Journal(folder)
        self._sync = ThreadPoolExecutor(1, thread_name_prefix="journal")
        self.batches = 0
        self.stuck = False
        """Whether the last batch could not be stepped yet."""
        self.failures = 0
        """Checkpoints that could not be written."""
        self._begun, self._again = 0, 0.0
        self._held: deque[int] = deque(maxlen=keep)  # how many batches the last checkpoints hold

    def start(self) -> int:
        """Take over what an earlier server has left; returns how many batches were stepped again."""
        self._go_back()
        return self.batches - self._begun

    def _go_back(self) -> list[Any]:
        """Read the last checkpoint, and step what follows it in the journal; returns the answers to the last batch."""
        self._begun = self.batches = self.served.open()
        answers: list[Any] = []
        for number, data in self.journal.replay(self.batches):
            answers = self.served.step(self.served.unpack(data))
            self.batches = number + 1
        self._saved, self.stuck = time.monotonic(), False
        return answers

    def step(self, events: list[Any]) -> list[Any]:
        """The answers to a batch, once they count.

        Raises:
            NotTaken: if the journal cannot be written, the disk being full for instance, if an earlier batch is stuck,
                or if these events cannot be stepped.
            Stuck: if the outputs cannot be written.
        """
        return self._go(self.served.prepare(events))

    def expire(self) -> None:
        """End the streams that have been idle for too long."""
        batch = None if self.stuck else self.served.idle()
        if batch is not None:
            self._go(batch)

    def _go(self, batch: Any) -> list[Any]:
        written = None
        if self.stuck:
            try:
                self._recover()
            except Stuck as error:
                raise NotTaken(str(error)) from error
        if self.durable:
            try:
                self.journal.append(self.served.pack(batch))
            except OSError as error:
                raise NotTaken(f"the journal cannot be written: {error}") from error
            written = self._sync.submit(self.journal.sync)  # beside the step
        try:
            answers = self.served.step(batch)
        except Exception as error:
            if written is None:
                raise
            log.exception("a batch could not be stepped; going back to the last checkpoint")
            written.result()
            if isinstance(error, OSError):
                return self._recover()
            self.journal.drop()  # as it is with these events, and would be again
            try:
                self._recover()
            except Stuck:
                log.exception("and that cannot be done yet")
            raise NotTaken(f"these events cannot be stepped: {error}") from error
        if written is not None:
            written.result()
        self.batches += 1
        if time.monotonic() - self._saved >= self.every:
            self.save()
        return answers

    def _recover(self) -> list[Any]:
        self.stuck = True
        try:
            if time.monotonic() < self._again:
                raise TimeoutError("it is tried once a second")
            self._again = time.monotonic() + 1.0
            self.served.abandon()
            return self._go_back()
        except Exception as error:
            raise Stuck(f"what has been taken in cannot be stepped yet, but is kept: {error}") from error

    def save(self) -> None:
        """Begin a checkpoint. If the one before could not be written, the journal has kept what is in it."""
        try:
            self.served.wait()
            self._held.append(self._begun)
        except OSError as error:
            self.failures += 1
            log.error("a checkpoint could not be written: %s", error)
        self._saved = time.monotonic()
        try:
            self.served.save(self.batches)
        except OSError as error:
            if not self.durable:
                raise
            self.failures += 1
            self.stuck = True  # some of the outputs may be half written
            log.error("no checkpoint could be begun: %s", error)
            return
        self._begun = self.journal.next = self.batches
        self.journal.cut(self._held[0] if len(self._held) == self._held.maxlen else 0)

    def close(self) -> None:
        """Make a final checkpoint, and close."""
        if not self.stuck:
            self.save()
        if self.stuck:
            return self.abandon()
        self.served.close()
        self._sync.shutdown()

    def abandon(self) -> None:
        """Let go after a failure; the next server goes on from the journal."""
        self._sync.shutdown()
        self.served.abandon()
        self.journal.close()


class ServedPipeline:
    """A pipeline whose rows come from clients: dicts in, one answer a row.

    Rows count in the order in which they come. One without a time gets the server's; one whose time is before that of
    an earlier row, by at most `source.lateness` seconds, counts at the time of that row.
    """

    def __init__(self, config: PipelineConfig, folder: Path | None = None):
        live = config.source.model_copy(update={"kind": "jsonl", "lateness": 0.0})
        out = (config.out or Path("out") / config.name) / "live"
        self.pipeline = Pipeline(config.model_copy(update={"source": live, "out": out}), folder, source=[])
        self.lateness = config.source.lateness
        self.time = config.source.time
        label = config.label
        self._names = {name for stage in config.stage for name in stage.columns}
        self._names |= {label.id} if label is not None and label.id is not None else set()
        typed = self.pipeline.typed
        self._texts = self._names | set(typed.shown) - set(typed.inputs) - set(typed.targets)

    def open(self) -> int:
        self.pipeline.open(resume=True)
        return self.pipeline.batches

    def prepare(self, events: list[dict]) -> list[dict]:
        now = time.time()
        time_now = str(now) if self.time in self._texts else now
        return [event if event.get(self.time) is not None else {**event, self.time: time_now} for event in events]

    @property
    def alarms(self) -> Alarms:
        """What its stages, and the error of its predictions, have raised."""
        return self.pipeline.alarms

    def quality(self) -> dict[str, dict[str, Any]]:
        """The scores so far, by group."""
        return {group: scores.value() for group, scores in sorted(self.pipeline.scores.items())}

    def own(self, tenant: str | None, event: dict) -> dict:
        """An event with its keys, its id and what else is no number as text, so that columns have one type.

        The keys and the id of a tenant are another's only by name.

        Raises:
            ValueError: if its time has not come yet.
        """
        moment, _ = number_of(event.get(self.time))
        if moment > time.time() + max(self.lateness, AHEAD):  # it would make all that comes after it late
            raise ValueError(f"{self.time}: {event[self.time]!r} is ahead of the server's clock")
        found = dict(event)
        for name in self._texts & event.keys():
            value = event[name]
            if value is not None:
                text = value if isinstance(value, str) else json.dumps(value)
                found[name] = f"{tenant}/{text}" if tenant is not None and name in self._names else text
        return found

    def step(self, batch: list[dict]) -> list[dict]:
        pipeline = self.pipeline
        first, pipeline.position = pipeline.position, pipeline.position + len(batch)
        answers: list[dict] = [{"row": first + i} for i in range(len(batch))]
        rows, bad = pipeline.typed(records(batch, first))
        when = rows[TIME].to_numpy()
        newest = np.maximum.accumulate(np.r_[pipeline.ordered.newest, when])[1:]
        moved = np.where(when >= newest - self.lateness, newest, when)
        rows, late = pipeline.ordered(rows.set_column(rows.column_names.index(TIME), TIME, [moved]))
        pipeline.bury(bad + late)
        for letter in bad + late:
            answers[letter.row - first]["error"] = letter.reason
        unknown: set[int] = set()
        if rows.num_rows:
            predictions = pipeline.batch(rows)
            unknown = pipeline.unknown
            if predictions is not None:
                for answer in predictions.to_pylist():
                    answers[answer["row"] - first] = answer
        else:
            pipeline.batches += 1
        for row in rows[ROW].to_pylist():
            answer = answers[row - first]
            if len(answer) == 1:  # it told a label
                answer |= {"error": "no open prediction has this id"} if row in unknown else {"label": "learned"}
        return answers

    def idle(self) -> None:
        return None  # states of a pipeline last; beyond a stage's capacity they spill

    def pack(self, batch: list[dict]) -> bytes:
        return json.dumps(batch).encode()

    def unpack(self, data: bytes) -> list[dict]:
        return json.loads(data)

    def save(self, batches: int) -> None:
        self.pipeline.checkpoint()

    def wait(self) -> None:
        self.pipeline.checkpoints.wait()

    def close(self) -> None:
        self.pipeline.close()

    def abandon(self) -> None:
        self.pipeline.abandon()


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
        for key in keys:
            del self._seen[key]
        return CellBatch(keys, np.full(len(keys), END, np.uint8), np.zeros((len(keys), 0), np.uint8)) if keys else None

    def step(self, batch: CellBatch) -> list[tuple[int, bytes]]:
        if batch.data.shape[1] == 0 and self.width:
            self.keyed.forget(batch.keys)
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
        self._checkpoints.save({"keyed": arrays}, {"batches": batches})

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
