"""Shading by a learned distribution and pacing by a multiplier: order √T regret in first-price auctions with budgets.

A. Synthetic: values uniform, other bids log-normal (clipped at 1). How regret grows with full and with one-sided
   feedback, and reward against bidding without a price, against second-price pacing, against the best constant shade in
   hindsight (reported) and against knowing the distribution (reported).
B. Real prices: half-hours of the New South Wales electricity market, which are anything but drawn alike.
"""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.stats import norm
from jax.tree_util import Partial

from anabranch import data
from anabranch.claim import Comparison, Size
from anabranch.decide.base import CumReward
from anabranch.decide.baselines import SecondPrice, Shade, Unpaced
from anabranch.decide.budget import Budget, BudgetRegret, Spent
from anabranch.decide.first_price_budgets import FirstPriceBidder, FirstPriceDraws, FirstPriceTrace, uniform
from anabranch.decide.optimum import first_price
from anabranch.decide.rates import slope
from anabranch.drive import play

FIRST_SEED = 100  # those below were used while writing
RHOS = (0.05, 0.1, 0.2)
HORIZONS = (1000, 4000, 16_000, 64_000)
QUANTILES = (np.arange(1000) + 0.5) / 1000
"""Values that stand for all."""
UNBOUND = (
    "the budget does not bind: there is no price to find, and what regret there is comes from estimating G, of which "
    "one-sided feedback shows less"
)
LONGER = (256_000, 1_024_000)
"""Reported, for one budget."""
SHADES = np.linspace(0.05, 1.0, 39)


def lognormal(u):
    return jnp.minimum(jnp.exp(-1 + 0.5 * norm.ppf(u)), 1.0)


def lognormal_chance(b):
    return jnp.where(b >= 1, 1.0, norm.cdf((jnp.log(jnp.maximum(b, 1e-30)) + 1) / 0.5))


class Informed(FirstPriceBidder):
    """Knows the distribution of other bids."""

    def chance(self, state):
        return lognormal_chance(self.grid)


def points(horizon: int) -> int:
    return math.ceil(math.sqrt(horizon)) + 1


def keys(seeds) -> jax.Array:
    return jnp.stack([jax.random.PRNGKey(FIRST_SEED + seed) for seed in seeds])


@eqx.filter_jit
def synthetic(kind, reveal: str, horizon: int, rho, worth, keys, share=None):
    """Of budgets (n,) and seeds: regret in expectation, reward, and the least that was left, (n, seeds) each."""
    world = FirstPriceDraws(uniform, lognormal, lognormal_chance, reveal=reveal)  # pyright: ignore

    def one(rho, worth, key):
        best = Partial(jnp.interp, xp=jnp.asarray(QUANTILES, jnp.float32), fp=worth)
        budget = Budget(rho[None] * horizon, horizon)
        bidder = kind(budget, points(horizon), reveal, **({} if share is None else {"share": share}))
        meters = {"regret": BudgetRegret(best, world), "earned": CumReward(), "spent": Spent(budget)}
        scores = play(bidder, world, horizon, key=key, meters=meters, keep=False).scores
        return scores["regret"], scores["earned"], scores["spent"].lowest[0]

    return jax.vmap(jax.vmap(one, (None, None, 0)), (0, 0, None))(rho, worth, keys)


def drawn(size: Size) -> list[Comparison]:
    rhos = RHOS[1:2] if size.smoke else RHOS
    horizons = (200, 800) if size.smoke else HORIZONS
    chance = keys(size.seeds(32))
    grid = np.linspace(0, 1, 2001)
    best = [first_price(QUANTILES, grid, np.asarray(lognormal_chance(grid)), rho) for rho in rhos]
    budgets = jnp.array(rhos), jnp.array([b.worth for b in best])

    def run(kind, reveal, horizon, share=None, rows=slice(None), chance=chance):
        regret, earned, lowest = synthetic(kind, reveal, horizon, *(b[rows] for b in budgets), chance, share)
        assert (np.asarray(lowest) >= 0).all(), f"{kind.__name__} overspent by {-float(lowest.min())}"
        return np.asarray(regret, float), np.asarray(earned, float)

    modes = ("full",) if size.smoke else ("full", "one_sided")
    regrets = {mode: np.stack([run(FirstPriceBidder, mode, T)[0] for T in horizons], axis=-1) for mode in modes}
    out = []
    for i, rho in enumerate(rhos):
        for mode in modes:
            fit = slope(horizons, regrets[mode][i])
            roots = ", ".join(f"{r:.2f}" for r in regrets[mode][i].mean(0) / np.sqrt(horizons))
            out.append(
                Comparison(
                    f"exponent of regret in T, {mode} feedback, ρ = {rho}",
                    fit.values,
                    np.zeros(len(fit.values)),
                    0.65 if rho == 0.05 else 0.6,
                    better="lower",
                    paper="order √T",
                    note=f"optimum {best[i].value:.4f} an auction, λ* {best[i].price:.2f}; regret / √T: {roots}",
                )
            )
            if rho == 0.1 and not size.smoke:
                far = [run(FirstPriceBidder, mode, T, rows=slice(i, i + 1), chance=chance[:4])[0] for T in LONGER]
                roots = ", ".join(f"{regret.mean() / np.sqrt(T):.2f} at {T}" for regret, T in zip(far, LONGER))
                out[-1].note += f"; of 4 seeds {roots}"
        if not size.smoke:
            full, one_sided = (regrets[mode][i][:, -1] / regrets["full"][i][:, -1].mean() for mode in modes)
            out.append(
                Comparison(
                    f"regret / mean regret with full feedback, one-sided − full, T = {horizons[-1]}, ρ = {rho}",
                    one_sided,
                    full,
                    0.15,
                    better="lower",
                    paper="order √T in both",
                    note=UNBOUND if best[i].price == 0 else "",
                )
            )
    if size.smoke:
        return out
    horizon = 16_000
    kinds = (FirstPriceBidder, Unpaced, SecondPrice, Informed)
    earned = {kind: run(kind, "full", horizon)[1] for kind in kinds}
    shades = [run(Shade, "full", horizon, jnp.float32(share))[1] for share in SHADES]
    for i, rho in enumerate(rhos):
        ours = earned[FirstPriceBidder][i]
        k = int(np.argmax([e[i].mean() for e in shades]))
        note = (
            f"share of the optimum: ours {ours.mean() / best[i].value / horizon:.3f}, "
            f"knowing G {earned[Informed][i].mean() / best[i].value / horizon:.3f}, best constant shade in "
            f"hindsight ({SHADES[k]:.3g} v) {shades[k][i].mean() / best[i].value / horizon:.3f}"
        )
        baseline = earned[SecondPrice][i]
        out.append(
            Comparison(f"reward against second-price pacing, ρ = {rho}", ours, baseline, 1.05, "ratio", note=note)
        )
        if rho <= 0.1:
            out.append(
                Comparison(f"reward against bidding without a price, ρ = {rho}", ours, earned[Unpaced][i], 1.1, "ratio")
            )
    return out


@eqx.filter_jit
def recorded(kind, rho, values, rivals, share=None):
    """Reward (seeds,) on a trace."""
    horizon = len(rivals)

    def one(values):
        world = FirstPriceTrace(values, rivals)
        budget = Budget(rho * jnp.full(1, horizon), horizon)
        bidder = kind(budget, points(horizon), **({} if share is None else {"share": share}))
        return play(bidder, world, horizon, key=jax.random.PRNGKey(0), meters={"e": CumReward()}, keep=False).scores[
            "e"
        ]

    return jax.vmap(one)(values)


def real(size: Size) -> list[Comparison]:
    table = np.loadtxt(data.root() / "elec2" / "elec2_data.dat")
    price, demand = table[:, 3], table[:, 4]
    rivals = jnp.asarray(np.clip(price / np.quantile(price, 0.995), 0, 1), jnp.float32)
    values = [
        np.clip(demand + np.random.default_rng(FIRST_SEED + seed).normal(0, 0.1, len(demand)), 0, 1)
        for seed in size.seeds(20)
    ]
    if size.smoke:
        rivals, values = rivals[:1000], [v[:1000] for v in values]
    values = jnp.asarray(np.stack(values), jnp.float32)
    kinds = (FirstPriceBidder, SecondPrice) if size.smoke else (FirstPriceBidder, SecondPrice, Unpaced)
    out = []
    for rho in RHOS[1:2] if size.smoke else RHOS:
        found = {kind: np.asarray(recorded(kind, jnp.float32(rho), values, rivals), float) for kind in kinds}
        note = ""
        if not size.smoke:
            shades = [np.asarray(recorded(Shade, jnp.float32(rho), values, rivals, jnp.float32(s))) for s in SHADES]
            k = int(np.argmax([e.mean() for e in shades]))
            note = ", ".join(f"{kind.__name__} {reward.mean():.0f}" for kind, reward in found.items())
            note = f"reward: {note}, best constant shade in hindsight ({SHADES[k]:.3g} v) {shades[k].mean():.0f}"
        out.append(
            Comparison(
                f"reward against second-price pacing, electricity prices, ρ = {rho}",
                found[FirstPriceBidder],
                found[SecondPrice],
                1.0,
                kind="ratio",
                note=note,
            )
        )
    return out


def experiment(size: Size) -> list[Comparison]:
    return [*drawn(size), *real(size)]
