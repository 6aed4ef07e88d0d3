"""InfiniPot-V: Memory-Constrained KV Cache Compression for Streaming Video Understanding (NeurIPS 2025).

The stream is a video of frames of P tokens, the state what attention remembers of it (`keep.memory`). Whenever the
memory is full, it is cut to `budget` tokens, in each layer and head, without looking at attention or at a question:

*TaR*, redundancy along time, gives `tar` of the budget to the newest frames as a whole, and to those older tokens whose
keys resemble least those of the newest frames at the same place: what has changed since.

*VaN*, the norm of values, gives the rest to those with the longest values. With `pool`, norms are first averaged over
neighbours: in the first quarter of the layers in time, height and width, in the second within a frame, in the third
along the sequence, in the last not at all.

    >>> keep = InfiniPotV(budget=6, grid=(1, 2), tar=1.0, room=2)
    >>> memory = keep.empty(heads=1, width=2, places=2)
    >>> left, right = jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])
    >>> places = jnp.array([[1, 1], [1, 2]])
    >>> for t in range(7):  # what is to the right is different in frame 1
    ...     x = jnp.stack([left, left if t == 1 else right])[:, None]
    ...     at = jnp.concatenate([jnp.full((2, 1), t), places], 1)
    ...     o, memory = memory.extend(x, x, x, at, lambda x, positions: x)
    >>> memory.position[0].tolist(), memory.place[0, :, 1].tolist()
    ([1, 3, 4, 4, 5, 5, 6, 6], [2, 2, 1, 2, 1, 2, 1, 2])

Where this differs from the authors' code (aiha-lab/InfiniPot-V): keys are compared as they are before RoPE turns them,
since turned ones resemble each other less the more time is between them, even where nothing moves (`keys`). Tokens are
compared with those that truly were at their place, where the code takes what is left after the first compression for
whole frames again; `exact=False` does as the code. Of equals the newest stay. Text is kept before all else, wherever it
is, and counted in the budget; in the code only the system prompt is, and not counted. Pooling takes the mean of the
neighbours that are there; `exact=False` counts the others as zeros, as the code does. Ticks close ranks after each
compression (`Keep.compact`), where the code knows the whole clip and keeps positions as they were.
"""

from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from anabranch.keep.memory import Held, Keep

WINDOWS = 3, 5, 7
"""How many neighbours are averaged along each axis where norms are pooled along 1, 2 or 3 axes."""


class Grid(NamedTuple):
    """Where the slots of a memory are in a video of frames that lie one after another."""

    vision: Bool[Array, "kv S"]
    """Whether a slot is a token of a frame: not empty, nor text."""
    frame: Int[Array, "kv S"]
    """Of those that are remembered, from 0."""
    place: Int[Array, "kv S"]
    """In the frame, row by row."""

    def last(self, n: Int[Array, " kv"]) -> Bool[Array, "kv S"]:
        """The tokens of the last n frames."""
        return self.vision & (self.frame > jnp.max(self.frame, -1, where=self.vision, initial=-1)[:, None] - n[:, None])


class InfiniPotV(Keep):
    """The newest frames, what was different at its place, and tokens with long values.

    Args:
        budget: tokens that stay.
        grid: rows and columns of tokens in a frame; places count from 1, and (0, 0) is that of text.
        tar: the part of the budget that goes by redundancy along time.
        query: the part of the frames that are remembered which are the newest ones, with which others are compared.
        pool: whether norms of values are averaged over neighbours.
        exact: whether a token is compared with those at its true place, or as the authors' code does.

    Raises:
        ValueError: if a part is not in 0..1, the grid is none, or the newest frames are none, or more than `tar` gives.
    """

    watches = False

    grid: tuple[int, int] = eqx.field(static=True, default=(4, 4), kw_only=True)
    tar: float = eqx.field(static=True, default=0.5, kw_only=True)
    query: float = eqx.field(static=True, default=0.25, kw_only=True)
    pool: bool = eqx.field(static=True, default=False, kw_only=True)
    exact: bool = eqx.field(static=True, default=True, kw_only=True)

    def __check_init__(self):
        for name in ("tar", "query"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in 0..1, got {getattr(self, name)}")
        if min(self.grid) < 1:
            raise ValueError(f"grid must be rows and columns of at least 1, got {self.grid}")
        newest, most = int(self.query * self.frames) * self.places, self.budget - round((1 - self.tar) * self.budget)
        if self.tar and not 0 < newest <= most:
            raise ValueError(
                f"query must make 1 to {most} tokens the newest of {self.frames} frames, got {self.query}: {newest}"
            )

    @property
    def places(self) -> int:
        """Tokens of a frame."""
        return self.grid[0] * self.grid[1]

    @property
    def frames(self) -> int:
        """Whole frames for which there is room."""
        return (self.budget + self.room) // self.places

    def begin(self, heads):
        return jnp.int32(0)  # the axes along which this layer pools

    def settle(self, memory):
        if not self.pool:
            return memory
        axes = [3 - 4 * i // len(memory) for i in range(len(memory))]
        return tuple(eqx.tree_at(lambda m: m.own, m, jnp.int32(n)) for m, n in zip(memory, axes, strict=True))

    def where(self, held: Held) -> Grid:
        """Where slots are: by their own place and tick, or as if all that is left were whole frames."""
        there = held.position >= 0
        if held.place is None:
            raise ValueError("InfiniPotV keeps videos, whose tokens have places: the memory was made with places=0")
        vision = there & (held.place > 0).all(-1)
        if self.exact:
            new = jnp.diff(held.position, prepend=-1, axis=-1) != 0
            row, column = held.place[..., 0] - 1, held.place[..., 1] - 1
            return Grid(vision, jnp.cumsum(new & vision, -1) - 1, row * self.grid[1] + column)
        frame, place = jnp.divmod(jnp.cumsum(vision, -1) - 1, self.places)
        return Grid(vision, frame, place)

    def keys(self, held: Held) -> Float[Array, "kv S D"]:
        """What is compared."""
        return held.k

    def protect(self, held):
        at = self.where(held)
        text = (held.position >= 0) & ~at.vision
        if not self.tar:
            return text
        seen = at.vision.sum(-1) // self.places
        newest = at.last(jnp.floor(self.query * seen).astype(jnp.int32))
        different = jnp.where(at.vision & ~newest, tar_score(self.keys(held), at, newest, self.places), -jnp.inf)
        best = jnp.flip(jnp.argsort(different, -1, stable=True), -1)  # of equals the newest first
        budget = held.budget - text.sum(-1)
        n = budget - jnp.round((1 - self.tar) * budget).astype(jnp.int32) - newest.sum(-1)
        return text | newest | (at.vision & (jnp.argsort(best, -1) < n[:, None]))

    def score(self, held):
        norm = jnp.linalg.norm(held.v, axis=-1)
        return van_score(norm, self.where(held), self.grid, self.frames, self.exact, held.own) if self.pool else norm


def tar_score(k: Float[Array, "kv S D"], at: Grid, newest: Bool[Array, "kv S"], places: int) -> Float[Array, "kv S"]:
    """How little each key resembles those of the newest frames at its place: the mean of their cosines, negative.

    0 where none of the newest is at that place.
    """
    unit = k / (jnp.linalg.norm(k, axis=-1, keepdims=True) + 1e-9)
    here = (at.place[..., None] == jnp.arange(places)).astype(k.dtype)  # (kv, S, P)
    now = jnp.einsum("ksp,ksd->kpd", here * newest[..., None], unit)
    number = jnp.maximum((here * newest[..., None]).sum(1), 1.0)
    return -jnp.einsum("ksp,ksd,kpd->ks", here, unit, now / number[..., None])


def van_score(
    norm: Float[Array, "kv S"],
    at: Grid,
    grid: tuple[int, int],
    frames: int,
    exact: bool,
    axes: Int[Array, ""],
) -> Float[Array, "kv S"]:
    """The norms of values, averaged over neighbours along the last of the axes time, height and width.

    Along one axis, neighbours are those in the order of the slots. In a small grid windows shrink to the largest odd
    number that fits into time, height and width alike.
    """
    kv, S = norm.shape
    head, order = jnp.arange(kv)[:, None], jnp.cumsum(at.vision, -1) - 1

    def pooled(n: int) -> Array:
        where, sizes, width = (order,), (S,), WINDOWS[n - 1]
        if n > 1:
            where, sizes = (at.frame, *jnp.divmod(at.place, grid[1])), (S, *grid)
            width = min(width, frames, *grid)
            width -= width % 2 == 0
        # Slots that are no tokens of a frame are out of bounds, and dropped.
        to = (head, jnp.where(at.vision, where[0], S), *where[1:])
        window = (1,) * (1 + len(sizes) - n) + (width,) * n
        around = lambda x: lax.reduce_window(
            jnp.zeros((kv, *sizes)).at[to].set(x, mode="drop"), 0.0, lax.add, window, (1,) * len(window), "SAME"
        )
        number = around(jnp.ones_like(norm)) if exact else float(width**n)
        return (around(norm) / number)[(head, *where)]

    return jnp.select([axes == n for n in range(4)], [norm, *(pooled(n) for n in (1, 2, 3))])
