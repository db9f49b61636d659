"""Tables of what was measured of inclusive networks; `report.py` puts them on the page."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from tables import machine, percent, spread, table

Runs = Sequence[Mapping[str, Any]]
Variants = Mapping[str, Runs]
Curve = Sequence[tuple[float, float]]
"""Multiply-adds and accuracy of one network after the other, from few multiply-adds to many."""

THIN = ("joint, independent", "joint, shared", "joint, taxonomy", "sparse", "sparse, taxonomy")
# What single networks, trained by themselves, make together; the plain one is the last of both.
ALONE = {"thin, each alone": "thin", "shallow, each alone": "shallow"}
# Pairs that are compared point by point: sub-network k with k, exit with exit.
PAIRS = (
    ("joint, independent", "joint, shared"),
    ("joint, independent", "thin, each alone"),
    ("shallow, joint", "shallow, each alone"),
    ("sparse", "joint, independent"),
    ("joint, taxonomy", "joint, independent"),
    ("sparse, taxonomy", "sparse"),
)
# Pairs that are compared where they have the same multiply-adds: those of the second.
EQUAL = (
    ("joint, independent", "shallow, joint"),
    ("thin, each alone", "shallow, each alone"),
    ("joint, independent", "sparse"),
)


def cost(result: Mapping[str, Any]) -> Iterator[str]:
    """Render what training and anytime prediction with nested sub-networks cost."""
    goals, threads = result["goals"], result["environment"]["threads"]
    yield f"## Inclusive networks, in time and memory, {threads} thread{'s' if threads > 1 else ''}\n"
    yield machine(result)
    yield (
        "A training step is forward, backward and SGD on random images; times relative to another network, round by "
        'round, median (quartiles). "Plain of the same MACs" is the source with as many branches as give it the '
        'multiply-adds of the sparse network. "Passes" is one forward and backward pass for each sub-network of the '
        'dense network, "anytime" a prediction after each sub-network of the sparse one, "full" one forward of it, '
        "both on images of 224 x 224 where those of training are larger than 64 x 64.\n"
    )
    for row in result["rows"]:
        yield f"{row['network']}, K = {row['subnetworks']}, {row['size']} px, {row['batch']} images:\n"
        wanted = {
            "sparse / plain of the same MACs": goals["sparse / plain of the same MACs"],
            "passes / sparse": -row["subnetworks"] * goals["passes / sparse, per sub-network"],
        }
        lines = [(f"training, {what}", found, wanted.get(what)) for what, found in row["ratios"].items()]
        for images, found in row["inference"].items():
            lines.append(
                (f"inference, anytime / full, batch of {images}", found["anytime / full"], goals["anytime / full"])
            )
        yield from table(
            ("", "ratio", "goal"), [(what, spread(found), goal(found, limit)) for what, found, limit in lines]
        )
        macs = [(name, f"{count / 1e6:,.0f} M") for name, count in row["macs"].items()]
        yield from table(("", *(name for name, _ in macs)), [("multiply-adds", *(count for _, count in macs))])
        memory = [(way, mib) for way, mib in row["peak_mib"].items() if mib is not None]
        if memory:
            yield from table(
                ("", *(way for way, _ in memory)),
                [("memory of a dense training step, MiB", *(f"{mib:,.0f}" for _, mib in memory))],
            )


def goal(found: Mapping[str, float], limit: float | None) -> str:
    """Say whether a ratio meets its goal: at most the limit, or at least the negative of it."""
    if limit is None:
        return ""
    met = found["median"] <= limit if limit > 0 else found["median"] >= -limit
    return f"{'at most' if limit > 0 else 'at least'} {abs(limit):.2f}, {'met' if met else 'missed'}"


def claims(result: Mapping[str, Any]) -> Iterator[str]:
    """Render what the paper on slicing networks claims, as it came out."""
    variants = assembled(result["variants"])
    seeds = len(variants["plain"])
    yield f"## Claims of slicing networks vertically, tried: {result['what']}\n"
    yield machine(result)
    yield (
        f"Accuracy in %, mean (smallest to largest) of {seeds} seeds. Thin: sub-networks 1 to K, of which the last is "
        'the whole network. Shallow: exits behind evenly spaced blocks of the plain network. "Joint": all are trained '
        'together; "each alone": each is trained by itself, and the last is the plain network.\n'
    )
    for title, names in (
        ("thin", ("thin, each alone", *THIN)),
        ("shallow", ("shallow, each alone", "shallow, joint")),
    ):
        found = {name: variants[name] for name in names if name in variants}
        if found:
            yield from errors(title, found)
    yield from differences(variants)
    yield from at_equal_cost(variants)
    yield from contributions(variants)
    yield from hierarchy(variants)


def assembled(variants: Variants) -> dict[str, Runs]:
    """Return the variants, and with them the networks that were trained by themselves, as if they were one."""
    found = dict(variants)
    for name, kind in ALONE.items():
        parts = [runs for part, runs in variants.items() if part.rpartition(" ")[0] == kind]
        if parts and "plain" in variants:
            seeds = zip(*parts, variants["plain"], strict=True)
            found[name] = [{key: [run[key][0] for run in runs] for key in ("accuracies", "macs")} for runs in seeds]
    return found


def errors(title: str, found: Variants) -> Iterator[str]:
    """Render the accuracies of sub-networks or exits, with what they compute."""
    count = len(next(iter(found.values()))[0]["accuracies"])
    yield from table(
        (title, *(f"{number}: MMACs, accuracy" for number in range(1, count + 1))),
        [
            (
                name,
                *(
                    f"{runs[0]['macs'][i] / 1e6:.2f}, {percent([run['accuracies'][i] for run in runs])}"
                    for i in range(count)
                ),
            )
            for name, runs in found.items()
        ],
    )


def differences(variants: Variants) -> Iterator[str]:
    """Compare accuracies point by point, seed by seed."""
    rows = []
    for first, second in PAIRS:
        if first in variants and second in variants:
            columns = zip(*(points(*both) for both in zip(variants[first], variants[second], strict=True)), strict=True)
            rows.append((f"{first} less {second}", *map(seed_by_seed, columns)))
    yield "Differences in accuracy, in percentage points: mean (seed by seed).\n"
    yield from table(("", *(f"{number}" for number in range(1, len(rows[0])))), rows)


def points(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[float]:
    """Return by how many percentage points the first is better, for each sub-network."""
    both = zip(first["accuracies"], second["accuracies"], strict=True)
    return [100 * (a - b) for a, b in both]


def seed_by_seed(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):+.2f} ({', '.join(f'{value:+.2f}' for value in values)})"


def at_equal_cost(variants: Variants) -> Iterator[str]:
    """Compare accuracies at the multiply-adds of the second of two variants."""
    yield (
        "The same where both compute as much, that is at the multiply-adds of the second, between whose neighbours the "
        "accuracy of the first is interpolated linearly; no number where the first has nothing so small:\n"
    )
    rows = []
    for first, second in EQUAL:
        if first not in variants or second not in variants:
            continue
        columns: list[list[float]] = []
        for a, b in zip(variants[first], variants[second], strict=True):
            columns.append([100 * (at(curve(a), macs) - accuracy) for macs, accuracy in curve(b)])
        rows.append((f"{first} less {second}", *(cell(values) for values in zip(*columns, strict=True))))
    yield from table(("", *(f"{number}" for number in range(1, len(rows[0])))), rows)


def cell(values: Sequence[float]) -> str:
    return "" if any(value != value for value in values) else seed_by_seed(values)


def curve(run: Mapping[str, Any]) -> Curve:
    return list(zip(run["macs"], run["accuracies"], strict=True))


def at(line: Curve, macs: float) -> float:
    """Return the accuracy at some multiply-adds, by linear interpolation; no number outside of the line."""
    for (left, low), (right, high) in pairwise(line):
        if left <= macs <= right:
            return low + (high - low) * (macs - left) / (right - left)
    return float("nan")


def contributions(variants: Variants) -> Iterator[str]:
    """Render how much the branches contribute, from the first to the last."""
    yield (
        "l1 norm of the weights by which each branch enters its block's output, as a part of the mean over the "
        "branches of the block: mean over blocks and seeds. Correlation: of the norm with the index of the branch, "
        "mean (smallest to largest) over blocks and seeds; where later branches contribute less it is negative.\n"
    )
    rows = []
    for name, runs in variants.items():
        blocks = [norms for run in runs for norms in run.get("norms", {}).values()]
        if blocks:
            shares = [[norm / statistics.fmean(block) for norm in block] for block in blocks]
            means = [f"{statistics.fmean(column):.2f}" for column in zip(*shares, strict=True)]
            signs = [statistics.correlation(range(len(block)), block) for block in blocks]
            rows.append((name, *means, f"{statistics.fmean(signs):+.2f} ({min(signs):+.2f} to {max(signs):+.2f})"))
    yield from table(("", *(f"branch {number}" for number in range(1, len(rows[0]) - 1)), "correlation"), rows)


def hierarchy(variants: Variants) -> Iterator[str]:
    """Render what a taxonomy does for the sub-network that is right least often."""
    found = {name: runs for name, runs in variants.items() if name.endswith("taxonomy")}
    if not found:
        return
    yield (
        "With a taxonomy: every sub-network predicts the finest level on which it is right as often as the whole "
        "network is on the classes, and no finer one than a larger sub-network. Accuracy on the groups by sub-network, "
        "and the worst accuracy over the sub-networks:\n"
    )
    count = len(next(iter(found.values()))[0]["levels"])
    yield from table(
        (
            "variant",
            *(f"groups, {number}" for number in range(1, count + 1)),
            "worst, classes, trained without groups",
            "worst, classes",
            "worst, chosen levels",
            "chosen for groups, of K",
        ),
        [
            (
                name,
                *(percent([run["levels"][k][1] for run in runs]) for k in range(count)),
                percent(least(variants.get(without(name), []))),
                percent(least(runs)),
                percent([run["worst"] for run in runs]),
                ", ".join(str(sum(level > 0 for level in run["chosen"])) for run in runs),
            )
            for name, runs in found.items()
        ],
    )


def without(name: str) -> str:
    """Return the variant that differs in having no taxonomy."""
    return "sparse" if name.startswith("sparse") else "joint, independent"


def least(runs: Runs) -> list[float]:
    return [min(run["accuracies"]) for run in runs]
