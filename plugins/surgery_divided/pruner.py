"""Keep some of the small networks and drop the others."""

from __future__ import annotations

from collections.abc import Sequence

from surgery import ConvertedNetwork, Cut, PrunePlan
from surgery.errors import InvalidOption
from surgery_divided.ensemble import members


def plan_members(model: ConvertedNetwork, wanted: int | Sequence[int] | None) -> PrunePlan:
    """Return the plan that keeps the networks `wanted`.

    Args:
        model: A divided network.
        wanted: Index of one, or of several.

    Raises:
        InvalidOption: If none or an unknown one is asked for.
    """
    networks = len(members(model))
    keep = [wanted] if isinstance(wanted, int) else wanted
    if not _fits(keep, networks):
        raise InvalidOption(
            f"divided: found members={wanted!r}, expected the index of one of {networks} networks, or a list of "
            "different ones; surgery_divided.accuracies(model, loader) says how good each is"
        )
    assert keep is not None
    kept = tuple(sorted(keep))
    criteria = {"members": list(kept)}
    return PrunePlan.of(model, "divided", [Cut("members", "members", kept, networks)], criteria)


def _fits(keep: object, networks: int) -> bool:
    if not isinstance(keep, (list, tuple)) or not keep or len(set(map(str, keep))) < len(keep):
        return False
    return all(type(index) is int and 0 <= index < networks for index in keep)
