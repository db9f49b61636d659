"""Discovery: what is found, what a broken package does to the others, and what two packages of one name do."""

from __future__ import annotations

import types
from dataclasses import dataclass
from importlib import metadata
from typing import ClassVar

import pytest

import surgery
import surgery.testing
import surgery_coded
from surgery import plugins
from surgery.cli_report import describe_method, print_methods
from surgery.errors import PluginError
from surgery.plugins import Provider, hookimpl
from tests.toys import Toy, installed, package, point


@dataclass(frozen=True)
class Other(Toy):
    name: ClassVar[str] = "another"


SHIPPED = sorted(point.name for point in metadata.entry_points(group="surgery"))


def module(**functions) -> types.SimpleNamespace:
    return types.SimpleNamespace(**functions)


def broken(monkeypatch, load, reason: str) -> None:
    """Require that the plugin is left out with a warning that names it, and that the others work."""
    installed(monkeypatch, point(load, name="ruin", distribution="surgery-ruin", version="0.3"), package(Toy))
    expected = (
        rf"the surgery plugin 'ruin' of surgery-ruin 0\.3 cannot be loaded and is ignored \({reason}[\s\S]*"
        r"set SURGERY_BLOCK_PLUGINS=ruin$"
    )
    with pytest.warns(UserWarning, match=expected):
        found = surgery.methods()
    assert list(found) == sorted([*SHIPPED, "toy"])
    (provider,) = [provider for provider in plugins.providers() if provider.error]
    assert (provider.method, provider.entry_point, provider.distribution, provider.version) == (
        None,
        "ruin",
        "surgery-ruin",
        "0.3",
    )
    assert surgery.methods() == found  # once loaded, it warns no more


def test_installed_methods_are_found_through_the_entry_points_of_their_distribution():
    assert surgery.methods()["coded"] is surgery_coded.Coded
    provider = plugins.provider_of(surgery_coded.Coded)
    assert provider == Provider(surgery_coded.Coded, "coded", "surgery", metadata.version("surgery"))


def test_methods_are_sorted_and_cannot_be_changed(monkeypatch):
    installed(monkeypatch, package(Toy, Other), beside=False)
    assert list(surgery.methods()) == ["another", "toy"]
    with pytest.raises(TypeError):
        surgery.methods()["toy"] = Other  # type: ignore[index]


def test_class_of_a_script_belongs_to_no_distribution(monkeypatch):
    installed(monkeypatch, package(Toy))
    assert plugins.provider_of(Other) == Provider(Other, "", "", "")


def test_plugin_that_fails_to_import_is_left_out(monkeypatch):
    def load():
        raise ImportError("no module named quux")

    broken(monkeypatch, load, "ImportError: no module named quux")


def test_plugin_that_ends_the_process_is_left_out(monkeypatch):
    def load():
        raise SystemExit("no licence")

    broken(monkeypatch, load, "SystemExit: no licence")


def test_reason_of_several_lines_is_told_on_one(monkeypatch):
    def load():
        raise RuntimeError("first\n  second")

    broken(monkeypatch, load, r"RuntimeError: first second\)")


def test_plugin_that_exits_while_it_is_asked_is_left_out(monkeypatch):
    @hookimpl
    def surgery_register_methods():
        return 1 / 0

    broken(monkeypatch, lambda: module(surgery_register_methods=surgery_register_methods), "ZeroDivisionError")


def test_misspelt_hook_is_named(monkeypatch):
    @hookimpl
    def surgery_register_method():
        return [Toy]

    plugin = module(surgery_register_method=surgery_register_method)
    broken(monkeypatch, lambda: plugin, r"PluginValidationError: unknown hook 'surgery_register_method'")


def test_hook_with_a_wrong_argument_is_named(monkeypatch):
    @hookimpl
    def surgery_register_methods(registry):
        return [Toy]

    plugin = module(surgery_register_methods=surgery_register_methods)
    broken(monkeypatch, lambda: plugin, r"PluginValidationError: Plugin 'ruin' for hook 'surgery_register_methods'")


def test_hook_without_the_marker_is_missing(monkeypatch):
    plugin = module(surgery_register_methods=lambda: [Toy])
    broken(monkeypatch, lambda: plugin, r"PluginError: it does not implement the hook surgery_register_methods\(\)")


@pytest.mark.parametrize("found", [Toy(), int, "toy", None])
def test_what_is_no_method_class_is_refused(monkeypatch, found):
    broken(monkeypatch, package(found).load, r"PluginError: surgery_register_methods\(\) returned ")


def test_hook_that_returns_no_list_is_left_out(monkeypatch):
    @hookimpl
    def surgery_register_methods():
        return Toy

    broken(monkeypatch, lambda: module(surgery_register_methods=surgery_register_methods), "TypeError")


def test_abstract_method_is_refused_with_what_is_missing(monkeypatch):
    class Half(surgery.Method):
        name: ClassVar[str] = "half"
        preserves: ClassVar[str] = "output"

        def transform(self, architecture, rewriter):
            return None

    broken(monkeypatch, package(Half).load, "PluginError: Half does not define losses, plan")


def test_plugin_that_raises_what_is_no_exception_is_left_out(monkeypatch):
    """As `pytest.skip` does in a package that calls it."""

    class Outcome(BaseException):
        pass

    def load():
        raise Outcome("no GPU")

    broken(monkeypatch, load, "Outcome: no GPU")


def test_what_a_plugin_prints_is_no_output_of_a_command(monkeypatch, capsys):
    real = package(Toy)

    def load():
        print("hello")
        return real.load()

    installed(monkeypatch, point(load), beside=False)
    assert list(surgery.methods()) == ["toy"]
    assert capsys.readouterr() == ("", "hello\n")


@pytest.mark.parametrize("name", ["", "a,b", "x{y=1}", "x\ny"])
def test_name_that_no_command_line_could_hold_is_refused(monkeypatch, name):
    broken(monkeypatch, package(type("Odd", (Toy,), {"name": name})).load, "PluginError: Odd has the name ")


def test_two_methods_of_one_name_in_one_package_are_its_own_mistake(monkeypatch):
    broken(monkeypatch, package(Other, type("Twin", (Other,), {})).load, "PluginError: it provides two methods of the ")


def test_advice_names_the_distribution_where_the_entry_point_is_not_the_only_one_of_its_name(monkeypatch):
    def load():
        raise ImportError("quux")

    installed(monkeypatch, point(load, name="my-s", distribution="ruin"), package(Toy, name="my_s"))
    with pytest.warns(UserWarning, match=r"set SURGERY_BLOCK_PLUGINS=ruin$"):
        surgery.methods()


def test_method_without_a_name_is_refused(monkeypatch):
    class Nameless(surgery.Method):
        preserves: ClassVar[str] = "output"
        transform = losses = plan = Toy.plan

    broken(monkeypatch, package(Nameless).load, "PluginError: Nameless has no class attribute 'name'")


def test_unknown_claim_is_refused_with_the_known_ones(monkeypatch):
    class Boastful(Toy):
        preserves: ClassVar[str] = "everything"

    broken(
        monkeypatch,
        package(Boastful).load,
        "PluginError: Boastful preserves 'everything', expected one of output, weights, nothing",
    )


def test_options_that_would_be_lost_are_refused(monkeypatch):
    """Without the decorator, `rate` is a plain attribute: nobody could set it, and no record would hold it."""

    class Undecorated(Toy):
        rate: float = 0.5

    broken(
        monkeypatch,
        package(Undecorated).load,
        r"PluginError: the options rate of Undecorated need @dataclass\(frozen=True\) on the class",
    )


def test_two_packages_of_one_name_are_an_error_that_names_both(monkeypatch):
    class Second(Toy):
        pass

    first = package(Toy, name="a", distribution="first-toys", version="1.0")
    second = package(Second, name="b", distribution="second-toys", version="2.5")
    installed(monkeypatch, second, first)
    expected = (
        r"the method 'toy' is provided by first-toys 1\.0 and by second-toys 2\.5; uninstall one of them, or block it "
        r"with SURGERY_BLOCK_PLUGINS=b"
    )
    with pytest.raises(PluginError, match=expected):
        surgery.methods()


def test_clash_of_equal_entry_points_is_resolved_by_the_name_of_a_distribution(monkeypatch):
    """Blocking the entry point would block both."""

    class Second(Toy):
        pass

    first, second = (package(cls, name="toy", distribution=name) for cls, name in ((Toy, "first"), (Second, "second")))
    installed(monkeypatch, first, second)
    with pytest.raises(PluginError, match=r"SURGERY_BLOCK_PLUGINS=second$"):
        surgery.methods()
    monkeypatch.setenv("SURGERY_BLOCK_PLUGINS", "second")
    installed(monkeypatch, first, second)
    assert surgery.methods()["toy"] is Toy


def test_blocking_one_of_two_resolves_the_clash(monkeypatch):
    class Second(Toy):
        pass

    first, second = package(Toy, name="a"), package(Second, name="b")
    monkeypatch.setenv("SURGERY_BLOCK_PLUGINS", "b")
    installed(monkeypatch, first, second)
    assert surgery.methods()["toy"] is Toy
    monkeypatch.setenv("SURGERY_BLOCK_PLUGINS", "a")
    installed(monkeypatch, first, second)
    assert surgery.methods()["toy"] is Second


@pytest.mark.parametrize(
    ("only", "blocked", "found"),
    [
        (None, None, sorted([*SHIPPED, "another", "toy"])),
        ("coded", None, ["coded"]),
        (" coded , toys", None, ["coded", "toy"]),
        ("", None, []),
        (None, "coded,others", sorted({*SHIPPED, "toy"} - {"coded"})),
        ("coded,toys", "coded", ["toy"]),
        ("surgery", None, SHIPPED),
        (None, "Surgery_Toys", SHIPPED),
        ("surgery-toys", "others", ["toy"]),
    ],
)
def test_environment_variables_choose_what_is_loaded(monkeypatch, only, blocked, found):
    for name, value in (("SURGERY_PLUGINS", only), ("SURGERY_BLOCK_PLUGINS", blocked)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    installed(monkeypatch, package(Toy, name="toys"), package(Other, name="others"))
    assert list(surgery.methods()) == found


def test_blocked_plugin_is_not_even_imported(monkeypatch):
    def load():
        raise AssertionError("imported")

    monkeypatch.setenv("SURGERY_BLOCK_PLUGINS", "ruin")
    installed(monkeypatch, point(load, name="ruin"))
    assert list(surgery.methods()) == SHIPPED


def test_plugins_are_loaded_once(monkeypatch):
    loads = []
    real = package(Toy)

    def load():
        loads.append(1)
        return real.load()

    installed(monkeypatch, point(load))
    for _ in range(3):
        surgery.methods()
    assert loads == [1]


def test_listing_says_where_a_method_comes_from_and_what_it_lacks(monkeypatch, capsys):
    """Its own docstring, not that of `Method`; no options, not an empty table."""

    class Bare(surgery.Method):
        name: ClassVar[str] = "bare"
        preserves: ClassVar[str] = "output"
        transform = losses = plan = Toy.plan

    installed(monkeypatch, package(Bare, version="1.5"), beside=False)
    (found,) = [describe_method(provider) for provider in plugins.providers()]
    assert (found["summary"], found["options"]) == ("", [])
    print_methods([found], verbose=True)
    assert capsys.readouterr().out.endswith("\n\nbare, from surgery-toys 1.5, entry point 'toys': no options\n")


def test_unknown_method_lists_the_installed_ones(monkeypatch):
    installed(monkeypatch, package(Toy))
    known = ", ".join(sorted([*SHIPPED, "toy"]))
    with pytest.raises(PluginError, match=f"no installed method is called 'coed'; installed: {known}"):
        surgery.convert(surgery.testing.plain_chain(), "coed")
