"""Whatever comes over the wire is parsed or refused with a `ValueError`, and nothing else happens."""

import json
import textwrap

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from anabranch.run import oip, wire
from anabranch.run.config import ServedCellConfig
from anabranch.run.served_cell import END, START, ServedCell

CELL = """
import jax.numpy as jnp
from anabranch import Cell

class Sum(Cell):
    def init(self, *, key=None):
        return jnp.zeros(())

    def step(self, state, x):
        state = state + x["a"].sum() + x["b"]
        return state, state

def example():
    return {"a": jnp.zeros(2), "b": jnp.int32(0)}
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wire")
    (folder / "wire_cell.py").write_text(textwrap.dedent(CELL))
    config = {"name": "sum", "cell": "wire_cell:Sum", "input": "wire_cell:example", "capacity": 64}
    return ServedCell(ServedCellConfig.model_validate(config), folder)


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "b", "x", "stream"]), inner),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(said=ANY | st.fixed_dictionaries({"stream": ANY, "x": ANY}, optional={"start": ANY, "end": ANY}))
@example(said={"stream": "s", "x": {"a": [1, 2], "b": 2**31}})
@example(said={"stream": "s", "x": {"a": [1e39, 0], "b": 0}})
@example(said={"stream": "s", "x": {"a": [[1, 2]], "b": True}})
def test_json_events(served, said):
    try:
        parsed = wire.parse(served, said, "ann", ())
    except ValueError:
        return
    assert parsed.stream == parsed.event.key == f"ann/{said['stream']}" and len(parsed.event.data) == served.width


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=64))
@example(data=b"\x01\x00\x00\xff" + bytes(12))
@example(data=b"\x00\x00\x00" + bytes(12))
def test_frames(served, data):
    try:
        found = wire.parse_frame(served, None, data)
    except ValueError:
        return
    assert sum(3 + len(p.event.key.encode()) - 1 + served.width for p in found) == len(data)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.text(min_size=1, max_size=5), st.integers(0, 3)), max_size=5))
def test_frames_say_what_was_said(served, events):
    data = b"".join(
        len(name.encode()).to_bytes(2, "little") + bytes([flags]) + name.encode() + bytes([i] * served.width)
        for i, (name, flags) in enumerate(events)
    )
    found = wire.parse_frame(served, "ann", data)
    assert [(p.event.key, p.event.flags) for p in found] == [(f"ann/{name}", flags) for name, flags in events]
    assert [p.event.data for p in found] == [bytes([i] * served.width) for i in range(len(events))]


TENSOR = st.fixed_dictionaries(
    {},
    optional={
        "name": ANY,
        "shape": ANY | st.lists(st.integers(-2, 5), max_size=3),
        "datatype": st.sampled_from([*oip.TYPES, "BYTES"]),
        "data": ANY,
        "parameters": ANY | st.fixed_dictionaries({"binary_data_size": st.integers(-5, 50)}),
    },
)
REQUEST = st.fixed_dictionaries(
    {"inputs": st.lists(TENSOR, max_size=3) | ANY}, optional={"parameters": ANY, "outputs": ANY}
)


@settings(max_examples=300, deadline=None)
@given(said=REQUEST, rest=st.binary(max_size=30), cut=st.none() | st.integers(-5, 300))
def test_inference_requests(served, said, rest, cut):
    head = json.dumps(said).encode()
    length = None if cut is None else str(len(head) if cut > 100 else cut)
    try:
        asked = oip.read(head + rest, length)
        asked.sequence.events("ann", asked.inputs, served)
    except ValueError:
        pass


def test_an_inference_request_there_and_back(served):
    a = np.array([[1, 2], [3, 4]], np.float32)
    said = {
        "id": "7",
        "parameters": {"sequence_id": "s", "sequence_start": True, "binary_data_output": True},
        "inputs": [
            {"name": "a", "datatype": "FP32", "shape": [2, 2], "parameters": {"binary_data_size": 16}},
            {"name": "b", "datatype": "INT32", "shape": [2], "data": [5, 6]},
        ],
    }
    head = json.dumps(said).encode()
    asked = oip.read(head + a.tobytes(), str(len(head)))
    events = asked.sequence.events("ann", asked.inputs, served)
    assert [event.flags for event in events] == [START, 0] and {event.key for event in events} == {"ann/s"}
    answers = served.step(served.prepare(events))
    assert [n for n, _ in answers] == [1, 2]
    outputs = oip.arrays(served.outputs, [data for _, data in answers])
    np.testing.assert_array_equal(outputs[0], [8, 21])
    head, data, length = oip.write("sum", asked, served.outputs, outputs)
    assert length == len(head) and json.loads(head)["outputs"][0]["parameters"] == {"binary_data_size": 8}
    np.testing.assert_array_equal(np.frombuffer(data, np.float32), [8, 21])


def test_a_stream_begins_and_ends_where_it_is_said_to(served):
    def step(*events):
        made = [wire.CellEvent(f"/{key}", np.float32([1, 0]).tobytes() + bytes(4), flags) for key, flags in events]
        return [n for n, _ in served.step(served.prepare(made))]

    assert step(("p", 0), ("q", 0), ("p", 0)) == [1, 1, 2]
    assert step(("p", START), ("q", 0), ("p", 0), ("p", START), ("p", END), ("p", 0)) == [1, 2, 2, 1, 2, 1]
    assert step(("q", START | END), ("q", 0)) == [1, 1]
