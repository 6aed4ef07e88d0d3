"""Rules that pick: against plain lists, against known ratios, and as an attack on a model."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anabranch.contract import check
from anabranch.decide.base import CumReward, TraceEnv
from anabranch.decide.virtual_plus import (
    AttackStream,
    Optimistic,
    RandomPicks,
    SingleRef,
    Virtual,
    VirtualPlus,
    competitive_ratio,
    example,
    fgsm,
    loss,
    pgd,
    picks,
)
from anabranch.drive import play_seeds

N, K, T = 40, 4, 12


def plain(rule, values, k, t, exhaust=False, r=None):
    """The rules as lists of (value, index), after the structure of the official code, with its two slips put right:
    the sample is the first t items and not t + 1, and `Optimistic` gives up one reference a pick and not two."""
    references, picked = [], []
    for i, value in enumerate(values):
        if i < t:
            references = sorted([*references, (value, i)], reverse=True)[:k]
            continue
        room = len(picked) < k
        smallest, index = references[-1]
        if exhaust and room and len(values) - i <= k - len(picked):
            picked.append(i)
        elif rule is VirtualPlus and room and value > smallest:
            picked.append(i)
            references = sorted([*references, (value, i)], reverse=True)[:k]
        elif rule is Virtual and value > smallest:
            if index < t:
                picked.append(i)
            references = sorted([*references, (value, i)], reverse=True)[:k]
        elif rule is Optimistic and room and value > smallest:
            picked.append(i)
            references = references[:-1] or references
        elif rule is SingleRef and room and value > references[r - 1][0]:
            picked.append(i)
    return picked


@pytest.mark.parametrize("exhaust", [False, True])
@pytest.mark.parametrize("rule", [VirtualPlus, Virtual, Optimistic, SingleRef])
def test_equals_lists(rule, exhaust):
    r = {"r": 2} if rule is SingleRef else {}
    picker = rule(N, K, T, exhaust=exhaust, **r)
    values = np.random.default_rng(0).normal(size=(1000, N)).astype(np.float32)
    ours = jax.jit(jax.vmap(lambda v: picks(picker, v)))(values)
    for row, picked in zip(values, np.asarray(ours)):
        assert np.flatnonzero(picked).tolist() == plain(rule, row.tolist(), K, T, exhaust, **r)
    assert not np.asarray(ours)[:, :T].any() and (np.asarray(ours).sum(1) <= K).all()
    if exhaust and rule is not Virtual:
        assert (np.asarray(ours).sum(1) == K).all()


@pytest.mark.parametrize("rule", [VirtualPlus, Virtual, Optimistic, SingleRef])
def test_one_of_n_is_the_classical_secretary(rule):
    """The best of n is picked with probability t/n Σ_{j ≥ t} 1/j, j from t to n - 1."""
    orders = 20_000
    values = jax.random.uniform(jax.random.PRNGKey(0), (orders, N))
    picker = rule(N, 1, 15)
    ratio = jax.jit(jax.vmap(lambda v: competitive_ratio(picks(picker, v), v, 1)))(values).mean()
    p = 15 / N * sum(1 / j for j in range(15, N))
    assert abs(float(ratio) - p) < 4 * math.sqrt(p * (1 - p) / orders)


def test_random_picks_are_all_choices():
    picker = RandomPicks(6, 2, 3)
    keys = jax.random.split(jax.random.PRNGKey(0), 15_000)
    picked = np.asarray(jax.jit(jax.vmap(lambda key: picks(picker, jnp.zeros(6), key)))(keys))
    assert (picked.sum(1) == 2).all()
    _, counts = np.unique(picked, axis=0, return_counts=True)
    assert len(counts) == 15
    np.testing.assert_allclose(counts, 1000, atol=4 * math.sqrt(1000))


def test_ties_and_nan_are_not_picked():
    values = jnp.array([1.0, 1.0, 1.0, jnp.nan, 1.0, 2.0, jnp.nan, 1.0])
    picker = VirtualPlus(8, 2, 3)
    assert np.flatnonzero(picks(picker, values)).tolist() == [5]
    state = picker.init()
    for value in values:
        state, _ = picker.act(state, value)
    assert int(state.bad) == 2 and state.val.tolist() == [2.0, 1.0] and state.idx.tolist() == [5, 0]
    for value in (5.0, 6.0):  # the stream is longer than it was said to be
        state, decision = picker.act(state, jnp.array(value))
        assert not decision.action


def test_knapsack_in_a_closed_loop():
    """The reward of a pick is its true value: what is earned, over the k largest."""
    draw = np.random.default_rng(0)
    truth = draw.uniform(size=N).astype(np.float32)
    env = TraceEnv(np.stack([np.zeros(N), truth], axis=1), xs=truth)
    keys = jax.random.split(jax.random.PRNGKey(0), 3)
    earned = play_seeds(VirtualPlus(N, K, T), env, N, keys, meters={"value": CumReward()}).scores["value"]
    picked = plain(VirtualPlus, truth.tolist(), K, T)
    np.testing.assert_allclose(earned, truth[picked].sum(), rtol=1e-6)


def linear(w):
    return eqx.nn.Lambda(lambda x: w @ x.ravel())


def test_attacks_of_a_linear_model():
    """Of two classes the gradient has the sign of w_other - w_y everywhere."""
    w = jnp.array([[1.0, -2.0, 0.5], [0.5, 1.0, 0.5]])
    x, y, key = jnp.array([0.5, 0.95, 0.3]), jnp.array(0), jax.random.PRNGKey(0)
    moved = fgsm(0.1)(linear(w), x, y, key)
    np.testing.assert_allclose(moved, [0.4, 1.0, 0.3], atol=1e-6)
    strong = pgd(0.1)(linear(w), x, y, key)
    np.testing.assert_allclose(strong[:2], [0.4, 1.0], atol=1e-6)
    assert abs(float(strong[2]) - 0.3) <= 0.1
    assert float(loss(linear(w), moved, y)) > float(loss(linear(w), x, y))


def test_attack_stream():
    """A block equals steps; what is picked is what the rule picks of the losses."""
    draw = np.random.default_rng(0)
    model = linear(jnp.asarray(draw.normal(size=(3, 4)), jnp.float32))
    xs = jnp.asarray(draw.uniform(size=(N, 2, 2)), jnp.float32), jnp.asarray(draw.integers(0, 3, N))
    cell = AttackStream(model, VirtualPlus(N, K, T), pgd(0.1, steps=3))
    key = jax.random.PRNGKey(1)
    start = cell.init(key=key)
    end, out = jax.jit(cell.advance)(start, xs)
    after, steps = jax.lax.scan(lambda state, x: cell.step(state, x), start, xs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), (end, out), (after, steps))
    assert float(jnp.abs(out.x - xs[0]).max()) <= 0.1 + 1e-6
    np.testing.assert_array_equal(out.pick, picks(cell.picker, out.value))


@pytest.mark.parametrize("rule", [VirtualPlus, RandomPicks])
def test_contract(rule):
    report = check(rule(60, 3), example()[1], key=jax.random.PRNGKey(0))
    assert report.ok, str(report)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: VirtualPlus(10, 0, 3), "k = 0"),
        (lambda: VirtualPlus(10, 4, 3), "k = 4, t = 3"),
        (lambda: Virtual(10, 2, 10), "t = 10, n = 10"),
        (lambda: SingleRef(100, 7), "k = 7"),
        (lambda: SingleRef(100, 7, 20, r=8), "r .*8"),
        (lambda: picks(VirtualPlus(10, 2, 3), jnp.zeros(9)), r"10 .*\(9,\)"),
    ],
)
def test_bad_input_is_named(make, word):
    with pytest.raises(ValueError, match=word):
        make()
