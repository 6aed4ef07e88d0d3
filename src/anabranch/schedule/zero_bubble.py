"""Qi, Wan, Huang, Lin: Zero Bubble Pipeline Parallelism. arXiv 2401.10241; ICLR 2024.

Of a backward pass only the gradient of the input has somebody waiting for it. With that of the weights split off, `W`,
there is work to fill the gaps in which a device would wait: by hand (`zb_h1`, `zb_h2`), by a search for given costs and
memory (`auto_schedule`), or with two chunks a device on a V (`zb_v`). Gaps are filled to the end only if the next
iteration need not wait for a norm over all gradients: `PostValidation` updates by what is known and makes up for it
later. So compare `bubble(...).span`, or iterations by `repeat(plan, 3, flush=False)`: with a flush nobody gets to zero.

    >>> spans = {}
    >>> for plan in (zb_h1(4, 12), zb_h2(4, 12), zb_v(4, 12)):
    ...     spans[plan.name] = bubble(simulate(plan.plan(Costs(1, 1, 1)))).span
    >>> spans
    {'ZB-H1': 3.0, 'ZB-H2': 0.0, 'ZB-V': 0.0}

The search follows the authors' code, where a warm-up forward pass is also left out if a stage would have more of them
than the one before it. Their integer program is not here: its start, the heuristic, is what they run.
"""

from collections.abc import Callable, Iterable
from itertools import product
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, PyTree

from anabranch.cell import select
from anabranch.schedule.base import (
    EQUAL,
    B,
    Costs,
    F,
    Line,
    Op,
    Pass,
    PlanError,
    Schedule,
    W,
    bubble,
    positive,
    schedule,
    simulate,
    v_shape,
)

__all__ = [
    "Costs", "PostValidation", "auto_schedule", "bubble", "simulate", "zb_h1", "zb_h2", "zb_v",
]  # fmt: skip


def zb_h1(p: int, m: int) -> Schedule:
    """The memory of 1F1B, p activations. Bubble (p - 1) max(F + B - W, B).

    Raises:
        ValueError: if there are fewer micro-batches than devices.
    """
    _enough(p, m, p)

    def order(s: int) -> Iterable[tuple[Op, int, int]]:
        warm, w = p - 1 - s, 0
        yield from ((F, s, i) for i in range(warm))
        for i in range(m - warm):
            yield from ((F, s, warm + i), (B, s, i))
            if i >= s:
                yield W, s, w
                w += 1
        for i in range(m - warm, m):
            yield from ((B, s, i), (W, s, w))
            w += 1
        yield from ((W, s, i) for i in range(w, m))

    return schedule("ZB-H1", p, order)


def zb_h2(p: int, m: int) -> Schedule:
    """Up to 2p - 1 activations. Bubble (p - 1) max(0, F + B - 2W), where a W takes no longer than an F or a B.

    Raises:
        ValueError: if there are fewer than 2p - 1 micro-batches.
    """
    _enough(p, m, 2 * p - 1)

    def order(s: int) -> Iterable[tuple[Op, int, int]]:
        f, w = 2 * (p - s) - 1, 0
        yield from ((F, s, i) for i in range(f))
        for i in range(m):
            yield B, s, i
            if i >= 2 * s:
                yield W, s, w
                w += 1
            if f < m:
                yield F, s, f
                f += 1
        yield from ((W, s, i) for i in range(w, m))

    return schedule("ZB-H2", p, order)


def _enough(p: int, m: int, least: int) -> None:
    positive(p=p, m=m)
    if m < least:
        raise ValueError(f"m must be at least {least} for p={p}, got {m}")


def auto_schedule(p: int, m: int, costs: Costs, limit: float = np.inf) -> Schedule:
    """The authors' heuristic for one stage a device: all eight settings of its three switches, the shortest kept.

    Arguments:
        limit: memory of a device, in the unit of `costs.activation`.

    Raises:
        PlanError: if the memory does not suffice for one micro-batch.
    """
    positive(p=p, m=m)
    found, failure = [], PlanError(f"memory of {limit:g} does not suffice")
    for switches in product((True, False), repeat=3):
        try:
            line = _auto(Line(p, p, costs, limit), p, m, *switches)
        except PlanError as error:
            failure = error
            continue
        longest = max(line.ran[Pass(W, s, m - 1)][1] - line.ran[Pass(F, s, 0)][1] + line.time[F][s] for s in range(p))
        found.append((longest, len(found), line))
    if not found:
        raise failure
    return Schedule("ZB auto", min(found)[2].orders, tuple(range(p)))


def _auto(line: Line, p: int, m: int, early_bubble: bool, backward_first: bool, greedy: bool) -> Line:
    time, free = line.time, line.free

    def delay(s: int) -> Callable[[float], bool]:
        return lambda gap: greedy or gap > max(line.waited) - line.waited[s]

    # The first F everywhere, as many more as the first B leaves time for, and the first B from the last stage on.
    for s in range(p):
        line.put(s, line.next(F, s))
    more = [0] * p
    first = free[p - 1] + time[B][p - 1]  # when the first B of the stage behind ends
    for s in range(p - 2, -1, -1):
        held, at = line.held[s], free[s]
        while 1 + more[s] < m and held + line.adds[F][s] <= line.limit:
            if at + time[F][s] > first + line.message if early_bubble else at >= first + line.message:
                break
            held, at, more[s] = held + line.adds[F][s], at + time[F][s], more[s] + 1
        first = max(at, first + line.message) + time[B][s]
    for s in range(1, p):
        most = more[s - 1] if more[s - 1] == m - 1 else max(0, more[s - 1] - 1)
        more[s] = min(more[s], most)
    for s in range(p):
        for _ in range(more[s]):
            line.put(s, line.next(F, s))
    for s in range(p - 1, -1, -1):
        line.put(s, line.next(B, s))

    for _ in range(1, m):
        forward = [line.done[F][s] < m and not (backward_first and _waits(line, s, p)) for s in range(p)]
        for s in range(p - 2, -1, -1):
            forward[s] &= forward[s + 1]
        for s in np.flatnonzero(forward).tolist():
            _next(line, s, line.next(F, s), delay(s))
        for s in range(p - 1, -1, -1):
            if s == 0 and line.done[F][0] == m:
                line.fill(0, np.inf)
            _next(line, s, line.next(B, s), delay(s))
    line.finish()
    return line


def _next(line: Line, device: int, one: Pass, delay: Callable[[float], bool]) -> None:
    """The next pass of a device, and before it each W that memory needs or a gap has room for."""
    line.room(device, one)
    line.fill(device, line.arrives(device, one), delay)
    line.put(device, one)


def _waits(line: Line, s: int, p: int) -> bool:
    """Whether a stage that is two forward passes ahead leaves the next one out, so as not to delay its B."""
    done = line.done[F]
    if s == p - 1 or done[s] < done[s + 1] + 2:
        return False
    comes = line.free[s + 1] + line.time[F][s + 1] + line.time[B][s + 1] + line.message
    if line.free[s] >= comes:
        return True
    held, weights = line.held[s] + line.adds[F][s], 0
    while held > line.limit and weights < len(line.pending[s]):
        held, weights = held + line.adds[W][s], weights + 1
    if line.free[s] + line.time[F][s] + weights * line.time[W][s] <= comes:
        return False
    return comes - line.free[s] <= max(line.waited) - line.waited[s]


def zb_v(p: int, m: int, costs: Costs = EQUAL, limit: float | None = None) -> Schedule:
    """Two chunks a device on a V, in the memory of 1F1B. No bubble if all passes take the same time and m >= 2p.

    The costs are those of 2p chunks; where passes differ, gaps are filled as they come.

    Arguments:
        limit: memory of a device; by default 2p activations of a chunk.

    Raises:
        PlanError: if the memory does not suffice for one micro-batch.
    """
    positive(p=p, m=m)
    if limit is None:
        limit = 2 * p * float(np.max(costs.activation))
    found = []
    for fill_f, fill_b in product((True, False), repeat=2):
        worst: list[float] | None = None
        while True:  # once more with the waiting of the last attempt as what each device may have, while that helps
            line = _v(Line(p, 2 * p, costs, limit), p, m, fill_f, fill_b, worst)
            found.append((max(line.waited), len(found), line))
            if worst is not None and max(line.waited) >= max(worst):
                break
            worst = list(line.waited)
    return Schedule("ZB-V", min(found)[2].orders, v_shape(p))


def _v(line: Line, p: int, m: int, fill_f: bool, fill_b: bool, may: list[float] | None) -> Line:
    done, back = line.done, lambda d: 2 * p - 1 - d  # the chunk on the way back of a device

    def delay(d: int, fills: bool) -> Callable[[float], bool]:
        spare = max(line.waited) if may is None else max(*line.waited, max(may) - may[d])
        return lambda gap: fills and gap > spare - line.waited[d]

    def put(d: int, kind: Op, stage: int) -> None:
        line.put(d, line.next(kind, stage))

    def given(d: int, kind: Op, stage: int) -> bool:
        return line.arrives(d, line.next(kind, stage)) is not None

    # Down and up again once, with as many more on the way down as the memory and the time until the first one allow.
    for d in range(p):
        put(d, F, d)
    for d in range(p - 1, -1, -1):
        until = line.arrives(d, line.next(F, back(d))) if d < p - 1 else -np.inf
        assert until is not None
        while (
            line.held[d] + line.adds[F][d] * (2 + 2 * d) <= line.limit
            and line.free[d] + line.time[F][d] <= until
            and done[F][d] < m
        ):
            for other in range(d + 1):
                put(other, F, other)
        put(d, F, back(d))
    returns, idle = False, 0
    for d in range(1, p):
        while idle < 2 and (
            done[F][d] + done[F][back(d)] < done[F][d - 1] + done[F][back(d - 1)]
            or done[F][back(d)] <= done[F][back(d - 1)] < m
        ):
            idle += 1
            for other in range(p - 1, d - 1, -1):
                stage = back(other) if returns else other
                fits = line.held[other] + line.takes[F][stage] <= line.limit
                if fits and done[F][stage] < m and given(other, F, stage):
                    put(other, F, stage)
                    idle = 0
            returns = not returns

    while sum(done[B]) < 2 * p * m:
        begun = len(line.ran)
        # A B for each device: on the way down again where its gradient is there, else on the way back.
        down = [d for d in range(p) if done[B][d] < done[B][back(d)] and (done[B][back(d)] == m or given(d, B, d))]
        turns = [(d, d) for d in reversed(down)] + [(d, back(d)) for d in range(p) if d not in down]
        for d, stage in turns:
            if done[B][stage] < m and given(d, B, stage):
                _next(line, d, line.next(B, stage), delay(d, fill_b or stage < p))
        for d in range(p):
            if done[F][back(d)] < done[F][d] and given(d, F, back(d)):
                _next(line, d, line.next(F, back(d)), delay(d, fill_f))
            elif done[F][d] < m and given(d, F, d):
                _next(line, d, line.next(F, d), delay(d, fill_f))
        if len(line.ran) == begun:
            raise PlanError(f"memory of {line.limit:g} does not suffice")
    line.finish()
    return line


class Updated(NamedTuple):
    """A stage after an update that may have to be taken back."""

    params: PyTree
    optimizer: PyTree
    before: tuple[PyTree, PyTree]
    """Parameters and optimiser before the update."""
    grads: PyTree
    scale: Float[Array, ""]
    """By which the gradients were multiplied; 0 if they were left out."""


class PostValidation(eqx.Module):
    """An update with clipping by the norm over all stages, and none where a gradient is not finite, without a barrier.

    A stage adds its own sum of squares to that of the stages before it, hands it on, and updates at once by the sum so
    far. Once the last stage's sum has come back, a stage whose decision was another takes the update back, by what it
    has kept, and makes it again. So what is in force after `validate` is what an optimiser with a barrier has, bit for
    bit.

        >>> rule = PostValidation(optax.sgd(1.0), clip=5.0)
        >>> stages = [rule.init(jnp.ones(1)) for _ in range(2)]
        >>> total = jnp.float32(0)
        >>> for i, grad in enumerate((jnp.array([3.0]), jnp.array([4.0]))):
        ...     stages[i], total = rule.update(stages[i], grad, total)
        >>> [float(rule.validate(stage, total)[0].params[0]) for stage in stages], float(total)
        ([-2.0, -3.0], 25.0)

    Raises:
        ValueError: if `clip` is not positive.
    """

    optimizer: optax.GradientTransformation = eqx.field(static=True)
    clip: float = eqx.field(static=True, default=1.0)

    def __check_init__(self):
        if not self.clip > 0:
            raise ValueError(f"clip must be positive, got {self.clip}")

    def init(self, params: PyTree) -> Updated:
        optimizer = self.optimizer.init(params)
        grads = jax.tree.map(jnp.zeros_like, params)
        return Updated(params, optimizer, (params, optimizer), grads, jnp.float32(1))

    def scale(self, squares: Float[Array, ""]) -> Float[Array, ""]:
        """By what gradients are multiplied, given the sum of their squares."""
        norm = jnp.sqrt(squares)
        return jnp.where(jnp.isfinite(norm), jnp.minimum(1.0, self.clip / jnp.maximum(norm, 1e-12)), 0.0)

    def update(self, stage: Updated, grads: PyTree, squares: Float[Array, ""]) -> tuple[Updated, Float[Array, ""]]:
        """Update by the sum of squares of the stages before; also gives the sum with this one's."""
        squares = squares + sum(jnp.vdot(g, g) for g in jax.tree.leaves(grads))
        scale = self.scale(squares)
        params, optimizer = self._step(stage.params, stage.optimizer, grads, scale)
        return Updated(params, optimizer, (stage.params, stage.optimizer), grads, scale), squares

    def validate(self, stage: Updated, squares: Float[Array, ""]) -> tuple[Updated, Bool[Array, ""]]:
        """What stands by the sum of squares of all stages, and whether the update was taken back."""
        scale = self.scale(squares)
        wrong = scale != stage.scale
        again = self._step(*stage.before, stage.grads, scale)
        params, optimizer = select(wrong, again, (stage.params, stage.optimizer))
        return stage._replace(params=params, optimizer=optimizer, scale=scale), wrong

    def _step(self, params: PyTree, optimizer: PyTree, grads: PyTree, scale: Float[Array, ""]) -> tuple[Any, Any]:
        fine = scale > 0
        grads = jax.tree.map(lambda g: jnp.where(fine, g, 0.0) * scale, grads)
        updates, new = self.optimizer.update(grads, optimizer, params)
        return select(fine, (optax.apply_updates(params, updates), new), (params, optimizer))


def undo_adamw(
    params: PyTree, state: optax.ScaleByAdamState, grads: PyTree, rate: float, b1: float = 0.9, b2: float = 0.999,
    eps: float = 1e-8, decay: float = 1e-4,
) -> tuple[PyTree, optax.ScaleByAdamState]:  # fmt: skip
    """Parameters and moments before a step of AdamW with these gradients, by arithmetic: no copy, but rounded."""
    n = jnp.asarray(state.count, jnp.float32)

    def parameter(p, m, v):
        step = m / (1 - b1**n) / (jnp.sqrt(v / (1 - b2**n)) + eps)
        return (p + rate * step) / (1 - rate * decay)

    mu = jax.tree.map(lambda m, g: (m - (1 - b1) * g) / b1, state.mu, grads)
    nu = jax.tree.map(lambda v, g: jnp.maximum((v - (1 - b2) * g * g) / b2, 0.0), state.nu, grads)
    before = jax.tree.map(parameter, params, state.mu, state.nu)
    return before, optax.ScaleByAdamState(count=state.count - 1, mu=mu, nu=nu)
