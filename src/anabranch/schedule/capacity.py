"""How many requests a second so many devices serve, by which system and placement: `anabranch capacity`."""

import csv
import html
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from anabranch.catalog import did_you_mean
from anabranch.schedule.baselines import FCFS, Chunked, Orca
from anabranch.schedule.cluster import DEVICES, MODELS, Device, LMSpec, Roofline
from anabranch.schedule.distserve import DistServe, Goals, place
from anabranch.schedule.layered_prefill import LayeredPrefill
from anabranch.schedule.scheduler import Engine, Scheduler
from anabranch.schedule.serving import Result, goodput, simulate_serving
from anabranch.schedule.workload import Workload

REQUESTS = 600
"""Of a workload, for each rate that is tried."""


class Option(NamedTuple):
    """A system in a placement, and what it serves."""

    system: str
    devices: int
    """That share an engine by tensor parallelism; of DistServe those of a prefill and of a decode engine."""
    engines: str
    rate: float
    """Requests a second, on all devices, within the goals."""
    scheduler: Scheduler
    placed: tuple[Engine, ...]
    """Engines that are simulated."""
    copies: float
    """How many times what is simulated there is."""

    def serve(self, load: Workload, rate: float) -> Result:
        """What requests experience at a rate of all devices together."""
        return simulate_serving(load.poisson(rate / self.copies, 0), self.placed, self.scheduler)


def known(table: dict[str, Any], name: str, what: str) -> Any:
    """The entry of a table.

    Raises:
        LookupError: if there is none.
    """
    if name not in table:
        raise LookupError(f"no {what} {name!r}{did_you_mean(name, table)}; there are {', '.join(table)}")
    return table[name]


def read_workload(said: str) -> Workload:
    """`azure-conv`, `azure-code`, lengths such as `1000x200`, or a CSV file with columns prompt, output and arrival.

    Raises:
        FileNotFoundError: if there is no such file, or the data of a trace are not there.
        ValueError: if it is none of these, or a row cannot be used.
    """
    if said in ("azure-conv", "azure-code"):
        return Workload.azure(said.removeprefix("azure-"))  # pyright: ignore[reportArgumentType]
    if found := re.fullmatch(r"(\d+)x(\d+)", said):
        return Workload.synthetic(REQUESTS, int(found[1]), int(found[2]))
    if not said.endswith(".csv"):
        raise ValueError(f"trace must be azure-conv, azure-code, PROMPTxOUTPUT or a CSV file, got {said!r}")
    with open(said, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    columns = {}
    for name in ("arrival", "prompt", "output"):
        if not rows or rows[0].get(name) is None:
            raise ValueError(f"{said}: there is no column {name!r}")
        try:
            columns[name] = np.array([float(row[name]) for row in rows])
        except ValueError as error:
            raise ValueError(f"{said}: {name}: {error}") from None
    try:
        return Workload(**columns)
    except ValueError as error:
        raise ValueError(f"{said}: {error}") from None


def read_goals(said: str) -> Goals:
    """`ttft=0.5,tbt=0.05,at=0.9`: seconds, and the share of requests that must meet both.

    Raises:
        ValueError: if it says something else.
    """
    names = {"ttft": "ttft", "tbt": "tpot", "tpot": "tpot", "at": "at"}
    found: dict[str, float] = {}
    for part in said.split(","):
        name, _, value = part.partition("=")
        try:
            found[names[name.strip()]] = float(value)
        except (KeyError, ValueError):
            raise ValueError(f"slo must look like ttft=0.5,tbt=0.05,at=0.9, got {said!r}") from None
    if not {"ttft", "tpot"} <= set(found) or not all(value > 0 for value in found.values()) or found.get("at", 0.9) > 1:
        raise ValueError(f"slo needs ttft and tbt above 0, and at most 1 for at, got {said!r}")
    return Goals(**found)


def placements(spec: LMSpec, device: Device, gpus: int) -> list[Engine]:
    """An engine for each number of devices that divides the heads and holds the weights and a few prompts."""
    found = []
    for n in (1, 2, 4, 8, 16):
        cost = Roofline(spec, device, n)
        if n <= gpus and spec.heads % n == 0 and cost.kv_tokens >= 8192:
            found.append(Engine(cost, devices=n))
    return found


def capacity(
    spec: LMSpec, device: Device, gpus: int, load: Workload, goals: Goals,
    told: Callable[[str], None] = lambda step: None,
) -> list[Option]:  # fmt: skip
    """What every system serves in every placement, most first.

    Engines that do both phases are simulated one at a time, and stand for all: requests are spread evenly.

    Arguments:
        told: is given the name of what is tried next.

    Raises:
        ValueError: if the model does not fit.
    """
    engines = placements(spec, device, gpus)
    if not engines:
        raise ValueError(f"the model does not fit on {gpus} x {device.name}")
    load = load.head(REQUESTS)
    make = lambda rate: load.poisson(rate, 0)
    systems: dict[str, Scheduler] = {
        "prompts first (vLLM)": FCFS(), "mixed (Orca)": Orca(), "chunks of 512 (Sarathi)": Chunked(),
        "layered prefill": LayeredPrefill(layers=spec.layers),
    }  # fmt: skip
    found = []
    for engine in engines:
        copies = gpus // engine.devices
        for name, scheduler in systems.items():
            told(f"{name}, {engine.devices} a engine")
            serve = lambda load, e=engine, s=scheduler: simulate_serving(load, [e], s)
            value = goodput(make, serve, ttft=goals.ttft, tpot=goals.tpot, at=goals.at, close=0.04)
            rate = value * engine.devices * copies
            said = f"{copies} x {engine.devices}"
            found.append(Option(name, engine.devices, said, rate, scheduler, (engine,), copies))
    told("apart (DistServe)")
    try:
        found.append(_apart(engines, gpus, make, goals))
    except ValueError:
        pass  # a goal that neither phase can meet
    return sorted(found, key=lambda one: -one.rate)


def _apart(engines: list[Engine], gpus: int, make: Callable[[float], Workload], goals: Goals) -> Option:
    """The best placement of DistServe on so many devices."""
    alone = place(make, engines, goals, rate=1e-3)
    prefill, decode = alone.prefill, alone.decode
    best = Option("apart (DistServe)", 0, "none fits", 0.0, DistServe(), (), 1.0)
    for prefills in range(1, 5):
        for decodes in range(1, 5):
            devices = prefills * prefill.devices + decodes * decode.devices
            copies = gpus // devices
            if not copies:
                continue
            placed = [prefill] * prefills + [decode] * decodes
            serve = lambda load, some=placed: simulate_serving(load, some, DistServe())
            value = goodput(make, serve, ttft=goals.ttft, tpot=goals.tpot, at=goals.at, close=0.08, high=16.0 * devices)
            if value * devices * copies > best.rate:
                said = f"{copies} x ({prefills} x {prefill.devices} prefill + {decodes} x {decode.devices} decode)"
                best = Option(
                    best.system, decode.devices, said, value * devices * copies, DistServe(), tuple(placed), copies
                )
    return best


def report(found: list[Option], load: Workload, goals: Goals, title: str, path: Path) -> None:
    """Write one self-contained HTML page: what is served by which system, and latencies as the load grows.

    Raises:
        ImportError: without matplotlib (the extra `viz`).
    """
    try:
        import matplotlib
    except ImportError:
        raise ImportError("the report needs matplotlib: pip install 'anabranch[viz]'") from None
    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    def drawn(figure: Any) -> str:
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
        plt.close(figure)
        return buffer.getvalue()[buffer.getvalue().index("<svg") :]

    bars, ax = plt.subplots(figsize=(8, 0.32 * len(found) + 1), layout="constrained")
    names = [f"{one.system}\n{one.engines}" for one in found]
    ax.barh(range(len(found)), [one.rate for one in found], color="#0072B2")
    ax.set(yticks=range(len(found)), xlabel="requests a second within the goals")
    ax.set_yticklabels(names, fontsize=7)
    ax.invert_yaxis()
    curves, axes = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    shown: dict[str, Option] = {}
    for one in found:
        if one.rate > 0:
            shown.setdefault(one.system, one)
    for one in shown.values():
        rates = np.linspace(0.2, 1.3, 8) * found[0].rate
        results = [one.serve(load.head(REQUESTS), rate) for rate in rates]
        for axis, metric in zip(axes, ("ttft", "tpot")):
            axis.plot(
                rates, [result.percentile(metric, 100 * goals.at) for result in results], label=one.system, lw=1.4
            )
    for axis, metric, goal in zip(axes, ("to the first token", "for each after it"), (goals.ttft, goals.tpot)):
        axis.axhline(goal, color="#888888", ls=":")
        axis.set(xlabel="requests a second", title=f"p{100 * goals.at:.0f} seconds {metric}", ylim=(0, 4 * goal))
        axis.title.set_fontsize(9)
    axes[0].legend(frameon=False, fontsize=7)
    rows = "".join(
        f"<tr><td>{html.escape(one.system)}</td><td>{one.engines}</td><td>{one.rate:.2f}</td></tr>" for one in found
    )
    path.write_text(
        f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 58rem; margin: 2rem auto; padding: 0 1rem; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: left; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid #ddd; }} svg {{ max-width: 100%; }}
</style></head><body><h1>{html.escape(title)}</h1><p>Simulated by a roofline of the model and the device, not measured.
Requests arrive as Poisson. Dotted: the goals.</p>{drawn(bars)}{drawn(curves)}
<table><tr><th>system</th><th>engines x devices</th><th>requests a second</th></tr>{rows}</table></body></html>
""",
        encoding="utf-8",
    )


__all__ = ["DEVICES", "MODELS", "Option", "capacity", "known", "read_goals", "read_workload", "report"]
