"""Connections of the server: those of uvicorn, given up when a client keeps them waiting."""

import asyncio

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
