"""Incremental decision trees and forests of them.

A Hoeffding tree (Domingos & Hulten, *Mining high-speed data streams*, KDD 2000) grows from a stream without storing it:
each leaf keeps sufficient statistics, and splits once the Hoeffding bound says that the best test found so far would
stay the best. Its leaves answer with naive Bayes or the majority class, whichever has been right more often (Gama,
Rocha & Medas, KDD 2003). `AdaptiveForest` bags such trees and replaces those that drift (Gomes et al., *Adaptive random
forests for evolving data stream classification*, Machine Learning 106, 2017).

All arrays have fixed shapes: a tree owns `max_leaves` leaf slots and the `2 max_leaves - 1` nodes they can hang from.
An event reads and writes one leaf's slot, so a loop over events updates the state in place; the split attempt is behind
a branch and costs nothing while no leaf is due.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt32

from anabranch.branch import branch
from anabranch.cell import Event, Learner, Maybe, noise, select
from anabranch.learn.detect import ADWIN, ADWINState

N, MEAN, SQUARES, LOW, HIGH = range(5)  # rows of the statistics; a nominal feature has its counts from row 1 on
SINCE, MAJORITY, BAYES = range(3)  # columns of a leaf's tally
HALVE = 2.0**22  # float32 counts stop growing at 2^24


class Leaf(NamedTuple):
    """What is held of one leaf, or of all slots: C classes, F watched features, R = 5 rows (or 1 + n_values)."""

    weight: Float[Array, "*S C"]
    """Weight by class, including what was inherited at the split."""
    stats: Float[Array, "*S C R F"] | Float[Array, "*S C*R*F"]
    """Of what was seen here: weight, mean, sum of squared deviations, least and greatest value; or counts by value.

    A `Tree` holds them flat: its state is copied at every event where many trees are keyed, and loops over dimensions
    as short as C and F are twice as slow.
    """
    tally: Float[Array, "*S 3"]
    """Weight since the last attempt, and the weight on which the majority class and naive Bayes were right."""
    watched: Int[Array, "*S F"] | None
    """The features this leaf watches, if not all."""


class Tree(NamedTuple):
    """The state of a `HoeffdingTree`: M nodes and L leaf slots. Children are made in pairs and stay neighbours.

    One set of arrays may hold G trees, one after the other: tree g has its root at node g M and its slots from g L on.
    A `HoeffdingTree` by itself has G = 1.
    """

    feature: Int[Array, " G*M"]
    """The feature an inner node tests; -1 for a leaf."""
    threshold: Float[Array, " G*M"]
    """Left if x[feature] <= threshold, or == threshold for a nominal feature."""
    child: Int[Array, " G*M"]
    """Of an inner node its left child (the right one follows it); of a leaf its slot."""
    leaves: Leaf
    n_leaves: Int[Array, " G"]
    denied: Int[Array, ""]
    """Splits that were due and found no free slot."""
    rejected: Int[Array, ""]
    """Labelled events that were ignored: label out of range, weight negative or not finite, bad feature."""
    drawn: Int[Array, ""]
    """Random subspaces drawn so far."""
    key: UInt32[Array, "2"] | None


class Attempt(NamedTuple):
    """What came of an attempt to split a leaf."""

    split: Bool[Array, ""]
    denied: Bool[Array, ""]
    feature: Int[Array, ""]
    threshold: Float[Array, ""]
    leaf: Leaf
    """What the leaf's slot is to hold: the left child, or the leaf after a failed attempt."""
    right: Float[Array, " C"]
    """The weight of the right child."""
    watched: Int[Array, " F"] | None
    """The features that the right child watches."""


class HoeffdingTree(Learner):
    """A Hoeffding tree with Gaussian numeric observers and naive Bayes adaptive leaves.

    Stream: `Event(x f32[D], Maybe(label i32, valid), weight)`. Output: class scores f32[C] that sum to 1.
    State: `Tree`, about `max_leaves * C * 5 * D` words.

    A labelled event with a label outside 0..C-1, a negative or not finite weight, or a bad feature (not finite; for a
    nominal one not in 0..n_values-1) is ignored and counted in `state.rejected`. With `missing=True` a bad feature
    is a missing one: it is routed to the heavier child and left out of the statistics.

    Args:
        D: number of features.
        C: number of classes.
        max_leaves: leaf slots. When all are taken the tree stops growing; `state.denied` counts refused splits.
        grace: weight a leaf takes in between attempts to split.
        delta: allowed probability of choosing another test than infinitely many events would.
        tau: below this Hoeffding bound a tie is broken.
        n_splits: thresholds tried for a numeric feature, evenly spaced over the range seen.
        min_branch: least share of the weight that both sides of a split must get.
        max_share: a leaf with a larger share of one class is not split but starts its statistics anew.
        leaf: what a leaf answers with: naive Bayes ("nb"), the majority class ("mc"), the better of both ("nba").
        nominal: indices of nominal features; they are split one value against the rest.
        n_values: number of values of nominal features.
        missing: take bad features as missing instead of rejecting the event.
        null_merit: merit of not splitting. The default (-inf) is that of River and MOA; 0 is the textbook's.
        subspace: number of random features each leaf watches; None is all. Needs a key in `init`.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from anabranch import Event, Maybe
        >>> tree = HoeffdingTree(D=2, C=2, max_leaves=4)
        >>> x = jax.random.uniform(jax.random.PRNGKey(0), (600, 2))
        >>> events = Event(x, Maybe((x[:, 0] > 0.5).astype(int), jnp.ones(600, bool)), jnp.ones(600))
        >>> state, scores = jax.lax.scan(tree.step, tree.init(), events)
        >>> int(state.n_leaves[0]) > 1, int(state.feature[0]), bool(0.4 < state.threshold[0] < 0.6)
        (True, 0, True)
    """

    D: int = eqx.field(static=True)
    C: int = eqx.field(static=True)
    max_leaves: int = eqx.field(static=True, default=64)
    grace: float = eqx.field(static=True, default=200)
    delta: float = eqx.field(static=True, default=1e-7)
    tau: float = eqx.field(static=True, default=0.05)
    n_splits: int = eqx.field(static=True, default=10)
    min_branch: float = eqx.field(static=True, default=0.01)
    max_share: float = eqx.field(static=True, default=0.99)
    leaf: Literal["nba", "nb", "mc"] = eqx.field(static=True, default="nba")
    nominal: tuple[int, ...] = eqx.field(static=True, default=())
    n_values: int = eqx.field(static=True, default=2)
    missing: bool = eqx.field(static=True, default=False)
    null_merit: float = eqx.field(static=True, default=-math.inf)
    subspace: int | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        for name, least in (("D", 1), ("C", 2), ("max_leaves", 1), ("n_splits", 1), ("n_values", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not self.grace > 0:
            raise ValueError(f"grace must be positive, got {self.grace}")
        if not 0 < self.delta < 1:
            raise ValueError(f"delta must lie between 0 and 1, got {self.delta}")
        if self.leaf not in ("nba", "nb", "mc"):
            raise ValueError(f"leaf must be 'nba', 'nb' or 'mc', got {self.leaf!r}")
        if not all(0 <= i < self.D for i in self.nominal):
            raise ValueError(f"nominal must hold indices below D={self.D}, got {self.nominal}")
        if self.subspace is not None and not 1 <= self.subspace <= self.D:
            raise ValueError(f"subspace must lie in 1..{self.D}, got {self.subspace}")

    def init(self, *, key: PRNGKeyArray | None = None) -> Tree:
        return self.plant(1, key=key)

    def predict(self, state: Tree, x: Float[Array, " D"]) -> Float[Array, " C"]:
        return self.ask(state, x)

    def learn(self, state: Tree, x: Float[Array, " D"], target: Int[Array, ""], weight: Any = 1.0) -> Tree:
        return self.update(state, x, target, weight)[0]

    def step(self, state: Tree, x: Event) -> tuple[Tree, Float[Array, " C"]]:
        return self.update(state, x.x, x.target.value, x.weight, x.target.valid)

    # The same for tree g of several in one set of arrays.

    def plant(self, G: int, *, key: PRNGKeyArray | None = None) -> Tree:
        """G empty trees.

        Raises:
            ValueError: if there is a subspace and no key.
        """
        if self.subspace is not None and key is None:
            raise ValueError("a tree with a subspace draws features at random: init needs a key")
        M, L, C, F = 2 * self.max_leaves - 1, self.max_leaves, self.C, self.subspace or self.D
        R = max(5, 1 + self.n_values) if self.nominal else 5
        watched, random = None, self.subspace is not None
        if random:
            roots = jax.vmap(lambda g: self._draw(key, g))(jnp.arange(G))
            watched = jnp.zeros((G * L, F), jnp.int32).at[::L].set(roots)
        return Tree(
            feature=jnp.full(G * M, -1, jnp.int32),
            threshold=jnp.zeros(G * M),
            child=jnp.zeros(G * M, jnp.int32).at[::M].set(L * jnp.arange(G, dtype=jnp.int32)),
            leaves=Leaf(jnp.zeros((G * L, C)), jnp.zeros((G * L, C * R * F)), jnp.zeros((G * L, 3)), watched),
            n_leaves=jnp.ones(G, jnp.int32),
            denied=jnp.int32(0),
            rejected=jnp.int32(0),
            drawn=jnp.int32(G if random else 0),
            key=key if random else None,
        )

    def clear(self, trees: Tree, g: Any) -> Tree:
        """Tree g is empty again; its root watches other features."""
        M, L = 2 * self.max_leaves - 1, self.max_leaves

        def wipe(array, start, size, value=0):
            blank = jnp.full((size, *array.shape[1:]), value, array.dtype)
            return lax.dynamic_update_slice_in_dim(array, blank, start, 0)

        weight, stats, tally, watched = trees.leaves
        if watched is not None:
            watched = _write(watched, g * L, self._draw(trees.key, trees.drawn))
        return trees._replace(
            feature=wipe(trees.feature, g * M, M, -1),
            child=_write(trees.child, g * M, g * L),
            leaves=Leaf(wipe(weight, g * L, L), wipe(stats, g * L, L), wipe(tally, g * L, L), watched),
            n_leaves=_write(trees.n_leaves, g, 1),
            drawn=trees.drawn + (self.subspace is not None),
        )

    def ask(self, trees: Tree, x: Float[Array, " D"], g: Any = 0) -> Float[Array, " C"]:
        """What tree g predicts."""
        x = jnp.asarray(x, float)
        leaf = _read(trees.leaves, self._route(trees, x, g)[1])
        return self._vote(self._shaped(leaf), x)[0]

    def update(self, trees: Tree, x, y, weight: Any = 1.0, valid: Any = True, g: Any = 0):
        """Predict with tree g, then let it learn where `valid`: the trees and the scores. Both share one routing.

        What is not to be learned is written back as it was: that is cheaper than a choice between two states.
        """
        x, y = jnp.asarray(x, float), jnp.asarray(y)
        weight, valid = jnp.asarray(weight, float), jnp.asarray(valid)
        node, slot = self._route(trees, x, g)
        leaf = self._shaped(_apart(_read(trees.leaves, slot), slot))
        scores, majority, bayes = self._vote(leaf, x)

        good = self.acceptable(x, y, weight)
        y = jnp.clip(y, 0, self.C - 1).astype(jnp.int32)
        weight = jnp.where(valid & good, weight, 0.0)
        empty = leaf.weight.sum() == 0
        hits = jnp.stack([jnp.asarray(True), empty | (majority == y), ~empty & (bayes == y)])
        leaf = leaf._replace(
            weight=leaf.weight.at[y].add(weight),
            stats=self._observe(leaf, x, y, weight),
            tally=leaf.tally + weight * hits,
        )
        due = (weight > 0) & (leaf.tally[SINCE] >= self.grace)
        n_leaves = _read(trees.n_leaves, g)
        full = n_leaves >= self.max_leaves
        result = branch(due, self._attempt, self._no_attempt, leaf, full, trees.drawn, trees.key)

        # Not split: everything below writes back what is there. The new slot has not been used: its statistics are 0.
        new = g * self.max_leaves + jnp.minimum(n_leaves, self.max_leaves - 1)
        leaves, child = trees.leaves, trees.child
        right = jnp.where(result.split, result.right, _read(leaves.weight, new))
        leaves = leaves._replace(weight=_write(leaves.weight, new, right))
        if leaves.watched is not None:
            watched = jnp.where(result.split, result.watched, _read(leaves.watched, new))
            leaves = leaves._replace(watched=_write(leaves.watched, new, watched))
        pair = g * (2 * self.max_leaves - 1) + jnp.minimum(2 * n_leaves - 1, 2 * self.max_leaves - 3)
        if self.max_leaves > 1:
            slots = jnp.where(result.split, jnp.stack([slot, new]), lax.dynamic_slice(child, (pair,), (2,)))
            child = lax.dynamic_update_slice(child, slots, (pair,))
        trees = trees._replace(
            feature=_write(trees.feature, node, jnp.where(result.split, result.feature, -1)),
            threshold=_write(trees.threshold, node, jnp.where(result.split, result.threshold, 0.0)),
            child=_write(child, node, jnp.where(result.split, pair, slot)),
            leaves=_write(leaves, slot, result.leaf._replace(stats=result.leaf.stats.ravel())),
            n_leaves=_write(trees.n_leaves, g, n_leaves + result.split),
            denied=trees.denied + result.denied,
            rejected=trees.rejected + (valid & ~good),
            drawn=trees.drawn + (2 * result.split if self.subspace is not None else 0),
        )
        return trees, scores

    def _shaped(self, leaf: Leaf) -> Leaf:
        return leaf._replace(stats=leaf.stats.reshape(self.C, -1, self.subspace or self.D))

    def acceptable(self, x, y, weight) -> Bool[Array, ""]:
        """Whether an event may be learned from."""
        good = (0 <= y) & (y < self.C) & (weight >= 0) & jnp.isfinite(weight)
        return good if self.missing else good & self._known(x, jnp.arange(self.D)).all()

    def _route(self, trees: Tree, x, g) -> tuple[Int[Array, ""], Int[Array, ""]]:
        """The leaf of tree g that x falls into: its node and its slot."""
        nominal = jnp.asarray(_mask(self.D, self.nominal))

        def descend(node):
            feature, threshold, left = trees.feature[node], trees.threshold[node], trees.child[node]
            value = x[feature]
            right = value > threshold
            if self.nominal:
                right = jnp.where(nominal[feature], value != threshold, right)
            if self.missing:
                right = branch(
                    ~self._known(value, feature),
                    lambda trees, left, right: self._below(trees, left + 1) > self._below(trees, left),
                    lambda trees, left, right: right,
                    *(trees, left, right),
                )
            return left + right

        root = jnp.asarray(g * (2 * self.max_leaves - 1), jnp.int32)
        node = lax.while_loop(lambda node: trees.feature[node] >= 0, descend, root)
        return node, trees.child[node]

    def _below(self, trees: Tree, node) -> Float[Array, ""]:
        """The weight in the leaves under a node."""
        inner, M = trees.feature >= 0, trees.feature.shape[0]

        # Children come after their parents, so one pass in order marks everything under the node.
        def mark(i, under):
            pair = jnp.where(inner[i], trees.child[i], M)  # past the end: dropped
            return under.at[jnp.stack([pair, pair + 1])].max(under[i], mode="drop")

        under = lax.fori_loop(0, M, mark, jnp.arange(M) == node)
        mass = trees.leaves.weight.sum(-1)[jnp.where(inner, 0, trees.child)]
        return jnp.where(under & ~inner, mass, 0.0).sum()

    def _known(self, value, feature):
        """Whether these values may be learned from."""
        known = jnp.isfinite(value)
        if self.nominal:
            legal = (value >= 0) & (value < self.n_values) & (value == jnp.floor(value))
            known &= ~jnp.asarray(_mask(self.D, self.nominal))[feature] | legal
        return known

    def _watch(self, leaf: Leaf, x):
        """The features of x that the leaf watches: their indices, values, which are nominal, which are known."""
        index = jnp.arange(self.D) if leaf.watched is None else leaf.watched
        nominal = jnp.asarray(_mask(self.D, self.nominal))[index]
        return x[index], nominal, self._known(x[index], index)

    def _observe(self, leaf: Leaf, x, y, weight) -> Float[Array, "C R F"]:
        """The statistics after an event of class y: Welford's update of one class's rows, or a count."""
        value, nominal, known = self._watch(leaf, x)
        rows = leaf.stats[y]
        n, mean = rows[N] + weight, rows[MEAN]
        delta = value - mean
        moved = mean + delta * (weight / jnp.where(n > 0, n, 1.0))
        first = rows[N] == 0
        new = jnp.stack([
            n,
            moved,
            rows[SQUARES] + weight * delta * (value - moved),
            jnp.where(first, value, jnp.minimum(rows[LOW], value)),
            jnp.where(first, value, jnp.maximum(rows[HIGH], value)),
        ])  # fmt: skip
        if self.nominal:
            R = rows.shape[0]
            counted = rows + weight * ((jnp.arange(R)[:, None] == value + 1) | (jnp.arange(R)[:, None] == N))
            new = jnp.where(nominal, counted, jnp.concatenate([new, rows[5:]]))
        return _write(leaf.stats, y, jnp.where(known & (weight > 0), new, rows))

    def _vote(self, leaf: Leaf, x) -> tuple[Float[Array, " C"], Int[Array, ""], Int[Array, ""]]:
        """The leaf's class scores, and what the majority class and naive Bayes say."""
        value, nominal, known = self._watch(leaf, x)
        total = leaf.weight.sum()
        share = leaf.weight / jnp.where(total > 0, total, 1.0)
        n, mean, squares = leaf.stats[:, N], leaf.stats[:, MEAN], leaf.stats[:, SQUARES]
        varied = (n > 1) & (squares > 0)  # without a variance the feature says nothing
        variance = jnp.where(varied, squares, 1.0) / jnp.where(varied, n - 1, 1.0)
        density = -((value - mean) ** 2) / (2 * variance) - 0.5 * math.log(2 * math.pi) - 0.5 * jnp.log(variance)
        log_likelihood = jnp.where(known & varied, density, 0.0)
        if self.nominal:
            hit = jnp.arange(leaf.stats.shape[1])[:, None] == value + 1
            p = (leaf.stats * hit).sum(1) / jnp.where(n > 0, n, 1.0)
            counted = jnp.where(known & (p > 0), jnp.log(jnp.where(p > 0, p, 1.0)), 0.0)
            log_likelihood = jnp.where(nominal, counted, log_likelihood)
        logit = jnp.where(share > 0, jnp.log(jnp.where(share > 0, share, 1.0)), -jnp.inf) + log_likelihood.sum(-1)
        posterior = jnp.exp(logit - jnp.where(total > 0, logit.max(), 0.0))
        posterior = posterior / jnp.where(total > 0, posterior.sum(), 1.0)
        if self.leaf == "nba":
            scores = jnp.where(leaf.tally[BAYES] >= leaf.tally[MAJORITY], posterior, share)
        else:
            scores = posterior if self.leaf == "nb" else share
        return jnp.where(total > 0, scores, 1 / self.C), jnp.argmax(share), jnp.argmax(logit)

    def _no_attempt(self, leaf: Leaf, full, drawn, key) -> Attempt:
        no = jnp.zeros((), bool)
        return Attempt(no, no, jnp.int32(-1), jnp.zeros(()), leaf, leaf.weight, leaf.watched)

    def _attempt(self, leaf: Leaf, full, drawn, key) -> Attempt:
        """Split the leaf if its best test leads by more than the Hoeffding bound."""
        total = leaf.weight.sum()
        present = (leaf.weight > 0).sum()
        pure = leaf.weight.max() / total > self.max_share
        merit, threshold, left, right = self._candidates(leaf)  # best of each feature

        best = merit.shape[0] - 1 - jnp.argmax(merit[::-1])  # of equal merits the last, as in River
        second = jnp.maximum(jnp.where(jnp.arange(merit.shape[0]) == best, -jnp.inf, merit).max(), self.null_merit)
        spread = jnp.log2(jnp.maximum(present, 2).astype(merit.dtype))
        bound = jnp.sqrt(spread**2 * math.log(1 / self.delta) / (2 * total))
        lead = jnp.where(second == -jnp.inf, jnp.where(merit[best] == -jnp.inf, 0.0, jnp.inf), merit[best] - second)
        decided = (present > 1) & ~pure & ((lead > bound) | (bound < self.tau))
        wanted = decided & (merit[best] > -jnp.inf) & (merit[best] >= self.null_merit)
        split = wanted & ~full
        forget = (present > 1) & (pure | (decided & (merit[best] == -jnp.inf)))

        half = jnp.where(total > HALVE, 0.5, 1.0)
        rows = jnp.arange(leaf.stats.shape[1])[:, None]
        additive = (rows == N) | (rows == SQUARES)
        if self.nominal:
            additive |= self._watch(leaf, jnp.zeros(self.D))[1]
        kept = Leaf(
            leaf.weight * half,
            jnp.where(forget, 0.0, jnp.where(additive, half * leaf.stats, leaf.stats)),
            leaf.tally.at[SINCE].set(0.0),
            leaf.watched,
        )
        index, watched = best.astype(jnp.int32), (None, None)
        if leaf.watched is not None:
            index, watched = leaf.watched[best], jax.vmap(lambda i: self._draw(key, i))(drawn + jnp.arange(2))
        child = Leaf(left[:, best], jnp.zeros_like(leaf.stats), jnp.zeros_like(leaf.tally), watched[0])
        return Attempt(
            split, wanted & full, index, threshold[best], select(split, child, kept), right[:, best], watched[1]
        )

    def _candidates(self, leaf: Leaf):
        """The best test of each feature: merit f[F], threshold f[F], weight by class f[C, F] left and right of it."""
        J = max(self.n_splits, self.n_values) if self.nominal else self.n_splits
        n, mean, low, high = (leaf.stats[:, i] for i in (N, MEAN, LOW, HIGH))
        seen = n > 0
        least, greatest = jnp.where(seen, low, jnp.inf).min(0), jnp.where(seen, high, -jnp.inf).max(0)
        width = jnp.where(seen.any(0), greatest - least, 0.0) / (self.n_splits + 1)
        least = jnp.where(seen.any(0), least, 0.0)
        threshold = least + width * jnp.arange(1, J + 1)[:, None]  # [J, F]
        legal = (least < threshold) & (threshold < greatest) & (jnp.arange(J) < self.n_splits)[:, None]
        at = threshold[:, None]
        sigma = jnp.sqrt(leaf.stats[:, SQUARES] / jnp.where(n > 1, n - 1, 1.0)) * (n > 1)
        below = 0.5 * (1 + lax.erf((at - mean) / jnp.where(sigma > 0, sigma, 1.0) / math.sqrt(2))) * (sigma > 0)
        left = n * jnp.where(at < low, 0.0, jnp.where(at >= high, 1.0, below))  # [J, C, F]
        if self.nominal:
            nominal = self._watch(leaf, jnp.zeros(self.D))[1]
            values = jnp.arange(J)[:, None]
            counts = jnp.moveaxis(leaf.stats[:, 1:], 1, 0)[:J]
            counts = jnp.pad(counts, ((0, J - counts.shape[0]), (0, 0), (0, 0)))
            threshold = jnp.where(nominal, values, threshold)
            legal = jnp.where(nominal, values < self.n_values, legal)
            left = jnp.where(nominal, counts, left)
        right = n - left

        sides = jnp.stack([left, right])  # [2, J, C, F]
        mass = sides.sum(2)
        both = jnp.maximum(mass.sum(0), 1e-30)
        merit = _entropy(leaf.weight) - (mass * _entropy(sides, 2)).sum(0) / both
        merit = jnp.where(legal & (mass > self.min_branch * both).all(0), merit, -jnp.inf)
        best = jnp.argmax(merit, axis=0)
        pick = lambda a: jnp.take_along_axis(a, jnp.expand_dims(best, tuple(range(a.ndim - 1))), 0)[0]
        return pick(merit), pick(threshold), pick(left), pick(right)

    def _draw(self, key, index) -> Int[Array, " F"]:
        """The features that a leaf watches: those with the least of D random numbers."""
        u = jax.random.uniform(noise(key, index, "subspace"), (self.D,))
        i = jnp.arange(self.D)
        # Not sorted: a sort anywhere in it keeps XLA from compiling the loop over events as one function.
        rank = ((u < u[:, None]) | ((u == u[:, None]) & (i < i[:, None]))).sum(1)
        return jnp.argmax(rank == jnp.arange(self.subspace)[:, None], axis=1).astype(jnp.int32)


class Forest(NamedTuple):
    """The state of an `AdaptiveForest` of n trees."""

    trees: Tree
    """2n trees: those that vote and their replacements."""
    voting: Int[Array, " n"]
    """Which of the trees vote."""
    spare: Int[Array, " n"]
    """Which grow in the background to replace them."""
    growing: Bool[Array, " n"]
    """Whether the spare tree is in use."""
    warn: ADWINState
    drift: ADWINState
    right: Float[Array, " n"]
    seen: Float[Array, " n"]
    """Right predictions and all predictions of each voting tree since it was installed."""
    replaced: Int[Array, ""]
    """Trees replaced after a drift."""
    rejected: Int[Array, ""]
    """Labelled events that were ignored."""
    t: Int[Array, ""]
    key: UInt32[Array, "2"]


class AdaptiveForest(Learner):
    """An adaptive random forest: bagged Hoeffding trees on random subspaces, each replaced when its error changes.

    Stream: `Event(x f32[D], Maybe(label i32, valid), weight)`. Output: class scores f32[C] that sum to 1, the trees'
    votes weighted by their accuracies. State: `Forest`, 2 n_models trees and 2 n_models detectors.

    Each tree sees each event Poisson(`lam`) times, as one weighted update. When its warning detector fires, a new tree
    starts to grow in the background; when its drift detector fires, that tree takes over. As in River, a falling error
    rate is a change too. Bad events are ignored and counted in `state.rejected` (see `HoeffdingTree`).

    The trees are visited one after the other, so that an attempt to split costs only the tree that makes it.

    Args:
        tree: how the trees grow. Gomes et al. use grace=50, delta=0.01.
        n_models: number of trees n.
        lam: mean number of times that a tree sees an event.
        m: number of random features that a leaf watches; by default round(sqrt(D)).
        warn_delta: confidence of the warning detectors.
        drift_delta: confidence of the drift detectors.

    Raises:
        ValueError: if an argument is out of range, or `init` gets no key.
    """

    tree: HoeffdingTree
    n_models: int = eqx.field(static=True)
    lam: float = eqx.field(static=True)
    warn: ADWIN
    drift: ADWIN

    def __init__(
        self,
        tree: HoeffdingTree,
        n_models: int = 10,
        lam: float = 6.0,
        m: int | None = None,
        warn_delta: float = 0.01,
        drift_delta: float = 0.001,
    ):
        if n_models < 1:
            raise ValueError(f"n_models must be at least 1, got {n_models}")
        if not lam > 0:
            raise ValueError(f"lam must be positive, got {lam}")
        self.tree = dataclasses.replace(tree, subspace=round(math.sqrt(tree.D)) if m is None else m)
        self.n_models, self.lam = n_models, lam
        self.warn, self.drift = ADWIN(warn_delta), ADWIN(drift_delta)

    def init(self, *, key: PRNGKeyArray | None = None) -> Forest:
        if key is None:
            raise ValueError("a forest is random: init needs a key")
        n = self.n_models
        stacked = lambda state: jax.tree.map(lambda a: jnp.broadcast_to(a, (n, *a.shape)), state)
        return Forest(
            trees=self.tree.plant(2 * n, key=noise(key, 0, "trees")),
            voting=jnp.arange(n, dtype=jnp.int32),
            spare=jnp.arange(n, 2 * n, dtype=jnp.int32),
            growing=jnp.zeros(n, bool),
            warn=stacked(self.warn.init()),
            drift=stacked(self.drift.init()),
            right=jnp.zeros(n),
            seen=jnp.zeros(n),
            replaced=jnp.int32(0),
            rejected=jnp.int32(0),
            t=jnp.int32(0),
            key=key,
        )

    def predict(self, state: Forest, x: Float[Array, " D"]) -> Float[Array, " C"]:
        def ask(i, scores):
            return _write(scores, i, self.tree.ask(state.trees, x, state.voting[i]))

        scores = lax.fori_loop(0, self.n_models, ask, jnp.zeros((self.n_models, self.tree.C)))
        return self._vote(state.right, state.seen, scores)

    def learn(self, state: Forest, x: Float[Array, " D"], target: Int[Array, ""], weight: Any = 1.0) -> Forest:
        return self.step(state, Event(x, Maybe(target, True), weight))[0]

    def step(self, state: Forest, x: Event) -> tuple[Forest, Float[Array, " C"]]:
        features, y = jnp.asarray(x.x, float), jnp.asarray(x.target.value)
        good = self.tree.acceptable(features, y, x.weight)
        learns = x.target.valid & good
        k = jnp.where(learns, x.weight * self._poisson(noise(state.key, state.t, "bag")), 0.0)
        ballot = state.right, state.seen

        def visit(i, carry):
            """Predict with voting tree i, let it learn, and replace it if need be."""
            state, scores = carry
            voting, spare, fed = state.voting[i], state.spare[i], k[i] > 0

            def update(j, carry):
                trees, score = carry
                trees, new = self.tree.update(trees, features, y, k[i], learns, jnp.where(j == 0, voting, spare))
                return trees, jnp.where(j == 0, new, score)

            turns = 1 + (state.growing[i] & fed).astype(jnp.int32)
            trees, score = lax.fori_loop(0, turns, update, (state.trees, jnp.zeros(self.tree.C)))
            right = jnp.argmax(score) == y
            warn, warned = self._watch(self.warn, _read(state.warn, i), ~right, fed)
            drift, drifted = self._watch(self.drift, _read(state.drift, i), ~right, fed)
            growing = state.growing[i] | warned
            swap = drifted & growing
            trees = when(
                warned | (drifted & ~growing), lambda t: self.tree.clear(t, jnp.where(warned, spare, voting)), trees
            )
            state = state._replace(
                trees=trees,
                voting=_write(state.voting, i, jnp.where(swap, spare, voting)),
                spare=_write(state.spare, i, jnp.where(swap, voting, spare)),
                growing=_write(state.growing, i, growing & ~drifted),
                warn=_write(state.warn, i, select(drifted, self.warn.init(), warn)),
                drift=_write(state.drift, i, drift),  # starts afresh by itself
                right=_write(state.right, i, jnp.where(drifted, 0.0, state.right[i] + (learns & right))),
                seen=_write(state.seen, i, jnp.where(drifted, 0.0, state.seen[i] + learns)),
                replaced=state.replaced + drifted,
            )
            return state, _write(scores, i, score)

        scores = jnp.zeros((self.n_models, self.tree.C))
        state, scores = lax.fori_loop(0, self.n_models, visit, (state, scores))
        state = state._replace(rejected=state.rejected + (x.target.valid & ~good), t=state.t + 1)
        return state, self._vote(*ballot, scores)

    def _watch(self, detector: ADWIN, old: ADWINState, error, fed) -> tuple[ADWINState, Bool[Array, ""]]:
        """The detector after this error, if it is fed, and whether it fires."""
        new, alarm = detector.step(old, error.astype(old.total.dtype))
        return select(fed, new, old), fed & alarm.drift

    def _vote(self, right, seen, scores: Float[Array, "n C"]) -> Float[Array, " C"]:
        accuracy = right / jnp.maximum(seen, 1.0)
        votes = (jnp.where(accuracy > 0, accuracy, 1.0)[:, None] * scores).sum(0)
        return votes / votes.sum()

    def _poisson(self, key) -> Float[Array, " n"]:
        """One draw for each tree, by inversion: the rate is small and the same for all."""
        k = np.arange(int(self.lam + 10 * math.sqrt(self.lam) + 10))
        mass = np.exp(k * math.log(self.lam) - self.lam - np.array([math.lgamma(i + 1) for i in k]))
        return (jax.random.uniform(key, (self.n_models, 1)) > jnp.asarray(np.cumsum(mass), float)).sum(-1).astype(float)


def _read(stacked: Any, i: Any) -> Any:
    return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, i, keepdims=False), stacked)


def _write(stacked: Any, i: Any, row: Any) -> Any:
    return jax.tree.map(lambda a, r: lax.dynamic_update_index_in_dim(a, jnp.asarray(r, a.dtype), i, 0), stacked, row)


def _apart(leaf: Leaf, slot: Int[Array, ""]) -> Leaf:
    """The leaf in buffers of its own, by a loop of one turn that XLA cannot see through.

    Otherwise XLA reads it again after its slot has been overwritten, and for that copies the state at every event.
    """
    never = slot < 0
    return lax.while_loop(lambda c: c[0], lambda c: (never, select(never, _zeros(leaf), c[1])), (~never, leaf))[1]


def when(pred: Any, f: Callable, state: Any) -> Any:
    """`f(state)` if `pred`, else `state`; a loop of one turn or none updates in place where `lax.cond` may copy."""
    return lax.while_loop(lambda c: c[0], lambda c: (jnp.zeros_like(c[0]), f(c[1])), (pred, state))[1]


def _zeros(tree: Any) -> Any:
    return jax.tree.map(jnp.zeros_like, tree)


def _mask(n: int, members: tuple[int, ...]) -> np.ndarray:
    return np.isin(np.arange(n), members)


def _entropy(weights: Float[Array, "..."], axis: int = -1) -> Float[Array, "..."]:
    """Entropy in bits of the distribution over the classes on `axis`; 0 for no weight."""
    total = weights.sum(axis)
    parts = jnp.where(weights > 0, weights * jnp.log2(jnp.where(weights > 0, weights, 1.0)), 0.0).sum(axis)
    safe = jnp.where(total > 0, total, 1.0)
    return jnp.where(total > 0, jnp.log2(safe) - parts / safe, 0.0)
