"""Real servers for tests, each on a free port with its data in a folder of its own, and runs that are killed."""

import ctypes
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from anabranch.run.config import read
from anabranch.run.pipeline import Pipeline

from .conftest import payments, write_payments

NO_ROWS = [b"no json", b"[1, 2]", b"", b"\xff\xfe", b'{"time": 1', b'{"time": "\\ud800"}', b"[" * 100_000]


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Redis:
    """A Redis that has written to disk whatever it has acknowledged."""

    def __init__(self, folder):
        self.folder, self.port = folder, free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._program = binaries("redis-server") / "redis-server"
        self.start()

    def start(self):
        import redis

        settings = f"--port {self.port} --dir {self.folder} --appendonly yes --appendfsync always --save"
        self.process = subprocess.Popen([self._program, *settings.split(), ""], stdout=subprocess.DEVNULL)
        self.client = redis.Redis.from_url(self.url)
        wait_for(self.client.ping, redis.ConnectionError)

    def kill(self):
        self.process.kill()
        self.process.wait()


class Postgres:
    """A PostgreSQL. It refuses to run as root, so that root runs it as the user whom its package makes."""

    def __init__(self):
        self.folder, self.port = Path(tempfile.mkdtemp(prefix="anabranch-postgres-")), free_port()
        self.url = f"postgresql://postgres@127.0.0.1:{self.port}/postgres"
        self._as = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
        if self._as:
            shutil.chown(self.folder, "postgres")
        self._programs = binaries("initdb")
        options = ["-D", self.folder / "data", "-A", "trust", "-U", "postgres", "--no-sync"]
        subprocess.run([*self._as, self._programs / "initdb", *options], check=True, stdout=subprocess.DEVNULL, cwd="/")
        self.start()

    def start(self):
        options = ["-D", self.folder / "data", "-p", str(self.port), "-k", self.folder, "-h", "127.0.0.1"]
        self.process = subprocess.Popen(
            [*self._as, self._programs / "postgres", *options], stderr=subprocess.DEVNULL, cwd="/"
        )
        import psycopg

        wait_for(lambda: psycopg.connect(self.url).close(), psycopg.OperationalError)

    def kill(self):
        """End it as a crash would: without a checkpoint of its own, so that it recovers from its log."""
        pid = int((self.folder / "data/postmaster.pid").read_text().split()[0])
        os.kill(pid, signal.SIGQUIT)
        self.process.wait()

    def remove(self):
        self.kill()
        shutil.rmtree(self.folder)


class Kafka:
    """librdkafka's mock cluster of one broker: a server of the real protocol on a real port, in this process.

    It knows idempotent producers, offsets of groups and watermarks; it keeps nothing on disk, and forgets old messages
    when a partition holds more than 5 MB. `away` closes its connections and refuses new ones.
    """

    def __init__(self):
        import confluent_kafka

        place = Path(confluent_kafka.__file__).parent.parent / "confluent_kafka.libs"
        self._lib = ctypes.CDLL(str(next(place.glob("librdkafka*"))))
        pointer = ctypes.c_void_p
        self._lib.rd_kafka_new.restype = self._lib.rd_kafka_mock_cluster_new.restype = pointer
        self._lib.rd_kafka_mock_cluster_bootstraps.restype = ctypes.c_char_p
        self._client = pointer(self._lib.rd_kafka_new(0, None, None, ctypes.c_size_t(0)))
        self._cluster = pointer(self._lib.rd_kafka_mock_cluster_new(self._client, 1))
        self.url = self._lib.rd_kafka_mock_cluster_bootstraps(self._cluster).decode()

    def topic(self, name, partitions):
        assert self._lib.rd_kafka_mock_topic_create(self._cluster, name.encode(), partitions, 1) == 0

    def away(self):
        assert self._lib.rd_kafka_mock_broker_set_down(self._cluster, 1) == 0

    def back(self):
        assert self._lib.rd_kafka_mock_broker_set_up(self._cluster, 1) == 0

    def remove(self):
        self._lib.rd_kafka_mock_cluster_destroy(self._cluster)
        self._lib.rd_kafka_destroy(self._client)


def binaries(program):
    """The folder of a server's programs; the test is skipped where it is not installed."""
    places = [Path(p) for p in os.environ["PATH"].split(os.pathsep)] + sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    for place in places:
        if (place / program).exists():
            return place
    pytest.skip(f"{program} is not installed; scripts/servers does that")


def wait_for(ready, errors, seconds=30):
    """Try until it works."""
    end = time.monotonic() + seconds
    while True:
        try:
            return ready()
        except errors:
            if time.monotonic() > end:
                raise
            time.sleep(0.02)


def messages(n, seed=3):
    """A stream of payments as JSON, with rows that cannot be used, and messages that are no rows, among them."""
    found = [json.dumps(row).encode() for row in payments(n, seed)]
    for i, message in enumerate(NO_ROWS):
        found.insert((i + 1) * n // (len(NO_ROWS) + 1), message)
    return found


def write_pipeline(folder, name, *, source, sink):
    """The pipeline of `write_payments` with another source and sink; returns its file."""
    path = write_payments(folder, [], batch=32, every=60, seconds="seconds = 0.3")
    text = path.read_text().replace('kind = "jsonl"\npath = "cards.jsonl"', source)
    path = folder / f"{name}.toml"
    path.write_text(text.replace('format = "parquet"', sink))
    return path


def undisturbed(folder, sent):
    """Predictions, outcomes and rows of dead letters of a run over the same messages from a file."""
    lines = [m.replace(b"\n", b" ") or b"empty" for m in sent]
    path = write_payments(folder, [], batch=50, every=100_000)
    (folder / "cards.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    pipeline = Pipeline(read(path).model_copy(update={"out": folder / "calm"}), folder)
    pipeline.run()
    tables = [pq.read_table(folder / "calm" / name).to_pylist() for name in ("predictions", "outcomes")]
    return *tables, dead(folder / "calm")


def dead(out):
    """The rows of the dead letters, in order."""
    return sorted(json.loads(line)["row"] for line in (out / "dead_letters.jsonl").read_text().splitlines())


def start(path, out):
    command = [sys.executable, "-m", "anabranch.cli", "run", str(path), "--resume", "--out", str(out), "--json"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run_and_kill(path, out, sent, send, count, *, kills=3, crash=None):
    """Send messages while runs are killed and resumed; the last run goes on until the stream is idle.

    Arguments:
        send: puts messages into the source.
        count: how many rows the sink holds.
        crash: kills the server and starts it again; called once, while the last run writes.
    """
    chance = random.Random(11)
    left = list(sent)

    def until(process, rows):
        while (there := count()) < rows:
            assert process.poll() is None, process.communicate()[1]
            if len(sent) - len(left) < there + 80:  # not while the process is still starting
                send(left[:3])
                del left[:3]
            time.sleep(0.01)

    for _ in range(kills):
        process = start(path, out)
        until(process, count() + chance.randint(1, 90))
        process.kill()
        process.communicate()
    assert left, "the stream must be long enough for every kill to hit it"
    process = start(path, out)
    if crash is not None:
        until(process, count() + 20)
        crash()
    send(left)
    said, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return json.loads(said), errors


def same(found, expected):
    """Whether two lists of rows are equal; numbers up to the rounding that another cut into batches may bring."""
    assert [r["row"] for r in found] == [r["row"] for r in expected]
    for name in expected[0]:
        mine, theirs = [r[name] for r in found], [r[name] for r in expected]
        if isinstance(theirs[0], float):
            np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)
        else:
            assert mine == theirs
