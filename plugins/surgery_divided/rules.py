"""How wide the small networks are: a rule for each family of the paper, and a general one.

A rule says what keeps it from a network, and how many channels its convolutions have in one of S small networks. A new
family is one more class, listed in `RULES` in front of the rules that would fit it as well.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from torch import nn

from surgery import Architecture, Block, ConvertedNetwork, NothingConverted
from surgery.errors import InvalidOption
from surgery_divided.widths import Width, free_widths


class Rule(ABC):
    """How one family of networks is divided.

    Attributes:
        name: What `rule=` selects it by.
    """

    name: ClassVar[str]

    @abstractmethod
    def misfit(self, architecture: Architecture, network: ConvertedNetwork) -> str:
        """Return why the rule does not fit a network, or "" where it does."""

    @abstractmethod
    def widths(self, architecture: Architecture, network: ConvertedNetwork, networks: int) -> dict[str, int]:
        """Return the new number of channels of one convolution of every group that changes together.

        Args:
            architecture: What recognition found.
            network: The undivided network.
            networks: S.
        """


class Grouped(Rule):
    """Divide the groups of grouped convolutions by S; group width and all other channels stay.

    Reference: Zhao et al., 2022, equation 12, for ResNeXt.
    """

    name = "grouped"

    def misfit(self, architecture: Architecture, network: ConvertedNetwork) -> str:
        """Return "" for blocks whose grouped convolutions all have as many groups, between two 1x1 convolutions."""
        cardinalities = {block.cardinality for block in architecture.blocks if block.kind == "grouped"}
        if not all(block.kind == "grouped" and block.split and block.merge for block in architecture.blocks):
            return "found blocks without a grouped convolution between two others, expected none"
        if len(cardinalities) != 1:
            return f"found {sorted(cardinalities)} groups, expected the same number in all blocks"
        return ""

    def widths(self, architecture: Architecture, network: ConvertedNetwork, networks: int) -> dict[str, int]:
        """Return the widths of the grouped convolutions."""
        widths = {}
        for block in architecture.blocks:
            groups = max(block.cardinality // networks, 1)
            widths[block.spatial] = block.channels.hidden // block.cardinality * groups
        return widths


class Wide(Rule):
    """Divide the widen factor by sqrt(S).

    The widen factor is how many times wider than the stem a network of basic blocks is, whose stem stays; of
    bottlenecks, how many times a quarter of their output their inner width is, and only that changes.

    Reference: Zhao et al., 2022, equation 11, for WRN-16-8 and its like and for WRN-50-2.
    """

    name = "wide"

    def misfit(self, architecture: Architecture, network: ConvertedNetwork) -> str:
        """Return "" for basic blocks wider than the stem, and for bottlenecks wider inside than a quarter."""
        if any(block.kind != "plain" for block in architecture.blocks):
            return "found blocks with groups, expected plain convolutions"
        factors = {_widening(block, architecture, network) for block in architecture.blocks}
        if len(factors) != 1 or (factor := factors.pop()) is None:
            return "found blocks that are no basic blocks or bottlenecks of one widen factor"
        if factor != int(factor) or factor < 2:
            return f"found a widen factor of {factor:g}, expected an integer of at least 2"
        free = {path for width in free_widths(network) for path in width.members}
        held = [path for path in self.widths(architecture, network, 1) if path not in free]
        return f"found {held[0]}, whose number of channels something else holds" if held else ""

    def widths(self, architecture: Architecture, network: ConvertedNetwork, networks: int) -> dict[str, int]:
        """Return the widths of basic blocks, or the inner ones of bottlenecks."""
        widths = {}
        for block in architecture.blocks:
            factor = _widening(block, architecture, network)
            assert factor is not None
            new = max(int(factor / math.sqrt(networks) + 0.4), 1)
            paths = block.convs[:-1] if block.merge and _is_bottleneck(block, network) else block.convs
            for path in paths:
                widths[path] = max(round(_conv(network, path).out_channels / factor * new), 1)
        return widths


class ResNet(Rule):
    """Replace the base width, that of the first stage, by itself over sqrt(S), and all others in proportion.

    The base is rounded to an even number, one of 64 and more to a multiple of four.

    Reference: Zhao et al., 2022, appendix A; 16 -> 12, 8 for S = 2, 4, and 64 -> 44, 32.
    """

    name = "resnet"

    def misfit(self, architecture: Architecture, network: ConvertedNetwork) -> str:
        """Return "" for basic blocks as wide as the stem and for bottlenecks a quarter as wide inside as outside."""
        if any(block.kind != "plain" for block in architecture.blocks):
            return "found blocks with groups, expected plain convolutions"
        if not architecture.blocks or {_widening(block, architecture, network) for block in architecture.blocks} != {1}:
            return "found blocks that are no basic blocks or bottlenecks, or widened ones"
        return ""

    def widths(self, architecture: Architecture, network: ConvertedNetwork, networks: int) -> dict[str, int]:
        """Return all widths."""
        base = _conv(network, architecture.blocks[0].spatial).out_channels
        new = _near(base / math.sqrt(networks), 4 if base >= 64 else 2)
        return {width.path: _scaled(width, new / base) for width in free_widths(network)}


class General(Rule):
    """Replace the greatest common divisor of the widths by itself over sqrt(S), rounded to an even number.

    Where that divisor is below 8, its rounding would be coarse, and every width is rounded by itself. Squeeze-excites
    keep their reduction, grouped convolutions the width of their groups.

    Reference: Zhao et al., 2022, section 3.1.
    """

    name = "general"

    def misfit(self, architecture: Architecture, network: ConvertedNetwork) -> str:
        """Return "" for all networks that have a width that can change."""
        return "" if free_widths(network) else "found no width that can change"

    def widths(self, architecture: Architecture, network: ConvertedNetwork, networks: int) -> dict[str, int]:
        """Return all widths."""
        free = free_widths(network)
        divisor = math.gcd(*(width.size for width in free if not width.pooled))
        root = math.sqrt(networks)
        ratio = _near(divisor / root, 2) / divisor if divisor >= 8 else 1 / root
        return {width.path: _scaled(width, ratio, even=divisor < 8) for width in free}


RULES: tuple[Rule, ...] = (Grouped(), Wide(), ResNet(), General())
"""In the order in which "auto" tries them."""
RULE_NAMES = ("auto", *(rule.name for rule in RULES))


def rule_for(name: str, architecture: Architecture, network: ConvertedNetwork) -> Rule:
    """Return the rule called `name`, or for "auto" the first that fits.

    Raises:
        InvalidOption: If it does not fit the network, with the reason.
        NothingConverted: If none does.
    """
    reasons: Mapping[str, str] = {
        rule.name: rule.misfit(architecture, network) for rule in RULES if name in ("auto", rule.name)
    }
    for rule in RULES:
        if reasons.get(rule.name) == "":
            return rule
    if name == "auto":
        raise NothingConverted(
            f"divided: no width of {architecture.name} can change; use a convolutional network", architecture.refusals
        )
    raise InvalidOption(f"divided: rule {name!r} does not fit {architecture.name}: {reasons[name]}; use rule='auto'")


def _widening(block: Block, architecture: Architecture, network: ConvertedNetwork) -> float | None:
    """Return the widen factor of a basic block or a bottleneck, None for any other block."""
    kernels = [_conv(network, path).kernel_size for path in block.convs]
    if _is_bottleneck(block, network):
        return 4 * block.channels.hidden / block.channels.output
    if kernels == [(3, 3), (3, 3)]:
        first = architecture.blocks[0]
        doubled = block.channels.output / first.channels.output
        return block.channels.output / first.channels.input / round(doubled) if doubled >= 1 else None
    return None


def _is_bottleneck(block: Block, network: ConvertedNetwork) -> bool:
    return [_conv(network, path).kernel_size for path in block.convs] == [(1, 1), (3, 3), (1, 1)]


def _conv(network: ConvertedNetwork, path: str) -> nn.Conv2d:
    module = network.get_submodule(path)
    assert isinstance(module, nn.Conv2d)
    return module


def _scaled(width: Width, ratio: float, *, even: bool = False) -> int:
    if width.step > 1:
        return max(round(width.size // width.step * ratio), 1) * width.step
    if even and not width.pooled:
        return min(_near(width.size * ratio, 2), width.size)
    return max(round(width.size * ratio), 1)


def _near(value: float, multiple: int) -> int:
    """Return the multiple next to `value`, at least one."""
    return max(round(value / multiple), 1) * multiple
