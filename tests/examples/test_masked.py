"""The example as a user runs it, and what it is made of: the epoch at which masks are fixed, and the recipes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import checkpoints
import data
import masked as example
import networks
import phases
import reports
import surgery
import training
from recipe import Component, Recipe, RecipeError, Training
from surgery import curves
from surgery_masked.network import masks_of

SCRIPT = Path(__file__).parents[2] / "examples" / "masked.py"
FIGURES = ("training", "connections", "active", "masks", "curve")
NAMES = ["plain", "masked, all branches", "masked, pruned"]
BLOCKS = [f"layer{stage}.{block}" for stage in (1, 2, 3) for block in (0, 1)]


def command(folder: Path) -> list[str]:
    return [sys.executable, str(SCRIPT), "--smoke", "--run-dir", str(folder)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    done = subprocess.run(command(folder), capture_output=True, text=True, check=False, env=environment())
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in NAMES)
    assert "masks fixed after epoch 1 of 1" in done.stdout
    return folder


def test_metrics_hold_what_the_table_shows(finished):
    metrics = json.loads((finished / "metrics.json").read_text())
    points = {point["name"]: point for point in metrics["points"]}
    plain, whole, pruned = points.values()
    assert list(points) == NAMES
    assert plain["params"] == whole["params"]
    assert pruned["accuracy"] == whole["accuracy"]
    assert pruned["params"] == metrics["pruned"]["kept_params"] * whole["params"]
    used = metrics["used branches"]
    assert list(used) == BLOCKS
    assert used["layer3.1"] == [0, 1, 2, 3]
    # fan-in 1: no block can have more branches that are read than the next one has
    assert sorted(map(len, used.values())) == list(map(len, used.values()))
    assert 0.25 <= metrics["concentration"] < 1


def test_the_curves_are_in_the_shared_schema(finished):
    plain, masked = curves.read(finished / "curve.json")
    assert [(curve.method, curve.network) for curve in (plain, masked)] == [
        ("", "resnext20_4x4d"),
        ("masked", "resnext20_4x4d"),
    ]
    assert [point.setting for point in masked.points] == [{"branches": "all"}, {"branches": "used"}]
    assert all(point.milliseconds > 0 for curve in (plain, masked) for point in curve.points)


def test_figures_and_checkpoints_are_written(finished):
    for name in FIGURES:
        assert (finished / f"{name}.png").read_bytes().startswith(b"\x89PNG"), name
    whole, pruned = (surgery.load(finished / f"{name}.safetensors").eval().double() for name in ("masked", "pruned"))
    assert masks_of(whole).frozen
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(pruned(images), whole(images), rtol=1e-10, atol=1e-12)


def test_killed_run_goes_on_with_the_same_numbers(finished, tmp_path):
    log = tmp_path / "masked" / "steps.csv"
    process = subprocess.Popen(
        command(tmp_path), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 300
    while not (log.exists() and log.stat().st_size) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = subprocess.run(command(tmp_path), capture_output=True, text=True, check=False, env=environment())
    assert done.returncode == 0, done.stderr
    for name in ("plain/steps.csv", "masked/steps.csv"):
        assert (tmp_path / name).read_text() == (finished / name).read_text()
    before, after = (json.loads((folder / "metrics.json").read_text()) for folder in (finished, tmp_path))
    for point in before["points"] + after["points"]:
        del point["milliseconds"]
    assert after == before


def test_mistakes_end_in_one_sentence(tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text('[method]\nname = "masked"\nfreeze_epoch = 0\n')
    for arguments, message in (
        (["--recipe", "nowhere.toml"], "no such file"),
        (["--recipe", str(SCRIPT.parent / "recipes" / "gated-digits.toml")], "name is 'gated'; this example is about"),
        (["--device", "cuda:99"], "--device cuda:99"),
        (["--recipe", str(recipe)], "method.freeze_epoch is 0; expected a whole number of epochs, at least 1"),
    ):
        with pytest.raises(SystemExit) as caught:
            example.main([*arguments, "--run-dir", str(tmp_path / "run")])
        assert str(caught.value).startswith("masked.py: ")
        assert message in str(caught.value)


# --- the phases ---

# A rate with which a few steps move the masks far.
METHOD = Component("masked", {"fan_in": 2, "mask_lr": 100.0, "freeze_epoch": 2})
RECIPE = Recipe(method=METHOD, training=Training(epochs=3, batch_size=24, lr=0.05, checkpoint_steps=1))


@pytest.fixture(scope="module")
def digits():
    return data.first_images(data.load("digits"), 48)  # two steps an epoch


def masked() -> surgery.ConvertedNetwork:
    torch.manual_seed(0)
    layout = surgery.models.resnext(4, 4, depth=20, base=4)
    # residuals that begin at zero give no gradient to the masks
    plain = surgery.models.CifarResNet(layout, zero_init_last=False)
    return surgery.convert(plain, "masked", input_size=16, **phases.converting(METHOD).options)


class Stopped(Exception):
    pass


def run(folder: Path, digits: data.Data, stop_before: int | None = None) -> surgery.ConvertedNetwork:
    def on_step(step: reports.Step) -> None:
        if step.step + 1 == stop_before:
            raise Stopped

    model, task = masked(), training.Task(nn.CrossEntropyLoss())
    hooks = {"on_step": on_step, "on_epoch": phases.Freeze.of(RECIPE, METHOD)}
    training.train(model, task, digits, RECIPE, run_dir=folder, progress=False, **hooks)
    return model


@pytest.fixture(scope="module")
def whole(tmp_path_factory, digits):
    folder = tmp_path_factory.mktemp("whole")
    return run(folder, digits), (folder / training.STEPS).read_text()


def test_masks_move_until_they_are_fixed(tmp_path, whole, digits):
    """Two steps an epoch: they are fixed behind the fourth of six."""
    with pytest.raises(Stopped):
        run(tmp_path, digits, stop_before=4)
    then = checkpoints.read(tmp_path / training.CHECKPOINT).tensors["model.masked_masks.real"]
    assert then.max() > 0.3
    assert torch.equal(masks_of(whole[0]).real, then)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5])
def test_a_run_stopped_in_any_phase_goes_on_digit_for_digit(tmp_path, whole, digits, steps):
    """The gradient of the masks, which is consumed one step later, is part of the checkpoint; so is the freeze."""
    with pytest.raises(Stopped):
        run(tmp_path, digits, stop_before=steps)
    torch.manual_seed(99)  # where the global generator stands does not matter
    model = run(tmp_path, digits)
    expected, log = whole
    assert (tmp_path / training.STEPS).read_text() == log
    assert model.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(value, expected.state_dict()[key]) for key, value in model.state_dict().items())
    assert masks_of(model).frozen


def ended(number: int) -> reports.Epoch:
    return reports.Epoch(number, 0.1, 1.0, {}, None, 1.0)


@pytest.mark.parametrize(("asked", "expected"), [({"freeze_epoch": 2}, 2), ({"freeze_epoch": 9}, 3), ({}, 3)])
def test_masks_are_fixed_at_the_epoch_of_the_recipe_or_the_last(asked, expected):
    freeze, model = phases.Freeze.of(RECIPE, Component("masked", asked)), masked()
    frozen = []
    for number in range(3):
        freeze(model, ended(number))
        frozen.append(masks_of(model).frozen)
    assert frozen == [number >= expected for number in (1, 2, 3)]


@pytest.mark.parametrize("found", [0, -1, 2.0, True, "2"])
def test_an_epoch_that_is_none_is_refused(found):
    with pytest.raises(RecipeError, match=r"method\.freeze_epoch is .*; expected a whole number of epochs"):
        phases.Freeze.of(RECIPE, Component("masked", {"freeze_epoch": found}))


def test_the_concentration_is_the_share_of_the_masks_on_the_largest_entries():
    """Five masks of four branches that read 2 of 4: 0.5 + 0.3 in one row, 2/4 in the other 19."""
    model = masked()
    assert phases.concentration(model) == 0.5
    masks_of(model).real[0, 1] = torch.tensor([0.1, 0.5, 0.1, 0.3])
    assert phases.concentration(model) == pytest.approx((0.8 + 19 * 0.5) / 20, rel=1e-6)


# --- the recipes ---


def test_the_published_numbers_of_the_recipes():
    for name, epochs, milestones, freeze, fan_in, batch, decay in (
        ("cifar100", 320, (220, 270), 120, 4, 128, 5e-4),
        ("imagenet", 120, (60, 90), 30, 16, 256, 1e-4),
    ):
        recipe = Recipe.from_toml(SCRIPT.parent / "recipes" / f"masked-{name}.toml")
        t, options = recipe.training, recipe.method.options
        assert (t.epochs, t.milestones, t.batch_size, t.weight_decay) == (epochs, milestones, batch, decay)
        assert (t.lr, t.schedule, t.gamma, t.lr_unit, t.momentum) == (0.1, "step", 0.1, "epoch", 0.9)
        assert (options["freeze_epoch"], options["fan_in"], options["mask_lr"]) == (freeze, fan_in, 0.2)
        # the four phases: the rate in the first and the last epoch of each
        starts = [0, freeze, *milestones, epochs]
        rates = [training.learning_rate(t, epoch) for start in starts[1:] for epoch in (start - 1, start)][:-1]
        assert rates == pytest.approx([0.1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001], rel=1e-12)


@pytest.mark.parametrize(
    ("name", "masks", "branches", "classes"),
    [("cifar100", 8, 8, 100), ("digits", 5, 4, 10), ("glyphs", 5, 8, 100), ("imagenet", 15, 32, 1000)],
)
def test_the_method_of_every_recipe_fits_its_network(name, masks, branches, classes):
    """A chain of all blocks has one mask less than blocks; the published network of CIFAR-100 has 0.86 M parameters."""
    recipe = Recipe.from_toml(SCRIPT.parent / "recipes" / f"masked-{name}.toml")
    with torch.device("meta"):
        plain = networks.build(recipe.model, classes)
    options = phases.converting(recipe.method).options
    converted = surgery.convert(plain, recipe.method.name, input_size=32, **options)
    module = masks_of(converted)
    assert module.real.shape == (masks, branches, branches)
    assert module.fan_in == options["fan_in"]
    assert recipe.method.options["freeze_epoch"] < recipe.training.epochs
    if name == "cifar100":
        assert sum(p.numel() for p in converted.parameters()) == pytest.approx(858_300, abs=50)


def test_the_recipe_of_the_claims_measures_the_network_when_its_masks_are_fixed():
    recipe = Recipe.from_toml(SCRIPT.parent / "recipes" / "masked-glyphs.toml")
    assert recipe.method.options["freeze_epoch"] % recipe.training.evaluate_epochs == 0
