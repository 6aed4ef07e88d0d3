"""Live streams of messages: read as they come, read again from where a checkpoint left off."""

import json
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import numpy as np
import pyarrow as pa

from anabranch.run.config import ConfigError, SourceConfig
from anabranch.run.source import Bad, Block

log = logging.getLogger("anabranch.brokers")
_TICK = 0.2  # seconds of waiting, after which a pipeline looks whether a checkpoint is due or it is told to stop
_LONGEST = 2.0  # seconds between two tries to reach a server
T = TypeVar("T")


class Broker(Protocol):
    """A stream of messages in one order, kept by a server, that can be read again from any position."""

    errors: tuple[type[Exception], ...]
    """What is raised while the server is away."""
    ordered: bool
    """Whether messages come in the same order when they are read again."""

    def read(self, most: int, wait: float) -> list[bytes]:
        """The next messages, at most so many; waits for the first one at most `wait` seconds."""
        ...

    def position(self) -> Any:
        """Where the next read begins, as JSON."""
        ...

    def seek(self, position: Any) -> None:
        """Read from a position."""
        ...

    def commit(self, position: Any) -> None:
        """Tell the server that a checkpoint holds all that comes before a position."""
        ...

    def close(self) -> None: ...


def open_broker(config: SourceConfig) -> Broker | None:
    """The live stream that a pipeline file names, or None if its source is of another kind.

    Raises:
        ConfigError: if the server cannot be reached.
        ImportError: if the library that speaks to it is not installed.
    """
    if config.kind == "redis":
        from anabranch.run.redis_streams import RedisSource

        assert config.url is not None and config.stream is not None and config.group is not None
        return RedisSource(config.url, config.stream, config.group)
    if config.kind == "kafka":
        from anabranch.run.kafka import KafkaSource

        assert config.url is not None and config.topic is not None and config.group is not None
        return KafkaSource(config.url, config.topic, config.group)
    return None


def blocks(
    broker: Broker,
    config: SourceConfig,
    columns: Sequence[str],
    first: int,
    most: int,
    limit: int | None,
    stopped: Callable[[], bool],
) -> Iterator[Block]:
    """Messages as they come, and an empty block every now and then while none come.

    Arguments:
        broker: the stream, at row `first`.
        columns: those that every block has.
        most: rows in a block; one with fewer is given `config.linger` seconds after its first row came.
        limit: rows in all, counted from 0; when they have been given, only empty blocks follow.
        stopped: whether to end.
    """
    last = time.monotonic()
    while not stopped():
        room = most if limit is None else min(most, limit - first)
        found: list[bytes] = []
        wait, until = _TICK, None
        while len(found) < room and not stopped() and wait > 0:
            left, pause = room - len(found), wait
            tried = time.monotonic()
            found += persist(lambda: broker.read(left, pause), broker.errors, stopped) or []
            now = time.monotonic()
            last += max(0.0, now - tried - pause)  # the time that a server is away is no idle time
            if not found:
                break
            until = now + config.linger if until is None else until
            wait = until - now
        yield parse(found, first, columns)
        first += len(found)
        if found:
            last = time.monotonic()
        elif room and config.idle is not None and time.monotonic() - last >= config.idle:
            return


def parse(messages: Sequence[bytes], first: int, columns: Sequence[str]) -> Block:
    """A block of messages that each should be a JSON object.

    Values are text, as in a CSV file, until a stage asks for numbers: the type of a column must not depend on which
    messages happen to come together. The table has these `columns` even where no message does.
    """
    rows, numbers, bad = [], [], []
    for number, message in enumerate(messages, first):
        try:
            row = json.loads(message)
            if not isinstance(row, dict):
                raise ValueError(f"expected an object, got {type(row).__name__}")
            rows.append({_encodable(name): _text(value) for name, value in row.items()})
            numbers.append(number)
        except (ValueError, RecursionError) as error:
            bad.append(Bad(number, f"not a JSON object: {error}", message.decode(errors="replace")))
    names = dict.fromkeys([*columns, *(name for row in rows for name in row)])
    table = pa.table({name: pa.array([row.get(name) for row in rows], pa.string()) for name in names})
    return Block(table, np.array(numbers, np.int64), bad)


def _text(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, bool):
        value = int(value)
    return _encodable(value if isinstance(value, str) else json.dumps(value))


def _encodable(text: str) -> str:
    text.encode()  # JSON may hold half of a surrogate pair, which is no text
    return text


def persist(call: Callable[[], T], errors: tuple[type[Exception], ...], stopped=lambda: False) -> T | None:
    """What `call` gives. While it raises one of these errors it is tried again, less and less often.

    Returns None if `stopped` before it succeeded.
    """
    wait = 0.1
    while True:
        try:
            return call()
        except errors as error:
            if stopped():
                return None
            log.warning("a server is away, trying again in %.1f s: %s", wait, str(error).strip())
            time.sleep(wait)
            wait = min(2 * wait, _LONGEST)


def unreachable(where: str, url: str, error: Exception) -> ConfigError:
    """The error of a server that is not there when a run begins; passwords in its URL are left out."""
    name = url.rpartition("@")[2]
    return ConfigError(f"{where}.url: there is no server at {name}: {str(error).strip()}")


@contextmanager
def stops() -> Iterator[Callable[[], bool]]:
    """Whether the process has been asked to end by SIGINT or SIGTERM. A second signal is not waited for."""
    asked = False
    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield lambda: asked
        return

    def ask(number, frame):
        nonlocal asked
        asked = True
        for name, handler in before.items():
            signal.signal(name, handler)

    before = {name: signal.signal(name, ask) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
