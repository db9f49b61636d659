"""What single branches are good for: the accuracy without them, and how much they put out.

`batches`, the networks and the results are as in `surgery_coded.analysis`.

Reference: Coded ResNeXt (2022), section 4.1 and appendix F.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from surgery import ConvertedNetwork
from surgery.errors import InvalidOption
from surgery_coded.analysis import Batches, placed
from surgery_coded.checks import whole_number
from surgery_coded.decoding import check_whole
from surgery_coded.energy import branch_energies, normalize
from surgery_coded.modules import CodedConv2d
from surgery_coded.pruner import coded_blocks, switch_branches


@dataclass(frozen=True)
class RemovalAccuracy:
    """Accuracy by the number of branches that were removed from one block, at random for each sample.

    Attributes:
        block: Path of the block.
        active: Number removed of the branches that the true class uses -> accuracy in [0, 1].
        inactive: Number removed of the other branches -> accuracy in [0, 1].

    Reference: Coded ResNeXt (2022), Fig. 2a and 9.
    """

    block: str
    active: Mapping[int, float]
    inactive: Mapping[int, float]


@dataclass(frozen=True, eq=False)
class OutputDistribution:
    """Histograms of the absolute values of normalized branch outputs.

    Attributes:
        block: Path of the block.
        edges: Of the bins, (bins + 1,), from 0 to the largest value met.
        active: Number of values in each bin for samples whose class uses the branch, (branches, bins) int64.
        inactive: The same for all other samples.

    Reference: Coded ResNeXt (2022), Fig. 6.
    """

    block: str
    edges: Tensor
    active: Tensor
    inactive: Tensor


@torch.no_grad()
def removal_accuracy(
    model: ConvertedNetwork, batches: Batches, block: str, counts: Sequence[int] | None = None, *, seed: int = 0
) -> RemovalAccuracy:
    """Measure the accuracy while branches of one block are removed, active or inactive ones of the true class.

    For every sample, k branches are drawn uniformly without replacement and switched off before the normalization;
    those drawn for k are among those for k + 1. The draws follow from `seed` and the order of the samples, not from the
    batches. What was switched off in the block before counts as present, and is off again afterwards.

    Args:
        model: A coded network, in eval mode.
        batches: Read once; for each, the network runs once per count and kind.
        block: Path of a coded block. The paper takes the last one of the last but one stage.
        counts: The numbers k, of which each kind takes those that it has; default: all from 0.
        seed: Of the draws.

    Raises:
        InvalidOption: If `block` is not coded, `counts` holds no or a number that cannot be removed, the model is not
            coded, is pruned or in train mode, there is no batch, or a target is no class.

    Reference: Coded ResNeXt (2022), section 4.1, Fig. 2a, and appendix F.3.
    """
    check_whole(model, "removal_accuracy")
    module = _module(model, block)
    limits = (int(module.codewords[0].sum()), int((~module.codewords[0]).sum()))
    wanted = (
        range(max(limits) + 1)
        if counts is None
        else sorted({whole_number(k, 0, "removal_accuracy", "count") for k in counts})
    )
    if not wanted or wanted[-1] > max(limits):
        raise InvalidOption(
            f"removal_accuracy: found counts={list(wanted)}, expected numbers from 0 to {max(limits)}: {block!r} has "
            f"{limits[0]} active and {limits[1]} inactive branches"
        )
    words, generator = module.codewords.cpu(), torch.Generator().manual_seed(seed)
    hits = [{k: 0 for k in wanted if k <= limit} for limit in limits]
    total = 0
    with _switching(model, block, module):
        for images, targets in placed(model, batches, "removal_accuracy"):
            # Sample by sample: one call for the batch would tie the draws to its size.
            order = torch.stack([torch.rand(module.branches, generator=generator) for _ in targets])
            total += len(targets)
            for of_kind, kind in zip(hits, (words[targets.cpu()], ~words[targets.cpu()]), strict=True):
                rank = order.masked_fill(~kind, torch.inf).argsort(dim=1).argsort(dim=1)
                for k in of_kind:
                    switch_branches(model, block, rank >= k)
                    of_kind[k] += int((model(images).argmax(dim=1) == targets).sum())
    active, inactive = ({k: hit / total for k, hit in of_kind.items()} for of_kind in hits)
    return RemovalAccuracy(block, active, inactive)


@torch.no_grad()
def output_distribution(
    model: ConvertedNetwork, batches: Batches, block: str, *, branches: int = 5, bins: int = 60
) -> OutputDistribution:
    """Count the absolute values of what the first branches of a block add to its sum, after the energy normalization.

    Args:
        model: A coded network, in eval mode.
        batches: Read twice, to find the range and to count; a list or a DataLoader, not a generator.
        block: Path of a coded block. The paper takes the second one of its third stage.
        branches: How many of the branches, the first ones.
        bins: How many bins from zero to the largest value.

    Raises:
        InvalidOption: If `batches` can be read only once, `block` is not coded, there are fewer branches or no bin, the
            model is not coded, is pruned or in train mode, there is no batch, or a target is no class.

    Reference: Coded ResNeXt (2022), appendix F.1.
    """
    check_whole(model, "output_distribution")
    module = _module(model, block)
    if iter(batches) is batches:
        raise InvalidOption(
            f"output_distribution: found batches of type {type(batches).__name__}, which can be read only once, "
            "expected a list or a DataLoader"
        )
    bins = whole_number(bins, 1, "output_distribution", "bins")
    branches = whole_number(branches, 1, "output_distribution", "branches")
    if branches > module.branches:
        raise InvalidOption(
            f"output_distribution: found branches={branches}, expected 1 to {module.branches} branches of {block!r}"
        )
    largest, counts = 0.0, torch.zeros(2, branches, bins, dtype=torch.int64)
    with _hidden_input(module) as hidden:
        for images, _ in placed(model, batches, "output_distribution"):
            model(images)
            for values in _outputs(module, hidden.pop(), branches):
                largest = max(largest, float(values.max()))
        for images, targets in placed(model, batches, "output_distribution"):
            model(images)
            for n, values in enumerate(_outputs(module, hidden.pop(), branches)):
                index = (values * (bins / (largest or 1.0))).long().clamp_(max=bins - 1).flatten(1)
                uses = module.codewords[targets, n]
                for row, chosen in enumerate((uses, ~uses)):
                    counts[row, n] += torch.bincount(index[chosen].flatten(), minlength=bins).cpu()
    edges = torch.linspace(0, largest or 1.0, bins + 1, dtype=torch.float64)
    return OutputDistribution(block, edges, counts[0], counts[1])


def _outputs(module: CodedConv2d, hidden: Tensor, branches: int) -> Iterator[Tensor]:
    """Yield |s t_n| (B, C, H', W') of the first branches, one at a time: all of them would be N outputs large."""
    geometry = (module.stride, module.padding, module.dilation)
    raw = branch_energies(
        hidden, module.weight, module.branches, stride=geometry[0], padding=geometry[1], dilation=geometry[2]
    )
    gain = torch.ones_like(raw) if module.active is None else module.active * torch.ones_like(raw)
    scale = normalize(raw * gain, module.total_branches)[0][:, None] * gain
    weights = module.weight.to(hidden.dtype).unflatten(1, (module.branches, -1))
    for n, own in enumerate(hidden.unflatten(1, (module.branches, -1)).unbind(dim=1)[:branches]):
        t = F.conv2d(own, weights[:, n], None, *geometry)
        yield (t * scale[:, n, None, None, None]).abs_()


@contextmanager
def _hidden_input(module: CodedConv2d) -> Iterator[list[Tensor]]:
    """Append what the module reads to the list, as long as the context is open."""
    hidden: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0]))
    try:
        yield hidden
    finally:
        handle.remove()


@contextmanager
def _switching(model: ConvertedNetwork, block: str, module: CodedConv2d) -> Iterator[None]:
    before = module.active
    try:
        yield
    finally:
        switch_branches(model, block, before)


def _module(model: ConvertedNetwork, block: str) -> CodedConv2d:
    modules = {found.path: module for found, module in coded_blocks(model)}
    if block not in modules:
        raise InvalidOption(f"coded: {block!r} is no coded block, expected one of {', '.join(modules)}")
    return modules[block]
