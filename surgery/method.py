"""What a plugin author writes: a frozen dataclass with a transform, losses and a pruning plan."""

from __future__ import annotations

import dataclasses
import reprlib
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from torch import Tensor, nn

from surgery.errors import InvalidOption

if TYPE_CHECKING:
    from surgery.architecture import Architecture
    from surgery.network import ConvertedNetwork
    from surgery.pruning import PrunePlan
    from surgery.rewriter import Rewriter
    from surgery.taps import Taps

Preserves = Literal["output", "weights", "nothing"]


@dataclass(frozen=True)
class Step:
    """What `Objective` hands to a method's losses after one forward pass.

    Attributes:
        model: The converted network itself, without DDP or compile wrappers.
        output: (B, classes) logits.
        target: What the user's criterion takes: (B,) class indices, or whatever the method defines beside them.
        taps: The taps that the forward pass filled.
        criterion: The user's task loss.
        progress: Completed epochs as a float; None stands for the end of training.
    """

    model: ConvertedNetwork
    output: Tensor
    target: Tensor
    taps: Taps
    criterion: nn.Module
    progress: float | None


@dataclass(frozen=True)
class ParameterRule:
    """How the optimizer should treat some parameters of a converted network.

    Attributes:
        names: Parameter names, as in `named_parameters()`.
        lr_scale: Factor on the learning rate.
        weight_decay: Weight decay, or None for the user's own.
        decay_scale: Factor on the user's own weight decay, where `weight_decay` is None.
    """

    names: frozenset[str]
    lr_scale: float = 1.0
    weight_decay: float | None = None
    decay_scale: float = 1.0


@dataclass(frozen=True)
class Method(ABC):
    """A technique as a whole. Subclasses are frozen dataclasses and final; their fields are the options.

    State lives in the model (parameters, buffers, inserted modules) and in its record, never in the method: a method is
    rebuilt from its options when a checkpoint is loaded.

    Attributes:
        name: What users pass to `convert`; also the name of the entry point.
        preserves: What holds right after conversion, in eval mode: "output" (bit-identical logits), "weights" (every
            weight of the source is there, unchanged, or in copies or equal parts where every branch has its own, but
            the output may differ) or "nothing". Where that depends on the options, override `preserved` as well.
        stacks: Whether the method may be applied to a network that another method has already converted.
    """

    name: ClassVar[str]
    preserves: ClassVar[Preserves]
    stacks: ClassVar[bool] = False

    @abstractmethod
    def transform(self, architecture: Architecture, rewriter: Rewriter) -> None:
        """Edit the network through `rewriter`.

        Shapes and MACs of the result come from a run on meta tensors in eval mode, so inserted modules must not read
        numbers there, as `if mask.any():` does, nor keep tensors that are neither parameters nor buffers.

        Args:
            architecture: What recognition found.
            rewriter: The only way to change the graph.

        Raises:
            NothingConverted: If no block can be used, with the reason for each.
        """

    @abstractmethod
    def losses(self, step: Step) -> dict[str, Tensor]:
        """Return the named scalar terms that the method adds to the task loss; the key "task" replaces it."""

    @abstractmethod
    def plan(self, model: ConvertedNetwork, **criteria: Any) -> PrunePlan:
        """Decide what to remove.

        Args:
            model: A network converted by this method.
            **criteria: The method's own, documented by each method; none where a default makes sense.

        Raises:
            InvalidOption: If the criteria cannot be met.
        """

    def preserved(self) -> Preserves:
        """Return what holds with these options; by default `preserves`."""
        return self.preserves

    def parameter_rules(self, model: ConvertedNetwork) -> tuple[ParameterRule, ...]:
        """Return the rules for parameters that need another learning rate or weight decay; none by default."""
        return ()

    def options(self) -> dict[str, Any]:
        """Return the fields as JSON values; a method with richer fields overrides this and `from_options`."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """Build the method from what `options()` returned, or from keyword arguments.

        Raises:
            InvalidOption: If an option is unknown or of the wrong type.
        """
        cls.check_types(options)
        return cls(**options)

    @classmethod
    def check_types(cls, options: Mapping[str, Any]) -> None:
        """Refuse options that do not exist or are of the wrong type.

        Raises:
            InvalidOption: With the name, what was found, and what was expected.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        hints = typing.get_type_hints(cls)
        for name, value in options.items():
            if name not in fields:
                raise InvalidOption(
                    f"{cls.name}: unknown option {name!r}; its options are {', '.join(fields) or 'none'}"
                )
            if not _fits(value, hints[name]):
                expected = _expected(str(fields[name].type), hints[name])
                found = f"{reprlib.repr(value)} ({type(value).__name__})"  # a record may hold anything
                raise InvalidOption(f"{cls.name}: option {name!r} is {found}, expected {expected}")


def _expected(written: str, hint: Any) -> str:
    """Return an annotation as it is written, or the choices that its name stands for."""
    if typing.get_origin(hint) is Literal and "Literal" not in written:
        return f"one of {', '.join(map(repr, typing.get_args(hint)))}"
    return written


def _fits(value: object, hint: Any) -> bool:
    """Return whether `value` may be stored in a field annotated `hint`; annotations it cannot judge are accepted."""
    origin = typing.get_origin(hint)
    if origin is Literal:
        return value in typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in typing.get_args(hint))
    if hint is type(None):
        return value is None
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (bool, str):
        return isinstance(value, hint)
    return True
