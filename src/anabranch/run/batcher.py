"""Continuous batching: whichever streams have events waiting are stepped together, as the batching policy says."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from anabranch.batching import Scheduler, View
from anabranch.run.live import Live, NotTaken, Stuck
from anabranch.run.metrics import Metrics
from anabranch.sessions import Full

log = logging.getLogger("anabranch.serve")


WATCHED = 16


class Closed(Exception):
    """The events were not taken: the server is about to end, or cannot write its journal."""


class Request:
    """Events of one stream that came together and are answered together."""

    __slots__ = ("answered", "answers", "arrival", "deadline", "events", "stream", "taken", "tenant")

    def __init__(self, stream: Hashable, tenant: str, events: list[Any], arrival: float, deadline: float, answered):
        self.stream, self.tenant, self.events, self.answered = stream, tenant, events, answered
        self.arrival, self.deadline = arrival, deadline
        self.taken, self.answers = 0, []


class Batcher:
    """Queues of events, one a stream, that a `Scheduler` empties into `Live.step`, batch after batch.

    Arguments:
        live: what steps a batch; called in a thread of its own, one batch at a time.
        policy: which of the waiting events come next.
        metrics: what is told of all that happens.
        budget: events in a batch at most.
        queue: events that may wait; `per_stream` and `per_tenant`: those of one stream, of one tenant.
        deadline: seconds within which an event should be answered, unless it says otherwise.
        record: keep what came and what was decided, in `came` and `decisions`.
    """

    def __init__(
        self,
        live: Live,
        policy: Scheduler,
        metrics: Metrics,
        *,
        budget: int,
        queue: int,
        per_stream: int,
        per_tenant: int | None,
        deadline: float,
        record: bool = False,
    ):
        self.live, self.policy, self.metrics = live, policy, metrics
        self.budget, self.queue, self.per_stream, self.per_tenant = budget, queue, per_stream, per_tenant
        self.deadline = deadline
        self.waiting = 0
        self._streams: dict[Hashable, deque[Request]] = {}
        self._counts: dict[Hashable, int] = {}
        self._done: dict[Hashable, int] = {}
        self._tenants: dict[str, int] = {}
        self._numbers: dict[str, int] = {}
        self._watched: dict[Hashable, deque] = {}
        self._come = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="step")
        self._open = True
        self.failure: BaseException | None = None
        self.record = record
        self.came: list[tuple[float, Hashable, int, float, str]] = []
        """When events came, of which stream and how many, by when they should be answered, and whose they are."""
        self.decisions: list[tuple[float, dict[Hashable, int]]] = []
        """When the policy was asked, and how many events of which streams it took."""

    def submit(
        self, stream: Hashable, tenant: str, events: list[Any], *, deadline: float | None = None
    ) -> "asyncio.Future[list[Any]]":
        """The answers to some events of a stream, which are stepped in the order in which they are submitted.

        Raises:
            Full: if there is no room for them.
            Closed: if the server is about to end.
        """
        if not self._open:
            raise Closed("the server is closing")
        n, mine, theirs = len(events), self._counts.get(stream, 0), self._tenants.get(tenant, 0)
        for what, count, most in (
            ("the queue", self.waiting, self.queue),
            ("this stream's queue", mine, self.per_stream),
            ("this tenant's queue", theirs, self.per_tenant or self.queue),
        ):
            if count + n > most and (count or n > most):
                self.metrics.refused.inc(n)
                raise Full(what, self.deadline)
        now = time.monotonic()
        answered = asyncio.get_running_loop().create_future()
        request = Request(stream, tenant, events, now, now + (deadline or self.deadline), answered)
        self._streams.setdefault(stream, deque()).append(request)
        if self.record:
            self.came.append((now, stream, n, request.deadline, tenant))
        self._counts[stream], self._tenants[tenant] = mine + n, theirs + n
        self.waiting += n
        self._come.set()
        return answered

    def waiting_of(self, tenant: str) -> int:
        """Events of a tenant that wait."""
        return self._tenants.get(tenant, 0)

    def watch(self, stream: Hashable) -> list[Any]:
        """The last answers of a stream; of the `WATCHED` last streams that were asked for some are kept."""
        if stream not in self._watched and len(self._watched) == WATCHED:
            del self._watched[next(iter(self._watched))]
        return list(self._watched.setdefault(stream, deque(maxlen=200)))

    async def call(self, function: Callable[[], Any]) -> Any:
        """What a function returns that must not run while a batch does."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    async def run(self) -> None:
        """Step batches until `drain`."""
        state = self.policy.init()
        act, learn = self.policy.act, self.policy.learn  # an Equinox module binds them anew whenever it is asked
        taken: list[tuple[Request, int]] = []
        looked = time.monotonic()
        try:
            while self._open or self.waiting:
                if time.monotonic() - looked >= 1.0:
                    await self._expire()
                    looked = time.monotonic()
                if not self.waiting:
                    self._come.clear()
                    await _within(self._come, 1.0)
                    continue
                streams, view = self._view()
                state, batch = act(state, view)
                if self.record:
                    taken_of = zip(streams, batch.take.tolist())
                    self.decisions.append((view.now, {stream: count for stream, count in taken_of if count}))
                if not batch.take.any():
                    self._come.clear()
                    await _within(self._come, max(0.0, (batch.timer or view.now + 0.001) - view.now))
                    continue
                taken, events = self._take(streams, batch.take)
                begin = time.monotonic()
                try:
                    answers = await self.call(lambda: self.live.step(events))
                except (NotTaken, Stuck) as error:
                    log.error("%s", error)
                    self._refuse([request for request, _ in taken], error)
                    await asyncio.sleep(0.1)
                    continue
                took = time.monotonic() - begin
                state = learn(state, view, batch, took)
                self._answer(taken, answers)
                self.metrics.batch(len(events), len(streams), took)
        except BaseException as error:
            self.failure = error
            self._open = False
            self._refuse([request for request, _ in taken], error)
            self._refuse([request for queue in self._streams.values() for request in queue], error)
            raise

    async def _expire(self) -> None:
        try:
            await self.call(self.live.expire)
        except (NotTaken, Stuck) as error:
            log.error("%s", error)

    def _refuse(self, requests: list[Request], error: BaseException) -> None:
        """Tell those who wait that nothing comes. What is left of a request in its queue goes too."""
        for request in requests:
            if not request.answered.done():
                request.answered.set_exception(Closed(str(error)))
            queue = self._streams.get(request.stream)
            if queue and queue[0] is request:
                queue.popleft()
                left = len(request.events) - request.taken
                self._counts[request.stream] -= left
                self._tenants[request.tenant] -= left
                self.waiting -= left
                if not queue:
                    del self._streams[request.stream], self._counts[request.stream], self._done[request.stream]

    async def drain(self, task: asyncio.Task) -> None:
        """Take no more events, and step those that wait."""
        self._open = False
        self._come.set()
        await task
        self._thread.shutdown()

    def _view(self) -> tuple[list[Hashable], View]:
        streams = list(self._streams)
        first = [queue[0] for queue in self._streams.values()]
        n = len(streams)
        number = self._numbers
        tenants = [number.setdefault(request.tenant, len(number)) for request in first]
        return streams, View(
            now=time.monotonic(),
            arrival=np.fromiter((request.arrival for request in first), np.float64, n),
            deadline=np.fromiter((request.deadline for request in first), np.float64, n),
            waiting=np.fromiter((self._counts[stream] for stream in streams), np.int32, n),
            done=np.fromiter((self._done.get(stream, 0) for stream in streams), np.int64, n),
            tenant=np.array(tenants, np.int32),
            budget=self.budget,
        )

    def _take(self, streams: list[Hashable], take: np.ndarray) -> tuple[list[tuple[Request, int]], list[Any]]:
        """The next events of these streams: how many belong to which request, and the events."""
        parts, events = [], []
        for stream, count in zip(streams, take.tolist()):
            if not count:
                continue
            queue = self._streams[stream]
            self._counts[stream] -= count
            self._done[stream] = self._done.get(stream, 0) + count
            self.waiting -= count
            self._tenants[queue[0].tenant] -= count
            while count:
                request = queue[0]
                some = min(count, len(request.events) - request.taken)
                events += request.events[request.taken : request.taken + some]
                parts.append((request, some))
                request.taken += some
                count -= some
                if request.taken == len(request.events):
                    queue.popleft()
            if not queue:
                del self._streams[stream], self._counts[stream], self._done[stream]
        return parts, events

    def _answer(self, parts: list[tuple[Request, int]], answers: list[Any]) -> None:
        at, now = 0, time.monotonic()
        for request, some in parts:
            request.answers += answers[at : at + some]
            at += some
            if len(request.answers) == len(request.events):
                self.metrics.answered(len(request.events), now - request.arrival)
                if request.stream in self._watched:
                    self._watched[request.stream].extend(request.answers)
                if not request.answered.done():  # a client that has gone
                    request.answered.set_result(request.answers)


async def _within(event: asyncio.Event, seconds: float) -> bool:
    """Whether the event came within so many seconds."""
    try:
        await asyncio.wait_for(event.wait(), seconds)
    except TimeoutError:
        return False
    return True
