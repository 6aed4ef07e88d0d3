"""Metrics against River's and scikit-learn's on the same predictions, and by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anabranch.learn.metrics import (
    ROCAUC,
    Accuracy,
    Calibration,
    Kappa,
    KappaM,
    KappaT,
    LogLoss,
    WindowedAccuracy,
)

T, C = 1500, 4


@pytest.fixture(scope="module")
def river():
    river = pytest.importorskip("river")
    from river import metrics, utils  # noqa: F401

    return river


@pytest.fixture(scope="module")
def labels():
    """Targets in runs, of unequal frequency, and predictions that are right most of the time."""
    rng = np.random.default_rng(0)
    y = np.repeat(rng.choice(C, T // 5, p=[0.5, 0.3, 0.15, 0.05]), 5).astype(np.int32)
    p = np.where(rng.random(T) < 0.7, y, rng.integers(0, C, T)).astype(np.int32)
    return y, p


def follow(peer, y, p):
    for a, b in zip(y.tolist(), p.tolist()):
        peer.update(a, b)
    return peer.get()


def test_accuracy_and_kappa_are_rivers(river, labels):
    y, p = labels
    np.testing.assert_allclose(Accuracy()(y, p), follow(river.metrics.Accuracy(), y, p), atol=1e-6)
    np.testing.assert_allclose(Kappa(C)(y, p), follow(river.metrics.CohenKappa(), y, p), atol=1e-6)
    metric, peer = WindowedAccuracy(100), river.utils.Rolling(river.metrics.Accuracy(), window_size=100)
    _, curve = jax.jit(lambda xs: metric.advance(metric.init(), xs))((jnp.asarray(y), jnp.asarray(p)))
    theirs = []
    for a, b in zip(y.tolist(), p.tolist()):
        peer.update(a, b)
        theirs.append(peer.get())
    np.testing.assert_allclose(curve, theirs, atol=1e-6)
    np.testing.assert_allclose(WindowedAccuracy(2 * T)(y, p), (y == p).mean(), atol=1e-6)


def test_kappa_m_and_t_are_what_they_say(labels):
    y, p = labels
    accuracy = (y == p).mean()
    majority = np.mean([t > 0 and np.bincount(y[:t], minlength=C).argmax() == y[t] for t in range(T)])
    same = np.mean(np.append(False, y[1:] == y[:-1]))
    np.testing.assert_allclose(KappaM(C)(y, p), (accuracy - majority) / (1 - majority), atol=1e-5)
    np.testing.assert_allclose(KappaT()(y, p), (accuracy - same) / (1 - same), atol=1e-5)
    assert KappaT()(y, p) < 0 < KappaM(C)(y, p)  # repeating the last label is better than these predictions


def test_kappas_where_chance_is_perfect():
    y = jnp.zeros(10, jnp.int32)
    assert [float(m(y, y)) for m in (Kappa(2), Accuracy())] == [0.0, 1.0]


@pytest.fixture(scope="module")
def scores():
    """Probabilities of five kinds: spread out, rare (below 1/1000), over-confident, in steps of 1/20, all near ½."""
    rng = np.random.default_rng(1)
    spread = rng.beta(2, 2, 20000)
    rare = np.exp(rng.normal(-8, 1.0, 20000))
    y = {"spread": rng.random(20000) < spread, "rare": rng.random(20000) < 100 * rare.clip(0, 0.01)}
    sure = rng.random(20000) < spread
    z = rng.normal(0, 0.1, 20000)
    return {
        "close": (z + rng.normal(0, 0.02, 20000) > 0, 1 / (1 + np.exp(-z))),
        "spread": (y["spread"], spread),
        "rare": (y["rare"], rare),
        "sure": (sure, 1 / (1 + ((1 - spread) / spread) ** 4)),
        "steps": (y["spread"], np.round(spread * 20) / 20),
    }


@pytest.mark.parametrize("kind", ["spread", "rare", "sure", "steps", "close"])
def test_auc_is_exact_to_a_thousandth(scores, kind):
    exact = pytest.importorskip("sklearn.metrics").roc_auc_score
    y, p = scores[kind]
    ours = ROCAUC()(y.astype(np.int32), p.astype(np.float32))
    assert abs(float(ours) - exact(y, p)) < 1e-3


def test_log_loss_is_rivers(river, scores):
    y, p = (a[:T] for a in scores["sure"])
    p = np.concatenate([p, [0.0, 1.0, 1.0]]).astype(np.float32)
    y = np.concatenate([y, [0, 1, 0]]).astype(np.int32)
    np.testing.assert_allclose(LogLoss()(y, p), follow(river.metrics.LogLoss(), y.astype(bool), p), rtol=1e-4)
    # The same as probabilities of two classes.
    np.testing.assert_allclose(LogLoss()(y, np.stack([1 - p, p], 1)), LogLoss()(y, p), rtol=1e-5)


def test_calibration(scores):
    y, p = scores["sure"]
    found = Calibration(bins=10)(y.astype(np.int32), p.astype(np.float32))
    which = np.minimum((p.astype(np.float32) * 10).astype(int), 9)
    share = np.bincount(which) / len(p)
    gap = [abs(p[which == b].mean() - y[which == b].mean()) for b in range(10)]
    np.testing.assert_allclose(found["error"], share @ gap, atol=1e-4)
    assert np.array_equal(found["count"], np.bincount(which))
    y, p = scores["spread"]
    assert Calibration()(y.astype(np.int32), p.astype(np.float32))["error"] < 0.02 < found["error"]


def test_predictions_may_be_classes_probabilities_or_scores():
    y = jnp.array([0, 1, 1, 0])
    p = jnp.array([0.2, 0.9, 0.4, 0.5])
    for metric in (Accuracy(), Kappa(2), KappaM(2), KappaT()):
        values = [float(metric(y, q)) for q in ((p > 0.5).astype(jnp.int32), p, jnp.stack([1 - p, p], 1))]
        assert values[0] == values[1] == values[2]


def test_elec2_baselines():
    """Repeating the last label and the majority class, as published for this stream."""
    from anabranch.learn.streams import elec2

    try:
        _, y = elec2()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    assert round(float(Accuracy()(y, np.ones_like(y))), 4) == 0.5755
    _, same = KappaT(), np.append(1 - y[0], y[:-1])
    assert round(float(Accuracy()(y, same)), 4) == 0.8533
    assert abs(float(KappaT()(y, same))) < 1e-6


@pytest.mark.parametrize(
    "metric",
    [Accuracy(), WindowedAccuracy(10), Kappa(C), KappaM(C), KappaT(), LogLoss(), ROCAUC(64), Calibration()],
    ids=lambda m: type(m).__name__,
)
def test_contract(metric, labels):
    from anabranch.contract import check

    y = jnp.asarray(labels[0][:50] % 2)
    rng = np.random.default_rng(2)
    # Away from the borders of bins and from one half, where metrics jump and have no derivative.
    p = jnp.asarray((rng.integers(0, 10, 50) + rng.uniform(0.4, 0.6, 50)) / 10, jnp.float32)
    report = check(metric, (y, p))
    assert report.ok, str(report)


def test_a_batch_of_metrics_is_each_alone(labels):
    y, p = (jnp.asarray(a).reshape(3, -1) for a in labels)
    kappas = jax.vmap(Kappa(C))(y, p)
    assert kappas.shape == (3,)
    np.testing.assert_allclose(kappas[1], Kappa(C)(y[1], p[1]), atol=1e-6)
