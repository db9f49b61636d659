"""The example as a user runs it, and its recipes."""

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

import divided as example
import networks
import surgery
import training
from recipe import Recipe
from surgery import curves
from surgery_divided import members
from views import Plan

SCRIPT = Path(__file__).parents[2] / "examples" / "divided.py"
RECIPES = SCRIPT.parent / "recipes"
FIGURES = ("training", "members", "curve")
NAMES = ["undivided", "1 of 2", "2 of 2", "2 of 2, fused"]
MANNERS = ["mean_logits", "max_logits", "mean_probabilities", "max_probabilities"]


def command(folder: Path) -> list[str]:
    return [sys.executable, str(SCRIPT), "--smoke", "--run-dir", str(folder)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    done = subprocess.run(command(folder), capture_output=True, text=True, check=False, env=environment())
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in (*NAMES, "the networks alone", "joined by mean of logits"))
    return folder


def test_metrics_hold_what_the_table_shows(finished):
    metrics = json.loads((finished / "metrics.json").read_text())
    points = {point["name"]: point for point in metrics["points"]}
    assert list(points) == NAMES
    plain, first, both, fused = points.values()
    assert both["params"] == 2 * first["params"]
    assert both["macs"] == pytest.approx(2 * first["macs"], rel=1e-3)  # the join is counted, too
    assert 0.5 * plain["params"] < first["params"] < 0.6 * plain["params"]
    assert {key: fused[key] for key in ("params", "macs", "accuracy")} == {
        key: both[key] for key in ("params", "macs", "accuracy")
    }
    scores = metrics["scores"]
    assert scores["members"][0] == first["accuracy"]
    assert scores["average"] == pytest.approx(sum(scores["members"]) / 2, rel=1e-12)
    assert list(scores["ensembles"]) == MANNERS
    assert scores["ensembles"]["mean_logits"] == both["accuracy"]
    assert 0 <= metrics["fused"]["difference"] < 1e-3


def test_the_curves_are_in_the_shared_schema(finished):
    plain, divided, fused = curves.read(finished / "curve.json")
    assert [(curve.method, curve.network) for curve in (plain, divided, fused)] == [
        ("", "wrn_10_4"),
        ("divided", "wrn_10_4"),
        ("divided", "wrn_10_4, fused"),
    ]
    assert [point.setting for point in divided.points] == [{"members": 1}, {"members": 2}]
    assert [point.setting for point in fused.points] == [{"members": 2, "fused": True}]
    assert all(point.milliseconds > 0 for curve in (plain, divided, fused) for point in curve.points)


def test_figures_and_checkpoints_are_written(finished):
    for name in FIGURES:
        assert (finished / f"{name}.png").read_bytes().startswith(b"\x89PNG"), name
    assert (finished / "fused.txt").read_text().strip()
    whole, best = (surgery.load(finished / f"{name}.safetensors").eval().double() for name in ("divided", "member"))
    scores = json.loads((finished / "metrics.json").read_text())["scores"]["members"]
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    expected = members(whole)[scores.index(max(scores))](images)
    torch.testing.assert_close(best(images), expected, rtol=1e-10, atol=1e-12)


def test_killed_run_goes_on_with_the_same_numbers(finished, tmp_path):
    log = tmp_path / "divided" / "steps.csv"
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
    for name in ("plain/steps.csv", "divided/steps.csv"):
        assert (tmp_path / name).read_text() == (finished / name).read_text()
    before, after = (json.loads((folder / "metrics.json").read_text()) for folder in (finished, tmp_path))
    for metrics in (before, after):
        del metrics["fused"]  # which form is fastest is measured, and each rounds in its own way
        for point in metrics["points"]:
            del point["milliseconds"]
    assert after == before


def test_mistakes_end_in_one_sentence(tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text('[method]\nname = "divided"\nviews = 2\n')
    for arguments, message in (
        (["--recipe", "nowhere.toml"], "no such file"),
        (["--recipe", str(RECIPES / "gated-digits.toml")], "name is 'gated'; this example is about"),
        (["--device", "cuda:99"], "--device cuda:99"),
        (["--recipe", str(recipe)], "method.views is 2; expected true or false"),
    ):
        with pytest.raises(SystemExit) as caught:
            example.main([*arguments, "--run-dir", str(tmp_path / "run")])
        assert str(caught.value).startswith("divided.py: ")
        assert message in str(caught.value)


# --- the recipes ---


def read(name: str) -> Recipe:
    return Recipe.from_toml(RECIPES / f"divided-{name}.toml")


@pytest.mark.parametrize(
    ("name", "epochs", "slow", "batch", "decay", "rule", "warmup", "end", "erased", "smoothing"),
    [
        ("cifar10", 300, 20, 128, 5e-4, "exponential", 40, 1e-4, [0.125, 0.2], 0.0),
        ("cifar100", 300, 20, 128, 1e-4, "keep", 40, 1e-4, [0.0625, 0.1], 0.0),
        ("imagenet", 120, 5, 256, 1e-4, "keep", 60, 1e-5, [0.05, 0.12], 0.1),
    ],
)
def test_the_published_numbers_of_the_recipes(name, epochs, slow, batch, decay, rule, warmup, end, erased, smoothing):
    recipe = read(name)
    t, options, images = recipe.training, recipe.method.options, recipe.data.options
    assert (t.epochs, t.warmup_epochs, t.batch_size, t.weight_decay) == (epochs, slow, batch, decay)
    assert (t.momentum, t.nesterov, t.lr_unit, t.mixup, t.label_smoothing) == (0.9, True, "step", 0.2, smoothing)
    assert (options["networks"], options["views"], options["cotraining"]) == (2, True, 0.5)
    assert (options["warmup"], options["weight_decay"], options["ensemble"]) == (warmup, rule, "mean_logits")
    assert (images["erasing"], images["erasing_area"]) == (0.5, erased)
    assert images.get("autoaugment", images.get("auto_augment")) in (True, "original")
    # up from 0.005, at the top behind the warm-up, halfway between top and end in the middle of the rest
    rates = [training.learning_rate(t, epoch) for epoch in (0, slow, (slow + epochs) / 2, epochs)]
    assert rates == pytest.approx([5e-3, 0.1, (0.1 + end) / 2, end], rel=1e-12)


@pytest.mark.parametrize(
    ("name", "classes", "side", "params"),
    [
        ("cifar10", 10, 32, (36.5, 35.8)),
        ("cifar100", 100, 32, (11.0, 12.4)),
        ("imagenet", 1000, 64, (83.6, 88.6)),
        ("digits", 10, 16, None),
        ("glyphs", 100, 16, None),
    ],
)
def test_the_method_of_every_recipe_fits_its_network(name, classes, side, params):
    """The parameters of the published networks, in millions, before and after the division."""
    recipe = read(name)
    with torch.device("meta"):
        plain = networks.build(recipe.model, classes)
    plan = Plan.of(recipe.method)
    converted = surgery.convert(plain, recipe.method.name, input_size=side, **plan.method.options)
    assert len(members(converted)) == plan.networks
    assert plan.views
    counts = tuple(sum(p.numel() for p in network.parameters()) / 1e6 for network in (plain, converted))
    if params:
        assert counts == pytest.approx(params, abs=0.06)
    assert 0.9 < counts[1] / counts[0] < 1.2


def test_the_recipes_of_our_own_keep_the_proportions_of_the_published_schedule():
    for name in ("digits", "glyphs"):
        t, warmup = read(name).training, read(name).method.options["warmup"]
        assert (t.warmup_epochs / t.epochs, warmup / t.epochs) == pytest.approx((20 / 300, 40 / 300), rel=1e-12)
