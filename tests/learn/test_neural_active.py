import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anabranch import Event, Feedback, Maybe
from anabranch.contract import check
from anabranch.learn.neural_active import NeurOnalP, NeurOnalS, Pair, embed, example, margin

D, K = 5, 3
KEY = jax.random.PRNGKey(0)
PAIR = Pair(D, K, 20, m=16, batch=8, steps=3)


def rows(T, seed=0):
    """Rows of unit norm in three classes, by the greatest of the first three features."""
    x = np.random.default_rng(seed).normal(size=(T, D)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return x, x[:, :K].argmax(1).astype(np.int32)


def events(x, y, valid=True):
    return Event(jnp.asarray(x), Maybe(jnp.asarray(y), jnp.full(len(y), valid)), jnp.ones(len(y)))


@eqx.filter_jit
def run(cell, xs, key=KEY):
    return cell.advance(cell.init(key=key), xs)


def by_the_paper(state, x):
    """f1, φ and f in NumPy; the gradient by a central difference in float64."""
    w1, wl = (np.asarray(w, np.float64) for w in state.exploit)
    v1, vl = (np.asarray(w, np.float64) for w in state.explore)
    m = len(w1)
    f1 = lambda wl: np.sqrt(m) * wl @ np.maximum(w1 @ x, 0)
    gradient = np.zeros_like(wl)
    for i in np.ndindex(wl.shape):
        up, down = wl.copy(), wl.copy()
        up[i], down[i] = wl[i] + 1e-4, wl[i] - 1e-4
        gradient[i] = (f1(up) - f1(down)).sum() / 2e-4
    phi = np.concatenate([np.maximum(w1 @ x, 0), gradient.ravel()])
    phi /= np.linalg.norm(phi)
    return f1(wl) / np.sqrt(m), phi, f1(wl) / np.sqrt(m) + vl @ np.maximum(v1 @ phi, 0)


def test_contract():
    cell, xs = example()
    report = check(cell, xs, key=KEY)
    assert report.ok, str(report)


def test_scores_are_those_of_the_paper():
    state = PAIR.init(KEY)
    x = rows(1)[0][0]
    f1, phi, f = by_the_paper(state, x.astype(np.float64))
    hidden = jax.nn.relu(state.exploit[0] @ x)
    np.testing.assert_allclose(state.exploit[1] @ hidden, f1, atol=1e-5)
    np.testing.assert_allclose(embed(hidden, K), phi, atol=1e-5)
    np.testing.assert_allclose(PAIR.losses(state, jnp.asarray(x)), f, atol=1e-5)
    assert not np.asarray(embed(jnp.zeros(16), K)).any()  # zero, not NaN


def test_one_step_by_hand():
    """The gradients of L1 and L2, with f1 constant in L2; Adam first steps by the rate, against their sign."""
    pair = Pair(D, K, 4, m=16, batch=8, steps=1)
    state, (x, y) = pair.init(KEY), rows(1)
    x, wrong = x[0].astype(np.float64), 1.0 - np.eye(K)[y[0]]
    f1, phi, f = by_the_paper(state, x)
    w1, wl = (np.asarray(w, np.float64) for w in state.exploit)
    v1, vl = (np.asarray(w, np.float64) for w in state.explore)
    e1, e2 = f1 - wrong, f - wrong  # f2 - (wrong - f1) = f - wrong
    grads = (
        (np.outer((wl.T @ e1) * (w1 @ x > 0), x), np.outer(e1, np.maximum(w1 @ x, 0))),
        (np.outer((vl.T @ e2) * (v1 @ phi > 0), phi), np.outer(e2, np.maximum(v1 @ phi, 0))),
    )
    found = jax.grad(pair.loss)((state.exploit, state.explore), x[None].astype(np.float32), y[:1], jnp.ones(1))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, grads)
    learned = pair.learn(state, jnp.asarray(x, jnp.float32), jnp.int32(y[0]))
    for before, after, g in zip(state.exploit, learned.exploit, grads[0]):
        sure = np.abs(g) > 1e-4
        np.testing.assert_allclose(np.asarray(after - before)[sure], -1e-3 * np.sign(g[sure]), rtol=2e-3)
    assert learned.known == 1 and learned.y[0] == y[0]


def test_query_follows_margin_and_confidence():
    cell = NeurOnalS(D, K, budget=20, horizon=100, gamma=0.05, S=2.0, delta=0.2, pair=PAIR)
    t = 7
    beta = np.sqrt(K * 2.0**2 / t) + np.sqrt(2 * np.log(3 * 100 / 0.2) / t)
    assert float(cell.beta(jnp.int32(t))) == pytest.approx(beta, rel=1e-6)
    assert float(margin(jnp.array([0.7, 0.1, 0.3]))) == pytest.approx(0.2)
    state = cell.init(key=KEY)._replace(t=jnp.int32(t - 1))
    x = jnp.asarray(rows(1)[0][0])
    gap = float(margin(cell.pair.losses(state.pair, x)))
    for factor in (0.99, 1.01):
        near = NeurOnalS(D, K, 20, 100, factor * gap / (2 * beta), S=2.0, delta=0.2, pair=PAIR)
        assert bool(near.predict(state, x).query) == (factor > 1)


def test_learns_from_what_it_asked_for_and_no_more():
    x, y = rows(300)
    pair = Pair(D, K, 20, m=16, batch=8, steps=10, learning_rate=1e-2)
    cell = NeurOnalS(D, K, budget=20, horizon=300, gamma=0.3, pair=pair)
    state, answers = run(cell, events(x, y))
    asked = np.flatnonzero(answers.query)
    assert len(asked) == state.asked == state.pair.known == 20 and state.t == 300
    np.testing.assert_array_equal(state.pair.y, y[asked])
    np.testing.assert_array_equal(state.pair.x, x[asked])
    assert (answers.scores[-100:].argmax(1) == y[-100:]).mean() > 0.6
    # The labels that were not asked for do not matter.
    others = np.where(np.isin(np.arange(300), asked), y, (y + 1) % K)
    np.testing.assert_array_equal(run(cell, events(x, others))[1].scores, answers.scores)


def test_late_labels_are_learned_and_paid_when_asked():
    x, y = rows(30)
    cell = NeurOnalS(D, K, budget=4, horizon=30, gamma=10.0, pair=PAIR)
    state, answers = run(cell, events(x, y, valid=False))
    assert answers.query.tolist() == [True] * 4 + [False] * 26 and state.asked == 4 and state.pair.known == 0
    late = cell.learn(state, jnp.asarray(x[0]), jnp.int32(y[0]))
    assert late.pair.known == 1 and late.asked == 4


def test_no_budget_still_predicts():
    x, y = rows(10)
    state, answers = run(NeurOnalS(D, K, budget=0, horizon=10, gamma=10.0), events(x, y))
    assert not answers.query.any() and state.pair.known == 0 and np.isfinite(answers.scores).all()


def test_pseudo_labels():
    x, y = rows(3)
    cell = NeurOnalS(D, K, budget=0, horizon=3, gamma=1.0, pseudo=True, pair=PAIR)
    state = cell.init(key=KEY)
    own, answer = cell.step(state, jax.tree.map(lambda leaf: leaf[0], events(x, y)))
    guess = jnp.argmax(answer.scores)
    expected = cell.pair.update(state.pair, jnp.asarray(x[:1]), guess[None], jnp.ones(1))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), own.pair.exploit, expected.exploit)
    assert own.pair.known == 0 and own.pair.exploit[0].tolist() != state.pair.exploit[0].tolist()


def test_bad_rows_and_labels_are_counted_and_change_nothing():
    x, y = rows(20)
    for pseudo in (False, True):
        cell = NeurOnalS(D, K, budget=20, horizon=20, gamma=10.0, pseudo=pseudo, pair=PAIR)
        state, _ = run(cell, events(x[:5], y[:5]))
        weights = state.pair.exploit, state.pair.explore
        bad = Event(jnp.full(D, jnp.nan), Maybe(jnp.int32(0), True), 1.0)
        new, answer = cell.step(state, bad)
        assert not answer.query and new.asked == state.asked
        jax.tree.map(np.testing.assert_array_equal, (new.pair.exploit, new.pair.explore), weights)
        for row, label in ((x[0], K), (x[0], -1), (np.full(D, np.inf, np.float32), 0)):
            new = cell.learn(state, jnp.asarray(row), jnp.int32(label))
            assert new.pair.rejected == 1 and new.pair.known == 5
            jax.tree.map(np.testing.assert_array_equal, (new.pair.exploit, new.pair.explore), weights)


def test_pool_draws_by_margin():
    policy = NeurOnalP(PAIR, gamma=20.0)
    state, pool = policy.init(key=KEY), jnp.asarray(rows(6)[0])
    w = np.array([float(margin(PAIR.losses(state.pair, x))) for x in pool])
    p = w.min() / (6 * w.min() + 20 * (w - w.min()))
    p[w.argmin()] = 0
    p[w.argmin()] = 1 - p.sum()
    np.testing.assert_allclose(policy.probabilities(state, pool), p, rtol=1e-3)
    draw = jax.jit(jax.vmap(lambda t: policy.act(state._replace(t=t), pool)[1]))
    decisions = draw(jnp.arange(4000))
    np.testing.assert_allclose(np.bincount(decisions.action, minlength=6) / 4000, p, atol=0.03)
    np.testing.assert_allclose(decisions.logp, np.log(p)[decisions.action], atol=1e-2)
    spoiled = policy.probabilities(state, pool.at[1].set(jnp.nan))
    assert spoiled[1] == 0 and float(spoiled.sum()) == pytest.approx(1)
    np.testing.assert_allclose(policy.probabilities(state, jnp.zeros((4, D))), 0.25, atol=1e-6)  # all alike


def test_pool_learns():
    policy = NeurOnalP(Pair(D, K, 60, m=32, batch=32, steps=10), gamma=10.0)
    x, y = rows(60 * 8)
    x, y = x.reshape(60, 8, D), y.reshape(60, 8)

    @jax.jit
    def all_rounds(state):
        def one(state, pool):
            x, y = pool
            state, decision = policy.act(state, x)
            return policy.learn(state, x, decision, Feedback(0.0, info=y[decision.action])), decision.action

        return jax.lax.scan(one, state, (x, y))

    state, actions = all_rounds(policy.init(key=KEY))
    assert state.pair.known == 60 and len(set(actions.tolist())) > 2
    np.testing.assert_array_equal(state.pair.y, y[np.arange(60), actions])
    test_x, test_y = rows(300, seed=1)
    scores = jax.vmap(lambda r: policy.pair.losses(state.pair, r))(test_x)
    assert (np.asarray(scores).argmin(1) == test_y).mean() > 0.7


def test_the_newest_labels_stay():
    x, y = rows(50)
    state, _ = run(NeurOnalS(D, K, budget=50, horizon=50, gamma=10.0, pair=PAIR), events(x, y))
    assert state.pair.known == 50  # more than are held: the newest stay
    held = {tuple(row) for row in np.asarray(state.pair.x).tolist()}
    assert held == {tuple(row) for row in x[30:].tolist()}


@pytest.mark.parametrize(
    "name, kwargs",
    [("budget", dict(budget=-1)), ("horizon", dict(horizon=0)), ("delta", dict(delta=1.0)), ("S", dict(S=-1.0)),
     ("K", dict(K=1)), ("pair", dict(pair=Pair(2, 3, 4)))],
)  # fmt: skip
def test_bad_arguments_are_named(name, kwargs):
    with pytest.raises(ValueError, match=name):
        NeurOnalS(**dict(d=D, K=K, budget=3, horizon=10, gamma=1.0) | kwargs)
    with pytest.raises(ValueError, match="gamma"):
        NeurOnalP(PAIR, gamma=0.0)
