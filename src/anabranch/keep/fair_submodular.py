"""Fairness in Streaming Submodular Maximization over a Matroid Constraint.
El Halabi, Fusco, Norouzi-Fard, Tardos and Tarnawski, arXiv 2305.15118, ICML 2023.

Of a stream of elements, each with a colour, a set is to be chosen that is worth much, is independent in a matroid, and
has of each colour c at least lo[c] and at most hi[c]. One pass with little memory cannot do that, two can: the first
(`FairReservoir`) keeps of each colour as many as are independent, which is enough to find a set with all lower quotas
(`feasible_set`). It is split into two halves, and the second pass (`FairSwap`) looks for a good set around each: by
swapping, within what the half leaves of the matroid, and with no more of a colour than allowed. Then the half is added
as far as that goes, and the better of the two sets is taken. It has at least ⌊lo[c] / 2⌋ of each colour, never more
than hi[c], and is worth at least 1 / 11.656 of the best fair one.

    >>> from anabranch.keep.select import FacilityLocation
    >>> x = jnp.array([[3, 0, 0], [0, 3, 0], [0, 2, 0], [0, 0, 1], [0, 0, 2], [1, 1, 1.0]])
    >>> stream = coloured(range(6), x, parts=[0, 0, 1, 1, 1, 0], colours=[0, 0, 0, 1, 1, 1])
    >>> method = FairTwoPass(FacilityLocation(3), Laminar([2, 2]), lo=(1, 2), hi=(2, 2))
    >>> chosen = method(stream, stream)
    >>> sorted(chosen.ids), float(chosen.value)
    ([0, 1, 3, 4], 8.0)

The stream is one of elements, seen twice; the states are bounded: k · C elements, then two sets of k, for rank k and C
colours. Yesterday's stream may be the first pass and today's the second: a half is held by the elements themselves.

The first pass finds its sets greedily, as in the paper; the code of a later paper by some of the authors
(dj3500/fair-matroid-submodular-neurips2025), which has this method, searches all elements for the feasible set instead.
As there, elements of a half that come again in the second pass are free as to the matroid, not as to colours. There,
the weight of an element that leaves for both constraints counts twice; here, as in the analysis, once. The halves are
added by their gain, the largest first, there by swapping. Exact methods for modular objectives are not here.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int, PRNGKeyArray, PyTree

from anabranch.cell import Cell
from anabranch.keep.select import Chosen, Coverage, Element, Laminar, Objective, Swap, elements, places

PART, COLOUR = 0, 1
"""Which of an element's `groups` are those of the matroid, and which one is its colour."""


def coloured(ids: Any, x: PyTree, parts: Any, colours: Any) -> Element:
    """T elements, stacked, from T ids, what the objective takes, groups in the matroid, and colours.

    Raises:
        ValueError: if a colour is negative, or lengths differ.
    """
    colours = np.asarray(colours)
    if colours.size and colours.min() < 0:
        raise ValueError(f"colours must not be negative, got {colours.min()}")
    return elements(list(ids), x, (parts, colours))


class Pool(NamedTuple):
    """Of each of C colours up to k elements, independent in the matroid."""

    kept: Element
    """Each leaf with leading axes (C, k)."""
    n: Int[Array, " C"]
    seen: Int[Array, " C"]
    """Elements of each colour that have come."""


class FairReservoir(Cell):
    """The first pass: of each colour the elements that are independent together with those it kept before.

    State: `Pool`. The output tells who is kept.

    Raises:
        ValueError: if `colours` or `k` is not positive.
    """

    smooth: ClassVar[bool] = False

    objective: Objective
    """Of which only the shape of elements is used."""
    matroid: Laminar
    colours: int = eqx.field(static=True)
    k: int = eqx.field(static=True)
    """The largest number of elements that are independent."""

    def __check_init__(self):
        for name in ("colours", "k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def init(self, *, key: PRNGKeyArray | None = None) -> Pool:
        both = self.matroid, Laminar([0])
        zero = jnp.zeros(self.colours, jnp.int32)
        return Pool(places(self.objective, both, self.colours, self.k), zero, zero)

    def step(self, state: Pool, x: Element) -> tuple[Pool, Bool[Array, ""]]:
        colour = x.groups[COLOUR][0]
        there = x.id >= 0
        groups, ids = state.kept.groups[PART][colour], state.kept.id[colour]
        fits = ~self.matroid.full(groups, ids >= 0, x.groups[PART]).any()
        slot = state.n[colour]
        kept = there & fits & (slot < self.k) & ~(ids == x.id).any()
        at = jnp.where(kept, slot, self.k)  # k: out of bounds, nothing is written
        put = jax.tree.map(lambda leaf, one: leaf.at[colour, at].set(one), state.kept, x)
        return Pool(put, state.n.at[colour].add(kept), state.seen.at[colour].add(there)), kept


def feasible_set(
    parts: Int[np.ndarray, "n D"], caps: Sequence[int], colours: Int[np.ndarray, " n"], lo: Sequence[int]
) -> list[int]:
    """As many of n elements as are independent in the matroid, and of each colour c no more than lo[c]: their rows.

    The largest set that is independent in two matroids, by augmenting paths (Lawler, 1975). On the host. Within the
    quotas are all exactly if one has the size sum(lo).
    """
    most, wanted = np.asarray(caps), np.asarray(lo)
    members: list[int] = []
    while True:
        inside = np.array(members, np.int64)
        outside = np.setdiff1d(np.arange(len(colours)), inside)
        held = np.array([(parts[inside] == g).any(-1).sum() for g in range(len(caps))])
        full = (parts >= 0) & (held[parts] >= most[parts])
        tight = parts[np.arange(len(parts)), full.argmax(-1)]  # the smallest full group
        free_part = np.logical_not(full.any(-1))
        free_colour = np.bincount(colours[inside], minlength=len(lo))[colours] < wanted[colours]
        before: dict[int, int] = {int(y): -1 for y in outside[free_part[outside]]}
        queue, end = deque(before), -1
        while queue and end < 0:
            y = queue.popleft()
            if free_colour[y]:
                end = y
                break
            for x in inside[colours[inside] == colours[y]].tolist():  # y could come for x, as to colours
                if x in before:
                    continue
                before[x] = y
                for z in outside.tolist():  # and z for x, as to the matroid
                    if z not in before and (free_part[z] or (parts[x] == tight[z]).any()):
                        before[z] = x
                        queue.append(z)
        if end < 0:
            return sorted(members)
        while end >= 0:  # along the path: who is out comes in, and the other way round
            members = [m for m in members if m != end] if end in members else [*members, end]
            end = before[end]


class FairSwap(Cell):
    """The second pass: a set around each of two halves, by swapping; the output tells which of the two let it in.

    State: `Chosen`, with a leading axis of 2.
    """

    smooth: ClassVar[bool] = False

    swap: Swap
    """Whose matroids are what is left by each half (caps i32[2, G]), and the upper quotas."""
    half: Element
    """Each leaf with leading axes (2, k); the id of an empty place is -1."""

    @property
    def _axes(self) -> Swap:
        """The matroid differs from half to half."""
        axes = jax.tree.map(lambda leaf: None, self.swap)
        return eqx.tree_at(lambda s: s.matroids[PART].caps, axes, 0, is_leaf=lambda leaf: leaf is None)

    def init(self, *, key: PRNGKeyArray | None = None) -> Chosen:
        return jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), self.swap.init())

    def step(self, state: Chosen, x: Element) -> tuple[Chosen, Bool[Array, " 2"]]:
        def lane(swap, state, half):
            of_half = (half.id == x.id).any()  # it is in the set already, as to the matroid
            parts = jnp.where(of_half, -1, x.groups[PART])
            return swap.step(state, x._replace(groups=(parts, x.groups[COLOUR])))

        return jax.vmap(lane, in_axes=(self._axes, 0, 0))(self.swap, state, self.half)

    def completed(self, state: Chosen) -> tuple[Element, PyTree]:
        """Each set with what it can take of its half, the largest gain first: leaves (2, 2k, …), and summaries."""
        objective, quotas, k = self.swap.objective, self.swap.matroids[COLOUR], self.swap.k

        def lane(chosen: Chosen, half: Element):
            kept = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), chosen.kept, half)
            waits = half.id >= 0
            waits &= ~((half.id[:, None] == chosen.kept.id) & chosen.live).any(1)
            live = jnp.concatenate([chosen.live, jnp.zeros(k, bool)])

            def one(carry, _):
                live, waits, o = carry
                full = jax.vmap(lambda c: quotas.full(kept.groups[COLOUR], live, c).any())(half.groups[COLOUR])
                gain = jax.vmap(lambda x: objective.gain(o, x))(half.x)
                gain = jnp.where(waits & ~full, gain, -jnp.inf)
                best = jnp.argmax(gain)
                some = gain[best] > -jnp.inf
                added = objective.add(o, jax.tree.map(lambda leaf: leaf[best], half.x))
                o = jax.tree.map(lambda a, b: jnp.where(some, a, b), added, o)
                return (live.at[k + best].set(live[k + best] | some), waits.at[best].set(waits[best] & ~some), o), None

            (live, _, o), _ = lax.scan(one, (live, waits, chosen.o), None, length=k)
            return kept._replace(id=jnp.where(live, kept.id, -1)), o

        return jax.vmap(lane)(state, self.half)


class Fair(NamedTuple):
    """What was chosen."""

    ids: list[int]
    value: float
    pool: int
    """Elements that the first pass kept."""


class FairTwoPass(eqx.Module):
    """Both passes.

    Args:
        lo: of each colour at least so many.
        hi: of each colour at most so many.

    Raises:
        ValueError: if quotas differ in length, one is negative, a lower one is above the upper one, or the lower ones
            together are more than are independent.
    """

    objective: Objective
    matroid: Laminar
    lo: tuple[int, ...] = eqx.field(static=True)
    hi: tuple[int, ...] = eqx.field(static=True)
    k: int | None = eqx.field(static=True, default=None)
    """The largest number of elements that are independent; by default the sum of all caps, which is not less."""

    def __check_init__(self):
        if len(self.lo) != len(self.hi):
            raise ValueError(f"lo and hi must be of one length, got {len(self.lo)} and {len(self.hi)}")
        for colour, (low, high) in enumerate(zip(self.lo, self.hi)):
            if not 0 <= low <= high:
                raise ValueError(f"quotas of colour {colour}: 0 <= lo <= hi is needed, got lo={low} and hi={high}")
        if sum(self.lo) > self.rank:
            raise ValueError(f"lo: {sum(self.lo)} elements are wanted, no more than {self.rank} are independent")

    @property
    def rank(self) -> int:
        return int(self.matroid.caps.sum()) if self.k is None else self.k

    def first(self) -> FairReservoir:
        """The cell of the first pass."""
        return FairReservoir(self.objective, self.matroid, len(self.lo), self.rank)

    def second(self, pool: Pool) -> FairSwap:
        """The cell of the second pass.

        Raises:
            ValueError: if no set has all lower quotas; a colour that never came is named.
        """
        seen = np.asarray(pool.seen)
        for colour, low in enumerate(self.lo):
            if low and not seen[colour]:
                raise ValueError(f"colour {colour}: {low} elements are wanted, none has come")
        flat = jax.tree.map(lambda leaf: np.asarray(leaf).reshape(-1, *leaf.shape[2:]), pool.kept)
        rows = np.flatnonzero(flat.id >= 0)
        parts, colours = flat.groups[PART][rows], flat.groups[COLOUR][rows, 0]
        found = feasible_set(parts, np.asarray(self.matroid.caps).tolist(), colours, self.lo)
        if len(found) < sum(self.lo):
            raise ValueError(f"no set has lo={self.lo}: at most {len(found)} of {sum(self.lo)} can be had together")
        halves: list[list[int]] = [[], []]
        for colour in range(len(self.lo)):
            for i, row in enumerate(r for r in rows[found].tolist() if flat.groups[COLOUR][r, 0] == colour):
                halves[i % 2].append(row)
        empty = places(self.objective, (self.matroid, Laminar([0])), 2, self.rank)
        half = jax.tree.map(lambda leaf: np.array(leaf), empty)
        for i, some in enumerate(halves):
            for into, leaf in zip(jax.tree.leaves(half), jax.tree.leaves(flat)):
                into[i, : len(some)] = leaf[some]
        half = jax.tree.map(jnp.asarray, half)
        left = jax.vmap(lambda g, ids: self.matroid.conditioned(g, ids >= 0).caps)(half.groups[PART], half.id)
        matroid = eqx.tree_at(lambda m: m.caps, self.matroid, left)
        return FairSwap(Swap(self.objective, (matroid, Laminar(self.hi)), self.rank), half)

    def best(self, cell: FairSwap, state: Chosen) -> tuple[list[int], float]:
        """The better of the two sets after the second pass, and what it is worth."""
        kept, o = eqx.filter_jit(FairSwap.completed)(cell, state)
        value = np.asarray(jax.vmap(self.objective.value)(o))
        ids = np.asarray(kept.id)[value.argmax()]
        return ids[ids >= 0].tolist(), float(value.max())

    def __call__(self, first: Element, second: Element) -> Fair:
        """Both passes over stacked elements; they may be the same ones.

        Raises:
            ValueError: if an element's colour has no quota, or as `second` does.
        """
        for stream in (first, second):
            top = int(np.asarray(stream.groups[COLOUR]).max(initial=0))
            if top >= len(self.lo):
                raise ValueError(f"colour {top} has no quota: there are {len(self.lo)}")
        reservoir = self.first()
        pool, _ = advance(reservoir, first)
        cell = self.second(pool)
        state, _ = advance(cell, second)
        return Fair(*self.best(cell, state), int(pool.n.sum()))


@eqx.filter_jit
def advance(cell: Cell, stream: Element) -> tuple[Any, Any]:
    """The state after a stream, and what became of each element."""
    return cell.advance(cell.init(), stream)


def example() -> tuple[FairReservoir, Element]:
    """A first pass over 40 sets of 12 things, in two parts and three colours."""
    draw = np.random.default_rng(0)
    stream = coloured(range(40), draw.random((40, 12)) < 0.3, draw.integers(0, 2, 40), draw.integers(0, 3, 40))
    return FairReservoir(Coverage(12), Laminar([3, 4]), colours=3, k=7), stream
