"""`Recent` against a plain loop, and on bad arguments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anabranch import Event, Maybe
from anabranch.cell import Timed
from anabranch.contract import check
from anabranch.layers.recent import Recent

HALF = [60.0, 600.0]


def events(n=80, seed=0):
    rng = np.random.default_rng(seed)
    time = np.cumsum(rng.integers(0, 120, n)).astype(np.int32)
    x = rng.normal(size=(n, 2)).astype(np.float32)
    x[rng.random((n, 2)) < 0.3] = np.nan
    return Event(Timed(time, x), Maybe(rng.normal(size=(n, 1)).astype(np.float32), rng.random(n) < 0.4), np.ones(n))


def test_equals_sums_over_all_that_was_seen():
    cell, xs = Recent(2, 1, HALF, clip=(-1, 1), memory=30), events()
    _, ys = jax.jit(lambda xs: cell.advance(cell.init(), xs))(jax.tree.map(jnp.asarray, xs))
    seen = [[], [], []]
    for t in range(len(xs.x.time)):
        now, expected = int(xs.x.time[t]), []
        for past in seen:
            weights = [[0.5 ** ((now - when) / h) for when, _ in past] for h in HALF]
            expected += [sum(w * v for w, (_, v) in zip(ws, past)) / (sum(ws) + 1) for ws in weights]
            expected += [np.log1p(sum(ws)) for ws in weights]
            expected += [past[-1][1] if past else 0.0]
            expected += [np.log1p(min((now - past[-1][0]) / 60, 30) if past else 30)]
        np.testing.assert_allclose(ys[t], expected, atol=2e-4)
        told = xs.target.valid[t]
        values = [np.nan, np.nan, xs.target.value[t, 0]] if told else [*xs.x.x[t], np.nan]
        for past, value in zip(seen, values):
            if np.isfinite(value):
                past.append((now, float(np.clip(value, -1, 1))))


def test_contract():
    report = check(Recent(2, 1, HALF), jax.tree.map(jnp.asarray, events(40)))
    assert report.ok, str(report)


def test_bad_arguments():
    with pytest.raises(ValueError, match="there must be a column"):
        Recent(0, 0, HALF)
    with pytest.raises(ValueError, match=r"half-lives must be positive seconds, got \[0.0\]"):
        Recent(1, 0, [0.0])
