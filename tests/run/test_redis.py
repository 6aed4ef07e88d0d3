"""Redis Streams: a run that is killed, and a Redis that is killed, change nothing in what is written."""

import json

import pyarrow as pa
import pytest

from anabranch.run.brokers import parse
from anabranch.run.config import ConfigError, read
from anabranch.run.pipeline import Pipeline
from anabranch.run.redis_streams import RedisSink

from . import servers

SOURCE = 'kind = "redis"\nurl = "{url}"\nstream = "{name}-in"\ngroup = "test"\nidle = {idle}'
SINK = 'format = "redis"\nurl = "{url}"\nstream = "{name}"'


@pytest.fixture(scope="module")
def redis(tmp_path_factory):
    server = servers.Redis(tmp_path_factory.mktemp("redis"))
    yield server
    server.kill()


def pipeline(folder, redis, name, idle=1.0):
    source, sink = SOURCE.format(url=redis.url, name=name, idle=idle), SINK.format(url=redis.url, name=name)
    return servers.write_pipeline(folder, name, source=source, sink=sink)


def sender(redis, name):
    def send(messages):
        with redis.client.pipeline() as pipe:
            for message in messages:
                pipe.xadd(f"{name}-in", {"data": message})
            pipe.execute()

    return send


def entries(redis, stream):
    found = redis.client.xrange(stream)
    assert [name.decode() for name, _ in found] == [f"{i + 1}-0" for i in range(len(found))]
    return [json.loads(fields[b"data"]) for _, fields in found]


def test_killed_runs_and_a_killed_server(tmp_path, redis):
    sent = servers.messages(700)
    predictions, outcomes, letters = servers.undisturbed(tmp_path, sent)
    path = pipeline(tmp_path, redis, "cards")

    def crash():
        redis.kill()
        redis.start()

    count = lambda: redis.client.xlen("cards:predictions")
    summary, said = servers.run_and_kill(path, tmp_path / "out", sent, sender(redis, "cards"), count, crash=crash)
    assert "trying again" in said
    servers.same(entries(redis, "cards:predictions"), predictions)
    servers.same(entries(redis, "cards:outcomes"), outcomes)
    assert servers.dead(tmp_path / "out") == letters and summary["dead_letters"] == len(letters)
    (group,) = redis.client.xinfo_groups("cards-in")
    assert group["lag"] == 0 and group["pending"] == 0


def test_sigterm_ends_a_run_that_can_be_resumed(tmp_path, redis):
    sent = servers.messages(240)
    predictions, outcomes, _ = servers.undisturbed(tmp_path, sent)
    path = pipeline(tmp_path, redis, "term")
    send, count = sender(redis, "term"), lambda: redis.client.xlen("term:predictions")
    send(sent[:100])
    endless = tmp_path / "endless.toml"
    endless.write_text(path.read_text().replace("idle = 1.0\n", ""))
    process = servers.start(endless, tmp_path / "out")
    # Checkpoints are made, and the group is told, also while the source waits.
    servers.wait_for(
        lambda: redis.client.xinfo_groups("term-in")[0]["lag"] == 0 or 1 / 0, (ZeroDivisionError, IndexError)
    )
    process.send_signal(servers.signal.SIGTERM)
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in errors
    first = json.loads(said)
    assert 50 < count() == first["events"] and first["labels"]["open"]
    send(sent[100:])
    made = Pipeline(read(path).model_copy(update={"out": tmp_path / "out"}), tmp_path)
    assert made.run(resume=True).events == len(predictions)
    servers.same(entries(redis, "term:predictions"), predictions)
    servers.same(entries(redis, "term:outcomes"), outcomes)


def test_limit_and_new_run(tmp_path, redis):
    sent = servers.messages(200)
    predictions, _, letters = servers.undisturbed(tmp_path, sent)
    path = pipeline(tmp_path, redis, "limit", idle=0.3)
    sender(redis, "limit")(sent)
    config = read(path).model_copy(update={"out": tmp_path / "out"})
    Pipeline(config, tmp_path).run()
    for limit in (70, 71, None):
        summary = Pipeline(config, tmp_path).run(resume=limit != 70, limit=limit)
        assert redis.client.xlen("limit:predictions") == summary.events
        (group,) = redis.client.xinfo_groups("limit-in")
        assert group["lag"] == len(sent) - (limit or len(sent))
    servers.same(entries(redis, "limit:predictions"), predictions)
    assert servers.dead(tmp_path / "out") == letters


def test_cut_back(redis):
    """What follows a position goes, and what is written then takes its ids; what is there already is not added."""
    table = lambda *rows: pa.table({"row": rows})
    sink = RedisSink(redis.url, "cut")
    sink.rewind(0)
    sink.write(table(0, 1, 2))
    saved = sink.position()
    sink.write(table(3, 4, 5, 6))
    sink = RedisSink(redis.url, "cut")
    sink.rewind(saved)
    assert [row["row"] for row in entries(redis, "cut")] == [0, 1, 2]
    sink.write(table(7, 8))
    sink._last = saved  # as after a connection that broke before the answer came
    sink.write(table(7, 8, 9))
    assert [row["row"] for row in entries(redis, "cut")] == [0, 1, 2, 7, 8, 9]


def test_a_lone_row_does_not_wait_for_a_full_batch(tmp_path, redis):
    """It has been answered while the source is still open."""
    path = pipeline(tmp_path, redis, "lone", idle=1.0)
    path.write_text(path.read_text().replace("lateness = 30", "lateness = 0"))
    made = Pipeline(read(path).model_copy(update={"out": tmp_path / "out"}), tmp_path)
    sizes, batch = [], made.batch

    def seen(rows):
        answer = batch(rows)
        sizes.append((rows.num_rows, redis.client.xlen("lone:predictions")))
        if len(sizes) == 1:
            sender(redis, "lone")([message.replace(b'"time": 1.0', b'"time": 2.0')])
        return answer

    made.batch = seen
    row = {"time": 1.0, "card": "a", "country": "NO", "amount": 3, "age": True, "fraud": None, "known": None}
    message = json.dumps(row).encode()
    sender(redis, "lone")([message])
    assert made.run().events == 2
    assert sizes == [(1, 1), (1, 2)]


@pytest.mark.parametrize(
    "old, new, said",
    [
        ('group = "test"\n', "", "source: a source of kind 'redis' needs a group"),
        ('group = "test"', 'group = "test"\npath = "cards.jsonl"', "source: a source of kind 'redis' has no path"),
        ('stream = "wrong-in"', 'topic = "wrong-in"', "source: a source of kind 'redis'"),
        ("idle = 1.0", "idle = 0", "source.idle"),
        ("idle = 1.0", "linger = -1", "source.linger"),
        ('stream = "wrong"', 'stream = "wrong"\ntable = "x"', "sink: a sink of format 'redis' has no table"),
        ('stream = "wrong"', "", "sink: a sink of format 'redis' needs a stream"),
    ],
)
def test_wrong_configurations(tmp_path, redis, old, new, said):
    path = pipeline(tmp_path, redis, "wrong")
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))
    with pytest.raises(ConfigError) as error:
        read(path)
    assert said in str(error.value)


def test_a_server_that_is_not_there(tmp_path, redis):
    path = pipeline(tmp_path, redis, "none")
    path.write_text(path.read_text().replace(redis.url, f"redis://me:secret@127.0.0.1:{servers.free_port()}/0"))
    with pytest.raises(ConfigError, match=r"sink\.url: there is no server at 127") as error:
        Pipeline(read(path).model_copy(update={"out": tmp_path / "out"}), tmp_path).run()
    assert "secret" not in str(error.value)


def test_messages_become_text():
    sent = [b'{"a": 1, "b": "x", "c": [1, null]}', b"3", b'{"a": "one", "b": true}', *servers.NO_ROWS]
    block = parse(sent, 10, ["time", "a"])
    assert block.table.to_pydict() == {
        "time": [None, None], "a": ["1", "one"], "b": ["x", "1"], "c": ["[1, null]", None]
    }  # fmt: skip
    assert block.rows.tolist() == [10, 12]
    assert [b.row for b in block.bad] == [11, *range(13, 13 + len(servers.NO_ROWS))]
    assert all(b.reason.startswith("not a JSON object: ") for b in block.bad)
