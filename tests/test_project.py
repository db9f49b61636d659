"""Laws about the project itself: what is public is documented, who imports whom, sizes, and text that is executed."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import pkgutil
import re
import sys
import tomllib
import types
from pathlib import Path

import pytest
import timm
import torch
import torchvision

import surgery
from surgery.plugins import HookSpecification
from surgery.testing import check_method, unsettle
from tests.toys import installed, package

ROOT = Path(__file__).parents[1]
CORE = sorted((ROOT / "surgery").rglob("*.py"))
PLUGINS = sorted((ROOT / "plugins").rglob("*.py"))
PACKAGES = sorted(path.parent.name for path in (ROOT / "plugins").glob("*/__init__.py"))
METHODS = [name.removeprefix("surgery_") for name in PACKAGES]
PLANNED = ["coded", "gated", "masked", "inclusive", "divided"]
ATTRIBUTES = re.compile(r"^Attributes:\n(?P<lines>(?: *\n|  +.*\n?)*)", re.MULTILINE)
LONGEST_FUNCTION, LONGEST_MODULE, WIDEST_LINE = 40, 400, 120


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def public_objects() -> dict[str, object]:
    """Return every public class and function of the core and the plugins, methods of classes among them, by name."""
    found: dict[str, object] = {}
    modules = [surgery, *(importlib.import_module(name) for name in PACKAGES)]
    for parent in list(modules):
        modules += [
            importlib.import_module(m.name) for m in pkgutil.walk_packages(parent.__path__, f"{parent.__name__}.")
        ]
    for module in modules:
        for name, value in vars(module).items():
            if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
                continue
            if inspect.isclass(value) or inspect.isfunction(value):
                found[f"{module.__name__}.{name}"] = value
            if inspect.isclass(value):
                for key, member in vars(value).items():
                    if not key.startswith("_") and inspect.isfunction(
                        inspect.unwrap(getattr(member, "fget", None) or member)
                    ):
                        found[f"{module.__name__}.{name}.{key}"] = member
    return found


def own_docstring(value: object) -> str:
    """Return the docstring that was written for an object; a dataclass without one has its signature there."""
    text = getattr(value, "__doc__", None) or ""
    return "" if inspect.isclass(value) and text.startswith(f"{value.__name__}(") else text


# --- what is public ---


def test_all_equals_the_exports():
    """`surgery.__all__` names what `__init__` imports, sorted by nothing but itself, and every name is there."""
    tree = tree_of(ROOT / "surgery" / "__init__.py")
    imported = {
        alias.asname or alias.name.partition(".")[0]
        for node in tree.body
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    exported = getattr(surgery, "__all__", None) or sorted(imported - {"surgery"})
    assert len(set(exported)) == len(exported)
    assert set(exported) == {name for name in imported - {"surgery"} if not name.startswith("_")}
    assert all(hasattr(surgery, name) for name in exported)


def test_the_calls_of_the_design_are_public():
    wanted = {
        *(
            "inspect",
            "convert",
            "Objective",
            "param_groups",
            "record",
            "plan",
            "prune",
            "recalibrate_bn",
            "cost",
            "save",
        ),
        *("load", "methods", "hookimpl", "Method"),
    }
    assert wanted <= set(dir(surgery))


def test_every_public_name_has_a_docstring_in_google_style():
    """The first line is one sentence; sections are Google's; every argument that is described exists."""
    problems = []
    for name, value in public_objects().items():
        text = own_docstring(value)
        if not text:
            problems.append(f"{name}: no docstring")
            continue
        first = text.strip().splitlines()[0]
        if not first.endswith((".", ":", "?", "!")):
            problems.append(f"{name}: the first line is no sentence: {first!r}")
        if re.search(r"^\s*(:param|:return|Parameters\n\s*-{3,})", text, re.MULTILINE):
            problems.append(f"{name}: not in Google style")
        problems += [
            f"{name}: describes {argument!r}, which is no parameter" for argument in unknown_arguments(value, text)
        ]
    assert not problems, "\n".join(problems)


def unknown_arguments(value: object, text: str) -> list[str]:
    section = re.search(r"^ *Args:\n(?P<lines>(?: *\n|  +.*\n?)*)", inspect.cleandoc(text), re.MULTILINE)
    if section is None:
        return []
    described = re.findall(r"^    (\**\w+)(?: \([^)]*\))?:", section["lines"].partition("\n\n")[0], re.MULTILINE)
    call = value.__init__ if inspect.isclass(value) else inspect.unwrap(value)  # type: ignore[misc]
    parameters = set(inspect.signature(call).parameters)
    return [argument for argument in described if argument.lstrip("*") not in parameters]


def test_dataclasses_describe_their_fields_and_no_others():
    problems = []
    for name, value in public_objects().items():
        if not inspect.isclass(value) or not dataclasses.is_dataclass(value):
            continue
        fields = {field.name for field in dataclasses.fields(value) if not field.name.startswith("_")}
        section = ATTRIBUTES.search(inspect.cleandoc(own_docstring(value)))
        described = set(re.findall(r"^    (\w+):", section["lines"], re.MULTILINE)) if section else set()
        known = {*fields, *vars(value), *(key for cls in value.__mro__ for key in vars(cls).get("__annotations__", {}))}
        own = fields & set(vars(value).get("__annotations__", {}))
        problems += [f"{name}: describes {field!r}, which is no field" for field in described - known]
        problems += [f"{name}: does not describe {field!r}" for field in own - described if section]
    assert not problems, "\n".join(problems)


def test_data_of_the_public_interface_is_frozen():
    data = [value for value in vars(surgery).values() if inspect.isclass(value) and dataclasses.is_dataclass(value)]
    data += surgery.methods().values()
    assert [value.__name__ for value in data if not value.__dataclass_params__.frozen] == []


def test_every_hook_is_documented_with_its_arguments():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    hooks = {name: value for name, value in vars(HookSpecification).items() if not name.startswith("_")}
    assert hooks
    for name, hook in hooks.items():
        arguments = [argument for argument in inspect.signature(hook).parameters if argument != "self"]
        assert own_docstring(hook), name
        assert re.search(rf"def {name}\({', *'.join(arguments)}\)", readme), (
            f"README shows no {name}({', '.join(arguments)})"
        )


def test_errors_are_children_of_one_and_say_when_they_are_raised():
    from surgery import errors

    for name, value in vars(errors).items():
        if inspect.isclass(value) and issubclass(value, Exception) and value is not errors.SurgeryError:
            assert issubclass(value, errors.SurgeryError), name
            assert own_docstring(value), name


# --- who knows whom ---


@pytest.mark.parametrize("path", CORE, ids=named)
def test_core_contains_no_name_of_a_method(path):
    """Neither as a word of code or text, nor as a part of an identifier; within a word, as in `encoded`, it may be."""
    names = sorted({*METHODS, *PLANNED})
    text = path.read_text(encoding="utf-8")
    found = re.findall(rf"(?<![a-z])(?:{'|'.join(names)})(?![a-z])", text, re.IGNORECASE)
    assert not found, f"{named(path)} contains {sorted(set(found))}"


def imports(path: Path) -> set[str]:
    """Return the top-level packages that a file imports, absolutely, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{named(path)} imports relatively"
            found.add((node.module or "").partition(".")[0])
    return found


@pytest.mark.parametrize("path", CORE, ids=named)
def test_core_imports_no_plugin_and_only_what_it_declares(path):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {re.split(r"[<>=;\[ ]", line)[0].replace("-", "_").lower() for line in project["dependencies"]}
    optional = {
        re.split(r"[<>=;\[ ]", line)[0].replace("-", "_").lower()
        for lines in project["optional-dependencies"].values()
        for line in lines
    }
    outside = imports(path) - set(sys.stdlib_module_names) - {"surgery"}
    assert outside <= declared | optional, f"{named(path)} imports {outside - declared - optional}"
    at_the_top = {
        name
        for node in tree_of(path).body
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in ([a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""])
    }
    missing = {name.partition(".")[0] for name in at_the_top} - set(sys.stdlib_module_names) - {"surgery"} - declared
    assert not missing, f"{named(path)} needs {missing} as soon as it is imported; it is not a dependency of the core"


@pytest.mark.parametrize("path", PLUGINS, ids=named)
def test_plugins_import_the_core_what_it_stands_on_and_themselves(path):
    own = path.relative_to(ROOT / "plugins").parts[0]
    allowed = set(sys.stdlib_module_names) | {"surgery", "torch", "torchvision", "timm", "numpy", "scipy", own}
    drawing = {"matplotlib"}  # an extra: only where a figure is drawn
    assert imports(path) <= allowed | drawing, f"{named(path)} imports {imports(path) - allowed - drawing}"
    for node in tree_of(path).body:
        text = ast.unparse(node) if isinstance(node, (ast.Import, ast.ImportFrom)) else ""
        assert "matplotlib" not in text, f"{named(path)} needs matplotlib as soon as it is imported"


def test_every_plugin_is_one_folder_one_entry_point_and_one_folder_of_tests():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["entry-points"]["surgery"] == {name.removeprefix("surgery_"): name for name in PACKAGES}
    for name in METHODS:
        assert list((ROOT / "tests" / "plugins" / name).glob("test_*.py")), f"{name} has no tests"
        assert (ROOT / "plugins" / f"surgery_{name}" / "README.md").is_file(), f"{name} has no card"
    assert set(METHODS) <= set(surgery.methods())


# --- size and form ---


@pytest.mark.parametrize("path", [*CORE, *PLUGINS], ids=named)
def test_modules_and_functions_are_short_and_annotated(path):
    text = path.read_text(encoding="utf-8")
    problems = []
    if len(text.splitlines()) > LONGEST_MODULE:
        problems.append(f"{len(text.splitlines())} lines, at most {LONGEST_MODULE}")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            problems += about_function(node)
    assert not problems, f"{named(path)}: " + "; ".join(problems)


def about_function(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    lines = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
    bare = [a.arg for a in arguments if a is not None and a.annotation is None and a.arg not in ("self", "cls")]
    problems = [f"{node.name} has {lines} lines, at most {LONGEST_FUNCTION}"] if lines > LONGEST_FUNCTION else []
    problems += [f"{node.name} does not annotate {', '.join(bare)}"] if bare else []
    return problems + ([f"{node.name} does not annotate what it returns"] if node.returns is None else [])


FOREIGN = (
    r"(?<![\w.}])/(?:work|root|home|tmp)/",  # folders of one machine
    r"\.\./[s]hared",
    r"\b(?:design|style|peers|definitions)\.md\b",  # pages that are not part of the project
    r"\b(?:TO[D]O|FI[X]ME|XX[X])\b",
)


def tracked() -> list[Path]:
    """Return the files of the project: what is written by hand, in any folder that holds some."""
    folders = ["surgery", "plugins", "examples", "benchmarks", "tests"]
    kinds = {".py", ".md", ".toml", ".txt", ".yaml"}
    inside = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in kinds]
    beside = [path for path in ROOT.iterdir() if (path.is_file() and path.suffix in kinds) or path.name == "Makefile"]
    return sorted(path for path in [*inside, *beside] if "__pycache__" not in path.parts)


@pytest.mark.parametrize("path", tracked(), ids=named)
def test_files_speak_of_the_project_alone(path):
    text = path.read_text(encoding="utf-8")
    assert [found for pattern in FOREIGN for found in re.findall(pattern, text)] == []


# --- text that is executed ---


def blocks(path: Path, language: str = "python") -> list[str]:
    """Return the code blocks of a page, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def pages() -> list[Path]:
    return [path for path in [ROOT / "README.md", *sorted((ROOT / "plugins").glob("*/README.md"))] if blocks(path)]


@pytest.mark.parametrize("page", pages(), ids=named)
def test_code_of_the_pages_runs(page, tmp_path, monkeypatch, capsys):
    """All blocks of a page in one namespace, in order, with small images and without downloads."""
    monkeypatch.chdir(tmp_path)
    images, labels = torch.randn(2, 3, 64, 64), torch.tensor([340, 7])
    module = types.ModuleType("page")
    module.__dict__.update(loader=[(images, labels)], images=images, labels=labels)
    monkeypatch.setitem(sys.modules, "page", module)  # dataclasses look their module up by name
    for number, block in enumerate(blocks(page)):
        code = compile(block.replace('weights="DEFAULT"', "weights=None"), f"{named(page)}, block {number}", "exec")
        exec(code, module.__dict__)
        promised = re.findall(r"print\(.*\) +# (\d[\d,]+ of [\d,]+)$", block, re.MULTILINE)
        printed = capsys.readouterr().out
        for figures in promised:
            pruned, full = re.findall(r"[\d,]+", figures)
            assert f"{pruned} parameters" in printed
            assert full == f"{sum(p.numel() for p in torchvision.models.resnext50_32x4d().parameters()):,}"


def test_the_method_of_the_readme_keeps_the_laws(monkeypatch):
    """The page shows the example package, and says that the kit holds it to the laws: what it shows must pass them."""
    source = ROOT / "examples" / "third_party" / "surgery_scaled.py"
    (block,) = [block for block in blocks(ROOT / "README.md") if "hookimpl" in block and "(Method)" in block]
    assert block == source.read_text(encoding="utf-8"), f"README and {named(source)} differ"
    module = types.ModuleType("surgery_scaled")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look their module up by name
    exec(compile(block, source, "exec"), module.__dict__)
    installed(monkeypatch, package(*module.surgery_register_methods()))
    build = {"resnext11": lambda: unsettle(timm.create_model("resnext11_4x4d"))}
    report = check_method("scaled", build, criteria={"below": 2.0})
    assert "pruned_smaller" in report.held["resnext11"]


def test_readme_names_the_installed_methods():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in METHODS:
        assert re.search(rf"^\| `{name}` \|.*plugins/surgery_{name}/README\.md", readme, re.MULTILINE)


def test_method_cards_describe_every_option_with_its_default():
    for name in METHODS:
        method = surgery.methods()[name]
        card = ROOT / "plugins" / f"surgery_{name}" / "README.md"
        text = card.read_text(encoding="utf-8")
        for field in dataclasses.fields(method):
            row = re.search(rf"^\| `{field.name}` \| (.*?) \|", text, re.MULTILINE)
            assert row, f"{named(card)} does not describe {field.name!r}"
            if isinstance(field.default, (int, float)) and not isinstance(field.default, bool):
                assert row[1] == str(field.default), f"{named(card)}: {field.name} is {field.default}, not {row[1]}"


def test_changelog_begins_with_the_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## (\S+)", changelog, re.MULTILINE)[1] == project["version"]
