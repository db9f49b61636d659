"""The example as a user runs it, and what it is made of: the [method] table, accuracies by level, and the recipes."""

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

import data
import inclusive as example
import networks
import subnetworks
import surgery
import surgery_inclusive
import training
from recipe import Component, Recipe, RecipeError
from surgery import curves
from surgery_inclusive.taxonomy import Taxonomy

SCRIPT = Path(__file__).parents[2] / "examples" / "inclusive.py"
RECIPES = SCRIPT.parent / "recipes"
FIGURES = ("training", "errors", "branches", "curve")
THIN = [f"sub-network {k}" for k in (1, 2, 3, 4)]
SHALLOW = [f"exit {number}" for number in (1, 2, 3)]


def command(folder: Path, recipe: Path = RECIPES / "inclusive-digits.toml") -> list[str]:
    return [sys.executable, str(SCRIPT), "--smoke", "--run-dir", str(folder), "--recipe", str(recipe)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}


def run(arguments: list[str]) -> str:
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, env=environment())
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    shown = run(command(folder))
    assert all(name in shown for name in ("plain", *THIN, *SHALLOW, "anytime prediction of 64 images"))
    return folder


@pytest.fixture(scope="module")
def sparse(tmp_path_factory) -> Path:
    """Return what the sparse form with a taxonomy left."""
    folder = tmp_path_factory.mktemp("sparse")
    recipe = (RECIPES / "inclusive-digits-sparse.toml").read_text()
    groups = "[method.taxonomy]\nparity = [0, 1, 0, 1, 0, 1, 0, 1, 0, 1]\n\n[training]"
    (folder / "recipe.toml").write_text(recipe.replace("[training]", groups))
    shown = run(command(folder, folder / "recipe.toml"))
    assert "level to predict by sub-network" in shown
    return folder


def points(folder: Path) -> dict[str, dict[str, object]]:
    metrics = json.loads((folder / "metrics.json").read_text())
    return {point["name"]: point for point in metrics["points"]}


def test_metrics_hold_what_the_table_shows(finished):
    found = points(finished)
    assert list(found) == ["plain", *THIN, *SHALLOW]
    for names in (THIN, SHALLOW):
        for measure in ("macs", "params"):
            sizes = [found[name][measure] for name in names]
            assert sizes == sorted(set(sizes))
            assert sizes[-1] == found["plain"][measure]
    metrics = json.loads((finished / "metrics.json").read_text())
    assert metrics["levels"] == {"class": [found[name]["accuracy"] for name in THIN]}
    assert [choice["level"] for choice in metrics["choices"]] == ["class"] * 4
    steps = metrics["anytime"]["milliseconds"]
    assert len(steps) == 4
    assert steps == sorted(steps)


def test_the_curves_are_in_the_shared_schema(finished):
    plain, thin, shallow = curves.read(finished / "curve.json")
    assert [curve.method for curve in (plain, thin, shallow)] == ["", "inclusive", ""]
    assert [curve.network for curve in (plain, thin, shallow)] == ["preresnext20_8x2d"] * 2 + [
        "preresnext20_8x2d, exits"
    ]
    assert [point.setting for point in thin.points] == [{"sub-network": k} for k in (1, 2, 3, 4)]
    assert [point.setting for point in shallow.points] == [{"exit": number} for number in (1, 2, 3)]
    assert all(point.milliseconds > 0 for curve in (plain, thin, shallow) for point in curve.points)


@pytest.mark.parametrize("form", ["finished", "sparse"])
def test_figures_and_checkpoints_are_written(form, request):
    folder = request.getfixturevalue(form)
    for name in (*FIGURES, *(["levels"] if form == "sparse" else [])):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG"), name
    whole, thin = (
        surgery.load(folder / f"{name}.safetensors").eval().double() for name in ("inclusive", "subnetwork-1")
    )
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    with surgery_inclusive.use(whole, 1):
        expected = whole(images)
    torch.testing.assert_close(thin(images), expected, rtol=1e-10, atol=1e-12)


def test_the_sparse_form_has_levels_and_no_exits(sparse):
    found = points(sparse)
    assert list(found) == ["plain", *THIN]
    assert found["sub-network 4"]["macs"] < found["plain"]["macs"]
    metrics = json.loads((sparse / "metrics.json").read_text())
    assert list(metrics["levels"]) == ["class", "parity"]
    assert metrics["levels"]["class"] == [found[name]["accuracy"] for name in THIN]
    assert all(choice["level"] in metrics["levels"] for choice in metrics["choices"])


def test_killed_run_goes_on_with_the_same_numbers(finished, tmp_path):
    log = tmp_path / "inclusive" / "steps.csv"
    process = subprocess.Popen(
        command(tmp_path), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 300
    while not (log.exists() and log.stat().st_size) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    run(command(tmp_path))
    for name in ("plain", "inclusive", "exits"):
        assert (tmp_path / name / "steps.csv").read_text() == (finished / name / "steps.csv").read_text()
    before, after = (json.loads((folder / "metrics.json").read_text()) for folder in (finished, tmp_path))
    for metrics in (before, after):
        del metrics["anytime"]
        for point in metrics["points"]:
            del point["milliseconds"]
    assert after == before


def test_mistakes_end_in_one_sentence(tmp_path):
    recipe = tmp_path / "r.toml"
    text = '[method]\nname = "inclusive"\n'
    for table, arguments, message in (
        ("", ["--recipe", "nowhere.toml"], "no such file"),
        ("", ["--recipe", str(RECIPES / "masked-digits.toml")], "name is 'masked'; this example is about"),
        ("", ["--device", "cuda:99"], "--device cuda:99"),
        ("exits = -1", ["--recipe", str(recipe)], "method.exits is -1; expected a whole number"),
        ('taxonomy = "groups"', ["--recipe", str(recipe)], 'taxonomy is "groups", but the data digits has none'),
    ):
        recipe.write_text(text + table)
        with pytest.raises(SystemExit) as caught:
            example.main([*arguments, "--smoke", "--run-dir", str(tmp_path / "run")])
        assert str(caught.value).startswith("inclusive.py: ")
        assert message in str(caught.value)


# --- the [method] table ---


@pytest.fixture(scope="module")
def digits() -> data.Data:
    return data.first_images(data.load("digits"), 48)


@pytest.fixture(scope="module")
def glyphs() -> data.Data:
    return data.load("glyphs", groups=2, train_variants=1, test_variants=1, image_size=16)


def test_the_table_is_taken_apart(digits, glyphs):
    table = {"subnetworks": 2, "exits": 3, "taxonomy": "groups"}
    plan = subnetworks.Plan.of(Component("inclusive", table), glyphs)
    names = ["digits, first five", "digits, last five"]
    group = {"groups": [0] * 5 + [1] * 5, "names": names}
    assert plan.method == Component("inclusive", {"subnetworks": 2, "taxonomy": {"group": group}})
    assert plan.exits == 3
    assert plan.taxonomy == Taxonomy.of({"group": group})
    assert table == {"subnetworks": 2, "exits": 3, "taxonomy": "groups"}
    parity = {"parity": [0, 1] * 5}
    plan = subnetworks.Plan.of(Component("inclusive", {"taxonomy": parity}), digits)
    assert plan == subnetworks.Plan(Component("inclusive", {"taxonomy": parity}), 0, Taxonomy.of(parity))
    assert subnetworks.Plan.of(Component("inclusive"), digits).taxonomy is None


@pytest.mark.parametrize("found", [-1, 2.0, True, "2"])
def test_exits_that_are_no_number_are_refused(digits, found):
    with pytest.raises(RecipeError, match=r"method\.exits is .*; expected a whole number"):
        subnetworks.Plan.of(Component("inclusive", {"exits": found}), digits)


# --- accuracies ---


@pytest.mark.parametrize("sparse", [False, True])
def test_accuracies_are_those_of_the_networks_taken_out(digits, sparse):
    torch.manual_seed(0)
    plain = networks.build(Component("preresnext20_8x2d"), 10)
    plain.fc.weight.data.normal_()
    model = surgery.convert(plain, "inclusive", input_size=16, subnetworks=2, sparse=sparse)
    found = subnetworks.accuracies(model, digits.test)
    assert found.shape == (2, 1)
    for k in (1, 2):
        thin = surgery.prune(model, subnetwork=k)
        assert found[k - 1, 0] == training.evaluate(thin, digits.test).accuracy


def test_accuracies_on_a_level_are_those_of_its_classifiers(digits):
    """Classifiers that always say "odd", or "even": right about as many images as are that."""
    plain = networks.build(Component("preresnext20_8x2d"), 10)
    model = surgery.convert(
        plain, "inclusive", input_size=16, subnetworks=2, taxonomy={"parity": [0, 1] * 5, "all": [0] * 10}
    )
    for k, answer in ((0, 1), (1, 0)):
        classifier = model.get_submodule("fc").coarse[k][0]
        classifier.weight.data.zero_()
        classifier.bias.data = torch.eye(2)[answer]
    odd = (digits.test.targets % 2).double().mean()
    found = subnetworks.accuracies(model, digits.test)
    assert 0 < odd < 1
    torch.testing.assert_close(found[:, 1], torch.stack([odd, 1 - odd]), rtol=1e-12, atol=0)
    assert torch.equal(found[:, 2], torch.ones(2, dtype=torch.float64))


# --- the recipes ---


def read(name: str) -> Recipe:
    return Recipe.from_toml(RECIPES / f"inclusive-{name}.toml")


def test_the_published_numbers_of_the_recipes():
    for name, epochs, milestones, batch, count, sparse in (
        ("cifar10", 300, (150, 225), 64, 8, False),
        ("cifar100", 300, (150, 225), 64, 6, True),
        ("imagenet", 90, (30, 60), 96, 5, True),
    ):
        recipe = read(name)
        t, options = recipe.training, recipe.method.options
        assert (t.epochs, t.milestones, t.batch_size, t.weight_decay) == (epochs, milestones, batch, 1e-4)
        assert (t.lr, t.schedule, t.gamma, t.lr_unit, t.momentum, t.nesterov) == (0.1, "step", 0.1, "epoch", 0.9, True)
        assert (options["subnetworks"], options["sparse"]) == (count, sparse)
        rates = [training.learning_rate(t, epoch) for epoch in (0, milestones[0], milestones[1], epochs - 1)]
        assert rates == pytest.approx([0.1, 0.01, 0.001, 0.001], rel=1e-12)


@pytest.mark.parametrize(
    ("name", "blocks", "width", "branches", "classes"),
    [
        ("cifar10", 21, 64, 8, 10),
        ("cifar100", 15, 96, 24, 100),
        ("digits", 6, 32, 8, 10),
        ("digits-sparse", 6, 32, 8, 10),
        ("glyphs", 9, 32, 8, 100),
        ("imagenet", 20, 160, 40, 1000),
    ],
)
def test_the_method_of_every_recipe_fits_its_network(name, blocks, width, branches, classes):
    recipe = read(name)
    with torch.device("meta"):
        plain = networks.build(recipe.model, classes)
    options = {key: value for key, value in recipe.method.options.items() if key not in ("exits", "taxonomy")}
    side = 224 if name == "imagenet" else 32
    converted = surgery.convert(plain, recipe.method.name, input_size=side, **options)
    architecture = converted.meta["architecture"]
    assert len(architecture.blocks) == blocks
    assert architecture.blocks[0].channels.input == width
    assert {block.cardinality for block in architecture.blocks} == {branches}
    assert 0 <= recipe.method.options.get("exits", 0) <= blocks


def test_the_recipe_of_the_claims_has_everything_that_they_compare():
    options = read("glyphs").method.options
    assert options["exits"] == options["subnetworks"] == 4
    assert options["taxonomy"] == "groups"
