"""Write a network for deployment: torch.export programs and ONNX."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from surgery.cli_files import written_whole
from surgery.errors import SurgeryError


def write_program(model: nn.Module, image: Tensor, path: Path, *, fixed: bool) -> None:
    """Write a `.pt2` file, for `torch.export.load`.

    Args:
        model: The network, in eval mode.
        image: Example input.
        path: File to write.
        fixed: Whether the batch size of `image` is the only one that the program takes.

    Raises:
        SurgeryError: If the network cannot be exported.
    """
    program = _export(model, image, fixed=fixed)
    with written_whole(path) as draft:
        torch.export.save(program, draft)


def write_onnx(model: nn.Module, image: Tensor, path: Path, *, fixed: bool) -> None:
    """Write one `.onnx` file, weights inside.

    Args:
        model: The network, in eval mode.
        image: Example input.
        path: File to write.
        fixed: Whether the batch size of `image` is the only one that the file takes.

    Raises:
        SurgeryError: If the network cannot be exported, or the extra `export` is not installed.
    """
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise SurgeryError(
            f"ONNX needs {' and '.join(missing)}, which the extra `export` brings: pip install 'surgery[export]'"
        )
    program = _export(model, image, fixed=fixed)
    with _quiet("torch.onnx"):
        written = torch.onnx.export(program, verbose=False, dynamo=True)
    assert written is not None
    with written_whole(path) as draft:
        written.save(draft, external_data=False)


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    # The ONNX exporter warns about signatures of operators that have nothing to do with the network.
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _export(model: nn.Module, image: Tensor, *, fixed: bool) -> ExportedProgram:
    dynamic = None if fixed else ({0: Dim("N")},)
    try:
        with torch.no_grad():
            return torch.export.export(model, (image,), dynamic_shapes=dynamic)
    except Exception as error:  # the exporter raises dozens of internal classes
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        cure = (
            "pass --batch N if only the free batch size is in the way"
            if not fixed
            else "run with --debug for the details"
        )
        raise SurgeryError(
            f"{type(model).__name__}: cannot be exported ({type(error).__name__}: {reason}); {cure}"
        ) from error
