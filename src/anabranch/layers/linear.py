"""Matrices of a network that only runs: in f32, or in int8 with a scale for each output.

>>> import jax
>>> w = jax.random.normal(jax.random.PRNGKey(0), (64, 32))
>>> x = jax.random.normal(jax.random.PRNGKey(1), (3, 64))
>>> exact, rounded = Linear(w)(x), quantise(Linear(w))(x)
>>> bool(jnp.abs(rounded - exact).max() < 0.01 * jnp.abs(exact).max())
True
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float, Int8, Int32


class Linear(eqx.Module):
    """y = x w + b. The weights are stored (in, out), which matrix products of unrolled layers read fastest."""

    w: Float[Array, "in out"]
    b: Float[Array, " out"] | None = None
    calm: bool = eqx.field(static=True, default=False)
    """Whether no input stands out so far among the others that rounding to int8 costs them much."""

    def __call__(self, x: Float[Array, "T in"]) -> Float[Array, "T out"]:
        y = x @ self.w
        return y if self.b is None else y + self.b


class Int8Linear(eqx.Module):
    """y = x w + b where w is int8 with a scale for each output.

    Each row of x is written as two rows of int8 with one scale, the second for what the first leaves, so that little
    more than the rounding of w is lost; where inputs are `calm`, the first alone. Sums are exact, in int32: a row gives
    the same alone and among others.
    """

    w: Int8[Array, "in out"]
    scale: Float[Array, " out"]
    b: Float[Array, " out"] | None = None
    calm: bool = eqx.field(static=True, default=False)

    def __call__(self, x: Float[Array, "T in"]) -> Float[Array, "T out"]:
        step = jnp.maximum(jnp.abs(x).max(-1, keepdims=True), 1e-30) / 127
        high = jnp.round(x / step)
        if self.calm:
            y = _product(high.astype(jnp.int8), self.w)
        else:
            low = jnp.round((x / step - high) * FINER)
            rows = jnp.stack([high, low], axis=-2).astype(jnp.int8)
            y = _product(rows.reshape(-1, x.shape[-1]), self.w).reshape(len(x), 2, -1)
            y = y[:, 0] + y[:, 1] / FINER
        y = y * (step * self.scale)
        return y if self.b is None else y + self.b


FINER = 254
"""Steps of the second row in one of the first."""


def _dot(rows: Int8[Array, "T in"], w: Int8[Array, "in out"]) -> Int32[Array, "T out"]:
    return lax.dot_general(rows, w, (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32)


@custom_vmap
def _product(rows: Int8[Array, "T in"], w: Int8[Array, "in out"]) -> Int32[Array, "T out"]:
    # XLA's CPU backend is slow with one row in int8, and two cost hardly more.
    return _dot(jnp.pad(rows, ((0, 1), (0, 0))), w)[:1] if len(rows) == 1 else _dot(rows, w)


@_product.def_vmap
def _of_many(size, batched, rows, w):
    """Streams side by side are more rows: none of them has to be filled up."""
    if batched[1]:
        return jax.vmap(_dot, (0 if batched[0] else None, 0))(rows, w), True
    return _product(rows.reshape(-1, rows.shape[-1]), w).reshape(size, -1, w.shape[1]), True


def quantise(linear: Linear) -> Int8Linear:
    """Round weights to the nearest of 255 levels for each output; those of several matrices may be stacked."""
    scale = jnp.maximum(jnp.abs(linear.w).max(-2), 1e-30) / 127
    return Int8Linear(jnp.round(linear.w / scale[..., None, :]).astype(jnp.int8), scale, linear.b, linear.calm)
