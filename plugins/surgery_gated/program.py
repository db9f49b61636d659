"""A block's graph as plain data, so that parts of it can run on some samples or channels only.

A program holds names instead of nodes and modules: it can be kept beside a graph without keeping it alive, and what it
calls is looked up in the block when it runs.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn
from torch._C._functorch import is_functorch_wrapped_tensor

from surgery.network import BlockModule
from surgery.taps import Tap
from surgery.tracing import upstream

Plan = TypeVar("Plan")
Values = dict[str, Any]

_NOT_EAGER = ("meta", "xla")
_ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
_AUGMENTED = ("iadd", "isub", "imul", "itruediv")


@dataclass(frozen=True)
class Ref:
    """The value of another step."""

    name: str


@dataclass(frozen=True)
class Step:
    """One node of a graph.

    Attributes:
        name: Its value is known by this name.
        op: What `torch.fx` calls it.
        target: Path, function or method.
        args: Arguments, with a `Ref` for each value.
        kwargs: Named arguments, likewise.
        reads: Names of all values among them, in order.
        frees: Values that nothing reads any more.
    """

    name: str
    op: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    reads: tuple[str, ...]
    frees: tuple[str, ...]


def program(nodes: Iterable[fx.Node], results: Iterable[str]) -> tuple[Step, ...]:
    """Return the steps of `nodes`, in their order, that leave the values called `results` behind."""
    kept = set(results)
    steps = []
    for node in reversed(list(nodes)):
        reads = tuple(source.name for source in node.all_input_nodes)
        frees = tuple(name for name in (*reads, node.name) if name not in kept)
        kept |= {*reads, node.name}
        args, kwargs = _named(node.args), _named(node.kwargs)
        steps.append(Step(node.name, node.op, node.target, args, kwargs, reads, frees))
    return tuple(reversed(steps))


def run(steps: Sequence[Step], block: BlockModule, values: Values) -> None:
    """Run the steps on `values`, which they read and write."""
    for step in steps:
        values[step.name] = call(step, block, values)
        for name in step.frees:
            values.pop(name, None)


def call(step: Step, block: BlockModule, values: Values) -> Any:
    """Return the value of one step."""
    if step.op == "get_attr":
        return attrgetter(step.target)(block)
    args, kwargs = filled(step.args, values), filled(step.kwargs, values)
    if step.op == "call_module":
        return block.get_submodule(step.target)(*args, **kwargs)
    if step.op == "call_method":
        return getattr(args[0], step.target)(*args[1:], **kwargs)
    return step.target(*args, **kwargs)


def filled(argument: Any, values: Values) -> Any:
    """Return an argument with the values in the places of their names."""
    return _mapped(argument, lambda leaf: values[leaf.name] if isinstance(leaf, Ref) else leaf)


def _named(argument: Any) -> Any:
    return _mapped(argument, lambda leaf: Ref(leaf.name) if isinstance(leaf, fx.Node) else leaf)


def _mapped(argument: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(argument, tuple):
        return tuple(_mapped(part, change) for part in argument)
    if isinstance(argument, list):
        return [_mapped(part, change) for part in argument]
    if isinstance(argument, dict):
        return {key: _mapped(part, change) for key, part in argument.items()}
    if isinstance(argument, slice):
        return slice(*(_mapped(part, change) for part in (argument.start, argument.stop, argument.step)))
    return change(argument)


class Plans:
    """What was derived from the graphs of blocks; made anew when a block has been recompiled."""

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[fx.Graph, tuple[str, Any]] = WeakKeyDictionary()

    def get(self, block: BlockModule, make: Callable[[BlockModule], Plan]) -> Plan:
        """Return what `make` derives from the block, made once for each recompilation of it."""
        graph, code = block.graph, block.code
        found = self._known.get(graph)
        if found is None or found[0] is not code:  # every recompilation writes a new string
            found = self._known[graph] = (code, make(block))
        plan: Plan = found[1]
        return plan


def separable(block: BlockModule, taps: Iterable[str], args: tuple[Tensor, ...]) -> bool:
    """Return whether parts of a batch can be computed apart, and none of the taps at `taps` wants to see all of it.

    If so, what the taps hold from an earlier forward is dropped, as they would do themselves.
    """
    if type(args[0]) is not Tensor or args[0].device.type in _NOT_EAGER or is_functorch_wrapped_tensor(args[0]):
        return False
    for module in block.modules():
        if module.training or (isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None):
            return False
    found = [tap for tap in (block.get_submodule(path) for path in taps) if isinstance(tap, Tap)]
    if any(tap.recording for tap in found):
        return False
    for tap in found:
        tap.clear()
    return True


def taps_beside(block: BlockModule, decisions: fx.Node) -> tuple[str, ...]:
    """Return the paths of the taps that do not lead to the decisions."""
    calls = {str(node.target): node for node in block.graph.find_nodes(op="call_module")}
    heard = upstream(decisions)
    return tuple(
        path for path, node in calls.items() if isinstance(block.get_submodule(path), Tap) and node not in heard
    )


def is_addition(node: fx.Node) -> bool:
    """Return whether a node adds two values and does nothing else."""
    operands = len(node.all_input_nodes) == len(node.args) == 2 and not node.kwargs
    return operands and node.target in _ADDITIONS


def overwrites(node: fx.Node, block: BlockModule) -> bool:
    """Return whether a node writes to a value that others read too: its place in the order matters then."""
    if node.op == "output" or not node.all_input_nodes or len(node.all_input_nodes[0].users) == 1:
        return False
    return writes_in_place(node, block)


def writes_in_place(node: fx.Node, block: nn.Module) -> bool:
    """Return whether a node may overwrite its first argument."""
    if node.op == "call_module":
        module = block.get_submodule(str(node.target))
        # a norm with an activation in it overwrites what it has computed itself
        writers = not isinstance(module, nn.modules.batchnorm._NormBase)
        return writers and any(getattr(part, "inplace", False) is True for part in module.modules())
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if node.op == "call_function" and (
        name in _AUGMENTED or node.kwargs.get("inplace") or any(part is True for part in node.args)
    ):
        return True  # True may be an `inplace` that was passed by its place
    return name.endswith("_") and not name.endswith("__")
