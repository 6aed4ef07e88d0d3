"""`anabranch serve`: a pipeline or a cell for live clients, over HTTP, WebSocket and the Open Inference Protocol.

Starlette on uvicorn: the common ground of Python's asynchronous servers, with uvloop and httptools in C beneath, and
WebSocket and HTTP in one port. The work itself is in `Live.step`, in one thread.
"""

import asyncio
import contextlib
import fcntl
import gc
import json
import logging
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import IO, Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.websockets import WebSocket, WebSocketDisconnect

from anabranch.batching import Deadlines, Scheduler
from anabranch.run import connections, oip, openapi, wire
from anabranch.run.access import Access, check_tls
from anabranch.run.batcher import Batcher, Closed, Full
from anabranch.run.config import ConfigError, PipelineConfig, ServeConfig, ServedCellFile
from anabranch.run.connections import read_body, read_json
from anabranch.run.keyed import Keyed
from anabranch.run.live import Live
from anabranch.run.metrics import Metrics
from anabranch.run.served_cell import ServedCell
from anabranch.run.served_pipeline import ServedPipeline
from anabranch.run.stages import Stage

log = logging.getLogger("anabranch.serve")
IN_FLIGHT = 64
"""Messages of one WebSocket that are being answered; it is read no further until one has been."""
Reply = tuple[Awaitable[list[Any]], Callable[[list[Any]], str | bytes]]
"""Answers that will come, and how to say them."""
NOT_TAKEN = "no events are taken now: the server is closing, or what comes cannot be kept or stepped"
"""What clients are told when the events were not taken."""


class Server:
    """A server of one pipeline or cell.

    Arguments:
        config: what `anabranch.run.config.read_served` gives.
        folder: where modules that the file names are looked for first.
        policy: which of the waiting events are stepped next.

    Raises:
        ConfigError: if a cell cannot be made as configured, or the file of tokens, the certificate or its key cannot be
            used.
    """

    def __init__(
        self, config: PipelineConfig | ServedCellFile, folder: Path | None = None, policy: Scheduler | None = None
    ):
        self.config: ServeConfig = config.serve
        check_tls(self.config)
        self.access = Access(self.config)
        if isinstance(config, ServedCellFile):
            self.name, self.served = config.cell.name, ServedCell(config.cell, folder)
            out, keep = self.served.out, config.cell.keep
        else:
            self.name, self.served = config.name, ServedPipeline(config, folder)
            out, keep = self.served.pipeline.out, config.checkpoint.keep
        serve = self.config
        self._folder = _alone(out)
        self.live = Live(self.served, out / "journal", durable=serve.durable, every=serve.every, keep=keep)
        self.metrics = Metrics()
        self.policy = Deadlines() if policy is None else policy
        self.ready = False
        self.app = Starlette(routes=self._routes(), lifespan=self._lifespan, exception_handlers=_HANDLERS)

    def _routes(self) -> list:
        model, said = "/v2/models/{name}", openapi.describe(self.name, self.served, self.config)
        return [
            Route("/v1/events", self.events, methods=["POST"]),
            WebSocketRoute("/v1/stream", self.stream),
            WebSocketRoute("/v1/stream/{key:path}", self.one_stream),
            Route("/v1/stats", self.stats),
            Route("/v1/streams", self.streams),
            Route("/v1/streams/{key:path}", self.watch),
            Route("/openapi.json", lambda request: JSONResponse(said)),
            Route("/healthz", lambda request: PlainTextResponse("ok")),
            Route("/readyz", self.is_ready),
            Route("/metrics", self.prometheus),
            Route("/v2", lambda request: JSONResponse(oip.server())),
            Route("/v2/health/live", lambda request: JSONResponse({"live": True})),
            Route("/v2/health/ready", self.is_ready),
            *(Route(path, self.model) for path in (model, model + "/versions/{version}")),
            *(Route(path + "/ready", self.model_ready) for path in (model, model + "/versions/{version}")),
            *(Route(path + "/infer", self.infer, methods=["POST"]) for path in (model, model + "/versions/{version}")),
            Mount("/", StaticFiles(directory=Path(__file__).parent / "dashboard", html=True)),
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
            self._folder.close()

    def _stopped(self, task: asyncio.Task) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self.ready = False
            log.error("the server has failed, and steps no more events: %s", error, exc_info=error)

    # Who asks

    def tenant(self, connection: HTTPConnection) -> str:
        """Whose request this is.

        Raises:
            HTTPException: 401, if the server has tokens and the request has none of them; 403, if it has none, and a
                page of another site sends this.
        """
        return self.access.who(connection).name

    def _operator(self, connection: HTTPConnection) -> bool:
        """Whether who asks may see the figures of the whole server: an operator, and without tokens everybody."""
        return self.access.who(connection).operator

    # Events

    async def events(self, request: Request) -> Response:
        """One event, or a list of them."""
        tenant = self.tenant(request)
        said = read_json(await read_body(request, self.config.max_message))
        many = isinstance(said, list)
        answers = await (await self._submit(self._parsed(said if many else [said], tenant, request), tenant))
        answers = [wire.say(self.served, answer) for answer in answers]
        return JSONResponse({"results": answers} if many else answers[0])

    def _parsed(self, said: list, tenant: str, connection: HTTPConnection) -> list[wire.Parsed | ValueError]:
        client = connection.client
        where = (tenant, client.host, client.port) if client else (tenant,)
        owner, found = tenant if self.access.guarded else None, []
        for event in said:
            try:
                found.append(wire.parse(self.served, event, owner, where))
            except ValueError as error:
                found.append(error)
        return found

    async def _submit(
        self, events: list[wire.Parsed | ValueError], tenant: str, *, patient: bool = False
    ) -> asyncio.Future[list[Any]]:
        """Submit events, and return what awaits their answers; a bad event is its own answer.

        Raises:
            Full: if there is no room, unless `patient`, which waits for it.
        """
        answers: list[Any] = list(events)
        streams: dict[Any, list[int]] = {}
        for i, parsed in enumerate(events):
            if isinstance(parsed, ValueError):
                self.metrics.bad.inc()
            else:
                streams.setdefault(parsed.stream, []).append(i)
        waiting = []
        for stream, mine in streams.items():
            # A list is taken whole or not at all: once some of it has been, the rest waits for room.
            some = [answers[i].event for i in mine]
            waiting.append((mine, await self._enqueue(stream, tenant, some, patient or bool(waiting))))

        async def collect() -> list[Any]:
            for mine, answered in waiting:
                for i, answer in zip(mine, await answered):
                    answers[i] = answer
            return answers

        return asyncio.ensure_future(collect())

    async def _enqueue(self, stream: Any, tenant: str, events: list, patient: bool) -> asyncio.Future[list[Any]]:
        while True:
            try:
                return self.batcher.submit(stream, tenant, events)
            except Full:
                if not patient or len(events) > self.config.stream_queue:
                    raise
                await asyncio.sleep(0.005)

    async def stream(self, socket: WebSocket) -> None:
        """Events and answers, a message for a message, in order: JSON, or for a cell frames of bytes."""
        tenant = await self._accept(socket)
        if tenant is None:
            return
        served, owner = self.served, tenant if self.access.guarded else None

        async def take(message: str | bytes) -> Reply:
            if isinstance(message, bytes) and isinstance(served, ServedCell):
                frame: list[wire.Parsed | ValueError] = [*wire.parse_frame(served, owner, message)]
                return await self._submit(frame, tenant, patient=True), wire.say_bytes
            try:
                said = read_json(message)
            except HTTPException as error:
                bad = await self._submit([ValueError(error.detail)], tenant)
                return bad, lambda answers: json.dumps(wire.say(served, answers[0]))
            many = isinstance(said, list)
            parsed = self._parsed(said if many else [said], tenant, socket)
            answered = await self._submit(parsed, tenant, patient=True)

            def say(answers: list[Any]) -> str:
                told = [wire.say(served, answer) for answer in answers]
                return json.dumps(told if many else told[0])

            return answered, say

        await self._converse(socket, take)

    async def one_stream(self, socket: WebSocket) -> None:
        """One stream of a cell, as bytes. It begins with what of it has counted: `{"seen": n}`.

        A message holds one event after the other; its answer the output of each, after its number (4 bytes).
        """
        served = self.served
        if not isinstance(served, ServedCell):
            return await socket.close(4404, "this server takes rows, at /v1/stream")
        tenant = await self._accept(socket)
        if tenant is None:
            return
        key = f"{tenant}/{socket.path_params['key']}"
        seen = await self.batcher.call(lambda: served.seen(key))
        with contextlib.suppress(WebSocketDisconnect, RuntimeError):  # that it has gone is read below
            await socket.send_text(json.dumps({"seen": seen}))

        async def take(message: str | bytes) -> Reply:
            events = wire.parse_stream(served, key, message)
            return await self._enqueue(key, tenant, events, patient=True), wire.say_bytes

        await self._converse(socket, take)

    async def _accept(self, socket: WebSocket) -> str | None:
        try:
            tenant = self.tenant(socket)
        except HTTPException as error:
            await socket.accept()  # before that a page could not read why it is refused
            await _close(socket, 4000 + error.status_code, error.detail[:120])
            return None
        await socket.accept()
        return tenant

    async def _converse(self, socket: WebSocket, take: Callable[[Any], Awaitable[Reply]]) -> None:
        """Answer messages in their order. Who sends more than is answered is read no further."""
        taken: asyncio.Queue[Reply] = asyncio.Queue(IN_FLIGHT)

        async def read() -> None:
            while (said := await socket.receive())["type"] == "websocket.receive":
                await taken.put(await take(said.get("text") if said.get("text") is not None else said["bytes"]))

        async def write() -> None:
            while True:
                answered, say = await taken.get()
                said = say(await answered)
                await (socket.send_text(said) if isinstance(said, str) else socket.send_bytes(said))

        self.metrics.sessions.inc()
        reader, writer = asyncio.create_task(read()), asyncio.create_task(write())
        try:
            done, _ = await asyncio.wait((reader, writer), return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        except (ValueError, Full) as error:
            await _close(socket, 1003 if isinstance(error, ValueError) else 1009, str(error)[:120])
        except Closed:
            await _close(socket, 1001, "the server is closing")
        except (WebSocketDisconnect, RuntimeError):
            pass  # the client has gone; what it sent is stepped all the same
        finally:
            reader.cancel()
            writer.cancel()
            self.metrics.sessions.dec()

    # What it tells of itself

    async def is_ready(self, request: Request) -> Response:
        ready = self.ready and not self.live.stuck
        return JSONResponse({"ready": ready}, 200 if ready else 503)

    async def prometheus(self, request: Request) -> Response:
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        if not self._operator(request):
            raise HTTPException(403, "the token of an operator is needed")
        self.metrics.unsaved.set(self.live.failures)
        for stage, count in self.served.alarms.counts.copy().items():
            self.metrics.alarms.labels(stage).set(count)
        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def stats(self, request: Request) -> Response:
        """The figures of the last seconds."""
        if not self._operator(request):
            return JSONResponse(await self._own(self.tenant(request)))
        served, value = self.served, self.metrics.registry.get_sample_value
        found = {
            "name": self.name,
            "waiting": self.batcher.waiting,
            "sessions": value("anabranch_sessions"),
            "bad": value("anabranch_events_bad_total"),
            "refused": value("anabranch_events_refused_total"),
            **self.metrics.snapshot(),
        }
        if isinstance(served, ServedCell):
            stages = {"cell": served}
        else:
            stages = {stage.name: stage for stage in served.pipeline.stages}
            counts = served.pipeline.counts
            found["dead_letters"] = counts["dead_letters"]
            found["labels"] = {name: counts[name] for name in ("learned", "expired", "dropped", "unknown")}
            found["quality"] = await self.batcher.call(served.quality)
        found["keys"] = {name: _stage(stage) for name, stage in stages.items()}
        recent = [alarm._replace(key=alarm.key.removeprefix("/")) for alarm in list(served.alarms.recent)]
        found["alarms"] = {"counts": served.alarms.counts.copy(), "recent": [alarm._asdict() for alarm in recent]}
        return JSONResponse(wire.finite(found))

    async def _own(self, tenant: str) -> dict[str, Any]:
        """What a tenant may know of the server: its own events that wait, and its own keys."""
        prefix, served = tenant + "/", self.served

        def count(keyed: Keyed) -> dict[str, int]:
            return {"keys": sum(isinstance(key, str) and key.startswith(prefix) for key in keyed)}

        def keys() -> dict[str, dict[str, int]]:
            if isinstance(served, ServedCell):
                return {"cell": count(served.keyed)}
            return {stage.name: count(stage.keyed) for stage in served.pipeline.stages}

        waiting = self.batcher.waiting_of(tenant)
        return {"name": self.name, "waiting": waiting, "keys": await self.batcher.call(keys)}

    async def streams(self, request: Request) -> Response:
        """The streams of a cell that had events most recently."""
        prefix = self.tenant(request) + "/"
        served = self.cell(self.name)
        return JSONResponse({"streams": await self.batcher.call(lambda: served.recent(prefix))})

    async def watch(self, request: Request) -> Response:
        """What a stream of a cell has answered since it was first watched."""
        name = request.path_params["key"]
        key, served = f"{self.tenant(request)}/{name}", self.cell(self.name)
        seen = await self.batcher.call(lambda: served.seen(key))
        recent = [wire.say(served, answer) for answer in self.batcher.watch(key)]
        return JSONResponse({"stream": name, "n": seen, "recent": recent})

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
        body = await read_body(request, self.config.max_message)
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


def _alone(folder: Path) -> IO:
    """Keeps other servers out of a folder for as long as the file that is returned is open.

    Raises:
        ConfigError: if another one is in there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / "lock", "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(f"{folder}: another server is at work there") from None
    return file


def _stage(stage: Stage | ServedCell) -> dict[str, float]:
    """What a stage holds, and what its steps have cost over the last minute."""
    keyed = stage.keyed
    return {"keys": len(keyed), "spilled": keyed.spilled, "bytes": keyed.nbytes, **stage.spent.value()}


async def _close(socket: WebSocket, code: int, reason: str) -> None:
    """Close a WebSocket, whose client may have gone already."""
    with contextlib.suppress(WebSocketDisconnect, RuntimeError):
        await socket.close(code, reason)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Full)
    return JSONResponse({"error": str(error)}, 429, {"Retry-After": str(max(1, round(error.after)))})


async def _closed(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": NOT_TAKEN}, 503)  # why is in the log: it may name files


async def _failed(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": "an error in the server, which has logged it"}, 500)


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, dict(error.headers or {}))


async def _gone(socket: WebSocket, error: Exception) -> None:
    """A client that goes while it is answered is no error."""


_HANDLERS: Any = {
    Full: _refused, Closed: _closed, HTTPException: _http, WebSocketDisconnect: _gone, Exception: _failed
}  # fmt: skip


class _Lines(logging.Formatter):
    """A line of JSON for each message."""

    def format(self, record: logging.LogRecord) -> str:
        said = {"time": record.created, "level": record.levelname, "logger": record.name, "text": record.getMessage()}
        if record.exc_info:
            said["trace"] = self.formatException(record.exc_info)
        return json.dumps(said)


def _allow_files() -> None:
    """Let this process open as many files, and so hold as many connections, as the system allows it."""
    import resource

    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(ValueError, OSError):  # some systems name a limit that they do not keep
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def serve(config: PipelineConfig | ServedCellFile, folder: Path | None = None) -> None:
    """Serve until SIGTERM or SIGINT; then answer what waits, and write a last checkpoint."""
    run(Server(config, folder).app, config.serve)


def run(app: Starlette, said: ServeConfig) -> None:
    """Run an application until SIGTERM or SIGINT."""
    import uvicorn

    if not sys.stderr.isatty():
        handler = logging.StreamHandler()
        handler.setFormatter(_Lines())
        logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn drains first, and then raises it again
    _allow_files()
    gc.collect()
    gc.freeze()  # what is here stays; looking through all of it again and again would hold every stream up
    gc.set_threshold(20_000, 20, 20)  # with ten thousand sessions open, a full collection takes a second
    uvicorn.run(
        app, host=said.host, port=said.port, log_config=None, access_log=False, lifespan="on",
        http=connections.Http, ws=connections.WebSocket,
        ws_max_size=said.max_message, ws_per_message_deflate=False,  # it would take 40 KB a connection
        timeout_graceful_shutdown=5, backlog=16_384, ssl_certfile=said.certificate, ssl_keyfile=said.key,
    )  # fmt: skip
