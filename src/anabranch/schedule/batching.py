"""The server of events, simulated: how long answers take under a batching policy, before anything is served.

    >>> rng = np.random.default_rng(0)
    >>> came = Arrivals.poisson(rate=2000.0, n=5000, streams=100, seed=0)
    >>> served = simulate_batching(Deadlines(), came, seconds=lambda n: 0.002 + 1e-5 * n)
    >>> bool(np.percentile(served.latency, 99) < 0.02), max(map(sum, served.takes())) > 4
    (True, True)

The policy is the object that `anabranch serve` asks (`anabranch.batching`): it sees the same `View`. A `Batcher` that
records can be replayed: asked again at the same times about the same events, a policy decides the same.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

from anabranch.batching import Deadlines, Scheduler, View

__all__ = ["Arrivals", "Deadlines", "Served", "simulate_batching"]


class Arrivals(NamedTuple):
    """Events in the order in which they come."""

    time: Float64[np.ndarray, " n"]
    """Seconds."""
    stream: Int64[np.ndarray, " n"]
    deadline: Float64[np.ndarray, " n"]
    """By when each should be answered, on the same clock."""
    tenant: Int64[np.ndarray, " n"]
    """Whose stream it is."""

    @classmethod
    def poisson(cls, rate: float, n: int, streams: int, seed: int, within: float = 1.0) -> "Arrivals":
        """n events, `rate` a second, each of one of so many streams, to be answered `within` seconds.

        Raises:
            ValueError: if a number is not positive.
        """
        for name, value in (("rate", rate), ("n", n), ("streams", streams), ("within", within)):
            if not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        rng = np.random.default_rng(seed)
        time = np.cumsum(rng.exponential(1 / rate, n))
        return cls(time, rng.integers(0, streams, n), time + within, np.zeros(n, np.int64))


@dataclass
class Served:
    """What became of the events."""

    arrivals: Arrivals
    answered: Float64[np.ndarray, " n"]
    """When; NaN for those that were not."""
    decisions: list[tuple[float, dict[int, int]]] = field(default_factory=list)
    """When the policy was asked, and how many events of which streams it took."""

    @property
    def latency(self) -> Float64[np.ndarray, " n"]:
        """Seconds from arrival to answer."""
        return self.answered - self.arrivals.time

    def takes(self) -> list[list[int]]:
        """How many events of each stream were in each batch."""
        return [list(take.values()) for _, take in self.decisions if take]


def simulate_batching(
    policy: Scheduler, arrivals: Arrivals, seconds: Callable[[int], float] = lambda n: 0.0, *, budget: int = 4096,
    at: Sequence[float] | None = None,
) -> Served:  # fmt: skip
    """Serve events with one worker.

    Arguments:
        seconds: what a batch of so many events takes.
        budget: events in a batch at most.
        at: ask at these times and at no others, as a recorded server did; then batches take no time.

    Raises:
        ValueError: if arrivals are not in the order of their times.
        RuntimeError: if the policy takes what is not there, or leaves events waiting for ever.
    """
    if (np.diff(arrivals.time) < 0).any():
        raise ValueError(f"time: event {int((np.diff(arrivals.time) < 0).argmax()) + 1} comes before the one before it")
    served = Served(arrivals, np.full(len(arrivals.time), np.nan))
    queues: dict[int, deque[int]] = {}
    done: dict[int, int] = {}
    act, learn, state = policy.act, policy.learn, policy.init()
    times, streams = arrivals.time.tolist(), arrivals.stream.tolist()
    now, came, asked = 0.0, 0, iter(at) if at is not None else None
    while came < len(times) or queues:
        if asked is not None:
            if (time := next(asked, None)) is None:
                break
            now = time
        elif not queues:
            now = max(now, times[came])
        while came < len(times) and times[came] <= now:
            queues.setdefault(streams[came], deque()).append(came)
            came += 1
        first = [queue[0] for queue in queues.values()]
        view = View(
            now, arrivals.time[first], arrivals.deadline[first], np.array([*map(len, queues.values())], np.int32),
            np.array([done.get(stream, 0) for stream in queues], np.int64), arrivals.tenant[first].astype(np.int32),
            budget,
        )  # fmt: skip
        state, batch = act(state, view)
        if (batch.take > view.waiting).any():
            raise RuntimeError(f"{type(policy).__name__} takes more than waits")
        take = {stream: count for stream, count in zip(queues, batch.take.tolist()) if count}
        served.decisions.append((now, take))
        if not take:
            later = [time for time in (batch.timer, times[came] if came < len(times) else None) if time is not None]
            if asked is None and not later:
                raise RuntimeError(f"{type(policy).__name__} leaves {view.waiting.sum()} events waiting for ever")
            now = max(now, min(later, default=now)) if asked is None else now
            continue
        count = sum(take.values())
        end = now if asked is not None else now + seconds(count)
        for stream, some in take.items():
            queue = queues[stream]
            for _ in range(some):
                served.answered[queue.popleft()] = end
            done[stream] = done.get(stream, 0) + some
            if not queue:
                del queues[stream]
                del done[stream]
        state = learn(state, view, batch, end - now)
        now = end
    return served
