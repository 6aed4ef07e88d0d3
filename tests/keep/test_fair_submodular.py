"""Two passes against brute force: quotas, independence, the guarantee, and whether a fair set exists at all."""

import numpy as np
import pytest
from scipy.optimize import linprog

from anabranch.contract import check
from anabranch.keep.fair_submodular import COLOUR, PART, FairTwoPass, advance, coloured, example, feasible_set
from anabranch.keep.select import Coverage, Laminar

N, M = 12, 20


def instance(seed):
    draw = np.random.default_rng(seed)
    x = draw.random((N, M)) < 0.2
    parts, colours = draw.integers(0, 3, N), draw.integers(0, 2, N)
    return x, parts, colours


def sets(parts, colours, caps, lo, hi):
    """All fair sets, as rows of bool[N]."""
    every = (np.arange(2**N)[:, None] >> np.arange(N)) & 1
    part = np.stack([every[:, parts == g].sum(1) for g in range(len(caps))], 1)
    colour = np.stack([every[:, colours == c].sum(1) for c in range(len(lo))], 1)
    return every[(part <= caps).all(1) & (colour >= lo).all(1) & (colour <= hi).all(1)].astype(bool)


def test_quotas_independence_and_the_guarantee():
    caps, lo, hi = [1, 2, 1], (2, 2), (3, 2)
    solved = 0
    for seed in range(25):
        x, parts, colours = instance(seed)
        stream = coloured(range(N), x, parts, colours)
        method = FairTwoPass(Coverage(M), Laminar(caps), lo, hi)
        fair = sets(parts, colours, caps, lo, hi)
        if not len(fair):
            with pytest.raises(ValueError, match=r"no set has lo|none has come"):
                method(stream, stream)
            continue
        solved += 1
        chosen = method(stream, stream)
        ids = np.array(chosen.ids)
        assert len(set(chosen.ids)) == len(ids)
        assert (np.bincount(parts[ids], minlength=3) <= caps).all()
        count = np.bincount(colours[ids], minlength=2)
        assert (count >= np.array(lo) // 2).all() and (count <= hi).all()
        best = max(x[row].any(0).sum() for row in fair)
        assert x[ids].any(0).sum() == chosen.value >= best / 11.656
        assert chosen.pool <= 4 * 2
    assert 5 <= solved <= 24


def test_the_feasible_set_is_as_large_as_a_flow():
    for seed in range(60):
        draw = np.random.default_rng(seed)
        n = int(draw.integers(1, 14))
        chain = np.array([[0, 3], [1, 3], [2, -1]])[draw.integers(0, 3, n)]
        caps, colours, lo = draw.integers(0, 4, 4), draw.integers(0, 3, n), draw.integers(0, 4, 3)
        rows = feasible_set(chain, caps.tolist(), colours, lo.tolist())
        a = np.concatenate([[(chain == g).any(1) for g in range(4)], [colours == c for c in range(3)]])
        assert (a[:, rows].sum(1) <= [*caps, *lo]).all()
        largest = -linprog(-np.ones(n), a, [*caps, *lo], bounds=(0, 1)).fun  # two laminar families: integral
        assert len(rows) == round(largest)


def test_the_first_pass_keeps_of_each_colour_a_maximal_independent_set():
    cell, stream = example()
    pool, kept = advance(cell, stream)
    parts, colours = (np.asarray(stream.groups[i])[:, 0] for i in (PART, COLOUR))
    for c in range(3):
        rows = [i for i in np.asarray(pool.kept.id[c]).tolist() if i >= 0]
        assert rows == [i for i in range(40) if kept[i] and colours[i] == c] and int(pool.n[c]) == len(rows)
        wanted = []
        for i in np.flatnonzero(colours == c):
            if (parts[wanted] == parts[i]).sum() < [3, 4][parts[i]]:
                wanted.append(int(i))
        assert rows == wanted
    assert pool.seen.tolist() == np.bincount(colours).tolist()


def test_keeping_as_many_as_the_quota_would_not_do():
    """Of colour 0 the first two are of part 0, which colour 1 needs: only the third one can stay."""
    parts, colours = [0, 0, 1, 0, 0], [0, 0, 0, 1, 1]
    stream = coloured(range(5), np.eye(5, dtype=bool), parts, colours)
    method = FairTwoPass(Coverage(5), Laminar([2, 1]), (1, 2), (1, 2))
    half = np.asarray(method.second(advance(method.first(), stream)[0]).half.id)
    assert sorted(half[half >= 0].tolist()) == [2, 3, 4]


def test_a_half_is_free_as_to_the_matroid_and_is_added_in_the_end():
    x, parts, colours = instance(3)
    stream = coloured(range(N), x, parts, colours)
    method = FairTwoPass(Coverage(M), Laminar([2, 2, 1]), (2, 2), (3, 2))
    pool, _ = advance(method.first(), stream)
    cell = method.second(pool)
    halves = [set(row[row >= 0].tolist()) for row in np.asarray(cell.half.id)]
    assert not halves[0] & halves[1] and sum(map(len, halves)) == 4
    for half in halves:
        assert np.bincount(colours[list(half)], minlength=2).tolist() == [1, 1]
    left = np.asarray(cell.swap.matroids[PART].caps)
    for caps, half in zip(left, halves):
        assert caps.tolist() == ([2, 2, 1] - np.bincount(parts[list(half)], minlength=3)).tolist()
    # Nothing comes in the second pass: what is left is the half.
    ids, value = method.best(cell, cell.init())
    assert set(ids) in halves and value == max(x[list(half)].any(0).sum() for half in halves)


def test_another_day_may_be_the_second_pass():
    x, parts, colours = instance(3)
    method = FairTwoPass(Coverage(M), Laminar([2, 2, 1]), (2, 2), (3, 2))
    yesterday = coloured(range(N), x, parts, colours)
    today = coloured(range(100, 100 + N), x[::-1], parts[::-1], colours[::-1])
    chosen = method(yesterday, today)
    assert any(i >= 100 for i in chosen.ids) and any(i < 100 for i in chosen.ids)


@pytest.mark.parametrize("which", ["first", "second"])
def test_contract(which):
    cell, stream = example()
    if which == "second":
        pool, _ = advance(cell, stream)
        cell = FairTwoPass(cell.objective, cell.matroid, (1, 2, 1), (2, 3, 2)).second(pool)
    report = check(cell, stream)
    assert report.ok, str(report)


def test_bad_input_is_named():
    matroid, objective = Laminar([2, 2]), Coverage(3)
    stream = coloured([0, 1], np.ones((2, 3), bool), [0, 1], [0, 0])
    for make, message in (
        (lambda: FairTwoPass(objective, matroid, (2,), (1,)), "colour 0.*lo=2 and hi=1"),
        (lambda: FairTwoPass(objective, matroid, (1,), (1, 1)), "got 1 and 2"),
        (lambda: FairTwoPass(objective, matroid, (5,), (5,)), "5 elements are wanted, no more than 4"),
        (lambda: FairTwoPass(objective, matroid, (1, 1), (1, 1))(stream, stream), "colour 1.*none has come"),
        (lambda: FairTwoPass(objective, matroid, (3,), (3,))(stream, stream), "at most 2 of 3"),
        (lambda: FairTwoPass(objective, matroid, (), ())(stream, stream), "colour 0 has no quota"),
        (lambda: coloured([0], np.ones((1, 3)), [0], [-1]), "colours.*-1"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
