"""Rates at which a network drops values, channels or whole bodies of blocks in training."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torchvision.ops import StochasticDepth

from surgery.editing import Editor
from surgery.network import SurgeryModule

_NAME = "drop_prob"
"""What layers that drop paths or blocks call their rate, those of timm and the many that are written after them."""
_FUNCTIONS: dict[Callable[..., Tensor], tuple[str, ...]] = {
    **dict.fromkeys((F.dropout, F.dropout1d, F.dropout2d, F.dropout3d), ("p", "training", "inplace")),
    **dict.fromkeys((F.alpha_dropout, F.feature_alpha_dropout), ("p", "training", "inplace")),
    **dict.fromkeys((torch.dropout, torch.feature_dropout, torch.alpha_dropout), ("p", "train")),
}
"""Functions that drop, and their arguments behind the first."""


def scale_drop_rates(editor: Editor, factor: float) -> None:
    """Multiply every rate, see `Rewriter.scale_drop_rates`."""
    network = editor.network
    for module in network.modules():
        name = "p" if isinstance(module, (nn.modules.dropout._DropoutNd, StochasticDepth)) else _NAME
        if rate := vars(module).get(name):
            setattr(module, name, rate * factor)
    for at in (None, *editor.architecture.blocks):
        for node in _dropping(editor.owner(at)):
            names = _FUNCTIONS[node.target]  # type: ignore[index]
            named = {"p": 0.5, **dict(zip(names, node.args[1:], strict=False)), **node.kwargs}
            node.args, node.kwargs = node.args[:1], {**named, "p": named["p"] * factor}  # type: ignore[operator]
            editor.stamp(node, at, "drop_rate")


def _dropping(owner: SurgeryModule) -> list[fx.Node]:
    return [node for node in owner.graph.nodes if node.op == "call_function" and node.target in _FUNCTIONS]
