"""Requests counted together are what they are counted one by one, whenever somebody looks."""

import numpy as np
import pytest

from anabranch.schedule.baselines import FCFS, SRPT, Chunked, Orca
from anabranch.schedule.cluster import Fitted
from anabranch.schedule.scheduler import DECODING, Batch, Engine
from anabranch.schedule.serving import simulate_serving
from anabranch.schedule.stride import Striding
from anabranch.schedule.workload import Workload

COLUMNS = ("id", "status", "prompt", "done", "generated", "blocks", "last_emit", "preempted")


def mixed(n, seed, rate):
    rng = np.random.default_rng(seed)
    return Workload(np.zeros(n), rng.integers(1, 300, n), rng.integers(1, 80, n)).poisson(rate, seed)


def watched(kind, every):
    """A scheduler that reads all columns now and then, and what it has seen."""
    seen = {}

    class Watched(kind):
        def act(self, state, x):
            if int(x.now * 1e6) % every == 0:
                rows = [getattr(x, name) for name in COLUMNS]
                busy = np.flatnonzero(x.id >= 0)
                order = busy[np.argsort(x.id[busy])]
                found = np.nan_to_num(np.array([row[order].astype(float) for row in rows]), nan=-1)
                seen[round(x.now, 9)] = (found, x.free_blocks, x.growth, sorted(x.id[x.decoding].tolist()))
            return kind.act(self, state, x)

    return Watched(), seen


@pytest.mark.parametrize("kind", [FCFS, Orca, Chunked, SRPT], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("block, tokens", [(16, 800), (7, 1400), (1, 20_000), (64, 4096)])
def test_columns_are_right_whenever_they_are_read(kind, block, tokens):
    load = mixed(60, block, 10.0)
    engine = Engine(Fitted(), block=block, kv_tokens=tokens, max_seqs=24)
    for every in (1, 5):  # it matters that in between nobody looks
        (fast, often), (slow, always) = watched(kind, every), watched(kind, every)
        a = simulate_serving(load, [engine], fast)
        b = simulate_serving(load, [engine], slow, fast_forward=False)
        np.testing.assert_allclose(a.emitted, b.emitted, rtol=1e-9)
        assert a.peak == b.peak and a.preemptions == b.preemptions
        both = often.keys() & always.keys()
        assert len(both) > 0.9 * len(often) > 10
        for now in both:
            np.testing.assert_allclose(often[now][0], always[now][0], rtol=1e-9)
            assert often[now][1:] == always[now][1:]


@pytest.mark.parametrize("block, tokens, seed", [(16, 700, 3), (16, 20_000, 4), (2, 20_000, 2), (2, 20_000, 3)])
def test_engines_that_hand_requests_on(block, tokens, seed):
    """With small blocks some come with a block more, at the end of whose steps others have their last token."""
    load = mixed(60, seed, 20.0)
    engines = [Engine(Fitted(), kv_tokens=tokens, block=block, role=role) for role in ("prefill", "prefill", "decode")]
    fast, slow = (simulate_serving(load, engines, FCFS(), fast_forward=f) for f in (True, False))
    np.testing.assert_allclose(fast.emitted, slow.emitted, rtol=1e-9)
    assert (fast.iterations, fast.peak) == (slow.iterations, slow.peak)
    assert fast.transfer == slow.transfer


def test_what_joins_and_parts_by_hand():
    said = []
    seats = Striding(Engine(Fitted(), kv_tokens=160, block=4), 0, False, lambda *what: said.append(what), True)
    for slot, (done, output) in enumerate([(4, 9), (6, 3)]):
        seats.id[slot], seats.output[slot] = 10 + slot, output
        seats.done[slot], seats.generated[slot] = done, 1
        seats.hold(slot, done)
        seats.put(slot, DECODING)
    assert seats.growth == 1 and seats.free == 37  # the first one's block is full
    seats.take(Batch(seats.decoding), "test")
    assert seats.striding and seats.left() == 2 and seats.free == 36
    seats.stride(np.array([1.0, 2.0]))
    assert seats.over() == [1] and seats.context == 14 and seats.tokens(0) == 3
    seats.leave([1])
    assert [(i, first, times.tolist()) for i, first, times in said] == [(11, 1, [1.0, 2.0])]
    assert seats.free == 38 and seats.context == 6
    assert seats.done[0] == 6 and seats.blocks[0] == 2 and seats.last[0] == 2.0
    seats.halt()
    assert [(i, first, times.tolist()) for i, first, times in said[1:]] == [(10, 1, [1.0, 2.0])]
