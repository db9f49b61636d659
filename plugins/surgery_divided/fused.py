"""The small networks of a divided network together on one device, for inference."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, fx, nn

from surgery.errors import InvalidOption, UnsupportedModel
from surgery_divided.choice import WINOGRAD, Chooser, Layer, Measure, medians, report
from surgery_divided.ensemble import Manner, SplitViews, combine, ensemble_of, members, whole
from surgery_divided.folding import folded
from surgery_divided.joined import check_alike, join
from surgery_divided.packed import can_pack, packed
from surgery_divided.winograd import transformed

Form = Literal["measured", "apart", "joined"]

_LAYOUTS: Mapping[str, torch.memory_format] = {
    "contiguous": torch.contiguous_format,
    "channels_last": torch.channels_last,
}


class InTurn(nn.Module):
    """Run small networks one after the other.

    Args:
        networks: One graph for each.
        split: Tells what each of them sees.
        layout: Memory format in which they see it.
    """

    def __init__(self, networks: Sequence[nn.Module], split: SplitViews, layout: torch.memory_format) -> None:
        super().__init__()
        self.networks, self.split, self.layout = nn.ModuleList(networks), split, layout

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the logits of each network."""
        if images.shape[1] == self.split.channels:  # once for all
            images = images.contiguous(memory_format=self.layout)
        views = [view.contiguous(memory_format=self.layout) for view in self.split(images)]
        return tuple(network(view) for network, view in zip(self.networks, views, strict=True))


class AsOne(nn.Module):
    """Run small networks as one graph.

    Args:
        graph: Maps images to the logits of each network.
        split: Tells which images fit.
        layout: Memory format in which the graph sees them.
    """

    def __init__(self, graph: nn.Module, split: SplitViews, layout: torch.memory_format) -> None:
        super().__init__()
        self.graph, self.split, self.layout = graph, split, layout

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the logits of each network."""
        self.split(images)  # refuses what does not fit
        logits: tuple[Tensor, ...] = self.graph(images.contiguous(memory_format=self.layout))
        return logits


class _Way(NamedTuple):
    """A network for all images, and what was chosen for its layers."""

    network: nn.Module
    layers: Sequence[Layer] = ()


class Fused(nn.Module):
    """A divided network for inference, see `fuse`.

    Attributes:
        chosen: Form and memory format, such as "joined, channels_last"; "apart, packed" and "apart, winograd" are
            channels_last too.
        milliseconds: What each way to run it took for the images that it was made for, by form and memory format.
        layers: What was chosen for every convolution of which there was a choice: where the form is "joined", and for
            "apart, winograd".
    """

    def __init__(
        self,
        network: nn.Module,
        manner: Manner,
        chosen: str,
        milliseconds: Mapping[str, float],
        layers: Sequence[Layer] = (),
    ) -> None:
        super().__init__()
        self.network, self.manner = network, manner
        self.chosen, self.milliseconds, self.layers = chosen, dict(milliseconds), tuple(layers)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, classes) of the ensemble.

        Raises:
            InvalidOption: If the images have neither the channels of one view nor those of one for each network.
        """
        return combine(self.logits(images), self.manner)

    def logits(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the logits (B, classes) of every small network.

        Raises:
            InvalidOption: As `forward`.
        """
        logits: tuple[Tensor, ...] = self.network(images)
        return logits

    def train(self, mode: bool = True) -> Fused:
        """Stay in eval mode.

        Raises:
            InvalidOption: If `mode` is True: the batch norms are part of the convolutions.
        """
        if mode:
            raise InvalidOption(
                "Fused.train: found mode=True, expected a network for inference only, whose batch norms are folded "
                "into its convolutions; train the divided network and fuse it anew"
            )
        return super().train(mode=False)

    def report(self) -> str:
        """Return what was measured, a line for each way to run the network and each of its layers."""
        return report(self.layers, self.milliseconds, self.chosen)

    def extra_repr(self) -> str:
        """Return the choice for `print(model)`."""
        return f"{self.chosen}, {self.manner}"


def fuse(
    model: nn.Module,
    images: Tensor | None = None,
    *,
    form: Form = "measured",
    winograd: bool = True,
    measure: Measure = medians,
) -> Fused:
    """Return a divided network for inference on one device, faster than the networks one after the other.

    It computes what the network computes in eval mode. Its weights are copies, in which batch norms are folded into the
    convolutions before them: later changes of the network do not show. It has no taps, and of hooks only those of
    layers.

    Args:
        model: A divided network, wrapped or not, in any mode; stays untouched.
        images: A batch like those to come, on any device: one view of each image or one for each network. Default: one
            image of the size of the conversion. The result is right for any batch, and was fastest for one like this.
        form: "apart": the networks one after the other, for float32 on a CPU also with packed convolutions, which take
            the memory of their weights again. "joined": as one network with S times the channels, in which each
            convolution is one with S times the groups or S separate ones, whichever was faster. "measured": the faster
            of both. All take the memory format that was faster.
        winograd: Whether packed 3x3 convolutions may be Winograd's where that was faster, which takes four times the
            memory of their weights. The float32 logits then differ by up to about 1e-5 of the largest one from the
            plain ones; False leaves it out. Networks of other types never take it.
        measure: Times several runs.

    Raises:
        InvalidOption: If `form` is unknown, or the channels of the images do not fit.
        UnsupportedModel: If the network is not divided, or `form` is "joined" and its networks differ in more than
            their weights.
    """
    if form not in get_args(Form):
        raise InvalidOption(f"fuse: form is {form!r}, expected one of {', '.join(get_args(Form))}")
    network = whole(model)
    # Not in inference mode, even if the caller is: the weights would be of no use outside of it.
    with torch.inference_mode(mode=False), torch.no_grad():
        small, manner = members(network), ensemble_of(network).manner
        size = network.meta["architecture"].input_size
        split = SplitViews(len(small), size[0])
        batch = _batch(small[0], images, size)
        plain = [folded(member, view) for member, view in zip(small, split(batch), strict=True)]
        ways: dict[str, _Way] = {}
        for name, layout in _LAYOUTS.items():
            # One after the other: a format change acts on the weights themselves.
            networks = [_laid_out(copy.deepcopy(network), layout) for network in plain]
            if form != "joined":
                ways[f"apart, {name}"] = _Way(InTurn(networks, split, layout))
                if layout is torch.channels_last and can_pack(batch):
                    ways |= _packed_ways(networks, split, measure if winograd else None)
            if form == "joined" or (form == "measured" and _are_alike(plain)):
                chooser = Chooser(measure, layout)
                graph = _laid_out(join(networks, chooser), layout)
                ways[f"joined, {name}"] = _Way(AsOne(graph, split, layout), chooser.layers)
        times = measure({name: partial(way.network, batch) for name, way in ways.items()}, batch.device)
        chosen = min(ways, key=times.__getitem__)
        return Fused(ways[chosen].network, manner, chosen, times, ways[chosen].layers)


def _packed_ways(networks: Sequence[fx.GraphModule], split: SplitViews, measure: Measure | None) -> dict[str, _Way]:
    """Return the ways to run packed networks, with Winograd's convolutions among them if there is a measure."""
    all_packed, layout = [packed(network) for network in networks], torch.channels_last
    ways = {"apart, packed": _Way(InTurn(all_packed, split, layout))}
    if measure is not None:
        chooser = Chooser(measure, layout)
        faster = [transformed(network, chooser) for network in all_packed]
        if any(layer.chosen == WINOGRAD for layer in chooser.layers):
            ways["apart, winograd"] = _Way(InTurn(faster, split, layout), chooser.layers)
    return ways


def _laid_out(network: fx.GraphModule, layout: torch.memory_format) -> fx.GraphModule:
    laid_out: fx.GraphModule = network.to(memory_format=layout)  # type: ignore[call-overload]
    return laid_out


def _batch(member: nn.Module, images: Tensor | None, size: tuple[int, ...]) -> Tensor:
    """Return images where the weights are, and of their type."""
    weight = next(member.parameters())
    return torch.ones((1, *size)).to(weight) if images is None else images.detach().to(weight)


def _are_alike(networks: Sequence[fx.GraphModule]) -> bool:
    try:
        check_alike(networks)
    except UnsupportedModel:
        return False
    return True
