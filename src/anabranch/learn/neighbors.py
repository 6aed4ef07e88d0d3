"""Nearest neighbours among the last events: a classifier that forgets by itself.

The convention is River's `KNNClassifier(engine=LazySearch(window_size))`: distances are Euclidean, neighbours vote with
the inverse of theirs, and those at distance 0, if there are any, are the only ones that vote.

    >>> import jax.numpy as jnp
    >>> knn = Neighbors(features=1, classes=2, k=1, window=4)
    >>> state = knn.init()
    >>> for x, y in [(0.0, 0), (1.0, 1), (5.0, 0)]:
    ...     state = knn.learn(state, jnp.array([x]), y)
    >>> knn.predict(state, jnp.array([0.8])).tolist()
    [0.0, 1.0]
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from anabranch.cell import Learner


class NeighborsState(NamedTuple):
    """The last events; a class of -1 is an empty place."""

    x: Float[Array, "W D"]
    y: Int[Array, " W"]
    seen: Int[Array, ""]
    """Events learned; the next one goes to place `seen % W`."""
    rejected: Int[Array, ""]
    """Events that were ignored: a feature was not finite, or the class is none of them."""


class Neighbors(Learner):
    """k nearest neighbours among the last `window` labelled events. Predicts the shares f32[C] of the classes.

    Every feature counts as it is: put a `Scaled` in front unless they have one scale. A neighbour counts as one event
    whatever the `weight` of it, unless that is 0. With nothing learned, all classes are alike.

    Cover and Hart, "Nearest neighbor pattern classification", IEEE Transactions on Information Theory 13(1), 1967.

    Raises:
        ValueError: if a size is not positive, or there are fewer places than neighbours.
    """

    features: int = eqx.field(static=True)
    classes: int = eqx.field(static=True)
    k: int = eqx.field(static=True, default=5)
    window: int = eqx.field(static=True, default=1000)

    def __check_init__(self):
        for name in ("features", "classes", "k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.window < self.k:
            raise ValueError(f"window must be at least k={self.k}, got {self.window}")

    def init(self, *, key: PRNGKeyArray | None = None) -> NeighborsState:
        zero = jnp.int32(0)
        return NeighborsState(jnp.zeros((self.window, self.features)), jnp.full(self.window, -1, jnp.int32), zero, zero)

    def predict(self, state: NeighborsState, x: Float[Array, " D"]) -> Float[Array, " C"]:
        x = self._features(x)
        square = jnp.where(state.y >= 0, ((state.x - x) ** 2).sum(-1), jnp.inf)

        def take(i, carry):
            # One after the other: a sort anywhere in it keeps XLA from compiling the loop over events as one function.
            square, votes, exact = carry
            at = jnp.argmin(square)
            near, hit = square[at], jnp.arange(self.classes) == state.y[at]
            there = jnp.isfinite(near)
            vote = jnp.where(there & (near > 0), lax.rsqrt(jnp.where(near > 0, near, 1.0)), 0.0)
            return square.at[at].set(jnp.inf), votes + vote * hit, exact + ((near == 0) & hit)

        zero = jnp.zeros(self.classes)
        _, votes, exact = lax.fori_loop(0, self.k, take, (square, zero, zero))
        votes = jnp.where(exact.any(), exact, votes)
        total = votes.sum()
        return jnp.where(total > 0, votes / jnp.where(total > 0, total, 1.0), 1 / self.classes)

    def learn(
        self, state: NeighborsState, x: Float[Array, " D"], target: Int[Array, ""], weight: Any = 1.0
    ) -> NeighborsState:
        x, y = self._features(x), jnp.asarray(target, jnp.int32)
        good = jnp.isfinite(x).all() & (0 <= y) & (y < self.classes)
        at = state.seen % self.window
        kept = good & (jnp.asarray(weight) > 0)
        put = lambda array, new: array.at[at].set(jnp.where(kept, new, array[at]))
        return NeighborsState(put(state.x, x), put(state.y, y), state.seen + kept, state.rejected + ~good)

    def _features(self, x: Any) -> Float[Array, " D"]:
        if jnp.shape(x) != (self.features,):
            raise ValueError(f"Neighbors: x must have shape ({self.features},), got {jnp.shape(x)}")
        return jnp.asarray(x, jnp.float32)
