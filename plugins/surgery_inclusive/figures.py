"""Figures of nested sub-networks.

Each function draws a new figure, writes it to `path`, such as a PNG, and returns it. matplotlib comes with the extra
`plots`; its global state stays untouched. Errors and accuracies go in as shares in [0, 1] and are drawn in %.

Reference: Lee & Shin, Anytime neural prediction via slicing networks vertically (2018), figures 3-5.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from torch import Tensor

from surgery.curves import MatplotlibMissing
from surgery.errors import InvalidOption
from surgery_inclusive.levels import Choice
from surgery_inclusive.series import Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Scale = Literal["linear", "log"]

ORANGE, GREY = "#d9822b", "#6a6f78"
_COLOURS = ("#2a6fbb", ORANGE, "#2e8b57", "#8a4fa3", "#a33b3b", GREY)
_MARKERS = "osD^vPX"
_DASHES = ("-", "--", ":", "-.")
_ERROR = "error in %"
_MARKED = 32  # branches; more of them are a line without markers
# Ticks of a logarithmic axis within a factor of ten, from few to many.
_STEPS = ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7))


def draw_errors(
    series: Sequence[Series],
    path: str | os.PathLike[str],
    *,
    scale: Scale = "linear",
    title: str = "Error of the sub-networks",
) -> Figure:
    """Draw error against multiply-adds, a line for each series, or a point where it has one.

    Args:
        series: What to draw; a legend names them.
        path: File to write.
        scale: Of the multiply-adds.
        title: Of the figure.

    Raises:
        InvalidOption: If there is nothing to draw, two series cannot be told apart, or `scale` is no scale.
        MatplotlibMissing: If matplotlib is not installed.

    Reference: Lee & Shin (2018), figures 3a, 3c and 4.
    """
    _expect("draw_errors", series, "one series or more")
    if len({(one.name, one.joint) for one in series}) != len(series):
        raise InvalidOption(
            f"draw_errors: found the series {[one.name for one in series]}, expected each name once, or once joint and "
            "once not; rename one"
        )
    names = list(dict.fromkeys(one.name for one in series))
    mixed = len({one.joint for one in series}) > 1
    factor, unit = _unit(point[0] for one in series for point in one.points)
    figure = _figure(6.4, 3.9)
    axes = _axes(figure, title)
    for one in series:
        index = names.index(one.name)
        macs, errors = [point[0] / factor for point in one.points], [100 * point[1] for point in one.points]
        spread = [100 * point[2] if len(point) > 2 else 0.0 for point in one.points]
        axes.errorbar(
            macs,
            errors,
            spread if any(spread) else None,
            color=_COLOURS[index % len(_COLOURS)],
            linestyle="none" if len(macs) == 1 else "-" if one.joint else "--",
            marker=_MARKERS[index % len(_MARKERS)],
            markersize=5,
            markerfacecolor=None if one.joint else "white",
            capsize=2,
            label=f"{one.name}, {'jointly' if one.joint else 'solely'} trained" if mixed else one.name,
        )
    axes.set_ylabel(_ERROR)
    _scale(axes, scale, unit)
    _legend_below(figure, *axes.get_legend_handles_labels())
    return _written(figure, path)


def draw_branch_norms(
    norms: Mapping[str, Tensor] | Mapping[str, Mapping[str, Tensor]],
    path: str | os.PathLike[str],
    *,
    title: str = "Contribution of the branches",
) -> Figure:
    """Draw the l1 norm of the weights of every branch against its index, a line for each network.

    Args:
        norms: By label of the network: norms of one block, shape (C,), or what `branch_norms` returns, of which every
            block gets a panel.
        path: File to write.
        title: Of the figure.

    Raises:
        InvalidOption: If there is nothing to draw, or norms are no vector.
        MatplotlibMissing: If matplotlib is not installed.

    Reference: Lee & Shin (2018), figure 3b.
    """
    _expect("draw_branch_norms", norms, "norms of one network or more; pass what branch_norms returned")
    networks = {name: {"": found} if isinstance(found, Tensor) else found for name, found in norms.items()}
    blocks = list(dict.fromkeys(block for found in networks.values() for block in found))
    _expect("draw_branch_norms", blocks, "norms of one block or more; pass what branch_norms returned")
    columns = min(4, math.ceil(math.sqrt(len(blocks))))
    rows = -(-len(blocks) // columns)
    figure = _figure(5.4, 3.5) if len(blocks) == 1 else _figure(1.0 + 2.1 * columns, 0.9 + 1.6 * rows)
    panels = list(figure.subplots(rows, columns, squeeze=False).flatten())
    for number, (axes, block) in enumerate(zip(panels, blocks, strict=False)):
        shown = {name: found[block] for name, found in networks.items() if block in found}
        _draw_norms(axes, shown, list(networks), small=len(blocks) > 1)
        axes.set_title(block, fontsize=8)
        if number + columns >= len(blocks):  # nothing below
            axes.set_xlabel("index of the branch", fontsize=8)
    for axes in panels[len(blocks) :]:
        axes.remove()
    figure.suptitle(title, fontsize=11)
    figure.supylabel("l1 norm of its weights", fontsize=9)
    lines = {str(line.get_label()): line for axes in figure.axes for line in axes.lines}
    _legend_below(figure, list(lines.values()), list(lines))
    return _written(figure, path)


def draw_levels(
    accuracy: Tensor,
    choices: Sequence[Choice],
    macs: Sequence[float],
    path: str | os.PathLike[str],
    names: Sequence[str],
    *,
    wanted: float | None = None,
    scale: Scale = "linear",
) -> Figure:
    """Draw error against multiply-adds, a line for each level, and circle what every sub-network should predict.

    Args:
        accuracy: Shares in [0, 1], sub-networks from thin to full, levels from fine to coarse. Shape: (K, D).
        choices: What `choose_levels` returned for them.
        macs: Multiply-adds of the K sub-networks for one image.
        path: File to write.
        names: Of the D levels.
        wanted: The accuracy that was asked for; its error is drawn as a line.
        scale: Of the multiply-adds.

    Raises:
        InvalidOption: If the numbers of sub-networks or levels differ, or `scale` is no scale.
        MatplotlibMissing: If matplotlib is not installed.

    Reference: Lee & Shin (2018), figure 5.
    """
    count = len(macs)
    if not accuracy.numel() or accuracy.shape != (count, len(names)) or len(choices) != count or min(macs) <= 0:
        raise InvalidOption(
            f"draw_levels: found accuracies {tuple(accuracy.shape)}, {len(choices)} choices, multiply-adds {macs} "
            f"and {len(names)} names, expected (K, D), K, K above 0, and D; pass those of the same network"
        )
    factor, unit = _unit(macs)
    figure = _figure(6.4, 4.4)
    axes = _axes(figure, "Error of each level, and the level to predict")
    from matplotlib import colormaps  # not before _figure, which says what to do where it is missing

    places = [one / factor for one in macs]
    for index, (name, column) in enumerate(zip(names, accuracy.T.tolist(), strict=True)):
        colour = colormaps["viridis"](0.85 * index / max(len(names) - 1, 1))
        errors = [100 * (1 - share) for share in column]
        marker, dashes = _MARKERS[index % len(_MARKERS)], _DASHES[index % len(_DASHES)]
        axes.plot(places, errors, dashes, marker=marker, markersize=5, color=colour, label=name)
    if wanted is not None:
        axes.axhline(100 * (1 - wanted), color=GREY, linewidth=0.9, zorder=0, label="wanted")
    _mark(axes, choices, places)
    axes.set_ylabel(_ERROR)
    _scale(axes, scale, unit)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8, handlelength=3, labelspacing=0.8)
    return _written(figure, path)


def _mark(axes: Axes, choices: Sequence[Choice], places: Sequence[float]) -> None:
    """Circle the choices, those that miss what was wanted in dots."""
    for reached, label, style in ((True, "to predict", "-"), (False, "best there is", ":")):
        marked = [choice for choice in choices if choice.reached is reached]
        xs = [places[choice.subnetwork - 1] for choice in marked]
        ys = [100 * (1 - choice.accuracy) for choice in marked]
        if marked:
            axes.scatter(
                xs,
                ys,
                s=130,
                facecolors="none",
                edgecolors=ORANGE,
                linewidths=1.8,
                linestyles=style,
                zorder=3,
                label=label,
            )


def _draw_norms(axes: Axes, norms: Mapping[str, Tensor], names: Sequence[str], *, small: bool) -> None:
    """Draw one panel; colours and markers depend on where a name is among all `names`."""
    for name, values in norms.items():
        if values.dim() != 1 or not len(values):
            raise InvalidOption(
                f"draw_branch_norms: {name}: found norms of shape {tuple(values.shape)}, expected (branches,); pass "
                "one norm for each branch"
            )
        index = names.index(name)
        marker = _MARKERS[index % len(_MARKERS)] if len(values) <= _MARKED else None
        dashes, colour = _DASHES[index // len(_COLOURS) % len(_DASHES)], _COLOURS[index % len(_COLOURS)]
        line = values.detach().double().cpu().numpy()
        axes.plot(range(1, len(line) + 1), line, dashes, marker=marker, markersize=3.5, color=colour, label=name)
    most = max(map(len, norms.values()))
    step = 1 if most <= 8 else -(-most // 4)
    axes.set_xticks(sorted({1, *range(step, most + 1, step)}))
    axes.set_ylim(0, 1.08 * max(float(values.max()) for values in norms.values()) or 1)
    axes.tick_params(labelsize=7 if small else 9)
    axes.spines[["top", "right"]].set_visible(False)


def _scale(axes: Axes, scale: Scale, unit: str) -> None:
    """Name the axis of the multiply-adds; a logarithmic one gets a few ticks, written in full."""
    if scale not in ("linear", "log"):
        raise InvalidOption(f"scale: found {scale!r}, expected 'linear' or 'log'")
    axes.set_xlabel(f"multiply-adds of an image in {unit}")
    axes.margins(0.08)
    if scale == "linear":
        return
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    ticks = _ticks(low, high)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)


def _ticks(low: float, high: float) -> list[float]:
    """Return three ticks or more between two numbers, round ones where there are enough."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in _STEPS:
        found = [step * 10.0**decade for decade in decades for step in steps if low <= step * 10.0**decade <= high]
        if len(found) >= 3:
            return found
    return sorted({float(f"{tick:.3g}") for tick in np.geomspace(low, high, 6)[1:-1]})


def _unit(macs: Iterable[float]) -> tuple[float, str]:
    most = max(macs)
    return (1e9, "billions") if most >= 1e9 else (1e6, "millions") if most >= 1e6 else (1e3, "thousands")


def _expect(where: str, given: Sequence[object] | Mapping[str, object], expected: str) -> None:
    if not given:
        raise InvalidOption(f"{where}: found nothing to draw, expected {expected}")


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MatplotlibMissing(
            "surgery_inclusive.figures: found no matplotlib, expected the extra 'plots'; pip install 'surgery[plots]'"
        ) from error
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def _axes(figure: Figure, title: str) -> Axes:
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.set_title(title, loc="left")
    return axes


def _legend_below(figure: Figure, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """Write the legend in as many columns as fit side by side, and make room for it."""
    width, height = figure.get_size_inches()
    for columns in (3, 2, 1):
        legend = figure.legend(
            handles, labels, loc="outside lower left", ncols=columns, frameon=False, fontsize=8, handlelength=3
        )
        box = legend.get_window_extent()
        if box.width <= 0.97 * figure.bbox.width or columns == 1:
            break
        legend.remove()
    figure.set_size_inches(width, height + box.height / figure.dpi)


def _written(figure: Figure, path: str | os.PathLike[str]) -> Figure:
    figure.savefig(path)
    return figure
