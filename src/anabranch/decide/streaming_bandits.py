"""Single-pass streaming bandits: find an ε-best arm in one pass over the arms, then play it for the rest.

Wang: Tight Regret Bounds for Single-pass Streaming Multi-armed Bandits (arXiv 2306.02208, ICML 2023). The ε-best arm
algorithms are those of Jin, Huang, Tang, Xiao (Optimal streaming algorithms for multi-armed bandits, ICML 2021) and
Assadi, Wang (Exploration with limited memory, STOC 2020).

k arms come by once; only the numbers of a few can be remembered, and an arm that is not stored when the next one is
read is lost. There are `horizon` = T pulls in all, rewards in [0, 1], and the regret Σ (p* - p of the arm pulled)
counts every pull. With ε = (k/T)^(1/3), finding an ε-best arm costs about k/ε² pulls, and playing it εT regret:
k^(1/3) T^(2/3) both, without the factor log^(1/3) T that exploring every arm equally has.

A round of the world (`arm_stream`) is one batch of pulls of one arm. The state of a policy is the numbers of at most
`memory` arms, what it knows of them, and a few counters.

    >>> from anabranch.decide.arm_stream import PullRegret
    >>> world = ArmStream(jnp.array([0.2, 0.9, 0.4, 0.5]), horizon=100_000)
    >>> policy = Promotion(4, horizon=100_000)
    >>> meters = {"regret": PullRegret(world)}
    >>> result = play(policy, world, policy.rounds, key=jax.random.PRNGKey(0), meters=meters)
    >>> int(result.ticks.decision.action.arm[-1]), policy.memory
    (1, 1)
    >>> 1000 < float(result.scores["regret"]) < 4000
    True

The constants are those of the official code (jhwjhw0123/streaming-regret-minimization-MABs), whose slips are not
followed: it compares the first arm's successor with a reward of 0, books the regret of some comparisons on the wrong
arm, gives the king's estimate the true gap of the instance (here ε), and ends with the last arm that is left, not the
best.
"""

import math
from typing import Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from anabranch.cell import Decision, Policy, noise, select
from anabranch.decide.arm_stream import ArmStream, Pulls, Reading, positive_horizon
from anabranch.decide.base import inputs
from anabranch.drive import play

DELTA = 0.1
"""The probability of failure that `Promotion("theory")` asks for."""


class Stored(NamedTuple):
    """The arms in store."""

    arm: Int[Array, " m"]
    """Their numbers; -1 where the slot is free."""
    mean: Float[Array, " m"]
    """The mean of the batch that won each its slot."""

    @classmethod
    def nothing(cls, m: int) -> "Stored":
        return cls(jnp.full(m, -1, jnp.int32), jnp.zeros(m))

    @property
    def best(self) -> Int[Array, ""]:
        """The arm of highest mean; the first arm of the stream if nothing is in store."""
        return jnp.maximum(self.arm[jnp.argmax(jnp.where(self.arm >= 0, self.mean, -jnp.inf))], 0)

    def beaten(self, slot: Int[Array, ""] | int, mean: Float[Array, ""]) -> Bool[Array, ""]:
        return (self.arm[slot] < 0) | (mean > self.mean[slot])

    def put(self, slot, arm, mean, where=True) -> "Stored":
        new = self.arm.at[slot].set(arm), self.mean.at[slot].set(mean)
        return select(where, Stored(*new), self)


class SinglePass(Policy):
    """One pass over `k` arms within `horizon` pulls: subclasses say which batch to pull next, and what they make of it.

    `explore` gives the next batch, or one of infinitely many pulls when there is nothing left to find out. When the
    pulls that are left do not suffice for it, they all go to `best`. `decision.aux` is True while exploring.

    Raises:
        ValueError: if `k` or `horizon` is less than 1.
    """

    k: int = eqx.field(static=True)
    horizon: Float[Array, ""] | float

    def __check_init__(self):
        if self.k < 1:
            raise ValueError(f"a stream needs at least one arm, got k = {self.k}")
        positive_horizon(self.horizon)

    @property
    def unit(self) -> Float[Array, ""]:
        """1/ε² pulls, with ε = (k/T)^(1/3)."""
        return jnp.float32(self.horizon / self.k) ** (2 / 3)

    @property
    def memory(self) -> int:
        """The most arms that are ever in store."""
        return 1

    @property
    def rounds(self) -> int:
        """Rounds that suffice for every play."""
        return self.k + 1

    def explore(self, state: PyTree, x: Reading) -> Pulls:
        raise NotImplementedError(f"{type(self).__name__} is abstract: it defines no `explore`")

    def hear(self, state: PyTree, x: Reading, pulls: Pulls, mean: Float[Array, ""]) -> PyTree:
        """The state after a batch."""
        raise NotImplementedError(f"{type(self).__name__} is abstract: it defines no `hear`")

    def best(self, state: PyTree) -> Int[Array, ""]:
        return state.best

    def act(self, state, x: Reading):
        pulls = self.explore(state, x)
        # With no more than a pull per arm there is nothing to be found out: the first arm is as good as any.
        exploring = (pulls.n <= x.left) & (x.left > 0) & (self.unit > 1)
        commit = Pulls(self.best(state), x.left)
        return state, Decision(select(exploring, pulls, commit), aux=exploring)

    def learn(self, state, x, decision, feedback):
        return select(decision.aux, self.hear(state, x, decision.action, jnp.asarray(feedback.reward)), state)


class UniformExploration(SinglePass):
    """The usual way: (T/k)^(2/3) (ln T)^(1/3) pulls of every arm; the one of highest mean is kept. Stores one arm."""

    @property
    def batch(self) -> Float[Array, ""]:
        return _whole(self.unit * jnp.log(self.horizon) ** (1 / 3))

    def init(self, *, key=None):
        return Stored.nothing(1)

    def explore(self, state, x):
        over = x.read >= self.k
        return Pulls(jnp.minimum(x.read, self.k - 1), jnp.where(over, jnp.inf, self.batch))

    def hear(self, state, x, pulls, mean):
        return state.put(0, pulls.arm, mean, state.beaten(0, mean))


class NaiveEps(UniformExploration):
    """An ε-best arm by ln k / ε² pulls of every arm. Regret k^(1/3) T^(2/3) ln k in expectation. Stores one arm."""

    @property
    def batch(self):
        return _sure(self.unit, self.k)


class KingState(NamedTuple):
    """The king, the arm to fall back on, and where the trial of the last arm stands."""

    stored: Stored
    """Slot 0: the king, with the estimate that a challenger must come near to. Slot 1: the best of the sample."""
    arm: Int[Array, ""]
    """The arm on trial."""
    level: Int[Array, ""]
    """Batches that it has survived as a challenger; -1 when it is pulled for the sample."""
    budget: Float[Array, ""]
    """Pulls that the king can still pay for."""
    used: Float[Array, ""]
    """Pulls of challenges and coronations so far."""
    key: PRNGKeyArray


class KingOfArms(SinglePass):
    """Game of arms: a king pays for the trials of its challengers, in batches that double, until it is broke.

    Good with high constant probability. The king's budget grows by 1/ε² with every arm. A challenger is lost once the
    mean of a batch is ε/5 or more below the king's estimate; one that the king cannot pay the next batch for becomes
    king, and the estimate rises to its mean, by at least ε/2. Beside it, a sample of the stream (each arm with
    probability 1.5 / ln k) is tried with ln k / ε² pulls an arm: once challenges have taken more than 10 k/ε² pulls
    there are no more of them, and the best of the sample is played. King and best of the sample: two arms in store.
    """

    @property
    def memory(self):
        return 2

    @property
    def rounds(self):
        return 5 * self.k + 2  # for each arm 1 + 1.2 batches paid from budgets, the last challenge, and the sample

    def init(self, *, key=None):
        unseen = Stored(jnp.array([0, -1], jnp.int32), jnp.stack([0.5 / jnp.sqrt(self.unit), jnp.zeros(())]))
        key = jax.random.PRNGKey(0) if key is None else key
        zero = jnp.zeros((), jnp.int32)
        return KingState(unseen, zero, zero - 1, 1.2 * self.unit, jnp.zeros(()), key)

    def trial(self, state: KingState) -> tuple[Float[Array, ""], Bool[Array, ""], Bool[Array, ""]]:
        """Pulls of the next batch, whether it is for the sample, and whether the king cannot pay for it."""
        sample, challenge = state.level < 0, _whole(self.unit * jnp.exp2(jnp.maximum(state.level, 0)))
        excessive = self.excessive(state)
        broke = ~sample & ~excessive & (state.budget < challenge)
        n = jnp.where(broke, _whole(1.2 * self.unit), jnp.where(excessive, 0.0, challenge))
        return jnp.where(sample, _sure(self.unit, self.k), n), sample, broke

    def excessive(self, state: KingState) -> Bool[Array, ""]:
        return state.used > 10 * self.k * self.unit

    def explore(self, state, x):
        return Pulls(jnp.minimum(state.arm, self.k - 1), jnp.where(state.arm >= self.k, jnp.inf, self.trial(state)[0]))

    def hear(self, state, x, pulls, mean):
        n, sample, broke = self.trial(state)
        epsilon, estimate = 1 / jnp.sqrt(self.unit), state.stored.mean[0]
        stored = state.stored.put(0, state.arm, jnp.clip(mean, jnp.minimum(estimate + epsilon / 2, 1.0), 1.0), broke)
        stored = stored.put(1, state.arm, mean, sample & stored.beaten(1, mean))
        decided = ~sample & (broke | self.excessive(state) | (mean <= estimate - epsilon / 5))
        drawn = jax.random.uniform(noise(state.key, state.arm)) < 1.5 / math.log(max(self.k, 2))
        over = sample | (decided & ~drawn)
        budget = jnp.where(broke, 1.2 * self.unit, state.budget - jnp.where(sample, 0.0, n))
        return KingState(
            stored,
            arm=state.arm + over,
            level=jnp.where(over, 0, jnp.where(decided, -1, state.level + 1)),
            budget=budget + jnp.where(over, self.unit, 0.0),
            used=state.used + jnp.where(sample, 0.0, n),
            key=state.key,
        )

    def best(self, state):
        return jnp.maximum(state.stored.arm[self.excessive(state).astype(jnp.int32)], 0)


class PromotionState(NamedTuple):
    """One arm a level, and the arm that is on its way up."""

    stored: Stored
    compared: Int[Array, " m"]
    """Arms compared at each level since its last promotion."""
    hand: Int[Array, ""]
    """The arm promoted to `level`; -1: the next arm of the stream."""
    level: Int[Array, ""]
    fresh: Bool[Array, ""]
    """Whether the arm stored at `level` has been pulled for the comparison that is due."""
    finals: Int[Array, ""]
    """Levels whose arm has been pulled once more after the end of the stream."""


class Promotion(SinglePass):
    """Aggressive selective promotion: a ladder of levels, each of which stores an arm and tries it harder.

    A newcomer to a level is pulled a batch; the better of it and the stored arm stays. When as many arms as the level's
    capacity have been compared there, the one in store moves up, where it is the newcomer. After the stream, the arms
    in store are pulled a batch once more, and the best is played. With u = 1/ε², the forms are, from level 0 up,

    - `tower`: batches 1.2^l u, capacity 6; log k levels;
    - `loglog`: batches 1.2^l u, capacity 10; ln ln k levels, the last of which tries ln k u and takes all;
    - `star`: batches u, 4u, 16u, 2^16 u; capacities 4, 2^4 / 2^2, 2^16 / 2^4; log* k levels;
    - `theory`, with the constants of the proof: r = 4, 2^4, …, batches (4 / ε_l²)(ln 1/δ + 3r) with ε_l = ε / (10·2^l),
      capacities 2^r / 2^l, and the stored arm is pulled anew for each comparison. It costs a hundred times as much:
      more than there is at any practical horizon.

    The first three compare with the mean that the stored arm won its slot with. Levels that no arm can reach are left
    out: the capacities multiply to at least k. A batch that would exceed the pulls that are left ends exploration.

    Raises:
        ValueError: if `form` is unknown.
    """

    form: Literal["tower", "loglog", "star", "theory"] = eqx.field(default="tower", static=True)

    def __check_init__(self):
        if self.form not in ("tower", "loglog", "star", "theory"):
            raise ValueError(f'form must be "tower", "loglog", "star" or "theory", got {self.form!r}')

    @property
    def levels(self) -> list[tuple[float, float]]:
        """Each level's batch, in units of 1/ε², and capacity."""
        k, r, levels, reach = self.k, 2.0 if self.form == "star" else 4.0, [], 1.0
        last = int(math.log(math.log(max(k, 3))))
        while not levels or reach < k:
            l = len(levels)
            power = 2.0 ** min(r, 1000.0)
            levels.append(
                {
                    "tower": (1.2**l, 6.0),
                    "loglog": (1.2**l, 10.0) if l < last else (math.log(max(k, 2)), math.inf),
                    "star": (r, power / r) if l else (1.0, power),
                    "theory": (400.0 * 4**l * (math.log(1 / DELTA) + 3 * r), power / 2**l),
                }[self.form]
            )
            r, reach = power, reach * levels[-1][1]
        return levels

    @property
    def batches(self) -> Float[Array, " m"]:
        return _whole(self.unit * jnp.array([batch for batch, _ in self.levels]))

    @property
    def capacities(self) -> Int[Array, " m"]:
        return jnp.array([min(capacity, self.k + 1) for _, capacity in self.levels], jnp.int32)

    @property
    def memory(self):
        return len(self.levels)

    @property
    def rounds(self):
        compared, n = 0.0, float(self.k)
        for _, capacity in self.levels:
            compared, n = compared + n, n / capacity
        return math.ceil(compared * (2 if self.form == "theory" else 1)) + self.memory + 1

    def init(self, *, key=None):
        m, zero = self.memory, jnp.zeros((), jnp.int32)
        return PromotionState(Stored.nothing(m), jnp.zeros(m, jnp.int32), zero - 1, zero, zero < 0, zero)

    def due(self, state: PromotionState, x: Reading) -> tuple[Bool[Array, ""], Int[Array, ""], Bool[Array, ""]]:
        """Whether the stream is over, the level that is next, and whether it is the arm stored there that is pulled."""
        over = (x.read >= self.k) & (state.hand < 0)
        level = jnp.where(over, jnp.minimum(state.finals, self.memory - 1), state.level)
        anew = (self.form == "theory") & (state.stored.arm[level] >= 0) & ~state.fresh
        return over, level, over | anew

    def explore(self, state, x):
        over, level, again = self.due(state, x)
        stored = state.stored.arm[level]
        arm = jnp.where(again, stored, jnp.where(state.hand < 0, x.read, state.hand))
        unopposed = (stored < 0) & (over | (self.form == "theory"))
        n = jnp.where(unopposed, 0.0, self.batches[level])
        return Pulls(jnp.maximum(arm, 0), jnp.where(over & (state.finals >= self.memory), jnp.inf, n))

    def hear(self, state, x, pulls, mean):
        over, level, again = self.due(state, x)
        stored = state.stored.put(level, pulls.arm, mean, ~again & state.stored.beaten(level, mean))
        stored = stored.put(level, stored.arm[level], mean, again)
        compared = state.compared[level] + ~again
        full = (compared >= self.capacities[level]) & (level < self.memory - 1) & ~again
        return PromotionState(
            stored=stored.put(level, -1, 0.0, full),
            compared=state.compared.at[level].set(jnp.where(full, 0, compared)),
            hand=jnp.where(again, state.hand, jnp.where(full, stored.arm[level], -1)),
            level=jnp.where(again, state.level, jnp.where(full, level + 1, 0)),
            fresh=again & ~over,
            finals=state.finals + over,
        )

    def best(self, state):
        nothing = (state.stored.arm < 0).all() & (state.hand >= 0)
        return jnp.where(nothing, state.hand, state.stored.best)


def _whole(pulls: Float[Array, "..."]) -> Float[Array, "..."]:
    """Rounded up, but for the rounding error of a whole number: 1000^(2/3) is 100."""
    return jnp.ceil(pulls * (1 - 1e-6))


def _sure(unit: Float[Array, ""], k: int) -> Float[Array, ""]:
    """Pulls that tell an arm's mean to ε, surely enough for k arms."""
    return _whole(unit * math.log(max(k, 2)))


def example() -> tuple[Promotion, PyTree]:
    """A tower for 40 arms, and what it is shown and told in a play."""
    world = ArmStream(jnp.linspace(0.1, 0.9, 40), 20_000)
    policy = Promotion(40, horizon=20_000)
    return policy, inputs(play(policy, world, 64, key=jax.random.PRNGKey(0)).ticks)
