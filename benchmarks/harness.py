"""What the benchmarks share: interleaved timing, peak memory, and result files that say what they were measured on."""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("surgery", "torch", "torchvision", "timm", "torch-pruning", "nvidia-modelopt")


def interleave(
    runs: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Call every run once per round and return the seconds of each, so that a change of load meets all of them."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(-warmup, repeats):
        for name, run in runs.items():
            gc.collect()
            start = clock()
            run()
            elapsed = clock() - start
            if turn >= 0:
                times[name].append(elapsed)
    return times


def ratios(times: Mapping[str, Sequence[float]], name: str, base: str) -> dict[str, float]:
    """Return median and quartiles of the round-by-round ratio of two runs."""
    pairs = [a / b for a, b in zip(times[name], times[base], strict=True)]
    low, middle, high = statistics.quantiles(pairs, n=4)
    return {"median": statistics.median(pairs), "q1": low, "q2": middle, "q3": high, "pairs": len(pairs)}


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Return minimum and median in milliseconds."""
    return {"min_ms": 1e3 * min(seconds), "median_ms": 1e3 * statistics.median(seconds)}


def resident(field: str) -> float:
    """Return memory of this process in MiB: "VmRSS" now, "VmHWM" at its peak. getrusage would inherit the parent's."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def added_memory(warm: Callable[[], object], step: Callable[[], Callable[[], object]], repeats: int = 3) -> float:
    """Return how many MiB `repeats` calls of what `step` builds add to the resident memory, after `warm` has run.

    Run it in a process of its own: memory that was freed before is taken again.
    """
    warm()  # libraries, and what they keep
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten, also that of the parent process
    run = step()
    for _ in range(repeats):
        run()
    return resident("VmHWM") - before


def environment() -> dict[str, Any]:
    """Return versions, commit and hardware."""
    import torch

    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--", "surgery", "plugins")),
        "python": platform.python_version(),
        "packages": found,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def write(name: str, result: Mapping[str, Any]) -> Path:
    """Write `results/<name>.json` with the environment, and return its path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(
        json.dumps({"environment": environment(), **result}, indent=2, allow_nan=False) + "\n", encoding="utf-8"
    )
    return path


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, check=True, cwd=Path(__file__).parent
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
