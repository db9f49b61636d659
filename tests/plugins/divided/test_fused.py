"""Fused networks against their members: same logits, choices that measurements make, and what is refused."""

import copy
import itertools
import operator
import re

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from surgery.conversion import prepare
from surgery.errors import InvalidOption, UnsupportedModel
from surgery.rewriter import Rewriter
from surgery.testing import plain_chain, tiny_networks
from surgery.testing.networks import unsettle
from surgery_divided.choice import Layer, medians
from surgery_divided.ensemble import Ensemble, Manner, SplitViews, combine, members
from surgery_divided.fused import Fused, fuse
from surgery_divided.joined import AllViews, FirstConv
from surgery_divided.packed import PackedConv2d, can_pack
from surgery_divided.winograd import WinogradConv2d

WAYS = [f"{form}, {layout}" for form in ("apart", "joined") for layout in ("contiguous", "channels_last")]
PACKED, WINOGRAD = "apart, packed", "apart, winograd"
packs = pytest.mark.skipif(not can_pack(torch.ones(1)), reason="this torch has no packed convolutions")
MANNERS = ("mean_logits", "max_logits", "mean_probabilities", "max_probabilities")


class Measured:
    """A clock that lets the runs of some names win, and remembers what it was asked."""

    def __init__(self, *fast):
        self.fast, self.asked = fast, []

    def __call__(self, runs, device):
        self.asked.append(tuple(runs))
        return {name: 1.0 if name in self.fast else 2.0 for name in runs}


class Functional(nn.Module):
    """Functions instead of modules, activations that overwrite what is read again, a convolution that is read twice."""

    def __init__(self, norm):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 8, 3, padding=1), norm(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, padding=1), norm(8)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 8))
        self.fc = nn.Linear(8, 10)

    def forward(self, x):
        x = self.norm1(self.conv1((x - 0.5) * 2))
        y = F.relu(x, inplace=True)
        z = self.conv2(y)
        w = x + self.norm2(z)
        y = F.relu(z, inplace=True) * self.scale.reshape(1, -1, 1, 1)
        z = F.max_pool2d(torch.relu(w + z - x + y), 2)
        z = z * z.shape[2]
        return self.fc(torch.flatten(z.mean((2, 3), keepdim=True), 1))


class SpatialAttention(nn.Module):
    """Channels that meet: in means over them, in a product with one channel, and where those of two pools stand."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, 2, padding=1), nn.Conv2d(8, 8, 3, groups=2, padding=1)
        self.pool = timm.layers.SelectAdaptivePool2d(pool_type="catavgmax", flatten=True)
        self.fc = nn.Linear(16, 10)

    def forward(self, x):
        x = self.conv1(x)
        y = self.conv2(F.pad(x, (0, 0, 0, 0, 2, -2)))
        y = y * torch.sigmoid(y.mean(1, keepdim=True) - torch.sum(y, dim=(1, 2), keepdim=True))
        return self.fc(self.pool(x + y).softmax(1))


NETWORKS = {
    "spatial attention": SpatialAttention,
    **tiny_networks(),
    "chain": plain_chain,
    "functional": lambda: Functional(nn.BatchNorm2d),
    "group norm": lambda: Functional(lambda n: nn.GroupNorm(2, n)),
    "batch statistics": lambda: Functional(lambda n: nn.BatchNorm2d(n, track_running_stats=False)),
    "pre-activation": lambda: timm.create_model(
        "resnetv2_18", num_classes=10, layers=(1, 1), channels=(16, 32), stem_chs=8
    ),
    "shuffle": lambda: torchvision.models.ShuffleNetV2([1, 1, 1], [8, 16, 16, 32, 32], num_classes=10),
    "layer norm": lambda: timm.models.convnext.ConvNeXt(num_classes=10, depths=(1, 1, 1, 1), dims=(8, 16, 16, 16)),
    "standardised weights": lambda: timm.models.nfnet.NormFreeNet(
        timm.models.nfnet._nfres_cfg(depths=(1, 1), channels=(32, 64)), num_classes=10
    ),
}


class Unscaled:
    """Stands for the method: what is replicated here keeps its widths, so that any network will do."""

    name, stacks = "divided", False


def built(name, networks=2, manner: Manner = "mean_logits"):
    """Return a divided network in float64 whose members have different weights and statistics."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        rewriter = Rewriter(prepare(NETWORKS[name](), Unscaled(), 32), "divided")
        rewriter.replicate(networks, Ensemble(networks, manner), SplitViews(networks, 3))
        divided = rewriter.finish()
        for seed, member in enumerate(members(divided)):
            unsettle(member, seed)
            for parameter in member.parameters():
                parameter.data.mul_(1 + 0.2 * torch.rand_like(parameter))
    return divided.double().eval()


def images(batch=3, views=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3 * views, 32, 32, dtype=torch.float64, generator=generator)


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", NETWORKS)
def test_fused_equals_the_network(name):
    divided = built(name)
    shared, views = images(), images(views=2)
    with torch.no_grad():
        expected = divided(shared), divided(views)
        alone = [member(view) for member, view in zip(members(divided), views.chunk(2, 1), strict=True)]
    for conv, way in itertools.product(("grouped", "separate"), WAYS):
        form = way.partition(",")[0]
        if form == "apart" and conv == "separate":
            continue  # asked for nothing
        fused = fuse(divided, shared, form=form, measure=Measured(conv, way))
        assert fused.chosen == way
        assert_same(fused(shared), expected[0])
        assert_same(fused(views), expected[1])
        for found, logits in zip(fused.logits(views), alone, strict=True):
            assert_same(found, logits)


@packs
@pytest.mark.parametrize("name", NETWORKS)
def test_packed_equals_the_network_in_float32(name):
    """Up to float32 and the depth: 1e-5 of the largest logit. In float64, it is what the same copies are unpacked."""
    divided, shared, views = built(name).float(), images().float(), images(views=2).float()
    fused = fuse(divided, shared, form="apart", measure=Measured(PACKED))
    unpacked = fuse(divided, shared, form="apart", measure=Measured("apart, channels_last")).double()
    divided = divided.double()
    for batch in (shared, views, shared[:1]):
        with torch.no_grad():
            expected = divided(batch.double())
        torch.testing.assert_close(fused(batch).double(), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert fused.chosen == PACKED
    for batch in (shared.double(), views.double()):
        assert_same(fused.double()(batch), unpacked(batch))


@packs
def test_packed_is_tried_for_float32_on_a_cpu(monkeypatch):
    divided = built("wide resnet")
    for dtype, form, expected in (
        (torch.float32, "measured", True),
        (torch.float32, "apart", True),
        (torch.float32, "joined", False),
        (torch.float64, "measured", False),
    ):
        assert (PACKED in fuse(divided.to(dtype), form=form, measure=Measured("grouped")).milliseconds) == expected
    monkeypatch.setattr("surgery_divided.packed._OPERATORS", None)
    assert PACKED not in fuse(divided.float(), measure=Measured("grouped")).milliseconds


@packs
def test_a_packed_wide_resnet_has_no_activation_or_addition_left():
    """Nine convolutions, three of which close a block: they add onto what nothing reads any more."""
    fused = fuse(built("wide resnet").float(), measure=Measured("grouped", PACKED))
    for network in fused.network.networks:
        layers = [network.get_submodule(node.target) for node in network.graph.find_nodes(op="call_module")]
        convs = [layer for layer in layers if isinstance(layer, PackedConv2d)]
        assert len(convs) == 9
        assert [conv.overwrites for conv in convs if conv.adds] == [True] * 3
        assert not any(isinstance(layer, nn.ReLU) for layer in layers)
        assert not network.graph.find_nodes(op="call_function", target=operator.iadd)


def of_winograd(fused):
    return [layer for layer in fused.modules() if isinstance(layer, WinogradConv2d)]


@packs
@pytest.mark.parametrize(
    "name", ["wide resnet", "torchvision wide resnet", "timm wide resnet", "chain", "pre-activation"]
)
def test_winograd_equals_the_network_in_float32(name):
    """Up to float32 and the depth: 1e-5 of the largest logit. In float64, it is what the same copies are unpacked."""
    divided, shared, views = built(name).float(), images().float(), images(views=2).float()
    fused = fuse(divided, shared, form="apart", measure=Measured("winograd", WINOGRAD))
    unpacked = fuse(divided, shared, form="apart", measure=Measured("apart, channels_last")).double()
    divided, larger = divided.double(), images().float().repeat(1, 1, 2, 2)[..., 2:, 1:]
    for batch in (shared, views, shared[:1], larger):
        with torch.no_grad():
            expected = divided(batch.double())
        torch.testing.assert_close(fused(batch).double(), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert fused.chosen == WINOGRAD
    for batch in (shared.double(), views.double()):
        assert_same(fused.double()(batch), unpacked(batch))


@packs
def test_winograd_is_tried_for_float32_on_a_cpu_where_it_is_faster_and_wanted():
    """Of 9 convolutions, four are 3x3 ones of at least 16 channels that keep the size: at 16, 16, 32 and 64."""
    clock, divided = Measured("winograd", WINOGRAD), built("wide resnet")
    assert not of_winograd(fuse(divided, measure=clock))
    divided = divided.float()
    fused = fuse(divided, measure=clock)
    assert fused.chosen == WINOGRAD
    assert [layer.shape[1] for layer in fused.layers] == [16, 16, 32, 64]
    for options in ({"winograd": False}, {"form": "joined"}, {"measure": Measured("packed", WINOGRAD)}):
        fused = fuse(divided, **{"measure": clock, **options})
        assert WINOGRAD not in fused.milliseconds
        assert not of_winograd(fused)


@packs
def test_every_layer_of_winograd_is_in_the_report_once_for_all_networks():
    fused = fuse(built("wide resnet").float(), form="apart", measure=Measured("winograd", WINOGRAD))
    assert len(of_winograd(fused)) == 2 * len(fused.layers)
    lines = fused.report().splitlines()
    assert f"* {WINOGRAD}: 1.000 ms" in lines
    assert [line.split()[0] for line in lines[4:]] == [layer.path for layer in fused.layers]
    assert all("winograd  (packed 2.000 ms, winograd 1.000 ms)" in line for line in lines[4:])


@packs
@pytest.mark.parametrize("way", [PACKED, WINOGRAD])
def test_packed_copies_compiles_and_exports(way):
    fused = fuse(built("wide resnet").float(), images().float(), form="apart", measure=Measured("winograd", way))
    assert fused.chosen == way
    batch = images().float()
    expected = fused(batch)
    assert torch.equal(copy.deepcopy(fused)(batch), expected)
    for other in (torch.compile(fused, backend="eager"), torch.export.export(fused, (batch,)).module()):
        torch.testing.assert_close(other(batch), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("manner", MANNERS)
@pytest.mark.parametrize("networks", [2, 3])
def test_every_manner_joins_the_logits_of_the_members(manner, networks):
    divided, batch = built("resnext", networks, manner), images(views=networks)
    with torch.no_grad():
        logits = [member(view) for member, view in zip(members(divided), batch.chunk(networks, 1), strict=True)]
    for form in ("apart", "joined"):
        assert_same(fuse(divided, form=form, measure=Measured("grouped"))(batch), combine(logits, manner))


def test_the_faster_form_and_layout_is_taken():
    divided = built("resnext")
    for way in WAYS:
        assert fuse(divided, measure=Measured(way)).chosen == way
        form = way.partition(",")[0]
        clock = Measured(way)
        assert fuse(divided, form=form, measure=clock).chosen == way
        assert clock.asked[-1] == tuple(name for name in WAYS if name.startswith(form))


def test_every_layer_is_what_was_faster_there():
    """The clock lets grouped win at 16 x 16 and above and separate below: what is built has to follow."""

    def clock(runs, device):
        if "grouped" not in runs:
            return dict.fromkeys(runs, 1.0)
        ran = []
        conv = runs["grouped"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(F, "conv2d", lambda *args: ran.append(args[0].shape) or real(*args))
            real = torch.conv2d
            conv()
        fast = "grouped" if ran[0][-1] >= 16 else "separate"
        return {name: 1.0 if name == fast else 2.0 for name in runs}

    fused = fuse(built("wide resnet"), form="joined", measure=clock)
    chosen = {layer.path: layer.chosen for layer in fused.layers}
    sizes = {layer.path: layer.shape[-1] for layer in fused.layers}
    assert set(chosen.values()) == {"grouped", "separate"}
    assert all((chosen[path] == "grouped") == (size >= 16) for path, size in sizes.items())
    groups = {path: chosen[path] == "grouped" for path in chosen}
    counted = [module for module in fused.modules() if isinstance(module, nn.Conv2d)]
    # The first one stands twice, for one view and for several.
    assert len(counted) == 2 + sum(1 if grouped else 2 for grouped in groups.values())


def test_the_graph_of_a_plain_network_has_no_call_twice():
    """Nine convolutions, seven activations, three additions, pools and the classifier, each one call for both."""
    graph = fuse(built("wide resnet"), form="joined", measure=Measured("grouped")).network.graph
    modules = [graph.get_submodule(node.target) for node in graph.graph.find_nodes(op="call_module")]
    kinds = [type(module).__name__ for module in modules]
    assert kinds.count("Conv2d") + kinds.count("FirstConv") == 9
    assert kinds.count("ReLU") == 7
    assert not {"BatchNorm2d", "Dropout"} & set(kinds)
    assert not [node for node in graph.graph.nodes if node.target is torch.cat]


def test_layers_alike_are_measured_once():
    clock = Measured("grouped")
    fused = fuse(built("wide resnet"), form="joined", measure=clock)
    asked = [names for names in clock.asked if "grouped" in names]
    assert len(asked) < 2 * len(fused.layers)


def test_the_report_has_a_line_for_every_way_and_layer():
    fused = fuse(built("resnext"), measure=Measured("grouped", "joined, contiguous"))
    lines = fused.report().splitlines()
    assert [line for line in lines if line.startswith("*")] == ["* joined, contiguous: 1.000 ms"]
    assert len(lines) == len(WAYS) + len(fused.layers)
    assert all(
        isinstance(layer, Layer) and layer.path in line for layer, line in zip(fused.layers, lines[4:], strict=True)
    )
    assert "grouped 1.000 ms, separate 2.000 ms" in lines[-1]


def test_medians_are_those_of_the_runs_in_turns(monkeypatch):
    """Runs of 2 ms and of 0.1 ms by a clock that only they move; the shorter one is repeated between two readings."""
    now, order = [0.0], []

    def run(name, seconds):
        now[0] += seconds
        order.append(name)

    monkeypatch.setattr("surgery_divided.choice.time.perf_counter", lambda: now[0])
    found = medians({"long": lambda: run("long", 2e-3), "short": lambda: run("short", 1e-4)}, torch.device("cpu"))
    assert found == pytest.approx({"long": 2.0, "short": 0.1}, rel=1e-9)
    assert order[-12:] == (["long"] + ["short"] * 5) * 2


@pytest.mark.parametrize(("seconds", "rounds"), [(0.1, 3), (0.5, 2)])
def test_long_runs_are_timed_seldom_and_far_behind_once(seconds, rounds, monkeypatch):
    """Runs of 130, 100 and 115 ms: a warm-up and three rounds, the last two without the first; two where they are long.

    Two rounds of 500 and 575 ms and one of 650 ms take 2.8 s.
    """
    now, order = [0.0], []

    def run(name, factor):
        now[0] += factor * seconds
        order.append(name)

    monkeypatch.setattr("surgery_divided.choice.time.perf_counter", lambda: now[0])
    runs = {"a": lambda: run("a", 1.3), "b": lambda: run("b", 1.0), "c": lambda: run("c", 1.15)}
    found = medians(runs, torch.device("cpu"))
    milliseconds = {"a": 1300 * seconds, "b": 1000 * seconds, "c": 1150 * seconds}
    assert found == pytest.approx(milliseconds, rel=1e-9)
    assert "".join(order) == "abc" + "abc" + "bc" * (rounds - 1)


@pytest.mark.parametrize("form", ["apart", "joined"])
def test_weights_are_copies_and_the_network_stays_as_it_was(form):
    divided, batch = built("torchvision resnext"), images()
    divided.train()
    before = copy.deepcopy(divided.state_dict())
    fused = fuse(divided, batch, form=form, measure=Measured("grouped"))
    assert divided.training
    for name, tensor in divided.state_dict().items():
        assert torch.equal(tensor, before[name])
    expected = fused(batch)
    own = {tensor.data_ptr() for tensor in divided.state_dict().values()}
    assert not own & {tensor.data_ptr() for tensor in fused.state_dict().values()}
    with torch.no_grad():
        for parameter in divided.parameters():
            parameter.add_(1)
    assert torch.equal(fused(batch), expected)


@pytest.mark.parametrize("form", ["apart", "joined"])
def test_fused_copies_compiles_exports_and_changes_its_type(form):
    fused = fuse(built("timm efficientnet"), images(), form=form, measure=Measured("grouped"))
    batch = images()
    expected = fused(batch)
    assert not expected.requires_grad
    with torch.inference_mode():
        assert_same(fused(batch), expected)
    assert_same(copy.deepcopy(fused)(batch), expected)
    assert_same(torch.compile(fused, backend="eager")(batch), expected)
    assert_same(torch.export.export(fused, (batch,)).module()(batch), expected)
    assert copy.deepcopy(fused).float()(batch.float()).dtype == torch.float32


def test_fusing_in_inference_mode_makes_ordinary_weights():
    divided = built("resnext")
    with torch.inference_mode():
        fused = fuse(divided, measure=Measured("grouped"))
    assert not any(tensor.is_inference() for tensor in fused.state_dict().values())


def test_fusing_leaves_the_random_state_alone():
    divided = built("resnext")
    before = torch.get_rng_state()
    fuse(divided, measure=Measured("grouped"))
    assert torch.equal(torch.get_rng_state(), before)


def test_hooks_on_layers_fire_for_their_own_member():
    divided, batch = built("wide resnet"), images()
    seen = []
    for number, member in enumerate(members(divided)):
        layer = next(module for module in member.modules() if isinstance(module, nn.AvgPool2d))
        layer.register_forward_hook(lambda module, args, output, n=number: seen.append(n) or output * (n + 2))
        with torch.no_grad():
            expected = divided(batch)
        for form in ("apart", "joined"):
            seen.clear()
            assert_same(fuse(divided, batch, form=form, measure=Measured("grouped"))(batch), expected)
            assert set(seen) == set(range(number + 1))


def test_a_layer_whose_weight_a_hook_computes_stays_as_it_is():
    divided, batch = built("wide resnet"), images()
    for member in members(divided):
        with pytest.warns(FutureWarning, match="weight_norm"):
            nn.utils.weight_norm(next(module for module in member.modules() if isinstance(module, nn.Conv2d)))
    with torch.no_grad():
        expected = divided(batch)
        for form in ("apart", "joined"):
            fused = fuse(divided, batch, form=form, measure=Measured("grouped"))
            assert_same(fused(batch), expected)
    assert any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())


def test_networks_that_differ_run_apart_only():
    divided = built("chain")
    other = members(divided)[1]
    convs = [module for module in other.modules() if isinstance(module, nn.Conv2d)]
    convs[0].padding_mode = "circular"
    with torch.no_grad():
        expected = divided(images())
    assert fuse(divided, measure=Measured("joined, contiguous")).chosen.startswith("apart")
    assert_same(fuse(divided, measure=Measured())(images()), expected)
    with pytest.raises(UnsupportedModel, match=re.escape("members.1: its layers differ")):
        fuse(divided, form="joined", measure=Measured())


def test_refusals_say_what_was_expected():
    divided = built("resnext")
    with pytest.raises(InvalidOption, match="form is 'fast', expected one of measured, apart, joined"):
        fuse(divided, form="fast")
    with pytest.raises(UnsupportedModel, match="converted"):
        fuse(plain_chain())
    with pytest.raises(InvalidOption, match="found an image of 4 channels"):
        fuse(divided, torch.zeros(1, 4, 32, 32))
    for way in WAYS:
        fused = fuse(divided, measure=Measured("grouped", way))
        with pytest.raises(InvalidOption, match="found an image of 5 channels"):
            fused(torch.zeros(1, 5, 32, 32, dtype=torch.float64))
        with pytest.raises(InvalidOption, match="for inference only"):
            fused.train()
        assert fused.eval() is fused
        assert isinstance(fused, Fused)
        assert not any(module.training for module in fused.modules())


def test_one_image_and_several_views_share_the_weights_of_the_first_convolution():
    convs = [nn.Conv2d(3, 4, 3).double() for _ in range(2)]
    first, batch = FirstConv(convs), images()
    expected = torch.cat([conv(batch) for conv in convs], 1)
    assert_same(first(batch), expected)
    assert_same(first(AllViews(2, 3)(batch)), expected)
    assert len(list(first.parameters())) == 2
