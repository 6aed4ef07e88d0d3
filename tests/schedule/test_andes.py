"""Andes: the quality of experience against an integral on a grid, the choice against the best one, and the pacer."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import LinearConstraint, milp

from anabranch.contract import check
from anabranch.drive import scan
from anabranch.schedule.andes import Andes, TokenPacer, _filled, qoe, qoes
from anabranch.schedule.baselines import FCFS
from anabranch.schedule.cluster import VLLM
from anabranch.schedule.scheduler import Engine
from anabranch.schedule.serving import simulate_serving
from anabranch.schedule.workload import Workload


def by_grid(emitted, ttft, tds, step=1e-3):
    """Both curves drawn on a grid of a millisecond, a token read or expected at an even speed over 1 / tds."""
    read, last = [], -np.inf
    for time in emitted:
        last = max(time, last + 1 / tds)
        read.append(last)
    t = np.arange(0, last + 1 / tds, step)
    rising = lambda begins: sum(np.clip((t - begin) * tds, 0, 1) for begin in begins).sum()
    wanted = rising([ttft + k / tds for k in range(len(emitted))])
    return min(1.0, rising(read) / wanted) if wanted else 1.0


def test_quality_is_the_ratio_of_areas():
    rng = np.random.default_rng(0)
    for _ in range(40):
        emitted = np.cumsum(rng.exponential(rng.choice([0.05, 0.2, 1.0]), rng.integers(1, 40))) + rng.uniform(0, 3)
        ttft, tds = float(rng.uniform(0, 2)), float(rng.uniform(1, 6))
        assert qoe(emitted, ttft, tds) == pytest.approx(by_grid(emitted, ttft, tds), abs=3e-3)


def test_quality_by_hand():
    assert qoe(np.zeros(50), 1.0, 4.0) == 1  # all at once and too early: it is read as fast as it can be
    on_time = 1.0 + np.arange(20) / 4
    assert qoe(on_time, 1.0, 4.0) == pytest.approx(1)
    assert qoe(on_time - 0.7 * (np.arange(20) > 0), 1.0, 4.0) == pytest.approx(1)  # excess tokens do not help
    # One token, two seconds late, read in half a second: 0.25 of 2.25.
    assert qoe(np.array([3.0]), 1.0, 2.0) == pytest.approx(0.25 / 2.25)


@pytest.mark.parametrize(
    "bad, said",
    [
        (lambda: qoe(np.zeros(0), 1, 1), "emitted must hold a token"),
        (lambda: qoe(np.zeros(1), -1, 1), "ttft must not be negative"),
        (lambda: qoe(np.zeros(1), 1, 0), "tds must be positive"),
        (lambda: Andes(VLLM, horizon=0), "horizon must be positive"),
        (lambda: Andes(VLLM, preemptions=-1), "preemptions must not be negative"),
        (lambda: TokenPacer(tds=0), "tds must be positive"),
    ],
)
def test_refused(bad, said):
    with pytest.raises(ValueError, match=said):
        bad()


def best(gain, need, room, size):
    """The most that can be gained by at most `size` of them."""
    limits = [LinearConstraint(need[None], ub=room), LinearConstraint(np.ones((1, len(gain))), ub=size)]
    return -milp(-gain, constraints=limits, integrality=1, bounds=(0, 1)).fun


def test_greedy_is_nearly_the_best_choice():
    rng = np.random.default_rng(1)
    shares = []
    for _ in range(60):
        gain, need = rng.uniform(0, 1, 20), rng.integers(5, 60, 20)
        room, size = int(rng.uniform(0.2, 0.8) * need.sum()), 20
        taken = _filled(np.argsort(-gain / need), need, np.full(20, room), size)
        assert need[taken].sum() <= room and taken.sum() <= size
        shares.append(gain[taken].sum() / best(gain, need, room, size))
    assert np.mean(shares) > 0.95 and min(shares) > 0.8


@pytest.fixture(scope="module")
def requests():
    rng = np.random.default_rng(2)
    return Workload(np.zeros(120), rng.integers(50, 900, 120), rng.integers(20, 200, 120))


def test_what_is_not_scarce_is_served_as_by_fcfs(requests):
    load, engine = requests.poisson(0.5, 0), Engine(VLLM, kv_tokens=40_000)
    ours, theirs = (simulate_serving(load, [engine], s) for s in (Andes(VLLM), FCFS()))
    np.testing.assert_allclose(ours.emitted, theirs.emitted, rtol=1e-9)


def test_under_load_readers_have_it_better_and_few_are_sent_away(requests):
    load, engine = requests.poisson(4.0, 0), Engine(VLLM, kv_tokens=8000)
    ours, theirs = (simulate_serving(load, [engine], s) for s in (Andes(VLLM), FCFS()))
    assert np.array_equal(ours.tokens, load.output)
    assert qoes(ours)[12:].mean() > 1.1 * qoes(theirs)[12:].mean()
    assert ours.preemptions / 120 <= 1.1 and ours.throughput > 0.7 * theirs.throughput
    never = simulate_serving(load, [engine], Andes(VLLM, preemptions=0, swap=False))
    assert np.array_equal(never.tokens, load.output) and never.preemptions < ours.preemptions


def test_a_pacer_shows_text_at_reading_speed():
    cell = TokenPacer(tds=4.0)
    times = jnp.arange(200) * 0.05
    came = jnp.zeros(200, jnp.int32).at[10].set(6).at[100].set(1)
    shown = np.asarray(scan(cell, (times, came))[1].value)
    assert shown.sum() == 7 and shown.max() == 1
    at = np.asarray(times)[shown > 0]
    np.testing.assert_allclose(at, [0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 5.0], atol=0.051)
    report = check(cell, (times, came))
    assert report.ok, report
