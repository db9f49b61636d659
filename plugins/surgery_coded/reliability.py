"""How far the confidences of a network are from what it gets right.

Reference: Coded ResNeXt (2022), appendix C.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from surgery.errors import InvalidOption
from surgery_coded.checks import whole_number, yes_or_no


@dataclass(frozen=True, eq=False)
class CalibrationError:
    """How far confidence and accuracy are apart, and the reliability diagram that shows it.

    Attributes:
        ece: Expected calibration error, the mean difference over the samples, in [0, 1].
        mce: Maximum calibration error, the largest difference of a bin that is not empty, in [0, 1].
        count: Samples in each of the M bins, (M,) int64.
        accuracy: Share of right predictions in each bin, (M,) float64; NaN where it is empty.
        confidence: Mean confidence in each bin, (M,) float64; NaN where it is empty.

    Reference: Coded ResNeXt (2022), Eq. 8 and 9.
    """

    ece: float
    mce: float
    count: Tensor
    accuracy: Tensor
    confidence: Tensor


def calibration_error(confidence: Tensor, correct: Tensor, bins: int = 15) -> CalibrationError:
    """Compare confidences with what was right, in M bins of equal width ((m-1)/M, m/M].

    Args:
        confidence: Probability that each prediction is right, in [0, 1]; 0 counts in the first bin.
        correct: Whether it is, as bool or 0 and 1.
        bins: M.

    Shape:
        confidence (N,), correct (N,).

    Raises:
        InvalidOption: If lengths differ, there is no sample, a confidence is outside [0, 1], `correct` has other values
            than 0 and 1, or `bins` is below 1.

    Reference: Coded ResNeXt (2022), appendix C.
    """
    bins = whole_number(bins, 1, "calibration error", "bins")
    p, hit = (
        confidence.detach().cpu().double(),
        yes_or_no(correct.detach().cpu(), "calibration error", "correct").double(),
    )
    if p.ndim != 1 or p.shape != hit.shape or not len(p):
        raise InvalidOption(
            f"calibration error: found confidences {tuple(p.shape)} and correctness {tuple(hit.shape)}, expected two "
            "tensors (N,) with a sample or more"
        )
    if not bool(((p >= 0) & (p <= 1)).all()):
        raise InvalidOption(
            f"calibration error: found confidences from {float(p.min()):g} to {float(p.max()):g}, expected "
            "probabilities in [0, 1]; pass what Calibrator.confidence returns"
        )
    # The quotients m / M are the edges themselves: a product p * M can round across one.
    edges = torch.arange(1, bins, dtype=torch.float64) / bins
    index = torch.bucketize(p, edges)
    count = torch.bincount(index, minlength=bins)
    accuracy, mean = (torch.bincount(index, value, minlength=bins) / count for value in (hit, p))
    gap = (accuracy - mean).abs()[count > 0]
    ece = float((gap * count[count > 0]).sum() / len(p))
    return CalibrationError(ece, float(gap.max()), count, accuracy, mean)
