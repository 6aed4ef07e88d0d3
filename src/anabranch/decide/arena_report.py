"""What `anabranch arena` prints and writes: a table, and one self-contained HTML page with plots."""

import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from anabranch.decide.arena import PROBLEMS, Problem, Score, ranked
from anabranch.run.report import COLOURS

HEAD = ("problem", "policy", "score", "95 %", "grows as", "over budget", "decisions/s")


def row(score: Score) -> tuple[str, ...]:
    """A score as it stands in the tables, from the policy on."""
    estimate, b = score.score, score.exponent
    return (
        score.policy,
        f"{estimate.value:,.4g}",
        f"{estimate.low:,.4g} to {estimate.high:,.4g}",
        f"t^{b.value:.2f} ± {b.high - b.value:.2f}" if b else "",
        "" if score.over is None else f"{score.over:.3g}",
        f"{score.decisions_per_s:,.0f}",
    )


def record(scores: Sequence[Score]) -> list[dict[str, Any]]:
    """The scores for JSON, the best of each problem first."""
    out = []
    for problem in _played(scores):
        for score in ranked(scores)[problem.name]:
            b = score.exponent
            out.append({
                "problem": problem.name, "measure": problem.measure, "better": problem.better,
                "policy": score.policy, "score": score.score.value,
                "interval": [score.score.low, score.score.high], "seeds": len(score.score.values),
                "exponent": [b.value, b.low, b.high] if b else None, "over_budget": score.over,
                "decisions_per_s": round(score.decisions_per_s),
            })  # fmt: skip
    return out


def table(scores: Sequence[Score]) -> Table:
    """All scores, the best of each problem in bold."""
    out = Table(box=None, pad_edge=False, header_style="bold")
    for name in HEAD:
        out.add_column(name, justify="left" if name in HEAD[:2] else "right", no_wrap=True)
    for problem in _played(scores):
        sign = "↓" if problem.better == "lower" else "↑"
        for i, score in enumerate(ranked(scores)[problem.name]):
            first = (problem.name, f"{sign} {problem.measure}")[i] if i < 2 else ""
            out.add_row(first, *row(score), style="bold" if i == 0 else None)
        if len(ranked(scores)[problem.name]) == 1:
            out.add_row(f"{sign} {problem.measure}")
        out.add_section()
    return out


def _played(scores: Sequence[Score]) -> list[Problem]:
    names = {score.problem for score in scores}
    return [problem for problem in PROBLEMS if problem.name in names]


def report(scores: Sequence[Score], path: Path) -> None:
    """Write the page.

    Raises:
        ImportError: without matplotlib (the extra `viz`).
    """
    try:
        import matplotlib
    except ImportError:
        raise ImportError("the report needs matplotlib: pip install 'anabranch[viz]'") from None
    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    def drawn(problem: Problem, found: Sequence[Score]) -> str:
        """How scores came about, over the rounds; and where they ended, with intervals."""
        some = [score for score in found if len(score.at) > 1]
        height = max(2.6, 0.3 * len(found) + 0.9)
        with plt.rc_context({
            "font.family": "sans-serif", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
            "svg.fonttype": "none", "svg.hashsalt": problem.name,
        }):  # fmt: skip
            columns = 2 if some else 1
            figure, axes = plt.subplots(1, columns, figsize=(9, height), layout="constrained", squeeze=False)
            colour = {score.policy: COLOURS[i % len(COLOURS)] for i, score in enumerate(found)}
            ends = axes[0, -1]
            for i, score in enumerate(found):
                low, high = score.score.value - score.score.low, score.score.high - score.score.value
                ends.errorbar(
                    score.score.value, i, xerr=[[low], [high]], fmt="o", color=colour[score.policy], capsize=2, lw=1.2
                )
            ends.set(yticks=range(len(found)), xlabel=problem.measure)
            ends.set_yticklabels([score.policy for score in found])
            ends.invert_yaxis()
            ends.grid(axis="x", alpha=0.25)
            for score in some:
                curve, at = score.curve.mean(0), score.at
                axes[0, 0].plot(at, curve, color=colour[score.policy], lw=1.4)
                if len(score.curve) > 1:
                    low, high = np.quantile(score.curve, (0.1, 0.9), axis=0)
                    axes[0, 0].fill_between(at, low, high, color=colour[score.policy], alpha=0.12, lw=0)
            if some:
                axes[0, 0].set(xlabel="rounds", ylabel=problem.measure)
                if problem.regret:
                    axes[0, 0].set(xscale="log", yscale="log")
                axes[0, 0].grid(alpha=0.25)
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
            plt.close(figure)
        return buffer.getvalue()[buffer.getvalue().index("<svg") :]

    e, parts = html.escape, []
    for problem in _played(scores):
        found = ranked(scores)[problem.name]
        body = "".join("<tr>" + "".join(f"<td>{e(cell)}</td>" for cell in row(score)) + "</tr>" for score in found)
        best = "less is better" if problem.better == "lower" else "more is better"
        parts.append(
            f"<h2>{e(problem.name)}</h2><p>{e(problem.about)} Score: {e(problem.measure)}, {best}.</p>"
            f"<figure>{drawn(problem, found)}</figure><div class=wide><table><tr>"
            + "".join(f"<th>{name}</th>" for name in HEAD[1:])
            + f"</tr>{body}</table></div>"
        )
    seeds = len(scores[0].score.values)
    path.write_text(
        f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>The arena</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }}
h2 {{ font-size: 1.15rem; margin: 2.2rem 0 .3rem; }} p {{ margin: .3rem 0; }} .wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: left; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid #ddd; white-space: nowrap; }}
figure {{ margin: 0; }} figure svg {{ width: 100%; height: auto; }}
</style></head><body><h1>The arena</h1><p>Every policy in every world that it can play, on {seeds} seeds; policies as
they come, without tuning. Intervals are Student's over seeds; bands hold eight tenths of them. "Grows as" is the
exponent of a regret over the last nine tenths of a game, with a jackknife interval.</p>{"".join(parts)}</body></html>
""",
        encoding="utf-8",
    )
