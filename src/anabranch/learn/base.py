"""What the learn family shares: drift detectors and how a prediction is read as a class."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from anabranch.cell import Cell, State


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
