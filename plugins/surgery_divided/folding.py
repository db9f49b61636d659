"""One small network as a flat graph of layers that computes the same in eval mode, with fewer of them."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any

import torch
from timm.layers import BatchNormAct2d, Conv2dSame, DropBlock2d, DropPath
from torch import Tensor, fx, nn
from torch.nn.utils import fuse_conv_bn_eval
from torchvision.ops import StochasticDepth

from surgery.taps import Tap

SHAPE = "shape"
"""Key in `node.meta`: shape of the tensor that the node returned for an example, None where it returned no tensor."""
TENSORS = "tensors"
"""Key in `node.meta`: whether the node returned a tensor, or a tuple or list that holds some."""
CONVS = (nn.Conv2d, Conv2dSame)
"""Convolutions whose result is linear in `weight` as it stands; others compute it from that, or have it computed."""
FRESH = (*CONVS, nn.BatchNorm2d, nn.Linear)
"""Layers whose result lies in memory of its own."""
ADDITIONS = (operator.add, torch.add)

_IDENTITIES = (nn.Identity, nn.Dropout, nn.Dropout2d, nn.AlphaDropout, DropPath, DropBlock2d, StochasticDepth, Tap)
_ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.Hardsigmoid, nn.LeakyReLU, nn.ELU, nn.Mish)
_FRESH_FUNCTIONS = (*ADDITIONS, operator.mul, operator.iadd, operator.imul)
_IN_PLACE_FUNCTIONS = (operator.iadd, operator.isub, operator.imul, operator.itruediv)

Layers = dict[str, Any]
"""Path -> the module or tensor that a node of the flat graph names."""


def folded(member: fx.GraphModule, example: Tensor) -> fx.GraphModule:
    """Return a copy of a small network that computes the same in eval mode, as one flat graph of layers.

    Layers that do nothing in eval mode are gone, batch norms are part of the convolution before them where nothing else
    reads it, and results that nothing else reads are overwritten. Every node has `SHAPE` and `TENSORS` in its meta.

    Args:
        member: Stays untouched, and shares no memory with the result.
        example: A batch of images that shapes are taken from.
    """
    graph, layers = fx.Graph(), Layers()
    source = graph.placeholder("images")
    graph.output(_inlined(copy.deepcopy(member).eval(), "", (source,), graph, layers))
    _drop_identities(graph, layers)
    _read_what_was_overwritten(graph, layers)
    _split_norms(graph, layers)
    _fold_norms(graph, layers)
    _Shapes(fx.GraphModule(layers, graph)).run(example)
    _overwrite(graph, layers)
    return fx.GraphModule(layers, graph).eval().requires_grad_(requires_grad=False)


def layers_of(member: fx.GraphModule) -> Layers:
    """Return what the nodes of a flat graph name."""
    called = [str(node.target) for node in member.graph.nodes if node.op in ("call_module", "get_attr")]
    return {path: operator.attrgetter(path)(member) for path in called}


def module_of(node: fx.Node, layers: Layers) -> nn.Module | None:
    """Return the module that a node calls; None if it calls none, or one whose hooks may do something of their own."""
    if node.op != "call_module":
        return None
    module: nn.Module = layers[str(node.target)]
    # Weight norm and its relatives compute the weight in a hook.
    hooked = module._forward_hooks or module._forward_pre_hooks
    return None if hooked else module


def _inlined(module: fx.GraphModule, prefix: str, args: tuple[fx.Node, ...], graph: fx.Graph, layers: Layers) -> Any:
    """Copy the graph of a module, and of the blocks that it calls, and return what it returns."""
    inputs, copies = iter(args), dict[fx.Node, Any]()
    for node in module.graph.nodes:
        arguments = fx.node.map_arg(node.args, copies.__getitem__)
        options = fx.node.map_arg(node.kwargs, copies.__getitem__)
        if node.op == "placeholder":
            copies[node] = next(inputs)
        elif node.op == "output":
            return arguments[0]
        elif node.op == "call_module" and isinstance(block := module.get_submodule(str(node.target)), fx.GraphModule):
            copies[node] = _inlined(block, f"{prefix}{node.target}.", arguments, graph, layers)
        else:
            target = _registered(node, module, prefix, layers)
            copies[node] = graph.create_node(node.op, target, arguments, options, name=node.name)
    raise AssertionError("a graph ends with its output")


def _registered(node: fx.Node, module: fx.GraphModule, prefix: str, layers: Layers) -> Callable[..., Any] | str:
    if node.op == "call_module":
        target = f"{prefix}{node.target}"
        layers[target] = module.get_submodule(str(node.target))
        return target
    if node.op == "get_attr":
        # Not within a layer, whose own weights folding replaces.
        target = f"attribute_{prefix}{node.target}".replace(".", "_")
        layers[target] = operator.attrgetter(str(node.target))(module)
        return target
    return node.target


def _drop_identities(graph: fx.Graph, layers: Layers) -> None:
    for node in list(graph.nodes):
        if isinstance(module_of(node, layers), _IDENTITIES) and len(node.args) == 1:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _read_what_was_overwritten(graph: fx.Graph, layers: Layers) -> None:
    """Let what reads a value after it was overwritten read the result instead: then the order of nodes is free."""
    order = {node: number for number, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if node.args and isinstance(source := node.args[0], fx.Node) and _overwrites(node, layers):
            for user in list(source.users):
                if order[user] > order[node]:
                    user.replace_input_with(source, node)


def _overwrites(node: fx.Node, layers: Layers) -> bool:
    module = module_of(node, layers)
    if module is not None:
        return bool(getattr(module, "inplace", False))
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    return node.target in _IN_PLACE_FUNCTIONS or node.kwargs.get("inplace") is True


def _split_norms(graph: fx.Graph, layers: Layers) -> None:
    """Part the norms of timm that hold an activation into a norm and an activation."""
    for node in list(graph.nodes):
        module = module_of(node, layers)
        if type(module) is not BatchNormAct2d:
            continue
        layers[str(node.target)] = _plain(module)
        after = node
        for name in ("drop", "act"):
            child = module.get_submodule(name)
            if not isinstance(child, nn.Identity):
                with graph.inserting_after(after):
                    added = graph.call_module(f"{node.target}_{name}", (after,))
                layers[str(added.target)] = child
                after.replace_all_uses_with(added, delete_user_cb=lambda user, added=added: user is not added)
                after = added


def _plain(module: nn.BatchNorm2d) -> nn.BatchNorm2d:
    plain = nn.BatchNorm2d(module.num_features, module.eps, affine=False, track_running_stats=False).eval()
    plain.affine, plain.track_running_stats = module.affine, module.track_running_stats
    plain.weight, plain.bias = module.weight, module.bias
    plain.running_mean, plain.running_var = module.running_mean, module.running_var
    return plain


def _fold_norms(graph: fx.Graph, layers: Layers) -> None:
    calls = [node.target for node in graph.nodes if node.op == "call_module"]
    for node in list(graph.nodes):
        norm, before = module_of(node, layers), node.args[0] if node.args else None
        if type(norm) is not nn.BatchNorm2d or norm.running_mean is None or not isinstance(before, fx.Node):
            continue
        conv = module_of(before, layers)
        if type(conv) in CONVS and len(before.users) == 1 and calls.count(before.target) == 1:
            assert isinstance(conv, nn.Conv2d)
            layers[str(before.target)] = fuse_conv_bn_eval(conv, norm)
            node.replace_all_uses_with(before)
            graph.erase_node(node)


class _Shapes(fx.Interpreter):
    """Run a graph once and write `SHAPE` and `TENSORS` into the meta of its nodes."""

    def run_node(self, n: fx.Node) -> Any:
        """Run one node."""
        result = super().run_node(n)
        n.meta[SHAPE] = tuple(result.shape) if isinstance(result, Tensor) else None
        several = isinstance(result, tuple | list) and any(isinstance(entry, Tensor) for entry in result)
        n.meta[TENSORS] = isinstance(result, Tensor) or several
        return result


def _overwrite(graph: fx.Graph, layers: Layers) -> None:
    """Let activations and additions overwrite what nothing else reads: memory that is in the cache already."""
    for node in graph.nodes:
        module = module_of(node, layers)
        if type(module) in _ACTIVATIONS and node.args and _is_free(node.args[0], layers):
            twin = copy.copy(module)
            twin.inplace = True  # type: ignore[union-attr]
            node.target = f"{node.name}_in_place"
            layers[node.target] = twin
        elif node.target in ADDITIONS and not node.kwargs and len(node.args) == 2:
            free = [arg for arg in node.args if _is_free(arg, layers) and arg.meta[SHAPE] == node.meta[SHAPE]]
            if free and all(isinstance(arg, fx.Node) and arg.meta[TENSORS] for arg in node.args):
                left, right = node.args
                node.target = operator.iadd
                node.args = (left, right) if left is free[0] else (right, left)


def _is_free(value: Any, layers: Layers) -> bool:
    """Return whether a value lies in memory of its own, and is read by one node."""
    if not isinstance(value, fx.Node) or len(value.users) != 1:
        return False
    return type(module_of(value, layers)) in FRESH or value.target in _FRESH_FUNCTIONS
