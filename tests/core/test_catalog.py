"""The catalog is complete, finds what it is asked for, and derives how far a method is."""

import json
import sys
import types
from dataclasses import replace

import pytest

from anabranch import catalog


@pytest.fixture
def repository(tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "claims" / "results").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_all_methods_are_named_once():
    rows = catalog.methods()
    assert [m.n for m in rows] == list(range(1, 210))
    assert len({m.slug for m in rows}) == 209
    assert all(m.slug.isidentifier() and m.title == m.title.strip() != "" for m in rows)
    assert {m.family for m in rows} == set("apps decide decode flow keep learn route schedule sense trade".split())


def test_one_family():
    assert len(catalog.methods("schedule")) == 25
    assert {m.family for m in catalog.methods("schedule")} == {"schedule"}
    with pytest.raises(LookupError, match="'scedule': apps, decide"):
        catalog.methods("scedule")


def test_find():
    assert catalog.find("bitpipe").family == "schedule"
    with pytest.raises(LookupError, match="did you mean bitpipe"):
        catalog.find("bit_pipe")
    with pytest.raises(LookupError, match=r"no method 'qqqqqq'$"):
        catalog.find("qqqqqq")


def test_status_follows_the_file_and_the_ledger(repository, tmp_path, monkeypatch):
    package = tmp_path / "package"
    (package / "schedule").mkdir(parents=True)
    (package / "catalog.tsv").write_bytes((catalog._HERE / "catalog.tsv").read_bytes())
    monkeypatch.setattr(catalog, "_HERE", package)
    result = repository / "claims" / "results" / "bitpipe.json"
    result.write_text(json.dumps({"slug": "bitpipe", "verdict": "not shown"}))
    assert catalog.find("bitpipe").status == "planned", "a verdict without a file is none"
    (package / "schedule" / "bitpipe.py").touch()
    assert catalog.find("bitpipe").status == "not shown"
    result.with_name("bitpipe.full.json").write_text(json.dumps({"slug": "bitpipe", "verdict": "holds"}))
    assert catalog.find("bitpipe").status == "holds", "a full run takes the place of the normal one"
    monkeypatch.chdir(repository.parent)
    assert catalog.find("bitpipe").status == "file"


def test_example(tmp_path, monkeypatch):
    with pytest.raises(LookupError, match="did you mean bitpipe"):
        catalog.example("bitpip")
    rows = {m.slug: replace(m, status="file") for m in catalog.methods()}
    monkeypatch.setattr(catalog, "find", rows.get)
    module = types.ModuleType("anabranch.schedule.bitpipe")
    monkeypatch.setitem(sys.modules, "anabranch.schedule", types.ModuleType("anabranch.schedule"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    with pytest.raises(LookupError, match="bitpipe defines no `example"):
        catalog.example("bitpipe")
    module.example = lambda: ("cell", "xs")
    assert catalog.example("bitpipe") == ("cell", "xs")
    rows["bitpipe"] = replace(rows["bitpipe"], status="planned")
    with pytest.raises(LookupError, match="no file yet"):
        catalog.example("bitpipe")
