"""The contract of a cell, checked on real inputs.

>>> class Mean(Cell):
...     def init(self, *, key=None):
...         return {"n": jnp.zeros(()), "mean": jnp.zeros(())}
...
...     def step(self, state, x):
...         n = state["n"] + 1
...         mean = state["mean"] + (x - state["mean"]) / n
...         return {"n": n, "mean": mean}, mean
>>> report = check(Mean(), jnp.arange(12.0))
>>> report.ok
True
>>> report["resumable"].verdict
'holds'
"""

import copy
import importlib.util
import io
import itertools
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import PRNGKeyArray, PyTree
from rich.console import Console
from rich.table import Table

from anabranch.cell import Cell, Maybe, Policy
from anabranch.cost import nbytes
from anabranch.export import ExportError, from_stablehlo, named, to_onnx, to_stablehlo
from anabranch.state import is_array, load, save

Verdict = Literal["holds", "breaks", "n/a"]

ROWS = {
    "bounded": "the state keeps its shapes, dtypes and size",
    "pure": "the same inputs give the same bits, and nothing else changes",
    "batchable": "a batch of streams gives what each stream gives alone",
    "resumable": "a saved and loaded state continues to the same bits",
    "offline-equal": "`offline` and blocks of `advance` give what the steps give",
    "no-peek": "an output does not depend on later inputs",
    "differentiable": "the gradient is finite and equals a finite difference",
    "exportable": "the step runs outside Python, state in and out",
}
"""What each row claims."""

STEPS = 256
"""How many steps of the inputs are used at most."""


@dataclass(frozen=True)
class Row:
    """One line of a contract: what was found out about one property."""

    name: str
    verdict: Verdict
    compared: str = ""
    difference: float | None = None
    """The largest difference found between what should be equal; for *differentiable* it is relative."""
    reason: str = ""


@dataclass(frozen=True)
class Report:
    """The contract of one cell: `print(report)`, `report.ok`, `report["pure"].verdict`."""

    cell: str
    rows: tuple[Row, ...]

    @property
    def ok(self) -> bool:
        """Nothing breaks."""
        return all(row.verdict != "breaks" for row in self.rows)

    def __getitem__(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)

    def to_dict(self) -> dict[str, Any]:
        """The report for JSON."""
        return {"cell": self.cell, "ok": self.ok, "rows": [asdict(row) for row in self.rows]}

    def __rich__(self) -> Table:
        table = Table(title=f"Contract of {self.cell}", title_justify="left")
        for column in ("property", "verdict", "compared", "difference", "reason"):
            table.add_column(column, justify="right" if column == "difference" else "left")
        colours = {"holds": "green", "breaks": "bold red", "n/a": "dim"}
        for row in self.rows:
            difference = "" if row.difference is None else f"{row.difference:.2g}"
            verdict = f"[{colours[row.verdict]}]{row.verdict}[/]"
            # Messages may hold brackets, which Rich would read as markup.
            table.add_row(row.name, verdict, _plain(row.compared), difference, _plain(row.reason))
        return table

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=140, color_system=None).print(self)
        return text.getvalue()


def check(cell: Cell, xs: PyTree, *, key: PRNGKeyArray | None = None) -> Report:
    """Check the contract of `cell` on the inputs `xs`.

    The rows are those of `ROWS`. A row that does not apply says why; a row in which the cell raises an exception
    breaks with its message. The check is deterministic, and writes nothing but a temporary file.

    Arguments:
        cell: any cell. Learners take stacked events, policies the inputs of `Policy.step`.
        xs: inputs stacked on a leading time axis, at least two steps and better a few dozen; the first `STEPS` steps
            are used. What happens rarely is seen only if it happens in them.
        key: given to `cell.init`.

    Raises:
        ValueError: if the leaves of `xs` have no common leading axis, or hold less than two steps.
    """
    trial = _Trial(cell, xs, key)
    rows: list[Row] = []
    for name in ROWS:
        try:
            row = trial.skipped(name, rows) or getattr(trial, name.replace("-", "_"))()
        except Exception as error:
            row = _found("breaks", reason=_message(error))
        rows.append(replace(row, name=name))
        if name == "bounded" and row.verdict == "breaks":
            trial.steps = min(trial.steps, 8)  # a state of another shape compiles the step again, at every step
    return Report(type(cell).__name__, tuple(rows))


_found = partial(Row, "")


class _Trial:
    """One cell on one stretch of inputs. Compiles the step once for all rows."""

    def __init__(self, cell: Cell, xs: PyTree, key: Any):
        self.cell, self.key = cell, key
        self.n, self.m = cell.rate
        lengths = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(xs)}
        if len(lengths) != 1 or lengths == {()}:
            raise ValueError(f"xs must be stacked on one leading time axis, found axes {sorted(lengths)}")
        length = lengths.pop()[0]
        self.steps = min(length // self.n, STEPS)
        if self.steps < 2:
            raise ValueError(f"xs must hold at least two steps of {self.n} inputs, found {length} inputs")
        # On the host, where taking one input out compiles nothing.
        self.xs = jax.tree.map(lambda leaf: _numpy(leaf)[: self.steps * self.n], xs)
        # Float fields are arguments, as in training; a field of integers may be what the shapes depend on.
        self.weights, self.rest = eqx.partition(cell, eqx.is_inexact_array)
        self.draw = np.random.default_rng(0)
        if cell.host:
            self.step, self.advance = cell.step, cell.advance
        else:
            step = jax.jit(lambda w, state, x: eqx.combine(w, self.rest).step(state, x))
            advance = jax.jit(lambda w, state, xs: eqx.combine(w, self.rest).advance(state, xs))
            offline = jax.jit(lambda w, xs: eqx.combine(w, self.rest).offline(xs))
            self.step = lambda state, x: step(self.weights, state, x)
            self.advance = lambda state, xs: advance(self.weights, state, xs)
            self.offline = lambda xs: offline(self.weights, xs)
            # Two block sizes where blocks are the cell's own work, one where `advance` is the scan of the step.
            small = int(self.draw.integers(1, 1 + self.steps // 4)) if self.steps >= 4 else 1
            large = int(self.draw.integers(1 + self.steps // 3, 1 + self.steps // 2)) if self.steps >= 4 else 1
            self.sizes = (large, small) if self.own("advance") else (large,)

    def own(self, name: str) -> bool:
        return getattr(type(self.cell), name) is not getattr(Cell, name)

    def at(self, t: int, xs: PyTree = None) -> PyTree:
        """The input of step t."""
        xs = self.xs if xs is None else xs
        return jax.tree.map(lambda leaf: leaf[t] if self.n == 1 else leaf[t * self.n : (t + 1) * self.n], xs)

    def block(self, start: int, stop: int) -> PyTree:
        """The inputs of the steps from `start` to before `stop`."""
        return jax.tree.map(lambda leaf: leaf[start * self.n : stop * self.n], self.xs)

    def walk(self, state: PyTree, start: int, stop: int) -> tuple[PyTree, list[PyTree]]:
        ys = []
        for t in range(start, stop):
            state, y = self.step(state, self.at(t))
            ys.append(_host(y))
        return state, ys

    @cached_property
    def walked(self) -> tuple[PyTree, PyTree, list[PyTree]]:
        """The state half-way, the state at the end and all outputs."""
        half = self.steps // 2
        middle, first = self.walk(self.cell.init(key=self.key), 0, half)
        middle = copy.deepcopy(middle) if self.cell.host else middle
        end, second = self.walk(middle, half, self.steps)
        return middle, end, first + second

    def stacked(self, ys: list[PyTree]) -> PyTree:
        """The outputs of steps as one stream, as `advance` gives them."""
        join = np.stack if self.m == 1 else np.concatenate
        return jax.tree.map(lambda *leaves: join(leaves), *ys)

    def disturbed(self, xs: PyTree, t: int) -> PyTree:
        """Other inputs of the same kind after step t: rows of the stream in another order, floats with noise added."""
        length = jax.tree.leaves(xs)[0].shape[0]
        rows = np.arange(length)
        rows[(t + 1) * self.n :] = self.draw.integers(0, length, length - (t + 1) * self.n)

        def other(leaf):
            new = leaf[rows]
            if jnp.issubdtype(leaf.dtype, jnp.inexact):
                seen = np.asarray(leaf, np.float64 if not np.iscomplexobj(leaf) else np.complex128)
                seen = seen[np.isfinite(seen)]
                scale = (float(seen.std()) or float(np.abs(seen).max())) if seen.size else 1.0
                noisy = new + self.draw.normal(0.0, scale or 1.0, new.shape)
                # What is never negative (a weight, a duration, a probability) may have to stay so.
                if not np.iscomplexobj(leaf) and seen.size and seen.min() >= 0:
                    noisy = np.abs(noisy)
                new = np.where(
                    np.arange(length).reshape(-1, *[1] * (leaf.ndim - 1)) <= t * self.n + self.n - 1, leaf, noisy
                )
            return new.astype(leaf.dtype)

        return jax.tree.map(other, xs)

    def skipped(self, name: str, rows: list[Row]) -> Row | None:
        """Why a row is not tried, if it is not."""
        if name in ("batchable", "offline-equal", "differentiable", "exportable"):
            if self.cell.host:
                return _found("n/a", reason="runs on the host")
        if name not in ("bounded", "pure", "resumable") and rows[0].verdict == "breaks":
            return _found("n/a", reason="not tried, because the state is not bounded")
        return None

    # The rows

    def bounded(self) -> Row:
        state = self.cell.init(key=self.key)
        first, structure = _signature(state), jax.tree.structure(state)
        for name, kind in first.items():
            if not self.cell.host and kind.startswith("a Python"):
                return _found("breaks", reason=f"{name} is {kind}, not an array: it cannot change on the stream")
        for t in range(self.steps):
            state, _ = self.step(state, self.at(t))
            now = _signature(state)
            for name in {**first, **now}:
                a, b = first.get(name, "absent"), now.get(name, "absent")
                if a != b:
                    return _found("breaks", f"{t + 1} steps", None, f"{name} is {a} at first, {b} after step {t}")
            if jax.tree.structure(state) != structure:
                return _found("breaks", f"{t + 1} steps", None, f"the state has another structure after step {t}")
        return _found("holds", f"{self.steps} steps, {nbytes(state)} bytes")

    def pure(self) -> Row:
        before = _snapshot(self.cell)
        worst = 0.0
        for state, t in ((self.cell.init(key=self.key), 0), (self.walked[0], self.steps // 2)):
            x = self.at(t)
            kept = _snapshot(state)
            results = []
            for _ in range(2):
                given = copy.deepcopy(state) if self.cell.host else state
                results.append(self.step(given, x))
                if _snapshot(given) != kept:
                    return _found("breaks", "the input state", None, f"step {t} changes the state that it is given")
            if self.cell.host:
                if _snapshot(results[0]) != _snapshot(results[1]):
                    return _found("breaks", "two calls", None, f"two calls of step {t} on equal inputs differ")
            else:
                gap = _compare(*map(_host, results), exact=True)
                worst = max(worst, gap.largest)
                if not gap.same:
                    return _found("breaks", "two calls", gap.largest, f"two calls of step {t} differ in {gap.where}")
        if not self.cell.host:
            state, x = self.cell.init(key=self.key), self.at(0)
            # Python runs only when a step is traced: what it reads and does besides its arguments shows in the traces.
            traces = [jax.make_jaxpr(lambda s, x: self.cell.step(s, x))(state, x) for _ in range(2)]
            if traces[0].effects:
                return _found("breaks", "effects", None, f"the step has side effects: {_effects(traces[0])}")
            if _text(traces[0]) != _text(traces[1]) or _snapshot(traces[0].consts) != _snapshot(traces[1].consts):
                return _found(
                    "breaks", "two traces", None, "two traces differ: Python reads or draws something that changes"
                )
        if _snapshot(self.cell) != before:
            return _found("breaks", "the module", None, "the step changes the module")
        return _found("holds", "two calls and two traces" if not self.cell.host else "two calls", worst)

    def batchable(self) -> Row:
        if self.cell.coupled:
            return _found("n/a", reason="coupled by design: the rows of a batch depend on each other")
        lanes = 3

        def stack(trees):
            return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)

        batched = jax.jit(lambda w, states, xs: jax.vmap(eqx.combine(w, self.rest).step)(stack(states), stack(xs)))
        keys = [self.key if self.key is None else jax.random.fold_in(self.key, i) for i in range(lanes)]
        states = [self.cell.init(key=k) for k in keys]
        worst = _Gap(0.0, "", True)
        every = -(-self.steps // 32)
        compared = 0
        for t in range(self.steps):
            xs = [self.at((t + i * self.steps // lanes) % self.steps) for i in range(lanes)]
            alone = [self.step(state, x) for state, x in zip(states, xs)]
            if t % every == 0:
                # Each step starts from the states of the separate runs, so that rounding does not add up.
                together = _host(batched(self.weights, states, xs))
                for i in range(lanes):
                    mine = jax.tree.map(lambda leaf, i=i: leaf[i, ...], together)  # arrays, even of no dimension
                    worst = worst.or_worse(_compare(_host(alone[i]), mine))
                compared += 1
            states = [state for state, _ in alone]
        what = f"{lanes} streams, {compared} steps"
        if not worst.same:
            return _found("breaks", what, worst.largest, f"a batch differs from separate streams in {worst.where}")
        return _found("holds", what, worst.largest)

    def resumable(self) -> Row:
        middle, end, ys = self.walked
        half = self.steps // 2
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "state"
            save(path, middle)
            again = load(path, like=middle)
        end_again, ys_again = self.walk(again, half, self.steps)
        gap = _compare((ys[half:], _host(end)), (ys_again, _host(end_again)), exact=True)
        what = f"{self.steps - half} steps after step {half}"
        if not gap.same:
            return _found("breaks", what, gap.largest, f"the resumed stream differs in {gap.where}")
        return _found("holds", what, gap.largest)

    def offline_equal(self) -> Row:
        what, worst = [], _Gap(0.0, "", True)
        delay = self.cell.delay
        if self.own("offline") or delay or self.key is None:
            expected = self.stacked(self.unkeyed())
            found = _host(self.offline(self.xs))
            length = jax.tree.leaves(expected)[0].shape[0]
            if delay >= length:
                return _found("n/a", reason=f"{length} outputs are too few for a delay of {delay}")
            lagged = jax.tree.map(lambda leaf: leaf[delay:], expected)
            ahead = jax.tree.map(lambda leaf: leaf[: leaf.shape[0] - delay], found)
            worst = worst.or_worse(_compare(lagged, ahead).named(f"offline (delay {delay})" if delay else "offline"))
            what.append("offline")
        expected = self.stacked(self.walked[2])
        state, t, parts = self.cell.init(key=self.key), 0, []
        while t < self.steps:
            for size in (*self.sizes, 1):
                if t + size > self.steps:
                    continue
                if size in self.sizes:
                    state, y = self.advance(state, self.block(t, t + size))
                    y = _host(y)
                else:
                    state, y = self.step(state, self.at(t))
                    y = self.stacked([_host(y)])
                parts.append(y)
                t += size
        found = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
        worst = worst.or_worse(_compare(expected, found).named("advance"))
        what.append(f"advance by {', '.join(map(str, self.sizes))}")
        if not worst.same:
            return _found("breaks", "; ".join(what), worst.largest, f"differs from the steps in {worst.where}")
        return _found("holds", "; ".join(what), worst.largest)

    def unkeyed(self) -> list[PyTree]:
        """The outputs of the steps from the state in which `offline` starts, which knows no key."""
        if self.key is None:
            return self.walked[2]
        try:
            state = self.cell.init()
        except Exception:  # the state needs a key, so `offline` does not start from `init()`
            return self.walked[2]
        return self.walk(state, 0, self.steps)[1]

    def no_peek(self) -> Row:
        size = self.steps if self.cell.host else self.sizes[0]
        checked = []
        if size >= 2:
            state = self.cell.init(key=self.key)
            advance = lambda xs: self.advance(copy.deepcopy(state) if self.cell.host else state, xs)[1]
            checked.append((f"advance by {size}", advance, self.block(0, size), size, 0))
        if not self.cell.host and self.own("offline"):
            checked.append(("offline", self.offline, self.xs, self.steps, self.cell.delay))
        worst, what = _Gap(0.0, "", True), []
        for name, run, xs, steps, lag in checked:
            # Output j of `offline` is output j + lag of the stream: it may use as many inputs as that one.
            first = -(-lag // self.m)
            if first > steps - 2:
                continue
            expected = _host(run(xs))
            for t in {first, *map(int, self.draw.integers(first, steps - 1, 2))}:
                known = (t + 1) * self.m - lag
                found = _host(run(self.disturbed(xs, t)))
                before = [jax.tree.map(lambda leaf, known=known: leaf[:known], ys) for ys in (expected, found)]
                gap = _compare(*before, exact=True)
                worst = worst.or_worse(gap.named(f"{name}, inputs changed after step {t}"))
            what.append(name)
        if not what:
            return _found("n/a", reason=f"{self.steps} steps are too few")
        if not worst.same:
            return _found("breaks", "; ".join(what), worst.largest, f"an earlier output changes: {worst.where}")
        return _found("holds", "; ".join(what), worst.largest)

    def differentiable(self) -> Row:
        if isinstance(self.cell, Policy):
            return _found("n/a", reason="a decision is chosen or drawn, it is no smooth function of the inputs")
        if not self.cell.smooth:
            return _found("n/a", reason="not smooth by design: outputs jump, or their gradient is an estimate")
        state = self.cell.init(key=self.key)
        ys = self.walked[2]
        shown = [_floats(_visible(y)) for y in ys]
        if not shown[0]:
            return _found("n/a", reason="no float outputs")
        moving, fixed = eqx.partition(jax.tree.map(jnp.asarray, self.xs), eqx.is_inexact_array)
        if not jax.tree.leaves((self.weights, moving)):
            return _found("n/a", reason="no float inputs and no float fields")
        # A few steps are enough, unless the outputs begin later.
        steps = min(self.steps, 16)
        if not any(np.any(leaf) for y in shown[:steps] for leaf in y):
            steps = self.steps
        moving, fixed = (jax.tree.map(lambda leaf: leaf[: steps * self.n], part) for part in (moving, fixed))

        def outputs(diff, fixed):
            weights, moving = diff
            cell, xs = eqx.combine(weights, self.rest), eqx.combine(moving, fixed)
            if self.n > 1:
                xs = jax.tree.map(lambda leaf: leaf.reshape(-1, self.n, *leaf.shape[1:]), xs)
            return _floats(_visible(jax.lax.scan(lambda s, x: cell.step(s, x), state, xs)[1], jnp))

        # Random weights, because a plain sum may be constant: that of a softmax is.
        mix = [self.draw.normal(size=leaf.shape) for leaf in jax.eval_shape(outputs, (self.weights, moving), fixed)]
        mix32 = [jnp.asarray(weight, jnp.float32) for weight in mix]

        def total(diff, fixed):
            leaves = outputs(diff, fixed)
            finite = [jnp.where(jnp.isfinite(leaf), leaf, 0).astype(jnp.float32) for leaf in leaves]
            return sum(jnp.vdot(weight, leaf) for weight, leaf in zip(mix32, finite)), leaves

        point = (self.weights, moving)
        toward = jax.tree.map(self.direction, point)
        mode, reason, evaluate = "reverse", "", lambda diff: grad(diff, fixed)[0][1]
        grad = jax.jit(jax.value_and_grad(total, has_aux=True))
        try:
            (_, leaves), slopes = grad(point, fixed)
            flat = [np.asarray(slope, np.float64) for slope in jax.tree.leaves(slopes)]
            slope = sum(float(np.vdot(a, np.asarray(b, np.float64))) for a, b in zip(flat, jax.tree.leaves(toward)))
        except ValueError as error:
            if "Reverse-mode differentiation does not work" not in str(error):
                raise
            mode, reason = "forward", "forward mode only: reverse mode cannot pass a loop of unknown length"
            evaluate = lambda diff: push(diff, toward)[2]
            push = jax.jit(lambda diff, toward: jax.jvp(lambda d: total(d, fixed), (diff,), (toward,), has_aux=True))
            try:
                _, tangent, leaves = push(point, toward)
            except TypeError as error:
                if "custom_vjp" not in str(error):
                    raise
                return _found(
                    "n/a", reason="a step takes a gradient by a rule of its own, which has no second derivative"
                )
            flat, slope = [np.asarray(tangent, np.float64)], float(tangent)
        what = f"{mode} mode, {steps} steps"
        if not all(np.isfinite(part).all() for part in flat):
            return _found("breaks", what, None, "the gradient is not finite")
        zero = not any(part.any() for part in flat)
        return self.against_difference(what, reason, zero, slope, (point, toward), evaluate, mix, leaves)

    def direction(self, leaf: Any) -> Any:
        """A random direction on the scale of a leaf's own values."""
        values = np.asarray(leaf, np.float64)
        finite = values[np.isfinite(values)]
        scale = (finite.std() or np.abs(finite).max()) if finite.size else 0.0
        step = self.draw.normal(size=values.shape) * (scale or 1.0)
        return jnp.asarray(np.where(np.isfinite(values), step, 0.0), leaf.dtype)

    def against_difference(self, what, reason, zero, slope, line, evaluate: Callable, mix, leaves) -> Row:
        """Compare a directional derivative with central differences of several widths; float32 allows no single one."""
        point, toward = line
        finite = [np.isfinite(_double(leaf)) for leaf in leaves]

        def value(h):
            ys = evaluate(jax.tree.map(lambda a, b: (a + h * b).astype(a.dtype), point, toward))
            return sum(float((w * np.where(f, _double(y), 0.0)).sum()) for w, f, y in zip(mix, finite, ys))

        size = np.sqrt(
            sum(float(((w * np.where(f, _double(y), 0.0)) ** 2).sum()) for w, f, y in zip(mix, finite, leaves))
        )
        precision = max(float(jnp.finfo(leaf.dtype).eps) for leaf in leaves)
        tried, agreeing = [], []
        for h in (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4):
            found = (value(h) - value(-h)) / (2 * h)
            noise = 4 * precision * size / h
            tried.append((found, noise))
            larger, gap = max(abs(found), abs(slope)), abs(found - slope)
            if gap <= 0.02 * larger + noise and (noise <= 0.02 * larger or h == 1e-1):
                agreeing.append(gap / larger if larger else 0.0)
        if agreeing and not zero:
            return _found("holds", what, min(agreeing), reason)
        if zero:
            # What jumps is flat almost everywhere; what changes at one rate, whatever the width, has lost its gradient.
            for (a, noise), (b, _) in itertools.pairwise(tried):
                if abs(a) > 10 * noise and abs(a - b) <= 0.1 * abs(a):
                    return _found(
                        "breaks", what, None, f"the gradient is zero, yet the outputs change at a rate of {a:.3g}"
                    )
            return _found("n/a", what, None, "outputs do not depend smoothly on inputs or fields: the gradient is zero")
        closest = min((found for found, _ in tried), key=lambda found: abs(found - slope))
        gap = abs(closest - slope) / max(abs(closest), abs(slope))
        return _found("breaks", what, gap, f"the derivative is {slope:.4g}, the finite difference {closest:.4g}")

    def exportable(self) -> Row:
        x = self.at(0)
        try:
            if any(importlib.util.find_spec(name) is None for name in ("jax2onnx", "onnxruntime")):
                raise ExportError("the extra `onnx` is not installed")
            to_onnx(self.cell, x, key=self.key)
            return _found("holds", "ONNX, two steps in onnxruntime")
        except ExportError as error:
            reason = f"not to ONNX: {error}"
        state = self.cell.init(key=self.key)
        found = from_stablehlo(to_stablehlo(self.cell, x, key=self.key))(named("state", state) | named("x", x))
        after, y = self.step(state, x)
        gap = _compare(_host(named("next", after) | named("y", y)), _host(found))
        if not gap.same:
            return _found("breaks", "StableHLO, one step", gap.largest, f"the program differs in {gap.where}")
        return _found("holds", "StableHLO, one step", gap.largest, reason)


@dataclass(frozen=True)
class _Gap:
    """How far two trees are apart: the largest difference, in which leaf, and whether they count as the same."""

    largest: float
    where: str
    same: bool

    def or_worse(self, other: "_Gap") -> "_Gap":
        return max(self, other, key=lambda gap: (not gap.same, gap.largest))

    def named(self, name: str) -> "_Gap":
        return _Gap(self.largest, f"{name}: {self.where}", self.same)


def _compare(expected: PyTree, found: PyTree, exact: bool = False) -> _Gap:
    """Compare two trees of NumPy arrays: bit by bit, or floats to half of their digits.

    What a `Maybe` does not show is not compared.
    """
    expected, found = _visible(expected), _visible(found)
    if jax.tree.structure(expected) != jax.tree.structure(found):
        return _Gap(np.inf, f"structure: {jax.tree.structure(expected)} against {jax.tree.structure(found)}", False)
    worst = _Gap(0.0, "", True)
    for (path, a), b in zip(jax.tree_util.tree_flatten_with_path(expected)[0], jax.tree.leaves(found)):
        worst = worst.or_worse(_compare_leaf(jax.tree_util.keystr(path) or "the output", a, b, exact))
    return worst


def _compare_leaf(name: str, a: Any, b: Any, exact: bool) -> _Gap:
    if not isinstance(a, np.ndarray) or not isinstance(b, np.ndarray):
        return _Gap(0.0, name, _snapshot(a) == _snapshot(b))
    if a.shape != b.shape or a.dtype != b.dtype:
        return _Gap(np.inf, f"{name}: {a.dtype}{a.shape} against {b.dtype}{b.shape}", False)
    if a.tobytes() == b.tobytes():
        return _Gap(0.0, name, True)
    wide_a, wide_b = _double(a), _double(b)
    with np.errstate(invalid="ignore"):
        gap = np.abs(wide_a - wide_b)
    gap = np.where((wide_a == wide_b) | (np.isnan(wide_a) & np.isnan(wide_b)), 0.0, gap)
    largest = float(np.max(np.where(np.isnan(gap), np.inf, gap), initial=0.0))
    if exact or not jnp.issubdtype(a.dtype, jnp.inexact):
        return _Gap(largest, name if largest else f"{name} (bits only)", False)
    finite = np.abs(wide_a[np.isfinite(wide_a)])
    allowed = float(jnp.finfo(a.dtype).eps) ** 0.5 * float(finite.max(initial=0.0))
    return _Gap(largest, name, largest <= allowed + float(jnp.finfo(a.dtype).tiny))


def _double(leaf: Any) -> np.ndarray:
    leaf = np.asarray(leaf)
    return leaf.astype(np.complex128 if np.iscomplexobj(leaf) else np.float64)


def _numpy(leaf: Any) -> Any:
    """An array on the host, with the dtype that JAX would give it; anything else as it is."""
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return leaf
    if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "OSUmM":
        return leaf
    return np.asarray(jnp.asarray(leaf)) if isinstance(leaf, (jax.Array, np.ndarray, np.generic)) else leaf


def _host(tree: PyTree) -> PyTree:
    """A result on the host: arrays as NumPy arrays, typed keys as their data."""

    def one(leaf):
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        return np.asarray(leaf) if isinstance(leaf, (jax.Array, np.ndarray, np.generic, int, float, bool)) else leaf

    return jax.tree.map(one, tree)


def _visible(tree: PyTree, xp: Any = np) -> PyTree:
    """The tree with zeros where a `Maybe` is not valid."""

    def one(node):
        if not isinstance(node, Maybe):
            return node
        valid = xp.asarray(node.valid)

        def cover(leaf):
            return xp.where(valid.reshape(valid.shape + (1,) * (leaf.ndim - valid.ndim)), leaf, xp.zeros_like(leaf))

        return Maybe(jax.tree.map(cover, _visible(node.value, xp)), valid)

    return jax.tree.map(one, tree, is_leaf=lambda node: isinstance(node, Maybe))


def _floats(tree: PyTree) -> list[Any]:
    return [
        leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
    ]


def _signature(state: PyTree) -> dict[str, str]:
    """The dtype and shape, or the Python type, of each leaf."""
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return {
        f"state{jax.tree_util.keystr(path)}": f"{leaf.dtype}{list(leaf.shape)}"
        if is_array(leaf)
        else f"a Python {type(leaf).__name__}"
        for path, leaf in leaves
    }


def _snapshot(value: Any, depth: int = 6) -> Any:
    """What `value` holds at this moment, as nested tuples that can be compared later."""
    if isinstance(value, Tracer):
        return "a leaked tracer", id(value)
    if isinstance(value, jax.Array):
        value = _host(value)
    if isinstance(value, (np.ndarray, np.generic)):
        return "array", str(value.dtype), value.shape, value.tobytes() if value.dtype != object else repr(value)
    if isinstance(value, (bool, int, float, complex, str, bytes, type(None))):
        return type(value), repr(value)
    if depth == 0 or (callable(value) and not isinstance(value, eqx.Module)):
        return id(value)
    if isinstance(value, dict):
        return type(value), tuple((repr(k), _snapshot(v, depth - 1)) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return type(value), tuple(_snapshot(v, depth - 1) for v in value)
    if isinstance(value, (set, frozenset)):
        return type(value), tuple(sorted(map(repr, value)))
    if hasattr(value, "__dict__"):
        held = tuple(_held(value))
        return type(value), tuple((name, _snapshot(item, depth - 1)) for name, item in held)
    return type(value), repr(value)


def _held(value: Any) -> Iterator[tuple[str, Any]]:
    yield from vars(value).items()
    if isinstance(value, Cell):  # a list on the class is shared by all cells, and as easily changed
        yield from ((k, v) for k, v in vars(type(value)).items() if isinstance(v, (list, dict, set, np.ndarray)))


def _text(jaxpr: Any) -> str:
    return re.sub(r"0x[0-9a-f]+", "", str(jaxpr))


def _effects(jaxpr: Any) -> str:
    return ", ".join(sorted({str(effect) for effect in jaxpr.effects}))


def _plain(text: str) -> str:
    return text.replace("[", r"\[")


def _message(error: BaseException) -> str:
    first = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {first}"
