"""How often gates open on a set of images, and how many multiply-adds that costs.

Reference: Herrmann, Bowen & Zabih, Channel selection using Gumbel Softmax (2020), supplement, sections 2 and 4.2.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

import surgery
from surgery import ConvertedNetwork
from surgery.errors import InvalidOption
from surgery.taps import undisturbed
from surgery_gated.gates import Gates
from surgery_gated.inference import evaluating, gates_in
from surgery_gated.macs import network_macs
from surgery_gated.transform import gated_blocks

_AT_MODE = 0.999  # of the decisions of a gate, in the paper


@dataclass(frozen=True)
class Polarization:
    """How far gates have settled: shares of all gates, in [0, 1].

    Attributes:
        gates: Number of gates.
        tolerance: A gate is nearly always on, or off, if it does otherwise for at most this share of the images.
        on: Share of the gates that are nearly always on.
        off: Share of the gates that are nearly always off.
        between: Share of all others.
        at_mode: Share of the gates that do what they do most often for more than 99.9 % of the images.
        mode_share: Share of the decisions that are the most frequent one of their gate, the mean over the gates.
    """

    gates: int
    tolerance: float
    on: float
    off: float
    between: float
    at_mode: float
    mode_share: float


@dataclass(frozen=True)
class Usage:
    """What the gates of a network did on a set of images.

    Attributes:
        images: Number of images.
        mode: The mode of the gates, such as "Threshold(tau=0.5)"; several are joined by " and ".
        rates: Share of the images that each gate was open for, (G,) by path of the block.
        probabilities: P(open) of each gate, the mean over the images, (G,) by path of the block.
        macs: Multiply-adds of one image, the mean over the images, without those of the gates themselves.
        full_macs: The same with all gates open.
        accuracy: Share of the images that were classified rightly, or None where there were no targets.
    """

    images: int
    mode: str
    rates: Mapping[str, tuple[float, ...]]
    probabilities: Mapping[str, tuple[float, ...]]
    macs: float
    full_macs: float
    accuracy: float | None

    @property
    def rate(self) -> float:
        """Activation: the mean rate of all gates."""
        rates = _joined(self.rates)
        return sum(rates) / len(rates)

    @property
    def macs_share(self) -> float:
        """Multiply-adds as a share of those with all gates open."""
        return self.macs / self.full_macs

    def polarization(self, tolerance: float = 0.05) -> Polarization:
        """Return how many gates are nearly always on or off.

        Args:
            tolerance: Share of the images for which such a gate may do otherwise, in [0, 0.5).

        Raises:
            InvalidOption: If `tolerance` is out of range.
        """
        if not 0 <= tolerance < 0.5:
            raise InvalidOption(f"polarization: found tolerance={tolerance!r}, expected a share in [0, 0.5)")
        rates = _joined(self.rates)
        on = sum(rate >= 1 - tolerance for rate in rates)
        off = sum(rate <= tolerance for rate in rates)
        at_mode = [max(rate, 1 - rate) for rate in rates]
        return Polarization(
            gates=len(rates),
            tolerance=tolerance,
            on=on / len(rates),
            off=off / len(rates),
            between=(len(rates) - on - off) / len(rates),
            at_mode=sum(share > _AT_MODE for share in at_mode) / len(rates),
            mode_share=sum(at_mode) / len(rates),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values, and what follows from them."""
        lists = {
            name: {path: list(v) for path, v in getattr(self, name).items()} for name in ("rates", "probabilities")
        }
        derived = {"rate": self.rate, "macs_share": self.macs_share}
        return {**dataclasses.asdict(self), **lists, **derived, "polarization": dataclasses.asdict(self.polarization())}


@torch.no_grad()
def measure(model: nn.Module, batches: Iterable[Any]) -> Usage:
    """Run a network over all images once, in eval mode, with its gates in their current mode, and watch them.

    Nothing is skipped meanwhile; modes, gates and taps are left as they were found. To measure another mode, call it
    inside of `inference(model, mode)`.

    Args:
        model: The network, in any mode.
        batches: Yields images (B, C, H, W), or tuples that begin with images and targets (B,). Batches may differ in
            size: every image counts the same.

    Raises:
        InvalidOption: If the network has no gates, there is no image, or only some batches have targets.
    """
    modes = dict.fromkeys(str(gates.mode) for gates in gates_in(model, "measure"))
    assert isinstance(model, ConvertedNetwork)
    count = _Count()
    device = next(model.parameters()).device
    with evaluating(model), undisturbed(model), _watching(model, count.probabilities), surgery.record(model) as taps:
        for batch in batches:
            images, *rest = batch if isinstance(batch, (tuple, list)) else (batch,)
            logits = model(images.to(device))
            decisions = {block.path: taps[f"{block.path}/gates"].double() for block, _ in gated_blocks(model)}
            count.add(decisions, network_macs(model, decisions), logits, rest[0] if rest else None)
    if not count.images or count.judged not in (0, count.images):
        raise InvalidOption(
            f"measure: found {count.images} images, {count.judged} of them with a target, expected one or more, and "
            "targets for all or for none"
        )
    everything = {block.path: torch.ones(1, gates.count, dtype=torch.float64) for block, gates in gated_blocks(model)}
    everything = {path: values.to(device) for path, values in everything.items()}
    return Usage(
        images=count.images,
        mode=" and ".join(modes),
        rates=count.means(count.opened),
        probabilities=count.means(count.probabilities),
        macs=count.macs / count.images,
        full_macs=float(network_macs(model, everything)),
        accuracy=count.hits / count.images if count.judged else None,
    )


class _Count:
    """Sums over images."""

    def __init__(self) -> None:
        self.images, self.judged, self.hits, self.macs = 0, 0, 0, 0.0
        self.opened: dict[str, Tensor] = {}
        self.probabilities: dict[str, Tensor] = {}

    def add(self, decisions: Mapping[str, Tensor], macs: Tensor, logits: Tensor, targets: Tensor | None) -> None:
        """Add a batch."""
        self.images += len(logits)
        self.macs += float(macs.sum())
        for path, values in decisions.items():
            self.opened[path] = self.opened.get(path, 0) + values.sum(dim=0).cpu()
        if targets is not None:
            self.judged += len(targets)
            self.hits += int((logits.argmax(dim=1) == targets.to(logits.device)).sum())

    def means(self, sums: Mapping[str, Tensor]) -> dict[str, tuple[float, ...]]:
        """Return sums as means over the images."""
        return {path: tuple((values / self.images).tolist()) for path, values in sums.items()}


@contextmanager
def _watching(model: ConvertedNetwork, sums: dict[str, Tensor]) -> Iterator[None]:
    """Add up P(open) of every gate over the images, by block, and let blocks run as graphs: those call gates."""
    handles: list[RemovableHandle] = []
    before = [(gates, gates.skipping) for _, gates in gated_blocks(model)]

    def watch(path: str, gates: Gates) -> None:
        def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            sums[path] = sums.get(path, 0) + gates.probabilities(inputs[0]).double().sum(dim=0).cpu()

        handles.append(gates.register_forward_pre_hook(add))

    try:
        for block, gates in gated_blocks(model):
            gates.skipping = False
            watch(block.path, gates)
        yield
    finally:
        for handle in handles:
            handle.remove()
        for gates, skipping in before:
            gates.skipping = skipping


def _joined(values: Mapping[str, tuple[float, ...]]) -> list[float]:
    return [value for part in values.values() for value in part]
