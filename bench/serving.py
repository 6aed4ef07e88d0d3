"""Streams that are served: steps a second of a GRU(128), by Anabranch and by what people serve models with.

1, 100 and 1,000 streams each send their next event, 16 numbers, when the last is answered. All servers have the same
random weights; the answers of some streams are compared with a scan over their inputs, and the benchmark stops if they
differ by 1e-4. The servers, each a process of its own on this machine:

* Anabranch, by frames of bytes with events of many streams, by a WebSocket for each stream, and by HTTP with JSON; the
  journal off, as none of the others has one, and once more on.
* LitServe and Ray Serve, by HTTP, their batching tuned on 1,000 streams, the states of all streams in the one worker.
* A loop for each connection, by a WebSocket for each stream, its state in the handler.

The peers step the same cell, jitted, in batches padded to compiled sizes. What the load itself can do is measured
against an echo. Then the engine alone: `Keyed` with 1,000 streams a call, and what of the machine it uses.

`python bench/serving.py [--smoke] [--repeats 3] [--seconds 4]` writes `bench/results/serving.json`.
"""

import argparse
import base64
import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from anabranch.run.keyed import Keyed
from common import RESULTS, in_turn, machine, ratio, spread, timed, write
from serving_peers import client, model
from serving_peers.client import Load, Route, drive, post

PEERS = Path(__file__).parent / "serving_peers"
STREAMS = (1, 100, 1000)
CONNECTIONS = 4
"""That share all streams where messages hold events of many."""
TARGET, ENGINE_TARGET = 5.0, 500_000
PACKAGES = ("anabranch", "jax", "litserve", "ray", "starlette", "uvicorn", "uvloop", "websockets")


class Served(NamedTuple):
    """A server, and the ways in which it is spoken to."""

    command: list[str]
    ready: bytes | str
    """What is asked until it answers: a path, or the body of an event."""
    routes: dict[str, Route]


def _number(i: int) -> slice:
    return slice(68 * i + 4, 68 * i + 68)


FRAMES = Route(
    lambda names, xs: b"".join(
        len(name).to_bytes(2, "little") + b"\0" + name.encode() + x.tobytes() for name, x in zip(names, xs)
    ),
    lambda said, i: said[_number(i)],
    path=lambda name: "/v1/stream",
    connections=CONNECTIONS,
)
SOCKETS = Route(
    lambda names, xs: xs[0].tobytes(),
    lambda said, i: said[_number(0)],
    path=lambda name: f"/v1/stream/{name}",
    greetings=1,
)
JSON = Route(
    lambda names, xs: post(
        "/v1/events", json.dumps({"stream": names[0], "x": [round(float(v), 3) for v in xs[0]]}).encode()
    ),
    lambda said, i: np.array(json.loads(said)["y"], np.float32).tobytes(),
)
LITSERVE = Route(
    lambda names, xs: post(
        "/predict", json.dumps({"stream": names[0], "x": base64.b64encode(xs[0].tobytes()).decode()}).encode()
    ),
    lambda said, i: base64.b64decode(json.loads(said)),
)
RAY = Route(
    lambda names, xs: post("/", xs[0].tobytes() + names[0].encode(), "application/octet-stream"),
    lambda said, i: said,
)
LOOP = Route(lambda names, xs: xs[0].tobytes(), lambda said, i: said, path=lambda name: "/stream")


def anabranch(folder: Path, durable: bool) -> Served:
    """Ours, with the journal on or off."""
    file = folder / "cell.toml"
    (folder / "model.py").write_text((PEERS / "model.py").read_text())
    file.write_text(
        '[cell]\nname = "gru"\ncell = "model:make"\ninput = "float32[16]"\ncapacity = 65_536\n'
        f"[serve]\ndurable = {str(durable).lower()}\n"
    )
    routes = {"frames": FRAMES, "WebSockets": SOCKETS, "HTTP": JSON}
    return Served([sys.executable, "-m", "anabranch.cli", "serve", str(file)], "/readyz", routes)


def peer(name: str, ready: bytes | str, routes: dict[str, Route], **options: Any) -> Served:
    """The server in `serving_peers/`, with these options."""
    said = [f"--{option.replace('_', '-')}={value}" for option, value in options.items()]
    return Served([sys.executable, str(PEERS / f"{name}_server.py"), *said], ready, routes)


def litserve(**tuned: Any) -> Served:
    return peer("litserve", "/health", {"HTTP": LITSERVE}, **tuned)


def ray(**tuned: Any) -> Served:
    return peer("ray", bytes(64) + b"probe", {"HTTP": RAY}, **tuned)


def loop() -> Served:
    return peer("loop", "/readyz", {"WebSockets": LOOP})


def echo(route: Route, answer: bytes) -> Served:
    """An echo for messages of this route: what the load can do at most."""
    names, xs = ["00000000"], [client.INPUTS[0]]
    if route.connections is not None:
        each = -(-STREAMS[-1] // route.connections)
        names, xs = names * each, xs * each
    message = route.message(names, xs)
    size = len(message if route.path is None else client.frame(message))
    return peer("echo", "", {"": route._replace(greetings=0)}, size=size, answer=answer.hex())


@contextlib.contextmanager
def running(served: Served) -> Iterator[int]:
    """The server, at a port."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with tempfile.TemporaryFile() as log, tempfile.TemporaryDirectory() as folder:
        command = [*served.command, "--port", str(port)]
        env = os.environ | {"PYTHONPATH": str(PEERS)}
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, env=env, start_new_session=True)
        try:
            for _ in range(1200):
                if process.poll() is not None:
                    log.seek(0)
                    raise RuntimeError(f"{command} has ended: {log.read().decode()[-2000:]}")
                with contextlib.suppress(OSError):
                    _ask(port, served.ready)
                    break
                time.sleep(0.1)
            yield port
        finally:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # LitServe leaves its workers behind
            process.wait()


def _ask(port: int, ready: bytes | str) -> None:
    if not ready:
        socket.create_connection(("127.0.0.1", port)).close()
    elif isinstance(ready, str):
        urllib.request.urlopen(f"http://127.0.0.1:{port}{ready}").read()
    else:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/", ready).read()


_cell = model.make()
_scan = jax.jit(lambda xs: jax.lax.scan(lambda state, x: _cell.step(state, x), _cell.init(), xs)[1])


def check(name: str, load: Load) -> float:
    """How far the kept answers are from a scan over the same inputs, at most.

    Raises:
        SystemExit: if that is more than 1e-4.
    """
    worst = 0.0
    for first, answers in load.kept.items():
        xs = client.INPUTS[(first + np.arange(client.KEPT)) % client.CYCLE]
        expected = np.asarray(_scan(xs))[: len(answers)]
        worst = max(worst, float(np.abs(np.frombuffer(b"".join(answers), np.float32).reshape(-1, 16) - expected).max()))
    if not worst < 1e-4:
        raise SystemExit(f"{name}: the answers are off by {worst}")
    return worst


def tune(make, grid: list[dict[str, Any]], streams: int, seconds: float) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The options of a peer with which it makes most steps a second of so many streams, and what each has made."""
    found = []
    for options in grid:
        served = make(**options)
        with running(served) as port:
            (route,) = served.routes.values()
            load = drive(route, port, streams, "t", seconds, seconds / 2)
        found.append(options | {"steps_per_second": round(load.steps_per_second)})
        print(make.__name__, found[-1], flush=True)
    best = max(found, key=lambda options: options["steps_per_second"])
    return {name: best[name] for name in grid[0]}, found


def once(servers: dict[str, Served], numbers: tuple[int, ...], seconds: float) -> dict[tuple[str, int], Load]:
    """What every server makes by every route, for each number of streams, one server after the other."""
    found = {}
    for name, served in servers.items():
        with running(served) as port:
            for way, route in served.routes.items():
                for streams in numbers:
                    load = drive(route, port, streams, f"{way[0]}{streams}.", seconds, seconds / 2)
                    label = f"{name}, {way}"
                    check(label, load)
                    found[label, streams] = load
                    print(label, streams, f"{load.steps_per_second:.0f}/s", f"{load.p50_ms:.2f} ms", flush=True)
    return found


def ceilings(seconds: float) -> dict[str, int]:
    """Steps a second of the load itself, 1,000 streams, against an echo."""
    say = b"HTTP/1.1 200 OK\r\nContent-Length: 64\r\n\r\n" + bytes(64)
    each = 68 * STREAMS[-1] // CONNECTIONS
    answers = {
        "frames": (FRAMES, b"\x82\x7e" + each.to_bytes(2) + bytes(each)),
        "WebSockets": (LOOP, b"\x82\x40" + bytes(64)),
        "HTTP": (RAY, say),
    }
    found = {}
    for name, (route, answer) in answers.items():
        served = echo(route, answer)
        with running(served) as port:
            found[name] = round(drive(served.routes[""], port, STREAMS[-1], "000", seconds, 0.5).steps_per_second)
    return found


def engine(repeats: int) -> dict[str, Any]:
    """`Keyed` alone, 1,000 streams a call, in both forms and as it chooses; the bare batched step; a matrix product."""
    cell, n = model.make(), STREAMS[-1]
    keys, xs = [f"s{i}" for i in range(n)], client.INPUTS[np.arange(n) % client.CYCLE]
    flops = 2 * (model.INPUTS + model.WIDTH) * 3 * model.WIDTH + 2 * model.WIDTH * model.OUTPUTS
    keyed = {form: Keyed(cell, 4096, form=form) for form in ("loop", "waves", None)}
    bare = jax.jit(jax.vmap(lambda state, x: cell.step(state, x)))
    states, square = jnp.zeros((n, model.WIDTH)), jnp.ones((2048, 2048))
    product = jax.jit(jnp.matmul)
    runs = {
        **{f"Keyed, {form or 'as it chooses'}": lambda k=k: k(keys, xs) for form, k in keyed.items()},
        "batched step alone": lambda: np.asarray(bare(states, xs)[1]),
        "product of 2048 x 2048": lambda: product(square, square).block_until_ready(),
    }
    for run in runs.values():
        run()
    calls = 50
    took = in_turn(
        {k: lambda r=r: timed(lambda: [r() for _ in range(calls)])[1] / calls for k, r in runs.items()}, repeats
    )
    limit = 2 * 2048**3 / statistics.median(took.pop("product of 2048 x 2048"))
    steps = {name: spread([n / seconds for seconds in all]) for name, all in took.items()}
    reached = steps["Keyed, as it chooses"]["median"]
    return {
        "steps_per_second": steps,
        "flops_of_a_step": flops,
        "machine_gflops": round(limit / 1e9, 1),
        "limit_steps_per_second": round(limit / flops),
        "fraction_of_limit": round(reached * flops / limit, 3),
        "target": ENGINE_TARGET,
        "holds": reached >= ENGINE_TARGET,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--smoke", action="store_true", help="half a second each of a few streams, no tuning, nothing written"
    )
    parser.add_argument("--engine", action="store_true", help="the engine alone; the rest of the record stays")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    if args.engine:
        path = RESULTS / "serving.json"
        alone = engine(7) | {"machine": machine(), "date": datetime.now(UTC).date().isoformat()}
        record = json.loads(path.read_text(encoding="utf-8")) | {"engine": alone}
        path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        print(json.dumps(alone, indent=2))
        return
    numbers, seconds, repeats = ((1, 20), 0.5, 1) if args.smoke else (STREAMS, args.seconds, args.repeats)

    sizes, waits = ((1024,), (0.005,)) if args.smoke else ((128, 1024), (0.001, 0.01))
    pairs = [{"max_batch": size, "wait": wait} for size in sizes for wait in waits]
    queues, optimized = ((1,), (1,)) if args.smoke else ((0, 1), (0, 1))
    lit, lit_grid = tune(litserve, [{**pair, "fast_queue": q} for q in queues for pair in pairs], numbers[-1], seconds)
    rays, ray_grid = tune(ray, [{**pair, "optimized": o} for o in optimized for pair in pairs], numbers[-1], seconds)
    ceiling = ceilings(seconds / 2)
    with tempfile.TemporaryDirectory() as a, tempfile.TemporaryDirectory() as b:
        servers = {
            "Anabranch": anabranch(Path(a), durable=False),
            "Anabranch durable": anabranch(Path(b), durable=True),
            "LitServe": litserve(**lit),
            "Ray Serve": ray(**rays),
            "connection loop": loop(),
        }
        loads = [once(servers, numbers, seconds) for _ in range(repeats)]

    rates = {key: [load[key].steps_per_second for load in loads] for key in loads[0]}
    record: dict[str, Any] = {"streams": {}}
    peers = ("LitServe, HTTP", "Ray Serve, HTTP", "connection loop, WebSockets")
    for streams in numbers:
        best = max(peers, key=lambda name: statistics.median(rates[name, streams]))
        record["streams"][streams] = {
            "best_peer": best,
            "times_best_peer": {
                name: ratio(rates[name, streams], rates[best, streams])
                for name, n in rates
                if n == streams and name not in peers
            },
            "servers": {
                name: {
                    "steps_per_second": spread(rates[name, streams]),
                    "p50_ms": spread(load[name, streams].p50_ms for load in loads),
                    "p99_ms": spread(load[name, streams].p99_ms for load in loads),
                }
                for name, n in rates
                if n == streams
            },
        }
    most = numbers[-1]
    same = {
        way: {name: ratio(rates[f"Anabranch, {way}", most], rates[name, most]) for name in peers if name.endswith(way)}
        for way in ("HTTP", "WebSockets")
    }
    times = record["streams"][most]["times_best_peer"]["Anabranch, frames"]
    record |= {
        "same_protocol_1000_streams": same,
        "headline": {"times_best_peer": times, "target": TARGET, "holds": times["median"] >= TARGET},
        "load_ceiling_1000_streams": ceiling,
        "tuned": {"LitServe": lit_grid, "Ray Serve": ray_grid, "chosen": {"LitServe": lit, "Ray Serve": rays}},
        "engine": engine(2 if args.smoke else 5),
        "settings": {"seconds": seconds, "repeats": repeats, "frame_connections": CONNECTIONS},
    }
    print(
        json.dumps(
            {"headline": record["headline"], "same": same, "engine": record["engine"], "ceiling": ceiling}, indent=2
        )
    )
    if not args.smoke:
        write("serving", record, *PACKAGES)


if __name__ == "__main__":
    main()
