"""What recognition found in a network: plain data, with graph nodes and modules referred to by name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from surgery.errors import InvalidOption, Refusal

BranchKind = Literal["grouped", "depthwise", "plain"]


@dataclass(frozen=True)
class Branch:
    """One parallel path of a block: a contiguous range of the channels that enter `Block.merge`.

    Attributes:
        index: Position among the branches of the block.
        start: First channel.
        stop: One past the last channel.
    """

    index: int
    start: int
    stop: int


@dataclass(frozen=True)
class Channels:
    """Channel counts of a block.

    Attributes:
        input: Channels of the block's input.
        hidden: Channels that enter the merging convolution; those of the output where there is none.
        output: Channels of the block's output.
    """

    input: int
    hidden: int
    output: int


@dataclass(frozen=True)
class Block:
    """A residual unit, or a unit of the same family without a shortcut.

    Attributes:
        path: Module path; the root graph calls the block by it.
        stage: Name of the stage it belongs to.
        kind: "grouped" (branches are the groups of a convolution), "depthwise" (one branch per channel) or "plain"
            (each hidden channel is a branch once partitioned).
        input: Node in the block's graph: the placeholder.
        body: Node that leaves the residual body; the block's last value where there is no join.
        shortcut: Node that enters the join on the other side, or None.
        join: Node of the addition, or None.
        output: Node that the block returns.
        split: Path of the convolution that feeds the branches, or None.
        spatial: Path of the convolution that the branches consist of.
        merge: Path of the convolution whose input is the concatenated branches, or None.
        convs: Paths of all convolutions on the main path, in order.
        attention: Path of a module between `spatial` and `merge` that mixes branches (squeeze-excite), or None.
        channels: Channel counts.
        cardinality: Number of branches.
        projected: Whether the shortcut holds a convolution.
        resolution: (height, width) of the output.
        macs: Multiply-adds of one image in the block's convolutions and linear layers.
        params: Number of parameters.
        attended: Nodes between `spatial` and `merge` whose values the attention reads.
    """

    path: str
    stage: str
    kind: BranchKind
    input: str
    body: str
    shortcut: str | None
    join: str | None
    output: str
    split: str | None
    spatial: str
    merge: str | None
    convs: tuple[str, ...]
    attention: str | None
    channels: Channels
    cardinality: int
    projected: bool
    resolution: tuple[int, int]
    macs: int
    params: int
    attended: tuple[str, ...] = ()

    @property
    def is_residual(self) -> bool:
        """Whether the block adds a shortcut."""
        return self.join is not None

    @property
    def branches(self) -> tuple[Branch, ...]:
        """The branches, in channel order."""
        return self.partition(self.cardinality)

    def partition(self, branches: int) -> tuple[Branch, ...]:
        """Group the channels that enter the merge into `branches` equal, contiguous ranges.

        Raises:
            InvalidOption: If `branches` does not divide the cardinality of the block.
        """
        if branches < 1 or self.cardinality % branches:
            raise InvalidOption(
                f"{self.path}: cannot form {branches} branches out of {self.cardinality} {self.kind} ones; "
                f"pass a divisor of {self.cardinality}"
            )
        width = self.channels.hidden // branches
        return tuple(Branch(n, n * width, (n + 1) * width) for n in range(branches))


@dataclass(frozen=True)
class Stage:
    """Consecutive blocks at one resolution.

    Attributes:
        name: Path of the container that holds exactly these blocks, else `stage<number>`.
        blocks: The blocks, in order.
    """

    name: str
    blocks: tuple[Block, ...]

    @property
    def resolution(self) -> tuple[int, int]:
        """(height, width) of the blocks' outputs."""
        return self.blocks[-1].resolution

    @property
    def cardinality(self) -> tuple[int, ...]:
        """The distinct branch counts of the blocks, in order of appearance."""
        return tuple(dict.fromkeys(block.cardinality for block in self.blocks))


@dataclass(frozen=True)
class Head:
    """The classifier.

    Attributes:
        path: Path of the last linear layer (or 1x1 convolution), or None where none was found.
        classes: Number of its outputs, or None.
    """

    path: str | None
    classes: int | None


@dataclass(frozen=True)
class Architecture:
    """The structure of a network.

    Attributes:
        name: Class name of the network.
        stem: Paths of the modules before the first block.
        stages: The stages, in order.
        head: The classifier.
        input_size: (channels, height, width) that resolutions and MACs refer to.
        macs: Multiply-adds of one image, convolutions and linear layers of the whole network.
        params: Number of parameters.
        refusals: Places that look like blocks but cannot be used, and why.
    """

    name: str
    stem: tuple[str, ...]
    stages: tuple[Stage, ...]
    head: Head
    input_size: tuple[int, int, int]
    macs: int
    params: int
    refusals: tuple[Refusal, ...]

    @property
    def blocks(self) -> tuple[Block, ...]:
        """All blocks, in order."""
        return tuple(block for stage in self.stages for block in stage.blocks)

    def residual_blocks(self) -> Iterator[Block]:
        """Yield the blocks that have a shortcut."""
        return (block for block in self.blocks if block.is_residual)

    def block(self, path: str) -> Block:
        """Return the block at `path`.

        Raises:
            InvalidOption: If there is none.
        """
        for block in self.blocks:
            if block.path == path:
                return block
        raise InvalidOption(
            f"{path!r} is not a block of {self.name}; its blocks are {_listed([b.path for b in self.blocks])}"
        )

    def stage(self, name: str) -> Stage:
        """Return the stage called `name`.

        Raises:
            InvalidOption: If there is none.
        """
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise InvalidOption(
            f"{name!r} is not a stage of {self.name}; its stages are {_listed([s.name for s in self.stages])}"
        )

    def with_block(self, block: Block) -> Architecture:
        """Return a copy in which `block` stands in the place of the block of the same path."""
        stages = tuple(
            replace(stage, blocks=tuple(block if old.path == block.path else old for old in stage.blocks))
            for stage in self.stages
        )
        return replace(self, stages=stages)

    def __str__(self) -> str:
        """Return a table: one line per stage, then totals and what cannot be used."""
        rows = [("stage", "blocks", "shortcuts", "branches", "channels", "resolution", "MACs")]
        rows += [_stage_row(stage) for stage in self.stages]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        channels, height, width = self.input_size
        totals = f"{self.params:,} parameters, {self.macs / 1e9:.3f} GMACs at {channels} x {height} x {width}"
        head = f"head {self.head.path}, {self.head.classes} classes" if self.head.path else "no classifier found"
        refused = [f"not usable: {refusal}" for refusal in self.refusals]
        return "\n".join([f"{self.name}: {totals}; {head}", *(lines if self.stages else ["no blocks"]), *refused])


def _stage_row(stage: Stage) -> tuple[str, str, str, str, str, str, str]:
    blocks = stage.blocks
    projected = sum(block.projected for block in blocks)
    residual = sum(block.is_residual for block in blocks)
    kinds = "/".join(dict.fromkeys(block.kind for block in blocks))
    outputs = "/".join(str(width) for width in dict.fromkeys(block.channels.output for block in blocks))
    return (
        stage.name,
        str(len(blocks)),
        f"{residual}" + (f" ({projected} projected)" if projected else ""),
        "/".join(str(n) for n in stage.cardinality) + f" {kinds}",
        f"{blocks[0].channels.input} -> {outputs}",
        f"{stage.resolution[0]} x {stage.resolution[1]}",
        f"{sum(block.macs for block in blocks) / 1e6:.1f} M",
    )


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:12])
    return (shown + (f" and {len(names) - 12} more" if len(names) > 12 else "")) or "none"
