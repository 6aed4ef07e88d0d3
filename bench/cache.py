"""Requests a second of the caches by key, against cachetools, on one real trace.

Ours: the whole trace in one compiled scan. cachetools: the loop its users write. Both count the same hits, or the run
stops. Median of five repeats, ours and theirs in turn. `python bench/cache.py [--smoke]`, ANABRANCH_DATA set; writes
`bench/results/cache.json`.
"""

import argparse
import csv
import importlib.metadata
import json
import os
import platform
import statistics
import time
from datetime import UTC, datetime
from pathlib import Path

import cachetools
import jax
import numpy as np

from anabranch import data
from anabranch.keep.base import ARC, FIFO, GDSF, LFU, LRU, S3FIFO, requests

PEER = {FIFO: cachetools.FIFOCache, LRU: cachetools.LRUCache, LFU: cachetools.LFUCache}


def theirs(cls, capacity: int, keys: list[int]) -> int:
    """Hits of a cachetools cache."""
    held, hits = cls(capacity), 0
    for key in keys:
        try:
            held[key]
            hits += 1
        except KeyError:
            held[key] = True
    return hits


def seconds(run) -> tuple[int, float]:
    start = time.perf_counter()
    hits = int(run())
    return hits, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a short prefix, nothing written")
    smoke = parser.parse_args().smoke
    with (data.root() / "cache" / "cloudPhysicsIO.csv").open() as file:
        keys = [int(row["lbn"]) for row in csv.DictReader(file)][: 2000 if smoke else None]
    xs = requests(np.array(keys))

    rows = []
    for capacity in (500,) if smoke else (500, 2000, 5000):
        for cls in (FIFO, LRU, LFU, GDSF, ARC, S3FIFO):
            cell = cls(capacity)
            scan = jax.jit(lambda xs, cell=cell: cell.advance(cell.init(), xs)[1].hit.sum())
            scan(xs).block_until_ready()
            times, hits = {"ours": [], "cachetools": []}, set()
            for _ in range(2 if smoke else 5):
                found, spent = seconds(lambda scan=scan: scan(xs))
                hits.add(found)
                times["ours"].append(spent)
                if cls in PEER:
                    found, spent = seconds(lambda cls=cls, capacity=capacity: theirs(PEER[cls], capacity, keys))
                    hits.add(found)
                    times["cachetools"].append(spent)
            if len(hits) != 1:
                raise RuntimeError(f"{cls.__name__}({capacity}): the hits differ: {sorted(hits)}")
            rate = {name: round(len(keys) / statistics.median(t)) for name, t in times.items() if t}
            rows.append({"cache": cls.__name__, "capacity": capacity, "hits": hits.pop(), "requests_per_second": rate})
            print(f"{cls.__name__:8}{capacity:6}", *(f"{name} {value:,}/s" for name, value in rate.items()), sep="  ")

    if not smoke:
        record = {
            "bench": "cache",
            "trace": "cloudPhysicsIO",
            "requests": len(keys),
            "repeats": 5,
            "rows": rows,
            "cpus": os.cpu_count(),
            "versions": {"python": platform.python_version()}
            | {name: importlib.metadata.version(name) for name in ("anabranch", "jax", "cachetools")},
            "date": datetime.now(UTC).date().isoformat(),
        }
        path = Path(__file__).parent / "results" / "cache.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
