"""Streaming agents against the numbers of the authors' program, hand-computed cases, and what must never happen."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anabranch.cell import Event, Feedback, Maybe, noise
from anabranch.contract import check
from anabranch.decide.classic import CartPole, Pendulum
from anabranch.decide.stream_x import StreamAC, StreamQ, StreamTD, example
from anabranch.decide.traced import AdaptiveObGD, ObGD, obgd, sparse_init
from anabranch.drive import play, play_seeds, scan

KEY = jax.random.PRNGKey(0)


# The update


def test_a_step_by_hand():
    z, delta = jnp.array([[0.5, -0.25]]), jnp.float32(-4.0)
    short = obgd([z, jnp.array([1.25])], delta, kappa=2.0)
    # ‖z‖₁ = 2 over both arrays, M = 2 · 4 · 2 = 16
    np.testing.assert_allclose(short[0], -4 * z / 16, rtol=1e-6)
    np.testing.assert_allclose(short[1], -4 * 1.25 / 16, rtol=1e-6)
    np.testing.assert_allclose(obgd(0.01 * z, delta, alpha=0.5)[0], -4 * 0.5 * 0.01 * z[0], rtol=1e-6)
    np.testing.assert_allclose(obgd(z, jnp.float32(0.5))[0], 0.5 / 1.5 * z[0], rtol=1e-6)  # |δ| counts as 1


def test_adaptive_by_hand():
    rule = AdaptiveObGD(kappa=3.0, beta2=0.9)
    z = jnp.array([0.5, -2.0])
    memory = rule.init(z)
    _, memory = rule.update(z, memory, jnp.float32(2.0))
    step, _ = rule.update(2 * z, memory, jnp.float32(-0.5))
    v = (0.9 * 0.1 * (2 * z) ** 2 + 0.1 * z**2) / (1 - 0.9**2)
    scaled = 2 * z / np.sqrt(v)
    np.testing.assert_allclose(step, -0.5 * scaled / (3 * np.abs(scaled).sum()), rtol=1e-5)


def test_sparse_init():
    weight = np.asarray(sparse_init(KEY, (200, 24)))
    assert ((weight == 0).sum(1) == math.ceil(0.9 * 24)).all()
    rest = weight[weight != 0] * math.sqrt(24)
    assert rest.min() < -0.9 and 0.9 < rest.max() and np.abs(rest).max() <= 1 and abs(rest.mean()) < 0.15
    assert ((weight != 0).sum(0) > 0).all()  # the places are drawn anew for each row
    assert (sparse_init(KEY, (3, 4), 0.0) != 0).all()


# The authors' program, on a recorded stream


STEPS, DIM, LIMIT = 500, 3, 50
# Weights, observations and rewards are sines. For each parameter of the network after 500 transitions, its product with
# cos(0, 1, 2, …), as github.com/mohmdelsayed/streaming-drl (with its wrappers, in PyTorch) gives it.
CRITIC = [0.44889, 0.05989, -0.68642, 0.0619, -0.00617, 0.05264]
EXPECTED = {
    "q": [0.67762, -0.19558, -1.20729, -0.01617, 0.97711, 0.45686],
    "adaptive": [0.89851, -0.09069, -1.00094, -0.06375, 0.7763, 0.31086],
    "softmax": [0.78412, -0.07667, -0.086, -0.09342, 0.13846, 0.01738],
    "gaussian": [0.71078, -0.05978, 0.01766, -0.09502, 0.44229, 0.05573, 0.27895, 0.09848],
    "td": [0.4946, 0.12092, -0.09047, 0.12089, 0.38895, 0.27837],
}


def sines(net, heads=1):
    """The network with the weights of the recording; its last layer may be several heads, one after the other."""
    arrays = [leaf for pair in zip(net.weights, net.biases) for leaf in pair]
    parts = [*arrays[:-2], *(half for pair in zip(*(jnp.split(a, heads) for a in arrays[-2:])) for half in pair)]
    set_ = [
        np.sin(1 + n + 1.7 * np.arange(a.size)).reshape(a.shape) * (0.5 if a.ndim == 2 else 0.1)
        for n, a in enumerate(parts)
    ]
    last = [np.concatenate(set_[4 + i :: 2]) for i in range(2)]
    new = [jnp.asarray(a, jnp.float32) for a in [*set_[:4], *last]]
    return eqx.tree_at(lambda n: (n.weights, n.biases), net, (tuple(new[::2]), tuple(new[1::2])))


def products(net, heads=1):
    arrays = [np.asarray(leaf, float) for pair in zip(net.weights, net.biases) for leaf in pair]
    parts = [*arrays[:-2], *(half for pair in zip(*(np.split(a, heads) for a in arrays[-2:])) for half in pair)]
    return [(a.ravel() * np.cos(np.arange(a.size))).sum() for a in parts]


def recording():
    """The first observation, and 500 transitions with ends and cuts."""
    n = np.arange(2 * STEPS)
    xs = np.sin(np.arange(1, DIM + 1) * 0.7 * n[:, None]) * np.arange(1, DIM + 1) + 0.5
    k = np.arange(1, STEPS + 1)
    rewards = np.cos(0.3 * k) + (k % 7 == 0)
    terminal, truncated = k % 31 == 0, k % 50 == 0
    stop = terminal | truncated
    last = k + np.cumsum(stop) - stop  # an observation more for each episode that has ended
    info = {"last_x": jnp.asarray(xs[last], jnp.float32)}
    first = jnp.asarray(xs[last + stop], jnp.float32)
    feedback = Feedback(
        jnp.asarray(rewards, jnp.float32), (), first, jnp.asarray(terminal), jnp.asarray(truncated), info
    )
    return jnp.asarray(xs[0], jnp.float32), feedback


def replayed(agent, state, action, **aux):
    """The state after the recording, with these actions instead of the agent's own."""
    x, feedback = recording()

    def step(carry, told):
        state, x = carry
        action, aux, feedback = told
        state, decision = agent.act(state, x)
        decision = decision._replace(action=action, aux=decision.aux._replace(**aux))
        return (agent.learn(state, x, decision, feedback), feedback.x), None

    return jax.jit(lambda state: jax.lax.scan(step, (state, x), (action, aux, feedback))[0][0])(state)


@pytest.mark.parametrize("name", ["q", "adaptive"])
def test_q_equals_the_authors(name):
    agent = StreamQ(DIM, 2, AdaptiveObGD() if name == "adaptive" else ObGD(), hidden=8, limit=LIMIT)
    state = agent.init(key=KEY)
    state = state._replace(q=state.q._replace(net=sines(state.q.net)))
    k = jnp.arange(1, STEPS + 1)
    state = replayed(agent, state, k * k % 3 % 2, greedy=k % 5 != 0)
    np.testing.assert_allclose(products(state.q.net), EXPECTED[name], atol=1e-4)
    np.testing.assert_allclose(state.senses.x, [-0.84338, 1.34609, -1.33617, -0.5], atol=1e-5)


@pytest.mark.parametrize(("name", "heads"), [("softmax", 1), ("gaussian", 2)])
def test_ac_equals_the_authors(name, heads):
    agent = StreamAC(DIM, 2, hidden=8, limit=LIMIT, box=None if heads == 1 else (-1.0, 1.0))
    state = agent.init(key=KEY)
    critic, actor = sines(state.critic.net), sines(state.actor.net, heads)
    state = state._replace(critic=state.critic._replace(net=critic), actor=state.actor._replace(net=actor))
    k = jnp.arange(1, STEPS + 1)
    drawn = k * k % 3 % 2 if heads == 1 else jnp.stack([jnp.sin(k), jnp.cos(2 * k)], axis=1)
    state = replayed(agent, state, drawn, drawn=drawn)
    np.testing.assert_allclose(products(state.critic.net), CRITIC, atol=1e-4)
    np.testing.assert_allclose(products(state.actor.net, heads), EXPECTED[name], atol=1e-4)


def test_td_equals_the_authors():
    learner = StreamTD(DIM, hidden=8, beta=0.9)
    state = learner.init(key=KEY)
    state = state._replace(v=state.v._replace(net=sines(state.v.net)))
    n = np.arange(STEPS + 1)
    xs = np.sin(np.arange(1, DIM + 1) * 0.7 * n[:, None]) * np.arange(1, DIM + 1) + 0.5
    cumulants = np.cos(0.3 * n) + (n % 7 == 0)
    cumulants[0] = np.nan  # nothing comes with the first input, and nothing is learned from it
    events = Event(*jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (xs, Maybe(cumulants, np.ones(STEPS + 1)))))
    events = events._replace(target=events.target._replace(valid=jnp.ones(STEPS + 1, bool)), weight=jnp.ones(STEPS + 1))
    state, _ = scan(learner, events, state)
    np.testing.assert_allclose(products(state.v.net), EXPECTED["td"], atol=1e-4)
    assert int(state.skipped) == 0
    value = state.v.net(state.x)[0] * state.returns.stats.scale
    np.testing.assert_allclose(value, 8.864409, atol=1e-3)


# The senses


@pytest.fixture(scope="module")
def played():
    # Half dense: from the paper's start, no weight in the first layer, rounding errors would grow until runs differ.
    agent = StreamQ(4, 2, hidden=8, sparsity=0.5, limit=500, explore=200)
    return agent, play(agent, CartPole(), 600, key=KEY)


def test_each_observation_counts_once(played):
    _, result = played
    feedback, senses = result.ticks.feedback, result.state["policy"].senses
    stop = np.asarray(feedback.terminal | feedback.truncated)
    assert stop.sum() > 5
    xs = np.concatenate([result.ticks.x[:1], feedback.info["last_x"], np.asarray(feedback.x)[stop]])
    assert int(senses.seen.n) == len(xs)
    np.testing.assert_allclose(senses.seen.mean, xs.mean(0), atol=1e-5)
    np.testing.assert_allclose(senses.seen.scale, xs.std(0, ddof=1), rtol=1e-3)
    sums, total = [], 0.0
    for ended in stop:
        total = 0.99 * total * (1 - ended) + 1.0
        sums.append(total)
    np.testing.assert_allclose(senses.returns.stats.scale, np.std(sums, ddof=1), rtol=1e-4)
    since = len(stop) - 1 - np.flatnonzero(stop)[-1]
    assert int(senses.clock) == since
    np.testing.assert_allclose(senses.x[-1], max(since - 1, 0) / 500 - 0.5, atol=1e-6)


def test_explores_less_and_less(played):
    agent, result = played
    decision = result.ticks.decision
    logp, greedy = np.asarray(decision.logp), np.asarray(decision.aux.greedy)
    epsilon = np.maximum(1 - 0.99 * np.arange(1, 601) / 200, 0.01)
    np.testing.assert_allclose(np.exp(logp), epsilon / 2 + (1 - epsilon) * greedy, rtol=1e-5)
    assert 0.3 < greedy[:30].mean() < 0.8 and greedy[200:].mean() > 0.97
    best = agent.act(result.state["policy"], result.ticks.feedback.x[-1])[1]
    assert bool(best.aux.greedy) == (int(best.action) == int(jnp.argmax(result.state["policy"].q.net(best.aux.x))))


def test_seeds_side_by_side_are_the_same_as_alone(played):
    agent, alone = played
    both = play_seeds(agent, CartPole(), 600, [KEY, noise(KEY, 1)])
    a, b = alone.state["policy"].q.net.weights, both.state["policy"].q.net.weights
    for leaf, rows in zip(a, b):
        np.testing.assert_allclose(leaf, rows[0], atol=1e-4)
    assert np.abs(b[1][1] - b[1][0]).max() > 1e-2


def test_an_observation_without_feedback_counts_too():
    agent = StreamQ(2, 2, hidden=4)
    act = jax.jit(agent.act)
    state, _ = act(agent.init(), jnp.array([1.0, 2.0]))
    state, decision = act(state, jnp.array([3.0, 6.0]))  # the outcome of the first is still to come
    assert int(state.senses.seen.n) == 2
    np.testing.assert_allclose(decision.aux.x, [0.5**0.5, 0.5**0.5], rtol=1e-5)
    state = jax.jit(agent.learn)(state, (), decision, Feedback(1.0, x=jnp.array([0.0, 0.0])))
    again, _ = act(state, jnp.array([0.0, 0.0]))  # the feedback has brought this one
    assert int(state.senses.seen.n) == int(again.senses.seen.n) == 3


@pytest.mark.parametrize("bootstrap", [False, True])
def test_cuts_by_a_time_limit(bootstrap):
    agent = StreamQ(2, 2, hidden=4, bootstrap_truncated=bootstrap)
    state, decision = agent.act(agent.init(key=KEY), jnp.array([1.0, 2.0]))
    last = {"last_x": jnp.array([5.0, 5.0])}
    cut = Feedback(1.0, x=jnp.zeros(2), truncated=jnp.array(True), info=last)
    senses, step = agent.perceive(state.senses, decision.aux.x, cut)
    assert float(step.discount) == pytest.approx(0.99 if bootstrap else 0.0) and bool(step.stop)
    assert int(senses.seen.n) == 3
    np.testing.assert_allclose(step.next_x, (5 - np.array([3, 3.5])) / np.std([[1, 2], [5, 5]], axis=0, ddof=1))
    _, step = agent.perceive(state.senses, decision.aux.x, cut._replace(terminal=jnp.array(True)))
    assert float(step.discount) == 0.0
    if bootstrap:
        with pytest.raises(ValueError, match="last_x"):
            agent.perceive(state.senses, decision.aux.x, cut._replace(info=()))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_changes_no_weight(bad):
    agent = StreamAC(2, 1, hidden=4, sparsity=0.5, box=(-1.0, 1.0), limit=10)
    act, tell = jax.jit(agent.act), jax.jit(agent.learn)
    state, decision = act(agent.init(key=KEY), jnp.array([bad, 2.0]))
    assert np.isfinite(decision.action).all() and np.isfinite(decision.aux.x).all()
    assert int(state.senses.seen.n) == 0

    def told(reward, last, end=False):
        return Feedback(reward, x=jnp.ones(2), terminal=jnp.array(end), info={"last_x": jnp.array(last)})

    good = tell(state, (), decision, told(1.0, [1.0, 1.0]))
    _, decision = act(good, jnp.array([1.0, 1.0]))
    better = tell(good, (), decision, told(1.0, [1.0, 3.0]))
    assert all(
        (a != b).any()
        for a, b in zip(better[0].net.weights + better[1].net.weights, good[0].net.weights + good[1].net.weights)
    )
    for feedback in (told(bad, [1.0, 3.0]), told(1.0, [bad, 1.0]), told(1.0, [bad, 1.0], True)):
        new = tell(good, (), decision, feedback)
        jax.tree.map(np.testing.assert_array_equal, (new.critic.net, new.actor.net), (good.critic.net, good.actor.net))
        assert int(new.senses.skipped) == 1 and int(new.senses.clock) == (0 if feedback.terminal else 2)
        for leaf in jax.tree.leaves(new):
            assert np.isfinite(leaf).all()
        for leaf in jax.tree.leaves((new.critic.trace, new.actor.trace)):
            assert (leaf == 0).all()
    broken = eqx.tree_at(lambda s: s.critic.trace.biases[0], good, jnp.full(4, jnp.inf))
    new = tell(broken, (), decision, told(1.0, [1.0, 3.0]))
    jax.tree.map(np.testing.assert_array_equal, new.critic.net, good.critic.net)
    assert int(new.senses.skipped) == 1


def test_td_skips_what_is_not_finite():
    learner = StreamTD(2, hidden=4, sparsity=0.5)
    state, learn = learner.init(key=KEY), jax.jit(learner.learn)
    for x, c in (([1.0, 2.0], 0.0), ([2.0, 1.0], 1.0), ([np.nan, 1.0], 1.0), ([1.0, 1.0], np.inf)):
        before, state = state, learn(state, jnp.array(x), jnp.float32(c))
    jax.tree.map(np.testing.assert_array_equal, state.v.net, before.v.net)
    assert int(state.skipped) == 2 and int(state.n) == 3
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    assert np.isfinite(learner.predict(state, jnp.array([np.nan, 0.0])))


def test_learns_to_predict():
    """c_t = 1 for even t: the answers are γ^d / (1 - γ²)."""
    learner = StreamTD(2, hidden=16, gamma=0.5, lam=0.5, beta=0.0)
    t = jnp.arange(4000)
    xs = jax.nn.one_hot(t % 2, 2)
    cumulants = 1.0 - t % 2
    events = Event(xs, Maybe(cumulants, jnp.ones(4000, bool)), jnp.ones(4000))
    _, answers = scan(learner, events, key=KEY)
    np.testing.assert_allclose(answers[-2:], [0.5 / 0.75, 1 / 0.75], atol=0.02)  # asked at even, then at odd t


def test_actions_are_clipped_to_the_box():
    agent = StreamAC(3, 1, box=Pendulum.box, hidden=8, limit=200)
    result = play(agent, Pendulum(), 400, key=KEY)
    action, drawn = np.asarray(result.ticks.decision.action), np.asarray(result.ticks.decision.aux.drawn)
    np.testing.assert_array_equal(action, drawn.clip(-2, 2))
    narrow = StreamAC(3, 1, box=(-0.01, 0.01), hidden=8, sparsity=0.5, limit=200)
    _, decision = narrow.act(narrow.init(key=KEY), jnp.ones(3))
    net, x = narrow.init(key=KEY).actor.net, decision.aux.x
    mean, std = net(x)[0], jnp.log1p(jnp.exp(net(x)[1]))
    expected = -0.5 * ((decision.aux.drawn[0] - mean) / std) ** 2 - jnp.log(std * (2 * np.pi) ** 0.5)
    assert abs(float(decision.aux.drawn[0])) > 0.01 == pytest.approx(abs(float(decision.action[0])))
    np.testing.assert_allclose(decision.logp, expected, rtol=1e-5)


def test_contract_of_q():
    report = check(*example(), key=KEY)
    assert report.ok, str(report)


@pytest.mark.slow
def test_contract_of_ac():
    agent = StreamAC(3, 1, box=Pendulum.box, hidden=4, sparsity=0.5, limit=200)
    ticks = play(agent, Pendulum(), 48, key=KEY).ticks
    before = jax.tree.map(lambda leaf: jnp.roll(leaf, 1, axis=0), ticks)
    report = check(agent, (ticks.x, Maybe(tuple(before), jnp.arange(48) > 0)), key=KEY)
    assert report.ok, str(report)


def test_contract_of_td():
    rng = np.random.default_rng(0)
    target = Maybe(rng.normal(size=48).astype(np.float32), rng.uniform(size=48) < 0.8)
    events = Event(rng.normal(size=(48, 3)).astype(np.float32), target, np.ones(48, np.float32))
    report = check(StreamTD(3, hidden=4, sparsity=0.5), events, key=KEY)
    assert report.ok, str(report)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: StreamQ(0, 2), "dim.*0"),
        (lambda: StreamQ(2, 2, limit=0), "limit.*0"),
        (lambda: StreamQ(2, 2, explore=0), "explore.*0"),
        (lambda: StreamQ(2, 2, epsilon=1.5), "epsilon.*1.5"),
        (lambda: StreamAC(2, 2, gamma=-0.1), "gamma.*-0.1"),
        (lambda: StreamAC(2, 2, box=(1.0, -1.0)), "box.*1.0"),
        (lambda: StreamTD(2, beta=1.5), "beta.*1.5"),
        (lambda: ObGD(kappa=0.0), "kappa.*0.0"),
        (lambda: StreamQ(2, 2).act(StreamQ(2, 2).init(), jnp.ones(3)), r"dim is 2.*\(3,\)"),
        (lambda: StreamTD(2).predict(StreamTD(2).init(), jnp.ones(3)), r"dim is 2.*\(3,\)"),
    ],
)
def test_bad_input_is_named(make, word):
    with pytest.raises(ValueError, match=word):
        make()
