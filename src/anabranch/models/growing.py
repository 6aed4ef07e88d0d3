"""Models that are made larger while they learn: all slots are there from the start, and growth turns one on.

So shapes never change. A mixture splits an expert in two copies of itself, an ensemble gets one more member:

    >>> model = GrowingMoE(4, 3, width=8, slots=4, key=jax.random.PRNGKey(0))
    >>> x, there = jnp.ones((5, 4)), jnp.ones(5, bool)
    >>> larger = model.grow(x, there)
    >>> int(model.size()), int(larger.size())
    (279, 419)
    >>> bool(jnp.allclose(larger(x[0]), model(x[0]), atol=1e-6))
    True

Caccia, Xu, Ott, Ranzato, Denoyer: "On anytime learning at macroscale", arXiv 2106.09563, 2021 (gMoE and gEns).
"""

from typing import Any, Self

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from anabranch.cell import noise, select


class Growing(eqx.Module):
    """A model that gives the scores of all classes for one x, and can be made larger."""

    def __call__(self, x: Float[Array, " D"]) -> Float[Array, " C"]:
        """The scores of all classes."""
        raise NotImplementedError(f"{type(self).__name__} is abstract: it defines no `__call__`")

    def grow(self, x: Float[Array, "n D"], there: Bool[Array, " n"]) -> Self:
        """The model with one more slot on, or as it is if all are; `x[there]` are rows to measure usage on."""
        raise NotImplementedError(f"{type(self).__name__} is abstract: it defines no `grow`")

    def size(self) -> Float[Array, ""]:
        """Parameters in use."""
        raise NotImplementedError(f"{type(self).__name__} is abstract: it defines no `size`")

    def trained(self) -> Any:
        """The part that training changes, itself a model; all of it unless told otherwise."""
        return self

    def put(self, part: Any) -> Self:
        """The model with `trained()` as training has left it."""
        return part


def size(model: Any) -> Float[Array, ""]:
    """Parameters of any model, of a growing one those in use."""
    if isinstance(model, Growing):
        return model.size()
    return jnp.float32(sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array))))


def _stacked(make: Any, slots: int, key: PRNGKeyArray) -> Any:
    """`make(key)`, so many times, on a leading axis."""
    return eqx.filter_vmap(make)(jax.random.split(key, slots))


def _each(stack: Any, x: Array) -> Array:
    """What each of a stack of models says of x."""
    return eqx.filter_vmap(lambda one: one(x))(stack)


class MixtureLayer(eqx.Module):
    """A layer of linear experts with ReLU at the leaves of a tree of soft binary gates, of which `n` are in use.

    Gate s came into being when expert s + 1 was split off another one. The share of an expert is the product of what
    the gates on its path leave to its side.
    """

    experts: eqx.nn.Linear
    """Stacked on a leading axis of E slots."""
    gates: eqx.nn.Linear
    """Two scores for x, stacked on a leading axis of E - 1."""
    path: Int[Array, "E E-1 2"]
    """1 where the path of an expert goes by a side of a gate."""
    n: Int[Array, ""]

    def __init__(self, D: int, out: int, slots: int, *, key: PRNGKeyArray):
        self.experts = _stacked(lambda key: eqx.nn.Linear(D, out, key=key), slots, noise(key, 0, "experts"))
        self.gates = _stacked(lambda key: eqx.nn.Linear(D, 2, key=key), slots - 1, noise(key, 0, "gates"))
        self.path = jnp.zeros((slots, slots - 1, 2), jnp.int32).at[(0, 1), 0, (0, 1)].set(1)
        self.n = jnp.int32(2)

    def shares(self, x: Float[Array, " D"]) -> Float[Array, " E"]:
        """How much of each expert goes into the output; they sum to 1, and slots that are not in use have none."""
        sides = jax.nn.log_softmax(_each(self.gates, x))
        share = jnp.exp(jnp.einsum("egk,gk->e", self.path.astype(sides.dtype), sides))
        return jnp.where(jnp.arange(len(share)) < self.n, share, 0.0)

    def __call__(self, x: Float[Array, " D"]) -> Float[Array, " out"]:
        return self.shares(x) @ jax.nn.relu(_each(self.experts, x))

    def split(self, usage: Float[Array, " E"]) -> "MixtureLayer":
        """The most used expert split in two copies of itself: whatever the new gate says, the function is the same."""
        new, used = self.n, jnp.argmax(usage)
        experts = jax.tree.map(lambda leaf: leaf.at[new].set(leaf[used]), self.experts)
        path = self.path.at[new].set(self.path[used]).at[(used, new), new - 1, (0, 1)].set(1)
        grown = eqx.tree_at(lambda layer: (layer.experts, layer.path, layer.n), self, (experts, path, new + 1))
        return select(new < len(self.path), grown, self)

    def size(self) -> Float[Array, ""]:
        """Parameters of the experts in use and of their gates."""
        return self.n * (size(self.experts) / len(self.path)) + (self.n - 1) * (size(self.gates) / (len(self.path) - 1))


class GrowingMoE(Growing):
    """gMoE: two layers of soft mixtures of `width` units and a linear output; growth splits an expert of each layer.

    Both layers begin with two experts and have `slots`; all slots are computed, only those in use are counted.

    Raises:
        ValueError: if there are fewer than two slots.
    """

    layers: tuple[MixtureLayer, MixtureLayer]
    head: eqx.nn.Linear

    def __init__(self, D: int, C: int, width: int = 64, slots: int = 8, *, key: PRNGKeyArray):
        if slots < 2:
            raise ValueError(f"slots must be at least 2, got {slots}")
        self.layers = (
            MixtureLayer(D, width, slots, key=noise(key, 0, "layer")),
            MixtureLayer(width, width, slots, key=noise(key, 1, "layer")),
        )
        self.head = eqx.nn.Linear(width, C, key=noise(key, 2, "layer"))

    def __call__(self, x: Float[Array, " D"]) -> Float[Array, " C"]:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)

    def grow(self, x: Float[Array, "n D"], there: Bool[Array, " n"]) -> "GrowingMoE":
        grown = []
        for layer in self.layers:
            grown.append(layer.split(there @ jax.vmap(layer.shares)(x)))
            x = jax.vmap(layer)(x)
        return eqx.tree_at(lambda model: model.layers, self, tuple(grown))

    def size(self) -> Float[Array, ""]:
        return self.layers[0].size() + self.layers[1].size() + size(self.head)


class GrowingEnsemble(Growing):
    """gEns: multilayer perceptrons that answer by the mean of their scores; growth adds one, a copy of the last.

    Only the last one is trained: the earlier ones stay as they were.

    Raises:
        ValueError: if there is no slot.
    """

    members: eqx.nn.MLP
    """Stacked on a leading axis of E slots."""
    n: Int[Array, ""]

    def __init__(self, D: int, C: int, width: int = 64, slots: int = 8, *, key: PRNGKeyArray):
        if slots < 1:
            raise ValueError(f"slots must be at least 1, got {slots}")
        self.members = _stacked(lambda key: eqx.nn.MLP(D, C, width, 2, key=key), slots, key)
        self.n = jnp.int32(1)

    @property
    def slots(self) -> int:
        """E."""
        return len(self.members.layers[0].weight)

    def __call__(self, x: Float[Array, " D"]) -> Float[Array, " C"]:
        return (jnp.arange(self.slots) < self.n) @ _each(self.members, x) / self.n

    def trained(self) -> eqx.nn.MLP:
        return jax.tree.map(lambda leaf: leaf[self.n - 1] if eqx.is_array(leaf) else leaf, self.members)

    def put(self, part: eqx.nn.MLP) -> "GrowingEnsemble":
        def set_last(slots, leaf):
            return slots.at[self.n - 1].set(leaf) if eqx.is_array(slots) else slots

        return eqx.tree_at(lambda model: model.members, self, jax.tree.map(set_last, self.members, part))

    def grow(self, x: Float[Array, "n D"], there: Bool[Array, " n"]) -> "GrowingEnsemble":
        larger = eqx.tree_at(lambda model: model.n, self, self.n + 1).put(self.trained())
        arrays, static = eqx.partition(self, eqx.is_array)
        return eqx.combine(select(self.n < self.slots, eqx.filter(larger, eqx.is_array), arrays), static)

    def size(self) -> Float[Array, ""]:
        return self.n * (size(self.members) / self.slots)
