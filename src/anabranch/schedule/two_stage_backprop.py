"""Rae, Lee, Richings: 2BP: 2-Stage Backpropagation. arXiv 2405.18047, 2024.

Automatic differentiation hands a gradient back only after that of a stage's own weights, which nobody waits for. In two
stages, the gradient of the input goes back first, `B`, and that of the weights, `W`, runs where a device would
otherwise wait: `two_stage` rewrites a schedule so, and `split_vjp` gives the two halves of a real stage's backward
pass. The gradients are the same; what W needs is held for longer, so that memory grows.

    >>> for given in (naive(4), gpipe(4, 8), one_f_one_b(4, 4), one_f_one_b(4, 8)):
    ...     before, after = (simulate(s.plan(EQUAL)) for s in (given, two_stage(given)))
    ...     print(f"{given.name:6} {before.makespan:.0f} {after.makespan:.0f} {bubble(after).fraction:.3f}")
    naive  12 9 0.667
    GPipe  33 30 0.200
    1F1B   21 15 0.200
    1F1B   33 27 0.111

Where a pass can be cut is read from the program that JAX makes of it: what the gradient of the input does not need
belongs to W. So any stage can be split, and no layer has to be written for it.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import equinox as eqx
import jax
from jax.extend.core import ClosedJaxpr, Var, jaxpr_as_fun
from jaxtyping import Array, PyTree

from anabranch.schedule.base import (
    BW,
    EQUAL,
    B,
    Costs,
    F,
    Line,
    Pass,
    Schedule,
    bubble,
    gpipe,
    one_f_one_b,
    simulate,
)

__all__ = ["bubble", "gpipe", "measure", "naive", "one_f_one_b", "simulate", "split_vjp", "two_stage"]


def naive(p: int) -> Schedule:
    """One batch that is not cut: one device works at a time."""
    return replace(gpipe(p, 1), name="naive")


def two_stage(given: Schedule, costs: Costs = EQUAL, fill: str = "gap") -> Schedule:
    """The schedule with each `BW` in two halves.

    Arguments:
        costs: by which it is seen where a device would wait.
        fill: "gap": once a device has no forward pass left, one W before each B that it would wait for; "end": all of
            them at the end.

    Raises:
        ValueError: if `fill` is neither, or no pass can be split.
    """
    if fill not in ("gap", "end"):
        raise ValueError(f'fill must be "gap" or "end", got {fill!r}')
    if not any(one.kind is BW for order in given.orders for one in order):
        raise ValueError(f"{given.name} has no BW that could be split")
    line = Line(len(given.orders), given.stages, costs)
    orders = [[one._replace(kind=B) if one.kind is BW else one for one in order] for order in given.orders]
    forward = [sum(one.kind is F for one in order) for order in orders]

    def before(device: int, one: Pass, arrives: float) -> None:
        forward[device] -= one.kind is F
        waits = line.free[device] < arrives and one.kind is B and not forward[device]
        if fill == "gap" and waits and line.pending[device]:
            line.weight(device)

    line.follow(orders, before)
    return replace(given, name=f"{given.name} + 2BP", orders=line.finish())


class Halves(NamedTuple):
    """A function in two halves: the first gives some of its results, and what the second makes the others from."""

    first: Callable[..., tuple[Any, list[Array]]]
    """`first(*args) -> (results, kept)`."""
    second: Callable[[list[Array]], Any]
    """`second(kept) -> the other results`."""


def halve(function: Callable[..., tuple[Any, Any]], *args: Any) -> Halves:
    """Split a function of these arguments that gives `(now, later)`: what `now` needs runs first, all else later.

    The program is cut between operations. One that is a program in itself, such as a `scan`, is not cut; it runs in the
    first half if `now` needs any of it.
    """
    closed, shape = jax.make_jaxpr(function, return_shape=True)(*args)
    jaxpr = closed.jaxpr
    count = len(jax.tree.leaves(shape[0]))
    needed = {var for var in jaxpr.outvars[:count] if isinstance(var, Var)}
    eqns: tuple[list, list] = [], []
    for eqn in reversed(jaxpr.eqns):
        early = any(var in needed for var in eqn.outvars)
        eqns[not early].insert(0, eqn)
        if early:
            needed |= {var for var in eqn.invars if isinstance(var, Var)}
    made = {var for eqn in eqns[1] for var in eqn.outvars}
    later = jaxpr.outvars[count:]
    used = [*(var for eqn in eqns[1] for var in eqn.invars), *later]
    given = set(jaxpr.constvars)
    kept = list(dict.fromkeys(v for v in used if isinstance(v, Var) and v not in made and v not in given))

    def program(eqns: list, invars: list, outvars: list) -> Callable[..., list[Array]]:
        part = jaxpr.replace(eqns=eqns, invars=invars, outvars=outvars, debug_info=None)
        return jaxpr_as_fun(ClosedJaxpr(part, closed.consts))

    one = program(eqns[0], jaxpr.invars, [*jaxpr.outvars[:count], *kept])
    two = program(eqns[1], kept, later)

    def first(*args: Any) -> tuple[Any, list[Array]]:
        found = one(*jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shape[0]), found[:count]), found[count:]

    def second(kept: list[Array]) -> Any:
        return jax.tree.unflatten(jax.tree.structure(shape[1]), two(*kept))

    return Halves(first, second)


Stage = Callable[[PyTree, Array], Array]
"""`stage(weights, x) -> y`."""


class SplitVJP(NamedTuple):
    """A stage's forward pass, and its backward pass in halves."""

    forward: Callable[[PyTree, Array], tuple[Array, list[Array]]]
    """`forward(weights, x) -> (y, kept)`."""
    backward: Callable[[list[Array], Array], tuple[Array, list[Array]]]
    """`backward(kept, gy) -> (gx, kept for the weights)`: p1, or B."""
    weight: Callable[[list[Array]], PyTree]
    """`weight(kept) -> gradient of the weights`: p2, or W."""


def split_vjp(stage: Stage, weights: PyTree, x: Array) -> SplitVJP:
    """The three passes of a stage for weights and inputs of these shapes; no work is done twice.

    >>> import jax.numpy as jnp
    >>> passes = split_vjp(lambda w, x: jnp.tanh(x @ w), jnp.eye(2), jnp.ones((3, 2)))
    >>> y, kept = passes.forward(jnp.eye(2), jnp.ones((3, 2)))
    >>> gx, kept = passes.backward(kept, jnp.ones((3, 2)))
    >>> gx.shape, passes.weight(kept).shape
    ((3, 2), (2, 2))
    """

    def run(weights: PyTree, x: Array) -> tuple[Array, list[Array], Any]:
        y, pull = jax.vjp(stage, weights, x)
        leaves, tree = jax.tree.flatten(pull)
        return y, leaves, tree

    y, leaves, tree = eqx.filter_eval_shape(run, weights, x)

    def back(leaves: list[Array], gy: Array) -> tuple[Array, PyTree]:
        gw, gx = jax.tree.unflatten(tree, leaves)(gy)
        return gx, gw

    halves = halve(back, leaves, y)
    return SplitVJP(lambda weights, x: run(weights, x)[:2], halves.first, halves.second)


def measure(stage: Stage, weights: PyTree, x: Array, repeats: int = 20) -> Costs:
    """What the passes of a stage take on this machine, medians in seconds, and what they hold, in bytes.

    What `anabranch plan` needs to know: write it as JSON by `dataclasses.asdict`.
    """
    passes = split_vjp(stage, weights, x)
    forward, backward, weight = jax.jit(passes.forward), jax.jit(passes.backward), jax.jit(passes.weight)
    y, kept = forward(weights, x)
    _, left = backward(kept, y)

    def seconds(run: Callable[..., Any], *args: Any) -> float:
        jax.block_until_ready(run(*args))
        took = []
        for _ in range(repeats):
            begin = time.perf_counter()
            jax.block_until_ready(run(*args))
            took.append(time.perf_counter() - begin)
        return statistics.median(took)

    times = seconds(forward, weights, x), seconds(backward, kept, y), seconds(weight, left)
    activation, inherited, gradient = _held(passes, weights, x)
    share = inherited / activation if activation else 0.0
    return Costs(*times, activation=activation, kept=share, gradient=gradient, bytes=float(y.nbytes))


def _held(passes: SplitVJP, weights: PyTree, x: Array) -> tuple[float, float, float]:
    """Bytes from F to B, those of them until W, and those that B adds until W. Weights are there anyway."""
    forward = jax.make_jaxpr(passes.forward)(weights, x).jaxpr
    moving: set[Any] = {forward.invars[-1]}
    for eqn in forward.eqns:
        if any(var in moving for var in eqn.invars if isinstance(var, Var)):
            moving |= set(eqn.outvars)
    size = lambda var: float(var.aval.size * var.aval.dtype.itemsize)
    held = [size(var) if isinstance(var, Var) and var in moving else 0.0 for var in forward.outvars[1:]]
    y, kept = jax.eval_shape(passes.forward, weights, x)
    backward = jax.make_jaxpr(passes.backward)(kept, y).jaxpr
    given = dict(zip(backward.invars, [*held, 0.0], strict=True))
    left = [var for var in backward.outvars[1:] if isinstance(var, Var)]
    return sum(held), sum(given.get(var, 0.0) for var in left), sum(size(var) for var in left if var not in given)
