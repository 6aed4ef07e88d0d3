"""Pipelines: what they compute, what they refuse, and that they end in the same place however they got there."""

import json
import sqlite3
import time

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from anabranch.run.checkpoint import Checkpoints
from anabranch.run.config import ConfigError, read
from anabranch.run.pipeline import Pipeline

from .conftest import BAD, payments, write_payments

BAD_REASONS = [
    "amount: 'a lot' is not a finite number", "amount: empty", "card: empty, and it is a key",
    "time: 'yesterday' is not a finite number", "fraud: 2 is not 0 or 1", "amount: 'inf' is not a finite number",
    "time: empty", "late: its time is",
]  # fmt: skip


def make(path, out, **changes):
    config = read(path)
    return Pipeline(config.model_copy(update={"out": out, **changes}), path.parent)


def outputs(out, name, format="parquet"):
    if format == "parquet":
        table = pq.read_table(out / name)
    elif format == "csv":
        table = pyarrow.csv.read_csv(out / f"{name}.csv")
    elif format == "jsonl":
        table = pa.Table.from_pylist([json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()])
    else:
        with sqlite3.connect(out / f"{name}.sqlite") as db:
            cursor = db.execute(f"SELECT * FROM {name} ORDER BY rowid")
            table = pa.Table.from_pylist([dict(zip([c[0] for c in cursor.description], r)) for r in cursor])
    return table


@pytest.fixture(scope="module")
def whole(tmp_path_factory, rows):
    """An undisturbed run."""
    folder = tmp_path_factory.mktemp("whole")
    path = write_payments(folder, rows)
    pipeline = make(path, folder / "out")
    return path, pipeline, pipeline.run()


def test_figures(whole, rows):
    _, pipeline, summary = whole
    assert summary.events == len(rows) - BAD and summary.dead_letters == BAD
    assert summary.keys["card"] == len({r["card"] for r in rows} - {None}) and summary.keys["model"] == 2
    labels = summary.labels
    assert labels["learned"] + labels["expired"] + labels["open"] + labels["dropped"] == summary.events
    assert set(summary.metrics) == {"NO", "PT"} and summary.metrics["NO"]["auc"] > 0.6
    predictions, outcomes = outputs(pipeline.out, "predictions"), outputs(pipeline.out, "outcomes")
    assert predictions.num_rows == summary.events and outcomes.num_rows == labels["learned"]
    assert np.isfinite(predictions["prediction"].to_numpy()).all()
    assert (np.diff(predictions["time"].to_numpy()) >= 0).all() and (np.diff(outcomes["time"].to_numpy()) >= 0).all()


def test_dead_letters_say_where_and_why(whole, rows):
    _, pipeline, _ = whole
    letters = [json.loads(line) for line in (pipeline.out / "dead_letters.jsonl").read_text().splitlines()]
    assert len(letters) == BAD
    for letter in letters:
        assert any(letter["reason"].startswith(r) for r in BAD_REASONS), letter
    assert {letter["row"] for letter in letters} == {i for i in range(200, 1401, 200)} | {1800}
    first = min(letters, key=lambda letter: letter["row"])
    assert first["raw"]["amount"] == "a lot" and first["raw"]["id"] == rows[200]["id"]


def test_equals_one_event_at_a_time(whole, rows):
    """The prediction of every event, by a plain loop over questions and labels in the order of time."""
    import jax
    import jax.numpy as jnp

    from anabranch import Event, Maybe
    from anabranch.cell import Timed

    _, pipeline, _ = whole
    card_cell, model_cell = (stage.keyed.cell for stage in pipeline.stages)
    card_step, model_step = jax.jit(lambda s, e: card_cell.step(s, e)), jax.jit(lambda s, e: model_cell.step(s, e))
    predictions = outputs(pipeline.out, "predictions")
    numbers = predictions["row"].to_pylist()[:250]
    good = {i: rows[i] for i in numbers}
    start = int(np.floor(rows[numbers[0]]["time"]))
    todo = [(rows[i]["time"], 1, i) for i in numbers]
    last = max(t for t, _, _ in todo)
    todo += [(r["known"], 0, i) for i, r in good.items() if r["known"] is not None and r["known"] <= last]
    cards, models, xs, found = {}, {}, {}, {}
    for t, ask, i in sorted(todo):
        row = good[i]
        card = cards.setdefault(row["card"], card_cell.init())
        event = lambda x, y, t=t, ask=ask: Event(x, Maybe(y, jnp.array(not ask)), jnp.float32(1))
        label = jnp.float32(0 if ask else row["fraud"])
        timed = Timed(jnp.int32(t - start), jnp.array([row["amount"]], jnp.float32))
        cards[row["card"]], lately = card_step(card, event(timed, label[None]))
        if ask:
            age = np.nan if row["age"] is None else row["age"]
            xs[i] = jnp.concatenate([lately, jnp.array([row["amount"], age], jnp.float32)])
        model = models.setdefault(row["country"], model_cell.init())
        models[row["country"]], p = model_step(model, event(xs[i], label))
        if ask:
            found[i] = float(p)
    np.testing.assert_allclose([found[i] for i in numbers], predictions["prediction"].to_numpy()[:250], atol=1e-5)


@pytest.mark.parametrize("batch", [7, 1000])
def test_batches_do_not_matter(whole, rows, tmp_path, batch):
    _, pipeline, summary = whole
    path = write_payments(tmp_path, rows, batch=batch, every=999)
    other = make(path, tmp_path / "out")
    again = other.run()
    assert again.labels == summary.labels
    for name in ("predictions", "outcomes"):
        a, b = outputs(pipeline.out, name), outputs(other.out, name)
        assert a["row"].equals(b["row"])
        np.testing.assert_allclose(a["prediction"].to_numpy(), b["prediction"].to_numpy(), atol=1e-6)


class Crash(Exception):
    pass


def crash_after(pipeline, batches):
    process = pipeline._process

    def crashing(rows, now):
        if pipeline.batches >= batches:
            raise Crash
        process(rows, now)

    pipeline._process = crashing


@pytest.mark.parametrize("format", ["parquet", "csv", "jsonl", "sqlite"])
def test_crash_and_resume_equals_an_undisturbed_run(rows, tmp_path, format):
    path = write_payments(tmp_path, rows, sink=format)
    calm = make(path, tmp_path / "calm")
    expected = calm.run()
    summary, crashes = None, 0
    for batches in (3, 4, 5, 11, 12, 23, 1000):
        pipeline = make(path, tmp_path / "out")
        crash_after(pipeline, batches)
        try:
            summary = pipeline.run(resume=True)
        except Crash:
            crashes += 1
    assert crashes == 6 and summary is not None
    assert summary._replace(seconds=0, events_per_s=0, checkpoint=None) == expected._replace(
        seconds=0, events_per_s=0, checkpoint=None
    )
    for name in ("predictions", "outcomes"):
        assert outputs(tmp_path / "out", name, format).equals(outputs(tmp_path / "calm", name, format))
    assert (tmp_path / "out/dead_letters.jsonl").read_text() == (tmp_path / "calm/dead_letters.jsonl").read_text()
    again = make(path, tmp_path / "out").run(resume=True)  # nothing is left to do
    assert again.events == expected.events and again.metrics == expected.metrics


def test_a_failed_run_leaves_nothing_that_is_still_being_written(rows, tmp_path, monkeypatch):
    write = Checkpoints._write
    monkeypatch.setattr(Checkpoints, "_write", lambda *a: (time.sleep(0.2), write(*a)))
    pipeline = make(write_payments(tmp_path, rows), tmp_path / "out")
    crash_after(pipeline, 12)
    with pytest.raises(Crash):
        pipeline.run()
    assert not pipeline.checkpoints.busy and list((tmp_path / "out/checkpoints").iterdir())


@pytest.mark.parametrize("damage", ["torn", "flipped", "missing"])
def test_a_damaged_checkpoint_is_skipped_with_a_warning(rows, tmp_path, caplog, damage):
    path = write_payments(tmp_path, rows)
    expected = make(path, tmp_path / "calm").run()
    pipeline = make(path, tmp_path / "out")
    crash_after(pipeline, 20)
    with pytest.raises(Crash):
        pipeline.run()
    pipeline.checkpoints.wait()
    newest = sorted((tmp_path / "out/checkpoints").glob("*.safetensors"))[-1]
    data = bytearray(newest.read_bytes())
    if damage == "torn":
        newest.write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        data[len(data) // 2] ^= 1
        newest.write_bytes(data)
    else:
        newest.unlink()
    again = make(path, tmp_path / "out").run(resume=True)
    assert again.metrics == expected.metrics
    assert ("cannot be read" in caplog.text) == (damage != "missing")
    for name in ("predictions", "outcomes"):
        assert outputs(tmp_path / "out", name).equals(outputs(tmp_path / "calm", name))


def test_a_checkpoint_of_another_pipeline_is_refused(whole, rows, tmp_path):
    path, pipeline, _ = whole
    other = path.read_text().replace("half_lives = [60, 600]", "half_lives = [60, 601]")
    changed = path.with_name("other.toml")
    changed.write_text(other)
    with pytest.raises(ConfigError, match="other stages"):
        make(changed, pipeline.out).run(resume=True)


@pytest.mark.parametrize("kind", ["csv", "parquet", "rows"])
def test_sources_agree(whole, rows, tmp_path, kind):
    path, pipeline, summary = whole
    if kind == "csv":
        path = write_payments(tmp_path, rows, kind="csv")
        lines = (tmp_path / "cards.csv").read_text().splitlines()
        lines.insert(1 + 1950, "too,few,columns")
        (tmp_path / "cards.csv").write_text("\n".join(lines) + "\n")
        made = make(path, tmp_path / "out")
    elif kind == "parquet":
        mixed = {"amount", "time", "fraud"}
        text = {n: pa.array([None if r[n] is None else str(r[n]) for r in rows]) for n in mixed}
        table = pa.Table.from_pylist([{n: v for n, v in r.items() if n not in mixed} for r in rows])
        for name, column in text.items():
            table = table.append_column(name, column)
        pq.write_table(table, path.parent / "cards.parquet")
        changed = path.with_name("parquet.toml")
        changed.write_text(path.read_text().replace('"jsonl"', '"parquet"').replace("cards.jsonl", "cards.parquet"))
        made = make(changed, tmp_path / "out")
    else:
        config = read(path).model_copy(update={"out": tmp_path / "out"})
        made = Pipeline(config, path.parent, source=iter(rows))
    again = made.run()
    assert again.events == summary.events
    assert again.dead_letters == summary.dead_letters + (kind == "csv")
    if kind == "csv":
        assert "expected 8 columns, got 3" in (tmp_path / "out/dead_letters.jsonl").read_text()
    a = outputs(pipeline.out, "predictions")["prediction"].to_numpy()
    b = outputs(made.out, "predictions")["prediction"].to_numpy()
    np.testing.assert_array_equal(a, b)


def test_a_limited_run_goes_on_where_it_stopped(whole, tmp_path):
    path, pipeline, complete = whole
    some = make(path, tmp_path / "out").run(limit=500)
    assert 450 < some.events + some.dead_letters <= 500 and some.labels["open"]  # some rows wait for late ones
    rest = make(path, tmp_path / "out").run(resume=True)
    assert (rest.events, rest.labels) == (complete.events, complete.labels)
    for name, scores in complete.metrics.items():  # sums over other micro-batches
        assert rest.metrics[name] == pytest.approx(scores, rel=1e-12)
    for name in ("predictions", "outcomes"):
        found, expected = outputs(tmp_path / "out", name), outputs(pipeline.out, name)
        assert found.sort_by("row").equals(expected.sort_by("row"))


def test_labels_as_rows_of_their_own(whole, rows, tmp_path):
    """The same stream with every label as a row: the same predictions, and labels of unknown events are counted."""
    path, pipeline, _ = whole
    good = set(outputs(pipeline.out, "predictions")["row"].to_pylist())
    ordered = [(r["time"], 1, i, {**r, "fraud": None}) for i, r in enumerate(rows) if i in good]
    told = [(r["known"], 0, i, r["fraud"]) for i, r in enumerate(rows) if i in good and r["known"] is not None]
    ordered += [(t, 0, i, {"id": rows[i]["id"], "time": t, "fraud": y}) for t, _, i, y in told]
    stream = [row for *_, row in sorted(ordered, key=lambda e: e[:3])]
    stream.append({"id": 10**6, "time": stream[-1]["time"], "fraud": 1})
    stream.append({**stream[-2], "time": stream[-1]["time"]})
    text = (
        path.read_text()
        .replace('time = "known"', 'id = "id"')
        .replace("expire = 900\n", "")
        .replace("pending = 500", "pending = 9999")
    )
    changed = path.with_name("ids.toml")
    changed.write_text(text.replace("lateness = 30", "lateness = 0"))
    config = read(changed).model_copy(update={"out": tmp_path / "out"})
    summary = Pipeline(config, path.parent, source=stream).run()
    assert summary.events == len(good) and summary.dead_letters == 0
    assert summary.labels["unknown"] >= 1
    expected = dict(zip(*(outputs(pipeline.out, "predictions")[n].to_pylist() for n in ("row", "prediction"))))
    ids = [row["id"] for row in stream if row.get("card") is not None]
    found = outputs(tmp_path / "out", "predictions")["prediction"].to_numpy()
    by_id = {rows[i]["id"]: p for i, p in expected.items()}
    # Ties aside, nothing differs before labels that the other form gives up after 900 s.
    np.testing.assert_allclose(found[:300], [by_id[i] for i in ids[:300]], atol=1e-6)


def test_pending_is_bounded_and_says_what_it_gave_up(rows, tmp_path):
    path = write_payments(tmp_path, rows)
    path.write_text(path.read_text().replace("pending = 500", "pending = 10"))
    pipeline = make(path, tmp_path / "out")
    summary = pipeline.run()
    assert summary.labels["dropped"] > 100 and len(pipeline.pending) <= 10
    assert sum(summary.labels.values()) == summary.events


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('time = "time"', 'tiem = "time"', "source.tiem: Extra inputs"),
        ("batch = 64", 'batch = "many"', "batch: Input should be a valid integer.*'many'"),
        ("batch = 64", "batch = 0", "batch: .*greater than or equal to 1, got 0"),
        ("cards.jsonl", "nowhere.jsonl", "source.path: there is no file .*nowhere.jsonl"),
        ("Recent", "Ancient", r"stage\[0\].cell: anabranch.layers.recent has no 'Ancient'"),
        ("cards_model:model", "no_such:model", r"stage\[1\].cell: there is no module 'no_such'"),
        ("half_lives = [60, 600]", "half_lives = [-1]", r"stage\[0\].cell: .*half-lives must be positive"),
        ("half_lives = [60, 600]", "half = [1]", r"stage\[0\].cell: .*half"),
        ('inputs = ["card", ', 'inputs = ["model", ', r"stage\[1\].inputs: 'model' is not an earlier stage"),
        ('name = "model"', 'name = "card"', "two stages named 'card'"),
        ('sink]\nformat = "parquet"', 'sink]\nformat = "xml"', "sink.format: Input should be .*got 'xml'"),
        ('name = "cards"', 'name = "cards', "not TOML"),
        ('time = "known"', 'time = "known"\nid = "id"', "either a time .* or an id"),
    ],
)
def test_config_errors_name_the_place(rows, tmp_path, old, new, message):
    path = write_payments(tmp_path, rows[:10])
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(ConfigError, match=message):
        make(path, tmp_path / "out")


def test_a_missing_column_names_what_there_is(rows, tmp_path):
    path = write_payments(tmp_path, payments(50), kind="csv")
    path.write_text(path.read_text().replace('inputs = ["amount"]', 'inputs = ["weight"]', 1))
    with pytest.raises(ConfigError, match="no column 'weight'; it has id, time, card"):
        make(path, tmp_path / "out").run()
    with pytest.raises(ConfigError, match="no such pipeline file"):
        read(tmp_path / "nothing.toml")


@pytest.mark.parametrize("sink", ["parquet", "csv", "sqlite"])
def test_scores_of_two_classes(rows, tmp_path, sink):
    path = write_payments(tmp_path, rows, sink=sink)
    tree = 'cell = "anabranch.learn.trees:HoeffdingTree"\noptions = { D = 14, C = 2, missing = true }'
    path.write_text(path.read_text().replace('cell = "cards_model:model"', tree))
    summary = make(path, tmp_path / "out").run()
    assert summary.metrics["PT"]["auc"] > 0.55 and summary.metrics["PT"]["accuracy"] > 0.75
    table = outputs(tmp_path / "out", "predictions", sink)
    assert {"prediction", "score_0", "score_1"} <= set(table.column_names)
    np.testing.assert_allclose(table["prediction"].to_numpy(), table["score_1"].to_numpy())


@pytest.mark.parametrize(("made", "message"), [("HostLearner", "runs on the host"), ("three", "gives 3 numbers")])
def test_stages_that_cannot_work_are_refused_before_anything_runs(rows, tmp_path, made, message):
    path = write_payments(tmp_path, rows[:20])
    (tmp_path / "cards_wrong.py").write_text(
        "import jax.numpy as jnp\nfrom anabranch import Learner\nfrom anabranch.combine import Map\n"
        "class Host(Learner):\n    host = True\n"
        "def HostLearner():\n    return Host()\n"
        "def three():\n    return Map(lambda e: jnp.zeros(3))\n"
    )
    path.write_text(path.read_text().replace("cards_model:model", f"cards_wrong:{made}"))
    with pytest.raises(ConfigError, match=message):
        make(path, tmp_path / "out")


LIVE = """
import itertools
import os
import time
import jax.numpy as jnp
import pyarrow as pa
from anabranch import Cell

class Sum(Cell):
    def init(self, *, key=None):
        return jnp.zeros(())

    def step(self, state, event):
        return state + event.x[0], state + event.x[0]

def ticks():
    for i in itertools.count():
        if i == 20:  # somebody presses Ctrl-C
            import signal
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.001)
        yield pa.table({"time": [time.time()] * 3, "who": ["a", "b", "c"], "value": [1.0, 2.0, float(i)]})
"""


def test_a_live_source_ends_with_ctrl_c_and_goes_on(tmp_path):
    (tmp_path / "live_ticks.py").write_text(LIVE)
    path = tmp_path / "live.toml"
    path.write_text("""
        name = "live"
        [source]
        kind = "python"
        call = "live_ticks:ticks"
        live = true
        time = "time"
        [[stage]]
        name = "mean"
        cell = "live_ticks:Sum"
        key = "who"
        inputs = ["value"]
        [sink]
        format = "jsonl"
        columns = ["who"]
    """)
    for runs in (1, 2):
        assert make(path, tmp_path / "out").run(resume=runs > 1).events == 60 * runs
        written = [json.loads(line) for line in (tmp_path / "out/predictions.jsonl").open()]
        assert [row["row"] for row in written] == list(range(60 * runs))
        assert [row["who"] for row in written] == ["a", "b", "c"] * 20 * runs
        assert [row["prediction"] for row in written[1::3]] == [2.0 * (i + 1) for i in range(20 * runs)]
    path.write_text(path.read_text().replace('kind = "python"\n        call = "live_ticks:ticks"', 'kind = "stdin"'))
    with pytest.raises(ConfigError, match=r"live"):
        read(path)
