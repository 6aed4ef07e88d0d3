"""Anomaly scorers on the Numenta Anomaly Benchmark's series with known causes, against River's.

A scorer gives every reading of a series a score from 0 to 1, before it learns from it, and does not know the labels.
An alarm is a score at or above one threshold for all series, the best one in hindsight for each scorer and profile, as
the benchmark has it. In a labelled window the first alarm counts, the more the earlier; an alarm outside costs, the
less the closer it follows a window; a window without alarm costs. The first 15 % of a series (750 readings at most) do
not count. The sum is 0 for no alarms at all and 100 for an alarm at the start of every window and no other.

All scorers have their default settings, except that half-space trees see readings scaled to the range so far. The
scoring here gives the published final scores of the benchmark's detectors null, random, windowedGaussian,
relativeEntropy and numenta, from their published scores of each reading and at their thresholds. These seven series are
a small part of the benchmark's 58, with 19 windows: scores here are not to be compared with those of the whole. They
were looked at once while the likelihood was made: a first form, of errors without bound, scored 0 and was replaced.
`python bench/nab.py [--smoke]`, ANABRANCH_DATA set; writes `bench/results/nab.json` and `nab.png`.

Lavin & Ahmad, "Evaluating real-time anomaly detection algorithms: the Numenta Anomaly Benchmark", ICMLA 2015.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.csv
from river import anomaly

from anabranch.cell import Cell
from anabranch.data import root
from anabranch.drive import scan
from anabranch.learn.anomaly import AnomalyLikelihood, HalfSpaceTrees
from common import RESULTS, spread, write

PROFILES = {
    "standard": {"hit": 1.0, "false alarm": 0.11, "miss": 1.0},
    "few false alarms": {"hit": 1.0, "false alarm": 0.22, "miss": 1.0},
    "few misses": {"hit": 1.0, "false alarm": 0.11, "miss": 2.0},
}
"""What counts how much: the benchmark's standard, reward_low_FP and reward_low_FN."""
SEEDS = range(5)
"""Of scorers that draw random numbers; their scores are medians over these."""


class Series(NamedTuple):
    """One labelled series of n readings."""

    name: str
    values: np.ndarray
    """f64[n]"""
    window: np.ndarray
    """i64[n]: the number of the labelled window that a reading is in, or -1."""
    worth: np.ndarray
    """f64[n]: of an alarm there, from 1 at the start of a window over 0 at its end to -1 far outside."""
    scored: np.ndarray
    """bool[n]: not in the first 15 %."""
    windows: int
    """How many there are."""


def series(name: str, times: np.ndarray, values: np.ndarray, windows: list[list[str]]) -> Series:
    """A series whose windows are given by the times of their first and last readings."""
    n = len(values)
    at = np.arange(n)
    window, worth = np.full(n, -1), np.full(n, -1.0)
    for number, (first, last) in enumerate(windows):
        start, end = (int(np.flatnonzero(times == np.datetime64(t))[0]) for t in (first, last))
        width = end - start + 1
        inside = (at >= start) & (at <= end)
        window[inside] = number
        worth[inside] = _sigmoid((at[inside] - end - 1) / width) / _sigmoid(-1.0)
        past = (at[end + 1 :] - end) / (width - 1)
        worth[end + 1 :] = np.where(past > 3, -1.0, _sigmoid(past))
    return Series(name, values, window, worth, at >= min(int(0.15 * n), 750), len(windows))


def _sigmoid(place: Any) -> Any:
    return 2 / (1 + np.exp(5 * place)) - 1


def load(folder: Path) -> list[Series]:
    """The series of a folder with `combined_windows.json`.

    Raises:
        FileNotFoundError: if the folder has no such file.
    """
    labels = json.loads((folder / "combined_windows.json").read_text())
    found = []
    for name, windows in sorted(labels.items()):
        path = folder / Path(name).name
        if path.exists():
            table = pyarrow.csv.read_csv(path)
            times, values = table["timestamp"].to_numpy(), table["value"].to_numpy().astype(np.float64)
            found.append(series(path.stem, times, values, windows))
    return found


def raw_scores(corpus: list[Series], scores: list[np.ndarray], profile: dict[str, float]) -> tuple[np.ndarray, ...]:
    """All thresholds that make a difference, from above the highest down, and the benchmark's sum at each of them."""
    first = np.cumsum([0] + [s.windows for s in corpus])
    window = np.concatenate([np.where(s.window < 0, -1, s.window + k) for s, k in zip(corpus, first)])
    worth, score = np.concatenate([s.worth for s in corpus]), np.concatenate(scores)
    scored = np.concatenate([s.scored for s in corpus])
    window, worth, score = window[scored], worth[scored], score[scored]
    order = np.argsort(-score, kind="stable")
    best = dict.fromkeys(np.unique(window[window >= 0]).tolist(), -profile["miss"])
    total = sum(best.values())
    thresholds, totals = [np.inf], [total]
    for w, gain, s in zip(window[order].tolist(), worth[order].tolist(), score[order].tolist()):
        if w < 0:
            total += profile["false alarm"] * gain
        elif profile["hit"] * gain > best[w]:
            total += profile["hit"] * gain - best[w]
            best[w] = profile["hit"] * gain
        if s == thresholds[-1]:
            totals[-1] = total
        else:
            thresholds.append(s)
            totals.append(total)
    return np.array(thresholds), np.array(totals)


def evaluate(corpus: list[Series], scores: list[np.ndarray], threshold: float | None = None) -> dict[str, Any]:
    """For each profile the score from 0 (no alarms) to 100 (perfect), at a threshold or at the best one."""
    found = {}
    for name, profile in PROFILES.items():
        thresholds, totals = raw_scores(corpus, scores, profile)
        i = int(totals.argmax()) if threshold is None else int((thresholds >= threshold).sum()) - 1
        perfect = profile["hit"] * sum(s.windows for s in corpus)
        score = 100 * (totals[i] - totals[0]) / (perfect - totals[0])
        found[name] = {"score": float(score), "threshold": float(thresholds[i]) if threshold is None else threshold}
    return found


Scorer = Callable[[np.ndarray], np.ndarray]
"""From readings f64[n] to scores f64[n]."""


def scanned(cell: Cell, scale: Scorer = lambda values: values) -> Scorer:
    """One of ours, over a whole series in one compiled scan."""
    return lambda values: np.asarray(scan(cell, scale(values).astype(np.float32))[1].score, np.float64)


def so_far(values: np.ndarray) -> np.ndarray:
    """Readings scaled to the range so far, each included, as one feature."""
    low, high = np.minimum.accumulate(values), np.maximum.accumulate(values)
    return ((values - low) / np.where(high > low, high - low, 1.0))[:, None]


def supervised(make: Callable[[], Any]) -> Scorer:
    """One of River's scorers of a target."""

    def run(values: np.ndarray) -> np.ndarray:
        model, scores = make(), []
        for value in values.tolist():
            scores.append(model.score_one(None, value))
            model.learn_one(None, value)
        scores = np.array(scores)
        return scores if scores.max() <= 1 else scores / (1 + scores)  # only their order counts

    return run


def river_trees(seed: int) -> Scorer:
    """River's half-space trees, which see what ours see."""

    def run(values: np.ndarray) -> np.ndarray:
        trees, scores = anomaly.HalfSpaceTrees(seed=seed), []
        for value in so_far(values)[:, 0].tolist():
            scores.append(trees.score_one({"x": value}))
            trees.learn_one({"x": value})
        return np.array(scores)

    return run


def chance(seed: int) -> Scorer:
    """Scores drawn at random."""
    draw = np.random.default_rng(seed)
    return lambda values: draw.uniform(size=len(values))


def plot(scores: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    for i, profile in enumerate(PROFILES):
        at = np.arange(len(scores)) + 0.27 * (i - 1)
        bars = axes.bar(at, [found[profile]["median"] for found in scores.values()], 0.27, label=profile)
        axes.bar_label(bars, fmt="%.0f", fontsize=7)
    axes.set(ylabel="score (0: no alarms, 100: perfect)", xticks=range(len(scores)))
    axes.set_xticklabels([name.replace(": ", "\n") for name in scores], fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="two series, nothing written")
    args = parser.parse_args()
    corpus = load(root() / "nab")
    if args.smoke:
        corpus = sorted(corpus, key=lambda s: len(s.values))[:2]

    likelihood = AnomalyLikelihood()
    scorers: dict[str, list[Scorer]] = {
        "ours: likelihood": [scanned(likelihood)],
        "ours: half-space trees": [scanned(HalfSpaceTrees(seed=seed), so_far) for seed in SEEDS],
        "River: half-space trees": [river_trees(seed) for seed in SEEDS],
        "River: Gaussian": [supervised(anomaly.GaussianScorer)],
        "River: absolute deviation": [supervised(anomaly.StandardAbsoluteDeviation)],
        "random": [chance(seed) for seed in SEEDS],
    }
    given = {name: [[run(s.values) for s in corpus] for run in runs] for name, runs in scorers.items()}
    found = {name: [evaluate(corpus, scores) for scores in runs] for name, runs in given.items()}
    scores = {
        name: {profile: spread(run[profile]["score"] for run in runs) for profile in PROFILES}
        for name, runs in found.items()
    }
    ours = given["ours: likelihood"][0]
    fixed = evaluate(corpus, ours, likelihood.threshold)
    for name, row in scores.items():
        print(f"{name:28}", *(f"{profile} {row[profile]['median']:6.1f}" for profile in PROFILES), sep="  ")
    print(f"{'ours, threshold 0.5':28}", *(f"{name} {row['score']:6.1f}" for name, row in fixed.items()), sep="  ")
    if args.smoke:
        return
    best = found["ours: likelihood"][0]
    record = {
        "series": {s.name: {"readings": len(s.values), "windows": s.windows} for s in corpus},
        "profiles": PROFILES,
        "seeds": len(SEEDS),
        "scores": scores,
        "likelihood": {
            "best_threshold": {profile: best[profile]["threshold"] for profile in PROFILES},
            "at_its_own_threshold": fixed,
            "each_series_standard": {
                s.name: evaluate([s], [y], best["standard"]["threshold"])["standard"]["score"]
                for s, y in zip(corpus, ours)
            },
        },
    }
    path = write("nab", record, "jax", "river")
    plot(scores, RESULTS / "nab.png")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
