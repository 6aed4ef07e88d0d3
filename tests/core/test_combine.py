"""Combinators: rates and delays add up, streams stay aligned, and what is skipped is really skipped."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch import Cell, Decision, Feedback, Policy
from anabranch.cell import Maybe
from anabranch.combine import Ask, Chain, Delay, Delayed, Dual, Every, Map, Outcome, Residual, Route, Window

X = jnp.asarray(np.random.default_rng(0).normal(size=24), jnp.float32)
SCALAR = jnp.zeros(())


class Sum(Cell):
    """n inputs to their sum, m times over; lags by `lag` outputs."""

    n: int
    m: int
    lag: int = 0

    @property
    def rate(self):
        return self.n, self.m

    @property
    def delay(self):
        return self.lag

    def init(self, *, key=None):
        return jnp.zeros(self.lag)

    def step(self, state, x):
        y = jnp.full(self.m, jnp.sum(x))
        line = jnp.concatenate([state, y])
        y = line[: self.m]
        return line[self.m :], y if self.m > 1 else y[0]

    def offline(self, xs):
        return jnp.repeat(xs.reshape(-1, self.n).sum(1), self.m)


@pytest.mark.parametrize(
    "parts",
    [
        [(2, 1)], [(1, 3)], [(2, 1), (3, 1)], [(1, 2), (4, 1)], [(2, 3), (2, 1)], [(3, 2), (4, 3), (1, 1)],
        [(2, 1, 1), (1, 2)], [(1, 1, 2), (2, 1, 1)], [(2, 2, 2), (1, 1, 2), (2, 1)],
    ],
)  # fmt: skip
def test_chain_of_any_rates_and_delays(parts):
    chain = Chain(*(Sum(*part) for part in parts))
    n, m = chain.rate
    expected = chain.offline(X[: len(X) // n * n])
    _, ys = chain.advance(chain.init(), X[: len(X) // n * n])
    assert ys.shape == expected.shape == (len(X) // n * m,)
    d = chain.delay
    np.testing.assert_allclose(ys[d:], expected[: len(expected) - d], atol=1e-5)
    if d:
        assert not np.allclose(ys[d - 1 : -1], expected[: len(expected) - d], atol=1e-3)


def test_chain_refuses_half_a_delay_and_no_cells():
    with pytest.raises(ValueError, match="put a Delay of 1 before it"):
        Chain(Sum(1, 1, 1), Sum(2, 1))
    with pytest.raises(ValueError, match="put a Delay of 1 before it"):
        Chain(Sum(1, 1, 1), Sum(2, 2))
    with pytest.raises(ValueError, match="at least one"):
        Chain()
    with pytest.raises(ValueError, match="takes 2 inputs a step, got a block of 3"):
        Sum(2, 1).advance(jnp.zeros(0), X[:3])


def test_residual_and_dual_hold_back_the_faster_side():
    lagging = Sum(1, 1, 2)
    residual = Residual(lagging, like=SCALAR)
    _, ys = residual.advance(residual.init(), X)
    np.testing.assert_allclose(ys[2:], 2 * X[:-2], atol=1e-6)
    np.testing.assert_allclose(residual.offline(X), 2 * X, atol=1e-6)
    dual = Dual(lagging, Sum(1, 1), lambda a, b: (a + b, a - b), like=(SCALAR, SCALAR))
    assert dual.delay == 2
    _, (a, b) = dual.advance(dual.init(), (X, X[::-1]))
    ea, eb = dual.offline((X, X[::-1]))
    np.testing.assert_allclose(a[2:], ea[:-2], atol=1e-6)
    np.testing.assert_allclose(b[2:], eb[:-2], atol=1e-6)
    with pytest.raises(ValueError, match="lag by 2 and 0"):
        Dual(lagging, Sum(1, 1), lambda a, b: (a, b))
    with pytest.raises(ValueError, match="rates"):
        Dual(Sum(2, 1), Sum(1, 1), lambda a, b: (a, b))


class Count(Cell):
    by: float = 1.0

    def init(self, *, key=None):
        return jnp.zeros(())

    def step(self, state, x):
        return state + self.by, state + self.by


def test_route_steps_one_cell_only():
    route = Route(Map(lambda x: x.astype(int)), Count(1.0), Count(100.0))
    xs = jnp.array([0.0, 1.0, 1.0, 0.0])
    state, ys = route.advance(route.init(), xs)
    assert ys.tolist() == [1, 100, 200, 2]
    assert [float(s) for s in state[1]] == [2, 200]
    batched = jax.vmap(lambda s, x: route.step(s, x))
    states = jax.vmap(lambda _: route.init())(xs)
    states, ys = batched(states, xs)
    assert ys.tolist() == [1, 100, 100, 1]
    assert states[1][0].tolist() == [1, 0, 0, 1] and states[1][1].tolist() == [0, 100, 100, 0]
    with pytest.raises(ValueError, match="at least two"):
        Route(Map(lambda x: x), Count())


def test_every_runs_the_slow_cell_at_its_own_clock():
    cell = Every(3, slow=Count(), fast=Map(lambda xa: xa[1]), like=SCALAR)
    _, ys = cell.advance(cell.init(), X[:8])
    assert ys.tolist() == [1, 1, 1, 2, 2, 2, 3, 3]


@pytest.mark.parametrize(("n", "hop"), [(1, 1), (3, 1), (4, 4), (2, 5)])
def test_window(n, hop):
    cell = Window(n, hop, like=SCALAR)
    _, out = cell.advance(cell.init(), X)
    valid = np.flatnonzero(out.valid)
    assert valid.tolist() == list(range(n - 1, len(X), hop))
    for t in valid:
        np.testing.assert_array_equal(out.value[t], X[t - n + 1 : t + 1])
    with pytest.raises(ValueError, match="hop = 0"):
        Window(2, 0, like=SCALAR)


def test_delay_of_trees_and_of_nothing():
    like = {"a": jnp.zeros(2), "b": jnp.zeros((), jnp.int32)}
    xs = {"a": jnp.ones((5, 2)) * jnp.arange(5.0)[:, None], "b": jnp.arange(5)}
    for n in (0, 3):
        cell = Delay(n, like)
        _, ys = cell.advance(cell.init(), xs)
        assert ys["b"].tolist() == [max(0, t - n) for t in range(5)]
    with pytest.raises(ValueError, match="n = -1"):
        Delay(-1, like)


class Ledger(Policy):
    """Learns which observation got which reward, so that a mix-up shows."""

    def init(self, *, key=None):
        return jnp.zeros(50)

    def act(self, state, x):
        return state, Decision(x * 2)

    def learn(self, state, x, decision, feedback):
        return state.at[x].add(feedback.reward + 0.001 * decision.action)


CELL = Delayed(Ledger(), 4, like=jnp.zeros((), jnp.int32))
STEP = jax.jit(lambda s, x: CELL.step(s, x))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.one_of(st.none(), st.integers(-2, 12)), min_size=1, max_size=30))
def test_delayed_against_a_dictionary(moves):
    """None asks for a decision; a number reports the outcome of that ticket, known or not."""
    state, opened, asked, reward = CELL.init(), {}, 0, np.zeros(50)
    lost = ignored = 0
    for move in moves:
        if move is None:
            x = asked
            state, out = STEP(state, Ask(Maybe(jnp.int32(x), True), Maybe(Outcome(-1, Feedback(0.0)), False)))
            assert bool(out.valid) and int(out.value.ticket) == asked and int(out.value.decision.action) == 2 * x
            lost += opened.pop(asked - 4, None) is not None
            opened[asked] = x
            asked += 1
        else:
            state, out = STEP(state, Ask(Maybe(jnp.int32(0), False), Maybe(Outcome(move, Feedback(5.0 + move)), True)))
            assert not bool(out.valid)
            if move in opened:
                x = opened.pop(move)
                reward[x] += 5.0 + move + 0.002 * x
            else:
                ignored += 1
        assert (int(state.lost), int(state.ignored), int(state.issued)) == (lost, ignored, asked)
        assert sorted(t for t in state.ticket.tolist() if t >= 0) == sorted(opened)
    np.testing.assert_allclose(state.policy, reward, atol=1e-4)


def test_delayed_may_be_told_and_asked_at_once():
    state, _ = STEP(CELL.init(), Ask(Maybe(jnp.int32(3), True), Maybe(Outcome(-1, Feedback(0.0)), False)))
    state, out = STEP(state, Ask(Maybe(jnp.int32(4), True), Maybe(Outcome(0, Feedback(1.0)), True)))
    assert float(state.policy[3]) == pytest.approx(1.006) and int(out.value.ticket) == 1
    with pytest.raises(ValueError, match="capacity = 0"):
        Delayed(Ledger(), 0, like=SCALAR)
