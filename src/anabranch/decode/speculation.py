"""Speculation: a cheap draft guesses some tokens, the model reads them all at once, and what it says stays exact.

Leviathan, Kalman and Matias, "Fast Inference from Transformers via Speculative Decoding", arXiv 2211.17192, 2023, and
Chen et al., arXiv 2302.01318, 2023. `verify` accepts a token x that was drawn from q with probability
min(1, p(x) / q(x)); the first one refused is drawn again from max(p − q, 0). What comes out is distributed as p.

    >>> p, q = jnp.log(jnp.array([[0.9, 0.1], [0.5, 0.5]])), jnp.log(jnp.array([[0.2, 0.8]]))
    >>> drafted = Drafted(jnp.array([0]), jnp.int32(1), q, jnp.zeros(1))  # p(0) > q(0): always accepted
    >>> said = verify(jax.random.PRNGKey(0), drafted, p)
    >>> int(said.n), int(said.tokens[0])
    (2, 0)

A `Draft` guesses (`drafts.py`); `Speculative` is the cell that a model and a draft make: each step emits one token or
more.

    >>> from anabranch.decode.drafts import NGram
    >>> from anabranch.models.llama import Config, Llama
    >>> tiny = Llama(Config(vocab=11, width=8, layers=2, heads=4, kv_heads=2, hidden=16), key=jax.random.PRNGKey(0))
    >>> cell = Speculative(Decoder(tiny, size=32), NGram(size=32), window=3)
    >>> state, said = cell.step(cell.begin(cell.init(), jnp.array([5, 6, 5, 6, 5]), 5))
    >>> said.tokens.shape, 1 <= int(said.n) <= 4
    ((4,), True)

**Lengths.** Whether a drafted token is dropped before it was verified may depend on the tokens before it and on q
there, never on the token itself, or likely tokens come too often.
"""

from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from anabranch.cell import Cell, noise
from anabranch.decode.base import warp
from anabranch.decode.drafts import Draft, Drafted, Rule, leading
from anabranch.models.llama import Decoder, Session


class Emitted(NamedTuple):
    """What a step says of one stream: the accepted tokens and one of the model's own."""

    tokens: Int[Array, " W+1"]
    n: Int[Array, ""]
    """How many there are; 0 where the memory is full."""


def verify(key: PRNGKeyArray, drafted: Drafted, logp: Float[Array, "W+1 V"]) -> Emitted:
    """Accept guesses from the left while chance allows, and add one token.

    Arguments:
        logp: log-probabilities of the model before each guess and after the last. Those after the first n guesses are
            not looked at.
    """
    W, V = len(drafted.tokens), logp.shape[-1]
    q = jax.nn.one_hot(drafted.tokens, V) if drafted.logq is None else jnp.exp(drafted.logq)
    p, at = jnp.exp(logp), (jnp.arange(W), drafted.tokens)
    passed = jax.random.uniform(noise(key, 0, "accept"), (W,)) * q[at] < p[at]
    accepted = leading(passed & (jnp.arange(W) < drafted.n))
    refused = jnp.where(accepted < drafted.n, q[jnp.minimum(accepted, W - 1)], 0.0)
    token = _residual(noise(key, 0, "residual"), p[accepted], refused)
    return _emitted(drafted.tokens, accepted, token)


def verify_greedy(drafted: Drafted, best: Int[Array, " W+1"]) -> Emitted:
    """`verify` where the model always says its likeliest token."""
    same = (drafted.tokens == best[:-1]) & (jnp.arange(len(drafted.tokens)) < drafted.n)
    accepted = leading(same)
    return _emitted(drafted.tokens, accepted, best[accepted])


def verify_multi(
    key: PRNGKeyArray, tokens: Int[Array, " m"], logq: Float[Array, "m V"] | None, logp: Float[Array, " V"]
) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """Several candidates for one place: which is accepted (-1 for none), and the token that comes there.

    Candidates must have been drawn independently, or not at all: then `logq` is None. After a refusal the next one is
    held against what is left, max(p − q, 0).
    """
    m, V = len(tokens), len(logp)
    q = jax.nn.one_hot(tokens, V) if logq is None else jnp.exp(logq)

    def one(carry, x):
        p, found = carry
        token, q, u, i = x
        open_ = found < 0
        passed = open_ & (u * q[token] < p[token])
        left = jnp.maximum(p - q, 0.0)
        left = jnp.where(left.sum() > 1e-9, left / jnp.maximum(left.sum(), 1e-9), p)
        return (jnp.where(open_ & ~passed, left, p), jnp.where(passed, i, found)), None

    u = jax.random.uniform(noise(key, 0, "accept"), (m,))
    (p, found), _ = lax.scan(one, (jnp.exp(logp), jnp.int32(-1)), (tokens, q, u, jnp.arange(m, dtype=jnp.int32)))
    drawn = jax.random.categorical(noise(key, 0, "residual"), jnp.log(p))
    return found, jnp.where(found < 0, drawn, tokens[found]).astype(jnp.int32)


def _residual(key: PRNGKeyArray, p: Float[Array, " V"], q: Float[Array, " V"]) -> Int[Array, ""]:
    left = jnp.maximum(p - q, 0.0)
    # Where p = q to rounding nothing is left, and nothing was refused but by that rounding.
    return jax.random.categorical(key, jnp.log(jnp.where(left.sum() > 1e-9, left, p)))


def _emitted(tokens: Int[Array, " W"], accepted: Int[Array, ""], token: Int[Array, ""]) -> Emitted:
    said = jnp.append(tokens, 0).at[accepted].set(token.astype(jnp.int32))
    return Emitted(said, accepted + 1)


class Speculated(NamedTuple):
    """One text: all of it but the last token has been read by the model."""

    session: Session
    draft: Any
    last: Int[Array, ""]
    round: Int[Array, ""]
    """Steps so far."""
    key: PRNGKeyArray


class Speculative(Cell):
    """A model and a draft: each step says some tokens of one text, `Emitted`. The input is not looked at.

    `begin` gives it a prompt; without one the text starts with token 0. Greedy, it says what the model would say alone,
    but where its two best tokens are so near that summing in another order turns them; warm, what it says is drawn
    from the same distribution.

    Arguments:
        window: tokens that are guessed at a step.
        temperature: at which tokens are drawn; 0 takes the likeliest.
        top_p: see `warp`.

    Raises:
        ValueError: if `window` is not positive or exceeds the room of the model, or `temperature` is negative.
    """

    smooth = False
    target: Decoder
    draft: Draft
    window: int = eqx.field(static=True, default=4)
    temperature: float = eqx.field(static=True, default=0.0)
    top_p: float | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        if not 1 <= self.window < self.target.size:
            raise ValueError(f"window must be at least 1 and below {self.target.size}, got {self.window}")
        if self.temperature < 0:
            raise ValueError(f"temperature must not be negative, got {self.temperature}")

    @property
    def rule(self) -> Rule:
        """How a token is drawn."""
        return rule_of(self.temperature, self.top_p)

    def init(self, *, key: PRNGKeyArray | None = None) -> Speculated:
        rng = jax.random.PRNGKey(0) if key is None else key
        draft = self.draft.read(
            self.draft.init(), jnp.zeros(1, jnp.int32), jnp.zeros((1, self.target.config.width)), jnp.int32(1)
        )
        return Speculated(self.target.init(), draft, jnp.int32(0), jnp.int32(0), rng)

    def begin(self, state: Speculated, prompt: Int[Array, " T"], n: Int[Array, ""] | int) -> Speculated:
        """Read the first n of T tokens, n at least 1, as the beginning of the text."""
        session, draft = read_prompt(self.target, self.draft, prompt, jnp.asarray(n, jnp.int32))
        return state._replace(session=session, draft=draft, last=prompt[n - 1].astype(jnp.int32))

    def step(self, state: Speculated, x: Any = None) -> tuple[Speculated, Emitted]:
        key = noise(state.key, state.round, "step")
        drafted = self.draft.propose(state.draft, noise(key, 0, "draft"), self.window, self.rule)
        drafted, room = within(drafted, state.session.length, self.target.size)
        xs = jnp.concatenate([state.last[None], drafted.tokens])
        positions = state.session.length + jnp.arange(len(xs))
        h, memory = self.target.run_layers(self.target.embedding[xs], state.session.memory, positions)
        said = settle(noise(key, 0, "verify"), drafted, self.target.logits(h), self.rule, room)
        session = Session(memory, state.session.length + said.n)
        draft = self.draft.read(state.draft, said.tokens, h, said.n)
        last = jnp.where(room, said.tokens[said.n - 1], state.last)
        return Speculated(session, draft, last, state.round + 1, state.key), said


def rule_of(temperature: float, top_p: float | None = None) -> Rule:
    """The rule of `warp`; at temperature 0 none is needed."""
    return partial(warp, temperature=temperature, top_p=top_p) if temperature else None


def read_prompt(target: Decoder, draft: Draft, prompt: Int[Array, " T"], n: Int[Array, ""]) -> tuple[Session, Any]:
    """The model after the first n - 1 of T tokens, and the draft after n."""
    empty = target.init()
    h, memory = target.run_layers(target.embedding[prompt], empty.memory, jnp.arange(len(prompt)))
    before = jnp.concatenate([jnp.zeros_like(h[:1]), h[:-1]])
    return Session(memory, empty.length + n - 1), draft.read(draft.init(), prompt, before, n)


def within(drafted: Drafted, length: Int[Array, ""], size: int) -> tuple[Drafted, Bool[Array, ""]]:
    """As many guesses as there is room for, after the last token; and whether there is room for that one."""
    return drafted._replace(n=jnp.clip(drafted.n, 0, jnp.maximum(size - length - 1, 0))), length < size


def settle(
    key: PRNGKeyArray, drafted: Drafted, logits: Float[Array, "W+1 V"], rule: Rule, room: Bool[Array, ""]
) -> Emitted:
    """What is said, by the rule; nothing where there is no room."""
    if rule is None:
        said = verify_greedy(drafted, jnp.argmax(logits, -1))
    else:
        said = verify(key, drafted, jax.vmap(rule)(logits))
    return said._replace(n=jnp.where(room, said.n, 0))
