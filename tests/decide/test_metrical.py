"""Metrical task systems: what a sequence costs, the best one by brute force, couplings and transport."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linprog

from anabranch.decide.metrical import MTS, Competitive, Move, couple, dynamic_optimum, transport
from anabranch.decide.mixing_predictions import Cheapest
from anabranch.drive import play


def line(steps, n, seed=0):
    """Predictors at random places on a line, all from 0, with random costs."""
    draw = np.random.default_rng(seed)
    places = draw.uniform(size=(steps, n))
    before = np.concatenate([np.zeros((1, n)), places[:-1]])
    return MTS(draw.uniform(size=(steps, n)), np.abs(before[:, :, None] - places[:, None]))


def test_optimum_equals_brute_force():
    steps, n = 6, 3
    for seed in range(3):
        env = line(steps, n, seed)
        service, move = np.asarray(env.service), np.asarray(env.move)
        best = np.full(steps, np.inf)
        for way in itertools.product(range(n), repeat=steps):
            before = (way[0], *way[:-1])
            cost = sum(service[t, j] + move[t, i, j] for t, (i, j) in enumerate(zip(before, way)))
            changes = sum(i != j for i, j in zip(before, way))
            best[changes] = min(best[changes], cost)
        for m in range(steps):
            np.testing.assert_allclose(dynamic_optimum(env, m), best[: m + 1].min(), rtol=1e-5)
        np.testing.assert_allclose(dynamic_optimum(env), best.min(), rtol=1e-5)


def test_meter_divides_by_the_optimum():
    env = line(20, 3)
    result = play(Cheapest(3), env, 20, key=jax.random.PRNGKey(0), meters={"ratio": Competitive(env, 2)})
    paid = -float(result.ticks.feedback.reward.sum())
    np.testing.assert_allclose(result.scores["ratio"], paid / float(dynamic_optimum(env, 2)), rtol=1e-5)
    assert bool(result.ticks.feedback.truncated[-1]) and not result.ticks.feedback.truncated[:-1].any()


def test_accounts_by_hand():
    move = [[[1.0, 2.0], [1.0, 2.0]], [[3.0, 4.0], [5.0, 6.0]]]
    env = MTS([[10.0, 20.0], [30.0, 40.0]], move, astray=[[100.0, 200.0], [300.0, 400.0]]).asked()
    state = env.init()
    state, first = env.step(state, Move(jnp.array(1), jnp.array(1)))
    assert float(first.reward) == -22.0 and float(first.info) == 22.0
    after, moved = env.step(state, Move(jnp.array(0), jnp.array(0)))
    assert float(moved.reward) == -35.0 and bool(moved.truncated) and int(after.t) == 0
    # 1 is asked, which pays 6 + 40; we serve from where 1 was, and are then with 0.
    _, astray = env.step(state, Move(jnp.array(0), jnp.array(1)))
    assert float(astray.reward) == -(5.0 + 400.0) and float(astray.info) == 46.0
    assert env.observe(state) == ()


def test_coupling_moves_as_rarely_as_can_be():
    old, new = jnp.array([0.5, 0.3, 0.2, 0.0]), jnp.array([0.2, 0.4, 0.2, 0.2])
    n = 100_000
    keys = jax.random.split(jax.random.PRNGKey(0), n)
    i = jax.random.categorical(jax.random.PRNGKey(1), jnp.log(old), shape=(n,))
    j = jax.vmap(lambda i, key: couple(old, new, i, key))(i, keys)
    share = np.bincount(np.asarray(j), minlength=4) / n
    np.testing.assert_allclose(share, new, atol=3 * 0.5 / n**0.5)
    moved = 0.5 * float(jnp.abs(new - old).sum())
    assert abs(float((i != j).mean()) - moved) < 3 * (moved * (1 - moved) / n) ** 0.5


def test_transport_is_optimal():
    draw, n = np.random.default_rng(0), 5
    run = jax.jit(transport)
    sums = np.concatenate([np.kron(np.eye(n), np.ones(n)), np.kron(np.ones(n), np.eye(n))])
    for trial in range(30):
        a, b = draw.dirichlet(np.ones(n), 2)
        if trial % 3 == 0:  # distributions with zeros
            a[draw.integers(n)] = 0
            a /= a.sum()
        cost = draw.uniform(size=(n, n)) if trial % 2 else draw.integers(0, 3, (n, n)).astype(float)
        best = linprog(cost.ravel(), A_eq=sums, b_eq=np.concatenate([a, b])).fun
        plan = np.asarray(run(*(jnp.asarray(v, jnp.float32) for v in (a, b, cost))))
        assert (plan >= 0).all()
        np.testing.assert_allclose(np.concatenate([plan.sum(1), plan.sum(0)]), np.concatenate([a, b]), atol=1e-5)
        np.testing.assert_allclose((plan * cost).sum(), best, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: MTS(np.ones(3), np.ones((3, 2, 2))), r"service.*\(3,\)"),
        (lambda: MTS(np.ones((3, 2)), np.ones((3, 2))), r"move.*\(3, 2, 2\).*\(3, 2\)"),
        (lambda: MTS(np.ones((3, 2)), np.ones((3, 2, 2)), np.ones(3)), r"astray.*\(3,\)"),
        (lambda: MTS(np.full((3, 2), -1.0), np.ones((3, 2, 2))), "service.*-1.0"),
        (lambda: MTS(np.ones((3, 2)), np.full((3, 2, 2), np.nan)), "move.*nan"),
        (lambda: MTS(np.ones((3, 2)), np.ones((3, 2, 2)), reveal="some"), "reveal.*some"),
        (lambda: dynamic_optimum(MTS(np.ones((3, 2)), np.ones((3, 2, 2))), -1), "switches.*-1"),
    ],
)
def test_bad_input_is_named(make, word):
    with pytest.raises(ValueError, match=word):
        make()
