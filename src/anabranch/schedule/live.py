"""Real sessions of a language model, served by the schedulers that the simulator asks.

    >>> import jax
    >>> from anabranch.models.llama import Config, Decoder, Llama
    >>> from anabranch.schedule.baselines import Chunked
    >>> sizes = Config(vocab=11, width=8, layers=2, heads=4, kv_heads=2, hidden=16)
    >>> live = Live(Decoder(Llama(sizes, key=jax.random.PRNGKey(0)), size=32), Chunked(chunk=16), sessions=2)
    >>> said: list[int | None] = []
    >>> _ = live.submit(Ask([3, 1, 4], limit=5), said.append)
    >>> while live.turn():
    ...     pass
    >>> len(said), said[-1]  # five tokens, and the end
    (6, None)

An iteration does what the scheduler's `Batch` says: one token more for each of some sessions in one compiled call, and
so many tokens of some prompts, through some of the layers, one prompt after the other. Sessions keep a slot each in one
array of keys and values a layer, which is updated in place; blocks are counted, so that a scheduler has to share them.

A model whose memory forgets serves sessions without an end: each then has the blocks of what it remembers at most.

    >>> from anabranch.keep.memory import Sinks
    >>> endless = Decoder(Llama(sizes, key=jax.random.PRNGKey(0)), keep=Sinks(budget=8, sinks=2, room=4))
    >>> live, said = Live(endless, Chunked(chunk=16), sessions=2), []
    >>> _ = live.submit(Ask([3, 1, 4] * 20, limit=30), said.append)
    >>> while live.turn():
    ...     pass
    >>> len(said), live.places.most
    (31, 12)

With `prefixes`, full blocks of prompts are also kept in a pool, under the numbers that `PrefixIndex` gives them, and a
session whose prompt begins as an earlier one's takes their keys and values instead of computing them: they are copied
into its slot once. (To read them where they are, through a table of blocks, XLA would gather all keys and values of a
session for every token.)

What was decided, and how long each iteration took, can be recorded; `replay.py` runs it through the simulator again.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from anabranch.decode.base import Draw
from anabranch.keep.blocks import block_keys
from anabranch.layers.kv import Room
from anabranch.models.llama import Decoder
from anabranch.schedule.cluster import Work
from anabranch.schedule.places import Forgetful, Places
from anabranch.schedule.scheduler import PREFILLING, SWAP, SWAPPED, Engine, Scheduler
from anabranch.schedule.seats import Asked, Seats
from anabranch.sessions import Ask, Full

Emit = Callable[[int | None], None]
Found = Callable[[int], None]


@dataclass
class Session:
    number: int
    ask: Ask
    arrival: float
    emit: Emit
    found: Found
    tokens: list[int] = field(default_factory=list)
    """Of the answer."""
    times: list[float] = field(default_factory=list)
    """When each came."""
    over: bool = False
    """It is to have no more."""
    h: Any = None
    """Of a prompt on its way through the layers: what came out of the last one."""
    away: Any = None
    """What it remembers, while others have its blocks."""


@dataclass
class Record:
    """What happened, for `anabranch.schedule.replay`."""

    sessions: list[Session] = field(default_factory=list)
    log: list[tuple] = field(default_factory=list)
    """As `Result.log`."""
    ends: list[float] = field(default_factory=list)
    """Of the iterations."""
    preemptions: int = 0

    @property
    def seconds(self) -> list[float]:
        """What each iteration took."""
        return [end - start for end, (_, start, *_) in zip(self.ends, self.log, strict=True)]


class _Sizes(NamedTuple):
    """The cost of a real engine, of which only sizes are known; what an iteration takes is measured."""

    kv_bytes: int
    kv_tokens: int

    def iteration(self, work: Work) -> float:
        raise NotImplementedError("what a real iteration takes is measured")

    def decode_steps(self, work: Work, k: int) -> Any:
        return self.iteration(Work())

    weight_bytes = traffic = iteration


class Live:
    """Serves sessions: `submit` from any thread; `turn`, or `run`, in one.

    Args:
        model: whose size is the room of a session, prompt and answer together; if its memory forgets, there is no end.
        sessions: that are in an iteration at most. Twice as many have a place.
        kv_tokens: that all sessions may hold together; by default as many as their places have.
        most: tokens of prompts in an iteration.
        stop: tokens that end an answer.
        waiting: sessions that may wait for a place.
        record: keep all that happens, in `record`.
        prefixes: whether prompts that begin alike, and have the same salt, share what is computed of them. That takes
            memory for `kv_tokens` once more.

    Raises:
        ValueError: if a size is not positive, sessions have no room for a block, or what is asked for does not go with
            a memory that forgets: `prefixes`, fewer `kv_tokens` than a session may come to hold, or a scheduler that
            sends prompts through part of the layers if something is decided across them.
    """

    def __init__(
        self, model: Decoder, scheduler: Scheduler, *, sessions: int = 8, kv_tokens: int | None = None, block: int = 16,
        most: int = 8192, stop: frozenset[int] | set[int] = frozenset(), waiting: int = 1024, record: bool = False,
        prefixes: bool = False,
    ):  # fmt: skip
        for name, value in (("sessions", sessions), ("block", block)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        kind, n = Places if isinstance(model.keep, Room) else Forgetful, 2 * sessions
        self.places = places = kind(model, n)
        held = -(-places.most // block) * block
        sizes = _Sizes(places.token_bytes, n * held if kv_tokens is None else kv_tokens)
        self.engine = Engine(
            sizes, block=block, max_tokens=most, max_seqs=sessions, prefixes=prefixes,
            max_kept=places.most if places.endless else None,
        )  # fmt: skip
        if prefixes:
            places.open_pool(self.engine.blocks, block)
        if places.endless and held > self.engine.blocks * block:
            raise ValueError(f"kv_tokens must hold the {held} that a session comes to have, got {kv_tokens}")
        if places.together and scheduler.layered:
            keep, who = type(model.keep).__name__, type(scheduler).__name__
            raise ValueError(f"scheduler: {who} sends prompts through part of the layers, {keep} decides across them")
        self.seats = Seats(self.engine, 0, scheduler.oracle)
        self.model, self.scheduler, self.stop, self.waiting = model, scheduler, stop, waiting
        self.state = scheduler.init()
        self.room = None if places.endless else min(places.most, self.engine.blocks * block)
        self.record = Record() if record else None
        self._sessions: dict[int, Session] = {}
        self._count = 0
        self._come: deque[Session] = deque()
        self._gone: deque[int] = deque()
        self._wake = threading.Condition()
        self._begun = time.monotonic()
        self._now = 0.0
        self._timer: float | None = None
        self._idle = True

    @property
    def busy(self) -> bool:
        """Whether there are sessions."""
        return bool(self._sessions)

    def clock(self) -> float:
        """Seconds since this began."""
        return time.monotonic() - self._begun

    # From any thread

    def submit(self, ask: Ask, emit: Emit = lambda token: None, found: Found = lambda tokens: None) -> int:
        """Begin a session; `emit` gets each token, and None at the end; `found`, before, how many tokens of the prompt
        were there already.

        Raises:
            Full: if too many wait.
            ValueError: if the prompt is empty or has a token that is none, or there is no room for it and the answer.
        """
        vocab, length = self.model.config.vocab, len(ask.prompt)
        if not length or ask.limit < 1:
            raise ValueError(f"prompt and limit must be at least one token, got {length} and {ask.limit}")
        bad = next((token for token in ask.prompt if not 0 <= token < vocab), None)
        if bad is not None:
            raise ValueError(f"prompt: a token must be from 0 to {vocab - 1}, got {bad}")
        if self.room is not None and length + ask.limit > self.room:
            raise ValueError(f"prompt: {length} tokens and an answer of {ask.limit} have no room in {self.room}")
        with self._wake:
            if len(self._come) + len(self.seats.queue) >= self.waiting:
                raise Full("the queue of sessions", 1.0)
            session = Session(self._count, ask, self.clock(), emit, found)
            self._count += 1
            self._sessions[session.number] = session
            self._come.append(session)
            self._wake.notify()
        return session.number

    def cancel(self, number: int) -> None:
        """End a session, unless it has ended; one whose prompt is on its way ends with its first token."""
        with self._wake:
            self._gone.append(number)
            self._wake.notify()

    # From one thread

    def run(self, stop: threading.Event) -> None:
        """Serve until `stop` is set; then, or if something fails, all sessions are told that nothing more comes."""
        try:
            while not stop.is_set():
                if not self.turn():
                    self.wait(0.05)
        finally:
            with self._wake:
                for session in self._sessions.values():
                    session.emit(None)
                self._sessions.clear()

    def warm(self, told: Callable[[str], None] = lambda step: None) -> None:
        """Compile everything that serving needs, so that nobody has to wait for it. Only before the first session.

        Arguments:
            told: is given the name of what is compiled next.
        """
        most, hows = self.engine.max_tokens, ("likeliest", "all")
        for length in self.places.lengths(min(most, getattr(self.scheduler, "chunk", most))):
            told(f"prompts of {length} tokens")
            self.places.warm_fill(length, hows, _sampling([], 1)[0])
        rows = 2
        while rows < 2 * self.engine.max_seqs:
            told(f"steps of {rows} sessions")
            for how in hows:
                none = np.zeros(rows, np.int64), np.zeros(rows, np.int64), np.full(rows, 1 << 30)
                self.places.step(*none, _sampling([], rows)[0], how)
            rows *= 2
        if self.engine.prefixes:
            told("shared beginnings of prompts")
            self.places.warm_blocks()

    def wait(self, seconds: float) -> None:
        """Wait so long, or until the scheduler wants to be asked again, or somebody comes or goes."""
        if self._timer is not None:
            seconds = min(seconds, self._timer - self.clock())
        with self._wake:
            if not self._come and not self._gone and seconds > 0:
                self._wake.wait(seconds)

    def turn(self) -> bool:
        """One iteration; returns whether there was one."""
        seats, now = self.seats, self._admit()
        if now is None:
            return False
        view = seats.view(now)
        self.state, batch = self.scheduler.act(self.state, view)
        if batch.preempt:
            self._preempt(batch.preempt)
        self._idle, self._timer = not (len(batch.decode) or batch.prefill), batch.timer
        if self._idle:
            return False
        for slot in [slot for slot in batch.decode if seats.status[slot] == SWAPPED]:
            session = self._at(slot)
            self.places.put(slot, session.away)
            session.away = None
        if seats.index:
            seats.keep(batch.keep)
        taken = seats.take(batch, type(self.scheduler).__name__)
        tokens = self._decode(taken.decode)
        # Who finds what others compute, after them.
        order = lambda what: (what[2], seats.id[what[0]])
        for slot, chunk, begins in sorted(zip(taken.prompts, taken.chunk, taken.fresh, strict=True), key=order):
            if begins:
                self.places.begin(slot)
                if self.engine.prefixes:
                    self._find(slot)
            tokens[slot] = self._prefill(slot, chunk, *batch.layers)
            if taken.whole and self.engine.prefixes:
                self._share(slot, chunk)
        end = self.clock()
        if self.record is not None:
            ids = [seats.id[slots].tolist() for slots in (taken.decode, taken.prompts)]
            self.record.log.append((0, now, *ids, taken.chunk))
            self.record.ends.append(end)
        for slot in seats.give(taken, end):
            session, token = self._at(slot), int(tokens[slot])
            session.tokens.append(token)
            session.times.append(end)
            session.emit(token)
            if session.over or token in self.stop or len(session.tokens) >= session.ask.limit:
                self._end(session, slot)
        self.state = self.scheduler.learn(self.state, view, batch, end - now)
        self._now = end
        return True

    def _at(self, slot: int) -> Session:
        return self._sessions[int(self.seats.id[slot])]

    def _admit(self) -> float | None:
        """Let those in who have come, and those out who go; returns what time it is, or None while nothing is to do.

        For a scheduler time stands still between an iteration and the next one, and after a rest it goes on with who
        comes first: as in the simulator, which could not decide the same otherwise.
        """
        seats = self.seats
        with self._wake:
            for number in [self._gone.popleft() for _ in range(len(self._gone))]:
                if number in self._sessions:
                    self._cancel(self._sessions[number])
            if self._idle:
                due = [self._come[0].arrival] if self._come else []
                due += [self._timer] if self._timer is not None and self._timer <= self.clock() else []
                if not due:
                    return None
                self._now = max(self._now, min(due))
            while self._come and self._come[0].arrival <= self._now:
                session = self._come.popleft()
                seats.queue.append(session.number)
                seats.requests += 1
                seats.waiting_tokens += len(session.ask.prompt)
                if self.record is not None:
                    self.record.sessions.append(session)
        seats.seat(self._asked)
        return self._now

    def _asked(self, number: int) -> Asked:
        session = self._sessions[number]
        ask = session.ask
        keys = block_keys(ask.prompt, self.engine.block, ask.salt) if self.engine.prefixes else []
        return Asked(session.arrival, len(ask.prompt), ask.limit, ask.ttft, ask.tds, keys)

    def _cancel(self, session: Session) -> None:
        found = np.flatnonzero(self.seats.id == session.number)
        if session in self._come:
            self._come.remove(session)
            self._end(session)
        elif not len(found):
            self.seats.queue.remove(session.number)
            self.seats.requests -= 1
            self._end(session)
        elif self.seats.status[found[0]] == PREFILLING:
            session.over = True  # its scheduler may count on it
        else:
            self._end(session, int(found[0]))

    def _end(self, session: Session, slot: int | None = None) -> None:
        if slot is not None:
            self.seats.leave([slot])
        del self._sessions[session.number]
        session.h = session.away = None
        session.emit(None)

    def _preempt(self, how: Mapping[int, int]) -> None:
        for slot in [slot for slot, way in how.items() if way == SWAP]:
            self._at(slot).away = self.places.get(slot)
        if self.record is not None:
            self.record.preemptions += len(how)
        self.seats.preempt(how)

    def _find(self, slot: int) -> None:
        """Give a session what there is of its prompt."""
        n = int(self.seats.done[slot])
        if not self.seats.preempted[slot]:
            self._at(slot).found(n)
        if ids := self.seats.tables[slot][: n // self.engine.block]:
            self.places.find(slot, ids)

    def _share(self, slot: int, count: int) -> None:
        """Let others have the blocks of a prompt that are now full."""
        seats, block, done = self.seats, self.engine.block, int(self.seats.done[slot])
        first, last = done // block, min((done + count) // block, len(seats.keys[slot]))
        if ids := seats.tables[slot][first:last]:
            self.places.share(slot, ids, first)

    def _decode(self, decode: list[int]) -> dict[int, int]:
        """One token more for each of these."""
        if not decode:
            return {}
        slots = np.array(sorted(decode))
        rows = max(2, 1 << (len(slots) - 1).bit_length())  # XLA would copy the memory for one
        pad = rows - len(slots)
        sessions = [self._at(slot) for slot in slots.tolist()]
        tokens = np.pad([session.tokens[-1] for session in sessions], (0, pad))
        positions, streams = np.pad(self.seats.done[slots], (0, pad)), np.pad(slots, (0, pad), constant_values=1 << 30)
        draw, how = _sampling(sessions, pad)
        said = self.places.step(tokens, positions, streams, draw, how)
        return dict(zip(slots.tolist(), np.asarray(said).tolist()))

    def _prefill(self, slot: int, count: int, low: float, high: float) -> int:
        """Part of a prompt through some layers; returns what follows, if it is all of it and the last of them."""
        session, done, all_layers = self._at(slot), int(self.seats.done[slot]), self.model.config.layers
        layers, asked = range(round(low * all_layers), round(high * all_layers)), session.ask.prompt
        session.h = self.places.fill(slot, asked + session.tokens, len(asked), done, count, layers, session.h)
        if layers.stop < all_layers:
            return -1
        h, session.h = session.h, None
        if done + count < self.seats.prompt[slot]:
            return -1
        return self.places.first(h, count, *_sampling([session], 0))


def _sampling(sessions: list[Session], pad: int) -> tuple[Draw, str]:
    column: Any = lambda f, kind: np.pad(np.array([f(session) for session in sessions], kind), (0, pad))
    draw = Draw(
        column(lambda s: s.ask.temperature, np.float32), column(lambda s: s.ask.top_p, np.float32),
        column(lambda s: s.ask.seed, np.int32), column(lambda s: len(s.tokens), np.int32),
    )  # fmt: skip
    warm = draw.temperature > 0
    return draw, "likeliest" if not warm.any() else "top_p" if (draw.top_p[warm] < 1).any() else "all"
