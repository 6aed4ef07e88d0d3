"""What `anabranch plan` reads and prints."""

import difflib
import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from anabranch.plan import draw, simulate
from anabranch.schedule.base import Costs
from anabranch.schedule.search import Found

_UNITS = {"": 0, "B": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def read_costs(path: Path | None) -> Costs:
    """The costs in a JSON file of the fields of `Costs`, each a number or one a part of the model.

    Raises:
        ValueError: if the file is none, has a field that there is not, or a value that cannot be.
    """
    if path is None:
        return Costs()
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    known = [field.name for field in fields(Costs)]
    if not isinstance(said, dict):
        raise ValueError(f"{path} holds no object")
    for name, value in said.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise ValueError(f"{path}: unknown cost {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(one, int | float) and not isinstance(one, bool) for one in values):
            raise ValueError(f"{path}: {name} must be a number or a list of numbers, got {value!r}")
    try:
        return Costs(**said)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_bytes(said: str | None) -> float:
    """`16GiB`, `80GB`, `5e9` in bytes; infinite if not said.

        >>> read_bytes("16GiB") == 2**34, read_bytes("80 GB"), read_bytes("12.5")
        (True, 80000000000.0, 12.5)

    Raises:
        ValueError: if it is no size.
    """
    if said is None:
        return np.inf
    found = re.fullmatch(r"\s*([\d.]+(?:e\d+)?)\s*([KMGT]?)(i?)B?\s*", said, re.IGNORECASE)
    try:
        if found is None:
            raise ValueError
        return float(found[1]) * (1024 if found[3] else 1000) ** _UNITS[found[2].upper()]
    except ValueError:
        raise ValueError(f"memory must be a size such as 16GiB, got {said!r}") from None


def picked(found: list[Found], name: str | None) -> Found:
    """The schedule of this name, or the first.

    Raises:
        LookupError: if there is none.
    """
    if name is None:
        return found[0]
    names = [one.schedule.name for one in found]
    if name not in names:
        raise LookupError(f"no schedule {name!r}; there are {', '.join(dict.fromkeys(names))}")
    return found[names.index(name)]


def figures(one: Found) -> dict[str, Any]:
    """A schedule in numbers."""
    numbers = {"step": one.step, "joined": one.joined, "idle": one.idle, "peak": one.peak, "fits": one.fits}
    return {"schedule": one.schedule.name, **numbers}


def table(found: list[Found], best: Found) -> Table:
    """All schedules; the one that is taken is bold, those that do not fit are dim."""
    out = Table(box=None, pad_edge=False, header_style="bold", caption_justify="left")
    for name in ("schedule", "step", "joined", "idle", "memory", "fits"):
        out.add_column(name, justify="left" if name in ("schedule", "fits") else "right", no_wrap=True)
    for one in found:
        style = "bold" if one is best else None if one.fits else "dim"
        numbers = f"{one.step:.4g}", f"{one.joined:.4g}", f"{one.idle:.1%}", size(one.peak)
        out.add_row(one.schedule.name, *numbers, "yes" if one.fits else "no", style=style)
    out.caption = "step: an iteration; joined: one without waiting for all to update; idle: of the least busy device"
    return out


def size(value: float) -> str:
    """Bytes to read.

    >>> size(3 * 2**30), size(12.0)
    ('3.0 GiB', '12')
    """
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB")):
        if value >= 1024**power:
            return f"{value / 1024**power:.1f} {unit}"
    return f"{value:,.4g}"


def drawing(one: Found, to: str) -> str:
    """Its Gantt chart."""
    trace = simulate(one.schedule.plan(one.costs))
    return draw(trace, to) if to == "svg" else draw(trace, tick=max(trace.makespan / 60, float(trace.plan.dur.min())))
