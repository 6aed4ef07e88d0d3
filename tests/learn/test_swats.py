from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from anabranch import contract
from anabranch.cell import Event, Maybe
from anabranch.learn.base import Sgd
from anabranch.learn.detect import DDM
from anabranch.learn.swats import Rearmed, example, rearm, swats


def run(optimizer, grads, w):
    """Weights after each step on given gradients, and the last state."""

    @jax.jit
    def scan(w, state):
        def step(carry, g):
            w, state = carry
            updates, state = optimizer.update(g, state, w)
            w = optax.apply_updates(w, updates)
            return (w, state), w

        return jax.lax.scan(step, (w, state), grads)

    (_, state), ws = scan(w, optimizer.init(w))
    return ws, state


def drifting(steps, size, seed=0):
    """Gradients with a mean, of slowly changing length, so that γ is positive and crosses its mean often."""
    rng = np.random.default_rng(seed)
    swell = 1 + 0.3 * np.sin(np.arange(steps) / 7)[:, None]
    return (swell * (1 + 0.5 * rng.normal(size=(steps, size)))).astype(np.float32)


def by_the_paper(grads, w, alpha, b1, b2, eps, warmup, rtol, atol):
    """The listing in float64, with ε and the sign of γ as in our file."""
    w, m, a, v, lam, rate, at = w.astype(np.float64), 0.0, 0.0, 0.0, 0.0, 0.0, 0
    path = []
    for k, g in enumerate(grads.astype(np.float64), 1):
        if at:
            v = b1 * v + g
            w = w - (1 - b1) * rate * v
        else:
            m, a = b1 * m + (1 - b1) * g, b2 * a + (1 - b2) * g * g
            p = -alpha * (m / (1 - b1**k)) / (np.sqrt(a / (1 - b2**k)) + eps)
            w = w + p
            gamma = p @ p / -(p @ g)
            assert gamma > 0
            lam = b2 * lam + (1 - b2) * gamma
            mean = lam / (1 - b2**k)
            if k > max(1, warmup) and abs(mean - gamma) <= atol + rtol * gamma:
                rate, at = mean, k
        path.append(w)
    return np.array(path), rate, at


def test_contract():
    report = contract.check(*example())
    assert report.ok, report


def test_the_example_switches():
    cell, events = example()
    state, _ = cell.advance(cell.init(key=jax.random.PRNGKey(0)), events)
    assert 4 < int(state.optimizer.switched_at) < 40


def test_a_constant_gradient_by_hand():
    # Every step of Adam is −α sign(g), so γ = α² P / (α Σ|g|) from the first step on, and even 1e-9 is met.
    g = jnp.array([1000.0, -3000.0, 2000.0])
    ws, state = run(swats(1e-2, warmup=1, rtol=0.0, atol=1e-9), jnp.tile(g, (4, 1)), jnp.zeros(3))
    rate = 1e-2 * 3 / 6000
    assert int(state.switched_at) == 2
    np.testing.assert_allclose(state.rate, rate, rtol=1e-5)
    np.testing.assert_allclose(ws[1], -2e-2 * np.sign(g), rtol=1e-5)
    np.testing.assert_allclose(ws[2] - ws[1], -0.1 * rate * g, rtol=1e-3)
    np.testing.assert_allclose(ws[3] - ws[2], -0.19 * rate * g, rtol=1e-3)


@pytest.mark.parametrize("warmup, rtol", [(1, 1e-3), (200, 1e-2)])
def test_equals_the_listing(warmup, rtol):
    grads, w = drifting(500, 20), np.linspace(-1, 1, 20, dtype=np.float32)
    ours, state = run(swats(1e-3, warmup=warmup, rtol=rtol), jnp.asarray(grads), jnp.asarray(w))
    theirs, rate, at = by_the_paper(grads, w, 1e-3, 0.9, 0.999, 1e-9, warmup, rtol, 0.0)
    assert warmup < at < 490
    assert int(state.switched_at) == at
    np.testing.assert_allclose(state.rate, rate, rtol=1e-4)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_before_the_switch_it_is_adam_bit_for_bit_and_the_rate_is_the_projected_one():
    h, w = jnp.logspace(-2, 1, 12), jnp.ones(12)  # ½ Σ h w², whose gradient is h w

    def path(optimizer):
        def step(carry, _):
            w, state = carry
            updates, state = optimizer.update(h * w, state, w)
            new = optax.apply_updates(w, updates)
            return (new, state), (w, updates)

        return jax.jit(lambda: jax.lax.scan(step, (w, optimizer.init(w)), length=400))()

    (_, state), (ws, updates) = path(swats(1e-3, warmup=100, rtol=0.1))
    _, (adam, _) = path(optax.adam(1e-3, eps=1e-9))
    at = int(state.switched_at)
    assert 100 < at < 390
    np.testing.assert_array_equal(ws[: at + 1], adam[: at + 1])
    assert (np.asarray(ws[at + 1 :]) != np.asarray(adam[at + 1 :])).any()
    g, p = np.asarray(h * ws[:at], np.float64), np.asarray(updates[:at], np.float64)
    gamma = (p * p).sum(1) / -(p * g).sum(1)
    weights = 0.999 ** np.arange(at)[::-1]
    rate = (weights * gamma).sum() / weights.sum()
    np.testing.assert_allclose(state.rate, rate, rtol=1e-4)
    # γ is the rate at which the projection of the SGD step on Adam's is Adam's.
    onto = (-gamma[-1] * g[-1]) @ p[-1] / (p[-1] @ p[-1]) * p[-1]
    np.testing.assert_allclose(onto, p[-1], rtol=1e-9)


def test_trees_are_one_vector():
    grads, w = jnp.asarray(drifting(300, 20)), jnp.zeros(20)
    optimizer = swats(warmup=50, rtol=1e-2)
    whole, _ = run(optimizer, grads, w)
    parts, _ = run(
        optimizer, {"a": grads[:, :5], "b": grads[:, 5:].reshape(-1, 3, 5)}, {"a": w[:5], "b": w[5:].reshape(3, 5)}
    )
    np.testing.assert_allclose(parts["a"], whole[:, :5], atol=1e-6)
    np.testing.assert_allclose(parts["b"].reshape(-1, 15), whole[:, 5:], atol=1e-6)


def test_what_is_not_finite_or_against_the_gradient_says_nothing():
    optimizer: Any = swats(warmup=1)
    w = jnp.zeros(2)
    _, state = optimizer.update(jnp.array([1.0, 2.0]), optimizer.init(w), w)
    for bad in (jnp.nan, jnp.inf):
        updates, after = optimizer.update(jnp.array([1.0, bad]), state, w)
        np.testing.assert_array_equal(updates, 0)
        jax.tree.map(np.testing.assert_array_equal, after, state)
    _, after = optimizer.update(jnp.array([-0.01, -0.02]), state, w)  # the momentum still points down: γ < 0
    assert int(after.steps) == 2 and int(after.averaged) == 1 and float(after.average) == float(state.average)
    _, still = optimizer.update(jnp.zeros(2), optimizer.init(w), w)
    assert int(still.averaged) == 0 and int(still.switched_at) == 0


def test_each_of_a_batch_switches_at_its_own_time():
    streams = jnp.stack([jnp.asarray(drifting(300, 10, seed)) for seed in range(3)])
    optimizer, w = swats(warmup=20, rtol=1e-2), jnp.zeros(10)
    _, together = jax.vmap(lambda g: run(optimizer, g, w))(streams)
    alone = [int(run(optimizer, g, w)[1].switched_at) for g in streams]
    assert together.switched_at.tolist() == alone and len(set(alone)) > 1


def test_each_tensor_switches_by_itself():
    grads = {"a": jnp.asarray(drifting(300, 10, 0)), "b": jnp.asarray(drifting(300, 6, 1)).reshape(-1, 2, 3)}
    w = jax.tree.map(lambda g: jnp.zeros(g.shape[1:]), grads)
    ws, state = run(swats(warmup=20, rtol=1e-2, scope="tensor"), grads, w)
    at = []
    for name in grads:
        alone, last = run(swats(warmup=20, rtol=1e-2), grads[name], w[name])
        np.testing.assert_allclose(ws[name], alone, atol=1e-6)
        at.append(int(last.switched_at))
    assert [int(state[name].switched_at) for name in grads] == at and at[0] != at[1] and min(at) > 20


def test_rearmed_it_begins_anew():
    grads, w = jnp.asarray(drifting(300, 10)), jnp.zeros(10)
    optimizer: Any = swats(warmup=20, rtol=1e-2)
    _, state = run(optimizer, grads, w)
    assert int(state.switched_at) > 0
    jax.tree.map(np.testing.assert_array_equal, rearm(state), optimizer.init(w))


def test_a_drift_rearms():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(600, 2)).astype(np.float32)
    y = ((x[:, 0] > 0) ^ (np.arange(600) >= 300)).astype(np.int32)
    learner = Sgd(eqx.nn.Linear(2, 2, key=jax.random.PRNGKey(0)), swats(1e-2, warmup=4, rtol=0.5))
    cell, events = Rearmed(learner, DDM()), Event(x, Maybe(y, np.ones(600, bool)), np.ones(600, np.float32))

    @jax.jit
    def steps(events):
        def step(state, event):
            state, _ = cell.step(state, event)
            return state, (state[0].optimizer.steps, state[0].optimizer.switched_at)

        return jax.lax.scan(step, cell.init(), events)[1]

    count, switched = map(np.asarray, steps(events))
    again = np.flatnonzero(count == 0)
    assert switched[299] > 0 and len(again) > 0 and (again > 300).all()
    assert switched[again[0]] == 0 and count[again[0] + 1] == 1


@pytest.mark.parametrize(
    "wrong", [{"learning_rate": 0.0}, {"b1": 1.0}, {"b2": 1.0}, {"warmup": 0}, {"rtol": -1.0}, {"scope": "layer"}]
)
def test_bad_arguments(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        swats(**wrong)


def test_parity_with_torch_optimizer():
    torch = pytest.importorskip("torch")
    peer = pytest.importorskip("torch_optimizer")
    # The peer's tolerances are fixed, 1e-6 and 1e-8: a rate of about 1e-6 comes within the second.
    grads, w = 1000 * drifting(500, 20, seed=3), np.linspace(-1, 1, 20, dtype=np.float32)
    theirs = torch.nn.Parameter(torch.tensor(w))
    optimizer, path, at = peer.SWATS([theirs], lr=1e-3, eps=1e-9), [], 0
    for k, g in enumerate(grads, 1):
        theirs.grad = torch.tensor(g)
        optimizer.step()
        path.append(theirs.detach().numpy().copy())
        if not at and optimizer.param_groups[0]["phase"] == "SGD":
            at = k
    ours, state = run(swats(1e-3, warmup=1, rtol=1e-6, atol=1e-8), jnp.asarray(grads), jnp.asarray(w))
    assert 1 < at == int(state.switched_at) < 490
    np.testing.assert_allclose(state.rate, optimizer.param_groups[0]["lr"], rtol=1e-5)
    # Two steps further: from the third step of SGD on the peer shrinks its momentum buffer in place, tenfold each step.
    np.testing.assert_allclose(ours[: at + 2], np.array(path[: at + 2]), atol=1e-5)


def test_in_a_network():
    """As the optimiser of a module with leaves that do not train."""
    mlp = eqx.filter(eqx.nn.MLP(2, 2, 4, 1, key=jax.random.PRNGKey(0)), eqx.is_inexact_array)
    optimizer: Any = swats()
    updates, state = optimizer.update(jax.tree.map(jnp.ones_like, mlp), optimizer.init(mlp), mlp)
    assert jax.tree.structure(updates) == jax.tree.structure(mlp) and int(state.steps) == 1
