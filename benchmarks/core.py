"""CPU time of convert, prune and load beside Torch-Pruning and NVIDIA Model-Optimizer, interleaved in one run.

python benchmarks/core.py [--repeats 9]        (needs pip install ".[bench]" for the peers)

`convert` is the method `coded` on the ResNeXt, with its scheme given so that no search is counted, and a pass-through
gate on every residual block elsewhere. `prune` cuts half of the branches (ResNeXt) or removes every other block body
that can go.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torchvision
from harness import interleave, summary, write
from torch import Tensor, nn

import surgery
import surgery_coded

NETWORKS = ("resnet50", "resnext50_32x4d", "mobilenet_v2", "wide_resnet50_2")


class Factor(nn.Module):
    """A learned factor, the smallest thing that can be inserted."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, body: Tensor) -> Tensor:
        return body * self.factor


@dataclass(frozen=True)
class Factors(surgery.Method):
    """Insert a factor into every residual block; prune every other body."""

    name: ClassVar[str] = "factors"
    preserves: ClassVar = "output"

    def transform(self, architecture: surgery.Architecture, rewriter: surgery.Rewriter) -> None:
        for block in architecture.residual_blocks():
            rewriter.insert(Factor(), block.body, at=block, role="factor")

    def losses(self, step: surgery.Step) -> dict[str, Tensor]:
        return {}

    def plan(self, model: surgery.ConvertedNetwork, **criteria: Any) -> surgery.PrunePlan:
        blocks = [block for block in model.meta["architecture"].residual_blocks() if not block.projected]
        return surgery.PrunePlan.of(model, self.name, [surgery.Cut("body", b.path, (), 1) for b in blocks[::2]], {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    scheme = {
        "layer3": surgery_coded.CodingScheme.search(1000, 32, 16),
        "layer4": surgery_coded.CodingScheme.search(1000, 32, 8),
    }
    results = {}
    for name in NETWORKS:
        model = torchvision.models.get_model(name, weights=None).eval()
        if name.startswith("resnext"):
            options: dict[str, Any] = {"method": "coded", "scheme": scheme}
            criteria = {"classes": [0]}
        else:
            options, criteria = {"method": Factors()}, {}
        results[name] = measure(model, options, criteria, repeats)
        print(name, {key: round(value["median_ms"]) for key, value in results[name].items()}, flush=True)
    loading = {"resnext50_32x4d": measure_load(scheme, repeats)}
    print(write("core", {"unit": "CPU milliseconds, one thread", "networks": results, "load": loading}))


def measure(model: nn.Module, options: dict[str, Any], criteria: dict[str, Any], repeats: int) -> dict[str, Any]:
    converted = surgery.convert(model, **options)
    # a method of a script has no entry point, so the plan is made and applied without the registry
    method = options["method"]
    plan = (
        (lambda: surgery.plan(converted, **criteria)) if isinstance(method, str) else (lambda: method.plan(converted))
    )
    runs: dict[str, Callable[[], object]] = {
        "surgery convert": lambda: surgery.convert(model, **options),
        "surgery prune": lambda: surgery.prune(converted, plan()),
    }
    runs |= peers(model)
    return {name: summary(times) for name, times in interleave(runs, repeats=repeats, clock=time.process_time).items()}


def measure_load(scheme: dict[str, Any], repeats: int) -> dict[str, Any]:
    """Time `surgery.load` of the coded ResNeXt-50 and of the one-class network cut out of it."""
    coded = surgery.convert(torchvision.models.resnext50_32x4d(weights=None), "coded", scheme=scheme)
    networks = {"coded": coded, "one class": surgery.prune(coded, classes=[0])}
    with tempfile.TemporaryDirectory() as folder:
        for name, network in networks.items():
            surgery.save(network, f"{folder}/{name}.safetensors")
        runs = {name: partial(surgery.load, f"{folder}/{name}.safetensors") for name in networks}
        return {
            name: summary(times) for name, times in interleave(runs, repeats=repeats, clock=time.process_time).items()
        }


def peers(model: nn.Module) -> dict[str, Callable[[], object]]:
    """Return what the peers need for the same: build and prune (Torch-Pruning), convert (Model-Optimizer)."""
    import modelopt.torch.nas as mtn
    import torch_pruning as tp

    images = torch.randn(1, 3, 224, 224)

    def torch_pruning() -> None:
        twin = copy.deepcopy(model)
        ignored = [module for module in twin.modules() if isinstance(module, nn.Linear)]
        importance = tp.importance.MagnitudeImportance(p=2)
        tp.pruner.MagnitudePruner(twin, images, importance=importance, pruning_ratio=0.5, ignored_layers=ignored).step()

    def modelopt() -> None:
        mtn.convert(copy.deepcopy(model), mode="fastnas")

    return {"torch-pruning build and prune": torch_pruning, "modelopt fastnas convert": modelopt}


if __name__ == "__main__":
    main()
