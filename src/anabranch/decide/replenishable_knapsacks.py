"""Bandits with replenishable knapsacks: acting under resources that actions spend and refill.

Bernasconi, Castiglioni, Celli, Fusco: Bandits with Replenishable Knapsacks: the Best of both Worlds (arXiv 2306.08470,
ICLR 2024).

In each of T rounds an action x earns f_t(x) in [0, 1] and costs c_t(x) in [-1, 1]^m; what is below 0 refills. There are
B = ρT of each of m resources at first, and there is a void action that earns nothing and refills at least β ≥ 0 of each
in every round. The template needs no more than a regret minimiser for the primal: with ν = ρ + β it promises, with
the same code, regret of order √T to the fluid optimum where rounds are drawn alike, and a share α = ν / (1 + β) of the
best fixed mixture in hindsight (less order √T) whatever the rounds are. Unlike the usual primal-dual bandits with
knapsacks it does not end when a resource is used up: it does nothing until it has refilled; and its multipliers are
bounded by 1/ν, not 1/ρ, so that small budgets do no harm if β > 0.

The stream is rounds; the state of the policy is that of the primal (k numbers for Hedge and EXP3), what is left (m,)
and the prices λ (m,). There is no public code; inferred are that prices move in every round, also when nothing could be
chosen, and their step 1 / (ν√(mT)). The primal's rate follows the range 1 + 2 Σ λ of what it is told: the range that
bounds it beforehand, 1 + 2/ν, is many times wider, and keeps exponential weights nearly still up to T = 10^5.

    >>> from anabranch.decide.base import CumReward
    >>> from anabranch.decide.optimum import fluid
    >>> world = BudgetedDice([0.0, 0.9, 0.3], [[-0.2], [0.9], [-0.1]])
    >>> policy = BwRK(Exp3(3), Budget([200.0], horizon=4000), beta=0.2)
    >>> result = play(policy, world, 4000, key=jax.random.PRNGKey(0), meters={"earned": CumReward()}, keep=False)
    >>> best = 4000 * fluid(world.rewards, world.costs, policy.budget.rho).value
    >>> bool(result.scores["earned"] > 0.6 * best), bool(result.state["policy"].left.value >= 0)
    (True, True)
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree
from numpy.typing import ArrayLike

from anabranch.cell import Decision, Feedback, Policy, select
from anabranch.decide.base import inputs, known
from anabranch.decide.budget import Budget, BudgetedDice, BudgetedTrace, Multipliers, Sum
from anabranch.decide.minimizers import Exp3
from anabranch.drive import play


class BwRKState(NamedTuple):
    """What the template knows beside its primal."""

    primal: PyTree
    left: Sum
    lam: Float[Array, " m"]
    """The price of each resource."""
    clipped: Int[Array, ""]
    """Outcomes out of range: taken as the nearest that is in range."""


class Asked(NamedTuple):
    """How a decision came about."""

    primal: Bool[Array, ""]
    """False where a resource could run out, and nothing was done."""
    lam: Float[Array, " m"]
    aux: PyTree
    """What the primal wants back."""


class BwRK(Policy):
    """The primal-dual template over a primal `Policy` whose actions are arms: `Hedge` or `Exp3`.

    The primal is asked in rounds in which at least 1 is left of each resource, the most that an action can cost, and
    told f + λ·(1 - c): the Lagrangian f + λ·(ρ - c), moved so that it lies between 0 and `info["range"]` = 1 + 2 Σ λ.
    Where the world's `info` holds the rows "rewards" (k,) and "costs" (k, m), so does what it is told: "rewards" (k,).
    Nothing ever falls below zero. The observation is the primal's.

    `void` is the arm that does nothing and refills at least `beta` in every round; the primal may choose it too. What
    is out of range (rewards in [0, 1], costs in [-1, 1]) is clipped for the learners, and counted; it is paid in full.

    Raises:
        ValueError: if `beta` is not in [0, 1], or neither it nor the budget is positive.
    """

    primal: Policy
    budget: Budget
    beta: Float[Array, ""] | float = 0.0
    void: int = eqx.field(default=0, static=True)

    def __check_init__(self):
        if not known(self.beta, self.budget):
            return
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta is what the void action refills at least, in [0, 1], got {self.beta}")
        if self.beta == 0 and not (self.budget.total > 0).all():
            raise ValueError(f"nothing to spend and nothing refilled: beta = 0, total = {self.budget.total.tolist()}")

    @property
    def nu(self) -> Float[Array, ""]:
        return self.budget.rho.min() + self.beta

    @property
    def alpha(self) -> Float[Array, ""]:
        """The share of the best mixture in hindsight that is guaranteed whatever happens."""
        return self.nu / (1 + self.beta)

    @property
    def prices(self) -> Multipliers:
        bound = 1 / self.nu
        return Multipliers(self.budget.m, bound / jnp.sqrt(self.budget.m * self.budget.horizon), bound)

    def init(self, *, key=None):
        return BwRKState(self.primal.init(key=key), self.budget.init(), self.prices.init(), jnp.zeros((), jnp.int32))

    def act(self, state, x):
        asked = self.budget.affords(state.left, 1.0)
        primal, decision = self.primal.act(state.primal, x)
        action = jnp.where(asked, decision.action, self.void)
        logp = jnp.where(asked, decision.logp, 0.0)
        aux = Asked(asked, state.lam, decision.aux)
        return state._replace(primal=select(asked, primal, state.primal)), Decision(action, logp, aux)

    def learn(self, state, x, decision, feedback):
        asked, lam, aux = decision.aux
        earned, paid = jnp.asarray(feedback.reward), jnp.asarray(feedback.cost)
        reward, cost = self._clip(earned, paid)
        info = {"range": 1 + 2 * lam.sum()}
        if "costs" in feedback.info:
            rewards, costs = self._clip(feedback.info["rewards"], feedback.info["costs"])
            info["rewards"] = rewards + (1 - costs) @ lam
        told = Feedback(reward + (1 - cost) @ lam, info=info)
        primal = self.primal.learn(state.primal, x, decision._replace(aux=aux), told)
        outside = (reward != earned) | (cost != paid).any()
        return BwRKState(
            primal=select(asked, primal, state.primal),
            left=self.budget.pay(state.left, paid),
            lam=self.prices.ascend(state.lam, cost - self.budget.rho),
            clipped=state.clipped + outside,
        )

    def _clip(self, reward, cost):
        return jnp.clip(reward, 0.0, 1.0), jnp.clip(cost, -1.0, 1.0)


def token_bucket(
    demand: ArrayLike, value: ArrayLike, refill: float, shares: ArrayLike = (0.0, 0.25, 0.5, 0.75, 1.0)
) -> tuple[BudgetedTrace, float]:
    """A world in which the action is the share of each round's demand that is served, and its void action's `beta`.

    Serving takes a token for each unit of demand, and `refill` tokens come in every round. Costs are in units of the
    largest demand less the refill, the most that a round can cost; rewards are served value in units of the largest.
    Which demand a round brings is known after it.

    Arguments:
        demand: tokens that serving all of each round would take, (T,).
        value: what serving all of it is worth, (T,).
        refill: tokens a round.
        shares: the actions (k,), of which the first is 0, the void action.

    Raises:
        ValueError: if the demand never exceeds `refill` (there is nothing to decide), or `shares[0]` is not 0.
    """
    tokens, worth, share = (np.asarray(a, np.float64) for a in (demand, value, shares))
    unit = float(tokens.max()) - refill
    if not unit > 0:
        raise ValueError(f"demand never exceeds refill = {refill}: there is nothing to decide")
    if share[0] != 0:
        raise ValueError(f"shares[0] is the void action and must be 0, got {share[0]}")
    unit = max(unit, refill)
    costs = (tokens[:, None] * share - refill) / unit
    world = BudgetedTrace(worth[:, None] / worth.max() * share, costs[:, :, None], reveal="full")
    return world, refill / unit


def example() -> tuple[BwRK, PyTree]:
    """EXP3 under a small budget that doing nothing refills, in a stationary world of three arms."""
    world = BudgetedDice([0.0, 0.9, 0.3], [[-0.2], [0.9], [-0.1]])
    policy = BwRK(Exp3(3), Budget([3.0], horizon=64), beta=0.2)
    return policy, inputs(play(policy, world, 64, key=jax.random.PRNGKey(0)).ticks)
