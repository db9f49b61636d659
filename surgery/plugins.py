"""Find the methods that installed packages provide.

A package announces itself with an entry point in the group `surgery` whose value is a module (or object) that
implements the one hook:

    [project.entry-points.surgery]
    mine = "my_package"

    @surgery.hookimpl
    def surgery_register_methods():
        return [Mine]
"""

from __future__ import annotations

import inspect
import os
import re
import sys
import warnings
from collections import Counter
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType
from typing import get_args

import pluggy

from surgery.errors import PluginError
from surgery.method import Method, Preserves

GROUP = "surgery"
hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)


class HookSpecification:
    """The whole extension surface."""

    @hookspec
    def surgery_register_methods(self) -> list[type[Method]]:  # type: ignore[empty-body]
        """Return the `Method` subclasses that this package provides."""


@dataclass(frozen=True)
class Provider:
    """Where a method comes from.

    Attributes:
        method: The class, or None where the package failed to load.
        entry_point: Name of the entry point.
        distribution: Name of the installed distribution.
        version: Its version.
        error: Why it could not be loaded, or "".
    """

    method: type[Method] | None
    entry_point: str
    distribution: str
    version: str
    error: str = ""


def methods() -> Mapping[str, type[Method]]:
    """Return the installed methods by name, sorted.

    A plugin that cannot be loaded is left out with a warning that names its distribution.

    Raises:
        PluginError: If two distributions provide a method of the same name.
    """
    found: dict[str, Provider] = {}
    for provider in providers():
        if provider.method is None:
            continue
        name = provider.method.name
        if name in found:
            raise PluginError(_clash(name, found[name], provider))
        found[name] = provider
    known = {name: provider.method for name, provider in sorted(found.items())}
    return MappingProxyType({name: method for name, method in known.items() if method is not None})


def _clash(name: str, first: Provider, second: Provider) -> str:
    block = _alone(second.entry_point, second.distribution)
    return (
        f"the method {name!r} is provided by {first.distribution} {first.version} and by {second.distribution} "
        f"{second.version}; uninstall one of them, or block it with SURGERY_BLOCK_PLUGINS={block}"
    )


def _alone(entry_point: str, distribution: str) -> str:
    """Return the name that blocks one plugin and no other: packages often choose the same one for an entry point."""
    same = [point for point in entry_points(group=GROUP) if _normalized(point.name) == _normalized(entry_point)]
    return entry_point if len(same) < 2 else distribution


def provider_of(method: type[Method]) -> Provider:
    """Return the distribution that provides `method`; a class defined in a script belongs to none."""
    for provider in providers():
        if provider.method is method:
            return provider
    return Provider(method, "", "", "")


@cache
def providers() -> tuple[Provider, ...]:
    """Load every plugin once and return what each provides, sorted by entry point.

    The environment variable SURGERY_BLOCK_PLUGINS holds names of entry points or distributions, separated by commas,
    that are not loaded; SURGERY_PLUGINS, if set, holds the only ones that are.
    """
    found: list[Provider] = []
    for point in sorted(entry_points(group=GROUP), key=lambda point: (point.name, point.value)):
        if _allowed(point):
            found += _load(point)
    return tuple(found)


def _allowed(point: EntryPoint) -> bool:
    called = {_normalized(point.name), _normalized(_origin(point)[0])}
    only = _names("SURGERY_PLUGINS")
    return not called & (_names("SURGERY_BLOCK_PLUGINS") or set()) and (only is None or bool(called & only))


def _names(variable: str) -> set[str] | None:
    value = os.environ.get(variable)
    return None if value is None else {_normalized(name) for name in value.split(",") if name.strip()}


def _normalized(name: str) -> str:
    """Return a name as package indexes compare it: `Surgery_Scaled` is `surgery-scaled`."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def _origin(point: EntryPoint) -> tuple[str, str]:
    """Return distribution and version, as far as its metadata say."""
    unknown = "(unknown distribution)", ""
    try:
        return (point.dist.name or unknown[0], point.dist.version or "") if point.dist else unknown
    except KeyError:  # newer Pythons, where others have None
        return unknown


def _load(point: EntryPoint) -> list[Provider]:
    distribution, version = _origin(point)
    try:
        with redirect_stdout(sys.stderr):  # what a plugin prints is no part of what a command prints
            classes = _registered(point)
        for cls in classes:
            _check(cls)
        twice = [name for name, count in Counter(cls.name for cls in classes).items() if count > 1]
        if twice:
            raise PluginError(f"it provides two methods of the name {twice[0]!r}")
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a plugin can fail in any way, and must not take the others down
        reason = " ".join(f"{type(error).__name__}: {error}".split())  # on one line
        warnings.warn(
            f"the surgery plugin {point.name!r} of {distribution} {version} cannot be loaded and is ignored "
            f"({reason}); repair or uninstall it, or set SURGERY_BLOCK_PLUGINS="
            f"{_alone(point.name, distribution)}",
            stacklevel=2,
        )
        return [Provider(None, point.name, distribution, version, reason)]
    return [Provider(cls, point.name, distribution, version) for cls in classes]


def _registered(point: EntryPoint) -> list[type[Method]]:
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(HookSpecification)
    manager.register(point.load(), point.name)
    manager.check_pending()
    groups = manager.hook.surgery_register_methods()
    if not groups:
        raise PluginError("it does not implement the hook surgery_register_methods()")
    return [cls for group in groups for cls in group]


def _check(cls: type[Method]) -> None:
    if not (isinstance(cls, type) and issubclass(cls, Method)):
        raise PluginError(f"surgery_register_methods() returned {cls!r}, expected subclasses of surgery.Method")
    missing = sorted(getattr(cls, "__abstractmethods__", ()))
    if missing:
        raise PluginError(f"{cls.__name__} does not define {', '.join(missing)}")
    for attribute in ("name", "preserves"):
        if not isinstance(getattr(cls, attribute, None), str):
            raise PluginError(f"{cls.__name__} has no class attribute {attribute!r}")
    if not cls.name.isidentifier():
        raise PluginError(f"{cls.__name__} has the name {cls.name!r}, expected letters, digits and underscores")
    if cls.preserves not in get_args(Preserves):
        raise PluginError(
            f"{cls.__name__} preserves {cls.preserves!r}, expected one of {', '.join(get_args(Preserves))}"
        )
    lost = [] if "__dataclass_fields__" in vars(cls) else _options(cls)
    if lost:
        raise PluginError(f"the options {', '.join(lost)} of {cls.__name__} need @dataclass(frozen=True) on the class")


def _options(cls: type[Method]) -> list[str]:
    return [name for name, hint in inspect.get_annotations(cls).items() if "ClassVar" not in str(hint)]
