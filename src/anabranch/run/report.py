"""The report of a run: one self-contained HTML page with plots."""

import html
import io
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from anabranch.run.alarms import ERROR
from anabranch.run.pipeline import Pipeline, Summary

# Okabe and Ito: colours that also colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#333333")
MARKS = 30
"""Drifts of the error that are drawn, at most."""
METRICS = {
    "n": ("events", "{:,}"), "base_rate": ("base rate", "{:.3f}"), "log_loss": ("log loss", "{:.4f}"),
    "auc": ("AUC", "{:.4f}"), "accuracy": ("accuracy", "{:.4f}"), "calibration_error": ("cal. error", "{:.4f}"),
    "rmse": ("RMSE", "{:.4f}"), "mae": ("MAE", "{:.4f}"),
}  # fmt: skip
"""What each score is called, and how it is written."""


def table(
    summary: Summary, peers: dict[str, dict[str, dict[str, Any]]], name: str
) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of scores: for each group, ours and each peer's."""
    columns = [m for m in METRICS if any(m in scores for scores in summary.metrics.values())]
    rows = []
    for group, ours in summary.metrics.items():
        for who, scores in [(name, ours), *((peer, found[group]) for peer, found in peers.items() if group in found)]:
            rows.append([group, who, *(METRICS[c][1].format(scores[c]) if c in scores else "" for c in columns)])
    return ["asked", "answered by", *(METRICS[c][0] for c in columns)], rows


def write(pipeline: Pipeline, summary: Summary, peers: dict[str, dict[str, dict[str, Any]]]) -> Path:
    """Write `report.html` into the folder of outputs.

    Raises:
        ImportError: without matplotlib (the extra `viz`).
    """
    try:
        import matplotlib
    except ImportError:
        raise ImportError("the report needs matplotlib: pip install 'anabranch[viz]'") from None
    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({
        "font.family": "sans-serif", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False,
        "axes.grid": True, "grid.alpha": 0.25, "svg.fonttype": "none", "figure.constrained_layout.use": True,
    })  # fmt: skip
    sections: list[tuple[str, str, str]] = []

    def add(title: str, figure, note: str) -> None:
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
        plt.close(figure)
        svg = buffer.getvalue()
        sections.append((title, svg[svg.index("<svg") :], note))

    binary = pipeline.kind == "binary"
    groups = sorted(pipeline.quality.series)
    colour = {group: COLOURS[i % len(COLOURS)] for i, group in enumerate(groups)}
    if groups:
        metrics = [("auc", "AUC"), ("log_loss", "log loss")] if binary else [("accuracy", "accuracy")]
        metrics = [("rmse", "RMSE")] if pipeline.kind == "value" else metrics
        metrics += [("base_rate", "base rate")] if binary else []
        figure, axes = plt.subplots(len(metrics), 1, figsize=(9, 2.1 * len(metrics)), sharex=True, squeeze=False)
        # More of them than can be told apart, of which only the last are kept, would mark nothing but the ink.
        marks = [raised for raised in pipeline.alarms.recent if raised.output == ERROR]
        marks = marks if pipeline.alarms.counts.get(ERROR, 0) <= MARKS else []
        for (metric, label), ax in zip(metrics, axes[:, 0]):
            for group in groups:
                points = [(t, s[metric]) for t, s in pipeline.quality.series[group].smooth(7) if s.get("n", 0) > 20]
                when = np.array([t for t, _ in points]).astype("datetime64[s]")
                ax.plot(when, [v for _, v in points], color=colour[group], label=group, lw=1.6)
            for raised in marks:
                at: Any = np.datetime64(round(raised.time), "s")
                ax.axvline(at, color=colour[raised.key], lw=1, ls=":")
            ax.set_ylabel(label)
        axes[0, 0].legend(frameon=False, ncols=4, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0)
        add(
            "Quality over time",
            figure,
            "Windows of seven days of event time, by the time at which the question was asked."
            + (" Dotted: when labels showed that errors had become larger (ADWIN)." if marks else ""),
        )
    if binary and pipeline.quality.scores:
        figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), width_ratios=[1, 1.2])
        left.plot([0, 1], [0, 1], color="#999", lw=1, ls="--")
        for group in sorted(pipeline.quality.scores):
            count, mean, rate = pipeline.quality.scores[group].calibration()
            some = count > 0
            left.plot(mean[some], rate[some], marker="o", ms=4, color=colour[group], label=group, lw=1.4)
            right.step(
                np.linspace(0, 1, len(count), endpoint=False), count, where="post", color=colour[group], label=group
            )
        left.set(xlabel="predicted probability", ylabel="observed frequency", xlim=(0, 1), ylim=(0, 1))
        right.set(xlabel="predicted probability", ylabel="events", yscale="log")
        left.legend(frameon=False)
        add(
            "Calibration",
            figure,
            "On the dashed line, of the events predicted with probability p a share of p came true.",
        )
    worst = pipeline.config.report.worst
    if worst and pipeline.quality.values:
        names = [n for n, v in pipeline.quality.values.items() if v[0] >= 200]
        names = sorted(names, key=lambda n: -pipeline.quality.values[n][1] / pipeline.quality.values[n][0])[:20][::-1]
        figure, (left, right) = plt.subplots(1, 2, figsize=(9, 0.24 * len(names) + 1.2), sharey=True)
        at = np.arange(len(names))
        n, loss, target, predicted = (np.array([pipeline.quality.values[name][i] for name in names]) for i in range(4))
        left.barh(at, loss / n, color=COLOURS[1], height=0.7)
        left.set(yticks=at, yticklabels=names, xlabel="log loss" if binary else "squared error")
        right.scatter(target / n, at, color=COLOURS[0], label="observed", zorder=3, s=18)
        right.scatter(predicted / n, at, color=COLOURS[1], label="predicted", marker="x", zorder=3, s=18)
        right.set(xlabel="mean")
        right.legend(frameon=False)
        add(f"Worst by {worst}", figure, "The twenty values with the largest loss, of those with at least 200 labels.")
    if len(pipeline.pace) > 1:
        seconds, events, memory = np.array(pipeline.pace).T
        figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.8))
        left.plot(
            events[1:] / 1e3, np.diff(events) / np.maximum(np.diff(seconds), 1e-9) / 1e3, color=COLOURS[0], lw=1.2
        )
        left.set(xlabel="thousand events", ylabel="thousand events/s", ylim=(0, None))
        right.plot(events / 1e3, memory / 2**20, color=COLOURS[2], lw=1.6)
        right.set(xlabel="thousand events", ylabel="resident memory, MiB", ylim=(0, None))
        add("Throughput and memory", figure, "The first micro-batches include compilation.")
    path = pipeline.out / "report.html"
    path.write_text(_page(pipeline, summary, table(summary, peers, pipeline.config.name), sections))
    return path


def _page(pipeline: Pipeline, summary: Summary, scores, sections) -> str:
    head, rows = scores
    e = html.escape
    facts = {
        "events": f"{summary.events:,}", "events/s": f"{summary.events_per_s:,.0f}",
        "seconds": f"{summary.seconds:.1f}", "keys": f"{sum(summary.keys.values()):,}",
        "dead letters": f"{summary.dead_letters:,}",
        **{f"alarms, {name}": f"{count:,}" for name, count in pipeline.alarms.counts.items()},
        **{f"labels {name}": f"{count:,}" for name, count in summary.labels.items() if count},
    }  # fmt: skip
    cells = "".join(f"<div><b>{e(v)}</b><span>{e(k)}</span></div>" for k, v in facts.items())
    ours = pipeline.config.name
    body = "".join(
        f"<tr{' class=ours' if row[1] == ours else ''}>" + "".join(f"<td>{e(c)}</td>" for c in row) + "</tr>"
        for row in rows
    )
    stages = "".join(
        f"<tr><td>{e(s.name)}</td><td>{e(', '.join(s.config.columns) or 'shared')}</td><td>{e(s.config.cell)}</td>"
        f"<td>{len(s.keyed):,}</td><td>{s.keyed.nbytes / 2**20:.1f} MiB</td></tr>"
        for s in pipeline.stages
    )
    plots = "".join(
        f"<h2>{e(title)}</h2><figure>{svg}<figcaption>{e(note)}</figcaption></figure>" for title, svg, note in sections
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{e(ours)}: report</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.6rem; margin: 0; }} h2 {{ font-size: 1.15rem; margin: 2.2rem 0 .6rem; }}
.facts {{ display: flex; flex-wrap: wrap; gap: 1.6rem; margin: 1.2rem 0; }}
.facts b {{ display: block; font-size: 1.25rem; font-variant-numeric: tabular-nums; }} .facts span {{ color: #666; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: left; padding: .3rem .7rem .3rem 0; border-bottom: 1px solid #ddd; white-space: nowrap; }}
tr.ours td {{ font-weight: 600; }}
figure {{ margin: 0; }} figure svg {{ width: 100%; height: auto; }} figcaption {{ color: #666; font-size: .9rem; }}
</style></head><body>
<h1>{e(ours)}</h1><p>Run on {datetime.now(UTC):%Y-%m-%d %H:%M} UTC.</p>
<div class="facts">{cells}</div>
<h2>Scores</h2><div class="wide"><table><tr>{"".join(f"<th>{e(h)}</th>" for h in head)}</tr>{body}</table></div>
{plots}
<h2>Stages</h2><div class="wide"><table>
<tr><th>stage</th><th>one state for each</th><th>cell</th><th>keys</th><th>states</th></tr>{stages}</table></div>
</body></html>
"""
