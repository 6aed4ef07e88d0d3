"""What a scheduler of language models sees and decides, and the engine it does it for.

A scheduler reads nothing but its `View`: no clock, no simulator, no server. So one object is asked by the simulator
(`serving.py`) and by live sessions (`live.py`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
from jaxtyping import Float64, Int64

from anabranch.cell import Policy, State
from anabranch.schedule.cluster import Work

EMPTY, WAITING, PREFILLING, DECODING, SWAPPED, DONE = range(6)
"""What a slot holds: nothing; a request that waits, is being prefilled, decodes, or has been sent to host memory; or
one that is prefilled and waits for another engine."""
SWAP, RECOMPUTE = 1, 2
"""How a request is preempted: its cache goes to host memory, or is dropped and made again."""


def blocks(tokens: Any, block: int, most: int | None) -> Any:
    """Blocks for so many tokens of a request, of which `most` are kept, or all."""
    if most is not None:
        tokens = min(tokens, most) if isinstance(tokens, int) else np.minimum(tokens, most)
    return -(-tokens // block)


class View:
    """What an engine's scheduler sees. Arrays are over slots, in no order; none of it may be written to."""

    __slots__ = ("_found", "_seats", "now", "worker")

    def __init__(self, now: float, seats: Any, worker: str = "both"):
        """Of `seats.Seats`."""
        self.now, self.worker, self._seats, self._found = now, worker, seats, None

    def of(self, worker: str) -> "View":
        """The same for another worker: `prefill` or `decode`, in an engine with two, whose next iteration it is."""
        return View(self.now, self._seats, worker)

    id = property(lambda self: self._seats.id)
    """Increases in the order of arrival; -1 where the slot is empty."""
    status = property(lambda self: self._seats.status)
    arrival = property(lambda self: self._seats.arrival)
    prompt = property(lambda self: self._seats.prompt)
    """Tokens to prefill; after a preemption with those generated so far."""
    done = property(lambda self: self._seats.done)
    """Tokens in the cache."""
    generated = property(lambda self: self._seats.generated)
    first_emit = property(lambda self: self._seats.first)
    """When the first token came; NaN before."""
    last_emit = property(lambda self: self._seats.last)
    ttft = property(lambda self: self._seats.ttft)
    tds = property(lambda self: self._seats.tds)
    preempted = property(lambda self: self._seats.preempted)
    """How often it has been."""
    limit = property(lambda self: self._seats.limit)
    """Tokens it will generate, where the scheduler may know; else -1."""
    blocks = property(lambda self: self._cached[0])
    """Those it has; of one that waits, those it would get without taking a free one."""
    hit = property(lambda self: self._cached[1])
    """As `done`; of one that waits, the tokens of its prompt that it would find in the cache."""
    own = property(lambda self: self._cached[2])
    """Blocks that nobody else has: those that come free when it goes."""

    decoding = property(lambda self: self._seats.decoding)
    """A list of the slots that decode."""
    growth = property(lambda self: self._seats.growth)
    """Blocks that all of these together need for a token more."""
    prompts = property(lambda self: [*self._seats.begun, *self._seats.waiting])
    """A list of the slots with prompts to prefill, first come first, and before them those that have been begun."""

    free_blocks = property(lambda self: self._seats.free)
    total_blocks = property(lambda self: self._seats.total)
    queued = property(lambda self: len(self._seats.queue))
    """Requests for which there is no slot yet."""
    block = property(lambda self: self._seats.engine.block)
    """Tokens of a block."""
    max_tokens = property(lambda self: self._seats.engine.max_tokens)
    """In an iteration."""
    max_seqs = property(lambda self: self._seats.engine.max_seqs)
    """Requests in an iteration."""

    @property
    def _cached(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        seats = self._seats
        if not seats.index:
            return seats.blocks, seats.done, seats.blocks
        if self._found is None:
            self._found = seats.found()
        return self._found

    def need(self, tokens: Any) -> Any:
        """Blocks for so many tokens of a request."""
        return self._seats.engine.need(tokens)

    def left(self, slot: int) -> tuple[int, int]:
        """Of a prompt: tokens that are still to be prefilled, and blocks that it needs for them."""
        seats = self._seats
        hit, blocks = (self.hit, self.blocks) if seats.index else seats.aside[:2]
        prompt = int(seats.prompt[slot])
        return prompt - int(hit[slot]), seats.engine.need(prompt) - int(blocks[slot])


class Batch(NamedTuple):
    """What the next iteration does."""

    decode: Sequence[int] | Int64[np.ndarray, " a"] = ()
    """Slots."""
    prefill: Mapping[int, int] = {}
    """Tokens of the prompts in these slots, after those that the cache holds."""
    preempt: Mapping[int, int] = {}
    """`SWAP` or `RECOMPUTE` for these slots."""
    layers: tuple[float, float] = (0.0, 1.0)
    """The part of the layers through which prompts go, from and to; a prompt is prefilled after the last of them."""
    timer: float | None = None
    """If there is nothing to do: when to ask again, unless a request comes before."""
    share: float = 1.0
    """The share of the device's units that the iteration may use. Those of two workers may be more than 1 together."""
    keep: Sequence[int] = ()
    """Slots of those who wait and are to find what the cache now holds of their prompts: that stays, used or not, until
    a later batch does not say so."""


class Scheduler(Policy):
    """A scheduler of one or more engines: `act(state, view) -> (state, batch)` for the engine that is free.

    Then `learn(state, view, batch, seconds)` is told how long the iteration took.
    """

    host = True
    steady: ClassVar[bool] = True
    """Whether a decision to only decode stays the same until a request comes, ends, or memory runs out; the simulator
    then runs such iterations at once."""
    oracle: ClassVar[bool] = False
    """Whether it is shown how long answers will be, which no real one is."""
    layered: ClassVar[bool] = False
    """Whether it sends prompts through part of the layers."""

    def init(self, *, key=None) -> State:
        return ()

    def act(self, state: State, x: View) -> tuple[State, Batch]:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise NotImplementedError(f"{type(self).__name__} is abstract: it defines no `act`")

    def learn(self, state: State, x: View, decision: Batch, feedback: float) -> State:  # pyright: ignore
        return state

    def route(self, engines: list["Load"], request: int) -> int:
        """Which engine a new request goes to: the one with fewest."""
        takes = [load for load in engines if load.role != "decode"]
        return min(takes, key=lambda load: (load.requests, load.engine)).engine


class Load(NamedTuple):
    """How busy an engine is."""

    engine: int
    role: str
    requests: int
    tokens: int
    """Of prompts that are not prefilled."""
    free_blocks: int


class Cost(Protocol):
    """What an iteration takes."""

    @property
    def kv_bytes(self) -> int: ...
    @property
    def kv_tokens(self) -> int: ...
    def iteration(self, work: Work) -> float: ...
    def decode_steps(self, work: Work, k: int) -> Float64[np.ndarray, " k"]: ...
    def weight_bytes(self, work: Work) -> float: ...
    def traffic(self, work: Work) -> float: ...


@dataclass(frozen=True)
class Engine:
    """One replica of the model.

    Raises:
        ValueError: if its memory holds no block, or a size is not positive.
    """

    cost: Cost
    kv_tokens: int | None = None
    """By default what the cost says fits."""
    block: int = 16
    max_tokens: int = 8192
    max_seqs: int = 256
    role: str = "both"
    """`prefill` engines hand requests on to `decode` engines after their first token."""
    link: float = 300e9
    """Bytes a second to other engines."""
    host: float = 25e9
    """Bytes a second to host memory."""
    devices: int = 1
    workers: int = 1
    """With 2, prompts and decodes have loops of their own, on one device, one copy of the weights and one cache."""
    prefixes: bool = False
    """Whether requests share the blocks in which their prompts begin alike. Those that nobody uses stay in memory until
    there is no other room, the least recently used go first; they count as free."""
    max_kept: int | None = None
    """Tokens of a request that are in the cache at most, where what attention remembers is bounded; by default all."""

    def __post_init__(self):
        if self.workers not in (1, 2):
            raise ValueError(f"workers must be 1 or 2, got {self.workers}")
        if self.workers == 2 and self.role != "both":
            raise ValueError(f"an engine of two workers has the role 'both', got {self.role!r}")
        if self.role not in ("both", "prefill", "decode"):
            raise ValueError(f"role must be 'both', 'prefill' or 'decode', got {self.role!r}")
        for name in ("block", "max_tokens", "max_seqs", "link", "host", "devices"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.blocks < 1:
            raise ValueError(f"kv_tokens must hold a block of {self.block}, got {self.tokens}")

    @cached_property
    def tokens(self) -> int:
        return self.cost.kv_tokens if self.kv_tokens is None else self.kv_tokens

    @cached_property
    def blocks(self) -> int:
        return self.tokens // self.block

    def need(self, tokens: Any) -> Any:
        """Blocks for so many tokens of a request."""
        return blocks(tokens, self.block, self.max_kept)
