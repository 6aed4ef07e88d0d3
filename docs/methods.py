"""Write docs/methods.md: every method, what its contract says on its example, and the verdict of its claim.

    python docs/methods.py

The contract is checked here and now; verdicts come from the ledger in claims/results.
"""

from itertools import groupby
from pathlib import Path

import jax

from anabranch import catalog, contract


def cells(slug: str) -> dict[str, str]:
    """The verdict of each row of the contract, or why there is none."""
    try:
        cell, xs = catalog.example(slug)
    except LookupError:
        return {}
    marks = {"holds": "✓", "breaks": "✗", "n/a": "–"}
    return {row.name: marks[str(row.verdict)] for row in contract.check(cell, xs, key=jax.random.PRNGKey(0)).rows}


def claim(record: dict | None) -> str:
    """The verdict, and how many comparisons stand behind it."""
    if record is None:
        return ""
    verdicts = [c["verdict"] for c in record["comparisons"]]
    return f"{record['verdict']} ({verdicts.count('holds')} of {len(verdicts)} comparisons hold)"


def page() -> str:
    """The whole page as Markdown."""
    ledger = catalog.ledger()
    methods = catalog.methods()
    done = [method for method in methods if method.status != "planned"]
    lines = [
        "# Methods",
        "",
        f"{len(done)} of {len(methods)} methods are here. ✓ holds, ✗ breaks, – does not apply.",
        "",
    ]
    for family, group in groupby(sorted(methods, key=lambda method: (method.family, method.n)), lambda m: m.family):
        group = list(group)
        here = {method.slug: cells(method.slug) for method in group if method.status != "planned"}
        rows = list(dict.fromkeys(name for report in here.values() for name in report))
        lines += [f"## {family}", ""]
        if here:
            lines += ["| " + " | ".join(["method", "claim", *rows, "paper"]) + " |", "|---" * (len(rows) + 3) + "|"]
            for method in group:
                if method.slug in here:
                    report = [here[method.slug].get(name, "") for name in rows]
                    row = [f"`{method.slug}`", claim(ledger.get(method.slug)), *report, method.title]
                    lines.append("| " + " | ".join(row) + " |")
            lines.append("")
        planned = [f"`{method.slug}`" for method in group if method.slug not in here]
        lines += [f"Planned: {', '.join(planned)}.", ""] if planned else []
    return "\n".join(lines)


if __name__ == "__main__":
    Path(__file__).with_suffix(".md").write_text(page(), encoding="utf-8")
