"""Caching by least expected cost, and sending every miss to the model that is expected to be cheaper for it.

Zhu, Sheng, Zheng, Barrett, Jordan and Jiao, 2023: "On Optimal Caching and Model Multiplexing for Large Model
Inference", arXiv 2306.02003. Requests for answers that can be reused arrive one by one; a small and a large model can
answer, at costs that are random and unknown. The small one may fail; then the large one answers too, at `penalty` times
its cost. A hit costs nothing. The stream is one `Query` a step, the state a table of counts and mean costs.

    >>> serving = CachedMultiplexer(LEC(1), Multiplexer())
    >>> state = serving.init()
    >>> hard = Query(jnp.uint32(7), cost=jnp.array([1.0, 10.0]), success=jnp.array(False))
    >>> easy = Query(jnp.uint32(8), cost=jnp.array([1.0, 10.0]), success=jnp.array(True))
    >>> for query in (easy, hard, hard, easy):
    ...     state, served = serving.step(state, query)
    ...     print(int(served.model), float(served.cost), bool(served.admitted))
    0 1.0 True
    0 21.0 True
    -1 0.0 False
    0 1.0 False

The first miss on `hard` fails on the small model (1 + 2·10) and shows that its answer is the one to keep; `easy`,
though as frequent in the end, is refused: it costs 1 a time.

What is bounded here and not in the paper: the table. It tracks `rows` queries, those in the cache always among them; a
query that is not tracked takes the row of the least frequent one outside of the cache and starts from zero.
Answers are reused as they are: do so only for models that answer the same query alike (temperature 0).
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt32

from anabranch.cell import Cell, Decision, Feedback, Policy, noise
from anabranch.keep.base import GDSF, Access, Cache, Request, first, smallest

__all__ = ["GDSF", "LEC", "Always", "CachedMultiplexer", "Multiplexer", "Query", "Served", "Table", "optimum"]

SMALL, LARGE = 0, 1
"""The two models."""
CACHED = -1
"""No model ran."""


class Query(NamedTuple):
    """One request and what the models would do with it; only what the chosen model does is looked at."""

    key: UInt32[Array, ""]
    """The identity of the query: equal queries have equal keys. Any u32."""
    cost: Float[Array, " 2"]
    """What the small and the large model cost this time, in any one unit."""
    success: Bool[Array, ""]
    """Whether the answer of the small model is good enough."""


class Served(NamedTuple):
    """How a query was answered; the last three are those of `Access`."""

    hit: Bool[Array, ""]
    model: Int[Array, ""]
    """0 small, 1 large, -1 the cache."""
    cost: Float[Array, ""]
    slot: Int[Array, ""]
    evicted: UInt32[Array, ""]
    admitted: Bool[Array, ""]


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


class Multiplexer(Policy):
    """Chooses the model for a query: the large one if it was seen to be cheaper than the small one with its failures.

    `act(state, key u32)` gives `Decision(action)`, 0 small or 1 large. `learn` takes `Feedback` with `cost` f32[2],
    what each model cost (read only for those that ran), and `info` bool, whether the small model's answer was good
    enough. If it was not, the large model ran as well: the query cost `C_s + penalty·C_l`, and both costs are seen.

        >>> router = Multiplexer(rows=8)
        >>> state, decision = router.act(router.init(), jnp.uint32(7))
        >>> int(decision.action)
        0
        >>> failed = Feedback(reward=-21.0, cost=jnp.array([1.0, 10.0]), info=jnp.array(False))
        >>> state = router.learn(state, jnp.uint32(7), decision, failed)
        >>> int(router.act(state, jnp.uint32(7))[1].action)
        1

    Raises:
        ValueError: `rows` is below 1; `penalty` is negative; `explore` is outside of [0, 1].
    """

    rows: int = 1024
    """How many queries are tracked, M, when it stands alone."""
    penalty: float = 2.0
    """How many times the large model's cost a failure of the small one adds."""
    explore: float = 0.0
    """How often a random model is taken. Without, the large one is first seen when the small one fails."""

    def __check_init__(self):
        if self.rows < 1:
            raise ValueError(f"rows must be positive, got {self.rows}")
        if not (self.penalty >= 0 and math.isfinite(self.penalty)):
            raise ValueError(f"penalty must be finite and not negative, got {self.penalty}")
        if not 0 <= self.explore <= 1:
            raise ValueError(f"explore must be in [0, 1], got {self.explore}")

    def init(self, *, key: PRNGKeyArray | None = None) -> Table:
        return Table.empty(self.rows, key)

    def best(self, c: Float[Array, "*b 2"], nc: Int[Array, "*b 2"]) -> Int[Array, "*b"]:
        """The model to prefer, by mean costs and how often they were observed. A cost never seen is not a cost of 0."""
        return ((nc > 0).all(-1) & (c[..., SMALL] > c[..., LARGE])).astype(jnp.int32)

    def expected(self, c: Float[Array, "*b 2"], nc: Int[Array, "*b 2"]) -> Float[Array, "*b"]:
        """The mean cost of the preferred model; of the other one if only that has been seen."""
        small = self.best(c, nc) == SMALL
        small = jnp.where(small, nc[..., SMALL] > 0, nc[..., LARGE] == 0)
        return jnp.where(small, c[..., SMALL], c[..., LARGE])

    def choose(self, state: Table, row: Int[Array, ""]) -> Decision:
        """The model for the query of `row`."""
        best = self.best(state.c[row], state.nc[row])
        if not self.explore:
            return Decision(best)
        rng = noise(state.rng, state.clock, "explore")
        try_, coin = jax.random.uniform(rng, (2,))
        action = jnp.where(try_ < self.explore, (coin < 0.5).astype(jnp.int32), best)
        return Decision(action, jnp.log(self.explore / 2 + (1 - self.explore) * (action == best)))

    def charge(
        self, model: Int[Array, ""], cost: Float[Array, " 2"], success: Bool[Array, ""]
    ) -> tuple[Float[Array, " 2"], Bool[Array, " 2"]]:
        """What it costs to start with each model, and which of that is seen when `model` is taken."""
        failed = ~jnp.asarray(success, bool)
        whole = cost.at[SMALL].add(jnp.where(failed, self.penalty * cost[LARGE], 0))
        return whole, jnp.stack([model == SMALL, (model == LARGE) | failed])

    def act(self, state: Table, x: UInt32[Array, ""]) -> tuple[Table, Decision]:
        state, row = state.track(jnp.asarray(x, jnp.uint32), kept=0)
        return state, self.choose(state, row)

    def learn(self, state: Table, x: UInt32[Array, ""], decision: Decision, feedback: Feedback) -> Table:
        row = state.find(jnp.asarray(x, jnp.uint32))  # no longer tracked: out of bounds, nothing is written
        return state.observe(row, *self.charge(decision.action, jnp.asarray(feedback.cost), feedback.info))


class Always(Multiplexer):
    """One model for every query: what a multiplexer is compared with.

    Raises:
        ValueError: `model` is neither 0 nor 1.
    """

    model: int = LARGE

    def __check_init__(self):
        if self.model not in (SMALL, LARGE):
            raise ValueError(f"model must be 0 (small) or 1 (large), got {self.model}")

    def best(self, c, nc):
        return jnp.full(c.shape[:-1], self.model, jnp.int32)


class CachedMultiplexer(Cell):
    """A cache before two models, both chosen by one table of estimates; the joint algorithm of the paper.

    A request is counted, then looked up. On a miss a model is chosen, pays and is observed, and then the query may
    enter the cache by its frequency times the expected cost of the model preferred for it. `Query -> Served`. `rows`
    of the multiplexer is not used: the table is that of the cache.
    """

    cache: LEC
    models: Multiplexer
    cost_aware: bool = True
    """False: keep the most frequent queries whatever they cost (the paper's LFU baseline)."""

    def init(self, *, key: PRNGKeyArray | None = None) -> Table:
        return self.cache.init(key=key)

    def step(self, state: Table, x: Query) -> tuple[Table, Served]:
        state, row = state.track(jnp.asarray(x.key, jnp.uint32), self.cache.capacity, self.cache.decay)
        hit = row < self.cache.capacity
        model = self.models.choose(state, row).action
        cost, seen = self.models.charge(model, x.cost, x.success)
        state = state.observe(row, cost, seen & ~hit, 1 - self.cache.decay)
        kept = slice(self.cache.capacity)
        weight, newcomer = state.n[kept], state.n[row]
        if self.cost_aware:
            weight = weight * self.models.expected(state.c[kept], state.nc[kept])
            newcomer = newcomer * self.models.expected(state.c[row], state.nc[row])
        state, access = state.admit(row, weight, newcomer)
        return state, Served(
            hit,
            jnp.where(hit, CACHED, model),
            jnp.where(hit, 0, cost[model]),
            access.slot,
            access.evicted,
            access.admitted,
        )


def optimum(p: np.ndarray, cost: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray, float]:
    """The best cache and the best models when everything is known: the offline optimum.

    The model of a query is the cheaper one; the cache holds the queries with the largest probability times that cost.
    Where costs are estimates, pass upper confidence bounds, so that a model that was rarely tried does not look cheap.

        >>> cached, model, total = optimum([0.6, 0.4], [[1.0, 9.0], [9.0, 5.0]], capacity=1)
        >>> cached.tolist(), model.tolist(), total
        ([False, True], [0, 1], 0.6)

    Args:
        p: probability of each of n queries.
        cost: (n, 2), expected cost of starting with the small and with the large model.
        capacity: how many queries the cache holds.

    Returns:
        Which queries are cached (n bool), the model of each (n), and the expected cost of a request.

    Raises:
        ValueError: shapes do not fit; `capacity` is negative.
    """
    p, cost = np.asarray(p, float), np.asarray(cost, float)
    if p.ndim != 1 or cost.shape != (*p.shape, 2):
        raise ValueError(f"p must have shape (n,) and cost (n, 2), got {p.shape} and {cost.shape}")
    if capacity < 0:
        raise ValueError(f"capacity must not be negative, got {capacity}")
    model = cost.argmin(1)
    saved = p * cost.min(1)
    cached = np.zeros(len(p), bool)
    cached[np.argsort(-saved, kind="stable")[:capacity]] = True
    return cached, model, float(saved[~cached].sum())


def example() -> tuple[CachedMultiplexer, Query]:
    """Four cached answers before two models, and 60 requests for twelve queries."""
    rng = np.random.default_rng(0)
    key = np.minimum(rng.zipf(1.4, 60), 12).astype(np.uint32)
    cost = rng.uniform(0.5, 1.5, (60, 2)).astype(np.float32) * np.array([1, 10], np.float32)
    cell = CachedMultiplexer(LEC(4, decay=0.99), Multiplexer(explore=0.1))
    return cell, Query(jnp.asarray(key), jnp.asarray(cost), jnp.asarray(rng.uniform(size=60) < 0.7))
