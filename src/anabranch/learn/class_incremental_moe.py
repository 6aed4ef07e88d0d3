"""Wójcik et al.: Domain-Agnostic Neural Architecture for Class Incremental Continual Learning. ACL 2023, 2307.05399.

Classes come one after the other, and no example is kept. Many small linear experts share the work by place: the few
whose keys are nearest to an input vote and learn, and what one class moves is one row of those experts, so that old
classes are forgotten only as far as their inputs and the new ones meet in the same experts. The choice is soft, hence
the keys can learn as well.

    >>> cell = DEE(4, 3, N=8, k=2)
    >>> cell.predict(cell.init(key=jax.random.PRNGKey(0)), jnp.ones(4)).shape
    (3,)
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from anabranch.cell import Event, Learner, Maybe, noise, select

LIMIT = 250.0
"""τ: an expert's score lies within ±τ."""


def _dual(score: Float[Array, " N"], k: int, epsilon: float) -> Float[Array, " N"]:
    """Shares σ((score + g) / ε) whose sum is k, with g found by bisection."""

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) / 2
        enough = jax.nn.sigmoid((score + middle) / epsilon).sum() >= k
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    reach = 40 * epsilon  # beyond which every sigmoid is 0 or 1
    low, high = lax.fori_loop(0, 40, halve, (-score.max() - reach, -score.min() + reach))
    return jax.nn.sigmoid((score + (low + high) / 2) / epsilon)


@jax.custom_jvp
def _shares(score: Float[Array, " N"], k: Any, epsilon: Any) -> Float[Array, " N"]:
    return _dual(score, k, epsilon)


@_shares.defjvp
def _shares_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    score, k, epsilon = primals
    share = _dual(score, k, epsilon)
    slope = share * (1 - share) / epsilon
    # The sum of the shares stays k: what all scores gain together, g takes back.
    common = (slope @ tangents[0]) / jnp.maximum(slope.sum(), 1e-12)
    return share, slope * (tangents[0] - common)


def soft_topk(distance: Float[Array, " N"], k: int, epsilon: float = 5e-4) -> Float[Array, " N"]:
    """How much each of N belongs to the k with the smallest distance: shares in [0, 1] whose sum is k.

    They are the optimal transport of the mass 1/N of every distance s to the anchors 0 (mass k/N) and 1, at the cost
    (s - anchor)² over its maximum, with entropy ε. With two anchors the plan is a logistic function of the difference
    of the costs, with one unknown that makes the sum k: it is found by bisection, where the paper takes 400 steps of
    Sinkhorn, which at this ε are too few. The gradient is that of the plan itself.

    Raises:
        ValueError: if k is not below N.
    """
    if not 1 <= k < len(distance):
        raise ValueError(f"k must lie in 1..{len(distance) - 1}, got {k}")
    cost = jnp.maximum(distance**2, (distance - 1) ** 2).max()
    scale = lax.stop_gradient(jnp.maximum(cost, 1e-12))
    return _shares(((distance - 1) ** 2 - distance**2) / scale, jnp.float32(k), jnp.float32(epsilon))


class DEEState(NamedTuple):
    """Experts, keys, and what is known of the stream."""

    weight: Float[Array, "N C d"]
    bias: Float[Array, "N C"]
    keys: Float[Array, "N d"]
    """Unit vectors."""
    adam: PyTree
    """Of the keys."""
    seen: Int[Array, " C"]
    """Examples learned of each class."""
    saturated: Int[Array, ""]
    """Learned events at which an expert that voted scored the true class beyond 0.99 τ, where tanh is flat."""
    rejected: Int[Array, ""]
    """Labelled events left out: an unknown class or an x that is not finite."""


class DEE(Learner):
    """N small linear experts, of which about k, whose keys are nearest to the input, vote and learn.

    Stream: `Event(x f32[d], Maybe(label i32, valid), weight)`, x the features of a frozen extractor. Output: scores
    f32[C]. State: `DEEState`, N * (C + 3) * d words and a little. No example is kept.

    An expert's scores are τ tanh((W x + b) / τ). The vote is the mean of γ times them, weighted by γ and the cosine of
    key and input, γ being `soft_topk` of the distances 1 - cosine with shares below 0.3 set to 0. The loss is minus the
    score of the true class: nothing pushes old classes down. Experts move by the sign of their gradient, and those
    without any not at all. Keys follow by Adam the inputs they were chosen for, and the vote. The weight of an event is
    not used, but for 0, which learns nothing.

    Where the official code and this one differ: there a batch shares the normalisation of the costs, here each event
    has its own; there weight decay has the wrong sign; there no optimiser steps the keys, as here with `key_rate=0`.
    An input of zeros selects nobody and its scores are 0.

    Args:
        d: number of features.
        C: number of classes.
        N: number of experts.
        k: how many are chosen.
        learning_rate: step of the experts.
        decay: weight decay of the experts.
        key_rate: of the keys' Adam.
        epsilon: entropy of the choice.

    Raises:
        ValueError: if k is not below N.
    """

    smooth = False

    d: int = eqx.field(static=True)
    C: int = eqx.field(static=True)
    N: int = eqx.field(static=True, default=128)
    k: int = eqx.field(static=True, default=16)
    learning_rate: float = eqx.field(static=True, default=1e-4)
    decay: float = eqx.field(static=True, default=1e-4)
    key_rate: float = eqx.field(static=True, default=5e-5)
    epsilon: float = eqx.field(static=True, default=5e-4)

    def __check_init__(self):
        if not 1 <= self.k < self.N:
            raise ValueError(f"k must lie in 1..N-1={self.N - 1}, got {self.k}")

    def init(self, *, key: PRNGKeyArray | None = None) -> DEEState:
        key = jax.random.PRNGKey(0) if key is None else key
        drawn = jax.random.normal(noise(key, 0, "keys"), (self.N, self.d))
        keys = drawn / jnp.linalg.norm(drawn, axis=1, keepdims=True)
        draw = jax.nn.initializers.variance_scaling(
            1.0, "fan_in", "truncated_normal", in_axis=-1, out_axis=-2, batch_axis=0
        )
        return DEEState(
            weight=draw(noise(key, 0, "weight"), (self.N, self.C, self.d)),
            bias=jnp.zeros((self.N, self.C)),
            keys=keys,
            adam=optax.adam(self.key_rate).init(keys),
            seen=jnp.zeros(self.C, jnp.int32),
            saturated=jnp.int32(0),
            rejected=jnp.int32(0),
        )

    def gate(self, keys: Float[Array, "N d"], x: Float[Array, " d"]) -> tuple[Float[Array, " N"], Float[Array, " N"]]:
        """The shares γ and the cosines of all experts."""
        length = jnp.linalg.norm(x)
        cosine = keys @ jnp.where(length > 0, x / jnp.where(length > 0, length, 1.0), 0.0)
        share = soft_topk(1 - cosine, self.k, self.epsilon)
        return jnp.where((share >= 0.3) & (length > 0), share, 0.0), cosine

    def experts(self, state: DEEState, x: Float[Array, " d"]) -> Float[Array, "N C"]:
        """The scores that each expert gives."""
        return LIMIT * jnp.tanh((state.weight @ x + state.bias) / LIMIT)

    def vote(
        self, share: Float[Array, " N"], cosine: Float[Array, " N"], scores: Float[Array, "N *C"]
    ) -> Float[Array, "*C"]:
        """What the experts say together."""
        total = share @ cosine
        total = jnp.where(jnp.abs(total) < 1e-6, jnp.where(total < 0, -1e-6, 1e-6), total)
        return (share * cosine * share) @ scores / total

    def predict(self, state: DEEState, x: Float[Array, " d"]) -> Float[Array, " C"]:
        x = jnp.asarray(x, jnp.float32)
        return self.vote(*self.gate(state.keys, x), self.experts(state, x))

    def learn(self, state: DEEState, x: Any, target: Any, weight: Any = 1.0) -> DEEState:
        x, y = jnp.asarray(x, jnp.float32), jnp.asarray(target, jnp.int32)
        good = jnp.isfinite(x).all() & (0 <= y) & (y < self.C)
        clean, label = jnp.where(jnp.isfinite(x), x, 0.0), jnp.clip(y, 0, self.C - 1)

        # The loss knows the scores of the true class alone: the other rows of the experts are not touched.
        rows = _Learned(state.weight[:, label], state.bias[:, label], state.keys)

        def loss(learned: _Learned) -> tuple[Array, tuple[Array, Array]]:
            share, cosine = self.gate(learned.keys, clean)
            scores = LIMIT * jnp.tanh((learned.weight @ clean + learned.bias) / LIMIT)
            return -self.vote(share, cosine, scores) + (1 - cosine) @ share, (share, scores)

        grads, (share, scores) = jax.grad(loss, has_aux=True)(rows)
        learns = good & (jnp.asarray(weight) != 0) & (share > 0).any()

        def move(w: Array, g: Array) -> Array:
            # Exact zeros are those of experts that did not vote.
            return jnp.where(learns & (g != 0), w - self.learning_rate * (jnp.sign(g) + self.decay * w), w)

        updates, adam = optax.adam(self.key_rate).update(grads.keys, state.adam)
        keys: Any = optax.apply_updates(state.keys, updates)
        high = ((jnp.abs(scores) > 0.99 * LIMIT) & (share > 0)).any()
        learned = state._replace(
            keys=keys / jnp.linalg.norm(keys, axis=1, keepdims=True),
            adam=adam,
            seen=state.seen.at[label].add(1),
            saturated=state.saturated + high,
        )
        return select(learns, learned, state)._replace(
            weight=state.weight.at[:, label].set(move(rows.weight, grads.weight)),
            bias=state.bias.at[:, label].set(move(rows.bias, grads.bias)),
            rejected=state.rejected + ~good,
        )


class _Learned(NamedTuple):
    """What an event of one class can move: that class's row of every expert, and the keys."""

    weight: Float[Array, "N d"]
    bias: Float[Array, " N"]
    keys: Float[Array, "N d"]


def example() -> tuple[DEE, Event]:
    """Eight experts on four features, and 24 events of three classes that come one after the other."""
    rng = np.random.default_rng(0)
    label = np.repeat(np.arange(3), 8).astype(np.int32)
    x = (rng.normal(size=(24, 4)) + 2 * np.eye(3, 4)[label]).astype(np.float32)
    cell = DEE(4, 3, N=8, k=2, learning_rate=0.01, key_rate=1e-3, epsilon=0.05)
    return cell, Event(x, Maybe(label, np.ones(24, bool)), np.ones(24, np.float32))
