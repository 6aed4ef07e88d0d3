"""Choosing few of many as they come: what a set is worth, which sets are allowed, and who stays.

An `Objective` is monotone and submodular: what an element adds to a set never grows with the set. A `Laminar` matroid
says which sets are allowed, by caps on groups. `Sieve` keeps at most k elements in one pass; `Swap` keeps a set that is
independent in several matroids, and puts a new element in the place of lighter ones.

    >>> sets = jnp.array([[1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 1, 1, 1]]) > 0
    >>> cell = Swap(Coverage(5), (Laminar([1, 1]),), k=2)
    >>> state, accepted = cell.advance(cell.init(), elements([7, 8, 9], sets, ([0, 0, 1],)))
    >>> accepted.tolist(), state.kept.id.tolist(), float(cell.objective.value(state.o))
    ([True, False, True], [7, 9], 5.0)

An element carries what the objective has to know of it, so that nothing is held but what was chosen.
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from anabranch.branch import branch
from anabranch.cell import Cell, select
from anabranch.keep.base import first, smallest


class Element(NamedTuple):
    """One element of a stream."""

    id: Int[Array, ""]
    """-1 is no element."""
    x: PyTree
    """What the objective takes."""
    groups: tuple[Int[Array, " D"], ...] = ()
    """For each matroid the groups that it is in, the smallest first; -1 is none, which is never full."""


def elements(ids: Any, x: PyTree, groups: Sequence[Any] = ()) -> Element:
    """T elements, stacked.

    Arguments:
        x: what the objective takes, with a leading axis.
        groups: for each matroid T numbers, or T rows of the groups that an element is in, the smallest first.

    Raises:
        ValueError: if an id is negative, or lengths differ.
    """
    ids, groups = np.asarray(ids), [np.asarray(group, np.int32) for group in groups]
    if ids.size and ids.min() < 0:
        raise ValueError(f"ids must not be negative, got {ids.min()}")
    lengths = [len(ids), *(len(leaf) for leaf in jax.tree.leaves(x)), *map(len, groups)]
    if len(set(lengths)) > 1:
        raise ValueError(f"ids, x and groups must be of one length, got {lengths}")
    columns = tuple(jnp.asarray(group.reshape(len(ids), -1)) for group in groups)
    return Element(jnp.asarray(ids, jnp.int32), jax.tree.map(jnp.asarray, x), columns)


class Objective(eqx.Module):
    """What a set is worth, by way of a summary `o` of the set."""

    def blank(self) -> PyTree:
        """An element that adds nothing."""
        raise NotImplementedError(f"{type(self).__name__} is abstract: it defines no `blank`")

    def of(self, xs: PyTree, live: Bool[Array, " k"]) -> PyTree:
        """The summary of some of k elements."""
        raise NotImplementedError(f"{type(self).__name__} is abstract: it defines no `of`")

    def add(self, o: PyTree, x: PyTree) -> PyTree:
        """The summary with one element more."""
        raise NotImplementedError(f"{type(self).__name__} is abstract: it defines no `add`")

    def value(self, o: PyTree) -> Float[Array, ""]:
        """What the set is worth; the empty one 0."""
        raise NotImplementedError(f"{type(self).__name__} is abstract: it defines no `value`")

    def gain(self, o: PyTree, x: PyTree) -> Float[Array, ""]:
        """What an element adds."""
        return self.value(self.add(o, x)) - self.value(o)

    def empty(self) -> PyTree:
        """The summary of the empty set."""
        return self.of(jax.tree.map(lambda leaf: leaf[None], self.blank()), jnp.zeros(1, bool))


class Coverage(Objective):
    """How many of m things are covered; an element is bool[m], those that it covers."""

    m: int = eqx.field(static=True)

    def blank(self):
        return jnp.zeros(self.m, bool)

    def of(self, xs, live):
        return (xs & live[:, None]).any(0)

    def add(self, o, x):
        return o | x

    def value(self, o):
        return o.sum().astype(jnp.float32)

    def gain(self, o, x):
        return (x & ~o).sum().astype(jnp.float32)


class FacilityLocation(Objective):
    """How similar each of m points is to the element that is nearest to it, in sum; an element is f32[m], not negative.

    With what a point is nearer to the element than to some fixed one, it is exemplar clustering.
    """

    m: int = eqx.field(static=True)

    def blank(self):
        return jnp.zeros(self.m)

    def of(self, xs, live):
        return jnp.where(live[:, None], xs, 0).max(0)

    def add(self, o, x):
        return jnp.maximum(o, x)

    def value(self, o):
        return o.sum()

    def gain(self, o, x):  # as differences of points: that of two large sums would be rounded away
        return jnp.maximum(x - o, 0).sum()


class Modular(Objective):
    """The sum of weights; an element is one, f32[], not negative."""

    def blank(self):
        return jnp.zeros(())

    def of(self, xs, live):
        return jnp.where(live, xs, 0).sum()

    def add(self, o, x):
        return o + x

    def value(self, o):
        return o

    def gain(self, o, x):
        return x


class Weighted(Objective):
    """A sum of objectives; an element is a tuple of what each takes."""

    parts: tuple[Objective, ...]
    weights: tuple[float, ...] = eqx.field(static=True)

    def _each(self, name: str, *args: Any) -> tuple:
        return tuple(getattr(part, name)(*(a[i] for a in args)) for i, part in enumerate(self.parts))

    def _sum(self, values: tuple) -> Float[Array, ""]:
        return jnp.array(self.weights) @ jnp.stack(values)

    def blank(self):
        return self._each("blank")

    def of(self, xs, live):
        return tuple(part.of(x, live) for part, x in zip(self.parts, xs, strict=True))

    def add(self, o, x):
        return self._each("add", o, x)

    def value(self, o):
        return self._sum(self._each("value", o))

    def gain(self, o, x):
        return self._sum(self._each("gain", o, x))


class Laminar(eqx.Module):
    """The sets with at most so many elements of each group; of two groups one holds the other, or they are disjoint.

    With disjoint groups it is a partition matroid, with one group a uniform one. Conditioned on a set that is in
    already, it is the same with what that set leaves of the caps.

    Raises:
        ValueError: if a cap is negative.
    """

    caps: Int[Array, " G"]
    depth: int = eqx.field(static=True)
    """In how many groups an element can be."""

    def __init__(self, caps: Any, depth: int = 1):
        caps = np.asarray(caps)
        if (caps < 0).any():
            raise ValueError(f"caps must not be negative, got {caps.min()}")
        self.caps, self.depth = jnp.asarray(caps, jnp.int32), depth

    def count(self, groups: Int[Array, "k D"], live: Bool[Array, " k"]) -> Int[Array, " G"]:
        """How many of some of k elements are in each group."""
        return (live[:, None, None] & (groups[..., None] == jnp.arange(len(self.caps)))).sum((0, 1))

    def conditioned(self, groups: Int[Array, "k D"], live: Bool[Array, " k"]) -> "Laminar":
        """The sets that can be added to this one."""
        return eqx.tree_at(lambda m: m.caps, self, self.caps - self.count(groups, live))

    def full(self, groups: Int[Array, "k D"], live: Bool[Array, " k"], new: Int[Array, " D"]) -> Bool[Array, " D"]:
        """Which groups of a new element are full."""
        inside = live[:, None, None] & (groups[..., None] == new)
        return (new >= 0) & (inside.sum((0, 1)) >= self.caps[new])

    def could_leave(
        self, groups: Int[Array, "k D"], live: Bool[Array, " k"], new: Int[Array, " D"]
    ) -> tuple[Bool[Array, ""], Bool[Array, " k"]]:
        """Whether one of k must leave to let a new element in, and which could: those in its smallest full group."""
        full = self.full(groups, live, new)
        tight = new[jnp.argmax(full)]
        return full.any(), live & (groups == tight).any(1) & full.any()


class Chosen(NamedTuple):
    """Places for k elements."""

    kept: Element
    """Each leaf with a leading axis k; the id of an empty place is -1."""
    weight: Float[Array, " k"]
    """What each added when it came; it is not computed again."""
    o: PyTree
    """The summary of the set."""

    @property
    def live(self) -> Bool[Array, " k"]:
        return self.kept.id >= 0


def places(objective: Objective, matroids: Sequence[Laminar], *shape: int) -> Element:
    """Room for elements, all empty."""
    x = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (*shape, *leaf.shape)), objective.blank())
    groups = tuple(jnp.full((*shape, matroid.depth), -1, jnp.int32) for matroid in matroids)
    return Element(jnp.full(shape, -1, jnp.int32), x, groups)


class Swap(Cell):
    """One pass for a set that is independent in each of some matroids; the output tells who was let in.

    Chakrabarti and Kale, "Submodular maximization meets streaming", 2015. Of each matroid that a new element violates
    the lightest element that could leave would have to. It comes in if it adds at least twice what they weigh together,
    where a weight is what an element added when it came; one that leaves for two matroids counts once.

    State: `Chosen`, with room for k elements: at least the size of the largest set that is allowed.

    Raises:
        ValueError: if k is not positive.
    """

    smooth: ClassVar[bool] = False

    objective: Objective
    matroids: tuple[Laminar, ...]
    k: int = eqx.field(static=True)

    def __check_init__(self):
        if self.k < 1:
            raise ValueError(f"k must be at least 1, got {self.k}")

    def init(self, *, key: PRNGKeyArray | None = None) -> Chosen:
        return Chosen(places(self.objective, self.matroids, self.k), jnp.zeros(self.k), self.objective.empty())

    def step(self, state: Chosen, x: Element) -> tuple[Chosen, Bool[Array, ""]]:
        live, k = state.live, self.k
        leaves, possible = jnp.zeros(k, bool), jnp.array(True)
        for matroid, groups, new in zip(self.matroids, state.kept.groups, x.groups, strict=True):
            must, could = matroid.could_leave(groups, live, new)
            out = smallest(could, state.weight)  # k: nobody
            leaves |= jnp.arange(k) == out
            possible &= ~must | (out < k)
        gain = self.objective.gain(state.o, x.x)
        stays = live & ~leaves
        slot = first(~stays)
        known = (live & (state.kept.id == x.id)).any()
        accepted = possible & (x.id >= 0) & ~known & (slot < k)
        accepted &= gain >= 2 * jnp.where(leaves, state.weight, 0).sum()
        replaced = lambda *args: self._replaced(*args)  # lax.cond would hash a bound method, and with it the cell
        return branch(accepted, replaced, lambda state, *_: state, state, x, stays, slot, gain), accepted

    def _replaced(self, state: Chosen, x: Element, stays, slot, gain) -> Chosen:
        kept = state.kept._replace(id=jnp.where(stays, state.kept.id, -1))
        kept = jax.tree.map(lambda leaf, new: leaf.at[slot].set(new), kept, x)
        o = self.objective.of(kept.x, kept.id >= 0)
        return Chosen(kept, jnp.where(stays, state.weight, 0).at[slot].set(gain), o)


class Lanes(NamedTuple):
    """The state of `Sieve`: J sets, each by its own guess of what the best set is worth."""

    kept: Element
    n: Int[Array, " J"]
    o: PyTree
    level: Int[Array, " J"]
    """The guess of a lane is (1 + ε)^level."""
    best: Float[Array, ""]
    """What the best single element is worth."""


class Sieve(Cell):
    """One pass for at most k elements worth at least (1/2 − ε) of the best; the output tells who some lane let in.

    Badanidiyuru et al., "Streaming submodular maximization: massive data summarization on the fly", 2014. A lane with
    the guess v lets an element in that adds at least (v/2 − f) / (k − n). Guesses lie between m and 2km, where m is
    what the best single element so far is worth; a lane whose guess has become too low begins anew with a higher one.

    Raises:
        ValueError: if k is not positive, or epsilon is not in (0, 1).
    """

    smooth: ClassVar[bool] = False

    objective: Objective
    k: int = eqx.field(static=True)
    epsilon: float = eqx.field(static=True, default=0.1)

    def __check_init__(self):
        if self.k < 1:
            raise ValueError(f"k must be at least 1, got {self.k}")
        if not 0 < self.epsilon < 1:
            raise ValueError(f"epsilon must be in (0, 1), got {self.epsilon}")

    @property
    def lanes(self) -> int:
        return math.ceil(math.log(2 * self.k) / math.log1p(self.epsilon)) + 1

    def init(self, *, key: PRNGKeyArray | None = None) -> Lanes:
        J = self.lanes
        o = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (J, *leaf.shape)), self.objective.empty())
        none = jnp.full(J, jnp.iinfo(jnp.int32).min, jnp.int32)
        return Lanes(places(self.objective, (), J, self.k), jnp.zeros(J, jnp.int32), o, none, jnp.float32(0))

    def step(self, state: Lanes, x: Element) -> tuple[Lanes, Bool[Array, ""]]:
        J, objective = self.lanes, self.objective
        x = x._replace(groups=())
        empty = objective.empty()
        best = jnp.maximum(state.best, jnp.where(x.id >= 0, objective.gain(empty, x.x), 0))
        low = jnp.ceil(jnp.log(jnp.maximum(best, 1e-30)) / math.log1p(self.epsilon)).astype(jnp.int32)
        level = low + (jnp.arange(J) - low) % J
        guess = jnp.exp(level * math.log1p(self.epsilon))

        def lane(kept, n, o, old, new, guess):
            fresh = old != new
            kept = kept._replace(id=jnp.where(fresh, -1, kept.id))
            n, o = jnp.where(fresh, 0, n), select(fresh, empty, o)
            wanted = (guess / 2 - objective.value(o)) / jnp.maximum(self.k - n, 1)
            known = (kept.id == x.id).any()
            accepted = (x.id >= 0) & ~known & (n < self.k) & (best > 0) & (objective.gain(o, x.x) >= wanted)
            slot = jnp.where(accepted, n, self.k)  # k: out of bounds, nothing is written
            kept = jax.tree.map(lambda leaf, one: leaf.at[slot].set(one), kept, x)
            return kept, n + accepted, select(accepted, objective.add(o, x.x), o), accepted

        kept, n, o, accepted = jax.vmap(lane)(state.kept, state.n, state.o, state.level, level, guess)
        return Lanes(kept, n, o, level, best), accepted.any()

    def solution(self, state: Lanes) -> tuple[Element, Float[Array, ""]]:
        """The best lane: its k places, and what it is worth."""
        value = jax.vmap(self.objective.value)(state.o)
        return jax.tree.map(lambda leaf: leaf[jnp.argmax(value)], state.kept), value.max()
