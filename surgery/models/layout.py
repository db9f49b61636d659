"""Layouts: the few numbers that make one CIFAR-size residual network different from another.

Every network here has a 3x3 stem and three stages whose widths double from stage to stage. Two papers describe a
ResNeXt-29 in words that look different: stage outputs 256, 512, 1024 around N*d hidden channels (Avranas and
Kountouris, 2022), or base 64, expansion 4 and a group width that doubles with the stage (Zhao et al., 2022). The widths
are the same numbers; only the stride-2 shortcut and the classifier's bias differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from surgery.errors import InvalidOption

BlockKind = Literal["basic", "bottleneck"]
ShortcutKind = Literal["pool", "stride"]


@dataclass(frozen=True)
class Layout:
    """Shape of a three-stage residual network for 32 x 32 images.

    Attributes:
        block: `basic` is two 3x3 convolutions, `bottleneck` is 1x1, 3x3, 1x1.
        blocks: Residual blocks in each stage.
        stem: Output channels of the first convolution.
        hidden: Channels of the 3x3 convolutions of the first stage, all groups together; doubles per stage.
        output: Output channels of the first stage; doubles per stage.
        groups: Groups of the 3x3 convolutions of bottlenecks, the same in all stages.
        shortcut: How a stride-2 shortcut shrinks: `pool` averages 2x2 before its 1x1 convolution, `stride` lets the
            1x1 convolution skip pixels.
        classifier_bias: Whether the last linear layer has a bias.
        reduction: Squeeze-excite at the end of the body of bottlenecks, with this many times fewer channels inside;
            None leaves it out.
    """

    block: BlockKind
    blocks: int
    stem: int
    hidden: int
    output: int
    groups: int = 1
    shortcut: ShortcutKind = "pool"
    classifier_bias: bool = True
    reduction: int | None = None

    def __post_init__(self) -> None:
        """Refuse widths that no network can have."""
        for name in ("blocks", "stem", "hidden", "output", "groups"):
            found = getattr(self, name)
            if found < 1:
                raise InvalidOption(f"layout: found {name}={found}, expected at least 1; choose a larger {name}")
        if self.hidden % self.groups:
            raise InvalidOption(
                f"layout: found hidden={self.hidden} with groups={self.groups}, expected a multiple of the groups; "
                "choose hidden = groups * width"
            )
        if self.block == "basic" and (self.groups != 1 or self.hidden != self.output):
            raise InvalidOption(
                f"layout: found hidden={self.hidden}, output={self.output}, groups={self.groups} for basic blocks, "
                "expected equal widths and one group; use block='bottleneck'"
            )
        if self.reduction is not None and not (self.block == "bottleneck" and 1 <= self.reduction <= self.output):
            raise InvalidOption(
                f"layout: found reduction={self.reduction} for {self.block} blocks of {self.output} channels, expected "
                "1 to that many, in bottlenecks; choose 4 or 16, or None for no squeeze-excite"
            )


def resnext(
    groups: int,
    width: int,
    *,
    depth: int = 29,
    base: int = 64,
    shortcut: ShortcutKind = "pool",
    classifier_bias: bool = True,
) -> Layout:
    """Describe a ResNeXt of `groups` paths, each `width` channels wide in the first stage.

    Args:
        groups: Cardinality.
        width: Channels of one path in the first stage.
        depth: Layers counted as the papers do: 9 a block per stage, plus stem and classifier.
        base: Stem channels; the first stage puts out four times as many.
        shortcut: See `Layout`.
        classifier_bias: See `Layout`.

    Raises:
        InvalidOption: If `depth - 2` is not a multiple of 9, or a width is below 1.

    Reference:
        Xie, Girshick, Dollar, Tu and He, 2017, section 5.2.
    """
    return Layout(
        block="bottleneck",
        blocks=blocks_per_stage(depth, extra=2, layers=9),
        stem=base,
        hidden=groups * width,
        output=4 * base,
        groups=groups,
        shortcut=shortcut,
        classifier_bias=classifier_bias,
    )


def wide_resnet(depth: int, width: int) -> Layout:
    """Describe a wide ResNet of basic blocks with the activation after the addition; `width` multiplies 16, 32, 64.

    Raises:
        InvalidOption: If `depth - 4` is not a multiple of 6, or `width` is below 1.

    Reference:
        Zagoruyko and Komodakis, 2016, in the post-activation form of Zhao et al., 2022, table 2; the stem is 16 wide.
    """
    blocks = blocks_per_stage(depth, extra=4, layers=6)
    return Layout(block="basic", blocks=blocks, stem=16, hidden=16 * width, output=16 * width)


def resnet(depth: int, *, base: int = 16, reduction: int | None = None) -> Layout:
    """Describe a ResNet of bottleneck blocks, `base` channels wide in the stem; with `reduction`, an SE-ResNet.

    Raises:
        InvalidOption: If `depth - 2` is not a multiple of 9, `base` is below 1, or `reduction` is not in 1 to 4 * base.

    Reference:
        He et al., 2016, in the CIFAR form of Zhao et al., 2022, table 2: 110 layers are 12 blocks a stage.
    """
    blocks = blocks_per_stage(depth, extra=2, layers=9)
    return Layout(block="bottleneck", blocks=blocks, stem=base, hidden=base, output=4 * base, reduction=reduction)


def blocks_per_stage(depth: int, *, extra: int, layers: int) -> int:
    """Return how many blocks a stage has in a network of `extra + layers * blocks` layers.

    Raises:
        InvalidOption: If no number of blocks gives `depth`.
    """
    blocks, rest = divmod(depth - extra, layers)
    if rest or blocks < 1:
        raise InvalidOption(
            f"layout: found depth={depth}, expected {extra} + {layers} * blocks; "
            f"choose {extra + layers * max(blocks, 1)} or {extra + layers * (max(blocks, 1) + 1)}"
        )
    return blocks
