"""What multiplies by the decisions of gates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class LayerGate(nn.Module):
    """Multiply the body of a block by its gate.

    Shape:
        body (B, C, H, W), decisions (B, 1); returns the shape of `body`.
    """

    def forward(self, body: Tensor, decisions: Tensor) -> Tensor:
        """Return the body where the gate is open, else zero."""
        return body * decisions[:, :, None, None]


class ChannelGate(nn.Module):
    """Multiply groups of channels by their gates.

    Args:
        column: (C,) which gate opens each channel; -1 where the channel is always open.
        count: G, number of gates of the block.
        role: What it gates: "input", "inner", "output" or "projection".

    Shape:
        x (B, C, H, W), decisions (B, G); returns the shape of `x`.
    """

    column: Tensor

    def __init__(self, column: Tensor, count: int, role: str) -> None:
        super().__init__()
        self.register_buffer("column", column, persistent=False)
        self.count = count
        self.role = role

    def forward(self, x: Tensor, decisions: Tensor) -> Tensor:
        """Return `x` with zeros in the channels whose gate is closed."""
        return x * self.mask(decisions)[:, :, None, None]

    def mask(self, decisions: Tensor) -> Tensor:
        """Return the factor of every channel, (B, C)."""
        opened = torch.cat([decisions.new_ones(decisions.shape[0], 1), decisions], dim=1)
        return opened.index_select(1, self.column + 1)

    def sliced(self, channels: Tensor) -> ChannelGate:
        """Return the gate of the channels `channels` of those it has now."""
        return ChannelGate(self.column[channels.to(self.column.device)], self.count, self.role)

    def selected(self, keep: Sequence[int]) -> ChannelGate:
        """Return the gate for decisions of only the gates `keep`; the channels of the others are always open."""
        places = torch.full((1 + self.count,), -1)
        places[torch.tensor(list(keep), dtype=torch.long) + 1] = torch.arange(len(keep))
        return ChannelGate(places.to(self.column.device)[self.column + 1], len(keep), self.role)

    def extra_repr(self) -> str:
        """Return the sizes for `print(model)`."""
        return f"{self.role}, {len(self.column)} channels"
