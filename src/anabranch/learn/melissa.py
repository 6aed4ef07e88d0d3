"""Meyer, Schouler, Caulk, et al.: High Throughput Training of Deep Surrogates from Large Ensemble Runs.

arXiv 2309.16743, SC 2023.

Many runs of a solver stream their time steps into a bounded buffer, from which a network trains without waiting. The
buffer is what the paper is about: a stream of time steps is neither independent nor in time for the trainer, and the
`TrainingReservoir` mends both. It repeats samples that have been seen, and gives up none that has not.

Stream and state: the solvers, the buffer and the network are one cell, `SurrogateTrainer`; one step is the time in
which a batch can be trained, and production is so many samples a step. `melissa_server` has the same on processes.

The rules of the buffers follow the paper as generally described, not its code. The heat equation is solved on tens of
points a side, not on thousands.
"""

import math
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from anabranch.branch import branch
from anabranch.cell import Cell, Maybe, State, noise
from anabranch.fit import Backprop
from anabranch.learn.base import Sgd


class Traffic(NamedTuple):
    """What a buffer is asked in one step: to take a sample, if there is one, and to give a batch, if one is wanted."""

    sample: Maybe[PyTree]
    want: Bool[Array, ""] | bool
    over: Bool[Array, ""] | bool = False
    """Nothing more will come."""


class Batch(NamedTuple):
    """B samples, stacked, and which of them are there: none if the buffer did not give, fewer than B at the end."""

    samples: PyTree
    valid: Bool[Array, " B"]


class BufferState(NamedTuple):
    """The samples, stacked on an axis of length c, and for each slot its sample's number and use."""

    samples: PyTree
    held: Bool[Array, " c"]
    number: Int[Array, " c"]
    uses: Int[Array, " c"]
    puts: Int[Array, ""]
    """Samples taken in."""
    gets: Int[Array, ""]
    """Batches given."""
    fresh: Int[Array, ""]
    """Samples that were given at least once."""
    blocked: Int[Array, ""]
    """Times a producer was made to wait."""
    rejected: Int[Array, ""]
    """Samples that were not finite: taken from the producer, and not held."""
    key: PRNGKeyArray


class Fifo(Cell):
    """A buffer that gives its samples in the order of their arrival, each once.

    Arguments:
        sample: one sample, or its shapes.
        capacity: c, how many samples are held.
        threshold: batches are given while more samples than this are held, or nothing more will come.
        batch: B, samples in a batch.

    Raises:
        ValueError: the capacity does not exceed threshold + batch: producer and trainer would wait for each other.
    """

    sample: PyTree
    capacity: int = eqx.field(static=True)
    threshold: int = eqx.field(static=True, default=0)
    batch: int = eqx.field(static=True, default=10)

    repeats: ClassVar[bool] = False
    """Samples stay when they have been given, as long as their slot is not needed and more will come."""

    def __check_init__(self):
        if self.batch < 1 or self.threshold < 0:
            raise ValueError(f"batch must be positive and threshold not negative, got {self.batch}, {self.threshold}")
        if self.capacity <= self.threshold + self.batch:
            raise ValueError(
                f"capacity must exceed threshold + batch = {self.threshold + self.batch}, got {self.capacity}"
            )

    def init(self, *, key: PRNGKeyArray | None = None) -> BufferState:
        key, c, zero = jax.random.PRNGKey(0) if key is None else key, self.capacity, jnp.int32(0)
        samples = jax.tree.map(lambda leaf: jnp.zeros((c, *leaf.shape), leaf.dtype), self.sample)
        number = jnp.zeros(c, jnp.int32)
        return BufferState(samples, jnp.zeros(c, bool), number, number, zero, zero, zero, zero, zero, key)

    def rank(self, state: BufferState) -> Float[Array, " c"]:
        """The samples with the greatest values are given first."""
        return (state.puts - state.number).astype(float)

    def put(self, state: BufferState, sample: PyTree, valid: Any = True) -> tuple[BufferState, Bool[Array, ""]]:
        """Take a sample in, if there is room; if not, the producer must offer it again."""
        seen = state.held & (state.uses > 0)
        old = jax.random.uniform(noise(state.key, state.puts, "evict"), (self.capacity,))
        empty = ~state.held
        # An empty slot if there is one, else one whose sample has been seen: never one that has not.
        free = empty | seen if self.repeats else empty
        room = free.any()
        finite = jnp.array([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(sample)]).all()
        takes = valid & room & finite
        slot = jnp.where(takes, jnp.argmax(jnp.where(empty, 2.0, jnp.where(free, old, -1.0))), self.capacity)
        return state._replace(
            # Out of bounds is nowhere: the samples are written in place, and not copied.
            samples=jax.tree.map(lambda a, s: a.at[slot].set(s, mode="drop"), state.samples, sample),
            held=state.held.at[slot].set(True, mode="drop"),
            number=state.number.at[slot].set(state.puts, mode="drop"),
            uses=state.uses.at[slot].set(0, mode="drop"),
            puts=state.puts + takes,
            blocked=state.blocked + (valid & ~room & finite),
            rejected=state.rejected + (valid & ~finite),
        ), valid & (room | ~finite)

    def get(self, state: BufferState, want: Any = True, over: Any = False) -> tuple[BufferState, Batch]:
        """A batch of distinct samples, if enough are held."""
        population = state.held.sum()
        gives = want & jnp.where(over, population > 0, population >= max(self.threshold + 1, self.batch))
        order, slots = jax.lax.top_k(jnp.where(state.held, self.rank(state), -jnp.inf), self.batch)
        valid = gives & (order > -jnp.inf)
        drawn = jnp.where(valid, slots, self.capacity)
        leaves = valid & over if self.repeats else valid
        first = (valid & (state.uses[slots] == 0)).sum()
        batch = jax.tree.map(lambda leaf: leaf[slots], state.samples)
        return state._replace(
            uses=state.uses.at[drawn].add(1, mode="drop"),
            held=state.held.at[jnp.where(leaves, slots, self.capacity)].set(False, mode="drop"),
            gets=state.gets + gives,
            fresh=state.fresh + first,
        ), Batch(batch, valid)

    def step(self, state: BufferState, x: Traffic) -> tuple[BufferState, tuple[Bool[Array, ""], Batch]]:
        """Put, then get: whether the sample was accepted, and the batch."""
        state, accepted = self.put(state, x.sample.value, x.sample.valid)
        state, batch = self.get(state, x.want, x.over)
        return state, (accepted, batch)


class Firo(Fifo):
    """A buffer that gives its samples in random order, each once."""

    def rank(self, state: BufferState) -> Float[Array, " c"]:
        return jax.random.uniform(noise(state.key, state.gets, "draw"), (self.capacity,))


class TrainingReservoir(Firo):
    """A buffer that gives any samples it holds, again and again, and gives up only what has been seen.

    A new sample takes an empty slot or that of a seen sample, drawn at random; if all are unseen, the producer waits.
    When nothing more will come, samples leave as they are given. This is no reservoir sampling: no sample is refused.
    """

    repeats: ClassVar[bool] = True


class HeatState(NamedTuple):
    """Temperatures in [0, 1], parameters, number and time step of each member."""

    u: Float[Array, "K n n"]
    parameters: Float[Array, "K 5"]
    member: Int[Array, " K"]
    t: Int[Array, " K"]
    key: PRNGKeyArray


class HeatEnsemble(Cell):
    """K solvers of the heat equation on the unit square at once; one that ends makes room for the next.

    Parameters are the initial temperature and those of the left, right, lower and upper boundary, uniform in
    [100, 500] K, which is [0, 1] here. Implicit Euler with steps of 0.01 s and a diffusivity of 1 m²/s, solved exactly
    in the sine basis. A step takes nothing and gives `(x f32[K, 6], u f32[K, n²])`: the parameters with t / steps, and
    the field.

    Arguments:
        grid: n, inner points a side.
        steps: time steps of a member.
        members: K.
    """

    grid: int = eqx.field(static=True, default=32)
    steps: int = eqx.field(static=True, default=100)
    members: int = eqx.field(static=True, default=8)

    def __check_init__(self):
        for name in ("grid", "steps", "members"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")

    def init(self, *, key: PRNGKeyArray | None = None) -> HeatState:
        return self.begin(jnp.arange(self.members), jax.random.PRNGKey(0) if key is None else key)

    def begin(self, member: Int[Array, " K"], key: PRNGKeyArray) -> HeatState:
        """The state before the first step of K members; what a member is depends on its number and the key alone."""
        parameters = jax.vmap(lambda i: jax.random.uniform(noise(key, i, "parameters"), (5,)))(member)
        u = jnp.broadcast_to(parameters[:, :1, None], (len(member), self.grid, self.grid))
        return HeatState(u, parameters, member, jnp.zeros(len(member), jnp.int32), key)

    def solve(self, u: Float[Array, "n n"], parameters: Float[Array, " 5"]) -> Float[Array, "n n"]:
        """One step of implicit Euler."""
        n = self.grid
        _, left, right, lower, upper = parameters
        i, r = jnp.arange(1, n + 1), 0.01 * (n + 1) ** 2
        sine = math.sqrt(2 / (n + 1)) * jnp.sin(jnp.pi * i[:, None] * i / (n + 1))  # its own inverse
        decay = 4 * r * jnp.sin(jnp.pi * i / (2 * (n + 1))) ** 2
        edges = jnp.zeros((n, n)).at[0].add(left).at[-1].add(right).at[:, 0].add(lower).at[:, -1].add(upper)
        return sine @ ((sine @ (u + r * edges) @ sine) / (1 + decay[:, None] + decay)) @ sine

    def step(self, state: HeatState, x: Any = None) -> tuple[HeatState, tuple[Array, Array]]:
        fresh = self.begin(state.member + self.members, state.key)
        ended = state.t == self.steps
        pick = lambda new, old: jnp.where(ended.reshape(-1, *[1] * (old.ndim - 1)), new, old)
        u, parameters, member, t = (pick(new, old) for new, old in zip(fresh[:4], state[:4]))
        u, t = jax.vmap(self.solve)(u, parameters), t + 1
        inputs = jnp.concatenate([parameters, (t / self.steps)[:, None]], 1)
        return HeatState(u, parameters, member, t, state.key), (inputs, u.reshape(len(u), -1))


def mean_squared_error(model: Any, batch: tuple[Any, tuple[Array, Array]], key: Any = None) -> Float[Array, ""]:
    """Of a batch of one x f32[1, B, 6] and target (u f32[1, B, n²], valid bool[1, B])."""
    x, (u, valid) = batch
    each = jnp.mean((jax.vmap(jax.vmap(model))(x) - u) ** 2, axis=-1)
    return jnp.sum(each * valid) / jnp.maximum(valid.sum(), 1)


def surrogate(grid: int, learning_rate: Any = 1e-3, *, width: int = 256, key: PRNGKeyArray) -> Sgd:
    """The network of the paper, parameters and time to a whole field through two hidden layers, and its learner."""
    mlp = eqx.nn.MLP(6, grid**2, width, 2, key=key)
    return Sgd(mlp, optax.adam(learning_rate, eps_root=1e-15), Backprop(mean_squared_error))


class TrainerState(NamedTuple):
    """Solvers, buffer, network, and the fields of the solvers' last step that are still to be put."""

    ensemble: State
    fields: tuple[Array, Array]
    waiting: Int[Array, ""]
    produced: Int[Array, ""]
    buffer: BufferState
    learner: State
    idle: Int[Array, ""]
    """Steps in which the trainer had nothing to train on."""


class SurrogateTrainer(Cell):
    """Solvers, buffer and network together; one step is the time of one batch. Gives whether a batch was trained.

    Arguments:
        ensemble: the solvers.
        buffer: holds samples `(x f32[6], u f32[n²])`.
        learner: learns from `(x f32[B, 6], (u f32[B, n²], valid bool[B]))`; see `surrogate`.
        per_step: samples produced in a step.
        simulations: how many members are run in all; a multiple of the ensemble's.

    Raises:
        ValueError: per_step is not positive, or simulations is not a positive multiple of the ensemble's members.
    """

    ensemble: HeatEnsemble
    buffer: Fifo
    learner: Sgd
    per_step: int = eqx.field(static=True)
    simulations: int = eqx.field(static=True)

    def __check_init__(self):
        if self.per_step < 1:
            raise ValueError(f"per_step must be positive, got {self.per_step}")
        if self.simulations < 1 or self.simulations % self.ensemble.members:
            raise ValueError(f"simulations must be a multiple of {self.ensemble.members}, got {self.simulations}")

    def init(self, *, key: PRNGKeyArray | None = None) -> TrainerState:
        key = jax.random.PRNGKey(0) if key is None else key
        heat = self.ensemble.init(key=noise(key, 0, "ensemble"))
        fields = jax.tree.map(jnp.zeros_like, jax.eval_shape(self.ensemble.step, heat)[1])
        buffer, learner = self.buffer.init(key=noise(key, 0, "buffer")), self.learner.init(key=noise(key, 0, "learner"))
        return TrainerState(heat, fields, jnp.int32(0), jnp.int32(0), buffer, learner, jnp.int32(0))

    def step(self, state: TrainerState, x: Any = None) -> tuple[TrainerState, Bool[Array, ""]]:
        K, total = self.ensemble.members, self.simulations * self.ensemble.steps

        def produce(_: Any, carry: tuple) -> tuple:
            heat, fields, waiting, produced, buffer = carry
            heat, fields, waiting = branch(
                (waiting == 0) & (produced < total),
                lambda heat, fields, waiting: (*self.ensemble.step(heat), jnp.int32(K)),
                lambda *same: same,
                *(heat, fields, waiting),
            )
            sample = jax.tree.map(lambda leaf: leaf[K - waiting], fields)
            buffer, accepted = self.buffer.put(buffer, sample, waiting > 0)
            return heat, fields, waiting - accepted, produced + accepted, buffer

        heat, fields, waiting, produced, buffer = jax.lax.fori_loop(0, self.per_step, produce, state[:5])
        buffer, batch = self.buffer.get(buffer, True, produced == total)
        x, u = batch.samples
        trains = batch.valid.any()
        learner = branch(
            trains,
            lambda learner, x, u, valid: self.learner.learn(learner, x, (u, valid)),
            lambda learner, x, u, valid: learner,
            *(state.learner, x, u, batch.valid),
        )
        return TrainerState(heat, fields, waiting, produced, buffer, learner, state.idle + ~trains), trains


def example() -> tuple[TrainingReservoir, Traffic]:
    """A reservoir of 12 numbers: in most of 64 steps a number comes, every third wants a batch."""
    i = jnp.arange(64)
    cell = TrainingReservoir(jax.ShapeDtypeStruct((1,), jnp.float32), 12, threshold=4, batch=3)
    return cell, Traffic(Maybe(i[:, None] / 64, i % 5 < 4), i % 3 == 0, i >= 58)
