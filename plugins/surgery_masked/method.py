"""The method `masked`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from surgery import Architecture, ConvertedNetwork, Method, PrunePlan, Rewriter, Step
from surgery.errors import InvalidOption
from surgery.method import Preserves
from surgery_masked.pruner import plan_unused
from surgery_masked.transform import mask


@dataclass(frozen=True)
class Masked(Method):
    """Learned connections between the branches of consecutive blocks.

    Attributes:
        fan_in: K, how many branches of the block before every branch reads; default: half of them.
        connectivity: "learned" draws K by probabilities that are trained; "full" reads all; "random" reads K that are
            drawn at conversion; "real" weighs all by the probabilities instead of drawing.
        aggregate: What happens to the K branches: "resnext" adds their residuals to the mean of their shortcuts, "sum"
            adds everything, "mean" averages everything.
        norm: "shared" normalizes the sum that every branch reads by one norm; "branch" gives every branch its own, as
            published. Only the first equals the source in train mode.
        branches: Into how many branches the channels of every block are divided; default: the groups of a grouped
            convolution, else the largest common divisor up to 8.
        mask_lr: Learning rate of the masks.
        recompute: Whether blocks compute their hidden values once more in the backward pass instead of storing them.

    Reference: Ahmed & Torresani, Connectivity learning in multi-branch networks (2017).
    """

    name: ClassVar[str] = "masked"
    preserves: ClassVar[Preserves] = "weights"

    fan_in: int | None = None
    connectivity: Literal["learned", "full", "random", "real"] = "learned"
    aggregate: Literal["resnext", "sum", "mean"] = "resnext"
    norm: Literal["shared", "branch"] = "shared"
    branches: int | None = None
    mask_lr: float = 0.2
    recompute: bool = False

    def __post_init__(self) -> None:
        """Refuse values that no network could use."""
        self.check_types(vars(self))
        for name, good, expected in (
            ("fan_in", self.fan_in is None or self.fan_in > 0, "at least 1"),
            ("branches", self.branches is None or self.branches > 1, "at least 2"),
            ("mask_lr", 0 <= self.mask_lr < math.inf, "a finite number of at least 0"),
        ):
            if not good:
                raise InvalidOption(f"masked: option {name!r} is {getattr(self, name)!r}, expected {expected}")

    def transform(self, architecture: Architecture, rewriter: Rewriter) -> None:
        """Give every branch of consecutive blocks its own input."""
        mask(
            architecture,
            rewriter,
            fan_in=self.fan_in,
            connectivity=self.connectivity,
            aggregate=self.aggregate,
            norm=self.norm,
            branches=self.branches,
            mask_lr=self.mask_lr,
        )
        if self.recompute:
            for block in architecture.blocks:
                rewriter.network.block(block.path).grad_checkpointing = True

    def losses(self, step: Step) -> dict[str, Tensor]:
        """Return nothing: the masks learn from the task loss."""
        return {}

    def plan(self, model: ConvertedNetwork, **criteria: Any) -> PrunePlan:
        """Remove every branch that no surviving branch reads.

        Args:
            model: A masked network; connections that are not frozen are those of eval mode.
            **criteria: None.

        Raises:
            InvalidOption: If there are criteria.
            PruneError: If the masks are real-valued and not frozen.
        """
        if criteria:
            raise InvalidOption(f"masked: prune expects no criteria, found {', '.join(criteria)}")
        return plan_unused(model)
