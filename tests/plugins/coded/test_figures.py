"""The figures show the numbers that they are given."""

from __future__ import annotations

import io
import sys
from dataclasses import replace

import matplotlib as mpl
import pytest
import torch
from matplotlib.figure import Figure

from surgery.errors import InvalidOption
from surgery_coded import BinaryReport, figures
from surgery_coded.analysis import Agreement, Collected
from surgery_coded.calibration import CalibrationTable
from surgery_coded.probes import OutputDistribution, RemovalAccuracy
from surgery_coded.reliability import calibration_error

NAN = float("nan")
COLLECTED = Collected(
    torch.eye(4),
    torch.tensor([0, 1, 2, 0]),
    {},
    {"layer2.0": torch.tensor([0, 0, 0, 1]), "layer3.0": torch.tensor([0, 1, 2, 1])},
)
REMOVAL = RemovalAccuracy("layer2.0", {0: 0.9, 1: 0.5}, {0: 0.9, 1: 0.8, 2: 0.7})
OUTPUTS = OutputDistribution("layer2.0", torch.tensor([0.0, 2.0, 4.0]), torch.tensor([[3, 1]]), torch.tensor([[5, 0]]))
AGREEMENT = Agreement(torch.tensor([0, 1, 3]), torch.tensor([0.0, 0.25, 0.75]), torch.tensor([NAN, 0.0, 1.0]))
ERROR = calibration_error(torch.tensor([0.4, 0.3, 0.9], dtype=torch.float64), torch.tensor([True, False, True]), bins=5)
TABLE = CalibrationTable(torch.tensor([[0.01, 0.02], [0.03, 0.02]]), torch.tensor([[0.1, 0.2], [0.3, 0.0]]))
REPORTS = {3: BinaryReport(0.0, 0.9, 0.8, 0.85), 7: BinaryReport(0.0, 0.5, 1.0, 0.67)}
ALL = [
    (figures.draw_decoders, COLLECTED),
    (figures.draw_removal, REMOVAL),
    (figures.draw_output_distribution, OUTPUTS),
    (figures.draw_agreement, AGREEMENT),
    (figures.draw_reliability, ERROR),
    (figures.draw_calibration, TABLE),
    (figures.draw_binary, REPORTS),
]


@pytest.mark.parametrize(("draw", "data"), ALL, ids=lambda value: getattr(value, "__name__", ""))
def test_figures_draw_into_the_given_axes_and_leave_matplotlib_as_it_was(draw, data, tmp_path):
    before = dict(mpl.rcParams)
    axes = Figure().subplots(1, 2)[1]
    assert draw(data, axes) is axes
    draw(data).figure.savefig(tmp_path / "own.png")
    assert (tmp_path / "own.png").read_bytes().startswith(b"\x89PNG")
    assert dict(mpl.rcParams) == before


def test_bars_are_the_accuracies_of_the_decoders():
    """Decoders right in 1 and 3 of 4 samples; the network in 3 of 4."""
    axes = figures.draw_decoders(COLLECTED)
    assert [bar.get_width() for bar in axes.patches] == [25.0, 75.0]
    assert axes.lines[0].get_xdata()[0] == 75.0
    assert [label.get_text() for label in axes.get_yticklabels()] == ["layer2.0  25.0 %", "layer3.0  75.0 %"]


def assert_labels_keep_apart(axes, which):
    """No label of an axis touches its neighbor or leaves the figure."""
    axes.figure.savefig(io.BytesIO())
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = sorted(axis.get_view_interval())
    shown = [
        label for place, label in zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True) if low <= place <= high
    ]
    boxes = [label.get_window_extent() for label in shown]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(box.x0 >= 0 and box.y0 >= 0 for box in boxes)
    return [label.get_text() for label in shown]


@pytest.mark.parametrize("count", [1, 4, 8, 11, 39])
def test_labels_keep_apart_however_many_blocks_there_are(count):
    decoded = {f"trunk_output.block3.block3-{i}": torch.tensor([0, 1, 2, 1]) for i in range(count)}
    axes = figures.draw_decoders(replace(COLLECTED, decoded=decoded))
    assert len(assert_labels_keep_apart(axes, "y")) == count
    assert axes.bbox.width > 0.55 * axes.figure.bbox.width
    assert axes._left_title.get_window_extent().x1 < axes.figure.bbox.width
    share = torch.full((count + 1,), 1 / (count + 1), dtype=torch.float64)
    labels = assert_labels_keep_apart(figures.draw_agreement(Agreement(share, share, share)), "x")
    assert ("%" in labels[0]) == (count <= 8)
    labels = assert_labels_keep_apart(
        figures.draw_removal(RemovalAccuracy("b", {0: 0.9}, dict.fromkeys(range(count), 1))), "x"
    )
    assert all(label.isdigit() for label in labels)


def test_what_cannot_be_drawn_is_refused():
    nothing = torch.zeros(1, 2)
    for call, message in (
        (
            lambda: figures.draw_output_distribution(replace(OUTPUTS, active=nothing, inactive=nothing)),
            "no output counted",
        ),
        (lambda: figures.draw_binary({}), r"reports of classes \[\]"),
        (lambda: figures.draw_binary(REPORTS, names=["a"] * 7), r"classes \[3, 7\] and 7 names"),
        (lambda: figures.draw_binary(REPORTS, names=[]), "0 names"),
    ):
        with pytest.raises(InvalidOption, match=message):
            call()


def test_lines_are_the_accuracies_without_the_branches():
    lines = {line.get_label(): line.get_xydata().tolist() for line in figures.draw_removal(REMOVAL).lines}
    assert lines["active for the class"] == [[0, 90], [1, 50]]
    assert lines["inactive for the class"] == [[0, 90], [1, 80], [2, 70]]


def test_outputs_are_drawn_as_densities_on_a_logarithmic_axis():
    """Three of four values in a bin of width 2: 3 / 4 / 2 = 0.375."""
    axes = figures.draw_output_distribution(OUTPUTS)
    assert axes.get_yscale() == "log"
    assert [stairs.get_data().values.tolist() for stairs in axes.patches] == [[0.5, 0.0], [0.375, 0.125]]


def test_agreement_shows_share_and_accuracy():
    axes = figures.draw_agreement(AGREEMENT)
    assert [bar.get_height() for bar in axes.patches] == [0.0, 25.0, 75.0]
    assert axes.lines[0].get_ydata().tolist() == pytest.approx([NAN, 0.0, 100.0], nan_ok=True)


def test_reliability_leaves_empty_bins_out():
    points = figures.draw_reliability(ERROR).collections[0].get_offsets().tolist()
    assert [point[1] for point in points] == [0.5, 1.0]
    assert [point[0] for point in points] == pytest.approx([0.35, 0.9])


def test_calibration_shows_every_split_and_the_means():
    axes = figures.draw_calibration(TABLE)
    heights = [column.get_offsets()[:, 1].tolist() for column in axes.collections[::2]]
    assert heights == [pytest.approx(h) for h in ([1, 3], [2, 2], [10, 30], [20, 0])]
    assert [text.get_text() for text in axes.texts] == ["2.00", "2.00", "20.00", "10.00"]


def test_binary_networks_are_dots_of_recall_and_precision():
    names = [f"class {k}" for k in range(8)]
    axes = figures.draw_binary(REPORTS, names=names)
    assert axes.collections[0].get_offsets().tolist() == [[0.8, 0.9], [1.0, 0.5]]
    assert [text.get_text() for text in axes.texts] == ["class 3", "class 7"]


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(figures.MatplotlibMissing, match=r"pip install 'surgery\[plots\]'"):
        figures.draw_removal(REMOVAL)
