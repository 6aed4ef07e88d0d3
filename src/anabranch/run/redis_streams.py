"""Redis Streams: a source that follows a stream, and a sink that adds to one. Needs Redis 7 or later."""

import json
from typing import Any

import pyarrow as pa

from anabranch.run.brokers import log, persist, unreachable


def _client(url: str, where: str) -> tuple[Any, tuple[type[Exception], ...], type[Exception]]:
    """A client, the errors of a server that is away, and the error of a command that it refuses."""
    try:
        import redis
    except ImportError as error:
        raise ImportError("a redis source or sink needs a library: pip install 'anabranch[redis]'") from error
    client = redis.Redis.from_url(url, protocol=2, socket_timeout=10, retry=None)
    try:
        client.ping()
    except redis.RedisError as error:
        raise unreachable(where, url, error) from None
    return client, (redis.ConnectionError, redis.TimeoutError), redis.ResponseError


class RedisSource:
    """The entries of a stream, in order; the field `data` of each holds a JSON object.

    The stream is read by id, from where the last checkpoint left off, whatever the group believes has been delivered.
    The group is for those who watch: it stands where the last durable checkpoint does, so its `lag` is the number of
    entries that are not yet safely used. It has no pending entries.

    Arguments:
        url: such as `redis://localhost:6379/0`.
        stream: its key; it need not exist yet.
        group: of the stream; made when it is not there.

    Raises:
        ConfigError: if there is no server.
    """

    ordered = True

    def __init__(self, url: str, stream: str, group: str):
        self._client, self.errors, self._refused = _client(url, "source")
        self._stream, self._group = stream, group
        try:
            self._client.xgroup_create(stream, group, id="0", mkstream=True)
        except self._refused as error:
            if not str(error).startswith("BUSYGROUP"):
                raise
        info = self._client.xinfo_stream(stream)
        self._id = "0-0"
        self._read = info.get("entries-added", info["length"]) - info["length"]  # what was trimmed counts as read

    def read(self, most: int, wait: float) -> list[bytes]:
        found = self._client.xread({self._stream: self._id}, count=most, block=max(1, round(wait * 1000)))
        entries = found[0][1] if found else []
        if entries:
            self._id = entries[-1][0].decode()
            self._read += len(entries)
        # An entry without the field is shown as it is; that is no JSON object.
        return [fields.get(b"data", repr(fields).encode()) for _, fields in entries]

    def position(self) -> dict[str, Any]:
        return {"id": self._id, "read": self._read}

    def seek(self, position: dict[str, Any]) -> None:
        self._id, self._read = position["id"], position["read"]

    def commit(self, position: dict[str, Any]) -> None:
        self._client.execute_command(
            "XGROUP", "SETID", self._stream, self._group, position["id"], "ENTRIESREAD", position["read"]
        )

    def close(self) -> None:
        self._client.close()


class RedisSink:
    """A stream of rows: entry `n-0` is the n-th row, as a JSON object in the field `data`.

    An id says which row it is, so that none can be added twice. Cutting back deletes what follows a position; those
    entries come again under the same ids, and whoever reads by id or with a group gets each id once.

    Arguments:
        url: such as `redis://localhost:6379/0`.
        stream: its key. Nothing else may write to it.

    Raises:
        ConfigError: if there is no server.
    """

    def __init__(self, url: str, stream: str):
        self._client, self._away, self._refused = _client(url, "sink")
        self._stream, self._last = stream, 0

    def write(self, table: pa.Table) -> None:
        rows = [json.dumps(row, default=str) for row in table.to_pylist()]
        persist(lambda: self._add(rows), self._away)
        self._last += len(rows)

    def _add(self, rows: list[str]) -> None:
        with self._client.pipeline() as pipe:
            for number, row in enumerate(rows, self._last + 1):
                pipe.xadd(self._stream, {"data": row}, id=f"{number}-0")
            for answer in pipe.execute(raise_on_error=False):
                # Added by an earlier try, whose answer the connection lost.
                if isinstance(answer, Exception) and "equal or smaller" not in str(answer):
                    raise answer

    def position(self) -> int:
        return self._last

    def rewind(self, position: int) -> None:
        if position == 0:
            self._client.delete(self._stream)
        while more := self._client.xrange(self._stream, min=f"({position}-0", count=1000):
            self._client.xdel(self._stream, *(name for name, _ in more))
        if position and self._client.exists(self._stream):
            last = int(self._client.xinfo_stream(self._stream)["last-generated-id"].decode().partition("-")[0])
            if last < position:
                log.warning("sink: the stream %s has lost the rows after its entry %d-0", self._stream, last)
            self._client.execute_command(
                "XSETID", self._stream, f"{position}-0", "ENTRIESADDED", position, "MAXDELETEDID", "0-0"
            )
        self._last = position

    def close(self) -> None:
        self._client.close()

    def abandon(self) -> None:
        self._client.close()
