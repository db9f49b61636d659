"""The activation losses.

With z_{b,g} in {0, 1} the gates of image b, M the multiply-adds of an image, and t a target in [0, 1],

    per gate             L = (1/G) sum_g (t_g - mean_b z_{b,g})^2
    per batch, layers    L = (t - mean_{b,g} z_{b,g})^2
    per batch, channels  L = (t - m)^2,  m = (mean_b M - M_closed) / (M_open - M_closed)
    total                cross entropy + weight * L

where M_open counts all gates open, and M_closed all that are learned closed: stem, classifier and what is always open.
The one-sided form has max(0, mean - t) for the difference, so that nothing is paid below the target. In a distributed
run the means are those over the batches of all processes.

Reference: Herrmann, Bowen & Zabih, Channel selection using Gumbel Softmax (2020); the loss per gate is that of Veit &
Belongie, Convolutional networks with adaptive inference graphs (2018).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from surgery import ConvertedNetwork
from surgery.errors import InvalidOption
from surgery_gated.macs import network_macs


def batch_activation(mean: Tensor, target: float, *, one_sided: bool = False) -> Tensor:
    """Return the loss per batch.

    Args:
        mean: Mean activation over batch and gates, or the share of the gated multiply-adds; a scalar in [0, 1].
        target: t in [0, 1].
        one_sided: Whether only an activation above the target is penalised.
    """
    return _gap(mean, target, one_sided).square()


def per_gate(rates: Tensor, targets: Tensor, *, one_sided: bool = False) -> Tensor:
    """Return the loss per gate.

    Args:
        rates: Mean activation of every gate over the batch, (G,).
        targets: t_g in [0, 1], (G,).
        one_sided: Whether only activations above their targets are penalised.

    Raises:
        InvalidOption: If the shapes differ.
    """
    if rates.shape != targets.shape:
        raise InvalidOption(
            f"per-gate loss: found rates {tuple(rates.shape)} and targets {tuple(targets.shape)}, expected one shape "
            "(G,); pass one target for each gate"
        )
    return _gap(rates, targets, one_sided).square().mean()


def open_share(model: ConvertedNetwork, decisions: Mapping[str, Tensor]) -> Tensor:
    """Return the share of the gated multiply-adds that each image spends, (B,).

    Args:
        model: A network with gates.
        decisions: The decisions (B, G) of every gated block, by path.
    """
    one = {path: values.new_zeros(1, values.shape[1]) for path, values in decisions.items()}
    closed = network_macs(model, one)
    opened = network_macs(model, {path: values + 1 for path, values in one.items()})
    return (network_macs(model, decisions) - closed) / (opened - closed)


def global_mean(values: Tensor) -> Tensor:
    """Return the mean over the first dimension, and over all processes of a distributed run.

    The gradient is that of this process's share, scaled such that the average over the processes, which
    DistributedDataParallel takes, is the gradient of the global mean.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return values.mean(dim=0)
    total = values.sum(dim=0)  # zero where a process has no image
    sums = torch.cat([total.detach().reshape(-1), total.new_full((1,), len(values))])
    dist.all_reduce(sums)
    mean = (sums[:-1] / sums[-1]).reshape(total.shape)
    share = total * (dist.get_world_size() / sums[-1])
    return mean + (share - share.detach())


def target_at(target: float, anneal: float, progress: float | None) -> float:
    """Return the target after `progress` epochs: it falls from 1 to `target` in a line over the first `anneal` epochs.

    Reference: supplement 4.4: training from scratch profits from annealing the target from high to low.
    """
    if progress is None or progress >= anneal:
        return target
    return 1 + (target - 1) * progress / anneal


def gate_targets(decisions: Mapping[str, Tensor], targets: Mapping[str, float]) -> Tensor:
    """Return the target of every gate, (G,), from those of the blocks."""
    each: Sequence[Tensor] = [values.new_full((values.shape[1],), targets[path]) for path, values in decisions.items()]
    return torch.cat(list(each))


def _gap(mean: Tensor, target: float | Tensor, one_sided: bool) -> Tensor:
    gap = mean - target
    return gap.clamp(min=0) if one_sided else gap
