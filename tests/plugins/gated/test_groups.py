"""Where gates go, and how many channels each opens: the tables of the paper, and blocks worked out layer by layer."""

from __future__ import annotations

import re

import pytest
import timm
import timm.models.resnet as timm_resnet
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import surgery
from surgery.errors import NothingConverted
from surgery.testing import ResidualSpec, plain_chain, tiny_networks, unsettle
from surgery_gated import gated_blocks
from surgery_gated.groups import columns, gates_of
from surgery_gated.modules import ChannelGate, LayerGate
from tests.plugins.gated.oracle import Fixed, convolved, masked, normed, open_channels, shared_out
from tests.zoo import weightless

TIGHT = {"rtol": 1e-10, "atol": 1e-12}
CHANNEL = {"granularity": "channel", "dependent": False}


def build(library, name):
    """Return a network whose weights hold no numbers yet."""
    with weightless():
        model = (
            torchvision.models.get_model(name, weights=None) if library == "torchvision" else timm.create_model(name)
        )
    return model.to_empty(device="cpu")


def gates_by_name(network, path):
    """Return the channel gates of a block by the role they have in their name."""
    children = network.block(path).named_children()
    return {name.removeprefix("gated_"): gate for name, gate in children if isinstance(gate, ChannelGate)}


def sizes(gate):
    """Return (channels, channels that one gate opens, gates beside the first group); every group is contiguous."""
    column = gate.column.tolist()
    values = list(dict.fromkeys(column))
    assert values[0] == -1
    assert column == sorted(column)
    lengths = {column.count(value) for value in values}
    assert len(lengths) == 1
    return len(column), lengths.pop(), len(values) - 1


# --- one tensor ---


@pytest.mark.parametrize(("width", "size"), [(64, 16), (24, 8), (7, 3), (5, 5), (5, 9), (12, 1)])
@pytest.mark.parametrize("first", [0, 4])
def test_gates_open_contiguous_groups_and_the_first_is_always_open(width, size, first):
    found = columns(width, size, width, first, width)
    learned = gates_of(width, size, width)
    assert found.dtype == torch.int64
    for gate in range(learned):
        decisions = [float(other == gate) for other in range(learned)]
        expected = open_channels(width, size, decisions)
        assert [1.0 if c == -1 else decisions[c - first] for c in found.tolist()] == expected
    assert found[: min(size, width)].tolist() == [-1] * min(size, width)


@pytest.mark.parametrize(
    ("width", "size", "units", "expected"),
    [
        (12, 4, 3, [0, 1, 2]),  # a group of the convolution has 4 channels: one for each gate
        (12, 5, 3, [0, 0, 1]),  # 5 channels are more than one group: two
        (12, 1, 3, [0, 1, 2]),  # less than a group cannot be closed
        (12, 12, 3, [0, 0, 0]),
        (16, 4, 8, [0, 0, 1, 1, 2, 2, 3, 3]),
    ],
)
def test_gates_of_a_grouped_convolution_open_whole_groups(width, size, units, expected):
    """`expected`: the gate of each group of the convolution, 0 for what is always open."""
    found = columns(width, size, units, 0, width).tolist()
    assert found == [gate - 1 for gate in expected for _ in range(width // units)]
    assert gates_of(width, size, units) == max(expected)


def test_a_grouped_convolution_that_changes_the_width_has_the_same_gates_on_both_sides():
    """8 channels in 4 groups become 16: gates of 4 channels before it are gates of 8 behind it."""
    assert columns(8, 4, 4, 0, 8).tolist() == [-1] * 4 + [0] * 4
    assert columns(16, 4, 4, 0, 8).tolist() == [-1] * 8 + [0] * 8


# --- the networks of the paper ---


def test_resnet50_has_the_728_gates_of_the_paper():
    """A gate opens 16, 32, 64, 128 channels of inputs, outputs and projections, and half of that inside.

    A tensor of c channels in gates of g has c / g - 1 learned ones. In every stage output and projection have
    4 inner / (inner / 4) - 1 = 15 and the inner ones 7. Inputs: 64 / 16 - 1 = 3 in the first block of all, 7 in the
    first block of the others (their input is half as wide as their output), 15 elsewhere. So the first blocks have
    3 + 14 + 15 + 15 = 47 and 7 + 14 + 15 + 15 = 51 (three times), the 12 others 15 + 14 + 15 = 44:
    47 + 3 * 51 + 12 * 44 = 728.
    """
    network = surgery.convert(build("torchvision", "resnet50"), "gated", **CHANNEL)
    counts = {block.path: gates.count for block, gates in gated_blocks(network)}
    firsts = {"layer1.0": 47, "layer2.0": 51, "layer3.0": 51, "layer4.0": 51}
    assert counts == {path: firsts.get(path, 44) for path in counts}
    assert (len(counts), sum(counts.values())) == (16, 728)
    c_in = 64
    for path in counts:
        stage = int(path[5]) - 1
        wide, narrow = 16 << stage, 8 << stage
        inner, outer = 64 << stage, 256 << stage
        expected = {
            "input": (c_in, wide, c_in // wide - 1),
            "inner": (inner, narrow, 7),
            "inner_2": (inner, narrow, 7),
            "output": (outer, wide, 15),
            "projection": (outer, wide, 15),
        }
        expected = expected if path in firsts else {name: e for name, e in expected.items() if name != "projection"}
        assert {name: sizes(gate) for name, gate in gates_by_name(network, path).items()} == expected
        c_in = outer


# Blocks, expansion, output channels; channels of a gate at the input, inside, at the output: the supplement's table.
MOBILENET_V2 = (
    (1, 1, 16, (8, 16, 8)),
    (2, 6, 24, (8, 24, 8)),
    (3, 6, 32, (8, 24, 16)),
    (4, 6, 64, (8, 32, 16)),
    (3, 6, 96, (16, 48, 32)),
    (3, 6, 160, (16, 64, 32)),
    (1, 6, 320, (32, 64, 64)),
)


@pytest.mark.parametrize(("library", "name"), [("torchvision", "mobilenet_v2"), ("timm", "mobilenetv2_100")])
def test_mobilenet_v2_has_the_316_groups_of_the_paper(library, name):
    """Groups of input, expanded width and output of every block, by the table (g_inp, g_exp, g_out).

      16: 32/8 + 32/16 + 16/8 = 4 + 2 + 2 = 8
      24: 16/8 + 96/24 + 24/8 = 2 + 4 + 3 = 9,       then 24/8 + 144/24 + 24/8 = 3 + 6 + 3 = 12
      32: 24/8 + 144/24 + 32/16 = 3 + 6 + 2 = 11,    then 32/8 + 192/24 + 32/16 = 4 + 8 + 2 = 14, twice
      64: 32/8 + 192/32 + 64/16 = 4 + 6 + 4 = 14,    then 64/8 + 384/32 + 64/16 = 8 + 12 + 4 = 24, three times
      96: 64/16 + 384/48 + 96/32 = 4 + 8 + 3 = 15,   then 96/16 + 576/48 + 96/32 = 6 + 12 + 3 = 21, twice
     160: 96/16 + 576/64 + 160/32 = 6 + 9 + 5 = 20,  then 160/16 + 960/64 + 160/32 = 10 + 15 + 5 = 30, twice
     320: 160/32 + 960/64 + 320/64 = 5 + 15 + 5 = 25
    Together 8 + 21 + 39 + 86 + 57 + 80 + 25 = 316, of which the first in each of 3 * 17 tensors is not learned: 265.
    """
    network = surgery.convert(build(library, name), "gated", **CHANNEL)
    found = [(gates_by_name(network, block.path), gates.count) for block, gates in gated_blocks(network)]
    rows = [(t, c, table) for blocks, t, c, table in MOBILENET_V2 for _ in range(blocks)]
    assert len(found) == len(rows) == 17
    groups, c_in = 0, 32
    for (gates, count), (t, c_out, (g_in, g_exp, g_out)) in zip(found, rows, strict=True):
        tensors = {"input": (c_in, g_in), "inner": (t * c_in, g_exp), "output": (c_out, g_out)}
        expected = {role: (width, size, width // size - 1) for role, (width, size) in tensors.items()}
        assert {role: sizes(gates[role]) for role in tensors} == expected
        assert count == sum(learned for _, _, learned in expected.values())
        assert torch.equal(gates["inner"].column, gates["inner_2"].column)
        groups += sum(width // size for width, size in tensors.values())
        c_in = c_out
    assert groups == 316
    assert sum(count for _, count in found) == 265


def test_layers_have_one_gate_for_each_residual_block():
    """Of the 17 blocks of MobileNetV2 7 change their shape and have no shortcut: 10 gates."""
    for name, count in (("resnet50", 16), ("resnet101", 33), ("mobilenet_v2", 10)):
        network = surgery.convert(build("torchvision", name), "gated")
        blocks = [block.path for block, _ in gated_blocks(network)]
        assert [block.path for block in surgery.inspect(network).residual_blocks()] == blocks
        assert len(blocks) == count
        assert all(gates.count == 1 and gates.granularity == "layer" for _, gates in gated_blocks(network))


# --- every network ---


@pytest.mark.parametrize("name", tiny_networks())
def test_gates_are_numbered_once_each_and_leave_the_first_group_of_every_tensor_open(name):
    network = surgery.convert(tiny_networks()[name](), "gated", input_size=32, **CHANNEL)
    for block, gates in gated_blocks(network):
        placed = gates_by_name(network, block.path)
        used = [set(gate.column.tolist()) - {-1} for gate in placed.values()]
        assert set().union(*used) == set(range(gates.count))
        for gate in placed.values():
            closed = gate.mask(torch.zeros(1, gates.count))[0]
            assert closed[0] == 1
            assert closed.tolist() == sorted(closed.tolist(), reverse=True)
            assert torch.equal(gate.mask(torch.ones(1, gates.count))[0], torch.ones(len(gate.column)))


@pytest.mark.parametrize("name", ["resnext", "torchvision resnext", "timm resnext"])
@pytest.mark.parametrize("group_size", [None, 1, 5])
def test_both_sides_of_a_grouped_convolution_keep_whole_groups_together(name, group_size):
    source = tiny_networks()[name]()
    network = surgery.convert(source, "gated", input_size=32, group_size=group_size, **CHANNEL)
    for block, gates in gated_blocks(network):
        conv = source.get_submodule(block.spatial)
        placed = gates_by_name(network, block.path)
        assert conv.groups > 1
        assert torch.equal(placed["inner"].column, placed["inner_2"].column)
        opened = placed["inner"].column.view(conv.groups, -1)
        assert torch.equal(opened, opened[:, :1].expand_as(opened))
        assert len(set(opened[:, 0].tolist())) > 1
        asked = (group_size or block.channels.hidden // 8) * conv.groups / conv.in_channels
        assert opened[:, 0].tolist().count(-1) == -(-asked // 1)
        assert gates.count > 0


@pytest.mark.parametrize("group_size", [2, 4, 16])
def test_group_size_is_that_of_every_tensor(group_size):
    network = surgery.convert(
        tiny_networks()["wide resnet"](), "gated", input_size=32, group_size=group_size, **CHANNEL
    )
    for block, _ in gated_blocks(network):
        for gate in gates_by_name(network, block.path).values():
            assert gate.column.tolist().count(-1) == min(group_size, len(gate.column))


# --- blocks, layer by layer ---


def row_by_row(decisions, tensors):
    """Return the open channels of every tensor, [tensor][image][channel]."""
    return list(zip(*[shared_out(row, tensors) for row in decisions.tolist()], strict=True))


def bottleneck(block, x, decisions):
    """ResNet: four gated tensors and the projection."""
    wide, narrow = block.conv3.out_channels // 16, max(1, block.conv1.out_channels // 8)
    inner, outer = (block.conv1.out_channels, narrow), (block.conv3.out_channels, wide)
    between = [inner] if block.conv2.groups > 1 else [inner, inner]
    project = block.downsample is not None
    opened = row_by_row(decisions, [(x.shape[1], wide), *between, outer, *([outer] if project else [])])
    if block.conv2.groups > 1:
        opened.insert(2, opened[1])
    hidden = masked(x, opened[0])
    hidden = masked(normed(convolved(hidden, block.conv1), block.bn1).relu(), opened[1])
    hidden = masked(normed(convolved(hidden, block.conv2), block.bn2).relu(), opened[2])
    hidden = masked(normed(convolved(hidden, block.conv3), block.bn3), opened[3])
    if getattr(block, "se", None) is not None:
        hidden = excited(hidden, block.se.fc1, block.se.fc2, torch.relu)
    return (hidden + shortcut(block, x, opened[4:])).relu()


def basic(block, x, decisions):
    """Basic block: input, middle, output, and the projection."""
    inner, outer = block.conv1.out_channels, block.conv2.out_channels
    tensors = [(x.shape[1], outer // 16), (inner, inner // 8), (outer, outer // 16)]
    opened = row_by_row(decisions, [*tensors, *([tensors[2]] if block.downsample is not None else [])])
    hidden = masked(normed(convolved(masked(x, opened[0]), block.conv1), block.bn1).relu(), opened[1])
    hidden = masked(normed(convolved(hidden, block.conv2), block.bn2), opened[2])
    return (hidden + shortcut(block, x, opened[3:])).relu()


def shortcut(block, x, opened):
    """The shortcut sees the input without gates; a projection has gates behind its norm."""
    if block.downsample is None:
        return x
    return masked(block.downsample(x), opened[0])


def excited(x, reduce, expand, act):
    return x * torch.sigmoid(convolved(act(convolved(x.mean(dim=(2, 3), keepdim=True), reduce)), expand))


def inverted(block, x, decisions):
    """MobileNetV2: the gates of the expanded width act before and behind the depthwise convolution."""
    layers = block.conv
    expanded, out = layers[2].in_channels, layers[2].out_channels
    tensors = [(x.shape[1], max(1, out // 16)), (expanded, max(1, expanded // 8)), (out, max(1, out // 16))]
    opened = row_by_row(decisions, tensors)
    hidden = masked(x, opened[0])
    hidden = masked(F.relu6(normed(convolved(hidden, layers[0][0]), layers[0][1])), opened[1])
    hidden = masked(F.relu6(normed(convolved(hidden, layers[1][0]), layers[1][1])), opened[1])
    hidden = masked(normed(convolved(hidden, layers[2]), layers[3]), opened[2])
    return x + hidden if block.use_res_connect else hidden


def excited_inverted(block, x, decisions):
    """EfficientNet: its squeeze-excite reads the gated channels."""
    expanded, out = block.conv_pwl.in_channels, block.conv_pwl.out_channels
    tensors = [(x.shape[1], max(1, out // 16)), (expanded, max(1, expanded // 8)), (out, max(1, out // 16))]
    opened = row_by_row(decisions, tensors)
    hidden = masked(F.silu(normed(convolved(masked(x, opened[0]), block.conv_pw), block.bn1)), opened[1])
    hidden = masked(F.silu(normed(convolved(hidden, block.conv_dw), block.bn2)), opened[1])
    hidden = excited(hidden, block.se.conv_reduce, block.se.conv_expand, F.silu)
    hidden = masked(normed(convolved(hidden, block.conv_pwl), block.bn3), opened[2])
    return x + hidden if block.has_skip else hidden


def separable(block, x, decisions):
    """A depthwise convolution first: the block's input has gates of its own and those of the depthwise width."""
    width, out = block.conv_dw.in_channels, block.conv_pw.out_channels
    opened = row_by_row(decisions, [(width, max(1, out // 16)), (width, width // 8), (out, max(1, out // 16))])
    hidden = convolved(masked(masked(x, opened[0]), opened[1]), block.conv_dw)
    hidden = masked(masked(F.silu(normed(hidden, block.bn1)), opened[0]), opened[1])
    hidden = excited(hidden, block.se.conv_reduce, block.se.conv_expand, F.silu)
    return x + masked(normed(convolved(hidden, block.conv_pw), block.bn2), opened[2])


def preactivated(block, x, decisions):
    """Norm and activation in front: the first gates are behind them, where the shortcut has left already."""
    inner, outer = block.convs[0].out_channels, block.convs[1].out_channels
    opened = row_by_row(decisions, [(x.shape[1], outer // 16), (inner, inner // 8), (outer, outer // 16)])
    hidden = convolved(masked(normed(x, block.norms[0]).relu(), opened[0]), block.convs[0])
    hidden = convolved(masked(normed(hidden, block.norms[1]).relu(), opened[1]), block.convs[1])
    return x + masked(hidden, opened[2])


def excited_resnet():
    torch.manual_seed(0)
    options = {
        "layers": (1, 1, 1, 1),
        "channels": (16, 32, 8, 8),
        "num_classes": 10,
        "block_args": {"attn_layer": "se"},
    }
    return unsettle(timm_resnet.ResNet(timm_resnet.Bottleneck, **options))


def preactivated_resnet():
    return ResidualSpec((2,), kind="basic", width=8, preactivation=True).build()


TINY = tiny_networks()
LITERAL = {
    "ResNet, projected": (TINY["torchvision wide resnet"], "layer2.0", bottleneck),
    "ResNet, identity": (TINY["timm wide resnet"], "layer1.0", bottleneck),
    "ResNeXt, projected": (TINY["torchvision resnext"], "layer2.0", bottleneck),
    "ResNeXt, identity": (TINY["timm resnext"], "layer1.0", bottleneck),
    "SE-ResNet, projected": (excited_resnet, "layer2.0", bottleneck),
    "SE-ResNet, identity": (excited_resnet, "layer1.0", bottleneck),
    "WideResNet, projected": (TINY["wide resnet"], "layer2.0", basic),
    "WideResNet, identity": (TINY["wide resnet"], "layer1.0", basic),
    "MobileNetV2, identity": (TINY["torchvision mobilenetv2"], "features.3", inverted),
    "MobileNetV2, no shortcut": (TINY["torchvision mobilenetv2"], "features.2", inverted),
    "EfficientNet, identity": (TINY["timm efficientnet"], "blocks.1.1", excited_inverted),
    "EfficientNet, no shortcut": (TINY["timm efficientnet"], "blocks.2.0", excited_inverted),
    "EfficientNet, depthwise first": (TINY["timm efficientnet"], "blocks.0.0", separable),
    "activation in front": (preactivated_resnet, "stages.0.1", preactivated),
}


@torch.no_grad()
@pytest.mark.parametrize("name", LITERAL)
def test_a_gated_block_equals_its_layers_multiplied_one_by_one(name):
    create, path, literal = LITERAL[name]
    source = create().double().eval()
    network = surgery.convert(source, "gated", input_size=32, **CHANNEL)
    gates = {block.path: gates for block, gates in gated_blocks(network)}[path]
    decisions = (torch.rand(5, gates.count) < 0.5).double()
    decisions[0], decisions[1] = 1, 0
    gates.head, gates.skipping = Fixed(decisions).eval(), False
    x = torch.randn(5, surgery.inspect(source, 32).block(path).channels.input, 8, 8, dtype=torch.float64)
    found = network.block(path)(x)
    torch.testing.assert_close(found, literal(source.get_submodule(path), x, decisions), **TIGHT)
    torch.testing.assert_close(found[:1], source.get_submodule(path)(x[:1]), **TIGHT)
    assert not torch.equal(found[1:2], source.get_submodule(path)(x[1:2]))


@torch.no_grad()
@pytest.mark.parametrize("name", LITERAL)
def test_a_layer_gate_leaves_the_shortcut_or_the_whole_block(name):
    create, path, _ = LITERAL[name]
    source = create().double().eval()
    network = surgery.convert(source, "gated", input_size=32)
    found = {block.path: gates for block, gates in gated_blocks(network)}
    if path not in found:
        assert not surgery.inspect(source, 32).block(path).is_residual
        return
    block = network.block(path)
    assert [name for name, module in block.named_children() if isinstance(module, LayerGate)] == ["gated_layer"]
    found[path].head, found[path].skipping = Fixed(torch.tensor([[1.0], [0.0]])).eval().double(), False
    layers = source.get_submodule(path)
    x = torch.randn(2, surgery.inspect(source, 32).block(path).channels.input, 8, 8, dtype=torch.float64)
    open_image, closed_image = block(x)
    torch.testing.assert_close(open_image, layers(x)[0], **TIGHT)
    project = getattr(layers, "downsample", None)
    alone = x if project is None else project(x)
    behind = isinstance(getattr(layers, "act3", getattr(layers, "act2", getattr(layers, "relu", None))), nn.ReLU)
    torch.testing.assert_close(closed_image, alone[1].relu() if behind else alone[1], **TIGHT)


# --- refusals ---


@pytest.mark.parametrize(
    ("create", "reason"),
    [
        (
            lambda: timm.create_model("resnet50_gn"),
            r"layer1\.0: .*bn1 \(GroupNorm\) uses it in a way that cannot be cut",
        ),
        (lambda: timm.create_model("res2net50_26w_4s"), r"layer1\.0: the channels of getitem_1 cannot be followed"),
        (lambda: timm.create_model("resnetv2_50x1_bit"), r"conv1 is a StdConv2d, expected a plain Conv2d"),
    ],
    ids=["GroupNorm", "Res2Net", "StdConv"],
)
def test_channels_that_cannot_be_cut_are_refused_with_the_reason_for_every_block(create, reason):
    with weightless():
        model = create()
    with pytest.raises(NothingConverted, match=r"no block of .* can have channel gates") as caught:
        surgery.convert(model, "gated", granularity="channel", input_size=64)
    assert [refusal.path for refusal in caught.value.refusals] == [b.path for b in surgery.inspect(model, 64).blocks]
    assert {refusal.cure for refusal in caught.value.refusals} == {"use granularity='layer', or another network"}
    assert re.search(reason, str(caught.value))
    assert len(list(gated_blocks(surgery.convert(model, "gated", input_size=64)))) == 16


@pytest.mark.parametrize(("granularity", "what"), [("layer", "can be skipped"), ("channel", "can have channel gates")])
def test_a_plain_chain_is_refused(granularity, what):
    with pytest.raises(NothingConverted, match=rf"no block of Sequential {what}\n.*in a plain chain no layer can be"):
        surgery.convert(plain_chain(), "gated", granularity=granularity, input_size=32)


def test_blocks_without_a_shortcut_cannot_be_skipped():
    """Blocks 1, 2 and 4 of this MobileNetV2 change their width or resolution."""
    asked = {"target": {"features.1": 0.5, "features.4": 0.5}, "loss": "gate", "input_size": 32}
    with pytest.raises(NothingConverted, match="no block of MobileNetV2 can be skipped") as caught:
        surgery.convert(tiny_networks()["torchvision mobilenetv2"](), "gated", **asked)
    assert [refusal.path for refusal in caught.value.refusals] == ["features.1", "features.2", "features.4"]
    reason = "it has no shortcut, so nothing is left where it is skipped"
    assert {(refusal.reason, refusal.cure) for refusal in caught.value.refusals} == {
        (reason, "use granularity='channel'")
    }


def test_tensors_of_one_group_leave_nothing_to_gate():
    with pytest.raises(
        NothingConverted, match="every tensor of it is a single group, which is always open; pass group_"
    ):
        surgery.convert(tiny_networks()["wide resnet"](), "gated", group_size=64, input_size=32, **CHANNEL)
