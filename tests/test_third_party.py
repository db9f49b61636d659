"""Packages of other authors, really installed: in environments that hold wheels of this project and of theirs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "third_party"
SHIPPED = sorted(path.name.removeprefix("surgery_") for path in (ROOT / "plugins").glob("surgery_*"))


@dataclass(frozen=True)
class Package:
    """A distribution `surgery-<name>` of one module that provides the method `<method>` under that entry point."""

    name: str
    method: str
    code: str
    reason: str = ""


def written(method: str, *, base: str = "Scaled", body: str = "", hook: str = "surgery_register_methods()") -> str:
    """Return the module of an author who builds on the example."""
    return f"""
from dataclasses import dataclass
from typing import ClassVar
import torch
from surgery import Method, hookimpl
from surgery_scaled import Scale, Scaled

@dataclass(frozen=True)
class Mine({base}):
    name: ClassVar[str] = "{method}"
{body}

@hookimpl
def {hook}:
    return [Mine]
"""


TAKES_NO_PART = """
    def transform(self, architecture, rewriter):
        for block in architecture.residual_blocks():
            scale = Scale()
            scale.idle = torch.nn.Parameter(torch.ones(()))
            rewriter.insert(scale, block.body, at=block, role="scale")
"""
DRAWN_WITHOUT_DECIDE = """
    def transform(self, architecture, rewriter):
        blocks = list(architecture.residual_blocks())
        block = blocks[torch.randint(len(blocks), ())]
        rewriter.insert(Scale(), block.body, at=block, role="scale")
"""
ISOLATED = (
    Package(
        "abstract", "abstract", written("abstract", base="Method"), "PluginError: Mine does not define losses, plan, tr"
    ),
    Package(
        "misarmed",
        "misarmed",
        written("misarmed", hook="surgery_register_methods(registry)"),
        "PluginValidationError: Plugin 'misarmed' for hook 'surgery_register_methods' hookimpl definition: "
        "surgery_register_methods(registry) Argument(s) {'registry'} are declared in the hookimpl but can not be found",
    ),
    Package("unimportable", "unimportable", "import quux\n", "ModuleNotFoundError: No module named 'quux'"),
)
LAWLESS = (
    Package("idle", "idle", written("idle", body=TAKES_NO_PART)),
    Package("undecided", "undecided", written("undecided", body=DRAWN_WITHOUT_DECIDE)),
)
TWIN = Package("twin", "scaled", written("scaled"))


@dataclass(frozen=True)
class Environment:
    """A virtual environment, and the folder in which its commands run."""

    folder: Path

    def run(self, program: str, *arguments: object, code: int = 0, environ: Mapping[str, str] | None = None):
        """Run a program of the environment, require its exit code, and return what it printed."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("SURGERY", "PYTHON", "PYTEST"))}
        command = [self.folder / "bin" / program, *(str(argument) for argument in arguments)]
        shown = {"COLUMNS": "200", "NO_COLOR": "1"}
        result = subprocess.run(
            command,
            env=kept | shown | (environ or {}),
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
            timeout=900,
        )
        assert result.returncode == code, f"{program} {arguments}:\n{result.stdout}\n{result.stderr}"
        return result


def pip(*arguments: object) -> None:
    command = [sys.executable, "-m", "pip", "--isolated", "--quiet", *(str(argument) for argument in arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    assert result.returncode == 0, result.stdout + result.stderr


def write_sources(package: Package, folder: Path) -> Path:
    """Write what an author of `package` would have in a repository."""
    module = f"surgery_{package.name}"
    folder.mkdir()
    (folder / f"{module}.py").write_text(package.code)
    (folder / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools>=77"]\nbuild-backend = "setuptools.build_meta"\n'
        f'[project]\nname = "surgery-{package.name}"\nversion = "0.7"\n'
        f'[project.entry-points.surgery]\n{package.method} = "{module}"\n'
        f'[tool.setuptools]\npy-modules = ["{module}"]\n'
    )
    return folder


@pytest.fixture(scope="module")
def wheels(tmp_path_factory) -> Path:
    """Build all wheels, from copies: a build leaves folders beside its sources."""
    folder = tmp_path_factory.mktemp("wheels")
    own = folder / "surgery"
    hidden = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", "dist")
    for name in ("surgery", "plugins"):
        shutil.copytree(ROOT / name, own / name, ignore=hidden)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, own)
    example = shutil.copytree(EXAMPLE, folder / "scaled", ignore=hidden)
    others = [write_sources(package, folder / package.name) for package in (*ISOLATED, *LAWLESS, TWIN)]
    pip("wheel", "--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, own, example, *others)
    return folder


@pytest.fixture
def environment(wheels, tmp_path) -> Callable[..., Environment]:
    """Return a function that makes an environment of this project, the example, and some of the others."""

    def make(*packages: Package) -> Environment:
        folder = tmp_path / "environment"
        venv.create(folder, symlinks=True)
        found = Environment(folder)
        names = ["surgery", "surgery_scaled", *(f"surgery_{package.name}" for package in packages)]
        chosen = [next(wheels.glob(f"{name}-*.whl")) for name in names]
        pip("--python", folder / "bin" / "python", "install", "--no-index", "--no-deps", *chosen)
        # Torch and the like come from here, behind what is installed there. A folder that a .pth file names does not
        # have its own .pth files read, and these are what makes the checkout importable.
        (site,) = folder.glob("lib/python*/site-packages")
        (site / "outside.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
        return found

    return make


def test_the_wheel_holds_every_file_that_the_packages_read(wheels):
    kinds = {".py", ".md", ".json", ".toml", ".typed"}
    folders = [ROOT / "surgery", *(ROOT / "plugins").glob("surgery_*")]
    expected = {
        path.relative_to(folder.parent).as_posix()
        for folder in folders
        for path in folder.rglob("*")
        if path.suffix in kinds and "__pycache__" not in path.parts
    }
    (wheel,) = wheels.glob("surgery-*.whl")
    found = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert found == expected
    assert {"surgery/py.typed", "surgery_gated/README.md", "surgery_coded/schemes/10-10-5-seed0.json"} <= found


def test_an_installed_method_is_listed_with_its_package_and_version(environment):
    clean = environment()
    text = clean.run("surgery", "methods", "--verbose").stdout
    listed = [line.split()[0] for line in text.partition("\n\n")[0].splitlines()[2:]]
    assert listed == sorted([*SHIPPED, "scaled"])
    assert "scaled, from surgery-scaled 0.2.0, entry point 'scaled': options, as -o NAME=VALUE" in text
    found = {method["name"]: method for method in json.loads(clean.run("surgery", "methods", "--json").stdout)}
    assert sorted(found) == listed
    assert (found["scaled"]["distribution"], found["scaled"]["version"]) == ("surgery-scaled", "0.2.0")
    assert found["scaled"]["options"] == [
        {
            "name": "weight",
            "type": "float",
            "default": "0.001",
            "help": "Weight of the factors' absolute values in the loss.",
        }
    ]


LOAD = """
import json, surgery, surgery_scaled, torch
model = surgery.load("scaled.safetensors")
(operation,) = model.meta["conversion"].operations
files = [surgery.__file__, surgery_scaled.__file__]
shape = list(model(torch.rand(1, 3, 64, 64)).shape)
print(json.dumps([files, shape, operation.method, operation.options, operation.distribution, operation.version]))
"""


def test_a_checkpoint_of_an_installed_method_lives_and_says_what_it_needs(environment):
    """Converted, shown, inspected, pruned and loaded; and refused by name once the package is gone."""
    clean = environment()
    convert = ("convert", "timm:resnext11_4x4d", "scaled", "-o", "weight=0.5", "--out", "scaled.safetensors")
    assert "scaled changed 3 of 3 blocks" in clean.run("surgery", *convert).stdout
    assert "scaled_scale" in clean.run("surgery", "show", "scaled.safetensors").stdout
    pruned = clean.run("surgery", "prune", "scaled.safetensors", "-c", "below=2.0", "--out", "small.safetensors")
    assert "body removed (factor below 2.0)" in pruned.stdout
    after = clean.run("surgery", "inspect", "small.safetensors").stdout
    assert "after convert scaled 0.2.0, then prune scaled 0.2.0" in after
    files, *found = json.loads(clean.run("python", "-c", LOAD).stdout)
    assert all(Path(file).is_relative_to(clean.folder) for file in files)
    assert found == [[1, 10], "scaled", {"weight": 0.5}, "surgery-scaled", "0.2.0"]
    pip("--python", clean.folder / "bin" / "python", "uninstall", "--yes", "surgery-scaled")
    refused = clean.run("surgery", "show", "scaled.safetensors", code=1)
    assert refused.stderr.startswith("error: ")
    assert f"no installed method is called 'scaled'; installed: {', '.join(SHIPPED)}" in refused.stderr
    assert refused.stderr.endswith("the file needs surgery-scaled 0.2.0: install it\n")


def test_the_test_of_the_example_passes_where_it_is_installed(environment):
    """On one network of each family, to save time: its author runs all of them."""
    clean = environment()
    tests = shutil.copytree(EXAMPLE / "tests", clean.folder / "tests")
    laws = [
        f"{tests}/test_scaled.py::test_scaled_keeps_the_laws[{network}]"
        for network in ("resnext", "timm mobilenetv2", "wide resnet")
    ]
    result = clean.run("python", "-P", "-m", "pytest", "-p", "no:cacheprovider", *laws)
    assert "3 passed" in result.stdout


def test_broken_packages_are_left_out_by_name_and_take_no_other_down(environment):
    result = environment(*ISOLATED).run("surgery", "methods")
    assert all(f"\n{name} " in result.stdout for name in [*SHIPPED, "scaled"])
    lines = result.stderr.splitlines()  # a warning for each, and what the list says of each
    assert len(lines) == 2 * len(ISOLATED)
    for package, warning in zip(ISOLATED, lines[: len(ISOLATED)], strict=True):
        assert warning.startswith(
            f"warning: the surgery plugin '{package.name}' of surgery-{package.name} 0.7 cannot be loaded and is "
            f"ignored ({package.reason}"
        )
        assert warning.endswith(f"; repair or uninstall it, or set SURGERY_BLOCK_PLUGINS={package.name}")


CHECK = """
import surgery
from surgery.testing import check_method
for name in ("idle", "undecided"):
    try:
        check_method(name)
    except surgery.SurgeryError as error:
        print(error)
"""


def test_methods_that_break_a_law_are_stopped_by_its_name(environment):
    """Run beside packages that cannot be loaded but are not asked for, so that nothing is said of them."""
    chosen = {"SURGERY_PLUGINS": "idle, surgery-undecided", "PYTHONWARNINGS": "error::UserWarning"}
    result = environment(*LAWLESS, *ISOLATED).run("python", "-c", CHECK, environ=chosen)
    idle, undecided = [line for line in result.stdout.splitlines() if not line.startswith("[Gloo]")]
    assert idle.startswith("gradients: idle on resnext: ['layer1.0.idle_scale.idle', ")
    assert undecided.startswith("replays: undecided on resnext: rebuilt with the random seed ")


def test_two_packages_with_one_method_are_an_error_that_names_both_until_one_is_blocked(environment):
    clean = environment(TWIN)
    refused = clean.run("surgery", "methods", code=1)
    assert refused.stdout == ""
    assert refused.stderr == (
        "error: the method 'scaled' is provided by surgery-scaled 0.2.0 and by surgery-twin 0.7; uninstall one of "
        "them, or block it with SURGERY_BLOCK_PLUGINS=surgery-twin\n"
    )
    text = clean.run("surgery", "methods", environ={"SURGERY_BLOCK_PLUGINS": "surgery-twin"}).stdout
    assert "surgery-scaled 0.2.0" in text
    assert "surgery-twin" not in text


def test_pages_name_the_version_of_the_example():
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for page in (ROOT / "README.md", EXAMPLE / "README.md"):
        assert f"scaled, from {project['name']} {project['version']}" in page.read_text(encoding="utf-8")
