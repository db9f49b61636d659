"""Cut away the branches that nothing reads."""

from __future__ import annotations

from collections.abc import Iterator

from surgery import ConvertedNetwork, Cut, PrunePlan
from surgery.errors import PruneError
from surgery_masked.connections import Connections
from surgery_masked.network import chains_of, connectivity, masks_of, used_branches
from surgery_masked.norms import ConsumerNorm


def plan_unused(model: ConvertedNetwork) -> PrunePlan:
    """Plan to remove every branch that no surviving branch reads, and to fix what the others read.

    Backwards from the last block of each chain, whose branches are all joined. The pruned network computes what the
    masked one does in eval mode.

    Raises:
        PruneError: If the masks in use are real-valued, so that every branch reads all.

    Reference: MaskConnect (2017), section 2.1: an unused block is pruned without effect on the output.
    """
    masks = masks_of(model)
    if masks.connectivity == "real" and not masks.frozen:
        raise PruneError(
            "masked: with connectivity='real' every branch reads all branches of the block before, expected a fixed "
            "choice; call surgery_masked.freeze(model) first"
        )
    used, connections = used_branches(model), connectivity(model)
    cuts = [cut for chain in chains_of(model) for cut in _cuts(model, [path for path, _ in chain], used, connections)]
    return PrunePlan.of(model, "masked", cuts, {})


def _cuts(
    model: ConvertedNetwork,
    chain: list[str],
    used: dict[str, tuple[int, ...]],
    connections: dict[str, Connections],
) -> Iterator[Cut]:
    for path, consumer in zip(chain, [*chain[1:], None], strict=True):
        if consumer is not None:
            yield from _consumer_cuts(model, path, connections[consumer], used[consumer])
        branches = len(next(iter(connections.values())).active)
        reason = "the others are read by no branch that is left" if consumer else "all are joined"
        yield Cut("branches", path, used[path], branches, reason)


def _consumer_cuts(model: ConvertedNetwork, path: str, read: Connections, left: tuple[int, ...]) -> Iterator[Cut]:
    """Yield what becomes of the masks and statistics of the branches that read the block at `path`."""
    branches = read.active.shape[1]
    entries = [j * branches + k for j in left for k in read.active[j].nonzero().flatten().tolist()]
    for name, module in model.block(path).named_modules():
        if isinstance(module, ConsumerNorm):
            yield Cut("module", f"{path}.{name}", left, branches, "one for each branch that reads")
    yield Cut("module", f"{path}.masked_mask", tuple(entries), branches**2, "fixed connections")
