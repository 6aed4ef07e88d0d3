"""What the benchmarks of load and faults share: a small recurrent cell, a server of it, and a lean client."""

import asyncio
import base64
import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from anabranch import Cell

INPUTS, UNITS = 8, 16
ANSWER = np.dtype([("n", "<u4"), ("y", "<f4", UNITS)])
FILE = """
[cell]
name = "gru"
cell = "gru:GRU"
input = "float32[8]"
capacity = {capacity}
{cell}
[serve]
every = {every}
"""


class GRU(Cell):
    """A gated recurrent unit of 16 numbers over 8 inputs, with weights drawn once."""

    cell: eqx.nn.GRUCell

    def __init__(self):
        self.cell = eqx.nn.GRUCell(INPUTS, UNITS, key=jax.random.PRNGKey(0))

    def init(self, *, key=None) -> Float[Array, "16"]:
        return jnp.zeros(UNITS)

    def step(self, state: Float[Array, "16"], x: Float[Array, "8"]) -> tuple[Float[Array, "16"], Float[Array, "16"]]:
        state = self.cell(x, state)
        return state, state


class Process:
    """A server in a process of its own, on a free port, which works in `folder`.

    Arguments:
        folder: where it runs and logs.
        command: a module and its arguments; the port is added to them.

    Raises:
        RuntimeError: if it does not come up; the message is its log.
    """

    def __init__(self, folder: Path, *command: str):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.folder, self.log = folder, folder / "server.log"
        self.command = [sys.executable, "-m", *command, "--port", str(self.port)]
        self.start()

    def start(self) -> None:
        """Start it, and wait until it answers."""
        path = {"PYTHONPATH": str(Path(__file__).parent)}
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                self.command, cwd=self.folder, env=os.environ | path, stdout=log, stderr=log
            )
        until = time.monotonic() + 60
        while self.process.poll() is None and time.monotonic() < until:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/readyz").read()
                return
            time.sleep(0.02)
        raise RuntimeError(self.log.read_text())

    def stop(self, how: int = signal.SIGTERM) -> None:
        """Send it a signal, and wait until it has gone."""
        self.process.send_signal(how)
        self.process.wait(60)

    def memory(self) -> int:
        """Bytes that are the server's own."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
        raise RuntimeError("the server is gone")

    def seconds(self) -> float:
        """Processor time so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def files(self) -> int:
        """How many files and sockets are open."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def threads(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/task"))


def serve(folder: Path, *, capacity: int, every: float = 10.0, cell: str = "") -> Process:
    """`anabranch serve` of the GRU."""
    file = folder / "served.toml"
    file.write_text(FILE.format(capacity=capacity, every=every, cell=cell))
    return Process(folder, "anabranch.cli", "serve", str(file))


def raise_file_limit() -> int:
    """Open as many files as the system allows; returns how many."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return most


class Session(asyncio.Protocol):
    """One `/v1/stream/KEY` as a client has it: just enough of WebSocket for short messages.

    Arguments:
        key: the name of the stream.
        answered: is given each answer: this session, and its bytes.
    """

    def __init__(self, key: str, answered: Callable[["Session", bytes], None]):
        self.key, self.answered = key, answered
        self.seen = self.n = 0
        loop = asyncio.get_running_loop()
        self.opened: asyncio.Future[int] = loop.create_future()
        self.closed: asyncio.Future[str] = loop.create_future()
        self._data, self._upgraded, self._why = b"", False, ""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        nonce = base64.b64encode(os.urandom(16)).decode()
        transport.write(
            f"GET /v1/stream/{self.key} HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {nonce}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )

    def send(self, data: bytes, opcode: int = 2) -> None:
        """Send a message. Its mask is zero, so that its bytes go as they are."""
        size = len(data)
        head = bytes([0x80 | opcode, 0x80 | size]) if size < 126 else bytes([0x80 | opcode, 254, size >> 8, size & 255])
        self.transport.write(head + bytes(4) + data)

    def data_received(self, data: bytes) -> None:
        data = self._data + data if self._data else data
        if not self._upgraded:
            head, found, rest = data.partition(b"\r\n\r\n")
            if not found:
                self._data = data
                return
            if not head.startswith(b"HTTP/1.1 101"):
                self._why = head.decode().partition("\r\n")[0]
                self.transport.abort()
                return
            self._upgraded, data = True, rest
        at = 0
        while len(data) >= at + 2:
            size, start = data[at + 1], at + 2
            if size == 126:
                size, start = int.from_bytes(data[start : start + 2], "big"), start + 2
            if len(data) < start + size:
                break
            self._message(data[at] & 15, data[start : start + size])
            at = start + size
        self._data = data[at:]

    def _message(self, opcode: int, data: bytes) -> None:
        if opcode == 2:
            self.answered(self, data)
        elif opcode == 1:
            self.seen = self.n = json.loads(data)["seen"]
            self.opened.set_result(self.seen)
        elif opcode == 9:
            self.send(data, 10)
        elif opcode == 8:
            self._why = f"{int.from_bytes(data[:2], 'big')} {data[2:].decode()}"
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        why = self._why or str(exc or "the connection has closed")
        if not self.opened.done():
            self.opened.set_exception(ConnectionError(why))
        self.closed.set_result(why)


async def connect(
    port: int, key: str, answered: Callable[[Session, bytes], None], address: str = "127.0.0.1"
) -> Session:
    """Open a session, from a local address, and wait until the server has said what it has seen.

    Raises:
        ConnectionError: if the server refuses.
    """
    loop = asyncio.get_running_loop()
    _, session = await loop.create_connection(
        lambda: Session(key, answered), "127.0.0.1", port, local_addr=(address, 0)
    )
    await session.opened
    return session
