"""Shapes and multiply-adds of a traced network, from one run on the meta device: no data, no memory, no example."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from surgery.errors import InvalidOption, RewriteError, UnsupportedModel
from surgery.tracing import CONSTANT, SITE, is_training_flag

SIZE = "size"
"""Key in `node.meta`: shape of the tensor that the node returns for a batch of two."""
MACS = "macs"
"""Key in `node.meta`: multiply-adds of one image in the convolutions and linear layers of what the node calls."""

Size = tuple[int, int]
_BATCH = 2
_META = torch.device("meta")
# Multiply-adds are the values of a result times what each is summed over, or those of an operand times what each feeds.
_BY_RESULT: tuple[Callable[..., Tensor], ...] = (torch.conv1d, torch.conv2d, torch.conv3d, F.linear)
_PRODUCTS: tuple[Callable[..., Tensor], ...] = (torch.addmm, Tensor.addmm)
_BY_OPERAND = (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d, *_PRODUCTS)


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
    dtype, device = next(((weight.dtype, weight.device) for weight in model.parameters()), (None, _META))
    try:
        _measure(_ShapeRun(model, graph, _META), torch.empty(_BATCH, *input_size, dtype=dtype, device=_META))
        return
    except (RuntimeError, ValueError, AssertionError) as error:
        failure = error
    try:  # a leaf may read numbers, which meta tensors do not have
        run = _ShapeRun(copy.deepcopy(model).eval(), graph, device)
        _measure(run, torch.zeros(_BATCH, *input_size, dtype=dtype, device=device))
    except (RuntimeError, ValueError, AssertionError) as error:
        size = " x ".join(map(str, input_size))
        raise UnsupportedModel(
            f"{type(model).__name__}: cannot run on an image of {size}: {error}; "
            "pass input_size= with a size that the network accepts"
        ) from failure


def refresh(network: fx.GraphModule, input_size: tuple[int, int, int], edited: Collection[str]) -> set[str]:
    """Bring shapes and multiply-adds up to date throughout a network whose root graph calls nested graphs.

    A nested graph runs if it was edited or reads other shapes than before; of the others the output is known. A node
    that calls a nested graph carries the multiply-adds of all of it.

    Args:
        network: The network.
        input_size: (channels, height, width) of an image.
        edited: Paths of the nested graphs that were edited; the root runs in any case.

    Returns:
        Paths of the nested graphs that ran.

    Raises:
        RewriteError: If an inserted module, or what reads its result, cannot run on meta tensors in eval mode.
    """
    dtype = _dtype(network)
    run = _NestedRun(network, "", edited, dtype)
    _measure(run, torch.empty(_BATCH, *input_size, dtype=dtype, device=_META))
    return run.ran


def refresh_nested(network: fx.GraphModule, path: str) -> bool:
    """Bring one nested graph up to date for the shapes that its inputs had last; return whether all of them are known.

    Raises:
        RewriteError: If an inserted module, or what reads its result, cannot run on meta tensors in eval mode.
    """
    nested = network.get_submodule(path)
    assert isinstance(nested, fx.GraphModule)
    sizes = [place.meta.get(SIZE) for place in nested.graph.find_nodes(op="placeholder")]
    if None in sizes:
        return False
    dtype = _dtype(network)
    run = _NestedRun(nested, path, (), dtype)
    _measure(run, *(torch.empty(size, dtype=dtype, device=_META) for size in sizes))
    return True


def forget(graph: fx.Graph) -> None:
    """Drop the shapes of everything in a graph but of its inputs."""
    for node in graph.nodes:
        if node.op != "placeholder":
            node.meta.pop(SIZE, None)


def total_macs(graph: fx.Graph) -> int:
    """Return the multiply-adds of one image in everything that `graph` calls."""
    return sum(int(node.meta.get(MACS, 0)) for node in graph.nodes)


def hollow(module: nn.Module) -> nn.Module:
    """Return a shallow copy of `module` in eval mode, weights without data; a deep copy takes longer than the run."""
    twin = copy.copy(module)
    state = twin.__dict__
    state["training"] = False
    state["_forward_hooks"], state["_forward_pre_hooks"] = {}, {}  # the user's, who did not run the network
    for name in ("_parameters", "_buffers"):
        state[name] = {key: None if value is None else value.to("meta") for key, value in state[name].items()}
    state["_modules"] = {key: child if child is None else hollow(child) for key, child in state["_modules"].items()}
    return twin


def _dtype(model: nn.Module) -> torch.dtype | None:
    return next((weight.dtype for weight in model.parameters()), None)


def _measure(run: _ShapeRun, *inputs: Tensor) -> None:
    with torch.no_grad(), run.count:
        run.run(*inputs)


class _Count(TorchFunctionMode):
    """Add up the multiply-adds of one image in the convolutions and linear layers that run."""

    def __init__(self) -> None:
        super().__init__()
        self.macs = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        value = func(*args, **named)
        if func in _BY_RESULT:
            weight = args[1] if len(args) > 1 else named["weight"]
            self.macs += value.numel() * math.prod(weight.shape[1:]) // _BATCH
        elif func in _BY_OPERAND:
            names = ("input", "mat1", "mat2") if func in _PRODUCTS else ("input", "weight")
            operand, weight = [*args, *(named[name] for name in names[len(args) :])][len(names) - 2 : len(names)]
            self.macs += operand.numel() * math.prod(weight.shape[1:]) // _BATCH
        return value


class _ShapeRun(fx.Interpreter):
    """Run a graph on a device and remember shapes and multiply-adds; on meta, the modules are left alone."""

    def __init__(self, model: nn.Module, graph: fx.Graph, device: torch.device) -> None:
        super().__init__(model, graph=graph)
        self.extra_traceback = False
        self.count = _Count()
        self._device = device

    def run_node(self, n: fx.Node) -> Any:
        if is_training_flag(n):
            return False
        before = self.count.macs
        value: Any = n.meta[CONSTANT] if CONSTANT in n.meta else super().run_node(n)
        if n.op == "get_attr" and isinstance(value, Tensor):
            value = value.to(self._device)
        if isinstance(value, Tensor):
            n.meta[SIZE] = value.shape
        else:
            n.meta.pop(SIZE, None)
        if n.op == "call_module" or self.count.macs > before:
            n.meta[MACS] = self.count.macs - before
        return value

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.fetch_attr(str(target))
        if self._device != _META:
            return module(*args, **kwargs)
        if isinstance(module, nn.modules.batchnorm._NormBase):
            return args[0]  # keeps the shape, and its meta kernel is by far the slowest
        return hollow(module)(*args, **kwargs)


class _NestedRun(_ShapeRun):
    """Run the graph at a path of a network on meta; a nested graph that was not edited only if its inputs changed."""

    def __init__(self, owner: fx.GraphModule, path: str, edited: Collection[str], dtype: torch.dtype | None) -> None:
        super().__init__(owner, owner.graph, _META)
        self.ran: set[str] = set()
        self._path = path
        self._edited = edited
        self._dtype = dtype
        self._changed: set[fx.Node] = set()

    def run_node(self, n: fx.Node) -> Any:
        before = n.meta.get(SIZE)
        try:
            value = super().run_node(n)
        except RewriteError:
            raise
        except Exception as error:  # a third party's module can raise anything; the caller learns which one
            value = self._known(n, error)
        if n.meta.get(SIZE) != before:
            self._changed.add(n)
        return value

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.fetch_attr(str(target))
        if not isinstance(module, fx.GraphModule):
            return super().call_module(target, args, kwargs)
        path = f"{self._path}.{target}" if self._path else str(target)
        size = module.graph.output_node().all_input_nodes[0].meta.get(SIZE)
        if path not in self._edited and size is not None and _reads(module, args):
            self.count.macs += total_macs(module.graph)
            return torch.empty(size, dtype=self._dtype, device=_META)
        inner = _NestedRun(module, path, self._edited, self._dtype)
        inner.count = self.count
        value = inner.run(*args)
        self.ran |= {path, *inner.ran}
        return value

    def _known(self, node: fx.Node, error: Exception) -> Tensor | None:
        """Return a value of the shape that a layer of the source, which may read numbers, had before the edits."""
        if SITE in node.meta or self._changed.intersection(node.all_input_nodes):
            called = node.op == "call_module"
            place = ".".join(part for part in (self._path, str(node.target) if called else node.name) if part)
            raise RewriteError(
                f"{place}: cannot run on meta tensors in eval mode ({type(error).__name__}: {error}); inserted modules "
                "must work without numbers, and what reads them must fit their shapes"
            ) from error
        return torch.empty(node.meta[SIZE], dtype=self._dtype, device=_META) if SIZE in node.meta else None


def _reads(module: fx.GraphModule, args: Sequence[Any]) -> bool:
    """Return whether the inputs of a nested graph last had the shapes of these values."""
    sizes = [place.meta.get(SIZE) for place in module.graph.find_nodes(op="placeholder")]
    return None not in sizes and sizes == [value.shape if isinstance(value, Tensor) else None for value in args]
