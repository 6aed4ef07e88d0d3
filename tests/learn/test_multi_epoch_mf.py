import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg

from anabranch import contract
from anabranch.fit import fit
from anabranch.learn import multi_epoch_mf
from anabranch.learn.base import cross_entropy
from anabranch.learn.multi_epoch_mf import (
    correlated_noise,
    factorise,
    fft_mechanism,
    from_encoder,
    independent,
    participation_sensitivity,
    passes,
)
from anabranch.learn.privacy import PerExample


def test_contract():
    report = contract.check(*multi_epoch_mf.example(), key=jax.random.PRNGKey(0))
    assert report.ok, report


def test_sensitivity_is_that_of_the_worst_example():
    C = np.tril(np.random.default_rng(0).uniform(size=(6, 6)))  # CᵀC >= 0: the bound is exact
    worst = max(np.linalg.norm(C[:, i::3].sum(1)) for i in range(3))
    assert participation_sensitivity(C, 2) == pytest.approx(worst)
    assert participation_sensitivity(np.eye(6), 3) == pytest.approx(np.sqrt(3))
    # Scaled to sensitivity 1: the inverse of the mixing is the encoder of the release.
    for mechanism in (factorise(12, 3), from_encoder(C, 2), independent(6, 2)):
        encoder = np.linalg.inv(mechanism.mixing)
        assert participation_sensitivity(encoder, mechanism.epochs) == pytest.approx(1.0)


def test_one_epoch_is_the_known_fixed_point():
    n = 24
    A = np.tri(n)
    v = np.diag(scipy.linalg.sqrtm(A.T @ A).real)
    for _ in range(500):
        root = np.sqrt(v)
        v = np.diag(scipy.linalg.sqrtm(root[:, None] * (A.T @ A) * root).real)
    optimum = v.sum() / n
    assert factorise(n, 1).error == pytest.approx(optimum, rel=1e-3)


def test_errors_are_in_order():
    ours, once = factorise(32, 4), from_encoder(np.linalg.inv(factorise(32, 1).mixing), 4)
    assert ours.error < once.error < independent(32, 4).error == pytest.approx(4 * 33 / 2)
    assert ours.error < fft_mechanism(32, 4).error < 2.5 * ours.error
    assert np.allclose(np.triu(ours.mixing, 1), 0)  # noise of the future is not needed


def test_fft_noise_has_the_law_of_the_transform():
    n, rng = 16, np.random.default_rng(0)
    spectrum = np.fft.fft(np.repeat([1.0, 0.0], n))[:, None]
    z = rng.normal(size=(2 * n, 40_000)) + 1j * rng.normal(size=(2 * n, 40_000))
    sums = np.fft.ifft(np.sqrt(spectrum) * z, axis=0, norm="ortho").real[:n]
    mixing = fft_mechanism(n, 1).mixing
    encoder = np.sqrt(spectrum) * np.fft.fft(np.eye(2 * n), norm="ortho")
    ours = np.cumsum(mixing, 0) / np.linalg.norm(encoder[:, :n], axis=0).max()
    np.testing.assert_allclose(ours @ ours.T, np.cov(sums), atol=0.1)
    # And what the encoder keeps of the gradients decodes to their prefix sums.
    decoded = np.fft.ifft(np.sqrt(spectrum) * (encoder[:, :n]), axis=0, norm="ortho").real[:n]
    np.testing.assert_allclose(decoded, np.tri(n), atol=1e-9)


@pytest.mark.parametrize("epochs", [1, 4])
def test_parity_with_jax_privacy(epochs):
    peer = pytest.importorskip("jax_privacy.matrix_factorization")
    from jax_privacy.matrix_factorization import dense, sensitivity

    assert peer is not None
    n = 32
    with jax.enable_x64(True):
        C = dense.optimize(n, epochs=epochs)
        theirs = float(sensitivity.fixed_epoch_sensitivity(C, epochs))
        error = float(jnp.mean(dense.per_query_error(strategy_matrix=C))) * theirs**2
        mine = np.linalg.inv(factorise(n, epochs).mixing)
        assert float(sensitivity.fixed_epoch_sensitivity(jnp.asarray(mine), epochs)) == pytest.approx(1.0, abs=1e-6)
    assert participation_sensitivity(np.asarray(C), epochs) == pytest.approx(theirs, rel=1e-6)
    assert factorise(n, epochs).error == pytest.approx(error, rel=0.02)


def test_noise_of_the_transformation():
    """Its covariance over the steps is that of the mechanism, times clip and noise multiplier, over the batch."""
    mechanism, params = factorise(8, 2), jnp.zeros((200, 100))
    optimizer = correlated_noise(mechanism, 0.5, 3.0, jax.random.PRNGKey(0))
    _, updates = jax.lax.scan(
        lambda state, _: optimizer.update(jnp.zeros((4, 200, 100)), state)[::-1], optimizer.init(params), length=8
    )
    wanted = (0.5 * 3.0 / 4) ** 2 * mechanism.mixing @ mechanism.mixing.T
    np.testing.assert_allclose(np.cov(updates.reshape(8, -1)), wanted, atol=0.03 * wanted.max())


def test_without_noise_it_is_the_clipped_mean_and_the_budget_ends():
    optimizer = correlated_noise(factorise(4, 2), 1.0, 0.0, jax.random.PRNGKey(0))
    grads = {"a": jnp.array([[3.0], [0.3], [jnp.inf]]), "b": jnp.array([[4.0], [0.4], [0.0]])}
    state = optimizer.init({"a": jnp.zeros(1), "b": jnp.zeros(1)})
    for _ in range(4):
        updates, state = optimizer.update(grads, state)
        np.testing.assert_allclose([updates["a"][0], updates["b"][0]], [0.9 / 3, 1.2 / 3], rtol=1e-6)
    assert int(state.rejected) == 4
    updates, _ = optimizer.update(grads, state)
    assert np.isnan(updates["a"]).all()


def test_training_a_classifier():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(640, 4)).astype(np.float32)
    y = (x[:, 0] > x[:, 1]).astype(np.int32)
    batch = passes((x, y), 40, jax.random.PRNGKey(3))
    key = jax.random.PRNGKey(0)
    first, again = batch(key, jnp.int32(1)), batch(jax.random.PRNGKey(9), jnp.int32(17))
    jax.tree.map(np.testing.assert_array_equal, first, again)  # the order of the first pass is that of all
    seen = np.concatenate([np.asarray(batch(key, jnp.int32(i))[0]) for i in range(16)])
    assert len(np.unique(seen, axis=0)) == 640

    optimizer = optax.chain(correlated_noise(factorise(64, 4), 1.0, 1.0, jax.random.PRNGKey(1)), optax.sgd(0.5))
    model = eqx.nn.Linear(4, 2, key=key)
    model, _ = fit(PerExample(cross_entropy), model, batch, optimizer, 64, key=key)
    assert (np.asarray(jax.vmap(model)(x)).argmax(1) == y).mean() > 0.9
    with pytest.raises(FloatingPointError):  # the budget is for 64 steps
        fit(PerExample(cross_entropy), model, batch, optimizer, 66, key=key)


def test_bad_arguments():
    for make in (factorise, fft_mechanism, independent):
        with pytest.raises(ValueError, match="n=10 and epochs=3"):
            make(10, 3)
    with pytest.raises(ValueError, match="clip"):
        correlated_noise(independent(2, 1), 0.0, 1.0, jax.random.PRNGKey(0))
    with pytest.raises(ValueError, match="batch_size"):
        passes(np.zeros(3), 4, jax.random.PRNGKey(0))
