"""The five methods in tests of all of them: how their networks are pruned, and what is left has to compute."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import surgery_coded
import surgery_divided
import surgery_gated
import surgery_inclusive
import surgery_masked
from surgery import ConvertedNetwork
from surgery.testing import Report, ResidualSpec, check_method
from surgery.testing.case import Muted, Settle, evaluate
from surgery.testing.networks import Build
from surgery_masked.masks import Masks

NAMES = ("coded", "gated", "inclusive", "divided", "masked")


@dataclass(frozen=True, eq=False)
class Pruning:
    """How the networks of a method are pruned.

    Attributes:
        criteria: What pruning is asked for.
        muted: Computes what the pruned network should.
        settle: Gives a converted network what training would have given it, where pruning depends on that.
    """

    criteria: Mapping[str, Any]
    muted: Muted
    settle: Settle | None = None


def pruning(method: str, size: int = 32) -> Pruning:
    """Return how networks of one of the five methods, for images of `size` pixels, are pruned."""
    return {
        "coded": Pruning({"classes": [3, 7]}, own_branches),
        "gated": Pruning({"images": images(size)}, multiplied, settle_gates),
        "inclusive": Pruning({"subnetwork": 1}, one_subnetwork),
        "divided": Pruning({"members": [1]}, kept_members),
        "masked": Pruning({}, frozen, settle_masks),
    }[method]


def keeps_laws(
    method: str, networks: Mapping[str, Build], *, laws: Sequence[str] | None = None, size: int = 32
) -> Report:
    """Check a method with its defaults on networks for images of `size` pixels."""
    asked = pruning(method, size)
    return check_method(
        method,
        networks,
        criteria=asked.criteria,
        muted=asked.muted,
        settle=asked.settle,
        laws=laws,
        input_size=size,
    )


def images(size: int) -> Tensor:
    """Return the images that the laws compare outputs on: what a gate does on all of these, it does there."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 3, size, size, generator=generator, dtype=torch.float64).float()


# --- what the pruned networks compute, by the full ones ---


def own_branches(model: ConvertedNetwork, criteria: Mapping[str, Any]) -> Callable[[Tensor], Tensor]:
    """Compute the outputs of the classes with their branches alone."""
    full = surgery_coded.mask_branches(model, criteria["classes"])
    return lambda images: full(images)[:, criteria["classes"]]


def multiplied(model: ConvertedNetwork, criteria: Mapping[str, Any]) -> Callable[[Tensor], Tensor]:
    """Multiply what is closed by zero instead of leaving it out."""
    full = copy.deepcopy(model)
    for _, gates in surgery_gated.gated_blocks(full):
        gates.skipping = False
    return full


def one_subnetwork(model: ConvertedNetwork, criteria: Mapping[str, Any]) -> Callable[[Tensor], Tensor]:
    """Compute what one sub-network does by the network that has all of them."""

    def run(images: Tensor) -> Tensor:
        with surgery_inclusive.use(model, criteria["subnetwork"]):
            output: Tensor = model(images)
            return output

    return run


def kept_members(model: ConvertedNetwork, criteria: Mapping[str, Any]) -> Callable[[Tensor], Tensor]:
    """Return the mean of what the kept networks say."""
    kept = [surgery_divided.members(model)[index] for index in criteria["members"]]
    return lambda images: torch.stack([member(images) for member in kept]).mean(dim=0)


def frozen(model: ConvertedNetwork, criteria: Mapping[str, Any]) -> Callable[[Tensor], Tensor]:
    """Return the full network with its connections fixed."""
    still = copy.deepcopy(model)
    surgery_masked.freeze(still)
    return still


# --- what training leaves ---


def settle_gates(model: ConvertedNetwork) -> None:
    """Let the gates, in turn, be open, be closed and decide by the image, which opens about half of them."""
    handles = [
        gates.register_forward_pre_hook(_SETTLERS[place % len(_SETTLERS)])
        for place, (_, gates) in enumerate(surgery_gated.gated_blocks(model))
    ]
    channels, height, _ = model.meta["architecture"].input_size
    assert channels == 3
    evaluate(model, images(height).to(next(model.parameters()).dtype))
    for handle in handles:
        handle.remove()


def _open(gates: surgery_gated.Gates, args: tuple[Tensor, ...]) -> None:
    gates.head.bias.data.copy_(torch.tensor([[-1.0, 1.0]]))


def _close(gates: surgery_gated.Gates, args: tuple[Tensor, ...]) -> None:
    gates.head.bias.data.copy_(torch.tensor([[1.0, -1.0]]))


def _depend(gates: surgery_gated.Gates, args: tuple[Tensor, ...]) -> None:
    """Put the threshold between the two images in the middle, so that no rounding decides."""
    gates.head.weight.data[:, 1] = torch.linspace(-1.0, 1.0, gates.head.weight.shape[-1])
    gates.head.bias.data.zero_()
    margins = gates.margins(*args)[:, 0].sort().values
    gates.head.bias.data[:, 1] = -margins[len(margins) // 2 - 1 : len(margins) // 2 + 1].mean()


_SETTLERS = (_open, _close, _depend)


def settle_masks(model: ConvertedNetwork) -> None:
    """Let every branch read others, but none the last one."""
    generator = torch.Generator().manual_seed(0)
    for masks in model.modules():
        if isinstance(masks, Masks):
            real = torch.rand(masks.real.shape, generator=generator)
            real[..., -1] = 0
            masks.real.copy_(real / real.sum(dim=-1, keepdim=True))


# --- which random networks they take ---


def takes(method: str, spec: ResidualSpec) -> bool:
    """Return whether a method with its defaults has something to do in a random network."""
    branches = [spec.cardinality(stage) for stage in range(len(spec.blocks))]
    return {
        # Ten codewords need five branches. Blocks at one resolution are one stage and share their branches.
        "coded": max(branches if spec.stride > 1 else branches[:1]) > 4,
        "gated": True,
        # Four sub-networks.
        "inclusive": branches[0] % 4 == 0,
        # Two channels are rounded to two again.
        "divided": spec.groups * spec.width > 2,
        # Two blocks, one right behind the other, of which the second joins its branches and can repeat its shortcut.
        "masked": spec.attention == "none"
        and branches[0] > 1
        and (max(spec.blocks) > 1 or (len(spec.blocks) > 1 and spec.projection != "pad")),
    }[method]
