"""Tables of names in CSV files: one row for each class."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from surgery.errors import InvalidOption


@dataclass(frozen=True)
class Row:
    """One row of a file.

    Attributes:
        number: The line it ends on, from 1.
        cells: The names, without white space around them.
    """

    number: int
    cells: tuple[str, ...]


def read_table(path: str | os.PathLike[str], key: str) -> tuple[tuple[str, ...], dict[str, Row]]:
    """Return the header behind its first cell `key`, and what is behind the first cell of every other row, by it.

    Raises:
        InvalidOption: If the file cannot be read, or a row or a cell is missing or doubled.
    """
    header, *rows = _rows(path) or [Row(1, ("",))]
    if header.cells[0] != key or len(header.cells) < 2 or not rows:
        raise InvalidOption(
            f"{path}: row {header.number} is {','.join(header.cells)!r} with {len(rows)} rows below it, expected "
            f"'{key},<level>,...', separated by commas, and a row for each {key}"
        )
    table: dict[str, Row] = {}
    for row in rows:
        _check(path, header.cells, row)
        name, *cells = row.cells
        if name in table:
            raise InvalidOption(
                f"{path}: row {row.number}, column {key!r}: found {name!r}, which row {table[name].number} has, "
                f"expected every {key} once; remove one of the rows"
            )
        table[name] = Row(row.number, tuple(cells))
    return header.cells[1:], table


def checked_order(path: object, table: Mapping[str, Row], names: Sequence[str]) -> list[str]:
    """Return `names` if they are exactly those of the rows.

    Raises:
        InvalidOption: If one has no row, is there twice, or a row has none of them.
    """
    seen: set[str] = set()
    for name in names:
        if name not in table or name in seen:
            found = "which has no row" if name not in table else "twice"
            raise InvalidOption(
                f"{path}: found {name!r} among the {len(names)} names that were asked for, {found}, expected one row "
                "for each and each once; complete the file or the names"
            )
        seen.add(name)
    unknown = next((name for name in table if name not in seen), None)
    if unknown is not None:
        raise InvalidOption(
            f"{path}: row {table[unknown].number}, column 'class': found {unknown!r}, expected one of {listed(names)}; "
            "remove the row, or call it as the data does"
        )
    return list(names)


def listed(values: Iterable[object]) -> str:
    """Return the first few values as text."""
    texts = [str(value) for value in values]
    return ", ".join(texts[:8]) + (f" and {len(texts) - 8} more" if len(texts) > 8 else "") or "none"


def _rows(path: str | os.PathLike[str]) -> list[Row]:
    """Return the rows that are not blank."""
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:  # spreadsheets begin a file with a mark
            reader = csv.reader(file, strict=True)
            return [Row(reader.line_num, tuple(cell.strip() for cell in row)) for row in reader if row]
    except OSError as error:
        raise InvalidOption(
            f"{path}: cannot be read ({error.strerror}), expected a CSV file; check the path"
        ) from error
    except UnicodeDecodeError as error:
        raise InvalidOption(
            f"{path}: found the byte {error.object[error.start]:#04x}, expected text in UTF-8; save it as that"
        ) from error
    except csv.Error as error:
        raise InvalidOption(
            f"{path}: row {reader.line_num} is no CSV ({error}), expected names separated by commas; write it again"
        ) from error


def _check(path: object, header: Sequence[str], row: Row) -> None:
    if len(row.cells) != len(header):
        raise InvalidOption(
            f"{path}: row {row.number} has {len(row.cells)} cells, expected {len(header)}, one for each of "
            f"{', '.join(header)}; write a name into each"
        )
    if "" in row.cells:
        column = header[row.cells.index("")]
        raise InvalidOption(f"{path}: row {row.number}, column {column!r} is empty, expected a name; fill it in")
