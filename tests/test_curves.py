"""Operating points: what they may hold, what a file gives back, and what the figure shows."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import FrozenInstanceError, replace

import matplotlib as mpl
import numpy as np
import pytest

from surgery import curves
from surgery.curves import Curve, CurveError, MatplotlibMissing, Point
from surgery.errors import InvalidOption

LOW = Point(setting={"tau": 0.8, "classes": [3, 7]}, macs=1.5e9, params=25_000_000, accuracy=0.7, milliseconds=40.5)
HIGH = replace(LOW, setting={"tau": 0.5, "classes": [3, 7]}, macs=2e9, accuracy=0.75, deviation=0.01, milliseconds=50)
CURVE = Curve(
    method="first",
    network="resnet50",
    data="glyphs",
    points=(LOW, HIGH, Point(setting={}, macs=4e9, params=1, note="not run")),
    input_size=(3, 160, 160),
    device="cpu",
    threads=2,
    batch=8,
)
BARE = Curve(
    method="", network="resnet50", data="glyphs", points=(Point(setting={}, macs=4e9, params=7, accuracy=0.8),)
)


# --- points and curves ---


def test_points_and_curves_are_frozen_plain_data():
    with pytest.raises(FrozenInstanceError):
        LOW.macs = 1.0
    with pytest.raises(FrozenInstanceError):
        CURVE.points = ()
    setting = {"budget": (1, 2)}
    point = Point(setting=setting, macs=np.float32(2), params=np.int64(3), accuracy=np.float64(0.5))
    setting["budget"] = 0
    assert point == Point(setting={"budget": [1, 2]}, macs=2.0, params=3, accuracy=0.5)
    assert [type(value) for value in (point.macs, point.params, point.accuracy)] == [float, int, float]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"macs": math.nan}, "macs=nan, expected a finite number of at least 0"),
        ({"macs": -1}, "macs=-1"),
        ({"macs": "4"}, "macs='4'"),
        ({"macs": True}, "macs=True"),
        ({"params": 1.5}, "params=1.5, expected a whole number"),
        ({"params": -1}, "params=-1"),
        ({"params": True}, "params=True"),
        ({"accuracy": 75.0}, "accuracy=75.0, expected a finite number from 0 to 1"),
        ({"accuracy": math.inf}, "accuracy=inf"),
        ({"accuracy": None, "deviation": 0.1}, "deviation=0.1 and no accuracy"),
        ({"deviation": -0.1}, "deviation=-0.1"),
        ({"milliseconds": math.inf}, "milliseconds=inf"),
        ({"setting": {"tau": math.nan}}, "expected finite JSON values"),
        ({"setting": {"tau": object()}}, "expected finite JSON values"),
        ({"setting": {1: 2}}, "expected values by name"),
        ({"setting": "tau"}, "expected values by name"),
        ({"note": None}, "note=None, expected text"),
    ],
)
def test_points_refuse_what_is_no_measurement(changes, message):
    with pytest.raises(InvalidOption, match=message):
        replace(LOW, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"points": ()}, "expected one or more"),
        ({"points": (LOW, {})}, "expected one or more"),
        ({"network": None}, "network=None, expected text"),
        ({"device": None}, "device=None and batch=8"),
        ({"batch": None}, "batch=None, expected both"),
        ({"batch": 0}, "batch=0, expected whole numbers of at least 1"),
        ({"threads": 1.5}, "threads=1.5"),
        ({"device": 3}, "device=3"),
        ({"input_size": (160, 160)}, r"expected \(channels, height, width\)"),
        ({"input_size": (3, 160, 0)}, "input_size=0"),
    ],
)
def test_curves_refuse_times_without_a_device_and_other_gaps(changes, message):
    with pytest.raises(InvalidOption, match=message):
        replace(CURVE, **changes)
    assert replace(BARE, device=None, batch=None) == BARE


# --- files ---


def test_files_give_back_what_was_written(tmp_path):
    path = tmp_path / "curves.json"
    curves.write([CURVE, BARE], path)
    assert curves.read(path) == (CURVE, BARE)
    assert Curve.from_dict(json.loads(json.dumps(CURVE.to_dict(), allow_nan=False))) == CURVE
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["curves"][0]["points"][0] == {
        "setting": {"tau": 0.8, "classes": [3, 7]},
        "macs": 1.5e9,
        "params": 25_000_000,
        "accuracy": 0.7,
        "deviation": None,
        "milliseconds": 40.5,
        "note": "",
    }
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_the_old_one_or_the_whole_new_one(tmp_path, monkeypatch):
    path = tmp_path / "curves.json"
    curves.write([CURVE], path)

    def fails(*_):
        raise OSError("no space left")

    monkeypatch.setattr(curves.os, "replace", fails)
    with pytest.raises(OSError, match="no space left"):
        curves.write([BARE], path)
    monkeypatch.undo()
    assert curves.read(path) == (CURVE,)
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_is_written_where_nothing_can_be(tmp_path):
    with pytest.raises(InvalidOption, match="found no curve to write"):
        curves.write([], tmp_path / "curves.json")
    for path in (tmp_path, tmp_path / "missing" / "curves.json"):
        with pytest.raises(CurveError, match="cannot be written; expected the path of a file in an existing folder"):
            curves.write([CURVE], path)
    assert list(tmp_path.iterdir()) == []


def edited(change):
    """Return the text of a file with one change made to its content."""
    content = {"schema": curves.SCHEMA, "curves": [CURVE.to_dict()]}
    change(content)
    return json.dumps(content)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "truncated or no JSON"),
        (edited(lambda c: None)[:-40], "truncated or no JSON"),
        ("[" * 100_000, "truncated or no JSON"),
        ("[1, 2]", "found schema None and keys None"),
        (edited(lambda c: c.update(schema="surgery.curves/2")), "found schema 'surgery.curves/2'.* newer version"),
        (edited(lambda c: c.pop("curves")), r"keys \['schema'\]"),
        (edited(lambda c: c["curves"].append(3)), "curve: found int, expected an object"),
        (edited(lambda c: c["curves"][0].update(colour=1)), r"curve: found unknown keys \['colour'\] and no \[\]"),
        (edited(lambda c: c["curves"][0].pop("batch")), r"unknown keys \[\] and no \['batch'\]"),
        (edited(lambda c: c["curves"][0].update(points={})), "found dict for points, expected a list"),
        (edited(lambda c: c["curves"][0].update(points=[])), "curve of 'resnet50': .*expected one or more"),
        (edited(lambda c: c["curves"][0].update(input_size=3)), "curve of 'resnet50'"),
        (edited(lambda c: c["curves"][0]["points"][1].pop("macs")), r"point 1: .*no \['macs'\]"),
        (edited(lambda c: c["curves"][0]["points"][1].update(macs=math.nan)), "macs=nan"),
        (edited(lambda c: c["curves"][0]["points"][1].update(accuracy="0.5")), "accuracy='0.5'"),
    ],
)
def test_damaged_edited_and_foreign_files_are_refused_with_the_path(text, message, tmp_path):
    path = tmp_path / "curves.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(CurveError, match=message) as caught:
        curves.read(path)
    assert str(path) in str(caught.value)


def test_files_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(CurveError, match="cannot be read"):
        curves.read(tmp_path / "missing.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CurveError, match="no JSON"):
        curves.read(tmp_path / "binary.json")


# --- the figure ---


def lines(axes):
    return [line.get_xydata().tolist() for line in axes.lines]


def test_panels_show_accuracy_over_macs_and_over_milliseconds(tmp_path):
    before = dict(mpl.rcParams)
    figure = curves.draw([CURVE, BARE], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    left, right = figure.axes
    assert lines(left) == [[[1.5, 70], [2, 75]], [[4, 80]]]
    assert lines(right) == [[[40.5, 70], [50, 75]], []]
    assert left.get_xlabel() == "multiply-adds of an image in billions"
    assert right.get_xlabel() == "milliseconds of a batch of 8"
    assert left.get_ylabel() == "top-1 accuracy in %"
    assert dict(mpl.rcParams) == before


def test_error_bars_are_the_deviations(tmp_path):
    """75 % with a deviation of 1 %: from 74 to 76."""
    left = curves.draw([CURVE], tmp_path / "curves.png").axes[0]
    bars = [segment.tolist() for segment in left.collections[0].get_segments()]
    assert [bar for bar in bars if bar[0] != bar[1]] == [[[2, 74], [2, 76]]]


def test_the_legend_names_what_differs_and_the_title_what_is_shared(tmp_path):
    other = replace(CURVE, method="second", batch=1)
    figure = curves.draw([CURVE, other], tmp_path / "curves.png")
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert [text.partition(" (")[0] for text in texts] == ["first, batch 8", "second, batch 1"]
    assert figure._suptitle.get_text() == "resnet50, glyphs, 160 x 160 px, cpu, 2 threads"
    assert figure.axes[1].get_xlabel() == "milliseconds of a batch"
    alone = curves.draw([replace(BARE, threads=1)], tmp_path / "curves.png")
    assert [text.get_text() for text in alone.legends[0].get_texts()] == ["as it is"]
    assert alone._suptitle.get_text() == "as it is, resnet50, glyphs, 1 thread"
    assert [text.get_text() for text in alone.axes[1].texts] == ["not measured"]


def test_points_are_labelled_with_the_knob_that_turns(tmp_path):
    curve = replace(CURVE, points=(LOW, HIGH))
    figure = curves.draw([curve], tmp_path / "curves.png")
    assert [text.get_text() for text in figure.axes[0].texts] == ["0.8", "0.5"]
    assert figure.legends[0].get_texts()[0].get_text() == "first (labels: tau)"
    both = replace(curve, points=(LOW, replace(HIGH, setting={"tau": 0.5, "classes": [3]})))
    figure = curves.draw([both], tmp_path / "curves.png")
    assert [text.get_text() for text in figure.axes[1].texts] == ["tau 0.8, classes [3, 7]", "tau 0.5, classes [3]"]


@pytest.mark.parametrize(("count", "apart"), [(1, 0.04), (4, 0.04), (2, 0.001), (8, 0.004)])
def test_labels_keep_apart_from_each_other_and_from_the_lines(count, apart, tmp_path):
    points = [replace(LOW, setting={"k": n / 7}, macs=1e6 * n, milliseconds=n) for n in range(1, 9)]
    many = [
        replace(
            CURVE,
            method=f"method {m}",
            points=tuple(replace(p, accuracy=0.3 + apart * m + 0.002 * n) for n, p in enumerate(points)),
        )
        for m in range(count)
    ]
    figure = curves.draw(many, tmp_path / "curves.png")
    for axes in figure.axes:
        boxes = [text.get_window_extent() for text in axes.texts]
        assert len(boxes) >= 8
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
        paths = [axes.transData.transform_path(line.get_path()) for line in axes.lines]
        assert not any(path.intersects_bbox(box, filled=False) for path in paths for box in boxes)
        assert not figure.legends[0].get_window_extent().overlaps(axes.get_tightbbox())
    assert figure.legends[0].get_window_extent().y0 >= 0


def test_labels_without_room_are_left_out(tmp_path):
    """Six points at one place and one elsewhere: there are four places beside a point."""
    places = [(1e6, 0.5)] * 6 + [(2e6, 0.9)]
    single = [
        replace(BARE, method=str(n), points=(Point(setting={"tau": n}, macs=macs, params=1, accuracy=accuracy),))
        for n, (macs, accuracy) in enumerate(places)
    ]
    texts = curves.draw(single, tmp_path / "curves.png").axes[0].texts
    assert [text.get_text() for text in texts] == ["0", "1", "2", "3", "6"]
    boxes = [text.get_window_extent() for text in texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_what_cannot_be_drawn_is_refused(tmp_path):
    silent = replace(BARE, points=(replace(BARE.points[0], accuracy=None),))
    for several in ([], [silent], [CURVE, replace(BARE, metric="F1")]):
        with pytest.raises(InvalidOption, match=f"draw: found {len(several)} curves"):
            curves.draw(several, tmp_path / "curves.png")


def test_without_matplotlib_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MatplotlibMissing, match=r"pip install 'surgery\[plots\]'"):
        curves.draw([CURVE], tmp_path / "curves.png")
