"""`branch` must skip work in every form of batching, and differentiate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anabranch.branch import branch, due

D = 64
CALLS = []


def heavy_for(w, counted=False):
    def heavy(x):
        if counted:
            jax.debug.callback(lambda: CALLS.append(1))
        return jnp.tanh(w @ x)

    return heavy


def both(p, x, w):
    return jnp.where(p, jnp.tanh(w @ x), x)


def ours(p, x, w, bucket=4):
    return branch(p, heavy_for(w), lambda x: x, x, bucket=bucket)


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    return (
        jnp.asarray(rng.random(10) < 0.4),
        jnp.asarray(rng.normal(size=(10, D)), jnp.float32),
        jnp.asarray(rng.normal(size=(D, D)) / 8, jnp.float32),
    )


def test_one_stream(data):
    p, x, w = data
    for i in range(3):
        np.testing.assert_allclose(ours(p[i], x[i], w), both(p[i], x[i], w), atol=1e-6)


@pytest.mark.parametrize("axes", [(0, 0, None), (0, None, None), (None, 0, None), (0, 0, 0), (None, None, 0)])
def test_vmap(data, axes):
    p, x, w = data
    args = [a if axis == 0 else a[0] for a, axis in zip((p, x), axes)]
    args.append(jnp.stack([w * i for i in range(10)]) if axes[2] == 0 else w)
    np.testing.assert_allclose(jax.vmap(ours, axes)(*args), jax.vmap(both, axes)(*args), atol=1e-5)


@pytest.mark.parametrize("outer", [(0, 0, None), (0, None, None), (None, 0, None), (None, None, 0), (0, 0, 0)])
def test_nested_vmap(data, outer):
    p, x, w = data
    args = [jnp.stack([a, jnp.roll(a, 1, 0), a[::-1]]) if axis == 0 else a for a, axis in zip((p, x, w), outer)]
    nest = lambda f: jax.vmap(jax.vmap(f, (0, 0, None)), outer)(*args)
    np.testing.assert_allclose(nest(ours), nest(both), atol=1e-5)


@pytest.mark.parametrize(
    "order", ["plain", "grad of vmap", "vmap of grad", "grad of nested", "grad of scan of vmap", "jit"]
)
def test_gradients(data, order):
    p, x, w = data

    def gradient(f):
        if order == "plain":
            return jax.grad(lambda w: f(p[0], x[0], w).sum() + f(p[1], x[1], w).sum())(w)
        if order == "vmap of grad":
            return jax.vmap(jax.grad(lambda w, p, x: (f(p, x, w) ** 2).sum()), (None, 0, 0))(w, p, x)
        if order == "grad of nested":
            nest = jax.vmap(jax.vmap(f, (0, 0, None)), (0, 0, None))
            return jax.grad(lambda w: (nest(jnp.stack([p, ~p]), jnp.stack([x, x]), w) ** 2).sum())(w)
        if order == "grad of scan of vmap":
            body = lambda w: lambda c, _: (jax.vmap(f, (0, 0, None))(p, c, w), None)
            return jax.grad(lambda w: (jax.lax.scan(body(w), x, None, 3)[0] ** 2).sum())(w)
        g = jax.grad(lambda w: (jax.vmap(f, (0, 0, None))(p, x, w) ** 2).sum())
        return (jax.jit(g) if order == "jit" else g)(w)

    np.testing.assert_allclose(gradient(ours), gradient(both), atol=1e-4)


def count(f, *args):
    CALLS.clear()
    jax.block_until_ready(f(*args))
    jax.effects_barrier()
    return len(CALLS)


@pytest.mark.parametrize("form", ["vmap", "nested", "scan", "grad", "shared"])
def test_skips(data, form):
    """The heavy side runs on as many chunks as there are active rows, and not once where there are none."""
    _, _, w = data
    x = jnp.ones((16, D))
    f = lambda p, x, w: branch(p, heavy_for(w, counted=True), lambda x: x, x, bucket=4)
    batch = jax.vmap(f, (0, 0, None))

    def run(p, w):
        if form == "vmap":
            return batch(p, x, w)
        if form == "nested":
            return jax.vmap(batch, (0, 0, None))(p.reshape(2, 8), x.reshape(2, 8, D), w)
        if form == "scan":
            return jax.lax.scan(lambda c, _: (batch(p, c, w), None), x, None, 1)[0]
        if form == "shared":
            return jax.vmap(f, (None, 0, None))(p.any(), x, w)
        return jax.grad(lambda w: batch(p, x, w).sum())(w)

    run = jax.jit(run)
    none, five = jnp.zeros(16, bool), jnp.arange(16) % 3 == 1
    assert count(run, none, w) == 0
    ran = count(run, five, w)
    assert ran == (1 if form == "shared" else 2)  # five active rows are two chunks of four


def test_weights_are_not_copied():
    """512 streams over 1 MB of weights: temporaries stay far under one copy a stream."""
    w = jnp.ones((512, 512))
    f = jax.jit(jax.vmap(lambda p, x, w: branch(p, lambda x: w @ x, lambda x: x, x), (0, 0, None)))
    memory = f.lower(jnp.ones(512, bool), jnp.ones((512, 512)), w).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 20e6


def test_the_two_sides_must_agree():
    with pytest.raises(TypeError, match="must agree"):
        branch(jnp.array(True), lambda x: x, lambda x: x[:1], jnp.ones(3))
    with pytest.raises(ValueError, match="bucket"):
        branch(jnp.array(True), lambda x: x, lambda x: x, jnp.ones(3), bucket=0)


def test_due_serves_at_most_and_rotates():
    waiting = jnp.array([True, True, False, True])
    states, left = due(waiting, lambda s: s + 1, jnp.zeros(4), most=2, start=1)
    assert states.tolist() == [0, 1, 0, 1]
    assert left.tolist() == [True, False, False, False]
    states, left = due(left, lambda s: s + 1, states, most=2, start=3)
    assert states.tolist() == [1, 1, 0, 1] and not left.any()
    states, left = due(left, lambda s: s + 1, states, most=2)
    assert states.tolist() == [1, 1, 0, 1]
