"""The machine's telemetry: real readings of this machine, and counters and clocks that misbehave."""

import itertools
import json
import math
import socket
import sys
import threading
import time
from pathlib import Path

import pytest

from anabranch.run.config import read
from anabranch.run.machine import Rates, telemetry
from anabranch.run.pipeline import Pipeline

EXAMPLE = Path(__file__).parents[2] / "examples" / "this_machine.toml"


@pytest.fixture
def psutil():
    return pytest.importorskip("psutil")


def rows(table):
    return dict(zip(table["metric"].to_pylist(), table["value"].to_pylist()))


def test_a_table_a_tick_with_a_row_a_metric(psutil):
    tables = list(itertools.islice(telemetry(0.05), 4))
    times = [table["time"].to_pylist() for table in tables]
    assert all(len(set(at)) == 1 for at in times)  # one time a tick
    assert all(a[0] < b[0] for a, b in itertools.pairwise(times))
    for table in tables:
        found = rows(table)
        assert len(found) == table.num_rows and all(math.isfinite(value) for value in found.values())
        assert 0 <= found["cpu"] <= 100 and 0 < found["memory"] <= 100 and found["processes"] >= 1
        cores = [value for name, value in found.items() if name.startswith("cpu.")]
        assert len(cores) == psutil.cpu_count() and found["cpu"] == pytest.approx(sum(cores) / len(cores))


def test_what_is_sent_is_seen(psutil):
    """Five megabytes through this machine's loopback."""
    if psutil.net_io_counters() is None:
        pytest.skip("this machine counts no bytes of its network")
    ticks = telemetry(0.05)
    first = next(ticks)
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=_drain, args=(server,))
        thread.start()
        with socket.create_connection(server.getsockname()) as client:
            client.sendall(bytes(5_000_000))
        thread.join()
    second = next(ticks)
    elapsed = second["time"][0].as_py() - first["time"][0].as_py()
    assert rows(second)["net.sent"] * elapsed >= 4_900_000
    assert rows(second)["net.received"] * elapsed >= 4_900_000


def _drain(server):
    with server.accept()[0] as connection:
        while connection.recv(1 << 20):
            pass


def test_time_grows_though_the_wall_clock_is_set_back(psutil, monkeypatch):
    ticks = telemetry(0.02)
    first = next(ticks)["time"][0].as_py()
    assert abs(first - time.time()) < 60
    monkeypatch.setattr(time, "time", lambda: 0.0)
    second = next(ticks)["time"][0].as_py()
    assert first < second < first + 60


def test_a_tick_that_was_missed_is_left_out(psutil):
    """Who comes late gets the next tick, not all that were missed."""
    ticks = telemetry(0.05)
    next(ticks)
    time.sleep(0.3)
    late, after = (table["time"][0].as_py() for table in itertools.islice(ticks, 2))
    assert after - late >= 0.04


def test_counters_that_fall_have_no_rate():
    rates = Rates()
    assert rates(0.0, {"a": 100, "b": 2**32 - 10}) == {}
    assert rates(2.0, {"a": 300, "b": 5}) == {"a": 100.0}  # b has wrapped
    assert rates(3.0, {"a": 300, "b": 10, "c": 7}) == {"a": 0.0, "b": 5.0}  # c is new
    assert rates(3.0, {"a": 400}) == {}  # no time has passed
    assert rates(5.0, {"a": 500, "b": 20}) == {"a": 50.0, "b": 5.0}


def test_what_the_machine_does_not_tell_is_left_out_and_logged_once(psutil, monkeypatch, caplog):
    def refused():
        raise PermissionError("not for you")

    monkeypatch.setattr(psutil, "disk_io_counters", refused)
    monkeypatch.setattr(psutil, "net_io_counters", lambda: None)
    found = [rows(table) for table in itertools.islice(telemetry(0.02), 2)]
    assert all("cpu" in tick and not any(name.startswith(("disk", "net")) for name in tick) for tick in found)
    assert [record.message for record in caplog.records] == ["this machine does not tell its disks: not for you"]


def test_bad_settings_are_named(psutil, monkeypatch):
    with pytest.raises(ValueError, match=r"every.*0"):
        telemetry(0)
    with pytest.raises(ValueError, match=r"every.*inf"):
        telemetry(math.inf)
    monkeypatch.setitem(sys.modules, "psutil", None)
    with pytest.raises(ImportError, match=r"anabranch\[machine\]"):
        telemetry()


def test_the_example_watches_this_machine(psutil, tmp_path):
    config = read(EXAMPLE).model_copy(update={"out": tmp_path})
    summary = Pipeline(config, EXAMPLE.parent, source=telemetry(0.02)).run(limit=200)
    assert summary.events == 200 and summary.dead_letters == 0
    found = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert len(found) == 200 and summary.keys["anomaly"] == len({row["metric"] for row in found})
    assert all(0 <= row["score"] <= 1 and isinstance(row["alarm"], bool) for row in found)
    assert {"row", "time", "metric", "value", "score", "alarm"} == set(found[0])
