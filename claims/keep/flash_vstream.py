"""The memory of Flash-VStream knows more of scenes long gone than frames do that fill as many tokens.

Streams of 192 frames (600 with --full) of MNIST digits of other hands than the model was trained on; at their end a
memory is read as a prompt of 160 tokens: all arms. STAR has 16 abstract tokens, 20 clusters of 2 x 2, three retrieved
frames and the last one. The model has never read clusters: it is trained for 150 steps to read all arms alike, each as
often as any other, with the stem as it was. The random projections of the abstract memory do nothing where frames come
one by one.

Arms of whole frames have ten of them: the last ones; ones evenly spread over all that has been, for which all would
have to be kept; and those that are left when a new one makes the most similar neighbours merge (`merge_feature` of the
authors' code).
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, Int

from anabranch.cell import noise
from anabranch.claim import Comparison, Size
from anabranch.cost import nbytes
from anabranch.fit import fit
from anabranch.keep.flash_vstream import Read, SemanticAttention, STARMemory, answer
from anabranch.keep.video import NOW, Answers, exam_of, gate, marked
from anabranch.models.video_qa import GRID, PATCHES, Asked, Config, Stream, VideoQA, World, load

FIRST_SEED = 100
PAST = ("back 2", "back 3", "first", "seen", "count")
FRAMES = 10
PARTS = {"abstract": (0, 16), "temporal": (16, 96), "retrieved": (96, 144), "spatial": (144, 160)}


def star(width: int, weighted: bool = True) -> STARMemory:
    sizes = {"clusters": 20, "grid": 2, "abstract": 16, "retrieved": 3}
    return STARMemory(SemanticAttention(width, key=jax.random.PRNGKey(0)), PATCHES, weighted=weighted, **sizes)


def whole(frames: Float[Array, "F P D"]) -> Read:
    """Whole frames as a prompt."""
    place = 1 + np.stack(np.divmod(np.arange(PATCHES), GRID), 1)
    positions = np.concatenate([np.repeat(np.arange(FRAMES), PATCHES)[:, None], np.tile(place, (FRAMES, 1))], 1)
    return Read(frames.reshape(-1, frames.shape[-1]), jnp.float32(positions), jnp.ones(len(positions), bool))


def merged(features: Float[Array, "F P D"]) -> Float[Array, "10 P D"]:
    """Each frame after the tenth makes the two neighbours merge whose cosine is greatest."""

    def step(kept: Array, new: Array) -> tuple[Array, None]:
        rows = jnp.concatenate([kept, new[None]])
        flat = rows.reshape(len(rows), -1)
        unit = flat / jnp.linalg.norm(flat, axis=1, keepdims=True)
        i = (unit[:-1] * unit[1:]).sum(1).argmax()
        rows = rows.at[i + 1].set((rows[i] + rows[i + 1]) / 2)
        index = jnp.arange(FRAMES)
        return rows[index + (index >= i)], None

    return lax.scan(step, features[:FRAMES], features[FRAMES:])[0]


def reads(features: Float[Array, "F P D"], key: Array) -> dict[str, Read]:
    """What each arm remembers of a stream."""
    F, _, D = features.shape

    def walked(memory: STARMemory) -> Read:
        state, _ = lax.scan(lambda state, x: (memory.write(state, x[None]), None), memory.init(key=key), features)
        return memory.read(state)

    out = {
        "last frames": whole(features[-FRAMES:]),
        "uniform": whole(features[jnp.round(jnp.linspace(0, F - 1, FRAMES)).astype(jnp.int32)]),
        "merged neighbours": whole(merged(features)),
        "k-means without weights": walked(star(D, weighted=False)),
        "STAR": walked(star(D)),
    }
    full = out["STAR"]
    for part, (low, high) in PARTS.items():
        rest = np.ones(len(full.there), bool)
        rest[low:high] = False
        out[f"STAR without {part}"] = full._replace(there=full.there & rest)
    return out


class Watched(NamedTuple):
    """Streams, what is asked at their end, and what each arm remembers of them."""

    stream: Stream
    exam: Asked
    read: dict[str, Read]


@eqx.filter_jit
def watched(model: VideoQA, world: World, seed: Array, rows: Int[Array, " B"], frames: int) -> Watched:
    key = jax.random.PRNGKey(seed)

    def one(row: Array) -> Watched:
        stream, exam = exam_of(world, key, row, frames)
        return Watched(stream, exam, reads(jax.vmap(model.stem)(stream.frames), noise(key, row, "init")))

    return jax.vmap(one)(rows)


def prepared(model: VideoQA, world: World, lengths: list[int], streams: int, together: int) -> tuple[dict, Asked]:
    """Memories of streams of several lengths, to train on."""
    found = []
    for i, frames in enumerate(lengths):
        rows = jnp.arange(i * streams, (i + 1) * streams).reshape(-1, together)
        several = [watched(model, world, jnp.int32(FIRST_SEED - 1), row, frames) for row in rows]
        found += [jax.tree.map(np.asarray, (one.read, one.exam)) for one in several]
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *found)


def replies(model: VideoQA, read: Read, questions: Int[Array, "B Q 3"]) -> Float[Array, "B Q vocab"]:
    return jax.vmap(jax.vmap(answer, (None, None, 0)), (None, 0, 0))(model, read, questions)


reply = eqx.filter_jit(replies)


def trained(model: VideoQA, examples: tuple[dict, Asked], steps: int, batch: int) -> tuple[VideoQA, np.ndarray]:
    """The model, made to read all arms: each example of a batch is that of an arm drawn for it."""

    def loss(model: VideoQA, examples: tuple[dict[str, Read], Asked], key: Array) -> Float[Array, ""]:
        reads, exam = examples
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *reads.values())
        arm = jax.random.randint(key, (batch,), 0, len(reads))
        logits = replies(model, jax.tree.map(lambda leaf: leaf[arm, jnp.arange(batch)], stacked), exam.question)
        cross = optax.softmax_cross_entropy_with_integer_labels(logits, exam.answer)
        return (cross * exam.valid).sum() / exam.valid.sum()

    rate = optax.warmup_cosine_decay_schedule(0, 1e-3, steps // 10, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.01))
    where = lambda model: model.llama
    key = jax.random.PRNGKey(FIRST_SEED - 2)
    model, history = fit(loss, model, examples, optimizer, steps, key=key, where=where, batch_size=batch)
    return model, history["loss"]


def judged(
    reader: VideoQA, model: VideoQA, world: World, seed: int, streams: int, frames: int, together: int
) -> dict[str, Answers]:
    """What `reader` answers from each arm, which remembers what `model` saw."""
    found = []
    for row in jnp.arange(streams).reshape(-1, together):
        several = watched(model, world, jnp.int32(seed), row, frames)
        mark = lambda read, several=several: jax.vmap(marked)(
            several.stream, several.exam, reply(reader, read, several.exam.question)
        )
        found.append({name: jax.tree.map(np.asarray, mark(read)) for name, read in several.read.items()})
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *found)


def experiment(size: Size) -> list[Comparison]:
    if size.smoke:
        config = Config(vocab=64, width=16, layers=1, heads=2, kv_heads=1, hidden=16, rope_base=1000.0)
        model, known = VideoQA(config, key=jax.random.PRNGKey(0)), "random weights"
        images = jnp.asarray(np.random.default_rng(0).uniform(size=(20, 10, 10)), jnp.float32)
        world = other = World(images, jnp.arange(20) // 2, scene=(2, 4))
        lengths, streams, steps, batch, judge, frames, together = [24], 4, 2, 4, 4, 24, 4
    else:
        model, known = load(), f"the model with all in memory: {gate()}"
        world, other = World.of(held_out=False), World.of(held_out=True)
        longest = 600 if size.full else 192
        lengths, streams, steps, batch = [64, 128, longest], 64, 150, 16
        judge, frames, together = 200 if size.full else 80, longest, 16
    before = nbytes(star(model.llama.config.width).init())
    reader, history = trained(model, prepared(model, world, lengths, streams, together), steps, batch)
    print(f"{known}; loss {history[:5].mean():.3f} at first, {history[-20:].mean():.3f} in the end", flush=True)
    past: dict[str, list[float]] = {}
    now: dict[str, list[float]] = {}
    kinds: dict[str, list[dict[str, float]]] = {}
    for seed in [FIRST_SEED + seed for seed in size.seeds(3)]:
        for name, answers in judged(reader, model, other, seed, judge, frames, together).items():
            table = answers.table()
            kinds.setdefault(name, []).append(table)
            past.setdefault(name, []).append(float(np.mean([table[kind] for kind in PAST if kind in table])))
            now.setdefault(name, []).append(answers.pooled(NOW))
    mean = lambda tables, kind: np.mean([table[kind] for table in tables if kind in table])
    split = lambda name: ", ".join(f"{kind} {mean(kinds[name], kind):.2f}" for kind in PAST)
    each = [f"{name}: past {np.mean(past[name]):.3f} ({split(name)}), now {np.mean(now[name]):.3f}" for name in past]
    ours, last = past["STAR"], past["last frames"]
    least = min(a - b for a, b in zip(ours, last, strict=True))
    worst = f"by {least:+.3f} in the worst seed; {known}"
    why = (
        "k-means begins with all rows but one drawn at random, which joins the nearest, so that in the end all merge; "
    )
    why += "the first scene is known {:.0%} of the time from frames spread evenly, {:.0%} from STAR".format(
        *(mean(kinds[name], "first") for name in ("uniform", "STAR"))
    )
    bound = f"the state has {before} bytes at any time, and a question reads 160 tokens however long the stream was"
    paper, metric = "state of the art on VStream-QA", "what only a memory knows: STAR against "
    return [
        Comparison(metric + "uniform", ours, past["uniform"], 0.05, paper=paper, note="; ".join([*each, why])),
        Comparison(metric + "the last frames", ours, last, 0.10, note=worst),
        Comparison(
            "what is there now: STAR against the last frames", now["STAR"], now["last frames"], -0.03, note=bound
        ),
    ]
