"""Prompts of passages that were seen in other places: nearly as right as a full prefill, in less than half the time.

A. The real SmolLM2-135M: prompts of 512 tokens, five passages of Shakespeare or of Python in random order, one of which
   hides a password that is asked for in the end. Keys and values of passages are those that each had alone. 15 % of the
   reused tokens are computed all the same, chosen in five ways; compared is what follows with a full prefill.
B. Answers of 32 tokens with four repairs a token, and with none.
C. Seconds to the first token, in turns.
D. Simulated: Azure's conversations of which most quote one of 200 passages, at 80 % of what first come, first served
   can do.
"""

import argparse
import statistics
import time
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import spearmanr

from anabranch import data
from anabranch.claim import Comparison, Size
from anabranch.keep.kvshare import (
    DHD,
    CacheAware,
    Mixed,
    SharedDecoder,
    Shelf,
    by_attention,
    by_deviation,
    selective_prefill,
)
from anabranch.models.llama import Decoder, Session, filled
from anabranch.models.tokens import Tokens
from anabranch.models.weights import smollm2, smollm2_file
from anabranch.schedule.baselines import FCFS
from anabranch.schedule.cluster import VLLM
from anabranch.schedule.scheduler import Engine, View
from anabranch.schedule.serving import Result, simulate_serving
from anabranch.schedule.workload import Workload

FIRST_SEED = 100  # those below were used for trials
T, ROOM, PASSAGES, ANSWER = 512, 576, 5, 32
NOUNS = "bank castle library museum harbour tower garden station market bridge".split()


class Prompt(NamedTuple):
    passages: list[list[int]]
    question: list[int]
    digits: list[int]
    """Eight tokens, the right one first."""

    @property
    def tokens(self) -> list[int]:
        return [token for passage in self.passages for token in passage] + self.question


def make(text: Tokens, sources: list[list[int]], rng: np.random.Generator) -> Prompt:
    """Passages of 64 to 128 tokens, as long together with the question as all prompts are."""
    noun, first = rng.choice(NOUNS), rng.permutation(10)[:8].tolist()
    password = f"{first[0]}" + "".join(map(str, rng.integers(0, 10, 4)))
    question = text.encode(f"\n\nQuestion: What is the password of the {noun}?\nAnswer: The password of the {noun} is ")
    left = T - len(question)
    while True:
        sizes = rng.integers(64, 129, PASSAGES)
        sizes[-1] = left - sizes[:-1].sum()
        if 64 <= sizes[-1] <= 128:
            break
    source, passages = sources[rng.integers(len(sources))], []
    hides = int(rng.integers(PASSAGES))
    for i, size in enumerate(sizes.tolist()):
        hidden = text.encode(f"\nThe password of the {noun} is {password}.\n") if i == hides else []
        start, cut = int(rng.integers(len(source) - 200)), (size - len(hidden)) // 2
        words = source[start : start + size - len(hidden)]
        passages.append(words[:cut] + hidden + words[cut:])
    return Prompt(passages, question, [text.encode(str(digit))[0] for digit in first])


@eqx.filter_jit
def alone(model: Decoder, tokens, n) -> tuple[Session, jax.Array]:
    return model.prefill(model.init(), tokens, n)


class Arms:
    """All ways to begin one prompt."""

    def __init__(self, model: Decoder, never: set[int], ratio: float = 0.15):
        self.model, self.never, self.ratio = model, never, ratio

    def shelf(self, prompt: Prompt, sinks: int = 1) -> Shelf:
        shelf = Shelf(never=self.never, ratio=self.ratio, sinks=sinks)
        for passage in prompt.passages:
            padded = jnp.asarray(np.pad(passage, (0, 128 - len(passage))), jnp.int32)
            shelf.put(passage, alone(self.model, padded, jnp.int32(len(passage)))[0])
        return shelf

    def run(self, prompt: Prompt) -> dict[str, tuple[Mixed, jax.Array]]:
        memory, edit = self.shelf(prompt).found(self.model, prompt.tokens)
        tokens, n = jnp.asarray(prompt.tokens, jnp.int32), jnp.int32(T)
        again = int(np.ceil(self.ratio * edit.doubtful.sum()))
        ends = np.cumsum([0, *map(len, prompt.passages)])
        early = edit.reused.copy()  # as many, of each passage the first ones
        for a, b in pairwise(ends):
            early[a + np.flatnonzero(edit.reused[a:b])[: round(self.ratio * edit.reused[a:b].sum())]] = False

        def call(reused, again, score=DHD):
            return selective_prefill(
                self.model, memory, tokens, n, jnp.asarray(reused), jnp.int32(again), 256, score
            )  # fmt: skip

        return {
            "naive": call(edit.reused, 0),
            "EPIC": call(early, 0),
            "CacheBlend": call(edit.reused, again, by_deviation),
            "attention": call(edit.reused, again, by_attention),
            "DHD": call(edit.reused, again),
        }  # fmt: skip


def kl(full: jax.Array, ours: jax.Array) -> np.ndarray:
    """Of what follows by a full prefill from what follows otherwise, nats."""
    p, q = jax.nn.log_softmax(full), jax.nn.log_softmax(ours)
    return np.asarray((jnp.exp(p) * (p - q)).sum(-1), float)


def right(logits: jax.Array, prompt: Prompt) -> bool:
    return int(np.asarray(logits)[prompt.digits].argmax()) == 0


@eqx.filter_jit
def answered(cell: SharedDecoder, state: Mixed, tokens) -> jax.Array:
    return cell.advance(state, tokens)[1]


@eqx.filter_jit
def greedy(model: Decoder, state: Session, logits) -> tuple[jax.Array, jax.Array]:
    """The likeliest answer: its tokens, and the logits after each."""

    def one(carry, _):
        state, logits = carry
        token = jnp.argmax(logits)
        state, logits = model.step(state, token)
        return (state, logits), (token, logits)

    return jax.lax.scan(one, (state, logits), None, length=ANSWER)[1]


def language(size: Size) -> list[Comparison]:
    text, model = Tokens.of(smollm2_file()), Decoder(smollm2(), size=ROOM)
    verse = (data.root() / "text" / "tinyshakespeare.txt").read_text()[:200_000]
    sources = [text.encode(verse), text.encode(Path(argparse.__file__).read_text(encoding="utf-8"))]
    never = {text.encode(mark)[0] for mark in ".,!?;:\n"}
    arms, count = Arms(model, never), 1 if size.smoke else 60 if size.full else 10
    seeds = range(1) if size.smoke else size.seeds(3)
    made = [
        make(text, sources, np.random.default_rng([FIRST_SEED + seed, i])) for seed in seeds for i in range(count)
    ]  # fmt: skip
    off: dict[str, list[float]] = {}
    hits: dict[str, list[bool]] = {}
    after: dict[str, list[float]] = {"repairs": [], "none": []}
    share, alike = [], []
    for i, prompt in enumerate(made):
        session, logits = alone(model, jnp.asarray(prompt.tokens, jnp.int32), jnp.int32(T))
        hits.setdefault("full", []).append(right(logits, prompt))
        found = arms.run(prompt)
        for name, (_, ours) in found.items():
            off.setdefault(name, []).append(float(kl(logits, ours)))
            hits.setdefault(name, []).append(right(ours, prompt))
        share.append(float(found["DHD"][0].fresh[:T].mean()))
        if i < 6:
            stale, first = found["naive"][0], np.asarray(found["naive"][0].deviation)[:T]
            doubtful = np.asarray(~stale.fresh[:T])
            alike.append([
                spearmanr(first[doubtful], np.asarray(_distance(a, b))[:T][doubtful]).statistic
                for a, b in zip(stale.session.memory[2:], session.memory[2:])
            ])  # fmt: skip
        if i % 4 == 0:
            tokens, wanted = greedy(model, session, logits)
            for name, repairs in (("repairs", 4), ("none", 0)):
                ours = answered(SharedDecoder(model, repairs), found["DHD"][0], tokens)
                after[name].append(float(kl(wanted, ours).mean()))
    rank = np.mean(alike, 0)
    note = "KL: " + ", ".join(f"{name} {np.mean(values):.3f}" for name, values in off.items())
    note += "; password found: " + ", ".join(f"{name} {np.mean(values):.0%}" for name, values in hits.items())
    note += (
        f"; {np.mean(share):.0%} of tokens computed in all layers; rank correlation of the deviation in layer 1 with "
    )
    note += ", ".join(f"{rank[layer - 2]:.2f} in layer {layer}" for layer in (2, 5, 10, 20, 29))
    scaled = lambda name, by: [by * value for value in off[name]]
    return [
        Comparison("KL to a full prefill: DHD, and 0.9 times deviation alone (CacheBlend)", off["DHD"],
                   scaled("CacheBlend", 0.9), 0, better="lower", paper="+20.38 % accuracy", note=note),
        Comparison("KL to a full prefill: DHD, and half of computing new tokens only", off["DHD"],
                   scaled("naive", 0.5), 0, better="lower",
                   note="new tokens only includes punctuation and the first token of each passage, which is much of "
                        "what selection would find: without selection the loss is small already"),
        Comparison("password found: DHD against CacheBlend", hits["DHD"], hits["CacheBlend"], -0.01),
        Comparison("KL of an answer of 32 tokens: with four repairs a token against none", after["repairs"],
                   after["none"], 0, better="lower"),
        seconds(arms, made[0], 2 if size.smoke else 11),
    ]  # fmt: skip


def _distance(ours, theirs) -> jax.Array:
    return ((ours.k - theirs.k) ** 2 + (ours.v - theirs.v) ** 2).sum((0, 2))


def seconds(arms: Arms, prompt: Prompt, times: int) -> Comparison:
    """To the logits after a prompt: all of it, and found, put together and computed where needed."""
    shelf, tokens = arms.shelf(prompt), jnp.asarray(prompt.tokens, jnp.int32)

    def ours() -> None:
        memory, edit = shelf.found(arms.model, prompt.tokens)
        again = int(np.ceil(arms.ratio * edit.doubtful.sum()))
        rows = min(filled(int((~edit.reused).sum()) + again), T)
        reused = jnp.asarray(edit.reused)
        run = selective_prefill(arms.model, memory, tokens, jnp.int32(T), reused, jnp.int32(again), rows)
        run[1].block_until_ready()

    def full() -> None:
        alone(arms.model, tokens, jnp.int32(T))[1].block_until_ready()

    took: dict[str, list[float]] = {"ours": [], "full": []}
    for turn in range(times + 1):  # the first one may compile
        for name, run in (("ours", ours), ("full", full)):
            start = time.perf_counter()
            run()
            if turn:
                took[name].append(time.perf_counter() - start)
    middle = {name: statistics.median(values) for name, values in took.items()}
    ratio = statistics.median(a / b for a, b in zip(took["ours"], took["full"]))
    return Comparison(
        "seconds to the first token of 512: in turns, the median ratio", [ratio], [1.0], 0.5, "ratio", "lower",
        paper="up to 9.39 × less", note=f"{middle['ours']:.3f} s against {middle['full']:.3f} s, {times} turns",
    )  # fmt: skip


class Shortest(FCFS):
    """Who has least to compute comes first."""

    def order(self, x: View) -> list[int]:
        return sorted(x.prompts, key=lambda slot: (x.prompt[slot] - x.hit[slot], x.id[slot]))


def requests(n: int, seed: int) -> Workload:
    """Conversations of which seven in ten quote one of 200 passages, by Zipf's law: half to nine tenths of the prompt.

    The simulator knows prefixes only: what is found stands for a passage of which 15 % is computed all the same.
    """
    rng, load = np.random.default_rng(seed), Workload.azure("conv")
    load = load.take(np.sort(rng.permutation(len(load))[:n]))
    popular = 1 / np.arange(1, 201)
    group = np.where(rng.random(n) < 0.7, rng.choice(200, n, p=popular / popular.sum()), -1)
    part = rng.uniform(0.5, 0.9, 200)
    shared = np.where(group >= 0, 0.85 * part[group] * load.prompt, 0).astype(int)
    return Workload(np.zeros(n), load.prompt, load.output, group=group, shared=shared)


def serving(size: Size) -> list[Comparison]:
    policies = {"CacheAware": CacheAware(), "FCFS": FCFS(), "shortest first": Shortest()}
    engine = Engine(VLLM, prefixes=True)
    served: dict[tuple[str, float], list[Result]] = {(name, part): [] for name in policies for part in (0.8, 1.0)}
    for seed in size.seeds(5):
        load = requests(60 if size.smoke else 1500, FIRST_SEED + seed)
        most = simulate_serving(load, [engine], FCFS())
        for name, part in served:
            some = load.poisson(part * len(load) / most.seconds, FIRST_SEED + seed)
            served[name, part].append(simulate_serving(some, [engine], policies[name]))
    at = {(*key, q): [result.percentile("ttft", q) for result in results]
          for key, results in served.items() for q in (50, 99)}  # fmt: skip
    note = ""
    for part, where in ((0.8, "seconds, median and p99: "), (1.0, "; at full load: ")):
        note += where + ", ".join(
            f"{name} {np.mean(at[name, part, 50]):.3f} and {np.mean(at[name, part, 99]):.2f}" for name in policies
        )
    note += "; at 80 % of what can be served few wait, and the order matters to those who do"
    ours, theirs = ({q: at[name, 0.8, q] for q in (50, 99)} for name in ("CacheAware", "FCFS"))
    return [
        Comparison("simulated median seconds to the first token: CacheAware against FCFS", ours[50],
                   theirs[50], 0.9, "ratio", "lower", paper="throughput × 1.2", note=note),
        Comparison("simulated p99 of the same", ours[99], theirs[99], 1.5, "ratio", "lower"),
    ]  # fmt: skip


def experiment(size: Size) -> list[Comparison]:
    return language(size) + serving(size)
