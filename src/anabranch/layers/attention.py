"""Attention; and attention over keys in several places: a part for each place, and the parts put together.

A softmax over all keys is the mean of those over the parts, weighted by the sums of their exponentials. So each part
also gives the logarithm of its sum, and nothing else has to be known of it.
"""

import jax
import jax.numpy as jnp
from jax.scipy.special import logsumexp
from jaxtyping import Array, Bool, Float


def attend(
    q: Float[Array, "T heads D"],
    k: Float[Array, "kv S D"],
    v: Float[Array, "kv S D"],
    visible: Bool[Array, "T S"],
    times: Float[Array, "T S"] | None = None,
) -> Float[Array, "T heads*D"]:
    """What each of T queries takes from the visible ones of S slots; `heads` queries share `kv` keys.

    With `times`, a slot counts as if it were there so many times.
    """
    T, heads, D = q.shape
    q = q.reshape(T, len(k), -1, D) * D**-0.5
    more = jnp.zeros((T, 1)) if times is None else jnp.log(times)
    if T == 1:  # XLA's CPU backend has no fast product for one query a stream; as sums it reads the cache once
        score = (q[0, :, :, None] * k[:, None]).sum(-1) + more[0]
        share = jax.nn.softmax(jnp.where(visible[0], score, -jnp.inf))
        return (share[..., None] * v[:, None]).sum(-2).reshape(1, heads * D)
    score = jnp.einsum("tkgd,ksd->tkgs", q, k) + more[:, None, None]
    share = jax.nn.softmax(jnp.where(visible[:, None, None], score, -jnp.inf))
    return jnp.einsum("tkgs,ksd->tkgd", share, v).reshape(T, heads * D)


def partial_attention(
    q: Float[Array, "T H d"],
    k: Float[Array, "S K d"],
    v: Float[Array, "S K e"],
    mask: Bool[Array, "#T S"] | None = None,
) -> tuple[Float[Array, "T H e"], Float[Array, "T H"]]:
    """What queries take from some of the keys, and the logarithm of the sum of the exponentials of their scores.

    K key heads are shared by H query heads, a multiple of K. A query whose keys are all masked gets 0, and -inf.
    """
    T, H, d = q.shape
    score = jnp.einsum("tkgd,skd->tkgs", q.reshape(T, k.shape[1], -1, d), k) * d**-0.5
    if mask is not None:
        score = jnp.where(mask[:, None, None], score, -jnp.inf)
    total = logsumexp(score, -1)
    # Where everything is masked the total is -inf, and -inf - -inf would be NaN.
    share = jnp.exp(score - jnp.where(total == -jnp.inf, 0.0, total)[..., None])
    return jnp.einsum("tkgs,ske->tkge", share, v).reshape(T, H, -1), total.reshape(T, H)


def merge_attention(
    o1: Float[Array, "*T e"], l1: Float[Array, "*T"], o2: Float[Array, "*T e"], l2: Float[Array, "*T"]
) -> tuple[Float[Array, "*T e"], Float[Array, "*T"]]:
    """Two parts of an attention as one: what was taken, and the logarithm of the sum of exponentials."""
    top = jnp.maximum(l1, l2)
    top = jnp.where(top == -jnp.inf, 0.0, top)
    w1, w2 = jnp.exp(l1 - top), jnp.exp(l2 - top)
    both = w1 + w2
    out = (w1[..., None] * o1 + w2[..., None] * o2) / jnp.where(both > 0, both, 1.0)[..., None]
    return out, jnp.log(both) + top


def grouped_attention(
    q: Float[Array, "G H d"],
    shared: tuple[Float[Array, "P K d"], Float[Array, "P K d"]],
    own: tuple[Float[Array, "G S K d"], Float[Array, "G S K d"]],
    mask: Bool[Array, "G S"],
) -> Float[Array, "G H d"]:
    """One step of G requests whose texts begin with the same P tokens.

    The keys of the prefix are read once for all of them, in one product with all queries.

    Arguments:
        q: one query of each request.
        shared: keys and values of the prefix.
        own: those of what follows, for each request.
        mask: which of these are there.
    """
    prefix = partial_attention(q, *shared)
    rest = jax.vmap(lambda q, k, v, mask: partial_attention(q[None], k, v, mask[None]))(q, *own, mask)
    return merge_attention(*prefix, rest[0][:, 0], rest[1][:, 0])[0]
