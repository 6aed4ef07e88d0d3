import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from anabranch import Event, Maybe, contract
from anabranch.fit import Backprop, fit
from anabranch.learn import dual_propagation
from anabranch.learn.base import Sgd, cross_entropy
from anabranch.learn.dual_propagation import DualProp, DualPropCell, Dyads, Network, infer_states, spectral_norm

KEY = jax.random.PRNGKey(0)


def perceptron(*widths: int) -> Network:
    keys = jax.random.split(KEY, len(widths))
    return Network(tuple(eqx.nn.Linear(m, n, key=k) for m, n, k in zip(widths, widths[1:], keys)))


def batch(n: int = 16, D: int = 5) -> tuple[jax.Array, jax.Array]:
    return jax.random.normal(KEY, (n, D)), jnp.arange(n) % 3


def test_contract():
    report = contract.check(*dual_propagation.example(), key=KEY)
    assert report.ok, report


def test_one_step_of_sgd_goes_down_the_gradient():
    squared = lambda model, batch, key: jnp.square(jax.vmap(model)(batch[0]) - batch[1]).mean()
    model, rule = perceptron(5, 7, 3), DualProp(squared)
    cell = Sgd(model, optax.sgd(0.1), rule)
    x, y = jax.random.normal(KEY, (5,)), jnp.ones(3)
    learn = jax.jit(lambda y: cell.learn(cell.init(), x, y).model)
    grads = rule.value_and_grad(model, (x[None], y[None]), KEY)[1]
    close(learn(y), jax.tree.map(lambda w, g: w - 0.1 * g, model, grads), 1e-6)
    jax.tree.map(np.testing.assert_array_equal, learn(y.at[1].set(jnp.nan)), model)


def close(ours: object, theirs: object, tolerance: float) -> None:
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


@pytest.mark.parametrize("adjoint", [False, True])
@pytest.mark.parametrize("alpha", [0.5, 0.0, 1.0])
def test_gradient_of_a_small_nudge_is_that_of_backpropagation(alpha, adjoint):
    with jax.enable_x64(True):
        model = jax.tree.map(lambda w: w.astype(jnp.float64), perceptron(5, 12, 8, 3))
        x, y = batch()
        data = x.astype(jnp.float64), y
        value, grads = DualProp(cross_entropy, alpha, 1e-5, adjoint=adjoint).value_and_grad(model, data, KEY)
        wanted, theirs = Backprop(cross_entropy).value_and_grad(model, data, KEY)
        assert float(value) == pytest.approx(float(wanted))
        close(grads, theirs, 1e-3)


def test_where_no_unit_crosses_zero_any_nudge_is_exact():
    model = perceptron(5, 12, 8, 3)
    # A large bias keeps every hidden unit on: the network is affine, and its error does not depend on β.
    model = eqx.tree_at(
        lambda m: [layer.bias for layer in m.layers[:-1]], model, [jnp.full(12, 50.0), jnp.full(8, 90.0)]
    )
    theirs = Backprop(cross_entropy).value_and_grad(model, batch(), KEY)[1]
    close(DualProp(cross_entropy, beta=1.0).value_and_grad(model, batch(), KEY)[1], theirs, 1e-3)


@pytest.mark.parametrize("damped", [False, True])
@pytest.mark.parametrize(("alpha", "adjoint"), [(0.5, False), (0.3, False), (0.3, True)])
def test_states_by_hand(alpha, adjoint, damped):
    """One sweep of a network of two layers, written out with matrices."""
    model, (x, y) = perceptron(5, 7, 3), batch(4)
    model = eqx.tree_at(lambda m: m.layers[1].weight, model, replace_fn=lambda V: 3 * V)  # its norm is above 1
    rule = DualProp(cross_entropy, alpha, 0.8, adjoint=adjoint, damped=damped)
    value, dyads = infer_states(rule, model, (x, y), KEY)
    (W, u), (V, v) = [(np.asarray(layer.weight), np.asarray(layer.bias)) for layer in model.layers]
    a = x @ W.T + u
    first = np.maximum(a, 0)
    scores = first @ V.T + v
    delta = -0.8 * (np.asarray(jax.nn.softmax(scores)) - np.eye(3)[y])
    b = delta @ V
    up, down = (1 - alpha, alpha) if adjoint else (alpha, 1 - alpha)
    inertia = (np.linalg.norm(V, 2) ** 2 - 1) / 2 if damped else 0.0
    plus, minus = (np.maximum((a + push + inertia * first) / (1 + inertia), 0) for push in (up * b, -down * b))
    np.testing.assert_allclose(dyads.delta[2], delta, atol=1e-5)
    np.testing.assert_allclose(dyads.delta[1], plus - minus, atol=1e-5)
    np.testing.assert_allclose(dyads.mean[1], alpha * plus + (1 - alpha) * minus, atol=1e-5)
    assert float(value) == pytest.approx(float(cross_entropy(model, (x, y))))


THEIRS = {  # adjoint: s⁺ and s⁻ of the third layer, one pixel of the first, and a row of its gradient
    False: (
        [[0.90447, 0, 0, 0, 0], [1.23542, 0, 0.13735, 0, 0]],
        [[0.78264, 0, 0, 0, 0], [1.27253, 0, 0, 0, 0]],
        ([0, 0.74586, 0.47636], [0, 0.77112, 0.45176]),
        [0.00742, -0.04899, -0.03936],
    ),
    True: (
        [[0.95321, 0, 0, 0, 0], [1.22058, 0, 0.19947, 0, 0]],
        [[0.83137, 0, 0, 0, 0], [1.25769, 0, 0.04417, 0, 0]],
        ([0, 0.73575, 0.48619], [0, 0.76102, 0.46160]),
        [0.01398, -0.04277, -0.0393],
    ),
}


@pytest.mark.parametrize("adjoint", [False, True])
def test_states_of_a_convolutional_network_are_those_of_the_authors(adjoint):
    """Two convolutions, the first with pooling, and two dense layers: what the authors' code gives for α = 0.3."""

    def wave(*shape: int, k: float = 1.0) -> np.ndarray:
        return np.cos(k * np.arange(1, 1 + np.prod(shape)) ** 1.3).reshape(shape).astype(np.float32)

    def convolution(weight: np.ndarray, bias: np.ndarray) -> eqx.nn.Conv2d:
        weight = weight.transpose(3, 2, 0, 1)  # theirs are by height, width, in, out
        layer = eqx.nn.Conv2d(weight.shape[1], len(weight), 3, padding=1, key=KEY)
        return eqx.tree_at(lambda m: (m.weight, m.bias), layer, (jnp.asarray(weight), jnp.asarray(bias)[:, None, None]))

    def dense(weight: np.ndarray, bias: np.ndarray) -> eqx.nn.Linear:
        layer = eqx.nn.Linear(*weight.shape, key=KEY)
        return eqx.tree_at(lambda m: (m.weight, m.bias), layer, (jnp.asarray(weight.T), jnp.asarray(bias)))

    flatten = eqx.nn.Lambda(lambda x: x.transpose(1, 2, 0).ravel())
    model = Network((
        eqx.nn.Sequential([convolution(0.6 * wave(3, 3, 1, 3), 0.1 * wave(3)), eqx.nn.MaxPool2d(2, 2)]),
        convolution(0.4 * wave(3, 3, 3, 4, k=0.7), 0.1 * wave(4, k=0.7)),
        eqx.nn.Sequential([flatten, dense(0.3 * wave(64, 5, k=0.9), 0.1 * wave(5))]),
        dense(0.5 * wave(5, 3, k=1.1), 0.1 * wave(3)),
    ))  # fmt: skip
    x = wave(2, 8, 8, 1, k=0.3).transpose(0, 3, 1, 2)
    rule = DualProp(cross_entropy, 0.3, 0.5, adjoint=adjoint)
    _, dyads = eqx.filter_jit(infer_states)(rule, model, (jnp.asarray(x), jnp.array([0, 2])), KEY)
    plus = [s + 0.7 * d for s, d in zip(dyads.mean, dyads.delta)]
    minus = [s - 0.3 * d for s, d in zip(dyads.mean, dyads.delta)]
    third_plus, third_minus, pixel, row = THEIRS[adjoint]
    np.testing.assert_allclose(plus[3], third_plus, atol=2e-5)
    np.testing.assert_allclose(minus[3], third_minus, atol=2e-5)
    np.testing.assert_allclose((plus[1][0, :, 1, 2], minus[1][0, :, 1, 2]), pixel, atol=2e-5)
    grads = eqx.filter_jit(rule.contrast)(model, dyads)
    np.testing.assert_allclose(grads.layers[0].layers[0].weight[0, 0, 1], row, atol=2e-5)


def test_more_sweeps_settle():
    rule = lambda sweeps: DualProp(cross_entropy, beta=0.5, sweeps=sweeps)
    states = [infer_states(rule(n), perceptron(5, 12, 8, 3), batch(), KEY)[1].delta[1] for n in (1, 2, 20, 21)]
    assert (states[0] != states[1]).any()
    np.testing.assert_allclose(states[2], states[3], atol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_damping_settles_what_does_not_settle_by_itself(alpha):
    model, (x, y) = jax.tree.map(lambda w: 2.5 * w, perceptron(5, 12, 12, 12, 3)), batch()
    changes = []
    for damped in (False, True):
        rule = DualProp(cross_entropy, alpha, 0.5, damped=damped)
        dyads = Dyads.at_rest(jax.vmap(model.activities)(x))
        nudge, damping = rule.nudge(dyads.mean[-1], y, KEY)[1], rule.damping(model, dyads)
        sweep = eqx.filter_jit(rule.settle)
        for _ in range(60):
            before, dyads = dyads, sweep(model, dyads, (4, 3, 2, 1, 1, 2, 3), nudge, damping)
        changes.append(max(float(abs(a - b).max()) for a, b in zip(before.delta, dyads.delta)))
    assert changes[0] > 0.1 and changes[1] < 1e-3


def test_spectral_norm():
    convolution = eqx.nn.Conv2d(2, 3, 3, key=KEY)
    x = jnp.zeros((2, 6, 6))
    matrix = np.asarray(jax.jacobian(convolution)(x)).reshape(3 * 4 * 4, -1)
    assert float(spectral_norm(convolution, x)) == pytest.approx(np.linalg.norm(matrix, 2), rel=1e-2)
    nothing = eqx.tree_at(lambda m: m.weight, convolution, jnp.zeros_like(convolution.weight))
    assert float(spectral_norm(nothing, x)) == 0


def test_convolution_with_pooling():
    first, second = jax.random.split(KEY)
    pooled = eqx.nn.Sequential([eqx.nn.Conv2d(1, 4, 3, key=first), eqx.nn.MaxPool2d(2, 2), eqx.nn.Lambda(jnp.ravel)])
    model = Network((pooled, eqx.nn.Linear(4 * 9, 3, key=second)))
    data = jax.random.normal(KEY, (6, 1, 8, 8)), jnp.arange(6) % 3
    theirs = Backprop(cross_entropy).value_and_grad(model, data, KEY)[1]
    ours = DualProp(cross_entropy, beta=0.05).value_and_grad(model, data, KEY)[1]
    close(ours, theirs, 0.05)


def test_training():
    x, _ = batch(200)
    y = (x[:, 0] * x[:, 1] > 0).astype(jnp.int32)
    model, _ = fit(DualProp(cross_entropy), perceptron(5, 32, 16, 2), (x, y), optax.adam(1e-2), 200, key=KEY)
    assert (np.asarray(jax.vmap(model)(x)).argmax(1) == y).mean() > 0.95


def test_bad_arguments():
    for wrong in ({"alpha": 1.5}, {"beta": 0.0}, {"sweeps": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            DualProp(cross_entropy, **wrong)
    with pytest.raises(ValueError, match="MLP"):
        DualProp(cross_entropy).value_and_grad(eqx.nn.MLP(5, 3, 4, 1, key=KEY), batch(), KEY)
    model = Network((*perceptron(5, 4).layers, eqx.nn.BatchNorm(4, "batch", mode="batch")))
    with pytest.raises(ValueError, match="BatchNorm"):
        DualProp(cross_entropy).value_and_grad(model, batch(), KEY)


@pytest.fixture(scope="module")
def held():
    """A cell of four layers at rest, its step, and one input to hold."""
    model = perceptron(5, 12, 8, 8, 3)
    cell = DualPropCell(model, optax.sgd(0.1), (5,), DualProp(cross_entropy, beta=0.05))
    x, y = batch(1)
    return cell, jax.jit(lambda state, event: cell.step(state, event)), x[0], y[0]


def test_the_cell_settles_at_the_scores_and_the_gradient_of_the_network(held):
    cell, step, x, y = held
    state, seen = cell.init(), []
    for _ in range(4):  # two to the output, two more back to the first layer
        state, scores = step(state, Event(x, Maybe(y, True), 0.0))
        seen.append(scores)
    wanted = cell.model(x)
    assert np.abs(seen[0] - wanted).max() > 1e-3
    np.testing.assert_allclose(seen[1], wanted, atol=1e-6)
    np.testing.assert_allclose(cell.predict(state, x), wanted, atol=1e-4)
    jax.tree.map(np.testing.assert_array_equal, state.model, cell.model)  # a weight of 0 taught nothing
    settled = DualProp(cross_entropy, beta=0.05).value_and_grad(cell.model, (x[None], y[None]), KEY)[1]
    close(cell.rule.contrast(cell.model, state.dyads), settled, 1e-2)
    learned = step(state, Event(x, Maybe(y, True), 2.0))[0].model
    close(jax.tree.map(lambda a, b: (a - b) / 0.2, cell.model, learned), settled, 1e-2)


def test_without_a_target_errors_die_away(held):
    cell, step, x, y = held
    state, errors = cell.init(), []
    for target in 4 * [True] + 3 * [False]:
        state, _ = step(state, Event(x, Maybe(y, target), 0.0))
        errors = [float(abs(d).max()) for d in state.dyads.delta[1:]]
        assert (min(errors) > 0) or state.t < 4 or not target
    assert max(errors) == 0


def test_a_bad_event_is_counted_and_leaves_no_trace(held):
    cell, step, x, y = held
    state, _ = step(cell.init(), Event(x, Maybe(y, True), 1.0))
    for bad in (Event(x * jnp.nan, Maybe(y, True), 1.0), Event(x, Maybe(y, True), jnp.nan)):
        new, _ = step(state, bad)
        assert new.rejected == 1 and new.t == 2
        jax.tree.map(np.testing.assert_array_equal, new._replace(rejected=state.rejected, t=state.t), state)
    with pytest.raises(ValueError, match="sweeps=2"):
        DualPropCell(cell.model, optax.sgd(0.1), (5,), DualProp(cross_entropy, sweeps=2))
