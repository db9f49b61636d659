"""Every method with its defaults on the families of both libraries: all laws, and files that a fresh process loads."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import surgery
import surgery_gated
import surgery_masked
from surgery.errors import NothingConverted
from surgery.testing import LAWS, plain_chain, tiny_networks
from surgery.testing.case import evaluate, seeded, training_loss
from tests.methods import NAMES, images, keeps_laws, pruning, settle_gates, settle_masks

NETWORKS = tuple(
    f"{library} {family}" for library in ("torchvision", "timm") for family in ("resnext", "mobilenetv2", "wide resnet")
)

PLAIN = "no residual addition was found: in a plain chain no layer can be left out, and no branch exists"
# What is refused, and why; everything else has to work.
REFUSED = {
    ("masked", "timm efficientnet"): "blocks.0.0: blocks.0.0.se mixes the branches before they are joined",
    **{(method, "chain"): f"(root) (node input_1): {PLAIN}" for method in NAMES},
}

# Run by a fresh interpreter in the folder of the files; prints a line for each network that computes something else.
LOADER = """
import sys, torch, surgery
from pathlib import Path
from surgery.testing import tiny_networks
torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)
images = torch.load("images.pt", weights_only=True)
for path in sorted(Path().glob("*.safetensors")):
    model = surgery.load(path, factory=tiny_networks()[path.stem.partition(", ")[2]]).eval()
    with torch.no_grad():
        found = model(images)
    print(path.stem, "loaded", torch.equal(found, torch.load(path.with_suffix(".pt"), weights_only=True)))
"""


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("method", NAMES)
def test_every_law_holds(method, network):
    """All of them, that of ONNX included; a refusal would leave nothing that holds."""
    report = keeps_laws(method, {network: tiny_networks()[network]}, laws=tuple(LAWS))
    assert report.held == {network: tuple(LAWS)}


@pytest.mark.parametrize("method", NAMES)
def test_a_fresh_process_loads_what_was_saved(method, tmp_path):
    torch.save(images(32), tmp_path / "images.pt")
    for network in NETWORKS:
        for name, model in variants(method, network).items():
            stem = tmp_path / f"{name}, {network}"
            surgery.save(model, f"{stem}.safetensors", factory=tiny_networks()[network])
            torch.save(evaluate(model, images(32)), f"{stem}.pt")
    command = [sys.executable, "-W", "error", "-c", LOADER]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr
    stems = sorted(f"{name}, {network}" for name in ("full", "pruned") for network in NETWORKS)
    assert done.stdout.splitlines() == [f"{stem} loaded True" for stem in stems]


def variants(method, network):
    """Return the network after a forward in train mode, and what is pruned of it."""
    asked = pruning(method)
    model = surgery.convert(tiny_networks()[network](), method, input_size=32)
    with seeded(0):
        training_loss(model, images(32), torch.arange(4))
    if asked.settle is not None:
        asked.settle(model)
    return {"full": model, "pruned": surgery.prune(model, **asked.criteria)}


@pytest.mark.parametrize(("method", "network"), REFUSED)
def test_what_is_refused_is_refused_with_place_reason_and_cure(method, network):
    build = {**tiny_networks(), "chain": plain_chain}[network]
    with pytest.raises(NothingConverted, match=f"^{method}: ") as caught:
        surgery.convert(build(), method, input_size=32)
    first = caught.value.refusals[0]
    assert f"{first.path}: {first.reason}" == REFUSED[method, network]
    assert first.cure.startswith("use a ")


def test_settled_gates_are_open_closed_and_decide_by_the_image():
    """Four gates in turn; of four images the third opens for two."""
    model = surgery.convert(tiny_networks()["timm resnext"](), "gated", input_size=32)
    settle_gates(model)
    rates = surgery_gated.measure(model, [images(32)]).rates
    assert list(rates.values()) == [(1.0,), (0.0,), (0.5,), (1.0,)]


def test_settled_masks_leave_the_last_branch_unread():
    model = surgery.convert(tiny_networks()["timm resnext"](), "masked", input_size=32)
    settle_masks(model)
    used = list(surgery_masked.used_branches(model).values())
    assert all(7 not in branches for branches in used[:-1])
    assert used[-1] == tuple(range(8))
