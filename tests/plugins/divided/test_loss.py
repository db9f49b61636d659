"""The co-training loss against its formula, its gradient, half precision, the warm-up; the weight decay."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import surgery
from surgery.errors import InvalidOption
from surgery.models import CifarResNet, wide_resnet
from surgery_divided import members
from surgery_divided.loss import cotraining_weight, divergence

LOGITS = [2 * torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(3)]
TARGET = torch.tensor([1, 0, 6, 3, 3])


def entropy(probabilities):
    return -(probabilities * probabilities.log()).sum(-1)


def literal_divergence(logits):
    """Equation 8: H(mean p_i) - mean H(p_i)."""
    probabilities = [value.softmax(-1) for value in logits]
    return (entropy(sum(probabilities) / len(logits)) - sum(map(entropy, probabilities)) / len(logits)).mean()


def network(networks=2, **options):
    torch.manual_seed(0)
    source = CifarResNet(wide_resnet(10, 2), num_classes=7, zero_init_last=False)
    return surgery.convert(source, "divided", input_size=16, networks=networks, **options).double().train()


def test_the_divergence_is_that_of_equation_8():
    for networks in (2, 3):
        torch.testing.assert_close(divergence(LOGITS[:networks]), literal_divergence(LOGITS[:networks]))


def test_the_divergence_is_none_for_equal_predictions_and_log_s_for_disjoint_ones():
    assert divergence([LOGITS[0]] * 3).abs() < 1e-15
    sure = 100 * torch.eye(3, dtype=torch.float64)
    assert divergence(list(sure[:, None])) == pytest.approx(math.log(3), abs=1e-12)


def test_gradients_reach_all_networks_through_the_mean_as_well():
    ours = [value.clone().requires_grad_() for value in LOGITS]
    theirs = [value.clone().requires_grad_() for value in LOGITS]
    divergence(ours).backward()
    literal_divergence(theirs).backward()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_divergence_is_finite_where_probabilities_vanish(dtype):
    """Three networks, each sure of another class: 0 * log 0 in the literal form, log 3 here."""
    logits = [value.to(dtype).requires_grad_() for value in (300 * torch.eye(3))[:, None]]
    assert literal_divergence(logits).isnan()
    value = divergence(logits)
    value.backward()
    assert value.item() == pytest.approx(math.log(3), rel=1e-6)
    assert all(one.grad.isfinite().all() for one in logits)


def test_the_divergence_of_half_precision_logits_is_computed_in_single():
    logits = [value.half() for value in LOGITS]
    assert divergence(logits) == pytest.approx(
        literal_divergence([value.double() for value in logits]).item(), rel=1e-6
    )
    assert divergence(logits).dtype == torch.float32


@pytest.mark.parametrize(
    ("progress", "expected"), [(0, 0.005), (0.1, 0.005), (10, 0.125), (20.0, 0.25), (40, 0.5), (300, 0.5), (None, 0.5)]
)
def test_the_weight_grows_linearly_over_the_warm_up(progress, expected):
    """0.5 * epoch / 40, and 0.005 at the least."""
    assert cotraining_weight(progress, 0.5, 40) == pytest.approx(expected)


def test_without_a_warm_up_the_weight_is_whole_from_the_start():
    assert cotraining_weight(0, 0.3, 0) == 0.3


@pytest.mark.parametrize("views", [1, 3])
def test_the_objective_is_equation_9(views):
    """The sum, not the mean, of the cross entropies, each network on its view, and 10 / 40 of the weight 0.8."""
    model = network(3, cotraining=0.8)
    images = torch.rand(5, 3 * views, 16, 16, dtype=torch.float64)
    objective = surgery.Objective(model, nn.CrossEntropyLoss())
    total = objective(model(images), TARGET, progress=10)
    seen = images.chunk(3, 1) if views == 3 else [images] * 3
    logits = [member(view) for member, view in zip(members(model), seen, strict=True)]
    tasks = [-value.log_softmax(-1)[range(5), TARGET].mean() for value in logits]
    torch.testing.assert_close(total, sum(tasks) + 0.2 * literal_divergence(logits), rtol=1e-10, atol=0)
    torch.testing.assert_close(objective.terms["task"], sum(tasks).detach(), rtol=1e-10, atol=0)
    assert list(objective.terms) == ["task", "cotraining"]


def test_targets_may_be_mixed():
    model = network()
    images = torch.rand(5, 6, 16, 16, dtype=torch.float64)
    mixed = torch.rand(5, 7, dtype=torch.float64).softmax(-1)
    objective = surgery.Objective(model, nn.CrossEntropyLoss())
    objective(model(images), mixed)
    logits = [member(view) for member, view in zip(members(model), images.chunk(2, 1), strict=True)]
    expected = sum(-(mixed * value.log_softmax(-1)).sum(-1).mean() for value in logits)
    torch.testing.assert_close(objective.terms["task"], expected.detach(), rtol=1e-10, atol=0)


def test_a_criterion_without_reduction_is_refused():
    model = network()
    objective = surgery.Objective(model, nn.CrossEntropyLoss(reduction="none"))
    with pytest.raises(InvalidOption, match=r"shape \(5,\), expected a scalar; give it a reduction"):
        objective(model(torch.rand(5, 3, 16, 16, dtype=torch.float64)), TARGET)


def test_at_weight_zero_the_networks_learn_alone():
    model = network(cotraining=0.0)
    objective = surgery.Objective(model, nn.CrossEntropyLoss())
    objective(model(torch.rand(5, 3, 16, 16, dtype=torch.float64)), TARGET).backward()
    assert list(objective.terms) == ["task"]


@pytest.mark.parametrize(
    ("rule", "networks", "factor"),
    [("keep", 2, 1.0), ("exponential", 2, 0.6065), ("exponential", 4, 0.4724), ("linear", 2, 0.5), ("linear", 4, 0.25)],
)
def test_the_weight_decay_is_divided_and_norms_and_biases_have_none(rule, networks, factor):
    """Equations 6 and 16: exp(1/2 - 1) = 0.6065, exp(1/4 - 1) = 0.4724."""
    model = network(networks, weight_decay=rule)
    groups = surgery.param_groups(model, lr=0.1, weight_decay=1e-3)
    decays = {id(value): group["weight_decay"] for group in groups for value in group["params"]}
    assert {group["lr"] for group in groups} == {0.1}
    for name, value in model.named_parameters():
        expected = 0.0 if value.dim() == 1 else 1e-3 * factor
        assert decays[id(value)] == pytest.approx(expected, rel=1e-4), name
