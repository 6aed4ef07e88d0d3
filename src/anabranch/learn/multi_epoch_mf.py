"""Choquette-Choo, McMahan, Rush, Thakurta: Multi-Epoch Matrix Factorization Mechanisms for Private Machine Learning.

arXiv 2211.06530, ICML 2023. The iterates of gradient descent are prefix sums of gradients. Noise that is correlated
over the steps partly cancels in them, and protects as well as independent noise does. Here n steps make k passes over
the data in one fixed order, so that an example takes part in the steps i, i + b, …, i + (k − 1)b, with b = n / k.

With A the lower triangle of ones, G the gradients and Z independent normal noise, what is released is AG + BZ, A = BC;
that is, step t sees G_t + (C⁻¹Z)_t. `factorise` finds the C of least squared error of all prefix sums; `fft_mechanism`
needs no optimisation and is up to about twice as far off. Both give a `Mechanism`; `correlated_noise` is the optax
transformation that clips, adds up, adds the noise, and divides by the size of the batch.

The stream is one of batches of gradients, [B, ...] per parameter; the state holds the noise of all n steps, n times as
much as the parameters. For more than some thousand steps, or large models, the rows would have to be drawn anew.

    >>> mechanism = factorise(16, 4)
    >>> round(mechanism.error, 2), round(independent(16, 4).error, 2)
    (13.47, 34.0)
    >>> optimizer = optax.chain(correlated_noise(mechanism, 1.0, 2.0, jax.random.PRNGKey(0)), optax.sgd(0.5))
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.linalg
import scipy.optimize
from jaxtyping import Array, Float, Float64, Int, PRNGKeyArray, PyTree

from anabranch.cell import Event, Maybe, noise
from anabranch.learn.base import Sgd, cross_entropy
from anabranch.learn.privacy import PerExample, clip_each


class Mechanism(NamedTuple):
    """How noise is correlated over n steps, scaled to protect an example whose gradients are no longer than 1.

    All n steps together then cost what one Gaussian release of sensitivity 1 costs (`privacy.gaussian`).
    """

    mixing: Float64[np.ndarray, "n n"]
    """Lower triangular: step t adds row t of `mixing @ Z`, Z of independent normal rows."""
    epochs: int

    @property
    def error(self) -> float:
        """The variance of the noise in a prefix sum, for noise multiplier 1, mean over the n prefix sums."""
        return float(np.square(np.cumsum(self.mixing, 0)).sum(1).mean())


def participation_sensitivity(C: Float64[np.ndarray, "m n"], epochs: int) -> float:
    """How far the n gradients of one example, none longer than 1, can move C G.

    Exact where CᵀC is not negative between steps that share an example, an upper bound otherwise.

    Raises:
        ValueError: if the n steps do not divide into `epochs`.
    """
    n = C.shape[1]
    b = _steps_per_epoch(n, epochs)
    X = np.abs(C.T @ C)
    return float(np.sqrt(max(X[i::b, i::b].sum() for i in range(b))))


def from_encoder(C: Float64[np.ndarray, "n n"], epochs: int) -> Mechanism:
    """The mechanism of an invertible lower triangular C over `epochs` passes."""
    inverse = scipy.linalg.solve_triangular(C, np.eye(len(C)), lower=True)
    return Mechanism(participation_sensitivity(C, epochs) * inverse, epochs)


def independent(n: int, epochs: int) -> Mechanism:
    """Noise drawn for each step by itself."""
    return from_encoder(np.eye(n), epochs)


@functools.lru_cache
def factorise(n: int, epochs: int) -> Mechanism:
    """The mechanism of least error for n steps in `epochs` passes, by L-BFGS on X = CᵀC.

    X is held to zero between steps that share an example, so that their contributions stay orthogonal, and its diagonal
    to sum 1 over them, so that the sensitivity is 1. Takes some seconds for n = 256; kept in memory.

    Raises:
        ValueError: if the n steps do not divide into `epochs`.
        RuntimeError: if the optimisation does not converge.
    """
    b, t = _steps_per_epoch(n, epochs), np.arange(n)
    workload = np.minimum(n - t[:, None], n - t).astype(float)  # AᵀA
    free = (t[:, None] - t) % b != 0
    start = np.eye(n) / epochs
    # The error grows without bound where X stops being positive; a step beyond is told to be worse than the start.
    beyond = 10 * epochs * np.trace(workload) / n

    def project(direction: Float64[np.ndarray, "n n"]) -> Float64[np.ndarray, "n n"]:
        """What of a direction stays within the constraints."""
        diagonal = np.diag(direction).reshape(epochs, b)
        return np.where(free, (direction + direction.T) / 2, 0) + np.diag((diagonal - diagonal.mean(0)).ravel())

    def error(flat: Float64[np.ndarray, " nn"]) -> tuple[float, Float64[np.ndarray, " nn"]]:
        X = start + project(flat.reshape(n, n))
        try:
            inverse = scipy.linalg.cho_solve(scipy.linalg.cho_factor(X, lower=True), np.eye(n))
        except scipy.linalg.LinAlgError:
            return beyond, np.zeros(n * n)
        spread = workload @ inverse
        return np.trace(spread) / n, -project(inverse @ spread).ravel() / n

    options = {"gtol": 1e-3, "ftol": 0.0, "maxiter": 10_000, "maxfun": 20_000}
    found = scipy.optimize.minimize(error, np.zeros(n * n), jac=True, method="L-BFGS-B", options=options)
    if not found.success:
        raise RuntimeError(f"no factorisation found for n={n}, epochs={epochs}: {found.message}")
    X = start + project(found.x.reshape(n, n))
    # Cholesky gives X = L Lᵀ; turned by half a circle it gives X = CᵀC, C lower triangular.
    C = np.linalg.cholesky(X[::-1, ::-1]).T[::-1, ::-1]
    return from_encoder(C, epochs)


def fft_mechanism(n: int, epochs: int) -> Mechanism:
    """The mechanism that factors prefix sums as a convolution, in the Fourier basis of 2n frequencies.

    The noise of the prefix sums is Re F*√D (z₁ + i z₂) with D the spectrum of n ones and n zeros, which has covariance
    Re F*|D|F. What is kept is the Cholesky factor of that of its differences: the same law, drawn step by step.

    Raises:
        ValueError: if the n steps do not divide into `epochs`.
    """
    b = _steps_per_epoch(n, epochs)
    spectrum = np.fft.fft(np.repeat([1.0, 0.0], n))
    encoder = np.sqrt(spectrum)[:, None] * np.fft.fft(np.eye(2 * n), norm="ortho")[:, :n]
    sensitivity = np.sqrt(epochs) * max(np.linalg.norm(encoder[:, i::b], 2) for i in range(b))
    covariance = scipy.linalg.toeplitz(np.fft.ifft(np.abs(spectrum)).real[:n])
    differences = np.eye(n) - np.eye(n, k=-1)
    return Mechanism(sensitivity * np.linalg.cholesky(differences @ covariance @ differences.T), epochs)


class NoiseState(NamedTuple):
    """The noise of all steps, which of them is next, and how many examples were left out so far."""

    noise: PyTree[Float[Array, "n ..."]]
    step: Int[Array, ""]
    rejected: Int[Array, ""]
    """Examples whose gradient was not finite."""


def correlated_noise(
    mechanism: Mechanism, clip: float, noise_multiplier: float, key: PRNGKeyArray
) -> optax.GradientTransformation:
    """Gradients of B examples, [B, ...] as `PerExample` gives them, to one private mean gradient.

    Private together are the n steps of `mechanism`, on batches of B in one order that repeats (`passes`). After them
    the budget is spent, and every further update is NaN. Whatever follows in an `optax.chain` costs no privacy.

    Args:
        mechanism: over how many steps and passes, and how the noise is correlated.
        clip: the length to which each example's gradient is shortened.
        noise_multiplier: from `privacy.calibrate(privacy.gaussian, ε, δ)`. 0 adds no noise and protects nobody.
        key: a new one for every run: noise used twice cancels.

    Raises:
        ValueError: if `clip` is not positive or `noise_multiplier` is negative.
    """
    if clip <= 0 or noise_multiplier < 0:
        raise ValueError(f"needs clip > 0 and noise_multiplier >= 0, got {clip=} and {noise_multiplier=}")
    n = len(mechanism.mixing)

    def init(params: PyTree) -> NoiseState:
        leaves, structure = jax.tree.flatten(params)
        mixing = jnp.asarray(clip * noise_multiplier * mechanism.mixing, jnp.float32)
        rows = [
            jnp.tensordot(mixing, jax.random.normal(noise(key, i, "noise"), (n, *leaf.shape)), 1)
            for i, leaf in enumerate(leaves)
        ]
        return NoiseState(jax.tree.unflatten(structure, rows), jnp.int32(0), jnp.int32(0))

    def update(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, NoiseState]:
        size = len(jax.tree.leaves(updates)[0])
        total, rejected = clip_each(updates, clip)
        private = jax.tree.map(
            lambda g, rows: jnp.where(state.step < n, g + rows[jnp.minimum(state.step, n - 1)], jnp.nan) / size,
            total,
            state.noise,
        )
        return private, NoiseState(state.noise, state.step + 1, state.rejected + rejected)

    return optax.GradientTransformation(init, update)


def passes(arrays: PyTree, batch_size: int, key: PRNGKeyArray) -> Callable[[PRNGKeyArray, Array], Any]:
    """Batches for `fit` that go through the rows again and again in one order, shuffled once.

    The guarantee rests on this order: an order drawn anew for each pass would void it. The rows that are too few for a
    last batch are never used.

    Raises:
        ValueError: if there are fewer rows than `batch_size`.
    """
    rows = len(jax.tree.leaves(arrays)[0])
    if not 0 < batch_size <= rows:
        raise ValueError(f"batch_size must be between 1 and the number of rows, {rows}, got {batch_size}")
    order = jax.random.permutation(key, rows)
    shuffled = jax.tree.map(lambda leaf: jnp.asarray(leaf)[order], arrays)

    def batch(_: PRNGKeyArray, i: Array) -> Any:
        start = i % (rows // batch_size) * batch_size
        return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, batch_size), shuffled)

    return batch


def _steps_per_epoch(n: int, epochs: int) -> int:
    if epochs < 1 or n < epochs or n % epochs:
        raise ValueError(f"n must be a multiple of epochs, both at least 1, got {n=} and {epochs=}")
    return n // epochs


def example() -> tuple[Sgd, Event]:
    """A linear classifier of two features, learned from 72 events in one private pass."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(72, 2)).astype(np.float32)
    label = (x[:, 0] > 0.2).astype(np.int32)
    optimizer = optax.chain(correlated_noise(factorise(72, 1), 1.0, 0.1, jax.random.PRNGKey(1)), optax.sgd(0.1))
    cell = Sgd(eqx.nn.Linear(2, 2, key=jax.random.PRNGKey(0)), optimizer, PerExample(cross_entropy))
    return cell, Event(x, Maybe(label, np.ones(72, bool)), np.ones(72, np.float32))
