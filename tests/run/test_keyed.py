"""`Keyed` must equal a plain loop over the events, whatever the batches, the skew, the keys and the room."""

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch import Cell, noise
from anabranch.cell import Learner
from anabranch.combine import Delay
from anabranch.run.keyed import Keyed
from anabranch.run.spill import Spill

D = 3


class Recurrent(Cell):
    """A small nonlinear recurrence: any mistake in order or row shows in every later output."""

    w: jax.Array

    def __init__(self):
        self.w = jax.random.normal(jax.random.PRNGKey(1), (D, D))

    def init(self, *, key=None):
        return {"h": jnp.zeros(D), "n": jnp.zeros((), jnp.int32), "odd": jnp.zeros((), bool)}

    def step(self, state, x):
        h = jnp.tanh(self.w @ state["h"] + x)
        n = state["n"] + 1
        return {"h": h, "n": n, "odd": ~state["odd"]}, {"h": h, "n": n}


class Random(Cell):
    """Its initial state is drawn."""

    def init(self, *, key=None):
        return jax.random.normal(key, (2,))

    def step(self, state, x):
        return state, state + x


CELL = Recurrent()
STEP = jax.jit(lambda state, x: CELL.step(state, x))


def sequential(keys, xs):
    states, out = {}, []
    for key, x in zip(keys, xs):
        state, y = STEP(states.get(key, CELL.init()), x)
        states[key] = state
        out.append(np.asarray(y["h"]))
    return np.stack(out), states


def stream(n, keys, skew, seed=0):
    rng = np.random.default_rng(seed)
    draw = {
        "uniform": rng.integers(0, keys, n),
        "zipf": np.minimum(rng.zipf(1.5, n), keys) - 1,
        "one": np.zeros(n, int),
    }
    return draw[skew], rng.normal(size=(n, D)).astype(np.float32)


def run(keyed, keys, xs, sizes):
    out, start = [], 0
    for size in sizes:
        out.append(keyed(keys[start : start + size], xs[start : start + size])["h"])
        start += size
    return np.concatenate(out)


@pytest.mark.parametrize("form", ["loop", "waves"])
@pytest.mark.parametrize("skew", ["uniform", "zipf", "one"])
def test_equals_a_sequential_loop(form, skew):
    keys, xs = stream(600, 300, skew)
    expected, states = sequential(keys, xs)
    for sizes in ([600], [1, 7, 92, 500]):
        keyed = Keyed(CELL, 300, form=form)
        np.testing.assert_allclose(run(keyed, keys, xs, sizes), expected, atol=1e-6)
        assert len(keyed) == len(states)
        some = int(keys[-1])
        np.testing.assert_allclose(keyed.state(some)["h"], states[some]["h"], atol=1e-6)
        assert int(keyed.state(some)["n"]) == int(states[some]["n"])


@pytest.mark.parametrize("skew", ["uniform", "zipf", "one"])
def test_the_form_is_chosen_by_arithmetic_and_changes_nothing(skew, monkeypatch):
    keys, xs = stream(600, 300, skew)
    expected, states = sequential(keys, xs)
    monkeypatch.setattr("anabranch.run.keyed.LOOP_FLOPS", 1)
    keyed = Keyed(CELL, 300, threads=3)  # sharded, before it is known that it will run in waves
    np.testing.assert_allclose(run(keyed, keys, xs, [1, 99, 500]), expected, atol=1e-6)
    assert keyed.form(xs[0]) == "waves"
    for key, state in states.items():
        np.testing.assert_allclose(keyed.state(int(key))["h"], state["h"], atol=1e-6)


@pytest.mark.parametrize("memory", [1000, 10, 0])
def test_keys_beyond_capacity_come_back_bit_for_bit(memory, tmp_path):
    keys, xs = stream(900, 200, "uniform")
    sizes = [37] * 24 + [12]
    roomy, tight = Keyed(CELL, 200, threads=1), Keyed(CELL, 50, threads=1, memory=memory, folder=tmp_path)
    np.testing.assert_array_equal(run(tight, keys, xs, sizes), run(roomy, keys, xs, sizes))
    assert tight.spilled == len(tight) - 50 and roomy.spilled == 0
    for key in range(0, 200, 7):
        np.testing.assert_array_equal(tight.state(key)["h"], roomy.state(key)["h"])
    # The least recently used have left.
    recent = set(keys[-12:].tolist())
    ready = {tight._keys[i] for i in tight._owner.tolist() if i >= 0}
    assert recent <= ready


def test_a_batch_of_more_keys_than_there_is_room_for():
    keys, xs = np.arange(40), stream(40, 40, "uniform")[1]
    np.testing.assert_allclose(Keyed(CELL, 7)(keys, xs)["h"], sequential(keys, xs)[0], atol=1e-6)


def test_shards_do_not_change_results():
    keys, xs = stream(500, 300, "zipf")
    one, two = Keyed(CELL, 256, threads=1), Keyed(CELL, 256, threads=2)
    np.testing.assert_array_equal(one(keys, xs)["h"], two(keys, xs)["h"])


@pytest.mark.parametrize(
    "keys",
    [
        ["a", "b", "a", "ü"],
        [1, 2, 1, -(2**40)],
        [("JFK", 1), ("JFK", 2), ("JFK", 1), ("LGA", 1)],
        [1, "1", 1, b"1"],
        np.array(["x", "y", "x", "z"]),
        pa.array(["x", "y", "x", "z"]).dictionary_encode(),
        pa.chunked_array([["x", "y"], ["x", "z"]]),
    ],
    ids=["str", "int", "tuple", "mixed", "numpy", "dictionary", "chunked"],
)
def test_keys_of_any_hashable_type(keys):
    keyed = Keyed(CELL, 10)
    assert keyed(keys, np.zeros((4, D), np.float32))["n"].tolist() == [1, 1, 2, 1]
    assert len(keyed) == 3


def test_initial_states_are_drawn_by_key_and_nothing_else():
    a, b = Keyed(Random(), 10, seed=3), Keyed(Random(), 2, seed=3)
    zeros = np.zeros((3, 2), np.float32)
    first = a(["u", "v", "w"], zeros)
    assert not np.array_equal(first[0], first[1])
    other = b(["w", "u", "v"], zeros)
    np.testing.assert_array_equal(first[[2, 0, 1]], other)
    assert not np.array_equal(Keyed(Random(), 2, seed=4)(["u"], zeros[:1])[0], first[0])
    assert noise(jax.random.PRNGKey(0), 1, "a").shape == (2,)


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(1, 20), st.integers(0, 2)), min_size=1, max_size=12),
    st.integers(1, 40),
)
def test_changed_and_restore(batches, capacity):
    """The changes since the last call, replayed in order over an empty runtime, give back every state, and no other."""
    rng = np.random.default_rng(1)
    keyed, saved, steps = Keyed(CELL, capacity, threads=1, memory=5), [], {}
    for low, count, then in batches:
        keys = rng.integers(low, low + 15, count)
        keyed(keys, rng.normal(size=(count, D)).astype(np.float32))
        for key in keys.tolist():
            steps[key] = steps.get(key, 0) + 1
        if then > 0:
            leave = [*rng.choice(keys, min(count, 4), replace=False).tolist(), 99]
            assert keyed.forget(leave) == sum(steps.pop(key, None) is not None for key in set(leave))
        if then > 1:
            saved.append(jax.tree.map(np.copy, keyed.changed()))
    saved.append(jax.tree.map(np.copy, keyed.changed()))
    assert len(keyed.changed().numbers) == 0
    copy = Keyed(CELL, 3, threads=1, memory=2)
    for rows in saved:
        copy.restore(rows._replace(keys=[int(key) for key in rows.keys]))
    whole = keyed.everything()
    assert sorted(whole.keys) == sorted(copy.everything().keys) == sorted(steps)
    assert len(keyed) == len(copy) == len(steps)
    for key in whole.keys:
        assert int(keyed.state(key)["n"]) == steps[key]
        jax.tree.map(np.testing.assert_array_equal, keyed.state(key), copy.state(key))


def test_spill_keeps_what_came_last_in_memory(tmp_path):
    spill = Spill(words=1, memory=4, folder=tmp_path)
    where = {}
    for i in range(10):
        moved, places = spill.put(np.array([[i]], np.uint32), np.array([i]))
        where.update(zip(moved.tolist(), places.tolist()))
    assert [i for i in where if where[i] < 4] == [6, 7, 8, 9]
    assert spill.take(np.array([where[0], where[9], where[5]])).ravel().tolist() == [0, 9, 5]


class Counting(Learner):
    """A cell on the host."""

    host = True

    def init(self, *, key=None):
        return 0

    def step(self, state, x):
        return state + 1, np.float32(state + x)


def test_cells_on_the_host():
    keyed = Keyed(Counting(), 10)
    assert keyed(["a", "b", "a"], np.zeros(3, np.float32)).tolist() == [0, 0, 1]
    assert len(keyed) == 2 and keyed.state("a") == 2
    with pytest.raises(TypeError, match="cannot be saved"):
        keyed.changed()


def test_bad_input():
    class Coupled(Recurrent):
        coupled = True

    with pytest.raises(ValueError, match="coupled"):
        Keyed(Coupled(), 10)
    with pytest.raises(ValueError, match="capacity"):
        Keyed(CELL, 0)
    with pytest.raises(ValueError, match="form"):
        Keyed(CELL, 10, form="fast")
    keyed = Keyed(CELL, 10)
    with pytest.raises(ValueError, match="event 1 is null"):
        keyed(["a", None], np.zeros((2, D), np.float32))
    with pytest.raises(ValueError, match="2 keys came with inputs of length"):
        keyed(["a", "b"], np.zeros((3, D), np.float32))
    with pytest.raises(ValueError, match="at least one event"):
        keyed([], np.zeros((0, D), np.float32))
    with pytest.raises(KeyError, match="never"):
        keyed.state("never")
    with pytest.raises(ValueError, match="words"):
        keyed.restore(keyed.everything()._replace(rows=np.zeros((0, 1), np.uint32)))
    keyed(["a", "b"], np.zeros((2, D), np.float32))
    saved = keyed.everything()
    with pytest.raises(ValueError, match="key number 1, but no name"):
        Keyed(CELL, 10).restore(saved._replace(named=saved.named[:1], keys=["a"]))
    with pytest.raises(ValueError, match="2 numbers come with 1 keys"):
        Keyed(CELL, 10).restore(saved._replace(keys=["a"]))
    with pytest.raises(ValueError, match="'a' is saved under two numbers"):
        Keyed(CELL, 10).restore(saved._replace(keys=["a", "a"]))


class Loops(Cell):
    """Its step ends only for a state that `init` made: all zeros would be stepped for ever."""

    def init(self, *, key=None):
        return jnp.ones((), jnp.int32)

    def step(self, state, x):
        return state, jax.lax.while_loop(lambda c: c < 100, lambda c: c + state, jnp.zeros((), jnp.int32))


@pytest.mark.parametrize("form", ["loop", "waves"])
def test_padding_steps_a_state_like_any_other(form):
    assert Keyed(Loops(), 10, form=form)(["a", "b", "a"], np.zeros(3, np.float32)).tolist() == [100] * 3


def test_a_cell_may_hold_the_description_of_an_array():
    last = Keyed(Delay(1, like=jax.ShapeDtypeStruct((2,), jnp.float32)), capacity=10)
    assert last(["a", "a"], np.array([[1, 2], [3, 4]], np.float32)).tolist() == [[0, 0], [1, 2]]


def test_waves_are_for_keys_that_rarely_repeat(monkeypatch):
    from anabranch.run import keyed

    taken = []
    for name in ("_wave", "_loop"):
        step = getattr(keyed, name)
        monkeypatch.setattr(keyed, name, lambda *args, name=name, step=step: taken.append(name) or step(*args))
    monkeypatch.setattr(keyed, "LOOP_FLOPS", -1)
    last = Keyed(Delay(1, like=jnp.zeros(())), capacity=500, threads=1)
    last(list(range(200)), np.zeros(200, np.float32))
    last([0, 1] * 100, np.zeros(200, np.float32))
    assert taken == ["_wave", "_loop"]


def test_a_single_wave_of_a_middling_cell_is_stepped_as_one(monkeypatch):
    """As live streams come: one event each; with a key twice, in the loop."""
    from anabranch.run import keyed

    waves = []
    monkeypatch.setattr(keyed, "_wave", lambda *args, wave=keyed._wave: waves.append(1) or wave(*args))
    monkeypatch.setattr(keyed, "TICK_FLOPS", -1)
    many = Keyed(Recurrent(), capacity=256, threads=1)
    keys, xs = list(range(keyed.WAVE)), np.arange(keyed.WAVE, dtype=np.float32)
    many(keys, xs)
    assert len(waves) == 1
    many([*keys[1:], keys[1]], xs)
    many(keys[1:], xs[1:])
    assert len(waves) == 1
