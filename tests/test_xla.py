"""A converted network on XLA's CPU backend: same losses as on the CPU, and a checkpoint that any machine can load."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

SCRIPT = """
import sys, copy, torch, timm, surgery
import torch_xla
from torch import nn

torch.manual_seed(0)
model = timm.create_model("resnext11_4x4d", num_classes=5)
coded = surgery.convert(model, "coded", scheme={"layer2": "2/4"}, p_drop=0.0)
images, labels = torch.randn(6, 3, 16, 16), torch.arange(6) % 5
device = torch_xla.device()
print(device.type)
losses = {}
for name, place in (("cpu", torch.device("cpu")), ("xla", device)):
    network = copy.deepcopy(coded).to(place).train()
    criterion = surgery.Objective(network, nn.CrossEntropyLoss())
    optimizer = torch.optim.SGD(surgery.param_groups(network, lr=0.05, weight_decay=1e-4), momentum=0.9)
    losses[name] = []
    for _ in range(3):
        loss = criterion(network(images.to(place)), labels.to(place))
        optimizer.zero_grad(); loss.backward(); optimizer.step()
        torch_xla.sync()
        losses[name].append(float(loss.detach().cpu()))
    network.eval()
    outputs = network(images.to(place)).detach().cpu()
    surgery.save(network, f"{sys.argv[1]}/{name}.safetensors")
    loaded = surgery.load(f"{sys.argv[1]}/{name}.safetensors")
    assert next(loaded.parameters()).device.type == "cpu"
    torch.testing.assert_close(loaded(images).detach(), outputs, rtol=1e-4, atol=1e-5)
torch.testing.assert_close(torch.tensor(losses["xla"]), torch.tensor(losses["cpu"]), rtol=1e-4, atol=1e-5)
assert losses["cpu"][0] != losses["cpu"][2]
"""


@pytest.mark.skipif(
    importlib.util.find_spec("torch_xla") is None, reason="torch_xla has no release for this Python or torch"
)
def test_training_on_xla_equals_training_on_the_cpu(tmp_path):
    environment = {**os.environ, "PJRT_DEVICE": "CPU", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("xla")
