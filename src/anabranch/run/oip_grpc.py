"""The Open Inference Protocol over gRPC. Its messages are in `oip.proto`, from which `oip_pb2.py` is made:

python -m grpc_tools.protoc -Isrc/anabranch/run --python_out=src/anabranch/run --pyi_out=src/anabranch/run oip.proto
"""

from typing import Any

import grpc
import numpy as np
from starlette.exceptions import HTTPException

from anabranch.run import oip
from anabranch.run import oip_pb2 as pb
from anabranch.run.batcher import Closed, Full
from anabranch.run.live import Tensor

_CONTENTS = {
    "BOOL": "bool_contents", "INT8": "int_contents", "INT16": "int_contents", "INT32": "int_contents",
    "INT64": "int64_contents", "UINT8": "uint_contents", "UINT16": "uint_contents", "UINT32": "uint_contents",
    "UINT64": "uint64_contents", "FP32": "fp32_contents", "FP64": "fp64_contents",
}  # fmt: skip
_CODES = {401: grpc.StatusCode.UNAUTHENTICATED, 404: grpc.StatusCode.NOT_FOUND}


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
        try:
            return pb.ModelMetadataResponse(**oip.metadata(request.name, self.server.cell(request.name)))
        except HTTPException as error:
            await context.abort(_CODES[error.status_code], error.detail)

    async def ModelInfer(self, request, context):
        try:
            return await self._infer(request, context)
        except ValueError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except HTTPException as error:
            await context.abort(_CODES[error.status_code], error.detail)
        except Full as error:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
        except Closed as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))

    async def ModelStreamInfer(self, requests, context):
        async for request in requests:
            try:
                yield pb.ModelStreamInferResponse(infer_response=await self._infer(request, context))
            except (ValueError, HTTPException, Full, Closed) as error:
                said = error.detail if isinstance(error, HTTPException) else str(error)
                yield pb.ModelStreamInferResponse(error_message=said)

    async def _infer(self, request, context):
        header = dict(context.invocation_metadata() or ()).get("authorization", "")
        tenant = self.server.authorize(header)
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


def _to_bytes(message: Any) -> bytes:
    return message.SerializeToString()


async def start(server: Any, host: str, port: int) -> grpc.aio.Server:
    """A gRPC server on this port."""
    said = server.config
    made = grpc.aio.server(options=[("grpc.max_receive_message_length", said.max_message)])
    service, handlers = Service(server), {}
    for name in ("ServerLive", "ServerReady", "ServerMetadata", "ModelReady", "ModelMetadata", "ModelInfer"):
        request = getattr(pb, name + "Request")
        handlers[name] = grpc.unary_unary_rpc_method_handler(getattr(service, name), request.FromString, _to_bytes)
    handlers["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(
        service.ModelStreamInfer, pb.ModelInferRequest.FromString, _to_bytes
    )
    made.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("inference.GRPCInferenceService", handlers),))
    if said.certificate is not None:
        pair = (said.key.read_bytes(), said.certificate.read_bytes())
        server.grpc_port = made.add_secure_port(f"{host}:{port}", grpc.ssl_server_credentials([pair]))
    else:
        server.grpc_port = made.add_insecure_port(f"{host}:{port}")
    await made.start()
    return made
