"""Linear models and the scaler against River on the same 2,000 rows, and by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from anabranch.cell import Event, Maybe
from anabranch.learn.linear import (
    LinearRegression,
    LogisticRegression,
    Scaled,
    Scaler,
    SoftmaxRegression,
    adagrad,
    ftrl,
)

T, D = 2000, 6


@pytest.fixture(scope="module")
def river():
    river = pytest.importorskip("river")
    from river import compose, linear_model, optim, preprocessing  # noqa: F401

    return river


@pytest.fixture(scope="module")
def rows():
    """Features of unequal scales, one of them constant, and labels that depend on them noisily."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(T, D)).astype(np.float32)
    y = (z @ rng.normal(size=D) + rng.normal(size=T) > 0.3).astype(np.int32)
    x = z * np.array([1, 10, 0.1, 3, 1, 0], np.float32) + np.array([0, 50, 0, -4, 1, 7], np.float32)
    return z, x.astype(np.float32), y


def run(model, x, y, weight=None):
    events = Event(
        jnp.asarray(x), Maybe(jnp.asarray(y), jnp.ones(len(x), bool)), jnp.ones(len(x)) if weight is None else weight
    )
    return jax.jit(lambda e: model.advance(model.init(), e))(events)


def run_river(model, x, y, weight=None, before_predict=lambda model: None):
    out = []
    for t in range(len(x)):
        row = dict(enumerate(x[t].tolist()))
        before_predict(model)
        p = model.predict_proba_one(row)[True] if hasattr(model, "predict_proba_one") else model.predict_one(row)
        out.append(p)
        model.learn_one(row, y[t].item(), **({} if weight is None else {"w": weight[t].item()}))
    return np.array(out)


def test_logistic_regression_with_sgd_is_rivers(river, rows):
    z, _, y = rows
    weight = np.random.default_rng(1).uniform(0.2, 3.0, T).astype(np.float32)
    state, ours = run(LogisticRegression(D, optax.sgd(0.05), l2=0.01, intercept_lr=0.03), z, y, weight)
    peer = river.linear_model.LogisticRegression(river.optim.SGD(0.05), l2=0.01, intercept_lr=0.03)
    np.testing.assert_allclose(ours, run_river(peer, z, y, weight), atol=1e-4)
    np.testing.assert_allclose(state.intercept, peer.intercept, atol=1e-4)


def test_logistic_regression_with_adagrad_is_rivers(river, rows):
    z, _, y = rows
    _, ours = run(LogisticRegression(D, adagrad(0.1)), z, y)
    peer = river.linear_model.LogisticRegression(river.optim.AdaGrad(0.1))
    np.testing.assert_allclose(ours, run_river(peer, z, y), atol=1e-4)


@pytest.mark.parametrize("l1", [0.0, 2.0])
def test_logistic_regression_with_ftrl_is_rivers(river, rows, l1):
    z, _, y = rows

    class Current(river.optim.FTRLProximal):
        """River's, with the weights brought up to date before they are used, where the paper does it."""

        def look_ahead(self, w):
            for i, z in self.z.items():
                step = (self.beta + self.n[i] ** 0.5) / self.alpha + self.l2
                w[i] = -(z - np.sign(z) * self.l1) / step if abs(z) > self.l1 else 0.0
            return w

    _, ours = run(LogisticRegression(D, ftrl(0.1, 1.0, l1, 0.5)), z, y)
    peer = river.linear_model.LogisticRegression(Current(0.1, 1.0, l1, 0.5))
    theirs = run_river(peer, z, y, before_predict=lambda model: model.optimizer.look_ahead(model._weights))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_ftrl_is_algorithm_1_and_sparse():
    """Against the paper's pseudo-code in float64, with features that mean nothing: L1 sets their weights to 0."""
    rng = np.random.default_rng(2)
    x = rng.normal(size=(500, 8)).astype(np.float32)
    y = (x[:, 0] - x[:, 1] > 0).astype(np.int32)
    alpha, beta, l1, l2 = 0.1, 1.0, 8.0, 0.1
    z, n, expected = np.zeros(8), np.zeros(8), []
    for row, label in zip(x.astype(np.float64), y):
        w = np.where(np.abs(z) <= l1, 0.0, -(z - np.sign(z) * l1) / ((beta + np.sqrt(n)) / alpha + l2))
        p = 1 / (1 + np.exp(-w @ row))
        expected.append(p)
        g = (p - label) * row
        z += g - (np.sqrt(n + g**2) - np.sqrt(n)) / alpha * w
        n += g**2
    state, ours = run(LogisticRegression(8, ftrl(alpha, beta, l1, l2), intercept_lr=0.0), x, y)
    np.testing.assert_allclose(ours, expected, atol=1e-4)
    weights = np.asarray(state.weights)
    assert (weights[:2] != 0).all() and (weights[2:] == 0).sum() >= 4


def test_linear_regression_is_rivers(river, rows):
    z, _, _ = rows
    y = (z @ np.arange(D) + 2).astype(np.float32)
    _, ours = run(LinearRegression(D, optax.sgd(0.01)), z, y)
    peer = river.linear_model.LinearRegression(river.optim.SGD(0.01))
    np.testing.assert_allclose(ours, run_river(peer, z, y), atol=1e-3)


def test_softmax_regression_of_two_classes_is_logistic_regression(rows):
    """Its two weight vectors mirror each other and move as far together as the one does: a slope of p − y each."""
    z, _, y = rows
    _, ours = run(SoftmaxRegression(D, optax.sgd(0.05), intercept_lr=0.05, classes=2), z, y)
    _, logistic = run(LogisticRegression(D, optax.sgd(0.1), intercept_lr=0.1), z, y)
    np.testing.assert_allclose(ours[:, 1], logistic, atol=1e-4)


def test_scaler_is_rivers(river, rows):
    _, x, _ = rows
    scaler, peer = Scaler(D), river.preprocessing.StandardScaler()
    _, ours = jax.jit(lambda x: scaler.advance(scaler.init(), x))(x)
    theirs = []
    for row in x:
        row = dict(enumerate(row.tolist()))
        peer.learn_one(row)
        theirs.append(list(peer.transform_one(row).values()))
    np.testing.assert_allclose(ours, theirs, atol=2e-4)
    assert (np.asarray(ours)[:, 5] == 0).all()  # the constant feature


def test_missing_features_leave_the_statistics_alone(rows):
    """A stream with gaps has, feature by feature, the statistics of the stream without them."""
    _, x, _ = rows
    gaps = np.random.default_rng(3).random(x.shape) < 0.3
    scaler = Scaler(D)
    holed = jnp.where(gaps, jnp.where(np.arange(D) % 2, jnp.nan, jnp.inf), x)
    state, z = jax.jit(lambda x: scaler.advance(scaler.init(), x))(holed)
    for d in range(D):
        seen = x[~gaps[:, d], d]
        np.testing.assert_allclose(state.mean[d], seen.mean(), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(state.var[d], seen.var(), rtol=1e-3, atol=1e-6)
    assert (np.asarray(z)[gaps] == 0).all() and np.isfinite(z).all()


def test_scaled_is_a_river_pipeline(river, rows):
    _, x, y = rows
    _, ours = run(Scaled(LogisticRegression(D, optax.sgd(0.1), l2=0.001)), x, y)
    peer = river.compose.Pipeline(
        river.preprocessing.StandardScaler(), river.linear_model.LogisticRegression(river.optim.SGD(0.1), l2=0.001)
    )
    np.testing.assert_allclose(ours, run_river(peer, x, y), atol=1e-4)


def test_an_event_without_target_changes_nothing(rows):
    _, x, _ = rows
    model = Scaled(LogisticRegression(D, adagrad()))
    state = model.init()
    after, p = model.step(state, Event(x[0], Maybe(jnp.asarray(1), jnp.asarray(False)), 1.0))
    assert float(p) == 0.5
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(after)))


@pytest.mark.parametrize(
    "model",
    [
        LogisticRegression(D, ftrl()),
        Scaled(LogisticRegression(D, adagrad(), l2=0.01)),
        Scaled(LinearRegression(D, optax.adam(0.01, eps_root=1e-8))),  # without it Adam has no derivative at slope 0
        SoftmaxRegression(D, optax.sgd(0.1), classes=3),
    ],
    ids=lambda m: type(m).__name__,
)
def test_contract(model, rows):
    from anabranch.contract import check

    z, _, y = rows
    target = y.astype(np.float32) if isinstance(model, Scaled) and isinstance(model.learner, LinearRegression) else y
    events = Event(jnp.asarray(z[:64]), Maybe(jnp.asarray(target[:64]), jnp.arange(64) % 3 > 0), jnp.ones(64))
    report = check(model, events)
    assert report.ok, str(report)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"features.*0"):
        LogisticRegression(0, optax.sgd(0.1))
    with pytest.raises(TypeError, match=r"optimizer.*0\.1"):
        LogisticRegression(3, 0.1)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"l2.*-1"):
        LogisticRegression(3, optax.sgd(0.1), l2=-1)
    with pytest.raises(ValueError, match=r"alpha.*0"):
        ftrl(alpha=0)
    model = LogisticRegression(3, optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"\(3,\).*\(4,\)"):
        model.predict(model.init(), jnp.zeros(4))
