"""The queues of a server, without one: order, fairness, limits, and the end."""

import asyncio
import time

import pytest

pytest.importorskip("prometheus_client")
from anabranch.batching import Deadlines
from anabranch.run.batcher import Batcher, Closed, Full
from anabranch.run.live import NotTaken
from anabranch.run.metrics import Metrics


class Echo:
    """Answers with the events, and remembers the batches."""

    def __init__(self, seconds=0.0, fail=None, error=None):
        self.batches, self.seconds, self.fail, self.error = [], seconds, fail, error

    def step(self, events):
        time.sleep(self.seconds)
        if self.fail in events:
            raise self.error
        self.batches.append(list(events))
        return events

    def expire(self):
        pass


def made(live, **limits):
    limits = {"budget": 4, "queue": 100, "per_stream": 50, "per_tenant": None, "deadline": 1.0, **limits}
    return Batcher(live, Deadlines(), Metrics(), **limits)


def test_each_stream_keeps_its_order_and_gets_its_share():
    async def go():
        live = Echo(0.001)
        batcher = made(live)
        answers = [batcher.submit(s, "t", [(s, i) for i in range(20)]) for s in ("a", "b")]
        small = batcher.submit("c", "t", [("c", 0)])
        task = asyncio.create_task(batcher.run())
        assert await small == [("c", 0)]
        assert len(live.batches) == 1  # it came last, and did not wait for the long ones
        assert [await answer for answer in answers] == [[(s, i) for i in range(20)] for s in ("a", "b")]
        await batcher.drain(task)
        flat = [event for batch in live.batches for event in batch]
        assert [i for s, i in flat if s == "a"] == list(range(20))
        assert max(map(len, live.batches)) <= 4
        with pytest.raises(Closed):
            batcher.submit("a", "t", [1])

    asyncio.run(go())


def test_limits_and_draining():
    async def go():
        batcher = made(Echo(), queue=10, per_stream=6, per_tenant=8)
        waiting = [batcher.submit("a", "x", [1] * 6)]
        with pytest.raises(Full, match="this stream's queue"):
            batcher.submit("a", "x", [1])
        with pytest.raises(Full, match="this tenant's queue"):
            batcher.submit("b", "x", [1] * 3)
        waiting.append(batcher.submit("b", "y", [1] * 4))
        with pytest.raises(Full, match="the queue"):
            batcher.submit("c", "z", [1])
        task = asyncio.create_task(batcher.run())
        await batcher.drain(task)  # what waits is answered first
        assert [len(answer.result()) for answer in waiting] == [6, 4]
        assert batcher.waiting == 0 and batcher.metrics.registry.get_sample_value("anabranch_events_refused_total") == 5

    asyncio.run(go())


def test_a_failure_is_told_to_all_who_wait():
    async def go():
        batcher = made(Echo(fail="bad", error=OSError("the disk has gone")))
        task = asyncio.create_task(batcher.run())
        assert await batcher.submit("a", "t", ["good"]) == ["good"]
        with pytest.raises(Closed, match="the disk has gone"):
            await batcher.submit("a", "t", ["bad"])
        with pytest.raises(OSError):
            await task
        with pytest.raises(Closed):
            batcher.submit("a", "t", ["good"])

    asyncio.run(go())


def test_what_the_journal_does_not_take_is_refused_and_the_next_is_stepped():
    async def go():
        live = Echo(fail="bad", error=NotTaken("the journal cannot be written: disk full"))
        batcher = made(live)
        long = batcher.submit("a", "t", ["bad", *range(20)])
        task = asyncio.create_task(batcher.run())
        with pytest.raises(Closed, match="disk full"):
            await long
        assert await batcher.submit("a", "t", ["good"]) == ["good"]
        assert live.batches == [["good"]] and batcher.waiting == 0
        await batcher.drain(task)

    asyncio.run(go())
