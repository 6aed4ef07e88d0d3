"""The server of events, simulated under the policies that it asks."""

import asyncio
import random
import time

import numpy as np
import pytest

from anabranch.batching import Batch, Deadlines, Scheduler
from anabranch.schedule.batching import Arrivals, simulate_batching


def test_waiting_is_that_of_a_queue_with_fixed_times():
    """One event a batch, always equally long: M/D/1."""
    came = Arrivals.poisson(rate=60.0, n=30_000, streams=5, seed=1)
    served = simulate_batching(Deadlines(), came, lambda n: 0.01 * n, budget=1)
    load = 0.6
    assert served.latency.mean() == pytest.approx(0.01 + 0.01 * load / (2 * (1 - load)), rel=0.05)


def test_batches_grow_with_the_load_and_streams_keep_their_order():
    rates = {}
    for rate in (100.0, 5000.0):
        came = Arrivals.poisson(rate, 4000, 20, seed=0)
        served = simulate_batching(Deadlines(), came, lambda n: 0.002 + 1e-5 * n)
        rates[rate] = np.mean([sum(take) for take in served.takes()])
        for stream in range(20):
            assert (np.diff(served.answered[came.stream == stream]) >= 0).all()
    assert rates[5000.0] > 5 * rates[100.0]


def test_held_back_batches_wait_for_others():
    came = Arrivals(np.array([0.0, 0.004, 1.0]), np.arange(3), np.full(3, 9.0), np.zeros(3, np.int64))
    served = simulate_batching(Deadlines(wait=0.01), came)
    assert served.answered.tolist() == [0.01, 0.01, 1.01]


def test_a_recorded_server_decides_the_same_when_it_is_replayed():
    pytest.importorskip("prometheus_client")
    from anabranch.run.batcher import Batcher
    from anabranch.run.metrics import Metrics

    class Slow:
        def step(self, events):
            time.sleep(0.002)
            return events

        def expire(self):
            pass

    async def go():
        policy = Deadlines(wait=0.001)
        limits = {"budget": 6, "queue": 10_000, "per_stream": 1000, "per_tenant": None, "deadline": 0.05}
        batcher = Batcher(Slow(), policy, Metrics(), record=True, **limits)
        task, rng = asyncio.create_task(batcher.run()), random.Random(0)
        for _ in range(60):
            for _ in range(rng.randrange(4)):
                stream = rng.randrange(7)
                batcher.submit(stream, "ab"[stream % 2], [0] * rng.randrange(1, 5), deadline=rng.uniform(0.01, 0.1))
            await asyncio.sleep(0.002)
        await batcher.drain(task)
        return batcher

    batcher = asyncio.run(go())
    rows = [(when, stream, due, who == "b") for when, stream, n, due, who in batcher.came for _ in range(n)]
    time_, stream, due, who = (np.array(column) for column in zip(*rows, strict=True))
    came, at = Arrivals(time_, stream, due, who), [now for now, _ in batcher.decisions]
    replayed = simulate_batching(Deadlines(wait=0.001), came, budget=6, at=at)
    assert replayed.decisions == batcher.decisions and len(at) > 20
    assert np.isfinite(replayed.answered).all()
    assert simulate_batching(Deadlines(), came, budget=5, at=at).decisions != batcher.decisions


def test_what_cannot_be_is_said():
    came = Arrivals.poisson(10.0, 3, 1, 0)

    class Nobody(Scheduler):
        def act(self, state, x):
            return state, Batch(np.zeros_like(x.waiting))

    class Everybody(Scheduler):
        def act(self, state, x):
            return state, Batch(x.waiting + 1)

    with pytest.raises(RuntimeError, match="Nobody leaves 3 events waiting for ever"):
        simulate_batching(Nobody(), came)
    with pytest.raises(RuntimeError, match="Everybody takes more than waits"):
        simulate_batching(Everybody(), came)
    with pytest.raises(ValueError, match="event 1 comes before the one before it"):
        simulate_batching(Deadlines(), came._replace(time=came.time[::-1]))
    with pytest.raises(ValueError, match="rate must be positive, got 0"):
        Arrivals.poisson(0, 1, 1, 0)
