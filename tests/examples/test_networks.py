"""The network of a recipe: which library it is from, and where its weights come from."""

from __future__ import annotations

import urllib.error

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file

import checkpoints
import networks
from machines import Processes
from recipe import Component, RecipeError


def state(model):
    return model.state_dict()


def assert_same_weights(model, expected):
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())


def wanted(name="resnet20", **options):
    return Component(name, options)


@pytest.fixture(scope="module")
def small():
    return timm.create_model("resnet20", num_classes=10).state_dict()


def test_timm_and_torchvision_are_told_apart_by_the_prefix():
    assert networks.build(wanted(), 7).fc.out_features == 7
    ours = networks.build(wanted("torchvision:resnet18"), 7)
    assert type(ours) is torchvision.models.ResNet
    assert ours.fc.out_features == 7
    assert type(networks.build(wanted("resnet18"), 7)) is timm.models.ResNet


def test_options_reach_the_builder():
    assert networks.build(wanted(drop_rate=0.25), 10).head_drop.p == 0.25
    assert networks.build(wanted("torchvision:resnet18", width_per_group=64), 3).fc.out_features == 3


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_weights_come_from_a_file(tmp_path, small, suffix):
    path = tmp_path / f"weights.{suffix}"
    save_file(small, path) if suffix == "safetensors" else torch.save({"state_dict": small}, path)
    assert_same_weights(networks.build(wanted(weights=str(path)), 10), small)


def test_weights_come_from_the_checkpoint_of_a_run(tmp_path):
    model = timm.create_model("resnet20", num_classes=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(2, 3, 16, 16)).sum().backward()
    optimizer.step()
    checkpoints.write(tmp_path / "c.safetensors", checkpoints.collect(model, optimizer, {}, {}, Processes()))
    assert_same_weights(networks.build(wanted(weights=str(tmp_path / "c.safetensors")), 10), model.state_dict())


def test_a_classifier_of_other_classes_starts_anew_and_says_so(tmp_path, small, capsys):
    torch.save(small, tmp_path / "w.pt")
    built = networks.build(wanted(weights=str(tmp_path / "w.pt")), 4)
    assert "the classifier is for another number of classes" in capsys.readouterr().out
    assert built.fc.weight.shape[0] == 4
    loaded = {key: value for key, value in built.state_dict().items() if not key.startswith("fc.")}
    assert all(torch.equal(value, small[key]) for key, value in loaded.items())


def test_torchvision_weights_are_asked_for_by_name(monkeypatch):
    expected = torchvision.models.resnet18(num_classes=1000).state_dict()
    asked = []

    def give(self, **options):
        asked.append((self, options))
        return expected

    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", give)
    assert_same_weights(networks.build(wanted("torchvision:resnet18", weights="IMAGENET1K_V1"), 1000), expected)
    assert asked == [(torchvision.models.ResNet18_Weights.IMAGENET1K_V1, {"progress": False, "check_hash": True})]


def test_a_failed_download_says_what_to_do(monkeypatch):
    def fail(*_, **__):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", fail)
    with pytest.raises(networks.WeightsUnavailable) as caught:
        networks.build(wanted("torchvision:resnet18", weights="IMAGENET1K_V1"), 1000)
    for part in ("torchvision:resnet18: the weights IMAGENET1K_V1", "no route to host", "set [model] weights = "):
        assert part in str(caught.value)
    with pytest.raises(
        networks.WeightsUnavailable, match=r"resnet20: the pretrained weights of timm could not .* \(Run"
    ):
        networks.build(wanted(pretrained=True), 10)  # timm has no weights of it


def test_weights_that_cannot_be_used_are_refused(tmp_path, small):
    with pytest.raises(networks.WeightsUnavailable, match=r"none\.pth does not exist; put a state dict there"):
        networks.build(wanted(weights="none.pth"), 10)
    (tmp_path / "bad.pth").write_bytes(b"no weights")
    (tmp_path / "bad.safetensors").write_bytes(b"no weights")
    for name in ("bad.pth", "bad.safetensors"):
        with pytest.raises(networks.WeightsUnavailable, match=rf"{name} is no readable state dict"):
            networks.build(wanted(weights=str(tmp_path / name)), 10)
    save_file(small, tmp_path / "w.safetensors")
    with pytest.raises(networks.WeightsUnavailable, match=r"weights of another network \(missing: .*unknown: .*bn3"):
        networks.build(wanted("wrn_16_1", weights=str(tmp_path / "w.safetensors")), 10)
    save_file({**small, "conv1.weight": small["conv1.weight"][:8].clone()}, tmp_path / "narrow.safetensors")
    with pytest.raises(networks.WeightsUnavailable, match=r"another shape: \['conv1\.weight'\]"):
        networks.build(wanted(weights=str(tmp_path / "narrow.safetensors")), 10)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (wanted("resnet21"), r"'resnet21' is no network of timm; timm\.list_models\(\) lists them"),
        (wanted("torchvision:resnet21"), r"'torchvision:resnet21' is no classifier of torchvision"),
        (wanted(width=3), r"resnet20 does not take these options \(.*width.*\); change the table"),
        (wanted(weights="IMAGENET1K_V1"), r"weights = 'IMAGENET1K_V1' is no file that ends with \.pth, \.pt"),
        (wanted("torchvision:resnet18", weights="V3"), r"weights = 'V3'; torchvision:resnet18 has IMAGENET1K_V1, DEF"),
        (wanted("torchvision:resnet18", pretrained=True), r'takes weights = "DEFAULT" or another of its sets'),
        (wanted(weights="a.pt", pretrained=True), r'both "weights" and "pretrained"; keep one'),
    ],
)
def test_a_model_table_that_is_not_understood_is_refused(model, message):
    with pytest.raises(RecipeError, match=message):
        networks.build(model, 10)
