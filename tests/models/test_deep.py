import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import fx, nn

import surgery
from surgery.errors import InvalidOption
from surgery.models import LAYOUTS, DeepLayout, DeepResNet, deep_resnet

PLAIN = DeepLayout((1, 2), hidden=8, output=16, stem=(4, 6, 8))
SQUEEZED = DeepLayout((1, 2), hidden=8, output=16, groups=4, stem=(4, 4, 4), reduction=8)
TINY = {"plain": PLAIN, "grouped, squeeze-excite": SQUEEZED}
NAMES = [name for name, layout in LAYOUTS.items() if isinstance(layout, DeepLayout)]


def shaken(layout: DeepLayout, **options) -> DeepResNet:
    """Float64 network whose every parameter and statistic matters."""
    model = DeepResNet(layout, **{"num_classes": 7, **options}).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(std=0.1)
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
        elif isinstance(module, nn.Linear):
            module.weight.data.normal_()
            module.bias.data.normal_()
    return model


def normed(x, weights, name):
    """Normalize by the stored statistics, scale and shift."""
    scale = weights[f"{name}.weight"] / (weights[f"{name}.running_var"] + 1e-5).sqrt()
    centred = x - weights[f"{name}.running_mean"][:, None, None]
    return centred * scale[:, None, None] + weights[f"{name}.bias"][:, None, None]


def block_of(weights, x, path, *, stride, groups):
    """Compute one block from its weights: the stride on the 3x3, the shortcut averaged before it is projected."""
    body = normed(F.conv2d(x, weights[f"{path}.conv1.weight"]), weights, f"{path}.bn1").clamp(min=0)
    body = F.conv2d(body, weights[f"{path}.conv2.weight"], stride=stride, padding=1, groups=groups)
    body = F.conv2d(normed(body, weights, f"{path}.bn2").clamp(min=0), weights[f"{path}.conv3.weight"])
    body = normed(body, weights, f"{path}.bn3")
    if f"{path}.se.fc1.weight" in weights:
        inside = F.conv2d(body.mean(dim=(2, 3), keepdim=True), weights[f"{path}.se.fc1.weight"])
        inside = (inside + weights[f"{path}.se.fc1.bias"][:, None, None]).clamp(min=0)
        outside = F.conv2d(inside, weights[f"{path}.se.fc2.weight"]) + weights[f"{path}.se.fc2.bias"][:, None, None]
        body = body / (1 + torch.exp(-outside))
    if f"{path}.downsample.conv.weight" in weights:
        if stride == 2:
            x = (x[..., ::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, ::2] + x[..., 1::2, 1::2]) / 4
        x = normed(F.conv2d(x, weights[f"{path}.downsample.conv.weight"]), weights, f"{path}.downsample.bn")
    return (x + body).clamp(min=0)


@pytest.mark.parametrize("layout", TINY.values(), ids=TINY)
def test_network_equals_its_definition_written_out(layout):
    model = shaken(layout).eval()
    weights = model.state_dict()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    x = images
    for number, stride in ((1, 2), (2, 1), (3, 1)):
        x = F.conv2d(x, weights[f"stem.conv{number}.weight"], stride=stride, padding=1)
        x = normed(x, weights, f"stem.bn{number}").clamp(min=0)
    x = F.max_pool2d(x, 3, stride=2, padding=1)
    for path, stride in (("layer1.0", 1), ("layer2.0", 2), ("layer2.1", 1)):
        x = block_of(weights, x, path, stride=stride, groups=layout.groups)
    assert x.shape == (2, 32, 4, 4)
    expected = x.mean(dim=(2, 3)) @ weights["fc.weight"].T + weights["fc.bias"]
    torch.testing.assert_close(model(images), expected, rtol=1e-10, atol=1e-10)


def test_shortcuts_of_odd_images_average_what_is_there():
    """1..9 in a 3x3 image, identity weights, eps 0: rounded up, the averages of {1,2,4,5}, {3,6}, {7,8}, {9}."""
    shortcut = DeepResNet(PLAIN).layer2[0].downsample
    shortcut.conv, shortcut.bn = nn.Conv2d(1, 1, 1, bias=False), nn.BatchNorm2d(1, eps=0.0)
    nn.init.ones_(shortcut.conv.weight)
    image = torch.arange(1.0, 10.0, dtype=torch.float64).reshape(1, 1, 3, 3)
    assert shortcut.double().eval()(image).flatten().tolist() == [3.0, 4.5, 7.5, 9.0]


def test_network_is_its_layout_written_out():
    """Stem 4, 6, 8; 3x3 widths 8, 16; outputs 16, 32; projections where the width or the stride changes."""
    shapes = {
        name: tuple(module.weight.shape)
        for name, module in DeepResNet(PLAIN).named_modules()
        if isinstance(module, nn.Conv2d)
    }
    assert shapes == {
        "stem.conv1": (4, 3, 3, 3),
        "stem.conv2": (6, 4, 3, 3),
        "stem.conv3": (8, 6, 3, 3),
        "layer1.0.conv1": (8, 8, 1, 1),
        "layer1.0.conv2": (8, 8, 3, 3),
        "layer1.0.conv3": (16, 8, 1, 1),
        "layer1.0.downsample.conv": (16, 8, 1, 1),
        "layer2.0.conv1": (16, 16, 1, 1),
        "layer2.0.conv2": (16, 16, 3, 3),
        "layer2.0.conv3": (32, 16, 1, 1),
        "layer2.0.downsample.conv": (32, 16, 1, 1),
        "layer2.1.conv1": (16, 32, 1, 1),
        "layer2.1.conv2": (16, 16, 3, 3),
        "layer2.1.conv3": (32, 16, 1, 1),
    }


@pytest.mark.parametrize(
    ("name", "stages", "kind", "branches"),
    [
        ("resnet50_deep", (3, 4, 6, 3), "plain", (64, 128, 256, 512)),
        ("wrn_50_2", (3, 4, 6, 3), "plain", (128, 256, 512, 1024)),
        ("wrn_50_3", (3, 4, 6, 3), "plain", (192, 384, 768, 1536)),
        ("resnext101_64x4d_deep", (3, 4, 23, 3), "grouped", (64, 64, 64, 64)),
        ("seresnext101_64x4d_deep", (3, 4, 23, 3), "grouped", (64, 64, 64, 64)),
    ],
)
def test_every_block_is_recognised_and_none_refused(name, stages, kind, branches):
    assert name in NAMES
    with torch.device("meta"):
        model = timm.create_model(name)
    found = surgery.inspect(model)
    assert tuple(len(stage.blocks) for stage in found.stages) == stages
    assert [{(block.kind, block.cardinality) for block in stage.blocks} for stage in found.stages] == [
        {(kind, count)} for count in branches
    ]
    assert [sum(block.projected for block in stage.blocks) for stage in found.stages] == [1, 1, 1, 1]
    assert found.refusals == ()
    assert found.head.path == "fc"


@pytest.mark.parametrize("layout", TINY.values(), ids=TINY)
def test_blocks_start_as_their_shortcut_unless_told_otherwise(layout):
    features = torch.randn(2, 16, 8, 8)
    for zeroed in (True, False):
        block = DeepResNet(layout, zero_init_last=zeroed).layer2[0].eval()
        body_is_nothing = torch.equal(block(features), block.downsample(features).relu())
        assert body_is_nothing is zeroed


def test_convolutions_start_as_he_et_al_and_the_classifier_near_uniform():
    """Standard deviation sqrt(2 / (outputs * k * k)): 128 stem channels of 3x3 give sqrt(2 / 1152)."""
    torch.manual_seed(0)
    model = DeepResNet(DeepLayout((1, 1), hidden=64))
    for path, expected in (("stem.conv3", (2 / 1152) ** 0.5), ("layer2.0.conv1", (2 / 128) ** 0.5)):
        assert abs(model.get_submodule(path).weight.std() / expected - 1) < 0.1  # 73728 and 32768 draws
    assert abs(model.fc.weight.std() / 1e-3 - 1) < 0.1  # 512000 draws
    assert not model.fc.bias.any()


@pytest.mark.parametrize("layout", TINY.values(), ids=TINY)
def test_gradient_checkpointing_changes_no_gradient(layout):
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64, requires_grad=True)
    plain = shaken(layout)
    checkpointed = copy.deepcopy(plain)
    checkpointed.set_grad_checkpointing()
    calls = []
    checkpointed.layer2[1].conv2.register_forward_hook(lambda *_: calls.append(None))
    for model in (plain, checkpointed):
        model(images).square().sum().backward()
    assert len(calls) == 2
    for ours, theirs in zip(checkpointed.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("layout", TINY.values(), ids=TINY)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_symbolic_trace_computes_the_same(layout, training):
    model = shaken(layout, drop_rate=0.5).train(training)
    traced = fx.symbolic_trace(copy.deepcopy(model))
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.manual_seed(1)
    expected = model(images)
    torch.manual_seed(1)
    assert torch.equal(traced(images), expected)


def test_reset_classifier_changes_the_head_alone():
    model = shaken(PLAIN).eval()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    features = model.forward_features(images)
    assert torch.equal(model.forward_head(features, pre_logits=True), features.mean(dim=(2, 3)))
    model.reset_classifier(5)
    assert (model.num_classes, model(images).shape) == (5, (2, 5))
    assert model.get_classifier() is model.fc
    assert model.fc.weight.dtype == torch.float64
    assert model.fc.weight.std() < 2e-3
    assert not model.fc.training
    assert torch.equal(model.forward_features(images), features)

    model.reset_classifier(0, global_pool="max")
    assert torch.equal(model(images), features.amax(dim=(2, 3)))
    model.reset_classifier(0, global_pool="")
    assert torch.equal(model(images), features)


@pytest.mark.parametrize("name", NAMES)
def test_default_configurations_are_those_of_imagenet(name):
    config = timm.get_pretrained_cfg(name)
    assert (config.num_classes, config.input_size, config.first_conv) == (1000, (3, 224, 224), "stem.conv1")
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=3, in_chans=1)
    assert model.get_submodule(config.first_conv).in_channels == 1
    assert (model.num_classes, model.get_submodule(config.classifier).out_features) == (3, 3)


def test_features_only_gives_the_stem_and_every_stage():
    with torch.device("meta"):
        model = timm.create_model("wrn_50_2", features_only=True)
        features = model(torch.empty(1, 3, 224, 224))
    assert model.feature_info.reduction() == [4, 4, 8, 16, 32]
    assert [tuple(feature.shape[1:]) for feature in features] == [
        (128, 56, 56),
        (256, 56, 56),
        (512, 28, 28),
        (1024, 14, 14),
        (2048, 7, 7),
    ]


def test_layer_decay_groups_follow_the_blocks():
    model = DeepResNet(PLAIN)
    groups = timm.models.group_parameters(model, model.group_matcher())
    first = {index: {name.partition(".")[0] for name in names} for index, names in groups.items()}
    assert first == {0: {"stem"}, 1: {"layer1"}, 2: {"layer2"}, 3: {"layer2"}, 4: {"fc"}}
    assert len(timm.models.group_parameters(model, model.group_matcher(coarse=True))) == 4


@pytest.mark.parametrize(
    ("describe", "message"),
    [
        (lambda: deep_resnet(29), "depth=29, expected 50 or 101"),
        (lambda: deep_resnet(50, width=0), "hidden=0.*numbers of at least 1; choose larger"),
        (lambda: DeepLayout((), hidden=64), "blocks=\\(\\).*expected one stage or more"),
        (lambda: DeepLayout((1, 0), hidden=64), "blocks=\\(1, 0\\).*numbers of at least 1; choose larger"),
        (lambda: deep_resnet(50, stem=(64, 64, 0)), "stem=\\(64, 64, 0\\).*numbers of at least 1; choose larger"),
        (lambda: DeepLayout((1,), hidden=10, groups=4), "hidden=10 with groups=4, expected a multiple"),
        (lambda: deep_resnet(50, reduction=257), "reduction=257, expected 1 to the 256 channels"),
        (lambda: deep_resnet(50, reduction=0), "reduction=0, expected 1 to the 256 channels"),
    ],
)
def test_impossible_layouts_are_refused(describe, message):
    with pytest.raises(InvalidOption, match=message):
        describe()
