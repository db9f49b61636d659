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

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType

import pluggy

from surgery.errors import PluginError
from surgery.method import Method

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
            other = found[name]
            raise PluginError(
                f"the method {name!r} is provided by {other.distribution} {other.version} and by "
                f"{provider.distribution} "
                f"{provider.version}; uninstall one of them, or block it with "
                f"SURGERY_BLOCK_PLUGINS={provider.entry_point}"
            )
        found[name] = provider
    known = {name: provider.method for name, provider in sorted(found.items())}
    return MappingProxyType({name: method for name, method in known.items() if method is not None})


def provider_of(method: type[Method]) -> Provider:
    """Return the distribution that provides `method`; a class defined in a script belongs to none."""
    for provider in providers():
        if provider.method is method:
            return provider
    return Provider(method, "", "", "")


@cache
def providers() -> tuple[Provider, ...]:
    """Load every plugin once and return what each provides, sorted by entry point.

    The environment variable SURGERY_BLOCK_PLUGINS holds entry point names, separated by commas, that are not loaded;
    SURGERY_PLUGINS, if set, holds the only ones that are.
    """
    found: list[Provider] = []
    for point in sorted(entry_points(group=GROUP), key=lambda point: (point.name, point.value)):
        if _allowed(point.name):
            found += _load(point)
    return tuple(found)


def _allowed(name: str) -> bool:
    blocked = _names("SURGERY_BLOCK_PLUGINS") or set()
    only = _names("SURGERY_PLUGINS")
    return name not in blocked and (only is None or name in only)


def _names(variable: str) -> set[str] | None:
    value = os.environ.get(variable)
    return None if value is None else {name.strip() for name in value.split(",") if name.strip()}


def _load(point: EntryPoint) -> list[Provider]:
    distribution = point.dist.name if point.dist else "(unknown distribution)"
    version = point.dist.version if point.dist else ""
    try:
        classes = _registered(point)
        for cls in classes:
            _check(cls)
    except Exception as error:  # a plugin can fail in any way, and must not take the others down
        reason = f"{type(error).__name__}: {error}"
        warnings.warn(
            f"the surgery plugin {point.name!r} of {distribution} {version} cannot be loaded and is ignored "
            f"({reason}); "
            f"repair or uninstall it, or set SURGERY_BLOCK_PLUGINS={point.name}",
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
