"""Tables of what was measured of divided networks; `report.py` puts them on the page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tables import machine, ms, spread, table

SAME_MEANS = "undivided, by the same means"
WAYS = (SAME_MEANS, "sequential", "fused", "concurrent")


def cost(result: Mapping[str, Any]) -> Iterator[str]:
    """Render latencies of all ways to run the small networks."""
    yield f"## Divided: what inference takes{'' if result['device'] == 'cpu' else ' on a GPU'}\n"
    yield machine(result)
    yield (
        "One forward, relative to the undivided network as it is in eager mode; median of pairs (quartiles). The first "
        "column of ratios is the undivided network with what also makes the fused one faster: folded norms, memory "
        "format, packed and Winograd convolutions. Sequential: the "
        "converted network. Fused: "
        "`surgery_divided.fuse`, in the way that it measured to be the fastest. Concurrent: one thread for each small "
        f"network. Goal: {result['goal']}.\n"
    )
    yield from table(
        ("network", "S", "batch", "undivided, ms", *WAYS, f"fused / {SAME_MEANS}", "MACs", "fused as"),
        [
            (
                row["network"],
                str(row["networks"]),
                str(row["batch"]),
                ms(row["ms"]["undivided"]),
                *(spread(row["ratios"][way]) for way in WAYS),
                spread(row[f"fused / {SAME_MEANS}"]),
                f"{row['macs']['divided'] / row['macs']['undivided']:.2f}",
                chosen(row),
            )
            for row in result["rows"]
        ],
    )
    pairs = result["rows"][0]["ratios"]["fused"]["pairs"]
    yield f"{pairs} interleaved pairs. MACs: of all small networks, relative to the undivided one.\n"


def chosen(row: Mapping[str, Any]) -> str:
    """Return the form, and of how many layers it is the one in each way."""
    layers = row["layers"]
    counts = [f"{layers.count(way)} {way}" for way in dict.fromkeys(layers)]
    return f"{row['chosen']} ({', '.join(counts)})" if layers else str(row["chosen"])
