"""What the commands print: tables for people, JSON for scripts, a spinner only on a terminal."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from inspect import cleandoc, formatannotation, getdoc
from typing import Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from surgery.architecture import Architecture
from surgery.conversion import ARCHITECTURE, CONVERSION
from surgery.cost import Cost
from surgery.history import Conversion, Operation, Site
from surgery.method import Method
from surgery.network import ConvertedNetwork
from surgery.plugins import Provider

_PRESERVES = {"output": "the output", "weights": "the weights", "nothing": "nothing"}
_COLOURS = {"+": "green", "~": "yellow", "-": "red", "@": "cyan"}


@contextmanager
def working(what: str) -> Iterator[None]:
    """Show a spinner on stderr while the body runs, if a person is looking."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(what):
        yield


def print_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print an aligned table, as wide as it needs to be where no terminal limits it."""
    console = Console(highlight=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column, header in enumerate(headers):
        numbers = all(row[column][:1].isdigit() and " x " not in row[column] for row in rows)
        table.add_column(header, justify="right" if numbers and header != "branches" else "left")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console.print(table, width=None if console.is_terminal else 400)


def print_json(data: Any) -> None:
    """Print JSON, indented, with nothing around it."""
    typer.echo(json.dumps(data, indent=2))


def print_graph(text: str) -> None:
    """Print what `surgery.show` returned, in colour on a terminal."""
    console = Console(highlight=False)
    if not console.is_terminal:
        typer.echo(text)
        return
    for line in text.splitlines():
        console.print(Text(line, style=_COLOURS.get(line[:1], "")), soft_wrap=True)


def print_architecture(architecture: Architecture, record: Conversion | None) -> None:
    """Print the stages of a network, what was done to it, and what cannot be used."""
    lines = str(architecture).splitlines()
    done = ", then ".join(_done(operation) for operation in record.operations) if record else ""
    typer.echo("\n".join([lines[0], *([f"after {done}"] if done else []), "", *lines[1:]]))


def _done(operation: Operation) -> str:
    return f"{operation.kind} {operation.method}".strip() + (f" {operation.version}" if operation.version else "")


def print_blocks(architecture: Architecture) -> None:
    """Print one line per block."""
    rows = []
    for block in architecture.blocks:
        shortcut = "none" if not block.is_residual else "projected" if block.projected else "identity"
        channels = f"{block.channels.input} -> {block.channels.hidden} -> {block.channels.output}"
        size = f"{block.resolution[0]} x {block.resolution[1]}"
        figures = (f"{block.params:,}", f"{block.macs / 1e6:,.1f}")
        rows.append((block.path, f"{block.cardinality} {block.kind}", shortcut, channels, size, *figures))
    print_table(("block", "branches", "shortcut", "channels", "resolution", "parameters", "MMACs"), rows)


def print_changes(network: ConvertedNetwork, before: Cost, after: Cost) -> None:
    """Print what the last operation did in each block, what it left alone, and why some places cannot be used."""
    architecture: Architecture = network.meta[ARCHITECTURE]
    operation = network.meta[CONVERSION].operations[-1]
    rows = [
        ("(root)", _roles(operation.sites, "")),
        *((b.path, _roles(operation.sites, b.path)) for b in architecture.blocks),
    ]
    changed = sum(bool(roles) for path, roles in rows if path != "(root)")
    options = ", ".join(f"{key}={json.dumps(value)}" for key, value in operation.options.items() if value is not None)
    typer.echo(
        f"{operation.method} ({options or 'no options'}) changes {changed} of {len(architecture.blocks)} blocks\n"
    )
    print_table(
        ("block", "what"),
        [
            (path, roles or "skipped: the method does not select it")
            for path, roles in rows
            if roles or path != "(root)"
        ],
    )
    for refusal in architecture.refusals:
        typer.echo(f"skipped: {refusal}")
    typer.echo("")
    print_difference(before, after)


def _roles(sites: Sequence[Site], path: str) -> str:
    return ", ".join(f"{site.role} ({site.node})" for site in sites if site.block == path)


def print_difference(before: Cost, after: Cost) -> None:
    """Print parameters and multiply-adds before and after."""
    rows = [("parameters", before.params, after.params), ("MACs, one image", before.macs, after.macs)]
    print_table(
        ("", "before", "after", "kept"),
        [(name, f"{old:,}", f"{new:,}", f"{100 * new / max(old, 1):.1f} %") for name, old, new in rows],
    )


def describe_method(provider: Provider) -> dict[str, Any]:
    """Return what is known about one provider, as JSON values."""
    found: dict[str, Any] = {
        "entry_point": provider.entry_point,
        "distribution": provider.distribution,
        "version": provider.version,
        "error": provider.error,
    }
    method = provider.method
    if method is None:
        return {"name": "", **found}
    summary = cleandoc(method.__doc__ or "").partition("\n")[0]  # its own; getdoc would find that of Method
    facts = {"preserves": method.preserves, "stacks": method.stacks, "summary": summary, "options": _options(method)}
    return {"name": method.name, **found, **facts}


def _options(method: type[Method]) -> list[dict[str, str]]:
    described = _attributes(getdoc(method) or "")
    options = []
    for option in dataclasses.fields(method):
        default = _default(option)
        options.append(
            {"name": option.name, "type": _type(option), "default": default, "help": described.get(option.name, "")}
        )
    return options


def _type(option: dataclasses.Field[Any]) -> str:
    return option.type if isinstance(option.type, str) else formatannotation(option.type)


def _default(option: dataclasses.Field[Any]) -> str:
    if option.default is not dataclasses.MISSING:
        return repr(option.default)
    return "required" if option.default_factory is dataclasses.MISSING else repr(option.default_factory())


def _attributes(docstring: str) -> dict[str, str]:
    section = re.search(r"^Attributes:\n((?:[ ]{4}.*\n?|\n)*)", docstring, re.MULTILINE)
    entries = re.split(r"^ {4}(?=\w+:)", section[1], flags=re.MULTILINE) if section else []
    pairs = (entry.partition(":") for entry in entries if ":" in entry)
    return {name.strip(): " ".join(text.split()) for name, _, text in pairs}


def print_methods(found: Sequence[dict[str, Any]], *, verbose: bool) -> None:
    """Print the installed methods, with their options if `verbose`, and the plugins that could not be loaded."""
    usable = [method for method in found if not method["error"]]
    rows = [
        (
            method["name"],
            _PRESERVES[method["preserves"]],
            "yes" if method["stacks"] else "no",
            _origin(method),
            method["summary"],
        )
        for method in usable
    ]
    print_table(("method", "keeps", "stacks", "from", "what it does"), rows)
    for method in usable if verbose else []:
        options = "options, as -o NAME=VALUE" if method["options"] else "no options"
        typer.echo(f"\n{method['name']}, from {_origin(method)}, entry point {method['entry_point']!r}: {options}")
        if method["options"]:
            rows = [tuple(option.values()) for option in method["options"]]
            print_table(("name", "type", "default", "what it is"), rows)
    for method in found:
        if method["error"]:
            typer.echo(f"not usable: {method['entry_point']} of {method['distribution']}: {method['error']}", err=True)


def _origin(method: dict[str, Any]) -> str:
    return f"{method['distribution']} {method['version']}".strip()
