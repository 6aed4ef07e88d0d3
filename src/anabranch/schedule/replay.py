"""What live sessions leave behind: results as the simulator gives them, replays through it, and times to plan with.

A scheduler that sees the same must decide the same: `replay` runs recorded requests through the simulator with the
times that their iterations took.
"""

import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from anabranch.models.llama import LENGTHS, Decoder
from anabranch.schedule.baselines import FCFS
from anabranch.schedule.cluster import Fitted, LMSpec, Work
from anabranch.schedule.live import Live, Record, Session
from anabranch.schedule.scheduler import Scheduler
from anabranch.schedule.serving import Result, simulate_serving
from anabranch.schedule.workload import Workload
from anabranch.sessions import Ask


def _recorded(live: Live) -> Record:
    if live.record is None or not live.record.sessions:
        raise ValueError("nothing was recorded")
    return live.record


def workload(sessions: Sequence[Session]) -> Workload:
    """The requests that they were, answers as long as they came to be.

    Raises:
        ValueError: if they have several salts: what they share cannot be said by tokens alone.
    """
    if len(salts := {session.ask.salt for session in sessions}) > 1:
        raise ValueError(f"sessions must have one salt, got {len(salts)}")
    column = lambda f: np.array([f(session) for session in sessions])
    return Workload(
        column(lambda s: s.arrival), column(lambda s: len(s.ask.prompt)), column(lambda s: len(s.tokens)),
        column(lambda s: s.ask.ttft), column(lambda s: s.ask.tds),
        tokens=[s.ask.prompt for s in sessions],  # pyright: ignore[reportArgumentType]
    )  # fmt: skip


def result(live: Live) -> Result:
    """What became of the sessions that were recorded; those without a token are left out.

    Raises:
        ValueError: if nothing was.
    """
    record = _recorded(live)
    some = [session for session in record.sessions if session.tokens]
    load = workload(some)
    return Result(
        replace(load, arrival=load.arrival - load.arrival[0]), 1, np.concatenate([[0], np.cumsum(load.output)]),
        np.concatenate([session.times for session in some]) - load.arrival[0], [],
        seconds=record.ends[-1] - load.arrival[0], busy=sum(record.seconds), iterations=len(record.log),
        preemptions=record.preemptions, log=record.log,
    )  # fmt: skip


def play(live: Live, load: Workload, prompts: Sequence[list[int]]) -> Result:
    """Serve a workload as it comes, in real time, and wait for its end. `live` must record, and not be in use.

    Raises:
        ValueError: if a prompt has another length than the workload says.
    """
    for i, (prompt, length) in enumerate(zip(prompts, load.prompt.tolist(), strict=True)):
        if len(prompt) != length:
            raise ValueError(f"prompt {i} has {len(prompt)} tokens, the workload says {length}")

    def send() -> None:
        for i, prompt in enumerate(prompts):
            time.sleep(max(0.0, start + load.arrival[i] - live.clock()))
            live.submit(Ask(prompt, int(load.output[i]), ttft=load.ttft[i], tds=load.tds[i]))

    start = live.clock()
    sender = threading.Thread(target=send)
    sender.start()
    while sender.is_alive() or live.busy:
        if not live.turn():
            live.wait(0.05)
    return result(live)


def measure(model: Decoder, sessions: int = 8, repeats: int = 3) -> Fitted:
    """What iterations of a model take on this machine: prefills of one prompt, and steps of up to so many sessions."""
    live, most = Live(model, FCFS(), sessions=sessions), model.size - 4 * (repeats + 2)
    prefills, decodes = [], []

    def turn() -> float:
        start = time.perf_counter()
        live.turn()
        return time.perf_counter() - start

    begun: list[int] = []

    def begin(prompt: int, limit: int) -> None:
        begun.append(live.submit(Ask([0] * prompt, limit)))

    def end() -> None:
        while begun:
            live.cancel(begun.pop())
        live.turn()

    lengths = [length for length in LENGTHS if length <= most]
    for length in lengths[:: max(1, len(lengths) // 6)]:
        times = []
        for _ in range(repeats + 1):  # the first one may compile
            begin(length, 2)
            times.append(turn())
            end()
        prefills += [(length, seconds) for seconds in times[1:]]
    for count in (1 << i for i in range(sessions.bit_length())):
        for length in (most // 8, most // 2):
            for _ in range(count):
                begin(max(1, length), 4 + repeats)
            while len(live.seats.decoding) < count:
                live.turn()
            turn()
            for _ in range(repeats):
                context = int(live.seats.done[live.seats.id >= 0].sum())
                decodes.append((count, context, turn()))
            end()
    kv_bytes, spec = live.engine.cost.kv_bytes, _spec(model)
    return Fitted.to(prefills, decodes, kv_bytes=kv_bytes, kv_tokens=live.engine.tokens, spec=spec)


def _spec(model: Decoder) -> LMSpec:
    config = model.config
    return LMSpec(config.layers, config.width, config.heads, config.kv_heads, config.hidden, config.vocab, bytes=4)


class _Measured:
    """The cost of iterations that have been: each takes what it took; if there are more, what one took on average."""

    def __init__(self, live: Live):
        self.kv_bytes, self.kv_tokens = live.engine.cost.kv_bytes, live.engine.cost.kv_tokens
        times = _recorded(live).seconds
        self.times, self.mean = iter(times), float(np.mean(times))

    def iteration(self, work: Work) -> float:
        return next(self.times, self.mean)

    def decode_steps(self, work: Work, k: int) -> Any:
        raise NotImplementedError("iterations are replayed one by one")

    def weight_bytes(self, work: Work) -> float:
        return 0.0

    traffic = weight_bytes


def replay(live: Live, scheduler: Scheduler) -> Result:
    """The recorded requests once more, simulated: a scheduler that decides as the one that was live has the same log.

    Its times may differ in the last digits, since the simulator adds them up.

    Raises:
        ValueError: if nothing was recorded.
    """
    engine = replace(live.engine, cost=_Measured(live), kv_tokens=live.engine.tokens, host=np.inf)
    return simulate_serving(workload(_recorded(live).sessions), [engine], scheduler, record=True)
