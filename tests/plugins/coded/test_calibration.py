"""Laws of the calibrators and of the calibration error."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from surgery.errors import InvalidOption
from surgery_coded.calibration import Calibrator, _stratified, calibration_table, fit_calibrator
from surgery_coded.reliability import calibration_error

CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def samples(temperature: float = 2.0, count: int = 400, classes: int = 5) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return logits, labels drawn from softmax(z / temperature), and two early decoders that are sometimes right."""
    g = torch.Generator().manual_seed(3)
    z = 4 * torch.randn(count, classes, generator=g, dtype=torch.float64)
    y = torch.multinomial((z / temperature).softmax(dim=1), 1, generator=g)[:, 0]
    guesses = torch.randint(classes, (2, count), generator=g)
    right = torch.rand(2, count, generator=g) < 0.5
    return z, y, {name: torch.where(right[i], y, guesses[i]) for i, name in enumerate(("a", "b"))}


def literal_nll(z: Tensor, y: Tensor, decoded: dict[str, Tensor], temperature: Tensor, tau: Tensor) -> Tensor:
    """Return the mean of -log h_aug(z)_y, sample by sample, as Eq. 11 is written."""
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(z)):
        predicted = int(z[i].argmax())
        factor = torch.ones((), dtype=torch.float64)
        for n, block in enumerate(decoded):
            if int(decoded[block][i]) == predicted:
                factor = factor + tau[n]
        exponentials = torch.exp(z[i] / (temperature * factor))
        total = total - torch.log(exponentials[y[i]] / exponentials.sum())
    return total / len(z)


def loss_of(fitted: Calibrator, z: Tensor, y: Tensor, decoded: dict[str, Tensor]) -> float:
    temperature = torch.tensor(fitted.temperature, dtype=torch.float64)
    return float(literal_nll(z, y, decoded, temperature, torch.tensor(list(fitted.tau.values()), dtype=torch.float64)))


def literal_descent(z: Tensor, y: Tensor, decoded: dict[str, Tensor]) -> tuple[float, list[float]]:
    """Return T and tau after two bare steps of size 0.01 from T = 1 and tau = 0."""
    temperature = torch.ones((), dtype=torch.float64, requires_grad=True)
    tau = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    for _ in range(2):
        slopes = torch.autograd.grad(
            literal_nll(z, y, decoded, temperature, tau), (temperature, tau), allow_unused=True
        )
        with torch.no_grad():
            temperature -= 0.01 * slopes[0]
            if slopes[1] is not None:
                tau -= 0.01 * slopes[1]
    return temperature.item(), tau.tolist()


def test_two_steps_follow_the_gradient_of_the_literal_likelihood():
    """h_T from T = 1; then, with logits in units of its T, h_aug in the same way."""
    z, y, decoded = samples(count=30)
    first, _ = literal_descent(z, y, {})
    assert fit_calibrator(z, y, lr=0.01, iterations=2).temperature == pytest.approx(first, rel=1e-12)
    factor, tau = literal_descent(z / first, y, decoded)
    fitted = fit_calibrator(z, y, decoded, lr=0.01, iterations=2)
    assert fitted.temperature == pytest.approx(first * factor, rel=1e-12)
    assert list(fitted.tau) == ["a", "b"]
    assert list(fitted.tau.values()) == pytest.approx(tau, rel=1e-10)


def test_temperature_is_the_best_of_a_grid():
    z, y, _ = samples()
    grid = torch.arange(0.5, 4.0, 0.001, dtype=torch.float64)
    losses = torch.stack([F.cross_entropy(z / t, y) for t in grid])
    assert fit_calibrator(z, y).temperature == pytest.approx(float(grid[losses.argmin()]), abs=6e-4)


@pytest.mark.parametrize("temperature", [0.25, 1.0, 2.0])
def test_temperature_of_the_labels_is_found(temperature):
    """4,000 labels drawn from softmax(z / T*): the estimate is T* to about 3 %."""
    z, y, _ = samples(temperature, count=4000)
    assert fit_calibrator(z, y).temperature == pytest.approx(temperature, rel=0.05)


@pytest.mark.parametrize("scale", [0.02, 1.0, 3.0])
def test_decoders_are_fitted_at_any_scale_of_the_logits(scale):
    """Decoders that know the class better than chance lower the loss, and T_aug stays positive whichever agree."""
    z, y, decoded = samples()
    plain, augmented = fit_calibrator(scale * z, y), fit_calibrator(scale * z, y, decoded)
    assert loss_of(augmented, scale * z, y, decoded) < loss_of(plain, scale * z, y, {}) - 0.05
    assert augmented.temperature > 0
    assert 1 + sum(min(tau, 0.0) for tau in augmented.tau.values()) > 0


def test_temperature_has_the_unit_of_the_logits():
    """Bare descent at the rate 0.1 jumps across T = 0 where logits are small."""
    z, y, _ = samples()
    assert fit_calibrator(0.02 * z, y).temperature == pytest.approx(0.02 * fit_calibrator(z, y).temperature, rel=1e-3)


def test_temperature_stays_positive_where_decoders_agree_as_never_before():
    """ "a" agrees in the first half, "b" in the second, and the network is right there: each alone asks for T -> 0."""
    z, y, _ = samples()
    predicted, first = z.argmax(dim=1), torch.arange(len(z)) < 200
    right, other = predicted == y, (predicted + 1) % 5
    decoded = {name: torch.where(half & right, predicted, other) for name, half in (("a", first), ("b", ~first))}
    fitted = fit_calibrator(z, y, decoded)
    assert all(tau < -0.3 for tau in fitted.tau.values())
    assert bool((fitted.temperatures(z, {"a": predicted, "b": predicted}) > 0).all())


def test_many_decoders_that_agree_do_not_diverge():
    """20 copies of one decoder multiply the step by 20: bare descent at the rate 0.1 leaves T_aug > 0."""
    z, y, decoded = samples(1.0, classes=40)
    copies = {f"{n}": decoded["a"] for n in range(20)}
    agrees = (decoded["a"] == z.argmax(dim=1)).double()
    temperature, tau = (torch.full((), v, dtype=torch.float64, requires_grad=True) for v in (1.0, 0.0))
    for _ in range(20):
        loss = F.cross_entropy(z / (temperature * (1 + 20 * agrees * tau))[:, None], y)
        slopes = torch.autograd.grad(loss, (temperature, tau))
        with torch.no_grad():
            temperature -= 0.1 * slopes[0]
            tau -= 0.1 * slopes[1] / 20  # of one copy
        if float((temperature * (1 + 20 * tau)).detach()) <= 0:
            break
    else:
        pytest.fail("bare descent was expected to fail")
    fitted = fit_calibrator(z, y, copies)
    losses = [F.cross_entropy(z / f.temperatures(z, copies)[:, None], y) for f in (fitted, fit_calibrator(z, y))]
    assert float(losses[0]) < float(losses[1])


def test_without_tau_both_functions_are_the_softmax_at_t():
    z, _, decoded = samples(count=20)
    plain, augmented = Calibrator(1.5), Calibrator(1.5, {"a": 0.0, "b": 0.0})
    assert torch.equal(plain.probabilities(z), (z / 1.5).softmax(dim=1))
    assert torch.equal(augmented.probabilities(z, decoded), plain.probabilities(z))


def test_agreement_enters_through_the_temperature_alone():
    """Predictions 0 and 1; "a" agrees on the first only, "b" on both: T = 2 (1 + 0.5 - 0.25) and 2 (1 - 0.25)."""
    z = torch.tensor([[3.0, 1.0], [0.0, 1.0]])
    decoded = {"b": torch.tensor([0, 1]), "a": torch.tensor([0, 0])}
    fitted = Calibrator(2.0, {"a": 0.5, "b": -0.25})
    assert fitted.temperatures(z, decoded).tolist() == [2.5, 1.5]
    z, _, decoded = samples()
    probabilities = fitted.probabilities(z, decoded)
    assert torch.equal(probabilities.argmax(dim=1), z.argmax(dim=1))
    assert torch.equal(fitted.confidence(z, decoded), probabilities.amax(dim=1))
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(len(z), dtype=torch.float64), **CLOSE)


def test_calibration_error_worked_by_hand():
    """Five bins. (0.2, 0.4]: 0.4 wrong and 0.3 right, accuracy 1/2, confidence 0.35, gap 0.15.

    (0.4, 0.6]: 0.5 right, gap 0.5. (0.8, 1]: 0.9 right and 1.0 right, accuracy 1, confidence 0.95, gap 0.05.
    ECE = (2 * 0.15 + 1 * 0.5 + 2 * 0.05) / 5 = 0.18; MCE = 0.5. The edge 0.4 belongs to the bin below it.
    """
    confidence = torch.tensor([0.4, 0.3, 0.5, 0.9, 1.0], dtype=torch.float64)
    found = calibration_error(confidence, torch.tensor([False, True, True, True, True]), bins=5)
    assert found.ece == pytest.approx(0.18, rel=1e-12)
    assert found.mce == pytest.approx(0.5, rel=1e-12)
    assert found.count.tolist() == [0, 2, 1, 0, 2]
    nan = float("nan")
    assert found.accuracy.tolist() == pytest.approx([nan, 0.5, 1.0, nan, 1.0], nan_ok=True)
    assert found.confidence.tolist() == pytest.approx([nan, 0.35, 0.5, nan, 0.95], nan_ok=True)


def test_every_edge_belongs_to_the_bin_below_it():
    edges = torch.arange(1, 16, dtype=torch.float64) / 15
    assert calibration_error(edges, torch.ones(15), bins=15).count.tolist() == [1] * 15


def test_table_fits_on_one_part_and_measures_on_the_other():
    z, y, decoded = samples(count=120)
    table = calibration_table(z, y, decoded, splits=2, seed=5)
    for split, train in enumerate(_stratified(y, 0.25, 2, seed=5)):
        for method, known in enumerate(({}, decoded)):
            fitted = fit_calibrator(z[train], y[train], {block: e[train] for block, e in known.items()})
            confidence = fitted.confidence(z[~train], {block: e[~train] for block, e in known.items()})
            error = calibration_error(confidence, z[~train].argmax(dim=1) == y[~train])
            assert (float(table.ece[split, method]), float(table.mce[split, method])) == (error.ece, error.mce)
    assert table.means["h_aug"] == pytest.approx((float(table.ece[:, 1].mean()), float(table.mce[:, 1].mean())))


def test_splits_keep_the_share_of_every_class():
    """Classes of 4, 10 and 2 samples at the share 1/4: 1, 2 or 3, and 1 (not 0 or 1, as rounding would give)."""
    y = torch.tensor([0] * 4 + [1] * 10 + [2] * 2)
    parts = torch.stack(list(_stratified(y, 0.25, 200, seed=0)))
    sizes = [parts[:, y == k].sum(dim=1) for k in range(3)]
    assert set(sizes[0].tolist()) == {1}
    assert set(sizes[1].tolist()) == {2, 3}
    assert float(sizes[1].double().mean()) == pytest.approx(2.5, abs=0.15)
    assert set(sizes[2].tolist()) == {1}
    assert bool((parts.sum(dim=0) > 0).all())  # every sample has its turn


def test_what_cannot_be_calibrated_is_refused():
    z, y, decoded = samples(count=20)
    nan = float("nan")
    infinite = z.clone()
    infinite[0, 0] = float("inf")
    for call, message in (
        (lambda: calibration_table(z, y, decoded, train_share=0.0), r"train_share=0\.0"),
        (lambda: calibration_table(z, y, decoded, train_share=1.0), r"train_share=1\.0"),
        (lambda: calibration_table(z, y, decoded, splits=0), "splits=0"),
        (lambda: calibration_table(z, y, {}), "0 early decoders"),
        (lambda: calibration_table(z[:4], torch.tensor([0, 0, 3, 1]), {}, splits=1), "0 early decoders"),
        (lambda: calibration_table(z[:3], torch.tensor([0, 0, 3]), {"a": y[:3]}), "class 3 has a single sample"),
        (lambda: fit_calibrator(infinite, y), "1 of them not finite"),
        (lambda: fit_calibrator(z[:0], y[:0]), "of a sample or more"),
        (lambda: fit_calibrator(z, y[:3]), r"targets \(3,\)"),
        (lambda: fit_calibrator(z, y + 5), "expected classes 0 to 4"),
        (lambda: fit_calibrator(z, y, {"a": y[:2]}), r"early decoder 'a' has \(2,\)"),
        (lambda: Calibrator(1.0, {"c": 0.1}).confidence(z, decoded), "early decoder 'c' has no predictions"),
        (lambda: calibration_error(z[:, 0], y == 0), r"probabilities in \[0, 1\]"),
        (lambda: calibration_error(torch.rand(3), torch.ones(4)), r"correctness \(4,\)"),
        (lambda: calibration_error(torch.rand(3), torch.ones(3), bins=0), "bins=0"),
        (lambda: calibration_error(torch.rand(3), torch.ones(3), bins=1.5), r"bins=1\.5"),
        (lambda: calibration_error(torch.tensor([nan, 0.5]), torch.ones(2)), "confidences from nan to nan"),
        (lambda: calibration_error(torch.tensor([-0.1, 0.5]), torch.ones(2)), "confidences from -0.1 to 0.5"),
        (lambda: calibration_error(torch.rand(3), torch.tensor([5.0, 2, 3])), "correct other than 0 and 1"),
        (lambda: calibration_error(torch.rand(2), torch.tensor([nan, 1])), "correct other than 0 and 1"),
        (lambda: calibration_table(z, y, decoded, splits=1.5), r"splits=1\.5"),
        (lambda: fit_calibrator(z, y == 0), "torch.bool"),
        (lambda: fit_calibrator(z, y, lr=0.0), r"lr=0\.0"),
        (lambda: fit_calibrator(z, y, lr=-0.1), r"lr=-0\.1"),
        (lambda: fit_calibrator(z, y, lr=nan), "lr=nan"),
        (lambda: fit_calibrator(z, y, iterations=0), "iterations=0"),
        (lambda: fit_calibrator(z, y, iterations=-1), "iterations=-1"),
        (lambda: Calibrator(0.0), r"temperature 0\.0"),
        (lambda: Calibrator(-1.0), r"temperature -1\.0"),
        (lambda: Calibrator(nan), "temperature nan"),
        (lambda: Calibrator(float("inf")), "temperature inf"),
        (lambda: Calibrator(1.0, {"a": -0.5, "b": 2.0, "c": -0.75}), r"as low as -0\.25"),
    ):
        with pytest.raises(InvalidOption, match=message):
            call()
