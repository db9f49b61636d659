"""What a coded network says of a set of images: energies, early decoders, and the networks for one class.

`batches` stands for any iterable of (images, targets), such as a DataLoader: images (B, 3, H, W) of any device,
targets (B,) class indices. The networks are coded, whole and in eval mode; they run where their parameters are, and are
left as they were found. All results are on the CPU.

Reference: Coded ResNeXt (2022), section 4 and appendices C and F.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import surgery
from surgery import ConvertedNetwork
from surgery.errors import InvalidOption
from surgery_coded.binary import BinaryReport, choose_threshold, judge
from surgery_coded.checks import class_indices, whole_number
from surgery_coded.decoding import check_whole
from surgery_coded.loss import decode
from surgery_coded.pruner import coded_blocks

Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class Collected:
    """What a coded network says of a set of M samples.

    Attributes:
        logits: (M, K).
        targets: (M,) true classes.
        energies: Normalized energies (M, N) of every coded block, by its path.
        decoded: Predictions (M,) of every early decoder, by the path of its block.
    """

    logits: Tensor
    targets: Tensor
    energies: Mapping[str, Tensor]
    decoded: Mapping[str, Tensor]

    @property
    def accuracy(self) -> float:
        """Share of the samples that the network classifies rightly."""
        return float((self.logits.argmax(dim=1) == self.targets).double().mean())

    @property
    def decoder_accuracy(self) -> dict[str, float]:
        """Share of the samples that every early decoder classifies rightly, by block."""
        return {block: float((e == self.targets).double().mean()) for block, e in self.decoded.items()}


@dataclass(frozen=True, eq=False)
class Agreement:
    """How often the network is right, by the number n = 0..D of its D early decoders that agree with it.

    Attributes:
        count: Samples with n decoders that agree, (D + 1,) int64.
        share: The same as a share of all samples, (D + 1,) float64.
        accuracy: Share of them that the network classifies rightly, (D + 1,) float64; NaN where there is none.

    Reference: Coded ResNeXt (2022), section 4.4, Table 3.
    """

    count: Tensor
    share: Tensor
    accuracy: Tensor


@torch.no_grad()
def collect(model: ConvertedNetwork, batches: Batches) -> Collected:
    """Run the network over all samples once and keep its logits, energies and early decodings.

    Raises:
        InvalidOption: If the model is not coded, is pruned or in train mode, there is no batch, or a target is not a
            class.
    """
    check_whole(model, "collect")
    blocks = list(coded_blocks(model))
    logits, labels = [], []
    energies: dict[str, list[Tensor]] = {block.path: [] for block, _ in blocks}
    decoded: dict[str, list[Tensor]] = {block.path: [] for block, _ in blocks}
    for images, targets in placed(model, batches, "collect"):
        with surgery.record(model) as taps:
            logits.append(model(images).cpu())
        labels.append(targets.cpu())
        for block, module in blocks:
            energies[block.path].append(taps[module.energy.name].cpu())
            decoded[block.path].append(decode(taps[module.energy.name], module.codewords).cpu())
    return Collected(
        torch.cat(logits),
        torch.cat(labels),
        {path: torch.cat(parts) for path, parts in energies.items()},
        {path: torch.cat(parts) for path, parts in decoded.items()},
    )


def energy_by_class(collected: Collected) -> dict[str, Tensor]:
    """Return the mean normalized energies of the samples of every class, (K, N) by block; NaN for an absent class.

    Raises:
        InvalidOption: If a target is no class.
    """
    samples, classes = collected.logits.shape
    member = F.one_hot(class_indices(collected.targets, samples, classes, "energy_by_class"), classes).T
    counts = member.sum(dim=1, keepdim=True)
    return {block: member.to(e.dtype) @ e / counts for block, e in collected.energies.items()}


def agreement(decoded: Mapping[str, Tensor], logits: Tensor, targets: Tensor) -> Agreement:
    """Group samples by the number of early decoders that agree with the final prediction.

    Args:
        decoded: Predictions of the early decoders by block.
        logits: Outputs of the network.
        targets: True classes.

    Shape:
        decoded (M,) each, logits (M, K), targets (M,).

    Raises:
        InvalidOption: If the lengths differ, a target is no class, or there is no decoder or no sample.

    Reference: Coded ResNeXt (2022), section 4.4, Table 3.
    """
    lengths = {len(logits), len(targets), *(len(guesses) for guesses in decoded.values())}
    if not decoded or len(lengths) > 1 or lengths == {0}:
        raise InvalidOption(
            f"agreement: found {len(decoded)} early decoders and lengths {sorted(lengths)}, expected a decoder or more "
            "and as many predictions, logits and targets as there are samples"
        )
    truth = class_indices(targets.cpu(), len(logits), logits.shape[1], "agreement")
    prediction = logits.argmax(dim=1).cpu()
    agreeing = torch.stack([guesses.cpu() == prediction for guesses in decoded.values()]).sum(dim=0)
    count = torch.bincount(agreeing, minlength=len(decoded) + 1)
    hits = torch.bincount(agreeing[prediction == truth], minlength=len(decoded) + 1)
    return Agreement(count, count.double() / len(prediction), hits.double() / count)


@torch.no_grad()
def binary_reports(
    model: ConvertedNetwork,
    train_batches: Batches,
    test_batches: Batches,
    classes: Sequence[int] | None = None,
    *,
    negatives: int | None = None,
    seed: int = 0,
) -> dict[int, BinaryReport]:
    """Cut out the network of every class and judge it on test samples, with a threshold from training samples.

    Args:
        model: A coded network, in eval mode.
        train_batches: Read once, as are `test_batches`; each batch runs through all networks that were cut out.
        test_batches: What is reported on.
        classes: Which classes; default: all. Their networks are in memory at the same time.
        negatives: How many negatives to draw for each positive, at most; the paper takes 9 for CIFAR-100 and ImageNet.
            The same on both sides, as the best threshold depends on it. Default: all negatives.
        seed: Of these draws.

    Returns:
        Class -> report, in the order of `classes`.

    Raises:
        InvalidOption: If `classes` is empty or names what is no class, as a target may, a class has no sample or all of
            them on either side, `negatives` is below 1, or the model is not coded, is pruned or in train mode.

    Reference: Coded ResNeXt (2022), section 4.3, Fig. 2b, 2c and 8.
    """
    check_whole(model, "binary_reports")
    if negatives is not None:
        negatives = whole_number(negatives, 1, "binary_reports", "negatives")
    every = range(model.meta["architecture"].head.classes)
    chosen = [whole_number(k, 0, "binary_reports", "class") for k in (every if classes is None else classes)]
    if not chosen or max(chosen) not in every:
        raise InvalidOption(f"binary_reports: found classes={chosen}, expected one or more of 0 to {every[-1]}")
    networks = [surgery.prune(model, classes=[k]).eval() for k in chosen]
    parts = [_binary_logits(model, networks, batches) for batches in (train_batches, test_batches)]
    generator = torch.Generator().manual_seed(seed)
    reports = {}
    for column, k in enumerate(chosen):
        train, test = (_against(logits[:, column], targets == k, negatives, generator, k) for logits, targets in parts)
        reports[k] = judge(*test, choose_threshold(*train))
    return reports


def placed(model: ConvertedNetwork, batches: Batches, where: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches on the device of the model, the targets as int64.

    Raises:
        InvalidOption: If there is none, or a target is no class of the model; the message begins with `where`.
    """
    device, classes = next(model.parameters()).device, model.meta["architecture"].head.classes
    empty = True
    for images, targets in batches:
        empty = False
        yield images.to(device), class_indices(targets, len(images), classes, where).to(device)
    if empty:
        raise InvalidOption(f"{where}: found no batch, expected images and targets; a generator can be read only once")


def _binary_logits(
    model: ConvertedNetwork, networks: Sequence[ConvertedNetwork], batches: Batches
) -> tuple[Tensor, Tensor]:
    """Return the logits of all networks (M, len(networks)) and the targets (M,)."""
    logits, labels = [], []
    for images, targets in placed(model, batches, "binary_reports"):
        logits.append(torch.cat([network(images) for network in networks], dim=1).cpu())
        labels.append(targets.cpu())
    return torch.cat(logits), torch.cat(labels)


def _against(
    logits: Tensor, positive: Tensor, negatives: int | None, generator: torch.Generator, k: int
) -> tuple[Tensor, Tensor]:
    own, others = positive.nonzero()[:, 0], (~positive).nonzero()[:, 0]
    if not len(own) or not len(others):
        raise InvalidOption(
            f"binary_reports: found {len(own)} samples of class {k} and {len(others)} others, expected some of both, "
            "in training and in test; pass more samples or leave the class out"
        )
    if negatives is not None:
        others = others[torch.randperm(len(others), generator=generator)[: negatives * len(own)]]
    kept = torch.cat([own, others])
    return logits[kept], positive[kept]
