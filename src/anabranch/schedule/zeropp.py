"""Tang et al.: Adaptive Blockwise Task-interleaved Pipeline Parallelism (ZeroPP). arXiv 2402.03791, 2024.

Each device of the pipeline stands for a group of them, which holds V blocks of the model, fully sharded: whoever runs a
block gathers its weights first. To gather for every micro-batch, as 1F1B would have to, takes too long; to gather once
for all of them, breadth first, takes the memory of all. In between are units of U micro-batches, which go through block
after block, with B, F and W staggered so that a unit of 2p - 1 leaves no bubble:

    >>> for U in (4, 5, 7):
    ...     trace = simulate(zeropp(p=4, V=2, U=U, m=2 * U).plan())
    ...     print(U, bubble(trace).span, trace.peak.max(), traffic(V=2, U=U, m=70, size=1))
    4 6.0 8.0 108
    5 4.0 10.0 84
    7 0.0 14.0 60

Bubbles are n max(0, 2p - 1 - U) passes for n units, activations V U of a block, and what is gathered and scattered
falls as 1 / U. `execute` runs it with the weights of each block sharded over a group. No code of the authors is known:
the priorities are a reconstruction that has these figures.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from anabranch.plan import MEM, PlanBuilder
from anabranch.schedule.base import (
    BW,
    EQUAL,
    B,
    Costs,
    F,
    Line,
    Op,
    Pass,
    Plan,
    PlanError,
    Schedule,
    W,
    bubble,
    loop,
    positive,
    schedule,
    simulate,
)

__all__ = ["Costs", "Shards", "breadth_first", "bubble", "choose_unit", "sharded", "simulate", "traffic", "zeropp"]


def zeropp(p: int, V: int, U: int, m: int, costs: Costs = EQUAL, carry: bool = False) -> Schedule:
    """V blocks a device; units of U micro-batches, of which the last one may be smaller.

    Whenever a device is free it runs a B whose gradient is there, of later blocks first; or else the next F, block by
    block; or else the W that has waited longest.

    Arguments:
        costs: of each of the p V blocks: by them it is seen what is there first.
        carry: begin with a unit's F when all B of the one before are done, though W are left. Bubbles then do not add
            up over units, but activations do.
    """
    positive(p=p, V=V, U=U, m=m)
    line = Line(p, p * V, costs)
    forward = [(c, i) for unit in range(0, m, U) for c in range(V) for i in range(unit, min(unit + U, m))]
    begun = [0] * p

    def best(d: int) -> tuple[float, int, int, Pass] | None:
        """What a device runs next: when, and how it is preferred."""
        found = []
        for c in range(V):
            one = line.next(B, c * p + d)
            if one.micro < m and (arrives := line.arrives(d, one)) is not None:
                found.append((max(line.free[d], arrives), V - 1 - c, d, one))
        if begun[d] < len(forward):
            c, i = forward[begun[d]]
            one = Pass(F, c * p + d, i)
            before = min(line.done[B if carry else W][d::p])  # micro-batches that are done with on this device
            if before >= i // U * U and (arrives := line.arrives(d, one)) is not None:
                found.append((max(line.free[d], arrives), V, d, one))
        if line.pending[d]:
            found.append((line.free[d], V + 1, d, line.pending[d][0]))
        return min(found, default=None)

    nexts = [best(d) for d in range(p)]
    while any(nexts):
        _, rank, d, one = min(option for option in nexts if option)
        if rank > V:
            line.weight(d)
        else:
            line.put(d, one)
            begun[d] += one.kind is F
        for near in {d, (d - 1) % p, (d + 1) % p}:
            nexts[near] = best(near)
    note = f"with U={U} below p={p}, devices wait between blocks" if U < p else ""
    return Schedule(f"ZeroPP, U={U}", line.orders, loop(p, V), note)


def breadth_first(p: int, V: int, m: int) -> Schedule:
    """All micro-batches through block after block, and back again (Lamy-Poirier 2023).

    Its step takes V m + p - 1 forward and as many backward passes of a block, in the memory of all m.
    """
    positive(p=p, V=V, m=m)

    def order(d: int) -> Iterator[tuple[Op, int, int]]:
        yield from ((F, c * p + d, i) for c in range(V) for i in range(m))
        yield from ((BW, c * p + d, i) for c in reversed(range(V)) for i in range(m))

    return schedule("breadth first", p, order, loop(p, V))


class Shards(NamedTuple):
    """What the weights of a stage take on a device that holds a shard of them."""

    gather: float = 0.0
    """Time until all of them are there."""
    scatter: float = 0.0
    """Time until their gradients are summed, each shard where it belongs."""
    memory: float = 0.0
    """Of all of them, or of their gradients; that of shards is not counted."""
    size: float = 0.0
    """Bytes that a device moves to gather or to scatter: (g - 1) / g of all in a group of g."""


def sharded(given: Schedule, U: int, shards: Shards, costs: Costs = EQUAL) -> Plan:
    """The plan with weights that are gathered, `AG`, and gradients that are scattered, `RS`, once for U micro-batches.

    A stage's weights are gathered before the first F of a unit, until the last, and again for its B; its gradients are
    there from the first W until they are scattered after the last. A device has one `net` lane, and gathers while it
    computes with what it gathered before.
    """
    positive(U=U)
    plan = given.plan(costs)
    b, rows = PlanBuilder.of(plan), []
    for device, ops in enumerate(plan.orders()):
        net = b.lane(device, "net")
        uses: dict[tuple[str, int, int], list[int]] = {}
        for at, op in enumerate(ops.tolist()):
            kind, where = Op(plan.kind[op]), (int(plan.stage[op]), int(plan.micro[op]) // U)
            if kind is not W:
                uses.setdefault(("forward" if kind is F else "backward", *where), []).append(at)
            if kind in (W, BW):
                uses.setdefault(("gradients", *where), []).append(at)
        gathered = sorted((ats[0], key) for key, ats in uses.items() if key[0] != "gradients")
        # What is gathered next may begin when what was gathered before is first used.
        begins = [-1] + [at - 1 for at, _ in gathered[:-1]]
        moves = [(begin, Op.AG, key) for begin, (_, key) in zip(begins, gathered)]
        moves += [(ats[-1], Op.RS, key) for key, ats in uses.items() if key[0] == "gradients"]
        for after, kind, key in sorted(moves):
            first, last = int(ops[uses[key][0]]), int(ops[uses[key][-1]])
            op = b.add(
                kind, net, shards.gather if kind is Op.AG else shards.scatter, stage=key[1],
                after=[int(ops[after])] if after >= 0 else [], comm=(device, device, shards.size),
            )  # fmt: skip
            if kind is Op.AG:
                b.wait(first, [op])
            begin, end = (op, last) if kind is Op.AG else (first, op)
            rows += [(begin, device, 0, shards.memory), (end, device, 1, -shards.memory)]
    built = b.build()
    return replace(built, mem=np.concatenate([built.mem, np.array(rows, MEM)]))


def traffic(V: int, U: int, m: int, size: float) -> float:
    """Bytes that a device moves for its weights: for each unit and block, two gathers and a scatter of `size` bytes."""
    positive(V=V, U=U, m=m)
    return 3 * V * -(-m // U) * size


def choose_unit(p: int, V: int, m: int, memory: float, shards: Shards, costs: Costs = EQUAL) -> int:
    """The unit, of at most 2p - 1 micro-batches, with the shortest step among those that fit in the memory.

    Raises:
        PlanError: if none does.
    """
    positive(p=p, V=V, m=m)
    steps = []
    for U in range(1, min(2 * p - 1, m) + 1):
        trace = simulate(sharded(zeropp(p, V, U, m, costs), U, shards, costs))
        if trace.peak.max() <= memory:
            steps.append((trace.makespan, -U))
    if not steps:
        raise PlanError(f"memory of {memory:g} does not suffice for units of one micro-batch")
    return -min(steps)[1]
