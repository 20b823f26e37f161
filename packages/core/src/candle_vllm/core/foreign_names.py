# SPDX-License-Identifier: MIT
"""Read `foreign_names.md`, the table of other programs' names: flags, commands, variables and library arguments."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

Row = Sequence[str]


@functools.cache
def foreign_tables() -> Mapping[str, Sequence[Row]]:
    """Return the rows of each table, by the table's heading; a row is the strings of its cells."""
    tables: dict[str, list[Row]] = {}
    rows: list[Row] = []
    for line in Path(__file__).with_suffix(".md").read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            rows = tables.setdefault(line[3:], [])
        elif line.startswith("|---"):
            rows.clear()  # the previous row is the header of the table
        elif line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return tables
