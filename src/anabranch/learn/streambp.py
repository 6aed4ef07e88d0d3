"""StreamBP: Memory-Efficient Exact Backpropagation for Long Sequence Training of LLMs. arXiv 2506.03077, 2025.

The stream is one long text, and the gradient goes through it in chunks: the chain rule is linear, so that the gradients
of all chunks of a layer's output add up to that of the layer. Of the forward pass only the input of each layer is kept,
f32[T, d]; the backward pass rebuilds one chunk of one layer at a time, and the logits of one chunk at a time. The
gradient is the usual one, up to rounding.

`StreamBP` is a `Backprop` for the models of `anabranch.models.llama`: `fit(StreamBP(), model, batches, ...)`. It has no
state. Three losses come with it: `xent`, `dpo` and `grpo`. Labels are shifted once, for the whole text: the label of a
token is the token after it, and `IGNORED`, or any negative number, where nothing is to be learned.

What differs from the authors' code: the keys and values of a layer are computed once and not again with every chunk;
attention goes over blocks of keys, and those after the chunk are never touched.

    >>> from anabranch.models.llama import Config
    >>> model = Llama(Config(vocab=11, width=8, layers=2, heads=2, kv_heads=1, hidden=16), key=jax.random.PRNGKey(0))
    >>> tokens = jnp.array([[3, 1, 4, 1, 5, 9]])
    >>> loss, gradient = StreamBP(chunk=4).value_and_grad(model, (tokens, next_tokens(tokens)), jax.random.PRNGKey(0))
    >>> round(float(loss), 1), gradient.embedding.shape
    (2.4, (11, 8))
"""

from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from anabranch.cell import Event, Maybe
from anabranch.fit import Backprop, Loss, M
from anabranch.learn.base import Sgd
from anabranch.models.llama import Block, Config, Llama

IGNORED = -100


def next_tokens(tokens: Int[Array, "*B T"]) -> Int[Array, "*B T"]:
    """The label of each token: the one after it; of the last, `IGNORED`."""
    return jnp.concatenate([tokens[..., 1:], jnp.full_like(tokens[..., :1], IGNORED)], -1)


def _scores(q, k, start, j, c):
    """Scaled scores f32[kv, group, c, c] of the queries from `start` on for block j of keys, and that block."""
    block = lax.dynamic_slice_in_dim(k, j * c, c)
    score = jnp.einsum("tkgd,skd->kgts", q, block) * q.shape[-1] ** -0.5
    causal = start + jnp.arange(len(q))[:, None] >= j * c + jnp.arange(c)
    return jnp.where(causal, score, -jnp.inf), block


@jax.custom_vjp
def prefix_attention(
    q: Float[Array, "c kv group D"], k: Float[Array, "T kv D"], v: Float[Array, "T kv D"], i: Int[Array, ""]
) -> Float[Array, "c kv group D"]:
    """Causal attention of chunk i of the queries, block by block of keys, those after it untouched.

    T is a multiple of c. The running softmax is that of Dao et al., "FlashAttention", 2022.
    """
    return _attend(q, k, v, i)[0]


def _attend(q, k, v, i):
    c, kv, group, D = q.shape

    def visit(j, carry):
        out, total, top = carry
        score, _ = _scores(q, k, i * c, j, c)
        higher = jnp.maximum(top, score.max(-1))
        share, scale = jnp.exp(score - higher[..., None]), jnp.exp(top - higher)
        values = lax.dynamic_slice_in_dim(v, j * c, c)
        out = out * scale[..., None] + jnp.einsum("kgts,skd->kgtd", share, values)
        return out, total * scale + share.sum(-1), higher

    rows = (kv, group, c)
    start = jnp.zeros((*rows, D)), jnp.zeros(rows), jnp.full(rows, -jnp.inf)
    out, total, top = lax.fori_loop(0, i + 1, visit, start)
    return jnp.einsum("kgtd->tkgd", out / total[..., None]), top + jnp.log(total)


def _attend_forward(q, k, v, i):
    out, logsum = _attend(q, k, v, i)
    return out, (q, k, v, i, out, logsum)


def _attend_backward(kept, g):
    q, k, v, i, out, logsum = kept
    c, scale = len(q), q.shape[-1] ** -0.5
    inner = jnp.einsum("tkgd,tkgd->kgt", g, out)

    def visit(j, carry):
        dq, dk, dv = carry
        score, keys = _scores(q, k, i * c, j, c)
        share = jnp.exp(score - logsum[..., None])
        ds = share * (jnp.einsum("tkgd,skd->kgts", g, lax.dynamic_slice_in_dim(v, j * c, c)) - inner[..., None]) * scale
        # Every block of keys is visited once in a chunk: its gradient is set, not added to.
        dk = lax.dynamic_update_slice_in_dim(dk, jnp.einsum("kgts,tkgd->skd", ds, q), j * c, 0)
        dv = lax.dynamic_update_slice_in_dim(dv, jnp.einsum("kgts,tkgd->skd", share, g), j * c, 0)
        return dq + jnp.einsum("kgts,skd->tkgd", ds, keys), dk, dv

    start = jnp.zeros_like(q), jnp.zeros_like(k), jnp.zeros_like(v)
    return *lax.fori_loop(0, i + 1, visit, start), None


prefix_attention.defvjp(_attend_forward, _attend_backward)


def _chunk(block: Block, h: Float[Array, "c d"], k: Array, v: Array, i: Int[Array, ""]) -> Float[Array, "c d"]:
    """The layer's output for chunk i, from that chunk of its input and the keys and values of the whole text."""
    q = block.q(h, i * len(h) + jnp.arange(len(h)))
    q = q.reshape(len(h), block.config.kv_heads, -1, q.shape[-1])
    return block.close(h, prefix_attention(q, k, v, i).reshape(len(h), -1))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def stream_layer(chunk: int, block: Block, h: Float[Array, "T d"]) -> Float[Array, "T d"]:
    """One layer in chunks, forwards and backwards; T is a multiple of `chunk`. Only its input is kept."""
    k, v = block.kv(h, jnp.arange(len(h)))
    chunks = jnp.arange(len(h) // chunk), h.reshape(-1, chunk, h.shape[-1])
    return lax.map(lambda x: _chunk(block, x[1], k, v, x[0]), chunks).reshape(h.shape)


def _layer_forward(chunk, block, h):
    return stream_layer(chunk, block, h), (block, h)


def _layer_backward(chunk, kept, g):
    block, h = kept
    (k, v), close_kv = jax.vjp(lambda block, h: block.kv(h, jnp.arange(len(h))), block, h)

    def visit(carry, x):
        i, h, g = x
        dblock, dh, dk, dv = jax.vjp(lambda block, h, k, v: _chunk(block, h, k, v, i), block, h, k, v)[1](g)
        return jax.tree.map(jnp.add, carry, (dblock, dk, dv)), dh

    nothing = jax.tree.map(jnp.zeros_like, (block, k, v))
    pieces = jnp.arange(len(h) // chunk), h.reshape(-1, chunk, h.shape[-1]), g.reshape(-1, chunk, g.shape[-1])
    (dblock, dk, dv), dh = lax.scan(visit, nothing, pieces)
    dblock_kv, dh_kv = close_kv((dk, dv))
    return jax.tree.map(jnp.add, dblock, dblock_kv), dh.reshape(h.shape) + dh_kv


stream_layer.defvjp(_layer_forward, _layer_backward)


def _padded(chunk: int, fill: int, x: Array) -> Array:
    """The rows of x in chunks, the last one filled up."""
    x = jnp.pad(x, [(0, -len(x) % chunk)] + [(0, 0)] * (x.ndim - 1), constant_values=fill)
    return x.reshape(-1, chunk, *x.shape[1:])


def _logps(head: Float[Array, "vocab d"], h: Float[Array, "n d"], labels: Int[Array, " n"]) -> Float[Array, " n"]:
    logp = -optax.softmax_cross_entropy_with_integer_labels(h @ head.T, jnp.maximum(labels, 0))
    return jnp.where(labels >= 0, logp, 0.0)


def chunked_logps(
    chunk: int, head: Float[Array, "vocab d"], h: Float[Array, "n d"], labels: Int[Array, " n"]
) -> Float[Array, " n"]:
    """Log-probability of each label, 0 where it is ignored; logits exist for one chunk at a time."""
    pieces = _padded(chunk, 0, h), _padded(chunk, IGNORED, labels)
    return lax.map(jax.checkpoint(lambda x: _logps(head, *x)), pieces).reshape(-1)[: len(h)]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def chunked_xent(
    chunk: int, head: Float[Array, "vocab d"], h: Float[Array, "n d"], labels: Int[Array, " n"]
) -> Float[Array, ""]:
    """Cross-entropy in nats, summed; its gradient is taken while a chunk's logits are there, so that they come once."""
    return -chunked_logps(chunk, head, h, labels).sum()


def _xent_forward(chunk, head, h, labels):
    def visit(carry, x):
        loss, (dhead, dh) = jax.value_and_grad(lambda head, h: -_logps(head, h, x[1]).sum(), (0, 1))(head, x[0])
        return (carry[0] + loss, carry[1] + dhead), dh

    pieces = _padded(chunk, 0, h), _padded(chunk, IGNORED, labels)
    (loss, dhead), dh = lax.scan(visit, (jnp.zeros(()), jnp.zeros_like(head)), pieces)
    return loss, (dhead, dh.reshape(-1, h.shape[-1])[: len(h)])


def _xent_backward(chunk, kept, g):
    return *jax.tree.map(lambda x: g * x, kept), None


chunked_xent.defvjp(_xent_forward, _xent_backward)


class Streamed(eqx.Module):
    """A model that is run in chunks: what the losses below are given."""

    model: Llama
    chunk: int = eqx.field(static=True)
    logits_chunk: int = eqx.field(static=True)

    def hidden(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T d"]:
        """The normalised output of the last layer, one text after the other."""
        T = tokens.shape[1]
        padded = jnp.pad(tokens, ((0, 0), (0, -T % self.chunk)))  # at the end, where no earlier token sees it
        return lax.map(lambda row: self.model.hidden(row, partial(stream_layer, self.chunk))[:T], padded)

    def xent(self, tokens: Int[Array, "B T"], labels: Int[Array, "B T"]) -> Float[Array, ""]:
        """Mean cross-entropy in nats over all labels that count; 0 if there are none."""
        h = self.hidden(tokens).reshape(-1, self.model.config.width)
        total: Any = chunked_xent(self.logits_chunk, self.model.head, h, labels.reshape(-1))
        return total / jnp.maximum((labels >= 0).sum(), 1)

    def logps(self, tokens: Int[Array, "B T"], labels: Int[Array, "B T"]) -> Float[Array, "B T"]:
        """Log-probability of each label, 0 where it is ignored."""
        h = self.hidden(tokens).reshape(-1, self.model.config.width)
        return chunked_logps(self.logits_chunk, self.model.head, h, labels.reshape(-1)).reshape(labels.shape)


class Pairs(NamedTuple):
    """Texts of which one is preferred to the other, for `dpo`."""

    tokens: Int[Array, "B 2 T"]
    """The preferred one first."""
    labels: Int[Array, "B 2 T"]
    reference: Float[Array, "B 2"]
    """Log-probability of each text under the reference model: the sum of its `Streamed.logps`."""


class Rollouts(NamedTuple):
    """Texts that a model wrote, and how much better than their group they are, for `grpo`."""

    tokens: Int[Array, "B T"]
    labels: Int[Array, "B T"]
    advantage: Float[Array, " B"]
    old: Float[Array, "B T"]
    """`Streamed.logps` of the model that wrote them."""
    reference: Float[Array, "B T"]
    """`Streamed.logps` of the reference model."""


def xent(model: Streamed, batch: tuple[Int[Array, "B T"], Int[Array, "B T"]], key: Any = None) -> Float[Array, ""]:
    """Mean cross-entropy of `(tokens, labels)`."""
    return model.xent(*batch)


def dpo(model: Streamed, batch: Pairs, key: Any = None, beta: float = 0.1) -> Float[Array, ""]:
    """Direct preference optimisation: Rafailov et al., arXiv 2305.18290, 2023."""
    T = batch.tokens.shape[-1]
    logps = model.logps(batch.tokens.reshape(-1, T), batch.labels.reshape(-1, T)).sum(-1).reshape(-1, 2)
    gain = logps - batch.reference
    return -jax.nn.log_sigmoid(beta * (gain[:, 0] - gain[:, 1])).mean()


def grpo(model: Streamed, batch: Rollouts, key: Any = None, clip: float = 0.2, beta: float = 0.04) -> Float[Array, ""]:
    """Group-relative policy optimisation: Shao et al., arXiv 2402.03300, 2024; a mean over tokens, then over texts."""
    counts = batch.labels >= 0
    logps = model.logps(batch.tokens, batch.labels)
    ratio, advantage = jnp.exp(logps - batch.old), batch.advantage[:, None]
    gain = jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - clip, 1 + clip) * advantage)
    away = batch.reference - logps
    loss = jnp.where(counts, beta * (jnp.exp(away) - away - 1) - gain, 0.0)
    return (loss.sum(-1) / jnp.maximum(counts.sum(-1), 1)).mean()


class StreamBP(Backprop):
    """The gradient of a language model's loss, with the activations of one chunk of one layer at a time.

    Raises:
        ValueError: if a chunk is empty.
        TypeError: if the model is not a `Llama`: chunks need causal attention and separate parts of a layer.
    """

    loss: Loss = eqx.field(static=True, default=xent)
    """`loss(model: Streamed, batch, key) -> scalar`."""
    chunk: int = eqx.field(static=True, default=512)
    """Tokens of a layer that are rebuilt together."""
    logits_chunk: int = eqx.field(static=True, default=512)
    """Tokens whose logits exist together."""

    def __check_init__(self):
        for name in ("chunk", "logits_chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def value_and_grad(self, model: M, batch: Any, key: PRNGKeyArray) -> tuple[Float[Array, ""], M]:
        if not isinstance(model, Llama):
            raise TypeError(f"StreamBP needs a Llama, got {type(model).__name__}")

        def loss(model, batch, key):
            return self.loss(Streamed(model, self.chunk, self.logits_chunk), batch, key)

        return eqx.filter_value_and_grad(loss)(model, batch, key)


def example() -> tuple[Sgd, Event]:
    """A tiny model that learns 12 short texts as they come."""
    model = Llama(Config(vocab=7, width=8, layers=2, heads=2, kv_heads=1, hidden=12), key=jax.random.PRNGKey(0))
    tokens = np.random.default_rng(0).integers(0, 7, (12, 10)).astype(np.int32)
    labels = np.asarray(next_tokens(jnp.asarray(tokens)))
    events = Event(tokens, Maybe(labels, np.ones(12, bool)), np.ones(12, np.float32))
    return Sgd(model, optax.sgd(0.1), StreamBP(chunk=4, logits_chunk=4)), events
