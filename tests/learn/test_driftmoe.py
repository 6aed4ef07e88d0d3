import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anabranch import Event, Maybe
from anabranch.learn.driftmoe import DriftMoE

T, D, C = 600, 4, 3


@pytest.fixture(scope="module")
def stream():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(T, D)).astype(np.float32)
    y = (x[:, 0] + x[:, 1] > 0).astype(np.int32) + (x[:, 2] > 0.8)
    return x, y


def events(x, y, weight=1.0):
    n = len(x)
    return Event(jnp.asarray(x), Maybe(jnp.asarray(y, jnp.int32), jnp.ones(n, bool)), jnp.full(n, weight))


def run(cell, x, y, seed=0):
    state, scores = jax.jit(lambda s, e: jax.lax.scan(cell.step, s, e))(
        cell.init(key=jax.random.PRNGKey(seed)), events(x, y)
    )
    return state, np.asarray(scores)


class Adam:
    """As in PyTorch."""

    def __init__(self, params, rate):
        self.m, self.v, self.t, self.rate = [0 * p for p in params], [0 * p for p in params], 0, rate

    def step(self, params, grads):
        self.t += 1
        for p, m, v, g in zip(params, self.m, self.v, grads):
            m += 0.1 * (g - m)
            v += 0.001 * (g * g - v)
            p -= self.rate * (m / (1 - 0.9**self.t)) / (np.sqrt(v / (1 - 0.999**self.t)) + 1e-8)


def forward(params, x):
    w1, b1, w2, b2, w3, b3 = params
    h1 = np.maximum(x @ w1.T + b1, 0)
    h2 = np.maximum(h1 @ w2.T + b2, 0)
    return h1, h2, h2 @ w3.T + b3


def backward(params, x, mask):
    """Gradient of the mean binary cross-entropy, by hand."""
    _, _, w2, _, w3, _ = params
    h1, h2, logits = forward(params, x)
    d3 = (1 / (1 + np.exp(-logits)) - mask) / mask.size
    d2 = (d3 @ w3) * (h2 > 0)
    d1 = (d2 @ w2) * (h1 > 0)
    return [d1.T @ x, d1.sum(0), d2.T @ h1, d2.sum(0), d3.T @ h2, d3.sum(0)]


def by_the_paper(params, x, y, E, top_k, batch):
    """The data variant, event by event, on River's trees."""
    from river.tree import HoeffdingTreeClassifier

    experts = [HoeffdingTreeClassifier(grace_period=50, delta=1e-7) for _ in range(E)]
    params = [np.array(p, np.float64) for p in params]
    adam, held, answers, usage = Adam(params, 2e-3), [], [], np.zeros(E, int)
    for row, label in zip(x.astype(np.float64), y.tolist()):
        logits = forward(params, row)[2]
        probabilities = np.full((E, C), 1 / C)
        for e, expert in enumerate(experts):
            found = expert.predict_proba_one(dict(enumerate(row)))
            if found:
                probabilities[e] = [found.get(c, 0.0) for c in range(C)]
        predicted = probabilities.argmax(1)
        mask = (predicted == label).astype(float)
        if not mask.any():
            mask[probabilities[:, label].argmax()] = 1
        answers.append(predicted[logits.argmax()])
        usage[logits.argmax()] += 1
        held.append((row, mask))
        if len(held) == batch:
            adam.step(params, backward(params, *map(np.stack, zip(*held))))
            held.clear()
        for e in np.argsort(-logits, kind="stable")[:top_k]:
            experts[e].learn_one(dict(enumerate(row)), label)
    return params, np.array(answers), usage


def test_data_mode_is_the_paper_s(stream):
    pytest.importorskip("river")
    x, y = stream
    cell = DriftMoE(D, C, E=6, top_k=2, batch=32)
    # In float64: Adam makes steps of equal size from gradients of rounding noise, so float32 routers drift apart.
    with jax.enable_x64(True):
        start = [np.asarray(p) for p in jax.tree.leaves(cell.init(key=jax.random.PRNGKey(0)).router)]
        state, scores = run(cell, x.astype(np.float64), y)
        state = jax.tree.map(np.asarray, state)
    params, answers, usage = by_the_paper(start, x, y, E=6, top_k=2, batch=32)
    assert (scores.argmax(1) == answers).mean() >= 0.995
    np.testing.assert_allclose(state.usage, usage, atol=10)
    assert max(abs(a - b).max() for a, b in zip(params, start)) > 0.02  # it has learned
    for ours, theirs in zip(jax.tree.leaves(state.router), params):
        assert np.abs(ours - theirs).mean() < 1e-3  # half of one step
    assert state.buffered == T % 32 and len(set(answers.tolist())) == C


def test_mask():
    cell = DriftMoE(D, C, E=3, top_k=1)
    some = jnp.array([[0.2, 0.5, 0.3], [0.6, 0.3, 0.1], [0.1, 0.8, 0.1]])
    assert cell._mask(some, jnp.int32(1)).tolist() == [1, 0, 1]  # all that are right
    assert cell._mask(some, jnp.int32(2)).tolist() == [1, 0, 0]  # none is: the one that gave it most
    task = DriftMoE(D, C, mode="task")
    for y in range(C):
        for scores in (jnp.tile(jnp.array([0.1, 0.9]), (C, 1)), jnp.tile(jnp.array([0.9, 0.1]), (C, 1))):
            assert task._mask(scores, jnp.int32(y)).tolist() == [float(c == y) for c in range(C)]


def test_top_k_learn_and_ties_go_to_the_lower_index(stream):
    cell = DriftMoE(D, C, E=5, top_k=2)
    assert cell._selected(jnp.array([0.1, 3.0, 0.2, 3.0, 3.0])).tolist() == [False, True, False, True, False]
    assert cell._selected(jnp.zeros(5)).tolist() == [True, True, False, False, False]
    state = cell.init(key=jax.random.PRNGKey(0))
    x = jnp.asarray(stream[0][0])
    best = np.argsort(-cell.router(state.router, x))[:2]
    learned = cell.learn(state, x, 1)
    weight = np.asarray(learned.trees.leaves.weight).reshape(5, -1, C).sum((1, 2))
    assert set(np.flatnonzero(weight)) == set(best.tolist()) and learned.usage[best[0]] == 1


def test_an_expert_that_is_never_chosen_starves(stream):
    x, y = stream
    state, scores = run(DriftMoE(D, C, E=12, top_k=1, batch=10_000), x, y)  # the router never learns
    weight = np.asarray(state.trees.leaves.weight).reshape(12, -1, C).sum((1, 2))
    assert int(state.usage.sum()) == T
    np.testing.assert_allclose(weight, state.usage)  # top_k = 1: who answers learns
    assert (weight == 0).any()
    np.testing.assert_allclose(scores.sum(1), 1, atol=1e-5)


def test_in_task_mode_the_experts_do_not_matter(stream):
    x, y = stream
    cell = DriftMoE(D, C, mode="task")
    assert cell.E == C
    state, scores = run(cell, x, y)
    assert (scores[-200:].argmax(1) == y[-200:]).mean() > 0.7
    weight = np.asarray(state.trees.leaves.weight).reshape(C, -1, 2)
    np.testing.assert_allclose(weight.sum(1)[:, 1], np.bincount(y, minlength=C), atol=0.5)  # expert c: is it c?
    # The router by itself, on the one-hot label, is the same model.
    import optax

    key, adam = jax.random.PRNGKey(0), optax.adam(2e-3)
    params = cell.init(key=key).router

    def learn(carry, event):
        params, memory, t = carry
        row, label = event

        def loss(p):
            from anabranch import noise

            logits = cell.router(p, row, key=noise(key, t, "dropout"))
            return optax.sigmoid_binary_cross_entropy(logits, jax.nn.one_hot(label, C)).mean()

        updates, memory = adam.update(jax.grad(loss)(params), memory)
        return (optax.apply_updates(params, updates), memory, t + 1), jax.nn.softmax(cell.router(params, row))

    (params, _, _), alone = jax.lax.scan(
        learn, (params, adam.init(params), 0), (jnp.asarray(x[:100]), jnp.asarray(y[:100]))
    )
    np.testing.assert_allclose(scores[:100], alone, atol=1e-3)


def test_router_starts_and_drops_as_stated():
    cell = DriftMoE(200, C, E=300, top_k=1)
    params = cell.router.init(jax.random.PRNGKey(0))
    assert [w.shape for w, _ in params] == [(256, 200), (128, 256), (300, 128)]
    for w, b in params:
        limit = np.sqrt(6 / sum(w.shape))
        assert 0.95 * limit < np.abs(w).max() <= limit and abs(float(w.var()) / (limit**2 / 3) - 1) < 0.05
        assert not b.any()
    x = jnp.ones(200)
    dropped = jax.vmap(lambda k: cell.router(params, x, key=k))(jax.random.split(jax.random.PRNGKey(1), 2000))
    assert dropped.std(0).min() > 0.01 and abs(dropped.mean() - cell.router(params, x).mean()) < 0.05


def test_bad_events_are_counted_and_change_nothing(stream):
    x, y = stream
    for mode in ("data", "task"):
        cell = DriftMoE(D, C, E=3, top_k=1, mode=mode, batch=4)
        state, _ = run(cell, x[:50], y[:50])
        for row, label in ((x[0], C), (x[0], -1), (np.full(D, np.nan, np.float32), 0)):
            new, scores = jax.jit(cell.step)(state, Event(jnp.asarray(row), Maybe(jnp.int32(label), True), 1.0))
            assert new.rejected == 1 and np.isfinite(scores).all()
            jax.tree.map(np.testing.assert_array_equal, new._replace(rejected=state.rejected, t=state.t), state)


def test_prediction_is_that_of_the_step(stream):
    x, y = stream
    for standardise in (False, True):
        cell = DriftMoE(D, C, E=4, top_k=2, batch=16, standardise=standardise)
        state, _ = run(cell, 100 * x, y)
        scores = cell.step(state, Event(jnp.asarray(x[0]), Maybe(jnp.int32(0), False), 1.0))[1]
        np.testing.assert_allclose(cell.predict(state, jnp.asarray(x[0])), scores, rtol=1e-5)
    np.testing.assert_allclose(state.scale[1], 100 * x.mean(0), rtol=1e-3, atol=0.05)
    np.testing.assert_allclose(np.sqrt(state.scale[2] / T), 100 * x.std(0), rtol=1e-3)


@pytest.mark.parametrize("name, kwargs", [("top_k", dict(E=2)), ("mode", dict(mode="both")), ("batch", dict(batch=0))])
def test_bad_arguments_are_named(name, kwargs):
    with pytest.raises(ValueError, match=name):
        DriftMoE(D, C, **kwargs)


@pytest.mark.slow
def test_contract(stream):
    from anabranch.contract import check

    x, y = stream
    cell = DriftMoE(D, C, E=3, top_k=2, max_leaves=4, batch=32)
    # The gradient is looked at in the first 16 steps: Adam's first step is a sign, which a difference cannot follow.
    weight = np.random.default_rng(0).uniform(1.1, 1.9, 72).astype(np.float32)  # unequal: where votes tie, scores jump
    report = check(cell, events(x[:72], y[:72], weight), key=jax.random.PRNGKey(0))
    assert report.ok, str(report)


@pytest.mark.parametrize("mode", ["data", "task"])
def test_a_block_is_the_same_as_its_events(stream, mode):
    x, y = stream
    cell = DriftMoE(D, C, E=4, top_k=2, mode=mode, batch=16)
    known = np.random.default_rng(0).random(T) < 0.7  # so the router's updates come at uneven intervals
    all_events = events(x, y)._replace(target=Maybe(jnp.asarray(y, jnp.int32), jnp.asarray(known)))
    start = cell.init(key=jax.random.PRNGKey(0))
    one_by_one = jax.jit(lambda s, e: jax.lax.scan(cell.step, s, e))(start, all_events)
    parts, state = [], start
    for first, last in ((0, 5), (5, 200), (200, T)):
        state, scores = jax.jit(cell.advance)(state, jax.tree.map(lambda a: a[first:last], all_events))
        parts.append(scores)
    assert state.buffered == known.sum() % cell.batch
    jax.tree.map(np.testing.assert_array_equal, (state, jnp.concatenate(parts)), one_by_one)
