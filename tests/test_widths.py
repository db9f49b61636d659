"""Widths of what mixes channels: a thinner network is the one built by hand, and what fixes a number says so."""

import pytest
import timm
import torch
from timm.layers import BlurPool2d, EvoNorm2dS0, FilterResponseNormTlu2d, GroupNormAct, LayerNorm2d
from torch import nn

import surgery
from surgery.channels import channel_map
from surgery.errors import RewriteError
from surgery.rewriter import Rewriter
from tests.stand_ins import rebuilt


class Using(nn.Module):
    """A convolution of `width` channels, something that uses them, and a convolution that reads the result."""

    def __init__(self, use, width, layers):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1)
        self.head = nn.Conv2d(width, 2, 1)
        for name, layer in layers(width).items():
            setattr(self, name, layer)
        self.use = use

    def forward(self, x):
        return self.head(self.use(self, self.conv(x))).mean((2, 3))


def pair(use, layers):
    """Return a network of 8 channels, and the one of 4 whose every tensor is the leading corner of the larger one's."""
    torch.manual_seed(0)
    model, small = (Using(use, width, layers).double().eval() for width in (8, 4))
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 1.5)
    whole = dict((*model.named_parameters(), *model.named_buffers()))
    for name, part in (*small.named_parameters(), *small.named_buffers()):
        part.data.copy_(whole[name].data[tuple(slice(side) for side in part.shape)])
    return model, small


def scaled(model, widths):
    rewriter = Rewriter(rebuilt(model, 8), "toy")
    rewriter.scale(widths, exact=False)
    return rewriter.finish()


def check(use, layers, widths=None):
    model, small = pair(use, layers)
    network = scaled(model, {"conv": 4, **(widths or {})})
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    assert torch.equal(network(x), small(x))
    found, expected = ({name: value.shape for name, value in m.state_dict().items()} for m in (network, small))
    assert found == expected


LAYERS = {
    "group norm": lambda width: nn.GroupNorm(width // 2, width),
    "group norm of one group": lambda width: nn.GroupNorm(1, width),
    "group norm without weights": lambda width: nn.GroupNorm(width // 2, width, affine=False),
    "group norm with activation": lambda width: GroupNormAct(width, width // 4),
    "layer norm of channels": LayerNorm2d,
    "EvoNorm": lambda width: EvoNorm2dS0(width, groups=width // 4),
    "filter response norm": FilterResponseNormTlu2d,
    "blurring pool": BlurPool2d,
    "rectifier with a slope for each": nn.PReLU,
    "softmax": lambda width: nn.Softmax(1),
}


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_layers_over_channels_follow_their_width(layer):
    check(lambda m, y: m.layer(y), lambda width: {"layer": layer(width)})


def by_context(m, y):
    y = nn.functional.avg_pool2d(y, (4, 2))  # as many positions as channels
    size = y.shape
    weights = m.where(y).reshape(size[0], 1, size[2] * size[3]).softmax(-1).unsqueeze(3)
    context = torch.matmul(y.reshape(size[0], size[1], size[2] * size[3]).unsqueeze(1), weights)
    return y + m.what(context.view(size[0], size[1], 1, 1))


def efficient_attention(m, y):
    weights = m.near(y.mean((2, 3)).view(y.shape[0], 1, -1)).sigmoid()
    return y * weights.view(y.shape[0], -1, 1, 1).expand_as(y)


def stacked(m, y):
    return torch.stack([y, m.other(y)], 1).sum(1)


FUNCTIONS = {
    "efficient channel attention": (
        lambda m, y: (
            y * m.near(y.mean((2, 3)).view(y.shape[0], 1, -1)).sigmoid().view(y.shape[0], -1, 1, 1).expand_as(y)
        ),
        lambda width: {"near": nn.Conv1d(1, 1, 3, padding=1)},
        {},
    ),
    "global context": (
        by_context,
        lambda width: {"where": nn.Conv2d(width, 1, 1), "what": nn.Conv2d(width, width, 1)},
        {},
    ),
    "channels in the last place": (
        lambda m, y: y + m.scale * m.two(m.one(m.norm(y.permute(0, 2, 3, 1))).relu()).permute(0, 3, 1, 2),
        lambda width: {
            "norm": nn.LayerNorm(width),
            "one": nn.Linear(width, 2 * width),
            "two": nn.Linear(2 * width, width),
            "scale": nn.Parameter(torch.ones(width, 1, 1)),
        },
        {"one": 8},
    ),
    "sum over the channels": (lambda m, y: y * y.mean(1, keepdim=True).sigmoid(), lambda width: {}, {}),
    "softmax over the channels": (lambda m, y: y.softmax(1), lambda width: {}, {}),
    "stacked": (stacked, lambda width: {"other": nn.Conv2d(width, width, 1)}, {}),
    "a parameter that is read twice": (
        lambda m, y: m.other(y * m.scale) * m.scale,
        lambda width: {"scale": nn.Parameter(torch.ones(1, width, 1, 1)), "other": nn.Conv2d(width, width, 1)},
        {},
    ),
    "a table of positions": (
        lambda m, y: (y.flatten(2).transpose(1, 2) + m.table).transpose(1, 2).unflatten(2, (8, 8)),
        lambda width: {"table": nn.Parameter(torch.ones(64, width))},
        {},
    ),
}


@pytest.mark.parametrize(("use", "layers", "widths"), FUNCTIONS.values(), ids=FUNCTIONS)
def test_operations_that_take_their_sizes_from_what_they_read_follow_them(use, layers, widths):
    check(use, layers, widths)


def test_channels_that_are_folded_into_one_change_together():
    """A selective kernel: two paths of 8 channels and their 16 weights, which have to stay twice as many."""

    def layers(width):
        return {"one": nn.Conv2d(width, 8, 1), "two": nn.Conv2d(width, 8, 1), "choose": nn.Conv2d(8, 16, 1)}

    def use(m, y):
        both = torch.stack([m.one(y), m.two(y)], 1)
        weights = m.choose(both.sum(1).mean((2, 3), keepdim=True))
        size = weights.shape
        return (both * weights.view(size[0], 2, size[1] // 2, 1, 1).softmax(1)).sum(1)

    network = scaled(Using(use, 8, layers).double(), {"one": 5})
    assert [network.get_submodule(name).out_channels for name in ("one", "two", "choose")] == [5, 5, 10]
    assert network.head.in_channels == network.choose.in_channels == 5
    assert network(torch.rand(2, 3, 8, 8, dtype=torch.float64)).shape == (2, 2)


def attention(m, y):
    size = y.shape
    values = m.values(y.flatten(2).transpose(1, 2)).reshape(size[0], -1, 2, 4).transpose(1, 2).transpose(1, 2)
    return y + values.reshape(size[0], size[2] * size[3], size[1]).transpose(1, 2).reshape(size)


PINNED = {
    "a view with the number": (lambda m, y: y.view(-1, 8, 64).mean(2)[:, :, None, None], {}, "view fixes"),
    "a split": (lambda m, y: torch.cat(y.split(4, 1)[::-1], 1), {}, "split fixes"),
    "a slice": (lambda m, y: torch.cat([y[:, 4:], y[:, :4]], 1), {}, "getitem fixes"),
    "a dense layer": (lambda m, y: m.up(y), {"up": nn.ConvTranspose2d(8, 8, 1)}, r"up \(ConvTranspose2d\) fixes"),
    "fixed heads": (attention, {"values": nn.Linear(8, 8)}, "reshape_1 fixes"),
    "a mixture of positions": (
        lambda m, y: m.tokens(y.flatten(2)).unflatten(2, (8, 8)),
        {"tokens": nn.Linear(64, 64)},
        "tokens fixes",
    ),
    "an embedding of positions": (lambda m, y: y + m.scale, {"scale": nn.Parameter(torch.ones(8, 1, 8))}, "add fixes"),
}


@pytest.mark.parametrize(("use", "layers", "reason"), PINNED.values(), ids=PINNED)
def test_what_fixes_the_number_of_channels_says_so(use, layers, reason):
    with pytest.raises(RewriteError, match=f"Using: these channels cannot be cut: {reason} how many there are"):
        scaled(Using(use, 8, lambda width: layers), {"conv": 4})


GROUPS = [
    (64, 32, 44, 22),  # groups of two
    (64, 32, 45, 15),  # 45 is odd: of 1, 3, 5, 9, 15 and 45 groups, 15 are most but not more than 32
    (64, 64, 45, 45),  # each channel by itself
    (64, 1, 45, 1),  # all together
    (8, 4, 3, 3),  # the widths allow for 1 or 3
]


@pytest.mark.parametrize(("width", "groups", "new", "expected"), GROUPS)
def test_groups_keep_their_size_or_become_as_many_as_divide_the_width(width, groups, new, expected):
    model = Using(lambda m, y: m.norm(y), width, lambda width: {"norm": nn.GroupNorm(groups, width)})
    norm = scaled(model, {"conv": new}).norm
    assert (norm.num_groups, norm.num_channels, norm.weight.shape) == (expected, new, (new,))


def test_named_channels_are_those_that_are_kept():
    def layers(width):
        return {"norm": nn.GroupNorm(4, width), "scale": nn.Parameter(torch.rand(width, 1, 1))}

    model = Using(lambda m, y: m.norm(y) * m.scale, 8, layers)
    nn.init.uniform_(model.norm.weight)
    model.norm.bias.requires_grad_(requires_grad=False)
    network = scaled(model, {"conv": [1, 2, 6, 7]})
    assert torch.equal(network.norm.weight, model.norm.weight[[1, 2, 6, 7]])
    assert torch.equal(network.scale, model.scale[[1, 2, 6, 7]])
    assert isinstance(network.scale, nn.Parameter)
    assert [weight.requires_grad for weight in network.norm.parameters()] == [True, False]
    assert model.scale.shape == (8, 1, 1)


def test_by_default_what_mixes_channels_holds_them():
    model = Using(lambda m, y: m.norm(y), 8, lambda width: {"norm": nn.GroupNorm(4, width)})
    with pytest.raises(RewriteError, match=r"norm \(GroupNorm\) uses it in a way that cannot be cut"):
        Rewriter(rebuilt(model, 8), "toy").scale({"conv": 4})


NETWORKS = ("resnet18", "ecaresnet26t", "gcresnext26ts", "skresnext50_32x4d", "resnetv2_50d_evos", "resnet50_gn")


@pytest.mark.parametrize("name", NETWORKS)
def test_every_width_of_a_network_can_change_but_those_at_its_ends(name):
    network = rebuilt(timm.create_model(name), 64)
    channels = channel_map(network, exact=False)
    written = {use.writes for use in channels.uses if use.writes is not None}
    assert all(pin.boundary for space in written for pin in channels.pins_of(space))


def test_a_network_of_layers_in_the_last_place_halves():
    """Half as wide, ConvNeXt-T has a quarter of its linear weights; the rest is linear in the widths."""
    torchvision = pytest.importorskip("torchvision")
    source = torchvision.models.convnext_tiny(num_classes=10).eval()
    network = rebuilt(source, 32)
    channels = channel_map(network, exact=False)
    free = {
        channels.find(use.writes): use.path
        for use in channels.uses
        if use.writes is not None and use.reads is not None and not channels.pins_of(use.writes)
    }
    rewriter = Rewriter(network, "toy")
    rewriter.scale({path: channels.sizes[space] // 2 for space, path in free.items()}, exact=False)
    network = rewriter.finish().eval()
    assert network(torch.rand(1, 3, 32, 32)).shape == (1, 10)
    pairs = zip(network.named_parameters(), source.parameters(), strict=True)
    assert [name for (name, new), old in pairs if new.numel() == old.numel()] == ["classifier.2.bias"]
    assert surgery.cost(network).params < 0.27 * sum(weight.numel() for weight in source.parameters())
