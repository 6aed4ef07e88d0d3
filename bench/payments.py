"""Payment routing as a service: decisions a second over the wire, their latency, and how many payments succeed.

`examples/payment_routing.toml` is served by a process of its own, with a journal that is durable before an answer is
sent. This process is the world: a day of `PaymentSimulator` for 200 kinds of payment in as many seconds as the run
lasts, with drifting success rates and outages. It sends transactions at a fixed rate in frames over a few WebSockets,
and each one's outcome when it is known: after a log-normal time, median 0.3 s. The same transactions, with the same
outcomes and delays, are then routed by others: always the best gateway on average (known only in hindsight), the one
that was best in the first hour, a random one, and bandits of River and MABWiser, one a kind, on a sample of the kinds.

`python bench/payments.py [--rate 12000] [--seconds 60] [--smoke]` writes `bench/results/payments.json`.
"""

import argparse
import asyncio
import contextlib
import heapq
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
from websockets.asyncio.client import connect

from anabranch.decide.payment_routing import PaymentSimulator
from common import write

ROOT = Path(__file__).parents[1]
KINDS, GATEWAYS = 200, 5
EVENT = np.dtype([
    ("length", "<u2"), ("flags", "u1"), ("name", "S4"), ("eligible", "?", GATEWAYS), ("asked", "?"), ("ticket", "<i4"),
    ("reward", "<f4"), ("terminal", "?"), ("truncated", "?"), ("told", "?"),
])  # fmt: skip
ANSWER = np.dtype([("n", "<u4"), ("ticket", "<i4"), ("action", "<i4"), ("logp", "<f4"), ("aux", "<f4"), ("valid", "?")])
NAMES = np.array([f"k{i:03d}".encode() for i in range(KINDS)])


class World:
    """All transactions of a run: what kind, when, when their outcome is known, and whether each gateway succeeds."""

    def __init__(self, rate: int, seconds: float, seed: int):
        rng = np.random.default_rng(seed)
        rates = np.asarray(PaymentSimulator.day(seed, KINDS, transactions=10).rates)
        n = int(rate * seconds)
        self.kind = rng.integers(0, KINDS, n)
        self.time = (np.arange(n) + 0.5) / rate
        minute = np.minimum(self.time / seconds * rates.shape[1], rates.shape[1] - 1).astype(int)
        self.chance = rates[self.kind, minute]
        self.success = rng.random((n, 1)) < self.chance
        self.known = self.time + rng.lognormal(np.log(0.3), 0.7, n).clip(0, 5)


async def drive(world: World, url: str, connections: int, frame: int) -> dict[str, Any]:
    """Send all of it, at its times; returns the choices and the latencies of the frames."""
    n = len(world.kind)
    chosen, ticket = np.full(n, -1), np.full(n, -1)
    latencies: list[float] = []
    decided = 0.0
    begin = time.perf_counter() + 0.5

    async def one(j: int) -> None:
        """Every `connections`-th kind, so that events of a kind keep their order."""
        mine = np.flatnonzero(world.kind % connections == j)
        waiting: asyncio.Queue = asyncio.Queue()
        late: list[tuple[float, int]] = []
        settled = 0

        async with connect(url + "/v1/stream", max_size=None, compression=None) as ws:

            async def receive() -> None:
                nonlocal settled, decided
                while settled < len(mine):
                    sent, asks, tells = await waiting.get()
                    answers = np.frombuffer(await ws.recv(), ANSWER)
                    latencies.append(time.perf_counter() - sent)
                    mine_now = answers[len(tells) :]
                    chosen[asks], ticket[asks] = mine_now["action"], mine_now["ticket"]
                    decided = time.perf_counter() - begin if len(asks) else decided
                    for i in asks.tolist():
                        heapq.heappush(late, (world.known[i], i))
                    settled += len(tells)

            receiver, at = asyncio.create_task(receive()), 0
            while not receiver.done():
                now = time.perf_counter() - begin
                end = min(at + frame, int(np.searchsorted(world.time[mine], now)))
                asks, tells = mine[at:end], []
                while late and late[0][0] <= now and len(tells) < frame:
                    tells.append(heapq.heappop(late)[1])
                if len(asks) < frame // 4 and len(tells) < frame // 4 and (at < len(mine) or not tells):
                    await asyncio.sleep(0.002)
                if not len(asks) and not tells:
                    continue
                at = end
                events = np.zeros(len(tells) + len(asks), EVENT)
                whose = np.r_[np.array(tells, int), asks]
                events["length"], events["name"], events["eligible"] = 4, NAMES[world.kind[whose]], True
                told, asked = events[: len(tells)], events[len(tells) :]
                told["told"], asked["asked"] = True, True
                told["ticket"], told["reward"] = ticket[tells], world.success[tells, chosen[tells]]
                waiting.put_nowait((time.perf_counter(), asks, tells))
                await ws.send(events.tobytes())
            await receiver

    await asyncio.gather(*(one(j) for j in range(connections)))
    return {"chosen": chosen, "latencies": np.array(latencies), "seconds": decided}


@contextlib.contextmanager
def served(folder: Path):
    """The server, and its address."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "anabranch.cli", "serve", str(ROOT / "examples/payment_routing.toml")]
    process = subprocess.Popen([*command, "--port", str(port)], cwd=folder)
    try:
        for _ in range(600):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz").read()
                break
            time.sleep(0.1)
        yield f"ws://127.0.0.1:{port}", process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def best_gateways(world: World, some: np.ndarray) -> np.ndarray:
    """For each kind the gateway that would have taken most of some transactions."""
    sums = np.zeros((KINDS, GATEWAYS))
    np.add.at(sums, world.kind[some], world.success[some])
    return sums.argmax(1)


def replayed(world: World, make, kinds: np.ndarray) -> float:
    """The success rate on some kinds of bandits of another library: `make(kind) -> (act(), learn(arm, reward))`."""
    hits = total = 0
    for kind in kinds.tolist():
        act, learn = make(kind)
        mine = np.flatnonzero(world.kind == kind)
        events = sorted([(world.time[i], 1, i) for i in mine] + [(world.known[i], 0, i) for i in mine])
        arms: dict[int, int] = {}
        for _, asked, i in events:
            if asked:
                arms[i] = act()
                hits += world.success[i, arms[i]]
                total += 1
            else:
                learn(arms[i], float(world.success[i, arms[i]]))
    return hits / total


def peers(seed: int) -> dict[str, Any]:
    """Bandits of River and MABWiser."""
    from mabwiser.mab import MAB, LearningPolicy
    from river import bandit

    def river(make):
        def one(kind):
            policy = make(kind)
            arms = list(range(GATEWAYS))
            return (lambda: policy.pull(arms)), policy.update

        return one

    def mabwiser(policy):
        def one(kind):
            mab = MAB(list(range(GATEWAYS)), policy, seed=seed + kind)
            mab.fit([*range(GATEWAYS)], [1] * GATEWAYS)
            return mab.predict, lambda arm, reward: mab.partial_fit([arm], [reward])

        return one

    return {
        "River UCB(1)": river(lambda kind: bandit.UCB(delta=1, seed=seed + kind)),
        "River epsilon-greedy(0.1)": river(lambda kind: bandit.EpsilonGreedy(0.1, seed=seed + kind)),
        "MABWiser Thompson": mabwiser(LearningPolicy.ThompsonSampling()),
        "MABWiser UCB1(0.2)": mabwiser(LearningPolicy.UCB1(alpha=0.2)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="two seconds, nothing written")
    parser.add_argument("--rate", type=int, default=12_000, help="transactions a second")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--connections", type=int, default=4)
    parser.add_argument("--frame", type=int, default=256, help="events in a message at most")
    parser.add_argument("--kinds", type=int, default=20, help="kinds of payment that the other bandits route")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.smoke:
        args.rate, args.seconds, args.kinds = 500, 2.0, 2

    world = World(args.rate, args.seconds, args.seed)
    with tempfile.TemporaryDirectory() as folder, served(Path(folder)) as (url, process):
        asyncio.run(drive(World(args.rate // 4, 2.0, args.seed + 1), url, args.connections, args.frame))  # compiled
        before = os.times()
        ours = asyncio.run(drive(world, url, args.connections, args.frame))
        after = os.times()
        with open(f"/proc/{process.pid}/statm") as file:
            resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    n, chosen = len(world.kind), ours["chosen"]
    took = world.success[np.arange(n), chosen]
    early = world.time < args.seconds / 24
    first, best = best_gateways(world, early), best_gateways(world, np.ones(n, bool))
    kinds = np.arange(0, KINDS, KINDS // args.kinds)[: args.kinds]
    sample = np.isin(world.kind, kinds)
    rng = np.random.default_rng((args.seed, 1))  # not the draws that the world is made of
    success = {
        "anabranch": took.mean(),
        "static: best in the first hour": world.success[np.arange(n), first[world.kind]].mean(),
        "static: best in hindsight": world.success[np.arange(n), best[world.kind]].mean(),
        "random": world.success[np.arange(n), rng.integers(0, GATEWAYS, n)].mean(),
        "always the best at the time": world.chance.max(1).mean(),
    }
    on_sample = {"anabranch": took[sample].mean()}
    on_sample |= {name: replayed(world, make, kinds) for name, make in peers(args.seed).items()}
    record = {
        "transactions": n,
        "seconds": round(ours["seconds"], 2),
        "decisions_per_second": round(n / ours["seconds"]),
        "events_per_second": round(2 * n / ours["seconds"]),
        "frame_latency_ms": {f"p{q}": round(1e3 * float(np.percentile(ours["latencies"], q)), 2) for q in (50, 95, 99)},
        "client_cpu_share": round((after.user + after.system - before.user - before.system) / ours["seconds"], 2),
        "server_resident_MB": round(resident / 2**20),
        "success": {name: round(float(rate), 4) for name, rate in success.items()},
        "success_on_sample": {name: round(float(rate), 4) for name, rate in on_sample.items()},
        "kinds_in_sample": len(kinds),
        "durable": True,
    }
    print(json.dumps(record, indent=2))
    if not args.smoke:
        write("payments", record, "anabranch", "jax", "river", "mabwiser")


if __name__ == "__main__":
    main()
