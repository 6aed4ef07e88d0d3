"""What one step of a cell costs, as its compiled form says.

>>> import jax.numpy as jnp
>>> class Affine(Cell):
...     weight: jax.Array
...
...     def init(self, *, key=None):
...         return {"last": jnp.zeros(64)}
...
...     def step(self, state, x):
...         return {"last": x}, self.weight @ x
>>> c = cost(Affine(jnp.ones((128, 64))), jnp.ones(64))
>>> c.state_bytes, c.flops
(256, 16384.0)
"""

from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jax.extend.core import jaxpr_as_fun
from jaxtyping import PRNGKeyArray, PyTree

from anabranch.cell import Cell


@dataclass(frozen=True)
class Cost:
    """The cost of one step of one stream.

    The counts are those of XLA for the compiled step, which stands for what is *executed*: of a conditional the dearer
    branch, of a loop every iteration where their number is known beforehand, and otherwise one. None where the cell
    runs on the host and nothing is compiled, or where the backend does not say.
    """

    state_bytes: int
    """Memory of one stream's state, in bytes."""
    flops: float | None
    """Floating-point operations a step."""
    bytes: float | None
    """Bytes read and written a step, weights included."""
    temporaries: int | None
    """Bytes of scratch memory that a step needs beside its inputs and outputs."""

    def __str__(self) -> str:
        return (
            f"state {_units(self.state_bytes, 'B', 1024)}, {_units(self.flops, 'FLOP', 1000)} a step, "
            f"{_units(self.bytes, 'B', 1024)} moved, {_units(self.temporaries, 'B', 1024)} temporary"
        )


def cost(cell: Cell, x: Any, *, key: PRNGKeyArray | None = None) -> Cost:
    """The cost of one step of `cell` on the input `x`.

    Arguments:
        cell: any cell; its array fields are arguments of the compiled step, so reading weights counts as bytes moved.
        x: one input, or its shapes.
        key: given to `cell.init`.
    """
    if cell.host:
        return Cost(nbytes(cell.init(key=key)), None, None, None)
    weights, static = eqx.partition(cell, eqx.is_array)
    state = jax.eval_shape(lambda: cell.init(key=key))
    step = jax.jit(lambda weights, state, x: eqx.combine(weights, static).step(state, x))
    traced = step.trace(weights, state, x)
    compiled = traced.lower().compile()
    counts, memory = _counts(compiled), compiled.memory_analysis()
    if counts is not None:
        counts += _repeats(traced.jaxpr.jaxpr)
    flops, moved = (None, None) if counts is None else map(float, counts)
    return Cost(nbytes(state), flops, moved, None if memory is None else memory.temp_size_in_bytes)


def nbytes(state: PyTree) -> int:
    """Memory of the arrays of a state, in bytes; Python numbers on the host are not counted."""
    leaves = [leaf for leaf in jax.tree.leaves(state) if hasattr(leaf, "shape")]
    return sum(_nbytes(leaf) for leaf in leaves)


def _counts(compiled: Any) -> np.ndarray | None:
    """FLOPs and bytes moved, as XLA counts them."""
    counts = compiled.cost_analysis()
    return np.array([counts.get("flops", 0.0), counts.get("bytes accessed", 0.0)]) if counts else None


def _repeats(jaxpr: Any) -> np.ndarray:
    """What XLA leaves out: it counts the body of a loop once, however often it runs."""
    extra = np.zeros(2)
    for equation in jaxpr.eqns:
        params = equation.params
        if equation.primitive.name == "scan":
            body, times = params["jaxpr"], params["length"] - params["unroll"]
            if times > 0:
                shapes = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in body.in_avals]
                counts = _counts(jax.jit(jaxpr_as_fun(body)).lower(*shapes).compile())
                extra += times * (0.0 if counts is None else counts)
            extra += params["length"] * _repeats(body.jaxpr)
        elif equation.primitive.name == "cond":
            extra += max((_repeats(branch.jaxpr) for branch in params["branches"]), key=lambda counts: counts[0])
        elif "jaxpr" in params or "call_jaxpr" in params:
            inner = params.get("jaxpr", params.get("call_jaxpr"))
            extra += _repeats(getattr(inner, "jaxpr", inner))
    return extra


def _nbytes(leaf: Any) -> int:
    if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.eval_shape(jax.random.key_data, leaf)
    return int(np.prod(leaf.shape, dtype=np.int64)) * leaf.dtype.itemsize


def _units(value: float | None, unit: str, base: int) -> str:
    if value is None:
        return f"? {unit}"
    prefixes = ["", "k", "M", "G", "T", "P"] if base == 1000 else ["", "Ki", "Mi", "Gi", "Ti", "Pi"]
    size, i = float(value), 0
    while abs(size) >= base and i < len(prefixes) - 1:
        size, i = size / base, i + 1
    return f"{size:.3g} {prefixes[i]}{unit}" if i else f"{size:g} {unit}"
