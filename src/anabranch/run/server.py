"""`anabranch serve`: a pipeline or a cell for live clients, over HTTP, WebSocket and the Open Inference Protocol.

Starlette on uvicorn: the common ground of Python's asynchronous servers, with uvloop and httptools in C beneath, and
WebSocket and HTTP in one port. The work itself is in `Live.step`, in one thread.
"""

import asyncio
import contextlib
import hashlib
import hmac
import json
import logging
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from anabranch.batching import Deadlines, Scheduler
from anabranch.run import oip
from anabranch.run.batcher import Batcher, Closed, Full
from anabranch.run.config import ConfigError, PipelineConfig, ServeConfig, ServedCellFile
from anabranch.run.live import END, START, CellEvent, Live, ServedCell, ServedPipeline
from anabranch.run.metrics import Metrics

log = logging.getLogger("anabranch.serve")
IN_FLIGHT = 64
"""Messages of one WebSocket that are being answered; it is read no further until one has been."""


class Server:
    """A server of one pipeline or cell.

    Arguments:
        config: what `anabranch.run.config.read_served` gives.
        folder: where modules that the file names are looked for first.
        policy: which of the waiting events are stepped next.

    Raises:
        ConfigError: if a cell cannot be made as configured, or the file of tokens cannot be read.
    """

    def __init__(
        self, config: PipelineConfig | ServedCellFile, folder: Path | None = None, policy: Scheduler | None = None
    ):
        self.config: ServeConfig = config.serve
        if isinstance(config, ServedCellFile):
            self.name, self.served = config.cell.name, ServedCell(config.cell, folder)
            out, keep = self.served.out, config.cell.keep
        else:
            self.name, self.served = config.name, ServedPipeline(config, folder)
            out, keep = self.served.pipeline.out, config.checkpoint.keep
        serve = self.config
        self.live = Live(self.served, out / "journal", durable=serve.durable, every=serve.every, keep=keep)
        self.tenants = _tenants(serve.tokens)
        self.metrics = Metrics()
        self.policy = Deadlines() if policy is None else policy
        self.ready = False
        self.app = Starlette(routes=self._routes(), lifespan=self._lifespan, exception_handlers=_HANDLERS)

    def _routes(self) -> list:
        model = "/v2/models/{name}"
        return [
            Route("/v1/events", self.events, methods=["POST"]),
            WebSocketRoute("/v1/stream", self.stream),
            WebSocketRoute("/v1/stream/{key:path}", self.one_stream),
            Route("/v1/stats", self.stats),
            Route("/healthz", lambda request: PlainTextResponse("ok")),
            Route("/readyz", self.is_ready),
            Route("/metrics", self.prometheus),
            Route("/v2", lambda request: JSONResponse(oip.server())),
            Route("/v2/health/live", lambda request: JSONResponse({"live": True})),
            Route("/v2/health/ready", self.is_ready),
            *(Route(path, self.model) for path in (model, model + "/versions/{version}")),
            *(Route(path + "/ready", self.model_ready) for path in (model, model + "/versions/{version}")),
            *(Route(path + "/infer", self.infer, methods=["POST"]) for path in (model, model + "/versions/{version}")),
        ]

    @contextlib.asynccontextmanager
    async def _lifespan(self, app):
        again = await asyncio.to_thread(self.live.start)
        if again:
            log.info("%d batches of the journal were stepped again", again)
        serve = self.config
        self.batcher = Batcher(
            self.live, self.policy, self.metrics, budget=serve.max_batch, queue=serve.queue,
            per_stream=serve.stream_queue, per_tenant=serve.tenant_queue, deadline=serve.deadline,
        )  # fmt: skip
        task = asyncio.create_task(self.batcher.run())
        task.add_done_callback(self._stopped)
        grpc = None
        if serve.grpc is not None:
            from anabranch.run.oip_grpc import start

            grpc = await start(self, serve.host, serve.grpc)
        self.ready = True
        log.info("serving %s", self.name)
        try:
            yield
        finally:
            self.ready = False
            if grpc is not None:
                await grpc.stop(5.0)
            if self.batcher.failure is None:
                await self.batcher.drain(task)
                await asyncio.to_thread(self.live.close)
                log.info("drained; the last checkpoint is written")
            else:
                await asyncio.to_thread(self.live.abandon)

    def _stopped(self, task: asyncio.Task) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self.ready = False
            log.error("the server has failed, and steps no more events: %s", error, exc_info=error)

    # Who asks

    def tenant(self, connection: HTTPConnection) -> str:
        """Whose request this is.

        Raises:
            HTTPException: 401, if the server has tokens and the request has none of them.
        """
        return self.authorize(connection.headers.get("authorization", ""))

    def authorize(self, header: str) -> str:
        """The tenant with this `Authorization` header."""
        if self.tenants is None:
            return ""
        kind, _, token = header.partition(" ")
        digest, found = hashlib.sha256(token.encode()).hexdigest(), None
        for tenant, known in self.tenants:  # all of them, so that the time tells nothing
            if hmac.compare_digest(digest, known):
                found = tenant
        if found is None or kind.lower() != "bearer":
            raise HTTPException(401, "a bearer token is needed", {"WWW-Authenticate": "Bearer"})
        return found

    # Events

    async def events(self, request: Request) -> Response:
        """One event, or a list of them."""
        tenant = self.tenant(request)
        said = _json(await _body(request, self.config.max_message))
        client = request.client
        many = isinstance(said, list)
        where = ("http", tenant, client.host if client else "", client.port if client else 0)
        answers = await (await self._submit(said if many else [said], tenant, where))
        return JSONResponse({"results": answers} if many else answers[0])

    async def _submit(
        self, said: list, tenant: str, where: tuple, *, patient: bool = False
    ) -> Awaitable[list[dict[str, Any]]]:
        """Submit events as JSON; returns what awaits their answers. The bad ones are answered with an error."""
        answers: list[Any] = [None] * len(said)
        streams: dict[Any, list[tuple[int, Any]]] = {}
        for i, event in enumerate(said):
            try:
                stream, parsed = self._parse(event, tenant, where)
            except ValueError as error:
                self.metrics.bad.inc()
                answers[i] = {"error": str(error)}
            else:
                streams.setdefault(stream, []).append((i, parsed))
        waiting = []
        for stream, events in streams.items():
            parsed = [event for _, event in events]
            # A list is taken whole or not at all: once some of it has been, the rest waits for room.
            submitted = await self._enqueue(stream, tenant, parsed, patient=patient or bool(waiting))
            waiting.append((events, submitted))

        async def collect() -> list[dict[str, Any]]:
            for events, answered in waiting:
                for (i, _), answer in zip(events, await answered):
                    answers[i] = self._said(answer)
            return answers

        return asyncio.ensure_future(collect())

    async def _enqueue(self, stream: Any, tenant: str, events: list, *, patient: bool) -> asyncio.Future:
        while True:
            try:
                return self.batcher.submit(stream, tenant, events)
            except Full:
                if not patient or len(events) > self.config.stream_queue:
                    raise
                await asyncio.sleep(0.005)

    def _parse(self, event: Any, tenant: str, where: tuple) -> tuple[Any, Any]:
        """An event as JSON: its stream, and what is submitted."""
        if isinstance(event, HTTPException):
            raise ValueError(event.detail)
        if not isinstance(event, dict):
            raise ValueError(f"expected an object, got {type(event).__name__}")
        if isinstance(self.served, ServedPipeline):
            return where, self.served.own(tenant, event) if self.tenants is not None else event
        stream = event.get("stream")
        if not isinstance(stream, str) or not stream:
            raise ValueError(f"stream: expected a name, got {stream!r}")
        flags = (START if event.get("start") is True else 0) | (END if event.get("end") is True else 0)
        unknown = event.keys() - {"stream", "x", "start", "end"}
        if unknown:
            raise ValueError(f"unknown field {min(unknown)!r}")
        x = event.get("x")
        parts = []
        for tensor in self.served.inputs:
            given = x if len(self.served.inputs) == 1 else x.get(tensor.name) if isinstance(x, dict) else None
            parts.append(oip.numbers(given, tensor, "x" if given is x else f"x.{tensor.name}").tobytes())
        key = f"{tenant}/{stream}"
        return key, CellEvent(key, b"".join(parts), flags)

    def _said(self, answer: Any) -> Any:
        if isinstance(self.served, ServedPipeline):
            return {name: None if value != value else value for name, value in answer.items()}
        n, data = answer
        values = [array[0].tolist() for array in oip.arrays(self.served.outputs, [data])]
        names = [tensor.name for tensor in self.served.outputs]
        return {"n": n, "y": values[0] if len(values) == 1 else dict(zip(names, values))}

    async def stream(self, socket: WebSocket) -> None:
        """Events and answers as JSON, a message for a message, in order."""
        tenant = await self._accept(socket)
        if tenant is None:
            return
        client = socket.client
        where = ("ws", tenant, client.host if client else "", client.port if client else 0)

        async def take(message: Any) -> Awaitable[str]:
            try:
                said = _json(message)
            except HTTPException as error:
                said = error
            many = isinstance(said, list)
            answered = await self._submit(said if many else [said], tenant, where, patient=True)

            async def answer() -> str:
                answers = await answered
                return json.dumps(answers if many else answers[0])

            return asyncio.ensure_future(answer())

        await self._converse(socket, take, socket.send_text)

    async def one_stream(self, socket: WebSocket) -> None:
        """One stream of a cell, as bytes. It begins with what of it has counted: `{"seen": n}`.

        A message holds one event after the other; its answer the output of each, after its number (4 bytes).
        """
        if not isinstance(self.served, ServedCell):
            raise HTTPException(404, "this server takes rows, at /v1/stream")
        tenant = await self._accept(socket)
        if tenant is None:
            return
        served, key = self.served, f"{tenant}/{socket.path_params['key']}"
        seen = await self.batcher.call(lambda: served.seen(key))
        await socket.send_text(json.dumps({"seen": seen}))

        async def take(message: Any) -> Awaitable[bytes]:
            data = message.encode() if isinstance(message, str) else message
            if not data or len(data) % served.width:
                raise ValueError(f"a message holds a multiple of {served.width} bytes, got {len(data)}")
            events = [CellEvent(key, data[at : at + served.width]) for at in range(0, len(data), served.width)]
            answered = await self._enqueue(key, tenant, events, patient=True)

            async def answer() -> bytes:
                return b"".join(n.to_bytes(4, "little") + y for n, y in await answered)

            return asyncio.ensure_future(answer())

        await self._converse(socket, take, socket.send_bytes)

    async def _accept(self, socket: WebSocket) -> str | None:
        try:
            tenant = self.tenant(socket)
        except HTTPException:
            await socket.close(4401, "a bearer token is needed")
            return None
        await socket.accept()
        return tenant

    async def _converse(self, socket: WebSocket, take: Callable[[Any], Awaitable], send: Callable) -> None:
        """Answer messages in their order. Who sends more than is answered is read no further."""
        taken: asyncio.Queue[Awaitable] = asyncio.Queue(IN_FLIGHT)

        async def read() -> None:
            while (said := await socket.receive())["type"] == "websocket.receive":
                await taken.put(await take(said.get("text") if said.get("text") is not None else said["bytes"]))

        async def write() -> None:
            while True:
                await send(await (await taken.get()))

        self.metrics.sessions.inc()
        reader, writer = asyncio.create_task(read()), asyncio.create_task(write())
        try:
            done, _ = await asyncio.wait((reader, writer), return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        except (ValueError, Full) as error:
            await socket.close(1003 if isinstance(error, ValueError) else 1009, str(error)[:120])
        except Closed:
            await socket.close(1001, "the server is closing")
        except (WebSocketDisconnect, RuntimeError):
            pass  # the client has gone; what it sent is stepped all the same
        finally:
            reader.cancel()
            writer.cancel()
            self.metrics.sessions.dec()

    # What it tells of itself

    async def is_ready(self, request: Request) -> Response:
        return JSONResponse({"ready": self.ready}, 200 if self.ready else 503)

    async def prometheus(self, request: Request) -> Response:
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def stats(self, request: Request) -> Response:
        """The figures of the last seconds."""
        self.tenant(request)
        served = self.served
        stages = {"cell": served.keyed} if isinstance(served, ServedCell) else {
            stage.name: stage.keyed for stage in served.pipeline.stages
        }  # fmt: skip
        keys = {
            name: {"keys": len(keyed), "spilled": keyed.spilled, "bytes": keyed.nbytes}
            for name, keyed in stages.items()
        }
        return JSONResponse(
            {"name": self.name, "waiting": self.batcher.waiting, "keys": keys, **self.metrics.snapshot()}
        )

    # The Open Inference Protocol

    def cell(self, name: str) -> ServedCell:
        """The cell of this name.

        Raises:
            HTTPException: 404, if there is none.
        """
        if not isinstance(self.served, ServedCell) or name != self.name:
            raise HTTPException(404, f"there is no cell named {name!r}")
        return self.served

    async def model(self, request: Request) -> Response:
        return JSONResponse(oip.metadata(self.name, self.cell(request.path_params["name"])))

    async def model_ready(self, request: Request) -> Response:
        self.cell(request.path_params["name"])
        return await self.is_ready(request)

    async def infer(self, request: Request) -> Response:
        tenant = self.tenant(request)
        served = self.cell(request.path_params["name"])
        body = await _body(request, self.config.max_message)
        try:
            asked = oip.read(body, request.headers.get("inference-header-content-length"))
            events = asked.sequence.events(tenant, asked.inputs, served)
        except ValueError as error:
            raise HTTPException(400, str(error)) from None
        answers = await self.batcher.submit(events[0].key, tenant, events)
        arrays = oip.arrays(served.outputs, [data for _, data in answers])
        head, data, length = oip.write(self.name, asked, served.outputs, arrays)
        if length is None:
            return Response(head, media_type="application/json")
        headers = {"Inference-Header-Content-Length": str(length)}
        return Response(head + data, media_type="application/octet-stream", headers=headers)


async def _body(request: Request, most: int) -> bytes:
    """The body of a request, if it is not too long."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > most:
            raise HTTPException(413, f"a request may have {most} bytes")
        parts.append(part)
    return b"".join(parts)


def _json(data: bytes | str) -> Any:
    try:
        return json.loads(data, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"not JSON: {error}") from None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _tenants(path: Path | None) -> list[tuple[str, str]] | None:
    """Tenants, and the hashes of their tokens."""
    if path is None:
        return None
    found = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        tenant, _, digest = line.strip().partition(" ")
        if len(digest) != 64 or "/" in tenant or not set(digest) <= set("0123456789abcdef"):
            raise ConfigError(f"{path}: line {number}: expected TENANT SHA256, a name without '/' and 64 hex digits")
        found.append((tenant, digest))
    return found


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Full)
    return JSONResponse({"error": str(error)}, 429, {"Retry-After": str(max(1, round(error.after)))})


async def _closed(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, 503)


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, dict(error.headers or {}))


_HANDLERS: Any = {Full: _refused, Closed: _closed, HTTPException: _http}


class _Lines(logging.Formatter):
    """A line of JSON for each message."""

    def format(self, record: logging.LogRecord) -> str:
        said = {"time": record.created, "level": record.levelname, "logger": record.name, "text": record.getMessage()}
        if record.exc_info:
            said["trace"] = self.formatException(record.exc_info)
        return json.dumps(said)


def serve(config: PipelineConfig | ServedCellFile, folder: Path | None = None) -> None:
    """Serve until SIGTERM or SIGINT; then answer what waits, and write a last checkpoint."""
    import uvicorn

    if not sys.stderr.isatty():
        handler = logging.StreamHandler()
        handler.setFormatter(_Lines())
        logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn drains first, and then raises it again
    server = Server(config, folder)
    said = config.serve
    uvicorn.run(
        server.app, host=said.host, port=said.port, log_config=None, access_log=False, lifespan="on",
        ws_max_size=said.max_message, timeout_graceful_shutdown=5, backlog=16_384,
        ssl_certfile=said.certificate, ssl_keyfile=said.key,
    )  # fmt: skip
