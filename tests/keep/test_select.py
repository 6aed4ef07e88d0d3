"""Objectives are submodular, matroids are matroids, and both streaming choices equal plain Python versions of them."""

import itertools
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anabranch.contract import check
from anabranch.keep.select import Coverage, FacilityLocation, Laminar, Modular, Sieve, Swap, Weighted, elements

N, M = 30, 12
MIXED = Weighted((FacilityLocation(M), Modular()), (0.85, 0.15))


def data(seed=0):
    draw = np.random.default_rng(seed)
    covers = draw.random((N, M)) < 0.25
    near = draw.random((N, M)).astype(np.float32).round(2)
    steep = np.exp(draw.normal(0, 2, N)).astype(np.float32).round(2)  # some are worth swapping for
    mixed = near * steep[:, None], steep
    return {"coverage": (Coverage(M), covers), "facilities": (FacilityLocation(M), near), "mixed": (MIXED, mixed)}


def worth(name, x, ids):
    """What a set is worth, from nothing."""
    rows = jax.tree.map(lambda leaf: leaf[list(ids)], x)
    if not len(ids):
        return 0.0
    if name == "coverage":
        return float(rows.any(0).sum())
    if name == "facilities":
        return float(rows.max(0).sum())
    return 0.85 * float(rows[0].max(0).sum()) + 0.15 * float(rows[1].sum())


@pytest.mark.parametrize("name", ["coverage", "facilities", "mixed"])
def test_gains_are_differences_of_worth_and_never_grow(name):
    objective, x = data()[name]
    row = lambda i: jax.tree.map(lambda leaf: jnp.asarray(leaf)[i], x)
    o, gains = objective.empty(), []
    for i in range(8):
        assert float(objective.value(o)) == pytest.approx(worth(name, x, range(i)), rel=1e-5, abs=1e-6)
        gains.append(float(objective.gain(o, row(20))))
        assert gains[-1] == pytest.approx(worth(name, x, [*range(i), 20]) - worth(name, x, range(i)), abs=1e-4)
        o = objective.add(o, row(i))
    assert all(a >= b - 1e-6 for a, b in itertools.pairwise(gains)) and gains[0] > gains[-1]
    live = jnp.arange(N) < 8
    np.testing.assert_allclose(objective.value(objective.of(jax.tree.map(jnp.asarray, x), live)), objective.value(o))


def test_a_laminar_matroid_lets_in_what_is_independent():
    caps, chain = [2, 1, 3], np.array([[0, 2], [0, 2], [0, 2], [1, 2], [1, 2], [2, -1], [-1, -1]])
    matroid, groups = Laminar(caps, depth=2), jnp.array(chain)

    def independent(ids):
        return all(sum(g in chain[i] for i in ids) <= cap for g, cap in enumerate(caps))

    ask = eqx.filter_jit(matroid.could_leave)
    for n in range(5):
        for ids in itertools.combinations(range(7), n):
            if not independent(ids):
                continue
            live = jnp.isin(jnp.arange(7), jnp.array(ids, int))
            for new in set(range(7)) - set(ids):
                must, could = ask(groups, live, groups[new])
                assert bool(must) == (not independent([*ids, new]))
                if must:  # exactly those by whose leaving the new one fits
                    fits = [i for i in ids if independent([*(set(ids) - {i}), new])]
                    assert np.flatnonzero(could).tolist() == fits
    left = matroid.conditioned(groups, jnp.arange(7) == 3)
    assert left.caps.tolist() == [2, 0, 2]


def swapped(name, x, parts, colours, caps, hi):
    """Chakrabarti and Kale over two partition matroids, with sets and dictionaries."""
    kept, weight, said = [], {}, []
    for e in range(N):
        gain, leave, possible = worth(name, x, [*kept, e]) - worth(name, x, kept), set(), True
        for group, cap in ((parts, caps), (colours, hi)):
            rivals = [i for i in kept if group[i] == group[e]]
            if len(rivals) >= cap[group[e]]:
                possible &= bool(rivals)
                leave |= {min(rivals, key=lambda i: weight[i])} if rivals else set()
        said.append(possible and gain >= 2 * sum(weight[i] for i in leave) - 1e-6)
        if said[-1]:
            kept, weight[e] = [i for i in kept if i not in leave] + [e], gain
    return said, kept


@pytest.mark.parametrize("name", ["coverage", "mixed"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_swapping_is_that_of_the_paper(name, seed):
    objective, x = data(seed)[name]
    draw = np.random.default_rng(100 + seed)
    parts, colours, caps, hi = draw.integers(0, 3, N), draw.integers(0, 3, N), [1, 2, 2], [2, 1, 0]
    cell = Swap(objective, (Laminar(caps), Laminar(hi)), k=4)
    stream = elements(np.arange(N), x, (parts, colours))
    state, accepted = eqx.filter_jit(lambda cell, stream: cell.advance(cell.init(), stream))(cell, stream)
    said, kept = swapped(name, x, parts, colours, caps, hi)
    assert accepted.tolist() == said and sorted(np.asarray(state.kept.id)[np.asarray(state.live)]) == sorted(kept)
    assert sum(said) > len(kept)  # something was swapped
    assert float(objective.value(state.o)) == pytest.approx(worth(name, x, kept), rel=1e-5)


def test_one_that_leaves_for_two_matroids_counts_once():
    x = jnp.array([1.0, 2.0, 1.9])
    for e, accepted in ((1, True), (2, False)):
        stream = elements([0, e], x[jnp.array([0, e])], ([0, 0], [0, 0]))
        cell = Swap(Modular(), (Laminar([1]), Laminar([1])), k=1)
        assert cell.advance(cell.init(), stream)[1].tolist() == [True, accepted]


def test_who_is_in_already_and_no_element_change_nothing():
    stream = elements([3, 3], np.ones((2, M), bool), ([0, 0],))
    cell = Swap(Coverage(M), (Laminar([2]),), k=2)
    accepted = cell.advance(cell.init(), stream)[1]
    assert accepted.tolist() == [True, False]
    none = jax.tree.map(lambda leaf: leaf[0], stream)._replace(id=jnp.int32(-1))
    assert not cell.step(cell.init(), none)[1]


@pytest.mark.parametrize("name", ["coverage", "facilities"])
def test_the_sieve_is_near_the_best_set(name):
    for seed in range(3):
        objective, x = data(seed)[name]
        cell = Sieve(objective, k=3, epsilon=0.1)
        run = eqx.filter_jit(lambda cell, stream: cell.advance(cell.init(), stream)[0])
        kept, value = cell.solution(run(cell, elements(np.arange(N), x)))
        ids = np.asarray(kept.id)[np.asarray(kept.id) >= 0]
        best = max(worth(name, x, ids) for ids in itertools.combinations(range(N), 3))
        assert len(set(ids)) == len(ids) <= 3
        assert float(value) == pytest.approx(worth(name, x, ids), rel=1e-5)
        assert (0.5 - 0.1) * best <= float(value) <= best + 1e-4


def test_every_guess_of_the_sieve_has_a_lane():
    cell = Sieve(Modular(), k=4, epsilon=0.3)
    step, state = jax.jit(cell.step), cell.init()
    for i, weight in enumerate((0.01, 3.0, 2.0, 50.0)):
        state, _ = step(state, jax.tree.map(lambda leaf: leaf[0], elements([i], jnp.array([weight]))))
        m = max((0.01, 3.0, 2.0, 50.0)[: i + 1])
        wanted = range(math.ceil(math.log(m) / math.log(1.3)), math.floor(math.log(8 * m) / math.log(1.3)) + 1)
        assert set(wanted) <= set(state.level.tolist()) and len(set(state.level.tolist())) == cell.lanes


@pytest.mark.parametrize("cell", [Swap(MIXED, (Laminar([2, 1]),), k=3), Sieve(MIXED, k=2, epsilon=0.5)])
def test_contract(cell):
    parts = (np.arange(N) % 2,) if isinstance(cell, Swap) else ()
    report = check(cell, elements(np.arange(N), data()["mixed"][1], parts))
    assert report.ok, str(report)


def test_bad_input_is_named():
    for make, message in (
        (lambda: elements([-3], np.ones(1)), r"ids.*-3"),
        (lambda: elements([1, 2], np.ones(3)), r"\[2, 3\]"),
        (lambda: Laminar([1, -2]), r"caps.*-2"),
        (lambda: Swap(Modular(), (), k=0), "k must be at least 1, got 0"),
        (lambda: Sieve(Modular(), k=0), "k must be at least 1, got 0"),
        (lambda: Sieve(Modular(), k=1, epsilon=1.0), "epsilon.*1"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
