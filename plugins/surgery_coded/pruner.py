"""Cut a network for a few classes out of a coded one."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from surgery import Architecture, Block, ConvertedNetwork, Cut, PrunePlan
from surgery.errors import InvalidOption
from surgery_coded.checks import yes_or_no
from surgery_coded.modules import BranchSwitch, CodedConv2d


def plan_classes(model: ConvertedNetwork, classes: int | Iterable[int]) -> PrunePlan:
    """Plan to keep, in every coded block, the branches that any of `classes` uses, and only those outputs.

    Raises:
        InvalidOption: If `classes` is empty, repeats a class, or names one that does not exist.

    Reference: Coded ResNeXt (2022), section 4.2: removing the inactive branches leaves a binary classifier.
    """
    architecture: Architecture = model.meta["architecture"]
    count = architecture.head.classes or 0
    classes = chosen_classes(classes, count)
    cuts = []
    for block, module in coded_blocks(model):
        if module.codewords.shape[0] != count:
            raise InvalidOption(
                f"coded: the network has {count} outputs, its schemes {module.codewords.shape[0]} classes; reset "
                "the classifier "
                "of the unconverted network and convert that one"
            )
        keep = tuple(active_branches(module, classes))
        reason = f"codeword of class {classes[0]}" if len(classes) == 1 else f"codewords of {len(classes)} classes"
        cuts.append(Cut("branches", block.path, keep, module.branches, reason))
    assert architecture.head.path is not None
    cuts.append(Cut("classes", architecture.head.path, tuple(classes), count, "the classes asked for"))
    return PrunePlan.of(model, "coded", cuts, {"classes": list(classes)})


def chosen_classes(classes: object, count: int) -> list[int]:
    """Return `classes`, an index or several, as a list.

    Raises:
        InvalidOption: If there is none, one repeats, or one is no index of `count` classes.
    """
    try:
        values: list[Any] = list(classes) if isinstance(classes, Iterable) else [classes]
        found = [operator.index(value) for value in values if not isinstance(value, bool)]
    except TypeError:
        found = []
    if not found or len(found) < len(values) or len(set(found)) < len(found) or not set(found) <= set(range(count)):
        raise InvalidOption(
            f"coded: classes={classes!r}, expected distinct class indices from 0 to {count - 1} such as [3], at least "
            "one"
        )
    return found


def coded_blocks(model: ConvertedNetwork) -> Iterator[tuple[Block, CodedConv2d]]:
    """Yield the coded blocks with their coded convolution, in the order of the network."""
    architecture: Architecture = model.meta["architecture"]
    for block in architecture.blocks:
        module = model.get_submodule(block.merge) if block.merge else None
        if isinstance(module, CodedConv2d):
            yield block, module


def branch_switches(model: ConvertedNetwork, block: Block) -> list[BranchSwitch]:
    """Return what switches the branches of a block off before its attention; none where it has no attention there."""
    return [module for module in model.block(block.path).children() if isinstance(module, BranchSwitch)]


def active_branches(module: CodedConv2d, classes: Sequence[int]) -> list[int]:
    """Return the branches of a coded block that any of `classes` uses, ascending."""
    used = module.codewords.cpu()[list(classes)].any(dim=0)
    return [int(n) for n in used.nonzero().flatten()]


def switch_branches(model: ConvertedNetwork, block: str, active: torch.Tensor | None) -> None:
    """Switch branches of one coded block off, as if they had been removed; None switches all of them on.

    Args:
        model: A coded network, changed in place.
        block: Path of a coded block, as `surgery.inspect` prints it.
        active: Ones and zeros: (N,), or (B, N) for other branches in every sample of a batch of B.

    Raises:
        InvalidOption: If the block is not coded, or `active` is of another shape or holds other values.
    """
    check_coded(model, "switch_branches")
    blocks = {found.path: (found, module) for found, module in coded_blocks(model)}
    if block not in blocks:
        raise InvalidOption(f"coded: {block!r} is no coded block, expected one of {', '.join(blocks) or 'none'}")
    found, module = blocks[block]
    if active is not None:
        active = torch.as_tensor(active)
        if active.ndim not in (1, 2) or active.shape[-1] != module.branches:
            raise InvalidOption(
                f"coded: active branches of {block!r} have the shape {tuple(active.shape)}, expected "
                f"({module.branches},) or (B, {module.branches})"
            )
        active = yes_or_no(active, "switch_branches", "active").to(module.weight.device, module.weight.dtype)
    module.active = active
    for switch in branch_switches(model, found):
        switch.active = active


def mask_branches(model: ConvertedNetwork, classes: int | Iterable[int]) -> ConvertedNetwork:
    """Return a copy of the full network in which the branches that none of `classes` uses are switched off.

    It computes what `surgery.prune(model, classes=...)` computes, at full cost and with all outputs.

    Raises:
        InvalidOption: If the model is not coded, or a class is no index of one.
    """
    check_coded(model, "mask_branches")
    classes = chosen_classes(classes, next(coded_blocks(model))[1].codewords.shape[0])
    masked = copy.deepcopy(model)
    for block, module in coded_blocks(masked):
        active = torch.zeros(module.branches)
        active[active_branches(module, classes)] = 1
        switch_branches(masked, block.path, active)
    return masked


def check_coded(model: ConvertedNetwork, where: str) -> None:
    """Refuse what `coded` has not converted.

    Raises:
        InvalidOption: The message begins with `where`.
    """
    if not isinstance(model, ConvertedNetwork) or not any(True for _ in coded_blocks(model)):
        raise InvalidOption(f"{where}: found a {type(model).__name__}, expected a network converted by 'coded'")
