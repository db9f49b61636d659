import json
import os
import subprocess
import sys
import warnings
from dataclasses import dataclass
from typing import ClassVar

import onnxruntime
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

import surgery
from surgery import plugins
from surgery.cli import app
from surgery.errors import InvalidOption, NothingConverted, Refusal
from surgery.method import Method
from surgery.plugins import Provider
from surgery.pruning import Cut, PrunePlan

NAME = "resnet20"  # surgery.models': 0.3 M parameters at 3 x 32 x 32, two blocks in each of layer1 to layer3


class Gate(nn.Module):
    def forward(self, x):
        return x


@dataclass(frozen=True)
class Toy(Method):
    """Put a gate into every block of one stage.

    Attributes:
        stage: Name of the stage, which
            has to exist.
    """

    name: ClassVar[str] = "toy"
    preserves: ClassVar[str] = "output"

    stage: str = "layer3"

    def transform(self, architecture, rewriter):
        blocks = [block for block in architecture.blocks if block.stage == self.stage]
        if not blocks:
            raise NothingConverted(f"toy: there is no stage {self.stage}", [Refusal("layer1", "found another name")])
        for block in blocks:
            rewriter.insert(Gate(), block.body, at=block, role="gate")

    def losses(self, step):
        return {}

    def plan(self, model, block="layer3.1", **criteria):
        if criteria:
            raise InvalidOption(f"toy: unknown criteria {sorted(criteria)}")
        return PrunePlan.of(model, "toy", [Cut("body", block, (), 1, "closed")], {"block": block})


@pytest.fixture(autouse=True)
def _installed(monkeypatch):
    broken = Provider(None, "bad", "broken-package", "2", "ImportError: no module")
    monkeypatch.setattr(plugins, "providers", lambda: (broken, Provider(Toy, "toy", "toys", "1.5")))


@pytest.fixture
def call(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runner = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"})

    def run(*arguments, code=0):
        result = runner.invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == code, result.output
        assert "Traceback" not in result.output
        return result

    return run


@pytest.fixture
def converted(call):
    call("convert", NAME, "toy", "--out", "new.safetensors")
    return "new.safetensors"


def test_help_and_version_name_commands_and_exit_codes(call):
    text = call("--help").output
    assert all(
        word in text for word in ("methods", "inspect", "convert", "prune", "show", "cost", "export", "Exit codes")
    )
    assert call("--version").output == "surgery 0.1.0\n"


@pytest.mark.parametrize("command", ["methods", "inspect", "convert", "prune", "show", "cost", "export"])
def test_every_command_has_an_example(call, command):
    assert f"Example: surgery {command}" in call(command, "--help").output


def test_methods_lists_what_is_installed_and_what_is_broken(call):
    result = call("methods", "--verbose")
    assert "toy" in result.stdout
    assert "toys 1.5" in result.stdout
    assert "Name of the stage, which has to exist." in result.stdout
    assert "not usable: bad of broken-package: ImportError: no module" in result.stderr


def test_methods_as_json(call):
    broken, toy = json.loads(call("methods", "--json").stdout)
    assert (broken["name"], broken["error"]) == ("", "ImportError: no module")
    assert (toy["name"], toy["preserves"], toy["version"]) == ("toy", "output", "1.5")
    assert toy["options"] == [
        {"name": "stage", "type": "str", "default": "'layer3'", "help": "Name of the stage, which has to exist."}
    ]


def test_inspect_prints_the_architecture(call):
    result = call("inspect", NAME, "--classes", 7, "--blocks")
    assert "head fc, 7 classes" in result.stdout
    assert "layer3.1" in result.stdout
    assert result.stderr == "resnet20: timm:resnet20 (from surgery.models)\n"


def test_inspect_json_has_blocks_and_operations(call, converted):
    data = json.loads(call("inspect", converted, "--json").stdout)
    assert [block["path"] for block in data["stages"][2]["blocks"]] == ["layer3.0", "layer3.1"]
    assert [operation["method"] for operation in data["operations"]] == ["toy"]
    assert json.loads(call("inspect", NAME, "--json", "--input-size", "48x32").stdout)["input_size"] == [3, 48, 32]


def test_a_bare_name_means_torchvision_where_both_libraries_have_it(call):
    result = call("inspect", "resnet18")
    assert result.stderr == "resnet18: torchvision:resnet18 (timm has one too: timm:resnet18)\n"
    assert call("inspect", "timm:resnet18").stderr == ""


def test_convert_writes_what_load_reads(call, converted):
    result = call("convert", NAME, "toy", "-o", "stage=layer2", "--classes", 4, "--out", "other.safetensors")
    assert result.stdout == "other.safetensors: CifarResNet, toy changed 2 of 6 blocks\n"
    assert "weights are random" in result.stderr
    model = surgery.load("other.safetensors")
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 4)
    assert not model.training


def test_convert_is_repeatable_from_its_seed(call):
    for name in ("one", "two"):
        call("convert", NAME, "toy", "--seed", 3, "--out", f"{name}.safetensors")
    one, two = (surgery.load(f"{name}.safetensors").state_dict() for name in ("one", "two"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_convert_dry_run_explains_and_writes_nothing(call, tmp_path):
    text = call("convert", NAME, "toy", "--dry-run").stdout
    assert 'toy (stage="layer3") changes 2 of 6 blocks' in text
    lines = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    assert "gate (toy_gate)" in lines["layer3.1"]
    assert "skipped" in lines["layer1.0"]
    assert "100.0 %" in lines["parameters"]
    assert list(tmp_path.iterdir()) == []


def test_weights_are_loaded_from_a_file(call, tmp_path):
    state = timm.create_model(NAME, num_classes=3).state_dict()
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, tmp_path / "w.pt")
    save_file(state, tmp_path / "w.safetensors")
    for weights in ("w.pt", "w.safetensors"):
        call("convert", NAME, "toy", "--classes", 3, "--weights", weights, "--out", "new.safetensors", "--force")
        loaded = surgery.load("new.safetensors").state_dict()
        assert all(torch.equal(value, loaded[key]) for key, value in state.items())


def test_weights_that_do_not_fit_are_refused_by_name(call, tmp_path):
    torch.save(timm.create_model(NAME, num_classes=3).state_dict(), tmp_path / "w.pt")
    result = call("convert", NAME, "toy", "--weights", "w.pt", "--out", "new.safetensors", code=1)
    assert "2 of another shape: fc.weight, fc.bias" in result.stderr


def test_show_marks_what_a_method_does(call, converted):
    text = call("show", NAME, "toy").stdout
    assert text == call("show", converted).stdout
    assert text.startswith("CifarResNet after convert toy: 2 nodes inserted (+), 0 replaced (~), 0 gone (-)\n")
    assert "not converted" in call("show", NAME).stdout


def test_cost_prints_a_table_or_json(call, converted):
    assert "MFLOPs" in call("cost", NAME, "--count", "flops").stdout
    data = json.loads(call("cost", converted, "--json").stdout)
    assert data["flops"] == 2 * data["macs"]
    assert len(data["blocks"]) == 6
    assert data["params"] == sum(parameter.numel() for parameter in timm.create_model(NAME).parameters())


def test_prune_writes_what_its_plan_says(call, converted):
    text = call("prune", converted, "-c", "block=layer2.1", "--out", "small.safetensors").stdout
    assert "layer2.1: body removed (closed)" in text
    planned = json.loads(call("prune", converted, "-c", "block=layer2.1", "--dry-run", "--json").stdout)
    found = json.loads(call("cost", "small.safetensors", "--json").stdout)
    assert (found["params"], found["macs"]) == (planned["after"]["params"], planned["after"]["macs"])
    assert found["macs"] < planned["before"]["macs"]
    assert "before the surgery" in call("cost", "small.safetensors").stdout
    assert "after convert toy 1.5, then prune toy 1.5" in call("inspect", "small.safetensors").stdout


def test_exported_files_compute_the_same(call, converted):
    image = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        expected = surgery.load(converted)(image)
    assert "takes (N, 3, 32, 32)" in call("export", converted, "--out", "new.pt2").stdout
    call("export", converted, "--out", "new.onnx")
    with warnings.catch_warnings():
        # torch.export.load wraps the bytes that it has read, which are read-only, and warns about that itself.
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        program = torch.export.load("new.pt2").module()
    session = onnxruntime.InferenceSession("new.onnx", providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: image.numpy()})
    # Both run in float32, with sums in another order.
    torch.testing.assert_close(program(image), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.from_numpy(output), expected, rtol=1e-4, atol=1e-5)


def test_export_says_which_extra_is_missing(call, converted, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = call("export", converted, "--out", "new.onnx", code=1)
    assert "ONNX needs onnx and onnxscript" in result.stderr
    assert "pip install 'surgery[export]'" in result.stderr


def test_refusals_exit_with_1_and_the_reason(call, converted, tmp_path):
    result = call("convert", NAME, "toy", "-o", "stage=body", "--out", "x.safetensors", code=1)
    assert result.stderr.endswith("error: toy: there is no stage body\n  layer1: found another name\n")
    assert "no installed method is called 'toi'" in call("convert", NAME, "toi", "--dry-run", code=1).stderr
    assert "unknown option 'depth'" in call("show", NAME, "toy", "-o", "depth=3", code=1).stderr
    assert "unknown criteria ['share']" in call("prune", converted, "-c", "share=0.5", "--dry-run", code=1).stderr
    assert "already converted by 'toy'" in call("convert", converted, "toy", "--dry-run", code=1).stderr
    assert [path.name for path in tmp_path.iterdir()] == [converted]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["convert", NAME, "toy"], "--dry-run"),
        (["convert", NAME, "toy", "-o", "stage", "--dry-run"], "expected key=value"),
        (["convert", NAME, "toy", "--out", "x.txt"], ".safetensors"),
        (["inspect", "resnet2O"], "did you mean"),
        (["inspect", "keras:resnet50"], "expected torchvision:NAME or timm:NAME"),
        (["inspect", NAME, "--input-size", "32x"], "expected a side in pixels"),
        (["inspect", "torchvision:resnet18", "--in-channels", "1"], "timm:NAME"),
        (["inspect", NAME, "--pretrained", "--weights", "w.pt"], "either --pretrained or"),
        (["inspect", "a.safetensors", "--classes", "3"], "is a checkpoint"),
        (["cost", NAME, "--count", "bytes"], "macs"),
        (["methodz"], "methods"),
    ],
)
def test_wrong_usage_exits_with_2(call, arguments, said):
    assert said in " ".join(call(*arguments, code=2).stderr.replace("│", "").split())


def test_an_existing_file_is_kept_unless_forced(call, converted, tmp_path):
    before = (tmp_path / converted).read_bytes()
    call("convert", NAME, "toy", "-o", "stage=layer1", "--out", converted, code=2)
    call("prune", converted, "--out", converted, code=2)
    assert (tmp_path / converted).read_bytes() == before
    call("convert", NAME, "toy", "-o", "stage=layer1", "--out", converted, "--force")
    assert (tmp_path / converted).read_bytes() != before


def test_missing_and_damaged_files_exit_with_3(call, converted, tmp_path):
    (tmp_path / "bad.safetensors").write_bytes((tmp_path / converted).read_bytes()[:-10])
    (tmp_path / "bad.pt").write_bytes(b"not a state dict")
    assert "there is no such file" in call("prune", "no.safetensors", "--dry-run", code=3).stderr
    assert "bad.safetensors" in call("cost", "bad.safetensors", code=3).stderr
    assert "cannot be read as a state dict" in call("inspect", NAME, "--weights", "bad.pt", code=3).stderr
    assert "there is no folder" in call("convert", NAME, "toy", "--out", "no/x.safetensors", code=3).stderr


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_weights_that_cannot_be_downloaded_exit_with_3(call, monkeypatch, library):
    def offline(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    monkeypatch.setattr("timm.create_model", offline)
    result = call("inspect", f"{library}:resnet18", "--pretrained", code=3)
    assert f"{library}:resnet18: its pretrained weights could not be had (ConnectionError: no route)" in result.stderr


def test_pretrained_weights_go_into_a_network_with_other_classes(call, monkeypatch):
    weights = torch.nn.Module.state_dict(timm.create_model("resnet18"))
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: weights)
    call("convert", "torchvision:resnet18", "toy", "--pretrained", "--classes", 5, "--out", "new.safetensors")
    loaded = surgery.load("new.safetensors").state_dict()
    fresh = {key for key in weights if loaded[key].shape != weights[key].shape}
    assert fresh == {"fc.weight", "fc.bias"}
    assert all(torch.equal(weights[key], loaded[key]) for key in weights if key not in fresh)


def test_debug_shows_the_traceback(tmp_path):
    result = CliRunner().invoke(app, ["--debug", "prune", str(tmp_path / "no.safetensors"), "--dry-run"])
    assert result.exit_code == 3
    assert "Traceback" in result.stderr


def test_the_program_itself_runs():
    command = [sys.executable, "-m", "surgery.cli", "inspect", "no-such-network"]
    environment = {**os.environ, "COLUMNS": "200"}
    found = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert found.returncode == 2
    assert "neither a file nor a classifier" in found.stderr
    assert found.stdout == ""
