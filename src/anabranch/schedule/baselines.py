"""How language models are usually served: whole prompts first, mixed with decodes, or in chunks.

All keep a cache of blocks; a request that gets no block for its next token has those that came last preempted, whose
caches are made again.
"""

from collections.abc import Iterable, Sequence
from typing import ClassVar

import equinox as eqx
import numpy as np

from anabranch.schedule.scheduler import PREFILLING, RECOMPUTE, Batch, Scheduler, View


def running(view: View) -> tuple[Sequence[int], list[int], int]:
    """The decoding requests that can go on, the slots that are preempted for it, and the blocks that are left.

    The last to come are preempted first; at least one always goes on.
    """
    left = view.free_blocks - view.growth
    if len(view.decoding) <= view.max_seqs and left >= 0:
        return view.decoding, [], left
    slots = np.array(sorted(view.decoding, key=view.id.__getitem__)[: view.max_seqs])
    more = np.maximum(view.need(view.done[slots] + 1) - view.blocks[slots], 0)
    keep, free = len(slots), view.free_blocks
    while keep > 1 and more[:keep].sum() > free + view.own[slots[keep:]].sum():
        keep -= 1
    left = int(free + view.own[slots[keep:]].sum() - more[:keep].sum())
    return slots[:keep].tolist(), slots[keep:].tolist(), left


def batch(decode: Sequence[int], preempted: list[int], prefill: dict[int, int]) -> Batch:
    """A batch of these slots."""
    return Batch(decode, prefill, dict.fromkeys(preempted, RECOMPUTE))


def admit(
    view: View, order: Iterable[int], free: int, budget: int, seats: int, *, whole: bool, watermark: float = 0.01
) -> dict[int, int]:
    """Tokens of each prompt that fit in the budget and in the blocks.

    Arguments:
        whole: take a prompt only as a whole, the first one even if it is longer than the budget.
        watermark: the share of all blocks that stays free.
    """
    found: dict[int, int] = {}
    keep = int(watermark * view.total_blocks)
    for slot in order:
        # A prompt is let in only if all of it will fit: half of one would hold blocks that nobody else can have.
        left, need = view.left(slot)
        take = left if whole else min(left, budget)
        if take <= 0 or seats <= 0 or (whole and take > budget and found):
            break
        begun = view.status[slot] == PREFILLING
        if need > free - (0 if begun or free == view.total_blocks else keep):
            break
        free, budget, seats = free - need, budget - take, seats - 1
        found[slot] = take
    return found


class FCFS(Scheduler):
    """Whole prompts before everything else, first come first; the way of vLLM before chunked prefill.

    A scheduler that lets prompts in by another order, or fewer at once, overrides `order` or `budget`.
    """

    def order(self, x: View) -> list[int]:
        """The slots of prompts, the next one first."""
        return x.prompts

    def budget(self, x: View) -> int:
        """Tokens of the prompts that go together."""
        return x.max_tokens

    def act(self, state, x: View):  # pyright: ignore[reportIncompatibleMethodOverride]
        decode, preempted, _ = running(x)
        if not preempted:
            seats, kind = x.max_seqs - len(decode), type(self)  # asked of `self`, Equinox would bind methods anew
            found = admit(x, kind.order(self, x), x.free_blocks, kind.budget(self, x), seats, whole=True)
            if found:
                return state, batch((), preempted, found)
        return state, batch(decode, preempted, {})


class Orca(Scheduler):
    """Whole prompts in one iteration with all decodes (Yu et al. 2022)."""

    def act(self, state, x: View):  # pyright: ignore[reportIncompatibleMethodOverride]
        decode, preempted, free = running(x)
        budget = x.max_tokens - len(decode)
        found = {} if preempted else admit(x, x.prompts, free, budget, x.max_seqs - len(decode), whole=True)
        return state, batch(decode, preempted, found)


class Chunked(Scheduler):
    """Decodes first, and prompts in chunks that fill iterations up to `chunk` tokens (Sarathi, Agrawal et al. 2024).

    Raises:
        ValueError: if `chunk` is not positive.
    """

    chunk: int = eqx.field(static=True, default=512)

    def __check_init__(self):
        if self.chunk < 1:
            raise ValueError(f"chunk must be positive, got {self.chunk}")

    def act(self, state, x: View):  # pyright: ignore[reportIncompatibleMethodOverride]
        decode, preempted, free = running(x)
        budget = self.chunk - len(decode)
        found = {} if preempted else admit(x, x.prompts, free, budget, x.max_seqs - len(decode), whole=False)
        return state, batch(decode, preempted, found)


class SRPT(FCFS):
    """As FCFS, the shortest request first, by lengths that no real scheduler knows."""

    oracle: ClassVar[bool] = True

    def order(self, x: View) -> list[int]:
        return sorted(x.prompts, key=lambda slot: (x.prompt[slot] - x.done[slot] + x.limit[slot], x.id[slot]))
