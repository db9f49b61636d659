"""Leave out closed channels: cut the weights for one decision and compute the open channels only.

Where only a gate reads a value, nothing but its open channels is computed: the rows of the convolution, the norm and
the activation in front of it. Behind a gate the closed channels are zero, so a convolution leaves out the columns that
would read them, and an addition adds the open channels onto a copy of the other operand. Everything else, such as a
squeeze-excite, gets the whole tensor with its zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce

from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from surgery.network import BlockModule
from surgery_gated.channel_plan import Action, ChannelPlan, channel_plan
from surgery_gated.modules import ChannelGate
from surgery_gated.program import Plans, Values, call, run, separable
from surgery_gated.ranges import Range, add_ranges, common, length, ranges_of, take_ranges

Opened = Mapping[str, tuple[Range, ...] | None]

_NORM_VALUES = ("weight", "bias", "running_mean", "running_var")


@dataclass(frozen=True)
class Part:
    """Some channels of a tensor; the others are zero, or nothing reads them.

    Attributes:
        value: (B, n, ...), the channels in `ranges`.
        ranges: Which channels these are.
        width: C, number of channels of the whole tensor.
    """

    value: Tensor
    ranges: tuple[Range, ...]
    width: int

    def whole(self) -> Tensor:
        """Return the tensor with zeros in the other channels."""
        full = self.value.new_zeros(self.value.shape[0], self.width, *self.value.shape[2:])
        add_ranges(full, 1, self.ranges, self.value)
        return full


_PLANS = Plans()


def run_channels(block: BlockModule, gates: nn.Module, *args: Tensor) -> Tensor | None:
    """Return what a block returns, with only the open channels computed where one decision holds for the batch.

    Args:
        block: A block in eval mode with channel gates.
        gates: What decides; part of the block.
        *args: Inputs of the block.

    Returns:
        The output, or None where the graph has to run: for several images that decide differently, in the presence
        of hooks, or where the decisions cannot be read.
    """
    if len(args[0]) != 1 and (getattr(gates, "dependent", True) or not len(args[0])):
        return None
    plan = _PLANS.get(block, channel_plan)
    if plan is None or not separable(block, plan.taps, args) or not _cuttable(block, plan):
        return None
    values: Values = dict(zip(plan.inputs, args, strict=True))
    run(plan.first, block, values)
    opened = _opened(block, plan, values[plan.decisions])
    for action in plan.actions:
        name = action.step.name
        values[name] = _whole(action, block, values) if opened is None else _perform(action, block, values, opened)
        for freed in action.step.frees:
            values.pop(freed, None)
    output = values[plan.output]
    return output.whole() if isinstance(output, Part) else output


def _opened(block: BlockModule, plan: ChannelPlan, decisions: Tensor) -> Opened | None:
    """Return the open channels by gate, None for all of them; None where images differ or a tensor would be empty."""
    if len(decisions) > 1 and not bool((decisions == decisions[:1]).all()):
        return None
    found: dict[str, tuple[Range, ...] | None] = {}
    for path in plan.gates:
        gate = block.get_submodule(path)
        assert isinstance(gate, ChannelGate)
        ranges = ranges_of(gate.mask(decisions[:1])[0])
        found[path] = None if length(ranges) == len(gate.column) else ranges
    empty = any(_met(action.wanted, found) == () for action in plan.actions)
    return None if empty else found


def _perform(action: Action, block: BlockModule, values: Values, opened: Opened) -> Tensor | Part:
    """Return the value of one step, of its wanted channels alone where that is possible."""
    step = action.step
    sources = [values[name] for name in step.reads]
    wanted = _met(action.wanted, opened)
    if action.kind == "gate":
        return sources[0] if wanted is None else _let_through(sources[0], wanted)
    if action.kind == "convolution":
        return _convolve(action, block, values, wanted)
    if wanted is not None and action.kind in ("norm", "channelwise", "addition"):
        return _by_channel(action, block, values, wanted)
    if action.kind == "addition" and any(isinstance(source, Part) for source in sources):
        return _added(action, block, values)
    return _whole(action, block, values)


def _met(gates: tuple[str, ...], opened: Opened) -> tuple[Range, ...] | None:
    """Return the channels that all these gates let through, None for all."""
    found = [ranges for ranges in (opened[gate] for gate in gates) if ranges is not None]
    return reduce(common, found) if found else None


def _let_through(value: Tensor | Part, ranges: tuple[Range, ...]) -> Part:
    """Return what is left of a value behind a gate that is open in `ranges`."""
    return _part(value, common(value.ranges, ranges) if isinstance(value, Part) else ranges)


def _whole(action: Action, block: BlockModule, values: Values) -> Tensor:
    """Return the value of a step that reads whole tensors."""
    full = {
        name: value.whole() if isinstance(value, Part) else value
        for name in action.step.reads
        for value in (values[name],)
    }
    value: Tensor = call(action.step, block, full)
    return value


def _part(value: Tensor | Part, ranges: tuple[Range, ...]) -> Part:
    """Return the channels in `ranges` of a value."""
    if isinstance(value, Part) and value.ranges == ranges:
        return value
    full = value.whole() if isinstance(value, Part) else value
    return Part(take_ranges(full, 1, ranges), ranges, full.shape[1])


def _by_channel(action: Action, block: BlockModule, values: Values, wanted: tuple[Range, ...]) -> Part:
    parts = {name: _part(values[name], wanted) for name in action.by_channel}
    width = next(iter(parts.values())).width
    cut = {name: parts[name].value if name in parts else values[name] for name in action.step.reads}
    value = cut[action.by_channel[0]]
    found = _normed(action, block, value, wanted) if action.kind == "norm" else call(action.step, block, cut)
    return Part(found, wanted, width)


def _normed(action: Action, block: BlockModule, value: Tensor, wanted: tuple[Range, ...]) -> Tensor:
    norm = block.get_submodule(action.step.target)
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
    tensors = {name: getattr(norm, name) for name in _NORM_VALUES}
    cut = {name: None if tensor is None else take_ranges(tensor, 0, wanted) for name, tensor in tensors.items()}
    if type(norm).forward is nn.modules.batchnorm._BatchNorm.forward:
        mean, variance = cut["running_mean"], cut["running_var"]
        return functional.batch_norm(value, mean, variance, cut["weight"], cut["bias"], eps=norm.eps)
    out: Tensor = functional_call(norm, {name: tensor for name, tensor in cut.items() if tensor is not None}, value)
    return out


def _added(action: Action, block: BlockModule, values: Values) -> Tensor:
    first, second = (values[name] for name in action.step.reads)
    if not isinstance(second, Part):
        first, second = second, first
    assert isinstance(second, Part)
    total = first.whole() if isinstance(first, Part) else first
    if total.dtype != second.value.dtype or total.shape[1:2] != (second.width,):
        return _whole(action, block, values)
    total = total if isinstance(first, Part) else total.clone()
    add_ranges(total, 1, second.ranges, second.value)
    return total


def _convolve(action: Action, block: BlockModule, values: Values, wanted: tuple[Range, ...] | None) -> Tensor | Part:
    conv = block.get_submodule(action.step.target)
    assert isinstance(conv, nn.Conv2d)
    source = values[action.step.reads[0]]
    if wanted is None and not isinstance(source, Part):
        return _whole(action, block, values)
    groups = 1
    if conv.groups > 1:
        open_groups = None if wanted is None else _groups(wanted, conv.out_channels // conv.groups)
        if open_groups is None:
            return _whole(action, block, values)
        width = conv.in_channels // conv.groups
        source = _part(source, tuple((width * start, width * stop) for start, stop in open_groups)).value
        groups = length(open_groups)
    weight, bias = conv.weight, conv.bias
    if wanted is not None:  # rows first: they are contiguous, and leave less of the columns to copy
        weight = take_ranges(weight, 0, wanted)
        bias = None if bias is None else take_ranges(bias, 0, wanted)
    if isinstance(source, Part):
        weight, source = take_ranges(weight, 1, source.ranges), source.value
    out = functional.conv2d(source, weight, bias, conv.stride, conv.padding, conv.dilation, groups)
    return out if wanted is None else Part(out, wanted, conv.out_channels)


def _groups(ranges: tuple[Range, ...], width: int) -> tuple[Range, ...] | None:
    """Return the groups of `width` channels that make up `ranges`, or None where one is open in part."""
    if any(edge % width for bounds in ranges for edge in bounds):
        return None
    return tuple((start // width, stop // width) for start, stop in ranges)


def _cuttable(block: BlockModule, plan: ChannelPlan) -> bool:
    """Return whether all convolutions are plain ones, and no hook wants to see whole tensors."""
    for module in block.modules():
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
        if any(hooks):
            return False
    for action in plan.actions:
        if action.kind == "convolution" and not _is_plain(block.get_submodule(action.step.target)):
            return False
    return True


def _is_plain(conv: nn.Module) -> bool:
    plain = isinstance(conv, nn.Conv2d) and type(conv).forward is nn.Conv2d.forward and "forward" not in vars(conv)
    return plain and conv.padding_mode == "zeros"
