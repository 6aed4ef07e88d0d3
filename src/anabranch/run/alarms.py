"""Alarms: what the cells of a stream raise, and drift of the error of its predictions."""

import time
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float32, Float64, PyTree

from anabranch.learn.detect import ADWIN, ADWINState

KEPT = 200
"""Alarms that are kept; of more, the last."""
BLOCK = 32
"""Errors between two looks at them."""
TOGETHER = 64
"""Blocks that one compiled call looks at, at most."""
ERROR = "error"
"""The output that drift of the error of predictions is reported under."""


class Raised(NamedTuple):
    """One alarm."""

    time: float
    """When, in the stream's own seconds."""
    noticed: float
    """When, by the clock, in seconds since 1970."""
    stage: str
    """Which raised it; empty for the error of the predictions."""
    key: str
    """Whose state raised it, or the group of predictions; empty where all share one."""
    output: str
    """`alarm` or `drift`, the output that was True; `error`, of the predictions."""
    value: float | None
    """The first number that the stage gave with it; of an error its mean over the last `BLOCK` labels."""
    before: float | None = None
    """Of an error: its mean since the drift before."""


class Alarms:
    """The last alarms of a pipeline or a cell, and how many there have been of each stage.

    An output is an alarm where it is True and its name is `alarm` or `drift`: so anomaly scorers and drift detectors
    call theirs. What else is true or false says nothing of that kind.
    """

    def __init__(self):
        self.recent: deque[Raised] = deque(maxlen=KEPT)
        self.counts: dict[str, int] = {}
        """By stage; drift of the error under `error`."""

    def look(
        self, stage: str, answers: PyTree, times: Float64[np.ndarray, " n"], keys: Sequence[Any] | None = None
    ) -> None:
        """Take note of the alarms among the answers of a stage, which are stacked on a leading axis."""
        leaves = jax.tree.leaves(answers)
        if not any(leaf.dtype == bool for leaf in leaves):
            return
        value = next((leaf for leaf in leaves if leaf.ndim == 1 and leaf.dtype.kind == "f"), None)
        for path, leaf in jax.tree_util.tree_leaves_with_path(answers):
            name = jax.tree_util.keystr(path[-1:], simple=True)
            if name not in ("alarm", "drift") or leaf.dtype != bool or leaf.ndim != 1:
                continue
            where = np.flatnonzero(leaf)
            self._count(stage, len(where))
            for i in where[-KEPT:].tolist():
                key = "" if keys is None else str(keys[i])
                said = None if value is None else float(value[i])
                self.recent.append(Raised(float(times[i]), time.time(), stage, key, name, said))

    def judge(self, group: str, drifts: list["Drift"]) -> None:
        """Take note of the drifts of the error of a group of predictions."""
        self._count(ERROR, len(drifts))
        for drift in drifts:
            self.recent.append(Raised(drift.time, time.time(), "", group, ERROR, drift.mean, drift.before))

    def _count(self, stage: str, more: int) -> None:
        if more:
            self.counts[stage] = self.counts.get(stage, 0) + more

    def save(self) -> dict[str, Any]:
        """As JSON can say it."""
        return {"recent": list(self.recent), "counts": dict(self.counts)}

    def load(self, saved: dict[str, Any]) -> None:
        """From what `save` gave."""
        self.recent = deque((Raised(*raised) for raised in saved["recent"]), maxlen=KEPT)
        self.counts = dict(saved["counts"])


class Drift(NamedTuple):
    """Errors have become larger."""

    time: float
    """Of the label with which it was noticed."""
    mean: float
    """The mean of the last `BLOCK` errors."""
    before: float
    """The mean of those since the drift before."""


class ErrorDrift:
    """ADWIN over the errors of predictions, in bounded memory: it tells when they have become larger.

    That they become smaller is what learning is for: ADWIN begins afresh then too, but it is no drift here. Its bound
    is for numbers up to 1; where errors may be larger, they are brought there by e / (e + mean of all errors).
    Errors are looked at in blocks, as ADWIN itself does, so that how they came in batches changes nothing.
    """

    def __init__(self, bounded: bool):
        self.bounded = bounded
        self.window: ADWINState = ADWIN(clock=BLOCK).init()
        self.rest = np.zeros(0)  # of a block that is not full
        self.sums = np.zeros(4)  # number and sum of all errors, and of those since the last drift

    def add(self, errors: Float64[np.ndarray, " n"], times: Float64[np.ndarray, " n"]) -> list[Drift]:
        """Take some errors, which are not negative; returns the drifts that these times saw."""
        waited, whole = len(self.rest), np.concatenate([self.rest, errors])
        count = len(whole) // BLOCK
        self.rest, found = whole[count * BLOCK :], []
        for start in range(0, count, TOGETHER):
            some = min(TOGETHER, count - start)
            blocks = whole[start * BLOCK : (start + some) * BLOCK].reshape(some, BLOCK)
            known = times[np.arange(start + 1, start + some + 1) * BLOCK - 1 - waited]
            found += self._look(blocks, known)
        return found

    def _look(self, blocks: Float64[np.ndarray, "n block"], times: Float64[np.ndarray, " n"]) -> list[Drift]:
        size, sums = len(blocks), blocks.sum(1)
        scaled = np.zeros((TOGETHER, BLOCK), np.float32)
        if self.bounded:
            scaled[:size] = blocks
        else:
            n, total = self.sums[0] + BLOCK * np.arange(1, size + 1), self.sums[1] + np.cumsum(sums)
            scaled[:size] = blocks / np.maximum(blocks + (total / n)[:, None], 1e-300)
        self.window, drifted = _advance(self.window, scaled, size)
        found = []
        for drift, total, now in zip(np.asarray(drifted).tolist(), sums.tolist(), times.tolist()):
            self.sums += [BLOCK, total, BLOCK, total]
            if drift:
                mean, before = total / BLOCK, float(self.sums[3] / self.sums[2])
                self.sums[2:] = 0
                if mean > before:
                    found.append(Drift(now, mean, before))
        return found

    def save(self) -> dict[str, Any]:
        """As arrays."""
        window = {name: np.asarray(array) for name, array in self.window._asdict().items()}
        return {"window": window, "rest": self.rest.copy(), "sums": self.sums.copy()}

    def load(self, saved: dict[str, Any]) -> None:
        """From what `save` gave."""
        self.window = ADWINState(**saved["window"])
        self.rest, self.sums = saved["rest"].copy(), saved["sums"].copy()


@jax.jit
def _advance(
    window: ADWINState, blocks: Float32[np.ndarray, "most block"], n: int
) -> tuple[ADWINState, Bool[jax.Array, " most"]]:
    """Look at the first n blocks, in one compiled loop; which of them ended in a drift."""
    detector = ADWIN(clock=BLOCK)

    def look(i, carry):
        window, drifted = carry
        block = blocks[i]  # all but its last only fill the detector's buffer: that is done at once
        window = window._replace(recent=block, width=window.width + BLOCK - 1)
        window, alarm = detector.step(window, block[-1])
        return window, drifted.at[i].set(alarm.drift)

    return jax.lax.fori_loop(0, n, look, (window, jnp.zeros(len(blocks), bool)))
