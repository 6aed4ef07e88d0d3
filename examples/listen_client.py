"""Sends sound to a server of `listen.toml`, and prints when somebody speaks.

anabranch serve examples/listen.toml
python examples/listen_client.py speech.wav
arecord -q -f S16_LE -r 16000 -c 1 -t raw | python examples/listen_client.py -

A frame goes out as soon as it is there, and its answer is printed when it comes. With `--stream NAME` a client that was
cut off goes on where the server has come to: it is told how many frames of the stream have counted.
"""

import argparse
import asyncio
import itertools
import json
import sys
import uuid
from collections.abc import Iterator

import numpy as np
from websockets.asyncio.client import connect

from anabranch.run.media import audio

RATE, FRAME = 16_000, 160
SECONDS = FRAME / RATE
ANSWER = np.dtype([("n", "<u4"), ("level", "<f4"), ("score", "<f4"), ("active", "?"), ("frequency", "<f4")])
"""What comes back for a frame: its number in the stream, and the outputs in the order of `GET /v2/models/listen`."""


def frames(source: str) -> Iterator[bytes]:
    """10 ms each, as 16-bit samples: of a file, or of raw sound on the standard input."""
    if source == "-":
        while len(data := sys.stdin.buffer.read(2 * FRAME)) == 2 * FRAME:
            yield data
    else:
        for sound in audio(source, FRAME, rate=RATE):
            yield (sound.samples * 32767).astype("<i2").tobytes()


async def listen(url: str, stream: str, source: str) -> None:
    """Send the frames, and print a line for each time that somebody has spoken."""
    async with connect(f"{url}/v1/stream/{stream}", compression=None) as server:
        seen = json.loads(await server.recv())["seen"]
        sent: asyncio.Queue[bool] = asyncio.Queue()  # True for each frame, then False

        async def send() -> None:
            sounds = itertools.islice(frames(source), seen, None)
            while (frame := await asyncio.to_thread(next, sounds, None)) is not None:  # a microphone makes it wait
                await server.send(frame)
                sent.put_nowait(True)
            sent.put_nowait(False)

        async def receive() -> None:
            heard: list[np.void] = []
            while await sent.get():
                (answer,) = np.frombuffer(await server.recv(decode=False), ANSWER)
                if answer["active"]:
                    heard.append(answer)
                elif heard:
                    tell(heard)
                    heard = []
            if heard:
                tell(heard)

        async with asyncio.TaskGroup() as both:
            both.create_task(send())
            both.create_task(receive())


def tell(heard: list[np.void]) -> None:
    """Print when it was, how loud, and how high."""
    begin, end = (heard[0]["n"] - 1) * SECONDS, heard[-1]["n"] * SECONDS
    level, frequency = max(h["level"] for h in heard), np.median([h["frequency"] for h in heard])
    print(f"{begin:8.2f} to {end:.2f} s, up to {level:.0f} dB, mostly around {frequency:.0f} Hz", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="an audio file, or - for raw 16-bit mono at 16 kHz on the standard input")
    parser.add_argument("--server", default="ws://127.0.0.1:8000")
    parser.add_argument("--stream", default=str(uuid.uuid4()), help="its name; by default one that nobody has used")
    said = parser.parse_args()
    asyncio.run(listen(said.server, said.stream, said.source))
