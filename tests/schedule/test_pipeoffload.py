"""PipeOffload: sizes of the authors' generator, the transfers that their code places, and what must stay."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from anabranch.plan import Op, bubble, check, simulate, validate
from anabranch.schedule.base import BW, B, Costs, F, W, interleaved, one_f_one_b
from anabranch.schedule.pipeoffload import grouped_interleaved, offload, po_full, po_half


@pytest.mark.parametrize("p", [4, 8])
@pytest.mark.parametrize("v", [2, 3, 4])
def test_closed_forms(p, v):
    whole = simulate(check(grouped_interleaved(p, 4 * p, v, p).plan()))
    half = simulate(check(grouped_interleaved(p, 4 * p, v, p // 2).plan()))
    assert bubble(whole).makespan == 2 * (p - 1) and whole.peak.tolist() == [p * v - d for d in range(p)]
    assert bubble(half).makespan == p // 2 * v + 3 * p // 2 - 2
    assert half.peak.tolist() == [p // 2 * (v + 1) - d for d in range(p)]


def test_sizes_are_those_of_the_authors_generator():
    # Devices, chunks, group: ticks without passes and the peak of device 0, for 4 p micro-batches.
    for (p, v, group), expected in {
        (2, 3, 2): (2, 6), (3, 2, 2): (5, 5), (3, 4, 3): (4, 12), (4, 2, 3): (9, 7), (4, 4, 3): (15, 13),
        (6, 3, 4): (14, 14), (6, 4, 5): (13, 21), (6, 2, 6): (10, 12), (8, 3, 5): (28, 18), (8, 4, 7): (17, 29),
    }.items():  # fmt: skip
        trace = simulate(check(grouped_interleaved(p, 4 * p, v, group).plan()))
        assert (trace.makespan - 3 * v * 4 * p, trace.peak.max()) == expected, (p, v, group)


@pytest.mark.parametrize(
    "p, v, group, k, chunks, moved, peaks",  # where the authors' code finds a plan: what moves, and its peaks
    [
        (4, 2, 2, 0.25, 1, 64, [4, 3, 3, 3]),
        (4, 2, 2, 0.25, 2, 95, [3, 3, 3, 3]),
        (4, 2, 2, 0.5, 2, 62, [4, 3, 4, 3]),
        (4, 2, 4, 0.5, 2, 64, [4, 4, 4, 4]),
        (4, 4, 2, 0.25, 4, 223, [3, 3, 3, 3]),
        (4, 4, 2, 0.5, 4, 190, [5, 5, 4, 4]),
        (4, 4, 4, 0.5, 2, 128, [8, 8, 8, 8]),
        (8, 2, 4, 0.8, 1, 256, [9, 8, 8, 7, 6, 6, 5, 5]),
        (8, 2, 8, 0.5, 1, 256, [8, 7, 6, 6, 6, 6, 6, 6]),
    ],
)
def test_transfers_are_those_of_the_authors_code(p, v, group, k, chunks, moved, peaks):
    base = grouped_interleaved(p, 4 * p, v, group).plan()
    trace = simulate(check(offload(base, chunks, 3 * k)))
    assert (trace.plan.kind == Op.D2H).sum() == (trace.plan.kind == Op.H2D).sum() == moved
    assert trace.makespan == pytest.approx(simulate(base).makespan)
    # They count by the order of a device's list, where a transfer that ends comes after the next pass begins.
    assert (trace.peak[:p] <= peaks).all() and (trace.peak[:p] >= np.array(peaks) - 2).all()


def test_order_and_memory_of_transfers():
    p, costs = 4, Costs(1.0, 1.2, 0.8, 0.1, activation=2.0, kept=0.5, gradient=0.25)
    for base in (grouped_interleaved(p, 8, 4, 3).plan(costs), interleaved(p, 8, 4).plan(costs)):
        before, trace = simulate(base), simulate(check(offload(base, 2, 1.0)))
        plan, n = trace.plan, len(base)
        at = {(int(plan.kind[op]), int(plan.stage[op]), int(plan.micro[op])): op for op in range(len(plan))}
        ends = trace.end
        some = 0
        for op in range(n, len(plan)):
            stage, micro = int(plan.stage[op]), int(plan.micro[op])
            assert stage < 2 * p and plan.lanes[plan.lane[op]] == (stage % p, "host")
            forward, leaves = at[F, stage, micro], at[Op.D2H, stage, micro]
            comes, back = at[Op.H2D, stage, micro], at.get((B, stage, micro), at.get((BW, stage, micro)))
            assert back is not None
            assert ends[forward] <= trace.start[leaves] and ends[leaves] <= trace.start[comes]
            assert ends[comes] <= trace.start[back]
            some += 1
        assert some > 20 and (trace.peak[:p] <= before.peak).all() and trace.peak[0] < before.peak[0]
        assert trace.makespan <= before.makespan * (1 + 1e-9)
        hosts = trace.peak[p:]
        assert [pool.name for pool in plan.pools] == ["hbm"] * p + ["host"] * p and hosts.max() > 0


def test_order_does_not_depend_on_times():
    plan = offload(grouped_interleaved(4, 12, 3, 3).plan(), 3, 1.0)
    rng, planned = np.random.default_rng(0), simulate(plan).peak
    at = {(int(plan.kind[op]), int(plan.stage[op]), int(plan.micro[op])): op for op in range(len(plan))}
    for slow in (0.01, 1.0, 10.0):
        times = rng.uniform(0.1, 2, len(plan)) * np.where(plan.kind <= Op.R, 1.0, slow)
        trace = simulate(check(replace(plan, dur=times)))
        for op in np.flatnonzero(plan.kind == Op.H2D).tolist():
            where = int(plan.stage[op]), int(plan.micro[op])
            steps = [at[kind, *where] for kind in (F, Op.D2H, Op.H2D, B, W)]
            assert all(trace.end[a] <= trace.start[b] for a, b in pairwise(steps))
        assert (trace.peak <= planned + 1).all()


def test_of_a_pair_one_sends_while_the_other_receives():
    trace = simulate(offload(grouped_interleaved(4, 16, 4, 4).plan(), 2, 1.5))
    plan = trace.plan
    for d in (0, 2):
        ways = [
            [(trace.start[op], trace.end[op], plan.kind[op]) for op in order]
            for lane, order in zip(plan.lanes, plan.orders())
            if lane.resource == "host" and lane.device in (d, d + 1)
        ]
        met = 0
        for begin, end, kind in ways[0]:
            for other, done, its in ways[1]:
                if begin < done - 1e-9 and other < end - 1e-9:
                    assert kind != its
                    met += 1
        assert met > 10


def test_what_has_no_time_to_go_and_come_back_stays():
    base = one_f_one_b(4, 8).plan()
    assert (offload(base, 1, 100.0).kind != Op.D2H).all() and len(offload(base, 0, 1.0)) == len(base)
    placed = check(offload(base, 1, 0.9))
    moved = placed.stage[placed.kind == Op.D2H]
    assert 3 not in moved and 0 in moved  # the last stage runs its B right after its F
    trace = simulate(placed)
    assert trace.peak[0] < 4 and trace.makespan == simulate(base).makespan
    # The authors' code gives up here.
    tight = grouped_interleaved(8, 32, 4, 4).plan()
    trace = simulate(check(offload(tight, 4, 1.5)))
    assert trace.peak[:8].max() <= 10 < simulate(tight).peak.max() and trace.makespan == simulate(tight).makespan


def test_half_and_full():
    half, full = (simulate(check(make(4, 16, 4, 0.75))) for make in (po_half, po_full))
    assert (half.makespan, full.makespan) == (198, 198)
    assert full.peak[:4].max() < half.peak[:4].max() == 8
    assert {int(s) // 4 for s in half.plan.stage[half.plan.kind == Op.D2H]} == {0, 1}


def test_random_costs_are_sound():
    rng = np.random.default_rng(0)
    for _ in range(5):
        p, v = 2 * int(rng.integers(1, 4)), int(rng.integers(1, 5))
        group = int(rng.integers((p + 1) // 2, p + 1))
        costs = Costs(*rng.uniform(0.3, 2, 3), message=rng.uniform(0, 0.3), kept=rng.uniform())
        base = grouped_interleaved(p, int(rng.integers(1, 3 * p)), v, group).plan(costs)
        before, trace = simulate(check(base)), simulate(check(offload(base, v, rng.uniform(0.1, 2))))
        assert trace.makespan <= before.makespan * (1 + 1e-9)


def test_mutations_are_reported():
    given = grouped_interleaved(4, 8, 2, 4)
    order = list(given.orders[0])
    at = next(i for i, one in enumerate(order) if one.kind is W)
    order[at - 1], order[at] = order[at], order[at - 1]  # W before its B
    assert [p.rule for p in validate(replace(given, orders=[order, *given.orders[1:]]).plan())] == ["deadlock"]
    plan = offload(given.plan(), 1, 1.0)
    op = int(np.flatnonzero(plan.kind == Op.H2D)[0])
    lost = replace(plan, mem=plan.mem[plan.mem["op"] != op])
    assert {p.rule for p in validate(lost)} == {"memory"}


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="group must be from 3 to p=5, got 2"):
        grouped_interleaved(5, 5, 2, 2)
    plan = grouped_interleaved(4, 4, 2, 4).plan()
    with pytest.raises(ValueError, match="time=0"):
        offload(plan, 1, 0)
    with pytest.raises(ValueError, match="chunks=-1"):
        offload(plan, -1, 1.0)
    with pytest.raises(ValueError, match="even, got 3"):
        offload(one_f_one_b(3, 3).plan(), 1, 1.0)


def test_gradients_are_those_of_the_model(executed):
    said = "grouped_interleaved(4, 4, 2, 3)"
    assert executed(said)[said]["error"] < 1e-5


def test_gradients_with_transfers_and_slots_of_the_plan(executed):
    base, half = "grouped_interleaved(4, 8, 2, 4)", "offload(grouped_interleaved(4, 8, 2, 4).plan(), 1, 1.5)"
    ran = executed(base, half)
    assert max(one["error"] for one in ran.values()) < 1e-5
    assert ran[base]["slots"]["activation"][1:] == [8, 7, 6] and ran[half]["slots"]["activation"] == [4, 4, 4, 4]
    assert max(ran[half]["slots"]["host"]) == 5 and max(ran[base]["slots"]["host"]) == 0
