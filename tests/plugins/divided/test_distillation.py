"""A student between the labels and its teacher."""

import copy
import math

import pytest
import torch
from torch import nn

import surgery
from surgery.errors import InvalidOption, SurgeryError, UnsupportedModel
from surgery.testing import tiny_networks
from surgery_divided.distillation import Distillation, distance, distil
from surgery_divided.ensemble import members
from surgery_divided.scores import best_member


def divided(networks=2):
    return surgery.convert(tiny_networks()["wide resnet"](), "divided", networks=networks).double()


def batches(number=2, channels=3):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(number, 4, channels, 32, 32, dtype=torch.float64, generator=generator)
    return list(zip(images, torch.randint(10, (number, 4), generator=generator), strict=True))


def test_loss_is_the_one_worked_out_by_hand():
    """Two classes, T = 2, weight 3. Teacher logits (2 ln 3, 0) are the probabilities 3/4, 1/4 at T = 2.

    The student's (0, 0) are 1/2, 1/2: KL = 3/4 ln(3/2) + 1/4 ln(1/2), times T^2 = 4. Cross entropy: ln 2.
    """
    criterion = Distillation(nn.Identity(), temperature=2, weight=3)
    teacher = torch.tensor([[2 * math.log(3), 0]], dtype=torch.float64)
    found = criterion(torch.zeros(1, 2, dtype=torch.float64), torch.tensor([1]), teacher)
    expected = math.log(2) + 3 * 4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert found.item() == pytest.approx(expected, rel=1e-12)


def test_divergence_is_the_mean_over_the_batch_and_zero_for_equals():
    teacher, student = torch.randn(2, 5, 7, dtype=torch.float64)
    p, q = teacher.softmax(1), student.softmax(1)
    expected = (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(distance(teacher, student), expected, rtol=1e-10, atol=0)
    assert distance(student, student + 3).abs() < 1e-14
    assert not torch.isclose(distance(student, teacher), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_divergence_is_finite_in_half_precision(dtype):
    """Logits 0 and -200: a probability of e^-200 is zero in float32. The distance is 200, its gradient q - p."""
    teacher = torch.tensor([[0.0, -200.0]], dtype=dtype)
    student = torch.tensor([[-200.0, 0.0]], dtype=dtype, requires_grad=True)
    found = distance(teacher, student)
    found.backward()
    assert found.item() == 200
    assert student.grad.tolist() == [[-1, 1]]
    one, other = torch.randn(2, 5, 7, dtype=dtype)
    assert torch.equal(distance(one, other), distance(one.float(), other.float()))


def test_temperature_keeps_the_gradient_in_proportion():
    """When hot, the gradient tends to the difference of the centred logits by classes: ((1 -1) - (-1 1)) / 2."""
    teacher, student = torch.tensor([[0.0, 2.0]]).double(), torch.tensor([[2.0, 0.0]]).double().requires_grad_()
    (gradient,) = torch.autograd.grad(distance(teacher, student, 1e4), student)
    # an expansion in 1 / T
    torch.testing.assert_close(gradient, torch.tensor([[1.0, -1.0]]).double(), rtol=1e-6, atol=0)


def test_teacher_is_undisturbed_and_gets_no_gradient():
    model = divided().train()
    images, labels = batches()[0]
    output = model(images)
    before = copy.deepcopy(model.state_dict())
    criterion = Distillation(model)
    student = torch.zeros(4, 10, dtype=torch.float64, requires_grad=True)
    criterion(student, labels, images).backward()
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert student.grad.abs().sum() > 0
    assert surgery.Objective(model, nn.CrossEntropyLoss())(output, labels).isfinite()


def test_teacher_runs_in_eval_mode_and_its_ensemble_teaches():
    model = divided().train()
    images, labels = batches()[0]
    student = torch.randn(4, 10, dtype=torch.float64)
    found = Distillation(model, 3.0, 0.5)(student, labels, images)
    with torch.no_grad():
        taught = copy.deepcopy(model).eval()(images)
    expected = nn.functional.cross_entropy(student, labels) + 0.5 * distance(taught, student, 3.0)
    assert torch.equal(found, expected)


def test_teacher_is_not_registered():
    criterion = Distillation(divided())
    assert not list(criterion.parameters())
    assert not criterion.state_dict()
    assert "temperature=1.0, weight=1.0" in repr(criterion)


def test_task_loss_is_the_users():
    images, labels = batches()[0]
    student, smooth = torch.randn(4, 10, dtype=torch.float64), nn.CrossEntropyLoss(label_smoothing=0.3)
    found = Distillation(divided(), weight=0, criterion=smooth)(student, labels, images)
    assert torch.equal(found, smooth(student, labels))


@pytest.mark.parametrize(
    "options", [{"temperature": 0}, {"temperature": math.inf}, {"weight": -1}, {"weight": math.nan}]
)
def test_numbers_that_cannot_be_are_refused(options):
    with pytest.raises(InvalidOption, match="expected finite numbers"):
        Distillation(nn.Identity(), **options)


def test_distilled_network_is_the_best_member_trained_by_steps_of_sgd():
    """The same three steps written out: cosine 0.1 * (1 + cos(pi k / 4)) / 2 for step k of four."""
    model, loader = divided().eval(), batches(2, channels=6)
    best = best_member(model, loader)
    found = distil(model, loader, epochs=2, lr=0.1, temperature=2.0, weight=0.7)
    student, criterion = surgery.prune(model, members=[best]).train(), Distillation(model, 2.0, 0.7)
    optimizer = torch.optim.SGD(surgery.param_groups(student, 0.1, 1e-4), momentum=0.9, nesterov=True)
    for step, (images, labels) in enumerate(loader * 2):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * (1 + math.cos(math.pi * step / 4)) / 2
        optimizer.zero_grad()
        criterion(student(images), labels, images).backward()
        optimizer.step()
    for key, value in student.state_dict().items():
        torch.testing.assert_close(found.state_dict()[key], value, rtol=1e-10, atol=1e-12)


def test_student_sees_the_view_that_it_saw_as_a_member():
    model, (images, _) = divided(3).eval(), batches(1, channels=9)[0]
    student = surgery.prune(model, members=[2])
    expected = members(model)[2](images.chunk(3, dim=1)[2])
    torch.testing.assert_close(student(images), expected, rtol=1e-10, atol=1e-12)


def test_distil_leaves_the_model_untouched_and_returns_a_plain_pruned_network(tmp_path):
    model = divided().train()
    before = copy.deepcopy(model.state_dict())
    found = distil(model, batches(), member=1)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert found.training
    assert all(module.training for module in model.modules())
    assert not distil(model.eval(), batches(), member=1).training
    assert sum(p.numel() for p in found.parameters()) * 2 == sum(p.numel() for p in model.parameters())
    surgery.save(found, tmp_path / "student.safetensors", factory=tiny_networks()["wide resnet"])
    loaded = surgery.load(tmp_path / "student.safetensors", factory=tiny_networks()["wide resnet"])
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in found.state_dict().items())


def test_what_cannot_be_distilled_is_refused():
    with pytest.raises(InvalidOption, match="found 0 batches and epochs=1"):
        distil(divided(), [])
    with pytest.raises(InvalidOption, match="found 2 batches and epochs=0"):
        distil(divided(), batches(), epochs=0)
    with pytest.raises(SurgeryError, match="members"):
        distil(divided(), batches(), member=2)
    with pytest.raises(UnsupportedModel):
        distil(tiny_networks()["wide resnet"](), batches())


def test_batches_that_run_out_are_refused():
    with pytest.raises(InvalidOption, match="found a generator, expected batches that can be passed through several"):
        distil(divided(), (batch for batch in []))
