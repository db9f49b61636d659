"""The coding loss and the decoding of energies.

With e = (e_1, ..., e_N) the normalized energies of a block (mean 1 over N), w_k in {0, 1}^N the codeword of class k
with N_act ones, and r = N_act / N,

    coding loss   L = mean over the batch of (1/N) sum_n |r e_n - w_{k,n}|^q, q = 4, k the true class     (Eq. 5)
    total loss    cross entropy + mu * (sum of L over the coded blocks)                                   (Eq. 6)
    decoder       k* = argmin_k |v - w_k|^2 = argmax_k <v, w_k>, v = r e                                  (Eq. 7)

The second form of the decoder holds because all codewords of a scheme have N_act ones; it does not change when v is
multiplied by a positive number.

Reference: Coded ResNeXt (2022).
"""

from __future__ import annotations

import torch
from torch import Tensor

from surgery.errors import InvalidOption


def coding_loss(energies: Tensor, codewords: Tensor, ratio: float, exponent: float = 4) -> Tensor:
    """Return the coding loss of one block, averaged over branches and batch.

    Args:
        energies: Normalized energies.
        codewords: The codeword of every sample's class, as `target_codewords` returns it.
        ratio: r = N_act / N, in (0, 1].
        exponent: q > 0; the method uses 4.

    Shape:
        energies (B, N), codewords (B, N); returns a scalar.

    Raises:
        InvalidOption: If the shapes differ, or `exponent` is not positive.

    Reference: Coded ResNeXt (2022), Eq. 5.
    """
    if energies.shape != codewords.shape:
        raise InvalidOption(
            f"coding loss: found energies {tuple(energies.shape)} and codewords {tuple(codewords.shape)}, expected one "
            "shape (B, N); pass one codeword per sample"
        )
    if exponent <= 0:
        raise InvalidOption(f"coding loss: found exponent={exponent}, expected a positive number; the method uses 4")
    return (ratio * energies - codewords).abs().pow(exponent).mean()


def target_codewords(codewords: Tensor, target: Tensor) -> Tensor:
    """Return the codeword of every sample's class; for soft targets the mean of codewords that they weigh.

    There is no `ignore_index`: every sample needs its class. An index outside 0..K-1 is an `IndexError` on the CPU and
    a device-side assertion on an accelerator, as it is in `torch.nn.functional.cross_entropy`: looking at the values
    here would wait for the device in every step.

    Shape:
        codewords (K, N) bool or float; target (B,) integers in 0..K-1, or (B, K) weights; returns (B, N), of the dtype
        of the weights for soft targets, else float32 for bool codewords and their own dtype otherwise.

    Raises:
        InvalidOption: If `target` has neither of the two forms.
    """
    classes = codewords.shape[0]
    if target.ndim == 1 and not target.is_floating_point() and target.dtype != torch.bool:
        words = codewords.float() if codewords.dtype == torch.bool else codewords
        return words.index_select(0, target)
    if target.ndim == 2 and target.is_floating_point() and target.shape[1] == classes:
        return target @ codewords.to(target.dtype)
    raise InvalidOption(
        f"coding loss: found a target of shape {tuple(target.shape)} and {target.dtype}, expected class indices (B,) "
        f"or weights (B, {classes}) of the {classes} classes of the scheme; convert the labels, or fit the scheme"
    )


def decode(energies: Tensor, codewords: Tensor) -> Tensor:
    """Return the class whose codeword is nearest to the energies; the lowest one of a tie.

    Shape:
        energies (B, N), up to a positive factor per sample; codewords (K, N), equally many ones each; returns
        (B,) int64.

    Reference: Coded ResNeXt (2022), Eq. 7.
    """
    scores = energies @ codewords.to(energies.dtype).T
    # argmax promises no order among equals; the first True of a row does: 1 + the count of rows before it, capped.
    is_best = scores == scores.amax(dim=1, keepdim=True)
    order = torch.arange(scores.shape[1], device=scores.device)
    return torch.where(is_best, order, scores.shape[1]).amin(dim=1)
