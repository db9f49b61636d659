"""Run every example on everything that it can train on: python benchmarks/ways.py [WAY ...] [--methods METHOD ...]

Each way is the example script as it is, with other words on its command line, on the CPU: one epoch on a few images of
handwritten digits, and all that comes behind the training. The losses of every step are kept beside those of a plain
run. They are not the same everywhere: in several processes norms see a part of the batch, and gates and dropped
branches are drawn otherwise there and on XLA.

    python benchmarks/ways.py                          # all ways, all methods; goes on where it was stopped
    python benchmarks/ways.py ddp fsdp --methods coded
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import RESULTS, write

EXAMPLES = Path(__file__).parents[1] / "examples"
METHODS = ("coded", "gated", "masked", "inclusive", "divided")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
XLA = {"PJRT_DEVICE": "CPU"}
Way = tuple[tuple[str, ...], tuple[str, ...], dict[str, str]]
WAYS: dict[str, Way] = {
    "plain": ((), (), {}),
    "ddp": (TORCHRUN, (), {}),
    "fsdp": (TORCHRUN, ("--parallel", "fsdp"), {}),
    "compile": ((), ("--compile",), {}),
    "amp": ((), ("--amp",), {}),
    "ddp, compile, amp": (TORCHRUN, ("--compile", "--amp"), {}),
    "fsdp, amp": (TORCHRUN, ("--parallel", "fsdp", "--amp"), {}),
    "xla": ((), ("--device", "xla"), XLA),
    "xla, amp": ((), ("--device", "xla", "--amp"), XLA),
    "spmd": ((), ("--device", "xla", "--parallel", "spmd"), {**XLA, "CPU_NUM_DEVICES": "2"}),
}


def run(method: str, way: str) -> dict[str, Any]:
    """Return exit code, seconds, the last line that was printed, and the losses of every training."""
    launcher, options, environment = WAYS[way]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *launcher, str(EXAMPLES / f"{method}.py"), "--smoke", "--run-dir", folder, *options]
        began = time.perf_counter()
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )
        logs = sorted(Path(folder).glob("*/steps.csv"))
        losses = {log.parent.name: [float(row["loss"]) for row in csv.DictReader(log.open())] for log in logs}
    wrong = [] if done.returncode == 0 else (done.stdout + done.stderr).strip().splitlines()[-12:]
    return {"exit code": done.returncode, "seconds": time.perf_counter() - began, "losses": losses, "error": wrong}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ways", nargs="*", default=list(WAYS), metavar="WAY")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    options = parser.parse_args()
    path = RESULTS / "ways.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["ways"] if path.exists() else {}
    for way in options.ways:
        for method in options.methods:
            if found.get(way, {}).get(method, {}).get("exit code") == 0:
                continue
            found.setdefault(way, {})[method] = cell = run(method, way)
            print(f"{way} / {method}: exit code {cell['exit code']}, {cell['seconds']:.0f} s", *cell["error"], sep="\n")
            write("ways", {"ways": found})


if __name__ == "__main__":
    main()
