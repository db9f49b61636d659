"""Extract one sub-network."""

from __future__ import annotations

from surgery import ConvertedNetwork, Cut, PrunePlan
from surgery.errors import InvalidOption
from surgery.slicing import Selectable
from surgery_inclusive.selection import check_subnetwork, subnetworks_of


def plan_subnetwork(model: ConvertedNetwork, subnetwork: int | None) -> PrunePlan:
    """Plan to keep one sub-network and nothing of the others.

    Raises:
        InvalidOption: If it is not said which, or there is no such sub-network.
    """
    subnetworks = subnetworks_of(model)
    if subnetwork is None:
        raise InvalidOption(
            f"inclusive: prune expects which sub-network to keep; pass subnetwork=1 (the thinnest) to "
            f"{subnetworks.count}"
        )
    k = check_subnetwork(subnetworks, subnetwork)
    cuts = [
        Cut("module", path, (k - 1,), subnetworks.count, f"sub-network {k}")
        for path, module in model.named_modules()
        if isinstance(module, Selectable)
    ]
    return PrunePlan.of(model, "inclusive", cuts, {"subnetwork": k})
