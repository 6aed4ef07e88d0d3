"""Serving language models, simulated: what a scheduler sees and decides, engines, and what requests experienced.

    >>> from anabranch.schedule.baselines import FCFS
    >>> from anabranch.schedule.cluster import Fitted
    >>> load = Workload.synthetic(200, prompt=300, output=50).poisson(rate=2.0, seed=0)
    >>> result = simulate_serving(load, [Engine(Fitted())], FCFS())
    >>> int(result.tokens.sum()), bool(result.percentile("ttft", 50) < 0.2)
    (10000, True)

A scheduler reads nothing but its `View`, so that one object runs here and drives live sessions. An engine runs one
iteration after the other; what an iteration takes says its cost (`cluster.py`).
"""

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
from jaxtyping import Bool, Float64, Int8, Int64

from anabranch.cell import Policy, State
from anabranch.keep.blocks import PrefixIndex
from anabranch.schedule.cluster import Work
from anabranch.schedule.workload import Workload

EMPTY, WAITING, PREFILLING, DECODING, SWAPPED, DONE = range(6)
"""What a slot holds: nothing; a request that waits, is being prefilled, decodes, or has been sent to host memory; or
one that is prefilled and waits for another engine."""
SWAP, RECOMPUTE = 1, 2
"""How a request is preempted: its cache goes to host memory, or is dropped and made again."""
EPS = 1e-9


class View(NamedTuple):
    """What an engine's scheduler sees. Arrays are over slots, in no order; they must not be written to."""

    now: float
    id: Int64[np.ndarray, " N"]
    """Increases in the order of arrival; -1 where the slot is empty."""
    status: Int8[np.ndarray, " N"]
    arrival: Float64[np.ndarray, " N"]
    prompt: Int64[np.ndarray, " N"]
    """Tokens to prefill; after a preemption with those generated so far."""
    done: Int64[np.ndarray, " N"]
    """Tokens in the cache."""
    generated: Int64[np.ndarray, " N"]
    blocks: Int64[np.ndarray, " N"]
    """Those it has; of one that waits, those it would get without taking a free one."""
    first_emit: Float64[np.ndarray, " N"]
    """When the first token came; NaN before."""
    last_emit: Float64[np.ndarray, " N"]
    ttft: Float64[np.ndarray, " N"]
    tds: Float64[np.ndarray, " N"]
    preempted: Int64[np.ndarray, " N"]
    """How often it has been."""
    limit: Int64[np.ndarray, " N"]
    """Tokens it will generate, where the scheduler may know; else -1."""
    free_blocks: int
    block: int
    """Tokens of a block."""
    total_blocks: int
    queued: int
    """Requests for which there is no slot yet."""
    max_tokens: int
    """In an iteration."""
    max_seqs: int
    """Requests in an iteration."""
    hit: Int64[np.ndarray, " N"]
    """As `done`; of one that waits, the tokens of its prompt that it would find in the cache."""
    own: Int64[np.ndarray, " N"]
    """Blocks that nobody else has: those that come free when it goes."""

    def need(self, tokens: Any) -> Any:
        """Blocks for so many tokens."""
        return -(-tokens // self.block)


class Batch(NamedTuple):
    """What the next iteration does."""

    decode: Bool[np.ndarray, " N"]
    prefill: Int64[np.ndarray, " N"]
    """Tokens of each prompt, after those that the cache holds."""
    preempt: Int8[np.ndarray, " N"] | None = None
    """`SWAP`, `RECOMPUTE`, or 0."""
    layers: tuple[float, float] = (0.0, 1.0)
    """The part of the layers through which prompts go, from and to; a prompt is prefilled after the last of them."""
    timer: float | None = None
    """If there is nothing to do: when to ask again, unless a request comes before."""
    keep: Bool[np.ndarray, " N"] | None = None
    """Who waits and is to find what the cache now holds of its prompt: that stays, used or not, until a later batch
    does not say so."""


class Scheduler(Policy):
    """A scheduler of one or more engines: `act(state, view) -> (state, batch)` for the engine that is free.

    Then `learn(state, view, batch, seconds)` is told how long the iteration took.
    """

    host = True
    steady: ClassVar[bool] = True
    """Whether a decision to only decode stays the same until a request comes, ends, or memory runs out; the simulator
    then runs such iterations at once."""
    oracle: ClassVar[bool] = False
    """Whether it is shown how long answers will be, which no real one is."""

    def init(self, *, key=None) -> State:
        return ()

    def act(self, state: State, x: View) -> tuple[State, Batch]:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise NotImplementedError(f"{type(self).__name__} is abstract: it defines no `act`")

    def learn(self, state: State, x: View, decision: Batch, feedback: float) -> State:  # pyright: ignore
        return state

    def route(self, engines: list["Load"], request: int) -> int:
        """Which engine a new request goes to: the one with fewest."""
        takes = [load for load in engines if load.role != "decode"]
        return min(takes, key=lambda load: (load.requests, load.engine)).engine


class Load(NamedTuple):
    """How busy an engine is."""

    engine: int
    role: str
    requests: int
    tokens: int
    """Of prompts that are not prefilled."""
    free_blocks: int


class Cost(Protocol):
    """What an iteration takes."""

    @property
    def kv_bytes(self) -> int: ...
    @property
    def kv_tokens(self) -> int: ...
    def iteration(self, work: Work) -> float: ...
    def decode_steps(self, decode: Int64[np.ndarray, " b"], k: int) -> Float64[np.ndarray, " k"]: ...
    def weight_bytes(self, work: Work) -> float: ...


@dataclass(frozen=True)
class Engine:
    """One replica of the model.

    Raises:
        ValueError: if its memory holds no block, or a size is not positive.
    """

    cost: Cost
    kv_tokens: int | None = None
    """By default what the cost says fits."""
    block: int = 16
    max_tokens: int = 8192
    max_seqs: int = 256
    role: str = "both"
    """`prefill` engines hand requests on to `decode` engines after their first token."""
    link: float = 300e9
    """Bytes a second to other engines."""
    host: float = 25e9
    """Bytes a second to host memory."""
    devices: int = 1
    prefixes: bool = False
    """Whether requests share the blocks in which their prompts begin alike. Those that nobody uses stay in memory until
    there is no other room, the least recently used go first; they count as free."""

    def __post_init__(self):
        if self.role not in ("both", "prefill", "decode"):
            raise ValueError(f"role must be 'both', 'prefill' or 'decode', got {self.role!r}")
        for name in ("block", "max_tokens", "max_seqs", "link", "host", "devices"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.blocks < 1:
            raise ValueError(f"kv_tokens must hold a block of {self.block}, got {self.tokens}")

    @property
    def tokens(self) -> int:
        return self.cost.kv_tokens if self.kv_tokens is None else self.kv_tokens

    @property
    def blocks(self) -> int:
        return self.tokens // self.block


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
    """Engine-seconds of work."""
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


class _Running:
    """An engine at work."""

    def __init__(self, engine: Engine, number: int, oracle: bool):
        n = 2 * engine.max_seqs
        self.engine, self.number, self.oracle = engine, number, oracle
        ints = lambda value: np.full(n, value, np.int64)
        floats = lambda: np.full(n, np.nan)
        self.id, self.status = ints(-1), np.zeros(n, np.int8)
        self.prompt, self.done, self.generated, self.blocks = (ints(0) for _ in range(4))
        self.preempted, self.output = ints(0), ints(0)
        self.arrival, self.first, self.last, self.ttft, self.tds = (floats() for _ in range(5))
        self.free = engine.blocks
        self.queue: deque[int] = deque()
        self.requests = self.waiting_tokens = 0
        self.state: State = ()
        self.idle = True
        self.wake = 0
        self.peak = 0
        self.index = PrefixIndex(engine.blocks) if engine.prefixes else None
        self.keys: Any = np.full(n, None)  # of the blocks of a prompt, and of those that it may find
        self.finds: Any = np.full(n, None)
        self.tables, self.seen, self.kept = [[] for _ in range(n)], [(0, 0)] * n, []

    def load(self) -> Load:
        return Load(self.number, self.engine.role, self.requests, self.waiting_tokens, self.free)

    def view(self, now: float) -> View:
        engine = self.engine
        blocks, hit, own = self.found() if self.index else (self.blocks, self.done, self.blocks)
        return View(
            now, self.id, self.status, self.arrival, self.prompt, self.done, self.generated, blocks, self.first,
            self.last, self.ttft, self.tds, self.preempted, self.output if self.oracle else np.full_like(self.id, -1),
            self.free, engine.block, engine.blocks, len(self.queue), engine.max_tokens, engine.max_seqs,
            hit, own,
        )  # fmt: skip

    def seat(self, load: Workload) -> None:
        """Give slots to requests in the queue."""
        if not self.queue:
            return
        for slot in np.flatnonzero(self.status == EMPTY)[: len(self.queue)].tolist():
            i = self.queue.popleft()
            self.id[slot], self.status[slot], self.arrival[slot] = i, WAITING, load.arrival[i]
            self.prompt[slot], self.output[slot] = load.prompt[i], load.output[i]
            self.ttft[slot], self.tds[slot] = load.ttft[i], load.tds[i]
            self.keys[slot] = load.keys(i, self.engine.block) if self.index else []
            # Its last token is never found but computed: what follows it comes from that.
            self.finds[slot] = self.keys[slot][: (int(load.prompt[i]) - 1) // self.engine.block]
            for column in (self.done, self.generated, self.blocks, self.preempted):
                column[slot] = 0
            self.first[slot] = self.last[slot] = np.nan

    def hold(self, slots: np.ndarray, tokens: np.ndarray) -> None:
        """Let requests have the blocks for so many tokens.

        Raises:
            RuntimeError: if there are too few; a scheduler must not ask for more than there are.
        """
        need = np.maximum(self.blocks[slots], -(-tokens // self.engine.block))
        more = int((need - self.blocks[slots]).sum())
        if more > self.free:
            raise RuntimeError(f"the scheduler needs {more} blocks of engine {self.number}, {self.free} are free")
        if self.index:
            for slot, count in zip(slots.tolist(), (need - self.blocks[slots]).tolist()):
                self.tables[slot] += self.index.alloc(count)
        self.free -= more
        self.blocks[slots] = need
        self.peak = max(self.peak, self.engine.blocks - self.free)

    def release(self, slots: np.ndarray) -> None:
        self.free += int(self.blocks[slots].sum())
        self.blocks[slots] = 0
        if self.index:
            for slot in slots.tolist():
                self.index.free(self.tables[slot])
                self.tables[slot] = []
            self.free = self.index.available

    # The cache of prefixes; only with an index.

    def found(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`View.blocks`, `hit` and `own`."""
        assert self.index
        blocks, hit, own = self.blocks.copy(), self.done.copy(), self.blocks.copy()
        for slot in np.flatnonzero(self.blocks).tolist():
            own[slot] -= self.index.shared(self.tables[slot])
        waiting = np.flatnonzero(self.status == WAITING)
        for slot in waiting.tolist():
            self.seen[slot] = self.index.look(self.finds[slot], self.seen[slot])
        seen = np.array([self.seen[slot] for slot in waiting.tolist()], np.int64).reshape(-1, 2)
        hit[waiting], blocks[waiting] = seen[:, 0] * self.engine.block, seen[:, 1]
        return blocks, hit, own

    def keep(self, slots: np.ndarray) -> None:
        """Hold what these would find, and nothing else that was held so."""
        assert self.index
        kept = [self.index.match(self.finds[slot]) for slot in slots.tolist()]
        for ids in kept:
            self.index.fork(ids)
        for ids in self.kept:
            self.index.free(ids)
        self.kept, self.free = kept, self.index.available

    def find(self, slots: np.ndarray) -> None:
        """Let requests begin with what the cache holds of their prompts."""
        assert self.index
        for slot in slots.tolist():
            table = self.tables[slot]
            more = self.index.match(self.finds[slot])[len(table) :]
            self.index.fork(more)
            table += more
            tokens = len(table) * self.engine.block
            self.waiting_tokens -= tokens - int(self.done[slot])
            self.done[slot], self.blocks[slot] = tokens, len(table)
        self.free = self.index.available

    def fill(self, slots: np.ndarray, chunk: np.ndarray, fresh: np.ndarray, whole: bool) -> np.ndarray:
        """Hold the blocks of prompts and make known what they compute; returns the tokens that each still has to.

        One prompt after the other, as `prompts` orders them: those that begin find what the ones before them compute.
        """
        assert self.index
        chunk = chunk.copy()
        for i in np.lexsort((self.id[slots], fresh)).tolist():
            one = slots[i : i + 1]
            slot = int(slots[i])
            if fresh[i]:
                self.find(one)
            chunk[i] = min(chunk[i], self.prompt[slot] - self.done[slot])
            self.hold(one, self.done[one] + chunk[i])
            if whole:
                known = self.keys[slot][: (self.done[slot] + chunk[i]) // self.engine.block]
                self.tables[slot][: len(known)] = self.index.insert(known, self.tables[slot][: len(known)])
                self.free = self.index.available
        return chunk


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


_COLUMNS = "id arrival prompt done generated first last ttft tds preempted output keys finds".split()


class _Simulation:
    def __init__(self, load: Workload, engines: Sequence[Engine], scheduler: Scheduler, fast: bool, record: bool):
        self.load, self.scheduler, self.record = load, scheduler, record
        self.fast = fast and scheduler.steady and not record
        self.engines = [_Running(engine, i, scheduler.oracle) for i, engine in enumerate(engines)]
        for one in self.engines:
            one.state = scheduler.init()
        ends = np.concatenate([[0], np.cumsum(load.output)])
        self.result = Result(load, sum(e.devices for e in engines), ends, np.full(int(ends[-1]), np.nan), [])
        self.act, self.learn = scheduler.act, scheduler.learn  # an Equinox module binds them anew at every call
        self.events: list[tuple[float, int, int, Callable[[float], None]]] = []
        self.count = 0
        self.pulls: deque[tuple[int, int]] = deque()  # (engine, slot) of what is to go to a decode engine
        self.next = 0

    def at(self, time: float, what: Callable[[float], None]) -> None:
        self.count += 1
        heapq.heappush(self.events, (time, self.count, 0, what))

    def run(self, until: float) -> Result:
        arrival = self.load.arrival
        while True:
            comes = arrival[self.next] if self.next < len(arrival) else np.inf
            time = self.events[0][0] if self.events else np.inf
            if min(comes, time) >= until or (comes == np.inf and time == np.inf):
                break
            if comes <= time:
                self.arrive(float(comes))
            else:
                heapq.heappop(self.events)[3](time)
        self.result.peak = max((one.peak for one in self.engines), default=0)
        left = sum(one.requests for one in self.engines)
        if left and until == np.inf:
            raise RuntimeError(f"{type(self.scheduler).__name__} leaves {left} requests waiting for ever")
        return self.result

    def arrive(self, now: float) -> None:
        i = self.next
        self.next += 1
        most = int(self.load.prompt[i] + self.load.output[i])
        fits = [one for one in self.engines if -(-most // one.engine.block) <= one.engine.blocks]
        roles = {one.engine.role for one in fits}
        if not roles & {"both", "prefill"} or not roles & {"both", "decode"}:
            self.result.rejected.append(i)
            return
        number = self.scheduler.route([one.load() for one in self.engines], i) if len(self.engines) > 1 else 0
        one = self.engines[number]
        one.queue.append(i)
        one.requests += 1
        one.waiting_tokens += int(self.load.prompt[i])
        if one.idle:
            self.begin(one, now)

    def begin(self, one: _Running, now: float) -> None:
        """Ask for the next iteration of an engine, and run it."""
        one.seat(self.load)
        view = one.view(now)
        one.state, batch = self.act(one.state, view)
        if batch.preempt is not None and batch.preempt.any():
            extra = self.preempt(one, batch.preempt)
        else:
            extra = 0.0
        if one.index:
            one.keep(np.flatnonzero(batch.keep if batch.keep is not None else ()))
        decode, prompts = np.flatnonzero(batch.decode), np.flatnonzero(batch.prefill)
        if not len(decode) and not len(prompts):
            one.idle, one.wake = True, one.wake + 1
            if batch.timer is not None:
                again = lambda t, asked=one.wake: self.begin(one, t) if one.wake == asked else None
                self.at(max(batch.timer, now + EPS), again)
            return
        one.idle, one.wake = False, one.wake + 1
        low, high = batch.layers
        chunk, fresh = batch.prefill[prompts], one.status[prompts] == WAITING
        back = decode[one.status[decode] == SWAPPED]
        extra += self.moved(one, int(one.done[back].sum()))
        if one.index:
            one.find(prompts[fresh])
        if len(prompts):
            over = chunk > one.prompt[prompts] - one.done[prompts]
            if over.any() or (one.status[prompts] > PREFILLING).any():
                raise RuntimeError(f"{type(self.scheduler).__name__} prefills what is not there")
            if one.index:
                chunk = one.fill(prompts, chunk, fresh, high >= 1.0)
                self.result.cached += int(one.done[prompts[fresh & (one.preempted[prompts] == 0)]].sum())
            else:
                one.hold(prompts, one.done[prompts] + chunk)
            one.status[prompts] = PREFILLING
            self.result.prefilled += int(chunk.sum()) if high >= 1.0 else 0
        if len(decode):
            held = one.status[decode]
            if ((held != DECODING) & (held != SWAPPED)).any():
                raise RuntimeError(f"{type(self.scheduler).__name__} decodes what is not prefilled")
            one.hold(decode, one.done[decode] + 1)
            one.status[decode] = DECODING
        cost = one.engine.cost
        if self.fast and not len(prompts) and not extra and batch.preempt is None:
            steps = self.steps(one, decode, now)
            if steps > 1:
                took = cost.decode_steps(one.done[decode], steps)
                ends = now + np.cumsum(took)
                comes = self.load.arrival[self.next] if self.next < len(self.load) else np.inf
                comes = min(comes, self.events[0][0] if self.events else np.inf)
                steps = min(steps, int(np.searchsorted(ends, comes, "left")) + 1)
                self.decoded(one, decode, ends[:steps], batch, view)
                return
        work = Work(chunk, one.done[prompts], one.done[decode], high - low)
        end = now + cost.iteration(work) + extra
        self.result.weight_bytes += cost.weight_bytes(work)
        if self.record:
            tokens = (one.id[decode].tolist(), one.id[prompts].tolist(), chunk.tolist())
            self.result.log.append((one.number, now, *tokens))
        self.at(end, lambda t: self.end(one, now, t, decode, prompts, chunk, high >= 1.0, view, batch))

    def preempt(self, one: _Running, how: np.ndarray) -> float:
        """Take the cache from some requests; returns the seconds that this takes."""
        seconds = 0.0
        slots = np.flatnonzero(how)
        self.result.preemptions += len(slots)
        one.preempted[slots] += 1
        for kind in (SWAP, RECOMPUTE):
            some = slots[how[slots] == kind]
            if kind == SWAP:
                seconds = self.moved(one, int(one.done[some].sum()))
                one.status[some] = SWAPPED
            else:
                one.prompt[some] = self.load.prompt[one.id[some]] + one.generated[some]
                one.done[some], one.status[some] = 0, WAITING
        one.release(slots)
        return seconds

    @staticmethod
    def moved(one: _Running, tokens: int) -> float:
        return tokens * one.engine.cost.kv_bytes / one.engine.host

    def steps(self, one: _Running, decode: np.ndarray, now: float) -> int:
        """How many iterations are sure to only decode: until one ends, or blocks run out."""
        most = int((one.output[decode] - one.generated[decode]).min())
        held, size = one.done[decode], one.engine.block
        blocks = lambda k: int((-(-(held + k) // size) - one.blocks[decode]).clip(0).sum())
        if blocks(most) > one.free:
            low, high = 1, most
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if blocks(middle) <= one.free else (low, middle)
            most = low
        return min(most, 4096)

    def decoded(self, one: _Running, decode: np.ndarray, ends: np.ndarray, batch: Batch, view: View) -> None:
        """Several iterations that only decode, at once."""
        k = len(ends)
        ids = one.id[decode]
        at = (self.result.ends[ids] + one.generated[decode])[:, None] + np.arange(k)
        self.result.emitted[at] = ends
        one.hold(decode, one.done[decode] + k)
        one.done[decode] += k
        one.generated[decode] += k
        one.last[decode] = ends[-1]
        self.result.weight_bytes += k * one.engine.cost.weight_bytes(Work(decode=one.done[decode]))
        self.account(view.now, float(ends[-1]), k)
        self.at(float(ends[-1]), lambda t: self.after(one, view.now, t, decode, view, batch))

    def end(self, one, start, now, decode, prompts, chunk, whole, view, batch) -> None:
        """What an iteration leaves behind."""
        ids = one.id[decode]
        self.result.emitted[self.result.ends[ids] + one.generated[decode]] = now
        one.done[decode] += 1
        one.generated[decode] += 1
        one.last[decode] = now
        if whole and len(prompts):
            one.done[prompts] += chunk
            one.waiting_tokens -= int(chunk.sum())
            ready = prompts[one.done[prompts] == one.prompt[prompts]]
            ids = one.id[ready]
            self.result.emitted[self.result.ends[ids] + one.generated[ready]] = now
            one.first[ready] = np.where(one.generated[ready] == 0, now, one.first[ready])
            one.generated[ready] += 1
            one.last[ready] = now
            one.status[ready] = DECODING
            decode = np.concatenate([decode, ready])
        self.account(start, now, 1)
        self.after(one, start, now, decode, view, batch)

    def account(self, start: float, end: float, iterations: int) -> None:
        self.result.busy += end - start
        self.result.iterations += iterations
        self.result.seconds = max(self.result.seconds, end)

    def after(self, one: _Running, start: float, now: float, decode: np.ndarray, view: View, batch: Batch) -> None:
        over = decode[one.generated[decode] >= one.output[decode]]
        if len(over):
            one.release(over)
            one.status[over], one.id[over] = EMPTY, -1
            one.requests -= len(over)
        if one.engine.role == "prefill":
            for slot in np.flatnonzero(one.status == DECODING).tolist():
                one.status[slot] = DONE
                self.pulls.append((one.number, slot))
        self.pull(now)
        one.state = self.learn(one.state, view, batch, now - start)
        self.begin(one, now)

    def pull(self, now: float) -> None:
        """Decode engines take what is prefilled, the one with fewest requests first, while they have blocks."""
        while self.pulls:
            source, slot = self.pulls[0]
            one = self.engines[source]
            need = -(-int(one.done[slot] + 1) // one.engine.block)
            room = [
                other
                for other in self.engines
                if other.engine.role == "decode"
                and other.free - need >= 0.1 * other.engine.blocks * (other.requests > 0)
                and other.free >= need
                and (other.status == EMPTY).any()
            ]
            if not room:
                return
            self.pulls.popleft()
            other = min(room, key=lambda load: (load.requests, load.number))
            to = int(np.flatnonzero(other.status == EMPTY)[0])
            for name in _COLUMNS:
                getattr(other, name)[to] = getattr(one, name)[slot]
            other.status[to] = DONE  # until it is there
            other.requests += 1
            other.hold(np.array([to]), np.array([one.done[slot] + 1]))
            took = int(one.done[slot]) * one.engine.cost.kv_bytes / min(one.engine.link, other.engine.link)
            self.result.transfer += took
            self.at(now + took, lambda t, a=one, b=other, i=slot, j=to: self.pulled(a, b, i, j, t))

    def pulled(self, one: _Running, other: _Running, slot: int, to: int, now: float) -> None:
        one.release(np.array([slot]))
        one.status[slot], one.id[slot] = EMPTY, -1
        one.requests -= 1
        other.status[to] = DECODING
        for engine in (one, other):
            if engine.idle:
                self.begin(engine, now)


def goodput(
    make: Callable[[float], Workload], serve: Callable[[Workload], Result], *, ttft: float, tpot: float,
    at: float = 0.9, high: float = 64.0, close: float = 0.02,
) -> float:  # fmt: skip
    """The largest rate, requests a second and device, at which a share `at` of requests is within both goals.

    Arguments:
        make: the workload at a rate; with the same seeds at every rate, or the search wanders.
        serve: what becomes of it.
        high: no rate above this is tried.
        close: stop when the rate is known to this share.
    """
    devices = serve(make(high)).devices
    fine = lambda rate: serve(make(rate)).attainment(ttft, tpot) >= at
    low = high / 64
    while not fine(low):
        low, high = low / 2, low
        if low < 1e-3:
            return 0.0
    while high - low > close * high:
        middle = (low + high) / 2
        low, high = (middle, high) if fine(middle) else (low, middle)
    return low / devices
