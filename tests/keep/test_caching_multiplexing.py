"""The joint algorithm against a dictionary port of the authors' code, and its estimates and bounds by hand."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from anabranch.cell import Feedback, Learner, Maybe
from anabranch.keep.base import LRU, requests
from anabranch.keep.caching_multiplexing import (
    LEC,
    Always,
    CachedMultiplexer,
    Multiplexer,
    Query,
    Selector,
    Similar,
    optimum,
)
from anabranch.learn.linear import LogisticRegression

SMALL, LARGE = 0, 1
N, L, ROUNDS = 20, 8, 3000


def synthetic(dist: str, seed: int = 0, ratio: float = 100.0, alpha: float = 0.8, rounds: int = ROUNDS):
    """Requests, costs (T, 2), successes and the penalty of the paper's synthetic test, all costs exact in float32.

    "binomial": either model is dear or cheap for a query, both costs are seen when the small one ran (as if it always
    failed, at no penalty). "normal": the small one fails half of the time, at twice the large one's cost.
    """
    draw = np.random.default_rng(seed)
    q = (N * draw.power(alpha, rounds)).astype(int)
    if dist == "binomial":
        mean = 1 + ratio * draw.integers(0, 2, (N, 2))
        success, penalty = np.zeros(rounds, bool), 0.0
    else:
        mean = np.maximum(0.1, draw.normal([1, ratio], 1, (N, 2)))
        success, penalty = draw.integers(0, 2, rounds).astype(bool), 2.0
    cost = np.maximum(0.1, mean[q] + draw.normal(size=(rounds, 2)))
    return q, cost.astype(np.float32).astype(float), success, penalty


def official(q, cost, success, penalty, dist, by, selector, amended=False):
    """Costs paid by the online server of the authors' code (their "LFU" and "ours", three selectors), in dictionaries.

    Two things there cannot be had from what a server sees, or look like slips, and are `amended`: with "binomial" every
    observation of the model that was chosen enters its mean twice; with "normal" the cache weighs with the mean of
    min(cascade cost, large cost), although the large cost is unknown where the small model succeeded. Amended: every
    observation once, and the smaller of the two means.
    """
    small, cascade, large, best = {}, {}, {}, {}  # query -> (mean, count)
    counts, choice, held, paid = {}, {}, [], []

    def add(means, key, value):
        mean, n = means.get(key, (0.0, 0))
        means[key] = (mean * n + value) / (n + 1), n + 1

    def mean(means, key):
        return means.get(key, (0.0, 0))[0]

    def weight(key, total):
        if by == "LFU":
            return counts[key]
        if selector != "ours":
            return counts[key] / total * mean(large if selector == "large" else cascade, key)
        if dist == "binomial" or amended:
            tried = cascade if amended else small
            return counts[key] / total * min(mean(tried, key), mean(large, key) if key in large else np.inf)
        return counts[key] / total * (mean(best, key) if key in best else mean(small, key))

    for t, key in enumerate(q.tolist()):
        c_small, c_large = cost[t]
        c_cascade = c_small + penalty * (not success[t]) * c_large
        counts[key] = counts.get(key, 0) + 1
        if key in held:
            paid.append(0.0)
            continue
        use_large = selector == "large" or (selector == "ours" and choice.get(key, False))
        paid.append(c_large if use_large else c_cascade)
        if dist == "binomial" and not amended:
            add(large if use_large else small, key, c_large if use_large else c_small)
        if not use_large:
            add(small, key, c_small)
            add(cascade, key, c_cascade)
            add(best, key, min(c_cascade, c_large))
        if use_large or not success[t]:
            add(large, key, c_large)
        choice[key] = key in large and mean(cascade, key) > mean(large, key)
        if len(held) < L:
            held.append(key)
            continue
        place = min(range(L), key=lambda i: weight(held[i], t + 1))
        if weight(key, t + 1) > weight(held[place], t + 1):
            held[place] = key
    return np.array(paid)


def queries(q, cost, success):
    return Query(requests(q).key, jnp.asarray(cost, jnp.float32), jnp.asarray(success))


SELECTORS = {"large": Always, "cascade": lambda **kw: Always(model=SMALL, **kw), "ours": Multiplexer}


@pytest.fixture(scope="module")
def served():
    """`(by, selector, penalty, queries) -> Served`, each compiled once."""
    compiled = {}

    def serve(by, selector, penalty, xs):
        if (by, selector, penalty) not in compiled:
            cell = CachedMultiplexer(LEC(L), SELECTORS[selector](penalty=penalty), cost_aware=by == "ours")
            compiled[by, selector, penalty] = jax.jit(lambda xs: cell.advance(cell.init(), xs)[1])
        return compiled[by, selector, penalty](xs)

    return serve


@pytest.mark.parametrize("dist", ["binomial", "normal"])
@pytest.mark.parametrize("by", ["LFU", "ours"])
@pytest.mark.parametrize("selector", ["large", "cascade", "ours"])
def test_costs_are_those_of_the_official_algorithm(served, dist, by, selector):
    for seed, ratio, alpha in ((0, 100.0, 0.8), (1, 1.5, 0.5)):
        q, cost, success, penalty = synthetic(dist, seed, ratio, alpha)
        ours = np.asarray(served(by, selector, penalty, queries(q, cost, success)).cost)
        amended = selector == "ours" and (dist == "binomial" or by == "ours")
        expected = official(q, cost, success, penalty, dist, by, selector, amended)
        assert 0 < (expected > 0).mean() < 1
        np.testing.assert_array_equal(ours > 0, expected > 0)
        np.testing.assert_allclose(ours, expected, rtol=1e-6)
        # What is amended changes little: the total is that of the code as it stands.
        as_it_stands = official(q, cost, success, penalty, dist, by, selector)
        np.testing.assert_allclose(ours.sum(), as_it_stands.sum(), rtol=0.1)


def test_the_cache_and_the_choice_each_save_and_together_more(served):
    total = dict.fromkeys(itertools.product(("LFU", "ours"), ("large", "ours")), 0.0)
    for seed in range(4):
        q, cost, success, penalty = synthetic("binomial", seed)
        for pair in total:
            total[pair] += float(served(*pair, penalty, queries(q, cost, success)).cost.sum())
    assert max(total["LFU", "ours"], total["ours", "large"]) < total["LFU", "large"]
    assert total["ours", "ours"] < min(total["LFU", "ours"], total["ours", "large"]) / 2


def test_optimum_is_the_best_of_all_caches_and_models():
    draw = np.random.default_rng(0)
    for _ in range(20):
        p, cost = draw.dirichlet(np.ones(5)), draw.exponential(size=(5, 2))
        every = []
        for held in itertools.combinations(range(5), 2):
            for model in itertools.product((0, 1), repeat=5):
                every.append(sum(p[i] * cost[i, model[i]] for i in range(5) if i not in held))
        cached, model, total = optimum(p, cost, 2)
        assert cached.sum() == 2 and total == pytest.approx(min(every))
        assert total == pytest.approx((p * cost[np.arange(5), model])[~cached].sum())


def test_online_converges_to_the_optimum(served):
    q, cost, success, penalty = synthetic("binomial", seed=7, ratio=100.0)
    p = np.bincount(q, minlength=N) / len(q)
    mean = np.stack([np.bincount(q, cost[:, m], N) / np.maximum(np.bincount(q, minlength=N), 1) for m in (0, 1)], 1)
    best = optimum(p, mean, L)[2]
    late = np.asarray(served("ours", "ours", penalty, queries(q, cost, success)).cost)[ROUNDS // 2 :].mean()
    assert best < late < 1.3 * best


def test_lec_keeps_what_costs_most_and_refuses_the_rest():
    """Weights at the third request: key 1 2 x 5, key 2 1 x 9, key 3 1 x 20 (evicts 2), key 2 again 2 x 9 < 20, > 10."""
    _, seen = LEC(2).advance(LEC(2).init(), requests([1, 1, 2, 3, 2, 4], cost=[5, 5, 9, 20, 9, 18]))
    assert seen.hit.tolist() == [False, True, False, False, False, False]
    assert seen.evicted.tolist() == [0, 0, 0, 2, 1, 0]
    assert seen.admitted.tolist() == [True, False, True, True, True, False]  # 18 equals 2 x 9: the incumbent stays
    assert seen.slot.tolist() == [0, 0, 1, 1, 0, -1]


def test_lec_averages_the_costs_of_misses_only():
    cell = LEC(1, rows=4)
    state, seen = cell.advance(cell.init(), requests([9, 1, 1, 9, 1], cost=[100, 2, 4, 7, 6]))
    assert seen.hit.tolist() == [False, False, False, True, False]
    row = state.key.tolist().index(1)
    assert float(state.c[row, 0]) == pytest.approx((2 + 4 + 6) / 3) and int(state.nc[row, 0]) == 3
    assert float(state.c[0, 0]) == 100 and float(state.n[0]) == 2


def test_the_table_recycles_the_least_frequent_outside_of_the_cache():
    cell = LEC(1, rows=3)
    state, _ = cell.advance(cell.init(), requests([1, 1, 1, 2, 2, 3, 4], cost=[9, 9, 9, 1, 1, 1, 1]))
    assert sorted(zip(state.key.tolist(), state.n.tolist())) == [(1, 3), (2, 2), (4, 1)]
    state, seen = cell.step(state, requests(3))
    assert not seen.hit and sorted(zip(state.key.tolist(), state.n.tolist())) == [(1, 3), (2, 2), (3, 1)]


def test_the_cache_is_the_first_rows_whatever_happens():
    cell = LEC(5)
    draw = np.random.default_rng(0)
    keys = (60 * draw.power(0.5, 800)).astype(int)
    step = jax.jit(cell.step)
    state, slots = cell.init(), {}
    for key, cost in zip(keys.tolist(), draw.exponential(size=800)):
        state, seen = step(state, requests(key, cost))
        assert bool(seen.hit) == (key in slots.values())
        if seen.admitted:
            assert seen.evicted == slots.get(int(seen.slot), 0)
            slots[int(seen.slot)] = key
        live = np.asarray(state.n) > 0
        assert {s: k for s, k in enumerate(state.key[:5].tolist()) if live[s]} == slots
        tracked = np.asarray(state.key)[live].tolist()
        assert len(tracked) == len(set(tracked))


def test_counts_are_halved_before_float32_stops_counting():
    cell = LEC(1, rows=4)
    state, _ = cell.advance(cell.init(), requests([1, 2]))
    state = state._replace(n=state.n.at[0].set(2**23 - 1).at[1].set(100))
    state, _ = cell.step(state, requests(1))
    assert state.n[:2].tolist() == [2**22, 50]


def test_decay_lets_a_new_favourite_in():
    keys, cost = [1] * 200 + [2] * 60, 1.0
    hits = {decay: LEC(1, decay=decay).offline(requests(keys, cost)).hit[200:].sum() for decay in (1.0, 0.95)}
    assert hits[1.0] == 0 and hits[0.95] > 30


def feedback(small, large, success):
    return Feedback(0.0, jnp.array([small, large], jnp.float32), info=jnp.array(success))


def test_multiplexer_charges_failures_and_never_takes_unknown_for_free():
    router = Multiplexer(rows=4, penalty=2.0)
    key, state = jnp.uint32(5), router.init()
    state, decision = router.act(state, key)
    assert int(decision.action) == SMALL  # nothing is known
    state = router.learn(state, key, decision, feedback(10, np.nan, True))
    state, decision = router.act(state, key)
    assert int(decision.action) == SMALL  # the large model was never seen: its mean of 0 is no estimate
    state = router.learn(state, key, decision, feedback(10, 4, False))  # 10 + 2 x 4; the large one cost 4
    row = state.key.tolist().index(5)
    np.testing.assert_allclose(state.c[row], [14, 4])
    assert state.nc[row].tolist() == [2, 1]
    state, decision = router.act(state, key)
    assert int(decision.action) == LARGE
    state = router.learn(state, key, decision, feedback(np.nan, 6, True))
    np.testing.assert_allclose(state.c[row], [14, 5])
    assert state.nc[row].tolist() == [2, 2]


def test_multiplexer_drops_outcomes_of_queries_it_no_longer_tracks():
    router = Multiplexer(rows=1)
    state, decision = router.act(router.init(), jnp.uint32(1))
    state, _ = router.act(state, jnp.uint32(2))
    after = router.learn(state, jnp.uint32(1), decision, feedback(3, 3, False))
    jax.tree.map(np.testing.assert_array_equal, after, state)


def test_expected_cost_falls_back_on_the_model_that_was_seen():
    c, nc = jnp.array([[0, 7], [3, 0], [9, 7], [5, 7.0]]), jnp.array([[0, 1], [1, 0], [1, 1], [1, 1]])
    assert Multiplexer().best(c, nc).tolist() == [0, 0, 1, 0]
    assert Multiplexer().expected(c, nc).tolist() == [7, 3, 7, 5]
    assert Always().expected(c, nc).tolist() == [7, 3, 7, 7]
    assert Always(model=SMALL).expected(c, nc).tolist() == [7, 3, 9, 5]


def test_exploration_draws_the_announced_share():
    router = Multiplexer(rows=2, explore=0.4)
    act = jax.jit(router.act)
    state, actions = router.init(key=jax.random.PRNGKey(3)), []
    for _ in range(500):
        state, decision = act(state, jnp.uint32(1))
        actions.append(int(decision.action))
        assert float(decision.logp) == pytest.approx(np.log(0.2 if actions[-1] else 0.8), rel=1e-5)
    assert 0.15 < np.mean(actions) < 0.25


class Oracle(Learner):
    """Whose score is the feature itself; it counts what it is told."""

    def init(self, *, key=None):
        return jnp.int32(0)

    def predict(self, state, x):
        return x

    def learn(self, state, x, target, weight=1.0):
        return state + 1


def test_selector_asks_the_small_model_from_where_it_breaks_even():
    """1 + (1 - p) 2 · 10 exceeds 10 where p < 0.55; a threshold that is said stands for itself."""
    router = Selector(Oracle())
    state, decision = router.act(router.init(), jnp.float32(0.1))
    assert int(decision.action) == SMALL  # nothing is known of the large model
    state = router.learn(state, jnp.float32(0.1), decision, feedback(1, 10, False))
    assert [int(router.act(state, jnp.float32(p))[1].action) for p in (0.54, 0.56)] == [LARGE, SMALL]
    strict = Selector(Oracle(), threshold=0.8)
    assert [int(strict.act(state, jnp.float32(p))[1].action) for p in (0.79, 0.81)] == [LARGE, SMALL]
    _, large = router.act(state, jnp.float32(0.1))
    after = router.learn(state, jnp.float32(0.1), large, feedback(np.nan, 20, False))
    assert int(after.scorer) == 1  # the small model said nothing that could be judged
    np.testing.assert_allclose(after.c, [1, 15])
    assert after.nc.tolist() == [1, 2]


def test_selector_judges_queries_that_never_came_before():
    draw = np.random.default_rng(0)
    x = jnp.asarray(draw.normal(size=(3000, 3)), jnp.float32)
    success = jnp.asarray(draw.uniform(size=3000) < 1 / (1 + np.exp(-6 * np.asarray(x[:, 0]))))
    costs = jnp.array([1.0, 10.0])

    def run(router):
        def step(state, event):
            state, decision = router.act(state, event[0])
            state = router.learn(state, event[0], decision, Feedback(0.0, costs, info=event[1]))
            return state, jnp.where(decision.action == SMALL, 1 + jnp.where(event[1], 0, 20), 10)

        return float(jax.jit(lambda xs: jax.lax.scan(step, router.init(), xs)[1])((x, success))[1000:].mean())

    scored = {e: run(Selector(LogisticRegression(3, optax.sgd(0.1)), explore=e)) for e in (0.0, 0.02)}
    assert max(scored.values()) < 0.75 * min(10.0, float((1 + 20 * ~success).mean()))


def test_similar_queries_share_a_key_and_so_an_answer():
    draw = np.random.default_rng(0)
    meant = draw.integers(0, 12, 600)
    words = draw.normal(size=(12, 32))[meant] + 0.15 * draw.normal(size=(600, 32))
    names = Similar(32, rows=12)
    keys = np.asarray(jax.jit(lambda xs: names.advance(names.init(), xs)[1])(jnp.asarray(words, jnp.float32)))
    order = list(dict.fromkeys(meant.tolist()))
    np.testing.assert_array_equal(keys, [1 + order.index(m) for m in meant.tolist()])
    hits = [np.asarray(LRU(5).offline(requests(k)).hit) for k in (keys, meant)]
    np.testing.assert_array_equal(*hits)


def test_a_query_that_was_not_meant_for_the_longest_is_forgotten():
    names = Similar(2, rows=2, threshold=1.0)
    a, b, c, zero = jnp.array([1.0, 0]), jnp.array([0, 2.0]), jnp.array([1.0, 1.0]), jnp.zeros(2)
    _, keys = names.advance(names.init(), jnp.stack([a, b, 3 * a, c, a, b, zero, zero]))
    assert keys.tolist() == [1, 2, 1, 3, 1, 4, 5, 6]  # c takes the place of b, then b that of c


def test_bad_input_is_named():
    for make, message in (
        (lambda: Selector(Oracle(), penalty=-1.0), r"penalty.*-1"),
        (lambda: Selector(Oracle(), threshold=2.0), r"threshold.*2"),
        (lambda: Selector(Oracle(), explore=-0.1), r"explore.*-0\.1"),
        (lambda: Similar(0, rows=1), r"dim.*0"),
        (lambda: Similar(2, rows=0), r"rows.*0"),
        (lambda: Similar(2, rows=1, threshold=0.0), r"threshold.*0"),
        (lambda: LEC(0), r"capacity.*0"),
        (lambda: LEC(4, rows=4), r"rows.*4"),
        (lambda: LEC(4, decay=0.0), r"decay.*0"),
        (lambda: Multiplexer(rows=0), r"rows.*0"),
        (lambda: Multiplexer(penalty=-1.0), r"penalty.*-1"),
        (lambda: Multiplexer(explore=1.5), r"explore.*1\.5"),
        (lambda: Always(model=2), r"model.*2"),
        (lambda: optimum(np.ones(3), np.ones((2, 2)), 1), r"\(3,\).*\(2, 2\)"),
        (lambda: optimum(np.ones(3), np.ones((3, 2)), -1), r"capacity.*-1"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


@pytest.mark.parametrize("name", ["joint", "multiplexer", "selector", "similar"])
def test_contract(name):
    from anabranch.contract import check

    q, cost, success, _ = synthetic("normal", rounds=40)
    if name == "joint":
        cell, xs = CachedMultiplexer(LEC(4, decay=0.99), Multiplexer(explore=0.1)), queries(q, cost, success)
    elif name == "similar":
        cell, xs = Similar(2, rows=8), jnp.asarray(cost, jnp.float32)
    else:
        cell = Multiplexer(rows=8) if name == "multiplexer" else Selector(LogisticRegression(2, optax.sgd(0.1)))
        key = requests(q).key if name == "multiplexer" else jnp.asarray(cost, jnp.float32) / 100
        _, decision = jax.vmap(lambda k: cell.act(cell.init(), k))(key)
        outcome = Feedback(jnp.zeros(40), jnp.asarray(cost, jnp.float32), info=jnp.asarray(success),
                           terminal=jnp.zeros(40, bool), truncated=jnp.zeros(40, bool))  # fmt: skip
        decision = decision._replace(logp=jnp.zeros(40))
        xs = key, Maybe((key, decision, outcome), jnp.arange(40) % 3 > 0)
    report = check(cell, xs)
    assert report.ok, str(report)
