"""PostgreSQL: a sink that writes rows to a table."""

from typing import Any

import pyarrow as pa

from anabranch.run.brokers import persist, unreachable


def _psycopg() -> Any:
    try:
        import psycopg
    except ImportError as error:
        raise ImportError("a postgres sink needs a library: pip install 'anabranch[postgres]'") from error
    return psycopg


class PostgresSink:
    """A table of rows, numbered by its primary key `seq` from 1. Each micro-batch is one transaction.

    The table is made when the first row is written. A row that is written again, because the connection broke before
    the server's answer came, is left as it is; cutting back deletes the rows after a position.

    Arguments:
        url: such as `postgresql://user@localhost/shop`.
        table: its name. Nothing else may write to it.

    Raises:
        ConfigError: if there is no server, or it lets nobody in.
    """

    def __init__(self, url: str, table: str):
        psycopg = _psycopg()
        self._url, self._sql, self._connect = url, psycopg.sql, psycopg.connect
        self._away = (psycopg.OperationalError, psycopg.InterfaceError)
        self._table = self._sql.Identifier(table)
        self._last, self._made = 0, False
        try:
            self._db = self._connect(url, autocommit=True)
        except psycopg.OperationalError as error:
            raise unreachable("sink", url, error) from None

    def _connection(self) -> Any:
        if self._db.closed:
            self._db = self._connect(self._url, autocommit=True)
        return self._db

    def write(self, table: pa.Table) -> None:
        columns = [_plain(column) for column in table.columns]
        rows = list(zip(range(self._last + 1, self._last + table.num_rows + 1), *columns))
        persist(lambda: self._insert(table.schema, rows), self._away)
        self._made = True
        self._last += len(rows)

    def _insert(self, schema: pa.Schema, rows: list[tuple]) -> None:
        db, sql = self._connection(), self._sql
        with db.transaction(), db.cursor() as cursor:
            if not self._made:
                kinds = [
                    sql.SQL("{} {}").format(sql.Identifier(field.name), sql.SQL(_kind(field.type))) for field in schema
                ]
                cursor.execute(
                    sql.SQL("CREATE TABLE IF NOT EXISTS {} (seq bigint PRIMARY KEY, {})").format(
                        self._table, sql.SQL(", ").join(kinds)
                    )
                )
            names = sql.SQL(", ").join(map(sql.Identifier, ["seq", *schema.names]))
            marks = sql.SQL(", ").join(sql.Placeholder() * (len(schema.names) + 1))
            cursor.executemany(
                sql.SQL("INSERT INTO {} ({}) VALUES ({}) ON CONFLICT (seq) DO NOTHING").format(
                    self._table, names, marks
                ),
                rows,
            )

    def position(self) -> int:
        return self._last

    def rewind(self, position: int) -> None:
        found = self._db.execute("SELECT to_regclass(%s)", (self._table.as_string(self._db),)).fetchone()
        if found[0] is not None:
            self._db.execute(self._sql.SQL("DELETE FROM {} WHERE seq > %s").format(self._table), (position,))
        self._last = position

    def close(self) -> None:
        self._db.close()

    def abandon(self) -> None:
        self._db.close()


def _kind(kind: pa.DataType) -> str:
    if pa.types.is_boolean(kind):
        return "boolean"
    if pa.types.is_integer(kind):
        return "bigint"
    if pa.types.is_float32(kind):
        return "real"
    return "double precision" if pa.types.is_floating(kind) else "text"


def _plain(column: pa.ChunkedArray) -> list[Any]:
    """A column's values, with all that is no number as text without the one character that PostgreSQL refuses."""
    values = column.to_pylist()
    if _kind(column.type) != "text":
        return values
    return [None if value is None else str(value).replace("\0", "\ufffd") for value in values]
