"""Serving language models, simulated: what a scheduler sees and decides, engines, and what requests experienced.

    >>> from anabranch.schedule.baselines import FCFS
    >>> from anabranch.schedule.cluster import Fitted
    >>> load = Workload.synthetic(200, prompt=300, output=50).poisson(rate=2.0, seed=0)
    >>> result = simulate_serving(load, [Engine(Fitted())], FCFS())
    >>> int(result.tokens.sum()), bool(result.percentile("ttft", 50) < 0.2)
    (10000, True)

A scheduler reads nothing but its `View` (`scheduler.py`), so that one object runs here and drives live sessions
(`live.py`). An engine runs one iteration after the other; what an iteration takes says its cost (`cluster.py`). An
engine with two workers has a loop for prompts and one for decodes, on the same weights and blocks; their iterations
slow each other by `side_by_side`, and the end of one moves whenever another starts or stops beside it.
"""

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from jaxtyping import Float64, Int64

from anabranch.cell import State
from anabranch.schedule.cluster import Work, side_by_side
from anabranch.schedule.scheduler import DECODING, DONE, SWAP, Batch, Engine, Scheduler, View
from anabranch.schedule.seats import Asked, Taken
from anabranch.schedule.stride import Emit, Striding
from anabranch.schedule.workload import Workload

EPS = 1e-9


@dataclass
class Result:
    """What became of each request, and what it took."""

    workload: Workload
    devices: int
    ends: Int64[np.ndarray, " n+1"]
    """Request i's tokens came at `emitted[ends[i]:ends[i + 1]]`."""
    emitted: Float64[np.ndarray, " tokens"]
    rejected: list[int]
    """Requests too large for an engine."""
    seconds: float = 0.0
    """When the last engine stopped."""
    busy: float = 0.0
    """Seconds of work, of all workers together."""
    iterations: int = 0
    preemptions: int = 0
    transfer: float = 0.0
    """Seconds of moving caches between engines."""
    weight_bytes: float = 0.0
    """Weights that were read."""
    prefilled: int = 0
    """Tokens of prompts that were computed, again after a preemption."""
    cached: int = 0
    """Tokens of prompts that were in the cache when their requests began."""
    peak: int = 0
    """The most blocks that an engine's requests held."""
    log: list[tuple] = field(default_factory=list)
    """With `record`: (engine, start, ids decoded, ids prefilled, tokens of each)."""

    @property
    def tokens(self) -> Int64[np.ndarray, " n"]:
        """Tokens that each request got."""
        return np.add.reduceat(np.append(np.isfinite(self.emitted), False), self.ends[:-1]).astype(np.int64)

    @property
    def ttft(self) -> Float64[np.ndarray, " n"]:
        """Seconds to the first token; infinite if there was none."""
        first = self.emitted[self.ends[:-1]] - self.workload.arrival
        return np.where(np.isfinite(first), first, np.inf)

    @property
    def e2e(self) -> Float64[np.ndarray, " n"]:
        """Seconds to the last token."""
        last = self.emitted[self.ends[1:] - 1] - self.workload.arrival
        return np.where(np.isfinite(last), last, np.inf)

    @property
    def tpot(self) -> Float64[np.ndarray, " n"]:
        """Mean seconds from token to token; 0 for an answer of one."""
        n = np.maximum(self.workload.output - 1, 1)
        return np.where(np.isfinite(self.e2e), (self.e2e - np.where(np.isfinite(self.ttft), self.ttft, 0)) / n, np.inf)

    @property
    def tbt(self) -> Float64[np.ndarray, " gaps"]:
        """Seconds between each two tokens of a request."""
        gaps = np.diff(self.emitted)
        inside = np.ones(len(gaps), bool)
        inside[self.ends[1:-1] - 1] = False
        return gaps[inside & np.isfinite(gaps)]

    @property
    def throughput(self) -> float:
        """Tokens a second, all engines together."""
        return float(np.isfinite(self.emitted).sum() / self.seconds) if self.seconds else 0.0

    def percentile(self, metric: str, q: float, warm: float = 0.1) -> float:
        """Of `ttft`, `tpot`, `e2e` or `tbt`; the first `warm` of the requests do not count."""
        values = getattr(self, metric)
        values = values if metric == "tbt" else values[int(warm * len(values)) :]
        return float(np.percentile(values, q)) if len(values) else np.nan

    def attainment(self, ttft: float, tpot: float, warm: float = 0.1) -> float:
        """The share of requests within both goals."""
        fine = (self.ttft <= ttft) & (self.tpot <= tpot)
        return float(fine[int(warm * len(fine)) :].mean())


@dataclass
class _Loop:
    """A worker: it runs one iteration after the other."""

    worker: str
    idle: bool = True
    wake: int = 0
    """Rises whenever what was said to come for it is no longer so."""
    slots: set[int] = field(default_factory=set)
    """Of the iteration under way. This and what follows is for engines with two workers."""
    work: Work | None = None
    """The iteration under way."""
    then: Callable[[float], None] = lambda t: None
    """What its end does."""
    extra: float = 0.0
    """Seconds of it that nothing beside it changes."""
    left: float = 0.0
    """The part of it that was to do at `since`, when all of it would have taken `takes` seconds."""
    since: float = 0.0
    takes: float = 1.0


class _Running(Striding):
    """An engine at work."""

    def __init__(self, engine: Engine, number: int, oracle: bool, emit: Emit, fast: bool, state: State):
        super().__init__(engine, number, oracle, emit, fast)
        self.state = state
        self.loops = [_Loop(worker) for worker in (["both"] if engine.workers == 1 else ["decode", "prefill"])]


def simulate_serving(
    workload: Workload, engines: Sequence[Engine], scheduler: Scheduler, *, fast_forward: bool = True,
    until: float = np.inf, record: bool = False,
) -> Result:  # fmt: skip
    """Serve a workload.

    Arguments:
        fast_forward: run iterations that only decode at once, where the scheduler is `steady`; the result is the same.
        until: stop at this time.
        record: keep what each iteration did; they then run one by one.

    Raises:
        RuntimeError: if the scheduler decides what cannot be, or leaves requests waiting for ever.
    """
    return _Simulation(workload, engines, scheduler, fast_forward, record).run(until)


class _Simulation:
    def __init__(self, load: Workload, engines: Sequence[Engine], scheduler: Scheduler, fast: bool, record: bool):
        self.load, self.scheduler, self.record = load, scheduler, record
        self.fast = fast and scheduler.steady and not record
        ends = np.concatenate([[0], np.cumsum(load.output)])
        self.result = Result(load, sum(e.devices for e in engines), ends, np.full(int(ends[-1]), np.nan), [])
        self.ends, self.prompts, self.outputs = ends.tolist(), load.prompt.tolist(), load.output.tolist()
        self.engines = [
            _Running(engine, i, scheduler.oracle, self.emit, self.fast, scheduler.init())
            for i, engine in enumerate(engines)
        ]
        kind = type(scheduler)  # plain functions: those that Equinox binds are slow to call
        self.act, self.learn = partial(kind.act, scheduler), partial(kind.learn, scheduler)
        self.arrivals = [*load.arrival.tolist(), np.inf]
        self.events: list[tuple[float, int, int, Callable[[float], None]]] = []
        self.count = 0
        self.pulls: deque[tuple[int, int]] = deque()  # (engine, slot) of what is to go to a decode engine
        self.next = 0

    def emit(self, request: int, first: int, times: Float64[np.ndarray, " k"]) -> None:
        start = self.ends[request] + first
        self.result.emitted[start : start + len(times)] = times

    def at(self, time: float, what: Callable[[float], None]) -> None:
        self.count += 1
        heapq.heappush(self.events, (time, self.count, 0, what))

    def run(self, until: float) -> Result:
        while True:
            comes = self.arrivals[self.next]
            time = self.events[0][0] if self.events else np.inf
            if min(comes, time) >= until or (comes == np.inf and time == np.inf):
                break
            if comes <= time:
                self.arrive(comes)
            else:
                heapq.heappop(self.events)[3](time)
        for one in self.engines:
            if one.striding:
                one.halt()
        self.result.peak = max((one.peak for one in self.engines), default=0)
        left = sum(one.requests for one in self.engines)
        if left and until == np.inf:
            raise RuntimeError(f"{type(self.scheduler).__name__} leaves {left} requests waiting for ever")
        return self.result

    def arrive(self, now: float) -> None:
        i = self.next
        self.next += 1
        most = self.prompts[i] + self.outputs[i]
        fits = [one for one in self.engines if one.engine.need(most) <= one.engine.blocks]
        roles = {one.engine.role for one in fits}
        if not roles & {"both", "prefill"} or not roles & {"both", "decode"}:
            self.result.rejected.append(i)
            return
        number = self.scheduler.route([one.load() for one in self.engines], i) if len(self.engines) > 1 else 0
        one = self.engines[number]
        one.queue.append(i)
        one.requests += 1
        one.waiting_tokens += self.prompts[i]
        self.ask(one, now)

    def asked(self, one: _Running, i: int) -> Asked:
        load = self.load
        keys = load.keys(i, one.engine.block) if one.index else []
        return Asked(self.arrivals[i], self.prompts[i], self.outputs[i], load.ttft[i], load.tds[i], keys)

    def ask(self, one: _Running, now: float, stopped: bool = False) -> None:
        """Begin the next iteration of each worker that has none."""
        started = [self.begin(one, loop, now) for loop in one.loops if loop.idle]
        if len(one.loops) > 1 and (stopped or any(started)):
            self.retime(one, now)

    def retime(self, one: _Running, now: float) -> None:
        """What runs on an engine has changed: note how far each iteration is, and how fast it goes from here."""
        under_way = [loop for loop in one.loops if loop.work is not None]
        times = side_by_side(one.engine.cost, [loop.work for loop in under_way])  # pyright: ignore
        for loop, takes in zip(under_way, times, strict=True):
            loop.left -= (now - loop.since) / loop.takes if now > loop.since else 0.0
            loop.since, loop.takes, loop.wake = now, takes + loop.extra, loop.wake + 1
            end = lambda t, loop=loop, asked=loop.wake: self.over(loop, asked, t)
            self.at(now + max(loop.left, 0.0) * loop.takes, end)

    @staticmethod
    def over(loop: _Loop, asked: int, now: float) -> None:
        """The end of an iteration, unless it has been moved."""
        if loop.wake == asked:
            loop.work = None
            loop.then(now)

    def begin(self, one: _Running, loop: _Loop, now: float) -> bool:
        """Ask for a worker's next iteration, and run it; returns whether there is one."""
        if one.queue:
            one.seat(partial(self.asked, one))
        view = one.view(now, loop.worker)
        one.state, batch = self.act(one.state, view)
        extra = 0.0
        if batch.preempt:
            extra = self.moved(one, [slot for slot, how in batch.preempt.items() if how == SWAP])
            self.result.preemptions += len(batch.preempt)
            one.preempt(batch.preempt)
        if one.index:
            one.keep(batch.keep)
        loop.wake += 1
        if len(one.loops) > 1:
            self.apart(one, loop, batch)
        taken = one.take(batch, type(self.scheduler).__name__)
        decode, prompts = taken.decode, taken.prompts
        if not decode and not prompts:
            if batch.timer is not None:
                self.at(max(batch.timer, now + EPS), partial(self.again, one, loop, loop.wake))
            return False
        loop.idle = False
        if taken.back:
            extra += self.moved(one, taken.back)
        done = one.aside.done
        if one.index:
            known = [slot for slot, begins in zip(prompts, taken.fresh, strict=True) if begins]
            self.result.cached += sum(int(done[slot]) for slot in known if not one.preempted[slot])
        if prompts and taken.whole:
            self.result.prefilled += sum(taken.chunk)
        low, high = batch.layers
        tokens = before = twice = held = 0
        for slot, count in zip(prompts, taken.chunk, strict=True):
            then = int(done[slot])
            tokens, before, twice = tokens + count, before + then, twice + count * (2 * then + count)
        if decode:
            held = one.context if one.striding else int(one.done[decode].sum())
        work = Work(tokens, before, twice / 2, len(decode), held, high - low, batch.share)
        cost = one.engine.cost
        if one.striding and not prompts and not extra and batch.share == 1.0 and (steps := one.left()) > 1:
            ends = now + cost.decode_steps(work, steps).cumsum()
            comes = self.arrivals[self.next]
            if one.engine.role != "both":  # others may send it requests, or take some away
                comes = min(comes, self.events[0][0] if self.events else np.inf)
            ends = ends[: int(ends.searchsorted(comes)) + 1]
            last, k = float(ends[-1]), len(ends)
            one.stride(ends)
            self.result.weight_bytes += k * cost.weight_bytes(work)
            self.account(now, last, k)
            self.at(last, partial(self.after, one, loop, now, one.over(), view, batch))
            return True
        self.result.weight_bytes += cost.weight_bytes(work)
        if self.record:
            ids = one.id[decode].tolist(), one.id[prompts].tolist()
            self.result.log.append((one.number, now, *ids, taken.chunk))
        then = partial(self.end, one, loop, now, taken, view, batch)
        if len(one.loops) > 1:
            loop.work, loop.then, loop.extra, loop.left, loop.since = work, then, extra, 1.0, now
        else:
            self.at(now + cost.iteration(work) + extra, then)
        return True

    def apart(self, one: _Running, loop: _Loop, batch: Batch) -> None:
        """See that a worker does its own work only, and leaves alone what the other is busy with."""
        if len(batch.prefill if loop.worker == "decode" else batch.decode):
            raise RuntimeError(f"{type(self.scheduler).__name__} gives the {loop.worker} worker what is not its work")
        if any(not other.idle and other.slots & batch.preempt.keys() for other in one.loops if other is not loop):
            raise RuntimeError(f"{type(self.scheduler).__name__} preempts what the other worker is busy with")
        loop.slots = {*batch.decode, *batch.prefill}

    @staticmethod
    def moved(one: _Running, slots: list[int]) -> float:
        """Seconds in which caches go to or from host memory."""
        return sum(int(one.done[slot]) for slot in slots) * one.engine.cost.kv_bytes / one.engine.host

    def again(self, one: _Running, loop: _Loop, asked: int, now: float) -> None:
        """When a batch that did nothing said, unless something has happened since."""
        if loop.wake == asked:
            self.ask(one, now)

    def end(self, one: _Running, loop: _Loop, start: float, taken: Taken, view: View, batch: Batch, now: float) -> None:
        """What an iteration leaves behind."""
        slots = one.give(taken, now)
        if one.striding:
            for slot in slots:
                self.result.emitted[self.ends[one.id[slot]] + one.tokens(slot) - 1] = now
            over = one.over()
        else:
            generated = one.generated[slots]
            self.result.emitted[self.result.ends[one.id[slots]] + generated - 1] = now
            over = [slot for slot, end in zip(slots, (generated >= one.output[slots]).tolist(), strict=True) if end]
        self.account(start, now, 1)
        self.after(one, loop, start, over, view, batch, now)

    def account(self, start: float, end: float, iterations: int) -> None:
        self.result.busy += end - start
        self.result.iterations += iterations
        self.result.seconds = max(self.result.seconds, end)

    def after(
        self, one: _Running, loop: _Loop, start: float, over: list[int], view: View, batch: Batch, now: float
    ) -> None:
        """What comes next, when some have had their last token."""
        one.leave(sorted(over))
        if one.engine.role == "prefill":
            for slot in list(one.decoding):
                one.put(slot, DONE)
                self.pulls.append((one.number, slot))
        if self.pulls:
            self.pull(now)
        one.state = self.learn(one.state, view, batch, now - start)
        loop.idle = True
        self.ask(one, now, stopped=True)

    def pull(self, now: float) -> None:
        """Decode engines take what is prefilled, the one with fewest requests first, while they have blocks."""
        while self.pulls:
            source, slot = self.pulls[0]
            one = self.engines[source]
            need = int(one.engine.need(one.done[slot] + 1))
            room = [
                other
                for other in self.engines
                if other.engine.role == "decode"
                and other.free - need >= 0.1 * other.engine.blocks * (other.requests > 0)
                and other.free >= need
                and other.empty
            ]
            if not room:
                return
            self.pulls.popleft()
            other = min(room, key=lambda load: (load.requests, load.number))
            to = heapq.heappop(other.empty)
            one.move(slot, other, to)
            other.put(to, DONE)  # until it is there
            other.requests += 1
            other.hold(to, int(one.done[slot]) + 1)
            took = int(one.done[slot]) * one.engine.cost.kv_bytes / min(one.engine.link, other.engine.link)
            self.result.transfer += took
            self.at(now + took, lambda t, a=one, b=other, i=slot, j=to: self.pulled(a, b, i, j, t))

    def pulled(self, one: _Running, other: _Running, slot: int, to: int, now: float) -> None:
        one.leave([slot])
        other.put(to, DECODING)
        for engine in (one, other):
            self.ask(engine, now)


def goodput(
    make: Callable[[float], Workload], serve: Callable[[Workload], Result], *, ttft: float, tpot: float,
    at: float = 0.9, high: float = 64.0, close: float = 0.02, low: float | None = None,
) -> float:  # fmt: skip
    """The largest rate, requests a second and device, at which a share `at` of requests is within both goals.

    Arguments:
        make: the workload at a rate; with the same seeds at every rate, or the search wanders.
        serve: what becomes of it.
        high: no rate above this is tried.
        close: stop when the rate is known to this share.
        low: the first rate that is tried, by default a 64th of `high`; lower ones only if it is too much.
    """
    devices = serve(make(high)).devices
    fine = lambda rate: serve(make(rate)).attainment(ttft, tpot) >= at
    low = high / 64 if low is None else low
    while not fine(low):
        low, high = low / 2, low
        if low < 1e-3:
            return 0.0
    while high - low > close * high:
        middle = (low + high) / 2
        low, high = (middle, high) if fine(middle) else (low, middle)
    return low / devices
