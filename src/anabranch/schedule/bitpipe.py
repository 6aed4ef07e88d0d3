"""Wu, Chen, Yu: BitPipe: Bidirectional Interleaved Pipeline Parallelism. arXiv 2410.19367, 2024.

Two pipelines of two chunks a device run through the devices in opposite directions, each on a V: half of the
micro-batches begin on the first device, half on the last. So every device begins early, ends late and waits little:

    >>> for given in (interleaved(8, 8, 2), bitpipe(8, 8)):
    ...     trace = simulate(given.plan(Costs(forward=1, backward=1, weight=1)))
    ...     print(f"{given.name:21} {trace.makespan:.0f} {bubble(trace).fraction:.3f}")
    interleaved 1F1B, v=2 69 0.304
    BitPipe               60 0.200

The price is that all weights are there twice: compare memory with them. When the gradients of both replicas of a chunk
are complete they are summed, which the other chunks' passes can hide: `sync`. Units of D micro-batches are joined so
that forward passes of the next one run between the last backward ones of the one before. Where a backward pass, b, is
longer than a forward one, f, each joint costs something: the idle time of N micro-batches is
(D - 2) (b + (N / D - 1) (b - f)), so that the advantage shrinks with N / D.

Orders are those of the authors' code, which waits for a sum where here the network lane takes it.
"""

from collections.abc import Iterator
from itertools import chain

import numpy as np

from anabranch.plan import PlanBuilder
from anabranch.schedule.base import (
    BW,
    EQUAL,
    Costs,
    F,
    Op,
    Pass,
    Plan,
    Schedule,
    W,
    bubble,
    interleaved,
    simulate,
)

__all__ = ["Costs", "bitpipe", "bubble", "chimera", "interleaved", "simulate", "sync"]


def bitpipe(D: int, N: int, v_shape: bool = True) -> Schedule:
    """Two pipelines of 2 D chunks. Device r holds at most 3 D / 2 + 1 + min(r, D - 1 - r) activations of a chunk.

    Arguments:
        D: devices, an even number.
        N: micro-batches, a multiple of D. Of each D, the first half go down, from device 0 on, the others up.
        v_shape: if not, each second half begins on the device where the first did, so that the turn is a message.

    Raises:
        ValueError: if D is odd or does not divide N.
    """
    down = [(k, D - 1 - k) for k in range(D)]
    return _two_way("BitPipe", D, N, down + down[::-1]) if v_shape else _two_way("BitPipe, loop", D, N, down * 2)


def chimera(D: int, N: int) -> Schedule:
    """Two opposite pipelines of D stages, one of each on a device (Li, Hoefler 2021): BitPipe with one chunk.

    Raises:
        ValueError: if D is odd or does not divide N.
    """
    return _two_way("Chimera", D, N, [(k, D - 1 - k) for k in range(D)])


def _two_way(name: str, D: int, N: int, placement: list[tuple[int, int]]) -> Schedule:
    """The stages lie on `placement[k]` on the way down and on the way up."""
    if D < 2 or D % 2 or N < D or N % D:
        raise ValueError(f"D must be even and N a multiple of D, got D={D} and N={N}")
    half, v = D // 2, len(placement) // D

    def order(r: int) -> Iterator[Pass]:
        # Chunks whose pipeline begins at this end of the row come sooner than those that begin at the other.
        soon, late = [], []
        for first in range(0, v * D, D):
            for way in (0, 1):
                stage = next(k for k in range(first, first + D) if placement[k][way] == r)
                (soon if (placement[first][way] < half) == (r < half) else late).append((way, stage))
        n = half - min(r, D - 1 - r)

        def woven(kind: Op, soon: list[tuple[int, int]], late: list[tuple[int, int]]) -> Iterator[Pass]:
            for unit in range(0, N, D):
                a, b = (
                    [Pass(kind, stage, unit + half * way + i) for way, stage in chunks for i in range(half)]
                    for chunks in (soon, late)
                )
                yield from (*a[:n], *chain(*zip(b, a[n:])), *b[len(b) - n :])

        passes = {F: woven(F, soon, late), BW: woven(BW, late[::-1], soon[::-1])}
        rest = v * D - 2 * n + 1
        joint = [F, BW] * n + [BW] * rest + [F, BW] * (n - 1) + [F] * rest
        kinds = [F] * (v * D - n) + joint * (N // D - 1) + [F, BW] * n + [BW] * (v * D - n)
        return (next(passes[kind]) for kind in kinds)

    return Schedule(name, [list(order(r)) for r in range(D)], tuple(placement))


def sync(given: Schedule, costs: Costs = EQUAL, time: float = 1.0, size: float = 0.0, eager: bool = True) -> Plan:
    """The plan with a sum, `AR`, of the gradients of each stage whose weights are on several devices.

    Arguments:
        time: of a sum. Devices that share weights make one at a time, on a `net` lane of the first of them.
        size: bytes that each device sends for a sum.
        eager: begin as soon as the stage's gradients are complete; if not, when all backward passes of its devices are.
    """
    plan = given.plan(costs)
    b = PlanBuilder.of(plan)
    last = {(int(plan.stage[op]), lane): op for lane, ops in enumerate(plan.orders()) for op in ops.tolist()
            if plan.kind[op] in (BW, W)}  # fmt: skip
    ends = [int(ops[-1]) for ops in plan.orders()]
    done = simulate(plan).end
    sums = []
    for stage, devices in enumerate(given.placement):
        devices = tuple(np.atleast_1d(devices).tolist())
        if len(devices) > 1:
            after = [last[stage, d] if eager else ends[d] for d in devices]
            sums.append((max(done[after]), stage, devices, after))
    lanes: dict[int, int] = {}
    for _, stage, devices, after in sorted(sums):
        first = min(devices)
        if first not in lanes:
            lanes[first] = b.lane(first, "net")
        op = b.add(Op.AR, lanes[first], time, stage=stage, after=after)
        for src, dst in zip(devices, devices[1:] + devices[:1]):
            b.move(op, src, dst, size)
    return b.build()
