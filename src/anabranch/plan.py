"""The plan: timed operations on the lanes of devices, in an order. The order is the decision that a scheduler makes.

Two devices, one forward pass each, the second after the first:

    >>> b = PlanBuilder(name="two")
    >>> lanes = [b.lane(device) for device in range(2)]
    >>> first = b.add(Op.F, lanes[0], 1.0, stage=0, micro=0)
    >>> second = b.add(Op.F, lanes[1], 2.0, stage=1, micro=0, after=[first], lag=0.5)
    >>> trace = simulate(b.build())
    >>> trace.makespan
    3.5

Units: seconds (or ticks, if all times are), bytes (or any unit of memory), devices by number. Tables are NumPy arrays.
"""

import html
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

MEM = np.dtype([("op", "i4"), ("pool", "i2"), ("when", "i1"), ("delta", "f8")])
"""One change of a memory pool: at the start (`when` 0) or the end (1) of an operation; positive allocates."""
COMM = np.dtype([("op", "i4"), ("src", "i2"), ("dst", "i2"), ("bytes", "f8")])
"""What an operation moves between devices."""


class Op(IntEnum):
    """Kinds of operations. A backward pass is `BW`, or `B` (input gradient) and later `W` (weight gradient)."""

    F, B, W, BW, R, SEND, RECV, D2H, H2D, AG, RS, AR, OPT = range(13)
    GEN, INFER, TRAIN, SYNC, ENC, PREFILL, DECODE, GEMM, GEMV, NET, LOAD = range(13, 24)

    __hash__ = int.__hash__  # that of an Enum is a call in Python


class Lane(NamedTuple):
    """What runs one operation at a time."""

    device: int
    resource: str = "compute"
    """`compute`, `mem`, `net`, `d2h`, `h2d` or `host`."""


class Pool(NamedTuple):
    """A memory."""

    device: int
    name: str = "hbm"
    capacity: float = np.inf


class PlanError(ValueError):
    """A plan that cannot run. The message names the operations."""


class Problem(NamedTuple):
    """One thing that is wrong with a plan."""

    rule: str
    """`table`, `deadlock`, `passes`, `order`, `placement`, `memory` or `messages`."""
    message: str
    ops: tuple[int, ...] = ()


@dataclass(frozen=True)
class Plan:
    """n operations; number i waits for the one before it on its lane and for `dep_idx[dep_ptr[i]:dep_ptr[i + 1]]`."""

    kind: Int[np.ndarray, " n"]
    lane: Int[np.ndarray, " n"]
    pos: Int[np.ndarray, " n"]
    """Place in the order of the lane: 0, 1, … on each lane."""
    dur: Float[np.ndarray, " n"]
    stage: Int[np.ndarray, " n"]
    """Position along the model (a group of layers); -1 if it has none."""
    micro: Int[np.ndarray, " n"]
    """Micro-batch, request or item; -1 if it has none."""
    dep_ptr: Int[np.ndarray, " n+1"]
    dep_idx: Int[np.ndarray, " nnz"]
    dep_lag: Float[np.ndarray, " nnz"]
    """Time that passes on the edge: latency, bytes over bandwidth."""
    mem: np.ndarray
    """Rows of `MEM`."""
    comm: np.ndarray
    """Rows of `COMM`."""
    lanes: tuple[Lane, ...]
    pools: tuple[Pool, ...]
    meta: Mapping[str, Any] = field(default_factory=dict)
    """`name`, and under `placement` the device, or the devices, that hold the weights of each stage."""

    def __len__(self) -> int:
        return len(self.kind)

    def orders(self) -> list[Int[np.ndarray, " k"]]:
        """The operations of each lane in their order."""
        by_lane = np.lexsort((self.pos, self.lane))
        ends = np.cumsum(np.bincount(self.lane, minlength=len(self.lanes)))
        return [by_lane[a:b] for a, b in pairwise([0, *ends])]

    def label(self, op: int) -> str:
        """An operation in words: `op 7 F(stage 1, micro 3) on lane 1`."""
        place = ", ".join(f"{k} {v}" for k, v in (("stage", self.stage[op]), ("micro", self.micro[op])) if v >= 0)
        return f"op {op} {Op(self.kind[op]).name}({place}) on lane {self.lane[op]}"

    def waits(self) -> list[list[tuple[int, float]]]:
        """For each operation, what it waits for and the lag: its dependencies, then its predecessor on the lane."""
        ptr, idx, lag = self.dep_ptr.tolist(), self.dep_idx.tolist(), self.dep_lag.tolist()
        out = [list(zip(idx[a:b], lag[a:b])) for a, b in pairwise(ptr)]
        for order in self.orders():
            for before, op in pairwise(order.tolist()):
                out[op].append((before, 0.0))
        return out


class PlanBuilder:
    """Builds a plan one operation at a time; operations of a lane run in the order in which they were added."""

    def __init__(self, **meta: Any):
        self.meta = meta
        self._lanes: list[Lane] = []
        self._pools: list[Pool] = []
        self._length: list[int] = []
        self._ops: list[tuple] = []
        self._deps: list[list[tuple[int, float]]] = []
        self._mem: list[tuple] = []
        self._comm: list[tuple] = []

    @classmethod
    def of(cls, plan: Plan) -> "PlanBuilder":
        """A builder that goes on where a plan ends; its operations keep their numbers."""
        b = cls(**plan.meta)
        b._lanes, b._pools = list(plan.lanes), list(plan.pools)
        b._length = np.bincount(plan.lane, minlength=len(plan.lanes)).tolist()
        columns = (plan.kind, plan.lane, plan.pos, plan.dur, plan.stage, plan.micro)
        b._ops = list(zip(*(column.tolist() for column in columns)))
        edges = list(zip(plan.dep_idx.tolist(), plan.dep_lag.tolist()))
        b._deps = [edges[start:end] for start, end in pairwise(plan.dep_ptr.tolist())]
        b._mem, b._comm = plan.mem.tolist(), plan.comm.tolist()
        return b

    def lane(self, device: int, resource: str = "compute") -> int:
        """A new lane."""
        self._lanes.append(Lane(device, resource))
        self._length.append(0)
        return len(self._lanes) - 1

    def pool(self, device: int, name: str = "hbm", capacity: float = np.inf) -> int:
        """A new memory pool."""
        self._pools.append(Pool(device, name, capacity))
        return len(self._pools) - 1

    def add(
        self,
        kind: Op,
        lane: int,
        dur: float,
        *,
        stage: int = -1,
        micro: int = -1,
        after: Iterable[int] = (),
        lag: float = 0.0,
        alloc: Mapping[int, float] | None = None,
        free: Mapping[int, float] | None = None,
        comm: tuple[int, int, float] | None = None,
    ) -> int:
        """The next operation of a lane.

        Arguments:
            after: operations that must end before; `lag` later.
            alloc: amounts by pool, taken at the start.
            free: amounts by pool, given back at the end.
            comm: source device, destination device, bytes.

        Raises:
            ValueError: no such lane or pool, or a duration that is negative or not finite.
        """
        if not 0 <= lane < len(self._lanes):
            raise ValueError(f"no lane {lane}: there are {len(self._lanes)}")
        if not (np.isfinite(dur) and dur >= 0):
            raise ValueError(f"dur must be finite and not negative, got {dur}")
        op = len(self._ops)
        pos = self._length[lane]
        self._length[lane] += 1
        self._ops.append((kind, lane, pos, dur, stage, micro))
        self._deps.append([])
        self.wait(op, after, lag)
        for when, changes in ((0, alloc or {}), (1, free or {})):
            for pool, amount in changes.items():
                if not 0 <= pool < len(self._pools):
                    raise ValueError(f"no pool {pool}: there are {len(self._pools)}")
                self._mem.append((op, pool, when, -amount if when else amount))
        if comm is not None:
            self.move(op, *comm)
        return op

    def move(self, op: int, src: int, dst: int, size: float) -> None:
        """Let `op` move so many bytes from device to device."""
        self._comm.append((op, src, dst, size))

    def wait(self, op: int, on: Iterable[int], lag: float = 0.0) -> None:
        """Let `op` wait for others, which may have been added later than itself."""
        self._deps[op].extend((other, lag) for other in on)

    def build(self) -> Plan:
        """The plan.

        Raises:
            ValueError: an operation waits for one that was never added.
        """
        n = len(self._ops)
        flat = [edge for edges in self._deps for edge in edges]
        for other, _ in flat:
            if not 0 <= other < n:
                raise ValueError(f"an operation waits for op {other}: there are {n}")
        kind, lane, pos, dur, stage, micro = zip(*self._ops) if n else ((),) * 6
        return Plan(
            kind=np.array(kind, np.int16),
            lane=np.array(lane, np.int32),
            pos=np.array(pos, np.int32),
            dur=np.array(dur, np.float64),
            stage=np.array(stage, np.int32),
            micro=np.array(micro, np.int32),
            dep_ptr=np.cumsum([0, *(len(edges) for edges in self._deps)], dtype=np.int32),
            dep_idx=np.array([other for other, _ in flat], np.int32),
            dep_lag=np.array([lag for _, lag in flat], np.float64),
            mem=np.array(self._mem, MEM),
            comm=np.array(self._comm, COMM),
            lanes=tuple(self._lanes),
            pools=tuple(self._pools),
            meta=self.meta,
        )


@dataclass(frozen=True)
class Trace:
    """When the operations of a plan ran."""

    plan: Plan
    start: Float[np.ndarray, " n"]
    end: Float[np.ndarray, " n"]
    cause: Int[np.ndarray, " n"]
    """The operation that each one waited for longest; -1 if it started at once."""

    @property
    def makespan(self) -> float:
        return float(self.end.max(initial=0.0))

    @property
    def busy(self) -> Float[np.ndarray, " lanes"]:
        """Time each lane worked."""
        return np.bincount(self.plan.lane, self.plan.dur, len(self.plan.lanes))

    @property
    def critical(self) -> list[int]:
        """A longest chain of operations, first to last: what to shorten to shorten the plan."""
        chain = [int(self.end.argmax())] if len(self.end) else []
        while chain and self.cause[chain[-1]] >= 0:
            chain.append(int(self.cause[chain[-1]]))
        return chain[::-1]

    @property
    def volume(self) -> Float[np.ndarray, "devices devices"]:
        """Bytes moved from device to device."""
        devices = 1 + max((lane.device for lane in self.plan.lanes), default=-1)
        out = np.zeros((devices, devices))
        np.add.at(out, (self.plan.comm["src"], self.plan.comm["dst"]), self.plan.comm["bytes"])
        return out

    def profile(self, pool: int) -> tuple[Float[np.ndarray, " k"], Float[np.ndarray, " k"]]:
        """`(times, held)`: what a pool holds after each change. At equal times what is freed comes first."""
        rows = self.plan.mem[self.plan.mem["pool"] == pool]
        times = np.where(rows["when"] == 0, self.start[rows["op"]], self.end[rows["op"]])
        order = np.lexsort((rows["delta"] > 0, times))
        return times[order], np.cumsum(rows["delta"][order])

    @property
    def peak(self) -> Float[np.ndarray, " pools"]:
        """The most that each pool ever held."""
        return np.array([self.profile(i)[1].max(initial=0.0) for i in range(len(self.plan.pools))])


def simulate(plan: Plan) -> Trace:
    """Run the plan: an operation starts when its lane is free and all it waits for has ended, plus the lags.

    Takes O(n + nnz).

    Raises:
        PlanError: the plan deadlocks; the message shows the cycle.
    """
    waits = plan.waits()
    order, cycle = _topological(waits)
    if cycle:
        raise PlanError(_deadlock(plan, cycle))
    dur = plan.dur.tolist()
    start, end, cause = [0.0] * len(plan), [0.0] * len(plan), [-1] * len(plan)
    for op in order:
        for other, lag in waits[op]:
            if end[other] + lag > start[op]:
                start[op], cause[op] = end[other] + lag, other
        end[op] = start[op] + dur[op]
    return Trace(plan, np.array(start), np.array(end), np.array(cause, np.int32))


class Bubble(NamedTuple):
    """Idle time of the worst compute lane. `span` and `makespan` are two definitions that must not be mixed."""

    span: float
    """Idle between its first start and its last end: all that is lost when iterations follow each other unflushed."""
    makespan: float
    """Idle from time 0 to the end of the plan."""
    fraction: float
    """`makespan` over the makespan of the plan."""


def bubble(trace: Trace) -> Bubble:
    """Idle time on the compute lanes."""
    spans, idles = [0.0], [0.0]
    for lane, order in enumerate(trace.plan.orders()):
        if trace.plan.lanes[lane].resource == "compute" and len(order):
            busy = trace.plan.dur[order].sum()
            spans.append(float(trace.end[order[-1]] - trace.start[order[0]] - busy))
            idles.append(float(trace.makespan - busy))
    return Bubble(max(spans), max(idles), max(idles) / trace.makespan if trace.makespan else 0.0)


def validate(plan: Plan) -> list[Problem]:
    """All that is wrong with a plan; empty when it is sound.

    - `table`: columns of equal length, known kinds, lanes and pools, positions 0, 1, … on each lane;
    - `deadlock`: lanes and dependencies together have no cycle;
    - `passes`: a stage and micro-batch has one F, and one BW or one B and one W, if the plan trains at all;
    - `order`: whatever the durations, F follows F of the stage before, backward follows F and the backward of the
      stage behind, W follows B, RECV follows its SEND;
    - `placement`: a stage runs where `meta["placement"]` keeps its weights;
    - `memory`: pools end at 0, are never negative and never above their capacity;
    - `messages`: SEND and RECV between two devices pair up in the same order.
    """
    if problems := _table(plan):
        return problems
    waits = plan.waits()
    order, cycle = _topological(waits)
    if cycle:
        return [Problem("deadlock", _deadlock(plan, cycle), tuple(cycle))]
    # What an operation is sure to come after: the furthest position on every lane.
    seen = np.full((len(plan), len(plan.lanes)), -1, np.int32)
    for op in order:
        for other, _ in waits[op]:
            np.maximum(seen[op], seen[other], out=seen[op])
            seen[op, plan.lane[other]] = max(seen[op, plan.lane[other]], plan.pos[other])

    def follows(later: int, earlier: int) -> list[Problem]:
        if seen[later, plan.lane[earlier]] >= plan.pos[earlier]:
            return []
        message = f"{plan.label(later)} does not wait for {plan.label(earlier)}"
        return [Problem("order", message, (later, earlier))]

    return _passes(plan, follows) + _messages(plan, follows) + _placement(plan) + _memory(plan)


def check(plan: Plan) -> Plan:
    """The plan itself, if it is sound.

    Raises:
        PlanError: it is not; the message lists the problems.
    """
    if problems := validate(plan):
        raise PlanError("\n".join(f"{problem.rule}: {problem.message}" for problem in problems))
    return plan


def _topological(waits: list[list[tuple[int, float]]]) -> tuple[list[int], list[int]]:
    """An order in which nothing comes before what it waits for, or a cycle."""
    missing = [len(edges) for edges in waits]
    unlocks: list[list[int]] = [[] for _ in waits]
    for op, edges in enumerate(waits):
        for other, _ in edges:
            unlocks[other].append(op)
    order = [op for op, count in enumerate(missing) if count == 0]
    for op in order:  # grows while it is read
        for later in unlocks[op]:
            missing[later] -= 1
            if missing[later] == 0:
                order.append(later)
    if len(order) == len(waits):
        return order, []
    # Everything that is left waits for something that is left: walking back must come round.
    path = [next(op for op, count in enumerate(missing) if count)]
    while path[-1] not in path[:-1]:
        path.append(next(other for other, _ in waits[path[-1]] if missing[other]))
    return order, path[path.index(path[-1]) : -1]


def _deadlock(plan: Plan, cycle: list[int]) -> str:
    return "deadlock: " + " waits for ".join(plan.label(op) for op in [*cycle, cycle[0]])


def _table(plan: Plan) -> list[Problem]:
    n, out = len(plan), []
    columns = ("lane", "pos", "dur", "stage", "micro")
    out += [
        f"{name} has {len(getattr(plan, name))} rows, expected {n}" for name in columns if len(getattr(plan, name)) != n
    ]
    ptr, idx = plan.dep_ptr, plan.dep_idx
    if (
        len(ptr) != n + 1
        or ptr[0] != 0
        or ptr[-1] != len(idx)
        or len(plan.dep_lag) != len(idx)
        or (np.diff(ptr) < 0).any()
    ):
        out.append("dep_ptr, dep_idx and dep_lag do not fit together")
    ranges = [("kind", plan.kind, len(Op)), ("lane", plan.lane, len(plan.lanes)), ("dep_idx", idx, n)]
    ranges += [
        ("mem op", plan.mem["op"], n),
        ("mem pool", plan.mem["pool"], len(plan.pools)),
        ("comm op", plan.comm["op"], n),
    ]
    devices = 1 + max((lane.device for lane in plan.lanes), default=-1)
    ranges += [("comm src", plan.comm["src"], devices), ("comm dst", plan.comm["dst"], devices)]
    for name, values, size in ranges:
        out += [f"{name} {value} is not in 0 to {size - 1}" for value in values[(values < 0) | (values >= size)][:1]]
    if not out:
        for lane, order in enumerate(plan.orders()):
            if not np.array_equal(plan.pos[order], np.arange(len(order))):
                out.append(f"positions on lane {lane} are {plan.pos[order].tolist()}, expected 0 to {len(order) - 1}")
        for name, values in (("dur", plan.dur), ("dep_lag", plan.dep_lag)):
            out += [
                f"{name} {value} is negative or not finite"
                for value in values[~((values >= 0) & (values < np.inf))][:1]
            ]
    return [Problem("table", message) for message in out]


def _passes(plan: Plan, follows) -> list[Problem]:
    out: list[Problem] = []
    found: dict[int, dict[int, dict[Op, list[int]]]] = {}
    for op in np.flatnonzero(np.isin(plan.kind, [Op.F, Op.B, Op.W, Op.BW])).tolist():
        ops = found.setdefault(int(plan.micro[op]), {}).setdefault(int(plan.stage[op]), {})
        ops.setdefault(Op(plan.kind[op]), []).append(op)
    trains = bool(np.isin(plan.kind, [Op.B, Op.W, Op.BW]).any())
    wanted = [{Op.F: 1, Op.BW: 1}, {Op.F: 1, Op.B: 1, Op.W: 1}] if trains else [{Op.F: 1}]
    for micro, stages in found.items():
        before: dict[Op, list[int]] | None = None
        for stage, ops in sorted(stages.items()):
            if {kind: len(ids) for kind, ids in ops.items()} not in wanted:
                has = ", ".join(f"{len(ids)} {kind.name}" for kind, ids in ops.items())
                message = f"stage {stage}, micro {micro} has {has}; expected " + (
                    "1 F and 1 BW, or 1 F, 1 B and 1 W" if trains else "1 F"
                )
                out.append(Problem("passes", message, tuple(op for ids in ops.values() for op in ids)))
                before = None
                continue
            backward = ops.get(Op.BW) or ops.get(Op.B)
            if backward:
                out += follows(backward[0], ops[Op.F][0])
            if Op.W in ops and backward:
                out += follows(ops[Op.W][0], backward[0])
            if before is not None:
                out += follows(ops[Op.F][0], before[Op.F][0])
                if backward:
                    out += follows((before.get(Op.BW) or before[Op.B])[0], backward[0])
            before = ops
    return out


def _messages(plan: Plan, follows) -> list[Problem]:
    ends: dict[tuple[int, int], tuple[list[int], list[int]]] = {}
    for row in sorted(plan.comm.tolist(), key=lambda row: (plan.lane[row[0]], plan.pos[row[0]])):
        op, src, dst, _ = row
        if plan.kind[op] in (Op.SEND, Op.RECV):
            ends.setdefault((src, dst), ([], []))[int(plan.kind[op] == Op.RECV)].append(op)
    out: list[Problem] = []
    for (src, dst), (sends, recvs) in ends.items():
        if len(sends) != len(recvs):
            message = f"{len(sends)} SEND but {len(recvs)} RECV from device {src} to {dst}"
            out.append(Problem("messages", message, (*sends, *recvs)))
        for send, recv in zip(sends, recvs):
            if (plan.stage[send], plan.micro[send]) != (plan.stage[recv], plan.micro[recv]):
                out.append(Problem("messages", f"{plan.label(send)} meets {plan.label(recv)}", (send, recv)))
            else:
                out += follows(recv, send)
    return out


def _placement(plan: Plan) -> list[Problem]:
    out = []
    for stage, devices in enumerate(plan.meta.get("placement", ())):
        for op in np.flatnonzero((plan.stage == stage) & (plan.kind <= Op.R)).tolist():
            device = plan.lanes[plan.lane[op]].device
            if device not in np.atleast_1d(devices):
                message = f"{plan.label(op)} runs on device {device}; the weights of stage {stage} are on {devices}"
                out.append(Problem("placement", message, (op,)))
    return out


def _memory(plan: Plan) -> list[Problem]:
    out, trace = [], simulate(plan)
    for i, pool in enumerate(plan.pools):
        times, held = trace.profile(i)
        if not len(held):
            continue
        slack = 1e-9 * np.abs(held).max()  # sums of floats
        settled = np.append(times[1:] != times[:-1], True)  # all changes at one time are done
        if (short := np.flatnonzero(settled & (held < -slack))).size:
            out.append(f"{pool.name} of device {pool.device} is {held[short[0]]:g} at time {times[short[0]]:g}")
        if (over := np.flatnonzero(held > pool.capacity + slack)).size:
            text = f"{pool.name} of device {pool.device} holds {held[over[0]]:g} at time {times[over[0]]:g}"
            out.append(f"{text}, above its capacity {pool.capacity:g}")
        if abs(held[-1]) > slack:
            out.append(f"{pool.name} of device {pool.device} ends at {held[-1]:g}, not at 0")
    return [Problem("memory", message) for message in out]


_LETTER = {Op.BW: "B", Op.RECV: "V", Op.SEND: "S"}
_COLOUR = {"F": "#8ecae6", "B": "#95d5b2", "W": "#ffd166"}


def draw(trace: Trace, to: str = "text", tick: float | None = None) -> str:
    """A Gantt chart: a row a lane, a cell a tick, the letter of the operation and the last digit of its micro-batch.

    `tick` is the shortest operation unless said. In text, `-` goes on with an operation and `.` is idle. `to="svg"`
    gives the source of an SVG image.

    Raises:
        ValueError: `to` is neither `"text"` nor `"svg"`, or `tick` is not positive.
    """
    if to not in ("text", "svg"):
        raise ValueError(f'to must be "text" or "svg", got {to!r}')
    plan = trace.plan
    tick = float(min(plan.dur[plan.dur > 0], default=1.0)) if tick is None else tick
    if not tick > 0:
        raise ValueError(f"tick must be positive, got {tick}")
    names = [
        f"{lane.device}" if lane.resource == "compute" else f"{lane.device} {lane.resource}" for lane in plan.lanes
    ]
    labels = [
        _LETTER.get(Op(kind), Op(kind).name[0]) + (str(micro % 10) if micro >= 0 else " ")
        for kind, micro in zip(plan.kind.tolist(), plan.micro.tolist())
    ]
    if to == "text":
        wide = max(map(len, names), default=0)
        starts, ends = (np.rint(times / tick).astype(int) for times in (trace.start, trace.end))
        rows = []
        for name, order in zip(names, plan.orders()):
            cells = [". "] * int(ends.max(initial=0))
            for op in order:
                cells[starts[op] : ends[op]] = [labels[op], *["--"] * (ends[op] - starts[op] - 1)][
                    : ends[op] - starts[op]
                ]
            rows.append(f"{name:>{wide}} | {' '.join(cells)}".rstrip())
        return "\n".join(rows) + "\n"
    step, high, left = 24.0, 22, 64
    width, height = left + trace.makespan / tick * step + 1, high * len(plan.lanes) + 1
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height}" '
        'font-family="monospace" font-size="11">'
    ]
    for lane, (name, order) in enumerate(zip(names, plan.orders())):
        out.append(f'<text x="{left - 6}" y="{lane * high + 15}" text-anchor="end">{html.escape(name)}</text>')
        for op in order:
            x, w = left + trace.start[op] / tick * step, plan.dur[op] / tick * step
            out.append(
                f'<g><title>{html.escape(plan.label(op))}</title><rect x="{x:g}" y="{lane * high}" width="{w:g}" '
                f'height="{high}" fill="{_COLOUR.get(labels[op][0], "#dddddd")}" stroke="#444"/>'
                f'<text x="{x + w / 2:g}" y="{lane * high + 15}" text-anchor="middle">{labels[op].strip()}</text></g>'
            )
    return "\n".join([*out, "</svg>"]) + "\n"
