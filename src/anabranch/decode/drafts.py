"""What guesses how a text goes on, for a model to verify (`speculation.py`).

A `Draft` reads what the text became, and proposes. Here are drafts that need no other weights: `NGram` looks the text
up for how it went on before, `Skip` leaves some layers of the model out, `Surer` asks the surer of two. That of
`heads.FeatureDraft` is trained.

    >>> draft = NGram(size=32)
    >>> text = draft.read(draft.init(), jnp.array([5, 6, 7, 5, 6]), jnp.zeros((5, 1)), jnp.int32(5))
    >>> draft.propose(text, jax.random.PRNGKey(0), 2, None).tokens.tolist()
    [7, 5]
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from anabranch.cell import noise, select
from anabranch.models.llama import Decoder, Session

Rule = Callable[[Float[Array, " V"]], Float[Array, " V"]] | None
"""From logits to the log-probabilities of the next token, of model and draft alike; None takes the likeliest."""


class Drafted(NamedTuple):
    """W guessed tokens of one stream."""

    tokens: Int[Array, " W"]
    n: Int[Array, ""]
    """How many of them count."""
    logq: Float[Array, "W V"] | None
    """The log-probabilities that each was drawn from; None: nothing was drawn."""
    sure: Float[Array, " W"]
    """The logarithm of the chance that it is accepted if those before it are, as the draft sees it before it draws."""


def leading(passed: Bool[Array, " W"]) -> Int[Array, ""]:
    """How many are passed before the first that is not."""
    return jnp.cumprod(passed.astype(jnp.int32)).sum()


class Draft(eqx.Module):
    """What guesses how a text goes on. Its state is what it knows of the text."""

    def init(self) -> Any:
        """Of an empty text."""
        raise NotImplementedError

    def read(self, state: Any, tokens: Int[Array, " T"], hidden: Float[Array, "T d"], n: Int[Array, ""]) -> Any:
        """The text goes on with the first n of T tokens.

        Arguments:
            hidden: what the last layer of the model gave before each of them; 0 for the first token of all.
        """
        raise NotImplementedError

    def follow(self, state: Any, token: Int[Array, ""]) -> Any:
        """If it went on with this token, which the model has not read."""
        raise NotImplementedError

    def guess(
        self, state: Any, key: PRNGKeyArray, rule: Rule
    ) -> tuple[Int[Array, ""], Float[Array, " V"] | None, Float[Array, ""], Bool[Array, ""]]:
        """A token, what it was drawn from, how sure that is (see `Drafted`), and whether there is a guess at all."""
        raise NotImplementedError

    def propose(self, state: Any, key: PRNGKeyArray, window: int, rule: Rule) -> Drafted:
        """`window` guesses one after the other. The state stays as it is."""
        first = self.guess(state, noise(key, 0, "guess"), rule)

        def one(carry, i):
            state, token = carry
            state = self.follow(state, token)
            guess = self.guess(state, noise(key, i, "guess"), rule)
            return (state, guess[0]), guess

        _, rest = lax.scan(one, (state, first[0]), jnp.arange(1, window))
        tokens, logq, sure, found = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), first, rest)
        return Drafted(tokens, leading(found), logq, sure)


class Text(NamedTuple):
    """The tokens of a text, and how often each length of match foretold the next one."""

    tokens: Int[Array, " S"]
    n: Int[Array, ""]
    hits: Float[Array, " L+1"]
    tries: Float[Array, " L+1"]


class NGram(Draft):
    """Guesses that a text goes on as it did after the same last words: those of the longest match, the latest of them.

    Saxena, "Prompt lookup decoding", 2023. How sure it is, is how often a match of that length was right so far in this
    text, where one of two counts from the beginning.

    Arguments:
        size: tokens of a text that are looked at; later ones are not remembered.
        longest: tokens of a match at most; as many lengths are told apart.
    """

    size: int = eqx.field(static=True)
    longest: int = eqx.field(static=True, default=3)

    def __check_init__(self):
        for name in ("size", "longest"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def init(self) -> Text:
        kinds = self.longest + 1
        return Text(jnp.zeros(self.size, jnp.int32), jnp.int32(0), jnp.ones(kinds), jnp.full(kinds, 2.0))

    def match(self, state: Text) -> tuple[Int[Array, ""], Int[Array, ""]]:
        """The token that followed the match, and the length of it; 0 for none."""
        tokens, n, place = state.tokens, state.n, jnp.arange(self.size)
        back = jnp.arange(1, self.longest + 1)[:, None]
        same = (tokens[(place - back) % self.size] == tokens[(n - back) % self.size]) & (back <= place) & (place < n)
        length = jnp.cumprod(same.astype(jnp.int32), 0).sum(0)
        at = jnp.argmax(length * self.size + place * (length > 0))
        return tokens[at], length[at]

    def read(self, state, tokens, hidden, n):
        def one(state, x):
            token, there = x
            said, length = self.match(state)
            hits = state.hits.at[length].add(said == token)
            learned = self.follow(state._replace(hits=hits, tries=state.tries.at[length].add(1.0)), token)
            return select(there, learned, state), None

        return lax.scan(one, state, (tokens, jnp.arange(len(tokens)) < n))[0]

    def follow(self, state, token):
        return state._replace(tokens=state.tokens.at[state.n].set(token, mode="drop"), n=state.n + 1)

    def guess(self, state, key, rule):
        token, length = self.match(state)
        sure = jnp.log(state.hits[length] / state.tries[length])
        return token, None, sure, (length > 0) & (state.n <= self.size)


class Network(Draft):
    """A draft that has logits for the next token."""

    def logits(self, state: Any) -> Float[Array, " v"]:
        """For tokens that it may guess."""
        raise NotImplementedError

    def spread(self, x: Float[Array, " v"]) -> Float[Array, " V"]:
        """Log-probabilities of the tokens that it may guess as those of all."""
        return x

    def name(self, i: Int[Array, ""]) -> Int[Array, ""]:
        """The token that the logit of that number is for."""
        return i

    def guess(self, state, key, rule):
        return self.drawn(self.logits(state), key, rule)

    def drawn(self, logits: Float[Array, " v"], key: PRNGKeyArray, rule: Rule) -> tuple[Array, Any, Array, Array]:
        """What `guess` gives, from logits."""
        logq = jax.nn.log_softmax(logits) if rule is None else rule(logits)
        i = jnp.argmax(logq) if rule is None else jax.random.categorical(key, logq)
        token = self.name(i).astype(jnp.int32)
        return token, None if rule is None else self.spread(logq), logq.max(), jnp.array(True)


class Skipped(NamedTuple):
    """What the model without some of its layers has read, and what it says next."""

    session: Session
    logits: Float[Array, " V"]


class Skip(Network):
    """The model itself without a run of its layers; Zhang et al., "Draft & Verify", arXiv 2309.08168, 2024.

    Needs no weights, but is hardly cheaper than the model: a second opinion, and a draft for tests.

    Raises:
        ValueError: if there are no such layers.
    """

    target: Decoder
    low: int = eqx.field(static=True)
    """The first layer that is left out."""
    high: int = eqx.field(static=True)
    """The first one after it that is not."""

    def __check_init__(self):
        if not 0 <= self.low < self.high <= len(self.target.layers):
            raise ValueError(f"low and high must be layers of {len(self.target.layers)}, got {self.low}, {self.high}")

    def init(self) -> Skipped:
        return Skipped(self.target.init(), jnp.zeros(self.target.config.vocab))

    def read(self, state, tokens, hidden, n):
        positions = state.session.length + jnp.arange(len(tokens))
        h = self.target.embedding[tokens]
        h, memory = self.target.run_layers(h, state.session.memory, positions, 0, self.low)
        h, memory = self.target.run_layers(h, memory, positions, self.high)
        logits = self.target.logits(lax.dynamic_slice_in_dim(h, jnp.maximum(n - 1, 0), 1))[0]
        return Skipped(Session(memory, state.session.length + n), jnp.where(n > 0, logits, state.logits))

    def follow(self, state, token):
        return self.read(state, token[None], jnp.zeros((1, 1)), jnp.int32(1))

    def logits(self, state):
        return state.logits


class Surer(Draft):
    """Takes the guesses of that one of two drafts which is surer of its first.

    Only the first, because how sure a draft is of the next ones depends on what it drew.
    """

    one: Draft
    other: Draft
    vocab: int = eqx.field(static=True)

    def init(self):
        return self.one.init(), self.other.init()

    def read(self, state, tokens, hidden, n):
        return tuple(d.read(s, tokens, hidden, n) for d, s in zip((self.one, self.other), state))

    def follow(self, state, token):
        return tuple(d.follow(s, token) for d, s in zip((self.one, self.other), state))

    def propose(self, state, key, window, rule):
        a, b = (
            d.propose(s, noise(key, i, "draft"), window, rule)
            for i, (d, s) in enumerate(zip((self.one, self.other), state))
        )
        if rule is not None:
            a, b = (
                x._replace(logq=jnp.log(jax.nn.one_hot(x.tokens, self.vocab))) if x.logq is None else x for x in (a, b)
            )
        chance = lambda x: jnp.where(x.n > 0, x.sure[0], -jnp.inf)
        return select(chance(a) >= chance(b), a, b)
