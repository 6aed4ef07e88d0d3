"""What the family's tests share."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def executed():
    """`executed("zb_h1(4, 8)", …)`: what came of running these schedules on virtual devices, by name."""

    def run(*schedules: str) -> dict:
        command = [sys.executable, str(Path(__file__).with_name("executed.py")), *schedules]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run
