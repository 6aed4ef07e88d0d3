"""Anomaly scorers of fixed size: each says of every reading how unusual it is, then learns from it.

>>> import jax.numpy as jnp
>>> scorer = AnomalyLikelihood(warm=50)
>>> readings = jnp.sin(jnp.arange(300.0)).at[250].set(9.0)
>>> _, anomaly = scorer.advance(scorer.init(), readings)
>>> int(anomaly.alarm.argmax()), float(anomaly.score[250]) > 0.5
(250, True)
"""

import math
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from anabranch.cell import Cell, select

LARGEST = 1e15
"""Readings are clipped to ± this: float32 then holds whatever is computed with them."""


class Anomaly(NamedTuple):
    """What an anomaly scorer says of one reading."""

    score: Float[Array, ""]
    """From 0, as usual, to 1."""
    alarm: Bool[Array, ""]
    """The score has reached the scorer's threshold."""


class LikelihoodState(NamedTuple):
    """A forecast, how wrong forecasts have been lately and usually are, and the range of all readings."""

    n: Int[Array, ""]
    """Readings so far."""
    level: Float[Array, ""]
    """Forecast of the next reading."""
    error: Float[Array, ""]
    """Long-term mean of the forecasts' absolute errors."""
    recent: Float[Array, ""]
    """Average surprise of the last readings."""
    mean: Float[Array, ""]
    """Long-term mean of `recent`."""
    variance: Float[Array, ""]
    """Long-term variance of `recent`."""
    low: Float[Array, ""]
    high: Float[Array, ""]


class AnomalyLikelihood(Cell):
    """Anomaly likelihood: how improbable it is that readings are as surprising as they have been lately.

    x is one f32 in any unit; one that is not finite is no reading: its score is 0 and the state stays as it is. The
    forecast is exponential smoothing. The surprise of a reading, from 0 to 1, is the part of a normal distribution with
    the usual absolute error that is nearer to the forecast. Surprises are averaged over the last `short` readings; the
    average is held against a normal distribution of what it has been over the last `long` ones, and the score is log₁₀
    of the upper tail, over −10: 0.5 is a tail of 10⁻⁵, at which the paper raises its alarm, and 1 one of 10⁻¹⁰. A
    reading outside the range of all before it, by a twentieth of that range, scores 1 at once: so does now and then a
    harmless one while the range is young.

    The paper's surprise comes from a sequence memory (HTM), here replaced by the simplest forecast. Approximated: both
    windows fade exponentially (a span of n weighs like a mean over n) instead of ending sharply, so that the state is
    eight numbers whatever they are. The rule about the range is that of the authors' detector in their benchmark.

    Ahmad, Lavin, Purdy & Agha, "Unsupervised real-time anomaly detection for streaming data", Neurocomputing 262, 2017;
    Lavin & Ahmad, "Evaluating real-time anomaly detection algorithms", ICMLA 2015.

    Raises:
        ValueError: if `alpha` or `threshold` is outside (0, 1], `warm` is not positive, or not 1 ≤ short ≤ long.
    """

    alpha: float = 0.3
    """Weight of the newest reading in the forecast."""
    short: int = 10
    """Readings over which surprise is averaged."""
    long: int = 8000
    """Readings from which is learned what is usual."""
    warm: int = 100
    """Readings before which the score is 0."""
    threshold: float = 0.5
    """Score of an alarm."""

    def __check_init__(self):
        _fractions(self, "alpha", "threshold")
        if self.warm < 1:
            raise ValueError(f"AnomalyLikelihood: warm must be positive, got {self.warm}")
        if not 1 <= self.short <= self.long:
            raise ValueError(f"AnomalyLikelihood: expected 1 <= short <= long, got {self.short} and {self.long}")

    def init(self, *, key: PRNGKeyArray | None = None) -> LikelihoodState:
        zero, inf = jnp.zeros(()), jnp.full((), jnp.inf)
        return LikelihoodState(jnp.zeros((), jnp.int32), zero, zero, zero, zero, zero, inf, -inf)

    def step(self, state: LikelihoodState, x: Float[Array, ""] | float) -> tuple[LikelihoodState, Anomaly]:
        there = jnp.isfinite(x)
        x = jnp.clip(jnp.where(there, x, 0.0), -LARGEST, LARGEST)
        n, errors = state.n, jnp.maximum(state.n, 1)  # the first reading has no forecast, hence no error
        error = jnp.where(n == 0, 0.0, jnp.abs(x - state.level))
        # The floor is what float32 tells apart: forecasts of a metric that never changes have no error.
        usual = state.error + 1e-6 * jnp.abs(state.level) + 1e-12
        surprise = jax.lax.erf(error / (usual * math.sqrt(math.pi)))  # of a normal distribution, E|e| = σ √(2/π)
        recent = state.recent + _weight(errors, self.short) * (surprise - state.recent)
        z = (recent - state.mean) / jnp.sqrt(state.variance + 1e-6)
        tail = -jax.scipy.special.log_ndtr(-z) / (10 * math.log(10))
        margin = 0.05 * (state.high - state.low)
        outside = (x > state.high + margin) | (x < state.low - margin)
        score = jnp.where(outside, 1.0, jnp.clip(tail, 0.0, 1.0))
        score = jnp.where(there & (n >= self.warm), score, 0.0)

        weight = _weight(errors, self.long)
        learned = LikelihoodState(
            n + 1,
            state.level + jnp.maximum(1 / (n + 1), self.alpha) * (x - state.level),
            state.error + weight * (error - state.error),
            recent,
            state.mean + weight * (recent - state.mean),
            (1 - weight) * (state.variance + weight * (recent - state.mean) ** 2),
            jnp.minimum(state.low, x),
            jnp.maximum(state.high, x),
        )
        return select(there, learned, state), Anomaly(score, score >= self.threshold)


class HalfSpaceState(NamedTuple):
    """How many readings of the last full window, and of this one, fell into each node of T trees."""

    n: Int[Array, ""]
    """Readings so far."""
    reference: Float[Array, "T nodes"]
    latest: Float[Array, "T nodes"]


class HalfSpaceTrees(Cell):
    """Half-space trees: a reading is unusual where few of the last window fell.

    x is f32[D], each feature between 0 and 1. Every tree halves a random box around this range again and again, along
    random features, down to `height`; a reading's mass at a node is how many readings of the last full window of
    `window` passed it. The score is 1 minus the sum over the trees, down to the first node with fewer than a tenth of
    the window, of mass times 2^depth, as a part of the largest possible sum; it is that of River 0.26 for the same
    splits. It is 0 in the first window. A reading that is not finite has the score 0 and is not learned.

    The state is 2 T (2^(height + 1) − 1) numbers, 40 KB as given.

    Arguments:
        features: D.
        trees: T.
        height: halvings from the root to a leaf.
        window: readings.
        threshold: score of an alarm.
        seed: of the random splits.

    Tan, Ting & Liu, "Fast anomaly detection for streaming data", IJCAI 2011.

    Raises:
        ValueError: if a count is not positive or `threshold` is outside (0, 1].
    """

    feature: Int[Array, "T splits"]
    """Which feature each split looks at; the children of split i are nodes 2i + 1 and 2i + 2."""
    border: Float[Array, "T splits"]
    """Readings below it go to the first child."""
    threshold: float
    height: int = eqx.field(static=True)
    window: int = eqx.field(static=True)

    def __init__(
        self,
        features: int = 1,
        trees: int = 10,
        height: int = 8,
        window: int = 250,
        threshold: float = 0.95,
        seed: int = 0,
    ):
        for name, value in {"features": features, "trees": trees, "height": height, "window": window}.items():
            if value < 1:
                raise ValueError(f"HalfSpaceTrees: {name} must be positive, got {value}")
        self.threshold, self.height, self.window = threshold, height, window
        _fractions(self, "threshold")
        draw = np.random.default_rng(seed)
        splits = 2**height - 1
        feature = draw.integers(0, features, (trees, splits))
        # The box of a feature: a random centre, and wide enough to cover [0, 1] from there.
        centre = draw.uniform(size=(trees, 1, features))
        reach = 2 * np.maximum(centre, 1 - centre)
        low = np.broadcast_to(centre - reach, (trees, 2 * splits + 1, features)).copy()
        high = np.broadcast_to(centre + reach, low.shape).copy()
        border = np.empty((trees, splits))
        every = np.arange(trees)
        for i in range(splits):
            at = feature[:, i]
            border[:, i] = (low[every, i, at] + high[every, i, at]) / 2
            for child in (2 * i + 1, 2 * i + 2):
                low[:, child], high[:, child] = low[:, i], high[:, i]
            high[every, 2 * i + 1, at] = low[every, 2 * i + 2, at] = border[:, i]
        self.feature, self.border = jnp.asarray(feature, jnp.int32), jnp.asarray(border, jnp.float32)

    def init(self, *, key: PRNGKeyArray | None = None) -> HalfSpaceState:
        trees, splits = self.feature.shape
        mass = jnp.zeros((trees, 2 * splits + 1))
        return HalfSpaceState(jnp.zeros((), jnp.int32), mass, mass)

    def step(self, state: HalfSpaceState, x: Float[Array, " features"]) -> tuple[HalfSpaceState, Anomaly]:
        there = jnp.all(jnp.isfinite(x))
        trees = jnp.arange(len(self.feature))
        node = jnp.zeros(len(trees), jnp.int32)
        path = [node]
        for _ in range(self.height):
            right = x[self.feature[trees, node]] >= self.border[trees, node]
            node = 2 * node + 1 + right.astype(jnp.int32)
            path.append(node)
        passed = jnp.stack(path, axis=1)

        mass = state.reference[trees[:, None], passed]
        enough = jnp.cumprod(mass[:, :-1] >= 0.1 * self.window, axis=1)
        weight = 2.0 ** jnp.arange(self.height + 1)
        total = (mass * weight * jnp.pad(enough, ((0, 0), (1, 0)), constant_values=1)).sum()
        score = 1 - total / (len(trees) * self.window * (2 ** (self.height + 1) - 1))
        score = jnp.where(there & (state.n >= self.window), score, 0.0)

        latest = state.latest.at[trees[:, None], passed].add(1.0)
        full = (state.n + 1) % self.window == 0
        learned = HalfSpaceState(state.n + 1, jnp.where(full, latest, state.reference), jnp.where(full, 0.0, latest))
        return select(there, learned, state), Anomaly(score, score >= self.threshold)


def _weight(n: Int[Array, ""], span: int) -> Float[Array, ""]:
    """Weight of the n-th value in a mean of all so far, and from then on in one that fades over a span."""
    return jnp.maximum(1 / n, 2 / (span + 1))


def _fractions(cell: Cell, *names: str) -> None:
    for name in names:
        value = getattr(cell, name)
        if isinstance(value, float | int) and not 0 < value <= 1:
            raise ValueError(f"{type(cell).__name__}: {name} must be in (0, 1], got {value}")
