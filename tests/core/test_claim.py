"""Verdicts by hand-computed intervals, and what is and is not written into the ledger."""

import json
import math

import pytest
from rich.console import Console

from anabranch import catalog, claim
from anabranch.claim import Comparison, Size

CLAIM = """
from anabranch.claim import Comparison, Size

def experiment(size: Size):
    seeds = list(size.seeds(4))
    return [Comparison("score", [1.0 + 0.01 * s for s in seeds], [0.5 for s in seeds], 0.25, paper="+0.3 [table 2]")]
"""


@pytest.fixture
def repository(tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "claims" / "schedule").mkdir(parents=True)
    (tmp_path / "claims" / "schedule" / "bitpipe.py").write_text(CLAIM)
    inside = tmp_path / "docs" / "deep"
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    return tmp_path


def test_interval_of_a_difference_is_students():
    # Differences 1, 2, 3, 4: mean 2.5, sd sqrt(5/3), t(0.975, 3) = 3.182446.
    c = Comparison("m", [2, 4, 6, 8], [1, 2, 3, 4], 0.0)
    half = 3.182446305 * math.sqrt(5 / 3) / 2
    assert c.estimate == 2.5
    assert c.interval == pytest.approx((2.5 - half, 2.5 + half), rel=1e-8)


def test_interval_of_a_ratio_is_on_logarithms():
    # Ratios 2 and 8: geometric mean 4, log sd = ln 4 / sqrt 2, t(0.975, 1) = 12.7062.
    c = Comparison("m", [2, 16], [1, 2], 1.0, kind="ratio")
    half = 12.7062047 * (math.log(4) / math.sqrt(2)) / math.sqrt(2)
    assert c.estimate == pytest.approx(4)
    assert c.interval == pytest.approx((4 * math.exp(-half), 4 * math.exp(half)), rel=1e-6)


@pytest.mark.parametrize(
    "threshold, better, verdict",
    [
        (0.4, "higher", "holds"),
        (2.5, "higher", "not shown"),
        (4.6, "higher", "fails"),
        (4.6, "lower", "holds"),
        (2.5, "lower", "not shown"),
        (0.4, "lower", "fails"),
    ],
)
def test_verdict(threshold, better, verdict):
    assert Comparison("m", [2, 4, 6, 8], [1, 2, 3, 4], threshold, better=better).verdict == verdict  # 0.446 to 4.554


@pytest.mark.parametrize("better", ["higher", "lower"])
def test_a_point_on_the_threshold_holds(better):
    c = Comparison("m", [3.0], [2.0], 1.0, better=better)
    assert c.interval == (1.0, 1.0) and c.verdict == "holds" and "no interval" in c.record()["note"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(ours=[], baseline=[]), "paired"),
        (dict(ours=[1.0], baseline=[1.0, 2.0]), "1 and 2"),
        (dict(ours=[math.nan], baseline=[1.0]), "ours must be finite, got nan"),
        (dict(ours=[1.0], baseline=[0.0], kind="ratio"), "baseline must be finite and positive for a ratio, got 0"),
        (dict(ours=[1.0], baseline=[1.0], kind="times"), "kind"),
        (dict(ours=[1.0], baseline=[1.0], better="more"), "better"),
    ],
)
def test_bad_comparisons_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        Comparison("m", threshold=1.0, **arguments)


def test_overall_verdict():
    assert claim.overall(["holds", "holds"]) == "holds"
    assert claim.overall(["holds", "not shown"]) == "not shown"
    assert claim.overall(["not shown", "fails", "holds"]) == "fails"


def test_size():
    assert list(Size(smoke=True).seeds(5)) == [0, 1] and list(Size().seeds(5)) == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="either"):
        Size(smoke=True, full=True)


def test_run_writes_the_ledger(repository):
    record = claim.run("bitpipe")
    path = repository / "claims" / "results" / "bitpipe.json"
    assert json.loads(path.read_text()) == record
    assert (record["family"], record["verdict"], record["holds"], record["seeds"]) == ("schedule", "holds", True, 4)
    assert record["title"] == catalog.find("bitpipe").title != ""
    assert set(record["versions"]) == {"anabranch", "python", "jax", "equinox", "numpy"}
    assert record["size"] == "normal" and record["command"] == "anabranch claim bitpipe"
    full = claim.run("bitpipe", full=True)
    assert json.loads(path.with_name("bitpipe.full.json").read_text()) == full
    assert json.loads(path.read_text()) == record, "a full run leaves the normal record alone"
    assert catalog.ledger()["bitpipe"] == full


def test_smoke_is_never_recorded(repository):
    assert claim.run("bitpipe", smoke=True)["seeds"] == 2
    assert not (repository / "claims" / "results").exists()


def test_a_claim_that_raises_is_not_recorded(repository):
    (repository / "claims" / "schedule" / "broken.py").write_text("def experiment(size):\n    raise RuntimeError('no')")
    (repository / "claims" / "schedule" / "empty.py").write_text("def experiment(size):\n    return []")
    with pytest.raises(RuntimeError, match="no"):
        claim.run("broken")
    with pytest.raises(ValueError, match="'empty' returned no comparison"):
        claim.run("empty")
    assert not (repository / "claims" / "results").exists()


def test_lookup_errors_help(repository, tmp_path_factory, monkeypatch):
    with pytest.raises(LookupError, match="did you mean bitpipe"):
        claim.run("bitpip")
    (repository / "claims" / "schedule" / "nothing.py").write_text("x = 1")
    with pytest.raises(ImportError, match="experiment"):
        claim.run("nothing")
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    with pytest.raises(LookupError, match="not inside a checkout"):
        claim.run("bitpipe")


def test_show_prints_what_the_record_says(repository):
    console = Console(width=200, record=True, quiet=False, file=open("/dev/null", "w"))
    claim.show(claim.run("bitpipe", smoke=True), console)
    text = console.export_text()
    for words in ("score", "1.005", "0.5", "Δ 0.505 [", "+0.3 [table 2]", "≥ 0.25", "holds", "not recorded"):
        assert words in text, words
