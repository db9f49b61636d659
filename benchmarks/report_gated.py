"""Tables of what was measured of gated networks; `report.py` puts them on the page."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from tables import machine, ms, percent, spread, table

Runs = Sequence[Mapping[str, Any]]

OFTEN, SELDOM, AT_MODE = 0.95, 0.05, 0.999  # rates of gates that are nearly always on, off, or decided alike
MODES = ("accuracy", "always on", "stochastic", "majority vote", "mean probability")


def skipping(result: Mapping[str, Any]) -> Iterator[str]:
    """Render time against multiply-adds where closed gates leave work out."""
    yield f"## Closed gates, in time: {result['what']}\n"
    yield machine(result)
    yield (
        "Time is that of the same network with every gate open, round by round: median (quartiles). Promised is the "
        "share of the multiply-adds that closed gates save; reached is the share of that promise that was saved in "
        f"time. The goal is {share(result['goal'])}.\n"
    )
    for kind in ("layers", "channels"):
        found = result[kind]
        yield f"{found['network']}; the source takes {ms(found['source'])} ms:\n"
        yield from table(
            ("gates open", "GMACs", "ms", "time", "promised", "reached", "reached against the source", "goal"),
            [(rate, *at_rate(entry)) for rate, entry in found.items() if "gmacs" in entry],
        )
        yield (
            f"With every gate open it takes {spread(found['full / source'])} times as long as its source; with half of "
            f"them closed, {spread(found['50 % / 50 %, multiplied'])} times as long as where closed gates multiply by "
            "zero instead.\n"
        )


def at_rate(entry: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the columns of one rate of open gates."""
    first = (f"{entry['gmacs']:.3f}", ms(entry))
    if "time" not in entry:
        return (*first, "1", "", "", "", "")
    reached = (shares(entry["reached"][base]) for base in ("every gate open", "source"))
    return (*first, spread(entry["time"]), share(entry["promised"]), *reached, "met" if entry["goal met"] else "missed")


def pruning(result: Mapping[str, Any]) -> Iterator[str]:
    """Render channel gates beside Torch-Pruning."""
    plain, budget = result["plain"], result["budget"]
    yield f"## Channel gates beside Torch-Pruning: {result['what']}\n"
    yield machine(result)
    yield (
        f"{len(plain)} plain networks ({percent(accuracies(plain))} % accuracy, mean and smallest to largest; "
        f"{plain[0]['macs'] / 1e6:.2f} MMACs, {plain[0]['params']:,} parameters), each pruned by every side. Gated: "
        f"{budget['gates']} epochs of gates, the cut, {budget['tuning']} epochs of fine-tuning. Torch-Pruning: the cut "
        f"to the same multiply-adds, {budget['torch-pruning']} epochs of fine-tuning. Plain networks that are trained "
        f"for {budget['torch-pruning']} more epochs come to {percent(accuracies(result['plain, trained on']))} %.\n"
    )
    yield from table(
        ("target", "side", "MACs, % of plain", "parameters, %", "accuracy before tuning", "accuracy", "seed by seed"),
        [
            (target, side, *pruned(runs, plain))
            for target, sides in result["levels"].items()
            for side, runs in sides.items()
        ],
    )
    yield from differences(result)
    yield from pruned_times(result)


def pruned(runs: Runs, plain: Runs) -> tuple[str, ...]:
    """Return what one side's networks cost and how often they are right."""
    costs = (
        percent([run[kind] / source[kind] for run, source in zip(runs, plain, strict=True)])
        for kind in ("macs", "params")
    )
    seeds = ", ".join(f"{100 * value:.2f}" for value in accuracies(runs))
    return (*costs, percent([run["accuracy before tuning"] for run in runs]), percent(accuracies(runs)), seeds)


def differences(result: Mapping[str, Any]) -> Iterator[str]:
    """Say how far the sides are apart in accuracy, and whether their multiply-adds agree."""
    for target, sides in result["levels"].items():
        gated = sides["gated"]
        parts = []
        for peer, runs in sides.items():
            if peer == "gated":
                continue
            gains = [100 * (a - b) for a, b in zip(accuracies(gated), accuracies(runs), strict=True)]
            off = max(abs(run["macs"] / own["macs"] - 1) for own, run in zip(gated, runs, strict=True))
            parts.append(f"{signed(gains)} less {peer} (multiply-adds within {100 * off:.1f} %)")
        yield f"Target {target}, gated, seed by seed, in percentage points: {'; '.join(parts)}."
        lowered = [run["by"]["tau"] for run in gated if run["by"]["tau"] != 0.5]
        if lowered:
            yield f"To leave every path open, tau was lowered to {', '.join(f'{tau:.2f}' for tau in lowered)} there."
        yield ""


def pruned_times(result: Mapping[str, Any]) -> Iterator[str]:
    """Render the time of pruned networks as ratios to the plain one and to each other."""
    batches = [name for name in result["times"][0] if name != "seed"]
    yield (
        "Time of the pruned networks, round by round, seed by seed: the median of the ratios to the plain network, and "
        "of those of the gated one to its peers.\n"
    )
    rows = []
    for target, sides in result["levels"].items():
        for side in sides:
            found = [medians(result, batch, target, side, "/ plain") for batch in batches]
            rows.append((target, f"{side} / plain", *found))
        for peer in sides:
            if peer != "gated":
                found = [medians(result, batch, target, "gated", f"/ {peer}") for batch in batches]
                rows.append((target, f"gated / {peer}", *found))
    yield from table(("target", "time", *batches), rows)
    plain = (", ".join(ms(timed[batch]["plain"]) for timed in result["times"]) for batch in batches)
    per_batch = (f"{times} ms ({batch})" for times, batch in zip(plain, batches, strict=True))
    yield f"The plain network takes {' and '.join(per_batch)}.\n"


def medians(result: Mapping[str, Any], batch: str, target: str, side: str, ratio: str) -> str:
    """Return the medians of one ratio for all seeds."""
    return ", ".join(f"{timed[batch]['levels'][target][side][ratio]['median']:.3f}" for timed in result["times"])


def claims(result: Mapping[str, Any]) -> Iterator[str]:
    """Render what the paper on gated networks claims, as it came out."""
    variants: Mapping[str, Runs] = result["variants"]
    gated = {name: runs for name, runs in variants.items() if "rates" in runs[0]}
    yield f"## Claims of gated networks, tried: {result['what']}\n"
    yield machine(result)
    yield (
        f"Mean (smallest to largest) of {len(next(iter(variants.values())))} seeds, in %. Threshold: gates are open "
        "where that is likelier than not. MACs are those under the threshold.\n"
    )
    yield from table(
        ("variant", "threshold", *MODES[1:], "gates open", "MACs"),
        [
            (name, *(percent([run.get(key) for run in runs]) for key in (*MODES, "rate", "macs share")))
            for name, runs in variants.items()
        ],
    )
    yield (
        "How far the gates settled: shares of all gates by the share of images that they open for under the threshold, "
        "and by P(open), the mean over the images. Gates that depend on no image always decide alike there.\n"
    )
    yield from table(
        ("variant", "at least 95 %", "at most 5 %", "in between", "more than 99.9 % alike",
         "P at least 0.95", "P at most 0.05", "in between"),
        [
            (name, *(percent(column) for column in zip(*(settled(run) for run in runs), strict=True)))
            for name, runs in gated.items()
        ],
    )  # fmt: skip
    yield from comparisons(gated)


def settled(run: Mapping[str, Any]) -> tuple[float, ...]:
    """Return the shares of the gates that are nearly always on, off, neither, that decide alike, and so by P(open)."""
    rates, chances = ([value for block in run[key].values() for value in block] for key in ("rates", "probabilities"))
    alike = sum(max(rate, 1 - rate) > AT_MODE for rate in rates) / len(rates)
    return *divided(rates), alike, *divided(chances)


def divided(values: Sequence[float]) -> tuple[float, float, float]:
    """Return which shares of the values are near 1, near 0, and neither."""
    on, off = sum(value >= OFTEN for value in values), sum(value <= SELDOM for value in values)
    return on / len(values), off / len(values), (len(values) - on - off) / len(values)


def comparisons(gated: Mapping[str, Runs]) -> Iterator[str]:
    """Compare losses, and gates that see the image with such that do not, where equally many gates are open."""
    curves = sweeps(gated)
    yield (
        "Differences in accuracy under the threshold where equally many gates are open, in percentage points: between "
        "the targets accuracy is taken as linear in the share of open gates, and compared in the middle of the shares "
        "that both sides have.\n"
    )
    kinds, losses = ("dependent", "independent"), ("per batch", "per gate")
    pairs = [((kind, losses[0]), (kind, losses[1])) for kind in kinds]
    pairs += [((kinds[0], loss), (kinds[1], loss)) for loss in losses]
    rows = []
    for first, second in pairs:
        if first not in curves or second not in curves:
            continue
        found = [at_equal_rate(a, b) for a, b in zip(curves[first], curves[second], strict=True)]
        at = ", ".join("none in common" if entry is None else f"{100 * entry[0]:.0f}" for entry in found)
        known = [100 * entry[1] for entry in found if entry is not None]
        mean = f"{statistics.fmean(known):+.2f}" if known else ""
        rows.append((f"{', '.join(first)} less {', '.join(second)}", signed(known), mean, at))
    yield from table(("", "seed by seed", "mean", "at so many % of the gates open"), rows)


Curve = list[tuple[float, float]]  # (share of open gates, accuracy), rising


def sweeps(gated: Mapping[str, Runs]) -> dict[tuple[str, str], list[Curve]]:
    """Return the curves of layer gates over their targets, one for each seed, by (dependent or not, loss)."""
    found: dict[tuple[str, str], list[Curve]] = {}
    for name, runs in gated.items():
        if name.startswith("channels"):
            continue
        kind, loss, _ = name.split(", ")
        curves = found.setdefault((kind, loss), [[] for _ in runs])
        for curve, run in zip(curves, runs, strict=True):
            curve.append((run["rate"], run["accuracy"]))
    return {key: [sorted(curve) for curve in curves] for key, curves in found.items()}


def at_equal_rate(first: Curve, second: Curve) -> tuple[float, float] | None:
    """Return the middle of the rates that both curves have, and the first's accuracy there less the second's."""
    low, high = max(first[0][0], second[0][0]), min(first[-1][0], second[-1][0])
    if low > high:
        return None
    middle = (low + high) / 2
    return middle, at(first, middle) - at(second, middle)


def at(curve: Curve, rate: float) -> float:
    for (low, below), (high, above) in pairwise(curve):
        if low <= rate <= high:
            return below if high == low else below + (above - below) * (rate - low) / (high - low)
    return curve[0][1]


def accuracies(runs: Runs) -> list[float]:
    return [run["accuracy"] for run in runs]


def signed(points: Sequence[float]) -> str:
    return ", ".join(f"{value:+.2f}" for value in points)


def share(value: float) -> str:
    return f"{100 * value:.0f} %"


def shares(found: Mapping[str, float]) -> str:
    return f"{share(found['median'])} ({100 * found['q1']:.0f} to {100 * found['q3']:.0f})"
