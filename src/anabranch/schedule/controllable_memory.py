"""Qi, Wan, Amar, Lin: Pipeline Parallelism with Controllable Memory. arXiv 2405.15362; NeurIPS 2024.

A schedule is a block of passes of one micro-batch that repeats; how long a block holds its activations is what a device
holds. On a V of two chunks a device these times add up to the same everywhere, and can be made short:

    >>> for make in (v_half, v_min):
    ...     trace = simulate(make(8, 16).plan())
    ...     print(trace.plan.meta["name"], max(trace.peak) / 2, bubble(trace).span / 2)  # of a device's two chunks
    V-Half 5.0 8.5
    V-Min 4.0 13.5

where 1F1B holds 8 and waits for 21. Orders have the spans and the peaks of those of the authors' code.
"""

from collections import deque
from collections.abc import Callable

import numpy as np

from anabranch.schedule.base import B, F, Op, Pass, Schedule, W, bubble, positive, simulate, v_shape

__all__ = ["bubble", "v_half", "v_min"]


def v_half(p: int, m: int) -> Schedule:
    """Two chunks a device on a V, in about half of the memory of 1F1B."""
    gap = 3 if p % 2 == 0 else 0
    return _blocks("V-Half", p, m, lambda d: (2 * d, 3 * p - d - 2, 3 * p + gap - 1 + 2 * d, 6 * p + gap - d - 2))


def v_min(p: int, m: int) -> Schedule:
    """Two chunks a device on a V, in about a third of the memory of 1F1B."""
    gap = 2 if p % 3 == 0 else 0
    return _blocks("V-Min", p, m, lambda d: (d, 2 * p - d - 1, 2 * p + gap + d, 4 * p + gap - d - 1))


def _blocks(name: str, p: int, m: int, block: Callable[[int], tuple[int, int, int, int]]) -> Schedule:
    """A block that repeats every six ticks: when a device runs F and F, B and B of its two chunks.

    Each W has the first tick after its B that is free. While the pipeline fills and drains there are more such ticks
    than that: then passes move to the first one that they can have in the memory that the blocks need.
    """
    positive(p=p, m=m)
    lines = []
    for d in range(p):
        stages = (d, 2 * p - 1 - d, 2 * p - 1 - d, d)
        line = {
            tick + 6 * i: Pass(kind, stage, i)
            for tick, kind, stage in zip(block(d), (F, F, B, B), stages)
            for i in range(m)
        }
        lines.append(_with_weights(line))
    _squeeze(lines, m)
    lines = _retimed(lines, p)
    lines = [{tick: one for tick, one in line.items() if one.kind is not W} for line in lines]
    _squeeze(lines, m)
    return _in_order(name, [_with_weights(line) for line in lines], p)


Ticks = dict[int, Pass]
"""What a device does at each tick; where there is no W yet, idle ticks are taken to do those that wait."""


def _in_order(name: str, lines: list[Ticks], p: int) -> Schedule:
    return Schedule(name, [[line[tick] for tick in sorted(line)] for line in lines], v_shape(p))


def _retimed(lines: list[Ticks], p: int) -> list[Ticks]:
    """The same orders, each pass as early as what it waits for allows."""
    trace = simulate(_in_order("", lines, p).plan())
    plan, start = trace.plan, trace.start.astype(int).tolist()
    passes = [[Pass(Op(plan.kind[op]), int(plan.stage[op]), int(plan.micro[op])) for op in o] for o in plan.orders()]
    return [{start[op]: one for op, one in zip(order, found)} for order, found in zip(plan.orders(), passes)]


def _with_weights(line: Ticks) -> Ticks:
    out, pending, tick = dict(line), deque(), 0
    last = max(line)
    while tick <= last or pending:
        if tick not in line:
            if pending:
                out[tick] = pending.popleft()._replace(kind=W)
        elif line[tick].kind is B:
            pending.append(line[tick])
        tick += 1
    return out


def _peak(line: Ticks) -> int:
    """The most activations that a device holds."""
    line = line if any(one.kind is W for one in line.values()) else _with_weights(line)
    held = np.cumsum([{F: 1, B: 0, W: -1}[line[tick].kind] for tick in sorted(line)])
    return int(held.max())


def _squeeze(lines: list[Ticks], m: int) -> None:
    """Move passes to earlier ticks, but for those between the first B of stage 0 and its last F.

    Where there is no W yet, only what comes after these is moved.
    """
    limit = max(map(_peak, lines))
    at = {one: (d, tick) for d, line in enumerate(lines) for tick, one in line.items()}
    first, last = at[Pass(B, 0, 0)][1], at[Pass(F, 0, m - 1)][1]
    if not any(one.kind is W for one in at):
        first = 0
    for one, (d, tick) in sorted(at.items(), key=lambda item: (item[1][1], item[1][0])):
        if first <= tick <= last:
            continue
        before = one.stage + (-1 if one.kind is F else 1 if one.kind is B else 0)
        kinds = {F: [Pass(F, before, one.micro)], B: [Pass(B, before, one.micro), one._replace(kind=F)]}
        needs = [*kinds.get(one.kind, [one._replace(kind=B)]), one._replace(micro=one.micro - 1)]
        line = lines[d]
        for new in range(1 + max((at[other][1] for other in needs if other in at), default=-1), tick):
            if new in line:
                continue
            line[new] = line.pop(tick)
            if _peak(line) <= limit:
                at[one] = d, new
                break
            line[tick] = line.pop(new)
