"""The work behind each command of `surgery`; imported when a command runs, because it imports torch."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import typer
from torch import nn

from surgery import plugins
from surgery.analysis import inspect
from surgery.architecture import Architecture
from surgery.checkpoint import save
from surgery.cli_export import write_onnx, write_program
from surgery.cli_files import check_output
from surgery.cli_models import Wanted, load_model, read_checkpoint
from surgery.cli_report import (
    describe_method,
    print_architecture,
    print_blocks,
    print_changes,
    print_difference,
    print_graph,
    print_json,
    print_methods,
    working,
)
from surgery.conversion import ARCHITECTURE, CONVERSION, convert, parse_options
from surgery.cost import Cost, Count, cost
from surgery.errors import CheckpointError, InvalidOption
from surgery.history import Conversion
from surgery.network import ConvertedNetwork
from surgery.pruning import plan, prune
from surgery.show import show
from surgery.sources import rebuild

Size = tuple[int, int]


def list_methods(*, verbose: bool, as_json: bool) -> None:
    """Print the installed methods."""
    plugins.methods()  # two packages with one name are refused here
    found = sorted((describe_method(provider) for provider in plugins.providers()), key=lambda item: str(item["name"]))
    if as_json:
        print_json(found)
    else:
        print_methods(found, verbose=verbose)


def inspect_model(wanted: Wanted, size: Size | None, *, blocks: bool, as_json: bool) -> None:
    """Print the architecture of a network."""
    with working("building and tracing"):
        model = load_model(wanted)
        architecture = inspect(model, size)
    record = _record(model)
    if as_json:
        operations = [dataclasses.asdict(operation) for operation in record.operations] if record else []
        print_json({**dataclasses.asdict(architecture), "operations": operations})
        return
    print_architecture(architecture, record)
    if blocks:
        typer.echo("")
        print_blocks(architecture)


def convert_model(
    wanted: Wanted,
    method: str,
    options: Sequence[str],
    size: Size | None,
    out: Path | None,
    *,
    force: bool,
    dry: bool,
    seed: int,
) -> None:
    """Convert a network and write it, or explain what would be done."""
    if out is None and not dry:
        raise typer.BadParameter("pass a file to write, or --dry-run", param_hint="--out")
    if out is not None:
        check_output(out, (".safetensors",), force=force)
    given = _pairs(options, "-o")
    torch.manual_seed(seed)
    random.seed(seed)
    with working(f"converting with {method}"):
        model = load_model(wanted)
        converted = convert(model, method, input_size=size, **given)
    if dry:
        with working("counting"):
            before, after = cost(model, size), cost(converted, size)
        print_changes(converted, before, after)
        return
    assert out is not None
    save(converted, out)
    typer.echo(f"{out}: {type(converted).__name__}, {_summary(converted)}")
    if not (wanted.pretrained or wanted.weights or isinstance(model, ConvertedNetwork)):
        typer.echo("its weights are random; pass --pretrained or --weights FILE to convert trained ones", err=True)


def prune_model(
    file: Path, criteria: Sequence[str], out: Path | None, *, force: bool, dry: bool, as_json: bool
) -> None:
    """Plan what to remove from a checkpoint, print the plan, and write the smaller network."""
    if out is None and not dry:
        raise typer.BadParameter("pass a file to write, or --dry-run", param_hint="--out")
    if out is not None:
        check_output(out, (".safetensors",), force=force)
    given = _pairs(criteria, "-c")
    with working("planning"):
        model = read_checkpoint(file)
        decided = plan(model, **given)
    if as_json:
        print_json(decided.to_dict())
    else:
        typer.echo(str(decided))
    if dry:
        return
    assert out is not None
    with working("pruning"):
        save(prune(model, decided), out)
    if not as_json:
        typer.echo(f"\nwritten to {out}")


def show_model(wanted: Wanted, method: str | None, options: Sequence[str], size: Size | None) -> None:
    """Print the graph of a network, or what a method makes of it."""
    given = _pairs(options, "-o")
    if options and method is None:
        raise typer.BadParameter("an option belongs to a METHOD; name one", param_hint="-o")
    with working("building and tracing"):
        model = load_model(wanted)
        source = _source(model)
        text = show(convert(model, method, input_size=size, **given) if method else model, source if source else None)
    print_graph(text)


def cost_model(wanted: Wanted, size: Size | None, count: Count, *, as_json: bool) -> None:
    """Print parameters and multiply-adds, whole and per block."""
    with working("counting"):
        model = load_model(wanted)
        found = cost(model, size, count)
    if as_json:
        blocks = [{**dataclasses.asdict(block), "flops": block.flops} for block in found.blocks]
        print_json({**dataclasses.asdict(found), "flops": found.flops, "blocks": blocks})
        return
    typer.echo(str(found))
    source = _source(model)
    if source is not None and isinstance(model, ConvertedNetwork):
        typer.echo("\nbefore the surgery")
        print_difference(_at(source, found, count), found)


def export_model(wanted: Wanted, out: Path, size: Size | None, batch: int | None, *, force: bool) -> None:
    """Write a network for deployment, in eval mode."""
    check_output(out, (".onnx", ".pt2"), force=force)
    with working(f"exporting to {out.suffix}"):
        model = load_model(wanted)
        architecture = inspect(model, None if isinstance(model, ConvertedNetwork) else size)
        image = torch.zeros(batch or 2, architecture.input_size[0], *(size or architecture.input_size[1:]))
        (write_onnx if out.suffix == ".onnx" else write_program)(model, image, out, fixed=batch is not None)
    shape = ", ".join(["N" if batch is None else str(batch), *map(str, image.shape[1:])])
    typer.echo(f"{out}: {type(model).__name__}, takes ({shape})")


def _pairs(pairs: Sequence[str], flag: str) -> dict[str, Any]:
    try:
        return parse_options(list(pairs))
    except InvalidOption as error:
        raise typer.BadParameter(str(error), param_hint=flag) from error


def _record(model: nn.Module) -> Conversion | None:
    return model.meta[CONVERSION] if isinstance(model, ConvertedNetwork) else None


def _source(model: nn.Module) -> nn.Module | None:
    """Return the network that `model` was before the surgery, with fresh weights; `model` itself if there was none."""
    record = _record(model)
    if record is None:
        return model
    try:
        return rebuild(record.source)
    except CheckpointError:
        return None


def _at(source: nn.Module, found: Cost, count: Count) -> Cost:
    return cost(source, found.input_size[1:], count)


def _summary(network: ConvertedNetwork) -> str:
    architecture: Architecture = network.meta[ARCHITECTURE]
    operation = network.meta[CONVERSION].operations[-1]
    changed = {site.block for site in operation.sites if site.block}
    if not architecture.blocks:
        return f"{operation.method} changed {len(changed)} blocks"
    return f"{operation.method} changed {len(changed)} of {len(architecture.blocks)} blocks"
