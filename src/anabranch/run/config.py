"""What a pipeline file may say. An unknown key, a wrong type or a missing file is an error that names the place."""

import importlib
import os
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator


class ConfigError(ValueError):
    """A pipeline file that cannot be used. The message names the file and the place in it."""


class Section(BaseModel):
    """A table of a pipeline file."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _only_its_own(section: BaseModel, kind: str, owners: dict[str, tuple[str, ...]], required: set[str], what: str):
    """A field that only some kinds have is an error elsewhere, and where it is required and missing too."""
    for name, kinds in owners.items():
        if name in section.model_fields_set and kind not in kinds:
            raise ValueError(f"{what} {kind!r} has no {name}; it belongs to {', '.join(kinds)}")
        if name in required and kind in kinds and getattr(section, name) is None:
            raise ValueError(f"{what} {kind!r} needs a {name}")


class SourceConfig(Section):
    """Where rows come from, and what a row must have."""

    kind: Literal["csv", "jsonl", "parquet", "stdin", "python", "redis", "kafka"]
    path: Path | None = None
    """The file, for csv, jsonl and parquet; relative to the pipeline file."""
    call: str | None = None
    """`module:function`, for python; it returns a pyarrow Table, or an iterable of Tables or dicts."""
    live: bool = False
    """For python: rows come as they happen and cannot be had again. A resumed run goes on with those that come then."""
    format: Literal["csv", "jsonl"] = "jsonl"
    """How stdin is written."""
    url: str | None = None
    """The server, for redis and kafka: `redis://localhost:6379/0`; `localhost:9092`, or several with commas."""
    stream: str | None = None
    """The key of a Redis stream."""
    topic: str | None = None
    """The name of a Kafka topic."""
    group: str | None = None
    """The consumer group whose lag shows how far durable checkpoints are behind; for redis and kafka."""
    idle: float | None = Field(None, gt=0)
    """Take a live source to have ended after so many seconds without rows; by default it never ends."""
    linger: float = Field(0.1, ge=0)
    """Seconds that a row of a live source waits for others, to be handled with them."""
    time: str
    """Column of the event time: seconds, or a timestamp."""
    lateness: float = Field(0.0, ge=0)
    """Rows may come out of order by this many seconds; later ones are dead letters."""
    optional: list[str] = []
    """Columns that may be empty; in a stage's inputs an empty one is NaN. An empty value elsewhere is a bad row."""

    @model_validator(mode="after")
    def _has_its_place(self):
        live = ("redis", "kafka")
        owners = {
            "path": ("csv", "jsonl", "parquet"), "call": ("python",), "live": ("python",), "format": ("stdin",),
            "url": live, "stream": ("redis",), "topic": ("kafka",), "group": live, "idle": live, "linger": live,
        }  # fmt: skip
        required = {"path", "call", "url", "stream", "topic", "group"}
        _only_its_own(self, self.kind, owners, required, "a source of kind")
        return self


class LabelConfig(Section):
    """The label that is predicted, and when it becomes known."""

    column: str
    """Empty in a row whose label never becomes known."""
    kind: Literal["binary", "classes", "value"] = "binary"
    """0 or 1; a class number; or a real value."""
    time: str | None = None
    """Column of the time at which the label becomes known; by default at once, after the prediction."""
    id: str | None = None
    """Labels come as rows of their own: a row whose label is not empty is no event, but tells the label of the event
    with the same id."""
    pending: int = Field(100_000, ge=1)
    """Predictions that may wait for their label. When full, the oldest is given up and counted."""
    expire: float | None = Field(None, gt=0)
    """Give up waiting after this many seconds."""

    @model_validator(mode="after")
    def _one_way(self):
        if self.time is not None and self.id is not None:
            raise ValueError("a label has either a time (it is in its event's row) or an id (it is a row of its own)")
        return self


class StageConfig(Section):
    """One keyed cell. Stages run in order; each may use the outputs of those before it."""

    name: str = Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    cell: str
    """`module:name` of a cell, or of a function that makes one; modules beside the pipeline file are found."""
    options: dict[str, Any] = {}
    key: str | list[str] = []
    """Columns whose values are the key; none: one state for all."""
    inputs: list[str] = []
    """Columns, or names of earlier stages: all their outputs."""
    targets: list[str] = []
    """Columns that become known with the label; by default the label."""
    time: bool = False
    """The cell is given `Timed(time, x)`: whole seconds since the start of the stream, and the inputs."""
    capacity: int = Field(100_000, ge=1)

    @field_validator("key")
    @classmethod
    def _a_list(cls, key):
        return [key] if isinstance(key, str) else key

    @property
    def columns(self) -> list[str]:
        return list(self.key)


class SinkConfig(Section):
    """Where predictions and outcomes are written."""

    format: Literal["parquet", "csv", "jsonl", "sqlite", "redis", "kafka", "postgres"] = "parquet"
    columns: list[str] = []
    """Columns of the source that are written beside the prediction."""
    url: str | None = None
    """The server, for redis, kafka and postgres."""
    stream: str | None = None
    """For redis: predictions go to the stream `STREAM:predictions`, outcomes to `STREAM:outcomes`."""
    topic: str | None = None
    """For kafka: the topics `TOPIC.predictions` and `TOPIC.outcomes`."""
    table: str | None = None
    """For postgres: the tables `TABLE_predictions` and `TABLE_outcomes`."""

    @model_validator(mode="after")
    def _has_its_place(self):
        owners = {
            "url": ("redis", "kafka", "postgres"), "stream": ("redis",), "topic": ("kafka",), "table": ("postgres",)
        }  # fmt: skip
        _only_its_own(self, self.format, owners, set(owners), "a sink of format")
        return self


class CheckpointConfig(Section):
    """How often the states, the pending labels and all positions are saved."""

    events: int | None = Field(None, ge=1)
    seconds: float | None = Field(10.0, gt=0)
    keep: int = Field(3, ge=1)


class ReportConfig(Section):
    """What is scored, shown and compared."""

    by: str | None = None
    """Column; each of its values is scored apart."""
    worst: str | None = None
    """Column; the report shows the values of it that are predicted worst."""
    after: str | None = None
    """Score only events from this time on (a date, or seconds)."""
    peers: list[str] = []
    """`module:function`s that answer the same questions another way; see `Pipeline.compare`."""


class ServedCellConfig(Section):
    """A bare cell that is served by itself: a file with `[cell]` in place of a source and stages."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    out: Path | None = None
    """Folder of checkpoints and journal; by default `out/NAME`."""
    cell: str
    """`module:name` of a cell, or of a function that makes one."""
    options: dict[str, Any] = {}
    input: str
    """What an event is: `float32[16]`, or `module:name` of an example or of a function that returns one."""
    capacity: int = Field(100_000, ge=1)
    """Streams whose state is held ready; the others spill."""
    idle: float | None = Field(None, gt=0)
    """Drop the state of a stream that has had no event for so many seconds."""
    keep: int = Field(3, ge=1)
    """Checkpoints that are kept."""
    seed: int = 0


class ServeConfig(Section):
    """How a pipeline or cell is served."""

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65_535)
    """Of HTTP and WebSocket; 0 is any free one."""
    grpc: int | None = Field(None, ge=0, le=65_535)
    """Port of the Open Inference Protocol over gRPC; by default it is not opened."""
    max_batch: int = Field(4096, ge=1)
    """Events that are stepped together at most."""
    deadline: float = Field(1.0, gt=0)
    """Seconds within which an event should be answered; when too many wait, those that are due go first."""
    queue: int = Field(65_536, ge=1)
    """Events that may wait; beyond, clients are told to come again (HTTP 429) or are read no further (WebSocket)."""
    stream_queue: int = Field(4096, ge=1)
    """Events of one stream that may wait."""
    tenant_queue: int | None = Field(None, ge=1)
    """Events of one tenant that may wait."""
    durable: bool = True
    """Answer only what the disk has."""
    every: float = Field(10.0, gt=0)
    """Seconds between checkpoints."""
    tokens: Path | None = None
    """File of `TENANT SHA256-OF-TOKEN` lines. Clients must send `Authorization: Bearer TOKEN`; a tenant's streams are
    its own. Without it everybody may use everything."""
    certificate: Path | None = None
    key: Path | None = None
    """TLS certificate and key, PEM."""
    max_message: int = Field(1 << 20, ge=1024)
    """Bytes of the longest request or message."""


class PipelineConfig(Section):
    """A whole pipeline file."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    out: Path | None = None
    """Folder of all outputs; by default `out/NAME`."""
    batch: int = Field(16_384, ge=1, le=1_000_000)
    seed: int = 0
    source: SourceConfig
    label: LabelConfig | None = None
    stage: list[StageConfig] = Field(min_length=1)
    sink: SinkConfig = SinkConfig()
    checkpoint: CheckpointConfig = Field(default_factory=lambda: CheckpointConfig.model_validate({}))
    report: ReportConfig = ReportConfig()
    serve: ServeConfig = Field(default_factory=lambda: ServeConfig.model_validate({}))

    @model_validator(mode="after")
    def _stages_are_in_order(self):
        seen: set[str] = set()
        for i, stage in enumerate(self.stage):
            if stage.name in seen:
                raise ValueError(f"stage[{i}].name: there are two stages named {stage.name!r}")
            later = {s.name for s in self.stage[i:]}
            for name in stage.inputs:
                if name in later:
                    raise ValueError(f"stage[{i}].inputs: {name!r} is not an earlier stage")
            if stage.targets and self.label is None:
                raise ValueError(f"stage[{i}].targets: there is no [label] with which they could become known")
            seen.add(stage.name)
        return self


_S = TypeVar("_S", bound=Section)


class ServedCellFile(Section):
    """A whole file of a bare cell that is served."""

    cell: ServedCellConfig
    serve: ServeConfig = Field(default_factory=lambda: ServeConfig.model_validate({}))


class MemoryConfig(Section):
    """What a language model remembers of conversations and sessions without end."""

    policy: str = "anabranch.keep.memory:Sinks"
    """`module:name` of what says which tokens stay."""
    options: dict[str, Any] = {"budget": 1024}
    """Of the policy."""


class ModelConfig(Section):
    """A language model that is served: a file with `[model]` in place of a source and stages."""

    name: str = Field(pattern=r"^[A-Za-z0-9_./:-]+$")
    """As clients ask for it."""
    weights: str
    """`smollm2`, once it has been fetched, or a GGUF file."""
    sessions: int = Field(8, ge=1)
    """That are stepped together at most; twice as many have a place."""
    size: int = Field(2048, ge=16)
    """Tokens of a session, prompt and answer together; with `memory` there is no end."""
    int8: bool = False
    """Round the weights to int8."""
    prefixes: Literal["none", "tenant", "all"] = "none"
    """Whose prompts share what is computed of those that begin alike: a tenant's own, or all; takes the memory of all
    sessions once more."""
    scheduler: str = "anabranch.schedule.baselines:Chunked"
    """`module:name` of what says which prompts and answers go on next."""
    options: dict[str, Any] = {"chunk": 256}
    """Of the scheduler."""
    memory: MemoryConfig | None = None
    """By which sessions have no end; by default that of `anabranch chat`, and none of a server's."""

    @model_validator(mode="after")
    def _one_end(self):
        if self.memory is not None and "size" in self.model_fields_set:
            raise ValueError("sessions have either a size or a memory that forgets, and then no end")
        return self


class ServedModelFile(Section):
    """A whole file of a language model that is served."""

    model: ModelConfig
    serve: ServeConfig = Field(default_factory=lambda: ServeConfig.model_validate({}))


def read(path: str | os.PathLike) -> PipelineConfig:
    """Read and check a pipeline file; paths in it are relative to it, `out` to the working directory.

    Raises:
        ConfigError: if the file is missing, is not TOML, or says something it may not.
    """
    path = Path(path)
    config = _checked(path, _toml(path), PipelineConfig)
    if config.source.path is not None:
        file = path.parent / config.source.path
        if not file.is_file():
            raise ConfigError(f"{path}: source.path: there is no file {file}")
        config = config.model_copy(update={"source": config.source.model_copy(update={"path": file})})
    return config


def read_served(path: str | os.PathLike) -> PipelineConfig | ServedCellFile | ServedModelFile:
    """Read and check what `anabranch serve` serves: a pipeline, a bare cell or a language model.

    Raises:
        ConfigError: if the file is missing, is not TOML, or says something it may not.
    """
    path = Path(path)
    raw = _toml(path)
    kinds = {"cell": ServedCellFile, "model": ServedModelFile}
    config = _checked(path, raw, next((kind for name, kind in kinds.items() if name in raw), PipelineConfig))
    for name in ("tokens", "certificate", "key"):
        file = getattr(config.serve, name)
        if file is not None:
            if not (path.parent / file).is_file():
                raise ConfigError(f"{path}: serve.{name}: there is no file {path.parent / file}")
            serve = config.serve.model_copy(update={name: path.parent / file})
            config = config.model_copy(update={"serve": serve})
    return config


def _toml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such pipeline file")
    try:
        return tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not TOML: {error}") from None


def _checked(path: Path, raw: dict[str, Any], model: type[_S]) -> _S:
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        lines = [f"  {place(e['loc'])}: {e['msg'].removeprefix('Value error, ')}{_found(e)}" for e in error.errors()]
        raise ConfigError(f"{path}: {len(lines)} mistake{'s' * (len(lines) > 1)}\n" + "\n".join(lines)) from None


def place(where: tuple) -> str:
    """`('stage', 0, 'key')` as `stage[0].key`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where)
    return text.removeprefix(".") or "file"


def _found(error) -> str:
    value = error.get("input")
    return "" if error["type"] in ("missing", "value_error") else f", got {value!r}"


def resolve(name: str, folder: Path | None, where: str) -> Callable:
    """The object that `module:name` stands for; modules in `folder` are found first.

    Raises:
        ConfigError: if there is no such module or name. The message says `where` it was asked for.
    """
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise ConfigError(f"{where}: expected module:name, got {name!r}")
    if folder is not None and str(folder.resolve()) not in sys.path:
        sys.path.insert(0, str(folder.resolve()))
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and not module.startswith(error.name):
            raise
        raise ConfigError(f"{where}: there is no module {module!r}") from None
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ConfigError(f"{where}: {module} has no {part!r}")
        found = getattr(found, part)
    return found
