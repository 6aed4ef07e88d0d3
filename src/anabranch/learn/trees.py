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

import math
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt32

from anabranch.branch import branch
from anabranch.cell import Event, Learner, noise, select

N, MEAN, SQUARES, LOW, HIGH = range(5)  # rows of the statistics; a nominal feature has its counts from row 1 on
SINCE, MAJORITY, BAYES = range(3)  # columns of a leaf's tally
HALVE = 2.0**22  # float32 counts stop growing at 2^24


class Leaf(NamedTuple):
    """What is held of one leaf, or stacked of L: C classes, F watched features, R = 5 rows (or 1 + values if more)."""

    weight: Float[Array, "*L C"]
    """Weight by class, including what was inherited at the split."""
    stats: Float[Array, "*L C R F"]
    """Of what was seen here: weight, mean, sum of squared deviations, least and greatest value; or counts by value."""
    tally: Float[Array, "*L 3"]
    """Weight since the last attempt, and the weight on which the majority class and naive Bayes were right."""
    watched: Int[Array, "*L F"] | None
    """The features this leaf watches, if not all."""


class Tree(NamedTuple):
    """The state of a `HoeffdingTree`: M nodes and L leaf slots. Children are made in pairs and stay neighbours."""

    feature: Int[Array, " M"]
    """The feature an inner node tests; -1 for a leaf."""
    threshold: Float[Array, " M"]
    """Left if x[feature] <= threshold, or == threshold for a nominal feature."""
    child: Int[Array, " M"]
    """Of an inner node its left child (the right one follows it); of a leaf its slot."""
    leaves: Leaf
    n_leaves: Int[Array, ""]
    denied: Int[Array, ""]
    """Splits that were due and found no free slot."""
    rejected: Int[Array, ""]
    """Labelled events that were ignored: label out of range, weight negative or not finite, bad feature."""
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
        >>> tree = HoeffdingTree(D=1, C=2, max_leaves=4)
        >>> x = jax.random.uniform(jax.random.PRNGKey(0), (1000, 1))
        >>> events = Event(x, Maybe((x[:, 0] > 0.5).astype(int), jnp.ones(1000, bool)), jnp.ones(1000))
        >>> state, scores = jax.lax.scan(tree.step, tree.init(), events)
        >>> int(state.n_leaves), int(state.feature[0]), bool(0.4 < state.threshold[0] < 0.6)
        (2, 0, True)
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
        if self.subspace is not None and key is None:
            raise ValueError("a tree with a subspace draws features at random: init needs a key")
        M, L, C, F = 2 * self.max_leaves - 1, self.max_leaves, self.C, self.subspace or self.D
        R = max(5, 1 + self.n_values) if self.nominal else 5
        watched = None
        if self.subspace is not None:
            watched = jnp.zeros((L, F), jnp.int32).at[0].set(self._draw(key, 1))
        return Tree(
            feature=jnp.full(M, -1, jnp.int32),
            threshold=jnp.zeros(M),
            child=jnp.zeros(M, jnp.int32),
            leaves=Leaf(jnp.zeros((L, C)), jnp.zeros((L, C, R, F)), jnp.zeros((L, 3)), watched),
            n_leaves=jnp.int32(1),
            denied=jnp.int32(0),
            rejected=jnp.int32(0),
            key=key if self.subspace is not None else None,
        )

    def predict(self, state: Tree, x: Float[Array, " D"]) -> Float[Array, " C"]:
        _, slot = self._route(state, x)
        return self._vote(_read(state.leaves, slot), x)[0]

    def learn(self, state: Tree, x: Float[Array, " D"], target: Int[Array, ""], weight: Any = 1.0) -> Tree:
        return self._update(state, x, target, weight, jnp.asarray(True))[0]

    def step(self, state: Tree, x: Event) -> tuple[Tree, Float[Array, " C"]]:
        return self._update(state, x.x, x.target.value, x.weight, jnp.asarray(x.target.valid))

    def _update(self, state: Tree, x, y, weight, valid) -> tuple[Tree, Float[Array, " C"]]:
        """Predict and learn with one routing. What is not to be learned is written back as it was."""
        x, weight = jnp.asarray(x, float), jnp.asarray(weight, float)
        node, slot = self._route(state, x)
        leaf = _apart(_read(state.leaves, slot), slot)
        scores, majority, bayes = self._vote(leaf, x)

        good = (0 <= y) & (y < self.C) & (weight >= 0) & jnp.isfinite(weight)
        if not self.missing:
            good &= self._known(x, jnp.arange(self.D)).all()
        y = jnp.clip(y, 0, self.C - 1)
        weight = jnp.where(valid & good, weight, 0.0)
        empty = leaf.weight.sum() == 0
        leaf = leaf._replace(
            weight=leaf.weight.at[y].add(weight),
            stats=self._observe(leaf, x, y, weight),
            tally=leaf.tally
            + weight * jnp.stack([jnp.ones(()), (empty | (majority == y)) * 1.0, (~empty & (bayes == y)) * 1.0]),
        )

        due = (weight > 0) & (leaf.tally[SINCE] >= self.grace)
        full = state.n_leaves >= self.max_leaves
        result = branch(due, self._attempt, self._no_attempt, leaf, full, state.n_leaves, state.key)
        # Not split: everything below writes back what is there. The pair of new nodes follows those in use; indices
        # past the end are clamped by both the read and the write. The new slot has not been used: its statistics are 0.
        new, pair, child = state.n_leaves, 2 * state.n_leaves - 1, state.child
        leaves = {
            name: _write(old, new, jnp.where(result.split, right, _read(old, new)))
            for name, old, right in (
                ("weight", state.leaves.weight, result.right),
                ("watched", state.leaves.watched, result.watched),
            )
            if old is not None
        }
        if self.max_leaves > 1:
            slots = jnp.where(result.split, jnp.stack([slot, new]), lax.dynamic_slice(child, (pair,), (2,)))
            child = lax.dynamic_update_slice(child, slots, (pair,))
        state = state._replace(
            feature=_write(state.feature, node, jnp.where(result.split, result.feature, -1)),
            threshold=_write(state.threshold, node, jnp.where(result.split, result.threshold, 0.0)),
            child=_write(child, node, jnp.where(result.split, pair, slot)),
            leaves=_write(state.leaves._replace(**leaves), slot, result.leaf),
            n_leaves=state.n_leaves + result.split,
            denied=state.denied + result.denied,
            rejected=state.rejected + (valid & ~good),
        )
        return state, scores

    def _route(self, state: Tree, x) -> tuple[Int[Array, ""], Int[Array, ""]]:
        """The leaf that x falls into: its node and its slot."""
        nominal = _mask(self.D, self.nominal)

        def descend(node):
            feature, threshold, left = state.feature[node], state.threshold[node], state.child[node]
            value = x[feature]
            right = value > threshold
            if self.nominal:
                right = jnp.where(jnp.asarray(nominal)[feature], value != threshold, right)
            if self.missing:
                right = branch(
                    ~self._known(value, feature),
                    lambda state, left, right: self._below(state, left + 1) > self._below(state, left),
                    lambda state, left, right: right,
                    *(state, left, right),
                )
            return left + right

        node = lax.while_loop(lambda node: state.feature[node] >= 0, descend, jnp.int32(0))
        return node, state.child[node]

    def _below(self, state: Tree, node) -> Float[Array, ""]:
        """The weight in the leaves under a node."""
        M = 2 * self.max_leaves - 1
        inner = state.feature >= 0

        # Children come after their parents, so one pass in order marks everything under the node.
        def mark(i, under):
            pair = jnp.where(inner[i], state.child[i], M)  # past the end: dropped
            return under.at[jnp.stack([pair, pair + 1])].max(under[i], mode="drop")

        under = lax.fori_loop(0, M, mark, jnp.arange(M) == node)
        mass = state.leaves.weight.sum(-1)[jnp.where(inner, 0, state.child)]
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

    def _no_attempt(self, leaf: Leaf, full, n_leaves, key) -> Attempt:
        no = jnp.zeros((), bool)
        return Attempt(no, no, jnp.int32(-1), jnp.zeros(()), leaf, leaf.weight, leaf.watched)

    def _attempt(self, leaf: Leaf, full, n_leaves, key) -> Attempt:
        """Split the leaf if its best test leads by more than the Hoeffding bound."""
        C, total = self.C, leaf.weight.sum()
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
            index, watched = leaf.watched[best], (self._draw(key, 2 * n_leaves), self._draw(key, 2 * n_leaves + 1))
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
        pick = lambda a: jnp.take_along_axis(a, jnp.expand_dims(best, tuple(range(a.ndim - 1))), 0)[0]  # noqa: E731
        return pick(merit), pick(threshold), pick(left), pick(right)

    def _draw(self, key, index) -> Int[Array, " F"]:
        """The features that a leaf watches."""
        return jax.random.permutation(noise(key, index, "subspace"), self.D)[: self.subspace].astype(jnp.int32)


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
