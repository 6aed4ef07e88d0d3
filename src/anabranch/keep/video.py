"""One protocol for memories of video: what is still known, at the end of a stream, of scenes long gone.

Streams of `models.video_qa.World` are watched to their end, and then every kind of question is asked of each; a memory
does not know what will be asked. `watch` takes any cell that steps on frames and has `ask(state, question) -> logits`,
so that methods which do more than keep slots can be compared as well.

    from anabranch.models.video_qa import Watcher, World, load
    print(gate())  # what the model knows when it remembers all
    world = World.of(held_out=True)
    for keep in (full(192), Window(365, room=19), Uniform(365, room=19)):
        print(size(keep), watch(Watcher(load(), keep), world, seed=1, streams=200).table())

Memories are equal where `size` is: slots, those for what comes included. Ages are in frames.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from anabranch import state, train
from anabranch.cell import Cell, noise
from anabranch.keep.memory import Keep, Window
from anabranch.models.video_qa import (
    BACK,
    COUNT,
    DIGIT,
    FIRST,
    PATCHES,
    SEEN,
    WHERE,
    WORDS,
    Asked,
    Stream,
    VideoQA,
    World,
    asked,
)  # fmt: skip

ASKED = (DIGIT, WHERE, *[BACK] * 3, FIRST, *[COUNT] * 2, *[SEEN] * 2)
"""The kinds of the questions after each stream; their arguments are drawn."""
NOW, PAST = ("digit", "where"), ("back 2", "back 3", "first", "seen")
"""Names of `Answers.table` that claims pool: what is there now, and what only a memory can know."""


def full(frames: int) -> Window:
    """A memory of all, for streams of so many frames."""
    return Window(PATCHES * frames, room=PATCHES + 3)


def size(keep: Keep) -> int:
    """The slots of a memory in each head."""
    return keep.budget + keep.room


class Uniform(Keep):
    """Frames evenly spread over all that has been, the newer half of them perhaps twice as dense.

    Of the frames, those stay whose tick is divisible by the highest powers of two.
    """

    watches = False

    def score(self, held):
        return jax.lax.population_count((held.position & -held.position) - 1).astype(jnp.float32)


class Answers(NamedTuple):
    """Of N streams and Q questions each."""

    kind: Int[np.ndarray | Array, "N Q"]
    argument: Int[np.ndarray | Array, "N Q"]
    right: Bool[np.ndarray | Array, "N Q"]
    valid: Bool[np.ndarray | Array, "N Q"]
    """Whether the question made sense; others do not count."""
    age: Int[np.ndarray | Array, "N Q"]
    """Frames since the evidence was last seen; that of what was never seen is the length of the stream."""

    def names(self) -> np.ndarray:
        """Of the kinds, `back` with its n: U[N, Q]."""
        words = np.array(WORDS)[self.kind]
        return np.where(self.kind == BACK, np.char.add("back ", self.argument.astype(str)), words)

    def table(self) -> dict[str, float]:
        """The accuracy of each kind of question."""
        names = self.names()
        counted = {str(name): self.right[self.valid & (names == name)] for name in sorted(set(names.flat))}
        return {name: float(right.mean()) for name, right in counted.items() if len(right)}

    def pooled(self, names: Sequence[str]) -> float:
        """The mean accuracy of some kinds, each counting the same.

        Raises:
            KeyError: if one of them was never asked.
        """
        table = self.table()
        return float(np.mean([table[name] for name in names]))

    def by_age(self, edges: Sequence[int], names: Sequence[str] = PAST) -> list[float]:
        """The accuracy on some kinds of question, by how long ago the evidence was last seen: of each interval between
        successive edges, the left one included. NaN where there is no question."""
        mine = self.valid & np.isin(self.names(), names)
        bins = np.digitize(self.age, edges)
        each = [self.right[mine & (bins == i)] for i in range(1, len(edges))]
        return [float(right.mean()) if len(right) else float("nan") for right in each]


def watch(
    watcher: Cell, world: World, seed: int, *, streams: int = 200, frames: int = 192, together: int = 20
) -> Answers:
    """Watch streams, `together` side by side, and ask at their end. All of one seed see the same streams.

    Raises:
        ValueError: if the streams are no whole number of batches.
    """
    if streams % together:
        raise ValueError(f"streams must be a multiple of together={together}, got {streams}")
    rows = jnp.arange(streams).reshape(-1, together)
    found = [_watched(watcher, world, jax.random.PRNGKey(seed), row, frames) for row in rows]
    return Answers(*(np.concatenate(column) for column in zip(*found, strict=True)))


def whole(model: VideoQA, world: World, seed: int, *, streams: int = 200, frames: int = 64) -> Answers:
    """The same streams and questions, answered in one pass over all that has been: what a memory of all gives."""
    found = [_answered(model, world, jax.random.PRNGKey(seed), jnp.int32(row), frames) for row in range(streams)]
    return Answers(*(np.stack(column) for column in zip(*found, strict=True)))


def exam_of(world: World, key: Array, row: Int[Array, ""], frames: int) -> tuple[Stream, Asked]:
    """The stream of that number, and what is asked at its end."""
    stream = world.stream(noise(key, row, "stream"), frames)
    keys = jax.vmap(lambda i: noise(noise(key, row, "ask"), i))(jnp.arange(len(ASKED)))
    ask = jax.vmap(lambda kind, key: asked(stream, kind, jnp.int32(frames - 1), key))
    return stream, ask(jnp.array(ASKED), keys)


def marked(stream: Stream, exam: Asked, logits: Float[Array, "Q vocab"]) -> Answers:
    """Which answers are right, given as logits."""
    frames = len(stream.frames)
    age = jnp.where(exam.evidence < 0, frames, frames - 1 - exam.evidence)
    return Answers(exam.question[:, 0], exam.question[:, 1], logits.argmax(-1) == exam.answer, exam.valid, age)


@eqx.filter_jit
def _watched(watcher: Any, world: World, key: Array, rows: Int[Array, " B"], frames: int) -> Answers:
    def one(row: Array) -> Answers:
        stream, exam = exam_of(world, key, row, frames)
        step = lambda state, frame: (watcher.step(state, frame)[0], None)
        end, _ = jax.lax.scan(step, watcher.init(key=noise(key, row, "init")), stream.frames)
        return marked(stream, exam, jax.vmap(lambda question: watcher.ask(end, question))(exam.question))

    return jax.vmap(one)(rows)


@eqx.filter_jit
def _answered(model: VideoQA, world: World, key: Array, row: Int[Array, ""], frames: int) -> Answers:
    stream, exam = exam_of(world, key, row, frames)
    Q = len(ASKED)
    _, spoken = model(stream.frames, exam.question, jnp.full(Q, frames - 1), jnp.zeros(Q, bool))
    return marked(stream, exam, spoken[:, -1])


def gate() -> dict[str, Any]:
    """What the trained model answers when it remembers all, as measured when it was trained: accuracies by length.

    Raises:
        FileNotFoundError: there are no trained weights.
    """
    return state.read_meta(train.WEIGHTS / "video_qa.safetensors")["accuracy"]
