"""First weights: the source's own initialisers at the new shapes, seeds, slices, and what a load leaves alone."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import timm
import torch
import torchvision
from torch import nn

import surgery
from surgery.models import CifarResNet, resnet, resnext, wide_resnet
from surgery.testing import ResidualSpec, unsettle
from surgery_divided import members


def divided(source, networks=2, **options):
    return surgery.convert(source, "divided", input_size=32, networks=networks, **options)


def spread(weight):
    return weight.double().pow(2).mean().sqrt().item()


def trained(source):
    """Return the network with weights that no initialiser gives."""
    for value in source.parameters():
        nn.init.constant_(value, 7.0)
    return unsettle(source)


@pytest.fixture(scope="module")
def resnet18():
    return divided(trained(torchvision.models.resnet18()))


def test_convolutions_spread_by_their_new_fan(resnet18):
    """torchvision draws He et al.'s normal distribution of variance 2 / fan_out: 2 / (9 * 352) of 352 channels."""
    for member in members(resnet18):
        for path in ("layer4.1.conv2", "layer3.0.conv1", "layer2.0.downsample.0"):
            conv = member.get_submodule(path)
            fan_out = conv.out_channels * conv.kernel_size[0] ** 2
            samples = conv.weight.numel()
            assert spread(conv.weight) == pytest.approx(math.sqrt(2 / fan_out), rel=5 / math.sqrt(2 * samples))


@pytest.mark.parametrize(
    ("source", "thin"),
    [
        ("tv_wide_resnet50_2", torchvision.models.resnet50),
        ("tv_resnext50_32x4d", lambda: torchvision_resnext(groups=16, width_per_group=4)),
        ("resnext29_8x8d", lambda: CifarResNet(resnext(4, 8, base=16, shortcut="stride"))),
        ("wrn_16_2", lambda: CifarResNet(wide_resnet(16, 1))),
    ],
)
def test_every_weight_spreads_as_in_a_thin_network_built_directly(source, thin):
    """In layers of half as many inputs or outputs, a deviation that follows one of them must not follow the other."""
    built = torchvision.models.get_model(source[3:]) if source.startswith("tv_") else timm.create_model(source)
    member = members(divided(trained(built)))[1]
    ours, theirs = dict(member.named_parameters()), dict(thin().named_parameters())
    assert theirs.keys() <= ours.keys()
    for name, expected in theirs.items():
        assert ours[name].shape == expected.shape
        if expected.dim() > 1:  # two samples of one distribution
            assert spread(ours[name]) == pytest.approx(spread(expected), rel=6 / math.sqrt(expected.numel())), name
        elif not name.startswith("fc."):
            assert torch.equal(ours[name], expected), name


def torchvision_resnext(**options):
    return torchvision.models.resnet.ResNet(torchvision.models.resnet.Bottleneck, [3, 4, 6, 3], **options)


def test_linear_layers_keep_to_their_new_bounds(resnet18):
    """torch's own uniform distribution between -+1 / sqrt(fan_in), fan_in 352; of 352,000 one comes close to it."""
    for member in members(resnet18):
        bound = 1 / math.sqrt(352)
        assert 0.999 * bound < member.fc.weight.abs().max() <= bound
        assert 0.95 * bound < member.fc.bias.abs().max() <= bound


def test_norms_begin_anew(resnet18):
    for member in members(resnet18):
        norms = [module for module in member.modules() if isinstance(module, nn.BatchNorm2d)]
        for norm in norms:
            assert torch.equal(norm.weight, torch.ones_like(norm.weight))
            assert not norm.bias.any()
            assert torch.equal(norm.running_var, torch.ones_like(norm.weight))
            assert not norm.running_mean.any()
            assert norm.num_batches_tracked == 0
        assert len(norms) == 20


def test_fixed_deviations_stay_and_zeros_stay():
    """MobileNetV2 of torchvision: classifier N(0, 0.01), biases zero; depthwise fan_out = 9 * channels."""
    member = members(divided(trained(torchvision.models.mobilenet_v2())))[1]
    assert spread(member.classifier[1].weight) == pytest.approx(0.01, rel=0.01)
    assert not member.classifier[1].bias.any()
    depthwise = member.features[17].conv[1][0]
    assert depthwise.weight.shape == (720, 1, 3, 3)
    assert spread(depthwise.weight) == pytest.approx(math.sqrt(2 / (9 * 720)), rel=5 / math.sqrt(2 * 6480))


def test_deviations_that_a_builder_computes_itself_follow_the_shape():
    """timm's EfficientNet: N(0, 2 / fan_out), fan_out = 9 for depthwise, and a uniform classifier 1 / sqrt(classes)."""
    source = trained(timm.create_model("efficientnet_b0", num_classes=100))
    member = members(divided(source))[0]
    for path, fan in (("conv_head", 960), ("blocks.5.0.conv_dw", 25), ("conv_stem", 24 * 9)):
        weight = member.get_submodule(path).weight
        assert spread(weight) == pytest.approx(math.sqrt(2 / fan), rel=5 / math.sqrt(2 * weight.numel())), path
    assert 0.999 * 0.1 < member.classifier.weight.abs().max() <= 0.1
    assert not member.classifier.bias.any()


def test_a_residual_body_that_begins_at_zero_begins_at_zero():
    """The paper's networks: the last norm of a body starts at zero, the classifier N(0, 0.001)."""
    member = members(divided(trained(timm.create_model("resnet20"))))[1]
    last = [module.weight for path, module in member.named_modules() if path.endswith(".bn3")]
    assert len(last) == 6
    assert not torch.cat(last).any()
    assert spread(member.fc.weight) == pytest.approx(1e-3, rel=0.1)


def test_truncated_distributions_and_layer_scales_begin_anew():
    """ConvNeXt of torchvision: N(0, 0.02), cut off at -+2, zero biases, layer scales that begin at 1e-6."""
    member = members(divided(trained(torchvision.models.convnext_tiny())))[1]
    block = member.features[1][0]
    assert block.block[0].weight.shape == (68, 1, 7, 7)
    for weight in (block.block[3].weight, member.classifier[2].weight, member.features[7][0].block[0].weight):
        assert spread(weight) == pytest.approx(0.02, rel=0.05)
    assert not block.block[3].bias.any()
    assert torch.equal(block.layer_scale, torch.full_like(block.layer_scale, 1e-6))
    assert torch.equal(block.block[2].weight, torch.ones(68))


def test_weights_that_are_filled_in_another_way_come_from_a_source_of_their_own(monkeypatch):
    """A weight of an orthogonal matrix is a product: every network has a part of another source's."""

    def orthogonal(module, *_):
        if isinstance(module, nn.Linear):
            nn.init.orthogonal_(module.weight)

    build = timm.models.resnet._create_resnet
    monkeypatch.setattr(
        timm.models.resnet, "_create_resnet", lambda *args, **kwargs: build(*args, **kwargs).apply(orthogonal)
    )
    one, other = members(divided(trained(timm.create_model("resnet18", num_classes=10))))
    assert spread(one.fc.weight) == pytest.approx(math.sqrt(1 / 512), rel=0.1)
    assert not torch.equal(one.fc.weight, other.fc.weight)


def test_a_network_that_no_builder_makes_is_drawn_by_its_layers():
    """torch's own: uniform between -+1 / sqrt(fan_in) for convolutions and linear layers, norms one and zero."""
    source = trained(ResidualSpec((1, 1), kind="basic", width=16).build())
    for member in members(divided(source)):
        for module in member.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                bound = 1 / math.sqrt(module.weight[0].numel())
                assert 0.9 * bound < module.weight.abs().max() <= bound
            if isinstance(module, nn.BatchNorm2d):
                assert torch.equal(module.weight, torch.ones_like(module.weight))
                assert not module.bias.any()


def test_layers_of_your_own_are_drawn_by_themselves_in_every_network():
    """A classifier put in by hand is none that the builder draws; torch's uniform bound is 1 / sqrt(512 * 44 / 64)."""
    source = timm.create_model("resnet18", num_classes=10)
    source.fc = nn.Sequential(nn.Linear(512, 128), nn.ReLU(), nn.Linear(128, 10))
    one, other = members(divided(trained(source)))
    assert 0.95 / math.sqrt(352) < one.fc[0].weight.abs().max() <= 1 / math.sqrt(352)
    assert not torch.equal(one.fc[0].weight, other.fc[0].weight)


def test_a_network_with_another_stem_is_drawn_as_its_relatives_are():
    """torchvision's ResNet-18 for small images: its first convolution has a fan_out of 9 * 44, not 49 * 44."""
    source = torchvision.models.resnet18()
    source.conv1, source.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    member = members(divided(trained(source)))[0]
    for weight, fan_out in ((member.conv1.weight, 9 * 44), (member.layer4[1].conv2.weight, 9 * 352)):
        assert spread(weight) == pytest.approx(math.sqrt(2 / fan_out), rel=5 / math.sqrt(2 * weight.numel()))


def test_the_generators_of_other_devices_are_left_alone(monkeypatch):
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    state = torch.random.get_rng_state()
    divided(timm.create_model("resnet20"))
    assert not seeded
    assert not torch.equal(state, torch.random.get_rng_state())  # by the one number that the seeds follow from


def test_a_builder_with_other_settings_still_tells_the_initialisers():
    """A rate of dropout makes it another network than the builder's, with the same initialisers."""
    source = trained(timm.create_model("resnet20", drop_rate=0.1))
    member = members(divided(source))[0]
    assert not member.layer1[0].bn3.weight.any()


def test_every_network_has_its_own_weights_and_the_seed_decides():
    source = CifarResNet(resnet(11, base=16))
    models = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        models.append(divided(source, 3))
    weights = [[member.layer1[0].conv2.weight for member in members(model)] for model in models]
    assert all(torch.equal(one, other) for one, other in zip(weights[0], weights[1], strict=True))
    several = [*weights[0], weights[2][0]]
    assert not any(torch.equal(one, other) for i, one in enumerate(several) for other in several[:i])


def test_a_seed_gives_the_same_weights_in_another_process():
    """The order of drawing is that of the network, not that of a set of names, which every process has its own of."""
    command = (
        "import hashlib, torch, torchvision, surgery; torch.manual_seed(3); "
        "model = surgery.convert(torchvision.models.resnet18(num_classes=10), 'divided', input_size=32); "
        "print(hashlib.sha256(model.members[0].fc.bias.detach().numpy().tobytes()).hexdigest())"
    )
    found = set()
    for seed in "12":
        environment = {**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, "-c", command], env=environment, capture_output=True, check=True)
        found.add(done.stdout)
    assert len(found) == 1


def test_the_dtype_and_the_source_are_left_alone():
    source = trained(CifarResNet(resnet(11, base=16)).double())
    before = {name: value.clone() for name, value in source.state_dict().items()}
    model = divided(source)
    assert {value.dtype for value in model.parameters()} == {torch.float64}
    assert all(torch.equal(value, before[name]) for name, value in source.state_dict().items())


@pytest.mark.parametrize("init", ["fresh", "sliced"])
def test_loading_gives_the_weights_back_and_moves_no_random_state(init, tmp_path):
    model = divided(timm.create_model("resnet20"), init=init)
    surgery.save(model, tmp_path / "two.safetensors")
    state = torch.random.get_rng_state()
    loaded = surgery.load(tmp_path / "two.safetensors")
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())


# --- slices ---


def test_the_first_takes_the_first_channels_and_the_last_the_last():
    """Base 16 -> 12: channels 0 to 11 and 4 to 15; of 64 outer ones 0 to 47 and 16 to 63."""
    source = trained(timm.create_model("resnet20"))
    torch.manual_seed(3)
    for value in source.parameters():
        nn.init.normal_(value)
    for member, (thin, wide) in zip(
        members(divided(source, init="sliced")), ((slice(12), slice(48)), (slice(4, 16), slice(16, 64))), strict=True
    ):
        ours, theirs = member.layer1[1], source.layer1[1]
        assert torch.equal(member.conv1.weight, source.conv1.weight[thin])
        assert torch.equal(ours.conv1.weight, theirs.conv1.weight[thin, wide])
        assert torch.equal(ours.conv2.weight, theirs.conv2.weight[thin, thin])
        assert torch.equal(ours.conv3.weight, theirs.conv3.weight[wide, thin])
        assert torch.equal(ours.bn3.bias, theirs.bn3.bias[wide])
        assert torch.equal(ours.bn3.running_mean, theirs.bn3.running_mean[wide])
        last = slice(192) if thin == slice(12) else slice(64, 256)
        assert torch.equal(member.fc.weight, source.fc.weight[:, last])
        assert torch.equal(member.fc.bias, source.fc.bias)


def test_slices_of_groups_are_whole_groups():
    """8 groups of 4 -> two networks of 4 groups: 0 to 3 and 4 to 7, so each group is in exactly one."""
    source = trained(timm.create_model("resnext29_8x4d"))
    torch.manual_seed(3)
    for value in source.parameters():
        nn.init.normal_(value)
    for index, member in enumerate(members(divided(source, init="sliced"))):
        mine = slice(16 * index, 16 * index + 16)
        assert torch.equal(member.layer1[0].conv2.weight, source.layer1[0].conv2.weight[mine])
        assert torch.equal(member.layer1[0].conv1.weight, source.layer1[0].conv1.weight[mine])
        assert torch.equal(member.layer1[0].conv3.weight, source.layer1[0].conv3.weight[:, mine])


def test_the_slices_of_three_begin_evenly():
    """Base 16 -> 16 / sqrt(3) = 9.2 -> 10 channels: from 0, 3 and 6."""
    source = trained(timm.create_model("resnet20"))
    nn.init.normal_(source.conv1.weight)
    for member, start in zip(members(divided(source, 3, init="sliced")), (0, 3, 6), strict=True):
        assert torch.equal(member.conv1.weight, source.conv1.weight[start : start + 10])


# --- rates of dropout ---


def test_rates_are_divided_by_the_root():
    """0.2 / sqrt(4), at every block by its own."""
    source = timm.create_model("resnet18", drop_rate=0.2, drop_path_rate=0.3)
    before = [block.drop_path.drop_prob for block in source.layer4]
    member = members(divided(source, 4))[0]
    assert [block.drop_path.drop_prob for block in member.layer4] == pytest.approx([p / 2 for p in before])
    assert before[-1] == pytest.approx(0.3)
    [dropout] = [node for node in member.graph.nodes if getattr(node.target, "__name__", "") == "dropout"]
    assert dropout.kwargs["p"] == pytest.approx(0.1)
