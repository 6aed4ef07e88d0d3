"""Linear bandits: the ridge regression of each arm, and who is better where the context matters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anabranch.cell import Feedback, Maybe
from anabranch.contract import check
from anabranch.decide.base import UCB1, DynamicRegret
from anabranch.decide.baselines import Blind
from anabranch.decide.linear import Context, LinThompson, LinUCB
from anabranch.decide.worlds import LinearSlots
from anabranch.drive import play, play_seeds

K, D = 4, 3
POLICY = LinUCB(K, D)
THETA = np.random.default_rng(0).normal(size=(K, D))
WORLD = LinearSlots(jnp.asarray(THETA / np.linalg.norm(THETA, axis=1, keepdims=True), jnp.float32))


def test_each_arm_holds_the_ridge_regression_of_its_pulls_and_its_bound():
    result = play(POLICY, WORLD, 300, key=jax.random.PRNGKey(0))
    x = np.asarray(result.ticks.x.features, float)
    arm, reward = np.asarray(result.ticks.decision.action), np.asarray(result.ticks.feedback.reward, float)
    inverse, weights = (np.asarray(leaf) for leaf in result.state["policy"].stats)
    for i in range(K):
        mine = x[arm == i]
        A = np.eye(D) + mine.T @ mine
        np.testing.assert_allclose(inverse[i], np.linalg.inv(A), atol=1e-5)
        np.testing.assert_allclose(weights[i], np.linalg.solve(A, mine.T @ reward[arm == i]), atol=1e-4)
    now = np.array([1.0, -0.5, 0.2])
    bound = weights @ now + 0.5 * np.sqrt(np.einsum("i,kij,j->k", now, inverse, now))
    for eligible in (np.ones(K, bool), np.arange(K) != bound.argmax()):
        decision = POLICY.act(result.state["policy"], Context(jnp.asarray(now), jnp.asarray(eligible)))[1]
        assert int(decision.action) == np.where(eligible, bound, -np.inf).argmax()


@pytest.mark.parametrize("policy", [POLICY, LinThompson(K, D)], ids=lambda p: type(p).__name__)
def test_a_decision_for_no_arm_teaches_nothing(policy):
    x = Context(jnp.ones(D), jnp.zeros(K, bool))
    state, decision = policy.act(policy.init(), x)
    assert int(decision.action) == -1
    learned = policy.learn(state, x, decision, Feedback(jnp.array(1.0)))
    jax.tree.map(np.testing.assert_array_equal, learned.stats, state.stats)


def test_contexts_are_worth_looking_at():
    keys = jax.random.split(jax.random.PRNGKey(0), 4)
    regret = lambda policy: play_seeds(policy, WORLD, 2000, keys, meters={"r": DynamicRegret(WORLD)}).scores["r"]
    blind = regret(Blind(UCB1(K)))
    for policy in (POLICY, LinThompson(K, D)):
        assert float(regret(policy).mean()) < 0.3 * float(blind.mean())


def test_contract():
    ticks = play(POLICY, WORLD, 64, key=jax.random.PRNGKey(1)).ticks
    last = jax.tree.map(lambda leaf: jnp.roll(leaf, 1, axis=0), ticks)
    never = jnp.zeros(64, bool)
    feedback = Feedback(last.feedback.reward, terminal=never, truncated=never)
    report = check(POLICY, (ticks.x, Maybe((last.x, last.decision, feedback), jnp.arange(64) > 0)))
    assert report.ok, str(report)


def test_bad_input():
    with pytest.raises(ValueError, match="dim = 0"):
        LinUCB(3, 0)
    with pytest.raises(ValueError, match="at most 1 long"):
        LinearSlots(jnp.ones((2, 2)))
