"""What the benchmarks share: runs in turn, medians with their spread, one JSON file each with the machine."""

import hashlib
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

RESULTS = Path(__file__).parent / "results"
T = TypeVar("T")
K = TypeVar("K", bound=Hashable)


def timed(run: Callable[[], T]) -> tuple[T, float]:
    """What `run` gives, and how many seconds it took."""
    start = time.perf_counter()
    result = run()
    return result, time.perf_counter() - start


def in_turn(runs: dict[K, Callable[[], float]], repeats: int = 5) -> dict[K, list[float]]:
    """What each run measures, once a repeat. All take their turn in every repeat, so a slow minute hits all of them."""
    measured: dict[K, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            measured[name].append(run())
    return measured


def spread(values: Iterable[float], digits: int = 4) -> dict[str, float]:
    """Median, least and greatest, to so many significant digits."""
    values = list(values)
    found = {"median": statistics.median(values), "low": min(values), "high": max(values)}
    return {name: float(f"{value:.{digits}g}") for name, value in found.items()}


def ratio(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """Ours over theirs, repeat by repeat."""
    return spread(a / b for a, b in zip(ours, theirs, strict=True))


def resident() -> int:
    """Bytes of memory that are this process's own; pages of mapped files, which the system can drop, do not count."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status says no RssAnon")


def free_cores() -> float:
    """How many cores this process gets at the moment: threads that hash side by side, against one that hashes."""
    cores, data = os.cpu_count() or 1, bytes(50_000_000)
    digest = lambda _: hashlib.sha256(data).digest()
    with ThreadPoolExecutor(cores) as pool:
        spent = in_turn({n: lambda n=n: timed(lambda: list(pool.map(digest, range(n))))[1] for n in (1, cores)}, 3)
    return round(cores * statistics.median(spent[1]) / statistics.median(spent[cores]), 2)


def machine() -> dict[str, Any]:
    """Where this runs, and how busy it is."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        named = (line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line)
        model = next(named, model)
    return {"cpu": model, "cores": os.cpu_count(), "free_cores": free_cores(), "load": round(os.getloadavg()[0], 2)}


def versions(*packages: str) -> dict[str, str]:
    """The installed versions of Python and of these packages."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}


def write(name: str, record: dict[str, Any], *packages: str) -> Path:
    """Write `results/<name>.json`: the record, the machine, the versions of `packages` and the date."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    about = {"machine": machine(), "versions": versions(*packages), "date": datetime.now(UTC).date().isoformat()}
    path.write_text(json.dumps({"bench": name} | record | about, indent=2) + "\n", encoding="utf-8")
    return path
