"""Høier, Staudt, Zach: Dual Propagation: Accelerating Contrastive Hebbian Learning with Dyadic Neurons.

arXiv 2302.01228, ICML 2023. A layered network learns without a backward pass: each neuron holds two states, s⁺ and s⁻.
Their mean s̄ = α s⁺ + (1 − α) s⁻ is its activity, their difference δ = s⁺ − s⁻ its error. With a = W s̄ from the layer
below and b = Wᵀδ from the one above, a hidden layer settles at

    s⁺ = f(a + α b),  s⁻ = f(a − (1 − α) b),

and the output at a − α c and a + (1 − α) c, where c = β ∇ℓ is the slope of the loss at the first prediction. One sweep
from the output down is enough and costs what back-propagation does; the weights then learn from what their two ends
hold, by −δ s̄ᵀ / β.

`DualProp` is a `Backprop`: it stands where a loss does in `fit` and `Sgd`. With α = ½ its gradient equals that of
back-propagation as β → 0, and for any β as long as no unit of f crosses zero. δ is a difference of close numbers: in
float32, keep β at 0.01 or above.

Not here: the damped updates of the follow-up, and the asynchronous orders.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from anabranch.cell import Event, Maybe
from anabranch.fit import Backprop
from anabranch.learn.base import Sgd, cross_entropy


class Network(eqx.Module):
    """Layers with ReLU between them; the last one gives the scores.

    A layer is affine in its input (`eqx.nn.Linear`, `eqx.nn.Conv2d`), and may be wrapped with max-pooling or reshaping.
    """

    layers: tuple[Callable, ...]

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, " C"]:
        for layer in self.layers[:-1]:
            x = jax.nn.relu(layer(x))
        return self.layers[-1](x)


class Dyads(NamedTuple):
    """The neurons of all layers, the input first, for a batch of B."""

    mean: list[Float[Array, "B ..."]]
    """s̄: activities; of the last layer, scores."""
    delta: list[Float[Array, "B ..."]]
    """s⁺ − s⁻, about −β times the gradient of the loss with respect to what the layer is given."""


class DualProp(Backprop):
    """The gradient of a `Network` by dual propagation.

    `loss(model, (x, y), key)` must be a mean over the batch of losses of each example's scores, like `cross_entropy`.

    Raises:
        ValueError: if an argument is out of range, or the model is not a `Network` or holds batch normalisation.
    """

    alpha: float = eqx.field(static=True, default=0.5)
    """Share of s⁺ in the activity, in [0, 1]."""
    beta: float = eqx.field(static=True, default=0.1)
    """How far the output is nudged."""
    sweeps: int = eqx.field(static=True, default=1)
    """How often the layers settle; the first time from the output down, then up and down again."""
    adjoint: bool = eqx.field(static=True, default=False)
    """Swap α and 1 − α in the hidden layers, as the follow-up does: stable also where α is not ½."""

    def __check_init__(self):
        if not 0 <= self.alpha <= 1 or self.beta <= 0 or self.sweeps < 1:
            wanted = "alpha in [0, 1], beta > 0 and sweeps >= 1"
            raise ValueError(f"DualProp needs {wanted}, got {self.alpha=}, {self.beta=} and {self.sweeps=}")

    def value_and_grad(self, model: Any, batch: Any, key: PRNGKeyArray) -> tuple[Float[Array, ""], Any]:
        if not isinstance(model, Network):
            raise ValueError(f"DualProp learns a Network of layers, got {type(model).__name__}")
        is_norm = lambda node: isinstance(node, eqx.nn.BatchNorm)
        if any(map(is_norm, jax.tree.leaves(model, is_leaf=is_norm))):
            raise ValueError("DualProp: a layer holds BatchNorm, which is not a function of one example")
        value, dyads = infer_states(self, model, batch, key)

        def hebbian(model: Network) -> Float[Array, ""]:
            """Its slope in the weights of a layer is the product of what both ends of it hold."""
            ends = zip(model.layers, dyads.mean, dyads.delta[1:], strict=False)
            return -sum((jnp.vdot(jax.vmap(layer)(s), d) for layer, s, d in ends), jnp.zeros(())) / self.beta

        rows = len(dyads.delta[-1])
        return value, jax.tree.map(lambda g: g / rows, eqx.filter_grad(hebbian)(model))


def infer_states(rule: DualProp, model: Network, batch: Any, key: PRNGKeyArray) -> tuple[Float[Array, ""], Dyads]:
    """The loss of a batch (x, y) before the nudge, and the states in which the network settles."""
    (x, y), layers, top = batch, [jax.vmap(layer) for layer in model.layers], len(model.layers)
    mean = [x]
    for layer in layers[:-1]:
        mean.append(jax.nn.relu(layer(mean[-1])))
    mean.append(layers[-1](mean[-1]))
    # The scores stand for inputs of a model that is the identity: so any loss of a model is one of its scores.
    value, slope = jax.value_and_grad(lambda scores: rule.loss(lambda s: s, (scores, y), key))(mean[top])
    nudge = rule.beta * len(x) * slope  # from the mean over the batch to each example's own
    delta = [jnp.zeros_like(s) for s in mean]
    up, down = (1 - rule.alpha, rule.alpha) if rule.adjoint else (rule.alpha, 1 - rule.alpha)

    def settle(k: int) -> None:
        a = layers[k - 1](mean[k - 1])  # in the first sweep that of the forward pass: the compiler sees it
        if k == top:
            plus, minus = a - rule.alpha * nudge, a + (1 - rule.alpha) * nudge
        else:
            (b,) = jax.vjp(layers[k], mean[k])[1](delta[k + 1])
            plus, minus = jax.nn.relu(a + up * b), jax.nn.relu(a - down * b)
        mean[k], delta[k] = rule.alpha * plus + (1 - rule.alpha) * minus, plus - minus

    for sweep in range(rule.sweeps):
        for k in range(1, top) if sweep else ():
            settle(k)
        for k in range(top, 0, -1):
            settle(k)
    return value, Dyads(mean, delta)


def example() -> tuple[Sgd, Event]:
    """A network of two layers on two features, learned from 72 events."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(72, 2)).astype(np.float32)
    label = (x[:, 0] > 0.2).astype(np.int32)
    first, second = jax.random.split(jax.random.PRNGKey(0))
    model = Network((eqx.nn.Linear(2, 8, key=first), eqx.nn.Linear(8, 2, key=second)))
    cell = Sgd(model, optax.sgd(0.1), DualProp(cross_entropy))
    return cell, Event(x, Maybe(label, np.ones(72, bool)), np.ones(72, np.float32))
