"""`anabranch serve`, over real connections to a process of its own."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

httpx = pytest.importorskip("httpx")
pytest.importorskip("uvicorn")
from websockets.sync.client import connect  # noqa: E402

CELL = """
import equinox as eqx
import jax
import jax.numpy as jnp
from anabranch import Cell


class Recurrent(Cell):
    w: jax.Array

    def __init__(self, size=3):
        self.w = jax.random.normal(jax.random.PRNGKey(1), (size, size))

    def init(self, *, key=None):
        return jnp.zeros(self.w.shape[0])

    def step(self, state, x):
        state = jnp.tanh(self.w @ state + x)
        return state, state
"""

CELL_FILE = """
[cell]
name = "recurrent"
cell = "served_cell:Recurrent"
input = "float32[3]"
capacity = 64
{cell}
[serve]
every = 0.5
{serve}
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Process:
    """A server of a file, in a process of its own."""

    def __init__(self, folder, text, name="served.toml"):
        (folder / "served_cell.py").write_text(CELL)
        self.file, self.folder, self.port = folder / name, folder, free_port()
        self.file.write_text(text)
        self.url, self.ws = f"http://127.0.0.1:{self.port}", f"ws://127.0.0.1:{self.port}"
        self.start()

    def start(self):
        command = [sys.executable, "-m", "anabranch.cli", "serve", str(self.file), "--port", str(self.port)]
        self.log = open(self.folder / "server.log", "ab")
        self.process = subprocess.Popen(command, cwd=self.folder, stderr=self.log, stdout=self.log, env=os.environ)
        until = time.monotonic() + 60
        while time.monotonic() < until and self.process.poll() is None:
            try:
                if httpx.get(self.url + "/readyz").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.05)
        raise RuntimeError((self.folder / "server.log").read_text())

    def stop(self, how=signal.SIGTERM) -> int:
        self.process.send_signal(how)
        return self.process.wait(20)


def events(n, seed=0):
    return np.random.default_rng(seed).normal(size=(n, 3)).astype(np.float32)


def expected(xs):
    import jax

    w = np.asarray(jax.random.normal(jax.random.PRNGKey(1), (3, 3)))
    state, out = np.zeros(3, np.float32), []
    for x in xs:
        state = np.tanh(w @ state + x)
        out.append(state)
    return np.array(out)


@pytest.fixture(scope="module")
def cell(tmp_path_factory):
    grpc = free_port()
    text = CELL_FILE.format(cell="", serve=f"grpc = {grpc}\nmax_message = 100_000\nstream_queue = 1000")
    server = Process(tmp_path_factory.mktemp("cell"), text)
    server.grpc = grpc
    yield server
    assert server.stop() == 0
    assert list((server.folder / "out/recurrent/live/checkpoints").glob("*.safetensors"))


def test_http_events_of_a_cell(cell):
    xs = events(4)
    answers = [httpx.post(cell.url + "/v1/events", json={"stream": "a", "x": x.tolist()}).json() for x in xs[:2]]
    many = [{"stream": name, "x": x.tolist()} for x in xs[2:] for name in ("a", "b")]
    answers += httpx.post(cell.url + "/v1/events", json=many).json()["results"][::2]
    assert [answer["n"] for answer in answers] == [1, 2, 3, 4]
    np.testing.assert_allclose([answer["y"] for answer in answers], expected(xs), atol=1e-6)


def test_bad_events_are_answered_one_by_one(cell):
    good = {"stream": "bad", "x": [0.0, 0.0, 0.0]}
    wrong = [
        ({"stream": "bad", "x": [1, 2]}, "x: expected float32[3], got [1, 2]"),
        ({"stream": "bad", "x": "text"}, "x: expected float32[3], got 'text'"),
        ({"stream": "", "x": [1, 2, 3]}, "stream: expected a name, got ''"),
        ({"stream": "bad", "x": [1, 2, 3], "y": 1}, "unknown field 'y'"),
        (7, "expected an object, got int"),
    ]
    results = httpx.post(cell.url + "/v1/events", json=[good, *(w for w, _ in wrong), good]).json()["results"]
    assert [results[0]["n"], results[-1]["n"]] == [1, 2]
    assert [result["error"] for result in results[1:-1]] == [said for _, said in wrong]
    assert httpx.post(cell.url + "/v1/events", content=b"{").status_code == 400
    assert httpx.post(cell.url + "/v1/events", content=b"[NaN]").status_code == 400
    assert httpx.post(cell.url + "/v1/events", content=b"[" * 99_999).status_code == 400
    assert httpx.post(cell.url + "/v1/events", content=b" " * 100_001).status_code == 413
    full = httpx.post(cell.url + "/v1/events", json=[good] * 1001)
    assert full.status_code == 429 and full.headers["retry-after"] == "1"


def test_a_websocket_of_bytes_goes_on_after_a_break(cell):
    xs = events(50, 1)
    got = b""
    with connect(cell.ws + "/v1/stream/session/1") as ws:
        assert json.loads(ws.recv()) == {"seen": 0}
        for x in xs[:20]:
            ws.send(x.tobytes())
        for _ in range(20):
            got += ws.recv()
    with connect(cell.ws + "/v1/stream/session/1") as ws:
        assert json.loads(ws.recv()) == {"seen": 20}
        ws.send(xs[20:].tobytes())
        got += ws.recv()
        ws.send(b"123")
        with pytest.raises(Exception, match="multiple of 12 bytes, got 3"):
            ws.recv()
    answers = np.frombuffer(got, np.dtype([("n", "<u4"), ("y", "<f4", 3)]))
    assert answers["n"].tolist() == list(range(1, 51))
    np.testing.assert_allclose(answers["y"], expected(xs), atol=1e-6)


def test_a_websocket_of_json_answers_in_order_whatever_waits(cell):
    xs = events(300, 2)
    with connect(cell.ws + "/v1/stream") as ws:
        for i, x in enumerate(xs):
            ws.send(json.dumps({"stream": f"json{i % 7}", "x": x.tolist()}))
        answers = [json.loads(ws.recv()) for _ in xs]
        ws.send("no json")
        assert "not JSON" in json.loads(ws.recv())["error"]
    for j in range(7):
        assert [answer["n"] for answer in answers[j::7]] == list(range(1, len(answers[j::7]) + 1))
        np.testing.assert_allclose([answer["y"] for answer in answers[j::7]], expected(xs[j::7]), atol=1e-6)


@pytest.mark.parametrize("protocol", ["http", "grpc", "stream"])
def test_an_unmodified_tritonclient_drives_a_sequence(cell, protocol):
    name = "http" if protocol == "http" else "grpc"
    triton = pytest.importorskip("tritonclient." + name)
    client = triton.InferenceServerClient(f"127.0.0.1:{cell.port if protocol == 'http' else cell.grpc}")
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("recurrent")
    said = client.get_model_metadata("recurrent")
    inputs = said["inputs"] if protocol == "http" else [{"name": i.name, "shape": i.shape} for i in said.inputs]
    assert inputs[0]["name"] == "x" and list(map(int, inputs[0]["shape"])) == [-1, 3]
    xs, outs, answers = events(6, 3), [], []
    if protocol == "stream":
        client.start_stream(lambda result, error: answers.append((result, error)))
    for _ in range(2):  # the second sequence of the same id begins anew
        for i in range(0, 6, 2):
            x = triton.InferInput("x", [2, 3], "FP32")
            x.set_data_from_numpy(xs[i : i + 2])
            where = {"sequence_id": 42, "sequence_start": i == 0, "sequence_end": i == 4}
            if protocol == "stream":
                client.async_stream_infer("recurrent", [x], **where)
            else:
                outs.append(client.infer("recurrent", [x], **where).as_numpy("y"))
    if protocol == "stream":
        client.stop_stream()
        assert all(error is None for _, error in answers)
        outs = [result.as_numpy("y") for result, _ in answers]
    np.testing.assert_allclose(np.concatenate(outs), np.tile(expected(xs), (2, 1)), atol=1e-6)
    bad = triton.InferInput("x", [1, 2], "FP32")
    bad.set_data_from_numpy(xs[:1, :2].copy())
    with pytest.raises(Exception, match=r"x: expected shape \[n, 3\], got \[1, 2\]"):
        client.infer("recurrent", [bad], sequence_id=1)
    client.close()


def test_what_json_cannot_say_is_null(cell):
    with connect(cell.ws + "/v1/stream/nan") as ws:
        ws.recv()
        ws.send(np.full(3, np.nan, np.float32).tobytes())
        assert np.isnan(np.frombuffer(ws.recv(), "<f4", offset=4)).all()
    answer = httpx.post(cell.url + "/v1/events", json={"stream": "nan", "x": [0, 0, 0]})
    assert answer.json() == {"n": 2, "y": [None] * 3}
    huge = httpx.post(cell.url + "/v1/events", json={"stream": "nan", "x": [1e39, 0, 0]})
    assert huge.json() == {"error": "x: expected float32[3], got [1e+39, 0, 0]"}


def test_it_tells_of_itself(cell):
    httpx.post(cell.url + "/v1/events", json={"stream": "m", "x": [0, 0, 0]})
    metrics = httpx.get(cell.url + "/metrics").text
    assert "anabranch_events_total" in metrics and "anabranch_latency_seconds_bucket" in metrics
    stats = httpx.get(cell.url + "/v1/stats").json()
    assert stats["name"] == "recurrent" and stats["keys"]["cell"]["keys"] >= 1 and stats["events_per_s"] > 0
    assert httpx.get(cell.url + "/healthz").text == "ok"


def test_tenants_cannot_reach_each_others_streams(tmp_path):
    import hashlib

    lines = [f"{name} {hashlib.sha256(name.encode() * 8).hexdigest()}" for name in ("ann", "bob")]
    (tmp_path / "tokens").write_text("# who, and the hash of the token\n" + "\n".join(lines))
    server = Process(tmp_path, CELL_FILE.format(cell="", serve='tokens = "tokens"'))
    headers = {name: {"Authorization": "Bearer " + name * 8} for name in ("ann", "bob")}
    event = {"stream": "same", "x": [1, 1, 1]}
    assert httpx.post(server.url + "/v1/events", json=event).status_code == 401
    assert httpx.post(server.url + "/v1/events", json=event, headers={"Authorization": "Bearer x"}).status_code == 401
    for _ in range(2):
        n = [httpx.post(server.url + "/v1/events", json=event, headers=headers[name]).json()["n"] for name in headers]
    assert n == [2, 2]
    sneaky = {"stream": "../bob/same", "x": [1, 1, 1]}
    assert httpx.post(server.url + "/v1/events", json=sneaky, headers=headers["ann"]).json()["n"] == 1
    with pytest.raises(Exception, match=r"403|4401|401"):
        connect(server.ws + "/v1/stream/same").recv()
    with connect(server.ws + "/v1/stream/same", additional_headers=headers["bob"]) as ws:
        assert json.loads(ws.recv()) == {"seen": 2}
    server.stop()


def test_idle_streams_end(tmp_path):
    server = Process(tmp_path, CELL_FILE.format(cell="idle = 0.5", serve=""))
    event = {"stream": "idle", "x": [1, 1, 1]}
    assert httpx.post(server.url + "/v1/events", json=event).json()["n"] == 1
    until = time.monotonic() + 20
    while httpx.get(server.url + "/v1/stats").json()["keys"]["cell"]["keys"] and time.monotonic() < until:
        time.sleep(0.1)
    assert httpx.post(server.url + "/v1/events", json=event).json()["n"] == 1
    server.stop()


def test_a_second_server_stays_out(cell):
    with pytest.raises(RuntimeError, match="another server is at work there"):
        Process(cell.folder, cell.file.read_text(), "second.toml")


def test_a_cell_with_another_state_of_the_same_size_does_not_start(tmp_path):
    text = CELL_FILE.format(cell="", serve="")
    server = Process(tmp_path, text)
    httpx.post(server.url + "/v1/events", json={"stream": "a", "x": [1.0, 2.0, 3.0]})
    assert server.stop() == 0
    other = CELL.replace("jnp.zeros(self.w.shape[0])", "jnp.zeros((1, 3))").replace(
        "self.w @ state", "state @ self.w.T"
    )
    (tmp_path / "other_cell.py").write_text(other)
    with pytest.raises(RuntimeError, match=r"are of a cell with the state .*float32\[3\]"):
        Process(tmp_path, text.replace("served_cell:", "other_cell:"))


def test_what_was_answered_survives_sigkill_exactly_once(tmp_path):
    server = Process(tmp_path, CELL_FILE.format(cell="", serve=""))
    xs, at, answers = events(4000, 5), 0, {}
    rng = np.random.default_rng(0)
    for kill in [*rng.uniform(0.2, 1.5, 4), None]:
        until = None if kill is None else time.monotonic() + kill
        with connect(server.ws + "/v1/stream/one") as ws:
            seen = json.loads(ws.recv())["seen"]
            assert seen >= at  # what was answered has counted; what was not may have
            at = sent = seen
            try:
                while at < len(xs):
                    if until is not None and time.monotonic() > until:
                        server.stop(signal.SIGKILL)
                        until = None
                    while sent < min(len(xs), at + 32):
                        ws.send(xs[sent].tobytes())
                        sent += 1
                    data = ws.recv(timeout=10)
                    n = int.from_bytes(data[:4], "little")
                    assert n == at + 1
                    answers[n] = np.frombuffer(data, "<f4", offset=4)
                    at = n
                    if kill is not None:
                        time.sleep(0.0005)
            except Exception as error:
                if server.process.poll() is None:
                    raise error
        if server.process.poll() is not None:
            server.start()
    truth = expected(xs)
    assert at == len(xs) and len(answers) > 3000
    for n, y in answers.items():
        np.testing.assert_allclose(y, truth[n - 1], atol=1e-6)
    server.stop()


def test_a_served_pipeline_answers_as_a_run_does_whatever_kills_it(tmp_path, rows):
    import pyarrow.parquet as pq

    from anabranch.run.config import read
    from anabranch.run.pipeline import Pipeline

    from .conftest import write_payments

    ordered = sorted((row for row in rows[:1500] if isinstance(row.get("time"), float)), key=lambda row: row["time"])
    ordered.insert(700, {**ordered[700], "amount": "much"})
    file = write_payments(tmp_path, ordered, sink="parquet")
    server = Process(tmp_path, file.read_text() + "\n[serve]\nevery = 0.3\n", name=file.name)
    answers, at = [], 0
    while at < len(ordered):
        if at in (500, 1000):  # between two answers, some seconds after a checkpoint or not
            server.stop(signal.SIGKILL)
            server.start()
        many = ordered[at : at + 20]
        answers += httpx.post(server.url + "/v1/events", json=many).json()["results"]
        at += len(many)
    assert [answer["row"] for answer in answers] == list(range(len(ordered)))
    assert answers[700]["error"] == "amount: 'much' is not a finite number"
    assert server.stop() == 0

    calm = Pipeline(read(file), tmp_path, source=ordered)
    calm.out = tmp_path / "calm"
    calm.run()
    want = pq.read_table(calm.out / "predictions").to_pylist()
    written = pq.read_table(tmp_path / "out/cards/live/predictions").to_pylist()
    said = [answer for answer in answers if "error" not in answer]
    assert said == written  # each once, and as it was answered
    assert [row["row"] for row in written] == [row["row"] for row in want]
    np.testing.assert_allclose([r["prediction"] for r in written], [r["prediction"] for r in want], atol=1e-6)
    letters = [json.loads(line) for line in (tmp_path / "out/cards/live/dead_letters.jsonl").open()]
    assert [letter["row"] for letter in letters] == [i for i, answer in enumerate(answers) if "error" in answer]
