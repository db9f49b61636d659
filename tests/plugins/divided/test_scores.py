"""How good the members are, alone and together."""

import math

import pytest
import torch
from torch import nn

import surgery
from surgery.errors import InvalidOption, UnsupportedModel
from surgery.testing import tiny_networks
from surgery_divided.ensemble import combine, members
from surgery_divided.scores import accuracies, best_member


class Spoken(nn.Module):
    """Return the logits that stand in the first pixels of the image, (B, 4) of a view."""

    def forward(self, image):
        return image[:, 0, 0, :4]


def divided(networks=2, **options):
    return surgery.convert(tiny_networks()["wide resnet"](), "divided", networks=networks, **options).double()


def speaking(networks):
    """Return a divided network whose members say what is written into their views."""
    model = divided(networks)
    for member in members(model):
        member.register_forward_hook(lambda module, args, output: Spoken()(args[0]))
    return model.train()


def written(*logits):
    """Return images (B, S*3, 32, 32) that make the members say these lists of logits."""
    said = torch.tensor(logits, dtype=torch.float64)  # (S, B, 4)
    image = torch.zeros(said.shape[1], len(said) * 3, 32, 32, dtype=torch.float64)
    image[:, ::3, 0, :4] = said.movedim(0, 1)
    return image


def test_accuracies_are_those_worked_out_by_hand():
    """Three images of classes 0, 1 and 2, two members.

    Member 0 says 0, 1, 0 (two right), member 1 says 0, 3, 0 (one right). They agree on images 0 and 2, and are right on
    image 0 of these. Image 1: logits (0 5 0 0) and (0 0 0 6): the mean and the maximum of logits are highest at 3.
    Member 0 gives the probability 148 / 151 to class 1, member 1 403 / 406 to class 3: class 3 both ways.
    """
    one = [[9, 0, 0, 0], [0, 5, 0, 0], [4, 0, 0, 0]]
    two = [[5, 0, 0, 0], [0, 0, 0, 6], [3, 0, 2, 0]]
    found = accuracies(speaking(2), [(written(one, two), torch.tensor([0, 1, 2]))])
    assert found.members == (2 / 3, 1 / 3)
    assert found.average == 0.5
    assert found.ensembles == dict.fromkeys(found.ensembles, 1 / 3)
    assert (found.agreement, found.agreed, found.images) == (2 / 3, 1 / 2, 3)


def test_manners_differ_where_they_should():
    """One image of class 0, three members: (3 0 0 0), (3 0 0 0) and (0 9 0 0).

    For classes 0 and 1 the means are 2 and 3, the maxima 3 and 9. The probabilities of class 0 are 0.87, 0.87 and
    0.0001, of class 1 0.04, 0.04 and 0.9996: the means 0.58 and 0.36, the maxima 0.87 and 0.9996.
    """
    image = written([[3, 0, 0, 0]], [[3, 0, 0, 0]], [[0, 9, 0, 0]])
    found = accuracies(speaking(3), [(image, torch.tensor([0]))])
    right = {"mean_logits": 0, "max_logits": 0, "mean_probabilities": 1, "max_probabilities": 0}
    assert found.ensembles == right
    assert found.members == (1, 1, 0)
    assert found.agreement == 0
    assert math.isnan(found.agreed)


def test_accuracies_are_those_of_members_and_ensemble_called_alone():
    model = divided(3, ensemble="max_probabilities").eval()
    images, labels = torch.rand(40, 9, 32, 32, dtype=torch.float64), torch.randint(10, (40,))
    with torch.no_grad():
        logits = [member(view) for member, view in zip(members(model), images.chunk(3, dim=1), strict=True)]
        whole = model(images)
    found = accuracies(model, zip(images.split(16), labels.split(16), strict=True))
    right = [(value.argmax(1) == labels).double().mean().item() for value in logits]
    torch.testing.assert_close(found.members, tuple(right), rtol=1e-12, atol=0)
    own = (whole.argmax(1) == labels).double().mean().item()
    assert found.ensembles["max_probabilities"] == pytest.approx(own, rel=1e-12)
    for manner, value in found.ensembles.items():
        expected = (combine(logits, manner).argmax(1) == labels).double().mean()
        assert value == pytest.approx(expected.item(), rel=1e-12)


def test_best_member_is_the_first_with_the_highest_accuracy():
    wrong, right = [[0, 1, 0, 0]], [[1, 0, 0, 0]]
    labels = torch.tensor([0])
    assert best_member(speaking(3), [(written(wrong, right, right), labels)]) == 1
    assert best_member(speaking(3), [(written(wrong, wrong, right), labels)]) == 2


def test_modes_statistics_and_taps_stay():
    model = divided()
    model.train()
    norm = next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d)).eval()
    images, labels = torch.rand(4, 3, 32, 32, dtype=torch.float64), torch.randint(10, (4,))
    criterion = surgery.Objective(model, nn.CrossEntropyLoss())
    output = model(images)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    accuracies(model, [(images, labels)])
    assert [module.training for module in model.modules()] == modes
    assert not norm.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert criterion(output, labels).requires_grad  # the taps of the training forward are still there


def test_mode_is_restored_when_the_loader_fails():
    model = divided().train()
    with pytest.raises(ZeroDivisionError):
        accuracies(model, ((torch.zeros(1, 3, 32, 32, dtype=torch.float64), 1 / 0) for _ in range(1)))
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("loader", [[], [(torch.zeros(0, 3, 32, 32, dtype=torch.float64), torch.zeros(0).long())]])
def test_empty_loader_is_refused(loader):
    with pytest.raises(InvalidOption, match="the loader yielded no image"):
        accuracies(divided(), loader)
    with pytest.raises(InvalidOption, match="the loader yielded no image"):
        best_member(divided(), loader)


@pytest.mark.parametrize("labels", [torch.zeros(2, 10), torch.zeros(2), torch.zeros(3).long()])
def test_targets_that_are_no_class_indices_are_refused(labels):
    with pytest.raises(InvalidOption, match=r"expected \(2,\) class indices"):
        accuracies(divided(), [(torch.zeros(2, 3, 32, 32, dtype=torch.float64), labels)])


def test_undivided_networks_are_refused():
    with pytest.raises(UnsupportedModel, match="expected a converted network"):
        accuracies(tiny_networks()["wide resnet"](), [])
    masked = surgery.convert(tiny_networks()["resnext"](), "coded", mu=2)
    with pytest.raises(UnsupportedModel, match="expected a network converted by 'divided'"):
        accuracies(masked, [])
