"""Offline optima, computed on the host: what claims measure regret and ratios against."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike
from scipy.optimize import linprog


class Fluid(NamedTuple):
    """The optimum of a fluid problem."""

    value: float
    """Reward a round."""
    p: Float[np.ndarray, " k"]
    """The share of each arm."""
    prices: Float[np.ndarray, " m"]
    """∂value / ∂rho: what one more unit of each resource a round is worth."""


def fluid(rewards: ArrayLike, costs: ArrayLike, rho: ArrayLike) -> Fluid:
    """The best fixed mixture of arms: max Σ p_i r_i subject to Σ p_i c_i ≤ rho, p a distribution.

    In hindsight, `rewards` (k,) and `costs` (k, m) are means over the rounds, and `rho` (m,) is budget / rounds.

        >>> best = fluid([0.0, 1.0, 0.4], [[0.0], [1.0], [0.1]], [0.55])
        >>> round(best.value, 6), best.p.round(3).tolist(), best.prices.round(4).tolist()
        (0.7, [0.0, 0.5, 0.5], [0.6667])

    Raises:
        ValueError: if shapes do not fit, or no mixture keeps to `rho`.
    """
    rewards, costs, rho = (np.asarray(a, np.float64) for a in (rewards, costs, rho))
    if costs.shape != (*rewards.shape, *rho.shape) or costs.ndim != 2:
        raise ValueError(f"need (k,), (k, m) and (m,), got {rewards.shape}, {costs.shape} and {rho.shape}")
    found = linprog(-rewards, A_ub=costs.T, b_ub=rho, A_eq=np.ones((1, len(rewards))), b_eq=[1.0], method="highs")
    if found.status != 0:
        raise ValueError(f"no mixture of arms keeps to rho = {rho.tolist()}: {found.message}")
    return Fluid(-float(found.fun), found.x, -found.ineqlin.marginals)
