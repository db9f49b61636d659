"""Coarse labels: which group of every level each class belongs to.

Level 0 is the classes themselves; every further level groups those of the level before it.

Reference: Lee & Shin, Anytime neural prediction via slicing networks vertically (2018), section 3.3 and appendix A.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Self, SupportsIndex

import torch
from torch import Tensor

from surgery.errors import InvalidOption
from surgery_inclusive.tables import checked_order, listed, read_table

FINEST = "class"
"""Name of level 0; no other level may have it."""


@dataclass(frozen=True)
class Level:
    """One coarse level.

    Attributes:
        name: Name of the level.
        groups: For every class the index of its group.
        names: Names of the groups; default: their indices.

    Raises:
        InvalidOption: If the name cannot be part of a path, or the indices are not 0 to the number of groups - 1.
    """

    name: str
    groups: tuple[int, ...]
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check everything that does not depend on the other levels."""
        name = self.name
        if not isinstance(name, str) or not name.strip() or name == FINEST or "/" in name:
            raise InvalidOption(
                f"taxonomy: found a level called {name!r}, expected text without '/' that is not {FINEST!r}, the "
                "name of the finest level; rename it"
            )
        groups = tuple(_index(group, f"taxonomy: level {name!r}, class {n}") for n, group in enumerate(self.groups))
        used = sorted(set(groups))
        if not used or used != list(range(len(used))):
            raise InvalidOption(
                f"taxonomy: level {name!r} has groups {listed(used)}, expected 0 to the number of groups - 1, each of "
                "them used; number them anew"
            )
        names = tuple(self.names) or tuple(map(str, used))
        if not len(set(names)) == len(names) == len(used) or not all(isinstance(name, str) and name for name in names):
            raise InvalidOption(
                f"taxonomy: level {name!r} has groups called {listed(names)}, expected {len(used)} different names; "
                "name each of them"
            )
        object.__setattr__(self, "groups", groups)
        object.__setattr__(self, "names", names)

    @classmethod
    def numbered(cls, name: str, members: Sequence[str]) -> Self:
        """Return the level whose group is called `members[n]` for class n; groups are numbered as they appear."""
        names = tuple(dict.fromkeys(members))
        numbers = {member: number for number, member in enumerate(names)}
        return cls(name, tuple(numbers[member] for member in members), names)

    @property
    def size(self) -> int:
        """Number of groups."""
        return len(self.names)

    def to_option(self) -> list[int] | dict[str, list[int] | list[str]]:
        """Return the indices, with the names of the groups where they have some."""
        if self.names == tuple(map(str, range(self.size))):
            return list(self.groups)
        return {"groups": list(self.groups), "names": list(self.names)}


@dataclass(frozen=True)
class Taxonomy:
    """The coarse levels, from fine to coarse.

    Attributes:
        coarse: The levels behind the classes; every one is a function of the one before it.

    Raises:
        InvalidOption: If there is no level, two share a name or differ in their number of classes, or a group of one
            is divided by the next.
    """

    coarse: tuple[Level, ...]

    def __post_init__(self) -> None:
        """Check what the levels have to share."""
        object.__setattr__(self, "coarse", tuple(self.coarse))
        counts = {level.name: len(level.groups) for level in self.coarse}
        if len(counts) != len(self.coarse) or not counts:
            raise InvalidOption(
                f"taxonomy: found the levels {listed(self.levels)}, expected one or more, each with a name of its own"
            )
        if len(set(counts.values())) > 1:
            raise InvalidOption(
                f"taxonomy: found numbers of classes {counts}, expected as many on every level; give each class a "
                "group on each"
            )
        _check_hierarchy(self.coarse, [str(number) for number in range(self.classes)])

    @classmethod
    def of(cls, taxonomy: Taxonomy | Mapping[str, Any]) -> Taxonomy:
        """Return the taxonomy that an option says.

        Args:
            taxonomy: By name of the level, from fine to coarse, the index of the group of every class, or what
                `to_option` returned; or by name of the class, in the order of the classes, the names of its groups from
                fine to coarse: their levels are called level1, level2 and so on; or a taxonomy, which is returned.

        Raises:
            InvalidOption: If it is none of these, or contradicts itself.
        """
        if isinstance(taxonomy, Taxonomy):
            return taxonomy
        if not isinstance(taxonomy, Mapping) or not taxonomy:
            raise InvalidOption(f"taxonomy: found {taxonomy!r}, expected {_FORMS}")
        if all(_is_names(value) for value in taxonomy.values()):
            return cls._of_ancestors(taxonomy)
        return cls(tuple(_level(name, value) for name, value in taxonomy.items()))

    @classmethod
    def _of_ancestors(cls, ancestors: Mapping[str, Sequence[str]]) -> Self:
        first, depth = next((name, len(groups)) for name, groups in ancestors.items())
        for name, groups in ancestors.items():
            if len(groups) != depth:
                raise InvalidOption(
                    f"taxonomy: class {name!r} has {len(groups)} groups and {first!r} has {depth}, expected as many "
                    "for all; repeat the coarsest one where a class has fewer"
                )
        levels = tuple(
            Level.numbered(f"level{number}", members)
            for number, members in enumerate(zip(*ancestors.values(), strict=True), start=1)
        )
        _check_hierarchy(levels, list(ancestors))
        return cls(levels)

    @classmethod
    def from_csv(cls, path: str | os.PathLike[str], classes: Sequence[str] | None = None) -> Self:
        """Read a taxonomy: a header `class,<level>,...` from fine to coarse, then a row of names for each class.

        Args:
            path: The file, comma-separated, in UTF-8.
            classes: Names of the classes in their order; default: the order of the rows.

        Raises:
            InvalidOption: If the file cannot be read, or a row, a cell or a class is missing, doubled or unknown.
        """
        header, table = read_table(path, FINEST)
        order = list(table) if classes is None else checked_order(path, table, classes)
        columns = zip(*(table[name].cells for name in order), strict=True)
        try:
            levels = tuple(Level.numbered(*column) for column in zip(header, columns, strict=True))
            _check_hierarchy(levels, order)
            return cls(levels)
        except InvalidOption as error:
            raise InvalidOption(f"{path}: {error}") from error

    def to_option(self) -> dict[str, list[int] | dict[str, list[int] | list[str]]]:
        """Return the taxonomy as JSON values; `Taxonomy.of` reads them back."""
        return {level.name: level.to_option() for level in self.coarse}

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.coarse[0].groups)

    @property
    def levels(self) -> tuple[str, ...]:
        """Names of the coarse levels."""
        return tuple(level.name for level in self.coarse)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers of groups of the coarse levels."""
        return tuple(level.size for level in self.coarse)

    def check(self, classes: int) -> None:
        """Refuse a network of another number of classes.

        Raises:
            InvalidOption: If `classes` is another number.
        """
        if classes != self.classes:
            raise InvalidOption(
                f"taxonomy: covers {self.classes} classes, expected {classes}, those of the network; give each of them "
                "a group on every level"
            )

    def labels(self, target: Tensor, level: int | str) -> Tensor:
        """Return the coarse labels of some images.

        Args:
            target: Their classes; those below 0, which criteria ignore, stay. Shape: (B,).
            level: Index or name of the level; 0 and "class" are the classes themselves.

        Returns:
            Indices of groups. Shape: (B,).

        Raises:
            InvalidOption: If there is no such level, or the target is not one class for each image.
        """
        names = (FINEST, *self.levels)
        depth = names.index(level) if level in names else level
        if not isinstance(depth, int) or isinstance(depth, bool) or not 0 <= depth < len(names):
            raise InvalidOption(f"taxonomy: found level {level!r}, expected 0 to {len(names) - 1}, or one of {names}")
        if target.dim() != 1 or target.is_floating_point() or target.dtype == torch.bool:
            raise InvalidOption(
                f"taxonomy: found a target {tuple(target.shape)} of {target.dtype}, expected one class index for each "
                "image; train without soft or mixed targets"
            )
        if depth == 0:
            return target
        target = target.long()  # uint8 would be read as a mask
        groups = torch.tensor(self.coarse[depth - 1].groups, device=target.device)
        return torch.where(target < 0, target, groups[target.clamp(min=0)])


_FORMS = (
    "the group of every class by name of the level, as in {'animal': [0, 0, 1]}, or the groups from fine to coarse by "
    "name of the class, as in {'beagle': ['hound', 'dog']}"
)


def _is_names(value: object) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(isinstance(name, str) for name in value)


def _level(name: str, value: Any) -> Level:
    named = isinstance(value, Mapping) and value.keys() == {"groups", "names"} and _is_names(value["names"])
    groups, names = (value["groups"], value["names"]) if named else (value, ())
    if isinstance(groups, (str, Mapping)) or not isinstance(groups, Iterable):
        raise InvalidOption(f"taxonomy: found {value!r} for {name!r}, expected {_FORMS}")
    return Level(name, tuple(groups), tuple(names))


def _index(value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        raise InvalidOption(f"{where}: found {value!r}, expected the index of a group, a whole number")
    return operator.index(value)


def _check_hierarchy(levels: Sequence[Level], classes: Sequence[str]) -> None:
    """Refuse two classes that one level groups together and the next one takes apart."""
    for finer, coarser in pairwise(levels):
        first: dict[int, int] = {}
        for here, group in enumerate(finer.groups):
            there = first.setdefault(group, here)
            one, other = coarser.groups[there], coarser.groups[here]
            if one != other:
                raise InvalidOption(
                    f"taxonomy: the classes {classes[there]!r} and {classes[here]!r} share {finer.names[group]!r} of "
                    f"level {finer.name!r}, and level {coarser.name!r} has them in {coarser.names[one]!r} and "
                    f"{coarser.names[other]!r}, expected one group; put them together there, or apart before"
                )
