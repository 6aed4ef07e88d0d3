"""Ten thousand WebSocket sessions at once: what each costs the server in memory, and how long answers take.

`anabranch serve` serves a GRU(16) from a process of its own, with a durable journal. This process opens a WebSocket for
each session, `/v1/stream/KEY`, and sends 8 numbers over each at a steady rate, whatever the answers do: a session's
events are due one period apart, from a random phase on, and the latency of an answer counts from when its event was
due. That is repeated at several total rates. Each answer must have the number of its event. The same client then
drives a bare Starlette handler that answers as many bytes at once: what no server on this ground can be better than.

Memory is what is the process's own, before the first session, with all open and silent, and after all rates; buffers
of sockets are the kernel's and do not count. Hoped for, before the first run: all sessions open, none lost, at most
40 KB each, and a 99th percentile below 0.5 s at 2,000 events a second.

`python bench/sessions.py [--sessions 10000] [--smoke]` writes `bench/results/sessions.json`.
"""

import argparse
import asyncio
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

from common import write
from gru import ANSWER, INPUTS, Process, Session, connect, raise_file_limit, serve

AT_ONCE = 200  # sessions that are being opened at a time
PER_ADDRESS = 20_000  # sessions from one address, which has some 28,000 ports


async def echo(socket: Any) -> None:
    """A bare handler: a number, and as many bytes as the GRU answers."""
    await socket.accept()
    await socket.send_text('{"seen": 0}')
    n = 0
    while (said := await socket.receive())["type"] == "websocket.receive":
        n += 1
        await socket.send_bytes(n.to_bytes(4, "little") + 2 * said["bytes"])


def bare() -> Any:
    """The application of the bare handler."""
    from starlette.applications import Starlette
    from starlette.responses import PlainTextResponse
    from starlette.routing import Route, WebSocketRoute

    raise_file_limit()
    ready = Route("/readyz", lambda request: PlainTextResponse("ok"))
    return Starlette(routes=[ready, WebSocketRoute("/v1/stream/{key:path}", echo)])


class Load:
    """Sessions that send at their times, and what comes back."""

    def __init__(self, sessions: int, seed: int):
        rng = np.random.default_rng(seed)
        self.phases = np.sort(rng.random(sessions))
        self.events = [x.tobytes() for x in rng.normal(size=(256, INPUTS)).astype(np.float32)]
        self.place: dict[str, int] = {}
        self.first = np.zeros(sessions, np.int64)
        self.latencies: list[float] = []
        self.answered = self.wrong = 0
        self.begin = self.period = 0.0

    async def open(self, port: int) -> list[Session]:
        gate = asyncio.Semaphore(AT_ONCE)
        self.place = {f"s{i}": i for i in range(len(self.phases))}

        async def one(key: str, i: int) -> Session:
            async with gate:
                return await connect(port, key, self.take, f"127.0.0.{1 + i // PER_ADDRESS}")

        return await asyncio.gather(*(one(key, i) for key, i in self.place.items()))

    def take(self, session: Session, data: bytes) -> None:
        """An answer has come."""
        i, session.n = self.place[session.key], session.n + 1
        self.wrong += len(data) != ANSWER.itemsize or int.from_bytes(data[:4], "little") != session.n
        due = self.begin + self.period * (session.n - 1 - self.first[i] + self.phases[i])
        self.latencies.append(time.perf_counter() - due)
        self.answered += 1

    async def run(self, sessions: list[Session], rate: float, seconds: float) -> dict[str, Any]:
        """Send for some seconds, and wait for the answers."""
        n, sent = len(sessions), 0
        self.first = np.array([session.n for session in sessions])
        self.latencies, self.answered, self.wrong = [], 0, 0
        self.period, self.begin = n / rate, time.perf_counter()
        while (now := time.perf_counter() - self.begin) < seconds:
            turn, phase = divmod(now / self.period, 1.0)
            due = int(turn) * n + int(np.searchsorted(self.phases, phase))
            for j in range(sent, due):
                sessions[j % n].send(self.events[j % 251])
            sent = due
            await asyncio.sleep(0.001)
        spent = time.perf_counter() - self.begin
        until = time.monotonic() + 30
        while self.answered < sent and time.monotonic() < until:
            await asyncio.sleep(0.01)
        quantiles = np.percentile(self.latencies, (50, 95, 99))
        return {
            "offered_per_s": round(sent / spent),
            "answered_per_s": round(self.answered / (time.perf_counter() - self.begin)),
            "answered": self.answered,
            "unanswered": sent - self.answered,
            "wrong_number": self.wrong,
            "latency_ms": {f"p{q}": round(1e3 * float(v), 2) for q, v in zip((50, 95, 99), quantiles)},
        }


async def measure(process: Process, args: argparse.Namespace) -> dict[str, Any]:
    """One server, from no session to all of them under load."""
    warm = Load(min(100, args.sessions), args.seed + 1)
    some = await warm.open(process.port)
    await warm.run(some, 200, 1.0)  # compiled for the sizes of small batches
    for session in some:
        session.transport.close()
    await asyncio.sleep(0.5)
    before, files = process.memory(), process.files()
    load, begin = Load(args.sessions, args.seed), time.perf_counter()
    sessions = await load.open(process.port)
    took = time.perf_counter() - begin
    await asyncio.sleep(1.0)
    idle = process.memory()
    rates = []
    for rate in args.rates:
        theirs, mine, start = process.seconds(), time.process_time(), time.perf_counter()
        found = await load.run(sessions, rate, args.seconds)
        span = time.perf_counter() - start
        found["server_cpu"] = round((process.seconds() - theirs) / span, 2)
        found["client_cpu"] = round((time.process_time() - mine) / span, 2)
        found["server_resident_MB"] = round(process.memory() / 1e6)
        print(json.dumps(found))
        rates.append(found)
    after = process.memory()
    still = sum(not session.closed.done() for session in sessions)
    return {
        "open_at_once": still,
        "files_open": process.files() - files,
        "opened_per_s": round(args.sessions / took),
        "resident_MB": {name: round(m / 1e6, 1) for name, m in (("before", before), ("idle", idle), ("after", after))},
        "bytes_a_session": {
            "idle": round((idle - before) / args.sessions), "after_load": round((after - before) / args.sessions)
        },
        "rates": rates,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="200 sessions for two seconds, nothing written")
    parser.add_argument("--sessions", type=int, default=10_000)
    parser.add_argument("--rates", type=int, nargs="+", default=[1000, 2000, 4000], help="events a second, in all")
    parser.add_argument("--seconds", type=float, default=15.0, help="at each rate")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.smoke:
        args.sessions, args.rates, args.seconds = 200, [400], 2.0

    limit = raise_file_limit()
    record: dict[str, Any] = {"sessions": args.sessions, "seconds": args.seconds, "file_limit": limit, "durable": True}
    with tempfile.TemporaryDirectory() as folder:
        process = serve(Path(folder), capacity=args.sessions + 100)
        try:
            record["anabranch"] = uvloop.run(measure(process, args))
        finally:
            process.stop()
        options = "--factory --backlog 16384 --no-access-log --log-level warning --ws-per-message-deflate false"
        process = Process(Path(folder), "uvicorn", "sessions:bare", *options.split())
        try:
            record["bare_starlette"] = uvloop.run(measure(process, args))
        finally:
            process.stop()
    print(json.dumps(record, indent=2))
    if not args.smoke:
        write("sessions", record, "anabranch", "jax", "starlette", "uvicorn", "websockets", "uvloop")


if __name__ == "__main__":
    main()
