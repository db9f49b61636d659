"""How wide the small networks are, against the numbers of the paper and sums done by hand."""

from __future__ import annotations

import re

import pytest
import timm
import torch
import torchvision
from hypothesis import HealthCheck, assume, given, settings
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

import surgery
from surgery.errors import InvalidOption, NothingConverted, UnsupportedModel
from surgery.models import CifarResNet, resnet, resnext, wide_resnet
from surgery.testing import plain_chain, residual_networks, tiny_networks
from surgery_divided import members


def divided(source, networks=2, **options):
    return surgery.convert(source, "divided", input_size=32, networks=networks, **options)


def widths(network):
    """Return the output channels of every convolution, or (outputs, groups) of a grouped one."""
    convs = {path: module for path, module in network.named_modules() if isinstance(module, nn.Conv2d)}
    return {
        path: conv.out_channels if conv.groups == 1 else (conv.out_channels, conv.groups)
        for path, conv in convs.items()
    }


def shapes(network):
    return {name: tuple(value.shape) for name, value in network.state_dict().items()}


@pytest.mark.parametrize(
    ("width", "networks", "expected"),
    [(8, 2, 6), (8, 4, 4), (10, 2, 7), (10, 4, 5), (4, 2, 3), (4, 4, 2), (5, 4, 2)],
)
def test_the_widen_factor_is_divided_by_the_root(width, networks, expected):
    """Equation 11; 8 -> 6 -> 4 and 10 -> 7 -> 5 are the paper's. The stem stays 16 wide."""
    model = divided(CifarResNet(wide_resnet(10, width)), networks)
    thin = CifarResNet(wide_resnet(10, expected))
    assert [shapes(member) for member in members(model)] == [shapes(thin)] * networks


@pytest.mark.parametrize("networks", [2, 4, 16])
def test_a_widen_factor_is_at_least_one(networks):
    """max(int(2 / sqrt(S) + 0.4), 1) = 1; the projection of the first block stays, from 16 to 16 channels."""
    after = widths(members(divided(CifarResNet(wide_resnet(10, 2)), networks))[0])
    assert [after[f"layer{stage}.0.conv2"] for stage in (1, 2, 3)] == [16, 32, 64]


@pytest.mark.parametrize(
    ("base", "networks", "expected"),
    [(16, 2, 12), (16, 4, 8), (16, 8, 6), (16, 16, 4), (64, 2, 44), (64, 4, 32), (64, 8, 24)],
)
def test_the_base_width_of_a_resnet_is_that_of_the_paper(base, networks, expected):
    """Appendix A: 16 -> 12 -> 8 on CIFAR; 64 -> 44, 32, 24 on ImageNet."""
    model = divided(CifarResNet(resnet(11, base=base)), networks)
    thin = CifarResNet(resnet(11, base=expected))
    assert [shapes(member) for member in members(model)] == [shapes(thin)] * networks


@pytest.mark.parametrize(("groups", "networks", "expected"), [(8, 2, 4), (8, 4, 2), (6, 4, 1), (4, 8, 1)])
def test_groups_are_divided_and_keep_their_width(groups, networks, expected):
    """Equation 12; outer channels stay."""
    model = divided(CifarResNet(resnext(groups, 4, depth=11, base=8)), networks)
    thin = CifarResNet(resnext(expected, 4, depth=11, base=8))
    assert [shapes(member) for member in members(model)] == [shapes(thin)] * networks


def test_a_wide_bottleneck_is_divided_inside():
    """A WRN-50-2 in small: 2 x wide inside, int(2 / sqrt(2) + 0.4) = 1 x; WRN-50-3: int(3 / sqrt(2) + 0.4) = 2 x."""

    def wide(factor):
        return torchvision.models.resnet.ResNet(
            torchvision.models.resnet.Bottleneck, [1, 1, 1, 1], width_per_group=64 * factor, num_classes=10
        )

    for factor, expected in ((2, 1), (3, 2)):
        assert shapes(members(divided(wide(factor)))[0]) == shapes(wide(expected))


def test_a_squeeze_excite_keeps_its_reduction():
    """Appendix A: base 16 -> 12 takes 64 channels to 48 and the 4 of the squeeze-excite to 3."""
    source = ResNet(
        Bottleneck, [1] * 4, channels=[16, 32, 64, 64], stem_width=16, num_classes=10, block_args={"attn_layer": "se"}
    )
    before, after = widths(source), widths(members(divided(source))[0])
    assert before["layer1.0.se.fc1"] == 8
    assert before["layer1.0.conv3"] == 64
    assert {path: after[path] / before[path] for path in before} == dict.fromkeys(before, 0.75)


def test_basic_blocks_of_a_plain_resnet_scale_with_their_stem():
    """ResNet-18: 64 -> 44, so 128 -> 88 and 512 -> 352."""
    after = widths(members(divided(torchvision.models.resnet18()))[1])
    assert (after["conv1"], after["layer2.0.conv1"], after["layer4.1.conv2"]) == (44, 88, 352)


def test_the_general_rule_divides_the_common_divisor():
    """MobileNetV2: gcd(32, 16, 24, 64, 96, 160, 320, 1280, 6 x these) = 8; 8 / sqrt(2) = 5.66 -> 6; 8 / 2 = 4."""
    source = torchvision.models.mobilenet_v2()
    before = widths(source)
    for networks, share in ((2, 6 / 8), (4, 4 / 8)):
        for path, after in widths(members(divided(source, networks))[0]).items():
            assert after == (before[path] * share if isinstance(before[path], int) else (before[path][0] * share,) * 2)


def test_a_small_common_divisor_is_left_alone():
    """gcd(64, 12, 20, 40, 60) = 4: each width by itself, 64 -> 45.3 -> 46, 12 -> 8.5 -> 8, 20 -> 14.1 -> 14."""
    source = ResNet(BasicBlock, [1] * 4, channels=[12, 20, 40, 60], stem_width=12, num_classes=10)
    after = widths(members(divided(source, rule="general"))[0])
    paths = ("conv1", "layer1.0.conv2", "layer2.0.conv1", "layer2.0.conv2")
    assert [after[path] for path in paths] == [46, 8, 14, 14]


def test_the_general_rule_keeps_the_width_of_groups():
    """8 groups of 4 -> round(8 * 0.75) = 6 groups of 4, and the outer 32 -> 24: the divisor 8 becomes 6."""
    after = widths(members(divided(CifarResNet(resnext(8, 4, depth=11, base=8)), rule="general"))[0])
    assert after["layer1.0.conv2"] == (24, 6)
    assert after["layer1.0.conv1"] == after["layer1.0.conv3"] == 24
    assert after["layer3.0.conv2"] == (96, 6)


def test_a_regnet_keeps_the_width_of_its_groups():
    """Their common divisor 8 becomes 6, so three quarters of the groups stay."""
    before = widths(source := torchvision.models.regnet_y_400mf())
    after = widths(members(divided(source))[0])
    grouped = [path for path, width in before.items() if isinstance(width, tuple)]
    assert len(grouped) == 16
    for path in grouped:
        (old, groups), (new, fewer) = before[path], after[path]
        assert old // groups == new // fewer
        assert fewer == round(0.75 * groups)


@pytest.mark.parametrize(
    ("source", "rule", "reason"),
    [
        ("resnext", "wide", "with groups"),
        ("resnext", "resnet", "with groups"),
        ("torchvision mobilenetv2", "grouped", "without a grouped convolution between"),
        ("torchvision mobilenetv2", "resnet", "with groups"),
        ("wide resnet", "wide", "a widen factor of 1"),
        ("torchvision wide resnet", "grouped", "without a grouped"),
    ],
)
def test_a_rule_that_does_not_fit_says_why(source, rule, reason):
    with pytest.raises(InvalidOption, match=f"rule '{rule}' does not fit .*{reason}.*use rule='auto'"):
        divided(tiny_networks()[source](), rule=rule)


def test_mixed_numbers_of_groups_are_no_resnext():
    with pytest.raises(InvalidOption, match=re.escape("found [6, 13, 26, 55] groups, expected the same number")):
        divided(torchvision.models.regnet_y_400mf(), rule="grouped")


def test_widened_and_plain_blocks_are_neither_wide_nor_a_resnet():
    source = tiny_networks()["timm wide resnet"]()
    source.layer1[0].conv2 = nn.Conv2d(
        source.layer1[0].conv1.out_channels, source.layer1[0].conv2.out_channels, 5, padding=2, bias=False
    )
    for rule in ("wide", "resnet"):
        with pytest.raises(InvalidOption, match="found blocks that are no basic blocks or bottlenecks"):
            divided(source, rule=rule)


def test_a_plain_chain_is_refused():
    with pytest.raises(NothingConverted, match="no residual block"):
        divided(plain_chain())


def test_a_network_without_a_classifier_is_refused():
    with pytest.raises(NothingConverted, match="no classifier"):
        divided(timm.create_model("resnet20", num_classes=0))


def test_a_network_that_is_too_thin_is_refused():
    """Base 2: an even number next to 2 / sqrt(2) is 2."""
    with pytest.raises(NothingConverted, match="too thin to be divided by 2"):
        divided(CifarResNet(resnet(11, base=2)))


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(residual_networks())
def test_any_residual_network_divides(spec):
    """The small networks have the source's layers, none wider, and as many classes."""
    assume(spec.groups * spec.width >= 4)
    source = spec.build()
    model = surgery.convert(source, "divided", input_size=16, rule="general")
    before, after = shapes(source), shapes(members(model)[0])
    assert before.keys() == after.keys()
    assert before != after
    assert all(new <= old for name in before for new, old in zip(after[name], before[name], strict=True))
    assert model(torch.rand(2, 3, 16, 16)).shape == source(torch.rand(2, 3, 16, 16)).shape


def test_more_networks_than_channels_are_refused_before_any_is_copied():
    """The widest layer of WRN-10-1 has 64 channels."""
    with pytest.raises(InvalidOption, match=r"networks is 1000000000, .* 64 channels; expected at most 64"):
        divided(timm.create_model("wrn_10_1"), networks=10**9)


def test_layers_that_share_a_weight_are_refused():
    source = torchvision.models.resnet18()
    source.layer1[1].conv1.weight = source.layer1[0].conv1.weight
    with pytest.raises(UnsupportedModel, match=r"layer1\.1\.conv1\.weight and layer1\.0\.conv1\.weight are one"):
        divided(source)


def test_a_network_of_another_family_takes_the_general_rule():
    with torch.device("meta"):
        source = timm.create_model("hrnet_w18_small")
    assert shapes(members(divided(source))[0]) == shapes(members(divided(source, rule="general"))[0])


def test_a_network_without_additions_is_refused():
    with torch.device("meta"), pytest.raises(NothingConverted, match="no residual block"):
        divided(timm.create_model("densenet121"))
