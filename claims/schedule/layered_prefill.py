"""Layered prefill reads a mixture's experts once for each prompt, and its first tokens come sooner for it.

Simulated: Qwen3-30B-A3B on two H100 with the lengths of Azure's code and conversation traces, arriving as Poisson at
0.5, 0.7 and 0.9 of the rate that chunks of 512 tokens sustain (90 % of requests with TTFT of 1 s and 50 ms a token);
baselines: chunks of 512 and of 1,024, and whole prompts mixed in (Orca). Llama-3-8B on one H100 is the control without
experts. Weights that are read stand for energy, which is not modelled.

And really served: `moe_lm:wide`, 4 layers of 16 experts of which 2 work on a token, answers 200 requests of the
conversation trace, a twentieth as long, under both schedulers (chunks, and the tokens of a group, too), all of them
asked at once. What its routers choose says which experts each layer of each iteration has to load. Where the formula
for uniform routing, on the same iterations, says at most 0.75, they must be at most 0.8; elsewhere they are reported.
Answers must be what the model says alone, greedily.
"""

from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int

from anabranch.claim import Comparison, Size
from anabranch.keep.text import domains
from anabranch.layers.experts import choose
from anabranch.models.llama import Decoder
from anabranch.models.moe_lm import load, trace
from anabranch.schedule.baselines import Chunked, Orca
from anabranch.schedule.cluster import DEVICES, MODELS, Roofline
from anabranch.schedule.layered_prefill import LayeredPrefill
from anabranch.schedule.live import Live
from anabranch.schedule.scheduler import Engine, Scheduler
from anabranch.schedule.serving import Result, goodput, simulate_serving
from anabranch.schedule.workload import Workload
from anabranch.sessions import Ask

FIRST_SEED = 100
TTFT, TPOT = 1.0, 0.05
SHORTER, UNIT = 20, 26
"""By how much real requests are shorter than those of the trace, and the chunks of 512 that go with them."""
ROOM, MOST = 1024, 64
"""Tokens for which a session has room, and of an answer."""


def requests(name: Any, size: Size) -> Workload:
    return Workload.azure(name).head(60 if size.smoke else 1000)


def serve(load: Workload, engine: Engine, scheduler: Scheduler) -> Result:
    return simulate_serving(load, [engine], scheduler)


def experiment(size: Size) -> list[Comparison]:
    seeds = [FIRST_SEED + i for i in size.seeds(5)]
    moe = Engine(Roofline(MODELS["qwen3-30b-a3b"], DEVICES["h100"], 2))
    dense = Engine(Roofline(MODELS["llama-3-8b"], DEVICES["h100"]))
    layered, chunked = LayeredPrefill(layers=48), Chunked(chunk=512)
    code = requests("code", size)
    mean = lambda result: float(result.ttft[len(result.ttft) // 10 :].mean())
    a_token = lambda result: result.weight_bytes / float(result.tokens.sum())

    def sustained(load: Workload, engine: Engine, scheduler: Scheduler) -> float:
        make = lambda rate: load.poisson(rate, 0)
        return goodput(make, lambda l: serve(l, engine, scheduler), ttft=TTFT, tpot=TPOT, high=48.0, close=0.05)

    rate = sustained(code, moe, chunked)
    ours, theirs = ([serve(code.poisson(0.7 * rate, s), moe, one) for s in seeds] for one in (layered, chunked))
    out = [
        Comparison(
            "mean TTFT over chunks of 512, code at 0.7 load", [mean(r) for r in ours], [mean(r) for r in theirs], 0.85,
            kind="ratio", better="lower", paper="TTFT up to -70 %; 1018.8 to 712.8 ms on Qwen3-30B-A3B",
            note=f"{rate:.1f} requests a second are sustained by chunks",
        ),
        Comparison(
            "weights read for each token, the same", [a_token(r) for r in ours], [a_token(r) for r in theirs], 0.85,
            kind="ratio", better="lower", paper="up to 39 % of expert traffic removed",
        ),
        Comparison(
            "p99 time between tokens, the same", [r.percentile("tbt", 99) for r in ours],
            [r.percentile("tbt", 99) for r in theirs], 1.15, kind="ratio", better="lower",
        ),
    ]  # fmt: skip
    rate = sustained(code, dense, chunked)
    control = LayeredPrefill(layers=32)
    ours, theirs = ([serve(code.poisson(0.7 * rate, s), dense, one) for s in seeds] for one in (control, chunked))
    ttft = [mean(r) for r in ours], [mean(r) for r in theirs]
    said = "mean TTFT over chunks of 512, a model without experts"
    out += [
        Comparison(f"{said}, not above", *ttft, 1.25, kind="ratio", better="lower"),
        Comparison(f"{said}, not below", *ttft, 0.75, kind="ratio", better="higher"),
    ]
    out[1].note = grid(moe, size, sustained, seeds[:2])
    return out + real(size)


def real(size: Size) -> list[Comparison]:
    """A trained mixture under both schedulers."""
    whole = Workload.azure("conv")
    n, seeds = (4, (FIRST_SEED,)) if size.smoke else (200, [FIRST_SEED + i for i in size.seeds(3)])
    told, loads, wrong, known = [], {}, [], {}
    for name, sessions in (("wide", 4),) if size.smoke else (("wide", 4), ("wide", 2), ("wide", 8), ("strong", 4)):
        model = Decoder(load(name), ROOM)
        for seed in seeds if (name, sessions) == ("wide", 4) else seeds[:1]:
            rng = np.random.default_rng(seed)
            rows = np.sort(rng.choice(len(whole), n, replace=False))
            asks = [
                Ask(prompt.tolist(), int(answer))
                for prompt, answer in zip(
                    texts(rng, np.maximum(1, whole.prompt[rows] // SHORTER).clip(max=ROOM - MOST)),
                    np.maximum(1, whole.output[rows] // SHORTER).clip(max=MOST),
                    strict=True,
                )
            ]
            if (name, seed) not in known:
                known[name, seed] = [whole_text(model, ask) for ask in asks]
            pair = [
                loaded(model, asks, known[name, seed], sessions, kind)
                for kind in (watched(LayeredPrefill)(layers=4, unit=UNIT), watched(Chunked)(chunk=UNIT))
            ]
            found, foretold, other = (list(column) for column in zip(*pair, strict=True))
            loads.setdefault((name, sessions), []).append((found, foretold))
            wrong.append(float(sum(other)))
    out = []
    for (name, sessions), rows in loads.items():
        (ours, theirs), (one, two) = np.array(rows, float).sum(0)
        told.append(f"{name}, {sessions} at a time: {ours / theirs:.3f}, foretold {one / two:.3f}")
        if one / two <= 0.75:
            mine, other = zip(*(found for found, _ in rows), strict=True)
            out.append(
                Comparison(
                    f"experts loaded for a real mixture, over chunks: {name}, {sessions} at a time",
                    list(map(float, mine)), list(map(float, other)), 0.8, kind="ratio", better="lower",
                    note=f"of all iterations and layers; foretold {one / two:.3f}",
                )
            )  # fmt: skip
    return [
        *out,
        Comparison(
            "answers that are not what the model says alone", wrong, [0.0] * len(wrong), 0.0, better="lower",
            note="under either scheduler; " + "; ".join(told),
        ),
    ]  # fmt: skip


def texts(rng: np.random.Generator, lengths: np.ndarray) -> list[np.ndarray]:
    """Prompts from held-out text of all kinds."""
    kinds = list(domains(held_out=True).values())
    chosen = [kinds[i] for i in rng.integers(0, len(kinds), len(lengths))]
    starts = [rng.integers(0, len(text) - n) for text, n in zip(chosen, lengths, strict=True)]
    return [text[start : start + n] for text, start, n in zip(chosen, starts, lengths, strict=True)]


def watched(kind: type) -> type:
    """A scheduler that also writes down through which part of the layers prompts went."""

    class Watched(kind):
        layers_of: list = eqx.field(static=True, default_factory=list)

        def act(self, state, x):
            state, batch = kind.act(self, state, x)
            if len(batch.decode) or batch.prefill:
                self.layers_of.append(batch.layers)
            return state, batch

    return Watched


@partial(jax.jit, static_argnums=3)
def alone(model: Decoder, prompt: Int[Array, " P"], n: Int[Array, ""], most: int) -> Int[Array, " most"]:
    """What the model says after the first n tokens of a prompt, greedily."""
    state, logits = model.prefill(model.init(), prompt, n)

    def one(carry, _):
        state, token = carry
        after, logits = model.step(state, token)
        return (after, jnp.argmax(logits)), token

    return lax.scan(one, (state, jnp.argmax(logits)), length=most)[1]


@jax.jit
def experts(model: Decoder, text: Int[Array, " T"]) -> Int[Array, "L T k"]:
    """Which experts work on each token in each layer."""
    return choose(trace(model, model.init(), text)[2], jnp.arange(2)).expert


def whole_text(model: Decoder, ask: Ask) -> tuple[list[int], np.ndarray]:
    """An answer of the model alone, and the experts that work on each token of prompt and answer: (L, T, k)."""
    fits = lambda n, sizes: next(size for size in sizes if size >= n)
    pad = lambda tokens, sizes: np.pad(np.array(tokens, np.int32), (0, fits(len(tokens), sizes) - len(tokens)))
    n, sizes = len(ask.prompt), (64, 128, 256, 512, ROOM - MOST)
    said = alone(model, pad(ask.prompt, sizes), jnp.int32(n), fits(ask.limit, (8, 16, MOST)))[: ask.limit].tolist()
    return said, np.asarray(experts(model, pad([*ask.prompt, *said], (*sizes, ROOM))))


def loaded(
    model: Decoder, asks: list[Ask], known: list[tuple[list[int], np.ndarray]], sessions: int, scheduler: Scheduler
) -> tuple[int, float, int]:
    """Experts that all layers of all iterations load, the expectation by uniform routing, and answers that differ."""
    live = Live(model, scheduler, sessions=sessions, record=True)
    for ask in asks:
        live.submit(ask)
    while live.busy:
        live.turn()
    assert live.record is not None
    wrong = sum(said != session.tokens for (said, _), session in zip(known, live.record.sessions, strict=True))
    works, told = {i: work for i, (_, work) in enumerate(known)}, dict.fromkeys(range(len(asks)), 0)
    layers, total = len(model.layers), model.layers[0].router.shape[-1]  # pyright: ignore
    count, expected = 0, 0.0
    done, length = dict.fromkeys(works, 0), {s.number: len(s.ask.prompt) for s in live.record.sessions}
    for (_, _, decoded, prompts, chunks), (low, high) in zip(live.record.log, scheduler.layers_of, strict=True):  # pyright: ignore
        tokens = [works[i][:, length[i] + told[i]] for i in decoded]
        spans = [works[i][:, done[i] : done[i] + chunk] for i, chunk in zip(prompts, chunks, strict=True)]
        part = range(round(low * layers), round(high * layers))
        for layer in range(layers):
            here = [one[layer].ravel() for one in tokens] + [s[layer].ravel() for s in spans if layer in part]
            used = np.concatenate(here) if here else np.zeros(0, int)
            count += len(np.unique(used))
            expected += total * (1 - (1 - 2 / total) ** (len(used) // 2))
        for i in decoded:
            told[i] += 1
        for i, chunk in zip(prompts, chunks, strict=True):
            done[i] += chunk if high == 1.0 else 0
    return count, expected, wrong


def grid(engine: Engine, size: Size, sustained, seeds: list[int]) -> str:
    """Reported: other loads, the other trace, the other baselines."""
    said = []
    for name in ("code", "conv"):
        load = requests(name, size)
        rate = sustained(load, engine, Chunked(chunk=512))
        for share in (0.5,) if size.smoke else (0.5, 0.7, 0.9):
            row = []
            for label, one in (
                ("layered", LayeredPrefill(layers=48)), ("512", Chunked(chunk=512)), ("1024", Chunked(chunk=1024)),
                ("Orca", Orca()),
            ):  # fmt: skip
                results = [serve(load.poisson(share * rate, s), engine, one) for s in seeds]
                ttft = np.mean([r.ttft.mean() for r in results])
                gap = np.mean([r.percentile("tbt", 99) for r in results])
                size_ = np.mean([r.weight_bytes / r.tokens.sum() for r in results])
                row.append(f"{label} {ttft:.3f} s, {1e3 * gap:.1f} ms, {size_ / 1e9:.1f} GB")
            said.append(f"{name} at {share}: " + "; ".join(row))
    return "mean TTFT, p99 time between tokens, weights a token: " + " | ".join(said)
