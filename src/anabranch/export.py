"""A cell's step for other runtimes: ONNX, StableHLO.

Both take the state in and give the new state out, leaf by leaf under stable names, so that whoever runs the file keeps
the state between the calls. A leaf is named by its path: `state['mean']`, `x.target.value`; the new state is
`next['mean']`, the output `y`. The first state is `cell.init()`, which `anabranch.state.save` writes.

    >>> import equinox as eqx
    >>> class Sum(Cell):
    ...     def init(self, *, key=None):
    ...         return {"sum": jnp.zeros(2)}
    ...
    ...     def step(self, state, x):
    ...         total = state["sum"] + x
    ...         return {"sum": total}, total
    >>> step = from_stablehlo(to_stablehlo(Sum(), jnp.ones(2)))
    >>> out = step({"state['sum']": jnp.array([1.0, 2.0]), "x": jnp.ones(2)})
    >>> out["y"].tolist(), out["next['sum']"].tolist()
    ([2.0, 3.0], [2.0, 3.0])
"""

import importlib
import logging
import os
import pkgutil
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.extend.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray, PyTree

from anabranch.branch import plain
from anabranch.cell import Cell


class ExportError(Exception):
    """A step that cannot be expressed in the target format. The message says what stands in the way."""


def to_onnx(cell: Cell, x: Any, path: str | os.PathLike | None = None, *, key: PRNGKeyArray | None = None) -> bytes:
    """One step of `cell` as an ONNX model, checked in onnxruntime before it is returned.

    Arguments:
        cell: any traceable cell. Its fields become constants of the model.
        x: one input, for its shapes, and for the check.
        path: where to write the model, if anywhere.
        key: given to `cell.init`.

    Returns:
        The serialised model. Typed random keys travel as their uint32 data.

    Raises:
        ModuleNotFoundError: without the extra `onnx`.
        ExportError: if the cell runs on the host, a primitive has no ONNX form, onnxruntime does not know an operator,
            or two steps in onnxruntime differ from JAX by more than rounding.
    """
    try:
        onnx, runtime = importlib.import_module("onnx"), importlib.import_module("onnxruntime")
        convert = _converter()
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("to_onnx needs the extra `onnx`: pip install 'anabranch[onnx]'") from error
    step, inputs, outputs = _named_step(cell, x, key)
    values = list(inputs.values())
    # Traced here, because the converter would trace with its own substitutes for jax.numpy, which take fewer arguments.
    with plain():
        closed = jax.make_jaxpr(lambda *args: list(map(step(dict(zip(inputs, args))).__getitem__, outputs)))(*values)
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        model = convert(jax.extend.core.jaxpr_as_fun(closed), [jax.typeof(v) for v in values], model_name=_title(cell))
    except Exception as error:
        found = re.search(r"primitive '([^']+)'", str(error))
        what = f"the primitive `{found[1]}` has no ONNX form" if found else f"{type(error).__name__}: {_line(error)}"
        raise ExportError(f"{_title(cell)} cannot be converted to ONNX: {what}") from error
    finally:
        logging.disable(level)
    _rename(onnx, model, list(inputs), list(outputs))
    data = model.SerializeToString()
    try:
        options = runtime.SessionOptions()
        options.log_severity_level = 3
        session = runtime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        _verify(cell, jax.jit(step), lambda args: dict(zip(outputs, session.run(list(outputs), args))), inputs)
    except ExportError:
        raise
    except Exception as error:
        raise ExportError(f"{_title(cell)} does not run in onnxruntime: {_line(error)}") from error
    if path is not None:
        Path(path).write_bytes(data)
    return data


def to_stablehlo(cell: Cell, x: Any, *, key: PRNGKeyArray | None = None) -> bytes:
    """One step of `cell` as serialised StableHLO, for `from_stablehlo` or any runtime that reads `jax.export`.

    Arguments:
        cell: any traceable cell. Its fields become constants of the program.
        x: one input, for its shapes.
        key: given to `cell.init`.

    Raises:
        ExportError: if the cell runs on the host or calls back to Python.
    """
    step, inputs, _ = _named_step(cell, x, key)
    try:
        return bytes(jax.export.export(jax.jit(step))(inputs).serialize())
    except Exception as error:
        raise ExportError(f"{_title(cell)} cannot be exported to StableHLO: {_line(error)}") from error


def from_stablehlo(data: bytes) -> Callable[[dict[str, Array]], dict[str, Array]]:
    """The step that `to_stablehlo` wrote: a function from named state and input leaves to named new leaves.

    It needs neither the class of the cell nor its weights.

    Raises:
        ExportError: if the bytes are not an exported program.
    """
    try:
        exported = jax.export.deserialize(bytearray(data))
    except Exception as error:
        raise ExportError(f"expected a program written by to_stablehlo, found {len(data)} other bytes") from error
    return jax.jit(exported.call)


def named(prefix: str, tree: PyTree) -> dict[str, Array]:
    """The leaves of a state, an input or an output under the names that the exported step uses."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {prefix + jax.tree_util.keystr(path): _data(leaf) for path, leaf in leaves}


def _named_step(cell: Cell, x: Any, key: Any) -> tuple[Callable, dict[str, Array], dict[str, Any]]:
    """The step from names to names, an example of what it takes, and the shapes of what it gives."""
    if cell.host:
        raise ExportError(f"{_title(cell)} runs on the host: its step cannot be traced, so it cannot be exported")
    template = (cell.init(key=key), x)
    leaves, tree = jax.tree.flatten(template)
    inputs = named("state", template[0]) | named("x", template[1])

    def step(values: dict[str, Array]) -> dict[str, Array]:
        typed = [_typed(value, leaf) for value, leaf in zip((values[name] for name in inputs), leaves)]
        state, y = cell.step(*jax.tree.unflatten(tree, typed))
        return named("next", state) | named("y", y)

    return step, inputs, jax.eval_shape(step, inputs)


def _verify(cell: Cell, ours: Callable, theirs: Callable, inputs: dict[str, Array]) -> None:
    """Two steps in a row, the second one from the state that the first one gave, in both runtimes."""
    mine, other = dict(inputs), {name: np.asarray(value) for name, value in inputs.items()}
    for _ in range(2):
        expected, found = ours(mine), theirs(other)
        for name, value in expected.items():
            a, b = np.asarray(value), np.asarray(found[name])
            if a.shape != b.shape or a.dtype != b.dtype:
                raise ExportError(
                    f"{_title(cell)}: {name} is {a.dtype}{a.shape} in JAX and {b.dtype}{b.shape} in onnxruntime"
                )
            if a.dtype.kind in "fc":
                same = np.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)
            else:
                same = np.array_equal(a, b)
            if not same:
                gap = np.nanmax(np.abs(a.astype(np.float64) - b.astype(np.float64)))
                raise ExportError(f"{_title(cell)}: {name} differs by up to {gap:.3g} between JAX and onnxruntime")
        for name in inputs:
            after = name.replace("state", "next", 1)
            if name.startswith("state") and after in expected:
                mine[name], other[name] = expected[after], found[after]


def _rename(onnx: Any, model: Any, inputs: list[str], outputs: list[str]) -> None:
    """Give a graph our names through identities, for a value that is passed through is both an input and an output."""
    graph = model.graph
    if len(graph.input) != len(inputs) or len(graph.output) != len(outputs):
        raise ExportError(f"the converter dropped inputs or outputs: expected {inputs} to {outputs}")
    first = []
    for value, name in zip(graph.input, inputs):
        inner = f"{value.name}.inner"
        first.append(onnx.helper.make_node("Identity", [name], [value.name], name=inner))
        value.name = name
    last = []
    for value, name in zip(graph.output, outputs):
        last.append(onnx.helper.make_node("Identity", [value.name], [name], name=f"{name}.outer"))
        value.name = name
    body = list(graph.node)
    del graph.node[:]
    graph.node.extend([*first, *body, *last])


def _converter() -> Callable:
    module = importlib.import_module("jax2onnx")
    plugins = importlib.import_module("jax2onnx.plugins.plugin_system")
    if not getattr(plugins, "_already_imported_plugins", True):
        # A step is traced to JAX's own primitives before it is converted: the plugins for layers of other libraries are
        # not needed, and importing them takes ten seconds. Importing the others leaves a changed `jnp.cumsum` behind.
        jax_plugins = importlib.import_module("jax2onnx.plugins.jax")
        before = [(space, dict(vars(space))) for space in (jax, jax.numpy, jax.lax, jax.nn, jax.random)]
        for found in pkgutil.walk_packages(jax_plugins.__path__, "jax2onnx.plugins.jax."):
            importlib.import_module(found.name)
        for space, names in before:
            for name, value in names.items():
                if vars(space)[name] is not value:
                    setattr(space, name, value)
        setattr(plugins, "_already_imported_plugins", True)  # noqa: B010
    return module.to_onnx


def _data(leaf: Any) -> Array:
    leaf = jnp.asarray(leaf)
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def _typed(value: Array, leaf: Any) -> Array:
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(value, impl=str(jax.random.key_impl(leaf)))
    return value


def _title(cell: Cell) -> str:
    return type(cell).__name__


def _line(error: BaseException) -> str:
    """The first line of a message that may go on for pages."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
