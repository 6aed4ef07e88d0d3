"""Two passes keep half of every lower quota and all upper ones, nearly as good as swapping that knows no lower quotas.

A. Films of MovieLens 100k: representative of all (facility location, 0.85) and to one user's taste (0.15), of seven
   genres each with quotas, no more of a time than its share.
B. The social graph of Facebook without the ten hubs: people who together know most others, of five communities.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.cluster.vq import kmeans2
from scipy.sparse import coo_array
from scipy.sparse.linalg import svds

from anabranch import data
from anabranch.claim import Comparison, Size
from anabranch.keep.fair_submodular import COLOUR, PART, FairTwoPass, advance, coloured
from anabranch.keep.select import Coverage, Element, FacilityLocation, Laminar, Modular, Objective, Swap, Weighted

FIRST_SEED = 100  # of the orders; those below were used for trials
GENRES = ("Action", "Comedy", "Drama", "Adventure", "Crime", "Animation or for children")
DECADES = (1950, 1960, 1970, 1980, 1990, 1995)
HUBS = (0, 107, 348, 414, 686, 698, 1684, 1912, 3437, 3980)
"""The people whose circles the graph was collected from: a few of them know everybody."""


class Task(NamedTuple):
    name: str
    objective: Objective
    stream: Element
    caps: np.ndarray
    lo: np.ndarray
    hi: np.ndarray


def films(r: int) -> Task:
    """Films with 20 ratings or more; vectors and tastes from a singular value decomposition of
    rank 20 of what ratings are above the mean of a film."""
    folder = data.root() / "movielens100k"
    user, film, rating, _ = np.loadtxt(folder / "u.data", np.int64, delimiter="\t").T
    rows = [line.split("|") for line in (folder / "u.item").read_text("latin-1").splitlines()]
    year = np.array([int(row[2][-4:] or 0) for row in rows])
    often = np.flatnonzero((np.bincount(film, minlength=len(rows) + 1)[1:] >= 20) & (year > 0))
    # The first of the genres, as they are listed; the rest is one more.
    flags = np.array([row[5:] for row in rows], int)[often].astype(bool)
    listed = [flags[:, 1], flags[:, 5], flags[:, 8], flags[:, 2], flags[:, 6], flags[:, 3] | flags[:, 4]]
    colours = np.select(listed, range(6), 6)
    parts = np.searchsorted(DECADES, year[often], side="right")
    table = coo_array((rating.astype(float), (user, film - 1))).toarray()[:, often]
    mean = table.sum(0) / (table > 0).sum(0)
    u, s, vt = svds(np.where(table > 0, table - mean, 0), 20, random_state=0)
    vectors, tastes = (np.sqrt(s)[:, None] * vt).T, u * np.sqrt(s)
    near = np.maximum(vectors @ vectors.T, 0).astype(np.float32)
    taste = np.maximum(tastes[444] @ vectors.T, 0).astype(np.float32)
    objective = Weighted((FacilityLocation(len(often)), Modular()), (0.85, 0.15))
    share = np.bincount(parts, minlength=7) / len(often)
    caps, lo, hi = np.ceil(1.2 * r * share), np.full(7, int(0.7 * r / 7)), np.full(7, -(-2 * r // 7))
    stream = coloured(range(len(often)), (jnp.asarray(near), jnp.asarray(taste)), parts, colours)
    return Task(f"films, r = {r}", objective, stream, caps.astype(int), lo, hi)


def people(r: int) -> Task:
    """Who covers himself and those he knows; communities by spectral clustering."""
    a, b = np.loadtxt(data.root() / "graphs" / "facebook_combined.txt", np.int64).T
    n = max(a.max(), b.max()) + 1
    stay = np.setdiff1d(np.arange(n), HUBS)
    known = np.zeros((n, n), bool)
    known[a, b] = known[b, a] = True
    known = (known | np.eye(n, dtype=bool))[np.ix_(stay, stay)]
    degree = known.sum(1)
    u, _, _ = svds(known / np.sqrt(np.outer(degree, degree)), 10, random_state=0)
    _, colours = kmeans2(u / np.linalg.norm(u, axis=1, keepdims=True), 5, seed=0, minit="++")
    parts = np.searchsorted(np.quantile(degree, (0.25, 0.5, 0.75)), degree)
    share = lambda of, m: np.bincount(of, minlength=m) / len(stay)
    caps, even = np.ceil(1.2 * r * share(parts, 4)), share(colours, 5)
    lo, hi = np.floor(0.7 * r * even), np.ceil(1.5 * r * even)
    stream = coloured(range(len(stay)), jnp.asarray(known), parts, colours)
    return Task(f"people, r = {r}", Coverage(len(stay)), stream, caps.astype(int), lo.astype(int), hi.astype(int))


def worth(task: Task, ids: list[int]) -> float:
    at = jnp.array(ids, jnp.int32)
    xs = jax.tree.map(lambda leaf: leaf[at], task.stream.x)
    return float(task.objective.value(task.objective.of(xs, jnp.ones(len(ids), bool))))


def counts(task: Task, which: int, ids: list[int], n: int) -> np.ndarray:
    return np.bincount(np.asarray(task.stream.groups[which])[ids, 0], minlength=n)


def error(task: Task, ids: list[int]) -> int:
    """By how many elements quotas are missed."""
    count = counts(task, COLOUR, ids, len(task.lo))
    return int(np.maximum(task.lo - count, 0).sum() + np.maximum(count - task.hi, 0).sum())


def broken(task: Task, ids: list[int]) -> int:
    """By how many elements half of a lower quota, an upper quota or the matroid is missed."""
    count = counts(task, COLOUR, ids, len(task.lo))
    half, part = np.maximum(task.lo // 2 - count, 0), counts(task, PART, ids, len(task.caps)) - task.caps
    return int(half.sum() + np.maximum(count - task.hi, 0).sum() + np.maximum(part, 0).sum())


def greedy(task: Task, begun: list[int]) -> list[int]:
    """The best that fits, again and again, with all elements at hand."""
    objective, x = task.objective, task.stream.x
    gains = jax.jit(lambda o: jax.vmap(lambda x: objective.gain(o, x))(x))
    add = jax.jit(lambda o, i: objective.add(o, jax.tree.map(lambda leaf: leaf[i], x)))
    part, colour = (np.asarray(task.stream.groups[i])[:, 0] for i in (PART, COLOUR))
    ids, o = list(begun), objective.empty()
    for i in begun:
        o = add(o, i)
    while True:
        fits = counts(task, PART, ids, len(task.caps))[part] < task.caps[part]
        fits &= counts(task, COLOUR, ids, len(task.hi))[colour] < task.hi[colour]
        fits[ids] = False
        if not fits.any():
            return ids
        ids.append(int(np.where(fits, np.asarray(gains(o)), -1).argmax()))
        o = add(o, ids[-1])


def trials(task: Task, seeds: range) -> Iterator[dict[str, list[int] | int]]:
    """What each method chooses of the stream in some orders."""
    method = FairTwoPass(
        task.objective, Laminar(task.caps), tuple(task.lo.tolist()), tuple(task.hi.tolist()), k=int(task.caps.sum())
    )
    swap = Swap(task.objective, (Laminar(task.caps), Laminar(task.hi)), method.rank)
    ids = lambda kept: [i for i in np.asarray(kept.id).ravel().tolist() if i >= 0]
    for seed in seeds:
        order = jnp.asarray(np.random.default_rng(FIRST_SEED + seed).permutation(len(task.stream.id)))
        stream = jax.tree.map(lambda leaf, order=order: leaf[order], task.stream)
        pool, _ = advance(method.first(), stream)
        cell = method.second(pool)
        ours, _ = method.best(cell, advance(cell, stream)[0])
        feasible = ids(cell.half)
        yield {
            "two-pass": ours, "caps only": ids(advance(swap, stream)[0].kept), "feasible": feasible,
            "filled": greedy(task, feasible), "stored": int(pool.n.sum()), "allowed": method.rank * len(task.lo),
        }  # fmt: skip


def compared(task: Task, seeds: range) -> tuple[list[Comparison], list[tuple[int, int]]]:
    """What a task shows; and in each order the elements by which quotas are missed, by both methods."""
    rows = list(trials(task, seeds))
    value = {name: [worth(task, row[name]) for row in rows] for name in ("two-pass", "caps only", "feasible", "filled")}
    wrong = {name: [error(task, row[name]) for row in rows] for name in value}
    best = greedy(task, [])
    note = ", ".join(f"{name} {np.mean(value[name]):.0f} (err {np.mean(wrong[name]):.1f})" for name in value)
    note += f"; greedy with all at hand and caps only {worth(task, best):.0f} (err {error(task, best)}); lo {task.lo}, "
    note += f"hi {task.hi}; at most {max(row['stored'] for row in rows)} of {rows[0]['allowed']} elements stored"
    out = [
        Comparison(
            f"{task.name}: elements by which half of a lower quota, an upper one or the matroid is missed",
            [broken(task, row["two-pass"]) for row in rows], [0] * len(rows), 0, better="lower",
            paper="⌊ℓ/2⌋ and u always", note=note,
        ),
        Comparison(
            f"{task.name}: value against swapping that knows upper quotas only",
            value["two-pass"], value["caps only"], 0.93, "ratio",
        ),
        Comparison(
            f"{task.name}: value against the feasible set alone", value["two-pass"], value["feasible"], 1.3, "ratio"
        ),
    ]  # fmt: skip
    return out, list(zip(wrong["two-pass"], wrong["caps only"]))


def experiment(size: Size) -> list[Comparison]:
    out = []
    for make, ranks in ((films, (30, 60, 100)), (people, (30, 60))):
        missed = []
        for r in ranks[:1] if size.smoke else ranks:
            more, pairs = compared(make(r), size.seeds(5))
            out, missed = out + more, missed + pairs
        hard = [(ours, 0.7 * caps_only) for ours, caps_only in missed if caps_only >= 3]
        if hard:
            metric = f"{make.__name__}: elements by which quotas are missed, and 0.7 times those of upper quotas only"
            note = f"the {len(hard)} of {len(missed)} runs in which the latter misses 3 or more; from rank to rank the "
            note += "numbers differ more than the methods do, and at r = 30 half of a quota of 3 is 1"
            out.append(Comparison(metric, *zip(*hard), 0, better="lower", note=note))
    return out
