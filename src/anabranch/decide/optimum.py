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


class Bidding(NamedTuple):
    """The fluid optimum of bidding in first-price auctions."""

    value: float
    """Reward an auction."""
    price: float
    """λ at the optimum, ∂value / ∂rho."""
    worth: Float[np.ndarray, " n"]
    """Of each value: max_b (v - (1 + λ) b) G(b) + λ rho. Their mean is the optimum."""


def first_price(values: ArrayLike, bids: ArrayLike, chance: ArrayLike, rho: float) -> Bidding:
    """The best way to bid: max E[(v - b(v)) G(b(v))] subject to E[b(v) G(b(v))] ≤ rho.

    The dual, E[max_b (v - (1 + λ) b) G(b)] + λ rho, is minimised over λ; where bids may be mixed the two are equal.

    Arguments:
        values: equally likely values (n,): a sample, or quantiles.
        bids: what may be bid (m,), ascending.
        chance: the probability G that each bid wins (m,).
        rho: what may be spent in an auction on average.

        >>> quantiles = (np.arange(1000) + 0.5) / 1000
        >>> best = first_price(quantiles, quantiles, quantiles, 1 / 48)  # all uniform: λ = 1/√(12 rho) - 1
        >>> round(best.price, 2), round(best.value, 4)
        (1.0, 0.0625)

    Raises:
        ValueError: if rho is not positive, or the shapes of bids and chance differ.
    """
    values, bids, chance = (np.asarray(a, np.float64) for a in (values, bids, chance))
    if not rho > 0:
        raise ValueError(f"rho must be positive, got {rho}")
    if bids.shape != chance.shape or bids.ndim != 1:
        raise ValueError(f"each bid needs its chance, got shapes {bids.shape} and {chance.shape}")
    gain, spend = values[:, None] * chance, bids * chance

    def respond(price):
        score = gain - (1 + price) * spend
        best = score.argmax(1)
        return score[np.arange(len(values)), best] + price * rho, spend[best].mean()

    low, high = 0.0, float(values.max() / rho)
    if respond(0.0)[1] <= rho:
        high = 0.0
    for _ in range(40 if high else 0):
        middle = (low + high) / 2
        low, high = (middle, high) if respond(middle)[1] > rho else (low, middle)
    worth = respond(high)[0]
    return Bidding(float(worth.mean()), high, worth)
