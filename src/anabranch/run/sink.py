"""Sinks: append-only outputs that can be cut back to a position, which is what makes a resumed run exact.

`position()` makes everything written so far durable and returns where it ends; `rewind(position)` forgets what came
after it.
"""

import contextlib
import json
import os
import shutil
import sqlite3
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from anabranch.run.config import SinkConfig


class Sink(Protocol):
    """An output of tables with one schema. Positions are JSON; position 0 is the beginning of a run."""

    def write(self, table: pa.Table) -> None: ...
    def position(self) -> Any: ...
    def rewind(self, position: Any) -> None: ...
    def close(self) -> None: ...
    def abandon(self) -> None:
        """Let go without making anything durable: the run has failed, and will go on from its last checkpoint."""
        ...


def sync(path: Path) -> None:
    """Make a file, or what files a folder holds, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class ParquetSink:
    """A folder of Parquet files, read as one (`pyarrow.parquet.read_table`). A position is a number of files."""

    def __init__(self, path: Path):
        self.folder = path
        self.folder.mkdir(parents=True, exist_ok=True)
        self._part = 0
        self._writer: pq.ParquetWriter | None = None

    def _file(self, part: int) -> Path:
        return self.folder / f"part-{part:06d}.parquet"

    def write(self, table: pa.Table) -> None:
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._file(self._part), table.schema, compression="zstd")
        self._writer.write_table(table)

    def position(self) -> int:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
            sync(self._file(self._part))
            sync(self.folder)
            self._part += 1
        return self._part

    def rewind(self, position: int) -> None:
        for file in self.folder.glob("part-*.parquet"):
            if int(file.stem.removeprefix("part-")) >= position:
                file.unlink()
        self._part = position

    def close(self) -> None:
        self.position()

    def abandon(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            with contextlib.suppress(OSError):
                writer.close()


class TextSink:
    """One CSV or JSON Lines file. A position is a length in bytes."""

    def __init__(self, path: Path, format: str):
        self.path, self.format = path, format
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "ab")

    def write(self, table: pa.Table) -> None:
        if self.format == "csv":
            options = pyarrow.csv.WriteOptions(include_header=self._file.tell() == 0)
            pyarrow.csv.write_csv(table, self._file, options)
        else:
            self.write_rows(table.to_pylist())

    def write_rows(self, rows: list[dict[str, Any]]) -> None:
        self._file.write("".join(json.dumps(row, default=str) + "\n" for row in rows).encode())

    def position(self) -> int:
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def rewind(self, position: int) -> None:
        self._file.truncate(position)
        self._file.seek(position)

    def close(self) -> None:
        self.position()
        self._file.close()

    def abandon(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()


class SqliteSink:
    """A table of a SQLite file. A position is a row number."""

    def __init__(self, path: Path, table: str):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._db, self._table, self._made = sqlite3.connect(path), table, False

    def write(self, table: pa.Table) -> None:
        names = ", ".join(f'"{name}"' for name in table.column_names)
        if not self._made:
            self._db.execute(f'CREATE TABLE IF NOT EXISTS "{self._table}" ({names})')
            self._made = True
        marks = ", ".join("?" * table.num_columns)
        rows = zip(*(column.to_pylist() for column in table.columns))
        self._db.executemany(f'INSERT INTO "{self._table}" ({names}) VALUES ({marks})', rows)

    def _exists(self) -> bool:
        found = self._db.execute("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?", (self._table,))
        return found.fetchone() is not None

    def position(self) -> int:
        self._db.commit()
        if not self._exists():
            return 0
        return self._db.execute(f'SELECT coalesce(max(rowid), 0) FROM "{self._table}"').fetchone()[0]

    def rewind(self, position: int) -> None:
        if self._exists():
            self._db.execute(f'DELETE FROM "{self._table}" WHERE rowid > ?', (position,))
            self._db.commit()

    def close(self) -> None:
        self.position()
        self._db.close()

    def abandon(self) -> None:
        self._db.close()


def open_sink(folder: Path, name: str, config: SinkConfig) -> Sink:
    """The sink of one output of a pipeline.

    Raises:
        ConfigError: if its server cannot be reached.
        ImportError: if the library that speaks to it is not installed.
    """
    match config.format:
        case "parquet":
            return ParquetSink(folder / name)
        case "sqlite":
            return SqliteSink(folder / f"{name}.sqlite", name)
        case "redis":
            from anabranch.run.redis_streams import RedisSink

            assert config.url is not None
            return RedisSink(config.url, f"{config.stream}:{name}")
        case "kafka":
            from anabranch.run.kafka import KafkaSink

            assert config.url is not None
            return KafkaSink(config.url, f"{config.topic}.{name}")
        case "postgres":
            from anabranch.run.postgres import PostgresSink

            assert config.url is not None
            return PostgresSink(config.url, f"{config.table}_{name}")
        case _:
            return TextSink(folder / f"{name}.{config.format}", config.format)


def clear(folder: Path) -> None:
    """Remove what an earlier run of a pipeline has left in its folder of outputs."""
    for name in ("predictions", "outcomes", "dead_letters", "checkpoints"):
        for path in [folder / name, *folder.glob(f"{name}.*")]:
            if path.is_dir():
                shutil.rmtree(path)
            elif path.exists():
                path.unlink()
