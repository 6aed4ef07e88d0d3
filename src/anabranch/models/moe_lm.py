"""A small language model over bytes with a sparse mixture of experts in every layer, after Jiang et al., "Mixtral of
Experts", arXiv 2401.04088, 2024.

It is the model of `models/llama.py` with another MLP: of E experts the k likeliest work on each token. So a `Decoder`
makes it a cell, whose state is what attention remembers, and whatever works on a `Decoder` works on it.

    >>> tiny = MoELM(Config(vocab=11, width=8, layers=2, heads=4, kv_heads=2, hidden=16), key=jax.random.PRNGKey(0))
    >>> tokens = jnp.array([3, 1, 4])
    >>> logits, router = tiny.routed(tokens[None])  # a batch of one text
    >>> logits.shape, router.shape, choose(router, jnp.arange(2)).expert.shape
    ((1, 3, 11), (2, 1, 3, 8), (2, 1, 3, 2))
    >>> cell = Decoder(tiny, size=16)
    >>> state, streamed = cell.advance(cell.init(), tokens)
    >>> bool(jnp.allclose(streamed, logits[0], atol=1e-5))
    True

Which experts work is an argument: `ranks` in the order of the router. `trace` reads the router's logits on a stream,
and `ranked` gives a cell that takes experts of other ranks:

    >>> state, weak, _ = trace(ranked(cell, jnp.array([2])), cell.init(), tokens)
    >>> bool(jnp.allclose(weak, streamed, atol=1e-5))
    False

`load` gives trained weights (`training/moe_lm.py`): `"strong"`, whose experts were made to share the work evenly,
`"light"`, whose experts hardly were, and `"wide"`, as strong with 16 experts. The first two read verse, Python and
rows of a table of flights: held-out text at 2.4, 2.1 and 1.1 bits a byte. Taken together, all experts have 0.09 to
0.16 of the work of their layer (strong) or 0.07 to 0.18 (light), where 0.125 is even; of one kind of text alone,
0.002 to 0.4 in both, for experts come to know their kind. The third reads them at 2.4, 2.1 and 1.2 bits, with 0.03 to
0.10 of the work for each expert, where 0.0625 is even.
"""

from dataclasses import dataclass, replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from anabranch import train
from anabranch.cell import noise
from anabranch.layers.experts import choose, dispatch
from anabranch.layers.linear import Int8Linear, Linear
from anabranch.models import llama
from anabranch.models.llama import Block, Decoder, Layer, Llama, Session, rms_norm


@dataclass(frozen=True)
class Config(llama.Config):
    """Sizes; `hidden` is the width inside one expert.

    Raises:
        ValueError: if a size does not fit, or `chosen` is not in 1 to `experts`.
    """

    experts: int = 8
    """In each layer, E."""
    chosen: int = 2
    """That work on a token, k."""

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.chosen <= self.experts:
            raise ValueError(f"chosen must be in 1 to experts={self.experts}, got {self.chosen}")


SIZES = Config(
    vocab=256, width=64, layers=4, heads=4, kv_heads=4, hidden=128, rope_base=10_000.0, context=128, experts=8, chosen=2
)
"""Of the trained models: 870,000 weights, of which a token meets a third."""
WIDE = replace(SIZES, experts=16)
"""Of the one with more experts: 1.7 million weights."""


def _expert(linears: tuple[Linear | Int8Linear, Linear | Int8Linear], x: Float[Array, "n d"]) -> Float[Array, "n d"]:
    """One expert at work: a gated MLP."""
    gate_up, down = linears
    gate, up = jnp.split(gate_up(x), 2, -1)
    return down(jax.nn.silu(gate) * up)


class MoEBlock(Block):
    """One layer: attention, then a mixture of experts; `gate`, `up` and `down` have a leading axis of E."""

    config: Config = eqx.field(static=True)  # pyright: ignore
    router: Float[Array, "E d"] = eqx.field(kw_only=True)

    @classmethod
    def random(cls, config: Config, key: PRNGKeyArray) -> "MoEBlock":  # pyright: ignore
        """Normal weights that keep the size of what goes through them, for a deviation of 0.02 is for wide models; in
        the router it is the usual one, so that experts begin nearly alike."""
        E, d, hidden = config.experts, config.width, config.hidden
        shapes = {"router": (E, d), "gate": (E, hidden, d), "up": (E, hidden, d), "down": (E, d, hidden)}
        drawn = {name: 0.02 * jax.random.normal(noise(key, 0, name), shape) for name, shape in shapes.items()}
        block = cls(**vars(Block.random(config, key)) | drawn)  # pyright: ignore
        kept = lambda w: w if w.ndim == 1 or w is block.router else w / (0.02 * w.shape[-1] ** 0.5)
        return jax.tree.map(kept, block)

    def routed(self, h: Float[Array, "T d"]) -> Float[Array, "T E"]:
        """The router's logits, from what comes out of attention."""
        return rms_norm(h, self.mlp_norm, self.config.eps) @ self.router.T

    def mlp(self, h: Float[Array, "T d"], ranks: Int[Array, " k"] | None = None) -> Float[Array, "T d"]:
        """What the experts add; of other ranks than the first `chosen`, if said."""
        ranks = jnp.arange(self.config.chosen) if ranks is None else ranks
        side = lambda *ws: Linear(jnp.concatenate(ws, -2).swapaxes(-1, -2))
        experts = side(self.gate, self.up), side(self.down)
        return dispatch(_expert, experts, rms_norm(h, self.mlp_norm, self.config.eps), choose(self.routed(h), ranks))

    def layer(self) -> "MoELayer":
        return MoELayer(**vars(Layer.of(self)), router=self.router.T, ranks=jnp.arange(self.config.chosen))


class MoELM(Llama):
    """A causal language model with experts: logits f32[T, vocab] of the token after each of T tokens i32[T]."""

    blocks: MoEBlock  # pyright: ignore
    config: Config = eqx.field(static=True)  # pyright: ignore

    def __init__(self, config: Config = SIZES, *, key: PRNGKeyArray):
        """Random weights."""
        super().__init__(config, key=key, block=MoEBlock)

    def routed(
        self, tokens: Int[Array, "B T"], ranks: Int[Array, " k"] | None = None
    ) -> tuple[Float[Array, "B T vocab"], Float[Array, "L B T E"]]:
        """The logits for B texts, whose tokens go through the experts together, and those of the routers.

        Arguments:
            ranks: of the experts that work, in the order of the router; see `layers.experts.choose`.
        """

        def layer(h: Float[Array, "B T d"], block: MoEBlock) -> tuple[Array, Array]:
            attended = jax.vmap(lambda h: block.attend(*block.qkv(h, jnp.arange(len(h)))))(h)
            h = h + attended @ block.wo.T
            flat = h.reshape(-1, h.shape[-1])
            return h + block.mlp(flat, ranks).reshape(h.shape), block.routed(h)

        h, router = lax.scan(layer, self.embedding[tokens], self.blocks)
        return rms_norm(h, self.norm, self.config.eps) @ self.head.T, router


class MoELayer(Layer):
    """A block with experts arranged for decoding: `gate_up` and `down` have a leading axis of E."""

    router: Float[Array, "d E"]
    ranks: Int[Array, " k"]
    """Of the experts that work."""

    def routed(self, h: Float[Array, "T d"]) -> Float[Array, "T E"]:
        """The router's logits, from what `attend` gives; another layer's guess at them, from what its own gives."""
        return rms_norm(h, self.mlp_norm, self.config.eps) @ self.router

    def mlp(self, h: Float[Array, "T d"]) -> Float[Array, "T d"]:
        x = rms_norm(h, self.mlp_norm, self.config.eps)
        return dispatch(_expert, (self.gate_up, self.down), x, choose(self.routed(h), self.ranks))


def ranked(cell: Decoder, ranks: Int[Array, " k"]) -> Decoder:
    """The same model with the experts of these ranks at work in each layer: 0 is the router's first choice.

    Ranks may be traced. One outside of 0 to E - 1 is no expert, so that rows of unlike length fit into one `vmap`.

    Raises:
        ValueError: if it is not one row of ranks.
    """
    ranks = jnp.asarray(ranks, jnp.int32)
    if ranks.ndim != 1 or not len(ranks):
        raise ValueError(f"ranks must be one row of at least one rank, got the shape {ranks.shape}")
    return eqx.tree_at(lambda cell: [layer.ranks for layer in cell.layers], cell, [ranks] * len(cell.layers))


def trace(
    cell: Decoder, state: Session, xs: Int[Array, " T"]
) -> tuple[Session, Float[Array, "T vocab"], Float[Array, "L T E"]]:
    """As `cell.advance`, with the logits of the router of each layer; no more tokens than its memory has room for.

    `layers.experts.choose(router, ranks)` says which experts worked, and with which weights.
    """
    h, positions = cell.embedding[xs], state.length + jnp.arange(len(xs))
    memory, router = [], []
    for layer, held in zip(cell.layers, state.memory, strict=True):
        h, new = layer.attend(h, positions, held.extend)
        router.append(layer.routed(h))  # pyright: ignore
        h = h + layer.mlp(h)
        memory.append(new)
    session = Session(cell.keep.settle(tuple(memory)), state.length + len(xs))
    return session, cell.logits(h), jnp.stack(router)


def cast(model: MoELM, dtype: Any) -> MoELM:
    """The weights in another precision: in files they take two bytes each."""
    return jax.tree.map(lambda x: x.astype(dtype) if eqx.is_inexact_array(x) else x, model)


def sizes(name: str) -> Config:
    """Of the trained weights of this name."""
    return WIDE if name == "wide" else SIZES


def load(name: str) -> MoELM:
    """Trained weights: `"strong"`, `"light"` or `"wide"`.

    Raises:
        FileNotFoundError: they are not there.
    """
    shapes = eqx.filter_eval_shape(MoELM, sizes(name), key=jax.random.PRNGKey(0))
    blank = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float16) if hasattr(x, "shape") else x, shapes)
    return cast(train.load(f"moe_lm:{name}", blank), jnp.float32)
