"""Errors of the library: every message says where, what was found, what was expected and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


class SurgeryError(Exception):
    """Base of every error raised on purpose by this library."""


class InvalidOption(SurgeryError, ValueError):
    """An option, a criterion or an argument has a value that cannot be used."""


class UnsupportedModel(SurgeryError, TypeError):
    """The model is wrapped, already compiled, or otherwise not the plain network that surgery needs."""


class TraceError(SurgeryError):
    """The model cannot be traced into one graph that is right in train and in eval mode."""


class RewriteError(SurgeryError):
    """A graph edit was asked for that the graph does not allow."""


class TransformFailed(SurgeryError):
    """A method's transform raised an exception that is not one of ours; the original is chained."""


class AlreadyConverted(SurgeryError):
    """The same method was asked for twice, or a method that cannot be stacked on what is there."""


class TapNotFilled(SurgeryError, KeyError):
    """A tap was read that no forward pass has filled."""

    def __str__(self) -> str:
        """Return the sentence itself; KeyError would print its repr."""
        return str(self.args[0])


class PruneError(SurgeryError):
    """A prune plan does not fit the model it is applied to, or would leave a dead network."""


class NotKept(SurgeryError, AttributeError):
    """A method of the source network that cannot be kept on the converted one."""


class PluginError(SurgeryError):
    """A plugin is missing, broken, or its name clashes with another's."""


class CheckpointError(SurgeryError):
    """A checkpoint is damaged, foreign, newer than this version, or does not fit."""


class ConformanceError(SurgeryError, AssertionError):
    """A method broke one of the laws of `surgery.testing`; the message begins with the law's name."""


@dataclass(frozen=True)
class Refusal:
    """Why one place of a network cannot be used.

    Attributes:
        path: Module path, or the node name where no module owns it.
        reason: What was found there, and what was expected.
        cure: What the user can do about it; empty when there is nothing to do.
    """

    path: str
    reason: str
    cure: str = ""

    def __str__(self) -> str:
        """Return the refusal as one line."""
        return f"{self.path}: {self.reason}" + (f"; {self.cure}" if self.cure else "")


class NothingConverted(SurgeryError):
    """No block of the network could be used by the method.

    Attributes:
        refusals: One reason per place that was looked at.
    """

    def __init__(self, headline: str, refusals: Iterable[Refusal] = ()) -> None:
        self.refusals = tuple(refusals)
        shown = [f"  {refusal}" for refusal in self.refusals[:12]]
        hidden = len(self.refusals) - len(shown)
        super().__init__("\n".join([headline, *shown, *([f"  ... and {hidden} more"] if hidden else [])]))
