"""Plans: closed forms of pipeline schedules, mutations that must be reported, and a drawing."""

import dataclasses
import xml.etree.ElementTree as ET
from itertools import pairwise

import numpy as np
import pytest

from anabranch.plan import (
    Lane,
    Op,
    Plan,
    PlanBuilder,
    PlanError,
    bubble,
    check,
    draw,
    simulate,
    validate,
)

F, B, W, BW = Op.F, Op.B, Op.W, Op.BW
STAGES = [2, 3, 4, 6, 8]
TIMES = [(1, 1, 1), (2, 3, 1), (1, 5, 2), (3, 1, 1)]


def gpipe(p, m, s):
    return [(F, i) for i in range(m)] + [(BW, i) for i in range(m)]


def one_f_one_b(p, m, s):
    w = min(p - 1 - s, m)
    steady = [step for i in range(m - w) for step in ((F, w + i), (BW, i))]
    return [(F, i) for i in range(w)] + steady + [(BW, i) for i in range(m - w, m)]


def zb_h1(p, m, s):
    """Zero Bubble H1: the weight gradient waits, so that it fills the gaps."""
    w = p - 1 - s
    order, f, g = [(F, i) for i in range(w)], w, 0
    for i in range(m - w):
        order += [(F, f), (B, i)]
        f += 1
        if i >= s:
            order.append((W, g))
            g += 1
    for i in range(m - w, m):
        order += [(B, i), (W, g)]
        g += 1
    return order + [(W, i) for i in range(g, m)]


def pipeline(order, p, m, times=(1, 1, 1), capacity=np.inf) -> Plan:
    """p stages on p devices; each holds one activation for every micro-batch until the gradient is done."""
    t_f, t_b, t_w = times
    dur = {F: t_f, B: t_b, W: t_w, BW: t_b + t_w}
    b = PlanBuilder(name=order.__name__, placement=tuple(range(p)))
    lanes = [b.lane(s) for s in range(p)]
    pools = [b.pool(s, capacity=capacity) for s in range(p)]
    ids = {}
    for s in range(p):
        for kind, i in order(p, m, s):
            takes = {pools[s]: 1.0} if kind is F else None
            gives = {pools[s]: 1.0} if kind in (W, BW) else None
            ids["B" if kind is BW else kind.name, s, i] = b.add(
                kind, lanes[s], dur[kind], stage=s, micro=i, alloc=takes, free=gives
            )
    for (kind, s, i), op in ids.items():
        if kind == "F" and s > 0:
            b.wait(op, [ids["F", s - 1, i]])
        if kind == "B" and s < p - 1:
            b.wait(op, [ids["B", s + 1, i]])
    return b.build()


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("p", STAGES)
@pytest.mark.parametrize("order, held", [(gpipe, lambda p, m, s: m), (one_f_one_b, lambda p, m, s: min(m, p - s))])
def test_closed_forms(order, held, p, times):
    for m in (1, p - 1, p, 2 * p + 1):
        plan = check(pipeline(order, p, m, times))
        trace = simulate(plan)
        total = sum(times)
        assert trace.makespan == (m + p - 1) * total
        assert bubble(trace).makespan == bubble(trace).span == (p - 1) * total
        assert bubble(trace).fraction == pytest.approx((p - 1) / (m + p - 1), rel=1e-15)
        assert trace.busy.tolist() == [m * total] * p
        assert trace.peak.tolist() == [held(p, m, s) for s in range(p)]


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("p", STAGES)
def test_closed_forms_of_a_split_backward(p, times):
    t_f, t_b, t_w = times
    for m in (p, 2 * p + 1):
        trace = simulate(check(pipeline(zb_h1, p, m, times)))
        assert bubble(trace).span == (p - 1) * max(t_f + t_b - t_w, t_b)
        assert trace.peak.tolist() == [p] * p


def test_simulation_is_the_least_solution_of_its_inequalities():
    rng = np.random.default_rng(0)
    for _ in range(20):
        b = PlanBuilder()
        lanes = [b.lane(d) for d in range(3)]
        n, last, edges = 30, [None] * 3, []
        durations = rng.integers(0, 5, n).astype(float)
        for i in range(n):
            lane = int(rng.integers(3))
            picked = [int(j) for j in rng.integers(0, i, min(i, 2))] if i else []
            lag = float(rng.integers(0, 3))
            b.add(Op.GEMM, lanes[lane], durations[i], after=picked, lag=lag)
            edges += [(j, i, lag) for j in picked] + ([(last[lane], i, 0.0)] if last[lane] is not None else [])
            last[lane] = i
        start = np.zeros(n)
        for _ in range(n):  # Bellman-Ford
            for before, after, lag in edges:
                start[after] = max(start[after], start[before] + durations[before] + lag)
        trace = simulate(b.build())
        assert trace.start.tolist() == start.tolist()
        chain = trace.critical
        assert trace.start[chain[0]] == 0 and trace.end[chain[-1]] == trace.makespan
        for before, after in pairwise(chain):
            assert (before, after, trace.start[after] - trace.end[before]) in edges


def rules(plan):
    return {problem.rule for problem in validate(plan)}


def without_edge(plan, edge):
    after = np.searchsorted(plan.dep_ptr, edge, side="right")  # the pointers behind the edge move down
    return dataclasses.replace(
        plan,
        dep_idx=np.delete(plan.dep_idx, edge),
        dep_lag=np.delete(plan.dep_lag, edge),
        dep_ptr=np.where(np.arange(len(plan.dep_ptr)) >= after, plan.dep_ptr - 1, plan.dep_ptr),
    )


@pytest.mark.parametrize("joined", [True, False])
def test_a_dependency_may_pass_through_messages(joined):
    b = PlanBuilder()
    lanes = b.lane(0), b.lane(0, "net"), b.lane(1, "net"), b.lane(1)
    first = b.add(F, lanes[0], 1.0, stage=0, micro=0)
    send = b.add(Op.SEND, lanes[1], 1.0, stage=0, micro=0, after=[first], comm=(0, 1, 8.0))
    recv = b.add(Op.RECV, lanes[2], 1.0, stage=0, micro=0, after=[send], comm=(0, 1, 0.0))
    b.add(F, lanes[3], 1.0, stage=1, micro=0, after=[recv] if joined else [])
    assert rules(b.build()) == (set() if joined else {"order"})


def changed(plan, column, op, value):
    values = getattr(plan, column).copy()
    values[op] = value
    return dataclasses.replace(plan, **{column: values})


@pytest.mark.parametrize("order", [gpipe, one_f_one_b, zb_h1])
def test_every_lost_dependency_is_reported(order):
    plan = pipeline(order, 4, 5)
    assert validate(plan) == []
    assert len(plan.dep_idx) == 2 * 3 * 5
    for edge in range(len(plan.dep_idx)):
        assert rules(without_edge(plan, edge)) == {"order"}, edge


@pytest.mark.parametrize("order", [gpipe, one_f_one_b])
def test_every_backward_before_its_forward_is_reported(order):
    plan = pipeline(order, 4, 5)
    for s in range(4):
        for i in range(5):
            f, b = np.flatnonzero((plan.stage == s) & (plan.micro == i))
            pos = plan.pos.copy()
            pos[[f, b]] = pos[[b, f]]
            swapped = dataclasses.replace(plan, pos=pos)
            # On the last stage nothing but the order says so; elsewhere the messages go round.
            assert rules(swapped) & {"deadlock", "order"}, (s, i)


def test_every_weight_gradient_before_its_backward_is_reported():
    plan = pipeline(zb_h1, 3, 4)
    for s in range(3):
        for i in range(4):
            _, b, w = np.flatnonzero((plan.stage == s) & (plan.micro == i))
            pos = plan.pos.copy()
            pos[[b, w]] = pos[[w, b]]
            assert rules(dataclasses.replace(plan, pos=pos)) & {"deadlock", "order"}, (s, i)


def test_a_deadlock_shows_its_cycle():
    b = PlanBuilder()
    lanes = b.lane(0), b.lane(1)
    first = b.add(Op.GEMM, lanes[0], 1.0)
    second = b.add(Op.GEMM, lanes[0], 1.0)
    third = b.add(Op.GEMM, lanes[1], 1.0, after=[second])
    b.wait(first, [third])
    plan = b.build()
    (problem,) = validate(plan)
    assert problem.rule == "deadlock" and set(problem.ops) == {first, second, third}
    with pytest.raises(PlanError, match=r"op 0 .* waits for op 2 .* waits for op 1 .* waits for op 0"):
        simulate(plan)


def test_passes_placement_and_memory_are_reported():
    plan = pipeline(one_f_one_b, 3, 4)
    op = int(np.flatnonzero(plan.kind == BW)[5])
    assert "passes" in rules(changed(plan, "kind", op, Op.OPT))  # no backward
    assert "passes" in rules(changed(plan, "kind", op, F))  # two forwards
    assert "passes" in rules(changed(plan, "kind", op, B))  # no weight gradient
    moved = dataclasses.replace(plan, meta={"placement": (0, 2, 1)})
    assert {p.rule for p in validate(moved)} == {"placement"} and len(validate(moved)) == 2 * 2 * 4
    assert rules(pipeline(one_f_one_b, 3, 4, capacity=3)) == set()
    (problem,) = validate(pipeline(one_f_one_b, 3, 4, capacity=2))  # only stage 0 holds three
    assert problem.rule == "memory" and "device 0 holds 3" in problem.message and "capacity 2" in problem.message
    leak = dataclasses.replace(plan, mem=plan.mem[:-1])
    assert [p.message for p in validate(leak)] == ["hbm of device 2 ends at 1, not at 0"]
    early = plan.mem.copy()
    early["delta"] *= -1
    assert "is -1 at time 0" in validate(dataclasses.replace(plan, mem=early))[0].message
    with pytest.raises(PlanError, match="memory: hbm of device 2 ends at 1"):
        check(leak)


def test_frees_come_before_allocations():
    b = PlanBuilder()
    lane, pool = b.lane(0), b.pool(0, capacity=1.0)
    for i in range(3):
        b.add(Op.GEMM, lane, 1.0, micro=i, alloc={pool: 1.0}, free={pool: 1.0})
    plan = b.build()
    assert validate(plan) == [] and simulate(plan).peak.tolist() == [1.0]
    times, held = simulate(plan).profile(pool)
    assert times.tolist() == [0, 1, 1, 2, 2, 3] and held.tolist() == [1, 0, 1, 0, 1, 0]


def messages(recv_order, wait=True):
    b = PlanBuilder()
    out, into = b.lane(0, "net"), b.lane(1, "net")
    sends = [b.add(Op.SEND, out, 1.0, stage=0, micro=i, comm=(0, 1, 100.0 + i)) for i in range(2)]
    for i in recv_order:
        b.add(Op.RECV, into, 1.0, stage=0, micro=i, after=[sends[i]] if wait else [], comm=(0, 1, 0.0))
    return b.build()


def test_messages_pair_up_in_order():
    assert validate(messages([0, 1])) == []
    assert rules(messages([1, 0])) == {"messages"}
    assert rules(messages([0])) == {"messages"}
    assert rules(messages([0, 1], wait=False)) == {"order"}
    assert simulate(messages([0, 1])).volume.tolist() == [[0, 201], [0, 0]]


def test_a_damaged_table_is_reported():
    plan = pipeline(gpipe, 2, 2)
    assert rules(changed(plan, "pos", 0, 1)) == {"table"}
    assert rules(changed(plan, "lane", 0, 9)) == {"table"}
    assert rules(changed(plan, "dur", 0, np.nan)) == {"table"}
    assert rules(changed(plan, "dep_idx", 0, 99)) == {"table"}
    assert rules(dataclasses.replace(plan, micro=plan.micro[1:])) == {"table"}
    assert rules(dataclasses.replace(plan, dep_ptr=plan.dep_ptr[1:])) == {"table"}
    assert rules(dataclasses.replace(plan, lanes=(Lane(0),))) == {"table"}


def test_the_builder_refuses_what_cannot_be():
    b = PlanBuilder()
    with pytest.raises(ValueError, match="no lane 0"):
        b.add(F, 0, 1.0)
    lane = b.lane(0)
    with pytest.raises(ValueError, match="dur must be finite and not negative, got -1"):
        b.add(F, lane, -1.0)
    with pytest.raises(ValueError, match="no pool 0"):
        b.add(F, lane, 1.0, alloc={0: 1.0})
    b = PlanBuilder()
    b.add(F, b.lane(0), 1.0, after=[4])
    with pytest.raises(ValueError, match="waits for op 4"):
        b.build()


def test_an_empty_plan():
    plan = PlanBuilder().build()
    assert validate(plan) == [] and simulate(plan).makespan == 0 and bubble(simulate(plan)).fraction == 0
    assert draw(simulate(plan)) == "\n"


GOLDEN = """\
0 | F0 F1 .  .  B0 -- F2 B1 -- .  B2 --
1 | .  F0 B0 -- F1 B1 -- F2 B2 -- .  .
"""


def test_drawing():
    trace = simulate(pipeline(one_f_one_b, 2, 3, (1, 1, 1)))
    assert draw(trace) == GOLDEN
    root = ET.fromstring(draw(trace, "svg"))
    rects = root.findall(".//{http://www.w3.org/2000/svg}rect")
    assert len(rects) == len(trace.plan)
    assert sum(float(r.get("width")) for r in rects) == pytest.approx(24 * trace.busy.sum())
    with pytest.raises(ValueError, match="'png'"):
        draw(trace, "png")
