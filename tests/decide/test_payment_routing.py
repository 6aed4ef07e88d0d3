"""Non-stationary bandits against independent implementations, late outcomes, and the two worlds of the claim."""

import importlib.util
from collections import deque
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest

from anabranch.cell import Feedback, Maybe
from anabranch.combine import Ask, Outcome
from anabranch.decide.base import UCB1, DynamicRegret, TraceEnv, ucb
from anabranch.decide.payment_routing import (
    DiscountedThompson,
    DiscountedUCB,
    FlightsEnv,
    PaymentRouter,
    PaymentSimulator,
    Request,
    Routing,
    SlidingWindowUCB,
)
from anabranch.drive import play, scan

ALL = jnp.ones(3, bool)


def told(policy, pulls):
    """The state after these (arm, reward) pairs, each outcome known at once."""
    arms, rewards = np.array([arm for arm, _ in pulls]), np.array([reward for _, reward in pulls])
    env = TraceEnv(np.tile(rewards[:, None], policy.k), arms[:, None] == np.arange(policy.k))
    result = play(policy, env, len(pulls), key=jax.random.PRNGKey(0))
    assert result.ticks.decision.action.tolist() == arms.tolist()
    return result.state["policy"]


def test_indices_by_hand():
    policy = DiscountedUCB(3, bonus=0.5, gamma=0.5)
    state = told(policy, [(0, 1.0), (1, 0.0), (0, 1.0), (0, 0.0)])
    n, s = np.array([0.125 + 0.5 + 1, 0.25, 0.0]), np.array([0.125 + 0.5, 0.0, 0.0])
    np.testing.assert_allclose(state.stats.n, n, rtol=1e-6)
    np.testing.assert_allclose(state.stats.s, s, rtol=1e-6)
    np.testing.assert_allclose(state.stats.pending, 0.0, atol=1e-6)
    index = np.append(s[:2] / n[:2] + 0.5 * np.sqrt(np.log(1.875) / n[:2]), np.inf)
    np.testing.assert_allclose(policy.index(state, None), index, rtol=1e-5)


def test_radicand_is_never_negative():
    policy = DiscountedUCB(2, bonus=1.0, half_life=1.0)
    state = policy.init(key=jax.random.PRNGKey(0))
    for arm in (0, 1):
        state, decision = policy.act(state, Request(jnp.arange(2) == arm, jnp.array(0.0)))
        state = policy.learn(state, (), decision, Feedback(jnp.array(1.0)))
    state, _ = policy.act(state, Request(jnp.zeros(2, bool), jnp.array(3.0)))
    np.testing.assert_allclose(state.stats.n, 1 / 8, rtol=1e-6)  # n = 1/4 in all, and ln n < 0
    np.testing.assert_allclose(policy.index(state, None), 1.0, rtol=1e-6)


def test_thompson_fades_to_its_prior():
    policy = DiscountedThompson(3, gamma=0.9)
    state = told(policy, [(0, 1.0), (0, 1.0), (1, 0.0)] + [(2, 1.0)] * 200)
    np.testing.assert_allclose(state.stats.n[:2], 0.0, atol=1e-6)
    np.testing.assert_allclose(state.stats.n[2], 10.0, rtol=1e-4)


def objects(**kwargs):
    """The dictionary of NumPy objects that the claim compares speed with."""
    path = Path(__file__).parents[2] / "claims" / "decide" / "payment_routing.py"
    spec = importlib.util.spec_from_file_location("payment_routing_claim", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Objects(**kwargs)


def test_equals_a_dictionary_of_objects_with_late_outcomes():
    """Random delays, out of order, several contexts: every choice is the best of the other implementation's indices."""
    from anabranch.run.keyed import Keyed

    rng = np.random.default_rng(0)
    contexts, steps, gamma = 7, 150, 0.9
    router = PaymentRouter(DiscountedUCB(3, gamma=gamma, bonus=0.5), capacity=64)
    ours, peer = Keyed(router, capacity=contexts), objects(k=3, gamma=gamma, bonus=0.5)
    flying = [deque() for _ in range(contexts)]
    for _ in range(steps):
        keys = np.arange(contexts)
        eligible = rng.uniform(size=(contexts, 3)) < 0.8
        eligible[~eligible.any(1)] = True
        settle = np.array([len(f) == 3 or (len(f) > 0 and rng.uniform() < 0.5) for f in flying])
        due = [f[rng.integers(len(f))] if go else (0, 0) for f, go in zip(flying, settle)]
        rewards = rng.uniform(size=contexts).astype(np.float32)
        for key in keys[settle]:
            flying[key].remove(due[key])
            peer.tell(due[key][1], rewards[key])
        tickets = np.array([d[0] for d in due], np.int32)
        never = np.zeros(contexts, bool)
        feedback = Feedback(rewards, terminal=never, truncated=never)
        routes = ours(keys, Ask(Maybe(eligible, ~never), Maybe(Outcome(tickets, feedback), settle)))
        assert routes.valid.all()
        for key in keys:
            arm = int(routes.value.decision.action[key])
            index = np.where(eligible[key], peer.index(key), -np.inf)
            assert index[arm] >= index.max() - 1e-4 * (1 + np.isfinite(index.max()))
            flying[key].append((int(routes.value.ticket[key]), peer.pull(key, arm)))
    for key in keys:
        np.testing.assert_allclose(ours.state(key).policy.stats.n, peer.arms[key][0], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(ours.state(key).policy.stats.s, peer.arms[key][1], rtol=1e-4, atol=1e-6)


def test_window_equals_a_deque():
    """Rewards that are no fractions of 2, over many laps: the sums stay those of the window, without drift."""
    window, steps = 50, 2000
    rewards = np.random.default_rng(1).uniform(size=(steps, 3)).astype(np.float32)
    policy = SlidingWindowUCB(3, window=window, bonus=0.5)
    result = play(policy, TraceEnv(rewards), steps, key=jax.random.PRNGKey(2))
    held = deque(maxlen=window)
    for t, arm in enumerate(np.asarray(result.ticks.decision.action)):
        n = np.bincount([a for a, _ in held], minlength=3)
        s = np.bincount([a for a, _ in held], [r for _, r in held], minlength=3)
        with np.errstate(divide="ignore", invalid="ignore"):
            bound = s / n + 0.5 * np.sqrt(np.log(max(min(t, window), 1)) / n)
        index = np.where(n == 0, np.inf, bound)
        assert index[arm] >= index.max() - 1e-4, f"round {t}"
        held.append((arm, rewards[t, arm]))
    counts = result.state["policy"].stats.counts
    s = np.bincount([a for a, _ in held], [r for _, r in held], minlength=3)
    np.testing.assert_allclose(counts.s, s, atol=1e-4)
    np.testing.assert_array_equal(counts.n, np.bincount([a for a, _ in held], minlength=3))


def test_forgetting_by_time():
    policy = DiscountedUCB(2, half_life=60.0)
    state = policy.init(key=jax.random.PRNGKey(0))
    first = jnp.array([True, False])
    state, decision = policy.act(state, Request(first, jnp.array(0.0)))
    state, _ = policy.act(state, Request(jnp.zeros(2, bool), jnp.array(60.0)))  # the outcome takes a minute
    np.testing.assert_allclose(state.stats.pending, [0.5, 0.0])
    state = policy.learn(state, (), decision, Feedback(jnp.array(1.0)))
    np.testing.assert_allclose(state.stats.n, [1.0, 0.0])
    np.testing.assert_allclose(state.stats.pending, [0.0, 0.0], atol=1e-6)
    state, _ = policy.act(state, Request(first, jnp.array(120.0)))
    np.testing.assert_allclose(state.stats.n, [0.25, 0.0])
    router = PaymentRouter(policy)
    _, route = router.step(router.init(), router.ask(Request(first, jnp.array(0.0))))
    assert bool(route.valid) and int(route.value.decision.action) == 0


def test_pulls_count_while_their_outcome_is_pending():
    router = PaymentRouter(DiscountedUCB(3))
    state, arms = router.init(key=jax.random.PRNGKey(0)), []
    for _ in range(6):
        state, route = router.step(state, router.ask(ALL))
        arms.append(int(route.value.decision.action))
    assert sorted(arms[:3]) == sorted(arms[3:]) == [0, 1, 2]  # nothing is known yet, and still no arm is favoured
    index = ucb(state.policy.stats, 0.2)
    np.testing.assert_allclose(index, 0.2 * np.sqrt(np.log(6) / 2), rtol=1e-5)


@pytest.mark.parametrize("policy", [UCB1(3), DiscountedUCB(3, gamma=0.9), SlidingWindowUCB(3, window=5)])
def test_outcomes_in_any_order_leave_nothing_pending(policy):
    router = PaymentRouter(policy)
    state = router.init(key=jax.random.PRNGKey(0))
    for _ in range(8):
        state, _ = router.step(state, router.ask(ALL))
    for ticket in (3, 0, 7, 1, 2, 6, 5, 4):
        state, _ = router.step(state, router.tell(ticket, Feedback(1.0)))
    counts = getattr(state.policy.stats, "counts", state.policy.stats)
    np.testing.assert_allclose(counts.pending, 0.0, atol=1e-5)
    assert int(state.lost) == int(state.ignored) == 0


@pytest.mark.parametrize("policy", [DiscountedUCB(2, gamma=0.9), SlidingWindowUCB(2, window=20)])
def test_a_pull_that_is_never_answered_is_forgotten(policy):
    router = PaymentRouter(policy, capacity=4)
    state = router.init(key=jax.random.PRNGKey(0))
    state, _ = router.step(state, router.ask(jnp.array([True, False])))
    n, never = 400, jnp.zeros(400, bool)
    xs = Ask(
        Maybe(jnp.tile(jnp.array([False, True]), (n, 1)), ~never),
        Maybe(Outcome(jnp.arange(n), Feedback(jnp.ones(n), (), (), never, never)), jnp.arange(n) > 1),
    )
    state, _ = scan(router, xs, state)  # outcome of ticket t comes with transaction t + 1; ticket 0 stays open
    counts = getattr(state.policy.stats, "counts", state.policy.stats)
    assert int(state.lost) == 2  # tickets 0 and 1
    np.testing.assert_allclose(counts.pending[0], 0.0, atol=1e-5)


def test_late_corrections_are_ignored_and_counted():
    router = PaymentRouter(DiscountedUCB(3))
    state, route = router.step(router.init(), router.ask(ALL))
    state, _ = router.step(state, router.tell(route.value.ticket, Feedback(0.0)))  # the timeout
    before = state
    state, _ = router.step(state, router.tell(route.value.ticket, Feedback(1.0)))  # the success that came too late
    state, _ = router.step(state, router.tell(99, Feedback(1.0)))
    jax.tree.map(np.testing.assert_array_equal, state.policy, before.policy)
    assert int(state.ignored) == 2 and float(state.policy.stats.s.sum()) == 0.0


def test_nothing_eligible_goes_to_the_default():
    router = PaymentRouter(DiscountedUCB(3))
    state = router.init()
    after, route = router.step(state, router.ask(jnp.zeros(3, bool)))
    assert not route.valid and int(after.issued) == 0
    jax.tree.map(np.testing.assert_array_equal, after, state)


def events(n=96, k=3):
    rng = np.random.default_rng(0)
    never = np.zeros(n, bool)
    outcome = Outcome(
        np.arange(n, dtype=np.int32) - 4, Feedback(rng.uniform(size=n).astype(np.float32), (), (), never, never)
    )
    return Ask(Maybe(rng.uniform(size=(n, k)) < 0.7, rng.uniform(size=n) < 0.9), Maybe(outcome, np.arange(n) > 4))


@pytest.mark.parametrize("policy", [DiscountedUCB(3), SlidingWindowUCB(3, window=10)])
def test_contract(policy):
    from anabranch.contract import check

    report = check(PaymentRouter(policy, capacity=8), events(), key=jax.random.PRNGKey(0))
    assert report.ok, str(report)


def flights():
    rows = [
        # year, month, day, carrier, origin, dest, arr_delay
        (2013, 1, 1, "UA", "EWR", "IAH", 11),
        (2013, 1, 1, "UA", "EWR", "IAH", 16),
        (2013, 1, 1, "DL", "EWR", "IAH", -3),
        (2013, 1, 1, "AA", "JFK", "MIA", 0),  # alone on its route
        (2013, 1, 3, "UA", "EWR", "IAH", 0),  # alone on the day
        (2013, 1, 4, "UA", "EWR", "IAH", None),
        (2013, 1, 4, "B6", "EWR", "IAH", 15),
    ]
    names = ("year", "month", "day", "carrier", "origin", "dest", "arr_delay")
    return pa.table({name: [row[i] for row in rows] for i, name in enumerate(names)})


def test_flights_by_hand():
    env, routes, carriers = FlightsEnv.routes(flights(), per_day=2)
    assert routes == ["EWR-IAH"] and carriers == [["B6", "DL", "UA"]]
    np.testing.assert_array_equal(
        env.rates[0], [[0, 1, 0.5], [0, 0, 0], [0, 0, 0], [1, 0, 0]]
    )  # 15 minutes is on time, 16 is not; a cancelled flight is a failure
    np.testing.assert_array_equal(env.flown[0], [[0, 1, 1], [0, 0, 0], [0, 0, 0], [1, 0, 1]])


def test_flights_are_drawn_at_the_rate_of_the_day():
    env = FlightsEnv(jnp.array([[0.3, 0.8]]), jnp.ones((1, 2), bool), per_day=4000)
    rewards = jax.jit(lambda arm: jax.lax.scan(lambda s, _: env.step(s, arm), env.init(), None, 4000)[1].reward.mean())
    assert abs(float(rewards(0)) - 0.3) < 0.03 and abs(float(rewards(1)) - 0.8) < 0.03
    _, feedback = env.step(env.init()._replace(t=jnp.array(3999)), jnp.array(1))
    assert bool(feedback.truncated)


def test_simulated_day_settles_every_ticket_once():
    n = 300
    world = PaymentSimulator.day(7, contexts=3, transactions=n, k=4)
    env = jax.tree.map(lambda leaf: leaf[1], world)
    player = Routing(PaymentRouter(UCB1(4), env.capacity))
    result = play(player, env, 2 * n, key=jax.random.PRNGKey(0), meters={"regret": DynamicRegret(env)})
    router = result.state["policy"]
    assert int(router.issued) == n and int(router.lost) == int(router.ignored) == 0
    assert (np.asarray(router.ticket) == -1).all()
    assert float(router.policy.stats.n.sum()) == n
    ticks, asked = result.ticks, np.asarray(result.ticks.x.x.valid)
    assert asked.sum() == n and (np.asarray(ticks.decision.action)[~asked] == -1).all()
    # What the outcomes report is what the transactions earned, only later.
    assert float(router.policy.stats.s.sum()) == float(ticks.feedback.reward.sum())
    arms = np.asarray(ticks.decision.action)[asked]
    rates = np.asarray(env.rates)[np.asarray(env.minute)]
    np.testing.assert_allclose(result.scores["regret"], (rates.max(1) - rates[np.arange(n), arms]).sum(), rtol=1e-4)


def test_simulated_timeouts_are_failures():
    world = PaymentSimulator.day(7, contexts=1, transactions=100, k=2)
    env = eqx.tree_at(lambda e: e.timely, jax.tree.map(lambda leaf: leaf[0], world), jnp.arange(100) < 50)
    result = play(Routing(PaymentRouter(UCB1(2))), env, 200, key=jax.random.PRNGKey(0))
    made = np.asarray(result.ticks.x.x.valid)
    rewards = np.asarray(result.ticks.feedback.reward)[made]
    assert rewards[:50].mean() > 0.5 and (rewards[50:] == 0).all()


def test_simulated_day_is_what_it_says():
    world = PaymentSimulator.day(1, contexts=20, transactions=400)
    rates, minute = np.asarray(world.rates), np.asarray(world.minute)
    assert 0.84 < np.median(rates) < 0.88
    down = (rates == np.float32(0.1)).all(0)  # in all contexts at once
    assert 0.01 < down.mean() < 0.15
    hour = np.bincount(minute.ravel() // 60, minlength=24)
    assert hour[11:13].mean() > 4 * hour[[0, 23]].mean()
    with pytest.raises(ValueError, match="capacity = 4"):
        PaymentSimulator.day(1, contexts=20, transactions=5000, capacity=4)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: DiscountedUCB(2, gamma=0.0), "gamma.*0.0"),
        (lambda: DiscountedThompson(2, gamma=1.5), "gamma.*1.5"),
        (lambda: DiscountedUCB(2, half_life=-1.0), "half_life.*-1.0"),
        (lambda: SlidingWindowUCB(2, window=0), "window.*0"),
        (lambda: SlidingWindowUCB(200), "k .*200"),
    ],
)
def test_bad_input_is_named(make, word):
    with pytest.raises(ValueError, match=word):
        make()


def test_a_grid_is_one_vmap():
    grid = eqx.tree_at(lambda p: p.gamma, DiscountedUCB(3), jnp.array([0.5, 0.9]))
    rewards = TraceEnv(np.ones((50, 3), np.float32))
    run = eqx.filter_vmap(lambda p: play(p, rewards, 50, key=jax.random.PRNGKey(0), keep=False).state["policy"])
    n = np.asarray(run(grid).stats.n.sum(-1))
    np.testing.assert_allclose(n, [2.0, 10 * (1 - 0.9**50)], rtol=1e-5)
