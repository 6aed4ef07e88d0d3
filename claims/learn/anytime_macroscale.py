"""Learning from chunks: waiting moderately beats training at once and training at the end, judged at every moment.

10,000 MNIST digits as 8,000 for the stream and 2,000 to test, in 20 chunks of 400 (`--full` has 50 of 160, whose 16
validation digits make early stopping a matter of luck). The model is a multilayer perceptron with two hidden layers of
64. The cumulative error rate (CER) is the mean over chunks of the test error of the model that serves then: what
waits serves its untrained model meanwhile. Waiting 1 (online) and 20 (offline) are the paper's adversaries; all ways
have the same optimiser, passes (at most 30) and patience (8).

At the best waiting time of the single network, others are reported without a threshold: four networks trained jointly,
an ensemble that grows, a mixture that grows, and with a threshold a single network of four times the parameters. The
paper's CIFAR and language model, FireFly, and monthly chunks of flights are not here.
"""

import statistics
from typing import Any

import equinox as eqx
import jax
import numpy as np

from anabranch import data
from anabranch.claim import Comparison, Size
from anabranch.fit import Backprop
from anabranch.learn.anytime_macroscale import AnytimeLearner, AnytimeReport, GrowingEnsemble, GrowingMoE, newest
from anabranch.learn.anytime_macroscale import anytime_report as report
from anabranch.learn.continual import chunks

FIRST_SEED = 100
PIXELS, CLASSES, WIDTH = 784, 10, 64
LARGE = 217  # four times the parameters of width 64


class Joint(eqx.Module):
    """Several networks trained together, their scores added."""

    members: eqx.nn.MLP

    def __init__(self, count: int, key):
        keys = jax.random.split(key, count)
        self.members = eqx.filter_vmap(lambda key: eqx.nn.MLP(PIXELS, CLASSES, WIDTH, 2, key=key))(keys)

    def __call__(self, x):
        return eqx.filter_vmap(lambda member: member(x))(self.members).sum(0)


def digits(seed: int, count: int, train: int) -> tuple[Any, Any]:
    """`count` chunks of the stream, of equal size, and the test set."""
    images, labels = data.mnist()
    x = images.reshape(-1, PIXELS)
    order = np.random.default_rng(seed).permutation(len(x))
    stream, test = order[:train], order[8000:]
    rows = stream[np.stack(chunks(train, count, seed))]
    return (x[rows], labels[rows]), (x[test], labels[test])


def measure(seed: int, count: int, train: int, model: Any, backprop: Any = None, **ways: Any) -> AnytimeReport:
    """One pass over the stream."""
    stream, test = digits(seed, count, train)
    extra = {} if backprop is None else {"backprop": backprop}
    cell = AnytimeLearner(model, train // count, PIXELS, CLASSES, patience=8, **extra, **ways)
    return report(cell, stream, test, jax.random.PRNGKey(seed))


def experiment(size: Size) -> list[Comparison]:
    """CER in %, of waiting against not waiting, of replay, and of larger models."""
    count, train, epochs = (4, 800, 3) if size.smoke else (50, 8000, 30) if size.full else (20, 8000, 30)
    waits = (1, 2, 4) if size.smoke else (1, 2, 5, 10, 25, 50) if size.full else (1, 2, 5, 10, 20)
    seeds = [FIRST_SEED + seed for seed in size.seeds(4)]

    def single(seed: int, width: int = WIDTH) -> eqx.nn.MLP:
        return eqx.nn.MLP(PIXELS, CLASSES, width, 2, key=jax.random.PRNGKey(seed))

    def run(model: Any, **ways: Any) -> list[AnytimeReport]:
        return [measure(seed, count, train, model(seed), epochs=epochs, **ways) for seed in seeds]

    def cer(reports: list[AnytimeReport]) -> list[float]:
        return [100 * r.cer for r in reports]

    plain = {wait: run(single, wait=wait) for wait in waits}
    replayed = {wait: run(single, wait=wait, replay=count) for wait in (waits[:1] if size.smoke else waits)}
    between = min(waits[1:-1], key=lambda wait: statistics.fmean(cer(plain[wait])))
    best = cer(plain[between])
    large = run(lambda seed: single(seed, LARGE), wait=between)
    updates = count // between
    others = {
        "Ens-4": run(lambda seed: Joint(4, jax.random.PRNGKey(seed)), wait=between),
        "gEns": run(
            lambda seed: GrowingEnsemble(PIXELS, CLASSES, WIDTH, min(updates, 8), key=jax.random.PRNGKey(seed)),
            wait=between,
            backprop=Backprop(newest),
        ),
        "gMoE": run(
            lambda seed: GrowingMoE(PIXELS, CLASSES, WIDTH, min(updates + 1, 8), key=jax.random.PRNGKey(seed)),
            wait=between,
        ),
    }

    def words(name: str, reports: list[AnytimeReport]) -> str:
        memory, compute = (statistics.fmean(getattr(r, field) for r in reports) for field in ("memory", "compute"))
        last = 100 * statistics.fmean(float(r.errors[-1]) for r in reports)
        return (
            f"{name}: CER {statistics.fmean(cer(reports)):.1f} %, last error {last:.1f} %, "
            f"{memory / 1e6:.2f} M parameters in sum, {compute / 1e9:.0f} GFLOP"
        )

    lines = [words(f"wait {wait}", reports) for wait, reports in plain.items()]
    lines += [words(f"wait {wait} with replay", reports) for wait, reports in replayed.items()]
    lines += [words(name, reports) for name, reports in (others | {"four times as large": large}).items()]
    ahead = sum(b <= 0.97 * min(one, end) for b, one, end in zip(best, cer(plain[1]), cer(plain[waits[-1]])))
    paper = "the best is neither to train at once nor at the end; larger models are better from the start"
    share = (
        f"wait {between}, chosen by its mean on the same seeds; 3 % better than both in {ahead} of {len(seeds)} seeds"
    )
    lower: dict[str, Any] = {"kind": "ratio", "better": "lower", "paper": paper}
    one, end = cer(plain[1]), cer(plain[waits[-1]])
    return [
        Comparison("CER, waiting against training at once", best, one, 0.97, note=" | ".join([share, *lines]), **lower),
        Comparison("CER, waiting against training at the end", best, end, 0.97, **lower),
        Comparison("seeds in which waiting is 3 % better than both", [float(ahead)], [0.0], 0.75 * len(seeds)),
        Comparison("CER, four times the parameters against one", cer(large), best, 1.0, **lower),
        Comparison("CER, replay against none, training at once", cer(replayed[1]), one, 1.0, **lower),
    ]
