"""What joins the branches of a block: the mask that says which, and the sum itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from surgery_masked import kernels
from surgery_masked.gathering import gather
from surgery_masked.geometry import Geometry, autocast_dtype, branch_outputs, by_branch, runs_eagerly
from surgery_masked.kernels import Mix
from surgery_masked.norms import dense

_FEW = 2  # fan-in up to which fetching is faster than mixing


class Row(nn.Module):
    """Take the mask of one pair of blocks out of all.

    Shape:
        masks (L, C', C); returns (C', C).
    """

    def __init__(self, index: int, branches: int) -> None:
        super().__init__()
        self.index, self.branches = index, branches

    def forward(self, masks: Tensor) -> Tensor:
        """Return the mask."""
        return masks[self.index]

    def selected(self, keep: Sequence[int]) -> Gather:
        """Return the connections `keep`, numbered row by row: j * C + k for consumer j and branch k.

        As many of every consumer that has any; the others are gone.
        """
        rows: dict[int, list[int]] = {}
        for entry in keep:
            rows.setdefault(entry // self.branches, []).append(entry % self.branches)
        return Gather(torch.tensor(list(rows.values())))


class Gather(nn.Module):
    """Say which branches each consumer reads, for good.

    Shape:
        returns (C', K), indices.
    """

    index: Tensor

    def __init__(self, index: Tensor) -> None:
        super().__init__()
        self.register_buffer("index", index, persistent=False)

    def forward(self) -> Tensor:
        """Return the indices."""
        return self.index

    def pruned(self, keep: Sequence[int]) -> Gather:
        """Return the same connections where only the branches `keep` are left, which all of them come from."""
        places = torch.zeros(max(keep) + 1, dtype=torch.long, device=self.index.device)
        places[torch.tensor(list(keep), device=places.device)] = torch.arange(len(keep), device=places.device)
        return Gather(places[self.index])

    def extra_repr(self) -> str:
        """Return the sizes for `print(model)`."""
        return f"consumers={self.index.shape[0]}, fan_in={self.index.shape[1]}"


class Join(nn.Module):
    """Let every consumer sum the branches that it reads, with their shortcuts, and apply the activation.

    Args:
        branches: C.
        fan_in: K, how many a consumer reads.
        geometry: Of the merging convolution.
        aggregate: "resnext" divides the shortcuts by K, "mean" everything, "sum" nothing.
        norm: Whose scale and shift are given: "consumer", "branch", or None where there is none.
        masked: Whether a mask is given; else one consumer reads all branches.
        activation: What follows; None for nothing.

    Shape:
        hidden (B, C * d, H, W), weight (c, C * d, kh, kw), scale and shift (2, C', c) or (2, C, c) if there is a norm,
        mask (C', C) or indices (C', K) if masked, shortcuts (B, C * c, H', W'), or (B, c, H', W') for one that all
        branches share, if the block has one; returns (B, C' * c, H', W').
    """

    mixes_channels = True

    def __init__(
        self,
        branches: int,
        fan_in: int,
        geometry: Geometry,
        *,
        aggregate: str,
        norm: str | None,
        masked: bool,
        activation: nn.Module | None,
    ) -> None:
        super().__init__()
        self.branches, self.geometry, self.norm, self.masked = branches, geometry, norm, masked
        self.shortcut_factor = 1.0 if aggregate == "sum" else 1 / fan_in
        self.body_factor = 1 / fan_in if aggregate == "mean" else 1.0
        self.activation = activation

    def forward(self, hidden: Tensor, weight: Tensor, *rest: Tensor) -> Tensor:
        """Return the consumers' streams."""
        values = list(rest)
        norm = values.pop(0).to(weight.dtype) if self.norm else None
        mask = values.pop(0) if self.masked else weight.new_ones(1, self.branches)
        shortcut = values.pop(0) if values else None
        weight, scale, shift = self._folded(weight, norm, mask)
        fused = runs_eagerly(hidden) and self.geometry.is_pointwise(weight)
        join = self._fused if fused else self._literal
        return join(hidden, weight, scale, shift, mask, shortcut)

    def pruned(self, keep: Sequence[int]) -> Join:
        """Return the join of the branches `keep`."""
        self.branches = len(keep)
        return self

    def _folded(self, weight: Tensor, norm: Tensor | None, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the weight, and scale and shift of every consumer, (C', c)."""
        if norm is None:
            scale = weight.new_ones(len(mask), weight.shape[0])
            shift = torch.zeros_like(scale)
        elif self.norm == "branch":
            by_input = norm[0].repeat_interleave(weight.shape[1] // self.branches, dim=0).T
            weight = weight * by_input[:, :, None, None]
            shift = dense(mask, self.branches, norm.dtype) @ norm[1]
            scale = torch.ones_like(shift)
        else:
            scale, shift = norm[0], norm[1]
        return weight, self.body_factor * scale, self.body_factor * shift

    def _fused(
        self, hidden: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, mask: Tensor, shortcut: Tensor | None
    ) -> Tensor:
        dtype = autocast_dtype(hidden)
        rectify = isinstance(self.activation, nn.ReLU)
        apart = by_branch(weight, self.branches).flatten(2).to(dtype)
        through = None if shortcut is None else shortcut.to(dtype)
        mix = Mix(self.shortcut_factor, rectify)
        values = (hidden.to(dtype), through, apart, scale.to(dtype), shift.to(dtype))
        if mask.is_floating_point() or mask.shape[1] > _FEW or torch.is_grad_enabled():
            joined = kernels.join(*values, dense(mask, self.branches, dtype), mix)
        else:
            joined = gather(*values, mask, mix)
        return joined if rectify or self.activation is None else cast(Tensor, self.activation(joined))

    def _literal(
        self, hidden: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, mask: Tensor, shortcut: Tensor | None
    ) -> Tensor:
        outputs = branch_outputs(hidden, weight, self.branches, self.geometry)
        per_channel = (1, *scale.shape, 1, 1)
        joined = _mixed(outputs, mask) * scale.view(per_channel) + shift.view(per_channel)
        if shortcut is not None:
            through = shortcut.unflatten(1, (-1, weight.shape[0]))
            joined = joined + self.shortcut_factor * _mixed(through, mask)
        streams = joined.flatten(1, 2)
        return streams if self.activation is None else cast(Tensor, self.activation(streams))

    def extra_repr(self) -> str:
        """Return the sizes for `print(model)`."""
        return f"branches={self.branches}, norm={self.norm}, masked={self.masked}"


def _mixed(values: Tensor, mask: Tensor) -> Tensor:
    """Return the sums (B, C', c, H, W) of the branches' values (B, C, c, H, W), or of one that all of them have."""
    if values.shape[1] == 1:
        counts = mask.sum(dim=1) if mask.is_floating_point() else torch.full_like(mask[:, 0], mask.shape[1])
        return values * counts.to(values.dtype)[:, None, None, None]
    if mask.is_floating_point():
        return torch.einsum("jk,bkchw->bjchw", mask.to(values.dtype), values)
    gathered = [values.index_select(1, index) for index in mask.unbind(dim=1)]
    return sum(gathered[1:], gathered[0])
