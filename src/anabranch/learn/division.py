"""Wang, Liu, et al.: DIVISION: Memory Efficient Training via Dual Activation Precision. ICML 2023.

Training keeps the input of every layer for the backward pass, and these activations fill the memory. Here each feature
map is kept as two parts instead: its low frequencies, which are means over blocks of 8 x 8 pixels in bfloat16, and what
remains, rounded at random to 2 bits. The forward pass is exact, and so are the gradients that go from a convolution to
its input; the gradients of weights see the map that was restored. Since rounding up or down at random is right on
average, the gradient of a convolution's weights has no bias; that of a batch normalisation is only nearly right.

`Division` is a `Backprop`: it stands wherever a gradient is asked for, as in `fit(Division(loss), net, ...)` or
`Sgd(net, optimizer, Division(loss))`, and works on networks made of the layers of `anabranch.models.resnet`; layers of
other kinds stay as they are. It has no state.

What differs from the authors' code: smallest value and step are stored in bfloat16 rounded outwards, and the map is
rounded with the stored ones, so that nothing is clipped.

    >>> codec = Codec()
    >>> x = jax.random.normal(jax.random.PRNGKey(0), (1, 3, 32, 32))
    >>> packed = codec.compress(x, jax.random.PRNGKey(1))
    >>> codec.decompress(packed).shape, x.nbytes // sum(leaf.nbytes for leaf in jax.tree.leaves(packed))
    ((1, 3, 32, 32), 14)
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, BFloat16, Float, PRNGKeyArray, PyTree, UInt8

from anabranch.cell import Event, Maybe, noise
from anabranch.fit import Backprop, M
from anabranch.learn.base import Sgd, cross_entropy
from anabranch.models.resnet import BatchNorm2d, Conv2d, ReLU, ResNet


class Packed(eqx.Module):
    """A feature map as it is kept: N images of C channels, H x W pixels."""

    low: BFloat16[Array, "N C h w"]
    """Means of blocks."""
    levels: UInt8[Array, "N C bytes"]
    """What remains, as numbers of steps, several to a byte, the first in the lowest bits."""
    minimum: BFloat16[Array, "N C"]
    step: BFloat16[Array, "N C"]
    size: tuple[int, int] = eqx.field(static=True)
    """(H, W)."""


def pool(x: Float[Array, "N C H W"], block: int) -> Float[Array, "N C h w"]:
    """Means of blocks that do not overlap; a block is no larger than the image, and a rim too small for one is left."""
    *lead, H, W = x.shape
    a, b = min(block, H), min(block, W)
    return x[..., : H // a * a, : W // b * b].reshape(*lead, H // a, a, W // b, b).mean((-3, -1))


def upsample(low: Float[Array, "N C h w"], size: tuple[int, int]) -> Float[Array, "N C H W"]:
    """The nearest value for each pixel; where sizes do not divide, blocks are stretched over the whole image."""
    rows, columns = (np.arange(n) * m // n for n, m in zip(size, low.shape[-2:], strict=True))
    return low[..., rows[:, None], columns]


@dataclass(frozen=True)
class Codec:
    """How a feature map is kept: block means, and the rest in a few bits a pixel.

    Raises:
        ValueError: if `bits` is not 1, 2, 4 or 8, or the block is empty.
    """

    block: int = 8
    """Side of the square over which a mean is taken, in pixels."""
    bits: int = 2

    def __post_init__(self):
        if self.bits not in (1, 2, 4, 8):
            raise ValueError(f"bits must be 1, 2, 4 or 8, got {self.bits}")
        if self.block < 1:
            raise ValueError(f"block must be at least 1, got {self.block}")

    def compress(self, x: Float[Array, "N C H W"], key: PRNGKeyArray | None) -> Any:
        """A map to keep; without a key it is rounded to the nearest step, which is biased. Single pixels stay whole."""
        size = x.shape[-2], x.shape[-1]
        if size == (1, 1):
            return x
        low = pool(x, self.block).astype(jnp.bfloat16)
        # The rest of the rounded means: it then holds the error of their rounding, too.
        rest = x - upsample(low.astype(jnp.float32), size)
        least, most = rest.min((-2, -1)), rest.max((-2, -1))
        # Half a unit of bfloat16 is at most 2^-8 of a value: 2^-7 outwards, the stored range covers all pixels.
        minimum = (least - jnp.abs(least) / 128).astype(jnp.bfloat16)
        span = most - minimum.astype(jnp.float32)
        step = (span / (2**self.bits - 1) * (1 + 1 / 128)).astype(jnp.bfloat16)
        offset = 0.5 if key is None else jax.random.uniform(key, x.shape)
        divisor = jnp.where(step > 0, step, 1).astype(jnp.float32)
        level = (rest - minimum.astype(jnp.float32)[..., None, None]) / divisor[..., None, None]
        level = jnp.clip(jnp.floor(level + offset), 0, 2**self.bits - 1).astype(jnp.uint8)
        return Packed(low, self._pack(level.reshape(*x.shape[:-2], -1)), minimum, step, size)

    def decompress(self, packed: Any) -> Float[Array, "N C H W"]:
        """The map, nearly as it was."""
        if not isinstance(packed, Packed):
            return packed
        H, W = packed.size
        level = self._unpack(packed.levels)[..., : H * W].astype(jnp.float32)
        rest = level * packed.step[..., None].astype(jnp.float32) + packed.minimum[..., None].astype(jnp.float32)
        return upsample(packed.low.astype(jnp.float32), packed.size) + rest.reshape(*rest.shape[:-1], H, W)

    def _pack(self, level: UInt8[Array, "N C pixels"]) -> UInt8[Array, "N C bytes"]:
        share = 8 // self.bits
        level = jnp.pad(level, [(0, 0)] * (level.ndim - 1) + [(0, -level.shape[-1] % share)])
        level = level.reshape(*level.shape[:-1], -1, share) << self._shifts()
        return level.sum(-1, dtype=jnp.uint8)

    def _unpack(self, packed: UInt8[Array, "N C bytes"]) -> UInt8[Array, "N C pixels"]:
        level = packed[..., None] >> self._shifts() & jnp.uint8(2**self.bits - 1)
        return level.reshape(*packed.shape[:-1], -1)

    def _shifts(self) -> UInt8[Array, " share"]:
        return jnp.arange(0, 8, self.bits, dtype=jnp.uint8)


def _barrier(kept: PyTree, g: Array) -> tuple[PyTree, Array]:
    """Keeps the compiler from restoring a map before its gradient is there, which would keep all of them at once."""
    arrays, static = eqx.partition(kept, eqx.is_array)
    arrays, g = jax.lax.optimization_barrier((arrays, g))
    return eqx.combine(arrays, static), g


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def conv2d_div(codec: Codec, layer: Conv2d, x: Float[Array, "N in H W"], key: PRNGKeyArray) -> Array:
    """A convolution that keeps its input compressed."""
    return layer(x)


def _conv2d_forward(codec, layer, x, key):
    return layer(x), (layer, codec.compress(x, key))


def _conv2d_backward(codec, kept, g):
    (layer, packed), g = _barrier(kept, g)
    # A convolution is linear in either argument: the gradient of the input needs the weights alone.
    _, pull = jax.vjp(lambda layer, x: layer(x), layer, codec.decompress(packed))
    return (*pull(g), None)


conv2d_div.defvjp(_conv2d_forward, _conv2d_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def batchnorm_div(codec: Codec, layer: BatchNorm2d, x: Float[Array, "N C H W"], key: PRNGKeyArray) -> Array:
    """A batch normalisation that keeps its input compressed, its mean and variance exact."""
    return layer(x)


def _batchnorm_forward(codec, layer, x, key):
    mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3))
    return layer(x), (layer, mean, jax.lax.rsqrt(variance + layer.eps), codec.compress(x, key))


def _batchnorm_backward(codec, kept, g):
    (layer, mean, inverse, packed), g = _barrier(kept, g)
    normal = (codec.decompress(packed) - mean[:, None, None]) * inverse[:, None, None]
    scale, shift = (g * normal).sum((0, 2, 3)), g.sum((0, 2, 3))
    n = g.size / len(mean)
    toward = g - (shift / n)[:, None, None] - normal * (scale / n)[:, None, None]
    return BatchNorm2d(scale, shift, layer.eps), (layer.scale * inverse)[:, None, None] * toward, None


batchnorm_div.defvjp(_batchnorm_forward, _batchnorm_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def relu_div(codec: Codec, layer: ReLU, x: Float[Array, "N C H W"], key: PRNGKeyArray) -> Array:
    """max(x, 0), of which one bit a pixel is kept."""
    return layer(x)


def _relu_forward(codec, layer, x, key):
    return layer(x), (layer, jnp.packbits((x > 0).reshape(len(x), -1), axis=-1))


def _relu_backward(codec, kept, g):
    layer, packed = kept
    positive = jnp.unpackbits(packed, axis=-1, count=g[0].size).reshape(g.shape)
    return layer, jnp.where(positive > 0, g, 0), None


relu_div.defvjp(_relu_forward, _relu_backward)

KINDS: dict[type, Callable] = {Conv2d: conv2d_div, BatchNorm2d: batchnorm_div, ReLU: relu_div}


class Divided(eqx.Module):
    """A layer of one of the `KINDS` that keeps less."""

    layer: Any
    key: PRNGKeyArray
    codec: Codec = eqx.field(static=True)

    def __call__(self, x: Float[Array, "N C H W"]) -> Array:
        return KINDS[type(self.layer)](self.codec, self.layer, x, self.key)


class Division(Backprop):
    """Backpropagation that keeps activations at two precisions; see the module."""

    exact = False

    codec: Codec = eqx.field(static=True, default=Codec())

    def compressed(self, model: Any, batch: Any, key: PRNGKeyArray) -> Float[Array, ""]:
        """The loss of the model with exchanged layers: the same value, other gradients."""

        def is_layer(node: Any) -> bool:
            return type(node) in KINDS

        leaves, structure = jax.tree.flatten(model, is_leaf=is_layer)
        leaves = [
            Divided(leaf, noise(key, i, "division"), self.codec) if is_layer(leaf) else leaf
            for i, leaf in enumerate(leaves)
        ]
        return self.loss(jax.tree.unflatten(structure, leaves), batch, key)

    def value_and_grad(self, model: M, batch: Any, key: PRNGKeyArray) -> tuple[Float[Array, ""], M]:
        return eqx.filter_value_and_grad(self.compressed)(model, batch, key)

    def activation_bytes(self, model: Any, batch: tuple[Float[Array, "N C H W"], Any]) -> int:
        """Bytes that are kept for the backward pass and grow with the batch; nothing is run."""
        params, static = eqx.partition(model, eqx.is_inexact_array)

        def backward(params, batch):
            return jax.vjp(lambda p: self.compressed(eqx.combine(p, static), batch, jax.random.PRNGKey(0)), params)[1]

        def total(rows: int) -> int:
            some = jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), batch)
            kept = jax.tree.leaves(jax.eval_shape(backward, params, some))
            return sum(leaf.size * leaf.dtype.itemsize for leaf in kept)

        rows = len(batch[0])
        return total(2 * rows) - total(rows)  # weights, which are kept too, cancel


def example() -> tuple[Sgd, Event]:
    """A small residual network that learns from twelve batches of four images."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(12, 4, 1, 8, 8)).astype(np.float32)
    label = (x.mean((2, 3, 4)) > 0).astype(np.int32)
    net = ResNet(4, (2,), classes=2, key=jax.random.PRNGKey(0))
    cell = Sgd(net, optax.sgd(1e-3), Division(cross_entropy))
    return cell, Event(x, Maybe(label, np.ones(12, bool)), np.ones(12, np.float32))
