"""Predictions that get better the longer they are given, and the best one for a budget."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import surgery
from surgery import ConvertedNetwork
from surgery.errors import InvalidOption
from surgery.objective import unwrap
from surgery.taps import undisturbed
from surgery_inclusive.heads import Heads
from surgery_inclusive.prefixes import PrefixCache
from surgery_inclusive.selection import Subnetworks, selected, subnetworks_of, use
from surgery_inclusive.triangular import NestedTriangularConv2d

Clock = Callable[[], float]


@dataclass(frozen=True, eq=False)
class Prediction:
    """The best prediction within a budget.

    Attributes:
        logits: (B, classes).
        subnetwork: Which sub-network gave it, 1 to K.
        macs: Multiply-adds of one image in that sub-network.
        milliseconds: How long the sub-networks took that ran.
    """

    logits: Tensor
    subnetwork: int
    macs: int
    milliseconds: float


def anytime(model: nn.Module, images: Tensor, *, confidence: float | None = None) -> Iterator[Tensor]:
    """Yield logits after each sub-network, from the thinnest to the full one; stop whenever time is up.

    In a sparse network every step computes only what it has more than the one before; in a dense one every sub-network
    runs anew. The network runs in eval mode and is left as it was between the steps.

    Args:
        model: An inclusive network, wrapped or not.
        images: (B, channels, height, width).
        confidence: An image whose largest class probability reaches this, in (0, 1], keeps its logits, and later steps
            leave it out; the iteration ends when none is left. Default: all images go through all steps.

    Yields:
        (B, classes) logits, without gradients.

    Raises:
        InvalidOption: If the network has no sub-networks, or `confidence` is out of range.
        UnsupportedModel: If it is not converted.

    Reference: Lee & Shin (2018), sections 2.1 and 3.2.
    """
    network = unwrap(model)
    subnetworks = subnetworks_of(network)
    if confidence is not None and not 0 < confidence <= 1:
        raise InvalidOption(
            f"anytime: found confidence={confidence!r}, expected a probability in (0, 1]; leave it out for all steps"
        )
    # A function with yields would check its arguments at the first step only.
    return _predictions(_Steps(network, subnetworks), images, confidence)


def _predictions(steps: _Steps, images: Tensor, confidence: float | None) -> Iterator[Tensor]:
    logits = steps.run(1, images)
    yield logits
    rows = torch.arange(len(images), device=images.device)
    for k in range(2, steps.count + 1):
        if confidence is not None:
            unsure = ~(logits[rows].softmax(dim=1).amax(dim=1) >= confidence)  # also where it is not a number
            if not unsure.any():
                return
            if not unsure.all():
                rows, images = rows[unsure], images[unsure]
                steps.keep(unsure.nonzero().flatten())
        found = steps.run(k, images)
        logits = found if len(rows) == len(logits) else logits.index_copy(0, rows, found)
        yield logits


class _Steps:
    """The steps of one prediction, and what each leaves for the next."""

    def __init__(self, network: ConvertedNetwork, subnetworks: Subnetworks) -> None:
        self.network, self.subnetworks, self.count = network, subnetworks, subnetworks.count
        readers = [m for m in network.modules() if isinstance(m, (Heads, NestedTriangularConv2d))]
        self.caches = {module: PrefixCache() for module in readers} if subnetworks.sparse else {}

    def keep(self, rows: Tensor) -> None:
        """Go on with these images only."""
        for cache in self.caches.values():
            cache.keep(rows)

    def run(self, k: int, images: Tensor) -> Tensor:
        """Return the logits of sub-network `k`; the one before has run."""
        start = k - 1 if self.subnetworks.sparse else 0
        with _inference(self.network, self.subnetworks), self._remembering(), selected(self.subnetworks, k, start):
            logits: Tensor = self.network(images)
        return logits

    @contextmanager
    def _remembering(self) -> Iterator[None]:
        others = {module: module.cache for module in self.caches}  # of another prediction that is under way
        try:
            for module, cache in self.caches.items():
                module.cache, module.remembering = cache, True
            yield
        finally:
            for module, cache in others.items():
                module.cache, module.remembering = cache, False


@contextmanager
def _inference(network: ConvertedNetwork, subnetworks: Subnetworks) -> Iterator[None]:
    """Run in eval mode and without gradients, and leave modes and taps as they are."""
    training = [module for module in network.modules() if module.training] if network.training else []
    for module in training:
        module.training = False
    try:
        # Not in inference mode, even if the caller is: what is kept from a step may be read outside of it.
        heads = network.get_submodule(subnetworks.heads)
        with torch.inference_mode(mode=False), torch.no_grad(), undisturbed(heads):
            yield
    finally:
        for module in training:
            module.training = True


def subnetwork_macs(model: nn.Module, input_size: int | tuple[int, int] | None = None) -> tuple[int, ...]:
    """Return the multiply-adds of one image in each sub-network, from the thinnest to the full one.

    Args:
        model: An inclusive network, wrapped or not.
        input_size: Side of the image in pixels, or (height, width). Default: that of the conversion.

    Raises:
        InvalidOption: If the network has no sub-networks.
        UnsupportedModel: If it is not converted, or cannot run at this size.
    """
    network, subnetworks = unwrap(model), subnetworks_of(model)
    sides = network.meta["architecture"].input_size[1:] if input_size is None else input_size
    size = (sides, sides) if isinstance(sides, int) else (sides[0], sides[1])
    if size not in subnetworks.macs:
        found = []
        for k in range(1, subnetworks.count + 1):
            with use(network, k):
                found.append(surgery.cost(network, size).macs)
        subnetworks.macs[size] = tuple(found)
    return subnetworks.macs[size]


def predict_within(
    model: nn.Module,
    images: Tensor,
    *,
    milliseconds: float | None = None,
    macs: float | None = None,
    clock: Clock = time.perf_counter,
) -> Prediction:
    """Return the prediction of the largest sub-network that a budget has room for.

    A larger budget never gives a thinner sub-network. The first call for a size of images counts the multiply-adds of
    all sub-networks, which is no part of the budget; `subnetwork_macs` does so in advance.

    Args:
        model: An inclusive network, wrapped or not.
        images: (B, channels, height, width).
        milliseconds: Time for all images, at least 0. The thinnest sub-network always runs; a step is taken only if it
            should end in time, judging by how long the ones before took for their multiply-adds.
        macs: Multiply-adds of one image.
        clock: Returns seconds.

    Raises:
        InvalidOption: If not exactly one budget is given, or the thinnest sub-network needs more multiply-adds.
        UnsupportedModel: If the model is not converted.
    """
    if (milliseconds is None) == (macs is None):
        raise InvalidOption(
            f"predict_within: found milliseconds={milliseconds!r} and macs={macs!r}, expected exactly one of them; "
            "leave the other out"
        )
    budget = macs if milliseconds is None else milliseconds
    if not budget >= 0:  # type: ignore[operator]
        raise InvalidOption(f"predict_within: found a budget of {budget!r}, expected a number of at least 0; give one")
    network, subnetworks = unwrap(model), subnetworks_of(model)
    costs = subnetwork_macs(network, (images.shape[-2], images.shape[-1]))
    timer = _Timer(clock, images.device)
    steps = _Steps(network, subnetworks)
    if macs is not None:
        k = sum(cost <= macs for cost in costs)
        if not k:
            raise InvalidOption(
                f"predict_within: the budget is {macs:,.0f} multiply-adds, but the thinnest sub-network needs "
                f"{costs[0]:,}; expected at least that"
            )
        with _inference(network, subnetworks), selected(subnetworks, k):
            logits = network(images)
    else:
        assert milliseconds is not None
        k, logits = _timed(steps, costs, images, timer, milliseconds)
    return Prediction(logits, k, costs[k - 1], timer.milliseconds())


def _timed(
    steps: _Steps, costs: tuple[int, ...], images: Tensor, timer: _Timer, milliseconds: float
) -> tuple[int, Tensor]:
    """Run the thinnest sub-network, then what there is time for: step by step, or the one that pays best anew."""
    k, logits = 1, steps.run(1, images)
    sparse = steps.subnetworks.sparse
    while k < steps.count:
        spent = timer.milliseconds()
        done = costs[k - 1] if sparse else 0
        room = [
            j for j in range(k + 1, steps.count + 1) if _fits(spent, costs[k - 1], costs[j - 1] - done, milliseconds)
        ]
        if not room:
            break
        k = k + 1 if sparse else room[-1]
        logits = steps.run(k, images)
        if not sparse:
            break
    return k, logits


def _fits(spent: float, macs: int, more: int, budget: float) -> bool:
    """Return whether `more` multiply-adds end in time, where `macs` of them took `spent`."""
    return spent * (1 + more / macs) <= budget


class _Timer:
    """Milliseconds since it was made, with all work on a device done."""

    def __init__(self, clock: Clock, device: torch.device) -> None:
        self._clock, self._device = clock, device
        self._start = self._now()

    def milliseconds(self) -> float:
        """Return how many have passed."""
        return 1e3 * (self._now() - self._start)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return self._clock()
