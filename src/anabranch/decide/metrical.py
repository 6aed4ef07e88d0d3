"""Metrical task systems, as seen by whoever follows predictors: costs, optimal sequences, couplings.

A cost c_t over states is revealed at each step; then one moves from s_{t-1} to s_t and pays c_t(s_t) + d(s_{t-1}, s_t).
Each of ℓ predictors suggests a state s_t^i. Policies never see the states, only what they cost: `MTS` holds c_t(s_t^j)
and d(s_{t-1}^i, s_t^j) for all predictors i, j. The second is what it costs to follow j at t after i at t - 1; on the
diagonal it is what predictor i pays itself.

    >>> move = jnp.array([[[0.0, 1.0]] * 2, [[2.0, 1.0], [0.0, 3.0]]])  # where 1 goes first, 0 goes next
    >>> env = MTS(jnp.zeros((2, 2)), move)
    >>> dynamic_optimum(env, switches=0).item(), dynamic_optimum(env, switches=1).item()
    (2.0, 1.0)
"""

from typing import Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from anabranch.cell import Cell, Env, Feedback

TINY = 1e-30


class Move(NamedTuple):
    """An action: whom to be with after this step, and whom to ask. They differ when a step is given to exploring."""

    to: Int[Array, ""]
    query: Int[Array, ""]


class Costs(NamedTuple):
    """What is known before moving."""

    service: Float[Array, " l"]
    """c_t(s_t^j)."""
    move: Float[Array, "l l"]
    """d(s_{t-1}^i, s_t^j), from row i to column j."""

    @property
    def following(self) -> Float[Array, " l"]:
        """What each predictor pays itself."""
        return self.service + jnp.diagonal(self.move)


class MTSState(NamedTuple):
    """The next step, and the predictor whose state we are in."""

    t: Int[Array, ""]
    at: Int[Array, ""]


class MTS(Env):
    """A metrical task system as seen through its predictors. The action is a `Move`, the reward minus what was paid.

    All start in one state: the rows of `move[0]` are equal. After the last step comes the first again.

    With `reveal="full"` the observation is `Costs`. With `"bandit"` it is empty, and one predictor may be asked a step.
    A step in which another one is asked than followed is served without knowing where to go: from s_{t-1}^i to the
    best state for c_t and back, for `astray[t, i]` = min_s c_t(s) + 2 d(s_{t-1}^i, s); what is then paid is, by the
    triangle inequality, never less than what moving on from there would cost. In both cases `feedback.info` is what the
    predictor asked has paid itself.

    Raises:
        ValueError: shapes that do not fit, costs that are negative or NaN, or `reveal` is unknown.
    """

    service: Float[Array, "t l"]
    move: Float[Array, "t l l"]
    astray: Float[Array, "t l"]
    """Infinite if not given: exploring is then not possible."""
    reveal: Literal["full", "bandit"] = eqx.field(static=True)

    def __init__(self, service, move, astray=None, reveal: Literal["full", "bandit"] = "full"):
        given = {"service": np.asarray(service, np.float32), "move": np.asarray(move, np.float32)}
        size = given["service"].shape
        given["astray"] = np.full(size, np.inf) if astray is None else np.asarray(astray, np.float32)
        if len(size) != 2:
            raise ValueError(f"service must be (steps, predictors), got shape {size}")
        for name, shape in (("service", size), ("move", size + size[1:]), ("astray", size)):
            if given[name].shape != shape:
                raise ValueError(f"{name} must have shape {shape} as service asks, got {given[name].shape}")
            if not given[name].min() >= 0:
                raise ValueError(f"{name} must not be negative or NaN, its smallest value is {given[name].min()}")
        if reveal not in ("full", "bandit"):
            raise ValueError(f'reveal must be "full" or "bandit", got {reveal!r}')
        self.service, self.move, self.astray = (jnp.asarray(values, jnp.float32) for values in given.values())
        self.reveal = reveal

    @property
    def steps(self) -> int:
        return self.service.shape[0]

    def asked(self) -> "MTS":
        """The same system where one predictor may be asked a step."""
        return MTS(self.service, self.move, self.astray, "bandit")

    def init(self, *, key=None):
        return MTSState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))

    def costs(self, t: Int[Array, ""]) -> Costs:
        return Costs(self.service[t], self.move[t])

    def observe(self, state):
        return self.costs(state.t) if self.reveal == "full" else ()

    def step(self, state, x: Move):
        costs, last = self.costs(state.t), state.t == self.steps - 1
        served = jnp.where(x.to == x.query, costs.service[x.to], self.astray[state.t, state.at])
        paid = costs.move[state.at, x.to] + served
        new = MTSState(jnp.where(last, 0, state.t + 1), x.to)
        return new, Feedback(-paid, x=self.observe(new), truncated=last, info=costs.following[x.query])


class Work(Cell):
    """The work function: the cheapest way (switches + 1, ℓ) to be with predictor j having switched at most so often.

    With `switches=None` any number is allowed, and the state has one row.
    """

    n: int = eqx.field(static=True)
    switches: int | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        if self.switches is not None and self.switches < 0:
            raise ValueError(f"switches must not be negative, got {self.switches}")

    def init(self, *, key=None):
        return jnp.zeros((1 if self.switches is None else self.switches + 1, self.n))

    def step(self, state, x: Costs):
        switched = (state[:, :, None] + x.move).min(1)
        if self.switches is not None:
            stayed = state + jnp.diagonal(x.move)
            switched = jnp.concatenate([stayed[:1], jnp.minimum(stayed[1:], switched[:-1])])
        state = switched + x.service
        return state, state.min()


@eqx.filter_jit
def dynamic_optimum(env: MTS, switches: int | None = None) -> Float[Array, ""]:
    """The cost of DYN_m, the best sequence of predictors with at most `switches` changes; DYN without a limit.

    Exact dynamic programme, O(T ℓ² m). Sums are float32.
    """
    work = Work(env.service.shape[1], switches)
    return jax.lax.scan(work.step, work.init(), Costs(env.service, env.move))[0].min()


class Competitive(Cell):
    """Meter: what was paid so far, over the cost of DYN_m for the steps so far."""

    env: MTS
    switches: int | None = eqx.field(static=True, default=None)

    @property
    def work(self) -> Work:
        return Work(self.env.service.shape[1], self.switches)

    def init(self, *, key=None):
        return self.work.init(), jnp.zeros(())

    def step(self, state, x):
        tick, world = x
        state = self.work.step(state[0], self.env.costs(world.t))[0], state[1] - tick.feedback.reward
        return state, self.value(state)

    def value(self, state) -> Float[Array, ""]:
        return state[1] / jnp.maximum(state[0].min(), TINY)


def couple(old: Float[Array, " l"], new: Float[Array, " l"], i: Int[Array, ""], key: PRNGKeyArray) -> Int[Array, ""]:
    """A draw from `new` that is `i`, itself drawn from `old`, as often as can be: they differ with the probability
    ½ Σ |new - old|."""
    stay, draw = jax.random.split(key)
    other = jax.random.categorical(draw, jnp.log(jnp.maximum(new - old, TINY)))
    return jnp.where(jax.random.uniform(stay) * old[i] < new[i], i, other).astype(jnp.int32)


def transport(a: Float[Array, " l"], b: Float[Array, " l"], cost: Float[Array, "l l"]) -> Float[Array, "l l"]:
    """The plan (ℓ, ℓ) of least cost with row sums `a` and column sums `b`, two distributions; `cost` must be finite.

    Exact, by successive shortest paths in the residual network.
    """
    n = a.shape[0]
    gain = 1e-6 * jnp.max(cost)  # a shorter path must be shorter by more than rounding

    def paths(plan, left):
        """The distance of each sink from what is left, and where the path comes from."""

        def relax(_, carry):
            source, sink, into_source, into_sink = carry
            forth = source[:, None] + cost
            shorter = forth.min(0) < sink - gain
            sink, into_sink = jnp.where(shorter, forth.min(0), sink), jnp.where(shorter, forth.argmin(0), into_sink)
            back = jnp.where(plan > 0, sink - cost, jnp.inf)
            shorter = back.min(1) < source - gain
            source = jnp.where(shorter, back.min(1), source)
            return source, sink, jnp.where(shorter, back.argmin(1), into_source), into_sink

        far, nobody = jnp.full(n, jnp.inf), jnp.full(n, -1)
        _, sink, *into = jax.lax.fori_loop(0, n, relax, (jnp.where(left > 0, 0.0, jnp.inf), far, nobody, nobody))
        return sink, *into

    def augment(carry):
        rounds, plan, left, need = carry
        distance, into_source, into_sink = paths(plan, left)
        end = jnp.argmin(jnp.where(need > 0, distance, jnp.inf))

        def trace(carry):
            flow, i = carry  # source i is on the path, and not its start
            j = into_source[i]
            flow = flow.at[i, j].add(-1.0)
            return flow.at[into_sink[j], j].add(1.0), into_sink[j]

        first = into_sink[end]
        flow = jnp.zeros((n, n)).at[first, end].add(1.0)
        flow, start = jax.lax.while_loop(lambda c: into_source[c[1]] >= 0, trace, (flow, first))
        amount = jnp.minimum(jnp.minimum(left[start], need[end]), jnp.where(flow < 0, plan, jnp.inf).min())
        return rounds + 1, plan + amount * flow, left.at[start].add(-amount), need.at[end].add(-amount)

    def unfinished(carry):
        rounds, _, left, need = carry
        return (jnp.minimum(left.sum(), need.sum()) > 1e-6) & (rounds < 8 * n)

    return jax.lax.while_loop(unfinished, augment, (0, jnp.zeros((n, n)), a / a.sum(), b / b.sum()))[1]
