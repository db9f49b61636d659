import copy

import pytest
import timm
import torch
from torch import fx, nn

from surgery.errors import InvalidOption
from surgery.models import LAYOUTS, CifarResNet, DeepLayout, Layout, resnet, resnext, wide_resnet

TINY = {
    "resnext, pooled shortcut": resnext(4, 2, depth=11, base=4),
    "resnext, strided shortcut, no classifier bias": resnext(
        2, 3, depth=20, base=4, shortcut="stride", classifier_bias=False
    ),
    "wide resnet": wide_resnet(10, 1),
    "resnet": resnet(20, base=4),
    "squeeze-excite resnet": resnet(20, base=4, reduction=4),
}


def shaken(layout: Layout, **options) -> CifarResNet:
    """Float64 network whose every parameter and statistic matters."""
    model = CifarResNet(layout, **options).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(std=0.1)
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model


def test_importing_registers_every_layout_with_timm():
    assert set(LAYOUTS) <= set(timm.list_models())
    assert set(LAYOUTS) == set(timm.list_models(module="cifar"))


@pytest.mark.parametrize("name", LAYOUTS)
def test_registered_networks_classify_images_of_their_default_size(name):
    with torch.device("meta"):
        model = timm.create_model(name)
        images = torch.empty(2, *model.pretrained_cfg["input_size"])
    assert model.layout == LAYOUTS[name]
    large = name == "preresnext62_40x4d" or isinstance(model.layout, DeepLayout)
    classes, side = (1000, 7) if large else (10, 8)
    assert model(images).shape == (2, classes)
    assert model.forward_features(images).shape == (2, model.num_features, side, side)


def test_network_is_its_layout_written_out():
    """ResNeXt of one block a stage: stem 4, 3x3 widths 6, 12, 24 in two groups, outputs 16, 32, 64."""
    model = CifarResNet(resnext(2, 3, depth=11, base=4))
    shapes = {
        name: tuple(module.weight.shape) for name, module in model.named_modules() if isinstance(module, nn.Conv2d)
    }
    assert shapes == {
        "conv1": (4, 3, 3, 3),
        "layer1.0.conv1": (6, 4, 1, 1),
        "layer1.0.conv2": (6, 3, 3, 3),
        "layer1.0.conv3": (16, 6, 1, 1),
        "layer1.0.downsample.conv": (16, 4, 1, 1),
        "layer2.0.conv1": (12, 16, 1, 1),
        "layer2.0.conv2": (12, 6, 3, 3),
        "layer2.0.conv3": (32, 12, 1, 1),
        "layer2.0.downsample.conv": (32, 16, 1, 1),
        "layer3.0.conv1": (24, 32, 1, 1),
        "layer3.0.conv2": (24, 12, 3, 3),
        "layer3.0.conv3": (64, 24, 1, 1),
        "layer3.0.downsample.conv": (64, 32, 1, 1),
    }


def test_the_pooled_shortcut_averages_where_the_strided_one_picks():
    """A 3x3 image of 1..9, identity weights, eps 0: rounded up, the averages of {1,2,4,5}, {3,6}, {7,8}, {9}."""
    image = torch.arange(1.0, 10.0, dtype=torch.float64).reshape(1, 1, 3, 3)
    outputs = {}
    for kind in ("pool", "stride"):
        shortcut = CifarResNet(resnext(1, 1, depth=11, base=1, shortcut=kind)).layer2[0].downsample
        shortcut.conv = nn.Conv2d(1, 1, 1, stride=shortcut.conv.stride, bias=False)
        shortcut.bn = nn.BatchNorm2d(1, eps=0.0)
        nn.init.ones_(shortcut.conv.weight)
        outputs[kind] = shortcut.double().eval()(image).flatten().tolist()
    assert outputs == {"pool": [3.0, 4.5, 7.5, 9.0], "stride": [1.0, 3.0, 7.0, 9.0]}


@pytest.mark.parametrize("layout", TINY.values(), ids=TINY)
def test_blocks_start_as_their_shortcut_unless_told_otherwise(layout):
    features = torch.randn(2, layout.output, 8, 8)
    for zeroed in (True, False):
        block = CifarResNet(layout, zero_init_last=zeroed).layer2[0]
        assert torch.equal(block(features), block.downsample(features).relu()) is zeroed


def test_squeeze_excite_scales_the_body_by_its_pooled_channels():
    """Of 16 channels four are left inside: body * sigmoid(W2 relu(W1 mean(body) + b1) + b2), then the shortcut."""
    block = shaken(TINY["squeeze-excite resnet"]).eval().layer1[1]
    assert block.se.fc1.weight.shape == (4, 16, 1, 1)
    x = torch.randn(2, 16, 8, 8, dtype=torch.float64)
    body = block.act1(block.bn1(block.conv1(x)))
    body = block.bn3(block.conv3(block.act2(block.bn2(block.conv2(body)))))
    inside = body.mean(dim=(2, 3)) @ block.se.fc1.weight[:, :, 0, 0].T + block.se.fc1.bias
    outside = inside.clamp(min=0) @ block.se.fc2.weight[:, :, 0, 0].T + block.se.fc2.bias
    scale = 1 / (1 + torch.exp(-outside))
    torch.testing.assert_close(block(x), (x + body * scale[..., None, None]).clamp(min=0), rtol=1e-10, atol=1e-12)


def test_blocks_without_squeeze_excite_have_neither_its_weights_nor_a_setting():
    block = CifarResNet(TINY["resnet"]).layer1[0]
    assert block.se is None
    assert "se" not in vars(block)
    assert not any(".se." in key for key in block.state_dict())


@pytest.mark.parametrize("layout", TINY.values(), ids=TINY)
def test_blocks_leave_their_input_alone(layout):
    model = CifarResNet(layout)
    x = torch.randn(2, layout.stem, 8, 8)
    for block in (*model.layer1, *model.layer2, *model.layer3):
        before = x.clone()
        out = block(x)
        assert torch.equal(x, before)
        x = out


@pytest.mark.parametrize("layout", TINY.values(), ids=TINY)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_symbolic_trace_computes_the_same(layout, training):
    model = shaken(layout, drop_rate=0.5).train(training)
    traced = fx.symbolic_trace(copy.deepcopy(model))
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    torch.manual_seed(1)
    expected = model(images)
    torch.manual_seed(1)
    assert torch.equal(traced(images), expected)


@pytest.mark.parametrize("layout", TINY.values(), ids=TINY)
def test_gradient_checkpointing_changes_no_gradient(layout):
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    plain = shaken(layout)
    checkpointed = copy.deepcopy(plain)
    checkpointed.set_grad_checkpointing()
    for model in (plain, checkpointed):
        model(images).square().sum().backward()
    for ours, theirs in zip(checkpointed.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-14)


def test_forward_is_the_head_on_the_features():
    model = shaken(TINY["resnet"]).eval()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    features = model.forward_features(images)
    pooled = features.mean(dim=(2, 3))
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), pooled, rtol=1e-12, atol=0)
    torch.testing.assert_close(model(images), model.fc(pooled), rtol=1e-10, atol=1e-14)


def test_reset_classifier_changes_the_head_alone():
    model = shaken(TINY["resnext, strided shortcut, no classifier bias"]).eval()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    features = model.forward_features(images)
    model.reset_classifier(7)
    assert model.num_classes == 7
    assert model.get_classifier() is model.fc
    assert model.fc.bias is None
    assert model.fc.weight.dtype == torch.float64
    assert not model.fc.training
    assert model(images).shape == (2, 7)
    assert torch.equal(model.forward_features(images), features)

    model.reset_classifier(0, global_pool="max")
    assert torch.equal(model(images), features.amax(dim=(2, 3)))
    model.reset_classifier(0, global_pool="")
    assert torch.equal(model(images), features)


def test_timm_arguments_are_understood():
    model = timm.create_model("resnext11_4x4d", num_classes=3, in_chans=1, global_pool="catavgmax", drop_rate=0.25)
    assert (model.num_classes, model.fc.in_features, model.conv1.in_channels, model.head_drop.p) == (3, 512, 1, 0.25)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 3)
    config = timm.data.resolve_data_config({}, model=timm.create_model("resnext11_4x4d"))
    assert (config["input_size"], config["crop_pct"]) == ((3, 32, 32), 1.0)


def test_features_only_gives_the_stem_and_the_three_stages():
    model = timm.create_model("resnext11_4x4d", features_only=True)
    assert model.feature_info.channels() == [16, 64, 128, 256]
    assert model.feature_info.reduction() == [1, 1, 2, 4]
    shapes = [tuple(feature.shape[1:]) for feature in model(torch.randn(1, 3, 32, 32))]
    assert shapes == [(16, 32, 32), (64, 32, 32), (128, 16, 16), (256, 8, 8)]


def test_layer_decay_groups_follow_the_blocks():
    model = timm.create_model("wrn_10_1")
    groups = timm.models.group_parameters(model, model.group_matcher())
    named = {index: sorted({name.rsplit(".", 1)[0] for name in names}) for index, names in groups.items()}
    assert named[0] == ["bn1", "conv1"]
    assert all(name.startswith("layer1.0.") for name in named[1])
    assert named[4] == ["fc"]


def test_pretrained_weights_are_refused_by_name():
    with pytest.raises(RuntimeError, match="No pretrained weights exist for resnet20"):
        timm.create_model("resnet20", pretrained=True)


@pytest.mark.parametrize(
    ("describe", "message"),
    [
        (lambda: resnext(8, 64, depth=30), "depth=30, expected 2 \\+ 9 \\* blocks; choose 29 or 38"),
        (lambda: resnet(2), "depth=2, expected 2 \\+ 9 \\* blocks; choose 11 or 20"),
        (lambda: wide_resnet(29, 10), "depth=29, expected 4 \\+ 6 \\* blocks; choose 28 or 34"),
        (lambda: wide_resnet(16, 0), "hidden=0, expected at least 1"),
        (lambda: resnext(0, 4), "hidden=0, expected at least 1"),
        (lambda: Layout("bottleneck", 1, 8, 10, 32, groups=4), "hidden=10 with groups=4"),
        (lambda: Layout("basic", 1, 8, 16, 32), "hidden=16, output=32, groups=1 for basic blocks"),
        (lambda: Layout("basic", 1, 8, 16, 16, reduction=4), "reduction=4 for basic blocks of 16 channels"),
        (lambda: resnet(20, base=4, reduction=17), "reduction=17 for bottleneck blocks of 16 channels"),
        (lambda: resnet(20, reduction=0), "reduction=0 for bottleneck blocks of 64 channels, expected 1 to that many"),
    ],
)
def test_impossible_layouts_are_refused(describe, message):
    with pytest.raises(InvalidOption, match=message):
        describe()
