"""BitPipe: the orders of the authors' code, closed forms, messages, and sums over replicas."""

from dataclasses import replace

import numpy as np
import pytest

from anabranch.plan import Op, PlanBuilder, validate
from anabranch.schedule.base import BW, Costs, F, Pass, Schedule, bubble, check, interleaved, simulate
from anabranch.schedule.bitpipe import bitpipe, chimera, sync

# Of the authors' `get_microbatch_idx` and `get_bkmicrobatch_idx` for 4 devices and 8 micro-batches: what is 8 or more
# is the second half of micro-batch i - 8.
FORWARD = [
    [0, 1, 2, 10, 3, 11, 8, 9, 4, 5, 6, 14, 7, 15, 12, 13],
    [0, 2, 1, 3, 10, 8, 11, 9, 4, 6, 5, 7, 14, 12, 15, 13],
    [2, 0, 3, 1, 8, 10, 9, 11, 6, 4, 7, 5, 12, 14, 13, 15],
    [2, 3, 0, 8, 1, 9, 10, 11, 6, 7, 4, 12, 5, 13, 14, 15],
]
BACKWARD = [
    [8, 9, 10, 2, 11, 3, 0, 1, 12, 13, 14, 6, 15, 7, 4, 5],
    [8, 10, 9, 11, 2, 0, 3, 1, 12, 14, 13, 15, 6, 4, 7, 5],
    [10, 8, 11, 9, 0, 2, 1, 3, 14, 12, 15, 13, 4, 6, 5, 7],
    [10, 11, 8, 0, 9, 1, 2, 3, 14, 15, 12, 4, 13, 5, 6, 7],
]


def test_orders_are_the_authors():
    given = bitpipe(4, 8)
    for kind, lists in ((F, FORWARD), (BW, BACKWARD)):
        for order, expected in zip(given.orders, lists):
            assert [8 * (one.stage >= 4) + one.micro for one in order if one.kind is kind] == expected
    assert given.placement == ((0, 3), (1, 2), (2, 1), (3, 0), (3, 0), (2, 1), (1, 2), (0, 3))
    kinds = ["".join("F" if one.kind is F else "B" for one in order) for order in given.orders]
    assert kinds[0] == "FFFFFF" + "FBFB" + "BBBBB" + "FB" + "FFFFF" + "FBFB" + "BBBBBB" == kinds[3]
    assert kinds[1] == "FFFFFFF" + "FB" + "BBBBBBB" + "FFFFFFF" + "FB" + "BBBBBBB" == kinds[2]
    for r, order in enumerate(given.orders):  # each micro-batch keeps to its way
        for one in order:
            devices = given.placement[one.stage]
            assert isinstance(devices, tuple) and devices[one.micro % 4 // 2] == r


@pytest.mark.parametrize("D", [2, 4, 6, 8])
@pytest.mark.parametrize("f, b", [(1, 2), (1, 1), (2, 2.5), (1, 4)])
def test_closed_forms(D, f, b):
    costs = Costs(f, b / 4, 3 * b / 4)
    for units in (1, 2, 3, 4):
        N = units * D
        trace = simulate(check(bitpipe(D, N).plan(costs)))
        assert bubble(trace).makespan == pytest.approx((D - 2) * (b + (units - 1) * (b - f)))
        assert trace.peak.tolist() == [3 * D / 2 + 1 + min(r, D - 1 - r) for r in range(D)]
        if (f, b, units) == (1, 2, 1):
            assert bubble(trace).fraction == pytest.approx((D - 2) / (3 * N + D - 2))


@pytest.mark.parametrize("D", [2, 4, 6, 8])
def test_chimera(D):
    trace = simulate(check(chimera(D, D).plan(Costs(1, 0.5, 0.5))))
    assert bubble(trace).fraction == pytest.approx((D - 2) / (2 * D + D - 2))
    assert trace.peak.tolist() == [D / 2 + 1 + min(r, D - 1 - r) for r in range(D)]


def test_a_turn_on_the_v_is_no_message():
    costs = Costs(1, 1, 1, message=0.1, bytes=1.0)
    for D, N in ((4, 4), (8, 16)):
        given = bitpipe(D, N), bitpipe(D, N, v_shape=False), interleaved(D, N, 2)
        v, loop, deep = (simulate(check(s.plan(costs))) for s in given)
        assert v.volume.sum() == 2 * N * (2 * D - 2) and loop.volume.sum() == deep.volume.sum() == 2 * N * (2 * D - 1)
        assert v.makespan < loop.makespan and v.makespan < deep.makespan
        assert loop.peak.tolist() == v.peak.tolist()
        far = np.argwhere(v.volume)
        assert (np.abs(far[:, 0] - far[:, 1]) == 1).all()  # neighbours only


@pytest.mark.parametrize("make", [bitpipe, chimera, lambda D, N: bitpipe(D, N, v_shape=False)])
def test_sound_at_random_sizes(make):
    rng = np.random.default_rng(0)
    for _ in range(6):
        D = 2 * int(rng.integers(1, 6))
        given = make(D, D * int(rng.integers(1, 5)))
        check(sync(given, Costs(*rng.uniform(0.1, 3, 3), message=rng.uniform()), time=rng.uniform(), size=1.0))
        assert all(len(order) == len(given.orders[0]) for order in given.orders)


def test_mutations_are_reported():
    given = bitpipe(4, 4)

    def with_order(r: int, order: list[Pass]) -> Schedule:
        return replace(given, orders=[order if d == r else kept for d, kept in enumerate(given.orders)])

    order = list(given.orders[0])  # F 0, F 1, then 2 on its first half and on its second, which waits for the first
    order[2], order[3] = order[3], order[2]
    assert [p.rule for p in validate(with_order(0, order).plan())] == ["deadlock"]
    order = list(given.orders[0])
    order[0], order[-1] = order[-1], order[0]
    assert [p.rule for p in validate(with_order(0, order).plan())] == ["deadlock"]
    order = [one._replace(stage=1) if one == Pass(F, 0, 0) else one for one in given.orders[0]]
    assert {"placement", "passes"} <= {p.rule for p in validate(with_order(0, order).plan())}
    plan = given.plan()
    op = next(i for i in range(len(plan)) if (plan.kind[i], plan.stage[i], plan.micro[i]) == (F, 3, 0))
    at = plan.dep_ptr[op]
    assert plan.dep_ptr[op + 1] == at + 1  # one edge: from the stage before
    cut = replace(
        plan, dep_idx=np.delete(plan.dep_idx, at), dep_lag=np.delete(plan.dep_lag, at),
        dep_ptr=plan.dep_ptr - (np.arange(len(plan) + 1) > op),
    )  # fmt: skip
    assert "order" in {p.rule for p in validate(cut)}


def test_sums_begin_when_both_replicas_are_done():
    D, N, costs = 8, 16, Costs(1, 1, 1, message=0.1)
    for given in (bitpipe(D, N), chimera(D, N)):
        plain = simulate(given.plan(costs))
        eager, lazy = (simulate(check(sync(given, costs, 4.0, 10.0, eager))) for eager in (True, False))
        plan = eager.plan
        ops = np.flatnonzero(plan.kind == Op.AR)
        assert sorted(plan.stage[ops]) == list(range(given.stages)) and len(plan.lanes) == D + D // 2
        for op in ops:
            both = np.flatnonzero((plan.kind == BW) & (plan.stage == plan.stage[op]))
            assert {plan.lane[i] for i in both} == set(given.placement[plan.stage[op]])
            assert eager.start[op] >= eager.end[both].max()
        assert plain.makespan < eager.makespan < lazy.makespan
        assert lazy.makespan == plain.makespan + 4.0 * given.stages / (D // 2)
        assert eager.volume.sum() == 2 * 10.0 * given.stages
        np.testing.assert_array_equal(eager.end[: len(plain.end)], plain.end)
    # Nothing to sum where weights are on one device.
    assert len(sync(interleaved(4, 4, 2))) == len(interleaved(4, 4, 2).plan())


def test_an_extended_plan_keeps_what_it_had():
    plan = sync(bitpipe(4, 8), Costs(1, 2, 3, 0.5, 4, 0.25, 2, bytes=5), 3.0, 7.0)
    again = PlanBuilder.of(plan).build()
    for name in ("kind", "lane", "pos", "dur", "stage", "micro", "dep_ptr", "dep_idx", "dep_lag", "comm", "lanes"):
        np.testing.assert_array_equal(getattr(again, name), getattr(plan, name))
    assert again.pools == plan.pools and sorted(again.mem.tolist()) == sorted(plan.mem.tolist())
    assert again.meta == plan.meta


@pytest.mark.parametrize("D, N", [(3, 3), (4, 6), (4, 0), (0, 4)])
def test_sizes_are_named(D, N):
    for make in (bitpipe, chimera):
        with pytest.raises(ValueError, match=f"D={D} and N={N}"):
            make(D, N)


def test_both_replicas_together_give_the_gradients_of_the_model(executed):
    assert executed("bitpipe(4, 8)")["bitpipe(4, 8)"]["error"] < 1e-5
