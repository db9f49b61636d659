"""What the SplitNet paper prints beside what this library counts: python benchmarks/published_divided.py

Nothing here is timed. Weights are never needed, so the networks are built without any.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import timm
import torch
from harness import write
from torch import nn

import surgery
import surgery.models

CROP = {"seresnext101_64x4d_deep": 416}
TITLES = {
    "resnet110": "ResNet-110",
    "resnet164": "ResNet-164",
    "seresnet110": "SE-ResNet-110",
    "seresnet164": "SE-ResNet-164",
    "wrn_16_8": "WRN-16-8",
    "resnext29_8x64d": "ResNeXt-29 8x64d",
    "wrn_28_10": "WRN-28-10",
    "wrn_40_10": "WRN-40-10",
    "resnet50_deep": "ResNet-50",
    "wrn_50_2": "WRN-50-2",
    "wrn_50_3": "WRN-50-3",
    "resnext101_64x4d_deep": "ResNeXt-101 64x4d",
    "seresnext101_64x4d_deep": "SE-ResNeXt-101 64x4d",
}

# Million parameters and GFLOPs of the whole network and of S = 2, 4 small ones together.
TABLE_2 = {
    "resnet110": (("1.17", "0.17"), ("1.33", "0.20"), ("1.21", "0.18")),
    "resnet164": (("1.73", "0.25"), ("1.96", "0.29"), ("1.78", "0.26")),
    "seresnet110": (("1.69", "0.17"), ("1.89", "0.20"), ("1.70", "0.18")),
    "seresnet164": (("2.51", "0.26"), ("2.81", "0.29"), ("2.53", "0.27")),
    "wrn_16_8": (("11.0", "1.55"), ("12.4", "1.75"), ("11.1", "1.58")),
    "resnext29_8x64d": (("34.5", "5.41"), ("35.4", "5.50"), ("36.9", "5.67")),
    "wrn_28_10": (("36.5", "5.25"), ("35.8", "5.16"), ("36.7", "5.28")),
    "wrn_40_10": (("55.9", "8.08"), ("54.8", "7.94"), ("56.0", "8.12")),
}
TABLE_3 = {
    "seresnet164": (("2.49", "0.26"), ("2.81", "0.29"), None),
    "resnext29_8x64d": (("34.4", "5.40"), ("35.1", "5.49"), None),
    "wrn_28_10": (("36.5", "5.25"), ("35.8", "5.16"), ("36.5", "5.28")),
    "wrn_40_10": (("55.8", "8.08"), None, ("55.9", "8.12")),
}
TABLE_4 = {
    "wrn_50_2": (("68.9", "12.8"), ("51.4", "10.9"), None),
    "wrn_50_3": (("135.0", "23.8"), ("138.0", "25.6"), None),
    "resnext101_64x4d_deep": (("83.6", "16.9"), ("88.6", "18.8"), None),
    "seresnext101_64x4d_deep": (None, ("98.0", "61.1"), None),
}
CHECKPOINTS = {"resnet50_deep": (("25.7", "5.5"), None, None)}
Printed = dict[str, tuple[tuple[str, str] | None, ...]]
TABLES: tuple[tuple[str, int, Printed], ...] = (
    ("Table 2, CIFAR-100", 100, TABLE_2),
    ("Table 3, CIFAR-10", 10, TABLE_3),
    ("Table 4, ImageNet", 1000, TABLE_4),
    ("checkpoints, ImageNet", 1000, CHECKPOINTS),
)

# Multiply-adds, 1 a bias of a convolution, 2 an element normalized, and what a pooling adds and divides.
OPERATIONS: dict[type[nn.Module], Callable[..., int]] = {
    nn.Conv2d: lambda m, x, y: y.numel() * (m.weight[0].numel() + (m.bias is not None)),
    nn.BatchNorm2d: lambda m, x, y: 2 * x.numel(),
    nn.Linear: lambda m, x, y: m.in_features * m.out_features,
    nn.AvgPool2d: lambda m, x, y: y.numel(),
    nn.AdaptiveAvgPool2d: lambda m, x, y: x.numel() + y.numel(),
}


def main() -> None:
    rows = [{"what": what, "published": paper, "here": here} for what, paper, here in compared()]
    for row in rows:
        print(f"{row['what']:75} {row['published']:>8} {row['here']:>40}")
    fit = sum(row["here"] == row["published"] for row in rows)
    print(f"{fit} of {len(rows)} are the printed ones")
    print(write("published-divided", {"what": "SplitNet: printed figures", "fit": fit, "rows": rows}))


def compared() -> Iterator[tuple[str, str, str]]:
    """Yield every figure: what it is, as printed, and as counted here to as many digits."""
    for table, classes, printed in TABLES:
        for name, cells in printed.items():
            for networks, cell in zip((1, 2, 4), cells, strict=True):
                if cell is None:
                    continue
                model = built(name, classes, networks)
                side = CROP.get(name, timm.get_pretrained_cfg(name).input_size[1])
                what = f"{table}: {TITLES[name]}, {f'S = {networks}' if networks > 1 else 'undivided'}"
                size = like(parameters(model) / 1e6, cell[0])
                remark = why(name, classes, networks, cell[0]) if size != cell[0] else ""
                yield f"{what}, million parameters", cell[0], size + remark
                yield f"{what}, GFLOPs", cell[1], like(operations(model, side) / 1e9, cell[1])


def why(name: str, classes: int, networks: int, printed: str) -> str:
    """Return which network has the printed size, where one is known."""
    if classes == 100 and like(parameters(built(name, 10, networks)) / 1e6, printed) == printed:
        return f" ({printed} with ten classes)"
    if name == "wrn_50_2":
        plain = timm_parameters("wide_resnet50_2")
        return f" ({like(plain / 1e6, printed)} with a plain stem)"
    return ""


def built(name: str, classes: int, networks: int) -> nn.Module:
    with torch.device("meta"):
        source = timm.create_model(name, num_classes=classes)
    return source if networks == 1 else surgery.convert(source, "divided", networks=networks)


def timm_parameters(name: str) -> int:
    with torch.device("meta"):
        return parameters(timm.create_model(name))


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def operations(model: nn.Module, side: int) -> int:
    """Return the operations of one image as the authors count them; what is not named above is free."""
    total = 0

    def add(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal total
        total += OPERATIONS[type(module)](module, inputs[0], output)

    for module in model.modules():
        if type(module) in OPERATIONS:
            module.register_forward_hook(add)
    model.eval()(torch.empty(1, 3, side, side, device="meta"))
    return total


def like(value: float, printed: str) -> str:
    """Return a value with as many decimals as a printed one."""
    return f"{value:.{len(printed.partition('.')[2])}f}"


if __name__ == "__main__":
    main()
