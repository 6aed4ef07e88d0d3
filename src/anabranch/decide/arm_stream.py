"""A stream of arms that is read once, as the world of single-pass bandits.

Two clocks: arms are read one after the other, and pulled in batches. A round is one batch of pulls of one arm, whose
mean is one binomial draw, so that a horizon of 10^14 pulls costs no more than one of 10^5. Pulls are counted in
float32: exactly up to 2^24, beyond it to a relative 1e-7 a batch.

    >>> world = ArmStream(jnp.array([0.2, 1.0]), horizon=100)
    >>> state, feedback = world.step(world.init(), Pulls(jnp.array(1), jnp.array(30.0)))
    >>> float(feedback.reward), world.observe(state)
    (1.0, Reading(read=Array(2, dtype=int32), left=Array(70., dtype=float32)))
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from anabranch.cell import Cell, Env, Feedback, noise
from anabranch.decide.base import known
from anabranch.decide.budget import Sum

NORMAL = 1e6
"""From so many pulls on, the mean of a batch is drawn as a normal."""


class Pulls(NamedTuple):
    """An action: a batch of pulls of one arm. Arms are numbered in the order in which they come."""

    arm: Int[Array, ""]
    n: Float[Array, ""]
    """A whole number; what exceeds the pulls that are left is cut off."""


class Reading(NamedTuple):
    """What a policy sees: how far the stream of arms has been read, and the pulls that are left."""

    read: Int[Array, ""]
    """Arms read so far, which is also the number of the next arm. Pulling that one reads it."""
    left: Float[Array, ""]


class StreamState(NamedTuple):
    """How far the world is."""

    read: Int[Array, ""]
    left: Float[Array, ""]
    t: Int[Array, ""]
    """Batches so far: the counter of the noise."""
    key: PRNGKeyArray


class ArmStream(Env):
    """Bernoulli arms of these `means`, read in this order, and `horizon` pulls in all.

    Answers `Pulls` with the mean reward of the batch as reward, and its pulls as the consumption of the one resource.
    A policy reads arms by pulling them. That it pulls no arm again which it did not store is its own affair:
    `peak_memory` counts.

    Raises:
        ValueError: if `means` is not one probability an arm, or `horizon` is less than 1.
    """

    means: Float[Array, " k"]
    horizon: Float[Array, ""] | float

    def __init__(self, means: Float[Array, " k"], horizon: Float[Array, ""] | float):
        self.means, self.horizon = jnp.asarray(means, jnp.float32), horizon
        if self.means.ndim != 1:
            raise ValueError(f"means must be one number per arm, got an array of shape {self.means.shape}")
        if known(self.means) and not ((self.means >= 0) & (self.means <= 1)).all():
            raise ValueError(f"means must be in [0, 1], got {self.means.min():g} to {self.means.max():g}")
        positive_horizon(horizon)

    def init(self, *, key=None):
        zero = jnp.zeros((), jnp.int32)
        return StreamState(zero, jnp.float32(self.horizon), zero, jax.random.PRNGKey(0) if key is None else key)

    def observe(self, state):
        return Reading(state.read, state.left)

    def oracle(self, state):
        return self.means

    def step(self, state, x: Pulls):
        n = jnp.minimum(x.n, state.left)
        mean = batch_mean(noise(state.key, state.t), n, self.means[x.arm])
        new = StreamState(jnp.maximum(state.read, x.arm + 1), state.left - n, state.t + 1, state.key)
        return new, Feedback(mean, cost=n[None], x=self.observe(new), terminal=new.left <= 0)


def batch_mean(key: PRNGKeyArray, n: Float[Array, ""], p: Float[Array, ""]) -> Float[Array, ""]:
    """The mean of n Bernoulli(p) rewards; 0 if n is 0."""
    size = jnp.maximum(n, 1.0)
    exact = jax.random.binomial(key, jnp.minimum(size, NORMAL), p) / size
    normal = jnp.clip(p + jnp.sqrt(p * (1 - p) / size) * jax.random.normal(key), 0.0, 1.0)
    return jnp.where(n < 1, 0.0, jnp.where(n > NORMAL, normal, exact))


class PullRegret(Cell):
    """Meter: Σ pulls · (p* - p of the arm pulled)."""

    env: ArmStream

    def init(self, *, key=None):
        return Sum.of(0.0)

    def step(self, state, x):
        tick, _ = x
        gap = self.env.means.max() - self.env.means[tick.decision.action.arm]
        state = state.add(gap * tick.feedback.cost[0])
        return state, state.value

    def value(self, state) -> Float[Array, ""]:
        return state.value


def peak_memory(action: Pulls) -> int:
    """How many arms a policy must have had in store at once, from all its actions (stacked on a leading axis).

    An arm is in store if it was pulled before, will be pulled again, and is not the last one that was read.
    """
    arms = np.asarray(action.arm)[np.asarray(action.n) > 0]
    rounds = np.arange(len(arms))
    read = np.maximum.accumulate(arms)
    first, last = np.full(arms.max() + 1, len(arms)), np.full(arms.max() + 1, -1)
    np.minimum.at(first, arms, rounds)
    np.maximum.at(last, arms, rounds)
    passed = np.searchsorted(read, np.arange(arms.max() + 1), side="right")  # the round in which a later arm is read
    stored = np.zeros(len(arms) + 1, int)
    kept = last >= passed
    np.add.at(stored, passed[kept], 1)
    np.add.at(stored, last[kept] + 1, -1)
    return int(np.cumsum(stored).max())


def positive_horizon(horizon: Float[Array, ""] | float):
    """Raises ValueError if there is not one pull."""
    if known(horizon) and not horizon >= 1:
        raise ValueError(f"horizon must be at least one pull, got {horizon}")
