"""Sources: rows as Arrow tables, in blocks, with the rows that could not be read beside them."""

import csv as csv_module
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

BLOCK = 65_536


class Bad(NamedTuple):
    """A row that cannot be used: its number in the source, why, and what it said."""

    row: int
    reason: str
    raw: Any


class Block(NamedTuple):
    """Some rows of a source. Their numbers count from 0 over good and bad rows alike."""

    table: pa.Table
    rows: np.ndarray
    bad: list[Bad]


def tables(source: Iterable | pa.Table, first: int = 0) -> Iterator[Block]:
    """Rows from a Table, or from an iterable of Tables, record batches or dicts, numbered from `first` on."""
    if isinstance(source, (pa.Table, pa.RecordBatch)):
        source = cast(Iterable, [source])
    held = []
    for item in source:
        if isinstance(item, pa.RecordBatch):
            item = pa.Table.from_batches([item])
        if isinstance(item, pa.Table):
            for start in range(0, item.num_rows, BLOCK):
                cut = item.slice(start, BLOCK)
                yield Block(cut, np.arange(first, first + cut.num_rows), [])
                first += cut.num_rows
        elif isinstance(item, dict):
            held.append(item)
            if len(held) == BLOCK:
                yield records(held, first)
                first, held = first + len(held), []
        else:
            raise TypeError(f"a source gives Tables, record batches or dicts, got {type(item).__name__}")
    if held:
        yield records(held, first)


def parquet(path) -> Iterator[Block]:
    """Rows of a Parquet file."""
    with pq.ParquetFile(path) as file:
        yield from tables(file.iter_batches(BLOCK))


def csv(file: BinaryIO) -> Iterator[Block]:
    """Rows of a CSV file with a header; all values are text until a stage asks for numbers."""
    bad: list[Bad] = []

    def skip(row):
        bad.append(Bad(row.number - 1, f"expected {row.expected_columns} columns, got {row.actual_columns}", row.text))
        return "skip"

    names = next(csv_module.reader([file.readline().decode("utf-8-sig")]), [])
    if not names:
        return
    reader = pyarrow.csv.open_csv(
        file,
        read_options=pyarrow.csv.ReadOptions(use_threads=False, block_size=4 << 20, column_names=names),
        parse_options=pyarrow.csv.ParseOptions(invalid_row_handler=skip),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types={name: pa.string() for name in names}, strings_can_be_null=True, null_values=["", "NA", "NaN"]
        ),
    )
    first = 0
    for batch in reader:
        here, bad = bad, []
        total = batch.num_rows + len(here)
        rows = np.setdiff1d(np.arange(first, first + total), [b.row for b in here], assume_unique=True)
        yield Block(pa.Table.from_batches([batch]), rows, here)
        first += total


def jsonl(lines: Iterable[str | bytes]) -> Iterator[Block]:
    """Rows from JSON Lines."""
    held, bad, numbers, first = [], [], [], 0
    for number, line in enumerate(lines):
        text = line.decode(errors="replace") if isinstance(line, bytes) else line
        if not text.strip():
            continue
        try:
            row = json.loads(text)
            if not isinstance(row, dict):
                raise ValueError(f"expected an object, got {type(row).__name__}")
            if "\\u" in text:  # JSON may hold half of a surrogate pair, which is no text
                json.dumps(row, ensure_ascii=False).encode()
            held.append(row)
            numbers.append(number)
        except (ValueError, RecursionError) as error:
            bad.append(Bad(number, f"not a JSON object: {error}", text.rstrip("\n")))
        if len(held) + len(bad) >= BLOCK:
            yield records(held, first, numbers, bad)
            held, bad, numbers = [], [], []
    if held or bad:
        yield records(held, first, numbers, bad)


def stdin(format: str) -> Iterator[Block]:
    """Rows from standard input."""
    return jsonl(sys.stdin.buffer) if format == "jsonl" else csv(sys.stdin.buffer)


def records(rows: list[dict], first: int, numbers: list[int] | None = None, bad: list[Bad] | None = None) -> Block:
    """Rows from dicts; they are numbered from `first` on, or by `numbers`."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {}
    for name in names:
        values = [row.get(name) for row in rows]
        try:
            columns[name] = pa.array(values)
        # Mixed types: text, and a stage that wants numbers will say which.
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
            columns[name] = pa.array(
                [None if v is None else v if isinstance(v, str) else json.dumps(v) for v in values]
            )
    at = np.arange(first, first + len(rows)) if numbers is None else np.array(numbers, np.int64)
    return Block(pa.table(columns), at, bad or [])


def open_source(config, call: Callable | None) -> Iterator[Block]:
    """The blocks of the source that a pipeline file names."""
    match config.kind:
        case "python":
            assert call is not None
            return tables(call())
        case "parquet":
            return parquet(config.path)
        case "csv":
            return _opened(config.path, csv)
        case "jsonl":
            return _opened(config.path, jsonl)
        case _:
            return stdin(config.format)


def _opened(path, rows: Callable) -> Iterator[Block]:
    with open(path, "rb") as file:
        yield from rows(file)
