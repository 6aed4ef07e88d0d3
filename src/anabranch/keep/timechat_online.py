"""TimeChat-Online: 80% Visual Tokens are Naturally Redundant in Streaming Videos (arXiv 2504.17343, 2025).

The stream is a video. *Differential Token Drop* (`DTD`) lets a token of a frame pass if it differs from the token at
the same place one frame before, by the cosine of their features or by the mean difference of their pixels; the state is
the frame before. What is dropped never reaches the model; what passes keeps its tick and place, so that the model sees
holes. How many are dropped, frame by frame, is the *drop curve*: in its valleys the scene changes, and there the model
is asked whether it can answer a question that it was told beforehand (`DropCurve`, `ProactiveTrigger`).

    >>> drop = DTD(places=2, width=3)
    >>> xs = jnp.array([[[1.0, 0, 0], [0, 1, 0]], [[1, 0.1, 0], [1, 0, 0]]])
    >>> drop.advance(drop.init(), xs)[1].keep.tolist()
    [[True, True], [False, True]]

`TimeChatOnline` is the whole of it around a `Watcher`. It is not bounded by itself, since a video that changes goes on
adding tokens: the memory of the watcher has to be.

As in the authors' code (yaolinli/TimeChat-Online), a frame is compared with the one before, whether or not its tokens
passed, so that what changes slowly never passes; `reference="last_kept"` compares with what passed last. Its demo asks
at the tenth of all frames of a clip that dropped least; a stream does not know its end, and compares with the last
`window` frames. The model is not fine-tuned on what `DTD` leaves of videos, as the authors' is.
"""

import math
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from anabranch.cell import Cell, Maybe
from anabranch.combine import Chain
from anabranch.models.video_qa import GRID, PATCHES, SILENT, Watched, Watcher


class Drop(NamedTuple):
    """Which tokens of a frame pass."""

    keep: Bool[Array, " P"]
    change: Float[Array, " P"]
    """How much each differs from the one before: 1 - cosine, or the mean difference of pixels; infinite in the first
    frame."""


class Before(NamedTuple):
    """What `DTD` remembers."""

    tokens: Float[Array, "P D"]
    """To compare with."""
    begun: Bool[Array, ""]
    quiet: Int[Array, ""]
    """Frames since a token passed."""
    mean: Float[Array, " D"]
    """Of all tokens so far, if features are centred."""
    frames: Float[Array, ""]
    """How many there were."""


class DTD(Cell):
    """Differential Token Drop: tokens f32[P, D] of a frame give a `Drop`. The first frame passes as a whole.

    Arguments:
        places: P, tokens of a frame.
        width: D, features of a token, or pixels of all colours of its patch.
        tau: tokens are dropped whose cosine is above it (-1 to 1), or the difference of whose pixels below (0 to 1); if
            not `absolute`, the share of a frame that is dropped, the least different first (0 to 1).
        level: what is compared. "feature": what comes out of the vision encoder. "pixel": values in [0, 1].
        absolute: whether tau is a threshold.
        reference: compare with the "previous" frame, or at each place with the "last_kept" token.
        centre: whether the mean of all tokens so far is taken from features. Where they have much in common, all
            cosines are near 1.
        heartbeat: at the latest in each such frame in a row the token that differs most passes, so that time leaves a
            trace; 0: never.
        pair: whether a token is made of the same patch of two frames, given as f32[2, P, D]: then the second is
            compared with the first of the pair before, as the code does with pixels.

    Raises:
        ValueError: if places or width is not positive, tau is out of its range, or level, reference or heartbeat is
            none.
    """

    smooth = False

    places: int = eqx.field(static=True)
    width: int = eqx.field(static=True)
    tau: float = 0.5
    level: Literal["feature", "pixel"] = eqx.field(static=True, default="feature")
    absolute: bool = eqx.field(static=True, default=True)
    reference: Literal["previous", "last_kept"] = eqx.field(static=True, default="previous")
    centre: bool = eqx.field(static=True, default=False)
    heartbeat: int = eqx.field(static=True, default=0)
    pair: bool = eqx.field(static=True, default=False)

    def __check_init__(self):
        for name in ("places", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.level not in ("feature", "pixel"):
            raise ValueError(f'level must be "feature" or "pixel", got {self.level!r}')
        if self.reference not in ("previous", "last_kept"):
            raise ValueError(f'reference must be "previous" or "last_kept", got {self.reference!r}')
        low = -1 if self.level == "feature" and self.absolute else 0
        if not low <= self.tau <= 1:
            raise ValueError(f"tau must be in {low}..1, got {self.tau}")
        if self.heartbeat < 0:
            raise ValueError(f"heartbeat must not be negative, got {self.heartbeat}")

    def init(self, *, key=None):
        P, D = self.places, self.width
        return Before(jnp.zeros((P, D)), jnp.zeros((), bool), jnp.int32(0), jnp.zeros(D), jnp.float32(0))

    def step(self, state: Before, x: Float[Array, "*pair P D"]) -> tuple[Before, Drop]:
        first, last = self._pair(x)
        frames = state.frames + 1
        mean = state.mean + (last.mean(0) - state.mean) / frames if self.centre else state.mean
        drop = self.compared(state.tokens - mean, last - mean, state.begun)
        if self.heartbeat:
            beat = state.quiet + 1 >= self.heartbeat
            drop = drop._replace(keep=drop.keep | (beat & (jnp.arange(self.places) == jnp.argmax(drop.change))))
        quiet = jnp.where(drop.keep.any(), 0, state.quiet + 1)
        tokens = first if self.reference == "previous" else jnp.where(drop.keep[:, None], first, state.tokens)
        return Before(tokens, jnp.ones((), bool), quiet, mean, frames), drop

    def offline(self, xs):
        if self.reference != "previous" or self.centre or self.heartbeat:
            return super().offline(xs)
        first, last = jax.vmap(self._pair)(xs)
        before = jnp.concatenate([jnp.zeros_like(first[:1]), first[:-1]])
        return jax.vmap(self.compared)(before, last, jnp.arange(len(xs)) > 0)

    def _pair(self, x: Array) -> tuple[Array, Array]:
        wanted = (2,) * self.pair + (self.places, self.width)
        if x.shape != wanted:
            raise ValueError(f"a frame must be of the shape {wanted}, got {x.shape}")
        return (x[0], x[1]) if self.pair else (x, x)

    def compared(self, old: Float[Array, "P D"], new: Float[Array, "P D"], begun: Bool[Array, ""]) -> Drop:
        """What passes of `new` when `old` was there before."""
        if self.level == "pixel":
            change = jnp.abs(new - old).mean(-1)
            keep = change >= self.tau
        else:
            norms = jnp.linalg.norm(new, axis=-1) * jnp.linalg.norm(old, axis=-1)
            # Where one is zero there is no cosine, and they differ.
            cosine = jnp.where(norms > 0, (new * old).sum(-1) / jnp.maximum(norms, 1e-8), -1.0)
            change, keep = 1 - cosine, cosine <= self.tau
        if not self.absolute:
            keep = jnp.argsort(jnp.argsort(change)) >= jnp.floor(self.tau * self.places)
        return Drop(keep | ~begun, jnp.where(begun, change, jnp.inf))


def pack(drop: Drop, cap: int) -> tuple[Int[Array, " cap"], Int[Array, ""]]:
    """The places of the tokens that pass, in front and in order, and how many there are: at most `cap`, those that
    differ most.

        >>> index, n = pack(Drop(jnp.array([True, False, True, True]), jnp.array([0.9, 0.1, 0.6, 0.8])), 2)
        >>> index[:n].tolist()
        [0, 3]
    """
    change = jnp.where(drop.keep, drop.change, -jnp.inf)
    rank = jnp.argsort(jnp.argsort(-change))
    taken = drop.keep & (rank < cap)
    return jnp.argsort(~taken)[:cap], taken.sum()


class Curve(NamedTuple):
    """What `DropCurve` remembers."""

    ring: Float[Array, " W"]
    """The shares that were dropped of the last frames."""
    frames: Int[Array, ""]
    """How many there were."""


class DropCurve(Cell):
    """The share of a frame's tokens that is dropped; valid in a valley: in the frames of the last `window` in which
    least was dropped.

    The first frame, before which there was none, does not count.

    Arguments:
        window: frames to compare with, this one included.
        share: of them are valleys, rounded up. Of equals, so many that they would be more, none is.

    Raises:
        ValueError: if the window has no two frames or the share is not in 0..1.
    """

    smooth = False

    window: int = eqx.field(static=True, default=64)
    share: float = eqx.field(static=True, default=0.1)

    def __check_init__(self):
        if self.window < 2:
            raise ValueError(f"window must be at least 2, got {self.window}")
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be in 0..1 and not 0, got {self.share}")

    def init(self, *, key=None):
        return Curve(jnp.full(self.window - 1, jnp.inf), jnp.int32(0))

    def step(self, state: Curve, x: Drop) -> tuple[Curve, Maybe[Float[Array, ""]]]:
        r = 1 - x.keep.mean()
        others = jnp.clip(state.frames - 1, 0, self.window - 1)
        limits = jnp.array([math.ceil(self.share * (n + 1)) for n in range(self.window)])
        valley = (others > 0) & ((state.ring <= r).sum() < limits[others])
        ring = jnp.concatenate([state.ring[1:], jnp.where(state.frames > 0, r, jnp.inf)[None]])
        return Curve(ring, state.frames + 1), Maybe(r, valley)


class ProactiveTrigger(Chain):
    """When to speak: frames as `drop` takes them give the share that was dropped, valid where the scene changes."""

    def __init__(self, drop: DTD, curve: DropCurve):
        super().__init__(drop, curve)


class Watching(NamedTuple):
    """What `TimeChatOnline` remembers."""

    watched: Watched
    before: Any
    """What `drop` remembers."""
    curve: Curve
    passed: Int[Array, ""]
    """Tokens that were written so far."""
    overflow: Int[Array, ""]
    """Tokens that would have passed, but for which there was no room."""


class TimeChatOnline(Cell):
    """A `Watcher` that sees of each frame, f32[16, 16] with pixels in [0, 1], what differs from the frame before.

    What it says after a frame, logits f32[64], is valid where the scene changes and the model is not silent.

    Arguments:
        watcher: sees what passes.
        drop: says what does: `DTD`, on features f32[16, d] or, with `level="pixel"`, on patches f32[16, 16].
        curve: says when to speak.
        cap: tokens of a frame that pass at most.

    Raises:
        ValueError: if cap is not 1 to 16.
    """

    smooth = False

    watcher: Watcher
    drop: Any
    curve: DropCurve
    cap: int = eqx.field(static=True)

    def __init__(self, watcher: Watcher, drop: Any, curve: DropCurve | None = None, cap: int = PATCHES):
        if not 1 <= cap <= PATCHES:
            raise ValueError(f"cap must be 1 to {PATCHES}, got {cap}")
        self.watcher, self.drop, self.curve, self.cap = watcher, drop, curve or DropCurve(), cap

    def init(self, *, key=None):
        zero = lambda: jnp.zeros((), jnp.int32)
        return Watching(self.watcher.init(), self.drop.init(key=key), self.curve.init(), zero(), zero())

    def step(self, state: Watching, x: Float[Array, "16 16"]) -> tuple[Watching, Maybe[Float[Array, " vocab"]]]:
        tokens, place = self.watcher.stem(x), 1 + jnp.stack(jnp.divmod(jnp.arange(PATCHES), GRID), 1)
        compared = patches(x) if self.drop.level == "pixel" else tokens
        before, drop = self.drop.step(state.before, compared)
        index, n = pack(drop, self.cap)
        watched, h = self.watcher.see(state.watched, tokens[index], place[index], n)
        curve, valley = self.curve.step(state.curve, drop)
        said = self.watcher.decoder.logits(h[n - 1][None])[0]
        new = Watching(watched, before, curve, state.passed + n, state.overflow + drop.keep.sum() - n)
        return new, Maybe(said, valley.valid & (n > 0) & (said.argmax() != SILENT))

    def tell(self, state: Watching, text: Int[Array, " T"]) -> Watching:
        """Take a standing question."""
        return state._replace(watched=self.watcher.tell(state.watched, text)[0])

    def ask(self, state: Watching, question: Int[Array, " T"]) -> Float[Array, " vocab"]:
        """The answer to a question, as logits; the memory is then as if it had not been asked."""
        return self.watcher.ask(state.watched, question)


def patches(frame: Float[Array, "h w"], grid: int = GRID) -> Float[Array, "P D"]:
    """The pixels of each patch of a frame that has `grid` rows and columns of them."""
    return rearrange(frame, "(y a) (x b) -> (y x) (a b)", y=grid, x=grid)


def example() -> tuple[Cell, Array]:
    """Scenes of eight tokens in which some change."""
    key = jax.random.PRNGKey(0)
    scene, noise = jax.random.normal(key, (2, 48, 8, 6))
    moves = jax.random.bernoulli(key, 0.3, (48, 8, 1))
    return ProactiveTrigger(DTD(8, 6), DropCurve(16)), scene[jnp.arange(48) // 12 * 12] + moves * noise
