"""Trace a network into one torch.fx graph that is right in train and in eval mode.

A plain symbolic trace bakes `self.training` in: a traced batch norm with an activation never updates its statistics
again, drop-path stays random for good or vanishes. Modules that hold no convolution or linear layer are therefore
leaves, the network is traced once in each mode, and a `training=` argument that differs becomes a node that reads the
mode at run time. Every other difference between the two traces is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import timm.layers
import torch
from torch import fx, nn

from surgery.errors import TraceError, UnsupportedModel

OWNER = "owner"
"""Key in `node.meta`: path of the innermost module whose `forward` created the node."""
OWNERS = "owners"
"""Key in `node.meta`: paths of all modules whose `forward` was running, outermost first, with the call's number."""
CONSTANT = "constant"
"""Key in `node.meta` of a `get_attr` node: the tensor that tracing found to be constant."""
SITE = "site"
"""Key in `node.meta`: the `surgery.history.Site` of a node that a method put there."""
MARK = "mark"
"""Key in `node.meta`: name of the source method that returns this node's value, such as `forward_features`."""

_FLAG = "training_flag"
_WEIGHTED = (nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear, nn.MultiheadAttention)
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_MARKED_METHODS = ("forward_features",)


class TrainingFlag(nn.Module):
    """Return the mode at run time, for functions that take `training=`."""

    def forward(self) -> bool:
        """Return `self.training`."""
        return self.training


def is_training_flag(node: fx.Node) -> bool:
    """Return whether `node` reads the mode."""
    return node.op == "call_module" and str(node.target).rpartition(".")[2] == _FLAG


class SurgeryTracer(fx.Tracer):
    """Tracer whose leaves keep their own train/eval behaviour and whose nodes know the module that made them."""

    # Otherwise arithmetic on a buffer runs once, now, and its result is frozen into the graph.
    proxy_buffer_attributes = True

    def __init__(self) -> None:
        super().__init__(autowrap_functions=tuple(timm.layers.get_notrace_functions()))
        self._notrace = tuple(timm.layers.get_notrace_modules())

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Return True for what timm declares untraceable, for torch.nn, and for modules without weights to cut."""
        if isinstance(m, fx.GraphModule):
            return True
        if isinstance(m, _CONTAINERS):
            return False
        if isinstance(m, self._notrace) or m.__module__.startswith("torch.nn"):
            return True
        return not any(isinstance(child, _WEIGHTED) for child in m.modules() if child is not m)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Record a leaf, or trace through its `forward` without its hooks: they run when the network does, not now."""
        return super().call_module(m, m.forward, args, kwargs)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Create a node and stamp it with the modules that own it."""
        node: fx.Node = super().create_node(*args, **kwargs)
        stack = [(key, path) for key, (path, _) in self.module_stack.items()]
        if node.op == "call_module":
            stack = stack[:-1]
        node.meta[OWNERS] = tuple(key for key, _ in stack)
        node.meta[OWNER] = stack[-1][1] if stack else ""
        node.meta.pop("nn_module_stack", None)
        return node


def trace(model: nn.Module) -> fx.Graph:
    """Trace `model` into a flat graph that holds in both modes.

    The model is left as it was: weights, buffers and the mode of every module.

    Args:
        model: A network with one tensor in and one tensor out.

    Returns:
        The graph. Its `call_module` targets are the paths of `model`; where a function takes `training=`, the argument
        is a call of a `TrainingFlag` below the module that passes it on, which the model need not have yet.

    Raises:
        UnsupportedModel: If `model` is wrapped (DDP, FSDP, compiled, scripted).
        TraceError: If the control flow cannot be traced, or differs between train and eval mode.
    """
    refuse_wrapped(model)
    with _modes_restored(model):
        graphs = {mode: _trace_in_mode(model, train=mode == "train") for mode in ("eval", "train")}
    for node, twin in _pairs(graphs["eval"], graphs["train"], type(model).__name__):
        _merge_node(node, twin, type(model).__name__)
    return graphs["eval"]


def refuse_wrapped(model: nn.Module) -> None:
    """Raise `UnsupportedModel` unless `model` is a plain module."""
    wrappers: dict[str, str] = {
        "DistributedDataParallel": "convert first, then wrap: DistributedDataParallel(convert(model.module, ...))",
        "DataParallel": "convert first, then wrap: DataParallel(surgery.convert(model.module, ...))",
        "FullyShardedDataParallel": "convert the plain network first, then shard it",
        "OptimizedModule": "convert first, then compile: torch.compile(surgery.convert(model._orig_mod, ...))",
    }
    if not isinstance(model, nn.Module):
        raise UnsupportedModel(f"expected an nn.Module, found {type(model).__name__}; pass the network itself")
    if isinstance(model, torch.jit.ScriptModule):
        raise UnsupportedModel("the model is compiled to TorchScript; convert the eager network instead")
    kind = type(model).__name__
    if kind in wrappers and type(model).__module__.startswith("torch"):
        raise UnsupportedModel(f"the model is wrapped in {kind}; {wrappers[kind]}")
    if kind.startswith("FSDP"):
        raise UnsupportedModel(
            f"the model is sharded ({kind}); convert the plain network first, then shard it, and give what needs whole "
            "weights a plain network that has loaded the full state dict: "
            "torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True"
        )


@contextmanager
def _modes_restored(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _trace_in_mode(model: nn.Module, *, train: bool) -> fx.Graph:
    model.train(train)
    tracer = SurgeryTracer()
    with _constants_detached(model) as constants, _marked(model):
        try:
            graph = tracer.trace(model)
        except Exception as error:
            owner = next(reversed(tracer.module_stack.values()), ("", type(model)))
            where = f"{type(model).__name__}, module {owner[0] or '(root)'!r} of type {owner[1].__name__}"
            raise TraceError(
                f"{where}: cannot be traced in {'train' if train else 'eval'} mode ({type(error).__name__}: {error}); "
                "declare that module a leaf with timm.layers.register_notrace_module, or rewrite its data-dependent "
                "control flow"
            ) from error
    for node in graph.nodes:
        if node.op == "get_attr" and node.target in constants:
            node.meta[CONSTANT] = constants[node.target]
    return graph


@contextmanager
def _constants_detached(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Collect the tensor constants that the tracer puts on the model; they belong to the graph."""
    attributes = set(model.__dict__)
    constants: dict[str, Any] = {}
    try:
        yield constants
    finally:
        for name in set(model.__dict__) - attributes:
            constants[name] = model.__dict__.pop(name)


@contextmanager
def _marked(model: nn.Module) -> Iterator[None]:
    """Mark the node that each of `_MARKED_METHODS` returns, so that the converted network can offer them again."""
    before = dict(model.__dict__)
    wrapped = [name for name in _MARKED_METHODS if callable(getattr(model, name, None))]
    for name in wrapped:
        model.__dict__[name] = _marking(getattr(model, name), name)
    try:
        yield
    finally:
        for name in wrapped:
            model.__dict__.pop(name)
            if name in before:
                model.__dict__[name] = before[name]


def _marking(method: Callable[..., Any], name: str) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        value = method(*args, **kwargs)
        if isinstance(value, fx.Proxy):
            value.node.meta[MARK] = name
        return value

    return call


def _pairs(graph: fx.Graph, other: fx.Graph, name: str) -> list[tuple[fx.Node, fx.Node]]:
    pairs = list(zip(graph.nodes, other.nodes, strict=False))
    for node, twin in pairs:
        if (node.op, node.target if node.op != "output" else "") != (
            twin.op,
            twin.target if twin.op != "output" else "",
        ):
            raise _difference(node, twin, name, twin if len(other.nodes) > len(graph.nodes) else node)
    return pairs


def _merge_node(node: fx.Node, twin: fx.Node, name: str) -> None:
    values = [*node.args, *node.kwargs.values()]
    twins = [*twin.args, *twin.kwargs.values()]
    if len(values) != len(twins) or list(node.kwargs) != list(twin.kwargs) or not _same_constant(node, twin):
        raise _difference(node, twin, name, node)
    flag: fx.Node | None = None
    for index, (value, other) in enumerate(zip(values, twins, strict=True)):
        if fx.node.map_arg(value, str) == fx.node.map_arg(other, str):
            continue
        if value is not False or other is not True:
            raise _difference(node, twin, name, node)
        flag = flag or _insert_flag(node)
        if index < len(node.args):
            node.update_arg(index, flag)
        else:
            node.update_kwarg(list(node.kwargs)[index - len(node.args)], flag)


def _same_constant(node: fx.Node, twin: fx.Node) -> bool:
    value, other = node.meta.get(CONSTANT), twin.meta.get(CONSTANT)
    if not isinstance(value, torch.Tensor) or not isinstance(other, torch.Tensor) or value.is_meta:
        return True
    return torch.equal(value, other)


def _insert_flag(node: fx.Node) -> fx.Node:
    with node.graph.inserting_before(node):
        flag = node.graph.call_module(f"{node.meta[OWNER]}.{_FLAG}".removeprefix("."))
    flag.meta[OWNER], flag.meta[OWNERS] = node.meta[OWNER], node.meta[OWNERS]
    return flag


def _difference(node: fx.Node, twin: fx.Node, name: str, culprit: fx.Node) -> TraceError:
    owner = culprit.meta.get(OWNER) or "(root)"
    return TraceError(
        f"{name}, module {owner!r}: its graph differs between eval mode ({node.op} {_target(node)}) and train mode "
        f"({twin.op} {_target(twin)}); one graph cannot serve both. Build the network without that part (for example "
        "aux_logits=False), or declare the module a leaf with timm.layers.register_notrace_module"
    )


def _target(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def upstream(*nodes: fx.Node) -> set[fx.Node]:
    """Return the nodes and everything that they are computed from, within their graph."""
    seen, pending = set(nodes), list(nodes)
    while pending:
        new = set(pending.pop().all_input_nodes) - seen
        seen |= new
        pending += new
    return seen
