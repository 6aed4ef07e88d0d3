"""TETRIS against speculation of equal lengths, on SmolLM2-135M, at the same number of verified tokens a call.

Greedy, what is accepted depends on the text and on what the draft guesses along it. So each set of 16 prompts is
written once, the draft is asked at every place, and all arms are replayed on that; one set is also run live, and must
be the same text. Warm, on a character model that is trained here.
"""

import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from anabranch.claim import Comparison, Size, chi_square
from anabranch.decode.base import warp
from anabranch.decode.drafts import NGram, Skip, Surer
from anabranch.decode.heads import FeatureDraft, smollm2_heads
from anabranch.decode.tetris import TetrisDecoder, select
from anabranch.decode.texts import CHARACTERS, character_model, characters, prompts, thoughts, written
from anabranch.models.llama import Config, Decoder, Llama
from anabranch.models.tokens import Tokens
from anabranch.models.weights import smollm2, smollm2_file

FIRST_SEED = 100
STREAMS, PROMPT, SAID, DEEP = 16, 64, 48, 7
"""Texts of a set, tokens of a prompt, tokens that are written, and the most that are guessed at one place."""


def guesses(target, draft, texts, n):
    """At each of the first SAID places of each text: the guesses, how many, how sure, and how many are right."""

    @eqx.filter_jit
    def along(target, draft, texts, n):
        def one(text, n):
            [h] = thoughts(target, text, (len(target.layers),))
            before = jnp.concatenate([jnp.zeros_like(h[:1]), h[:-1]])
            state = draft.read(draft.init(), text[:PROMPT], before[:PROMPT], n)

            def at(state, t):
                said = draft.propose(state, jax.random.PRNGKey(0), DEEP, None)
                true = jax.lax.dynamic_slice_in_dim(text, t, DEEP)
                right = jnp.cumprod((said.tokens == true) & (jnp.arange(DEEP) < said.n)).sum()
                return draft.read(state, text[t][None], before[t][None], 1), (said.sure, said.n, right)

            return jax.lax.scan(at, state, n + jnp.arange(SAID))[1]

        return jax.vmap(one)(texts, n)

    return [np.asarray(x) for x in along(target, draft, jnp.asarray(texts), jnp.asarray(n))]


def replay(found, lengths):
    """Accepted tokens and calls, both summed over texts, where `lengths(sure, n, right)` says how many are verified."""
    sure, n, right = found
    at, rows = np.zeros(len(sure), int), np.arange(len(sure))
    accepted = verified = calls = 0
    while (at < SAID).any():
        live = at < SAID
        here = np.minimum(at, SAID - 1)
        many = lengths(sure[rows, here], np.where(live, n[rows, here], 0), np.where(live, right[rows, here], 0), live)
        took = np.minimum(many, right[rows, here]) * live
        accepted, verified, calls = accepted + took.sum(), verified + (many * live).sum(), calls + live.sum()
        at += (took + 1) * live
    return {"accepted": accepted / calls, "emitted per verified": (accepted + calls) / max(verified, 1)}


_select = jax.jit(select, static_argnums=1)


def fixed(k):
    return lambda sure, n, right, live: np.minimum(n, k)


def tetris(k, e):
    def lengths(sure, n, right, live):
        there = np.arange(DEEP) < np.minimum(n, k + e)[:, None]
        return np.asarray(_select(np.where(there, sure, -np.inf).astype(np.float32), int(k * live.sum())))

    return lengths


def oracle(k, e):
    def lengths(sure, n, right, live):
        return np.asarray(best_of(np.minimum(right, k + e), int(k * live.sum())))

    return lengths


def best_of(right, capacity):
    out = np.zeros(len(right), int)
    for i in np.argsort(-right):
        out[i] = min(right[i], capacity - out.sum())
    return out


def dynamic(k, batch=STREAMS):
    """One length for all, from the share accepted so far and a call that costs 32 + 2.1 units a row, as measured."""
    seen = {"tried": 10.0, "right": 7.0}  # as the authors' code begins; with less it never starts to draft

    def lengths(sure, n, right, live):
        a = min(seen["right"] / seen["tried"], 0.999)
        gain = [(1 - a ** (l + 1)) / (1 - a) / (32 + 2.1 * live.sum() * (1 + l)) for l in range(k + 1)]
        many = np.minimum(n, int(np.argmax(gain)))
        took = np.minimum(many, right) * live
        seen["right"] += took.sum()
        seen["tried"] += (np.minimum(many, took + 1) * live).sum()
        return many

    return lengths


def live(target, draft, set_, n, extra, k):
    """The texts as the decoder writes them, seconds a token, and accepted tokens a call and text."""
    cell = TetrisDecoder(target, draft, STREAMS, k, extra)
    arrays, rest = eqx.partition(cell, eqx.is_array)
    step = jax.jit(lambda arrays, state: eqx.combine(arrays, rest).step(state), donate_argnums=1)
    begin = eqx.filter_jit(lambda cell, xs, n: cell.begin(cell.init(), xs, n))

    def go():
        state = begin(cell, jnp.asarray(set_), jnp.asarray(n))
        said, start = [[] for _ in n], time.perf_counter()
        while min(map(len, said)) < SAID:
            state, out = step(arrays, state)
            counts, tokens = np.asarray(out.n), np.asarray(out.tokens)
            for one, m, row in zip(said, counts, tokens):
                one += row[:m].tolist()
        seconds = time.perf_counter() - start
        return said, seconds / sum(map(len, said))

    return go


advance = eqx.filter_jit(lambda target, x: target.advance(target.init(), x)[1])


def unlike(target, text, n, said):
    """Where a text first says something else than the model, if its two best tokens are not as good as equal there."""
    wanted = text[n : n + SAID]
    other = np.flatnonzero(np.array(said[:SAID]) != wanted)
    if not len(other):
        return 0
    logits = advance(target, jnp.asarray(text))
    two = np.sort(np.asarray(logits[n + other[0] - 1]))[-2:]
    return int(two[1] - two[0] >= 1e-3)


def greedy(size: Size) -> list[Comparison]:
    target, text = Decoder(smollm2(), 160), Tokens.of(smollm2_file())
    draft = Surer(NGram(160), FeatureDraft(target, smollm2_heads(), 160), target.config.vocab)
    arms = {(k, e): [] for k in (2, 4) for e in (0, 1, 2, 3)}
    others = {}
    for seed in range(4):
        xs, n = prompts(text, STREAMS, PROMPT, FIRST_SEED + seed, held_out=True)
        texts = written(target, xs, n, SAID + DEEP)
        found = guesses(target, draft, texts, n)
        for (k, e), rows in arms.items():
            rows.append(replay(found, tetris(k, e) if e else fixed(k)))
        for k in (2, 4):
            others.setdefault(f"dynamic {k}", []).append(replay(found, dynamic(k)))
            for e in (1, 2, 3):
                others.setdefault(f"oracle {k} + {e}", []).append(replay(found, oracle(k, e)))
        if seed == 0:
            one = texts, xs, n, found
    mean = lambda rows, name: float(np.mean([row[name] for row in rows]))
    out = []
    for k in (2, 4):
        e = max((1, 2, 3), key=lambda e: mean(arms[k, e], "accepted"))
        column = lambda e: [row["accepted"] for row in arms[k, e]]
        note = f"e = {e}, the best; " + ", ".join(
            f"{name} {mean(rows, 'accepted'):.3f} ({mean(rows, 'emitted per verified'):.3f} emitted a verified token)"
            for name, rows in ({("fixed" if not e else f"e = {e}"): arms[k, e] for e in range(4)}
                               | {name: rows for name, rows in others.items() if f" {k}" in name[:9]}).items()
        )  # fmt: skip
        metric = f"accepted tokens a call and text, k = {k}: TETRIS against equal lengths"
        paper = "consistently higher acceptance than plain batch speculation and dynamic lengths"
        out.append(Comparison(metric, column(e), column(0), 1.05, "ratio", paper=paper, note=note))
    texts, xs, n, found = one
    arm = {e: live(target, draft, xs, n, e, 4) for e in (0, 2)}
    said = {e: go() for e, go in arm.items()}  # compiles
    wrong = sum(unlike(target, row, m, s) for row, m, s in zip(texts, n, said[2][0]))
    seconds = {e: [] for e in arm}
    for _ in range(3):
        for e, go in arm.items():
            seconds[e].append(go()[1])
    same = [sum(a[:SAID] == b[m : m + SAID].tolist() for a, b, m in zip(said[2][0], texts, n))]
    note = f"{same[0]} of {STREAMS} texts are the same token for token, the others after a near tie; seconds a token, "
    note += f"k = 4: e = 2 over e = 0 {np.median(seconds[2]) / np.median(seconds[0]):.3f} (beside other work: no claim)"
    metric = "texts that TETRIS writes live, k = 4, e = 2, unlike the model alone where that is sure"
    out.append(Comparison(metric, [float(wrong)], [0.0], 0.0, better="lower", note=note))
    return out


# Warm


def rate(target, temperature, extra, score, seeds):
    """Accepted tokens a call and text, by seed: 16 texts, 24 calls."""
    cell = TetrisDecoder(target, Skip(target, 1, 3), STREAMS, 3, extra, score=score, temperature=temperature)
    text = characters()[CHARACTERS:]

    @eqx.filter_jit
    def run(cell, xs, key):
        state = cell.begin(cell.init(key=key), xs, jnp.full(STREAMS, 16))
        return jax.lax.scan(lambda state, _: cell.step(state), state, None, length=24)[1].n - 1

    out = []
    for seed in seeds:
        starts = np.random.default_rng(FIRST_SEED + seed).integers(0, len(text) - 16, STREAMS)
        xs = jnp.asarray(np.stack([text[s : s + 16] for s in starts]))
        out.append(float(jnp.mean(run(cell, xs, jax.random.PRNGKey(FIRST_SEED + seed)))))
    return np.array(out)


def exactness(score, seed, runs):
    """Of a chi-square test: two tokens of one text and one of another under a small capacity, at temperature 1."""
    sizes = Config(vocab=7, width=16, layers=3, heads=4, kv_heads=2, hidden=24, rope_base=100.0)
    target = Decoder(jax.tree.map(lambda x: 6 * x, Llama(sizes, key=jax.random.PRNGKey(FIRST_SEED + seed))), 32)
    cell = TetrisDecoder(target, Skip(target, 1, 2), 2, window=1, extra=1, capacity=1, score=score, temperature=1.0)
    begun = cell.begin(cell.init(), jnp.array([[1, 2], [5, 3]]), jnp.array([2, 2]))

    def one(key):
        state, a = cell.step(begun._replace(key=key))
        _, b = cell.step(state)
        second = jnp.where(a.n[0] > 1, a.tokens[0, 1], b.tokens[0, 0])
        return (a.tokens[0, 0] * 7 + second) * 7 + a.tokens[1, 0]

    codes = jax.jit(jax.vmap(one))(jax.random.split(jax.random.PRNGKey(FIRST_SEED + seed), runs))
    p = lambda *text: np.exp(np.asarray(warp(target.advance(target.init(), jnp.array(text))[1][-1], 1.0), float))
    two = np.stack([p(1, 2)[i] * p(1, 2, i) for i in range(7)])
    return chi_square(np.bincount(codes, minlength=343), two[:, :, None] * p(5, 3))


def warm(size: Size) -> list[Comparison]:
    target, seeds = character_model(0, 20 if size.smoke else 400, 128), size.seeds(5)
    gain = {}
    for temperature, score in ((0.0, None), (1.0, "prefix"), (1.0, "token")):
        equal = rate(target, temperature, 0, score, seeds)
        gain[temperature, score] = rate(target, temperature, 2, score, seeds) / equal - 1
    note = ", ".join(f"T = {t:g} {score or ''}: {g.mean():+.3f}" for (t, score), g in gain.items())
    metric = "gain over equal lengths at T = 1 with the exact score, against half of the greedy gain, character model"
    out = [Comparison(metric, gain[1.0, "prefix"], gain[0.0, None] / 2, 0.0, note=note)]
    runs = 2000 if size.smoke else 30_000
    least = [exactness("prefix", s, runs) for s in size.seeds(3)]
    biased = [exactness("token", s, runs) for s in size.seeds(1)]
    note = f"the published score: p = {biased[0]:.2g}"
    out.append(Comparison("smallest p of chi-square, T = 1, exact score", [min(least)], [0.0], 1e-3, note=note))
    return out


def experiment(size: Size) -> list[Comparison]:
    return (greedy(size) if not size.smoke else []) + warm(size)
