"""Combinators: cells made of cells. Few, and orthogonal."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Int, PyTree

from anabranch.branch import branch, due
from anabranch.cell import Cell, Decision, Feedback, Maybe, Policy, noise, select

__all__ = [
    "Ask", "Chain", "Delay", "Delayed", "Dual", "Every", "Map", "Outcome", "Residual", "Route", "Ticketed", "Window",
    "branch", "due",
]  # fmt: skip


def _zeros(like: PyTree, *leading: int) -> PyTree:
    """Zeros in the shapes and dtypes of an example, behind `leading` axes."""
    return jax.tree.map(lambda a: jnp.zeros((*leading, *a.shape), a.dtype), _shape(like))


def _shape(like: PyTree) -> PyTree:
    """Shapes and dtypes of an example: what a cell keeps of it, since its values mean nothing."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(getattr(a, "shape", ()), jnp.result_type(a)), like)


def _output(cell: Cell, like: PyTree) -> PyTree:
    """Shapes and dtypes of what `cell` gives for an input like `like`."""
    return jax.eval_shape(lambda key, x: cell.step(cell.init(key=key), x)[1], jax.random.PRNGKey(0), like)


class Map(Cell):
    """A function as a cell: no state.

    >>> Map(lambda x: 2 * x).step((), 3)
    ((), 6)
    """

    f: Callable[[Any], Any]

    def init(self, *, key=None):
        return ()

    def step(self, state, x):
        return state, self.f(x)

    def offline(self, xs):
        return jax.vmap(self.f)(xs)


class Delay(Cell):
    """The input of `n` steps ago; zeros before there is one. `like` is an example of the input.

    >>> cell = Delay(2, like=jnp.zeros(()))
    >>> cell.advance(cell.init(), jnp.arange(1.0, 6.0))[1].tolist()
    [0.0, 0.0, 1.0, 2.0, 3.0]

    Raises:
        ValueError: if `n` is negative.
    """

    n: int
    like: PyTree

    def __init__(self, n: int, like: PyTree):
        if n < 0:
            raise ValueError(f"a delay must not be negative, got n = {n}")
        self.n, self.like = n, _shape(like)

    def init(self, *, key=None):
        return _zeros(self.like, self.n)

    def step(self, state, x):
        if self.n == 0:
            return state, x
        oldest = jax.tree.map(lambda ring: ring[0], state)
        return jax.tree.map(lambda ring, new: jnp.concatenate([ring[1:], jnp.asarray(new)[None]]), state, x), oldest


class Window(Cell):
    """The last `n` inputs, every `hop` steps: a `Maybe` of the input with a leading axis of n, oldest first.

    Valid from step n on, and then at every hop-th step.

    >>> cell = Window(3, hop=2, like=jnp.zeros(()))
    >>> _, out = cell.advance(cell.init(), jnp.arange(6.0))
    >>> out.valid.tolist(), out.value[4].tolist()
    ([False, False, True, False, True, False], [2.0, 3.0, 4.0])

    Raises:
        ValueError: if `n` or `hop` is not positive.
    """

    n: int
    hop: int
    like: PyTree

    def __init__(self, n: int, hop: int = 1, *, like: PyTree):
        if n < 1 or hop < 1:
            raise ValueError(f"a window needs n >= 1 and hop >= 1, got n = {n}, hop = {hop}")
        self.n, self.hop, self.like = n, hop, _shape(like)

    def init(self, *, key=None):
        return {"ring": _zeros(self.like, self.n), "wait": jnp.asarray(self.n, jnp.int32)}

    def step(self, state, x):
        ring = jax.tree.map(lambda r, new: jnp.concatenate([r[1:], jnp.asarray(new)[None]]), state["ring"], x)
        wait = state["wait"] - 1
        return {"ring": ring, "wait": jnp.where(wait == 0, self.hop, wait)}, Maybe(ring, wait == 0)


class Chain(Cell):
    """One cell after another. Computes the `rate` and the `delay` of the whole from those of its parts.

    >>> mean = Chain(Window(2, like=jnp.zeros(())), Map(lambda w: w.value.mean()))
    >>> mean.advance(mean.init(), jnp.array([1.0, 3.0, 5.0]))[1].tolist()
    [0.5, 2.0, 4.0]

    Raises:
        ValueError: without cells, or where a part's delay is not a whole number of outputs of the next part (put a
            `Delay` between the two).
    """

    cells: tuple[Cell, ...]

    def __init__(self, *cells: Cell):
        if not cells:
            raise ValueError("a chain needs at least one cell")
        self.cells = cells
        _ = self.delay

    @property
    def _repeats(self) -> list[int]:
        """How often each part steps in one step of the whole."""
        repeats, have = [], 1
        for i, cell in enumerate(self.cells):
            need, gives = cell.rate
            whole = math.lcm(have, need) if i else need
            repeats = [r * (whole // have) for r in repeats] if i else []
            repeats.append(whole // need)
            have = repeats[-1] * gives
        return repeats

    @property
    def rate(self) -> tuple[int, int]:  # pyright: ignore[reportIncompatibleVariableOverride]
        repeats = self._repeats
        return repeats[0] * self.cells[0].rate[0], repeats[-1] * self.cells[-1].rate[1]

    @property
    def delay(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        total = 0
        for cell in self.cells:
            n, m = cell.rate
            if total % n:  # the blocks of n that the stream brings would not be those of the offline form
                raise ValueError(
                    f"{type(cell).__name__} turns {n} inputs into {m} outputs and cannot follow a delay of {total}: "
                    f"put a Delay of {-total % n} before it"
                )
            total = total * m // n + cell.delay
        return total

    @property
    def coupled(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return any(cell.coupled for cell in self.cells)

    @property
    def smooth(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return all(cell.smooth for cell in self.cells)

    @property
    def host(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return any(cell.host for cell in self.cells)

    def init(self, *, key=None):
        key = jax.random.PRNGKey(0) if key is None else key
        return tuple(cell.init(key=noise(key, i, "chain")) for i, cell in enumerate(self.cells))

    def step(self, state, x):
        states, stacked = [], self.rate[0] > 1  # between parts, many values are stacked and one is not
        for cell, repeat, s in zip(self.cells, self._repeats, state):
            if repeat == 1:
                s, x = cell.step(s, x)
                stacked = cell.rate[1] > 1
            else:
                s, x = cell.advance(s, x)
                stacked = True
            states.append(s)
        if stacked and self.rate[1] == 1:
            x = jax.tree.map(lambda a: a[0], x)
        return tuple(states), x

    def offline(self, xs):
        for cell in self.cells:
            xs = cell.offline(xs)
        return xs


class Residual(Cell):
    """`x + cell(x)`, with `x` held back by as much as the cell lags. `like` is an example of the input.

    >>> ahead = Residual(Delay(1, like=jnp.zeros(())), like=jnp.zeros(()))  # a Delay is a lag of content, not of time
    >>> ahead.advance(ahead.init(), jnp.array([1.0, 2.0, 3.0]))[1].tolist()
    [1.0, 3.0, 5.0]

    Raises:
        ValueError: if the cell changes the rate of the stream.
    """

    cell: Cell
    held: Delay

    def __init__(self, cell: Cell, like: PyTree):
        if cell.rate[0] != cell.rate[1]:
            raise ValueError(f"a residual needs as many outputs as inputs, got a cell of rate {cell.rate}")
        self.cell, self.held = cell, Delay(cell.delay, like)

    @property
    def rate(self) -> tuple[int, int]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.cell.rate

    @property
    def delay(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.cell.delay

    def init(self, *, key=None):
        return self.cell.init(key=key), self.held.init()

    def step(self, state, x):
        inner, y = self.cell.step(state[0], x)
        held, x = self.held.step(state[1], x) if self.rate == (1, 1) else self.held.advance(state[1], x)
        return (inner, held), jax.tree.map(jnp.add, x, y)

    def offline(self, xs):
        return jax.tree.map(jnp.add, xs, self.cell.offline(xs))


class Dual(Cell):
    """Two streams that exchange: `(a, b) = exchange(a, b)`, then `left` steps on a and `right` on b.

    The output of the side that lags less is held back, so that both speak of the same time. `like` is an example of the
    exchanged pair; it is needed only when the two delays differ.

    >>> swap = Dual(Map(lambda a: a + 1), Map(lambda b: 10 * b), exchange=lambda a, b: (b, a))
    >>> swap.step(swap.init(), (1, 2))[1]
    (3, 10)

    Raises:
        ValueError: if the two sides differ in rate, or in delay without `like`.
    """

    left: Cell
    right: Cell
    exchange: Callable[[Any, Any], tuple[Any, Any]]
    held: tuple[Cell, Cell]

    def __init__(self, left: Cell, right: Cell, exchange: Callable, like: tuple[PyTree, PyTree] | None = None):
        if left.rate != right.rate:
            raise ValueError(f"the two streams must keep step, got rates {left.rate} and {right.rate}")
        held = []
        for cell, i in ((left, 0), (right, 1)):
            lag = max(left.delay, right.delay) - cell.delay
            if lag and like is None:
                raise ValueError(f"the two streams lag by {left.delay} and {right.delay}: pass `like` to align them")
            held.append(Delay(lag, _output(cell, like[i])) if lag and like is not None else Map(_same))
        self.left, self.right, self.exchange, self.held = left, right, exchange, (held[0], held[1])

    @property
    def rate(self) -> tuple[int, int]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.left.rate

    @property
    def delay(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return max(self.left.delay, self.right.delay)

    def init(self, *, key=None):
        key = jax.random.PRNGKey(0) if key is None else key
        left, right = self.left.init(key=noise(key, 0, "dual")), self.right.init(key=noise(key, 1, "dual"))
        return left, right, self.held[0].init(), self.held[1].init()

    def step(self, state, x):
        left, right, wait_a, wait_b = state
        a, b = self.exchange(*x)
        left, a = self.left.step(left, a)
        right, b = self.right.step(right, b)
        wait_a, a = self.held[0].step(wait_a, a)
        wait_b, b = self.held[1].step(wait_b, b)
        return (left, right, wait_a, wait_b), (a, b)

    def offline(self, xs):
        a, b = jax.vmap(self.exchange)(*xs)
        return self.left.offline(a), self.right.offline(b)


def _same(x):
    return x


class Route(Cell):
    """Each input goes to one of several cells; only that one steps. All give outputs of the same shape.

    `router` is a cell whose output is the index of the destination. Under `vmap`, the rows that go to the same cell
    step together, and a cell that no row goes to costs nothing.

    >>> route = Route(Map(lambda x: (x > 0).astype(int)), Map(lambda x: -x), Map(lambda x: 2 * x))
    >>> jax.vmap(lambda x: route.step(route.init(), x)[1])(jnp.array([3.0, -4.0])).tolist()
    [6.0, 4.0]

    Raises:
        ValueError: with fewer than two cells.
    """

    router: Cell
    cells: tuple[Cell, ...]

    def __init__(self, router: Cell, *cells: Cell):
        if len(cells) < 2:
            raise ValueError(f"a route needs at least two cells to choose from, got {len(cells)}")
        self.router, self.cells = router, cells

    def init(self, *, key=None):
        key = jax.random.PRNGKey(0) if key is None else key
        states = tuple(cell.init(key=noise(key, i + 1, "route")) for i, cell in enumerate(self.cells))
        return self.router.init(key=noise(key, 0, "route")), states

    def step(self, state, x):
        router, states = state
        router, index = self.router.step(router, x)
        y = _zeros(_output(self.cells[0], x))
        new = []
        for i, (cell, s) in enumerate(zip(self.cells, states)):
            s, y = branch(index == i, lambda s, y, x, cell=cell: cell.step(s, x), lambda s, y, x: (s, y), s, y, x)
            new.append(s)
        return (router, tuple(new)), y


class Every(Cell):
    """Two clocks. `slow` steps at every `n`-th input and gives advice; `fast` steps at each on `(x, advice)`.

    The advice may be anything, the parameters of the fast cell included; it stands until the slow cell speaks again.
    The slow cell steps first, at the first input. `like` is an example of the input.

    >>> import anabranch.combine as ac
    >>> total = ac.Every(2, slow=Map(lambda x: x), fast=Map(lambda xa: xa[0] + 100 * xa[1]), like=jnp.zeros(()))
    >>> total.advance(total.init(), jnp.array([1.0, 2.0, 3.0, 4.0]))[1].tolist()
    [101.0, 102.0, 303.0, 304.0]

    Raises:
        ValueError: if `n` is not positive.
    """

    n: int
    slow: Cell
    fast: Cell
    like: PyTree

    def __init__(self, n: int, slow: Cell, fast: Cell, like: PyTree):
        if n < 1:
            raise ValueError(f"the slow cell must step every n >= 1 inputs, got n = {n}")
        self.n, self.slow, self.fast, self.like = n, slow, fast, _shape(like)

    def init(self, *, key=None):
        key = jax.random.PRNGKey(0) if key is None else key
        return {
            "slow": self.slow.init(key=noise(key, 0, "every")),
            "fast": self.fast.init(key=noise(key, 1, "every")),
            "advice": _zeros(_output(self.slow, self.like)),
            "wait": jnp.zeros((), jnp.int32),
        }

    def step(self, state, x):
        speak = lambda slow, advice, x: self.slow.step(slow, x)
        silent = lambda slow, advice, x: (slow, advice)
        slow, advice = branch(state["wait"] == 0, speak, silent, state["slow"], state["advice"], x)
        fast, y = self.fast.step(state["fast"], (x, advice))
        return {"slow": slow, "fast": fast, "advice": advice, "wait": (state["wait"] + 1) % self.n}, y


class Outcome(NamedTuple):
    """How the decision with this ticket went."""

    ticket: Int[ArrayLike, ""]
    feedback: Feedback


class Ask(NamedTuple):
    """One event for `Delayed`: an outcome that has come in, an observation to act on, or both."""

    x: Maybe[PyTree]
    outcome: Maybe[Outcome]


class Ticketed(NamedTuple):
    """A decision, and the ticket under which its outcome is to be reported."""

    ticket: Int[Array, ""]
    decision: Decision


class DelayedState(eqx.Module):
    """The policy's state, and the decisions whose outcome is still open."""

    policy: PyTree
    ticket: Int[Array, " capacity"]
    """-1 where the slot is free."""
    x: PyTree
    decision: PyTree
    issued: Int[Array, ""]
    lost: Int[Array, ""]
    """Decisions whose outcome did not come before `capacity` further decisions."""
    ignored: Int[Array, ""]
    """Outcomes of no open ticket: settled before, lost, or never issued."""


class Delayed(Cell):
    """A policy whose outcomes arrive later, out of order, or never.

    Settles the outcome first, then acts; gives `Maybe(Ticketed)`. A ticket stays open for `capacity` further
    decisions. A second outcome for the same ticket is ignored and counted. `like` is an example of the observation.

    >>> class Fair(Policy):
    ...     def init(self, *, key=None):
    ...         return jnp.zeros(2)
    ...     def act(self, state, x):
    ...         return state, Decision(jnp.argmin(state))
    ...     def learn(self, state, x, decision, feedback):
    ...         return state.at[decision.action].add(feedback.reward)
    >>> cell = Delayed(Fair(), capacity=4, like=jnp.zeros(()))
    >>> state = cell.init()
    >>> state, out = cell.step(state, cell.ask(0.0))
    >>> int(out.value.ticket), int(out.value.decision.action)
    (0, 0)
    >>> state, _ = cell.step(state, cell.tell(0, Feedback(reward=1.0)))
    >>> int(cell.step(state, cell.ask(0.0))[1].value.decision.action)
    1

    Raises:
        ValueError: if `capacity` is not positive.
    """

    policy: Policy
    capacity: int
    like: PyTree

    def __init__(self, policy: Policy, capacity: int, like: PyTree):
        if capacity < 1:
            raise ValueError(f"there must be room for at least one open decision, got capacity = {capacity}")
        self.policy, self.capacity, self.like = policy, capacity, _shape(like)

    def init(self, *, key=None):
        policy = self.policy.init(key=key)
        decision = jax.eval_shape(lambda s, x: self.policy.act(s, x)[1], policy, self.like)
        zero = jnp.zeros((), jnp.int32)
        free = jnp.full(self.capacity, -1, jnp.int32)
        rings = _zeros(self.like, self.capacity), _zeros(decision, self.capacity)
        return DelayedState(policy, free, *rings, issued=zero, lost=zero, ignored=zero)

    def ask(self, x: PyTree, like: Feedback | None = None) -> Ask:
        """The event that wants a decision on `x`. `like` is an example of the feedback, if it is not just a reward."""
        return Ask(Maybe(x, True), Maybe(Outcome(-1, Feedback(0.0) if like is None else like), False))

    def tell(self, ticket: Any, feedback: Feedback) -> Ask:
        """The event that reports an outcome."""
        return Ask(Maybe(_zeros(self.like), False), Maybe(Outcome(ticket, feedback), True))

    def step(self, state: DelayedState, x: Ask) -> tuple[DelayedState, Maybe[Ticketed]]:
        state = self._settle(state, x.outcome)
        policy, decision = self.policy.act(state.policy, x.x.value)
        slot, asked = state.issued % self.capacity, x.x.valid
        put = lambda ring, new: ring.at[slot].set(jnp.where(asked, new, ring[slot]))
        new = DelayedState(
            policy=select(asked, policy, state.policy),
            ticket=put(state.ticket, state.issued),
            x=jax.tree.map(put, state.x, x.x.value),
            decision=jax.tree.map(put, state.decision, decision),
            issued=state.issued + jnp.asarray(asked, jnp.int32),
            lost=state.lost + (asked & (state.ticket[slot] >= 0)).astype(jnp.int32),
            ignored=state.ignored,
        )
        return new, Maybe(Ticketed(state.issued, decision), asked)

    def _settle(self, state: DelayedState, outcome: Maybe[Outcome]) -> DelayedState:
        ticket = jnp.asarray(outcome.value.ticket, jnp.int32)
        slot = ticket % self.capacity
        known: Bool[Array, ""] = (state.ticket[slot] == ticket) & (ticket >= 0) & outcome.valid
        pick = lambda ring: ring[slot]
        x, decision = jax.tree.map(pick, state.x), jax.tree.map(pick, state.decision)
        learned = self.policy.learn(state.policy, x, decision, outcome.value.feedback)
        return DelayedState(
            policy=select(known, learned, state.policy),
            ticket=state.ticket.at[slot].set(jnp.where(known, -1, state.ticket[slot])),
            x=state.x,
            decision=state.decision,
            issued=state.issued,
            lost=state.lost,
            ignored=state.ignored + (outcome.valid & ~known).astype(jnp.int32),
        )
