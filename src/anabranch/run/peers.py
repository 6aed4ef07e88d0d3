"""Other ways to answer the same questions, scored alike."""

import logging
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pyarrow as pa
from rich.console import Console

from anabranch.run.pipeline import Pipeline
from anabranch.run.scores import Scores
from anabranch.run.source import open_source

log = logging.getLogger("anabranch.pipeline")
Peer = Callable[[Any], Iterable[tuple[str, np.ndarray, np.ndarray, np.ndarray]]]
"""Answers the same questions another way: `(group, times, targets, predictions)` from the source's table."""


def compare(pipeline: Pipeline, *, progress: bool = False) -> dict[str, dict[str, dict[str, Any]]]:
    """Other ways to answer the same questions, scored alike: `{peer: {group: scores}}`.

    Each peer of the configuration is called with the source's table and yields `(group, times, targets,
    predictions)`; only what was asked after `report.after` counts.
    """
    if pipeline.source is None and pipeline.call is None:
        if pipeline.config.source.kind in ("stdin", "redis", "kafka"):
            log.warning("nothing is compared: a source of kind %s is not read twice", pipeline.config.source.kind)
            return {}
        table = pa.concat_tables([block.table for block in open_source(pipeline.config.source, None)])
    else:
        table = pipeline.source if pipeline.call is None else pipeline.call()
    found: dict[str, dict[str, dict[str, Any]]] = {}
    status = Console(stderr=True, quiet=not progress)
    for peer in pipeline.peers:
        name = (peer.__doc__ or peer.__name__).strip().splitlines()[0].rstrip(".")
        try:
            with status.status(f"comparing: {name}"):
                for group, times, targets, predictions in peer(table):
                    at = np.ones(len(times), bool) if pipeline.after is None else np.asarray(times) >= pipeline.after
                    scores = Scores(pipeline.kind)
                    scores.add(np.asarray(targets)[at], np.asarray(predictions)[at])
                    found.setdefault(name, {})[group] = scores.value()
        except ImportError as error:
            log.warning("%s is not compared: %s", name, error)
    return found
