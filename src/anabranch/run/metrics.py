"""What a server tells of itself: Prometheus metrics, and the figures of the dashboard."""

import time
from collections import deque
from typing import Any

import numpy as np

LATENCIES = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
SIZES = tuple(4**i for i in range(9))


class Spent:
    """The time that the steps of one stage took, and how many events they took, over the last minute."""

    def __init__(self):
        self._recent: deque[tuple[int, float, int]] = deque(maxlen=60)  # of each second: which, time, events

    def add(self, seconds: float, events: int) -> None:
        """A step has been made."""
        now = int(time.monotonic())
        _, before, others = self._recent.pop() if self._recent and self._recent[-1][0] == now else (now, 0.0, 0)
        self._recent.append((now, before + seconds, others + events))

    def value(self) -> dict[str, float]:
        """`seconds` and `events`."""
        since = time.monotonic() - 60
        recent = [(seconds, events) for second, seconds, events in list(self._recent) if second > since]
        return {"seconds": sum(seconds for seconds, _ in recent), "events": sum(events for _, events in recent)}


class Metrics:
    """Counters and histograms of one server, in a registry of its own."""

    def __init__(self):
        try:
            from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
        except ImportError:
            raise ImportError("serving needs more packages: pip install 'anabranch[serve]'") from None
        self.registry = registry = CollectorRegistry()
        self.events = Counter("anabranch_events", "Events answered.", registry=registry)
        self.refused = Counter("anabranch_events_refused", "Events refused for want of room.", registry=registry)
        self.bad = Counter("anabranch_events_bad", "Events that could not be used.", registry=registry)
        self.latency = Histogram(
            "anabranch_latency_seconds", "From arrival to answer.", buckets=LATENCIES, registry=registry
        )
        self.size = Histogram("anabranch_batch_events", "Events in a batch.", buckets=SIZES, registry=registry)
        self.took = Histogram("anabranch_batch_seconds", "Time of a batch.", buckets=LATENCIES, registry=registry)
        self.streams = Gauge("anabranch_streams", "Streams in the last batch.", registry=registry)
        self.sessions = Gauge("anabranch_sessions", "Open WebSocket connections.", registry=registry)
        self.alarms = Gauge("anabranch_alarms", "Alarms so far, of each stage.", ["stage"], registry=registry)
        self.unsaved = Gauge(
            "anabranch_checkpoints_failed", "Checkpoints that could not be written.", registry=registry
        )
        self.begin = time.monotonic()
        self._recent: deque[tuple[float, int, float]] = deque(maxlen=20_000)  # when, events, latency
        self._batches: deque[tuple[float, int, float]] = deque(maxlen=2000)

    def batch(self, events: int, streams: int, seconds: float) -> None:
        """A batch has been stepped."""
        self.size.observe(events)
        self.took.observe(seconds)
        self.streams.set(streams)
        self._batches.append((time.monotonic(), events, seconds))

    def answered(self, events: int, latency: float) -> None:
        """A request has been answered."""
        self.events.inc(events)
        self.latency.observe(latency)
        self._recent.append((time.monotonic(), events, latency))

    def snapshot(self, seconds: float = 5.0) -> dict[str, Any]:
        """Figures of the last seconds."""
        now = time.monotonic()
        span = min(seconds, max(now - self.begin, 1e-3))
        recent = [r for r in self._recent if r[0] > now - span]
        batches = [b for b in self._batches if b[0] > now - span]
        if len(recent) == self._recent.maxlen:
            span = now - recent[0][0]
        p50, p95, p99 = np.percentile([r[2] for r in recent] or [0.0], (50, 95, 99))
        with open("/proc/self/statm") as file:
            resident = int(file.read().split()[1]) * 4096
        return {
            "seconds": now - self.begin,
            "events_per_s": sum(r[1] for r in recent) / span,
            "latency": {"p50": p50, "p95": p95, "p99": p99},
            "batch": sum(b[1] for b in batches) / max(1, len(batches)),
            "batches_per_s": len(batches) / span,
            "busy": min(1.0, sum(b[2] for b in batches) / span),
            "resident": resident,
        }
