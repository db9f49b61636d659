"""The figures show the connections that they are given, and stay readable for few and many branches."""

from __future__ import annotations

import sys

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgba
from matplotlib.patches import Circle, Rectangle
from matplotlib.quiver import Quiver

from surgery.curves import MatplotlibMissing
from surgery.errors import InvalidOption
from surgery_masked import figures
from surgery_masked.connections import Connections


def pair(producer, consumer, *rows):
    """Return the connections whose branch j reads the branch `rows[j]` most."""
    active = torch.eye(3, dtype=torch.bool)[list(rows)]
    return Connections(producer, consumer, 0.25 + 0.25 * active.double(), active)


# c reads b0, b0 and b2; b1 is unused, and so is a0, which b1 alone reads; nobody reads a2.
CHAIN = [pair("a", "b", 1, 0, 1), pair("b", "c", 0, 0, 2)]
BEHIND = [pair("x", "y", 2, 2, 2)]


def made_up(branches, blocks, fan_in, name="layer{}"):
    masks = torch.rand(blocks - 1, branches, branches, dtype=torch.float64).square()
    masks /= masks.sum(dim=-1, keepdim=True)
    active = torch.zeros_like(masks, dtype=torch.bool).scatter(-1, masks.topk(fan_in).indices, True)
    paths = [name.format(n) for n in range(blocks)]
    return [Connections(*both) for both in zip(paths, paths[1:], masks, active, strict=False)]


def arrows(axes):
    """Return the arrows as (row, column, next row, column); a circle is in the middle column, which is 1 of 0 to 2."""
    (quiver,) = (found for found in axes.collections if isinstance(found, Quiver))
    rows = axes.get_yticks()
    found = set()
    for x, y, dx, dy in zip(quiver.X, quiver.Y, quiver.U, quiver.V, strict=True):
        ends = [(int(np.abs(rows - at_y).argmin()), round(float(at_x))) for at_x, at_y in ((x, y), (x + dx, y + dy))]
        found.add((*ends[0], *ends[1]))
    assert len(found) == quiver.N
    return found


def columns(axes, colour):
    """Return (row, column) of the squares of a colour."""
    centres = [
        (square.get_y() + square.get_height() / 2, square.get_x() + square.get_width() / 2)
        for square in axes.patches
        if isinstance(square, Rectangle) and square.get_facecolor() == to_rgba(colour)
    ]
    return {(int(np.abs(axes.get_yticks() - y).argmin()), round(x)) for y, x in centres}


def texts(labels):
    return [label.get_text() for label in labels]


def test_arrows_are_the_connections_of_used_branches_and_the_others_are_grey(tmp_path):
    """Rows: stem, a, b, c, classifier.

    The stem feeds a1; b0 and b2 read a1; c reads b0, b0, b2; the classifier reads all three: 1 + 2 + 3 + 3 = 9 arrows.
    """
    (axes,) = figures.draw_connections(CHAIN, tmp_path / "figure.png", reference=False).axes
    into_c = {(2, 0, 3, 0), (2, 0, 3, 1), (2, 2, 3, 2)}
    into_classifier = {(3, 0, 4, 1), (3, 1, 4, 1), (3, 2, 4, 1)}
    assert arrows(axes) == {(0, 1, 1, 1), (1, 1, 2, 0), (1, 1, 2, 2)} | into_c | into_classifier
    assert columns(axes, figures.LIGHT) == {(1, 0), (1, 2), (2, 1)}
    assert columns(axes, figures.BLUE) == {(1, 1), (2, 0), (2, 2), (3, 0), (3, 1), (3, 2)}
    assert sum(isinstance(patch, Circle) for patch in axes.patches) == 2
    assert axes.get_title() == "K = 1, 6 of 9 used"


def test_rows_are_labelled_from_top_to_bottom(tmp_path):
    figure = figures.draw_connections(CHAIN, tmp_path / "figure.png", title="a title")
    left, right = figure.axes
    assert texts(left.get_yticklabels()) == ["stem", "a", "b", "c", "classifier"]
    assert texts(right.child_axes[0].get_yticklabels()) == ["", "used 1/3", "used 2/3", "used 3/3", ""]
    heights = [left.transData.transform((0, y))[1] for y in left.get_yticks()]
    assert heights == sorted(heights, reverse=True)
    assert figure.get_suptitle() == "a title"


def test_the_reference_has_every_connection(tmp_path):
    """3 from the stem, 3 x 3 twice, 3 into the classifier."""
    reference, learned = figures.draw_connections(CHAIN, tmp_path / "figure.png").axes
    assert len(arrows(reference)) == 3 + 9 + 9 + 3
    assert not columns(reference, figures.LIGHT)
    assert len(columns(reference, figures.BLUE)) == 9
    assert len(arrows(learned)) == 9


def test_chains_are_joined_in_a_circle(tmp_path):
    """Behind the 9 arrows of the first chain: one into x2, three into y, three out of it."""
    (axes,) = figures.draw_connections(CHAIN + BEHIND, tmp_path / "figure.png", reference=False).axes
    assert texts(axes.get_yticklabels()) == ["stem", "a", "b", "c", "joined", "x", "y", "classifier"]
    assert sum(isinstance(patch, Circle) for patch in axes.patches) == 3
    assert {(4, 1, 5, 2), (5, 2, 6, 0), (5, 2, 6, 1), (5, 2, 6, 2)} < arrows(axes)
    assert len(arrows(axes)) == 9 + 1 + 3 + 3


def test_arrows_touch_the_rims_of_what_they_connect(tmp_path):
    (axes,) = figures.draw_connections(CHAIN, tmp_path / "figure.png", reference=False).axes
    (quiver,) = (found for found in axes.collections if isinstance(found, Quiver))
    for x, y in (*zip(quiver.X, quiver.Y, strict=True), *zip(quiver.X + quiver.U, quiver.Y + quiver.V, strict=True)):
        circles = [patch for patch in axes.patches if isinstance(patch, Circle)]
        squares = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
        on_circle = [np.hypot(x - c.center[0], y - c.center[1]) == pytest.approx(c.radius) for c in circles]
        middles = [(s.get_x() + s.get_width() / 2, s.get_y() + n * s.get_height()) for s in squares for n in (0, 1)]
        assert sum(on_circle) + sum((x, y) == pytest.approx(middle) for middle in middles) == 1


def test_lines_are_the_branches_used_by_depth(tmp_path):
    """CHAIN uses 1, 2 and 3 branches; reading everything uses 3 each."""
    everything = [Connections(c.producer, c.consumer, c.real, torch.ones_like(c.active)) for c in CHAIN]
    (axes,) = figures.draw_active({"K = 1": CHAIN, "K = 3": everything}, tmp_path / "figure.png").axes
    found = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}
    assert found == {"K = 1": ([1, 2, 3], [1, 2, 3]), "K = 3": ([1, 2, 3], [3, 3, 3])}
    assert list(axes.get_yticks()) == [0, 1, 2, 3]
    assert axes.get_ylim()[0] == 0
    assert 3 <= axes.get_ylim()[1] < 3.5
    assert texts(axes.get_xticklabels()) == ["a", "b", "c"]


def test_networks_of_different_blocks_are_numbered(tmp_path):
    """CHAIN uses 1, 2 and 3; of BEHIND, y is whole and reads x2 alone."""
    (axes,) = figures.draw_active({"one": CHAIN, "other": BEHIND}, tmp_path / "figure.png").axes
    assert [list(line.get_ydata()) for line in axes.lines] == [[1, 2, 3], [1, 3]]
    assert texts(shown(axes.xaxis)) == ["1", "2", "3"]


def test_heat_maps_are_the_real_masks_and_dots_the_active_entries(tmp_path):
    *panels, _ = figures.draw_masks(CHAIN, tmp_path / "figure.png").axes
    for axes, connections in zip(panels, CHAIN, strict=True):
        assert np.array_equal(axes.images[0].get_array(), connections.real.numpy())
        assert axes.images[0].get_clim() == (0, 2 / 3)  # twice 1 / C, above the largest entry
        dots = {(round(y), round(x)) for x, y in axes.collections[0].get_offsets().tolist()}
        assert dots == set(map(tuple, connections.active.nonzero().tolist()))
        assert axes.get_title() == f"{connections.producer}\nto {connections.consumer}"


def shown(axis):
    low, high = sorted(axis.get_view_interval())
    places = zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
    return [label for place, label in places if low <= place <= high]


@pytest.mark.parametrize(
    ("branches", "blocks", "fan_in", "name"),
    [(4, 3, 1, "layer{}"), (8, 9, 4, "layer1.{}"), (8, 16, 1, "features.stage3.unit{}"), (32, 16, 16, "layer1.{}")],
)
def test_texts_keep_apart_and_on_the_page(branches, blocks, fan_in, name, tmp_path):
    connections = made_up(branches, blocks, fan_in, name)
    for figure in (
        figures.draw_connections(connections, tmp_path / "connections.png", title="Connections"),
        figures.draw_connections(connections, tmp_path / "connections.png", reference=False),
        figures.draw_active({"one": connections, "two": connections}, tmp_path / "active.png"),
        figures.draw_masks(connections, tmp_path / "masks.png"),
    ):
        labels = [figure._suptitle, figure._supxlabel, figure._supylabel]
        for axes in [found for panel in figure.axes for found in (panel, *panel.child_axes)]:
            labels += [axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label]
            labels += shown(axes.xaxis) + shown(axes.yaxis)
        boxes = [label.get_window_extent() for label in labels if label is not None and label.get_text()]
        boxes += [legend.get_window_extent() for legend in figure.legends]
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
        page = figure.bbox
        assert all(b.x0 >= 0 and b.y0 >= 0 and b.x1 <= page.x1 and b.y1 <= page.y1 for b in boxes)


ALL = [(figures.draw_connections, CHAIN), (figures.draw_active, {"one": CHAIN}), (figures.draw_masks, CHAIN)]


@pytest.mark.parametrize(("draw", "data"), ALL, ids=lambda value: getattr(value, "__name__", ""))
def test_figures_are_written_and_leave_matplotlib_as_it_was(draw, data, tmp_path):
    before = dict(mpl.rcParams)
    draw(data, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert dict(mpl.rcParams) == before


@pytest.mark.parametrize(
    ("draw", "data", "where"),
    [
        (figures.draw_connections, [], "draw_connections"),
        (figures.draw_active, {}, "draw_active"),
        (figures.draw_active, {"one": CHAIN, "other": []}, "draw_active: other"),
        (figures.draw_masks, [], "draw_masks"),
    ],
)
def test_nothing_to_draw_is_refused(draw, data, where, tmp_path):
    with pytest.raises(InvalidOption, match=f"^{where}: found nothing to draw"):
        draw(data, tmp_path / "figure.png")
    assert not (tmp_path / "figure.png").exists()


@pytest.mark.parametrize(("draw", "data"), ALL, ids=lambda value: getattr(value, "__name__", ""))
def test_without_matplotlib_the_extra_is_named(draw, data, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MatplotlibMissing, match=r"pip install 'surgery\[plots\]'"):
        draw(data, tmp_path / "figure.png")
