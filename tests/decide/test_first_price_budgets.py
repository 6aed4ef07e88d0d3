"""First-price bidding: best responses in closed form, counts by hand, the budget, and the optimum."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from anabranch.cell import Decision, Feedback, Maybe
from anabranch.contract import check
from anabranch.decide.budget import Budget, BudgetRegret, Spent
from anabranch.decide.first_price_budgets import (
    FirstPriceBidder,
    FirstPriceDraws,
    FirstPriceTrace,
    example,
    uniform,
)
from anabranch.decide.optimum import first_price
from anabranch.drive import play, play_seeds


def told(bidder, auctions, state=None):
    """The state after bids against others: (bid, d) pairs, with what this feedback shows."""
    state = bidder.init() if state is None else state
    for bid, rival in auctions:
        won = bid >= rival
        seen = Maybe(jnp.float32(rival), jnp.array(bidder.reveal == "full" or not won))
        feedback = Feedback(jnp.array(0.0), jnp.array([bid * won]), info={"rival": seen})
        state = bidder.learn(state, jnp.array(0.5), Decision(jnp.float32(bid)), feedback)
    return state


def test_best_response_to_uniform_bids_is_half_the_value_over_one_plus_lambda():
    bidder = FirstPriceBidder(Budget([10.0], 100), points=1001)
    state = bidder.init()._replace(fell=jnp.ones(1001).at[-1].set(0.0), trials=jnp.arange(1.0, 1002.0))
    for lam, value in ((0.0, 0.8), (0.5, 0.9), (2.0, 1.0)):
        bid, chance = bidder.bid(state._replace(lam=jnp.array([lam])), jnp.array(value))
        np.testing.assert_allclose(bid, value / (2 * (1 + lam)), atol=1e-3)
        np.testing.assert_allclose(chance, bid, atol=1e-6)


def test_nothing_is_bid_before_anything_is_known():
    for reveal in ("full", "one_sided"):
        bidder = FirstPriceBidder(Budget([1.0], 10), reveal=reveal)
        assert float(bidder.act(bidder.init(), jnp.array(1.0))[1].action) == 0.0


def test_full_feedback_counts_by_hand():
    bidder = FirstPriceBidder(Budget([10.0], 100), points=5)  # 0, 1/4, 1/2, 3/4, 1
    state = told(bidder, [(0.5, 0.3), (0.0, 0.75), (0.25, 0.9)])
    np.testing.assert_allclose(bidder.chance(state), np.array([0, 0, 1, 2, 3]) / 3)


def test_one_sided_feedback_counts_by_hand():
    """Points 0, 1/4, 1/2, 3/4, 1. A win at 1/2 says that d is not above 1/2, 3/4 or 1; a loss at 1/4 against 0.6 that
    it is above 1/2, not above 3/4, and leaves lower intervals out; a loss at 0 against 0.9 that it is above 3/4."""
    bidder = FirstPriceBidder(Budget([10.0], 100), points=5, reveal="one_sided")
    state = told(bidder, [(0.5, 0.3), (0.25, 0.6)])
    assert state.trials.tolist() == [0, 0, 2, 2, 2] and state.fell.tolist() == [0, 0, 1, 0, 0]
    np.testing.assert_allclose(bidder.chance(state), [0.5, 0.5, 0.5, 1, 1])
    state = told(bidder, [(0.0, 0.9)], state)
    assert state.trials.tolist() == [0, 0, 2, 3, 3] and state.fell.tolist() == [0, 0, 1, 1, 0]
    np.testing.assert_allclose(bidder.chance(state), np.array([1, 1, 1, 2, 3]) / 3, rtol=1e-6)
    state = told(bidder, [(0.3, 0.4)], bidder.init())  # no point: whether d is above 1/4 would not be known after a win
    assert state.trials.tolist() == [0, 0, 1, 1, 1] and state.fell.tolist() == [0] * 5


def test_one_sided_estimate_is_that_of_kaplan_and_meier():
    """SciPy's, for a sample censored from above: that of 1 - max(d, b)."""
    draw = np.random.default_rng(0)
    bids, rivals = draw.integers(0, 8, 60) / 10, (draw.integers(0, 10, 60) + 0.5) / 10
    bidder = FirstPriceBidder(Budget([100.0], 100), points=11, reveal="one_sided")
    chance = bidder.chance(told(bidder, zip(bids.tolist(), rivals.tolist())))
    sample = np.maximum(bids, rivals)
    peer = stats.ecdf(stats.CensoredData.right_censored(1 - sample, bids >= rivals)).sf
    np.testing.assert_allclose(chance, peer.evaluate(1 - np.linspace(0, 1, 11) - 1e-6), atol=1e-5)


def test_one_sided_estimates_are_unbiased():
    """Bids that follow the estimate itself: still, the excess of what fell into an interval is a martingale."""
    bidder = FirstPriceBidder(Budget([1e9], 400), points=11, reveal="one_sided")  # enough for any bid
    world = FirstPriceDraws(uniform, uniform, uniform, reveal="one_sided")
    keys = jax.random.split(jax.random.PRNGKey(0), 300)
    end = play_seeds(bidder, world, 400, keys).state["policy"]
    fell, trials = np.asarray(end.fell)[:, :-1], np.asarray(end.trials)[:, :-1]
    excess = fell - trials / np.arange(1, 11)  # d ≤ (j + 1) / 10 is above j / 10 once in j + 1 times
    error = excess.std(0) / np.sqrt(len(keys)) + 1e-6
    assert (np.abs(excess.mean(0)) < 4 * error).all()
    assert (trials[:, 5] > trials[:, 1]).all()


@pytest.mark.parametrize("reveal", ["full", "one_sided"])
def test_pays_its_bid_and_never_more_than_it_has(reveal):
    budget = Budget([3.0], 300)
    world = FirstPriceDraws(uniform, lambda u: 0.3 * u, reveal=reveal)
    bidder = FirstPriceBidder(budget, points=21, reveal=reveal)
    result = play(bidder, world, 300, key=jax.random.PRNGKey(1), meters={"spent": Spent(budget)})
    ticks, spent = result.ticks, result.scores["spent"]
    bids, cost, reward = ticks.decision.action, ticks.feedback.cost[:, 0], ticks.feedback.reward
    won = np.asarray(cost) > 0
    np.testing.assert_array_equal(np.asarray(cost)[won], np.asarray(bids)[won])  # the bid, not the other's
    np.testing.assert_allclose(np.asarray(reward)[won], np.asarray(ticks.x - bids)[won])
    assert float(spent.lowest[0]) >= 0 and float(spent.left[0]) < 0.2
    np.testing.assert_allclose(result.state["policy"].left.value, spent.left)
    seen = np.asarray(ticks.feedback.info["rival"].valid)
    assert seen.all() if reveal == "full" else (seen == (np.asarray(bids) < ticks.feedback.info["rival"].value)).all()


def test_lambda_by_hand():
    bidder = FirstPriceBidder(Budget([40.0], 100))
    state = told(bidder, [(0.9, 0.1)])  # spends 0.5 too much
    np.testing.assert_allclose(state.lam, 0.05, rtol=1e-5)
    np.testing.assert_allclose(told(bidder, [(0.0, 0.1)], state).lam, 0.01, rtol=1e-4)
    assert float(told(bidder, [(0.0, 0.1)] * 3).lam[0]) == 0.0


def test_ties_and_free_auctions_are_won():
    world = FirstPriceTrace(jnp.array([0.5, 0.8]), jnp.array([0.0, 0.25]), reveal="one_sided")
    state, feedback = world.step(world.init(), jnp.array(0.0))
    assert (float(feedback.reward), float(feedback.cost[0])) == (0.5, 0.0)
    state, feedback = world.step(state, jnp.array(0.25))
    np.testing.assert_allclose(feedback.reward, 0.55)
    assert not bool(feedback.info["rival"].valid)
    assert float(world.observe(state)) == 0.5  # from the start again


@pytest.mark.parametrize("rho", [0.02, 0.05, 0.2])
def test_optimum_in_closed_form(rho):
    """All uniform: b = v / 2(1 + λ), E[b²] = 1 / 12(1 + λ)²."""
    lam = max(0.0, 1 / np.sqrt(12 * rho) - 1)
    half = 1 / (2 * (1 + lam))
    grid, quantiles = np.linspace(0, 1, 1001), (np.arange(1000) + 0.5) / 1000
    best = first_price(quantiles, grid, grid, rho)
    np.testing.assert_allclose(best.value, half / 3 - half**2 / 3, atol=1e-4)
    np.testing.assert_allclose(best.price, lam, atol=5e-3)


def test_regret_in_expectation_is_that_of_the_draws():
    world = FirstPriceDraws(uniform, uniform, uniform)
    bidder = FirstPriceBidder(Budget([100.0], 2000), points=46)
    meters = {"expected": BudgetRegret(0.1, world), "drawn": BudgetRegret(0.1)}
    scores = play_seeds(bidder, world, 2000, jax.random.split(jax.random.PRNGKey(0), 16), meters=meters).scores
    gap = np.asarray(scores["expected"] - scores["drawn"])
    assert abs(gap.mean()) < 3 * gap.std() / 4 and gap.std() > 0


def test_contract():
    cell, xs = example()
    report = check(cell, xs, key=jax.random.PRNGKey(0))
    assert report.ok, str(report)


def test_a_thousand_campaigns_are_one_vmap():
    budgets = jnp.linspace(1.0, 30.0, 8)
    world = FirstPriceDraws(uniform, uniform)

    def campaign(total):
        bidder = FirstPriceBidder(Budget(total[None], 200), points=21)
        return play(bidder, world, 200, key=jax.random.PRNGKey(0), keep=False).state["policy"].left.value[0]

    left = np.asarray(eqx.filter_vmap(campaign)(budgets))
    assert (left >= 0).all() and (np.asarray(budgets)[:4] - left[:4] > 0.7 * np.asarray(budgets)[:4]).all()


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: FirstPriceBidder(Budget([0.0], 10)), r"\[0.0\]"),
        (lambda: FirstPriceBidder(Budget([1.0, 1.0], 10)), r"\[1.0, 1.0\]"),
        (lambda: FirstPriceBidder(Budget([1.0], 10), points=1), "points = 1"),
        (lambda: FirstPriceBidder(Budget([1.0], 10), reveal="all"), "'all'"),  # pyright: ignore
        (lambda: FirstPriceTrace(jnp.zeros(3), jnp.zeros(2)), r"\(3,\) and \(2,\)"),
        (lambda: FirstPriceDraws(uniform, uniform).expected(FirstPriceDraws(uniform, uniform).init(), 0.5), "chance"),
        (lambda: first_price([1.0], [0.5], [0.5], 0.0), "rho.*0.0"),
        (lambda: first_price([1.0], [0.5], [0.5, 1.0], 0.1), r"\(1,\) and \(2,\)"),
    ],
)
def test_bad_input_is_named(make, word):
    with pytest.raises(ValueError, match=word):
        make()
