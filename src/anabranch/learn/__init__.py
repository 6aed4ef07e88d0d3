"""Models that keep learning on the stream, and what it takes to follow them: detectors, metrics, `streams`."""

from anabranch.learn import streams
from anabranch.learn.anomaly import Anomaly, AnomalyLikelihood, HalfSpaceTrees
from anabranch.learn.base import Alarm, Detector, Sgd, cross_entropy, label
from anabranch.learn.detect import ADWIN, DDM, PageHinkley
from anabranch.learn.linear import (
    LinearRegression,
    LogisticRegression,
    Scaled,
    Scaler,
    SoftmaxRegression,
    adagrad,
    ftrl,
)
from anabranch.learn.metrics import (
    ROCAUC,
    Accuracy,
    Calibration,
    Kappa,
    KappaM,
    KappaT,
    LogLoss,
    Metric,
    WindowedAccuracy,
)
from anabranch.learn.trees import AdaptiveForest, HoeffdingTree

__all__ = [
    "ADWIN", "DDM", "ROCAUC", "Accuracy", "AdaptiveForest", "Alarm", "Anomaly", "AnomalyLikelihood", "Calibration",
    "Detector", "HalfSpaceTrees", "HoeffdingTree", "Kappa", "KappaM", "KappaT", "LinearRegression", "LogLoss",
    "LogisticRegression", "Metric", "PageHinkley", "Scaled", "Scaler", "Sgd", "SoftmaxRegression",
    "WindowedAccuracy", "adagrad", "cross_entropy", "ftrl", "label", "streams",
]  # fmt: skip
