"""Simulated requests that decode together, all of them in every iteration: counted as one.

Continuous batching nearly always gives everybody who decodes a token. Then nothing has to be done for each of them:
what they hold, when the next of them ends and how many blocks a step takes are sums, and when their tokens came is the
clock of the steps. Columns are brought up to date when somebody reads them.
"""

from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from typing import Any

import numpy as np
from jaxtyping import Float64

from anabranch.schedule.scheduler import DECODING, Batch, Engine
from anabranch.schedule.seats import Columns, Seats, Taken

Emit = Callable[[int, int, Float64[np.ndarray, " k"]], None]
"""Is told, of a request, which of its tokens came, from this one on, and when."""


def _late(name: str) -> Any:
    """A column that may be behind."""

    def get(seats: "Striding") -> np.ndarray:
        seats.settle()
        return getattr(seats, name)

    return property(get, lambda seats, column: setattr(seats, name, column))


class Striding(Seats):
    """Seats that go on in strides, where that is `allowed` and nothing stands against it."""

    done, generated, blocks, last = (_late(name) for name in ("_done", "_generated", "_blocks", "_last"))
    _done: np.ndarray
    _generated: np.ndarray
    _blocks: np.ndarray
    _last: np.ndarray

    def __init__(self, engine: Engine, number: int, oracle: bool, emit: Emit, allowed: bool):
        self.striding = False
        """Whether all who decode are counted together."""
        self.steps = 0
        """That have been made."""
        self.context = 0
        """Tokens that they hold."""
        self._behind = 0  # steps by which columns are behind
        self._ahead = 0  # 1 if they hold the blocks of the step that is under way
        self._turns = [0] * engine.block  # who needs a block at which steps, modulo a block
        self._ends: list[tuple[int, int]] = []  # a heap of (step of the last token, slot)
        self._began: dict[int, tuple[int, int, int]] = {}  # of a slot: step, tokens before, step of its last token
        self._clock = np.empty(1024)  # when steps ended
        self._emit = emit
        self._allowed = allowed and engine.max_kept is None and engine.workers == 1
        super().__init__(engine, number, oracle)
        self._aside = Columns(self._done, self._blocks, self._generated, self._last)

    @property
    def aside(self) -> Columns:
        return self._aside

    @property
    def growth(self) -> int:
        return self._turns[-self.steps % len(self._turns)] if self.striding else super().growth

    def lacking(self, k: int) -> int:
        """Blocks that k steps take."""
        if k == 1:
            return self.growth
        block = len(self._turns)
        rest = sum(self._turns[-(self.steps + i) % block] for i in range(k % block))
        return len(self.decoding) * (k // block) + rest

    def left(self) -> int:
        """Steps until somebody ends, all blocks are taken, or enough have been made at once."""
        self._prune()
        most = min(self._ends[0][0] - self.steps, 4096)
        room = self.free + self._ahead * self.growth
        if self.lacking(most) <= room:
            return most
        low, high = 1, most
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.lacking(middle) <= room else (low, middle)
        return low

    def stride(self, times: Float64[np.ndarray, " k"]) -> None:
        """The steps that were taken end at these times."""
        self._grow(len(times))
        while self.steps + len(times) > len(self._clock):
            self._clock = np.concatenate([self._clock, np.empty_like(self._clock)])
        self._clock[self.steps : self.steps + len(times)] = times
        self._count(len(times))

    def _grow(self, k: int) -> None:
        """Hold the blocks of k steps, which may have those of the first."""
        self._claim(self.lacking(k) - self._ahead * self.growth)
        if self.index:
            done = self._done[self.decoding] + self._behind
            more = self.engine.need(done + k) - self.engine.need(done + self._ahead)
            for slot, count in zip(self.decoding, more.tolist(), strict=True):
                self.tables[slot] += self.index.alloc(count)

    def _count(self, k: int) -> None:
        self.steps, self._behind, self._ahead = self.steps + k, self._behind + k, 0
        self.context += k * len(self.decoding)

    def tokens(self, slot: int) -> int:
        """That one of those who decode has had."""
        began, before, _ = self._began[slot]
        return before + self.steps - began

    def over(self) -> list[int]:
        """Those who have had their last token."""
        found = []
        self._prune()
        while self._ends and self._ends[0][0] <= self.steps:
            found.append(heappop(self._ends)[1])
            self._prune()
        return found

    def _prune(self) -> None:
        """Forget the ends of those who have gone, or come again."""
        ends, began = self._ends, self._began
        while ends and (ends[0][1] not in began or began[ends[0][1]][2] != ends[0][0]):
            heappop(ends)

    def take(self, batch: Batch, who: str) -> Taken:
        if self.striding and len(batch.decode) and batch.decode is not self.decoding:
            self.halt()
        return super().take(batch, who)

    def _take_decodes(self, decode: Sequence[int] | np.ndarray, who: str) -> list[int]:
        if decode is self.decoding and decode and (self.striding or self._start()):
            self._grow(1)
            self._ahead = 1
            return []
        return super()._take_decodes(decode, who)

    def give(self, taken: Taken, now: float) -> list[int]:
        """As that of `Seats`; tokens of a stride are not among those that it returns."""
        if not self.striding:
            return super().give(taken, now)
        if self._ahead:
            if self.steps == len(self._clock):
                self._clock = np.concatenate([self._clock, np.empty_like(self._clock)])
            self._clock[self.steps] = now
            self._count(1)
        return self._prefilled(taken, now)

    def put(self, slot: int, status: int) -> None:
        if self.striding and status != (old := int(self.status[slot])) and DECODING in (status, old):
            if old == DECODING:
                self._part(slot)
            elif not self._ahead and self._blocks[slot] == self.engine.need(int(self._done[slot])):
                self._join(slot)
            else:  # it comes from another engine: in the middle of an iteration, or with a block more
                self.halt()
        super().put(slot, status)

    def _start(self) -> bool:
        """Count those who decode together from now on, if they have the blocks for what they hold, and no more."""
        slots = self.decoding
        if not self._allowed or (self.engine.need(self._done[slots]) != self._blocks[slots]).any():
            return False
        self.steps = self.context = self._behind = 0
        self._turns, self._ends = [0] * self.engine.block, []
        for slot in slots:
            self._join(slot)
        self.striding = True
        return True

    def halt(self) -> None:
        """Back to columns."""
        for slot in self.decoding:
            self._part(slot)
        self.striding, self._behind, self._ahead = False, 0, 0

    def _join(self, slot: int) -> None:
        done, generated = int(self._done[slot]), int(self._generated[slot])
        end = self.steps + max(int(self.output[slot]) - generated, 0)
        self.context += done
        self._turns[(done - self.steps) % len(self._turns)] += 1
        heappush(self._ends, (end, slot))
        self._began[slot] = self.steps, generated, end
        self._done[slot] -= self._behind
        self._generated[slot] -= self._behind

    def _part(self, slot: int) -> None:
        began, before, _ = self._began.pop(slot)
        self._done[slot] += self._behind
        self._generated[slot] += self._behind
        done = int(self._done[slot])
        self._blocks[slot] = self.engine.need(done + self._ahead)
        self.context -= done
        self._turns[(done - self.steps) % len(self._turns)] -= 1
        if self.steps > began:
            self._last[slot] = self._clock[self.steps - 1]
            self._emit(int(self.id[slot]), before, self._clock[began : self.steps])

    def settle(self) -> None:
        """Bring all columns up to date."""
        if self._behind:
            slots = self.decoding
            self._done[slots] += self._behind
            self._generated[slots] += self._behind
            self._blocks[slots] = self.engine.need(self._done[slots] + self._ahead)
            self._last[[slot for slot in slots if self._began[slot][0] < self.steps]] = self._clock[self.steps - 1]
            self._behind = 0
