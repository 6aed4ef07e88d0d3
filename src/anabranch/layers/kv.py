"""The keys and values that attention remembers, in slots.

A layer's memory takes the queries, keys and values of the next tokens and gives what each token takes from all that it
may see. Keys are stored rotated (RoPE) by their position; to move one, rotate it by the difference.

    >>> memory = KV.empty(heads=2, size=8, width=4)
    >>> q, kv = jnp.ones((3, 4, 4)), jnp.ones((3, 2, 4))
    >>> o, memory = memory.extend(q, kv, kv, jnp.arange(3))
    >>> o.shape, float(memory.k.sum())
    ((3, 16), 24.0)
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from anabranch.layers.attention import attend, grouped_attention


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
    ) -> tuple[Float[Array, "T heads*D"], "KV"]:
        """Write T tokens, and attend from each to itself and those before it. Positions past the end are not written.

        Slots past a token are never read before they are written again, so that to roll back is to go on from an
        earlier position.
        """
        new = KV(*(old.at[:, positions].set(x.swapaxes(0, 1), mode="drop") for old, x in ((self.k, k), (self.v, v))))
        return attend(q, new.k, new.v, jnp.arange(new.k.shape[1]) <= positions[:, None]), new


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
        stream: Int[Array, " R"],
    ) -> tuple[Float[Array, "R heads*D"], "Rows"]:
        """One token each of R different streams; a stream of N or more is none, and is not written."""
        new = Rows(*(old.at[stream, :, positions].set(x, mode="drop") for old, x in ((self.k, k), (self.v, v))))
        visible = jnp.arange(new.k.shape[2]) <= positions[:, None]
        one = lambda q, k, v, visible: attend(q[None], k, v, visible[None])[0]
        return jax.vmap(one)(q, new.k[stream], new.v[stream], visible), new

    def fill(
        self,
        q: Float[Array, "T heads D"],
        k: Float[Array, "T kv D"],
        v: Float[Array, "T kv D"],
        positions: Int[Array, " T"],
        stream: Int[Array, ""],
    ) -> tuple[Float[Array, "T heads*D"], "Rows"]:
        """T tokens of one stream, as `KV.extend`."""
        new = Rows(*(old.at[stream, :, positions].set(x, mode="drop") for old, x in ((self.k, k), (self.v, v))))
        visible = jnp.arange(new.k.shape[2]) <= positions[:, None]
        return attend(q, new.k[stream], new.v[stream], visible), new


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
    ) -> tuple[Float[Array, "G heads*D"], "Grouped"]:
        """One token each; positions count from the beginning of the prefix."""
        G, P = len(q), self.prefix.k.shape[1]
        at = jnp.arange(G), slice(None), positions - P
        own = Rows(self.own.k.at[at].set(k, mode="drop"), self.own.v.at[at].set(v, mode="drop"))
        turn = lambda memory: (memory.k.swapaxes(-3, -2), memory.v.swapaxes(-3, -2))
        there = jnp.arange(own.k.shape[2]) <= (positions - P)[:, None]
        return grouped_attention(q, turn(self.prefix), turn(own), there).reshape(G, -1), Grouped(self.prefix, own)
