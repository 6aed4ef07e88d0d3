"""Several learners as one, trusted as far as each has been right lately: Herbster and Warmuth's fixed share.

M. Herbster and M. K. Warmuth, "Tracking the Best Expert", Machine Learning 32(2), 1998.

    >>> import jax.numpy as jnp, optax
    >>> from anabranch.learn.linear import SoftmaxRegression
    >>> from anabranch.learn.neighbors import Neighbors
    >>> both = FixedShare((SoftmaxRegression(1, optax.sgd(0.1), classes=2), Neighbors(1, 2, k=1)), classes=2)
    >>> state = both.init()
    >>> for t in range(60):  # no linear rule says that one class is in the middle
    ...     x = t * 0.37 % 3
    ...     state = both.learn(state, jnp.array([x]), int(1 < x < 2))
    >>> bool(both.trust(state)[1] > 0.9)
    True
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from anabranch.cell import Event, Learner, Maybe, State, noise, select


class FixedShareState(NamedTuple):
    """The states of the learners, and the logarithm of the trust in each."""

    learners: tuple[State, ...]
    trust: Float[Array, " n"]


class FixedShare(Learner):
    """The mean of what some classifiers say, weighted by the trust in each.

    Stream: `Event(x, Maybe(label i32, valid), weight)`. Output: class scores f32[C] that sum to 1. State:
    `FixedShareState`.

    After each labelled event the trust in a learner falls by exp(-eta * loss), where loss is the Brier score of what it
    had said, between 0 and 2; then all give `share` of their trust away, in equal parts. So a learner that was wrong
    for long is back soon after the stream has changed in its favour. Over n events the loss is at most about
    (ln N + n * share) / eta above that of the best of N learners, and ln(N / share) / eta more for every time that
    another one becomes the best.

    Raises:
        ValueError: if there is no learner, eta is not positive, or share does not lie in [0, 1).
    """

    learners: tuple[Learner, ...]
    classes: int = eqx.field(static=True)
    eta: float = eqx.field(static=True, default=0.5)
    share: float = eqx.field(static=True, default=0.01)

    def __init__(self, learners: Sequence[Learner], classes: int, eta: float = 0.5, share: float = 0.01):
        if not learners:
            raise ValueError("learners: there must be at least one, got none")
        if not eta > 0:
            raise ValueError(f"eta must be positive, got {eta}")
        if not 0 <= share < 1:
            raise ValueError(f"share must lie in [0, 1), got {share}")
        self.learners, self.classes, self.eta, self.share = tuple(learners), classes, eta, share

    def init(self, *, key: PRNGKeyArray | None = None) -> FixedShareState:
        n = len(self.learners)
        keys = [None if key is None else noise(key, i, "learner") for i in range(n)]
        states = tuple(one.init(key=key) for one, key in zip(self.learners, keys, strict=True))
        return FixedShareState(states, jnp.full(n, -math.log(n)))

    def trust(self, state: FixedShareState) -> Float[Array, " n"]:
        """How much each learner counts; the sum is 1."""
        return jax.nn.softmax(state.trust)

    def predict(self, state: FixedShareState, x: Any) -> Float[Array, " C"]:
        said = [one.predict(own, x) for one, own in zip(self.learners, state.learners, strict=True)]
        return self.trust(state) @ self._scores(said)

    def learn(self, state: FixedShareState, x: Any, target: Int[Array, ""], weight: Any = 1.0) -> FixedShareState:
        return self.step(state, Event(x, Maybe(jnp.asarray(target), jnp.array(True)), weight))[0]

    def step(self, state: FixedShareState, x: Event) -> tuple[FixedShareState, Float[Array, " C"]]:
        pairs = [one.step(own, x) for one, own in zip(self.learners, state.learners, strict=True)]
        scores, y = self._scores([said for _, said in pairs]), jnp.asarray(x.target.value)
        loss = ((scores - jax.nn.one_hot(y, self.classes)) ** 2).sum(-1)
        told = x.target.valid & (0 <= y) & (y < self.classes) & jnp.isfinite(loss).all()
        trust = jax.nn.softmax(state.trust - self.eta * jnp.where(told, x.weight * loss, 0.0))
        shared = jnp.log((1 - self.share) * trust + self.share / len(self.learners))
        learned = tuple(own for own, _ in pairs)
        return FixedShareState(learned, select(told, shared, state.trust)), self.trust(state) @ scores

    def _scores(self, said: Sequence[Any]) -> Float[Array, "n C"]:
        """What the learners say, as shares of the classes; a number alone is the probability of class 1."""
        return jnp.stack([jnp.stack([1 - one, one]) if jnp.ndim(one) == 0 else one for one in map(jnp.asarray, said)])
