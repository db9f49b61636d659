"""Judge a one-class network: the threshold on its output, and what it gets right.

Reference: Coded ResNeXt (2022), section 4.2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from surgery.errors import InvalidOption
from surgery_coded.checks import whole_number, yes_or_no


@dataclass(frozen=True)
class BinaryReport:
    """How a binary classifier does on a set of images.

    Attributes:
        threshold: An image is positive if its logit is above.
        precision: Share of true positives among what was called positive; 0 where nothing was.
        recall: Share of the positives that was found.
        f1: Their harmonic mean.
    """

    threshold: float
    precision: float
    recall: float
    f1: float


def choose_threshold(logits: Tensor, positive: Tensor, steps: int = 100) -> float:
    """Return the threshold with the best F1 out of `steps` between the medians of the negatives and the positives.

    Args:
        logits: (M,) outputs on training images.
        positive: (M,) bool, which of them are of the class.
        steps: Number of thresholds tried.

    Raises:
        InvalidOption: If one of the two kinds is missing, lengths differ, a logit is not finite, or `steps` is below 1.
    """
    logits, positive = _checked(logits, positive, "choose_threshold")
    steps = whole_number(steps, 1, "choose_threshold", "steps")
    if not bool(positive.any()) or bool(positive.all()):
        raise InvalidOption("choose_threshold: expected images of the class and others, found only one kind")
    candidates = torch.linspace(
        float(logits[~positive].median()), float(logits[positive].median()), steps, dtype=torch.float64
    )
    scores = [judge(logits, positive, float(candidate)).f1 for candidate in candidates]
    return float(candidates[int(torch.tensor(scores).argmax())])


def judge(logits: Tensor, positive: Tensor, threshold: float) -> BinaryReport:
    """Return precision, recall and F1 at a threshold.

    Args:
        logits: (M,) outputs.
        positive: (M,) bool, which images are of the class.
        threshold: An image is called positive if its logit is above.

    Raises:
        InvalidOption: If lengths differ, or a logit is not finite.
    """
    logits, positive = _checked(logits, positive, "judge")
    called = logits > threshold
    hits = int((called & positive).sum())
    precision = hits / max(int(called.sum()), 1)
    recall = hits / max(int(positive.sum()), 1)
    return BinaryReport(threshold, precision, recall, 2 * hits / max(int(called.sum()) + int(positive.sum()), 1))


def _checked(logits: Tensor, positive: Tensor, where: str) -> tuple[Tensor, Tensor]:
    """Return both as (M,), float64 and bool."""
    z, truth = logits.flatten().double(), yes_or_no(positive.flatten(), where, "positive")
    if z.shape != truth.shape or not bool(z.isfinite().all()):
        raise InvalidOption(
            f"{where}: found {len(z)} logits, {int((~z.isfinite()).sum())} of them not finite, and {len(truth)} truth "
            "values, expected as many of both and finite logits"
        )
    return z, truth
