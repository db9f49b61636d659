"""Figures of what `surgery_coded.analysis`, `probes` and `calibration` found.

Each function draws into the axes that it is given, or into those of a new figure, and returns them. A figure is written
with `axes.figure.savefig("name.png")`. matplotlib comes with the extra `plots`; its global state stays untouched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from surgery.errors import InvalidOption, SurgeryError
from surgery_coded.analysis import Agreement, Collected
from surgery_coded.binary import BinaryReport
from surgery_coded.calibration import CalibrationTable
from surgery_coded.probes import OutputDistribution, RemovalAccuracy
from surgery_coded.reliability import CalibrationError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, RED, GREY = "#2a6fbb", "#d9822b", "#c23b3b", "#8a8f98"
_MOST_LABELS = 9  # side by side in the width of a figure


class MatplotlibMissing(SurgeryError, ImportError):
    """A figure was asked for and matplotlib is not installed."""


def draw_decoders(collected: Collected, axes: Axes | None = None) -> Axes:
    """Draw the accuracy of the early decoders, block by block from top to bottom, and that of the whole network.

    A new figure is as high as the blocks need; axes that are given should have room for a line per block.
    """
    shares = {block: 100 * share for block, share in collected.decoder_accuracy.items()}
    whole = 100 * collected.accuracy
    axes = _prepared(
        axes,
        "Accuracy of the early decoders",
        f"accuracy in % (line: whole network, {whole:.1f} %)",
        None,
        height=max(3.6, 1.2 + 0.18 * len(shares)),
    )
    rows = range(len(shares))
    axes.barh(rows, list(shares.values()), color=BLUE, height=0.7)
    axes.axvline(whole, color=ORANGE)
    axes.set_yticks(rows, [f"{block}  {share:.1f} %" for block, share in shares.items()], fontsize=8)
    axes.set(xlim=(0, 100), ylim=(len(shares) - 0.4, -0.6))
    return axes


def draw_removal(removal: RemovalAccuracy, axes: Axes | None = None) -> Axes:
    """Draw the accuracy over the number of active and of inactive branches that were removed.

    Reference: Coded ResNeXt (2022), Fig. 2a and 9.
    """
    axes = _prepared(axes, f"Removing branches of {removal.block}", "branches removed", "accuracy in %")
    for found, label, colour, marker in (
        (removal.inactive, "inactive for the class", RED, "o"),
        (removal.active, "active for the class", BLUE, "s"),
    ):
        axes.plot(list(found), [100 * share for share in found.values()], color=colour, label=label, marker=marker)
    axes.locator_params(axis="x", integer=True, min_n_ticks=1)
    axes.legend(frameon=False)
    return axes


def draw_output_distribution(distribution: OutputDistribution, axes: Axes | None = None) -> Axes:
    """Draw the densities of the absolute outputs of each branch, where it is active and where it is not.

    Raises:
        InvalidOption: If no output was counted.

    Reference: Coded ResNeXt (2022), Fig. 6.
    """
    if not bool(distribution.active.any()) and not bool(distribution.inactive.any()):
        raise InvalidOption("draw_output_distribution: found no output counted, expected one or more; pass samples")
    branches = len(distribution.active)
    axes = _prepared(axes, f"Branch outputs of {distribution.block}", "absolute normalized output", "density")
    edges = distribution.edges.tolist()
    width = edges[1] - edges[0]
    for counts, label, colour in (
        (distribution.inactive, "inactive for the class", RED),
        (distribution.active, "active for the class", BLUE),
    ):
        for n, row in enumerate(counts.double()):
            density = (row / (row.sum().clamp(min=1) * width)).tolist()
            axes.stairs(density, edges, color=colour, alpha=0.8, label=label if n == 0 else None)
    axes.set_yscale("log")
    axes.set_xlim(left=0)
    axes.legend(frameon=False, title="1 branch" if branches == 1 else f"the first {branches} branches, a line each")
    return axes


def draw_agreement(agreement: Agreement, axes: Axes | None = None) -> Axes:
    """Draw the accuracy and the share of the samples over the number of early decoders that agree.

    Reference: Coded ResNeXt (2022), Table 3.
    """
    axes = _prepared(axes, "Trust by agreement", "early decoders that agree with the prediction", "%")
    counts = list(range(len(agreement.share)))
    share, accuracy = ((100 * part).tolist() for part in (agreement.share, agreement.accuracy))
    axes.bar(counts, share, color=GREY, alpha=0.5, width=0.6, label="share of the images")
    axes.plot(counts, accuracy, color=BLUE, marker="o", label="accuracy among them")
    if len(counts) <= _MOST_LABELS:
        axes.set_xticks(counts, [f"{n}\n{part:.1f} %" for n, part in zip(counts, share, strict=True)])
    else:
        axes.locator_params(axis="x", integer=True)
    axes.set_ylim(0, 125)
    axes.set_yticks(range(0, 101, 20))
    axes.legend(frameon=False, loc="upper left", ncols=2)
    return axes


def draw_reliability(error: CalibrationError, axes: Axes | None = None) -> Axes:
    """Draw the accuracy of each bin over its mean confidence, against the diagonal; the area of a dot is its count.

    Reference: Coded ResNeXt (2022), appendix C.
    """
    title = f"Reliability: ECE {100 * error.ece:.2f} %, MCE {100 * error.mce:.2f} %"
    axes = _prepared(axes, title, "confidence", "accuracy")
    axes.set_title(title, loc="left", pad=14)  # the largest dot reaches beyond the axes
    axes.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1)
    filled = error.count > 0
    confidence, accuracy = error.confidence[filled].tolist(), error.accuracy[filled].tolist()
    axes.plot(confidence, accuracy, color=BLUE, alpha=0.5)
    sizes = (12 + 240 * error.count[filled] / error.count.sum()).tolist()
    axes.scatter(confidence, accuracy, s=sizes, color=BLUE, linewidths=0, clip_on=False)
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    return axes


def draw_calibration(table: CalibrationTable, axes: Axes | None = None) -> Axes:
    """Draw the errors of both calibrators for every split, and their means.

    Reference: Coded ResNeXt (2022), Table 6.
    """
    axes = _prepared(axes, "Calibration over random splits", None, "error in %")
    names = ["ECE, $h_T$", "ECE, $h_{aug}$", "MCE, $h_T$", "MCE, $h_{aug}$"]
    columns = [100 * part[:, method] for part in (table.ece, table.mce) for method in (0, 1)]
    for x, column in enumerate(columns):
        colour = GREY if x % 2 == 0 else BLUE
        offsets = [x + 0.3 * ((7 * i) % 11 / 10 - 0.5) for i in range(len(column))]  # side by side, not on one line
        axes.scatter(offsets, column.tolist(), s=10, color=colour, alpha=0.5, linewidths=0)
        mean = float(column.mean())
        axes.hlines(mean, x - 0.28, x + 0.28, color=colour, linewidth=2)
        axes.annotate(f"{mean:.2f}", (x + 0.3, mean), va="center", fontsize=8)
    axes.set_xticks(range(4), names)
    axes.set_xlim(-0.5, 3.8)
    axes.set_yscale("symlog", linthresh=1)  # MCE is many times ECE, and either can be 0
    axes.set_ylim(0, 100)
    ticks = [0, 0.5, 1, 2, 5, 10, 20, 50, 100]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
    axes.set_yticks([], minor=True)
    return axes


def draw_binary(
    reports: Mapping[int, BinaryReport], axes: Axes | None = None, *, names: Sequence[str] | None = None
) -> Axes:
    """Draw precision over recall of the networks for one class, a dot each.

    Args:
        reports: As `surgery_coded.binary_reports` returns them.
        axes: Where to draw.
        names: Names of all classes; default: their indices.

    Raises:
        InvalidOption: If there is no report, or a class has no name.

    Reference: Coded ResNeXt (2022), Fig. 2b, 2c and 8.
    """
    if not reports or (names is not None and len(names) <= max(reports)):
        raise InvalidOption(
            f"draw_binary: found reports of classes {list(reports)} and {'no' if names is None else len(names)} names, "
            "expected a report or more and the names of all classes, or none"
        )
    axes = _prepared(axes, "Networks for one class", "recall", "precision")
    recall, precision = [r.recall for r in reports.values()], [r.precision for r in reports.values()]
    axes.scatter(recall, precision, s=18, color=BLUE, alpha=0.8, linewidths=0)
    labels: dict[tuple[float, float], list[int]] = {}  # classes at one place share a label
    for k, r in reports.items():
        labels.setdefault((round(r.recall, 2), round(r.precision, 2)), []).append(k)
    for classes in labels.values() if len(reports) <= 20 else ():
        text = ", ".join(str(k) if names is None else names[k] for k in classes)
        place = (reports[classes[0]].recall, reports[classes[0]].precision)
        axes.annotate(text, place, xytext=(4, 4), textcoords="offset points", fontsize=8)
    low = max(0.0, min([*recall, *precision]) - 0.05)
    axes.set(xlim=(low, 1.0 + (1 - low) * 0.06), ylim=(low, 1.0 + (1 - low) * 0.06))
    return axes


def _prepared(axes: Axes | None, title: str, xlabel: str | None, ylabel: str | None, height: float = 3.6) -> Axes:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MatplotlibMissing(
            "surgery_coded.figures: found no matplotlib, expected the extra 'plots'; pip install 'surgery[plots]'"
        ) from error
    if axes is None:
        axes = Figure(figsize=(6, height), dpi=150, layout="constrained").subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, loc="left")
    axes.set_xlabel(xlabel or "")
    axes.set_ylabel(ylabel or "")
    return axes
