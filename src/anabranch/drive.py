"""Drivers: run a cell over a stream. `scan`, `batch`, `replay`, `evaluate`, and `play` for policies and worlds."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray, PyTree

from anabranch.cell import Cell, Decision, Env, Feedback, Learner, Policy, State, noise


# Compiled at module level: a function jitted inside its caller would be traced again at every call.
@eqx.filter_jit
def _scan(cell: Cell, state: State, xs: PyTree) -> tuple[State, PyTree]:
    return cell.advance(state, xs)


@eqx.filter_jit(donate="all-except-first")
def _scan_in_place(cell: Cell, state: State, xs: PyTree) -> tuple[State, PyTree]:
    return cell.advance(state, xs)


@eqx.filter_jit
def _batch(cell: Cell, state: State, xs: PyTree) -> tuple[State, PyTree]:
    return eqx.filter_vmap(lambda state, xs: cell.advance(state, xs))(state, xs)


def _length(xs: PyTree) -> int:
    lengths = {np.shape(leaf)[0] if np.ndim(leaf) else None for leaf in jax.tree.leaves(xs)}
    if len(lengths) != 1 or None in lengths:
        raise ValueError(f"all inputs need one leading time axis of one length, got {sorted(map(str, lengths))}")
    return lengths.pop() or 0


def _fresh(cell: Cell, state: State | None, key: PRNGKeyArray | None) -> State:
    return cell.init(key=jax.random.PRNGKey(0) if key is None else key) if state is None else state


def scan(
    cell: Cell, xs: PyTree, state: State | None = None, *, key: PRNGKeyArray | None = None
) -> tuple[State, PyTree]:
    """Step through `xs` (stacked on a leading time axis) in one compiled call.

    Compiles once per length; for many lengths use `replay`.

        >>> from anabranch.combine import Delay
        >>> state, ys = scan(Delay(1, like=jnp.zeros(())), jnp.array([1.0, 2.0, 3.0]))
        >>> ys.tolist()
        [0.0, 1.0, 2.0]

    Raises:
        ValueError: if the leaves of `xs` differ in length.
    """
    _length(xs)
    state = _fresh(cell, state, key)
    if cell.host:
        return cell.advance(state, xs)
    return _scan(cell, state, xs)


def batch(
    cell: Cell, xs: PyTree, state: State | None = None, *, key: PRNGKeyArray | None = None
) -> tuple[State, PyTree]:
    """Many streams side by side: `xs` has the axes (streams, time, …). Each stream has its own state and random key.

        >>> from anabranch.combine import Delay
        >>> _, ys = batch(Delay(1, like=jnp.zeros(())), jnp.array([[1.0, 2.0], [3.0, 4.0]]))
        >>> ys.tolist()
        [[0.0, 1.0], [0.0, 3.0]]

    Raises:
        ValueError: if the leaves of `xs` differ in the number of streams, or if the cell cannot be traced.
    """
    if cell.host:
        raise ValueError(f"{type(cell).__name__} runs on the host and cannot be batched")
    n = _length(xs)
    if state is None:
        key = jax.random.PRNGKey(0) if key is None else key
        keys = jax.vmap(lambda i: noise(key, i, "batch"))(jnp.arange(n))
        state = eqx.filter_vmap(lambda key: cell.init(key=key))(keys)
    return _batch(cell, state, xs)


def replay(
    cell: Cell,
    blocks: Iterable[PyTree],
    state: State | None = None,
    *,
    key: PRNGKeyArray | None = None,
    block: int = 4096,
) -> Iterator[tuple[State, PyTree]]:
    """Step through a stream of unknown length that comes in blocks of any length; yields `(state, ys)` as it goes.

    Blocks are cut into powers of two times the inputs of one step, so that no length is compiled twice and at most
    log2(`block`) are compiled at all. State buffers are donated: use the latest state only.

        >>> from anabranch.combine import Delay
        >>> blocks = [jnp.arange(3.0), jnp.arange(3.0, 10.0)]
        >>> np.concatenate([ys for _, ys in replay(Delay(1, like=jnp.zeros(())), blocks)]).tolist()
        [0.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
    """
    # Donated buffers must be owned here: an init may hand out the same array twice, or one the caller still holds.
    state = jax.tree.map(lambda leaf: jnp.array(leaf) if eqx.is_array(leaf) else leaf, _fresh(cell, state, key))
    for xs in blocks:
        n, start, length = cell.rate[0], 0, _length(xs)
        while start < length:
            size = min(block * n, length - start)
            size = n << ((size // n).bit_length() - 1) if size >= n else size
            cut = jax.tree.map(lambda leaf, a=start, b=start + size: jnp.array(leaf[a:b]), xs)
            state, ys = cell.advance(state, cut) if cell.host else _scan_in_place(cell, state, cut)
            start += size
            yield state, ys


class Evaluation(NamedTuple):
    """What a prequential evaluation found."""

    predictions: PyTree
    """`(T, …)`: the answer given at t, before its target was known."""
    scores: dict[str, Any]
    state: State
    seconds: float
    events_per_second: float


def evaluate(
    learner: Learner,
    xs: PyTree,
    ys: PyTree,
    *,
    delay: int | np.ndarray = 0,
    metrics: dict[str, Callable[[np.ndarray, np.ndarray], Any]] | None = None,
    warmup: int = 0,
    key: PRNGKeyArray | None = None,
) -> Evaluation:
    """Prequential (test, then train) evaluation; the target of event t becomes known `delay[t]` events later.

    At time t all targets that have become known are learned, oldest expiry first; then the answer for t is given and
    kept, and it is this answer that is scored. A negative delay means that the target never becomes known; the answer
    is scored all the same. `metrics` map a name to a function of `(targets, predictions)`, both without the first
    `warmup` events.

        >>> class Last(Learner):
        ...     def init(self, *, key=None):
        ...         return jnp.zeros(())
        ...     def predict(self, state, x):
        ...         return state
        ...     def learn(self, state, x, target, weight=1.0):
        ...         return target
        >>> targets = np.arange(1.0, 6.0, dtype=np.float32)
        >>> evaluate(Last(), targets, targets, delay=2).predictions.tolist()
        [0.0, 0.0, 1.0, 2.0, 3.0]

    Raises:
        ValueError: if `xs`, `ys` and `delay` differ in length, or there is no event.
    """
    length = _length((xs, ys))
    if length == 0:
        raise ValueError("there is no event to evaluate")
    late = np.broadcast_to(np.asarray(delay), (length,)) if np.ndim(delay) == 0 else np.asarray(delay)
    if late.shape != (length,):
        raise ValueError(f"delay must be a number or have one entry an event ({length}), got shape {late.shape}")
    # One list of what happens: at each time first the targets that are due (kind 0), then the question (kind 1).
    t = np.arange(length)
    told = t[late >= 0]
    due = told + np.maximum(late[told], 1)
    when, kind, index = np.concatenate([due, t]), np.repeat([0, 1], [len(told), length]), np.concatenate([told, t])
    order = np.lexsort((index, kind, when))
    state = _fresh(learner, None, key)
    xs, ys = jax.tree.map(np.asarray, (xs, ys)) if learner.host else jax.tree.map(jnp.asarray, (xs, ys))
    run = _evaluate_host if learner.host else _evaluate
    begin = time.perf_counter()
    state, predictions = jax.block_until_ready(run(learner, state, xs, ys, kind[order].astype(bool), index[order]))
    seconds = time.perf_counter() - begin
    predictions = jax.tree.map(np.asarray, predictions)
    pick = lambda tree: jax.tree.map(lambda leaf: np.asarray(leaf)[warmup:], tree)
    scores = {name: metric(pick(ys), pick(predictions)) for name, metric in (metrics or {}).items()}
    return Evaluation(predictions, scores, state, seconds, length / seconds)


@eqx.filter_jit
def _evaluate(learner, state, xs, ys, asks, index):
    at = lambda tree, i: jax.tree.map(lambda leaf: leaf[i], tree)
    shape = jax.eval_shape(learner.predict, state, at(xs, 0))
    answers = jax.tree.map(lambda s: jnp.zeros((_length(xs), *s.shape), s.dtype), shape)

    def ask(state, answers, i):
        y = learner.predict(state, at(xs, i))
        return state, jax.tree.map(lambda a, new: a.at[i].set(new), answers, y)

    def tell(state, answers, i):
        return learner.learn(state, at(xs, i), at(ys, i)), answers

    def body(carry, event):
        return jax.lax.cond(event[0], ask, tell, *carry, event[1]), None

    return jax.lax.scan(body, (state, answers), (asks, index))[0]


def _evaluate_host(learner, state, xs, ys, asks, index):
    answers: list[Any] = [None] * _length(xs)
    for asked, i in zip(asks, index):
        x = jax.tree.map(lambda leaf, i=i: leaf[i], xs)
        if asked:
            answers[i] = learner.predict(state, x)
        else:
            state = learner.learn(state, x, jax.tree.map(lambda leaf, i=i: leaf[i], ys))
    return state, jax.tree.map(lambda *leaves: np.stack(leaves), *answers)


class Tick(NamedTuple):
    """One round of a policy in a world."""

    x: PyTree
    decision: Decision | tuple[Decision, ...]
    feedback: Feedback | tuple[Feedback, ...]


class PlayResult(NamedTuple):
    """How a game went. `ticks` is stacked over rounds, or None; `scores` holds the value of each meter by its name."""

    state: State
    ticks: Tick | None
    scores: dict[str, Any]


class Loop(Cell):
    """A policy (or several) and a world, closed into one cell that takes no input and gives a `Tick`.

    Several players are a tuple of policies; the world then observes, takes and answers in tuples.
    """

    policy: Policy | tuple[Policy, ...]
    env: Env
    meters: dict[str, Cell] = eqx.field(default_factory=dict)

    def init(self, *, key=None):
        key = jax.random.PRNGKey(0) if key is None else key
        if isinstance(self.policy, tuple):
            policy = tuple(p.init(key=noise(key, i, "player")) for i, p in enumerate(self.policy))
        else:
            policy = self.policy.init(key=noise(key, 0, "player"))
        meters = {name: meter.init() for name, meter in self.meters.items()}
        return {"policy": policy, "env": self.env.init(key=noise(key, 0, "world")), "meters": meters}

    def step(self, state, x=None):
        world = state["env"]
        seen = self.env.observe(world)
        if isinstance(self.policy, tuple):
            acted = [p.act(s, o) for p, s, o in zip(self.policy, state["policy"], seen)]
            decision = tuple(d for _, d in acted)
            env, feedback = self.env.step(world, tuple(d.action for d in decision))
            policy = tuple(
                p.learn(s, o, d, f) for p, (s, _), o, d, f in zip(self.policy, acted, seen, decision, feedback)
            )
        else:
            policy, decision = self.policy.act(state["policy"], seen)
            env, feedback = self.env.step(world, decision.action)
            policy = self.policy.learn(policy, seen, decision, feedback)
        tick = Tick(seen, decision, feedback)
        meters = {name: meter.step(state["meters"][name], (tick, world))[0] for name, meter in self.meters.items()}
        return {"policy": policy, "env": env, "meters": meters}, tick


def play(
    policy: Policy | tuple[Policy, ...],
    env: Env,
    steps: int,
    *,
    key: PRNGKeyArray,
    meters: dict[str, Cell] | None = None,
    keep: bool = True,
) -> PlayResult:
    """Policy and world in one compiled scan.

    A meter is a cell that steps on `(tick, state of the world before the action)` and has `value(state)`. With
    `keep=False` the ticks are not kept, so that a million rounds cost no memory. Several seeds: `play_seeds`. A world
    on the host is stepped in Python, with the policy compiled.

        >>> class Coin(Env):
        ...     def init(self, *, key=None):
        ...         return jnp.zeros(())
        ...     def observe(self, state):
        ...         return state
        ...     def step(self, state, action):
        ...         return state + 1, Feedback(reward=1.0 * action)
        >>> class Heads(Policy):
        ...     def init(self, *, key=None):
        ...         return ()
        ...     def act(self, state, x):
        ...         return state, Decision(jnp.array(1))
        >>> play(Heads(), Coin(), 3, key=jax.random.PRNGKey(0)).ticks.feedback.reward.tolist()
        [1.0, 1.0, 1.0]

    Raises:
        ValueError: if `steps` is not positive.
    """
    loop = _loop(policy, env, steps, meters)
    if loop.env.host or any(p.host for p in _players(policy)):
        players = tuple(p if p.host else _Compiled(p) for p in _players(policy))
        loop = Loop(players if isinstance(policy, tuple) else players[0], env, loop.meters)
        state, ticks = loop.init(key=key), []
        for _ in range(steps):
            state, tick = loop.step(state)
            if keep:
                ticks.append(jax.tree.map(np.asarray, tick))
        kept = jax.tree.map(lambda *leaves: np.stack(leaves), *ticks) if keep else None
        return PlayResult(state, kept, _scores(loop, state))
    return _play(loop, key, steps, keep)


def play_seeds(
    policy: Policy | tuple[Policy, ...],
    env: Env,
    steps: int,
    keys: PRNGKeyArray | Sequence,
    *,
    meters: dict[str, Cell] | None = None,
    keep: bool = False,
) -> PlayResult:
    """`play` once for each key, side by side; every part of the result has a leading axis of seeds."""
    loop = _loop(policy, env, steps, meters)
    if loop.env.host or any(p.host for p in _players(policy)):
        raise ValueError("a world or a policy on the host cannot be run side by side: call `play` for each seed")
    return eqx.filter_vmap(lambda key: _play(loop, key, steps, keep))(jnp.asarray(keys))


class _Compiled(Policy):
    """A policy whose verbs are compiled, for a world that is not."""

    policy: Policy

    def init(self, *, key=None):
        return self.policy.init(key=key)

    def act(self, state, x):
        return _act(self.policy, state, jax.tree.map(np.asarray, x))

    def learn(self, state, x, decision, feedback):
        return _learn(self.policy, state, *jax.tree.map(np.asarray, (x, decision, feedback)))


@eqx.filter_jit
def _act(policy: Policy, state, x):
    return policy.act(state, x)


@eqx.filter_jit
def _learn(policy: Policy, state, x, decision, feedback):
    return policy.learn(state, x, decision, feedback)


def _players(policy) -> tuple[Policy, ...]:
    return policy if isinstance(policy, tuple) else (policy,)


def _loop(policy, env, steps, meters) -> Loop:
    if steps < 1:
        raise ValueError(f"steps must be positive, got {steps}")
    return Loop(policy, env, meters or {})


def _scores(loop: Loop, state) -> dict[str, Any]:
    return {name: meter.value(state["meters"][name]) for name, meter in loop.meters.items()}  # pyright: ignore


@eqx.filter_jit
def _play(loop: Loop, key, steps: int, keep: bool) -> PlayResult:
    def body(state, _):
        state, tick = loop.step(state)
        return state, tick if keep else None

    state, ticks = jax.lax.scan(body, loop.init(key=key), None, steps)
    return PlayResult(state, ticks, _scores(loop, state))
