"""The documentation runs: the pages' blocks and commands, and the examples in the docstrings.

The Python blocks of a page run in order in one namespace, in a temporary folder. A block with a title is a file: it is
written there under that name. Commands in `console` blocks run too, as far as they are Anabranch's. TOML blocks must be
what a pipeline file may say: whole ones by themselves, others as parts of one.
"""

import doctest
import importlib
import pkgutil
import re
import shlex
import sys
import tomllib
import types
from pathlib import Path
from typing import NamedTuple

import pytest
from typer.testing import CliRunner

import anabranch
from anabranch.cli import app
from anabranch.run.config import PipelineConfig, ServedCellFile, ServedModelFile

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.glob("*.md") if path.name != "methods.md")  # that one is generated
MODULES = ["anabranch", *(module.name for module in pkgutil.walk_packages(anabranch.__path__, "anabranch."))]
FENCE = re.compile(r"^```(\w*)(?: title=\"([^\"]+)\")?[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LEAST = {
    "name": "least",
    "source": {"kind": "stdin", "time": "time"},
    "label": {"column": "label"},
    "stage": [{"name": "first", "cell": "module:cell"}],
}
"""A pipeline that a part of one is put into to be checked."""


class Fence(NamedTuple):
    """A fenced block of a page."""

    language: str
    title: str | None
    text: str
    line: int
    """On which its text begins."""


def fences(page: Path) -> list[Fence]:
    text = page.read_text(encoding="utf-8")
    return [Fence(m[1], m[2], m[3], text.count("\n", 0, m.start(3)) + 1) for m in FENCE.finditer(text)]


@pytest.fixture
def namespace(tmp_path, monkeypatch):
    """An empty module, in an empty working directory from which modules can be imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    before, module = set(sys.modules), types.ModuleType("page")
    sys.modules["page"] = module  # where classes that are defined on the page say they come from
    yield vars(module)
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None)
        if name == "page" or (file and Path(file).is_relative_to(tmp_path)):
            del sys.modules[name]


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.name)
def test_page(page, namespace):
    for fence in fences(page):
        where = f"{page.name}, line {fence.line}"
        if fence.title is not None:
            Path(fence.title).write_text(fence.text, encoding="utf-8")
        if fence.language == "python" and fence.title is None:
            code = "\n" * (fence.line - 1) + fence.text  # so that a traceback shows the line of the page
            try:
                exec(compile(code, str(page), "exec"), namespace)
            except ModuleNotFoundError as error:
                if (error.name or "").startswith("anabranch"):
                    raise
                pytest.skip(f"{where} needs {error.name}")
        elif fence.language == "toml":
            check_toml(tomllib.loads(fence.text))
        elif fence.language == "console":
            for command in re.findall(r"^\$ anabranch (.*)$", fence.text, re.MULTILINE):
                result = CliRunner().invoke(app, shlex.split(command, comments=True))
                assert result.exit_code == 0, f"{where}: anabranch {command}\n{result.output}\n{result.exception}"


def check_toml(said: dict) -> None:
    if "cell" in said:
        ServedCellFile.model_validate(said)
        return
    if "model" in said:
        ServedModelFile.model_validate(said)
        return
    whole = "source" in said and "stage" in said
    PipelineConfig.model_validate(said if whole else LEAST | said)


def test_every_page_has_something_that_runs():
    idle = {"reference.md", "adding.md"}
    for page in PAGES:
        assert page.name in idle or any(fence.language == "python" for fence in fences(page)), page.name


def test_every_page_is_in_the_navigation():
    pages = re.findall(r"[\w-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert sorted(pages) == sorted({*(page.name for page in PAGES), "methods.md"})


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name):
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "anabranch").startswith("anabranch"):
            raise
        pytest.skip(f"{name} needs {error.name}")
    results = doctest.testmod(module)
    assert results.failed == 0, f"{results.failed} of {results.attempted} examples fail"
