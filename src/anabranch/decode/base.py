"""The nouns of the family: how the next token is drawn.

>>> logits = jnp.log(jnp.array([[0.1, 0.6, 0.3]]))
>>> greedy = Draw(jnp.zeros(1), jnp.ones(1), jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.int32))
>>> sample(logits, greedy, "likeliest").tolist()
[1]
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


def sample(logits: Float[Array, "R vocab"], draw: Draw, how: str) -> Int[Array, " R"]:
    """The next token of each row.

    Arguments:
        how: "likeliest" if no row is warm, "all" if every row that is draws from all tokens, else "top_p". Drawing from
            tens of thousands takes time, and sorting them more.
    """
    best = jnp.argmax(logits, -1)
    if how == "likeliest":
        return best

    def one(logits, temperature, top_p, seed, step):
        logp = jax.nn.log_softmax(logits / jnp.maximum(temperature, 1e-6))
        if how == "top_p":
            ordered = jnp.sort(logp, descending=True)
            before = jnp.cumsum(jnp.exp(ordered)) - jnp.exp(ordered)
            logp = jnp.where(logp >= jnp.where(before < top_p, ordered, jnp.inf).min(), logp, -jnp.inf)
        return jax.random.categorical(noise(jax.random.PRNGKey(seed), step), logp)

    return jnp.where(draw.temperature > 0, jax.vmap(one)(logits, *draw), best)
