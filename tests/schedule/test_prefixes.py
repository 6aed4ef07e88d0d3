"""Prefixes in simulated engines: what a request finds, by hand, and that little memory and haste change nothing."""

from dataclasses import replace

import equinox as eqx
import numpy as np
import pytest

from anabranch.schedule.baselines import FCFS, SRPT, Chunked, Orca
from anabranch.schedule.cluster import Fitted
from anabranch.schedule.layered_prefill import LayeredPrefill
from anabranch.schedule.scheduler import Batch, Engine, Scheduler
from anabranch.schedule.serving import simulate_serving
from anabranch.schedule.workload import Workload

COST = Fitted((0, 1.0, 0.0), (0, 0.0, 1.0), (0, 0, 0))  # a token of a prompt takes 1 ms, a decode 1 ms


def texts(n, seed=0, rate=20.0):
    """Requests about eight documents with one of two headers."""
    rng = np.random.default_rng(seed)
    heads = [np.full(40, -1 - i) for i in range(2)]
    documents = [np.concatenate([heads[i % 2], rng.integers(0, 99, rng.integers(20, 300))]) for i in range(8)]
    tokens = [
        np.concatenate([documents[i], rng.integers(100, 199, rng.integers(1, 40))]) for i in rng.integers(0, 8, n)
    ]
    load = Workload(np.zeros(n), [*map(len, tokens)], rng.integers(1, 60, n), tokens=tokens)
    return load.poisson(rate, seed)


def test_what_requests_find_by_hand():
    alike = np.arange(100)
    tokens = [np.append(-1, alike[1:]), alike[:70], alike[:70], np.append(alike[:50], [-1] * 20), alike[:64]]
    load = Workload(np.arange(5) / 1e3, [100, 70, 70, 70, 64], np.full(5, 2), tokens=tokens)
    result = simulate_serving(load, [Engine(COST, prefixes=True)], FCFS(), record=True)
    # All come while the first, which begins with another token, is prefilled. The second of them finds the four full
    # blocks that the first computes beside it; the third shares three; the fourth must compute its last token, and so
    # all of its last block.
    assert [entry[3:] for entry in result.log[:2]] == [([0], [100]), ([1, 2, 3, 4], [70, 6, 22, 16])]
    assert result.cached == 64 + 48 + 48 and result.prefilled == 100 + 70 + 6 + 22 + 16
    np.testing.assert_allclose(result.ttft + load.arrival, [0.1, *[0.214] * 4])
    # Blocks: the fourth has its last one with the others in the end, and takes one more for its next token.
    assert result.peak == 7 + 5 + 1 + 2 + 0 + 1
    apart = simulate_serving(replace(load, arrival=np.arange(5)), [Engine(COST, prefixes=True)], FCFS())
    assert apart.cached == 160 and apart.peak == 7
    np.testing.assert_allclose(apart.ttft, [0.1, 0.07, 0.006, 0.022, 0.016])


def test_groups_share_what_they_say_and_only_that():
    load = Workload(np.arange(5) / 1e3, np.full(5, 50), np.full(5, 2), group=[2, 0, 0, 1, -1], shared=40)
    result = simulate_serving(load, [Engine(COST, prefixes=True)], FCFS(), record=True)
    assert result.log[1][4] == [50, 50 - 32, 50, 50]
    alone = simulate_serving(load, [Engine(COST)], FCFS(), record=True)
    assert alone.log[1][4] == [50] * 4 and alone.cached == 0 and alone.prefilled == 250


@pytest.mark.parametrize("scheduler", [FCFS(), Orca(), Chunked(chunk=64), SRPT(), LayeredPrefill(most=512)])
@pytest.mark.parametrize("tokens", [576, 3000, 40_000])
def test_every_request_gets_its_tokens_and_iterations_at_once_are_those_one_by_one(scheduler, tokens):
    load = texts(60)
    engine = Engine(Fitted(), kv_tokens=tokens, max_seqs=32, prefixes=True)
    fast, slow = (simulate_serving(load, [engine], scheduler, fast_forward=f) for f in (True, False))
    assert np.array_equal(fast.tokens, load.output) and not fast.rejected
    np.testing.assert_allclose(fast.emitted, slow.emitted, rtol=1e-9)
    for what in ("iterations", "preemptions", "cached", "prefilled", "peak"):
        assert getattr(fast, what) == getattr(slow, what)
    assert (fast.preemptions > 0) == (tokens == 576)
    if not fast.preemptions:
        assert fast.cached + fast.prefilled == load.prompt.sum()
    alone = simulate_serving(load, [replace(engine, prefixes=False)], scheduler)
    assert fast.prefilled < alone.prefilled and fast.cached > 0.2 * load.prompt.sum()


def test_an_engine_without_prefixes_is_as_it_was_and_so_is_one_whose_requests_share_nothing():
    load = texts(60, seed=1)
    distinct = replace(load, tokens=[np.arange(n) * 1000 + i for i, n in enumerate(load.prompt)])
    for tokens in (576, 40_000):
        engine = Engine(Fitted(), kv_tokens=tokens, max_seqs=32)
        without, none = (
            simulate_serving(some, [one], Chunked())
            for some, one in ((load, engine), (replace(distinct, group=0), replace(engine, prefixes=True)))
        )
        assert np.array_equal(without.emitted, none.emitted) and without.peak == none.peak


def test_prefixes_on_engines_that_only_prefill():
    load = texts(60, seed=2)
    engines = [Engine(Fitted(), role="prefill", prefixes=True), Engine(Fitted(), role="decode", kv_tokens=3000)]
    result = simulate_serving(load, engines, FCFS())
    assert np.array_equal(result.tokens, load.output) and result.cached > 0


class Sees(FCFS):
    """Notes what it sees of the first three requests, and how busy engines are."""

    views: list = eqx.field(default_factory=list)
    loads: list = eqx.field(default_factory=list)

    def act(self, state, x):
        at = np.argsort(x.id)[np.sort(x.id) >= 0][:3]
        self.views.append((x.blocks[at].tolist(), x.hit[at].tolist(), x.own[at].tolist(), x.free_blocks))
        return super().act(state, x)

    def route(self, engines, request):
        self.loads.append([load.tokens for load in engines])
        return 0


def test_what_a_scheduler_sees():
    alike = np.arange(40)
    load = Workload([0, 1, 2], [40, 40, 40], [9000, 3, 1], tokens=[alike] * 3)
    simulate_serving(load, [Engine(COST, kv_tokens=16_000, max_seqs=2, prefixes=True)], sees := Sees())
    # The second waits, and would find two of the first one's three blocks; then each has one of its own.
    assert sees.views[0] == ([0], [0], [0], 1000)
    waits = next(i for i, (blocks, *_) in enumerate(sees.views) if len(blocks) == 2)
    (first, found), (done, hit), (own, none), free = sees.views[waits]
    assert (found, hit, none) == (2, 32, 0) and done > 900 and (own, free) == (first, 1000 - first)
    (first, second), _, own, free = sees.views[waits + 1]
    assert second == 3 and own == [first - 2, 1] and free == 1000 - first - 1


def test_who_is_busy_knows_what_need_not_be_computed():
    load = Workload([0, 1, 2], [40, 40, 40], [2, 2, 2], tokens=[np.arange(40)] * 3)
    simulate_serving(load, [Engine(COST, prefixes=True)] * 2, sees := Sees())
    assert sees.loads == [[0, 0]] * 3


class Keeps(Scheduler):
    """One request at a time; of those that wait, the last one's prefix is kept."""

    keeps: bool = True

    def act(self, state, x):
        prefill = {}
        if x.prompts and not x.decoding:
            first = x.prompts[0]
            prefill[first] = int(x.prompt[first] - x.hit[first])
        return state, Batch(x.decoding, prefill, keep=x.prompts[1:][-1:] if self.keeps else [])


class Idles(Scheduler):
    """Serves the first request, keeps what the second would find, then does nothing at all, then serves it."""

    views: list = eqx.field(default_factory=list)

    def init(self, *, key=None):
        return 0

    def act(self, state, x):
        slot = x.id.argmax()
        self.views.append((int(x.blocks[slot]), x.free_blocks))
        prefill = {int(slot): int(x.prompt[slot] - x.hit[slot])} if state in (0, 3) else {}
        timer, keep = x.now if state < 4 else None, [slot] if state == 1 else []
        return state + 1, Batch(prefill=prefill, timer=timer, keep=keep)


def test_what_is_kept_is_held_as_long_as_a_batch_says_so_also_one_that_does_nothing():
    load = Workload([0, 0.001], [80, 81], [1, 1], tokens=[np.arange(80), np.arange(81)])
    result = simulate_serving(load, [Engine(COST, kv_tokens=160, prefixes=True)], idles := Idles())
    assert idles.views[:4] == [(0, 10), (0, 10), (5, 5), (0, 10)] and result.cached == 80


def test_what_is_kept_is_found():
    """Memory holds two texts. The third takes the place of the first, which is wanted again, or else of the second."""
    first, second, third = (np.arange(n) + 1000 * n for n in (160, 144, 145))
    load = Workload(np.zeros(4), [160, 144, 145, 160], np.full(4, 2), tokens=[first, second, third, first])
    engine = Engine(COST, kv_tokens=21 * 16, prefixes=True)
    kept, not_kept = (simulate_serving(load, [engine], Keeps(keep), record=True) for keep in (True, False))
    chunks = lambda result: [tokens[0] for *_, tokens in result.log if tokens]
    assert chunks(kept) == [160, 144, 145, 16] and chunks(not_kept) == [160, 144, 145, 160 - 32]


@pytest.mark.parametrize(
    "bad, said",
    [
        ({"tokens": [[1, 2], [1]]}, "row 1: tokens must be as many as prompt says, 2, got 1"),
        ({"tokens": [[1, 2]]}, "tokens has 1 rows, arrival 2"),
    ],
)
def test_refused(bad, said):
    with pytest.raises(ValueError, match=said):
        Workload(np.zeros(2), np.full(2, 2), np.ones(2), **bad)
