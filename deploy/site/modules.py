# SPDX-License-Identifier: MIT
"""Print the list of modules as Markdown: each module's path and the first line of its docstring."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("core", "openai", "responses", "server")


def summaries(package: str) -> dict[str, str]:
    """Map each module of `package` that has content, by its path below `candle_vllm/`, to its docstring's first line.

    A module without a docstring has the summary "".
    """
    base = ROOT / "packages" / package / "src" / "candle_vllm"
    found = {}
    for path in sorted(base.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if path.name != "__init__.py" or text.strip():
            docstring = ast.get_docstring(ast.parse(text)) or ""
            found[path.relative_to(base).as_posix()] = docstring.partition("\n")[0]
    return found


def modules_page() -> str:
    """Return the page: a section for each package, a line for each module."""
    parts = [
        "# Modules",
        "Paths are below `packages/*/src/candle_vllm/`. An `__init__.py` without content is left out.",
    ]
    for package in PACKAGES:
        parts.append(f"## {package}")
        parts.append("\n".join(f"- `{name}`: {summary}" for name, summary in summaries(package).items()))
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    sys.stdout.write(modules_page())
