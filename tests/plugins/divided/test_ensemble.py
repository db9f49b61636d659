"""Views in, one prediction out: the four manners against their formulas; taps; members."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from torch import nn

import surgery
from surgery.errors import InvalidOption, NotKept, SurgeryError, UnsupportedModel
from surgery.models import CifarResNet, wide_resnet
from surgery.testing import tiny_networks, unsettle
from surgery_divided import Ensemble, combine, ensemble_of, members

LOGITS = [torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(3)]
IMAGES = torch.rand(4, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
MANNERS = ["mean_logits", "max_logits", "mean_probabilities", "max_probabilities"]


def network(networks=3, **options):
    torch.manual_seed(0)
    source = CifarResNet(wide_resnet(10, 2), num_classes=6).double()
    model = surgery.convert(source, "divided", input_size=16, networks=networks, **options)
    return unsettle(model).eval()


def test_the_mean_of_the_logits_is_equation_10():
    torch.testing.assert_close(combine(LOGITS, "mean_logits"), (LOGITS[0] + LOGITS[1] + LOGITS[2]) / 3)


def test_the_maximum_of_the_logits_is_that_of_each_class():
    expected = torch.tensor([[max(value[b, c] for value in LOGITS) for c in range(6)] for b in range(4)]).double()
    assert torch.equal(combine(LOGITS, "max_logits"), expected)


def test_a_softmax_of_the_joined_logits_gives_the_mean_of_the_probabilities():
    expected = sum(value.softmax(-1) for value in LOGITS) / 3
    joined = combine(LOGITS, "mean_probabilities")
    torch.testing.assert_close(joined.exp(), expected)
    torch.testing.assert_close(joined.softmax(-1), expected)


def test_the_maximum_of_the_probabilities_is_in_proportion():
    most = torch.stack([value.softmax(-1) for value in LOGITS]).amax(0)
    joined = combine(LOGITS, "max_probabilities")
    torch.testing.assert_close(joined.exp(), most)
    torch.testing.assert_close(joined.softmax(-1), most / most.sum(-1, keepdim=True))


@pytest.mark.parametrize("manner", MANNERS)
def test_the_network_joins_what_its_members_say(manner):
    model = network(ensemble=manner)
    each = [member(IMAGES) for member in members(model)]
    assert not any(torch.equal(each[0], other) for other in each[1:])
    assert torch.equal(model(IMAGES), combine(each, manner))


def test_every_member_sees_its_view():
    model = network()
    views = torch.rand(4, 9, 16, 16, dtype=torch.float64)
    each = [member(view) for member, view in zip(members(model), views.split(3, dim=1), strict=True)]
    assert torch.equal(model(views), combine(each, "mean_logits"))


@pytest.mark.parametrize("channels", [1, 6, 12])
def test_another_number_of_views_is_refused(channels):
    with pytest.raises(InvalidOption, match=f"an image of {channels} channels, expected 3, .* or 9, .*several_views"):
        network()(torch.rand(1, channels, 16, 16, dtype=torch.float64))


def test_the_logits_of_the_members_are_tapped():
    model = network()
    with surgery.record(model) as taps:
        model(IMAGES)
    assert list(taps) == ["logits/0", "logits/1", "logits/2"]
    assert all(torch.equal(taps[f"logits/{i}"], member(IMAGES)) for i, member in enumerate(members(model)))


def test_members_are_the_networks_themselves():
    model = network()
    with torch.no_grad():
        members(model)[1].fc.bias.add_(3.0)
    before, after = network()(IMAGES), model(IMAGES)
    torch.testing.assert_close(after - before, torch.ones_like(before))


def test_a_member_trains_by_itself_and_is_saved_pruned_and_converted_as_part_of_the_whole(tmp_path):
    model = network()
    one = members(model)[0].train()
    groups = surgery.param_groups(one, lr=0.1, weight_decay=1e-4)
    assert sum(len(group["params"]) for group in groups) == len(list(one.parameters()))
    labels = torch.tensor([0, 1, 2, 3])
    loss = surgery.Objective(one, nn.CrossEntropyLoss())(one(IMAGES), labels)
    torch.testing.assert_close(loss, nn.functional.cross_entropy(one(IMAGES), labels))
    for refused in (
        lambda: surgery.save(one, tmp_path / "one.safetensors"),
        lambda: surgery.prune(one, members=[0]),
        lambda: surgery.convert(one, "gated"),
    ):
        with pytest.raises(SurgeryError, match="found one of the copies of a replicated network, expected the whole"):
            refused()
    assert not list(tmp_path.iterdir())


def test_members_of_an_averaged_model_are_found():
    model = torch.optim.swa_utils.AveragedModel(network())
    assert members(model) == members(model.module)


@pytest.mark.parametrize("of", [members, ensemble_of])
def test_only_a_divided_network_has_members(of):
    for other in (torchvision.models.resnet18(), surgery.convert(tiny_networks()["resnext"](), "gated", input_size=32)):
        with pytest.raises(UnsupportedModel, match="expected a network converted by 'divided', found a"):
            of(other)


def test_an_unknown_manner_is_refused():
    with pytest.raises(InvalidOption, match="ensemble is 'vote', expected one of mean_logits, "):
        Ensemble(2, "vote")


def test_a_copy_is_independent_and_the_mode_is_the_sources():
    source = CifarResNet(wide_resnet(10, 2)).train()
    model = surgery.convert(source, "divided", input_size=16)
    assert all(module.training for module in model.modules())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        members(model)[0].fc.bias.add_(1.0)
    assert not torch.equal(members(model)[0].fc.bias, members(twin)[0].fc.bias)


def test_the_parts_of_one_network_are_not_offered_for_several():
    model = network()
    with pytest.raises(NotKept, match="classifier in each copy"):
        model.get_classifier()
    assert model.num_classes == 6
