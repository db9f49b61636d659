"""Kill every example again and again, and see that no digit is lost: python benchmarks/resume.py [METHOD ...]

For each method a short training on handwritten digits runs once undisturbed. A second one is killed with SIGKILL at
random moments, during start-up, between two steps or while a checkpoint is being written, and is started again each
time; after every kill the checkpoints that are there must be whole. A third is told to stop by SIGTERM. All must end
with the same losses in the same digits, the same weights, and the same lines on the screen.

    python benchmarks/resume.py                   # all methods, 20 kills each
    python benchmarks/resume.py coded --kills 5
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from harness import write

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.append(str(EXAMPLES))
import checkpoints  # noqa: E402  (a neighbour of the examples)

METHODS = ("coded", "gated", "masked", "inclusive", "divided")
TRAINING = """[training]
epochs = 2
batch_size = 96
lr = 0.05
lr_unit = "step"
weight_decay = 5e-4
checkpoint_steps = 1
"""
MOST_STEPS, MOST_STARTUP, MOST_PAUSE = (
    6,
    12.0,
    0.4,
)  # steps until a kill; seconds until one during start-up, after a step
WRITING = 0.5  # share of the kills behind a step that wait until a checkpoint is being written
SECONDS = re.compile(r"  \d+\.\d s$", re.MULTILINE)


@dataclass
class Run:
    """One folder of a run, and the processes that worked in it."""

    method: str
    recipe: Path
    folder: Path
    printed: dict[str, None] = field(default_factory=dict)

    def start(self) -> subprocess.Popen[str]:
        command = [sys.executable, EXAMPLES / f"{self.method}.py", "--recipe", self.recipe, "--run-dir", self.folder]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        return subprocess.Popen(
            [str(part) for part in command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )

    def end(self, process: subprocess.Popen[str]) -> int:
        """Wait for a process, keep the lines on its epochs, and return its exit code."""
        printed, _ = process.communicate(timeout=600)
        lines = (SECONDS.sub("", line) for line in printed.splitlines())
        self.printed |= dict.fromkeys(line for line in lines if re.search(r": epoch \d+  lr ", line))
        if process.returncode not in (0, -signal.SIGKILL, 128 + signal.SIGTERM):
            raise RuntimeError(f"{self.method}: exit code {process.returncode}\n{printed}")
        return process.returncode

    def steps(self) -> int:
        """Return how many steps are logged."""
        return sum(max(path.read_text().count("\n") - 1, 0) for path in self.folder.glob("*/steps.csv"))

    def checkpoints(self) -> list[checkpoints.Checkpoint]:
        """Read the checkpoints; what is not whole raises."""
        return [checkpoints.read(path) for path in sorted(self.folder.glob("*/training.safetensors"))]

    def writing(self) -> bool:
        """Return whether a checkpoint was being written."""
        return any(self.folder.glob("*/training.safetensors.*.tmp"))


def differences(run: Run, whole: Run) -> list[str]:
    """Return what a run has other than the undisturbed one."""
    found = []
    for log in sorted(whole.folder.glob("*/steps.csv")):
        other = run.folder / log.parent.name / log.name
        if not other.exists() or other.read_bytes() != log.read_bytes():
            found.append(f"{log.parent.name}/{log.name}")
    if list(run.printed) != list(whole.printed):
        found.append("printed lines")
    for mine, theirs in zip(run.checkpoints(), whole.checkpoints(), strict=True):
        same = mine.tensors.keys() == theirs.tensors.keys()
        if not same or any(not torch.equal(value, theirs.tensors[key]) for key, value in mine.tensors.items()):
            found.append("weights or optimizer state")
    return found


def killed(run: Run, kills: int, draw: random.Random) -> list[dict[str, Any]]:
    """Kill a run up to so many times, until it ends; return what was met."""
    met: list[dict[str, Any]] = []
    while len(met) < kills:
        before, wanted = run.steps(), draw.randint(0, MOST_STEPS)
        process = run.start()
        if wanted:
            while run.steps() == before and process.poll() is None:  # the log is first cut to the checkpoint
                time.sleep(0.002)
            while run.steps() < before + wanted and process.poll() is None:
                time.sleep(0.002)
            if draw.random() < WRITING:
                while not run.writing() and process.poll() is None:
                    pass
            else:
                time.sleep(draw.uniform(0, MOST_PAUSE))
        else:
            time.sleep(draw.uniform(0, MOST_STARTUP))
        process.send_signal(signal.SIGKILL)
        if run.end(process) == 0:  # it was faster
            break
        met.append({"steps": run.steps(), "while writing": run.writing()})
        run.checkpoints()
    return met


def stopped(run: Run, draw: random.Random) -> dict[str, Any]:
    """Tell a run to stop by SIGTERM; return its exit code, and whether every step that it logged is in a checkpoint."""
    process, wanted = run.start(), draw.randint(2, MOST_STEPS)
    while run.steps() < wanted and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    code = run.end(process)
    return {"exit code": code, "saved": sum(found.progress["step"] for found in run.checkpoints()) == run.steps()}


def measure(method: str, kills: int, folder: Path) -> dict[str, Any]:
    """Return what happened to one method."""
    draw = random.Random(method)
    text = (EXAMPLES / "recipes" / f"{method}-digits.toml").read_text(encoding="utf-8").partition("[training]")[0]
    recipe = folder / f"{method}.toml"
    recipe.write_text(re.sub(r"freeze_epoch = \d+", "freeze_epoch = 1", text) + TRAINING, encoding="utf-8")
    whole = Run(method, recipe, folder / f"{method}-whole")
    whole.end(whole.start())
    result: dict[str, Any] = {"steps": whole.steps(), "kills": [], "runs": 0, "different": []}
    while len(result["kills"]) < kills:
        run = Run(method, recipe, folder / f"{method}-{result['runs']}")
        result["kills"] += killed(run, kills - len(result["kills"]), draw)
        run.end(run.start())
        result["runs"] += 1
        result["different"] += differences(run, whole)
    run = Run(method, recipe, folder / f"{method}-stopped")
    result["stopped"] = stopped(run, draw)
    run.end(run.start())
    result["different"] += differences(run, whole)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", default=METHODS, metavar="METHOD")
    parser.add_argument("--kills", type=int, default=20)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = {}
        for method in options.methods:
            found[method] = measure(method, options.kills, Path(folder))
            print(method, found[method])
    if set(found) == set(METHODS):
        print(write("resume", {"methods": found}))


if __name__ == "__main__":
    main()
