"""Figures of what gates do.

Each function draws a new figure, writes it to `path`, such as a PNG, and returns it. matplotlib comes with the extra
`plots`; its global state stays untouched.

Reference: Herrmann, Bowen & Zabih, Channel selection using Gumbel Softmax (2020), supplement, figures 1, 2, 10-13.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np

from surgery.curves import MatplotlibMissing
from surgery.errors import InvalidOption
from surgery_gated.usage import Usage

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREY = "#2a6fbb", "#d9822b", "#6a6f78"
_BINS = 20
_LEGEND_ROWS = 17  # fit beside the axes
_MARKED_EPOCHS = 30
_LINES = ("-", "--", ":")


def draw_rates(
    history: Sequence[Mapping[str, Sequence[float]]],
    path: str | os.PathLike[str],
    *,
    epochs: Sequence[float] | None = None,
) -> Figure:
    """Draw the activation rate of every block over training; that of channel gates is the mean over the block's.

    Args:
        history: Rates of the gates by block, as `Usage.rates`, one mapping an epoch.
        path: File to write.
        epochs: When they were measured; default: 1, 2, ...

    Raises:
        InvalidOption: If there is nothing to draw, the blocks change, or `epochs` has another length.
        MatplotlibMissing: If matplotlib is not installed.
    """
    times = list(range(1, len(history) + 1)) if epochs is None else list(epochs)
    blocks = list(history[0]) if history else []
    if not blocks or len(times) != len(history) or any(list(rates) != blocks for rates in history):
        raise InvalidOption(
            f"draw_rates: found {len(history)} epochs at {len(times)} times, the first with {len(blocks)} blocks, "
            "expected one epoch or more, each with its time and the same blocks"
        )
    columns = -(-len(blocks) // _LEGEND_ROWS)
    axes = _axes("Gate activation rates during training", width=6.4 + 1.3 * columns, height=4.2)
    for index, (block, colour) in enumerate(zip(blocks, _colours(len(blocks)), strict=True)):
        shares = [100 * fmean(rates[block]) for rates in history]
        marker = "." if len(times) < _MARKED_EPOCHS else None
        axes.plot(times, shares, _LINES[index % len(_LINES)], color=colour, label=block, marker=marker, linewidth=1.4)
    axes.set(xlabel="epoch", ylabel="open for % of the images", ylim=(-3, 103))
    axes.locator_params(axis="x", integer=epochs is None, min_n_ticks=1)
    legend = {"ncols": columns, "title": "from input to output"} if len(blocks) > 1 else {"ncols": 1}
    axes.figure.legend(loc="outside right upper", frameon=False, fontsize=7, title_fontsize=7, **legend)
    return _written(axes, path)


def draw_polarization(usage: Usage, path: str | os.PathLike[str]) -> Figure:
    """Draw how many gates open how often, and say what share of them has settled.

    Raises:
        MatplotlibMissing: If matplotlib is not installed.
    """
    found = usage.polarization()
    axes = _axes("Polarization of the gates", width=6.4, height=4.0)
    rates = [100 * rate for gates in usage.rates.values() for rate in gates]
    counts, edges = np.histogram(rates, _BINS, (0, 100))
    bars = axes.bar(edges[:-1], counts, width=100 / _BINS, align="edge", color=BLUE, edgecolor="white")
    axes.bar_label(bars, [str(count) if count else "" for count in counts], fontsize=7)
    axes.set(xlabel="open for % of the images", ylabel=f"number of gates, of {found.gates}", xlim=(-1, 101))
    axes.margins(y=0.1)
    axes.locator_params(axis="y", integer=True, min_n_ticks=1)
    axes.set_title("Polarization of the gates", loc="left", pad=26)
    shares = f"on {100 * found.on:.0f} %, off {100 * found.off:.0f} %, between {100 * found.between:.0f} %"
    text = (
        f"{shares} of the gates, within {100 * found.tolerance:g} % of the images\n"
        f"{100 * found.at_mode:.0f} % at their mode for more than 99.9 % of the images; {usage.mode}"
    )
    axes.annotate(text, (0, 1), (0, 4), "axes fraction", "offset points", fontsize=7, color=GREY)
    return _written(axes, path)


def draw_layer_rates(usage: Usage, path: str | os.PathLike[str]) -> Figure:
    """Draw the activation rate of every block from top to bottom; channel gates are dots about the bar of their mean.

    Raises:
        MatplotlibMissing: If matplotlib is not installed.
    """
    means = {block: 100 * fmean(gates) for block, gates in usage.rates.items()}
    single = all(len(gates) == 1 for gates in usage.rates.values())
    axes = _axes("Gate activation rate by block", width=6.4, height=max(2.6, 1.3 + 0.2 * len(means)))
    rows = range(len(means))
    axes.barh(
        rows,
        list(means.values()),
        color=BLUE,
        alpha=1.0 if single else 0.5,
        height=0.7,
        label="gate" if single else "mean",
    )
    for row, gates in enumerate(usage.rates.values() if not single else ()):
        offsets = [row + 0.6 * ((7 * n) % 11 / 10 - 0.5) for n in range(len(gates))]  # beside, not on, each other
        shares = [100 * rate for rate in gates]
        axes.scatter(shares, offsets, s=5, color="black", alpha=0.5, linewidths=0, label="_" * (row > 0) + "one gate")
    axes.axvline(100 * usage.rate, color=ORANGE, label="mean of all gates")
    labels = [f"{block}  {mean:.1f} %" for block, mean in means.items()]
    axes.set_yticks(rows, labels, fontsize=8)
    axes.set(xlabel="open for % of the images", xlim=(-1, 101), ylim=(len(means) - 0.4, -0.6))
    axes.figure.legend(loc="outside lower left", ncols=3, frameon=False, fontsize=8)
    return _written(axes, path)


def _axes(title: str, width: float, height: float) -> Axes:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MatplotlibMissing(
            "surgery_gated.figures: found no matplotlib, expected the extra 'plots'; pip install 'surgery[plots]'"
        ) from error
    axes = Figure(figsize=(width, height), dpi=150, layout="constrained").subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, loc="left")
    return axes


def _colours(count: int) -> list[tuple[float, float, float, float]]:
    """Return the colours of blocks, from the dark first one to the light last one."""
    from matplotlib import colormaps

    return [colormaps["viridis"](0.9 * index / max(count - 1, 1)) for index in range(count)]


def _written(axes: Axes, path: str | os.PathLike[str]) -> Figure:
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.savefig(path)
    return figure
