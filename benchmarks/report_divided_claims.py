"""Tables of what was tried of SplitNet's claims, and of its printed figures; `report.py` puts them on the page."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tables import machine, percent, table

Runs = Sequence[Mapping[str, Any]]

MANNERS = ("mean_logits", "max_logits", "mean_probabilities", "max_probabilities")
# Variants of S networks whose ensembles are compared seed by seed: the first less the second.
PAIRS = (("", ", neither"), ("", ", one view"), ("", ", no co-training"))


def claims(result: Mapping[str, Any]) -> Iterator[str]:
    """Render what the paper on divided networks claims, as it came out."""
    variants: Mapping[str, Runs] = result["variants"]
    yield f"## Claims of SplitNet, tried: {result['what']}\n"
    yield machine(result)
    yield (
        f"Mean (smallest to largest) of {len(variants['plain'])} seeds, in %. Networks have views and co-training "
        "unless the name says otherwise. Agreement: images of which all networks say the same class.\n"
    )
    plain = variants["plain"][0]
    yield from table(
        ("variant", "ensemble", "mean of the networks alone", "agreement", "accuracy there", "parameters", "MACs"),
        [
            (
                name,
                percent([run["accuracy"] for run in runs]),
                *(percent([run.get(key) for run in runs]) for key in ("average", "agreement", "agreed")),
                *(f"{runs[0][key] / plain[key]:.2f}" for key in ("params", "macs")),
            )
            for name, runs in variants.items()
        ],
    )
    yield from differences(variants)
    yield "Ensembles joined in other manners:\n"
    yield from table(
        ("variant", *MANNERS),
        [
            (name, *(percent([run["ensembles"][manner] for run in runs]) for manner in MANNERS))
            for name, runs in variants.items()
            if "ensembles" in runs[0]
        ],
    )


def differences(variants: Mapping[str, Runs]) -> Iterator[str]:
    """Compare ensembles with the undivided network and with each other, seed by seed."""
    sizes = [name for name in variants if name.endswith(" networks")]
    pairs = [(name, "plain") for name in sizes]
    pairs += [(size + first, size + second) for size in sizes for first, second in PAIRS]
    rows = []
    for first, second in pairs:
        if first in variants and second in variants:
            both = zip(variants[first], variants[second], strict=True)
            points = [100 * (one["accuracy"] - other["accuracy"]) for one, other in both]
            seeds = ", ".join(f"{value:+.2f}" for value in points)
            rows.append((f"{first} less {second}", seeds, f"{statistics.fmean(points):+.2f}"))
    yield "Differences in accuracy, in percentage points:\n"
    yield from table(("", "seed by seed", "mean"), rows)


def published(result: Mapping[str, Any]) -> Iterator[str]:
    """Render the figures that the paper prints beside those that are counted here."""
    yield "## What the SplitNet paper prints, and what is counted here\n"
    yield f"{result['fit']} of {len(result['rows'])} are the same in all digits.\n"
    yield from table(
        ("", "published", "here"), [(row["what"], row["published"], row["here"]) for row in result["rows"]]
    )


def coverage(result: Mapping[str, Any]) -> Iterator[str]:
    """Render how many networks the general rule divides."""
    yield "## Divided in two by the general rule\n"
    yield from table(("what", "networks"), [(name, str(count)) for name, count in result["totals"].items()])
    left = [f"{row['network']} ({row['message']})" for row in result["networks"] if "error" in row]
    if left:
        yield f"Not divided: {'; '.join(left)}.\n"
