"""What attention remembers when it cannot remember everything: memories of a fixed size, and what they keep.

A `Keep` is a policy: it says which tokens stay when the memory of a layer is full. `Decoder(model, keep=H2O(256))`
lives on a stream without end in bounded memory.

    >>> keep = Sinks(budget=6, sinks=2, room=2)
    >>> memory = keep.empty(heads=1, width=4)
    >>> for t in range(10):
    ...     x = jnp.ones((2, 1, 4))
    ...     o, memory = memory.extend(x, x, x, 2 * t + jnp.arange(2), lambda x, positions: x)
    >>> memory.position[0].tolist()  # the first two, and the last ones
    [0, 1, 14, 15, 16, 17, 18, 19]

Keys are stored unturned. Where `compact`, tokens that are kept close ranks: what is remembered is turned as a text of
that length, so that positions never exceed the size of the memory, whatever the length of the stream (as attention
sinks do); else a token keeps the position that it came at.

Of the policies here `Window` and `Sinks` look at positions only, `KeyNorm` and `ValueNorm` at what is stored, and the
others at how much attention a token got: for that, an extension adds up the attention of its queries.
"""

from dataclasses import replace
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from anabranch.branch import branch
from anabranch.cell import noise
from anabranch.layers.kv import Rotate


class Held(eqx.Module):
    """The memory of one layer and one stream: in each head the tokens that are kept are in front, oldest first."""

    k: Float[Array, "kv S D"]
    v: Float[Array, "kv S D"]
    position: Int[Array, "kv S"]
    """Where in the text each token was; -1 where the slot is empty. In a video, when: tokens of a frame share it."""
    mass: Float[Array, "kv S"]
    """The attention that it got from all queries so far."""
    last: Float[Array, "kv S"]
    """The attention that it got from those of the last extension."""
    seen: Float[Array, "kv S"]
    """How many queries could see it."""
    budget: Int[Array, ""]
    """Tokens that stay when there is no room left."""
    own: Any
    """What else the policy remembers of this layer."""
    keep: "Keep"
    place: Int[Array, "kv S axes"] | None = None
    """In a video, where in the frame each token was."""

    @property
    def live(self) -> Int[Array, " kv"]:
        """Tokens in each head."""
        return (self.position >= 0).sum(-1).astype(jnp.int32)

    def extend(
        self,
        q: Float[Array, "T heads D"],
        k: Float[Array, "T kv D"],
        v: Float[Array, "T kv D"],
        positions: Int[Array, "T *axes"],
        rotate: Rotate,
    ) -> tuple[Float[Array, "T heads*D"], "Held"]:
        """Make room if there is none, write T tokens, and attend from each to what is kept and those before it.

        In a video, positions are (time, place). A token whose position is -1 is none, and must come after all others.

        Raises:
            ValueError: if T tokens never have room.
        """
        (T, heads, D), (kv, S) = q.shape, self.position.shape
        if T > self.keep.room:
            raise ValueError(f"a memory with room={self.keep.room} beside its budget takes no {T} tokens at once")
        full = self.live + T > self.budget + self.keep.room
        old = branch(full.any(), Held.compressed, lambda held: held, self)
        begin = old.live
        head, slot = jnp.arange(kv)[:, None], begin[:, None] + jnp.arange(T)
        put = lambda array, x: array.at[head, slot].set(x)
        zero = jnp.zeros((kv, T))
        time, place = positions, None
        if old.place is not None:
            time, place = positions[:, 0], put(old.place, positions[None, :, 1:])
        new = replace(
            old, k=put(old.k, k.swapaxes(0, 1)), v=put(old.v, v.swapaxes(0, 1)), mass=put(old.mass, zero), place=place,
            position=put(old.position, time[None]), last=put(old.last, zero), seen=put(old.seen, zero),
        )  # fmt: skip
        turned, asked = new._turned(q.reshape(T, kv, -1, D), slot, rotate)
        score = jnp.einsum("ktgd,ksd->ktgs", asked, turned) * D**-0.5
        visible = jnp.arange(S) <= slot[..., None]  # (kv, T, S): tokens are in the order of their slots
        share = jax.nn.softmax(jnp.where(visible[:, :, None], score, -jnp.inf))
        o = jnp.einsum("ktgs,ksd->tkgd", share, new.v).reshape(T, heads * D)
        if not self.keep.watches:
            return o, new
        got = share.sum((1, 2))
        new = replace(new, mass=new.mass + got, last=got, seen=new.seen + visible.sum(1))
        return o, self.keep.watch(new, share)

    def _turned(
        self, q: Float[Array, "T kv g D"], slot: Int[Array, "kv T"], rotate: Rotate
    ) -> tuple[Float[Array, "kv S D"], Float[Array, "kv T g D"]]:
        """Keys and queries, turned to where they stand."""
        if self.keep.compact and self.place is None:
            keys = rotate(self.k.swapaxes(0, 1), jnp.arange(self.k.shape[1])).swapaxes(0, 1)
            return keys, jax.vmap(rotate)(q.swapaxes(0, 1), slot)
        at = self.position
        if self.keep.compact:  # tokens of one time stand at one rank
            at = jnp.cumsum(jnp.diff(at, prepend=at[:, :1]) != 0, 1)
        if self.place is not None:
            at = jnp.concatenate([at[..., None], self.place], -1)
        keys = jax.vmap(lambda k, at: rotate(k[:, None], at)[:, 0])(self.k, at)
        return keys, jax.vmap(lambda q, at, slot: rotate(q, at[slot]))(q.swapaxes(0, 1), at, slot)

    def compressed(self) -> "Held":
        """With the `budget` tokens of each head that the policy keeps."""
        there, protected = self.position >= 0, self.keep.protect(self)
        (_, S), most = there.shape, self.keep.most
        rank = jnp.where(there, jnp.where(protected, jnp.inf, self.keep.score(self)), -jnp.inf)
        # The newer of equals stays; those that stay keep their order. Slot S is none: there the budget is exhausted.
        best = jnp.flip(jnp.argsort(rank, axis=-1, stable=True), -1)[:, :most]
        stay = jnp.sort(jnp.where(jnp.arange(most) < self.budget, best, S), axis=-1)

        def kept(array: Array, fill: float) -> Array:
            wide = [(0, 0)] * (array.ndim - 2)
            some = jnp.take_along_axis(array, stay.reshape(*stay.shape, *[1] * len(wide)), 1, "fill", fill)
            return jnp.pad(some, ((0, 0), (0, S - most), *wide), constant_values=fill)

        new = replace(
            self, k=kept(self.k, 0), v=kept(self.v, 0), position=kept(self.position, -1),
            mass=kept(self.mass, 0), last=kept(self.last, 0), seen=kept(self.seen, 0),
            place=None if self.place is None else kept(self.place, 0),
        )  # fmt: skip
        return self.keep.after(self, stay, new)


class HeldRows(eqx.Module):
    """The memories of one layer and N streams, which forget each for itself."""

    held: Held
    """Every array with a leading axis, the stream."""

    def extend(
        self,
        q: Float[Array, "R heads D"],
        k: Float[Array, "R kv D"],
        v: Float[Array, "R kv D"],
        positions: Int[Array, " R"],
        rotate: Rotate,
        stream: Int[Array, " R"],
    ) -> tuple[Float[Array, "R heads*D"], "HeldRows"]:
        """A token each of R different streams; a stream of N or more is none, and is not written."""
        one = lambda held, q, k, v, at: held.extend(q[None], k[None], v[None], at[None], rotate)
        # Who is none reads what the first one does: then it forgets only when somebody does.
        read = jnp.where(stream < len(self.held.budget), stream, stream[0])
        o, new = jax.vmap(one)(jax.tree.map(lambda x: x[read], self.held), q, k, v, positions)
        return o[:, 0], HeldRows(jax.tree.map(lambda x, y: x.at[stream].set(y, mode="drop"), self.held, new))

    def fill(self, *asked: Any, stream: Int[Array, ""]) -> tuple[Float[Array, "T heads*D"], "HeldRows"]:
        """T tokens of one stream, asked as `Held.extend` is."""
        o, new = jax.tree.map(lambda x: x[stream], self.held).extend(*asked)
        return o, HeldRows(jax.tree.map(lambda x, y: x.at[stream].set(y), self.held, new))


def pieces(n: int, room: int) -> list[int]:
    """How n tokens are read, of which `room` may come at once: in pieces of few sizes, so that little is compiled.

    When something is forgotten depends on them: whoever reads a text in the same pieces remembers the same.

    >>> pieces(150, room=64)
    [64, 64, 8, 8, 1, 1, 1, 1, 1, 1]
    """
    whole, rest = divmod(n, room)
    return [room] * whole + [8] * (rest // 8) + [1] * (rest % 8)


class Keep(eqx.Module):
    """Which tokens a memory keeps: subclasses give `score`, and what they `protect`.

    Args:
        budget: tokens that stay when there is no room left.
        room: slots beside that, for what comes; as many tokens can come at once. The more, the less often is chosen.
        compact: whether tokens that stay close ranks.

    Raises:
        ValueError: if budget or room is not positive.
    """

    watches: ClassVar[bool] = True
    """Whether it looks at attention, which has to be added up for it."""

    budget: int = eqx.field(static=True)
    room: int = eqx.field(static=True, default=64, kw_only=True)
    compact: bool = eqx.field(static=True, default=True, kw_only=True)

    def __check_init__(self):
        for name in ("budget", "room"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def most(self) -> int:
        """The largest budget that a layer can have; its memory has `room` slots more."""
        return self.budget

    def empty(self, heads: int, width: int, places: int = 0) -> Held:
        """A memory of `heads` keys and values of `width` numbers; in a video, of tokens with that many `places`."""
        shape = heads, self.most + self.room
        mass, last, seen = (jnp.zeros(shape) for _ in range(3))  # not the same array, which could not be donated
        k, v = (jnp.zeros((*shape, width)) for _ in range(2))
        position, budget = jnp.full(shape, -1, jnp.int32), jnp.int32(self.budget)
        place = jnp.zeros((*shape, places), jnp.int32) if places else None
        return Held(k, v, position, mass, last, seen, budget, self.begin(heads), self, place)

    def rows(self, n: int, heads: int, width: int) -> HeldRows:
        """The memories of n streams."""
        return HeldRows(jax.tree.map(lambda x: jnp.repeat(x[None], n, 0), self.empty(heads, width)))

    def begin(self, heads: int) -> Any:
        """What the policy remembers of a layer beside what is kept: `Held.own`."""
        return None

    def score(self, held: Held) -> Float[Array, "kv S"]:
        """What each token is worth: the largest stay."""
        raise NotImplementedError(f"{type(self).__name__} is abstract: it defines no `score`")

    def protect(self, held: Held) -> Bool[Array, "kv S"]:
        """Which tokens stay whatever they are worth."""
        return jnp.zeros(held.position.shape, bool)

    def watch(self, held: Held, share: Float[Array, "kv T g S"]) -> Held:
        """What the policy remembers of the attention that T queries of g heads for each key head gave."""
        return held

    def after(self, old: Held, stay: Int[Array, "kv most"], new: Held) -> Held:
        """What becomes of `new`, which has kept the slots `stay` of `old`; as many as there are slots are none."""
        return new

    def settle(self, memory: tuple[Held, ...]) -> tuple[Held, ...]:
        """The memories of all layers, after each extension: for what is decided across layers."""
        return memory

    def settle_rows(self, memory: tuple[HeldRows, ...], stream: Int[Array, " R"]) -> tuple[HeldRows, ...]:
        """As `settle`, of those streams that were extended."""
        if not self.settles:
            return memory
        there = jnp.zeros(len(memory[0].held.budget), bool).at[stream].set(True, mode="drop")
        new = jax.vmap(self.settle)(tuple(rows.held for rows in memory))
        # What `settle` leaves alone is the same array on both sides: XLA copies nothing.
        some = lambda x, y: jnp.where(there.reshape(-1, *[1] * (x.ndim - 1)), y, x)
        return tuple(HeldRows(jax.tree.map(some, rows.held, held)) for rows, held in zip(memory, new, strict=True))

    @property
    def settles(self) -> bool:
        """Whether something is decided across layers."""
        return type(self).settle is not Keep.settle

    def recent(self, held: Held, n: int | Int[Array, ""]) -> Bool[Array, "kv S"]:
        """The last n tokens."""
        return jnp.arange(held.position.shape[1]) >= held.live[:, None] - n


class Window(Keep):
    """The last tokens."""

    watches: ClassVar[bool] = False

    def score(self, held):
        return held.position.astype(jnp.float32)


class Sinks(Window):
    """The first tokens and the last ones (Xiao et al., "Efficient Streaming Language Models with Attention Sinks")."""

    sinks: int = eqx.field(static=True, default=4)

    def protect(self, held):
        return held.position < self.sinks


class H2O(Keep):
    """Those with most attention from all queries so far, and the last ones (Zhang et al., "H2O: Heavy-Hitter Oracle").

    With `fair`, attention for each query that could see a token: else the old ones have had more time to gather it.
    """

    last: int = eqx.field(static=True, default=32)
    fair: bool = eqx.field(static=True, default=False)

    def score(self, held):
        return held.mass / jnp.maximum(held.seen, 1.0) if self.fair else held.mass

    def protect(self, held):
        return self.recent(held, self.last)


class SnapKV(Keep):
    """Those with most attention from the last tokens that came together, and these (Li et al., "SnapKV").

    Attention is averaged over `pool` neighbours, so that what stands beside something important stays with it. Where
    tokens come one by one, this is TOVA of Oren et al. but for the pooling.
    """

    window: int = eqx.field(static=True, default=32)
    pool: int = eqx.field(static=True, default=5)

    def score(self, held):
        half = self.pool // 2
        before = jnp.where(self.recent(held, self.window), 0.0, held.last)  # those that stay anyway lend nothing
        padded = jnp.pad(before, ((0, 0), (half, half)))
        size = held.last.shape[1]
        return jnp.stack([padded[:, i : i + size] for i in range(2 * half + 1)]).mean(0)

    def protect(self, held):
        return self.recent(held, self.window)


class KeyNorm(Keep):
    """Those with the shortest keys (Devoto et al., "A Simple and Effective L2 Norm-Based Strategy")."""

    watches: ClassVar[bool] = False

    def score(self, held):
        return -jnp.linalg.norm(held.k, axis=-1)


class ValueNorm(Keep):
    """Those with the longest values."""

    watches: ClassVar[bool] = False

    def score(self, held):
        return jnp.linalg.norm(held.v, axis=-1)


class Random(Keep):
    """Some, drawn when they come: a sample of all that has been."""

    watches: ClassVar[bool] = False

    def score(self, held):
        key = jax.random.PRNGKey(0)
        draw = lambda position: jax.random.uniform(noise(key, position, "keep"))
        return jax.vmap(jax.vmap(draw))(held.position)
