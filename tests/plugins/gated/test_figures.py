"""The figures show the numbers that they are given, and stay readable for few and many gates."""

from __future__ import annotations

import sys

import matplotlib as mpl
import pytest

from surgery.curves import MatplotlibMissing
from surgery.errors import InvalidOption
from surgery_gated import figures
from surgery_gated.usage import Usage

RATES = {"layer1.0": (1.0, 0.96, 0.5), "layer2.0": (0.0, 0.04, 0.5)}


def usage(rates):
    return Usage(100, "Threshold(tau=0.5)", rates, rates, 1e9, 2e9, None)


def made_up(blocks, gates):
    return {f"features.{n}.conv": tuple((7 * n + 3 * g) % 11 / 10 for g in range(gates)) for n in range(blocks)}


ALL = [
    (figures.draw_rates, [RATES, RATES]),
    (figures.draw_polarization, usage(RATES)),
    (figures.draw_layer_rates, usage(RATES)),
]


@pytest.mark.parametrize(("draw", "data"), ALL, ids=lambda value: getattr(value, "__name__", ""))
def test_figures_are_written_and_leave_matplotlib_as_it_was(draw, data, tmp_path):
    before = dict(mpl.rcParams)
    figure = draw(data, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert len(figure.axes) == 1
    assert dict(mpl.rcParams) == before


def test_lines_are_the_means_of_the_gates_of_a_block(tmp_path):
    """(1 + 0.96 + 0.5) / 3 = 0.82 and (0 + 0.04 + 0.5) / 3 = 0.18, after 0.3 and 1 for one gate each."""
    history = [{"layer1.0": [0.3], "layer2.0": [1.0]}, RATES]
    for epochs, times in ((None, [1, 2]), ([0.5, 10], [0.5, 10])):
        axes = figures.draw_rates(history, tmp_path / "rates.png", epochs=epochs).axes[0]
        assert [list(line.get_xdata()) for line in axes.lines] == [times, times]
        found = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
        assert found == {"layer1.0": pytest.approx([30, 82]), "layer2.0": pytest.approx([100, 18])}


def test_bars_of_the_histogram_are_numbers_of_gates(tmp_path):
    """0 and 0.04 in the first of 20 bins, 0.96 and 1 in the last one, 0.5 twice in the eleventh."""
    axes = figures.draw_polarization(usage(RATES), tmp_path / "polarization.png").axes[0]
    heights = [bar.get_height() for bar in axes.patches]
    assert {n: height for n, height in enumerate(heights) if height} == {0: 2, 10: 2, 19: 2}
    assert len(heights) == 20
    texts = " ".join(text.get_text() for text in axes.texts)
    assert "on 33 %, off 33 %, between 33 % of the gates" in texts
    assert "33 % at their mode" in texts  # the gates of 0 and 1


def test_blocks_are_bars_of_means_and_gates_are_dots(tmp_path):
    axes = figures.draw_layer_rates(usage(RATES), tmp_path / "blocks.png").axes[0]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([82, 18])
    assert [dots.get_offsets()[:, 0].tolist() for dots in axes.collections] == [[100, 96, 50], [0, 4, 50]]
    assert all(abs(y - row) < 0.35 for row, dots in enumerate(axes.collections) for _, y in dots.get_offsets())
    assert axes.lines[0].get_xdata()[0] == pytest.approx(50)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["layer1.0  82.0 %", "layer2.0  18.0 %"]
    assert not figures.draw_layer_rates(usage(made_up(3, 1)), tmp_path / "blocks.png").axes[0].collections


def shown(axis):
    low, high = sorted(axis.get_view_interval())
    places = zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
    return [label for place, label in places if low <= place <= high]


@pytest.mark.parametrize(("blocks", "gates"), [(1, 1), (3, 1), (16, 1), (33, 1), (16, 46)])
def test_texts_keep_apart_and_legends_stay_outside(blocks, gates, tmp_path):
    rates = made_up(blocks, gates)
    for figure, axis in (
        (figures.draw_rates([rates] * 40, tmp_path / "rates.png"), "x"),
        (figures.draw_polarization(usage(rates), tmp_path / "polarization.png"), "x"),
        (figures.draw_layer_rates(usage(rates), tmp_path / "blocks.png"), "y"),
    ):
        axes = figure.axes[0]
        boxes = [label.get_window_extent() for label in shown(axes.xaxis if axis == "x" else axes.yaxis)]
        boxes += [text.get_window_extent() for text in (axes.title, axes._left_title, *axes.texts) if text.get_text()]
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
        for legend in figure.legends:
            boxes.append(legend.get_window_extent())
            assert not boxes[-1].overlaps(axes.get_window_extent())
            assert len(legend.get_texts()) >= 1
        page = figure.bbox
        assert all(b.x0 >= 0 and b.y0 >= 0 and b.x1 <= page.x1 and b.y1 <= page.y1 for b in boxes if b.width)
        assert axes.bbox.width > 0.5 * page.width


def test_what_cannot_be_drawn_is_refused(tmp_path):
    path = tmp_path / "rates.png"
    for history, epochs in (([], None), ([{}], None), ([RATES], [1, 2]), ([RATES, {"layer1.0": [0.5]}], None)):
        with pytest.raises(InvalidOption, match="draw_rates: found"):
            figures.draw_rates(history, path, epochs=epochs)
    assert not path.exists()


def test_without_matplotlib_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MatplotlibMissing, match=r"pip install 'surgery\[plots\]'"):
        figures.draw_polarization(usage(RATES), tmp_path / "polarization.png")
