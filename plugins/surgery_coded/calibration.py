"""Confidences that can be trusted: temperature scaling that also listens to the early decoders.

With z the logits of a sample, y its class, c = argmax z the prediction and e_i the prediction of early decoder i,

    h_T(z)   = softmax(z / T)                                                             (Eq. 10)
    h_aug(z) = softmax(z / T_aug), T_aug = T (1 + sum_i tau_i [e_i = c])                  (Eq. 11)

T and tau minimize the mean negative log-likelihood of a hold-out set. Either way the prediction stays c: only the
temperature changes, so only the confidence max_k h(z)_k does.

Everything is computed in float64 on the CPU.

Reference: Coded ResNeXt (2022), appendix C.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from surgery.errors import InvalidOption
from surgery_coded.checks import class_indices, whole_number
from surgery_coded.reliability import calibration_error

#: Lower bound of T, and of T_aug / T whichever decoders agree.
LOWEST = 1e-3
#: A step that was halved this often in vain ends the descent.
HALVINGS = 30
#: So does a slope below this: all remaining steps together would move nothing that is printed.
FLAT = 1e-10


@dataclass(frozen=True)
class Calibrator:
    """The calibration function h_T, or h_aug where it knows early decoders.

    Attributes:
        temperature: T > 0.
        tau: What the agreement of each early decoder with the prediction adds to the factor of T, by block; empty
            for h_T.

    Raises:
        InvalidOption: If T, or T_aug of any agreement, is not positive and finite.

    Reference: Coded ResNeXt (2022), Eq. 10 and 11.
    """

    temperature: float = 1.0
    tau: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse temperatures that turn the order of the classes round."""
        lowest = self.temperature * (1 + sum(min(tau, 0.0) for tau in self.tau.values()))
        if not (0 < self.temperature < math.inf and 0 < lowest < math.inf):
            raise InvalidOption(
                f"Calibrator: found temperature {self.temperature} and with tau as low as {lowest}, expected positive "
                "and finite ones; fit_calibrator finds such"
            )

    def temperatures(self, logits: Tensor, decoded: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the temperature of every sample.

        Args:
            logits: Outputs of the network.
            decoded: Predictions of the early decoders by block, as `surgery_coded.early_decode` returns them; not read
                where `tau` is empty.

        Shape:
            logits (M, K), decoded (M,) each; returns (M,) float64.

        Raises:
            InvalidOption: If a decoder of `tau` is missing, or the shapes do not fit.
        """
        agrees = _agreement(_checked_logits(logits), decoded or {}, list(self.tau))
        tau = torch.tensor(list(self.tau.values()), dtype=torch.float64)
        return self.temperature * (1 + agrees @ tau)

    def probabilities(self, logits: Tensor, decoded: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the calibrated probabilities of the classes, (M, K) float64; arguments as in `temperatures`."""
        return (_checked_logits(logits) / self.temperatures(logits, decoded)[:, None]).softmax(dim=1)

    def confidence(self, logits: Tensor, decoded: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the probability of the prediction, (M,) float64; arguments as in `temperatures`."""
        return self.probabilities(logits, decoded).amax(dim=1)


def fit_calibrator(
    logits: Tensor,
    targets: Tensor,
    decoded: Mapping[str, Tensor] | None = None,
    *,
    lr: float = 0.1,
    iterations: int = 600,
) -> Calibrator:
    """Fit h_T, or with `decoded` h_aug, by gradient descent on the negative log-likelihood.

    The paper takes `iterations` full-batch steps of size `lr` from T = 1 and tau = 0. For h_aug that recipe diverges on
    ordinary logits: the tau of decoders that agree together act as one parameter with a step as many times larger, and
    with six decoders and 100 classes it left T_aug < 0 and ended at chance. Hence two changes. A step that lowers the
    loss by less than a tenth of what its slope promises, or makes T or T_aug / T of any possible agreement less than
    0.001, is halved until it does not; a halved step doubles again from then on, up to `lr`. And h_aug starts at the T
    of h_T, on logits in units of it. Where no step is halved, h_T is fitted to the letter.

    Args:
        logits: Outputs on the hold-out set, (M, K).
        targets: Classes, (M,).
        decoded: Predictions of the early decoders by block, (M,) each.
        lr: Step size.
        iterations: Number of steps, for h_T and again for h_aug.

    Raises:
        InvalidOption: If shapes do not fit, a logit is not finite, a target is no class, there is no sample, `lr` is
            not positive and finite, or `iterations` is below 1.

    Reference: Coded ResNeXt (2022), appendix C.
    """
    z, y = _checked(logits, targets)
    iterations = whole_number(iterations, 1, "fit_calibrator", "iterations")
    if not 0 < lr < math.inf:
        raise InvalidOption(f"fit_calibrator: found lr={lr}, expected a positive and finite step size such as 0.1")
    return _fit_both(z, y, decoded or {}, lr, iterations)[1]


@dataclass(frozen=True, eq=False)
class CalibrationTable:
    """Errors of the two calibrators over random splits; the columns are h_T and h_aug.

    Attributes:
        ece: Expected calibration errors, (splits, 2) float64.
        mce: Maximum calibration errors, (splits, 2) float64.

    Reference: Coded ResNeXt (2022), Table 6.
    """

    ece: Tensor
    mce: Tensor

    @property
    def means(self) -> dict[str, tuple[float, float]]:
        """Mean ECE and MCE over the splits, of "h_T" and "h_aug"."""
        ece, mce = self.ece.mean(dim=0).tolist(), self.mce.mean(dim=0).tolist()
        return {name: (ece[i], mce[i]) for i, name in enumerate(("h_T", "h_aug"))}


def calibration_table(
    logits: Tensor,
    targets: Tensor,
    decoded: Mapping[str, Tensor],
    *,
    train_share: float = 0.25,
    splits: int = 40,
    seed: int = 0,
) -> CalibrationTable:
    """Fit both calibrators on one part of the samples and measure them on the rest, over random stratified splits.

    Args:
        logits: Outputs on samples that the network was not trained on, (M, K).
        targets: Their classes, (M,).
        decoded: Predictions of the early decoders by block, (M,) each.
        train_share: Share of every class that the calibrators are fitted on, in (0, 1); each part gets one sample of
            every class or more.
        splits: Number of random splits.
        seed: Of the splits.

    Raises:
        InvalidOption: If `train_share` is outside (0, 1), `splits` is below 1, `decoded` is empty, a class has a
            single sample, or what `fit_calibrator` refuses.

    Reference: Coded ResNeXt (2022), Table 6.
    """
    z, y = _checked(logits, targets)
    splits = whole_number(splits, 1, "calibration table", "splits")
    if not 0 < train_share < 1 or not decoded:
        raise InvalidOption(
            f"calibration table: found train_share={train_share} and {len(decoded)} early decoders, expected a share "
            "between 0 and 1 and a decoder or more"
        )
    _agreement(z, decoded, list(decoded))  # refuses what does not fit before anything is fitted
    right, guesses = z.argmax(dim=1) == y, {block: e.cpu() for block, e in decoded.items()}
    rows = []
    for train in _stratified(y, train_share, splits, seed):
        test = ~train
        held_out = {block: e[test] for block, e in guesses.items()}
        for fitted in _fit_both(z[train], y[train], {block: e[train] for block, e in guesses.items()}):
            error = calibration_error(fitted.confidence(z[test], held_out), right[test])
            rows.append((error.ece, error.mce))
    errors = torch.tensor(rows, dtype=torch.float64).view(splits, 2, 2)
    return CalibrationTable(errors[:, :, 0], errors[:, :, 1])


def _fit_both(
    z: Tensor, y: Tensor, decoded: Mapping[str, Tensor], lr: float = 0.1, iterations: int = 600
) -> tuple[Calibrator, Calibrator]:
    """Return h_T and h_aug; h_T twice where there is no decoder."""
    blocks = list(decoded)
    agrees = _agreement(z, decoded, blocks)
    unit, _ = _descend(z, y, z.new_zeros(len(z), 0), lr, iterations)
    plain = Calibrator(unit)
    if not blocks:
        return plain, plain
    temperature, tau = _descend(z / unit, y, agrees, lr, iterations)
    return plain, Calibrator(unit * temperature, dict(zip(blocks, tau, strict=True)))


def _descend(z: Tensor, y: Tensor, agrees: Tensor, lr: float, iterations: int) -> tuple[float, list[float]]:
    """Return T and tau after the descent from T = 1 and tau = 0."""
    point = torch.zeros(1 + agrees.shape[1], dtype=torch.float64)
    point[0] = 1.0
    loss, slope = _likelihood(z, y, agrees, point)
    step = lr
    for _ in range(iterations):
        for _ in range(HALVINGS):
            tried = point - step * slope
            if _allowed(tried):
                tried_loss, tried_slope = _likelihood(z, y, agrees, tried)
                if tried_loss <= loss - 0.1 * step * float(slope @ slope):
                    break
            step /= 2
        else:
            break  # at the minimum: what is left to gain is below the rounding of the loss
        point, loss, slope = tried, tried_loss, tried_slope
        if float(slope.abs().max()) < FLAT:
            break
        step = min(2 * step, lr)
    return float(point[0]), [float(tau) for tau in point[1:]]


def _likelihood(z: Tensor, y: Tensor, agrees: Tensor, point: Tensor) -> tuple[float, Tensor]:
    """Return the mean negative log-likelihood and its gradient in (T, tau_1, ..., tau_D)."""
    factor = 1 + agrees @ point[1:]
    temperature = point[0] * factor
    log_p = (z / temperature[:, None]).log_softmax(dim=1)
    chosen = y[:, None]
    loss = -log_p.gather(1, chosen).mean()
    # d(-log p_y) / dT_aug = (z_y - sum_k p_k z_k) / T_aug^2
    slope = (z.gather(1, chosen)[:, 0] - torch.linalg.vecdot(log_p.exp(), z)) / temperature.square() / len(y)
    return float(loss), torch.cat([(slope @ factor)[None], point[0] * (slope @ agrees)])


def _allowed(point: Tensor) -> bool:
    # The sum of the negative tau is the least that any agreement adds, also one that the hold-out set does not show.
    return float(point[0]) >= LOWEST and 1 + float(point[1:].clamp(max=0).sum()) >= LOWEST


def _stratified(targets: Tensor, share: float, splits: int, seed: int) -> Iterator[Tensor]:
    """Yield masks (M,) of the first part of every split."""
    members = [(targets == k).nonzero()[:, 0] for k in targets.unique()]
    alone = [int(targets[own[0]]) for own in members if len(own) < 2]
    if alone:
        raise InvalidOption(
            f"calibration table: class {alone[0]} has a single sample, expected one for each part; pass more samples, "
            "or leave out those of rare classes"
        )
    generator = torch.Generator().manual_seed(seed)
    for _ in range(splits):
        mask = torch.zeros(len(targets), dtype=torch.bool)
        # Rounding at random, to the upper number as often as the remainder says, keeps the share for small classes.
        shift = torch.rand(len(members), generator=generator, dtype=torch.float64).tolist()
        for own, offset in zip(members, shift, strict=True):
            size = min(max(int(len(own) * share + offset), 1), len(own) - 1)
            mask[own[torch.randperm(len(own), generator=generator)[:size]]] = True
        yield mask


def _checked(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    z = _checked_logits(logits)
    return z, class_indices(targets.detach().cpu(), len(z), z.shape[1], "calibration")


def _checked_logits(logits: Tensor) -> Tensor:
    z = logits.detach().cpu().double()
    if z.ndim != 2 or not z.numel() or not bool(z.isfinite().all()):
        raise InvalidOption(
            f"calibration: found logits {tuple(z.shape)}, {int((~z.isfinite()).sum())} of them not finite, expected "
            "finite ones (M, K) of a sample or more"
        )
    return z


def _agreement(z: Tensor, decoded: Mapping[str, Tensor], blocks: list[str]) -> Tensor:
    """Return where each early decoder names the class that the network predicts, (M, D) of zeros and ones."""
    wrong = [block for block in blocks if block not in decoded or decoded[block].shape != z.shape[:1]]
    if wrong:
        found = tuple(decoded[wrong[0]].shape) if wrong[0] in decoded else "no predictions"
        raise InvalidOption(f"calibration: early decoder {wrong[0]!r} has {found}, expected one per sample ({len(z)},)")
    if not blocks:
        return z.new_zeros(len(z), 0)
    guesses = torch.stack([decoded[block].cpu() for block in blocks], dim=1)
    return (guesses == z.argmax(dim=1, keepdim=True)).double()
