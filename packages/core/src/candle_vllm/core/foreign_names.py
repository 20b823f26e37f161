# SPDX-License-Identifier: MIT
"""The one table of other programs' names, `foreign_names.md`: flags, commands, variables and library arguments."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

Row = Sequence[str]


@functools.cache
def foreign_tables() -> Mapping[str, Sequence[Row]]:
    """The rows of each table by the table's heading; a row is the texts of its cells."""
    tables: dict[str, list[Row]] = {}
    rows: list[Row] = []
    for line in Path(__file__).with_suffix(".md").read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            rows = tables.setdefault(line[3:], [])
        elif line.startswith("|---"):
            rows.clear()  # what stood above are the headings of the columns
        elif line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return tables


def flags_of(program: str) -> Sequence[str]:
    """The flags of a program, as far as people write them."""
    return next(row[1].split() for row in foreign_tables()["Flags by program"] if row[0] == program)
