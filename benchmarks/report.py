"""Render the result files as Markdown tables: python benchmarks/report.py writes benchmarks/README.md.

No number in that page is typed by hand.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import report_divided
import report_divided_claims
import report_gated
import report_inclusive
import report_masked
import report_matrix
import report_runs
from tables import machine, ms, percent, spread, table

HERE = Path(__file__).parent
PAGE = HERE / "README.md"
HEAD = """# Benchmarks

Written by `python benchmarks/report.py` from `benchmarks/results/*.json`, which the scripts beside it write. All sides
of a comparison are measured in turns in one process, and compared round by round; absolute times are those of the
machine named.
"""


def main() -> None:
    PAGE.write_text(render(), encoding="utf-8")
    print(PAGE)


def render() -> str:
    """Return the whole page."""
    lines = [HEAD]
    for path in sorted((HERE / "results").glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        name = max((name for name in RENDERERS if path.stem.startswith(name)), key=len)
        lines += RENDERERS[name](result)
    return "\n".join(lines) + "\n"


def coded(result: Mapping[str, Any]) -> Iterator[str]:
    step, inference, memory = result["training step"], result["inference"], result["peak memory"]
    ratio = step["coded / plain"]
    yield f"## Coded against plain: {result['what']}\n"
    yield machine(result)
    yield from table(
        ("", "plain", "coded", "coded / plain, median of pairs (quartiles)"),
        [
            ("training step, ms", ms(step["plain"]), ms(step["coded"]), spread(ratio)),
            ("inference, ms", ms(inference["plain"]), ms(inference["coded"]), spread(inference["coded / plain"])),
            (
                "peak memory, MiB",
                *(f"{memory[name]['step_mib']:.0f}" for name in ("plain", "coded")),
                f"{memory['coded / plain']:.3f}",
            ),
        ],
    )
    yield f"Goal of a training step: at most {step['goal']}. {ratio['pairs']} interleaved pairs."
    literal = step["literal / plain"]
    yield (
        f"The literal form, which computes every branch output, takes {literal['median']:.2f} times a plain "
        "training step and "
        f"{memory['literal / plain']:.2f} times its memory."
    )
    one = inference["one class / coded"]
    yield (
        f"The network cut out for one class keeps {100 * inference['one class / coded, MACs']:.1f} % of the MACs "
        "and takes "
        f"{100 * one['median']:.1f} % of the time of the whole coded one ({spread(one)}).\n"
    )


def core(result: Mapping[str, Any]) -> Iterator[str]:
    columns = list(next(iter(result["networks"].values())))
    yield "## Converting and pruning\n"
    yield machine(result)
    yield f"Median {result['unit']}.\n"
    rows = [(name, *(ms(times[column]) for column in columns)) for name, times in result["networks"].items()]
    yield from table(("network", *columns), rows)
    loaded = [(name, *(ms(times[kind]) for kind in ("coded", "one class"))) for name, times in result["load"].items()]
    yield from table(("surgery.load of", "the coded network", "the network for one class"), loaded)


def coverage(result: Mapping[str, Any]) -> Iterator[str]:
    yield "## Coverage\n"
    yield from table(("what", "networks"), [(name, str(count)) for name, count in result["totals"].items()])


def schemes(result: Mapping[str, Any]) -> Iterator[str]:
    def figures(found: Mapping[str, Any] | None) -> tuple[str, str]:
        return (str(found["min_distance"]), "{}..{}".format(*found["column_sums"])) if found else ("", "")

    yield "## Coding schemes\n"
    yield machine(result)
    yield "Searched anew, in CPU seconds; an upper bound that is reached proves the minimum distance optimal.\n"
    yield from table(
        (
            "classes, active branches",
            *("min. distance", "column sums", "upper bound", "the paper's distance", "its sums", "seconds", "method"),
        ),
        [
            (
                size(row),
                *figures(row),
                f"{row['upper_bound']}{', reached' if row['proven_optimal'] else ''}",
                *figures(row["paper"]),
                f"{row['seconds']:.2f}",
                row["method"],
            )
            for row in result["schemes"]
        ],
    )
    yield from assignments(result)


def assignments(result: Mapping[str, Any]) -> Iterator[str]:
    yield (
        "Mean number of branches that two classes share, by the depth of their deepest common ancestor (0 is the root) "
        "in a made-up tree, for codewords handed out at random and by `assign`.\n"
    )
    yield from table(
        ("classes, active branches", "classes of a group", "at random", "assigned", "most possible", "seconds"),
        [
            (
                size(row),
                ", ".join(map(str, row["group_sizes"])),
                *(" / ".join(f"{mean:.2f}" for mean in row[order]) for order in ("random", "assigned")),
                str(row["most"]),
                f"{row['seconds']:.2f}",
            )
            for row in result["assignment"]
        ],
    )


def size(row: Mapping[str, Any]) -> str:
    return f"{row['classes']}, {row['active']}/{row['branches']}"


def published(result: Mapping[str, Any]) -> Iterator[str]:
    yield "## What the Coded ResNeXt paper prints, and what is counted here\n"
    yield from table(
        ("", "published", "here"), [(row["what"], row["published"], row["here"]) for row in result["rows"]]
    )
    yield (
        "The GFLOPs of Table 5 count BN as in train mode, and for each coded block 3 N C H W for the branch outputs, "
        "which this library does not need for a ResNeXt.\n"
    )


def claims(result: Mapping[str, Any]) -> Iterator[str]:
    runs: Mapping[str, Sequence[Mapping[str, Any]]] = result["variants"]
    coded_runs = runs["coded"]
    yield f"## Claims of Coded ResNeXt, tried: {result['what']}\n"
    yield machine(result)
    yield (
        f'Mean (smallest to largest) of {len(coded_runs)} seeds, in %. "coded" has mu = 6 and p_drop = 0.1; the '
        "others differ from it in what their name says. Precision and recall are those of the first one-class networks "
        "against nine negatives for each positive.\n"
    )
    blocks = list(coded_runs[0]["decoders"])
    yield from table(
        ("variant", "accuracy", *(f"decoder {block}" for block in blocks), "precision", "recall"),
        [
            (
                name,
                percent([run["accuracy"] for run in found]),
                *(percent([run["decoders"][b] for run in found if "decoders" in run]) for b in blocks),
                *(percent([run["binary"][key] for run in found if "binary" in run]) for key in ("precision", "recall")),
            )
            for name, found in runs.items()
        ],
    )
    gains = [coded["accuracy"] - plain["accuracy"] for coded, plain in zip(coded_runs, runs["plain"], strict=True)]
    yield (
        "Coded less plain, seed by seed, in percentage points: "
        + ", ".join(f"{100 * gain:+.2f}" for gain in gains)
        + '. "similar": the codewords are handed out so that the five characters of a coarse group share branches.\n'
    )
    yield "Accuracy without some branches of one block, drawn for each image from those of its class or the others:\n"
    yield from table(
        ("variant", "block", "none", "half of the active", "all active", "as many inactive", "all inactive"),
        [
            (name, block, *(percent(column) for column in removed))
            for name, found in runs.items()
            for block, removed in removals(found)
        ],
    )
    yield from claims_of_coded(coded_runs)


def removals(found: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, list[list[float]]]]:
    """Yield a block and its accuracies: none, half the active, all active, as many inactive, all inactive."""
    for entries in zip(*(run.get("removal", []) for run in found), strict=True):
        active, inactive = ([int(k) for k in entries[0][kind]] for kind in ("active", "inactive"))
        most = max(active)
        places = [
            ("active", 0),
            ("active", most // 2),
            ("active", most),
            ("inactive", most),
            ("inactive", max(inactive)),
        ]
        yield entries[0]["block"], [[entry[kind][str(k)] for entry in entries] for kind, k in places]


def claims_of_coded(found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Render agreement and calibration of the coded variant."""
    yield "Coded: test images by the number of early decoders that agree with the final prediction:\n"
    yield from table(
        ("decoders that agree", "share of the images", "accuracy on them"),
        [
            (
                str(number),
                percent([run["agreement"][number]["share"] for run in found]),
                percent([run["agreement"][number]["accuracy"] for run in found]),
            )
            for number in range(len(found[0]["agreement"]))
        ],
    )
    columns = [(h, i) for h in ("h_T", "h_aug") for i in (0, 1)]
    yield "Coded: ECE and MCE with 15 bins, means over 40 random splits:\n"
    yield from table(
        ("part fitted on", "h_T: ECE", "MCE", "h_aug: ECE", "MCE"),
        [
            (
                f"{100 * float(share):.0f} %",
                *(percent([run["calibration"][share][h][i] for run in found]) for h, i in columns),
            )
            for share in found[0]["calibration"]
        ],
    )


# By the beginning of a result's file name; the longest one that fits is taken.
RENDERERS: Mapping[str, Callable[[Mapping[str, Any]], Iterator[str]]] = {
    "claims-coded": claims,
    "claims-divided": report_divided_claims.claims,
    "claims-gated": report_gated.claims,
    "claims-inclusive": report_inclusive.claims,
    "claims-masked": report_masked.claims,
    "coded": coded,
    "core": core,
    "coverage": coverage,
    "divided": report_divided.cost,
    "division-coverage": report_divided_claims.coverage,
    "gated-pruning": report_gated.pruning,
    "gated-skipping": report_gated.skipping,
    "inclusive": report_inclusive.cost,
    "masked": report_masked.cost,
    "matrix": report_matrix.matrix,
    "published": published,
    "published-divided": report_divided_claims.published,
    "random-networks": report_matrix.random_networks,
    "resume": report_runs.resume,
    "schemes": schemes,
    "ways": report_runs.ways,
}

if __name__ == "__main__":
    main()
