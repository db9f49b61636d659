"""Decide what closed gates let go: layers, and channels through everything that is coupled to them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from surgery import Architecture, Block, ConvertedNetwork, Cut, PrunePlan
from surgery.errors import InvalidOption, PruneError
from surgery_gated.gates import Gates, Threshold
from surgery_gated.inference import inference
from surgery_gated.macs import ConvMacs, known_macs
from surgery_gated.modules import ChannelGate
from surgery_gated.streams import Streams, closed_streams
from surgery_gated.transform import gated_blocks
from surgery_gated.usage import measure


@dataclass(frozen=True)
class Verdict:
    """What becomes of the gates of one block.

    Attributes:
        chance: How likely each is open, (G,): its probability, or its rate on images.
        closed: Which are closed for good, (G,) bool.
        opened: Which are open for good; a gate that is neither goes on deciding for every image.
    """

    chance: Tensor
    closed: Tensor
    opened: Tensor

    @property
    def live(self) -> tuple[int, ...]:
        """Indices of the gates that go on deciding."""
        return tuple((~(self.closed | self.opened)).nonzero().flatten().tolist())


def plan_gates(
    model: ConvertedNetwork,
    tau: float,
    *,
    round_to: int | None = None,
    images: Tensor | Iterable[Any] | None = None,
    static: bool = False,
) -> PrunePlan:
    """Plan to drop the layers and channels whose gates are closed, and the gates that are always open.

    The pruned network computes what the gated one does in eval mode at that threshold.

    Args:
        model: A gated network.
        tau: A gate is open where its probability exceeds `tau`.
        round_to: Keep a multiple of so many channels of every tensor: closed groups are opened again, the likeliest
            first, and where no multiple comes out all channels stay. The pruned network then computes what the gated
            one does with those gates open.
        images: For dependent gates: images (B, C, H, W), a tuple that begins with them, or an iterable of such batches.
            What is closed, or open, on all of them is taken to be so always; the other gates stay.
        static: For dependent gates: open or close every gate for good, by the majority of `images`.

    Raises:
        InvalidOption: If a criterion cannot be used, or dependent gates come without images.
        PruneError: If nothing would be left on a path through the network.
    """
    verdicts = judge(model, tau, images=images, static=static)
    layers = all(gates.granularity == "layer" for _, gates in gated_blocks(model))
    if round_to is not None and (layers or isinstance(round_to, bool) or not isinstance(round_to, int) or round_to < 1):
        expected = "none where gates open whole layers" if layers else "a number of channels such as 8"
        raise InvalidOption(f"gated: round_to={round_to!r}, expected {expected}")
    cuts = _layer_cuts(model, verdicts) if layers else _channel_cuts(model, verdicts, round_to)
    asked = {"tau": tau, "round_to": round_to, "static": static or None}
    return PrunePlan.of(model, "gated", list(cuts), {name: value for name, value in asked.items() if value is not None})


def judge(
    model: ConvertedNetwork, tau: float, *, images: Tensor | Iterable[Any] | None = None, static: bool = False
) -> dict[str, Verdict]:
    """Return what becomes of the gates of every block, by path; arguments and errors as in `plan_gates`."""
    mode = Threshold(tau)
    if not isinstance(static, bool):
        raise InvalidOption(f"gated: static={static!r}, expected True or False")
    blocks = list(gated_blocks(model))
    dependent = any(gates.dependent for _, gates in blocks)
    if not dependent:
        if images is not None or static:
            raise InvalidOption(
                "gated: found images= or static=, expected neither, since these gates depend on no image"
            )
        chances = {block.path: _chance(gates) for block, gates in blocks}
        return {path: Verdict(chance, chance <= tau, chance > tau) for path, chance in chances.items()}
    if images is None:
        raise InvalidOption(
            "gated: what dependent gates close depends on the image, found none; pass images=, a batch (B, C, H, W) or "
            "an iterable of batches, to surgery.plan or surgery.prune, to see which are always closed, and static=True "
            "to fix all of them"
        )
    kept = [gates.mode for _, gates in blocks if gates.mode != mode]
    if kept and not static:
        raise InvalidOption(
            f"gated: tau={tau}, but the gates that stay go on with {kept[0]}; call surgery_gated.set_inference(model, "
            f"surgery_gated.{mode}) first, or pass static=True"
        )
    with inference(model, mode):
        rates = measure(model, [images] if isinstance(images, (Tensor, tuple)) else images).rates
    found = {path: torch.as_tensor(rate) for path, rate in rates.items()}
    if static:
        return {path: Verdict(rate, rate <= 0.5, rate > 0.5) for path, rate in found.items()}
    return {path: Verdict(rate, rate == 0, rate == 1) for path, rate in found.items()}


def _chance(gates: Gates) -> Tensor:
    """Return the probabilities of independent gates, (G,)."""
    logits = gates.head(torch.empty(1, device="meta"))[0]
    return torch.sigmoid((logits[:, 1] - logits[:, 0]).detach().to(torch.promote_types(logits.dtype, torch.float32)))


def _layer_cuts(model: ConvertedNetwork, verdicts: Mapping[str, Verdict]) -> Iterator[Cut]:
    architecture: Architecture = model.meta["architecture"]
    if all(path in verdicts and bool(verdicts[path].closed) for path in (b.path for b in architecture.blocks)):
        raise PruneError(
            f"gated: the gates of all {len(verdicts)} blocks are closed, so nothing but shortcuts would be left "
            "between stem and classifier; use a lower tau, or train with a higher target"
        )
    dependent = any(gates.dependent for _, gates in gated_blocks(model))
    for path, verdict in verdicts.items():
        chance = float(verdict.chance)
        reason = f"open for {100 * chance:.1f} % of the images" if dependent else f"open with probability {chance:.3f}"
        if verdict.closed.all():
            yield Cut("body", path, (), 1, reason)
        elif verdict.opened.all():
            yield Cut("module", f"{path}.gated_layer", (), 1, reason)


def _channel_cuts(model: ConvertedNetwork, verdicts: Mapping[str, Verdict], round_to: int | None) -> Iterator[Cut]:
    architecture: Architecture = model.meta["architecture"]
    blocks = [architecture.block(path) for path in verdicts]
    if round_to is not None:
        verdicts = {block.path: _rounded(model, block, verdicts[block.path], round_to) for block in blocks}
    written: dict[str, Tensor] = {}
    for block in blocks:
        written |= {
            conv.path: _kept(conv.writes, verdicts[block.path])
            for conv in known_macs(model, block.path).convs
            if any(gate.role in ("output", "projection") for gate in conv.writes)
        }
    streams = closed_streams(model, written, round_to)
    for path, keep in streams.keep.items():
        width = len(written[path])
        yield Cut("stream", path, tuple(keep.tolist()), width, "closed in every block that writes them")
    for block in blocks:
        yield from _block_cuts(model, block, verdicts[block.path], streams)
    for block in blocks:
        yield from _gate_cuts(model, block, verdicts[block.path])


def _block_cuts(model: ConvertedNetwork, block: Block, verdict: Verdict, streams: Streams) -> Iterator[Cut]:
    for conv in known_macs(model, block.path).convs:
        if conv.path == block.convs[0] and conv.reads:
            yield from _cut("inputs", conv.path, _kept(conv.reads, verdict), streams.entering.get(block.path))
        if conv.writes and not conv.grouped:
            ends = any(gate.role in ("output", "projection") for gate in conv.writes)
            left = streams.leaving.get(block.path) if ends else None
            yield from _cut("outputs", conv.path, _kept(conv.writes, verdict), left)


def _cut(kind: Any, path: str, keep: Tensor, left: Tensor | None) -> Iterator[Cut]:
    """Yield the cut to the channels `keep`, (C,) bool, of which only those in `left` are still there."""
    keep = keep if left is None else keep[left]
    if not keep.any():
        raise PruneError(
            f"{path}: every channel that it {'reads' if kind == 'inputs' else 'writes'} is closed, so the path would "
            "end there; use a lower tau, or train with a higher target"
        )
    if not keep.all():
        yield Cut(kind, path, tuple(keep.nonzero().flatten().tolist()), len(keep), "the others are closed")


def _gate_cuts(model: ConvertedNetwork, block: Block, verdict: Verdict) -> Iterator[Cut]:
    """Yield what becomes of the gates themselves once the closed channels are gone."""
    live, count = verdict.live, len(verdict.closed)
    if len(live) == count:
        return
    for name, module in model.block(block.path).named_children():
        if isinstance(module, ChannelGate):
            used = set(module.column.tolist()).intersection(live)
            yield Cut("module", f"{block.path}.{name}", live if used else (), count, "the others are decided for good")
        elif isinstance(module, Gates) and live:
            yield Cut("module", f"{block.path}.{name}", live, count, "the others are decided for good")


def _kept(gates: Sequence[ChannelGate], verdict: Verdict) -> Tensor:
    """Return which channels of a tensor are not closed for good, (C,) bool."""
    decisions = (~verdict.closed).float()[None]
    kept = torch.ones(len(gates[0].column), dtype=torch.bool)
    for gate in gates:
        kept &= gate.mask(decisions.to(gate.column.device))[0].bool().cpu()
    return kept


def _rounded(model: ConvertedNetwork, block: Block, verdict: Verdict, round_to: int) -> Verdict:
    """Open closed gates again, the likeliest first, until every tensor of the block keeps a multiple of channels."""
    closed, opened = verdict.closed.clone(), verdict.opened.clone()
    for conv in known_macs(model, block.path).convs:
        _open_again(conv, closed, opened, verdict.chance, round_to)
    return Verdict(verdict.chance, closed, opened)


def _open_again(conv: ConvMacs, closed: Tensor, opened: Tensor, chance: Tensor, round_to: int) -> None:
    for gates in (conv.reads, conv.writes):
        if not gates:
            continue
        mine = torch.unique(torch.cat([gate.column for gate in gates]).cpu())
        waiting = [int(gate) for gate in mine if gate >= 0 and closed[gate]]
        for gate in sorted(waiting, key=lambda gate: -float(chance[gate])):
            if int(_kept(gates, Verdict(chance, closed, opened)).sum()) % round_to == 0:
                break
            closed[gate], opened[gate] = False, True
