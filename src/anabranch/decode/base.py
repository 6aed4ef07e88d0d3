"""The nouns of the family: how the next token is drawn.

>>> logits = jnp.log(jnp.array([[0.1, 0.6, 0.3]]))
>>> greedy = Draw(jnp.zeros(1), jnp.ones(1), jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.int32))
>>> sample(logits, greedy, "likeliest").tolist()
[1]
>>> [round(float(p), 3) for p in jnp.exp(warp(logits[0], 1.0, top_p=0.8))]
[0.0, 0.667, 0.333]
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from anabranch.cell import noise


class Draw(NamedTuple):
    """How the next token of each row is drawn."""

    temperature: Float[Array, " R"]
    top_p: Float[Array, " R"]
    seed: Int[Array, " R"]
    step: Int[Array, " R"]
    """Which token of its answer it is: drawn again, it is the same."""


def warp(
    logits: Float[Array, " vocab"],
    temperature: float | Float[Array, ""],
    top_k: int | None = None,
    top_p: float | Float[Array, ""] | None = None,
) -> Float[Array, " vocab"]:
    """The log-probabilities from which a token is drawn; they sum to one.

    Arguments:
        temperature: by which logits are divided; at 0 the likeliest token has all, of equal ones the first.
        top_k: how many of the likeliest tokens are left; None for all.
        top_p: of these, the fewest that have so much together; None for all, which needs no sorting.
    """
    cold = jnp.where(jnp.arange(len(logits)) == jnp.argmax(logits), 0.0, -jnp.inf)
    logp = jax.nn.log_softmax(logits / jnp.maximum(temperature, 1e-6))
    if top_k is not None and top_k < len(logits):
        logp = jax.nn.log_softmax(jnp.where(logp >= jax.lax.top_k(logp, top_k)[0][-1], logp, -jnp.inf))
    if top_p is not None:
        ordered = jnp.sort(logp, descending=True)
        before = jnp.cumsum(jnp.exp(ordered)) - jnp.exp(ordered)
        least = jnp.where(before < top_p, ordered, jnp.inf).min()
        logp = jax.nn.log_softmax(jnp.where(logp >= least, logp, -jnp.inf))
    return jnp.where(temperature > 0, logp, cold)


def sample(logits: Float[Array, "R vocab"], draw: Draw, how: str) -> Int[Array, " R"]:
    """The next token of each row.

    Arguments:
        how: "likeliest" if no row is warm, "all" if every row that is draws from all tokens, else "top_p". Drawing from
            tens of thousands takes time, and sorting them more.
    """
    if how == "likeliest":
        return jnp.argmax(logits, -1)

    def one(logits, temperature, top_p, seed, step):
        logp = warp(logits, temperature, top_p=top_p if how == "top_p" else None)
        return jax.random.categorical(noise(jax.random.PRNGKey(seed), step), logp)

    return jax.vmap(one)(logits, *draw)
