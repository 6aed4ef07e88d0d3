"""The Open Inference Protocol (KServe v2) over HTTP: tensors as JSON or in the binary extension, sequences as streams.

A sequence is a stream of the cell: `sequence_id` names it, with `sequence_start` it begins anew, after `sequence_end`
its state is dropped. A request without one is a stream of its own. The first dimension of a tensor counts events.
"""

import json
import uuid
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

import anabranch
from anabranch.run.served_cell import END, START, CellEvent, ServedCell, Tensor

TYPES = {
    "BOOL": "bool", "UINT8": "uint8", "UINT16": "uint16", "UINT32": "uint32", "UINT64": "uint64", "INT8": "int8",
    "INT16": "int16", "INT32": "int32", "INT64": "int64", "FP16": "float16", "FP32": "float32", "FP64": "float64",
}  # fmt: skip
NAMES = {np.dtype(dtype): name for name, dtype in TYPES.items()}
EXTENSIONS = ["sequence", "binary_tensor_data"]


class SequenceOf(NamedTuple):
    """Whose events a request brings."""

    id: int | str | None = None
    start: bool = False
    end: bool = False

    @classmethod
    def of(cls, parameters: dict[str, Any]) -> "SequenceOf":
        """From the parameters of a request.

        Raises:
            ValueError: if one has another type than it should.
        """
        id, start, end = (parameters.get("sequence_" + name) for name in ("id", "start", "end"))
        if not (id is None or type(id) in (int, str)):
            raise ValueError(f"sequence_id: expected a number or a name, got {id!r}")
        for name, value in (("start", start), ("end", end)):
            if not (value is None or type(value) is bool):
                raise ValueError(f"sequence_{name}: expected true or false, got {value!r}")
        return cls(None if id in (0, "") else id, bool(start), bool(end))

    def events(self, tenant: str, inputs: dict[str, np.ndarray], served: ServedCell) -> list[CellEvent]:
        """The events of a request.

        Raises:
            ValueError: if an input is missing, unknown, or of another shape or type than the cell's.
        """
        unknown = inputs.keys() - {tensor.name for tensor in served.inputs}
        if unknown:
            raise ValueError(f"inputs: {min(unknown)!r} is not an input of this cell")
        arrays, count = [], None
        for tensor in served.inputs:
            if tensor.name not in inputs:
                raise ValueError(f"inputs: {tensor.name!r} is missing")
            array = inputs[tensor.name]
            if array.dtype != tensor.dtype:
                raise ValueError(f"{tensor.name}: expected {NAMES[tensor.dtype]}, got {NAMES[array.dtype]}")
            array = array[None] if array.shape == tensor.shape else array
            if array.shape[1:] != tensor.shape or array.ndim != len(tensor.shape) + 1 or not len(array):
                raise ValueError(f"{tensor.name}: expected shape [n, {_dims(tensor)}], got {list(array.shape)}")
            if count not in (None, len(array)):
                raise ValueError(f"{tensor.name}: has {len(array)} events, another input {count}")
            count = len(array)
            arrays.append(np.ascontiguousarray(array).reshape(count, -1).view(np.uint8).reshape(count, -1))
        rows = np.concatenate(arrays, axis=1).tobytes()
        width, n = served.width, count or 0
        alone = self.id is None
        key = f"{tenant}/#{uuid.uuid4()}" if alone else f"{tenant}/{self.id}"
        flags = np.zeros(n, int)
        flags[0] |= START * (self.start or alone)
        flags[-1] |= END * (self.end or alone)
        return [CellEvent(key, rows[i * width : (i + 1) * width], flag) for i, flag in enumerate(flags.tolist())]


class Asked(NamedTuple):
    """A request for inference."""

    id: str
    sequence: SequenceOf
    inputs: dict[str, np.ndarray]
    outputs: dict[str, bool]
    """Which outputs, and whether in binary; empty for all."""
    binary: bool
    """Whether outputs come in binary where nothing is said."""


def server() -> dict[str, Any]:
    """What the server is."""
    return {"name": "anabranch", "version": anabranch.__version__, "extensions": EXTENSIONS}


def metadata(name: str, served: ServedCell) -> dict[str, Any]:
    """What a cell takes and gives."""

    def say(tensors: Sequence[Tensor]) -> list[dict[str, Any]]:
        return [{"name": t.name, "datatype": NAMES[t.dtype], "shape": [-1, *t.shape]} for t in tensors]

    inputs, outputs = say(served.inputs), say(served.outputs)
    return {"name": name, "versions": ["1"], "platform": "anabranch_cell", "inputs": inputs, "outputs": outputs}


def read(body: bytes, head_length: str | None) -> Asked:
    """A request, as JSON or JSON with binary tensors after it.

    Raises:
        ValueError: if it says what it may not; the message names the field.
    """
    length = len(body)
    if head_length is not None:
        if not head_length.isdecimal() or int(head_length) > len(body):
            raise ValueError(f"Inference-Header-Content-Length: {head_length!r} is no length within the body")
        length = int(head_length)
    try:
        text = body[:length].decode()
        said = json.loads(text)
        if "\\u" in text:  # JSON may hold half of a surrogate pair, which is no text
            json.dumps(said, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(said, dict) or not isinstance(said.get("inputs"), list):
        raise ValueError("inputs: expected a list of tensors")
    rest, inputs = body[length:], {}
    for i, given in enumerate(said["inputs"]):
        if not isinstance(given, dict) or not isinstance(given.get("name"), str):
            raise ValueError(f"inputs[{i}]: expected a tensor with a name")
        name, shape = given["name"], given.get("shape")
        if not isinstance(given.get("datatype"), str) or given["datatype"] not in TYPES:
            raise ValueError(f"{name}: datatype {given.get('datatype')!r} is not known")
        if not isinstance(shape, list) or not all(type(size) is int and 0 <= size < 1 << 31 for size in shape):
            raise ValueError(f"{name}: shape {shape!r} is no shape")
        tensor = Tensor(name, tuple(shape), np.dtype(TYPES[given["datatype"]]))
        size = _parameters(given, name).get("binary_data_size")
        if size is None:
            inputs[name] = numbers(given.get("data"), tensor, name)
        else:
            inputs[name] = from_bytes(rest[: size if type(size) is int else 0], tensor)
            rest = rest[inputs[name].nbytes :]
    if rest:
        raise ValueError(f"{len(rest)} bytes follow the last tensor")
    parameters = _parameters(said, "request")
    wanted = said.get("outputs", [])
    if not isinstance(wanted, list) or not all(isinstance(o, dict) and isinstance(o.get("name"), str) for o in wanted):
        raise ValueError("outputs: expected a list of names")
    binary = bool(parameters.get("binary_data_output"))
    outputs = {o["name"]: bool(_parameters(o, o["name"]).get("binary_data", binary)) for o in wanted}
    return Asked(str(said.get("id", "")), SequenceOf.of(parameters), inputs, outputs, binary)


def write(
    name: str, asked: Asked, tensors: Sequence[Tensor], arrays: Sequence[np.ndarray]
) -> tuple[bytes, bytes, int | None]:
    """The answer: JSON, what follows it in binary, and if something does the length of the JSON."""
    outputs, data = [], []
    for tensor, array in zip(tensors, arrays):
        if asked.outputs and tensor.name not in asked.outputs:
            continue
        output: dict[str, Any] = {"name": tensor.name, "datatype": NAMES[array.dtype], "shape": list(array.shape)}
        if asked.outputs.get(tensor.name, asked.binary):
            data.append(array.tobytes())
            output["parameters"] = {"binary_data_size": len(data[-1])}
        else:
            output["data"] = array.ravel().tolist()
        outputs.append(output)
    said: dict[str, Any] = {"model_name": name, "model_version": "1", "outputs": outputs}
    if asked.id:
        said["id"] = asked.id
    head = json.dumps(said).encode()
    return head, b"".join(data), len(head) if data else None


def numbers(given: Any, tensor: Tensor, name: str) -> np.ndarray:
    """An array from nested lists, or flat ones.

    Raises:
        ValueError: if these are not that many finite numbers; the message names them `name`.
    """
    try:
        array = np.asarray(given)
        if array.dtype.kind not in "biuf" or (array.dtype.kind == "f" and tensor.dtype.kind != "f"):
            raise ValueError
        with np.errstate(over="ignore"):
            typed = array.astype(tensor.dtype).reshape(tensor.shape)
        if not np.isfinite(typed).all():
            raise ValueError
        if array.dtype.kind in "iu" and not np.array_equal(typed.ravel(), array.ravel()) and tensor.dtype.kind != "f":
            raise ValueError
    except (ValueError, TypeError, OverflowError):
        said = repr(given)
        said = said if len(said) < 80 else said[:77] + "..."
        raise ValueError(f"{name}: expected {tensor.dtype}[{_dims(tensor)}], got {said}") from None
    return typed


def from_bytes(data: bytes, tensor: Tensor) -> np.ndarray:
    """An array from its bytes.

    Raises:
        ValueError: if it is not that many bytes.
    """
    if len(data) != tensor.nbytes:
        raise ValueError(f"{tensor.name}: expected {tensor.nbytes} bytes, got {len(data)}")
    return np.frombuffer(data, tensor.dtype).reshape(tensor.shape)


def arrays(tensors: Sequence[Tensor], answers: list[bytes]) -> list[np.ndarray]:
    """The outputs of some events, each stacked on a leading axis."""
    whole = np.frombuffer(b"".join(answers), np.uint8).reshape(len(answers), -1)
    found, start = [], 0
    for tensor in tensors:
        part = np.ascontiguousarray(whole[:, start : start + tensor.nbytes])
        found.append(part.view(tensor.dtype).reshape(len(answers), *tensor.shape))
        start += tensor.nbytes
    return found


def _parameters(said: dict[str, Any], where: str) -> dict[str, Any]:
    parameters = said.get("parameters", {})
    if not isinstance(parameters, dict):
        raise ValueError(f"{where}: parameters must be an object, got {parameters!r}")
    return parameters


def _dims(tensor: Tensor) -> str:
    return ", ".join(map(str, tensor.shape))
