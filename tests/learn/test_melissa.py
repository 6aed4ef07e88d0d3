import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse as sparse
from scipy.sparse.linalg import spsolve

from anabranch.contract import check
from anabranch.learn.melissa import (
    Fifo,
    Firo,
    HeatEnsemble,
    SurrogateTrainer,
    TrainingReservoir,
    example,
    mean_squared_error,
    surrogate,
)

KEY = jax.random.PRNGKey(0)
NUMBER = jax.ShapeDtypeStruct((), jnp.int32)


def test_contract():
    cell, xs = example()
    report = check(cell, xs, key=KEY)
    assert report.ok, str(report)


@pytest.mark.parametrize("kind", [Fifo, Firo, TrainingReservoir])
def test_buffers_keep_their_rules(kind):
    """200 random interleavings of put and get, against a list of numbers and how often each was given."""
    B, c, threshold = 3, 12, 4
    cell = kind(NUMBER, c, threshold, B)
    put, get = jax.jit(cell.put), jax.jit(cell.get)
    rng, state, held, next_, given = np.random.default_rng(0), cell.init(key=KEY), {}, 0, []

    def contents():
        return {int(n): int(u) for n, u, h in zip(state.samples, state.uses, state.held) if h}

    def take(over):
        nonlocal state
        state, batch = get(state, True, over)
        drawn = batch.samples[batch.valid].tolist()
        enough = bool(held) if over else len(held) > threshold
        assert len(drawn) == (min(B, len(held)) if enough else 0)
        assert len(set(drawn)) == len(drawn) and set(drawn) <= set(held)
        if kind is Fifo:
            assert drawn == sorted(held)[: len(drawn)]
        for n in drawn:
            given.append(n)
            held[n] += 1
            if kind is not TrainingReservoir or over:
                del held[n]
        assert contents() == held

    for step in range(200):
        if rng.random() < (0.9 if step < 20 else 0.6):
            state, accepted = put(state, jnp.int32(next_))
            seen = {n for n, uses in held.items() if uses}
            assert accepted == (len(held) < c or (kind is TrainingReservoir and bool(seen)))
            if accepted:
                gone = set(held) - set(contents())
                assert len(gone) == (len(held) == c) and gone <= seen  # none is given up before it was given
                for n in gone:
                    del held[n]
                held[next_] = 0
                next_ += 1
            assert contents() == held
        else:
            take(over=False)
    while held:
        take(over=True)
    assert set(given) == set(range(next_)) and state.puts == state.fresh == next_  # none lost
    assert (len(given) > next_) == (kind is TrainingReservoir)
    assert state.blocked > 0


def test_draws_are_uniform_over_seen_and_unseen():
    cell = TrainingReservoir(NUMBER, 20, 4, 5)
    state, _ = jax.lax.scan(cell.put, cell.init(key=KEY), jnp.arange(20))
    state, batches = jax.lax.scan(lambda s, _: cell.get(s), state, None, 2000)
    counts = np.bincount(np.asarray(batches.samples).ravel(), minlength=20)
    assert abs(counts - 500).max() < 5 * np.sqrt(500)
    # As many of each are evicted: the one in slot i leaves at random.
    slots = [int(jnp.argmax(cell.put(state._replace(puts=jnp.int32(i)), -1)[0].samples == -1)) for i in range(60)]
    assert len(set(slots)) > 15


def test_a_sample_that_is_not_finite_is_taken_counted_and_not_held():
    cell = TrainingReservoir(jax.ShapeDtypeStruct((2,), jnp.float32), 5, 1, 2)
    state, accepted = cell.put(cell.init(key=KEY), jnp.array([1.0, jnp.nan]))
    assert accepted and state.rejected == 1 and state.puts == 0 and not state.held.any()


def test_heat_equals_a_sparse_solver():
    n, steps = 12, 6
    cell = HeatEnsemble(n, steps, members=2)
    state, (x, u) = cell.advance(cell.init(key=KEY), jnp.zeros(3 * steps))
    # The second generation: the members' numbers go on, and their fields start anew.
    assert state.member.tolist() == [4, 5] and x.shape == (3 * steps, 2, 6)
    np.testing.assert_allclose(x[:, 0, 5], np.tile(np.arange(1, steps + 1) / steps, 3), rtol=1e-6)
    h2, eye = (1 / (n + 1)) ** 2, sparse.identity(n)
    second = sparse.diags([1.0, -2.0, 1.0], [-1, 0, 1], shape=(n, n)) / h2
    matrix = sparse.identity(n * n) - 0.01 * (sparse.kron(second, eye) + sparse.kron(eye, second))
    for first in (0, steps):
        start, left, right, lower, upper = np.asarray(x[first, 1, :5], np.float64)
        edges = np.zeros((n, n))
        edges[0] += left
        edges[-1] += right
        edges[:, 0] += lower
        edges[:, -1] += upper
        field = np.full(n * n, start)
        for t in range(steps):
            field = spsolve(sparse.csc_matrix(matrix), field + 0.01 * edges.ravel() / h2)
            np.testing.assert_allclose(u[first + t, 1], field, atol=2e-6)
    assert 0 <= x.min() and x.max() <= 1 and x[0, 0, 0] != x[steps, 0, 0]


def trainer(kind, per_step, simulations=4, capacity=60):
    sample = (jax.ShapeDtypeStruct((6,), jnp.float32), jax.ShapeDtypeStruct((36,), jnp.float32))
    learner = surrogate(6, width=16, key=KEY)
    return SurrogateTrainer(HeatEnsemble(6, 20, 2), kind(sample, capacity, 10, 5), learner, per_step, simulations)


@pytest.mark.parametrize("kind", [Fifo, TrainingReservoir])
def test_trainer_sees_every_sample_and_idles_as_it_must(kind):
    cell = trainer(kind, per_step=2)
    state, trained = eqx.filter_jit(cell.advance)(cell.init(key=KEY), jnp.zeros(90))
    assert state.produced == state.buffer.puts == state.buffer.fresh == 80 and not state.buffer.held.any()
    assert trained.sum() == state.buffer.gets == state.learner.t == 90 - state.idle
    producing = np.asarray(trained)[5:40]  # two samples a step, five a batch
    assert producing.all() if kind is TrainingReservoir else 0.3 < producing.mean() < 0.5


def test_a_full_buffer_makes_the_solvers_wait():
    cell = trainer(Fifo, per_step=8, simulations=8, capacity=20)
    state, _ = eqx.filter_jit(cell.advance)(cell.init(key=KEY), jnp.zeros(30))
    assert state.buffer.blocked > 0 and int(state.buffer.gets) < 160
    state, _ = eqx.filter_jit(cell.advance)(state, jnp.zeros(10))
    assert state.produced == state.buffer.fresh == 160  # and loses none


def test_loss_leaves_out_what_is_not_there():
    x, u = jnp.ones((1, 3, 2)), jnp.array([[[1.0, 1.0], [3.0, 1.0], [jnp.inf, 0.0]]])
    u = jnp.where(jnp.isfinite(u), u, 9.0)
    assert float(mean_squared_error(lambda x: x, (x, (u, jnp.array([[True, True, False]]))))) == pytest.approx(1.0)


def test_learns_the_heat_equation():
    cell = trainer(TrainingReservoir, per_step=3, simulations=40)
    start = cell.init(key=KEY)
    state, _ = eqx.filter_jit(cell.advance)(start, jnp.zeros(270))
    _, (x, u) = cell.ensemble.advance(cell.ensemble.init(key=jax.random.PRNGKey(1)), jnp.zeros(40))
    x, u = x.reshape(1, 80, 6), u.reshape(1, 80, 36)

    def error(learner):
        return float(mean_squared_error(lambda r: cell.learner.predict(learner, r), (x, (u, jnp.ones((1, 80))))))

    assert error(state.learner) < 0.5 * error(start.learner)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="capacity"):
        Fifo(NUMBER, 10, 5, 5)
    with pytest.raises(ValueError, match="batch"):
        Fifo(NUMBER, 10, 5, 0)
    with pytest.raises(ValueError, match="grid"):
        HeatEnsemble(0)
    with pytest.raises(ValueError, match="per_step"):
        trainer(Fifo, per_step=0)
    with pytest.raises(ValueError, match="simulations"):
        trainer(Fifo, per_step=1, simulations=3)
