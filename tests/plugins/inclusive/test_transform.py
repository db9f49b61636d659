"""What is nested and what is refused, with the reason; options and their defaults; what conversion leaves alone."""

from __future__ import annotations

import copy
import re

import pytest
import timm
import torch
import torchvision
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from timm.layers import BatchNormAct2d
from timm.models.regnet import RegNet, RegNetCfg
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn
from torchvision.ops.misc import FrozenBatchNorm2d

import surgery
import surgery_inclusive
from surgery.errors import AlreadyConverted, InvalidOption, NothingConverted, NotKept, SurgeryError, UnsupportedModel
from surgery.testing import LAWS, OPTIONAL, ResidualSpec, check_method, plain_chain, tiny_networks, unsettle
from surgery_inclusive import Inclusive
from surgery_inclusive.convs import SlicedConv2d

RESNEXT = tiny_networks()["resnext"]
IMAGES = torch.randn(3, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
FORMS = [{}, {"norm": "shared"}, {"sparse": True}]
DENSE = FORMS[:2]


def inclusive(source, subnetworks=2, **options):
    return surgery.convert(source, "inclusive", input_size=32, subnetworks=subnetworks, **options)


def timm_resnext(block=Bottleneck, **options):
    torch.manual_seed(0)
    shape = {"layers": (1, 1, 1, 1), "channels": (16, 32, 64, 64), "cardinality": 4, "base_width": 16}
    return unsettle(ResNet(block, **{**shape, "num_classes": 10, **options}))


def basic(**options):
    return timm_resnext(BasicBlock, cardinality=1, base_width=64, **options)


def regnet(**options):
    torch.manual_seed(0)
    layout = RegNetCfg(depth=6, w0=32, wa=16.0, wm=1.5, group_size=4, **options)
    return unsettle(RegNet(layout, num_classes=10))


def mobilenet3():
    torch.manual_seed(0)
    return unsettle(torchvision.models.mobilenet_v3_small(num_classes=10, width_mult=0.5, dropout=0.0))


class Unit(nn.Module):
    """A residual block of 16 channels: 1x1, 3x3 and 1x1, in groups where asked, all with biases."""

    def __init__(self, first=1, middle=4, last=1, norm=nn.BatchNorm2d):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(16, 16, 1, groups=first), norm(16)
        self.conv2, self.norm2 = nn.Conv2d(16, 16, 3, padding=1, groups=middle), norm(16)
        self.conv3, self.norm3 = nn.Conv2d(16, 16, 1, groups=last), norm(16)

    def forward(self, x):
        y = self.conv2(torch.relu(self.norm1(self.conv1(x))))
        return torch.relu(x + self.norm3(self.conv3(torch.relu(self.norm2(y)))))


class Activated(Unit):
    """The same with norms that activate themselves."""

    def __init__(self):
        super().__init__(norm=BatchNormAct2d)
        self.norm2 = BatchNormAct2d(16, act_layer=nn.SiLU)
        self.norm3 = BatchNormAct2d(16, apply_act=False)

    def forward(self, x):
        return x + self.norm3(self.conv3(self.norm2(self.conv2(self.norm1(self.conv1(x))))))


class Small(nn.Module):
    """A stem, blocks, average pooling and a head."""

    def __init__(self, *blocks, head=None):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.blocks, self.head = nn.Sequential(*blocks), head or nn.Linear(16, 10)

    def forward(self, x):
        return self.head(self.blocks(torch.relu(self.bn(self.stem(x)))).mean((2, 3)))


def small(*blocks, head=None):
    """Return the network with random weights, the same each time."""
    torch.manual_seed(0)
    return unsettle(Small(*[build() for build in blocks], head=None if head is None else head()))


class Scaled(nn.Conv2d):
    """A convolution of its own kind."""

    def forward(self, x):
        return 2 * super().forward(x)


def changed(change, build=timm_resnext):
    source = build()
    for stage in (source.layer1, source.layer2, source.layer3, source.layer4):
        for block in stage:
            change(block)
    return source


def of_its_own_kind(block):
    block.conv2.__class__ = Scaled


def circular(block):
    block.conv2.padding_mode = "circular"


def outputs(model, images=IMAGES):
    with torch.no_grad():
        return model.eval()(images)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12 * float(expected.abs().max()))


def ignoring(source, pattern, k, count):
    """Return the source, where the convolutions of that path find zeros in place of the last channels they read."""
    twin = copy.deepcopy(source)

    def cut(module, args):
        width = args[0].shape[1]
        return (args[0] * (torch.arange(width) < width * k // count)[:, None, None],)

    paths = [path for path, module in twin.named_modules() if isinstance(module, nn.Conv2d) and pattern(path, module)]
    assert paths
    for path in paths:
        twin.get_submodule(path).register_forward_pre_hook(cut)
    return twin


def matching(pattern):
    return lambda path, conv: re.search(pattern, path) is not None


def behind_the_first(path, conv):
    """Return whether a convolution of an inverted residual reads hidden channels."""
    hidden = conv.groups > 1 or conv.out_channels <= conv.in_channels
    return ".block." in path and hidden and not path.endswith("fc2")


# --- families ---

BOTTLENECK = matching(r"layer\d\.\d\.conv[23]$")
FAMILIES = {
    "basic": (basic, matching(r"layer\d\.\d\.conv2$")),
    "pooled shortcut": (lambda: timm_resnext(avg_down=True), BOTTLENECK),
    "deep stem": (lambda: timm_resnext(stem_type="deep"), BOTTLENECK),
    "drop path and dropout": (lambda: timm_resnext(drop_path_rate=0.2, drop_rate=0.1), BOTTLENECK),
    "squeeze-excite behind": (lambda: timm_resnext(block_args={"attn_layer": "se"}), BOTTLENECK),
    "eca behind": (lambda: timm_resnext(block_args={"attn_layer": "eca"}), BOTTLENECK),
    "cbam behind": (lambda: timm_resnext(block_args={"attn_layer": "cbam"}), BOTTLENECK),
    # The blurring pool of a block that halves its image has a kernel for every hidden channel: that one stays whole.
    "blurring pools": (lambda: timm_resnext(aa_layer=timm.layers.BlurPool2d), matching(r"layer1\.0\.conv[23]$")),
    "concatenated pools": (lambda: timm_resnext(global_pool="catavgmax"), BOTTLENECK),
    "regnetx": (regnet, matching(r"conv[23]\.conv$")),
    "regnety": (lambda: regnet(se_ratio=0.25), matching(r"conv[23]\.conv$|se\.fc1$")),
    "pre-activated regnet": (lambda: regnet(downsample=None, preact=True), matching(r"\.conv[23]$")),
    "mobilenetv3": (mobilenet3, behind_the_first),
    "biases": (lambda: small(Unit, Unit), matching(r"conv[23]$")),
    "activated norms": (lambda: small(Activated, Activated), matching(r"conv[23]$")),
    "hidden layer in the head": (
        lambda: small(Unit, head=lambda: nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 10))),
        matching(r"conv[23]$"),
    ),
    "no bias in the head": (lambda: small(Unit, head=lambda: nn.Linear(16, 10, bias=False)), matching(r"conv[23]$")),
}


@pytest.mark.parametrize("norm", ["independent", "shared"])
@pytest.mark.parametrize("name", FAMILIES)
def test_subnetworks_of_every_family_ignore_the_last_branches(name, norm):
    build, reads = FAMILIES[name]
    source = build().double().eval()
    converted = inclusive(source, norm=norm)
    assert torch.equal(outputs(converted), outputs(source))
    with surgery_inclusive.use(converted, 1):
        thin = outputs(converted)
    close(thin, outputs(ignoring(source, reads, 1, 2)))
    assert (thin - outputs(source)).abs().max() > 1e-6
    close(outputs(surgery.prune(converted, subnetwork=1)), thin)
    assert torch.equal(outputs(surgery.prune(converted, subnetwork=2)), outputs(source))


SPECS = st.builds(
    ResidualSpec,
    blocks=st.lists(st.integers(1, 2), min_size=1, max_size=2).map(tuple),
    kind=st.sampled_from(["basic", "bottleneck"]),
    groups=st.sampled_from([1, 2, 4]),
    width=st.integers(1, 3),
    preactivation=st.booleans(),
    attention=st.sampled_from(["none", "inside", "behind"]),
    projection=st.sampled_from(["conv", "pool", "pad"]),
)


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(SPECS)
def test_random_networks_are_nested_or_refused_for_their_number_of_branches(spec):
    source = spec.build().double().eval()
    if any(spec.cardinality(stage) % 2 for stage in range(len(spec.blocks))):
        with pytest.raises(InvalidOption, match="option 'subnetworks' is 2, but the blocks have"):
            inclusive(source)
        return
    converted = inclusive(source)
    assert torch.equal(outputs(converted), outputs(source))
    reads = r"convs\.1$|inside\.down$" if spec.kind == "basic" else r"convs\.[12]$|inside\.down$"
    with surgery_inclusive.use(converted, 1):
        close(outputs(converted), outputs(ignoring(source, matching(reads), 1, 2)))


# --- refusals ---


def with_batch_norm_1d():
    return small(Unit, head=lambda: nn.Sequential(nn.BatchNorm1d(16), nn.Linear(16, 10)))


REFUSED = {
    "plain chain": (plain_chain, {}, "no block of Sequential can be divided", "no residual addition was found"),
    "no classifier": (
        lambda: timm_resnext(num_classes=0),
        {},
        "ResNet cannot be converted",
        "(root): no classifier was found",
    ),
    "convolution as classifier": (
        lambda: timm.create_model("resnetv2_50", layers=(1, 1, 1, 1), num_classes=10),
        {},
        "ResNetV2 cannot be converted",
        "head.fc: the classifier is a Conv2d, expected a plain linear layer",
    ),
    "group norm": (
        lambda: timm.create_model("resnet50_gn", layers=(1, 1, 1, 1)),
        {},
        "no block of ResNet can be divided",
        "layer1.0: its branches cannot be told apart: bn1 (GroupNorm",
    ),
    "synchronized norm": (
        lambda: nn.SyncBatchNorm.convert_sync_batchnorm(timm_resnext()),
        {},
        "a norm of ResNet cannot be given to every sub-network",
        "bn1 is a SyncBatchNorm, expected a BatchNorm2d",
    ),
    "frozen norm": (
        lambda: torchvision.models.resnet.ResNet(
            torchvision.models.resnet.Bottleneck, [1, 1, 1, 1], norm_layer=FrozenBatchNorm2d
        ),
        {},
        "no block of ResNet can be divided",
        "bn1 (FrozenBatchNorm2d)",
    ),
    "norm in the head": (with_batch_norm_1d, {}, "a norm of Small", "head.0 is a BatchNorm1d, expected a BatchNorm2d"),
    "instance norm": (
        lambda: small(lambda: Unit(norm=nn.InstanceNorm2d)),
        {},
        "a norm of Small",
        "blocks.0.norm1 is a InstanceNorm2d, expected a BatchNorm2d",
    ),
    "convolution of its own kind": (
        lambda: changed(of_its_own_kind),
        {},
        "no block of ResNet can be divided",
        "layer1.0.conv2 (Scaled) acts on its branches and cannot be cut",
    ),
    "circular padding": (
        lambda: changed(circular),
        {},
        "no block of ResNet can be divided",
        "layer1.0.conv2 (Conv2d) acts on its branches and cannot be cut",
    ),
    "padding as in TensorFlow": (
        lambda: timm.create_model("tf_efficientnet_lite0", num_classes=10),
        {"sparse": True},
        "the features of EfficientNet cannot be divided",
        "conv_stem: a Conv2dSame reads or writes features",
    ),
    "concatenation": (
        lambda: torchvision.models.shufflenet_v2_x0_5(num_classes=10),
        {},
        "no block of ShuffleNetV2",
        "paths are joined by concatenation",
    ),
    "layer norm": (
        lambda: timm.create_model("convnext_atto", num_classes=10),
        {},
        "no block of ConvNeXt can be divided",
        "stages.0.blocks.0: its branches cannot be told apart: norm (LayerNorm2d)",
    ),
    "split attention": (
        lambda: timm.create_model("resnest14d", num_classes=10),
        {},
        "no block of ResNet can be divided",
        "layer1.0: its branches cannot be told apart",
    ),
    "blurring pool, sparse": (
        lambda: timm_resnext(aa_layer=timm.layers.BlurPool2d),
        {"sparse": True},
        "the features of ResNet cannot be divided",
        "maxpool.1 (BlurPool2d) uses it in a way that cannot be cut",
    ),
    "concatenated pools, sparse": (
        lambda: timm_resnext(global_pool="catavgmax"),
        {"sparse": True},
        "the features of ResNet cannot be divided",
        "global_pool (SelectAdaptivePool2d) uses it in a way that cannot be cut",
    ),
    "shortcut that pads, sparse": (
        ResidualSpec((1, 1), groups=4, projection="pad").build,
        {"sparse": True},
        "the features of ResidualNetwork cannot be divided",
        "PadShortcut",
    ),
    "hidden layer in the head, sparse": (
        lambda: small(Unit, head=lambda: nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 10))),
        {"sparse": True},
        "the features of Small cannot be divided",
        "head.0: a Linear reads or writes features",
    ),
    "layer norm in the head, sparse": (
        lambda: small(Unit, head=lambda: nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 10))),
        {"sparse": True},
        "the features of Small cannot be divided",
        "head.0 (LayerNorm)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_nested_is_refused_with_the_place_and_the_reason(name):
    build, options, headline, reason = REFUSED[name]
    with pytest.raises(NothingConverted) as caught:
        inclusive(build(), **options)
    assert str(caught.value).startswith("inclusive: " + headline)
    assert reason in str(caught.value)
    assert all(refusal.path for refusal in caught.value.refusals)


@pytest.mark.parametrize("name", ["skresnet18", "res2net50_26w_4s"])
def test_a_network_of_which_nothing_is_divided_is_refused(name):
    """All sub-networks would be the full one: the body of a block with a split ends up with nothing to cut."""
    source = timm.create_model(name, num_classes=10, layers=(1, 1, 1, 1))
    with pytest.raises(NothingConverted):
        inclusive(source)


@pytest.mark.parametrize("build", [lambda: small(lambda: Unit(first=4, middle=1)), lambda: mixed()])
def test_what_is_converted_computes_every_subnetwork(build):
    """A grouped convolution that reads all of the block's input, and depthwise ones on pieces of the hidden channels.

    Both may be refused; what is converted has to run.
    """
    try:
        converted = inclusive(build().double())
    except NothingConverted:
        return
    with surgery_inclusive.use(converted, 1):
        assert outputs(converted).shape == (3, 10)


def mixed():
    return timm.create_model("mixnet_s", num_classes=10)


def test_a_classifier_of_timm_is_a_linear_one():
    """timm.layers.Linear is a Linear with a forward of its own, for scripting: MobileNetV3 and GhostNet end with it."""
    source = timm.create_model("mobilenetv3_small_050", num_classes=10).double().eval()
    assert torch.equal(outputs(inclusive(source)), outputs(source))


@pytest.mark.parametrize("options", FORMS)
def test_a_network_that_changes_its_logits_is_refused_by_what_changes_them(options):
    """Logits are halved behind the linear layer: the loss of the thin ones would be another."""

    class Halved(Small):
        def forward(self, x):
            return super().forward(x) / 2

    with pytest.raises(NothingConverted, match="truediv changes what the classifier returns, expected its logits"):
        inclusive(Halved(Unit()), **options)


@pytest.mark.parametrize("options", FORMS)
def test_a_parametrized_convolution_is_refused_by_name(options):
    """Its weight is computed from others, which a part of it would lose."""
    source = small(Unit)
    nn.utils.parametrizations.weight_norm(source.blocks[0].conv1)
    with pytest.raises(NothingConverted, match=r"blocks\.0\.conv1"):
        inclusive(source, **options)


@pytest.mark.parametrize("attention", ["cbam", "gc"])
def test_attention_that_mixes_features_is_refused_for_its_mixing_in_sparse_networks(attention):
    """Not for its one channel, which no number of sub-networks divides."""
    source = timm_resnext(block_args={"attn_layer": attention})
    with pytest.raises(NothingConverted, match="the features of ResNet cannot be divided"):
        inclusive(source, sparse=True)


# --- options ---


def test_options_and_their_defaults():
    assert Inclusive().options() == {"subnetworks": 4, "sparse": False, "norm": None, "taxonomy": None}
    assert not Inclusive.stacks
    assert (Inclusive().preserved(), Inclusive(sparse=True).preserved()) == ("output", "nothing")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"subnetworks": 1}, "inclusive: option 'subnetworks' is 1, expected at least 2"),
        ({"subnetworks": -4}, "inclusive: option 'subnetworks' is -4, expected at least 2"),
        ({"subnetworks": True}, "inclusive: option 'subnetworks' is True"),
        ({"subnetworks": 2.0}, "inclusive: option 'subnetworks' is 2.0"),
        ({"subnetworks": 3}, "'subnetworks' is 3, but the blocks have 8 branches; expected one of 2, 4, 8"),
        ({"subnetworks": 16}, "'subnetworks' is 16, but the blocks have 8 branches; expected one of 2, 4, 8"),
        ({"subnetworks": 3, "sparse": True}, "'subnetworks' is 3, but the blocks have 8 branches"),
        ({"sparse": 1}, "inclusive: option 'sparse' is 1"),
        ({"norm": "none"}, "inclusive: option 'norm' is 'none'"),
        ({"sparse": True, "norm": "independent"}, "'norm' is 'independent', expected 'shared' with sparse=True"),
        ({"taxonomy": {}}, "taxonomy: found {}, expected the group of every class"),
        ({"taxonomy": {"half": [0, 1]}}, "taxonomy: covers 2 classes, expected 10, those of the network"),
        ({"levels": 2}, "unknown option 'levels'; its options are subnetworks, sparse, norm, taxonomy"),
    ],
)
def test_options_that_no_network_can_use_are_refused(options, message):
    with pytest.raises(InvalidOption) as caught:
        inclusive(RESNEXT(), **options)
    assert message in str(caught.value)


@pytest.mark.parametrize("options", FORMS)
def test_branches_of_several_numbers_are_divided_by_their_common_divisors(options):
    """Groups of 4 in widths of 32, 48, 72 and 112 are 8, 12, 18 and 28 branches: 2 divides all of them, 4 does not."""
    assert subnetworks(inclusive(regnet(), **options)) == 2
    with pytest.raises(InvalidOption, match=r"the blocks have 8/12/18/28 branches; expected one of 2$"):
        inclusive(regnet(), 4, **options)


def subnetworks(model):
    return len(surgery_inclusive.subnetwork_macs(model))


def test_features_that_cannot_be_divided_are_named_with_what_could():
    """4 divides the 4 branches of 4 hidden channels, but not the 18 features, which only a sparse network divides."""
    spec = small(Unit)
    spec.stem, spec.bn = nn.Conv2d(3, 18, 3, padding=1), nn.BatchNorm2d(18)
    block = spec.blocks[0]
    block.conv1, block.conv3 = nn.Conv2d(18, 16, 1), nn.Conv2d(16, 18, 1)
    block.norm3, spec.head = nn.BatchNorm2d(18), nn.Linear(18, 10)
    assert subnetworks(inclusive(spec, 4)) == 4
    with pytest.raises(
        InvalidOption, match=r"stem: found .* multiples of 18, expected multiples of 4, .*; pass .*= one of 2$"
    ):
        inclusive(spec, 4, sparse=True)


@pytest.mark.parametrize("k", [0, 5, True, "1", None])
def test_pruning_says_which_subnetworks_there_are(k):
    with pytest.raises(InvalidOption, match=r"1 \(the thinnest\)\s?(to| to) 4"):
        surgery.plan(inclusive(RESNEXT(), 4), subnetwork=k)
    with pytest.raises(InvalidOption, match="inclusive: prune expects subnetwork=, found keep"):
        surgery.plan(inclusive(RESNEXT(), 4), keep=0.5)


# --- what is left alone ---


@pytest.mark.parametrize("options", FORMS)
def test_new_modules_have_the_device_type_mode_and_frozenness_of_what_they_stand_for(options):
    source = RESNEXT().double().eval()
    frozen = ("conv1", "conv3", "bn1", "fc")
    for name, parameter in source.named_parameters():
        parameter.requires_grad_(not any(part in name for part in frozen))
    model = inclusive(source, 4, taxonomy={"half": [0] * 5 + [1] * 5}, **options)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    assert not any(module.training for module in model.modules())
    assert all(module.training for module in inclusive(RESNEXT().train(), **options).modules())
    for name, parameter in model.named_parameters():
        coarse = ".coarse." in name  # a classifier of its own, which stands for none of the source
        assert parameter.requires_grad == (coarse or not any(part in name for part in frozen)), name


@pytest.mark.parametrize("options", FORMS)
def test_the_source_is_left_alone(options):
    source = RESNEXT().train()
    state, kinds = copy.deepcopy(source.state_dict()), [type(module) for module in source.modules()]
    model = inclusive(source, **options).train()
    model(IMAGES.float()).sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert [type(module) for module in source.modules()] == kinds
    assert all(torch.equal(value, state[key]) for key, value in source.state_dict().items())
    assert all(parameter.grad is None for parameter in source.parameters())


@pytest.mark.parametrize("options", DENSE)
def test_a_checkpoint_of_the_source_loads_into_the_full_subnetwork(options):
    source, other = RESNEXT().double(), unsettle(RESNEXT(), seed=7).double()
    model = inclusive(source, **options)
    found = model.load_state_dict(other.state_dict(), strict=False)
    assert not found.unexpected_keys
    assert all(".thin." in key or key.endswith(".part_batches") for key in found.missing_keys)
    assert torch.equal(outputs(model), outputs(other))
    assert torch.equal(outputs(surgery.revert(model, factory=lambda: RESNEXT().double())), outputs(other))


def test_a_sparse_network_cannot_be_reverted():
    with pytest.raises(SurgeryError, match="it cannot be reverted"):
        surgery.revert(inclusive(RESNEXT(), sparse=True), factory=RESNEXT)


@pytest.mark.parametrize("options", FORMS)
def test_hooks_of_the_source_are_called_or_refused(options):
    """On what is replaced, too."""
    source, calls = RESNEXT().eval(), []
    paths = ["bn1", "layer1.0.conv1", "layer1.0.conv3", "layer1.0.bn1", "fc"]
    for path in paths:
        source.get_submodule(path).register_forward_hook(lambda module, args, output, path=path: calls.append(path))
    try:
        model = inclusive(source, **options)
    except SurgeryError:
        return
    outputs(model, IMAGES.float())
    assert sorted(calls) == sorted(paths)


@pytest.mark.parametrize("options", FORMS)
def test_the_classifier_is_found_and_replaced_before_the_conversion_only(options):
    model = inclusive(RESNEXT(), **options)
    assert model.get_classifier() is model.fc
    with pytest.raises(NotKept, match="replace the classifier before the conversion"):
        model.reset_classifier(7)


@pytest.mark.parametrize("options", FORMS)
def test_the_classifier_of_a_pruned_subnetwork_can_be_replaced(options):
    """That of a sparse one has fewer features than the source."""
    plain = surgery.prune(inclusive(RESNEXT(), **options), subnetwork=1)
    try:
        plain.reset_classifier(7)
    except NotKept:
        assert outputs(plain, IMAGES.float()).shape == (3, 10)
        return
    assert outputs(plain, IMAGES.float()).shape == (3, 7)


@pytest.mark.parametrize("options", DENSE)
def test_features_are_those_of_the_source(options):
    source = RESNEXT().double().eval()
    model = inclusive(source, **options)
    assert torch.equal(model.forward_features(IMAGES), source.forward_features(IMAGES))


def test_features_of_a_sparse_subnetwork_are_its_first_channels():
    model = inclusive(RESNEXT().double().eval(), 4, sparse=True)
    whole = model.forward_features(IMAGES).detach()
    with torch.no_grad(), surgery_inclusive.use(model, 1):
        close(model.forward_features(IMAGES), whole[:, : whole.shape[1] // 4])


@pytest.mark.parametrize("options", FORMS)
def test_norms_that_were_exchanged_after_the_conversion_are_refused_by_name(options):
    """convert_sync_batchnorm puts norms that know of no sub-networks in the place of every BatchNorm2d."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(inclusive(RESNEXT(), **options)).eval()
    with pytest.raises(UnsupportedModel, match="bn1 has become a SyncBatchNorm, which knows of no sub-networks"):
        outputs(model, IMAGES.float())


@pytest.mark.parametrize("options", FORMS)
def test_networks_survive_their_file_and_deepcopy(options, tmp_path):
    levels = {"fifth": [0, 0, 1, 1, 2, 2, 3, 3, 4, 4], "half": {"groups": [0] * 6 + [1] * 4, "names": ["low", "high"]}}
    model = unsettle(inclusive(RESNEXT().double(), 4, taxonomy=levels, **options), seed=1)
    surgery.save(model, tmp_path / "model.safetensors", factory=RESNEXT)
    loaded = surgery.load(tmp_path / "model.safetensors", factory=RESNEXT)
    for twin in (loaded, copy.deepcopy(model)):
        assert list(twin.state_dict()) == list(model.state_dict())
        with surgery.record(model) as expected, surgery.record(twin) as found:
            outputs(model), outputs(twin)
        assert list(found) == list(expected)
        assert len(found) == 12
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("options", FORMS)
def test_norms_and_biases_of_all_subnetworks_are_not_decayed(options):
    model = inclusive(RESNEXT(), 4, **options)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = surgery.param_groups(model, 0.1, 1e-4)
    assert sum(len(group["params"]) for group in groups) == len(names)
    for group in groups:
        for parameter in group["params"]:
            assert (group["weight_decay"] > 0) == (parameter.dim() > 1), names[id(parameter)]


@pytest.mark.parametrize("other", ["gated", "coded", "masked"])
def test_it_does_not_stack(other):
    with pytest.raises(AlreadyConverted, match=f"'{other}' cannot be applied on top of inclusive"):
        surgery.convert(inclusive(RESNEXT()), other)
    with pytest.raises(AlreadyConverted, match=f"'inclusive' cannot be applied on top of {other}"):
        inclusive(surgery.convert(RESNEXT(), other, input_size=32))
    with pytest.raises(AlreadyConverted):
        inclusive(inclusive(RESNEXT()))


def test_a_block_that_cannot_be_divided_stays_whole_with_norms_of_its_own():
    """The second block has a convolution of its own kind: its layers are those of the source, its norms nested."""
    source = small(Unit, Unit)
    source.blocks[1].conv2.__class__ = Scaled
    source = source.double().eval()
    model = inclusive(source)
    kinds = {path: type(module) for path, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    assert [path for path, kind in kinds.items() if kind is SlicedConv2d] == [f"blocks.0.conv{n}" for n in (1, 2, 3)]
    assert [len(model.get_submodule(f"blocks.1.norm{n}").thin) for n in (1, 2, 3)] == [1, 1, 1]
    with surgery_inclusive.use(model, 1):
        close(outputs(model), outputs(ignoring(source, matching(r"blocks\.0\.conv[23]$"), 1, 2)))


# --- conformance ---


def alone(model, criteria):
    """Compute what one sub-network does by the network that has all of them."""

    def run(images):
        with surgery_inclusive.use(model, criteria["subnetwork"]):
            return model(images)

    return run


QUICK = ["preserves", "source_weights_load", "modes", "gradients", "pruned_smaller", "pruned_equals_muted"]


@pytest.mark.parametrize(("name", "options"), [("timm wide resnet", {}), ("resnext", {"sparse": True})])
def test_inclusive_keeps_every_law(name, options):
    method = Inclusive(subnetworks=2, **options)
    report = check_method(method, {name: tiny_networks()[name]}, criteria={"subnetwork": 1}, muted=alone)
    passed_over = set(report.passed_over[name])
    assert report.held == {name: tuple(law for law in LAWS if law not in OPTIONAL and law not in passed_over)}
    assert passed_over <= {"source_weights_load"}


@pytest.mark.parametrize("number", range(0, len(tiny_networks()), 3))
def test_inclusive_keeps_the_laws_that_are_quick_to_check(number):
    """The three forms in turn, on three of the families."""
    name, options = list(tiny_networks())[number], FORMS[number // 3]
    method = Inclusive(subnetworks=2, **options)
    report = check_method(method, {name: tiny_networks()[name]}, criteria={"subnetwork": 1}, muted=alone, laws=QUICK)
    passed_over = set(report.passed_over[name])
    assert report.held == {name: tuple(law for law in QUICK if law not in passed_over)}
    assert not passed_over
