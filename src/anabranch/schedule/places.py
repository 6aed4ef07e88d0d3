"""Where live sessions have their memories: a place each, all of one size, in arrays that are updated in place.

`Places` keep all of a session, which ends when its place is taken; `Forgetful` ones only what a policy of
`anabranch.keep` keeps, so that a session has no end. Either takes parts of prompts through some of the layers, and a
token each of many sessions in one compiled call.

A memory that forgets depends on how many tokens came at once. So that an answer does not depend on who else is served,
a prompt is read in the pieces of `keep.memory.pieces`, whatever the scheduler says: what it lets through beyond the end
of a piece is read with the rest of that piece.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int64

from anabranch.decode.base import Draw, sample
from anabranch.keep.memory import Keep, pieces
from anabranch.layers.kv import Rows
from anabranch.models.llama import LENGTHS, Decoder, Layer, filled


class Places:
    """Memories of n sessions that keep everything."""

    endless = together = False
    """Whether a session may go on when it holds as many tokens as it may; whether layers must be filled together."""

    def __init__(self, model: Decoder, n: int):
        config = model.config
        self.model = model
        self.memory = tuple(model.keep.rows(n, config.kv_heads, config.head_width) for _ in model.layers)
        self.token_bytes = sum(x.nbytes for x in jax.tree.leaves(self.memory)) // (n * self.most)

    @property
    def most(self) -> int:
        """Tokens that a session holds at most."""
        return self.model.size

    def open_pool(self, blocks: int, block: int) -> None:
        """Keep so many blocks of prompts, beside the sessions, for others that begin alike."""
        config, self.block = self.model.config, block
        empty = lambda: Rows(*jnp.zeros((2, blocks, config.kv_heads, block, config.head_width)))
        self.pool = tuple(empty() for _ in self.model.layers)

    def begin(self, slot: int) -> None:
        """See that nothing is left of who had this place before: here, that is never looked at."""

    def step(
        self, tokens: np.ndarray, positions: np.ndarray, streams: Int64[np.ndarray, " R"], draw: Draw, how: str
    ) -> Array:
        """A token each of some sessions; what follows it. A place that is none is not written."""
        self.memory, said = _step(self.model, self.memory, tokens, positions, streams, draw, how=how)
        return said

    def fill(self, slot: int, text: list[int], prompt: int, done: int, count: int, layers: range, h: Any) -> Any:
        """Tokens of a text, after those that are done, through some of the layers.

        Arguments:
            text: what the session is to read: its prompt, and after it what has been said already.
            prompt: tokens of the former.
            h: what came out of the layers before these.
        """
        if layers.start == 0:
            h = self.model.embedding[np.pad(text[done : done + count], (0, filled(count) - count))]
        return self._through(slot, h, done, layers)

    def first(self, h: Any, count: int, draw: Draw, how: str) -> int:
        """The token that follows, once `count` tokens are through all layers."""
        return int(_first(self.model, h, count - 1, draw, how=how)[0])

    def get(self, slot: int) -> Any:
        """All that is remembered of a session, in host memory."""
        return jax.device_get(_get(self.memory, slot))

    def put(self, slot: int, away: Any) -> None:
        """Bring it back, to any place."""
        self.memory = _put(self.memory, slot, away)

    def find(self, slot: int, ids: list[int]) -> None:
        """Begin a session with shared blocks."""
        self.memory = _load(self.memory, self.pool, _padded(ids, self._blocks), slot)

    def share(self, slot: int, ids: list[int], first: int) -> None:
        """Let others have the blocks of a session from its `first` on, under these numbers."""
        self.pool = _save(self.pool, self.memory, _padded(ids, self._blocks), slot, first)

    def lengths(self, most: int) -> list[int]:
        """In how many tokens prompts are read, if an iteration takes so many at most."""
        most = min(self.model.size, most)
        return [*(length for length in LENGTHS if length < most), filled(most)]

    def warm_fill(self, length: int, hows: tuple[str, ...], draw: Draw) -> None:
        """Compile what takes a prompt of so many tokens."""
        h = self._through(0, jnp.zeros((length, self.model.config.width)), 0, range(1))
        for how in hows:
            _first(self.model, h, 0, draw, how=how)

    def warm_blocks(self) -> None:
        """Compile what shares blocks."""
        for count in sorted({_filled(n, self._blocks) for n in range(1, self._blocks + 1)}):
            ids = np.full(count, 1 << 30)
            self.pool = _save(self.pool, self.memory, ids, 0, 0)
            self.memory = _load(self.memory, self.pool, ids, 0)

    def _through(self, slot: int, h: Float[Array, "T d"], start: int, layers: range) -> Float[Array, "T d"]:
        memory = list(self.memory)
        for i in layers:
            h, memory[i] = _layer(self.model.layers[i], memory[i], h, slot, start)
        self.memory = tuple(memory)
        return h

    @property
    def _blocks(self) -> int:
        """In a place."""
        return self.model.size // self.block


class Forgetful(Places):
    """Memories that forget."""

    endless = True

    def __init__(self, model: Decoder, n: int):
        super().__init__(model, n)
        self.empty = _get(self.memory, 0)

    @property
    def keep(self) -> Keep:
        assert isinstance(self.model.keep, Keep)
        return self.model.keep

    @property
    def most(self) -> int:
        return self.keep.most + self.keep.room

    @property
    def together(self) -> bool:
        return self.keep.settles

    def open_pool(self, blocks: int, block: int) -> None:
        """There is none.

        Raises:
            ValueError: always.
        """
        kind = type(self.keep).__name__
        raise ValueError(f"prefixes: what prompts share is kept whole, and {kind} forgets parts of it")

    def begin(self, slot: int) -> None:
        self.memory = _put(self.memory, slot, self.empty)

    def fill(self, slot: int, text: list[int], prompt: int, done: int, count: int, layers: range, h: Any) -> Any:
        # What was said came token by token, and is read so if it has to be read again.
        sizes = np.array([*pieces(prompt, self.keep.room), *[1] * (len(text) - prompt)])
        ends = sizes.cumsum()
        due = (ends > done) & (ends <= done + count)
        ends, out = ends[due], []
        for i, (begin, end) in enumerate(zip(ends - sizes[due], ends)):
            piece = h[i] if layers.start else self.model.embedding[np.array(text[begin:end])]
            out.append(self._through(slot, piece, int(begin), layers))
            self._settle(slot)
        return out

    def first(self, h: Any, count: int, draw: Draw, how: str) -> int:
        return super().first(h[-1], len(h[-1]), draw, how)

    def lengths(self, most: int) -> list[int]:
        return sorted({size for size in (1, 8, self.keep.room) if size <= self.keep.room})

    def warm_fill(self, length: int, hows: tuple[str, ...], draw: Draw) -> None:
        self.begin(0)
        super().warm_fill(length, hows, draw)
        self._settle(0)

    def _settle(self, slot: int) -> None:
        if self.keep.settles:
            self.memory = _settle(self.keep, self.memory, slot)


# What runs on the device


@partial(jax.jit, donate_argnums=1, static_argnames="how")
def _step(model: Decoder, memory, tokens, positions, streams, draw: Draw, how: str):
    memory, logits = model.rows(memory, tokens, positions, streams)
    return memory, sample(logits, draw, how)


@partial(jax.jit, donate_argnums=1)
def _layer(layer: Layer, memory, h, stream, start):
    positions = start + jnp.arange(len(h))
    return layer(h, positions, lambda *asked: memory.fill(*asked, stream=stream))


@partial(jax.jit, donate_argnums=1)
def _settle(keep: Keep, memory, stream):
    return keep.settle_rows(memory, jnp.asarray(stream)[None])


@partial(jax.jit, static_argnames="how")
def _first(model: Decoder, h, at, draw: Draw, how: str):
    return sample(model.logits(h[at][None]), draw, how)


@jax.jit
def _get(memory, stream):
    return jax.tree.map(lambda x: x[stream], memory)


@partial(jax.jit, donate_argnums=0)
def _put(memory, stream, away):
    return jax.tree.map(lambda x, y: x.at[stream].set(y), memory, away)


@partial(jax.jit, donate_argnums=0)
def _load(memory, pool, ids, stream):
    """Copy blocks into a slot, from its beginning. Numbers that are no blocks leave zeros, where nothing is yet."""

    def put(x, blocks):
        _, kv, _, D = x.shape
        some = blocks.at[ids].get(mode="fill", fill_value=0).swapaxes(0, 1).reshape(1, kv, -1, D)
        return jax.lax.dynamic_update_slice(x, some, (stream, 0, 0, 0))

    return jax.tree.map(put, memory, pool)


@partial(jax.jit, donate_argnums=0)
def _save(pool, memory, ids, stream, first):
    """Copy blocks out of a slot, from its `first` on."""

    def put(blocks, x):
        size = blocks.shape[2]
        slots = first * size + jnp.arange(len(ids) * size)
        some = x[stream].at[:, slots].get(mode="clip")
        return blocks.at[ids].set(some.reshape(len(some), len(ids), size, -1).swapaxes(0, 1), mode="drop")

    return jax.tree.map(put, pool, memory)


def _filled(n: int, most: int) -> int:
    return min(1 << (n - 1).bit_length(), most)


def _padded(ids: list[int], most: int) -> np.ndarray:
    """With numbers that are no blocks up to a length of which there are few."""
    return np.pad(ids, (0, _filled(len(ids), most) - len(ids)), constant_values=1 << 30)
