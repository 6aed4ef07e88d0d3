"""Made worlds whose truth is known: slot machines that may drift, linear rewards, the best of many, rivals on a line.

>>> world = Slots(jnp.array([[0.0, 1.0], [1.0, 0.0]]), hold=2)  # after two rounds the other arm pays
>>> state, paid = world.init(), []
>>> for _ in range(4):
...     state, feedback = world.step(state, jnp.array(1))
...     paid.append(float(feedback.reward))
>>> paid
[1.0, 1.0, 0.0, 0.0]
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from anabranch.cell import Env, Feedback, noise
from anabranch.decide.base import earned, known
from anabranch.decide.linear import Context
from anabranch.decide.metrical import MTS


class RoundState(NamedTuple):
    """Rounds so far, the counter of the noise, and its key."""

    t: Int[Array, ""]
    key: PRNGKeyArray


def _first(key: PRNGKeyArray | None) -> RoundState:
    return RoundState(jnp.zeros((), jnp.int32), jax.random.PRNGKey(0) if key is None else key)


class Slots(Env):
    """Bernoulli arms. Row j of `rates` (rows, k) holds for `hold` rounds, the last one for ever.

    All arms are eligible. The action -1 (no arm) earns nothing.

    Raises:
        ValueError: if `rates` are not probabilities (rows, k), or `hold` is not positive.
    """

    rates: Float[Array, "rows k"]
    hold: int = eqx.field(default=1, static=True)

    def __check_init__(self):
        if jnp.ndim(self.rates) != 2:
            raise ValueError(f"rates must be (rows, arms), got shape {jnp.shape(self.rates)}")
        if known(self.rates) and not ((self.rates >= 0) & (self.rates <= 1)).all():
            raise ValueError(f"rates are probabilities, got {self.rates.min():g} to {self.rates.max():g}")
        if self.hold < 1:
            raise ValueError(f"hold must be at least one round, got {self.hold}")

    def init(self, *, key=None):
        return _first(key)

    def observe(self, state):
        return jnp.ones(self.rates.shape[1], bool)

    def oracle(self, state):
        return self.rates[jnp.minimum(state.t // self.hold, self.rates.shape[0] - 1)]

    def step(self, state, x):
        win = jax.random.uniform(noise(state.key, state.t)) < earned(self.oracle(state), x)
        new = RoundState(state.t + 1, state.key)
        return new, Feedback(win.astype(jnp.float32), x=self.observe(new))


class LinearSlots(Env):
    """Bernoulli arms in a context x, drawn anew in each round from the unit sphere: arm i earns 1 with probability
    (1 + θ_i·x) / 2. Row i of `theta` (k, d) is at most 1 long.

    Raises:
        ValueError: if `theta` is not (k, d), or a row is longer than 1.
    """

    theta: Float[Array, "k d"]

    def __check_init__(self):
        if jnp.ndim(self.theta) != 2:
            raise ValueError(f"theta must be (arms, features), got shape {jnp.shape(self.theta)}")
        if known(self.theta) and not (jnp.linalg.norm(self.theta, axis=1) <= 1 + 1e-5).all():
            raise ValueError(f"rows of theta must be at most 1 long, got {jnp.linalg.norm(self.theta, axis=1).max():g}")

    def init(self, *, key=None):
        return _first(key)

    def context(self, state: RoundState) -> Float[Array, " d"]:
        x = jax.random.normal(noise(state.key, state.t, "context"), self.theta.shape[1:])
        return x / jnp.linalg.norm(x)

    def observe(self, state):
        return Context(self.context(state), jnp.ones(self.theta.shape[0], bool))

    def oracle(self, state):
        return (1 + self.theta @ self.context(state)) / 2

    def step(self, state, x):
        win = jax.random.uniform(noise(state.key, state.t)) < earned(self.oracle(state), x)
        new = RoundState(state.t + 1, state.key)
        return new, Feedback(win.astype(jnp.float32), x=self.observe(new))


class Items(Env):
    """Items that pass by once, of which the `k` of largest value are to be picked: the action is whether to.

    The observation is the value. Each of the k largest that is picked earns 1/k, so that the sum is the share of them.
    After the last item come the same again.
    """

    values: Float[Array, " n"]
    k: int = eqx.field(static=True)

    def init(self, *, key=None):
        return _first(key)

    def observe(self, state):
        return self.values[state.t % self.values.shape[0]]

    def step(self, state, x):
        best = self.observe(state) >= jax.lax.top_k(self.values, self.k)[0][-1]
        new = RoundState(state.t + 1, state.key)
        return new, Feedback(jnp.where(x & best, 1 / self.k, 0.0), x=self.observe(new))


def followers(steps: int, seed: int, n: int = 5, blocks: int = 8) -> MTS:
    """A task system: n forecasts of a load, of which in each of the `blocks` another one is good.

    The state is a number of servers; each costs 1 a step, load without a server 4 a unit, and to start or stop a server
    1. The load is a mean-reverting walk around 10; a forecast is off by noise of standard deviation 1 while it is
    good and else 4, and holds for five steps. Made on the host.
    """
    rng = np.random.default_rng(seed)
    load = np.empty(steps)
    level = 10.0
    for t, step in enumerate(rng.normal(0, 0.5, steps)):
        load[t] = level
        level += 0.02 * (10 - level) + step
    good = rng.permutation(np.arange(blocks) % n)[np.arange(steps) * blocks // steps]
    error = rng.normal(size=(-(-steps // 5), n)).repeat(5, axis=0)[:steps] * np.where(
        good[:, None] == np.arange(n), 1, 4
    )
    servers = np.clip(np.ceil(load[:, None] + error), 0, 30)
    before = np.concatenate([np.full((1, n), 10.0), servers[:-1]])
    service = servers + 4 * np.maximum(load[:, None] - servers, 0)
    move = np.abs(before[:, :, None] - servers[:, None])
    # Away from a forecast one learns the load and serves it, with servers started and stopped again.
    need = np.maximum(np.ceil(load), 0)[:, None]
    return MTS(service, move, need + 2 * np.abs(before - need))
