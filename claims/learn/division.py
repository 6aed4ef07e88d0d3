"""DIVISION keeps a tenth of the activations and loses neither accuracy nor the direction of the gradient.

A residual network (depth 8, widths 8-16-32) with batch normalisation on the digits of MNIST, padded to 32 x 32: 1,000
to train, 2,000 to test, 90 steps of Adam on batches of 64. Baselines: exact backpropagation; 2 bits without the means
of blocks, in groups of 256 pixels as other methods do; the means alone, without the rest. For three minutes on two
cores the network (depth 14, widths 16-32-64 were planned), the data and the training are smaller, and a plain network
of six convolutions and checkpointing of blocks are left out; bytes are measured on the full-size network as well.

Bytes are those that the layers keep for the backward pass. The exact ones are the inputs of convolutions and of
normalisations in 4 bytes, and a bit a pixel for ReLU, each kept once; the compiler's own count is reported beside them.
"""

import statistics
import time
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from anabranch import data, noise
from anabranch.claim import Comparison, Size
from anabranch.fit import Backprop, epochs, fit
from anabranch.learn.division import Codec, Division, Packed, conv2d_div
from anabranch.models.resnet import Conv2d, ResNet, cross_entropy

FIRST_SEED = 100  # those below were used while writing


class Everything(Codec):
    """Keeps the map as it is."""

    def compress(self, x, key):
        return x


class MeansOnly(Codec):
    """Keeps the means of blocks and drops the rest."""

    def compress(self, x, key):
        packed = super().compress(x, key)
        return eqx.tree_at(lambda p: (p.levels, p.minimum, p.step), packed, replace_fn=jnp.zeros_like)


class Groups(Codec):
    """2 bits for 256 values, whatever their place: one mean for the group shifts its range and nothing else."""

    def compress(self, x, key):
        return Grouped(super().compress(x.reshape(len(x), -1, 1, min(256, x[0].size)), key), x.shape[1:])

    def decompress(self, packed):
        return super().decompress(packed.values).reshape(-1, *packed.shape)


class Grouped(eqx.Module):
    """Groups of values, and the shape of the image that they had."""

    values: Packed
    shape: tuple[int, ...] = eqx.field(static=True)


METHODS: dict[str, Backprop] = {
    "division": Division(cross_entropy),
    "exact": Backprop(cross_entropy),
    "groups": Division(cross_entropy, Groups(block=256)),
    "means": Division(cross_entropy, MeansOnly()),
}
ADAM = optax.adam(3e-3)


def digits(seed: int, train: int, test: int) -> tuple[Any, Any]:
    images, labels = data.mnist()
    images = np.pad(images, ((0, 0), (2, 2), (2, 2)))[:, None]
    mine, others = np.split(np.random.default_rng(seed).permutation(len(labels))[: train + test], (train,))
    return (images[mine], labels[mine]), (images[others], labels[others])


@eqx.filter_jit
def gradient(backprop, model, batch, key):
    return backprop.value_and_grad(model, batch, key)[1]


@eqx.filter_jit
def accuracy(model, x, y):
    return 100 * (jnp.argmax(model(x), -1) == y).mean()


def cosine(found: Any, exact: Any) -> float:
    """Between the gradients of the weights of convolutions, the mean over layers."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True)
    layers = [(a, b) for a, b in pairs if a.ndim == 4]
    return statistics.fmean(float(jnp.vdot(a, b) / (jnp.linalg.norm(a) * jnp.linalg.norm(b))) for a, b in layers)


def deviation(draws: int, key: Any) -> float:
    """Of the mean of many gradients of one convolution from the exact one, along it, in standard errors."""
    x, target, w = (
        jax.random.normal(noise(key, i, "bias"), shape) for i, shape in enumerate([(4, 4, 16, 16)] * 2 + [(4, 4, 3, 3)])
    )
    layer = Conv2d(w)
    exact = jax.grad(lambda layer: (layer(x) * target).sum())(layer).weight

    def drawn(key):
        return jax.grad(lambda layer: (jnp.asarray(conv2d_div(Codec(), layer, x, key)) * target).sum())(layer).weight

    errors = jax.lax.map(lambda key: jnp.vdot(drawn(key) - exact, exact), jax.random.split(key, draws))
    return float(abs(errors.mean()) / (errors.std() / draws**0.5))


def times(model: Any, batch: Any, repeats: int) -> tuple[list[float], list[float]]:
    """Seconds of a gradient, ours and exact, in turn."""
    found: dict[str, list[float]] = {"division": [], "exact": []}
    key = jax.random.PRNGKey(0)
    for repeat in range(repeats + 1):
        for name, seconds in found.items():
            start = time.perf_counter()
            jax.block_until_ready(gradient(METHODS[name], model, batch, key))
            if repeat:  # the first compiles
                seconds.append(time.perf_counter() - start)
    return found["division"], found["exact"]


def experiment(size: Size) -> list[Comparison]:
    """Accuracy in per cent, cosines to the exact gradient, bytes, seconds."""
    depth, widths, rows, steps, batches = (4, (4,), 200, 2, 1) if size.smoke else (8, (8, 16, 32), 1000, 90, 5)
    rates: dict[str, list[float]] = {name: [] for name in METHODS}
    cosines: dict[str, list[float]] = {name: [] for name in METHODS if name != "exact"}
    for seed in size.seeds(4):
        key = jax.random.PRNGKey(FIRST_SEED + seed)
        learned, tested = digits(FIRST_SEED + seed, rows, 2 * rows)
        fresh, batch = ResNet(depth, widths, key=key), epochs(learned, 64, noise(key, 0, "rows"))
        models = {
            name: fit(backprop, fresh, batch, ADAM, steps, key=key, check=steps)[0]
            for name, backprop in METHODS.items()
        }
        for name, model in models.items():
            rates[name].append(float(accuracy(model, *tested)))
        for name, found in cosines.items():
            values = []
            for i in range(batches):
                some = batch(key, jnp.int32(steps + i))
                exact = gradient(METHODS["exact"], models["exact"], some, key)
                values.append(cosine(gradient(METHODS[name], models["exact"], some, noise(key, i)), exact))
            found.append(statistics.fmean(values))

    net, some = ResNet(depth, widths, key=jax.random.PRNGKey(0)), (jnp.zeros((64, 1, 32, 32)), jnp.zeros(64, jnp.int32))
    full = net if size.smoke else ResNet(key=jax.random.PRNGKey(0))
    ours, everything = Division(cross_entropy), Division(cross_entropy, Everything())
    kept = [ours.activation_bytes(model, some) / 64 for model in (net, full)]
    whole = [everything.activation_bytes(model, some) / 64 for model in (net, full)]
    compiled = {name: METHODS[name].memory(net, some) / 2**20 for name in ("division", "exact")}
    means = ", ".join(f"{name} {statistics.fmean(values):.2f}" for name, values in rates.items())
    ratio = "10 times fewer bytes for activations on ImageNet"
    memory = ", ".join(f"{name} {value:.1f}" for name, value in compiled.items())
    seconds = times(net, some, 2 if size.smoke else 8)
    nearest = [max(pair) for pair in zip(cosines["groups"], cosines["means"], strict=True)]
    return [
        Comparison(
            "activation bytes an image (small, full-size)",
            kept,
            whole,
            0.12,
            "ratio",
            "lower",
            ratio,
            f"compiled temporary memory, 64 images, MiB: {memory}",
        ),
        Comparison(
            "accuracy above exact, points", rates["division"], rates["exact"], -0.5, paper="no loss", note=means
        ),
        Comparison("accuracy below exact, points", rates["exact"], rates["division"], -0.5),
        Comparison("cosine to the exact gradient", cosines["division"], [0.0] * len(nearest), 0.95),
        Comparison("cosine above the better of groups and means", cosines["division"], nearest, 0.0),
        Comparison("bias, standard errors", [deviation(500, jax.random.PRNGKey(1))], [0.0], 3.0, better="lower"),
        Comparison("seconds of a gradient", *seconds, 2.5, "ratio", "lower", "competitive throughput"),
    ]
