import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anabranch import contract
from anabranch.cell import Event, Maybe
from anabranch.learn.neighbors import Neighbors

D, C = 3, 3


def events(T, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(T, D)).astype(np.float32)
    if T > 12:
        x[T // 2] = x[T // 2 - 5]  # one that has been there before, where votes jump
    y = (x.sum(1) > 0).astype(np.int32) + (x[:, 0] > 1)
    return Event(jnp.asarray(x), Maybe(jnp.asarray(y), jnp.ones(T, bool)), jnp.ones(T))


def test_as_river_with_a_window_that_slides():
    river = pytest.importorskip("river.neighbors")
    T, stream = 200, events(200)
    said = np.asarray(jax.jit(lambda e: (c := Neighbors(D, C, window=60)).advance(c.init(), e)[1])(stream))
    peer = river.KNNClassifier(n_neighbors=5, engine=river.LazySearch(window_size=60))
    for t in range(T):
        row = dict(enumerate(np.asarray(stream.x[t]).tolist()))
        if t >= 10:
            expected = peer.predict_proba_one(row)
            np.testing.assert_allclose(said[t], [expected.get(c, 0.0) for c in range(C)], atol=1e-5)
        peer.learn_one(row, int(stream.target.value[t]))


def test_what_cannot_be_learned_is_counted_and_changes_nothing():
    cell = Neighbors(2, 2, k=1, window=2)
    before = cell.learn(cell.init(), jnp.zeros(2), 1)
    for x, y in ((jnp.array([jnp.nan, 0.0]), 0), (jnp.ones(2), 2), (jnp.ones(2), -1)):
        after = cell.learn(before, x, y)
        assert int(after.rejected) == 1 and jnp.array_equal(after.x, before.x) and jnp.array_equal(after.y, before.y)
    assert cell.predict(before, jnp.array([jnp.nan, 0.0])).tolist() == [0.5, 0.5]
    with pytest.raises(ValueError, match=r"window must be at least k=5, got 4"):
        Neighbors(2, 2, window=4)
    with pytest.raises(ValueError, match=r"x must have shape \(2,\), got \(3,\)"):
        cell.predict(before, jnp.zeros(3))


def test_contract():
    report = contract.check(Neighbors(D, C, k=3, window=8), events(12))
    assert report.ok, str(report)
