"""The requests of one engine: in which slot each is, what it has and what it needs; simulated and live."""

from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int8, Int64

from anabranch.keep.blocks import PrefixIndex
from anabranch.schedule.scheduler import (
    DECODING,
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

    decode: Int64[np.ndarray, " a"]
    prompts: Int64[np.ndarray, " b"]
    chunk: Int64[np.ndarray, " b"]
    """Tokens of each prompt."""
    fresh: Bool[np.ndarray, " b"]
    """Whose prompts begin."""
    back: Int64[np.ndarray, " c"]
    """Those of `decode` whose caches come back from host memory."""
    whole: bool
    """Whether prompts pass the last layer."""


class Seats:
    """The requests of one engine, those who wait for a slot, and the blocks that each has."""

    def __init__(self, engine: Engine, number: int, oracle: bool):
        n = 2 * engine.max_seqs
        self.engine, self.number, self.oracle = engine, number, oracle
        ints = lambda value: np.full(n, value, np.int64)
        floats = lambda: np.full(n, np.nan)
        self.id, self.status = ints(-1), np.zeros(n, np.int8)
        self.prompt, self.done, self.generated, self.blocks = (ints(0) for _ in range(4))
        self.preempted, self.output, self.asked = ints(0), ints(0), ints(0)
        self.arrival, self.first, self.last, self.ttft, self.tds = (floats() for _ in range(5))
        self.free = self.total = engine.blocks
        self.unknown = ints(-1)
        self.queue: deque[int] = deque()
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
        engine = self.engine
        blocks, hit, own = self.found() if self.index else (self.blocks, self.done, self.blocks)
        return View(
            now, self.id, self.status, self.arrival, self.prompt, self.done, self.generated, blocks, self.first,
            self.last, self.ttft, self.tds, self.preempted, self.output if self.oracle else self.unknown,
            self.free, engine.block, self.total, len(self.queue), engine.max_tokens, engine.max_seqs,
            hit, own, worker, engine.max_kept,
        )  # fmt: skip

    def seat(self, asked: Callable[[int], Asked]) -> None:
        """Give slots to requests in the queue."""
        if not self.queue:
            return
        for slot in np.flatnonzero(self.status == EMPTY)[: len(self.queue)].tolist():
            i = self.queue.popleft()
            one = asked(i)
            self.id[slot], self.status[slot], self.arrival[slot] = i, WAITING, one.arrival
            self.prompt[slot] = self.asked[slot] = one.prompt
            self.output[slot], self.ttft[slot], self.tds[slot] = one.output, one.ttft, one.tds
            # Its last token is never found but computed: what follows it comes from that.
            self.keys[slot], self.finds[slot] = one.keys, one.keys[: (one.prompt - 1) // self.engine.block]
            for column in (self.done, self.generated, self.blocks, self.preempted):
                column[slot] = 0
            self.first[slot] = self.last[slot] = np.nan

    def hold(self, slots: np.ndarray, tokens: np.ndarray) -> None:
        """Let requests have the blocks for so many tokens.

        Raises:
            RuntimeError: if there are too few; a scheduler must not ask for more than there are.
        """
        held = self.blocks[slots]
        need = np.maximum(held, self.engine.need(tokens))
        more = int((need - held).sum())
        if more > self.free:
            raise RuntimeError(f"the scheduler needs {more} blocks of engine {self.number}, {self.free} are free")
        if self.index:
            for slot, count in zip(slots.tolist(), (need - held).tolist()):
                self.tables[slot] += self.index.alloc(count)
        if more:
            self.free -= more
            self.blocks[slots] = need
        self.peak = max(self.peak, self.total - self.free)

    def release(self, slots: np.ndarray) -> None:
        self.free += int(self.blocks[slots].sum())
        self.blocks[slots] = 0
        if self.index:
            for slot in slots.tolist():
                self.index.free(self.tables[slot])
                self.tables[slot] = []
            self.free = self.index.available

    def preempt(self, how: Int8[np.ndarray, " N"]) -> None:
        """Take the cache from some requests: it is kept elsewhere, or to be made again."""
        slots, back = np.flatnonzero(how), np.flatnonzero(how == RECOMPUTE)
        self.preempted[slots] += 1
        self.status[how == SWAP] = SWAPPED
        left = (self.prompt[back] - self.done[back]).clip(0)
        self.prompt[back] = self.asked[back] + self.generated[back]
        self.waiting_tokens += int((self.prompt[back] - left).sum())
        self.done[back], self.status[back] = 0, WAITING
        self.release(slots)

    def take(self, batch: Batch, who: str) -> "Taken":
        """Let requests have the blocks that an iteration needs, and see that there is what it is to do.

        Raises:
            RuntimeError: if it is not; the message says `who` has asked for it.
        """
        decode, prompts = batch.decode.nonzero()[0], batch.prefill.nonzero()[0]
        chunk, held = batch.prefill[prompts], self.status[prompts]
        fresh, back = held == WAITING, decode[:0]
        whole = batch.layers[1] >= 1.0
        if self.index:
            self.find(prompts[fresh])
        if len(prompts):
            over = chunk > self.prompt[prompts] - self.done[prompts]
            if over.any() or held.max() > PREFILLING:
                raise RuntimeError(f"{who} prefills what is not there")
            if self.index:
                chunk = self.fill(prompts, chunk, fresh, whole)
            else:
                self.hold(prompts, self.done[prompts] + chunk)
            self.status[prompts] = PREFILLING
        if len(decode):
            back = decode[self.status[decode] != DECODING]
            if len(back):
                if (self.status[back] != SWAPPED).any():
                    raise RuntimeError(f"{who} decodes what is not prefilled")
                self.status[back] = DECODING
            self.hold(decode, self.done[decode] + 1)
        return Taken(decode, prompts, chunk, fresh, back, whole)

    def give(self, taken: "Taken", now: float) -> Int64[np.ndarray, " k"]:
        """Count what an iteration has done; returns the slots of those who have a token more."""
        decode, prompts = taken.decode, taken.prompts
        self.done[decode] += 1
        if taken.whole and len(prompts):
            done = self.done[prompts] + taken.chunk
            self.done[prompts] = done
            self.waiting_tokens -= int(taken.chunk.sum())
            ready = prompts[done == self.prompt[prompts]]
            if len(ready):
                self.first[ready] = np.where(self.generated[ready] == 0, now, self.first[ready])
                self.status[ready] = DECODING
                decode = np.concatenate([decode, ready])
        self.generated[decode] += 1
        self.last[decode] = now
        return decode

    def leave(self, slots: Int64[np.ndarray, " k"]) -> None:
        """Requests go."""
        self.release(slots)
        self.status[slots], self.id[slots] = EMPTY, -1
        self.requests -= len(slots)

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
