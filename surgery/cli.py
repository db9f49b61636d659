"""The command `surgery`.

Only declarations live here: torch takes seconds to import, so the work is imported when a command runs.
"""

from __future__ import annotations

import traceback
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from surgery.cli_files import UnreadableFile, parse_size
from surgery.errors import SurgeryError

EPILOG = (
    "MODEL is torchvision:NAME, timm:NAME, a bare NAME (torchvision's if both have it), or a file "
    "that convert wrote.\n\n"
    "Exit codes: 0 done; 1 refused, the reason is on stderr; 2 wrong usage; 3 a file or a download is missing or "
    "unreadable."
)


class _Group(TyperGroup):
    """Say errors of the library in their own words, with the documented exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return TyperGroup.invoke(self, ctx)
        except (SurgeryError, OSError) as error:
            if ctx.params["debug"]:
                traceback.print_exc()
            typer.echo(f"{typer.style('error:', fg='red', bold=True)} {error}", err=True)
            raise typer.Exit(3 if isinstance(error, (UnreadableFile, OSError)) else 1) from error


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=EPILOG,
)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="torchvision:NAME, timm:NAME, NAME, or a checkpoint.")]
File = Annotated[Path, typer.Argument(metavar="FILE", help="A file that `surgery convert` wrote.")]
MethodName = Annotated[str, typer.Argument(metavar="METHOD", help="See `surgery methods`.")]
Classes = Annotated[int | None, typer.Option("--classes", "--num-classes", min=1, help="Classes of a new network.")]
Channels = Annotated[int | None, typer.Option("--in-channels", min=1, help="Channels of the image (timm).")]
Pretrained = Annotated[bool, typer.Option("--pretrained", help="Download the library's weights.")]
Weights = Annotated[Path | None, typer.Option("--weights", help="State dict to load: .safetensors or .pt.")]
InputSize = Annotated[
    Any, typer.Option("--input-size", parser=parse_size, metavar="SIZE", help="Pixels: 224, or HEIGHTxWIDTH.")
]
Options = Annotated[
    list[str] | None,
    typer.Option("--option", "-o", metavar="KEY=VALUE", help="Option of the method; repeat. VALUE is JSON, else text."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
Out = Annotated[Path | None, typer.Option("--out", help="File to write, .safetensors.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing file.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Explain, write nothing.")]


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"surgery {version('surgery')}")
        raise typer.Exit


@app.callback()
def root(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Restructure the branches of residual image classifiers: inspect, convert, show, prune, export."""


@app.command()
def methods(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="List the options of each.")] = False,
    json: Json = False,
) -> None:
    """List the installed methods.

    Example: `surgery methods --verbose`
    """
    from surgery import cli_commands

    cli_commands.list_methods(verbose=verbose, as_json=json)


@app.command()
def inspect(
    model: Model,
    input_size: InputSize = None,
    classes: Classes = None,
    in_channels: Channels = None,
    pretrained: Pretrained = False,
    weights: Weights = None,
    blocks: Annotated[bool, typer.Option("--blocks", help="One line per block, too.")] = False,
    json: Json = False,
) -> None:
    """Print stages, blocks and branches of a network, and what cannot be used, and why.

    Example: `surgery inspect resnext50_32x4d --blocks`
    """
    from surgery import cli_commands, cli_models

    wanted = cli_models.Wanted(model, classes, in_channels, pretrained, weights)
    cli_commands.inspect_model(wanted, input_size, blocks=blocks, as_json=json)


@app.command()
def convert(
    model: Model,
    method: MethodName,
    option: Options = None,
    out: Out = None,
    input_size: InputSize = None,
    classes: Classes = None,
    in_channels: Channels = None,
    pretrained: Pretrained = False,
    weights: Weights = None,
    seed: Annotated[int, typer.Option(help="For random weights and random choices of the method.")] = 0,
    dry_run: DryRun = False,
    force: Force = False,
) -> None:
    """Convert a network with a method and write it to a file; or, with --dry-run, say what would change.

    Example: `surgery convert resnext29_8x64d METHOD --classes 100 -o KEY=VALUE --out new.safetensors`
    """
    from surgery import cli_commands, cli_models

    wanted = cli_models.Wanted(model, classes, in_channels, pretrained, weights)
    cli_commands.convert_model(wanted, method, option or [], input_size, out, force=force, dry=dry_run, seed=seed)


@app.command()
def prune(
    file: File,
    criterion: Annotated[
        list[str] | None,
        typer.Option("--criterion", "-c", metavar="KEY=VALUE", help="Criterion of the method; repeat. VALUE is JSON."),
    ] = None,
    out: Out = None,
    dry_run: DryRun = False,
    force: Force = False,
    json: Json = False,
) -> None:
    """Print what a converted network can do without, and write the smaller network.

    Example: `surgery prune new.safetensors -c classes=[3,5] --out small.safetensors`
    """
    from surgery import cli_commands

    cli_commands.prune_model(file, criterion or [], out, force=force, dry=dry_run, as_json=json)


@app.command()
def show(
    model: Model,
    method: Annotated[str | None, typer.Argument(metavar="[METHOD]", help="Show what this would do.")] = None,
    option: Options = None,
    input_size: InputSize = None,
    classes: Classes = None,
    in_channels: Channels = None,
) -> None:
    """Print the graph of a network, folded to what changed: + inserted, ~ replaced, - gone.

    Example: `surgery show resnext50_32x4d METHOD`
    """
    from surgery import cli_commands, cli_models

    cli_commands.show_model(cli_models.Wanted(model, classes, in_channels), method, option or [], input_size)


@app.command()
def cost(
    model: Model,
    input_size: InputSize = None,
    classes: Classes = None,
    in_channels: Channels = None,
    count: Annotated[Literal["macs", "flops"], typer.Option(help="Unit of the table; one MAC is two flops.")] = "macs",
    json: Json = False,
) -> None:
    """Print parameters and multiply-adds of a network, whole and per block.

    Example: `surgery cost small.safetensors --json`
    """
    from surgery import cli_commands, cli_models

    cli_commands.cost_model(cli_models.Wanted(model, classes, in_channels), input_size, count, as_json=json)


@app.command()
def export(
    model: Model,
    out: Annotated[Path, typer.Option("--out", help="File to write: .onnx, or .pt2 for torch.export.")],
    input_size: InputSize = None,
    batch: Annotated[int | None, typer.Option(min=1, help="The only batch size it takes. Default: any.")] = None,
    force: Force = False,
) -> None:
    """Write a network for deployment, in eval mode.

    Example: `surgery export small.safetensors --out small.onnx`
    """
    from surgery import cli_commands, cli_models

    cli_commands.export_model(cli_models.Wanted(model), out, input_size, batch, force=force)


def main() -> None:
    """Run the command line."""
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    app(prog_name="surgery")


if __name__ == "__main__":
    main()
