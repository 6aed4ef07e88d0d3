"""Environments of gymnasium as worlds on the host."""

import sys

import jax
import numpy as np
import pytest

from anabranch.decide.classic import EpisodeReturn
from anabranch.decide.gym import GymEnv
from anabranch.decide.stream_x import StreamAC, StreamQ
from anabranch.drive import play

gymnasium = pytest.importorskip("gymnasium")
KEY = jax.random.PRNGKey(0)


def test_a_policy_plays():
    world = GymEnv("CartPole-v1", max_episode_steps=30)
    assert world.limit == 30
    agent = StreamQ(world.dim, world.n_actions, hidden=8, limit=world.limit, explore=50)
    result = play(agent, world, 120, key=KEY, meters={"return": EpisodeReturn()})
    ticks = result.ticks
    assert ticks is not None
    stop = ticks.feedback.terminal | ticks.feedback.truncated
    assert 4 <= stop.sum() < 30
    lengths = np.diff(np.flatnonzero(stop), prepend=-1)
    assert lengths.max() <= 30
    np.testing.assert_allclose(result.scores["return"], lengths.mean(), rtol=1e-5)
    last = ticks.feedback.info["last_x"]
    np.testing.assert_array_equal((last == ticks.feedback.x).all(1), ~stop)
    np.testing.assert_array_equal(ticks.x[1:], ticks.feedback.x[:-1])
    senses = result.state["policy"].senses
    assert int(senses.seen.n) == 1 + 120 + stop.sum() and int(senses.skipped) == 0
    # The same environment by hand, from the same seed, gives the same.
    peer = gymnasium.make("CartPole-v1", max_episode_steps=30)
    x, _ = peer.reset(seed=int(jax.random.randint(_world_key(), (), 0, 2**31 - 1)))
    for t in range(120):
        np.testing.assert_allclose(ticks.x[t], x, rtol=1e-6)
        x, _, terminal, truncated, _ = peer.step(int(ticks.decision.action[t]))
        if terminal or truncated:
            x, _ = peer.reset()


def _world_key():
    from anabranch.cell import noise

    return noise(KEY, 0, "world")


def test_continuous_actions_and_nothing_kept():
    world = GymEnv("Pendulum-v1")
    assert world.box is not None and world.box[0].tolist() == [-2.0] and world.n_actions == 1
    agent = StreamAC(world.dim, world.n_actions, hidden=8, limit=world.limit, box=world.box)
    result = play(agent, world, 20, key=KEY, keep=False)
    assert result.ticks is None and int(result.state["policy"].t) == 20


def test_mujoco():
    pytest.importorskip("mujoco")
    world = GymEnv("Hopper-v5")
    assert (world.dim, world.n_actions, world.limit) == (11, 3, 1000)
    state, feedback = world.step(world.init(key=KEY), np.zeros(3))
    assert feedback.x.shape == (11,) and world.observe(state) is feedback.x


def test_what_does_not_fit_is_named(monkeypatch):
    with pytest.raises(ValueError, match="FrozenLake-v1 are Discrete"):
        GymEnv("FrozenLake-v1")
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(ImportError, match=r"anabranch\[gym\]"):
        GymEnv("CartPole-v1")
