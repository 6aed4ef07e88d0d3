"""Connections of the servers: those of uvicorn, given up when a client keeps them waiting; and what comes over them."""

import asyncio
import json
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

PATIENCE = 30.0
"""Seconds that a client may take to send the head of a request, and again its body."""


class Http(HttpToolsProtocol):
    """An HTTP connection that is closed if the head of a request is not there after `PATIENCE` seconds.

    uvicorn itself would wait for ever, holding an open file for each such client.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        self._late = self._in_time()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._late.cancel()
        self._late = self._in_time()

    def on_headers_complete(self) -> None:
        self._late.cancel()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._late.cancel()
        super().connection_lost(exc)

    def _in_time(self) -> asyncio.TimerHandle:
        return self.loop.call_later(PATIENCE, self.timeout_keep_alive_handler)


class WebSocket(WebSocketsSansIOProtocol):
    """A WebSocket that is dropped when its client does not answer pings, also if it does not read either.

    uvicorn itself would close the connection as soon as all that was sent has been read: never.
    """

    def keepalive_timeout(self) -> None:
        super().keepalive_timeout()
        self.loop.call_later(1.0, self.transport.abort)


async def read_body(request: Request, most: int) -> bytes:
    """The body of a request.

    Raises:
        HTTPException: 413, if it has more than so many bytes; 408, if it takes longer than `PATIENCE`.
    """
    parts, size = [], 0
    try:
        async with asyncio.timeout(PATIENCE):
            async for part in request.stream():
                size += len(part)
                if size > most:
                    raise HTTPException(413, f"a request may have {most} bytes")
                parts.append(part)
    except TimeoutError:
        said = f"the body of a request may take {PATIENCE:g} s"
        raise HTTPException(408, said, {"Connection": "close"}) from None
    return b"".join(parts)


def read_json(data: bytes | str) -> Any:
    """What is said in JSON.

    Raises:
        HTTPException: 400, if it is none.
    """
    try:
        text = data.decode() if isinstance(data, bytes) else data
        said = json.loads(text, parse_constant=_no_constant)
        if "\\u" in text:  # JSON may hold half of a surrogate pair, which is no text
            json.dumps(said, ensure_ascii=False).encode()
        return said
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"not JSON: {error}") from None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
