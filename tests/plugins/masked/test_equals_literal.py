"""Converted networks against their definition, branch by branch in explicit loops, and against their source."""

from __future__ import annotations

import itertools

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import surgery
import surgery_masked
from surgery.models import CifarResNet, resnext
from surgery.testing import tiny_networks, unsettle
from surgery_masked.masks import Masks
from tests.plugins.masked.literal import Literal, Rule

TIGHT = 1e-10
AGGREGATES = ("resnext", "sum", "mean")
NORMS = ("shared", "branch")
RULES = list(itertools.product(AGGREGATES, NORMS, (1, 2, 4)))
EXAMPLES = [("resnext", "shared", 2), ("resnext", "branch", 1), ("sum", "shared", 1), ("mean", "branch", 3)]
BUILDERS = {
    # Two blocks a stage, so that shortcuts are identities and projections in turn.
    "cifar": lambda: CifarResNet(resnext(4, 2, depth=20, base=4, shortcut="stride")),
    "cifar pool": lambda: CifarResNet(resnext(4, 2, depth=20, base=4)),
    "resnext11_4x4d": lambda: timm.create_model("resnext11_4x4d"),
    "resnext20_8x4d": lambda: timm.create_model("resnext20_8x4d"),
    "torchvision": lambda: torchvision.models.resnet.ResNet(
        torchvision.models.resnet.Bottleneck, [1, 1, 1, 1], groups=4, width_per_group=4, num_classes=10
    ),
    "timm": lambda: timm.models.resnet.ResNet(
        timm.models.resnet.Bottleneck,
        (1, 2, 1, 1),
        channels=(16, 32, 64, 64),
        cardinality=4,
        base_width=16,
        num_classes=10,
    ),
    "wide": lambda: timm.create_model("wrn_10_1"),
    "wide torchvision": tiny_networks()["torchvision wide resnet"],
    "mobilenet short": lambda: torchvision.models.MobileNetV2(
        10, 0.25, [[1, 16, 1, 1], [6, 24, 3, 2], [6, 32, 3, 2]], dropout=0.0
    ),
    "mobilenet": lambda: torchvision.models.mobilenet_v2(width_mult=0.25, num_classes=10, dropout=0.0),
}
SIZES = {"cifar": 12, "cifar pool": 12, "resnext11_4x4d": 12, "resnext20_8x4d": 12, "wide": 12, "mobilenet": 64}
FAMILIES = ("cifar pool", "resnext11_4x4d", "torchvision", "timm", "wide", "wide torchvision", "mobilenet short")
UNGROUPED = {name: {"branches": 4} for name in ("wide", "wide torchvision", "mobilenet", "mobilenet short")}


def source(name):
    """Return a network in float64 in which no norm, bias or classifier is trivial."""
    torch.manual_seed(1)
    model = unsettle(BUILDERS[name]().double(), seed=3)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.3)
            nn.init.normal_(module.bias)
    return model


def images(name, batch=6):
    size = SIZES.get(name, 32)
    return torch.randn(batch, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


def convert(model, name, **options):
    return surgery.convert(model, "masked", input_size=SIZES.get(name, 32), **{**UNGROUPED.get(name, {}), **options})


def masks_of(model):
    [found] = [module for module in model.modules() if isinstance(module, Masks)]
    return found


def run(model, x):
    """Return the logits and the masks (L', C, C) that this forward used."""
    used = []
    handle = masks_of(model).register_forward_hook(lambda module, args, result: used.append(result.detach().clone()))
    logits = model(x)
    handle.remove()
    assert len(used) == 1
    return logits, used[0].double()


def fixed(model):
    return [entry.active.double() for entry in surgery_masked.connectivity(model).values()]


def pulled(logits):
    """Return a number that every logit enters with a weight of its own."""
    pull = torch.randn(logits.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    return (logits * pull).sum()


def assert_close(found, expected, what="", scale=0.0):
    """Compare, where `scale` is the size of the terms that may have cancelled to zero."""
    assert found.shape == expected.shape, what
    # A sum is off by the rounding of its largest term, hence the bounds relative to the largest entry and to the scale.
    largest = float(expected.detach().abs().max()) if expected.numel() else 0.0
    atol = TIGHT * largest + 1e-13 * scale
    torch.testing.assert_close(found, expected, rtol=TIGHT, atol=atol, msg=lambda text: f"{what}: {text}")


def assert_gradients_equal(model, literal, norm):
    expected = {
        name: parameter.grad
        for name, parameter in literal.source.named_parameters()
        if norm == "shared" or name.rpartition(".")[0] not in literal.affines
    }
    for path, (scales, shifts) in literal.affines.items() if norm == "branch" else ():
        expected |= {f"{path}.weight": scales.grad.flatten(), f"{path}.bias": shifts.grad.flatten()}
    # The shift of a norm that only other norms read has no gradient but rounding.
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    assert {name for name, _ in model.named_parameters()} == set(expected)
    for name, gradient in expected.items():
        assert_close(model.get_parameter(name).grad, gradient, name, scale=largest)


# --- the definition ---


@pytest.mark.parametrize(("aggregate", "norm", "fan_in"), RULES)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_logits_equal_the_definition(aggregate, norm, fan_in, training):
    plain = source("cifar").train(training)
    model = convert(plain, "cifar", connectivity="random", fan_in=fan_in, aggregate=aggregate, norm=norm)
    masks = fixed(model)
    assert all(torch.equal(mask.sum(dim=1), torch.full((4,), float(fan_in), dtype=torch.float64)) for mask in masks)
    expected = Literal(plain, Rule(4, fan_in, aggregate, norm, training))(images("cifar"), masks)
    assert_close(model(images("cifar")), expected)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("aggregate", "norm", "fan_in"), EXAMPLES)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_logits_of_other_families_equal_the_definition(name, aggregate, norm, fan_in, training):
    plain = source(name).train(training)
    model = convert(plain, name, connectivity="random", fan_in=fan_in, aggregate=aggregate, norm=norm)
    expected = Literal(plain, Rule(4, fan_in, aggregate, norm, training))(images(name), fixed(model))
    assert_close(model(images(name)), expected)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(("fan_in", "branches"), [(1, 8), (2, 8), (8, 8), (2, 4)])
def test_eight_branches_equal_the_definition_whole_and_in_pairs(norm, training, fan_in, branches):
    plain = source("resnext20_8x4d").train(training)
    model = convert(plain, "resnext20_8x4d", connectivity="random", fan_in=fan_in, norm=norm, branches=branches)
    expected = Literal(plain, Rule(branches, fan_in, "resnext", norm, training))(images("resnext20_8x4d"), fixed(model))
    assert_close(model(images("resnext20_8x4d")), expected)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_full_connectivity_is_the_mask_of_ones(aggregate, norm, training):
    plain = source("cifar").train(training)
    model = convert(plain, "cifar", connectivity="full", aggregate=aggregate, norm=norm)
    ones = [torch.ones(4, 4, dtype=torch.float64)] * 5
    expected = Literal(plain, Rule(4, 4, aggregate, norm, training))(images("cifar"), ones)
    assert_close(model(images("cifar")), expected)


@pytest.mark.parametrize(("aggregate", "norm", "fan_in"), EXAMPLES)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_learned_connectivity_uses_a_draw_in_training_and_the_active_ones_in_eval(aggregate, norm, fan_in, training):
    plain = source("cifar").train(training)
    model = convert(plain, "cifar", connectivity="learned", fan_in=fan_in, aggregate=aggregate, norm=norm)
    masks_of(model).real.copy_(uneven(masks_of(model).real))
    logits, used = run(model, images("cifar"))
    assert torch.equal(used.sum(dim=2), torch.full((5, 4), float(fan_in), dtype=torch.float64))
    assert training or torch.equal(used, torch.stack(fixed(model)))
    assert_close(logits, Literal(plain, Rule(4, fan_in, aggregate, norm, training))(images("cifar"), used))


@pytest.mark.parametrize(("aggregate", "norm", "fan_in"), EXAMPLES)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_real_connectivity_equals_the_definition_with_rows_that_sum_to_fan_in(aggregate, norm, fan_in, training):
    plain = source("cifar").train(training)
    model = convert(plain, "cifar", connectivity="real", fan_in=fan_in, aggregate=aggregate, norm=norm)
    masks_of(model).real.copy_(uneven(masks_of(model).real))
    real = torch.stack([entry.real.double() for entry in surgery_masked.connectivity(model).values()])
    logits, used = run(model, images("cifar"))
    torch.testing.assert_close(used, fan_in * real / real.sum(dim=2, keepdim=True), rtol=TIGHT, atol=0)
    assert_close(logits, Literal(plain, Rule(4, fan_in, aggregate, norm, training))(images("cifar"), used))


def uneven(real):
    values = 0.05 + torch.rand(real.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    return (values / values.sum(dim=-1, keepdim=True)).to(real.dtype)


# --- gradients and statistics ---


@pytest.mark.parametrize(("aggregate", "norm", "fan_in"), RULES)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_gradients_of_weights_equal_autograd_through_the_definition(aggregate, norm, fan_in, training):
    check_weight_gradients("cifar", aggregate, norm, fan_in, training)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("aggregate", "norm", "fan_in"), EXAMPLES)
def test_gradients_of_other_families_equal_autograd_through_the_definition(name, aggregate, norm, fan_in):
    check_weight_gradients(name, aggregate, norm, fan_in, True)


@pytest.mark.parametrize(("aggregate", "norm", "fan_in"), EXAMPLES)
def test_recomputed_gradients_equal_autograd_through_the_definition(aggregate, norm, fan_in):
    check_weight_gradients("cifar", aggregate, norm, fan_in, True, recompute=True)


def check_weight_gradients(name, aggregate, norm, fan_in, training, **options):
    plain = source(name).train(training)
    model = convert(plain, name, connectivity="random", fan_in=fan_in, aggregate=aggregate, norm=norm, **options)
    literal = Literal(plain, Rule(4, fan_in, aggregate, norm, training))
    pulled(literal(images(name), fixed(model))).backward()
    pulled(model(images(name))).backward()
    assert_gradients_equal(model, literal, norm)


@pytest.mark.parametrize("name", ["cifar", "torchvision", "mobilenet short"])
@pytest.mark.parametrize("norm", NORMS)
def test_backward_passes_through_one_forward_add_up_and_reach_the_images(name, norm):
    """Twice through the same graph, after a pass to the projections alone, which leaves nothing behind."""
    plain = source(name).train()
    model = convert(plain, name, connectivity="random", fan_in=2, norm=norm)
    literal = Literal(plain, Rule(4, 2, "resnext", norm, training=True))
    theirs, ours = images(name).requires_grad_(), images(name).requires_grad_()
    expected, found = pulled(literal(theirs, fixed(model))), pulled(model(ours))
    projections = [parameter for key, parameter in model.named_parameters() if "downsample" in key]
    torch.autograd.grad(found, projections or [ours], retain_graph=True)
    for _ in range(2):
        expected.backward(retain_graph=True)
        found.backward(retain_graph=True)
    assert_close(ours.grad, theirs.grad, "images")
    assert_gradients_equal(model, literal, norm)


@pytest.mark.parametrize("frozen", ["conv1", "conv3", "bn3", "downsample", "layer1", "layer2.0"])
def test_gradients_beside_frozen_parameters_equal_autograd_through_the_definition(frozen):
    plain = source("cifar").train()
    for key, parameter in plain.named_parameters():
        parameter.requires_grad_(frozen not in key)
    model = convert(plain, "cifar", connectivity="random", fan_in=2)
    literal = Literal(plain, Rule(4, 2, training=True))
    pulled(literal(images("cifar"), fixed(model))).backward()
    pulled(model(images("cifar"))).backward()
    for key, parameter in plain.named_parameters():
        found = model.get_parameter(key)
        assert found.requires_grad == parameter.requires_grad == (frozen not in key)
        assert (found.grad is None) == (parameter.grad is None)
        if parameter.grad is not None:
            assert_close(found.grad, parameter.grad, key, scale=1.0)


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("connectivity", "fan_in"), [("learned", 1), ("learned", 3), ("real", 1), ("real", 4)])
def test_gradients_of_all_mask_entries_equal_autograd_through_the_definition(aggregate, norm, connectivity, fan_in):
    check_mask_gradients("cifar", aggregate, norm, fan_in, connectivity=connectivity)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("aggregate", "norm", "fan_in"), EXAMPLES)
def test_mask_gradients_of_other_families_equal_autograd_through_the_definition(name, aggregate, norm, fan_in):
    check_mask_gradients(name, aggregate, norm, fan_in)


@pytest.mark.parametrize(("aggregate", "norm", "fan_in"), EXAMPLES)
def test_recomputed_mask_gradients_equal_autograd_through_the_definition(aggregate, norm, fan_in):
    check_mask_gradients("cifar", aggregate, norm, fan_in, recompute=True)


def check_mask_gradients(name, aggregate, norm, fan_in, connectivity="learned", **options):
    plain = source(name).train()
    model = convert(plain, name, connectivity=connectivity, fan_in=fan_in, aggregate=aggregate, norm=norm, **options)
    masks_of(model).real.copy_(uneven(masks_of(model).real))
    logits, used = run(model, images(name))
    used.requires_grad_()
    literal = Literal(plain, Rule(4, fan_in, aggregate, norm, training=True))
    pulled(literal(images(name), used)).backward()
    pulled(logits).backward()
    assert_gradients_equal(model, literal, norm)
    assert (used.grad[-1] != 0).all()  # of the branches of the last block, all of which are read
    assert_close(pending(model), used.grad, "masks")


def pending(model):
    """Return the gradient that the next training forward consumes, (L', C, C)."""
    masks = masks_of(model)
    return masks.get_extra_state()[1:].reshape(masks.real.shape).double()


@pytest.mark.parametrize(("aggregate", "norm", "fan_in"), EXAMPLES)
def test_masks_step_along_the_gradient_of_the_definition(aggregate, norm, fan_in):
    """m <- m - 0.2 dl/dm, clipped to [0, 1] and floored, and rows divided by their sums, inside the next forward."""
    plain = source("cifar").train()
    model = convert(plain, "cifar", connectivity="learned", fan_in=fan_in, aggregate=aggregate, norm=norm)
    real = uneven(masks_of(model).real)
    masks_of(model).real.copy_(real)
    logits, used = run(model, images("cifar"))
    used.requires_grad_()
    pulled(Literal(plain, Rule(4, fan_in, aggregate, norm, training=True))(images("cifar"), used)).backward()
    pulled(logits).backward()
    run(model, images("cifar"))
    stepped = (real - 0.2 * used.grad).clamp(1e-4, 1)
    assert_close(masks_of(model).real, stepped / stepped.sum(dim=-1, keepdim=True))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("aggregate", "norm", "fan_in"), EXAMPLES)
def test_running_statistics_are_those_of_every_stream(name, aggregate, norm, fan_in):
    """A step moves them a tenth of the way to the batch's; streams of one norm lie one after the other."""
    plain = source(name).train()
    model = convert(plain, name, connectivity="random", fan_in=fan_in, aggregate=aggregate, norm=norm)
    literal = Literal(plain, Rule(4, fan_in, aggregate, norm, training=True))
    literal(images(name), fixed(model))
    model(images(name))
    for path, pairs in literal.seen.items():
        means, variances = (torch.stack(values) for values in zip(*pairs, strict=True))
        parts = 4 if norm == "branch" and path in literal.affines else 1
        start, found = plain.get_buffer(f"{path}.running_mean"), model.get_buffer(f"{path}.running_mean")
        assert_close(found.reshape(means.shape), 0.9 * rows(start, means) / parts + 0.1 * means, f"{path}.running_mean")
        start, found = plain.get_buffer(f"{path}.running_var"), model.get_buffer(f"{path}.running_var")
        assert_close(found.reshape(means.shape), 0.9 * rows(start, means) + 0.1 * variances, f"{path}.running_var")


def rows(values, like):
    """Return `values` (c) as `like` (streams, c'): every stream's own where they are slices, else a copy for each."""
    return values.reshape(like.shape) if values.numel() == like.numel() else values.expand(like.shape)


# --- full connectivity is the source ---


def full(name, **options):
    """Return a source and its conversion."""
    plain = source(name)
    return plain, convert(plain, name, connectivity="full", **options)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", BUILDERS)
def test_full_connectivity_equals_the_source_in_eval_mode(name, norm):
    plain, model = full(name, norm=norm)
    with torch.no_grad():
        assert_close(model.eval()(images(name)), plain.eval()(images(name)))


@pytest.mark.parametrize("name", BUILDERS)
def test_full_connectivity_trains_as_the_source_does(name):
    """Logits, weights and the running statistics of every stream are those of the source after each of three steps.

    One step for the 17 inverted residuals: the logits of two sources whose weights differ in the last digit are 2e-13
    apart in the first, 5e-11 in the second and 5e-9 in the third.
    """
    check_training(*full(name, norm="shared"), images(name), steps=1 if name == "mobilenet" else 3)


@pytest.mark.parametrize("name", ["cifar", "torchvision", "wide"])
def test_recomputing_trains_as_the_source_does(name):
    """A block that runs twice counts its batch once."""
    check_training(*full(name, norm="shared", recompute=True), images(name), steps=3)


def check_training(plain, model, x, steps):
    nets = plain.train(), model.train()
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3) for net in nets]
    for _ in range(steps):
        logits = []
        for net, optimizer in zip(nets, optimizers, strict=True):
            optimizer.zero_grad()
            logits.append(net(x))
            F.cross_entropy(logits[-1], torch.arange(len(x)) % 10).backward()
            optimizer.step()
        assert_close(logits[1], logits[0])
        for key, expected in plain.named_parameters():
            assert_close(model.get_parameter(key), expected, key)
        for key, expected in plain.named_buffers():
            for found in model.get_buffer(key).reshape(-1, *expected.shape):
                assert_close(found, expected, key)


def test_norms_of_consumers_keep_statistics_for_each_stream():
    _, model = full("cifar")
    channels = model.get_parameter("layer1.0.bn3.weight").numel()
    assert channels == 16
    assert model.get_buffer("layer1.0.bn3.running_mean").numel() == 4 * channels
    assert model.get_buffer("layer3.1.bn3.running_mean").numel() == 4 * channels  # four times as wide, one stream
    assert model.get_buffer("layer2.0.downsample.bn.running_mean").numel() == 4 * 32
    assert model.get_buffer("layer1.0.downsample.bn.running_mean").numel() == channels
