"""Sparse mixtures of experts: which of E experts each token goes to, and what they make of it.

A router gives logits for each token; its k likeliest experts work on it, with weights that sum to 1, as in Mixtral
(Jiang et al., "Mixtral of Experts", arXiv 2401.04088, 2024). No token is ever dropped: a token gets the same alone and
among others.

    >>> route = choose(jnp.array([[1.0, 3.0, 1.0], [0.0, 0.0, 9.0]]), jnp.arange(2))
    >>> route.expert.tolist()
    [[1, 0], [2, 0]]
    >>> scales = jnp.array([0.0, 1.0, 1.0])
    >>> y = dispatch(lambda scale, rows: scale * rows, scales, jnp.ones((2, 4)), route)
    >>> [round(float(v), 3) for v in y[:, 0]]  # e^3 / (e^3 + e), e^9 / (e^9 + 1)
    [0.881, 1.0]
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

ROWS = 64
"""At most so many tokens go through an expert in one product: larger ones are hardly faster, and waste more."""


class Route(NamedTuple):
    """The k experts of each of T tokens."""

    expert: Int[Array, "*T k"]
    weight: Float[Array, "*T k"]
    """They sum to 1."""


def choose(logits: Float[Array, "*T E"], ranks: Int[Array, " k"]) -> Route:
    """The experts at some ranks of the router's order: 0 is the likeliest one, and of equal ones the first.

    A rank outside of 0 to E - 1 is none: its weight is 0, so that routes of several lengths fit into one shape.
    """
    experts = logits.shape[-1]
    order = jax.lax.top_k(logits, experts)[1]
    expert = order[..., jnp.clip(ranks, 0, experts - 1)]
    there = (ranks >= 0) & (ranks < experts)
    # A softmax over all, renormalised over those chosen, is one over those chosen.
    share = jnp.where(there, jnp.take_along_axis(logits, expert, -1), -jnp.inf)
    top = jnp.max(share, -1, keepdims=True, initial=jnp.finfo(share.dtype).min)
    share = jnp.exp(share - jax.lax.stop_gradient(top))
    return Route(expert, share / jnp.maximum(share.sum(-1, keepdims=True), jnp.finfo(share.dtype).tiny))


def dispatch(
    expert: Callable[[Any, Float[Array, "n d"]], Float[Array, "n d"]],
    experts: Any,
    x: Float[Array, "T d"],
    route: Route,
) -> Float[Array, "T d"]:
    """What the experts of each token make of it, weighted.

    A few tokens take a copy of the weights of theirs each. Many are put in the order of their experts, each expert's
    filled up to whole blocks of at most `ROWS`, and a block is one matrix product: the work is that of k experts, not
    of E, whatever the loads are.

    Arguments:
        expert: `expert(arrays, rows) -> rows` is one expert at work.
        experts: the arrays of all experts, each with a leading axis of E.
    """
    T, k = route.expert.shape
    E = len(jax.tree.leaves(experts)[0])
    rows, to = jnp.repeat(x, k, axis=0), route.expert.reshape(-1)
    work = lambda to, blocks: jax.vmap(expert)(jax.tree.map(lambda w: w[to], experts), blocks)
    if T * k <= E:
        out = work(to, rows[:, None])[:, 0]
    else:
        size = min(ROWS, 1 << (-(-T * k // E) - 1).bit_length())
        mine = to[:, None] == jnp.arange(E)
        ends = jnp.cumsum(-(-mine.sum(0) // size))  # of the blocks of each expert
        before = jnp.take_along_axis(jnp.cumsum(mine, 0), to[:, None], 1)[:, 0] - 1
        begin = jnp.concatenate([jnp.zeros(1, ends.dtype), ends[:-1]])
        place = begin[to] * size + before
        blocks = T * k // size + E  # as many as there can be
        owner = jnp.minimum(jnp.searchsorted(ends, jnp.arange(blocks), side="right"), E - 1)
        filled = jnp.zeros((blocks * size, x.shape[1]), x.dtype).at[place].set(rows, unique_indices=True)
        out = work(owner, filled.reshape(blocks, size, -1)).reshape(blocks * size, -1)[place]
    return (out.reshape(T, k, -1) * route.weight[..., None]).sum(1)


def loads(expert: Int[Array, "*T k"], experts: int) -> Float[Array, " E"]:
    """Which part of all that is chosen falls to each expert; they sum to 1."""
    return (expert.reshape(-1, 1) == jnp.arange(experts)).mean(0, dtype=jnp.float32)


def balance(logits: Float[Array, "*T E"], expert: Int[Array, "*T k"]) -> Float[Array, ""]:
    """E times the sum over experts of their load times their mean probability: 1 where all are alike, E at worst.

    The loss of Fedus et al., "Switch Transformers", JMLR 2022, which is GShard's too; Hugging Face's is k times as
    large. Loads have no gradient.
    """
    E = logits.shape[-1]
    share = jax.nn.softmax(logits).reshape(-1, E).mean(0)
    return E * jnp.sum(loads(expert, E) * share)
