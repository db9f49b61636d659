"""The figure of `surgery.curves`: accuracy over MACs and over milliseconds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from surgery.curves import Curve, MatplotlibMissing, Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DESCRIBING = ("method", "network", "data", "input_size", "device", "threads", "batch")
_COLOURS, _MARKERS, _LINES = 10, "osD^vPX", ("-", "--", ":")
# Where a label stands beside its point: offset in points, horizontal and vertical alignment.
_PLACES = (
    ((0, 6), "center", "bottom"),
    ((0, -6), "center", "top"),
    ((-4, 4), "right", "bottom"),
    ((4, -4), "left", "top"),
)


def panels(curves: Sequence[Curve]) -> Figure:
    """Return a new figure of both panels, with the legend below them.

    Raises:
        MatplotlibMissing: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MatplotlibMissing(
            "surgery.curves: found no matplotlib, expected the extra 'plots'; pip install 'surgery[plots]'"
        ) from error
    differing = [name for name in _DESCRIBING if len({getattr(curve, name) for curve in curves}) > 1]
    figure = Figure(figsize=(10, 4.2 + 0.1 * len(curves)), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    scale, unit = _unit(point.macs for curve in curves for point in curve.points)
    batches = {curve.batch for curve in curves if any(point.milliseconds is not None for point in curve.points)}
    images = f"a batch of {batches.pop()}" if len(batches) == 1 else "a batch"
    left.set(xlabel=f"multiply-adds of an image in {unit}", ylabel=f"{curves[0].metric} in %")
    right.set(xlabel=f"milliseconds of {images}")
    drawn = [_panel(left, curves, differing, lambda point: point.macs / scale)]
    drawn.append(_panel(right, curves, differing, lambda point: point.milliseconds))
    common = [_described(curves[0], name) for name in _DESCRIBING if name not in differing]
    figure.suptitle(", ".join(text for text in common if text), fontsize=10, x=0.01, ha="left")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower left", ncols=2, frameon=False, fontsize=8)
    figure.draw_without_rendering()  # labels can be placed only once the layout is
    figure.set_layout_engine("none")
    for axes, labels in zip((left, right), drawn, strict=True):
        _place(axes, labels)
    return figure


def _panel(
    axes: Axes, curves: Sequence[Curve], differing: Sequence[str], measured: Callable[[Point], float | None]
) -> list[tuple[float, float, str, str]]:
    """Draw one panel and return (x, y, text, colour) of the labels that its points would have."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.margins(0.1)
    labels: list[tuple[float, float, str, str]] = []
    drawn = 0
    for index, curve in enumerate(curves):
        shown = [point for point in curve.points if point.accuracy is not None and measured(point) is not None]
        xs, ys = [measured(point) or 0.0 for point in shown], [100 * (point.accuracy or 0.0) for point in shown]
        spread = [100 * (point.deviation or 0.0) for point in shown] if any(p.deviation for p in shown) else None
        colour = f"C{index % _COLOURS}"
        axes.errorbar(
            xs,
            ys,
            spread,
            color=colour,
            linestyle=_LINES[index // _COLOURS % len(_LINES)],
            marker=_MARKERS[index % len(_MARKERS)],
            markersize=5,
            label=_name(curve, differing),
        )
        texts = [_setting(point, _knobs(curve)) for point in shown]
        labels += [(x, y, text, colour) for x, y, text in zip(xs, ys, texts, strict=True) if text]
        drawn += len(shown)
    if not drawn:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color="grey")
        axes.set_xticks([])
    return labels


def _place(axes: Axes, labels: Iterable[tuple[float, float, str, str]]) -> None:
    """Write each label at the first place beside its point that is free, or nowhere."""
    from matplotlib.transforms import Bbox

    inside, labels = axes.get_window_extent(), list(labels)
    lines = [axes.transData.transform_path(line.get_path()) for line in axes.lines if len(line.get_path())]
    taken = [Bbox.from_bounds(x - 6, y - 6, 12, 12) for line in lines for x, y in np.asarray(line.vertices)]
    for x, y, text, colour in labels:
        for offset, across, along in _PLACES:
            label = axes.annotate(
                text, (x, y), offset, textcoords="offset points", ha=across, va=along, fontsize=7, color=colour
            )
            box = label.get_window_extent()
            outside = box.x0 < inside.x0 or box.x1 > inside.x1
            crossed = outside or any(line.intersects_bbox(box, filled=False) for line in lines)
            if not crossed and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            label.remove()


def _unit(macs: Iterable[float]) -> tuple[float, str]:
    most = max(macs)
    return (1e9, "billions") if most >= 1e9 else (1e6, "millions") if most >= 1e6 else (1e3, "thousands")


def _knobs(curve: Curve) -> list[str]:
    """Return the names of the settings that change along a curve; all of them where there is one point."""
    names = dict.fromkeys(name for point in curve.points for name in point.setting)
    first = curve.points[0].setting
    changing = [name for name in names if any(p.setting.get(name) != first.get(name) for p in curve.points)]
    return list(names) if len(curve.points) == 1 else changing


def _setting(point: Point, knobs: Sequence[str]) -> str:
    values = {name: point.setting[name] for name in knobs if name in point.setting}
    texts = {name: f"{value:g}" if isinstance(value, float) else str(value) for name, value in values.items()}
    return ", ".join(texts.values() if len(knobs) == 1 else (f"{name} {text}" for name, text in texts.items()))


def _name(curve: Curve, differing: Sequence[str]) -> str:
    parts = [_described(curve, name) for name in differing]
    name = ", ".join(part for part in parts if part) or _described(curve, "method")
    knobs = _knobs(curve)
    return f"{name} (labels: {knobs[0]})" if len(knobs) == 1 else name


def _described(curve: Curve, name: str) -> str:
    value = getattr(curve, name)
    if name == "method":
        return value or "as it is"
    if value is None:
        return ""
    texts = {"input_size": "{0[1]} x {0[2]} px", "threads": f"{{}} thread{'s' * (value != 1)}", "batch": "batch {}"}
    return texts.get(name, "{}").format(value)
