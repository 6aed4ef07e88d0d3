"""Dual propagation learns as well as back-propagation, at about the same cost, and far faster than two-phase learning.

The digits that MNIST tests with, 8,000 to train and 2,000 to test, drawn anew for each seed: a perceptron
784-256-256-10, for β = 0.1 and 1, and a network of three convolutions (16, 32, 64 channels, stride 2 instead of
pooling: a third of the time), cross-entropy, Adam at 1e-3, 10 passes of batches of 100; all methods with the same
weights, batches and optimiser. In a normal run the convolutional network has two seeds and three passes. Then the
electricity stream, every event predicted and then learned, by a perceptron 8-64-2.

The two-phase baseline is equilibrium propagation with 20 relaxation steps in each phase, of which only the cost is
compared. It is written in the same way as the others: the same layers, all examples at once, each gradient compiled as
a whole. It is timed on the perceptron alone: on a CPU convolutions in a compiled loop are far slower than outside of
one, which would be held against it.
"""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from anabranch import Event, Maybe
from anabranch.claim import Comparison, Size
from anabranch.data import mnist
from anabranch.fit import Backprop
from anabranch.learn.base import Sgd, cross_entropy
from anabranch.learn.dual_propagation import DualProp, Network
from anabranch.learn.streams import elec2

FIRST_SEED = 100  # those below were used while writing
BATCH, RELAXATION = 100, 20
ADAM = optax.adam(1e-3)  # one object, so that what it is compiled into is compiled once
OURS, BACKPROP = DualProp(cross_entropy, beta=0.1), Backprop(cross_entropy)


class TwoPhase(Backprop):
    """Equilibrium propagation: the states relax freely, then nudged, and the weights learn from the difference."""

    def value_and_grad(self, model, batch, key):
        (x, y), beta, rate = batch, 0.1, 0.2
        layers = [jax.vmap(layer) for layer in model.layers]

        def energy(states, nudge):
            below = [x, *map(jax.nn.relu, states[:-1])]
            held = sum(0.5 * jnp.square(s).sum() - (layer(b) * s).sum() for s, layer, b in zip(states, layers, below))
            return held + nudge * len(x) * self.loss(lambda s: s, (states[-1], y), key)

        def relax(states, nudge):
            step = lambda _, s: jax.tree.map(lambda a, g: a - rate * g, s, jax.grad(energy)(s, nudge))
            return jax.lax.fori_loop(0, RELAXATION, step, states)

        start = [x]
        for layer in layers:
            start.append(layer(jax.nn.relu(start[-1])))
        free = relax(start[1:], 0.0)
        nudged = relax(free, beta)

        def contrast(model):
            def phase(states):
                below = [x, *map(jax.nn.relu, states[:-1])]
                return -sum(jnp.vdot(jax.vmap(f)(b), s) for f, b, s in zip(model.layers, below, states))

            return (phase(nudged) - phase(free)) / (beta * len(x))

        return self.loss(lambda s: s, (free[-1], y), key), eqx.filter_grad(contrast)(model)


def perceptron(seed: int, widths: tuple[int, ...] = (784, 256, 256, 10)) -> Network:
    keys = jax.random.split(jax.random.PRNGKey(seed), len(widths) - 1)
    return Network(tuple(eqx.nn.Linear(m, n, key=k) for m, n, k in zip(widths, widths[1:], keys)))


def convolutional(seed: int) -> Network:
    keys, channels = jax.random.split(jax.random.PRNGKey(seed), 4), (1, 16, 32, 64)
    square = eqx.nn.Lambda(lambda x: x.reshape(1, 28, 28))
    first, second, third = (
        eqx.nn.Conv2d(m, n, 3, stride=2, padding=1, key=k) for m, n, k in zip(channels, channels[1:], keys)
    )
    last = eqx.nn.Sequential([eqx.nn.Lambda(jnp.ravel), eqx.nn.Linear(64 * 4 * 4, 10, key=keys[3])])
    return Network((eqx.nn.Sequential([square, first]), second, third, last))


@functools.cache
def compiled(backprop: Backprop) -> Callable:
    return eqx.filter_jit(backprop.value_and_grad)


def seconds(backprop: Backprop, model: Network, batch) -> Callable[[], float]:
    """A function that times one compiled gradient, the best of five."""
    step = compiled(backprop)
    jax.block_until_ready(step(model, batch, jax.random.PRNGKey(0)))

    def once() -> float:
        start = time.perf_counter()
        jax.block_until_ready(step(model, batch, jax.random.PRNGKey(0)))
        return time.perf_counter() - start

    return lambda: min(once() for _ in range(5))


def least_cosine(model: Network, batch) -> float:
    """Of our gradient and that of back-propagation, over the layers."""
    ours, theirs = (compiled(m)(model, batch, jax.random.PRNGKey(0))[1] for m in (OURS, BACKPROP))
    layers = [
        [np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(layer)]) for layer in grads.layers]
        for grads in (ours, theirs)
    ]
    return float(min(a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(*layers)))


@eqx.filter_jit
def update(method: Backprop, model: Any, memory: Any, x, y) -> tuple[Any, Any]:
    grads = method.value_and_grad(model, (x, y), jax.random.PRNGKey(0))[1]
    updates, memory = ADAM.update(grads, memory)
    return eqx.apply_updates(model, updates), memory


def train(method: Backprop, model: Network, x: np.ndarray, y: np.ndarray, seed: int, steps: int) -> Network:
    """Passes in batches, each shuffled anew. Not `fit`: in its compiled loop, convolutions are ten times slower."""
    memory, rng, order = ADAM.init(eqx.filter(model, eqx.is_inexact_array)), np.random.default_rng(seed), []
    for _ in range(steps):
        if not order:
            order = np.split(rng.permutation(len(y)), len(y) // BATCH)
        rows = order.pop()
        model, memory = update(method, model, memory, jnp.asarray(x[rows]), jnp.asarray(y[rows]))
    return model


@eqx.filter_jit
def scores_of(model: Network, x) -> jax.Array:
    return jax.vmap(model)(x)


def digits(build: Callable[[int], Network], methods: dict[str, Backprop], seeds, steps: int):
    """Test accuracies in %, over the seeds, and the least cosine at the first weights."""
    images, labels = mnist()
    images = images.reshape(len(labels), -1)
    found: dict[str, list[float]] = {name: [] for name in methods}
    cosines = []
    for seed in (FIRST_SEED + seed for seed in seeds):
        order = np.random.default_rng(seed).permutation(len(labels))
        x, y = images[order], labels[order]
        cosines.append(least_cosine(build(seed), (jnp.asarray(x[:BATCH]), jnp.asarray(y[:BATCH]))))
        for name, method in methods.items():
            trained = train(method, build(seed), x[:8000], y[:8000], seed, steps)
            right = np.asarray(scores_of(trained, jnp.asarray(x[8000:]))).argmax(1) == y[8000:]
            found[name].append(float(100 * right.mean()))
    return found, min(cosines)


@eqx.filter_jit
def prequential(cell: Sgd, xs, ys) -> jax.Array:
    """Accuracy in % of predicting each event before learning it."""
    events = Event(xs, Maybe(ys, jnp.ones(len(ys), bool)), jnp.ones(len(ys)))
    _, scores = jax.lax.scan(lambda state, event: cell.step(state, event), cell.init(), events)
    return 100 * (scores.argmax(1) == ys).mean()


def electricity(methods: dict[str, Backprop], seeds, length: int) -> dict[str, list[float]]:
    xs, ys = (a[:length] for a in elec2())
    cells = {
        name: [Sgd(perceptron(FIRST_SEED + seed, (8, 64, 2)), ADAM, method) for seed in seeds]
        for name, method in methods.items()
    }
    return {name: [float(prequential(cell, xs, ys)) for cell in row] for name, row in cells.items()}


def gap(task: str, found: dict[str, list[float]], name: str, threshold: float, paper: str = "") -> Comparison:
    """How far apart the mean accuracies are."""
    ours, theirs = statistics.fmean(found[name]), statistics.fmean(found["backprop"])
    note = f"accuracies in %, means of {len(found[name])} seeds: {name} {ours:.2f}, backprop {theirs:.2f}"
    return Comparison(
        f"points between the accuracies, {task}", [abs(ours - theirs)], [0.0], threshold, better="lower", paper=paper,
        note=note,
    )  # fmt: skip


def experiment(size: Size) -> list[Comparison]:
    passes = 80
    methods = {"β = 0.1": OURS, "β = 1": DualProp(cross_entropy, beta=1.0), "backprop": BACKPROP}
    small = {"β = 0.1": OURS, "backprop": BACKPROP}
    dense, dense_cosine = digits(perceptron, methods, size.seeds(5), 20 if size.smoke else 10 * passes)
    comparisons = [
        gap("perceptron, β = 0.1", dense, "β = 0.1", 0.7, "like back-propagation in accuracy and run time"),
        gap("perceptron, β = 1", dense, "β = 1", 0.7),
    ]
    cosine = dense_cosine
    if not size.smoke:
        seeds, steps = (size.seeds(5), 10 * passes) if size.full else (range(2), 3 * passes)
        conv, conv_cosine = digits(convolutional, small, seeds, steps)
        cosine = min(cosine, conv_cosine)
        comparisons.append(gap("three convolutions", conv, "β = 0.1", 0.7))
    stream = electricity(small, size.seeds(5), 2000 if size.smoke else 50_000)
    comparisons.append(gap("electricity", stream, "β = 0.1", 0.5))

    images, labels = mnist()
    batch = jnp.asarray(images[:BATCH].reshape(BATCH, -1)), jnp.asarray(labels[:BATCH])
    nets = [("perceptron", perceptron)] + ([] if size.smoke else [("convolutions", convolutional)])
    for name, build in nets:
        timed = [OURS, BACKPROP] + ([TwoPhase(cross_entropy)] if build is perceptron else [])
        clocks = [seconds(method, build(0), batch) for method in timed]
        ours, plain, *slow = zip(*([clock() for clock in clocks] for _ in range(2 if size.smoke else 20)))
        comparisons.append(
            Comparison(f"step time, ours / back-propagation, {name}", ours, plain, 2.0, kind="ratio", better="lower")
        )
        if slow:
            paper = "earlier contrastive methods over 100 times slower"
            comparisons.append(
                Comparison("step time, two phases / ours", slow[0], ours, 10.0, kind="ratio", paper=paper)
            )
    note = "at the first weights"
    return [*comparisons, Comparison("least cosine of a layer's gradients", [cosine], [0.0], 0.99, note=note)]
