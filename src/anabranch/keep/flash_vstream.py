"""Flash-VStream: Memory-Based Real-Time Understanding for Long Video Streams (arXiv 2406.08085, 2024).

The stream is the features of frames, f32[P, D] on a square grid of P patches; the state four small memories of them,
`STARMemory`, which a language model may read at any moment as tokens:

- *spatial*: the last frames, whole;
- *temporal*: frames at a lower resolution, in clusters. New ones and the centroids, each as heavy as the frames that
  it stands for, are clustered again by weighted k-means;
- *abstract*: one token each, into which new frames are mixed by attention;
- *retrieved*: for each of the heaviest clusters, the real frame nearest to its centroid, whole.

    >>> attention = SemanticAttention(8, key=jax.random.PRNGKey(0))
    >>> memory = STARMemory(attention, 16, clusters=5, grid=2, abstract=3)
    >>> state, read = memory.advance(memory.init(), jax.random.normal(jax.random.PRNGKey(1), (9, 16, 8)))
    >>> read.tokens.shape, float(state.weight.sum())  # after each of 9 frames, 3 + 5 * 4 + (3 + 1) * 16 tokens
    ((9, 87, 8), 9.0)

`FlashVStream` is a model that watches with such a memory: frames only change the memory, and a question is answered
from what it then holds.

Where this differs from the authors' code (IVGSZ/Flash-VStream):

- Clusters keep their weight. When the code streams, every centroid counts as one frame again: `weighted=False`.
- Heaviest clusters are looked up among clusters, and the frame nearest to one among frames. The code takes, for
  cluster i, row i of what was clustered, and takes the row nearest to that as the number of a frame.
- The code keeps all frames to retrieve from. Here twice as many as there are clusters are kept, about the two nearest
  to each, so that one which only later becomes the nearest may be missed.
- A cluster that stays empty, as when frames repeat, is a free place; in the code it is a frame drawn at random.
- Clusters and retrieved frames are read in the order of time, with positions (rank in time, y, x); what stands for
  several frames or patches is where they are in the mean. In the code they are in no order and tokens are numbered.
- The model is of `models.video_qa`, whose stem makes the features, so that there is no projector between.
- Gradients pass through the means, not through the choice of a cluster.

Attention over the tokens of a single new frame, of which there is one, is 1: for it to be selective, frames must come
in blocks (`write`).
"""

from dataclasses import KW_ONLY
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from einops import reduce
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from anabranch.cell import Cell, noise
from anabranch.layers.attention import attend
from anabranch.models.llama import Block, rms_norm
from anabranch.models.video_qa import PATCHES, VideoQA


class STAR(NamedTuple):
    """What is remembered of a stream."""

    recent: Float[Array, "recent P D"]
    """The last frames, the newest last."""
    centroid: Float[Array, "clusters p D"]
    """In the order of `time` of none."""
    weight: Float[Array, " clusters"]
    """Frames that each cluster stands for; 0 where there is none."""
    time: Float[Array, " clusters"]
    """Their mean number in the stream."""
    abstract: Float[Array, "abstract D"]
    frame: Float[Array, "K P D"]
    """Frames that may be retrieved, oldest first."""
    number: Int[Array, " K"]
    """Of each in the stream; -1 where there is none."""
    clock: Int[Array, ""]
    """Frames so far."""
    key: PRNGKeyArray


class Read(NamedTuple):
    """A memory as N tokens of a prompt: abstract, temporal, retrieved and spatial."""

    tokens: Float[Array, "N D"]
    positions: Float[Array, "N 3"]
    """Rank in time of all that is there, and row and column in patches, from 1."""
    there: Bool[Array, " N"]
    """False where nothing has come yet."""


def weighted_kmeans(
    x: Float[Array, "n d"],
    weight: Float[Array, " n"],
    start: Int[Array, " k"],
    key: PRNGKeyArray,
    most: int = 10,
    tolerance: float = 1e-4,
) -> tuple[Float[Array, "k d"], Float[Array, " k"], Int[Array, " n"]]:
    """Centroids, their weights and the cluster of each row; a row of no weight is none.

    Begins with the rows `start` as centroids, and ends when centroids have moved by less than `tolerance` together, or
    after `most` rounds. In each round an empty cluster begins anew at a random row; one that is empty in the end has no
    weight.

        >>> x = jnp.array([[0.0], [1.0], [9.0]])
        >>> c, w, label = weighted_kmeans(x, jnp.array([3.0, 1, 1]), jnp.array([1, 2]), jax.random.PRNGKey(0))
        >>> c.tolist(), w.tolist(), label.tolist()
        ([[0.25], [9.0]], [4.0, 1.0], [0, 0, 1])
    """
    fixed, heavy, k = lax.stop_gradient(x), lax.stop_gradient(weight), len(start)

    def round(carry: tuple) -> tuple:
        i, centroid, _, _ = carry
        label = _distance(fixed, centroid).argmin(1)
        new, total = _means(fixed, heavy, label, k)
        again = jax.random.categorical(noise(key, i, "again"), jnp.log(heavy), shape=(k,))
        new = jnp.where((total > 0)[:, None], new, fixed[again])
        moved = jnp.linalg.norm(new - centroid, axis=1).sum()
        return i + 1, jnp.where(moved < tolerance, centroid, new), label, moved

    begin = jnp.int32(0), fixed[start], jnp.zeros(len(x), jnp.int32), jnp.float32(jnp.inf)
    _, _, label, _ = lax.while_loop(lambda carry: (carry[0] < most) & (carry[3] >= tolerance), round, begin)
    return *_means(x, weight, label, k), label


def _distance(x: Float[Array, "n d"], y: Float[Array, "k d"]) -> Float[Array, "n k"]:
    """Squared; as sums of squares of differences, so that equal rows are at distance 0."""
    return ((x[:, None] - y) ** 2).sum(-1)


def _means(x: Array, weight: Array, label: Array, k: int) -> tuple[Float[Array, "k d"], Float[Array, " k"]]:
    """The mean of the rows of each label, and their weight."""
    share = (label == jnp.arange(k)[:, None]) * weight
    total = share.sum(1)
    return share @ x / jnp.where(total > 0, total, 1.0)[:, None], total


class SemanticAttention(eqx.Module):
    """Mixes new tokens into those remembered, which look for what is like them."""

    q: eqx.nn.Linear
    k: eqx.nn.Linear
    ratio: float = eqx.field(static=True)
    """How much of a remembered token is replaced."""

    def __init__(self, width: int, hidden: int = 32, ratio: float = 0.2, *, key: PRNGKeyArray):
        self.q, self.k = (eqx.nn.Linear(width, hidden, key=noise(key, 0, use)) for use in ("query", "key"))
        self.ratio = ratio

    def __call__(
        self, old: Float[Array, "N D"], new: Float[Array, "c D"], there: Bool[Array, " c"]
    ) -> Float[Array, "N D"]:
        q, k = jax.vmap(self.q)(old), jax.vmap(self.k)(new)
        score = jnp.where(there, q @ k.T / q.shape[1] ** 0.5, -1e9)
        share = jnp.where(there, self.ratio * jax.nn.softmax(score), 0.0)
        return old * (1 - share.sum(1, keepdims=True)) + share @ new


class STARMemory(Cell):
    """Four memories of a stream of features f32[P, D]; gives what may be read after each frame.

    Raises:
        ValueError: if a size is not positive, more is to be retrieved than there are clusters, P is not square, or its
            side is no multiple of `grid`.
    """

    smooth = False  # frames change clusters, and of a cluster of two either one may be the nearest

    attention: SemanticAttention
    """Of width D."""
    patches: int = eqx.field(static=True, default=64)
    """Of a frame, P, on a square grid."""
    _: KW_ONLY
    recent: int = eqx.field(static=True, default=1)
    """Last frames that are kept."""
    clusters: int = eqx.field(static=True, default=25)
    """Of past frames."""
    grid: int = eqx.field(static=True, default=4)
    """Patches of a side of a centroid."""
    abstract: int = eqx.field(static=True, default=25)
    """Tokens of the abstract memory."""
    retrieved: int = eqx.field(static=True, default=3)
    """Clusters for which a frame is retrieved."""
    weighted: bool = eqx.field(static=True, default=True)
    """Whether a cluster is clustered again with the weight of all its frames, or as one."""

    def __check_init__(self):
        for name in ("patches", "recent", "clusters", "grid", "abstract", "retrieved"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.retrieved > self.clusters:
            raise ValueError(f"retrieved must be at most clusters={self.clusters}, got {self.retrieved}")
        if self.side**2 != self.patches or self.side % self.grid:
            raise ValueError(
                f"patches must be a square whose side is a multiple of grid={self.grid}, got {self.patches}"
            )

    @property
    def width(self) -> int:
        return self.attention.q.weight.shape[1]

    @property
    def side(self) -> int:
        return round(self.patches**0.5)

    def init(self, *, key: PRNGKeyArray | None = None) -> STAR:
        P, D, N, K = self.patches, self.width, self.clusters, 2 * self.clusters
        return STAR(
            recent=jnp.zeros((self.recent, P, D)),
            centroid=jnp.zeros((N, self.grid**2, D)),
            weight=jnp.zeros(N),
            time=jnp.zeros(N),
            abstract=jnp.zeros((self.abstract, D)),
            frame=jnp.zeros((K, P, D)),
            number=jnp.full(K, -1, jnp.int32),
            clock=jnp.zeros((), jnp.int32),
            key=jax.random.PRNGKey(0) if key is None else key,
        )

    def step(self, state: STAR, x: Float[Array, "P D"]) -> tuple[STAR, Read]:
        state = self.write(state, x[None])
        return state, self.read(state)

    def write(self, state: STAR, frames: Float[Array, "c P D"]) -> STAR:
        """Take c frames at once.

        Raises:
            ValueError: if they are more than the abstract memory has tokens.
        """
        if len(frames) > self.abstract:
            raise ValueError(f"at most abstract={self.abstract} frames can come at once, got {len(frames)}")
        numbers = state.clock + jnp.arange(len(frames))
        centroid, weight, time = self._clustered(state, frames, numbers)
        frame, number = self._candidates(state, frames, numbers, centroid, weight)
        return STAR(
            recent=jnp.concatenate([state.recent, frames])[-self.recent :],
            centroid=centroid,
            weight=weight,
            time=time,
            abstract=self._abstracted(state, self._pooled(frames, 1)[:, 0], numbers),
            frame=frame,
            number=number,
            clock=state.clock + len(frames),
            key=state.key,
        )

    def _pooled(self, frames: Float[Array, "n P D"], grid: int) -> Float[Array, "n p D"]:
        a = self.side // grid
        return reduce(frames, "n (y a x b) d -> n (y x) d", "mean", a=a, b=a, y=grid, x=grid)

    def _clustered(self, state: STAR, frames: Array, numbers: Array) -> tuple[Array, Array, Array]:
        """Centroids, weights and times; frames are clusters of their own as long as there is place."""
        N = self.clusters
        x = jnp.concatenate([state.centroid, self._pooled(frames, self.grid)])
        x = x.reshape(len(x), -1)
        weight = jnp.concatenate([state.weight, jnp.ones(len(frames))])
        time = jnp.concatenate([state.time, numbers.astype(jnp.float32)])
        there = weight > 0
        counted = weight if self.weighted else there.astype(jnp.float32)
        key = noise(state.key, state.clock, "clusters")
        draw = jax.random.uniform(noise(key, 0, "start"), (len(x),))
        start = jnp.argsort(jnp.where(there, draw, 2.0))[:N]
        *_, label = weighted_kmeans(x, counted, start, key)
        label = jnp.where(there.sum() <= N, jnp.cumsum(there) - 1, label)
        centroid, total = _means(x, counted, label, N)
        return centroid.reshape(state.centroid.shape), total, _means(time[:, None], counted, label, N)[0][:, 0]

    def _candidates(
        self, state: STAR, frames: Array, numbers: Array, centroid: Array, weight: Array
    ) -> tuple[Array, Array]:
        """Those stay that are nearest to some cluster, then those that are second, and so on; of equals, the newer."""
        frame, number = jnp.concatenate([state.frame, frames]), jnp.concatenate([state.number, numbers])
        n = len(frame)
        rank = self._distances(frame, number, centroid).argsort(0).argsort(0)
        rank = jnp.where(number < 0, n, jnp.where(weight > 0, rank, n - 1).min(1))
        kept = jnp.sort(jnp.argsort(n * rank - jnp.arange(n))[: 2 * self.clusters])
        return frame[kept], number[kept]

    def _distances(self, frame: Array, number: Array, centroid: Array) -> Float[Array, "K k"]:
        """From frames to centroids; those that are not there are infinitely far."""
        distance = _distance(
            self._pooled(frame, self.grid).reshape(len(frame), -1), centroid.reshape(len(centroid), -1)
        )
        return jnp.where((number >= 0)[:, None], distance, jnp.inf)

    def _abstracted(self, state: STAR, new: Float[Array, "c D"], numbers: Int[Array, " c"]) -> Float[Array, "N D"]:
        """The first frames fill the memory; later ones are mixed in."""
        old = state.abstract.at[numbers].set(new, mode="drop")
        return self.attention(old, new, numbers >= self.abstract)

    def read(self, state: STAR) -> Read:
        """What a language model may read now."""
        heaviest = jnp.argsort(-state.weight)[: self.retrieved]
        near = self._distances(state.frame, state.number, state.centroid[heaviest]).argmin(0)
        near = near[jnp.argsort(jnp.where(state.weight[heaviest] > 0, state.number[near], jnp.iinfo(jnp.int32).max))]
        order = jnp.argsort(jnp.where(state.weight > 0, state.time, jnp.inf))
        last = state.clock - self.recent + jnp.arange(self.recent)

        # Items: the abstract memory, which is before all, clusters, frames.
        times = jnp.concatenate([jnp.array([-1.0]), state.time[order], state.number[near], last])
        kinds = jnp.array([state.clock > 0]), state.weight[order] > 0, state.weight[heaviest] > 0, last >= 0
        there = jnp.concatenate(kinds)
        first = there & ~((times == times[:, None]) & jnp.tri(len(times), k=-1, dtype=bool) & there).any(1)
        rank = (first & (times < times[:, None])).sum(1).astype(jnp.float32)

        item, place = self._layout
        parts = state.abstract, state.centroid[order], state.frame[near], state.recent
        empty = (item == 0) & (np.arange(len(item)) >= state.clock)  # the abstract memory fills token by token
        return Read(
            jnp.concatenate([part.reshape(-1, self.width) for part in parts]),
            jnp.concatenate([rank[item][:, None], place], 1),
            there[item] & ~empty,
        )

    @property
    def _layout(self) -> tuple[Int[np.ndarray, " N"], Float[np.ndarray, "N 2"]]:
        """The item that each token is of, and where in a frame the token is."""

        def places(grid: int) -> np.ndarray:
            return (np.stack(np.divmod(np.arange(grid**2), grid), 1) + 0.5) * (self.side / grid) + 0.5

        parts = [np.tile(places(1), (self.abstract, 1))]
        parts += [places(self.grid)] * self.clusters + [places(self.side)] * (self.retrieved + self.recent)
        return np.repeat(np.arange(len(parts)), [len(part) for part in parts]), np.concatenate(parts, dtype=np.float32)


class FlashVStream(Cell):
    """A model that watches frames f32[16, 16] with pixels in [0, 1], and answers from a `STARMemory` of them.

    Raises:
        ValueError: if the memory is not for frames of the model.
    """

    smooth = False

    model: VideoQA
    memory: STARMemory

    def __init__(self, model: VideoQA, memory: STARMemory):
        found, wanted = (memory.patches, memory.width), (PATCHES, model.llama.config.width)
        if found != wanted:
            raise ValueError(f"the memory must be for {wanted[0]} patches of width {wanted[1]}, got {found}")
        self.model, self.memory = model, memory

    def init(self, *, key: PRNGKeyArray | None = None) -> STAR:
        return self.memory.init(key=key)

    def step(self, state: STAR, x: Float[Array, "16 16"]) -> tuple[STAR, Read]:
        return self.memory.step(state, self.model.stem(x))

    def ask(self, state: STAR, question: Int[Array, " T"]) -> Float[Array, " vocab"]:
        """The answer to a question, as logits."""
        return answer(self.model, self.memory.read(state), question)


def answer(model: VideoQA, read: Read, question: Int[Array, " T"]) -> Float[Array, " vocab"]:
    """What the model answers when its prompt is a memory. Many questions about one memory: `jax.vmap`."""
    llama, N, T = model.llama, len(read.tokens), len(question)
    causal = jnp.tri(N, dtype=bool) & read.there | jnp.eye(N, dtype=bool)
    begin = jnp.where(read.there, read.positions[:, 0], -1.0).max() + 1
    at = jnp.pad((begin + jnp.arange(T))[:, None], ((0, 0), (0, 2)))
    visible = jnp.concatenate([jnp.broadcast_to(read.there, (T, N)), jnp.tri(T, dtype=bool)], 1)

    def remember(h: Array, block: Block) -> tuple[Array, tuple[Array, Array]]:
        q, k, v = block.qkv(h, read.positions)
        k, v = k.swapaxes(0, 1), v.swapaxes(0, 1)
        return block.close(h, attend(q, k, v, causal)), (k, v)

    def reply(h: Array, layer: tuple[Block, tuple[Array, Array]]) -> tuple[Array, None]:
        block, (old_k, old_v) = layer
        q, k, v = block.qkv(h, at)
        k, v = (jnp.concatenate([old, x.swapaxes(0, 1)], 1) for old, x in ((old_k, k), (old_v, v)))
        return block.close(h, attend(q, k, v, visible)), None

    _, memory = lax.scan(remember, read.tokens, llama.blocks)
    h, _ = lax.scan(reply, llama.embedding[question], (llama.blocks, memory))
    return (rms_norm(h[-1:], llama.norm, llama.config.eps) @ llama.head.T)[0]


def example() -> tuple[STARMemory, Float[Array, "T P D"]]:
    """A small memory, and the features of 24 frames of which every eighth begins a new scene."""
    scenes = jax.random.normal(jax.random.PRNGKey(0), (3, 16, 8))
    frames = jnp.repeat(scenes, 8, 0) + 0.1 * jax.random.normal(jax.random.PRNGKey(1), (24, 16, 8))
    return STARMemory(SemanticAttention(8, key=jax.random.PRNGKey(2)), 16, clusters=5, grid=2, abstract=3), frames
