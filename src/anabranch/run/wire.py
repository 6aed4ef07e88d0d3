"""Events and answers as they go over the wire: JSON for rows and cells, frames of bytes for cells."""

import math
import struct
from typing import Any, NamedTuple

from anabranch.run import oip
from anabranch.run.served_cell import END, START, CellEvent, ServedCell
from anabranch.run.served_pipeline import ServedPipeline

_NUMBER = struct.Struct("<I")
_HEAD = struct.Struct("<HB")


class Parsed(NamedTuple):
    """An event, and whose turn it takes: events of one stream keep their order."""

    stream: Any
    event: Any


def parse(served: ServedPipeline | ServedCell, said: Any, tenant: str | None, connection: tuple) -> Parsed:
    """An event that came as JSON: a row, or `{"stream", "x", "start", "end"}`. Rows take turns by connection.

    Raises:
        ValueError: if it is none; the message names the field.
    """
    if not isinstance(said, dict):
        raise ValueError(f"expected an object, got {type(said).__name__}")
    if isinstance(served, ServedPipeline):
        return Parsed(connection, served.own(tenant, said))
    unknown = said.keys() - {"stream", "x", "start", "end"}
    if unknown:
        raise ValueError(f"unknown field {min(unknown)!r}")
    stream, x = said.get("stream"), said.get("x")
    if not isinstance(stream, str) or not stream:
        raise ValueError(f"stream: expected a name, got {stream!r}")
    flags = (START if said.get("start") is True else 0) | (END if said.get("end") is True else 0)
    parts = []
    for tensor in served.inputs:
        alone = len(served.inputs) == 1
        given = x if alone else x.get(tensor.name) if isinstance(x, dict) else None
        parts.append(oip.numbers(given, tensor, "x" if alone else f"x.{tensor.name}").tobytes())
    key = f"{tenant or ''}/{stream}"
    return Parsed(key, CellEvent(key, b"".join(parts), flags))


def say(served: ServedPipeline | ServedCell, answer: Any) -> dict[str, Any]:
    """An answer as JSON: the columns of a prediction, or `{"n", "y"}`; a bad event's is `{"error"}`."""
    if isinstance(answer, ValueError):
        return {"error": str(answer)}
    if isinstance(served, ServedPipeline):
        return finite(answer)
    n, data = answer
    values = [finite(array[0].tolist()) for array in oip.arrays(served.outputs, [data])]
    names = [tensor.name for tensor in served.outputs]
    return {"n": n, "y": values[0] if len(values) == 1 else dict(zip(names, values))}


def parse_stream(served: ServedCell, key: str, data: bytes | str) -> list[CellEvent]:
    """Events of one stream, one after the other.

    Raises:
        ValueError: if they are not a whole number of events.
    """
    data = data.encode() if isinstance(data, str) else data
    if not data or len(data) % served.width:
        raise ValueError(f"a message holds a multiple of {served.width} bytes, got {len(data)}")
    return [CellEvent(key, data[at : at + served.width]) for at in range(0, len(data), served.width)]


def parse_frame(served: ServedCell, tenant: str | None, data: bytes) -> list[Parsed]:
    """Events of many streams: of each the length of its name (2 bytes), flags (1 byte), name, and inputs.

    Raises:
        ValueError: if the frame ends within an event, or a name is no text.
    """
    found, at, space = [], 0, tenant or ""
    while at < len(data):
        if len(data) < at + _HEAD.size:
            raise ValueError(f"the frame of {len(data)} bytes ends within event {len(found)}")
        length, flags = _HEAD.unpack_from(data, at)
        name, end = at + _HEAD.size, at + _HEAD.size + length + served.width
        if len(data) < end or not length or flags > (START | END):
            raise ValueError(f"the frame of {len(data)} bytes has no event {len(found)} at byte {at}")
        key = f"{space}/{data[name : name + length].decode()}"
        found.append(Parsed(key, CellEvent(key, data[name + length : end], flags)))
        at = end
    return found


def say_bytes(answers: list[tuple[int, bytes]]) -> bytes:
    """The number of each event in its stream (4 bytes), and its outputs."""
    return b"".join(_NUMBER.pack(n) + y for n, y in answers)


def finite(value: Any) -> Any:
    """The value, with None for the numbers that JSON cannot say."""
    if isinstance(value, list):
        return [finite(item) for item in value]
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
