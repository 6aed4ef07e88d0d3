"""Clients that misbehave, disks that are full and clocks that jump: the server goes on, and loses nothing."""

import socket
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

httpx = pytest.importorskip("httpx")
pytest.importorskip("uvicorn")
from websockets.sync.client import connect  # noqa: E402

from .run.conftest import payments, write_payments  # noqa: E402
from .run.test_server import CELL_FILE, Process, events  # noqa: E402

HURRIED = """
import functools
import uvicorn
from anabranch.run import connections
from served_cell import Recurrent

connections.PATIENCE = 0.5
uvicorn.run = functools.partial(uvicorn.run, ws_ping_interval=0.3, ws_ping_timeout=0.5)
"""
JUMPING = """
import pathlib
import time

true = time.time
time.time = lambda: true() + float(pathlib.Path("jump").read_text())
"""
UPGRADE = (
    "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)
BIG = 1000 * 12  # bytes of a thousand events


def serve(folder, *, cell="", before=""):
    """A server of the test's cell, in whose process some lines run first."""
    (folder / "patched.py").write_text(before or "from served_cell import Recurrent")
    text = CELL_FILE.format(cell=cell, serve="").replace("served_cell:", "patched:")
    return Process(folder, text)


def post(server, n=1, stream="a"):
    many = [{"stream": stream, "x": x.tolist()} for x in events(n)]
    return httpx.post(server.url + "/v1/events", json=many, timeout=30)


def last(server, n=1):
    """The number that the last of n more events has."""
    response = post(server, n)
    assert response.status_code == 200, response.text
    return response.json()["results"][-1]["n"]


def restart(server):
    server.process.kill()
    server.process.wait()
    server.start()


def memory(server):
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


def until(true, seconds=30):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


# Clients


@pytest.fixture(scope="module")
def hurried(tmp_path_factory):
    """A server that gives up on a client within a second."""
    server = serve(tmp_path_factory.mktemp("hurried"), before=HURRIED)
    yield server
    assert server.stop() == 0


def dial(server, sent=b""):
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # so that it is soon full
    client.settimeout(10)
    client.connect(("127.0.0.1", server.port))
    client.sendall(sent)
    return client


def upgraded(server, key):
    """A WebSocket that has said nothing yet, and that will not answer pings."""
    head = f"GET /v1/stream/{key} HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n{UPGRADE}"
    client = dial(server, head.encode())
    assert client.recv(12) == b"HTTP/1.1 101"
    return client


def sessions(server):
    return httpx.get(server.url + "/v1/stats").json()["sessions"]


def test_a_client_that_reads_nothing_holds_up_nobody_and_is_dropped(hurried):
    message = b"\x82\xfe" + BIG.to_bytes(2, "big") + bytes(4) + events(1000).tobytes()
    last(hurried, 1000)  # compiled, and its memory taken
    with connect(hurried.ws + "/v1/stream/good") as good:
        good.recv()
        before, sent = memory(hurried), 0
        deaf = upgraded(hurried, "deaf")
        deaf.settimeout(5)
        with pytest.raises(OSError):  # it is read no further, or dropped already
            while sent < 200_000_000:
                deaf.sendall(message)
                sent += BIG
                if sent % (100 * BIG) == 0:
                    good.send(events(1).tobytes())
                    assert len(good.recv(timeout=10)) == 16
        assert memory(hurried) - before < 50_000_000
        until(lambda: sessions(hurried) == 1)
        good.send(events(1).tobytes())
        assert len(good.recv(timeout=10)) == 16
    deaf.close()


def test_a_client_that_has_vanished_is_dropped(hurried):
    gone = [upgraded(hurried, f"gone{i}") for i in range(3)]
    with connect(hurried.ws + "/v1/stream/there") as there:
        there.recv()
        until(lambda: sessions(hurried) >= 4)
        until(lambda: sessions(hurried) == 1)
        there.send(events(1).tobytes())
        assert len(there.recv(timeout=10)) == 16
    for client in gone:
        client.close()


@pytest.mark.parametrize(
    "sent, more, answer",
    [
        (b"", b"", b""),
        (b"GET /healthz HTTP/1.1\r\nHost: 127", b"", b""),
        (b"GET /healthz HTTP/1.1\r\nX-Slow: ", b"x", b""),
        (b"POST /v1/events HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n[", b"", b"HTTP/1.1 408"),
        (b"POST /v1/events HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5000\r\n\r\n[", b" ", b"HTTP/1.1 408"),
    ],
    ids=["silent", "half a head", "a head in drops", "half a body", "a body in drops"],
)
def test_a_request_that_does_not_end_is_given_up(hurried, sent, more, answer):
    client = dial(hurried, sent)
    client.settimeout(0.1)
    got, end = b"", time.monotonic() + 20
    while time.monotonic() < end:
        try:
            client.sendall(more)
            data = client.recv(4096)
        except TimeoutError:
            continue
        except (BrokenPipeError, ConnectionResetError):
            break
        got += data
        if not data:
            break
    else:
        pytest.fail("it has been left open")
    assert got[:12] == answer
    client.close()


# Disks


@pytest.fixture
def small_disk(tmp_path):
    """Makes a small disk at a place in the test's folder; returns what changes its size."""
    made = []

    def mount(place, size):
        (tmp_path / place).mkdir(parents=True)
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", tmp_path / place])
        if done.returncode:
            pytest.skip("a small disk can be mounted only by root")
        made.append(tmp_path / place)
        return lambda size: subprocess.run(["mount", "-o", f"remount,size={size}", made[-1]], check=True)

    yield mount
    for place in made:
        subprocess.run(["umount", "-l", place], check=True)


def test_a_full_disk_refuses_events_and_goes_on_when_there_is_room(tmp_path, small_disk):
    resize = small_disk("out/recurrent/live/journal", "200k")
    server, n = serve(tmp_path), 0
    for text in ("every = 0.5", "every = 3600"):
        server.file.write_text(server.file.read_text().replace("every = 0.5", text))
    restart(server)
    while (response := post(server, 500)).status_code == 200:
        n += 500
        assert n < 100_000 and response.json()["results"][-1]["n"] == n
    assert response.status_code == 503
    assert httpx.get(server.url + "/healthz").text == "ok"
    assert post(server, 500).status_code == 503
    resize("2m")
    assert last(server, 500) == n + 500
    restart(server)
    assert last(server) == n + 501
    assert server.stop() == 0


def test_a_full_disk_while_streams_are_idle_for_too_long_ends_nothing(tmp_path, small_disk):
    resize = small_disk("out/recurrent/live/journal", "40k")
    server = serve(tmp_path, cell="idle = 0.5")
    for n in (200, 20, 1):
        while post(server, n).status_code == 200:
            pass
    time.sleep(2.5)
    assert post(server).status_code == 503
    resize("2m")
    assert last(server) > 0
    assert server.stop() == 0


def test_a_checkpoint_that_cannot_be_written_is_tried_again(tmp_path, small_disk):
    resize = small_disk("out/recurrent/live/checkpoints", "4k")
    server, n = serve(tmp_path), 0
    (tmp_path / "out/recurrent/live/checkpoints/filler").write_bytes(bytes(4096))

    def failed():
        nonlocal n
        n += 1
        assert last(server) == n
        line = next(line for line in httpx.get(server.url + "/metrics").text.splitlines() if line.startswith(UNSAVED))
        return float(line.split()[-1]) >= 2

    until(failed)
    assert httpx.get(server.url + "/readyz").status_code == 200
    restart(server)
    n += 1
    assert last(server) == n
    resize("1m")

    def written():
        nonlocal n
        n += 1
        assert last(server) == n
        return list((tmp_path / "out/recurrent/live/checkpoints").glob("*.safetensors"))

    until(written)
    restart(server)
    assert last(server) == n + 1
    assert server.stop() == 0


UNSAVED = "anabranch_checkpoints_failed"


# Clocks


def test_idle_streams_end_while_others_are_busy(tmp_path):
    server = serve(tmp_path, cell="idle = 0.5")
    assert post(server, stream="idle").json()["results"][0]["n"] == 1

    def ended():
        last(server)
        return httpx.get(server.url + "/v1/stats").json()["keys"]["cell"]["keys"] == 1

    until(ended, 10)
    assert post(server, stream="idle").json()["results"][0]["n"] == 1
    assert server.stop() == 0


def jump_by(folder, seconds):
    (folder / "next").write_text(str(seconds))
    (folder / "next").rename(folder / "jump")  # the server reads it all the time, and never half of it


def test_a_clock_that_jumps_ends_no_stream_and_stops_no_checkpoint(tmp_path):
    jump_by(tmp_path, 0)
    server, n = serve(tmp_path, cell="idle = 600", before=JUMPING + "from served_cell import Recurrent"), 0
    checkpoints = tmp_path / "out/recurrent/live/checkpoints"
    for jump in (0, 36_000, -36_000):
        jump_by(tmp_path, jump)
        time.sleep(1.2)  # when nothing comes, the streams that have been idle are looked for once a second
        there = len(list(checkpoints.iterdir()))

        def written():
            nonlocal n
            n += 1
            assert last(server) == n
            return len(list(checkpoints.iterdir())) > there

        until(written)
    restart(server)
    assert last(server) == n + 1
    assert server.stop() == 0


def test_a_row_without_a_time_is_not_late_when_the_clock_is_set_back(tmp_path):
    (tmp_path / "jump").write_text("0")
    row = {name: value for name, value in payments(30)[5].items() if name not in ("time", "fraud", "known")}
    file = write_payments(tmp_path, [])
    (tmp_path / "cards_model.py").write_text(JUMPING + (tmp_path / "cards_model.py").read_text())
    server = Process(tmp_path, file.read_text(), name=file.name)
    for jump in (0, 7200, 0, -7200):
        jump_by(tmp_path, jump)
        answer = httpx.post(server.url + "/v1/events", json=row).json()
        assert "error" not in answer
        np.testing.assert_array_less(0, answer["prediction"])
    restart(server)
    assert "error" not in httpx.post(server.url + "/v1/events", json=row).json()
    assert server.stop() == 0
