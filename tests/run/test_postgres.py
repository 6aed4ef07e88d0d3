"""PostgreSQL: a run that is killed, and a server that crashes, change nothing in what is written."""

import psycopg
import pyarrow as pa
import pytest
from psycopg.rows import dict_row

from anabranch.run.config import ConfigError, read
from anabranch.run.pipeline import Pipeline
from anabranch.run.postgres import PostgresSink

from . import servers
from .test_redis import SOURCE, sender

SINK = 'format = "postgres"\nurl = "{url}"\ntable = "{name}"'


@pytest.fixture(scope="module")
def redis(tmp_path_factory):
    server = servers.Redis(tmp_path_factory.mktemp("redis"))
    yield server
    server.kill()


@pytest.fixture(scope="module")
def postgres():
    server = servers.Postgres()
    yield server
    server.remove()


def rows(postgres, table):
    with psycopg.connect(postgres.url, row_factory=dict_row) as db:
        if db.execute("SELECT to_regclass(%s) AS found", (table,)).fetchone()["found"] is None:
            return []
        return db.execute(f"SELECT * FROM {table} ORDER BY seq").fetchall()


def test_killed_runs_and_a_crashed_server(tmp_path, redis, postgres):
    sent = servers.messages(500)
    predictions, outcomes, letters = servers.undisturbed(tmp_path, sent)
    source = SOURCE.format(url=redis.url, name="shop", idle=1.0)
    path = servers.write_pipeline(tmp_path, "shop", source=source, sink=SINK.format(url=postgres.url, name="shop"))

    def crash():
        postgres.kill()
        postgres.start()

    count = lambda: len(rows(postgres, "shop_predictions"))
    summary, said = servers.run_and_kill(
        path, tmp_path / "out", sent, sender(redis, "shop"), count, kills=2, crash=crash
    )
    assert "trying again" in said
    for table, expected in (("shop_predictions", predictions), ("shop_outcomes", outcomes)):
        found = rows(postgres, table)
        assert [row["seq"] for row in found] == list(range(1, len(found) + 1))
        servers.same(found, expected)
    assert servers.dead(tmp_path / "out") == letters and summary["dead_letters"] == len(letters)


def test_a_new_run_replaces_the_rows(tmp_path, postgres):
    sent = servers.messages(200)
    source, sink = 'kind = "jsonl"\npath = "cards.jsonl"', SINK.format(url=postgres.url, name="again")
    path = servers.write_pipeline(tmp_path, "again", source=source, sink=sink)
    predictions, outcomes, _ = servers.undisturbed(tmp_path, sent)
    config = read(path)
    for limit in (None, 100, None):
        made = Pipeline(config.model_copy(update={"out": tmp_path / "out"}), tmp_path)
        summary = made.run(limit=limit)
        assert len(rows(postgres, "again_predictions")) == summary.events
    servers.same(rows(postgres, "again_predictions"), predictions)
    servers.same(rows(postgres, "again_outcomes"), outcomes)


def test_cut_back(postgres):
    """What follows a position goes; what is there already, and what PostgreSQL cannot hold, does no harm."""
    table = lambda *rows: pa.table({"row": rows, "name": ["a\0b"] * len(rows), "good": [True] * len(rows)})
    sink = PostgresSink(postgres.url, "Cut back")
    sink.rewind(0)
    sink.write(table(0, 1, 2))
    saved = sink.position()
    sink.write(table(3, 4, 5, 6))
    sink.close()
    sink = PostgresSink(postgres.url, "Cut back")
    sink.rewind(saved)
    sink.write(table(7, 8))
    sink._last = saved  # as after a connection that broke before the answer came
    sink.write(table(7, 8, 9))
    found = rows(postgres, '"Cut back"')
    assert [row["row"] for row in found] == [0, 1, 2, 7, 8, 9] and found[0]["name"] == "a\ufffdb" and found[0]["good"]


def test_a_server_that_is_not_there(tmp_path):
    url = f"postgresql://me:secret@127.0.0.1:{servers.free_port()}/shop"
    source, sink = 'kind = "jsonl"\npath = "cards.jsonl"', SINK.format(url=url, name="none")
    config = read(servers.write_pipeline(tmp_path, "none", source=source, sink=sink))
    with pytest.raises(ConfigError, match=r"sink\.url: there is no server at 127") as error:
        Pipeline(config.model_copy(update={"out": tmp_path / "out"}), tmp_path).run()
    assert "secret" not in str(error.value)
