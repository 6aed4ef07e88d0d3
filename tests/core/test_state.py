import json
import os
import tempfile
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import hypothesis
import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from anabranch.cell import Maybe
from anabranch.state import Packing, StateError, load, pack, read_meta, save

DTYPES = [
    "bool", "int2", "uint2", "int4", "uint4", "int8", "uint8", "int16", "uint16", "int32", "uint32",
    "float16", "bfloat16", "float32", "complex64", "float8_e4m3fn", "float8_e5m2", "float8_e4m3b11fnuz",
    "float4_e2m1fn",
]  # fmt: skip
FEW = settings(max_examples=30, deadline=None)


def bits(leaf):
    """Everything that can be seen of a leaf."""
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return "key", str(jax.random.key_impl(leaf)), leaf.shape, np.asarray(jax.random.key_data(leaf)).tobytes()
    if isinstance(leaf, (jax.Array, np.ndarray, np.generic)):
        array = np.asarray(leaf)
        return isinstance(leaf, jax.Array), type(leaf) is np.ndarray, array.dtype.name, array.shape, array.tobytes()
    return type(leaf), repr(leaf)


def same(a, b):
    return jax.tree.structure(a) == jax.tree.structure(b) and list(map(bits, jax.tree.leaves(a))) == list(
        map(bits, jax.tree.leaves(b))
    )


@st.composite
def arrays(draw):
    dtype = jnp.dtype(draw(st.sampled_from(DTYPES)))
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3))
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.frombuffer(draw(st.binary(min_size=size, max_size=size)), np.uint8)
    width = (
        jnp.finfo(dtype).bits if dtype.name.startswith("float4") else int("".join(filter(str.isdigit, dtype.name)) or 1)
    )
    if width < 8:
        raw = raw & ((1 << width) - 1)
        if dtype.name.startswith("int"):
            return jnp.asarray(raw.astype(np.int8) - (1 << (width - 1))).astype(dtype).reshape(shape)
    return jnp.asarray(np.ndarray(shape, dtype, raw.tobytes()))


keys = st.builds(
    lambda seed, n, impl: (
        jax.random.split(jax.random.key(seed, impl=impl), n) if n else jax.random.key(seed, impl=impl)
    ),
    st.integers(0, 99),
    st.integers(0, 3),
    st.sampled_from(["threefry2x32", "rbg"]),
)
numbers = st.one_of(st.integers(), st.floats(), st.booleans(), st.text(max_size=5), st.none())


def trees(leaves):
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.lists(inner, max_size=3).map(tuple),
            st.dictionaries(st.text(max_size=4), inner, max_size=3),
            st.dictionaries(st.integers(), inner, max_size=3),
            st.builds(Maybe, inner, inner),
        ),
        max_leaves=6,
    )


states = trees(st.one_of(arrays(), keys, numbers))


# Packing


@FEW
@given(states)
@hypothesis.example(float("nan"))
def test_packing_gives_back_every_bit(state):
    packing = Packing(state)
    row = packing.pack(state)
    assert row.shape == (packing.words,) and row.dtype == jnp.uint32
    assert same(packing.unpack(row), state)
    assert (packing.pack(packing.unpack(row)) == row).all()


def example():
    return {
        "w": jnp.array([1.5, -0.0, jnp.nan], jnp.float32),
        "half": jnp.array([[1.5], [-2.0]], jnp.bfloat16),
        "on": jnp.array(True),
        "small": jnp.array([-1, 127, -128], jnp.int8),
        "none": None,
        "empty": jnp.zeros((0, 4)),
        "key": jax.random.key(3),
        "raw": jax.random.PRNGKey(4),
        "static": 3,
        "pair": Maybe(jnp.int32(-7), jnp.array(False)),
    }


def test_words_are_counted_by_hand():
    # 3 floats, 2 halves, 1 bool, 3 bytes, nothing, nothing, 2 + 2 words of keys, nothing, an int and a bool
    assert Packing(example()).words == 3 + 2 + 1 + 3 + 0 + 0 + 2 + 2 + 0 + 2
    assert pack({"a": jnp.float32(1.0), "b": jnp.array([True, False])}).tolist() == [0x3F800000, 1, 0]
    assert pack(jnp.array([-1, 1], jnp.int8)).tolist() == [255, 1]


def test_packing_under_jit_and_vmap_does_no_arithmetic():
    packing = Packing(example())
    rows = jnp.stack([packing.pack({**example(), "w": jnp.arange(3.0) + i}) for i in range(3)])
    assert (jax.jit(jax.vmap(lambda row: packing.pack(packing.unpack(row))))(rows) == rows).all()
    stacked = jax.vmap(lambda row: packing.unpack(row)["w"])(rows)
    assert stacked.tolist() == [[0, 1, 2], [1, 2, 3], [2, 3, 4]] and stacked.dtype == jnp.float32
    allowed = {"bitcast_convert_type", "convert_element_type", "reshape", "slice", "concatenate", "squeeze"}
    allowed |= {"ne", "random_wrap", "random_unwrap", "jit"}  # ne: a word as a bool
    jaxpr = jax.make_jaxpr(lambda row: packing.pack(packing.unpack(row)))(rows[0])
    assert {eqn.primitive.name for eqn in jaxpr.eqns} <= allowed


def test_packing_takes_shapes_for_a_template():
    shapes = jax.eval_shape(lambda: {"a": jnp.zeros(3), "k": jax.random.key(0)})
    state = {"a": jnp.arange(3.0), "k": jax.random.key(5)}
    assert same(Packing(shapes).unpack(Packing(shapes).pack(state)), state)


def test_eight_byte_elements_take_two_words():
    with jax.enable_x64(True):
        state = {"a": jnp.array([0.1, -np.pi]), "b": jnp.int64(-(2**40)), "c": jnp.complex128(1 + 2j)}
        packing = Packing(state)
        assert packing.words == 4 + 2 + 4
        assert same(packing.unpack(packing.pack(state)), state)


def test_packing_refuses_another_state():
    packing = Packing({"a": jnp.zeros(3), "n": 1})
    with pytest.raises(StateError, match=r"state\['a'\]: expected float32\[3\], found float32\[4\]"):
        packing.pack({"a": jnp.zeros(4), "n": 1})
    with pytest.raises(StateError, match=r"state\['a'\]: expected float32\[3\], found int32\[3\]"):
        packing.pack({"a": jnp.zeros(3, int), "n": 1})
    with pytest.raises(StateError, match=r"state\['n'\]: expected the constant 1"):
        packing.pack({"a": jnp.zeros(3), "n": 2})
    with pytest.raises(StateError, match="structure"):
        packing.pack({"a": jnp.zeros(3)})
    with pytest.raises(StateError, match=r"expected a row uint32\[3\], found float32\[3\]"):
        packing.unpack(jnp.zeros(3))
    with pytest.raises(TypeError, match=r"state\['s'\]"):
        Packing({"s": np.array(["text"])})


# Files


@FEW
@given(states, st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5), max_size=3))
def test_a_file_gives_back_every_bit(state, meta):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state"
        save(path, state, meta)
        assert same(load(path, like=state), state)
        assert read_meta(path) == meta
        assert os.listdir(folder) == ["state"]
        if not any(isinstance(x, Maybe) for x in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, Maybe))):
            assert same(load(path), state)


SAVED = {"a": jnp.arange(4.0), "b": Maybe(jnp.array([1, 2], jnp.int8), jnp.array(True)), "n": 12, "t": "text"}


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_one_changed_byte_is_never_a_wrong_value(data):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state"
        save(path, SAVED, {"position": 7})
        content = bytearray(path.read_bytes())
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] ^= data.draw(st.integers(1, 255))
        path.write_bytes(content)
        for read in (lambda: load(path, like=SAVED), lambda: load(path), lambda: read_meta(path)):
            with pytest.raises(StateError):
                read()


def test_every_torn_file_is_refused(tmp_path):
    path = tmp_path / "state"
    save(path, SAVED)
    content = path.read_bytes()
    for length in range(0, len(content), 3):
        path.write_bytes(content[:length])
        with pytest.raises(StateError):
            load(path, like=SAVED)
    path.write_bytes(content + b"\0")
    with pytest.raises(StateError, match="torn or corrupt"):
        load(path, like=SAVED)


def test_a_foreign_file_is_refused(tmp_path):
    from safetensors.numpy import save_file

    save_file({"a": np.zeros(3, np.float32)}, tmp_path / "other")
    with pytest.raises(StateError, match=r"written by anabranch\.state\.save"):
        load(tmp_path / "other")
    (tmp_path / "text").write_text("not a state at all, but quite some text")
    with pytest.raises(StateError, match="expected a state file"):
        load(tmp_path / "text")
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "nothing")


def test_other_readers_of_the_format_can_open_it(tmp_path):
    state = {
        "a": jnp.arange(6.0).reshape(2, 3),
        "b": np.array([1, 2], np.int64),
        "c": jnp.ones(3, jnp.bfloat16),
        "n": 1,
    }
    save(tmp_path / "state", state, {"position": 3})
    with safe_open(tmp_path / "state", "np") as file:
        assert set(file.keys()) == {"state['a']", "state['b']", "state['c']"}
        np.testing.assert_array_equal(file.get_tensor("state['a']"), np.arange(6.0, dtype=np.float32).reshape(2, 3))
        np.testing.assert_array_equal(file.get_tensor("state['b']"), [1, 2])
        assert file.get_slice("state['c']").get_dtype() == "BF16"
        assert json.loads(file.metadata()["anabranch"])["meta"] == {"position": 3}


class Pair(NamedTuple):
    left: jax.Array
    right: jax.Array


class Filter(eqx.Module):
    taps: jax.Array
    length: int = eqx.field(static=True)


def test_named_nodes_need_like_and_must_agree_with_it(tmp_path):
    state = {"pair": Pair(jnp.zeros(2), jnp.ones(2)), "filter": Filter(jnp.ones(3), 3)}
    save(tmp_path / "s", state)
    assert same(load(tmp_path / "s", like=state), state)
    assert same(load(tmp_path / "s", like=jax.eval_shape(lambda: state)), state)
    with pytest.raises(StateError, match=r"state\['filter'\]: found a .*Filter, which only .* `like`"):
        load(tmp_path / "s")
    for like, message in [
        (
            {**state, "pair": Pair(jnp.zeros(2), jnp.ones(3))},
            r"state\['pair'\].right: expected float32\[3\], found float32\[2\]",
        ),
        (
            {**state, "pair": Pair(jnp.zeros(2), jnp.ones(2, int))},
            r"state\['pair'\].right: expected int32\[2\], found float32",
        ),
        (
            {**state, "pair": Pair(jnp.zeros(2), jax.random.key(0))},
            r"state\['pair'\].right: expected a key .*found float32",
        ),
        (
            {**state, "pair": Pair(jnp.zeros(2), None)},
            r"state\['pair'\].right: expected a NoneType, found float32\[2\]",
        ),
        ({**state, "pair": (jnp.zeros(2), jnp.ones(2))}, r"state\['pair'\]: expected a tuple, found a .*Pair"),
        ({**state, "filter": Filter(jnp.ones(3), 4)}, r"state\['filter'\]: expected .*'length': 4.*'length': 3"),
        ({"pair": state["pair"]}, r"state: expected a dict of 1 \('pair'\), found one of 2 \('filter', 'pair'\)"),
    ]:
        with pytest.raises(StateError, match=message):
            load(tmp_path / "s", like=like)


def test_numpy_and_python_leaves_come_back_as_what_they_were(tmp_path):
    state = {
        "wide": np.array([0.1], np.float64),
        "swapped": np.array([1.0, 2.0], ">f8"),
        "strided": np.arange(6)[::2],
        "scalar": np.float32(0.1),
        "big": 2**200,
        "nan": float("nan"),
        "ordered": OrderedDict(z=1, a=2),
    }
    save(tmp_path / "s", state)
    found = load(tmp_path / "s", like=state)
    assert found["wide"].dtype == np.float64 and type(found["wide"]) is np.ndarray
    assert found["swapped"].tolist() == [1.0, 2.0] and found["strided"].tolist() == [0, 2, 4]
    assert type(found["scalar"]) is np.float32 and found["scalar"] == np.float32(0.1)
    assert found["big"] == 2**200 and np.isnan(found["nan"]) and list(found["ordered"]) == ["z", "a"]
    found["wide"][0] = 2.0  # writable, as it was


def test_what_cannot_be_saved_is_named_and_nothing_is_written(tmp_path):
    for state, name in [
        ({"f": jnp.tanh}, r"state\['f'\]"),
        ({"a": [1, object()]}, r"state\['a'\]\[1\]"),
        ({"s": np.array(["text"])}, r"state\['s'\]"),
        ({"s": np.array([None])}, r"state\['s'\]"),
        ({(1, jnp): jnp.zeros(1)}, "its key"),
    ]:
        with pytest.raises(TypeError, match=name):
            save(tmp_path / "s", state)
    with pytest.raises(TypeError):
        save(tmp_path / "s", {}, meta=object())
    assert os.listdir(tmp_path) == []


def test_wide_jax_arrays_are_never_narrowed(tmp_path):
    with jax.enable_x64(True):
        save(tmp_path / "s", {"n": jnp.int64(2**40)})
    with pytest.raises(StateError, match=r"state\['n'\]: found int64"):
        load(tmp_path / "s")
    with jax.enable_x64(True):
        assert int(load(tmp_path / "s")["n"]) == 2**40


def test_a_crash_while_saving_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "s"
    save(path, {"n": 1})

    def crash(*args):
        raise OSError("the disk is full")

    for step in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, step, crash)
            with pytest.raises(OSError, match="full"):
                save(path, {"n": 2})
        assert load(path) == {"n": 1} and os.listdir(tmp_path) == ["s"]


def test_the_content_reaches_the_disk_before_the_name(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), replace(a, b)))
    save(tmp_path / "s", {"n": jnp.zeros(3)})
    assert calls == ["fsync", "replace", "fsync"]
    first = (tmp_path / "s").read_bytes()
    save(tmp_path / "s", {"n": jnp.zeros(3)})
    assert (tmp_path / "s").read_bytes() == first  # equal states make equal files
