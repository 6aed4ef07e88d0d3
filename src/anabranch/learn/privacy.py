"""What private learners share: clipped gradients of single examples, and the accountant.

A run is (ε, δ)-differentially private if no example, by being in the data or not, changes the probability of any
outcome by more than the factor e^ε, but for outcomes of probability δ. Two things give that: no example's gradient is
longer than a bound (`PerExample` keeps them apart, `clip_each` bounds and adds them up), and noise in proportion to the
bound. How much noise is what `epsilon` and `calibrate` answer, by the Rényi accountant of dp-accounting.

    >>> grads = jnp.array([[3.0, 4.0], [0.3, 0.4], [jnp.nan, 0.0]])
    >>> total, rejected = clip_each(grads, 1.0)
    >>> [round(float(g), 4) for g in total], int(rejected)
    ([0.9, 1.2], 1)
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from anabranch.fit import Backprop


class PerExample(Backprop):
    """A way to get a gradient: the mean loss of a batch, and the gradients of its B examples, stacked on a first axis.

    What takes them must be an optimiser that adds them up, such as `correlated_noise`.
    """

    def value_and_grad(self, model: Any, batch: Any, key: PRNGKeyArray) -> tuple[Float[Array, ""], Any]:
        def one(example: Any) -> tuple[Float[Array, ""], Any]:
            alone = jax.tree.map(lambda leaf: leaf[None], example)
            return eqx.filter_value_and_grad(self.loss)(model, alone, key)

        losses, grads = jax.vmap(one)(batch)
        return losses.mean(), grads


def clip_each(grads: PyTree[Float[Array, "B ..."]], clip: float) -> tuple[PyTree[Float[Array, "..."]], Int[Array, ""]]:
    """The sum of B gradients, each first shortened to length `clip`, and how many were left out as not finite.

    The length is that over all leaves together.
    """
    leaves = jax.tree.leaves(grads)
    squares = jnp.array([jnp.square(leaf.reshape(len(leaf), -1)).sum(1) for leaf in leaves]).sum(0)
    fine = jnp.isfinite(squares)
    scale = jnp.where(fine, jnp.minimum(1.0, clip / jnp.sqrt(jnp.maximum(squares, 1e-30))), 0.0)

    def total(leaf: Float[Array, "B ..."]) -> Float[Array, "..."]:
        kept = jnp.where(fine.reshape(-1, *[1] * (leaf.ndim - 1)), leaf, 0.0)  # 0 * nan would be nan
        return jnp.tensordot(scale, kept, 1)

    return jax.tree.map(total, grads), (~fine).sum()


def _accounting() -> ModuleType:
    try:
        import dp_accounting
    except ImportError as error:
        raise ImportError("privacy accounting needs dp-accounting: pip install 'anabranch[privacy]'") from error
    return dp_accounting


def gaussian(noise_multiplier: float) -> Any:
    """One release with Gaussian noise of `noise_multiplier` times the sensitivity, as an event of dp-accounting."""
    return _accounting().GaussianDpEvent(noise_multiplier)


def sampled_gaussian(noise_multiplier: float, rate: float, steps: int) -> Any:
    """`steps` such releases, each of a batch that every example joins with probability `rate` (DP-SGD)."""
    dp = _accounting()
    return dp.SelfComposedDpEvent(dp.PoissonSampledDpEvent(rate, gaussian(noise_multiplier)), steps)


def epsilon(event: Any, delta: float) -> float:
    """The ε of an event at `delta`.

    Raises:
        ImportError: without dp-accounting.
        ValueError: if `delta` does not lie between 0 and 1.
    """
    if not 0 < delta < 1:
        raise ValueError(f"delta must lie between 0 and 1, got {delta}")
    return float(_accounting().rdp.RdpAccountant().compose(event).get_epsilon(delta))


def calibrate(event: Callable[[float], Any], budget: float, delta: float) -> float:
    """The least noise multiplier with which `event(noise_multiplier)` costs no more than ε = `budget` at `delta`.

    Raises:
        ImportError: without dp-accounting.
        ValueError: if `budget` is not positive or `delta` does not lie between 0 and 1.
    """
    if not 0 < delta < 1 or budget <= 0:
        raise ValueError(f"budget must be positive and delta lie between 0 and 1, got {budget=} and {delta=}")
    dp = _accounting()
    return float(dp.calibrate_dp_mechanism(dp.rdp.RdpAccountant, event, budget, delta))
