"""Høier, Staudt, Zach: Dual Propagation: Accelerating Contrastive Hebbian Learning with Dyadic Neurons.

arXiv 2302.01228, ICML 2023. A layered network learns without a backward pass: each neuron holds two states, s⁺ and s⁻.
Their mean s̄ = α s⁺ + (1 − α) s⁻ is its activity, their difference δ = s⁺ − s⁻ its error. With a = W s̄ from the layer
below and b = Wᵀδ from the one above, a hidden layer settles at

    s⁺ = f(a + α b),  s⁻ = f(a − (1 − α) b),

and the output, where f is the identity, with b = −β ∇ℓ, the slope of the loss at the first prediction. One sweep from
the output down is enough and costs what back-propagation does; the weights then learn from what their two ends hold,
by −δ s̄ᵀ / β.

`DualProp` is a `Backprop`: it stands where a loss does in `fit` and `Sgd`, and starts each batch from a forward pass.
With α = ½ its gradient equals that of back-propagation as β → 0, and for any β as long as no unit of f crosses zero. δ
is a difference of close numbers: in float32, keep β at 0.01 or above. `DualPropCell` is the network as it would run in
hardware: the states stay from event to event, and at each event every layer settles once.

Two variants come from the same authors' *Two Tales of Single-Phase Contrastive Hebbian Learning* (arXiv 2402.08573,
ICML 2024): the adjoint one and the damped one. Not here: the exact nudge of the squared loss, which is linearised like
any other.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree, Shaped

from anabranch.cell import Event, Learner, Maybe, noise, select
from anabranch.fit import Backprop
from anabranch.learn.base import cross_entropy

POWER_ITERATIONS = 30


class Network(eqx.Module):
    """Layers with ReLU between them; the last one gives the scores.

    A layer is affine in its input (`eqx.nn.Linear`, `eqx.nn.Conv2d`), and may be wrapped with max-pooling or reshaping.
    """

    layers: tuple[Callable, ...]

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, " C"]:
        return self.activities(x)[-1]

    def activities(self, x: Float[Array, "..."]) -> list[Float[Array, "..."]]:
        """The input, what each hidden layer makes of it, and the scores."""
        states = [x]
        for layer in self.layers[:-1]:
            states.append(jax.nn.relu(layer(states[-1])))
        return [*states, self.layers[-1](states[-1])]


class Dyads(NamedTuple):
    """The neurons of all layers, the input first, for a batch of B: s⁺ = s̄ + (1 − α) δ and s⁻ = s̄ − α δ."""

    mean: list[Float[Array, "B ..."]]
    """s̄: activities; of the last layer, scores."""
    delta: list[Float[Array, "B ..."]]
    """δ, about −β times the gradient of the loss with respect to what the layer is given."""

    @classmethod
    def at_rest(cls, mean: list[Float[Array, "B ..."]]) -> "Dyads":
        """Neurons whose two states are the same."""
        return cls(mean, [jnp.zeros_like(s) for s in mean])


class DualProp(Backprop):
    """The gradient of a `Network` by dual propagation.

    `loss(model, (x, y), key)` must be a mean over the batch of losses of each example's scores, like `cross_entropy`.

    Raises:
        ValueError: if an argument is out of range, or the model is not a `Network` or holds batch normalisation.
    """

    exact: ClassVar[bool] = False
    alpha: float = eqx.field(static=True, default=0.5)
    """Share of s⁺ in the activity, in [0, 1]."""
    beta: float = eqx.field(static=True, default=0.1)
    """How far the output is nudged."""
    sweeps: int = eqx.field(static=True, default=1)
    """How often the layers settle; the first time from the output down, then up and down again."""
    adjoint: bool = eqx.field(static=True, default=False)
    """Swap α and 1 − α in s⁺ and s⁻: this keeps the activity at a, and so is stable also where α is not ½."""
    damped: bool = eqx.field(static=True, default=False)
    """Let hidden layers move only part of the way, the less the larger the spectral norm γ of the weights above:
    s := f((a ± …b + λ s) / (1 + λ)) with λ = max(0, (γ² − 1) / 2)."""

    def __check_init__(self):
        if not 0 <= self.alpha <= 1 or self.beta <= 0 or self.sweeps < 1:
            wanted = "alpha in [0, 1], beta > 0 and sweeps >= 1"
            raise ValueError(f"DualProp needs {wanted}, got {self.alpha=}, {self.beta=} and {self.sweeps=}")

    def value_and_grad(self, model: Any, batch: Any, key: PRNGKeyArray) -> tuple[Float[Array, ""], Any]:
        _check_network(model)
        value, dyads = infer_states(self, model, batch, key)
        return value, self.contrast(model, dyads)

    def nudge(self, scores: Float[Array, "B C"], y: Any, key: PRNGKeyArray) -> tuple[Float[Array, ""], Array]:
        """The loss of the scores, and what moves each example's scores against it."""
        # The scores stand for inputs of a model that is the identity: so any loss of a model is one of its scores.
        value, slope = jax.value_and_grad(lambda scores: self.loss(lambda s: s, (scores, y), key))(scores)
        return value, -self.beta * len(scores) * slope  # from the mean over the batch to each example's own

    def settle(
        self, model: Network, dyads: Dyads, order: Iterable[int], nudge: Float[Array, "B C"], damping: Sequence = ()
    ) -> Dyads:
        """The states after the layers have settled in this order, each from those of its two neighbours."""
        layers, alpha = [jax.vmap(layer) for layer in model.layers], self.alpha
        up, down = (1 - alpha, alpha) if self.adjoint else (alpha, 1 - alpha)
        mean, delta = list(dyads.mean), list(dyads.delta)
        for k in order:
            a = layers[k - 1](mean[k - 1])
            if k == len(layers):
                plus, minus = a + up * nudge, a - down * nudge
            else:
                (b,) = jax.vjp(layers[k], mean[k])[1](delta[k + 1])
                plus, minus = a + up * b, a - down * b
                if damping:
                    plus = (plus + damping[k] * (mean[k] + (1 - alpha) * delta[k])) / (1 + damping[k])
                    minus = (minus + damping[k] * (mean[k] - alpha * delta[k])) / (1 + damping[k])
                plus, minus = jax.nn.relu(plus), jax.nn.relu(minus)
            mean[k], delta[k] = alpha * plus + (1 - alpha) * minus, plus - minus
        return Dyads(mean, delta)

    def damping(self, model: Network, dyads: Dyads) -> list[Float[Array, ""]]:
        """λ of each layer, found at the first example: where a layer does not pool, it is the same for all."""
        if not self.damped:
            return []
        norms = [spectral_norm(layer, s[0]) for layer, s in zip(model.layers, dyads.mean)]
        return [jnp.maximum(0.0, (norm**2 - 1) / 2) for norm in norms]

    def contrast(self, model: Network, dyads: Dyads) -> Network:
        """The gradient: for the weights of a layer, the product of what both ends of it hold."""

        def energy(model: Network) -> Float[Array, ""]:
            ends = zip(model.layers, dyads.mean, dyads.delta[1:])
            held = sum((jnp.vdot(jax.vmap(layer)(s), d) for layer, s, d in ends), jnp.zeros(()))
            return -held / (self.beta * len(dyads.mean[0]))

        return eqx.filter_grad(energy)(model)


def infer_states(rule: DualProp, model: Network, batch: Any, key: PRNGKeyArray) -> tuple[Float[Array, ""], Dyads]:
    """The loss of a batch (x, y) before the nudge, and the states in which the network settles."""
    x, y = batch
    dyads, top = Dyads.at_rest(jax.vmap(model.activities)(x)), len(model.layers)
    value, nudge = rule.nudge(dyads.mean[top], y, key)
    # On the first way down a layer finds below what the forward pass left: the compiler sees it and saves the product.
    down, up = [*range(top, 0, -1)], [*range(1, top)]
    order = [*down, *(rule.sweeps - 1) * (up + down)]
    return value, rule.settle(model, dyads, order, nudge, rule.damping(model, dyads))


def spectral_norm(layer: Callable, x: Float[Array, "..."]) -> Float[Array, ""]:
    """The largest factor by which the layer's slope at x lengthens a vector, by power iteration."""
    _, transpose = jax.vjp(layer, x)

    def forward(v: Float[Array, "..."]) -> Float[Array, "..."]:
        return jax.jvp(layer, (x,), (v,))[1]

    def turn(_: Any, v: Float[Array, "..."]) -> Float[Array, "..."]:
        (w,) = transpose(forward(v))
        return w / jnp.maximum(jnp.linalg.norm(w.ravel()), jnp.finfo(w.dtype).tiny)

    start = jax.random.normal(jax.random.PRNGKey(0), x.shape, x.dtype)
    return jnp.linalg.norm(forward(jax.lax.fori_loop(0, POWER_ITERATIONS, turn, start)).ravel())


class DualPropState(NamedTuple):
    """The model's arrays, the optimiser's state, and the neurons."""

    model: PyTree
    optimizer: PyTree
    dyads: Dyads
    """With a leading axis of one."""
    rejected: Int[Array, ""]
    """Events passed over: states or gradients that are not finite."""
    key: PRNGKeyArray
    t: Int[Array, ""]


class DualPropCell(Learner):
    """A network of dyads that settles while its input persists, with one sweep for each event.

    Stream: `Event(x f32[*shape], Maybe(y, valid), weight)`. Output: scores f32[C]. State: `DualPropState`, the
    parameters, their optimiser's, and twice the activities.

    In a sweep every other layer settles at the same time, then those between, the output among them. A new input
    reaches the output of L layers after ⌈L/2⌉ events, and its error the first layer after as many more: hold it so
    long. Without a target nothing nudges the output, and the errors die away. The nudge is taken at the present
    prediction: there is no first one. The weights learn at every event with a target, times its weight; an event of
    weight 0 settles the states and teaches nothing, so that the events in which old errors are still about can be left
    out.

        >>> first, second = jax.random.split(jax.random.PRNGKey(0))
        >>> model = Network((eqx.nn.Linear(2, 8, key=first), eqx.nn.Linear(8, 2, key=second)))
        >>> cell = DualPropCell(model, optax.sgd(0.1), (2,))
        >>> state, x = cell.init(), jnp.ones(2)
        >>> for _ in range(100):
        ...     state = cell.learn(state, x, jnp.int32(1))
        >>> int(cell.predict(state, x).argmax())
        1

    Raises:
        ValueError: if the model is not a `Network` or holds batch normalisation, or the rule sweeps more than once.
    """

    smooth: ClassVar[bool] = False
    model: Network
    optimizer: optax.GradientTransformation = eqx.field(static=True)
    shape: tuple[int, ...] = eqx.field(static=True)
    """Of one input."""
    rule: DualProp = DualProp(cross_entropy)

    def __check_init__(self):
        _check_network(self.model)
        if self.rule.sweeps != 1:
            raise ValueError(f"DualPropCell sweeps once an event, got sweeps={self.rule.sweeps}")

    def init(self, *, key: PRNGKeyArray | None = None) -> DualPropState:
        arrays = eqx.filter(self.model, eqx.is_inexact_array)
        dyads = Dyads.at_rest(jax.vmap(self.model.activities)(jnp.zeros((1, *self.shape))))
        key = jax.random.PRNGKey(0) if key is None else key
        none = jnp.int32(0)
        return DualPropState(arrays, self.optimizer.init(arrays), dyads, none, key, none)

    def predict(self, state: DualPropState, x: Float[Array, "..."]) -> Float[Array, " C"]:
        return self._rise(state, x)[2][0]

    def learn(self, state: DualPropState, x: Any, target: Any, weight: Any = 1.0) -> DualPropState:
        return self.step(state, Event(x, Maybe(target, True), weight))[0]

    def step(self, state: DualPropState, x: Event) -> tuple[DualPropState, Float[Array, " C"]]:
        model, dyads, scores = self._rise(state, x.x)
        y = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], x.target.value)
        nudge = jnp.where(x.target.valid, self.rule.nudge(scores, y, noise(state.key, state.t))[1], 0.0)
        order = range(len(model.layers), 0, -2)
        dyads = self.rule.settle(model, dyads, order, nudge, self.rule.damping(model, dyads))

        grads = jax.tree.map(lambda g: g * x.weight, self.rule.contrast(model, dyads))
        updates, optimizer = self.optimizer.update(grads, state.optimizer, state.model)
        taught = optax.apply_updates(state.model, updates), optimizer
        # What is not finite would go round between the layers for ever.
        fine = jnp.array([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((dyads, grads))]).all()
        arrays, optimizer = select(
            fine & x.target.valid & (jnp.asarray(x.weight) > 0), taught, (state.model, state.optimizer)
        )
        dyads = select(fine, dyads, state.dyads)
        return DualPropState(arrays, optimizer, dyads, state.rejected + ~fine, state.key, state.t + 1), scores[0]

    def _rise(self, state: DualPropState, x: Any) -> tuple[Network, Dyads, Shaped[Array, "1 C"]]:
        """The first half of a sweep, which does not touch the output, and the scores that follow from it."""
        model = eqx.combine(state.model, eqx.filter(self.model, eqx.is_inexact_array, inverse=True))
        x = jnp.asarray(x, float)[None]
        dyads = state.dyads._replace(mean=[x, *state.dyads.mean[1:]])
        top = len(model.layers)
        order, still = range(top - 1, 0, -2), jnp.zeros_like(dyads.mean[top])
        dyads = self.rule.settle(model, dyads, order, still, self.rule.damping(model, dyads))
        return model, dyads, jax.vmap(model.layers[-1])(dyads.mean[top - 1])


def _check_network(model: Any) -> None:
    if not isinstance(model, Network):
        raise ValueError(f"dual propagation learns a Network of layers, got {type(model).__name__}")
    is_norm = lambda node: isinstance(node, eqx.nn.BatchNorm)
    if any(map(is_norm, jax.tree.leaves(model, is_leaf=is_norm))):
        raise ValueError("dual propagation: a layer holds BatchNorm, which is not a function of one example")


def example() -> tuple[DualPropCell, Event]:
    """A network of three layers on two features, each held for four of 72 events."""
    rng = np.random.default_rng(0)
    x = np.repeat(rng.normal(size=(18, 2)).astype(np.float32), 4, axis=0)
    label = (x[:, 0] > 0.2).astype(np.int32)
    keys = jax.random.split(jax.random.PRNGKey(0), 3)
    layers = (eqx.nn.Linear(2, 8, key=keys[0]), eqx.nn.Linear(8, 8, key=keys[1]), eqx.nn.Linear(8, 2, key=keys[2]))
    weight = np.tile(np.array([0, 0, 0, 1], np.float32), 18)  # the fourth event teaches
    return DualPropCell(Network(layers), optax.sgd(0.1), (2,)), Event(x, Maybe(label, np.ones(72, bool)), weight)
