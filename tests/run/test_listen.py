"""The example that listens: sound over WebSocket to a server of its own, from a file and from a microphone's bytes."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

httpx = pytest.importorskip("httpx")
pytest.importorskip("uvicorn")
soundfile = pytest.importorskip("soundfile")
from websockets.sync.client import connect  # noqa: E402

from .test_server import Process  # noqa: E402

EXAMPLES = Path(__file__).parents[2] / "examples"
RATE, FRAME = 16_000, 160
BURSTS = [(1.0, 1.3, 440), (2.5, 3.0, 1000), (4.2, 4.7, 2500)]
"""From, to, frequency."""
HANGOVER = 0.09
"""How long it stays active after a sound: eight frames, and one that the spectrum shares with it."""
ANSWER = np.dtype([("n", "<u4"), ("level", "<f4"), ("score", "<f4"), ("active", "?"), ("frequency", "<f4")])


@pytest.fixture(scope="module")
def sound():
    """Six seconds of noise with three bursts of tone, 12 dB above it."""
    time, x = np.arange(6 * RATE) / RATE, np.random.default_rng(0).normal(0, 300, 6 * RATE)
    for begin, end, frequency in BURSTS:
        at = (begin <= time) & (time < end)
        x[at] += 1640 * np.sin(2 * np.pi * frequency * time[at])
    return x.astype("<i2")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("listen")
    (folder / "listen.py").write_bytes((EXAMPLES / "listen.py").read_bytes())
    server = Process(folder, (EXAMPLES / "listen.toml").read_text(), name="listen.toml")
    yield server
    assert server.stop() == 0


def test_bursts_are_heard_in_their_frames_whatever_a_message_holds_and_over_a_break(server, sound):
    frames, answers = sound.reshape(-1, FRAME), []
    with connect(server.ws + "/v1/stream/phone") as socket:
        assert json.loads(socket.recv()) == {"seen": 0}
        for frame in frames[:280]:
            socket.send(frame.tobytes())
        answers += [socket.recv() for _ in range(280)]
    with connect(server.ws + "/v1/stream/phone") as socket:  # cut off within a burst
        assert json.loads(socket.recv()) == {"seen": 280}
        socket.send(frames[280:].tobytes())
        answers.append(socket.recv())
    heard = np.frombuffer(b"".join(answers), ANSWER)
    assert heard["n"].tolist() == list(range(1, 601))
    change = np.flatnonzero(np.diff(heard["active"].astype(int), prepend=0)) * FRAME / RATE
    np.testing.assert_allclose(change, [t for b, e, _ in BURSTS for t in (b, e + HANGOVER)], atol=0.001)
    for begin, end, frequency in BURSTS:
        part = heard[round(100 * begin) + 1 : round(100 * end)]
        assert np.abs(part["frequency"] - frequency).max() <= 50
        np.testing.assert_allclose(part["level"], 10 * np.log10((1640**2 / 2 + 300**2) / 32768**2), atol=0.5)
    assert not heard["frequency"][~heard["active"]].any()


@pytest.mark.parametrize("source", ["file", "microphone"])
def test_the_client_tells_when_there_was_sound(server, sound, source, tmp_path):
    command = [sys.executable, EXAMPLES / "listen_client.py", "--server", server.ws]
    if source == "file":
        soundfile.write(tmp_path / "bursts.wav", sound, RATE)
        done = subprocess.run([*command, tmp_path / "bursts.wav"], capture_output=True, text=True, timeout=60)
    else:
        done = subprocess.run([*command, "-"], input=sound.tobytes(), capture_output=True, timeout=60)
        done = subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())
    assert done.returncode == 0, done.stderr
    lines = [re.findall(r"[-\d.]+", line) for line in done.stdout.splitlines()]
    found = [(float(begin), float(end), float(frequency)) for begin, end, _, frequency in lines]
    assert [(begin, end) for begin, end, _ in found] == [(b, pytest.approx(e + HANGOVER)) for b, e, _ in BURSTS]
    assert all(abs(frequency - wanted) <= 50 for (*_, frequency), (*_, wanted) in zip(found, BURSTS))


def test_real_speech_is_heard_where_it_is_loud(server, data):
    samples, rate = soundfile.read(data / "speech" / "test.wav", dtype="int16", frames=20 * RATE)
    assert rate == RATE
    frames = samples.reshape(-1, FRAME)
    with connect(server.ws + "/v1/stream/speech", max_size=None) as socket:
        socket.recv()
        socket.send(frames.tobytes())
        heard = np.frombuffer(socket.recv(decode=False), ANSWER)
    loud = np.sort(heard["level"])
    assert heard["active"][heard["level"] > loud[len(loud) // 2]].mean() > 0.95
    assert not heard["active"][heard["level"] < loud[len(loud) // 20]].all()
