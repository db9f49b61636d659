"""One safetensors file: tensors, texts and a checksum over every byte, written whole and read without pickle."""

from __future__ import annotations

import hashlib
import os
import secrets
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from surgery.errors import CheckpointError
from surgery.history import CURE, parse_json

_DIGEST = "surgery.sha256"
_BLANK = "0" * 64
"""What the checksum is while it is worked out."""


def write_file(path: Path, tensors: Mapping[str, Tensor], texts: Mapping[str, str]) -> None:
    """Write a file beside `path` and move it into place, so that `path` is either the old file or the whole new one.

    Raises:
        CheckpointError: If there is no such folder.
    """
    data = save_tensors(dict(tensors), {**texts, _DIGEST: _BLANK})
    start, end = _place(data)
    whole = memoryview(data)
    _write(path, [whole[:start], checksum(data).encode(), whole[end:]])


def read_file(path: Path, names: Sequence[str]) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return the texts `names` and the tensors of a file.

    Raises:
        CheckpointError: If it cannot be read, lacks a text, or is not, byte by byte, what was written.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    metadata = _metadata(path, data)
    missing = [name for name in (*names, _DIGEST) if not isinstance(metadata.get(name), str)]
    if missing:
        raise CheckpointError(
            f"{path}: a safetensors file without {', '.join(missing)}, so it was not written by surgery.save; pass one "
            "that was"
        )
    if checksum(data) != metadata[_DIGEST]:
        raise CheckpointError(f"{path}: its checksum does not match, so it was edited or damaged; {CURE}")
    try:
        return {name: metadata[name] for name in names}, load_tensors(data)
    except Exception as error:  # safetensors raises its own class for every kind of damage
        raise CheckpointError(f"{path}: truncated or damaged ({error}); {CURE}") from error


def checksum(data: bytes) -> str:
    """Return the checksum of a file: of its header and its tensors, of every byte but the checksum itself."""
    start, end = _place(data)
    whole = memoryview(data)
    digest = hashlib.sha256(whole[:start])
    digest.update(_BLANK.encode())
    digest.update(whole[end:])
    return digest.hexdigest()


def _place(data: bytes) -> tuple[int, int]:
    """Return where the checksum is; its name in bare quotes cannot be part of a JSON string."""
    key = f'"{_DIGEST}":"'.encode()
    start = data.find(key) + len(key)
    return start, start + len(_BLANK)


def _write(path: Path, parts: Sequence[bytes | memoryview]) -> None:
    place = Path(os.path.realpath(path))  # a link stays one
    if (place.exists() and not place.is_file()) or not place.parent.is_dir():
        raise CheckpointError(f"{path}: cannot be written; expected the path of a file in an existing folder")
    temporary = place.with_name(f".{place.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as file:  # with the rights that any new file gets
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, place)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _metadata(path: Path, data: bytes) -> dict[str, Any]:
    try:
        (length,) = struct.unpack("<Q", data[:8])
        if length > len(data) - 8:
            raise ValueError(f"its header claims {length} bytes, the file has {len(data)}")
        header = parse_json(data[8 : 8 + length])
        metadata = header.get("__metadata__", {})
        return metadata if isinstance(metadata, dict) else {}
    except (struct.error, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: not a safetensors file, or truncated ({error}); pass a file written by surgery.save"
        ) from error
