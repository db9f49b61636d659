import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import fx, nn

import surgery
from surgery.errors import InvalidOption
from surgery.models import LAYOUTS, AppendChannels, PreActLayout, PreActResNeXt, preact_resnext

TINY = preact_resnext(4, 2, depth=20, width=8)
TINY_LARGE = preact_resnext(3, 2, depth=14, width=6, widths=(1, 2, 4, 4), stem="imagenet")
NAMES = [name for name, layout in LAYOUTS.items() if isinstance(layout, PreActLayout)]


def shaken(layout: PreActLayout, **options) -> PreActResNeXt:
    """Float64 network whose every parameter and statistic matters."""
    model = PreActResNeXt(layout, **options).double()
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


def normed(x, weights, name, *, training):
    """Normalize by the statistics of the batch or the stored ones, scale, shift, cut at zero."""
    mean, var = x.mean(dim=(0, 2, 3)), x.var(dim=(0, 2, 3), unbiased=False)
    if not training:
        mean, var = weights[f"{name}.running_mean"], weights[f"{name}.running_var"]
    scale = weights[f"{name}.weight"] / (var + 1e-5).sqrt()
    return ((x - mean[:, None, None]) * scale[:, None, None] + weights[f"{name}.bias"][:, None, None]).clamp(min=0)


def literal(weights, x, *, branches, stages, blocks, imagenet=False, training=False):
    """Compute the network from its weights alone, branch by branch, as section 2.2 and appendix B write it."""
    x = F.conv2d(x, weights["conv1.weight"], stride=2 if imagenet else 1, padding=3 if imagenet else 1)
    x = F.max_pool2d(x, 3, stride=2, padding=1) if imagenet else x
    for stage in range(1, stages + 1):
        if stage > 1:
            x = (x[..., ::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, ::2] + x[..., 1::2, 1::2]) / 4
            wanted = weights[f"layer{stage}.0.conv1.weight"].shape[1]
            x = torch.cat([x, torch.zeros(len(x), wanted - x.shape[1], *x.shape[2:], dtype=x.dtype)], dim=1)
        for block in range(blocks):
            path = f"layer{stage}.{block}"
            first = F.conv2d(normed(x, weights, f"{path}.bn1", training=training), weights[f"{path}.conv1.weight"])
            second = normed(first, weights, f"{path}.bn2", training=training).chunk(branches, dim=1)
            filters = weights[f"{path}.conv2.weight"].chunk(branches)
            third = [F.conv2d(part, weight, padding=1) for part, weight in zip(second, filters, strict=True)]
            third = normed(torch.cat(third, dim=1), weights, f"{path}.bn3", training=training).chunk(branches, dim=1)
            columns = weights[f"{path}.conv3.weight"].chunk(branches, dim=1)
            for part, weight in zip(third, columns, strict=True):
                x = x + F.conv2d(part, weight)
    pooled = normed(x, weights, "norm", training=training).mean(dim=(2, 3))
    return pooled @ weights["fc.weight"].T + weights["fc.bias"]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    ("layout", "side", "written"),
    [
        (TINY, 16, {"branches": 4, "stages": 3, "blocks": 2}),
        (TINY_LARGE, 64, {"branches": 3, "stages": 4, "blocks": 1, "imagenet": True}),
    ],
    ids=["cifar", "imagenet"],
)
def test_network_equals_its_definition_written_out(layout, side, written, training):
    model = shaken(layout).train(training)
    images = torch.randn(3, 3, side, side, dtype=torch.float64)
    expected = literal(copy.deepcopy(model.state_dict()), images, training=training, **written)
    torch.testing.assert_close(model(images), expected, rtol=1e-10, atol=1e-10)


def test_zero_channels_are_appended_behind_the_others():
    """Two channels become five: 1..8 stay where they are, three of zeros follow."""
    x = torch.arange(1.0, 9.0, dtype=torch.float64).reshape(1, 2, 2, 2)
    module = AppendChannels(2, 5)
    assert (module.inputs, module.outputs, repr(module)) == (2, 5, "AppendChannels(2, 5)")
    assert module(x).flatten().tolist() == [1, 2, 3, 4, 5, 6, 7, 8] + 12 * [0]


def test_scales_are_pooled_and_widened_without_a_weight():
    """Averages of 2x2 pixels, then zeros; the fourth scale of the ImageNet layout is as wide as the third."""
    model = PreActResNeXt(TINY_LARGE).double()
    transitions = [module for name, module in model.named_children() if name.startswith("down")]
    assert [[type(part) for part in transition] for transition in transitions] == [
        [nn.AvgPool2d, AppendChannels],
        [nn.AvgPool2d, AppendChannels],
        [nn.AvgPool2d],
    ]
    assert [(t[1].inputs, t[1].outputs) for t in transitions[:2]] == [(6, 12), (12, 24)]
    assert not any(list(transition.parameters()) for transition in transitions)
    x = torch.arange(24.0, dtype=torch.float64).reshape(1, 6, 2, 2)
    assert transitions[0](x).flatten().tolist() == [1.5, 5.5, 9.5, 13.5, 17.5, 21.5] + 6 * [0]


def test_network_is_its_layout_written_out():
    """Width 8, four branches of 2: inner widths 8, 16, 32 in four groups, features of 8, 16, 32 channels."""
    shapes = {
        name: tuple(module.weight.shape)
        for name, module in PreActResNeXt(preact_resnext(4, 2, depth=11, width=8)).named_modules()
        if isinstance(module, nn.Conv2d)
    }
    assert shapes == {
        "conv1": (8, 3, 3, 3),
        "layer1.0.conv1": (8, 8, 1, 1),
        "layer1.0.conv2": (8, 2, 3, 3),
        "layer1.0.conv3": (8, 8, 1, 1),
        "layer2.0.conv1": (16, 16, 1, 1),
        "layer2.0.conv2": (16, 4, 3, 3),
        "layer2.0.conv3": (16, 16, 1, 1),
        "layer3.0.conv1": (32, 32, 1, 1),
        "layer3.0.conv2": (32, 8, 3, 3),
        "layer3.0.conv3": (32, 32, 1, 1),
    }


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("preresnext29_8x4d", 340_810),
        ("preresnext65_8x4d", 788_810),
        ("preresnext47_24x4d", 2_325_610),
        ("preresnext62_40x4d", 11_256_200),
        ("preresnext20_8x2d", 59_306),
        ("preresnext29_8x2d", 87_754),
    ],
)
def test_parameters_are_those_of_the_layers(name, parameters):
    """A block of features w and inner width d in C groups of b: w d + 9 d b + d w, norms of 2 (w + 2 d).

    preresnext29_8x4d: stem 27 * 64 = 1728; w = 64, d = 32, b = 4: 2048 + 1152 + 2048 + 256 = 5504, three of them; next
    scale, twice as wide: 8192 + 4608 + 8192 + 512 = 21504; next: 32768 + 18432 + 32768 + 1024 = 84992; norm 512, head
    2570. 1728 + 3 (5504 + 21504 + 84992) + 512 + 2570 = 340810; with seven blocks a scale 788810.
    """
    layout, classes = LAYOUTS[name], 1000 if name == "preresnext62_40x4d" else 10
    total = (147 if layout.stem == "imagenet" else 27) * layout.width
    for factor in layout.widths:
        w, d, b = layout.width * factor, layout.groups * layout.branch * factor, layout.branch * factor
        total += layout.blocks * (2 * w * d + 9 * d * b + 2 * (w + 2 * d))
    last = layout.width * layout.widths[-1]
    assert total + 2 * last + last * classes + classes == parameters
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.parametrize(
    ("name", "blocks", "branches", "stages"),
    [
        ("preresnext29_8x4d", 9, 8, 3),
        ("preresnext65_8x4d", 21, 8, 3),
        ("preresnext47_24x4d", 15, 24, 3),
        ("preresnext62_40x4d", 20, 40, 4),
        ("preresnext20_8x2d", 6, 8, 3),
        ("preresnext29_8x2d", 9, 8, 3),
    ],
)
def test_every_block_is_recognised_and_none_refused(name, blocks, branches, stages):
    with torch.device("meta"):
        model = timm.create_model(name)
    found = surgery.inspect(model)
    assert [stage.name for stage in found.stages] == [f"layer{number + 1}" for number in range(stages)]
    assert [len(stage.blocks) for stage in found.stages] == stages * [blocks // stages]
    assert {(block.kind, block.cardinality, block.projected) for block in found.blocks} == {
        ("grouped", branches, False)
    }
    assert all(block.split and block.merge and block.is_residual for block in found.blocks)
    assert found.refusals == ()
    assert found.head.path == "fc"


def test_depth_is_three_layers_a_block_and_two():
    """The names count as the paper: 3 L + 2 layers of 9, 21, 15, 20 and 6 blocks."""
    for name in NAMES:
        layout = LAYOUTS[name]
        depth = int(name.removeprefix("preresnext").partition("_")[0])
        assert 3 * layout.blocks * len(layout.widths) + 2 == depth
        assert name.endswith(f"_{layout.groups}x{layout.branch}d")


def test_blocks_leave_their_input_alone():
    model = shaken(TINY)
    x = torch.randn(2, 8, 8, 8, dtype=torch.float64)
    before = x.clone()
    assert not torch.equal(model.layer1[0](x), x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("layout", [TINY, TINY_LARGE], ids=["cifar", "imagenet"])
def test_gradient_checkpointing_changes_no_gradient(layout):
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64, requires_grad=True)
    plain = shaken(layout)
    checkpointed = copy.deepcopy(plain)
    checkpointed.set_grad_checkpointing()
    assert torch.equal(plain(images), checkpointed(images))
    for model in (plain, checkpointed):
        model(images).square().sum().backward()
    for ours, theirs in zip(checkpointed.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12)


def test_gradient_checkpointing_computes_every_block_twice():
    model = shaken(TINY)
    calls = []
    for block in model.layer2:
        block.conv2.register_forward_hook(lambda *_: calls.append(None))
    for enabled, expected in ((False, 2), (True, 4)):
        model.set_grad_checkpointing(enabled)
        calls.clear()
        model(torch.randn(2, 3, 16, 16, dtype=torch.float64, requires_grad=True)).sum().backward()
        assert len(calls) == expected


def test_symbolic_trace_computes_the_same():
    model = shaken(TINY, drop_rate=0.5)
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    for training in (True, False):
        traced = fx.symbolic_trace(copy.deepcopy(model.train(training)))
        torch.manual_seed(1)
        expected = model(images)
        torch.manual_seed(1)
        assert torch.equal(traced(images), expected)


def test_reset_classifier_changes_the_head_alone():
    model = shaken(TINY).eval()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    features = model.forward_features(images)
    torch.testing.assert_close(model(images), model.fc(features.mean(dim=(2, 3))), rtol=1e-10, atol=1e-12)
    model.reset_classifier(7)
    assert model.num_classes == 7
    assert model.get_classifier() is model.fc
    assert model.fc.weight.dtype == torch.float64
    assert not model.fc.training
    assert model(images).shape == (2, 7)
    assert torch.equal(model.fc.bias, torch.zeros(7, dtype=torch.float64))
    assert torch.equal(model.forward_features(images), features)

    model.reset_classifier(0, global_pool="max")
    assert torch.equal(model(images), features.amax(dim=(2, 3)))
    model.reset_classifier(0, global_pool="")
    assert torch.equal(model(images), features)


def test_convolutions_start_as_he_et_al_and_the_classifier_near_uniform():
    """Standard deviation sqrt(2 / (outputs a group * k * k)): 64 stem channels of 3x3 give sqrt(2 / 576)."""
    torch.manual_seed(0)
    model = PreActResNeXt(preact_resnext(8, 4, width=64))
    for path, expected in (("conv1", (2 / 576) ** 0.5), ("layer3.0.conv1", (2 / 128) ** 0.5)):
        weight = model.get_submodule(path).weight
        assert abs(weight.std() / expected - 1) < 0.1  # 1728 and 32768 draws
    assert model.fc.weight.std() < 2e-3


def test_timm_arguments_are_understood():
    model = timm.create_model("preresnext20_8x2d", num_classes=3, in_chans=1, global_pool="catavgmax", drop_rate=0.25)
    assert isinstance(model, PreActResNeXt)
    assert (model.num_classes, model.fc.in_features, model.conv1.in_channels, model.head_drop.p) == (3, 256, 1, 0.25)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 3)


def test_default_configurations_are_those_of_the_data():
    config = timm.get_pretrained_cfg("preresnext62_40x4d")
    assert (config.num_classes, config.input_size, config.crop_pct) == (1000, (3, 224, 224), 0.875)
    config = timm.get_pretrained_cfg("preresnext47_24x4d")
    assert (config.num_classes, config.input_size, config.crop_pct) == (10, (3, 32, 32), 1.0)


def test_features_only_gives_the_stem_and_every_stage():
    small = timm.create_model("preresnext20_8x2d", features_only=True)
    assert small.feature_info.channels() == [32, 32, 64, 128]
    assert small.feature_info.reduction() == [1, 1, 2, 4]
    shapes = [tuple(feature.shape[1:]) for feature in small(torch.randn(1, 3, 32, 32))]
    assert shapes == [(32, 32, 32), (32, 32, 32), (64, 16, 16), (128, 8, 8)]
    with torch.device("meta"):
        large = timm.create_model("preresnext62_40x4d", features_only=True)
        features = large(torch.empty(1, 3, 224, 224))
    assert large.feature_info.reduction() == [4, 4, 8, 16, 32]
    assert [tuple(feature.shape[1:]) for feature in features] == [
        (160, 56, 56),
        (160, 56, 56),
        (320, 28, 28),
        (640, 14, 14),
        (640, 7, 7),
    ]


def test_layer_decay_groups_follow_the_blocks():
    model = timm.create_model("preresnext20_8x2d")
    groups = timm.models.group_parameters(model, model.group_matcher())
    named = {index: sorted({name.rsplit(".", 1)[0] for name in names}) for index, names in groups.items()}
    assert named[0] == ["conv1"]
    assert all(name.startswith("layer1.0.") for name in named[1])
    assert named[max(named)] == ["fc", "norm"]
    assert len(named) == 8
    coarse = timm.models.group_parameters(model, model.group_matcher(coarse=True))
    assert len(coarse) == 5


@pytest.mark.parametrize(
    ("describe", "message"),
    [
        (lambda: preact_resnext(8, 4, depth=30), "depth=30, expected 2 \\+ 9 \\* blocks; choose 29 or 38"),
        (
            lambda: preact_resnext(8, 4, depth=29, widths=(1, 2, 4, 4)),
            "depth=29, expected 2 \\+ 12 \\* blocks; choose 26 or 38",
        ),
        (lambda: preact_resnext(0, 4), "groups=0, expected at least 1"),
        (lambda: preact_resnext(8, 0), "branch=0, expected at least 1"),
        (lambda: preact_resnext(8, 4, width=0), "width=0, expected at least 1"),
        (lambda: preact_resnext(8, 4, widths=(1, 4, 2)), "widths=\\(1, 4, 2\\), expected factors from 1 upwards"),
        (lambda: preact_resnext(8, 4, widths=(2, 4, 8)), "widths=\\(2, 4, 8\\), expected factors from 1 upwards"),
        (lambda: PreActLayout(1, 8, 2, 4, widths=()), "widths=\\(\\), expected factors from 1 upwards"),
        (lambda: PreActLayout(1, 8, 2, 4, stem="large"), "stem='large', expected cifar or imagenet"),
    ],
)
def test_impossible_layouts_are_refused(describe, message):
    with pytest.raises(InvalidOption, match=message):
        describe()
