"""What is masked and what is refused, with the reason; options and their defaults; what conversion leaves alone."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torchvision
from timm.models.regnet import RegNet, RegNetCfg
from timm.models.resnet import Bottleneck, ResNet
from torch import nn

import surgery
import surgery_masked
from surgery.errors import AlreadyConverted, InvalidOption, NothingConverted, UnsupportedModel
from surgery.testing import LAWS, OPTIONAL, ResidualSpec, check_method, plain_chain, tiny_networks, unsettle
from surgery_masked import Masked
from surgery_masked.masks import Masks
from surgery_masked.norms import ConsumerNorm, StreamNorm

NETWORKS = {name: build for name, build in tiny_networks().items() if "efficientnet" not in name}
RESNEXT = NETWORKS["resnext"]
IMAGES = torch.randn(3, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def timm_resnext(**options):
    torch.manual_seed(0)
    shape = {"layers": (1, 1, 1, 1), "channels": (16, 32, 64, 64), "cardinality": 4, "base_width": 16}
    return unsettle(ResNet(Bottleneck, **{**shape, "num_classes": 10, **options}))


def preactivated(name="resnetv2_50", **options):
    torch.manual_seed(0)
    small = {"layers": (1, 2, 1, 1), "channels": (16, 32, 64, 64), "stem_chs": 8, "num_classes": 10}
    return unsettle(timm.create_model(name, **small, **options))


def masked(source, **options):
    return surgery.convert(source, "masked", input_size=32, **options)


def masks_of(model):
    [found] = [module for module in model.modules() if isinstance(module, Masks)]
    return found


def changed(change, source=None):
    """Return a ResNeXt, every block of which is changed."""
    source = source or timm_resnext()
    for stage in (source.layer1, source.layer2, source.layer3, source.layer4):
        for block in stage:
            change(block)
    return source


def with_bias(block):
    block.conv3.bias = nn.Parameter(torch.randn(block.conv3.out_channels))


def without_affine(block):
    block.bn3 = nn.BatchNorm2d(block.bn3.num_features, affine=False)


def without_statistics(block):
    block.bn3 = nn.BatchNorm2d(block.bn3.num_features, track_running_stats=False)


def circular(block):
    block.conv1.padding_mode = "circular"


class Scaled(nn.Conv2d):
    """A convolution of its own kind."""

    def forward(self, x):
        return 2 * super().forward(x)


def of_its_own_kind(block):
    conv = block.conv3
    block.conv3 = Scaled(conv.in_channels, conv.out_channels, 1, bias=False)


# --- refusals ---

REFUSED = {
    "squeeze-excite after the merge": (
        lambda: timm.create_model("seresnext26d_32x4d"),
        "layer1.0: the joined branches, bn3, are read by layer1.0.se, as squeeze-excite does; expected one value",
    ),
    "attention after the merge": (
        ResidualSpec((1, 1), attention="behind").build,
        "stages.0.0: the joined branches, norms_2, are read by ",
    ),
    "attention inside": (
        lambda: timm.create_model("efficientnet_b0"),
        "blocks.0.0: blocks.0.0.se mixes the branches before they are joined",
    ),
    "selective kernels": (
        lambda: timm.create_model("skresnext50_32x4d"),
        "layer1.0: layer1.0.conv2 mixes the branches before they are joined",
    ),
    "convnext": (
        lambda: timm.create_model("convnext_atto"),
        "stages.0.blocks.0: its body does not end with a dense convolution that joins the branches",
    ),
    "merge with a bias": (
        lambda: changed(with_bias),
        "layer1.0: layer1.0.conv3 has a bias, which belongs to no branch, expected none",
    ),
    "drop path": (
        lambda: timm_resnext(drop_path_rate=0.2),
        "layer2.0: layer2.0.drop_path (DropPath) acts on the joined branches before the addition",
    ),
    "norm without affine": (
        lambda: changed(without_affine),
        "layer1.0: layer1.0.bn3 (BatchNorm2d) acts on the joined branches before the addition",
    ),
    "norm without statistics": (
        lambda: changed(without_statistics),
        "layer1.0: layer1.0.bn3 (BatchNorm2d) acts on the joined branches before the addition",
    ),
    "group norm": (
        lambda: timm.create_model("resnet50_gn", layers=(1, 1, 1, 1)),
        "layer1.0: its branches cannot be told apart: these channels cannot be cut: bn2 (GroupNorm)",
    ),
    "circular padding": (
        lambda: changed(circular),
        "layer1.0: layer1.0.conv1 is a Conv2d of its own kind, expected a plain Conv2d",
    ),
    "convolution of its own kind": (
        lambda: changed(of_its_own_kind),
        "layer1.0: layer1.0.conv3 is a Scaled of its own kind, expected a plain Conv2d",
    ),
    "grouped reader": (
        lambda: torchvision.models.MobileNetV2(10, 0.25, [[1, 16, 2, 1]]),  # no convolution before the depthwise one
        "features.1: its branches cannot be told apart: these channels cannot be cut: it is the input of the module",
    ),
    "shortcut of zero channels": (
        ResidualSpec((1, 1), projection="pad").build,
        "stages.1.0: stages.1.0.shortcut (PadShortcut) cannot be applied to several streams",
    ),
    "single block": (
        ResidualSpec((1,)).build,
        "stages.0.0: no block that can be masked comes right before or after it",
    ),
    "plain chain": (plain_chain, "(root) (node input_1): no residual addition was found"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_block_and_the_reason(name):
    build, reason = REFUSED[name]
    with pytest.raises(NothingConverted, match="no two consecutive blocks of") as caught:
        masked(build())
    assert reason in str(caught.value)
    assert all(refusal.reason for refusal in caught.value.refusals)


def test_every_block_of_a_refused_network_has_its_reason():
    with pytest.raises(NothingConverted) as caught:
        masked(timm_resnext(drop_path_rate=0.2))
    # The rate of the first block is zero, so that nothing is wrong with it but its neighbours.
    reasons = {refusal.path: refusal.reason for refusal in caught.value.refusals}
    assert set(reasons) == {"layer1.0", "layer2.0", "layer3.0", "layer4.0"}
    assert reasons["layer1.0"] == "no block that can be masked comes right before or after it"


@pytest.mark.parametrize(
    ("build", "found"),
    [
        (lambda: timm.create_model("regnetx_002"), "3/7/19/46"),  # no divisor in common
        (lambda: torchvision.models.regnet_x_400mf(), "10/2/25/4"),
    ],
)
def test_branches_without_a_common_divisor_are_refused(build, found):
    with pytest.raises(InvalidOption, match="expected a common divisor above 1") as caught:
        masked(build())
    assert "/".join(str(n) for n in sorted(map(int, found.split("/")))) in str(caught.value)


def test_blocks_of_several_cardinalities_get_their_common_divisor():
    """Groups of 4 in widths of 32, 48, 72 and 112: 8, 12, 18 and 28 of them, whose largest common divisor is 2."""
    torch.manual_seed(0)
    layout = RegNetCfg(depth=6, w0=32, wa=16.0, wm=1.5, group_size=4)
    source = unsettle(RegNet(layout, num_classes=10)).double().eval()
    assert {block.cardinality for block in surgery.inspect(source, 32).blocks} == {8, 12, 18, 28}
    model = masked(source, connectivity="full")
    assert {entry.real.shape for entry in surgery_masked.connectivity(model).values()} == {(2, 2)}
    with torch.no_grad():
        assert_same(model(IMAGES), source(IMAGES))


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12 * float(expected.detach().abs().max()))


# --- options ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fan_in": 0}, "option 'fan_in' is 0, expected at least 1"),
        ({"fan_in": -1}, "option 'fan_in' is -1, expected at least 1"),
        ({"fan_in": 9}, "option 'fan_in' is 9, expected 1 to 8, the number of branches"),
        ({"fan_in": 5, "branches": 4}, "option 'fan_in' is 5, expected 1 to 4, the number of branches"),
        ({"fan_in": 4, "connectivity": "full"}, "'fan_in' is 4 with connectivity='full', expected none, or all 8"),
        ({"fan_in": True}, "option 'fan_in' is True"),
        ({"fan_in": 2.0}, "option 'fan_in' is 2.0"),
        ({"branches": 3}, "layer1.0: cannot form 3 branches out of 8 grouped ones; pass a divisor of 8"),
        ({"branches": 16}, "layer1.0: cannot form 16 branches out of 8 grouped ones"),
        ({"branches": 1}, "option 'branches' is 1, expected at least 2"),
        ({"branches": -2}, "option 'branches' is -2, expected at least 2"),
        ({"connectivity": "some"}, "option 'connectivity' is 'some'"),
        ({"aggregate": "max"}, "option 'aggregate' is 'max'"),
        ({"norm": "none"}, "option 'norm' is 'none'"),
        ({"mask_lr": -0.1}, "option 'mask_lr' is -0.1, expected a finite number of at least 0"),
        ({"mask_lr": float("inf")}, "option 'mask_lr' is inf, expected a finite number"),
        ({"mask_lr": float("nan")}, "option 'mask_lr' is nan, expected a finite number"),
        ({"recompute": 1}, "option 'recompute' is 1"),
        ({"fanin": 1}, "unknown option 'fanin'"),
    ],
)
def test_options_that_no_network_can_use_are_refused(options, message):
    with pytest.raises(InvalidOption) as caught:
        masked(RESNEXT(), **options)
    assert message in str(caught.value)


def test_a_learning_rate_of_zero_keeps_the_masks():
    model = masked(RESNEXT(), mask_lr=0.0).train()
    before = masks_of(model).real.clone()
    for _ in range(2):
        model(IMAGES.float()).square().sum().backward()
    assert masks_of(model).get_extra_state()[1:].any()
    assert torch.equal(masks_of(model).real, before)


@pytest.mark.parametrize(
    ("build", "branches"),
    [
        (lambda: timm_resnext(cardinality=2, base_width=16), 2),
        (RESNEXT, 8),
        (lambda: timm_resnext(cardinality=32, base_width=4), 32),
        (lambda: timm_resnext(cardinality=64, base_width=4), 32),
        (NETWORKS["torchvision mobilenetv2"], 8),
        (NETWORKS["wide resnet"], 8),
        (lambda: timm_resnext(cardinality=1, base_width=48, channels=(12, 24, 24, 24)), 3),
    ],
)
def test_branches_are_the_groups_and_half_of_them_are_read(build, branches):
    """The last: plain blocks of 9 or 18 hidden channels, the largest divisor of both up to 8 is 3."""
    masks = masks_of(masked(build()))
    assert masks.real.shape[1:] == (branches, branches)
    assert masks.fan_in == branches // 2


def test_options_reach_the_masks():
    masks = masks_of(masked(RESNEXT(), fan_in=3, branches=4, connectivity="real", mask_lr=0.5))
    assert (masks.fan_in, masks.lr, masks.connectivity, tuple(masks.real.shape)) == (3, 0.5, "real", (2, 4, 4))


def test_full_connectivity_may_name_all_branches():
    masks = masks_of(masked(RESNEXT(), fan_in=8, connectivity="full"))
    assert masks.fan_in == 8
    assert not masks.learns


def test_random_connections_are_in_the_record_and_drawn_anew_for_another_network():
    first, second = (masked(RESNEXT(), connectivity="random", fan_in=2) for _ in range(2))
    assert not torch.equal(masks_of(first).real, masks_of(second).real)
    decided = first.meta["conversion"].operations[0].decisions["connections"]
    chosen = torch.tensor(decided)
    assert torch.equal(masks_of(first).active, torch.zeros(2, 8, 8).scatter(2, chosen, 1).bool())


# --- chains ---


def consumers(model):
    return {consumer: entry.producer for consumer, entry in surgery_masked.connectivity(model).items()}


def test_a_block_that_cannot_read_streams_begins_a_chain():
    """Stage 1 pads its shortcut with zero channels: its first block reads a single stream, so two chains are left."""
    source = ResidualSpec((2, 2), projection="conv").build()
    assert consumers(masked(source)) == {
        "stages.0.1": "stages.0.0",
        "stages.1.0": "stages.0.1",
        "stages.1.1": "stages.1.0",
    }
    source = ResidualSpec((2, 2), projection="pad").build()
    model = masked(source, connectivity="full").double().eval()
    assert consumers(model) == {"stages.0.1": "stages.0.0", "stages.1.1": "stages.1.0"}
    assert_same(model(IMAGES), source.double().eval()(IMAGES))


@pytest.mark.parametrize("change", [with_bias, without_affine, of_its_own_kind])
def test_a_refused_block_splits_the_network_into_two_chains(change):
    source = timm_resnext(layers=(2, 1, 1, 1))
    change(source.layer2[0])
    source = source.double().eval()
    model = masked(source, connectivity="full").double().eval()
    assert consumers(model) == {"layer1.1": "layer1.0", "layer4.0": "layer3.0"}
    assert_same(model(IMAGES), source(IMAGES))
    kinds = {type(module) for module in model.block("layer2.0").modules()}
    assert not kinds & {StreamNorm, ConsumerNorm}


class Tapped(nn.Module):
    """A network of four blocks whose second value is read once more behind them."""

    def __init__(self):
        super().__init__()
        spec = ResidualSpec((4,), groups=4).build()
        self.stem, self.blocks, self.head = spec.stem, spec.stages[0], nn.Linear(16, 10)

    def forward(self, x):
        x = self.stem(x)
        second = self.blocks[1](self.blocks[0](x))
        x = self.blocks[3](self.blocks[2](second))
        return self.head(torch.relu(x - 0.5 * second).mean((2, 3)))


def test_a_value_with_another_reader_splits_the_network_into_two_chains():
    torch.manual_seed(0)
    source = Tapped().double().eval()
    model = masked(source, connectivity="full").double().eval()
    assert consumers(model) == {"blocks.1": "blocks.0", "blocks.3": "blocks.2"}
    assert_same(model(IMAGES), source(IMAGES))


def test_inverted_residuals_are_masked_from_the_second_on():
    """The first block of a MobileNetV2 has no convolution that reads all channels; it begins no chain."""
    source = torchvision.models.mobilenet_v2(width_mult=0.25, num_classes=10)
    found = consumers(masked(source))
    assert found == {f"features.{n}": f"features.{n - 1}" for n in range(3, 18)}


def test_a_chain_passes_over_stages():
    assert consumers(masked(timm_resnext(layers=(1, 2, 1, 1)))) == {
        "layer2.0": "layer1.0",
        "layer2.1": "layer2.0",
        "layer3.0": "layer2.1",
        "layer4.0": "layer3.0",
    }


# --- families beside those of the numeric tests ---

FAMILIES = {
    "SiLU": lambda: timm_resnext(act_layer=nn.SiLU),
    "LeakyReLU": lambda: timm_resnext(act_layer=nn.LeakyReLU),
    "pooled shortcut": lambda: timm_resnext(avg_down=True),
    "pre-activation": preactivated,
    "pre-activation of basic blocks": lambda: preactivated("resnetv2_18"),
    "pre-activation SiLU": lambda: preactivated(act_layer="silu"),
    "pre-activated spec": ResidualSpec((2, 2), groups=4, preactivation=True).build,
    "pre-activated basic spec": ResidualSpec((2, 2), "basic", width=4, preactivation=True).build,
    "pooling spec": ResidualSpec((2, 2), groups=4, projection="pool").build,
    "basic spec": ResidualSpec((2, 2), "basic", width=4).build,
    "mnasnet": lambda: unsettle(torchvision.models.mnasnet0_5(num_classes=10, dropout=0.0)),
}


@pytest.mark.parametrize("norm", ["shared", "branch"])
@pytest.mark.parametrize("name", FAMILIES)
def test_full_connectivity_equals_the_source_in_eval_mode(name, norm):
    source = FAMILIES[name]().double().eval()
    model = masked(source, connectivity="full", norm=norm)
    with torch.no_grad():
        assert_same(model(IMAGES), source(IMAGES))


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "mnasnet"])
def test_full_connectivity_has_the_outputs_and_gradients_of_the_source_in_train_mode(name):
    source = FAMILIES[name]().double().train()
    model = masked(source, connectivity="full")
    logits = [net(IMAGES) for net in (source, model)]
    assert_same(logits[1], logits[0])
    for out in logits:
        (out * torch.arange(10)).square().sum().backward()
    largest = max(float(parameter.grad.abs().max()) for parameter in source.parameters())
    for key, parameter in source.named_parameters():
        torch.testing.assert_close(model.get_parameter(key).grad, parameter.grad, rtol=1e-9, atol=1e-12 * largest)


def test_activated_norms_are_taken_apart():
    """timm's BatchNormAct2d is a norm and an activation: its norm becomes that of streams, under the same keys."""
    source = preactivated()
    model = masked(source)
    assert isinstance(model.get_submodule("stages.1.blocks.0.norm1"), StreamNorm)
    assert set(source.state_dict()) <= set(model.state_dict())


# --- what is left alone ---


@pytest.mark.parametrize("norm", ["shared", "branch"])
@pytest.mark.parametrize("name", NETWORKS)
def test_state_dict_keys_are_those_of_the_source_and_of_the_masks(name, norm):
    """The masks add their real values, the counter and seed of the draws, and whether they are frozen."""
    source = NETWORKS[name]()
    added = ["masked_masks.real", "masked_masks.drawn", "masked_masks.seed", "masked_masks._extra_state"]
    assert sorted(masked(source, norm=norm).state_dict()) == sorted([*source.state_dict(), *added])


@pytest.mark.parametrize("norm", ["shared", "branch"])
def test_a_checkpoint_of_the_source_is_spread_over_the_streams(norm):
    source, other = RESNEXT().double().eval(), unsettle(RESNEXT(), seed=7).double().eval()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1)
    model = masked(source, connectivity="full", norm=norm)
    missing = model.load_state_dict(other.state_dict(), strict=False).missing_keys
    assert all(key.startswith("masked_masks.") for key in missing)
    with torch.no_grad():
        assert_same(model(IMAGES), other(IMAGES))
        assert (model(IMAGES) - source(IMAGES)).abs().max() > 0.01


def test_the_source_is_left_alone():
    source = RESNEXT().train()
    state = copy.deepcopy(source.state_dict())
    kinds = [type(module) for module in source.modules()]
    model = masked(source, norm="branch")
    model.train()(IMAGES.float()).sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert [type(module) for module in source.modules()] == kinds
    assert all(torch.equal(value, state[key]) for key, value in source.state_dict().items())
    assert all(parameter.grad is None for parameter in source.parameters())
    assert source.training


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_that_of_the_source(training):
    model = masked(RESNEXT().train(training))
    assert {module.training for module in model.modules()} == {training}


def test_frozen_weights_of_the_source_stay_frozen():
    source = RESNEXT()
    for key, parameter in source.named_parameters():
        parameter.requires_grad_("conv3" not in key and "bn3" not in key and "downsample" not in key)
    for norm in ("shared", "branch"):
        model = masked(source, norm=norm)
        assert {key: p.requires_grad for key, p in model.named_parameters()} == {
            key: p.requires_grad for key, p in source.named_parameters()
        }


@pytest.mark.parametrize("other", ["gated", "coded"])
def test_it_does_not_stack(other):
    assert not Masked.stacks
    with pytest.raises(AlreadyConverted, match=f"'{other}' cannot be applied on top of masked: masked does not stack"):
        surgery.convert(masked(RESNEXT()), other)
    with pytest.raises(AlreadyConverted, match=f"'masked' cannot be applied on top of {other}"):
        surgery.convert(surgery.convert(RESNEXT(), other, input_size=32), "masked")


def test_a_network_is_masked_once():
    with pytest.raises(AlreadyConverted, match="already converted by 'masked'"):
        masked(masked(RESNEXT()))
    with pytest.raises(AlreadyConverted):
        masked(surgery.prune(masked(RESNEXT())))


def test_what_has_no_masks_is_named():
    for call in (surgery_masked.connectivity, surgery_masked.used_branches, surgery_masked.freeze):
        with pytest.raises(UnsupportedModel, match="expected a converted network, found CifarResNet"):
            call(RESNEXT())
        with pytest.raises(InvalidOption, match="CifarResNet has no masks; expected a network that was converted by"):
            call(surgery.convert(RESNEXT(), "gated", input_size=32))


# --- conformance ---


def frozen(model, criteria):
    """Return the full network with its connections fixed."""
    still = copy.deepcopy(model)
    surgery_masked.freeze(still)
    return still


QUICK = ["preserves", "source_weights_load", "modes", "gradients", "pruned_smaller", "pruned_equals_muted"]


@pytest.mark.parametrize(("name", "norm"), [("resnext", "shared"), ("wide resnet", "branch")])
def test_masked_keeps_every_law(name, norm):
    report = check_method(Masked(fan_in=1, norm=norm), {name: NETWORKS[name]}, muted=frozen)
    assert report.held == {name: tuple(law for law in LAWS if law not in OPTIONAL)}


@pytest.mark.parametrize("number", range(1, len(NETWORKS)))
def test_masked_keeps_the_laws_that_are_quick_to_check(number):
    """Norms of both kinds in turn."""
    name = list(NETWORKS)[number]
    method = Masked(fan_in=1, norm=("shared", "branch")[number % 2])
    assert check_method(method, {name: NETWORKS[name]}, muted=frozen, laws=QUICK).held == {name: tuple(QUICK)}


def test_attention_inside_is_refused_by_name():
    report = check_method(Masked(fan_in=1), tiny_networks(), laws=["installed"])
    assert list(report.refused) == ["timm efficientnet"]
    assert "mixes the branches" in report.refused["timm efficientnet"]
