"""Print the graphs of a network, one line per node, folded to what a surgery changed: for eyes and for golden files."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import fx, nn

from surgery.analysis import analyze
from surgery.conversion import CONVERSION
from surgery.history import Conversion, Site
from surgery.network import ConvertedNetwork, SurgeryModule, assemble
from surgery.tracing import OWNER, SITE

CONTEXT = 2
"""Unchanged lines shown around a changed one."""
_INDENT = "    "
_WIDEST = 64


@dataclass(frozen=True)
class _Line:
    mark: str
    text: str
    note: str = ""


def show(model: nn.Module, source: nn.Module | None = None) -> str:
    """Return the root graph of a network, one line per node, with every changed block unfolded below its call.

    `+` marks what a method inserted, `~` what it replaced, `-` what is gone. A node is written as the call it makes,
    `target(arguments)`; others read it by the target with `_` for `.`, or by the name before `=`. In a changed block
    two lines of context stand around each change; an unchanged block is one line, and so is one that changed exactly
    as an earlier one did.

    Args:
        model: A converted network, or a plain one, which is shown as the blocks that conversion would make of it.
        source: The network before; without it, what is gone or was replaced cannot be shown.

    Raises:
        TraceError, UnsupportedModel: If a plain network, or `source`, cannot be traced.
    """
    network = model if isinstance(model, ConvertedNetwork) else assemble(copy.deepcopy(model), analyze(model)[1])
    record: Conversion | None = network.meta.get(CONVERSION)
    sites = [site for operation in record.operations for site in operation.sites] if record else []
    before = assemble(copy.deepcopy(source), analyze(source)[1]) if source is not None else None
    view = _View(sites, before)
    body = [*view.lines(network, "")]
    width = min(max(len(line.text) for line in body), _WIDEST)
    rows = [f"{line.mark} {line.text:<{width}}  {line.note}".rstrip() for line in body]
    return "\n".join([_headline(network, record, view), *rows])


def _headline(network: ConvertedNetwork, record: Conversion | None, view: _View) -> str:
    name = type(network).__name__
    if record is None or not record.operations:
        return f"{name}, not converted"
    done = ", ".join(f"{operation.kind} {operation.method}".strip() for operation in record.operations)
    count = view.count
    gone = f", {count['-']} gone (-)" if view.before is not None else ""
    edits = "".join(f"; {edit}" for edit in view.edits(network, ""))
    return f"{name} after {done}: {count['+']} nodes inserted (+), {count['~']} replaced (~){gone}{edits}"


@dataclass(frozen=True)
class _View:
    """Walk over the graphs of a network.

    Attributes:
        sites: Everything the record says was changed.
        before: The source as a network of blocks, or None.
        count: How many lines carry each mark, folded ones included.
        unfolded: Path of the first block that changed in the way that the key spells out.
    """

    sites: list[Site]
    before: ConvertedNetwork | None
    count: dict[str, int] = field(default_factory=lambda: {"+": 0, "~": 0, "-": 0, " ": 0})
    unfolded: dict[tuple[_Line, ...], str] = field(default_factory=dict)

    def lines(self, module: SurgeryModule, path: str) -> Iterator[_Line]:
        """Yield the lines of one graph; what its blocks changed is indented below their calls."""
        old = self._old(path)
        gone = _gone(module.graph, old)
        for node in module.graph.nodes:
            called = module.get_submodule(str(node.target)) if node.op == "call_module" else None
            self.count[_mark(node)] += 1
            if isinstance(called, SurgeryModule):
                yield from self._call(node, called, f"{path}.{node.target}" if path else str(node.target))
            elif node.op != "output":
                yield _Line(_mark(node), _text(node), _note(node, called, old))
            for vanished in gone.get(node.name, []):
                self.count["-"] += 1
                yield _Line("-", _text(vanished))

    def edits(self, module: SurgeryModule, path: str) -> list[str]:
        """Return the changes of one graph that no node of it carries: what was cut or bypassed."""
        stamped = [node.meta[SITE] for node in module.graph.nodes if SITE in node.meta]
        return list(dict.fromkeys(f"{s.method} {s.role}" for s in self.sites if s.block == path and s not in stamped))

    def _call(self, node: fx.Node, block: SurgeryModule, path: str) -> Iterator[_Line]:
        inside = [*self.lines(block, path)]
        edits = self.edits(block, path)
        changed = any(line.mark != " " for line in inside)
        first = self.unfolded.setdefault(tuple(inside), path) if changed else path
        same = f"changed as {first}" if first != path else ""
        notes = [f"{len(inside)} nodes", *edits, same] if changed or edits else [f"{len(inside)} nodes", "unchanged"]
        yield _Line(_mark(node), _text(node), ", ".join(filter(None, notes)))
        if changed and first == path:
            yield from (_Line(line.mark, _INDENT + line.text, line.note) for line in _folded(inside))

    def _old(self, path: str) -> SurgeryModule | None:
        modules = dict(self.before.named_modules()) if self.before is not None else {}
        found = modules.get(path)
        return found if isinstance(found, SurgeryModule) else None


def _gone(graph: fx.Graph, before: SurgeryModule | None) -> dict[str, list[fx.Node]]:
    """Return the nodes of `before` that `graph` lacks, by the name of the node behind which they stood."""
    names = [node.name for node in graph.nodes]
    gone: dict[str, list[fx.Node]] = {}
    last = names[0]
    for node in before.graph.nodes if before is not None else ():
        if node.name in names:
            last = node.name
        else:
            gone.setdefault(last, []).append(node)
    return gone


def _folded(lines: list[_Line]) -> Iterator[_Line]:
    """Yield the changed lines with their context; a run of others becomes one line that counts them."""
    changed = [index for index, line in enumerate(lines) if line.mark != " "]
    near = {i for index in changed for i in range(index - CONTEXT, index + CONTEXT + 1)}
    hidden = 0
    for index, line in enumerate(lines):
        if index not in near:
            hidden += 1
            continue
        if hidden:
            yield _more(hidden)
        hidden = 0
        yield line
    if hidden:
        yield _more(hidden)


def _more(count: int) -> _Line:
    return _Line(" ", f"... {count} more")


def _mark(node: fx.Node) -> str:
    if SITE not in node.meta:
        return " "
    # Tracing wrote down the owner of every node of the source; what a method makes has none.
    return "~" if OWNER in node.meta else "+"


def _text(node: fx.Node) -> str:
    if node.op == "placeholder":
        return f"{node.name} (input)"
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    arguments = [*map(_argument, node.args), *(f"{key}={_argument(value)}" for key, value in node.kwargs.items())]
    named = "" if node.name == target.replace(".", "_") else f"{node.name} = "
    dot = "." if node.op == "call_method" else ""
    return f"{named}{dot}{target}" + ("" if node.op == "get_attr" else f"({', '.join(arguments)})")


def _argument(value: fx.node.Argument) -> str:
    return str(fx.node.map_arg(value, lambda node: node))


def _note(node: fx.Node, module: nn.Module | None, before: SurgeryModule | None) -> str:
    if module is None:
        return ""
    name = type(module).__name__
    if SITE not in node.meta:
        return name
    was = ""
    if before is not None and OWNER in node.meta:
        was = f", was {type(before.get_submodule(str(node.target))).__name__}"
    return f"{name}({module.extra_repr()}){was}"
