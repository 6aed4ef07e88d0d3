"""How good the answers of a pipeline are: scores by group and over time, and drift of the error."""

from typing import Any

import numpy as np

from anabranch.run.alarms import ErrorDrift
from anabranch.run.config import ReportConfig
from anabranch.run.scores import Scores, Series


class Quality:
    """Scores of the predictions whose labels have come, in bounded memory.

    Arguments:
        config: by which column to group, and of which column's values to find the worst.
        kind: of the label: "binary", "classes" or "value".
    """

    def __init__(self, config: ReportConfig, kind: str):
        self.config, self.kind = config, kind
        self.scores: dict[str, Scores] = {}
        """By group."""
        self.series: dict[str, Series] = {}
        """The same over time."""
        self.drift: dict[str, ErrorDrift] = {}
        self.values: dict[str, np.ndarray] = {}
        """Of the values of the column `worst`: events, and sums of loss, target and prediction."""

    def add(
        self,
        asked: np.ndarray,
        known: np.ndarray,
        target: np.ndarray,
        prediction: np.ndarray,
        shown: dict[str, np.ndarray],
    ) -> dict[str, Any]:
        """Count in some predictions: when they were asked for and their labels known, and the columns to group by.

        Returns:
            Where the error of a group has become larger.
        """
        by, worst = self.config.by, self.config.worst
        groups = np.array(["all"] * len(target), object) if by is None else shown[by].astype(str)
        error = target != prediction if self.kind == "classes" else np.abs(target - prediction)
        raised: dict[str, Any] = {}
        for name in dict.fromkeys(groups.tolist()):
            at = groups == name
            drift = self.drift.setdefault(name, ErrorDrift(bounded=self.kind != "value"))
            raised[name] = drift.add(error[at].astype(np.float64), known[at])
            self.scores.setdefault(name, Scores(self.kind)).add(target[at], prediction[at])
            self.series.setdefault(name, Series(self.kind)).add(asked[at], target[at], prediction[at])
        if worst is None:
            return raised
        p = np.clip(prediction, 1e-15, 1 - 1e-15)
        loss = (
            -(target * np.log(p) + (1 - target) * np.log1p(-p)) if self.kind == "binary" else (target - prediction) ** 2
        )
        names, code = np.unique(shown[worst].astype(str), return_inverse=True)
        for i, name in enumerate(names.tolist()):
            if name in self.values or len(self.values) < 10_000:
                at = code == i
                sums = [at.sum(), loss[at].sum(), target[at].sum(), prediction[at].sum()]
                self.values[name] = self.values.get(name, np.zeros(4)) + sums
        return raised

    def save(self) -> tuple[dict[str, Any], list[str]]:
        """All of it as arrays, and the names of the values."""
        names = list(self.values)
        return {
            "scores": {name: scores.save() for name, scores in self.scores.items()},
            "series": {name: series.save() for name, series in self.series.items()},
            "drift": {name: drift.save() for name, drift in self.drift.items()},
            "values": np.array([self.values[name] for name in names]).reshape(len(names), 4),
        }, names

    def load(self, saved: dict[str, Any], names: list[str]) -> None:
        """Take over what was saved."""
        for name, arrays in saved.get("scores", {}).items():
            self.scores[name] = Scores(self.kind)
            self.scores[name].load(arrays)
        for name, arrays in saved.get("series", {}).items():
            self.series[name] = Series(self.kind)
            self.series[name].load(arrays)
        for name, arrays in saved.get("drift", {}).items():
            self.drift[name] = ErrorDrift(bounded=self.kind != "value")
            self.drift[name].load(arrays)
        self.values = dict(zip(names, saved["values"]))
