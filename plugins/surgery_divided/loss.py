"""Co-training: every network learns the labels, and all are drawn towards each other's predictions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from surgery import Step
from surgery.errors import InvalidOption

FLOOR = 0.01
"""Share of the weight that the divergence has from the first step on."""


def cotraining_loss(step: Step, networks: int, weight: float, warmup: float) -> dict[str, Tensor]:
    """Return the sum of the networks' own task losses, and their weighted Jensen-Shannon divergence.

    Args:
        step: What one forward pass left behind.
        networks: S.
        weight: Weight of the divergence behind its warm-up; at 0 the term is left out.
        warmup: See `cotraining_weight`.

    Raises:
        InvalidOption: If the criterion returns no scalar.

    Reference:
        Zhao et al., 2022, equation 9; the losses are summed, not averaged.
    """
    logits = [step.taps[f"logits/{i}"] for i in range(networks)]
    tasks = [step.criterion(value, step.target) for value in logits]
    if tasks[0].dim():
        raise InvalidOption(
            f"divided: the criterion returned a tensor of shape {tuple(tasks[0].shape)}, expected a scalar; give it a "
            "reduction such as 'mean'"
        )
    terms = {"task": torch.stack(tasks).sum()}
    if weight:
        terms["cotraining"] = cotraining_weight(step.progress, weight, warmup) * divergence(logits)
    return terms


def cotraining_weight(progress: float | None, weight: float, warmup: float) -> float:
    """Return the weight of the divergence: linear in the epochs up to `warmup`, and never below a hundredth of it.

    Args:
        progress: Completed epochs; None for the end of training.
        weight: The weight behind the warm-up.
        warmup: Length of the warm-up in epochs.

    Reference:
        Zhao et al., 2022, section 3.2; the floor is that of their published settings.
    """
    if progress is None or progress >= warmup:
        return weight
    return weight * max(progress / warmup, FLOOR)


def divergence(logits: Sequence[Tensor]) -> Tensor:
    """Return the Jensen-Shannon divergence of several predictions, the mean over the batch, in nats.

    H(mean of p_i) - mean of H(p_i), computed from logarithms throughout and in float32 at least, so that probabilities
    that a half-precision number cannot hold do no harm. Gradients reach all predictions, through the mean as well.

    Args:
        logits: S tensors (B, classes).

    Shape:
        Scalar, between 0 and log S.

    Reference:
        Zhao et al., 2022, equation 8.
    """
    each = at_least_single(torch.stack(list(logits))).log_softmax(-1)
    joint = each.logsumexp(0) - math.log(len(logits))
    return (each.exp() * (each - joint)).sum(-1).mean()


def at_least_single(logits: Tensor) -> Tensor:
    """Return half-precision numbers in float32, and others as they are."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
