import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anabranch.cell import Cell, Maybe, noise
from anabranch.export import ExportError, from_stablehlo, named, to_onnx, to_stablehlo

X = jnp.array([1.0, -2.0, 3.0])


class Recurrent(Cell):
    """A GRU beside a ring buffer: weights, dynamic indices, booleans, integers and a leaf that passes through."""

    gru: eqx.nn.GRUCell

    def init(self, *, key=None):
        return {"h": jnp.zeros(4), "ring": jnp.zeros((5, 3)), "n": jnp.int32(0), "key": jax.random.key(0)}

    def step(self, state, x):
        h = self.gru(x, state["h"])
        ring = state["ring"].at[state["n"] % 5].set(x)
        y = Maybe(jnp.cumsum(ring, 0).sum(), state["n"] >= 1)
        return {**state, "h": h, "ring": ring, "n": state["n"] + 1}, y


class Stateless(Cell):
    f: object = eqx.field(static=True)

    def init(self, *, key=None):
        return {"n": jnp.int32(0)}

    def step(self, state, x):
        return {"n": state["n"] + 1}, self.f(x, state["n"])


def recurrent():
    return Recurrent(eqx.nn.GRUCell(3, 4, key=jax.random.PRNGKey(1)))


def expected(cell, xs):
    """Named outputs of a few steps in JAX."""
    state = cell.init()
    for x in xs:
        state, y = cell.step(state, x)
        yield named("next", state) | named("y", y)


def agree(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_a_recurrent_cell_streams_in_onnxruntime(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("jax2onnx")
    cell = recurrent()
    data = to_onnx(cell, X, tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").read_bytes() == data
    session = runtime.InferenceSession(data, providers=["CPUExecutionProvider"])
    states = ["['h']", "['key']", "['n']", "['ring']"]
    assert [i.name for i in session.get_inputs()] == [f"state{s}" for s in states] + ["x"]
    names = [o.name for o in session.get_outputs()]
    assert names == [f"next{s}" for s in states] + ["y.valid", "y.value"]
    feed = {name: np.asarray(leaf) for name, leaf in named("state", cell.init()).items()}
    xs = [X, 2 * X, -X, X + 1, X - 1, X / 3, X * 0]  # once around the ring
    for x, want in zip(xs, expected(cell, xs)):
        found = dict(zip(names, session.run(names, {**feed, "x": np.asarray(x)})))
        agree(found, want)
        feed = {name: found[name.replace("state", "next")] for name in feed}


def test_stablehlo_goes_round(tmp_path):
    cell = recurrent()
    data = to_stablehlo(cell, X)
    step = from_stablehlo(data)
    values = named("state", cell.init())
    xs = [X, 2 * X, -X]
    for x, want in zip(xs, expected(cell, xs)):
        found = step({**values, "x": x})
        agree(found, want)
        values = {name: found[name.replace("state", "next")] for name in values}
    # It stands alone: another process needs neither the cell nor this package.
    (tmp_path / "program").write_bytes(data)
    code = (
        "import jax.export, numpy as np, sys;"
        "p = jax.export.deserialize(bytearray(open(sys.argv[1], 'rb').read()));"
        "print(sorted(jax.tree.unflatten(p.in_tree, p.in_avals)[0][0]))"
    )
    out = subprocess.run([sys.executable, "-c", code, tmp_path / "program"], capture_output=True, text=True, check=True)
    assert "state['ring']" in out.stdout and "'x'" in out.stdout


def test_what_onnx_cannot_say_is_named():
    pytest.importorskip("jax2onnx")
    callback = Stateless(lambda x, n: jax.pure_callback(lambda x: x, x, x))
    with pytest.raises(ExportError, match="`pure_callback` has no ONNX form"):
        to_onnx(callback, X)
    with pytest.raises(ExportError, match="StableHLO"):
        to_stablehlo(callback, X)
    drawing = Stateless(lambda x, n: x + jax.random.normal(noise(jax.random.PRNGKey(0), n), (3,)))
    with pytest.raises(ExportError, match="BitCast"):
        to_onnx(drawing, X)
    found = from_stablehlo(to_stablehlo(drawing, X))({"state['n']": jnp.int32(3), "x": X})
    assert (found["y"] == drawing.step({"n": jnp.int32(3)}, X)[1]).all()


def test_a_conversion_that_computes_something_else_is_refused(monkeypatch):
    pytest.importorskip("jax2onnx")
    import anabranch.export as export

    convert = export._converter()

    def wrong(f, inputs, **options):
        return convert(lambda *args: [y * 1.01 if y.dtype == jnp.float32 else y for y in f(*args)], inputs)

    monkeypatch.setattr(export, "_converter", lambda: wrong)
    with pytest.raises(ExportError, match=r"y differs by up to 0\.09 between JAX and onnxruntime"):
        to_onnx(Stateless(lambda x, n: 3 * x), X)


def test_host_cells_cannot_be_exported():
    class Host(Stateless):
        host = True

    for export in (to_onnx, to_stablehlo):
        with pytest.raises(ExportError, match="runs on the host"):
            export(Host(lambda x, n: x), X)


def test_foreign_bytes_are_no_program():
    with pytest.raises(ExportError, match="expected a program"):
        from_stablehlo(b"nothing of the kind")


def test_the_extra_is_named_when_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ModuleNotFoundError, match=r"anabranch\[onnx\]"):
        to_onnx(recurrent(), X)


def test_converting_leaves_jax_as_it_was():
    pytest.importorskip("jax2onnx")
    to_onnx(recurrent(), X)
    assert jnp.cumsum(X, 0).tolist() == [1.0, -1.0, 2.0]  # the converter's own version takes no second argument
    assert jnp.cumsum.__module__.startswith("jax.")


def test_branch_is_exported_as_a_condition():
    from anabranch.branch import branch

    class Skips(Cell):
        def init(self, *, key=None):
            return jnp.zeros(3)

        def step(self, state, x):
            state = branch(x.sum() > 0, lambda s: jnp.tanh(s + x), lambda s: s, state)
            return state, state * 2

    assert to_onnx(Skips(), jnp.ones(3))
