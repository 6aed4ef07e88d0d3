"""TETRIS: of the tokens that were drafted for all streams, verify those that are likeliest to survive.

Wu, Zhou, Verma, Prakash, Rus and Low, "TETRIS: Optimal Draft Token Selection for Batch Speculative Decoding", arXiv
2502.15197, ACL 2025. A draft guesses `extra` tokens too many for each of B streams. The model has capacity for C =
B·window of them; which, is decided for all streams together: a token survives if it and all before it are accepted, so
its score is the sum of their log-probabilities, and the C largest scores, which make a prefix of each stream, are the
best that C tokens can do if the draft knows its chances.

    >>> logp = jnp.log(jnp.array([[0.9, 0.8, 0.7], [0.3, 0.9, 0.9]]))
    >>> select(logp, capacity=3).tolist()  # .9, .72, .5 and .3: the first stream gets all
    [3, 0]

The stream of the cell `TetrisDecoder` is the texts themselves: one step verifies once, and says some tokens of each
text. The rows of all streams are packed in one list of C + B, so that a short draft here makes room for a long one
there. A stream may get no drafted token for as long as others are surer; it still gets one token a step.

**Warm, the published score is biased.** It drops a token for being unlikely itself, in whose place another is drawn;
likely tokens come too often. With `score="prefix"` (the default when warm) the score of a token takes, in place of its
own probability, the largest one at its place: the length does not depend on the token any more, and what is said is
distributed as the model. Greedy, both are the same. This score, and that a stream without any selected token has length
0, are not in the paper.
"""

from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from anabranch.cell import Cell, noise
from anabranch.decode.drafts import Draft, Drafted, NGram, Rule
from anabranch.decode.speculation import Emitted, read_prompt, rule_of, settle
from anabranch.layers.kv import Rows
from anabranch.models.llama import Config, Decoder, Llama


def select(logp: Float[Array, "B K"], capacity: int, top: Float[Array, "B K"] | None = None) -> Int[Array, " B"]:
    """How many of K drafted tokens of each stream are to be verified: `capacity` in all, if there are so many.

    Arguments:
        logp: log-probabilities, by the draft, of what it drafted. -inf, NaN, or a positive number: not to be used, nor
            any token after it.
        top: the largest log-probabilities at the same places, for the score that does not look at the token itself.

    Raises:
        ValueError: if the capacity is negative.
    """
    if capacity < 0:
        raise ValueError(f"capacity must not be negative, got {capacity}")
    # So that sums fall strictly: rounding must not let a token come before one that it needs.
    logp = jnp.where(logp <= 0, jnp.minimum(logp, -1e-6), -jnp.inf)
    total = jnp.cumsum(logp, -1)
    if top is not None:
        before = jnp.pad(total[:, :-1], ((0, 0), (1, 0)))
        top = jnp.where(jnp.isfinite(logp), jnp.minimum(top, -1e-6), -jnp.inf)
        total = jax.lax.cummin(before + top, axis=1)
    flat = total.T.ravel()  # of equal scores the earlier token, then the earlier stream
    scores, at = jax.lax.top_k(flat, min(capacity, flat.size))
    return jnp.zeros(flat.size, jnp.int32).at[at].set(jnp.isfinite(scores)).reshape(logp.T.shape).sum(0)


class Texts(NamedTuple):
    """B texts: all of each but its last token has been read by the model."""

    memory: tuple[Rows, ...]
    length: Int[Array, " B"]
    draft: Any
    last: Int[Array, " B"]
    round: Int[Array, ""]
    key: PRNGKeyArray


class TetrisDecoder(Cell):
    """A model and a draft on B texts: each step says some tokens of every one. The input is not looked at.

    Gives `Emitted` with a leading axis B. `begin` gives it prompts; without them all texts start with token 0.

    Arguments:
        streams: B.
        window: drafted tokens a stream that there is capacity for.
        extra: tokens that are drafted beyond that; 0 is plain speculation of a batch.
        capacity: drafted tokens that are verified in a step; by default B·window.
        score: "token" or "prefix" (see the module); by default the one that is exact.
        least: with fewer streams nothing extra is drafted.
        temperature: at which tokens are drawn; 0 takes the likeliest.

    Raises:
        ValueError: if a size is out of range, or `score` is another.
    """

    coupled = True
    smooth = False
    target: Decoder
    draft: Draft
    streams: int = eqx.field(static=True)
    window: int = eqx.field(static=True)
    extra: int = eqx.field(static=True)
    capacity: int = eqx.field(static=True)
    score: Literal["token", "prefix"] = eqx.field(static=True)
    temperature: float = eqx.field(static=True)

    def __init__(
        self,
        target: Decoder,
        draft: Draft,
        streams: int,
        window: int = 4,
        extra: int = 2,
        *,
        capacity: int | None = None,
        score: Literal["token", "prefix"] | None = None,
        least: int = 1,
        temperature: float = 0.0,
    ):
        for name, value, low in (
            ("streams", streams, 1), ("window", window, 1), ("extra", extra, 0), ("temperature", temperature, 0.0),
            ("capacity", 0 if capacity is None else capacity, 0),
        ):  # fmt: skip
            if value < low:
                raise ValueError(f"{name} must be at least {low}, got {value}")
        if score not in (None, "token", "prefix"):
            raise ValueError(f'score must be "token" or "prefix", got {score!r}')
        self.target, self.draft, self.streams, self.window = target, draft, streams, window
        self.extra = extra if streams >= least else 0
        if window + self.extra >= target.size:
            raise ValueError(f"window + extra must be below {target.size}, got {window + self.extra}")
        self.capacity = min(streams * window if capacity is None else capacity, streams * (window + self.extra))
        self.score = score or ("prefix" if temperature else "token")
        self.temperature = temperature

    @property
    def rule(self) -> Rule:
        """How a token is drawn."""
        return rule_of(self.temperature)

    def init(self, *, key: PRNGKeyArray | None = None) -> Texts:
        zeros = jnp.zeros((self.streams, 1), jnp.int32)
        rng = jax.random.PRNGKey(0) if key is None else key
        blank = Texts((), zeros[:, 0], None, zeros[:, 0], jnp.int32(0), rng)
        return self.begin(blank, zeros, jnp.ones(self.streams, jnp.int32))

    def begin(self, state: Texts, prompts: Int[Array, "B T"], n: Int[Array, " B"]) -> Texts:
        """Read the first n tokens of each prompt, at least one, as the beginning of the texts."""
        sessions, draft = jax.vmap(lambda x, n: read_prompt(self.target, self.draft, x, n))(prompts, n)
        memory = tuple(Rows(one.k, one.v) for one in sessions.memory)
        last = jnp.take_along_axis(prompts, n[:, None] - 1, 1)[:, 0].astype(jnp.int32)
        return state._replace(memory=memory, length=sessions.length, draft=draft, last=last)

    def propose(self, state: Texts) -> Drafted:
        """window + extra guesses for each stream, of which those count that are there and have room."""
        keys = jax.vmap(lambda i: noise(noise(state.key, state.round, "step"), i, "draft"))(jnp.arange(self.streams))
        wide = self.window + self.extra
        drafted = jax.vmap(lambda s, k: self.draft.propose(s, k, wide, self.rule))(state.draft, keys)
        room = jnp.maximum(self.target.size - state.length - 1, 0)
        return drafted._replace(n=jnp.clip(drafted.n, 0, room))

    def lengths(self, drafted: Drafted) -> Int[Array, " B"]:
        """How many guesses of each stream are verified."""
        there = jnp.arange(self.window + self.extra) < drafted.n[:, None]
        if drafted.logq is None:
            own = drafted.sure
        else:
            own = jnp.take_along_axis(drafted.logq, drafted.tokens[..., None], -1)[..., 0]
            own = jnp.minimum(own, drafted.sure)  # of a draft that does not draw the first is 0
        top = drafted.sure if self.score == "prefix" else None
        return select(jnp.where(there, own, -jnp.inf), self.capacity, top)

    def step(self, state: Texts, x: Any = None) -> tuple[Texts, Emitted]:
        drafted = self.propose(state)
        drafted = drafted._replace(n=self.lengths(drafted))
        return self.verified(state, drafted)

    def verified(self, state: Texts, drafted: Drafted) -> tuple[Texts, Emitted]:
        """Read the guesses that count, in one list of rows for all streams, and say what comes of them."""
        B, K = drafted.tokens.shape
        tokens = jnp.concatenate([state.last[:, None], drafted.tokens], 1)
        ends = jnp.cumsum(drafted.n + 1)
        row = jnp.arange(self.capacity + B)
        stream = jnp.searchsorted(ends, row, side="right")  # B, which is none, for rows that are not needed
        place = row - jnp.where(stream > 0, ends[stream - 1], 0)
        positions = state.length.at[stream].get(mode="fill", fill_value=0) + place
        xs = tokens.at[stream, place].get(mode="fill", fill_value=0)
        h, memory = self.target.run_layers(self.target.embedding[xs], state.memory, positions, stream=stream)
        back = (ends - drafted.n - 1)[:, None] + jnp.arange(K + 1)  # the rows of each stream; beyond its own, any
        back = jnp.minimum(back, len(row) - 1)
        logits = self.target.logits(h)
        room = state.length < self.target.size
        keys = jax.vmap(lambda i: noise(noise(state.key, state.round, "step"), i, "verify"))(jnp.arange(B))
        said = jax.vmap(lambda k, d, at, room: settle(k, d, logits[at], self.rule, room))(keys, drafted, back, room)
        draft = jax.vmap(self.draft.read)(state.draft, said.tokens, h[back], said.n)
        last = jnp.where(room, jnp.take_along_axis(said.tokens, said.n[:, None] - 1, 1)[:, 0], state.last)
        return Texts(memory, state.length + said.n, draft, last, state.round + 1, state.key), said


def example() -> tuple[TetrisDecoder, Int[Array, " T"]]:
    """Three texts of a tiny model, with n-grams as draft."""
    sizes = Config(vocab=11, width=16, layers=2, heads=4, kv_heads=2, hidden=24)
    target = Decoder(Llama(sizes, key=jax.random.PRNGKey(0)), size=64)
    return TetrisDecoder(target, NGram(64), streams=3, window=2, extra=1), jnp.arange(12)
