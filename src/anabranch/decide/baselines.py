"""How it is usually done: what the methods of the family are compared with."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from anabranch.cell import Decision, Policy, noise, select
from anabranch.decide.budget import Multipliers, Sum
from anabranch.decide.first_price_budgets import FirstPriceBidder
from anabranch.decide.metrical import Move
from anabranch.decide.replenishable_knapsacks import BwRK

# Budgets


class Ending(BwRK):
    """The primal-dual template, but it ends when a resource is used up, as bandits with knapsacks do."""

    def learn(self, state, x, decision, feedback):
        new = super().learn(state, x, decision, feedback)
        return new._replace(left=select(decision.aux.primal, new.left, Sum.of(-jnp.ones(self.budget.m))))


class Greedy(Ending):
    """A bandit on rewards alone, until a resource is used up."""

    @property
    def prices(self):
        return Multipliers(self.budget.m, 0.0)


# Auctions


class Unpaced(FirstPriceBidder):
    """λ = 0: bids until nothing is left."""

    @property
    def prices(self):
        return Multipliers(1, 0.0)


class SecondPrice(FirstPriceBidder):
    """Pacing as in second-price auctions: v / (1 + λ)."""

    def bid(self, state, value):
        bid = value / (1 + state.lam[0])
        return bid, jnp.interp(bid, self.grid, self.chance(state))


class Shade(FirstPriceBidder):
    """The same share of every value."""

    share: Float[Array, ""] | float = eqx.field(kw_only=True)

    def bid(self, state, value):
        return self.share * value, jnp.zeros(())


# Others


class Blind(Policy):
    """A bandit that does not look at the context: it sees which arms are eligible, and nothing else."""

    policy: Policy

    def init(self, *, key=None):
        return self.policy.init(key=key)

    def act(self, state, x):
        return self.policy.act(state, x.eligible)

    def learn(self, state, x, decision, feedback):
        return self.policy.learn(state, x.eligible, decision, feedback)


class Turns(Policy):
    """Follows each of n predictors for `each` steps in turn."""

    n: int = eqx.field(static=True)
    each: int = eqx.field(default=1000, static=True)

    def init(self, *, key=None):
        return jnp.zeros((), jnp.int32)

    def act(self, state, x):
        i = state // self.each % self.n
        return state + 1, Decision(Move(i, i))


class RandomActions(Policy):
    """Any of `n_actions` actions, or with a `box` (low, high) a vector of so many numbers from it, all alike."""

    n_actions: int = eqx.field(static=True)
    box: tuple[float, float] | None = None

    def init(self, *, key=None) -> PyTree:
        return jnp.zeros((), jnp.int32), jax.random.PRNGKey(0) if key is None else key

    def act(self, state, x):
        t, key = state
        if self.box is None:
            action = jax.random.randint(noise(key, t), (), 0, self.n_actions)
        else:
            low, high = self.box
            action = jax.random.uniform(noise(key, t), (self.n_actions,), minval=low, maxval=high)
        return (t + 1, key), Decision(action)
