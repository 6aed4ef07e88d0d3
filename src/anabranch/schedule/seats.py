"""The requests of one engine: in which slot each is, what it has and what it needs; simulated and live."""

from bisect import insort
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from heapq import heappop, heappush
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

from anabranch.keep.blocks import PrefixIndex
from anabranch.schedule.scheduler import (
    DECODING,
    DONE,
    EMPTY,
    PREFILLING,
    RECOMPUTE,
    SWAP,
    SWAPPED,
    WAITING,
    Batch,
    Engine,
    Load,
    View,
)

_COLUMNS = "id arrival prompt done generated first last ttft tds preempted output asked keys finds".split()


class Asked(NamedTuple):
    """A request that comes."""

    arrival: float
    prompt: int
    output: int
    """Tokens that it gets; live, at most."""
    ttft: float
    tds: float
    keys: list = []
    """Of the blocks of its prompt, where these may be shared."""


class Taken(NamedTuple):
    """What an iteration does."""

    decode: list[int]
    prompts: list[int]
    chunk: list[int]
    """Tokens of each prompt."""
    fresh: list[bool]
    """Whose prompts begin."""
    back: list[int]
    """Those of `decode` whose caches come back from host memory."""
    whole: bool
    """Whether prompts pass the last layer."""


class Columns(NamedTuple):
    """As in a `View`."""

    done: Int64[np.ndarray, " N"]
    blocks: Int64[np.ndarray, " N"]
    generated: Int64[np.ndarray, " N"]
    last: Float64[np.ndarray, " N"]


class Seats:
    """The requests of one engine, those who wait for a slot, and the blocks that each has."""

    def __init__(self, engine: Engine, number: int, oracle: bool):
        n = 2 * engine.max_seqs
        self.engine, self.number = engine, number
        ints = lambda value: np.full(n, value, np.int64)
        floats = lambda: np.full(n, np.nan)
        self.id, self.status = ints(-1), np.zeros(n, np.int8)
        self.prompt, self.done, self.generated, self.blocks = (ints(0) for _ in range(4))
        self.preempted, self.output, self.asked = ints(0), ints(0), ints(0)
        self.arrival, self.first, self.last, self.ttft, self.tds = (floats() for _ in range(5))
        self.limit = self.output if oracle else ints(-1)
        self.free = self.total = engine.blocks
        self.queue: deque[int] = deque()
        self.empty = list(range(n))  # a heap: the first ones are taken first
        self.begun: list[int] = []
        self.waiting: list[int] = []
        self.decoding: list[int] = []
        self._lists = {PREFILLING: self.begun, WAITING: self.waiting, DECODING: self.decoding}
        self.requests = self.waiting_tokens = 0
        self.peak = 0
        self.index = PrefixIndex(engine.blocks) if engine.prefixes else None
        self.keys: Any = np.full(n, None)  # of the blocks of a prompt, and of those that it may find
        self.finds: Any = np.full(n, None)
        self.tables, self.seen, self.kept = [[] for _ in range(n)], [(0, 0)] * n, []

    def load(self) -> Load:
        """How busy it is."""
        return Load(self.number, self.engine.role, self.requests, self.waiting_tokens, self.free)

    def view(self, now: float, worker: str = "both") -> View:
        """What a scheduler sees of it."""
        return View(now, self, worker)

    @property
    def aside(self) -> Columns:
        """What is right of those who do not decode, at least."""
        return Columns(self.done, self.blocks, self.generated, self.last)

    @property
    def growth(self) -> int:
        """Blocks that those who decode need for a token more each."""
        slots = self.decoding
        return int(np.maximum(self.engine.need(self.done[slots] + 1) - self.blocks[slots], 0).sum()) if slots else 0

    def put(self, slot: int, status: int) -> None:
        """Change what a slot holds; one that is empty has been taken off `empty`."""
        old = int(self.status[slot])
        if old == status:
            return
        if old in self._lists:
            self._lists[old].remove(slot)
        self.status[slot] = status
        if status == EMPTY:
            heappush(self.empty, slot)
        elif status == DECODING:
            self.decoding.append(slot)
        elif status in self._lists:
            insort(self._lists[status], slot, key=self.id.__getitem__)

    def seat(self, asked: Callable[[int], Asked]) -> None:
        """Give slots to requests in the queue."""
        while self.queue and self.empty:
            i, slot = self.queue.popleft(), heappop(self.empty)
            one = asked(i)
            self.id[slot], self.arrival[slot] = i, one.arrival
            self.prompt[slot] = self.asked[slot] = one.prompt
            self.output[slot], self.ttft[slot], self.tds[slot] = one.output, one.ttft, one.tds
            # Its last token is never found but computed: what follows it comes from that.
            self.keys[slot], self.finds[slot] = one.keys, one.keys[: (one.prompt - 1) // self.engine.block]
            done, blocks, generated, last = self.aside
            done[slot] = blocks[slot] = generated[slot] = self.preempted[slot] = 0
            self.first[slot] = last[slot] = np.nan
            self.put(slot, WAITING)

    def hold(self, slot: int, tokens: int) -> None:
        """Let a request that does not decode have the blocks for so many tokens.

        Raises:
            RuntimeError: if there are too few; a scheduler must not ask for more than there are.
        """
        blocks = self.aside.blocks
        more = self.engine.need(tokens) - int(blocks[slot])
        if more > 0:
            self._claim(more)
            if self.index:
                self.tables[slot] += self.index.alloc(more)
            blocks[slot] += more

    def _claim(self, more: int) -> None:
        if not more:
            return
        if more > self.free:
            raise RuntimeError(f"the scheduler needs {more} blocks of engine {self.number}, {self.free} are free")
        self.free -= more
        self.peak = max(self.peak, self.total - self.free)

    def release(self, slot: int) -> None:
        """Take its blocks from a request that does not decode."""
        blocks = self.aside.blocks
        self.free += int(blocks[slot])
        blocks[slot] = 0
        if self.index:
            self.index.free(self.tables[slot])
            self.tables[slot] = []
            self.free = self.index.available

    def preempt(self, how: Mapping[int, int]) -> None:
        """Take the cache from some requests: it is kept elsewhere, or to be made again.

        Raises:
            RuntimeError: if a slot holds no request that has one.
        """
        for slot, way in how.items():
            if int(self.status[slot]) in (EMPTY, DONE):
                raise RuntimeError(f"the scheduler preempts slot {slot} of engine {self.number}, which holds none")
            self.preempted[slot] += 1
            if way == RECOMPUTE:
                left = max(0, int(self.prompt[slot] - self.done[slot]))
                self.prompt[slot] = self.asked[slot] + self.generated[slot]
                self.waiting_tokens += int(self.prompt[slot]) - left
            self.put(slot, SWAPPED if way == SWAP else WAITING)
            if way == RECOMPUTE:
                self.done[slot] = 0
            self.release(slot)

    def take(self, batch: Batch, who: str) -> Taken:
        """Let requests have the blocks that an iteration needs, and see that there is what it is to do.

        Raises:
            RuntimeError: if it is not; the message says `who` has asked for it.
        """
        whole = batch.layers[1] >= 1.0
        prompts, chunk, fresh = self._take_prompts(batch.prefill, whole, who)
        back = self._take_decodes(batch.decode, who)
        return Taken(list(batch.decode), prompts, chunk, fresh, back, whole)

    def _take_prompts(
        self, prefill: Mapping[int, int], whole: bool, who: str
    ) -> tuple[list[int], list[int], list[bool]]:
        if not prefill:
            return [], [], []
        prompts, chunk = list(prefill), list(prefill.values())
        fresh = [int(self.status[slot]) == WAITING for slot in prompts]
        if self.index:
            self.find([slot for slot, begins in zip(prompts, fresh, strict=True) if begins])
        done = self.aside.done
        for slot, count in prefill.items():
            before = int(done[slot])
            if int(self.status[slot]) not in (WAITING, PREFILLING) or not 0 < count <= int(self.prompt[slot]) - before:
                raise RuntimeError(f"{who} prefills what is not there")
            if not self.index:
                self.hold(slot, before + count)
        if self.index:
            chunk = self.fill(prompts, chunk, fresh, whole)
        for slot, begins in zip(prompts, fresh, strict=True):
            if begins:
                self.put(slot, PREFILLING)
        return prompts, chunk, fresh

    def _take_decodes(self, decode: Sequence[int] | np.ndarray, who: str) -> list[int]:
        """Returns those whose caches come back."""
        if not len(decode):
            return []
        if len(set(decode)) < len(decode):
            raise RuntimeError(f"{who} decodes a request twice")
        slots = np.asarray(decode, np.int64)
        back = slots[self.status[slots] != DECODING].tolist()
        for slot in back:
            if self.status[slot] != SWAPPED:
                raise RuntimeError(f"{who} decodes what is not prefilled")
            self.put(slot, DECODING)
        held = self.blocks[slots]
        need = np.maximum(held, self.engine.need(self.done[slots] + 1))
        self._claim(int((need - held).sum()))
        if self.index:
            for slot, more in zip(slots.tolist(), (need - held).tolist(), strict=True):
                self.tables[slot] += self.index.alloc(more)
        self.blocks[slots] = need
        return back

    def give(self, taken: Taken, now: float) -> list[int]:
        """Count what an iteration has done; returns the slots of those who have a token more."""
        if slots := taken.decode:
            self.done[slots] += 1
            self.generated[slots] += 1
            self.last[slots] = now
        return taken.decode + self._prefilled(taken, now)

    def _prefilled(self, taken: Taken, now: float) -> list[int]:
        """Returns the slots of those whose prompts are done."""
        ready = []
        if taken.whole:
            done, _, generated, last = self.aside
            for slot, count in zip(taken.prompts, taken.chunk, strict=True):
                done[slot] += count
                self.waiting_tokens -= count
                if done[slot] == self.prompt[slot]:
                    if generated[slot] == 0:
                        self.first[slot] = now
                    generated[slot] += 1
                    last[slot] = now
                    self.put(slot, DECODING)
                    ready.append(slot)
        return ready

    def leave(self, slots: Iterable[int]) -> None:
        """Requests go."""
        for slot in slots:
            self.put(slot, EMPTY)
            self.release(slot)
            self.id[slot] = -1
            self.requests -= 1

    def move(self, slot: int, other: "Seats", to: int) -> None:
        """Copy what is known of a request to another engine."""
        for name in _COLUMNS:
            getattr(other, name)[to] = getattr(self, name)[slot]

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

    def keep(self, slots: Iterable[int]) -> None:
        """Hold what these would find, and nothing else that was held so."""
        assert self.index
        kept = [self.index.match(self.finds[slot]) for slot in slots]
        for ids in kept:
            self.index.fork(ids)
        for ids in self.kept:
            self.index.free(ids)
        self.kept, self.free = kept, self.index.available

    def find(self, slots: Iterable[int]) -> None:
        """Let requests begin with what the cache holds of their prompts."""
        assert self.index
        for slot in slots:
            table = self.tables[slot]
            more = self.index.match(self.finds[slot])[len(table) :]
            self.index.fork(more)
            table += more
            tokens = len(table) * self.engine.block
            self.waiting_tokens -= tokens - int(self.done[slot])
            self.done[slot], self.blocks[slot] = tokens, len(table)
        self.free = self.index.available

    def fill(self, slots: list[int], chunk: list[int], fresh: list[bool], whole: bool) -> list[int]:
        """Hold the blocks of prompts and make known what they compute; returns the tokens that each still has to.

        One prompt after the other: those that begin find what the ones before them compute.
        """
        assert self.index
        chunk = chunk.copy()
        for i in sorted(range(len(slots)), key=lambda i: (fresh[i], self.id[slots[i]])):
            slot = slots[i]
            if fresh[i]:
                self.find([slot])
            chunk[i] = min(chunk[i], int(self.prompt[slot] - self.done[slot]))
            self.hold(slot, int(self.done[slot]) + chunk[i])
            if whole:
                known = self.keys[slot][: (self.done[slot] + chunk[i]) // self.engine.block]
                self.tables[slot][: len(known)] = self.index.insert(known, self.tables[slot][: len(known)])
                self.free = self.index.available
        return chunk
