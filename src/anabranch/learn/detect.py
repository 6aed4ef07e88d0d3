"""Drift detectors of fixed size. All raise an `Alarm` and start afresh after a drift; alarms are those of River 0.26.

>>> import jax.numpy as jnp
>>> detector = DDM()
>>> errors = jnp.concatenate([jnp.arange(200) % 10 == 0, jnp.ones(50)])  # 10 % errors, then nothing else
>>> _, alarm = detector.advance(detector.init(), errors)
>>> int(alarm.warning.argmax()), int(alarm.drift.argmax())
(204, 209)
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from anabranch.branch import branch
from anabranch.cell import select
from anabranch.learn.base import Alarm, Detector

ROWS = 32  # a window of up to 2^31 items, as far as an int32 counts


class ADWINState(NamedTuple):
    """An exponential histogram of the window, and what has come since it was last checked."""

    recent: Float[Array, " clock"]
    """Items since the last check, not yet in the histogram."""
    total: Float[Array, "R M"]
    """Sum of each bucket; row r holds buckets of 2^r items, oldest first, and higher rows are older."""
    squares: Float[Array, "R M"]
    """Sum of squared deviations from the bucket's own mean."""
    used: Int[Array, " R"]
    """Buckets in use in each row."""
    width: Int[Array, ""]
    """Items in the window."""


class ADWIN(Detector):
    """Adaptive windowing: a drift wherever some split of the window has two means that differ too much.

    The window is kept as an exponential histogram: at most `max_buckets` buckets of each size 2^r, so about 1.4 KB
    whatever its length. x is one finite f32, often a 0/1 error. It never warns.

    The window is looked at only every `clock` items. Up to then an item is one write to a small buffer, and the
    histogram, whose shape depends on nothing but the number of items, takes the whole buffer at once at the check.
    In a batch, only rows that are due are checked (`branch`).

    Bifet & Gavaldà, "Learning from time-changing data with adaptive windowing", SDM 2007.

    Raises:
        ValueError: if delta is outside (0, 1), or a count is not positive.
    """

    delta: float = 0.002
    """Confidence: the probability of a false alarm, roughly per check."""
    clock: int = eqx.field(static=True, default=32)
    """Items between checks."""
    max_buckets: int = eqx.field(static=True, default=5)
    """Buckets of one size."""
    min_window: int = eqx.field(static=True, default=5)
    """Least number of items on either side of a split."""
    grace: int = eqx.field(static=True, default=10)
    """No check up to this many items."""

    def __check_init__(self):
        if isinstance(self.delta, float | int) and not 0 < self.delta < 1:
            raise ValueError(f"ADWIN: delta must be in (0, 1), got {self.delta}")
        _positive(self, "clock", "max_buckets", "min_window")

    def init(self, *, key: PRNGKeyArray | None = None) -> ADWINState:
        buckets = jnp.zeros((ROWS, self.max_buckets))
        return ADWINState(jnp.zeros(self.clock), buckets, buckets, jnp.zeros(ROWS, jnp.int32), jnp.zeros((), jnp.int32))

    def step(self, state: ADWINState, x) -> tuple[ADWINState, Alarm]:
        state = state._replace(recent=state.recent.at[state.width % self.clock].set(x), width=state.width + 1)
        state, drift = branch(
            state.width % self.clock == 0, self._check, lambda state: (state, jnp.asarray(False)), state, bucket=32
        )
        return state, Alarm(jnp.zeros_like(drift), drift)

    def _check(self, state: ADWINState) -> tuple[ADWINState, Bool[Array, ""]]:
        state = self._compress(state)
        drift = (state.width > self.grace) & self._cut(state)
        return select(drift, self.init(), state), drift

    def _compress(self, state: ADWINState) -> ADWINState:
        """Append `recent` to row 0; in each row merge the oldest pairs until `max_buckets` are left, into the next."""
        most, half = self.max_buckets, (self.clock + 1) // 2  # a row that takes k buckets hands on at most ⌈k/2⌉
        width = 2 * half
        place = jnp.arange(most + width)

        def row(arriving, held):
            new, k = arriving
            old, c, items = held
            # (2, most + width): sums and squares of the row's buckets, oldest first, the arriving ones behind them.
            line = jnp.where(place < c, jnp.pad(old, ((0, 0), (0, width))), new[:, jnp.clip(place - c, 0, width - 1)])
            pairs = jnp.maximum(c + k - most + 1, 0) // 2
            (a, sa), (b, sb) = line[:, 0 : 2 * half : 2], line[:, 1 : 2 * half : 2]
            merged = jnp.stack([a + b, sa + sb + (a - b) ** 2 / (2 * items)])
            c = c + k - 2 * pairs
            left = jnp.where(place[:most] < c, jax.lax.dynamic_slice(line, (0, 2 * pairs), (2, most)), 0.0)
            return (jnp.pad(merged, ((0, 0), (0, width - half))), pairs), (left, c)

        singles = jnp.zeros((2, width)).at[0, : self.clock].set(state.recent)
        _, (buckets, used) = jax.lax.scan(
            row,
            (singles, jnp.asarray(self.clock, jnp.int32)),
            (jnp.stack([state.total, state.squares], axis=1), state.used, 2.0 ** jnp.arange(ROWS)),
        )
        return state._replace(total=buckets[:, 0], squares=buckets[:, 1], used=used)

    def _cut(self, state: ADWINState) -> Bool[Array, ""]:
        """Whether older and newer items differ in mean at any border between two buckets."""
        there = jnp.arange(self.max_buckets) < state.used[:, None]
        items = jnp.where(there, jnp.left_shift(1, jnp.arange(ROWS))[:, None], 0)
        # Oldest first: from the highest row down. Sums of either side are summed separately, not subtracted.
        n, total = items[::-1].reshape(-1), jnp.where(there, state.total, 0.0)[::-1].reshape(-1)
        n0, total0 = jnp.cumsum(n), jnp.cumsum(total)
        n1, total1 = state.width - n0, jnp.cumsum(total[::-1])[::-1] - total
        fair = (n > 0) & (n0 >= self.min_window) & (n1 >= self.min_window)

        width = state.width.astype(jnp.float32)
        inside = jnp.where(there, state.squares, 0.0).sum()
        between = (n * (total / jnp.maximum(n, 1) - total0[-1] / width) ** 2).sum()
        variance = (inside + between) / width
        confidence = jnp.log(2 * jnp.log(width) / self.delta)
        m = 1 / jnp.maximum(n0 - self.min_window + 1, 1) + 1 / jnp.maximum(n1 - self.min_window + 1, 1)
        bound = jnp.sqrt(2 * m * variance * confidence) + 2 / 3 * confidence * m
        apart = jnp.abs(total0 / jnp.maximum(n0, 1) - total1 / jnp.maximum(n1, 1))
        return jnp.any(fair & (apart > bound))


class DDMState(NamedTuple):
    """Items, their errors, and the lowest error rate so far with its standard deviation."""

    n: Int[Array, ""]
    errors: Int[Array, ""]
    p_min: Float[Array, ""]
    s_min: Float[Array, ""]


class DDM(Detector):
    """Drift detection method: warns, then alarms, when the error rate rises above the lowest it has been.

    x is 1 (or True) for an error and 0 for a right answer. With p the error rate and s = √(p(1−p)/n) since the last
    drift, and p_min, s_min theirs when p + s was least: a warning when p + s > p_min + `warning` s_min, a drift when
    p + s > p_min + `drift` s_min, both only after `warm` items.

    Gama, Medas, Castillo & Rodrigues, "Learning with drift detection", SBIA 2004.

    Raises:
        ValueError: if `warm` is not positive.
    """

    warm: int = 30
    warning: float = 2.0
    drift: float = 3.0

    def __check_init__(self):
        _positive(self, "warm")

    def init(self, *, key: PRNGKeyArray | None = None) -> DDMState:
        zero, inf = jnp.zeros((), jnp.int32), jnp.full((), jnp.inf)
        return DDMState(zero, zero, inf, inf)

    def step(self, state: DDMState, x) -> tuple[DDMState, Alarm]:
        n, errors = state.n + 1, state.errors + (jnp.asarray(x) != 0)
        p = errors / n
        s = jnp.sqrt(p * (1 - p) / n)
        warm = n > self.warm
        best = warm & (p + s <= state.p_min + state.s_min)
        p_min, s_min = jnp.where(best, p, state.p_min), jnp.where(best, s, state.s_min)
        drift = warm & (p + s > p_min + self.drift * s_min)
        warning = warm & (p + s > p_min + self.warning * s_min) & ~drift
        return select(drift, self.init(), DDMState(n, errors, p_min, s_min)), Alarm(warning, drift)


class PageHinkleyState(NamedTuple):
    """The running mean, and how far items have strayed from it, up and down."""

    n: Int[Array, ""]
    mean: Float[Array, ""]
    rise: Float[Array, ""]
    """Discounted sum of x − mean − delta."""
    fall: Float[Array, ""]
    """Discounted sum of x − mean + delta."""
    lowest: Float[Array, ""]
    highest: Float[Array, ""]


class PageHinkley(Detector):
    """Page-Hinkley test, both ways: a drift when the discounted sum of deviations from the running mean has climbed
    `threshold` above its lowest point, or fallen `threshold` below its highest.

    x is one finite f32. It never warns.

    Page, "Continuous inspection schemes", Biometrika 41, 1954.

    Raises:
        ValueError: if `warm` or `threshold` is not positive.
    """

    warm: int = 30
    """No alarm before this many items."""
    delta: float = 0.005
    """Deviations smaller than this are tolerated."""
    threshold: float = 50.0
    alpha: float = 1 - 1e-4
    """Discount of the sums, per item."""

    def __check_init__(self):
        _positive(self, "warm", "threshold")

    def init(self, *, key: PRNGKeyArray | None = None) -> PageHinkleyState:
        zero = jnp.zeros(())
        return PageHinkleyState(
            jnp.zeros((), jnp.int32), zero, zero, zero, jnp.full((), jnp.inf), jnp.full((), -jnp.inf)
        )

    def step(self, state: PageHinkleyState, x) -> tuple[PageHinkleyState, Alarm]:
        n = state.n + 1
        mean = state.mean + (x - state.mean) / n
        rise = self.alpha * state.rise + (x - mean) - self.delta
        fall = self.alpha * state.fall + (x - mean) + self.delta
        lowest, highest = jnp.minimum(state.lowest, rise), jnp.maximum(state.highest, fall)
        drift = (n >= self.warm) & ((rise - lowest > self.threshold) | (highest - fall > self.threshold))
        state = select(drift, self.init(), PageHinkleyState(n, mean, rise, fall, lowest, highest))
        return state, Alarm(jnp.zeros_like(drift), drift)


def _positive(cell: Detector, *names: str) -> None:
    for name in names:
        value = getattr(cell, name)
        if isinstance(value, float | int) and value <= 0:
            raise ValueError(f"{type(cell).__name__}: {name} must be positive, got {value}")
