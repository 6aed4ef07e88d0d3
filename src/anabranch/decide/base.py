"""The nouns of the family: arms and their counts, environments that replay data, meters, and the plain bandits.

A bandit is a `Policy` over k arms whose observation is the mask of the arms that are eligible now. It is told the
reward, in [0, 1], of the arm that it pulled, at once or much later. Bandits are pure cells: a closed loop with an
environment is one compiled scan (`anabranch.drive.play`), and one `vmap` runs it over seeds or over keys.

    >>> bandit = UCB1(2)
    >>> state, both = bandit.init(), jnp.array([True, True])
    >>> for _ in range(20):
    ...     state, decision = bandit.act(state, both)
    ...     state = bandit.learn(state, both, decision, Feedback(jnp.float32(decision.action == 1)))
    >>> int(decision.action), state.stats.n.tolist()
    (1, [3.0, 17.0])
"""

from typing import Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from anabranch.cell import Cell, Decision, Env, Feedback, Maybe, Policy, noise, select
from anabranch.drive import Tick

NEVER = 1e-6
"""An arm with fewer (discounted) pulls counts as never pulled."""


class ArmStats(NamedTuple):
    """What is known of k arms: counts that may fade, as seen by an index policy.

    A pull counts as `pending` from the decision until its outcome, so that an arm whose outcomes are slow does not look
    unexplored. Pending pulls fade like settled ones; a pull whose outcome never comes is therefore forgotten too.
    Counts are float32: without fading they stop growing at 2^24 pulls of one arm.
    """

    n: Float[Array, " k"]
    """Settled pulls."""
    s: Float[Array, " k"]
    """The sum of their rewards."""
    pending: Float[Array, " k"]
    """Pulls whose outcome is not known yet."""
    clock: Float[Array, ""]
    """By how many halvings everything has faded so far, modulo `WRAP`."""

    @classmethod
    def zeros(cls, k: int) -> "ArmStats":
        return cls(jnp.zeros(k), jnp.zeros(k), jnp.zeros(k), jnp.zeros(()))

    @property
    def pulls(self) -> Float[Array, " k"]:
        return self.n + self.pending

    @property
    def mean(self) -> Float[Array, " k"]:
        """Mean reward of settled pulls; 0 where there are none."""
        return self.s / jnp.maximum(self.n, NEVER)

    def fade(self, halvings: Float[Array, ""] | float) -> "ArmStats":
        """Multiply all counts by 2^-halvings."""
        w = jnp.exp2(-jnp.asarray(halvings, jnp.float32))
        return ArmStats(w * self.n, w * self.s, w * self.pending, (self.clock + halvings) % WRAP)

    def pull(self, arm: Int[Array, ""]) -> "ArmStats":
        return self._replace(pending=self.pending + _one(arm, self.n))

    def settle(self, arm: Int[Array, ""], reward: Float[Array, ""], pulled_at: Float[Array, ""]) -> "ArmStats":
        """Move one pull, made when the clock showed `pulled_at`, from pending to settled."""
        one = _one(arm, self.n)
        left = jnp.exp2(-((self.clock - pulled_at) % WRAP))  # what has remained of that pull
        return ArmStats(self.n + one, self.s + reward * one, jnp.maximum(self.pending - left * one, 0.0), self.clock)


WRAP = 1024.0
"""A pull that has halved this often is gone; a clock that wraps here keeps the precision of float32 for ever."""


def _one(arm: Int[Array, ""], like: Float[Array, " k"]) -> Float[Array, " k"]:
    return (jnp.arange(like.shape[0]) == arm).astype(like.dtype)


def ucb(stats: ArmStats, bonus: Float[Array, ""] | float) -> Float[Array, " k"]:
    """Upper confidence bounds: mean + bonus √(ln Σ pulls / pulls), infinite for arms never pulled.

    With bonus √2 this is UCB1. Faded counts can sum to less than 1; the radicand is then 0, not negative.
    """
    pulls = stats.pulls
    radicand = jnp.maximum(jnp.log(jnp.maximum(pulls.sum(), NEVER)), 0.0) / jnp.maximum(pulls, NEVER)
    return jnp.where(pulls < NEVER, jnp.inf, stats.mean + bonus * jnp.sqrt(radicand))


def choose(
    index: Float[Array, " k"], eligible: Bool[Array, " k"], key: PRNGKeyArray, t: Int[Array, ""]
) -> Int[Array, ""]:
    """The eligible arm of highest index, ties broken by `noise(key, t, "tie")`; -1 if no arm is eligible."""
    index = jnp.where(eligible, index, -jnp.inf)
    upto = jnp.cumsum(eligible & (index == index.max()))
    most = upto[-1]
    # To draw a number costs more than the rest of a decision, and ties are rare. In a batch all draw, one number each.
    draw = lambda: jnp.floor(jax.random.uniform(noise(key, t, "tie")) * most)
    which = jax.lax.cond(most > 1, draw, lambda: jnp.zeros(()))
    return jnp.where(most > 0, jnp.argmax(upto > which), -1).astype(jnp.int32)


def beta(key: PRNGKeyArray, a: Float[Array, " k"], b: Float[Array, " k"]) -> Float[Array, " k"]:
    """Beta variates for a, b ≥ 1, from two gamma variates each (Marsaglia, Tsang: A simple method, TOMS 26, 2000).

    Rejects all arms in one loop; `jax.random.beta` loops element by element, ten times slower where this is called.
    """
    d = jnp.stack([a, b]) - 1 / 3
    c = 1 / jnp.sqrt(9 * d)

    def attempt(carry):
        i, gamma, accepted = carry
        normal, uniform = jax.random.split(jax.random.fold_in(key, i))
        z, u = jax.random.normal(normal, d.shape), jax.random.uniform(uniform, d.shape)
        v = (1 + c * z) ** 3
        accept = (v > 0) & (jnp.log(u) < z**2 / 2 + d * (1 - v + jnp.log(jnp.where(v > 0, v, 1.0))))
        return i + 1, jnp.where(accepted, gamma, d * v), accepted | accept

    start = jnp.zeros((), jnp.int32), d, jnp.zeros(d.shape, bool)
    _, (x, y), _ = jax.lax.while_loop(lambda carry: ~carry[2].all(), attempt, start)
    return x / (x + y)


class BanditState(NamedTuple):
    """What a bandit has learned, and how far it is."""

    stats: PyTree
    t: Int[Array, ""]
    """Decisions asked for so far: the counter of the noise."""
    key: PRNGKeyArray


class Bandit(Policy):
    """An index policy over `k` arms: subclasses give `index`. Observation: the mask (k,) of eligible arms.

    The action is the int32 arm, or -1 when none is eligible; such a decision teaches nothing. `decision.aux` is the
    clock of the statistics at the pull.

    Raises:
        ValueError: if `k` is not positive.
    """

    k: int = eqx.field(static=True)

    def __check_init__(self):
        if self.k < 1:
            raise ValueError(f"a bandit needs at least one arm, got k = {self.k}")

    def index(self, state: BanditState, key: PRNGKeyArray) -> Float[Array, " k"]:
        """The arms' claims to be pulled now; `key` is fresh at every decision."""
        raise NotImplementedError(f"{type(self).__name__} is abstract: it defines no `index`")

    @property
    def like(self) -> PyTree:
        """An example of the observation."""
        return jnp.ones(self.k, bool)

    def eligible(self, x: PyTree) -> Bool[Array, " k"]:
        """The mask in an observation."""
        return x

    def init(self, *, key=None) -> BanditState:
        return BanditState(ArmStats.zeros(self.k), jnp.zeros((), jnp.int32), _default(key))

    def act(self, state: BanditState, x: PyTree) -> tuple[BanditState, Decision]:
        index = self.index(state, noise(state.key, state.t))
        arm = choose(index, self.eligible(x), state.key, state.t)
        state = BanditState(state.stats.pull(arm), state.t + 1, state.key)
        return state, Decision(arm, jnp.zeros(()), state.stats.clock)

    def learn(self, state: BanditState, x: PyTree, decision: Decision, feedback: Feedback) -> BanditState:
        made = decision.action >= 0
        return state._replace(
            stats=select(made, self.settle(state.stats, decision, jnp.asarray(feedback.reward)), state.stats)
        )

    def settle(self, stats: PyTree, decision: Decision, reward: Float[Array, ""]) -> PyTree:
        """The statistics after one outcome."""
        return stats.settle(decision.action, reward, decision.aux)


def _default(key: PRNGKeyArray | None) -> PRNGKeyArray:
    return jax.random.PRNGKey(0) if key is None else key


class UCB1(Bandit):
    """Auer, Cesa-Bianchi, Fischer: Finite-time analysis of the multiarmed bandit problem (Machine Learning 47, 2002).

    The paper's constant is `bonus` = √2.
    """

    bonus: Float[Array, ""] | float = 2**0.5

    def index(self, state, key):
        return ucb(state.stats, self.bonus)


class Thompson(Bandit):
    """Thompson sampling for rewards 0 or 1 from the prior Beta(1, 1); a reward between counts as part of a success.

    The probability of the choice has no closed form: `decision.logp` is 0.
    """

    def index(self, state, key):
        stats = state.stats
        return beta(key, 1 + stats.s, 1 + jnp.maximum(stats.n - stats.s, 0.0))


class EpsilonGreedy(Bandit):
    """The arm of highest mean, or with probability ε / (1 + decay · t) any arm, in the t-th decision from 0.

    Raises:
        ValueError: if `epsilon` is not in [0, 1] or `decay` is negative.
    """

    epsilon: float = 0.1
    decay: float = 0.0

    def __check_init__(self):
        if not 0 <= self.epsilon <= 1:
            raise ValueError(f"epsilon is a probability, got {self.epsilon}")
        if self.decay < 0:
            raise ValueError(f"decay must not be negative, got {self.decay}")

    def index(self, state, key):
        mean = jnp.where(state.stats.pulls < NEVER, jnp.inf, state.stats.mean)
        explore = jax.random.uniform(key) < self.epsilon / (1 + self.decay * state.t)
        return jnp.where(explore, 0.0, mean)  # all tie: any eligible arm


class RoundRobin(Bandit):
    """Each arm in turn; one that is not eligible gives its turn to the next that is."""

    def index(self, state, key):
        return -((jnp.arange(self.k) - state.t) % self.k).astype(jnp.float32)


class Static(Bandit):
    """A fixed rule: always the eligible arm of highest score. `Static(scores)`, scores (k,)."""

    scores: Float[Array, " k"]

    def __init__(self, scores: Float[Array, " k"]):
        self.scores = jnp.asarray(scores, jnp.float32)
        if self.scores.ndim != 1:
            raise ValueError(f"scores must be one number per arm, got an array of shape {self.scores.shape}")
        self.k = self.scores.shape[0]

    def index(self, state, key):
        return self.scores


class Exp3IX(Bandit):
    """Neu: Explore no more: improved high-probability regret bounds for non-stochastic bandits (NeurIPS 2015).

    Anytime: η_t = √(2 ln k / (k t)), γ_t = η_t / 2. Where some arms are not eligible, the weights are normalised over
    those that are. The statistics are the estimated losses (k,), relative to the smallest; `decision.aux` is t.
    """

    def init(self, *, key=None):
        return BanditState(jnp.zeros(self.k), jnp.zeros((), jnp.int32), _default(key))

    def eta(self, t: Int[Array, ""]) -> Float[Array, ""]:
        return jnp.sqrt(2 * jnp.log(self.k) / (self.k * t))

    def act(self, state, x):
        t = state.t + 1
        logits = jnp.where(x, -self.eta(t) * state.stats, -jnp.inf)
        logp = jnp.where(x.any(), logits - jax.nn.logsumexp(jnp.where(x.any(), logits, 0.0)), 0.0)
        arm = choose(logp + jax.random.gumbel(noise(state.key, state.t), (self.k,)), x, state.key, state.t)
        return state._replace(t=t), Decision(arm, logp[arm], t)

    def settle(self, stats, decision, reward):
        implicit = jnp.exp(decision.logp) + self.eta(decision.aux) / 2
        losses = stats + _one(decision.action, stats) * (1 - reward) / implicit
        return losses - losses.min()


class TraceState(NamedTuple):
    """The next round of a `TraceEnv`, not reduced modulo its length."""

    t: Int[Array, ""]


class TraceEnv(Env):
    """Recorded rounds in which the outcome of every arm is known: row t answers round t; after the last, the first.

    `xs` is what a policy sees, a pytree stacked on a leading time axis, by default all arms eligible. Row t of
    `rewards` (T, k) is also the oracle of round t. With `reveal="bandit"` the feedback is the reward of the arm taken
    only; with `"full"` the row is in `feedback.info["rewards"]`. The action -1 (no arm) earns nothing.

    Raises:
        ValueError: if `rewards` is not (T, k), `xs` is not as long, or `reveal` is unknown.
    """

    rewards: Float[Array, "t k"]
    xs: PyTree
    reveal: Literal["bandit", "full"] = eqx.field(static=True)

    def __init__(self, rewards: Float[Array, "t k"], xs: PyTree = None, reveal: Literal["bandit", "full"] = "bandit"):
        self.rewards = jnp.asarray(rewards, jnp.float32)
        if self.rewards.ndim != 2:
            raise ValueError(f"rewards must be (rounds, arms), got shape {self.rewards.shape}")
        if reveal not in ("bandit", "full"):
            raise ValueError(f'reveal must be "bandit" or "full", got {reveal!r}')
        self.xs = jax.tree.map(jnp.asarray, jnp.ones(self.rewards.shape, bool) if xs is None else xs)
        for leaf in jax.tree.leaves(self.xs):
            if leaf.shape[:1] != self.rewards.shape[:1]:
                raise ValueError(f"xs must have {len(self.rewards)} rows as rewards has, got shape {leaf.shape}")
        self.reveal = reveal

    def init(self, *, key=None):
        return TraceState(jnp.zeros((), jnp.int32))

    def observe(self, state):
        return jax.tree.map(lambda leaf: leaf[state.t], self.xs)

    def step(self, state, x):
        row = self.rewards[state.t]
        last = state.t == len(self.rewards) - 1
        new = TraceState(jnp.where(last, 0, state.t + 1))
        info = {"rewards": row} if self.reveal == "full" else ()
        return new, Feedback(earned(row, x), x=self.observe(new), truncated=last, info=info)

    def oracle(self, state):
        return self.rewards[state.t]


def earned(rewards: Float[Array, " k"], arm: Int[Array, ""]) -> Float[Array, ""]:
    """The reward of an arm; 0 for the arm -1, which is none."""
    return jnp.where(arm >= 0, rewards[jnp.maximum(arm, 0)], 0.0)


def known(*values: PyTree) -> bool:
    """Whether the values of these arrays can be checked now: they cannot while JAX traces."""
    return not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(values))


def inputs(ticks: Tick | None) -> tuple[PyTree, Maybe]:
    """What a policy was shown and told in a play, stacked over its rounds: inputs for `Policy.step`.

    Raises:
        ValueError: if the play kept no ticks.
    """
    if ticks is None:
        raise ValueError("the play kept no ticks: call it with keep=True")
    n = jax.tree.leaves(ticks)[0].shape[0]
    before = jax.tree.map(lambda leaf: leaf[jnp.maximum(jnp.arange(n) - 1, 0)], ticks)
    return ticks.x, Maybe((before.x, before.decision, before.feedback), jnp.arange(n) > 0)


class CumReward(Cell):
    """Meter: the sum of rewards from round `start` on."""

    start: int = 0

    def init(self, *, key=None):
        return jnp.zeros((), jnp.int32), jnp.zeros(())

    def step(self, state, x):
        t, total = state
        total = total + jnp.where(t >= self.start, x[0].feedback.reward, 0.0)
        return (t + 1, total), total

    def value(self, state) -> Float[Array, ""]:
        return state[1]


class Regret(Cell):
    """Meter: how much more the best fixed arm would have earned, in expectation under `env.oracle`."""

    env: Env

    def init(self, *, key=None):
        like = jax.eval_shape(lambda: self.env.oracle(self.env.init(key=jax.random.PRNGKey(0))))
        return jnp.zeros(like.shape), jnp.zeros(())

    def step(self, state, x):
        tick, world = x
        rewards = self.env.oracle(world)
        state = state[0] + rewards, state[1] + earned(rewards, tick.decision.action)
        return state, self.value(state)

    def value(self, state) -> Float[Array, ""]:
        return state[0].max() - state[1]


class DynamicRegret(Cell):
    """Meter: how much more the best arm of each round would have earned, in expectation under `env.oracle`.

    Rounds in which no arm was taken (action -1) do not count.
    """

    env: Env

    def init(self, *, key=None):
        return jnp.zeros(())

    def step(self, state, x):
        tick, world = x
        rewards, arm = self.env.oracle(world), tick.decision.action
        state = state + jnp.where(arm >= 0, rewards.max() - earned(rewards, arm), 0.0)
        return state, state

    def value(self, state) -> Float[Array, ""]:
        return state
