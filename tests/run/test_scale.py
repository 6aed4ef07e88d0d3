"""`Partitioned` must answer as one `Keyed` does, also while actors are killed, join and leave."""

import os
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anabranch import Cell
from anabranch.run.keyed import Keyed
from anabranch.run.scale import BUCKETS, Partitioned, bucket

ray = pytest.importorskip("ray", reason="Ray (the extra `ray`) is not installed")
D, SIZE, ROOM = 3, 60, 40  # fewer keys fit than there are, so that some spill


@pytest.fixture(scope="module", autouse=True)
def cluster():
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=200_000_000)
    yield
    ray.shutdown()


def drawn():
    """A cell whose initial state is random. Ray sends a class that is made in a function by value."""

    class Drawn(Cell):
        def init(self, *, key=None):
            return {"h": jax.random.normal(key, (D,)), "n": jnp.zeros((), jnp.int32)}

        def step(self, state, x):
            h = jnp.tanh(state["h"] + x)
            return {"h": h, "n": state["n"] + 1}, {"h": h, "n": state["n"]}

    return Drawn()


def stream(n):
    rng = np.random.default_rng(0)
    return [f"k{i}" for i in rng.zipf(1.3, n) % 200], rng.normal(size=(n, D)).astype(np.float32)


def feed(keyed, keys, xs, start=0, meanwhile=None):
    """All answers from event `start` on; `meanwhile` maps a micro-batch to what is done before it."""
    out = []
    for i, a in enumerate(range(start, len(keys), SIZE)):
        if meanwhile and i in meanwhile:
            meanwhile[i]()
        out.append(keyed(keys[a : a + SIZE], xs[a : a + SIZE]))
    return jax.tree.map(lambda *parts: np.concatenate(parts), *out)


def same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def process(actor):
    return ray.get(actor.__ray_call__.remote(lambda _: os.getpid()))


def kill_over(actor):
    """Stop the process now, and kill it only when it has been sent work that it has not answered."""
    pid = process(actor)
    os.kill(pid, signal.SIGSTOP)
    threading.Timer(0.3, os.kill, (pid, signal.SIGKILL)).start()


@pytest.mark.slow
def test_killed_joined_and_left_in_mid_stream(tmp_path, monkeypatch):
    keys, xs = stream(16 * SIZE)
    one = Keyed(drawn(), 200, seed=5)
    expected = feed(one, keys, xs)
    many = Partitioned(drawn(), ROOM, 3, folder=tmp_path, seed=5, every=4)
    hand_out = many._hand_out
    owned = []

    def add_and_kill():
        def and_kill(shares):
            hand_out(shares)  # all have their new buckets, but no checkpoint says so yet
            for i in (0, 3):
                kill_over(shares[i].actor)

        monkeypatch.setattr(many, "_hand_out", and_kill)
        owned.append([set(share.buckets) for share in many._shares])
        many.add()
        owned.append([set(share.buckets) for share in many._shares])
        monkeypatch.undo()

    found = feed(many, keys, xs, meanwhile={
        2: lambda: kill_over(many.actors[0]),  # before the first checkpoint
        9: add_and_kill,
        11: many.remove,
        14: lambda: (kill_over(many.actors[2]), many.checkpoint()),  # while it is asked to save, long after
    })  # fmt: skip
    same(found, expected)
    assert len(many) == len(one)
    for key in set(keys[::7]):
        same(many.state(key), one.state(key))
    with pytest.raises(KeyError, match="never"):
        many.state("never")
    # Nothing moves but to the actor that is new, or from the one that goes.
    before, after = owned
    assert all(new < old for new, old in zip(after, before)) and len(after[3]) == BUCKETS // 4
    last = [set(share.buckets) for share in many._shares]
    assert all(new > old for new, old in zip(last, after)) and set.union(*last) == set(range(BUCKETS))
    many.close()


def test_a_driver_that_is_gone_is_resumed(tmp_path):
    keys, xs = stream(9 * SIZE)
    one = Keyed(drawn(), 200, seed=2)
    expected = feed(one, keys, xs)
    gone = Partitioned(drawn(), ROOM, 2, folder=tmp_path, seed=2, every=3)
    feed(gone, keys[: 3 * SIZE], xs[: 3 * SIZE])
    assert gone.position == 0  # who feeds it may not have seen the last answers yet
    feed(gone, keys[: 5 * SIZE], xs[: 5 * SIZE], start=3 * SIZE)
    assert gone.position == 3 * SIZE
    gone._ask("save", {0: (2,)})  # the driver dies when only one of its actors has saved
    for actor in gone.actors:
        ray.kill(actor)
    with pytest.raises(ValueError, match="seed 2, not 3"):
        Partitioned(drawn(), ROOM, 2, folder=tmp_path, seed=3, resume=True)
    many = Partitioned(drawn(), ROOM, 1, folder=tmp_path, seed=2, every=3, resume=True)
    assert many.position == 3 * SIZE and len(many.actors) == 2

    def fail():
        ray.get(many.actors[1].__ray_call__.remote(lambda worker: setattr(worker, "_keyed", None)))
        with pytest.raises(TypeError, match="not callable"):  # from one actor; the other has taken its part
            many(keys[:SIZE], xs[:SIZE])

    found = feed(many, keys, xs, start=many.position, meanwhile={1: fail, 4: fail})
    same(found, jax.tree.map(lambda leaf: leaf[3 * SIZE :], expected))
    assert len(many) == len(one)
    many.close()
    assert many.position == len(keys)


def test_bad_input(tmp_path):
    class Coupled(Cell):
        coupled = True

    with pytest.raises(ValueError, match="Coupled is coupled"):
        Partitioned(Coupled(), ROOM, 1, folder=tmp_path)
    with pytest.raises(ValueError, match="actors must be from 1 to 256, got 0"):
        Partitioned(drawn(), ROOM, 0, folder=tmp_path)
    with pytest.raises(ValueError, match="every must be positive, got 0"):
        Partitioned(drawn(), ROOM, 1, folder=tmp_path, every=0)
    many = Partitioned(drawn(), ROOM, 1, folder=tmp_path)
    keys, xs = stream(3)
    with pytest.raises(ValueError, match="2 keys came with inputs of length"):
        many(keys[:2], xs)
    with pytest.raises(ValueError, match="event 1 is null"):
        many(["a", None, "b"], xs)
    with pytest.raises(ValueError, match="at least one event"):
        many([], xs[:0])
    with pytest.raises(ValueError, match="cannot be removed"):
        many.remove()
    many.close()


def test_buckets_are_evenly_filled_and_the_same_in_every_process():
    assert (bucket("a"), bucket(("JFK", 1)), bucket(7)) == (175, 1, 16)
    assert np.bincount([bucket(i) for i in range(25_600)], minlength=BUCKETS).min() > 50
