"""The variant with masked gradients: same outputs, and branches that learn from their own classes only."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import surgery
from surgery.errors import SurgeryError
from surgery.models import CifarResNet, resnext
from surgery_coded.gradients import GradientMask
from surgery_coded.modules import CodedConv2d

BRANCHES, WIDTH, CHANNELS = 4, 3, 5
CODEWORDS = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [1, 0, 0, 1]], dtype=torch.bool)
LABELS = torch.tensor([0, 2, 1, 0, 1])


def literal(hidden, conv, words, drop):
    """g * t + (1 - g) * stop(t) on every branch output t_n, before normalization (appendix E, footnote 12)."""
    outputs = []
    for n in range(BRANCHES):
        channels = slice(n * WIDTH, (n + 1) * WIDTH)
        t = F.conv2d(hidden[:, channels], conv.weight[:, channels], None, conv.stride, conv.padding)
        g = words[:, n, None, None, None]
        outputs.append(g * t + (1 - g) * t.detach())
    stacked = torch.stack(outputs, dim=1)
    scale = stacked.square().mean(dim=(2, 3, 4)).mean(dim=1).rsqrt()
    out = (stacked * scale[:, None, None, None, None] * drop[:, :, None, None, None]).sum(dim=1)
    return out if conv.bias is None else out + conv.bias[None, :, None, None]


@pytest.mark.parametrize(("kernel", "stride", "bias"), [(1, 1, False), (1, 2, True), (3, 1, False), (3, 2, True)])
def test_gradients_equal_the_literal_form(kernel, stride, bias):
    conv = nn.Conv2d(BRANCHES * WIDTH, CHANNELS, kernel, stride, kernel // 2, bias=bias).double()
    hidden = torch.randn(5, BRANCHES * WIDTH, 6, 6, dtype=torch.float64, requires_grad=True)
    drop = torch.tensor([[1, 0, 2, 1]] * 5, dtype=torch.float64)
    weights = torch.randn(CHANNELS, dtype=torch.float64)
    expected = literal(hidden, conv, CODEWORDS[LABELS].double(), drop)
    parameters = [hidden, *conv.parameters()]
    wanted = torch.autograd.grad((expected.square() * weights[:, None, None]).sum(), parameters)
    coded = CodedConv2d.from_conv(conv, CODEWORDS, "block/energy").train()
    coded.gradient_mask = GradientMask()
    output = coded(hidden, drop)
    coded.gradient_mask.fill(CODEWORDS[LABELS].double())
    found = torch.autograd.grad((output.square() * weights[:, None, None]).sum(), parameters)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-12)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_inactive_branch_of_a_network_receives_no_gradient():
    torch.manual_seed(0)
    net = CifarResNet(resnext(4, 2, depth=11, base=8), num_classes=3).double()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
    scheme = surgery.methods()["coded"](scheme={"layer3": _scheme()}, gradient="masked", p_drop=0.0)
    coded = surgery.convert(net, scheme).train()
    criterion = surgery.Objective(coded, nn.CrossEntropyLoss())
    criterion(coded(torch.randn(4, 3, 16, 16, dtype=torch.float64)), torch.tensor([0, 0, 0, 0])).backward()
    assert list(criterion.terms) == ["task"]
    gradient = coded.layer3[0].conv3.weight.grad.unflatten(1, (4, -1)).abs().amax(dim=(0, 2, 3, 4))
    assert (gradient[:2] > 0).all()
    assert torch.equal(gradient[2:], torch.zeros(2, dtype=torch.float64))


def test_backward_without_labels_says_what_is_missing():
    coded = CodedConv2d.from_conv(nn.Conv2d(12, 5, 1, bias=False), CODEWORDS, "block/energy").train()
    coded.gradient_mask = GradientMask()
    output = coded(torch.randn(2, 12, 4, 4))
    with pytest.raises(SurgeryError, match=r"call surgery\.Objective"):
        output.sum().backward()


def test_copy_of_the_network_has_labels_of_its_own():
    coded = CodedConv2d.from_conv(nn.Conv2d(12, 5, 1, bias=False), CODEWORDS, "block/energy").train()
    coded.gradient_mask = GradientMask()
    twin = copy.deepcopy(coded)
    output = twin(torch.randn(2, 12, 4, 4))
    coded.gradient_mask.fill(torch.ones(2, BRANCHES))
    with pytest.raises(SurgeryError, match=r"call surgery\.Objective"):
        output.sum().backward()


def test_forward_passes_may_interleave_before_their_backward_passes():
    coded, criterion = _network()
    first, second = torch.randn(2, 4, 3, 16, 16, dtype=torch.float64)
    labels = torch.tensor([0, 0, 1, 2]), torch.tensor([2, 1, 1, 0])
    for images, target in zip((first, second), labels, strict=True):
        criterion(coded(images), target).backward()
    one_by_one = [parameter.grad for parameter in coded.parameters()]
    coded.zero_grad(set_to_none=True)
    losses = [criterion(coded(images), target) for images, target in zip((first, second), labels, strict=True)]
    (losses[0] + losses[1]).backward()
    for parameter, expected in zip(coded.parameters(), one_by_one, strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-10, atol=1e-12)


def test_labels_of_an_earlier_batch_are_not_used_again():
    coded, criterion = _network()
    images, labels = torch.randn(4, 3, 16, 16, dtype=torch.float64), torch.tensor([0, 0, 1, 2])
    criterion(coded(images), labels).backward()
    with pytest.raises(SurgeryError, match=r"call surgery\.Objective on the output of every forward pass"):
        nn.functional.cross_entropy(coded(images), labels).backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_block_has_the_same_gradients(reentrant):
    coded, criterion = _network()
    images, labels = torch.randn(4, 3, 16, 16, dtype=torch.float64), torch.tensor([0, 0, 1, 2])
    criterion(coded(images), labels).backward()
    expected = [parameter.grad for parameter in coded.parameters()]
    coded.zero_grad(set_to_none=True)
    block, plain = coded.layer3[0], coded.layer3[0].forward
    block.forward = lambda x, *fed: checkpoint(plain, x, *fed, use_reentrant=reentrant)
    criterion(coded(images), labels).backward()
    for parameter, wanted in zip(coded.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("classes", [[0], [0, 1], [0, 1, 2]])
def test_pruned_network_trains_without_the_mask(classes):
    coded, _ = _network()
    pruned = surgery.prune(coded, classes=classes)
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    output = pruned(images)
    loss = surgery.Objective(pruned, nn.CrossEntropyLoss())(output, torch.zeros(3, dtype=torch.long))
    (loss + output.square().sum()).backward()  # a single class has no cross entropy
    merge = pruned.layer3[0].conv3
    assert (merge.weight.grad.unflatten(1, (merge.branches, -1)).abs().amax(dim=(0, 2, 3, 4)) > 0).all()


def _network():
    """Return a network with frozen batch norms, so that a forward pass leaves no trace, and its objective."""
    torch.manual_seed(0)
    net = CifarResNet(resnext(4, 2, depth=11, base=8), num_classes=3).double()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0.0, 0.2)
    scheme = surgery.methods()["coded"](scheme={"layer3": _scheme()}, gradient="masked", p_drop=0.0)
    coded = surgery.convert(net, scheme).train()
    for module in coded.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return coded, surgery.Objective(coded, nn.CrossEntropyLoss())


def _scheme():
    from surgery_coded import CodingScheme

    return CodingScheme(CODEWORDS)
