"""Differential Token Drop leaves a model of video most of what it knew, with few of the tokens, and finds the cuts.

Streams of 96 frames whose background stands still, drifts by half a pixel a frame, or by two. All arms but the first
let equally many tokens pass: tokens drawn at random, whole frames spread evenly, or frames of four tokens, the means of
four each, spread evenly. None is forgotten. tau is chosen on other streams, so that three quarters are dropped. Where
scenes change is to be found to within one frame, and each way to find it speaks as often. Real videos are compared five
frames a second, in patches of 14 x 14 pixels.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from anabranch import data
from anabranch.cell import Cell, noise
from anabranch.claim import Comparison, Size
from anabranch.keep.timechat_online import DTD, Drop, DropCurve, TimeChatOnline, patches
from anabranch.keep.video import Answers, full, gate, watch
from anabranch.models.video_qa import ALERT, ASK, PATCHES, SIDE, YES, Config, VideoQA, Watcher, World, alerts, load

FIRST_SEED = 100
PILOT, PASSING = 0, 0.25
"""The seed of the streams that tau is chosen on, and how many of their tokens are to pass after the first frame."""
CLIPS = "bigbuckbunny", "bikes", "carphone_pristine", "carphone_distorted"


class Sampled(Cell):
    """Lets a share of all tokens pass: at random, or whole frames; the state is how many frames have been."""

    level = "feature"
    smooth = False

    share: Array
    whole: bool = eqx.field(static=True)

    def init(self, *, key=None):
        return jnp.int32(0), jax.random.PRNGKey(0) if key is None else key

    def step(self, state, x):
        t, key = state
        some = jax.random.uniform(noise(key, t, "drop"), (PATCHES,)) < self.share
        frame = jnp.floor((t + 1) * self.share) > jnp.floor(t * self.share)
        keep = jnp.full(PATCHES, frame) if self.whole else some
        return (t + 1, key), Drop(keep, keep.astype(jnp.float32))


class Pooled(TimeChatOnline):
    """Sees four tokens of a frame, each the mean of four neighbours; `drop` lets frames pass as a whole."""

    def step(self, state, x):
        mean = self.watcher.stem(x).reshape(2, 2, 2, 2, -1).mean((1, 3)).reshape(4, -1)
        before, drop = self.drop.step(state.before, mean)
        n = 4 * drop.keep[0]
        place = jnp.array([[2, 2], [2, 3], [3, 2], [3, 3]])  # of the four, those next to the middle
        watched, _ = self.watcher.see(state.watched, mean, place, n)
        return state._replace(before=before, watched=watched, passed=state.passed + n), None


@eqx.filter_jit
def survey(stem, drop: DTD, world: World, key: Array, rows: Array, frames: int) -> dict[str, Array]:
    """Of the streams that `watch` shows, frame by frame: what `drop` lets pass, and where scenes begin."""

    def one(row):
        stream = world.stream(noise(key, row, "stream"), frames)
        dropped = drop.offline(jax.vmap(patches if drop.level == "pixel" else stem)(stream.frames))
        return {
            "change": dropped.change,
            "share": dropped.keep.mean(-1),
            "valley": DropCurve().offline(dropped).valid,
            "cut": (stream.begun == 0).at[0].set(False),
            "pixels": jnp.abs(jnp.diff(stream.frames, axis=0, prepend=stream.frames[:1])).mean((1, 2)),
        }

    return jax.vmap(one)(rows)


def f1(spoken: np.ndarray, cuts: np.ndarray) -> float:
    """Of what is said within one frame of a cut; both b[N, F]. Who speaks twice at a cut is wrong once."""
    wide = np.pad(spoken, ((0, 0), (1, 1)))
    found = cuts & (wide[:, :-2] | wide[:, 1:-1] | wide[:, 2:])
    return 2 * found.sum() / max(spoken.sum() + cuts.sum(), 1)


def polled(counts: np.ndarray, frames: int) -> np.ndarray:
    """So many frames of each stream, evenly spread: b[N, F]."""
    out = np.zeros((len(counts), frames), bool)
    for row, n in zip(out, counts, strict=True):
        row[((np.arange(n) + 0.5) * frames / max(n, 1)).astype(int)] = True
    return out


@eqx.filter_jit
def told(cell, world: World, key: Array, rows: Array, frames: int) -> tuple[Array, Array, Array, Array]:
    """What is said to an alert for the digit of the last scene: yes or not after each frame, and when it may be said;
    what is to be said, and where scenes with the digit begin."""

    def one(row):
        stream = world.stream(noise(key, row, "stream"), frames)
        c = stream.digit[-1]
        state = cell.init(key=noise(key, row, "init"))
        asked = cell.tell(state, jnp.array([ALERT, 0, ASK]).at[1].set(c))
        said = cell.advance(asked if isinstance(cell, TimeChatOnline) else asked[0], stream.frames)[1]
        logits, when = said if isinstance(cell, TimeChatOnline) else (said, jnp.ones(frames, bool))
        return logits.argmax(-1) == YES, when, alerts(stream, c) == YES, (stream.digit == c) & (stream.begun == 0)

    return jax.vmap(one)(rows)


def heard(spoken: np.ndarray, due: np.ndarray, begins: np.ndarray) -> str:
    """How many scenes were announced in their first three frames, and how much of what was said was right."""
    wide = np.pad(spoken, ((0, 0), (0, 2)))
    hit = begins & (wide[:, :-2] | wide[:, 1:-1] | wide[:, 2:])
    right = (spoken & due).sum() / max(spoken.sum(), 1)
    return f"{hit.sum() / begins.sum():.2f} of the scenes announced, {right:.2f} of what is said right"


def real(names: tuple[str, ...]) -> str:
    """The share of the patches of real videos that differ from those before, by tau and for tau = 0.05 over time."""
    out, side = [], 14
    for name in names:
        frames = data.clip(name)[::5]
        rows, columns = frames.shape[1] // side, frames.shape[2] // side
        cut = frames[:, : rows * side, : columns * side].reshape(len(frames), rows, side, columns, side, 3)
        # Frame by frame, since a clip has a gigabyte of numbers: of each patch how much it differs from the one before.
        turn = jax.jit(lambda x, n=rows * columns: x.swapaxes(1, 2).reshape(n, -1) / 255.0)
        cell = DTD(rows * columns, side * side * 3, 0.05, "pixel")
        state, step, change = cell.init(), jax.jit(cell.step), []
        for frame in cut:
            state, drop = step(state, turn(frame))
            change.append(np.asarray(drop.change))
        moved = np.stack(change[1:])
        taus = ", ".join(f"{(moved >= tau).mean():.0%} at {tau}" for tau in (0.02, 0.05, 0.1))
        time = ", ".join(f"{(part >= 0.05).mean():.0%}" for part in np.array_split(moved, 5))
        # Where the last frame stands as long again, nothing of it passes.
        padded = (moved >= 0.05).sum() / (2 * len(frames) - 1) / moved.shape[1]
        out.append(f"{name} {taus} (fifths at 0.05: {time}; with a still end as long again {padded:.0%})")
    return "; ".join(out)


def said(rows: list[Answers]) -> str:
    """The accuracies of an arm."""
    table = {name: np.mean([row.table().get(name, np.nan) for row in rows]) for name in rows[0].table()}
    return ", ".join(f"{name} {value:.2f}" for name, value in table.items())


def pooled(rows: list[Answers]) -> np.ndarray:
    return np.array([row.pooled(sorted(row.table())) for row in rows])


def experiment(size: Size) -> list[Comparison]:
    if size.smoke:
        small = Config(vocab=64, width=16, layers=1, heads=2, kv_heads=1, hidden=16, rope_base=1000.0)
        model, knows = VideoQA(small, key=jax.random.PRNGKey(0)), "random weights"
        rng = np.random.default_rng(0)
        world = World(jnp.asarray(rng.uniform(size=(20, 10, 10)), jnp.float32), jnp.arange(20) // 2, scene=(2, 4))
        worlds, seeds = {"still": world}, (0, 1)
        streams, frames, together = 4, 24, 4
    else:
        model, knows = load(), f"remembering all it answers {gate()}"
        kinds = {"still": 0.0, "a slow drift": 0.5, "a fast drift": 2.0}
        worlds = {name: World.of(True, drift=jnp.float32(pixels)) for name, pixels in kinds.items()}
        seeds = [FIRST_SEED + i for i in range(3)]
        streams, frames, together = 200 if size.full else 40, 96, 20
    still, watcher = worlds["still"], Watcher(model, full(frames))
    look = lambda drop, world, seed: {
        name: np.asarray(x)
        for name, x in survey(model.stem, drop, world, jax.random.PRNGKey(seed), jnp.arange(streams), frames).items()
    }
    # Each tau drops three quarters of what comes after the first frame, of streams that are not used again.
    drops, histogram = {}, ""
    for level, width in (("feature", model.llama.config.width), ("pixel", SIDE**2 // PATCHES)):
        change = look(DTD(PATCHES, width, 0.0, level), still, PILOT)["change"][:, 1:]
        bound = np.quantile(change, 1 - PASSING)
        drops[level] = DTD(PATCHES, width, jnp.float32(1 - bound if level == "feature" else bound), level)
        deciles = ", ".join(f"{x:.3f}" for x in np.quantile(change, np.linspace(0.1, 0.9, 9)))
        histogram += f"{level}: tau {float(drops[level].tau):.3f}, deciles of what changes {deciles}. "

    looks = {level: [look(drop, still, seed) for seed in seeds] for level, drop in drops.items()}
    share = jnp.float32(np.mean([x["share"].mean() for x in looks["feature"]]))
    four = jnp.minimum(4 * share, 1.0)
    arms: dict[str, Cell] = {
        "all tokens": watcher,
        "DTD of features": TimeChatOnline(watcher, drops["feature"]),
        "at random": TimeChatOnline(watcher, Sampled(share, whole=False)),
        "frames spread evenly": TimeChatOnline(watcher, Sampled(share, whole=True)),
        "four tokens a frame": Pooled(watcher, Sampled(four, whole=True)),
        "DTD of pixels": TimeChatOnline(watcher, drops["pixel"]),
    }
    run = {"streams": streams, "frames": frames, "together": together}
    found, notes = {}, [knows, histogram + f"{float(share):.1%} of all tokens pass"]
    for i, (name, arm) in enumerate(list(arms.items())[: 2 if size.smoke else None]):
        found[name] = [watch(arm, still, seed, **run) for seed in (seeds if size.full or i < 4 else seeds[:1])]
        notes.append(f"{name}: {said(found[name])}")
        print(notes[-1], flush=True)
    whole, ours = pooled(found["all tokens"]), pooled(found["DTD of features"])
    others = []
    for camera in list(worlds)[1:]:
        passing = look(drops["feature"], worlds[camera], seeds[0])["share"].mean()
        moving = {"all tokens": watcher, "DTD of features": arms["DTD of features"]}
        moving["at random"] = TimeChatOnline(watcher, Sampled(jnp.float32(passing), whole=False))
        few = run if size.full else run | {"streams": together}
        for name, arm in moving.items():
            rows = [watch(arm, worlds[camera], seed, **few) for seed in (seeds if size.full else seeds[:1])]
            others.append(f"{camera}, {name}: {pooled(rows).mean():.3f}")
        others.append(f"{passing:.0%} of its tokens pass")

    speaks = {name: [] for name in ("features", "pixels", "polled", "threshold")}
    for feature, pixel in zip(looks["feature"], looks["pixel"], strict=True):
        cuts, valley, moved = feature["cut"], feature["valley"], feature["pixels"]
        bound = np.sort(moved.ravel())[-max(valley.sum(), 1)]
        ways = valley, pixel["valley"], polled(valley.sum(1), frames), moved >= bound
        for name, way in zip(speaks, ways, strict=True):
            speaks[name].append(f1(way, cuts))
    when = ", ".join(f"{name} {np.mean(values):.2f}" for name, values in speaks.items())
    key, rows = jax.random.PRNGKey(seeds[0]), jnp.arange(min(streams, 40))
    if not size.smoke:
        yes, may, due, begins = map(np.asarray, told(arms["DTD of features"], still, key, rows, frames))
        when += f". Alerts: in valleys {heard(yes & may, due, begins)}"
        yes, _, due, begins = map(np.asarray, told(watcher, still, key, rows, frames))
        asked = polled(looks["feature"][0]["valley"][: len(rows)].sum(1), frames)
        when += f"; polled as often {heard(yes & asked, due, begins)}; after every frame {heard(yes, due, begins)}"
    else:
        found |= {name: found["all tokens"] for name in ("at random", "frames spread evenly")}
    clips = real(CLIPS[2:3] if size.smoke else CLIPS)
    paper = "98 % of the score with 17 % of the tokens"
    return [
        Comparison(
            "all questions, still camera: DTD against 0.95 of what all tokens give", ours, 0.95 * whole, 0.0,
            paper=paper, note=". ".join(notes),
        ),
        Comparison(
            "all questions, still camera: DTD against frames spread evenly", ours,
            pooled(found["frames spread evenly"]), 0.03, note="; ".join(others),
        ),
        Comparison(
            "all questions, still camera: DTD against tokens at random", ours, pooled(found["at random"]), 0.03,
            note=f"share of patches of real videos that pass: {clips}",
        ),
        Comparison(
            "cuts found to within a frame, F1: the drop curve against polling as often", speaks["features"],
            speaks["polled"], 0.2, note=f"the curves, polling, and the change of all pixels above a threshold: {when}",
        ),
    ]  # fmt: skip
