import itertools
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from anabranch import contract
from anabranch.learn.anytime_macroscale import AnytimeLearner, anytime_report, example
from anabranch.learn.base import cross_entropy
from anabranch.models.growing import GrowingEnsemble, GrowingMoE, size

D, C, ROWS = 4, 3, 40


@pytest.fixture(scope="module")
def stream():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, ROWS, D)).astype(np.float32)
    return x, np.argmax(x[..., :C], -1).astype(np.int32)


def network(key=0):
    return eqx.nn.MLP(D, C, 8, 1, key=jax.random.PRNGKey(key))


def states(cell, x, y):
    learn = eqx.filter_jit(type(cell).learn)
    found = [cell.init(key=jax.random.PRNGKey(1))]
    for chunk in zip(x, y):
        found.append(learn(cell, found[-1], *chunk))
    return found


def same(a, b):
    return all(np.array_equal(u, v) for u, v in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_contract():
    report = contract.check(*example())
    assert report.ok, report


def test_serves_the_old_model_while_it_waits(stream):
    found = states(AnytimeLearner(network(), ROWS, D, C, wait=2, epochs=3, batch=16), *stream)
    assert [same(a.model, b.model) for a, b in itertools.pairwise(found)] == [True, False, True, False, True]
    assert [int(s.good.sum()) for s in found] == [0, ROWS, 0, ROWS, 0, ROWS]


@pytest.mark.parametrize(("replay", "kept"), [(0, [1, 1, 1, 1, 1]), (3, [1, 2, 3, 3, 3])])
def test_compute_counts_what_is_replayed(stream, replay, kept):
    cell = AnytimeLearner(network(), ROWS, D, C, replay=replay, epochs=2, batch=16)
    flops = np.diff([float(s.flops) for s in states(cell, *stream)])
    np.testing.assert_allclose(flops, 6.0 * float(size(cell.model)) * 2 * 36 * np.array(kept), rtol=1e-6)


def test_one_full_batch_is_one_step_of_gradient_descent(stream):
    """With one batch of all training rows and one pass the order does not matter: the step can be taken by hand."""
    x, y = stream[0][0], stream[1][0]
    cell = AnytimeLearner(network(), ROWS, D, C, epochs=1, batch=36, optimizer=optax.sgd(0.1))
    learned = cell.serving(states(cell, x[None], y[None])[-1])
    grads = eqx.filter_grad(cross_entropy)(network(), (jnp.asarray(x[:36]), jnp.asarray(y[:36])))
    by_hand = eqx.apply_updates(network(), jax.tree.map(lambda g: -0.1 * g, grads))
    np.testing.assert_allclose(jax.vmap(learned)(x), jax.vmap(by_hand)(x), atol=1e-5)


def test_stops_without_gain_and_keeps_the_best(stream):
    """A rate of zero gains nothing after the first pass."""
    cell = AnytimeLearner(network(), ROWS, D, C, epochs=50, patience=4, batch=16, optimizer=optax.sgd(0.0))
    state = states(cell, stream[0][:1], stream[1][:1])[-1]
    assert int(state.epochs) == 5
    assert same(state.model, cell.init().model)


def test_bad_rows_are_counted_and_not_learned(stream):
    x, y = stream[0][:1].copy(), stream[1][:1].copy()
    x[0, 3, 1], y[0, 5] = np.nan, C
    cell = AnytimeLearner(network(), ROWS, D, C, epochs=2, batch=16)
    state = states(cell, x, y)[-1]
    assert int(state.rejected) == 2
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.model))
    untouched = states(cell, np.full_like(x, np.inf), y)[-1]
    assert int(untouched.rejected) == ROWS and same(untouched.model, cell.init().model)


def test_growths_without_a_slot_are_counted(stream):
    model = GrowingMoE(D, C, width=4, slots=4, key=jax.random.PRNGKey(0))
    found = states(AnytimeLearner(model, ROWS, D, C, epochs=1, batch=16), *stream)
    assert [int(s.model.layers[0].n) for s in found] == [2, 2, 3, 4, 4, 4]
    assert [int(s.refused) for s in found] == [0, 0, 0, 0, 1, 2]


def test_a_new_member_leaves_the_earlier_ones_alone(stream):
    model = GrowingEnsemble(D, C, width=8, slots=3, key=jax.random.PRNGKey(0))
    cell = AnytimeLearner(model, ROWS, D, C, epochs=3, batch=16)
    found = states(cell, *stream)
    models = [cell.serving(s) for s in found]
    assert [int(m.n) for m in models] == [1, 1, 2, 3, 3, 3] and int(found[-1].refused) == 2
    members = [[jax.tree.map(lambda a, i=i: a[i], eqx.filter(m.members, eqx.is_array)) for i in (0, 1)] for m in models]
    assert not same(members[0][0], members[1][0]) and same(members[1][0], members[5][0])
    assert not same(members[2][1], members[2][0]) and same(members[2][1], members[5][1])
    one = float(size(model.trained()))
    np.testing.assert_allclose(np.diff([float(s.flops) for s in found]), 6 * one * 3 * 36, rtol=1e-5)


def test_from_scratch_forgets(stream):
    """Trained twice on the same rows, it is the same both times; unless it starts from where it was."""
    x, y = np.stack([stream[0][0]] * 2), np.stack([stream[1][0]] * 2)
    for scratch in (True, False):
        cell = AnytimeLearner(network(), ROWS, D, C, scratch=scratch, epochs=2, batch=36, optimizer=optax.sgd(0.1))
        _, first, second = (jax.vmap(cell.serving(s))(x[0]) for s in states(cell, x, y))
        assert np.allclose(first, second, atol=1e-5) == scratch


def test_report_counts_the_errors_made_while_waiting(stream):
    x, y = stream
    cell = AnytimeLearner(network(), ROWS, D, C, wait=5, epochs=40, patience=40, batch=16)
    report = anytime_report(cell, (x, y), (x[0], y[0]), jax.random.PRNGKey(0))
    untrained = float((jnp.argmax(jax.vmap(cell.model)(x[0]), -1) != y[0]).mean())
    np.testing.assert_allclose(report.errors[:4], untrained, atol=1e-6)
    assert report.errors[4] < untrained - 0.2
    assert report.cer == pytest.approx(np.mean([untrained] * 4 + [report.errors[4]]), abs=1e-6)
    assert report.memory == 5 * float(size(cell.model))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"wait": 0}, "wait .* got 0"),
        ({"wait": 3, "replay": 2}, "replay .* got 2"),
        ({"rows": 9}, "rows .* got 9"),
        ({"patience": 0}, "patience .* got 0"),
    ],
)
def test_bad_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        AnytimeLearner(network(), **{"rows": ROWS, "features": D, "classes": C} | arguments)


def test_parity_with_the_same_training_in_pytorch(stream):
    """Full batches, whose order does not matter: Adadelta, early stopping and the best weights are as in PyTorch."""
    torch = pytest.importorskip("torch")
    x, y = (torch.tensor(a[2]) for a in stream)  # a chunk that is learned slowly
    ours, theirs = network(), torch.nn.Sequential(torch.nn.Linear(D, 8), torch.nn.ReLU(), torch.nn.Linear(8, C))
    with torch.no_grad():
        for layer, linear in zip(ours.layers, (theirs[0], theirs[2])):
            linear.weight.copy_(torch.tensor(np.asarray(layer.weight)))
            linear.bias.copy_(torch.tensor(np.asarray(layer.bias)))
    optimizer, top, misses, epochs, best = torch.optim.Adadelta(theirs.parameters(), lr=1.0), -1.0, 0, 0, {}
    while misses < 6:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(theirs(x[:36]), y[:36].long()).backward()
        optimizer.step()
        epochs += 1
        accuracy = (theirs(x[36:]).argmax(1) == y[36:]).float().mean().item()
        if accuracy > top + 0.001:
            top, misses, best = accuracy, 0, {k: v.clone() for k, v in theirs.state_dict().items()}
        else:
            misses += 1
    theirs.load_state_dict(best)
    cell = AnytimeLearner(ours, ROWS, D, C, epochs=50, patience=6, batch=36)
    state = states(cell, stream[0][2:3], stream[1][2:3])[-1]
    assert 8 < int(state.epochs) == epochs < 50
    np.testing.assert_allclose(cell.predict(state, stream[0][2]), theirs(x).detach().numpy(), atol=1e-3)


def test_fine_tuning_is_as_accurate_as_with_scikit_learn():
    datasets, networks = pytest.importorskip("sklearn.datasets"), pytest.importorskip("sklearn.neural_network")
    x, y = datasets.load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x, y = (x[order] / 16).astype(np.float32), y[order].astype(np.int32)
    (x, test), (y, wanted) = np.split(x, [1200]), np.split(y, [1200])
    model = eqx.nn.MLP(64, 10, 32, 1, key=jax.random.PRNGKey(0))
    # The peer stops and keeps weights by other rules: with `least` below -1 every pass is a gain.
    cell = AnytimeLearner(model, 400, 64, 10, epochs=40, batch=40, least=-2.0, optimizer=optax.adam(5e-3))
    report = anytime_report(cell, (x.reshape(3, 400, 64), y.reshape(3, 400)), (test, wanted), jax.random.PRNGKey(0))
    peer = networks.MLPClassifier(
        (32,), alpha=0.0, batch_size=40, learning_rate_init=5e-3, max_iter=40, warm_start=True, random_state=0
    )
    errors = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it has not converged, and need not have
        for mine in np.split(np.arange(1200), 3):
            errors.append(1 - peer.fit(x[mine[:360]], y[mine[:360]]).score(test, wanted))
    np.testing.assert_allclose(report.errors, errors, atol=0.01)
