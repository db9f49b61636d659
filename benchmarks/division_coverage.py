"""Divide every residual network of coverage_networks.txt in two by the general rule and write what came out.

python benchmarks/division_coverage.py [--only SUBSTRING]
"""

import argparse
import json
import time
import warnings
from pathlib import Path

import torch
from coverage import HERE, build, read_networks, versions

import surgery
from surgery.channels import channel_map

NETWORKS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="divide only the networks whose name contains this")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "division-coverage.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = []
    for listed in read_networks():
        if arguments.only in listed["network"] and (row := divide(listed["library"], listed["network"])):
            rows.append(row)
            print(describe(row), flush=True)
    report = {**versions(), "copies": NETWORKS, "totals": totals(rows), "networks": rows}
    arguments.output.parent.mkdir(exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["totals"], indent=1))


def divide(library: str, name: str) -> dict[str, object] | None:
    """Return what came out, or None for a network that cannot be traced or has no residual block."""
    model = build(library, name)
    row = {"library": library, "network": name, "params": sum(weight.numel() for weight in model.parameters())}
    started = time.process_time()
    try:
        network = surgery.convert(model, "divided", networks=NETWORKS, rule="general")
    except (surgery.errors.UnsupportedModel, surgery.errors.TraceError):
        return None
    except surgery.errors.SurgeryError as error:
        if "has no residual block" in str(error):
            return None
        return {**row, "error": type(error).__name__, "message": str(error)}
    row["cpu_seconds"] = round(time.process_time() - started, 3)
    one = network.get_submodule("members.0")
    row["member_params"] = sum(weight.numel() for weight in one.parameters())
    row["share"] = round(NETWORKS * row["member_params"] / row["params"], 3)
    row["held"] = held(one)
    return {**row, **run(network)}


def held(network: surgery.ConvertedNetwork) -> list[str]:
    """Return why widths of the network cannot change, other than that of the image and the classes."""
    channels = channel_map(network, exact=False)
    spaces = {channels.find(use.writes) for use in channels.uses if use.writes is not None}
    return sorted({pin.reason for space in spaces for pin in channels.pins_of(space) if not pin.boundary})


def run(network: surgery.ConvertedNetwork) -> dict[str, object]:
    """Run the network without weights and return the shape of what it predicts for two images."""
    images = torch.empty(2, *network.meta["architecture"].input_size, device="meta")
    try:
        return {"predicts": list(network.eval().to("meta")(images).shape)}
    except (RuntimeError, ValueError, AssertionError) as error:
        return {"error": type(error).__name__, "message": str(error)}


def describe(row: dict[str, object]) -> str:
    if "error" in row:
        return f"{row['library']} {row['network']}: {row['error']}: {row['message']}"
    note = f", {len(row['held'])} reasons that hold widths, such as: {row['held'][0]}" if row["held"] else ""
    return f"{row['library']} {row['network']}: {row['share']} of the parameters{note}"


def totals(rows: list[dict[str, object]]) -> dict[str, object]:
    divided = [row for row in rows if "error" not in row]
    shares = sorted(row["share"] for row in divided) or [0.0]
    return {
        "residual networks": len(rows),
        "divided": len(divided),
        "with widths that are held": sum(bool(row["held"]) for row in divided),
        "share of the parameters, lowest, median, highest": [shares[0], shares[len(shares) // 2], shares[-1]],
    }


if __name__ == "__main__":
    main()
