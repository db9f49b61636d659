"""Divide a network: choose the widths, cut them, and put S copies with weights of their own side by side."""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor

from surgery import Architecture, NothingConverted, Refusal, Rewriter
from surgery.errors import InvalidOption, UnsupportedModel
from surgery_divided.ensemble import Ensemble, Manner, SplitViews, members
from surgery_divided.initial import Initialisers, fresh_seeds, sliced_weights
from surgery_divided.rules import rule_for
from surgery_divided.widths import written_by

Init = Literal["fresh", "sliced"]


def divide(
    architecture: Architecture, rewriter: Rewriter, networks: int, *, init: Init, manner: Manner, rule: str
) -> None:
    """Replace the network by `networks` small ones.

    Args:
        architecture: What recognition found.
        rewriter: Edits the network.
        networks: S.
        init: Whether weights are drawn anew or taken from the source.
        manner: How the logits of the small networks are joined.
        rule: Name of the rule that says how wide they are, or "auto".

    Raises:
        NothingConverted: If the network has no residual block, or no width changes.
        InvalidOption: If the rule does not fit, or no layer is wide enough for so many networks.
        UnsupportedModel: If layers share a weight.
    """
    network = rewriter.network
    if not any(block.is_residual for block in architecture.blocks):
        raise NothingConverted(f"divided: {architecture.name} has no residual block", architecture.refusals)
    if architecture.head.path is None:
        raise NothingConverted(f"divided: {architecture.name} has no classifier, whose output the networks would share")
    _refuse_ties(rewriter)
    widths = rule_for(rule, architecture, network).widths(architecture, network, networks)
    if all(written_by(rewriter.module(path)) == width for path, width in widths.items()):
        reason = f"no width that can change is wide enough to be divided by {networks}"
        refusal = Refusal(architecture.name, reason, "use a wider network")
        raise NothingConverted(f"divided: {architecture.name} is too thin to be divided by {networks}", (refusal,))
    widest = max(written_by(rewriter.module(path)) for path in widths)
    if networks > widest:
        raise InvalidOption(
            f"divided: networks is {networks}, but the widest layer of {architecture.name} that can be divided has "
            f"{widest} channels; expected at most {widest}"
        )
    states: list[dict[str, Tensor]] = []
    if init == "sliced" and not rewriter.replays:
        states = sliced_weights(network, widths, networks, "divided")
    rewriter.scale(widths, exact=False)
    rewriter.scale_drop_rates(1 / math.sqrt(networks))
    rewriter.replicate(networks, Ensemble(networks, manner), SplitViews(networks, architecture.input_size[0]))
    seeds = rewriter.decide("seeds", lambda: fresh_seeds(networks)) if init == "fresh" else []
    if not rewriter.replays:
        _fill(rewriter, seeds, states)


def _refuse_ties(rewriter: Rewriter) -> None:
    """Refuse layers that share a weight: in a thinner network each would have its own."""
    seen: dict[int, str] = {}
    for name, value in rewriter.network.named_parameters(remove_duplicate=False):
        if (other := seen.setdefault(id(value), name)) != name:
            raise UnsupportedModel(
                f"divided: {name} and {other} are one weight, expected every layer to have its own; copy it before the "
                "conversion"
            )


def _fill(rewriter: Rewriter, seeds: list[int], states: list[dict[str, Tensor]]) -> None:
    """Give every small network its own weights; one without data, on the meta device, has none to give."""
    networks = members(rewriter.network)
    if all(value.is_meta for value in rewriter.network.parameters()):
        return
    for network, state in zip(networks, states, strict=False):
        network.load_state_dict(state)
    if seeds:
        names = [name for name, _ in networks[0].named_parameters()]
        initialisers = Initialisers(rewriter.network.meta["conversion"], names)
        for network, seed in zip(networks, seeds, strict=True):
            initialisers.draw(network, seed)
