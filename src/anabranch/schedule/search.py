"""Which pipeline schedule suits given costs and memory: each that is known by name, and what a search makes of them.

    >>> found = search(4, 8, Costs(forward=1, backward=1.2, weight=0.8, message=0.1), memory=6)
    >>> best = found[0]
    >>> best.fits, best.step <= min(one.step for one in found if one.fits)
    (True, True)

The search has two moves. `refill` keeps the order in which a schedule runs its F and B, and places each W anew, where
it fills a gap or memory asks for it; `greedy` builds orders from nothing, running what can start first. As what it
begins with is among what it gives, it is never worse than the best schedule by hand.
"""

import csv
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from anabranch.schedule.base import (
    BW,
    B,
    Costs,
    F,
    Line,
    Pass,
    PlanError,
    Schedule,
    W,
    gpipe,
    interleaved,
    one_f_one_b,
    positive,
)
from anabranch.schedule.controllable_memory import v_half, v_min
from anabranch.schedule.pipeoffload import grouped_interleaved
from anabranch.schedule.two_stage_backprop import two_stage
from anabranch.schedule.zero_bubble import auto_schedule, zb_h1, zb_h2, zb_v

__all__ = ["Found", "W", "greedy", "hand_made", "refill", "search", "to_torch"]


class Found(NamedTuple):
    """A schedule, and what it comes to."""

    schedule: Schedule
    costs: Costs
    """Of its stages."""
    step: float
    """Time of an iteration that ends when all devices have."""
    joined: float
    """Time of an iteration between others, if each device goes on as soon as it can; see `zero_bubble`."""
    idle: float
    """The share of `step` for which the device that works least does nothing."""
    peak: float
    """Memory of the device that holds most."""
    fits: bool


def chunked(costs: Costs, p: int, stages: int) -> Costs:
    """The costs of so many stages, given those of p equal parts of the model."""
    if stages == p:
        return costs
    v = stages // p

    def cut(values: Float[np.ndarray, " p"]) -> Float[np.ndarray, " S"]:
        sums = np.interp(np.arange(stages + 1) / v, np.arange(p + 1), np.concatenate([[0.0], np.cumsum(values)]))
        return np.diff(sums)

    cost = costs.of(p)
    whole = {name: cut(cost[name]) for name in ("forward", "backward", "weight", "activation", "gradient")}
    return replace(costs, **whole, kept=np.repeat(cost["kept"], v))


def hand_made(p: int, m: int) -> Iterator[Callable[[Costs], Schedule]]:
    """Every schedule known by name that p devices and m micro-batches allow, given the costs of p parts."""
    yield lambda costs: gpipe(p, m)
    yield lambda costs: one_f_one_b(p, m)
    yield lambda costs: two_stage(gpipe(p, m), costs)
    yield lambda costs: two_stage(one_f_one_b(p, m), costs)
    if m % p == 0:
        for v in (2, 4):
            yield lambda costs, v=v: interleaved(p, m, v)
    if m >= p:
        yield lambda costs: zb_h1(p, m)
    if m >= 2 * p - 1:
        yield lambda costs: zb_h2(p, m)
    yield lambda costs: zb_v(p, m, chunked(costs, p, 2 * p))
    yield lambda costs: grouped_interleaved(p, m, 2, p)
    if p > 1:
        yield lambda costs: grouped_interleaved(p, m, 2, (p + 1) // 2)
    yield lambda costs: v_half(p, m)
    yield lambda costs: v_min(p, m)


def judge(schedule: Schedule, costs: Costs, memory: float = np.inf) -> Found:
    """What a schedule comes to, given the costs of its stages.

    Raises:
        PlanError: if it deadlocks.
    """
    line = Line(len(schedule.orders), schedule.stages, costs)
    line.follow(schedule.orders, lambda *_: None)
    step, peak = max(line.free), max(line.peak)
    busy = min(sum(line.time[one.kind][one.stage] for one in order) for order in schedule.orders)
    # A second iteration behind the first, each device beginning as soon as it is free.
    m = schedule.micros
    line.follow(
        [[Pass(kind, stage, micro + m) for kind, stage, micro in order] for order in schedule.orders], lambda *_: None
    )
    fits = peak <= memory * (1 + 1e-9)
    return Found(schedule, costs, step, max(line.free) - step, 1 - busy / step if step else 0.0, peak, fits)


def search(p: int, m: int, costs: Costs, memory: float = np.inf) -> list[Found]:
    """All schedules: first those that fit in the memory, the quickest step first.

    Arguments:
        costs: of p equal parts of the model; a schedule of more stages has them cut further.
        memory: of a device, for activations, in the unit of `costs.activation`.
    """
    positive(p=p, m=m)
    found = []
    for make in hand_made(p, m):
        schedule = make(costs)
        found.append(judge(schedule, chunked(costs, p, schedule.stages), memory))
    for make in (auto_schedule, greedy):
        try:
            found.append(judge(make(p, m, costs, memory), costs, memory))
        except PlanError:
            pass  # the memory does not suffice for it
    found.sort(key=_rank)
    for one in found[:4]:
        tried = []
        for late in (False, True):
            try:
                tried.append(judge(refill(one.schedule, one.costs, memory, late=late), one.costs, memory))
            except PlanError:
                pass
        found += [better for better in sorted(tried, key=_rank)[:1] if _rank(better) < _rank(one)]
    return sorted(found, key=_rank)


def _rank(one: Found) -> tuple[bool, float, float]:
    return not one.fits, one.step, one.peak


def refill(given: Schedule, costs: Costs, memory: float = np.inf, *, late: bool = False) -> Schedule:
    """The schedule with the same order of F and B, and each W where it fills a gap, or where memory asks for it.

    Arguments:
        late: leave a gap that is too short for a W, rather than delay what follows.

    Raises:
        PlanError: if its F and B alone need more memory.
    """
    line = Line(len(given.orders), given.stages, costs, memory)

    def before(device: int, one: Pass, arrives: float) -> None:
        line.room(device, one)
        line.fill(device, arrives, lambda gap: not late)

    orders = [
        [one._replace(kind=B) if one.kind is BW else one for one in order if one.kind is not W]
        for order in given.orders
    ]
    line.follow(orders, before)
    return replace(given, name=f"{given.name.removesuffix(' + 2BP')}, refilled", orders=line.finish())


def greedy(p: int, m: int, costs: Costs, memory: float = np.inf) -> Schedule:
    """One stage a device; always the pass that can start first: of those a B, else an F, and a W while nothing can.

    Tried with several limits on how many activations a device holds; the quickest is kept.

    Raises:
        PlanError: if the memory does not suffice for one micro-batch.
    """
    positive(p=p, m=m)
    one = float(np.max(costs.activation) + np.max(costs.gradient))
    limits = sorted({min(memory, k * one) for k in (p, 1.5 * p, 2 * p)})
    lines = [_greedy(Line(p, p, costs, limit), p, m) for limit in limits]
    best = min(lines, key=lambda line: max(line.free))
    return Schedule("greedy", best.orders, tuple(range(p)))


def _greedy(line: Line, p: int, m: int) -> Line:
    def best(d: int) -> tuple[float, int, int] | None:
        """What a device does next: when, and how it is preferred; a W only if nothing comes while it would run."""
        found = []
        for rank, kind in enumerate((B, F)):
            one = line.next(kind, d)
            arrives = line.arrives(d, one) if one.micro < m else None
            if arrives is not None and line.held[d] + line.takes[kind][d] <= line.limit:
                found.append((max(line.free[d], arrives), rank, d))
        if line.pending[d] and not any(at < line.free[d] + line.time[W][d] / 2 for at, _, _ in found):
            return line.free[d], 2, d
        return min(found, default=None)

    nexts = [best(d) for d in range(p)]
    while any(nexts):
        _, rank, d = min(option for option in nexts if option)
        if rank == 2:
            line.weight(d)
        else:
            line.put(d, line.next((B, F)[rank], d))
        for near in range(max(0, d - 1), min(p, d + 2)):
            nexts[near] = best(near)
    if any(done < m for done in line.done[W]):
        raise PlanError(f"memory of {line.limit:g} does not suffice for one micro-batch")
    return line


def to_torch(schedule: Schedule, path: str | Path) -> None:
    """Write a schedule as the CSV file that `torch.distributed.pipelining` loads: a row a rank, `2F0`, `2I0`, `2W0`.

    Raises:
        ValueError: if a stage is on more than one device, which that format has no words for.
    """
    if any(not isinstance(device, int) for device in schedule.placement):
        raise ValueError(f"{schedule.name} has the weights of a stage on more than one device")
    letters = {F: "F", B: "I", W: "W", BW: "B"}
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        for order in schedule.orders:
            writer.writerow([f"{one.stage}{letters[one.kind]}{one.micro}" for one in order])
