"""InfiniPot-V knows more of scenes long gone than the last frames, or frames spread evenly, with as many tokens.

Streams of 192 frames of 16 tokens, of which a memory keeps an eighth (with --full also a sixteenth and a quarter), and
has room for a third as many that come. All arms have as many slots. Questions are asked at the end of each stream, when
a memory of an eighth has been full 20 times; it did not know them. Accuracies are means over kinds of question. What
all tokens give is the model's one pass over the whole stream.
"""

import jax
import jax.numpy as jnp
import numpy as np

from anabranch import data
from anabranch.claim import Comparison, Size
from anabranch.keep.infinipot_v import InfiniPotV
from anabranch.keep.memory import Keep, Window
from anabranch.keep.video import NOW, PAST, Answers, Uniform, gate, watch, whole
from anabranch.models.llama import rope
from anabranch.models.video_qa import PATCHES, SIZES, Config, VideoQA, Watcher, World, load

FIRST_SEED = 100
AGES = 0, 24, 48, 96, 193
CLIPS = "bigbuckbunny", "bikes", "carphone_pristine", "carphone_distorted"


class Turned(InfiniPotV):
    """Compares keys as the authors' code does, after RoPE has turned them."""

    def keys(self, held):
        at = jnp.concatenate([held.position[..., None], held.place], -1)
        return jax.vmap(lambda k, at: rope(k[:, None], at, SIZES.frequencies)[:, 0])(held.k, at)


def arms(budget: int) -> dict[str, Keep]:
    """Memories by name, of equally many slots."""
    room = budget // 3 // PATCHES * PATCHES + 3
    slots = budget + room - (PATCHES + 3)
    return {
        "InfiniPot-V": InfiniPotV(budget, room=room),
        "window": Window(slots, room=PATCHES + 3),
        "uniform": Uniform(slots, room=PATCHES + 3),
    }


def variants(budget: int, more: bool) -> dict[str, Keep]:
    """Others of the same size."""
    ours = lambda kind=InfiniPotV, **options: kind(budget, room=budget // 3 // PATCHES * PATCHES + 3, **options)
    alone = {"TaR alone": ours(tar=1.0), "VaN alone": ours(tar=0.0)}
    if not more:
        return alone
    return alone | {
        "norms pooled": ours(pool=True),
        "keys turned": ours(Turned),
        "places as in the code": ours(exact=False),
    }


def said(rows: list[Answers]) -> str:
    """The accuracies of an arm."""
    table = {name: np.mean([row.table().get(name, np.nan) for row in rows]) for name in rows[0].table()}
    by_age = np.nanmean([row.by_age(AGES) for row in rows], 0)
    aged = ", ".join(f"from {age} {value:.2f}" for age, value in zip(AGES, by_age))
    return ", ".join(f"{name} {value:.2f}" for name, value in table.items()) + f"; past by frames ago: {aged}"


def first(answers: Answers, streams: int) -> Answers:
    return Answers(*(column[:streams] for column in answers))


def past(rows: list[Answers]) -> list[float]:
    return [row.pooled(PAST) for row in rows]


def everything(rows: list[Answers]) -> list[float]:
    return [row.pooled(sorted(row.table())) for row in rows]


def real(names: tuple[str, ...], side: int = 8, pixels: int = 14) -> str:
    """What stays of real videos: keys and values are the pixels of a patch, less the middle grey."""
    out = []
    for name in names:
        frames = data.clip(name)[::5]
        step = min(frames.shape[1:3]) // (side * pixels)
        frames = frames[:, ::step, ::step][:, : side * pixels, : side * pixels].astype(np.float32) / 255 - 0.5
        keep = InfiniPotV(8 * side**2, room=3 * side**2, grid=(side, side))
        patch = frames.reshape(len(frames), side, pixels, side, pixels, 3).swapaxes(2, 3)
        x = jnp.asarray(patch.reshape(len(frames), side**2, 1, -1))
        place = 1 + jnp.stack(jnp.divmod(jnp.arange(side**2), side), 1)

        @jax.jit
        def run(x, keep=keep, place=place):
            def one(held, frame):
                tick, x = frame
                at = jnp.concatenate([jnp.full((len(x), 1), tick), place], 1)
                return held.extend(jnp.zeros_like(x), x, x, at, lambda x, positions: x)[1], None

            held, _ = jax.lax.scan(one, keep.empty(1, x.shape[-1], places=2), (jnp.arange(len(x)), x))
            return held.compressed()

        position = np.asarray(run(x).position[0])
        fifths = np.histogram(position[position >= 0], np.linspace(0, len(frames), 6))[0]
        share = ", ".join(f"{n / (len(frames) * side**2 / 5):.0%}" for n in fifths)
        out.append(f"{name} {keep.budget / (len(frames) * side**2):.0%} of {len(frames)} frames ({share})")
    return "; ".join(out)


def experiment(size: Size) -> list[Comparison]:
    if size.smoke:
        small = Config(vocab=64, width=16, layers=1, heads=2, kv_heads=1, hidden=16, rope_base=1000.0)
        model, knows = VideoQA(small, key=jax.random.PRNGKey(0)), "random weights"
        rng = np.random.default_rng(0)
        glyphs = jnp.asarray(rng.uniform(size=(20, 10, 10)), jnp.float32)
        still = drifting = World(glyphs, jnp.arange(20) // 2, scene=(2, 4))
        seeds, run = (0, 1), {"streams": 4, "frames": 24, "together": 4}
    else:
        model, knows = load(), f"remembering all it answers {gate()}"
        still, drifting = (World.of(True, drift=jnp.float32(pixels)) for pixels in (0.0, 0.5))
        seeds = [FIRST_SEED + i for i in range(3)]
        run = {"streams": 200 if size.full else 60, "frames": 192, "together": 20}
    everywhere = run["frames"] * PATCHES
    few = run if size.full else run | {"streams": run["together"]}
    asked = lambda keep, world, seeds, run: [watch(Watcher(model, keep), world, seed, **run) for seed in seeds]

    now: list[Answers] = []
    found, notes = {}, [knows]
    for name, keep in list(arms(everywhere // 8).items())[: 2 if size.smoke else None]:  # compiling takes long
        found[name] = asked(keep, still, seeds, run)
        notes.append(f"{name}: {said(found[name])}")
        print(notes[-1], flush=True)
    streams, others = few["streams"], []
    if not size.smoke:
        now = [whole(model, still, seed, streams=streams, frames=run["frames"]) for seed in seeds]
        notes.append(f"all, the first {streams} streams of each seed: {said(now)}")
        rest = [(name, keep, still) for name, keep in variants(everywhere // 8, size.full).items()]
        rest += [(f"a drifting background, {name}", keep, drifting) for name, keep in arms(everywhere // 8).items()]
        for part in (16, 4) if size.full else ():
            rest += [(f"1/{part} kept, {name}", keep, still) for name, keep in arms(everywhere // part).items()]
        for name, keep, world in rest:
            rows = asked(keep, world, seeds if size.full else seeds[:1], few)
            others.append(f"{name}: past {np.mean(past(rows)):.2f}, all {np.mean(everything(rows)):.2f}")
            print(others[-1], flush=True)
    ours, paper = found["InfiniPot-V"], "as accurate as with all tokens, on four models, with up to 94 % less memory"
    out = [
        Comparison(
            "1/8 kept, back 2 and 3, first and seen: InfiniPot-V against the last frames",
            past(ours), past(found["window"]), 0.10, paper=paper, note=". ".join(notes),
        ),
    ]  # fmt: skip
    if size.smoke:
        return out
    return [
        *out,
        Comparison(
            "1/8 kept, all questions: InfiniPot-V against frames spread evenly",
            everything(ours), everything(found["uniform"]), 0.03, note="; ".join(others),
        ),
        Comparison(
            "1/8 kept, what is there now: InfiniPot-V against all tokens",
            [first(row, streams).pooled(NOW) for row in ours], [row.pooled(NOW) for row in now], -0.05,
            note=f"share kept of real videos (each fifth, oldest first): {real(CLIPS)}",
        ),
    ]  # fmt: skip
