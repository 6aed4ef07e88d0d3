"""The template against plain primal-dual bandits with knapsacks, by hand, and under adversaries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anabranch.cell import Decision, Feedback, noise
from anabranch.contract import check
from anabranch.decide.base import Static, inputs
from anabranch.decide.budget import Budget, BudgetedTrace, Spent
from anabranch.decide.minimizers import Exp3, Hedge
from anabranch.decide.replenishable_knapsacks import BwRK, example, token_bucket
from anabranch.drive import play


def random_world(reveal, rounds=400, seed=0):
    draw = np.random.default_rng(seed)
    rewards = draw.uniform(size=(rounds, 3)).astype(np.float32) * [0.0, 1.0, 0.5]
    costs = draw.uniform(size=(rounds, 3, 1)).astype(np.float32)
    costs[:, 0] = 0
    return BudgetedTrace(rewards, costs, reveal=reveal)


@pytest.mark.parametrize("reveal", ["full", "bandit"])
def test_without_refills_it_is_primal_dual_bandits_with_knapsacks(reveal):
    """Written again in NumPy, in float64: every action, with the same uniforms."""
    rounds, total = 400, 60.0
    world, kind = random_world(reveal), {"full": Hedge, "bandit": Exp3}[reveal]
    key = jax.random.PRNGKey(3)
    result = play(BwRK(kind(3), Budget([total], rounds)), world, rounds, key=key)
    primal_key = result.state["policy"].primal.key
    uniforms = np.asarray(jax.vmap(lambda t: jax.random.uniform(noise(primal_key, t)))(jnp.arange(rounds)))

    rho = total / rounds
    losses, squares, lam, left, asked = np.zeros(3), 1.0, 0.0, total, 0
    for t in range(rounds):
        f, c = np.asarray(world.rewards[t], float), np.asarray(world.costs[t, :, 0], float)
        rate = np.sqrt(np.log(3) / squares / (1 if reveal == "full" else 3))
        p = np.exp(-rate * losses)
        p /= p.sum()
        play_on = left >= 1
        arm = int(np.searchsorted(np.cumsum(p), uniforms[asked], side="right")) if play_on else 0
        assert arm == int(result.ticks.decision.action[t]), f"round {t}"
        np.testing.assert_allclose(result.ticks.decision.aux.lam[t, 0], lam, atol=1e-4)
        if play_on:
            asked += 1
            lagrangian = f - lam * c
            if reveal == "full":
                losses, squares = losses - lagrangian, squares + np.ptp(lagrangian) ** 2
            else:
                most = 1 + 2 * lam  # of f + λ (1 - c)
                losses[arm] += (most - lagrangian[arm] - lam) / (p[arm] + rate * most / 2)
                squares += most**2
            losses -= losses.min()
        lam = np.clip(lam + (c[arm] - rho) / rho / np.sqrt(rounds), 0, 1 / rho)
        left -= c[arm]
    assert reveal == "full" or asked < rounds, "the budget runs out on the way"
    np.testing.assert_allclose(result.state["policy"].left.value, left, atol=1e-3)


def test_plays_and_waits_by_hand():
    """B = 3, an arm of cost 1, the void action refills 1/2: three rounds of it, then every third."""
    rounds = 12
    world = BudgetedTrace(np.tile([0.0, 1.0], (rounds, 1)), np.tile([[-0.5], [1.0]], (rounds, 1, 1)))
    policy = BwRK(Static([0.0, 1.0]), Budget([3.0], rounds), beta=0.5)
    result = play(policy, world, rounds, key=jax.random.PRNGKey(0), meters={"spent": Spent(policy.budget)})
    assert result.ticks.decision.action.tolist() == [1, 1, 1, 0, 0, 1, 0, 0, 1, 0, 0, 1]
    assert result.ticks.decision.aux.primal.tolist() == [bool(a) for a in result.ticks.decision.action]
    assert result.scores["spent"].lowest.tolist() == [0.0]
    np.testing.assert_allclose(policy.alpha, 0.75 / 1.5)


@pytest.mark.parametrize("kind", [Hedge, Exp3])
def test_nothing_ever_falls_below_zero(kind):
    """Two resources, costs of both signs and as large as they may be, budgets that do not last."""
    rounds, draw = 500, np.random.default_rng(4)
    costs = np.sign(draw.normal(0.3, 1, (rounds, 3, 2))).astype(np.float32)
    costs[:, 0] = -0.1
    world = BudgetedTrace(draw.uniform(size=(rounds, 3)), costs, reveal="full")
    policy = BwRK(kind(3), Budget([4.0, 4.0], rounds), beta=0.1)
    result = play(policy, world, rounds, key=jax.random.PRNGKey(0), meters={"spent": Spent(policy.budget)})
    spent, end = result.scores["spent"], result.state["policy"]
    assert (spent.lowest >= 0).all() and (spent.lowest < 1).any()
    np.testing.assert_allclose(spent.left, end.left.value)
    lam = np.asarray(result.ticks.decision.aux.lam)
    assert (lam >= 0).all() and (lam.sum(-1) <= 1 / float(policy.nu) + 1e-4).all() and lam.max() > 0


def test_the_primal_learns_only_what_it_chose():
    policy = BwRK(Exp3(2), Budget([0.5], 10), beta=0.1)  # never enough to ask
    world = BudgetedTrace(np.tile([0.0, 1.0], (5, 1)), np.tile([[-0.1], [1.0]], (5, 1, 1)))
    end = play(policy, world, 5, key=jax.random.PRNGKey(0)).state["policy"]
    assert int(end.primal.t) == 0 and end.primal.losses.tolist() == [0, 0] and float(end.left.value[0]) == 1.0


def test_out_of_range_is_clipped_counted_and_paid():
    policy = BwRK(Hedge(2), Budget([10.0], 10))
    state, decision = policy.act(policy.init(), jnp.ones(2, bool))
    told = Feedback(
        jnp.array(3.0), jnp.array([2.5]), info={"rewards": jnp.array([0.0, 3.0]), "costs": jnp.zeros((2, 1))}
    )
    state = policy.learn(state, jnp.ones(2, bool), Decision(*decision), told)
    assert int(state.clipped) == 1 and state.left.value.tolist() == [7.5]
    assert float(state.primal.squares) == 2.0  # a range of 1, not of 3
    np.testing.assert_allclose(state.lam, 0.0, atol=1e-6)  # step 1/√10 times clip(2.5) - 1


def test_token_bucket_by_hand():
    world, beta = token_bucket([0, 10, 6], [0, 4, 2], refill=2.0, shares=(0.0, 1.0))
    assert beta == 0.25
    np.testing.assert_allclose(world.costs[:, :, 0], [[-0.25, -0.25], [-0.25, 1.0], [-0.25, 0.5]])
    np.testing.assert_allclose(world.rewards, [[0, 0], [0, 1], [0, 0.5]])


def test_contract():
    cell, xs = example()
    report = check(cell, xs, key=jax.random.PRNGKey(0))
    assert report.ok, str(report)


def test_inputs_need_ticks():
    with pytest.raises(ValueError, match="keep=True"):
        inputs(None)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: BwRK(Hedge(2), Budget([1.0], 10), beta=-0.5), "beta.*-0.5"),
        (lambda: BwRK(Hedge(2), Budget([0.0], 10)), r"total = \[0.0\]"),
        (lambda: token_bucket([1.0], [1.0], refill=2.0), "refill = 2.0"),
        (lambda: token_bucket([3.0], [1.0], refill=2.0, shares=(0.5, 1.0)), "0.5"),
    ],
)
def test_bad_input_is_named(make, word):
    with pytest.raises(ValueError, match=word):
        make()
