"""The stages of a pipeline: cells made as its file says, each with one state a key."""

import inspect
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from anabranch.cell import Cell, Event, Maybe, Timed
from anabranch.run.config import ConfigError, LabelConfig, PipelineConfig, StageConfig, resolve
from anabranch.run.keyed import Keyed
from anabranch.run.metrics import Spent
from anabranch.run.rows import key_column


class Stage:
    """One keyed cell of a pipeline, and how its input is put together."""

    def __init__(self, config: StageConfig, cell: Cell, seed: int):
        self.config, self.name = config, config.name
        self.keyed = Keyed(cell, config.capacity if config.key else 1, seed=seed)
        self.key = key_column(config.columns) if config.key else None
        self.spent = Spent()


def make_stages(config: PipelineConfig, folder: Path | None) -> list[Stage]:
    """The stages of a pipeline, in their order.

    Raises:
        ConfigError: if a cell cannot be made as configured, or does not fit its inputs or the label.
    """
    stages: list[Stage] = []
    widths: dict[str, int] = {}
    for i, stage in enumerate(config.stage):
        features = sum(widths.get(name, 1) for name in stage.inputs)
        cell = _cell(i, stage, features, folder)
        widths[stage.name] = _width(i, cell, stage, features, config.label)
        stages.append(Stage(stage, cell, config.seed))
    last = config.stage[-1]
    if config.label is not None and config.label.kind == "binary" and widths[last.name] not in (1, 2):
        raise ConfigError(
            f"stage[{len(config.stage) - 1}]: a binary label needs a probability, or the scores of two classes; "
            f"{last.cell} gives {widths[last.name]} numbers"
        )
    return stages


def _cell(i: int, config: StageConfig, features: int, folder: Path | None) -> Cell:
    where = f"stage[{i}].cell"
    cell = resolve(config.cell, folder, where)
    if isinstance(cell, Cell):
        return cell
    # What the pipeline knows better than its file: how many inputs and targets the stage has.
    known = {"features": features, "targets": len(config.targets)}
    takes = inspect.signature(cell).parameters
    options = {**{name: value for name, value in known.items() if name in takes}, **config.options}
    try:
        cell = cell(**options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {config.cell}(**{options!r}) failed: {error}") from error
    if not isinstance(cell, Cell):
        raise ConfigError(f"{where}: {config.cell} gave a {type(cell).__name__}, which is no cell")
    return cell


def _width(i: int, cell: Cell, config: StageConfig, features: int, label: LabelConfig | None) -> int:
    """How many numbers the stage answers with; also the first trial of the cell on inputs as it will get them."""
    if cell.host:
        raise ConfigError(f"stage[{i}].cell: {config.cell} runs on the host: its states could not be checkpointed")
    whole = label is not None and label.kind != "value" and not config.targets
    target = jnp.zeros(len(config.targets) if config.targets else (), jnp.int32 if whole else jnp.float32)
    x: Any = jnp.zeros(features)
    event = Event(Timed(jnp.int32(0), x) if config.time else x, Maybe(target, jnp.array(False)), jnp.float32(1))
    try:
        answer = jax.eval_shape(lambda key, x: cell.step(cell.init(key=key), x)[1], jax.random.PRNGKey(0), event)
    except Exception as error:
        raise ConfigError(f"stage[{i}]: {config.cell} cannot step on {features} inputs: {error}") from error
    return sum(leaf.size for leaf in jax.tree.leaves(answer))
