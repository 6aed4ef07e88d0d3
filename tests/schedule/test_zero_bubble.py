"""Zero Bubble: closed forms, what the authors' code finds, costs at random, and updates without a barrier."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from anabranch.plan import PlanError, bubble, check, simulate
from anabranch.schedule.base import Costs, one_f_one_b, repeat
from anabranch.schedule.controllable_memory import v_half, v_min
from anabranch.schedule.zero_bubble import PostValidation, auto_schedule, undo_adamw, zb_h1, zb_h2, zb_v

STAGES = [2, 3, 4, 6, 8]


@pytest.mark.parametrize("times", [(1, 1, 1), (2, 3, 1), (1, 5, 2), (3, 1, 1)])
@pytest.mark.parametrize("p", STAGES)
def test_closed_forms(p, times):
    f, b, w = times
    for m in (p, 2 * p + 1):
        trace = simulate(check(zb_h1(p, m).plan(Costs(*times))))
        assert bubble(trace).span == (p - 1) * max(f + b - w, b) and trace.peak.tolist() == [p] * p
    if w <= min(f, b):
        trace = simulate(check(zb_h2(p, 2 * p).plan(Costs(*times))))
        assert bubble(trace).span == (p - 1) * max(0, f + b - 2 * w) and trace.peak.tolist() == [2 * p - 1] * p


@pytest.mark.parametrize("p, m", [(2, 4), (4, 8), (8, 24)])
def test_zb_v_has_no_bubble(p, m):
    trace = simulate(check(zb_v(p, m).plan()))
    assert (trace.makespan, bubble(trace).span) == (6 * m + p - 1, 0) and trace.peak.tolist() == [2 * p] * p


@pytest.mark.parametrize(
    "make, spans, peaks",
    [(v_half, [1, 5, 5, 11, 17], [4, 4, 6, 8, 10]), (v_min, [3, 5, 11, 17, 27], [4, 4, 4, 6, 8])],
)
def test_spans_and_peaks_of_the_authors_code(make, spans, peaks):
    traces = [simulate(check(make(p, 2 * p).plan())) for p in STAGES]
    assert [bubble(trace).span for trace in traces] == spans
    assert [trace.peak.max() for trace in traces] == peaks


@pytest.mark.parametrize(
    "p, m, costs, limit, longest",  # what the authors' heuristic finds
    [
        (3, 6, ([7, 12, 9], [11, 10, 14], [8, 15, 6], 2), 3, 240),
        (4, 9, ([10, 10, 10, 10], [12, 12, 12, 12], [8, 8, 8, 8], 1), 8, 286),
        (5, 11, ([13, 6, 17, 9, 10], [8, 19, 11, 15, 7], [16, 9, 12, 5, 14], 3), 10, 473),
    ],
)
def test_the_search_finds_what_the_authors_does(p, m, costs, limit, longest):
    trace = simulate(check(auto_schedule(p, m, Costs(*costs), limit).plan(Costs(*costs), capacity=limit)))
    ends = [trace.end[order[-1]] - trace.start[order[0]] for order in trace.plan.orders()]
    assert max(ends) == longest


def test_costs_at_random_are_within_memory_and_no_worse_than_by_hand():
    rng = np.random.default_rng(0)
    better = 0
    for _ in range(12):
        p = int(rng.integers(2, 7))
        m = int(rng.integers(p, 3 * p))
        costs = Costs(*rng.uniform(0.5, 2, (3, p)), message=float(rng.uniform(0, 0.3)))
        plan = check(auto_schedule(p, m, costs, p).plan(costs, capacity=p))
        better += bubble(simulate(plan)).span <= bubble(simulate(zb_h1(p, m).plan(costs))).span + 1e-9
        check(zb_v(p, m, Costs(*rng.uniform(0.5, 2, (3, 2 * p)))).plan(capacity=2 * p))
    assert better >= 11


def test_joined_iterations_of_h2_leave_nothing_idle():
    period = lambda make: simulate(repeat(make(4, 8).plan(), 3, flush=False)).makespan - 2 * 8 * 3
    assert period(zb_h2) == simulate(zb_h2(4, 8).plan()).makespan
    assert period(one_f_one_b) > simulate(one_f_one_b(4, 8).plan()).makespan


@pytest.mark.parametrize(
    "bad, message",
    [
        (lambda: zb_h1(4, 3), "m must be at least 4 for p=4, got 3"),
        (lambda: zb_h2(4, 6), "m must be at least 7 for p=4, got 6"),
        (lambda: auto_schedule(2, 2, Costs(activation=2), limit=1), "memory of 1 does not suffice"),
        (lambda: zb_v(2, 2, limit=1), "memory of 1 does not suffice"),
        (lambda: PostValidation(optax.sgd(1.0), clip=0.0), "clip must be positive"),
    ],
)
def test_refused(bad, message):
    with pytest.raises((ValueError, PlanError), match=message):
        bad()


def test_updates_without_a_barrier_are_those_with_one():
    optimizer = optax.adam(0.1)
    rule = PostValidation(optimizer, clip=1.0)
    update, validate = jax.jit(rule.update), jax.jit(rule.validate)
    rng = np.random.default_rng(1)
    stages = [rule.init({"w": jnp.asarray(rng.normal(size=3), jnp.float32)}) for _ in range(3)]
    plain = [(stage.params, stage.optimizer) for stage in stages]
    step = jax.jit(rule._step)
    undone = 0
    for t in range(20):
        grads = [{"w": jnp.asarray(rng.normal(size=3) * rng.choice([0.1, 1.0]), jnp.float32)} for _ in stages]
        if t == 7:
            grads[2]["w"] = grads[2]["w"].at[0].set(jnp.nan)
        total = jnp.float32(0)
        for i, g in enumerate(grads):
            stages[i], total = update(stages[i], g, total)
        for i, stage in enumerate(stages):
            stages[i], wrong = validate(stage, total)
            undone += bool(wrong)
        plain = [step(*one, g, rule.scale(total)) for one, g in zip(plain, grads, strict=True)]
        if t == 7:
            assert float(stages[0].scale) == 0
        for stage, one in zip(stages, plain, strict=True):
            assert np.array_equal(stage.params["w"], one[0]["w"]) and np.isfinite(stage.params["w"]).all()
    assert 5 < undone < 60


def test_adamw_can_be_undone():
    key = jax.random.PRNGKey(0)
    params, optimizer = jax.random.normal(key, (50,)), optax.adamw(1e-2)
    state = optimizer.init(params)
    for i in range(5):
        before, moments = params, state
        grads = jax.random.normal(jax.random.fold_in(key, i), (50,))
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    found, back = undo_adamw(params, state[0], grads, 1e-2)
    np.testing.assert_allclose(found, before, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(back.mu, moments[0].mu, rtol=1e-4, atol=1e-6)
    assert int(back.count) == 4
