"""Parameters and multiply-adds of a network, whole and per block, by fvcore.

What is counted is what torchvision counts in `weights.meta["_ops"]`: convolutions (transposed ones too) and linear
layers (`aten::_convolution`, `aten::linear`, `aten::addmm`), for a single image, in eval mode. One multiply-add is one
MAC, and two flops; biases are free. What is not counted: normalization, activations, pooling, sums, products of
activations with each other (attention, Gram matrices) and every elementwise operation.

A module that leaves work out depending on the image is counted as it runs on a black one; what it saves on average is a
property of the data, and has to be worked out from measured rates.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from fvcore.nn import FlopCountAnalysis
from fvcore.nn.jit_handles import addmm_flop_jit, conv_flop_jit, linear_flop_jit
from torch import Tensor, fx, nn

from surgery.analysis import inspect
from surgery.errors import InvalidOption, UnsupportedModel
from surgery.network import ConvertedNetwork
from surgery.shapes import resolve_input_size
from surgery.tracing import refuse_wrapped

Count = Literal["macs", "flops"]
_COUNTED = {"aten::_convolution": conv_flop_jit, "aten::linear": linear_flop_jit, "aten::addmm": addmm_flop_jit}


@dataclass(frozen=True)
class BlockCost:
    """What one block costs.

    Attributes:
        path: Module path.
        macs: Multiply-adds of one image.
        params: Number of parameters.
    """

    path: str
    macs: int
    params: int

    @property
    def flops(self) -> int:
        """Two for every multiply-add."""
        return 2 * self.macs


@dataclass(frozen=True)
class Cost:
    """What a network costs; `print` it for a table.

    Attributes:
        name: Class name of the network.
        input_size: (channels, height, width) of the image.
        count: Unit of the printed table.
        macs: Multiply-adds of one image, whole network.
        params: Number of parameters, whole network.
        blocks: The same for each block, in order; what they leave over is the stem and the head.
    """

    name: str
    input_size: tuple[int, int, int]
    count: Count
    macs: int
    params: int
    blocks: tuple[BlockCost, ...]

    @property
    def flops(self) -> int:
        """Two for every multiply-add."""
        return 2 * self.macs

    def __str__(self) -> str:
        """Return a table: one line per block, the rest, the total; the units are in its head."""
        scale, unit = (2, "MFLOPs") if self.count == "flops" else (1, "MMACs")
        rest = BlockCost(
            "rest",
            self.macs - sum(block.macs for block in self.blocks),
            self.params - sum(block.params for block in self.blocks),
        )
        lines = [*self.blocks, *([rest] if self.blocks else []), BlockCost("total", self.macs, self.params)]
        decimals = 1 if self.macs >= 1e8 else 3
        rows = [("block", "parameters", "%", unit, "%")]
        for line in lines:
            shares = (f"{100 * line.params / max(self.params, 1):.1f}", f"{100 * line.macs / max(self.macs, 1):.1f}")
            rows.append(
                (line.path, f"{line.params:,}", shares[0], f"{scale * line.macs / 1e6:,.{decimals}f}", shares[1])
            )
        channels, height, width = self.input_size
        head = f"{self.name}: convolutions and linear layers, one image of {channels} x {height} x {width}"
        return "\n".join([head, *_aligned(rows)])


def cost(model: nn.Module, input_size: int | tuple[int, int] | None = None, count: Count = "macs") -> Cost:
    """Count the parameters and the multiply-adds of a network; the model is left untouched.

    Args:
        model: A plain or converted network, on any device; a copy of it runs once, in float32 on the CPU.
        input_size: Side of the image in pixels, or (height, width). Default: as in `inspect`.
        count: Unit of the printed table; the result knows both, `macs` and `flops`.

    Returns:
        The cost. Blocks are those that `inspect` finds.

    Raises:
        InvalidOption: If `count` or `input_size` cannot be used.
        TraceError, UnsupportedModel: If the network cannot be traced, is wrapped, or cannot run at this size.
    """
    if count not in ("macs", "flops"):
        raise InvalidOption(f"count: expected 'macs' or 'flops', found {count!r}")
    refuse_wrapped(model)
    # A converted network is inspected at the size it was converted for; its blocks can be counted at any.
    architecture = inspect(model, None if isinstance(model, ConvertedNetwork) else input_size)
    size = architecture.input_size
    if input_size is not None:
        size = (size[0], *resolve_input_size(model, fx.Graph(), input_size)[1:])
    counted = _macs_by_module(model, size)
    blocks = [(block.path, model.get_submodule(block.path)) for block in architecture.blocks if block.path in counted]
    return Cost(
        name=architecture.name,
        input_size=size,
        count=count,
        macs=counted[""],
        params=_params(model),
        blocks=tuple(BlockCost(path, counted[path], _params(block)) for path, block in blocks),
    )


def _macs_by_module(model: nn.Module, size: tuple[int, int, int]) -> dict[str, int]:
    # Not on the meta device: under fvcore's tracer sizes are tensors, which its shape rule of convolutions refuses.
    analysis = FlopCountAnalysis(_cpu_twin(model), torch.zeros(1, *size)).clear_op_handles().set_op_handle(**_COUNTED)
    # Everything that is left out on purpose would be reported as unsupported, and every unused head as never called.
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    try:
        with torch.no_grad():
            return {path: int(macs) for path, macs in analysis.by_module().items()}
    except (RuntimeError, ValueError, AssertionError) as error:
        raise UnsupportedModel(
            f"{type(model).__name__}: cannot run on an image of {size[0]} x {size[1]} x {size[2]}: {error}; pass "
            "input_size= with a size that the network accepts"
        ) from error


def _cpu_twin(model: nn.Module) -> nn.Module:
    # The memo hands deepcopy the tensors that it should use: the model's own device never holds a second copy.
    memo: dict[int, object] = {id(tensor): _on_cpu(tensor) for tensor in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, memo).cpu().eval()


def _on_cpu(tensor: Tensor) -> Tensor:
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    values = torch.zeros_like(tensor, device="cpu") if tensor.is_meta else tensor.detach()
    twin = values.to("cpu", dtype, copy=True)
    return nn.Parameter(twin, requires_grad=False) if isinstance(tensor, nn.Parameter) else twin


def _params(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        numbers = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *numbers]))
    return lines
