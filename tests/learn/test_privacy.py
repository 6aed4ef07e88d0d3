import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anabranch.learn import privacy


def test_clip_each_bounds_every_example():
    rng = np.random.default_rng(0)
    grads = {"a": rng.normal(size=(8, 3)).astype(np.float32), "b": rng.normal(size=(8, 2, 2)).astype(np.float32)}
    flat = np.concatenate([grads["a"], grads["b"].reshape(8, -1)], 1)
    wanted = (flat * np.minimum(1, 1.5 / np.linalg.norm(flat, axis=1))[:, None]).sum(0)
    total, rejected = privacy.clip_each(jax.tree.map(jnp.asarray, grads), 1.5)
    np.testing.assert_allclose(np.concatenate([total["a"], total["b"].ravel()]), wanted, rtol=1e-5)
    assert int(rejected) == 0
    alone, _ = privacy.clip_each(jax.tree.map(lambda g: 1e6 * g[:1], grads), 1.5)
    assert np.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(alone))) == pytest.approx(1.5, rel=1e-5)


def test_per_example_gradients_add_up_to_the_whole():
    model, batch = jnp.array([1.0, 2.0]), (jnp.arange(6.0).reshape(3, 2), jnp.array([1.0, 0.0, 2.0]))
    loss = lambda w, batch, key: jnp.mean((batch[0] @ w - batch[1]) ** 2)
    value, grads = privacy.PerExample(loss).value_and_grad(model, batch, jax.random.PRNGKey(0))
    assert grads.shape == (3, 2)
    np.testing.assert_allclose(grads.mean(0), jax.grad(loss)(model, batch, None), rtol=1e-6)
    assert float(value) == pytest.approx(float(loss(model, batch, None)))


@pytest.mark.parametrize("sigma", [0.7, 2.0, 8.0])
def test_epsilon_of_a_gaussian(sigma):
    """Against the conversion of its Rényi divergence a / 2σ², minimised on a grid."""
    pytest.importorskip("dp_accounting")
    a, delta = np.linspace(1.01, 512, 200_000), 1e-5
    wanted = np.min(a / (2 * sigma**2) + np.log((a - 1) / a) - (np.log(delta) + np.log(a)) / (a - 1))
    assert privacy.epsilon(privacy.gaussian(sigma), delta) == pytest.approx(wanted, rel=5e-3)


def test_calibrate_is_the_inverse_of_epsilon():
    pytest.importorskip("dp_accounting")
    for event in (privacy.gaussian, lambda sigma: privacy.sampled_gaussian(sigma, 0.02, 100)):
        sigma = privacy.calibrate(event, 2.0, 1e-5)
        assert 1.99 < privacy.epsilon(event(sigma), 1e-5) <= 2.0
    # Sampling hides who took part: less noise is needed for as many steps.
    every = privacy.calibrate(lambda sigma: privacy.sampled_gaussian(sigma, 1.0, 100), 2.0, 1e-5)
    assert sigma < every == pytest.approx(10 * privacy.calibrate(privacy.gaussian, 2.0, 1e-5), rel=0.01)


def test_bad_arguments():
    with pytest.raises(ValueError, match="delta"):
        privacy.epsilon(None, 0.0)
    with pytest.raises(ValueError, match="budget"):
        privacy.calibrate(lambda sigma: sigma, -1.0, 1e-5)
