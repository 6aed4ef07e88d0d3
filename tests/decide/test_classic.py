"""The classic control tasks against gymnasium: whole trajectories, from the same reset states."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anabranch.cell import Decision, Feedback, Policy
from anabranch.contract import check
from anabranch.decide.classic import Acrobot, CartPole, EpisodeReturn, MountainCar, Pendulum
from anabranch.drive import Tick, play

STEPS = 500
WORLDS = {
    "CartPole-v1": CartPole(),
    "Acrobot-v1": Acrobot(),
    "MountainCar-v0": MountainCar(),
    "Pendulum-v1": Pendulum(),
}


@pytest.mark.parametrize("name", WORLDS)
def test_equals_gymnasium(name):
    """500 random steps, in double precision, since errors grow along an episode; bodies are given only at resets."""
    gymnasium = pytest.importorskip("gymnasium")
    peer, world = gymnasium.make(name), WORLDS[name]
    peer.reset(seed=0)
    peer.action_space.seed(0)
    start, actions, resets, seen = np.array(peer.unwrapped.state, float), [], [], []
    for _ in range(STEPS):
        actions.append(action := peer.action_space.sample())
        x, reward, terminal, truncated, _ = peer.step(action)
        if terminal or truncated:
            peer.reset()
        resets.append(np.array(peer.unwrapped.state, float))
        seen.append((x, reward, terminal, truncated))
    with jax.enable_x64(True):

        def step(state, given):
            action, reset = given
            new, feedback = world.step(state, action)
            stop = feedback.terminal | feedback.truncated
            return new._replace(body=jnp.where(stop, reset, new.body)), feedback

        first = world.init(key=jax.random.PRNGKey(0))._replace(body=jnp.asarray(start))
        _, ours = jax.lax.scan(step, first, (jnp.asarray(np.array(actions)), jnp.asarray(np.array(resets))))
    x, reward, terminal, truncated = (np.array(column) for column in zip(*seen))
    np.testing.assert_array_equal(ours.terminal, terminal)
    np.testing.assert_array_equal(ours.truncated, truncated)
    np.testing.assert_allclose(ours.reward, reward, atol=1e-5)
    np.testing.assert_allclose(ours.info["last_x"], x, atol=1e-5)
    assert terminal.any() or truncated.any()
    assert ours.info["last_x"].shape[1] == world.dim
    space = peer.action_space
    assert world.n_actions == (space.shape[0] if world.box else space.n)


@pytest.mark.parametrize("world", [MountainCar(), Acrobot()])
def test_ends_are_reached(world):
    """A push along the speed, and a torque along the turning of the joint, add energy until the top is reached."""

    class Pump(Policy):
        def init(self, *, key=None):
            return ()

        def act(self, state, x):
            return state, Decision(jnp.where(x[-1] >= 0, 2, 0))

    result = play(Pump(), world, 2000, key=jax.random.PRNGKey(0), meters={"return": EpisodeReturn()})
    assert result.ticks is not None
    feedback = result.ticks.feedback
    assert int(feedback.terminal.sum()) > 3 and not feedback.truncated.any()
    ends = np.flatnonzero(feedback.terminal)
    last, first = np.asarray(feedback.info["last_x"])[ends], np.asarray(feedback.x)[ends]
    assert (np.abs(last - first).max(1) > 0.1).all()  # the next episode has begun
    assert len(np.unique(first[:, 0])) == len(ends)  # elsewhere each time
    steps = np.diff(ends, prepend=-1)
    pays = steps if isinstance(world, MountainCar) else steps - 1
    np.testing.assert_allclose(result.scores["return"], -pays.mean(), rtol=1e-5)


def test_the_car_stops_at_the_wall():
    """Random pushes do not get there."""
    body, _, end = MountainCar().move(jnp.array([-1.19, -0.05]), jnp.array(0))
    np.testing.assert_allclose(body, [-1.2, 0.0])
    body, _, _ = MountainCar().move(body, jnp.array(2))
    assert body[0] > -1.2 and body[1] > 0 and not end


def test_contract():
    report = check(CartPole(limit=20), np.random.default_rng(0).integers(0, 2, 64), key=jax.random.PRNGKey(0))
    assert report.ok, str(report)


def test_returns_by_hand():
    meter = EpisodeReturn(start=3)
    state = meter.init()
    stops = [False, True, False, False, True, False, True, False]
    for reward, stop in enumerate(stops):
        tick = Tick((), Decision(0), Feedback(jnp.float32(reward), terminal=jnp.array(stop)))
        state, value = meter.step(state, (tick, ()))
    assert float(value) == ((2 + 3 + 4) + (5 + 6)) / 2


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"limit.*0"):
        CartPole(limit=0)
