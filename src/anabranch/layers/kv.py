"""The keys and values that attention remembers, in slots.

A layer's memory takes the queries, keys and values of the next tokens and gives what each token takes from all that it
may see: `extend(q, k, v, positions, rotate)`. It also says at which positions they are: `rotate(x, positions)` turns
queries and keys (RoPE). Here a token stays where it was, and keys are stored turned; `keep/memory.py` has memories that
forget.

    >>> memory = KV.empty(heads=2, size=8, width=4)
    >>> q, kv = jnp.ones((3, 4, 4)), jnp.ones((3, 2, 4))
    >>> o, memory = memory.extend(q, kv, kv, jnp.arange(3), lambda x, positions: x)
    >>> o.shape, float(memory.k.sum())
    ((3, 16), 24.0)
"""

from collections.abc import Callable
from typing import Any, Protocol

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from anabranch.layers.attention import attend, grouped_attention

Rotate = Callable[[Float[Array, "T n D"], Int[Array, "T *axes"]], Float[Array, "T n D"]]


class KV(eqx.Module):
    """The memory of one layer and one stream: the token at position p is in slot p, so that there is room for S."""

    k: Float[Array, "kv S D"]
    v: Float[Array, "kv S D"]

    @classmethod
    def empty(cls, heads: int, size: int, width: int) -> "KV":
        """Room for `size` tokens of `heads` keys and values of `width` numbers."""
        return cls(jnp.zeros((heads, size, width)), jnp.zeros((heads, size, width)))

    def extend(
        self,
        q: Float[Array, "T heads D"],
        k: Float[Array, "T kv D"],
        v: Float[Array, "T kv D"],
        positions: Int[Array, " T"],
        rotate: Rotate,
    ) -> tuple[Float[Array, "T heads*D"], "KV"]:
        """Write T tokens, and attend from each to itself and those before it.

        Positions past the end are not written, and what they attend to is NaN. Slots past a token are never read before
        they are written again, so that to roll back is to go on from an earlier position.
        """
        q, k = rotate(q, positions), rotate(k, positions)
        new = KV(*(old.at[:, positions].set(x.swapaxes(0, 1), mode="drop") for old, x in ((self.k, k), (self.v, v))))
        o = attend(q, new.k, new.v, jnp.arange(new.k.shape[1]) <= positions[:, None])
        return _within(o, positions, new.k), new


class Room(eqx.Module):
    """Makes memories with room for `size` tokens."""

    size: int = eqx.field(static=True)

    def __check_init__(self):
        if self.size < 1:
            raise ValueError(f"size must be at least 1, got {self.size}")

    def empty(self, heads: int, width: int) -> KV:
        return KV.empty(heads, self.size, width)

    def rows(self, n: int, heads: int, width: int) -> "Rows":
        return Rows(*jnp.zeros((2, n, heads, self.size, width)))

    def settle(self, memory: tuple[KV, ...]) -> tuple[KV, ...]:
        return memory

    def settle_rows(self, memory: tuple["Rows", ...], stream: Int[Array, " R"]) -> tuple["Rows", ...]:
        return memory


class Rows(eqx.Module):
    """The memories of one layer and N streams."""

    k: Float[Array, "N kv S D"]
    v: Float[Array, "N kv S D"]

    def extend(
        self,
        q: Float[Array, "R heads D"],
        k: Float[Array, "R kv D"],
        v: Float[Array, "R kv D"],
        positions: Int[Array, " R"],
        rotate: Rotate,
        stream: Int[Array, " R"],
    ) -> tuple[Float[Array, "R heads*D"], "Rows"]:
        """R tokens of some of the streams, also several of one; a stream of N or more is none, and is not written."""
        q, new = rotate(q, positions), self._written(rotate(k, positions), v, positions, stream)
        visible = jnp.arange(new.k.shape[2]) <= positions[:, None]
        one = lambda q, k, v, visible: attend(q[None], k, v, visible[None])[0]
        return _within(jax.vmap(one)(q, new.k[stream], new.v[stream], visible), positions, new.k), new

    def fill(self, *asked: Any, stream: Int[Array, ""]) -> tuple[Float[Array, "T heads*D"], "Rows"]:
        """T tokens of one stream, asked as `KV.extend` is."""
        o, one = KV(self.k[stream], self.v[stream]).extend(*asked)
        return o, Rows(self.k.at[stream].set(one.k), self.v.at[stream].set(one.v))

    def _written(self, k: Array, v: Array, positions: Array, stream: Array) -> "Rows":
        return Rows(*(old.at[stream, :, positions].set(x, mode="drop") for old, x in ((self.k, k), (self.v, v))))


class Grouped(eqx.Module):
    """The memories of one layer and G texts that begin with the same P tokens, which are kept, and read, only once."""

    prefix: KV
    """Of the P tokens that they share: (kv, P, D)."""
    own: Rows
    """Of what follows, for each."""

    def extend(
        self,
        q: Float[Array, "G heads D"],
        k: Float[Array, "G kv D"],
        v: Float[Array, "G kv D"],
        positions: Int[Array, " G"],
        rotate: Rotate,
    ) -> tuple[Float[Array, "G heads*D"], "Grouped"]:
        """One token each; positions count from the beginning of the prefix."""
        G, P = len(q), self.prefix.k.shape[1]
        q, own = rotate(q, positions), self.own._written(rotate(k, positions), v, positions - P, jnp.arange(G))
        turn = lambda memory: (memory.k.swapaxes(-3, -2), memory.v.swapaxes(-3, -2))
        there = jnp.arange(own.k.shape[2]) <= (positions - P)[:, None]
        o = grouped_attention(q, turn(self.prefix), turn(own), there).reshape(G, -1)
        return _within(o, positions - P, own.k), Grouped(self.prefix, own)


def _within(o: Float[Array, "T n"], positions: Int[Array, " T"], k: Float[Array, "*kv S D"]) -> Float[Array, "T n"]:
    """NaN for tokens that found no room."""
    return jnp.where((positions < k.shape[-2])[:, None], o, jnp.nan)


class Keeper(Protocol):
    """Makes the memories of a stream."""

    def empty(self, heads: int, width: int) -> Any:
        """The memory of one layer, of `heads` keys and values of `width` numbers."""
        ...

    def rows(self, n: int, heads: int, width: int) -> Any:
        """The memories of one layer and `n` streams, which extend as `Rows` do."""
        ...

    def settle(self, memory: tuple[Any, ...]) -> tuple[Any, ...]:
        """The memories of all layers after an extension: for what is decided across layers."""
        ...

    def settle_rows(self, memory: tuple[Any, ...], stream: Int[Array, " R"]) -> tuple[Any, ...]:
        """As `settle`, of those streams that were extended; one that is past the last is none."""
        ...
