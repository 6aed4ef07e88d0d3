"""SIGKILL at random moments: what is on the disk afterwards equals an undisturbed run, row for row and bit for bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pyarrow.parquet as pq

from .conftest import payments, write_payments

KILLS = 20
# The stream is slowed down, so that it lasts longer than the process takes to start, and says when it has begun.
SLOW = """
import sys, time
from pathlib import Path
from anabranch.run import config, pipeline

path, out, pause = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
made = pipeline.Pipeline(config.read(path).model_copy(update={"out": out}), path.parent)
process = made._process

def slowly(rows, now):
    if made.batches == 0 or not getattr(made, "said", False):
        made.said = True
        print("begun", flush=True)
    process(rows, now)
    time.sleep(pause)

made._process = slowly
summary = made.run(resume=True)
print("end", flush=True)
"""


def start(path, out, pause):
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", SLOW, str(path), str(out), str(pause)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def test_sigkill_at_random_moments(tmp_path):
    rows = payments(6000, seed=3)
    path = write_payments(tmp_path, rows, batch=32, every=160)
    calm = start(path, tmp_path / "calm", 0)
    assert "end" in calm.communicate(timeout=300)[0]
    chance = random.Random(7)
    kills = 0
    for _ in range(KILLS):
        process = start(path, tmp_path / "out", 0.01)
        assert process.stdout is not None
        line = process.stdout.readline()
        if line == "begun\n":
            time.sleep(chance.uniform(0, 0.25))
            process.send_signal(signal.SIGKILL)
            kills += process.wait() == -signal.SIGKILL
        process.stdout.close()
        process.communicate()
    assert kills == KILLS, "the stream must be long enough for every kill to hit it"
    last = start(path, tmp_path / "out", 0)
    said, errors = last.communicate(timeout=300)
    assert "end" in said, errors
    for name in ("predictions", "outcomes"):
        found, expected = (pq.read_table(tmp_path / out / name) for out in ("out", "calm"))
        assert found.num_rows == expected.num_rows and found.equals(expected)
    found, expected = (
        sorted(json.loads(line)["row"] for line in (tmp_path / out / "dead_letters.jsonl").read_text().splitlines())
        for out in ("out", "calm")
    )
    assert found == expected
