"""Matrices of a network that only runs: in f32, or in int8 with a scale for each output.

>>> import jax
>>> w = jax.random.normal(jax.random.PRNGKey(0), (64, 32))
>>> x = jax.random.normal(jax.random.PRNGKey(1), (3, 64))
>>> exact, rounded = Linear(w)(x), quantise(Linear(w))(x)
>>> bool(jnp.abs(rounded - exact).max() < 0.03 * jnp.abs(exact).max())
True
"""

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float, Int8


class Linear(eqx.Module):
    """y = x w + b. The weights are stored (in, out), which matrix products of unrolled layers read fastest."""

    w: Float[Array, "in out"]
    b: Float[Array, " out"] | None = None

    def __call__(self, x: Float[Array, "T in"]) -> Float[Array, "T out"]:
        y = x @ self.w
        return y if self.b is None else y + self.b


class Int8Linear(eqx.Module):
    """y = x w + b where w is int8 with a scale for each output, and each row of x is rounded to int8 as it comes.

    Sums are exact, in int32: a row gives the same alone and among others.
    """

    w: Int8[Array, "in out"]
    scale: Float[Array, " out"]
    b: Float[Array, " out"] | None = None

    def __call__(self, x: Float[Array, "T in"]) -> Float[Array, "T out"]:
        step = jnp.maximum(jnp.abs(x).max(-1, keepdims=True), 1e-30) / 127
        y = _dot(jnp.round(x / step).astype(jnp.int8), self.w) * (step * self.scale)
        return y if self.b is None else y + self.b


@custom_vmap
def _dot(x, w):
    """int8 (T, in) times int8 (in, out), summed in int32 and returned as f32."""
    one = x.shape[0] == 1
    x = jnp.concatenate([x, x]) if one else x  # XLA's CPU backend multiplies a single row by a scalar loop
    y = lax.dot_general(x, w, (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32)
    return (y[:1] if one else y).astype(jnp.float32)


@_dot.def_vmap
def _(size, batched, x, w):
    if batched == [True, False]:  # rows of all streams go together
        return _dot(x.reshape(-1, x.shape[-1]), w).reshape(*x.shape[:-1], -1), True
    x, w = (a if b else jnp.broadcast_to(a, (size, *a.shape)) for a, b in zip((x, w), batched, strict=True))
    y = lax.dot_general(x, w, (((2,), (1,)), ((0,), (0,))), preferred_element_type=jnp.int32)
    return y.astype(jnp.float32), True


def quantise(linear: Linear) -> Int8Linear:
    """Round weights to the nearest of 255 levels for each output."""
    scale = jnp.maximum(jnp.abs(linear.w).max(0), 1e-30) / 127
    return Int8Linear(jnp.round(linear.w / scale).astype(jnp.int8), scale, linear.b)
