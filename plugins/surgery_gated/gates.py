"""Binary gates that are learned by gradient descent.

A gate has two logits a = (a_0, a_1), closed and open. With independent Gumbel(0, 1) noise g_0, g_1, at temperature 1,

    soft = softmax(a + g)_1 = sigmoid(a_1 - a_0 + n),  n = g_1 - g_0 ~ Logistic(0, 1)
    z    = 1 if soft > 1/2 else 0                                       P(z = 1) = sigmoid(a_1 - a_0)

The forward value is z and the gradient is that of `soft` (straight-through). Independent gates have free logits;
dependent ones compute them from the mean over the positions of the block's input: a layer of 16 units for each gate, a
batch norm, a ReLU and a layer of 2.

Reference: Herrmann, Bowen & Zabih, Channel selection using Gumbel Softmax (2020); for dependent layer gates Veit &
Belongie, Convolutional networks with adaptive inference graphs (2018).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from surgery.errors import InvalidOption
from surgery.network import BlockModule
from surgery.slicing import slice_module
from surgery_gated import skipping

Granularity = Literal["layer", "channel"]

_HIDDEN = 16


@dataclass(frozen=True)
class Threshold:
    """A gate is open where its probability exceeds `tau`, in [0, 1]."""

    tau: float = 0.5

    def __post_init__(self) -> None:
        """Refuse what is no probability."""
        if isinstance(self.tau, bool) or not isinstance(self.tau, (int, float)) or not 0 <= self.tau <= 1:
            raise InvalidOption(f"gated: tau={self.tau!r}, expected a probability in [0, 1] such as 0.5")


@dataclass(frozen=True)
class AlwaysOn:
    """Every gate is open."""


@dataclass(frozen=True)
class Stochastic:
    """Every gate is drawn anew for every image, as in training."""


Mode = Threshold | AlwaysOn | Stochastic
"""How gates decide in eval mode."""


def draw(margin: Tensor) -> Tensor:
    """Return gates that are drawn with probability sigmoid(margin): 0 or 1, with the gradient of the soft gate.

    Args:
        margin: a_1 - a_0 of each gate, any shape, in float32 or float64.
    """
    uniform = torch.rand_like(margin)
    soft = torch.sigmoid(margin + uniform.log() - torch.log1p(-uniform))
    hard = (soft > 0.5).to(soft.dtype)
    return hard + (soft - soft.detach())  # this order adds an exact zero


class IndependentHead(nn.Module):
    """Logits that do not depend on the image.

    Args:
        count: G, number of gates.
        bias: Initial logits (closed, open) of each.

    Shape:
        x (B, ...); returns (B, G, 2).
    """

    def __init__(self, count: int, bias: tuple[float, float]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(bias).repeat(count, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, once for each image."""
        return self.logits.expand(x.shape[0], -1, -1)

    def selected(self, keep: Tensor) -> IndependentHead:
        """Return the head of the gates `keep`."""
        twin = IndependentHead(len(keep), (0.0, 0.0))
        twin.logits = nn.Parameter(self.logits.detach()[keep.to(self.logits.device)], self.logits.requires_grad)
        return twin.train(self.training)

    def reading(self, channels: Tensor) -> IndependentHead:
        """Return itself: it reads no channel."""
        return self


class DependentHead(nn.Module):
    """Logits that are computed from the mean of a block's input over its positions.

    The weights of the last layer start at zero, so that a fresh gate opens with the probability of its bias whatever
    the image is. The paper draws them from N(0, 0.001^2) for layers and by Xavier's rule for channels, which closes
    some gates of a deep network at once.

    Args:
        channels: C of the block's input.
        count: G, number of gates; each has a bottleneck of its own.
        bias: Initial logits (closed, open) of each.

    Shape:
        x (B, C, H, W); returns (B, G, 2).
    """

    def __init__(self, channels: int, count: int, bias: tuple[float, float]) -> None:
        super().__init__()
        self.reduce = nn.Linear(channels, _HIDDEN * count)
        self.norm = nn.BatchNorm1d(_HIDDEN * count)
        self.weight = nn.Parameter(torch.zeros(count, 2, _HIDDEN))
        self.bias = nn.Parameter(torch.tensor(bias).repeat(count, 1))
        nn.init.xavier_uniform_(self.reduce.weight)
        nn.init.zeros_(self.reduce.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of every image."""
        hidden = torch.relu(self._normed(self.reduce(x.mean(dim=(2, 3)))))
        hidden = hidden.unflatten(1, (-1, 1, _HIDDEN)).to(self.weight.dtype)
        logits: Tensor = (hidden * self.weight).sum(dim=-1) + self.bias
        return logits

    def _normed(self, hidden: Tensor) -> Tensor:
        if len(hidden) > 1 or not self.norm.training:
            normed: Tensor = self.norm(hidden)
            return normed
        norm = self.norm  # one image has no variance
        return functional.batch_norm(hidden, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)

    def selected(self, keep: Tensor) -> DependentHead:
        """Return the head of the gates `keep`."""
        units = (keep[:, None] * _HIDDEN + torch.arange(_HIDDEN)).flatten()
        twin = DependentHead(self.reduce.in_features, len(keep), (0.0, 0.0))
        twin.reduce = _linear(slice_module(self.reduce, None, units))
        norm = slice_module(self.norm, None, units)
        assert isinstance(norm, nn.BatchNorm1d)
        twin.norm = norm
        keep = keep.to(self.weight.device)
        twin.weight = nn.Parameter(self.weight.detach()[keep], self.weight.requires_grad)
        twin.bias = nn.Parameter(self.bias.detach()[keep], self.bias.requires_grad)
        return twin.train(self.training)

    def reading(self, channels: Tensor) -> DependentHead:
        """Return the head for an input of the channels `channels` only."""
        twin = self.selected(torch.arange(len(self.weight)))
        twin.reduce = _linear(slice_module(self.reduce, channels, None))
        return twin


class Gates(nn.Module):
    """The gates of one block.

    In train mode they are drawn; in eval mode they follow `mode`. Where `skipping` is set, a block in eager eval mode
    leaves out the work whose gates are closed.

    Args:
        head: Computes the logits.
        granularity: What a gate opens: the "layer", which is the body of the block, or groups of a "channel" each.

    Attributes:
        runs_block: Marks it as a `surgery.network.Runner`.
        mode: How gates decide in eval mode; a threshold is in the state dict.
        skipping: Whether closed gates save work in eval mode.

    Shape:
        x (B, C, H, W), the input of the block; returns (B, G) of zeros and ones, with the dtype of x.
    """

    runs_block = True

    def __init__(self, head: IndependentHead | DependentHead, granularity: Granularity) -> None:
        super().__init__()
        self.head = head
        self.granularity: Granularity = granularity
        self.mode: Mode = Threshold()
        self.skipping = True

    @property
    def dependent(self) -> bool:
        """Whether the gates depend on the image."""
        return isinstance(self.head, DependentHead)

    @property
    def count(self) -> int:
        """Number of gates G."""
        return len(self.head.weight if isinstance(self.head, DependentHead) else self.head.logits)

    def forward(self, x: Tensor) -> Tensor:
        """Return which gates are open for each image."""
        if self.training or isinstance(self.mode, Stochastic):
            return draw(self.margins(x)).to(x.dtype)
        if isinstance(self.mode, AlwaysOn):
            return x.new_ones(x.shape[0], self.count)
        return (self.probabilities(x) > self.mode.tau).to(x.dtype)

    def margins(self, x: Tensor) -> Tensor:
        """Return a_1 - a_0 (B, G) in at least float32."""
        logits: Tensor = self.head(x)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits[..., 1] - logits[..., 0]

    def probabilities(self, x: Tensor) -> Tensor:
        """Return P(open) = sigmoid(a_1 - a_0), (B, G)."""
        return torch.sigmoid(self.margins(x))

    def run(self, block: BlockModule, *args: Tensor) -> Tensor | None:
        """Return what the block returns, without the work of closed gates, or None where that saves nothing."""
        if not self.skipping or (isinstance(self.mode, Stochastic) and torch.is_grad_enabled()):
            return None  # the gradient of drawn gates is that of the product
        run = skipping.run_layer if self.granularity == "layer" else skipping.run_channels
        return run(block, self, *args)

    def get_extra_state(self) -> Tensor:
        """Return the threshold, which a checkpoint keeps; 0.5 in the modes without one."""
        return torch.tensor(self.mode.tau if isinstance(self.mode, Threshold) else Threshold().tau, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Decide by the threshold of a checkpoint."""
        self.mode = Threshold(float(state))

    def selected(self, keep: Sequence[int]) -> Gates:
        """Return the gates `keep` of those it has now."""
        return self._with(self.head.selected(torch.tensor(list(keep), dtype=torch.long)))

    def reading(self, channels: Tensor) -> Gates:
        """Return the gates for an input of the channels `channels` only."""
        return self._with(self.head.reading(channels))

    def _with(self, head: IndependentHead | DependentHead) -> Gates:
        twin = Gates(head, self.granularity)
        twin.mode, twin.skipping = self.mode, self.skipping
        return twin.train(self.training)

    def extra_repr(self) -> str:
        """Return the kind and number of gates for `print(model)`."""
        return f"{self.count} {'dependent' if self.dependent else 'independent'} {self.granularity} gates, {self.mode}"


def _linear(module: nn.Module) -> nn.Linear:
    assert isinstance(module, nn.Linear)
    return module
