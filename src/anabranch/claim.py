"""Claims: the experiment that shows that a method does what its paper says, and the ledger of what was measured.

A claim is a file `claims/<family>/<slug>.py` with one function, `experiment(size) -> list[Comparison]`. It measures the
method and the baseline that the paper argues against on the same seeds; the threshold is fixed before the run. The
verdict comes from the 95 % interval of the paired differences (or ratios):

    >>> c = Comparison("accuracy", ours=[0.91, 0.93, 0.92], baseline=[0.85, 0.88, 0.86], threshold=0.0)
    >>> [round(v, 3) for v in (c.estimate, *c.interval)]
    [0.057, 0.042, 0.071]
    >>> c.verdict
    'holds'
"""

import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from scipy.special import chdtrc, stdtrit

from anabranch import catalog

Verdict = Literal["holds", "fails", "not shown"]


@dataclass(frozen=True)
class Size:
    """How much an experiment may do: `smoke` at most 5 s, the normal run at most 3 minutes, `full` at most 30."""

    smoke: bool = False
    full: bool = False

    def __post_init__(self):
        if self.smoke and self.full:
            raise ValueError("a run is either smoke or full, got both")

    def __str__(self) -> str:
        return "smoke" if self.smoke else "full" if self.full else "normal"

    def seeds(self, n: int) -> range:
        """The seeds of the experiment: n of them, at most two in a smoke run."""
        return range(min(n, 2) if self.smoke else n)


def chi_square(counts: Any, chances: Any) -> float:
    """The p of a chi-square test that counts are drawn with these chances; cells that expect fewer than 5 are one.

        >>> chi_square([[55, 45]], [[0.5, 0.5]]) > 0.3, chi_square([90, 10], [0.5, 0.5]) < 1e-6
        (True, True)

    Raises:
        ValueError: if there are not as many chances as counts.
    """
    found, expected = np.ravel(counts).astype(float), np.ravel(chances).astype(float) * np.sum(counts)
    if len(found) != len(expected):
        raise ValueError(f"there must be a chance for each count, got {len(expected)} for {len(found)}")
    few = expected < 5
    found, expected = (np.append(x[~few], x[few].sum()) for x in (found, expected))
    there = expected > 0
    if found[~there].any():
        return 0.0
    return float(chdtrc(there.sum() - 1, ((found - expected)[there] ** 2 / expected[there]).sum()))


@dataclass
class Comparison:
    """One metric of a method against its baseline, paired over seeds.

    `kind="difference"` compares `ours - baseline` with `threshold`; `kind="ratio"` compares `ours / baseline`, on
    logarithms, so its values must be positive. With one seed the interval is the point itself.

    Raises:
        ValueError: `ours` and `baseline` are empty, not finite or of different length; a ratio of values that are not
            positive; an unknown `kind` or `better`.
    """

    metric: str
    ours: Sequence[float]
    baseline: Sequence[float]
    threshold: float
    kind: Literal["difference", "ratio"] = "difference"
    better: Literal["higher", "lower"] = "higher"
    paper: str = ""
    """What the paper reports, in its own words and units."""
    note: str = ""

    def __post_init__(self):
        self.ours = [float(v) for v in self.ours]
        self.baseline = [float(v) for v in self.baseline]
        self.threshold = float(self.threshold)
        if self.kind not in ("difference", "ratio"):
            raise ValueError(f'{self.metric}: kind must be "difference" or "ratio", got {self.kind!r}')
        if self.better not in ("higher", "lower"):
            raise ValueError(f'{self.metric}: better must be "higher" or "lower", got {self.better!r}')
        if not self.ours or len(self.ours) != len(self.baseline):
            lengths = f"{len(self.ours)} and {len(self.baseline)} values"
            raise ValueError(f"{self.metric}: ours and baseline must be paired per seed, got {lengths}")
        for name, values in (("ours", self.ours), ("baseline", self.baseline), ("threshold", [self.threshold])):
            bad = [v for v in values if not math.isfinite(v) or (self.kind == "ratio" and v <= 0)]
            if bad:
                wanted = "finite and positive for a ratio" if self.kind == "ratio" else "finite"
                raise ValueError(f"{self.metric}: {name} must be {wanted}, got {bad[0]}")

    @property
    def estimate(self) -> float:
        """The mean difference, or the geometric mean ratio."""
        return self._student()[0]

    @property
    def interval(self) -> tuple[float, float]:
        """The paired Student-t 95 % interval of the difference, or of the ratio (on logarithms)."""
        return self._student()[1:]

    @property
    def verdict(self) -> Verdict:
        """`holds` when the whole interval is on the good side of the threshold, `fails` when none of it is."""
        low, high = self.interval
        if self.better == "lower":
            low, high, threshold = -high, -low, -self.threshold
        else:
            threshold = self.threshold
        return "holds" if low >= threshold else "fails" if high < threshold else "not shown"

    def _student(self) -> tuple[float, float, float]:
        pairs = zip(self.ours, self.baseline, strict=True)
        ratio = self.kind == "ratio"
        deltas = [math.log(a) - math.log(b) if ratio else a - b for a, b in pairs]
        n, mean = len(deltas), statistics.fmean(deltas)
        half = float(stdtrit(n - 1, 0.975)) * statistics.stdev(deltas) / math.sqrt(n) if n > 1 else 0.0
        out = mean, mean - half, mean + half
        return (math.exp(out[0]), math.exp(out[1]), math.exp(out[2])) if ratio else out

    def record(self) -> dict[str, Any]:
        """The comparison as it stands in the ledger."""
        note = self.note
        if len(self.ours) == 1:
            note = f"{note}; one value: no interval" if note else "one value: no interval"
        return {
            "metric": self.metric,
            "ours": self.ours,
            "baseline": self.baseline,
            "kind": self.kind,
            "better": self.better,
            "estimate": self.estimate,
            "interval": list(self.interval),
            "paper": self.paper,
            "threshold": self.threshold,
            "verdict": self.verdict,
            "note": note,
        }


def overall(verdicts: Sequence[str]) -> Verdict:
    """A claim holds if every comparison holds and fails if any fails."""
    if "fails" in verdicts:
        return "fails"
    return "holds" if all(v == "holds" for v in verdicts) else "not shown"


def load(slug: str) -> tuple[str, ModuleType]:
    """The family and the module of a claim: `claims/<family>/<slug>.py` of the repository around the working directory.

    Raises:
        LookupError: not inside a repository, or no such claim.
        ImportError: the file defines no `experiment`.
    """
    root = catalog.repository()
    paths = sorted(root.glob(f"claims/*/{slug}.py"))
    if not paths:
        known = [p.stem for p in root.glob("claims/*/*.py")]
        raise LookupError(f"no claim {slug!r} in {root / 'claims'}{catalog.did_you_mean(slug, known)}")
    path = paths[0]
    spec = importlib.util.spec_from_file_location(f"claims.{path.parent.name}.{slug}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    if not hasattr(module, "experiment"):
        raise ImportError(f"{path} defines no `experiment(size)`")
    return path.parent.name, module


def run(slug: str, smoke: bool = False, full: bool = False) -> dict[str, Any]:
    """Run a claim and, unless it is a smoke run, record it in `claims/results/<slug>.json` (`<slug>.full.json`).

    A claim that raises is not recorded.

    Raises:
        LookupError: not inside a repository, or no such claim.
    """
    size = Size(smoke, full)
    family, module = load(slug)
    start = time.perf_counter()
    comparisons = list(module.experiment(size))
    seconds = time.perf_counter() - start
    if not comparisons:
        raise ValueError(f"the experiment of {slug!r} returned no comparison")
    verdict = overall([c.verdict for c in comparisons])
    title = next((m.title for m in catalog.methods(family) if m.slug == slug), "")
    packages = ("anabranch", "jax", "equinox", "numpy")
    record = {
        "slug": slug,
        "family": family,
        "title": title,
        "comparisons": [c.record() for c in comparisons],
        "verdict": verdict,
        "holds": verdict == "holds",
        "seeds": max(len(c.ours) for c in comparisons),
        "seconds": round(seconds, 1),
        "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in packages},
        "date": datetime.now(UTC).date().isoformat(),
        "size": str(size),
        "command": f"anabranch claim {slug}" + ("" if str(size) == "normal" else f" --{size}"),
    }
    if not smoke:
        _write(catalog.repository() / "claims" / "results" / f"{slug}{'.full' if full else ''}.json", record)
    return record


def _write(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    text = json.dumps(record, indent=2, ensure_ascii=False)
    text = re.sub(
        r'\[\s+([^][{}"]*?)\s+\]', lambda found: "[" + " ".join(found[1].split()) + "]", text
    )  # a list a line
    partial.write_text(text + "\n", encoding="utf-8")
    os.replace(partial, path)


def show(record: dict[str, Any], console: Console | None = None) -> None:
    """Print a record as a table."""
    console = console or Console(width=max(Console().width, 140))  # numbers are not to be broken
    colours = {"holds": "green", "fails": "red", "not shown": "yellow"}
    table = Table(title=escape(f"{record['slug']} · {record['title']}"), title_justify="left")
    for name in ("metric", "ours", "baseline", "ratio / difference [95 %]", "paper", "threshold", "verdict"):
        words = name in ("metric", "paper")
        table.add_column(name, justify="left" if words or name == "verdict" else "right", no_wrap=not words)
    for c in record["comparisons"]:
        sign = "×" if c["kind"] == "ratio" else "Δ"
        bound = "≥" if c["better"] == "higher" else "≤"
        low, high = c["interval"]
        table.add_row(
            escape(c["metric"]),
            f"{statistics.fmean(c['ours']):.4g}",
            f"{statistics.fmean(c['baseline']):.4g}",
            escape(f"{sign} {c['estimate']:.4g} [{low:.4g}, {high:.4g}]"),
            escape(c["paper"]),
            f"{bound} {c['threshold']:.4g}",
            f"[{colours[c['verdict']]}]{c['verdict']}",
        )
    console.print(table)
    for c in record["comparisons"]:
        if c["note"]:
            console.print(f"{c['metric']}: {c['note']}", markup=False)
    kept = "not recorded" if record["size"] == "smoke" else "recorded"
    console.print(
        f"[{colours[record['verdict']]}]{record['verdict']}[/] · {record['seeds']} seeds · "
        f"{record['seconds']} s · {record['size']} run, {kept}"
    )
