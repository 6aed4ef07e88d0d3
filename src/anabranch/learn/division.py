"""Wang, Liu, et al.: DIVISION: Memory Efficient Training via Dual Activation Precision. ICML 2023.

Training keeps the input of every layer for the backward pass, and these activations fill the memory. Here each feature
map is kept as two parts instead: its low frequencies, which are means over blocks of 8 x 8 pixels in bfloat16, and what
remains, rounded at random to 2 bits. The forward pass is exact, and so are the gradients that go from a convolution or
a linear layer to its input; the gradients of weights see the map that was restored. Since rounding up or down at random
is right on average, the gradient of weights has no bias; that of a batch normalisation over n values has one of 1/n.
A single gradient is a noisy one: four levels span the whole range of what remains, so the noise has about the variance
of the map itself. It averages out over the images of a batch and over steps, and grows from layer to layer on the way
back, since normalisations pass it on. Where most pixels are exactly 0, as after ReLU on digits, a single mean for the
map (`block` as large as it) is less noisy than many: 0 is then a level of its own.

`Division` is a `Backprop`: it stands wherever a gradient is asked for, as in `fit(Division(loss), net, ...)` or
`Sgd(net, optimizer, Division(loss))`, and works on networks made of the layers of `anabranch.models.resnet` and of the
two here; layers of other kinds stay as they are. It has no state.

What differs from the authors' code: smallest value and step are stored in bfloat16 rounded outwards, and the map is
rounded with the stored ones, so that nothing is clipped. Rounding draws 8 bits of chance for each value, which makes it
right on average to 1/512 of a step.

    >>> codec = Codec()
    >>> x = jax.random.normal(jax.random.PRNGKey(0), (1, 3, 32, 32))
    >>> packed = codec.compress(x, jax.random.PRNGKey(1))
    >>> codec.decompress(packed).shape, x.nbytes // sum(leaf.nbytes for leaf in jax.tree.leaves(packed))
    ((1, 3, 32, 32), 14)
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from einops import rearrange
from jaxtyping import Array, BFloat16, Float, PRNGKeyArray, PyTree, UInt8

from anabranch.cell import Event, Maybe, noise
from anabranch.fit import Backprop, Loss, M
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


def dither(key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """What is added before rounding down, to round at random: evenly spaced numbers in (0, 1), of 8 bits each."""
    # Four to a word: drawing words for all values would need more memory than the map.
    words = jax.random.bits(key, (-(-prod(shape) // 4),))
    octets = jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(-1)[: prod(shape)]
    return (octets.reshape(shape).astype(jnp.float32) + 0.5) / 256


def pack(level: UInt8[Array, "... values"], bits: int) -> UInt8[Array, "... bytes"]:
    """Numbers of 1, 2, 4 or 8 bits, several to a byte, the first in the lowest bits."""
    shifts = jnp.arange(0, 8, bits, dtype=jnp.uint8)
    level = jnp.pad(level, [(0, 0)] * (level.ndim - 1) + [(0, -level.shape[-1] % len(shifts))])
    return (level.reshape(*level.shape[:-1], -1, len(shifts)) << shifts).sum(-1, dtype=jnp.uint8)


def unpack(packed: UInt8[Array, "... bytes"], bits: int) -> UInt8[Array, "... values"]:
    """The numbers again, with the zeros that fill the last byte."""
    level = packed[..., None] >> jnp.arange(0, 8, bits, dtype=jnp.uint8) & jnp.uint8(2**bits - 1)
    return level.reshape(*packed.shape[:-1], -1)


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
        offset = 0.5 if key is None else dither(key, x.shape)
        divisor = jnp.where(step > 0, step, 1).astype(jnp.float32)
        level = (rest - minimum.astype(jnp.float32)[..., None, None]) / divisor[..., None, None]
        level = jnp.clip(jnp.floor(level + offset), 0, 2**self.bits - 1).astype(jnp.uint8)
        return Packed(low, pack(level.reshape(*x.shape[:-2], -1), self.bits), minimum, step, size)

    def decompress(self, packed: Any) -> Float[Array, "N C H W"]:
        """The map, nearly as it was."""
        if not isinstance(packed, Packed):
            return packed
        H, W = packed.size
        level = unpack(packed.levels, self.bits)[..., : H * W].astype(jnp.float32)
        rest = level * packed.step[..., None].astype(jnp.float32) + packed.minimum[..., None].astype(jnp.float32)
        return upsample(packed.low.astype(jnp.float32), packed.size) + rest.reshape(*rest.shape[:-1], H, W)


def _barrier(kept: PyTree, g: Array) -> tuple[PyTree, Array]:
    """Keeps the compiler from restoring a map before its gradient is there, which would keep all of them at once."""
    arrays, static = eqx.partition(kept, eqx.is_array)
    arrays, g = jax.lax.optimization_barrier((arrays, g))
    return eqx.combine(arrays, static), g


class Linear(eqx.Module):
    """A linear layer for a whole batch of rows or of sequences."""

    weight: Float[Array, "out in"]
    bias: Float[Array, " out"]

    def __call__(self, x: Float[Array, "N *T in"]) -> Float[Array, "N *T out"]:
        return x @ self.weight.T + self.bias


class MaxPool2d(eqx.Module):
    """The largest of each square of 2 x 2 pixels.

    Raises:
        einops.EinopsError: if height or width are odd.
    """

    def __call__(self, x: Float[Array, "N C H W"]) -> Float[Array, "N C h w"]:
        return _squares(x).max(-1)


def _squares(x: Float[Array, "N C H W"]) -> Float[Array, "N C h w 4"]:
    return rearrange(x, "n c (h a) (w b) -> n c h w (a b)", a=2, b=2)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def linear_div(codec: Codec, layer: Conv2d | Linear, x: Float[Array, "N ..."], key: PRNGKeyArray) -> Array:
    """A convolution or a linear layer that keeps its input compressed.

    Blocks are squares of pixels [N, C, H, W], spans of time [N, T, C], or spans of what was flattened [N, values].
    """
    return layer(x)


def _linear_forward(codec, layer, x, key):
    maps = {2: "n w -> n 1 1 w", 3: "n w c -> n c 1 w", 4: "n c h w -> n c h w"}
    return layer(x), (layer, codec.compress(rearrange(x, maps[x.ndim]), key))


def _linear_backward(codec, kept, g):
    (layer, packed), g = _barrier(kept, g)
    inputs = {2: "n 1 1 w -> n w", 3: "n c 1 w -> n w c", 4: "n c h w -> n c h w"}
    # Linear in either argument: the gradient of the input needs the weights alone.
    _, pull = jax.vjp(lambda layer, x: layer(x), layer, rearrange(codec.decompress(packed), inputs[g.ndim]))
    return (*pull(g), None)


linear_div.defvjp(_linear_forward, _linear_backward)


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


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def maxpool_div(codec: Codec, layer: MaxPool2d, x: Float[Array, "N C H W"], key: PRNGKeyArray) -> Array:
    """The largest of each square, of which its place is kept, 2 bits."""
    return layer(x)


def _maxpool_forward(codec, layer, x, key):
    place = jnp.argmax(_squares(x), -1).astype(jnp.uint8)
    return layer(x), (layer, pack(place.reshape(len(x), -1), 2))


def _maxpool_backward(codec, kept, g):
    layer, packed = kept
    place = unpack(packed, 2)[:, : g[0].size].reshape(g.shape)
    squares = jnp.where(place[..., None] == jnp.arange(4), g[..., None], 0)
    return layer, rearrange(squares, "n c h w (a b) -> n c (h a) (w b)", a=2, b=2), None


maxpool_div.defvjp(_maxpool_forward, _maxpool_backward)

KINDS: dict[type, Callable] = {
    Conv2d: linear_div,
    Linear: linear_div,
    BatchNorm2d: batchnorm_div,
    ReLU: relu_div,
    MaxPool2d: maxpool_div,
}


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

    def activation_bytes(self, model: Any, batch: Any) -> int:
        """Bytes that are kept for the backward pass and grow with the batch; nothing is run."""
        return kept_bytes(self.compressed, model, batch)


def kept_bytes(loss: Loss, model: Any, batch: Any) -> int:
    """Bytes that the backward pass of a loss keeps from the forward pass, and that grow with the rows of the batch."""
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def backward(params, batch):
        return jax.vjp(lambda p: loss(eqx.combine(p, static), batch, jax.random.PRNGKey(0)), params)[1]

    def total(rows: int) -> int:
        some = jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), batch)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(backward, params, some)))

    rows = len(jax.tree.leaves(batch)[0])
    return total(2 * rows) - total(rows)  # weights, which are kept too, cancel


def example() -> tuple[Sgd, Event]:
    """A small residual network that learns from twelve batches of four images."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(12, 4, 1, 8, 8)).astype(np.float32)
    label = (x.mean((2, 3, 4)) > 0).astype(np.int32)
    net = ResNet(4, (2,), classes=2, key=jax.random.PRNGKey(0))
    cell = Sgd(net, optax.sgd(1e-3), Division(cross_entropy))
    return cell, Event(x, Maybe(label, np.ones(12, bool)), np.ones(12, np.float32))
