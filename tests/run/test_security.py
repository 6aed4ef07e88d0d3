"""What hostile clients send: over real connections, with and without tokens, to servers in this process."""

import asyncio
import contextlib
import gc
import hashlib
import json
import logging
import re
import socket
import threading
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

grpc = pytest.importorskip("grpc")
httpx = pytest.importorskip("httpx")
schemathesis = pytest.importorskip("schemathesis")
trustme = pytest.importorskip("trustme")
uvicorn = pytest.importorskip("uvicorn")
from websockets.exceptions import ConnectionClosed  # noqa: E402
from websockets.sync.client import connect  # noqa: E402

from anabranch.run import oip_pb2 as pb  # noqa: E402
from anabranch.run.config import ConfigError, read_served  # noqa: E402
from anabranch.run.server import Server  # noqa: E402

from .conftest import write_payments  # noqa: E402
from .test_server import CELL, CELL_FILE, events, expected  # noqa: E402

RPC = "/inference.GRPCInferenceService/"
FUZZ = {
    "deadline": None, "database": None, "phases": [Phase.explicit, Phase.generate],
    "suppress_health_check": list(HealthCheck),
}  # fmt: skip


class Served:
    """A server in a thread of this process, so that its log, its tasks and its counts can be seen."""

    def __init__(self, file):
        self.server = Server(read_served(file), file.parent)
        serve = self.server.config
        self._uvicorn = uvicorn.Server(
            uvicorn.Config(
                self.server.app, port=0, log_config=None, lifespan="on", ws_max_size=serve.max_message,
                ssl_certfile=serve.certificate, ssl_keyfile=serve.key,
            )
        )  # fmt: skip
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self._thread.start()
        until = time.monotonic() + 60
        while not self._uvicorn.started and self._thread.is_alive() and time.monotonic() < until:
            time.sleep(0.01)
        assert self._uvicorn.started
        self.port = self._uvicorn.servers[0].sockets[0].getsockname()[1]
        tls = serve.certificate is not None
        self.url, self.ws = (f"{kind}{'s' * tls}://127.0.0.1:{self.port}" for kind in ("http", "ws"))
        self.grpc = f"127.0.0.1:{self.server.grpc_port}" if serve.grpc is not None else ""

    async def _run(self):
        self._loop = asyncio.get_running_loop()
        await self._uvicorn.serve()

    def settles(self, tasks):
        """Wait until no more than so many tasks run, and no session is open."""
        until = time.monotonic() + 20
        while len(asyncio.all_tasks(self._loop)) > tasks or self.sessions():
            assert time.monotonic() < until, asyncio.all_tasks(self._loop)
            time.sleep(0.05)

    def tasks(self):
        return len(asyncio.all_tasks(self._loop))

    def sessions(self):
        return self.server.metrics.registry.get_sample_value("anabranch_sessions")

    def stop(self):
        self._uvicorn.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive()


def bearer(name):
    return {"Authorization": f"Bearer {name * 8}"}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A function that serves a cell or, given its text, another file."""
    started = []

    def serve(serve="", text=None, **files):
        folder = tmp_path_factory.mktemp("served")
        (folder / "served_cell.py").write_text(CELL)
        digests = [f"{name} {hashlib.sha256(name.encode() * 8).hexdigest()}" for name in ("ann", "bob", "root")]
        (folder / "tokens").write_text("\n".join(digests) + " operator\n")
        for name, content in files.items():
            (folder / name).write_bytes(content)
        out = f'out = "{folder}/out"\n'
        text = out + text if text else CELL_FILE.format(cell=out, serve="grpc = 0\n" + serve)
        (folder / "served.toml").write_text(text)
        started.append(Served(folder / "served.toml"))
        return started[-1]

    yield serve
    for server in started:
        server.stop()


@pytest.fixture(scope="module")
def cell(start):
    return start("max_message = 100_000")


@pytest.fixture(scope="module")
def guarded(start):
    return start('tokens = "tokens"')


@pytest.fixture(autouse=True)
def no_trouble(caplog):
    """Nothing that clients do is an error of the server."""
    with caplog.at_level(logging.INFO):
        yield
    records = [r for when in ("setup", "call") for r in caplog.get_records(when)]
    trouble = [r for r in records if r.levelno >= logging.ERROR or r.exc_info]
    assert [r.getMessage() for r in trouble if not _bad_text(r)] == []


def _bad_text(record):
    """Whether uvicorn tells that it closes a connection for text that is none, which it does as an error of its own."""
    error = record.exc_info[1] if record.exc_info else None
    return isinstance(error, UnicodeDecodeError) or isinstance(error.__context__, UnicodeDecodeError)


def still_right(server, headers=None):
    """A new stream is answered as it should be."""
    xs = events(20, 7)
    with connect(f"{server.ws}/v1/stream/right{time.monotonic_ns()}", additional_headers=headers) as ws:
        assert json.loads(ws.recv()) == {"seen": 0}
        ws.send(xs.tobytes())
        answers = np.frombuffer(ws.recv(), np.dtype([("n", "<u4"), ("y", "<f4", 3)]))
    assert answers["n"].tolist() == list(range(1, 21))
    np.testing.assert_allclose(answers["y"], expected(xs), atol=1e-6)


# The description


@pytest.fixture(scope="module")
def pipeline(start, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    text = write_payments(folder, []).read_text() + "\n[serve]\nevery = 0.3\n"
    return start(text=text, **{"cards_model.py": (folder / "cards_model.py").read_bytes(), "cards.jsonl": b""})


@pytest.mark.parametrize("which", ["cell", "guarded", "pipeline"])
def test_the_description_is_openapi_and_says_what_is_served(which, request):
    validator = pytest.importorskip("openapi_spec_validator")
    said = httpx.get(request.getfixturevalue(which).url + "/openapi.json").json()
    validator.validate(said, cls=validator.OpenAPIV31SpecValidator)
    event = said["paths"]["/v1/events"]["post"]["requestBody"]["content"]["application/json"]["schema"]["oneOf"][0]
    if which == "pipeline":
        assert event["properties"]["amount"] == {"type": "number"} and "/v1/streams" not in said["paths"]
        assert event["properties"]["fraud"]["enum"] == [0, 1, None] and set(event["required"]) > {"card", "amount"}
    else:
        assert event["properties"]["x"]["minItems"] == 3 and "/v2/models/{name}/infer" in said["paths"]
    assert ("security" in said["paths"]["/v1/events"]["post"]) == (which == "guarded")


@pytest.mark.parametrize("which", ["cell", "guarded", "pipeline"])
def test_every_operation_answers_as_it_is_described(which, request):
    server = request.getfixturevalue(which)
    headers = bearer("root") if which == "guarded" else {}
    described = schemathesis.openapi.from_url(server.url + "/openapi.json")
    # A bad event is answered in its place, with 200 like the events around it; and how many numbers a shape asks
    # for cannot be described.
    answered = schemathesis.checks.CHECKS.get_by_names(["negative_data_rejection", "positive_data_acceptance"])
    for found in described.get_all_operations():

        @settings(max_examples=12, **FUZZ)
        @given(case=found.ok().as_strategy())
        def check(case):
            case.call_and_validate(headers=headers, excluded_checks=answered)

        check()
    if which == "pipeline":
        row = {"time": 1e9, "card": "last", "country": "NO", "amount": 1.0}
        assert "row" in httpx.post(server.url + "/v1/events", json=row).json()
    else:
        still_right(server, headers)


# Hostile connections

MASK = b"\x01\x02\x03\x04"
EVENT = b"\x01\x00\x00a" + np.float32([1, 2, 3]).tobytes()


def frame(payload, opcode=2, fin=True, masked=True, length=None, reserved=0):
    """A frame of a WebSocket, that may say a wrong length or opcode."""
    length = len(payload) if length is None else length
    head = bytes([fin << 7 | reserved << 4 | opcode])
    if length < 126:
        head += bytes([masked << 7 | length])
    else:
        head += bytes([masked << 7 | 127]) + length.to_bytes(8, "big")
    body = bytes(b ^ MASK[i % 4] for i, b in enumerate(payload)) if masked else payload
    return head + (MASK if masked else b"") + body


def flipped(whole):
    """Strategy of these bytes with some of them changed, and perhaps cut."""
    changes = st.lists(st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255)), max_size=4)

    def change(changes, end):
        data = bytearray(whole)
        for at, value in changes:
            data[at] = value
        return bytes(data[: len(data) - end])

    return st.builds(change, changes, st.sampled_from([0, 0, 0, 1, 7]))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["stream", "x", "end"]), inner),
    max_leaves=6,
)
SAID = JSON | st.fixed_dictionaries({"stream": st.text(min_size=1, max_size=3), "x": JSON})
PAYLOADS = st.one_of(
    st.binary(max_size=40), flipped(EVENT * 2), SAID.map(lambda said: json.dumps(said).encode()),
    st.sampled_from([b"\xff\xfe", b"\xed\xa0\x80", b'{"stream": "\\ud800", "x": [1, 2, 3]}', b"[" * 5000, b""]),
)  # fmt: skip
FRAMES = st.one_of(
    st.builds(frame, PAYLOADS, st.sampled_from([1, 2])),
    st.builds(
        frame, PAYLOADS, st.integers(0, 15), st.booleans(), st.booleans(),
        st.sampled_from([None, None, 1, 126, 1 << 40, (1 << 64) - 1]), st.sampled_from([0, 0, 0, 1, 4]),
    ),
    st.builds(
        lambda payload, cut: frame(payload[:cut], 1, fin=False) + frame(payload[cut:], 0), PAYLOADS, st.integers(0, 9)
    ),
    st.binary(max_size=30),
)  # fmt: skip


def converse(server, path, data, abrupt):
    """Send these bytes over a WebSocket, and return the code and reason with which the server closes it."""
    with socket.create_connection(("127.0.0.1", server.port), 5) as plain:
        plain.sendall(
            f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n".encode()
        )
        head = b""
        while b"\r\n\r\n" not in head:
            head += plain.recv(1)
        assert b" 101 " in head
        with contextlib.suppress(OSError):  # the server may close while this still sends
            plain.sendall(data)
            if abrupt:
                return None
            plain.sendall(frame((1000).to_bytes(2, "big"), 8))
            plain.shutdown(socket.SHUT_WR)
            got = b""
            while part := plain.recv(65536):
                got += part
            return last_close(got)
    return None


def last_close(got):
    while got:
        opcode, length, at = got[0] & 15, got[1] & 127, 2
        if length >= 126:
            at = 4 if length == 126 else 10
            length = int.from_bytes(got[2:at], "big")
        if opcode == 8:
            return int.from_bytes(got[at : at + 2], "big"), got[at + 2 : at + length].decode()
        got = got[at + length :]
    return None


def resident():
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def test_a_websocket_takes_whatever_comes(cell):
    still_right(cell)
    cell.settles(1000)
    tasks = cell.tasks()

    @settings(max_examples=150, **FUZZ)
    @given(
        path=st.sampled_from(["/v1/stream", "/v1/stream/fuzz", "/v1/stream/..%2f%00"]),
        frames=st.lists(FRAMES, min_size=1, max_size=4),
        abrupt=st.booleans(),
    )
    def fuzz(path, frames, abrupt):
        closed = converse(cell, path, b"".join(frames), abrupt)
        if closed is not None:
            assert closed[0] in (1000, 1002, 1003, 1007, 1009), closed
            assert closed[0] != 1003 or re.search(r"bytes|decode|event", closed[1]), closed

    fuzz()
    before = resident()
    fuzz()
    assert resident() - before < 30e6
    cell.settles(tasks)
    still_right(cell)


def inference():
    request = pb.ModelInferRequest(model_name="recurrent", id="1")
    request.parameters["sequence_id"].string_param = "grpc"
    tensor = request.inputs.add(name="x", datatype="FP32", shape=[1, 3])
    tensor.contents.fp32_contents.extend([1, 2, 3])
    return request


def tensors():
    """Strategy of requests whose tensors have other shapes, types and contents than the cell's."""

    def make(model, name, datatype, shape, raw, sequence):
        request = pb.ModelInferRequest(model_name=model, raw_input_contents=raw)
        request.inputs.add(name=name, datatype=datatype, shape=shape)
        if sequence is not None:
            request.parameters["sequence_id"].double_param = sequence
        return request.SerializeToString()

    return st.builds(
        make,
        st.sampled_from(["recurrent", "recurrent", "other", "\x00"]),
        st.sampled_from(["x", "y", "n" * 9000]),
        st.sampled_from(["FP32", "FP32", "FP64", "FP16", "BYTES", "BOOL", "\n"]),
        st.lists(st.sampled_from([1, 3, 0, -1, 1 << 30, -(1 << 63)]), max_size=4),
        st.lists(st.binary(max_size=24), max_size=2),
        st.none() | st.floats(),
    )


def test_grpc_takes_whatever_comes(cell):
    said = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND}
    methods = ["ModelInfer", "ModelInfer", "ModelMetadata", "ServerLive", "ModelReady"]
    whole = inference().SerializeToString()
    messages = st.binary(max_size=30) | flipped(whole) | tensors()
    with grpc.insecure_channel(cell.grpc) as channel:
        assert channel.unary_unary(RPC + "ModelInfer")(whole, timeout=10)
        tasks = cell.tasks()

        @settings(max_examples=200, **FUZZ)
        @given(method=st.sampled_from(methods), message=messages)
        def one(method, message):
            try:
                channel.unary_unary(RPC + method)(message, timeout=10)
            except grpc.RpcError as error:
                assert error.code() in said, error  # pyright: ignore[reportAttributeAccessIssue]

        @settings(max_examples=50, **FUZZ)
        @given(sent=st.lists(messages, max_size=4))
        def stream(sent):
            answers = channel.stream_stream(RPC + "ModelStreamInfer")(iter(sent), timeout=10)
            told = [pb.ModelStreamInferResponse.FromString(answer) for answer in answers]
            assert len(told) == len(sent) and all(a.error_message or a.infer_response.model_name for a in told)

        one()
        stream()
        endless = channel.stream_stream(RPC + "ModelStreamInfer")(iter(lambda: whole, None), timeout=60)
        for _ in range(100):
            assert not pb.ModelStreamInferResponse.FromString(next(endless)).error_message
        endless.cancel()
        cell.settles(tasks)
    still_right(cell)


def test_a_page_of_another_site_is_refused_without_tokens(cell, guarded):
    event = {"stream": "site", "x": [1, 1, 1]}
    for headers, said in (
        ({"Origin": "https://elsewhere.example"}, "Origin: 'https://elsewhere.example'"),
        ({"Origin": "null"}, "Origin: 'null'"),
        ({"Host": "elsewhere.example", "Origin": "http://elsewhere.example"}, "Host: 'elsewhere.example'"),
    ):
        refused = httpx.post(cell.url + "/v1/events", json=event, headers=headers)
        assert refused.status_code == 403 and refused.json()["error"].startswith(said)
        site = {"Origin": headers["Origin"]}  # a handshake has only one Host
        with pytest.raises(ConnectionClosed) as closed, connect(cell.ws + "/v1/stream", additional_headers=site) as ws:
            ws.recv()
        assert closed.value.rcvd.code == 4403 and closed.value.rcvd.reason.startswith("Origin")
        for path in ("/v1/stats", "/v1/streams", "/v1/streams/site", "/metrics"):
            assert httpx.get(cell.url + path, headers=headers).status_code == 403
        allowed = httpx.post(guarded.url + "/v1/events", json=event, headers={**headers, **bearer("ann")})
        assert allowed.json()["n"] > 0
    own = {"Origin": cell.url}
    assert httpx.post(cell.url + "/v1/events", json=event, headers=own).json()["n"] == 1


# Tenants

TRICKS = [
    "../bob/s", "..%2fbob/s", "/bob/s", "//bob/s", "ann/../bob/s", "bob/s", "\x00bob/s", "s" * 60_000,
    "\u00e9", "e\u0301",
]  # fmt: skip


def test_a_tenant_reaches_only_its_own_streams(guarded):
    url, mine, others = guarded.url, bearer("ann"), bearer("bob")
    event = {"stream": "s", "x": [1, 1, 1]}

    def n(name, headers, **flags):
        said = httpx.post(url + "/v1/events", json={"stream": name, "x": [1, 1, 1], **flags}, headers=headers)
        return said.json()["n"]

    before = n("s", others)
    for trick in TRICKS:  # a name is only a name: each is a stream of its own, which begins with its first event
        assert (n(trick, mine), n(trick, mine)) == (1, 2)
    n("s", mine, start=True, end=True)
    frames = EVENT[:2] + b"\x03s" + EVENT[4:]
    with connect(guarded.ws + "/v1/stream", additional_headers=mine) as ws:
        ws.send(frames)
        ws.recv()
        ws.send(json.dumps({**event, "end": True}))
        ws.recv()
    for path in ("s", "../bob/s", "..%2Fbob%2Fs", "%2E%2E/bob/s"):
        with connect(f"{guarded.ws}/v1/stream/{path}", additional_headers=mine) as ws:
            assert json.loads(ws.recv())["seen"] in (0, 2)
    for path in ("s", "%2E%2E%2Fbob%2Fs", "//bob/s"):
        watched = httpx.get(f"{url}/v1/streams/{path}", headers=mine).json()
        assert watched["n"] in (0, 2) and watched["recent"] == []
    request = inference()
    for name in ("s", "../bob/s"):
        body = {
            "parameters": {"sequence_id": name, "sequence_start": True, "sequence_end": True},
            "inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 3], "data": [1, 1, 1]}],
        }
        assert httpx.post(url + "/v2/models/recurrent/infer", json=body, headers=mine).status_code == 200
        request.parameters["sequence_id"].string_param = name
        request.parameters["sequence_end"].bool_param = True
        with grpc.insecure_channel(guarded.grpc) as channel:
            call = channel.unary_unary(RPC + "ModelInfer")
            call(request.SerializeToString(), metadata=[("authorization", mine["Authorization"])], timeout=10)
    assert n("s", others) == before + 1
    listed = [
        {s["stream"] for s in httpx.get(url + "/v1/streams", headers=h).json()["streams"]} for h in (mine, others)
    ]
    assert listed[0] >= {"\u00e9", "e\u0301"} and listed[1] == {"s"}


def test_without_a_token_there_is_nothing_to_see(guarded):
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic " + "ann" * 8}):
        for path in ("/v1/stats", "/v1/streams", "/v1/streams/s", "/metrics"):
            refused = httpx.get(guarded.url + path, headers=headers)
            assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
        for path in ("/v1/events", "/v2/models/recurrent/infer"):
            assert httpx.post(guarded.url + path, json={}, headers=headers).status_code == 401
        for path in ("/v1/stream", "/v1/stream/s"):
            with (
                pytest.raises(ConnectionClosed) as closed,
                connect(guarded.ws + path, additional_headers=headers) as ws,
            ):
                ws.recv()
            assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (4401, "a bearer token is needed")
        metadata = [(name.lower(), value) for name, value in headers.items()]
        with grpc.insecure_channel(guarded.grpc) as channel, pytest.raises(grpc.RpcError) as failed:
            call = channel.unary_unary(RPC + "ModelInfer")
            call(inference().SerializeToString(), metadata=metadata, timeout=10)
        assert failed.value.code() == grpc.StatusCode.UNAUTHENTICATED  # pyright: ignore[reportAttributeAccessIssue]


def test_figures_of_the_whole_server_are_for_operators(start):
    server = start('tokens = "tokens"')
    for name, streams in (("ann", 2), ("bob", 5)):
        many = [{"stream": f"{name}{i}", "x": [1, 1, 1]} for i in range(streams)]
        httpx.post(server.url + "/v1/events", json=many, headers=bearer(name))
    own = httpx.get(server.url + "/v1/stats", headers=bearer("ann")).json()
    assert own == {"name": "recurrent", "waiting": 0, "keys": {"cell": {"keys": 2}}}
    assert httpx.get(server.url + "/metrics", headers=bearer("ann")).status_code == 403
    whole = httpx.get(server.url + "/v1/stats", headers=bearer("root")).json()
    assert whole["keys"]["cell"]["keys"] == 7 and "events_per_s" in whole
    assert "anabranch_events_total 7.0" in httpx.get(server.url + "/metrics", headers=bearer("root")).text


@pytest.mark.parametrize("line", ["ann", "a/b " + "0" * 64, "ann " + "0" * 63, "ann " + "0" * 64 + " boss"])
def test_a_line_of_tokens_that_cannot_be_used_is_named(tmp_path, line):
    (tmp_path / "tokens").write_text("# tokens\n" + line)
    (tmp_path / "served.toml").write_text(CELL_FILE.format(cell="", serve='tokens = "tokens"'))
    with pytest.raises(ConfigError, match="tokens: line 2: expected TENANT SHA256"):
        Server(read_served(tmp_path / "served.toml"), tmp_path)


def test_an_error_of_the_server_tells_clients_nothing_of_it(start, caplog, monkeypatch):
    server = start()

    def fail(*_):
        raise RuntimeError("/secret/path")

    monkeypatch.setattr(server.server.live, "step", fail)
    answer = httpx.post(server.url + "/v1/events", json={"stream": "a", "x": [1, 1, 1]})
    assert answer.status_code == 503 and "secret" not in answer.text
    assert "/secret/path" in caplog.text
    caplog.clear()


# TLS


@pytest.fixture(scope="module")
def authority():
    return trustme.CA()


def pem(authority):
    made = authority.issue_cert("127.0.0.1", "localhost")
    return made.cert_chain_pems[0].bytes(), made.private_key_pem.bytes()


def test_everything_is_served_over_tls(start, authority):
    import ssl

    certificate, key = pem(authority)
    said = 'certificate = "server.pem"\nkey = "server.key"\ntokens = "tokens"'
    server = start(said, **{"server.pem": certificate, "server.key": key})
    trusts = ssl.create_default_context()
    authority.configure_trust(trusts)
    event = {"stream": "tls", "x": [1, 1, 1]}
    assert httpx.post(server.url + "/v1/events", json=event, headers=bearer("ann"), verify=trusts).json()["n"] == 1
    with connect(server.ws + "/v1/stream/tls", ssl=trusts, additional_headers=bearer("ann")) as ws:
        assert json.loads(ws.recv()) == {"seen": 1}
    credentials = grpc.ssl_channel_credentials(authority.cert_pem.bytes())
    request = inference()
    request.parameters["sequence_id"].string_param = "tls"
    with grpc.secure_channel(server.grpc, credentials) as channel:
        call = channel.unary_unary(RPC + "ModelInfer")
        metadata = [("authorization", bearer("ann")["Authorization"])]
        answer = call(request.SerializeToString(), metadata=metadata, timeout=10)
    assert pb.ModelInferResponse.FromString(answer).model_name == "recurrent"
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.get(server.url)
    with grpc.insecure_channel(server.grpc) as channel, pytest.raises(grpc.RpcError):
        channel.unary_unary(RPC + "ServerLive")(b"", timeout=2)


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ('certificate = "none.pem"\nkey = "server.key"', r"serve\.certificate: there is no file .*none\.pem"),
        ('certificate = "server.pem"', r"serve\.key: needed beside serve\.certificate"),
        ('key = "server.key"', r"serve\.certificate: needed beside serve\.key"),
        ('certificate = "server.pem"\nkey = "other.key"', r"serve\.certificate, serve\.key: .*mismatch"),
        ('certificate = "server.pem"\nkey = "tokens"', r"serve\.certificate, serve\.key: "),
    ],
)
def test_a_certificate_that_cannot_be_used_is_a_mistake_in_the_file(tmp_path, authority, said, error):
    certificate, key = pem(authority)
    files = {"server.pem": certificate, "server.key": key, "other.key": pem(authority)[1], "tokens": b"# none"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "served.toml").write_text(CELL_FILE.format(cell="", serve=said))
    with pytest.raises(ConfigError, match=error):
        Server(read_served(tmp_path / "served.toml"), tmp_path)
