"""Shapes and multiply-adds of a traced network, from one run on the meta device: no data, no memory, no example."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, fx, nn

from surgery.errors import InvalidOption, UnsupportedModel
from surgery.tracing import CONSTANT, is_training_flag

SIZE = "size"
"""Key in `node.meta`: shape of the tensor that the node returns for a batch of two."""
MACS = "macs"
"""Key in `node.meta`: multiply-adds of one image in the convolution or linear layer that the node calls."""

Size = tuple[int, int]
_BATCH = 2


def resolve_input_size(model: nn.Module, graph: fx.Graph, input_size: int | Size | None) -> tuple[int, int, int]:
    """Return (channels, height, width) of an input image.

    Args:
        model: The network; timm's `pretrained_cfg["input_size"]` is used where `input_size` is None, else 224 x 224.
        graph: Its flat graph; the channels are those of the first convolution.
        input_size: Side in pixels, or (height, width).

    Raises:
        InvalidOption: If `input_size` is not one or two positive integers.
    """
    config = getattr(model, "pretrained_cfg", None) or {}
    declared = config.get("input_size", (3, 224, 224)) if isinstance(config, dict) else (3, 224, 224)
    sides = declared[-2:] if input_size is None else input_size
    sides = (sides, sides) if isinstance(sides, int) else sides
    if (
        not isinstance(sides, (tuple, list))
        or len(sides) != 2
        or not all(type(side) is int and side > 0 for side in sides)
    ):
        raise InvalidOption(f"input_size: expected a side in pixels or (height, width), found {input_size!r}")
    return _image_channels(model, graph) or declared[0], sides[0], sides[1]


def _image_channels(model: nn.Module, graph: fx.Graph) -> int | None:
    """Return the input channels of the first convolution, where it reads the image itself, at most normalised."""
    for node in graph.nodes:
        module = model.get_submodule(node.target) if node.op == "call_module" and not is_training_flag(node) else None
        if isinstance(module, nn.Conv2d):
            return module.in_channels
        if module is not None and not isinstance(module, (nn.Identity, nn.modules.batchnorm._NormBase)):
            return None
    return None


def propagate(model: nn.Module, graph: fx.Graph, input_size: tuple[int, int, int]) -> None:
    """Store the shape and the multiply-adds of every node of a flat `graph` in its `meta`.

    Raises:
        UnsupportedModel: If the network cannot run on an image of this size.
    """
    meta = torch.device("meta")
    dtype, device = next(((weight.dtype, weight.device) for weight in model.parameters()), (None, meta))
    try:
        _ShapeInterpreter(model, graph, meta).measure(input_size, dtype)
        return
    except (RuntimeError, ValueError, AssertionError) as error:
        failure = error
    try:  # a leaf may read numbers, which meta tensors do not have
        _ShapeInterpreter(copy.deepcopy(model).eval(), graph, device).measure(input_size, dtype)
    except (RuntimeError, ValueError, AssertionError) as error:
        size = " x ".join(map(str, input_size))
        raise UnsupportedModel(
            f"{type(model).__name__}: cannot run on an image of {size}: {error}; "
            "pass input_size= with a size that the network accepts"
        ) from failure


class _ShapeInterpreter(fx.Interpreter):
    """Run a graph on a device and remember shapes and multiply-adds; on meta, the modules are left alone."""

    def __init__(self, model: nn.Module, graph: fx.Graph, device: torch.device) -> None:
        super().__init__(model, graph=graph)
        self._device = device

    def measure(self, input_size: tuple[int, int, int], dtype: torch.dtype | None) -> None:
        with torch.no_grad():
            self.run(torch.zeros(_BATCH, *input_size, device=self._device, dtype=dtype))

    def run_node(self, n: fx.Node) -> Any:
        if is_training_flag(n):
            return False
        value: Any = n.meta[CONSTANT] if CONSTANT in n.meta else super().run_node(n)
        if n.op == "get_attr" and isinstance(value, Tensor):
            value = value.to(self._device)
        if isinstance(value, Tensor):
            n.meta[SIZE] = value.shape
            if n.op == "call_module":
                n.meta[MACS] = _macs(self.fetch_attr(str(n.target)), value.shape)
        return value

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.fetch_attr(str(target))
        if self._device.type != "meta":
            return module(*args, **kwargs)
        if isinstance(module, nn.modules.batchnorm._NormBase):
            return args[0]  # keeps the shape, and its meta kernel is by far the slowest
        return _hollow(module)(*args, **kwargs)


def _hollow(module: nn.Module) -> nn.Module:
    """Return a shallow copy of `module` in eval mode, weights without data; a deep copy takes longer than the run."""
    twin = copy.copy(module)
    state = twin.__dict__
    state["training"] = False
    state["_forward_hooks"], state["_forward_pre_hooks"] = {}, {}  # the user's, who did not run the network
    for name in ("_parameters", "_buffers"):
        state[name] = {key: None if value is None else value.to("meta") for key, value in state[name].items()}
    state["_modules"] = {key: child if child is None else _hollow(child) for key, child in state["_modules"].items()}
    return twin


def _macs(module: nn.Module, out: torch.Size) -> int:
    if isinstance(module, nn.Conv2d):
        kernel = math.prod(module.kernel_size) * module.in_channels // module.groups
        return out.numel() * kernel // _BATCH
    if isinstance(module, nn.Linear):
        return out.numel() * module.in_features // _BATCH
    return 0
