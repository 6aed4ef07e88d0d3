import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from anabranch import contract
from anabranch.fit import Backprop, fit
from anabranch.learn import dual_propagation
from anabranch.learn.base import cross_entropy
from anabranch.learn.dual_propagation import DualProp, Network, infer_states

KEY = jax.random.PRNGKey(0)


def perceptron(*widths: int) -> Network:
    keys = jax.random.split(KEY, len(widths))
    return Network(tuple(eqx.nn.Linear(m, n, key=k) for m, n, k in zip(widths, widths[1:], keys)))


def batch(n: int = 16, D: int = 5) -> tuple[jax.Array, jax.Array]:
    return jax.random.normal(KEY, (n, D)), jnp.arange(n) % 3


def test_contract():
    report = contract.check(*dual_propagation.example(), key=KEY)
    assert report.ok, report


def close(ours: object, theirs: object, tolerance: float) -> None:
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


@pytest.mark.parametrize("adjoint", [False, True])
@pytest.mark.parametrize("alpha", [0.5, 0.0, 1.0])
def test_gradient_of_a_small_nudge_is_that_of_backpropagation(alpha, adjoint):
    with jax.enable_x64(True):
        model = jax.tree.map(lambda w: w.astype(jnp.float64), perceptron(5, 12, 8, 3))
        x, y = batch()
        data = x.astype(jnp.float64), y
        value, grads = DualProp(cross_entropy, alpha, 1e-5, adjoint=adjoint).value_and_grad(model, data, KEY)
        wanted, theirs = Backprop(cross_entropy).value_and_grad(model, data, KEY)
        assert float(value) == pytest.approx(float(wanted))
        close(grads, theirs, 1e-3)


def test_where_no_unit_crosses_zero_any_nudge_is_exact():
    model = perceptron(5, 12, 8, 3)
    # A large bias keeps every hidden unit on: the network is affine, and its error does not depend on β.
    model = eqx.tree_at(
        lambda m: [layer.bias for layer in m.layers[:-1]], model, [jnp.full(12, 50.0), jnp.full(8, 90.0)]
    )
    theirs = Backprop(cross_entropy).value_and_grad(model, batch(), KEY)[1]
    close(DualProp(cross_entropy, beta=1.0).value_and_grad(model, batch(), KEY)[1], theirs, 1e-3)


@pytest.mark.parametrize(("alpha", "adjoint"), [(0.5, False), (0.3, False), (0.3, True)])
def test_states_by_hand(alpha, adjoint):
    """One sweep of a network of two layers, written out with matrices."""
    model, (x, y) = perceptron(5, 7, 3), batch(4)
    value, dyads = infer_states(DualProp(cross_entropy, alpha, 0.8, adjoint=adjoint), model, (x, y), KEY)
    (W, u), (V, v) = [(np.asarray(layer.weight), np.asarray(layer.bias)) for layer in model.layers]
    a = x @ W.T + u
    scores = np.maximum(a, 0) @ V.T + v
    delta = -0.8 * (np.asarray(jax.nn.softmax(scores)) - np.eye(3)[y])
    b = delta @ V
    up, down = (1 - alpha, alpha) if adjoint else (alpha, 1 - alpha)
    plus, minus = np.maximum(a + up * b, 0), np.maximum(a - down * b, 0)
    np.testing.assert_allclose(dyads.delta[2], delta, atol=1e-5)
    np.testing.assert_allclose(dyads.delta[1], plus - minus, atol=1e-5)
    np.testing.assert_allclose(dyads.mean[1], alpha * plus + (1 - alpha) * minus, atol=1e-5)
    assert float(value) == pytest.approx(float(cross_entropy(model, (x, y))))


def test_more_sweeps_settle():
    rule = lambda sweeps: DualProp(cross_entropy, beta=0.5, sweeps=sweeps)
    states = [infer_states(rule(n), perceptron(5, 12, 8, 3), batch(), KEY)[1].delta[1] for n in (1, 2, 20, 21)]
    assert (states[0] != states[1]).any()
    np.testing.assert_allclose(states[2], states[3], atol=1e-6)


def test_convolution_with_pooling():
    first, second = jax.random.split(KEY)
    pooled = eqx.nn.Sequential([eqx.nn.Conv2d(1, 4, 3, key=first), eqx.nn.MaxPool2d(2, 2), eqx.nn.Lambda(jnp.ravel)])
    model = Network((pooled, eqx.nn.Linear(4 * 9, 3, key=second)))
    data = jax.random.normal(KEY, (6, 1, 8, 8)), jnp.arange(6) % 3
    theirs = Backprop(cross_entropy).value_and_grad(model, data, KEY)[1]
    ours = DualProp(cross_entropy, beta=0.05).value_and_grad(model, data, KEY)[1]
    close(ours, theirs, 0.05)


def test_training():
    x, _ = batch(200)
    y = (x[:, 0] * x[:, 1] > 0).astype(jnp.int32)
    model, _ = fit(DualProp(cross_entropy), perceptron(5, 32, 16, 2), (x, y), optax.adam(1e-2), 200, key=KEY)
    assert (np.asarray(jax.vmap(model)(x)).argmax(1) == y).mean() > 0.95


def test_bad_arguments():
    for wrong in ({"alpha": 1.5}, {"beta": 0.0}, {"sweeps": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            DualProp(cross_entropy, **wrong)
    with pytest.raises(ValueError, match="MLP"):
        DualProp(cross_entropy).value_and_grad(eqx.nn.MLP(5, 3, 4, 1, key=KEY), batch(), KEY)
    model = Network((*perceptron(5, 4).layers, eqx.nn.BatchNorm(4, "batch", mode="batch")))
    with pytest.raises(ValueError, match="BatchNorm"):
        DualProp(cross_entropy).value_and_grad(model, batch(), KEY)
