"""Hoeffding trees and adaptive random forests, events a second and prequential accuracy, against River and MOA.

Ours: the whole stream in one compiled scan, and 1,000 keyed trees through `Keyed`. River: the loop its users write, on
a prefix of the same rows. MOA: through CapyMOA, where it and a Java runtime are installed.
Ours and theirs run in turn; medians, and the smallest and largest ratio of neighbouring runs. Accuracies are those of
the common prefix. `python bench/trees.py [--smoke]`, ANABRANCH_DATA set for elec2; writes `bench/results/trees.json`
and `trees.png`.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import numpy as np
from river.forest import ARFClassifier
from river.tree import HoeffdingTreeClassifier

from anabranch import Event, Maybe
from anabranch.learn.streams import SEA, elec2, take
from anabranch.learn.trees import AdaptiveForest, HoeffdingTree
from anabranch.run.keyed import Keyed

Runner = Callable[[int], np.ndarray]  # repeat → predicted classes


def events(x: np.ndarray, y: np.ndarray) -> Event:
    return Event(x, Maybe(y, np.ones(len(y), bool)), np.ones(len(y), np.float32))


def scanned(cell, x: np.ndarray, y: np.ndarray) -> Runner:
    """One compiled scan; compiled, and the rows put in place, before the clock starts."""
    xs = jax.device_put(events(x, y))
    scan = jax.jit(lambda state, xs: jax.lax.scan(cell.step, state, xs)[1].argmax(-1))
    states = [cell.init(key=jax.random.PRNGKey(seed)) for seed in range(32)]
    scan = scan.lower(states[0], xs).compile()
    return lambda repeat: np.asarray(scan(states[repeat], xs))


def keyed(cell, keys: np.ndarray, x: np.ndarray, y: np.ndarray) -> Runner:
    xs = events(x, y)
    head = jax.tree.map(lambda leaf: leaf[: min(len(y), 32768)], xs)
    Keyed(cell, capacity=1000)(keys[: len(head.x)], head)  # compiled for all `Keyed` of this cell
    return lambda repeat: Keyed(cell, capacity=1000)(keys, xs).argmax(-1)


def looped(make: Callable[[int], Any], x: np.ndarray, y: np.ndarray, keys: np.ndarray | None = None) -> Runner:
    """River: predict, then learn; with keys, a dictionary of models."""
    rows, labels = [dict(enumerate(row)) for row in x.tolist()], y.tolist()
    whose = np.zeros(len(y), int).tolist() if keys is None else keys.tolist()

    def run(repeat: int) -> np.ndarray:
        models, predicted = {}, []
        for key, row, label in zip(whose, rows, labels):
            if key not in models:
                models[key] = make(repeat)
            model = models[key]
            predicted.append(model.predict_one(row) or 0)
            model.learn_one(row, label)
        return np.array(predicted)

    return run


def moa(kind: str, x: np.ndarray, y: np.ndarray) -> Runner | str:
    """MOA's learner on these rows, or why it cannot run."""
    try:
        from capymoa.classifier import AdaptiveRandomForestClassifier
        from capymoa.classifier import HoeffdingTree as MOATree
        from capymoa.stream import NumpyStream
    except (ImportError, RuntimeError, OSError) as error:
        return f"not measured: {error}"
    stream = NumpyStream(x.astype(float), y, dataset_name="rows", target_type="categorical")
    rows = [stream.next_instance() for _ in range(len(y))]

    def run(repeat: int) -> np.ndarray:
        schema = stream.get_schema()
        if kind == "tree":
            model = MOATree(schema=schema)
        else:
            model = AdaptiveRandomForestClassifier(schema=schema, ensemble_size=10, random_seed=repeat + 1)
        predicted = []
        for row in rows:
            predicted.append(model.predict(row) or 0)
            model.train(row)
        return np.array(predicted)

    return run


def compare(name: str, y: np.ndarray, ours: Runner, peers: dict[str, Runner | str], prefix: int, repeats: int) -> dict:
    """Rates, accuracies on the first `prefix` events, and ratios of ours to each peer."""
    runners: dict[str, Runner] = {"anabranch": ours}
    missing = {peer: runner for peer, runner in peers.items() if isinstance(runner, str)}
    runners |= {peer: runner for peer, runner in peers.items() if not isinstance(runner, str)}
    rates: dict[str, list[float]] = {runner: [] for runner in runners}
    hits: dict[str, list[float]] = {runner: [] for runner in runners}
    whole = []
    for repeat in range(repeats):
        for peer, runner in runners.items():
            start = time.perf_counter()
            predicted = runner(repeat)
            rates[peer].append(len(predicted) / (time.perf_counter() - start))
            hits[peer].append(float((predicted[:prefix] == y[:prefix]).mean()))
            if peer == "anabranch":
                whole.append(float((predicted == y).mean()))
    row = {
        "case": name,
        "events": len(y),
        "peer_events": prefix,
        "events_per_second": {peer: round(statistics.median(rate)) for peer, rate in rates.items()},
        "accuracy": {peer: round(statistics.fmean(hit), 4) for peer, hit in hits.items()},
        "accuracy_on_all_events": round(statistics.fmean(whole), 4),
        "ratio": {},
        "missing": missing,
    }
    for peer in rates.keys() - {"anabranch"}:
        ratios = [a / b for a, b in zip(rates["anabranch"], rates[peer])]
        row["ratio"][peer] = {
            "median": round(statistics.median(ratios), 1),
            "least": round(min(ratios), 1),
            "most": round(max(ratios), 1),
        }
    print(f"{name:24}", *(f"{peer} {rate:,}/s" for peer, rate in row["events_per_second"].items()), sep="  ")
    print(" " * 26 + f"accuracy {row['accuracy']}  ratio {row['ratio']}", *missing.values(), sep="  ")
    return row


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    peers = list(dict.fromkeys(peer for row in rows for peer in row["events_per_second"]))
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    for i, peer in enumerate(peers):
        at = [j + 0.8 * (i / len(peers) - 0.5) for j, row in enumerate(rows) if peer in row["events_per_second"]]
        rates = [row["events_per_second"][peer] for row in rows if peer in row["events_per_second"]]
        bars = axes.bar(at, rates, 0.8 / len(peers), align="edge", label=peer)
        axes.bar_label(bars, [f"{rate:,.0f}" for rate in rates], fontsize=7)
    axes.set(yscale="log", ylabel="events per second", xticks=range(len(rows)))
    axes.set_xticklabels([row["case"] for row in rows], fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, nothing written")
    parser.add_argument("--events", type=int, default=1_000_000, help="length of the SEA stream")
    parser.add_argument("--keys", type=int, default=1000, help="keyed trees")
    parser.add_argument("--keyed-events", type=int, default=1_000_000, help="events over all keys")
    parser.add_argument("--tree-prefix", type=int, default=45_312, help="events for River's and MOA's tree")
    parser.add_argument("--forest-prefix", type=int, default=5000, help="events for River's and MOA's forest")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    if args.smoke:
        args.events, args.keyed_events, args.tree_prefix, args.forest_prefix, args.repeats = 3000, 3000, 1000, 200, 2

    xs, ys = take(SEA(0, noise=0.1), max(args.events, args.keyed_events), jax.random.PRNGKey(0))
    x, y = np.asarray(xs), np.asarray(ys)
    streams = {"SEA": (x[: args.events], y[: args.events])}
    try:
        real = elec2()
        streams = {"elec2": (real[0][: args.events], real[1][: args.events])} | streams
    except FileNotFoundError as error:
        print(f"without elec2: {error}")

    rows = []
    grown = {"grace": 50, "delta": 0.01}
    for name, (rows_x, rows_y) in streams.items():
        D = rows_x.shape[1]
        for kind, cell, make, prefix in (
            ("tree", HoeffdingTree(D, 2), lambda seed: HoeffdingTreeClassifier(), args.tree_prefix),
            (
                "forest",
                AdaptiveForest(HoeffdingTree(D, 2, **grown)),
                lambda seed: ARFClassifier(n_models=10, seed=seed),
                args.forest_prefix,
            ),
        ):
            n = min(prefix, len(rows_y))
            peers = {"river": looped(make, rows_x[:n], rows_y[:n]), "moa": moa(kind, rows_x[:n], rows_y[:n])}
            rows.append(compare(f"{kind} {name}", rows_y, scanned(cell, rows_x, rows_y), peers, n, args.repeats))

    x, y = x[: args.keyed_events], y[: args.keyed_events]
    keys = np.random.default_rng(0).integers(0, args.keys, len(y))
    n = min(args.tree_prefix, len(y))
    peer = looped(lambda seed: HoeffdingTreeClassifier(), x[:n], y[:n], keys[:n])
    ours = keyed(HoeffdingTree(3, 2, max_leaves=32), keys, x, y)
    rows.append(compare(f"{args.keys:,} keyed trees SEA", y, ours, {"river": peer}, n, args.repeats))

    if args.smoke:
        return
    record = {
        "bench": "trees",
        "rows": rows,
        "repeats": args.repeats,
        "cpus": os.cpu_count(),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in ("anabranch", "jax", "river")},
        "date": datetime.now(UTC).date().isoformat(),
    }
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    (folder / "trees.json").write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    plot(rows, folder / "trees.png")


if __name__ == "__main__":
    main()
