"""Figures of what was connected.

Each function draws a new figure, writes it to `path`, such as a PNG, and returns it. matplotlib comes with the extra
`plots`; its global state stays untouched.

Reference: Ahmed & Torresani, MaskConnect: connectivity learning by gradient descent (2018), figures 3-5.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from surgery.curves import MatplotlibMissing
from surgery.errors import InvalidOption
from surgery_masked.connections import Connections, active_counts, chains, listed, used_by

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Given = Sequence[Connections] | Mapping[str, Connections]
"""The connections of one network in its order: what `connectivity` returns, or its values."""

BLUE, ORANGE, GREY, LIGHT = "#2a6fbb", "#d9822b", "#6a6f78", "#d4d7dc"
_SPACING = 0.66  # inches from row to row
_RADIUS = 0.11  # inches, of a circle
_SIDE = 0.62  # of a square, as a share of the distance between two
_LINES = (("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"))


@dataclass(frozen=True, eq=False)
class _Row:
    """One row of the network: the branches of a block, or the one node where streams are joined.

    Attributes:
        label: Path of the block, or what the node stands for.
        block: Whether it is a block.
        incoming: Whether the node of the row reads that of the row above. Shape: (nodes, nodes of the row above).
        used: Nodes that anything surviving reads.
    """

    label: str
    block: bool
    incoming: Tensor
    used: tuple[int, ...]

    @property
    def nodes(self) -> int:
        return len(self.incoming)

    def edges(self) -> list[tuple[int, int]]:
        """Return the pairs (node of the row above, node of this row) of the nodes that are used."""
        return [(k, j) for j in self.used for k in self.incoming[j].nonzero().flatten().tolist()]

    def full(self) -> _Row:
        """Return the row with every connection there could be."""
        return _Row(self.label, self.block, torch.ones_like(self.incoming), tuple(range(self.nodes)))


@dataclass(frozen=True)
class _Node:
    x: float
    y: float
    radius: float
    square: bool

    def rim(self, other: _Node) -> tuple[float, float]:
        """Return where an arrow from or to `other` ends: in the middle of a side, or anywhere on a circle."""
        x, y = (0.0 if self.square else other.x - self.x), other.y - self.y
        scale = self.radius / math.hypot(x, y)
        return self.x + scale * x, self.y + scale * y


def draw_connections(
    connections: Given,
    path: str | os.PathLike[str],
    *,
    reference: bool = True,
    title: str | None = None,
) -> Figure:
    """Draw the network from top to bottom, a row of squares a block; branches that nothing reads are grey.

    An arrow says that a branch reads another. Those into grey branches are left out.

    Args:
        connections: Of one network, in its order.
        path: File to write.
        reference: Whether to draw the network with all connections to the left.
        title: Of the whole figure.

    Raises:
        InvalidOption: If there are no connections.
        MatplotlibMissing: If matplotlib is not installed.

    Reference: Ahmed & Torresani (2018), figure 3.
    """
    connections = listed(connections)
    _expect("draw_connections", connections)
    rows = _rows(connections)
    branches = max(row.nodes for row in rows)
    unit = min(0.36, max(0.15, 3 / branches))  # inches from square to square
    labels = 0.5 + 0.065 * max(len(row.label) for row in rows)
    width = (1 + reference) * (branches * unit + 0.4) + labels + 0.6
    figure = _figure(max(width, 4.4), _SPACING * (len(rows) - 1) + 1.1)
    panels = figure.subplots(1, 1 + reference, squeeze=False)[0]
    if reference:
        _draw_network(panels[0], [row.full() for row in rows], unit)
        panels[0].set_title("full connectivity", fontsize=9)
    _draw_network(panels[-1], rows, unit)
    fan_in = max(int(pair.active.sum(dim=1).max()) for pair in connections)
    blocks = [row for row in rows if row.block]
    used, total = sum(len(row.used) for row in blocks), sum(row.nodes for row in blocks)
    panels[-1].set_title(f"K = {fan_in}, {used} of {total} used", fontsize=9)
    _label(panels, rows)
    if title is not None:
        figure.suptitle(title)
    return _written(figure, path)


def draw_active(networks: Mapping[str, Given], path: str | os.PathLike[str]) -> Figure:
    """Draw how many branches are used against the depth of their block, a line a network.

    Args:
        networks: Connections of each, in its order, by the label of its line.
        path: File to write.

    Raises:
        InvalidOption: If there are no networks, or one has no connections.
        MatplotlibMissing: If matplotlib is not installed.

    Reference: Ahmed & Torresani (2018), figures 4 and 5.
    """
    _expect("draw_active", networks)
    lists = {label: listed(connections) for label, connections in networks.items()}
    for label, connections in lists.items():
        _expect(f"draw_active: {label}", connections)
    lines = {label: active_counts(connections) for label, connections in lists.items()}
    branches = max(max(pair.active.shape) for connections in lists.values() for pair in connections)
    deepest = max(lines.values(), key=len)
    figure = _figure(max(6.4, 1.5 + 0.16 * len(deepest)), 4.0)
    from matplotlib import colormaps  # not before _figure, which says what to do where it is missing

    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("Branches in use", loc="left")
    for index, (label, line) in enumerate(lines.items()):
        style, marker = _LINES[index % len(_LINES)]
        colour = colormaps["viridis"](0.8 * index / max(len(lines) - 1, 1))
        counts = [count for _, count in line]
        axes.plot(range(1, len(line) + 1), counts, style, marker=marker, markersize=4, color=colour, label=label)
    axes.set(xlabel="module, from input to output", ylabel=f"branches in use, of {branches}")
    step = next(n for n in range(1, branches + 1) if branches % n == 0 and branches <= 8 * n)
    axes.set_yticks(range(0, branches + 1, step))
    axes.set_ylim(0, 1.04 * branches)
    _name_modules(axes, [[block for block, _ in line] for line in lines.values()])
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    return _written(figure, path)


def draw_masks(connections: Given, path: str | os.PathLike[str]) -> Figure:
    """Draw the real-valued masks as heat maps, a panel a pair of blocks; dots mark the active entries.

    Raises:
        InvalidOption: If there are no connections.
        MatplotlibMissing: If matplotlib is not installed.
    """
    connections = listed(connections)
    _expect("draw_masks", connections)
    columns = math.ceil(math.sqrt(len(connections)))
    lines = -(-len(connections) // columns)
    side = max(1.5, 0.07 * max(max(pair.active.shape) for pair in connections))  # inches
    figure = _figure((side + 0.3) * columns + 1.4, (side + 0.55) * lines + 0.5)
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    # As they begin, all equal, masks are halfway grey.
    top = max(max(float(pair.real.max()), 2 / pair.real.shape[1]) for pair in connections)
    for axes, pair in zip(panels, connections, strict=False):
        image = axes.imshow(pair.real.detach().numpy(), cmap="Greys", vmin=0, vmax=top)
        reading, read = pair.active.nonzero().T.tolist()
        axes.scatter(read, reading, s=min(12, (25 * side / max(pair.active.shape)) ** 2), color=ORANGE, linewidths=0)
        axes.set_title(f"{pair.producer}\nto {pair.consumer}", fontsize=7)
        axes.tick_params(labelsize=6)
        axes.locator_params(integer=True)
    for axes in panels[len(connections) :]:
        axes.remove()
    bar = figure.colorbar(image, ax=list(panels[: len(connections)]), aspect=30)
    bar.ax.tick_params(labelsize=7)
    bar.set_label("real-valued mask; dots: active", fontsize=8)
    figure.supxlabel("branch that is read", fontsize=8)
    figure.supylabel("branch that reads", fontsize=8)
    return _written(figure, path)


def _rows(connections: Sequence[Connections]) -> list[_Row]:
    used = used_by(connections)
    rows = [_Row("stem", False, torch.ones(1, 0, dtype=torch.bool), (0,))]
    for chain in chains(connections):
        first, last = chain[0], chain[-1]
        rows.append(_Row(first.producer, True, first.active.new_ones(first.active.shape[1], 1), used[first.producer]))
        rows += [_Row(pair.consumer, True, pair.active, used[pair.consumer]) for pair in chain]
        rows.append(_Row("joined", False, last.active.new_ones(1, len(last.active)), (0,)))
    rows[-1] = _Row("classifier", False, rows[-1].incoming, (0,))
    return rows


def _place(rows: Sequence[_Row], unit: float) -> list[list[_Node]]:
    branches = max(row.nodes for row in rows)
    placed = []
    for depth, row in enumerate(rows):
        left, y = (branches - row.nodes) / 2, depth * _SPACING / unit
        radius = _SIDE / 2 if row.block else _RADIUS / unit
        placed.append([_Node(left + node, y, radius, row.block) for node in range(row.nodes)])
    return placed


def _draw_network(axes: Axes, rows: Sequence[_Row], unit: float) -> None:
    """Draw the nodes and the arrows between them, in units of the distance between two squares of a row."""
    from matplotlib.patches import Circle, Rectangle

    placed = _place(rows, unit)
    for row, nodes in zip(rows, placed, strict=True):
        for index, node in enumerate(nodes):
            x, y, r = node.x, node.y, node.radius
            colour = BLUE if index in row.used else LIGHT
            square = Rectangle((x - r, y - r), 2 * r, 2 * r, color=colour, linewidth=0)
            axes.add_patch(square if row.block else Circle((x, y), r, color=ORANGE, linewidth=0))
    _draw_arrows(axes, rows, placed)
    bottom, margin, branches = placed[-1][0].y, 0.18 / unit, max(map(len, placed))
    axes.set(xlim=(-0.7, branches - 0.3), ylim=(bottom + margin, -margin), aspect="equal", xticks=[])
    axes.set_yticks([nodes[0].y for nodes in placed], [""] * len(placed))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _draw_arrows(axes: Axes, rows: Sequence[_Row], placed: Sequence[Sequence[_Node]]) -> None:
    """Draw the arrows into the nodes that are used, thinner and paler the more of them share a gap."""
    ends, colours = [], []
    for row, above, nodes in zip(rows[1:], placed, placed[1:], strict=False):
        edges = row.edges()
        ends += [(above[k].rim(nodes[j]), nodes[j].rim(above[k])) for k, j in edges]
        colours += [(0, 0, 0, min(0.8, max(0.1, 24 / max(1, len(edges)))))] * len(edges)
    start, end = np.array(ends).transpose(1, 2, 0)
    crowd = max(len(row.edges()) for row in rows)
    axes.quiver(
        *start,
        *(end - start),
        angles="xy",
        scale_units="xy",
        scale=1,
        units="inches",
        width=min(0.011, max(0.005, 0.2 / crowd)),
        headwidth=6,
        headlength=7,
        headaxislength=7,
        color=colours,
        linewidths=0,
    )


def _label(panels: Sequence[Axes], rows: Sequence[_Row]) -> None:
    panels[0].set_yticks(panels[0].get_yticks(), [row.label for row in rows], fontsize=8)
    counts = panels[-1].secondary_yaxis("right")
    texts = [f"used {len(row.used)}/{row.nodes}" if row.block else "" for row in rows]
    counts.set_yticks(panels[-1].get_yticks(), texts, fontsize=8)
    counts.tick_params(length=0)
    counts.spines[:].set_visible(False)


def _name_modules(axes: Axes, networks: Sequence[Sequence[str]]) -> None:
    """Write the blocks' paths under the axis where all networks agree on them, else their numbers."""
    deepest = max(networks, key=len)
    if any(list(blocks) != list(deepest[: len(blocks)]) for blocks in networks):
        axes.locator_params(axis="x", integer=True)
        return
    upright = 0.08 * sum(len(block) + 1 for block in deepest) > 4.4  # inches
    axes.set_xticks(range(1, len(deepest) + 1), deepest, rotation=90 if upright else 0, fontsize=8)


def _expect(where: str, given: Sequence[object] | Mapping[str, object]) -> None:
    if not given:
        raise InvalidOption(
            f"{where}: found nothing to draw, expected the connections of a masked network; "
            "pass surgery_masked.connectivity(model)"
        )


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MatplotlibMissing(
            "surgery_masked.figures: found no matplotlib, expected the extra 'plots'; pip install 'surgery[plots]'"
        ) from error
    return Figure(figsize=(width, height), dpi=150, layout="compressed")


def _written(figure: Figure, path: str | os.PathLike[str]) -> Figure:
    figure.savefig(path)
    return figure
