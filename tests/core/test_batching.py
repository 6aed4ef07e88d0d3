"""`Deadlines` against brute force: fair shares, earliest deadlines, and nothing that waits for ever."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.batching import Deadlines, View


def view(waiting, budget, deadline=None, arrival=None, now=0.0):
    n = len(waiting)
    return View(
        now=now,
        arrival=np.zeros(n) if arrival is None else np.asarray(arrival, float),
        deadline=np.arange(n, dtype=float) if deadline is None else np.asarray(deadline, float),
        waiting=np.asarray(waiting, np.int32),
        done=np.zeros(n, np.int64),
        tenant=np.zeros(n, np.int32),
        budget=budget,
    )


def one_by_one(seen):
    """Deal the budget out: a round gives every hungry stream one; the last, partial round goes by deadline."""
    take = np.zeros_like(seen.waiting)
    left = seen.budget
    while left and (take < seen.waiting).any():
        hungry = np.flatnonzero(take < seen.waiting)
        hungry = sorted(hungry, key=lambda i: (seen.deadline[i], i))[:left]
        take[hungry] += 1
        left -= len(hungry)
    return take


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 4)), min_size=1, max_size=12),
    st.integers(1, 40),
)
def test_shares_are_those_of_dealing_one_by_one(streams, budget):
    seen = view([w for w, _ in streams], budget, [d for _, d in streams])
    take = Deadlines().act((), seen)[1].take
    np.testing.assert_array_equal(take, one_by_one(seen))
    assert take.sum() == min(budget, seen.waiting.sum())


def test_every_stream_is_served_under_overload():
    """100 streams that always have more, room for 7: the deadlines, fixed when an event comes, go round."""
    deadline, served = np.zeros(100), np.zeros(100, int)
    for tick in range(200):
        take = Deadlines().act((), view(np.full(100, 5), 7, deadline))[1].take
        served += take
        deadline[take > 0] = tick + 1.0
    assert served.min() >= 13 and served.max() <= 15


def test_a_small_batch_waits_for_company_but_not_longer_than_said():
    policy = Deadlines(wait=0.01)
    early = policy.act((), view([1, 0], 8, arrival=[1.0, 0], now=1.004))[1]
    assert early.take.sum() == 0 and early.timer == pytest.approx(1.01)
    assert policy.act((), view([1, 0], 8, arrival=[1.0, 0], now=1.011))[1].take.tolist() == [1, 0]
    assert policy.act((), view([6, 2], 8, arrival=[1.0, 1.0], now=1.0))[1].take.tolist() == [6, 2]
    with pytest.raises(ValueError, match=r"wait must not be negative, got -1"):
        Deadlines(wait=-1)
