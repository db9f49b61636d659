"""The example as a user runs it: everything it promises is there, and a killed run goes on with the same numbers."""

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

import surgery

SCRIPT = Path(__file__).parents[2] / "examples" / "coded.py"
FIGURES = ("training", "early_decoders", "energies", "binary", "removal", "agreement", "calibration")


def command(folder: Path) -> list[str]:
    return [sys.executable, str(SCRIPT), "--smoke", "--run-dir", str(folder)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    done = subprocess.run(command(folder), capture_output=True, text=True, check=False, env=environment())
    assert done.returncode == 0, done.stderr
    assert "early decoders" in done.stdout
    return folder


def test_metrics_hold_what_the_table_shows(finished):
    metrics = json.loads((finished / "metrics.json").read_text())
    assert list(metrics["early_decoders"]) == ["layer2.0", "layer2.1", "layer3.0", "layer3.1"]
    assert metrics["removal"]["block"] == "layer2.1"
    for kind in ("active", "inactive"):
        assert list(metrics["removal"][kind]) == ["0", "1", "2", "3", "4", "5"]
        assert metrics["removal"][kind]["0"] == metrics["accuracy"]["coded"]
    assert sum(group["images"] for group in metrics["agreement"]) == 256
    assert [group["decoders"] for group in metrics["agreement"]] == [0, 1, 2, 3, 4]
    assert set(metrics["calibration"]) == {"h_T", "h_aug"}
    assert metrics["cost"]["coded"]["params"] == metrics["cost"]["plain"]["params"]
    assert metrics["cost"]["only '3'"]["macs"] < metrics["cost"]["coded"]["macs"]
    assert {"precision", "recall", "f1", "threshold"} == set(metrics["binary"]["test"])
    assert metrics["binary"]["with_outliers"]["recall"] == metrics["binary"]["test"]["recall"]


def test_figures_and_checkpoints_are_written(finished):
    for name in FIGURES:
        assert (finished / f"{name}.png").read_bytes().startswith(b"\x89PNG"), name
    coded, binary = (surgery.load(finished / f"{name}.safetensors") for name in ("coded", "binary"))
    image = torch.randn(1, 3, 16, 16)
    assert coded(image).shape == (1, 10)
    assert binary(image).shape == (1, 1)


def test_killed_run_goes_on_with_the_same_losses(finished, tmp_path):
    log = tmp_path / "coded" / "steps.csv"
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
    for part in ("plain", "coded"):
        assert (tmp_path / part / "steps.csv").read_text() == (finished / part / "steps.csv").read_text()


def test_mistakes_end_in_one_sentence(tmp_path):
    for arguments, message in (
        (["--recipe", "nowhere.toml"], "no such file"),
        (["--recipe", str(SCRIPT.parent / "recipes" / "coded-cifar10.toml"), "--data", str(tmp_path)], "cifar"),
    ):
        done = subprocess.run(
            [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False, env=environment()
        )
        assert done.returncode == 1
        assert message in done.stderr.lower()
        assert "Traceback" not in done.stderr
