"""Matrices of a network that only runs: in f32, or in int8 with a scale for each output.

>>> import jax
>>> w = jax.random.normal(jax.random.PRNGKey(0), (64, 32))
>>> x = jax.random.normal(jax.random.PRNGKey(1), (3, 64))
>>> exact, rounded = Linear(w)(x), quantise(Linear(w))(x)
>>> bool(jnp.abs(rounded - exact).max() < 0.01 * jnp.abs(exact).max())
True
"""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, Int32

from anabranch.layers.dot import dot_int8


class Linear(eqx.Module):
    """y = x w + b. The weights are stored (in, out), which matrix products of unrolled layers read fastest."""

    w: Float[Array, "in out"]
    b: Float[Array, " out"] | None = None

    def __call__(self, x: Float[Array, "T in"]) -> Float[Array, "T out"]:
        y = x @ self.w
        return y if self.b is None else y + self.b


class Int8Linear(eqx.Module):
    """y = x w + b where w is int8 with a scale for each output.

    Each row of x is written as two rows of int8 with one scale, the second for what the first leaves, so that little
    more than the rounding of w is lost. XLA's CPU backend is slow with one row in int8, and two cost hardly more. Sums
    are exact, in int32: a row gives the same alone and among others.
    """

    w: Int8[Array, "in out"]
    sums: Int32[Array, " out"]
    """Of w over its inputs."""
    scale: Float[Array, " out"]
    b: Float[Array, " out"] | None = None

    def __call__(self, x: Float[Array, "T in"]) -> Float[Array, "T out"]:
        step = jnp.maximum(jnp.abs(x).max(-1, keepdims=True), 1e-30) / 127
        high = jnp.round(x / step)
        low = jnp.round((x / step - high) * FINER)
        rows = jnp.stack([high, low], axis=-2).astype(jnp.int8)
        y = dot_int8(rows, self.w, self.sums)
        y = (y[:, 0] + y[:, 1] / FINER) * (step * self.scale)
        return y if self.b is None else y + self.b


FINER = 254
"""Steps of the second row in one of the first."""


def quantise(linear: Linear) -> Int8Linear:
    """Round weights to the nearest of 255 levels for each output; those of several matrices may be stacked."""
    scale = jnp.maximum(jnp.abs(linear.w).max(-2), 1e-30) / 127
    w = jnp.round(linear.w / scale[..., None, :]).astype(jnp.int8)
    return Int8Linear(w, w.astype(jnp.int32).sum(-2), scale, linear.b)
