"""Small networks beside a frozen language model, trained on what it thinks: a draft, and exits from its middle.

The draft has the shape of EAGLE (Li et al., arXiv 2401.15077, 2024): the embedding of a token and the *feature* of the
model before it (what its last layer gave, scaled to a mean square of one) become, in one layer, the feature after it,
and the model's own unembedding makes of that a guess at the token to come. As in "Speculative Streaming" (Bhendawade et
al., arXiv 2402.11131, 2024) one step may give two tokens: `pair` guesses the feature after the next token from that
token and the feature before it. An exit makes of a layer in the middle what the last one is going to say.

    >>> from anabranch.models.llama import Llama
    >>> config = Config(vocab=11, width=8, layers=3, heads=2, kv_heads=1, hidden=16)
    >>> heads = Heads.random(config, hidden=12, ids=jnp.arange(5), exits=(1, 2), key=jax.random.PRNGKey(0))
    >>> target = Decoder(Llama(config, key=jax.random.PRNGKey(1)), size=16)
    >>> draft = FeatureDraft(target, heads, size=16)
    >>> state = draft.read(draft.init(), jnp.array([3, 1]), jnp.ones((2, 8)), jnp.int32(2))
    >>> draft.propose(state, jax.random.PRNGKey(0), 4, None).tokens.shape
    (4,)

The heads guess among the `ids` only, the tokens that are frequent. `smollm2_heads` gives those of SmolLM2-135M, made by
`training/smollm2_heads.py`.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from anabranch import train
from anabranch.cell import noise
from anabranch.decode.drafts import Drafted, Network, Rule
from anabranch.layers.kv import KV
from anabranch.layers.linear import Int8Linear, Linear, quantise
from anabranch.models.llama import Block, Config, Decoder, Layer, int8, rms_norm


def unit(h: Float[Array, "T d"]) -> Float[Array, "T d"]:
    """Rows of a mean square of one."""
    return rms_norm(h, jnp.ones(h.shape[-1]), 1e-5)


class Exit(eqx.Module):
    """From the feature of a layer in the middle to that of the last: what is added has a low rank."""

    scale: Float[Array, " d"]
    down: Linear | Int8Linear
    up: Linear | Int8Linear

    def __call__(self, h: Float[Array, "T d"]) -> Float[Array, "T d"]:
        u = unit(h)
        return u * self.scale + self.up(self.down(u))


class Heads(eqx.Module):
    """What is trained; see the module."""

    join: Linear | Int8Linear
    """Of a token and the feature before it."""
    layer: Layer
    first: Linear | Int8Linear
    second: Linear | Int8Linear
    """Of a token and the feature before it too, without looking at the text."""
    exits: tuple[Exit, ...]
    ids: Int[Array, " v"]
    at: tuple[int, ...] = eqx.field(static=True)
    """The layers after which the exits are."""

    @classmethod
    def random(
        cls, config: Config, hidden: int, ids: Int[Array, " v"], exits: tuple[int, ...], *, key: PRNGKeyArray
    ) -> "Heads":
        """Untrained heads for a model of these sizes: at first a feature stays what it was.

        Arguments:
            hidden: width inside the MLP of the layer.
        """
        d = config.width
        low = min(64, d)
        sizes = Config(
            vocab=config.vocab, width=d, layers=1, heads=config.heads, kv_heads=config.kv_heads, hidden=hidden,
            rope_base=config.rope_base, eps=config.eps,
        )  # fmt: skip
        draw = lambda use, *shape: 0.02 * jax.random.normal(noise(key, 0, use), shape)
        join = draw("join", 2 * d, d).at[d:].add(jnp.eye(d))
        out = tuple(Exit(jnp.ones(d), Linear(draw(f"exit {i}", d, low)), Linear(jnp.zeros((low, d)))) for i in exits)
        layer = Layer.of(Block.random(sizes, noise(key, 0, "layer")))
        pair = Linear(draw("pair", 2 * d, low * 4)), Linear(jnp.zeros((low * 4, d)))
        return cls(Linear(join), layer, *pair, out, ids.astype(jnp.int32), tuple(exits))

    def read(
        self, tokens: Float[Array, "T d"], features: Float[Array, "T d"], positions: Int[Array, " T"], extend: Any
    ) -> tuple[Float[Array, "T d"], Any]:
        """The features after these tokens, given as embeddings, from those before; see `layers.kv` for `extend`."""
        x = self.join(jnp.concatenate([unit(tokens), features], -1))
        h, memory = self.layer(x, positions, extend)
        return unit(h), memory

    def pair(self, token: Float[Array, "T d"], feature: Float[Array, "T d"]) -> Float[Array, "T d"]:
        """A guess at the feature after a token, without reading the text."""
        x = jnp.concatenate([unit(token), feature], -1)
        return unit(feature + self.second(jax.nn.silu(self.first(x))))

    def exit(self, layer: int) -> Exit:
        """The exit after this layer.

        Raises:
            ValueError: if there is none.
        """
        if layer not in self.at:
            raise ValueError(f"layer must be one of those with an exit, {self.at}, got {layer}")
        return self.exits[self.at.index(layer)]


class Frequent(eqx.Module):
    """The unembedding of a model for some of its tokens, in int8."""

    norm: Float[Array, " d"]
    rows: Linear | Int8Linear
    ids: Int[Array, " v"]
    vocab: int = eqx.field(static=True)
    eps: float = eqx.field(static=True)

    @classmethod
    def of(cls, target: Decoder, ids: Int[Array, " v"]) -> "Frequent":
        """Of this model, for these tokens."""
        head = target.head
        if isinstance(head, Int8Linear):
            rows = Int8Linear(head.w[:, ids], head.sums[ids], head.scale[ids])
        else:
            rows = quantise(Linear(head.w[:, ids]))
        return cls(target.norm, rows, ids, target.config.vocab, target.config.eps)

    def __call__(self, h: Float[Array, "T d"]) -> Float[Array, "T v"]:
        """Logits, from what the last layer gives."""
        return self.rows(rms_norm(h, self.norm, self.eps))


class Feature(NamedTuple):
    """What has been read of a text."""

    memory: KV
    length: Int[Array, ""]
    feature: Float[Array, " d"]
    """After its last token, as the draft sees it."""


class FeatureDraft(Network):
    """Guesses from the features of the model where it has read, and from its own where it has not.

    Arguments:
        target: the model, of which it takes the embedding and the unembedding.
        size: tokens for which there is room.
        pairs: whether a step guesses two tokens, so that half as many steps are needed.
    """

    heads: Heads
    embedding: Float[Array, "vocab d"]
    frequent: Frequent
    size: int = eqx.field(static=True)
    pairs: bool = eqx.field(static=True)

    def __init__(self, target: Decoder, heads: Heads, size: int, pairs: bool = False):
        self.heads, self.embedding, self.size, self.pairs = heads, target.embedding, size, pairs
        self.frequent = Frequent.of(target, heads.ids)

    def init(self) -> Feature:
        config = self.heads.layer.config
        memory = KV.empty(config.kv_heads, self.size, config.head_width)
        return Feature(memory, jnp.int32(0), jnp.zeros(config.width))

    def read(self, state, tokens, hidden, n):
        after, memory = self._read(state, tokens, unit(hidden))
        feature = after[jnp.maximum(n - 1, 0)]
        return Feature(memory, state.length + n, jnp.where(n > 0, feature, state.feature))

    def follow(self, state, token):
        [feature], memory = self._read(state, token[None], state.feature[None])
        return Feature(memory, state.length + 1, feature)

    def _read(self, state: Feature, tokens: Int[Array, " T"], before: Float[Array, "T d"]) -> tuple[Array, KV]:
        positions = state.length + jnp.arange(len(tokens))
        return self.heads.read(self.embedding[tokens], before, positions, state.memory.extend)

    def logits(self, state):
        return self.frequent(state.feature[None])[0]

    def name(self, i):
        return self.frequent.ids[i]

    def spread(self, x):
        return jnp.full(self.frequent.vocab, -jnp.inf).at[self.frequent.ids].set(x)

    def propose(self, state: Feature, key: PRNGKeyArray, window: int, rule: Rule) -> Drafted:
        if not self.pairs:
            return super().propose(state, key, window, rule)

        def two(state, i):
            first = self.guess(state, noise(key, i, "first"), rule)
            between = self.heads.pair(self.embedding[first[0]][None], state.feature[None])
            second = self.drawn(self.frequent(between)[0], noise(key, i, "second"), rule)
            features = jnp.concatenate([state.feature[None], between])
            return features, jax.tree.map(lambda *x: jnp.stack(x), first, second)

        def one(carry, i):
            state, (features, said) = carry
            after, memory = self._read(state, said[0], features)
            state = Feature(memory, state.length + 2, after[1])
            now = two(state, i)
            return (state, (now[0], now[1])), now[1]

        begun = two(state, 0)
        _, rest = lax.scan(one, (state, begun), jnp.arange(1, -(-window // 2)))
        whole = jax.tree.map(
            lambda a, b: jnp.concatenate([a[None], b]).reshape(-1, *a.shape[1:])[:window], begun[1], rest
        )
        tokens, logq, sure, _ = whole
        return Drafted(tokens, jnp.int32(window), logq, sure)


def smollm2_heads() -> Heads:
    """Those of SmolLM2-135M, with exits after layers 15, 20 and 25.

    Raises:
        FileNotFoundError: their weights are not there.
    """
    blank = Heads.random(Config(), 1024, jnp.zeros(8192, jnp.int32), (15, 20, 25), key=jax.random.PRNGKey(0))
    return train.load("smollm2_heads", int8(blank))
