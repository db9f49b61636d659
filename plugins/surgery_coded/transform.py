"""Turn the blocks of a network into coded ones."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from itertools import groupby
from math import comb, gcd
from typing import Any

from torch import nn

from surgery import Architecture, Block, NothingConverted, Refusal, Rewriter, Stage
from surgery.errors import InvalidOption, RewriteError
from surgery.slicing import check_branches
from surgery_coded.modules import BranchDropout, BranchSwitch, CodedConv2d
from surgery_coded.scheme import CodingScheme
from surgery_coded.words import MAX_BRANCHES

SchemeOption = Mapping[str, "str | CodingScheme | Mapping[str, Any]"]
_DEFAULT_RATIOS = (Fraction(1, 2), Fraction(1, 4))
_MOST_FORMED = 32  # branches that a partition gives unasked


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
    classes = architecture.head.classes
    if classes is None:
        raise NothingConverted("coded: the number of classes is unknown, because no classifier was found at the end")
    usable, refusals = usable_blocks(architecture, rewriter)
    site = _Site(architecture, rewriter, classes, branches, usable, refusals)
    stages = _default_stages(site) if scheme is None else _asked_stages(site, scheme)
    if not stages:
        raise NothingConverted(
            f"coded: no block of {architecture.name} can be coded", (*refusals, *architecture.refusals)
        )
    for _, run in groupby(_with_neighbours(architecture, stages), key=lambda coded: coded.scheme if coded else None):
        _encode_run(rewriter, [coded for coded in run if coded], p_drop)


def usable_blocks(architecture: Architecture, rewriter: Rewriter) -> tuple[dict[str, list[Block]], list[Refusal]]:
    """Return the blocks of each stage whose branches can be told apart at the merge, and why the others cannot."""
    usable: dict[str, list[Block]] = {}
    refusals: list[Refusal] = []
    for block in architecture.blocks:
        refusal = _refusal(block, rewriter)
        if refusal:
            refusals.append(refusal)
        else:
            usable.setdefault(block.stage, []).append(block)
    return usable, refusals


@dataclass(frozen=True)
class _Site:
    """What the stages are chosen from; `refusals` grows while they are."""

    architecture: Architecture
    rewriter: Rewriter
    classes: int
    branches: int | None
    usable: Mapping[str, list[Block]]
    refusals: list[Refusal]

    def search(self, stage: str, active: int, branches: int) -> CodingScheme:
        """Return the scheme that is searched for a stage; it is stored in the record."""
        found = self.rewriter.decide(
            f"scheme/{stage}", lambda: CodingScheme.search(self.classes, branches, active).to_dict()
        )
        return CodingScheme.from_dict(found)


def _refusal(block: Block, rewriter: Rewriter) -> Refusal | None:
    if block.merge is None:
        return Refusal(block.path, "no dense convolution joins its branches, expected one", "use a ResNeXt")
    if block.merge != block.convs[-1]:
        return Refusal(
            block.path,
            f"{block.convs[-1]} follows {block.merge}, expected the convolution that joins the branches at the end",
            "use a network whose blocks end with it",
        )
    forward = type(rewriter.module(block.merge)).forward
    if forward is not nn.Conv2d.forward:
        kind = type(rewriter.module(block.merge)).__name__
        return Refusal(block.path, f"{block.merge} is a {kind}, expected a plain Conv2d", "use another network")
    try:
        check_branches(rewriter.network.block(block.path), block)
    except RewriteError as error:
        reason = str(error).removeprefix(f"{block.path}: ").removeprefix("these channels cannot be cut: ")
        where = f"{block.attention} mixes the branches before they are joined"
        where = where if block.attention else "its branches cannot be cut apart"
        return Refusal(block.path, f"{where}: {reason}", "use a network without it")
    return None


def _default_stages(site: _Site) -> list[CodedStage]:
    """Return the last two stages that can be coded, at 1/2 and 1/4 or the next ratio that has enough codewords."""
    found: list[tuple[Stage, tuple[Block, ...], int]] = []
    for stage in reversed(site.architecture.stages):
        if len(found) == len(_DEFAULT_RATIOS):
            break
        blocks, branches = _divide(site, stage.name, None)
        if not blocks:
            continue
        if comb(branches, branches // 2) < site.classes:
            reason = f"{branches} branches have too few codewords for {site.classes} classes"
            cure = "use a wider network" if site.branches is None else "pass larger branches="
            site.refusals.append(Refusal(stage.name, reason, cure))
        else:
            found.append((stage, blocks, branches))
    stages = []
    for (stage, blocks, branches), ratio in zip(found, reversed(_DEFAULT_RATIOS), strict=False):
        first = max(1, round(ratio * branches))
        active = next(n for n in range(first, branches) if comb(branches, n) >= site.classes)
        stages.append(CodedStage(stage, blocks, site.search(stage.name, active, branches)))
    return stages[::-1]


def _asked_stages(site: _Site, option: SchemeOption) -> list[CodedStage]:
    stages = []
    for name, value in option.items():
        stage = site.architecture.stage(name)
        if not isinstance(value, str | CodingScheme | Mapping):
            raise InvalidOption(
                f"scheme: stage {name!r} has {value!r}, expected a ratio such as '8/32' or a CodingScheme"
            )
        blocks, branches = _divide(site, name, _named(value))
        if not blocks:
            here = [stage.name, *(block.path for block in stage.blocks)]
            reasons = "; ".join(dict.fromkeys(str(refusal) for refusal in site.refusals if refusal.path in here))
            raise InvalidOption(f"scheme: stage {name!r} has no block that can be coded ({reasons}); leave it out")
        scheme = _resolve(site, name, value, branches)
        if scheme is None:
            site.refusals.append(Refusal(name, "its ratio is 1, which leaves it untouched", "choose a ratio below 1"))
        else:
            stages.append(CodedStage(stage, blocks, scheme))
    order = [stage.name for stage in site.architecture.stages]
    return sorted(stages, key=lambda coded: order.index(coded.stage.name))


def _named(value: str | CodingScheme | Mapping[str, Any]) -> int | None:
    """Return the number of branches that a scheme names: "16/32" does, "1/2" is a bare ratio, as is any "1/...".

    As written, since the fraction in lowest terms no longer tells them apart. One active branch of N, which "1/N" could
    also mean, has codewords for N classes at most.
    """
    if isinstance(value, str):
        written = re.fullmatch(r"\s*(\d+)\s*/\s*(\d+)\s*", value)
        active, branches = (int(part) for part in written.groups()) if written else (1, 0)
        return branches if 1 < active < branches else None
    named = value.branches if isinstance(value, CodingScheme) else value.get("branches")
    return named if isinstance(named, int) and named > 0 else None


def _divide(site: _Site, stage: str, named: int | None) -> tuple[tuple[Block, ...], int]:
    """Return the blocks of a stage that can be coded, none if so, and into how many branches each is divided.

    Raises:
        InvalidOption: If the number that a scheme names does not divide the channels of every block.
    """
    blocks = tuple(site.usable.get(stage, ()))
    cardinalities = sorted({block.cardinality for block in blocks})
    common = gcd(*cardinalities)
    is_grouped = len(cardinalities) == 1 and common <= MAX_BRANCHES and all(b.kind == "grouped" for b in blocks)
    if site.branches is not None and (is_grouped or named is None):
        for block in blocks:
            if block.cardinality % site.branches:
                reason = f"its {block.cardinality} branches cannot form {site.branches}"
                site.refusals.append(Refusal(block.path, reason, f"pass a divisor of {block.cardinality}"))
        return tuple(block for block in blocks if block.cardinality % site.branches == 0), site.branches
    if is_grouped and common > 1:
        return blocks, common
    found = "/".join(map(str, cardinalities))
    divisors = [n for n in range(2, common + 1) if common % n == 0]
    if named is not None and blocks and named not in divisors:
        raise InvalidOption(
            f"scheme: stage {stage!r} has blocks of {found} channels, which cannot form {named} equal branches; "
            f"expected one of {', '.join(map(str, divisors))}"
        )
    formed = named or max((n for n in divisors if n <= _MOST_FORMED), default=0)
    if not formed and blocks:
        site.refusals.append(Refusal(stage, f"its blocks of {found} channels have no common divisor", "leave it out"))
    return (blocks, formed) if formed else ((), 0)


def _resolve(
    site: _Site, stage: str, value: str | CodingScheme | Mapping[str, Any], branches: int
) -> CodingScheme | None:
    """Return the scheme of a stage, or None for ratio 1."""
    if isinstance(value, str):
        active = _active(stage, value, branches)
        return None if active == branches else site.search(stage, active, branches)
    scheme = value if isinstance(value, CodingScheme) else CodingScheme.from_dict(value)
    if (scheme.classes, scheme.branches) != (site.classes, branches):
        raise InvalidOption(
            f"scheme: stage {stage!r} has {branches} branches and the network {site.classes} classes, found a scheme "
            f"for {scheme.classes} classes over {scheme.branches} branches; use CodingScheme.search({site.classes}, "
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
        for value in block.attended:
            rewriter.insert(BranchSwitch(scheme.branches), value, at=block, role="switch")
        conv = rewriter.module(block.merge)
        assert isinstance(conv, nn.Conv2d)
        extra = () if mask is None else (rewriter.feed(mask, into=block),)
        coded = CodedConv2d.from_conv(conv, scheme.codewords, f"{block.path}/energy")
        rewriter.replace(block.merge, coded, *extra, role="energy")
