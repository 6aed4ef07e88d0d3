"""Stream Q(λ), Stream AC(λ) and Stream TD(λ): deep reinforcement learning from each transition once.

Elsayed, Vasan, Mahmood: Streaming Deep Reinforcement Learning Finally Works (arXiv 2410.14606, 2024).

No replay, no batch, no target network: one transition comes, one update is made, the transition is gone. Five things
together keep that stable, with the same numbers for every task: a sparse initialisation, layer normalisation,
observations normalised and rewards scaled by running statistics, and steps that are bounded so that they do not
overshoot their target; they are in `traced`. The stream is that of observations, actions and rewards; the state is all
parameters, their eligibility traces of the same shapes, the statistics, the clock of the episode and a counter. Nothing
is trained beforehand, and nothing is approximated; the image networks of the Atari experiments are not here.

As in the authors' program, a time limit counts as an end unless `bootstrap_truncated`, and the clock shows the same
time at the reset and after the first step: -1/2 + max(t - 1, 0) / limit.

An observation that is not finite is replaced by the mean so far, entry by entry, and is kept out of the statistics. A
transition with such an observation or reward, or whose update would not be finite, changes no weights: the traces are
cut, and `state.senses.skipped` counts it.

    >>> from anabranch.decide.classic import CartPole, EpisodeReturn
    >>> from anabranch.drive import play
    >>> agent = StreamQ(CartPole.dim, CartPole.n_actions, limit=500, explore=1000)
    >>> meters = {"return": EpisodeReturn(start=15_000)}
    >>> run = play(agent, CartPole(), 20_000, key=jax.random.PRNGKey(0), meters=meters, keep=False)
    >>> float(run.scores["return"]) > 100
    True
"""

import math
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.stats import norm
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from anabranch.cell import Decision, Feedback, Learner, Maybe, Policy, noise, select
from anabranch.decide.traced import Net, ObGD, Returns, Traced, Welford, descend, normalise, traced


class Senses(NamedTuple):
    """What an agent knows of its inputs."""

    seen: Welford
    returns: Returns
    clock: Int[Array, ""]
    """Steps since the episode began."""
    x: Float[Array, " m"]
    """The observation of now as the network sees it."""
    fresh: Bool[Array, ""]
    """Whether the observation of now is still to come, because no feedback has brought it."""
    skipped: Int[Array, ""]
    """Transitions that were not learned from, because something was not finite."""


class Transition(NamedTuple):
    """One step as the networks see it."""

    x: Float[Array, " m"]
    reward: Float[Array, ""]
    next_x: Float[Array, " m"]
    discount: Float[Array, ""]
    """γ, or 0 where nothing follows."""
    stop: Bool[Array, ""]
    ok: Bool[Array, ""]
    """Whether all of it is finite."""


def _td_error(v: Net, step: Transition) -> Float[Array, ""]:
    return step.reward + step.discount * v(step.next_x)[0] - v(step.x)[0]


# The agents


class _Agent(Policy):
    """What the two agents share: their inputs and their networks.

    Raises:
        ValueError: if a size is not positive, or γ, λ or the sparsity is out of its range.
    """

    smooth: ClassVar[bool] = False

    dim: int = eqx.field(static=True)
    """The length of an observation."""
    n_actions: int = eqx.field(static=True)
    hidden: int = eqx.field(default=32, static=True, kw_only=True)
    """Units in each of the two hidden layers."""
    limit: int | None = eqx.field(default=None, static=True, kw_only=True)
    """Steps after which an episode is cut: the network is then told the time. None: it is not."""
    gamma: Float[Array, ""] | float = eqx.field(default=0.99, kw_only=True)
    lam: Float[Array, ""] | float = eqx.field(default=0.8, kw_only=True)
    sparsity: float = eqx.field(default=0.9, kw_only=True)
    layernorm: bool = eqx.field(default=True, static=True, kw_only=True)
    normalised: bool = eqx.field(default=True, static=True, kw_only=True)
    """Whether observations are normalised and rewards scaled."""
    bootstrap_truncated: bool = eqx.field(default=False, static=True, kw_only=True)
    """Whether a cut by a time limit is told from an end: needs `feedback.info["last_x"]` of a world that resets."""

    def __check_init__(self):
        _positive(self, "dim", "n_actions", "hidden", "limit")
        _within(self, "gamma", "lam", "sparsity")

    def net(self, outputs: int, key: PRNGKeyArray) -> Net:
        inputs = self.dim + (self.limit is not None)
        return Net((inputs, self.hidden, self.hidden, outputs), self.sparsity, self.layernorm, key=key)

    def senses(self) -> Senses:
        """Before anything is seen."""
        zero, x = jnp.zeros((), jnp.int32), jnp.zeros(self.dim + (self.limit is not None))
        return Senses(Welford.zeros(self.dim), Returns.zeros(), zero, x, jnp.ones((), bool), zero)

    def look(self, seen: Welford, x: Float[Array, " d"], clock: Int[Array, ""]) -> tuple[Welford, Float[Array, " m"]]:
        """An observation as the network sees it, and the statistics with it."""
        x = jnp.asarray(x, jnp.float32)
        if x.shape != (self.dim,):
            raise ValueError(f"dim is {self.dim}, so an observation must have shape ({self.dim},), got {x.shape}")
        seen, scaled = normalise(seen, x)
        x = scaled if self.normalised else jnp.where(jnp.isfinite(x), x, 0.0)
        if self.limit is None:
            return seen, x
        return seen, jnp.append(x, jnp.maximum(clock - 1, 0) / self.limit - 0.5)

    def attend(self, senses: Senses, x: Float[Array, " d"]) -> Senses:
        """Before a decision: the observation counts now, unless the last feedback brought it."""
        seen, x = self.look(senses.seen, x, senses.clock)
        new = senses._replace(seen=seen, x=x)
        return select(senses.fresh, new, senses)._replace(fresh=jnp.ones((), bool))

    def perceive(self, senses: Senses, x: Float[Array, " m"], feedback: Feedback) -> tuple[Senses, Transition]:
        """A feedback as the networks see it, given what they saw at the decision; and the senses after it.

        Each observation counts in the statistics once: at an end, the last one and the first of the next episode.
        """
        terminal, truncated = jnp.asarray(feedback.terminal, bool), jnp.asarray(feedback.truncated, bool)
        stop = terminal | truncated
        info = feedback.info if isinstance(feedback.info, dict) else {}
        if self.bootstrap_truncated and "last_x" not in info:
            raise ValueError('bootstrap_truncated needs info["last_x"], got a feedback without it')
        last = jnp.asarray(info.get("last_x", feedback.x), jnp.float32)
        reward = jnp.asarray(feedback.reward, jnp.float32)
        returns, scaled = senses.returns.add(reward, self.gamma * (1 - stop))
        clock = senses.clock + 1
        seen, next_x = self.look(senses.seen, last, clock)
        clock = jnp.where(stop, 0, clock)
        if "last_x" in info:
            begun, first = self.look(seen, feedback.x, clock)
            seen, now = select(stop, begun, seen), jnp.where(stop, first, next_x)
        else:
            now = next_x if self.limit is None else next_x.at[-1].set(jnp.where(stop, -0.5, next_x[-1]))
        step = Transition(
            x,
            scaled if self.normalised else jnp.where(jnp.isfinite(reward), reward, 0.0),
            next_x,
            self.gamma * (1.0 - (terminal if self.bootstrap_truncated else stop)),
            stop,
            jnp.isfinite(reward) & jnp.isfinite(last).all(),
        )
        return Senses(seen, returns, clock, now, jnp.zeros((), bool), senses.skipped), step

    def after(self, senses: Senses, ok: Bool[Array, ""]) -> Senses:
        """The senses after an update that was made, or not."""
        return senses._replace(skipped=senses.skipped + ~ok)


def _positive(cell: Any, *names: str) -> None:
    for name in names:
        if (value := getattr(cell, name)) is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def _within(cell: Any, *names: str) -> None:
    for name in names:
        value = getattr(cell, name)
        if isinstance(value, (int, float)) and not 0 <= value <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {value}")


class QState(NamedTuple):
    """A `StreamQ` on its way."""

    q: Traced
    senses: Senses
    t: Int[Array, ""]
    """Decisions so far."""
    key: PRNGKeyArray


class GreedyAux(NamedTuple):
    """What `StreamQ` wants to know again when it learns."""

    x: Float[Array, " m"]
    greedy: Bool[Array, ""]


class StreamQ(_Agent):
    """Stream Q(λ): Watkins' Q(λ) with a network of one output an action, ε-greedy.

    δ = r + γ max Q(x′) - Q(x, a), g = ∇Q(x, a). ε falls linearly from 1 to `epsilon` over the first `explore`
    decisions. The trace is cut after an update for an action that was not greedy. Actions are int32 numbers from 0 to
    `n_actions` - 1; `decision.logp` is their log-probability.
    """

    rule: ObGD = ObGD(2.0)
    explore: int = eqx.field(default=5_000, kw_only=True)
    epsilon: float = eqx.field(default=0.01, kw_only=True)

    def __check_init__(self):
        _positive(self, "explore")
        _within(self, "epsilon")

    def init(self, *, key=None) -> QState:
        key = jax.random.PRNGKey(0) if key is None else key
        net = self.net(self.n_actions, noise(key, 0, "q"))
        return QState(traced(net, self.rule), self.senses(), jnp.zeros((), jnp.int32), key)

    def act(self, state: QState, x: Float[Array, " d"]) -> tuple[QState, Decision]:
        senses, t = self.attend(state.senses, x), state.t + 1
        best = jnp.argmax(state.q.net(senses.x)).astype(jnp.int32)
        epsilon = jnp.maximum(1 + (self.epsilon - 1) * t / self.explore, self.epsilon)
        coin, other = jax.random.uniform(noise(state.key, t, "act"), (2,))
        action = jnp.where(coin < epsilon, jnp.floor(other * self.n_actions).astype(jnp.int32), best)
        greedy = action == best
        logp = jnp.log(epsilon / self.n_actions + (1 - epsilon) * greedy)
        return QState(state.q, senses, t, state.key), Decision(action, logp, GreedyAux(senses.x, greedy))

    def delta(self, net: Net, step: Transition, action: Int[Array, ""]) -> Float[Array, ""]:
        """The temporal-difference error of one step."""
        return step.reward + step.discount * net(step.next_x).max() - net(step.x)[action]

    def learn(self, state: QState, x: Float[Array, " d"], decision: Decision, feedback: Feedback) -> QState:
        senses, step = self.perceive(state.senses, decision.aux.x, feedback)
        action = jnp.asarray(decision.action)
        gradient = jax.grad(lambda net: net(step.x)[action])(state.q.net)
        delta = self.delta(state.q.net, step, action)
        cut = step.stop | ~decision.aux.greedy
        q, ok = descend(self.rule, state.q, gradient, delta, self.gamma * self.lam, step.ok, cut)
        return state._replace(q=q, senses=self.after(senses, ok))


class ACState(NamedTuple):
    """A `StreamAC` on its way."""

    critic: Traced
    actor: Traced
    senses: Senses
    t: Int[Array, ""]
    """Decisions so far."""
    key: PRNGKeyArray


class DrawnAux(NamedTuple):
    """What `StreamAC` wants to know again when it learns."""

    x: Float[Array, " m"]
    drawn: Array
    """The action before it was clipped."""


class StreamAC(_Agent):
    """Stream AC(λ): an actor and a critic of their own networks, which follow the same δ.

    δ = r + γ V(x′) - V(x); the critic's g = ∇V(x), the actor's g = ∇[log π(a | x) + τ sign(δ) H(π(· | x))], with τ the
    weight of the `entropy`. Without a `box` actions are int32 numbers, from a softmax. With a box (low, high), numbers
    or vectors (n_actions,), they are vectors from N(μ, softplus(s)²), clipped after they are drawn; `decision.logp` is
    the log-density of what was drawn.

    Raises:
        ValueError: if the box is empty, besides what is wrong with any agent.
    """

    hidden: int = eqx.field(default=128, static=True, kw_only=True)
    box: tuple[Any, Any] | None = eqx.field(default=None, kw_only=True)
    entropy: float = eqx.field(default=0.01, kw_only=True)
    critic: ObGD = eqx.field(default=ObGD(2.0), kw_only=True)
    actor: ObGD = eqx.field(default=ObGD(3.0), kw_only=True)

    def __check_init__(self):
        if self.box is not None and np.any(np.asarray(self.box[0]) >= np.asarray(self.box[1])):
            raise ValueError(f"box must be (low, high) with low < high, got {self.box}")

    def init(self, *, key=None) -> ACState:
        key = jax.random.PRNGKey(0) if key is None else key
        critic = traced(self.net(1, noise(key, 0, "critic")), self.critic)
        outputs = self.n_actions if self.box is None else 2 * self.n_actions  # the heads of μ and s
        actor = traced(self.net(outputs, noise(key, 0, "actor")), self.actor)
        return ACState(critic, actor, self.senses(), jnp.zeros((), jnp.int32), key)

    def gaussian(self, actor: Net, x: Float[Array, " m"]) -> tuple[Float[Array, " a"], Float[Array, " a"]]:
        """Mean and standard deviation of each number of a continuous action."""
        mean, spread = jnp.split(actor(x), 2)
        return mean, jax.nn.softplus(spread)

    def logp(self, actor: Net, x: Float[Array, " m"], drawn: Array) -> Float[Array, ""]:
        """The log-probability of an action."""
        if self.box is None:
            return jax.nn.log_softmax(actor(x))[drawn]
        return norm.logpdf(drawn, *self.gaussian(actor, x)).sum()

    def spread(self, actor: Net, x: Float[Array, " m"]) -> Float[Array, ""]:
        """The entropy of the policy."""
        if self.box is None:
            logp = jax.nn.log_softmax(actor(x))
            return -(jnp.exp(logp) * logp).sum()
        return (0.5 + 0.5 * math.log(2 * math.pi) + jnp.log(self.gaussian(actor, x)[1])).sum()

    def act(self, state: ACState, x: Float[Array, " d"]) -> tuple[ACState, Decision]:
        senses, t = self.attend(state.senses, x), state.t + 1
        actor, key = state.actor.net, noise(state.key, t, "act")
        if self.box is None:
            action = drawn = jax.random.categorical(key, actor(senses.x)).astype(jnp.int32)
        else:
            mean, std = self.gaussian(actor, senses.x)
            drawn = mean + std * jax.random.normal(key, mean.shape)
            action = jnp.clip(drawn, *self.box)
        logp = self.logp(actor, senses.x, drawn)
        return state._replace(senses=senses, t=t), Decision(action, logp, DrawnAux(senses.x, drawn))

    def learn(self, state: ACState, x: Float[Array, " d"], decision: Decision, feedback: Feedback) -> ACState:
        senses, step = self.perceive(state.senses, decision.aux.x, feedback)
        delta = _td_error(state.critic.net, step)

        def taken(actor):
            # δ multiplies the trace later: with its sign here, the entropy grows whatever δ is.
            bonus = self.entropy * jnp.sign(delta) * self.spread(actor, step.x)
            return self.logp(actor, step.x, decision.aux.drawn) + bonus

        decay = self.gamma * self.lam
        gradient = jax.grad(lambda net: net(step.x)[0])(state.critic.net)
        critic, well = descend(self.critic, state.critic, gradient, delta, decay, step.ok, step.stop)
        gradient = jax.grad(taken)(state.actor.net)
        actor, ok = descend(self.actor, state.actor, gradient, delta, decay, step.ok, step.stop)
        return state._replace(critic=critic, actor=actor, senses=self.after(senses, ok & well))


class TDState(NamedTuple):
    """A `StreamTD` on its way."""

    v: Traced
    seen: Welford
    returns: Returns
    mean: Float[Array, " d"]
    """The fading mean of the inputs, not yet corrected for its start at 0."""
    x: Float[Array, " d"]
    """The last input as the network sees it."""
    n: Int[Array, ""]
    """Inputs so far."""
    skipped: Int[Array, ""]


class StreamTD(Learner):
    """Stream TD(λ): what a discounted sum of a signal will be, learned as the signal comes, on a stream without end.

    Event t is an input x (d,) and the cumulant c that came with it. The answer for x_t is an estimate of
    c_{t+1} + γ c_{t+2} + γ² c_{t+3} + …, in the units of c. The network sees fading means of the inputs, of decay
    `beta`, corrected for their start and normalised; with `beta` = 0, the inputs as they are. An event of weight w
    counts as an error of w δ.

    Raises:
        ValueError: if a size is not positive, or γ, λ, β or the sparsity is out of its range.
    """

    dim: int = eqx.field(static=True)
    rule: ObGD = ObGD(2.0)
    hidden: int = eqx.field(default=128, static=True, kw_only=True)
    gamma: Float[Array, ""] | float = eqx.field(default=0.99, kw_only=True)
    lam: Float[Array, ""] | float = eqx.field(default=0.8, kw_only=True)
    beta: float = eqx.field(default=0.999, kw_only=True)
    sparsity: float = eqx.field(default=0.9, kw_only=True)
    layernorm: bool = eqx.field(default=True, static=True, kw_only=True)

    def __check_init__(self):
        _positive(self, "dim", "hidden")
        _within(self, "gamma", "lam", "beta", "sparsity")

    def init(self, *, key=None) -> TDState:
        key = jax.random.PRNGKey(0) if key is None else key
        net = Net((self.dim, self.hidden, self.hidden, 1), self.sparsity, self.layernorm, key=key)
        zero, x = jnp.zeros((), jnp.int32), jnp.zeros(self.dim)
        return TDState(traced(net, self.rule), Welford.zeros(self.dim), Returns.zeros(), x, x, zero, zero)

    def sense(self, state: TDState, x: Float[Array, " d"]) -> TDState:
        """The state after an input, before anything is learned from it."""
        x = jnp.asarray(x, jnp.float32)
        if x.shape != (self.dim,):
            raise ValueError(f"dim is {self.dim}, so an input must have shape ({self.dim},), got {x.shape}")
        n = state.n + 1
        faded = self.beta * state.mean + (1 - self.beta) * x
        # Where an input is not finite, the mean before it stays; `normalise` counts no such input.
        seen, scaled = normalise(state.seen, faded / -jnp.expm1(n * jnp.log(self.beta)))
        finite = jnp.isfinite(x).all()
        return state._replace(
            seen=seen, mean=jnp.where(finite, faded, state.mean), x=scaled, n=jnp.where(finite, n, state.n)
        )

    def predict(self, state: TDState, x: Float[Array, " d"]) -> Float[Array, ""]:
        return state.v.net(self.sense(state, x).x)[0] * state.returns.stats.scale

    def learn(
        self, state: TDState, x: Float[Array, " d"], target: Float[Array, ""], weight: Float[ArrayLike, ""] = 1.0
    ) -> TDState:
        new = self.sense(state, x)
        cumulant = jnp.asarray(target, jnp.float32)
        returns, reward = state.returns.add(cumulant, self.gamma)
        ok = jnp.isfinite(cumulant) & jnp.isfinite(x).all()
        step = Transition(state.x, reward, new.x, jnp.asarray(self.gamma), jnp.zeros((), bool), ok)
        gradient = jax.grad(lambda net: net(step.x)[0])(state.v.net)
        delta = jnp.asarray(weight) * _td_error(state.v.net, step)
        begun = state.n > 0  # the first input has none before it
        v, made = descend(self.rule, state.v, gradient, delta, self.gamma * self.lam, ok & begun, step.stop)
        return new._replace(v=v, returns=returns, skipped=state.skipped + (begun & ~made))


def example() -> tuple[StreamQ, PyTree]:
    """A small agent, and 64 steps of CartPole that it was told of one step later."""
    from anabranch.decide.classic import CartPole
    from anabranch.drive import play

    agent = StreamQ(CartPole.dim, CartPole.n_actions, hidden=8, sparsity=0.5, limit=500, explore=20)
    ticks = play(agent, CartPole(), 64, key=jax.random.PRNGKey(0)).ticks
    before = jax.tree.map(lambda leaf: jnp.roll(leaf, 1, axis=0), ticks)
    return agent, (ticks.x, Maybe(tuple(before), jnp.arange(64) > 0))  # pyright: ignore
