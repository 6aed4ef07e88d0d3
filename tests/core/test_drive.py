"""Drivers: the same answers whichever way a stream is driven, and labels that come when they come."""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anabranch import Cell, Decision, Env, Feedback, Learner, Policy, drive, noise


class Decay(Cell):
    def init(self, *, key=None):
        return jnp.zeros(()) if key is None else jax.random.normal(key)

    def step(self, state, x):
        state = 0.9 * state + x
        return state, state


XS = np.random.default_rng(0).normal(size=1000).astype(np.float32)


def test_scan_batch_and_replay_agree():
    _, whole = drive.scan(Decay(), XS, jnp.zeros(()))
    _, side = drive.batch(Decay(), XS.reshape(10, 100), jnp.zeros(10))
    np.testing.assert_allclose(side[0], whole[:100], rtol=1e-5)
    parts = np.split(XS, [1, 8, 300, 301])
    for block in (4, 64, 4096):
        ys = np.concatenate([y for _, y in drive.replay(Decay(), parts, jnp.zeros(()), block=block)])
        np.testing.assert_allclose(ys, whole, rtol=1e-5)
    state = jnp.zeros(())
    list(drive.replay(Decay(), parts, state))
    assert float(state) == 0.0  # the caller's own state is not donated
    _, drawn = drive.batch(Decay(), np.zeros((3, 2), np.float32), key=jax.random.PRNGKey(1))
    assert len(set(np.asarray(drawn)[:, 0].tolist())) == 3


def test_scan_compiles_once():
    class Traced(Decay):
        traces: ClassVar[list] = []

        def step(self, state, x):
            self.traces.append(1)
            return super().step(state, x)

    cell = Traced()
    drive.scan(cell, XS)
    count = len(Traced.traces)
    drive.scan(cell, XS)
    drive.scan(Traced(), XS)
    assert len(Traced.traces) == count


class Memory(Learner):
    """Answers with all it has been told: the sum of targets, and how many."""

    host: ClassVar[bool] = False

    def init(self, *, key=None):
        return jnp.zeros(2)

    def predict(self, state, x):
        return state + x

    def learn(self, state, x, target, weight=1.0):
        return state * jnp.array([1.01, 1.0]) + jnp.stack([target + x, jnp.float32(1)])


class HostMemory(Memory):
    host: ClassVar[bool] = True


def slowly(xs, ys, delay):
    """The order of events, as a plain simulation: reveal what is due, oldest expiry first; ask; put into the queue."""
    state, queue, answers = np.zeros(2), [], []
    for t, x in enumerate(xs):
        for due in sorted(q for q in queue if q[0] <= t):
            queue.remove(due)
            state = state * [1.01, 1.0] + [ys[due[1]] + xs[due[1]], 1]
        answers.append(state + x)
        if delay[t] >= 0:
            queue.append((t + max(delay[t], 1), t))
    for due in sorted(queue):
        state = state * [1.01, 1.0] + [ys[due[1]] + xs[due[1]], 1]
    return np.array(answers), state


@pytest.mark.parametrize("kind", ["0", "1", "7", "random", "sometimes never"])
@pytest.mark.parametrize("learner", [Memory(), HostMemory()], ids=["traced", "host"])
def test_evaluate_with_late_labels(kind, learner):
    rng = np.random.default_rng(1)
    n = 60
    xs, ys = rng.normal(size=n).astype(np.float32), rng.normal(size=n).astype(np.float32)
    delay = rng.integers(-5 if "never" in kind else 0, 25, n) if not kind.isdigit() else np.full(n, int(kind))
    expected, state = slowly(xs, ys, delay)
    given = int(kind) if kind.isdigit() else delay
    found = drive.evaluate(learner, xs, ys, delay=given, metrics={"n": lambda y, p: len(y)}, warmup=10)
    np.testing.assert_allclose(found.predictions, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.state, state, rtol=1e-4)
    assert found.scores == {"n": 50} and found.events_per_second > 0


def test_evaluate_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="one leading time axis"):
        drive.evaluate(Memory(), XS[:3], XS[:4])
    with pytest.raises(ValueError, match="one entry an event"):
        drive.evaluate(Memory(), XS[:3], XS[:3], delay=np.zeros(2, int))
    with pytest.raises(ValueError, match="no event"):
        drive.evaluate(Memory(), XS[:0], XS[:0])


class Matching(Env):
    """Matching pennies against a fixed sequence, or between two players."""

    players: int = 1

    def init(self, *, key=None):
        return {"t": jnp.zeros((), jnp.int32), "key": jax.random.PRNGKey(0) if key is None else key}

    def observe(self, state):
        return state["t"] if self.players == 1 else (state["t"], -state["t"])

    def step(self, state, action):
        coin = jax.random.bernoulli(noise(state["key"], state["t"], "coin")).astype(jnp.int32)
        new = {**state, "t": state["t"] + 1}
        if self.players == 1:
            return new, Feedback((action == coin).astype(jnp.float32))
        same = (action[0] == action[1]).astype(jnp.float32)
        return new, (Feedback(same), Feedback(1 - same))


class Alternate(Policy):
    offset: int = 0

    def init(self, *, key=None):
        return jnp.zeros(())

    def act(self, state, x):
        return state, Decision((jnp.abs(x) + self.offset) % 2)

    def learn(self, state, x, decision, feedback):
        return state + feedback.reward


class Total(Cell):
    def init(self, *, key=None):
        return jnp.zeros(())

    def step(self, state, x):
        tick, world = x
        return state + tick.feedback.reward * (1 + 0 * world["t"]), None

    def value(self, state):
        return {"total": state}


class HostMatching(Matching):
    host: ClassVar[bool] = True


def test_play_one_many_and_on_the_host():
    key = jax.random.PRNGKey(3)
    one = drive.play(Alternate(), Matching(), 50, key=key, meters={"total": Total()})
    assert one.ticks is not None and one.ticks.feedback.reward.shape == (50,)
    assert float(one.ticks.feedback.reward.sum()) == float(one.state["policy"]) == float(one.scores["total"]["total"])
    host = drive.play(Alternate(), HostMatching(), 50, key=key, meters={"total": Total()})
    np.testing.assert_array_equal(host.ticks.feedback.reward, one.ticks.feedback.reward)
    lean = drive.play(Alternate(), Matching(), 50, key=key, meters={"total": Total()}, keep=False)
    assert lean.ticks is None and float(lean.scores["total"]["total"]) == float(one.scores["total"]["total"])
    keys = jax.vmap(lambda i: noise(key, i))(jnp.arange(5))
    many = drive.play_seeds(Alternate(), Matching(), 50, keys, meters={"total": Total()}, keep=True)
    for i in range(5):
        alone = drive.play(Alternate(), Matching(), 50, key=keys[i])
        np.testing.assert_array_equal(many.ticks.feedback.reward[i], alone.ticks.feedback.reward)
    with pytest.raises(ValueError, match="steps"):
        drive.play(Alternate(), Matching(), 0, key=key)
    with pytest.raises(ValueError, match="on the host"):
        drive.play_seeds(Alternate(), HostMatching(), 5, keys)


def test_several_players():
    both = drive.play((Alternate(), Alternate(1)), Matching(2), 10, key=jax.random.PRNGKey(0))
    first, second = both.ticks.feedback
    assert first.reward.tolist() == [0.0] * 10 and second.reward.tolist() == [1.0] * 10
    assert [float(s) for s in both.state["policy"]] == [0, 10]
