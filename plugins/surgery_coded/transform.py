"""Turn the blocks of a network into coded ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from itertools import groupby
from math import comb
from typing import Any

from torch import nn

from surgery import Architecture, Block, NothingConverted, Refusal, Rewriter, Stage
from surgery.errors import InvalidOption
from surgery_coded.modules import BranchDropout, CodedConv2d
from surgery_coded.scheme import CodingScheme

SchemeOption = Mapping[str, "str | CodingScheme | Mapping[str, Any]"]
_DEFAULT_RATIOS = (Fraction(1, 2), Fraction(1, 4))


@dataclass(frozen=True)
class CodedStage:
    """A stage that is to be coded: its usable blocks and their common scheme."""

    stage: Stage
    blocks: tuple[Block, ...]
    scheme: CodingScheme


def encode(
    architecture: Architecture, rewriter: Rewriter, scheme: SchemeOption | None, branches: int | None, p_drop: float
) -> None:
    """Replace the merging convolution of every block that gets a scheme; draw one branch mask per run of equal schemes.

    Raises:
        NothingConverted: If no block can be coded, with the reason for each.
        InvalidOption: If a scheme does not fit its stage, or a ratio has no scheme.
    """
    usable, refusals = usable_blocks(architecture, branches)
    stages = _coded_stages(architecture, rewriter, scheme, usable, branches, refusals)
    if not stages:
        raise NothingConverted(
            f"coded: no block of {architecture.name} can be coded", (*refusals, *architecture.refusals)
        )
    for _, run in groupby(_with_neighbours(architecture, stages), key=lambda coded: coded.scheme if coded else None):
        _encode_run(rewriter, [coded for coded in run if coded], p_drop)


def usable_blocks(architecture: Architecture, branches: int | None) -> tuple[dict[str, list[Block]], list[Refusal]]:
    """Return the blocks of each stage whose branches can be told apart at the merge, and why the others cannot."""
    usable: dict[str, list[Block]] = {}
    refusals: list[Refusal] = []
    for block in architecture.blocks:
        refusal = _refusal(block, branches)
        if refusal:
            refusals.append(refusal)
        else:
            usable.setdefault(block.stage, []).append(block)
    return usable, refusals


def _refusal(block: Block, branches: int | None) -> Refusal | None:
    if block.merge is None:
        return Refusal(block.path, "no dense convolution joins its branches, expected one", "use a ResNeXt")
    if block.attention is not None:
        return Refusal(
            block.path,
            f"{block.attention} mixes the branches before they are joined",
            "use a network without it inside the block",
        )
    if branches is None and block.kind != "grouped":
        return Refusal(
            block.path,
            f"expected a grouped convolution, found a {block.kind} block",
            "use a ResNeXt, or pass branches=",
        )
    if branches is not None and block.cardinality % branches:
        return Refusal(
            block.path,
            f"its {block.cardinality} branches cannot form {branches}",
            f"pass a divisor of {block.cardinality}",
        )
    return None


def _coded_stages(
    architecture: Architecture,
    rewriter: Rewriter,
    option: SchemeOption | None,
    usable: Mapping[str, list[Block]],
    branches: int | None,
    refusals: list[Refusal],
) -> list[CodedStage]:
    classes = architecture.head.classes
    if classes is None:
        raise NothingConverted("coded: the number of classes is unknown, because no classifier was found at the end")
    wanted = dict(option) if option is not None else _default_ratios(architecture, usable, branches, classes, refusals)
    stages = []
    for name, value in wanted.items():
        stage = architecture.stage(name)
        width = _branches_of(stage, usable, branches)
        scheme = _resolve(rewriter, name, value, classes, width)
        if scheme is None:
            refusals.append(Refusal(name, "its ratio is 1, which leaves it untouched", "choose a ratio below 1"))
        else:
            stages.append(CodedStage(stage, tuple(usable[name]), scheme))
    order = [stage.name for stage in architecture.stages]
    return sorted(stages, key=lambda coded: order.index(coded.stage.name))


def _branches_of(stage: Stage, usable: Mapping[str, list[Block]], branches: int | None) -> int:
    widths = {branches or block.cardinality for block in usable.get(stage.name, [])}
    if len(widths) != 1:
        found = f"blocks of {'/'.join(map(str, sorted(widths)))} branches" if widths else "no block that can be coded"
        raise InvalidOption(
            f"scheme: stage {stage.name!r} has {found}, expected one number of branches; pass branches= or leave it out"
        )
    return next(iter(widths))


def _default_ratios(
    architecture: Architecture,
    usable: Mapping[str, list[Block]],
    branches: int | None,
    classes: int,
    refusals: list[Refusal],
) -> dict[str, str]:
    """Return ratio 1/2 and 1/4 for the last two stages, or the next larger ratio that has enough codewords."""
    ratios: dict[str, str] = {}
    last = architecture.stages[-len(_DEFAULT_RATIOS) :]
    for stage, ratio in zip(last, _DEFAULT_RATIOS[len(_DEFAULT_RATIOS) - len(last) :], strict=True):
        widths = {branches or block.cardinality for block in usable.get(stage.name, [])}
        if len(widths) != 1:
            continue
        width = next(iter(widths))
        first = max(1, round(ratio * width))
        active = next((n for n in range(first, width) if comb(width, n) >= classes), None)
        if active is None:
            refusals.append(
                Refusal(
                    stage.name, f"{width} branches have too few codewords for {classes} classes", "use a wider network"
                )
            )
        else:
            ratios[stage.name] = f"{active}/{width}"
    return ratios


def _resolve(rewriter: Rewriter, stage: str, value: object, classes: int, branches: int) -> CodingScheme | None:
    """Return the scheme of a stage, or None for ratio 1; a searched one is stored in the record."""
    if not isinstance(value, str | CodingScheme | Mapping):
        raise InvalidOption(f"scheme: stage {stage!r} has {value!r}, expected a ratio such as '8/32' or a CodingScheme")
    if isinstance(value, str):
        active = _active(stage, value, branches)
        if active == branches:
            return None
        value = rewriter.decide(f"scheme/{stage}", lambda: CodingScheme.search(classes, branches, active).to_dict())
    scheme = value if isinstance(value, CodingScheme) else CodingScheme.from_dict(value)
    if (scheme.classes, scheme.branches) != (classes, branches):
        raise InvalidOption(
            f"scheme: stage {stage!r} has {branches} branches and the network {classes} classes, found a scheme for "
            f"{scheme.classes} classes over {scheme.branches} branches; use CodingScheme.search({classes}, "
            f"{branches}, ...)"
        )
    return scheme


def _active(stage: str, ratio: str, branches: int) -> int:
    try:
        active = Fraction(ratio) * branches
    except (ValueError, ZeroDivisionError) as error:
        raise InvalidOption(
            f"scheme: stage {stage!r} has the ratio {ratio!r}, expected a fraction such as '8/32'"
        ) from error
    if active.denominator != 1 or not 1 <= active <= branches:
        raise InvalidOption(
            f"scheme: stage {stage!r} has {branches} branches, of which {ratio} is {float(active):g}; expected a "
            "whole number "
            f"from 1 to {branches}"
        )
    return int(active)


def _with_neighbours(architecture: Architecture, stages: list[CodedStage]) -> list[CodedStage | None]:
    """Return one entry per stage, so that an uncoded stage separates two runs of the same scheme."""
    by_name = {coded.stage.name: coded for coded in stages}
    return [by_name.get(stage.name) for stage in architecture.stages]


def _encode_run(rewriter: Rewriter, run: list[CodedStage], p_drop: float) -> None:
    if not run:
        return
    blocks = [block for coded in run for block in coded.blocks]
    scheme = run[0].scheme
    mask: str | None = None
    if p_drop > 0:
        role = f"{run[0].stage.name.replace('.', '_')}_dropout"
        mask = rewriter.compute(
            BranchDropout(p_drop, scheme.branches), rewriter.input_of(blocks[0]), at=None, role=role
        )
    for block in blocks:
        assert block.merge is not None
        conv = rewriter.module(block.merge)
        assert isinstance(conv, nn.Conv2d)
        extra = () if mask is None else (rewriter.feed(mask, into=block),)
        coded = CodedConv2d.from_conv(conv, scheme.codewords, f"{block.path}/energy")
        rewriter.replace(block.merge, coded, *extra, role="energy")
