"""Sparse networks: what depends on what, prefixes, the literal form, and what a block costs."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import surgery
import surgery.models  # registers the networks with timm
import surgery_inclusive
from surgery.models import PreActResNeXt, preact_resnext
from surgery.testing import ResidualSpec, tiny_networks, unsettle
from surgery_inclusive.norms import SharedNorm
from surgery_inclusive.selection import selected, subnetworks_of

K = 4
IMAGES = torch.randn(3, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
TARGET = torch.arange(3)


def preactivated():
    torch.manual_seed(0)
    return unsettle(PreActResNeXt(preact_resnext(4, 2, depth=11, width=16), num_classes=10))


NETWORKS = {
    "pre-activation": preactivated,
    **{name: tiny_networks()[name] for name in ("resnext", "torchvision mobilenetv2", "timm wide resnet")},
    "squeeze-excite behind": ResidualSpec((1, 1), groups=4, attention="behind").build,
    "squeeze-excite inside, pre-activated": ResidualSpec(
        (1, 1), groups=4, attention="inside", preactivation=True
    ).build,
}


def sparse(source, subnetworks=K, **options):
    return surgery.convert(source, "inclusive", input_size=32, subnetworks=subnetworks, sparse=True, **options)


@cache
def converted(name):
    return unsettle(sparse(NETWORKS[name]().double()), seed=1).eval()


def outputs(model, images=IMAGES):
    with torch.no_grad():
        return model.eval()(images)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12 * float(expected.abs().max()))


# --- what depends on what ---


def parts_of(values):
    return values.chunk(K, dim=1)


@pytest.mark.parametrize("name", NETWORKS)
def test_part_k_of_a_block_depends_on_the_parts_up_to_k_and_on_all_of_them(name):
    """The Jacobian of every block is lower block-triangular, and no block on or below the diagonal is zero."""
    model = converted(name)
    for block in model.meta["architecture"].blocks:
        reads = block.channels.input
        value = torch.randn(1, reads, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        value.requires_grad_(True)
        for k, part in enumerate(parts_of(model.block(block.path)(value, (0, K)))):
            weights = torch.randn(part.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
            [gradient] = torch.autograd.grad((part * weights).sum(), value, retain_graph=True)
            reached = [bool(piece.any()) for piece in parts_of(gradient)]
            # One that begins with its depthwise convolution mixes in its merge alone, which has K groups.
            own = block.convs[0] == block.spatial and block.kind == "depthwise"
            assert reached == [j == k if own else j <= k for j in range(K)], (block.path, k)


def nan_behind(model, k):
    """Return the network with NaN in every weight that only parts behind k should use."""
    twin = copy.deepcopy(model)
    heads = {path for path, module in twin.named_modules() if isinstance(module, nn.Linear)}
    for name, tensor in [*twin.named_parameters(), *twin.named_buffers()]:
        path, _, last = name.rpartition(".")
        if not tensor.is_floating_point():
            continue
        if last.isdecimal():  # the row blocks of a triangular weight, from the first
            first = 0 if int(last) >= k else len(tensor)
        elif path in heads:
            first = 0 if ".thin." not in name or int(path.rpartition(".")[2]) >= k else len(tensor)
        else:
            first = len(tensor) * k // K
        tensor.data[first:] = float("nan")
    return twin


@pytest.mark.parametrize("name", NETWORKS)
def test_subnetwork_k_reads_no_weight_of_the_parts_behind(name):
    model = converted(name)
    with surgery.record(model) as expected:
        outputs(model)
    for k in range(1, K):
        broken = nan_behind(model, k)
        with surgery_inclusive.use(broken, k):
            close(outputs(broken), expected[f"logits/{k}"])
        with surgery_inclusive.use(broken, k + 1):
            assert outputs(broken).isnan().all()
        close(outputs(surgery.prune(broken, subnetwork=k)), expected[f"logits/{k}"])
        steps = surgery_inclusive.anytime(broken, IMAGES)
        for _ in range(k):
            logits = next(steps)
        close(logits, expected[f"logits/{k}"])
        assert next(steps).isnan().all()


@pytest.mark.parametrize("name", NETWORKS)
def test_the_logits_of_head_k_need_no_weight_of_the_parts_behind(name):
    """In the pass that computes all of them; a later part that overflows must not spoil the earlier ones."""
    model = converted(name)
    with surgery.record(model) as expected:
        outputs(model)
    for k in range(1, K):
        broken = nan_behind(model, k)
        with surgery.record(broken) as found:
            outputs(broken)
        assert found[f"logits/{k + 1}"].isnan().all()
        close(found[f"logits/{k}"], expected[f"logits/{k}"])


@pytest.mark.parametrize("name", NETWORKS)
def test_subnetwork_k_by_itself_is_the_prefix_of_the_full_pass(name):
    model = converted(name)
    with surgery.record(model) as taps:
        outputs(model)
    assert list(taps) == [f"logits/{k}" for k in range(1, K + 1)]
    for k in range(1, K + 1):
        with surgery_inclusive.use(model, k):
            close(outputs(model), taps[f"logits/{k}"])
        close(outputs(surgery.prune(model, subnetwork=k)), taps[f"logits/{k}"])


def test_values_of_a_prefix_are_those_of_the_full_pass():
    model, seen = converted("pre-activation"), {}
    handles = [
        model.get_submodule(path).register_forward_hook(
            lambda module, args, value, path=path: seen.setdefault(path, []).append(value)
        )
        for path in ["conv1", *(block.path for block in model.meta["architecture"].blocks), "down2", "down3"]
        if path in dict(model.named_modules())
    ]
    outputs(model)
    with surgery_inclusive.use(model, 2):
        outputs(model)
    for handle in handles:
        handle.remove()
    assert len(seen) >= 4
    for whole, half in seen.values():
        assert half.shape[1] == whole.shape[1] // 2
        close(half, whole[:, : half.shape[1]])


def test_channels_of_zeros_are_appended_inside_of_each_part():
    """16 channels become 32: part k holds the 4 channels it had and 4 zeros."""
    model = converted("pre-activation")
    [append] = [module for path, module in model.named_modules() if path == "down2.1"]
    value = torch.randn(2, 16, 4, 4, dtype=torch.float64)
    found = append(value)
    assert found.shape[1] == 32
    for k in range(K):
        assert torch.equal(found[:, 8 * k : 8 * k + 4], value[:, 4 * k : 4 * k + 4])
        assert not found[:, 8 * k + 4 : 8 * k + 8].any()
    assert torch.equal(append(value[:, :8]), found[:, :16])


def test_norms_are_shared_and_the_features_of_every_subnetwork_pass_one():
    source = preactivated()
    model = sparse(source)
    norms = [path for path, module in source.named_modules() if isinstance(module, nn.BatchNorm2d)]
    found = {path: module for path, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert list(found) == norms
    assert {type(module) for module in found.values()} == {SharedNorm}
    assert not any("thin" in key and "fc" not in key for key in model.state_dict())


# --- the literal form ---


def masked_weight(weight, diagonal):
    """Return the weight without the blocks above the diagonal, or with none but those on it."""
    mask = torch.ones(K, K, dtype=torch.bool)
    mask = torch.eye(K, dtype=torch.bool) if diagonal else mask.tril()
    rows, columns = weight.shape[0] // K, weight.shape[1] // K
    return weight * mask.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[:, :, None, None]


class Literal(nn.Module):
    """A sliced pre-activation ResNeXt on dense weights, the last ones of each block masked to K groups."""

    def __init__(self, source, heads):
        super().__init__()
        self.source, self.heads = source, heads

    def forward(self, x):
        net = self.source
        value = F.conv2d(x, net.conv1.weight, padding=1)
        for number, stage in enumerate((net.layer1, net.layer2, net.layer3), start=1):
            if number > 1:
                value = F.avg_pool2d(value, 2)
                value = torch.cat([torch.cat([part, torch.zeros_like(part)], 1) for part in parts_of(value)], 1)
            for block in stage:
                value = value + self.body(block, value)
        features = torch.relu(self.normed(net.norm, value)).mean((2, 3))
        return [head(features[:, : head.in_features]) for head in self.heads]

    def body(self, block, value):
        norms, (first, second, third) = self.layers(block)
        value = F.conv2d(torch.relu(self.normed(norms[0], value)), masked_weight(first.weight, diagonal=False))
        value = torch.relu(self.normed(norms[1], value))
        value = F.conv2d(value, second.weight, padding=1, groups=second.groups)
        return F.conv2d(torch.relu(self.normed(norms[2], value)), masked_weight(third.weight, diagonal=True))

    @staticmethod
    def layers(block):
        norms = [module for module in block.modules() if isinstance(module, nn.BatchNorm2d)]
        return norms, [module for module in block.modules() if isinstance(module, nn.Conv2d)]

    @staticmethod
    def normed(norm, value):
        mean, variance = value.mean((0, 2, 3)), value.var((0, 2, 3), correction=0)
        value = (value - mean[:, None, None]) / (variance + norm.eps).sqrt()[:, None, None]
        return value * norm.weight[:, None, None] + norm.bias[:, None, None]


def literal(source, model):
    source = copy.deepcopy(source)
    heads = [nn.Linear(linear.in_features, 10).double() for linear in [*model.fc.thin, model.fc]]
    for head, linear in zip(heads, [*model.fc.thin, model.fc], strict=True):
        head.load_state_dict({"weight": linear.weight, "bias": linear.bias})
    return Literal(source, nn.ModuleList(heads))


def test_one_pass_trains_all_subnetworks_as_masked_dense_weights_would_be():
    """The loss is the sum over the heads, and every weight that is left gets the gradient of its dense form."""
    source = preactivated().double()
    model = sparse(source).train()
    dense = literal(source, model)
    loss = surgery.Objective(model, nn.CrossEntropyLoss())(model(IMAGES), TARGET)
    expected = torch.stack([F.cross_entropy(logits, TARGET) for logits in dense(IMAGES)]).sum()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    loss.backward()
    expected.backward()
    for name, parameter in source.named_parameters():
        if name.startswith("fc."):
            continue
        gradient, path = dense.source.get_parameter(name).grad, name.removesuffix(".weight")
        found = dict(model.named_parameters())
        if name in found and found[name].shape == parameter.shape:
            close(found[name].grad, gradient)
        elif name in found:  # the merge
            rows, columns = parameter.shape[0] // K, parameter.shape[1] // K
            for k in range(K):
                close(
                    found[name].grad[k * rows : (k + 1) * rows],
                    gradient[k * rows : (k + 1) * rows, k * columns : (k + 1) * columns],
                )
        else:
            rows, columns = parameter.shape[0] // K, parameter.shape[1] // K
            for k in range(K):
                close(
                    model.get_parameter(f"{path}.weights.{k}").grad,
                    gradient[k * rows : (k + 1) * rows, : (k + 1) * columns],
                )
    for own, head in zip([*model.fc.thin, model.fc], dense.heads, strict=True):
        close(own.weight.grad, head.weight.grad)


def test_weights_right_after_conversion_are_the_blocks_of_the_source():
    source = tiny_networks()["timm wide resnet"]().double().eval()
    model = sparse(source, 2)
    for name, conv in source.named_modules():
        if not isinstance(conv, nn.Conv2d) or conv.groups > 1 or conv.in_channels == 3:
            continue
        rows, columns = conv.out_channels // 2, conv.in_channels // 2
        own = model.get_submodule(name)
        if isinstance(own, nn.Conv2d):
            blocks = [conv.weight[:rows, :columns], conv.weight[rows:, columns:]]
            assert torch.equal(own.weight, torch.cat(blocks))
        else:
            assert torch.equal(own.weights[0], conv.weight[:rows, :columns])
            assert torch.equal(own.weights[1], conv.weight[rows:])


def test_only_the_output_of_the_last_head_is_returned_and_earlier_ones_train_the_prefix_alone():
    """The loss of head k leaves the weights of later parts without a gradient, or with zeros."""
    model = sparse(preactivated().double()).train()
    model(IMAGES)
    F.cross_entropy(surgery.taps.taps_of(model)["logits/2"], TARGET).backward()
    for block in model.meta["architecture"].blocks:
        for name, parameter in model.block(block.path).named_parameters():
            last = name.rpartition(".")[2]
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            if last.isdecimal():
                assert bool(gradient.any()) == (int(last) < 2), name
            else:
                pieces = gradient.chunk(K)
                assert [bool(piece.any()) for piece in pieces] == [True, True, False, False], name


# --- cost ---


def test_a_block_costs_what_the_formula_says():
    """S*S C B (W (K + 1) / (2 K) + 9 B + W / K) with C B hidden channels in C branches of B.

    First scale of 24 branches of 4 at width 96, K = 6, 32 x 32 pixels: 1024 * 96 * (96 * 7 / 12 + 36 + 16) =
    98304 * 108 = 10616832; the other scales are half as large and twice as wide: 256 * 192 * (112 + 72 + 32) =
    49152 * 216 = 10616832 and 64 * 384 * (224 + 144 + 64) = 10616832.
    """
    model = sparse(timm.create_model("preresnext47_24x4d"), 6)
    assert {block.macs for block in surgery.cost(model).blocks} == {10616832}
    assert len(surgery.cost(model).blocks) == 15


def test_a_span_without_its_predecessors_is_refused():
    """The second part of a triangular convolution needs the first, which only anytime prediction keeps."""
    model = converted("pre-activation")
    with pytest.raises(surgery.errors.InvalidOption, match="without a gap"), selected(subnetworks_of(model), 2, 1):
        outputs(model)
