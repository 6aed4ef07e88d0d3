"""StreamingVLM: Real-Time Understanding for Infinite Video Streams (arXiv 2510.09608, 2025).

The stream is frames and what the model itself said about them, round by round: a frame, then words if there is
something to say. The state is what attention remembers (`keep.memory`), and it is laid out as

    first words | last words of older rounds | the last rounds, each a frame and its words

`StreamingVLM` is that policy: a round that gets old loses its frame, and its words join the earlier ones, with the keys
and values that they were given when their frame was still seen. Positions are compact, so that they stay within what
the model was trained on; with `compact=False` they grow ("append").

    >>> keep = StreamingVLM(sink=2, text=2, vision=2, said=1, patches=4)
    >>> memory = keep.empty(heads=1, width=4, places=2)
    >>> frame, word = jnp.array([[0, 1, 1], [0, 1, 2], [0, 2, 1], [0, 2, 2]]), jnp.array([[1, 0, 0]])
    >>> for t in range(6):  # at tick 2t a frame, at 2t + 1 a word
    ...     for at in (frame, word):
    ...         x = jnp.ones((len(at), 1, 4))
    ...         o, memory = memory.extend(x, x, x, at + jnp.array([2 * t, 0, 0]), lambda x, positions: x)
    ...         (memory,) = keep.settle((memory,))
    >>> memory.position[0, :14].tolist()
    [1, 3, 5, 7, 8, 8, 8, 8, 9, 10, 10, 10, 10, 11]

`Narrator` is a model that speaks as it watches. It is trained on short chunks that overlap, with full attention inside
them (`overlapped_chunks`, `narrated`): as a chunk begins with the first and last words before it and is about as long
as the rounds that are kept, that is nearly what it will see on the stream; `sft_mask_check` says how nearly.

Where this differs from the authors' code (mit-han-lab/streaming-vlm): the model of `models.video_qa` marks no roles and
times, so that there are no tokens of format to be removed with a round; a second is one frame, and one in which nothing
is said has no words at all, where the code writes an ellipsis that leaves with the round; as many rounds keep their
frame as keep their words in place, as by default there; the window of earlier words has `text` words, where the code
counts the line break after them; words are chosen greedily, without a penalty for repetition, which would be one on all
of the dozen words that there are; the vision encoder is the model's own stem, and all weights are trained.
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from anabranch.branch import branch
from anabranch.cell import Cell
from anabranch.keep.memory import Keep
from anabranch.layers.attention import attend
from anabranch.models.llama import Block, rms_norm
from anabranch.models.video_qa import EOS, GRID, PATCHES, SILENT, VOCAB, Config, VideoQA, Watched, Watcher


class StreamingVLM(Keep):
    """The first words, the last words of older rounds, and the last rounds.

    Words are tokens whose place is (0, 0). Those before the first frame count as of older rounds. An old round leaves
    when a frame comes, so that this frame and its words see `vision` rounds, their own included.

    Arguments:
        sink: first words that stay.
        text: last words of older rounds that stay.
        vision: rounds that stay whole.
        said: most words of a round. If there are more, the oldest tokens may leave early.
        patches: tokens of a frame.
        compact: whether tokens that stay close ranks ("shrink", else "append").
        asked: tokens that may be asked at any time without making room.

    Raises:
        ValueError: if a number is negative, `vision` is less than 2, or twice the words of a round and a question have
            not less tokens than a frame.
    """

    watches = False

    sink: int = eqx.field(static=True)
    text: int = eqx.field(static=True)
    vision: int = eqx.field(static=True)

    def __init__(
        self,
        *,
        sink: int,
        text: int,
        vision: int,
        said: int = 2,
        patches: int = PATCHES,
        compact: bool = True,
        asked: int = 0,
    ):
        for name, value, least in (("sink", sink, 0), ("text", text, 0), ("vision", vision, 2), ("said", said, 0)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if 2 * said + asked >= patches:
            raise ValueError(f"2 said + asked must be less than patches={patches}, got 2 * {said} + {asked}")
        self.sink, self.text, self.vision, self.compact = sink, text, vision, compact
        self.budget = sink + text + (vision - 1) * (patches + said)
        # For what is about to leave, a frame and as many words as join the earlier ones, and for the words of the new
        # round and a question. Less than two frames: when a round is old, the next frame finds no room.
        self.room = patches + 2 * said + asked

    def score(self, held):
        return held.position.astype(jnp.float32)

    def protect(self, held):
        there, word = held.position >= 0, (held.place == 0).all(-1)
        begins = there & ~word & (jnp.diff(held.position, prepend=-1) != 0)
        round, rounds = jnp.cumsum(begins, 1), begins.sum(1, keepdims=True)
        recent = there & (round > jnp.maximum(rounds - (self.vision - 1), 0))
        old = there & word & ~recent
        number, words = jnp.cumsum(old, 1), old.sum(1, keepdims=True)
        return recent | (old & ((number <= self.sink) | (number > words - self.text)))

    def settle(self, memory):
        """Let there be room for what stays, and no more."""
        stays = [jnp.minimum(self.protect(held).sum(1).max(), self.most).astype(jnp.int32) for held in memory]
        return tuple(eqx.tree_at(lambda held: held.budget, held, n) for held, n in zip(memory, stays, strict=True))


class Narrator(Cell):
    """A model that watches frames f32[16, 16] and says something of each: i32[said], `SILENT` where it says no more.

    State: `Watched`.

    Raises:
        ValueError: if the memory has no room for a frame and its words.
    """

    watcher: Watcher
    said: int = eqx.field(static=True)

    def __init__(self, model: VideoQA, keep: Keep, said: int = 2):
        if keep.room < PATCHES + said:
            raise ValueError(f"the memory must have room for {PATCHES} + {said} tokens, got room={keep.room}")
        self.watcher, self.said = Watcher(model, keep), said

    def init(self, *, key: PRNGKeyArray | None = None) -> Watched:
        return self.watcher.init(key=key)

    def step(self, state: Watched, x: Float[Array, "16 16"]) -> tuple[Watched, Int[Array, " said"]]:
        state, logits = self.watcher.step(state, x)
        first = logits.argmax().astype(jnp.int32)
        silent = jnp.full(self.said, SILENT, jnp.int32)
        speak = lambda state, first: self._speak(state, first)
        return branch(_speaks(first), speak, lambda state, first: (state, silent), state, first)

    def _speak(self, state: Watched, word: Int[Array, ""]) -> tuple[Watched, Int[Array, " said"]]:
        watcher, none = self.watcher, jnp.zeros((1, 2), jnp.int32)

        def say(carry: tuple, _: None) -> tuple[tuple, Array]:
            state, word = carry
            speaks = _speaks(word)
            new, h = watcher.see(state, watcher.decoder.embedding[word][None], none, speaks.astype(jnp.int32))
            new = new._replace(tick=state.tick + speaks)
            after = watcher.decoder.logits(h)[0].argmax().astype(jnp.int32)
            return (new, jnp.where(speaks, after, word)), jnp.where(speaks, word, SILENT)

        (state, _), words = lax.scan(say, (state, word), length=self.said)
        return state, words

    def ask(self, state: Watched, question: Int[Array, " T"]) -> Float[Array, " vocab"]:
        """The answer to a question, as logits; the memory is then as if it had not been asked."""
        return self.watcher.ask(state, question)


def _speaks(word: Int[Array, ""]) -> Bool[Array, ""]:
    return (word != SILENT) & (word != EOS)


def resink(watcher: Watcher, state: Watched, prompt: Int[Array, " T"]) -> Watched:
    """Another task: `prompt` in the place of the one that was told, by `watcher.tell`, before the first frame.

    Both must be equally long, and no longer than `sink`. What came after the old one remains as it was.

    Raises:
        ValueError: if the prompt is longer than the sink.
    """
    T, sink = len(prompt), getattr(watcher.keep, "sink", 0)
    if T > sink:
        raise ValueError(f"prompt must have at most sink={sink} tokens, got {T}")
    fresh, _ = watcher.tell(watcher.init(), prompt)
    put = lambda old, new: eqx.tree_at(
        lambda held: (held.k, held.v), old, [a.at[:, :T].set(b[:, :T]) for a, b in ((old.k, new.k), (old.v, new.v))]
    )
    return state._replace(memory=tuple(put(old, new) for old, new in zip(state.memory, fresh.memory, strict=True)))


class Chunk(NamedTuple):
    """A part of a narrated stream to train on."""

    before: Int[Array, " n"]
    """The first words and the last ones before it; -1 at the end where there are less."""
    frames: Float[Array, "W 16 16"]
    words: Int[Array, "W said"]
    """After each frame; `SILENT` where there are no more."""


def overlapped_chunks(
    frames: Float[Array, "F 16 16"], words: Int[Array, "F said"], length: int, overlap: int, sink: int, text: int
) -> Chunk:
    """All chunks of `length` frames of a stream, each but the first beginning with the last `overlap` of another.

    Raises:
        ValueError: if the overlap is not less than the length, or the stream is shorter.
    """
    if not 0 <= overlap < length <= len(frames):
        raise ValueError(f"need 0 <= overlap < length <= {len(frames)} frames, got overlap={overlap}, length={length}")
    starts = jnp.arange(0, len(frames) - length + 1, length - overlap)
    flat, round = words.reshape(-1), jnp.repeat(jnp.arange(len(words)), words.shape[1])

    def chunk(start: Array) -> Chunk:
        old = (flat != SILENT) & (round < start)
        number = jnp.cumsum(old)
        kept = old & ((number <= sink) | (number > old.sum() - text))
        first = jnp.argsort(~kept, stable=True)[: sink + text]
        part = start + jnp.arange(length)
        before = jnp.where(kept[first], flat[first], -1)
        before = jnp.pad(before, (0, sink + text - len(first)), constant_values=-1)
        return Chunk(before, frames[part], words[part])

    return jax.vmap(chunk)(starts)


def narrated(
    model: VideoQA, chunk: Chunk, question: Int[Array, " Q"] | None = None
) -> tuple[Float[Array, "W said+1 vocab"], Float[Array, "Q vocab"]]:
    """What the model says in a chunk, as logits after each frame and each of its words, and of a question at its end.

    All that came before is seen. What comes after a word that is not there means nothing.
    """
    question = jnp.zeros(0, jnp.int32) if question is None else question
    (W, said), n, Q = chunk.words.shape, len(chunk.before), len(question)
    seen, spoken = jax.vmap(model.stem)(chunk.frames), model.llama.embedding[chunk.words]
    rounds = jnp.concatenate([seen, spoken], 1).reshape(W * (PATCHES + said), -1)
    h = jnp.concatenate([model.llama.embedding[chunk.before], rounds, model.llama.embedding[question]])
    there = jnp.concatenate([jnp.ones((W, PATCHES), bool), chunk.words != SILENT], 1).reshape(-1)
    there = jnp.concatenate([chunk.before >= 0, there, jnp.ones(Q, bool)])
    index = np.arange(W * (PATCHES + said)) % (PATCHES + said)
    index = np.concatenate([np.full(n, PATCHES), index, np.full(Q, PATCHES)])  # in the round; words from 16 on
    tick = jnp.cumsum(there & ((index == 0) | (index >= PATCHES))) - 1
    place = np.where(index[:, None] < PATCHES, 1 + np.stack(np.divmod(index, GRID), 1), 0)
    positions = jnp.concatenate([tick[:, None], place], 1)
    visible = (jnp.tri(len(h), dtype=bool) & there) | jnp.eye(len(h), dtype=bool)

    def layer(h: Array, block: Block) -> tuple[Array, None]:
        q, k, v = block.qkv(h, positions)
        return block.close(h, attend(q, k.swapaxes(0, 1), v.swapaxes(0, 1), visible)), None

    h, _ = lax.scan(layer, h, model.llama.blocks)
    last = h[n : len(h) - Q].reshape(W, PATCHES + said, -1)[:, PATCHES - 1 :]
    logits = lambda h: rms_norm(h, model.llama.norm, model.llama.config.eps) @ model.llama.head.T
    return logits(last), logits(h[len(h) - Q :])


def sft_targets(words: Int[Array, "W said"]) -> tuple[Int[Array, "W said+1"], Float[Array, "W said+1"]]:
    """What is to be said after each frame and word of a chunk, silence and the end included, and which of it counts."""
    silent = words == SILENT
    target = jnp.concatenate([jnp.where(silent, EOS, words), jnp.full((len(words), 1), EOS)], 1)
    target = target.at[:, 0].set(words[:, 0])
    return target, jnp.concatenate([jnp.ones((len(words), 1)), 1.0 - silent], 1)


def sft_mask_check(
    keep: StreamingVLM, words: Int[np.ndarray, "F said"], length: int, overlap: int
) -> tuple[float, float]:
    """How alike training on chunks and living on the stream are, as shares of the (query, key) pairs of tokens.

    Each token counts in the chunk in which most comes before it. The first number is the share of what is seen on the
    stream that is also seen in training, the second the share of what is seen in training that is also on the stream.
    """
    F, said = words.shape
    round = np.repeat(np.arange(F), PATCHES + said)
    index = np.tile(np.arange(PATCHES + said), F)
    word = index >= PATCHES
    there = ~word | (np.asarray(words)[round, np.maximum(index - PATCHES, 0)] != SILENT)
    round, word = round[there], word[there]
    number = np.cumsum(word)  # of words so far, from 1

    def seen(first: np.ndarray) -> np.ndarray:
        """By each token: rounds from its `first`, and the first and last words before them."""
        before = np.concatenate([[0], number])[np.searchsorted(round, first)][:, None]
        old = word & (round < first[:, None]) & ((number <= keep.sink) | (number > before - keep.text))
        return ((round >= first[:, None]) | old) & np.tri(len(round), dtype=bool)

    stream = seen(np.maximum(round - keep.vision + 1, 0))
    step = length - overlap
    last = (F - length) // step * step
    chunk = seen(np.clip((round - overlap) // step * step, 0, last))
    both = (stream & chunk).sum()
    return float(both / stream.sum()), float(both / chunk.sum())


def example() -> tuple[Narrator, Float[Array, "8 16 16"]]:
    """A small model of random weights, which talks all the time, and eight random pictures."""
    config = Config(vocab=VOCAB, width=16, layers=1, heads=2, kv_heads=1, hidden=16, rope_base=1000.0)
    model = VideoQA(config, key=jax.random.PRNGKey(0))
    return Narrator(model, StreamingVLM(sink=2, text=2, vision=2)), jax.random.uniform(
        jax.random.PRNGKey(1), (8, 16, 16)
    )
