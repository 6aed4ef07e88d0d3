"""Learners as River and scikit-learn estimators, and the other way round."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from anabranch.adapters import HostLearner, RiverClassifier, RiverRegressor, SklearnClassifier, SklearnRegressor
from anabranch.cell import Event, Maybe
from anabranch.learn.linear import LinearRegression, LogisticRegression, Scaled, SoftmaxRegression

T, D = 300, 4


@pytest.fixture(scope="module")
def river():
    river = pytest.importorskip("river")
    from river import compose, evaluate, linear_model, metrics, naive_bayes, optim, preprocessing  # noqa: F401

    return river


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(T, D)).astype(np.float32) * 3 + 1
    y = (x @ np.array([1, -1, 0.5, 0]) + rng.normal(size=T) > 0.5).astype(np.int32)
    return x, y


def logistic():
    return Scaled(LogisticRegression(D, optax.sgd(0.1)))


def test_as_a_river_classifier(river, rows):
    """In River's own evaluation it makes the same predictions as River's own model, under other labels."""
    x, y = rows
    names = np.array(["spam", "ham"])
    stream = [(dict(zip("abcd", row)), bool(label)) for row, label in zip(x.tolist(), y)]
    ours = RiverClassifier(logistic())
    theirs = river.preprocessing.StandardScaler() | river.linear_model.LogisticRegression(river.optim.SGD(0.1))
    assert ours.predict_one(stream[0][0]) is None and ours.predict_proba_one(stream[0][0]) == {}
    for features, label in stream:
        p, q = ours.predict_proba_one(features), theirs.predict_proba_one(features)
        assert not p or (list(p) == [False, True] and abs(p[True] - q[True]) < 1e-4)
        ours.learn_one(features, label)
        theirs.learn_one(features, label)
    # With labels that are words, inside a River pipeline, on a clone.
    named = RiverClassifier(LogisticRegression(D, optax.sgd(0.1)), labels=["spam", "ham"])
    pipeline = (river.preprocessing.StandardScaler() | named).clone()
    metric = river.evaluate.progressive_val_score(
        [(features, names[int(label)]) for features, label in stream], pipeline, river.metrics.Accuracy()
    )
    assert metric.get() > 0.75
    assert set(pipeline.predict_proba_one(stream[0][0])) == {"spam", "ham"}


def test_river_features_keep_their_order(river, rows):
    x, y = rows
    model, same = RiverClassifier(logistic()), RiverClassifier(logistic(), features="abcd")
    for row, label in zip(x[:20].tolist(), y[:20].tolist()):
        model.learn_one(dict(zip("abcd", row)), label)
        same.learn_one(dict(reversed(list(zip("abcd", row)))), label)
    event = dict(zip("abcd", x[20].tolist()))
    assert model.predict_proba_one(event) == same.predict_proba_one(event)
    mean = model.predict_proba_one({**event, "c": float(x[:20, 2].mean())})
    event.pop("c")  # missing: the mean, to a scaled learner
    assert model.predict_proba_one(event)[1] == pytest.approx(mean[1], abs=1e-6)
    with pytest.raises(ValueError, match=r"'e'"):
        model.learn_one({**event, "e": 1.0}, 1)
    with pytest.raises(ValueError, match=r"'c'.*'red'"):
        model.learn_one({**event, "c": "red"}, 1)
    with pytest.raises(ValueError, match=r"'maybe'.*2 classes"):
        model.learn_one(event, "maybe")


def test_as_a_river_regressor(river, rows):
    x, _ = rows
    ours, theirs = (
        RiverRegressor(LinearRegression(D, optax.sgd(0.01))),
        river.linear_model.LinearRegression(river.optim.SGD(0.01)),
    )
    for row in x[:100].tolist():
        features, y = dict(enumerate(row)), row[0] - 2 * row[1]
        assert abs(ours.predict_one(features) - theirs.predict_one(features)) < 1e-3
        ours.learn_one(features, y)
        theirs.learn_one(features, y)


def test_as_a_sklearn_classifier(rows):
    base = pytest.importorskip("sklearn.base")
    x, y = rows
    names = np.array(["no", "yes"])
    model = base.clone(SklearnClassifier(logistic()))
    assert model.get_params()["seed"] == 0
    for start in range(0, T, 77):  # blocks of unequal length
        model.partial_fit(x[start : start + 77], names[y[start : start + 77]], classes=names)
    learner = logistic()
    events = Event(jnp.asarray(x), Maybe(jnp.asarray(y), jnp.ones(T, bool)), jnp.ones(T))
    state, _ = jax.jit(lambda e: learner.advance(learner.init(), e))(events)
    expected = jax.vmap(lambda row: learner.predict(state, row))(x)
    np.testing.assert_allclose(model.predict_proba(x)[:, 1], expected, atol=1e-6)
    np.testing.assert_allclose(model.predict_proba(x).sum(1), 1, atol=1e-6)
    assert set(model.predict(x)) == {"no", "yes"} and model.score(x, names[y]) > 0.8
    assert model.fit(x[:50], y[:50]).classes_.tolist() == [0, 1]


def test_sklearn_sample_weights_and_three_classes(rows):
    pytest.importorskip("sklearn")
    x, _ = rows
    y = np.digitize(x[:, 0], [-0.5, 2.5])
    model = SklearnClassifier(SoftmaxRegression(D, optax.sgd(0.05), classes=5))  # room for more than there are
    assert model.fit(x, y).predict_proba(x).shape == (T, 3) and model.score(x, y) > 0.6
    unmoved = SklearnClassifier(SoftmaxRegression(D, optax.sgd(0.05), classes=3)).fit(x, y, sample_weight=np.zeros(T))
    np.testing.assert_allclose(unmoved.predict_proba(x), 1 / 3, atol=1e-6)


def test_sklearn_errors(rows):
    exceptions = pytest.importorskip("sklearn.exceptions")
    x, y = rows
    model = SklearnClassifier(logistic())
    with pytest.raises(exceptions.NotFittedError):
        model.predict(x)
    with pytest.raises(ValueError, match="classes must be passed"):
        model.partial_fit(x, y)
    with pytest.raises(ValueError, match=r"3 entries.*2"):
        model.partial_fit(x, y, classes=[0, 1, 2])
    model.partial_fit(x, y, classes=[0, 1])
    with pytest.raises(ValueError, match="label 7"):
        model.partial_fit(x[:1], [7])
    with pytest.raises(ValueError, match=r"3 features.*4"):
        model.predict(x[:, :3])


def test_as_a_sklearn_regressor(rows):
    base = pytest.importorskip("sklearn.base")
    x, _ = rows
    y = x @ np.array([1.0, -1.0, 2.0, 0.0]) + 3
    model = base.clone(SklearnRegressor(Scaled(LinearRegression(D, optax.sgd(0.05), intercept_lr=0.05))))
    assert model.fit(x, y).score(x, y) > 0.9


def host_run(learner, x, y):
    state, out = learner.init(), []
    for row, label in zip(x, y):
        state, p = learner.step(state, Event(row, Maybe(label, True)))
        out.append(p)
    return state, np.array(out)


def test_a_river_model_as_a_learner(river, rows):
    x, y = rows
    model = river.preprocessing.StandardScaler() | river.linear_model.LogisticRegression(river.optim.SGD(0.1))
    state, out = host_run(HostLearner(model, classes=2), x, y)
    learner = logistic()
    events = Event(jnp.asarray(x), Maybe(jnp.asarray(y), jnp.ones(T, bool)), jnp.ones(T))
    _, ours = jax.jit(lambda e: learner.advance(learner.init(), e))(events)
    np.testing.assert_allclose(out[:, 1], ours, atol=1e-4)
    assert (
        not model["LogisticRegression"].weights and state["LogisticRegression"].weights
    )  # the given model is untouched


def test_host_learner_ignores_events_without_target(river, rows):
    x, _ = rows
    learner = HostLearner(river.naive_bayes.GaussianNB(), classes=3)
    state, p = learner.step(learner.init(), Event(x[0], Maybe(1, False)))
    assert p.tolist() == pytest.approx([1 / 3] * 3) and not state.class_counts
    state, _ = learner.step(state, Event(x[0], Maybe(1, True)))
    assert learner.predict(state, x[0]).argmax() == 1


def test_a_sklearn_model_as_a_learner(rows):
    linear = pytest.importorskip("sklearn.linear_model")
    x, y = rows
    learner = HostLearner(linear.SGDClassifier(loss="log_loss", random_state=0), classes=2)
    _, out = host_run(learner, x, y)
    assert out.shape == (T, 2) and out[0].tolist() == [0.5, 0.5]
    assert (out.argmax(1) == y)[50:].mean() > 0.7
    hinge = HostLearner(linear.SGDClassifier(random_state=0), classes=2)  # has no probabilities
    _, out = host_run(hinge, x[:20], y[:20])
    assert set(out[1:].ravel().tolist()) == {0.0, 1.0}
    _, out = host_run(HostLearner(linear.SGDRegressor(random_state=0)), x, x[:, 0])
    assert out.shape == (T,) and out[0] == 0 and out.dtype == np.float32


def test_a_host_learner_in_the_driver(rows):
    linear = pytest.importorskip("sklearn.linear_model")
    from anabranch.drive import evaluate
    from anabranch.learn.metrics import Accuracy

    x, y = rows
    learner = HostLearner(linear.SGDClassifier(loss="log_loss", random_state=0), classes=2)
    found = evaluate(learner, x, y, metrics={"accuracy": Accuracy()})
    assert found.scores["accuracy"] > 0.7


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match=r"learn_one or partial_fit.*42"):
        HostLearner(42)


def test_missing_libraries_name_the_extra(monkeypatch):
    import anabranch.adapters as adapters

    monkeypatch.setattr(adapters, "river", None)
    monkeypatch.setattr(adapters, "sklearn", None)
    for make in (
        adapters.RiverClassifier,
        adapters.RiverRegressor,
        adapters.SklearnClassifier,
        adapters.SklearnRegressor,
    ):
        with pytest.raises(ImportError, match="peers"):
            make(logistic())
