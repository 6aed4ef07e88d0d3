"""The Llama family of causal language models (Llama, SmolLM2, Qwen2), after Touvron et al., arXiv 2302.13971, 2023.

`Llama` is the form to train. It takes the tokens of one text and gives the logits of the token after each:

    >>> tiny = Llama(Config(vocab=11, width=8, layers=2, heads=4, kv_heads=2, hidden=16), key=jax.random.PRNGKey(0))
    >>> tokens = jnp.array([3, 1, 4])
    >>> tiny(tokens).shape
    (3, 11)

The blocks of all layers are one `Block` whose arrays have a leading axis, the layer: `hidden` scans over it. The parts
of a block are separate methods, so that they can be run on a piece of the text.

`Decoder` is the form that lives on a stream: a cell that takes tokens one by one, or many at once, and whose state is
what attention remembers. Each layer has its own arrays, which a driver that donates the state updates in place.

    >>> cell = Decoder(tiny, size=16)
    >>> state, logits = cell.advance(cell.init(), tokens)
    >>> bool(jnp.allclose(logits, tiny(tokens), atol=1e-5))
    True
    >>> state, after = cell.step(state, jnp.int32(1))
    >>> int(state.length), after.shape
    (4, (11,))

`anabranch.models.weights` loads both from files.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from anabranch.cell import Cell, noise
from anabranch.layers.kv import Keeper, Room
from anabranch.layers.linear import Int8Linear, Linear, quantise

M = TypeVar("M")


LENGTHS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
"""Tokens that come at once are filled up to one of these, so that there is one program for each."""


def filled(n: int) -> int:
    """The length to which n tokens are filled up.

    >>> filled(100), filled(9000)
    (128, 9000)
    """
    return next((length for length in LENGTHS if length >= n), n)


@dataclass(frozen=True)
class Config:
    """The sizes of a model; those of SmolLM2-135M unless said.

    Raises:
        ValueError: if a size is not positive, the query heads do not share the key heads evenly, or the width of a
            head is odd.
    """

    vocab: int = 49_152
    width: int = 576
    layers: int = 30
    heads: int = 9
    kv_heads: int = 3
    hidden: int = 1536
    """Width inside the MLP."""
    rope_base: float = 100_000.0
    rope_factors: tuple[float, ...] = ()
    """By how much each of the D / 2 frequencies is slowed, as in Llama 3.1; by default not at all."""
    eps: float = 1e-5
    tied: bool = True
    """Whether the embedding of tokens also makes the logits."""
    bias: bool = False
    """Whether queries, keys and values have one, as in Qwen2."""
    context: int = 8192
    """Tokens that a text had in training."""

    def __post_init__(self):
        for name in ("vocab", "width", "layers", "heads", "kv_heads", "hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads={self.kv_heads}, got {self.heads}")
        if self.width % (2 * self.heads):
            raise ValueError(f"width must be a multiple of 2 * heads={2 * self.heads}, got {self.width}")
        if len(self.rope_factors) not in (0, self.head_width // 2):
            raise ValueError(f"rope_factors must have {self.head_width // 2} numbers, got {len(self.rope_factors)}")

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def frequencies(self) -> Float[np.ndarray, " D/2"]:
        """The angles by which a position turns the pairs of features of a head."""
        half = self.head_width // 2
        return (self.rope_base ** (-np.arange(half) / half) / (self.rope_factors or 1.0)).astype(np.float32)


def rms_norm(x: Float[Array, "T d"], scale: Float[Array, " d"], eps: float) -> Float[Array, "T d"]:
    """Scales each row to a mean square of one."""
    return x * lax.rsqrt((x * x).mean(-1, keepdims=True) + eps) * scale


def rope(
    x: Float[Array, "T n D"], positions: Int[Array, "T *axes"], frequencies: Float[np.ndarray, "*axes D/2"]
) -> Float[Array, "T n D"]:
    """Turns pairs of features (i, i + D/2) by an angle that grows with the position, or with those on several axes."""
    angle = positions[:, None] * frequencies if positions.ndim == 1 else positions @ frequencies
    cos, sin = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


class Block(eqx.Module):
    """One layer: attention with `heads` queries that share `kv_heads` keys, then a gated MLP, both residual."""

    attention_norm: Float[Array, " d"]
    wq: Float[Array, "heads*D d"]
    wk: Float[Array, "kv*D d"]
    wv: Float[Array, "kv*D d"]
    wo: Float[Array, "d heads*D"]
    mlp_norm: Float[Array, " d"]
    gate: Float[Array, "hidden d"]
    up: Float[Array, "hidden d"]
    down: Float[Array, "d hidden"]
    config: Config = eqx.field(static=True)
    bq: Float[Array, "heads*D"] | None = None
    bk: Float[Array, "kv*D"] | None = None
    bv: Float[Array, "kv*D"] | None = None

    @classmethod
    def random(cls, config: Config, key: PRNGKeyArray) -> "Block":
        """Normal weights of deviation 0.02, biases of 0."""
        d, hidden, kv = config.width, config.hidden, config.kv_heads * config.head_width
        shapes = [(d, d), (kv, d), (kv, d), (d, d), (hidden, d), (hidden, d), (d, hidden)]
        wq, wk, wv, wo, gate, up, down = (
            0.02 * jax.random.normal(noise(key, i), shape) for i, shape in enumerate(shapes)
        )
        biases = [jnp.zeros(d), jnp.zeros(kv), jnp.zeros(kv)] if config.bias else []
        return cls(jnp.ones(d), wq, wk, wv, wo, jnp.ones(d), gate, up, down, config, *biases)

    def q(self, h: Float[Array, "T d"], positions: Int[Array, " T"]) -> Float[Array, "T heads D"]:
        """The queries."""
        x = rms_norm(h, self.attention_norm, self.config.eps)
        q = _linear(x, self.wq, self.bq).reshape(len(h), self.config.heads, -1)
        return rope(q, positions, self.config.frequencies)

    def kv(
        self, h: Float[Array, "T d"], positions: Int[Array, " T"]
    ) -> tuple[Float[Array, "T kv D"], Float[Array, "T kv D"]]:
        """The keys and the values."""
        x = rms_norm(h, self.attention_norm, self.config.eps)
        pairs = (self.wk, self.bk), (self.wv, self.bv)
        k, v = (_linear(x, w, b).reshape(len(h), self.config.kv_heads, -1) for w, b in pairs)
        return rope(k, positions, self.config.frequencies), v

    def qkv(self, h: Float[Array, "T d"], positions: Int[Array, " T"]) -> tuple[Array, Array, Array]:
        """Queries, keys and values."""
        return self.q(h, positions), *self.kv(h, positions)

    def attend(self, q: Float[Array, "T heads D"], k: Float[Array, "T kv D"], v: Float[Array, "T kv D"]) -> Array:
        """What each token takes from itself and those before it: f32[T, heads * D]."""
        T, _, D = q.shape
        grouped = q.reshape(T, self.config.kv_heads, -1, D)
        score = jnp.einsum("tkgd,skd->kgts", grouped, k) * D**-0.5
        share = jax.nn.softmax(jnp.where(jnp.tri(T, dtype=bool), score, -jnp.inf))
        return jnp.einsum("kgts,skd->tkgd", share, v).reshape(T, -1)

    def mlp(self, h: Float[Array, "T d"]) -> Float[Array, "T d"]:
        """What the MLP adds."""
        x = rms_norm(h, self.mlp_norm, self.config.eps)
        return (jax.nn.silu(x @ self.gate.T) * (x @ self.up.T)) @ self.down.T

    def close(self, h: Float[Array, "T d"], attended: Float[Array, "T heads*D"]) -> Float[Array, "T d"]:
        """The output of the layer, from its input and what was attended to. Works on any piece of the text."""
        h = h + attended @ self.wo.T
        return h + self.mlp(h)

    def __call__(self, h: Float[Array, "T d"]) -> Float[Array, "T d"]:
        return self.close(h, self.attend(*self.qkv(h, jnp.arange(len(h)))))

    def layer(self) -> "Layer":
        """The block arranged for decoding."""
        return Layer.of(self)


def _linear(x: Float[Array, "T in"], w: Float[Array, "out in"], b: Float[Array, " out"] | None) -> Array:
    return x @ w.T if b is None else x @ w.T + b


class Llama(eqx.Module):
    """A causal language model: logits f32[T, vocab] of the token after each of T tokens i32[T]."""

    embedding: Float[Array, "vocab d"]
    blocks: Block
    """Every array with a leading axis, the layer."""
    norm: Float[Array, " d"]
    own_head: Float[Array, "vocab d"] | None
    """Makes the logits where they are not tied to the embedding."""
    config: Config = eqx.field(static=True)

    def __init__(self, config: Config, *, key: PRNGKeyArray, block: type[Block] = Block):
        """Random weights, in blocks of this kind."""
        self.config = config
        shape = (config.vocab, config.width)
        self.embedding = 0.02 * jax.random.normal(noise(key, 0, "embedding"), shape)
        self.own_head = None if config.tied else 0.02 * jax.random.normal(noise(key, 0, "head"), shape)
        keys = jax.vmap(lambda i: noise(key, i, "block"))(jnp.arange(config.layers))
        self.blocks = eqx.filter_vmap(lambda key: block.random(config, key))(keys)
        self.norm = jnp.ones(config.width)

    @property
    def head(self) -> Float[Array, "vocab d"]:
        """What makes the logits."""
        return self.embedding if self.own_head is None else self.own_head

    def hidden(self, tokens: Int[Array, " T"], layer: Any = Block.__call__) -> Float[Array, "T d"]:
        """The normalised output of the last layer; `layer(block, h) -> h` may be run another way."""
        h, _ = lax.scan(lambda h, block: (layer(block, h), None), self.embedding[tokens], self.blocks)
        return rms_norm(h, self.norm, self.config.eps)

    def __call__(self, tokens: Int[Array, " T"]) -> Float[Array, "T vocab"]:
        return self.hidden(tokens) @ self.head.T


class Layer(eqx.Module):
    """A block arranged for decoding: matrices (in, out), and those with the same input side by side."""

    attention_norm: Float[Array, " d"]
    qkv: Linear | Int8Linear
    out: Linear | Int8Linear
    mlp_norm: Float[Array, " d"]
    gate_up: Linear | Int8Linear
    down: Linear | Int8Linear
    config: Config = eqx.field(static=True)

    @classmethod
    def of(cls, block: Block) -> "Layer":
        side = lambda *ws: Linear(jnp.concatenate(ws, -2).swapaxes(-1, -2))
        qkv = side(block.wq, block.wk, block.wv)
        if block.bq is not None and block.bk is not None and block.bv is not None:
            qkv = Linear(qkv.w, jnp.concatenate([block.bq, block.bk, block.bv]))
        return cls(
            block.attention_norm, qkv, side(block.wo), block.mlp_norm, side(block.gate, block.up), side(block.down),
            block.config,
        )  # fmt: skip

    def __call__(self, h: Float[Array, "T d"], positions: Int[Array, " T"], extend: Any) -> tuple[Array, Any]:
        """The output of the layer for tokens at these positions, and its memory: see `layers.kv` for `extend`."""
        h, memory = self.attend(h, positions, extend)
        return h + self.mlp(h), memory

    def attend(self, h: Float[Array, "T d"], positions: Int[Array, " T"], extend: Any) -> tuple[Array, Any]:
        """The first half of the layer: its input with what attention adds, and its memory."""
        config = self.config
        x = self.qkv(rms_norm(h, self.attention_norm, config.eps)).reshape(len(h), -1, config.head_width)
        q, k, v = jnp.split(x, [config.heads, config.heads + config.kv_heads], axis=1)
        rotate = lambda x, at: rope(x, at, config.frequencies)
        attended, memory = extend(q, k, v, positions, rotate)
        return h + self.out(attended), memory

    def mlp(self, h: Float[Array, "T d"]) -> Float[Array, "T d"]:
        """What the MLP adds."""
        gate, up = jnp.split(self.gate_up(rms_norm(h, self.mlp_norm, self.config.eps)), 2, -1)
        return self.down(jax.nn.silu(gate) * up)


class Session(NamedTuple):
    """One text so far."""

    memory: tuple[Any, ...]
    """Of each layer; see `layers.kv`."""
    length: Int[Array, ""]
    """Tokens in it."""


class Decoder(Cell):
    """A language model on a stream of tokens i32[]: the logits f32[vocab] of the next one.

    State: `Session`. By default keys and values of at most `size` tokens in each layer; logits of tokens that find no
    room are NaN, and to roll back is to set `length` to an earlier one. Or a memory that forgets: `keep.memory`. Many
    sessions are `jax.vmap`; those that take turns, `rows`.

    Raises:
        ValueError: if `size` is not positive.
    """

    embedding: Float[Array, "vocab d"]
    layers: tuple[Layer, ...]
    norm: Float[Array, " d"]
    head: Linear | Int8Linear
    keep: Keeper
    config: Config = eqx.field(static=True)

    def __init__(self, model: Llama, size: int = 0, *, keep: Keeper | None = None):
        self.keep = Room(size) if keep is None else keep
        blocks = [jax.tree.map(lambda x, i=i: x[i], model.blocks) for i in range(model.config.layers)]
        self.layers = tuple(block.layer() for block in blocks)
        self.embedding, self.norm, self.head = model.embedding, model.norm, Linear(model.head.T)
        self.config = model.config

    @property
    def size(self) -> int:
        """Tokens for which there is room.

        Raises:
            AttributeError: if its memory forgets, so that there is always room.
        """
        if not isinstance(self.keep, Room):
            raise AttributeError(f"the memory of this model is {type(self.keep).__name__}, which has no size")
        return self.keep.size

    def init(self, *, key: PRNGKeyArray | None = None) -> Session:
        config = self.config
        memory = tuple(self.keep.empty(config.kv_heads, config.head_width) for _ in self.layers)
        return Session(memory, jnp.zeros((), jnp.int32))

    def step(self, state: Session, x: Int[Array, ""]) -> tuple[Session, Float[Array, " vocab"]]:
        state, logits = self.advance(state, x[None])
        return state, logits[0]

    def advance(self, state: Session, xs: Int[Array, " T"]) -> tuple[Session, Float[Array, "T vocab"]]:
        """Many tokens at once; with a memory that forgets, as many as it has room for, and then as many again."""
        room = getattr(self.keep, "room", len(xs))
        if len(xs) > room:
            whole = len(xs) // room * room
            blocks = xs[:whole].reshape(-1, room)
            state, logits = lax.scan(lambda state, block: self.advance(state, block), state, blocks)
            logits = logits.reshape(whole, -1)
            if whole == len(xs):
                return state, logits
            state, rest = self.advance(state, xs[whole:])
            return state, jnp.concatenate([logits, rest])
        positions = state.length + jnp.arange(len(xs))
        h, memory = self.run_layers(self.embedding[xs], state.memory, positions)
        return Session(self.keep.settle(memory), state.length + len(xs)), self.logits(h)

    def prefill(
        self, state: Session, xs: Int[Array, " T"], n: Int[Array, ""]
    ) -> tuple[Session, Float[Array, " vocab"]]:
        """Take the first n of T tokens, and give the logits after the last of them only.

        Raises:
            TypeError: if its memory forgets, which would keep the others too.
        """
        if not isinstance(self.keep, Room):
            raise TypeError(f"prefill fills a text up, which {type(self.keep).__name__} would remember: use advance")
        positions = state.length + jnp.arange(len(xs))
        h, memory = self.run_layers(self.embedding[xs], state.memory, positions)
        return Session(memory, state.length + n), self.logits(lax.dynamic_slice_in_dim(h, n - 1, 1))[0]

    def run_layers(
        self,
        h: Float[Array, "T d"],
        memory: Sequence[Any],
        positions: Int[Array, " T"],
        low: int = 0,
        high: int | None = None,
        **asked: Any,
    ) -> tuple[Float[Array, "T d"], tuple[Any, ...]]:
        """Some of the layers; the others' memory stays as it is.

        A memory is anything that extends as `KV` does; what else it asks for, `asked` gives.
        """
        new = list(memory)
        for i in range(len(self.layers))[low:high]:
            h, new[i] = self.layers[i](h, positions, partial(memory[i].extend, **asked))
        return h, tuple(new)

    def logits(self, h: Float[Array, "T d"]) -> Float[Array, "T vocab"]:
        """What comes out of the last layer, as logits."""
        return self.head(rms_norm(h, self.norm, self.config.eps))

    def rows(
        self,
        memory: tuple[Any, ...],
        xs: Int[Array, " R"],
        positions: Int[Array, " R"],
        stream: Int[Array, " R"],
    ) -> tuple[tuple[Any, ...], Float[Array, "R vocab"]]:
        """One token each for R of N streams whose memories are kept together; a stream of N or more is none."""
        h, new = self.run_layers(self.embedding[xs], memory, positions, stream=stream)
        return self.keep.settle_rows(new, stream), self.logits(h)


def int8(model: M) -> M:
    """All matrices in int8: a quarter of the bytes. SmolLM2's perplexity is 0.3 % (code) to 0.8 % (verse) higher."""
    is_linear = lambda x: isinstance(x, Linear)
    return jax.tree.map(lambda x: quantise(x) if is_linear(x) else x, model, is_leaf=is_linear)
