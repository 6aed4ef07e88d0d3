"""A small stream of card payments: keys, numbers, late labels, rows out of order, and rows that cannot be used."""

import json
import textwrap

import numpy as np
import pytest

CONFIG = """
name = "cards"
batch = {batch}

[source]
kind = "{kind}"
path = "cards.{kind}"
time = "time"
lateness = 30
optional = ["age"]

[label]
column = "fraud"
time = "known"
pending = 500
expire = 900

[[stage]]
name = "card"
cell = "anabranch.layers.recent:Recent"
key = "card"
inputs = ["amount"]
targets = ["fraud"]
time = true
options = {{ half_lives = [60, 600] }}
capacity = 64

[[stage]]
name = "model"
cell = "cards_model:model"
key = ["country"]
inputs = ["card", "amount", "age"]

[sink]
format = "{sink}"
columns = ["card"]

[checkpoint]
events = {every}
keep = 3
{seconds}

[report]
by = "country"
worst = "card"
"""

MODEL = """
import optax
from anabranch.learn.linear import LogisticRegression, Scaled

def model(features):
    return Scaled(LogisticRegression(features, optax.sgd(0.05)))
"""


def payments(n, seed=0):
    """Rows as dicts; some cannot be used."""
    rng = np.random.default_rng(seed)
    time = np.cumsum(rng.exponential(2.0, n)).round(3)
    rows = []
    for i in range(n):
        risk = rng.random()
        row = {
            "id": i,
            "time": float(time[i]),
            "card": f"c{rng.zipf(1.3) % 200}",
            "country": "NO" if rng.random() < 0.5 else "PT",
            "amount": round(float(rng.lognormal(2, 1) * (1 + 9 * risk**3)), 2),
            "age": None if rng.random() < 0.1 else float(rng.integers(18, 90)),
            "fraud": int(risk > 0.8),
            "known": float(time[i] + rng.exponential(60)),
        }
        if rng.random() < 0.02:
            row["fraud"] = row["known"] = None
        rows.append(row)
    for i in range(0, n - 1, 17):  # neighbours change places: late, but not too late
        rows[i], rows[i + 1] = rows[i + 1], rows[i]
    for i, (name, value) in enumerate([
        ("amount", "a lot"), ("amount", None), ("card", None), ("time", "yesterday"), ("fraud", 2), ("amount", "inf"),
        ("time", None),
    ]):  # fmt: skip
        rows[n // 10 * (i + 1)][name] = value
    rows[n * 9 // 10]["time"] = 1.0  # far too late
    return rows


BAD = 8


def write_payments(folder, rows, *, kind="jsonl", sink="parquet", batch=64, every=300, seconds=""):
    """The stream, its model and its pipeline file, in a folder; returns the pipeline file."""
    if kind == "jsonl":
        text = "".join(json.dumps(row) + "\n" for row in rows)
    else:
        names = list(rows[0])
        lines = [",".join("" if row[n] is None else str(row[n]) for n in names) for row in rows]
        text = ",".join(names) + "\n" + "\n".join(lines) + "\n"
    (folder / f"cards.{kind}").write_text(text)
    (folder / "cards_model.py").write_text(textwrap.dedent(MODEL))
    path = folder / "cards.toml"
    path.write_text(CONFIG.format(kind=kind, sink=sink, batch=batch, every=every, seconds=seconds))
    return path


@pytest.fixture(scope="session")
def rows():
    return payments(2000)
