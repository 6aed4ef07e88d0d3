"""ZeroPP: closed forms of units, what is gathered and when, and the gradients of a plan that ran."""

from dataclasses import replace

import numpy as np
import pytest

from anabranch.plan import Op, PlanError, bubble, check, simulate, validate
from anabranch.schedule.base import BW, B, Costs, F, W, gpipe, interleaved, one_f_one_b
from anabranch.schedule.zero_bubble import zb_h2
from anabranch.schedule.zeropp import Shards, breadth_first, choose_unit, sharded, traffic, zeropp


@pytest.mark.parametrize("p", [2, 3, 4, 6, 8])
def test_closed_forms(p):
    for V in (1, 2) if p > 4 else (1, 2, 3):
        for U in {p, p + 1, 2 * p - 2, 2 * p - 1, 2 * p + 1}:
            for n in (1, 2):
                trace = simulate(check(zeropp(p, V, U, n * U).plan()))
                assert bubble(trace).span == n * max(0, 2 * p - 1 - U), (V, U, n)
                assert trace.peak.tolist() == [V * U] * p
        trace = simulate(check(breadth_first(p, V, 2 * p).plan(Costs(1, 0.5, 1.5))))
        assert trace.makespan == 3 * (V * 2 * p + p - 1) and trace.peak.tolist() == [2 * p * V] * p
        peak = simulate(interleaved(p, 4 * p, V).plan()).peak.max()
        assert V * p <= peak == (V + 1) * p - 1


def test_one_block_and_one_unit_is_as_good_as_zb_h2():
    for p, m in ((3, 6), (4, 8), (4, 11)):
        ours, theirs = (simulate(s.plan()) for s in (zeropp(p, 1, m, m), zb_h2(p, m)))
        assert bubble(ours).span == bubble(theirs).span == 0 and ours.makespan == theirs.makespan


def test_units_of_one_are_serial():
    p, n = 3, 4
    trace = simulate(check(zeropp(p, 1, 1, n).plan()))
    # Device 0 runs F, waits for F and B of the two others, runs B and W: 7 ticks before the next F may begin.
    assert trace.makespan == n * (2 * (p - 1) + 3) and trace.peak.tolist() == [1] * p
    assert bubble(trace).span == n * (2 * p - 2) and zeropp(p, 1, 1, n).note and not zeropp(p, 1, p, n).note


def test_a_smaller_last_unit_has_its_own_bubble():
    for U, m in ((7, 11), (5, 14), (6, 10)):
        last = m % U
        trace = simulate(check(zeropp(4, 2, U, m).plan()))
        assert bubble(trace).span == m // U * max(0, 7 - U) + 7 - last


def test_order_within_a_unit():
    p, V, U = 4, 2, 5
    for d, order in enumerate(zeropp(p, V, U, 10).orders):
        forward = [(one.stage // p, one.micro) for one in order if one.kind is F]
        assert forward == [(c, i) for unit in (0, 5) for c in range(V) for i in range(unit, unit + U)]
        second = next(at for at, one in enumerate(order) if one.micro >= U)
        assert sum(one.kind is W for one in order[:second]) == V * U  # a unit is done with before the next begins
        carried = zeropp(p, V, U, 10, carry=True).orders[d]
        second = next(at for at, one in enumerate(carried) if one.micro >= U)
        kinds = [one.kind for one in carried[:second]]
        assert kinds.count(B) == V * U and (d > 0 or kinds.count(W) < V * U)


def test_bubbles_do_not_add_up_when_w_is_carried_over():
    spans = [bubble(simulate(check(zeropp(4, 2, 5, 5 * n, carry=True).plan()))).span for n in (1, 2, 4)]
    assert spans == [2, 2, 2]
    assert simulate(zeropp(4, 2, 5, 20, carry=True).plan()).peak.max() > 10


def test_weights_are_gathered_before_use_and_as_often_as_said():
    p, V, U, m, shards = 4, 3, 5, 13, Shards(gather=0.5, scatter=0.7, memory=2.0, size=8.0)
    plan = check(sharded(zeropp(p, V, U, m), U, shards))
    trace = simulate(plan)
    assert np.diag(trace.volume).tolist() == [traffic(V, U, m, 8.0)] * p == [3 * V * 3 * 8.0] * p
    for device, ops in enumerate(plan.orders()[:p]):
        moves = plan.orders()[p + device]
        for stage in range(device, p * V, p):
            gathers = [op for op in moves if plan.kind[op] == Op.AG and plan.stage[op] == stage]
            scatters = [op for op in moves if plan.kind[op] == Op.RS and plan.stage[op] == stage]
            for unit in range(3):
                mine = [op for op in ops if plan.stage[op] == stage and plan.micro[op] // U == unit]
                first = {kind: min(trace.start[op] for op in mine if plan.kind[op] == kind) for kind in (F, B)}
                done = max(trace.end[op] for op in mine if plan.kind[op] == W)
                assert trace.end[gathers[2 * unit]] <= first[F] and trace.end[gathers[2 * unit + 1]] <= first[B]
                assert trace.start[scatters[unit]] >= done
    free = simulate(sharded(zeropp(p, V, U, m), U, Shards()))
    plain = simulate(zeropp(p, V, U, m).plan())
    assert free.makespan == plain.makespan and free.peak.tolist() == plain.peak.tolist()
    assert plain.makespan < trace.makespan < plain.makespan + 0.5 * 6 * V  # most of it is hidden
    assert (trace.peak <= V * U + 5 * 2.0).all()  # of the 6 stages' weights and gradients at once


def test_gathering_for_every_micro_batch_holds_1f1b_up():
    shards = Shards(gather=2.0, scatter=2.0, size=1.0)
    ours = simulate(check(sharded(zeropp(4, 1, 7, 14), 7, shards)))
    theirs = simulate(check(sharded(one_f_one_b(4, 14), 1, shards)))
    assert np.diag(theirs.volume).tolist() == [3 * 14] * 4 and np.diag(ours.volume).tolist() == [3 * 2] * 4
    assert theirs.makespan >= 3 * 14 * 2.0 > ours.makespan
    whole = simulate(check(sharded(gpipe(4, 14), 14, shards)))
    assert np.diag(whole.volume).tolist() == [3] * 4


def test_random_costs_are_sound_within_memory():
    rng = np.random.default_rng(0)
    for _ in range(5):
        p, V, m = int(rng.integers(2, 6)), int(rng.integers(1, 4)), int(rng.integers(1, 14))
        U, costs = int(rng.integers(1, 2 * p)), Costs(*rng.uniform(0.2, 2, 3), message=rng.uniform(0, 0.5))
        for carry in (False, True):
            given = zeropp(p, V, U, m, costs, carry)
            trace = simulate(check(sharded(given, U, Shards(*rng.uniform(0, 2, 4)), costs)))
            assert carry or simulate(given.plan(costs)).peak.max() <= V * min(U, m)
            assert (trace.plan.kind == BW).sum() == 0


def test_the_unit_is_the_quickest_that_fits():
    shards = Shards(gather=0.5, scatter=0.5, memory=1.0)
    assert choose_unit(3, 2, 10, np.inf, shards) == 5
    chosen = choose_unit(3, 2, 10, 11, shards)
    steps = {}
    for U in range(1, 6):
        trace = simulate(sharded(zeropp(3, 2, U, 10), U, shards))
        steps[U] = trace.makespan if trace.peak.max() <= 11 else np.inf
    assert steps[chosen] == min(steps.values()) and steps[5] == np.inf and 1 < chosen < 5
    with pytest.raises(PlanError, match="memory of 1 "):
        choose_unit(3, 2, 10, 1, shards)


def test_mutations_are_reported():
    given = zeropp(4, 2, 5, 5)
    order = list(given.orders[3])
    at = next(i for i, one in enumerate(order) if one.kind is B)
    order[at - 1], order[at] = order[at], order[at - 1]  # the first B of the last stage before its F
    broken = replace(given, orders=[*given.orders[:3], order])
    assert [p.rule for p in validate(broken.plan())] == ["deadlock"]
    plan = sharded(given, 5, Shards(memory=1.0))
    lost = replace(plan, mem=plan.mem[:-1])
    assert [p.rule for p in validate(lost)] == ["memory"]


def test_sizes_are_named():
    for at, name in enumerate(("p", "V", "U", "m")):
        sizes = [4] * 4
        sizes[at] = 0
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            zeropp(sizes[0], sizes[1], sizes[2], sizes[3])
    with pytest.raises(ValueError, match="U must be"):
        sharded(gpipe(2, 2), 0, Shards())


def test_gradients_are_those_of_the_model_whose_weights_are_sharded_or_not(executed):
    whole, parts = "zeropp(4, 2, 4, 5)", "sharded(zeropp(2, 2, 3, 5), 3, Shards(1.0, 1.0))"
    found = executed(whole, parts)
    assert found[whole]["error"] < 1e-5 and found[parts]["error"] < 1e-5
    # What is gathered for a forward, what for a backward, and the next one on its way; gradients of two blocks.
    assert found[parts]["slots"]["gathered"] == [3, 3] and found[parts]["slots"]["sums"] == [2, 2]
