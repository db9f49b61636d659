"""Render the result files as Markdown tables: python benchmarks/report.py writes benchmarks/README.md.

No number in that page is typed by hand.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

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
        kind = path.stem.partition("-")[0]
        lines += {"coded": coded, "core": core, "coverage": coverage}[kind](result)
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


def machine(result: Mapping[str, Any]) -> str:
    env = result["environment"]
    packages = ", ".join(f"{name} {version}" for name, version in env["packages"].items())
    return f"{env['gpu'] or env['processor']}, {env['threads']} threads; {packages}; commit {env['commit'][:12]}.\n"


def ms(times: Mapping[str, float]) -> str:
    return f"{times['median_ms']:.0f}" if times["median_ms"] >= 10 else f"{times['median_ms']:.2f}"


def spread(ratio: Mapping[str, float]) -> str:
    return f"{ratio['median']:.3f} ({ratio['q1']:.3f} to {ratio['q3']:.3f})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield "| " + " | ".join(row) + " |"
    yield ""


if __name__ == "__main__":
    main()
