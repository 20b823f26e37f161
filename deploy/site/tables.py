# SPDX-License-Identifier: MIT
"""Fill the tables of pages from the code: settings, routes, metrics, other programs' flags, fields of requests.

A table stands in a page between `<!-- table: NAME -->` and `<!-- end of table -->`. The fields of `EngineSettings`,
which type checkers must find in the source, are generated from `EngineConfig`.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from candle_vllm.core.foreign_names import foreign_tables
from candle_vllm.openai.protocol.fields import COMPLETION_REFUSED_FIELDS, REFUSED_FIELDS, Refusal
from candle_vllm.server.app import OPERATIONS
from candle_vllm.server.observing import series
from candle_vllm.server.settings.command_line import SHORT
from candle_vllm.server.settings.foreign_flags import ANY, Row, foreign_flags
from candle_vllm.server.settings.options import GROUPS, Option
from candle_vllm.server.settings.table import OPTIONS

ROOT = Path(__file__).parents[2]
PAGES = (
    "docs/configuration.md",
    "docs/coming-from-vllm.md",
    "docs/coming-from-llama-cpp.md",
    "docs/coming-from-ollama.md",
    "docs/coming-from-candle-vllm.md",
    "docs/metrics.md",
    "docs/routes.md",
    "packages/openai/README.md",
)
PROGRAMS = ("vLLM", "llama.cpp", "Ollama", "candle-vllm", "Others")
CONFIG = ROOT / "packages/core/src/candle_vllm/core/config.py"
_SETTINGS = re.compile(r"(class EngineSettings\([^\n]*\n[^\n]*\n\n)((?:    \w+: [^\n]*\n)+)")
_BLOCK = re.compile(r"(<!-- table: (.*?) -->\n)(.*?)(<!-- end of table -->)", re.DOTALL)


def filled(text: str) -> str:
    """Return a page with its tables as the code has them."""
    return _BLOCK.sub(lambda found: f"{found[1]}\n{TABLES[found[2]]()}\n\n{found[4]}", text)


def with_settings(source: str) -> str:
    """Return the source of `core/config.py` with the fields of `EngineSettings` as `EngineConfig` has them."""
    classes = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
    fields = []
    for node in classes["EngineConfig"].body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) != "model":
            assert isinstance(node.annotation, ast.Subscript)
            assert isinstance(node.annotation.slice, ast.Tuple)
            fields.append(f"    {ast.unparse(node.target)}: {ast.unparse(node.annotation.slice.elts[0])}\n")
    return _SETTINGS.sub(lambda found: found[1] + "".join(fields), source)


def here(row: Row) -> str:
    """Return the effect of a row's flags, in the words of the pages."""
    values = ", ".join(f"`{value}`" for value in row.becomes if value not in ("", ANY))
    if not row.becomes:
        return "refused"
    state = "no effect" if row.idle else "translated"
    if ANY in row.becomes or "" in row.becomes:
        return f"{state}, or no effect" if row.elsewhere else state
    return f"{values}: {state}; other values: refused"


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |".replace("| --- ", "|---").replace("--- |", "---|") for line in lines)


def _settings(group: str) -> str:
    rows = (
        (
            " ".join(f"`{flag}`" for flag in (*option.flags, *option.constants)),
            f"`{option.env}`",
            f"`{option.name}`" if option.in_yaml else "–",
            _default(option),
            option.help,
        )
        for option in OPTIONS
        if option.group == group
    )
    return _table(("Flag", "Variable", "models.yaml", "Default", "Meaning"), rows)


def _default(option: Option) -> str:
    if option.usual == option.unset:
        return option.unset or "–"
    return f"`{str(option.usual).lower() if isinstance(option.usual, bool) else option.usual}`"


def flags_of(program: str) -> Sequence[str]:
    """Return the flags of a program, in the forms that users write."""
    return next(row[1].split() for row in foreign_tables()["Flags by program"] if row[0] == program)


def _flags(program: str) -> str:
    mine, rows = flags_of(program), foreign_flags()
    helps = {flag: option.help for option in OPTIONS for flag in (*option.flags, *option.constants)}
    shown: dict[tuple[str, str], list[str]] = {}
    for flag in dict.fromkeys(mine):
        row = rows.get(flag)
        if row is not None:
            shown.setdefault((here(row), row.answer), []).append(flag)
        else:
            what = helps.get(SHORT.get(flag, flag), "YAML file of flags; flags on the command line precede it")
            shown.setdefault(("taken", what), []).append(flag)
    cells = ((" ".join(f"`{flag}`" for flag in flags), state, what) for (state, what), flags in shown.items())
    return _table(("Flags", "Here", "What"), cells)


def _variables() -> str:
    rows = foreign_tables()["Variables"]
    return _table(
        ("Variable", "Here"),
        ((f"`{name}`", f"the setting `{setting}`" if setting else f"no effect: {why}") for name, setting, why in rows),
    )


def _commands() -> str:
    rows = foreign_tables()["Commands"]
    return _table(("Command", "Here"), ((f"`{name}`", what) for name, what, of_ollama in rows if of_ollama == "yes"))


def _arguments() -> str:
    owners = (
        "EngineConfig",
        "SamplingParams",
        "PoolingParams",
        "StructuredOutputsParams",
        "BeamSearchParams",
        "LoRARequest",
    )
    rows = ((owner, *row) for owner in owners for row in foreign_tables()[owner])
    cells = (
        (f"`{owner}`", " ".join(f"`{name}`" for name in names.split()), f"`{allowed}`" if allowed else "", what)
        for owner, names, allowed, what in rows
    )
    return _table(("Of", "Arguments", "Taken without effect", "Here"), cells)


def _routes(tag: str) -> str:
    rows = (
        (f"`{method} {path.replace(':path', '')}`", operation.summary)
        for (method, path), operation in OPERATIONS.items()
        if operation.tag == tag
    )
    return _table(("Route", "What"), rows)


def _metrics(listed: Sequence[series.Series]) -> str:
    rows = (
        (f"`{each.name}`", each.kind, ", ".join(f"`{label}`" for label in each.labels), each.help) for each in listed
    )
    return _table(("name", "type", "labels", "meaning"), rows)


def _fields(fields: Mapping[str, Refusal], idle: bool) -> str:
    rows = (
        (f"`{name}`", field.reason, ", ".join(f"`{json.dumps(value)}`" for value in field.neutral))
        for name, field in fields.items()
        if field.idle == idle
    )
    return _table(("field", "why", "may be"), rows)


_CHAT_ONLY = {name: field for name, field in COMPLETION_REFUSED_FIELDS.items() if name not in REFUSED_FIELDS}
TABLES: Mapping[str, Callable[[], str]] = {
    **{f"settings of {group}": lambda group=group: _settings(group) for group in GROUPS},
    **{f"flags of {program}": lambda program=program: _flags(program) for program in PROGRAMS},
    **{f"routes of {tag}": lambda tag=tag: _routes(tag) for tag in {each.tag for each in OPERATIONS.values()}},
    "metrics of a loaded model": lambda: _metrics(series.GAUGES),
    "metrics of an engine": lambda: _metrics(series.ENGINE_COUNTS),
    "metrics of requests": lambda: _metrics(series.REQUEST_COUNTERS),
    "metrics of times and sizes": lambda: _metrics(series.HISTOGRAMS),
    "metrics of the server": lambda: _metrics((*series.EVENTS, series.MCP_SERVERS)),
    "metrics of HTTP": lambda: _metrics(series.HTTP),
    "variables": _variables,
    "commands of Ollama": _commands,
    "arguments": _arguments,
    "refused fields": lambda: _fields(REFUSED_FIELDS, idle=False),
    "fields without effect": lambda: _fields(COMPLETION_REFUSED_FIELDS, idle=True),
    "refused fields of completions": lambda: _fields(_CHAT_ONLY, idle=False),
}


if __name__ == "__main__":
    for name in PAGES:
        path = ROOT / name
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
    CONFIG.write_text(with_settings(CONFIG.read_text(encoding="utf-8")), encoding="utf-8")
