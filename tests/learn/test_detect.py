"""Detectors against River on the same streams, against hand-made ones, and in batches of unequal age."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anabranch.learn.detect import ADWIN, DDM, PageHinkley

DETECTORS = {"ADWIN": ADWIN(), "DDM": DDM(), "PageHinkley": PageHinkley(threshold=20.0)}


@pytest.fixture(scope="module")
def drift():
    return pytest.importorskip("river.drift")


def streams(binary: bool) -> np.ndarray:
    """20 streams of 3,000 items: error rates (or means) that stay, jump up, jump down, jump twice or climb slowly."""
    rng = np.random.default_rng(0)
    t = np.arange(3000)
    out = []
    for i in range(20):
        low, high = sorted(rng.uniform(0.02, 0.98, 2))
        when = rng.integers(300, 2700)
        rate = (
            np.full(3000, low),
            np.where(t < when, low, high),
            np.where(t < when, high, low),
            np.where((t < 1000) | (t > 2000), low, high),
            low + (high - low) * t / 3000,
        )[i % 5]
        out.append(rng.random(3000) < rate if binary else rate * 4 + rng.normal(0, 0.3, 3000))
    return np.array(out, np.float32)


@pytest.fixture(scope="module", params=DETECTORS)
def alarms(request):
    """Name of a detector, its 20 streams, and our alarms on all of them as one batch."""
    cell = DETECTORS[request.param]
    xs = streams(binary=request.param == "DDM")
    if request.param == "ADWIN":
        xs[::2] = streams(binary=True)[::2]
    _, alarm = jax.jit(jax.vmap(lambda x: cell.advance(cell.init(), x)))(xs)
    return request.param, xs, alarm


def test_alarms_are_those_of_river(alarms, drift):
    name, xs, alarm = alarms
    make = {
        "ADWIN": drift.ADWIN,
        "DDM": drift.binary.DDM,
        "PageHinkley": lambda: drift.PageHinkley(threshold=20.0),
    }[name]
    total = 0
    for i, x in enumerate(xs):
        peer, drifts, warnings = make(), [], []
        for t, value in enumerate(x.tolist()):
            peer.update(value)
            if peer.drift_detected:
                drifts.append(t)
            if getattr(peer, "warning_detected", False):
                warnings.append(t)
        assert np.flatnonzero(alarm.drift[i]).tolist() == drifts, f"stream {i}"
        assert np.flatnonzero(alarm.warning[i]).tolist() == warnings, f"stream {i}"
        total += len(drifts)
    assert total >= 10  # the streams do drift


def test_one_stream_is_one_row_of_a_batch(alarms):
    name, xs, alarm = alarms
    cell = DETECTORS[name]
    _, alone = jax.jit(lambda x: cell.advance(cell.init(), x))(xs[1])
    assert np.array_equal(alone.drift, alarm.drift[1])


@pytest.mark.parametrize(
    "delta, clock, most, least, grace", [(0.05, 1, 3, 10, 20), (0.01, 7, 2, 5, 10), (0.3, 32, 5, 1, 40)]
)
def test_adwin_with_other_settings(drift, delta, clock, most, least, grace):
    cell = ADWIN(delta, clock, most, least, grace)
    xs = streams(binary=True)[[1, 4, 8]]
    _, alarm = jax.jit(jax.vmap(lambda x: cell.advance(cell.init(), x)))(xs)
    for i, x in enumerate(xs):
        peer, drifts = drift.ADWIN(delta, clock, most, least, grace), []
        for t, value in enumerate(x.tolist()):
            peer.update(value)
            if peer.drift_detected:
                drifts.append(t)
        assert drifts
        assert np.flatnonzero(alarm.drift[i]).tolist() == drifts


def test_adwin_histogram_holds_the_window():
    cell = ADWIN()
    x = np.random.default_rng(1).normal(5.0, 1.0, 4096).astype(np.float32)
    state, alarm = jax.jit(lambda x: cell.advance(cell.init(), x))(x)
    assert not alarm.drift.any()
    used = np.asarray(state.used)
    assert int((used * 2.0 ** np.arange(32)).sum()) == 4096 and used.max() <= 5
    np.testing.assert_allclose(state.total.sum(), x.sum(), rtol=1e-6)
    # The newest bucket of the highest row in use starts where the older buckets end: its content is a slice of x.
    top = np.flatnonzero(used)[-1]
    size = 2**top
    np.testing.assert_allclose(state.total[top, 0], x[:size].sum(), rtol=1e-5)
    np.testing.assert_allclose(state.squares[top, 0], size * x[:size].var(), rtol=1e-4)


def test_page_hinkley_by_hand():
    cell = PageHinkley(warm=1, delta=0.0, threshold=1.0, alpha=1.0)
    # means 0, 1, 1.5; deviations 0, 1, 1.5; sums 0, 1, 2.5: above 1 at the third item. Then afresh.
    _, alarm = cell.advance(cell.init(), jnp.array([0.0, 2.0, 2.5, 2.5, 2.5]))
    assert alarm.drift.tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("name", DETECTORS)
def test_contract(name):
    from anabranch.contract import check

    xs = streams(binary=True)[1][:200]
    report = check(DETECTORS[name], jnp.asarray(xs))
    assert report.ok, str(report)


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match=r"delta.*1\.5"):
        ADWIN(delta=1.5)
    with pytest.raises(ValueError, match=r"clock.*0"):
        ADWIN(clock=0)
    with pytest.raises(ValueError, match=r"warm.*-1"):
        DDM(warm=-1)
