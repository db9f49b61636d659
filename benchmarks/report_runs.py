"""Tables of trainings that were killed and of trainings on other machines; `report.py` puts them on the page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tables import machine, table


def resume(result: Mapping[str, Any]) -> Iterator[str]:
    """Render what was killed when, and whether anything was lost."""
    methods: Mapping[str, Mapping[str, Any]] = result["methods"]
    yield "## Killed and started again\n"
    yield machine(result)
    yield (
        "The example of each method on handwritten digits, with a checkpoint after every step, killed by SIGKILL at "
        "random moments, and another one told to stop by SIGTERM. Lost is what differs from a run that was left alone: "
        "losses in all digits, weights, optimizer state, printed lines.\n"
    )
    yield from table(
        ("method", "steps of a run", "kills", "while a checkpoint was written", "runs", "lost", "SIGTERM"),
        [
            (
                name,
                str(found["steps"]),
                str(len(found["kills"])),
                str(sum(kill["while writing"] for kill in found["kills"])),
                str(found["runs"]),
                ", ".join(found["different"]) or "nothing",
                "every step saved" if found["stopped"] == {"exit code": 143, "saved": True} else str(found["stopped"]),
            )
            for name, found in methods.items()
        ],
    )


def ways(result: Mapping[str, Any]) -> Iterator[str]:
    """Render which example ran in which way, and its first loss beside that of a plain run."""
    found: Mapping[str, Mapping[str, Any]] = result["ways"]
    methods = list(found["plain"])
    yield "## Every example on everything that it trains on\n"
    yield machine(result)
    yield (
        "The scripts as they are, with `--smoke`, on the CPU: two processes with gloo for DDP and FSDP2, two virtual "
        "XLA devices for SPMD. The number is the first loss of the converted network, less that of a plain run: "
        "norms of two processes see half of the batch each, and what is drawn is drawn otherwise there and on XLA.\n"
    )
    rows = [
        (way, *(_cell(cells.get(method), method, found["plain"]) for method in methods)) for way, cells in found.items()
    ]
    yield from table(("", *methods), rows)


def _cell(cell: Mapping[str, Any] | None, method: str, plain: Mapping[str, Any]) -> str:
    if cell is None:
        return ""
    if cell["exit code"] != 0:
        return f"exit code {cell['exit code']}"
    return f"{cell['losses'][method][0] - plain[method]['losses'][method][0]:+.1e}"
