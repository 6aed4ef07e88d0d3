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

`Multiplexer` knows queries by their key. `Selector` knows their features, and so judges those that it has never seen.
`Similar` makes one key of queries in other words.

What is bounded here and not in the paper: the table. It tracks `rows` queries, those in the cache always among them; a
query that is not tracked takes the row of the least frequent one outside of the cache and starts from zero.
Answers are reused as they are: do so only for models that answer the same query alike (temperature 0).
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt32

from anabranch.cell import Cell, Decision, Feedback, Learner, Policy, State, noise, select
from anabranch.keep.base import GDSF
from anabranch.keep.queries import LEC, Similar, Table

__all__ = [
    "GDSF", "LEC", "Always", "CachedMultiplexer", "Multiplexer", "Query", "Selector", "Served", "Similar", "Table",
    "optimum",
]  # fmt: skip

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
        _check(self.penalty, self.explore)

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
        return _tried(self.best(state.c[row], state.nc[row]), self.explore, state.rng, state.clock)

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


class Selected(NamedTuple):
    """What a `Selector` has learned."""

    scorer: State
    c: Float[Array, " 2"]
    """Mean cost of each model alone."""
    nc: Int[Array, " 2"]
    clock: Int[Array, ""]
    rng: UInt32[Array, " 2"]


class Selector(Policy):
    """Chooses the model by a learned score: the probability that the small one's answer will be good enough.

    `act(state, x)` takes the features of a query, whatever the scorer takes; `learn` what `Multiplexer.learn` takes.
    The scorer (in the paper a fine-tuned BERT) learns from every answer of the small model, and from no other: without
    `explore`, a query that it scores low is never again asked of the small one. Before a cache, ask only on a miss, and
    give the cache what was paid: `LEC.step(state, Request(key, cost=paid))`.

        >>> from anabranch.learn.linear import LogisticRegression
        >>> import optax
        >>> router = Selector(LogisticRegression(1, optax.sgd(1.0)))
        >>> state, hard = router.init(), jnp.array([1.0])
        >>> for _ in range(5):
        ...     state, decision = router.act(state, hard)
        ...     failed = Feedback(reward=0.0, cost=jnp.array([1.0, 10.0]), info=jnp.array(False))
        ...     state = router.learn(state, hard, decision, failed)
        >>> [int(router.act(state, x)[1].action) for x in (hard, -hard)]
        [1, 0]

    Raises:
        ValueError: `penalty` is negative; `threshold` or `explore` is outside of [0, 1].
    """

    scorer: Learner
    """Predicts a probability from the features; its target is whether the small model succeeded."""
    penalty: float = 2.0
    """How many times the large model's cost a failure of the small one adds."""
    threshold: float | None = None
    """The small model is asked from this score on. None: from where `C_s + (1 - score)·penalty·C_l` is at most `C_l`,
    at their mean costs."""
    explore: float = 0.0
    """How often a random model is taken."""

    def __check_init__(self):
        _check(self.penalty, self.explore)
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold must be in [0, 1], got {self.threshold}")

    def init(self, *, key: PRNGKeyArray | None = None) -> Selected:
        key = jax.random.PRNGKey(0) if key is None else key
        return Selected(self.scorer.init(key=key), jnp.zeros(2), jnp.zeros(2, jnp.int32), jnp.int32(0), key)

    def act(self, state: Selected, x: Any) -> tuple[Selected, Decision]:
        score = self.scorer.predict(state.scorer, x)
        if self.threshold is None:
            small, large = state.c
            dear = (state.nc > 0).all() & (small + (1 - score) * self.penalty * large > large)
        else:
            dear = score < self.threshold
        decision = _tried(dear.astype(jnp.int32), self.explore, state.rng, state.clock)
        return state._replace(clock=state.clock + 1), decision

    def learn(self, state: Selected, x: Any, decision: Decision, feedback: Feedback) -> Selected:
        ran = decision.action == SMALL
        seen = jnp.stack([ran, ~ran | ~jnp.asarray(feedback.info, bool)])
        nc = state.nc + seen
        c = jnp.where(seen, state.c + (jnp.asarray(feedback.cost) - state.c) / jnp.maximum(nc, 1), state.c)
        told = self.scorer.learn(state.scorer, x, jnp.asarray(feedback.info, jnp.int32))
        return state._replace(scorer=select(ran, told, state.scorer), c=c, nc=nc)


def _tried(best: Int[Array, ""], explore: float, rng: Array, clock: Array) -> Decision:
    """The best model, or sometimes a random one."""
    if not explore:
        return Decision(best)
    try_, coin = jax.random.uniform(noise(rng, clock, "explore"), (2,))
    action = jnp.where(try_ < explore, (coin < 0.5).astype(jnp.int32), best)
    return Decision(action, jnp.log(explore / 2 + (1 - explore) * (action == best)))


def _check(penalty: float, explore: float):
    if not (penalty >= 0 and math.isfinite(penalty)):
        raise ValueError(f"penalty must be finite and not negative, got {penalty}")
    if not 0 <= explore <= 1:
        raise ValueError(f"explore must be in [0, 1], got {explore}")


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
