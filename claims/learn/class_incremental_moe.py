"""DE&E keeps old classes without a buffer, where one linear model forgets them.

10,000 MNIST digits as 8,000 for the stream and 2,000 to test, whose classes come one after the other (10x1) or in
pairs (5x2), each example once, in five orders. The features are the first 64 principal components of the pixels of the
stream, scaled to a mean square of 1 and otherwise frozen: simpler than a pretrained vision transformer, and the
speakers of Shakespeare by sentence embeddings are not here. Baselines: a linear softmax learner by SGD, the same with
elastic weight consolidation (EWC) after each task; reported without a threshold: the nearest class mean, and SGD with
200 kept examples of which each event replays one. The rates of SGD, the strength of EWC and the rate of DE&E are the
best of three each, on another order.
"""

import statistics
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from anabranch import Event, Maybe, data
from anabranch.claim import Comparison, Size
from anabranch.learn.class_incremental_moe import DEE
from anabranch.learn.continual import by_class, summary

FIRST_SEED = 100
TUNING_SEED = 0
FEATURES, CLASSES, KEPT = 64, 10, 200
Split = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def features(seed: int, train: int) -> Split:
    """Inputs and labels of the stream, and of the test set."""
    images, labels = data.mnist()
    x = images.reshape(len(images), -1)
    order = np.random.default_rng(seed).permutation(len(x))
    stream, test = order[:train], order[8000:]
    mean = x[stream].mean(0)
    axes = np.linalg.svd(x[stream] - mean, full_matrices=False)[2][:FEATURES]
    z = (x - mean) @ axes.T
    z /= np.sqrt((z[stream] ** 2).mean())
    return z[stream].astype(np.float32), labels[stream], z[test].astype(np.float32), labels[test]


def rows(R: list[np.ndarray], tasks: list[np.ndarray], y: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """What the predictions for the test set after each task say."""
    groups = [np.isin(truth, np.unique(y[task])) for task in tasks]
    return summary(np.array([[(guess == truth)[group].mean() for group in groups] for guess in R]))


def dee(split: Split, tasks: list[np.ndarray], seed: int, rate: float, key_rate: float = 5e-5) -> dict[str, float]:
    """Ours."""
    x, y, test, truth = split
    cell = DEE(FEATURES, CLASSES, learning_rate=rate, key_rate=key_rate)
    state, guesses = cell.init(key=jax.random.PRNGKey(seed)), []
    for task in tasks:
        n = len(task)
        events = Event(jnp.asarray(x[task]), Maybe(jnp.asarray(y[task]), jnp.ones(n, bool)), jnp.ones(n))
        state = _learn(cell, _pad(events), state)
        guesses.append(np.asarray(_ask(cell, state, test)))
    return rows(guesses, tasks, y, truth)


def _pad(events: Event) -> Event:
    """With events of no label up to a power of two: tasks of about one size compile once."""
    size = max(64, 1 << (len(events.weight) - 1).bit_length())
    return jax.tree.map(lambda leaf: jnp.pad(leaf, [(0, size - len(leaf))] + [(0, 0)] * (leaf.ndim - 1)), events)


@eqx.filter_jit
def _learn(cell: Any, events: Event, state: Any) -> Any:
    def step(state, event):
        return cell.learn(state, event.x, event.target.value, event.target.valid), None

    return jax.lax.scan(step, state, events)[0]


@eqx.filter_jit
def _ask(cell: Any, state: Any, test: Any) -> Any:
    return jnp.argmax(jax.lax.map(lambda x: cell.predict(state, x), test, batch_size=200), -1)


def linear(
    split: Split, tasks: list[np.ndarray], seed: int, rate: float, ewc: float = 0.0, kept: int = 0
) -> dict[str, float]:
    """A linear softmax learner, event by event; with EWC's pull to the weights of earlier tasks, or with replay."""
    x, y, test, truth = split
    rng = np.random.default_rng(seed)
    w, pull, centre = np.zeros((CLASSES, FEATURES + 1)), 0.0, 0.0
    buffer: list[int] = []
    guesses, seen = [], 0

    def gradient(row: int) -> np.ndarray:
        z = np.append(x[row], 1.0)
        scores = w @ z
        p = np.exp(scores - scores.max())
        p /= p.sum()
        p[y[row]] -= 1
        return np.outer(p, z)

    for task in tasks:
        for row in task:
            grad = gradient(row)
            if buffer:
                grad += gradient(buffer[rng.integers(len(buffer))])
            # Implicit in the pull, so that no strength of it is unstable.
            w = (w - rate * grad + rate * ewc * pull * centre) / (1 + rate * ewc * pull)
            seen += 1
            if len(buffer) < kept:
                buffer.append(row)
            elif kept and (slot := rng.integers(seen)) < kept:
                buffer[slot] = row
        if ewc:
            fisher = np.mean([gradient(row) ** 2 for row in task], axis=0)
            centre = (pull * centre + fisher * w) / np.maximum(pull + fisher, 1e-30)
            pull = pull + fisher
        guesses.append(np.argmax(test @ w[:, :-1].T + w[:, -1], 1))
    return rows(guesses, tasks, y, truth)


def nearest_mean(split: Split, tasks: list[np.ndarray]) -> dict[str, float]:
    """The class whose mean so far is nearest."""
    x, y, test, truth = split
    means, guesses = np.full((CLASSES, FEATURES), np.inf), []
    for task in tasks:
        for c in np.unique(y[task]):
            means[c] = x[task][y[task] == c].mean(0)
        guesses.append(np.argmin(((test[:, None] - means) ** 2).sum(-1), 1))
    return rows(guesses, tasks, y, truth)


def experiment(size: Size) -> list[Comparison]:
    """Final accuracy in % on all classes, for two ways to deal them out."""
    train = 400 if size.smoke else 8000
    seeds = [FIRST_SEED + seed for seed in size.seeds(5)]
    found = []
    for name, classes in (("10x1", 1), ("5x2", 2)):
        split = features(TUNING_SEED, train)
        tasks = by_class(split[1], classes, TUNING_SEED)

        def best(run, values, split=split, tasks=tasks):
            return values[0] if size.smoke else max(values, key=lambda v: run(split, tasks, TUNING_SEED, v)["accuracy"])

        step = best(dee, (1e-4, 1e-3, 1e-2))
        rate = best(linear, (1e-3, 1e-2, 1e-1))
        strength = best(lambda s, t, seed, v, rate=rate: linear(s, t, seed, rate, ewc=v), (1e1, 1e3, 1e5))
        replay_rate = best(lambda s, t, seed, v: linear(s, t, seed, v, kept=KEPT), (1e-3, 1e-2, 1e-1))
        results: dict[str, list[dict[str, float]]] = {}
        for seed in seeds:
            split = features(seed, train)
            tasks = by_class(split[1], classes, seed)
            ways = {
                "DE&E": dee(split, tasks, seed, step),
                "DE&E, keys fixed": dee(split, tasks, seed, step, key_rate=0.0),
                "linear": linear(split, tasks, seed, rate),
                "EWC": linear(split, tasks, seed, rate, ewc=strength),
                "replay": linear(split, tasks, seed, replay_rate, kept=KEPT),
                "nearest mean": nearest_mean(split, tasks),
            }
            for way, value in ways.items():
                results.setdefault(way, []).append(value)
        accuracy = {way: [100 * value["accuracy"] for value in values] for way, values in results.items()}
        note = ", ".join(
            f"{way} {statistics.fmean(accuracy[way]):.1f} % "
            f"(forgetting {100 * statistics.fmean(v['forgetting'] for v in values):.1f})"
            for way, values in results.items()
        )
        chosen = f"rates: DE&E {step:g}, linear {rate:g}, replay {replay_rate:g}; strength of EWC {strength:g}"
        paper = "state of the art without a memory buffer"
        found += [
            Comparison(
                f"{name}: accuracy in %, against linear",
                accuracy["DE&E"],
                accuracy["linear"],
                20.0,
                paper=paper,
                note=f"{note}; {chosen}",
            ),
            Comparison(f"{name}: accuracy in %, against EWC", accuracy["DE&E"], accuracy["EWC"], 10.0, paper=paper),
        ]
    return found
