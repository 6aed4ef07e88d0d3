"""`Keyed` against what people write today: a standardisation and a logistic regression for each key of a stream.

Every comparison is of the same events, ours and theirs in turn, medians of five; it stops if the predictions differ by
1e-3.

* skew: events a second where keys are uniform, Zipf(1.2), Zipf(1.5), and all one, against a dictionary of River models,
  a dictionary of NumPy states, Bytewax and Pathway (all on a prefix of the events), and a compiled sequential loop.
* spill: a million keys with room for a tenth of them.
* growth: events a second, and bytes of state, as the stream gets longer.
* `--checkpoints`: a million keys, saved every ten seconds.
* `--forms`: a step in the `loop` and in the `waves` form, for cells with more and more arithmetic and state.

`python bench/keyed.py [--smoke] [--checkpoints | --forms] [--peer-python PYTHON]`; PYTHON is an interpreter that has
bytewax and pathway. Writes `bench/results/keyed.json` and `.png`, or `keyed_checkpoints.json`, or `keyed_forms.json`.
"""

import argparse
import contextlib
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pyarrow as pa

import keyed_peers as peers
from anabranch.cell import Cell, Event, Maybe
from anabranch.learn.linear import LogisticRegression, Scaled
from anabranch.run.checkpoint import Checkpoints, pack_keys
from anabranch.run.keyed import Keyed, _flops
from common import RESULTS, in_turn, ratio, resident, spread, timed, write
from keyed_peers import Stream

FEATURES = 16
CELL = Scaled(LogisticRegression(FEATURES, optax.sgd(peers.LR), intercept_lr=peers.INTERCEPT_LR))
PACKAGES = ("anabranch", "jax", "equinox", "numpy", "pyarrow", "river", "numba")
KEYS = {"uniform": 0.0, "zipf 1.2": 1.2, "zipf 1.5": 1.5, "one key": None}


class Sizes(NamedTuple):
    keys: int = 4_000
    events: int = 400_000
    prefix: int = 20_000
    """Events that the slow peers are shown."""
    many: int = 1_000_000
    """Keys of the spill and the checkpoints."""
    segment: int = 200_000
    """Events of one measurement there."""
    lengths: tuple[int, ...] = (10_000, 100_000, 1_000_000, 10_000_000)
    every: float = 10.0
    """Seconds between checkpoints."""
    repeats: int = 5
    hidden: tuple[int, ...] = (4, 8, 16, 32, 64, 128, 256, 512)
    words: tuple[int, ...] = (16, 64, 256, 1024, 4096)


FULL = Sizes()
SMOKE = Sizes(400, 10_000, 1_000, 4_000, 2_000, (1_000, 10_000), 0.2, 2, (8,), (64,))


def draw(rng: np.random.Generator, keys: int, n: int, skew: float | None) -> np.ndarray:
    """Keys of n events: the k-th most frequent of them in proportion to k ** -skew, or all one."""
    if skew is None:
        return np.zeros(n, np.int64)
    weight = np.arange(1, keys + 1) ** -skew
    return rng.permutation(keys)[np.searchsorted(np.cumsum(weight / weight.sum()), rng.random(n)).clip(max=keys - 1)]


def make(keys: np.ndarray, count: int, seed: int = 0) -> Stream:
    """Events of linear models that differ from key to key."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=(count, FEATURES)).astype(np.float32)
    x = (rng.normal(size=(len(keys), FEATURES)) * 2 + 1).astype(np.float32)
    margin = (x * truth[keys]).sum(1) + 2 * rng.normal(size=len(keys))
    return Stream(keys, x, (margin > 0).astype(np.float32))


def events(stream: Stream) -> Event:
    n = len(stream.keys)
    return Event(stream.x, Maybe(stream.target, np.ones(n, bool)), np.ones(n, np.float32))


def ours(stream: Stream, keys: Any = None, **options: Any) -> tuple[np.ndarray, float]:
    """`Keyed`, which has seen none of the keys."""
    keyed, xs = Keyed(CELL, int(stream.keys.max()) + 1, **options), events(stream)
    keyed.form(jax.tree.map(lambda leaf: leaf[0], xs))
    return timed(lambda: keyed(stream.keys if keys is None else keys, xs))


def show(rate: dict[str, float]) -> str:
    return f"{rate['median']:,.0f}/s"


# Skew


class Served:
    """A tool that runs in an interpreter of its own."""

    def __init__(self, tool: str, python: str, folder: str):
        self.tool, self.folder = tool, Path(folder)
        program = str(Path(peers.__file__).resolve())
        self.process = subprocess.Popen(
            [python, program, tool, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True,
        )  # fmt: skip
        self.version = self._line()

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        if not line:
            raise RuntimeError(f"{self.tool} ended with exit code {self.process.wait()}")
        return line

    def __call__(self, name: str) -> tuple[np.ndarray, float]:
        assert self.process.stdin is not None
        print(name, file=self.process.stdin, flush=True)
        spent = float(self._line())
        return np.load(self.folder / f"{self.tool}.npy"), spent

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


@contextlib.contextmanager
def served(python: str, streams: dict[str, Stream]) -> Iterator[tuple[dict[str, Served], dict[str, str]]]:
    """The tools that this interpreter has, and of those it has not, why."""
    tools, absent = {}, {}
    with tempfile.TemporaryDirectory(prefix="keyed-") as folder:
        for name, stream in streams.items():
            np.savez(Path(folder) / f"{name}.npz", **stream._asdict())
        for tool in ("bytewax", "pathway"):
            found = subprocess.run([python, "-c", f"import {tool}"], capture_output=True, text=True)
            if found.returncode:
                absent[tool] = found.stderr.strip().splitlines()[-1] if found.stderr.strip() else "import failed"
            else:
                tools[tool] = Served(tool, python, folder)
        try:
            yield tools, absent
        finally:
            for tool in tools.values():
                tool.close()


def skew(sizes: Sizes, python: str) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    whole = {name: make(draw(rng, sizes.keys, sizes.events, skew), sizes.keys) for name, skew in KEYS.items()}
    heads = {name: stream.head(sizes.prefix) for name, stream in whole.items()}
    rows = []
    with served(python, heads) as (tools, absent):
        for name, stream in whole.items():
            truth = ours(stream)[0]

            def rate(run: Callable[[], tuple[np.ndarray, float]], who: str, truth=truth, name=name) -> float:
                found, spent = run()
                apart = float(np.abs(found - truth[: len(found)]).max())
                if not apart < 1e-3:
                    raise RuntimeError(f"{name}: {who} predicts otherwise, the largest difference is {apart:.2g}")
                differences[who] = max(differences.get(who, 0.0), apart)
                return len(found) / spent

            start, differences = heads[name], {}
            text = pa.array(np.char.add("card-", stream.keys.astype(str)))
            runs: dict[str, Callable[[], tuple[np.ndarray, float]]] = {
                "anabranch": lambda s=stream: ours(s),
                "anabranch, one thread": lambda s=stream: ours(s, threads=1),
                "anabranch, text keys": lambda s=stream, k=text: ours(s, k),
                "numba": lambda s=stream: peers.numba(s),
                "numpy": lambda s=start: peers.numpy(s),
                "river": lambda s=start: peers.river(s),
            } | {tool: lambda run=run, name=name: run(name) for tool, run in tools.items()}
            for who, run in runs.items():  # compile, and import
                rate(run, who)
            rates = in_turn({who: lambda w=who, r=run: rate(r, w) for who, run in runs.items()}, sizes.repeats)
            row = {
                "keys": name,
                "events_per_second": {who: spread(values) for who, values in rates.items()},
                "anabranch_over": {who: ratio(rates["anabranch"], rates[who]) for who in runs if who != "anabranch"},
                "largest_difference": {who: float(f"{d:.2g}") for who, d in differences.items()},
            }
            rows.append(row)
            print(f"{name:9}", *(f"{who} {show(r)}" for who, r in row["events_per_second"].items()), sep="  ")
        found = {tool: run.version for tool, run in tools.items()}
    targets = {
        "150 times River": {row["keys"]: row["anabranch_over"]["river"]["median"] >= 150 for row in rows},
        "a quarter of numba": {row["keys"]: row["anabranch_over"]["numba"]["median"] >= 0.25 for row in rows},
    }
    print("targets:", targets)
    for tool, reason in absent.items():
        print(f"{tool} was not run: {reason}")
    return {
        "keys": sizes.keys, "events": sizes.events, "prefix": sizes.prefix, "features": FEATURES,
        "distributions": rows, "targets": targets, "peer_versions": found, "not_run": absent,
    }  # fmt: skip


# A million keys


def rooms(many: int) -> dict[str, dict[str, int]]:
    """Room for all keys; for a tenth, the rest in memory; for a tenth, a tenth in memory and the rest on disk."""
    return {
        "all ready": {"capacity": many, "memory": many},
        "rest in memory": {"capacity": many // 10, "memory": many},
        "rest on disk": {"capacity": many // 10, "memory": many // 10},
    }


def fill(keyed: Keyed, many: int, xs: Event) -> None:
    """Show `keyed` each key once."""
    step = len(xs.weight)
    for start in range(0, many, step):
        count = min(step, many - start)
        keyed(np.arange(start, start + count), head(xs, count))


def head(xs: Event, n: int, start: int = 0) -> Event:
    return jax.tree.map(lambda leaf: leaf[start : start + n], xs)


def spill(sizes: Sizes) -> dict[str, Any]:
    rows = []
    for name in ("uniform", "zipf 1.2"):
        rng = np.random.default_rng(1)
        xs = events(make(np.zeros(sizes.segment, np.int64), 1))
        # The most frequent keys stay the same, so that a cache can pay; the events are new ones every time.
        drawn = draw(rng, sizes.many, sizes.segment * (sizes.repeats + 1), KEYS[name]).reshape(-1, sizes.segment)
        made = {room: Keyed(CELL, **options) for room, options in rooms(sizes.many).items()}
        answers: dict[str, list[np.ndarray]] = {room: [] for room in made}
        for keyed in made.values():
            fill(keyed, sizes.many, xs)

        def rate(room: str, made=made, answers=answers, drawn=drawn, xs=xs) -> float:
            found, spent = timed(lambda: made[room](drawn[len(answers[room])], xs))
            answers[room].append(found)
            return len(found) / spent

        for room in made:  # once without being measured: the frequent keys come in
            rate(room)
        rates = in_turn({room: lambda r=room: rate(r) for room in made}, sizes.repeats)
        for room, keyed in made.items():
            if not np.array_equal(answers[room], answers["all ready"]):
                raise RuntimeError(f"{name}, {room}: a state that was spilled came back changed")
            row = {"keys": name, "room": room, "events_per_second": spread(rates[room]), "spilled": keyed.spilled}
            row["slowdown"] = ratio(rates["all ready"], rates[room])
            rows.append(row)
            print(f"{name:9} {room:15} {show(row['events_per_second'])}, {row['slowdown']['median']} times slower")
        del made, keyed
    # Memory in a process of its own for each, which has done nothing else.
    command = [sys.executable, __file__, *(["--smoke"] if sizes is SMOKE else []), "--memory-of"]
    memory = {}
    for room in rooms(sizes.many):
        done = subprocess.run([*command, room], stdout=subprocess.PIPE, text=True, check=True)
        memory[room] = json.loads(done.stdout.splitlines()[-1])
        print(f"{room:15}", memory[room])
    return {"keys": sizes.many, "rows": rows, "memory": memory}


def memory_of(sizes: Sizes, room: str) -> dict[str, int]:
    """Megabytes after each of a million keys has been seen, and after as many events again."""
    rng = np.random.default_rng(2)
    xs = events(make(np.zeros(sizes.segment, np.int64), 1))
    options = rooms(sizes.many)[room]
    small = Keyed(CELL, options["capacity"])  # compiles, with arrays as large but no keys
    small(np.zeros(sizes.segment, np.int64), xs)
    del small
    before = resident()
    keyed = Keyed(CELL, **options)
    fill(keyed, sizes.many, xs)
    filled = resident()
    for _ in range(5):
        keyed(draw(rng, sizes.many, sizes.segment, 0.0), xs)
    return {
        "before_mb": before >> 20, "filled_mb": filled >> 20, "later_mb": resident() >> 20,
        "states_mb": keyed.nbytes >> 20, "spilled_keys": keyed.spilled,
    }  # fmt: skip


# Growth


def growth(sizes: Sizes) -> dict[str, Any]:
    """Streams of growing length, in micro-batches of 4,096, over keys that have all been seen."""
    batch = 4096
    stream = make(draw(np.random.default_rng(3), sizes.keys, 64 * batch, 0.0), sizes.keys)
    xs, made = events(stream), {}
    blocks = [(stream.keys[i : i + batch], head(xs, batch, i)) for i in range(0, 64 * batch, batch)]

    def rate(length: int) -> float:
        made[length] = keyed = Keyed(CELL, sizes.keys)
        fill(keyed, sizes.keys, xs)
        for keys, x in blocks[:2]:
            keyed(keys, x)
        turns = -(-length // batch)
        _, spent = timed(lambda: [keyed(*blocks[i % 64]) for i in range(turns)])
        return turns * batch / spent

    rates = in_turn({length: lambda n=length: rate(n) for length in sizes.lengths}, sizes.repeats)
    rows = [
        {"events": n, "events_per_second": spread(values), "state_bytes": sum(r.nbytes for r in made[n]._rows)}
        for n, values in rates.items()
    ]
    for row in rows:
        print(f"{row['events']:10,} events  {show(row['events_per_second'])}  {row['state_bytes']:,} bytes")
    medians = [row["events_per_second"]["median"] for row in rows]
    middle = (max(medians) + min(medians)) / 2
    return {
        "rows": rows,
        "plus_minus": round((max(medians) - min(medians)) / 2 / middle, 3),
        "state_constant": len({row["state_bytes"] for row in rows}) == 1,
    }


# Checkpoints


class Period(NamedTuple):
    rate: float
    stall: float
    """Seconds in which no event was processed."""
    written: float
    """Seconds until the file was whole."""
    bytes: int


def period(keyed: Keyed, blocks: Iterator, seconds: float, saver: Checkpoints | None = None) -> Period:
    """Events a second over some seconds, which begin with a checkpoint where there is a saver."""
    begin, count, stall, written, size = time.perf_counter(), 0, 0.0, 0.0, 0
    if saver is not None:
        saver.wait()
        saved = keyed.everything() if saver.wants_everything else keyed.changed()
        saver.save({"keys": partial(pack_keys, saved.keys), "numbers": saved.numbers, "rows": saved.rows}, {})
        stall, size = time.perf_counter() - begin, saved.rows.nbytes
        del saved
    while time.perf_counter() - begin < seconds:
        keys, xs = next(blocks)
        keyed(keys, xs)
        count += len(keys)
        if saver is not None and not written and not saver.busy:
            written = time.perf_counter() - begin
    rate = count / (time.perf_counter() - begin)
    if saver is not None:
        saver.wait()
        written = written or time.perf_counter() - begin
    return Period(rate, stall, written, size)


def checkpoints(sizes: Sizes) -> dict[str, Any]:
    """Periods of ten seconds in turn: one undisturbed, one that begins with a checkpoint of all that changed."""
    rows, batch = [], min(32768, sizes.segment)
    for name in ("uniform", "zipf 1.2"):
        xs = events(make(np.zeros(batch, np.int64), 1))
        # Five events a key: uniform keys nearly all change from one checkpoint to the next.
        drawn = draw(np.random.default_rng(4), sizes.many, 5 * sizes.many // batch * batch, KEYS[name])
        blocks = itertools.cycle([(keys, xs) for keys in drawn.reshape(-1, batch)])
        keyed = Keyed(CELL, sizes.many)
        fill(keyed, sizes.many, xs)
        with tempfile.TemporaryDirectory(prefix="keyed-") as folder:
            saver, saves = Checkpoints(folder), []

            def saving(keyed=keyed, blocks=blocks, saver=saver, saves=saves) -> float:
                saves.append(period(keyed, blocks, sizes.every, saver))
                return saves[-1].rate

            saving()  # compiles, and writes everything
            saves.clear()
            without = lambda k=keyed, b=blocks: period(k, b, sizes.every).rate
            rates = in_turn({"without": without, "with": saving}, max(2, sizes.repeats - 2))
            saver.close()
        row = {
            "keys": name, "events_per_second": {who: spread(values) for who, values in rates.items()},
            "slowdown": ratio(rates["without"], rates["with"]), "stall_seconds": spread(s.stall for s in saves),
            "seconds_until_written": spread(s.written for s in saves), "bytes": spread((s.bytes for s in saves), 9),
        }  # fmt: skip
        rows.append(row)
        print(name, row["slowdown"], "stall", row["stall_seconds"], "written after", row["seconds_until_written"])
    met = {row["keys"]: row["slowdown"]["median"] <= 1.05 for row in rows}
    return {"keys": sizes.many, "every_seconds": sizes.every, "rows": rows, "targets": {"at most 5 % slower": met}}


# Forms


class GRU(Cell):
    """A gated recurrent unit: its arithmetic grows with the square of its state."""

    unit: eqx.nn.GRUCell

    def init(self, *, key=None):
        return jnp.zeros(self.unit.hidden_size)

    def step(self, state, x):
        state = self.unit(x, state)
        return state, state[0]


class Averages(Cell):
    """Moving averages at `words` speeds: two operations for each word of the state."""

    words: int = eqx.field(static=True)

    def init(self, *, key=None):
        return jnp.zeros(self.words)

    def step(self, state, x):
        state = state + jnp.linspace(0.001, 0.5, self.words) * (x[0] - state)
        return state, state.sum()


class Ring(Cell):
    """The sum of the last `words` inputs: a large state of which a step touches one word."""

    words: int = eqx.field(static=True)

    def init(self, *, key=None):
        return {"held": jnp.zeros(self.words - 2), "at": jnp.int32(0), "sum": jnp.zeros(())}

    def step(self, state, x):
        held, at = state["held"], state["at"]
        total = state["sum"] + x[0] - held[at]
        return {"held": held.at[at].set(x[0]), "at": (at + 1) % held.shape[0], "sum": total}, total


FORMS = {"loop": "loop", "waves": "waves", "chosen": None}


def forms(sizes: Sizes) -> dict[str, Any]:
    """Microseconds a step in each form, uniform and Zipf(1.2) keys, micro-batches of 4,096."""
    gru = lambda h: GRU(eqx.nn.GRUCell(FEATURES, h, key=jax.random.PRNGKey(h)))
    cells: list[tuple[str, int, Cell]] = [("gru", h, gru(h)) for h in sizes.hidden]
    cells += [(kind.__name__.lower(), n, kind(n)) for kind in (Averages, Ring) for n in sizes.words]
    rng = np.random.default_rng(5)
    batch = min(4096, sizes.events)
    x = rng.normal(size=(batch, FEATURES)).astype(np.float32)
    keys = {name: draw(rng, sizes.keys, batch, KEYS[name]) for name in ("uniform", "zipf 1.2")}
    rows = []
    for kind, size, cell in cells:
        made = {name: Keyed(cell, sizes.keys, form=form) for name, form in FORMS.items()}
        runs: dict[tuple[str, str], Callable[[], float]] = {}
        for form, keyed in made.items():
            for name, drawn in keys.items():
                run = lambda k=keyed, d=drawn: timed(lambda: k(d, x))[1] / batch * 1e6
                run()
                runs[form, name] = run
        spent = in_turn(runs, sizes.repeats)
        row = {"cell": kind, "size": size, "flops": _flops(cell, x[0]), "words": made["loop"]._packing.words}
        row["microseconds"] = times = {name: {form: spread(spent[form, name]) for form in made} for name in keys}
        row["loop_over_waves"] = {name: ratio(spent["loop", name], spent["waves", name]) for name in keys}
        rows.append(row)
        told = (f"{name}: " + ", ".join(f"{f} {m[f]['median']} us" for f in FORMS) for name, m in times.items())
        print(f"{kind:9}{size:5}  {row['flops']:10,.0f} flops  {row['words']:5} words", *told, sep="   ")
    return {"keys": sizes.keys, "batch": batch, "rows": rows}


def plot(record: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    rows = record["skew"]["distributions"]
    names = list(rows[0]["events_per_second"])
    for i, name in enumerate(names):
        found = [row["events_per_second"][name] for row in rows]
        at = np.arange(len(rows)) + (i - len(names) / 2 + 0.5) * 0.8 / len(names)
        height = np.array([f["median"] for f in found])
        error = [height - [f["low"] for f in found], [f["high"] for f in found] - height]
        left.bar(at, height, 0.8 / len(names), yerr=error, label=name, error_kw={"lw": 0.8})
    left.set(yscale="log", ylabel="events a second", title=f"{record['skew']['keys']:,} keys, one model each")
    left.set_xticks(range(len(rows)), [row["keys"] for row in rows])
    left.set_ylim(top=1e8)  # room for the legend
    left.legend(fontsize=7, ncols=3, loc="upper center")
    rows = record["spill"]["rows"]
    kinds = list(dict.fromkeys(row["keys"] for row in rows))
    places = list(dict.fromkeys(row["room"] for row in rows))
    for i, room in enumerate(places):
        height = [row["events_per_second"]["median"] for row in rows if row["room"] == room]
        middle.bar(np.arange(len(kinds)) + (i - 1) * 0.27, height, 0.27, label=room)
    middle.set(ylabel="events a second", title=f"{record['spill']['keys']:,} keys, room for all or for a tenth")
    middle.set_xticks(range(len(kinds)), kinds)
    middle.legend(fontsize=7, loc="upper left")
    rows = record["growth"]["rows"]
    right.plot([r["events"] for r in rows], [r["events_per_second"]["median"] for r in rows], "o-")
    right.set(xscale="log", xlabel="events of the stream", ylabel="events a second", title="longer streams")
    right.set_ylim(bottom=0)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="everything in tiny sizes, nothing written")
    parser.add_argument("--checkpoints", action="store_true", help="only the checkpoints")
    parser.add_argument("--forms", action="store_true", help="only the two forms")
    parser.add_argument("--peer-python", default=sys.executable, help="an interpreter with bytewax and pathway")
    parser.add_argument("--memory-of", choices=list(rooms(1)), help=argparse.SUPPRESS)
    args = parser.parse_args()
    sizes = SMOKE if args.smoke else FULL
    if args.memory_of:
        print(json.dumps(memory_of(sizes, args.memory_of)))
        return
    records: dict[str, dict[str, Any]] = {}
    if args.checkpoints or args.smoke:
        records["keyed_checkpoints"] = checkpoints(sizes)
    if args.forms or args.smoke:
        records["keyed_forms"] = forms(sizes)
    if not (args.checkpoints or args.forms):
        records["keyed"] = {
            "repeats": sizes.repeats,
            "skew": skew(sizes, args.peer_python),
            "spill": spill(sizes),
            "growth": growth(sizes),
        }
    if args.smoke:
        with tempfile.TemporaryDirectory() as folder:
            if "keyed" in records:
                plot(records["keyed"], Path(folder) / "keyed.png")
        return
    for name, record in records.items():
        write(name, record, *PACKAGES)
    if "keyed" in records:
        plot(records["keyed"], RESULTS / "keyed.png")


if __name__ == "__main__":
    main()
