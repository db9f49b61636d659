"""The record of what was done to a network: enough to do it again, in JSON both ways."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, Self, TypeVar

from surgery.errors import CheckpointError

FORMAT = 1
"""Version of the record; a reader refuses what is newer."""

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
            data = json.loads(text)
        except ValueError as error:
            raise CheckpointError(f"the record is not JSON ({error}); the file is damaged or foreign") from error
        if not isinstance(data, dict) or "format" not in data:
            raise CheckpointError("the record has no format number; the file was not written by surgery.save")
        if not isinstance(data["format"], int) or data["format"] > FORMAT:
            raise CheckpointError(
                f"the record has format {data['format']}, this version reads up to {FORMAT}; upgrade surgery to load it"
            )
        try:
            source = _build(Source, data["source"])
            return cls(source, tuple(_operation(item) for item in data["operations"]))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the record is incomplete or edited ({type(error).__name__}: {error})") from error


def _operation(data: Mapping[str, Any]) -> Operation:
    operation = _build(Operation, data)
    if operation.kind not in ("convert", "prune", "classifier"):
        raise ValueError(f"unknown kind of operation {operation.kind!r}")
    sites = tuple(_build(Site, site) for site in data["sites"])
    size = tuple(data["input_size"]) if data["input_size"] is not None else None
    return replace(operation, sites=sites, input_size=size)


def _build(cls: type[T], data: Mapping[str, Any]) -> T:
    names = {item.name for item in fields(cls)}  # type: ignore[arg-type]
    if set(data) != names:
        raise ValueError(f"{cls.__name__} has the fields {sorted(data)}, expected {sorted(names)}")
    return cls(**data)
