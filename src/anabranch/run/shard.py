"""A cell that is too large for one device: its weights and its state spread over a mesh of devices.

A rule says how the leaves whose path contains a text lie on the mesh: `(".weight", PartitionSpec("model"))` cuts the
first axis of every weight into as many parts as the mesh axis `model` has devices. The first rule that fits a leaf
counts, and a leaf that none fits lies whole on every device. XLA does the rest: what has to travel between devices
follows from where things lie, and the program is the same on one device, on eight, and on GPU or TPU.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import equinox as eqx
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PRNGKeyArray, PyTree

from anabranch.cell import Cell, State
from anabranch.state import name_of

Rules = Sequence[tuple[str, PartitionSpec]]
T = TypeVar("T")


def shardings(tree: PyTree, mesh: Mesh, rules: Rules) -> PyTree[NamedSharding | None]:
    """Where the leaves of `tree`, arrays or their shapes, are to lie; None for leaves that are no arrays.

    Raises:
        ValueError: if a rule names an axis that the mesh has not, or cuts an axis into parts that are not equal.
    """
    mesh = Mesh(mesh.devices, mesh.axis_names)  # with axes that XLA may use as it likes, whatever they were

    def place(path: tuple, leaf: Any) -> NamedSharding | None:
        if not isinstance(leaf, jax.ShapeDtypeStruct) and not eqx.is_array(leaf):
            return None
        name = name_of(path)
        spec = next((spec for text, spec in rules if text in name), PartitionSpec())
        try:
            sharding = NamedSharding(mesh, spec)
            sharding.shard_shape(leaf.shape)
        except ValueError as error:
            raise ValueError(f"the leaf {name} of shape {leaf.shape} cannot lie as {spec}: {error}") from None
        return sharding

    return jax.tree_util.tree_map_with_path(place, tree)


def shard(tree: T, mesh: Mesh, rules: Rules) -> T:
    """`tree` with its arrays spread over the mesh; inside a compiled function, a constraint that XLA keeps.

    Rows of many streams, stacked on a leading axis, are spread by one rule for all leaves:

        >>> import jax.numpy as jnp
        >>> mesh = jax.make_mesh((1,), ("data",))
        >>> rows = shard({"mean": jnp.zeros((8, 3))}, mesh, [("", PartitionSpec("data"))])
        >>> rows["mean"].sharding.spec == PartitionSpec("data")
        True

    Raises:
        ValueError: as `shardings`.
    """
    arrays, static = eqx.partition(tree, eqx.is_array)
    return eqx.combine(jax.lax.with_sharding_constraint(arrays, shardings(arrays, mesh, rules)), static)


def create(make: Callable[[], T], mesh: Mesh, rules: Rules) -> T:
    """What `make` makes, already spread: no device ever holds the whole.

    Raises:
        ValueError: as `shardings`.
    """
    return eqx.filter_jit(lambda: shard(make(), mesh, rules))()


class Sharded(Cell):
    """A cell whose weights and state lie on a mesh of devices as `rules` say, for as long as the stream lasts.

    `make` makes the cell. It is called inside a compiled function, so that each device makes only its part.

    Raises:
        ValueError: if a rule fits neither a weight nor a part of the state, and as `shardings`.
    """

    cell: Cell
    mesh: Mesh = eqx.field(static=True)
    rules: tuple[tuple[str, PartitionSpec], ...] = eqx.field(static=True)

    def __init__(self, make: Callable[[], Cell], mesh: Mesh, rules: Rules):
        self.mesh, self.rules = mesh, tuple(rules)
        self.cell = create(make, mesh, rules)
        state = jax.eval_shape(lambda key: self.cell.init(key=key), jax.random.PRNGKey(0))
        paths, _ = jax.tree_util.tree_flatten_with_path((self.cell, state))
        for text, _ in rules:
            if not any(text in name_of(path[1:]) for path, _ in paths):
                raise ValueError(f"the rule for {text!r} fits no leaf of {type(self.cell).__name__} or of its state")

    @property
    def rate(self) -> tuple[int, int]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.cell.rate

    @property
    def delay(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.cell.delay

    @property
    def coupled(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.cell.coupled

    @property
    def smooth(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.cell.smooth

    def init(self, *, key=None) -> State:
        return _init(self, key)

    def step(self, state: State, x: Any) -> tuple[State, Any]:
        state, y = self.cell.step(state, x)
        return shard(state, self.mesh, self.rules), y

    def configure(self, state: State, ctl: Any) -> State:
        return shard(self.cell.configure(state, ctl), self.mesh, self.rules)


@eqx.filter_jit
def _init(sharded: Sharded, key: PRNGKeyArray | None) -> State:
    return shard(sharded.cell.init(key=key), sharded.mesh, sharded.rules)
