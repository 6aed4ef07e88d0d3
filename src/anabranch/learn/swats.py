"""Keskar, Socher: Improving Generalization Performance by Switching from Adam to SGD. arXiv 1712.07628, 2017.

Adam makes fast progress at first, stochastic gradient descent often generalises better in the end. `swats` is an optax
transformation that begins as Adam and, once and for all, becomes SGD with momentum. When, and at what rate, it reads
from Adam's own steps: for a step p at the gradient g, γ = pᵀp / (−pᵀg) is the rate for which the orthogonal projection
of the SGD step −γg on p is p itself. When γ agrees with its running mean, the mean becomes the rate Λ.

The stream is one of gradients; the state, `SwatsState`, is three times as large as the parameters.

The test of the paper, |mean − γ| < 1e-9, does not fire in practice: γ moves by a factor of ten from step to step. The
default asks instead for a mean over at least 1,000 steps, the memory of the mean, and for γ within 0.1 % of it. The
paper's own is `swats(warmup=1, rtol=0, atol=1e-9)`. Either way the step at which γ crosses its mean is partly chance;
the rate is what the method finds.

Two more differences: γ counts only where it is positive, since a negative one (momentum against the gradient) is no
rate; and ε stands where optax has it, outside the bias correction, so that the steps before the switch are those of
`optax.adam` bit for bit.

Where a stream changes, Adam is wanted again: `rearm` gives the state as it was at first, and `Rearmed` does so when a
drift detector says so (both are ours).

Weight decay belongs before (`optax.chain(optax.add_decayed_weights(1e-4), swats())`), a decay of the rate after
(`optax.chain(swats(), optax.scale_by_schedule(decay))`): there it scales both phases and leaves γ alone.

    >>> optimizer = swats(1e-3, warmup=1)
    >>> w = jnp.zeros(2)
    >>> state = optimizer.init(w)
    >>> for _ in range(3):  # a constant gradient: γ settles at once, at α P / Σ|g|
    ...     updates, state = optimizer.update(jnp.array([1.0, 3.0]), state, w)
    >>> int(state.switched_at), round(float(state.rate), 6)
    (2, 0.0005)
"""

import math
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from anabranch.cell import Event, Learner, Maybe, select
from anabranch.learn.base import Detector, Sgd, SgdState, label


class SwatsState(NamedTuple):
    """Adam's means, the running mean of γ, and what SGD goes on with."""

    adam: Any
    """Number of steps and both moments of the gradient, as optax has them; at rest after the switch."""
    velocity: PyTree
    """SGD's momentum, zero until the switch."""
    average: Float[Array, ""]
    """Running mean of γ, still biased towards zero."""
    averaged: Int[Array, ""]
    """How many γ are in it."""
    rate: Float[Array, ""]
    """Λ, the rate of SGD; 0 until the switch."""
    steps: Int[Array, ""]
    """Gradients so far, without those passed over."""
    switched_at: Int[Array, ""]
    """The last step of Adam, counted from 1; 0 until the switch."""


def swats(
    learning_rate: float = 1e-3,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-9,
    *,
    warmup: int = 1000,
    rtol: float = 1e-3,
    atol: float = 0.0,
    scope: Literal["global", "tensor"] = "global",
) -> optax.GradientTransformation:
    """Adam that becomes SGD with momentum at the rate that its own steps suggest.

    A gradient that is not finite is passed over: no update, and the state stays.

    Arguments:
        learning_rate: of Adam.
        b1: decay of Adam's mean of gradients; also the momentum of SGD, whose rate is (1 − b1) Λ.
        b2: decay of Adam's mean of squares; also of the mean of γ.
        eps: of Adam.
        warmup: the switch comes after step `warmup` at the earliest.
        rtol: the switch comes where |mean − γ| ≤ atol + rtol · γ.
        atol: see `rtol`.
        scope: "global" is one rate and one switch for all parameters; with "tensor" each array has a `SwatsState` of
            its own, finds its own rate, and switches by itself.

    Raises:
        ValueError: if an argument is out of range.
    """
    if learning_rate <= 0 or not 0 <= b1 < 1 or not 0 < b2 < 1:
        raise ValueError(
            f"swats needs learning_rate > 0, 0 <= b1 < 1 and 0 < b2 < 1, got {learning_rate=}, {b1=} and {b2=}"
        )
    if warmup < 1 or rtol < 0 or atol < 0:
        raise ValueError(f"swats needs warmup >= 1, rtol >= 0 and atol >= 0, got {warmup=}, {rtol=} and {atol=}")
    if scope not in ("global", "tensor"):
        raise ValueError(f'swats: scope must be "global" or "tensor", got {scope!r}')
    adam = optax.chain(optax.scale_by_adam(b1, b2, eps), optax.scale(-learning_rate))

    def init(params: PyTree) -> SwatsState:
        zero, none = jnp.zeros(()), jnp.int32(0)
        return SwatsState(adam.init(params), jax.tree.map(jnp.zeros_like, params), zero, none, zero, none, none)

    def adam_step(grads: PyTree, state: SwatsState) -> tuple[PyTree, SwatsState]:
        steps = state.steps + 1
        p, moments = adam.update(grads, state.adam)
        square, slope = optax.tree.vdot(p, p), -jnp.asarray(optax.tree.vdot(p, grads))
        scale = square / jnp.where(slope > 0, slope, 1.0)
        # A step of size zero has no scale: nothing has been learned about the rate.
        usable = (slope > 0) & (scale > 0)
        average = jnp.where(usable, b2 * state.average + (1 - b2) * scale, state.average)
        averaged = state.averaged + usable
        mean = average / -jnp.expm1(jnp.maximum(averaged, 1) * math.log(b2))
        # The mean of one value is that value: agreement says nothing before the second.
        settled = usable & (averaged > 1) & (steps > warmup) & (jnp.abs(mean - scale) <= atol + rtol * scale)
        return p, state._replace(
            adam=moments,
            average=average,
            averaged=averaged,
            steps=steps,
            rate=jnp.where(settled, mean, 0.0),
            switched_at=jnp.where(settled, steps, 0),
        )

    def sgd_step(grads: PyTree, state: SwatsState) -> tuple[PyTree, SwatsState]:
        velocity = jax.tree.map(lambda v, g: b1 * v + g, state.velocity, grads)
        updates = jax.tree.map(lambda v: -(1 - b1) * state.rate * v, velocity)
        return updates, state._replace(velocity=velocity, steps=state.steps + 1)

    def update(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, SwatsState]:
        grads = updates  # optax calls them so
        # Both steps are as cheap as reading the gradient, so a choice between them costs less than a branch.
        step, new = select(state.switched_at > 0, sgd_step(grads, state), adam_step(grads, state))
        fine = jnp.array([jnp.isfinite(g).all() for g in jax.tree.leaves(grads)]).all()
        return select(fine, (step, new), (jax.tree.map(jnp.zeros_like, step), state))

    whole = optax.GradientTransformation(init, update)
    return whole if scope == "global" else _each_tensor(whole)


def _each_tensor(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimiser for each array by itself."""

    def update(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, PyTree]:
        grads, structure = jax.tree.flatten(updates)
        steps, states = zip(*map(optimizer.update, grads, structure.flatten_up_to(state)), strict=True)
        return structure.unflatten(steps), structure.unflatten(states)

    return optax.GradientTransformation(lambda params: jax.tree.map(optimizer.init, params), update)


def rearm(state: PyTree) -> PyTree:
    """The state of `swats` before its first gradient: Adam begins anew, and counts its steps from 1."""
    return jax.tree.map(jnp.zeros_like, state)


class Rearmed(Learner):
    """An online learner whose `swats` goes back to Adam when a detector finds that its errors have changed.

    Stream and output are those of `Sgd`; the state is that of the learner and that of the detector.
    """

    learner: Sgd
    detector: Detector

    smooth = False

    def init(self, *, key: PRNGKeyArray | None = None) -> tuple[SgdState, Any]:
        return self.learner.init(key=key), self.detector.init()

    def predict(self, state: tuple[SgdState, Any], x: Any) -> Any:
        return self.learner.predict(state[0], x)

    def learn(self, state: tuple[SgdState, Any], x: Any, target: Any, weight: Any = 1.0) -> tuple[SgdState, Any]:
        wrong = label(self.predict(state, x)) != target
        detector, alarm = self.detector.step(state[1], wrong.astype(jnp.float32))
        learner = self.learner.learn(state[0], x, target, weight)
        optimizer = select(alarm.drift, rearm(learner.optimizer), learner.optimizer)
        return learner._replace(optimizer=optimizer), detector


def example() -> tuple[Sgd, Event]:
    """A linear classifier of two features, learned from 72 events, with the switch at about the tenth."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(72, 2)).astype(np.float32)
    label = (x[:, 0] > 0.2).astype(np.int32)
    model = eqx.nn.Linear(2, 2, key=jax.random.PRNGKey(0))
    cell = Sgd(model, swats(1e-2, warmup=4, rtol=0.5))
    return cell, Event(x, Maybe(label, np.ones(72, bool)), np.ones(72, np.float32))
