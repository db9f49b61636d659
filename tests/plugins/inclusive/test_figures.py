"""The figures show the numbers that they are given, and stay readable for few and many of them."""

from __future__ import annotations

import sys

import matplotlib as mpl
import pytest
import torch
from matplotlib.colors import to_hex

from surgery.curves import MatplotlibMissing
from surgery.errors import InvalidOption
from surgery_inclusive import figures
from surgery_inclusive.levels import Choice, choose_levels
from surgery_inclusive.series import Series

THIN = Series("thin", ((1e7, 0.125, 0.01), (2e7, 0.0625, 0.02)))
ALONE = Series("thin", ((1e7, 0.25), (2e7, 0.125)), joint=False)
SHALLOW = Series("shallow", ((1e7, 0.5), (3e7, 0.25)))
PLAIN = Series("ResNeXt", ((4e7, 0.5),))
NORMS = {
    "inclusive": {"layer1.0": torch.tensor([3.0, 2.0]), "layer2.0": torch.tensor([4.0, 1.0])},
    "source": {"layer1.0": torch.tensor([2.0, 2.5])},
}
ACCURACY = torch.tensor([[0.25, 0.5], [0.5, 0.75], [0.625, 0.875]], dtype=torch.float64)
MACS = (1e9, 2e9, 3e9)
NAMES = ("class", "group")


def lines(axes):
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}


def drawn(axes):
    """Return the line and the length of the bars of every series."""
    return {
        container.get_label(): (container[0], [high[1] - low[1] for low, high in container[2][0].get_segments()])
        if container.has_yerr
        else (container[0], [])
        for container in axes.containers
    }


def shown(axis):
    low, high = sorted(axis.get_view_interval())
    places = zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
    return [label for place, label in places if low <= place <= high]


def texts(labels):
    return [label.get_text() for label in labels]


def legend(figure):
    (found,) = figure.legends
    return texts(found.get_texts())


# --- errors ---


def test_a_line_is_the_errors_of_a_series_over_its_multiply_adds(tmp_path):
    """In % over millions; bars reach a standard deviation up and down."""
    (axes,) = figures.draw_errors([THIN, SHALLOW], tmp_path / "figure.png").axes
    found = drawn(axes)
    assert list(found) == ["thin", "shallow"]
    assert [list(values) for values in found["thin"][0].get_data()] == [[10, 20], [12.5, 6.25]]
    assert found["thin"][1] == pytest.approx([2, 4])
    assert [list(values) for values in found["shallow"][0].get_data()] == [[10, 30], [50, 25]]
    assert found["shallow"][1] == []
    assert axes.get_xlabel() == "multiply-adds of an image in millions"
    assert axes.get_ylabel() == "error in %"


def test_jointly_trained_is_solid_and_solely_trained_dashed_in_the_same_colour(tmp_path):
    figure = figures.draw_errors([THIN, ALONE, SHALLOW], tmp_path / "figure.png")
    both = [line for line, _ in drawn(figure.axes[0]).values()]
    assert [line.get_linestyle() for line in both] == ["-", "--", "-"]
    colours = [to_hex(line.get_color()) for line in both]
    assert colours[0] == colours[1] != colours[2]
    assert legend(figure) == ["thin, jointly trained", "thin, solely trained", "shallow, jointly trained"]


def test_how_it_was_trained_is_not_said_where_all_were_trained_alike(tmp_path):
    figure = figures.draw_errors([THIN, SHALLOW], tmp_path / "figure.png", title="CIFAR-10")
    assert legend(figure) == ["thin", "shallow"]
    assert figure.axes[0].get_title(loc="left") == "CIFAR-10"


def test_a_network_of_one_budget_is_a_point_without_a_line(tmp_path):
    (axes,) = figures.draw_errors([THIN, PLAIN], tmp_path / "figure.png").axes
    line, _ = drawn(axes)["ResNeXt"]
    assert [list(values) for values in line.get_data()] == [[40], [50]]
    assert line.get_linestyle() == "None"
    assert line.get_marker() not in ("None", drawn(axes)["thin"][0].get_marker())


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (9.1e6, 5.2e7, ["10", "20", "50"]),
        (1e6, 1.5e9, ["0.001", "0.01", "0.1", "1"]),
        (9e6, 1.2e8, ["10", "30", "100"]),
        (3.1e6, 3.2e6, None),
    ],
)
def test_a_logarithmic_axis_has_a_few_ticks_written_in_full(low, high, ticks, tmp_path):
    series = [Series("thin", ((low, 0.5), (high, 0.25)))]
    (axes,) = figures.draw_errors(series, tmp_path / "figure.png", scale="log").axes
    assert axes.get_xscale() == "log"
    found = texts(shown(axes.xaxis))
    assert found == ticks or (ticks is None and len(found) >= 3)
    assert len(set(found)) == len(found)
    assert len(axes.xaxis.get_minorticklocs()) == 0


@pytest.mark.parametrize(
    ("point", "shown_as"),
    [
        ((1e6,), "1000000.0"),
        ((1e6, 0.1, 0.1, 0.1), "1000000.0"),
        ((0, 0.1), "0, 0.1"),
        ((float("inf"), 0.1), "inf"),
        ((1e6, 12.9), "12.9"),
        ((1e6, -0.1), "-0.1"),
        ((1e6, 0.1, float("nan")), "nan"),
    ],
)
def test_points_that_are_none_are_refused(point, shown_as):
    with pytest.raises(
        InvalidOption, match=rf"series 'thin': found the point \(.*{shown_as}.*divide percentages by 100"
    ):
        Series("thin", (point,))


def test_a_series_without_points_is_refused():
    with pytest.raises(InvalidOption, match=r"series 'thin': found no point"):
        Series("thin", ())


def test_series_that_look_alike_are_refused(tmp_path):
    with pytest.raises(InvalidOption, match=r"found the series \['thin', 'thin'\], expected each name once"):
        figures.draw_errors([THIN, THIN], tmp_path / "figure.png")


# --- branches ---


def test_a_line_is_the_norms_of_a_network_over_the_branches(tmp_path):
    norms = {name: found["layer1.0"] for name, found in NORMS.items()}
    figure = figures.draw_branch_norms(norms, tmp_path / "figure.png", title="layer1.0")
    (axes,) = figure.axes
    assert lines(axes) == {"inclusive": ([1, 2], [3, 2]), "source": ([1, 2], [2, 2.5])}
    assert texts(shown(axes.xaxis)) == ["1", "2"]
    assert axes.get_ylim()[0] == 0
    assert legend(figure) == ["inclusive", "source"]
    assert figure.get_suptitle() == "layer1.0"


def test_every_block_has_a_panel_with_the_networks_that_have_it(tmp_path):
    figure = figures.draw_branch_norms(NORMS, tmp_path / "figure.png")
    first, second = figure.axes
    assert [axes.get_title() for axes in (first, second)] == ["layer1.0", "layer2.0"]
    assert lines(first) == {"inclusive": ([1, 2], [3, 2]), "source": ([1, 2], [2, 2.5])}
    assert lines(second) == {"inclusive": ([1, 2], [4, 1])}
    assert legend(figure) == ["inclusive", "source"]


def test_a_network_looks_alike_in_every_panel(tmp_path):
    norms = {"source": NORMS["source"], "inclusive": NORMS["inclusive"]}
    first, second = figures.draw_branch_norms(norms, tmp_path / "figure.png").axes
    looks = [
        {line.get_label(): (line.get_color(), line.get_marker()) for line in axes.lines} for axes in (first, second)
    ]
    assert looks[1]["inclusive"] == looks[0]["inclusive"] != looks[0]["source"]


@pytest.mark.parametrize(
    ("branches", "ticks"), [(1, "1"), (8, "1 2 3 4 5 6 7 8"), (32, "1 8 16 24 32"), (10, "1 3 6 9"), (512, None)]
)
def test_ticks_are_branches(branches, ticks, tmp_path):
    (axes,) = figures.draw_branch_norms({"one": torch.rand(branches)}, tmp_path / "figure.png").axes
    assert texts(shown(axes.xaxis)) == (ticks or "1 128 256 384 512").split()
    assert axes.lines[0].get_marker() == ("None" if branches == 512 else "o")


@pytest.mark.parametrize("norms", [torch.rand(2, 2), torch.tensor(1.0), torch.empty(0)])
def test_norms_that_are_no_vector_are_refused(norms, tmp_path):
    with pytest.raises(InvalidOption, match=r"draw_branch_norms: one: found norms of shape \(.*expected \(branches,\)"):
        figures.draw_branch_norms({"one": norms}, tmp_path / "figure.png")


# --- levels ---


def rings(axes):
    return {rings.get_label(): [tuple(place) for place in rings.get_offsets().tolist()] for rings in axes.collections}


def test_a_line_is_the_errors_of_a_level_and_a_ring_a_choice(tmp_path):
    """Wanted 0.625: the full sub-network has it on level 0, the second on level 1, the thinnest has 0.5 at best."""
    choices = choose_levels(ACCURACY)
    figure = figures.draw_levels(ACCURACY, choices, MACS, tmp_path / "figure.png", NAMES, wanted=0.625)
    (axes,) = figure.axes
    found = lines(axes)
    assert found["class"] == ([1, 2, 3], [75, 50, 37.5])
    assert found["group"] == ([1, 2, 3], [50, 25, 12.5])
    assert found["wanted"][1] == [37.5, 37.5]
    assert rings(axes) == {"to predict": [(2, 25), (3, 37.5)], "best there is": [(1, 50)]}
    assert legend(figure) == ["class", "group", "wanted", "to predict", "best there is"]
    assert axes.get_xlabel() == "multiply-adds of an image in billions"


def test_rings_that_miss_are_drawn_in_dots(tmp_path):
    (axes,) = figures.draw_levels(ACCURACY, choose_levels(ACCURACY), MACS, tmp_path / "figure.png", NAMES).axes
    solid, dotted = axes.collections
    assert solid.get_linestyle()[0][1] is None
    assert dotted.get_linestyle()[0][1] is not None
    assert len(solid.get_facecolor()) == len(dotted.get_facecolor()) == 0
    assert "wanted" not in lines(axes)


@pytest.mark.parametrize(
    ("accuracy", "choices", "macs", "names"),
    [
        (ACCURACY, 3, MACS[:2], NAMES),
        (ACCURACY, 2, MACS, NAMES),
        (ACCURACY, 3, MACS, ("class",)),
        (ACCURACY.T, 3, MACS, NAMES),
        (ACCURACY[0], 3, MACS, NAMES),
        (ACCURACY, 3, (0.0, 1.0, 2.0), NAMES),
        (ACCURACY[:0], 0, (), NAMES),
    ],
)
def test_numbers_that_do_not_fit_are_refused(accuracy, choices, macs, names, tmp_path):
    chosen = [Choice(k, 0, 0.5, True) for k in range(1, choices + 1)]
    with pytest.raises(InvalidOption, match=r"draw_levels: found accuracies .*expected \(K, D\), K, K above 0, and D"):
        figures.draw_levels(accuracy, chosen, macs, tmp_path / "figure.png", names)


# --- all of them ---


def many():
    generator = torch.Generator().manual_seed(0)
    better = torch.arange(8)[:, None] / 30 + torch.arange(6) / 15 + torch.rand(8, 6, generator=generator) / 20
    accuracy = 0.3 + better.double()
    macs = [1.86e7 + 1.43e7 * k for k in range(8)]
    points = [[(m, 1 - a, 0.01) for m, a in zip(macs, column, strict=True)] for column in accuracy.T.tolist()]
    names = [f"a network with a long name, number {n}" for n in range(4)]
    series = [Series(name, tuple(points[n]), joint) for n, name in enumerate(names) for joint in (True, False)]
    blocks = [f"features.stage{n // 4}.unit{n % 4}" for n in range(16)]
    norms = {name: {block: 1000 * torch.rand(32, generator=generator) for block in blocks} for name in names}
    levels = ["class", *(f"a level of number {n}" for n in range(1, 6))]
    return series, norms, (accuracy, choose_levels(accuracy, 0.7), macs), levels


def drawings(path):
    series, norms, (accuracy, choices, macs), levels = many()
    for scale in ("linear", "log"):
        yield figures.draw_errors(series, path, scale=scale)
        yield figures.draw_errors([PLAIN], path, scale=scale)
        yield figures.draw_levels(accuracy, choices, macs, path, levels, wanted=0.7, scale=scale)
        yield figures.draw_levels(
            accuracy[:1, :1], choose_levels(accuracy[:1, :1]), macs[:1], path, ["class"], scale=scale
        )
    yield figures.draw_branch_norms(norms, path)
    yield figures.draw_branch_norms({name: found["features.stage0.unit0"] for name, found in norms.items()}, path)
    yield figures.draw_branch_norms({"one": norms["a network with a long name, number 0"]}, path)
    yield figures.draw_branch_norms(NORMS, path)


def test_texts_keep_apart_and_on_the_page(tmp_path):
    for figure in drawings(tmp_path / "figure.png"):
        labels = [figure._suptitle, figure._supxlabel, figure._supylabel]
        for axes in figure.axes:
            labels += [axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label]
            labels += shown(axes.xaxis) + shown(axes.yaxis)
        boxes = [label.get_window_extent() for label in labels if label is not None and label.get_text()]
        boxes += [found.get_window_extent() for found in figure.legends]
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
        page = figure.bbox
        assert all(b.x0 >= 0 and b.y0 >= 0 and b.x1 <= page.x1 and b.y1 <= page.y1 for b in boxes)
        for axes in figure.axes:
            box = axes.get_window_extent()
            assert box.width > 0.5 * page.width / len(figure.axes) ** 0.5 - 20
            assert not any(box.overlaps(found.get_window_extent()) for found in figure.legends)


ALL = [
    (figures.draw_errors, lambda draw, path: draw([THIN, SHALLOW], path)),
    (figures.draw_branch_norms, lambda draw, path: draw(NORMS, path)),
    (figures.draw_levels, lambda draw, path: draw(ACCURACY, choose_levels(ACCURACY), MACS, path, NAMES)),
]


@pytest.mark.parametrize(("draw", "call"), ALL, ids=lambda value: value.__name__)
def test_figures_are_written_and_leave_matplotlib_as_it_was(draw, call, tmp_path):
    before = dict(mpl.rcParams)
    call(draw, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert dict(mpl.rcParams) == before


@pytest.mark.parametrize(("draw", "call"), ALL, ids=lambda value: value.__name__)
def test_without_matplotlib_the_extra_is_named(draw, call, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MatplotlibMissing, match=r"pip install 'surgery\[plots\]'"):
        call(draw, tmp_path / "figure.png")


@pytest.mark.parametrize(
    ("draw", "data"),
    [(figures.draw_errors, []), (figures.draw_branch_norms, {}), (figures.draw_branch_norms, {"one": {}})],
)
def test_nothing_to_draw_is_refused(draw, data, tmp_path):
    with pytest.raises(InvalidOption, match=f"^{draw.__name__}: found nothing to draw, expected"):
        draw(data, tmp_path / "figure.png")
    assert not (tmp_path / "figure.png").exists()


def test_another_scale_is_refused(tmp_path):
    with pytest.raises(InvalidOption, match="scale: found 'cubic', expected 'linear' or 'log'"):
        figures.draw_errors([THIN], tmp_path / "figure.png", scale="cubic")
    assert not (tmp_path / "figure.png").exists()
