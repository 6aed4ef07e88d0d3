"""From the rows of a source to typed rows in event-time order; what cannot be used comes out as dead letters."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from anabranch.run.config import ConfigError, PipelineConfig
from anabranch.run.source import Bad, Block

pc: Any = pyarrow.compute  # its functions are made at run time, where no type checker sees them

ROW, TIME, DUE, LABEL, ID = "#row", "#time", "#due", "#label", "#id"
"""Columns of typed rows that are not columns of the source."""


def key_column(columns: Iterable[str]) -> str:
    """The column of typed rows that holds the keys made of these columns of the source."""
    return "#key:" + "|".join(columns)


class Typed:
    """Checks rows and gives them types: numbers for inputs and targets, keys and other columns as they are."""

    def __init__(self, config: PipelineConfig):
        self.config = config
        stages = {stage.name for stage in config.stage}
        label = config.label
        self.inputs = list(dict.fromkeys(n for s in config.stage for n in s.inputs if n not in stages))
        self.targets = list(dict.fromkeys(n for s in config.stage for n in s.targets))
        self.keys = list(dict.fromkeys(tuple(s.columns) for s in config.stage if s.key))
        shown = [*config.sink.columns, config.report.by, config.report.worst]
        self.shown = list(dict.fromkeys(n for n in shown if n is not None))
        special = [config.source.time] + ([] if label is None else [label.column, label.time, label.id])
        wanted = [*special, *self.inputs, *self.targets, *self.shown, *(n for key in self.keys for n in key)]
        self.wanted = list(dict.fromkeys(n for n in wanted if n is not None))

    def __call__(self, block: Block) -> tuple[pa.Table, list[Bad]]:
        """The good rows of a block, typed, and the bad ones."""
        table, config = block.table, self.config
        missing = [name for name in self.wanted if name not in table.column_names]
        if missing:
            have = ", ".join(table.column_names)
            sparse = config.source.kind in ("jsonl", "stdin") or (config.label is not None and config.label.id)
            if not sparse or config.source.time in missing:
                raise ConfigError(f"the source has no column {missing[0]!r}; it has {have}")
            for name in missing:  # JSON rows may leave out what is empty
                table = table.append_column(name, pa.nulls(len(table), pa.string()))
        n = len(table)
        reasons: list[str | None] = [None] * n
        good = np.ones(n, bool)
        optional = set(config.source.optional) | set(self.targets)
        label = config.label

        def refuse(mask: np.ndarray, reason):
            for i in np.flatnonzero(mask & good).tolist():
                reasons[i] = reason(i)
            good[mask] = False

        def number(name: str, empty_is_fine: bool, needed: np.ndarray | None = None) -> np.ndarray:
            values, wrong = _numbers(table[name])
            refuse(wrong, lambda i: f"{name}: {table[name][i].as_py()!r} is not a finite number")
            if not empty_is_fine:
                empty = np.isnan(values) if needed is None else np.isnan(values) & needed
                refuse(empty, lambda i: f"{name}: empty")
            return values

        columns: dict[str, Any] = {ROW: block.rows, TIME: number(config.source.time, False)}
        asks = np.ones(n, bool)
        if label is not None:
            columns[LABEL] = number(label.column, True)
            if label.id is not None:
                asks = np.isnan(columns[LABEL])
                refuse(_nulls(table[label.id]), lambda i: f"{label.id}: empty")
                columns[ID] = table[label.id]
            if label.kind == "binary":
                odd = ~np.isnan(columns[LABEL]) & ~np.isin(columns[LABEL], (0, 1))
                refuse(odd, lambda i: f"{label.column}: {columns[LABEL][i]:g} is not 0 or 1")
            elif label.kind == "classes":
                odd = ~np.isnan(columns[LABEL]) & ((columns[LABEL] < 0) | (columns[LABEL] % 1 != 0))
                refuse(odd, lambda i: f"{label.column}: {columns[LABEL][i]:g} is not a class number")
            columns[DUE] = columns[TIME] if label.time is None else number(label.time, True)
        for name in self.inputs:
            columns[name] = number(name, name in optional, asks)
        for name in self.targets:
            columns[name] = number(name, True)
        for name in [*self.inputs, *self.targets]:
            huge = np.abs(columns[name]) > np.finfo(np.float32).max
            refuse(huge, lambda i, name=name: f"{name}: {columns[name][i]:g} is not a finite number of 32 bits")
        for key in self.keys:
            for name in key:
                refuse(_nulls(table[name]) & asks, lambda i, name=name: f"{name}: empty, and it is a key")
            parts = [table[name] for name in key]
            columns[key_column(key)] = (
                parts[0]
                if len(parts) == 1
                else pc.binary_join_element_wise(*(pc.cast(p, pa.string()) for p in parts), "|")
            )
        for name in self.shown:
            column = table[name]
            columns.setdefault(name, pc.cast(column, pa.string()) if pa.types.is_null(column.type) else column)
        typed = pa.table(columns)
        bad = list(block.bad)
        if not good.all():
            raw = block.table.filter(pa.array(~good)).to_pylist()
            bad += [Bad(int(block.rows[i]), str(reasons[i]), r) for i, r in zip(np.flatnonzero(~good).tolist(), raw)]
            typed = typed.filter(pa.array(good))
        return typed, bad


def _nulls(column: pa.ChunkedArray) -> np.ndarray:
    return np.asarray(pc.is_null(column).combine_chunks())


def _numbers(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """A column as float64 with NaN where it is empty, and where it is neither a finite number nor empty."""
    kind = column.type
    if pa.types.is_timestamp(kind):
        values = pc.cast(pc.cast(column, pa.timestamp("us", kind.tz)), pa.int64()).to_numpy() / 1e6
        return np.asarray(values, np.float64), np.zeros(len(column), bool)
    if pa.types.is_null(kind):
        return np.full(len(column), np.nan), np.zeros(len(column), bool)
    try:
        values = np.asarray(pc.cast(column, pa.float64()).to_numpy(), np.float64)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        values = np.empty(len(column))
        wrong = np.zeros(len(column), bool)
        for i, value in enumerate(column.to_pylist()):
            values[i], wrong[i] = number_of(value)
        return values, wrong
    wrong = np.isinf(values)
    return np.where(wrong, np.nan, values), wrong


def number_of(value: Any) -> tuple[float, bool]:
    """A number, or a date as seconds; NaN if there is none, and whether what is there is neither."""
    if value is None or value == "":
        return math.nan, False
    try:
        number = float(value)
    except (TypeError, ValueError):
        try:  # a date
            return float(np.datetime64(value.replace("Z", ""), "us").astype(np.int64)) / 1e6, False
        except (AttributeError, ValueError):
            return math.nan, True
    return (math.nan, True) if math.isinf(number) else (number, False)


class Ordered:
    """Rows in the order of their time: holds them back for `lateness` seconds, and refuses those that come later."""

    def __init__(self, lateness: float):
        self.lateness = lateness
        self.newest = -math.inf
        self.held: pa.Table | None = None

    def __call__(self, table: pa.Table) -> tuple[pa.Table, list[Bad]]:
        """Rows that are ready, in order, and those that came too late."""
        time = table[TIME].to_numpy()
        newest = np.maximum.accumulate(np.r_[self.newest, time])[:-1]
        late = time < newest - self.lateness
        bad = []
        if late.any():
            for i in np.flatnonzero(late).tolist():
                reason = f"late: its time is {newest[i] - time[i]:g} s before that of an earlier row"
                bad.append(Bad(table[ROW][i].as_py(), reason, table.slice(i, 1).to_pylist()[0]))
            table, time = table.filter(pa.array(~late)), time[~late]
        self.newest = max(self.newest, time.max(initial=-math.inf))
        if self.lateness == 0:
            return table, bad
        whole = table if self.held is None else pa.concat_tables([self.held, table], promote_options="permissive")
        time = whole[TIME].to_numpy()
        order = np.lexsort((whole[ROW].to_numpy(), time))
        ready = int((time <= self.newest - self.lateness).sum())
        self.held = whole.take(pa.array(order[ready:]))
        return whole.take(pa.array(order[:ready])), bad

    def rest(self) -> pa.Table | None:
        """What is still held back, at the end of the stream."""
        held, self.held = self.held, None
        return held


def seconds(text: str, where: str) -> float:
    """A date or a number of seconds, as seconds.

    Raises:
        ConfigError: if it is neither.
    """
    value, wrong = number_of(text)
    if wrong or math.isnan(value):
        raise ConfigError(f"{where}: expected a date or seconds, got {text!r}")
    return value


def blocks_from(source: Iterator[Block], position: int) -> Iterator[Block]:
    """The blocks of a source without its first `position` rows."""
    for block in source:
        last = max([block.rows[-1] if len(block.rows) else -1, *(b.row for b in block.bad)])
        if last < position:
            continue
        keep = block.rows >= position
        yield Block(block.table.filter(pa.array(keep)), block.rows[keep], [b for b in block.bad if b.row >= position])
