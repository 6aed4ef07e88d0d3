"""One model a key, standardisation and logistic regression, in other tools: what `bench/keyed.py` compares with.

Each function takes a `Stream` and gives the predictions and the seconds; all predict, then learn, event by event. Where
a tool makes a model for each key, the models are made before the clock starts, and so is the data in the tool's form.

`python bench/keyed_peers.py TOOL FOLDER` serves Bytewax or Pathway, which may live in an interpreter of their own: each
line on standard input names a stream in FOLDER; its predictions are written there and its seconds are printed.
"""

import importlib.metadata
import math
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

LR, INTERCEPT_LR = 0.1, 0.01


class Stream(NamedTuple):
    keys: np.ndarray
    """i64[n], below the number of keys."""
    x: np.ndarray
    """f32[n, features]"""
    target: np.ndarray
    """f32[n], 0 or 1"""

    def head(self, n: int) -> "Stream":
        return Stream(*(column[:n] for column in self))


def river(stream: Stream) -> tuple[np.ndarray, float]:
    """A dictionary of River models."""
    from river import linear_model, optim, preprocessing

    def model():
        learner = linear_model.LogisticRegression(optim.SGD(LR), intercept_lr=INTERCEPT_LR)
        return preprocessing.StandardScaler() | learner

    models = {key: model() for key in np.unique(stream.keys).tolist()}
    events = [
        (key, dict(enumerate(x)), bool(t))
        for key, x, t in zip(stream.keys.tolist(), stream.x.tolist(), stream.target.tolist())
    ]
    out = []
    start = time.perf_counter()
    for key, x, t in events:
        one = models[key]
        out.append(one.predict_proba_one(x)[True])
        one.learn_one(x, t)
    spent = time.perf_counter() - start
    return np.array(out), spent


class NumpyModel:
    """The model of one key as NumPy arrays."""

    __slots__ = ("b", "mean", "n", "var", "w")

    def __init__(self, features: int):
        self.n, self.b = 0, 0.0
        self.mean, self.var, self.w = (np.zeros(features, np.float32) for _ in range(3))

    def step(self, x: np.ndarray, target: float) -> float:
        # Features that never repeat a value have a variance from the second event on: no need to ask each.
        p = sigmoid(self.w @ ((x - self.mean) / np.sqrt(self.var)) + self.b) if self.n > 1 else sigmoid(self.b)
        self.n += 1
        delta = x - self.mean
        self.mean += delta / np.float32(self.n)
        rest = x - self.mean
        self.var += (delta * rest - self.var) / np.float32(self.n)
        if self.n > 1:
            z = rest / np.sqrt(self.var)
            slope = sigmoid(self.w @ z + self.b) - target
            self.w -= np.float32(LR * slope) * z
        else:
            slope = sigmoid(self.b) - target
        self.b -= INTERCEPT_LR * slope
        return p


def sigmoid(margin: float) -> float:
    return 1 / (1 + math.exp(min(-margin, 80.0)))


def numpy(stream: Stream) -> tuple[np.ndarray, float]:
    """A dictionary of NumPy states."""
    models = {key: NumpyModel(stream.x.shape[1]) for key in np.unique(stream.keys).tolist()}
    events = list(zip(stream.keys.tolist(), stream.x, stream.target.tolist()))
    start = time.perf_counter()
    out = [models[key].step(x, t) for key, x, t in events]
    spent = time.perf_counter() - start
    return np.array(out), spent


_compiled = None


def numba(stream: Stream) -> tuple[np.ndarray, float]:
    """A compiled sequential loop on one core, its states in arrays that the keys index: as fast as it gets."""
    global _compiled
    if _compiled is None:
        from numba import njit

        _compiled = njit(fastmath=True)(_loop)
    n, features, keys = *stream.x.shape, int(stream.keys.max()) + 1
    states = [np.zeros((keys, features), np.float32) for _ in range(4)]
    out, z = np.empty(n, np.float32), np.empty(features, np.float32)
    intercept = np.zeros(keys, np.float32)
    _compiled(stream.keys[:0], stream.x[:0], stream.target[:0], *states, intercept, z, out)
    start = time.perf_counter()
    _compiled(*stream, *states, intercept, z, out)
    return out, time.perf_counter() - start


def _loop(keys, x, target, count, mean, var, w, intercept, z, out):
    one, zero, lr, intercept_lr = np.float32(1), np.float32(0), np.float32(LR), np.float32(INTERCEPT_LR)
    for i in range(len(keys)):
        k = keys[i]
        margin = intercept[k]
        for d in range(x.shape[1]):
            if var[k, d] > zero:
                margin += w[k, d] * (x[i, d] - mean[k, d]) / np.sqrt(var[k, d])
        out[i] = one / (one + np.exp(-margin))
        margin = intercept[k]
        for d in range(x.shape[1]):
            count[k, d] += one
            delta = x[i, d] - mean[k, d]
            mean[k, d] += delta / count[k, d]
            var[k, d] += (delta * (x[i, d] - mean[k, d]) - var[k, d]) / count[k, d]
            z[d] = (x[i, d] - mean[k, d]) / np.sqrt(var[k, d]) if var[k, d] > zero else zero
            margin += w[k, d] * z[d]
        slope = one / (one + np.exp(-margin)) - target[i]
        for d in range(x.shape[1]):
            w[k, d] -= lr * slope * z[d]
        intercept[k] -= intercept_lr * slope


def bytewax(stream: Stream) -> tuple[np.ndarray, float]:
    """The NumPy model as a stateful step of Bytewax, one worker."""
    import bytewax.operators as op
    from bytewax.dataflow import Dataflow
    from bytewax.testing import TestingSink, TestingSource, run_main

    features = stream.x.shape[1]

    def step(model, event):
        model = NumpyModel(features) if model is None else model
        i, x, t = event
        return model, (i, model.step(x, t))

    keys = stream.keys.astype(str).tolist()
    events = list(zip(keys, zip(range(len(keys)), stream.x, stream.target.tolist())))
    found: list = []
    flow = Dataflow("bench")
    source = op.input("source", flow, TestingSource(events, batch_size=1000))
    op.output("sink", op.stateful_map("model", source, step), TestingSink(found))
    start = time.perf_counter()
    run_main(flow)
    spent = time.perf_counter() - start
    out = np.empty(len(keys))
    for _, (i, p) in found:
        out[i] = p
    return out, spent


def pathway(stream: Stream) -> tuple[np.ndarray, float]:
    """The NumPy model as a stateful reducer of Pathway, in commits of 1,000 events."""
    import pathway as pw

    pw.internals.parse_graph.G.clear()
    features = stream.x.shape[1]
    schema = pw.schema_from_types(i=int, key=int, x=np.ndarray, target=float)
    events = list(zip(range(len(stream.keys)), stream.keys.tolist(), stream.x, stream.target.tolist()))

    class Source(pw.io.python.ConnectorSubject):
        def run(self):
            for begin in range(0, len(events), 1000):
                for i, key, x, target in events[begin : begin + 1000]:
                    self.next(i=i, key=key, x=x, target=target)
                self.commit()

    # The state is the model and what it predicted in this commit: a reducer has no other way to answer event by event.
    def steps(state, rows):
        model = NumpyModel(features) if state is None else state.value[0]
        rows = sorted((row for row, _ in rows), key=lambda row: row[0])
        return pw.PyObjectWrapper((model, [(i, model.step(x, t)) for i, x, t in rows]))

    out = np.empty(len(events))

    def take(key, row, time, is_addition):
        if is_addition:
            for i, p in row["state"].value[1]:
                out[i] = p

    table = pw.io.python.read(Source(), schema=schema, autocommit_duration_ms=None)
    reduce = pw.reducers.stateful_many(steps)
    result = table.groupby(table.key).reduce(table.key, state=reduce(table.i, table.x, table.target))
    pw.io.subscribe(result, take)
    start = time.perf_counter()
    pw.run(monitoring_level=pw.MonitoringLevel.NONE)
    return out, time.perf_counter() - start


def serve(tool: str, folder: Path) -> None:
    run = {"bytewax": bytewax, "pathway": pathway}[tool]
    print(importlib.metadata.version(tool), flush=True)
    for line in sys.stdin:
        name = line.strip()
        with np.load(folder / f"{name}.npz") as saved:
            stream = Stream(*(saved[column] for column in Stream._fields))
        out, spent = run(stream)
        np.save(folder / f"{tool}.npy", out)
        print(spent, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], Path(sys.argv[2]))
