"""The command line, as a person or a script would use it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from anabranch.cli import app
from tests.run.conftest import payments, write_payments

RUN = CliRunner()
CLAIMS = Path(__file__).parent.parent / "claims"


def call(*args, code=0):
    result = RUN.invoke(app, list(map(str, args)))
    assert result.exit_code == code, (result.output, result.exception)
    return result


def test_help_lists_the_commands():
    out = call("--help").output
    for name in ("run", "methods", "check", "claim", "bench", "train"):
        assert name in out


def test_methods():
    found = json.loads(call("methods", "--json").output)
    assert len(found) == 209 and {"family", "slug", "title", "status"} <= set(found[0])
    trade = json.loads(call("methods", "--family", "trade", "--json").output)
    assert trade and {m["family"] for m in trade} == {"trade"}
    assert "payment_routing" in call("methods", "--family", "decide").output
    assert "nofamily" in call("methods", "--family", "nofamily", code=1).output


def test_unknown_slugs_get_a_suggestion():
    for command in ("check", "claim"):
        assert "payment_routing" in call(command, "payment_rooting", code=1).output


def test_check():
    report = json.loads(call("check", "caching_multiplexing", "--json").output)
    assert report["ok"] and len(report["rows"]) == 8


# Their smoke runs still take tens of seconds, most of it compiling; run them by hand.
LONG = {
    "class_incremental_moe", "division", "dual_precision", "fair_submodular", "flash_vstream", "infinipot_v", "kvshare",
    "mirror_sd", "streamingvlm", "tetris", "timechat_online",
}  # fmt: skip


@pytest.mark.parametrize("slug", sorted({path.stem for path in CLAIMS.glob("*/*.py")} - LONG))
def test_claims_run_in_smoke_size_and_record_nothing(slug, data):
    ledger = CLAIMS / "results"
    before = {p: p.read_bytes() for p in ledger.glob("*.json")}
    result = RUN.invoke(app, ["claim", slug, "--smoke", "--json"])
    if isinstance(result.exception, ImportError) and "pip install" in str(result.exception):
        pytest.skip(str(result.exception))  # it needs an extra that is not here
    assert result.exit_code == 0, (result.output, result.exception)
    record = json.loads(result.output.splitlines()[-1])
    assert record["slug"] == slug and record["comparisons"] and record["verdict"] in ("holds", "fails", "not shown")
    assert before == {p: p.read_bytes() for p in ledger.glob("*.json")}


def test_run_prints_figures_and_writes_a_report(tmp_path):
    path = write_payments(tmp_path, payments(1000))
    result = call("run", path, "--out", tmp_path / "out", "--json")
    figures = json.loads(result.output.splitlines()[-1])
    assert {"events", "seconds", "events_per_s", "keys", "dead_letters", "metrics", "checkpoint"} <= set(figures)
    assert figures["events"] + figures["dead_letters"] == 1000
    report = (tmp_path / "out/report.html").read_text()
    assert "<svg" in report and "http" not in report.replace("http://www.w3.org", "")
    text = call("run", path, "--out", tmp_path / "out", "--resume").output
    assert "992 events" in text and "AUC" in text
    assert call("run", path, "--out", tmp_path / "out", "--limit", "0", code=2)


def test_errors_are_one_line_and_exit_with_1(tmp_path):
    path = write_payments(tmp_path, payments(10))
    path.write_text(path.read_text().replace("batch = 64", "batch = -1"))
    result = call("run", path, code=1)
    assert "cards.toml: 1 mistake" in result.output and "batch" in result.output and "Traceback" not in result.output
    assert "no such pipeline file" in call("run", tmp_path / "none.toml", code=1).output


def test_rows_from_standard_input(tmp_path):
    path = write_payments(tmp_path, payments(300))
    text = path.read_text().replace('kind = "jsonl"', 'kind = "stdin"').replace('path = "cards.jsonl"\n', "")
    path.write_text(text)
    command = [sys.executable, "-m", "anabranch.cli", "run", str(path), "--out", str(tmp_path / "out"), "--json"]
    rows = (tmp_path / "cards.jsonl").read_text() + "not json\n[1]\n"
    done = subprocess.run(command, input=rows, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["events"] + figures["dead_letters"] == 302
    letters = [json.loads(line) for line in (tmp_path / "out/dead_letters.jsonl").read_text().splitlines()]
    assert [x["row"] for x in letters if x["reason"].startswith("not a JSON object")] == [300, 301]
