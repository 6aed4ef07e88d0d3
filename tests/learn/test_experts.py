import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from anabranch import contract
from anabranch.cell import Event, Learner, Maybe
from anabranch.learn.experts import FixedShare
from anabranch.learn.linear import LogisticRegression, Scaled
from anabranch.learn.neighbors import Neighbors


class Says(Learner):
    """Always the same."""

    p: float

    def init(self, *, key=None):
        return jnp.zeros(())

    def predict(self, state, x):
        return jnp.float32(self.p)

    def learn(self, state, x, target, weight=1.0):
        return state


def told(labels):
    n = len(labels)
    return Event(jnp.zeros(n), Maybe(jnp.asarray(labels), jnp.ones(n, bool)), jnp.ones(n))


def test_the_trust_by_hand():
    cell = FixedShare((Says(0.8), Says(0.3)), classes=2, eta=0.5, share=0.1)
    state, said = cell.step(cell.init(), jax.tree.map(lambda x: x[0], told([1])))
    np.testing.assert_allclose(said, [0.45, 0.55], atol=1e-6)
    raw = np.exp(-0.5 * np.array([2 * 0.2**2, 2 * 0.7**2]))
    np.testing.assert_allclose(cell.trust(state), 0.9 * raw / raw.sum() + 0.05, atol=1e-6)


def test_it_follows_whoever_is_right_and_its_loss_is_within_the_bound():
    labels = np.repeat([1, 0, 1, 0], 150)
    cell = FixedShare((Says(0.9), Says(0.1), Says(0.5)), classes=2, eta=0.5, share=0.01)
    _, said = jax.jit(lambda e: cell.advance(cell.init(), e))(told(labels))
    loss = 2 * (np.asarray(said)[:, 1] - labels) ** 2
    best = 2 * 0.1**2 * len(labels)
    assert loss.sum() < best + (np.log(3) + 600 * 0.01 + 3 * np.log(3 / 0.01)) / 0.5
    assert loss.reshape(4, 150)[:, -100:].mean() < 0.04  # 0.02 is the best, 0.82 that of one that does not follow


def test_an_event_without_a_label_or_with_a_bad_one_moves_no_trust():
    cell = FixedShare((Says(0.9), Says(0.1)), classes=2)
    bad = Event(jnp.zeros(2), Maybe(jnp.array([1, 7]), jnp.array([False, True])), jnp.ones(2))
    state, _ = cell.advance(cell.init(), bad)
    np.testing.assert_allclose(cell.trust(state), 0.5, atol=1e-6)
    for made, match in (
        (lambda: FixedShare((), 2), "at least one, got none"),
        (lambda: FixedShare((Says(0.5),), 2, eta=0.0), "eta must be positive, got 0.0"),
        (lambda: FixedShare((Says(0.5),), 2, share=1.0), "share must lie in"),
    ):
        with pytest.raises(ValueError, match=match):
            made()


def test_contract():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(12, 2)), jnp.float32)
    stream = Event(x, Maybe((x[:, 0] > 0).astype(jnp.int32), jnp.ones(12, bool)), jnp.ones(12))
    linear = Scaled(LogisticRegression(2, optax.sgd(0.1)))
    report = contract.check(FixedShare((linear, Neighbors(2, 2, k=2, window=6)), classes=2), stream)
    assert report.ok, str(report)
