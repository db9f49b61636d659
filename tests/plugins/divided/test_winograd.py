"""Winograd's convolutions against the plain operators: same values, chosen where faster, out of the way elsewhere."""

import copy
import io
import itertools

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from surgery_divided import winograd as module
from surgery_divided.choice import Chooser
from surgery_divided.folding import SHAPE, folded, layers_of
from surgery_divided.packed import PackedConv2d, packed
from surgery_divided.winograd import WinogradConv2d, can_transform, transformed

SIZES = ((2, 8, 12), (1, 4, 4), (5, 16, 4), (3, 32, 20))  # batch, height, width
THEN = list(itertools.product((False, True), repeat=3))  # adds, overwrites, rectifies


@pytest.fixture
def packed_runs(monkeypatch):
    """Return a list that grows with every run of a packed convolution."""
    runs, forward = [], PackedConv2d.forward
    monkeypatch.setattr(PackedConv2d, "forward", lambda *args: runs.append(args) or forward(*args))
    return runs


def conv_of(channels=5, filters=7, dtype=torch.float64, bias=True, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        conv = nn.Conv2d(channels, filters, 3, padding=1, bias=bias)
    return conv.to(dtype).requires_grad_(requires_grad=False)


def values(conv, sizes=SIZES[0]):
    """Return what a convolution reads, and what may be added to its result."""
    generator = torch.Generator().manual_seed(0)
    batch, *size = sizes
    return tuple(
        torch.randn(batch, channels, *size, dtype=torch.float64, generator=generator).to(conv.weight.dtype)
        for channels in (conv.in_channels, conv.out_channels)
    )


def layer_of(conv, **options):
    return WinogradConv2d(PackedConv2d(conv, **options))


def literally(conv, value, other=None, rectifies=False):
    """Return in float64 what is meant."""
    bias = None if conv.bias is None else conv.bias.double()
    result = F.conv2d(value.double(), conv.weight.double(), bias, padding=1)
    result = result if other is None else result + other.double()
    return result.clamp(min=0) if rectifies else result


def assert_close(found, expected):
    """Compare up to 1e-12 of the largest result in float64, and 1e-5 in float32."""
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}[found.dtype]
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance * float(expected.abs().max()))


def test_a_tile_by_hand():
    """One channel of ones, 4 x 4, weights of one: each result counts its neighbours, 4 at corners, 6 at edges, 9."""
    conv = conv_of(1, 1, bias=False)
    conv.weight.fill_(1)
    counts = [[4, 6, 6, 4], [6, 9, 9, 6], [6, 9, 9, 6], [4, 6, 6, 4]]
    found = layer_of(conv)(torch.ones(1, 1, 4, 4, dtype=torch.float64))
    assert_close(found, torch.tensor([[counts]], dtype=torch.float64))


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(("adds", "overwrites", "rectifies"), THEN)
def test_winograd_equals_the_plain_operators(sizes, adds, overwrites, rectifies, packed_runs):
    for conv, tiles in itertools.product((conv_of(), conv_of(4, 3, bias=False), conv_of(9, 2)), (1, 7, 128)):
        layer = layer_of(conv, adds=adds, overwrites=adds and overwrites, rectifies=rectifies)
        value, other = values(conv, sizes)
        expected = literally(conv, value, other if adds else None, rectifies)
        rows = value.transpose(2, 3).contiguous().transpose(2, 3)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "_TILES_AT_ONCE", tiles)
            for laid_out in (value, value.contiguous(memory_format=torch.channels_last), rows):
                before, added = laid_out.clone(), other.clone()
                found = layer(laid_out, added) if adds else layer(laid_out)
                assert_close(found, expected)
                assert found.is_contiguous(memory_format=torch.channels_last)
                assert torch.equal(laid_out, before)
                assert overwrites or torch.equal(added, other)
    assert not packed_runs


def test_float32_is_close(packed_runs):
    conv = conv_of(64, 48, torch.float32)
    value, other = values(conv)
    expected = literally(conv, value, other, rectifies=True)
    assert_close(layer_of(conv, adds=True, overwrites=True, rectifies=True)(value, other), expected)
    assert not packed_runs


def test_a_value_may_be_overwritten_where_that_is_allowed():
    conv = conv_of()
    value, other = values(conv)
    other = other.contiguous(memory_format=torch.channels_last)
    expected = literally(conv, value, other)
    assert layer_of(conv, adds=True)(value, other).data_ptr() != other.data_ptr()
    found = layer_of(conv, adds=True, overwrites=True)(value, other)
    assert found.data_ptr() == other.data_ptr()
    assert_close(found, expected)


def test_what_is_no_number_stays_none():
    conv = conv_of()
    value, _ = values(conv)
    value[1, 0, 3, 3] = torch.nan
    found = layer_of(conv, rectifies=True)(value)
    assert found[1, :, 2:5, 2:5].isnan().all()
    assert not found[0].isnan().any()


@pytest.mark.parametrize("size", [(7, 8), (8, 6), (1, 1), (2, 4)])
def test_other_sizes_are_packed(size, packed_runs):
    conv = conv_of()
    value, _ = values(conv, (2, *size))
    assert_close(layer_of(conv)(value), literally(conv, value))
    assert len(packed_runs) == 1


def test_what_does_not_apply_is_packed(packed_runs):
    """One image without a batch, none at all, an addition that broadcasts, another type, wrong channels."""
    conv = conv_of()
    layer = layer_of(conv, adds=True, overwrites=True)
    value, other = values(conv)
    assert_close(layer_of(conv)(value[0]), literally(conv, value[0]))
    assert layer(value[:0], other[:0]).shape == (0, 7, 8, 12)
    for part in (other[:1], other[:, :, :1, :1], other[0, 0], other.float()):
        assert_close(layer(value, part), literally(conv, value, part.clone()))
    half = layer_of(conv_of(dtype=torch.bfloat16))(value.bfloat16())
    assert half.dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="channels"):
        layer(value[:, :2], other)
    assert len(packed_runs) == 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_follows_operators_sees_a_plain_convolution(dtype):
    """2 images of 8 x 12, 7 x 5 x 9 weights: 2 * 96 * 315 multiply-adds, two operations each."""
    conv = conv_of(dtype=dtype)
    layer = layer_of(conv, adds=True, overwrites=True, rectifies=True)
    value, other = values(conv)
    expected = literally(conv, value, other, rectifies=True)
    with FlopCounterMode(display=False) as counter:
        assert_close(layer(value, other.clone()), expected)
    assert counter.get_total_flops() == 2 * 2 * 96 * 315
    exported = torch.export.export(layer, (value, other))
    assert any("conv2d" in str(node.target) for node in exported.graph.nodes)
    for other_form in (
        torch.compile(layer, backend="eager"),
        exported.module(),
        torch.jit.trace(layer, (value, other)),
    ):
        assert_close(other_form(value, other), expected)
    stacked = torch.vmap(layer)(torch.stack([value, value]), torch.stack([other, other]))
    assert_close(stacked, torch.stack([expected, expected]))


def test_gradients_of_both_modes_reach_the_image(packed_runs):
    """The convolution is linear: its tangent along v is its value at v without bias, and sum's gradient its adjoint."""
    conv = conv_of(bias=False)
    layer = layer_of(conv)
    value, other = values(conv)
    assert_close(torch.func.jvp(layer, (torch.zeros_like(value),), (value,))[1], literally(conv, value))
    leaf = value.clone().requires_grad_()
    (layer(leaf) * other).sum().backward()
    assert_close(leaf.grad, F.conv_transpose2d(other, conv.weight, padding=1))
    assert len(packed_runs) == 2
    with torch.no_grad():
        assert_close(layer(leaf), literally(conv, value))
    assert len(packed_runs) == 2


def test_gradients_reach_weight_and_bias():
    conv = conv_of().requires_grad_(requires_grad=True)
    value, _ = values(conv)
    layer_of(conv)(value).sum().backward()
    torch.testing.assert_close(conv.bias.grad, torch.full((7,), 192.0, dtype=torch.float64), rtol=1e-12, atol=0)
    assert conv.weight.grad is not None
    conv.weight.requires_grad_(requires_grad=False)
    assert layer_of(conv)(value).requires_grad


def test_a_transformed_weight_is_neither_copied_nor_saved_nor_moved():
    conv = conv_of()
    layer = layer_of(conv, rectifies=True)
    value, _ = values(conv)
    expected = layer(value)
    assert layer._transformed is not None
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for twin in (copy.deepcopy(layer), copy.copy(layer), torch.load(file, weights_only=False)):
        assert twin._transformed is None
        assert torch.equal(twin(value), expected)
    assert set(layer.state_dict()) == {"packed.weight", "packed.bias"}
    assert layer.packed.weight.data_ptr() == conv.weight.data_ptr()
    layer.float().double()
    assert layer._transformed is None


def test_the_memory_of_a_packed_weight_is_not_kept():
    conv = PackedConv2d(conv_of(dtype=torch.float32))
    conv(torch.ones(1, 5, 4, 4))
    assert WinogradConv2d(conv).packed._packed is None


def test_a_weight_is_transformed_once_and_anew_where_it_changed():
    conv = conv_of()
    layer = layer_of(conv)
    value, _ = values(conv)
    layer(value)
    first = layer._transformed
    layer(value)
    assert layer._transformed is first
    conv.weight.mul_(2)
    assert_close(layer(value), literally(conv, value))
    layer.load_state_dict({f"packed.{name}": tensor for name, tensor in conv_of(seed=1).state_dict().items()})
    assert_close(layer(value), literally(conv_of(seed=1), value))


def test_transforming_in_inference_mode_is_of_use_outside_of_it():
    conv = conv_of()
    layer = layer_of(conv, adds=True, overwrites=True, rectifies=True)
    value, other = values(conv)
    expected = literally(conv, value, other, rectifies=True)
    with torch.inference_mode():
        made = other.clone(memory_format=torch.channels_last)
        layer(value, other.clone())
    assert_close(layer(value, made), expected)
    assert torch.equal(made, other)
    with torch.inference_mode():
        assert layer(value, made).data_ptr() == made.data_ptr()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"padding": 1}, True),
        ({"padding": 0}, False),
        ({"padding": 1, "stride": 2}, False),
        ({"padding": 2, "dilation": 2}, False),
        ({"padding": 1, "dilation": 2}, False),
        ({"padding": 1, "groups": 2}, False),
        ({"padding": 1, "kernel_size": 5}, False),
        ({"padding": 1, "kernel_size": (3, 1)}, False),
    ],
)
def test_only_3x3_convolutions_that_keep_the_size_are_transformed(options, expected):
    conv = nn.Conv2d(4, 4, **{"kernel_size": 3, **options})
    assert can_transform(PackedConv2d(conv)) == expected


class Several(nn.Module):
    """Convolutions of 16 channels at 8 x 8, 16 and 24 at 4 x 4, and what cannot be transformed or is not worth it."""

    def __init__(self):
        super().__init__()
        self.stem, self.wide, self.same = (nn.Conv2d(i, 16, 3, padding=1) for i in (3, 16, 16))
        self.strided, self.small = nn.Conv2d(16, 16, 3, stride=2, padding=1), nn.Conv2d(16, 24, 3, padding=1)
        self.thin, self.odd = nn.Conv2d(24, 8, 3, padding=1), nn.Conv2d(24, 16, 3, padding=1)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = x + self.same(self.wide(x))
        x = self.small(self.strided(x))
        return self.thin(x).mean((1, 2, 3)) + self.odd(x[:, :, :3, :3]).mean((1, 2, 3))


def packed_members():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        networks = [fx.symbolic_trace(Several().double()) for _ in range(2)]
        image = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    return [packed(folded(network, image)) for network in networks], networks, image


def test_every_layer_is_what_was_faster_there_in_all_networks():
    """The clock lets Winograd win at 8 x 8 with nothing to add, and asks once for the same layer of both networks."""
    asked = []

    def clock(runs, device):
        shape = runs["packed"]().shape
        assert runs["winograd"]().shape == shape
        asked.append(shape)
        fast = "winograd" if shape[-1] == 8 and len(asked) == 1 else "packed"
        return {name: 1.0 if name == fast else 2.0 for name in runs}

    small, networks, image = packed_members()
    chooser = Chooser(clock, torch.channels_last)
    fast = [transformed(network, chooser) for network in small]
    assert [tuple(shape) for shape in asked] == [(3, 16, 8, 8), (3, 16, 8, 8), (3, 24, 4, 4)]
    assert [(layer.path, layer.shape, layer.chosen) for layer in chooser.layers] == [
        ("wide", (3, 16, 8, 8), "winograd"),
        ("same", (3, 16, 8, 8), "packed"),
        ("small", (3, 16, 4, 4), "packed"),
    ]
    for network, before, original in zip(fast, small, networks, strict=True):
        found = [name for name, layer in layers_of(network).items() if isinstance(layer, WinogradConv2d)]
        assert found == ["wide_packed"]
        assert not any(isinstance(layer, WinogradConv2d) for layer in layers_of(before).values())
        with torch.no_grad():
            torch.testing.assert_close(network(image), original(image), rtol=1e-12, atol=1e-12)
        assert all(SHAPE in node.meta for node in network.graph.nodes if node.op == "call_module")
