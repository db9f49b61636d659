"""The record of what was done to a network: enough to do it again, in JSON both ways."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from types import UnionType
from typing import Any, Literal, Self, TypeVar, get_args, get_origin, get_type_hints

from surgery.errors import CheckpointError

FORMAT = 1
"""Version of the record; a reader refuses what is newer."""

CURE = "restore the file from a backup, or save the model again"
"""What helps against damage."""

Kind = Literal["convert", "prune", "classifier"]
T = TypeVar("T")


@dataclass(frozen=True)
class Site:
    """Where something was changed.

    Attributes:
        method: Name of the method.
        role: What was put there, such as "gate".
        block: Path of the block, or "" for the root graph.
        node: Node name in that graph.
    """

    method: str
    role: str
    block: str
    node: str


@dataclass(frozen=True)
class Operation:
    """One thing that was done.

    Attributes:
        kind: "convert", "prune", or "classifier" (`reset_classifier`).
        method: Name of the method; "" for a classifier.
        options: Options of the method, the plan, or the arguments, as JSON values.
        decisions: Random, searched or timed choices, read back on replay.
        sites: Where the graph was changed.
        distribution: Distribution that provides the method.
        version: Its version.
        input_size: (height, width) that the conversion was made for, or None for the network's own.
    """

    kind: Kind
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    decisions: Mapping[str, Any] = field(default_factory=dict)
    sites: tuple[Site, ...] = ()
    distribution: str = ""
    version: str = ""
    input_size: tuple[int, int] | None = None


@dataclass(frozen=True)
class Source:
    """What the network was before.

    Attributes:
        class_name: Qualified name of its class.
        fingerprint: Hash over its modules, their settings and the shapes of its weights.
        builder: What builds it, such as "timm:resnet50"; "" where that is not known.
        classes: Number of classes, or None.
        in_channels: Channels of its input.
    """

    class_name: str
    fingerprint: str
    builder: str
    classes: int | None
    in_channels: int


@dataclass(frozen=True)
class Conversion:
    """Everything that was done to a network, in order.

    Attributes:
        source: The network before.
        operations: What was done.
    """

    source: Source
    operations: tuple[Operation, ...] = ()

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the methods that converted the network, in order."""
        return tuple(operation.method for operation in self.operations if operation.kind == "convert")

    def then(self, operation: Operation) -> Conversion:
        """Return the record with one more operation."""
        return replace(self, operations=(*self.operations, operation))

    def with_classifier(self, classes: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Conversion:
        """Return the record with a call of `reset_classifier`."""
        options = {"num_classes": classes, "args": list(args), "kwargs": dict(kwargs)}
        return self.then(Operation("classifier", "", options))

    def to_json(self) -> str:
        """Return the record as one line of JSON."""
        return json.dumps({"format": FORMAT, **asdict(self)}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read a record back.

        Raises:
            CheckpointError: If the text is no record, is damaged, or was written by a newer version.
        """
        try:
            data = parse_json(text)
        except ValueError as error:
            raise CheckpointError(f"the record is not JSON ({error}); {CURE}") from error
        if not isinstance(data, dict) or "format" not in data:
            raise CheckpointError(f"the record has no format number, expected one of surgery.save; {CURE}")
        if type(data["format"]) is not int or not 1 <= data["format"] <= FORMAT:
            raise CheckpointError(
                f"the record has format {reprlib.repr(data['format'])}, this version reads 1 to {FORMAT}; upgrade "
                "surgery to load it"
            )
        try:
            return read_fields(cls, {name: value for name, value in data.items() if name != "format"})
        except ValueError as error:
            raise CheckpointError(f"the record is incomplete or edited ({error}); {CURE}") from error


def parse_json(text: str | bytes) -> Any:
    """Read JSON that says everything once.

    Raises:
        ValueError: If it is not JSON, gives a name twice in one object, or is nested too deeply to be read.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def read_fields(cls: type[T], data: object) -> T:
    """Build a dataclass from JSON values: all of its fields, no others, each of the type of its annotation.

    Raises:
        ValueError: With the field, what was found, and what was expected.
    """
    names = {item.name for item in fields(cls)}  # type: ignore[arg-type]
    if not isinstance(data, Mapping) or set(data) != names:
        found = f"the fields {sorted(map(str, data))}" if isinstance(data, Mapping) else reprlib.repr(data)
        raise ValueError(f"{cls.__name__} has {found}, expected {sorted(names)}")
    hints = get_type_hints(cls)
    return cls(**{name: _value(data[name], hints[name], f"{cls.__name__}.{name}") for name in names})


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"a name is given twice among {reprlib.repr([name for name, _ in pairs])}")
    return found


def _value(value: Any, hint: Any, where: str) -> Any:
    """Return what a field annotated `hint` holds for a JSON value; a list becomes the tuple that it stood for."""
    if is_dataclass(hint):
        return read_fields(hint, value)  # type: ignore[arg-type]
    reader = _READERS.get(get_origin(hint))
    if reader is not None:
        return reader(value, hint, where)
    if hint is not Any and type(value) is not hint:
        raise _unexpected(value, hint, where)
    return value


def _tuple(value: Any, hint: Any, where: str) -> tuple[Any, ...]:
    kinds = get_args(hint)
    if isinstance(value, (list, tuple)) and kinds[-1] is Ellipsis:
        kinds = kinds[:1] * len(value)
    if not isinstance(value, (list, tuple)) or len(kinds) != len(value):
        raise _unexpected(value, hint, where)
    return tuple(_value(item, kind, f"{where}[{i}]") for i, (item, kind) in enumerate(zip(value, kinds, strict=True)))


def _mapping(value: Any, hint: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise _unexpected(value, hint, where)
    return {key: _value(item, get_args(hint)[1], f"{where}[{key!r}]") for key, item in value.items()}


def _choice(value: Any, hint: Any, where: str) -> Any:
    if value not in get_args(hint):
        raise _unexpected(value, hint, where)
    return value


def _optional(value: Any, hint: Any, where: str) -> Any:
    return None if value is None else _value(value, get_args(hint)[0], where)


def _unexpected(value: Any, hint: Any, where: str) -> ValueError:
    expected = hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint).replace("typing.", "")
    return ValueError(f"{where} is {reprlib.repr(value)}, expected {expected}")


_READERS: Mapping[Any, Callable[[Any, Any, str], Any]] = {
    tuple: _tuple,
    Mapping: _mapping,
    Literal: _choice,
    UnionType: _optional,  # of which every one here is "or None"
}
