"""The classifiers of nested sub-networks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from surgery.taps import Tap
from surgery_inclusive.prefixes import PrefixCache
from surgery_inclusive.selection import Span


class Heads(nn.Linear):
    """A classifier for every sub-network; the full one has that of the source.

    Args:
        linear: What it stands for; the parameters are taken over.
        count: K.
        sparse: Whether sub-network k has the first k/K of the features, instead of features of its own.
        coarse: Level -> number of coarse classes: with these, every sub-network also has a classifier for each level.

    Attributes:
        thin: Classifiers of the sub-networks 1 to K - 1.
        coarse: Classifiers of the coarse levels, for each sub-network.
        taps: "logits/<k>" for each sub-network, and "logits/<k>/<level>".
        remembering: Whether features are kept for the next span, while anytime prediction runs.

    Shape:
        (B, F_k) to (B, classes).

    Reference: Lee & Shin (2018), equations 1 and 2.
    """

    def __init__(self, linear: nn.Linear, count: int, *, sparse: bool, coarse: dict[str, int]) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self._parameters.update(linear._parameters)
        self.count, self.sparse = count, sparse
        widths = [linear.in_features * (k if sparse else count) // count for k in range(1, count + 1)]
        self.thin = nn.ModuleList([_narrowed(linear, width) for width in widths[:-1]])
        self.coarse = nn.ModuleList(
            [nn.ModuleList([_like(linear, width, classes) for classes in coarse.values()]) for width in widths]
        )
        names = [f"{k}{level}" for k in range(1, count + 1) for level in ("", *(f"/{level}" for level in coarse))]
        self.taps = nn.ModuleList([Tap(f"logits/{name}") for name in names])
        self.remembering = False
        self.cache = PrefixCache()

    @property
    def recording(self) -> bool:
        """Whether the logits of all sub-networks are wanted."""
        return any(tap.recording for tap in self.taps)

    def clear(self) -> None:
        """Forget the logits of an earlier forward."""
        for tap in self.taps:
            assert isinstance(tap, Tap)
            tap.clear()

    def forward(self, input: Tensor, span: Span) -> Tensor:  # type: ignore[override]
        """Return the logits of the sub-network that `span` ends with, and tap those of all that it computes."""
        start, stop = span
        if self.sparse and (start or self.remembering):
            input = torch.cat(self.cache.add(input, start, stop), dim=1)
        if self.sparse and span == (0, self.count) and (self.training or self.recording):
            width = self.in_features // self.count
            for k in range(1, self.count):
                self._classified(input[..., : k * width], k)
        return self._classified(input, stop)

    def selected(self, keep: Sequence[int]) -> nn.Module:
        """Return the classifier of one sub-network, 0 for the thinnest."""
        (index,) = keep
        return _narrowed(self, self.in_features) if index == len(self.thin) else self.thin[index]

    def _classified(self, features: Tensor, k: int) -> Tensor:
        levels = self.coarse[k - 1]
        assert isinstance(levels, nn.ModuleList)
        place = (k - 1) * (1 + len(levels))
        logits: Tensor = super().forward(features) if k == self.count else self.thin[k - 1](features)
        for number, classifier in enumerate(levels, start=place + 1):
            self.taps[number](classifier(features))
        tapped: Tensor = self.taps[place](logits)
        return tapped


def _narrowed(linear: nn.Linear, width: int) -> nn.Linear:
    """Return a plain classifier of the first `width` features, with copies of what `linear` has."""
    twin = nn.Linear(width, linear.out_features, linear.bias is not None, device="meta")
    twin.weight = nn.Parameter(linear.weight.detach()[:, :width].clone(), linear.weight.requires_grad)
    if linear.bias is not None:
        twin.bias = nn.Parameter(linear.bias.detach().clone(), linear.bias.requires_grad)
    return twin.train(linear.training)


def _like(linear: nn.Linear, width: int, classes: int) -> nn.Linear:
    """Return a fresh classifier on the device, and of the type, of `linear`."""
    return nn.Linear(width, classes, linear.bias is not None, device=linear.weight.device, dtype=linear.weight.dtype)
