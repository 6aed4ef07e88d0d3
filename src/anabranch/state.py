"""A state as one row of words, and a state as one file."""

import ast
import dataclasses
import hashlib
import json
import math
import os
import secrets
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree, UInt32

State = PyTree


class StateError(ValueError):
    """A state that is not what was expected. The message names the leaf, what was expected and what was found."""


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

    @property
    def layout(self) -> dict[str, str]:
        """The dtype and shape of each array, by its place in the state."""
        return {f"state{slot.name}": _show(slot.shape, slot.dtype) for slot in self._slots if slot.dtype is not None}

    def pack(self, state: State) -> UInt32[Array, " words"]:
        """The row of a state.

        Raises:
            StateError: if the state has another structure, shape or dtype than the template.
        """
        words = [part for _, part in self._parts(state)]
        return jnp.concatenate(words) if words else jnp.zeros(0, jnp.uint32)

    def put(self, rows: UInt32[Array, "n words"], at: Any, state: State) -> UInt32[Array, "n words"]:
        """`rows` with the row at `at` replaced by that of `state`, leaf by leaf.

        Inside a loop that is 1.5 times as fast as writing a whole row, which XLA would compute word by word.

        Raises:
            StateError: if the state has another structure, shape or dtype than the template.
        """
        for start, part in self._parts(state):
            rows = jax.lax.dynamic_update_slice(rows, part[None], (at, start))
        return rows

    def get(self, rows: UInt32[Array, "n words"], at: Any) -> State:
        """The state in the row at `at`, leaf by leaf: the other half of `put`."""
        leaves = [
            slot.static
            if slot.dtype is None
            else _from_words(jax.lax.dynamic_slice(rows, (at, slot.start), (1, slot.words))[0], slot.shape, slot.dtype)
            for slot in self._slots
        ]
        return jax.tree.unflatten(self._tree, leaves)

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

    def _parts(self, state: State) -> list[tuple[int, UInt32[Array, " part"]]]:
        leaves, tree = jax.tree.flatten(state)
        if tree != self._tree:
            raise StateError(f"expected a state with the structure {self._tree}, found {tree}")
        words = []
        for slot, leaf in zip(self._slots, leaves):
            if slot.dtype is None:
                if is_array(leaf) or type(leaf) is not type(slot.static) or not _alike(leaf, slot.static):
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
            words.append((slot.start, _to_words(jnp.asarray(leaf))))
        return words


def pack(state: State) -> UInt32[Array, " words"]:
    """A state as one row of words: `Packing(state).pack(state)`."""
    return Packing(state).pack(state)


def name_of(path: tuple) -> str:
    """The name of a leaf, from its key path: `['trees'][0].split`."""
    return jax.tree_util.keystr(path)


def is_array(leaf: Any) -> bool:
    """Whether a leaf is data, and not a Python constant."""
    return isinstance(leaf, (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct))


def _alike(a: Any, b: Any) -> bool:
    return a == b or (a != a and b != b)  # NaN is the one value that differs from itself


def _is_key(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jax.dtypes.prng_key)


def _impl(dtype: Any) -> str:
    found = []
    jax.eval_shape(lambda key: found.append(str(jax.random.key_impl(key))), jax.ShapeDtypeStruct((), dtype))
    return found[0]


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
        return jax.random.wrap_key_data(words.reshape(data.shape), impl=_impl(dtype))
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


# One state, one file: a safetensors file that any reader of that format can open. Each array is a tensor named by its
# key path; the metadata holds the structure, `meta`, and the SHA-256 of the whole file with the digest itself as zeros,
# so that no flipped bit and no missing byte, in the arrays or in the header, goes unnoticed.

_NATIVE = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "uint16": "U16", "int16": "I16", "uint32": "U32", "int32": "I32",
    "uint64": "U64", "int64": "I64", "float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip
_DIGEST = b'"sha256":"'
_BLANK = b"0" * 64


def save(path: str | os.PathLike, state: State, meta: Any = None) -> None:
    """Write a state to a safetensors file, whole or not at all.

    The file appears under its name only after everything is on the disk; what stood there before stays until then.

    Arguments:
        path: where; an existing file is replaced.
        state: any pytree of JAX or NumPy arrays, typed keys, Python numbers, strings and None.
        meta: anything that JSON can say: the position in the stream, the version of the cell.

    Raises:
        TypeError: if a leaf, or `meta`, cannot be written. It is raised before any file is touched.
    """
    arrays: dict[str, np.ndarray] = {}
    tree = _describe(state, (), arrays)
    # Wide elements first keeps every tensor aligned for readers that map the file.
    names = sorted(arrays, key=lambda name: -arrays[name].itemsize)
    header: dict[str, Any] = {
        "__metadata__": {"anabranch": json.dumps({"tree": tree, "meta": meta}), "sha256": _BLANK.decode()}
    }
    end = 0
    for name in names:
        array = arrays[name]
        begin, end = end, end + array.nbytes
        dtype, shape = _NATIVE.get(array.dtype.name), list(array.shape)
        if dtype is None:  # the true dtype is in the tree
            dtype, shape = "U8", [*shape, array.itemsize]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    chunks = [len(text).to_bytes(8, "little"), text, *(arrays[name].reshape(-1).view(np.uint8).data for name in names)]
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    chunks[1] = text.replace(_DIGEST + _BLANK, _DIGEST + digest.hexdigest().encode(), 1)
    _replace(Path(path), chunks)


def load(path: str | os.PathLike, like: State | None = None) -> State:
    """Read a state that `save` wrote: equal in every bit, JAX arrays as JAX arrays, NumPy arrays as NumPy arrays.

    Arguments:
        path: the file.
        like: a state of the structure, shapes and dtypes that are expected (`cell.init()`, or `jax.eval_shape` of it).
            Only with it can NamedTuples and modules be rebuilt; its values are not used, except for static fields.

    Raises:
        StateError: if the file is torn, corrupt or not a state, or if its state differs in structure, shape or dtype.
        FileNotFoundError: if there is no file.
    """
    description, arrays = _read(Path(path))
    try:
        return _rebuild(description["tree"], arrays, (), like, like is not None)
    except StateError as error:
        raise StateError(f"{path}: {error}") from None


def read_meta(path: str | os.PathLike) -> Any:
    """What `save` was given as `meta`, after the same checks of the file as in `load`.

    Raises:
        StateError: if the file is torn, corrupt or not a state.
        FileNotFoundError: if there is no file.
    """
    return _read(Path(path))[0]["meta"]


def _replace(path: Path, chunks: list) -> None:
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with open(part, "xb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):  # memory that the next file can use: making new pages is slow
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    if hasattr(os, "O_DIRECTORY"):  # the new name itself must reach the disk too
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _read(path: Path) -> tuple[dict, dict[str, bytes]]:
    data = memoryview(path.read_bytes())
    size = int.from_bytes(data[:8], "little") if len(data) >= 8 else 0
    if len(data) < 8 or 8 + size > len(data):
        raise StateError(f"{path}: expected a state file, found {len(data)} bytes that end inside the header")
    text = bytes(data[8 : 8 + size])
    at = text.find(_DIGEST) + len(_DIGEST)
    if not text.startswith(b'{"__metadata__":{"anabranch":') or at < len(_DIGEST):
        raise StateError(f"{path}: expected a file written by anabranch.state.save, found another header")
    found = hashlib.sha256(data[:8])
    found.update(text[:at] + _BLANK + text[at + 64 :])
    found.update(data[8 + size :])
    expected = text[at : at + 64].decode(errors="replace")
    if found.hexdigest() != expected:
        raise StateError(f"{path}: torn or corrupt: expected SHA-256 {expected}, found {found.hexdigest()}")
    header = json.loads(text)
    arrays = {}
    for name, tensor in header.items():
        if name != "__metadata__":
            begin, end = tensor["data_offsets"]
            arrays[name] = data[8 + size + begin : 8 + size + end]
    return json.loads(header["__metadata__"]["anabranch"]), arrays


def _children(node: Any) -> list[tuple[Any, Any]]:
    """The children of one node of a pytree, each with its key."""
    pairs, _ = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda child: child is not node)
    return [(path[0], child) for path, child in pairs]


def _kind(node: Any) -> str:
    """What kind of node or leaf this is, without its children: `list`, `anabranch.cell.Maybe`, `array`, `int`."""
    if is_array(node):
        return "key" if _is_key(node.dtype) else "array"
    kind = type(node)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _is_leaf(node: Any) -> bool:
    return jax.tree_util.all_leaves([node])


def _static(node: Any) -> dict[str, Any]:
    """Those static fields of a module that JSON can hold: sizes, names, switches."""
    if not dataclasses.is_dataclass(node):
        return {}
    fields = {f.name: getattr(node, f.name, None) for f in dataclasses.fields(node) if f.metadata.get("static")}
    return {name: value for name, value in fields.items() if isinstance(value, (bool, int, float, str, type(None)))}


def _describe(node: Any, path: tuple, arrays: dict[str, np.ndarray]) -> dict:
    """The structure below `node` for JSON; its arrays are added to `arrays`."""
    name, kind = _name(path), _kind(node)
    if kind == "key":
        arrays[name] = np.asarray(jax.random.key_data(node))
        return {"kind": kind, "impl": _impl(node.dtype), "shape": list(arrays[name].shape)}
    if kind == "array":
        if isinstance(node, jax.ShapeDtypeStruct) or not _is_known(node.dtype):
            raise TypeError(f"{name} cannot be saved: expected an array of numbers, found {node!r}")
        array = np.asarray(node)
        arrays[name] = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="), copy=False))
        lib = "jax" if isinstance(node, jax.Array) else "numpy" if isinstance(node, np.ndarray) else "scalar"
        return {"kind": kind, "dtype": array.dtype.name, "shape": list(array.shape), "lib": lib}
    if _is_leaf(node):
        if type(node) not in (bool, int, float, str):
            raise TypeError(f"{name} cannot be saved: expected an array, a number or a string, found {node!r}")
        return {"kind": kind, "value": node}
    children = []
    for entry, child in _children(node):
        key = entry.key if isinstance(entry, jax.tree_util.DictKey) else None
        if kind == "dict" and not _is_literal(key):
            raise TypeError(f"{name} cannot be saved: its key {key!r} is neither a string nor a number")
        children.append([repr(key) if kind == "dict" else str(entry), _describe(child, (*path, entry), arrays)])
    return {"kind": kind, "static": _static(node), "children": children}


def _rebuild(saved: dict, arrays: dict[str, Any], path: tuple, like: Any, check: bool) -> Any:
    name, kind = _name(path), saved["kind"]
    if check and kind != _kind(like):
        raise StateError(f"{name}: expected {_tell(like)}, found {_tell_saved(saved)}")
    if kind in ("array", "key"):
        if check and _tell(like) != _tell_saved(saved):
            raise StateError(f"{name}: expected {_tell(like)}, found {_tell_saved(saved)}")
        if kind == "key":
            data = np.ndarray(saved["shape"], np.uint32, arrays[name])
            return jax.random.wrap_key_data(jnp.array(data), impl=saved["impl"])
        array = np.ndarray(saved["shape"], jnp.dtype(saved["dtype"]), arrays[name]).copy()
        if saved["lib"] == "jax":
            if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
                raise StateError(f"{name}: found {saved['dtype']}, which JAX holds only if jax_enable_x64 is set")
            return jnp.array(array)
        return array if saved["lib"] == "numpy" else array[()]
    if "value" in saved:
        return saved["value"]
    found = [key for key, _ in saved["children"]]
    below = [child for _, child in saved["children"]]
    if not check:
        if kind == "dict":
            keys = [ast.literal_eval(key) for key in found]
            path_to = jax.tree_util.DictKey
        elif kind in ("list", "tuple", "NoneType"):
            keys, path_to = range(len(below)), jax.tree_util.SequenceKey
        else:
            raise StateError(
                f"{name}: found a {kind}, which only a state of this structure, given as `like`, can rebuild"
            )
        values = [_rebuild(child, arrays, (*path, path_to(key)), None, False) for key, child in zip(keys, below)]
        if kind == "dict":
            return dict(zip(keys, values))
        return None if kind == "NoneType" else values if kind == "list" else tuple(values)
    children = _children(like)
    expected = [repr(entry.key) if kind == "dict" else str(entry) for entry, _ in children]
    if found != expected:
        raise StateError(f"{name}: expected a {kind} of {_items(expected)}, found one of {_items(found)}")
    if saved["static"] != json.loads(json.dumps(_static(like))):
        raise StateError(f"{name}: expected a {kind} with {_static(like)}, found one with {saved['static']}")
    values = [
        _rebuild(child, arrays, (*path, entry), expected_child, True)
        for (entry, expected_child), child in zip(children, below)
    ]
    return jax.tree.unflatten(jax.tree.structure(like, is_leaf=lambda child: child is not like), values)


def _name(path: tuple) -> str:
    return f"state{name_of(path)}"


def _is_literal(key: Any) -> bool:
    try:
        return type(ast.literal_eval(repr(key))) is type(key)
    except (ValueError, SyntaxError):
        return False


def _is_known(dtype: Any) -> bool:
    try:
        return jnp.dtype(dtype.name).itemsize == dtype.itemsize and dtype.kind not in "OSUmM"
    except TypeError:
        return False


def _items(names: list[str]) -> str:
    return f"{len(names)} ({', '.join(names)})" if names else "0"


def _tell(like: Any) -> str:
    kind = _kind(like)
    if kind == "key":
        data = jax.eval_shape(jax.random.key_data, like)
        return f"a key {_show(data.shape, _impl(like.dtype))}"
    return _show(like.shape, like.dtype.name) if kind == "array" else f"a {kind}"


def _tell_saved(saved: dict) -> str:
    kind = saved["kind"]
    if kind == "key":
        return f"a key {_show(saved['shape'], saved['impl'])}"
    return _show(saved["shape"], saved["dtype"]) if kind == "array" else f"a {kind}"
