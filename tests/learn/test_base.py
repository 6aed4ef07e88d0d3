"""The plain online learner takes the steps that optax takes, and `fit` takes any way to get a gradient."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from anabranch import Event, Maybe
from anabranch.contract import check
from anabranch.fit import Backprop, Epochs, fit
from anabranch.learn.base import Sgd, cross_entropy

KEY = jax.random.PRNGKey(0)


@pytest.fixture(scope="module")
def stream():
    xs = jax.random.normal(KEY, (40, 3))
    return Event(xs, Maybe((xs[:, 0] > 0).astype(jnp.int32), jnp.arange(40) % 5 > 0), jnp.ones(40))


@pytest.fixture(scope="module")
def model():
    return eqx.nn.MLP(3, 2, 8, 1, key=KEY)


def test_sgd_keeps_the_contract(stream, model):
    check(Sgd(model, optax.adam(0.01)), stream)


def test_sgd_takes_the_steps_of_optax(stream, model):
    cell = Sgd(model, optax.adam(0.01))
    state, _ = eqx.filter_jit(lambda s, xs: jax.lax.scan(lambda s, x: cell.step(s, x), s, xs))(
        cell.init(key=KEY), stream
    )
    plain, adam = model, optax.adam(0.01)
    opt = adam.init(eqx.filter(plain, eqx.is_inexact_array))
    for i in range(40):
        if stream.target.valid[i]:
            grads = eqx.filter_grad(cross_entropy)(plain, (stream.x[i : i + 1], stream.target.value[i : i + 1]))
            updates, opt = adam.update(grads, opt)
            plain = eqx.apply_updates(plain, updates)
    for ours, theirs in zip(jax.tree.leaves(state.model), jax.tree.leaves(eqx.filter(plain, eqx.is_inexact_array))):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_an_event_with_no_finite_gradient_is_passed_over(stream, model):
    cell = Sgd(model, optax.sgd(0.1))
    state = cell.init(key=KEY)
    after = cell.learn(state, jnp.array([1.0, jnp.nan, 0.0]), 1)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(after)))


def test_fit_takes_a_gradient_by_any_way(stream, model):
    class Half(Backprop):
        """A wrong gradient, to be told from the right one."""

        def value_and_grad(self, model, batch, key):
            value, grads = super().value_and_grad(model, batch, key)
            return value, jax.tree.map(lambda g: g / 2, grads)

    batch = Epochs((stream.x, stream.target.value), 8, KEY)
    fits = [fit(way, model, batch, optax.sgd(rate), 20, key=KEY, where=lambda m: m.layers[0])[0] for way, rate in
            ((cross_entropy, 0.1), (Backprop(cross_entropy), 0.1), (Half(cross_entropy), 0.2))]  # fmt: skip
    for other in fits[1:]:
        for a, b in zip(jax.tree.leaves(fits[0]), jax.tree.leaves(other)):
            if eqx.is_array(a):
                np.testing.assert_allclose(a, b, atol=1e-6)
    assert np.array_equal(fits[1].layers[1].weight, model.layers[1].weight)
    assert not np.array_equal(fits[1].layers[0].weight, model.layers[0].weight)


def test_memory_grows_with_the_batch(model):
    way = Backprop(cross_entropy)
    few, many = (
        way.memory(model, (jax.ShapeDtypeStruct((n, 3), jnp.float32), jax.ShapeDtypeStruct((n,), jnp.int32)))
        for n in (64, 6400)
    )
    assert 50 * few < many < 200 * few
