"""Where gates, skipping and pruning once went wrong, or might."""

import re

import pytest
import timm
import torch
from torch import nn

import surgery
import surgery_gated
from surgery.errors import InvalidOption, NothingConverted
from surgery.testing import tiny_networks, unsettle
from surgery_gated import Stochastic, Threshold, gated_blocks, inference

WIDE = tiny_networks()["wide resnet"]
IMAGES = torch.randn(3, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Single(nn.Module):
    """A residual block with a single convolution."""

    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()

    def forward(self, x):
        return self.relu(self.bn(self.conv(x)) + x)


class Beside(Single):
    """Two convolutions side by side, and a shortcut."""

    def __init__(self, width):
        super().__init__(width)
        self.point = nn.Conv2d(width, width, 1, bias=False)

    def forward(self, x):
        return self.relu(self.bn(self.conv(x)) + self.point(x) + x)


def network(block, width=16):
    torch.manual_seed(0)
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)]
    return unsettle(nn.Sequential(nn.Conv2d(3, width, 3, padding=1), block(width), block(width), *head)).double().eval()


def gated(source, **options):
    return surgery.convert(source, "gated", input_size=32, **options).double().eval()


def close_every_second(model):
    for _, gates in gated_blocks(model):
        parameter = gates.head.bias if gates.dependent else gates.head.logits
        parameter.data[::2, 1] = -3
    return model


def multiplied(model, images):
    for _, gates in gated_blocks(model):
        gates.skipping = False
    out = model(images)
    for _, gates in gated_blocks(model):
        gates.skipping = True
    return out


@pytest.mark.parametrize("dependent", [True, False])
def test_a_convolution_between_tied_spaces_reads_all_that_is_open_before_it(dependent):
    model = close_every_second(gated(network(Single), granularity="channel", dependent=dependent))
    with torch.no_grad():
        for images in (IMAGES[:1], IMAGES):
            torch.testing.assert_close(model(images), multiplied(model, images), rtol=1e-10, atol=0)


def test_a_body_with_convolutions_side_by_side_is_refused_for_channels_only():
    with pytest.raises(NothingConverted, match="computes beside the convolutions of its body"):
        gated(network(Beside), granularity="channel")
    model = close_every_second(gated(network(Beside)))
    with torch.no_grad():
        torch.testing.assert_close(model(IMAGES), multiplied(model, IMAGES), rtol=1e-10, atol=0)


def test_a_stream_whose_activation_makes_something_of_zero_is_kept():
    source = unsettle(timm.create_model("resnet18", act_layer="sigmoid", num_classes=10)).double().eval()
    model = gated(source, granularity="channel", dependent=False)
    for block, gates in gated_blocks(model):
        for module in model.block(block.path).children():
            if getattr(module, "role", "") in ("output", "projection"):
                gates.head.logits.data[int(module.column.max()), 1] = -3
    plan = surgery.plan(model)
    assert not [cut for cut in plan.cuts if cut.kind == "stream"]
    with torch.no_grad():
        torch.testing.assert_close(surgery.prune(model, plan)(IMAGES), model(IMAGES), rtol=1e-10, atol=0)


def test_live_gates_are_pruned_at_their_own_threshold_only():
    model = gated(WIDE())
    message = re.escape("tau=0.8, but the gates that stay go on with Threshold(tau=0.5)")
    with pytest.raises(InvalidOption, match=message):
        surgery.plan(model, tau=0.8, images=IMAGES)
    surgery_gated.set_inference(model, Threshold(0.8))
    assert surgery.plan(model, tau=0.8, images=IMAGES).criteria == {"tau": 0.8}


def test_the_threshold_is_in_the_file(tmp_path):
    model = gated(WIDE())
    surgery_gated.set_inference(model, Threshold(0.8))
    surgery.save(model, tmp_path / "gated.safetensors", factory=WIDE)
    loaded = surgery.load(tmp_path / "gated.safetensors", factory=WIDE)
    assert {gates.mode for _, gates in gated_blocks(loaded)} == {Threshold(0.8)}


def test_drawn_gates_keep_their_gradient_in_eval_mode():
    model = gated(WIDE())
    with inference(model, Stochastic()):
        model(IMAGES).sum().backward()
    assert all(gates.head.bias.grad is not None for _, gates in gated_blocks(model))


@pytest.mark.parametrize("granularity", ["layer", "channel"])
@pytest.mark.parametrize("dependent", [True, False])
def test_an_empty_batch_passes(granularity, dependent):
    model = close_every_second(gated(WIDE(), granularity=granularity, dependent=dependent))
    with torch.no_grad():
        assert model(IMAGES[:0]).shape == (0, 10)


def test_a_single_image_can_be_trained_on():
    model = gated(WIDE()).train()
    statistics = [gates.head.norm.running_mean.clone() for _, gates in gated_blocks(model)]
    model(IMAGES[:1]).sum().backward()
    after = [gates.head.norm.running_mean for _, gates in gated_blocks(model)]
    assert all(torch.equal(a, b) for a, b in zip(after, statistics, strict=True))
    model(IMAGES).sum().backward()
    assert not any(torch.equal(a, b) for a, b in zip(after, statistics, strict=True))


def test_a_batch_of_a_loader_can_be_planned_with():
    model = close_every_second(gated(WIDE(), granularity="channel"))
    labels = torch.zeros(len(IMAGES), dtype=torch.long)
    assert surgery.plan(model, images=(IMAGES, labels)) == surgery.plan(model, images=[IMAGES[:2], IMAGES[2:]])


def test_hooks_of_any_kind_see_every_channel():
    model = close_every_second(gated(WIDE(), granularity="channel"))
    widths = set()
    conv = model.get_submodule(next(gated_blocks(model))[0].convs[0])
    handle = conv.register_full_backward_hook(lambda module, inputs, outputs: widths.add(outputs[0].shape[1]))
    model(IMAGES[:1].requires_grad_()).sum().backward()
    handle.remove()
    assert widths == {conv.out_channels}


def test_a_module_of_the_source_may_have_a_method_called_run():
    class Running(nn.ReLU):
        def run(self):
            raise AssertionError

    source = network(Single)
    source[1].relu = Running()
    model = gated(source)
    with torch.no_grad():
        assert torch.equal(model(IMAGES), source(IMAGES))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: surgery_gated.block_macs(model, "layer1.0", torch.ones(1, 5)), r"expected \(B, 1\)"),
        (lambda model: surgery_gated.network_macs(model, {}), "found no decisions"),
        (lambda model: surgery.plan(model, images=IMAGES, static="no"), "expected True or False"),
        (lambda model: gated(WIDE(), granularity="filter"), "expected Literal"),
    ],
)
def test_wrong_input_is_named(call, message):
    with pytest.raises(InvalidOption, match=message):
        call(gated(WIDE()))


def test_the_rectified_sum_is_that_of_the_product_without_gradients():
    """The activation behind the addition is computed part by part where no gradient is wanted."""
    source = tiny_networks()["torchvision resnext"]().double().eval()
    model = gated(source)
    images = torch.cat([IMAGES, -IMAGES, 2 * IMAGES, 3 * IMAGES])
    for place, (_, gates) in enumerate(gated_blocks(model)):
        # alternating images are six ranges, which are copied one by one; pairs and triples are few
        gates.head = Drawn((torch.arange(12) // (1 + place % 3)) % 2 == 0)
    with torch.no_grad():
        torch.testing.assert_close(model(images), multiplied(model, images), rtol=1e-12, atol=0)
        before = images.clone()
        model(images)
        assert torch.equal(images, before)


class Drawn(nn.Module):
    """Gates that were decided beforehand for each image."""

    def __init__(self, opened):
        super().__init__()
        self.margins = torch.where(opened, 1.0, -1.0)
        self.eval()

    def forward(self, x):
        return torch.stack([torch.zeros_like(self.margins), self.margins], dim=-1)[:, None]
