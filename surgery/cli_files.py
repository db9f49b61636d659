"""Files and sizes on the command line; nothing here needs torch, so that help and usage errors come at once."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

from surgery.errors import SurgeryError


class UnreadableFile(SurgeryError):
    """A file or a download that the command needs is missing, damaged or foreign."""


def parse_size(text: str) -> tuple[int, int]:
    """Read "224" or "192x256" (height x width).

    Raises:
        BadParameter: If it is neither.
    """
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise typer.BadParameter(f"{text!r}: expected a side in pixels such as 224, or height x width such as 192x256")
    return int(sides[0]), int(sides[-1])


def check_output(path: Path, suffixes: tuple[str, ...], *, force: bool) -> None:
    """Refuse an output path before any work is done.

    Raises:
        BadParameter: If the suffix is unknown, or the file exists and `force` is not given.
        UnreadableFile: If its folder does not exist.
    """
    if path.suffix not in suffixes:
        raise typer.BadParameter(f"{path}: expected a name that ends in {' or '.join(suffixes)}", param_hint="--out")
    if path.is_dir() or (path.exists() and not force):
        raise typer.BadParameter(f"{path} exists; pass another name, or --force to replace it", param_hint="--out")
    if not path.parent.is_dir():
        raise UnreadableFile(f"{path}: there is no folder {path.parent}; create it first")


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to; it is moved into place if nothing went wrong, else removed."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.stem}.") as folder:
        draft = Path(folder) / path.name
        yield draft
        os.replace(draft, path)
