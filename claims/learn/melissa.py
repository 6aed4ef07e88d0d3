"""A training reservoir makes a better surrogate than a small stored ensemble or a queue, and the trainer never waits.

The heat equation on 32 × 32 points, 50 time steps, 8 solvers at once, 400 simulations, 5 samples produced in the time
of a batch of 10. Baselines: the same network and as many batches on 40 stored simulations, shuffled; first in, first
out; random order. Validated on 60 other simulations. Speed is simulated, one step for one batch: what a cluster would
show of throughput is not reproduced. The learning rate and its halving are the same for all.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from anabranch import noise
from anabranch.claim import Comparison, Size
from anabranch.fit import Epochs
from anabranch.learn.melissa import (
    Fifo,
    Firo,
    HeatEnsemble,
    SurrogateTrainer,
    TrainingReservoir,
    mean_squared_error,
    surrogate,
)

FIRST_SEED = 100  # those below were used while writing
BATCH, RATE = 10, 5


@eqx.filter_jit
def play(cell, steps, key):
    """The last state, and in which steps a batch was trained."""
    return cell.advance(cell.init(key=key), jnp.zeros(steps))


@eqx.filter_jit
def simulate(ensemble, steps, key):
    """Rows x and u of the ensemble's first `steps` time steps."""
    _, (x, u) = ensemble.advance(ensemble.init(key=key), jnp.zeros(steps))
    return x.reshape(-1, x.shape[-1]), u.reshape(-1, u.shape[-1])


@eqx.filter_jit
def offline(learner, x, u, batches, key):
    """The learner after so many shuffled batches of what is stored."""
    batch, valid = Epochs((x, u), BATCH, key), jnp.ones(BATCH)

    def step(i, state):
        x, u = batch(key, i)
        return learner.learn(state, x, (u, valid))

    return jax.lax.fori_loop(0, batches, step, learner.init(key=key))


@eqx.filter_jit
def error(learner, state, x, u):
    predict = lambda row: learner.predict(state, row)
    return mean_squared_error(predict, (x[None], (u[None], jnp.ones((1, len(x))))))


def measure(seed: int, smoke: bool) -> dict[str, dict[str, float]]:
    """For each way to train: error, share of idle steps while solvers produce, samples lost, repeats."""
    grid, T, members, simulations, stored = (8, 10, 4, 8, 4) if smoke else (32, 50, 8, 400, 40)
    capacity, threshold = (40, 20) if smoke else (2000, 300)
    ensemble, key = HeatEnsemble(grid, T, members), jax.random.PRNGKey(seed)
    validation = simulate(HeatEnsemble(grid, T, 4 if smoke else 60), T, noise(key, 0, "validation"))
    total = simulations * T
    producing, steps = total // RATE, total // RATE + total // BATCH  # time enough to drain any buffer
    sample = (jax.ShapeDtypeStruct((6,), jnp.float32), jax.ShapeDtypeStruct((grid**2,), jnp.float32))
    # Halved every quarter of the production, for all alike.
    rate = optax.exponential_decay(1e-3, producing // 4, 0.5, staircase=True)
    learner = surrogate(grid, rate, width=16 if smoke else 256, key=noise(key, 0, "network"))
    found, batches = {}, 0
    for name, kind, wait in (("FIFO", Fifo, 0), ("FIRO", Firo, threshold), ("Reservoir", TrainingReservoir, threshold)):
        cell = SurrogateTrainer(ensemble, kind(sample, capacity, wait, BATCH), learner, RATE, simulations)
        state, trained = play(cell, steps, key)
        begun = -(-(wait + 1) // RATE)  # the wait for the threshold at the start is not idleness
        found[name] = {
            "error": float(error(learner, state.learner, *validation)),
            "idle": 100 * (1 - float(np.asarray(trained)[begun:producing].mean())),
            "lost": float(total - state.buffer.fresh),
            "repeats": float(trained.sum() * BATCH / total),
        }
        batches = int(state.buffer.gets)
    x, u = simulate(ensemble, stored // members * T, noise(key, 0, "stored"))
    state = offline(learner, x, u, batches, key)
    found["offline"] = {"error": float(error(learner, state, *validation)), "batches": float(batches)}
    return found


def experiment(size: Size) -> list[Comparison]:
    """Errors as ratios over the seeds, idleness and losses as the thresholds state them."""
    runs = [measure(FIRST_SEED + seed, size.smoke) for seed in size.seeds(3)]
    of = lambda name, what: [run[name][what] for run in runs]
    mean = lambda name, what: float(np.mean(of(name, what)))
    ours, zero = of("Reservoir", "error"), [0.0] * len(runs)
    note = "mean squared errors: " + ", ".join(
        f"{name} {mean(name, 'error'):.3g}" for name in ("Reservoir", "FIFO", "FIRO", "offline")
    )
    note += (
        f"; each sample trained {mean('Reservoir', 'repeats'):.1f} times with the Reservoir, once with FIFO and FIRO"
    )
    same = f"offline has the Reservoir's {mean('offline', 'batches'):.0f} batches; {note}"
    firo = f"FIRO idle {mean('FIRO', 'idle'):.1f} %; the wait for the threshold at the start is not counted"
    return [
        Comparison(
            "validation error against offline",
            ours,
            of("offline", "error"),
            0.75,
            "ratio",
            "lower",
            "47 % better",
            same,
        ),
        Comparison("validation error against FIFO", ours, of("FIFO", "error"), 0.9, "ratio", "lower"),
        Comparison(
            "% of steps idle, Reservoir", of("Reservoir", "idle"), zero, 5.0, better="lower", paper="throughput × 13"
        ),
        Comparison("% of steps idle, FIFO", of("FIFO", "idle"), zero, 40.0, note=firo),
        Comparison("samples lost unseen", of("Reservoir", "lost"), zero, 0.0, better="lower"),
    ]
