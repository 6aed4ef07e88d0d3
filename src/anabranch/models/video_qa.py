"""A small model that watches a video and answers questions about it, and the world that it watches.

What memories of streaming video are judged on. The world, `World`, is a stream of scenes: each shows one handwritten
digit (MNIST) that stands or moves before a textured background. Questions are about what is there now and about scenes
long gone. The model is a causal transformer as video-language models are (the Llama of `models/llama.py`, 4 layers of
96 numbers; positions in time, height and width as in Wang et al., "Qwen2-VL", arXiv 2409.12191, 2024): a frame of
16 x 16 pixels becomes 4 x 4 tokens, a question three.

`VideoQA` is the form to train, which takes a clip with all its questions in one pass. `Watcher` is the form that lives
on a stream: a cell whose state is what attention remembers of the frames, in the memory that a policy of
`anabranch.keep` makes.

    >>> from anabranch.keep.memory import Window
    >>> watcher = Watcher(VideoQA(key=jax.random.PRNGKey(0)), keep=Window(budget=64, room=19))
    >>> state = watcher.init()
    >>> for _ in range(6):
    ...     state, said = watcher.step(state, jnp.zeros((16, 16)))
    >>> said.shape, watcher.ask(state, question(BACK, 2)).shape, int(state.memory[0].live[0])
    ((64,), (64,), 80)

**Ticks.** A frame takes one tick of time and a token of text takes one. The positions of tokens are (tick, y, x), where
y and x of a patch are 1 to 4, and those of text are 0. A memory (`keep.memory.Held`) keeps them: a policy sees the tick
of each slot in `position` and (y, x) in `place`, so that the slots of a frame are those of one position, and text is
where the place is (0, 0). Where a memory is `compact`, ticks of which nothing is left close ranks.

`load()` gives the trained weights (`training/video_qa.py`), which were never shown more than 64 frames at once; in the
last stages these were taken out of streams three or four times as long. Asked at the end of streams of 64 and of 192
frames of other handwriting, and remembering all, they name 97 and 96 % of digits that are there, 97 and 93 % of those a
scene ago and 88 and 91 % of those three scenes ago, find 90 % of quadrants, and count 92 and 77 % right
(`keep.video.gate`).
"""

import itertools
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from anabranch import data, train
from anabranch.cell import Cell, noise
from anabranch.keep.memory import Held, Keep
from anabranch.layers.attention import attend
from anabranch.models import llama
from anabranch.models.llama import Decoder, Llama, rms_norm

SIDE, GRID, GLYPH = 16, 4, 10
"""Pixels of a side of a frame, patches of a side, and pixels of a side of a digit."""
PATCHES = GRID * GRID
PIECE = 16
"""Frames whose attention is computed at once."""

WORDS = (
    *map(str, range(10)), "top left", "top right", "bottom left", "bottom right", "yes", "no",
    "silent", "eos", "none", "ask", "digit", "where", "back", "first", "count", "seen", "alert",
)  # fmt: skip
"""The vocabulary. Digits are also counts and the n of `back`; the tokens up to `VOCAB` are left to fine-tuning."""
VOCAB = 64
QUADRANT, YES, NO, SILENT, EOS, NONE, ASK = 10, 14, 15, 16, 17, 18, 19
DIGIT, WHERE, BACK, FIRST, COUNT, SEEN, ALERT = KINDS = range(20, 27)
"""The kinds of questions: which digit is there now, and in which quadrant is its centre; which one was there n scenes
ago, and in the first scene; in how many scenes c has been shown (9: or more), and whether it has been; and, asked
beforehand, to say so when c comes: `yes` after each of the first three frames of a scene with c, else `silent`."""


def question(kind: int, argument: int = NONE) -> Int[Array, "3"]:
    """The tokens of a question; of `BACK` the argument is n, of `COUNT`, `SEEN` and `ALERT` it is the digit c.

    Raises:
        ValueError: if there is no such kind, or the argument is no digit where there must be one.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(WORDS[k] for k in KINDS)} ({KINDS}), got {kind!r}")
    allowed = (NONE,) if kind in (DIGIT, WHERE, FIRST) else range(10)
    if argument not in allowed:
        names = WORDS[NONE] if kind in (DIGIT, WHERE, FIRST) else "0 to 9"
        raise ValueError(f"argument of {WORDS[kind]!r} must be {names}, got {argument}")
    return jnp.array([kind, argument, ASK], jnp.int32)


class Stream(NamedTuple):
    """A video and what is true of it."""

    frames: Float[Array, "F 16 16"]
    digit: Int[Array, " F"]
    """That is shown."""
    centre: Float[Array, "F 2"]
    """Of the digit, in pixels from the upper left one (y, x)."""
    scene: Int[Array, " F"]
    """The number of the scene, from 0."""
    begun: Int[Array, " F"]
    """The frames since the scene began, from 0."""

    @property
    def quadrant(self) -> Int[Array, " F"]:
        """In which the centre is: 0 to 3, row by row."""
        return jnp.where(self.centre >= (SIDE - 1) / 2, jnp.array([2, 1]), 0).sum(-1)


class Asked(NamedTuple):
    """A question about a stream after some frame."""

    question: Int[Array, "3"]
    answer: Int[Array, ""]
    valid: Bool[Array, ""]
    """False where it makes no sense: n scenes ago there was none yet."""
    evidence: Int[Array, ""]
    """The last frame that showed what the answer is about; -1 where nothing did."""


class World(eqx.Module):
    """Streams of scenes.

    Digits of 10 x 10 pixels, moved by parts of a pixel, are laid white over a smooth background of values up to
    `contrast`. Each scene has its own background, digit and handwriting; successive digits differ.

    Arguments:
        glyphs: handwritten digits.
        labels: which ones they are, in ascending order; each of the ten at least once.
        scene: least and greatest number of frames of a scene.
        palette: of how many different digits a stream is made.
        moving: the share of scenes in which the digit moves, by 0.5 to 1.5 pixels a frame, reflected at the border.
        drift: by how many pixels the background moves in each frame.
        contrast: the greatest value of the background.

    Raises:
        ValueError: if a size or a share is out of its range.
    """

    glyphs: Float[Array, "n 10 10"]
    labels: Int[Array, " n"]
    scene: tuple[int, int] = eqx.field(static=True, default=(8, 24))
    palette: int = eqx.field(static=True, default=6)
    moving: float = 0.5
    drift: float = 0.0
    contrast: float = 0.4

    def __check_init__(self):
        if not 1 <= self.scene[0] <= self.scene[1]:
            raise ValueError(f"scene must be a least and a greatest number of frames, got {self.scene}")
        if not 2 <= self.palette <= 10:
            raise ValueError(f"palette must be 2 to 10 digits, got {self.palette}")

    @classmethod
    def of(cls, held_out: bool, **options: object) -> "World":
        """With the first 8,000 digits of `data.mnist()`, which the weights were trained on, or the 2,000 others.

        Raises:
            FileNotFoundError: if MNIST is not there.
        """
        images, labels = data.mnist()
        mine = slice(8000, None) if held_out else slice(8000)
        small = rearrange(images[mine, 4:24, 4:24], "n (h a) (w b) -> n h w (a b)", a=2, b=2).mean(-1)
        order = np.argsort(labels[mine], kind="stable")
        return cls(jnp.asarray(small[order]), jnp.asarray(labels[mine][order]), **options)  # pyright: ignore

    def stream(self, key: PRNGKeyArray, frames: int) -> Stream:
        """A stream of so many frames."""
        low, high = self.scene
        scenes = -(-frames // low)
        draw = lambda use, shape, *range: jax.random.uniform(noise(key, 0, use), shape, jnp.float32, *range)
        lengths = jax.random.randint(noise(key, 0, "lengths"), (scenes,), low, high + 1)
        ends = jnp.cumsum(lengths)
        time = jnp.arange(frames)
        scene = jnp.searchsorted(ends, time, side="right")
        begun = time - (ends - lengths)[scene]

        palette = jax.random.permutation(noise(key, 0, "palette"), 10)[: self.palette]
        # A step of 1 to palette - 1 around the palette: never the same digit twice running.
        steps = jax.random.randint(noise(key, 0, "steps"), (scenes,), 1, self.palette)
        shown = palette[jnp.cumsum(steps) % self.palette]
        first, last = (jnp.searchsorted(self.labels, shown, side=side) for side in ("left", "right"))
        glyph = self.glyphs[first + (draw("hand", (scenes,)) * (last - first)).astype(jnp.int32)]

        # Positions of the digit's upper left corner fold at the borders: a triangle wave.
        far = SIDE - GLYPH
        start = draw("start", (scenes, 2), 0.0, far)
        angle, speed = draw("angle", (scenes,), 0.0, 2 * jnp.pi), draw("speed", (scenes,), 0.5, 1.5)
        speed = jnp.where(draw("moves", (scenes,)) < self.moving, speed, 0.0)
        velocity = speed[:, None] * jnp.stack([jnp.sin(angle), jnp.cos(angle)], 1)
        corner = far - jnp.abs((start[scene] + velocity[scene] * begun[:, None]) % (2 * far) - far)

        coarse = draw("texture", (scenes, 8, 8), 0.0, self.contrast)
        texture = jnp.repeat(jnp.repeat(coarse, 2, 1), 2, 2)
        texture = jnp.stack([jnp.roll(texture, (y, x), (1, 2)) for y in (0, 1) for x in (0, 1)]).mean(0)
        heading = draw("heading", (scenes,), 0.0, 2 * jnp.pi)
        moved = self.drift * begun[:, None] * jnp.stack([jnp.sin(heading), jnp.cos(heading)], 1)[scene]

        def drawn(scene: Array, corner: Array, moved: Array) -> Array:
            back = _weights(moved[0], SIDE, SIDE) @ texture[scene] @ _weights(moved[1], SIDE, SIDE).T
            ink = _weights(corner[0], GLYPH) @ glyph[scene] @ _weights(corner[1], GLYPH).T
            return back + (1 - back) * ink

        return Stream(jax.vmap(drawn)(scene, corner, moved), shown[scene], corner + (GLYPH - 1) / 2, scene, begun)


def _weights(shift: Array, size: int, period: int | None = None) -> Float[Array, "16 size"]:
    """Takes `size` pixels, moved by `shift`, to those of a frame: linear interpolation."""
    far = jnp.arange(SIDE)[:, None] - jnp.arange(size) - shift
    if period:
        far = (far + period / 2) % period - period / 2
    return jnp.maximum(0.0, 1 - jnp.abs(far))


def asked(stream: Stream, kind: Int[Array, ""], at: Int[Array, ""], key: PRNGKeyArray) -> Asked:
    """A question of that kind, but an alert, after frame `at`, with a random argument.

    n is 1 to 3. c is, as likely as not, the digit of some scene so far or any other one.
    """
    time = jnp.arange(len(stream.frames))
    past = time <= at
    n = jax.random.randint(noise(key, 0, "n"), (), 1, 4)
    first = past & (stream.begun == 0)
    times = jnp.zeros(10, jnp.int32).at[stream.digit].add(first)
    # Scenes seen so far are equally likely, and so are digits not seen.
    yes = jax.random.bernoulli(noise(key, 0, "yes")) | (times > 0).all()
    c = jax.random.categorical(noise(key, 0, "c"), jnp.log(jnp.where(yes, times, times == 0).astype(jnp.float32)))
    scene, digit = stream.scene[at], stream.digit[at]
    back = jnp.argmax(stream.scene == scene - n)
    cases = [kind == k for k in (DIGIT, WHERE, BACK, FIRST, COUNT, SEEN)]
    pick = lambda *values: jnp.select(cases, [jnp.asarray(v, jnp.int32) for v in values])
    last = lambda which: jnp.max(jnp.where(past & which, time, -1))
    about = last(stream.digit == c)
    return Asked(
        jnp.stack([kind, pick(NONE, NONE, n, NONE, c, c), jnp.int32(ASK)]),
        pick(
            digit, QUADRANT + stream.quadrant[at], stream.digit[back], stream.digit[0],
            jnp.minimum(times[c], 9), jnp.where(times[c] > 0, YES, NO),
        ),
        (kind != BACK) | (scene >= n),
        pick(at, at, last(stream.scene == scene - n), last(stream.scene == 0), about, about),
    )  # fmt: skip


def alerts(stream: Stream, c: Int[Array, ""]) -> Int[Array, " F"]:
    """What is to be said after each frame when `alert c` was asked at the beginning: `YES` or `SILENT`."""
    return jnp.where((stream.digit == c) & (stream.begun < 3), YES, SILENT)


class Config(llama.Config):
    """Sizes of the transformer, whose positions have three axes: half of a head turns with time, a quarter each with
    height and width."""

    @property
    def frequencies(self) -> Float[np.ndarray, "3 D/2"]:
        """By which angle a position on each axis turns each pair of features."""
        half = self.head_width // 2
        time, space = half - 2 * (half // 4), half // 4
        out = np.zeros((3, half), np.float32)
        out[0, :time] = self.rope_base ** (-np.arange(time) / time)
        for axis in (1, 2):
            out[axis, time + (axis - 1) * space :][:space] = 1.5 * 2.5 ** -np.arange(space)
        return out


SIZES = Config(
    vocab=VOCAB, width=96, layers=4, heads=4, kv_heads=2, hidden=256, rope_base=1000.0, context=64 * (PATCHES + 4)
)
"""Of the trained model."""


def _neighbours(x: Float[Array, "h w c"]) -> Float[Array, "h w 9*c"]:
    """Each pixel with the eight around it; zeros beyond the border."""
    h, w, _ = x.shape
    x = jnp.pad(x, ((1, 1), (1, 1), (0, 0)))
    return jnp.concatenate([x[i : i + h, j : j + w] for i in range(3) for j in range(3)], -1)


class Stem(eqx.Module):
    """The tokens of a frame: a convolution over pixels, one over patches, and two of neighbouring patches."""

    pixels: Float[Array, "9 c"]
    patches: Float[Array, "16*c d"]
    grid: Float[Array, "2 9*d d"]
    scales: Float[Array, "2 d"]

    def __init__(self, width: int, channels: int = 16, *, key: PRNGKeyArray):
        init = lambda i, *shape: jax.random.normal(noise(key, i), shape) * (2 / shape[-2]) ** 0.5
        self.pixels = init(0, 9, channels)
        self.patches = init(1, (SIDE // GRID) ** 2 * channels, width)
        self.grid = init(2, 2, 9 * width, width)
        self.scales = jnp.ones((2, width))

    def __call__(self, frame: Float[Array, "16 16"]) -> Float[Array, "16 d"]:
        x = jax.nn.gelu(_neighbours(frame[..., None]) @ self.pixels)
        h = rearrange(x, "(y a) (x b) c -> y x (a b c)", y=GRID, x=GRID) @ self.patches
        for w, scale in zip(self.grid, self.scales, strict=True):
            h = h + jax.nn.gelu(_neighbours(rms_norm(h, scale, 1e-5)) @ w)
        return h.reshape(PATCHES, -1)


def _places() -> Int[Array, "16 2"]:
    """(y, x) of the patches of a frame."""
    return 1 + jnp.stack(jnp.divmod(jnp.arange(PATCHES), GRID), 1)


class VideoQA(eqx.Module):
    """The whole of a clip with all its rounds of question and answer at once, as in training."""

    stem: Stem
    llama: Llama

    def __init__(self, config: Config = SIZES, *, key: PRNGKeyArray):
        """Random weights."""
        self.stem = Stem(config.width, key=noise(key, 0, "stem"))
        text = Llama(config, key=noise(key, 0, "llama"))
        matrices = lambda m: (
            m.embedding,
            *(getattr(m.blocks, x) for x in ("wq", "wk", "wv", "wo", "gate", "up", "down")),
        )
        # Their deviation of 0.02 is made for wide models.
        self.llama = eqx.tree_at(matrices, text, replace_fn=lambda x: x / (0.02 * config.width**0.5))

    def __call__(
        self,
        frames: Float[Array, "F 16 16"],
        rounds: Int[Array, "R 4"],
        at: Int[Array, " R"],
        kept: Bool[Array, " R"],
        stride: Int[Array, " F"] | None = None,
        shown: Int[Array, "F p"] | None = None,
        times: Int[Array, " F"] | None = None,
    ) -> tuple[Float[Array, "F vocab"], Float[Array, "R 4 vocab"]]:
        """Logits after each frame, and after each token of text.

        Rounds may also come without their answer: i32[R, 3].

        Arguments:
            frames: with pixels in [0, 1].
            rounds: question and answer.
            at: the frame that each round follows; -1: before all.
            kept: whether what follows sees a round, which then takes its ticks, or it is as if it had never been. No
                two rounds that are kept may follow the same frame.
            stride: ticks from the frame before (from 0) to each frame; 1 unless said, 0 for the first.
            shown: the patches of each frame that are shown, 0 to 15, in order; all unless said.
            times: as how many frames each one counts once another has followed it; 1 unless said. A clip of which
                frames are left out is so attended to like the longer one.
        """
        seen, text = self.hidden(frames, rounds, at, kept, stride, shown, times)
        return self.logits(seen[-1, :, -1]), self.logits(text[-1])

    def logits(self, h: Float[Array, "... d"]) -> Float[Array, "... vocab"]:
        """What comes out of the last layer, as logits."""
        return rms_norm(h, self.llama.norm, self.llama.config.eps) @ self.llama.head.T

    def hidden(
        self,
        frames: Array,
        rounds: Array,
        at: Array,
        kept: Array,
        stride: Array | None,
        shown: Array | None,
        times: Array | None,
    ) -> tuple[Float[Array, "L F p d"], Float[Array, "L R n d"]]:
        """What each layer makes of the tokens of frames and of text; arguments as those of a call."""
        F, R, n = len(frames), len(rounds), rounds.shape[1]
        stride = jnp.minimum(jnp.arange(F), 1) if stride is None else stride
        shown = jnp.tile(jnp.arange(PATCHES), (F, 1)) if shown is None else shown
        p = shown.shape[1]
        tick = jnp.cumsum(stride) + n * (kept & (at < jnp.arange(F)[:, None])).sum(1)
        begin = 1 + jnp.where(at < 0, -1, tick[at])
        text = begin[:, None] + jnp.arange(n)
        vision = jnp.concatenate([jnp.repeat(tick, p)[:, None], _places()[shown.reshape(-1)]], 1)
        positions = jnp.concatenate([vision, jnp.pad(text.reshape(-1, 1), ((0, 0), (0, 2)))])
        # The order of frames and rounds; tokens of the same one see what comes before them in it.
        order = jnp.concatenate([jnp.repeat(2 * jnp.arange(F), p), jnp.repeat(2 * at + 1, n)])
        which = jnp.concatenate([jnp.repeat(jnp.arange(F), p), jnp.repeat(F + jnp.arange(R), n)])
        stays = jnp.concatenate([jnp.ones(F * p, bool), jnp.repeat(kept, n)])
        index = jnp.arange(len(order))
        visible = (order < order[:, None]) & stays | (which == which[:, None]) & (index <= index[:, None])
        counts = None
        if times is not None:
            newest = order // 2 == order[:, None] // 2  # for a frame itself, for a round the frame that it follows
            counts = jnp.where(newest, 1.0, jnp.concatenate([jnp.repeat(times, p), jnp.ones(R * n)]))

        # No frame sees a later one: attention goes piece by piece, whose scores are fewer and fit into a cache.
        cuts = [*range(0, F * p, PIECE * p), F * p]
        pieces = [(slice(a, b), np.r_[:b, F * p : len(order)]) for a, b in itertools.pairwise(cuts)]
        pieces.append((slice(F * p, None), np.arange(len(order))))

        def layer(h: Array, block: llama.Block) -> tuple[Array, Array]:
            q, k, v = block.qkv(h, positions)
            k, v = k.swapaxes(0, 1), v.swapaxes(0, 1)
            part = lambda x, mine, keys: None if x is None else x[mine, keys]
            taken = [
                attend(q[mine], k[:, keys], v[:, keys], visible[mine, keys], part(counts, mine, keys))
                for mine, keys in pieces
            ]
            h = block.close(h, jnp.concatenate(taken))
            return h, h

        seen = jax.vmap(lambda frame, shown: self.stem(frame)[shown])(frames, shown).reshape(F * p, -1)
        first = jnp.concatenate([seen, self.llama.embedding[rounds.reshape(-1)]])
        _, h = lax.scan(layer, first, self.llama.blocks)
        return h[:, : F * p].reshape(len(h), F, p, -1), h[:, F * p :].reshape(len(h), R, n, -1)


class Watched(NamedTuple):
    """What a `Watcher` remembers."""

    memory: tuple[Held, ...]
    """Of each layer."""
    tick: Int[Array, ""]
    """Of what comes next."""


class Watcher(Cell):
    """The model on a stream of frames f32[16, 16] with pixels in [0, 1]: what it says after each, as logits f32[64].

    A frame is 16 tokens and a question three, so that a memory with `room` = 16 n + 3 makes room at most once in n
    frames, and not for a question. One with a budget for the whole stream remembers all.

    Arguments:
        model: weights.
        keep: makes the memory of each layer; any policy of `anabranch.keep`.

    Raises:
        ValueError: if a frame does not fit into the room of the memory.
    """

    stem: Stem
    decoder: Decoder
    keep: Keep

    def __init__(self, model: VideoQA, keep: Keep):
        if keep.room < PATCHES:
            raise ValueError(f"the memory must have room for the {PATCHES} tokens of a frame, got room={keep.room}")
        self.stem, self.decoder, self.keep = model.stem, Decoder(model.llama, keep=keep), keep

    def init(self, *, key: PRNGKeyArray | None = None) -> Watched:
        config = self.decoder.config
        memory = tuple(self.keep.empty(config.kv_heads, config.head_width, places=2) for _ in self.decoder.layers)
        return Watched(memory, jnp.zeros((), jnp.int32))

    def step(self, state: Watched, x: Float[Array, "16 16"]) -> tuple[Watched, Float[Array, " vocab"]]:
        state, h = self.see(state, self.stem(x), _places())
        return state, self.decoder.logits(h[-1:])[0]

    def see(
        self, state: Watched, tokens: Float[Array, "T d"], places: Int[Array, "T 2"], n: Int[Array, ""] | None = None
    ) -> tuple[Watched, Float[Array, "T d"]]:
        """Take the tokens of one frame, or the first n of them, and give what the last layer makes of each.

        For methods that look at tokens, or drop or merge them, before they are written: `stem(frame)` gives those of a
        frame, in the order of `places` (y, x), row by row. What comes out for others than the first n means nothing.
        """
        tick = jnp.broadcast_to(state.tick, len(tokens))
        if n is not None:
            tick = jnp.where(jnp.arange(len(tokens)) < n, tick, -1)
        positions = jnp.concatenate([tick[:, None], places], 1)
        h, memory = self.decoder.run_layers(tokens, state.memory, positions)
        return Watched(self.keep.settle(memory), state.tick + 1), h

    def tell(self, state: Watched, text: Int[Array, " T"]) -> tuple[Watched, Float[Array, "T vocab"]]:
        """Take tokens of text, which stay in memory like frames: a standing question, or a round with its answer."""
        tick = state.tick + jnp.arange(len(text))
        positions = jnp.pad(tick[:, None], ((0, 0), (0, 2)))
        h, memory = self.decoder.run_layers(self.decoder.embedding[text], state.memory, positions)
        return Watched(self.keep.settle(memory), state.tick + len(text)), self.decoder.logits(h)

    def ask(self, state: Watched, question: Int[Array, " T"]) -> Float[Array, " vocab"]:
        """The answer to a question, as logits; the memory is then as if it had not been asked."""
        return self.tell(state, question)[1][-1]


def load() -> VideoQA:
    """The trained weights.

    Raises:
        FileNotFoundError: they are not there.
    """
    return train.load("video_qa", VideoQA(key=jax.random.PRNGKey(0)))
