"""What cannot be written stops a served pipeline for as long as it lasts, and loses nothing."""

import threading

import pyarrow.parquet as pq
import pytest

from anabranch import state
from anabranch.run.config import read
from anabranch.run.live import Live, NotTaken, Stuck
from anabranch.run.pipeline import Pipeline
from anabranch.run.served_pipeline import ServedPipeline
from anabranch.run.sink import ParquetSink

from .conftest import write_payments

FULL = OSError(28, "No space left on device")


@pytest.fixture(scope="module")
def batches(rows):
    ordered = sorted((row for row in rows[:400] if isinstance(row.get("time"), float)), key=lambda row: row["time"])
    return [ordered[i : i + 20] for i in range(0, len(ordered) - 20, 20)]


@pytest.fixture(scope="module")
def calm(batches, tmp_path_factory):
    """The answers if nothing happens."""
    folder = tmp_path_factory.mktemp("calm")
    live = served(folder)
    live.start()
    answers = [live.step(batch) for batch in batches]
    live.close()
    return answers


def served(folder, every=1e9):
    file = write_payments(folder, [], sink="parquet")
    config = read(file)
    pipeline = ServedPipeline(config.model_copy(update={"out": folder / "out"}), folder)
    return Live(pipeline, folder / "journal", every=every)


def written(folder):
    return pq.read_table(folder / "out/live/predictions").to_pylist()


def good(answers):
    return [answer for answer in answers if "error" not in answer]


def test_an_output_that_cannot_be_written_once(batches, calm, tmp_path, monkeypatch):
    live, write, broken = served(tmp_path), ParquetSink.write, [False]

    def fails(self, table):
        if broken:
            broken.pop()
            raise FULL
        write(self, table)

    live.start()
    answers = [live.step(batch) for batch in batches[:5]]
    live.save()
    answers += [live.step(batch) for batch in batches[5:8]]
    monkeypatch.setattr(ParquetSink, "write", fails)
    answers += [live.step(batch) for batch in batches[8:]]
    assert not broken and answers == calm
    live.close()
    assert written(tmp_path) == [answer for answers in calm for answer in good(answers)]


def test_an_output_that_cannot_be_written_for_a_while(batches, calm, tmp_path, monkeypatch):
    live, write, now = served(tmp_path), ParquetSink.write, [0.0]
    monkeypatch.setattr("anabranch.run.live.time.monotonic", lambda: now[0])

    def fails(self, table):
        raise FULL

    live.start()
    answers = [live.step(batch) for batch in batches[:3]]
    now[0] = 10.0
    monkeypatch.setattr(ParquetSink, "write", fails)
    with pytest.raises(Stuck, match=r"is kept: .*No space"):
        live.step(batches[3])
    for now[0] in (10.5, 12.0):
        assert live.stuck
        with pytest.raises(NotTaken):
            live.step(batches[4])
    monkeypatch.setattr(ParquetSink, "write", write)
    now[0] = 20.0
    answers += [calm[3], *(live.step(batch) for batch in batches[4:])]  # the one that was stuck has counted, once
    assert not live.stuck and answers == calm
    live.close()
    assert written(tmp_path) == [answer for answers in calm for answer in good(answers)]


def test_a_checkpoint_that_cannot_be_written_is_made_up_for(batches, calm, tmp_path, monkeypatch):
    live, save = served(tmp_path, every=0.0), state.save  # a checkpoint after every batch
    live.start()
    answers = []
    for i, batch in enumerate(batches):
        if i == 4:
            monkeypatch.setattr(state, "save", lambda *args: (_ for _ in ()).throw(FULL))
        if i == 10:
            monkeypatch.setattr(state, "save", save)
        if i == 13:  # and now a crash
            live.abandon()
            live = served(tmp_path)
            assert live.start() <= 1
        answers.append(live.step(batch))
        if i == 9:
            assert 5 <= live.failures <= 6 and not live.stuck
    assert answers == calm
    live.close()
    assert written(tmp_path) == [answer for answers in calm for answer in good(answers)]


def test_the_journal_reaches_back_to_the_first_checkpoint_that_is_kept(batches, calm, tmp_path):
    live = served(tmp_path)
    live.start()
    for batch in batches[:8]:
        live.step(batch)
        live.save()
    live.abandon()
    files = sorted((tmp_path / "out/live/checkpoints").glob("*.safetensors"))
    for path in files[-2:]:  # two of the three are damaged
        path.write_bytes(b"no checkpoint")
    live = served(tmp_path)
    assert live.start() == 2
    assert live.step(batches[8]) == calm[8]
    live.close()


def test_a_checkpoint_counts_what_had_counted_when_it_was_begun(batches, tmp_path, monkeypatch):
    live, save, go = served(tmp_path), state.save, threading.Event()

    def slow(*args):
        go.wait(10)
        save(*args)

    live.start()
    live.step(batches[0])
    before = dict(live.served.pipeline.counts)  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setattr(state, "save", slow)
    live.save()
    live.step(batches[1])  # while the checkpoint is being written
    go.set()
    live.abandon()
    again = ServedPipeline(read(tmp_path / "cards.toml").model_copy(update={"out": tmp_path / "out"}), tmp_path)
    assert again.open() == 1
    assert again.pipeline.counts == before
    again.abandon()


def test_events_that_cannot_be_stepped_are_not_taken(batches, calm, tmp_path, monkeypatch):
    live, score = served(tmp_path), Pipeline.batch

    def fails(self, rows):
        if "poison" in rows["card"].to_pylist():
            raise RuntimeError("no such card")
        return score(self, rows)

    monkeypatch.setattr(Pipeline, "batch", fails)
    live.start()
    answers = [live.step(batch) for batch in batches[:4]]
    with pytest.raises(NotTaken, match="cannot be stepped: no such card"):
        live.step([{**batches[4][0], "card": "poison"}, *batches[4][1:]])
    answers += [live.step(batch) for batch in batches[4:9]]
    live.abandon()  # a crash: what was not taken does not come back
    live = served(tmp_path)
    live.start()
    answers += [live.step(batch) for batch in batches[9:]]
    assert answers == calm
    live.close()


def test_a_time_that_has_not_come_is_refused(tmp_path):
    live = served(tmp_path)
    with pytest.raises(ValueError, match=r"time: '9999-01-01T00:00:00Z' is ahead of the server's clock"):
        live.served.own(None, {"time": "9999-01-01T00:00:00Z", "card": "a"})  # pyright: ignore[reportAttributeAccessIssue]
