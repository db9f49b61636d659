"""The coded block by its definition: every branch output is materialised. Slow, and shares no code with the library."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-20


def branch_outputs(hidden: Tensor, weight: Tensor, branches: int, stride=1, padding=0, dilation=1) -> list[Tensor]:
    """Return t_1 .. t_N, each (B, C, H', W')."""
    width = hidden.shape[1] // branches
    outputs = []
    for n in range(branches):
        own = slice(n * width, (n + 1) * width)
        outputs.append(F.conv2d(hidden[:, own], weight[:, own], None, stride, padding, dilation))
    return outputs


def energy(t: Tensor) -> Tensor:
    """Return E(t): the mean of the squares over channels and positions, (B,)."""
    return t.square().mean(dim=(1, 2, 3))


def coded_merge(
    hidden, weight, bias, branches, mask=None, active=None, total=None, **geometry
) -> tuple[Tensor, Tensor]:
    """Return the merged output (B, C, H', W') and the energies (B, N) of the normalized branch outputs."""
    outputs = branch_outputs(hidden, weight, branches, **geometry)
    if active is not None:
        outputs = [t * active[..., n].reshape(-1, 1, 1, 1) for n, t in enumerate(outputs)]
    mean_energy = sum(energy(t) for t in outputs) / (branches if total is None else total)
    normalized = [t / torch.sqrt(mean_energy + EPS).reshape(-1, 1, 1, 1) for t in outputs]
    energies = torch.stack([energy(t) for t in normalized], dim=1)
    if mask is not None:
        normalized = [t * mask[:, n].reshape(-1, 1, 1, 1) for n, t in enumerate(normalized)]
    merged = sum(normalized)
    return (merged if bias is None else merged + bias.reshape(1, -1, 1, 1)), energies


def coding_loss(energies: Tensor, words: list[list[int]], ratio: float, exponent: float = 4) -> Tensor:
    """Return the coding loss, sample by sample and branch by branch."""
    total = torch.zeros((), dtype=energies.dtype)
    for row, word in zip(energies, words, strict=True):
        terms = [abs(ratio * e - w) ** exponent for e, w in zip(row, word, strict=True)]
        total = total + sum(terms) / len(terms)
    return total / len(words)
