"""Convolutions whose weights lie as oneDNN wants them, and that add and rectify what they compute in the same pass."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.autograd.forward_ad import unpack_dual
from torch.nn import functional as F
from torch.utils._python_dispatch import _get_current_dispatch_mode

from surgery_divided.folding import ADDITIONS, FRESH, SHAPE, Layers, layers_of, module_of

_LAYOUT = torch.channels_last
_RELUS = (F.relu, torch.relu)


class _Operators(NamedTuple):
    """What oneDNN is reached by; private to torch, and for inference only.

    Attributes:
        pack: Puts a weight into the order that suits a convolution.
        run: Computes a convolution with it, rectified or not.
        accumulate: Does the same on top of a value.
    """

    pack: Callable[..., Tensor]
    run: Callable[..., Tensor]
    accumulate: Callable[..., Tensor]


def _found() -> _Operators | None:
    if not torch.backends.mkldnn.is_available():
        return None
    try:
        return _Operators(
            torch._C._nn.mkldnn_reorder_conv2d_weight,
            torch.ops.mkldnn._convolution_pointwise.default,
            torch.ops.mkldnn._convolution_pointwise_.binary,
        )
    except AttributeError:
        return None


_OPERATORS: _Operators | None = _found()


def can_pack(value: Tensor) -> bool:
    """Return whether this torch has packed convolutions for tensors like this one."""
    return _OPERATORS is not None and value.device.type == "cpu" and value.dtype == torch.float32


def is_plain_inference(value: Tensor, *others: Tensor) -> bool:
    """Return whether nothing but the result of a layer counts: no gradient, no compiler, nothing that follows it.

    Args:
        value: What the layer reads.
        others: Its weights, and what else it reads.
    """
    return type(value) is Tensor and not _is_watched() and not any(_has_gradient(one) for one in (value, *others))


def state_of(weight: Tensor) -> tuple[int, int]:
    """Return where a weight lies and how often it has changed."""
    return weight.data_ptr(), 0 if weight.is_inference() else weight._version


def _is_watched() -> bool:
    """Return whether something follows or changes every operator, and would not know those of a layer."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
        return True
    if torch._C._functorch.peek_interpreter_stack() is not None:  # vmap, and derivatives of functions
        return True
    return torch.is_autocast_enabled("cpu") or _get_current_dispatch_mode() is not None


def _has_gradient(tensor: Tensor) -> bool:
    # The operators drop a forward-mode tangent without a word.
    return (torch.is_grad_enabled() and tensor.requires_grad) or unpack_dual(tensor).tangent is not None


class PackedConv2d(nn.Module):
    """A convolution for inference, and the addition and ReLU that follow it.

    It packs its weight for the first float32 image that it sees on a CPU, and computes everything in one pass. Wherever
    that does not apply (other types and devices, gradients, compilers, exporters, a torch without the operators), it is
    the plain convolution, addition and ReLU. What is packed takes the memory of the weight again, is neither saved nor
    copied, and is packed anew where the weight has changed.

    Args:
        conv: With zeros as padding; its weights are shared, not copied.
        adds: Whether `forward` takes a value to be added.
        overwrites: Whether it may overwrite that value.
        rectifies: Whether a ReLU comes last.
    """

    def __init__(
        self, conv: nn.Conv2d, *, adds: bool = False, overwrites: bool = False, rectifies: bool = False
    ) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self.padding = [int(size) for size in conv.padding]
        self.stride, self.dilation, self.groups = list(conv.stride), list(conv.dilation), conv.groups
        self.adds, self.overwrites, self.rectifies = adds, overwrites, rectifies
        self._packed: tuple[tuple[int, int], Tensor] | None = None

    def forward(self, value: Tensor, other: Tensor | None = None) -> Tensor:
        """Return the convolution of a value, plus the other one, rectified.

        Shape:
            (B, C, H, W), and (B, D, H', W') like the result.
        """
        if _OPERATORS is not None and self._is_plain_inference(value, other):
            # What oneDNN refuses may still be right, such as an addition that broadcasts.
            with suppress(RuntimeError):
                return self._fused(_OPERATORS, value, other)
        return self._plain(value, other)

    def extra_repr(self) -> str:
        """Return what it does for `print(model)`."""
        shape = "x".join(map(str, self.weight.shape))
        then = [name for name, does in (("add", self.adds), ("relu", self.rectifies)) if does]
        sizes = f"stride={tuple(self.stride)}, padding={tuple(self.padding)}, dilation={tuple(self.dilation)}"
        return ", ".join([shape, sizes, f"groups={self.groups}", f"bias={self.bias is not None}", *then])

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is packed: torch cannot copy it."""
        return {**self.__dict__, "_packed": None}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedConv2d:
        self._packed = None
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call,no-any-return]

    def _is_plain_inference(self, value: Tensor, other: Tensor | None) -> bool:
        others = [tensor for tensor in (self.weight, self.bias, other) if tensor is not None]
        if not is_plain_inference(value, *others) or value.dim() != 4 or value.numel() == 0:
            return False
        return all(can_pack(tensor) for tensor in (value, *others))

    def _fused(self, operators: _Operators, value: Tensor, other: Tensor | None) -> Tensor:
        value = value.contiguous(memory_format=_LAYOUT)
        weight, sizes = self._weight(operators, value), (self.padding, self.stride, self.dilation, self.groups)
        if other is None:
            return operators.run(value, weight, self.bias, *sizes, "relu" if self.rectifies else "none", [], "")
        # With a result of its own instead, the operator takes longer.
        onto = other.contiguous(memory_format=_LAYOUT) if self.overwrites else other.clone(memory_format=_LAYOUT)
        relu = "relu" if self.rectifies else None
        return operators.accumulate(onto, value, weight, self.bias, *sizes, "add", 1.0, relu, [], None)

    def _weight(self, operators: _Operators, value: Tensor) -> Tensor:
        key, packed = state_of(self.weight), self._packed
        if packed is None or packed[0] != key:
            with torch.inference_mode(mode=False), torch.no_grad():
                dense = self.weight.detach().to_mkldnn()
                sizes = (self.padding, self.stride, self.dilation, self.groups)
                packed = key, operators.pack(dense, *sizes, list(value.shape))
            self._packed = packed
        return packed[1]

    def _plain(self, value: Tensor, other: Tensor | None) -> Tensor:
        result = F.conv2d(value, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        if other is not None:
            result = result + other
        return result.relu_() if self.rectifies else result


_FRESH = (PackedConv2d, *FRESH)


class _Pattern(NamedTuple):
    """A convolution of a graph, and what follows it and can be part of it.

    Attributes:
        nodes: The convolution, the addition and the ReLU, as far as they are there.
        other: What is added.
        rectifies: Whether the ReLU is there.
    """

    nodes: tuple[fx.Node, ...]
    other: fx.Node | None
    rectifies: bool


def packed(network: fx.GraphModule) -> fx.GraphModule:
    """Return a network with packed convolutions that add and rectify where nothing else reads what is in between.

    Args:
        network: As `folding.folded` returns it; its weights are shared, its graph stays as it is.
    """
    graph, layers = fx.Graph(), layers_of(network)
    graph.output(graph.graph_copy(network.graph, {}))
    order = {node: number for number, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if _is_packable(module_of(node, layers)) and len(node.args) == 1 and not node.kwargs:
            _replace(graph, layers, _pattern(node, layers, order), order)
    return fx.GraphModule(layers, graph).eval()


def _is_packable(module: nn.Module | None) -> bool:
    return type(module) is nn.Conv2d and module.padding_mode == "zeros" and not isinstance(module.padding, str)


def _pattern(conv: fx.Node, layers: Layers, order: Mapping[fx.Node, int]) -> _Pattern:
    nodes, other = [conv], None
    reader = _only_reader(conv)
    if reader is not None and (added := _added(conv, reader)) is not None and order[added] < order[conv]:
        other = added
        nodes.append(reader)
        reader = _only_reader(reader)
    rectifies = reader is not None and _is_relu(reader, nodes[-1], layers)
    return _Pattern((*nodes, reader) if rectifies and reader else tuple(nodes), other, rectifies)


def _only_reader(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _added(conv: fx.Node, node: fx.Node) -> fx.Node | None:
    """Return what a node adds to the result of a convolution, where both have one shape."""
    if node.target not in (*ADDITIONS, operator.iadd) or node.kwargs or len(node.args) != 2:
        return None
    others = [arg for arg in node.args if arg is not conv]
    if len(others) != 1 or not isinstance(other := others[0], fx.Node):
        return None
    return other if other.meta[SHAPE] == conv.meta[SHAPE] else None


def _is_relu(node: fx.Node, source: fx.Node, layers: Layers) -> bool:
    return node.args[:1] == (source,) and (type(module_of(node, layers)) is nn.ReLU or node.target in _RELUS)


def _replace(graph: fx.Graph, layers: Layers, pattern: _Pattern, order: dict[fx.Node, int]) -> None:
    """Put one call where the convolution stood: further down, what that reads may be overwritten."""
    conv, other = pattern.nodes[0], pattern.other
    overwrites = other is not None and _is_done_with(other, conv, layers, order)
    path = f"{conv.name}_packed"
    layers[path] = PackedConv2d(
        layers[str(conv.target)], adds=other is not None, overwrites=overwrites, rectifies=pattern.rectifies
    )
    with graph.inserting_before(conv):
        call = graph.call_module(path, conv.args if other is None else (*conv.args, other))
    call.meta, order[call] = dict(conv.meta), order[conv]
    pattern.nodes[-1].replace_all_uses_with(call)
    for node in reversed(pattern.nodes):
        graph.erase_node(node)


def _is_done_with(value: fx.Node, conv: fx.Node, layers: Layers, order: Mapping[fx.Node, int]) -> bool:
    """Return whether a value lies in memory of its own that nothing but an addition reads once a convolution runs."""
    if type(module_of(value, layers)) not in _FRESH:
        return False
    readers = [node for node in value.users if order[node] <= order[conv]]
    # A reader with a result that is no copy would keep the memory in use.
    own = all(type(module_of(node, layers)) in _FRESH and order[node] < order[conv] for node in readers)
    return own and len(value.users) - len(readers) == 1
