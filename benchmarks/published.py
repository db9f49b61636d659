"""What the Coded ResNeXt paper prints beside what this library counts: python benchmarks/published.py

Nothing here is timed; throughput and memory are those that `benchmarks/coded.py` has written.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import timm
import torch
import torchvision
from fvcore.nn import FlopCountAnalysis
from harness import RESULTS, write
from torch import nn

import surgery
from surgery_coded import CodingScheme
from surgery_coded.method import coded_modules

IMAGENET = {"layer3": "16/32", "layer4": "8/32"}
CIFAR = {"layer2": "5/10", "layer3": "3/10"}, {"layer2": "8/20", "layer3": "4/20"}
SIDE = 160
MEASURED = "coded-cpu-b16"


def main() -> None:
    rows = [{"what": what, "published": paper, "here": here} for what, paper, here in (*costs(), *kept(), *schemes())]
    for row in rows:
        print(f"{row['what']:70} {row['published']:>10} {row['here']:>10}")
    print(write("published", {"what": "Coded ResNeXt: printed figures", "rows": rows}))


def costs() -> Iterator[tuple[str, str, str]]:
    """Yield Table 5 and the number of early decoders (appendix B and C)."""
    plain = torchvision.models.resnext50_32x4d(weights=None)
    coded = surgery.convert(plain, "coded", scheme=IMAGENET)
    flops = train_mode_flops(plain)
    yield f"Table 5: ResNeXt-50, GFLOPs at {SIDE} px", "2.196", f"{flops / 1e9:.3f}"
    extra = literal_flops(coded)
    yield f"Table 5: Coded ResNeXt-50, GFLOPs at {SIDE} px", "2.269", f"{(flops + extra) / 1e9:.4f}"
    for name, model in (("ResNeXt-50", plain), ("Coded ResNeXt-50", coded)):
        yield f"Table 5: {name}, million parameters", "25.0", f"{surgery.cost(model, SIDE).params / 1e6:.2f}"
    measured = json.loads((RESULTS / f"{MEASURED}.json").read_text(encoding="utf-8"))
    step = measured["training step"]["coded / plain"]["median"]
    yield "Table 5: samples per second in training, coded / plain (TPU v2; CPU here)", "0.992", f"{1 / step:.3f}"
    memory = measured["peak memory"]["coded / plain"]
    yield "Table 5: memory in training, coded / plain (TPU v2; CPU here)", "1.033", f"{memory:.3f}"
    cifar = surgery.convert(timm.create_model("resnext29_10x11d"), "coded", scheme=CIFAR[0])
    yield (
        "Appendix C: early decoders on CIFAR and ImageNet",
        "6, 9",
        ", ".join(str(len(coded_modules(model))) for model in (cifar, coded)),
    )


def train_mode_flops(model: nn.Module) -> int:
    """Return fvcore's total in train mode, in which it counts 5 operations for each value that a BN normalizes."""
    analysis = FlopCountAnalysis(model.train(), torch.zeros(1, 3, SIDE, SIDE))
    return int(analysis.unsupported_ops_warnings(False).total())


def literal_flops(coded: surgery.ConvertedNetwork) -> int:
    """Return appendix B's cost of energy normalization: 3 * N * C * H * W for every coded block."""
    blocks = {block.merge: block for block in surgery.inspect(coded).blocks}
    side = surgery.inspect(coded).input_size[1]
    total = 0
    for path, module in coded.named_modules():
        if module in coded_modules(coded):
            block = blocks[path]
            height, width = (SIDE * extent // side for extent in block.resolution)
            total += 3 * module.branches * block.channels.output * height * width
    return total


def kept() -> Iterator[tuple[str, str, str]]:
    """Yield the share of the parameters that a one-class network keeps, with and without projection shortcuts."""
    networks: tuple[tuple[str, str, Any, dict[str, str]], ...] = (
        ("CIFAR-10", "38 %", timm.create_model("resnext29_10x11d"), CIFAR[0]),
        ("CIFAR-100", "27 %", timm.create_model("resnext29_20x6d", num_classes=100), CIFAR[1]),
        ("ImageNet", "35 %", torchvision.models.resnext50_32x4d(weights=None), IMAGENET),
    )
    for name, paper, model, scheme in networks:
        plan = surgery.plan(surgery.convert(model, "coded", scheme=scheme), classes=[0])
        shares = plan.kept_params, plan.kept_params_without_projections
        yield (
            f"One-class network, {name}: parameters kept (with / without projections)",
            paper,
            " / ".join(f"{100 * share:.1f} %" for share in shares),
        )


def schemes() -> Iterator[tuple[str, str, str]]:
    """Yield minimum distance and column sums: Table 4 as printed, appendix A's four beside those found here."""
    for ratio, paper in (("5/10", "4; 5..5"), ("3/10", "4; 3..3")):
        yield (
            f"Table 4, CIFAR-10 {ratio}: distance; column sums of the printed words",
            paper,
            of(CodingScheme.cifar10(ratio)),
        )
    for sizes, paper in (
        ((100, 20, 8), "8; 40..40"),
        ((100, 20, 4), "4; 20..20"),
        ((1000, 32, 16), "10; 499..501"),
        ((1000, 32, 8), "6; 249..251"),
    ):
        yield (
            f"Appendix A, {sizes[0]} classes, {sizes[2]}/{sizes[1]}: distance; column sums",
            paper,
            of(CodingScheme.search(*sizes)),
        )


def of(scheme: CodingScheme) -> str:
    sums = scheme.column_sums
    return f"{scheme.min_distance}; {int(sums.min())}..{int(sums.max())}"


if __name__ == "__main__":
    main()
