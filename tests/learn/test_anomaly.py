"""Anomaly scorers: what they notice and what not, and half-space trees against River's with the same splits."""

import importlib
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anabranch.contract import check
from anabranch.learn.anomaly import AnomalyLikelihood, HalfSpaceTrees

SCORERS = {"AnomalyLikelihood": AnomalyLikelihood(warm=20), "HalfSpaceTrees": HalfSpaceTrees(2, height=4, window=30)}


def run(cell, xs):
    return jax.jit(lambda xs: cell.advance(cell.init(), xs))(jnp.asarray(xs, jnp.float32))


def noise(n, seed=0):
    return np.random.default_rng(seed).normal(50.0, 2.0, n).astype(np.float32)


@pytest.mark.parametrize("name", SCORERS)
def test_contract(name):
    xs = np.random.default_rng(0).uniform(size=(200, 2)).astype(np.float32)
    report = check(SCORERS[name], jnp.asarray(xs[:, 0] if name == "AnomalyLikelihood" else xs))
    assert report.ok, str(report)


def test_usual_noise_raises_no_alarm_but_at_records_and_a_spike_does():
    xs = noise(5000)
    _, usual = run(AnomalyLikelihood(), xs)
    before = np.maximum.accumulate(xs)[:-1], np.minimum.accumulate(xs)[:-1]
    record = np.r_[True, (xs[1:] > before[0]) | (xs[1:] < before[1])]
    assert not usual.alarm[~record].any() and usual.alarm.sum() < 10
    xs[4000] = 90.0
    _, anomaly = run(AnomalyLikelihood(), xs)
    assert anomaly.score[4000] == 1 and anomaly.alarm[4000]
    assert np.array_equal(anomaly.score[:4000], usual.score[:4000])


@pytest.mark.parametrize("scale, shift", [(1.0, 0.0), (1e-6, 0.0), (1e9, 1e10)])
def test_wilder_readings_within_the_range_are_noticed_in_any_unit(scale, shift):
    """Every reading has been seen before, but no such run of them: only the likelihood can tell."""
    xs = noise(5000)
    extremes = np.array([xs[:4000].min(), xs[:4000].max()])
    xs[4000:4030] = np.tile(extremes, 15)
    _, anomaly = run(AnomalyLikelihood(), xs * scale + shift)
    assert anomaly.alarm[4020:4030].all() and anomaly.score[4000:4030].max() < 1
    assert not anomaly.alarm[3000:4000].any()


def test_likelihood_by_hand():
    """The formulas of the docstring, in double precision, one reading after the other."""
    from scipy.special import erf, log_ndtr

    xs = noise(300).astype(np.float64)
    level = error = recent = mean = variance = 0.0
    expected = []
    for n, x in enumerate(xs):
        short, long = max(1 / max(n, 1), 2 / 11), max(1 / max(n, 1), 2 / 101)
        e = abs(x - level) if n else 0.0
        recent += short * (erf(e / ((error + 1e-6 * abs(level) + 1e-12) * np.sqrt(np.pi))) - recent)
        z = (recent - mean) / np.sqrt(variance + 1e-6)
        expected.append(np.clip(-log_ndtr(-z) / np.log(1e10), 0, 1) if n >= 20 else 0.0)
        level += max(1 / (n + 1), 0.3) * (x - level)
        error += long * (e - error)
        variance = (1 - long) * (variance + long * (recent - mean) ** 2)
        mean += long * (recent - mean)
    _, anomaly = run(AnomalyLikelihood(long=100, warm=20), xs)
    seen = np.maximum.accumulate(xs), np.minimum.accumulate(xs)
    inside = np.r_[False, (xs[1:] <= seen[0][:-1]) & (xs[1:] >= seen[1][:-1])]
    assert inside[20:].sum() > 250
    np.testing.assert_allclose(np.asarray(anomaly.score)[inside], np.array(expected)[inside], atol=1e-4)


def test_a_metric_that_never_changes_is_usual_until_it_does():
    _, anomaly = run(AnomalyLikelihood(), np.r_[np.full(500, 0.1), 0.2])
    assert not anomaly.alarm[:500].any() and anomaly.alarm[500]


@pytest.mark.parametrize("name", SCORERS)
def test_what_is_not_finite_is_no_reading(name):
    cell = SCORERS[name]
    xs = np.random.default_rng(1).uniform(size=(100, 2)).astype(np.float32)
    xs = xs[:, 0] if name == "AnomalyLikelihood" else xs
    state, whole = run(cell, xs)
    with_gaps = np.insert(xs, [10, 50, 90], np.nan, axis=0)
    other, anomaly = run(cell, with_gaps)
    gaps = ~np.isfinite(with_gaps.reshape(103, -1)).all(1)
    assert gaps.sum() == 3 and not np.asarray(anomaly.score)[gaps].any()
    assert np.array_equal(np.asarray(anomaly.score)[~gaps], whole.score)
    assert all(np.array_equal(a, b) for a, b in zip(state, other))


def test_huge_readings_stay_finite():
    state, anomaly = run(AnomalyLikelihood(warm=5), np.r_[noise(50), 3e38, -3e38, noise(50)])
    assert np.isfinite(anomaly.score).all() and all(np.isfinite(leaf) for leaf in state)


def test_half_space_trees_are_those_of_river():
    anomaly = pytest.importorskip("river.anomaly")
    rng = np.random.default_rng(2)
    xs = np.clip(rng.normal(0.5, 0.1, (400, 3)), 0, 1).astype(np.float32)
    xs[[150, 300]] = 0.99
    peer, scores = anomaly.HalfSpaceTrees(n_trees=4, height=5, window_size=50, seed=3), []
    for x in xs.tolist():
        scores.append(peer.score_one(dict(enumerate(x))))
        peer.learn_one(dict(enumerate(x)))

    def splits(node, i=0):
        if i < 2**5 - 1:
            yield i, node.feature, node.threshold
            for k, child in enumerate(node.children):
                yield from splits(child, 2 * i + 1 + k)

    cell = HalfSpaceTrees(3, trees=4, height=5, window=50)
    feature, border = np.zeros(cell.feature.shape, np.int32), np.zeros(cell.border.shape, np.float32)
    for t, tree in enumerate(peer.trees):
        for i, f, b in splits(tree):
            feature[t, i], border[t, i] = f, b
    cell = eqx.tree_at(lambda c: (c.feature, c.border), cell, (jnp.asarray(feature), jnp.asarray(border)))
    _, ours = run(cell, xs)
    np.testing.assert_allclose(ours.score, scores, atol=1e-6)
    assert np.ptp(scores[50:]) > 0.3  # there is something to be equal in


def test_half_space_trees_split_the_unit_box():
    """Each split lies within the box of its node: readings reach many leaves, and the unusual one scores highest."""
    rng = np.random.default_rng(4)
    xs = np.clip(rng.normal(0.4, 0.05, (1000, 2)), 0, 1).astype(np.float32)
    xs[800] = 0.95
    state, anomaly = run(HalfSpaceTrees(2), xs)
    assert (np.asarray(state.reference[:, -256:]) > 0).sum(1).min() >= 2
    assert anomaly.score[800] == anomaly.score.max() and not anomaly.score[:250].any()


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match=r"alpha.*1\.5"):
        AnomalyLikelihood(alpha=1.5)
    with pytest.raises(ValueError, match=r"short <= long.*20 and 10"):
        AnomalyLikelihood(short=20, long=10)
    with pytest.raises(ValueError, match=r"warm.*0"):
        AnomalyLikelihood(warm=0)
    with pytest.raises(ValueError, match=r"window.*0"):
        HalfSpaceTrees(window=0)
    with pytest.raises(ValueError, match=r"threshold.*2"):
        HalfSpaceTrees(threshold=2.0)


def test_the_benchmark_scores_by_hand(monkeypatch):
    """`bench/nab.py`: 20 readings, of which the first 3 do not count, and a window over the readings 10 to 14."""
    pytest.importorskip("river")
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "bench")
    nab = importlib.import_module("nab")
    times = np.datetime64("2026-01-01") + np.arange(20)
    series = nab.series("hand", times, np.zeros(20), [["2026-01-11", "2026-01-15"]])

    def score(alarms):
        return nab.evaluate([series], [np.isin(np.arange(20), alarms).astype(float)], 0.5)

    assert score([])["standard"]["score"] == 0
    assert score([10])["standard"]["score"] == pytest.approx(100)
    assert score([2, 10, 12])["standard"]["score"] == pytest.approx(100)  # too early to count; a second alarm
    late = (2 / (1 + np.exp(-1)) - 1) / (2 / (1 + np.exp(-5)) - 1)  # the last reading of five
    assert score([14])["standard"]["score"] == pytest.approx(100 * (late + 1) / 2)
    after = 1 - 2 / (1 + np.exp(2.5))  # half a window behind it
    assert score([5, 10, 16])["standard"]["score"] == pytest.approx(100 * (2 - 0.11 * (1 + after)) / 2)
    assert score([5, 10, 16])["few false alarms"]["score"] == pytest.approx(100 * (2 - 0.22 * (1 + after)) / 2)
    assert score([5, 10, 16])["few misses"]["score"] == pytest.approx(100 * (3 - 0.11 * (1 + after)) / 3)
    at_best = nab.evaluate([series], [np.where(np.arange(20) == 10, 0.7, np.arange(20) == 5)])
    assert at_best["standard"] == {"score": pytest.approx(100 * (2 - 0.11) / 2), "threshold": 0.7}
