"""A pipeline as a server serves it: rows of clients, in the order in which they come."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from anabranch.run.alarms import Alarms
from anabranch.run.config import PipelineConfig
from anabranch.run.pipeline import Pipeline
from anabranch.run.rows import ROW, TIME, number_of
from anabranch.run.source import records

AHEAD = 60.0
"""Seconds that the clock of a client may be before the server's."""


class ServedPipeline:
    """A pipeline whose rows come from clients: dicts in, one answer a row.

    Rows count in the order in which they come. One without a time gets the server's; one whose time is before that of
    an earlier row, by at most `source.lateness` seconds, counts at the time of that row.
    """

    def __init__(self, config: PipelineConfig, folder: Path | None = None):
        live = config.source.model_copy(update={"kind": "jsonl", "lateness": 0.0})
        out = (config.out or Path("out") / config.name) / "live"
        self.pipeline = Pipeline(config.model_copy(update={"source": live, "out": out}), folder, source=[])
        self.lateness = config.source.lateness
        self.time = config.source.time
        label = config.label
        self._names = {name for stage in config.stage for name in stage.columns}
        self._names |= {label.id} if label is not None and label.id is not None else set()
        typed = self.pipeline.typed
        self._texts = self._names | set(typed.shown) - set(typed.inputs) - set(typed.targets)

    def open(self) -> int:
        self.pipeline.open(resume=True)
        return self.pipeline.batches

    def prepare(self, events: list[dict]) -> list[dict]:
        now = max(time.time(), self.pipeline.ordered.newest)  # a clock that is set back makes no row late
        time_now = str(now) if self.time in self._texts else now
        return [event if event.get(self.time) is not None else {**event, self.time: time_now} for event in events]

    @property
    def alarms(self) -> Alarms:
        """What its stages, and the error of its predictions, have raised."""
        return self.pipeline.alarms

    def quality(self) -> dict[str, dict[str, Any]]:
        """The scores so far, by group."""
        return {group: scores.value() for group, scores in sorted(self.pipeline.quality.scores.items())}

    def own(self, tenant: str | None, event: dict) -> dict:
        """An event with its keys, its id and what else is no number as text, so that columns have one type.

        The keys and the id of a tenant are another's only by name.

        Raises:
            ValueError: if its time has not come yet.
        """
        moment, _ = number_of(event.get(self.time))
        if moment > time.time() + max(self.lateness, AHEAD):  # it would make all that comes after it late
            raise ValueError(f"{self.time}: {event[self.time]!r} is ahead of the server's clock")
        found = dict(event)
        for name in self._texts & event.keys():
            value = event[name]
            if value is not None:
                text = value if isinstance(value, str) else json.dumps(value)
                found[name] = f"{tenant}/{text}" if tenant is not None and name in self._names else text
        return found

    def step(self, batch: list[dict]) -> list[dict]:
        pipeline = self.pipeline
        first, pipeline.position = pipeline.position, pipeline.position + len(batch)
        answers: list[dict] = [{"row": first + i} for i in range(len(batch))]
        rows, bad = pipeline.typed(records(batch, first))
        when = rows[TIME].to_numpy()
        newest = np.maximum.accumulate(np.r_[pipeline.ordered.newest, when])[1:]
        moved = np.where(when >= newest - self.lateness, newest, when)
        rows, late = pipeline.ordered(rows.set_column(rows.column_names.index(TIME), TIME, [moved]))
        pipeline.bury(bad + late)
        for letter in bad + late:
            answers[letter.row - first]["error"] = letter.reason
        unknown: set[int] = set()
        if rows.num_rows:
            predictions = pipeline.batch(rows)
            unknown = pipeline.unknown
            if predictions is not None:
                for answer in predictions.to_pylist():
                    answers[answer["row"] - first] = answer
        else:
            pipeline.batches += 1
        for row in rows[ROW].to_pylist():
            answer = answers[row - first]
            if len(answer) == 1:  # it told a label
                answer |= {"error": "no open prediction has this id"} if row in unknown else {"label": "learned"}
        return answers

    def idle(self) -> None:
        return None  # states of a pipeline last; beyond a stage's capacity they spill

    def pack(self, batch: list[dict]) -> bytes:
        return json.dumps(batch).encode()

    def unpack(self, data: bytes) -> list[dict]:
        return json.loads(data)

    def save(self, batches: int) -> None:
        self.pipeline.checkpoint()

    def wait(self) -> None:
        self.pipeline.checkpoints.wait()

    def close(self) -> None:
        self.pipeline.close()

    def abandon(self) -> None:
        self.pipeline.abandon()
