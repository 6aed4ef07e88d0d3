"""A session of SmolLM2 that does not end, under each memory: what it costs, how well it predicts, what it still knows.

    anabranch fetch smollm2 && anabranch bench endless [--tokens 100000] [--budget 512] [--only H2O D2O] [--smoke]

The text is the sources of Python's standard library, in chunks of 64 tokens, in which facts are told. At 25 places
along the stream the session is asked for those told 10, 300, 1,000, ... 50,000 tokens ago, and goes on as if it had not
been asked: of eight answers, the right one must be the likeliest. All memories keep `--budget` tokens in each
layer (D2O in the mean) beside the chunk that comes; "all" keeps everything, and stops when its 8,192 places are taken,
which is as long as the model's texts were in training.

Time is that of a chunk, over its tokens, the median of each of 25 parts of the stream; its slope is that of a line
through these, with its 95 % interval, over what a token takes in the mean. Everything is compiled before. Memory is
that of the session, and by how much more the process holds at the end of the last part than at that of the first.

Each memory's figures are kept in `.cache/endless/`, so that a run that was ended goes on with the next; remove the
folder after a change. Writes `bench/results/endless.json` and `endless.png`.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.stats import linregress, t

from anabranch.keep.d2o import D2O
from anabranch.keep.memory import H2O, Keep, KeyNorm, Random, Sinks, SnapKV, ValueNorm, Window
from anabranch.keep.text import Fact, Told, library, rank, tell
from anabranch.models.llama import Config, Decoder, Llama, Session
from anabranch.models.tokens import Tokens
from anabranch.models.weights import smollm2, smollm2_file
from common import RESULTS, resident, write

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CACHE = Path(__file__).parents[1] / ".cache" / "endless"
CHUNK, PARTS = 64, 25
AGES = (10, 300, 1000, 3000, 10_000, 30_000, 50_000)


def memories(budget: int, queries: int) -> dict[str, Keep | None]:
    """The memories by name; None is the one that keeps everything."""
    room: dict[str, Any] = {"room": CHUNK}
    return {
        "all": None,
        "window": Window(budget, **room),
        "sinks": Sinks(budget, **room),
        "H2O": H2O(budget, budget // 2, **room),
        "SnapKV": SnapKV(budget, **room),
        "KeyNorm": KeyNorm(budget, **room),
        "ValueNorm": ValueNorm(budget, **room),
        "random": Random(budget, **room),
        "D2O": D2O(budget, queries=queries, **room),
    }


def passage(text: list[int], encode: Any, length: int) -> tuple[Told, np.ndarray, np.ndarray]:
    """The stream, a token longer than what is read of it; when each fact is asked for, in tokens; and its age then."""
    width = int(tell(text, encode, [0], 200).facts.stop[0])
    step = length // PARTS
    wanted = sorted((asked - age - width, asked, age) for asked in range(step, length + 1, step) for age in AGES)
    chosen: list[tuple[int, int, int]] = []
    for place, asked, age in wanted:  # of two that would overlap, the first
        if place >= (chosen[-1][0] + width if chosen else 0):
            chosen.append((place, asked, age))
    places, asked, ages = np.array(chosen).T
    return tell(text, encode, places.tolist(), length + 1), asked, ages


@eqx.filter_jit(donate="all-except-first")
def advance(given: tuple[Decoder, jax.Array, jax.Array], state: Session) -> tuple[Session, jax.Array]:
    """The session after some tokens, and the sum of the losses of those that follow them."""
    cell, xs, ys = given
    state, logits = cell.advance(state, xs)
    return state, -jnp.take_along_axis(jax.nn.log_softmax(logits), ys[:, None], 1).sum()


def measure(model: Llama, keep: Keep | None, told: Told, asked: np.ndarray, ages: np.ndarray) -> dict[str, Any]:
    """Go through the stream once."""
    whole = len(told.tokens) - 1
    size, step = model.config.context, whole // PARTS
    cell = Decoder(model, size + CHUNK) if keep is None else Decoder(model, keep=keep)
    length = whole if keep is not None else min(whole, size)
    tokens = jnp.asarray(told.tokens)
    pair = lambda start: (tokens[start : start + CHUNK], tokens[start + 1 : start + CHUNK + 1])
    advance((cell, *pair(0)), cell.init())  # compiles
    state, seconds, losses, known, held = cell.init(), [], [], [], []
    for start in range(0, length, CHUNK):
        given, begin = (cell, *pair(start)), time.perf_counter()
        state, loss = advance(given, state)
        losses.append(float(loss) / CHUNK)
        seconds.append((time.perf_counter() - begin) / CHUNK)
        now = start + CHUNK
        if now % step == 0:
            held.append(resident())
            due = np.flatnonzero(asked == now)
            facts = Fact(*(part[due] for part in told.facts))
            known += zip(ages[due].tolist(), (np.asarray(rank(cell, state, facts)) == 0).tolist(), strict=True)
            print(f"  {now:,} tokens, {1e3 * np.median(seconds[-step // CHUNK :]):.2f} ms a token", flush=True)
    part = lambda xs, mean: [float(mean(xs[i : i + step // CHUNK])) for i in range(0, len(xs), step // CHUNK)]
    return {
        "tokens": length,
        "step": step,
        "kept": length if keep is None else round(float(np.mean([held.live for held in state.memory]))),
        "bytes": sum(x.nbytes for x in jax.tree.leaves(state)),
        "resident": [held[0], held[-1]],
        "seconds": part(seconds, np.median),
        "losses": part(losses, np.mean),
        "first losses": float(np.mean(losses[: size // CHUNK])),
        "facts": known,
    }


def slope(seconds: list[float], step: int) -> list[float] | None:
    """By which part of itself a token's time grows over 100,000 tokens: low, estimate, high; None of too few points."""
    parts = seconds[1:-1]  # the memory fills in the first, and the last may be short
    if len(parts) < 3:
        return None
    line = linregress(np.arange(len(parts)) * step / 100_000, parts)
    half = t.ppf(0.975, len(parts) - 2) * line.stderr
    return [round(float(x / np.mean(parts)), 4) for x in (line.slope - half, line.slope, line.slope + half)]


def summary(name: str, run: dict[str, Any]) -> dict[str, Any]:
    """A row of the table."""
    by_age = {age: [known for a, known in run["facts"] if a == age] for age in AGES}
    return {
        "memory": name,
        "tokens": run["tokens"],
        "kept": run["kept"],
        "MB": round(run["bytes"] / 1e6, 1),
        "process grew, MB": round((run["resident"][1] - run["resident"][0]) / 1e6, 1),
        "ms a token": round(1e3 * float(np.median(run["seconds"])), 2),
        "slope per 100,000 tokens": slope(run["seconds"], run["step"]),
        "perplexity": round(float(np.exp(np.mean(run["losses"]))), 3),
        "perplexity of the first 8,192": round(float(np.exp(run["first losses"])), 3),
        "facts known": {age: [sum(found), len(found)] for age, found in by_age.items() if found},
    }


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    names = ["memory", "tokens", "kept", "MB", "ms a token", "slope per 100,000 tokens", "perplexity"]
    for name in [*names, *(f"{age:,} ago" for age in AGES)]:
        table.add_column(name, justify="left" if name == "memory" else "right")
    for row in rows:
        facts = ["{}/{}".format(*row["facts known"][age]) if age in row["facts known"] else "" for age in AGES]
        table.add_row(*(str(row[name]) for name in names), *facts)
    Console(width=200).print(table)


def draw(runs: dict[str, dict[str, Any]], path: Path) -> None:
    """Loss and time along the stream, and facts by age."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for i, (name, run) in enumerate(runs.items()):
        style: dict[str, Any] = {"color": f"C{i}", "label": name, "lw": 1.2}
        at = np.minimum((np.arange(len(run["losses"])) + 1) * run["step"], run["tokens"])
        axes[0].plot(at, run["losses"], **style)
        axes[1].plot(at, 1e3 * np.array(run["seconds"]), **style)
        facts = summary(name, run)["facts known"]
        axes[2].plot(list(facts), [known / n for known, n in facts.values()], marker="o", ms=3, **style)
    axes[0].set(xlabel="tokens read", ylabel="loss, nats a token")
    axes[1].set(xlabel="tokens read", ylabel="ms a token", ylim=(0, None))
    axes[2].set(xlabel="tokens ago", ylabel="facts known", xscale="log", ylim=(0, 1.02))
    axes[2].axhline(1 / 8, color="grey", lw=0.8, ls=":")
    for ax in axes:
        ax.grid(alpha=0.25)
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, ncols=9, loc="outside lower center", fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--only", nargs="+", help="these memories")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, few tokens; nothing is written")
    args = parser.parse_args()
    if args.smoke:
        sizes = Config(vocab=256, width=16, layers=2, heads=4, kv_heads=2, hidden=24, context=1024)
        model, encode, args.budget = Llama(sizes, key=jax.random.PRNGKey(0)), lambda text: list(text.encode()), 96
        args.tokens, args.only = PARTS * CHUNK * 4, args.only or ["all", "sinks", "D2O"]
    else:
        model, encode = smollm2(), Tokens.of(smollm2_file()).plain
    every = memories(args.budget, model.config.heads // model.config.kv_heads)
    if unknown := set(args.only or ()) - set(every):
        parser.error(f"--only: there is no memory {', '.join(sorted(unknown))}; there are {', '.join(every)}")
    if args.tokens < 1:
        parser.error(f"--tokens must be at least 1, got {args.tokens}")
    length = -(-args.tokens // (PARTS * CHUNK)) * PARTS * CHUNK  # whole chunks in equal parts
    told, asked, ages = passage(encode(library()[: 8 * length]), encode, length)
    runs = {}
    for name in args.only or every:
        path = CACHE / f"{length}-{args.budget}" / f"{name}.json"
        if path.is_file() and not args.smoke:
            runs[name] = json.loads(path.read_text(encoding="utf-8"))
            continue
        print(name, flush=True)
        runs[name] = measure(model, every[name], told, asked, ages)
        if not args.smoke:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_suffix(".partial").write_text(json.dumps(runs[name]), encoding="utf-8")
            os.replace(path.with_suffix(".partial"), path)
        jax.clear_caches()
    rows = [summary(name, run) for name, run in runs.items()]
    show(rows)
    if not args.smoke:
        draw(runs, RESULTS / "endless.png")
        about = {
            "tokens": args.tokens,
            "budget": args.budget,
            "facts": len(asked),
            "not run": [n for n in every if n not in runs],
        }
        print(write("endless", about | {"rows": rows, "runs": runs}, "anabranch", "jax"))


if __name__ == "__main__":
    main()
