"""The OpenAPI 3.1 description of a server's HTTP surface, made from what it serves."""

from typing import Any

import numpy as np

import anabranch
from anabranch.run import oip
from anabranch.run.config import LabelConfig, ServeConfig
from anabranch.run.served_cell import ServedCell, Tensor
from anabranch.run.served_pipeline import ServedPipeline

Schema = dict[str, Any]

_REFUSALS = {
    400: "The request cannot be understood. The error names the field.",
    401: "A bearer token is needed.",
    403: "Without tokens: a page of another site asks. With tokens: only an operator may ask.",
    404: "There is no such thing here.",
    408: "The body did not come in time.",
    413: "The body is longer than the server's `max_message`.",
    429: "There is no room for more events; `Retry-After` says when to come again.",
    503: "No events are taken now.",
}
_BODY = (400, 408, 413, 429, 503)
_TEXT: Schema = {"type": "string"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_TRUTH: Schema = {"type": "boolean"}
_ERROR: Schema = {"$ref": "#/components/schemas/Error"}
_SOCKETS = """Over a WebSocket, `/v1/stream` takes what `POST /v1/events` does, as JSON messages, answered in order."""
_CELL_SOCKETS = """
A message of bytes holds events of many streams: of each the length of its name (2 bytes, little-endian), flags (1 byte:
1 begins the stream anew, 2 ends it), name and inputs. The WebSocket `/v1/stream/KEY` takes the events of one stream as
bytes; the server first says `{"seen": n}`. Bytes are answered by the number of each event (4 bytes) and its outputs."""


def describe(name: str, served: ServedPipeline | ServedCell, config: ServeConfig) -> Schema:
    """The description of a server: its paths, the bodies they take and give, and what refuses them.

    Arguments:
        name: of what is served.
        served: its columns or tensors make the schemas of events and answers.
        config: whether tokens are needed.
    """
    event, answer = _row(served) if isinstance(served, ServedPipeline) else _cell_event(served)
    who = 403 if config.tokens is None else 401
    one_or_many = {"oneOf": [answer, _object(results=_list(answer))]}
    stats = _object(name=_TEXT, waiting=_COUNT, keys={"type": "object"})
    paths: Schema = {
        "/v1/events": {
            "post": _operation(
                "Answer one event, or a list of them; a bad one is answered by its error",
                _json(one_or_many), who, *_BODY, body=_json({"oneOf": [event, _list(event)]}),
            )
        },
        "/v1/stats": {"get": _operation("The figures of the last seconds", _json(stats), who)},
        "/metrics": {"get": _operation("Metrics for Prometheus", {"text/plain": {"schema": _TEXT}}, who, 403)},
        "/healthz": {"get": _operation("Whether the server lives", {"text/plain": {"schema": _TEXT}})},
        "/readyz": {"get": _ready()},
        "/openapi.json": {"get": _operation("This description", _json({"type": "object"}))},
        "/v2": {"get": _operation("What the server is", _json(_object(name=_TEXT, version=_TEXT)))},
        "/v2/health/live": {"get": _operation("Whether the server lives", _json(_object(live=_TRUTH)))},
        "/v2/health/ready": {"get": _ready()},
    }  # fmt: skip
    sockets = _SOCKETS
    if isinstance(served, ServedCell):
        paths |= _streams(answer, who) | _models(name, served, who)
        sockets += _CELL_SOCKETS
    said: Schema = {
        "openapi": "3.1.0",
        "info": {"title": name, "version": anabranch.__version__, "description": sockets},
        "paths": paths,
        "components": {"schemas": {"Error": _object(error=_TEXT)}},
    }
    if config.tokens is not None:
        said["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        for path in paths.values():
            for method in path.keys() & {"get", "post"}:
                if "401" in path[method]["responses"]:
                    path[method]["security"] = [{"token": []}]
    return said


# Events and answers


def _row(served: ServedPipeline) -> tuple[Schema, Schema]:
    """The schemas of a row and of its answer."""
    pipeline = served.pipeline
    config, typed = pipeline.config, pipeline.typed
    label, optional = config.label, {*config.source.optional, *typed.targets}
    columns: Schema = {name: {"type": ["string", "number", "boolean", "null"]} for name in typed.shown}
    keys = [name for key in typed.keys for name in key]
    columns |= {name: {"type": ["string", "number"]} for name in keys}
    columns |= {name: {"type": ["number", "null"] if name in optional else "number"} for name in typed.inputs}
    columns |= {name: {"type": ["number", "null"]} for name in typed.targets}
    needed = [name for name in [*keys, *typed.inputs] if name not in optional]
    if label is not None:
        columns |= _label(label)
        needed = needed if label.id is None else [label.id]  # a row that tells a label has little else
    columns[config.source.time] = {
        "type": ["number", "string", "null"],
        "description": "Seconds, or a date. Without it the row counts at the server's time.",
    }
    answer = {
        "description": "The columns of a prediction; `label` for a row that told one; `error` for a bad row.",
        "type": "object",
        "properties": {"row": _COUNT, "label": _TEXT, "error": _TEXT},
        "anyOf": [{"required": ["row"]}, {"required": ["error"]}],
    }
    return {"type": "object", "properties": columns, "required": list(dict.fromkeys(needed))}, answer


def _label(label: LabelConfig) -> Schema:
    kinds: dict[str, Schema] = {
        "binary": {"enum": [0, 1, None]},
        "classes": {"type": ["integer", "null"], "minimum": 0},
        "value": {"type": ["number", "null"]},
    }
    columns = {label.column: kinds[label.kind] | {"description": "The label; empty where it is not known."}}
    if label.time is not None:
        columns[label.time] = {"type": ["number", "string", "null"]}
    if label.id is not None:
        columns[label.id] = {"type": ["string", "number"]}
    return columns


def _cell_event(served: ServedCell) -> tuple[Schema, Schema]:
    """The schemas of an event of a cell and of its answer."""
    event = _object(stream={"type": "string", "minLength": 1}, x=_tensors(served.inputs), start=_TRUTH, end=_TRUTH)
    event |= {"required": ["stream", "x"], "additionalProperties": False}
    answer = _object(
        n={**_COUNT, "description": "The number of the event in its stream."}, y=_tensors(served.outputs, null=True)
    )
    return event, {"anyOf": [answer, _ERROR]}


def _tensors(tensors: list[Tensor], null: bool = False) -> Schema:
    """One array alone, or an object of several by name. `null` stands for numbers that JSON cannot say."""
    if len(tensors) == 1:
        return _tensor(tensors[0], null)
    return _object(**{tensor.name: _tensor(tensor, null) for tensor in tensors})


def _tensor(tensor: Tensor, null: bool = False) -> Schema:
    """Nested lists, for any shape."""
    schema = _number(tensor.dtype, null)
    for size in reversed(tensor.shape):
        schema = {"type": "array", "items": schema, "minItems": size, "maxItems": size}
    return schema


def _number(dtype: np.dtype, null: bool) -> Schema:
    if dtype.kind == "b":
        return _TRUTH
    if dtype.kind in "iu":
        info = np.iinfo(dtype)
        return {"type": "integer", "minimum": int(info.min), "maximum": int(info.max)}
    schema: Schema = {"type": ["number", "null"] if null else "number", "description": str(dtype)}
    return schema if null else schema | {"maximum": float(np.finfo(dtype).max), "minimum": float(np.finfo(dtype).min)}


# Streams, and the Open Inference Protocol


def _streams(answer: Schema, who: int) -> Schema:
    recent = _object(stream=_TEXT, n=_COUNT, ago={"type": "number", "description": "Seconds since its last event."})
    listed = _json(_object(streams=_list(recent)))
    watched = _json(_object(stream=_TEXT, n=_COUNT, recent=_list(answer)))
    watch = _operation("What a stream has answered since it was first watched", watched, who, 404)
    return {
        "/v1/streams": {"get": _operation("The streams that had events last", listed, who)},
        "/v1/streams/{key}": {"get": watch, "parameters": [_parameter("key", "path", _TEXT)]},
    }


def _models(name: str, served: ServedCell, who: int) -> Schema:
    shape = _list({"type": "integer"})
    tensor = _object(name=_TEXT, datatype={"enum": list(oip.TYPES)}, shape=shape)
    metadata = _json(_object(name=_TEXT, versions=_list(_TEXT), inputs=_list(tensor), outputs=_list(tensor)))
    flat = _object(name=_TEXT, datatype={"enum": list(oip.TYPES)}, shape=shape, data=_list({}))
    flat["required"] = ["name", "datatype", "shape"]  # data may follow as bytes
    asked = _object(
        inputs=_list(flat),
        outputs=_list(_object(name=_TEXT)),
        id=_TEXT,
        parameters=_object(sequence_id={"type": ["integer", "string"]}, sequence_start=_TRUTH, sequence_end=_TRUTH),
    )
    asked["required"], asked["properties"]["parameters"]["required"] = ["inputs"], []
    infer = _operation(
        "Answer events of one stream, named by `sequence_id`; without it they are a stream of their own",
        _binary(_object(model_name=_TEXT, model_version=_TEXT, outputs=_list(flat))), who, 404, *_BODY,
        body=_binary(asked),
    )  # fmt: skip
    length = _parameter("Inference-Header-Content-Length", "header", {"type": "string", "pattern": "^[0-9]+$"})
    infer["parameters"] = [length | {"required": False, "description": "Bytes of the JSON, if others follow it."}]
    paths: Schema = {}
    for path, rest in (("", []), ("/versions/{version}", [_parameter("version", "path", _TEXT)])):
        path, where = "/v2/models/{name}" + path, [_parameter("name", "path", {"enum": [name]}), *rest]
        paths[path] = {"get": _operation("What the cell takes and gives", metadata, 404)}
        paths[path + "/ready"] = {"get": _ready(404)}
        paths[path + "/infer"] = {"post": infer}
        for suffix in ("", "/ready", "/infer"):
            paths[path + suffix]["parameters"] = where
    return paths


# Parts of a description


def _operation(summary: str, answer: Schema, *refusals: int, body: Schema | None = None) -> Schema:
    responses: Schema = {"200": {"description": "The answer.", "content": answer}}
    responses |= {str(status): {"description": _REFUSALS[status], "content": _json(_ERROR)} for status in refusals}
    if "429" in responses:
        responses["429"]["headers"] = {"Retry-After": {"schema": _COUNT, "description": "Seconds."}}
    return {"summary": summary, "responses": responses} | (
        {} if body is None else {"requestBody": {"required": True, "content": body}}
    )


def _ready(*refusals: int) -> Schema:
    operation = _operation("Whether events are taken", _json(_object(ready=_TRUTH)), *refusals)
    operation["responses"]["503"] = {"description": "Not now.", "content": _json(_object(ready=_TRUTH))}
    return operation


def _parameter(name: str, where: str, schema: Schema) -> Schema:
    return {"name": name, "in": where, "required": True, "schema": schema}


def _json(schema: Schema) -> Schema:
    return {"application/json": {"schema": schema}}


def _binary(schema: Schema) -> Schema:
    """JSON, alone or with the bytes of tensors after it."""
    return _json(schema) | {"application/octet-stream": {}}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _object(**properties: Schema) -> Schema:
    """An object that has these."""
    return {"type": "object", "properties": properties, "required": list(properties)}
