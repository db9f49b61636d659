"""Checkpoints: what comes back is what was saved, and what is not whole is refused by name."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys

import pytest
import timm
import torch
from safetensors import safe_open
from torch import nn

import surgery
from surgery import storage
from surgery.errors import CheckpointError, PluginError, SurgeryError
from surgery.models import CifarResNet, resnext


def small(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = timm.create_model("resnext20_8x4d", num_classes=10)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 1)
    return model.eval()


@pytest.fixture
def coded() -> surgery.ConvertedNetwork:
    return surgery.convert(small(), "coded")


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32)


def rewrite(path, change) -> None:
    """Change the header's metadata of a safetensors file, leaving the tensors alone."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header["__metadata__"])
    text = json.dumps(header, separators=(",", ":")).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def edit_record(path, change) -> None:
    """Change the record and make the checksum right again, as a careful forger would."""

    def edit(metadata) -> None:
        record = json.loads(metadata["surgery.record"])
        change(record)
        metadata["surgery.record"] = json.dumps(record)

    rewrite(path, edit)
    reseal(path)


def reseal(path) -> None:
    """Make the checksum of an edited file right again."""
    checksum = storage.checksum(path.read_bytes())
    rewrite(path, lambda metadata: metadata.update({"surgery.sha256": checksum}))


@pytest.mark.parametrize("criteria", [None, [3], [1, 4, 5]], ids=["converted", "one class", "three classes"])
def test_loaded_network_gives_bit_equal_outputs(coded, images, criteria, tmp_path):
    network = coded if criteria is None else surgery.prune(coded, classes=criteria)
    surgery.save(network, tmp_path / "a.safetensors")
    loaded = surgery.load(tmp_path / "a.safetensors")
    with torch.no_grad():
        assert torch.equal(loaded(images), network(images))
    assert loaded.meta["architecture"] == network.meta["architecture"]
    assert not loaded.training


def test_fresh_process_restores_bit_equal_outputs(coded, images, tmp_path):
    network = surgery.prune(coded, classes=[2])
    surgery.save(network, tmp_path / "a.safetensors")
    with torch.no_grad():
        torch.save({"images": images, "output": network(images)}, tmp_path / "expected.pt")
    script = (
        "import sys, torch, surgery; torch.set_num_threads(1); torch.manual_seed(5)\n"
        "expected = torch.load(sys.argv[2], weights_only=True)\n"
        "with torch.no_grad(): output = surgery.load(sys.argv[1])(expected['images'])\n"
        "assert torch.equal(output, expected['output']), (output - expected['output']).abs().max()\n"
    )
    arguments = [sys.executable, "-c", script, str(tmp_path / "a.safetensors"), str(tmp_path / "expected.pt")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_mode_frozen_weights_dtype_and_seeded_state_come_back(tmp_path):
    coded = surgery.convert(small().double(), "coded").train()
    coded.layer1[0].eval()
    coded.conv1.weight.requires_grad_(False)
    surgery.save(coded, tmp_path / "a.safetensors")
    state = torch.get_rng_state()
    loaded = surgery.load(tmp_path / "a.safetensors")
    assert torch.equal(state, torch.get_rng_state())
    assert [m.training for m in loaded.modules()] == [m.training for m in coded.modules()]
    assert {n for n, p in loaded.named_parameters() if not p.requires_grad} == {"conv1.weight"}
    assert loaded.conv1.weight.dtype == torch.float64


def test_reset_classifier_is_replayed(coded, images, tmp_path):
    coded.reset_classifier(4)
    surgery.save(coded, tmp_path / "a.safetensors")
    with torch.no_grad():
        assert torch.equal(surgery.load(tmp_path / "a.safetensors")(images), coded(images))


def test_network_of_ones_own_needs_its_factory(images, tmp_path):
    def factory() -> nn.Module:
        return CifarResNet(resnext(4, 2, depth=11, base=8), num_classes=3)

    coded = surgery.convert(factory(), "coded").eval()
    with pytest.raises(CheckpointError, match="pass factory="):
        surgery.save(coded, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())
    surgery.save(coded, tmp_path / "a.safetensors", factory=factory)
    with pytest.raises(CheckpointError, match="pass factory="):
        surgery.load(tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="differs"):
        surgery.load(
            tmp_path / "a.safetensors", factory=lambda: CifarResNet(resnext(4, 4, depth=11, base=8), num_classes=3)
        )
    with torch.no_grad():
        assert torch.equal(surgery.load(tmp_path / "a.safetensors", factory=factory)(images), coded(images))


def test_unconverted_network_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="not a converted network"):
        surgery.save(small(), tmp_path / "a.safetensors")


def test_file_of_a_crashed_save_is_the_old_one(coded, images, tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    surgery.save(coded, path)
    before = path.read_bytes()

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        surgery.save(surgery.prune(coded, classes=[1]), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("length", [0, 5, 8, 100, -1])
def test_truncated_file_is_refused(coded, tmp_path, length):
    path = tmp_path / "a.safetensors"
    surgery.save(coded, path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CheckpointError, match=r"truncated|damaged"):
        surgery.load(path)


def test_one_flipped_bit_is_refused(coded, tmp_path):
    path = tmp_path / "a.safetensors"
    surgery.save(coded, path)
    data = bytearray(path.read_bytes())
    data[-7] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="checksum"):
        surgery.load(path)


def test_edited_record_is_refused(coded, tmp_path):
    path = tmp_path / "a.safetensors"
    surgery.save(coded, path)
    rewrite(path, lambda m: m.update({"surgery.record": m["surgery.record"].replace("coded", "c0ded")}))
    with pytest.raises(CheckpointError, match="checksum"):
        surgery.load(path)


def test_foreign_and_missing_files_are_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    with pytest.raises(CheckpointError, match=r"not written by surgery\.save"):
        surgery.load(tmp_path / "foreign.safetensors")
    torch.save({"a": 1}, tmp_path / "pickle.pt")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        surgery.load(tmp_path / "pickle.pt")
    with pytest.raises(CheckpointError, match="cannot be read"):
        surgery.load(tmp_path / "nowhere.safetensors")


def test_newer_record_asks_for_an_upgrade(coded, tmp_path):
    path = tmp_path / "a.safetensors"
    surgery.save(coded, path)
    edit_record(path, lambda record: record.update({"format": 99}))
    with pytest.raises(CheckpointError, match="upgrade"):
        surgery.load(path)


def test_missing_plugin_is_named_with_its_distribution(coded, tmp_path):
    path = tmp_path / "a.safetensors"
    surgery.save(coded, path)

    def change(record) -> None:
        record["operations"][0].update({"method": "elsewhere", "distribution": "surgery-elsewhere", "version": "1.2"})

    edit_record(path, change)
    with pytest.raises(PluginError, match=r"elsewhere.*surgery-elsewhere 1\.2: install it"):
        surgery.load(path)


def test_record_with_other_fields_is_refused(coded, tmp_path):
    path = tmp_path / "a.safetensors"
    surgery.save(coded, path)
    edit_record(path, lambda record: record["operations"][0].pop("decisions"))
    with pytest.raises(CheckpointError, match="incomplete or edited"):
        surgery.load(path)


def test_weights_that_do_not_fit_are_refused(coded, tmp_path):
    path = tmp_path / "a.safetensors"
    surgery.save(coded, path)
    edit_record(path, lambda record: record["operations"].append(_classifier(4)))
    with pytest.raises(CheckpointError, match=r"do not fit.*fc\.weight"):
        surgery.load(path)


def _classifier(classes: int) -> dict[str, object]:
    options = {"num_classes": classes, "args": [], "kwargs": {}}
    return {
        "kind": "classifier", "method": "", "options": options, "decisions": {}, "sites": [], "distribution": "",
        "version": "", "input_size": None,
    }  # fmt: skip


def test_revert_is_bit_identical(coded):
    model = small()
    source = surgery.revert(coded)
    assert type(source) is type(model)
    ours, theirs = source.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    with pytest.raises(SurgeryError, match="cannot be reverted"):
        surgery.revert(surgery.prune(coded, classes=[1]))


def test_tied_weights_are_stored_once_and_come_back_tied(images, tmp_path):
    def factory() -> nn.Module:
        torch.manual_seed(0)
        model = CifarResNet(resnext(4, 2, depth=20, base=8), num_classes=3)
        model.layer1[1].conv2.weight = model.layer1[0].conv2.weight
        return model

    coded = surgery.convert(factory(), "coded").eval()
    surgery.save(coded, tmp_path / "a.safetensors", factory=factory)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        stored = set(file.keys())
    assert stored == set(coded.state_dict()) - {"layer1.1.conv2.weight"}
    loaded = surgery.load(tmp_path / "a.safetensors", factory=factory)
    assert loaded.layer1[1].conv2.weight is loaded.layer1[0].conv2.weight
    with torch.no_grad():
        assert torch.equal(loaded(images), coded(images))


def test_rate_that_no_layer_shows_is_not_lost(tmp_path):
    model = timm.create_model("resnext50_32x4d", num_classes=10, drop_rate=0.5)
    coded = surgery.convert(model, "coded", scheme={"layer4": "8/32"})
    with pytest.raises(CheckpointError, match="pass factory="):
        surgery.save(coded, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="differs"):
        surgery.revert(coded)


def test_pretrained_cfg_of_a_tagged_network_comes_back(tmp_path):
    model = timm.create_model("resnext50_32x4d.tv_in1k", num_classes=10)
    coded = surgery.convert(model, "coded", scheme={"layer4": "8/32"})
    surgery.save(coded, tmp_path / "a.safetensors")
    assert surgery.load(tmp_path / "a.safetensors").pretrained_cfg == model.pretrained_cfg


def test_loading_leaves_the_random_state_alone_also_after_reset_classifier(coded, tmp_path):
    coded.reset_classifier(4)
    surgery.save(coded, tmp_path / "a.safetensors")
    state = torch.get_rng_state()
    surgery.load(tmp_path / "a.safetensors")
    assert torch.equal(state, torch.get_rng_state())


def test_a_file_has_the_rights_of_any_new_file_and_a_link_stays_one(coded, tmp_path):
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "target.safetensors")
    before = os.umask(0o027)
    try:
        surgery.save(coded, tmp_path / "link.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "link.safetensors").is_symlink()
    assert (tmp_path / "target.safetensors").stat().st_mode & 0o777 == 0o640
    assert {path.name for path in tmp_path.iterdir()} == {"link.safetensors", "target.safetensors"}
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="cannot be written"):
        surgery.save(coded, tmp_path / "pipe")


def test_place_that_cannot_be_written_is_named(coded, tmp_path):
    for path in (tmp_path, tmp_path / "nowhere" / "a.safetensors"):
        with pytest.raises(CheckpointError, match=r"cannot be written.*existing folder"):
            surgery.save(coded, path)
    with pytest.raises(CheckpointError, match="expected a function without arguments"):
        surgery.save(coded, tmp_path / "a.safetensors", factory=small())
