"""Tables 2, 3 and 4 of Zhao et al., 2022, "Divide and Co-training": size and cost of the networks, whole and divided.

The exact counts are those that the authors' way of counting gives, see `tests.models.operations`; the printed ones are
the tables' own digits. A cost is counted for all S networks together, and so is a size.
"""

import functools

import pytest
import timm
import torch

import surgery
from surgery.models import CifarResNet, DeepLayout, DeepResNet, deep_resnet, resnet, resnext, wide_resnet
from surgery_divided import members
from tests.models.operations import operations, parameters

EXACT = [
    ("resnet110", 100, 1, 1_170_868, 171_959_552),
    ("resnet110", 100, 2, 1_333_472, 195_319_680),
    ("resnet110", 100, 4, 1_214_256, 176_933_376),
    ("seresnet110", 100, 1, 1_693_684, 173_864_000),
    ("seresnet110", 100, 2, None, 197_982_816),
    ("seresnet110", 100, 4, None, 180_226_176),
    ("wrn_16_8", 100, 1, 11_009_332, 1_550_600_704),
    ("wrn_16_8", 100, 2, 12_416_232, 1_753_616_128),
    ("wrn_16_8", 100, 4, 11_091_664, 1_575_425_024),
    ("wrn_28_10", 100, 1, 36_539_124, 5_248_683_136),
    ("wrn_28_10", 100, 2, None, 5_157_441_920),
    ("wrn_28_10", 100, 4, 36_650_576, 5_281_650_944),
    ("wrn_28_10", 10, 1, 36_481_434, 5_248_625_536),
    ("wrn_28_10", 10, 2, 35_774_196, 5_157_361_280),
    ("wrn_28_10", 10, 4, 36_535_016, 5_281_535_744),
    ("resnext29_8x64d", 100, 1, 34_518_948, None),
    ("resnext29_8x64d", 10, 1, 34_426_698, 5_404_601_344),
    ("resnext29_8x64d", 10, 2, 35_124_884, 5_494_233_088),
    ("resnet50_deep", 1000, 1, 25_680_808, 5_471_836_160),
    ("wrn_50_2", 1000, 1, None, 12_800_091_136),
    ("wrn_50_2", 1000, 2, 51_361_616, 10_943_672_320),
    ("wrn_50_3", 1000, 1, 134_975_912, 23_827_722_240),
    ("resnext101_64x4d_deep", 1000, 1, 83_591_336, 16_921_648_128),
    ("resnext101_64x4d_deep", 1000, 2, 88_611_152, 18_771_429_376),
]

# In millions and in 10^9. None: the printed figure does not fit; what does is in a test of its own below.
PRINTED = [
    ("resnet110", 100, 1, "1.17", "0.17"),
    ("resnet110", 100, 2, "1.33", "0.20"),
    ("resnet110", 100, 4, "1.21", "0.18"),
    ("resnet164", 100, 1, "1.73", "0.25"),
    ("resnet164", 100, 2, "1.96", "0.29"),
    ("resnet164", 100, 4, "1.78", "0.26"),
    ("seresnet110", 100, 1, "1.69", "0.17"),
    ("seresnet110", 100, 2, None, "0.20"),
    ("seresnet110", 100, 4, None, "0.18"),
    ("seresnet164", 100, 1, "2.51", "0.26"),
    ("seresnet164", 100, 2, None, "0.29"),
    ("seresnet164", 100, 4, None, "0.27"),
    ("seresnet164", 10, 1, "2.49", "0.26"),
    ("seresnet164", 10, 2, "2.81", "0.29"),
    ("wrn_16_8", 100, 1, "11.0", "1.55"),
    ("wrn_16_8", 100, 2, "12.4", "1.75"),
    ("wrn_16_8", 100, 4, "11.1", "1.58"),
    ("resnext29_8x64d", 100, 1, "34.5", None),
    ("resnext29_8x64d", 100, 2, None, None),
    ("resnext29_8x64d", 100, 4, "36.9", "5.67"),
    ("resnext29_8x64d", 10, 1, "34.4", "5.40"),
    ("resnext29_8x64d", 10, 2, "35.1", "5.49"),
    ("wrn_28_10", 100, 1, "36.5", "5.25"),
    ("wrn_28_10", 100, 2, None, "5.16"),
    ("wrn_28_10", 100, 4, "36.7", "5.28"),
    ("wrn_28_10", 10, 1, "36.5", "5.25"),
    ("wrn_28_10", 10, 2, "35.8", "5.16"),
    ("wrn_28_10", 10, 4, "36.5", "5.28"),
    ("wrn_40_10", 100, 1, "55.9", "8.08"),
    ("wrn_40_10", 100, 2, "54.8", "7.94"),
    ("wrn_40_10", 100, 4, "56.0", "8.12"),
    ("wrn_40_10", 10, 1, "55.8", "8.08"),
    ("wrn_40_10", 10, 4, "55.9", "8.12"),
    ("resnet50_deep", 1000, 1, "25.7", "5.5"),
    ("wrn_50_2", 1000, 1, None, "12.8"),
    ("wrn_50_2", 1000, 2, "51.4", "10.9"),
    ("wrn_50_3", 1000, 1, "135.0", "23.8"),
    ("wrn_50_3", 1000, 2, "138.0", "25.6"),
    ("resnext101_64x4d_deep", 1000, 1, "83.6", "16.9"),
    ("resnext101_64x4d_deep", 1000, 2, "88.6", "18.8"),
    ("seresnext101_64x4d_deep", 1000, 2, "98.0", "61.1"),
]

SMALL = [
    ("resnet110", 2, resnet(110, base=12)),
    ("resnet110", 4, resnet(110, base=8)),
    ("seresnet110", 2, resnet(110, base=12, reduction=4)),
    ("wrn_16_8", 2, wide_resnet(16, 6)),
    ("wrn_16_8", 4, wide_resnet(16, 4)),
    ("wrn_28_10", 2, wide_resnet(28, 7)),
    ("wrn_28_10", 4, wide_resnet(28, 5)),
    ("resnext29_8x64d", 2, resnext(4, 64)),
    ("resnext29_8x64d", 4, resnext(2, 64)),
    ("wrn_50_2", 2, deep_resnet(50, width=64)),
    ("wrn_50_3", 2, deep_resnet(50, width=128)),
    ("resnext101_64x4d_deep", 2, deep_resnet(101, width=4, groups=32)),
    ("seresnext101_64x4d_deep", 2, deep_resnet(101, width=4, groups=32, stem=(64, 64, 64), reduction=16)),
]


def side(name):
    """Return the pixels of an image: tables 2 and 3 have 32, table 4 has 224, but 416 for SE-ResNeXt-101."""
    if name.startswith("seresnext"):
        return 416
    return timm.get_pretrained_cfg(name).input_size[1]


@functools.cache
def network(name, classes, networks):
    with torch.device("meta"):
        source = timm.create_model(name, num_classes=classes)
    return source if networks == 1 else surgery.convert(source, "divided", networks=networks)


@functools.cache
def cost(name, classes, networks):
    model = network(name, classes, networks)
    return networks * operations(model if networks == 1 else members(model)[0], side(name))


def rounded(count, printed, unit):
    return f"{count / unit:.{len(printed.partition('.')[2])}f}"


@pytest.mark.parametrize(("name", "classes", "networks", "size", "operation_count"), EXACT)
def test_counts_are_the_published_ones(name, classes, networks, size, operation_count):
    if size is not None:
        assert parameters(network(name, classes, networks)) == size
    if operation_count is not None:
        assert cost(name, classes, networks) == operation_count


@pytest.mark.parametrize(("name", "classes", "networks", "size", "operation_count"), PRINTED)
def test_counts_round_to_the_printed_ones(name, classes, networks, size, operation_count):
    if size is not None:
        assert rounded(parameters(network(name, classes, networks)), size, 1e6) == size
    if operation_count is not None:
        assert rounded(cost(name, classes, networks), operation_count, 1e9) == operation_count


def test_the_whole_costs_as_much_as_its_members():
    for networks in (2, 4):
        assert operations(network("wrn_16_8", 100, networks)) == cost("wrn_16_8", 100, networks)


@pytest.mark.parametrize(
    ("name", "networks", "base", "printed"),
    [
        ("seresnet110", 2, 12, "1.89"),
        ("seresnet110", 4, 8, "1.70"),
        ("seresnet164", 2, 12, "2.81"),
        ("seresnet164", 4, 8, "2.53"),
    ],
)
def test_printed_sizes_of_divided_se_resnets_are_those_of_ten_classes(name, networks, base, printed):
    """Table 2 is about CIFAR-100. The head reads 16 * base channels: 90 classes fewer are 90 (16 base + 1) numbers."""
    size = parameters(network(name, 100, networks))
    assert rounded(size, printed, 1e6) != printed
    assert rounded(size - networks * 90 * (16 * base + 1), printed, 1e6) == printed


def test_printed_size_of_a_divided_wide_resnet_is_that_of_ten_classes():
    """Table 2, WRN-28-10, S = 2: 35.8 M. The head reads 64 * 7 channels."""
    size = parameters(network("wrn_28_10", 100, 2))
    assert (size, size - 2 * 90 * (448 + 1)) == (35_855_016, 35_774_196)


def test_what_is_printed_of_resnext29_on_a_hundred_classes_is_a_little_more_than_is_counted():
    """Table 2: 5.41 G whole, 35.4 M and 5.50 G for S = 2; S = 4 and all of table 3 fit."""
    assert cost("resnext29_8x64d", 100, 1) == 5_404_693_504
    assert parameters(network("resnext29_8x64d", 100, 2)) == 35_309_384
    assert cost("resnext29_8x64d", 100, 2) == 5_494_417_408


def test_printed_size_of_wrn_50_2_is_that_of_a_plain_stem():
    """Table 4 prints 68.9 M and 12.8 G for the quoted and for the own network; only the cost is that of the latter.

    Three convolutions of 27 * 64, 576 * 64 and 576 * 128 and norms of 2 * 256 numbers, and 64 channels more for the
    first 1x1 convolution (128) and projection (256), against 49 * 3 * 64 and a norm of 128.
    """
    more = 27 * 64 + 576 * 64 + 576 * 128 + 512 + 64 * (128 + 256) - (49 * 3 * 64 + 128)
    assert parameters(network("wrn_50_2", 1000, 1)) == 69_011_112
    assert 69_011_112 - more == 68_883_240


@pytest.mark.parametrize(("name", "networks", "layout"), SMALL)
def test_members_are_the_small_networks_of_the_paper(name, networks, layout):
    family, classes = (DeepResNet, 1000) if isinstance(layout, DeepLayout) else (CifarResNet, 100)
    with torch.device("meta"):
        built = family(layout, num_classes=classes)
    expected = {key: value.shape for key, value in built.state_dict().items()}
    found = members(network(name, classes, networks))
    assert len(found) == networks
    for member in found:
        assert {key: value.shape for key, value in member.state_dict().items()} == expected
