"""Reuse of keys and values: what is found, what is exact, what is repaired, and who is served first."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anabranch.contract import check
from anabranch.keep import kvshare
from anabranch.keep.blocks import Segment, SegmentIndex
from anabranch.keep.kvshare import DHD, CacheAware, SharedDecoder, Shelf, by_deviation, example, kv_edit
from anabranch.models.llama import Config, Decoder, Llama
from anabranch.schedule.baselines import FCFS
from anabranch.schedule.cluster import Fitted
from anabranch.schedule.scheduler import PREFILLING, Engine
from anabranch.schedule.serving import simulate_serving
from anabranch.schedule.workload import Workload

CONFIG = Config(vocab=37, width=24, layers=4, heads=6, kv_heads=2, hidden=40, rope_base=1000.0)
SIZE = 48
draw = np.random.default_rng(0)
OLD, NEW = draw.integers(0, 37, 20).tolist(), draw.integers(0, 37, 9).tolist()
PROMPT = NEW[:5] + OLD[3:18] + NEW[5:]  # an old passage in the middle


@pytest.fixture(scope="module")
def model():
    llama = jax.tree.map(lambda x: 4 * x, eqx.filter_jit(Llama)(CONFIG, key=jax.random.PRNGKey(0)))
    return Decoder(llama, size=SIZE)


@pytest.fixture(scope="module")
def full(model):
    advance = eqx.filter_jit(lambda model, xs: model.advance(model.init(), xs))
    return lambda tokens: advance(model, jnp.array(tokens))


# What is found


def common_runs(old, new, w):
    """All runs that two texts have in common, by comparing everything with everything."""
    runs = []
    for i in range(len(old)):
        for j in range(len(new)):
            if old[i] == new[j] and not (i and j and old[i - 1] == new[j - 1]):
                n = 0
                while i + n < len(old) and j + n < len(new) and old[i + n] == new[j + n]:
                    n += 1
                if n >= w:
                    runs.append((i, j, n))
    return runs


@pytest.mark.parametrize("seed", range(4))
def test_segments_and_what_is_taken_are_those_of_comparing_everything(seed):
    draw = np.random.default_rng(seed)
    olds = [draw.integers(0, 4, 40).tolist() for _ in range(3)]
    new = np.concatenate([olds[0][5:20], draw.integers(0, 4, 6), olds[2][:12], olds[1][30:]]).tolist()
    index = SegmentIndex(window=5)
    for name, old in enumerate(olds):
        assert index.insert(name, old) == []
    found = index.match(new)
    runs = {(name, *run) for name, old in enumerate(olds) for run in common_runs(old, new, 5)}
    assert {tuple(segment) for segment in found} == runs and len(found) == len(runs)
    edit = kv_edit(new, found, never={3}, sinks=1)
    best = {}
    for name, src, dst, n in sorted(runs, key=lambda run: (run[2], run[0])):
        for i in range(n):
            if n > best.get(dst + i, (0,))[0]:
                best[dst + i] = n, name, src + i
    exact = max((n for _, src, dst, n in runs if src == dst == 0), default=0)
    for i, token in enumerate(new):
        taken = i in best and i < len(new) - 1 and (i < exact or (token != 3 and best[i][2] >= 1))
        assert edit.reused[i] == taken
        if taken:
            assert olds[edit.source[i]][edit.at[i]] == token
            if i >= exact:
                assert next(n for name, src, dst, n in runs if name == edit.source[i] and src - dst == edit.at[i] - i
                            and dst <= i < dst + n) == best[i][0]  # fmt: skip


def test_what_is_forgotten_or_of_others_is_not_found():
    index = SegmentIndex(window=3, texts=2)
    index.insert("a", [1, 2, 3, 4], b"ann")
    assert index.match([1, 2, 3], b"ann") and not index.match([1, 2, 3]) and not index.match([1, 2, 3], b"bob")
    index.insert("b", [5, 6, 7])
    index.match([1, 2, 3], b"ann")
    assert index.insert("c", [8, 9, 10]) == ["b"]  # it was used longest ago
    assert not index.match([5, 6, 7]) and index.match([1, 2, 3], b"ann") and "b" not in index
    index.remove("a")
    assert not index.match([1, 2, 3], b"ann") and len(index._at) == 1


def test_a_token_said_a_thousand_times_is_cheap_and_found():
    index = SegmentIndex(window=4)
    index.insert("a", [1] * 2000)
    found = index.match([2] + [1] * 2000)
    assert len(found) < 2000 + SegmentIndex.most and max(segment.length for segment in found) == 2000
    assert kv_edit([2] + [1] * 2000, found).at[1:2000].tolist() == [-1, *range(1, 1999)]


def test_the_front_is_taken_from_where_it_is_right():
    runs = [Segment("long", 4, 0, 9), Segment("front", 0, 0, 5)]
    edit = kv_edit(range(10), runs, never={2, 7})
    assert edit.source == ["front"] * 5 + ["long", "long", None, "long", None] and edit.exact == 5
    assert edit.at.tolist() == [0, 1, 2, 3, 4, 9, 10, -1, 12, -1]
    assert edit.doubtful.tolist() == [False] * 5 + [True, True, False, True, False]


# What is computed


def test_all_computed_again_is_a_full_prefill(model, full):
    shelf = Shelf(ratio=1.0)
    shelf.prefill(model, OLD)
    state, logits, reuse = shelf.prefill(model, PROMPT)
    assert reuse == (24, 15, 24)
    session, wanted = full(PROMPT)
    np.testing.assert_allclose(logits, wanted[-1], atol=1e-4)
    for ours, theirs in zip(state.session.memory, session.memory):
        np.testing.assert_allclose(ours.k[:, :24], theirs.k[:, :24], atol=1e-4)
        np.testing.assert_allclose(ours.v[:, :24], theirs.v[:, :24], atol=1e-4)
    assert bool(state.fresh[:24].all()) and not state.deviation.any()


def test_a_prefix_needs_nothing_computed_again(model, full):
    shelf = Shelf(never={OLD[2]})
    shelf.prefill(model, OLD)
    prompt = OLD[:16] + NEW
    state, logits, reuse = shelf.prefill(model, prompt)
    assert reuse == (25, 16, 9)
    np.testing.assert_allclose(logits, full(prompt)[1][-1], atol=1e-4)
    assert float(state.deviation.max()) < 1e-6
    assert shelf.prefill(model, prompt)[2].found == 24  # it was right, so that it was kept


def test_keys_are_turned_to_where_they_now_stand(model, full):
    shelf = Shelf()
    shelf.prefill(model, OLD)
    memory, edit = shelf.found(model, PROMPT)
    session, _ = full(PROMPT)
    assert edit.reused.tolist() == [5 <= i < 20 for i in range(24)]
    for name in ("k", "v"):  # in the first layer they depend on nothing else
        ours, theirs = getattr(memory[0], name), getattr(session.memory[0], name)
        np.testing.assert_allclose(ours[:, 5:20], theirs[:, 5:20], atol=1e-5)
    assert not np.allclose(memory[2].v[:, 5:20], session.memory[2].v[:, 5:20], atol=1e-2)


def test_more_room_for_rows_changes_nothing(model):
    shelf = Shelf(ratio=0.2)
    shelf.prefill(model, OLD)
    memory, edit = shelf.found(model, PROMPT)
    tokens, reused = np.pad(np.array(PROMPT, np.int32), (0, 8)), np.pad(edit.reused, (0, 8))
    tight, wide = (
        kvshare.selective_prefill(model, memory, tokens, jnp.int32(24), reused, jnp.int32(3), rows) for rows in (12, 20)
    )  # fmt: skip
    assert int(tight[0].fresh.sum()) == 12
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), tight, wide)
    assert not any(np.asarray(kv.k[:, 24:]).any() for kv in wide[0].session.memory)


def test_another_prompt_of_about_the_length_compiles_nothing(model):
    shelf = Shelf(ratio=0.2)
    shelf.prefill(model, OLD)
    compiled = []
    for prompt in (PROMPT, NEW[:4] + OLD[3:18] + NEW[4:], NEW[:5] + OLD[4:18] + NEW[5:]):
        state, _, reuse = shelf.prefill(model, prompt)
        compiled.append((kvshare.selective_prefill._cached._cache_size(), reuse.found, int(state.fresh.sum())))
    assert len({size for size, *_ in compiled}) == 1 and compiled[2][1:] == (14, 12)


def test_who_deviates_most_is_computed(model):
    shelf = Shelf(ratio=0.2)
    shelf.prefill(model, OLD)
    state, _, _ = shelf.prefill(model, PROMPT, score=by_deviation)
    none = Shelf(ratio=0.0)
    none.prefill(model, OLD)
    stale, _, _ = none.prefill(model, PROMPT)
    deviation, mass = np.asarray(stale.deviation), np.asarray(stale.mass)
    again = np.flatnonzero(np.asarray(state.fresh)[5:20]) + 5
    assert set(again) == set(np.argsort(-deviation)[:3]) and len(again) == 3
    # All nine new tokens share out one each in each of six heads.
    assert mass.sum() == pytest.approx(9 * 6, rel=1e-5)
    np.testing.assert_allclose(DHD(jnp.array([1.0, 4, 2]), jnp.array([6.0, 3, 1])), [1 / 4, 1 / 2, 1 / 12], rtol=1e-6)


def test_the_cell_goes_on_and_repairs(model, full):
    shelf = Shelf(ratio=0.0)
    shelf.prefill(model, OLD)
    state, _, _ = shelf.prefill(model, PROMPT)
    step = eqx.filter_jit(lambda cell, state, x: cell.step(state, x))
    plain, logits = step(SharedDecoder(model, 0), state, jnp.int32(7))
    _, wanted = model.step(state.session, jnp.int32(7))
    np.testing.assert_allclose(logits, wanted, atol=1e-4)
    assert not plain.fresh[5:20].any() and bool(plain.fresh[24])
    # As many repairs as there are doubtful tokens: all that was not computed then is as in a full prefill.
    repaired, _ = step(SharedDecoder(model, 15), state, jnp.int32(7))
    session, _ = full([*PROMPT, 7])
    for ours, theirs in zip(repaired.session.memory, session.memory):
        np.testing.assert_allclose(ours.v[:, :20], theirs.v[:, :20], atol=1e-4)
    assert not np.allclose(state.session.memory[-1].v[:, :20], theirs.v[:, :20], atol=1e-2)
    assert bool(repaired.fresh[:25].all())
    # A few: those with the largest product.
    some, _ = step(SharedDecoder(model, 4), state, jnp.int32(7))
    best = np.argsort(-np.asarray(state.mass * state.deviation))[:4]
    assert set(np.flatnonzero(np.asarray(some.fresh[:24] & ~state.fresh[:24]))) == set(best)


def test_contract():
    report = check(*example())
    assert report.ok, str(report)


# Who is served first


def view(hit, prompt, arrival, now, status=None):
    n = len(hit)

    class Seen:
        pass

    x = Seen()
    x.id, x.status = np.arange(n), np.ones(n, np.int8) if status is None else np.array(status)
    x.hit, x.prompt, x.arrival, x.now = np.array(hit), np.array(prompt), np.array(arrival), now
    x.prompts = sorted(range(n), key=lambda slot: x.status[slot] != PREFILLING)
    return x


def test_who_finds_most_comes_first_until_others_have_waited():
    policy = CacheAware(patience=2.0, band=0.3)
    assert policy.order(view([0, 80, 60, 79], [100] * 4, [0.0] * 4, 0.0)) == [1, 3, 2]
    assert policy.order(view([0, 80, 60, 79], [100] * 4, [-3.0, 0, 0, 0], 0.0)) == [0]
    assert policy.order(view([0, 80, 60, 79], [100] * 4, [0.0] * 4, 0.0, [2, 1, 1, 1])) == [0, 1, 3, 2]


def test_the_simulator_asks_it():
    rng = np.random.default_rng(3)
    n = 120
    group = np.where(rng.random(n) < 0.6, 0, -1)
    load = Workload(np.sort(rng.random(n)) * 40, np.full(n, 400), np.full(n, 8), group=group, shared=np.full(n, 352))
    cost = Fitted((5.0, 1.0, 0.0), (10.0, 0.0, 0.5), (10.0, 0.0, 0.5))
    engine = Engine(cost, kv_tokens=40_000, max_tokens=512, max_seqs=16, prefixes=True)
    served = {p: simulate_serving(load, [engine], p()) for p in (FCFS, CacheAware)}
    assert all(len(result.tokens) == n and (result.tokens == 8).all() for result in served.values())
    assert served[CacheAware].percentile("ttft", 50) < served[FCFS].percentile("ttft", 50)


def test_bad_input_is_named(model):
    for make, message in (
        (lambda: SegmentIndex(window=0), "window must be at least 1, got 0"),
        (lambda: SegmentIndex(texts=0), "texts must be at least 1, got 0"),
        (lambda: Shelf(ratio=1.5), r"ratio must be in \[0, 1\], got 1.5"),
        (lambda: Shelf().prefill(model, []), "tokens must be from 1 to 48, got 0"),
        (lambda: Shelf().prefill(model, [1] * 49), "got 49"),
        (lambda: SharedDecoder(model, -1), "repairs must not be negative, got -1"),
        (lambda: CacheAware(patience=0.0), "patience must be positive, got 0"),
        (lambda: CacheAware(band=0.0), "band must be positive, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
