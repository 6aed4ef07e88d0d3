"""What the load alone can do: for every so many bytes that come, so many are sent back, with nothing in between."""

import argparse
import asyncio

import uvloop


class Echo(asyncio.Protocol):
    """One connection; one that begins with GET is answered as if it were a WebSocket."""

    def __init__(self, size: int, answer: bytes):
        self.size, self.answer = size, answer
        self.count = 0

    def connection_made(self, transport: asyncio.WriteTransport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        if data.startswith(b"GET "):
            self.transport.write(b"HTTP/1.1 101 Switching Protocols\r\n\r\n")
            return
        self.count += len(data)
        while self.count >= self.size:
            self.count -= self.size
            self.transport.write(self.answer)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--size", type=int, required=True, help="bytes of a request")
    parser.add_argument("--answer", required=True, help="bytes of its answer, in hex")
    args = parser.parse_args()
    make = lambda: Echo(args.size, bytes.fromhex(args.answer))
    server = await asyncio.get_running_loop().create_server(make, "127.0.0.1", args.port, backlog=4096)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main())
