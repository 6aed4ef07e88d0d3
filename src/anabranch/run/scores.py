"""Scores of a stream in bounded memory: they can be added, saved, and read at any time."""

from typing import Any

import numpy as np


class Scores:
    """Of `binary` predictions log loss, AUC, accuracy, calibration; of `classes` accuracy; of a real `value` errors.

    Binary predictions are counted in `bins` equal bins, from which the AUC follows to within 1 / bins; with the default
    it agrees with the exact one to three digits.
    """

    def __init__(self, kind: str = "binary", bins: int = 4096):
        self.kind, self.bins = kind, bins
        self.sums = np.zeros(5)  # n, loss (log loss or squared error), correct or absolute error, targets, predictions
        self.hist = np.zeros((2, bins if kind == "binary" else 0), np.int64)

    def add(self, targets: np.ndarray, predictions: np.ndarray) -> None:
        """Count in some events."""
        y, p = np.asarray(targets, np.float64), np.asarray(predictions, np.float64)
        if not len(y):
            return
        if self.kind == "binary":
            q = np.clip(p, 1e-15, 1 - 1e-15)
            loss, right = -(y * np.log(q) + (1 - y) * np.log1p(-q)), (p > 0.5) == (y > 0.5)
            bin = np.clip((p * self.bins).astype(np.int64), 0, self.bins - 1)
            for c in (0, 1):
                self.hist[c] += np.bincount(bin[y == c], minlength=self.bins)
        elif self.kind == "classes":
            loss, right = (y != p).astype(float), y == p
        else:
            loss, right = (y - p) ** 2, np.abs(y - p)
        self.sums += [len(y), loss.sum(), right.sum(), y.sum(), p.sum()]

    def merge(self, other: "Scores") -> None:
        """Count in what another has counted."""
        self.sums += other.sums
        self.hist += other.hist

    @property
    def n(self) -> int:
        return int(self.sums[0])

    def auc(self) -> float:
        """Area under the ROC curve; ties within a bin count half. NaN if one of the classes is missing."""
        negative, positive = self.hist
        if not negative.sum() or not positive.sum():
            return float("nan")
        below = np.cumsum(negative) - negative
        return float((positive * (below + negative / 2)).sum() / negative.sum() / positive.sum())

    def calibration(self, groups: int = 20) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of `groups` bins of predictions: how many, the middle of the bin, and how often the label was 1."""
        size = self.bins // groups * groups
        negative, positive = self.hist[:, :size].reshape(2, groups, -1)
        middle = (np.arange(size) + 0.5) / self.bins
        count = (negative + positive).sum(1)
        mean = ((negative + positive) * middle.reshape(groups, -1)).sum(1) / np.maximum(count, 1)
        return count, mean, positive.sum(1) / np.maximum(count, 1)

    def value(self) -> dict[str, Any]:
        """All scores by name."""
        n, loss, right, targets = self.sums[:4]
        if not n:
            return {"n": 0}
        if self.kind == "classes":
            return {"n": int(n), "accuracy": right / n}
        if self.kind == "value":
            return {"n": int(n), "rmse": float(np.sqrt(loss / n)), "mae": right / n}
        count, mean, rate = self.calibration()
        return {
            "n": int(n),
            "base_rate": targets / n,
            "log_loss": loss / n,
            "auc": self.auc(),
            "accuracy": right / n,
            "calibration_error": float((count * np.abs(mean - rate)).sum() / max(count.sum(), 1)),
        }

    def save(self) -> dict[str, np.ndarray]:
        """As arrays."""
        return {"sums": self.sums.copy(), "hist": self.hist.copy()}

    def load(self, arrays: dict[str, np.ndarray]) -> None:
        """From what `save` gave."""
        self.sums, self.hist = arrays["sums"].copy(), arrays["hist"].copy()


class Series:
    """Scores over time, in at most `most` buckets; when there are more, neighbours merge."""

    def __init__(self, kind: str = "binary", width: float = 86_400.0, most: int = 512):
        self.kind, self.width, self.most = kind, width, most
        self.buckets: dict[int, Scores] = {}

    def add(self, times: np.ndarray, targets: np.ndarray, predictions: np.ndarray) -> None:
        """Count in some events at these times (seconds)."""
        bucket = (times // self.width).astype(np.int64)
        for b in np.unique(bucket).tolist():
            at = bucket == b
            self.buckets.setdefault(b, Scores(self.kind, 256)).add(targets[at], predictions[at])
        while len(self.buckets) > self.most:
            self.width *= 2
            old, self.buckets = self.buckets, {}
            for b, scores in sorted(old.items()):
                self.buckets.setdefault(b // 2, Scores(self.kind, 256)).merge(scores)

    def smooth(self, days: float) -> list[tuple[float, dict[str, Any]]]:
        """`(time, scores)` of windows of some days, one after the other."""
        size = max(1, round(days * 86_400 / self.width))
        out: dict[int, Scores] = {}
        for b, scores in sorted(self.buckets.items()):
            out.setdefault(b // size, Scores(self.kind, 256)).merge(scores)
        return [((b + 0.5) * size * self.width, scores.value()) for b, scores in out.items()]

    def save(self) -> dict[str, np.ndarray]:
        """As arrays."""
        keys = sorted(self.buckets)
        return {
            "width": np.array(self.width),
            "buckets": np.array(keys, np.int64),
            "sums": np.array([self.buckets[b].sums for b in keys]).reshape(len(keys), 5),
            "hist": np.array([self.buckets[b].hist for b in keys]).reshape(len(keys), 2, -1),
        }

    def load(self, arrays: dict[str, np.ndarray]) -> None:
        """From what `save` gave."""
        self.width, self.buckets = float(arrays["width"]), {}
        for b, sums, hist in zip(arrays["buckets"].tolist(), arrays["sums"], arrays["hist"]):
            self.buckets[b] = Scores(self.kind, 256)
            self.buckets[b].load({"sums": sums, "hist": hist})
