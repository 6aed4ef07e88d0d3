"""`branch`: work that is skipped, also in a batch.

`jax.lax.cond` under `jax.vmap` runs both sides for every row and copies whatever weights they close over to each row.
`branch` is `lax.cond` for one stream; for a batch it gathers the rows that need the heavy side, runs that side on as
many chunks of `bucket` rows as there are, and scatters the results back. Weights are never copied.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import partial
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Bool, PyTree


def branch(pred: Bool[Array, ""], heavy: Callable, light: Callable, *args: Any, bucket: int = 256) -> Any:
    """`heavy(*args)` where `pred`, else `light(*args)`; both return the same structure, shapes and dtypes.

    A batch runs `light` on every row, so it should cost next to nothing, and `heavy` on ⌈active / bucket⌉ chunks of
    rows. That holds under `vmap`, under nested `vmap`, inside `scan`, and for `grad` of any of these. `vmap` of a
    `grad` gives the right numbers, but runs both sides.

        >>> import jax, jax.numpy as jnp
        >>> w = jnp.eye(3)
        >>> f = lambda go, x: branch(go, lambda x: jnp.tanh(w @ x), lambda x: x, x)
        >>> jax.vmap(f)(jnp.array([True, False]), jnp.ones((2, 3))).round(2).tolist()
        [[0.7599999904632568, 0.7599999904632568, 0.7599999904632568], [1.0, 1.0, 1.0]]

    Raises:
        TypeError: if the two sides return different structures, shapes or dtypes.
        ValueError: if `bucket` is not positive.
    """
    if bucket < 1:
        raise ValueError(f"bucket must be positive, got {bucket}")
    if _plain.get():
        return jax.lax.cond(pred, heavy, light, *args)
    flat, structure = jax.tree.flatten(args)
    sides, consts, outs = [], [], []
    for side in (heavy, light):
        jaxpr, out = jax.make_jaxpr(lambda *a, side=side: side(*jax.tree.unflatten(structure, a)), return_shape=True)(
            *flat
        )
        sides.append(jaxpr)
        consts.append(jaxpr.consts)
        outs.append(out)
    if jax.tree.structure(outs[0]) != jax.tree.structure(outs[1]) or [
        (a.shape, a.dtype) for a in jax.tree.leaves(outs[0])
    ] != [(a.shape, a.dtype) for a in jax.tree.leaves(outs[1])]:
        raise TypeError(f"the two sides of a branch must agree, got heavy {outs[0]} and light {outs[1]}")
    # Closed-over weights become operands, so that the batching rule can see which of them vary from row to row.
    n_heavy, n_light = len(consts[0]), len(consts[1])

    def run_heavy(*operands):
        return jax.core.eval_jaxpr(sides[0].jaxpr, operands[:n_heavy], *operands[n_heavy + n_light :])

    def run_light(*operands):
        return jax.core.eval_jaxpr(
            sides[1].jaxpr, operands[n_heavy : n_heavy + n_light], *operands[n_heavy + n_light :]
        )

    operands = (*consts[0], *consts[1], *flat)
    out = branch_p.bind(
        jnp.asarray(pred), *map(jnp.asarray, operands), heavy=run_heavy, light=run_light, rows=None, bucket=bucket
    )
    return jax.tree.unflatten(jax.tree.structure(outs[0]), out)


_plain = ContextVar("plain", default=False)


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """Within this context, `branch` is traced as `jax.lax.cond`: for exporters, which know no primitive of ours."""
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


def due(
    pending: Bool[Array, " k"], process: Callable[[PyTree], PyTree], states: PyTree, most: int, start: Any = 0
) -> tuple[PyTree, Bool[Array, " k"]]:
    """Run rare, expensive work on at most `most` of the k lanes that wait for it.

    `process` maps the state of one lane; `states` is stacked over lanes. Lanes are served in order, beginning at
    lane `start` (rotate it, and none waits for ever). Returns the states and who is still waiting.

        >>> states, waiting = due(jnp.array([True, False, True]), lambda s: s + 10.0, jnp.zeros(3), most=1)
        >>> states.tolist(), waiting.tolist()
        ([10.0, 0.0, 0.0], [False, False, True])
    """
    k = pending.shape[0]
    most = min(most, k)
    order = (jnp.arange(k) + start) % k
    turn = order[jnp.nonzero(pending[order], size=most, fill_value=0)[0]]
    lanes = jnp.where(jnp.arange(most) < pending.sum(), turn, k)  # k is out of bounds: gathered clamped, never written
    done = jax.vmap(process)(jax.tree.map(lambda leaf: leaf[lanes], states))
    states = jax.tree.map(lambda leaf, new: leaf.at[lanes].set(new, mode="drop"), states, done)
    return states, pending.at[lanes].set(False, mode="drop")


# The primitive. `rows` is None for one stream (pred is a scalar); for a batch (pred has one axis) it says of each
# operand whether it has that axis too or is shared by all rows.


def _run(pred, *operands, heavy, light, rows, bucket):
    if rows is None:
        return jax.lax.cond(pred, heavy, light, *operands)
    n = pred.shape[0]
    axes = tuple(0 if row else None for row in rows)
    out = jax.vmap(lambda *a: light(*a), in_axes=axes, axis_size=n)(*operands)
    if n == 0:
        return out
    q = min(bucket, n)
    chunks = math.ceil(n / q)
    order = jnp.concatenate([jnp.argsort(~pred, stable=True), jnp.full(chunks * q - n, n)])
    active = pred.sum()

    def chunk(out, first):
        def work(out):
            place = first + jnp.arange(q)
            index = jax.lax.dynamic_slice(order, (first,), (q,))
            picked = [a[index] if row else a for a, row in zip(operands, rows)]
            new = jax.vmap(lambda *a: heavy(*a), in_axes=axes, axis_size=q)(*picked)
            index = jnp.where(place < active, index, n)
            return [o.at[index].set(v, mode="drop") for o, v in zip(out, new)]

        return jax.lax.cond(first < active, work, lambda out: out, out), None

    return jax.lax.scan(chunk, list(out), jnp.arange(chunks) * q)[0]


def _jvp(primals, tangents, **params):
    moving = [i for i, t in enumerate(tangents) if type(t) is not ad.Zero]

    def run(*some):
        full = list(primals)
        for i, value in zip(moving, some):
            full[i] = value
        return _run(*full, **params)

    out, dout = jax.jvp(run, tuple(primals[i] for i in moving), tuple(tangents[i] for i in moving))
    return out, [
        ad.Zero(jax.core.ShapedArray(o.shape, d.dtype)) if d.dtype == jax.dtypes.float0 else d
        for o, d in zip(out, dout)
    ]


def _batch(args, dims, *, heavy, light, rows, bucket):
    n = next(a.shape[d] for a, d in zip(args, dims) if d is not None)
    pred, *operands = (a if d is None else jnp.moveaxis(a, d, 0) for a, d in zip(args, dims))
    varies, *batched = (d is not None for d in dims)
    if rows is None and not varies:  # one decision for all rows stays one decision
        axes = tuple(0 if b else None for b in batched)
        heavy, light = (jax.vmap(lambda *a, f=f: f(*a), in_axes=axes, axis_size=n) for f in (heavy, light))
        out = branch_p.bind(pred, *operands, heavy=heavy, light=light, rows=None, bucket=bucket)
    elif rows is None:
        out = branch_p.bind(pred, *operands, heavy=heavy, light=light, rows=tuple(batched), bucket=bucket)
    elif any(
        b and not row for b, row in zip(batched, rows)
    ):  # weights that differ between batches: one batch at a time
        again = partial(branch_p.bind, heavy=heavy, light=light, rows=rows, bucket=bucket)
        mapped = [a for a, b in zip((pred, *operands), (varies, *batched)) if b]

        def one(mapped):
            mapped = iter(mapped)
            return again(*(next(mapped) if b else a for a, b in zip((pred, *operands), (varies, *batched))))

        out = jax.lax.map(one, mapped)
    else:  # a batch of batches is one larger batch
        m = (pred.shape[1] if varies else pred.shape[0]) if rows else 1

        def flatten(a, b):
            if not b:
                a = jnp.broadcast_to(a, (n, *a.shape))
            return a.reshape(n * m, *a.shape[2:])

        flat = [flatten(a, b) if row else a for a, b, row in zip(operands, batched, rows)]
        out = branch_p.bind(flatten(pred, varies), *flat, heavy=heavy, light=light, rows=rows, bucket=bucket)
        out = [o.reshape(n, m, *o.shape[1:]) for o in out]
    return out, (0,) * len(out)


def _abstract(*avals, **params):
    shapes = jax.eval_shape(partial(_run, **params), *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals))
    return [jax.core.ShapedArray(s.shape, s.dtype) for s in shapes]


branch_p = Primitive("branch")
branch_p.multiple_results = True
branch_p.def_impl(lambda *args, **params: jax.jit(partial(_run, **params))(*args))
branch_p.def_abstract_eval(_abstract)
ad.primitive_jvps[branch_p] = _jvp
batching.primitive_batchers[branch_p] = _batch
mlir.register_lowering(branch_p, mlir.lower_fun(_run, multiple_results=True))
