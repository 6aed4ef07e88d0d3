"""The plain bandits, meters and replayed worlds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mabwiser.mab import MAB, LearningPolicy
from scipy import stats

from anabranch.cell import Feedback, Maybe
from anabranch.decide.base import (
    UCB1,
    CumReward,
    DynamicRegret,
    EpsilonGreedy,
    Exp3IX,
    Regret,
    RoundRobin,
    Static,
    Thompson,
    TraceEnv,
    beta,
)
from anabranch.decide.payment_routing import DiscountedThompson, DiscountedUCB, SlidingWindowUCB
from anabranch.drive import play

K = 4
POLICIES = {
    "UCB1": UCB1(K),
    "Thompson": Thompson(K),
    "EpsilonGreedy": EpsilonGreedy(K, 0.3, 0.01),
    "RoundRobin": RoundRobin(K),
    "Static": Static(jnp.array([0.3, 0.9, 0.1, 0.5])),
    "Exp3IX": Exp3IX(K),
    "DiscountedUCB": DiscountedUCB(K),
    "SlidingWindowUCB": SlidingWindowUCB(K, window=30),
    "DiscountedThompson": DiscountedThompson(K),
}


def world(steps=300, gap=0.0):
    rng = np.random.default_rng(3)
    rewards = (rng.uniform(size=(steps, K)) < np.array([0.5, 0.6, 0.7, 0.5 + gap])).astype(np.float32)
    eligible = rng.uniform(size=(steps, K)) < 0.6
    eligible[10] = eligible[20] = False
    return TraceEnv(rewards, eligible)


@pytest.mark.parametrize("name", POLICIES)
def test_only_eligible_arms_and_none_when_there_is_none(name):
    env = world()
    ticks = play(POLICIES[name], env, 300, key=jax.random.PRNGKey(1)).ticks
    arms, eligible = np.asarray(ticks.decision.action), np.asarray(env.xs)
    some = eligible.any(1)
    assert (arms[~some] == -1).all()
    assert eligible[some, arms[some]].all()
    assert not np.isnan(np.asarray(ticks.decision.logp)).any()
    assert (np.asarray(ticks.feedback.reward)[~some] == 0).all()


@pytest.mark.parametrize("name", POLICIES)
def test_a_decision_for_no_arm_teaches_nothing(name):
    policy = POLICIES[name]
    state = policy.init(key=jax.random.PRNGKey(0))
    none = jnp.zeros(K, bool)
    acted, decision = policy.act(state, none)
    learned = policy.learn(acted, none, decision, Feedback(jnp.array(1.0)))
    jax.tree.map(np.testing.assert_array_equal, learned.stats, state.stats)


@pytest.mark.parametrize("name", ["Thompson", "Exp3IX"])
def test_contract(name):
    from anabranch.contract import check

    policy, env = POLICIES[name], world(64)
    ticks = play(policy, env, 64, key=jax.random.PRNGKey(1)).ticks
    last = jax.tree.map(lambda a: jnp.concatenate([a[:1], a[:-1]]), ticks)
    xs = (
        ticks.x,
        Maybe((last.x, last.decision, Feedback(last.feedback.reward, (), (), *_flags(64))), jnp.arange(64) > 0),
    )
    report = check(policy, xs, key=jax.random.PRNGKey(0))
    assert report.ok, str(report)


def _flags(n):
    return jnp.zeros(n, bool), jnp.zeros(n, bool)


def test_ties_are_broken_evenly():
    first = jax.vmap(lambda key: UCB1(K).act(UCB1(K).init(key=key), jnp.ones(K, bool))[1].action)
    counts = np.bincount(np.asarray(first(jax.random.split(jax.random.PRNGKey(0), 2000))), minlength=K)
    assert stats.chisquare(counts).pvalue > 0.001


@pytest.mark.parametrize("policy", [UCB1(3), DiscountedUCB(3, bonus=2**0.5, gamma=1.0)], ids=["UCB1", "D-UCB, γ = 1"])
def test_same_choices_as_mabwiser(policy):
    rewards = np.random.default_rng(0).uniform(size=(400, 3)).astype(np.float32) * [0.9, 1.0, 0.95]
    ticks = play(policy, TraceEnv(rewards), 400, key=jax.random.PRNGKey(5)).ticks
    arms = np.asarray(ticks.decision.action)
    assert sorted(arms[:3]) == [0, 1, 2]  # the order is a tie, broken at random
    peer = MAB([0, 1, 2], LearningPolicy.UCB1(alpha=1))
    peer.fit(arms[:3], rewards[np.arange(3), arms[:3]])
    for t in range(3, 400):
        arm = peer.predict()
        assert arm == arms[t], f"round {t}"
        peer.partial_fit([arm], [rewards[t, arm]])


def test_beta_variates():
    a, b = jnp.array([1.0, 1.0, 3.5, 80.0]), jnp.array([1.0, 7.0, 2.0, 9.0])
    draws = np.asarray(jax.vmap(lambda key: beta(key, a, b))(jax.random.split(jax.random.PRNGKey(0), 5000)))
    for i in range(4):
        assert stats.kstest(draws[:, i], stats.beta(a[i], b[i]).cdf).pvalue > 0.001


def test_thompson_follows_its_posterior():
    policy = Thompson(2)
    state = policy.init()
    state = state._replace(stats=state.stats._replace(n=jnp.array([9.0, 4.0]), s=jnp.array([6.0, 3.0])))
    act = jax.vmap(lambda key: policy.act(state._replace(key=key), jnp.ones(2, bool))[1].action)
    share = float(act(jax.random.split(jax.random.PRNGKey(0), 8000)).mean())
    p = np.linspace(0, 1, 4001)
    exact = np.trapezoid(stats.beta(4, 2).pdf(p) * stats.beta(7, 4).cdf(p), p)  # P(arm 1 beats arm 0)
    assert abs(share - exact) < 4 * np.sqrt(exact * (1 - exact) / 8000)


def test_exp3ix_by_hand():
    policy = Exp3IX(2)
    state = policy.init(key=jax.random.PRNGKey(0))
    both = jnp.ones(2, bool)
    state, decision = policy.act(state, both)
    np.testing.assert_allclose(decision.logp, np.log(0.5), rtol=1e-6)
    state = policy.learn(state, both, decision, Feedback(jnp.array(0.25)))
    eta = np.sqrt(2 * np.log(2) / 2)
    losses = np.zeros(2)
    losses[decision.action] = 0.75 / (0.5 + eta / 2)
    np.testing.assert_allclose(state.stats, losses, rtol=1e-6)
    _, second = policy.act(state, both)
    weights = np.exp(-np.sqrt(2 * np.log(2) / 4) * losses)
    np.testing.assert_allclose(np.exp(second.logp), weights[second.action] / weights.sum(), rtol=1e-5)


def test_epsilon_greedy_explores_as_often_as_it_says():
    policy = EpsilonGreedy(2, epsilon=0.4)
    state = policy.init()
    state = state._replace(stats=state.stats._replace(n=jnp.array([5.0, 5.0]), s=jnp.array([4.0, 1.0])))
    act = jax.vmap(lambda key: policy.act(state._replace(key=key), jnp.ones(2, bool))[1].action)
    other = float(act(jax.random.split(jax.random.PRNGKey(0), 8000)).mean())
    assert abs(other - 0.2) < 0.02


def test_round_robin_and_static():
    full = TraceEnv(np.zeros((8, K), np.float32))
    arms = play(RoundRobin(K), full, 8, key=jax.random.PRNGKey(0)).ticks.decision.action
    assert arms.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    _, decision = POLICIES["Static"].act(POLICIES["Static"].init(), jnp.array([True, False, True, True]))
    assert int(decision.action) == 3


def test_meters_by_hand():
    rewards = np.array([[1.0, 0.0], [0.0, 0.5], [0.2, 0.9]], np.float32)
    env = TraceEnv(rewards)
    meters = {"sum": CumReward(), "late": CumReward(1), "fixed": Regret(env), "dynamic": DynamicRegret(env)}
    result = play(RoundRobin(2), env, 3, key=jax.random.PRNGKey(0), meters=meters)  # earns 1.0, 0.5, 0.2
    assert {k: round(float(v), 5) for k, v in result.scores.items()} == {
        "sum": 1.7,
        "late": 0.7,
        "fixed": -0.3,  # the best fixed arm is the second: 1.4
        "dynamic": 0.7,
    }


def test_trace_reveals_and_starts_again():
    env = TraceEnv(np.array([[1.0, 2.0], [3.0, 4.0]]), reveal="full")
    state, feedback = env.step(env.init(), jnp.array(1))
    assert float(feedback.reward) == 2.0 and feedback.info["rewards"].tolist() == [1.0, 2.0]
    assert not feedback.truncated
    state, feedback = env.step(state, jnp.array(0))
    assert float(feedback.reward) == 3.0 and feedback.truncated and int(state.t) == 0


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: UCB1(0), "k = 0"),
        (lambda: EpsilonGreedy(2, 1.5), "1.5"),
        (lambda: EpsilonGreedy(2, 0.5, -1.0), "-1.0"),
        (lambda: Static(jnp.zeros((2, 2))), r"\(2, 2\)"),
        (lambda: TraceEnv(np.zeros(3)), r"\(3,\)"),
        (lambda: TraceEnv(np.zeros((3, 2)), np.ones((2, 2), bool)), "3 rows"),
        (lambda: TraceEnv(np.zeros((3, 2)), reveal="all"), "'all'"),  # pyright: ignore
    ],
)
def test_bad_input_is_named(make, word):
    with pytest.raises(ValueError, match=word):
        make()


def test_discounted_counts_converge():
    policy = DiscountedUCB(2, gamma=0.999)
    result = play(policy, TraceEnv(np.array([[0.0, 1.0]])), 100_000, key=jax.random.PRNGKey(0), keep=False)
    n = np.asarray(result.state["policy"].stats.n)
    np.testing.assert_allclose(n.sum(), 1000, rtol=1e-3)
