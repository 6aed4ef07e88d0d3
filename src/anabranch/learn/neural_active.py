"""Ban, Agarwal, Wu, et al.: Neural Active Learning Beyond Bandits. arXiv 2404.12522, ICLR 2024.

Unlabelled rows come one at a time, or in pools; labels are dear. One network estimates the loss of predicting each of
the K classes, a second, fed with the first one's features and gradient, estimates the error of that estimate. Their sum
f decides: the class with the least loss is predicted, and where the second best is close, the label is bought.

The stream of `NeurOnalS` is `Event(x f32[d], Maybe(label, valid))`, its state the two networks, their optimiser and the
labels bought so far. `NeurOnalP` picks the row of a pool that is to be labelled.

Where the paper and this file differ: the networks learn by Adam on mini-batches of all labels so far, as in the
experiments of the authors, and so without the factor √m of the output (m is the width), which belongs to plain gradient
descent; the weights are the last ones, not drawn from the history, as the analysis has it.

    >>> cell = NeurOnalS(d=2, K=3, budget=10, horizon=100, gamma=0.1)
    >>> state = cell.init(key=jax.random.PRNGKey(0))
    >>> answer = cell.predict(state, jnp.array([0.6, 0.8]))
    >>> answer.scores.shape, bool(answer.query)
    ((3,), True)
"""

import math
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PRNGKeyArray, PyTree

from anabranch.branch import branch
from anabranch.cell import Decision, Event, Feedback, Learner, Maybe, Policy, noise, select

Layers = tuple[Float[Array, "m d"], Float[Array, "K m"]]


def forward(layers: Layers, x: Float[Array, " d"]) -> tuple[Float[Array, " m"], Float[Array, " K"]]:
    """The hidden layer, after ReLU, and the output of a network of two layers without bias."""
    hidden = jax.nn.relu(layers[0] @ x)
    return hidden, layers[1] @ hidden


def embed(hidden: Float[Array, " m"], K: int) -> Float[Array, " n"]:
    """What the second network sees, n = m + Km: hidden layer and gradient of the first, of unit norm or zero.

    The gradient of the sum of a linear layer's K outputs is the hidden layer, times √m and repeated K times.
    """
    phi = jnp.concatenate([hidden, jnp.tile(math.sqrt(len(hidden)) * hidden, K)])
    square = phi @ phi
    return phi / jnp.sqrt(jnp.where(square > 0, square, 1.0))


def margin(losses: Float[Array, " K"]) -> Float[Array, ""]:
    """By how much the second smallest loss exceeds the smallest."""
    two = -jax.lax.top_k(-losses, 2)[0]
    return two[1] - two[0]


class PairState(NamedTuple):
    """The weights of both networks, the optimiser's state, and the Q labels that were bought last."""

    exploit: Layers
    explore: Layers
    adam: PyTree
    x: Float[Array, "Q d"]
    y: Int[Array, " Q"]
    weight: Float[Array, " Q"]
    known: Int[Array, ""]
    """Labels learned from."""
    rejected: Int[Array, ""]
    """Labels ignored: out of range, or with an input or a weight that is not finite."""
    key: PRNGKeyArray


class Pair(eqx.Module):
    """The exploitation and the exploration network, each with K outputs and m hidden units, and how they learn."""

    d: int = eqx.field(static=True)
    K: int = eqx.field(static=True)
    capacity: int = eqx.field(static=True)
    """How many labels are held to learn from."""
    m: int = eqx.field(static=True, default=100)
    batch: int = eqx.field(static=True, default=64)
    steps: int = eqx.field(static=True, default=10)
    """Mini-batches after each new label."""
    learning_rate: float = eqx.field(static=True, default=1e-3)

    def __check_init__(self):
        for name, least in (("d", 1), ("K", 2), ("capacity", 1), ("m", 1), ("batch", 1), ("steps", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """Adam, of which the derivative is finite for weights that have never had a gradient."""
        return optax.adam(self.learning_rate, eps_root=1e-15)

    def init(self, key: PRNGKeyArray) -> PairState:
        """Weights from N(0, 2/m) below and N(0, 1/(Km)) above, no labels."""

        def layers(inputs: int, use: str) -> Layers:
            low = jax.random.normal(noise(key, 0, use), (self.m, inputs)) * math.sqrt(2 / self.m)
            high = jax.random.normal(noise(key, 1, use), (self.K, self.m)) * math.sqrt(1 / (self.K * self.m))
            return low, high

        exploit, explore = layers(self.d, "exploit"), layers(self.m * (1 + self.K), "explore")
        adam = self.optimizer.init((exploit, explore))
        x, y, weight = jnp.zeros((self.capacity, self.d)), jnp.zeros(self.capacity, jnp.int32), jnp.zeros(self.capacity)
        return PairState(exploit, explore, adam, x, y, weight, jnp.int32(0), jnp.int32(0), key)

    def losses(self, state: PairState, x: Float[Array, " d"]) -> Float[Array, " K"]:
        """The estimated loss of predicting each class: f = f1(x) + f2(φ(x))."""
        hidden, out = forward(state.exploit, x)
        return out + forward(state.explore, embed(hidden, self.K))[1]

    def loss(self, networks: tuple[Layers, Layers], x, y, weight) -> Float[Array, ""]:
        """L1 + L2 of a batch: what f1 gets wrong of the losses, and f2 of what f1 gets wrong."""
        exploit, explore = networks

        def one(x: Float[Array, " d"], y: Int[Array, ""]) -> Float[Array, ""]:
            hidden, f1 = forward(exploit, x)
            _, f2 = forward(explore, embed(jax.lax.stop_gradient(hidden), self.K))
            wrong = 1.0 - jax.nn.one_hot(y, self.K)
            error = wrong - jax.lax.stop_gradient(f1)
            return 0.5 * jnp.sum((f1 - wrong) ** 2) + 0.5 * jnp.sum((f2 - error) ** 2)

        return jnp.mean(weight * jax.vmap(one)(x, y))

    def update(self, state: PairState, x: Float[Array, "B d"], y: Int[Array, " B"], weight: Float[Array, " B"]):
        """One step of Adam."""
        networks = state.exploit, state.explore
        grads = jax.grad(self.loss)(networks, x, y, weight)
        updates, adam = self.optimizer.update(grads, state.adam)
        new: Any = optax.apply_updates(networks, updates)
        exploit, explore = new
        return state._replace(exploit=exploit, explore=explore, adam=adam)

    def learn(self, state: PairState, x: Float[Array, " d"], y: Int[Array, ""], weight: Any = 1.0) -> PairState:
        """Keep one label, the newest in the place of the oldest, and learn from mini-batches of all that are kept."""
        y, weight = jnp.asarray(y, jnp.int32), jnp.asarray(weight, float)
        good = jnp.isfinite(x).all() & (y >= 0) & (y < self.K) & jnp.isfinite(weight)

        def teach(state: PairState) -> PairState:
            at = state.known % self.capacity
            state = state._replace(
                x=state.x.at[at].set(x), y=state.y.at[at].set(y), weight=state.weight.at[at].set(weight)
            )
            held = jnp.minimum(state.known + 1, self.capacity)

            def step(i: Array, state: PairState) -> PairState:
                rows = jax.random.randint(noise(noise(state.key, state.known, "rows"), i), (self.batch,), 0, held)
                return self.update(state, state.x[rows], state.y[rows], state.weight[rows])

            return jax.lax.fori_loop(0, self.steps, step, state)._replace(known=state.known + 1)

        return branch(good, teach, lambda state: state._replace(rejected=state.rejected + 1), state, bucket=8)


class Answer(NamedTuple):
    """What the stream form says of one row."""

    scores: Float[Array, " K"]
    """Minus the estimated losses: the greatest is the predicted class."""
    query: Bool[Array, ""]
    """The label is asked for, and paid for."""


class StreamState(NamedTuple):
    """The networks, the labels asked for, and the rows seen."""

    pair: PairState
    asked: Int[Array, ""]
    t: Int[Array, ""]


class NeurOnalS(Learner):
    """The stream form: predicts each row as it comes, and decides on the spot whether to pay for its label.

    A row's label is asked for if the margin between its two best classes is less than 2γβ_t, with
    β_t = √(KS²/t) + √(2 ln(3T/δ)/t), until the budget is spent. `step` learns from the target of an event only if it
    asks for it, so a stream of which all labels are known can be replayed; a label that comes later is given to `learn`
    with the row it belongs to. A row that is not finite is never asked about.

    Arguments:
        d: number of features; rows are best of unit norm.
        K: number of classes.
        budget: how many labels may be asked for; as many are held to learn from.
        horizon: T, the number of rows expected.
        gamma: γ, how wide a margin is still asked about.
        S: the bound S of the analysis.
        delta: δ, the probability with which the analysis may fail.
        pseudo: also learn, by one step, from the own prediction where no label is asked for, as the paper's algorithm
            does and its experiments do not.
        pair: the networks and how they learn; by default as `Pair` has them.

    Raises:
        ValueError: an argument is out of range, or `init` gets no key.
    """

    pair: Pair
    budget: int = eqx.field(static=True)
    horizon: int = eqx.field(static=True)
    gamma: Float[ArrayLike, ""]
    S: float = eqx.field(static=True)
    delta: float = eqx.field(static=True)
    pseudo: bool = eqx.field(static=True)

    def __init__(
        self,
        d: int,
        K: int,
        budget: int,
        horizon: int,
        gamma: Float[ArrayLike, ""],
        *,
        S: float = 1.0,
        delta: float = 0.1,
        pseudo: bool = False,
        pair: Pair | None = None,
    ):
        if budget < 0:
            raise ValueError(f"budget must not be negative, got {budget}")
        if horizon < 1:
            raise ValueError(f"horizon must be at least 1, got {horizon}")
        if not 0 < delta < 1:
            raise ValueError(f"delta must lie between 0 and 1, got {delta}")
        if S < 0:
            raise ValueError(f"S must not be negative, got {S}")
        pair = Pair(d, K, max(budget, 1)) if pair is None else pair
        if (pair.d, pair.K) != (d, K):
            raise ValueError(f"pair must have d={d} and K={K}, got d={pair.d} and K={pair.K}")
        self.pair, self.budget, self.horizon, self.gamma = pair, budget, horizon, gamma
        self.S, self.delta, self.pseudo = S, delta, pseudo

    def init(self, *, key: PRNGKeyArray | None = None) -> StreamState:
        if key is None:
            raise ValueError("the networks start at random: init needs a key")
        return StreamState(self.pair.init(key), jnp.int32(0), jnp.int32(0))

    def beta(self, t: Int[Array, ""]) -> Float[Array, ""]:
        """The width of the confidence interval at row t, counted from 1."""
        return (math.sqrt(self.pair.K) * self.S + math.sqrt(2 * math.log(3 * self.horizon / self.delta))) / jnp.sqrt(t)

    def predict(self, state: StreamState, x: Float[Array, " d"]) -> Answer:
        losses = self.pair.losses(state.pair, x)
        close = margin(losses) < 2 * self.gamma * self.beta(state.t + 1)
        return Answer(-losses, close & (state.asked < self.budget) & jnp.isfinite(x).all())

    def learn(self, state: StreamState, x: Float[Array, " d"], target: Int[Array, ""], weight: Any = 1.0):
        return state._replace(pair=self.pair.learn(state.pair, x, target, weight))

    def step(self, state: StreamState, x: Event) -> tuple[StreamState, Answer]:
        row, answer = jnp.asarray(x.x, float), self.predict(state, jnp.asarray(x.x, float))
        # A closed-over row would be copied to each lane of a batch; an operand is gathered.
        pair = branch(
            answer.query & x.target.valid,
            lambda pair, row, y, weight: self.pair.learn(pair, row, y, weight),
            lambda pair, row, y, weight: pair,
            *(state.pair, row, jnp.asarray(x.target.value, jnp.int32), jnp.asarray(x.weight, float)),
            bucket=8,
        )
        if self.pseudo:
            guess = jnp.argmax(answer.scores).astype(jnp.int32)
            own = self.pair.update(pair, row[None], guess[None], jnp.asarray(x.weight, float)[None])
            pair = select(answer.query | ~jnp.isfinite(row).all(), pair, own)
        return StreamState(pair, state.asked + answer.query, state.t + 1), answer


class PoolState(NamedTuple):
    """The networks, and the rounds so far."""

    pair: PairState
    t: Int[Array, ""]


class NeurOnalP(Policy):
    """The pool form: of B rows, one is drawn to be labelled, the likelier the smaller its margin.

    With w_i the margin of row i and ŵ the smallest, row i is drawn with probability ŵ / (Bŵ + γ(w_i - ŵ)), and the row
    of ŵ with what is left. `act` takes a pool f32[B, d]; its action is the row's index. The outcome is
    `Feedback(reward, info=label)`; the reward is not read.

    Arguments:
        pair: the networks and how they learn.
        gamma: γ, how much smaller margins are favoured.

    Raises:
        ValueError: γ is not positive, or `init` gets no key.
    """

    pair: Pair
    gamma: float = eqx.field(static=True)

    def __check_init__(self):
        if not self.gamma > 0:
            raise ValueError(f"gamma must be positive, got {self.gamma}")

    def init(self, *, key: PRNGKeyArray | None = None) -> PoolState:
        if key is None:
            raise ValueError("the networks start at random: init needs a key")
        return PoolState(self.pair.init(key), jnp.int32(0))

    def probabilities(self, state: PoolState, pool: Float[Array, "B d"]) -> Float[Array, " B"]:
        """With which each row is drawn; 0 for a row that is not finite, unless all are."""
        w = jax.vmap(lambda x: margin(self.pair.losses(state.pair, x)))(pool)
        w = jnp.where(jnp.isfinite(w), w, jnp.inf)
        best, least = jnp.argmin(w), jnp.min(w)
        beyond = jnp.where(w > least, w - least, 0.0)
        p = jnp.where(beyond > 0, least / (len(w) * least + self.gamma * beyond), 1 / len(w))
        p = p.at[best].set(0.0)
        return p.at[best].set(1 - p.sum())

    def act(self, state: PoolState, x: Float[Array, "B d"]) -> tuple[PoolState, Decision]:
        logp = jnp.log(self.probabilities(state, x))
        i = jax.random.categorical(noise(state.pair.key, state.t, "draw"), logp).astype(jnp.int32)
        return state._replace(t=state.t + 1), Decision(i, logp[i])

    def learn(self, state: PoolState, x: Float[Array, "B d"], decision: Decision, feedback: Feedback) -> PoolState:
        return state._replace(pair=self.pair.learn(state.pair, x[decision.action], feedback.info))


def example() -> tuple[NeurOnalS, Event]:
    """Small networks on 48 points of the unit circle in three classes."""
    angle = np.random.default_rng(0).uniform(0, 2 * np.pi, 48)
    x = np.stack([np.cos(angle), np.sin(angle)], 1).astype(np.float32)
    label = (angle / (2 * np.pi) * 3).astype(np.int32)
    # The gradient is looked at in the first steps. Adam's first step is a sign, which a difference cannot follow.
    valid = np.arange(48) >= 16
    cell = NeurOnalS(2, 3, budget=40, horizon=48, gamma=0.05, pair=Pair(2, 3, 12, m=8, batch=8, steps=2))
    return cell, Event(x, Maybe(label, valid), np.ones(48, np.float32))
