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

TOKEN, OTHER = "a token of ann", "a token of bob"

PUMPS = """
name = "pumps"

[source]
kind = "stdin"
time = "time"

[label]
column = "broken"

[[stage]]
name = "watch"
cell = "pumps:scorer"
key = "pump"
inputs = ["pressure"]

[[stage]]
name = "model"
cell = "pumps:Never"
inputs = ["pressure"]
"""

PUMPS_MODEL = """
import jax.numpy as jnp
from anabranch import Cell
from anabranch.combine import Chain, Map
from anabranch.learn.anomaly import AnomalyLikelihood

def scorer():
    return Chain(Map(lambda event: event.x[0]), AnomalyLikelihood(warm=50))

class Never(Cell):
    def init(self, *, key=None):
        return ()

    def step(self, state, x):
        return state, jnp.float32(0.1)
"""


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
    ann, bob = (hashlib.sha256(token.encode()).hexdigest() for token in (TOKEN, OTHER))
    (tmp_path / "tokens").write_text(f"ann {ann} operator\nbob {bob}\n")
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
    browser.until("!document.getElementById('tiles').hidden && !document.getElementById('main').hidden")

    httpx.post(server.url + "/v1/events", json=events[:1], headers={"Authorization": f"Bearer {OTHER}"})
    browser.js(f"sessionStorage.setItem('token', '{OTHER}')")
    browser.open(server.url)  # who is no operator sees what is theirs
    browser.until(f"{text('name')} == 'recurrent' && document.getElementById('tiles').hidden")
    rows = "[...document.querySelectorAll('#stages tbody td')].map(cell => cell.textContent)"
    assert browser.js(rows) == ["cell", "1"] and browser.js("document.getElementById('charts').hidden")
    assert browser.until("document.querySelector('#recent button')?.firstChild.textContent") == names[0]


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


MARKED = """[...document.querySelectorAll('canvas')].filter(canvas => {
  const {data} = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
  for (let i = 0; i < data.length; i += 4) if (data[i + 3] > 99 && data[i] - data[i + 1] > 120) return true;
}).map(canvas => canvas.closest('figure').querySelector('figcaption').textContent)"""
"""Which charts show marks: these are red, while no line is redder than orange."""


@pytest.fixture(scope="module")
def pumps(tmp_path_factory):
    """A server whose pump 7 will have one odd pressure at 300 s; from 400 s on, its predictions do not hold."""
    folder = tmp_path_factory.mktemp("pumps")
    (folder / "pumps.py").write_text(PUMPS_MODEL)
    server = Process(folder, PUMPS, name="pumps.toml")
    yield server
    server.stop()


def pressures(begin: int, end: int) -> list[dict]:
    usual = lambda t, pump: {"time": t, "pump": pump, "pressure": 10.0 + (t + pump) % 5, "broken": int(t >= 400)}
    rows = [usual(t, pump) for t in range(begin, end) for pump in (6, 7)]
    return [{**row, "pressure": 90.0} if (row["time"], row["pump"]) == (300, 7) else row for row in rows]


def test_alarms_drift_and_what_the_stages_cost(browser, pumps):
    def send(begin, end):
        httpx.post(pumps.url + "/v1/events", json=pressures(begin, end), timeout=60).raise_for_status()
        return httpx.get(pumps.url + "/v1/stats").json()

    stats = send(0, 250)
    assert stats["alarms"] == {"counts": {}, "recent": []}
    browser.open(pumps.url)
    browser.until(f"{text('quality')}.includes('log loss')")
    assert browser.js("document.getElementById('alarms').hidden") and browser.js(MARKED) == []

    for begin in range(250, 500, 25):
        stats = send(begin, begin + 25)
        time.sleep(0.1)
    for stage in stats["keys"].values():  # each row was asked, and told its label
        assert stage["events"] == 2000 and 0 < stage["seconds"] < 60
    *odd, drift = stats["alarms"]["recent"]  # readings are odd for as long as the scorer remembers the first
    assert {(raised["stage"], raised["key"], raised["output"]) for raised in odd} == {("watch", "7", "alarm")}
    assert odd[0]["time"] == 300 and odd[-1]["time"] < 310 and odd[0]["value"] > 0.5
    assert stats["alarms"]["counts"] == {"watch": len(odd), "error": 1}
    assert f'anabranch_alarms{{stage="watch"}} {len(odd)}.0' in httpx.get(pumps.url + "/metrics").text
    assert (drift["stage"], drift["key"], drift["output"]) == ("", "all", "error") and 400 < drift["time"] < 440
    assert drift["before"] < 0.2 and drift["value"] > 0.8

    rows = "[...document.querySelectorAll('#alarms tbody tr')].map(row => [...row.cells].map(cell => cell.textContent))"
    browser.until(f"{rows}.length == {len(odd) + 1}")
    told = [row[1:] for row in browser.js(rows)]
    assert told[0][:2] == ["error of predictions", "all"] and re.fullmatch(r"0\.1\d* → 0\.[89]\d*", told[0][2])
    assert told[-1][:2] == ["watch: alarm", "7"] and told[-1][3] == "300 s"
    browser.until(f"{MARKED}.join('; ') == 'Events per second; Log loss, labels of the last 30 s'")
    took = "[...document.querySelectorAll('#stages tbody tr')].map(row => row.cells[7].textContent)"
    assert all(re.fullmatch(r"[\d.,]+ µs", cell) for cell in browser.js(took))
    browser.open(pumps.url, 360)
    browser.until(f"{rows}.length == {len(odd) + 1}")
    assert browser.js("document.documentElement.scrollWidth") <= 360 and browser.errors() == []


@pytest.fixture(scope="module")
def served_payments(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("payments")
    ordered = sorted((row for row in rows[:600] if isinstance(row.get("time"), float)), key=lambda row: row["time"])
    server = Process(folder, write_payments(folder, ordered).read_text(), name="cards.toml")
    answers = httpx.post(server.url + "/v1/events", json=ordered, timeout=60).json()["results"]
    yield server, sum("error" in answer for answer in answers)
    server.stop()
