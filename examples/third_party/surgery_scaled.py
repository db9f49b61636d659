"""Scaled networks: one learned factor on every residual body."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from surgery import Architecture, ConvertedNetwork, Cut, Method, PrunePlan, Rewriter, Step, hookimpl
from surgery.errors import InvalidOption


class Scale(nn.Module):
    """One learned factor on a residual body."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(1))  # FSDP takes no scalars

    def forward(self, body: torch.Tensor) -> torch.Tensor:
        return body * self.factor


@dataclass(frozen=True)
class Scaled(Method):
    """Learn how much every residual body matters, and remove those that matter least.

    Attributes:
        weight: Weight of the factors' absolute values in the loss.
    """

    name: ClassVar[str] = "scaled"
    preserves: ClassVar = "output"
    weight: float = 1e-3

    def transform(self, architecture: Architecture, rewriter: Rewriter) -> None:
        for block in architecture.residual_blocks():
            rewriter.insert(Scale(), block.body, at=block, role="scale")

    def losses(self, step: Step) -> dict[str, torch.Tensor]:
        factors = [scale.factor.abs() for scale in step.model.modules() if isinstance(scale, Scale)]
        return {"scale": self.weight * torch.stack(factors).sum()}

    def plan(self, model: ConvertedNetwork, below: float = 0.1, **criteria: Any) -> PrunePlan:
        if criteria:
            raise InvalidOption(f"scaled: unknown criteria {sorted(criteria)}; pass below=")
        scales = {path: scale for path, scale in model.named_modules() if isinstance(scale, Scale)}
        closed = [path.rpartition(".")[0] for path, scale in scales.items() if scale.factor.abs() < below]
        cuts = [Cut("body", block, (), 1, f"factor below {below}") for block in closed]
        return PrunePlan.of(model, self.name, cuts, {"below": below})


@hookimpl
def surgery_register_methods() -> list[type[Method]]:
    return [Scaled]
