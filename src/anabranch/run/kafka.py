"""Kafka: a source that follows a topic, and a sink that writes to one."""

import json
import time
from functools import partial
from typing import Any

import pyarrow as pa

from anabranch.run.brokers import log, persist, unreachable
from anabranch.run.config import ConfigError

_WAIT = 10.0  # seconds that a cluster may take to answer what is asked when a run begins


def _library() -> Any:
    try:
        import confluent_kafka
    except ImportError as error:
        raise ImportError("a kafka source or sink needs a library: pip install 'anabranch[kafka]'") from error
    return confluent_kafka


def _partitions(client: Any, topic: str, url: str, where: str) -> list[int]:
    """The numbers of a topic's partitions. A cluster that makes topics when they are asked for is given the time."""
    kafka, end = _library(), time.monotonic() + _WAIT
    while True:
        try:
            found = client.list_topics(topic, timeout=_WAIT).topics[topic]
        except kafka.KafkaException as error:
            raise unreachable(where, url, error) from None
        if found.partitions:
            return sorted(found.partitions)
        if time.monotonic() > end:
            raise ConfigError(f"{where}.topic: there is no topic {topic!r} at {url}: {found.error}")
        time.sleep(0.1)


class KafkaSource:
    """The messages of a topic; each is a JSON object.

    All partitions are read by this process, each from the offset that the last checkpoint holds. The group's committed
    offsets follow durable checkpoints, so that its lag is what is not yet safely used; nothing is read by them.
    Messages of one partition keep their order. Between partitions there is none, so that a topic with several may be
    read in another order after a resume. Partitions that are added are read from the next run on.

    Arguments:
        url: servers, such as `localhost:9092` or several with commas.
        topic: its name.
        group: under which offsets are committed.

    Raises:
        ConfigError: if there is no server, or it has no such topic.
    """

    def __init__(self, url: str, topic: str, group: str):
        self._kafka = _library()
        self.errors = (self._kafka.KafkaException,)
        self._down: Any = None
        self._topic = topic
        self._client = self._kafka.Consumer({
            "bootstrap.servers": url, "group.id": group, "enable.auto.commit": False, "auto.offset.reset": "error",
            "error_cb": self._failed, "log_level": 2, "reconnect.backoff.max.ms": 2000,
        })  # fmt: skip
        partitions = _partitions(self._client, topic, url, "source")
        self.ordered = len(partitions) == 1
        self._offsets = {partition: self._kafka.OFFSET_BEGINNING for partition in partitions}
        self._assigned = False

    def _failed(self, error: Any) -> None:
        if error.code() in (self._kafka.KafkaError._ALL_BROKERS_DOWN, self._kafka.KafkaError._TRANSPORT):
            self._down = error

    def read(self, most: int, wait: float) -> list[bytes]:
        if not self._assigned:  # only once: what an earlier assignment is still fetching might come later
            at = [self._kafka.TopicPartition(self._topic, p, offset) for p, offset in self._offsets.items()]
            self._client.assign(at)
            self._assigned = True
        found = []
        for message in self._client.consume(most, wait):
            error = message.error()
            if error is None:
                self._offsets[message.partition()] = message.offset() + 1
                found.append(message.value() or b"")
            elif error.code() == self._kafka.KafkaError._AUTO_OFFSET_RESET:
                raise RuntimeError(f"source.topic: {self._topic} no longer holds what should be read next: {error}")
        if found:
            self._down = None
        elif self._down is not None:
            self._client.list_topics(self._topic, timeout=1.0)  # raises as long as no server is there
            self._down = None
        return found

    def position(self) -> dict[str, int]:
        return {str(partition): offset for partition, offset in self._offsets.items()}

    def seek(self, position: dict[str, int]) -> None:
        self._offsets |= {int(partition): offset for partition, offset in position.items()}
        self._assigned = False

    def commit(self, position: dict[str, int]) -> None:
        at = [self._kafka.TopicPartition(self._topic, int(p), offset) for p, offset in position.items() if offset >= 0]
        if at:
            self._client.commit(offsets=at, asynchronous=False)

    def close(self) -> None:
        self._client.close()


class KafkaSink:
    """A topic of rows: each is a JSON object, with its row number as the message's key.

    A topic cannot be cut back. Instead, what it holds beyond the position of the checkpoint is read when a run is
    resumed, and rows that are there already are not written again. (A position is where each partition ends, and which
    rows are held beyond what has been asked for.) The producer is idempotent: within a run nothing is
    written twice, and the order is kept, whatever happens to connections.

    Arguments:
        url: servers, such as `localhost:9092` or several with commas.
        topic: its name. Nothing else may write to it.

    Raises:
        ConfigError: if there is no server, or it has no such topic and makes none.
    """

    def __init__(self, url: str, topic: str):
        self._kafka = _library()
        self._topic = topic
        self._held: set[bytes] = set()
        self._error: Any = None
        self._producer = self._kafka.Producer({
            "bootstrap.servers": url, "enable.idempotence": True, "message.timeout.ms": 0, "linger.ms": 5,
            "error_cb": self._failed, "log_level": 2, "reconnect.backoff.max.ms": 2000,
        })  # fmt: skip
        self._partitions = _partitions(self._producer, topic, url, "sink")
        self._reader = self._kafka.Consumer({
            "bootstrap.servers": url, "group.id": "anabranch", "enable.auto.commit": False,
            "auto.offset.reset": "error", "log_level": 2,
        })  # fmt: skip

    def _failed(self, error: Any) -> None:
        if error.fatal():
            self._error = error
        else:
            log.warning("sink: %s", error.str())

    def _delivered(self, error: Any, message: Any) -> None:
        if error is not None:
            self._error = error

    def _check(self) -> None:
        if self._error is not None:
            raise RuntimeError(f"sink.topic: {self._topic} does not take a row: {self._error}")

    def write(self, table: pa.Table) -> None:
        for row in table.to_pylist():
            key = str(row["row"]).encode()
            if key in self._held:
                self._held.remove(key)
                continue
            value = json.dumps(row, default=str).encode()
            while True:
                try:
                    self._producer.produce(self._topic, value, key, on_delivery=self._delivered)
                    break
                except BufferError:  # full: wait until the servers have taken some
                    self._producer.poll(0.1)
                    self._check()
        self._producer.poll(0)
        self._check()

    def position(self) -> dict[str, Any]:
        while self._producer.flush(1.0):
            self._check()
        self._check()
        return {"ends": self._ends(), "held": sorted(key.decode() for key in self._held)}

    def _ends(self) -> dict[str, int]:
        """The offset after the last message of each partition."""
        ends = {}
        for partition in self._partitions:
            at = self._kafka.TopicPartition(self._topic, partition)
            ask = partial(self._reader.get_watermark_offsets, at, timeout=_WAIT)
            found = persist(ask, (self._kafka.KafkaException,))
            assert found is not None
            ends[str(partition)] = found[1]
        return ends

    def rewind(self, position: Any) -> None:
        """Find out which rows after a position the topic holds. Position 0 is wherever a new run finds its end."""
        self._held = set()
        if position == 0:
            return
        self._held |= {key.encode() for key in position["held"]}
        start, ends = position["ends"], self._ends()
        left = {int(p): ends[p] for p in start if start[p] < ends[p]}
        self._reader.assign([self._kafka.TopicPartition(self._topic, p, start[str(p)]) for p in left])
        while left:
            for message in self._reader.consume(1000, 1.0):
                if message.error() is not None:
                    raise RuntimeError(f"sink.topic: {self._topic} cannot be read: {message.error()}")
                self._held.add(message.key())
                if message.offset() + 1 >= left.get(message.partition(), 0):
                    left.pop(message.partition(), None)
        self._reader.unassign()

    def close(self) -> None:
        self.position()
        self._reader.close()

    def abandon(self) -> None:
        self._producer.purge()
        self._reader.close()
