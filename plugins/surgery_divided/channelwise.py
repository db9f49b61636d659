"""Which layers treat every channel by itself, so that one call computes them for the channels of several networks."""

from __future__ import annotations

import operator
from typing import Any

import torch
from timm.layers import SelectAdaptivePool2d
from torch import fx, nn
from torch.nn import functional as F

from surgery_divided.folding import SHAPE

_ELEMENTWISE_MODULES = frozenset(
    {nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Sigmoid, nn.Tanh, nn.GELU, nn.ELU}
    | {nn.LeakyReLU, nn.Mish, nn.Softplus}
)
_POOL_MODULES = frozenset({nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d})
_ELEMENTWISE_FUNCTIONS = frozenset(
    {torch.relu, torch.sigmoid, torch.tanh, F.relu, F.relu6, F.silu, F.hardswish, F.hardsigmoid, F.gelu, F.elu}
    | {F.leaky_relu, F.mish, F.sigmoid, F.tanh, operator.neg, torch.clamp}
)
_ARITHMETIC = frozenset(
    {operator.add, operator.sub, operator.mul, operator.truediv, operator.iadd, operator.isub, operator.imul}
    | {operator.itruediv, torch.add, torch.sub, torch.mul, torch.div}
)
_POOL_FUNCTIONS = frozenset({F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d})
_ELEMENTWISE_METHODS = frozenset({"relu", "relu_", "sigmoid", "sigmoid_", "tanh", "clamp", "contiguous"})
_ARITHMETIC_METHODS = frozenset({"add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_"})
_REDUCTIONS = frozenset({torch.mean, torch.sum, torch.amax, "mean", "sum", "amax"})
_FLATTENS = frozenset({torch.flatten, "flatten"})
_POOL_TYPES = ("avg", "max", "avgmax")  # "catavgmax" puts the channels of two pools one behind the other


def is_channelwise(node: fx.Node, module: nn.Module | None) -> bool:
    """Return whether channels, along the first dimension behind the batch, do not meet in what a node computes.

    Only what is known is; the answer for anything else is no.

    Args:
        node: A node of a folded network.
        module: What it calls, if it calls a module without hooks.
    """
    shapes = [source.meta[SHAPE] for source in node.all_input_nodes if source.meta[SHAPE] is not None]
    if node.meta[SHAPE] is None or not shapes or any(len(shape) < 2 for shape in (*shapes, node.meta[SHAPE])):
        return False
    if node.op == "call_module":
        return module is not None and _is_module(module, shapes[0])
    if node.op not in ("call_function", "call_method"):
        return False
    return _is_function(node, shapes)


def _is_module(module: nn.Module, shape: tuple[int, ...]) -> bool:
    if type(module) in _ELEMENTWISE_MODULES:
        return True
    if isinstance(module, nn.Flatten):
        return module.start_dim == 1
    if len(shape) != 4:
        return False
    if isinstance(module, SelectAdaptivePool2d):
        return module.pool_type in _POOL_TYPES
    return type(module) in _POOL_MODULES


def _is_function(node: fx.Node, shapes: list[tuple[int, ...]]) -> bool:
    target = node.target
    if target in _ARITHMETIC or target in _ARITHMETIC_METHODS:
        wanted = node.meta[SHAPE]
        return all(len(shape) == len(wanted) and shape[1] == wanted[1] for shape in shapes)
    if len(shapes) != 1:
        return False
    if target in _ELEMENTWISE_FUNCTIONS or target in _ELEMENTWISE_METHODS:
        return True
    if target in _POOL_FUNCTIONS:
        return len(shapes[0]) == 4
    if target in _FLATTENS:
        return bool(_argument(node, 1, "start_dim", 0) == 1)
    return target in _REDUCTIONS and _is_behind_channels(_argument(node, 1, "dim", None), len(shapes[0]))


def _is_behind_channels(dims: Any, count: int) -> bool:
    """Return whether a reduction is over dimensions behind that of the channels."""
    listed = [dims] if isinstance(dims, int) else dims
    if not isinstance(listed, tuple | list) or not listed:
        return False
    return all(isinstance(dim, int) and dim % count >= 2 for dim in listed)


def _argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    """Return what a call is given at a position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)
