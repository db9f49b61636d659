"""Trainings on several processes and on XLA: the numbers of one process, also behind a kill."""

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import checkpoints
import commands
import machines
import reports
import training
from recipe import Recipe, Training
from splits import MemorySplit
from tests.examples.worker import STOP, tiny_data

WORKER = Path(__file__).parent / "worker.py"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


def work(*arguments, launcher=(), **environment):
    """Run the worker, and return its exit code and what it wrote on stderr."""
    command = [sys.executable, *launcher, WORKER, *arguments]
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    return done.returncode, done.stderr


def succeed(*arguments, **options):
    code, errors = work(*arguments, **options)
    assert code == 0, errors


def losses(folder):
    return [row["loss"] for row in reports.read_steps(folder / training.STEPS)]


def assert_same(folder, expected):
    """Require the same log, byte for byte, and the same weights."""
    assert (folder / training.STEPS).read_text() == (expected / training.STEPS).read_text()
    found, wanted = (torch.load(path / "trained.pt", weights_only=True) for path in (folder, expected))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(value, wanted[key]) for key, value in found.items())


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    succeed(folder, "cpu", "whole")
    return folder


def test_several_processes_stop_together_and_go_on_with_the_numbers_of_one(one, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    succeed(whole, "cpu", "whole", "ddp", "fsdp", launcher=TORCHRUN)
    alone = torch.load(one / "cpu-linear" / "trained.pt", weights_only=True)
    for way in ("ddp", "fsdp"):
        assert len(losses(whole / f"{way}-linear")) == 10
        assert losses(whole / f"{way}-linear") == pytest.approx(losses(one / "cpu-linear"), rel=1e-12)
        trained = torch.load(whole / f"{way}-linear" / "trained.pt", weights_only=True)
        for key, value in trained.items():
            torch.testing.assert_close(value, alone[key], rtol=1e-12, atol=1e-14)
    assert losses(whole / "fsdp-masked") == pytest.approx(losses(whole / "ddp-masked"), rel=1e-5)

    # told to stop: one of the processes notices, and all save the same step
    succeed(broken, "cpu", "stopped", "ddp", "fsdp", launcher=TORCHRUN)
    for way in ("ddp", "fsdp"):
        for name in ("linear", "masked"):
            saved = checkpoints.read(broken / f"{way}-{name}" / training.CHECKPOINT)
            assert saved.progress["step"] == STOP + 2
    succeed(broken, "cpu", "whole", "ddp", "fsdp", launcher=TORCHRUN)
    for way in ("ddp", "fsdp"):
        for name in ("linear", "masked"):
            assert_same(broken / f"{way}-{name}", whole / f"{way}-{name}")


def test_killed_processes_go_on_where_the_last_checkpoint_was(tmp_path):
    folder, whole = tmp_path / "killed", tmp_path / "whole"
    code, errors = work(folder, "cpu", "killed", "fsdp", launcher=TORCHRUN)
    assert code != 0
    assert "SIGKILL" in errors
    assert checkpoints.read(folder / "fsdp-linear" / training.CHECKPOINT).progress["step"] < STOP + 2
    assert not (folder / "fsdp-masked").exists()
    for place in (folder, whole):
        succeed(place, "cpu", "whole", "fsdp", launcher=TORCHRUN)
    assert_same(folder / "fsdp-linear", whole / "fsdp-linear")
    code, errors = work(folder, "cpu", "whole")
    assert code == 0, errors  # another way, another folder
    (folder / "cpu-linear").rename(tmp_path / "old")
    (folder / "fsdp-linear").rename(folder / "cpu-linear")
    code, errors = work(folder, "cpu", "whole")
    assert code != 0
    assert "belongs to another run (processes was 2, is None)" in errors


@pytest.mark.skipif(
    importlib.util.find_spec("torch_xla") is None, reason="torch_xla has no release for this Python or torch"
)
def test_xla_has_the_numbers_of_the_cpu_on_one_device_and_on_two_also_behind_a_kill(one, tmp_path):
    alone, two = {"PJRT_DEVICE": "CPU"}, {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "2"}
    succeed(tmp_path / "whole", "xla", "whole", **alone)
    code, errors = work(tmp_path / "broken", "xla", "killed", **alone)
    assert code == -signal.SIGKILL, errors
    succeed(tmp_path / "broken", "xla", "whole", **alone)
    succeed(tmp_path / "two", "xla", "whole", "spmd", **two)
    expected = losses(one / "cpu-linear")
    assert losses(tmp_path / "whole" / "xla-linear") == pytest.approx(expected, rel=1e-10)
    assert losses(tmp_path / "two" / "spmd-linear") == pytest.approx(expected, rel=1e-10)
    assert_same(tmp_path / "broken" / "xla-linear", tmp_path / "whole" / "xla-linear")


def test_compiled_training_has_the_losses_of_eager_training(tmp_path):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    def trained(folder, compiler):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 4))
        recipe = Recipe(training=Training(epochs=1, batch_size=20, lr=0.05, augment=False))
        machine = machines.Processes(compiler=compiler)
        criterion = training.Task(nn.CrossEntropyLoss())
        training.train(
            model, criterion, tiny_data(MemorySplit), recipe, run_dir=folder, machine=machine, progress=False
        )
        return model.state_dict()

    eager, compiled = trained(tmp_path / "eager", None), trained(tmp_path / "compiled", backend)
    assert graphs
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), rel=1e-6)
    assert eager.keys() == compiled.keys()  # no prefix of a wrapper


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cpu", "fsdp"), r"--parallel fsdp: found one process; start it with torchrun"),
        (("cpu", "spmd"), r"--parallel spmd: found --device cpu; .* add --device xla"),
        (("xla", "ddp"), r"--device xla: found --compile, --parallel ddp.*--parallel spmd"),
        (("xla", None, "inductor"), r"--device xla: found --compile"),
        (("cuda:99",), r"--device cuda:99: torch finds no such device; use --device cpu"),
        (("nonsense",), r"--device nonsense: .*use cpu, cuda or xla"),
    ],
)
def test_what_a_machine_cannot_do_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        machines.start(*arguments)


def test_xla_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_xla", None)
    with pytest.raises(ValueError, match=r"torch_xla cannot be imported \(.*\); pip install 'surgery\[xla\]'"):
        machines.start("xla")


def test_restart_forgets_all_trainings_of_a_run_before_the_first(tmp_path):
    kept = tmp_path / "plain" / training.STEPS
    for name in ("plain", "coded"):
        (tmp_path / name).mkdir()
        (tmp_path / name / training.CHECKPOINT).write_bytes(b"old")
    kept.write_text("old")
    words = ["--smoke", "--run-dir", str(tmp_path)]
    options = commands.parser(None, "coded-digits")
    commands.prepare(options.parse_args(words))
    assert len(list(tmp_path.glob(f"*/{training.CHECKPOINT}"))) == 2
    commands.prepare(options.parse_args([*words, "--restart"]))
    assert list(tmp_path.glob("*/*")) == [kept]
