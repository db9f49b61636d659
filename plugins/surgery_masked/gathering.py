"""The sum of few branches: where every consumer reads one or two, for good, they are fetched instead of mixed."""

from __future__ import annotations

import torch
from torch import Tensor

from surgery_masked.kernels import Mix
from surgery_masked.memory import chunks, empty


def gather(
    hidden: Tensor, shortcut: Tensor | None, weight: Tensor, scale: Tensor, shift: Tensor, index: Tensor, mix: Mix
) -> Tensor:
    """Return the streams of consumers that read a few branches each; not differentiable.

    The narrow hidden channels are fetched in place of the outputs, so that one product gives the sum.

    Shape:
        As `kernels.join`, with index (C', K) in place of the mask.
    """
    consumers, (branches, channels, width) = len(index), weight.shape
    hidden = hidden.contiguous()
    shortcut = None if shortcut is None else shortcut.contiguous()
    chosen = (weight[index] * scale[:, None, :, None]).transpose(1, 2).flatten(2)  # (C', c, K * d)
    joined = empty(hidden, (len(hidden), consumers * channels, *hidden.shape[2:]))
    for out, part, through in chunks(joined, joined, hidden, shortcut):
        images = len(part)
        read = part.view(images, branches, width, -1).index_select(1, index.flatten())
        read = read.view(images * consumers, chosen.shape[2], -1)
        weights = chosen.expand(images, *chosen.shape).flatten(0, 1)
        wide = out.view(images, consumers, channels, -1)
        if through is None:
            torch.bmm(weights, read, out=wide.flatten(0, 1))
        else:
            _fetch(through, index, wide)
            torch.baddbmm(wide.flatten(0, 1), weights, read, beta=mix.shortcut, out=wide.flatten(0, 1))
        wide.add_(shift.unsqueeze(-1))
        if mix.rectify:
            wide.clamp_min_(0)
    return joined


def _fetch(through: Tensor, index: Tensor, out: Tensor) -> None:
    """Write the sum of the shortcuts that each consumer reads; all branches may share one."""
    images, _, channels, _ = out.shape
    streams = through.view(images, -1, *out.shape[2:])
    if through.shape[1] == channels:
        out.copy_(streams).mul_(index.shape[1])
        return
    torch.index_select(streams, 1, index[:, 0], out=out)
    for others in index.T[1:]:
        out.add_(streams.index_select(1, others))
