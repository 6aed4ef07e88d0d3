"""Which waiting events are stepped next: what a batching policy sees, and what it decides.

A policy reads nothing but the `View`: no clock, no server, no simulator. So one object drives live streams and runs in
simulations, and a recorded live run that is replayed through it makes the same decisions.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64, Int32, Int64

from anabranch.cell import Policy

State = Any


class View(NamedTuple):
    """What waits. Arrays are over slots; where no stream waits, `waiting` is 0 and nothing else means anything."""

    now: float
    """Seconds, on the clock of all other times here."""
    arrival: Float64[np.ndarray, " N"]
    """When the oldest waiting event of each stream came."""
    deadline: Float64[np.ndarray, " N"]
    """When that event should be answered."""
    waiting: Int32[np.ndarray, " N"]
    """How many events wait."""
    done: Int64[np.ndarray, " N"]
    """How many events of the stream have been stepped since it last had nothing waiting."""
    tenant: Int32[np.ndarray, " N"]
    """Whose stream it is."""
    budget: int
    """The most events in a batch."""


class Batch(NamedTuple):
    """What is stepped now."""

    take: Int32[np.ndarray, " N"]
    """How many of the waiting events of each stream, oldest first."""
    timer: float | None = None
    """If nothing is taken: when to ask again, unless an event comes before."""


class Scheduler(Policy):
    """A policy whose observation is a `View` and whose action is a `Batch`, on the host.

    `act(state, view) -> (state, batch)`. Then `learn(state, view, batch, seconds)` is told how long it took.
    """

    host = True

    def init(self, *, key=None) -> State:
        return ()

    def act(self, state: State, x: View) -> tuple[State, Batch]:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise NotImplementedError(f"{type(self).__name__} is abstract: it defines no `act`")

    def learn(self, state: State, x: View, decision: Batch, feedback: float) -> State:  # pyright: ignore
        return state


class Deadlines(Scheduler):
    """Everything that waits; when that is too much, an equal share for each stream, earliest deadlines first.

    A deadline does not move while an event waits, so none waits for ever. With `wait`, a batch that would be small is
    held back for so many seconds after its first event came.

        >>> view = View(
        ...     now=0.0, arrival=np.zeros(3), deadline=np.array([3.0, 1.0, 2.0]), waiting=np.array([5, 1, 5], np.int32),
        ...     done=np.zeros(3, np.int64), tenant=np.zeros(3, np.int32), budget=6)
        >>> Deadlines().act((), view)[1].take.tolist()  # two each is 5; the one that is left goes to the earlier one
        [2, 1, 3]

    Raises:
        ValueError: if `wait` is negative.
    """

    wait: float = 0.0

    def __check_init__(self):
        if self.wait < 0:
            raise ValueError(f"wait must not be negative, got {self.wait}")

    def act(self, state, x: View):
        waiting = x.waiting
        total = int(waiting.sum())
        if self.wait and 0 < total < x.budget:
            first = float(x.arrival[waiting > 0].min())
            if x.now < first + self.wait:
                return state, Batch(np.zeros_like(waiting), first + self.wait)
        if total <= x.budget:
            return state, Batch(waiting.copy())
        # The largest share that all can have: waiting streams, sorted, leave what they do not need to the others.
        streams = np.flatnonzero(waiting)
        need = np.sort(waiting[streams])
        left = x.budget - np.concatenate([[0], np.cumsum(need)[:-1]])
        share = int((left // np.arange(len(need), 0, -1)).clip(0)[np.argmax(need * np.arange(len(need), 0, -1) > left)])
        take = np.minimum(waiting, share)
        extra = x.budget - int(take.sum())
        hungry = streams[waiting[streams] > share]
        take[hungry[np.lexsort((hungry, x.deadline[hungry]))[:extra]]] += 1
        return state, Batch(take)
