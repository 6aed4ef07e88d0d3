"""DistServe: Disaggregating Prefill and Decoding for Goodput-optimized LLM Serving. arXiv 2401.09670; OSDI 2024.

A prompt that is prefilled on a device which also decodes makes everybody there wait. Here some engines only prefill and
others only decode: a request goes to the prefill engine with the shortest queue, and its cache, once made, to the
decode engine with fewest requests, as soon as that has room; until then it stays, so that the memory of prefill engines
is the buffer under bursts. How many engines of each kind, and how many devices for each, `place` finds by simulation:
each phase alone by its own goal, so that each can be as parallel as its goal asks for.

    >>> [round(ttft_md1(rate, 0.1), 3) for rate in (1.0, 5.0, 9.0)]  # seconds for prompts that take 0.1 s
    [0.106, 0.15, 0.55]

Engines are parallel by tensors (`devices` of a cost); pipelines of engines are not modelled.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import equinox as eqx

from anabranch.schedule.baselines import FCFS
from anabranch.schedule.cluster import Fitted
from anabranch.schedule.scheduler import Engine, Load, View
from anabranch.schedule.serving import Result, goodput, simulate_serving
from anabranch.schedule.workload import Workload


class DistServe(FCFS):
    """Prompts first come first, several at once only while they do not saturate a device; decodes all together.

    For engines with the roles "prefill" and "decode".

    Args:
        saturating: tokens from which on a prefill takes time in proportion; prompts are put together up to this.

    Raises:
        ValueError: if it is not positive.
    """

    saturating: int = eqx.field(static=True, default=512)

    def __check_init__(self):
        if self.saturating < 1:
            raise ValueError(f"saturating must be positive, got {self.saturating}")

    def budget(self, x: View) -> int:
        return self.saturating

    def route(self, engines: list[Load], request: int) -> int:
        """The engine with fewest tokens to prefill."""
        takes = [load for load in engines if load.role != "decode"]
        return min(takes, key=lambda load: (load.tokens, load.requests, load.engine)).engine


def ttft_md1(rate: float, duration: float) -> float:
    """Mean seconds to the first token of equal prompts that arrive at random, on one engine: an M/D/1 queue.

    Raises:
        ValueError: if the engine cannot keep up.
    """
    if not rate * duration < 1:
        raise ValueError(f"rate * duration must be below 1, got {rate * duration:g}")
    return duration + rate * duration**2 / (2 * (1 - rate * duration))


class Goals(NamedTuple):
    """What a share `at` of requests must meet, in seconds."""

    ttft: float
    tpot: float
    at: float = 0.9


class Placement(NamedTuple):
    """Engines of both kinds, and what they can do."""

    prefill: Engine
    decode: Engine
    prefills: int
    """Engines."""
    decodes: int
    goodput: float
    """Requests a second and device, as each phase alone promises."""

    @property
    def engines(self) -> list[Engine]:
        return [self.prefill] * self.prefills + [self.decode] * self.decodes


def phase(engine: Engine, make: Callable[[float], Workload], goals: Goals, high: float = 64.0) -> float:
    """The goodput of engines that do one phase only, requests a second and device, all else being free."""
    scheduler = DistServe()
    if engine.role == "prefill":
        one = lambda load: replace(load, output=load.output * 0 + 1)
        serve = lambda load: simulate_serving(one(load), [replace(engine, role="both")], scheduler)
        return goodput(make, serve, ttft=goals.ttft, tpot=math.inf, at=goals.at, high=high)
    free = Fitted((0.0, 0.0, 0.0), kv_tokens=10**9, kv_bytes=engine.cost.kv_bytes)
    source = Engine(free, role="prefill", link=engine.link, max_seqs=4096, max_tokens=10**9)

    def decode(load: Workload) -> Result:
        return replace(simulate_serving(load, [source, engine], scheduler), devices=engine.devices)

    return goodput(make, decode, ttft=math.inf, tpot=goals.tpot, at=goals.at, high=high)


def place(make: Callable[[float], Workload], engines: Sequence[Engine], goals: Goals, rate: float) -> Placement:
    """The best engine for each phase by goodput for each device, and as many as a rate needs: Algorithm 1 of the paper.

    Arguments:
        make: the workload at a rate.
        engines: candidates, such as one for each number of devices; their roles are set here.
        rate: requests a second.

    Raises:
        ValueError: if no engine meets a goal at any rate.
    """
    best, found = [], []
    for role in ("prefill", "decode"):
        tried = [(phase(made, make, goals), made) for made in (replace(engine, role=role) for engine in engines)]
        value, engine = max(tried, key=lambda pair: pair[0])
        if value <= 0:
            raise ValueError(f"no engine meets the goal for {role} at any rate: {goals}")
        best.append((value, engine))
        found.append(max(1, math.ceil(rate / (value * engine.devices))))
    (first, prefill), (second, decode) = best
    devices = found[0] * prefill.devices + found[1] * decode.devices
    able = min(rate, found[0] * prefill.devices * first, found[1] * decode.devices * second)
    return Placement(prefill, decode, found[0], found[1], able / devices)


def splits(engine: Engine, engines: int) -> list[list[Engine]]:
    """All ways to give so many engines the two roles."""
    prefill, decode = (replace(engine, role=role) for role in ("prefill", "decode"))
    return [[prefill] * n + [decode] * (engines - n) for n in range(1, engines)]


def best_split(
    make: Callable[[float], Workload], engine: Engine, engines: int, goals: Goals, high: float = 64.0
) -> list[Engine]:
    """The way to give so many engines the two roles that has most goodput, both phases together."""

    def value(some: list[Engine]) -> float:
        serve = lambda load: simulate_serving(load, some, DistServe())
        return goodput(make, serve, ttft=goals.ttft, tpot=goals.tpot, at=goals.at, high=high, close=0.04)

    return max(splits(engine, engines), key=value)
