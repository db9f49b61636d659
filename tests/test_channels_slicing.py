"""Cutting channels: slices compose, coupled widths change together, and what cannot be cut says why."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from surgery.analysis import inspect
from surgery.channels import channel_map
from surgery.errors import RewriteError
from surgery.rewriter import Rewriter
from surgery.slicing import slice_module
from tests.stand_ins import rebuilt


def equal(first, second):
    a, b = first.state_dict(), second.state_dict()
    return repr(first) == repr(second) and list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)


def subset(size):
    """Draw the indices of some of `size` channels, in order."""
    return st.sets(st.integers(0, size - 1), min_size=1).map(lambda kept: torch.tensor(sorted(kept)))


def positions(count):
    return st.sets(st.integers(0, count - 1), min_size=1).map(lambda kept: torch.tensor(sorted(kept)))


@st.composite
def two_cuts(draw, size):
    first = draw(subset(size))
    return first, draw(positions(len(first)))


@settings(max_examples=40)
@given(inputs=two_cuts(6), outputs=two_cuts(8), bias=st.booleans())
def test_slices_of_a_convolution_compose(inputs, outputs, bias):
    conv = nn.Conv2d(6, 8, 3, padding=1, bias=bias)
    twice = slice_module(slice_module(conv, inputs[0], outputs[0]), inputs[1], outputs[1])
    assert equal(twice, slice_module(conv, inputs[0][inputs[1]], outputs[0][outputs[1]]))


@settings(max_examples=40)
@given(inputs=two_cuts(6), outputs=two_cuts(8), bias=st.booleans())
def test_slices_of_a_linear_layer_compose(inputs, outputs, bias):
    linear = nn.Linear(6, 8, bias=bias)
    twice = slice_module(slice_module(linear, inputs[0], outputs[0]), inputs[1], outputs[1])
    assert equal(twice, slice_module(linear, inputs[0][inputs[1]], outputs[0][outputs[1]]))


@settings(max_examples=40)
@given(outputs=two_cuts(8), affine=st.booleans(), statistics=st.booleans())
def test_slices_of_a_norm_compose(outputs, affine, statistics):
    norm = nn.BatchNorm2d(8, affine=affine, track_running_stats=statistics)
    for tensor in norm.state_dict().values():
        tensor.copy_(torch.rand_like(tensor, dtype=torch.float32) * 9)
    twice = slice_module(slice_module(norm, None, outputs[0]), None, outputs[1])
    assert equal(twice, slice_module(norm, None, outputs[0][outputs[1]]))


def channels_of(groups, width):
    return (groups[:, None] * width + torch.arange(width)).flatten()


@settings(max_examples=40)
@given(groups=two_cuts(4))
def test_slices_of_a_grouped_convolution_compose(groups):
    conv = nn.Conv2d(8, 12, 3, groups=4)
    (first, second), both = groups, groups[0][groups[1]]
    once = slice_module(conv, channels_of(first, 2), channels_of(first, 3))
    assert (once.groups, once.in_channels, once.out_channels) == (len(first), 2 * len(first), 3 * len(first))
    twice = slice_module(once, channels_of(second, 2), channels_of(second, 3))
    assert equal(twice, slice_module(conv, channels_of(both, 2), channels_of(both, 3)))


@settings(max_examples=25)
@given(inputs=subset(6), outputs=subset(8))
def test_a_sliced_convolution_computes_part_of_the_whole(inputs, outputs):
    conv = nn.Conv2d(6, 8, 3, padding=1).double()
    x = torch.rand(2, 6, 5, 5, dtype=torch.float64)
    masked = torch.zeros_like(x)
    masked[:, inputs] = x[:, inputs]
    part = slice_module(conv, inputs, outputs)(x[:, inputs])
    torch.testing.assert_close(part, conv(masked)[:, outputs], rtol=1e-10, atol=1e-12)


@settings(max_examples=25)
@given(kept=subset(6))
def test_a_sliced_depthwise_convolution_computes_part_of_the_whole(kept):
    conv = nn.Conv2d(6, 6, 3, padding=1, groups=6).double()
    x = torch.rand(2, 6, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(slice_module(conv, kept, kept)(x[:, kept]), conv(x)[:, kept], rtol=1e-10, atol=1e-12)


def test_a_slice_keeps_settings_mode_hooks_and_frozen_weights():
    conv = nn.Conv2d(6, 8, 3, stride=2, dilation=2, padding="valid", padding_mode="zeros", dtype=torch.float64).eval()
    conv.weight.requires_grad_(requires_grad=False)
    conv.remark = "mine"
    part = slice_module(conv, None, torch.tensor([1, 3]))
    assert (part.stride, part.dilation, part.padding, part.training, part.remark) == (
        (2, 2),
        (2, 2),
        "valid",
        False,
        "mine",
    )
    assert part.weight.dtype == torch.float64
    assert not part.weight.requires_grad
    assert part.bias.requires_grad
    assert isinstance(part.weight, nn.Parameter)
    assert conv.weight.shape == (8, 6, 3, 3)


def test_a_slice_shares_no_memory_with_the_whole():
    conv = nn.Conv2d(2, 2, 1)
    part = slice_module(conv, None, torch.arange(2))
    with torch.no_grad():
        part.weight.zero_()
    assert conv.weight.abs().sum() > 0


def test_a_subclass_keeps_its_class():
    class Own(nn.Conv2d):
        pass

    assert type(slice_module(Own(4, 4, 1), None, torch.tensor([0]))) is Own


def test_a_grouped_convolution_loses_whole_groups_only():
    conv = nn.Conv2d(8, 8, 3, groups=4)
    for inputs, outputs in (([0, 1, 2], [0, 1, 2, 3]), ([0, 1], [0, 3]), ([0, 1], [1, 2]), ([1, 0], [0, 1])):
        with pytest.raises(RewriteError, match="a convolution with 4 groups of 2 channels can only lose whole groups"):
            slice_module(conv, torch.tensor(inputs), torch.tensor(outputs))


def test_a_grouped_convolution_keeps_the_same_groups_on_both_sides():
    conv = nn.Conv2d(8, 8, 3, groups=4)
    with pytest.raises(RewriteError, match=r"the same groups on both sides, found \[0\] to read and \[1\] to write"):
        slice_module(conv, torch.tensor([0, 1]), torch.tensor([2, 3]))
    with pytest.raises(RewriteError, match="the same groups on both sides"):
        slice_module(conv, torch.tensor([0, 1]), None)


def test_a_parametrized_layer_is_refused_with_the_cure():
    conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1))
    with pytest.raises(RewriteError, match="remove the parametrization before its channels are cut"):
        slice_module(conv, None, torch.tensor([0]))


def test_other_layers_are_refused_by_name():
    with pytest.raises(RewriteError, match="LayerNorm cannot be sliced; expected Conv2d, a batch norm or Linear"):
        slice_module(nn.LayerNorm(4), None, torch.tensor([0]))


class Block(nn.Module):
    def __init__(self, inputs, hidden, outputs, groups):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, hidden, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, padding=1, groups=groups)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.conv3 = nn.Conv2d(hidden, outputs, 1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))).relu()
        return F.relu(self.conv3(y) + (x if self.shortcut is None else self.shortcut(x)))


class Network(nn.Module):
    def __init__(self, stem=8, hidden=8, width=16, groups=4):
        super().__init__()
        self.stem = nn.Conv2d(3, stem, 3, padding=1)
        self.bn = nn.BatchNorm2d(stem)
        self.blocks = nn.Sequential(Block(stem, hidden, width, groups), Block(width, hidden, width, groups))
        self.fc = nn.Linear(width, 5)

    def forward(self, x):
        return self.fc(self.blocks(self.bn(self.stem(x))).mean((2, 3)))


def warmed(model):
    """Give the norms statistics that are not the identity."""
    model.double().train()
    for _ in range(3):
        model(torch.rand(4, 3, 8, 8, dtype=torch.float64))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return model.eval()


def by_hand(model, stem=8, hidden=8, width=16, groups=4):
    """Return the smaller network whose every tensor is the leading corner of the larger one's."""
    small = Network(stem, hidden, width, groups).double().eval()
    corners = {
        key: value[tuple(slice(side) for side in small.state_dict()[key].shape)]
        for key, value in model.state_dict().items()
    }
    small.load_state_dict(corners)
    return small


SCALES = {
    "stem": ({"stem": 4}, {"stem": 4}),
    "stream": ({"blocks.0.conv3": 12}, {"width": 12}),
    "stream by its shortcut": ({"blocks.0.shortcut": 12}, {"width": 12}),
    "stream by the second block": ({"blocks.1.conv3": 12}, {"width": 12}),
    "several": ({"stem": 6, "blocks.1.conv3": 9}, {"stem": 6, "width": 9}),
    "hidden": ({"blocks.0.conv1": 4, "blocks.1.conv1": 4}, {"hidden": 4, "groups": 2}),
    "hidden by the grouped": ({"blocks.0.conv2": 4, "blocks.1.conv2": 4}, {"hidden": 4, "groups": 2}),
    "both names of a group": ({"blocks.0.conv3": 12, "blocks.0.shortcut": 12}, {"width": 12}),
    "everything": (
        {"stem": 4, "blocks.0.conv1": 6, "blocks.1.conv2": 6, "blocks.0.conv3": 8},
        {"stem": 4, "hidden": 6, "groups": 3, "width": 8},
    ),
}


@pytest.mark.parametrize(("widths", "smaller"), SCALES.values(), ids=SCALES)
def test_a_scaled_network_is_the_smaller_one_built_by_hand(widths, smaller):
    model = warmed(Network())
    rewriter = Rewriter(rebuilt(model, 8), "toy")
    rewriter.scale(widths)
    network = rewriter.finish()
    expected = by_hand(model, **smaller)
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    assert torch.equal(network(x), expected(x))
    assert {key: value.shape for key, value in network.state_dict().items()} == {
        key: value.shape for key, value in expected.state_dict().items()
    }
    found, fresh = inspect(network), inspect(expected, 8)
    assert (found.macs, found.params, found.head) == (fresh.macs, fresh.params, fresh.head)
    assert [(b.channels, b.cardinality, b.macs, b.params) for b in found.blocks] == [
        (b.channels, b.cardinality, b.macs, b.params) for b in fresh.blocks
    ]
    assert model.stem.out_channels == 8


def test_a_scaled_network_trains_and_copies():
    rewriter = Rewriter(rebuilt(warmed(Network()), 8), "toy")
    rewriter.scale({"stem": 4, "blocks.0.conv3": 8})
    network = rewriter.finish().train()
    twin = copy.deepcopy(network)
    twin(torch.rand(2, 3, 8, 8, dtype=torch.float64)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in twin.parameters())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_coupled_convolutions_get_one_width():
    rewriter = Rewriter(rebuilt(Network(), 8), "toy")
    with pytest.raises(
        RewriteError, match=r"blocks.1.conv3: found 8 channels to keep, expected the same 12 as for what"
    ):
        rewriter.scale({"blocks.0.conv3": 12, "blocks.1.conv3": 8})


def test_widths_that_split_a_group_are_refused():
    rewriter = Rewriter(rebuilt(Network(), 8), "toy")
    with pytest.raises(RewriteError, match="a convolution with 4 groups of 2 channels can only lose whole groups"):
        rewriter.scale({"blocks.0.conv1": 3})


def test_a_path_that_is_no_layer_is_refused():
    rewriter = Rewriter(rebuilt(Network(), 8), "toy")
    with pytest.raises(RewriteError, match=r"blocks.0: expected a convolution or linear layer"):
        rewriter.scale({"blocks.0": 4})


def test_channels_may_be_named_one_by_one():
    model = warmed(Network())
    rewriter = Rewriter(rebuilt(model, 8), "toy")
    rewriter.scale({"blocks.0.conv3": [1, 4, 15]})
    network = rewriter.finish()
    assert torch.equal(network.get_submodule("fc").weight, model.fc.weight[:, [1, 4, 15]])
    assert torch.equal(network.get_submodule("blocks.0.shortcut").weight, model.blocks[0].shortcut.weight[[1, 4, 15]])


@pytest.mark.parametrize("width", [0, -1, 9])
def test_widths_outside_the_layers_own_are_refused(width):
    rewriter = Rewriter(rebuilt(Network(), 8), "toy")
    with pytest.raises(RewriteError, match=f"stem: expected 1 to 8 of its channels to keep, found {width}"):
        rewriter.scale({"stem": width})


def test_the_number_of_classes_is_pinned():
    rewriter = Rewriter(rebuilt(Network(), 8), "toy")
    with pytest.raises(RewriteError, match="these channels cannot be cut: it is the output of the module"):
        rewriter.scale({"fc": 3})


def test_a_refused_scale_changes_nothing():
    model = warmed(Network())
    rewriter = Rewriter(rebuilt(model, 8), "toy")
    with pytest.raises(RewriteError):
        rewriter.scale({"stem": 4, "fc": 3})
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    assert torch.equal(rewriter.finish()(x), model(x))


class Using(nn.Module):
    def __init__(self, use, **modules):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.other = nn.Conv2d(3, 4, 3, padding=1)
        for name, module in modules.items():
            self.add_module(name, module)
        self.use = use

    def forward(self, x):
        return self.use(self, self.conv(x), x)


PINNED = {
    "concatenation": (lambda m, y, x: torch.cat([y, m.other(x)], 1).mean((2, 3)), {}, "cat uses it"),
    "positions": (lambda m, y, x: m.fc(y.flatten(1)), {"fc": nn.Linear(4 * 64, 2)}, "flatten uses it"),
    "layer norm": (lambda m, y, x: m.norm(y), {"norm": nn.LayerNorm([4, 8, 8])}, r"norm \(LayerNorm\) uses it"),
    "group norm": (lambda m, y, x: m.norm(y), {"norm": nn.GroupNorm(2, 4)}, r"norm \(GroupNorm\) uses it"),
    "indexing": (lambda m, y, x: y[:, :2].mean((2, 3)), {}, "getitem uses it"),
    "softmax over channels": (lambda m, y, x: y.softmax(1).mean((2, 3)), {}, "softmax uses it"),
    "mean over channels": (lambda m, y, x: y.mean(1).flatten(1), {}, "mean uses it"),
    "channel shuffle": (
        lambda m, y, x: m.shuffle(y),
        {"shuffle": nn.PixelShuffle(2)},
        r"shuffle \(PixelShuffle\) uses it",
    ),
    "channel softmax module": (lambda m, y, x: m.soft(y), {"soft": nn.Softmax(1)}, r"soft \(Softmax\) uses it"),
    "parameter": (
        lambda m, y, x: (y * m.fc.weight.view(1, 4, 1, 1)).mean((2, 3)),
        {"fc": nn.Linear(4, 1)},
        "mul uses it",
    ),
}


@pytest.mark.parametrize(("use", "modules", "reason"), PINNED.values(), ids=PINNED)
def test_channels_that_cannot_be_cut_say_what_holds_them(use, modules, reason):
    rewriter = Rewriter(rebuilt(Using(use, **modules), 8), "toy")
    with pytest.raises(RewriteError, match=f"Using: these channels cannot be cut: {reason}"):
        rewriter.scale({"conv": 2})


def test_channels_are_coupled_by_additions_products_and_per_channel_layers():
    def use(model, y, x):
        return model.head(model.depth(model.norm(y + model.other(x) * y)).relu()).mean((2, 3))

    layers = {"norm": nn.BatchNorm2d(4), "depth": nn.Conv2d(4, 4, 3, groups=4), "head": nn.Conv2d(4, 2, 1)}
    channels = channel_map(rebuilt(Using(use, **layers), 8))
    spaces = {use.path: (use.reads, use.writes) for use in channels.uses}
    stream = channels.find(spaces["conv"][1])
    for path in ("other", "norm", "depth"):
        assert channels.find(spaces[path][1]) == stream
    assert channels.find(spaces["head"][0]) == stream
    assert channels.find(spaces["head"][1]) != stream


def test_a_multiplier_on_a_depthwise_convolution_is_a_grouped_one():
    def use(model, y, x):
        return model.head(model.depth(y)).mean((2, 3))

    model = Using(use, depth=nn.Conv2d(4, 8, 3, padding=1, groups=4), head=nn.Conv2d(8, 2, 1)).double()
    rewriter = Rewriter(rebuilt(model, 8), "toy")
    rewriter.scale({"conv": 2})
    network = rewriter.finish()
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    expected = model.depth(torch.cat([model.conv(x)[:, :2], torch.zeros(2, 2, 8, 8, dtype=torch.float64)], 1))
    expected = F.conv2d(expected[:, :4], model.head.weight[:, :4], model.head.bias).mean((2, 3))
    torch.testing.assert_close(network(x), expected, rtol=1e-10, atol=1e-12)
    assert network.depth.groups == 2
