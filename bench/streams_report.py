"""The report of `bench/streams.py`: a picture and a self-contained HTML page with plots."""

import html
import io
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from anabranch.run.report import COLOURS

plt.rcParams.update({
    "font.family": "sans-serif", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
    "svg.fonttype": "none", "figure.constrained_layout.use": True,
})  # fmt: skip


def _colour(method: str) -> str:
    library = method.split()[0]
    return {"anabranch": COLOURS[0], "River": COLOURS[1], "MOA": COLOURS[2]}.get(library, "#888888")


def cliques(ranks: list[float], difference: float) -> list[tuple[int, int]]:
    """The widest runs of sorted ranks that lie within the critical difference: first and last index of each.

    >>> cliques([1.0, 2.0, 3.5, 6.0], 2.0)
    [(0, 1), (1, 2)]
    """
    runs: list[tuple[int, int]] = []
    for first, low in enumerate(ranks):
        last = max(i for i, rank in enumerate(ranks) if rank - low <= difference)
        if last > first and (not runs or last > runs[-1][1]):
            runs.append((first, last))
    return runs


def differences(record: dict[str, Any]) -> Figure:
    """Mean ranks from the best down, with bars over the methods that Nemenyi's test does not tell apart."""
    board = record["board"]
    ranks = [row["mean_rank"] for row in board]
    runs = cliques(ranks, record["critical_difference"])
    figure, ax = plt.subplots(figsize=(8, 0.24 * len(board) + 1.2))
    at = np.arange(len(board))
    ax.scatter(ranks, at, c=[_colour(row["method"]) for row in board], zorder=3)
    for i, (first, last) in enumerate(runs):
        x = len(board) + 0.5 + 0.35 * i
        ax.plot([x, x], [first - 0.2, last + 0.2], color="#444444", lw=2.5)
    ax.set(yticks=at, xlabel="mean rank by accuracy", xlim=(0.5, len(board) + 1 + 0.35 * len(runs)))
    ax.set_yticklabels([f"{row['method']}  {rank:.2f}" for row, rank in zip(board, ranks, strict=True)])
    ax.invert_yaxis()
    ax.grid(axis="x", alpha=0.25)
    p = f"Friedman p = {record['friedman_p']:.1g}, " if record["friedman_p"] is not None else ""
    said = f"streams: {len(record['streams'])}, {p}critical difference {record['critical_difference']:.1f}"
    ax.set_title(said, fontsize=9)
    return figure


def accuracies(record: dict[str, Any]) -> Figure:
    """Accuracy of every method on every stream, coloured by how far it is below the best of its stream."""
    methods, streams = [row["method"] for row in record["board"]], record["streams"]
    found = {(row["method"], row["stream"]): 100 * row["accuracy"] for row in record["table"]}
    values = np.array([[found[m, s] for s in streams] for m in methods])
    figure, ax = plt.subplots(figsize=(9, 0.28 * len(methods) + 0.8))
    ax.imshow(np.maximum(values - values.max(0), -30), cmap="viridis", aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        ax.text(j, i, f"{value:.1f}", ha="center", va="center", color="k" if value > values[:, j].max() - 8 else "w")
    ax.set(xticks=range(len(streams)), yticks=range(len(methods)))
    ax.set_xticklabels(streams)
    ax.set_yticklabels(methods)
    return figure


def rates(record: dict[str, Any]) -> Figure:
    """Mean accuracy against events a second."""
    figure, ax = plt.subplots(figsize=(8, 4.5))
    for row in record["board"]:
        place = row["events_per_s"], 100 * row["mean_accuracy"]
        ax.scatter(*place, color=_colour(row["method"]))
        ax.annotate(row["method"], place, xytext=(4, 3), textcoords="offset points", fontsize=7)
    ax.set(xscale="log", xlabel="events a second", ylabel="mean accuracy, %")
    ax.grid(alpha=0.25)
    return figure


def curves(record: dict[str, Any]) -> Figure:
    """Accuracy over time on each stream, of the six best."""
    best, streams = [row["method"] for row in record["board"][:6]], record["streams"]
    rows = -(-len(streams) // 3)
    figure, axes = plt.subplots(rows, 3, figsize=(9, 2.1 * rows), squeeze=False)
    found = {(row["method"], row["stream"]): row["curve"] for row in record["table"]}
    for ax, stream in zip(axes.flat, streams):
        for method, colour in zip(best, COLOURS):
            ax.plot(100 * np.array(found[method, stream]), color=colour, lw=1.2, label=method)
        ax.set_title(stream, fontsize=9)
    for ax in axes.flat[len(streams) :]:
        ax.set_axis_off()
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), frameon=False, ncols=6, loc="outside lower center", fontsize=7
    )
    return figure


def report(record: dict[str, Any], folder: Path) -> None:
    """Draw the picture `streams.png` and write the page `streams.html` into the folder."""
    figure = differences(record)
    figure.savefig(folder / "streams.png", dpi=150)
    plt.close(figure)
    sections = (
        ("Mean ranks", differences, "By accuracy; 1 is best. Methods under one bar do not differ at the 5 % level."),
        ("Accuracy", accuracies, "Prequential, in %."),
        ("Accuracy and speed", rates, "Mean accuracy over the streams against events a second."),
        ("Accuracy over time", curves, "The best six of the board."),
    )
    plots = ""
    for title, draw, note in sections:
        buffer = io.StringIO()
        figure = draw(record)
        figure.savefig(buffer, format="svg", metadata={"Date": None})
        plt.close(figure)
        svg = buffer.getvalue()
        plots += f"<h2>{title}</h2><figure>{svg[svg.index('<svg') :]}<figcaption>{note}</figcaption></figure>"
    rest = f" Not run yet: {', '.join(record['not_run_yet'])}." if record["not_run_yet"] else ""
    head = ["stream", "method", "seeds", "accuracy", "accuracy_sd", "kappa", "kappa_t", "events_per_s", "bytes"]
    said = lambda value: "" if value is None else f"{value:,}" if isinstance(value, int) else html.escape(str(value))
    body = "".join("<tr>" + "".join(f"<td>{said(row[h])}</td>" for h in head) + "</tr>" for row in record["table"])
    (folder / "streams.html").write_text(
        f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Classifiers on streams</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }} figcaption {{ color: #666; }}
th, td {{ text-align: left; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid #ddd; white-space: nowrap; }}
figure {{ margin: 0; }} figure svg {{ width: 100%; height: auto; }}
</style></head><body><h1>Classifiers on streams</h1><p>{html.escape(record["said"])}{html.escape(rest)}</p>{plots}
<h2>All figures</h2><table><tr>{"".join(f"<th>{h}</th>" for h in head)}</tr>{body}</table></body></html>
""",
        encoding="utf-8",
    )
