"""The method `gated`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from surgery import Architecture, ConvertedNetwork, Method, PrunePlan, Rewriter, Step
from surgery.errors import InvalidOption
from surgery.method import ParameterRule, Preserves
from surgery_gated import loss, pruner
from surgery_gated.transform import GATES, gate_channels, gate_layers, gated_blocks, targets_of


@dataclass(frozen=True)
class Gated(Method):
    """Layers or channels that open per image, or for good.

    Attributes:
        granularity: "layer" for one gate per residual block, "channel" for gates on groups of channels.
        dependent: Whether gates depend on the image; independent ones can be pruned without looking at any.
        target: Activation that training aims at, in [0, 1]; with `loss="gate"` also stage or block name -> target,
            where a block that is left out, or has the target 1, gets no gate.
        loss: "batch" for the mean over batch and gates, weighed by multiply-adds for channels; "gate" for every gate by
            itself.
        weight: Factor of that loss; 1 on ImageNet, 2 on CIFAR in the paper.
        group_size: Channels of a gate; default: the paper's, see `surgery_gated.groups`.
        one_sided: Whether only an activation above the target is penalised.
        anneal: Epochs over which the target falls from 1 to its value.
        decay: The weight decay of channel gates is the user's times `decay` over the number of gates; 40 on ImageNet,
            10 on CIFAR in the paper.
        gate_lr: Factor on the learning rate of the gates; 1 in the paper, whose trainings are long. With hundreds of
            gates in the mean, one of them moves by about its share, so that short trainings need more.

    Reference: Herrmann, Bowen & Zabih, Channel selection using Gumbel Softmax (2020).
    """

    name: ClassVar[str] = "gated"
    preserves: ClassVar[Preserves] = "output"

    granularity: Literal["layer", "channel"] = "layer"
    dependent: bool = True
    target: float | Mapping[str, float] = 0.5
    loss: Literal["batch", "gate"] = "batch"
    weight: float = 1.0
    group_size: int | None = None
    one_sided: bool = False
    anneal: float = 0.0
    decay: float = 40.0
    gate_lr: float = 1.0

    def __post_init__(self) -> None:
        """Refuse values that no network could use."""
        self.check_types(vars(self))
        if isinstance(self.target, Mapping):
            object.__setattr__(self, "target", dict(self.target))  # the caller's own may change
        self._check_target()
        for name, good, expected in (
            ("weight", 0 <= self.weight < math.inf, "a finite number of at least 0"),
            ("group_size", self.group_size is None or self.group_size > 0, "at least 1"),
            ("group_size", self.group_size is None or self.granularity == "channel", "none for granularity='layer'"),
            ("anneal", 0 <= self.anneal < math.inf, "a finite number of epochs of at least 0"),
            ("decay", 0 <= self.decay < math.inf, "a finite number of at least 0"),
            ("gate_lr", 0 < self.gate_lr < math.inf, "a finite number above 0"),
        ):
            if not good:
                raise InvalidOption(f"gated: option {name!r} is {getattr(self, name)!r}, expected {expected}")

    def transform(self, architecture: Architecture, rewriter: Rewriter) -> None:
        """Insert the gates."""
        if self.granularity == "layer":
            gate_layers(architecture, rewriter, self.dependent, self.target)
        else:
            gate_channels(architecture, rewriter, self.dependent, self.target, self.group_size)

    def losses(self, step: Step) -> dict[str, Tensor]:
        """Return {"activation": weight * the loss of the module `surgery_gated.loss`}."""
        taps = {block.path: step.taps[f"{block.path}/gates"] for block, _ in gated_blocks(step.model)}
        # A mean over many gates is not for half precision.
        decisions = {path: z.to(torch.promote_types(z.dtype, torch.float32)) for path, z in taps.items()}
        if self.loss == "gate":
            wanted = targets_of(step.model.meta["architecture"], self.target)
            annealed = {path: loss.target_at(t, self.anneal, step.progress) for path, t in wanted.items()}
            rates = loss.global_mean(torch.cat(list(decisions.values()), dim=1))
            value = loss.per_gate(rates, loss.gate_targets(decisions, annealed), one_sided=self.one_sided)
            return {"activation": self.weight * value}
        assert not isinstance(self.target, Mapping)
        target = loss.target_at(self.target, self.anneal, step.progress)
        if self.granularity == "channel":
            share = loss.open_share(step.model, decisions)
        else:
            share = torch.cat(list(decisions.values()), dim=1).mean(dim=1)
        value = loss.batch_activation(loss.global_mean(share), target, one_sided=self.one_sided)
        return {"activation": self.weight * value}

    def plan(
        self,
        model: ConvertedNetwork,
        tau: float = 0.5,
        round_to: int | None = None,
        images: Tensor | Iterable[Any] | None = None,
        static: bool = False,
        **criteria: Any,
    ) -> PrunePlan:
        """Drop what closed gates multiply by zero, see `surgery_gated.pruner.plan_gates`."""
        if criteria:
            raise InvalidOption(
                f"gated: unknown criteria {', '.join(criteria)}, expected tau, round_to, images or static"
            )
        return pruner.plan_gates(model, tau, round_to=round_to, images=images, static=static)

    def options(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        target = dict(self.target) if isinstance(self.target, Mapping) else self.target
        return {**super().options(), "target": target}

    def parameter_rules(self, model: ConvertedNetwork) -> tuple[ParameterRule, ...]:
        """Scale the learning rate of the gates, and the weight decay of channel gates by `decay` over their number."""
        gates = {block.path: found for block, found in gated_blocks(model)}
        names = frozenset(
            f"{path}.{GATES}.{name}" for path, found in gates.items() for name, _ in found.named_parameters()
        )
        count = sum(found.count for found in gates.values())
        decay = self.decay / count if self.granularity == "channel" else 1.0
        return (ParameterRule(names, lr_scale=self.gate_lr, decay_scale=decay),)

    def _check_target(self) -> None:
        values = self.target.values() if isinstance(self.target, Mapping) else [self.target]
        for value in values:
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise InvalidOption(f"gated: option 'target' is {self.target!r}, expected numbers in [0, 1]")
        if isinstance(self.target, Mapping) and self.loss == "batch":
            raise InvalidOption(
                f"gated: option 'target' is {dict(self.target)!r}, expected one number where loss='batch' averages "
                "over all gates; pass loss='gate' for targets by stage or block"
            )
