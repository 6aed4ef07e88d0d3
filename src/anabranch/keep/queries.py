"""What is known of queries, and which query is meant.

A `Table` counts requests and averages costs, for as many queries as it has rows; the cache `LEC` keeps what is worth
most by it, after Zhu et al., arXiv 2306.02003 (see `caching_multiplexing`). `Similar` gives queries in other words
the same key, so that a cache of exact keys becomes a semantic one:

    >>> names = Similar(dim=2, rows=4)
    >>> embeddings = jnp.array([[1.0, 0.0], [0.0, 1.0], [3.0, 0.5], [1.0, 1.0]])
    >>> names.advance(names.init(), embeddings)[1].tolist()
    [1, 2, 1, 3]
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt32

from anabranch.cell import Cell
from anabranch.keep.base import Access, Cache, Request, first, smallest


class Table(NamedTuple):
    """What is known of M queries. Where there is a cache of C, the first C rows are its slots."""

    key: UInt32[Array, " M"]
    n: Float[Array, " M"]
    """Requests, hits included; 0: the row is empty. All are halved when one reaches 2^23: float32 counts to 2^24."""
    c: Float[Array, "M 2"]
    """Mean cost of sending the query to each model first."""
    nc: Int[Array, "M 2"]
    """Observations of that cost; 0: unknown, and `c` says nothing."""
    last: Int[Array, " M"]
    """The clock at the last request."""
    clock: Int[Array, ""]
    rng: UInt32[Array, " 2"]

    @classmethod
    def empty(cls, rows: int, key: PRNGKeyArray | None = None) -> "Table":
        i, rng = jnp.zeros(rows, jnp.int32), jax.random.PRNGKey(0) if key is None else key
        ii = jnp.zeros((rows, 2), jnp.int32)
        return cls(i.astype(jnp.uint32), i.astype(jnp.float32), ii.astype(jnp.float32), ii, i, jnp.int32(0), rng)

    def find(self, key: UInt32[Array, ""]) -> Int[Array, ""]:
        """The row of a query; M if it is not tracked."""
        return first((self.n > 0) & (self.key == key))

    def track(self, key: UInt32[Array, ""], kept: int, decay: float = 1.0) -> tuple["Table", Int[Array, ""]]:
        """Count one request. A new query takes the least frequent row from `kept` on, of several the oldest."""
        row = self.find(key)
        new = row == len(self.key)
        spare = kept + smallest(jnp.ones_like(self.n[kept:], bool), self.n[kept:], (self.last - self.clock)[kept:])
        row = jnp.where(new, spare, row)
        n = self.n.at[row].set(jnp.where(new, 0, self.n[row]))
        if decay < 1:  # an entry that fades below the smallest normal number would look empty
            n = jnp.where(n > 0, jnp.maximum(n * decay, jnp.finfo(jnp.float32).tiny), 0)
        n = n.at[row].add(1)
        n = n * jnp.where(n[row] >= 2**23, 0.5, 1.0)
        return self._replace(
            key=self.key.at[row].set(key),
            n=n,
            c=self.c.at[row].set(jnp.where(new, 0, self.c[row])),
            nc=self.nc.at[row].set(jnp.where(new, 0, self.nc[row])),
            last=self.last.at[row].set(self.clock),
            clock=self.clock + 1,
        ), row

    def observe(
        self, row: Int[Array, ""], cost: Float[Array, " 2"], seen: Bool[Array, " 2"], rate: float = 0.0
    ) -> "Table":
        """Take observed costs into the means; from 1/rate observations on, older ones fade."""
        nc = self.nc[row] + seen
        gain = jnp.where(seen, jnp.maximum(1 / jnp.maximum(nc, 1), rate), 0)
        c = jnp.where(seen, self.c[row] + gain * (cost - self.c[row]), self.c[row])
        return self._replace(c=self.c.at[row].set(c), nc=self.nc.at[row].set(nc))

    def admit(
        self, row: Int[Array, ""], weight: Float[Array, " C"], newcomer: Float[Array, ""]
    ) -> tuple["Table", Access]:
        """Put the query of `row` into the cache if there is room, or if it weighs more than the lightest entry."""
        capacity = len(weight)
        weight = jnp.where(self.n[:capacity] > 0, weight, -jnp.inf)
        hit, victim = row < capacity, jnp.argmin(weight).astype(jnp.int32)
        put = ~hit & (newcomer > weight[victim])  # equal weights: who is in stays in
        into = jnp.where(put, victim, row)
        swapped = {name: getattr(self, name) for name in ("key", "n", "c", "nc", "last")}
        swapped = {name: leaf.at[row].set(leaf[into]).at[into].set(leaf[row]) for name, leaf in swapped.items()}
        evicted = jnp.where(put & (self.n[victim] > 0), self.key[victim], 0)
        return self._replace(**swapped), Access(hit, jnp.where(hit | put, into, -1), evicted, put)


class LEC(Cache):
    """Least expected cost: keeps the queries with the largest frequency times mean cost of a miss.

    A newcomer that weighs less than everything in the cache is refused. Frequencies count all requests of a tracked
    query, in the cache or not. The cost of a cached query cannot be seen and keeps its last mean: where costs or
    popularity drift, let the past fade with `decay` < 1. One size for all.

        >>> from anabranch.keep.base import requests
        >>> state, seen = LEC(1).advance(LEC(1).init(), requests([1, 2, 1, 2], cost=[10, 1, 10, 1]))
        >>> seen.hit.tolist()
        [False, False, True, False]

    Raises:
        ValueError: `rows` does not exceed the capacity; `decay` is outside of (0, 1].
    """

    rows: int = 0
    """How many queries are tracked, M; 0: four times the capacity."""
    decay: float = 1.0
    """By what a count shrinks with every request. Mean costs forget at the same rate, by their own observations."""

    def __check_init__(self):
        if self.rows and self.rows <= self.capacity:
            raise ValueError(f"rows must exceed the capacity {self.capacity}, got {self.rows}")
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay must be in (0, 1], got {self.decay}")

    def init(self, *, key: PRNGKeyArray | None = None) -> Table:
        return Table.empty(self.rows or 4 * self.capacity, key)

    def step(self, state: Table, x: Request) -> tuple[Table, Access]:
        state, row = state.track(jnp.asarray(x.key, jnp.uint32), self.capacity, self.decay)
        miss = row >= self.capacity
        cost, seen = jnp.full(2, x.cost, jnp.float32), miss & jnp.array([True, False])
        state = state.observe(row, cost, seen, 1 - self.decay)
        kept = slice(self.capacity)
        return state.admit(row, state.n[kept] * state.c[kept, 0], state.n[row] * state.c[row, 0])


class Names(NamedTuple):
    """The queries that `Similar` remembers."""

    vector: Float[Array, "M d"]
    """Of unit length."""
    key: UInt32[Array, " M"]
    """0: the row is empty."""
    last: Int[Array, " M"]
    """The clock when it was last meant."""
    clock: Int[Array, ""]
    new: UInt32[Array, ""]
    """The next key that is given."""


class Similar(Cell):
    """The key u32 of the query that an embedding f32[d] means: of the nearest one known, if that is near enough.

    Else it is a new query, with a new key (1, 2, ...), in place of the one that has not been meant for the longest.
    What a query is compared with is how it was first put, so that a meaning does not wander. Remember at least as many
    as the table behind it tracks, or an answer that is held could no longer be found. An embedding of zeros is like
    nothing.

    Raises:
        ValueError: `dim` or `rows` is below 1; `threshold` is not in (0, 1].
    """

    dim: int = eqx.field(static=True)
    """Of an embedding, d."""
    rows: int = eqx.field(static=True)
    """How many queries are remembered, M."""
    threshold: float = 0.9
    """The least cosine of two embeddings that mean the same."""

    def __check_init__(self):
        for name in ("dim", "rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold must be in (0, 1], got {self.threshold}")

    def init(self, *, key: PRNGKeyArray | None = None) -> Names:
        last = jnp.zeros(self.rows, jnp.int32)
        vector = jnp.zeros((self.rows, self.dim))
        return Names(vector, last.astype(jnp.uint32), last, jnp.int32(1), jnp.uint32(1))

    def step(self, state: Names, x: Float[Array, " d"]) -> tuple[Names, UInt32[Array, ""]]:
        unit = x / jnp.maximum(jnp.linalg.norm(x), jnp.finfo(jnp.float32).tiny)
        # Empty rows are zeros, at a cosine of 0. Rounding leaves equal embeddings a little below 1.
        cosine = state.vector @ unit
        near = jnp.argmax(cosine).astype(jnp.int32)
        known = cosine[near] >= self.threshold - 1e-6
        oldest = smallest(jnp.ones(self.rows, bool), jnp.where(state.key > 0, state.last - state.clock, -(2**31)))
        row = jnp.where(known, near, oldest)
        key = jnp.where(known, state.key[row], state.new)
        return Names(
            vector=state.vector.at[row].set(jnp.where(known, state.vector[row], unit)),
            key=state.key.at[row].set(key),
            last=state.last.at[row].set(state.clock),
            clock=state.clock + 1,
            new=state.new + ~known,
        ), key
