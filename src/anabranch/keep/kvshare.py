"""KVShare: An LLM Service System with Efficient and Effective Multi-Tenant KV Cache Reuse.
Yang et al., arXiv 2503.16525, 2025.

Keys and values of a passage that an earlier prompt had are used again in a new one, wherever it stands there. They are
not quite right: in the new prompt the passage would have seen what comes before it. So some tokens are computed all the
same. `Shelf` keeps keys and values of earlier prompts, and `SegmentIndex` finds the runs of tokens that they share with
a new one; `kv_edit` takes for every token those of the longest run, turned to where it now stands. `selective_prefill`
computes the first two layers for all tokens, and the others for the new ones and those that deviate most and that most
attention goes to (`DHD`): about one in seven. `SharedDecoder` is the cell that goes on from there: attention of the
answer may turn to tokens that were not computed again, and each step repairs a few of these.

    >>> from anabranch.models.llama import Config, Llama
    >>> tiny = Llama(Config(vocab=11, width=8, layers=3, heads=4, kv_heads=2, hidden=16), key=jax.random.PRNGKey(0))
    >>> model, shelf = Decoder(tiny, size=16), Shelf(window=2)
    >>> _, _, reuse = shelf.prefill(model, [5, 1, 2, 3, 4])  # nothing is known: all of it is computed, and kept
    >>> reuse
    Reuse(tokens=5, found=0, computed=5)
    >>> state, logits, reuse = shelf.prefill(model, [7, 1, 2, 3, 4, 6])
    >>> reuse, state.fresh[:6].tolist()
    (Reuse(tokens=6, found=4, computed=3), [True, True, False, False, False, True])

The stream is one of tokens; the state is the keys and values of the text so far, with what is known of how right they
are. Keys are stored turned, and turned by the difference. A passage's own first token saw nothing else, and attention
fell on it for want of others: it is not used again, unless it stays where it was.

How the two criteria are combined (the product of both, each over its largest) and when a token is repaired while
decoding (those with the largest product of attention so far and deviation, a fixed number a step) are inferred; the
authors' code has switches for both. There as here matching prefers the longest run and the earlier text, and some
tokens (punctuation) are never reused; deviation is there of values, here of keys and values.
"""

from collections.abc import Callable, Collection, Hashable, Sequence
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from anabranch.cell import Cell
from anabranch.keep.blocks import Segment, SegmentIndex
from anabranch.layers.kv import KV, Rotate
from anabranch.models.llama import Decoder, Session, filled, rope
from anabranch.schedule.baselines import FCFS
from anabranch.schedule.scheduler import PREFILLING, View

CHECK = 1
"""The layer at which is looked who is to be computed further."""
Score = Callable[[Float[Array, " S"], Float[Array, " S"]], Float[Array, " S"]]


# Which tokens are reused


class Edit(NamedTuple):
    """For each of T tokens, whose keys and values it takes."""

    source: list[Hashable]
    """None: nobody's, it is new."""
    at: Int[np.ndarray, " T"]
    """Where it stands in that text; -1: it is new."""
    exact: int
    """So many tokens in front another text begins with as well: what they take is right."""

    @property
    def reused(self) -> Bool[np.ndarray, " T"]:
        return self.at >= 0

    @property
    def doubtful(self) -> Bool[np.ndarray, " T"]:
        """Reused, and not right."""
        return self.reused & (np.arange(len(self.at)) >= self.exact)


def kv_edit(tokens: Sequence[int], segments: Sequence[Segment], never: Collection[int] = (), *, sinks: int = 1) -> Edit:
    """Each token from the longest run that covers it, of several the first; those in front from where they are right.

    Arguments:
        never: tokens that are not reused, such as punctuation, but in front.
        sinks: the first tokens of a text that are not reused elsewhere. The last token of the new text never is: what
            follows comes from it.
    """
    T = len(tokens)
    which, at, longest = np.full(T, -1), np.full(T, -1, np.int64), np.zeros(T, np.int64)
    prefix = [segment.length if segment.src == segment.dst == 0 else 0 for segment in segments]
    exact = max(prefix, default=0)
    for i, segment in enumerate(segments):
        length = T + 1 if prefix[i] and prefix[i] == exact else segment.length
        to = segment.dst + np.flatnonzero(longest[segment.dst : segment.dst + segment.length] < length)
        longest[to], which[to], at[to] = length, i, segment.src + to - segment.dst
    new = (np.isin(tokens, list(never)) | (at < sinks)) & (np.arange(T) >= exact)
    new[-1] = True
    at[new] = -1
    return Edit([None if at[i] < 0 else segments[which[i]].source for i in range(T)], at, exact)


# Which of them are computed all the same


def DHD(deviation: Float[Array, " S"], attention: Float[Array, " S"]) -> Float[Array, " S"]:
    """High deviation and high attention: the product of both, each over its largest."""
    return deviation / jnp.maximum(deviation.max(), 1e-30) * attention / jnp.maximum(attention.max(), 1e-30)


def by_deviation(deviation: Float[Array, " S"], attention: Float[Array, " S"]) -> Float[Array, " S"]:
    """As CacheBlend (Yao et al., 2024)."""
    return deviation


def by_attention(deviation: Float[Array, " S"], attention: Float[Array, " S"]) -> Float[Array, " S"]:
    """Attention alone."""
    return attention


class Watched(eqx.Module):
    """A memory that also tells how much attention each slot got from some of the tokens of its last extension."""

    kv: KV
    asks: Bool[Array, " T"]
    mass: Float[Array, " S"]

    def extend(
        self, q: Float[Array, "T heads D"], k: Array, v: Array, positions: Int[Array, " T"], rotate: Rotate
    ) -> tuple[Float[Array, "T heads*D"], "Watched"]:
        o, new = self.kv.extend(q, k, v, positions, rotate)
        T, _, D = q.shape
        turned = rotate(q, positions).reshape(T, len(new.k), -1, D) * D**-0.5
        visible = jnp.arange(new.k.shape[1]) <= positions[:, None]
        score = jnp.where(visible[:, None, None], jnp.einsum("tkgd,ksd->tkgs", turned, new.k), -jnp.inf)
        share = jnp.where(self.asks[:, None, None, None], jax.nn.softmax(score), 0)
        return o, Watched(new, self.asks, share.sum((0, 1, 2)))


class Mixed(NamedTuple):
    """A text of which some keys and values come from other texts."""

    session: Session
    tokens: Int[Array, " S"]
    fresh: Bool[Array, " S"]
    """Which were computed in this text."""
    deviation: Float[Array, " S"]
    """How far those that were not were off, in the layer that was checked."""
    mass: Float[Array, " S"]
    """The attention that each got so far."""


@eqx.filter_jit
def selective_prefill(
    model: Decoder,
    memory: tuple[KV, ...],
    tokens: Int[Array, " T"],
    n: Int[Array, ""],
    reused: Bool[Array, " T"],
    again: Int[Array, ""],
    rows: int,
    score: Score = DHD,
) -> tuple[Mixed, Float[Array, " vocab"]]:
    """The logits after the first n of T tokens.

    Arguments:
        memory: with the keys and values of tokens that are reused.
        again: how many of the reused ones are computed all the same.
        rows: for how many tokens there is room after the checked layer: for all new ones and those. Static.
    """
    T, S = len(tokens), model.size
    there = jnp.arange(T) < n
    positions = jnp.where(there, jnp.arange(T), S)  # S: not written
    asks = there & ~reused
    old = memory[CHECK]
    watched = [*memory[:CHECK], Watched(old, asks, jnp.zeros(S)), *memory[CHECK + 1 :]]
    h, memory = model.run_layers(model.embedding[tokens], watched, positions, high=CHECK + 1)
    checked: Any = memory[CHECK]
    new = checked.kv
    deviation = ((new.k - old.k) ** 2 + (new.v - old.v) ** 2).sum((0, 2))
    deviation = jnp.zeros(S).at[:T].set(jnp.where(reused & there, deviation[:T], 0))
    worth = jnp.where(reused & there, score(deviation, checked.mass)[:T], -jnp.inf)
    rank = jnp.zeros(T, jnp.int32).at[jnp.argsort(-worth, stable=True)].set(jnp.arange(T, dtype=jnp.int32))
    computed = asks | (reused & there & (rank < again))
    where = jnp.nonzero(computed, size=rows, fill_value=T)[0]
    at = jnp.where(where < T, where, S)
    h, memory = model.run_layers(h[where], [*memory[:CHECK], new, *memory[CHECK + 1 :]], at, low=CHECK + 1)
    fresh = jnp.zeros(S, bool).at[:T].set(computed)
    logits = model.logits(h[computed.sum() - 1][None])[0]  # the last of those that are computed is the last token
    padded = jnp.zeros(S, jnp.int32).at[:T].set(jnp.where(there, tokens, 0))
    return Mixed(Session(memory, n), padded, fresh, jnp.where(fresh, 0, deviation), checked.mass), logits


class SharedDecoder(Cell):
    """A language model on a stream of tokens i32[] that repairs some of what came from other texts at each step.

    With the token that comes, `repairs` of those that were not computed in this text are, in one forward pass.

    State: `Mixed`, from `selective_prefill`, or `init` of an empty text.

    Raises:
        ValueError: if `repairs` is negative.
    """

    smooth: ClassVar[bool] = False

    model: Decoder
    repairs: int = eqx.field(static=True, default=4)

    def __check_init__(self):
        if self.repairs < 0:
            raise ValueError(f"repairs must not be negative, got {self.repairs}")

    def init(self, *, key: PRNGKeyArray | None = None) -> Mixed:
        zero = jnp.zeros(self.model.size)
        return Mixed(self.model.init(), zero.astype(jnp.int32), jnp.ones(len(zero), bool), zero, zero)

    def step(self, state: Mixed, x: Int[Array, ""]) -> tuple[Mixed, Float[Array, " vocab"]]:
        S, session = self.model.size, state.session
        tokens = state.tokens.at[session.length].set(x, mode="drop")
        stale = ~state.fresh & (jnp.arange(S) < session.length)
        worth, at = jax.lax.top_k(jnp.where(stale, state.mass * state.deviation, -1.0), self.repairs)
        at = jnp.append(jnp.where(worth >= 0, at, S), session.length)  # S: not written
        asks = jnp.arange(self.repairs + 1) == self.repairs
        watched = [Watched(kv, asks, jnp.zeros(S)) for kv in session.memory]
        h, memory = self.model.run_layers(self.model.embedding[tokens.at[at].get(mode="clip")], watched, at)
        mass = state.mass + sum(one.mass for one in memory) / len(memory)
        fresh = state.fresh.at[at].set(True, mode="drop")
        session = Session(tuple(one.kv for one in memory), session.length + 1)
        return Mixed(session, tokens, fresh, jnp.where(fresh, 0, state.deviation), mass), self.model.logits(h[-1:])[0]


# Where they are kept


class Reuse(NamedTuple):
    """What became of the tokens of a prompt."""

    tokens: int
    found: int
    computed: int
    """In all layers."""


class Shelf:
    """Keys and values of prompts, and new prompts made with them.

    Args:
        window: tokens in a row that have to be the same.
        texts: prompts that are kept; the others were used longer ago.
        never: tokens that are not reused, such as punctuation.
        ratio: the part of reused tokens that is computed all the same.
        sinks: the first tokens of a prompt that are not reused elsewhere.

    Raises:
        ValueError: if `ratio` is not in [0, 1].
    """

    def __init__(
        self, window: int = 5, texts: int = 256, never: Collection[int] = (), *, ratio: float = 0.15, sinks: int = 1
    ):
        if not 0 <= ratio <= 1:
            raise ValueError(f"ratio must be in [0, 1], got {ratio}")
        self.index, self.never, self.ratio, self.sinks = SegmentIndex(window, texts), frozenset(never), ratio, sinks
        self._kv: dict[Hashable, tuple[np.ndarray, np.ndarray]] = {}
        self._count = 0

    def put(self, tokens: Sequence[int], session: Session, salt: bytes = b"") -> None:
        """Keep a prompt."""
        k, v = (np.stack([getattr(kv, name)[:, : len(tokens)] for kv in session.memory]) for name in "kv")
        for gone in self.index.insert(self._count, tokens, salt):
            del self._kv[gone]
        self._kv[self._count] = k, v
        self._count += 1

    def found(self, model: Decoder, tokens: Sequence[int], salt: bytes = b"") -> tuple[tuple[KV, ...], Edit]:
        """The keys and values that a prompt can begin with, and for which of its tokens there are some."""
        edit, config = kv_edit(tokens, self.index.match(tokens, salt), self.never, sinks=self.sinks), model.config
        k, v = np.zeros((2, config.layers, config.kv_heads, model.size, config.head_width), np.float32)
        for source in dict.fromkeys(s for s in edit.source if s is not None):
            to = np.array([i for i, s in enumerate(edit.source) if s == source])
            for into, old in zip((k, v), self._kv[source], strict=True):
                into[:, :, to] = old[:, :, edit.at[to]]
        by = np.zeros(model.size, np.int32)
        by[: len(tokens)] = np.where(edit.reused, np.arange(len(tokens)) - edit.at, 0)
        return _turned(model, *map(jnp.asarray, (k, v, by))), edit

    def prefill(
        self, model: Decoder, tokens: Sequence[int], salt: bytes = b"", *, score: Score = DHD
    ) -> tuple[Mixed, Float[Array, " vocab"], Reuse]:
        """Compute what is not found and what deviates: the state, from which `SharedDecoder` goes on, and the logits.

        Only a prompt that is right is kept: others would pass on what they took.

        Raises:
            ValueError: if the prompt is empty or has no room.
        """
        if not 0 < len(tokens) <= model.size:
            raise ValueError(f"tokens must be from 1 to {model.size}, got {len(tokens)}")
        memory, edit = self.found(model, tokens, salt)
        again = int(np.ceil(self.ratio * edit.doubtful.sum()))
        computed = int((~edit.reused).sum()) + again
        length = min(filled(len(tokens)), model.size)
        pad = lambda column: jnp.asarray(np.pad(column, (0, length - len(tokens))))
        state, logits = selective_prefill(
            model, memory, pad(np.asarray(tokens, np.int32)), jnp.int32(len(tokens)), pad(edit.reused),
            jnp.int32(again), min(filled(computed), length), score,
        )  # fmt: skip
        if not edit.doubtful.any():
            self.put(tokens, state.session, salt)
        return state, logits, Reuse(len(tokens), int(edit.reused.sum()), computed)


@eqx.filter_jit
def _turned(model: Decoder, k: Array, v: Array, by: Int[Array, " S"]) -> tuple[KV, ...]:
    """Keys turned on from where they were to where they are."""
    turn = lambda one: rope(one.swapaxes(0, 1), by, model.config.frequencies).swapaxes(0, 1)
    return tuple(KV(turn(a), b) for a, b in zip(k, v, strict=True))


# Who is served first


class CacheAware(FCFS):
    """Prompts of which most is found first, and only those together of which about as much is found.

    Who waits gains on the others, so that everybody's turn comes.

    Args:
        patience: seconds of waiting that count as much as a prompt that is all found.
        band: by how much the parts that are found may differ in one iteration.

    Raises:
        ValueError: if `patience` or `band` is not positive.
    """

    patience: float = eqx.field(static=True, default=5.0)
    band: float = eqx.field(static=True, default=0.25)

    def __check_init__(self):
        for name in ("patience", "band"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")

    def order(self, x: View) -> list[int]:
        slots = x.prompts
        begun = [slot for slot in slots if x.status[slot] == PREFILLING]
        waits = [slot for slot in slots if x.status[slot] != PREFILLING]
        if not waits:
            return begun
        part = x.hit / np.maximum(x.prompt, 1)
        waits.sort(key=lambda slot: (-(part[slot] + (x.now - x.arrival[slot]) / self.patience), x.id[slot]))
        return begun + [slot for slot in waits if abs(part[slot] - part[waits[0]]) <= self.band]


def example() -> tuple[SharedDecoder, Any]:
    """A tiny model on ten tokens."""
    from anabranch.models.llama import Config, Llama

    sizes = Config(vocab=11, width=8, layers=3, heads=4, kv_heads=2, hidden=16)
    return SharedDecoder(Decoder(Llama(sizes, key=jax.random.PRNGKey(0)), size=16), repairs=2), jnp.arange(10) % 11
