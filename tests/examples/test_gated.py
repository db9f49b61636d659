"""The example as a user runs it, and what it is made of: the log of the gates, operating points, pairs of networks."""

from __future__ import annotations

import dataclasses
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
import gated as example
import machines
import networks
import operating
import pairs
import rates
import reports
import surgery
from recipe import Component, Recipe, Training
from surgery import curves
from surgery_gated.gates import AlwaysOn, Threshold
from surgery_gated.transform import gated_blocks

SCRIPT = Path(__file__).parents[2] / "examples" / "gated.py"
FIGURES = ("training", "rates", "polarization", "layer_rates", "curve")
NAMES = ["plain", "all open", *(f"tau {tau}" for tau in (0.2, 0.35, 0.5, 0.65, 0.8))]
NAMES += ["drawn", "ensemble, majority", "ensemble, mean", "pruned, tau 0.5", "static, tau 0.5"]


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
    assert "gates at tau 0.5: open for" in done.stdout
    return folder


def test_metrics_hold_what_the_table_shows(finished):
    metrics = json.loads((finished / "metrics.json").read_text())
    points = {point["name"]: point for point in metrics["points"]}
    assert list(points) == NAMES
    assert points["all open"]["macs"] == points["plain"]["macs"] == metrics["usage"]["full_macs"]
    # after so few steps the gates are far from closed, and are drawn open for most images
    assert 0.5 < points["drawn"]["macs"] / points["plain"]["macs"] < 1
    assert points["ensemble, mean"]["macs"] == 5 * points["drawn"]["macs"]
    assert points["ensemble, mean"]["milliseconds"] == 5 * points["drawn"]["milliseconds"]
    assert points["drawn"]["deviation"] >= 0
    assert points["tau 0.5"]["macs"] == metrics["usage"]["macs"]
    assert points["pruned, tau 0.5"]["macs"] == pytest.approx(points["tau 0.5"]["macs"], rel=1e-12)
    assert list(metrics["usage"]["rates"]) == [f"layer{s}.{b}" for s in (1, 2, 3) for b in (0, 1, 2, 3)]
    assert set(metrics["pruned"]) == {"pruned", "static"}


def test_the_curves_are_in_the_shared_schema(finished):
    found = curves.read(finished / "curve.json")
    assert [(curve.method, curve.network) for curve in found] == [
        ("", "wrn_28_1"),
        ("gated", "wrn_28_1"),
        ("gated", "wrn_28_1, gates drawn"),
        ("gated", "wrn_28_1, ensemble"),
        ("gated", "wrn_28_1, pruned"),
        ("gated", "wrn_28_1, static"),
    ]
    assert [point.setting for point in found[1].points] == [
        {"gates": "open"}, *({"tau": tau} for tau in (0.2, 0.35, 0.5, 0.65, 0.8))
    ]  # fmt: skip
    assert all(point.milliseconds > 0 for curve in found for point in curve.points)


def test_figures_and_checkpoints_are_written(finished):
    for name in FIGURES:
        assert (finished / f"{name}.png").read_bytes().startswith(b"\x89PNG"), name
    for name in ("gated", "pruned", "static"):
        network = surgery.load(finished / f"{name}.safetensors")
        assert network(torch.randn(1, 3, 16, 16)).shape == (1, 10)
    entries = json.loads((finished / "rates.json").read_text())
    assert [entry["epoch"] for entry in entries] == [1]
    assert entries[0]["mode"] == "Stochastic()"
    assert entries[0]["images"] == 256


def test_killed_run_goes_on_with_the_same_numbers(finished, tmp_path):
    log = tmp_path / "gated" / "steps.csv"
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
    for name in ("plain/steps.csv", "gated/steps.csv", "rates.json"):
        assert (tmp_path / name).read_text() == (finished / name).read_text()
    before, after = (json.loads((folder / "metrics.json").read_text()) for folder in (finished, tmp_path))
    for point in before["points"] + after["points"]:
        del point["milliseconds"]
    assert after == before


def test_mistakes_end_in_one_sentence(tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text('[model]\nname = "torchvision:resnet18"\nweights = "lost.pth"\n[training]\nepochs = 1\n')
    for arguments, message in (
        (["--recipe", "nowhere.toml"], "no such file"),
        (["--recipe", str(SCRIPT.parent / "recipes" / "coded-digits.toml")], "name is 'coded'; this example is about"),
        (["--tau", "1.5"], "tau=1.5, expected a probability"),
        (["--device", "cuda:99"], "--device cuda:99"),
        (["--recipe", str(recipe)], "lost.pth does not exist; put a state dict there, or name another file"),
    ):
        with pytest.raises(SystemExit) as caught:
            example.main([*arguments, "--run-dir", str(tmp_path / "run")])
        assert str(caught.value).startswith("gated.py: ")
        assert message in str(caught.value)


# --- the parts ---


@pytest.fixture(scope="module")
def digits():
    return data.first_images(data.load("digits"), 48)


def gated(**options):
    torch.manual_seed(0)
    plain = surgery.models.CifarResNet(surgery.models.resnet(11), zero_init_last=False)
    return surgery.convert(plain, "gated", input_size=16, **options)


def ended(number):
    return reports.Epoch(number, 0.1, 1.0, {}, None, 1.0)


def test_rates_are_those_of_gates_that_are_drawn_on_the_given_images(tmp_path, digits):
    """P(open) of a fresh dependent layer gate is sigmoid(1.9) = 0.8699, whatever the image; of 144 draws about 125."""
    model = gated()
    log = rates.RateLog(tmp_path / "rates.json", digits.train, machines.Processes())
    log(model, ended(0))
    (entry,) = log.read()
    assert (entry["epoch"], entry["images"], entry["mode"]) == (1, 48, "Stochastic()")
    assert list(entry["rates"]) == ["layer1.0", "layer2.0", "layer3.0"]
    assert entry["probabilities"]["layer1.0"] == pytest.approx([0.8699], abs=0.01)
    assert 100 / 144 < entry["rate"] < 1
    assert all(gates.mode == Threshold(0.5) for _, gates in gated_blocks(model))


def test_an_epoch_that_is_trained_again_replaces_its_entry_and_those_behind_it(tmp_path, digits):
    model = gated(dependent=False)
    log = rates.RateLog(tmp_path / "rates.json", digits.train, machines.Processes())
    for number in (0, 1, 2):
        log(model, ended(number))
    first = log.read()[0]
    with torch.no_grad():
        for _, gates in gated_blocks(model):
            gates.head.logits.copy_(torch.tensor([[50.0, -50.0]]))
    log(model, ended(1))
    entries = log.read()
    assert [entry["epoch"] for entry in entries] == [1, 2]
    assert entries[0] == first
    assert entries[1]["rate"] == 0
    assert [file.name for file in tmp_path.iterdir()] == ["rates.json"]


def test_a_damaged_log_is_refused(tmp_path, digits):
    (tmp_path / "rates.json").write_text('[{"epoch": 1')
    log = rates.RateLog(tmp_path / "rates.json", digits.train, machines.Processes())
    with pytest.raises(ValueError, match=r"rates\.json: no JSON .*delete it to go on without the epochs so far"):
        log(gated(), ended(1))


def bench(digits, repeats=1):
    return operating.Bench(digits, Training(epochs=1, batch_size=24, augment=False), "cpu", repeats)


def test_a_network_in_a_mode_has_its_own_mode_back():
    model = gated().eval()
    for _, gates in gated_blocks(model):
        gates.mode = Threshold(1.0)  # all closed
    images = torch.randn(2, 3, 16, 16)
    closed = model(images)
    opened = operating.InMode(model, AlwaysOn())(images)
    assert not torch.equal(opened, closed)
    assert torch.equal(model(images), closed)
    assert all(gates.mode == Threshold(1.0) for _, gates in gated_blocks(model))


def test_operating_points_with_all_gates_open_and_all_closed(digits):
    """Behind tau = 1 no gate is open: what is left are stem, projections and classifier.

    16 x 16 px, base 16: stem 27 * 16 * 256 = 110,592; projections 16 * 64 * 256 = 262,144, 64 * 128 * 64 = 524,288
    and 128 * 256 * 16 = 524,288; classifier 2,560.
    """
    model = gated().eval()
    rows = [row for row, _ in bench(digits).gated(model, [1.0])]
    assert [row.name for row in rows] == ["all open", "tau 1"]
    assert rows[0].point.macs == surgery.cost(model, 16).macs - gate_macs(model)
    assert rows[1].point.macs == 110_592 + 262_144 + 2 * 524_288 + 2_560


def gate_macs(model):
    return sum(gates.head.reduce.weight.numel() for _, gates in gated_blocks(model))


def test_statistics_are_those_of_the_mode_that_is_measured(digits):
    """With all gates closed the last stage reads other values, so its norms have to learn other statistics."""
    model = gated().eval()
    seen = {}
    for mode in (AlwaysOn(), Threshold(1.0), AlwaysOn()):
        bench(digits).in_mode(model, mode, "", {})
        seen.setdefault(mode, []).append(model.get_submodule("layer3.0.bn1").running_mean.clone())
    assert torch.equal(*seen[AlwaysOn()])
    assert not torch.allclose(seen[AlwaysOn()][0], seen[Threshold(1.0)][0], rtol=0.01)


def test_an_ensemble_takes_as_long_as_its_runs(digits):
    single, *ensembles = bench(digits).drawn(gated().eval())
    timed = bench(digits).timed([single, *ensembles])
    assert [row.passes for row in timed] == [1, 5, 5]
    assert [row.point.milliseconds for row in timed[1:]] == [5 * timed[0].point.milliseconds] * 2
    assert ensembles[0].point.macs == 5 * single.point.macs


def test_large_images_are_timed_in_smaller_batches(digits):
    assert bench(digits).timed_images == 64
    assert bench(dataclasses.replace(digits, image_size=224)).timed_images == 8


@pytest.mark.parametrize(("start", "gap"), [("same", 0.0), ("trained", 1.0)])
def test_the_converted_network_starts_from_the_weights_that_the_recipe_names(tmp_path, digits, monkeypatch, start, gap):
    """Training adds 1 to the bias of the classifier here."""
    begun, folders, hooks = {}, {}, {}

    def train(model, criterion, data, recipe, *, run_dir, label, on_epoch=None, **_):
        begun[label], folders[label], hooks[label] = model.fc.bias.detach().clone(), run_dir, on_epoch
        with torch.no_grad():
            model.fc.bias.add_(1.0)
        return ()

    monkeypatch.setattr(pairs, "train", train)
    recipe = Recipe(model=Component("resnet20"), training=Training(start=start))
    options = {"resume": False, "machine": machines.Processes(), "on_epoch": print}
    pair = pairs.train_both(recipe, digits, tmp_path, Component("gated", {"target": 0.4}), **options)
    assert torch.equal(begun["gated"], begun["plain"] + gap)
    assert folders == {"plain": tmp_path / "plain", "gated": tmp_path / "gated"}
    assert hooks == {"plain": None, "gated": print}
    assert not pair.plain.training
    assert not pair.converted.training


def test_the_published_numbers_of_the_recipes():
    layers, channels, imagenet, fine = (
        Recipe.from_toml(SCRIPT.parent / "recipes" / f"gated-{name}.toml")
        for name in ("cifar10", "cifar10-channel", "imagenet", "imagenet-channel")
    )
    for recipe, epochs, milestones, decay in (
        (layers, 350, (150, 250), 5e-4),
        (channels, 100, (40, 70), 5e-4),
        (imagenet, 100, (30, 60, 90), 1e-4),
        (fine, 100, (30, 60, 90), 1e-4),
    ):
        t = recipe.training
        assert (t.epochs, t.milestones, t.gamma, t.weight_decay) == (epochs, milestones, 0.1, decay)
        assert (t.lr, t.batch_size, t.momentum, t.nesterov, t.warmup_epochs) == (0.1, 256, 0.9, False, 0)
        options = recipe.method.options
        assert (options["loss"], options["target"], options["dependent"]) == ("batch", 0.5, True)
    assert [r.method.options["weight"] for r in (layers, channels, imagenet, fine)] == [2.0, 2.0, 1.0, 1.0]
    assert [r.method.options["decay"] for r in (channels, fine)] == [10.0, 40.0]
    assert {r.model.options["weights"] for r in (imagenet, fine)} == {"IMAGENET1K_V1"}
    # the channel recipe goes on from the plain network of the layer recipe
    assert channels.model.options["weights"] == "runs/gated-cifar10/plain/training.safetensors"
    assert channels.model.name == layers.model.name


@pytest.mark.parametrize("name", ["cifar10", "cifar10-channel", "digits", "glyphs", "imagenet", "imagenet-channel"])
def test_the_method_of_every_recipe_fits_its_network(name):
    """One gate a block; 728 in a ResNet-50 with channel gates."""
    recipe = Recipe.from_toml(SCRIPT.parent / "recipes" / f"gated-{name}.toml")
    model = dataclasses.replace(recipe.model, options={})
    with torch.device("meta"):
        plain = networks.build(model, 10)
    converted = surgery.convert(plain, recipe.method.name, input_size=32, **recipe.method.options)
    expected = {
        "cifar10": 36,
        "cifar10-channel": 1601,
        "digits": 12,
        "glyphs": 12,
        "imagenet": 16,
        "imagenet-channel": 728,
    }
    assert sum(gates.count for _, gates in gated_blocks(converted)) == expected[name]
