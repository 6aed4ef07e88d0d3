"""Resources that are spent and refilled, the multipliers that price them, and worlds and meters of both.

>>> budget = Budget(jnp.array([3.0]), horizon=10)
>>> left = budget.init()
>>> for cost in (1.0, 1.0, 0.5):
...     left = budget.pay(left, jnp.array([cost]))
>>> left.value.tolist(), bool(budget.affords(left, 1.0)), bool(budget.affords(left, 0.5))
([0.5], False, True)
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from anabranch.cell import Cell, Env, Feedback, noise
from anabranch.decide.base import TraceEnv, known


class Sum(NamedTuple):
    """A float32 sum that does not lose small terms: what rounding took from the last one is made up for at the next.

    After a million terms a plain sum may be off by more than the regret that it measures (Kahan, 1965).
    """

    value: Float[Array, "*n"]
    lost: Float[Array, "*n"]

    @classmethod
    def of(cls, value: Float[Array, "*n"] | float) -> "Sum":
        start = jnp.asarray(value, jnp.float32)
        return cls(start, jnp.zeros_like(start))

    def add(self, term: Float[Array, "*n"]) -> "Sum":
        term = term - self.lost
        value = self.value + term
        return Sum(value, (value - self.value) - term)


class Budget(eqx.Module):
    """m resources for a horizon of rounds; negative costs refill them.

    A `cap` on what can be stored is practical (a token bucket has one) and in no theorem: guarantees are lost with it.

    Raises:
        ValueError: if a total is negative, or the horizon is not positive.
    """

    total: Float[Array, " m"]
    horizon: Float[Array, ""] | float
    cap: Float[Array, " m"] | float = float("inf")

    def __init__(self, total, horizon, cap=float("inf")):
        self.total, self.horizon, self.cap = jnp.atleast_1d(jnp.asarray(total, jnp.float32)), horizon, cap
        if known(self.total) and not (self.total >= 0).all():
            raise ValueError(f"a budget must not be negative, got total = {self.total.min():g}")
        if known(horizon) and not horizon > 0:
            raise ValueError(f"horizon must be a positive number of rounds, got {horizon}")

    @property
    def m(self) -> int:
        return self.total.shape[0]

    @property
    def rho(self) -> Float[Array, " m"]:
        """What may be spent in a round on average."""
        return self.total / self.horizon

    def init(self) -> Sum:
        """What is left at first."""
        return Sum.of(self.total)

    def affords(self, left: Sum, worst: Float[Array, " m"] | float) -> Bool[Array, ""]:
        """Whether a cost of `worst` leaves nothing below zero: ask before acting, with the worst case, not the mean."""
        return (left.value >= worst).all()

    def pay(self, left: Sum, cost: Float[Array, " m"]) -> Sum:
        left = left.add(-cost)
        return left._replace(value=jnp.minimum(left.value, self.cap))


class Multipliers(eqx.Module):
    """Prices λ (m,) of m constraints, by online gradient ascent in {λ ≥ 0, Σ λ ≤ bound}."""

    m: int = eqx.field(static=True)
    step: Float[Array, ""] | float
    bound: Float[Array, ""] | float = float("inf")

    def init(self) -> Float[Array, " m"]:
        return jnp.zeros(self.m)

    def ascend(self, lam: Float[Array, " m"], excess: Float[Array, " m"]) -> Float[Array, " m"]:
        """The prices after a round in which the constraints were exceeded by `excess`, or kept by its negative."""
        return project(lam + self.step * excess, self.bound)


def project(x: Float[Array, " m"], bound: Float[Array, ""] | float) -> Float[Array, " m"]:
    """The nearest point of {λ ≥ 0, Σ λ ≤ bound}."""
    positive = jnp.maximum(x, 0.0)
    if x.shape[0] == 1:
        return jnp.minimum(positive, bound)
    ranked = jnp.sort(x)[::-1]
    excess = (jnp.cumsum(ranked) - bound) / jnp.arange(1, x.shape[0] + 1)
    shift = excess[jnp.sum(ranked > excess) - 1]
    return jnp.where(positive.sum() <= bound, positive, jnp.maximum(x - shift, 0.0))


class BudgetedTrace(TraceEnv):
    """Recorded rounds in which reward and costs of every arm are known: a `TraceEnv` with `costs` (T, k, m).

    With `reveal="full"`, `feedback.info` holds the rows "rewards" (k,) and "costs" (k, m).

    Raises:
        ValueError: if `costs` does not fit `rewards`; otherwise as `TraceEnv`.
    """

    costs: Float[Array, "t k m"]

    def __init__(self, rewards, costs, xs: PyTree = None, reveal: Literal["bandit", "full"] = "bandit"):
        super().__init__(rewards, xs, reveal)
        self.costs = jnp.asarray(costs, jnp.float32)
        if self.costs.ndim != 3 or self.costs.shape[:2] != self.rewards.shape:
            raise ValueError(f"costs must be {self.rewards.shape} and resources, got shape {self.costs.shape}")

    def step(self, state, x):
        new, feedback = super().step(state, x)
        row = self.costs[state.t]
        cost = jnp.where(x >= 0, row[jnp.maximum(x, 0)], 0.0)
        info = {**feedback.info, "costs": row} if self.reveal == "full" else ()
        return new, feedback._replace(cost=cost, info=info)


class DiceState(NamedTuple):
    """Rounds so far, the counter of the noise, and its key."""

    t: Int[Array, ""]
    key: PRNGKeyArray


class BudgetedDice(Env):
    """A stationary world: an arm earns 1 with probability `rewards[arm]`, else 0, and costs each resource 1 (refills it
    by 1 where the number is negative) with probability |`costs[arm]`|, else 0.

    Arm 0 does nothing: it earns 0, and its costs are not drawn but the same in every round. `oracle` is `rewards`.

    Raises:
        ValueError: if a reward is not in [0, 1] or a cost not in [-1, 1], if arm 0 earns or costs something, or if the
            shapes do not fit.
    """

    rewards: Float[Array, " k"]
    costs: Float[Array, "k m"]
    reveal: Literal["bandit", "full"] = eqx.field(static=True)

    def __init__(self, rewards, costs, reveal: Literal["bandit", "full"] = "bandit"):
        self.rewards, self.costs = jnp.asarray(rewards, jnp.float32), jnp.asarray(costs, jnp.float32)
        self.reveal = reveal
        if self.costs.ndim != 2 or self.rewards.shape != self.costs.shape[:1]:
            raise ValueError(f"rewards must be (k,) and costs (k, m), got {self.rewards.shape} and {self.costs.shape}")
        if reveal not in ("bandit", "full"):
            raise ValueError(f'reveal must be "bandit" or "full", got {reveal!r}')
        if not known(self.rewards, self.costs):
            return
        if not ((self.rewards >= 0) & (self.rewards <= 1)).all():
            raise ValueError(f"rewards are probabilities, got {self.rewards.tolist()}")
        if not (jnp.abs(self.costs) <= 1).all():
            raise ValueError(f"costs must be in [-1, 1], got {self.costs.tolist()}")
        if self.rewards[0] != 0 or (self.costs[0] > 0).any():
            raise ValueError(f"arm 0 does nothing, but it earns {self.rewards[0]} and costs {self.costs[0].tolist()}")

    def init(self, *, key=None):
        return DiceState(jnp.zeros((), jnp.int32), jax.random.PRNGKey(0) if key is None else key)

    def observe(self, state):
        return jnp.ones(self.rewards.shape, bool)

    def oracle(self, state):
        return self.rewards

    def expected(self, state: DiceState, arm: Int[Array, ""]) -> Float[Array, ""]:
        """The expected reward of an arm."""
        return self.rewards[arm]

    def step(self, state, x):
        def roll(u, arm):
            costs = self.costs[arm]
            drawn = jnp.sign(costs) * (u[1:] < jnp.abs(costs))
            return (u[0] < self.rewards[arm]).astype(jnp.float32), jnp.where(arm == 0, costs, drawn)

        (k, m), key = self.costs.shape, noise(state.key, state.t)
        new = DiceState(state.t + 1, state.key)
        if self.reveal == "bandit":
            reward, cost = roll(jax.random.uniform(key, (1 + m,)), x)
            return new, Feedback(reward, cost, x=self.observe(new))
        rewards, costs = jax.vmap(roll)(jax.random.uniform(key, (k, 1 + m)), jnp.arange(k))
        info = {"rewards": rewards, "costs": costs}
        return new, Feedback(rewards[x], costs[x], x=self.observe(new), info=info)


class BudgetRegret(Cell):
    """Meter: by how much less was earned than `optimum` a round, which is the value of the fluid problem.

    Two ways to leave luck out, which change no mean: given `env`, what was earned is its `env.expected(state, action)`;
    and `optimum` may be a function of the observation whose mean is the value.
    """

    optimum: Float[Array, ""] | float | Callable[[PyTree], Float[Array, ""]]
    env: Env | None = None

    def init(self, *, key=None):
        return Sum.of(0.0)

    def step(self, state, x):
        tick, world = x
        taken = tick.decision.action
        reward = tick.feedback.reward if self.env is None else self.env.expected(world, taken)  # pyright: ignore
        optimum = self.optimum(tick.x) if callable(self.optimum) else self.optimum
        state = state.add(optimum - reward)
        return state, state.value

    def value(self, state) -> Float[Array, ""]:
        return state.value


class Spending(NamedTuple):
    """What became of a budget."""

    left: Float[Array, " m"]
    lowest: Float[Array, " m"]
    """The least that there ever was; negative where the budget was exceeded, and then by how much."""


class Spent(Cell):
    """Meter: a budget by the costs that the world charged, whatever the policy believes to have left."""

    budget: Budget

    def init(self, *, key=None):
        left = self.budget.init()
        return left, left.value

    def step(self, state, x):
        left = self.budget.pay(state[0], x[0].feedback.cost)
        lowest = jnp.minimum(state[1], left.value)
        return (left, lowest), Spending(left.value, lowest)

    def value(self, state) -> Spending:
        return Spending(state[0].value, state[1])
