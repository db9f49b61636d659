"""What Torch-Pruning leaves of a network at a wanted number of multiply-adds."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

import surgery

TOLERANCE = 0.02  # of the multiply-adds
# More, smaller steps rank the channels anew more often. The others are tried only where no ratio fits in 5; without
# global ranking they come to the same numbers of channels.
ITERATIVE_STEPS = (5, 10, 20, 1)
BISECTIONS = 14


def matched(source: nn.Module, macs: int, side: int, *, global_pruning: bool) -> tuple[nn.Module, dict[str, Any]]:
    """Return the network that comes closest to so many multiply-adds, and the options that it was pruned by.

    Coupled layers lose a channel together, so that networks this narrow come in steps of a few percent.
    """
    found: list[tuple[float, int, nn.Module, dict[str, Any]]] = []
    for steps in ITERATIVE_STEPS if global_pruning else ITERATIVE_STEPS[:1]:
        low, high = 0.0, 1.0
        for _ in range(BISECTIONS):
            options = {"pruning_ratio": (low + high) / 2, "global_pruning": global_pruning, "iterative_steps": steps}
            network = pruned(source, side, options)
            left = surgery.cost(network, side).macs
            found.append((abs(left / macs - 1), len(found), network, options))
            low, high = ((low + high) / 2, high) if left > macs else (low, (low + high) / 2)
        error, _, network, options = min(found, key=lambda entry: entry[:2])
        if error <= TOLERANCE:
            break
    return network, options


def pruned(source: nn.Module, side: int, options: dict[str, Any]) -> nn.Module:
    """Prune a twin of the network by the magnitude of its groups; the classifier keeps its classes."""
    import torch_pruning

    twin: Any = copy.deepcopy(source)
    pruner = torch_pruning.pruner.BasePruner(
        twin,
        torch.zeros(1, 3, side, side),
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        ignored_layers=[twin.get_classifier()],
        **options,
    )
    for _ in range(options["iterative_steps"]):
        pruner.step()
    return twin
