"""A state as one row of words, and a state as one file."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree, UInt32

State = PyTree


class StateError(ValueError):
    """A state that is not the one that was expected. The message names the leaf, what was expected and what was found."""


class _Slot(NamedTuple):
    """Where one leaf lies in a row: `words` words from `start`; no words if the leaf is `static`."""

    name: str
    start: int
    words: int
    shape: tuple[int, ...]
    dtype: Any
    static: Any


class Packing:
    """The states of one cell as rows of 32-bit words: all keys' states in one array, a row a key.

    `template` is a state of the cell, or its shapes (`jax.eval_shape`). Elements of 1 or 2 bytes take a whole word and
    those of 8 bytes take two. Leaves that are no arrays (a Python number, a string) take no words: `unpack` gives them
    back as they are in the template. Nothing is computed, bits are only read under another type, so packing and
    unpacking fuse into a surrounding loop.

        >>> packing = Packing({"n": jnp.int32(0), "mean": jnp.zeros(2)})
        >>> packing.words
        3
        >>> row = packing.pack({"n": jnp.int32(7), "mean": jnp.array([0.5, -1.0])})
        >>> packing.unpack(row)["mean"].tolist()
        [0.5, -1.0]

    Raises:
        TypeError: if a leaf has a dtype that JAX does not compute with.
    """

    words: int
    """Length of a row."""

    def __init__(self, template: State):
        leaves, self._tree = jax.tree_util.tree_flatten_with_path(template)
        slots, start = [], 0
        for path, leaf in leaves:
            name = name_of(path)
            if is_array(leaf):
                dtype = leaf.dtype if _is_key(leaf.dtype) else jax.dtypes.canonicalize_dtype(leaf.dtype)
                blank = jax.ShapeDtypeStruct(leaf.shape, dtype)
                try:
                    words = jax.eval_shape(_to_words, blank).shape[0]
                except (TypeError, ValueError) as error:
                    raise TypeError(f"state{name} has dtype {dtype}, which cannot be packed into words") from error
                slots.append(_Slot(name, start, words, tuple(leaf.shape), dtype, None))
                start += words
            else:
                slots.append(_Slot(name, start, 0, (), None, leaf))
        self._slots = slots
        self.words = start

    def __repr__(self) -> str:
        return f"Packing(words={self.words}, leaves={len(self._slots)})"

    def pack(self, state: State) -> UInt32[Array, " words"]:
        """The row of a state.

        Raises:
            StateError: if the state has another structure, shape or dtype than the template.
        """
        leaves, tree = jax.tree.flatten(state)
        if tree != self._tree:
            raise StateError(f"expected a state with the structure {self._tree}, found {tree}")
        words = []
        for slot, leaf in zip(self._slots, leaves):
            if slot.dtype is None:
                if is_array(leaf) or type(leaf) is not type(slot.static) or not leaf == slot.static:
                    raise StateError(
                        f"state{slot.name}: expected the constant {slot.static!r} of the template, found {leaf!r}; "
                        "what changes on the stream must be an array"
                    )
                continue
            if not is_array(leaf):
                raise StateError(f"state{slot.name}: expected {_show(slot.shape, slot.dtype)}, found {leaf!r}")
            dtype = leaf.dtype if _is_key(leaf.dtype) else jax.dtypes.canonicalize_dtype(leaf.dtype)
            if (tuple(leaf.shape), dtype) != (slot.shape, slot.dtype):
                raise StateError(
                    f"state{slot.name}: expected {_show(slot.shape, slot.dtype)}, found {_show(leaf.shape, dtype)}"
                )
            words.append(_to_words(jnp.asarray(leaf)))
        return jnp.concatenate(words) if words else jnp.zeros(0, jnp.uint32)

    def unpack(self, row: UInt32[Array, " words"]) -> State:
        """The state of a row.

        Raises:
            StateError: if `row` is not an array of `words` words.
        """
        if row.shape != (self.words,) or row.dtype != jnp.uint32:
            raise StateError(f"expected a row {_show((self.words,), 'uint32')}, found {_show(row.shape, row.dtype)}")
        leaves = [
            slot.static
            if slot.dtype is None
            else _from_words(jax.lax.slice(row, (slot.start,), (slot.start + slot.words,)), slot.shape, slot.dtype)
            for slot in self._slots
        ]
        return jax.tree.unflatten(self._tree, leaves)


def pack(state: State) -> UInt32[Array, " words"]:
    """A state as one row of words: `Packing(state).pack(state)`."""
    return Packing(state).pack(state)


def name_of(path: tuple) -> str:
    """The name of a leaf, from its key path: `['trees'][0].split`."""
    return jax.tree_util.keystr(path)


def is_array(leaf: Any) -> bool:
    """Whether a leaf is data, and not a Python constant."""
    return isinstance(leaf, (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct))


def _is_key(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jax.dtypes.prng_key)


def _show(shape: tuple, dtype: Any) -> str:
    return f"{dtype}[{','.join(map(str, shape))}]"


def _bits(dtype: Any) -> int:
    if dtype == jnp.bool_:
        return 1
    return (jnp.iinfo if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo)(dtype).bits


def _to_words(x: Array) -> UInt32[Array, " words"]:
    if _is_key(x.dtype):
        x = jax.random.key_data(x)
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32).ravel()
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return jnp.concatenate([_to_words(x.real), _to_words(x.imag)])
    bits = _bits(x.dtype)
    if bits < 32:
        return jax.lax.bitcast_convert_type(x, f"uint{bits}").astype(jnp.uint32).ravel()
    return jax.lax.bitcast_convert_type(x, jnp.uint32).ravel()


def _from_words(words: UInt32[Array, " words"], shape: tuple[int, ...], dtype: Any) -> Array:
    if _is_key(dtype):
        data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(shape, dtype))
        return jax.random.wrap_key_data(words.reshape(data.shape), impl=dtype._impl.name)
    if dtype == jnp.bool_:
        return words.astype(jnp.bool_).reshape(shape)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        part = jnp.finfo(dtype).dtype
        half = words.shape[0] // 2
        return jax.lax.complex(_from_words(words[:half], shape, part), _from_words(words[half:], shape, part))
    bits = _bits(dtype)
    if bits < 32:
        return jax.lax.bitcast_convert_type(words.astype(f"uint{bits}"), dtype).reshape(shape)
    width = bits // 32
    if width > 1:
        words = words.reshape(math.prod(shape), width)
    return jax.lax.bitcast_convert_type(words, dtype).reshape(shape)
