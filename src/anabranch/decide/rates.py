"""How regret grows and what is reached: exponents and ratios with their intervals, computed on the host."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike
from scipy.special import stdtrit


class Estimate(NamedTuple):
    """A number with its 95 % interval, and the values, one a seed, whose mean and Student interval they are."""

    value: float
    low: float
    high: float
    values: Float[np.ndarray, " s"]

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


def mean(values: ArrayLike) -> Estimate:
    """The mean over seeds. Of paired differences `ours - baseline` this is the paired interval."""
    values = np.asarray(values, np.float64)
    n, centre = len(values), float(values.mean())
    half = float(stdtrit(n - 1, 0.975) * values.std(ddof=1) / np.sqrt(n)) if n > 1 else 0.0
    return Estimate(centre, centre - half, centre + half, values)


def slope(horizons: ArrayLike, regrets: ArrayLike) -> Estimate:
    """The exponent b of mean regret ~ horizon^b: the log-log slope, with a jackknife interval over seeds.

    The regret of a single run may be negative, that of the mean over all seeds but one may not. `values` are the
    jackknife's pseudo-values, one a seed, as a `Comparison` takes them.

        >>> runs = np.array([[0.9], [1.0], [1.1]]) * np.array([10.0, 20.0, 40.0])
        >>> print(slope([100, 400, 1600], runs))
        0.5 [0.5, 0.5]

    Arguments:
        horizons: (h,) at least two different ones.
        regrets: (seeds, h).

    Raises:
        ValueError: if shapes do not fit, or a mean regret is not positive.
    """
    horizons, regrets = np.asarray(horizons, np.float64), np.asarray(regrets, np.float64)
    if regrets.ndim != 2 or horizons.shape != regrets.shape[1:] or len(np.unique(horizons)) < 2:
        raise ValueError(f"regrets must be (seeds, {len(horizons)} horizons), got shape {regrets.shape}")
    n = len(regrets)
    means = regrets.mean(0)
    others = (regrets.sum(0) - regrets) / (n - 1) if n > 1 else means[None]
    if not (means > 0).all() or not (others > 0).all():
        raise ValueError(f"mean regrets must be positive to have an exponent, got {means.min():g}")
    x = np.log(horizons) - np.log(horizons).mean()
    exponent = lambda means: np.log(means) @ x / (x @ x)
    return mean(n * exponent(means) - (n - 1) * exponent(others) if n > 1 else exponent(others))


def competitive_ratio(reward: ArrayLike, optimum: ArrayLike) -> tuple[Estimate, float]:
    """The mean of reward / optimum over seeds or instances, and the smallest.

    Raises:
        ValueError: if an optimum is not positive.
    """
    optimum = np.asarray(optimum, np.float64)
    if not (optimum > 0).all():
        raise ValueError(f"an optimum must be positive to have a ratio to it, got {optimum.min():g}")
    ratios = np.asarray(reward, np.float64) / optimum
    return mean(np.atleast_1d(ratios)), float(ratios.min())
