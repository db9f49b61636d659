"""A hundred random residual networks for each method: python benchmarks/random_networks.py [--only METHOD]

Every network is checked for all laws of `surgery.testing`, that of ONNX included, with the defaults of the method;
those that are drawn on the way and refused come on top. What is in the result file is not checked again, so a run that
was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS, write

import surgery
from surgery.errors import InvalidOption, NothingConverted, SurgeryError
from surgery.testing import LAWS, ResidualSpec

sys.path.append(str(Path(__file__).parents[1]))
from tests.methods import NAMES, keeps_laws, takes  # the tests prune in the same way

SIZE = 16
# What `residual_networks` draws from; here with a seed of its own, so that no network depends on those before it.
CHOICES: Mapping[str, Sequence[Any]] = {
    "kind": ("basic", "bottleneck"),
    "groups": (1, 2, 4, 8),
    "width": (1, 2, 3),
    "stride": (1, 2),
    "preactivation": (False, True),
    "attention": ("none", "inside", "behind"),
    "projection": ("conv", "pool", "pad"),
    "inplace": (False, True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", type=int, default=100, help="that each method can take")
    parser.add_argument("--only", default="", help="check only this method")
    parser.add_argument("--name", default="random-networks", help="of the result file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    path = RESULTS / f"{arguments.name}.json"
    found = json.loads(path.read_text(encoding="utf-8"))["methods"] if path.exists() else {}
    rows: dict[str, list[dict[str, Any]]] = {name: found.get(name, {"networks": []})["networks"] for name in NAMES}
    for method in NAMES:
        for number, spec in enumerate(specs(method, arguments.networks)):
            if arguments.only in method and number >= len(rows[method]):
                rows[method].append(checked(method, spec))
                print(method, number, spec, rows[method][-1]["outcome"], rows[method][-1]["note"][:200], flush=True)
                methods = {name: summary(each) for name, each in rows.items() if each}
                write(arguments.name, {"what": f"all {len(LAWS)} laws, {SIZE} px", "methods": methods})


def specs(method: str, count: int) -> Iterator[ResidualSpec]:
    """Yield different networks, the same each time, until `count` of them are some that the method can take."""
    generator = random.Random(f"networks of {method}")
    seen: set[ResidualSpec] = set()
    while count:
        blocks = tuple(generator.randint(1, 2) for _ in range(generator.randint(1, 3)))
        spec = ResidualSpec(blocks, **{name: generator.choice(values) for name, values in CHOICES.items()})
        if spec not in seen:
            seen.add(spec)
            count -= takes(method, spec)
            yield spec


def checked(method: str, spec: ResidualSpec) -> dict[str, Any]:
    """Return the outcome: "held", "refused" or "failed", and why."""
    torch.manual_seed(0)
    try:
        surgery.convert(spec.build(), method, input_size=SIZE)
        keeps_laws(method, {"network": spec.build}, laws=tuple(LAWS), size=SIZE)
    except (NothingConverted, InvalidOption) as error:
        return outcome(spec, "refused", str(getattr(error, "refusals", (error,))[0]))
    except SurgeryError as error:
        return outcome(spec, "failed", str(error))
    return outcome(spec, "held", "")


def outcome(spec: ResidualSpec, kind: str, note: str) -> dict[str, Any]:
    return {"spec": asdict(spec), "outcome": kind, "note": note}


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    counts = Counter(row["outcome"] for row in rows)
    reasons = Counter(reason(row["note"]) for row in rows if row["outcome"] == "refused")
    counted = {kind: counts[kind] for kind in ("held", "refused", "failed")}
    return {**counted, "reasons": dict(reasons.most_common()), "networks": rows}


def reason(note: str) -> str:
    """Return a refusal without the place and the numbers that it names."""
    without_places = re.sub(r"\b(stages?\d*|convs|norms)[._][\w.]*|\bstage\d+", "...", note)
    return re.sub(r"\d+(/\d+)*(, \d+)*", "n", without_places)


if __name__ == "__main__":
    main()
