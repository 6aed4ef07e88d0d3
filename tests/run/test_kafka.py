"""Kafka, spoken to librdkafka's own mock cluster (`servers.Kafka`): the protocol and the connections are real, the
broker is not one that anybody would run. What depends on a real broker's disk is not tested here."""

import json

import confluent_kafka
import pytest

from anabranch.run.config import ConfigError, read
from anabranch.run.kafka import KafkaSink, KafkaSource
from anabranch.run.pipeline import Pipeline

from . import servers

SOURCE = 'kind = "kafka"\nurl = "{url}"\ntopic = "{name}-in"\ngroup = "{name}"\nidle = 1.0'
SINK = 'format = "kafka"\nurl = "{url}"\ntopic = "{name}"'


@pytest.fixture(scope="module")
def kafka():
    server = servers.Kafka()
    yield server
    server.remove()


class Topics:
    """The topics of a test: it fills the one and counts the others, as any other client would."""

    def __init__(self, kafka, name, partitions=1):
        self.kafka, self.name, self.partitions = kafka, name, partitions
        for topic, count in ((f"{name}-in", partitions), (f"{name}.predictions", 3), (f"{name}.outcomes", 1)):
            kafka.topic(topic, count)
        self.producer = confluent_kafka.Producer({"bootstrap.servers": kafka.url})
        self.consumer = confluent_kafka.Consumer({"bootstrap.servers": kafka.url, "group.id": name})

    def send(self, messages):
        for i, message in enumerate(messages):  # left to itself, the producer may send nearly all to one partition
            self.producer.produce(f"{self.name}-in", message, partition=i % self.partitions)
        self.producer.flush()

    def ends(self, topic, partitions):
        at = [confluent_kafka.TopicPartition(f"{self.name}{topic}", p) for p in range(partitions)]
        return [self.consumer.get_watermark_offsets(p, timeout=10)[1] for p in at]

    def count(self):
        return sum(self.ends(".predictions", 3))

    def rows(self, topic, partitions):
        """What the topic holds, a list for each partition."""
        ends, found = self.ends(topic, partitions), [[] for _ in range(partitions)]
        self.consumer.assign([confluent_kafka.TopicPartition(f"{self.name}{topic}", p, 0) for p in range(partitions)])
        while sum(map(len, found)) < sum(ends):
            for message in self.consumer.consume(1000, 1.0):
                assert message.error() is None
                found[message.partition()].append(json.loads(message.value()))
        return found


def test_killed_runs_and_a_lost_cluster(tmp_path, kafka):
    sent = servers.messages(500)
    predictions, outcomes, letters = servers.undisturbed(tmp_path, sent)
    source, sink = SOURCE.format(url=kafka.url, name="cards"), SINK.format(url=kafka.url, name="cards")
    path = servers.write_pipeline(tmp_path, "cards", source=source, sink=sink)
    topics = Topics(kafka, "cards")

    def crash():
        kafka.away()
        servers.time.sleep(1.5)
        kafka.back()

    summary, said = servers.run_and_kill(path, tmp_path / "out", sent, topics.send, topics.count, kills=2, crash=crash)
    assert "refused" in said
    parts = topics.rows(".predictions", 3)
    assert all(times == sorted(times) for times in ([row["time"] for row in part] for part in parts))
    order = {row["row"]: i for i, row in enumerate(predictions)}
    servers.same(sorted((row for part in parts for row in part), key=lambda row: order[row["row"]]), predictions)
    servers.same(topics.rows(".outcomes", 1)[0], outcomes)
    assert servers.dead(tmp_path / "out") == letters and summary["dead_letters"] == len(letters)
    (committed,) = confluent_kafka.Consumer({"bootstrap.servers": kafka.url, "group.id": "cards"}).committed(
        [confluent_kafka.TopicPartition("cards-in", 0)], timeout=10
    )
    assert committed.offset == len(sent)


def test_several_partitions(tmp_path, kafka):
    sent = [json.dumps(row).encode() for row in servers.payments(300, 5)]
    topics = Topics(kafka, "many", partitions=3)
    topics.send(sent)
    assert all(topics.ends("-in", 3))
    source = SOURCE.format(url=kafka.url, name="many")
    path = servers.write_pipeline(tmp_path, "many", source=source, sink='format = "jsonl"')
    path.write_text(path.read_text().replace("lateness = 30", "lateness = 100000"))
    config = read(path).model_copy(update={"out": tmp_path / "out"})
    first = Pipeline(config, tmp_path).run(limit=100)
    assert first.dead_letters + first.events <= 100
    summary = Pipeline(config, tmp_path).run(resume=True)
    assert summary.events + summary.dead_letters == len(sent)
    lines = (tmp_path / "out/predictions.jsonl").read_text().splitlines()
    assert len({json.loads(line)["row"] for line in lines}) == summary.events

    sink = SINK.format(url=kafka.url, name="many")
    config = read(servers.write_pipeline(tmp_path, "refused", source=source, sink=sink))
    with pytest.raises(ConfigError, match=r"sink\.format.*one partition"):
        Pipeline(config.model_copy(update={"out": tmp_path / "refused"}), tmp_path).run()


def test_rows_that_a_topic_holds_are_not_written_again(kafka):
    """Also when a run that was resumed is killed before it has come to all of them."""
    import pyarrow as pa

    kafka.topic("held", 2)
    table = lambda first, end: pa.table({"row": list(range(first, end))})
    sink = KafkaSink(kafka.url, "held")
    sink.rewind(0)
    sink.write(table(0, 3))
    saved = sink.position()
    sink.write(table(3, 9))
    sink.position()
    for first, end in ((3, 5), (5, 6), (6, 12)):
        sink = KafkaSink(kafka.url, "held")
        sink.rewind(saved)
        sink.write(table(first, end))
        saved = sink.position()
        assert saved["held"] == [str(row) for row in range(end, 9)]
    assert sum(saved["ends"].values()) == 12


def test_a_topic_that_is_not_there(kafka, monkeypatch):
    monkeypatch.setattr("anabranch.run.kafka._WAIT", 0.3)
    with pytest.raises(ConfigError, match=r"source\.topic: there is no topic 'nothing'"):
        KafkaSource(kafka.url, "nothing", "test")


def test_a_cluster_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr("anabranch.run.kafka._WAIT", 0.3)
    source = SOURCE.format(url=f"127.0.0.1:{servers.free_port()}", name="none")
    config = read(servers.write_pipeline(tmp_path, "none", source=source, sink='format = "jsonl"'))
    with pytest.raises(ConfigError, match=r"source\.url: there is no server at 127"):
        Pipeline(config.model_copy(update={"out": tmp_path / "out"}), tmp_path).run()
