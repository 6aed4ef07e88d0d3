"""The Open Inference Protocol over gRPC. Its messages are in `oip.proto`, from which `oip_pb2.py` is made:

python -m grpc_tools.protoc -Isrc/anabranch/run --python_out=src/anabranch/run --pyi_out=src/anabranch/run oip.proto
"""

from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import numpy as np
from google.protobuf.message import DecodeError
from starlette.exceptions import HTTPException

from anabranch.run import oip
from anabranch.run import oip_pb2 as pb
from anabranch.run.batcher import Closed, Full
from anabranch.run.served_cell import Tensor
from anabranch.run.server import NOT_TAKEN

_CONTENTS = {
    "BOOL": "bool_contents", "INT8": "int_contents", "INT16": "int_contents", "INT32": "int_contents",
    "INT64": "int64_contents", "UINT8": "uint_contents", "UINT16": "uint_contents", "UINT32": "uint_contents",
    "UINT64": "uint64_contents", "FP32": "fp32_contents", "FP64": "fp64_contents",
}  # fmt: skip
_CODES = {401: grpc.StatusCode.UNAUTHENTICATED, 404: grpc.StatusCode.NOT_FOUND}
_REFUSED = (DecodeError, ValueError, HTTPException, Full, Closed)


class Service:
    """Answers for a `Server`."""

    def __init__(self, server: Any):
        self.server = server

    async def ServerLive(self, request, context):
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request, context):
        return pb.ServerReadyResponse(ready=self.server.ready)

    async def ServerMetadata(self, request, context):
        return pb.ServerMetadataResponse(**oip.server())

    async def ModelReady(self, request, context):
        known = request.name == self.server.name
        return pb.ModelReadyResponse(ready=known and self.server.ready)

    async def ModelMetadata(self, request, context):
        return pb.ModelMetadataResponse(**oip.metadata(request.name, self.server.cell(request.name)))

    async def ModelInfer(self, request, context):
        return await self._infer(request, context)

    async def ModelStreamInfer(self, messages, context):
        async for message in messages:
            try:
                answer = await self._infer(pb.ModelInferRequest.FromString(message), context)
                yield pb.ModelStreamInferResponse(infer_response=answer)
            except _REFUSED as error:
                yield pb.ModelStreamInferResponse(error_message=_refusal(error)[1])

    async def _infer(self, request, context):
        header = dict(context.invocation_metadata() or ()).get("authorization", "")
        tenant = self.server.access.authorize(header).name
        served = self.server.cell(request.model_name)
        inputs, raw = {}, list(request.raw_input_contents)
        if raw and len(raw) != len(request.inputs):
            raise ValueError(f"raw_input_contents: {len(raw)} for {len(request.inputs)} inputs")
        for i, given in enumerate(request.inputs):
            if given.datatype not in oip.TYPES or any(not 0 <= size < 1 << 31 for size in given.shape):
                raise ValueError(f"{given.name}: {given.datatype}{list(given.shape)} is no tensor")
            tensor = Tensor(given.name, tuple(given.shape), np.dtype(oip.TYPES[given.datatype]))
            if raw:
                inputs[given.name] = oip.from_bytes(raw[i], tensor)
            else:
                values = list(getattr(given.contents, _CONTENTS.get(given.datatype, "bytes_contents")))
                inputs[given.name] = oip.numbers(values, tensor, given.name)
        said = {
            name: getattr(p, p.WhichOneof("parameter_choice") or "", None) for name, p in request.parameters.items()
        }
        events = oip.SequenceOf.of(said).events(tenant, inputs, served)
        answers = await self.server.batcher.submit(events[0].key, tenant, events)
        arrays = oip.arrays(served.outputs, [data for _, data in answers])
        wanted = {output.name for output in request.outputs}
        response = pb.ModelInferResponse(model_name=request.model_name, model_version="1", id=request.id)
        for tensor, array in zip(served.outputs, arrays):
            if not wanted or tensor.name in wanted:
                response.outputs.add(name=tensor.name, datatype=oip.NAMES[array.dtype], shape=array.shape)
                response.raw_output_contents.append(array.tobytes())
        return response


def _refusal(error: Exception) -> tuple[grpc.StatusCode, str]:
    """How a client is told of an error. The text is cut, since it goes in a header."""
    match error:
        case HTTPException():
            return _CODES[error.status_code], error.detail[:500]
        case Full():
            return grpc.StatusCode.RESOURCE_EXHAUSTED, str(error)
        case Closed():
            return grpc.StatusCode.UNAVAILABLE, NOT_TAKEN
        case _:
            return grpc.StatusCode.INVALID_ARGUMENT, str(error)[:500]


def _unary(answer: Callable[[Any, Any], Awaitable[Any]], kind: Any) -> Callable[[bytes, Any], Awaitable[Any]]:
    """A method that reads its message itself: gRPC would log one that cannot be read as an error of the server."""

    async def call(message: bytes, context: Any) -> Any:
        try:
            return await answer(kind.FromString(message), context)
        except _REFUSED as error:
            await context.abort(*_refusal(error))

    return call


def _to_bytes(message: Any) -> bytes:
    return message.SerializeToString()


async def start(server: Any, host: str, port: int) -> grpc.aio.Server:
    """A gRPC server on this port."""
    said = server.config
    made = grpc.aio.server(options=[("grpc.max_receive_message_length", said.max_message)])
    service, handlers = Service(server), {}
    for name in ("ServerLive", "ServerReady", "ServerMetadata", "ModelReady", "ModelMetadata", "ModelInfer"):
        call = _unary(getattr(service, name), getattr(pb, name + "Request"))
        handlers[name] = grpc.unary_unary_rpc_method_handler(call, response_serializer=_to_bytes)
    handlers["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(
        service.ModelStreamInfer, response_serializer=_to_bytes
    )
    made.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("inference.GRPCInferenceService", handlers),))
    if said.certificate is not None:
        pair = (said.key.read_bytes(), said.certificate.read_bytes())
        server.grpc_port = made.add_secure_port(f"{host}:{port}", grpc.ssl_server_credentials([pair]))
    else:
        server.grpc_port = made.add_insecure_port(f"{host}:{port}")
    await made.start()
    return made
