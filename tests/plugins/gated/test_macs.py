"""Multiply-adds for given decisions: the formulas of the paper, its published numbers, and their gradient."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision

import surgery
from surgery.testing import tiny_networks
from surgery_gated import block_macs, gated_blocks, network_macs
from surgery_gated.modules import ChannelGate
from tests.plugins.gated import oracle
from tests.zoo import weightless

EXACT = {"rtol": 1e-13, "atol": 0}
CHANNEL = {"granularity": "channel", "dependent": False}


def resnet50(**options):
    with weightless():
        model = torchvision.models.resnet50()
    return surgery.convert(model.to_empty(device="cpu"), "gated", input_size=224, **options)


def decisions_of(network, batch=5, value=None):
    """Return decisions (batch, G) of every block: random ones, or all of a value."""
    return {
        block.path: (torch.rand(batch, gates.count) < 0.5).double()
        if value is None
        else torch.full((batch, gates.count), value, dtype=torch.float64)
        for block, gates in gated_blocks(network)
    }


def opened(row, tensors):
    """Return the number of open channels of every tensor (width, channels of a gate)."""
    return [sum(channels) for channels in oracle.shared_out(row, tensors)]


# --- the published numbers ---


def test_resnet50_spends_what_the_formula_of_the_paper_gives():
    """Exact integers: 4.089 G in all, 0.188 G with every learned gate closed, so 3.901 G are behind gates.

    By hand, what no gate closes: the stem 112^2 * 64 * 147 = 118,013,952 and the classifier 2048 * 1000, and of every
    block the first group of each tensor. An identity block of the first stage has 16 * 8 + 9 * 8 * 8 + 8 * 16 = 832 for
    each of 56^2 positions: 2,609,152; the same in every stage, since channels double where sides halve, so 12 times
    31,309,824. The first block of all adds a projection of 64 * 16 at 56^2: 3,211,264. The three others read at twice
    the side: 4 * 16 * 8 + 576 + 128 = 1,216 for each of 56^2, the projection 256 * 32 at 28^2, in units of the first
    stage's 56^2 2,048 times that: 3,813,376 + 6,422,528. Together 118,013,952 + 2,048,000 + 31,309,824 + 2,609,152 +
    3,211,264 + 3 * 10,235,904 = 187,899,904.
    """
    network = resnet50(**CHANNEL)
    full = network_macs(network, decisions_of(network, value=1.0))
    closed = network_macs(network, decisions_of(network, value=0.0))
    assert full.tolist() == [oracle.resnet50_macs(gates_open=True)] * 5 == [4_089_184_256] * 5
    assert closed.tolist() == [oracle.resnet50_macs(gates_open=False)] * 5 == [187_899_904] * 5
    assert full[0] - closed[0] == 3_901_284_352


def test_twelve_blocks_of_resnet50_spend_218365952_each():
    """An identity bottleneck of inner width p at side s: s^2 (4 p^2 + 9 p^2 + 4 p^2) = 17 p^2 s^2, p s = 64 * 56.

    17 * 64^2 * 56^2 = 218,365,952. The four others keep their projection where they are closed.
    """
    network = resnet50(dependent=False)
    architecture = surgery.inspect(network)
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    spent = {block.path: block_macs(network, block.path, one) for block, _ in gated_blocks(network)}
    kept = {block.path: block_macs(network, block.path, zero) for block, _ in gated_blocks(network)}
    assert [float(value) for value in spent.values()].count(218_365_952) == 12
    assert [float(value) for value in kept.values()].count(0) == 12
    sides = {
        "layer1.0": (56, 64, 256),
        "layer2.0": (28, 256, 512),
        "layer3.0": (14, 512, 1024),
        "layer4.0": (7, 1024, 2048),
    }
    for path, (side, c_in, c_out) in sides.items():
        assert float(kept[path]) == oracle.projection_macs(side, c_in, c_out)
        assert float(spent[path]) == architecture.block(path).macs


# --- one block for any decisions ---


def bottleneck(block, row, side, width=None):
    """(C_in, inner, C_out, stride, projected); `width`: channels of a group of the grouped convolution."""
    c_in, inner, c_out, stride, projected = block
    tensors = [
        (c_in, c_out // 16),
        *[(inner, inner // 8)] * (2 if width is None else 1),
        *[(c_out, c_out // 16)] * (1 + projected),
    ]
    counts = opened(row, tensors)
    project = oracle.projection_macs(side // stride, c_in, counts[-1]) if projected else 0
    if width is None:
        return oracle.bottleneck_macs(side, stride, *counts[:4]) + project
    return oracle.grouped_bottleneck_macs(side, stride, *counts[:2], width, counts[2]) + project


def basic(block, row, side):
    c_in, inner, c_out, stride, projected = block
    counts = opened(row, [(c_in, c_out // 16), (inner, inner // 8), *[(c_out, c_out // 16)] * (1 + projected)])
    project = oracle.projection_macs(side // stride, c_in, counts[-1]) if projected else 0
    return oracle.basic_macs(side, stride, *counts[:3]) + project


def inverted(block, row, side):
    c_in, inner, c_out, stride = block
    counts = opened(row, [(c_in, max(1, c_out // 16)), (inner, inner // 8), (c_out, max(1, c_out // 16))])
    return oracle.inverted_residual_macs(side, stride, 3, *counts)


def excited(block, row, side):
    """A squeeze-excite to a quarter of the block's input reads the open channels and scales all of them."""
    c_in, inner, c_out, _ = block
    reduced = c_in // 4
    a = opened(row, [(c_in, max(1, c_out // 16)), (inner, inner // 8), (c_out, max(1, c_out // 16))])[1]
    return inverted(block, row, side) + a * reduced + reduced * inner


# Network, block, side of its input for images of 64, (channels, stride, projected), formula, its other argument.
CASES = {
    "bottleneck": ("timm wide resnet", "layer1.0", 16, (64, 32, 64, 1, False), bottleneck, {}),
    "projected bottleneck": ("torchvision wide resnet", "layer2.0", 16, (256, 32, 512, 2, True), bottleneck, {}),
    "ResNeXt": ("timm resnext", "layer1.0", 16, (64, 32, 64, 1, False), bottleneck, {"width": 4}),
    "projected ResNeXt": ("torchvision resnext", "layer2.0", 16, (256, 64, 512, 2, True), bottleneck, {"width": 8}),
    "basic": ("wide resnet", "layer1.0", 64, (16, 16, 16, 1, False), basic, {}),
    "projected basic": ("wide resnet", "layer3.0", 32, (32, 64, 64, 2, True), basic, {}),
    "inverted residual": ("torchvision mobilenetv2", "features.3", 16, (16, 64, 16, 1), inverted, {}),
    "strided inverted residual": ("torchvision mobilenetv2", "features.2", 32, (8, 32, 16, 2), inverted, {}),
    "squeeze-excite": ("timm efficientnet", "blocks.1.1", 16, (16, 64, 16, 1), excited, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_multiply_adds_of_a_block_equal_the_formula(name):
    """Random decisions, one row each: images do not mix."""
    source, path, side, shape, formula, other = CASES[name]
    network = surgery.convert(tiny_networks()[source]().double(), "gated", input_size=64, **CHANNEL)
    decisions = decisions_of(network)[path]
    decisions[0], decisions[1] = 1, 0
    expected = [formula(shape, row, side, **other) for row in decisions.tolist()]
    found = block_macs(network, path, decisions)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), **EXACT)
    assert float(found[0]) == surgery.inspect(tiny_networks()[source](), 64).block(path).macs
    assert len(set(expected)) >= 4


def test_a_depthwise_convolution_that_reads_the_block_input_is_gated_on_both_sides():
    """16 channels at 16 x 16: gates on the input (of 1 channel: 15) and on the depthwise width (of 2: 7) multiply.

    The depthwise 3x3 costs 9 for each channel that both open, the 1x1 behind it those times the open ones of 8.
    """
    source = tiny_networks()["torchvision mobilenetv2"]().double()
    network = surgery.convert(source, "gated", input_size=32, **CHANNEL)
    decisions = decisions_of(network)["features.1"]
    expected = []
    for row in decisions.tolist():
        a_in, a, a_out = oracle.shared_out(row, [(16, 1), (16, 2), (8, 1)])
        both = sum(x * y for x, y in zip(a_in, a, strict=True))
        expected.append(16**2 * (9 * both + both * sum(a_out)))
    found = block_macs(network, "features.1", decisions)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), **EXACT)


@pytest.mark.parametrize("name", tiny_networks())
def test_a_layer_costs_its_body_where_it_is_open(name):
    """Squeeze-excites belong to the body, projections do not; what is left is the shortcut."""
    source = tiny_networks()[name]().double()
    network = surgery.convert(source, "gated", input_size=32)
    for block, _ in gated_blocks(network):
        plain = surgery.inspect(source, 32).block(block.path)
        found = block_macs(network, block.path, torch.tensor([[0.0], [1.0], [0.0]], dtype=torch.float64))
        project = plain.resolution[0] * plain.resolution[1] * plain.channels.input * plain.channels.output
        shortcut = project if plain.projected else 0
        assert found.tolist() == [shortcut, plain.macs, shortcut]


# --- the whole network ---


@pytest.mark.parametrize("granularity", ["layer", "channel"])
@pytest.mark.parametrize("name", tiny_networks())
def test_open_gates_cost_what_the_source_costs(name, granularity):
    """What computes the gates is not counted."""
    source = tiny_networks()[name]().double()
    network = surgery.convert(source, "gated", input_size=32, granularity=granularity)
    found = network_macs(network, decisions_of(network, value=1.0))
    assert found.tolist() == [surgery.inspect(source, 32).macs] * 5


@pytest.mark.parametrize("granularity", ["layer", "channel"])
def test_the_network_is_the_sum_of_its_blocks_and_the_rest(granularity):
    source = tiny_networks()["timm mobilenetv2"]().double()
    network = surgery.convert(source, "gated", input_size=32, granularity=granularity)
    decisions = decisions_of(network)
    plain = surgery.inspect(source, 32)
    blocks = sum(block_macs(network, path, rows) for path, rows in decisions.items())
    others = plain.macs - sum(plain.block(path).macs for path in decisions)
    torch.testing.assert_close(network_macs(network, decisions), blocks + others, **EXACT)
    assert others > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_counts_need_at_least_float32(dtype):
    """65,504 is the largest number of float16."""
    network = surgery.convert(tiny_networks()["wide resnet"](), "gated", input_size=32, **CHANNEL)
    for block, gates in gated_blocks(network):
        found = block_macs(network, block.path, torch.ones(1, gates.count, dtype=dtype))
        assert found.dtype == torch.promote_types(dtype, torch.float32)
        assert float(found) == pytest.approx(surgery.inspect(network).block(block.path).macs, rel=1e-6)


def test_what_is_remembered_of_a_block_is_not_mistaken_for_that_of_its_copy():
    network = surgery.convert(tiny_networks()["wide resnet"]().double(), "gated", input_size=32, **CHANNEL)
    decisions = decisions_of(network)
    before = network_macs(network, decisions)
    twin = copy.deepcopy(network)
    assert torch.equal(network_macs(twin, decisions), before)
    with torch.no_grad():
        for gate in twin.modules():
            if isinstance(gate, ChannelGate):
                gate.column.fill_(-1)
    assert network_macs(twin, decisions).tolist() == [surgery.inspect(network).macs] * 5
    assert torch.equal(network_macs(network, decisions), before)


@pytest.mark.parametrize(
    "name", ["ResNeXt", "projected bottleneck", "inverted residual", "squeeze-excite", "projected basic"]
)
def test_gradient_in_the_decisions_equals_finite_differences(name):
    """Bilinear in the decisions: the central difference is exact up to rounding."""
    source, path, *_ = CASES[name]
    network = surgery.convert(tiny_networks()[source]().double(), "gated", input_size=64, **CHANNEL)
    decisions = torch.rand_like(decisions_of(network, batch=2)[path]).requires_grad_()
    found = torch.autograd.grad(block_macs(network, path, decisions).sum(), decisions)[0]
    for image, gate in ((0, 0), (1, 3), (0, decisions.shape[1] - 1), (1, decisions.shape[1] // 2)):
        step = torch.zeros_like(decisions)
        step[image, gate] = 0.25
        with torch.no_grad():
            above, below = (block_macs(network, path, decisions + sign * step).sum() for sign in (1, -1))
        assert found[image, gate] > 0
        torch.testing.assert_close(found[image, gate], (above - below) / 0.5, rtol=1e-9, atol=0)
