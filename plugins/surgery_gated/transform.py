"""Put gates into a network."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping

from surgery import Architecture, Block, ConvertedNetwork, NothingConverted, Refusal, Rewriter
from surgery.errors import InvalidOption
from surgery_gated.gates import DependentHead, Gates, Granularity, IndependentHead
from surgery_gated.modules import ChannelGate, LayerGate
from surgery_gated.placement import Gate, Layout, layout

GATES = "gated_gates"
"""Name of the gates within their block."""
# Initial logits (closed, open): P(open) is 0.870 for dependent layer gates and 0.980 for all others.
_BIAS, _DEPENDENT_LAYER_BIAS = (0.1, 4.0), (0.1, 2.0)


def gated_blocks(model: ConvertedNetwork) -> Iterator[tuple[Block, Gates]]:
    """Yield the gated blocks with their gates, in the order of the network."""
    architecture: Architecture = model.meta["architecture"]
    for block in architecture.blocks:
        for module in model.block(block.path).children():
            if isinstance(module, Gates):
                yield block, module


def targets_of(architecture: Architecture, target: float | Mapping[str, float]) -> dict[str, float]:
    """Return the target of every block by path; a block beats its stage, and what a mapping leaves out is not gated.

    Raises:
        InvalidOption: If a mapping names neither a stage nor a block, or leaves no block to be gated.
    """
    paths = [block.path for block in architecture.blocks]
    if not isinstance(target, Mapping):
        return dict.fromkeys(paths, target)
    stages = {stage.name: [block.path for block in stage.blocks] for stage in architecture.stages}
    unknown = [name for name in target if name not in stages and name not in paths]
    if unknown:
        raise InvalidOption(
            f"gated: target names {unknown[0]!r}, expected stages or blocks of {architecture.name}: "
            f"{', '.join([*stages, *paths])}"
        )
    found = {path: target[stage] for stage in stages if stage in target for path in stages[stage]}
    found |= {name: value for name, value in target.items() if name in paths}
    gated = {path: value for path, value in found.items() if value < 1}
    if not gated:
        raise InvalidOption(
            f"gated: target is {dict(target)}, expected a stage or block with a target below 1; a target of 1 leaves a "
            "block as it is"
        )
    return gated


def _refuse_named(target: float | Mapping[str, float], gated: Collection[str], refusals: Iterable[Refusal]) -> None:
    """Refuse a target for a block that cannot have gates.

    Raises:
        InvalidOption: With the reason.
    """
    for refusal in refusals:
        if isinstance(target, Mapping) and target.get(refusal.path, 1) < 1 and refusal.path not in gated:
            raise InvalidOption(f"gated: target names {refusal.path!r}, which can have no gate: {refusal.reason}")


def gate_layers(
    architecture: Architecture, rewriter: Rewriter, dependent: bool, target: float | Mapping[str, float]
) -> None:
    """Give the body of every residual block that has a target one gate.

    Raises:
        NothingConverted: If none of them has a shortcut.
        InvalidOption: If a target cannot be used.
    """
    targets = targets_of(architecture, target)
    refusals = [
        Refusal(block.path, "it has no shortcut, so nothing is left where it is skipped", "use granularity='channel'")
        for block in architecture.blocks
        if not block.is_residual
    ]
    chosen = [block for block in architecture.residual_blocks() if block.path in targets]
    if not chosen:
        raise NothingConverted(
            f"gated: no block of {architecture.name} can be skipped", (*refusals, *architecture.refusals)
        )
    _refuse_named(target, [block.path for block in chosen], refusals)
    for block in chosen:
        tapped = _decide(rewriter, block, 1, "layer", dependent)
        rewriter.insert(LayerGate(), block.body, tapped, at=block, role="layer")


def gate_channels(
    architecture: Architecture,
    rewriter: Rewriter,
    dependent: bool,
    target: float | Mapping[str, float],
    group_size: int | None,
) -> None:
    """Give every block that has a target gates on the channels that it reads, computes in between, and writes.

    Raises:
        NothingConverted: If none of them can have any, with the reason for each.
        InvalidOption: If a target cannot be used.
    """
    targets = targets_of(architecture, target)
    refusals: list[Refusal] = []
    found: dict[str, Layout] = {}
    for block in architecture.blocks:
        planned = layout(architecture, block, rewriter, group_size)
        if isinstance(planned, Refusal):
            refusals.append(planned)
        elif block.path in targets:
            found[block.path] = planned
    if not found:
        raise NothingConverted(
            f"gated: no block of {architecture.name} can have channel gates", (*refusals, *architecture.refusals)
        )
    _refuse_named(target, found, refusals)
    for path, planned in found.items():
        block = architecture.block(path)
        tapped = _decide(rewriter, block, planned.count, "channel", dependent)
        for gate in planned.gates:
            _insert(rewriter, block, gate, planned.count, tapped)


def _decide(rewriter: Rewriter, block: Block, count: int, granularity: Granularity, dependent: bool) -> str:
    """Compute the decisions of a block from its input and return the node that has them."""
    bias = _DEPENDENT_LAYER_BIAS if granularity == "layer" and dependent else _BIAS
    head = DependentHead(block.channels.input, count, bias) if dependent else IndependentHead(count, bias)
    node = rewriter.compute(Gates(head, granularity), block.input, at=block, role="gates")
    return rewriter.tap(node, f"{block.path}/gates", at=block)


def _insert(rewriter: Rewriter, block: Block, gate: Gate, count: int, tapped: str) -> None:
    for place, column in zip(gate.places, gate.columns, strict=True):
        node, users = place.node, None
        if place.reader is not None:
            node, users = rewriter.input_of(place.reader), [rewriter.call_of(place.reader)]
        rewriter.insert(ChannelGate(column, count, gate.role), node, tapped, at=block, role=gate.role, users=users)
