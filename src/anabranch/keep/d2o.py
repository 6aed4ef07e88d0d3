"""D2O: Dynamic Discriminative Operations for Efficient Generative Inference of LLMs (arXiv 2406.13035, 2024).

The stream is a text of tokens, the state what attention remembers of it (`keep.memory`). Tokens with most attention of
all queries so far stay, and the last ones, as with H2O. Two things are added.

*Levels*: a layer whose attention is spread evenly keeps more than one that looks at few tokens. When the memory first
overflows, each head's attention to each token is added up over all queries; the variance of these sums, scaled to 0..1
over the heads of a layer and averaged, says how concentrated the layer is, and budgets are proportional to the softmax
of its negative over the layers.

*Merging*: a token that has to leave goes into the one it resembles most among those that stay, by the cosine of their
keys, if it resembles it enough: as much as tokens that left so far did, in a moving mean. Else it is gone for good.

    >>> keep = D2O(budget=6, sinks=1, room=2, levels=False)
    >>> memory = keep.empty(heads=1, width=4)
    >>> for t in range(10):
    ...     x = jax.random.normal(jax.random.PRNGKey(t), (2, 1, 4))
    ...     o, memory = memory.extend(x, x, x, 2 * t + jnp.arange(2), lambda x, positions: x)
    >>> int(memory.live[0]), int(memory.own.merged + memory.own.dropped)
    (8, 12)

Where this differs from the authors' code (AIoT-MLSys-Lab/d2o): keys are merged as they are before RoPE turns them,
because the mean of two turned keys is no key; where queries share keys, their key head decides for them; no layer is
exempt unless `skip` says so, since what never forgets is not bounded; a stream has no prompt, so that budgets are set
once the memory holds more than `budget` tokens; and many tokens leave at once. A merged token is read at the place of
the one that stayed.
"""

import math
from typing import Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from anabranch.keep.memory import Keep


class Merges(NamedTuple):
    """What D2O remembers of a layer."""

    columns: Float[Array, "kv q S"]
    """The attention that tokens got, told apart by head, until budgets are set; of no use later."""
    threshold: Float[Array, ""]
    """How much a token must resemble one that stays."""
    merged: Float[Array, ""]
    """Tokens that were merged so far, in all heads."""
    dropped: Float[Array, ""]
    """Tokens that were not."""
    settled: Bool[Array, ""]
    """Whether budgets have been set."""
    whole: Bool[Array, ""]
    """Whether the layer is one that keeps `whole` tokens, the first and the last ones."""


class D2O(Keep):
    """Tokens with most attention, and the last ones; layers differ, and what leaves is merged.

    Args:
        budget: tokens that stay, in the mean over the layers.
        heavy: the part of a layer's budget that goes by attention; the rest are the last tokens.
        sinks: first tokens that always stay.
        levels: whether budgets differ between layers.
        queries: heads that are told apart for that, to a key head: the paper has all, `heads // kv_heads` of the model.
        merge: whether tokens that leave are merged; else they are dropped.
        rule: how a token is merged. "paper": a mean with weights e for the one that stays and exp(cosine) for each that
            joins it. "code": the sum of it and of those that join it, each times its cosine, over their number, which
            makes keys shorter.
        decay: of the moving mean of resemblance.
        skip: layers that are not compressed before they hold `whole` tokens, and then keep the first and the last. They
            are not counted in the budget of the others.
        whole: that number.

    Raises:
        ValueError: if the budget has no room beside the sinks, a part is not in 0..1, the rule is none, or `whole` is
            less than the budget where there is something to skip.
    """

    heavy: float = eqx.field(static=True, default=0.5, kw_only=True)
    sinks: int = eqx.field(static=True, default=4, kw_only=True)
    levels: bool = eqx.field(static=True, default=True, kw_only=True)
    queries: int = eqx.field(static=True, default=1, kw_only=True)
    merge: bool = eqx.field(static=True, default=True, kw_only=True)
    rule: Literal["paper", "code"] = eqx.field(static=True, default="paper", kw_only=True)
    decay: float = eqx.field(static=True, default=0.5, kw_only=True)
    skip: tuple[int, ...] = eqx.field(static=True, default=(), kw_only=True)
    whole: int = eqx.field(static=True, default=0, kw_only=True)

    def __check_init__(self):
        if self.budget <= self.sinks:
            raise ValueError(f"budget must be more than sinks={self.sinks}, got {self.budget}")
        for name in ("heavy", "decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in 0..1, got {getattr(self, name)}")
        if self.queries < 1:
            raise ValueError(f"queries must be at least 1, got {self.queries}")
        if self.rule not in ("paper", "code"):
            raise ValueError(f'rule must be "paper" or "code", got {self.rule!r}')
        if self.skip and self.whole < self.budget:
            raise ValueError(f"whole must be at least budget={self.budget} where layers are skipped, got {self.whole}")

    @property
    def most(self) -> int:
        return max(self.whole if self.skip else 0, math.ceil(1.75 * self.budget) if self.levels else self.budget)

    def begin(self, heads):
        columns = jnp.zeros((heads, self.queries, self.most + self.room if self.levels else 0))
        return Merges(columns, *jnp.zeros(3), *jnp.zeros(2, bool))

    def score(self, held):
        return jnp.where(held.own.whole, held.position.astype(jnp.float32), held.mass)

    def protect(self, held):
        last = held.budget - jnp.floor(held.budget * self.heavy).astype(jnp.int32)
        return (held.position < self.sinks) | (self.recent(held, last) & ~held.own.whole)

    def watch(self, held, share):
        if not self.levels:
            return held
        kv, _, g, S = share.shape
        if g % self.queries:
            raise ValueError(f"queries must divide the {g} that share a key head, got {self.queries}")
        columns = held.own.columns + share.sum(1).reshape(kv, self.queries, -1, S).sum(2)
        return eqx.tree_at(lambda held: held.own.columns, held, columns)

    def settle(self, memory):
        """Set the budgets of all layers when they first hold more than `budget` tokens."""
        if not (self.levels or self.skip):
            return memory
        first = memory[0]
        now = (first.live > self.budget).any() & ~first.own.settled
        budgets = jnp.full(len(memory), self.budget)
        if self.levels:
            columns = jnp.stack([held.own.columns for held in memory]).reshape(len(memory), -1, first.position.shape[1])
            budgets = layer_budgets(columns, first.position[0] >= 0, self.budget, self.most)
        skipped, new = {i % len(memory) for i in self.skip}, []
        for i, held in enumerate(memory):
            budget = jnp.where(now, self.whole if i in skipped else budgets[i], held.budget)
            own = held.own._replace(settled=held.own.settled | now, whole=held.own.whole | (now & (i in skipped)))
            new.append(eqx.tree_at(lambda held: (held.budget, held.own), held, (budget, own)))
        return tuple(new)

    def after(self, old, stay, new):
        """Merge what left."""
        (kv, S), own = old.position.shape, old.own
        left = (old.position >= 0).at[jnp.arange(kv)[:, None], stay].set(False, mode="drop")
        lost = left.sum().astype(jnp.float32)
        if not self.merge:
            return eqx.tree_at(lambda held: held.own.dropped, new, own.dropped + lost)
        first = jnp.sort(jnp.where(left, jnp.arange(S), S), -1)  # of those that left, oldest first
        there, take = first < S, lambda x: jnp.take_along_axis(x, first[..., None], 1, "fill", 0.0)
        k, v = take(old.k), take(old.v)
        alike, into = resemblance(k, new.k, new.position >= 0)
        alike = jnp.where(there, alike, 0.0)
        mean = alike.sum() / jnp.maximum(lost, 1.0)
        begun = own.merged + own.dropped > 0
        threshold = jnp.where(begun, self.decay * own.threshold + (1 - self.decay) * mean, mean)
        joins = there & (alike.mean(0) >= threshold) & ~own.whole  # all heads lose equally many, and decide together
        number = joins.sum().astype(jnp.float32)
        own = own._replace(threshold=threshold, merged=own.merged + number, dropped=own.dropped + lost - number)
        k, v = merge_back((new.k, new.v), (k, v), into, alike, joins, self.rule)
        return eqx.tree_at(lambda held: (held.k, held.v, held.own), new, (k, v, own))


def layer_budgets(columns: Float[Array, "L H S"], there: Bool[Array, " S"], budget: int, most: int) -> Int[Array, " L"]:
    """Tokens that each layer keeps, from the attention that tokens got: `budget` in the mean, none more than `most`.

    What counts is how the heads of a layer differ: one of which most are as even as its most even head keeps more.

        >>> even, uneven = jnp.array([1.0, 1, 1, 1]), jnp.array([0.0, 0, 0, 4])
        >>> columns = jnp.stack([jnp.stack([even, even, uneven]), jnp.stack([even, uneven, uneven])])
        >>> layer_budgets(columns, jnp.ones(4, bool), 100, 175).tolist()
        [117, 83]
    """
    n = there.sum()
    mean = jnp.where(there, columns, 0.0).sum(-1, keepdims=True) / n
    variance = jnp.where(there, (columns - mean) ** 2, 0.0).sum(-1) / (n - 1)
    low, high = variance.min(-1, keepdims=True), variance.max(-1, keepdims=True)
    concentrated = ((variance - low) / (high - low + 1e-6)).mean(-1)
    share, total = jax.nn.softmax(-concentrated), budget * len(columns)
    # The code's least budget, a hundredth of the prompt, is never reached: a share is at least 1 / (e L).
    floors = jnp.floor(share * total).astype(jnp.int32)
    largest = jnp.argsort(jnp.argsort(-share))
    return jnp.minimum(floors + (largest < total - floors.sum()), most)


def resemblance(
    left: Float[Array, "kv R D"], kept: Float[Array, "kv S D"], there: Bool[Array, "kv S"]
) -> tuple[Float[Array, "kv R"], Int[Array, "kv R"]]:
    """The cosine of each key that left with the one that resembles it most, and which that is."""
    unit = lambda k: k / jnp.maximum(jnp.linalg.norm(k, axis=-1, keepdims=True), 1e-12)
    cosine = jnp.where(there[:, None], jnp.einsum("krd,ksd->krs", unit(left), unit(kept)), -jnp.inf)
    return cosine.max(-1), cosine.argmax(-1)


def merge_back(
    kept: tuple[Array, Array],
    left: tuple[Array, Array],
    into: Int[Array, "kv R"],
    alike: Float[Array, "kv R"],
    joins: Bool[Array, "kv R"],
    rule: str,
) -> tuple[Array, Array]:
    """Keys and values that stay, (kv, S, D) each, with those that left, (kv, R, D) each, where they join one."""
    (kv, S, _), head = kept[0].shape, jnp.arange(len(into))[:, None]
    at = jnp.where(joins, into, S)
    if rule == "code":
        own, weight, counted = 1.0, alike, jnp.ones_like(alike)
    else:
        own, weight, counted = math.e, jnp.exp(alike), jnp.exp(alike)
    total = jnp.full((kv, S), own).at[head, at].add(counted, mode="drop")
    join = lambda x, y: (own * x).at[head, at].add(weight[..., None] * y, mode="drop") / total[..., None]
    return join(kept[0], left[0]), join(kept[1], left[1])
