"""What a scheduler of language models sees and decides, and the engine it does it for.

A scheduler reads nothing but its `View`: no clock, no simulator, no server. So one object is asked by the simulator
(`serving.py`) and by live sessions (`live.py`).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
from jaxtyping import Bool, Float64, Int8, Int64

from anabranch.cell import Policy, State
from anabranch.schedule.cluster import Work

EMPTY, WAITING, PREFILLING, DECODING, SWAPPED, DONE = range(6)
"""What a slot holds: nothing; a request that waits, is being prefilled, decodes, or has been sent to host memory; or
one that is prefilled and waits for another engine."""
SWAP, RECOMPUTE = 1, 2
"""How a request is preempted: its cache goes to host memory, or is dropped and made again."""


def blocks(tokens: Any, block: int, most: int | None) -> Any:
    """Blocks for so many tokens of a request, of which `most` are kept, or all."""
    return -(-(tokens if most is None else np.minimum(tokens, most)) // block)


class View(NamedTuple):
    """What an engine's scheduler sees. Arrays are over slots, in no order; they must not be written to."""

    now: float
    id: Int64[np.ndarray, " N"]
    """Increases in the order of arrival; -1 where the slot is empty."""
    status: Int8[np.ndarray, " N"]
    arrival: Float64[np.ndarray, " N"]
    prompt: Int64[np.ndarray, " N"]
    """Tokens to prefill; after a preemption with those generated so far."""
    done: Int64[np.ndarray, " N"]
    """Tokens in the cache."""
    generated: Int64[np.ndarray, " N"]
    blocks: Int64[np.ndarray, " N"]
    """Those it has; of one that waits, those it would get without taking a free one."""
    first_emit: Float64[np.ndarray, " N"]
    """When the first token came; NaN before."""
    last_emit: Float64[np.ndarray, " N"]
    ttft: Float64[np.ndarray, " N"]
    tds: Float64[np.ndarray, " N"]
    preempted: Int64[np.ndarray, " N"]
    """How often it has been."""
    limit: Int64[np.ndarray, " N"]
    """Tokens it will generate, where the scheduler may know; else -1."""
    free_blocks: int
    block: int
    """Tokens of a block."""
    total_blocks: int
    queued: int
    """Requests for which there is no slot yet."""
    max_tokens: int
    """In an iteration."""
    max_seqs: int
    """Requests in an iteration."""
    hit: Int64[np.ndarray, " N"]
    """As `done`; of one that waits, the tokens of its prompt that it would find in the cache."""
    own: Int64[np.ndarray, " N"]
    """Blocks that nobody else has: those that come free when it goes."""
    worker: str = "both"
    """Whose next iteration it is: `prefill` or `decode` in an engine with two workers."""
    max_kept: int | None = None
    """As the engine's."""

    def need(self, tokens: Any) -> Any:
        """Blocks for so many tokens of a request."""
        return blocks(tokens, self.block, self.max_kept)


class Batch(NamedTuple):
    """What the next iteration does."""

    decode: Bool[np.ndarray, " N"]
    prefill: Int64[np.ndarray, " N"]
    """Tokens of each prompt, after those that the cache holds."""
    preempt: Int8[np.ndarray, " N"] | None = None
    """`SWAP`, `RECOMPUTE`, or 0."""
    layers: tuple[float, float] = (0.0, 1.0)
    """The part of the layers through which prompts go, from and to; a prompt is prefilled after the last of them."""
    timer: float | None = None
    """If there is nothing to do: when to ask again, unless a request comes before."""
    share: float = 1.0
    """The share of the device's units that the iteration may use. Those of two workers may be more than 1 together."""
    keep: Bool[np.ndarray, " N"] | None = None
    """Who waits and is to find what the cache now holds of its prompt: that stays, used or not, until a later batch
    does not say so."""


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
    def decode_steps(self, decode: Int64[np.ndarray, " b"], k: int) -> Float64[np.ndarray, " k"]: ...
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
