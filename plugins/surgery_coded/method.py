"""The method `coded`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from surgery import Architecture, ConvertedNetwork, Method, PrunePlan, Rewriter, Step
from surgery.errors import InvalidOption
from surgery.method import Preserves
from surgery_coded.gradients import GradientMask
from surgery_coded.loss import coding_loss, target_codewords
from surgery_coded.modules import CodedConv2d
from surgery_coded.pruner import branch_switches, coded_blocks, plan_classes
from surgery_coded.scheme import CodingScheme
from surgery_coded.transform import SchemeOption, encode


@dataclass(frozen=True)
class Coded(Method):
    """Every class flows through its own branches.

    Attributes:
        scheme: Stage name -> ratio of active branches such as "16/32", or a `CodingScheme`. Default: 1/2 and 1/4 in the
            last two stages that can be coded, 1 elsewhere. Blocks with ratio 1 stay untouched.
        mu: Weight of the coding loss; 6 on CIFAR, 2 on ImageNet in the paper.
        p_drop: Probability in [0, 1) with which a branch is dropped from a sample in training.
        exponent: Power of the coding loss.
        branches: Into how many branches the channels of every block are divided; default: the groups of a grouped
            convolution, else what the scheme names, else the largest common divisor of the stage's widths up to 32.
        gradient: "loss" for the coding loss; "masked" for none, with branches that learn from their own classes only.

    Reference: Coded ResNeXt (2022), sections 3.1 to 3.3.
    """

    name: ClassVar[str] = "coded"
    preserves: ClassVar[Preserves] = "weights"

    scheme: SchemeOption | None = None
    mu: float = 2.0
    p_drop: float = 0.1
    exponent: float = 4
    branches: int | None = None
    gradient: Literal["loss", "masked"] = "loss"

    def __post_init__(self) -> None:
        """Refuse values that no network could use."""
        self.check_types(vars(self))
        if self.scheme is not None and not isinstance(self.scheme, Mapping):
            raise InvalidOption(
                f"coded: option 'scheme' is {self.scheme!r}, expected stage names with ratios, such as "
                "{'layer4': '8/32'}"
            )
        for name, good, expected in (
            ("mu", 0 <= self.mu < math.inf, "a finite number of at least 0"),
            ("p_drop", 0 <= self.p_drop < 1, "a probability in [0, 1)"),
            ("exponent", 0 < self.exponent < math.inf, "a positive number"),
            ("branches", self.branches is None or self.branches > 1, "at least 2"),
        ):
            if not good:
                raise InvalidOption(f"coded: option {name!r} is {getattr(self, name)!r}, expected {expected}")

    def transform(self, architecture: Architecture, rewriter: Rewriter) -> None:
        """Replace the convolution that joins the branches of each coded block."""
        encode(architecture, rewriter, self.scheme, self.branches, self.p_drop)
        if self.gradient == "masked":
            for block, module in coded_blocks(rewriter.network):
                module.gradient_mask = GradientMask()
                for switch in branch_switches(rewriter.network, block):
                    switch.gradient_mask = module.gradient_mask

    def losses(self, step: Step) -> dict[str, Tensor]:
        """Return {"coding": mu * sum of the blocks' coding losses} (Eq. 6), or nothing where gradients are masked.

        Raises:
            InvalidOption: If the classifier no longer has the classes of the schemes.
        """
        modules = coded_modules(step.model)
        if step.output.shape[1] != modules[0].codewords.shape[0]:
            raise InvalidOption(
                f"coded: the network has {step.output.shape[1]} outputs, its schemes "
                f"{modules[0].codewords.shape[0]} classes; "
                "reset the classifier of the unconverted network and convert that one"
            )
        losses = []
        for module in modules:
            words = target_codewords(module.codewords, step.target)
            energies = step.taps[module.energy.name]
            if module.gradient_mask is not None:
                module.gradient_mask.fill(words)
            else:
                losses.append(coding_loss(energies, words.to(energies.dtype), module.ratio, self.exponent))
        if not losses:
            return {}
        return {"coding": self.mu * sum(losses[1:], losses[0])}

    def plan(self, model: ConvertedNetwork, classes: int | Iterable[int] | None = None, **criteria: Any) -> PrunePlan:
        """Keep the branches of the codewords of `classes`, and those rows of the classifier.

        Args:
            model: A coded network.
            classes: Class indices, or a single one, which gives a binary classifier.
            **criteria: None.

        Raises:
            InvalidOption: If no class is given, or one does not exist.
        """
        if criteria or classes is None:
            found = f"found {', '.join(criteria)}" if criteria else "found none"
            raise InvalidOption(f"coded: prune expects classes=[...], the class indices to keep; {found}")
        return plan_classes(model, classes)

    def options(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        scheme = None if self.scheme is None else {stage: _to_json(value) for stage, value in self.scheme.items()}
        return {**super().options(), "scheme": scheme}


def coded_modules(model: ConvertedNetwork) -> list[CodedConv2d]:
    """Return the coded convolutions of `model`, in the order of the network."""
    return [module for module in model.modules() if isinstance(module, CodedConv2d)]


def _to_json(value: str | CodingScheme | Mapping[str, Any]) -> Any:
    return value.to_dict() if isinstance(value, CodingScheme) else value
