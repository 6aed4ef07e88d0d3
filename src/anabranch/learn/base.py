"""What the learn family shares: drift detectors, how a prediction is read as a class, and the plain online learner."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree, Shaped

from anabranch.cell import Cell, Learner, State, noise, select
from anabranch.fit import Backprop


class Alarm(NamedTuple):
    """What a drift detector says after one observation."""

    warning: Bool[Array, ""]
    """The stream may be about to change: prepare a replacement."""
    drift: Bool[Array, ""]
    """The stream has changed."""


class Detector(Cell):
    """Watches one number per event, usually a learner's error, and raises an `Alarm` when its distribution changes.

    After a drift the detector starts afresh with the next observation.
    """

    def step(self, state: State, x: Float[Array, ""] | float) -> tuple[State, Alarm]:
        raise NotImplementedError(f"{type(self).__name__} is abstract: it defines no `step`")


def label(prediction: Shaped[Array, "..."]) -> Int[Array, "..."]:
    """The class that a prediction stands for.

    Read by dtype and rank: an integer is the class itself, a float scalar the probability of class 1, a float vector
    the scores of all classes.

        >>> [int(label(p)) for p in (3, 0.7, jnp.array([0.1, 0.2, 0.7]))]
        [3, 1, 2]
    """
    prediction = jnp.asarray(prediction)
    if not jnp.issubdtype(prediction.dtype, jnp.floating):
        return prediction.astype(jnp.int32)
    if prediction.ndim == 0:
        return (prediction > 0.5).astype(jnp.int32)
    return jnp.argmax(prediction, axis=-1).astype(jnp.int32)


def cross_entropy(model: Any, batch: tuple[Any, Int[Array, " n"]], key: Any = None) -> Float[Array, ""]:
    """Mean loss, in nats, of a model that gives the scores of all classes for one x; NaN if a label is none of them."""
    x, y = batch
    scores = jax.vmap(model)(x)
    losses = optax.softmax_cross_entropy_with_integer_labels(scores, y)
    return jnp.where((0 <= y) & (y < scores.shape[-1]), losses, jnp.nan).mean()


class SgdState(NamedTuple):
    """The model's arrays, the optimiser's state, and the source of chance with the number of updates."""

    model: PyTree
    optimizer: PyTree
    key: PRNGKeyArray
    t: Int[Array, ""]


class Sgd(Learner):
    """The plain online learner: one gradient step of a model for each labelled event.

    The event's x and target make a batch of one for `backprop`. An event whose gradient is not finite is passed over.

        >>> mlp = eqx.nn.MLP(2, 2, 8, 1, key=jax.random.PRNGKey(0))
        >>> cell = Sgd(mlp, optax.sgd(0.1))
        >>> state = cell.init(key=jax.random.PRNGKey(1))
        >>> cell.predict(state, jnp.zeros(2)).shape
        (2,)
    """

    model: Any
    """Gives the scores of all classes for one x."""
    optimizer: optax.GradientTransformation = eqx.field(static=True)
    backprop: Backprop = Backprop(cross_entropy)

    @property
    def smooth(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.backprop.exact

    def init(self, *, key: PRNGKeyArray | None = None) -> SgdState:
        arrays = eqx.filter(self.model, eqx.is_inexact_array)
        key = jax.random.PRNGKey(0) if key is None else key
        return SgdState(arrays, self.optimizer.init(arrays), key, jnp.int32(0))

    def _whole(self, arrays: PyTree) -> Any:
        return eqx.combine(arrays, eqx.filter(self.model, eqx.is_inexact_array, inverse=True))

    def predict(self, state: SgdState, x: Any) -> Float[Array, " C"]:
        return self._whole(state.model)(x)

    def learn(self, state: SgdState, x: Any, target: Any, weight: Any = 1.0) -> SgdState:
        batch = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], (x, target))
        model = self._whole(state.model)
        _, grads = self.backprop.value_and_grad(model, batch, noise(state.key, state.t))
        grads = jax.tree.map(lambda g: g * weight, grads)
        fine = jnp.array([jnp.isfinite(g).all() for g in jax.tree.leaves(grads)]).all()
        updates, optimizer = self.optimizer.update(grads, state.optimizer, state.model)
        new = SgdState(optax.apply_updates(state.model, updates), optimizer, state.key, state.t + 1)
        return select(fine, new, state)
