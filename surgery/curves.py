"""What a network costs and how often it is right at several settings: one schema for all methods.

A method gives its networks a knob, such as a threshold, a number of classes, a budget, or a number of networks. A
`Point` is what was measured at one setting of it, a `Curve` all of that for one network, one set of data and one
device. Files hold several curves as JSON.

Units: MACs are multiply-adds of one image, averaged over the images where they depend on them; accuracies are shares in
[0, 1]; milliseconds are those of one forward pass of all `Curve.batch` images together.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from surgery.errors import InvalidOption, SurgeryError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCHEMA = "surgery.curves/1"


class CurveError(SurgeryError, ValueError):
    """A file or a mapping does not hold curves: it is missing, damaged, edited, foreign or newer."""


class MatplotlibMissing(SurgeryError, ImportError):
    """A figure was asked for and matplotlib is not installed."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One operating point.

    Attributes:
        setting: Where the knobs stand, such as {"tau": 0.5}; JSON values by name, empty where there is no knob.
        macs: Multiply-adds of one image, the mean over the images.
        params: Number of parameters of the network that runs at this setting.
        accuracy: Share in [0, 1] of what `Curve.metric` counts, or None where it was not measured.
        deviation: Standard deviation of the accuracy over repeated runs or trainings, or None.
        milliseconds: Time of one forward pass of `Curve.batch` images, or None where it was not measured.
        note: Anything else that a reader has to know.

    Raises:
        InvalidOption: If a number is not finite or out of its range, or `setting` is not JSON.
    """

    setting: Mapping[str, Any]
    macs: float
    params: int
    accuracy: float | None = None
    deviation: float | None = None
    milliseconds: float | None = None
    note: str = ""

    def __post_init__(self) -> None:
        """Check the numbers, and keep them as what JSON gives back."""
        put = object.__setattr__
        put(self, "setting", _json(self.setting))
        put(self, "macs", _number(self.macs, "macs"))
        if isinstance(self.params, bool) or not isinstance(self.params, Integral) or self.params < 0:
            raise InvalidOption(f"point: found params={self.params!r}, expected a whole number of at least 0")
        put(self, "params", int(self.params))
        for name, most in (("accuracy", 1.0), ("deviation", 1.0), ("milliseconds", math.inf)):
            value = getattr(self, name)
            put(self, name, None if value is None else _number(value, name, most))
        if self.deviation is not None and self.accuracy is None:
            raise InvalidOption(f"point: found deviation={self.deviation} and no accuracy, expected both or none")
        if not isinstance(self.note, str):
            raise InvalidOption(f"point: found note={self.note!r}, expected text")


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The operating points of one network.

    Attributes:
        method: Name of the method, or "" for a network that no method converted.
        network: Which network, such as "resnet50".
        data: Which data, such as "ImageNet val".
        points: The points, in the order in which a line connects them.
        input_size: (channels, height, width) of an image, which MACs and milliseconds refer to.
        metric: What the accuracies count, such as "top-1 accuracy".
        device: What the times were measured on, such as the name of a processor; None where no point has one.
        threads: Number of processor threads that were used, or None.
        batch: Number of images of the forward pass that was timed; None where no point has a time.

    Raises:
        InvalidOption: If there is no point, a field has another type or range, or there are times but no `device` or
            `batch`.
    """

    method: str
    network: str
    data: str
    points: tuple[Point, ...]
    input_size: tuple[int, int, int] | None = None
    metric: str = "top-1 accuracy"
    device: str | None = None
    threads: int | None = None
    batch: int | None = None

    def __post_init__(self) -> None:
        """Check the fields, and keep sequences as tuples."""
        object.__setattr__(self, "points", tuple(self.points))
        if not self.points or not all(isinstance(point, Point) for point in self.points):
            raise InvalidOption(f"curve of {self.network!r}: found {self.points!r} for points, expected one or more")
        for name in ("method", "network", "data", "metric", "device"):
            value = getattr(self, name)
            if not isinstance(value, str) and not (name == "device" and value is None):
                raise InvalidOption(f"curve of {self.network!r}: found {name}={value!r}, expected text")
        for name in ("threads", "batch"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _count(getattr(self, name), name))
        if self.input_size is not None:
            size = tuple(_count(side, "input_size") for side in self.input_size)
            if len(size) != 3:
                raise InvalidOption(f"curve: found input_size={size}, expected (channels, height, width)")
            object.__setattr__(self, "input_size", size)
        if any(point.milliseconds is not None for point in self.points) and None in (self.device, self.batch):
            raise InvalidOption(
                f"curve of {self.network!r}: found milliseconds with device={self.device!r} and batch={self.batch!r}, "
                "expected both: a time means nothing without them"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the curve as JSON values, every field of it."""
        size = None if self.input_size is None else list(self.input_size)
        return {**dataclasses.asdict(self), "points": [dataclasses.asdict(p) for p in self.points], "input_size": size}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read a curve back.

        Raises:
            CurveError: If a key is missing or unknown, or a value cannot be used.
        """
        fields = _fields(data, cls, "curve")
        if not isinstance(fields["points"], list):
            raise CurveError(f"curve: found {type(fields['points']).__name__} for points, expected a list")
        try:
            points = tuple(Point(**_fields(p, Point, f"point {i}")) for i, p in enumerate(fields["points"]))
            return cls(**{**fields, "points": points})
        except (InvalidOption, TypeError) as error:
            raise CurveError(f"curve of {fields['network']!r}: {error}") from error


def write(curves: Iterable[Curve], path: str | os.PathLike[str]) -> None:
    """Write curves to a JSON file; `path` is either the old file or the whole new one.

    Raises:
        InvalidOption: If there is no curve.
        CurveError: If the file cannot be written there.
    """
    content = {"schema": SCHEMA, "curves": [curve.to_dict() for curve in curves]}
    if not content["curves"]:
        raise InvalidOption(f"{path}: found no curve to write, expected one or more")
    path = Path(path)
    if path.is_dir() or not path.parent.is_dir():
        raise CurveError(f"{path}: cannot be written; expected the path of a file in an existing folder")
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.stem}.") as folder:
        draft = Path(folder) / path.name
        draft.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(draft, path)


def read(path: str | os.PathLike[str]) -> tuple[Curve, ...]:
    """Read the curves of a file that `write` wrote.

    Raises:
        CurveError: If the file is missing, damaged, edited, foreign or newer.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise CurveError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except (ValueError, RecursionError) as error:  # includes text that is not UTF-8
        raise CurveError(f"{path}: truncated or no JSON ({error}); write it again") from error
    found = content.get("schema") if isinstance(content, dict) else None
    if found != SCHEMA or not isinstance(content.get("curves"), list):
        raise CurveError(
            f"{path}: found schema {found!r} and keys {sorted(content) if isinstance(content, dict) else None}, "
            f"expected {SCHEMA!r} and a list of curves; it is foreign, or written by a newer version"
        )
    try:
        return tuple(Curve.from_dict(curve) for curve in content["curves"])
    except CurveError as error:
        raise CurveError(f"{path}: {error}") from error


def draw(curves: Iterable[Curve], path: str | os.PathLike[str]) -> Figure:
    """Draw accuracy over MACs and over milliseconds, a line for each curve, into a file such as a PNG.

    Points that lack what a panel shows are left out of it. The legend names what differs between the curves; what they
    share stands above. Settings are written beside their points where there is room.

    Returns:
        The figure that was written.

    Raises:
        InvalidOption: If no point has an accuracy, or the curves do not count the same `metric`.
        MatplotlibMissing: If matplotlib is not installed.
    """
    curves = list(curves)
    metrics = sorted({curve.metric for curve in curves})
    if len(metrics) != 1 or all(point.accuracy is None for curve in curves for point in curve.points):
        raise InvalidOption(
            f"draw: found {len(curves)} curves that count {metrics}, expected one or more with an accuracy, of the "
            "same metric; draw each metric by itself"
        )
    from surgery.curve_figure import panels  # not needed by those who only read and write

    figure = panels(curves)
    figure.savefig(path)
    return figure


def _fields(data: Any, cls: type[Point] | type[Curve], where: str) -> dict[str, Any]:
    if not isinstance(data, Mapping):
        raise CurveError(f"{where}: found {type(data).__name__}, expected an object with a value for every field")
    known = [field.name for field in dataclasses.fields(cls)]
    unknown, missing = sorted(map(str, data.keys() - set(known))), [name for name in known if name not in data]
    if unknown or missing:
        raise CurveError(
            f"{where}: found unknown keys {unknown} and no {missing}, expected {', '.join(known)}; the file was edited "
            "or written by another version"
        )
    return dict(data)


def _number(value: Any, name: str, most: float = math.inf) -> float:
    number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    if not (0 <= number <= most and math.isfinite(number)):
        limits = f"from 0 to {most:g}" if math.isfinite(most) else "of at least 0"
        raise InvalidOption(f"point: found {name}={value!r}, expected a finite number {limits}")
    return number


def _count(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise InvalidOption(f"curve: found {name}={value!r}, expected whole numbers of at least 1")
    return int(value)


def _json(setting: Any) -> dict[str, Any]:
    if not isinstance(setting, Mapping) or not all(isinstance(name, str) for name in setting):
        raise InvalidOption(f"point: found setting={setting!r}, expected values by name, such as {{'tau': 0.5}}")
    try:
        copied: dict[str, Any] = json.loads(json.dumps(dict(setting), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise InvalidOption(f"point: found setting={setting!r}, expected finite JSON values ({error})") from error
    return copied
