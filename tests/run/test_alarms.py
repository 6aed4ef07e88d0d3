"""Alarms: which outputs are some, drift of errors however they come, and both over a break."""

from typing import NamedTuple

import numpy as np
import pytest

from anabranch import state
from anabranch.cell import Maybe
from anabranch.learn.detect import ADWIN
from anabranch.run.alarms import KEPT, Alarms, ErrorDrift
from anabranch.run.config import PipelineConfig, ServedCellConfig
from anabranch.run.pipeline import Pipeline
from anabranch.run.served_cell import CellEvent, ServedCell


class Said(NamedTuple):
    score: np.ndarray
    alarm: np.ndarray


def test_only_true_outputs_of_these_names_are_alarms():
    alarms, times = Alarms(), np.arange(4.0)
    flags = np.array([False, True, False, True])
    alarms.look("valid", Maybe(np.ones(4, np.float32), flags), times)
    alarms.look("numbers", {"alarm": np.ones(4, np.float32)}, times)
    alarms.look("bare", flags, times)
    assert not alarms.recent and not alarms.counts
    alarms.look(
        "nested", (np.zeros((4, 2), np.float32), Said(times.astype(np.float32) / 10, flags)), times, list("abcd")
    )
    alarms.look("all", {"drift": flags}, times)
    found = [(raised.stage, raised.key, raised.output, raised.time) for raised in alarms.recent]
    assert found == [
        ("nested", "b", "alarm", 1),
        ("nested", "d", "alarm", 3),
        ("all", "", "drift", 1),
        ("all", "", "drift", 3),
    ]
    assert [raised.value for raised in alarms.recent] == pytest.approx([0.1, 0.3, None, None])
    alarms.look("all", {"drift": np.ones(1000, bool)}, np.arange(1000.0))
    assert len(alarms.recent) == KEPT and alarms.recent[-1].time == 999
    assert alarms.counts == {"nested": 2, "all": 1002}


@pytest.mark.parametrize("bounded", [True, False])
def test_drift_of_errors_is_what_adwin_says_of_them(bounded):
    rng = np.random.default_rng(1)
    errors = np.concatenate([rng.random(n) * high for n, high in ((1500, 0.4), (1500, 0.8), (1500, 0.1), (5000, 0.6))])
    errors, times = errors if bounded else 1000 * errors, np.arange(len(errors), dtype=float)
    whole = ErrorDrift(bounded).add(errors, times)
    first, second = (drift.time for drift in whole)  # at 3000 they became smaller
    assert 1500 < first < 1700 and 4500 < second < 4700
    assert all(drift.mean > 1.4 * drift.before for drift in whole)
    if bounded:
        alarm = ADWIN().advance(ADWIN().init(), errors.astype(np.float32))[1]
        assert {drift.time for drift in whole} < set(np.flatnonzero(alarm.drift).tolist())
    cut, found, at = ErrorDrift(bounded), [], 0
    while at < len(errors):
        to = at + int(rng.integers(1, 90))
        found += cut.add(errors[at:to], times[at:to])
        at = to
    assert [drift.time for drift in found] == [drift.time for drift in whole]
    np.testing.assert_allclose([drift[1:] for drift in found], [drift[1:] for drift in whole])


def test_a_drift_that_is_saved_goes_on(tmp_path):
    errors = np.r_[np.full(1010, 0.1), np.full(300, 0.5)]
    first = ErrorDrift(True)
    first.add(errors[:1003], np.arange(1003.0))
    state.save(tmp_path / "drift.safetensors", first.save())
    second = ErrorDrift(True)
    second.load(state.load(tmp_path / "drift.safetensors"))
    rest, times = errors[1003:], np.arange(1003.0, 1310.0)
    assert second.add(rest, times) == first.add(rest, times) != []


CELLS = """
import jax.numpy as jnp
from anabranch import Cell
from anabranch.learn.anomaly import Anomaly

class Loud(Cell):
    def init(self, *, key=None):
        return ()

    def step(self, state, x):
        return state, Anomaly(x.x[0], x.x[0] > 0.99)

class Never(Cell):
    def init(self, *, key=None):
        return ()

    def step(self, state, x):
        return state, jnp.float32(0.1)
"""


def test_a_resumed_run_has_the_alarms_of_one_that_was_not(tmp_path):
    (tmp_path / "alarming.py").write_text(CELLS)
    rng = np.random.default_rng(2)
    rows = [
        {
            "time": float(i),
            "who": f"w{i % 3}",
            "x": float(rng.random()),
            "y": int(rng.random() < (0.1 if i < 1200 else 0.9)),
        }
        for i in range(2000)
    ]
    config = PipelineConfig.model_validate({
        "name": "alarming", "batch": 100, "source": {"kind": "jsonl", "time": "time", "path": "none"},
        "label": {"column": "y"}, "checkpoint": {"events": 300},
        "stage": [
            {"name": "loud", "cell": "alarming:Loud", "key": "who", "inputs": ["x"]},
            {"name": "never", "cell": "alarming:Never", "inputs": ["x"]},
        ],
    })  # fmt: skip

    def run(out, *, stops):
        at = config.model_copy(update={"out": tmp_path / out})
        for limit in stops:
            Pipeline(at, tmp_path, source=rows).run(resume=limit != stops[0], limit=limit)
        pipeline = Pipeline(at, tmp_path, source=rows)
        pipeline.run(resume=bool(stops))
        return sorted(raised._replace(noticed=0) for raised in pipeline.alarms.recent), pipeline.alarms.counts

    recent, counts = run("calm", stops=[])
    assert run("broken", stops=[777, 1231]) == (recent, counts)
    loud = [row["time"] for row in rows if row["x"] > 0.99]
    assert [raised.time for raised in recent if raised.stage == "loud"] == loud and counts["loud"] == len(loud) > 5
    (drift,) = [raised for raised in recent if raised.output == "error"]
    assert 1200 < drift.time < 1300 and drift.key == "all"


def test_a_served_cell_has_alarms_of_its_streams(tmp_path):
    config = {"name": "odd", "cell": "anabranch.learn.anomaly:AnomalyLikelihood", "options": {"warm": 50}}
    cell = ServedCell(ServedCellConfig.model_validate({**config, "input": "float32[]"}), tmp_path)
    readings = np.sin(np.arange(300.0)).astype("<f4")
    readings[250] = 9
    events = [
        CellEvent(f"/{name}", x.tobytes()) for x in readings for name in ("calm", "odd") if name == "odd" or x < 2
    ]
    cell.step(cell.prepare(events))
    assert cell.alarms.recent and {(raised.stage, raised.key) for raised in cell.alarms.recent} == {("cell", "/odd")}
    assert cell.spent.value()["events"] == len(events) and cell.spent.value()["seconds"] > 0
