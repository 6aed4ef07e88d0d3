"""A pipeline: rows of a source, in event-time order, through keyed cells, to sinks; labels come back later.

What happens to a micro-batch: its rows are *asked* (each stage predicts), and the labels that have become known by then
are *told* (each stage learns), all in one order of time. Stage after stage runs over the whole micro-batch: since a
stage feeds only those after it, that equals event by event.
"""

import hashlib
import itertools
import json
import logging
import math
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from anabranch.cell import Event, Maybe, Timed
from anabranch.run import brokers
from anabranch.run import sink as sinks
from anabranch.run.alarms import Alarms
from anabranch.run.checkpoint import Checkpoints, pack_keys, pack_table, unpack_keys, unpack_table
from anabranch.run.config import ConfigError, PipelineConfig, resolve
from anabranch.run.keyed import Rows
from anabranch.run.pending import Pending
from anabranch.run.quality import Quality
from anabranch.run.rows import DUE, ID, LABEL, ROW, TIME, Ordered, Typed, blocks_from, seconds
from anabranch.run.source import Bad, Block, open_source, tables
from anabranch.run.stages import make_stages

log = logging.getLogger("anabranch.pipeline")


class Summary(NamedTuple):
    """The final figures of a run."""

    events: int
    """Rows that were predicted."""
    seconds: float
    events_per_s: float
    keys: dict[str, int]
    """Of each stage."""
    dead_letters: int
    labels: dict[str, int]
    """Labels learned; predictions given up (`expired`, `dropped`) or still `open`; labels of unknown id (`unknown`)."""
    metrics: dict[str, dict[str, Any]]
    checkpoint: str | None


class Pipeline:
    """A pipeline that can be run, resumed and scored.

    Arguments:
        config: what `anabranch.run.config.read` gives.
        folder: where modules that the pipeline names are looked for first.
        source: rows, instead of those of the configured source: a Table, or an iterable of Tables or dicts.

    Raises:
        ConfigError: if a cell cannot be made as configured.
    """

    def __init__(self, config: PipelineConfig, folder: Path | None = None, source: Any = None):
        self.config, self.folder, self.source = config, folder, source
        self.out = config.out or Path("out") / config.name
        self.typed = Typed(config)
        self.after = None if config.report.after is None else seconds(config.report.after, "report.after")
        self.stages = make_stages(config, folder)
        self.peers = [resolve(name, folder, f"report.peers[{i}]") for i, name in enumerate(config.report.peers)]
        self.call = (
            resolve(config.source.call, folder, "source.call") if config.source.call and source is None else None
        )
        self.live = config.source.live and source is None
        self._reset()

    def _reset(self) -> None:
        label = self.config.label
        self.kind = "binary" if label is None else label.kind
        self.position = 0
        self.start: float | None = None
        self.clock = -np.inf
        self.counts = dict.fromkeys(("events", "dead_letters", "learned", "expired", "dropped", "unknown"), 0)
        self.seconds = 0.0
        self.ordered = Ordered(self.config.source.lateness)
        self.queue: pa.Table | None = None
        self.pending = Pending(label.pending if label is not None else self.config.batch)
        self.quality = Quality(self.config.report, self.kind)
        self.alarms = Alarms()
        for stage in self.stages:
            stage.keyed.forget(list(stage.keyed))
        self.sinks: dict[str, sinks.Sink] = {}
        self.broker: brokers.Broker | None = None
        self._stopped: Callable[[], bool] = lambda: False
        self._unacknowledged: Any = None
        self.pace: list[tuple[float, float, float]] = []
        self.batches = 0
        self.unknown: set[int] = set()
        """Rows of the last micro-batch that told labels of no open prediction."""

    # Running

    def run(self, *, resume: bool = False, limit: int | None = None, progress: bool = False) -> Summary:
        """Run to the end of the source, or stop after its first `limit` rows, from where a later run can resume.

        With `resume`, go on from the last checkpoint; without one, or without `resume`, start anew and replace what an
        earlier run has left in the folder of outputs. The outputs of a run that was killed and resumed equal, row for
        row and bit for bit, those of one that was not. A live source has no end unless `source.idle` gives it one;
        SIGINT or SIGTERM end the run with a checkpoint, from where a later run can resume.
        """
        finished = self.open(resume=resume)
        try:
            if not finished:
                self._run(limit, progress)
        except BaseException:
            self.abandon()
            raise
        self.close()
        return self.summary()

    def open(self, *, resume: bool) -> bool:
        """Open the outputs; with `resume`, take over the last checkpoint. Returns whether that run had finished."""
        self._reset()
        self.out.mkdir(parents=True, exist_ok=True)
        if not resume:
            sinks.clear(self.out)
        self.checkpoints = Checkpoints(self.out / "checkpoints", self.config.checkpoint.keep)
        self.sinks = {"dead_letters": sinks.TextSink(self.out / "dead_letters.jsonl", "jsonl")}
        try:
            for name in ("predictions", "outcomes"):
                self.sinks[name] = sinks.open_sink(self.out, name, self.config.sink)
            if self.source is None:
                self.broker = brokers.open_broker(self.config.source)
            topic = self.config.sink.format == "kafka"
            if topic and self.broker is not None and not self.broker.ordered:
                raise ConfigError("sink.format: a topic cannot be cut back, so that the source must have one partition")
            if resume and self._restore():
                return True
            if not resume:
                for sink in self.sinks.values():
                    sink.rewind(0)
            if topic:  # what it holds from another run must be told from what this one will write
                self.checkpoint()
                self.checkpoints.wait()
            return False
        except BaseException:
            self.abandon()
            raise

    def close(self) -> None:
        """Make the outputs durable, and close them."""
        for sink in self.sinks.values():
            sink.close()
        if self.broker is not None:
            self.broker.close()
        self.checkpoints.close()

    def abandon(self) -> None:
        """Let go after a failure: a resumed run goes on from the last checkpoint."""
        for sink in self.sinks.values():
            sink.abandon()
        if self.broker is not None:
            self.broker.close()
        self.checkpoints.abandon()

    def _run(self, limit: int | None, progress: bool) -> None:
        begin = time.perf_counter()
        bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            disable=not progress,
        )
        stops = brokers.stops() if self.live or self.broker is not None else nullcontext(self._stopped)
        with stops as self._stopped, bar:
            finished = self._stream(limit, bar, begin)
            self.seconds += time.perf_counter() - begin
            self.checkpoint(finished)
            self.checkpoints.wait()
            self._acknowledge()

    def summary(self) -> Summary:
        """The figures so far."""
        metrics = {name: scores.value() for name, scores in sorted(self.quality.scores.items())}
        labels = {name: self.counts[name] for name in ("learned", "expired", "dropped", "unknown")}
        files = sorted((self.out / "checkpoints").glob("*.safetensors"))
        return Summary(
            events=self.counts["events"],
            seconds=self.seconds,
            events_per_s=self.counts["events"] / self.seconds if self.seconds else 0.0,
            keys={stage.name: len(stage.keyed) for stage in self.stages},
            dead_letters=self.counts["dead_letters"],
            labels={**labels, "open": len(self.pending) if self.config.label is not None else 0},
            metrics=metrics,
            checkpoint=str(files[-1]) if files else None,
        )

    def _blocks(self, limit: int | None) -> Iterable[Block]:
        if self.broker is not None:
            config, wanted = self.config, self.typed.wanted
            return brokers.blocks(self.broker, config.source, wanted, self.position, config.batch, limit, self._stopped)
        if self.live:
            assert self.call is not None
            return itertools.takewhile(lambda _: not self._stopped(), tables(self.call(), self.position))
        source = tables(self.source) if self.source is not None else open_source(self.config.source, self.call)
        return blocks_from(iter(source), self.position)

    def _stream(self, limit: int | None, bar: Progress, begin: float) -> bool:
        """Returns whether the source has come to its end."""
        finished, total = True, limit
        if isinstance(self.source, pa.Table):
            total = min(self.source.num_rows, limit or self.source.num_rows)
        task = bar.add_task(self.config.name, total=total, note="", completed=self.counts["events"])
        size = self.config.batch
        full = 1 if self.live or self.broker is not None else size  # live rows have waited long enough for others
        last, saved, position = begin, self.counts["events"], self.position

        def go(rows: pa.Table) -> None:
            self.batch(rows)
            now = time.perf_counter()
            self._note_pace(self.seconds + now - begin)
            rate = self.counts["events"] / (self.seconds + now - begin)
            bar.update(task, completed=self.counts["events"], note=f"{rate:,.0f} events/s")
            save_if_due()

        def save_if_due() -> None:
            nonlocal last, saved, position
            now, every = time.perf_counter(), self.config.checkpoint
            due = every.events is not None and self.counts["events"] - saved >= every.events
            due = due or (every.seconds is not None and now - last >= every.seconds and not self.checkpoints.busy)
            if due:
                self.seconds += now - begin  # a checkpoint says how long the run has taken so far
                self.checkpoint()
                self.seconds -= now - begin
                last, saved, position = now, self.counts["events"], self.position

        for block in self._blocks(limit):
            if limit is not None and self.position >= limit:
                finished = False
                break
            if limit is not None:
                keep = block.rows < limit
                finished = finished and bool(keep.all()) and all(b.row < limit for b in block.bad)
                block = Block(
                    block.table.filter(pa.array(keep)), block.rows[keep], [b for b in block.bad if b.row < limit]
                )
            rows, bad = self.typed(block)
            rows, late = self.ordered(rows)
            self.bury(bad + late)
            ends = [block.rows[-1] if len(block.rows) else -1, *(b.row for b in block.bad)]
            self.position = max(self.position, int(max(ends)) + 1)
            self._enqueue(rows)
            while self.queue is not None and self.queue.num_rows >= full:
                rows, self.queue = self.queue.slice(0, size), self.queue.slice(size)
                go(rows)
            self._acknowledge()
            if self.broker is not None and self.position > position:
                save_if_due()
        finished = finished and not self._stopped()
        rest = self.ordered.rest() if finished else None
        if rest is not None:
            self._enqueue(rest)
        while self.queue is not None and self.queue.num_rows:
            rows, self.queue = self.queue.slice(0, size), self.queue.slice(size)
            go(rows)
        if finished and self.config.label is not None:  # the labels of what was asked last
            self._process(None, np.inf)
        bar.update(task, completed=self.counts["events"], total=self.counts["events"])
        return finished

    def _acknowledge(self) -> None:
        """Tell the server of a live source what the last checkpoint holds, as soon as that is durable."""
        if self.broker is None or self._unacknowledged is None or self.checkpoints.busy:
            return
        self.checkpoints.wait()
        try:
            self.broker.commit(self._unacknowledged)
        except self.broker.errors as error:
            brokers.log.warning("the source was not told of a checkpoint; the next one will do: %s", error)
        self._unacknowledged = None

    def _enqueue(self, rows: pa.Table) -> None:
        if self.queue is None or not self.queue.num_rows:
            self.queue = rows.combine_chunks()
        elif rows.num_rows:
            self.queue = pa.concat_tables([self.queue, rows], promote_options="permissive").combine_chunks()

    def bury(self, bad: list[Bad]) -> None:
        """Write rows that cannot be used to the dead letters."""
        if bad:
            self.sinks["dead_letters"].write_rows([b._asdict() for b in bad])  # pyright: ignore[reportAttributeAccessIssue]
            self.counts["dead_letters"] += len(bad)

    def _note_pace(self, now: float) -> None:
        with open("/proc/self/statm") as file:
            resident = int(file.read().split()[1]) * 4096
        self.pace.append((now, self.counts["events"], resident))
        if len(self.pace) > 1000:
            self.pace = self.pace[::2]

    # One micro-batch

    def batch(self, rows: pa.Table) -> pa.Table | None:
        """Take typed rows in the order of their time through all stages; returns what was predicted."""
        if self.start is None:
            self.start = float(np.floor(rows[TIME][0].as_py()))
        predictions = self._process(rows, rows[TIME][-1].as_py())
        self.batches += 1
        return predictions

    def _process(self, rows: pa.Table | None, now: float) -> pa.Table | None:
        """Ask `rows`, and tell all labels that are known at `now`, in the order of time. Returns the predictions."""
        label, pending = self.config.label, self.pending
        self.unknown = set()
        told_rows = None
        if rows is not None and label is not None and label.id is not None:  # labels that are rows of their own
            is_label = ~np.isnan(rows[LABEL].to_numpy())
            told_rows, rows = rows.filter(pa.array(is_label)), rows.filter(pa.array(~is_label))
        count = 0 if rows is None else rows.num_rows
        slots = pending.open(count)
        if rows is not None:
            self._open(slots, rows)
        ask_time = np.zeros(0) if rows is None else rows[TIME].to_numpy()
        ask_seq = np.arange(count, dtype=np.float64) if rows is None else rows[ROW].to_numpy().astype(np.float64)
        tell, tell_time, tell_first, tell_seq = self._tells(told_rows, now)
        when = np.concatenate([tell_time, ask_time])
        phase = np.concatenate([np.where(tell_first, 0, 1), np.ones(count, int)])
        order = np.lexsort((np.concatenate([tell_seq, ask_seq]), phase, when))
        slot = np.concatenate([tell, slots])[order]
        is_tell = np.concatenate([np.ones(len(tell), bool), np.zeros(count, bool)])[order]
        predictions = None
        if len(slot):
            answers = self._stages(rows, slots, slot, is_tell, when[order], order[~is_tell] - len(tell))
            predictions = self._emit(rows, slots, slot[is_tell], when[order][is_tell], answers)
        self.counts["events"] += count
        self.counts["learned"] += len(tell)
        pending.close(tell if label is not None else slots)
        if label is not None and label.expire is not None and np.isfinite(now):
            old = np.flatnonzero(pending.live & (pending["time"] + label.expire <= now))
            self.counts["expired"] += len(old)
            pending.close(old)
        if label is not None and len(pending) > label.pending:
            extra = pending.oldest(len(pending) - label.pending)
            self.counts["dropped"] += len(extra)
            pending.close(extra)
        return predictions

    def _open(self, slots: np.ndarray, rows: pa.Table) -> None:
        """Write down what is asked: all that telling the label will need."""
        put = self.pending.put
        put("row", slots, rows[ROW].to_numpy())
        put("time", slots, rows[TIME].to_numpy())
        for stage in self.stages:
            if stage.key is not None and "key:" + stage.key not in self.pending.columns:
                put("key:" + stage.key, slots, np.empty(len(slots), object))
        for name in {stage.key for stage in self.stages if stage.key is not None}:
            put("key:" + name, slots, rows[name].to_numpy())
        label = self.config.label
        if label is None:
            return
        put("label", slots, rows[LABEL].to_numpy())
        due = np.full(len(slots), np.inf) if label.id is not None else rows[DUE].to_numpy().astype(np.float64)
        due = np.where(np.isnan(due) | np.isnan(rows[LABEL].to_numpy()), np.inf, due)
        if label.id is not None:
            ids = rows[ID].to_pylist()
            column = np.empty(len(slots), object)
            column[:] = ids
            put("id", slots, column)
            self.pending.by_id.update(zip(ids, slots.tolist()))
        elif label.expire is not None:
            due = np.where(due - rows[TIME].to_numpy() > label.expire, np.inf, due)
        put("due", slots, due)
        for name in self.typed.targets:
            put("target:" + name, slots, rows[name].to_numpy().astype(np.float64))
        for name in self._shown_later():
            column = np.empty(len(slots), object)
            column[:] = rows[name].to_pylist()
            put("shown:" + name, slots, column)

    def _shown_later(self) -> list[str]:
        report = self.config.report
        return [name for name in dict.fromkeys((report.by, report.worst)) if name is not None]

    def _tells(self, told: pa.Table | None, now: float):
        """Open predictions whose label is known at `now`: slots, times, whether they precede questions, order."""
        pending, label = self.pending, self.config.label
        if label is None:
            return np.zeros(0, np.int64), np.zeros(0), np.zeros(0, bool), np.zeros(0)
        if label.id is None:
            tell = np.flatnonzero(pending.live & (pending["due"] <= now) & np.isfinite(pending["due"]))
            asked, due = pending["time"][tell], pending["due"][tell]
            # Known at once, or before it was asked: told right after its own question.
            return tell, np.maximum(due, asked), due > asked, pending["row"][tell] + 0.5
        if told is None or not told.num_rows:
            return np.zeros(0, np.int64), np.zeros(0), np.zeros(0, bool), np.zeros(0)
        found: dict[int, int] = {}
        for i, (key, row) in enumerate(zip(told[ID].to_pylist(), told[ROW].to_pylist())):
            slot = pending.by_id.get(key)
            if slot is None or slot in found:
                self.counts["unknown"] += 1
                self.unknown.add(row)
            else:
                found[slot] = i
        tell = np.fromiter(found, np.int64, len(found))
        index = pa.array(list(found.values()), pa.int64())
        mine = told.take(index)
        pending.put("label", tell, mine[LABEL].to_numpy())
        for name in self.typed.targets:
            pending.put("target:" + name, tell, mine[name].to_numpy().astype(np.float64))
        return tell, mine[TIME].to_numpy(), np.zeros(len(tell), bool), mine[ROW].to_numpy().astype(np.float64)

    def _stages(self, rows, ask_slots, slot, is_tell, when, ask_order) -> Any:
        """Run every stage over the operations; returns what the last one answered to the questions, in their order."""
        pending, label = self.pending, self.config.label
        outputs: dict[str, np.ndarray] = {}
        asks = np.flatnonzero(~is_tell)
        answer: Any = None
        for stage in self.stages:
            parts = []
            for name in stage.config.inputs:
                part = (
                    outputs[name] if name in outputs else rows[name].to_numpy()[:, None] if rows is not None else None
                )
                if part is not None:
                    parts.append(part)
            memo = "x:" + stage.name
            if len(ask_slots):
                x = (
                    np.concatenate(parts, axis=1, dtype=np.float32)
                    if parts
                    else np.zeros((len(ask_slots), 0), np.float32)
                )
                pending.put(memo, ask_slots, x)
            x = pending[memo][slot]
            if label is not None:
                names = ["target:" + name for name in stage.config.targets]
                columns = [pending[name][slot] for name in names] or [pending["label"][slot]]
                target = np.stack(columns, axis=1) if names else columns[0]
                dtype = np.float32 if self.kind == "value" or names else np.int32
                hidden = is_tell if target.ndim == 1 else is_tell[:, None]
                target = np.where(hidden, target, 0).astype(
                    dtype
                )  # not even as padding may a stage see it before its time
            else:
                target = np.zeros(len(slot), np.float32)
            given: Any = x
            if stage.config.time:
                assert self.start is not None
                given = Timed(np.clip(when - self.start, 0, 2**31 - 1).astype(np.int32), x)
            event = Event(given, Maybe(target, is_tell), np.ones(len(slot), np.float32))
            keys = pa.array(pending["key:" + stage.key][slot]) if stage.key is not None else [0] * len(slot)
            begin = time.perf_counter()
            answer = stage.keyed(keys, event)
            stage.spent.add(time.perf_counter() - begin, len(slot))
            answer = jax.tree.map(lambda leaf: _in_order(leaf[asks], ask_order), answer)
            if rows is not None:
                shown = None if stage.key is None else rows[stage.key]
                self.alarms.look(stage.name, answer, rows[TIME].to_numpy(), shown)
            outputs[stage.name] = np.concatenate([_flat(leaf) for leaf in jax.tree.leaves(answer)], axis=1)
        return answer

    # What goes out

    def _emit(self, rows: pa.Table | None, ask_slots, told, told_when, answers) -> pa.Table | None:
        predictions = None
        if rows is not None and rows.num_rows:
            columns, point = _columns(answers, self.kind)
            self.pending.put("prediction", ask_slots, point)
            shown = {name: rows[name] for name in self.config.sink.columns}
            predictions = pa.table({"row": rows[ROW], "time": rows[TIME], **shown, **columns})
            self.sinks["predictions"].write(predictions)
        if not len(told):
            return predictions
        pending = self.pending
        target, prediction = pending["label"][told], pending["prediction"][told]
        shown = {name: pending["shown:" + name][told] for name in self._shown_later()}
        table = {"row": pending["row"][told], "time": told_when, "label": target, "prediction": prediction}
        self.sinks["outcomes"].write(pa.table({**table, **{name: pa.array(values) for name, values in shown.items()}}))
        asked = pending["time"][told]
        good = np.isfinite(prediction)
        if self.after is not None:
            good &= asked >= self.after
        shown = {name: values[good] for name, values in shown.items()}
        raised = self.quality.add(asked[good], told_when[good], target[good], prediction[good], shown)
        for group, found in raised.items():
            self.alarms.judge(group, found)
        return predictions

    # Checkpoints

    def _fingerprint(self) -> str:
        server = {"url", "group", "idle", "linger"}  # it may move between a run and the one that resumes it
        rest = dict.fromkeys(("out", "checkpoint", "report", "serve"), True)
        said = self.config.model_dump(mode="json", exclude={**rest, "source": server, "sink": {"url"}})
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()

    def checkpoint(self, finished: bool = False) -> None:
        """Make the outputs durable, and begin to save all else."""
        self.checkpoints.wait()  # the arrays that it still writes are about to be written to
        positions = {name: sink.position() for name, sink in self.sinks.items()}
        arrays: dict[str, Any] = {}
        everything = self.checkpoints.wants_everything
        for stage in self.stages:
            saved = stage.keyed.everything() if everything else stage.keyed.changed()
            keys = partial(pack_keys, saved.keys)
            arrays[f"stage/{stage.name}"] = {
                "named": saved.named, "keys": keys, "gone": saved.gone, "numbers": saved.numbers, "rows": saved.rows
            }  # fmt: skip
        numbers, other = self.pending.save()
        arrays["pending"] = {"numbers": numbers, "other": pack_table(other)}
        for name, table in (("queue", self.queue), ("held", self.ordered.held)):
            if table is not None:
                arrays[name] = pack_table(table)
        arrays["quality"], names = self.quality.save()
        arrays["pace"] = np.array(self.pace).reshape(len(self.pace), 3)
        meta = {
            "pipeline": self._fingerprint(), "position": self.position, "sinks": positions, "start": self.start,
            "newest": self.ordered.newest if np.isfinite(self.ordered.newest) else None, "counts": dict(self.counts),
            "seconds": self.seconds, "values": names, "finished": finished, "batches": self.batches,
            "source": None if self.broker is None else self.broker.position(), "alarms": self.alarms.save(),
        }  # fmt: skip
        self.checkpoints.save(arrays, meta)
        self._unacknowledged = meta["source"]

    def _restore(self) -> bool:
        """Take over the last checkpoint and cut the outputs back to it; returns whether that run had finished."""
        chain = self.checkpoints.load()
        if chain is None:
            for sink in self.sinks.values():
                sink.rewind(0)
            return False
        arrays, meta = chain[-1]
        if meta["pipeline"] != self._fingerprint():
            raise ConfigError(
                f"{self.out}: the checkpoints there are of a pipeline with other stages or another source"
            )
        for link, _ in chain:
            for stage in self.stages:
                saved: Any = link[f"stage/{stage.name}"]
                names = unpack_keys(saved["keys"])
                stage.keyed.restore(Rows(saved["named"], names, saved["gone"], saved["numbers"], saved["rows"]))
        state: Any = arrays
        self.pending.load(state["pending"]["numbers"], unpack_table(state["pending"]["other"]))
        self.queue = unpack_table(state["queue"]) if "queue" in state else None
        self.ordered.held = unpack_table(state["held"]) if "held" in state else None
        self.ordered.newest = -np.inf if meta["newest"] is None else meta["newest"]
        self.quality.load(state["quality"], meta["values"])
        self.alarms.load(meta["alarms"])
        self.pace = [tuple(row) for row in state["pace"].tolist()]
        self.position, self.start, self.counts = meta["position"], meta["start"], dict(meta["counts"])
        self.seconds, self.batches = meta["seconds"], meta["batches"]
        for name, sink in self.sinks.items():
            sink.rewind(meta["sinks"][name])
        if self.broker is not None:
            self.broker.seek(meta["source"])
        return bool(meta["finished"])


def _flat(values: Any) -> np.ndarray:
    values = np.asarray(values, np.float32)
    return values.reshape(len(values), math.prod(values.shape[1:]))


def _in_order(values: np.ndarray, order: np.ndarray) -> np.ndarray:
    out = np.empty_like(values)
    out[order] = values
    return out


def _columns(answer: Any, kind: str) -> tuple[dict[str, Any], np.ndarray]:
    """The columns of the sink for some answers, and the one number of each that is scored."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(answer)
    if len(leaves) == 1:
        value = np.asarray(leaves[0][1])
        if value.ndim == 1:
            return {"prediction": pa.array(value)}, value.astype(np.float64)
        if value.ndim == 2 and kind in ("binary", "classes"):
            best = value[:, -1] if kind == "binary" else value.argmax(1)
            scores = {f"score_{c}": pa.array(value[:, c]) for c in range(value.shape[1])}
            return {"prediction": pa.array(best), **scores}, best.astype(np.float64)
    columns = {}
    for path, leaf in leaves:
        value = np.asarray(leaf)
        name = jax.tree_util.keystr(path).strip(".[]'") or "prediction"
        if value.ndim == 1:
            columns[name] = pa.array(value)
        else:
            columns |= {f"{name}_{i}": pa.array(part) for i, part in enumerate(value.reshape(len(value), -1).T)}
    first = np.asarray(leaves[0][1])
    return columns, (first if first.ndim == 1 else first.reshape(len(first), -1)[:, 0]).astype(np.float64)
