"""D2O against the arithmetic of the authors' code, derived again in NumPy, and its budgets by layer."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anabranch import contract
from anabranch.keep.d2o import D2O, layer_budgets, merge_back
from anabranch.keep.memory import H2O
from anabranch.models.llama import Config, Decoder, Llama

CONFIG = Config(vocab=37, width=24, layers=3, heads=6, kv_heads=2, hidden=40, rope_base=1000.0)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 37, 48), jnp.int32)
advance = eqx.filter_jit(Decoder.advance)


@pytest.fixture(scope="module")
def llama():
    return jax.tree.map(lambda x: 6 * x, eqx.filter_jit(Llama)(CONFIG, key=jax.random.PRNGKey(0)))


def official(q, k, v, prompt, heavy, recent, rule):
    """One layer of the authors' code: the whole prompt first, then token by token; q, k, v are (T, heads, D).

    Gives positions, keys, values, mass and threshold after each token that follows the prompt. rule="paper" puts the
    paper's weights in the place of the code's.
    """
    (_, H, D), size = q.shape, heavy + recent
    q, k, v = (x.swapaxes(0, 1).astype(np.float64) for x in (q, k, v))
    at, K, V = np.tile(np.arange(prompt), (H, 1)), k[:, :prompt], v[:, :prompt]
    score = np.einsum("htd,hsd->hts", q[:, :prompt], K) / math.sqrt(D)
    score = np.where(np.tri(prompt, dtype=bool), np.exp(score), 0.0)
    mass, threshold = (score / score.sum(-1, keepdims=True)).sum(1), None
    for t in range(prompt, k.shape[1]):
        K, V = (np.concatenate([old, new[:, t : t + 1]], 1) for old, new in ((K, k), (V, v)))
        at = np.concatenate([at, np.full((H, 1), t)], 1)
        share = np.exp(np.einsum("hd,hsd->hs", q[:, t], K) / math.sqrt(D))
        mass = np.pad(mass, ((0, 0), (0, 1))) + share / share.sum(-1, keepdims=True)
        older = mass[:, : K.shape[1] - recent].copy()
        older[:, :4] = np.inf
        stays = np.zeros(mass.shape, bool)
        np.put_along_axis(stays, np.argsort(-older, -1)[:, :heavy], True, 1)
        stays[:, -recent:] = True
        pick = lambda x, which: x[which].reshape(H, -1, *x.shape[2:])
        lost_k, lost_v = pick(K, ~stays), pick(V, ~stays)
        K, V, at, mass = (pick(x, stays) for x in (K, V, at, mass))
        unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
        cosine = np.einsum("hrd,hsd->hrs", unit(lost_k), unit(K))
        u, into = cosine.max(-1), cosine.argmax(-1)
        threshold = u.mean() if threshold is None else (threshold + u.mean()) / 2
        old_k, old_v = K.copy(), V.copy()
        for h in range(H):
            for j in range(size):
                joined = [r for r in range(u.shape[1]) if into[h, r] == j and u[:, r].mean() >= threshold]
                w = [u[h, r] for r in joined] if rule == "code" else [math.exp(u[h, r]) for r in joined]
                own, total = (1, 1 + len(w)) if rule == "code" else (math.e, math.e + sum(w))
                for new, old, lost in ((K, old_k, lost_k), (V, old_v, lost_v)):
                    new[h, j] = (own * old[h, j] + sum(a * lost[h, r] for a, r in zip(w, joined))) / total
        yield at, K, V, mass, threshold


@pytest.mark.parametrize("rule", ["code", "paper"])
def test_a_layer_is_that_of_the_authors(rule):
    rng = np.random.default_rng(2)
    q, k, v = (rng.normal(size=(34, 2, 8)).astype(np.float32) for _ in range(3))
    q *= 2
    held = D2O(12, levels=False, rule=rule, room=20, compact=False).empty(2, 8)
    extend = jax.jit(lambda held, q, k, v, at: held.extend(q, k, v, at, lambda x, at: x)[1])
    held = extend(held, q[:20], k[:20], v[:20], jnp.arange(20))
    squeeze, merged = jax.jit(lambda held: held.compressed()), []
    for t, (at, K, V, mass, threshold) in enumerate(official(q, k, v, 20, 6, 6, rule), 20):
        held = squeeze(extend(held, q[t : t + 1], k[t : t + 1], v[t : t + 1], jnp.array([t])))
        np.testing.assert_array_equal(held.position[:, :12], at)
        np.testing.assert_allclose(held.k[:, :12], K, atol=1e-5)
        np.testing.assert_allclose(held.v[:, :12], V, atol=1e-5)
        np.testing.assert_allclose(held.mass[:, :12], mass, atol=1e-4)
        assert float(held.own.threshold) == pytest.approx(threshold, abs=1e-5)
        merged.append(float(held.own.merged))
    assert 0 < merged[-1] < 2 * 22 and merged[-1] + float(held.own.dropped) == 2 * 22


def test_budgets_of_layers_are_those_of_the_authors():
    columns = np.random.default_rng(1).gamma(0.3, size=(7, 5, 30)).astype(np.float32)
    v = columns.var(-1, ddof=1)
    d = ((v - v.min(1, keepdims=True)) / (np.ptp(v, 1)[:, None] + 1e-6)).mean(1)
    share = np.exp(-d) / np.exp(-d).sum() * 7 * 20
    padded = jnp.pad(jnp.asarray(columns), ((0, 0), (0, 0), (0, 6)), constant_values=9.0)
    there, budgets = jnp.arange(36) < 30, jax.jit(layer_budgets, static_argnums=(2, 3))
    found = np.asarray(budgets(padded, there, 20, 35))
    assert (np.abs(found - share) <= 1).all() and found.sum() == 140  # what rounding left has gone to the largest
    assert budgets(padded, there, 20, 21).max() == 21
    same = budgets(jnp.ones((7, 1, 36)), there, 10, 17)  # one head: nothing to compare
    assert same.tolist() == [10] * 7


def test_merging_by_hand():
    kept, left = jnp.array([[[2.0, 0.0], [0.0, 4.0]]]), jnp.array([[[2.0, 0.0], [8.0, 0.0], [0.0, 1.0]]])
    into, alike, joins = jnp.array([[0, 0, 1]]), jnp.array([[1.0, 0.5, 0.9]]), jnp.array([[True, True, False]])
    code, _ = merge_back((kept, kept), (left, left), into, alike, joins, "code")
    np.testing.assert_allclose(code, [[[(2 + 2 + 4) / 3, 0], [0, 4]]], rtol=1e-6)
    paper, _ = merge_back((kept, kept), (left, left), into, alike, joins, "paper")
    e, r = math.e, math.exp(0.5)
    np.testing.assert_allclose(paper, [[[(2 * e + 2 * e + 8 * r) / (2 * e + r), 0], [0, 4]]], rtol=1e-6)


def test_layers_keep_to_budgets_of_their_own(llama):
    keep = D2O(16, queries=3, room=4)
    cell, kept = Decoder(llama, keep=keep), []
    state = cell.init()
    for i in range(0, 48, 4):
        state, logits = advance(cell, state, TOKENS[i : i + 4])
        kept.append([[int(held.live[0]), int(held.budget)] for held in state.memory])
        assert bool(jnp.isfinite(logits).all())
    live, budget = np.moveaxis(np.array(kept), -1, 0)
    assert (budget[:4] == 16).all() and (budget[4:] == budget[4]).all() and len(set(budget[4])) > 1
    assert budget[4].sum() == 48 and keep.most == 28
    assert (live <= 20).all(where=budget == 16) and (live[5:] == budget[5:] + 4).all()  # full
    for held in state.memory:
        for row, n in zip(np.asarray(held.position), held.live.tolist(), strict=True):
            assert (np.diff(row[:n]) > 0).all() and (row[n:] == -1).all() and row[:4].tolist() == [0, 1, 2, 3]
        assert float(held.own.merged) > 0 and float(held.own.dropped) > 0


def test_without_levels_and_merging_it_is_h2o(llama):
    plain = D2O(12, levels=False, merge=False, sinks=0, room=4)
    found, wanted = (Decoder(llama, keep=keep) for keep in (plain, H2O(12, 6, room=4)))
    np.testing.assert_array_equal(*(advance(cell, cell.init(), TOKENS)[1] for cell in (found, wanted)))


def test_with_room_for_all_it_is_the_full_memory(llama):
    cell = Decoder(llama, keep=D2O(44, room=48))
    np.testing.assert_allclose(advance(cell, cell.init(), TOKENS)[1], llama(TOKENS), atol=2e-4)


def test_layers_that_are_skipped_keep_the_first_and_the_last(llama):
    cell = Decoder(llama, keep=D2O(12, levels=False, skip=(0, -1), whole=24, room=4))
    state, _ = advance(cell, cell.init(), TOKENS)
    wanted = [0, 1, 2, 3, *range(24, 48)]
    for i, held in enumerate(state.memory):
        assert held.live.tolist() == ([16, 16] if i == 1 else [28, 28])
        assert (held.position.tolist() == [wanted] * 2) == (i != 1)
        assert (float(held.own.merged) > 0) == (i == 1)


def test_contract():
    small = Config(vocab=37, width=8, layers=1, heads=2, kv_heads=1, hidden=8)
    cell = Decoder(Llama(small, key=jax.random.PRNGKey(0)), keep=D2O(8, room=4))
    report = contract.check(cell, TOKENS[:24], key=jax.random.PRNGKey(0))
    broken = [row.name for row in report.rows if row.verdict == "breaks"]
    assert set(broken) <= {"offline-equal"}, str(report)  # when it forgets depends on how many tokens come at once


def test_bad_arguments_are_named(llama):
    for arguments, said in (
        ({"budget": 4}, "budget must be more than sinks=4, got 4"),
        ({"budget": 9, "heavy": 1.5}, "heavy must be in 0..1, got 1.5"),
        ({"budget": 9, "queries": 0}, "queries must be at least 1, got 0"),
        ({"budget": 9, "rule": "max"}, 'rule must be "paper" or "code", got \'max\''),
        ({"budget": 9, "skip": (0,)}, "whole must be at least budget=9 where layers are skipped, got 0"),
    ):
        with pytest.raises(ValueError, match=said):
            D2O(**arguments)
    cell = Decoder(llama, keep=D2O(8, queries=2, room=4))
    with pytest.raises(ValueError, match="queries must divide the 3 that share a key head, got 2"):
        cell.step(cell.init(), TOKENS[0])
