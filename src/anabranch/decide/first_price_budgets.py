"""Bidding in repeated first-price auctions with a budget.

Wang, Yang, Deng, Kong: Learning to Bid in Repeated First-Price Auctions with Budgets (arXiv 2304.13477, ICML 2023).

In each of T auctions a value v in [0, 1] is seen, a bid b made, and won against the highest other bid d if b ≥ d; a
won auction earns v - b and costs b, of a budget ρT. Values and other bids are drawn alike in all rounds and independent
of each other, from distributions that are not known. Two things are learned on the way: the distribution G of d, which
says how far to shade a bid, and the price λ of the budget, which says how far to hold back. The bid is the maximum of
(v - (1 + λ) b) G(b); λ moves by what was spent above ρ, times 1/√T. Regret to the fluid optimum is of order √T.

With `reveal="full"` d is shown after each auction, and G is estimated by the share of past d. With `"one_sided"` only
the winning bid is: a loser sees d, a winner knows no more than d ≤ b. That is a sample censored from below by one's own
bids, which are made before d is drawn, and G is estimated by the product limit of Kaplan and Meier, from the top: for
each interval between two points, the share of d that fell into it among the auctions in which the bid was not above it
and d was not either. Low values see to it that there are such auctions also for low intervals.

The stream is auctions; the state of a bidder is two counts for each of M points, what is left and λ. Bids are multiples
of 1/(M - 1); M = ⌈√T⌉ + 1 keeps what is lost by that below √T. How the paper estimates G from one-sided feedback is not
known to us in detail, and that λ moves by the real, not the estimated spending is inferred.

    >>> from anabranch.decide.base import CumReward
    >>> from anabranch.decide.optimum import first_price
    >>> world = FirstPriceDraws(uniform, uniform)
    >>> bidder = FirstPriceBidder(Budget([0.05 * 2000], horizon=2000), points=46)
    >>> result = play(bidder, world, 2000, key=jax.random.PRNGKey(0), meters={"earned": CumReward()}, keep=False)
    >>> grid = jnp.linspace(0, 1, 1001)
    >>> best = 2000 * first_price(grid, grid, grid, 0.05).value
    >>> bool(result.scores["earned"] > 0.75 * best), bool(result.state["policy"].left.value >= 0)
    (True, True)
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from anabranch.cell import Decision, Env, Feedback, Maybe, Policy, noise
from anabranch.decide.base import inputs, known
from anabranch.decide.budget import Budget, Multipliers, Sum
from anabranch.drive import play

Reveal = Literal["full", "one_sided"]


class Shading(NamedTuple):
    """How a bid came about."""

    chance: Float[Array, ""]
    """The estimated probability that it wins."""
    lam: Float[Array, ""]
    """The price of the budget."""


class BidderState(NamedTuple):
    """What a bidder knows."""

    fell: Float[Array, " M"]
    """In how many auctions the other bid fell above this point and not above the next."""
    trials: Float[Array, " M"]
    """In how many it did not fall above the next, and one's own bid let it be known whether it fell above this one."""
    left: Sum
    lam: Float[Array, "1"]


class FirstPriceBidder(Policy):
    """Bids the best response to the estimated distribution of other bids at the current price of the budget.

    The observation is the value; the action a bid in [0, 1], 0 where the best response is more than is left. The
    feedback's `info["rival"]` is `Maybe(d, valid)`: always valid with `reveal="full"`, else where the bid lost. λ is at
    most 1/ρ, above which next to nothing is bid. Counts are float32 and stop growing at 2^24 auctions.

    Raises:
        ValueError: if the budget is not one positive number, `points` is less than 2, or `reveal` is unknown.
    """

    budget: Budget
    points: int = eqx.field(default=101, static=True)
    reveal: Reveal = eqx.field(default="full", static=True)

    def __check_init__(self):
        if self.budget.m != 1 or (known(self.budget.total) and not self.budget.total[0] > 0):
            raise ValueError(f"a bidder has one positive budget, got total = {self.budget.total.tolist()}")
        if self.points < 2:
            raise ValueError(f"G needs at least 2 points, got points = {self.points}")
        if self.reveal not in ("full", "one_sided"):
            raise ValueError(f'reveal must be "full" or "one_sided", got {self.reveal!r}')

    @property
    def grid(self) -> Float[Array, " M"]:
        return jnp.linspace(0.0, 1.0, self.points)

    @property
    def prices(self) -> Multipliers:
        return Multipliers(1, 1 / jnp.sqrt(self.budget.horizon), 1 / self.budget.rho[0])

    def init(self, *, key=None):
        zeros = jnp.zeros(self.points)
        return BidderState(zeros, zeros, self.budget.init(), self.prices.init())

    def chance(self, state: BidderState) -> Float[Array, " M"]:
        """The estimate of G at the points of the grid; 0 before anything is known."""
        lower = 1 - state.fell / jnp.maximum(state.trials, 1.0)  # the share of d that is not in the interval, but lower
        return jnp.where(state.trials[-1] > 0, jax.lax.cumprod(lower, reverse=True), 0.0)

    def bid(self, state: BidderState, value: Float[Array, ""]) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """The bid, and its estimated chance to win."""
        grid, chance = self.grid, self.chance(state)
        i = jnp.argmax((value - (1 + state.lam) * grid) * chance)
        return grid[i], chance[i]

    def act(self, state, x):
        bid, chance = self.bid(state, x)
        bid = jnp.where(self.budget.affords(state.left, bid), bid, 0.0)
        return state, Decision(bid, aux=Shading(chance, state.lam[0]))

    def learn(self, state, x, decision, feedback):
        rival, bid, cost = feedback.info["rival"], decision.action, jnp.asarray(feedback.cost)
        above = rival.valid & (self.grid < rival.value)
        above_next = jnp.append(above[1:], False)
        knowable = self.grid >= (bid if self.reveal == "one_sided" else 0.0)
        return BidderState(
            fell=state.fell + (knowable & above & ~above_next),
            trials=state.trials + (knowable & ~above_next),
            left=self.budget.pay(state.left, cost),
            lam=self.prices.ascend(state.lam, cost - self.budget.rho),
        )


class AuctionState(NamedTuple):
    """Auctions so far, the counter of the noise, and its key."""

    t: Int[Array, ""]
    key: PRNGKeyArray


class FirstPriceEnv(Env):
    """First-price auctions: subclasses say which value and which highest other bid come when.

    A bid wins if it is at least the other, a bid of 0 also.
    """

    reveal: Reveal = eqx.field(default="full", static=True, kw_only=True)

    def auction(self, state: AuctionState) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """The value and the highest other bid of the current auction."""
        raise NotImplementedError(f"{type(self).__name__} is abstract: it defines no `auction`")

    def init(self, *, key=None):
        return AuctionState(jnp.zeros((), jnp.int32), jax.random.PRNGKey(0) if key is None else key)

    def observe(self, state):
        return self.auction(state)[0]

    def step(self, state, x):
        value, rival = self.auction(state)
        won = x >= rival
        seen = Maybe(rival, jnp.ones((), bool) if self.reveal == "full" else ~won)
        new = AuctionState(state.t + 1, state.key)
        reward, cost = jnp.where(won, value - x, 0.0), jnp.where(won, x, 0.0)
        return new, Feedback(reward, cost[None], x=self.observe(new), info={"rival": seen})


class FirstPriceDraws(FirstPriceEnv):
    """Values and other bids drawn alike and independently: `value` and `rival` are their quantile functions.

    `chance` is the distribution function of other bids, if it is known, for `expected`.
    """

    value: Callable[[Float[Array, ""]], Float[Array, ""]] = eqx.field(static=True)
    rival: Callable[[Float[Array, ""]], Float[Array, ""]] = eqx.field(static=True)
    chance: Callable[[Float[Array, ""]], Float[Array, ""]] | None = eqx.field(default=None, static=True)

    def auction(self, state):
        u = jax.random.uniform(noise(state.key, state.t), (2,))
        return self.value(u[0]), self.rival(u[1])

    def expected(self, state: AuctionState, bid: Float[Array, ""]) -> Float[Array, ""]:
        """The expected reward of a bid, given the value."""
        if self.chance is None:
            raise ValueError("the chance of a bid is not known: give the world the distribution function, `chance`")
        return (self.auction(state)[0] - bid) * self.chance(bid)


class FirstPriceTrace(FirstPriceEnv):
    """Recorded auctions: row t of `values` and `rivals` is auction t; after the last comes the first.

    Raises:
        ValueError: if they are not two series of the same length.
    """

    values: Float[Array, " t"]
    rivals: Float[Array, " t"]

    def __check_init__(self):
        if jnp.ndim(self.values) != 1 or jnp.shape(self.values) != jnp.shape(self.rivals):
            raise ValueError(f"need two series (T,), got {jnp.shape(self.values)} and {jnp.shape(self.rivals)}")

    def auction(self, state):
        t = state.t % self.values.shape[0]
        return self.values[t], self.rivals[t]


def uniform(u: Float[Array, ""]) -> Float[Array, ""]:
    """The quantile and the distribution function of the uniform distribution on [0, 1]."""
    return jnp.clip(u, 0.0, 1.0)


def example() -> tuple[FirstPriceBidder, PyTree]:
    """A bidder under one-sided feedback, and what it is shown and told in a play."""
    bidder = FirstPriceBidder(Budget([5.0], horizon=64), points=21, reveal="one_sided")
    world = FirstPriceDraws(uniform, uniform, reveal="one_sided")
    return bidder, inputs(play(bidder, world, 64, key=jax.random.PRNGKey(0)).ticks)
