"""A loop for each connection, as one writes it first: the state in the handler, a jitted step for each message."""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import uvicorn
from model import INPUTS, WIDTH, make
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

cell = make()
step = jax.jit(lambda state, x: cell.step(state, x))
step(jnp.zeros(WIDTH), np.zeros(INPUTS, np.float32))


async def stream(socket: WebSocket) -> None:
    """64 bytes of input a message, answered with 64 bytes."""
    await socket.accept()
    state = jnp.zeros(WIDTH)
    try:
        while True:
            state, y = step(state, np.frombuffer(await socket.receive_bytes(), np.float32))
            await socket.send_bytes(np.asarray(y).tobytes())
    except WebSocketDisconnect:
        pass


async def echo(socket: WebSocket) -> None:
    """The message again: what this stack can do with no model at all."""
    await socket.accept()
    try:
        while True:
            await socket.send_bytes(await socket.receive_bytes())
    except WebSocketDisconnect:
        pass


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--ws", default="auto", help="uvicorn's implementation of WebSockets")
    args = parser.parse_args()
    ready = Route("/readyz", lambda request: PlainTextResponse("ok"))
    app = Starlette(routes=[WebSocketRoute("/stream", stream), WebSocketRoute("/echo", echo), ready])
    uvicorn.run(app, host="127.0.0.1", port=args.port, ws=args.ws, log_level="warning", backlog=4096)
