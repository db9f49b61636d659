"""Recognition: the table of networks is its specification; then sizes, costs, refusals and users' networks."""

import copy

import pytest
import timm
import torch
import torchvision
from torch import nn

import surgery
from surgery.analysis import inspect
from surgery.conversion import prepare
from surgery.errors import InvalidOption, UnsupportedModel
from tests.stand_ins import Unchanged
from tests.zoo import RECOGNISED, REFUSED, build, weightless


@pytest.fixture(scope="module")
def resnext():
    return torchvision.models.resnext50_32x4d()


@pytest.mark.parametrize("expected", RECOGNISED, ids=str)
def test_stages_blocks_shortcuts_and_branches_are_found(expected):
    with weightless():
        model = build(expected.library, expected.network)
    found = inspect(model)
    assert {stage.name: len(stage.blocks) for stage in found.stages} == expected.stages
    assert len(list(found.residual_blocks())) == expected.residual
    assert sum(block.projected for block in found.blocks) == expected.projected
    assert tuple(stage.cardinality for stage in found.stages) == expected.cardinality
    assert {block.kind for block in found.blocks} == expected.kinds
    assert found.head.classes == expected.classes


def test_the_table_holds_at_least_thirty_four_networks_of_all_three_sources():
    assert len(RECOGNISED) + len(REFUSED) >= 34
    assert {row.library for row in RECOGNISED} == {"torchvision", "timm"}
    assert {"resnext29_8x64d", "wrn_16_8", "resnet110"} <= {row.network for row in RECOGNISED}


@pytest.mark.parametrize(("network", "reasons"), REFUSED.items(), ids=lambda value: "-".join(value[:2]))
def test_networks_without_usable_blocks_say_why(network, reasons):
    with weightless():
        model = build(*network)
    found = inspect(model)
    assert found.stages == ()
    text = str(found)
    assert "no blocks" in text
    for reason in reasons:
        assert any(reason in refusal.reason and refusal.cure and "node " in refusal.path for refusal in found.refusals)
        assert reason in text


@pytest.mark.parametrize("network", ["resnet50", "resnext50_32x4d", "mobilenet_v2", "wide_resnet50_2"])
def test_multiply_adds_agree_with_the_published_ones(network):
    weights = torchvision.models.get_model_weights(network).DEFAULT
    with weightless():
        found = inspect(build("torchvision", network), input_size=224)
    published = weights.meta["_ops"] * 1e9
    assert abs(found.macs - published) <= 0.005 * published
    assert found.params == weights.meta["num_params"]


def test_multiply_adds_of_a_basic_block_are_those_worked_out_by_hand():
    # First block of ResNet-18 at 32 x 32: the stem halves twice, so two 3x3 convolutions 64 -> 64 on 8 x 8 positions.
    block = inspect(torchvision.models.resnet18(), input_size=32).blocks[0]
    assert block.macs == 2 * 64 * 64 * 9 * 8 * 8
    assert block.params == 2 * (64 * 64 * 9 + 2 * 64)


def test_multiply_adds_of_windowed_tokens_count_every_window():
    # A block of Swin has 12 w^2 weights a token: 4 w^2 in the projections of the attention, inside a function,
    # and 8 w^2 in the multilayer perceptron, the first one of which is 96 -> 384 -> 96 on 56 x 56 tokens.
    with weightless():
        found = inspect(torchvision.models.swin_t())
    assert found.macs > 56 * 56 * 2 * (2 * 96 * 384)
    tokens = [56 * 56, 28 * 28, 14 * 14, 7 * 7]
    depths, widths = [2, 2, 6, 2], [96, 192, 384, 768]
    blocks = sum(t * d * 12 * w * w for t, d, w in zip(tokens, depths, widths, strict=True))
    merges = sum(t * 4 * w * 2 * w for t, w in zip(tokens[1:], widths, strict=False))
    stem = tokens[0] * 3 * 16 * 96
    head = 768 * 1000
    assert found.macs == blocks + merges + stem + head


def test_places_of_a_bottleneck(resnext):
    block = inspect(resnext).block("layer2.0")
    assert (block.split, block.spatial, block.merge) == ("layer2.0.conv1", "layer2.0.conv2", "layer2.0.conv3")
    assert block.convs == ("layer2.0.conv1", "layer2.0.conv2", "layer2.0.conv3")
    assert (block.channels.input, block.channels.hidden, block.channels.output) == (256, 256, 512)
    assert block.resolution == (28, 28)
    assert block.stage == "layer2"
    assert block.projected
    assert block.is_residual
    assert (block.body, block.shortcut, block.attention) == ("bn3", "downsample_1", None)
    assert [(branch.index, branch.start, branch.stop) for branch in block.branches[:2]] == [(0, 0, 8), (1, 8, 16)]


def test_places_of_a_basic_block():
    block = inspect(torchvision.models.resnet18()).block("layer1.0")
    assert (block.split, block.spatial, block.merge) == (None, "layer1.0.conv1", "layer1.0.conv2")
    assert (block.body, block.shortcut) == ("bn2", "x")
    assert (block.kind, block.cardinality) == ("plain", 64)


@pytest.mark.parametrize("network", ["resnetv2_50", "resnetv2_18"])
def test_pre_activation_blocks_end_in_their_addition(network):
    with weightless():
        found = inspect(timm.create_model(network))
    first, second = found.blocks[:2]
    assert all(block.output == block.join for block in found.blocks)
    assert (first.projected, second.projected) == (network == "resnetv2_50", False)
    assert second.shortcut == second.input
    assert second.merge.endswith("conv3" if network == "resnetv2_50" else "conv2")


def test_squeeze_and_excitation_between_branches_and_merge_is_named():
    with weightless():
        inside = inspect(torchvision.models.efficientnet_b0()).blocks[2]
        mobile = inspect(torchvision.models.mobilenet_v2()).blocks[2]
        behind = inspect(timm.create_model("legacy_seresnext26_32x4d")).blocks[0]
    assert inside.attention == "features.2.1.block.2"
    assert mobile.attention is None
    assert behind.attention is None  # it scales the merged channels, no branch


def test_blocks_without_a_shortcut_are_siblings_of_those_with_one():
    with weightless():
        found = inspect(torchvision.models.mobilenet_v2())
    first, second, third = found.blocks[:3]
    assert [block.is_residual for block in (first, second, third)] == [False, False, True]
    assert (first.join, first.shortcut) == (None, None)
    assert first.body == first.output


def test_stage_names_are_unique_and_blocks_know_theirs():
    for expected in (("torchvision", "efficientnet_b0"), ("timm", "regnetx_002"), ("torchvision", "maxvit_t")):
        with weightless():
            found = inspect(build(*expected))
        names = [stage.name for stage in found.stages]
        assert len(set(names)) == len(names)
        for stage in found.stages:
            assert found.stage(stage.name) is stage
            assert {block.stage for block in stage.blocks} == {stage.name}
            assert len({block.resolution for block in stage.blocks}) == 1


def test_dilated_stages_of_one_resolution_keep_their_blocks():
    plan = [False, True, True]
    with weightless():
        found = inspect(torchvision.models.resnet50(replace_stride_with_dilation=plan))
    # Stages are blocks at one resolution: with dilation layer3 and layer4 stay at layer2's.
    assert [(stage.name, len(stage.blocks), stage.resolution) for stage in found.stages] == [
        ("layer1", 3, (56, 56)),
        ("stage2", 13, (28, 28)),
    ]


def test_input_size_may_be_oblong(resnext):
    found = inspect(resnext, input_size=(128, 64))
    assert found.input_size == (3, 128, 64)
    assert [stage.resolution for stage in found.stages] == [(32, 16), (16, 8), (8, 4), (4, 2)]


def test_input_size_defaults_to_the_networks_own():
    with weightless():
        assert inspect(timm.create_model("resnext29_8x64d")).input_size == (3, 32, 32)
        assert inspect(timm.create_model("efficientnet_b1")).input_size == (3, 240, 240)
        assert inspect(timm.create_model("resnet18", in_chans=1)).input_size == (1, 224, 224)
        assert inspect(torchvision.models.resnet18()).input_size == (3, 224, 224)
        assert inspect(timm.create_model("tresnet_m")).input_size == (3, 224, 224)  # its first convolution reads 48


@pytest.mark.parametrize("size", [0, -3, (32,), (1, 2, 3), (32, 0), True, 1.5, "32"])
def test_an_unusable_input_size_is_refused(resnext, size):
    with pytest.raises(InvalidOption, match="input_size"):
        inspect(resnext, input_size=size)


def test_an_image_that_is_too_small_is_refused_with_the_cure():
    with pytest.raises(UnsupportedModel, match=r"(?s)AlexNet: cannot run on an image of 3 x 16 x 16.*pass input_size="):
        inspect(torchvision.models.alexnet(), input_size=16)


def test_inspect_leaves_the_network_untouched(resnext):
    resnext.layer1.eval()
    before = {path: dict(module.__dict__) for path, module in resnext.named_modules()}
    weights = copy.deepcopy(resnext.state_dict())
    modes = {path: module.training for path, module in resnext.named_modules()}
    inspect(resnext)
    assert {path: list(module.__dict__) for path, module in resnext.named_modules()} == {
        path: list(state) for path, state in before.items()
    }
    assert {path: module.training for path, module in resnext.named_modules()} == modes
    assert all(torch.equal(value, weights[key]) for key, value in resnext.state_dict().items())
    resnext.train()


def test_a_converted_network_answers_with_its_own_architecture():
    model = torchvision.models.resnet18()
    network = prepare(model, Unchanged(), 64)
    assert inspect(network) == inspect(model, 64)
    assert inspect(network, 64) == inspect(network)
    with pytest.raises(InvalidOption, match="converted for 64 x 64, found 96 x 96"):
        inspect(network, 96)


def test_the_table_is_readable(resnext):
    lines = str(surgery.inspect(resnext)).splitlines()
    assert lines[0] == "ResNet: 25,028,904 parameters, 4.230 GMACs at 3 x 224 x 224; head fc, 1000 classes"
    assert lines[1].split() == ["stage", "blocks", "shortcuts", "branches", "channels", "resolution", "MACs"]
    # On 56 x 56 positions: 64*128 + 128*4*9 + 128*256 + 64*256 in the first block,
    # 256*128 + 128*4*9 + 128*256 in the two others.
    assert lines[2].split() == [
        "layer1",
        "3",
        "3",
        "(1",
        "projected)",
        "32",
        "grouped",
        "64",
        "->",
        "256",
        "56",
        "x",
        "56",
        "634.2",
        "M",
    ]


def test_unknown_blocks_and_stages_list_the_known_ones(resnext):
    found = inspect(resnext)
    with pytest.raises(InvalidOption, match=r"'layer9.0' is not a block of ResNet; its blocks are layer1.0, "):
        found.block("layer9.0")
    with pytest.raises(InvalidOption, match="'layer9' is not a stage of ResNet; its stages are layer1, layer2"):
        found.stage("layer9")


def test_branches_may_be_grouped_into_equal_ranges(resnext):
    block = inspect(resnext).block("layer1.0")
    assert [(b.start, b.stop) for b in block.partition(4)] == [(0, 32), (32, 64), (64, 96), (96, 128)]
    for branches in (0, 3, 64):
        with pytest.raises(InvalidOption, match="pass a divisor of 32"):
            block.partition(branches)


class Body(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, groups=2)
        self.conv2 = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        return self.conv2(self.conv1(x).relu())


class Residual(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.body = Body(channels)

    def forward(self, x):
        return x + self.body(x)


class OwnNetwork(nn.Module):
    def __init__(self, block=Residual, blocks=2):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(*(block(8) for _ in range(blocks)))
        self.classifier = nn.Linear(8, 5)

    def forward(self, x):
        return self.classifier(self.blocks(self.stem(x)).mean((2, 3)))


def test_a_users_own_residual_modules_are_blocks():
    found = inspect(OwnNetwork(), input_size=16)
    assert [(stage.name, len(stage.blocks), stage.cardinality) for stage in found.stages] == [("blocks", 2, (2,))]
    assert found.head.classes == 5
    assert found.stem == ("stem",)
    assert found.refusals == ()
    assert (found.blocks[0].spatial, found.blocks[0].merge) == ("blocks.0.body.conv1", "blocks.0.body.conv2")


class AddsInItsRoot(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.body = Body(8)
        self.fc = nn.Linear(8, 2)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.body(x)
        return self.fc(x.mean((2, 3)))


def test_an_addition_in_the_networks_own_forward_is_refused_with_the_cure():
    found = inspect(AddsInItsRoot(), input_size=16)
    assert found.stages == ()
    (refusal,) = found.refusals
    assert "(node add)" in refusal.path
    assert "its body is no module of its own" in refusal.reason
    assert "into one nn.Module" in refusal.cure


class SeveralAdditions(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(3))

    def forward(self, x):
        for conv in self.convs:
            x = x + conv(x)
        return x


def test_a_module_that_adds_several_times_is_refused_with_the_cure():
    found = inspect(OwnNetwork(SeveralAdditions), input_size=16)
    assert found.stages == ()
    assert {refusal.path for refusal in found.refusals} == {"blocks.0", "blocks.1"}
    assert all("its shortcut starts behind a convolution" in refusal.reason for refusal in found.refusals)


class Reused(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Residual(4)

    def forward(self, x):
        return self.block(self.block(x)).mean((2, 3))


def test_a_module_that_runs_twice_is_refused():
    (refusal,) = inspect(Reused(), input_size=8).refusals
    assert refusal.path == "block"
    assert "runs more than once" in refusal.reason


class ReadsElsewhere(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.body = Body(channels)
        self.shared = [nn.Conv2d(channels, channels, 1)]

    def forward(self, x):
        return x + self.shared[0](self.body(x))


def test_a_block_that_calls_a_foreign_module_is_refused():
    model = OwnNetwork(ReadsElsewhere)
    for number, block in enumerate(model.blocks):
        model.add_module(f"foreign{number}", block.shared[0])
    refusals = inspect(model, input_size=8).refusals
    assert {refusal.path for refusal in refusals} == {"blocks.0", "blocks.1"}
    assert "foreign0, which belongs to another module" in refusals[0].reason


class PositionalNet(OwnNetwork):
    def __init__(self):
        super().__init__()
        self.position = nn.Parameter(torch.zeros(1, 8, 16, 16))

    def forward(self, x):
        return self.classifier(self.blocks(self.stem(x) + self.position).mean((2, 3)))


def test_an_added_parameter_is_no_residual_block():
    found = inspect(PositionalNet(), input_size=16)
    assert len(found.blocks) == 2


@pytest.mark.parametrize("name", ["resnext26ts", "resnet18", "mobilenetv2_050", "efficientnet_b0"])
def test_network_without_a_classifier_has_none(name):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0)
    head = surgery.inspect(model, input_size=64).head
    assert (head.path, head.classes) == (None, None)


def test_residual_body_without_a_norm_is_no_classifier():
    class Unit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 1))

        def forward(self, x):
            return self.body(x) + x

    model = nn.Sequential(Unit(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert surgery.inspect(model, input_size=8).head.path is None


def test_a_candidate_that_contains_blocks_gives_way_to_them():
    architecture = inspect(timm.create_model("dla46_c", num_classes=3), 64)
    assert "level3.tree1.tree2" in [block.path for block in architecture.blocks]
    refused = {refusal.path: refusal.reason for refusal in architecture.refusals}
    assert refused["level3.tree1"] == "it contains blocks of its own, which are taken instead"
