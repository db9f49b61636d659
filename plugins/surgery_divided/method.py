"""The method `divided`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from surgery import Architecture, ConvertedNetwork, Method, ParameterRule, PrunePlan, Rewriter, Step
from surgery.errors import InvalidOption
from surgery.method import Preserves
from surgery_divided.ensemble import Manner
from surgery_divided.loss import cotraining_loss
from surgery_divided.pruner import plan_members
from surgery_divided.rules import RULE_NAMES
from surgery_divided.transform import Init, divide


@dataclass(frozen=True)
class Divided(Method):
    """One wide network becomes several co-trained small ones of as many parameters in all.

    Attributes:
        networks: S, how many there are.
        init: "fresh" draws the weights of each by the source's own initialisers with a seed of its own; "sliced" takes
            channels of the source, each network others where there are enough.
        cotraining: Weight of the Jensen-Shannon divergence between the predictions; 0 leaves it out.
        warmup: Epochs in which that weight grows linearly.
        weight_decay: What becomes of the optimizer's weight decay: "keep", "exponential" multiplies it by exp(1/S - 1),
            "linear" by 1/S.
        ensemble: How predictions are joined: mean or maximum, of logits or of probabilities.
        rule: How widths are divided: "auto" takes the first that fits of "grouped" (ResNeXt: groups by S), "wide" (WRN:
            widen factor by sqrt(S)), "resnet" (base width by sqrt(S)) and "general" (common divisor of all widths by
            sqrt(S)).

    Reference: Zhao et al., SplitNet: divide and co-training (2022).
    """

    name: ClassVar[str] = "divided"
    preserves: ClassVar[Preserves] = "nothing"

    networks: int = 2
    init: Init = "fresh"
    cotraining: float = 0.5
    warmup: float = 40
    weight_decay: Literal["keep", "exponential", "linear"] = "keep"
    ensemble: Manner = "mean_logits"
    rule: str = "auto"

    def __post_init__(self) -> None:
        """Refuse values that no network could use."""
        self.check_types(vars(self))
        for name, good, expected in (
            ("networks", self.networks > 1, "at least 2"),
            ("cotraining", 0 <= self.cotraining < math.inf, "a finite number of at least 0"),
            ("rule", self.rule in RULE_NAMES, f"one of {', '.join(RULE_NAMES)}"),
            ("warmup", 0 <= self.warmup < math.inf, "a finite number of at least 0"),
        ):
            if not good:
                raise InvalidOption(f"divided: option {name!r} is {getattr(self, name)!r}, expected {expected}")

    def transform(self, architecture: Architecture, rewriter: Rewriter) -> None:
        """Replace the network by the small ones."""
        divide(architecture, rewriter, self.networks, init=self.init, manner=self.ensemble, rule=self.rule)

    def losses(self, step: Step) -> dict[str, Tensor]:
        """Return the task loss of all networks and their divergence, see `surgery_divided.loss`."""
        return cotraining_loss(step, self.networks, self.cotraining, self.warmup)

    def parameter_rules(self, model: ConvertedNetwork) -> tuple[ParameterRule, ...]:
        """Return the rule that divides the weight decay (Zhao et al., 2022, equations 6 and 16)."""
        factors = {"keep": 1.0, "exponential": math.exp(1 / self.networks - 1), "linear": 1 / self.networks}
        names = frozenset(name for name, _ in model.named_parameters())
        return (ParameterRule(names, decay_scale=factors[self.weight_decay]),)

    def plan(self, model: ConvertedNetwork, members: int | Sequence[int] | None = None, **criteria: Any) -> PrunePlan:
        """Keep some of the small networks.

        Args:
            model: A divided network.
            members: Index of one network, or of several.
            **criteria: None.

        Raises:
            InvalidOption: If there are other criteria, or no such network.
        """
        if criteria:
            raise InvalidOption(f"divided: prune expects members=, found {', '.join(criteria)}")
        return plan_members(model, members)
