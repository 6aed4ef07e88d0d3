"""Budgets, prices, worlds with costs, and what is computed from regrets on the host."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from anabranch.decide.base import CumReward, Static
from anabranch.decide.budget import (
    Budget,
    BudgetedDice,
    BudgetedTrace,
    BudgetRegret,
    Multipliers,
    Spent,
    Sum,
    project,
)
from anabranch.decide.minimizers import Exp3, Hedge
from anabranch.decide.optimum import fluid
from anabranch.decide.rates import competitive_ratio, mean, slope
from anabranch.drive import play


def test_a_million_terms_add_up():
    terms = np.random.default_rng(0).uniform(size=1_000_000).astype(np.float32)
    total = jax.lax.scan(lambda s, x: (s.add(x), None), Sum.of(0.0), terms)[0]
    assert abs(float(total.value) - terms.sum(dtype=np.float64)) < 0.05  # a plain float32 sum is off by about 10


def test_budget_refills_up_to_its_cap():
    budget = Budget([2.0, 5.0], horizon=10, cap=jnp.array([2.5, 9.0]))
    left = budget.pay(budget.init(), jnp.array([-1.0, 1.0]))
    assert left.value.tolist() == [2.5, 4.0]
    assert not budget.affords(left, 3.0) and budget.affords(left, jnp.array([2.5, 4.0]))
    np.testing.assert_allclose(budget.rho, [0.2, 0.5])


def test_projection_is_the_nearest_point():
    draw = np.random.default_rng(0)
    for bound in (0.5, 2.0):
        for x in draw.normal(size=(20, 3)):
            ours = np.asarray(project(jnp.asarray(x), bound))
            inside = {"type": "ineq", "fun": lambda y: bound - y.sum()}
            peer = optimize.minimize(
                lambda y: ((y - x) ** 2).sum(), np.full(3, bound / 6), bounds=[(0, None)] * 3, constraints=[inside]
            )
            np.testing.assert_allclose(ours, peer.x, atol=1e-3)
    assert [float(project(jnp.array([x]), 2.0)[0]) for x in (-1.0, 1.5, 3.0)] == [0.0, 1.5, 2.0]


def test_prices_rise_where_too_much_is_spent():
    prices = Multipliers(2, step=0.5, bound=1.0)
    lam = prices.ascend(prices.init(), jnp.array([1.0, -1.0]))
    assert lam.tolist() == [0.5, 0.0]
    np.testing.assert_allclose(prices.ascend(lam, jnp.array([1.0, 1.0])), [0.75, 0.25])


def test_trace_reveals_costs():
    rewards, costs = np.array([[0.0, 1.0], [0.0, 0.5]]), np.array([[[-1.0], [2.0]], [[-1.0], [3.0]]])
    world = BudgetedTrace(rewards, costs, reveal="full")
    state, feedback = world.step(world.init(), jnp.array(1))
    assert feedback.cost.tolist() == [2.0] and float(feedback.reward) == 1.0
    assert feedback.info["costs"].tolist() == [[-1.0], [2.0]]
    assert world.step(state, jnp.array(-1))[1].cost.tolist() == [0.0]
    assert BudgetedTrace(rewards, costs).step(state, jnp.array(1))[1].info == ()


@pytest.mark.parametrize("reveal", ["bandit", "full"])
def test_dice_fall_as_often_as_they_should(reveal):
    world = BudgetedDice([0.0, 0.7], [[-0.25, 0.0], [0.4, -0.1]], reveal)
    meters = {"sum": CumReward(), "regret": BudgetRegret(0.9, world), "luck": BudgetRegret(0.9)}
    meters["spent"] = Spent(Budget([10.0, 0.0], 1.0))
    n = 20_000
    arm = play(Static([0.0, 1.0]), world, n, key=jax.random.PRNGKey(0), meters=meters, keep=False).scores
    assert abs(arm["sum"] / n - 0.7) < 0.015
    np.testing.assert_allclose(arm["regret"], 0.2 * n, rtol=1e-5)
    np.testing.assert_allclose(arm["luck"], 0.9 * n - arm["sum"], rtol=1e-5)
    left = np.asarray(arm["spent"].left)
    np.testing.assert_allclose([(10 - left[0]) / n, left[1] / n], [0.4, 0.1], atol=0.015)
    assert arm["spent"].lowest[0] == left[0] or arm["spent"].lowest[0] < 10 - 0.39 * n
    void = play(Static([1.0, 0.0]), world, 100, key=jax.random.PRNGKey(0), meters=meters, keep=False).scores
    assert void["spent"].left.tolist() == [35.0, 0.0] and void["spent"].lowest.tolist() == [10.0, 0.0]


@pytest.mark.parametrize("kind", [Hedge, Exp3])
def test_minimisers_have_the_regret_of_their_bound(kind):
    """Gaps of every size, ranges that change a hundredfold."""
    draw = np.random.default_rng(0)
    rounds, k = 4000, 4
    scale = np.where(np.arange(rounds) % 1000 < 500, 1.0, 100.0)
    rewards = (draw.uniform(size=(rounds, k)) * [0.8, 0.9, 1.0, 0.2] * scale[:, None]).astype(np.float32)
    minimiser, eligible = kind(k), jnp.ones(k, bool)

    def body(state, x):
        row, most = x
        state, decision = minimiser.act(state, eligible)
        feedback = _feedback(row, decision.action, most)
        return minimiser.learn(state, eligible, decision, feedback), row[decision.action]

    run = jax.jit(lambda key: jax.lax.scan(body, minimiser.init(key=key), (rewards, scale))[1].sum())
    earned = np.mean([run(jax.random.PRNGKey(seed)) for seed in range(5)])
    width = np.sqrt((scale**2).sum() * np.log(k) * (k if kind is Exp3 else 1))
    assert rewards.sum(0).max() - earned < 2 * width


def _feedback(row, arm, most):
    from anabranch.cell import Feedback

    return Feedback(row[arm], info={"range": most, "rewards": row})


def test_minimisers_choose_as_they_say_and_only_what_is_eligible():
    hedge = Hedge(3)
    state = hedge.init()._replace(losses=jnp.array([0.0, 1.0, 0.5]))
    eligible = jnp.array([True, False, True])
    keys = jax.random.split(jax.random.PRNGKey(0), 8000)
    act = jax.vmap(lambda key: hedge.act(state._replace(key=key), eligible)[1])
    decisions = act(keys)
    odds = np.exp(np.sqrt(np.log(3)) * 0.5)
    share = np.bincount(np.asarray(decisions.action), minlength=3) / 8000
    np.testing.assert_allclose(share, [odds / (1 + odds), 0, 1 / (1 + odds)], atol=0.02)
    first = np.asarray(decisions.action) == 0
    np.testing.assert_allclose(np.asarray(decisions.logp)[first], np.log(odds / (1 + odds)), rtol=1e-5)
    none = hedge.act(state, jnp.zeros(3, bool))[1]
    assert int(none.action) == -1 and float(none.logp) == 0.0


def test_prices_of_the_fluid_problem_are_its_derivative():
    draw = np.random.default_rng(1)
    rewards, costs = np.append(0, draw.uniform(size=4)), np.vstack([[-0.1, 0], draw.uniform(0, 1, (4, 2))])
    rho = np.array([0.2, 0.15])
    best = fluid(rewards, costs, rho)
    np.testing.assert_allclose(best.p @ rewards, best.value)
    assert (best.p @ costs <= rho + 1e-9).all()
    for i in range(2):
        more = fluid(rewards, costs, rho + 1e-5 * np.eye(2)[i])
        np.testing.assert_allclose((more.value - best.value) / 1e-5, best.prices[i], atol=1e-6)


def test_slope_covers_the_exponent():
    horizons = np.array([1e3, 4e3, 16e3, 64e3])
    covered = 0
    for seed in range(200):
        runs = np.random.default_rng(seed).normal(1, 0.5, (16, 4)) * horizons**0.5
        fit = slope(horizons, runs)
        covered += fit.low <= 0.5 <= fit.high
    assert 180 <= covered <= 200
    np.testing.assert_allclose(mean(fit.values)[:3], fit[:3])


def test_ratios():
    estimate, worst = competitive_ratio([1.0, 3.0], [2.0, 4.0])
    assert (estimate.value, worst) == (0.625, 0.5)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: Budget([-1.0], 10), "-1"),
        (lambda: Budget([1.0], 0), "horizon.*0"),
        (lambda: BudgetedTrace(np.zeros((3, 2)), np.zeros((3, 3, 1))), r"\(3, 3, 1\)"),
        (lambda: BudgetedDice([0.0, 2.0], [[0.0], [0.0]]), "2.0"),
        (lambda: BudgetedDice([0.0, 1.0], [[0.0], [3.0]]), "3.0"),
        (lambda: BudgetedDice([0.5, 1.0], [[0.0], [0.0]]), "arm 0.*0.5"),
        (lambda: BudgetedDice([0.0, 1.0], [[0.0]]), r"\(1, 1\)"),
        (lambda: BudgetedDice([0.0, 1.0], [[0.0], [0.0]], "all"), "'all'"),  # pyright: ignore
        (lambda: fluid([1.0], [[1.0]], [0.5]), "0.5"),
        (lambda: fluid([1.0, 2.0], [[1.0]], [0.5]), r"\(1, 1\)"),
        (lambda: slope([1, 2], np.ones((3, 3))), r"\(3, 3\)"),
        (lambda: slope([1, 2], -np.ones((3, 2))), "-1"),
        (lambda: competitive_ratio([1.0], [0.0]), "0"),
    ],
)
def test_bad_input_is_named(make, word):
    with pytest.raises(ValueError, match=word):
        make()
