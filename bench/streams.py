"""A leaderboard of classifiers on streams with drift: ours, River's and MOA's, on the same rows.

Streams: those of the DriftMoE paper (arXiv 2507.18464) that can be had, `--events` rows of each: SEA and LED with
abrupt (_a) and gradual (_g) drift, RBF that moves moderately (_m) and fast (_f), and elec2; its covtype and airlines
are not among the data here, weather and outdoor are added. A real stream is cut to `--events` too. Every label is known
at once. Every ensemble of trees has ten members; trees of ARF and SRP have grace 50 and delta 0.01 everywhere, all else
is the library's default. Our mixture is that of our forest, linear model and neighbours (`FixedShare`), whose two rates
were chosen on other streams (hyperplane, waveform). Our trees and River's are told which features are nominal; MOA's
see numbers, as CapyMOA reads arrays.

A method is asked for a class, then told the right one. Rates are events a second of processor time (all threads), which
other work on the machine disturbs less. They include both and, for ours, leave out compilation: ours is one scan,
River's and MOA's are loops in Python, as their users write them. Memory is that of the learned state at the end; MOA
does not say it without an agent in its virtual machine. Ours run on `--seeds` seeds, the others on the first
`--peer-seeds` of them; ranks are taken on the seeds that all have. A seed is a draw of a synthetic stream and the
chance in a method. The critical difference is Nemenyi's at 5 %, after Friedman's test.

Every cell of the table is kept in `.cache/streams/`, so that a run that was ended goes on where it was; remove the
folder after a change of a method. `python bench/streams.py [--events 20000] [--smoke]`, or `anabranch bench streams`,
ANABRANCH_DATA set for the real streams; writes `bench/results/streams.json`, `streams.png` and `streams.html`.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from scipy.stats import friedmanchisquare, rankdata, studentized_range

from anabranch import Cell, Event, Learner, Maybe
from anabranch.learn.base import label
from anabranch.learn.driftmoe import DriftMoE
from anabranch.learn.experts import FixedShare
from anabranch.learn.linear import LogisticRegression, Scaled, SoftmaxRegression
from anabranch.learn.metrics import Kappa, KappaT
from anabranch.learn.neighbors import Neighbors
from anabranch.learn.streams import LED, SEA, Drift, RandomRBF, elec2, outdoor, take, weather
from anabranch.learn.trees import AdaptiveForest, HoeffdingTree
from common import RESULTS, write
from streams_report import report

CACHE = Path(__file__).parents[1] / ".cache" / "streams"
GROWN: dict[str, Any] = {"grace": 50, "delta": 0.01}
"""How trees of forests grow, after Gomes et al. 2017."""
WINDOWS = 20
"""Points of a curve of accuracy over time."""


class Rows(NamedTuple):
    """A stream to be learned: xs f32[T, D], ys i32[T] in 0..C-1, the number of classes and the nominal features."""

    xs: np.ndarray
    ys: np.ndarray
    C: int
    nominal: tuple[int, ...] = ()


class Run(NamedTuple):
    """What a method did: the predicted classes i32[T], seconds of processor time, and bytes of state if known."""

    predicted: np.ndarray
    seconds: float
    memory: int | None


Method = Callable[[Rows, int], Run]


def chain(parts: Sequence[Cell], width: int, length: int) -> Any:
    """Four streams, one after the other, with three drifts."""
    joined: Any = parts[-1]
    for part in parts[2::-1]:
        # A stream inside a drift starts when it is first drawn from: positions count from there.
        joined = Drift(part, joined, position=length // 4, width=width)
    return joined


def streams(length: int) -> dict[str, Callable[[int], Rows]]:
    """The streams by name; each gives its rows for a seed."""

    def synthetic(generator: Any, C: int, nominal: tuple[int, ...] = ()) -> Callable[[int], Rows]:
        def draw(seed: int) -> Rows:
            xs, ys = take(generator, length, jax.random.PRNGKey(1000 + seed))
            return Rows(np.asarray(xs), np.asarray(ys), C, nominal)

        return draw

    def real(load: Callable[[], tuple[np.ndarray, np.ndarray]]) -> Callable[[int], Rows]:
        def rows(seed: int) -> Rows:
            xs, ys = load()
            return Rows(xs[:length], ys[:length], int(ys.max()) + 1)

        return rows

    widths = {"a": 50, "g": length // 20}
    leds, seas = [LED(0.1, drift=n) for n in (1, 3, 5, 7)], [SEA(variant) for variant in (0, 1, 3, 0)]
    return {
        **{f"SEA_{kind}": synthetic(chain(seas, width, length), 2) for kind, width in widths.items()},
        "weather": real(weather),
        "elec2": real(elec2),
        "RBF_m": synthetic(RandomRBF(10, 5, 50, speed=1e-4), 5),
        "RBF_f": synthetic(RandomRBF(10, 5, 50, speed=1e-3), 5),
        **{f"LED_{k}": synthetic(chain(leds, w, length), 10, tuple(range(24))) for k, w in widths.items()},
        "outdoor": real(outdoor),
    }


def scan(cell: Learner, events: Event, key: Any) -> tuple[Any, Any]:
    """The last state, and the predicted classes i32[T]."""

    def step(state: Any, event: Event) -> tuple[Any, Any]:
        state, prediction = cell.step(state, event)
        return state, label(prediction)

    return jax.lax.scan(step, cell.init(key=key), events)


def ours(make: Callable[[int, Rows], Learner]) -> Method:
    """One of our learners, in one scan that is compiled before the clock starts."""

    def run(rows: Rows, seed: int) -> Run:
        n = len(rows.ys)
        cell, key = make(rows.xs.shape[1], rows), jax.random.PRNGKey(seed)
        events = jax.device_put(Event(rows.xs, Maybe(rows.ys, np.ones(n, bool)), np.ones(n, np.float32)))
        compiled = jax.jit(lambda events, key: scan(cell, events, key)).lower(events, key).compile()
        start = time.process_time()
        state, predicted = jax.block_until_ready(compiled(events, key))
        seconds = time.process_time() - start
        return Run(np.asarray(predicted), seconds, sum(leaf.nbytes for leaf in jax.tree.leaves(state)))

    return run


def majority(rows: Rows, seed: int) -> Run:
    """The most frequent class so far; of equals the lower one."""
    start = time.process_time()
    counts = np.cumsum(np.eye(rows.C, dtype=np.int64)[rows.ys], 0)
    predicted = np.concatenate([[0], counts.argmax(1)[:-1]])
    return Run(predicted, time.process_time() - start, 8 * rows.C)


def no_change(rows: Rows, seed: int) -> Run:
    """The class that came last."""
    start = time.process_time()
    predicted = np.concatenate([[0], rows.ys[:-1]])
    return Run(predicted, time.process_time() - start, 8)


def river(make: Callable[[Rows, int], Any]) -> Method:
    """One of River's classifiers, in the loop that its users write."""

    def run(rows: Rows, seed: int) -> Run:
        model, predicted = make(rows, seed), []
        dicts, labels = [dict(enumerate(row)) for row in rows.xs.tolist()], rows.ys.tolist()
        start = time.process_time()
        for x, y in zip(dicts, labels, strict=True):
            predicted.append(model.predict_one(x) or 0)
            model.learn_one(x, y)
        seconds = time.process_time() - start
        return Run(np.array(predicted), seconds, model._raw_memory_usage)

    return run


def moa(make: Callable[[Any, int], Any]) -> Method:
    """One of MOA's classifiers through CapyMOA; it knows the classes that the rows hold."""

    def run(rows: Rows, seed: int) -> Run:
        from capymoa.stream import NumpyStream

        stream = NumpyStream(rows.xs.astype(float), rows.ys, dataset_name="rows", target_type="categorical")
        instances = [stream.next_instance() for _ in rows.ys]
        model, predicted = make(stream.get_schema(), seed + 1), []
        start = time.process_time()
        for instance in instances:
            predicted.append(model.predict(instance) or 0)
            model.train(instance)
        return Run(np.unique(rows.ys)[predicted], time.process_time() - start, None)

    return run


def our_methods() -> dict[str, Method]:
    """Ours, and the two rules that need no learning."""

    def tree(D: int, rows: Rows, **options: Any) -> HoeffdingTree:
        return HoeffdingTree(D, rows.C, nominal=rows.nominal, **options)

    def linear(D: int, rows: Rows) -> Learner:
        sgd = optax.sgd(0.01)  # the default of River
        return Scaled(LogisticRegression(D, sgd) if rows.C == 2 else SoftmaxRegression(D, sgd, classes=rows.C))

    def forest(D: int, rows: Rows) -> Learner:
        return AdaptiveForest(tree(D, rows, **GROWN))

    def neighbors(D: int, rows: Rows) -> Learner:
        return Scaled(Neighbors(D, rows.C))

    def mixture(D: int, rows: Rows) -> Learner:
        return FixedShare([make(D, rows) for make in (forest, linear, neighbors)], rows.C)

    return {
        "anabranch mixture": ours(mixture),
        "anabranch forest": ours(forest),
        "anabranch KNN": ours(neighbors),
        "anabranch DriftMoE": ours(lambda D, rows: DriftMoE(D, rows.C, nominal=rows.nominal)),
        "anabranch tree": ours(tree),
        "anabranch logistic": ours(linear),
        "majority": majority,
        "no change": no_change,
    }


def river_methods() -> dict[str, Method]:
    from river import ensemble, forest, linear_model, multiclass, neighbors, preprocessing, tree

    def hoeffding(rows: Rows, **options: Any) -> Any:
        return tree.HoeffdingTreeClassifier(nominal_attributes=list(rows.nominal), **options)

    def linear(rows: Rows) -> Any:
        # Its SoftmaxRegression has no intercept, so with more classes it is one logistic regression for each.
        model = linear_model.LogisticRegression()
        return preprocessing.StandardScaler() | (model if rows.C == 2 else multiclass.OneVsRestClassifier(model))

    grown = {"grace_period": GROWN["grace"], "delta": GROWN["delta"]}
    return {
        "River logistic": river(lambda rows, seed: linear(rows)),
        "River tree": river(lambda rows, seed: hoeffding(rows)),
        "River HAT": river(
            lambda rows, seed: tree.HoeffdingAdaptiveTreeClassifier(nominal_attributes=list(rows.nominal), seed=seed)
        ),
        "River KNN": river(lambda rows, seed: preprocessing.StandardScaler() | neighbors.KNNClassifier()),
        "River ARF": river(
            lambda rows, seed: forest.ARFClassifier(10, nominal_attributes=list(rows.nominal), seed=seed)
        ),
        "River LevBag": river(lambda rows, seed: ensemble.LeveragingBaggingClassifier(hoeffding(rows), 10, seed=seed)),
        "River SRP": river(lambda rows, seed: ensemble.SRPClassifier(hoeffding(rows, **grown), 10, seed=seed)),
    }


def moa_methods() -> dict[str, Method]:
    """MOA's.

    Raises:
        ImportError: without CapyMOA; without a Java runtime, another error of CapyMOA's.
    """
    from capymoa import classifier as c

    def ten(kind: Any) -> Method:
        return moa(lambda schema, seed: kind(schema=schema, random_seed=seed, ensemble_size=10))

    return {
        "MOA tree": moa(lambda schema, seed: c.HoeffdingTree(schema=schema)),
        "MOA HAT": moa(lambda schema, seed: c.HoeffdingAdaptiveTree(schema=schema, random_seed=seed)),
        "MOA KNN": moa(lambda schema, seed: c.KNN(schema=schema)),
        "MOA ARF": ten(c.AdaptiveRandomForestClassifier),
        "MOA LevBag": ten(c.LeveragingBagging),
        "MOA SRP": ten(c.StreamingRandomPatches),
    }


def measure(method: Method, rows: Rows, seed: int) -> dict[str, Any]:
    """One cell of the table: prequential scores, the curve of accuracy, rate and memory."""
    run = method(rows, seed)
    right = run.predicted == rows.ys
    return {
        "accuracy": float(right.mean()),
        "kappa": float(Kappa(rows.C)(rows.ys, run.predicted)),
        "kappa_t": float(KappaT()(rows.ys, run.predicted)),
        "events_per_s": len(rows.ys) / run.seconds,
        "bytes": run.memory,
        "curve": [round(float(part.mean()), 4) for part in np.array_split(right, WINDOWS)],
        "load": round(os.getloadavg()[0], 1),
    }


def kept(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The cell in this file, made and written if it is not there."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(make()), encoding="utf-8")
        os.replace(partial, path)
    return json.loads(path.read_text(encoding="utf-8"))


def ranking(scores: np.ndarray) -> dict[str, Any]:
    """Mean ranks of k methods by their scores f[N, k] on N streams, Friedman's p, and Nemenyi's critical difference."""
    N, k = scores.shape
    ranks = rankdata(-scores, axis=1)
    critical = studentized_range.ppf(0.95, k, np.inf) / np.sqrt(2) * np.sqrt(k * (k + 1) / (6 * N))
    p = float(friedmanchisquare(*scores.T).pvalue) if N > 1 else None
    return {"mean_rank": ranks.mean(0).tolist(), "friedman_p": p, "critical_difference": float(critical)}


def summarise(cells: dict[str, dict[str, dict[int, dict[str, Any]]]], about: dict[str, Any]) -> dict[str, Any]:
    """The record: for each stream and method, means over its seeds; ranks on the seeds that every method has."""
    table = []
    for stream, methods in cells.items():
        for method, seeds in methods.items():
            found = list(seeds.values())
            row: dict[str, Any] = {"stream": stream, "method": method, "seeds": len(found)}
            for name in ("accuracy", "kappa", "kappa_t"):
                row[name] = round(statistics.fmean(cell[name] for cell in found), 4)
            row["accuracy_sd"] = round(statistics.stdev(c["accuracy"] for c in found), 4) if len(found) > 1 else None
            row["events_per_s"] = round(statistics.median(cell["events_per_s"] for cell in found))
            row["bytes"] = found[0]["bytes"]
            row["curve"] = np.mean([cell["curve"] for cell in found], 0).round(4).tolist()
            table.append(row)
    names = list(next(iter(cells.values())))
    shared = [set.intersection(*(set(seeds) for seeds in methods.values())) for methods in cells.values()]
    scores = np.array([
        [statistics.fmean(methods[name][seed]["accuracy"] for seed in seeds) for name in names]
        for methods, seeds in zip(cells.values(), shared, strict=True)
    ])  # fmt: skip
    ranks = ranking(scores)
    seconds = {name: sum(1 / row["events_per_s"] for row in table if row["method"] == name) for name in names}
    board = [
        {
            "method": name,
            "mean_rank": round(rank, 2),
            "mean_accuracy": round(float(scores[:, i].mean()), 4),
            "events_per_s": round(len(cells) / seconds[name]),
        }
        for i, (name, rank) in enumerate(zip(names, ranks["mean_rank"], strict=True))
    ]
    board.sort(key=lambda row: row["mean_rank"])
    tests = {name: ranks[name] for name in ("friedman_p", "critical_difference")}
    return about | {"streams": list(cells), "board": board} | tests | {"table": table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="one short stream; nothing is kept or written")
    parser.add_argument("--events", type=int, default=20_000, help="rows of each stream")
    parser.add_argument("--seeds", type=int, default=5, help="seeds of ours")
    parser.add_argument("--peer-seeds", type=int, default=1, help="seeds of the others, at most those of ours")
    args = parser.parse_args()
    if args.smoke:
        args.events, args.seeds, args.peer_seeds = 100, 1, 1
    if not 1 <= args.peer_seeds <= args.seeds:
        parser.error(f"--peer-seeds must lie in 1..--seeds={args.seeds}, got {args.peer_seeds}")

    methods = {name: (method, args.seeds) for name, method in our_methods().items()}
    peers, missing = river_methods(), {"covtype": "not among the data", "airlines": "not among the data"}
    try:
        peers |= moa_methods()
    except (ImportError, RuntimeError, OSError) as error:
        missing["MOA"] = f"CapyMOA cannot run here: {error}"
    methods |= {name: (method, args.peer_seeds) for name, method in peers.items()}
    said = (
        f"{args.events:,} events a stream (outdoor and weather have 4,000 and 18,159); ours on {args.seeds} seeds, the "
        f"others on {args.peer_seeds}, ranks on the shared ones; other work ran on the machine."
    )
    about = {"said": said, "events": args.events, "missing": missing}
    todo = list(streams(args.events))

    cells: dict[str, dict[str, dict[int, dict[str, Any]]]] = {}
    for stream, draw in streams(args.events).items():
        if args.smoke and cells:
            break
        try:
            drawn = {seed: draw(seed) for seed in range(args.seeds)}
        except FileNotFoundError as error:
            missing[stream] = str(error)
            continue
        found: dict[str, dict[int, dict[str, Any]]] = {}
        for name, (method, seeds) in methods.items():
            found[name] = {}
            for seed in range(seeds):
                make = lambda m=method, s=seed, d=drawn: measure(m, d[s], s)
                path = CACHE / str(args.events) / stream / name.replace(" ", "_") / f"{seed}.json"
                found[name][seed] = make() if args.smoke else kept(path, make)
            cell = found[name][0]
            print(f"{stream:8} {name:20} {cell['accuracy']:.4f}  {cell['events_per_s']:12,.0f}/s", flush=True)
        cells[stream] = found
        record = summarise(cells, about | {"not_run_yet": [name for name in todo if name not in cells | missing]})
        if not args.smoke:  # after every stream, so that a run that is ended leaves what it has
            write("streams", record, "anabranch", "jax", "river", *(["capymoa"] if "MOA" not in missing else []))
            report(record, RESULTS)
    if not cells:
        parser.error("no stream could be read")
    for row in summarise(cells, about)["board"]:
        print(f"{row['mean_rank']:5.2f}  {row['method']:20} {row['mean_accuracy']:.4f}  {row['events_per_s']:12,}/s")


if __name__ == "__main__":
    main()
