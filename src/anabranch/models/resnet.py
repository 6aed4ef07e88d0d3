"""A small residual network for images, after He et al., "Deep residual learning", CVPR 2016 (its CIFAR-10 networks).

It takes a batch of images and gives the scores of all classes for each:

    >>> net = ResNet(depth=8, widths=(4, 8, 16), key=jax.random.PRNGKey(0))
    >>> net(jnp.zeros((2, 1, 16, 16))).shape
    (2, 10)

Batch normalisation has no running means here: it always normalises by the batch that it is given. The network therefore
has no state, and what it says of an image depends on the other images of the batch; test it on large batches. Since its
layers work on whole batches, a loss calls the network once, as `cross_entropy` below does.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from anabranch.cell import noise


class Conv2d(eqx.Module):
    """A convolution without bias that keeps height and width, or divides them by its stride, rounding up."""

    weight: Float[Array, "out in k k"]
    stride: int = eqx.field(static=True, default=1)

    def __call__(self, x: Float[Array, "N in H W"]) -> Float[Array, "N out h w"]:
        return jax.lax.conv_general_dilated(x, self.weight, (self.stride, self.stride), "SAME")


class BatchNorm2d(eqx.Module):
    """Normalises each channel over the batch and the pixels, then scales and shifts it."""

    scale: Float[Array, " C"]
    shift: Float[Array, " C"]
    eps: float = eqx.field(static=True, default=1e-5)

    def __call__(self, x: Float[Array, "N C H W"]) -> Float[Array, "N C H W"]:
        mean, variance = x.mean((0, 2, 3), keepdims=True), x.var((0, 2, 3), keepdims=True)
        normal = (x - mean) * jax.lax.rsqrt(variance + self.eps)
        return normal * self.scale[:, None, None] + self.shift[:, None, None]


class ReLU(eqx.Module):
    """max(x, 0), as a layer, so that it can be exchanged for another."""

    def __call__(self, x: Float[Array, "N C H W"]) -> Float[Array, "N C H W"]:
        return jax.nn.relu(x)


class Block(eqx.Module):
    """Two convolutions of 3 x 3 around which the input is led: untouched, or by one of 1 x 1 where shapes change."""

    convs: tuple[Conv2d, Conv2d]
    norms: tuple[BatchNorm2d, BatchNorm2d]
    relus: tuple[ReLU, ReLU]
    shortcut: Conv2d | None

    def __call__(self, x: Float[Array, "N in H W"]) -> Float[Array, "N out h w"]:
        y = self.relus[0](self.norms[0](self.convs[0](x)))
        y = self.norms[1](self.convs[1](y))
        return self.relus[1](y + (x if self.shortcut is None else self.shortcut(x)))


class ResNet(eqx.Module):
    """A convolution, stages of residual blocks that halve the image and widen it, the mean over pixels, a linear layer.

    Arguments:
        depth: weight layers, 2 + 2 · stages · (blocks in a stage).
        widths: channels of the stages.
        channels: of the images.
        classes: scores that come out.

    Raises:
        ValueError: if the depth does not fit the number of stages.
    """

    stem: tuple[Conv2d, BatchNorm2d, ReLU]
    blocks: tuple[Block, ...]
    head: eqx.nn.Linear

    def __init__(
        self,
        depth: int = 14,
        widths: tuple[int, ...] = (16, 32, 64),
        channels: int = 1,
        classes: int = 10,
        *,
        key: PRNGKeyArray,
    ):
        stages = len(widths)
        if depth <= 2 or (depth - 2) % (2 * stages):
            raise ValueError(f"depth must be 2 + a multiple of {2 * stages} for {stages} widths, got {depth}")
        he, made = jax.nn.initializers.he_normal(in_axis=1, out_axis=0), iter(range(depth * 2))

        def conv(before: int, after: int, size: int, stride: int = 1) -> Conv2d:
            return Conv2d(he(noise(key, next(made), "resnet"), (after, before, size, size)), stride)

        def norm(width: int) -> BatchNorm2d:
            return BatchNorm2d(jnp.ones(width), jnp.zeros(width))

        self.stem = conv(channels, widths[0], 3), norm(widths[0]), ReLU()
        blocks, before = [], widths[0]
        for stage, width in enumerate(widths):
            for i in range((depth - 2) // (2 * stages)):
                stride = 2 if stage and i == 0 else 1
                convs = conv(before, width, 3, stride), conv(width, width, 3)
                shortcut = conv(before, width, 1, stride) if stride > 1 or before != width else None
                blocks.append(Block(convs, (norm(width), norm(width)), (ReLU(), ReLU()), shortcut))
                before = width
        self.blocks = tuple(blocks)
        self.head = eqx.nn.Linear(before, classes, key=noise(key, next(made), "resnet"))

    def __call__(self, x: Float[Array, "N channels H W"]) -> Float[Array, "N classes"]:
        for layer in (*self.stem, *self.blocks):
            x = layer(x)
        return jax.vmap(self.head)(x.mean((2, 3)))


def cross_entropy(
    model: Any, batch: tuple[Float[Array, "N channels H W"], Int[Array, " N"]], key: Any = None
) -> Float[Array, ""]:
    """Mean loss, in nats, of a model that gives the scores of all classes for a whole batch."""
    x, y = batch
    return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()
