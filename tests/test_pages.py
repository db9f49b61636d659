"""Commands on the pages: every block of every page is claimed by a check, and what can run here runs."""

from __future__ import annotations

import importlib
import inspect
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.run import get_args_parser
from typer.testing import CliRunner, Result

import surgery
import surgery_divided
from surgery.cli import app
from surgery.testing import tiny_networks
from tests import test_project
from tests.toys import installed, package

ROOT = Path(__file__).parents[1]
THIRD_PARTY = ROOT / "examples" / "third_party"
FENCE = re.compile(r"^( *)```([^\n`]*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
SCRIPT = re.compile(r"`python ((?:examples|benchmarks)/[^`]*)`")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        page: The page.
        language: What is written behind the fence.
        text: The lines between the fences.
    """

    page: Path
    language: str
    text: str

    @property
    def commands(self) -> list[tuple[list[str], str]]:
        """The words and the comment of every line of shell commands."""
        lines = [line for line in self.text.splitlines() if line.strip()]
        return [(shlex.split(line, comments=True), line.partition(" # ")[2].strip()) for line in lines]


def pages() -> list[Path]:
    found = [ROOT / "README.md", *ROOT.glob("plugins/*/README.md"), *ROOT.glob("examples/**/*.md")]
    return sorted({*found, *ROOT.glob("benchmarks/**/*.md")})


def blocks(page: Path) -> list[Block]:
    return [Block(page, language, text) for _, language, text in FENCE.findall(page.read_text(encoding="utf-8"))]


ALL = [block for page in pages() for block in blocks(page)]


def named(value: Path | Block) -> str:
    path = value.page if isinstance(value, Block) else value
    return str(path.relative_to(ROOT))


# --- who checks what ---


def is_python(block: Block) -> bool:
    return block.language == "python" and block.page in test_project.pages()


def is_entry_point(block: Block) -> bool:
    return block.language == "toml" and "entry-points" in tomllib.loads(block.text).get("project", {})


def is_torchrun(block: Block) -> bool:
    return block.language == "text" and block.text.startswith("# torchrun ") and block.page.parent.name in TORCHRUN


def is_shell(block: Block) -> bool:
    return block.language == "" and all(words and words[0] in PROGRAMS for words, _ in block.commands)


CLAIMS = (is_python, is_entry_point, is_torchrun, is_shell)


def test_every_block_of_every_page_is_claimed_by_one_check():
    for block in ALL:
        claims = [claim.__name__ for claim in CLAIMS if claim(block)]
        assert len(claims) == 1, f"{named(block)}: {claims} check this block:\n{block.text}"


@pytest.mark.parametrize("page", pages(), ids=named)
def test_every_fence_of_a_page_is_seen(page):
    """Two fences a block, all of one form: no block can hide from the checks behind tildes or a missing end."""
    text = page.read_text(encoding="utf-8")
    assert len(re.findall(r"^\s*(?:```|~~~)", text, re.MULTILINE)) == 2 * len(blocks(page))
    assert "~~~" not in text


@pytest.mark.parametrize("language", ["", "bash", "python", "toml", "text", "yaml"])
def test_block_that_nothing_executes_is_not_claimed(language):
    block = Block(ROOT / "benchmarks" / "README.md", language, "[tool.other]\nname = 3\n")
    assert not any(claim(block) for claim in CLAIMS)


# --- shell ---


@dataclass(frozen=True)
class Line:
    """A command on a page."""

    page: Path
    words: list[str]
    comment: str

    @property
    def arguments(self) -> list[str]:
        return self.words[1:]

    def place(self, path: str) -> Path:
        """Return a path as the reader of the page sees it: beside the page."""
        return self.page.parent / path


def run_surgery(line: Line) -> None:
    """Run the program; what it writes is there then, and what the comment says of packages is printed."""
    result: Result = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"}).invoke(app, line.arguments)
    assert result.exit_code == 0, f"{named(line.page)}: {shlex.join(line.words)} ends with {result.output}"
    if "--out" in line.words:
        assert Path(line.words[line.words.index("--out") + 1]).stat().st_size
    for name, distribution in re.findall(r"^(\w+), from ([\w-]+ [\d.]+)$", line.comment):
        assert name in result.output
        assert distribution in " ".join(result.output.split())


def check_make(line: Line) -> None:
    targets = re.findall(r"^([a-z]+):.*##", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(line.arguments) <= set(targets), f"{named(line.page)}: make has {targets}"


def check_pip(line: Line) -> None:
    """The folder holds a package, and that has the extras; a second form may stand in the comment."""
    also = re.findall(r"pip install ([^,;]*)", line.comment)
    for words in (line.arguments, *(["install", *shlex.split(more)] for more in also)):
        assert words[0] == "install"
        (wanted,) = [word for word in words[1:] if word != "--editable"]
        folder, _, extras = wanted.rstrip("]").partition("[")
        project = tomllib.loads((line.place(folder) / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        named_extras = {extra for extra in extras.split(",") if extra}
        assert named_extras <= set(project.get("optional-dependencies", {})), f"{named(line.page)}: {wanted}"


def check_pytest(line: Line) -> None:
    for folder in line.arguments:
        assert list(line.place(folder).glob("test_*.py")), f"{named(line.page)}: {folder} holds no tests"


def check_python(line: Line) -> None:
    check_script(line.arguments)


def check_torchrun(line: Line) -> None:
    options = get_args_parser().parse_args(line.arguments)
    check_script([options.training_script, *options.training_script_args])


PROGRAMS: Mapping[str, Callable[[Line], None]] = {
    "surgery": run_surgery,
    "make": check_make,
    "pip": check_pip,
    "pytest": check_pytest,
    "python": check_python,
    "torchrun": check_torchrun,
}


def with_shell() -> list[Path]:
    return sorted({block.page for block in ALL if is_shell(block)})


@pytest.fixture
def _third_party(monkeypatch: pytest.MonkeyPatch) -> None:
    """The example package, as if the `pip install` of the page had run, and the examples, as Python lets a script."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.syspath_prepend(str(THIRD_PARTY))
    module = importlib.import_module("surgery_scaled")
    project = tomllib.loads((THIRD_PARTY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    ours = package(*module.surgery_register_methods(), distribution=project["name"], version=project["version"])
    installed(monkeypatch, ours)


@pytest.mark.slow
@pytest.mark.usefixtures("_third_party")
@pytest.mark.parametrize("page", with_shell(), ids=named)
def test_commands_of_a_page_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for block in blocks(page):
        if is_shell(block):
            for words, comment in block.commands:
                PROGRAMS[words[0]](Line(page, words, comment))


def test_program_of_the_pages_is_the_one_that_is_installed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["scripts"] == {"surgery": "surgery.cli:main"}
    assert "app(" in inspect.getsource(importlib.import_module("surgery.cli").main)


# --- scripts named in the text, and in their own first lines ---


def scripts() -> Iterator[tuple[str, list[str]]]:
    """Yield where a script of the project is called, and the words of the call."""
    for page in pages():
        for call in SCRIPT.findall(page.read_text(encoding="utf-8")):
            yield named(page), shlex.split(call)
    for path in sorted(ROOT.glob("examples/*.py")):
        for call in re.findall(r"^    python (.*)$", path.read_text(encoding="utf-8").split('"""')[1], re.MULTILINE):
            yield named(path), shlex.split(call, comments=True)


def check_script(words: list[str]) -> None:
    """The script is there, takes the arguments, and the recipe that they name can be read."""
    path = ROOT / words[0]
    assert path.is_file(), f"{words[0]} does not exist"
    if path.parent.name == "examples":
        options = importlib.import_module(path.stem)._parse(words[1:])
        recipe = ROOT / options.recipe
        assert importlib.import_module("recipe").Recipe.from_toml(recipe), recipe


def test_scripts_that_are_named_exist_and_take_these_arguments(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    found = list(scripts())
    assert {words[0] for _, words in found} >= {f"examples/{name}.py" for name in test_project.METHODS}
    for _, words in found:
        check_script(words)


# --- TOML ---


def test_entry_point_of_the_page_is_the_one_of_the_example_package():
    project = tomllib.loads((THIRD_PARTY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (block,) = [block for block in ALL if is_entry_point(block)]
    assert tomllib.loads(block.text) == {"project": {"entry-points": project["entry-points"]}}


# --- two processes ---


def run_distributed(block: Block, folder: Path) -> None:
    """Run the block in two processes of one group, each of which ends up with the whole network."""
    torch.multiprocessing.spawn(_member, (block.text, str(folder)), nprocs=2)


def _member(rank: int, code: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    try:
        divided = surgery.convert(tiny_networks()["resnext"](), "divided")
        names = {"surgery_divided": surgery_divided, "divided": divided}
        exec(code, names)
        expected, found = divided.state_dict(), names["whole"].state_dict()
        assert found.keys() == expected.keys()
        owned = [name for name in expected if name.startswith(f"members.{rank}.")]
        assert owned
        assert all(torch.equal(found[name], expected[name]) for name in owned)
        surgery.save(names["whole"], f"{folder}/{rank}.safetensors", factory=tiny_networks()["resnext"])
    finally:
        dist.destroy_process_group()


TORCHRUN = {"surgery_divided": run_distributed}


@pytest.mark.parametrize("block", [block for block in ALL if is_torchrun(block)], ids=named)
def test_code_for_several_processes_runs_in_two(block, tmp_path):
    TORCHRUN[block.page.parent.name](block, tmp_path)
    assert (tmp_path / "0.safetensors").read_bytes()
    assert (tmp_path / "1.safetensors").read_bytes()
