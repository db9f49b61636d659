"""Coded ResNeXt-50 against the plain one: training step, inference, peak memory, and the network cut out for one class.

python benchmarks/coded.py [--pairs 40] [--batch 8] [--device cuda] [--literal-pairs 3]

All columns are measured in turns in one process; memory in one fresh process each on the CPU. `literal` computes every
branch output, as the paper's formulas are written.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from harness import interleave, ratios, resident, summary, write
from literal import literal_loss, make_literal
from torch import Tensor, nn

import surgery

SIDE, CLASSES = 160, 1000
SCHEME = {"layer3": "16/32", "layer4": "8/32"}
GOAL = 1.03


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        print(json.dumps(memory_of(options.memory_of, options)))
        return
    device = torch.device(options.device)
    steps = {name: step_of(name, options) for name in ("plain", "coded")}
    times = interleave(synchronised(steps, device), repeats=options.pairs, warmup=3)
    literal = interleave(
        synchronised({**steps, "literal": step_of("literal", options)}, device), repeats=options.literal_pairs, warmup=1
    )
    result = {
        "what": f"ResNeXt-50 32x4d, {SIDE} px, batch {options.batch}, {options.device}, {precision(options)}",
        "training step": {
            **{name: summary(seconds) for name, seconds in times.items()},
            "coded / plain": ratios(times, "coded", "plain"),
            "goal": GOAL,
            "literal / plain": ratios(literal, "literal", "plain"),
        },
        "inference": inference(options),
        "peak memory": memory(options),
    }
    print(json.dumps(result, indent=2))
    print(write(f"coded-{options.device}-b{options.batch}{'-bf16' if options.amp else ''}", result))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--literal-pairs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory-of", choices=("plain", "coded", "literal"), help=argparse.SUPPRESS)
    return parser.parse_args()


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    plain = torchvision.models.resnext50_32x4d(weights=None)
    if name == "plain":
        return plain
    coded = surgery.convert(plain, "coded", scheme=SCHEME)
    return make_literal(coded) if name == "literal" else coded


def step_of(name: str, options: argparse.Namespace) -> Callable[[], None]:
    """Return one whole training step: forward, losses, backward, SGD."""
    model = network(name).to(options.device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, nesterov=True)
    task = nn.CrossEntropyLoss()
    objective = surgery.Objective(model, task) if name == "coded" else None
    images = torch.randn(options.batch, 3, SIDE, SIDE, device=options.device)
    labels = torch.arange(options.batch, device=options.device)

    def loss_of(output: Tensor) -> Tensor:
        if objective is not None:
            return objective(output, labels)
        loss: Tensor = task(output, labels)
        return loss + 2.0 * literal_loss(model, labels) if name == "literal" else loss

    def step() -> None:
        with autocast(options):
            loss = loss_of(model(images))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def precision(options: argparse.Namespace) -> str:
    return "bfloat16 autocast" if options.amp else "float32"


def autocast(options: argparse.Namespace) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast(options.device, torch.bfloat16) if options.amp else contextlib.nullcontext()


def synchronised(runs: dict[str, Callable[[], Any]], device: torch.device) -> dict[str, Callable[[], Any]]:
    if device.type != "cuda":
        return runs

    def waiting(run: Callable[[], Any]) -> Callable[[], None]:
        def call() -> None:
            run()
            torch.cuda.synchronize()

        return call

    return {name: waiting(run) for name, run in runs.items()}


def inference(options: argparse.Namespace) -> dict[str, Any]:
    """Time the full networks and the one for a single class, whose time should fall with its MACs."""
    models = {name: network(name).to(options.device).eval() for name in ("plain", "coded")}
    plan = surgery.plan(models["coded"], classes=[0])
    models["one class"] = surgery.prune(models["coded"], plan)
    images = torch.randn(options.batch, 3, SIDE, SIDE, device=options.device)

    def forward(model: nn.Module) -> Callable[[], None]:
        def call() -> None:
            with torch.inference_mode(), autocast(options):
                model(images)

        return call

    runs = synchronised({name: forward(model) for name, model in models.items()}, torch.device(options.device))
    times = interleave(runs, repeats=options.pairs)
    return {
        **{name: summary(seconds) for name, seconds in times.items()},
        "coded / plain": ratios(times, "coded", "plain"),
        "one class / coded": ratios(times, "one class", "coded"),
        "one class / coded, MACs": plan.after.macs / plan.before.macs,
    }


def memory(options: argparse.Namespace) -> dict[str, Any]:
    names = ("plain", "coded", "literal")
    if options.device == "cpu":
        found = {name: child(name, options) for name in names}
    else:
        found = {name: memory_of(name, options) for name in names}
    base = found["plain"]["step_mib"]
    return {
        **found,
        "coded / plain": found["coded"]["step_mib"] / base,
        "literal / plain": found["literal"]["step_mib"] / base,
    }


def child(name: str, options: argparse.Namespace) -> dict[str, float]:
    arguments = ["--memory-of", name, "--batch", str(options.batch), "--threads", str(options.threads)]
    command = [sys.executable, str(Path(__file__)), *arguments, *(["--amp"] if options.amp else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def memory_of(name: str, options: argparse.Namespace) -> dict[str, float]:
    """Return the peak of a whole training step in MiB: of the process on the CPU, of the allocator on a GPU."""
    step = step_of(name, options)
    gc.collect()  # the network that was converted waits in reference cycles and is no part of a step
    if options.device != "cpu":
        step()
        torch.cuda.reset_peak_memory_stats()
        step()
        return {"step_mib": torch.cuda.max_memory_allocated() / 2**20}
    before = resident("VmHWM")
    for _ in range(3):
        step()
    return {"step_mib": resident("VmHWM"), "before_mib": before}


if __name__ == "__main__":
    main()
