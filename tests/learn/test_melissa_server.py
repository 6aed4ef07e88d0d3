"""Real actors, one of them killed, and a server that stops and goes on: no sample is lost, none comes twice."""

import os
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anabranch.cell import noise
from anabranch.learn.melissa import Fifo, HeatEnsemble, TrainingReservoir, surrogate
from anabranch.learn.melissa_server import Server

ray = pytest.importorskip("ray", reason="Ray (the extra `ray`) is not installed")
GRID, STEPS, SIMULATIONS = 4, 12, 5


@pytest.fixture(scope="module", autouse=True)
def cluster():
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100_000_000)
    yield
    ray.shutdown()


def server(folder, kind=TrainingReservoir, capacity=80, simulations=SIMULATIONS, **kwargs):
    sample = (jax.ShapeDtypeStruct((6,), jnp.float32), jax.ShapeDtypeStruct((GRID**2,), jnp.float32))
    learner = surrogate(GRID, width=8, key=jax.random.PRNGKey(0))
    return Server(
        HeatEnsemble(GRID, STEPS, 1),
        kind(sample, capacity, 5, 4),
        learner,
        simulations=simulations,
        clients=2,
        folder=folder,
        **{"block": 5} | kwargs,
    )


def expected(simulations=SIMULATIONS):
    """All samples of the ensemble, in one process: x f32[simulations * STEPS, 6]."""
    cell = HeatEnsemble(GRID, STEPS, simulations)
    state = cell.begin(jnp.arange(simulations), noise(jax.random.PRNGKey(0), 0, "ensemble"))
    _, (x, u) = cell.advance(state, jnp.zeros(STEPS))
    return np.concatenate([x, u], -1).reshape(simulations * STEPS, -1)


def same_rows(a, b):
    order = lambda rows: rows[np.lexsort(np.round(rows[:, :6], 4).T)]
    assert a.shape == b.shape
    np.testing.assert_allclose(order(a), order(b), atol=1e-5)


def pid(actor):
    return ray.get(actor.__ray_call__.remote(lambda self: os.getpid()))


def test_killed_clients_and_restarted_server(tmp_path):
    first = server(tmp_path, waiting=1)  # at most one block of 5 samples between two batches
    # Stop in the middle, with samples on the queue that are in no checkpoint.
    assert first.train(batches=8) == 8
    some = int(first.received.sum())
    assert some == first.buffer_state.puts and 6 <= some < SIMULATIONS * STEPS - 5

    second = server(tmp_path, resume=True)
    np.testing.assert_array_equal(second.received, first.received)
    assert second.learner_state.t == 8 and second.buffer_state.puts == some
    actors = list(second.actors)
    pids = [pid(actor) for actor in actors]
    os.kill(pids[0], signal.SIGKILL)  # before its first sample

    def kill_later():
        while second.received.sum() < some + 3:
            time.sleep(0.001)
        os.kill(pids[1], signal.SIGKILL)

    thread = threading.Thread(target=kill_later, daemon=True)
    thread.start()
    second.train()
    thread.join(5)
    assert not thread.is_alive() and second.actors[0] is not actors[0]
    assert (second.received == STEPS).all() and not second.buffer_state.held.any()
    assert second.buffer_state.puts == second.buffer_state.fresh == SIMULATIONS * STEPS
    # There was room for all, so each sample is still in the slot it was put in: all came, none twice.
    x, u = second.buffer_state.samples
    same_rows(np.concatenate([x, u], -1)[: SIMULATIONS * STEPS], expected())


def test_a_small_buffer_loses_nothing(tmp_path):
    small = server(tmp_path, Fifo, capacity=10, waiting=1)
    assert small.train() == SIMULATIONS * STEPS // 4
    assert small.buffer_state.fresh == SIMULATIONS * STEPS  # however often they had to wait, nothing is lost


def test_bad_arguments_are_named(tmp_path):
    with pytest.raises(ValueError, match="block"):
        server(tmp_path, block=0)
    server(tmp_path).checkpoint()
    with pytest.raises(ValueError, match="another run"):
        server(tmp_path, seed=1, resume=True)
