"""Inspect every network of coverage_networks.txt and write what was found beside what a survey expects.

python benchmarks/coverage.py [--only SUBSTRING]
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import time
import warnings
from pathlib import Path

import timm
import torch
import torchvision
from torch import nn

import surgery
from surgery.architecture import Architecture

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="inspect only the networks whose name contains this")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "coverage.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = []
    for expected in read_networks():
        if arguments.only in expected["network"]:
            rows.append(inspect_network(expected))
            print(describe(rows[-1]), flush=True)
    report = {**versions(), "totals": totals(rows), "networks": rows}
    arguments.output.parent.mkdir(exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["totals"], indent=1))


def read_networks() -> list[dict[str, str]]:
    lines = (HERE / "coverage_networks.txt").read_text().splitlines()
    names = ("library", "network", "traceable", "additions", "grouped", "depthwise", "cardinality")
    return [dict(zip(names, line.split(), strict=True)) for line in lines if not line.startswith("#")]


def inspect_network(expected: dict[str, str]) -> dict[str, object]:
    model = build(expected["library"], expected["network"])
    started = time.process_time()
    try:
        found = structure(surgery.inspect(model))
    except surgery.errors.SurgeryError as error:
        found = {"error": type(error).__name__, "message": str(error)}
    seconds = round(time.process_time() - started, 3)
    return {**expected, **found, "cpu_seconds": seconds}


def build(library: str, name: str) -> nn.Module:
    create = timm.create_model if library == "timm" else torchvision.models.get_model
    try:
        with torch.device("meta"):
            return create(name)
    except (RuntimeError, NotImplementedError):  # an initialisation that reads numbers, as RegNet's does
        return create(name)


def structure(architecture: Architecture) -> dict[str, object]:
    blocks = architecture.blocks
    cardinalities = sorted({block.cardinality for block in blocks if block.kind == "grouped"})
    return {
        "stages": [[stage.name, len(stage.blocks)] for stage in architecture.stages],
        "blocks": len(blocks),
        "residual": sum(block.is_residual for block in blocks),
        "kinds": sorted({block.kind for block in blocks}),
        "found_cardinality": "/".join(map(str, cardinalities)),
        "classes": architecture.head.classes,
        "gmacs": round(architecture.macs / 1e9, 3),
        "parameters": architecture.params,
        "refusals": [str(refusal) for refusal in architecture.refusals],
    }


def describe(row: dict[str, object]) -> str:
    if "error" in row:
        return f"{row['library']} {row['network']}: {row['error']}: {row['message']}"
    note = "" if row["cardinality"] in ("-", row["found_cardinality"]) else "  CARDINALITY"
    note += "" if row["additions"] in ("-", str(row["residual"])) else "  ADDITIONS"
    return (
        f"{row['library']} {row['network']}: {row['stages']}, {row['residual']} of {row['blocks']} residual (survey "
        f"{row['additions']}), branches {row['found_cardinality'] or '-'} (survey {row['cardinality']}), "
        f"{len(row['refusals'])} refusals{note}"
    )


def totals(rows: list[dict[str, object]]) -> dict[str, int]:
    traced = [row for row in rows if "error" not in row]
    return {
        "networks": len(rows),
        "traced": len(traced),
        "traceable by the survey and refused": sum(row["traceable"] == "yes" and "error" in row for row in rows),
        "with blocks": sum(row["blocks"] > 0 for row in traced),
        "same additions": sum(row["additions"] == str(row["residual"]) for row in traced),
        "other additions": sum(row["additions"] not in ("-", str(row["residual"])) for row in traced),
        "same cardinality": sum(row["cardinality"] == row["found_cardinality"] for row in traced),
        "other cardinality": sum(row["cardinality"] not in ("-", row["found_cardinality"]) for row in traced),
    }


def versions() -> dict[str, object]:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=HERE, check=False)
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip() if commit.returncode == 0 else "",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "cpu_count": os.cpu_count(),
    }


if __name__ == "__main__":
    main()
