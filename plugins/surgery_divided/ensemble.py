"""What stands before and behind the small networks: the split of an image into views, and the ensemble."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from surgery import ConvertedNetwork
from surgery.conversion import INCOMPLETE
from surgery.errors import InvalidOption, UnsupportedModel
from surgery.objective import unwrap
from surgery.taps import Tap

Manner = Literal["mean_logits", "max_logits", "mean_probabilities", "max_probabilities"]


class SplitViews(nn.Module):
    """Hand every small network its own view of the image, or all of them the image itself.

    Args:
        networks: S.
        channels: Channels of one view, C.

    Shape:
        (B, C, H, W), one view for all, or (B, S*C, H, W), view i for network i, to S tensors (B, C, H, W).
    """

    def __init__(self, networks: int, channels: int) -> None:
        super().__init__()
        self.networks, self.channels = networks, channels

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return what each network sees.

        Raises:
            InvalidOption: If the image has neither C nor S*C channels.
        """
        found = image.shape[1]
        if found == self.channels:
            return (image,) * self.networks
        if found != self.networks * self.channels:
            raise InvalidOption(
                f"divided: found an image of {found} channels, expected {self.channels}, one view for all networks, or "
                f"{self.networks * self.channels}, one for each of {self.networks}; see surgery_divided.several_views"
            )
        return image.chunk(self.networks, dim=1)

    def extra_repr(self) -> str:
        """Return the sizes for `print(model)`."""
        return f"networks={self.networks}, channels={self.channels}"


class Ensemble(nn.Module):
    """Join the logits of the small networks; each is tapped as `logits/<i>`.

    Args:
        networks: S.
        manner: Mean or maximum over the networks, before or behind the softmax. What is behind it is returned as
            logarithm, so that a softmax of the result gives the joined probabilities (the maximum, which sums to more
            than one, in proportion).

    Shape:
        S tensors (B, classes) to (B, classes).

    Reference:
        Zhao et al., 2022, equation 10 and appendix C.
    """

    def __init__(self, networks: int, manner: Manner = "mean_logits") -> None:
        super().__init__()
        if manner not in get_args(Manner):
            raise InvalidOption(f"divided: ensemble is {manner!r}, expected one of {', '.join(get_args(Manner))}")
        self.manner = manner
        self.taps = nn.ModuleList([Tap(f"logits/{i}") for i in range(networks)])

    def forward(self, *logits: Tensor) -> Tensor:
        """Return the logits of the ensemble."""
        return combine([tap(value) for tap, value in zip(self.taps, logits, strict=True)], self.manner)

    def selected(self, keep: Sequence[int]) -> Ensemble:
        """Return the ensemble of the networks `keep`."""
        return Ensemble(len(keep), self.manner).train(self.training)

    def extra_repr(self) -> str:
        """Return the manner for `print(model)`."""
        return self.manner


def combine(logits: Sequence[Tensor], manner: Manner) -> Tensor:
    """Join logits (B, classes) of several networks into one tensor of the same shape, see `Ensemble`."""
    stacked = torch.stack(list(logits))
    if manner == "mean_logits":
        return stacked.mean(0)
    if manner == "max_logits":
        return stacked.amax(0)
    log_probabilities = stacked.log_softmax(-1)
    if manner == "max_probabilities":
        return log_probabilities.amax(0)
    return log_probabilities.logsumexp(0) - math.log(len(logits))


def members(model: nn.Module) -> tuple[ConvertedNetwork, ...]:
    """Return the S small networks themselves, not copies; each maps (B, C, H, W) to (B, classes).

    Of a network that is distributed over processes, that of this process. They train and predict; to save or prune one
    by itself, cut it out: `surgery.prune(model, members=[i])`.

    Raises:
        UnsupportedModel: If `model` is no divided network.
    """
    try:
        found = getattr(unwrap(model), "members", None)
    except UnsupportedModel:
        found = None
    if not isinstance(found, nn.ModuleList):
        raise UnsupportedModel(f"expected a network converted by 'divided', found a {type(model).__name__}")
    return tuple(member for member in found if isinstance(member, ConvertedNetwork))


def whole(model: nn.Module) -> ConvertedNetwork:
    """Return the divided network itself, without wrappers.

    Raises:
        UnsupportedModel: If `model` is no divided network, or if other processes hold some of its small networks.
    """
    members(model)
    network = unwrap(model)
    if INCOMPLETE in network.meta:
        raise UnsupportedModel(f"found {network.meta[INCOMPLETE]}")
    return network


def ensemble_of(model: nn.Module) -> Ensemble:
    """Return the module that joins the logits of a divided network.

    Raises:
        UnsupportedModel: If `model` is no divided network.
    """
    for module in model.modules():
        if isinstance(module, Ensemble):
            return module
    raise UnsupportedModel(f"expected a network converted by 'divided', found a {type(model).__name__}")
