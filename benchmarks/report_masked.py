"""Tables of what was measured of masked networks; `report.py` puts them on the page."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tables import machine, ms, percent, spread, table

Runs = Sequence[Mapping[str, Any]]

COLUMNS = ("phase 1", "accuracy", "once fixed", "kept")
# Variants whose accuracies are compared seed by seed.
PAIRS = (
    *((f"learned, {k}", f"random, {k}") for k in (1, 4)),
    *((f"learned, {k}", "full") for k in (1, 2, 4)),
    ("learned, 4", "real-valued to the end"),
    ("learned, 4, branch norm", "full, branch norm"),
    ("full", "plain"),
)


def cost(result: Mapping[str, Any]) -> Iterator[str]:
    """Render what masks cost in training, and what cutting unused branches saves."""
    goals = result["goals"]
    yield "## Masked networks, in time and memory\n"
    yield machine(result)
    yield (
        "A training step (forward, backward, SGD) on random images of 32 x 32, by one thread unless said otherwise: "
        "times relative to another network, round by round, median (quartiles). The goals: masks that learn at most "
        f"{goals['overhead']:g} times as long as full fixed connectivity, and the whole step at most {goals['step']:g} "
        "times the source's. Memory is what three steps add to a process.\n"
    )
    for row in result["rows"]:
        yield f"{row['network']}, {row['batch']} images; the source takes {ms(row['step_ms']['source'])} ms:\n"
        yield from table(
            ("", "ratio", "goal"),
            [(what, spread(found), goal(what, found, goals)) for what, found in row["ratios"].items()],
        )
        yield from table(
            ("", *row["peak_mib"]), [("peak memory, MiB", *(f"{mib:,.0f}" for mib in row["peak_mib"].values()))]
        )
    yield "Inference after masks were frozen at random:\n"
    yield from table(
        ("network", "fan-in", "parameters kept", "MACs kept", "pruned / frozen", "pruned / source"),
        [
            (row["network"], fan_in, *shares(found), spread(found["pruned / frozen"]), spread(found["pruned / source"]))
            for row in result["rows"]
            for fan_in, found in row["inference"].items()
        ],
    )


def goal(what: str, found: Mapping[str, float], goals: Mapping[str, float]) -> str:
    """Say whether a ratio that has a goal meets it."""
    limit = {"learned / full": goals["overhead"], "learned / source": goals["step"]}.get(what)
    if limit is None:
        return ""
    return f"{limit:g}, met" if found["median"] <= limit else f"{limit:g}, missed"


def shares(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield the shares of parameters and multiply-adds that pruning keeps."""
    for before, after in (found["params"], found["macs"]):
        yield f"{100 * after / before:.1f} %"


def claims(result: Mapping[str, Any]) -> Iterator[str]:
    """Render what the paper on masked networks claims, as it came out."""
    variants: Mapping[str, Runs] = result["variants"]
    yield f"## Claims of MaskConnect, tried: {result['what']}\n"
    yield machine(result)
    yield explained(variants, result["recipe"])
    yield from table(
        ("variant", "accuracy after phase 1", "accuracy", "once fixed", "parameters kept", "MACs, % of plain"),
        [
            (name, *(percent([run.get(key) for run in runs]) for key in COLUMNS), macs)
            for (name, runs), macs in zip(variants.items(), multiply_adds(variants), strict=True)
        ],
    )
    yield from differences(variants)
    yield from connected({name: runs for name, runs in variants.items() if "branches" in runs[0]})


def explained(variants: Mapping[str, Runs], recipe: Mapping[str, Any]) -> str:
    """Say what the columns are."""
    method, training = recipe["method"], recipe["training"]
    ratio = variants["full"][0]["macs"] / variants["plain"][0]["macs"]
    return (
        f"Mean (smallest to largest) of {len(variants['plain'])} seeds, in %. The number in a name is the fan-in K. "
        f"Masks change at a rate of {method['mask_lr']:g}, and are fixed after "
        f"{method['freeze_epoch']} of {training['epochs']} epochs, where the accuracy after phase 1 was measured; "
        '"to the end": they are real-valued in all epochs, and are fixed behind the last with no training after that. '
        f"Parameters kept and MACs are those of the pruned network; before, a masked network has {ratio:.2f} times the "
        "MACs of the plain one, since projections are computed for every stream.\n"
    )


def multiply_adds(variants: Mapping[str, Runs]) -> Iterator[str]:
    """Yield what every variant computes once it is pruned, in percent of the plain network."""
    plain = variants["plain"][0]["macs"]
    for runs in variants.values():
        yield percent([run["macs once pruned"] / plain for run in runs if "macs once pruned" in run])


def differences(variants: Mapping[str, Runs]) -> Iterator[str]:
    """Compare the accuracies of pairs of variants, seed by seed."""
    rows = []
    for first, second in PAIRS:
        if first not in variants or second not in variants:
            continue
        both = zip(variants[first], variants[second], strict=True)
        points = [100 * (a["accuracy"] - b["accuracy"]) for a, b in both]
        seeds = ", ".join(f"{value:+.2f}" for value in points)
        rows.append((f"{first} less {second}", seeds, f"{statistics.fmean(points):+.2f}"))
    yield "Differences in accuracy, in percentage points:\n"
    yield from table(("", "seed by seed", "mean"), rows)


def connected(masked: Mapping[str, Runs]) -> Iterator[str]:
    """Render how sure the masks were, and how many branches are read."""
    blocks = list(next(iter(masked.values()))[0]["branches"])
    yield (
        "Branches that are read, by block from input to output (those of the last are all joined), and the share of "
        "the real-valued masks that was on the connections that were fixed: K / C where masks are all equal, as they "
        "begin, and 100 % where nothing is learned.\n"
    )
    yield from table(
        ("variant", "share of the masks", *blocks),
        [
            (name, percent([run["concentration"] for run in runs]), *(counts(runs, block) for block in blocks))
            for name, runs in masked.items()
        ],
    )


def counts(runs: Runs, block: str) -> str:
    """Return how many branches of a block are read, seed by seed, or once if it is the same number."""
    found = [str(run["branches"][block]) for run in runs]
    return found[0] if len(set(found)) == 1 else ", ".join(found)
