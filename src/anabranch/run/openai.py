"""The chat and completions API of OpenAI, for a language model whose sessions a scheduler serves.

What `openai` and its likes send is understood as far as it means something here; what would change the answer and is
not there (tools, several choices, log-probabilities, images) is refused by name. Streams are server-sent events. Who
goes away while it is answered gives its place up.
"""

import asyncio
import codecs
import contextlib
import json
import logging
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from anabranch.run.access import Access, Tenant, check_tls
from anabranch.run.config import ServeConfig, place
from anabranch.run.connections import read_body, read_json
from anabranch.run.metrics import LATENCIES
from anabranch.sessions import LIMIT, Ask, Engine, Full, Vocabulary

log = logging.getLogger("anabranch.serve")


class _Said(BaseModel):
    """What both requests have. Fields that cannot change an answer here are taken and left alone."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = False
    stream_options: dict[str, Any] | None = None
    n: Literal[1] | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None


class Message(BaseModel):
    model_config = ConfigDict(extra="ignore")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[dict[str, Any]]


class ChatSaid(_Said):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)


class TextSaid(_Said):
    prompt: str | list[int]
    echo: Literal[False] | None = None


class Words:
    """Text out of tokens as they come: whole characters, and nothing that may yet become a stop."""

    def __init__(self, vocabulary: Vocabulary, stops: list[str]):
        self.vocabulary, self.stops = vocabulary, [stop for stop in stops if stop]
        self.characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.held, self.stopped = "", False

    def add(self, token: int) -> str:
        """What can be said now."""
        return self._say(self.characters.decode(self.vocabulary.bytes(token)))

    def end(self) -> str:
        """What was held back."""
        said = self._say(self.characters.decode(b"", final=True))
        return said if self.stopped else said + self.held

    def _say(self, text: str) -> str:
        text = self.held + text
        found = [at for stop in self.stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            return text[: min(found)]
        keep = max((n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]


ENDED = "the server answers no more: it is closing, or an error has been logged"


class Ended(Exception):
    """The engine has ended before an answer did."""


class Metrics:
    """Counters of one server, in a registry of its own."""

    def __init__(self):
        from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram

        self.registry, self.kind = CollectorRegistry(), CONTENT_TYPE_LATEST
        count = lambda name, said: Counter(name, said, registry=self.registry)
        self.prompts = count("anabranch_prompt_tokens", "Tokens of prompts.")
        self.cached = count("anabranch_cached_tokens", "Tokens of prompts that were there already.")
        self.answers = count("anabranch_answer_tokens", "Tokens of answers.")
        self.refused = count("anabranch_sessions_refused", "Sessions refused for want of room.")
        self.first = Histogram(
            "anabranch_first_token_seconds", "From a request to its first token.", buckets=LATENCIES,
            registry=self.registry,
        )  # fmt: skip

    def page(self) -> bytes:
        from prometheus_client import generate_latest

        return generate_latest(self.registry)


class LanguageServer:
    """A server of one language model.

    Arguments:
        name: of the model, as clients ask for it.
        shared: whether tenants may share what is computed of prompts that begin alike. How soon an answer comes then
            tells a tenant what others have asked.
    """

    def __init__(self, name: str, engine: Engine, vocabulary: Vocabulary, config: ServeConfig, *, shared: bool = False):
        check_tls(config)
        self.shared = shared
        self.name, self.engine, self.vocabulary, self.config = name, engine, vocabulary, config
        self.access = Access(config)
        self.began = int(time.time())
        self.metrics = Metrics()
        self.stop = threading.Event()
        self.thread: threading.Thread | None = None
        model = "/v1/models/{name:path}"
        routes = [
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.text, methods=["POST"]),
            Route("/v1/models", self.models),
            Route(model, self.model),
            Route("/healthz", lambda request: PlainTextResponse("ok")),
            Route("/readyz", self.ready),
            Route("/metrics", self.prometheus),
        ]
        handlers: Any = {HTTPException: _http, Exception: _failed}
        self.app = Starlette(routes=routes, lifespan=self._lifespan, exception_handlers=handlers)

    @contextlib.asynccontextmanager
    async def _lifespan(self, app):
        self.thread = threading.Thread(target=self._work, name="sessions", daemon=True)
        self.thread.start()
        log.info("serving %s", self.name)
        try:
            yield
        finally:
            self.stop.set()
            await asyncio.to_thread(self.thread.join)

    def _work(self) -> None:
        try:
            self.engine.run(self.stop)
        except Exception:
            log.exception("the engine has failed, and answers no more")

    @property
    def alive(self) -> bool:
        return self.thread is not None and self.thread.is_alive() and not self.stop.is_set()

    async def ready(self, request: Request) -> Response:
        return JSONResponse({"ready": self.alive}, 200 if self.alive else 503)

    async def prometheus(self, request: Request) -> Response:
        if not self.access.who(request).operator:
            raise HTTPException(403, "the token of an operator is needed")
        return Response(self.metrics.page(), media_type=self.metrics.kind)

    # Models

    def _described(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": self.began, "owned_by": "anabranch"}

    async def models(self, request: Request) -> Response:
        self.access.who(request)
        return JSONResponse({"object": "list", "data": [self._described()]})

    async def model(self, request: Request) -> Response:
        self.access.who(request)
        self._known(request.path_params["name"])
        return JSONResponse(self._described())

    def _known(self, name: str) -> None:
        if name != self.name:
            raise HTTPException(404, f"model: there is no {name!r}, but {self.name!r}")

    # Answers

    async def chat(self, request: Request) -> Response:
        said = await self._said(request, ChatSaid)
        messages = [{"role": _role(m.role), "content": _content(i, m.content)} for i, m in enumerate(said.messages)]
        try:
            prompt = self.vocabulary.chat(messages)
        except ValueError as error:
            raise HTTPException(400, f"messages: {error}") from None
        limit = said.max_completion_tokens or said.max_tokens
        return await self._answer(said, prompt, limit, CHAT, self.access.who(request))

    async def text(self, request: Request) -> Response:
        said = await self._said(request, TextSaid)
        prompt = self.vocabulary.plain(said.prompt) if isinstance(said.prompt, str) else said.prompt
        return await self._answer(said, prompt, said.max_tokens or 16, TEXT, self.access.who(request))

    async def _said(self, request: Request, kind: Any) -> Any:
        self.access.who(request)
        given = read_json(await read_body(request, self.config.max_message))
        try:
            said = kind.model_validate(given)
        except ValidationError as error:
            first = error.errors()[0]
            where, text = place(first["loc"]), first["msg"].removeprefix("Value error, ")
            raise HTTPException(400, f"{where}: {text}") from None
        self._known(said.model)
        return said

    async def _answer(
        self, said: _Said, prompt: list[int], limit: int | None, form: "_Form", tenant: Tenant
    ) -> Response:
        loop = asyncio.get_running_loop()
        tokens: asyncio.Queue[int | None] = asyncio.Queue()

        def emit(token: int | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended: the server is closing
                loop.call_soon_threadsafe(tokens.put_nowait, token)

        if not self.alive:
            raise HTTPException(503, ENDED)
        seed = secrets.randbits(31) if said.seed is None else said.seed & 0x7FFFFFFF
        if limit is None:
            limit = LIMIT if self.engine.room is None else max(1, self.engine.room - len(prompt))
        salt = b"" if self.shared else tenant.name.encode()
        found: list[int] = []
        try:
            ask = Ask(prompt, limit, said.temperature, said.top_p, seed, salt=salt)
            session = self.engine.submit(ask, emit, found.append)
        except Full as error:
            self.metrics.refused.inc()
            raise HTTPException(429, str(error), {"Retry-After": str(max(1, round(error.after)))}) from None
        except ValueError as error:
            raise HTTPException(400, str(error)) from None
        stops = [said.stop] if isinstance(said.stop, str) else said.stop or []
        answer = _Answer(Words(self.vocabulary, stops), tokens, len(prompt), limit, self.metrics, found)
        about = {"id": f"{form.prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": self.name}
        choice = lambda made, why=None: {"index": 0, **made, "finish_reason": why}

        async def events() -> AsyncIterator[str]:
            def line(choices: list[dict], **more: Any) -> str:
                return "data: " + json.dumps({"object": form.chunk, **about, "choices": choices, **more}) + "\n\n"

            try:
                for made in form.first:
                    yield line([choice(made)])
                async for part in answer.parts():
                    yield line([choice(form.part(part))])
                yield line([choice(form.last, answer.why)])
                if (said.stream_options or {}).get("include_usage"):
                    yield line([], usage=answer.usage)
                yield "data: [DONE]\n\n"
            except Ended:  # the head of the answer has been sent
                yield "data: " + json.dumps({"error": _error(503, ENDED)}) + "\n\n"
            finally:
                self.engine.cancel(session)  # if it has not ended

        if said.stream:
            return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        try:
            text = "".join([part async for part in answer.parts()])
        except Ended:
            raise HTTPException(503, ENDED) from None
        finally:
            self.engine.cancel(session)
        made = {"object": form.whole, **about, "choices": [choice(form.all(text), answer.why)], "usage": answer.usage}
        return JSONResponse(made)


class _Form(NamedTuple):
    """How one of the two kinds of answers looks."""

    prefix: str
    whole: str
    chunk: str
    first: list[dict[str, Any]]
    part: Callable[[str], dict[str, Any]]
    last: dict[str, Any]
    all: Callable[[str], dict[str, Any]]


def _plain(text: str) -> dict[str, Any]:
    return {"text": text, "logprobs": None}


CHAT = _Form(
    "chatcmpl", "chat.completion", "chat.completion.chunk", [{"delta": {"role": "assistant", "content": ""}}],
    lambda text: {"delta": {"content": text}}, {"delta": {}},
    lambda text: {"message": {"role": "assistant", "content": text}},
)  # fmt: skip
TEXT = _Form("cmpl", "text_completion", "text_completion", [], _plain, _plain(""), _plain)


class _Answer:
    """Text out of the tokens of one session, and why it ended."""

    def __init__(
        self, words: Words, tokens: "asyncio.Queue[int | None]", prompt: int, limit: int, metrics: "Metrics",
        found: list[int],
    ):  # fmt: skip
        self.words, self.tokens, self.prompt, self.limit, self.metrics = words, tokens, prompt, limit, metrics
        self.found = found
        """Tokens of the prompt that were there, once it is known."""
        self.count, self.why, self.begun = 0, "length", time.monotonic()

    @property
    def usage(self) -> dict[str, Any]:
        said, asked = self.count, self.prompt
        there = {"cached_tokens": sum(self.found)}
        counts = {"prompt_tokens": asked, "completion_tokens": said, "total_tokens": asked + said}
        return counts | {"prompt_tokens_details": there}

    async def parts(self) -> AsyncIterator[str]:
        """Text as it comes.

        Raises:
            Ended: if the engine ends first.
        """
        self.metrics.prompts.inc(self.prompt)
        while (token := await self.tokens.get()) is not None:
            if not self.count:
                self.metrics.first.observe(time.monotonic() - self.begun)
                self.metrics.cached.inc(sum(self.found))
            self.count += 1
            self.metrics.answers.inc()
            if token in self.words.vocabulary.stop:
                self.why = "stop"
                break
            if part := self.words.add(token):
                yield part
            if self.words.stopped:
                self.why = "stop"
                return
        if token is None and self.count < self.limit:
            raise Ended(ENDED)
        if rest := self.words.end():
            yield rest


def _role(role: str) -> str:
    return "system" if role == "developer" else role


def _content(i: int, content: str | list[dict[str, Any]]) -> str:
    """The text of a message.

    Raises:
        HTTPException: 400, if a part of it is no text.
    """
    if isinstance(content, str):
        return content
    for j, part in enumerate(content):
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise HTTPException(400, f"messages[{i}].content[{j}]: only text is understood, got {part.get('type')!r}")
    return "".join(part["text"] for part in content)


def _error(status: int, text: str) -> dict[str, Any]:
    """An error as clients of this API know it. A text that begins with a field's name is about that field."""
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    param = text.partition(":")[0] if status in (400, 404) and ":" in text else None
    return {"message": text, "type": kind, "param": param, "code": None}


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    said = _error(error.status_code, error.detail)
    return JSONResponse({"error": said}, error.status_code, dict(error.headers or {}))


async def _failed(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": _error(500, "an error in the server, which has logged it")}, 500)
