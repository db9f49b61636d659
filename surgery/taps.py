"""Taps: named intermediate values that a forward pass leaves behind for losses and analyses.

A tap is a pass-through module, so nothing that removes dead code can drop it. In train mode it records by itself and
`Objective` consumes the value; in eval mode it records inside `record(model)` only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from surgery.errors import TapNotFilled


class Tap(nn.Module):
    """Pass a tensor through unchanged and keep a reference to it.

    The value is overwritten by the next forward, is never copied with the module, and is in no state dict.
    A recomputation during the backward pass (gradient checkpointing) does not overwrite it.

    Args:
        name: Unique within the model, by convention `"<block path>/<what>"`.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.recording = False
        self._slot: dict[str, Tensor] = {}

    def forward(self, value: Tensor) -> Tensor:
        """Return `value`; any shape."""
        if in_backward():  # a second value has no consumer and must not survive
            return value
        if self.training or self.recording:
            self._slot["value"] = value
        elif self._slot:
            self._slot.clear()  # what an earlier forward left is not of this one
        return value

    @property
    def value(self) -> Tensor:
        """The recorded tensor.

        Raises:
            TapNotFilled: If no forward has run since the last read by `Objective`.
        """
        if "value" not in self._slot:
            raise TapNotFilled(
                f"{self.name}: no forward pass has filled this tap; run the model in train mode, or in eval mode "
                "inside `with surgery.record(model) as taps:`"
            )
        return self._slot["value"]

    def clear(self) -> None:
        """Forget the recorded tensor."""
        self._slot.clear()

    def extra_repr(self) -> str:
        """Return the name for `print(model)`."""
        return repr(self.name)

    def __deepcopy__(self, memo: dict[int, object]) -> Tap:
        """Return an empty tap of the same name: values that carry a graph cannot be copied."""
        twin = Tap(self.name)
        twin.training = self.training
        memo[id(self)] = twin
        return twin

    def __getstate__(self) -> dict[str, object]:
        """Leave the recorded tensor out of every serialized form."""
        return {**self.__dict__, "_slot": {}, "recording": False}


def in_backward() -> bool:
    """Return whether a backward pass is under way: a checkpointed block runs again inside of it."""
    if torch.compiler.is_compiling():
        return False
    return bool(torch._C._current_graph_task_id() != -1)


class Taps(Mapping[str, Tensor]):
    """Ordered, read-only view of the taps of a model, by name."""

    def __init__(self, taps: Mapping[str, Tap]) -> None:
        self._taps = dict(taps)
        self._frozen: dict[str, Tensor] | None = None

    def __getitem__(self, name: str) -> Tensor:
        """Return the value recorded under `name`.

        Raises:
            TapNotFilled: If the model has no such tap, or no forward has filled it.
        """
        if name not in self._taps:
            known = ", ".join(self._taps) or "none"
            raise TapNotFilled(f"{name}: the model has no tap of this name; it has: {known}")
        if self._frozen is not None and name in self._frozen:
            return self._frozen[name]
        return self._taps[name].value

    def __contains__(self, name: object) -> bool:
        """Return whether the model has a tap of that name, filled or not."""
        return name in self._taps

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names in the order of the network."""
        return iter(self._taps)

    def __len__(self) -> int:
        """Return the number of taps of the model, filled or not."""
        return len(self._taps)

    def freeze(self) -> None:
        """Keep the current values and empty the model's taps, so that the model holds on to no activation."""
        self._frozen = {name: tap._slot["value"] for name, tap in self._taps.items() if tap._slot}
        for tap in self._taps.values():
            tap.clear()


def taps_of(model: nn.Module) -> Taps:
    """Return a live view of all taps of `model`, in the order of the network."""
    return Taps({module.name: module for module in model.modules() if isinstance(module, Tap)})


def consume(model: nn.Module) -> Taps:
    """Return the taps filled by the last forward and empty them in the model."""
    taps = taps_of(model)
    taps.freeze()
    return taps


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Let forwards of `model` in eval mode run without recording, and leave its taps as they were."""
    kept = {module: (module.recording, dict(module._slot)) for module in model.modules() if isinstance(module, Tap)}
    try:
        for tap in kept:
            tap.recording = False
        yield
    finally:
        for tap, (recording, slot) in kept.items():
            tap.recording = recording
            tap._slot = slot


@contextmanager
def record(model: nn.Module) -> Iterator[Taps]:
    """Record the taps of `model` also in eval mode.

    The mapping is live inside the block and keeps the last values after it.

    Example:
        >>> with surgery.record(model) as taps:
        ...     model(images)
        >>> taps["layer3.0/energy"].shape

    Raises:
        TapNotFilled: If the model has no tap at all.
    """
    taps = taps_of(model)
    if not taps:
        raise TapNotFilled(
            f"{type(model).__name__} has no tap, so nothing can be recorded; convert it with a method that taps values"
        )
    modules = list(taps._taps.values())
    for tap in modules:
        tap.clear()
        tap.recording = True
    try:
        yield taps
    finally:
        taps.freeze()
        for tap in modules:
            tap.recording = False
