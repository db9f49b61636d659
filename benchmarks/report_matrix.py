"""Tables of what every method can do on every network; `report.py` puts them on the page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tables import machine, table


def matrix(result: Mapping[str, Any]) -> Iterator[str]:
    """Render a row a cell and a column a step, with the seconds of what worked; then what did not."""
    cells: Mapping[str, Mapping[str, Any]] = result["cells"]
    steps = list(max((cell["steps"] for cell in cells.values()), key=len))
    outcomes = [row["outcome"] for cell in cells.values() for row in cell["steps"].values()]
    yield f"## Every method on every network, {result['what']}\n"
    yield machine(result)
    yield (
        f"Converted with no options. {len(cells)} cells, {len(outcomes)} steps: "
        + ", ".join(f"{outcomes.count(kind)} {kind}" for kind in ("ok", "refused", "failed"))
        + ". Seconds of every step on a shared machine, its checks included; they say that it works, not how fast.\n"
    )
    yield from table(
        ("cell", *steps),
        [(name, *(shown(cell["steps"].get(step)) for step in steps)) for name, cell in cells.items()],
    )
    for name, cell in cells.items():
        for step, row in cell["steps"].items():
            if row["outcome"] != "ok":
                yield f"- {name}, {step}, {row['outcome']}: {row['note']}"
    yield ""


def shown(row: Mapping[str, Any] | None) -> str:
    """Return what a field of the matrix shows."""
    if row is None:
        return ""
    return f"{row['seconds']:.1f}" if row["outcome"] == "ok" else str(row["outcome"])


def random_networks(result: Mapping[str, Any]) -> Iterator[str]:
    """Render how many random networks hold all laws, why others are refused, and which do not hold."""
    methods: Mapping[str, Mapping[str, Any]] = result["methods"]
    yield f"## Random residual networks: {result['what']}\n"
    yield machine(result)
    yield from table(
        ("method", "networks", "hold all laws", "refused", "fail"),
        [
            (name, *(str(count) for count in (len(rows["networks"]), rows["held"], rows["refused"], rows["failed"])))
            for name, rows in methods.items()
        ],
    )
    reasons = [(name, reason, str(n)) for name, rows in methods.items() for reason, n in rows["reasons"].items()]
    if reasons:
        yield "Why networks are refused:\n"
        yield from table(("method", "reason", "networks"), reasons)
    for name, rows in methods.items():
        for row in rows["networks"]:
            if row["outcome"] == "failed":
                yield f"- {name}, {row['spec']}: {row['note']}"
    yield ""
