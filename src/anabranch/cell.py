"""The cell: one step of a model on a stream, and the records that travel between cells.

A cell is frozen weights plus one pure function. What changes on the stream is the state, and the state is a value:

    >>> import jax.numpy as jnp
    >>> class Mean(Cell):
    ...     def init(self, *, key=None):
    ...         return {"n": jnp.zeros(()), "mean": jnp.zeros(())}
    ...
    ...     def step(self, state, x):
    ...         n = state["n"] + 1
    ...         mean = state["mean"] + (x - state["mean"]) / n
    ...         return {"n": n, "mean": mean}, mean
    >>> cell = Mean()
    >>> state = cell.init()
    >>> for x in (1.0, 2.0, 6.0):
    ...     state, y = cell.step(state, x)
    >>> float(y)
    3.0

Because the state is a value, running many streams is `jax.vmap`, replaying a log is `jax.lax.scan`, learning is
`jax.grad`, and resuming after a crash is a saved pytree.
"""

import zlib
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree, Shaped

State = PyTree
T = TypeVar("T")


class Maybe(NamedTuple, Generic[T]):
    """A value that is not there at every step: an output not produced yet, a label not known yet.

    `value` always has its full shape; where `valid` is False it must not be read.
    """

    value: T
    valid: Bool[ArrayLike, ""]


class Event(NamedTuple):
    """What a `Learner` is shown: an input, its target if it is known, and how much the event counts."""

    x: PyTree
    target: Maybe[PyTree]
    weight: Float[ArrayLike, ""] = 1.0


class Timed(NamedTuple):
    """An input and when it came, for cells whose memory fades with time and not with the number of events."""

    time: Int[ArrayLike, ""]
    """Whole seconds since the start of the stream."""
    x: PyTree


class Decision(NamedTuple):
    """What a `Policy` chose. It travels unchanged to `Policy.learn`, possibly much later."""

    action: PyTree
    logp: Float[ArrayLike, ""] = 0.0
    """Log-probability with which the action was drawn; 0 for a deterministic choice."""
    aux: PyTree = ()


class Feedback(NamedTuple):
    """What the world answered to a `Decision`."""

    reward: Float[ArrayLike, ""]
    cost: Shaped[Array, " m"] | tuple = ()
    """Consumption of m resources, or the values of m constraints; negative is replenished."""
    x: PyTree = ()
    """The next observation."""
    terminal: Bool[ArrayLike, ""] = False
    """The true end of an episode: nothing follows, do not bootstrap."""
    truncated: Bool[ArrayLike, ""] = False
    """Cut by a time limit: bootstrap from `info["last_x"]`."""
    info: PyTree = ()
    """Whatever else this feedback model reveals."""


class Cell(eqx.Module):
    """One step of a model on a stream: `state, y = cell.step(state, x)`.

    Write `init` and `step` and leave the rest. Fields of the module are frozen on the stream; shapes and dtypes of the
    state never change; `step` is pure and its cost does not grow with the length of the stream.
    """

    rate: ClassVar[tuple[int, int]] = (1, 1)
    """`(n, m)`: n inputs give m outputs. Where n > 1 (m > 1), one step takes (gives) them stacked on a leading axis."""
    delay: ClassVar[int] = 0
    """By how many outputs the stream lags `offline`: `stream[t] == offline[t - delay]`."""
    coupled: ClassVar[bool] = False
    """True when the result for one row of a batch depends on the other rows."""
    host: ClassVar[bool] = False
    """True when the cell cannot be traced by JAX: it calls a solver, a server or another library."""
    smooth: ClassVar[bool] = True
    """False when outputs jump as inputs change (signs, ranks, hard choices), or their gradient is but an estimate:
    nobody expects the derivative of a step to equal a finite difference."""

    def init(self, *, key: PRNGKeyArray | None = None) -> State:
        """The state before the first step."""
        raise NotImplementedError(f"{type(self).__name__} is abstract: it defines no `init`")

    def step(self, state: State, x: Any) -> tuple[State, Any]:
        """One step of the stream."""
        raise NotImplementedError(f"{type(self).__name__} is abstract: it defines no `step`")

    def advance(self, state: State, xs: Any) -> tuple[State, Any]:
        """A block of the stream at once; `xs` has one leading axis, time. Override where a block is cheaper.

        Raises:
            ValueError: if the length of the block is not a multiple of the inputs that one step takes.
        """
        n, m = self.rate
        if n > 1:
            length = jax.tree.leaves(xs)[0].shape[0]
            if length % n:
                raise ValueError(f"{type(self).__name__} takes {n} inputs a step, got a block of {length}")
            xs = jax.tree.map(lambda leaf: leaf.reshape(length // n, n, *leaf.shape[1:]), xs)
        if self.host:
            ys = []
            for i in range(jax.tree.leaves(xs)[0].shape[0]):
                state, y = self.step(state, jax.tree.map(lambda leaf, i=i: leaf[i], xs))
                ys.append(y)
            ys = jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(leaf) for leaf in leaves]), *ys)
        else:
            state, ys = jax.lax.scan(lambda state, x: self.step(state, x), state, xs)  # a bound method cannot be hashed
        if m > 1:
            ys = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), ys)
        return state, ys

    def offline(self, xs: Any) -> Any:
        """All outputs of a whole stream at once, without `delay`: the parallel form that training uses."""
        return self.advance(self.init(), xs)[1]

    def configure(self, state: State, ctl: Any) -> State:
        """Take a control event: a budget, a preference, a width, an adapter. By default nothing can be set."""
        raise ValueError(f"{type(self).__name__} takes no control events, got {ctl!r}")


class Learner(Cell):
    """A cell whose weights change on the stream, and therefore live in its state.

    `predict` is pure and consumes no randomness: asked twice, it answers the same.
    """

    def predict(self, state: State, x: Any) -> Any:
        """The answer for `x` with what has been learned so far."""
        raise NotImplementedError(f"{type(self).__name__} is abstract: it defines no `predict`")

    def learn(self, state: State, x: Any, target: Any, weight: Float[ArrayLike, ""] = 1.0) -> State:
        """The state after being told that the answer for `x` was `target`."""
        raise NotImplementedError(f"{type(self).__name__} is abstract: it defines no `learn`")

    def step(self, state: State, x: Event) -> tuple[State, Any]:
        """Predict first, then learn if the target is there."""
        y = self.predict(state, x.x)
        learned = self.learn(state, x.x, x.target.value, x.weight)
        return select(x.target.valid, learned, state), y


class Policy(Cell):
    """A cell that acts and is told, perhaps much later, how it went."""

    def act(self, state: State, x: Any) -> tuple[State, Decision]:
        """Choose."""
        raise NotImplementedError(f"{type(self).__name__} is abstract: it defines no `act`")

    def learn(self, state: State, x: Any, decision: Decision, feedback: Feedback) -> State:
        """Take the outcome of one decision into account. By default a frozen policy."""
        return state

    def step(self, state: State, x: tuple[Any, Maybe[tuple[Any, Decision, Feedback]]]) -> tuple[State, Decision]:
        """`x = (observation, Maybe((observation, decision, feedback)))`: learn from what came back, then act."""
        observation, outcome = x
        state = select(outcome.valid, self.learn(state, *outcome.value), state)
        return self.act(state, observation)


class Env(Cell):
    """A world: a cell whose input is an action and whose output is a `Feedback`."""

    def observe(self, state: State) -> Any:
        """What a policy may see now."""
        raise NotImplementedError(f"{type(self).__name__} is abstract: it defines no `observe`")

    def legal(self, state: State) -> Bool[Array, " k"]:
        """Which of k discrete actions are allowed now."""
        raise NotImplementedError(f"{type(self).__name__} does not say which actions are legal")

    def oracle(self, state: State) -> Float[Array, " k"]:
        """The expected reward of each action now. For meters; never shown to a policy."""
        raise NotImplementedError(f"{type(self).__name__} knows no expected rewards")


def select(pred: Bool[ArrayLike, ""], yes: T, no: T) -> T:
    """`yes` where `pred`, else `no`, for two pytrees of equal structure."""
    return jax.tree.map(lambda a, b: jnp.where(pred, a, b), yes, no)


def noise(key: PRNGKeyArray, index: Any, use: int | str = 0) -> PRNGKeyArray:
    """The random key for one `use` at one `index` of the stream.

    Randomness is a function, not a sequence: keep the key fixed and a counter in the state, and an offline, a streamed,
    a resumed and a sharded run all draw the same numbers.

        >>> key = jax.random.PRNGKey(0)
        >>> a = jax.random.normal(noise(key, 7, "dropout"))
        >>> b = jax.random.normal(noise(key, 7, "dropout"))
        >>> bool(a == b)
        True
    """
    if isinstance(use, str):
        use = zlib.crc32(use.encode()) & 0x7FFFFFFF
    return jax.random.fold_in(jax.random.fold_in(key, index), use)
