"""What the pipelines of the family share: orders of passes, what a pass costs, and the classical schedules.

A model is cut into S stages that lie on p devices, and a batch into m micro-batches. A schedule is an order of passes
for each device; everything else follows from it:

    >>> trace = simulate(check(one_f_one_b(p=4, m=8).plan(Costs(forward=1, backward=1, weight=1))))
    >>> trace.makespan, bubble(trace).makespan, trace.peak.tolist()
    (33.0, 9.0, [4.0, 3.0, 2.0, 1.0])
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from anabranch.plan import Op, Plan, PlanBuilder, PlanError, Trace, bubble, check, simulate

__all__ = [
    "BW", "EQUAL", "B", "Costs", "F", "Line", "Op", "Pass", "Plan", "PlanError", "Schedule", "Trace", "W", "bubble",
    "check", "gpipe", "interleaved", "loop", "one_f_one_b", "positive", "repeat", "schedule", "simulate", "v_shape",
]  # fmt: skip

F, B, W, BW = Op.F, Op.B, Op.W, Op.BW


class Pass(NamedTuple):
    """One pass of a micro-batch through a stage: forward `F`, backward `BW`, or backward in halves, `B` and `W`."""

    kind: Op
    stage: int
    micro: int


@dataclass(frozen=True)
class Costs:
    """What a pass of one micro-batch through a stage takes and holds: a number, or one for each stage.

    Raises:
        ValueError: if one is negative or not finite.
    """

    forward: ArrayLike = 1.0
    backward: ArrayLike = 1.0
    """Time of the gradient of the input."""
    weight: ArrayLike = 1.0
    """Time of the gradient of the weights."""
    message: float = 0.0
    """Time until what a pass gives is on the next device."""
    activation: ArrayLike = 1.0
    """Memory that a forward pass takes for the backward one."""
    kept: ArrayLike = 1.0
    """The share of it that the gradient of the weights still needs."""
    gradient: ArrayLike = 0.0
    """Memory that the gradient of the input leaves for that of the weights."""
    bytes: float = 0.0
    """What a message moves."""

    def __post_init__(self):
        for name, value in vars(self).items():
            value = np.asarray(value, np.float64)
            if not (np.isfinite(value).all() and (value >= 0).all()):
                raise ValueError(f"{name} must be finite and not negative, got {value.tolist()}")
        if (np.asarray(self.kept) > 1).any():
            raise ValueError(f"kept must be at most 1, got {np.asarray(self.kept).tolist()}")

    def of(self, stages: int) -> dict[str, Float[np.ndarray, " S"]]:
        """Each cost for each of so many stages.

        Raises:
            ValueError: if a cost is given for another number of stages.
        """
        out = {}
        for name, value in vars(self).items():
            value = np.asarray(value, np.float64)
            if value.ndim and value.shape != (stages,):
                raise ValueError(f"{name} must be one number or {stages}, one a stage, got {value.shape[0]}")
            out[name] = np.broadcast_to(value, (stages,))
        return out


EQUAL = Costs()


@dataclass(frozen=True)
class Schedule:
    """The order of passes on each device: what a pipeline method decides."""

    name: str
    orders: Sequence[Sequence[Pass]]
    placement: Sequence[int | tuple[int, ...]]
    """The device of each stage, or the devices if its weights are there more than once."""
    note: str = ""
    """What whoever chooses it should know."""
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def stages(self) -> int:
        return len(self.placement)

    @property
    def micros(self) -> int:
        """Number of micro-batches."""
        return 1 + max((p.micro for p in chain(*self.orders)), default=-1)

    def plan(self, costs: Costs = EQUAL, capacity: float = np.inf) -> Plan:
        """The schedule with times and memory, a pool a device.

        A forward pass waits for that of the stage before, a backward pass for its forward and for the backward of the
        stage behind, and the gradient of the weights for that of the input.
        """
        cost = costs.of(self.stages)
        b = PlanBuilder(name=self.name, placement=tuple(self.placement), **self.extra)
        lanes = [b.lane(device) for device in range(len(self.orders))]
        pools = [b.pool(device, capacity=capacity) for device in range(len(self.orders))]
        ids: dict[tuple[str, int, int], int] = {}
        where: dict[int, int] = {}
        for device, order in enumerate(self.orders):
            for kind, stage, micro in order:
                held, kept, added = (float(cost[name][stage]) for name in ("activation", "kept", "gradient"))
                time = {
                    F: cost["forward"], B: cost["backward"], W: cost["weight"], BW: cost["backward"] + cost["weight"]
                }[kind][stage]  # fmt: skip
                alloc, free = {
                    F: (held, 0.0), BW: (0.0, held), B: (added, held * (1 - kept)), W: (0.0, held * kept + added)
                }[kind]  # fmt: skip
                pool = pools[device]
                op = b.add(
                    kind, lanes[device], float(time), stage=stage, micro=micro,
                    alloc={pool: alloc} if alloc else None, free={pool: free} if free else None,
                )  # fmt: skip
                ids["B" if kind is BW else kind.name, stage, micro] = op
                where[op] = device

        def wait(op: int, on: int | None) -> None:
            if on is not None:
                away = where[op] != where[on]
                b.wait(op, [on], costs.message if away else 0.0)
                if away and costs.bytes:
                    b.move(on, where[on], where[op], costs.bytes)

        for (kind, stage, micro), op in ids.items():
            if kind == "F":
                wait(op, ids.get(("F", stage - 1, micro)))
            elif kind == "B":
                wait(op, ids.get(("F", stage, micro)))
                wait(op, ids.get(("B", stage + 1, micro)))
            else:
                wait(op, ids.get(("B", stage, micro)))
        return b.build()


class Line:
    """Orders that grow pass by pass, and when each device is free, what it holds and how long it has waited.

    Arguments:
        p: devices.
        stages: S.
        costs: of each stage.
        limit: memory of a device.
    """

    def __init__(self, p: int, stages: int, costs: Costs, limit: float = np.inf):
        cost, self.stages, self.limit, self.message = costs.of(stages), stages, limit, costs.message
        f, b, w = (cost[name] for name in ("forward", "backward", "weight"))
        activation, left = cost["activation"], cost["gradient"] - cost["activation"] * (1 - cost["kept"])
        none = np.zeros(stages)
        lists = lambda rows: {kind: row.tolist() for kind, row in zip((F, B, W, BW), rows)}
        self.time = lists((f, b, w, b + w))
        self.takes = lists((activation, cost["gradient"], none, none))
        self.adds = lists((activation, left, -activation - left, -activation))
        self.orders: list[list[Pass]] = [[] for _ in range(p)]
        self.free, self.held, self.peak, self.waited = ([0.0] * p for _ in range(4))
        self.ran: dict[tuple[Op, int, int], tuple[int, float]] = {}
        """Where each pass runs, and when it ends; a BW as a B."""
        self.done = {kind: [0] * stages for kind in (F, B, W, BW)}
        """How many of a kind each stage has."""
        self.pending: list[deque[Pass]] = [deque() for _ in range(p)]
        """The B of each device whose W has yet to come."""

    def next(self, kind: Op, stage: int) -> Pass:
        """The next micro-batch's."""
        return Pass(kind, stage, self.done[kind][stage])

    def arrives(self, device: int, one: Pass) -> float | None:
        """When the input of a pass is on a device; None if what gives it is not scheduled yet."""
        kind, stage, micro = one
        if kind is F:
            before = (F, stage - 1, micro) if stage else None
        elif kind is W:
            before = B, stage, micro
        elif (F, stage, micro) not in self.ran:  # a tuple equals a `Pass` of the same, and is made far quicker
            return None
        else:
            before = (B, stage + 1, micro) if stage + 1 < self.stages else None
        if before is None:
            return 0.0
        ran = self.ran.get(before)
        return None if ran is None else ran[1] + (self.message if ran[0] != device else 0.0)

    def room(self, device: int, one: Pass) -> None:
        """Each W that must come before a pass, for the memory's sake.

        Raises:
            PlanError: if that is not enough.
        """
        while self.held[device] + self.takes[one.kind][one.stage] > self.limit:
            if not self.pending[device]:
                raise PlanError(f"device {device}: memory of {self.limit:g} does not suffice for {one}")
            self.weight(device)

    def put(self, device: int, one: Pass, arrives: float | None = None) -> None:
        """The next pass of a device, room being made for it; `arrives` is when its input does, if that is known."""
        self.room(device, one)
        arrives = self.arrives(device, one) if arrives is None else arrives
        assert arrives is not None, one
        kind, stage, micro = one
        start = max(self.free[device], arrives)
        if self.orders[device]:
            self.waited[device] += start - self.free[device]
        self.free[device] = start + self.time[kind][stage]
        self.ran[(B, stage, micro) if kind is BW else one] = device, self.free[device]
        held = self.held[device] + self.takes[kind][stage]
        if held > self.peak[device]:
            self.peak[device] = held
        self.held[device] += self.adds[kind][stage]
        self.orders[device].append(one)
        self.done[kind][stage] += 1
        if kind is B:
            self.pending[device].append(one)

    def weight(self, device: int) -> None:
        """The W that has waited longest."""
        _, stage, micro = self.pending[device].popleft()
        self.put(device, Pass(W, stage, micro))

    def fill(self, device: int, until: float | None, delay: Callable[[float], bool] = lambda gap: False) -> None:
        """Each W that fits before `until`; and one more, which does not, if `delay` of the gap that is left says so."""
        pending, until = self.pending[device], until or 0.0
        while pending and self.free[device] + self.time[W][pending[0].stage] <= until:
            self.weight(device)
        if pending and self.free[device] < until and delay(until - self.free[device]):
            self.weight(device)

    def follow(self, orders: Sequence[Iterable[Pass]], before: Callable[[int, Pass, float], None]) -> None:
        """Put the passes of each device in the order given; `before(device, pass, when its input is there)` each.

        Raises:
            PlanError: if they wait for one another.
        """
        left, moved = [deque(order) for order in orders], True
        while moved:
            moved = False
            for device, order in enumerate(left):
                while order and (arrives := self.arrives(device, order[0])) is not None:
                    one, moved = order.popleft(), True
                    before(device, one, arrives)
                    self.put(device, one, arrives)
        if any(left):
            raise PlanError(f"deadlock: {next(order[0] for order in left if order)} never has its input")

    def finish(self) -> list[list[Pass]]:
        """The orders, with each W that is left."""
        for device, pending in enumerate(self.pending):
            while pending:
                self.weight(device)
        return self.orders


def schedule(
    name: str, p: int, order: Callable[[int], Iterable[tuple[Op, int, int]]], placement: Sequence[int] | None = None
) -> Schedule:
    """A schedule whose device d runs the passes `order(d)`."""
    orders = [[Pass(*one) for one in order(device)] for device in range(p)]
    return Schedule(name, orders, tuple(range(p)) if placement is None else tuple(placement))


def loop(p: int, v: int) -> tuple[int, ...]:
    """v chunks a device, each round beginning on device 0 again."""
    return tuple(range(p)) * v


def v_shape(p: int) -> tuple[int, ...]:
    """Two chunks a device: to the last one and back."""
    return (*range(p), *reversed(range(p)))


def positive(**sizes: int) -> None:
    """Refuse sizes below one.

    Raises:
        ValueError: it names the first of them.
    """
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")


def gpipe(p: int, m: int) -> Schedule:
    """All forward passes, then all backward ones (Huang et al. 2019). Bubble (p - 1) T, memory m."""
    positive(p=p, m=m)
    return schedule("GPipe", p, lambda s: [(kind, s, i) for kind in (F, BW) for i in range(m)])


def one_f_one_b(p: int, m: int) -> Schedule:
    """One forward, one backward, as soon as there is one (PipeDream-Flush). Bubble (p - 1) T, memory min(m, p - s)."""
    positive(p=p, m=m)

    def order(s: int) -> Iterable[tuple[Op, int, int]]:
        warm = min(p - 1 - s, m)
        yield from ((F, s, i) for i in range(warm))
        for i in range(m - warm):
            yield from ((F, s, warm + i), (BW, s, i))
        yield from ((BW, s, i) for i in range(m - warm, m))

    return schedule("1F1B", p, order)


def interleaved(p: int, m: int, v: int) -> Schedule:
    """1F1B over v chunks a device (Narayanan et al. 2021). Bubble (p - 1) T / v, at v times the messages.

    Raises:
        ValueError: if p does not divide m.
    """
    positive(p=p, m=m, v=v)
    if m % p:
        raise ValueError(f"m must be a multiple of p={p}, got {m}")

    def passes(s: int, kind: Op) -> list[tuple[Op, int, int]]:
        found = []
        for i in range(m * v):
            turn, rest = divmod(i, p * v)
            chunk = rest // p if kind is F else v - 1 - rest // p
            found.append((kind, chunk * p + s, turn * p + rest % p))
        return found

    def order(s: int) -> Iterable[tuple[Op, int, int]]:
        forward, back = passes(s, F), passes(s, BW)
        warm = min(2 * (p - 1 - s) + (v - 1) * p, m * v)
        yield from forward[:warm]
        for f, b in zip(forward[warm:], back):
            yield from (f, b)
        yield from back[m * v - warm :]

    return schedule(f"interleaved 1F1B, v={v}", p, order, loop(p, v))


def repeat(plan: Plan, k: int, *, flush: bool = True, update: float = 0.0) -> Plan:
    """k iterations of a plan one after the other, with an `OPT` on each lane after its passes.

    With `flush`, no device begins an iteration before all have updated their weights; without it each goes on as soon
    as its own are.

    Arguments:
        update: time of an update.
    """
    positive(k=k)
    b = PlanBuilder(**plan.meta)
    lanes = [b.lane(*lane) for lane in plan.lanes]
    for pool in plan.pools:
        b.pool(*pool)
    orders, n, micros = plan.orders(), len(plan), int(plan.micro.max(initial=-1)) + 1
    alloc, free = ({op: {} for op in range(n)} for _ in range(2))
    for op, pool, when, delta in plan.mem.tolist():
        (free if when else alloc)[op][pool] = abs(delta)
    updates: list[int] = []
    for turn in range(k):
        ids = np.full(n, -1)
        before, updates = updates, []
        for lane, order in zip(lanes, orders):
            for op in order.tolist():
                ids[op] = b.add(
                    Op(plan.kind[op]), lane, float(plan.dur[op]), stage=int(plan.stage[op]),
                    micro=int(plan.micro[op]) + turn * micros, alloc=alloc[op], free=free[op],
                )  # fmt: skip
            if flush and before and len(order):
                b.wait(int(ids[order[0]]), before)
            updates.append(b.add(Op.OPT, lane, update))
        for op in range(n):
            for i in range(plan.dep_ptr[op], plan.dep_ptr[op + 1]):
                b.wait(int(ids[op]), [int(ids[plan.dep_idx[i]])], float(plan.dep_lag[i]))
        for op, src, dst, size in plan.comm.tolist():
            b.move(int(ids[op]), src, dst, size)
    return b.build()
