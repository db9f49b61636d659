"""The method `coded` beyond ResNeXt: networks with depthwise, plain and grouped blocks, with and without attention."""

from __future__ import annotations

import copy
import itertools
from functools import cache, partial

import pytest
import timm.models.byobnet as byobnet
import timm.models.regnet as timm_regnet
import timm.models.resnet as timm_resnet
import torch
import torchvision.models.efficientnet as efficientnet
import torchvision.models.mobilenetv3 as mobilenetv3
import torchvision.models.regnet as regnet
from timm.models.rexnet import RexNet
from torch import nn
from torch.nn import functional as F

import surgery
from surgery.errors import InvalidOption, NothingConverted
from surgery.testing import tiny_networks, unsettle
from surgery_coded import Coded, CodingScheme, early_decode, energy, mask_branches, switch_branches
from surgery_coded.modules import BranchSwitch, CodedConv2d
from surgery_coded.pruner import branch_switches, coded_blocks
from tests.plugins.coded import oracle
from tests.zoo import build, weightless

CLASSES = 10
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def torchvision_efficientnet() -> nn.Module:
    setting = [
        efficientnet.MBConvConfig(1, 3, 1, 8, 8, 1),
        efficientnet.MBConvConfig(4, 3, 2, 8, 16, 2),
        efficientnet.MBConvConfig(4, 5, 2, 16, 24, 2),
    ]
    return efficientnet.EfficientNet(setting, dropout=0.0, stochastic_depth_prob=0.0, num_classes=CLASSES)


def torchvision_mobilenetv3() -> nn.Module:
    unit = partial(mobilenetv3.InvertedResidualConfig, dilation=1, width_mult=1.0)
    setting = [
        unit(8, 3, 32, 16, True, "RE", 2),
        unit(16, 3, 64, 16, False, "HS", 1),
        unit(16, 5, 64, 24, True, "HS", 2),
        unit(24, 5, 96, 24, True, "HS", 1),
    ]
    return mobilenetv3.MobileNetV3(setting, last_channel=32, num_classes=CLASSES, dropout=0.0)


def torchvision_regnet(se_ratio: float | None) -> nn.Module:
    params = regnet.BlockParams([1, 2], [16, 32], [4, 4], [1.0, 1.0], [2, 2], se_ratio)
    return regnet.RegNet(params, num_classes=CLASSES, stem_width=8)


def timm_regnety() -> nn.Module:
    cfg = timm_regnet.RegNetCfg(depth=8, w0=16, wa=16.0, wm=2.0, group_size=4, stem_width=8, se_ratio=0.25)
    return timm_regnet.RegNet(cfg, num_classes=CLASSES)


def timm_byobnet() -> nn.Module:
    """A network whose attention is one dense layer over all channels."""
    unit = partial(byobnet.ByoBlockCfg, "bottle", d=1, s=2, gs=4, br=0.5)
    cfg = byobnet.ByoModelCfg((unit(c=32), unit(c=64)), stem_chs=8, stem_type="3x3", stem_pool="", attn_layer="ese")
    return byobnet.ByobNet(cfg, num_classes=CLASSES)


def timm_resnets(block: type, **options: object) -> nn.Module:
    return timm_resnet.ResNet(block, (1, 1, 1, 1), CLASSES, channels=(8, 16, 32, 64), **options)


BUILDERS = {
    **tiny_networks(),
    "torchvision efficientnet": torchvision_efficientnet,
    "torchvision mobilenetv3": torchvision_mobilenetv3,
    "torchvision regnet_x": partial(torchvision_regnet, None),
    "torchvision regnet_y": partial(torchvision_regnet, 0.25),
    "timm regnety": timm_regnety,
    "timm basic resnet": partial(timm_resnets, timm_resnet.BasicBlock),
    "timm se resnext": partial(
        timm_resnets, timm_resnet.Bottleneck, cardinality=8, base_width=16, block_args={"attn_layer": "se"}
    ),
    # Its attention stands between the norm and the activation.
    "timm rexnet": partial(RexNet, num_classes=CLASSES, width_mult=0.5, depth_mult=0.4),
    "timm byobnet": timm_byobnet,
}
WITH_SWITCH = [
    "timm efficientnet",
    "torchvision efficientnet",
    "torchvision mobilenetv3",
    "torchvision regnet_y",
    "timm regnety",
    "timm byobnet",
    "timm rexnet",
]


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return unsettle(BUILDERS[name]()).double()


@cache
def by_default(name: str) -> surgery.ConvertedNetwork:
    return surgery.convert(network(name), "coded", input_size=32)


def converted(name: str, **options: object) -> surgery.ConvertedNetwork:
    if not options:
        return copy.deepcopy(by_default(name))
    return surgery.convert(network(name), "coded", input_size=32, **options)


def images(batch: int = 4) -> torch.Tensor:
    return torch.randn(batch, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def run(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(x)


# --- the definition ---


class LiteralMerge(nn.Module):
    """The coded convolution by its definition: every branch output is there, and is scaled, dropped and summed."""

    def __init__(self, coded: CodedConv2d) -> None:
        super().__init__()
        self.weight, self.bias, self.branches = coded.weight, coded.bias, coded.branches
        self.geometry = {"stride": coded.stride, "padding": coded.padding, "dilation": coded.dilation}
        self.energies = None

    def forward(self, hidden, mask=None):
        merged, self.energies = oracle.coded_merge(hidden, self.weight, self.bias, self.branches, mask, **self.geometry)
        return merged


def literal(coded: surgery.ConvertedNetwork) -> tuple[nn.Module, dict[str, LiteralMerge]]:
    """Return a copy that computes by the definition, and its merges by the path of their block."""
    twin = copy.deepcopy(coded)
    merges = {block.path: LiteralMerge(module) for block, module in coded_blocks(twin)}
    for block, _ in list(coded_blocks(twin)):
        twin.set_submodule(block.merge, merges[block.path])
    return twin, merges


@pytest.mark.parametrize("name", BUILDERS)
def test_network_equals_the_literal_definition(name):
    """Logits, energies, loss and all gradients in train mode with dropped branches, and logits in eval mode."""
    coded = converted(name, mu=3.0, p_drop=0.25)
    twin, merges = literal(coded)
    labels = torch.tensor([3, 0, 9, 3])
    torch.testing.assert_close(run(coded, images()), run(twin, images()), **CLOSE)

    coded.train(), twin.train()
    criterion = surgery.Objective(coded, nn.CrossEntropyLoss())
    torch.manual_seed(5)
    output = coded(images())
    energies = dict(surgery.taps.taps_of(coded))
    criterion(output, labels).backward()

    torch.manual_seed(5)
    expected = twin(images())
    modules = {block.path: module for block, module in coded_blocks(coded)}
    coding = sum(
        oracle.coding_loss(merges[path].energies, module.codewords[labels].int().tolist(), module.ratio, 4)
        for path, module in modules.items()
    )
    (F.cross_entropy(expected, labels) + 3.0 * coding).backward()

    torch.testing.assert_close(output, expected, **CLOSE)
    assert list(energies) == [f"{path}/energy" for path in merges]
    for path, merge in merges.items():
        torch.testing.assert_close(energies[f"{path}/energy"], merge.energies, **CLOSE)
    torch.testing.assert_close(criterion.terms["coding"], (3.0 * coding).detach(), **CLOSE)
    gradients = {key: parameter.grad for key, parameter in twin.named_parameters()}
    assert list(gradients) == [key for key, _ in coded.named_parameters()]
    largest = max(gradient.abs().max().item() for gradient in gradients.values())
    for key, parameter in coded.named_parameters():
        # A bias in front of a batch norm has a gradient of rounding errors only.
        torch.testing.assert_close(parameter.grad, gradients[key], rtol=1e-8, atol=1e-12 * largest)


# --- attention before the merge ---


@pytest.mark.parametrize("classes", [[3], [9, 0, 4]])
@pytest.mark.parametrize("name", BUILDERS)
def test_pruned_equals_masked(name, classes):
    coded = converted(name).eval()
    plan = surgery.plan(coded, classes=classes)
    pruned = surgery.prune(coded, plan)
    masked = run(mask_branches(coded, classes), images())[:, classes]
    assert not torch.allclose(masked, run(coded, images())[:, classes], rtol=1e-3)
    torch.testing.assert_close(run(pruned, images()), masked, **CLOSE)
    assert plan.after.params < plan.before.params
    assert plan.after.macs < plan.before.macs


def test_blocks_with_attention_before_the_merge_get_a_switch_and_others_do_not():
    for name in BUILDERS:
        coded = converted(name)
        switched = [block.path for block, _ in coded_blocks(coded) if branch_switches(coded, block)]
        attended = [block.path for block, _ in coded_blocks(coded) if block.attention]
        assert switched == attended
        assert bool(switched) == (name in WITH_SWITCH)


def test_attention_is_cut_with_its_branches():
    coded = converted("timm efficientnet")
    pruned = surgery.prune(coded, classes=[3])
    for block, module in coded_blocks(coded):
        kept = int(module.codewords[3].sum()) * block.channels.hidden // module.branches
        small = pruned.get_submodule(block.path)
        assert small.se.conv_reduce.in_channels == small.se.conv_expand.out_channels == kept
        assert small.bn2.num_features == small.conv_dw.groups == small.conv_pwl.weight.shape[1] == kept
        (switch,) = branch_switches(pruned, block)
        assert switch.branches == module.codewords[3].sum()


def test_switch_hands_on_its_input_itself_while_nothing_is_off():
    x = torch.randn(2, 6, 3, 3)
    switch = BranchSwitch(3)
    assert switch(x) is x
    switch.active = torch.tensor([1.0, 0.0, 1.0])
    assert torch.equal(switch(x), torch.cat([x[:, :2], torch.zeros(2, 2, 3, 3), x[:, 4:]], dim=1))
    switch.active = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]])
    found = switch(x)
    assert torch.equal(found[0, 2:4], torch.zeros(2, 3, 3))
    assert torch.equal(found[1, :2], torch.zeros(2, 3, 3))
    assert torch.equal(found[1, 2:], x[1, 2:])
    twice, once = switch.pruned([0, 1]).pruned([1]), switch.pruned([1])
    assert torch.equal(twice.active, once.active)
    assert torch.equal(once.active, torch.tensor([[0.0], [1.0]]))


def test_samples_can_have_branches_of_their_own_switched_off():
    coded = converted("torchvision efficientnet").eval()
    block = [block for block, _ in coded_blocks(coded)][-1]
    module = coded.get_submodule(block.merge)
    words = module.codewords[[3, 5, 0, 7]].double()
    switch_branches(coded, block.path, words)
    together = run(coded, images())
    for place, word in enumerate(words):
        switch_branches(coded, block.path, word)
        torch.testing.assert_close(run(coded, images())[place], together[place], **CLOSE)
    switch_branches(coded, block.path, None)
    assert not torch.allclose(run(coded, images()), together)


def test_masked_networks_are_decoded_early():
    coded = converted("timm efficientnet")
    for block, _ in coded_blocks(coded):
        found = early_decode(mask_branches(coded, [3]).eval(), images())[block.path]
        assert found.tolist() == [3] * 4


# --- masked gradients ---


@pytest.mark.parametrize(
    "name", ["timm resnext", "torchvision mobilenetv2", "timm basic resnet", "torchvision wide resnet", *WITH_SWITCH]
)
def test_inactive_branches_receive_no_gradient(name):
    coded = converted(name, gradient="masked").train()
    criterion = surgery.Objective(coded, nn.CrossEntropyLoss())
    criterion(coded(images()), torch.tensor([3] * 4)).backward()
    assert list(criterion.terms) == ["task"]
    for block, module in coded_blocks(coded):
        active = module.codewords[3]
        owned = [(coded.get_submodule(block.spatial).weight, 0), (module.weight, 1)]
        # All channels of a plain convolution read all channels of the one before.
        owned += [(coded.get_submodule(block.split).weight, 0)] if block.split and block.kind != "plain" else []
        for weight, dim in owned:
            by_branch = weight.grad.transpose(0, dim).flatten(1).unflatten(0, (module.branches, -1)).abs().amax((1, 2))
            assert torch.equal(by_branch[~active], torch.zeros(int((~active).sum()), dtype=torch.float64))
            assert (by_branch[active] > 0).all()


# --- which stages, and how many branches ---


def some_scheme(cls, classes: int, branches: int, active: int, seed: int = 0) -> CodingScheme:
    """Take the first words there are: a search of the best takes seconds for sizes that are not stored."""
    words = list(itertools.islice(itertools.combinations(range(branches), active), classes))
    table = torch.zeros(classes, branches, dtype=torch.bool)
    table[torch.arange(classes)[:, None], torch.tensor(words)] = True
    return cls(table)


def coded_stages(coded: surgery.ConvertedNetwork) -> dict[str, tuple[int, str]]:
    """Return how many blocks of each stage are coded, and their common ratio."""
    found: dict[str, list[str]] = {}
    for block, module in coded_blocks(coded):
        found.setdefault(block.stage, []).append(f"{round(module.ratio * module.branches)}/{module.branches}")
    assert all(len(set(ratios)) == 1 for ratios in found.values())
    return {stage: (len(ratios), ratios[0]) for stage, ratios in found.items()}


# Stage -> blocks coded, active of N branches. Widths are those of the papers; N is the groups of a grouped convolution,
# else the largest divisor of all widths of the stage that is at most 32: gcd(240, 480, 672) = 48 gives 24.
DEFAULTS = {
    ("torchvision", "resnext50_32x4d"): {"layer3": (6, "16/32"), "layer4": (3, "8/32")},
    ("torchvision", "resnet18"): {"layer3": (2, "16/32"), "layer4": (2, "8/32")},
    ("torchvision", "resnet50"): {"layer3": (6, "16/32"), "layer4": (3, "8/32")},
    ("torchvision", "wide_resnet50_2"): {"layer3": (6, "16/32"), "layer4": (3, "8/32")},
    ("torchvision", "mobilenet_v2"): {"stage4": (7, "16/32"), "stage5": (4, "8/32")},
    # 240, 200, 184, 480, 672 have 8 in common, and C(8, 4) = 70 codewords are too few for 1000 classes.
    ("torchvision", "mobilenet_v3_large"): {"stage3": (3, "12/24"), "stage5": (3, "8/32")},
    ("torchvision", "mobilenet_v3_small"): {"stage3": (5, "12/24"), "stage4": (3, "8/32")},
    ("torchvision", "mnasnet1_0"): {"stage3": (5, "12/24"), "stage4": (5, "8/32")},
    ("torchvision", "efficientnet_b0"): {"stage4": (6, "12/24"), "stage5": (5, "8/32")},
    ("torchvision", "efficientnet_v2_s"): {"stage4": (15, "16/32"), "features.6": (15, "8/32")},
    # Ten groups have C(10, 5) = 252 codewords; of 25, round(25 / 4) = 6 are active.
    ("torchvision", "regnet_x_400mf"): {"trunk_output.block4": (12, "6/25")},
    ("torchvision", "regnet_y_400mf"): {"trunk_output.block3": (6, "13/26"), "trunk_output.block4": (6, "14/55")},
    ("timm", "resnext50_32x4d"): {"layer3": (6, "16/32"), "layer4": (3, "8/32")},
    ("timm", "seresnext26d_32x4d"): {"layer3": (2, "16/32"), "layer4": (2, "8/32")},
    ("timm", "legacy_seresnext26_32x4d"): {"layer3": (2, "16/32"), "layer4": (2, "8/32")},
    ("timm", "seresnet50"): {"layer3": (6, "16/32"), "layer4": (3, "8/32")},
    ("timm", "wide_resnet50_2"): {"layer3": (6, "16/32"), "layer4": (3, "8/32")},
    ("timm", "resnetv2_50"): {"stages.2.blocks": (6, "16/32"), "stages.3.blocks": (3, "8/32")},
    # The blurring pool of the first block of a stage has a kernel for every channel, which nothing slices.
    ("timm", "resnetblur18"): {"layer3": (1, "16/32"), "layer4": (1, "8/32")},
    ("timm", "mobilenetv2_100"): {"stage4": (7, "16/32"), "stage5": (4, "8/32")},
    ("timm", "mobilenetv3_large_100"): {"blocks.2": (3, "12/24"), "blocks.5": (3, "8/32")},
    ("timm", "mnasnet_100"): {"stage4": (5, "12/24"), "stage5": (5, "8/32")},
    ("timm", "semnasnet_100"): {"stage4": (6, "12/24"), "stage5": (4, "8/32")},
    ("timm", "efficientnet_b0"): {"stage4": (6, "12/24"), "stage5": (5, "8/32")},
    ("timm", "tf_efficientnetv2_s"): {"stage4": (15, "16/32"), "blocks.5": (15, "8/32")},
    ("timm", "regnetx_002"): {"s3": (4, "10/19"), "s4": (7, "12/46")},
    ("timm", "regnety_002"): {"s3": (4, "10/19"), "s4": (7, "12/46")},
    # 36 and 54 groups in one stage: 18; more than 64 groups, 120 and 264, are joined like channels: 30 and 24.
    ("timm", "regnetz_b16"): {"stages.2": (12, "9/18"), "stages.3": (2, "4/18")},
    ("timm", "regnetz_040"): {"s3": (14, "15/30"), "s4": (6, "6/24")},
    # In the other blocks of these stages the depthwise convolution comes first, and two convolutions follow.
    ("timm", "mobilenetv4_conv_small"): {"blocks.2": (4, "16/32"), "blocks.3": (4, "8/32")},
    ("timm", "wrn_28_10"): {"layer2": (4, "16/32"), "layer3": (4, "8/32")},
    ("timm", "resnet110"): {"layer2": (12, "16/32"), "layer3": (12, "8/32")},
}


@pytest.mark.parametrize(("library", "name"), DEFAULTS)
def test_default_codes_the_last_two_stages_that_can_be_coded(library, name, monkeypatch):
    monkeypatch.setattr(CodingScheme, "search", classmethod(some_scheme))
    with weightless():
        model = build(library, name)
    coded = surgery.convert(model, "coded")
    assert coded_stages(coded) == DEFAULTS[library, name]
    assert list(coded.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize(
    ("classes", "expected"),
    [
        (10, {"stage4": (6, "4/8"), "stage5": (3, "8/32")}),
        (100, {"stage3": (3, "12/24"), "stage5": (3, "8/32")}),
    ],
)
def test_default_depends_on_how_many_codewords_there_are(classes, expected, monkeypatch):
    """Eight branches, all that the widths of the fourth stage allow, have C(8, 4) = 70 codewords."""
    monkeypatch.setattr(CodingScheme, "search", classmethod(some_scheme))
    with weightless():
        model = build("torchvision", "mobilenet_v3_large", num_classes=classes)
    assert coded_stages(surgery.convert(model, "coded")) == expected


@pytest.mark.parametrize(
    ("value", "branches", "expected"),
    [
        ("1/2", None, "16/32"),
        ("0.5", None, "16/32"),
        ("2/4", None, "2/4"),
        ("12/24", None, "12/24"),
        ("3/8", None, "3/8"),
        ("1/2", 16, "8/16"),
        ("12/24", 16, "12/24"),
        (CodingScheme.search(6, 4, 2), None, "2/4"),
        (CodingScheme.search(6, 4, 2).to_dict(), 16, "2/4"),
    ],
)
def test_branches_of_a_partition_are_those_that_the_scheme_names(value, branches, expected, monkeypatch):
    """96 hidden channels in both blocks: 32 is the largest divisor up to 32; a scheme that names N goes first."""
    monkeypatch.setattr(CodingScheme, "search", classmethod(some_scheme))
    model = timm_resnet.ResNet(timm_resnet.Bottleneck, (1, 1, 1, 2), 6, channels=(8, 8, 8, 96))
    coded = surgery.convert(model, "coded", scheme={"layer4": value}, branches=branches, input_size=32)
    found = {f"{round(module.ratio * module.branches)}/{module.branches}" for _, module in coded_blocks(coded)}
    assert found == {expected}


@pytest.mark.parametrize("value", ["1/2", "4/8", "16/32"])
def test_branches_of_a_grouped_convolution_are_its_groups(value):
    coded = converted("timm resnext", scheme={"layer4": value})
    assert [(module.branches, module.ratio) for _, module in coded_blocks(coded)] == [(8, 0.5)]


def test_blocks_of_one_stage_share_the_scheme_whatever_their_widths():
    """The first MobileNetV2 block of a stage is narrower: 48 and 64 channels, branches of 3 and 4."""
    coded = converted("timm mobilenetv2", scheme={"blocks.2": "8/16"})
    blocks = list(coded_blocks(coded))
    assert [block.channels.hidden // module.branches for block, module in blocks] == [64 // 16, 96 // 16]
    assert torch.equal(blocks[0][1].codewords, blocks[1][1].codewords)


# --- errors ---


def test_unknown_stage_is_refused_with_the_names_there_are():
    with pytest.raises(InvalidOption, match="'layer4' is not a stage of MobileNetV2; its stages are stage1, "):
        converted("torchvision mobilenetv2", scheme={"layer4": "1/2"})


@pytest.mark.parametrize("value", ["5/10", CodingScheme.search(10, 10, 5)])
def test_scheme_that_does_not_divide_the_widths_is_refused_with_the_divisors(value):
    expected = (
        r"stage 'blocks.2' has blocks of 64/96 channels, which cannot form 10 equal branches; expected one of 2, 4, 8, "
        r"16, 32$"
    )
    with pytest.raises(InvalidOption, match=expected):
        converted("timm mobilenetv2", scheme={"blocks.2": value})


def test_block_that_cannot_form_the_branches_is_refused_and_the_others_are_coded():
    """64 and 96 channels: only the second can form 24 branches; 8 branches in the stage before cannot form 24."""
    coded = converted("timm mobilenetv2", branches=24)
    assert [block.channels.hidden for block, _ in coded_blocks(coded)] == [96]
    with pytest.raises(NothingConverted, match=r"layer4\.0: its 8 branches cannot form 24; pass a divisor of 8"):
        converted("timm resnext", branches=24)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gcresnext26ts", r"stages.0.0: stages.0.0.attn mixes the branches before they are joined: "),
        ("skresnext50_32x4d", r"layer1.0: layer1.0.conv2 mixes the branches before they are joined: "),
        ("resnet50_gn", r"layer1.0: its branches cannot be cut apart: bn2 \(GroupNorm\) uses it in a way that"),
        ("resnetv2_50x1_bit", r"stages.0.blocks.0.conv3 is a StdConv2d, expected a plain Conv2d"),
        ("convnext_tiny", r"stages.0.blocks.0: no dense convolution joins its branches"),
        ("convnext_atto", r"stages.0.blocks.0.mlp.fc2 follows stages.0.blocks.0.mlp.fc1, expected the convolution"),
    ],
)
def test_block_whose_branches_cannot_be_told_apart_is_refused_with_the_reason(name, reason):
    with weightless():
        model = build("timm", name)
    with pytest.raises(NothingConverted, match=reason):
        surgery.convert(model, "coded")


def test_stage_without_a_usable_block_is_refused_with_the_reason():
    with weightless():
        model = build("torchvision", "efficientnet_v2_s")
    expected = r"stage 'features.1' has no block that can be coded \(features.1.0: no dense convolution joins its"
    with pytest.raises(InvalidOption, match=expected):
        surgery.convert(model, "coded", scheme={"features.1": "16/32"})


# --- living with it ---


@pytest.mark.parametrize(
    ("library", "name"),
    [("torchvision", "mobilenet_v2"), ("timm", "efficientnet_b0")],
)
def test_saved_network_loads_with_equal_output(library, name, tmp_path, monkeypatch):
    monkeypatch.setattr(CodingScheme, "search", classmethod(some_scheme))
    coded = surgery.convert(build(library, name, num_classes=CLASSES), Coded(mu=3.0), input_size=32).eval()
    pruned = surgery.prune(coded, classes=[2, 5])
    for model in (coded, pruned):
        surgery.save(model, tmp_path / "model.safetensors")
        loaded = surgery.load(tmp_path / "model.safetensors")
        assert torch.equal(run(loaded, images().float()), run(model, images().float()))


@pytest.mark.parametrize("name", ["torchvision efficientnet", "timm efficientnet"])
def test_attention_is_recognised_at_one_position_as_at_many(name):
    """At 8 pixels the maps of the last stage are 1 x 1, and a gate is as large as what it scales."""
    blocks = [surgery.inspect(BUILDERS[name](), size).blocks for size in (8, 64)]
    for small, large in zip(*blocks, strict=True):
        assert (small.convs, small.merge, small.attention) == (large.convs, large.merge, large.attention)
        assert small.attended == large.attended != ()
    assert blocks[0][-1].resolution == (1, 1)


# --- the energies of a 3x3 merge ---


@pytest.mark.parametrize("channels", [5, 64])
def test_energies_on_small_maps_equal_the_literal_ones(channels, monkeypatch):
    """9 positions are less than the 18 numbers under a branch's kernel.

    For 64 channels the products with G_n are fewer, 18 * (72 + 64) against 64 * 72; for 5 those with W_n.
    """
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(8, 6, 3, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(channels, 6, 3, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    calls = []
    grams = energy.weight_grams
    monkeypatch.setattr(energy, "weight_grams", lambda *arguments: calls.append(1) or grams(*arguments))
    found = energy.branch_energies(hidden, weight, 3, padding=(1, 1))
    outputs = oracle.branch_outputs(hidden, weight, 3, padding=1)
    expected = torch.stack([oracle.energy(t) for t in outputs], dim=1)
    torch.testing.assert_close(found, expected, **CLOSE)
    assert len(calls) == (channels == 64)
    probe = torch.randn(8, 3, dtype=torch.float64, generator=generator)
    ours, theirs = (torch.autograd.grad((value * probe).sum(), (hidden, weight)) for value in (found, expected))
    for gradient, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-10)
