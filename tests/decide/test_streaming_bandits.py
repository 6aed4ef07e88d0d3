"""Single-pass bandits: traces by hand where rewards are certain, what is stored, and the world's batches."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from anabranch.contract import check
from anabranch.decide.arm_stream import ArmStream, PullRegret, Pulls, batch_mean, peak_memory
from anabranch.decide.streaming_bandits import KingOfArms, NaiveEps, Promotion, SinglePass, UniformExploration, example
from anabranch.drive import play

K, T = 60, 60_000.0
POLICIES = {
    "uniform": UniformExploration(K, T),
    "naive": NaiveEps(K, T),
    "king": KingOfArms(K, T),
    "tower": Promotion(K, T),
    "loglog": Promotion(K, T, "loglog"),
    "star": Promotion(K, T, "star"),
    "theory": Promotion(K, 60e14, "theory"),
}


@eqx.filter_jit
def run(policy: SinglePass, means, keys):
    """Regret (runs,), and all actions."""

    def one(means, key):
        world = ArmStream(means, policy.horizon)
        result = play(policy, world, policy.rounds, key=key, meters={"regret": PullRegret(world)})
        return result.scores["regret"], result.ticks.decision.action, result.ticks.feedback.cost[:, 0]

    return jax.vmap(one)(means, keys)


def trace(policy, means):
    """The batches (arm, pulls) of one play, without those of no pulls."""
    regret, action, pulls = run(policy, jnp.array([means], jnp.float32), jax.random.PRNGKey(0)[None])
    arms, pulls = np.asarray(action.arm[0]), np.asarray(pulls[0])
    return list(zip(arms[pulls > 0].tolist(), pulls[pulls > 0].tolist())), float(regret[0])


@pytest.mark.parametrize("name", POLICIES)
def test_all_pulls_are_used_and_no_more_is_stored_than_stated(name):
    policy = POLICIES[name]
    draw = np.random.default_rng(0)
    means = np.stack([draw.uniform(size=K), np.linspace(0.1, 0.9, K)])  # the second is in ascending order
    regret, action, pulls = run(policy, jnp.asarray(means, jnp.float32), jax.random.split(jax.random.PRNGKey(1), 2))
    np.testing.assert_allclose(pulls.sum(-1), policy.horizon, rtol=1e-5)
    gaps = means.max(-1, keepdims=True) - means
    booked = np.take_along_axis(gaps, np.asarray(action.arm), -1) * np.asarray(pulls)
    np.testing.assert_allclose(regret, booked.sum(-1), rtol=1e-3)
    for i in range(2):
        actual = Pulls(action.arm[i], pulls[i])
        assert peak_memory(actual) <= policy.memory
        assert set(np.asarray(action.arm[i])) == set(range(K)), "every arm is read"


def test_peak_memory_by_hand():
    assert peak_memory(Pulls(np.array([0, 1, 2, 3]), np.ones(4))) == 0
    assert peak_memory(Pulls(np.array([0, 1, 2, 0, 2]), np.ones(5))) == 1  # 2 is the last one read
    assert peak_memory(Pulls(np.array([0, 1, 2, 1, 0, 3]), np.ones(6))) == 2
    assert peak_memory(Pulls(np.array([0, 1, 2, 1, 0, 3]), np.array([1, 1, 1, 0, 1, 1]))) == 1


def test_tower_by_hand():
    """k = 8, T/k = 8: batches of 4, then of ⌈1.2 · 4⌉ = 5; six arms a promotion."""
    batches, regret = trace(Promotion(8, 64.0), [0, 0, 1, 0, 0, 0, 0, 1])
    first = [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4), (5, 4), (2, 5)]
    assert batches == first + [(6, 4), (7, 4), (7, 4), (2, 5), (7, 18)]
    assert regret == 24


def test_king_by_hand():
    """k = 4, ε = 1/2: all arms are sampled with ⌈4 ln 4⌉ = 6 pulls, and arm 1 breaks king 0, who has 8.8 pulls."""
    batches, regret = trace(KingOfArms(4, 32.0), [0, 1, 0, 0])
    assert batches == [(0, 6), (1, 4), (1, 5), (1, 6), (2, 4), (2, 6), (1, 1)]
    assert regret == 16


def test_theory_pulls_both_for_each_comparison():
    policy = Promotion(18, 18e15, "theory")  # 1/ε² = 10^10
    (b0, c0), (b1, _) = policy.levels
    assert (c0, b0, b1) == (16, 400 * (np.log(10) + 12), 1600 * (np.log(10) + 48))
    batches, _ = trace(policy, [0.0] * 16 + [1.0, 0.0])
    arms = [arm for arm, _ in batches]
    assert arms[:30] == [arm for i in range(1, 16) for arm in (0, i)]
    assert arms[30:] == [16, 17, 16, 0, 16]  # arm 0 has moved up unopposed; then one more look at both
    assert [round(n / 1e10 / b) for (_, n), b in zip(batches[30:34], [b0, b0, b0, b1])] == [1, 1, 1, 1]


def test_levels():
    assert [Promotion(k, 1e9).memory for k in (6, 7, 500, 5000)] == [1, 2, 4, 5]
    assert Promotion(5000, 1e9, "star").levels == [(1, 4), (4, 4), (16, 4096)]
    assert Promotion(500, 1e9, "loglog").levels == [(1, 10), (np.log(500), np.inf)]
    for form in ("tower", "loglog", "star", "theory"):
        assert Promotion(10**7, 1e12, form).memory <= 17  # no overflow


def test_uniform_exploration_has_the_regret_of_an_independent_one():
    draw = np.random.default_rng(1)
    runs, policy = 200, POLICIES["uniform"]
    means = draw.uniform(size=(runs, K)).astype(np.float32)
    ours = np.asarray(run(policy, means, jax.random.split(jax.random.PRNGKey(2), runs))[0])
    n = int(np.ceil((T / K) ** (2 / 3) * np.log(T) ** (1 / 3)))
    gaps = means.max(1, keepdims=True) - means
    best = draw.binomial(n, means).argmax(1)
    peer = n * gaps.sum(1) + (T - K * n) * gaps[np.arange(runs), best]
    assert abs((ours - peer).mean()) < 3 * (ours - peer).std() / np.sqrt(runs)


def test_batches_are_binomial():
    draws = jax.vmap(batch_mean, (0, None, None))
    keys = jax.random.split(jax.random.PRNGKey(0), 20_000)
    for n, p in ((8, 0.3), (300, 0.02), (300, 0.7)):
        seen = np.bincount(np.rint(n * np.asarray(draws(keys, n, p))).astype(int), minlength=n + 1)
        expected = len(keys) * stats.binom(n, p).pmf(np.arange(n + 1))
        often = expected > 5
        assert stats.chisquare(seen[often], expected[often] * seen[often].sum() / expected[often].sum()).pvalue > 0.001
    many = np.asarray(draws(keys, 4e8, 0.2))
    assert stats.kstest((many - 0.2) / np.sqrt(0.16 / 4e8), "norm").pvalue > 0.001
    for p in (0.0, 1.0):
        for n in (1, 7, 5000, 1e9):
            assert (np.asarray(draws(keys[:50], n, p)) == p).all()
    assert (np.asarray(draws(keys[:5], 0.0, 0.5)) == 0).all()


def test_no_more_pulls_than_arms_plays_the_first():
    assert trace(Promotion(8, 8.0), [0.5] * 8)[0] == [(0, 8)]


def test_contract():
    cell, xs = example()
    report = check(cell, xs, key=jax.random.PRNGKey(0))
    assert report.ok, str(report)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: Promotion(0, 10.0), "k = 0"),
        (lambda: UniformExploration(3, 0.0), "horizon.*0.0"),
        (lambda: Promotion(3, 10.0, "ladder"), "'ladder'"),  # pyright: ignore
        (lambda: ArmStream(jnp.zeros((2, 2)), 10.0), r"\(2, 2\)"),
        (lambda: ArmStream(jnp.array([0.5, 1.5]), 10.0), "1.5"),
        (lambda: ArmStream(jnp.array([0.5]), -1.0), "horizon.*-1.0"),
    ],
)
def test_bad_input_is_named(make, word):
    with pytest.raises(ValueError, match=word):
        make()
