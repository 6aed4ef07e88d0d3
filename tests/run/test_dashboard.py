"""The dashboard, in a real browser, before a server of a cell and a server of a pipeline."""

import hashlib
import itertools
import json
import re
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

httpx = pytest.importorskip("httpx")
pytest.importorskip("uvicorn")
from websockets.sync.client import connect  # noqa: E402

from .conftest import write_payments  # noqa: E402
from .test_server import CELL_FILE, Process  # noqa: E402

if shutil.which("chromium") is None:
    pytest.skip("there is no browser: chromium is not installed", allow_module_level=True)

TOKEN = "a token of ann"


class Browser:
    """A headless Chromium with one page, driven over its DevTools protocol."""

    def __init__(self, folder: Path):
        command = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        log = open(folder / "browser.log", "wb+")
        self.process = subprocess.Popen(
            [*command, "--remote-debugging-port=0", f"--user-data-dir={folder}"], stderr=log
        )
        found, until = None, time.monotonic() + 60
        while found is None and time.monotonic() < until and self.process.poll() is None:
            time.sleep(0.05)
            found = re.search(r"DevTools listening on ws://([\d.:]+)/", (folder / "browser.log").read_text())
        assert found, (folder / "browser.log").read_text()
        pages = [page for page in httpx.get(f"http://{found[1]}/json/list").json() if page["type"] == "page"]
        self.socket = connect(pages[0]["webSocketDebuggerUrl"], max_size=None)
        self.ids, self.told = itertools.count(), []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> dict:
        """The result of a command; what else the browser tells meanwhile is kept."""
        number = next(self.ids)
        self.socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while (said := json.loads(self.socket.recv(timeout=30))).get("id") != number:
            self.told.append(said)
        assert "error" not in said, said
        return said["result"]

    def open(self, url: str, width: int = 1280) -> None:
        self.send("Page.navigate", url="about:blank")  # the page before has no more to tell
        self.told.clear()
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.send("Page.navigate", url=url)

    def js(self, expression: str) -> Any:
        return self.send("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def until(self, expression: str) -> Any:
        """The value of an expression, once it is true."""
        end = time.monotonic() + 30
        while not (value := self.js(expression)):
            assert time.monotonic() < end, f"never: {expression}\n{self.js('document.body.innerText')}"
            time.sleep(0.05)
        return value

    def errors(self) -> list[str]:
        """What the console has shown as an error."""
        self.js("0")
        entries = [said["params"]["entry"] for said in self.told if said["method"] == "Log.entryAdded"]
        logged = [entry["text"] for entry in entries if entry["level"] == "error"]
        thrown = [str(said["params"]) for said in self.told if said["method"] == "Runtime.exceptionThrown"]
        return logged + thrown

    def hosts(self) -> set[str]:
        """Whom the page has asked for something."""
        said = [said["params"] for said in self.told if said["method"] == "Network.requestWillBeSent"]
        return {urlsplit(params["request"]["url"]).netloc for params in said} - {""}  # data: has none

    def close(self) -> None:
        self.socket.close()
        self.process.terminate()
        self.process.wait(20)


class Sender:
    """Sends the same events again and again, beside the test."""

    def __init__(self, url: str, events: list[dict], headers: dict[str, str] | None = None):
        def send():
            while not self.done.wait(0.01):
                httpx.post(url + "/v1/events", json=events, headers=headers)

        self.done = threading.Event()
        self.thread = threading.Thread(target=send)

    def __enter__(self):
        self.thread.start()

    def __exit__(self, *_):
        self.done.set()
        self.thread.join()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()


def text(name: str) -> str:
    return f"document.getElementById('{name}').textContent"


DRAWN = """[...document.querySelectorAll('#charts canvas')].filter(canvas => {
  const {data} = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
  for (let i = 0; i < data.length; i += 4) if (data[i + 3] > 99 && data[i + 2] - data[i] > 90) return true;
}).length"""
"""How many charts show a line: the first is blue, the axes are grey."""


@pytest.fixture
def guarded(tmp_path):
    (tmp_path / "tokens").write_text(f"ann {hashlib.sha256(TOKEN.encode()).hexdigest()}\n")
    server = Process(tmp_path, CELL_FILE.format(cell="", serve='tokens = "tokens"'))
    yield server
    server.stop()


def test_a_cell_is_watched_behind_its_token_until_the_server_is_gone_and_again(browser, guarded):
    server = guarded
    names = ["pump/1?a=%20#<b>", "pump/2"]
    events = [{"stream": name, "x": [0.1, 0.2, 0.3]} for name in names]
    with Sender(server.url, events, {"Authorization": f"Bearer {TOKEN}"}):
        browser.open(server.url)
        for token, then in (("wrong", "refused"), (TOKEN, "main")):
            browser.until("!document.getElementById('login').hidden")
            browser.js(f"document.getElementById('token').value = '{token}'")
            browser.js("document.querySelector('#login button').click()")
            browser.until(f"!document.getElementById('{then}').hidden")
        assert all("401" in error for error in browser.errors())
        browser.told.clear()

        browser.until(f"parseFloat({text('rate')}) > 0 && parseFloat({text('p99')}) > 0")
        assert browser.js(text("name")) == "recurrent" and browser.js(text("keys")) == "2"
        browser.until(f"{DRAWN} == 6")
        listed = "[...document.querySelectorAll('#recent button')]"
        assert sorted(browser.until(f"{listed}.map(b => b.firstChild.textContent)")) == names
        browser.js(f"{listed}.find(b => b.firstChild.textContent == '{names[0]}').click()")
        browser.until("document.querySelectorAll('#watched .u-series').length == 4")  # the number, and three outputs
        assert browser.js("document.querySelector('#watched h3').textContent") == names[0]

    assert browser.js("document.getElementById('banner').hidden") and browser.errors() == []
    server.stop(signal.SIGKILL)
    assert "cannot be reached" in browser.until(f"!document.getElementById('banner').hidden && {text('banner')}")
    server.start()
    browser.until("document.getElementById('banner').hidden")
    browser.open(server.url)  # the token is kept
    browser.until("!document.getElementById('main').hidden")


@pytest.mark.parametrize("width", [1280, 360])
def test_a_pipeline_shows_quality_and_dead_letters_to_any_screen(browser, served_payments, width):
    server, bad = served_payments
    browser.open(server.url, width)
    browser.until(f"{text('quality')}.includes('log loss')")
    stages = "[...document.querySelectorAll('#stages tbody tr')].map(row => row.cells[0].textContent)"
    assert browser.js(stages) == ["card", "model"]
    letters = "[...document.querySelectorAll('#counts .trouble')].map(e => e.textContent)"
    assert browser.js(letters) == [f"dead letters{bad}"]
    assert browser.js("document.getElementById('streams').hidden")
    browser.until("document.querySelectorAll('#charts canvas').length == 6")
    assert browser.js("document.documentElement.scrollWidth") <= width
    assert browser.errors() == []
    assert browser.hosts() == {urlsplit(server.url).netloc}


@pytest.fixture(scope="module")
def served_payments(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("payments")
    ordered = sorted((row for row in rows[:600] if isinstance(row.get("time"), float)), key=lambda row: row["time"])
    server = Process(folder, write_payments(folder, ordered).read_text(), name="cards.toml")
    answers = httpx.post(server.url + "/v1/events", json=ordered).json()["results"]
    yield server, sum("error" in answer for answer in answers)
    server.stop()
