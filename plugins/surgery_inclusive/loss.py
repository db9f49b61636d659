"""The anytime loss: the task loss of every sub-network, and of every level of a taxonomy."""

from __future__ import annotations

import torch
from torch import Tensor

from surgery import Step
from surgery_inclusive.selection import subnetworks_of
from surgery_inclusive.taxonomy import Taxonomy


def anytime_loss(step: Step, taxonomy: Taxonomy | None) -> dict[str, Tensor]:
    """Return the terms of the sum over the sub-networks that ran, of which the last gave the output.

    Returns:
        "task": loss of the output; "subnetworks": sum of those of the thinner sub-networks; "taxonomy": sum over all
        sub-networks and coarse levels. What there is none of is left out.

    Reference: Lee & Shin (2018), equations 1 and 2.
    """
    subnetworks = subnetworks_of(step.model)
    ran = range(1, subnetworks.count + 1) if subnetworks.chosen is None else [subnetworks.chosen]
    terms = {"task": step.criterion(step.output, step.target)}
    thin = [step.criterion(step.taps[f"logits/{k}"], step.target) for k in ran[:-1]]
    if thin:
        terms["subnetworks"] = torch.stack(thin).sum()
    if taxonomy is not None:
        coarse = [
            step.criterion(step.taps[f"logits/{k}/{level}"], taxonomy.labels(step.target, level))
            for k in ran
            for level in taxonomy.levels
        ]
        terms["taxonomy"] = torch.stack(coarse).sum()
    return terms
