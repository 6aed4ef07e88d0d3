"""Trains `models/video_qa.py` to watch streams of MNIST digits and answer questions about them.

First the stem learns to read single frames. Then the model answers questions: about short clips with many scenes, of
whose frames one patch is shown, then four, then all, and then about clips of 64 frames. At last these are 64 frames
out of up to 256, which bring as many scenes, as large ticks and as much to attend to as the longer clip would, so
that the model bears 192 frames without ever being shown more than 64; the last two stages also ask more often for
counts. All questions about a clip are asked in one pass; a third of the clips has a standing alert, in a tenth the
rounds stay. No part of a clip is ever forgotten. Over an hour on two quiet cores; `anabranch train video_qa --from`
weights of the first stages goes on with the others. Needs MNIST in the folder of data sets.
"""

import dataclasses
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from anabranch import data, noise, state
from anabranch.fit import fit
from anabranch.keep.video import whole
from anabranch.models.llama import rms_norm
from anabranch.models.video_qa import (
    ALERT,
    ASK,
    BACK,
    COUNT,
    DIGIT,
    EOS,
    FIRST,
    GRID,
    PATCHES,
    SEEN,
    SIDE,
    SILENT,
    SIZES,
    WHERE,
    YES,
    Stem,
    Stream,
    VideoQA,
    World,
    alerts,
    asked,
)  # fmt: skip


class Stage(NamedTuple):
    """A part of the curriculum."""

    frames: int
    scene: tuple[int, int]
    """Least and greatest length of a scene. Shorter ones than the world's make more of them fit into a clip."""
    patches: int
    """Of a frame that are shown: the one with the centre of the digit, the four in the middle, or all 16."""
    words: int
    """Of a round: 3 without its answer, 4 with it."""
    batch: int
    rounds: int
    steps: int
    rate: float
    hints: float
    """The weight of telling, from the middle of each layer, the digits of the scenes before."""
    thin: int = 0
    """If not 0, a clip is a longer one of which only some frames are shown: one in up to so many, on average between 1
    and half of it. Each then counts as often as frames are left out after it, and itself."""
    palette: int = 6
    """Different digits in a clip: of fewer, each comes more often."""
    counting: float = 0.0
    """The share of rounds that ask for counts beside their usual one."""


STEM = 800
STAGES = (
    Stage(16, (1, 3), 1, 3, 24, 16, 3000, 3e-3, 0.5),
    Stage(16, (1, 4), 4, 3, 16, 12, 1500, 2e-3, 0.5),
    Stage(24, (1, 8), 16, 4, 8, 16, 900, 1.5e-3, 0.3),
    Stage(64, (2, 24), 16, 4, 4, 24, 300, 1e-3, 0.3),
    Stage(64, (8, 24), 4, 4, 8, 32, 360, 1e-3, 0.3, thin=7),
    Stage(64, (8, 24), 16, 4, 4, 32, 120, 7e-4, 0.3, thin=7),
    Stage(64, (8, 24), 16, 4, 4, 32, 120, 7e-4, 0.3, thin=7),
    Stage(64, (8, 24), 4, 4, 8, 32, 300, 1e-3, 0.3, thin=7, palette=4, counting=0.5),
    Stage(64, (8, 24), 16, 4, 4, 32, 150, 7e-4, 0.3, thin=7, counting=0.3),
)
MIDDLE = jnp.array([5, 6, 9, 10])
KINDS = jnp.array([DIGIT, WHERE, BACK, BACK, FIRST, COUNT, SEEN])


class Reader(eqx.Module):
    """The stem with a head that tells of each token which digit has its centre in that patch, or 10 for none."""

    stem: Stem
    head: eqx.nn.Linear


def patch(centre: Float[Array, "... 2"]) -> Array:
    """Row and column, from 0, of the patch with the centre of the digit."""
    return ((centre + 0.5) // (SIDE // GRID)).astype(jnp.int32)


def stem_loss(reader: Reader, batch: tuple[Array, Array, Array], key: PRNGKeyArray) -> Float[Array, ""]:
    frames, digit, centre = batch
    y, x = jnp.unstack(patch(centre), axis=-1)
    logits = jax.vmap(jax.vmap(reader.head))(jax.vmap(reader.stem)(frames))
    label = jnp.where(jnp.arange(PATCHES) == (GRID * y + x)[:, None], digit[:, None], 10)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, label)
    return (loss * jnp.where(label < 10, 1.0, 0.2)).sum(1).mean()


class Clip(NamedTuple):
    """What the model is shown, and what it should say."""

    frames: Array
    rounds: Array
    at: Array
    kept: Array
    stride: Array
    shown: Array
    times: Array
    answer: Array
    weight: Array
    said: Array
    ago: Array
    """The digits of the scenes 1 to 3 before that of each frame, or -1: (F, 3)."""
    middle: Array
    """Which of the patches shown has the centre of the digit: (F,)."""


class Taught(eqx.Module):
    """The model, and heads that tell, of what layer i makes of the digit, which one was there i scenes before."""

    model: VideoQA
    heads: Float[Array, "3 d 10"]


def thinned(stream: Stream, at: Int[Array, " F"]) -> Stream:
    """Only those frames, which leave out no scene."""
    stream = jax.tree.map(lambda x: x[at], stream)
    return stream._replace(begun=jnp.arange(len(at)) - jnp.searchsorted(stream.scene, stream.scene))


def clip(world: World, stage: Stage, key: PRNGKeyArray) -> Clip:
    """A clip with questions at random frames, a tenth of the clips with rounds that stay, a third with an alert.

    Frames are some ticks apart, so that the model learns no distances by heart and bears longer streams.
    """
    F, R = stage.frames, stage.rounds
    draw = lambda use, *shape: jax.random.uniform(noise(key, 0, use), shape)
    drift = jnp.where(draw("drifts") < 0.3, draw("drift"), 0.0)
    spread = 1 + jnp.floor(stage.thin * draw("spread") if stage.thin else 4 * draw("spread") ** 2)
    stride = jnp.where(jnp.arange(F) > 0, 1 + jnp.floor(spread * draw("stride", F)), 0).astype(jnp.int32)
    stream = dataclasses.replace(world, drift=drift).stream(noise(key, 0, "stream"), F * max(1, stage.thin))
    times = jnp.ones(F, jnp.int32)
    if stage.thin:
        stream, times = thinned(stream, jnp.cumsum(stride)), jnp.append(stride[1:], 1)
    stays = (draw("stays") < 0.1) & (R <= F)
    kind = KINDS[jax.random.randint(noise(key, 0, "kinds"), (R,), 0, len(KINDS))]
    if stage.counting:
        kind = jnp.where(draw("counts", R) < stage.counting, COUNT, kind)
    # One round in each R-th of the clip; before the first there is only the alert.
    at = ((jnp.arange(R) + draw("at", R)) * F / R).astype(jnp.int32)
    keys = jax.vmap(lambda i: noise(key, i, "round"))(jnp.arange(R))
    question, answer, valid, _ = jax.vmap(lambda kind, at, key: asked(stream, kind, at, key))(kind, at, keys)
    rounds = jnp.concatenate([question, answer[:, None]], 1)

    c = jnp.where(
        draw("c") < 0.7, stream.digit[(draw("which") * F).astype(jnp.int32)], (draw("any") * 10).astype(jnp.int32)
    )
    standing = draw("alert") < 1 / 3
    alert = jnp.stack([jnp.int32(ALERT), c, jnp.int32(ASK), jnp.int32(SILENT)])
    first = lambda new, old: old.at[0].set(jnp.where(standing, new, old[0]))
    rounds, at, valid, answer = first(alert, rounds), first(-1, at), first(True, valid), first(SILENT, answer)
    kept = first(True, jnp.full(R, stays))
    said = jnp.where(standing, alerts(stream, c), SILENT)
    y, x = jnp.unstack(patch(stream.centre), axis=-1)
    centre = GRID * y + x
    shown = {1: centre[:, None], 4: jnp.tile(MIDDLE, (F, 1)), 16: jnp.tile(jnp.arange(PATCHES), (F, 1))}[stage.patches]
    before = stream.scene[:, None] - jnp.arange(1, 4)
    ago = jnp.where(before < 0, -1, stream.digit[jnp.searchsorted(stream.scene, before)])
    rounds, weight = rounds[:, : stage.words], valid.astype(jnp.float32)
    middle = jnp.argmax(shown == centre[:, None], 1)
    return Clip(stream.frames, rounds, at, kept, stride, shown, times, answer, weight, said, ago, middle)


def shows(batch: Clip) -> tuple[Array, ...]:
    """What the model takes."""
    return batch.frames, batch.rounds, batch.at, batch.kept, batch.stride, batch.shown, batch.times


def loss(taught: Taught, batch: Clip, key: PRNGKeyArray, *, hints: float) -> Float[Array, ""]:
    model = taught.model
    seen, text = jax.vmap(model.hidden)(*shows(batch))
    cross = optax.softmax_cross_entropy_with_integer_labels
    spoken = model.logits(text[:, -1])
    answers = (cross(spoken[:, :, 2], batch.answer) * batch.weight).sum() / batch.weight.sum()
    ends = cross(spoken[:, :, 3:], jnp.full_like(batch.rounds[:, :, 3:], EOS)).sum() / batch.at.size
    heard = (cross(model.logits(seen[:, -1, :, -1]), batch.said) * jnp.where(batch.said == YES, 5.0, 1.0)).mean()
    digit = jnp.take_along_axis(seen[:, :3], batch.middle[:, None, :, None, None], 3)[:, :, :, 0]
    told = jnp.einsum("blfd,ldc->bflc", rms_norm(digit, jnp.ones(digit.shape[-1]), 1e-5), taught.heads)
    known = batch.ago >= 0
    recalled = (cross(told, jnp.maximum(batch.ago, 0)) * known).sum() / known.sum()
    return answers + 0.1 * ends + 0.3 * heard + hints * recalled


def heard(model: VideoQA, world: World, streams: int) -> float:
    """The mean over alerts and silence of how often the model says so, in streams of 64 frames."""

    @eqx.filter_jit
    def one(i: Array) -> tuple[Array, Array]:
        stream = world.stream(noise(jax.random.PRNGKey(0), i, "alert"), 64)
        c = stream.digit[32]
        alert = jnp.stack([jnp.int32(ALERT), c, jnp.int32(ASK)])
        said, _ = model(stream.frames, alert[None], jnp.array([-1]), jnp.array([True]))
        return said.argmax(-1), alerts(stream, c)

    said, told = (np.stack(x) for x in zip(*[one(jnp.int32(i)) for i in range(streams)], strict=True))
    return float(np.mean([(said == told)[told == what].mean() for what in (SILENT, YES)]))


def train(key: PRNGKeyArray, start: Path | None = None) -> tuple[VideoQA, dict[str, Any]]:
    """The model, and its accuracy on digits of other hands; all stages, or those that the weights in a file lack.

    Raises:
        ValueError: if these did not come of the first of the stages.
    """
    begin, log = time.time(), lambda *what: print(round(time.time() - begin), *what, file=sys.stderr, flush=True)
    world, model, done = World.of(held_out=False), VideoQA(key=noise(key, 0, "weights")), 0
    several = lambda make, key, i, n: jax.vmap(lambda j: make(noise(noise(key, i, "clip"), j)))(jnp.arange(n))
    rate = lambda peak, steps: optax.warmup_cosine_decay_schedule(0, peak, steps // 10, steps)
    adamw = lambda rate: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.98, weight_decay=0.05))

    def pictures(key: PRNGKeyArray, i: Array) -> tuple[Array, Array, Array]:
        one = dataclasses.replace(world, scene=(1, 1), drift=0.3)
        stream = several(lambda key: one.stream(key, 4), key, i, 32)
        return stream.frames.reshape(-1, SIDE, SIDE), stream.digit.reshape(-1), stream.centre.reshape(-1, 2)

    if start is None:
        reader = Reader(model.stem, eqx.nn.Linear(SIZES.width, 11, key=noise(key, 0, "head")))
        reader, history = fit(stem_loss, reader, pictures, adamw(rate(3e-3, STEM)), STEM, key=noise(key, 0, "stem"))
        log("stem", float(history["loss"][-50:].mean()))
        heads = 0.1 * jax.random.normal(noise(key, 0, "heads"), (3, SIZES.width, 10))
        taught = Taught(eqx.tree_at(lambda model: model.stem, model, reader.stem), heads)
    else:
        before = [Stage(**stage | {"scene": tuple(stage["scene"])}) for stage in state.read_meta(start)["stages"]]
        done = len(before)
        if tuple(before) != STAGES[:done]:
            raise ValueError(f"the weights in {start} did not come of the first stages of this script, but of {before}")
        model = eqx.combine(state.load(start, eqx.filter(model, eqx.is_array)), model)
        # The heads are not in the file. As zeros they teach the model nothing before they have learnt something.
        taught = Taught(model, jnp.zeros((3, SIZES.width, 10)))

    for number, stage in list(enumerate(STAGES))[done:]:
        mine = dataclasses.replace(world, scene=stage.scene, palette=stage.palette)
        objective = partial(loss, hints=stage.hints)

        def batch(key: PRNGKeyArray, i: Array, mine: World = mine, stage: Stage = stage) -> Clip:
            return several(partial(clip, mine, stage), key, i, stage.batch)

        def validate(taught: Taught, batch: Any = batch, objective: Any = objective) -> Float[Array, ""]:
            several = [batch(noise(key, 0, "validate"), jnp.int32(i)) for i in range(3)]
            some = jax.tree.map(lambda *x: jnp.concatenate(x), *several)
            _, spoken = jax.vmap(taught.model)(*shows(some))
            right = (spoken[:, :, 2].argmax(-1) == some.answer) * some.weight
            value, kind, n = objective(taught, some, key), some.rounds[:, :, 0], some.rounds[:, :, 1]
            asks = [kind == k for k in (DIGIT, WHERE, FIRST, COUNT, SEEN)] + [
                (kind == BACK) & (n == i) for i in (1, 2, 3)
            ]
            share = [(right * which).sum() / (some.weight * which).sum() for which in asks]
            jax.debug.callback(lambda *x: log(*(round(float(v), 2) for v in x)), value, *share)
            return value

        optimizer, to = adamw(rate(stage.rate, stage.steps)), noise(key, number, "stage")
        taught, history = fit(objective, taught, batch, optimizer, stage.steps, key=to, validate=validate, check=50)
        log(stage, float(history["loss"][-50:].mean()))
    model, others = taught.model, World.of(held_out=True)
    accuracy = {f"{n} frames": whole(model, others, 0, streams=200, frames=n).table() for n in (64, 192)}
    mnist = [str(data.root() / "mnist" / f"t10k-{name}-ubyte.gz") for name in ("images-idx3", "labels-idx1")]
    stages = [stage._asdict() for stage in STAGES]
    info = {"stem": STEM, "stages": stages, "accuracy": accuracy | {"alert": heard(model, others, 100)}}
    log(info["accuracy"])
    return model, info | {"data": mnist}
