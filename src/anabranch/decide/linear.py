"""Bandits that see a context: the expected reward of each arm is linear in it.

Li, Chu, Langford, Schapire: A Contextual-Bandit Approach to Personalized News Article Recommendation (WWW 2010).

Each arm has a ridge regression of its own on the contexts in which it was pulled ("disjoint" in the paper). The stream
is contexts (d,) with the mask of arms that are eligible; the state, of each arm, the inverse (d, d) of its regularised
second moments, kept by rank-one updates, and its weights (d,). Outcomes may come late and in any order.

    >>> from anabranch.cell import Feedback
    >>> bandit, both = LinUCB(2, dim=2), jnp.ones(2, bool)
    >>> state = bandit.init()
    >>> for i in range(40):  # arm j earns 1 where entry j of the context is 1
    ...     x = Context(jnp.eye(2)[i % 2], both)
    ...     state, decision = bandit.act(state, x)
    ...     state = bandit.learn(state, x, decision, Feedback(jnp.float32(decision.action == i % 2)))
    >>> [int(bandit.act(state, Context(x, both))[1].action) for x in jnp.eye(2)]
    [0, 1]

In float32, rank-one updates of the inverse are good for some millions of pulls of one arm; a pull is not pending in
between, so that arms whose outcomes are slow look less explored than they are.
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from anabranch.cell import Decision, noise
from anabranch.decide.base import Bandit, BanditState, choose


class Context(NamedTuple):
    """What is known before an arm is pulled."""

    features: Float[Array, " d"]
    eligible: Bool[Array, " k"]


class Ridge(NamedTuple):
    """A ridge regression for each arm."""

    inverse: Float[Array, "k d d"]
    """(I + Σ x xᵀ)⁻¹ over the contexts x of its settled pulls."""
    weights: Float[Array, "k d"]

    def fit(self, arm, x: Float[Array, " d"], reward: Float[Array, ""]) -> "Ridge":
        """With one more outcome of an arm (Sherman, Morrison)."""
        far = self.inverse[arm] @ x
        gain = far / (1 + x @ far)
        error = reward - self.weights[arm] @ x
        return Ridge(self.inverse.at[arm].add(-jnp.outer(gain, far)), self.weights.at[arm].add(error * gain))


class LinUCB(Bandit):
    """Upper confidence bounds θ·x + bonus √(xᵀ A⁻¹ x). Observation: a `Context`.

    Raises:
        ValueError: if `k` or `dim` is not positive.
    """

    dim: int = eqx.field(static=True)
    bonus: Float[Array, ""] | float = 0.5

    def __check_init__(self):
        if self.dim < 1:
            raise ValueError(f"contexts need at least one feature, got dim = {self.dim}")

    @property
    def like(self):
        return Context(jnp.zeros(self.dim), jnp.ones(self.k, bool))

    def eligible(self, x: Context):
        return x.eligible

    def init(self, *, key=None):
        ridge = Ridge(jnp.tile(jnp.eye(self.dim), (self.k, 1, 1)), jnp.zeros((self.k, self.dim)))
        return BanditState(ridge, jnp.zeros((), jnp.int32), jax.random.PRNGKey(0) if key is None else key)

    def optimism(self, sd: Float[Array, " k"], key: PRNGKeyArray) -> Float[Array, " k"]:
        """What is added to each arm's estimate, whose error is of the size `sd`."""
        return self.bonus * sd

    def act(self, state, x: Context):
        ridge, features = state.stats, x.features
        sd = jnp.sqrt(jnp.maximum(jnp.einsum("kij,i,j->k", ridge.inverse, features, features), 0.0))
        index = ridge.weights @ features + self.optimism(sd, noise(state.key, state.t))
        arm = choose(index, x.eligible, state.key, state.t)
        return state._replace(t=state.t + 1), Decision(arm, jnp.zeros(()))

    def learn(self, state, x: Context, decision, feedback):
        reward = jnp.where(decision.action >= 0, jnp.asarray(feedback.reward), 0.0)
        features = jnp.where(decision.action >= 0, x.features, 0.0)  # nothing is learned from nothing
        return state._replace(stats=state.stats.fit(jnp.maximum(decision.action, 0), features, reward))


class LinThompson(LinUCB):
    """Thompson sampling: θ drawn from N(θ, bonus² A⁻¹), for each arm anew.

    Agrawal, Goyal: Thompson sampling for contextual bandits with linear payoffs (ICML 2013), with an estimate an arm;
    what is drawn is θ·x, from its own normal distribution.
    """

    def optimism(self, sd, key):
        return self.bonus * sd * jax.random.normal(key, sd.shape)
