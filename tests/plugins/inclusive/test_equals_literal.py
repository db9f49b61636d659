"""Sub-networks compute what their definition says, in float64, and the full one what its source does."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import surgery
import surgery_inclusive
from surgery.testing import tiny_networks, unsettle
from tests.plugins.inclusive.literal import thin_resnext, torchvision_resnext, zeroed

K = 4
IMAGES = torch.randn(5, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
TARGET = torch.arange(5)


def inclusive(source, **options):
    return surgery.convert(source, "inclusive", input_size=32, **options)


def resnext_with_norms_of_their_own():
    torch.manual_seed(0)
    converted = inclusive(unsettle(torchvision_resnext(8)).double(), subnetworks=K)
    return unsettle(converted, seed=1)  # every norm of every sub-network is now different


def outputs(model, images=IMAGES):
    with torch.no_grad():
        return model.eval()(images)


@pytest.mark.parametrize("name", tiny_networks())
def test_the_full_subnetwork_is_the_source_and_the_others_ignore_its_last_channels(name):
    source = tiny_networks()[name]().double().eval()
    converted = inclusive(source, subnetworks=K)
    assert torch.equal(outputs(converted), outputs(source))
    for k in range(1, K):
        with surgery_inclusive.use(converted, k):
            torch.testing.assert_close(outputs(converted), outputs(zeroed(source, k, K)), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("norm", ["independent", "shared"])
def test_pretrained_size_networks_keep_their_output(norm):
    for build in (torchvision.models.resnext50_32x4d, lambda: timm.create_model("mobilenetv2_100", num_classes=10)):
        torch.manual_seed(0)
        source = unsettle(build()).eval()
        converted = inclusive(source, norm=norm)
        assert torch.equal(outputs(converted, IMAGES[:2].float()), outputs(source, IMAGES[:2].float()))


def test_a_subnetwork_is_the_thin_network_with_its_weights_and_its_norms():
    converted = resnext_with_norms_of_their_own()
    for k in range(1, K + 1):
        thin = thin_resnext(converted, k, groups=8 * k // K)
        with surgery_inclusive.use(converted, k):
            torch.testing.assert_close(outputs(converted), outputs(thin), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(
            outputs(surgery.prune(converted, subnetwork=k)), outputs(thin), rtol=1e-10, atol=1e-12
        )


def test_one_forward_trains_every_subnetwork_as_the_thin_networks_would_be():
    """The loss is the sum of theirs, and gradients and running statistics are those of each, put together."""
    converted = resnext_with_norms_of_their_own().train()
    thin = {k: thin_resnext(converted, k, groups=2 * k).train() for k in range(1, K + 1)}
    loss = surgery.Objective(converted, nn.CrossEntropyLoss())(converted(IMAGES), TARGET)
    loss.backward()
    losses = [F.cross_entropy(model(IMAGES), TARGET) for model in thin.values()]
    torch.stack(losses).sum().backward()
    torch.testing.assert_close(loss, torch.stack(losses).sum(), rtol=1e-12, atol=0)
    expected = {name: torch.zeros_like(parameter) for name, parameter in converted.named_parameters()}
    for k, model in thin.items():
        for name, parameter in model.named_parameters():
            path, _, last = name.rpartition(".")
            own = f"{path}.thin.{k - 1}.{last}"
            target = expected[own if own in expected else name]
            target[tuple(slice(0, size) for size in parameter.shape)] += parameter.grad
    for name, parameter in converted.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-9, atol=1e-12, msg=name)
    state = converted.state_dict()
    for k, model in thin.items():
        for name, buffer in model.named_buffers():
            path, _, last = name.rpartition(".")
            torch.testing.assert_close(state.get(f"{path}.thin.{k - 1}.{last}", state[name]), buffer, msg=name)


def test_shared_norms_use_the_first_channels_of_one():
    torch.manual_seed(0)
    converted = inclusive(unsettle(torchvision_resnext(8)).double(), subnetworks=K, norm="shared")
    for k in range(1, K + 1):
        thin = thin_resnext(converted, k, groups=2 * k)
        # the classifiers alone are of their own
        with surgery_inclusive.use(converted, k):
            torch.testing.assert_close(outputs(converted), outputs(thin), rtol=1e-10, atol=1e-12)


def test_shared_norms_are_moved_by_every_subnetwork_in_turn():
    """Running mean m of the first part after four passes of momentum 0.1: each pass takes 0.9 m + 0.1 mean."""
    torch.manual_seed(0)
    converted = inclusive(torchvision_resnext(8).double(), subnetworks=K, norm="shared").train()
    path = "layer1.0.bn1"
    expected = converted.get_submodule(path).running_mean.clone()
    seen = []
    hook = converted.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    converted(IMAGES)
    hook.remove()
    for value in seen:
        width = value.shape[1]
        expected[:width] = 0.9 * expected[:width] + 0.1 * value.mean(dim=(0, 2, 3))
    assert [value.shape[1] for value in seen] == [8, 16, 24, 32]
    torch.testing.assert_close(converted.get_submodule(path).running_mean, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("norm", ["independent", "shared"])
def test_statistics_are_estimated_anew_for_every_subnetwork(norm):
    """With one batch the running mean is that of the batch; with shared norms, that of all passes that reach a part."""
    torch.manual_seed(0)
    converted = inclusive(unsettle(torchvision_resnext(8)).double(), subnetworks=K, norm=norm).eval()
    norm_module, seen = converted.get_submodule("layer2.0.bn1"), []
    norm_module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    assert surgery.recalibrate_bn(converted, [IMAGES]) == 1
    assert [value.shape[1] for value in seen] == [16, 32, 48, 64]
    means = [value.mean(dim=(0, 2, 3)) for value in seen]
    if norm == "independent":
        for module, mean in zip([*norm_module.thin, norm_module], means, strict=True):
            torch.testing.assert_close(module.running_mean, mean, rtol=1e-12, atol=1e-15)
        return
    for part in range(K):
        reaching = torch.stack([mean[16 * part : 16 * part + 16] for mean in means[part:]])
        found = norm_module.running_mean[16 * part : 16 * part + 16]
        torch.testing.assert_close(found, reaching.mean(dim=0), rtol=1e-12, atol=1e-15)


def test_recording_in_eval_mode_gives_the_logits_of_all_subnetworks():
    converted = resnext_with_norms_of_their_own().eval()
    with surgery.record(converted) as taps:
        output = outputs(converted)
    assert list(taps) == [f"logits/{k}" for k in range(1, K + 1)]
    assert torch.equal(taps["logits/4"], output)
    for k in range(1, K):
        with surgery_inclusive.use(converted, k):
            assert torch.equal(outputs(converted), taps[f"logits/{k}"])


def test_conversion_begins_with_the_norms_and_the_classifier_of_the_source():
    source = unsettle(torchvision_resnext(8))
    converted = inclusive(copy.deepcopy(source), subnetworks=2)
    [thin] = converted.get_submodule("layer1.0.bn1").thin
    assert torch.equal(thin.running_var, source.layer1[0].bn1.running_var[:16])
    assert torch.equal(converted.get_submodule("fc").thin[0].weight, source.fc.weight)
