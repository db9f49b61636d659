"""Leave out the bodies of closed layers: gather the samples that need one, run it on them, add the result in place.

The samples of a batch that have the gate open are copied together, range by range, and the body of the block runs on
them alone. Its result is added to the rows of the shortcut that belong to them, which is a copy of the block's input
or what a projection has just computed; what follows the addition then runs on all samples. Nothing is multiplied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from surgery.network import BlockModule
from surgery.tracing import upstream
from surgery_gated.channel_skipping import run_channels as run_channels
from surgery_gated.modules import LayerGate
from surgery_gated.program import (
    Plans,
    Step,
    Values,
    call,
    is_addition,
    overwrites,
    program,
    run,
    separable,
    taps_beside,
)
from surgery_gated.ranges import Range, add_ranges, ranges_of, rest, scattered, take_ranges


@dataclass(frozen=True)
class LayerPlan:
    """The parts of a block whose body has a gate.

    Attributes:
        inputs: Placeholders.
        outside: Steps that every sample needs: the gates, the shortcut.
        body: Steps that only samples with an open gate need.
        gate: The multiplication.
        join: The addition of the shortcut.
        after: Steps behind the addition.
        decisions: Name of the gates' decisions (B, 1).
        result: Name of the body's result.
        shortcut: Name of the other operand of the addition.
        read: Values from outside that the body reads and that have a row for each sample.
        owned: Whether nothing but the addition reads the shortcut.
        output: Name of what the block returns.
        relu: Path of the ReLU that is all that follows the addition, if it is one.
        taps: Paths of the taps beside those of the decisions.
    """

    inputs: tuple[str, ...]
    outside: tuple[Step, ...]
    body: tuple[Step, ...]
    gate: Step
    join: Step
    after: tuple[Step, ...]
    decisions: str
    result: str
    shortcut: str
    read: tuple[str, ...]
    owned: bool
    output: str
    relu: str | None
    taps: tuple[str, ...]


_PLANS = Plans()


def run_layer(block: BlockModule, gates: nn.Module, *args: Tensor) -> Tensor | None:
    """Return what a block returns, its body computed for the samples with an open gate only.

    Args:
        block: A block in eval mode whose body has a layer gate.
        gates: What decides; part of the block.
        *args: Inputs of the block.

    Returns:
        The output, or None where the graph has to run: without an addition, in a body that mixes samples, or where
        the decisions cannot be read.
    """
    plan = _PLANS.get(block, _plan)
    if plan is None or not separable(block, plan.taps, args):
        return None
    values: Values = dict(zip(plan.inputs, args, strict=True))
    run(plan.outside, block, values)
    decisions: Tensor = values[plan.decisions]
    opened = ranges_of(decisions[:, 0])
    rows = len(decisions)
    if opened == ((0, rows),) or any(not _has_rows(values[name], rows) for name in plan.read):
        values[plan.join.name] = _of_all(plan, block, values, multiply=opened != ((0, rows),))
    else:
        body = _body_of_some(plan, block, values, opened)
        whole = plan.relu is None or scattered(opened)
        if not whole and _is_plain(block.get_submodule(str(plan.relu)), values, plan, body):
            return _rectified(values[plan.shortcut], opened, body)
        values[plan.join.name] = _of_some(plan, values, args, opened, body)
    run(plan.after, block, values)
    output: Tensor = values[plan.output]
    return output


def _of_all(plan: LayerPlan, block: BlockModule, values: Values, *, multiply: bool) -> Any:
    """Return the addition for a body that is computed for every sample."""
    local = dict(values)
    run(plan.body, block, local)
    body = local[plan.result]
    gated = call(plan.gate, block, values | {plan.result: body}) if multiply else body
    return call(plan.join, block, values | {plan.gate.name: gated})


def _of_some(
    plan: LayerPlan, values: Values, args: tuple[Tensor, ...], opened: tuple[Range, ...], body: Tensor | None
) -> Tensor:
    """Return the addition for a body that is computed for the samples in `opened` only."""
    joined = _writable(plan, values, args, _dtype(plan, values, body))
    if body is not None:
        add_ranges(joined, 0, opened, body)
    return joined


def _body_of_some(plan: LayerPlan, block: BlockModule, values: Values, opened: tuple[Range, ...]) -> Tensor | None:
    """Return the body of the samples in `opened`, None if there is none."""
    if not opened:
        return None
    local = values | {name: take_ranges(values[name], 0, opened) for name in plan.read}
    run(plan.body, block, local)
    body: Tensor = local[plan.result]
    return body


def _dtype(plan: LayerPlan, values: Values, body: Tensor | None) -> torch.dtype:
    """Return the dtype of the gated body."""
    decided: torch.dtype = values[plan.decisions].dtype
    return decided if body is None else torch.promote_types(body.dtype, decided)


def _is_plain(relu: nn.Module, values: Values, plan: LayerPlan, body: Tensor | None) -> bool:
    """Return whether the activation behind the addition can be computed part by part, into one tensor."""
    watched = relu._forward_hooks or relu._forward_pre_hooks or torch.is_grad_enabled()
    dtype = values[plan.shortcut].dtype
    return not watched and torch.promote_types(dtype, _dtype(plan, values, body)) == dtype


def _rectified(shortcut: Tensor, opened: tuple[Range, ...], body: Tensor | None) -> Tensor:
    """Return the ReLU of the shortcut plus the body of the samples in `opened`, in one pass over the memory."""
    out = torch.empty_like(shortcut)
    for start, stop in rest(opened, len(shortcut)):
        torch.clamp_min(shortcut[start:stop], 0, out=out[start:stop])
    parts = () if body is None else body.split([stop - start for start, stop in opened])
    for (start, stop), part in zip(opened, parts, strict=True):
        torch.add(shortcut[start:stop], part, out=out[start:stop]).relu_()
    return out


def _writable(plan: LayerPlan, values: Values, args: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
    """Return the shortcut as a tensor that nobody else reads, with a dtype that holds `dtype` as well."""
    shortcut: Tensor = values[plan.shortcut]
    memory = shortcut.untyped_storage().data_ptr()
    kept = [value for name, value in values.items() if name != plan.shortcut]
    others = [value for value in (*args, *kept) if isinstance(value, Tensor)]
    owned = plan.owned and all(other.untyped_storage().data_ptr() != memory for other in others)
    return shortcut.to(torch.promote_types(shortcut.dtype, dtype), copy=not owned)


def _has_rows(value: object, rows: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == rows


def _plan(block: BlockModule) -> LayerPlan | None:
    """Divide the graph of a block, or return None where its gated body cannot be told from the rest."""
    calls = {node: block.get_submodule(str(node.target)) for node in block.graph.find_nodes(op="call_module")}
    gate = next((node for node, module in calls.items() if isinstance(module, LayerGate)), None)
    join = None if gate is None else _join(gate)
    if gate is None or join is None or any(overwrites(node, block) for node in block.graph.nodes):
        return None
    result, decisions = gate.all_input_nodes
    shortcut = next(node for node in join.all_input_nodes if node is not gate)
    behind, outside = _around(gate)
    inputs = list(block.graph.find_nodes(op="placeholder"))
    body = upstream(result) - outside - set(inputs)
    read = {source for node in body for source in node.all_input_nodes} - body
    batched = {node for node in read if inputs[0] in upstream(node)}
    if result not in body or any(set(inputs) & upstream(node) for node in read - batched):
        return None
    ordered = [node for node in block.graph.nodes if node.op not in ("placeholder", "output")]
    after = [node for node in ordered if node in behind - {join}]
    output = block.graph.output_node().all_input_nodes[0]
    needed = {shortcut, decisions, output, *read, *(source for node in after for source in node.all_input_nodes)}
    names = [node.name for node in needed]
    return LayerPlan(
        inputs=tuple(node.name for node in inputs),
        outside=program([node for node in ordered if node in outside], names),
        body=program([node for node in ordered if node in body], [result.name]),
        gate=program([gate], names)[0],
        join=program([join], names)[0],
        after=program(after, [output.name]),
        decisions=decisions.name,
        result=result.name,
        shortcut=shortcut.name,
        read=tuple(node.name for node in batched),
        owned=shortcut.op != "placeholder" and list(shortcut.users) == [join],
        output=output.name,
        relu=str(output.target) if after == [output] and type(calls.get(output)) is nn.ReLU else None,
        taps=taps_beside(block, decisions),
    )


def _join(gate: fx.Node) -> fx.Node | None:
    """Return the addition of a shortcut that alone reads the gated body, if that is what reads it."""
    users = list(gate.users)
    return users[0] if len(users) == 1 and is_addition(users[0]) else None


def _around(gate: fx.Node) -> tuple[set[fx.Node], set[fx.Node]]:
    """Return the nodes behind a gate, and those that are needed whether or not it is open."""
    nodes = gate.graph.nodes
    behind: set[fx.Node] = set()
    for node in nodes:
        if node.op != "output" and not behind.union({gate}).isdisjoint(node.all_input_nodes):
            behind.add(node)
    used = upstream(gate.graph.output_node())
    beside = {source for node in behind for source in node.all_input_nodes} - behind - {gate}
    unused = {node for node in nodes if node not in used and node.op != "output"}
    return behind, upstream(gate.all_input_nodes[1], *beside, *(unused - behind))
