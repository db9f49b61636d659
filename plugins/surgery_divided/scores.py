"""How good each small network is, how good they are together, and how often they agree."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor, nn

from surgery import record
from surgery.errors import InvalidOption
from surgery.objective import unwrap
from surgery.taps import undisturbed
from surgery_divided.ensemble import Manner, combine, ensemble_of

Loader = Iterable[tuple[Tensor, Tensor]]
MANNERS: tuple[Manner, ...] = get_args(Manner)


@dataclass(frozen=True)
class Accuracies:
    """Top-1 accuracies of a divided network, all in [0, 1].

    Attributes:
        members: That of each small network.
        ensembles: That of their ensemble, for each manner to join them.
        agreement: Share of the images of which all say the same class.
        agreed: Accuracy on these; nan where there is none.
        images: Number of images.

    Reference:
        Zhao et al., 2022, figure 5 and table 9.
    """

    members: tuple[float, ...]
    ensembles: Mapping[Manner, float]
    agreement: float
    agreed: float
    images: int

    @property
    def average(self) -> float:
        """Mean accuracy of the small networks."""
        return sum(self.members) / len(self.members)


def accuracies(model: nn.Module, loader: Loader) -> Accuracies:
    """Return the accuracies of a divided network in one pass; nothing on the network changes, also not its mode.

    Args:
        model: A divided network, distributed or not.
        loader: Yields batches of images, (B, C, H, W) or (B, S*C, H, W), and class indices (B,).

    Raises:
        InvalidOption: If the loader yields no image, or targets that are no class indices.
        UnsupportedModel: If `model` is no divided network.
    """
    network = unwrap(model)
    networks = len(ensemble_of(network).taps)
    device = next(network.parameters()).device
    # For each member, for each manner, all agree, all agree and are right.
    hits = torch.zeros(networks + len(MANNERS) + 2, dtype=torch.int64, device=device)
    images = 0
    with evaluating(network), undisturbed(network), record(network) as taps, torch.inference_mode():
        for batch, labels in loader:
            _check_labels(labels, len(batch))
            network(batch.to(device))
            hits += _hits([taps[f"logits/{i}"] for i in range(networks)], labels.to(device))
            images += len(batch)
    if not images:
        raise InvalidOption("accuracies: the loader yielded no image, expected at least one batch (images, labels)")
    *right, same, agreed = hits.tolist()
    members, ensembles = right[:networks], right[networks:]
    return Accuracies(
        tuple(count / images for count in members),
        {manner: count / images for manner, count in zip(MANNERS, ensembles, strict=True)},
        same / images,
        agreed / same if same else float("nan"),
        images,
    )


def best_member(model: nn.Module, loader: Loader) -> int:
    """Return the index of the small network with the highest accuracy, the first of several.

    Args:
        model: A divided network.
        loader: As for `accuracies`.

    Raises:
        InvalidOption: If the loader yields no image.
        UnsupportedModel: If `model` is no divided network.
    """
    found = accuracies(model, loader).members
    return found.index(max(found))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Let `model` run in eval mode and give every module its own mode back."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _hits(logits: list[Tensor], labels: Tensor) -> Tensor:
    said = torch.stack([value.argmax(-1) for value in logits])  # (S, B)
    together = torch.stack([combine(logits, manner).argmax(-1) for manner in MANNERS])
    same = (said == said[0]).all(0)
    right = torch.cat([said, together]) == labels
    return torch.cat([right, same[None], (same & right[0])[None]]).sum(1)


def _check_labels(labels: Tensor, images: int) -> None:
    if labels.shape != (images,) or labels.is_floating_point():
        raise InvalidOption(
            f"accuracies: found labels {tuple(labels.shape)} of {labels.dtype}, expected ({images},) class indices; "
            "leave mixup out of the loader"
        )
