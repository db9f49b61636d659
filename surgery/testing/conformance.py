"""Hold a method to the laws that users of any method rely on: one line in a third party's tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from surgery.conversion import resolve_method
from surgery.errors import ConformanceError, InvalidOption, NothingConverted
from surgery.method import Method
from surgery.testing import conversion_laws, pruning_laws, training_laws
from surgery.testing.case import Case, Muted, NotApplicable, Settle, Size
from surgery.testing.networks import Build, tiny_networks

Law = Callable[[Case], None]

_ORDERED: tuple[Law, ...] = (
    conversion_laws.installed,
    conversion_laws.options,
    conversion_laws.original_untouched,
    conversion_laws.preserves,
    conversion_laws.settings_kept,
    conversion_laws.source_weights_load,
    conversion_laws.record,
    conversion_laws.replays,
    conversion_laws.twice_refused,
    conversion_laws.unsupported_refused,
    training_laws.modes,
    training_laws.losses,
    training_laws.gradients,
    training_laws.taps,
    conversion_laws.deepcopies,
    conversion_laws.saves_and_loads,
    pruning_laws.empty_plan,
    pruning_laws.pruned_smaller,
    pruning_laws.pruned_equals_muted,
    pruning_laws.pruned_saves_and_loads,
    training_laws.compiles,
    training_laws.distributes,
    pruning_laws.exports,
    pruning_laws.exports_to_onnx,
)
LAWS: Mapping[str, Law] = MappingProxyType({law.__name__: law for law in _ORDERED})
"""Every law by name, in the order in which they are checked; the docstring of each says what it holds."""

OPTIONAL = frozenset({"exports_to_onnx"})
"""Laws that are checked only where they are asked for, because they need packages that are optional."""


@dataclass(frozen=True)
class Report:
    """What was checked; a law that does not hold raises instead.

    Attributes:
        method: Name of the method.
        held: Network -> laws that hold there.
        passed_over: Network -> law -> why it says nothing there.
        refused: Network -> why the method refused it.
    """

    method: str
    held: dict[str, tuple[str, ...]] = field(default_factory=dict)
    passed_over: dict[str, dict[str, str]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """Return one line per network."""
        lines = [f"conformance of {self.method!r}"]
        for network, laws in self.held.items():
            lines.append(f"  {network}: {len(laws)} laws hold")
            lines += [f"    {law} passed over: {why}" for law, why in self.passed_over[network].items()]
        return "\n".join([*lines, *(f"  {network}: refused, {why}" for network, why in self.refused.items())])


def check_method(
    method: Method | str,
    networks: Mapping[str, Build] | None = None,
    *,
    criteria: Mapping[str, Any] | None = None,
    muted: Muted | None = None,
    settle: Settle | None = None,
    laws: Sequence[str] | None = None,
    input_size: Size = 32,
) -> Report:
    """Check that a method keeps every law on every network that it does not refuse.

    Args:
        method: Name of an installed method, a spec such as `"mine{rate=0.5}"`, or an instance.
        networks: Name -> function without arguments that builds a network, the same each time. Default:
            `tiny_networks()`.
        criteria: What pruning is asked for. Default: none; a method that needs some is then not checked for pruning.
        muted: Called with the full network and `criteria`; returns a function of images that computes what the pruned
            network should, with the removed parts switched off instead of cut out.
        settle: Called with the network before it is pruned or exported; gives it, in place, what training would have.
            Default: it stays as it is after conversion.
        laws: Names of the laws to check, from `LAWS`. Default: all but those in `OPTIONAL`.
        input_size: Side of the images in pixels, or (height, width).

    Returns:
        What was checked; `print` it.

    Raises:
        ConformanceError: At the first law that does not hold; the message begins with the name of the law.
        InvalidOption: If a law is unknown.

    Example:
        >>> def test_my_method_keeps_the_laws():
        ...     surgery.testing.check_method("mine", criteria={"keep": 0.5})
    """
    chosen = _selected(laws)
    instance = resolve_method(method, {})
    report = Report(instance.name)
    for network, build in (tiny_networks() if networks is None else networks).items():
        case = Case(network, build, instance, input_size, criteria, muted, settle)
        why = _refusal(case)
        if why:
            report.refused[network] = why
            continue
        found = {name: _outcome(name, law, case) for name, law in chosen.items()}
        report.held[network] = tuple(name for name, reason in found.items() if not reason)
        report.passed_over[network] = {name: reason for name, reason in found.items() if reason}
    if not report.held:
        raise ConformanceError(
            f"converts: {instance.name} refused every network: {report.refused}; pass networks= it can use"
        )
    return report


def _selected(laws: Sequence[str] | None) -> dict[str, Law]:
    names = [name for name in LAWS if name not in OPTIONAL] if laws is None else list(laws)
    unknown = [name for name in names if name not in LAWS]
    if unknown:
        raise InvalidOption(f"unknown laws {unknown}; the laws are {', '.join(LAWS)}")
    return {name: LAWS[name] for name in names}


def _refusal(case: Case) -> str:
    """Return why the method refuses the network, or ""."""
    try:
        case.converted()
    except NothingConverted as error:
        if not error.refusals:
            raise ConformanceError(
                f"converts: {_where(case)}: refused without a reason; give one Refusal per place"
            ) from error
        return str(error.refusals[0])
    except InvalidOption as error:  # the options, or their defaults, do not fit the network
        if not str(error):
            raise ConformanceError(f"converts: {_where(case)}: refused without a reason; say what fits") from error
        return str(error)
    except Exception as error:
        raise ConformanceError(f"converts: {_where(case)}: {type(error).__name__}: {error}") from error
    return ""


def _outcome(name: str, law: Law, case: Case) -> str:
    """Return "" if the law holds, or why it does not apply."""
    try:
        law(case)
    except NotApplicable as reason:
        return str(reason)
    except ConformanceError as error:
        raise ConformanceError(f"{name}: {_where(case)}: {error}") from None
    except Exception as error:  # a law that cannot be carried out does not hold
        raise ConformanceError(f"{name}: {_where(case)}: {type(error).__name__}: {error}") from error
    return ""


def _where(case: Case) -> str:
    return f"{case.method.name} on {case.network}"
