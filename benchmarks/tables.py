"""What the pages of `report.py` are made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def percent(values: Sequence[float | None]) -> str:
    """Return mean, smallest and largest of the shares that are known, in percent."""
    known = [100 * value for value in values if value is not None]
    if not known:
        return ""
    return f"{sum(known) / len(known):.1f} ({min(known):.1f} to {max(known):.1f})"


def machine(result: Mapping[str, Any]) -> str:
    """Return the line that says what a result was measured on."""
    env = result["environment"]
    packages = ", ".join(f"{name} {version}" for name, version in env["packages"].items())
    return f"{env['gpu'] or env['processor']}, {env['threads']} threads; {packages}; commit {env['commit'][:12]}.\n"


def ms(times: Mapping[str, float]) -> str:
    """Return a median in milliseconds."""
    return f"{times['median_ms']:.0f}" if times["median_ms"] >= 10 else f"{times['median_ms']:.2f}"


def spread(ratio: Mapping[str, float]) -> str:
    """Return the median and the quartiles of a ratio."""
    return f"{ratio['median']:.3f} ({ratio['q1']:.3f} to {ratio['q3']:.3f})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a Markdown table."""
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield "| " + " | ".join(row) + " |"
    yield ""
