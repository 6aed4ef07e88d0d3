"""Wan, Qi, Huang, Lin, Li: PipeOffload: Improving Scalability of Pipeline Parallelism with Memory Optimization.

arXiv 2503.01328; ICML 2025. What a forward pass keeps for the backward one can wait in the memory of the host, if the
link has time to take it there and to bring it back: of all activations if a transfer takes at most half as long as F, B
and W of a chunk, of half of them if it takes no longer than these. Those of the first chunks wait longest, so that they
are the ones to offload.

    >>> base = grouped_interleaved(p=4, m=16, v=4, group=4).plan(Costs(forward=1, backward=1, weight=1))
    >>> for chunks in (0, 2, 4):
    ...     trace = simulate(offload(base, chunks, time=0.75))
    ...     print(chunks, trace.makespan, trace.peak[:4].max())
    0 198.0 16.0
    2 198.0 8.0
    4 198.0 4.0

Transfers are placed as by the authors' code, in slots: of two neighbours, which share a link, one sends while the other
receives. Each has its place between the passes of its device, so that a slow link delays passes before it fills memory.
No pass waits as long as transfers are as quick as said: an activation for which one would have to stays where it is.
Their code gives up where there is such a one; elsewhere both place the same transfers.
"""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from anabranch.plan import PlanBuilder
from anabranch.schedule.base import (
    BW,
    EQUAL,
    B,
    Costs,
    F,
    Op,
    Pass,
    Plan,
    Schedule,
    W,
    bubble,
    loop,
    positive,
    simulate,
)

__all__ = ["Costs", "bubble", "grouped_interleaved", "offload", "po_full", "po_half", "simulate"]

SOLO = 0.7
"""Time of a transfer that has the link for itself, of one that shares it."""
TINY = 1e-9


def grouped_interleaved(p: int, m: int, v: int, group: int) -> Schedule:
    """Interleaved 1F1B over v chunks a device, with B and W split, in groups of so many micro-batches.

    Groups of p have the bubble of ZB-H1, 2(p - 1) passes, and hold p v activations of a chunk; smaller ones hold less,
    (v + 1) p / 2 in groups of p / 2, and wait for more.

    Raises:
        ValueError: if a group is smaller than half of the devices or larger than p.
    """
    positive(p=p, m=m, v=v)
    if not p <= 2 * group <= 2 * p:
        raise ValueError(f"group must be from {(p + 1) // 2} to p={p}, got {group}")
    period = 3 * group * v
    orders = []
    for d in range(p):
        back = 3 * group * (v - 1) + d + 3 * (p - 1 - d) + 1  # the first B: F to the last device, B from there
        ticks = []
        for begin in range(0, m, group):
            for c in range(v):
                for i in range(min(group, m - begin)):
                    tick = begin // group * period + 3 * (group * c + i)
                    stage, last = c * p + d, (v - 1 - c) * p + d
                    ticks.append((tick + d, Pass(F, stage, begin + i)))
                    ticks += [(tick + back + j, Pass(kind, last, begin + i)) for j, kind in enumerate((B, W))]
        orders.append([one for _, one in sorted(ticks)])
    return Schedule(f"grouped interleaved, {group}", orders, loop(p, v))


@dataclass
class _Transfer:
    """An activation that goes to the host or comes back, in a slot of its pair of devices."""

    kind: Op
    slot: int
    start: float
    end: float
    forward: int
    backward: int


def offload(plan: Plan, chunks: int, time: float) -> Plan:
    """The plan with transfers, `D2H` and `H2D`, of what the first chunks of each device keep.

    Devices 2i and 2i + 1 share a link. An activation stays where it is if its F ends less than six transfers before its
    B, or if it could not be back in time. Each device has a lane for its transfers, and a pool `host`.

    Arguments:
        plan: of F, B and W, or BW, on an even number of devices.
        chunks: of each device, those that come first in the model. With more of them than the link has time for, less
            of what waits long is moved, and the peak is higher than with fewer.
        time: of a transfer while the other device has one too; alone on the link one takes 0.7 of it.

    Raises:
        ValueError: if `chunks` is negative, `time` is not positive, or the number of devices is odd.
    """
    p = len(plan.lanes)
    for name, value, fine in (("chunks", chunks, chunks >= 0), ("time", time, 0 < time < np.inf)):
        if not fine:
            raise ValueError(f"{name} must not be negative, time be positive; got {name}={value}")
    if p % 2:
        raise ValueError(f"devices share links in pairs: their number must be even, got {p}")
    orders = [order.tolist() for order in plan.orders()]
    start, end = _postponed(plan, orders)
    origins = [float(end[orders[d - d % 2][0]]) for d in range(p)]
    moves = [_slots(plan, orders[d], start, end, chunks, time, origins[d], d % 2) for d in range(p)]
    held: dict[int, float] = defaultdict(float)
    for op, _, when, delta in plan.mem.tolist():
        held[op] += delta if when == 0 else 0.0
    b = PlanBuilder.of(plan)
    for d in range(0, p, 2):
        lanes = [b.lane(d + side, "host") for side in (0, 1)]
        hosts = [b.pool(d + side, "host") for side in (0, 1)]
        both = [(one, side) for side in (0, 1) for one in moves[d + side]]
        _hurry([one for one, _ in both], end, SOLO * time)
        ran: tuple[list[tuple[int, int]], ...] = ([], [])
        for one, side in sorted(both, key=lambda item: item[0].slot):
            order, leaves = orders[d + side], one.kind is Op.D2H
            taken, left = (hosts[side], d + side) if leaves else (d + side, hosts[side])
            op = b.add(
                one.kind, lanes[side], one.end - one.start, stage=int(plan.stage[one.forward]),
                micro=int(plan.micro[one.forward]),
                alloc={taken: held[one.forward]}, free={left: held[one.forward]},
            )  # fmt: skip
            # Slots of the pair follow one another.
            b.wait(op, [other for slot, other in ran[1 - side][-2:] if slot < one.slot][-1:])
            ran[side].append((one.slot, op))
            if leaves:
                b.wait(op, [one.forward])
                after = int(np.searchsorted(start[order], one.end - TINY))
                b.wait(order[after], [op])
            else:
                before = int(np.searchsorted(end[order], one.start + TINY, side="right")) - 1
                b.wait(op, [order[before]])
                b.wait(one.backward, [op])
    return b.build()


def _postponed(plan: Plan, orders: list[list[int]]) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """When passes begin and end, if the F before a device's first B run as late as who waits for them allows."""
    trace = simulate(plan)
    start = trace.start.copy()
    needed: dict[int, tuple[int, float]] = {}
    for later, edges in enumerate(plan.waits()):
        for op, lag in edges:
            if plan.kind[later] == plan.kind[op] == F and plan.micro[later] == plan.micro[op]:
                needed[op] = later, lag
    for order in reversed(orders):
        first = next((at for at, op in enumerate(order) if plan.kind[op] in (B, BW)), 0)
        top = plan.stage[order].max()
        until = start[order[first]] - plan.dur[order[first]]  # as long as a B is left for things to go less well
        for op in reversed(order[:first]):
            if plan.stage[op] == top and plan.micro[op] == 0:
                break
            later, lag = needed.get(op, (order[first], 0.0))
            start[op] = max(start[op], min(start[later] - lag, until) - plan.dur[op])
            until = start[op]
    return start, start + plan.dur


def _slots(
    plan: Plan,
    order: list[int],
    start: Float[np.ndarray, " n"],
    end: Float[np.ndarray, " n"],
    chunks: int,
    time: float,
    origin: float,
    side: int,
) -> list[_Transfer]:
    """The transfers of a device: D2H in the pair's even slots and H2D in its odd ones, for its second device reversed.

    D2H take the first free slots after their F; H2D, from the last B back, the last free ones that end as long before
    the B as it takes.
    """
    origin += side * time
    some = sorted({int(s) for s in plan.stage[order]})[:chunks]
    forward = {(plan.stage[op], plan.micro[op]): op for op in order if plan.kind[op] == F and plan.stage[op] in some}
    due = {
        forward[plan.stage[op], plan.micro[op]]: op
        for op in order
        if plan.kind[op] in (B, BW) and plan.stage[op] in some
    }
    ready = {op: start[due[op]] - plan.dur[due[op]] for op in due}
    stays = {op for op in ready if ready[op] - end[op] <= 6 * time}
    while True:
        turn, goes = 0, {}
        for op in forward.values():
            if op not in stays:
                turn = max(turn, int(np.ceil((end[op] - origin) / (2 * time) - TINY)))
                begin = origin + 2 * time * turn
                goes[op] = _Transfer(Op.D2H, 2 * turn + side, begin, begin + time, op, due[op])
                turn += 1
        turn, comes = int(np.ceil(end.max() / time)), []
        for op in reversed([op for op in due if op in goes]):
            turn = min(turn, int(np.floor((ready[op] - origin) / (2 * time) + TINY)))
            done = origin + 2 * time * turn
            if done - time <= goes[op].end:  # it would have to come back before it has gone
                stays.add(op)
                break
            comes.append(_Transfer(Op.H2D, 2 * turn - 1 + side, done - time, done, op, due[op]))
            turn -= 1
        else:
            return [*goes.values(), *reversed(comes)]


def _hurry(pair: list[_Transfer], end: Float[np.ndarray, " n"], time: float) -> None:
    """Let the transfers of a pair before its first H2D follow one another in `time`: each has the link for itself."""
    first = min((one.slot for one in pair if one.kind is Op.H2D), default=0)
    free = 0.0
    for one in sorted(pair, key=lambda one: one.slot):
        if one.slot < first:
            one.start = max(free, end[one.forward])
            one.end = free = one.start + time


def po_half(p: int, m: int, v: int, time: float, costs: Costs = EQUAL) -> Plan:
    """Half of the chunks of a device offloaded: PO-H."""
    return offload(grouped_interleaved(p, m, v, p).plan(costs), v // 2, time)


def po_full(p: int, m: int, v: int, time: float, costs: Costs = EQUAL) -> Plan:
    """All chunks of a device offloaded: PO-F."""
    return offload(grouped_interleaved(p, m, v, p).plan(costs), v, time)
