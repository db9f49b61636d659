"""Published sizes and costs. "Zhao" is Zhao et al., 2022, "Divide and Co-training"; the counts are exact."""

from collections.abc import Callable

import pytest
import timm
import torch
from torch import nn

from surgery.models import LAYOUTS, CifarResNet, Layout, resnet, resnext, wide_resnet


def count(layout: Layout, classes: int) -> int:
    with torch.device("meta"):
        model = CifarResNet(layout, num_classes=classes)
    return sum(parameter.numel() for parameter in model.parameters())


def operations(model: nn.Module, size: int = 32) -> int:
    """Count as Zhao: MACs of convolutions and classifier, 2 an element normalized, 1 an output of a pooled shortcut.

    The global pooling counts an addition for every input and a division for every output.
    """
    rules: dict[type[nn.Module], Callable[..., int]] = {
        nn.Conv2d: lambda m, x, y: y.numel() * m.weight[0].numel(),
        nn.BatchNorm2d: lambda m, x, y: 2 * x.numel(),
        nn.Linear: lambda m, x, y: m.in_features * m.out_features,
        nn.AvgPool2d: lambda m, x, y: y.numel(),
        nn.AdaptiveAvgPool2d: lambda m, x, y: x.numel() + y.numel(),
    }
    total = 0

    def add(module, inputs, output):
        nonlocal total
        total += rules[type(module)](module, inputs[0], output)

    for module in model.modules():
        if type(module) in rules:
            module.register_forward_hook(add)
    model.eval()(torch.empty(1, 3, size, size, device="meta"))
    return total


@pytest.mark.parametrize(
    ("layout", "classes", "networks", "published"),
    [
        (resnet(110), 100, 1, 1_170_868),  # Zhao, table 2: 1.17 M
        (resnet(110, base=12), 100, 2, 1_333_472),  # Zhao, table 2, S = 2: 1.33 M
        (resnet(110, base=8), 100, 4, 1_214_256),  # Zhao, table 2, S = 4: 1.21 M
        (resnet(164), 100, 1, 1_727_284),  # Zhao, table 2: 1.73 M
        (wide_resnet(16, 8), 100, 1, 11_009_332),  # Zhao, table 2: 11.0 M
        (wide_resnet(16, 6), 100, 2, 12_416_232),  # Zhao, table 2, S = 2: 12.4 M
        (wide_resnet(16, 4), 100, 4, 11_091_664),  # Zhao, table 2, S = 4: 11.1 M
        (wide_resnet(28, 10), 100, 1, 36_539_124),  # Zhao, table 2: 36.5 M
        (wide_resnet(28, 5), 100, 4, 36_650_576),  # Zhao, table 2, S = 4: 36.7 M
        (wide_resnet(28, 10), 10, 1, 36_481_434),  # Zhao, table 3: 36.5 M
        (wide_resnet(28, 7), 10, 2, 35_774_196),  # Zhao, table 3, S = 2: 35.8 M
        (wide_resnet(28, 5), 10, 4, 36_535_016),  # Zhao, table 3, S = 4: 36.5 M
        (wide_resnet(40, 10), 100, 1, 55_901_684),  # Zhao, table 2: 55.9 M
        (resnext(8, 64), 100, 1, 34_518_948),  # Zhao, table 2: 34.5 M
        (resnext(8, 64), 10, 1, 34_426_698),  # Zhao, table 3, and Xie et al., 2017, table 7: 34.4 M
        (resnext(4, 64), 10, 2, 35_124_884),  # Zhao, table 3, S = 2: 35.1 M
        (resnext(16, 64), 10, 1, 68_155_210),  # Xie et al., 2017, table 7: 68.1 M, cut off, not rounded
    ],
)
def test_parameters_are_the_published_ones(layout, classes, networks, published):
    assert networks * count(layout, classes) == published


@pytest.mark.parametrize(
    ("name", "classes", "published"),
    [
        ("resnext29_8x64d", 100, 34_518_948),
        ("resnext29_8x64d", 10, 34_426_698),
        ("resnext29_10x11d", 10, 4_638_926),  # Avranas and Kountouris, 2022, table 1: 4.64 M
        ("resnext29_20x6d", 100, 4_749_136),  # Avranas and Kountouris, 2022, table 1: 4.75 M
        ("wrn_16_8", 100, 11_009_332),
        ("wrn_28_10", 100, 36_539_124),
        ("resnet110", 100, 1_170_868),
    ],
)
def test_registered_networks_have_the_published_parameters(name, classes, published):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=classes)
    assert sum(parameter.numel() for parameter in model.parameters()) == published


def test_a_normalization_of_its_own_for_every_path_gives_the_third_published_count():
    """Ahmed and Torresani, 2017, table 5, {20, 4, 8}: 0.28 M, with the last normalization once per path.

    Two blocks a stage put out 64, 128 and 256 channels; seven more normalizations of two parameters each:
    7 * 2 * 2 * (64 + 128 + 256) = 12544.
    """
    assert count(LAYOUTS["resnext20_8x4d"], 100) + 12_544 == 283_572


@pytest.mark.parametrize(
    ("layout", "classes", "networks", "published"),
    [
        (resnet(110), 100, 1, 171_959_552),  # Zhao, table 2: 0.17 G
        (resnet(110, base=12), 100, 2, 195_319_680),  # Zhao, table 2, S = 2: 0.20 G
        (resnet(110, base=8), 100, 4, 176_933_376),  # Zhao, table 2, S = 4: 0.18 G
        (wide_resnet(16, 8), 100, 1, 1_550_600_704),  # Zhao, table 2: 1.55 G
        (wide_resnet(16, 6), 100, 2, 1_753_616_128),  # Zhao, table 2, S = 2: 1.75 G
        (wide_resnet(16, 4), 100, 4, 1_575_425_024),  # Zhao, table 2, S = 4: 1.58 G
        (wide_resnet(28, 10), 100, 1, 5_248_683_136),  # Zhao, table 2: 5.25 G
        (wide_resnet(28, 7), 100, 2, 5_157_441_920),  # Zhao, table 2, S = 2: 5.16 G
        (wide_resnet(28, 5), 100, 4, 5_281_650_944),  # Zhao, table 2, S = 4: 5.28 G
        (wide_resnet(28, 10), 10, 1, 5_248_625_536),  # Zhao, table 3: 5.25 G
        (wide_resnet(28, 7), 10, 2, 5_157_361_280),  # Zhao, table 3, S = 2: 5.16 G
        (wide_resnet(28, 5), 10, 4, 5_281_535_744),  # Zhao, table 3, S = 4: 5.28 G
        (resnext(8, 64), 10, 1, 5_404_601_344),  # Zhao, table 3: 5.40 G
        (resnext(4, 64), 10, 2, 5_494_233_088),  # Zhao, table 3, S = 2: 5.49 G
    ],
)
def test_operations_are_the_published_ones(layout, classes, networks, published):
    with torch.device("meta"):
        model = CifarResNet(layout, num_classes=classes)
    assert networks * operations(model) == published
