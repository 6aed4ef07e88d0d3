"""The catalog: every method that Anabranch names, and how far each one is.

>>> len(methods())
209
>>> find("bitpipe").family
'schedule'
>>> find("bitpip")
Traceback (most recent call last):
LookupError: no method 'bitpip'; did you mean bitpipe?
"""

import csv
import difflib
import importlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Method:
    """One row of the catalog."""

    n: int
    family: str
    slug: str
    title: str
    """The title of the paper."""
    status: str
    """`"planned"` (named only), `"file"` (its module exists), or the verdict of its recorded claim: `"holds"`,
    `"fails"`, `"not shown"`. Verdicts are known inside a repository only."""


def methods(family: str | None = None) -> list[Method]:
    """All methods, or those of one family.

    Raises:
        LookupError: no such family.
    """
    with open(_HERE / "catalog.tsv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    families = {row["family"] for row in rows}
    if family is not None and family not in families:
        raise LookupError(f"no family {family!r}: {', '.join(sorted(families))}")
    verdicts = {slug: record["verdict"] for slug, record in ledger().items()}
    return [
        Method(int(row["n"]), row["family"], row["slug"], row["title"], _status(row["family"], row["slug"], verdicts))
        for row in rows
        if family in (None, row["family"])
    ]


def find(slug: str) -> Method:
    """The method of that slug.

    Raises:
        LookupError: no such method; the message names the nearest slugs.
    """
    known = methods()
    for method in known:
        if method.slug == slug:
            return method
    raise LookupError(f"no method {slug!r}{did_you_mean(slug, [m.slug for m in known])}")


def example(slug: str) -> tuple[Any, Any]:
    """`(cell, xs)`: what the module of a method offers as an example, a small cell and a stream for it.

    Raises:
        LookupError: no such method, it has no file yet, or its module defines no `example()`.
    """
    method = find(slug)
    if method.status == "planned":
        raise LookupError(f"{slug} has no file yet: anabranch/{method.family}/{slug}.py")
    module = importlib.import_module(f"anabranch.{method.family}.{slug}")
    if not hasattr(module, "example"):
        raise LookupError(f"{module.__name__} defines no `example() -> (cell, xs)`")
    return module.example()


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of an error message: the known words nearest to `word`, or nothing."""
    near = difflib.get_close_matches(word, list(known))
    return f"; did you mean {' or '.join(near)}?" if near else ""


def repository(start: Path | None = None) -> Path:
    """The nearest folder, from the working directory upwards, that has `claims/` and `pyproject.toml`.

    Raises:
        LookupError: there is none.
    """
    start = (start or Path.cwd()).resolve()
    for folder in (start, *start.parents):
        if (folder / "claims").is_dir() and (folder / "pyproject.toml").is_file():
            return folder
    raise LookupError(f"{start} is not inside a checkout of the repository (a folder with claims/ and pyproject.toml)")


def ledger() -> dict[str, dict]:
    """What claims have recorded, by slug; empty outside a repository. A full run takes the place of the normal one."""
    try:
        results = repository() / "claims" / "results"
    except LookupError:
        return {}
    paths = sorted(results.glob("*.json"), key=lambda path: path.name.endswith(".full.json"))
    return {(record := json.loads(path.read_text(encoding="utf-8")))["slug"]: record for path in paths}


def _status(family: str, slug: str, verdicts: dict[str, str]) -> str:
    if not (_HERE / family / f"{slug}.py").is_file():  # looked up as a file: importing a family may be slow
        return "planned"
    return verdicts.get(slug, "file")
