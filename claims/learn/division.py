"""DIVISION keeps a tenth of the activations and loses neither accuracy nor the direction of the gradient.

Two networks on the digits of MNIST, padded to 32 x 32: a residual one (depth 8, widths 4-8-16) with batch
normalisation, and a plain one of six convolutions (widths 4 to 16) with max-pooling and a linear layer. 4,000 rows to
train, 2,000 to test, Adam on batches of 64 for 80 and 120 steps. Baselines: exact backpropagation; 2 bits without the
means of blocks, in groups of 256 values as other methods do; the means alone, without the rest; blocks that are
checkpointed, for their bytes and seconds. For three minutes on two cores the networks (depth 14, widths 16-32-64 were
planned), the data (8,000) and the training (8 passes) are smaller; bytes are counted for the full-size network as well.

Bytes are those that the layers keep for the backward pass. The exact ones are the inputs of convolutions, of linear
layers and of normalisations in 4 bytes, and a bit a pixel for ReLU and two for pooling, each kept once. The compiler's
own count is reported beside them: on these small networks it is mostly what one layer needs while it works.

Cosines are those of single gradients, on five batches a seed, at the weights that exact training ends with. What they
miss is chance, not error, as the tests of the method show.

The claim fails on its cosines, and for a reason: 86 % of the pixels of these digits, and of their maps after ReLU, are
exactly 0. Without the means of blocks, 0 is the lowest level and is kept exactly; the means move it between levels, and
the noise of the map has 8 times the variance. On maps before ReLU and on smooth images the means do lower the noise.
Accuracies of 4 seeds after so short a training spread too far to show a difference of half a point.
"""

import statistics
import time
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from anabranch import data, noise
from anabranch.claim import Comparison, Size
from anabranch.fit import Backprop, Epochs
from anabranch.learn.division import Codec, Division, Linear, MaxPool2d, Packed, kept_bytes, linear_div
from anabranch.models.resnet import Conv2d, ReLU, ResNet, cross_entropy

FIRST_SEED = 100  # those below were used while writing
BATCH = 64


class Stage(eqx.Module):
    """Layers one after the other."""

    layers: tuple[Any, ...]

    def __call__(self, x: Float[Array, "N C H W"]) -> Float[Array, "N c h w"]:
        for layer in self.layers:
            x = layer(x)
        return x


class Plain(eqx.Module):
    """Two convolutions a stage, each stage half the size, and a linear layer on all that is left."""

    blocks: tuple[Stage, ...]
    head: Linear

    def __init__(self, widths: tuple[int, ...], *, key: PRNGKeyArray):
        he, blocks, before = jax.nn.initializers.he_normal(in_axis=1, out_axis=0), [], 1
        for i, width in enumerate(widths):
            first = Conv2d(he(noise(key, i, "first"), (width, before, 3, 3)))
            second = Conv2d(he(noise(key, i, "second"), (width, width, 3, 3)))
            blocks.append(Stage((first, ReLU(), second, ReLU(), MaxPool2d())))
            before = width
        self.blocks = tuple(blocks)
        left = before * (32 >> len(widths)) ** 2
        self.head = Linear(he(noise(key, 0, "head"), (10, left)), jnp.zeros(10))

    def __call__(self, x: Float[Array, "N 1 32 32"]) -> Float[Array, "N 10"]:
        for block in self.blocks:
            x = block(x)
        return self.head(x.reshape(len(x), -1))


class Checkpointed(eqx.Module):
    """A block that keeps its input only and is computed again on the way back."""

    block: Any

    def __call__(self, x: Float[Array, "N C H W"]) -> Float[Array, "N c h w"]:
        return eqx.filter_checkpoint(self.block)(x)


def checkpointed(net: Any) -> Any:
    """The network, with its blocks checkpointed."""
    return eqx.tree_at(lambda net: net.blocks, net, tuple(Checkpointed(block) for block in net.blocks))


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


def update(backprop: Backprop, model: Any, opt: Any, batch: Any, key: PRNGKeyArray) -> tuple[Any, Any, Any]:
    """A step of training, and the gradient it took."""
    _, grads = backprop.value_and_grad(model, batch, key)
    updates, opt = ADAM.update(grads, opt)
    return eqx.apply_updates(model, updates), opt, grads


def compiled(backprop: Backprop, model: Any) -> tuple[Any, float]:
    """`update` for a method and a network, as a function of all else, and its temporary memory in MiB."""
    arrays, static = eqx.partition(model, eqx.is_array)

    def step(arrays, opt, batch, key):
        model, opt, grads = update(backprop, eqx.combine(arrays, static), opt, batch, key)
        return eqx.filter(model, eqx.is_array), opt, grads

    batch = jnp.zeros((BATCH, 1, 32, 32)), jnp.zeros(BATCH, jnp.int32)
    program = jax.jit(step).lower(arrays, ADAM.init(arrays), batch, jax.random.PRNGKey(0)).compile()
    analysis: Any = program.memory_analysis()
    return program, analysis.temp_size_in_bytes / 2**20


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
        return jax.grad(lambda layer: (jnp.asarray(linear_div(Codec(), layer, x, key)) * target).sum())(layer).weight

    errors = jax.lax.map(lambda key: jnp.vdot(drawn(key) - exact, exact), jax.random.split(key, draws))
    return float(abs(errors.mean()) / (errors.std() / draws**0.5))


def measure(name: str, make: Any, steps: int, size: Size) -> list[Comparison]:
    """Accuracy in per cent, cosines to the exact gradient, and seconds of an update, of one network."""
    net = make(jax.random.PRNGKey(0))
    ways = {way: (*compiled(backprop, net), net) for way, backprop in METHODS.items()}
    ways["checkpoint"] = (*compiled(METHODS["exact"], checkpointed(net)), checkpointed(net))
    rates: dict[str, list[float]] = {way: [] for way in ("division", "exact")}
    cosines: dict[str, list[float]] = {way: [] for way in ("division", "groups", "means")}
    rows = (200, 400) if size.smoke else (4000, 2000)
    arrays = opt = None
    for seed in size.seeds(4):
        key = jax.random.PRNGKey(FIRST_SEED + seed)
        learned, tested = digits(FIRST_SEED + seed, *rows)
        batch, fresh = eqx.filter_jit(Epochs(learned, BATCH, noise(key, 0, "rows"))), make(key)
        for way, found in rates.items():
            arrays = eqx.filter(fresh, eqx.is_array)
            opt = ADAM.init(arrays)
            for i in range(steps):
                arrays, opt, _ = ways[way][0](arrays, opt, batch(key, i), noise(key, i, "train"))
            found.append(float(accuracy(eqx.combine(arrays, fresh), *tested)))
        for way, found in cosines.items():  # `arrays` are those of exact training
            values = []
            for i in range(steps, steps + (1 if size.smoke else 5)):
                exact, mine = (ways[w][0](arrays, opt, batch(key, i), noise(key, i))[2] for w in ("exact", way))
                values.append(cosine(mine, exact))
            found.append(statistics.fmean(values))

    seconds: dict[str, list[float]] = {way: [] for way in ("division", "exact", "checkpoint")}
    some = jnp.zeros((BATCH, 1, 32, 32)), jnp.zeros(BATCH, jnp.int32)
    for _ in range(2 if size.smoke else 10):
        for way, found in seconds.items():
            program, _, model = ways[way]
            arrays = eqx.filter(model, eqx.is_array)
            start = time.perf_counter()
            jax.block_until_ready(program(arrays, ADAM.init(arrays), some, jax.random.PRNGKey(0)))
            found.append(time.perf_counter() - start)

    nearest = [max(pair) for pair in zip(cosines["groups"], cosines["means"], strict=True)]
    means = ", ".join(f"{way} {statistics.fmean(values):.3f}" for way, values in cosines.items())
    memory = ", ".join(f"{way} {way_memory:.1f}" for way, (_, way_memory, _) in ways.items())
    slower = statistics.median(seconds["checkpoint"]) / statistics.median(seconds["exact"])
    zeros = [0.0] * len(nearest)
    return [
        Comparison(f"{name}: accuracy above exact, points", rates["division"], rates["exact"], -0.5, paper="no loss"),
        Comparison(f"{name}: accuracy below exact, points", rates["exact"], rates["division"], -0.5),
        Comparison(f"{name}: cosine to the exact gradient", cosines["division"], zeros, 0.95, note=means),
        Comparison(f"{name}: cosine above the better of groups and means", cosines["division"], nearest, 0.0),
        Comparison(
            f"{name}: seconds of an update",
            seconds["division"],
            seconds["exact"],
            2.5,
            "ratio",
            "lower",
            "competitive throughput",
            f"checkpointed blocks {slower:.2f} times exact; compiled temporary memory, {BATCH} images, MiB: {memory}",
        ),
    ]


def kept(nets: list[Any]) -> Comparison:
    """Bytes of activations an image."""
    some = jnp.zeros((BATCH, 1, 32, 32)), jnp.zeros(BATCH, jnp.int32)
    ours, exact = Division(cross_entropy), Division(cross_entropy, Everything())
    blocks = [round(kept_bytes(cross_entropy, checkpointed(net), some) / BATCH) for net in nets]
    return Comparison(
        "activation bytes an image (the two networks, full-size)",
        [ours.activation_bytes(net, some) / BATCH for net in nets],
        [exact.activation_bytes(net, some) / BATCH for net in nets],
        0.12,
        "ratio",
        "lower",
        "over 10 times fewer bytes for activations",
        f"checkpointed blocks keep {', '.join(map(str, blocks))}",
    )


def experiment(size: Size) -> list[Comparison]:
    """Two networks, their bytes, and the bias of one convolution."""
    nets: dict[str, tuple[Any, int]] = {"plain": (lambda key: Plain((4, 8, 16), key=key), 120)}
    if size.smoke:
        nets = {"plain": (lambda key: Plain((2,), key=key), 2)}
    else:
        nets["residual"] = lambda key: ResNet(8, (4, 8, 16), key=key), 80
    made = [make(jax.random.PRNGKey(0)) for make, _ in nets.values()]
    found = [kept(made if size.smoke else [*made, ResNet(key=jax.random.PRNGKey(0))])]
    for name, (make, steps) in nets.items():
        found += measure(name, make, steps, size)
    bias = deviation(50 if size.smoke else 500, jax.random.PRNGKey(1))
    return [*found, Comparison("bias, standard errors", [bias], [0.0], 3.0, better="lower")]
