"""The load: connections that send their next message when the last is answered, with as little Python as can be.

Messages are prebuilt bytes, and of an answer only the length is read, except for some streams whose answers are kept.
"""

import asyncio
import gc
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import uvloop

CYCLE = 16
"""Each stream goes round as many inputs; stream i begins with the i-th of them."""
_rng = np.random.default_rng(0)
INPUTS = _rng.standard_normal((CYCLE, 16)).round(3).astype(np.float32)
KEPT = 2000
"""Answers kept of a stream, at most."""


class Route(NamedTuple):
    """How a server is spoken to."""

    message: Callable[[list[str], list[np.ndarray]], bytes]
    """What is sent for one event of each of some streams, of which there is one unless `connections` is set."""
    answer: Callable[[bytes, int], bytes]
    """The output of the i-th stream in what comes back."""
    path: Callable[[str], str] | None = None
    """Of the WebSocket for a stream; None if the connection is plain HTTP."""
    greetings: int = 0
    """Messages that the server sends first."""
    connections: int | None = None
    """That share all streams; by default each stream has its own."""


class Load(NamedTuple):
    """What was measured."""

    steps_per_second: float
    p50_ms: float
    p99_ms: float
    kept: dict[int, list[bytes]]
    """Some streams' answers, from the first one on."""


class Run:
    """All connections together."""

    def __init__(self, seconds: float, warm: float):
        self.seconds, self.warm = seconds, warm
        self.connections: list[Connection] = []
        self.ready = self.open = self.steps = 0
        self.latencies: list[float] = []
        self.done = asyncio.get_running_loop().create_future()

    def begin(self) -> None:
        """The connections are made: send."""
        self.ready += 1
        if self.ready == len(self.connections):
            self.start = time.perf_counter() + self.warm
            self.end = self.start + self.seconds
            self.open = self.ready
            for connection in self.connections:
                connection.send()

    def answered(self, now: float, latency: float, streams: int) -> bool:
        """Take note, and say whether to go on."""
        if now < self.end:
            if now >= self.start:
                self.steps += streams
                self.latencies.append(latency)
            return True
        self.open -= 1
        if not self.open:
            self.done.set_result(None)
        return False


class Connection(asyncio.Protocol):
    """One connection, of one stream or of many."""

    def __init__(self, run: Run, route: Route, names: list[str], first: int):
        self.run, self.route, self.streams, self.first = run, route, len(names), first
        some = [[INPUTS[(first + i + t) % CYCLE] for i in range(len(names))] for t in range(CYCLE)]
        self.messages = [route.message(names, xs) for xs in some]
        if route.path is not None:
            self.messages = [frame(message) for message in self.messages]
        self.path = None if route.path is None else route.path(names[0])
        self.next, self.waits = _http, route.greetings + (route.path is not None)
        self.buffer, self.turn, self.sent = b"", 0, 0.0
        self.kept: list[bytes] | None = [] if first % 250 == 0 else None

    def connection_made(self, transport: asyncio.WriteTransport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.transport = transport
        if self.path is None:
            self.run.begin()
        else:
            transport.write(upgrade(self.path))

    def connection_lost(self, exc) -> None:
        if not self.run.done.done():
            self.run.done.set_exception(exc or ConnectionError("the server has closed a connection"))

    def send(self) -> None:
        self.sent = time.perf_counter()
        self.transport.write(self.messages[self.turn % CYCLE])
        self.turn += 1

    def data_received(self, data: bytes) -> None:
        data, at = self.buffer + data if self.buffer else data, 0
        try:
            while (found := self.next(data, at)) is not None:
                start, at = found
                if self.waits:
                    self.next, self.waits = _websocket, self.waits - 1
                    if not self.waits:
                        self.run.begin()
                    continue
                now = time.perf_counter()
                if self.kept is not None and len(self.kept) < KEPT:
                    self.kept.append(data[start:at])
                if self.run.answered(now, now - self.sent, self.streams):
                    self.send()
        except ValueError as error:
            if not self.run.done.done():
                self.run.done.set_exception(error)
        self.buffer = data[at:]


def _http(data: bytes, at: int) -> tuple[int, int] | None:
    """Where the body of the next response begins and ends."""
    start = data.find(b"\r\n\r\n", at)
    if start < 0:
        return None
    if data[at + 9 : at + 12] not in (b"200", b"101"):
        raise ValueError(f"the server says {data[at : at + 300]!r}")
    head = data[at:start].lower()
    said = head.find(b"content-length:")
    length = int(head[said + 15 :].split(b"\r\n", 1)[0]) if said >= 0 else 0
    return (start + 4, start + 4 + length) if len(data) >= start + 4 + length else None


def _websocket(data: bytes, at: int) -> tuple[int, int] | None:
    """Where the next message begins and ends."""
    if len(data) < at + 2:
        return None
    if data[at] not in (0x81, 0x82):
        raise ValueError(f"expected a whole message, got {data[at : at + 100]!r}")
    start, length = at + 2, data[at + 1]
    if length >= 126:
        start += 2 if length == 126 else 8
        length = int.from_bytes(data[at + 2 : start], "big")
    return (start, start + length) if len(data) >= start + length else None


def frame(message: bytes) -> bytes:
    """A message of bytes from a client; its mask is of zeros."""
    n = len(message)
    size = bytes([0x80 | n]) if n < 126 else b"\xfe" + n.to_bytes(2) if n < 65_536 else b"\xff" + n.to_bytes(8)
    return b"\x82" + size + bytes(4) + message


def upgrade(path: str) -> bytes:
    """The request for a WebSocket."""
    return (
        f"GET {path} HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    ).encode()


def post(path: str, body: bytes, kind: str = "application/json") -> bytes:
    """A request with a body."""
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


async def _drive(route: Route, port: int, streams: int, name: str, seconds: float, warm: float) -> Load:
    run, loop = Run(seconds, warm), asyncio.get_running_loop()
    names = [f"{name}{i:05d}" for i in range(streams)]
    each = -(-streams // (route.connections or streams))
    run.connections = [Connection(run, route, names[at : at + each], at) for at in range(0, streams, each)]
    for connection in run.connections:
        await loop.create_connection(lambda connection=connection: connection, "127.0.0.1", port)
    await asyncio.wait_for(run.done, seconds + warm + 30)
    for connection in run.connections:
        connection.transport.close()
    kept = {
        connection.first: [route.answer(message, 0) for message in connection.kept]
        for connection in run.connections
        if connection.kept is not None
    }
    p50, p99 = 1e3 * np.percentile(run.latencies, (50, 99))
    return Load(run.steps / seconds, float(p50), float(p99), kept)


def drive(route: Route, port: int, streams: int, name: str, seconds: float, warm: float) -> Load:
    """Steps a second of so many streams; the first `warm` seconds do not count. `name` begins the streams' names.

    Raises:
        ValueError: if the server answers with an error.
        ConnectionError: if it closes a connection.
    """
    gc.collect()
    gc.disable()
    try:
        return uvloop.run(_drive(route, port, streams, name, seconds, warm))
    finally:
        gc.enable()
