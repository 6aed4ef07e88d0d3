"""BatchLLM: the best cut against all others, the tree against a hash of all prefixes, and what is served against what
was planned."""

from dataclasses import replace

import numpy as np
import pytest

from anabranch.plan import simulate, validate
from anabranch.schedule.batchllm import BatchLLM, PrefixTree, group_requests, maximize_reuse
from anabranch.schedule.cluster import Fitted
from anabranch.schedule.scheduler import Engine
from anabranch.schedule.seats import Asked, Seats
from anabranch.schedule.serving import simulate_serving
from anabranch.schedule.workload import Workload


def some(seed, n=None, letters=2, longest=8):
    rng = np.random.default_rng(seed)
    n = n or rng.integers(1, 7)
    return [rng.integers(0, letters, rng.integers(1, longest + 1)).tolist() for _ in range(n)]


def partitions(items):
    if not items:
        yield []
        return
    for rest in partitions(items[1:]):
        yield [[items[0]], *rest]
        for i in range(len(rest)):
            yield [*rest[:i], [items[0], *rest[i]], *rest[i + 1 :]]


def spares(prompts, block):
    """What a group of prompts spares: one computes all of the common prefix, the others all but what they must."""
    depth = next(i for i in range(99) if len({tuple(p[: i + 1]) for p in prompts}) > 1 or i == min(map(len, prompts)))
    finds = [min(depth, len(p) - 1) // block * block if len(p) == depth else depth // block * block for p in prompts]
    return sum(finds) - min(finds)


@pytest.mark.parametrize("block", [1, 2, 3])
def test_no_other_groups_of_any_kind_spare_more(block):
    for seed in range(40):
        prompts = some(seed)
        tree = PrefixTree(prompts)
        shares = maximize_reuse(tree, block)
        groups = [np.flatnonzero(shares == node) for node in np.unique(shares) if tree.depth[node] >= block]
        found = sum(spares([prompts[i] for i in rows], block) for rows in groups)
        assert found == tree.spared(shares, block)
        ways = partitions(list(range(len(prompts))))
        assert found == max(sum(spares([prompts[i] for i in part], block) for part in way) for way in ways)


def greedy(prompts):
    """The authors' way, on nested dictionaries: from the leaves up, a node takes what is above it along, alone, if that
    spares more than it costs. Returns the tokens that are not computed."""

    def tree(words):
        """(edge, children) of words that are not empty, by first letter; a word that ends is a leaf, ((), [])."""
        out = []
        for letter in sorted({w[0] for w in words}):
            rest = [w for w in words if w[0] == letter]
            n = 0
            while all(len(w) > n for w in rest) and len({w[n] for w in rest}) == 1:
                n += 1
            out.append([n, leaves([w[n:] for w in rest])])
        return out

    def leaves(words):
        return [[0, None] for w in words if not w] + tree([w for w in words if w])

    def count(node):
        return 1 if node[1] is None else sum(map(count, node[1]))

    def enlarge(children):
        for child in list(children):
            if child[1] is None:
                continue
            enlarge(child[1])
            for grand in list(child[1]):
                if grand[1] is not None and (count(grand) - 1) * grand[0] > child[0]:
                    child[1].remove(grand)
                    children.append([child[0] + grand[0], grand[1]])
                if len(child[1]) == 1:
                    child[0], child[1] = child[0] + child[1][0][0], child[1][0][1]
                    break
        return children

    return sum(edge * (count([edge, kids]) - 1) for edge, kids in enlarge(tree([tuple(p) for p in prompts])) if kids)


def test_never_less_than_the_authors_way_and_sometimes_more():
    better = 0
    for seed in range(60):
        prompts = [[*p, 9, i] for i, p in enumerate(some(seed, 10))]  # none is the beginning of another
        tree = PrefixTree(prompts)
        ours, theirs = tree.spared(maximize_reuse(tree)), greedy(prompts)
        assert theirs <= ours <= tree.bound()
        better += theirs < ours
    assert 0 < better < 30


@pytest.mark.parametrize("block", [1, 2, 4])
def test_the_bound_is_what_a_cache_that_forgets_nothing_spares(block):
    for seed in range(30):
        prompts = some(seed, 12, longest=10)
        cache, found = set(), 0
        for prompt in sorted(prompts):
            ends = range(block, len(prompt) + 1, block)
            found += block * sum(tuple(prompt[:end]) in cache for end in ends if end < len(prompt))
            cache |= {tuple(prompt[:end]) for end in ends}
        assert PrefixTree(prompts).bound(block) == found


def texts(n, seed=0):
    rng = np.random.default_rng(seed)
    heads = [np.full(40, 900 + i) for i in range(2)]
    documents = [np.concatenate([heads[i % 2], rng.integers(0, 99, rng.integers(20, 300))]) for i in range(12)]
    tokens = [
        np.concatenate([documents[i], rng.integers(100, 199, rng.integers(1, 40))]) for i in rng.integers(0, 12, n)
    ]
    tokens[3] = tokens[5] = tokens[8]  # one that is there three times
    tokens[0] = np.arange(2000, 2030)  # one that is like no other
    return Workload(np.zeros(n), [*map(len, tokens)], rng.integers(1, 60, n), tokens=tokens)


def serve(groups, **engine):
    scheduler = BatchLLM(groups.load.group, groups.load.shared, chunk=256)
    return simulate_serving(groups.load, [Engine(Fitted(), prefixes=True, **engine)], scheduler, record=True)


def test_groups_are_in_order_and_as_they_were():
    load = texts(80)
    groups = group_requests(load, 30.0)
    assert sorted(groups.order.tolist()) == list(range(80))
    ratios = []
    for group in range(groups.load.group.max() + 1):
        rows = np.flatnonzero(groups.load.group == group)
        assert np.array_equal(rows, np.arange(rows[0], rows[0] + len(rows)))
        prefix = groups.load.shared[rows[0]]
        assert prefix % 16 == 0 and (len(rows) > 1) == (prefix > 0)
        for row, text in zip(groups.order[rows], groups.load.tokens[rows]):
            assert np.array_equal(text, load.tokens[row])
            assert np.array_equal(text[:prefix], groups.load.tokens[rows[0]][:prefix])
        ratios.append(30.0 * len(rows) / (groups.load.prompt[rows].sum() - prefix * (len(rows) - 1)))
    assert ratios == sorted(ratios, reverse=True) and len(ratios) > 8
    come = group_requests(load, 30.0, reorder=False)
    first = [come.order[come.load.group == g].min() for g in range(len(ratios))]
    assert first == sorted(first) and come.spared == groups.spared


def test_long_answers_come_first():
    load = texts(80)
    answers = np.where(load.prompt % 2, 1.0, 400.0)
    groups = group_requests(load, answers)
    half = lambda part: groups.expected[part].mean()
    assert half(slice(0, 40)) > half(slice(40, 80)) + 50


@pytest.mark.parametrize("tokens", [576, 1200, 3000, 40_000])
def test_what_is_planned_is_found_in_any_memory(tokens):
    groups = group_requests(texts(80), 30.0)
    result = serve(groups, kv_tokens=tokens)
    assert np.array_equal(result.tokens, groups.load.output)
    assert result.cached == groups.spared
    assert result.prefilled + result.cached >= groups.load.prompt.sum()
    fast = simulate_serving(
        groups.load, [Engine(Fitted(), kv_tokens=tokens, prefixes=True)],
        BatchLLM(groups.load.group, groups.load.shared, chunk=256),
    )  # fmt: skip
    np.testing.assert_allclose(fast.emitted, result.emitted, rtol=1e-9)
    assert max(sum(chunks) for *_, chunks in result.log) <= 256


def test_memory_and_not_number_limits_who_is_let_in():
    load = Workload(np.zeros(300), np.full(300, 16), np.full(300, 16))
    none = np.full(300, -1)
    result = simulate_serving(
        load, [Engine(Fitted(), kv_tokens=16 * 100, max_seqs=150)], BatchLLM(none, none), record=True
    )
    most = max(len(decoded) for _, _, decoded, *_ in result.log)
    # Each takes a block, and one is set aside for its answer; 90 of 100 blocks are given.
    assert most == 45 and not result.preemptions
    few = simulate_serving(load, [Engine(Fitted(), max_seqs=150)], BatchLLM(none, none), record=True)
    assert max(len(decoded) for _, _, decoded, *_ in few.log) == 150


def test_a_group_begins_at_once():
    """All that fit in a chunk, of which only the first computes the prefix."""
    load = Workload(np.zeros(7), [500, *[180] * 6], np.full(7, 9), group=[0, *[1] * 6], shared=[0, *[160] * 6])
    result = simulate_serving(
        load, [Engine(Fitted(), prefixes=True)], BatchLLM(load.group, load.shared, chunk=250), record=True
    )
    prefilled = [entry[3:] for entry in result.log[:4]]
    assert prefilled == [([0], [250]), ([0], [250]), ([1, 2, 3, 4, 5], [180, 20, 20, 20, 10]), ([5, 6], [10, 20])]


def test_a_prefix_stays_while_nobody_uses_it():
    """Between the first of a group and the second, four that answer at length take all the memory, and some of them are
    sent away and come before the second."""
    groups, shared = [-1, -1, -1, -1, 0, 0], [0, 0, 0, 0, 80, 80]
    load = Workload(np.zeros(6), [64, 64, 64, 64, 88, 160], [120, 120, 120, 120, 1, 1], group=groups, shared=shared)
    engine, scheduler = Engine(Fitted(), kv_tokens=30 * 16, prefixes=True), BatchLLM(load.group, load.shared)
    result = simulate_serving(load, [engine], scheduler, record=True)
    begun = [next(n for n, entry in enumerate(result.log) if i in entry[3]) for i in (4, 5)]
    assert begun[1] > begun[0] + 100 and result.preemptions
    assert result.cached == 80


def test_what_is_kept_gives_way_to_the_only_one_that_could_go_on():
    keys = [("prefix", i) for i in range(5)]
    seats = Seats(Engine(Fitted(), kv_tokens=20 * 16, max_seqs=1, prefixes=True), 0, False)
    seats.queue.extend((0, 1))
    asked = [Asked(0.0, 247, 20, 1.0, 1.0), Asked(0.0, 100, 1, 1.0, 1.0, keys)]
    seats.seat(lambda i: asked[i])
    # The first one has been sent away after nine tokens; what the second would find is kept.
    seats.preempted[0], seats.prompt[0] = 1, 256
    ids = seats.index.alloc(5)
    seats.index.insert(keys, ids)
    seats.kept, seats.free = [ids], 15
    scheduler = BatchLLM(np.array([-1, 0]), np.array([0, 80]))
    _, batch = scheduler.act((), seats.view(7.0))
    assert batch.keep == () and batch.timer == 7.0 and not batch.prefill
    seats.free = 16
    _, batch = scheduler.act((), seats.view(7.0))
    assert batch.prefill == {0: 256} and batch.keep == [1]


def test_memory_for_hardly_more_than_one():
    for seed in range(10):
        groups = group_requests(texts(30, seed), 30.0)
        most = -(-int((groups.load.prompt + groups.load.output).max()) // 16)
        result = serve(groups, kv_tokens=16 * most)
        assert np.array_equal(result.tokens, groups.load.output) and result.peak <= most


def test_one_that_is_too_large_is_rejected_and_the_rest_of_its_group_served():
    load = texts(40)
    long = np.concatenate([load.tokens[2], np.arange(4000)])
    tokens = [*load.tokens[:2], long, *load.tokens[3:]]
    groups = group_requests(replace(load, prompt=[*map(len, tokens)], tokens=tokens), 30.0)
    result = serve(groups, kv_tokens=3000)
    assert groups.order[result.rejected].tolist() == [2]
    assert (np.delete(result.tokens, result.rejected) > 0).all()


def test_the_plan_of_the_groups():
    groups = group_requests(texts(40), 30.0)
    plan = groups.plan(Fitted())
    trace = simulate(plan)
    assert not validate(plan) and len(plan) == 2 * (groups.load.group.max() + 1)
    rows = groups.load.group == 0
    own = groups.load.prompt + groups.load.output - groups.load.shared
    assert plan.mem["delta"][0] == groups.load.shared[0] // 16 + (-(-own[rows] // 16)).sum()
    assert trace.profile(0)[1][-1] == 0 and trace.makespan > 0


@pytest.mark.parametrize(
    "bad, said",
    [
        (lambda: PrefixTree([[1], []]), "prompt 1 is empty"),
        (lambda: PrefixTree([]), "prompts must hold one"),
        (lambda: maximize_reuse(PrefixTree([[1]]), 0), "block must be at least 1, got 0"),
        (lambda: group_requests(Workload.synthetic(2, 5, 5), 1.0), "load.tokens is None"),
        (lambda: group_requests(texts(20), [1.0] * 19 + [0.0]), "expected must be positive, got 0.0 in row 19"),
        (lambda: BatchLLM(np.zeros(1), np.zeros(2)), "group has 1 rows, shared 2"),
        (lambda: BatchLLM(np.zeros(1), np.zeros(1), chunk=0), "chunk must be positive, got 0"),
        (lambda: BatchLLM(np.zeros(1), np.zeros(1), high=1.5), r"high must be in \(0, 1\], got 1.5"),
    ],
)
def test_refused(bad, said):
    with pytest.raises(ValueError, match=said):
        bad()
