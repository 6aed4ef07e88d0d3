"""Caches by key against cachetools and against dictionary implementations, on random requests and on a real trace."""

import csv
import heapq
import itertools
from collections import OrderedDict
from functools import cache

import cachetools
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anabranch import data
from anabranch.keep.base import ARC, EVICTIONS, FIFO, GDSF, LFU, LRU, S3FIFO, Ranked, belady, requests

UNIT = (FIFO, LRU, LFU, GDSF, ARC, S3FIFO)
PEER = {FIFO: cachetools.FIFOCache, LRU: cachetools.LRUCache, LFU: cachetools.LFUCache}

# Hits among the 113,872 requests of the whole trace.
CAPACITIES = (500, 2000, 5000)
HITS = {
    FIFO: (17389, 19284, 22291),
    LRU: (18474, 19683, 22345),
    LFU: (17221, 20165, 24074),
    ARC: (19654, 21043, 26102),
    S3FIFO: (19466, 20822, 25249),
    GDSF: (19027, 20010, 22725),
}
BELADY = (23697, 32002, 42561)


@cache
def trace() -> np.ndarray:
    """The block addresses of the real trace."""
    try:
        path = data.root() / "cache" / "cloudPhysicsIO.csv"
    except FileNotFoundError as error:
        pytest.skip(str(error))
    with path.open() as file:
        return np.array([int(row["lbn"]) for row in csv.DictReader(file)])


@cache
def run(cell):
    """`requests -> Access` of a fresh cache, compiled once per length."""
    return jax.jit(lambda xs: cell.advance(cell.init(), xs)[1])


def zipf(n: int = 3000, keys: int = 60, seed: int = 0) -> np.ndarray:
    """Requests with popular keys, 0 and the largest u32 among them, and a popularity that drifts."""
    draw = np.random.default_rng(seed)
    popular = np.minimum((keys * draw.random(n) ** 2).astype(int) + np.arange(n) // 500, 2 * keys)
    return np.where(popular == 7, 2**32 - 1, popular)


def peer_hits(cls, capacity, keys, sizes=None):
    """What cachetools does on the same requests. `sizes` of the keys: `capacity` is then their total."""
    held = cls(capacity, getsizeof=sizes.__getitem__ if sizes else None)
    hits = []
    for key in keys.tolist():
        hits.append(key in held)
        if hits[-1]:
            held[key]  # a touch
        elif not sizes or sizes[key] <= capacity:
            held[key] = key
    return np.array(hits)


def gdsf_hits(capacity, keys, cost):
    """GreedyDual-size with frequency on a heap; of equal values the smallest key leaves. Unit sizes."""
    value, freq, paid, heap, floor, hits = {}, {}, {}, [], 0.0, []
    for key, price in zip(keys.tolist(), cost.tolist()):
        hits.append(key in value)
        if key not in value:
            if len(value) == capacity:
                while True:
                    low, loser = heapq.heappop(heap)
                    if value.get(loser) == low:
                        break
                floor = low
                del value[loser]
            freq[key], paid[key] = 0, price
        freq[key] += 1
        value[key] = floor + freq[key] * paid[key]
        heapq.heappush(heap, (value[key], key))
    return np.array(hits)


def arc_hits(c, keys):
    """ARC with four ordered dictionaries, after figure 4 of the paper."""
    t1, t2, b1, b2 = (OrderedDict() for _ in range(4))
    p, hits = 0.0, []

    def replace(in_b2):
        if t1 and (len(t1) > p or (in_b2 and len(t1) == p)):
            b1[t1.popitem(last=False)[0]] = True
        else:
            b2[t2.popitem(last=False)[0]] = True

    for key in keys.tolist():
        hits.append(key in t1 or key in t2)
        if hits[-1]:
            t1.pop(key, None), t2.pop(key, None)
            t2[key] = True
        elif key in b1:
            p = min(c, p + max(1, len(b2) / len(b1)))
            replace(False)
            del b1[key]
            t2[key] = True
        elif key in b2:
            p = max(0, p - max(1, len(b1) / len(b2)))
            replace(True)
            del b2[key]
            t2[key] = True
        else:
            if len(t1) + len(b1) == c:
                if len(t1) < c:
                    b1.popitem(last=False)
                    replace(False)
                else:
                    t1.popitem(last=False)
            elif (total := len(t1) + len(t2) + len(b1) + len(b2)) >= c:
                if total == 2 * c:
                    b2.popitem(last=False)
                replace(False)
            t1[key] = True
    return np.array(hits)


def s3fifo_hits(c, keys):
    """S3-FIFO with three ordered dictionaries and fixed shares."""
    n_small = max(1, c // 10)
    n_main = c - n_small
    small, main, ghost = OrderedDict(), OrderedDict(), OrderedDict()
    hits = []

    def clean_main():
        while True:
            key, freq = main.popitem(last=False)
            if not freq:
                return
            main[key] = freq - 1

    def clean_small():
        while small:
            key, freq = small.popitem(last=False)
            if freq:
                main[key] = 0
            else:
                if len(ghost) == n_main:
                    ghost.popitem(last=False)
                ghost[key] = True
                return

    for key in keys.tolist():
        queue = small if key in small else main if key in main else None
        hits.append(queue is not None)
        if queue is not None:
            queue[key] = min(3, queue[key] + 1)
        elif ghost.pop(key, None):
            while len(main) >= n_main:
                clean_main()
            main[key] = 0
        else:
            while len(small) >= n_small:
                clean_small()
            while len(main) > n_main:
                clean_main()
            small[key] = 0
    return np.array(hits)


def reference(cls, capacity, keys):
    if cls in PEER:
        return peer_hits(PEER[cls], capacity, keys)
    if cls is GDSF:
        return gdsf_hits(capacity, keys, np.ones(len(keys)))
    return arc_hits(capacity, keys) if cls is ARC else s3fifo_hits(capacity, keys)


@pytest.mark.parametrize("cls", UNIT)
@pytest.mark.parametrize("capacity", [2, 10, 25])
def test_every_hit_is_that_of_an_independent_implementation(cls, capacity):
    for seed in range(2):
        keys = zipf(seed=seed)
        expected = reference(cls, capacity, keys)
        assert 100 < expected.sum() < 2900
        np.testing.assert_array_equal(run(cls(capacity))(requests(keys)).hit, expected)


@pytest.mark.parametrize("cls", UNIT)
def test_every_hit_on_a_real_prefix(cls):
    keys = trace()[:20_000]
    np.testing.assert_array_equal(run(cls(500))(requests(keys)).hit, reference(cls, 500, keys))


@pytest.mark.slow
@pytest.mark.parametrize("cls", UNIT)
def test_hits_on_the_whole_trace(cls):
    xs = requests(trace())
    assert tuple(int(run(cls(c))(xs).hit.sum()) for c in CAPACITIES) == HITS[cls]


def test_belady_on_the_whole_trace():
    assert tuple(belady(trace(), c).sum() for c in CAPACITIES) == BELADY


def test_belady_is_the_optimum_among_all_evictions():
    def best(keys, capacity):
        """The most hits over all choices of victims, by brute force."""
        states = {frozenset(): 0}
        for key in keys:
            after = {}
            for held, hits in states.items():
                if key in held:
                    options = [held]
                elif len(held) < capacity:
                    options = [held | {key}]
                else:
                    options = [held - {victim} | {key} for victim in held]
                for option in options:
                    after[option] = max(after.get(option, 0), hits + (key in held))
            states = after
        return max(states.values())

    draw = np.random.default_rng(1)
    for capacity in (1, 2, 3):
        for _ in range(10):
            keys = draw.integers(0, 5, 14).tolist()
            assert belady(keys, capacity).sum() == best(keys, capacity)


@pytest.mark.parametrize("cls", UNIT)
def test_no_cache_beats_belady(cls):
    keys = zipf()
    assert run(cls(10))(requests(keys)).hit.sum() <= belady(keys, 10).sum()


@pytest.mark.parametrize("cls", UNIT)
def test_slots_and_evictions_tell_the_caller_what_is_where(cls):
    """A caller who keeps values by slot always reads back the value of the key that was hit."""
    capacity, keys = 10, zipf(1500)
    seen = jax.tree.map(np.asarray, run(cls(capacity))(requests(keys)))
    store, held = {}, set()
    for t, key in enumerate(keys.tolist()):
        assert 0 <= seen.slot[t] < capacity
        assert seen.hit[t] != seen.admitted[t]
        if seen.hit[t]:
            assert store[seen.slot[t]] == key
        else:
            replaced = store.get(seen.slot[t])
            store[seen.slot[t]] = key
            if cls is not S3FIFO:  # where one goes out at a time
                assert (seen.evicted[t] == replaced) if replaced is not None else seen.evicted[t] == 0
                held = held - {replaced} | {key}
                assert len(held) <= capacity and held == set(store.values())


@pytest.mark.parametrize("cls", UNIT)
def test_live_keys_are_distinct_and_within_the_capacity(cls):
    cell = cls(10)
    step = jax.jit(cell.step)
    state = cell.init()
    for x in zipf(300):
        state, _ = step(state, requests(x))
        held = np.asarray(state.key)[np.asarray(state.live)].tolist()
        assert int(x) in held and len(held) == len(set(held)) <= 10


def test_a_larger_lru_hits_whenever_a_smaller_one_does():
    xs = requests(zipf())
    small, large = (np.asarray(run(LRU(c))(xs).hit) for c in (10, 25))
    assert (small <= large).all() and small.sum() < large.sum()


@pytest.mark.parametrize("cls", [FIFO, LRU, LFU])
def test_sizes_within_a_budget_as_in_cachetools(cls):
    keys = zipf()
    draw = np.random.default_rng(2)
    sizes = {key: int(draw.integers(1, 30)) for key in sorted(set(keys.tolist()))}
    sizes[12] = 500  # never fits
    size = np.array([sizes[key] for key in keys.tolist()])
    expected = peer_hits(PEER[cls], 200, keys, sizes)
    seen = run(cls(100, budget=200.0))(requests(keys, size=size))
    np.testing.assert_array_equal(seen.hit, expected)
    assert (np.asarray(seen.slot)[keys == 12] == -1).all() and not np.asarray(seen.admitted)[keys == 12].any()


def test_the_budget_is_kept_and_evictions_are_bounded():
    cell = LRU(200, budget=200.0)
    state, _ = jax.jit(cell.advance)(cell.init(), requests(np.arange(200)))
    step = jax.jit(cell.step)
    state, seen = step(state, requests(np.int64(1000), size=float(EVICTIONS)))
    assert seen.admitted and state.live.sum() == 200 - EVICTIONS + 1
    state, seen = step(state, requests(np.int64(1001), size=120.0))
    assert not seen.admitted and seen.slot == -1 and not seen.hit
    assert state.live.sum() == 200 - EVICTIONS + 1 - EVICTIONS  # as far as one step goes
    state, seen = step(state, requests(np.int64(1001), size=120.0))
    assert seen.admitted
    assert jnp.sum(jnp.where(state.live, state.size, 0)) <= 200


def test_gdsf_by_hand():
    """Keys 1, 2 with H = 4/2, 9/3; 3 with 1 evicts key 1 and lifts the floor to 2: H(3) = 3, a tie with key 2."""
    cell = GDSF(2)
    state, seen = cell.advance(cell.init(), requests([1, 2, 3], cost=[4, 9, 1], size=[2, 3, 1]))
    assert seen.evicted.tolist() == [0, 0, 1]
    assert float(state.floor) == 2 and state.score.tolist() == [3, 3]
    _, seen = cell.step(state, requests(4))
    assert int(seen.evicted) == 2


def test_gdsf_with_costs_as_on_a_heap():
    keys = zipf()
    cost = 2.0 ** np.random.default_rng(3).integers(0, 6, keys.max() % 1000 + 1)[keys % 1000]
    expected = gdsf_hits(10, keys, cost)
    assert (expected != peer_hits(PEER[LFU], 10, keys)).any()
    np.testing.assert_array_equal(run(GDSF(10))(requests(keys, cost)).hit, expected)


def test_gdsf_does_not_lose_its_increments_as_the_floor_grows():
    cell, xs = GDSF(10), requests(zipf(1000))
    advance = jax.jit(cell.advance)
    empty = cell.init()
    warm = advance(empty, xs)[0]
    for state, far in ((empty, 2.0**30), (warm, 2.0**20)):  # 1 is lost beside the first, kept beside the second
        lifted = state._replace(floor=state.floor + far, score=state.score + far)
        np.testing.assert_array_equal(advance(lifted, xs)[1].hit, advance(state, xs)[1].hit)


@pytest.mark.parametrize("cls", [FIFO, LRU, LFU, ARC])
def test_the_clock_may_wrap_around(cls):
    xs, state = requests(zipf(1000)), cls(10).init()
    expected = cls(10).advance(state, xs)[1]
    late = state._replace(clock=jnp.int32(2**31 - 300))
    np.testing.assert_array_equal(cls(10).advance(late, xs)[1].hit, expected.hit)


def test_the_queues_of_s3fifo_may_wrap_around():
    xs, state = requests(zipf(1000)), S3FIFO(10).init()
    late = state._replace(tail=jnp.int32(2**31 - 300))
    np.testing.assert_array_equal(S3FIFO(10).advance(late, xs)[1].hit, S3FIFO(10).advance(state, xs)[1].hit)


@pytest.mark.parametrize("cls", [LRU, S3FIFO])
def test_many_caches_at_once_are_many_caches(cls):
    cell = cls(10)
    many = requests(np.stack([zipf(400, seed=s) for s in range(3)]))
    together = jax.jit(jax.vmap(run(cell)))(many)
    for i in range(3):
        alone = run(cell)(jax.tree.map(lambda leaf, i=i: leaf[i], many))
        jax.tree.map(lambda a, b, i=i: np.testing.assert_array_equal(a[i], b), together, alone)


def test_bad_input_is_named():
    for cls, capacity in itertools.product(UNIT, (0, -1, 2.5)):
        with pytest.raises(ValueError, match=f"capacity.*{capacity}"):
            cls(capacity)
    with pytest.raises(ValueError, match=r"S3FIFO.*at least 2.*got 1"):
        S3FIFO(1)
    with pytest.raises(ValueError, match=r"budget.*-1"):
        LRU(3, budget=-1.0)
    with pytest.raises(ValueError, match=r"keys.*-3"):
        requests([1, -3])
    with pytest.raises(ValueError, match=r"keys.*float"):
        requests([1.5])
    with pytest.raises(ValueError, match=r"cost.*nan"):
        requests([1], cost=float("nan"))
    with pytest.raises(ValueError, match=r"size.*0"):
        requests([1], size=0.0)
    with pytest.raises(ValueError, match=r"capacity.*0"):
        belady([1], 0)
    with pytest.raises(NotImplementedError, match="order"):
        Ranked(2).advance(Ranked(2).init(), requests([1]))


@pytest.mark.parametrize("cell", [GDSF(5, budget=20.0), ARC(5), S3FIFO(5)], ids=repr)
def test_contract(cell):
    from anabranch.contract import check

    keys = zipf(48, keys=12)
    report = check(cell, requests(keys, cost=1 + keys % 5, size=1 + keys % 7))
    assert report.ok, str(report)
