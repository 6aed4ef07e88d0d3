"""What a crash costs: events lost, events that count twice, and the seconds until answers flow again.

Under load, one after the other, each some times at random moments:

* **server**: SIGKILL to `anabranch serve` with 50 sessions of 10 events a second, and it is started again at once. A
  session that comes back is told how many of its events have counted: fewer than were answered are lost, more than were
  sent are doubled. The seconds include the start of Python and JAX.
* **redis**: SIGKILL to the Redis from which `anabranch run` reads payments and to which it writes predictions.
* **postgres**: a crash of the PostgreSQL to which it writes them. Rows that the sink lacks are lost, rows that it has
  twice doubled; all are compared with those of a run that nothing disturbed.
* **ray**: SIGKILL to one of three actors of `Partitioned`. Answers that differ from those of one `Keyed` are wrong.

Expected, before the first run: nothing lost, doubled or wrong.

`python bench/faults.py [--kills 5] [--smoke]` writes `bench/results/faults.json`. It needs a redis-server and a
PostgreSQL, which `scripts/servers` installs.
"""

import argparse
import asyncio
import json
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

from common import spread, write
from gru import INPUTS, Process, Session, connect, serve

sys.path.insert(0, str(Path(__file__).parents[1]))
SESSIONS, EVENT = 50, np.linspace(-1, 1, INPUTS, dtype=np.float32).tobytes()


class Clients:
    """Sessions that come back whenever the server does, and their count of what has become of their events."""

    def __init__(self, port: int):
        self.port, self.open = port, True
        self.sent: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self.acknowledged = self.lost = self.doubled = 0
        self.born: dict[Session, float] = {}
        self.last = 0.0
        """When the youngest session that has been answered was opened."""

    def take(self, session: Session, data: bytes) -> None:
        session.n += 1
        n = int.from_bytes(data[:4], "little")
        self.doubled += n < session.n
        self.lost += n > session.n
        self.answered[session.key] = session.n = n
        self.acknowledged += 1
        self.last = max(self.last, self.born.get(session, 0.0))

    async def come(self, key: str) -> Session:
        while True:
            try:
                session = await connect(self.port, key, self.take)
                break
            except OSError:
                await asyncio.sleep(0.02)
        self.lost += max(0, self.answered[key] - session.seen)
        self.doubled += max(0, session.seen - self.sent[key])
        self.sent[key] = self.answered[key] = session.seen
        self.born[session] = time.monotonic()
        return session

    async def one(self, key: str) -> None:
        session = await self.come(key)
        while self.open:
            if session.closed.done():
                del self.born[session]
                session = await self.come(key)
            self.sent[key] += 1
            session.send(EVENT)
            await asyncio.sleep(0.1)
        while session.n < self.sent[key] and not session.closed.done():
            await asyncio.sleep(0.01)
        session.transport.close()
        (await self.come(key)).transport.close()


async def kill_server(process: Process, kills: int) -> dict[str, Any]:
    clients, seconds = Clients(process.port), []
    load = [asyncio.create_task(clients.one(f"s{i}")) for i in range(SESSIONS)]
    for _ in range(kills):
        await asyncio.sleep(random.uniform(1.5, 4.0))
        killed = time.monotonic()
        process.stop(signal.SIGKILL)
        await asyncio.to_thread(process.start)
        while clients.last < killed:
            await asyncio.sleep(0.005)
        seconds.append(time.monotonic() - killed)
    clients.open = False
    await asyncio.gather(*load)
    return {
        "kills": kills, "acknowledged": clients.acknowledged, "lost": clients.lost, "doubled": clients.doubled,
        "seconds_until_answers": spread(seconds, 3),
    }  # fmt: skip


def server(kills: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        process = serve(Path(folder), capacity=1000, every=2.0)
        try:
            return uvloop.run(kill_server(process, kills))
        finally:
            process.stop()


def kill_broker(folder: Path, redis: Any, victim: Any, path: Path, found: Callable[[], list[dict]], kills: int):
    """Kill a server that a run reads from or writes to, again and again."""
    import redis as client
    from tests.run import servers

    sent, seconds = servers.messages(300 + 600 * kills), []
    predictions, _, _ = servers.undisturbed(folder, sent)
    stream, count = f"{path.stem}-in", lambda: len(found())

    def feed() -> None:
        at = 0
        while at < len(sent):
            try:
                at = redis.client.xlen(stream)  # what was under way when it was killed may be there
                with redis.client.pipeline(transaction=True) as pipe:
                    for message in sent[at : at + 5]:
                        pipe.xadd(stream, {"data": message})
                    pipe.execute()
            except client.RedisError:
                pass
            time.sleep(0.02)

    process = servers.start(path, folder / "out")
    feeder = threading.Thread(target=feed, daemon=True)
    feeder.start()
    while not count():
        if process.poll() is not None:
            raise RuntimeError(process.communicate()[1])
        time.sleep(0.02)
    for _ in range(kills):
        time.sleep(random.uniform(0.5, 2.0))
        killed = time.monotonic()
        victim.kill()
        victim.start()
        there = count()
        servers.wait_for(lambda: count() > there or 1 / 0, ZeroDivisionError)
        seconds.append(time.monotonic() - killed)
    feeder.join()
    _, errors = process.communicate(timeout=120)
    if process.returncode:
        raise RuntimeError(errors)
    rows = found()
    have, want = [row["row"] for row in rows], [row["row"] for row in predictions]
    lost, doubled = len(set(want) - set(have)), len(have) - len(set(have))
    if not lost and not doubled:
        servers.same(rows, predictions)
    return {
        "kills": kills, "acknowledged": len(have), "lost": lost, "doubled": doubled,
        "seconds_until_answers": spread(seconds, 3),
    }  # fmt: skip


def brokers(kills: int) -> dict[str, Any]:

    from tests.run import servers, test_postgres, test_redis

    with (
        tempfile.TemporaryDirectory() as one,
        tempfile.TemporaryDirectory() as other,
        tempfile.TemporaryDirectory() as r,
    ):
        redis, postgres = servers.Redis(Path(r)), servers.Postgres()
        try:
            path = test_redis.pipeline(Path(one), redis, "till", idle=5.0)
            by_redis = kill_broker(
                Path(one), redis, redis, path, lambda: test_redis.entries(redis, "till:predictions"), kills
            )
            source = test_redis.SOURCE.format(url=redis.url, name="shop", idle=5.0)
            sink = test_postgres.SINK.format(url=postgres.url, name="shop")
            path = servers.write_pipeline(Path(other), "shop", source=source, sink=sink)
            by_postgres = kill_broker(
                Path(other), redis, postgres, path, lambda: test_postgres.rows(postgres, "shop_predictions"), kills
            )
        finally:
            redis.kill()
            postgres.remove()
    return {"redis": by_redis, "postgres": by_postgres}


def ray_actors(kills: int) -> dict[str, Any]:
    import optax
    import ray
    from tests.faults.ray_actor import FEATURES, KEYS, SIZE, killer

    from anabranch.cell import Event, Maybe
    from anabranch.learn.linear import LogisticRegression, Scaled
    from anabranch.run.keyed import Keyed
    from anabranch.run.scale import Partitioned

    cell = Scaled(LogisticRegression(FEATURES, optax.sgd(0.05)))
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False)
    rng, killed, answered = np.random.default_rng(0), [], []
    events = wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        one, many = Keyed(cell, KEYS, threads=1), Partitioned(cell, KEYS, 3, folder=folder, every=7)
        thread = threading.Thread(target=killer, args=(many, kills, killed), daemon=True)
        thread.start()
        while thread.is_alive() or answered[-1] < killed[-1]:
            keys = rng.integers(0, KEYS, SIZE)
            x = rng.normal(size=(SIZE, FEATURES)).astype(np.float32)
            batch = Event(x, Maybe((x[:, 0] > 0).astype(np.float32), np.ones(SIZE, bool)), 1.0)
            found = many(keys, batch)
            answered.append(time.monotonic())
            wrong += int((np.asarray(found) != np.asarray(one(keys, batch))).sum())
            events += SIZE
        many.close()
    ray.shutdown()
    times = np.array(answered)
    seconds = [float(times[np.searchsorted(times, when)] - when) for when in killed]
    return {"kills": kills, "acknowledged": events, "wrong": wrong, "seconds_until_answers": spread(seconds, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="one kill of each, nothing written")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    random.seed(args.seed)
    kills = 1 if args.smoke else args.kills
    record = {"server": server(kills), **brokers(kills), "ray": ray_actors(kills)}
    print(json.dumps(record, indent=2))
    if not args.smoke:
        write("faults", record, "anabranch", "jax", "redis", "psycopg", "ray")


if __name__ == "__main__":
    main()
