"""Regret minimisers that need no range of rewards beforehand: their rates follow the ranges that they are told.

They are `Bandit`s whose feedback holds in `info` what bandits are not told: "rewards" (k,), those of all arms, or
"range", which says that the reward is between 0 and a number that may be another in every round.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from anabranch.cell import Decision, noise, select
from anabranch.decide.base import Bandit


class Weights(NamedTuple):
    """The state of exponential weights."""

    losses: Float[Array, " k"]
    """Relative to the smallest."""
    squares: Float[Array, ""]
    """The sum of squared ranges, from 1."""
    t: Int[Array, ""]
    key: PRNGKeyArray


class Hedge(Bandit):
    """Exponential weights, told the rewards of all arms: `feedback.info["rewards"]` (k,).

    Freund, Schapire: A decision-theoretic generalization of on-line learning (JCSS 55, 1997), at the rate
    √(ln k / Σ range²) over the ranges of rewards seen so far, as in Cesa-Bianchi, Mansour, Stoltz: Improved
    second-order bounds for prediction with expert advice (Machine Learning 66, 2007). In rounds of range 1 that is
    √(ln k / t). `decision.aux` is the rate.

        >>> from anabranch.cell import Feedback
        >>> hedge, both = Hedge(2), jnp.ones(2, bool)
        >>> state, decision = hedge.act(hedge.init(), both)
        >>> state = hedge.learn(state, both, decision, Feedback(0.0, info={"rewards": jnp.array([0.0, 1.0])}))
        >>> p = hedge.probabilities(state, both)
        >>> round(float(jnp.log(p[1] / p[0])), 4)  # √(ln 2 / 2)
        0.5887
    """

    def init(self, *, key=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        key = jax.random.PRNGKey(0) if key is None else key
        return Weights(jnp.zeros(self.k), jnp.ones(()), jnp.zeros((), jnp.int32), key)

    def eta(self, state: Weights) -> Float[Array, ""]:
        return jnp.sqrt(jnp.log(self.k) / state.squares)

    def probabilities(self, state: Weights, x: Bool[Array, " k"]) -> Float[Array, " k"]:
        return jax.nn.softmax(-self.eta(state) * state.losses, where=x)

    def act(self, state: Weights, x):  # pyright: ignore[reportIncompatibleMethodOverride]
        p = self.probabilities(state, x)
        upto = jnp.cumsum(p)
        arm = jnp.argmax(upto > upto[-1] * jax.random.uniform(noise(state.key, state.t)))
        some = x.any()
        decision = Decision(jnp.where(some, arm, -1).astype(jnp.int32), jnp.where(some, jnp.log(p[arm]), 0.0))
        return state._replace(t=state.t + 1), decision._replace(aux=self.eta(state))

    def learn(self, state: Weights, x, decision, feedback):  # pyright: ignore[reportIncompatibleMethodOverride]
        rewards = feedback.info["rewards"]
        return self._lose(state, rewards.max() - rewards, rewards.max() - rewards.min())

    def _lose(self, state: Weights, losses: Float[Array, " k"], spread: Float[Array, ""]) -> Weights:
        losses = state.losses + losses
        return state._replace(losses=losses - losses.min(), squares=state.squares + spread**2)


class Exp3(Hedge):
    """Exponential weights, told the reward of the arm taken and `feedback.info["range"]`, which it is at most.

    EXP3-IX of Neu (NeurIPS 2015; `base.Exp3IX` is the one for rewards in [0, 1]): the rate η is √(ln k / (k Σ range²)),
    and the estimated loss (range - reward) / (p + γ) has γ = η · range / 2.
    """

    def eta(self, state):
        return jnp.sqrt(jnp.log(self.k) / (self.k * state.squares))

    def learn(self, state: Weights, x, decision, feedback):  # pyright: ignore[reportIncompatibleMethodOverride]
        most = feedback.info["range"]
        loss = (most - feedback.reward) / (jnp.exp(decision.logp) + decision.aux * most / 2)
        taken = jnp.arange(self.k) == decision.action
        return select(decision.action >= 0, self._lose(state, jnp.where(taken, loss, 0.0), most), state)
