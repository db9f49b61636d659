"""What training and anytime prediction with nested sub-networks cost.

python benchmarks/inclusive.py [--rounds 10] [--threads 1] [--device cuda] [--cpu-time]

A training step is forward, backward and SGD with momentum on random images. All networks of a row run in turns in one
process: the source; a plain network of the same depth and width whose branches are so many that it needs as many
multiply-adds as the sparse network; the sparse network; the dense one, in one forward and with one pass a sub-network.
For inference: one forward of the full sparse network, and anytime prediction through all of its sub-networks. Memory
is what three steps of the dense network add to a process of its own.
"""

from __future__ import annotations

import argparse
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch
from harness import added_memory, interleave, ratios, summary, write
from torch import nn
from torchvision.models.resnet import Bottleneck, ResNet

import surgery
import surgery_inclusive
from surgery.models import PreActResNeXt, preact_resnext

GOALS = {"sparse / plain of the same MACs": 1.15, "passes / sparse, per sub-network": 0.8, "anytime / full": 1.10}
LARGE, INFERENCE_SIZE = 64, 224  # pixels a side: from the first on, inference is timed at the second


@dataclass(frozen=True)
class Case:
    """One network, and how it is trained.

    Attributes:
        name: What stands in the table.
        build: Builds it with so many branches.
        branches: Of the source.
        subnetworks: K.
        size: Side of the images in pixels.
        batch: Images of a training step.
    """

    name: str
    build: Callable[[int], nn.Module]
    branches: int
    subnetworks: int
    size: int
    batch: int


def resnext50(groups: int) -> nn.Module:
    return ResNet(Bottleneck, [3, 4, 6, 3], groups=groups, width_per_group=4)


def preactivated(groups: int) -> nn.Module:
    return PreActResNeXt(preact_resnext(groups, 4, depth=47, width=96))


CASES = (
    Case("ResNeXt-50, 32 branches", resnext50, 32, 4, 160, 8),
    Case("pre-activation ResNeXt of 15 blocks, 24 branches", preactivated, 24, 6, 32, 32),
)


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    rows = []
    for case in CASES:
        sized = case if options.batch is None else replace(case, batch=options.batch)
        row = {"network": case.name, "subnetworks": case.subnetworks, "size": case.size, **measured(sized, options)}
        rows.append(row)
        print(row)
    if not options.dry:
        found = {"rows": rows, "goals": GOALS, "device": options.device, "clock": "cpu" if options.cpu_time else "wall"}
        where = f"{options.threads}-threads" if options.device == "cpu" else options.device
        print(write(f"inclusive-{where}", found))


def measured(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Return sizes and times of one case."""
    source = case.build(case.branches)
    convert = partial(surgery.convert, source, "inclusive", input_size=case.size, subnetworks=case.subnetworks)
    sparse, dense = convert(sparse=True), convert()
    equal, branches = same_macs(case, surgery.cost(sparse).macs)
    networks = {"source": source, "equal": equal, "sparse": sparse, "dense": dense}
    macs = {name: surgery.cost(network, case.size).macs for name, network in networks.items()}
    for network in networks.values():
        network.to(options.device)
    steps = {name: step_of(network, case, options.device) for name, network in networks.items()}
    steps["dense, passes"] = passes_of(dense, case, options.device)
    steps["sparse, passes"] = passes_of(sparse, case, options.device)
    times = interleave(steps, repeats=options.rounds, clock=clock(options))
    return {
        "batch": case.batch,
        "branches of equal": branches,
        "macs": macs,
        "step_ms": {name: summary(seconds) for name, seconds in times.items()},
        "ratios": {
            "sparse / plain of the same MACs": ratios(times, "sparse", "equal"),
            "passes / sparse": ratios(times, "dense, passes", "sparse"),
            "passes of the sparse network / sparse": ratios(times, "sparse, passes", "sparse"),
            "sparse / source": ratios(times, "sparse", "source"),
            "dense / source": ratios(times, "dense", "source"),
            "passes / dense": ratios(times, "dense, passes", "dense"),
        },
        "inference": inference(sparse.eval(), case, options),
        "peak_mib": {way: in_own_process(case, way, options) for way in ("one forward", "passes")},
    }


def in_own_process(case: Case, way: str, options: argparse.Namespace) -> float | None:
    """Return the memory of a training step of the dense network, in MiB; None on a GPU, where it is not this."""
    if options.device != "cpu":
        return None
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(peak, case, way, options.threads).result()


def peak(case: Case, way: str, threads: int) -> float:
    torch.set_num_threads(threads)
    dense = surgery.convert(case.build(case.branches), "inclusive", input_size=case.size, subnetworks=case.subnetworks)
    step = step_of if way == "one forward" else passes_of
    return added_memory(step(dense, replace(case, batch=2), "cpu"), partial(step, dense, case, "cpu"))


def same_macs(case: Case, macs: int) -> tuple[nn.Module, int]:
    """Return the plain network that comes nearest in multiply-adds, and the number of its branches."""
    candidates = {n: case.build(n) for n in range(1, case.branches + 1)}
    best = min(candidates, key=lambda n: abs(surgery.cost(candidates[n], case.size).macs - macs))
    return candidates[best], best


def step_of(model: nn.Module, case: Case, device: str) -> Callable[[], None]:
    """Return a training step in one forward."""
    objective = nn.CrossEntropyLoss()
    if isinstance(model, surgery.ConvertedNetwork):
        objective = surgery.Objective(model, objective)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    images, target = batch(case, device)

    def step() -> None:
        optimizer.zero_grad()
        objective(model(images), target).backward()
        optimizer.step()
        settle(device)

    return step


def passes_of(model: nn.Module, case: Case, device: str) -> Callable[[], None]:
    """Return a training step with one pass for each sub-network."""
    criterion = nn.CrossEntropyLoss()
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    images, target = batch(case, device)

    def step() -> None:
        optimizer.zero_grad()
        for sub in surgery_inclusive.passes(model):
            criterion(sub(images), target).backward()
        optimizer.step()
        settle(device)

    return step


def inference(model: nn.Module, case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Return times of one full forward, and of anytime prediction through all sub-networks."""
    found = {}
    side = case.size if case.size < LARGE else INFERENCE_SIZE
    for size in (1, case.batch):
        images = torch.randn(size, 3, side, side, device=options.device)

        def full(images: torch.Tensor = images) -> None:
            with torch.no_grad():
                model(images)
            settle(options.device)

        def anytime(images: torch.Tensor = images) -> None:
            deque(surgery_inclusive.anytime(model, images), maxlen=0)
            settle(options.device)

        times = interleave({"full": full, "anytime": anytime}, repeats=3 * options.rounds, clock=clock(options))
        found[str(size)] = {
            "ms": {name: summary(seconds) for name, seconds in times.items()},
            "anytime / full": ratios(times, "anytime", "full"),
        }
    return found


def batch(case: Case, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.randn(case.batch, 3, case.size, case.size, device=device)
    return images, torch.arange(case.batch, device=device) % 10


def settle(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def clock(options: argparse.Namespace) -> Callable[[], float]:
    return time.process_time if options.cpu_time else time.perf_counter


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, help="images of a training step; default: each network's own")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--cpu-time", action="store_true", help="of the process, where the machine is shared")
    parser.add_argument("--dry", action="store_true", help="leave the result file alone")
    return parser.parse_args()


if __name__ == "__main__":
    main()
