"""Schedules by hand: their closed forms, what is refused, and what iterations that follow one another take."""

import dataclasses

import numpy as np
import pytest

from anabranch.plan import PlanError, bubble, check, simulate, validate
from anabranch.schedule.base import Costs, Line, Op, Pass, gpipe, interleaved, one_f_one_b, repeat

STAGES = [2, 3, 4, 6, 8]
TIMES = [(1, 1, 1), (2, 3, 1), (1, 5, 2), (3, 1, 1)]


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("p", STAGES)
def test_closed_forms(p, times):
    total = sum(times)
    for m in (1, p, 2 * p + 1):
        for make, held in ((gpipe, lambda s: m), (one_f_one_b, lambda s: min(m, p - s))):
            trace = simulate(check(make(p, m).plan(Costs(*times))))
            assert trace.makespan == (m + p - 1) * total
            assert bubble(trace).span == bubble(trace).makespan == (p - 1) * total
            assert trace.peak.tolist() == [held(s) for s in range(p)]
    for v in (2, 3):
        for m in (p, 3 * p):
            trace = simulate(check(interleaved(p, m, v).plan(Costs(*times))))
            assert bubble(trace).makespan == (p - 1) * total
            assert trace.peak.tolist() == [min(m * v, (v - 1) * p + 2 * (p - s) - 1) for s in range(p)]


def test_costs_differ_by_stage():
    costs = Costs(forward=[1, 3], backward=[2, 1], weight=0.5, message=0.25, activation=[4, 2], bytes=10)
    trace = simulate(check(one_f_one_b(2, 1).plan(costs)))
    assert trace.makespan == 1 + 0.25 + 3 + 1.5 + 0.25 + 2.5
    assert trace.peak.tolist() == [4, 2] and trace.volume.tolist() == [[0, 10], [10, 0]]


def test_what_is_kept_and_added_between_the_halves():
    plan = gpipe(1, 1).plan(Costs(activation=8, kept=0.5, gradient=3))
    assert simulate(plan).peak.tolist() == [8]
    from anabranch.schedule.two_stage_backprop import two_stage

    trace = simulate(check(two_stage(gpipe(1, 2)).plan(Costs(activation=8, kept=0.5, gradient=3))))
    times, held = trace.profile(0)
    assert held.tolist() == [8, 16, 19, 15, 18, 14, 7, 0]
    assert times.tolist() == [0, 1, 2, 3, 3, 4, 5, 6]


@pytest.mark.parametrize(
    "bad, message",
    [
        (lambda: Costs(forward=-1), "forward must be finite and not negative, got -1.0"),
        (lambda: Costs(message=np.nan), "message must be finite"),
        (lambda: Costs(kept=1.5), "kept must be at most 1"),
        (lambda: gpipe(2, 2).plan(Costs(weight=[1, 2, 3])), "weight must be one number or 2, one a stage, got 3"),
        (lambda: gpipe(0, 2), "p must be at least 1, got 0"),
        (lambda: interleaved(4, 6, 2), "m must be a multiple of p=4, got 6"),
    ],
)
def test_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        bad()


@pytest.mark.parametrize("make", [gpipe, one_f_one_b, lambda p, m: interleaved(p, m, 2)])
def test_a_swap_of_two_passes_is_reported(make):
    schedule = make(4, 8)
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(10):
        orders = [list(order) for order in schedule.orders]
        order = orders[rng.integers(4)]
        back = [i for i, one in enumerate(order) if one.kind is Op.BW]
        i = int(rng.choice(back))
        j = order.index(Pass(Op.F, order[i].stage, order[i].micro))
        order[i], order[j] = order[j], order[i]
        seen |= {p.rule for p in validate(dataclasses.replace(schedule, orders=orders).plan())}
    assert seen & {"deadlock", "order"}


def test_a_pass_too_few_is_reported():
    schedule = one_f_one_b(3, 4)
    orders = [order[:-1] if d == 1 else order for d, order in enumerate(schedule.orders)]
    assert {"passes"} <= {p.rule for p in validate(dataclasses.replace(schedule, orders=orders).plan())}


def test_iterations_that_follow_one_another():
    plan = one_f_one_b(4, 8).plan()
    one = simulate(plan).makespan
    assert simulate(check(repeat(plan, 3, update=2))).makespan == 3 * one + 6
    joined = simulate(check(repeat(plan, 3, flush=False)))
    assert joined.makespan == 3 * one  # its idle time lies within
    assert joined.peak.tolist() == simulate(plan).peak.tolist()
    gpiped = gpipe(4, 8).plan()
    assert simulate(repeat(gpiped, 2, flush=False)).makespan == 2 * simulate(gpiped).makespan


def test_a_line_says_what_waits_for_itself():
    line = Line(2, 2, Costs())
    with pytest.raises(PlanError, match="deadlock"):
        line.follow([[Pass(Op.BW, 0, 0), Pass(Op.F, 0, 0)], [Pass(Op.F, 1, 0), Pass(Op.BW, 1, 0)]], lambda *_: None)
    with pytest.raises(PlanError, match=r"memory of 0\.5 does not suffice"):
        Line(1, 1, Costs(), limit=0.5).put(0, Pass(Op.F, 0, 0))


def test_a_line_is_a_simulation():
    costs = Costs([1, 2, 1.5], 1.2, [0.5, 0.7, 2], message=0.3)
    schedule = one_f_one_b(3, 7)
    line, trace = Line(3, 3, costs), simulate(schedule.plan(costs))
    line.follow(schedule.orders, lambda *_: None)
    assert max(line.free) == pytest.approx(trace.makespan, rel=1e-12) and line.peak == trace.peak.tolist()
