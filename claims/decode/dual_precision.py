"""Perplexity with weights in 4 bits and arithmetic in FP8: rounding that knows of FP8 against rounding that does not.

Models of characters that are trained here, with groups of 32, all layers in 4 bits, each calibrated on what those
before it give. SmolLM2-135M with groups of 64: layers 10 to 19 in 4 bits, calibrated once on the model in f32, on one
draw of text (`--full`: all layers, one after the other, three draws). Its weights were in 4 bits with groups of 32 when
they came, which flatters any grid of 4 bits; so both must hold.

All arms that compensate calibrate on the same text. GPTQ alone, and rounded to FP8 afterwards, go in the order of DPQ.
Speed in FP8 cannot be shown on a CPU: bytes are counted.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from anabranch.claim import Comparison, Size
from anabranch.decode.dual_precision import DPQ, FP8, MATRICES, Quantised, Stats, W4A8Linear, observe
from anabranch.decode.texts import CHARACTERS, character_model, characters, passages
from anabranch.models.llama import Decoder
from anabranch.models.tokens import Tokens
from anabranch.models.weights import smollm2, smollm2_file

FIRST_SEED = 300
LENGTH, CALIBRATION, HELD_OUT = 256, 16, 8
"""Tokens of a text, and texts of each kind (verse, code)."""
FORMAT = "e4m3fn"
through = eqx.filter_jit(lambda layer, h: observe(layer, h)[0])


def arms(group: int) -> dict[str, Callable]:
    """What each makes of a layer and what came into it."""

    def nearest(layer, stats):
        return DPQ(group, FORMAT, "none").layer(
            layer, {name: Stats(jnp.eye(len(one.H)), one.largest) for name, one in stats.items()}
        )

    def afterwards(layer, stats):
        layer = DPQ(group, None).layer(layer, stats)
        named = lambda layer: [getattr(layer, name) for name in MATRICES]
        new = [getattr(layer, name).in_fp8(FORMAT, float(stats[name].largest)) for name in MATRICES]
        return eqx.tree_at(named, layer, new)

    return {
        "nearest": nearest,
        "GPTQ, W4A16": DPQ(group, None).layer,
        "GPTQ, then FP8": afterwards,
        "DPQ": DPQ(group, FORMAT, "none").layer,
        "DPQ + GAR": DPQ(group, FORMAT, "gar").layer,
        "DPQ + act": DPQ(group, FORMAT, "act").layer,
    }


def in_turn(cell: Decoder, tokens: jax.Array, arm: Callable) -> Quantised:
    """Each layer is calibrated on what those before it give, in 4 bits."""
    h, layers = cell.embedding[tokens], []
    for layer in cell.layers:
        layers.append(arm(layer, observe(layer, h)[1]))
        h = through(layers[-1], h)
    return Quantised(cell, tuple(layers))


def at_once(cell: Decoder, tokens: jax.Array, some: range) -> Callable[[Callable], Quantised]:
    """Some layers are calibrated on what those before them give in f32, for all arms together."""
    h, seen = cell.embedding[tokens], {}
    for i in range(some.stop):
        layer = cell.layers[i]
        h, seen[i] = observe(layer, h) if i in some else (through(layer, h), None)

    def make(arm: Callable) -> Quantised:
        layers = [arm(layer, seen[i]) if i in some else layer for i, layer in enumerate(cell.layers)]
        return Quantised(cell, tuple(layers))

    return make


@eqx.filter_jit
def _losses(cell: Decoder, h: jax.Array, tokens: jax.Array) -> jax.Array:
    def one(pair):
        h, xs = pair
        logp = jax.nn.log_softmax(cell.logits(h[:-1]))
        return -jnp.take_along_axis(logp, xs[1:, None], -1).mean()

    return jax.lax.map(one, (h, tokens))


def losses(cell: Decoder, tokens: jax.Array) -> np.ndarray:
    """The mean loss of each text, in nats a token."""
    h = cell.embedding[tokens]
    for layer in cell.layers:
        h = through(layer, h)
    return np.asarray(_losses(Quantised(cell, ()), h, tokens))  # without layers it is one program for all


def saturated(cell: Decoder, tokens: jax.Array) -> str:
    """In how many of the matrices in FP8 something larger comes in than what was calibrated on can be."""
    h, found = cell.embedding[tokens], []
    for layer in cell.layers:
        h, seen = observe(layer, h)
        matrices = [(getattr(layer, name), seen[name]) for name in MATRICES]
        found += [float(one.largest) > FP8[FORMAT][0] * float(m.sx) for m, one in matrices if isinstance(m, W4A8Linear)]
    return f"inputs saturate in {sum(found)} of {len(found)} matrices"


def compared(name: str, nats: dict[str, np.ndarray], note: str) -> list[Comparison]:
    """The thresholds of both models, on losses by seed or by text."""
    ppl = {arm: np.exp(loss) for arm, loss in nats.items()}
    ours, act, plain = ppl["DPQ + GAR"], ppl["DPQ + act"], ppl["DPQ"]
    said = ", ".join(f"{arm} {np.exp(loss.mean()):.4f}" for arm, loss in nats.items())
    less = lambda metric, baseline, threshold, note="": Comparison(
        f"{name}: perplexity, {metric}", ours.tolist(), baseline.tolist(), threshold, "ratio", "lower",
        paper="small loss of accuracy against full precision", note=note,
    )  # fmt: skip
    return [
        less("DPQ + GAR against GPTQ rounded to FP8 afterwards", ppl["GPTQ, then FP8"], 1.0, f"{said}; {note}"),
        less("DPQ + GAR against rounding to nearest", ppl["nearest"], 1.0),
        less(
            "DPQ + GAR against act-order and 0.5 %, or half of its gain over no order",
            np.maximum(1.005 * act, (act + plain) / 2),
            1.0,
        ),
        less("DPQ + GAR against f32", ppl["f32"], 1.08),
    ]


# A model of characters


def of_characters(size: Size) -> list[Comparison]:
    text, nats, notes = characters(), {}, []
    for seed in size.seeds(4):
        cell = character_model(FIRST_SEED + seed, 10 if size.smoke else 400, 64)
        draw = np.random.default_rng(FIRST_SEED + seed)
        cut = lambda low, high, n: jnp.asarray(np.stack([text[s : s + 64] for s in draw.integers(low, high - 64, n)]))
        calibration, held_out = cut(0, CHARACTERS, 16 if size.smoke else 128), cut(CHARACTERS, len(text), 256)
        cells = {name: in_turn(cell, calibration, arm) for name, arm in arms(32).items()}
        for name, one in ({"f32": cell} | cells).items():
            nats.setdefault(name, []).append(losses(one, held_out).mean())
        notes.append(saturated(cells["DPQ + GAR"], held_out))
    return compared("characters", {name: np.array(column) for name, column in nats.items()}, f"first seed: {notes[0]}")


# SmolLM2


def texts(tokens: Tokens, n: int, seed: int, *, held_out: bool) -> np.ndarray:
    """n pieces of verse, and as many of code."""
    draw, out = np.random.default_rng([seed, held_out]), []
    for source in passages(held_out)[:2]:
        source = [passage for passage in source if len(passage) > 8 * LENGTH]
        found = []
        while len(found) < n:
            passage = source[draw.integers(len(source))]
            start = int(draw.integers(len(passage) - 8 * LENGTH))
            ids = tokens.plain(passage[start : start + 8 * LENGTH])[:LENGTH]
            if len(ids) == LENGTH:
                found.append(ids)
        out += found
    return np.array(out, np.int32)


def of_smollm2(size: Size) -> list[Comparison]:
    cell, tokens = Decoder(smollm2(), LENGTH), Tokens.of(smollm2_file())
    held_out = texts(tokens, HELD_OUT, FIRST_SEED, held_out=True)
    nats, note, layer = {"f32": [losses(cell, jnp.asarray(held_out))]}, "", cell.layers[15]
    for seed in range(3 if size.full else 1):
        calibration = jnp.asarray(texts(tokens, CALIBRATION, FIRST_SEED + seed, held_out=False))
        if size.full:
            make = lambda arm, calibration=calibration: in_turn(cell, calibration, arm)
        else:
            make = at_once(cell, calibration, range(10, 20))
        for name, arm in arms(64).items():
            small = make(arm)
            nats.setdefault(name, []).append(losses(small, jnp.asarray(held_out)))
            if name == "DPQ + GAR" and not note:
                note = saturated(small, jnp.asarray(held_out))
                layer = small.layers[15]
    out = {name: np.mean(columns, 0) for name, columns in nats.items()}
    total = sum(len(tokens.decode(row.tolist()).encode()) for row in held_out) * np.log(2) / held_out[:, 1:].size
    bits = ", ".join(f"{name} {loss.mean() / total:.4f}" for name, loss in out.items())
    note += f"; bits a byte: {bits}; intervals are over {len(held_out)} texts"
    small, exact = (sum(x.nbytes for x in jax.tree.leaves([getattr(l, m) for m in MATRICES]))
                    for l in (layer, cell.layers[15]))  # fmt: skip
    bytes_read = Comparison(
        "SmolLM2: bytes of the matrices of a layer, against f32", [small], [exact], 0.16, "ratio", "lower",
        paper="throughput up", note="Q4_1 has 0.156; throughput in FP8 cannot be shown on a CPU, and is not claimed",
    )  # fmt: skip
    return [*compared("SmolLM2", out, note), bytes_read]


def experiment(size: Size) -> list[Comparison]:
    return of_characters(size) + (of_smollm2(size) if not size.smoke else [])
