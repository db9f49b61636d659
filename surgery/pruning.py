"""Prune = plan, then apply: a method decides, the plan can be printed and kept, and the weights are cut here, once."""

from __future__ import annotations

import copy
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

import torch
from torch import nn

from surgery.conversion import ARCHITECTURE, CONVERSION, INCOMPLETE, METHODS
from surgery.errors import InvalidOption, PruneError
from surgery.figures import Figures, figures
from surgery.history import Conversion, Operation, read_fields
from surgery.network import ConvertedNetwork
from surgery.objective import methods_of
from surgery.plugins import Provider, provider_of
from surgery.rewriter import Rewriter
from surgery.tracing import refuse_wrapped

CutKind = Literal["branches", "body", "classes", "inputs", "outputs", "stream", "module", "members"]


@dataclass(frozen=True)
class Cut:
    """One thing to remove.

    Attributes:
        kind: "branches" keeps some branches of a block, "body" removes the body of a residual block, "classes" keeps
            some rows of the classifier, "inputs" and "outputs" keep some channels that one convolution reads or writes,
            "stream" keeps some that it writes and everything that is coupled to it, across blocks, "module" keeps some
            parts of an inserted module (see `surgery.slicing.Selectable`) or takes a pass-through one out, "members"
            keeps some of the copies of a replicated network.
        path: Path of the block, the classifier, the convolution, or the inserted module.
        keep: Indices of what stays, in order; empty for "body", and for a "module" that is taken out.
        of: How many there are now.
        reason: Why, in the method's words.
    """

    kind: CutKind
    path: str
    keep: tuple[int, ...]
    of: int
    reason: str = ""

    def __str__(self) -> str:
        """Return the cut as one line."""
        unit = {"module": "parts", "stream": "channels of the stream"}.get(self.kind, self.kind)
        what = f"{len(self.keep)} of {self.of} {unit} kept" if self.keep else f"{self.kind} removed"
        return f"{self.path}: {what}" + (f" ({self.reason})" if self.reason else "")


@dataclass(frozen=True)
class PrunePlan:
    """What a method decided to remove from one network, and what that saves; `print` it before applying it.

    Attributes:
        method: Name of the method that decided.
        criteria: What it was asked for.
        cuts: What goes, in the order of application: indices count what the cuts before left over.
        before: Size of the network as it is.
        after: Size of the pruned network.
    """

    method: str
    criteria: Mapping[str, Any]
    cuts: tuple[Cut, ...]
    before: Figures
    after: Figures

    @classmethod
    def of(cls, model: ConvertedNetwork, method: str, cuts: Sequence[Cut], criteria: Mapping[str, Any]) -> Self:
        """Return the plan with its figures, worked out on a copy without data.

        Raises:
            PruneError: If a cut does not fit the network.
        """
        memo: dict[int, Any] = {}
        for tensor in [*model.parameters(), *model.buffers()]:
            twin = torch.empty_like(tensor, device="meta")
            memo[id(tensor)] = nn.Parameter(twin, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else twin
        hollow = copy.deepcopy(model, memo)
        before = figures(hollow)
        return cls(method, dict(criteria), tuple(cuts), before, figures(_apply(hollow, method, cuts).finish()))

    @property
    def kept_params(self) -> float:
        """Share of the parameters that stay, in (0, 1]."""
        return self.after.params / self.before.params

    @property
    def kept_params_without_projections(self) -> float:
        """The same with projection shortcuts left out of both counts."""
        before, after = self.before, self.after
        return (after.params - after.projection_params) / (before.params - before.projection_params)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read a plan back.

        Raises:
            PruneError: If a field is missing, unknown or of another type, or a cut keeps what cannot be there.
        """
        try:
            plan = read_fields(cls, data)
            for cut in plan.cuts:
                if len(set(cut.keep)) < len(cut.keep) or not all(0 <= index < cut.of for index in cut.keep):
                    raise ValueError(
                        f"{cut.path}: keeps {reprlib.repr(cut.keep)}, expected each of {cut.of} at most once"
                    )
        except ValueError as error:
            raise PruneError(f"the prune plan is incomplete or edited ({error}); plan it anew") from error
        return plan

    def __str__(self) -> str:
        """Return a table: one line per cut, then parameters and MACs."""
        lines = [f"prune plan of {self.method!r}" + (f" for {dict(self.criteria)}" if self.criteria else "")]
        lines += [f"  {cut}" for cut in self.cuts] or ["  nothing to remove"]
        before, after = self.before, self.after
        lines.append(_row("parameters", before.params, after.params))
        lines.append(_row("MACs", before.macs, after.macs))
        if before.projection_params:
            lines.append("without projection shortcuts")
            pairs = [(f.params - f.projection_params, f.macs - f.projection_macs) for f in (before, after)]
            lines.append(_row("parameters", pairs[0][0], pairs[1][0]))
            lines.append(_row("MACs", pairs[0][1], pairs[1][1]))
        return "\n".join(lines)


def _row(name: str, before: int, after: int) -> str:
    return f"  {name:<11} {before:>15,} -> {after:>15,}  ({100 * after / before:.1f} % kept)"


def plan(model: nn.Module, *, method: str | None = None, **criteria: Any) -> PrunePlan:
    """Let the method that converted `model` decide what can go.

    Args:
        model: A converted network.
        method: Which method's plan, where several have converted it.
        **criteria: The method's own, see its method card.

    Raises:
        PruneError: If the network is not converted, or is pruned already.
        InvalidOption: If the criteria cannot be met.
    """
    network = _converted(model)
    candidates = {candidate.name: candidate for candidate in methods_of(network)}
    if method is None and len(candidates) != 1:
        raise InvalidOption(f"several methods converted this network; pass method= one of {', '.join(candidates)}")
    if method is not None and method not in candidates:
        raise InvalidOption(f"{method!r} has not converted this network; {', '.join(candidates) or 'no method'} has")
    return candidates[method or next(iter(candidates))].plan(network, **criteria)


def prune(model: nn.Module, plan: PrunePlan | None = None, **criteria: Any) -> ConvertedNetwork:
    """Return a smaller copy of `model`; the model itself is left untouched.

    Args:
        model: A converted network.
        plan: What to remove; by default what `surgery.plan(model, **criteria)` decides.
        **criteria: Where no plan is given.

    Raises:
        PruneError: If the plan does not fit the network.
    """
    network = _converted(model)
    if plan is not None and criteria:
        raise InvalidOption(f"pass either a plan or criteria, found both: {sorted(criteria)}")
    if plan is not None and not isinstance(plan, PrunePlan):
        raise PruneError(
            f"prune: found a {type(plan).__name__}, expected what surgery.plan returned, or criteria by name"
        )
    decided = plan if plan is not None else _decided(network, criteria)
    return apply_plan(copy.deepcopy(network), decided)


def apply_plan(network: ConvertedNetwork, decided: PrunePlan) -> ConvertedNetwork:
    """Cut `network` in place as `decided` says, and write it into the record.

    Raises:
        PruneError: If the plan was made for another network.
    """
    if decided.before != (found := figures(network)):
        raise PruneError(
            f"the plan is one for {decided.before.params:,} parameters and {decided.before.macs:,} MACs, found a "
            f"network of {found.params:,} and {found.macs:,}; plan it anew"
        )
    rewriter = _apply(network, decided.method, decided.cuts)
    pruned = rewriter.finish()
    _declare_features(pruned)
    provider = _provider(network, decided.method)
    operation = Operation(
        "prune", decided.method, decided.to_dict(), {}, tuple(rewriter.sites), provider.distribution, provider.version
    )
    pruned.meta[CONVERSION] = pruned.meta[CONVERSION].then(operation)
    return pruned


def _declare_features(network: ConvertedNetwork) -> None:
    """Let a timm network say how many features its classifier reads now; `reset_classifier` builds one for as many."""
    path = network.meta[ARCHITECTURE].head.path
    head = None if path is None else network.get_submodule(path)
    said = vars(network)
    if not isinstance(head, nn.Linear) or said.get("head_hidden_size", head.in_features) == head.in_features:
        return
    if said.get("num_features") == said["head_hidden_size"]:
        said["num_features"] = head.in_features
    said["head_hidden_size"] = head.in_features


def _decided(network: ConvertedNetwork, criteria: Mapping[str, Any]) -> PrunePlan:
    return plan(network, **criteria)


def _provider(network: ConvertedNetwork, name: str) -> Provider:
    methods = {method.name: type(method) for method in network.meta[METHODS]}
    if name not in methods:
        raise PruneError(
            f"the plan is one of {name!r}, but the network is converted by {', '.join(methods)}; plan it anew"
        )
    return provider_of(methods[name])


def _converted(model: nn.Module) -> ConvertedNetwork:
    refuse_wrapped(model)
    if not isinstance(model, ConvertedNetwork):
        raise PruneError(
            f"{type(model).__name__} is not a converted network; call surgery.convert(model, method) first"
        )
    if INCOMPLETE in model.meta:
        raise PruneError(f"prune: found {model.meta[INCOMPLETE]}")
    record: Conversion = model.meta[CONVERSION]
    if any(operation.kind == "prune" for operation in record.operations):
        raise PruneError("the network is pruned already; plan and prune the converted network it came from")
    return model


def _apply(network: ConvertedNetwork, method: str, cuts: Sequence[Cut]) -> Rewriter:
    rewriter = Rewriter(network, method)
    for cut in cuts:
        _APPLY[cut.kind](rewriter, cut)
    return rewriter


def _cut_branches(rewriter: Rewriter, cut: Cut) -> None:
    # Also where all of them stay: what the block contains for the training of its method has to learn that it is over.
    rewriter.keep(rewriter.architecture.block(cut.path), branches=cut.keep, of=cut.of)


def _cut_body(rewriter: Rewriter, cut: Cut) -> None:
    rewriter.bypass(rewriter.architecture.block(cut.path))


def _cut_inputs(rewriter: Rewriter, cut: Cut) -> None:
    if len(cut.keep) < cut.of:
        rewriter.narrow(cut.path, inputs=cut.keep)


def _cut_outputs(rewriter: Rewriter, cut: Cut) -> None:
    if len(cut.keep) < cut.of:
        rewriter.narrow(cut.path, outputs=cut.keep)


def _cut_stream(rewriter: Rewriter, cut: Cut) -> None:
    rewriter.scale({cut.path: cut.keep})


def _cut_module(rewriter: Rewriter, cut: Cut) -> None:
    if cut.keep:
        rewriter.select(cut.path, cut.keep)
    else:
        rewriter.remove(cut.path)


def _cut_members(rewriter: Rewriter, cut: Cut) -> None:
    rewriter.keep_members(cut.keep)


def _cut_classes(rewriter: Rewriter, cut: Cut) -> None:
    head = rewriter.architecture.head
    if head.path != cut.path or head.classes != cut.of:
        raise PruneError(
            f"{cut.path}: the plan keeps {len(cut.keep)} of {cut.of} classes there, found {head.classes} at {head.path}"
        )
    rewriter.keep_classes(cut.keep)


_APPLY: Mapping[CutKind, Callable[[Rewriter, Cut], None]] = {
    "branches": _cut_branches,
    "body": _cut_body,
    "classes": _cut_classes,
    "inputs": _cut_inputs,
    "outputs": _cut_outputs,
    "stream": _cut_stream,
    "module": _cut_module,
    "members": _cut_members,
}
