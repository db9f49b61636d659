"""Packed convolutions against the plain operators: same values, and where they keep out of the way."""

import copy
import io
import itertools

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from surgery_divided import packed as module
from surgery_divided.folding import folded, layers_of
from surgery_divided.packed import PackedConv2d, packed

CONVS = {
    "plain": lambda: nn.Conv2d(4, 6, 3, padding=1),
    "no bias": lambda: nn.Conv2d(4, 6, 3, padding=1, bias=False),
    "strided": lambda: nn.Conv2d(4, 6, (3, 5), stride=(2, 1), padding=(1, 2)),
    "dilated": lambda: nn.Conv2d(4, 6, 3, dilation=2),
    "grouped": lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1, bias=False),
    "depthwise": lambda: nn.Conv2d(4, 4, 3, groups=4, padding=1),
    "1x1": lambda: nn.Conv2d(4, 6, 1, stride=2, bias=False),
    "one channel": lambda: nn.Conv2d(1, 1, 3),
}
THEN = list(itertools.product((False, True), repeat=2))  # adds, rectifies
operators = pytest.mark.skipif(module._OPERATORS is None, reason="this torch has no packed convolutions")


@pytest.fixture
def plain_runs(monkeypatch):
    """Return a list that grows with every plain run of a packed convolution."""
    runs, plain = [], PackedConv2d._plain
    monkeypatch.setattr(PackedConv2d, "_plain", lambda *args: runs.append(args) or plain(*args))
    return runs


def conv_of(name, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CONVS[name]().requires_grad_(requires_grad=False)


def values(conv, batch=2, height=9, width=8, seed=0):
    """Return what a convolution reads, and what may be added to its result."""
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(batch, conv.in_channels, height, width, generator=generator)
    return value, torch.randn(conv(value).shape, generator=generator)


def literally(conv, value, other, rectifies):
    """Return in float64 what is meant."""
    bias = None if conv.bias is None else conv.bias.double()
    result = F.conv2d(value.double(), conv.weight.double(), bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    result = result if other is None else result + other.double()
    return result.clamp(min=0) if rectifies else result


def assert_close(found, expected):
    """Compare float32 with float64: sums of up to 60 products, each rounded to 6e-8, in an order of oneDNN's choice."""
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


@operators
@pytest.mark.parametrize(("adds", "rectifies"), THEN)
@pytest.mark.parametrize("name", CONVS)
def test_packed_equals_the_plain_operators_for_any_batch_size_and_layout(name, adds, rectifies, plain_runs):
    conv = conv_of(name)
    for overwrites in {False, adds}:
        layer = PackedConv2d(conv, adds=adds, overwrites=overwrites, rectifies=rectifies)
        for sizes in ((2, 9, 8), (5, 17, 12), (1, 6, 7)):
            value, other = values(conv, *sizes)
            expected = literally(conv, value, other if adds else None, rectifies)
            rows = value.transpose(2, 3).contiguous().transpose(2, 3)
            for laid_out in (value, value.contiguous(memory_format=torch.channels_last), rows):
                added = other.clone()
                assert_close(layer(laid_out, added) if adds else layer(laid_out), expected)
                assert overwrites or torch.equal(added, other)
    assert not plain_runs


@pytest.mark.parametrize(("adds", "rectifies"), THEN)
@pytest.mark.parametrize("name", CONVS)
def test_float64_is_plain(name, adds, rectifies):
    conv = conv_of(name).double()
    layer = PackedConv2d(conv, adds=adds, overwrites=adds, rectifies=rectifies)
    value, other = (tensor.double() for tensor in values(conv_of(name)))
    found = layer(value, other) if adds else layer(value)
    torch.testing.assert_close(
        found, literally(conv, value, other if adds else None, rectifies), rtol=1e-10, atol=1e-12
    )


@operators
def test_a_value_may_be_overwritten_where_that_is_allowed():
    conv = conv_of("plain")
    value, other = values(conv)
    other = other.contiguous(memory_format=torch.channels_last)
    expected = literally(conv, value, other, rectifies=False)
    found = PackedConv2d(conv, adds=True, overwrites=True)(value, other)
    assert found.data_ptr() == other.data_ptr()
    assert_close(found, expected)


def test_an_addition_that_broadcasts_is_plain(plain_runs):
    conv = conv_of("plain")
    layer = PackedConv2d(conv, adds=True, overwrites=True, rectifies=True)
    value, other = values(conv)
    for part in (other[:1], other[:, :, :1, :1], other[0, 0], other.half()):
        before = part.clone()
        assert_close(layer(value, part), literally(conv, value, before, rectifies=True))
        assert torch.equal(part, before)
    assert len(plain_runs) == 4


@operators
def test_what_is_packed_is_neither_copied_nor_saved():
    conv = conv_of("grouped")
    layer = PackedConv2d(conv, rectifies=True)
    value, _ = values(conv)
    expected = layer(value)
    assert layer._packed is not None
    for twin in (copy.deepcopy(layer), copy.copy(layer), reloaded(layer)):
        assert twin._packed is None
        assert torch.equal(twin(value), expected)
    assert set(layer.state_dict()) == {"weight"}


def reloaded(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@operators
def test_a_weight_that_changed_is_packed_anew(plain_runs):
    conv = conv_of("plain")
    layer = PackedConv2d(conv)
    value, _ = values(conv)
    layer(value)
    layer.double().float()
    assert layer._packed is None
    for change in (
        lambda: layer.load_state_dict(conv_of("plain", seed=1).state_dict()),
        lambda: layer.weight.mul_(2),
        lambda: setattr(layer, "weight", conv_of("plain", seed=2).weight),
        lambda: layer.to(memory_format=torch.channels_last),
    ):
        layer(value)
        change()
        expected = F.conv2d(value.double(), layer.weight.double(), layer.bias.double(), padding=1)
        assert_close(layer(value), expected)
    assert not plain_runs


def test_packing_in_inference_mode_is_of_use_outside_of_it():
    conv = conv_of("plain")
    layer = PackedConv2d(conv)
    value, _ = values(conv)
    with torch.inference_mode():
        layer(value)
        twin = copy.deepcopy(layer)
        twin(value.clone())
    expected = literally(conv, value, None, rectifies=False)
    assert_close(layer(value), expected)
    assert_close(twin(value), expected)


def test_gradients_of_both_modes_reach_the_image():
    """The convolution is linear: its tangent along v is its value at v without bias, and sum's gradient its adjoint."""
    conv = conv_of("no bias")
    layer = PackedConv2d(conv)
    value, other = values(conv)
    layer(value)
    tangent = torch.func.jvp(layer, (torch.zeros_like(value),), (value,))[1]
    assert_close(tangent, literally(conv, value, None, rectifies=False))
    leaf = value.clone().requires_grad_()
    (layer(leaf) * other).sum().backward()
    expected = F.conv_transpose2d(other.double(), conv.weight.double(), padding=1)
    assert_close(leaf.grad, expected)


def test_what_follows_operators_sees_a_plain_convolution(plain_runs):
    """2 images of 9 x 8, 6 x 4 x 9 weights: 2 * 72 * 216 multiply-adds, two operations each."""
    conv = conv_of("plain")
    layer = PackedConv2d(conv, adds=True, overwrites=True, rectifies=True)
    value, other = values(conv)
    expected = literally(conv, value, other, rectifies=True)
    assert_close(layer(value, other.clone()), expected)
    del plain_runs[:]
    with FlopCounterMode(display=False) as counter:
        layer(value, other)
    assert counter.get_total_flops() == 2 * 2 * 72 * 216
    assert_close(torch.compile(layer, backend="eager")(value, other), expected)
    assert_close(torch.export.export(layer, (value, other)).module()(value, other), expected)
    assert_close(torch.jit.trace(layer, (value, other))(value, other), expected)
    stacked = torch.vmap(layer)(torch.stack([value, value]), torch.stack([other, other]))
    assert_close(stacked[1], expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert F.conv2d(value, conv.weight).dtype == PackedConv2d(conv)(value).dtype == torch.bfloat16
    assert len(plain_runs) >= 5


def refuse(*args):
    raise RuntimeError("not here")


@pytest.mark.parametrize("found", [None, module._Operators(refuse, refuse, refuse)])
def test_a_torch_without_the_operators_or_one_that_refuses_is_plain(found, monkeypatch):
    monkeypatch.setattr(module, "_OPERATORS", found)
    conv = conv_of("strided")
    value, other = values(conv)
    layer = PackedConv2d(conv, adds=True, overwrites=True, rectifies=True)
    assert torch.equal(layer(value, other), torch.relu(conv(value) + other))
    assert module.can_pack(value) == (found is not None)


def test_operators_that_are_missing_are_not_found(monkeypatch):
    monkeypatch.delattr(torch._C._nn, "mkldnn_reorder_conv2d_weight", raising=False)
    assert module._found() is None


class Blocks(nn.Module):
    """What can be packed whole, and what comes near it."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(9))
        self.around = nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular")
        self.same = nn.Conv2d(8, 8, 3, padding="same")
        self.act, self.act6 = nn.ReLU(inplace=True), nn.ReLU6()

    def forward(self, x):
        x = self.act(self.norm(self.stem(x)))
        x = self.act(self.convs[1](self.act(self.convs[0](x))) + x)  # a residual block, x is over
        x = torch.relu(x + self.convs[2](x))  # x is added to what is made of it
        y = self.convs[3](x)  # read twice
        x = F.relu(y + self.convs[4](y) + x)  # the second addition is of no convolution
        x = self.act6(self.convs[5](x)) + self.convs[6](x).mean((2, 3), keepdim=True)
        y = self.convs[7](x)
        z = F.relu(x, inplace=True)  # after y was made of x, before it is added
        x = self.convs[8](z) + self.convs[8](z)
        return self.same(self.around(x + y)) + z


def small_network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Blocks().eval()
        image = torch.randn(3, 3, 8, 8)
        return fx.symbolic_trace(network), image


def test_a_packed_network_computes_the_same():
    network, image = small_network()
    with torch.no_grad():
        expected = copy.deepcopy(network).double()(image.double())
        flat = folded(network, image)
        small = packed(flat)
        for batch in (slice(None), slice(0, 1), slice(None)):
            found = small(image[batch])
            torch.testing.assert_close(found.double(), expected[batch], rtol=1e-5, atol=1e-5)
        assert torch.equal(small.double()(image.double()), flat.double()(image.double()))


def test_convolutions_take_in_what_nothing_else_reads():
    """Those with other paddings stay; convs.8 is called twice, the second time as convs_9, and added to the first."""
    network, image = small_network()
    small = packed(folded(network, image))
    found = {
        name.removesuffix("_packed"): (layer.adds, layer.overwrites, layer.rectifies)
        for name, layer in layers_of(small).items()
        if isinstance(layer, PackedConv2d)
    }
    assert found == {
        "stem": (False, False, True),
        "convs_0": (False, False, True),
        "convs_1": (True, True, True),
        "convs_2": (True, False, True),
        "convs_3": (False, False, False),
        "convs_4": (True, False, False),
        "convs_5": (False, False, False),
        "convs_6": (False, False, False),
        "convs_7": (False, False, False),
        "convs_8": (False, False, False),
        "convs_9": (True, True, False),
    }


def test_the_network_that_is_packed_stays_as_it_is():
    network, image = small_network()
    flat = folded(network, image)
    before, code = {name: id(layer) for name, layer in layers_of(flat).items()}, flat.code
    small = packed(flat)
    assert {name: id(layer) for name, layer in layers_of(flat).items()} == before
    assert str(fx.GraphModule(flat, flat.graph).code) == code
    assert {tensor.data_ptr() for tensor in small.parameters()} == {tensor.data_ptr() for tensor in flat.parameters()}


def test_a_layer_with_a_hook_is_not_taken_in():
    network, image = small_network()
    network.get_submodule("convs.0").register_forward_hook(lambda layer, args, result: result * 2)
    network.get_submodule("act").register_forward_hook(lambda layer, args, result: result + 1)
    with torch.no_grad():
        expected = copy.deepcopy(network).double()(image.double())
        small = packed(folded(network, image))
        torch.testing.assert_close(small(image).double(), expected, rtol=1e-5, atol=1e-5)
    layers = layers_of(small).values()
    assert not any(layer.rectifies for layer in layers if isinstance(layer, PackedConv2d) and not layer.adds)
