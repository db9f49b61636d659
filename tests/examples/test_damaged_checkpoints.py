"""Damaged training checkpoints: each is refused with the file and what to do, and none is half read."""

from __future__ import annotations

from random import Random

import pytest
import torch

import checkpoints
from tests import damages
from tests.damages import BYTES, HEADER, foreign

SEEDS = 5
OTHER_FIELDS = (damages.bit_in_the_texts, damages.text_twice)
"""They look for the texts of converted networks."""
SAME_CONTENT = (damages.written_otherwise, damages.tensor_twice)
"""The file may say the same in other bytes, which is no damage to a checksum over its content."""
DAMAGES = [damage for damage in (*BYTES, *HEADER) if damage not in (*OTHER_FIELDS, *SAME_CONTENT)]


def checkpoint(seed: int) -> checkpoints.Checkpoint:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"model.conv.weight": (4, 3, 3, 3), "model.fc.weight": (10, 4), "model.fc.bias": (10,)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    tensors |= {f"optimizer.{i}.momentum_buffer": tensor + 1 for i, tensor in enumerate(tensors.values())}
    tensors["model.norm.num_batches_tracked"] = torch.tensor(7 + seed)
    progress = {"epoch": seed, "history": [{"epoch": 0, "loss": 2.25, "accuracy": 0.125}]}
    return checkpoints.Checkpoint(tensors, {"optimizer.0.step": seed}, {"recipe": "digits", "seed": seed}, progress)


@pytest.fixture
def files(tmp_path) -> list[bytes]:
    written = []
    for seed in range(2):
        checkpoints.write(tmp_path / "training.safetensors", checkpoint(seed))
        written.append((tmp_path / "training.safetensors").read_bytes())
    return written


def refusal(path, data: bytes) -> str | None:
    """Return what a file is refused with, or None where it is read."""
    path.write_bytes(data)
    try:
        checkpoints.read(path)
    except checkpoints.CheckpointError as error:
        return str(error)
    return None


def test_what_is_not_damaged_is_read(files, tmp_path):
    path = tmp_path / "training.safetensors"
    path.write_bytes(files[0])
    assert_is_the_first(checkpoints.read(path))


def assert_is_the_first(found: checkpoints.Checkpoint) -> None:
    expected = checkpoint(0)
    assert found.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in expected.tensors.items())
    assert (found.scalars, found.identity, found.progress) == (expected.scalars, expected.identity, expected.progress)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_no_damaged_file_is_read(damage, files, tmp_path):
    path = tmp_path / "training.safetensors"
    for seed in range(SEEDS):
        draw = Random(f"training {damage.__name__} {seed}")
        while (damaged := damage(draw, *files)) == files[0]:
            pass
        message = refusal(path, damaged)
        assert message is not None, f"{damage.__name__}, seed {seed}, is read"
        assert str(path) in message


@pytest.mark.parametrize("damage", SAME_CONTENT, ids=lambda damage: damage.__name__)
def test_what_is_written_otherwise_is_refused_or_read_as_it_was(damage, files, tmp_path):
    path = tmp_path / "training.safetensors"
    for seed in range(SEEDS):
        if refusal(path, damage(Random(f"training {damage.__name__} {seed}"), *files)) is None:
            assert_is_the_first(checkpoints.read(path))


def test_at_least_100_damages_are_tried():
    assert SEEDS * len(DAMAGES) >= 100


def test_foreign_files_are_refused_and_run_nothing(files, tmp_path):
    for kind, data in foreign(str(tmp_path / "bomb"), files[0]):
        message = refusal(tmp_path / "training.safetensors", data)
        assert message is not None, kind
        assert "training.safetensors" in message, kind
        assert not (tmp_path / "bomb").exists(), kind
