"""Products of int8: the same sums whichever side has a sign, alone, in batches and under jit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anabranch.layers import dot


def matrices(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-128, 128, shape, dtype=np.int8)


def sums(w: np.ndarray) -> np.ndarray:
    return w.sum(-2, dtype=np.int32)


@pytest.mark.parametrize("product", [dot._shifted, dot._signed, dot.dot_int8])
@pytest.mark.parametrize("shape", [(1, 40), (7, 40), (3, 2, 40)])
def test_products_are_exact(product, shape):
    x, w = matrices(*shape), matrices(40, 24, seed=1)
    expected = x.astype(np.int32) @ w.astype(np.int32)
    for way in (product, jax.jit(product)):
        got = way(jnp.asarray(x), jnp.asarray(w), jnp.asarray(sums(w)))
        assert got.dtype == jnp.int32
        np.testing.assert_array_equal(got, expected)


def test_the_largest_sums_are_exact():
    x, w = np.full((2, 300), -128, np.int8), np.full((300, 5), -128, np.int8)
    got = dot._shifted(jnp.asarray(x), jnp.asarray(w), jnp.asarray(sums(w)))
    np.testing.assert_array_equal(got, np.full((2, 5), 300 * 128**2))


@pytest.mark.parametrize("axes", [(0, None, None), (1, None, None), (0, 0, 0), (None, 0, 0), (None, 2, 1)])
def test_under_vmap(axes):
    x, w = matrices(6, 4, 40), matrices(6, 40, 8, seed=1)
    of = lambda array, axis: array[0] if axis is None else np.moveaxis(array, 0, axis)
    x_in, w_in, s_in = (of(array, axis) for array, axis in zip((x, w, sums(w)), axes, strict=True))
    got = jax.vmap(dot._shifted, axes)(jnp.asarray(x_in), jnp.asarray(w_in), jnp.asarray(s_in))
    a, b = (array[:1] if axis is None else array for array, axis in zip((x, w), axes[:2], strict=True))
    np.testing.assert_array_equal(got, np.matmul(a.astype(np.int32), b.astype(np.int32)))


def test_bytes_are_multiplied_as_they_are():
    """The point of it: a CPU gets u8 and s8, and nothing is turned into int32 first."""
    x, w = jnp.asarray(matrices(16, 64)), jnp.asarray(matrices(64, 32, seed=1))
    text = jax.jit(dot._shifted).lower(x, w, jnp.asarray(sums(np.asarray(w)))).as_text()
    line = next(line for line in text.splitlines() if "dot_general" in line)
    assert "tensor<16x64xui8>, tensor<64x32xi8>" in line
