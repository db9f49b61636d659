"""Published sizes and costs. "Zhao" is Zhao et al., 2022, "Divide and Co-training"; the counts are exact."""

import pytest
import timm
import torch

from surgery.models import LAYOUTS, CifarResNet, DeepResNet, Layout, deep_resnet, resnet, resnext, wide_resnet
from tests.models.operations import operations, parameters


def count(layout: Layout, classes: int) -> int:
    with torch.device("meta"):
        return parameters(CifarResNet(layout, num_classes=classes))


@pytest.mark.parametrize(
    ("layout", "classes", "networks", "published"),
    [
        (resnet(110), 100, 1, 1_170_868),  # Zhao, table 2: 1.17 M
        (resnet(110, base=12), 100, 2, 1_333_472),  # Zhao, table 2, S = 2: 1.33 M
        (resnet(110, base=8), 100, 4, 1_214_256),  # Zhao, table 2, S = 4: 1.21 M
        (resnet(164), 100, 1, 1_727_284),  # Zhao, table 2: 1.73 M
        (resnet(110, reduction=4), 100, 1, 1_693_684),  # Zhao, table 2: 1.69 M
        (resnet(164, reduction=4), 100, 1, 2_511_508),  # Zhao, table 2: 2.51 M
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
        ("seresnet110", 100, 1_693_684),
        ("resnet50_deep", 1000, 25_680_808),
        ("wrn_50_3", 1000, 134_975_912),
        ("resnext101_64x4d_deep", 1000, 83_591_336),
    ],
)
def test_registered_networks_have_the_published_parameters(name, classes, published):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=classes)
    assert parameters(model) == published


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
        (resnet(110, reduction=4), 100, 1, 173_864_000),  # Zhao, table 2: 0.17 G
        (resnet(110, base=12, reduction=4), 100, 2, 197_982_816),  # Zhao, table 2, S = 2: 0.20 G
        (resnet(110, base=8, reduction=4), 100, 4, 180_226_176),  # Zhao, table 2, S = 4: 0.18 G
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


@pytest.mark.parametrize(
    ("layout", "networks", "size", "operation_count"),
    [
        (deep_resnet(50), 1, 25_680_808, 5_471_836_160),  # Zhao: 25.7 M, 5.5 G
        (deep_resnet(50, width=128), 1, 69_011_112, 12_800_091_136),  # Zhao, table 4: 12.8 G
        (deep_resnet(50, width=64), 2, 51_361_616, 10_943_672_320),  # Zhao, table 4, WRN-50-2, S = 2: 51.4 M, 10.9 G
        (deep_resnet(50, width=192), 1, 134_975_912, 23_827_722_240),  # Zhao, table 4: 135.0 M, 23.8 G
        (deep_resnet(101, width=4, groups=64), 1, 83_591_336, 16_921_648_128),  # Zhao, table 4: 83.6 M, 16.9 G
        (deep_resnet(101, width=4, groups=32), 2, 88_611_152, 18_771_429_376),  # Zhao, table 4, S = 2: 88.6 M, 18.8 G
    ],
)
def test_sizes_and_operations_for_imagenet_are_the_published_ones(layout, networks, size, operation_count):
    with torch.device("meta"):
        model = DeepResNet(layout)
    assert networks * parameters(model) == size
    assert networks * operations(model, 224) == operation_count


def test_squeeze_excite_for_imagenet_has_the_printed_size_with_a_stem_that_stays_narrow():
    """Zhao, table 4, SE-ResNeXt-101 64x4d, S = 2 at 416 pixels: 98.0 M, 61.1 G; a stem that widens gives 98.2, 64.8."""
    printed = []
    for stem in ((64, 64, 64), (64, 64, 128)):
        with torch.device("meta"):
            model = DeepResNet(deep_resnet(101, width=4, groups=32, stem=stem, reduction=16))
        printed.append(f"{2 * parameters(model) / 1e6:.1f} M, {2 * operations(model, 416) / 1e9:.1f} G")
    assert printed == ["98.0 M, 61.1 G", "98.2 M, 64.8 G"]
