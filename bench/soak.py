"""Ten minutes of mixed load on one server: does its memory stay, and does every answered event count exactly once?

`anabranch serve` serves a GRU(16) from a process of its own, with a durable journal, checkpoints every 3 seconds, idle
streams dropped after 20, and room for fewer states than there are streams. All this goes on at once:

* 100 sessions that stay for the whole run, each with 5 events a second;
* 40 visitors that come, send some events, leave, politely or in the midst of it, and often come back for more;
* 10 slow readers that send 200 events in a burst while they read nothing for three seconds;
* 5 a second who send what is no event, over WebSocket and HTTP;
* one a second who connects and is never heard of again.

The client counts what it sent and what was answered, stream by stream. Answers must be numbered without a gap, and who
comes back must be told at least all that was answered, and at most all that was sent. Each second the server's own
memory, open files, threads and the size of the journal are sampled. Expected, before the first run: no violation, and
over the second half the upper end of the 95 % confidence interval of memory's slope, by least squares on the means of
ten seconds, is below 1 MB a minute.

`python bench/soak.py [--minutes 10] [--smoke]` writes `bench/results/soak.json`.
"""

import argparse
import asyncio
import contextlib
import json
import random
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import uvloop
from scipy import stats

from common import write
from gru import ANSWER, INPUTS, Process, Session, connect, raise_file_limit, serve

STEADY, VISITORS, SLOW, BURST = 100, 40, 10, 200
EVENT = np.linspace(-1, 1, INPUTS, dtype=np.float32).tobytes()


class Ledger:
    """What was sent and answered, by stream, and whatever was wrong."""

    def __init__(self, port: int):
        self.port = port
        self.sent: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self.wrong: Counter[str] = Counter()
        self.did: Counter[str] = Counter()
        self.waiting: dict[Session, int] = {}
        self.late: dict[Session, int] = {}
        """Events of an earlier session of the stream that may still count."""
        self.total = 0

    def take(self, session: Session, data: bytes) -> None:
        """An answer. Its number follows that of the one before, but for events of an earlier session."""
        n = int.from_bytes(data[:4], "little")
        self.late[session] -= n - session.n - 1
        if len(data) != ANSWER.itemsize or n <= session.n or self.late[session] < 0:
            self.wrong["an answer has another number"] += 1
        self.answered[session.key] = session.n = n
        self.waiting[session] -= 1
        self.total += 1

    async def come(self, key: str) -> Session:
        """Open a session, of a stream that is new or that has been there."""
        session = await connect(self.port, key, self.take)
        if not self.answered[key] <= session.seen <= self.sent[key]:
            self.wrong["a stream has lost or doubled events"] += 1
        self.late[session], self.waiting[session] = self.sent[key] - session.seen, 0
        self.did["sessions"] += 1
        return session

    def send(self, session: Session) -> None:
        self.sent[session.key] += 1
        self.waiting[session] += 1
        session.send(EVENT)

    async def settle(self, session: Session, seconds: float = 30.0) -> bool:
        """Wait until all is answered."""
        until = time.monotonic() + seconds
        while self.waiting[session] and not session.closed.done():
            if time.monotonic() > until:
                self.wrong["no answer for half a minute"] += 1
                return False
            await asyncio.sleep(0.02)
        if session.closed.done():
            return False
        self.sent[session.key] = session.n  # what was sent before and has not counted by now was never read
        return True


async def steady(ledger: Ledger, i: int, end: float) -> None:
    session = await ledger.come(f"steady{i}")
    await asyncio.sleep(random.random() * 0.2)
    while time.monotonic() < end and not session.closed.done():
        ledger.send(session)
        await asyncio.sleep(0.2)
    if not await ledger.settle(session):
        ledger.wrong[f"a steady session has ended: {session.closed.result()}"] += 1
    session.transport.close()
    again = await ledger.come(session.key)
    if again.seen != ledger.answered[session.key]:
        ledger.wrong["the count at the end is another"] += 1
    again.transport.close()


async def visitor(ledger: Ledger, i: int, end: float) -> None:
    visits, key = 0, ""
    while time.monotonic() < end:
        if not key or random.random() < 0.3:
            visits, key = visits + 1, f"visitor{i}-{visits}"
        session = await ledger.come(key)
        for _ in range(random.randint(1, 20)):
            ledger.send(session)
            await asyncio.sleep(random.random() * 0.05)
        if random.random() < 0.3:
            session.transport.abort()
            ledger.did["left in the midst"] += 1
        else:
            await ledger.settle(session)
            session.transport.close()
        del ledger.waiting[session], ledger.late[session]
        await asyncio.sleep(0.2)


async def slow(ledger: Ledger, i: int, end: float) -> None:
    session = await ledger.come(f"slow{i}")
    while time.monotonic() < end and not session.closed.done():
        session.transport.pause_reading()
        for _ in range(BURST):
            ledger.send(session)
        await asyncio.sleep(3.0)
        session.transport.resume_reading()
        await ledger.settle(session)
        ledger.did["bursts"] += 1
    session.transport.close()


async def bad(ledger: Ledger, end: float) -> None:
    while time.monotonic() < end:
        session = await connect(ledger.port, "bad", ledger.take)
        session.send(b"12345")
        if not (await session.closed).startswith("1003"):
            ledger.wrong["a message that is no event was not refused"] += 1
        body = b'{"stream": "bad", "x": "text"}'
        reader, writer = await asyncio.open_connection("127.0.0.1", ledger.port)
        writer.write(b"POST /v1/events HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n")
        writer.write(b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
        if b"x: expected float32[8], got 'text'" not in await reader.read():
            ledger.wrong["an event that is none was not refused"] += 1
        writer.close()
        ledger.did["bad messages"] += 2
        await asyncio.sleep(0.2)


async def vanishing(ledger: Ledger, end: float) -> None:
    """Clients that do not answer pings. The server has to find out by itself."""
    gone = []
    while time.monotonic() < end:
        session = await connect(ledger.port, "vanishing", ledger.take)
        session.transport.pause_reading()
        gone.append(session)
        ledger.did["vanished"] += 1
        await asyncio.sleep(1.0)
    for session in gone:
        session.transport.abort()


async def sample(process: Process, folder: Path, end: float, into: list[dict[str, float]]) -> None:
    while time.monotonic() < end:
        journal = 0
        for path in folder.glob("out/gru/live/journal/*"):
            with contextlib.suppress(FileNotFoundError):  # cut by a checkpoint
                journal += path.stat().st_size
        into.append({
            "memory": process.memory(), "files": process.files(), "threads": process.threads(), "journal": journal
        })  # fmt: skip
        await asyncio.sleep(1.0)


def slope(memory: list[float], block: int = 10) -> dict[str, float]:
    """MB a minute with its 95 % confidence interval, over the means of blocks of seconds."""
    n = len(memory) // block
    means = np.array(memory[: n * block]).reshape(n, block).mean(1) / 1e6
    fit: Any = stats.linregress(np.arange(n) * block / 60, means)
    half = float(stats.t.ppf(0.975, n - 2)) * fit.stderr
    return {"slope": round(fit.slope, 3), "low": round(fit.slope - half, 3), "high": round(fit.slope + half, 3)}


async def soak(process: Process, folder: Path, seconds: float) -> dict[str, Any]:
    ledger, samples = Ledger(process.port), []
    begin = time.monotonic()
    end = begin + seconds
    await asyncio.gather(
        sample(process, folder, end, samples),
        *(steady(ledger, i, end) for i in range(STEADY)),
        *(visitor(ledger, i, end) for i in range(VISITORS)),
        *(slow(ledger, i, end) for i in range(SLOW)),
        bad(ledger, end),
        vanishing(ledger, end),
    )
    later = samples[len(samples) // 2 :]
    memory = slope([s["memory"] for s in later], 10 if seconds > 60 else 1)
    span = lambda name: {"least": min(s[name] for s in later), "most": max(s[name] for s in later)}
    return {
        "seconds": round(time.monotonic() - begin),
        "events_answered": ledger.total,
        "streams": len(ledger.sent),
        "did": dict(ledger.did),
        "violations": dict(ledger.wrong),
        "memory_MB": {"start": round(samples[0]["memory"] / 1e6, 1), "end": round(samples[-1]["memory"] / 1e6, 1)},
        "memory_MB_a_minute": memory,
        "second_half": {name: span(name) for name in ("memory", "files", "threads", "journal")},
        "each_half_minute": samples[::30],
        "passed": {"exactly_once": not ledger.wrong, "memory": bool(memory["high"] < 1.0)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="five seconds, nothing written")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    random.seed(args.seed)
    raise_file_limit()
    with tempfile.TemporaryDirectory() as name:
        process = serve(Path(name), capacity=200, every=3.0, cell="idle = 20")
        try:
            record = uvloop.run(soak(process, Path(name), 5.0 if args.smoke else 60 * args.minutes))
        finally:
            process.stop()
    print(json.dumps(record, indent=2))
    if not args.smoke:
        write("soak", record, "anabranch", "jax", "starlette", "uvicorn", "websockets")


if __name__ == "__main__":
    main()
