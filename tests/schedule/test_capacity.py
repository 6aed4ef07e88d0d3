"""`anabranch capacity`: its answers are consistent, its report can be read, and what cannot be is refused."""

import json
import re

import pytest
from typer.testing import CliRunner

from anabranch.cli import app
from anabranch.schedule import capacity as sizing


@pytest.fixture(autouse=True)
def few_requests(monkeypatch):
    monkeypatch.setattr(sizing, "REQUESTS", 40)


def run(*args):
    said = ["capacity", "--model", "llama-3-8b", "--gpu", "a100-40g", "--gpus", "2", "--trace", "800x60"]
    return CliRunner().invoke(app, [*said, *map(str, args)])


def test_systems_and_placements(tmp_path):
    found = run("--slo", "ttft=1,tbt=0.05", "--out", tmp_path / "report.html")
    assert found.exit_code == 0, found.output
    rates = [float(line.split()[-1]) for line in found.output.splitlines() if re.search(r"\d x ", line)]
    assert len(rates) == 9 and rates == sorted(rates, reverse=True) and rates[0] > 2
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 2 and "DistServe" in page and "http" not in page.replace("http://www.w3.org", "")


def test_tighter_goals_serve_less_and_impossible_ones_nothing():
    rate = lambda slo: json.loads(run("--slo", slo, "--json").output)["found"][0]["rate"]
    assert rate("ttft=1,tbt=0.05") >= rate("ttft=0.5,tbt=0.02") > 0
    assert "no system meets the goals" in run("--slo", "ttft=0.001,tbt=0.001").output


def test_a_workload_of_ones_own(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("arrival,prompt,output\n0,100,5\n1.5,200,7\n")
    assert sizing.read_workload(str(path)).prompt.tolist() == [100, 200]
    for text, said in (
        ("arrival,prompt\n0,1\n", "no column 'output'"),
        ("arrival,prompt,output\n0,x,1\n", "prompt: could not convert"),
        ("arrival,prompt,output\n0,1,0\n", "row 0: output must be at least 1"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=said):
            sizing.read_workload(str(path))


@pytest.mark.parametrize(
    "args, said",
    [
        (["--model", "llama-3-9b"], "no model 'llama-3-9b'; did you mean"),
        (["--gpu", "abacus"], "no gpu 'abacus'"),
        (["--trace", "azure"], "trace must be azure-conv"),
        (["--trace", "nowhere.csv"], "nowhere.csv"),
        (["--slo", "ttft=1"], "slo needs ttft and tbt"),
        (["--slo", "speed=1"], "slo must look like"),
        (["--model", "llama-3-70b", "--gpus", "1"], "the model does not fit on 1 x a100-40g"),
    ],
)
def test_refused(args, said):
    found = run(*args)
    assert found.exit_code == 1 and said in found.output, found.output
