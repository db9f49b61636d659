"""What masks cost in training, and what cutting unused branches saves.

python benchmarks/masked.py [--rounds 10] [--threads 1] [--batch 32] [--cpu-time]

A step is forward, backward and SGD with momentum on random images. All networks of a row run in turns in one process:
the source, the masked network with full fixed connectivity, with random fixed connectivity of half as many branches,
with learned masks, and with learned masks and blocks that are recomputed. Peak memory is that of a process of its own
that takes three steps, less what it had before the first.

For inference: the source, the frozen network and the pruned one, after a freeze of random masks.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any

import timm
import torch
from harness import added_memory, interleave, ratios, summary, write
from torch import nn

import surgery
import surgery_masked
from surgery_masked.network import masks_of

NETWORKS = ("resnext29_8x8d", "resnext20_8x4d")
GOAL_OVERHEAD, GOAL_STEP = 1.10, 3.5
CLASSES = 100
VARIANTS: dict[str, dict[str, Any] | None] = {
    "source": None,
    "full": {"connectivity": "full"},
    "random": {"connectivity": "random"},
    "learned": {"connectivity": "learned"},
    "learned, recomputed": {"connectivity": "learned", "recompute": True},
    "learned, branch norms": {"connectivity": "learned", "norm": "branch"},
    "full, branch norms": {"connectivity": "full", "norm": "branch"},
}


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    rows = []
    for name in options.networks:
        row = {"network": name, "batch": options.batch, **training(name, options), **inference(name, options)}
        row["peak_mib"] = {variant: in_own_process(name, variant, options) for variant in VARIANTS}
        rows.append(row)
        print(name, row)
    goals = {"overhead": GOAL_OVERHEAD, "step": GOAL_STEP}
    if not options.dry:
        print(write("masked", {"rows": rows, "goals": goals, "clock": "cpu" if options.cpu_time else "wall"}))


def training(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return the times of training steps and their ratios."""
    steps = {variant: step_of(name, variant, options.batch) for variant in VARIANTS}
    times = interleave(steps, repeats=options.rounds, clock=clock(options))
    pairs = {
        "learned / full": ("learned", "full"),
        "learned / random": ("learned", "random"),
        "learned / source": ("learned", "source"),
        "full / source": ("full", "source"),
        "recomputed / stored": ("learned, recomputed", "learned"),
        "learned / full, branch norms": ("learned, branch norms", "full, branch norms"),
        "learned, branch norms / source": ("learned, branch norms", "source"),
    }
    return {
        "step_ms": {variant: summary(seconds) for variant, seconds in times.items()},
        "ratios": {what: ratios(times, *pair) for what, pair in pairs.items()},
    }


def step_of(name: str, variant: str, batch: int) -> Callable[[], None]:
    """Return a training step of a fresh network."""
    model = network(name, variant).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    images, target = torch.randn(batch, 3, 32, 32), torch.randint(CLASSES, (batch,))

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), target).backward()
        optimizer.step()

    return step


def network(name: str, variant: str) -> nn.Module:
    torch.manual_seed(0)
    source = timm.create_model(name, num_classes=CLASSES)
    method = VARIANTS[variant]
    return source if method is None else surgery.convert(source, "masked", **method)


def inference(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return what pruning leaves of networks whose masks are frozen at random, and how long they take."""
    found = {}
    for fan_in in (1, 2, 4):
        source = network(name, "source").eval()
        frozen = surgery.convert(source, "masked", fan_in=fan_in)
        masks = masks_of(frozen)
        with torch.no_grad():
            masks.real.copy_(torch.rand(masks.real.shape, generator=torch.Generator().manual_seed(0)))
        surgery_masked.freeze(frozen)
        plan = surgery.plan(frozen)
        images = torch.randn(options.batch, 3, 32, 32)
        models = {"source": source, "frozen": frozen, "pruned": surgery.prune(frozen, plan)}
        with torch.no_grad():
            runs = {what: partial(model, images) for what, model in models.items()}
            times = interleave(runs, repeats=options.rounds, clock=clock(options))
        found[str(fan_in)] = {
            "params": [plan.before.params, plan.after.params],
            "macs": [plan.before.macs, plan.after.macs],
            "pruned / frozen": ratios(times, "pruned", "frozen"),
            "pruned / source": ratios(times, "pruned", "source"),
            "ms": {what: summary(seconds) for what, seconds in times.items()},
        }
    return {"inference": found}


def in_own_process(name: str, variant: str, options: argparse.Namespace) -> float:
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(peak, name, variant, options.batch, options.threads).result()


def peak(name: str, variant: str, batch: int, threads: int) -> float:
    """Return how many MiB three steps add to the resident memory."""
    torch.set_num_threads(threads)
    return added_memory(step_of(name, variant, 2), partial(step_of, name, variant, batch))


def clock(options: argparse.Namespace) -> Callable[[], float]:
    return time.process_time if options.cpu_time else time.perf_counter


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    parser.add_argument("--cpu-time", action="store_true", help="of the process, where the machine is shared")
    parser.add_argument("--dry", action="store_true", help="leave the result file alone")
    return parser.parse_args()


if __name__ == "__main__":
    main()
