"""Streaming metrics: cells that take (target, prediction) and whose state does not grow.

A prediction may be a class (int), the probability of class 1 (f32 scalar) or the scores of all classes (f32[C]); the
target is a class. A metric is a function of whole arrays too, which is what `anabranch.drive.evaluate` wants:

    >>> kappa = Kappa(2)
    >>> state = kappa.init()
    >>> for y, p in [(1, 0.9), (0, 0.2), (1, 0.4), (0, 0.1)]:
    ...     state = kappa.update(state, y, p)
    >>> kappa.value(state).item()
    0.5
    >>> kappa(jnp.array([1, 0, 1, 0]), jnp.array([0.9, 0.2, 0.4, 0.1])).item()
    0.5

Cohen, "A coefficient of agreement for nominal scales", 1960; Bifet et al., "Efficient online evaluation of big data
stream classifiers", KDD 2015 (κ_M, κ_T); Guo et al., "On calibration of modern neural networks", ICML 2017.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from anabranch.cell import Cell, State
from anabranch.learn.base import label


class Metric(Cell):
    """A number, or a few, about the predictions so far. Write `init`, `update` and `value`."""

    def update(self, state: State, target: Any, prediction: Any) -> State:
        """Count one prediction."""
        raise NotImplementedError(f"{type(self).__name__} is abstract: it defines no `update`")

    def value(self, state: State) -> PyTree:
        """The metric so far; 0 before the first prediction."""
        raise NotImplementedError(f"{type(self).__name__} is abstract: it defines no `value`")

    def step(self, state: State, x: tuple[Any, Any]) -> tuple[State, PyTree]:
        """Counts `x = (target, prediction)` and gives the metric so far: a scan gives its whole curve."""
        state = self.update(state, *x)
        return state, self.value(state)

    def __call__(self, targets: Any, predictions: Any) -> PyTree:
        """The metric of a whole stream; both with a leading time axis."""
        return _whole(self, jnp.asarray(targets), jax.tree.map(jnp.asarray, predictions))


@eqx.filter_jit
def _whole(metric: Metric, targets, predictions):
    # The values on the way are not asked for, so they are not computed.
    return metric.value(
        jax.lax.scan(lambda s, x: (metric.update(s, *x), None), metric.init(), (targets, predictions))[0]
    )


class AccuracyState(NamedTuple):
    """Predictions scored, and how many of them were right."""

    n: Int[Array, ""]
    right: Int[Array, ""]


class Accuracy(Metric):
    """Share of right predictions."""

    def init(self, *, key: PRNGKeyArray | None = None) -> AccuracyState:
        return AccuracyState(_zero(), _zero())

    def update(self, state: AccuracyState, target, prediction) -> AccuracyState:
        return AccuracyState(state.n + 1, state.right + (label(prediction) == target))

    def value(self, state: AccuracyState) -> Float[Array, ""]:
        return _ratio(state.right, state.n)


class WindowedAccuracyState(NamedTuple):
    """Predictions scored, and whether each of the last `window` was right."""

    n: Int[Array, ""]
    ring: Bool[Array, " window"]


class WindowedAccuracy(Metric):
    """Share of right predictions among the last `window`.

    Raises:
        ValueError: if `window` is not positive.
    """

    window: int = eqx.field(static=True, default=1000)

    def __check_init__(self):
        if self.window < 1:
            raise ValueError(f"WindowedAccuracy: window must be at least 1, got {self.window}")

    def init(self, *, key: PRNGKeyArray | None = None) -> WindowedAccuracyState:
        return WindowedAccuracyState(_zero(), jnp.zeros(self.window, bool))

    def update(self, state: WindowedAccuracyState, target, prediction) -> WindowedAccuracyState:
        return WindowedAccuracyState(state.n + 1, state.ring.at[state.n % self.window].set(label(prediction) == target))

    def value(self, state: WindowedAccuracyState) -> Float[Array, ""]:
        return _ratio(state.ring.sum(), jnp.minimum(state.n, self.window))


class Kappa(Metric):
    """Cohen's κ: accuracy above that of a classifier which guesses with the same class frequencies.

    State: the confusion matrix i32[C, C], targets down, predictions across.
    """

    classes: int = eqx.field(static=True)

    def init(self, *, key: PRNGKeyArray | None = None) -> Int[Array, "C C"]:
        return jnp.zeros((self.classes, self.classes), jnp.int32)

    def update(self, state, target, prediction) -> Int[Array, "C C"]:
        return state.at[target, label(prediction)].add(1)

    def value(self, state) -> Float[Array, ""]:
        share = state / jnp.maximum(state.sum(), 1)
        return _above(jnp.trace(share), share.sum(0) @ share.sum(1))


class KappaMState(NamedTuple):
    """The counts behind `KappaM`."""

    n: Int[Array, ""]
    right: Int[Array, ""]
    majority: Int[Array, ""]
    """How often the most frequent class so far would have been right."""
    counts: Int[Array, " C"]


class KappaM(Metric):
    """κ_M: accuracy above that of always predicting the most frequent class so far."""

    classes: int = eqx.field(static=True)

    def init(self, *, key: PRNGKeyArray | None = None) -> KappaMState:
        return KappaMState(_zero(), _zero(), _zero(), jnp.zeros(self.classes, jnp.int32))

    def update(self, state: KappaMState, target, prediction) -> KappaMState:
        guessed = (state.n > 0) & (jnp.argmax(state.counts) == target)
        return KappaMState(
            state.n + 1,
            state.right + (label(prediction) == target),
            state.majority + guessed,
            state.counts.at[target].add(1),
        )

    def value(self, state: KappaMState) -> Float[Array, ""]:
        return _above(_ratio(state.right, state.n), _ratio(state.majority, state.n))


class KappaTState(NamedTuple):
    """The counts behind `KappaT`."""

    n: Int[Array, ""]
    right: Int[Array, ""]
    same: Int[Array, ""]
    """How often the target was the one before it."""
    last: Int[Array, ""]


class KappaT(Metric):
    """κ_T: accuracy above that of repeating the last target. The one to look at where labels come in runs."""

    def init(self, *, key: PRNGKeyArray | None = None) -> KappaTState:
        return KappaTState(_zero(), _zero(), _zero(), jnp.full((), -1, jnp.int32))

    def update(self, state: KappaTState, target, prediction) -> KappaTState:
        target = jnp.asarray(target, jnp.int32)
        right = state.right + (label(prediction) == target)
        return KappaTState(state.n + 1, right, state.same + (state.last == target), target)

    def value(self, state: KappaTState) -> Float[Array, ""]:
        return _above(_ratio(state.right, state.n), _ratio(state.same, state.n))


class LogLossState(NamedTuple):
    """Predictions scored, and their mean loss in nats."""

    n: Int[Array, ""]
    mean: Float[Array, ""]


class LogLoss(Metric):
    """Mean of −log of the probability given to the target, in nats; probabilities below 1e-15 count as 1e-15.

    Takes the probability of class 1 or those of all classes.
    """

    def init(self, *, key: PRNGKeyArray | None = None) -> LogLossState:
        return LogLossState(_zero(), jnp.zeros(()))

    def update(self, state: LogLossState, target, prediction) -> LogLossState:
        p = jnp.asarray(prediction, jnp.float32)
        given = p[target] if p.ndim else jnp.where(jnp.asarray(target) == 1, p, 1 - p)
        loss = -jnp.log(jnp.clip(given, 1e-15, 1.0))
        return LogLossState(state.n + 1, state.mean + (loss - state.mean) / (state.n + 1))

    def value(self, state: LogLossState) -> Float[Array, ""]:
        return state.mean


class ROCAUC(Metric):
    """Area under the ROC curve, from a histogram of the predicted probabilities of class 1: i32[2, bins].

    Ties within a bin count one half. Bins are equal steps of log-odds in ±17 (beyond which a f32 probability is 0 or
    1 anyway), so that the scores of a rare class, all close to 0, do not share one bin. With the default 4,096 bins the
    area is within 1e-3 of the exact one unless scores differ by less than 0.01 in log-odds.
    """

    bins: int = eqx.field(static=True, default=4096)

    def init(self, *, key: PRNGKeyArray | None = None) -> Int[Array, "2 bins"]:
        return jnp.zeros((2, self.bins), jnp.int32)

    def update(self, state, target, prediction) -> Int[Array, "2 bins"]:
        p = _positive(prediction)
        odds = jnp.log(p) - jnp.log1p(-p)
        place = jnp.clip((odds + 17) / 34 * self.bins, 0, self.bins - 1).astype(jnp.int32)
        return state.at[jnp.asarray(target, jnp.int32), place].add(1)

    def value(self, state) -> Float[Array, ""]:
        """0 until both classes have been seen."""
        negative, positive = state / jnp.maximum(state.sum(axis=1, keepdims=True), 1)
        return (positive * (jnp.cumsum(negative) - negative / 2)).sum()


class CalibrationState(NamedTuple):
    """Predictions by the bin of their probability."""

    count: Int[Array, " bins"]  # pyright: ignore[reportIncompatibleMethodOverride]
    confidence: Float[Array, " bins"]
    """Mean predicted probability of class 1 in each bin."""
    frequency: Float[Array, " bins"]
    """Share of class 1 in each bin."""


class Calibration(Metric):
    """Reliability diagram and expected calibration error of the predicted probability of class 1.

    `value` is a dict: "error", the mean over events of |confidence − frequency| of their bin, and the arrays
    "count", "confidence" and "frequency" of `bins` equal bins of probability.
    """

    bins: int = eqx.field(static=True, default=10)

    def init(self, *, key: PRNGKeyArray | None = None) -> CalibrationState:
        return CalibrationState(jnp.zeros(self.bins, jnp.int32), jnp.zeros(self.bins), jnp.zeros(self.bins))

    def update(self, state: CalibrationState, target, prediction) -> CalibrationState:
        p = _positive(prediction)
        b = jnp.clip(p * self.bins, 0, self.bins - 1).astype(jnp.int32)
        n = state.count[b] + 1
        return CalibrationState(
            state.count.at[b].set(n),
            state.confidence.at[b].add((p - state.confidence[b]) / n),
            state.frequency.at[b].add((target - state.frequency[b]) / n),
        )

    def value(self, state: CalibrationState) -> dict[str, Array]:
        share = state.count / jnp.maximum(state.count.sum(), 1)
        return {"error": (share * jnp.abs(state.confidence - state.frequency)).sum(), **state._asdict()}


def _zero() -> Int[Array, ""]:
    return jnp.zeros((), jnp.int32)


def _ratio(part, whole) -> Float[Array, ""]:
    return part / jnp.maximum(whole, 1)


def _above(accuracy, chance) -> Float[Array, ""]:
    """(accuracy − chance) / (1 − chance), and 0 where chance is perfect."""
    room = 1 - chance
    return jnp.where(room > 0, (accuracy - chance) / jnp.where(room > 0, room, 1.0), 0.0)


def _positive(prediction) -> Float[Array, ""]:
    """The probability of class 1, from itself or from those of two classes."""
    p = jnp.asarray(prediction, jnp.float32)
    if p.ndim and p.shape[-1] != 2:
        raise ValueError(f"a probability of class 1, or of two classes, is needed; got shape {p.shape}")
    return p[1] if p.ndim else p
