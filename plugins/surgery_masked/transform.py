"""Give every branch its own input."""

from __future__ import annotations

import copy
from typing import Any

import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import nn

from surgery import Architecture, Block, Rewriter
from surgery.errors import InvalidOption, NothingConverted
from surgery_masked.geometry import Geometry
from surgery_masked.joins import Join, Row
from surgery_masked.masks import Connectivity, Masks
from surgery_masked.norms import BranchNorm, ConsumerNorm, StreamNorm
from surgery_masked.placement import Place, branch_count, chains
from surgery_masked.streams import MergeWeight, SharedConv2d, StreamConv2d

MASKS = "masked_masks"
"""Name of the module of all masks."""


def mask(
    architecture: Architecture,
    rewriter: Rewriter,
    *,
    fan_in: int | None,
    connectivity: Connectivity,
    aggregate: str,
    norm: str,
    branches: int | None,
    mask_lr: float,
) -> None:
    """Let the branches of consecutive blocks read one another.

    Raises:
        NothingConverted: If no two consecutive blocks can be masked, with the reason for each.
        InvalidOption: If the channels cannot be divided into `branches`, or a branch would read more than there are.
    """
    found, refusals = chains(rewriter, architecture)
    if not found:
        raise NothingConverted(
            f"masked: no two consecutive blocks of {architecture.name} can be masked",
            (*refusals, *architecture.refusals),
        )
    count = branch_count([place.block for chain in found for place in chain], branches)
    reads = _fan_in(fan_in, count, connectivity)
    pairs = sum(len(chain) - 1 for chain in found)
    masks = _masks(rewriter, pairs, count, reads, connectivity, mask_lr)
    # Before everything else: a compiled graph is interrupted there, and what comes before would be one of its own.
    image = next(iter(rewriter.network.graph.nodes)).name
    node = rewriter.compute(masks, image, at=None, role="masks")
    index = 0
    for chain in found:
        for place in chain:
            is_last = place is chain[-1]
            edit = _Edit(rewriter, place, count, count if is_last else reads, aggregate, norm)
            if place is not chain[0]:
                edit.read_streams()
            edit.join(None if is_last else node, index)
            index += not is_last


def _fan_in(asked: int | None, branches: int, connectivity: Connectivity) -> int:
    if connectivity == "full":
        if asked not in (None, branches):
            raise InvalidOption(
                f"masked: option 'fan_in' is {asked} with connectivity='full', expected none, or all {branches}"
            )
        return branches
    fan_in = max(1, branches // 2) if asked is None else asked
    if not 1 <= fan_in <= branches:
        raise InvalidOption(f"masked: option 'fan_in' is {asked}, expected 1 to {branches}, the number of branches")
    return fan_in


def _masks(rewriter: Rewriter, pairs: int, branches: int, fan_in: int, kind: Connectivity, lr: float) -> Masks:
    seed = rewriter.decide("seed", lambda: int(torch.randint(2**31 - 1, ())))
    fixed: Any = None
    if kind == "random":
        fixed = torch.tensor(rewriter.decide("connections", lambda: _random(pairs, branches, fan_in)))
    return Masks(pairs, branches, fan_in, connectivity=kind, lr=lr, seed=seed, fixed=fixed)


def _random(pairs: int, branches: int, fan_in: int) -> list[list[list[int]]]:
    """Return which branches every branch reads: `fan_in` of them, all equally likely."""
    order = torch.rand(pairs, branches, branches).argsort(dim=2)
    drawn: list[list[list[int]]] = order[:, :, :fan_in].sort(dim=2).values.tolist()
    return drawn


class _Edit:
    """The edits of one block."""

    def __init__(self, rewriter: Rewriter, place: Place, branches: int, fan_in: int, aggregate: str, norm: str) -> None:
        self.rewriter, self.place, self.branches, self.fan_in = rewriter, place, branches, fan_in
        self.aggregate, self.norm = aggregate, norm

    @property
    def block(self) -> Block:
        """The block as it is now."""
        return self.rewriter.architecture.block(self.place.block.path)

    def read_streams(self) -> None:
        """Let the block read one stream for every branch."""
        rewriter = self.rewriter
        reader = rewriter.module(self.place.reader)
        assert isinstance(reader, nn.Conv2d)
        rewriter.replace(self.place.reader, StreamConv2d(reader, self.branches), role="reader")
        for path in self.place.convs:
            conv = rewriter.module(path)
            assert isinstance(conv, nn.Conv2d)
            rewriter.replace(path, SharedConv2d(conv), role="shared")
        for path in self.place.norms:
            norm = rewriter.module(path)
            assert isinstance(norm, nn.BatchNorm2d)
            rewriter.replace(path, StreamNorm(norm, self.branches), role="norm")
            if isinstance(norm, BatchNormAct2d):
                rewriter.insert(nn.Sequential(norm.drop, norm.act), rewriter.call_of(path), at=self.block, role="act")

    def join(self, masks: str | None, index: int) -> None:
        """Let the block return the streams of its consumers, or a single one where no masks are given."""
        rewriter, block = self.rewriter, self.block
        assert block.merge is not None
        conv = rewriter.module(block.merge)
        assert isinstance(conv, nn.Conv2d)
        geometry = Geometry.of(conv)
        activation = self._activation()
        hidden = rewriter.input_of(block.merge)
        rewriter.replace(block.merge, MergeWeight(conv, self.branches), role="merge")
        mask: list[str] = []
        if masks is not None:
            fed = rewriter.feed(masks, into=block)
            mask = [rewriter.compute(Row(index, self.branches), fed, at=block, role="mask")]
        norm = [self._normalized(geometry, hidden, mask)] if self.place.norm else []
        joins = Join(
            self.branches,
            self.fan_in,
            geometry,
            aggregate=self.aggregate,
            norm=self.norm if norm else None,
            masked=masks is not None,
            activation=activation,
        )
        shortcut = [block.shortcut] if block.shortcut else []
        values = (hidden, rewriter.call_of(block.merge), *norm, *mask, *shortcut)
        node = rewriter.compute(joins, *values, at=block, role="join")
        rewriter.returns(node, at=block)

    def _normalized(self, geometry: Geometry, hidden: str, mask: list[str]) -> str:
        rewriter, path = self.rewriter, self.place.norm
        assert path is not None
        norm = rewriter.module(path)
        assert isinstance(norm, nn.BatchNorm2d)
        if self.norm == "branch":
            rewriter.replace(path, BranchNorm.of(norm, self.branches, geometry), hidden, role="norm")
        else:
            consumers = self.branches if mask else 1
            behind = ConsumerNorm.of(norm, consumers, geometry, self.branches)
            rewriter.replace(path, behind, hidden, *mask, role="norm")
        return rewriter.call_of(path)

    def _activation(self) -> nn.Module | None:
        path = self.place.activation
        if path is None:
            return None
        return nn.ReLU() if path == "relu" else copy.deepcopy(self.rewriter.module(path))
