# SPDX-License-Identifier: MIT
"""Translation of flags of other programs on command lines and in YAML files (before step 1; see `foreign_flags.py`)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from candle_vllm.server.settings.foreign_flags import ANY, Row, foreign_flags
from candle_vllm.server.settings.options import UsageError, mapping
from candle_vllm.server.settings.sources import read_small

_OURS = re.compile(r"--[\w.-]+(?: [\w:/]+)?(?=[,;]|$)")  # an answer that begins with a flag, and is not a sentence

_OBJECTS = ("--speculative-config", "--mm-processor-kwargs")
"""Flags whose values are objects: `--flag.name VALUE` sets one member."""

Known = Mapping[str, list[str]]
"""The commands of each flag."""


def translated(command: str, argv: Sequence[str], known: Known) -> tuple[list[str], list[str]]:
    """Return the arguments with foreign flags translated, and remarks on flags without effect.

    Raises:
        UsageError: a flag or its value has no translation; the message gives the reason.
    """
    end = argv.index("--") if "--" in argv else len(argv)
    left, line, remarks = list(argv[:end]), list[str](), list[str]()
    parts: dict[str, dict[str, Any]] = {}  # members of object values, by flag
    while left:
        text = left.pop(0)
        flag, equals, value = text.partition("=")
        flag = _spelled(flag, known)
        base, _, name = flag.partition(".")
        if name and base in _OBJECTS:
            if not equals and not left:
                raise UsageError(f"{flag}: expected one argument")
            _note(parts, flag, value if equals else left.pop(0))
            continue
        row = foreign_flags().get(flag) or foreign_flags().get(flag.split(".")[0])
        if row is None or command in known.get(flag, ()):
            line.append(flag + equals + value)
            continue
        if not equals and not (value := _follows(row, left)) and "" not in row.becomes and row.becomes:
            raise UsageError(f"{flag}: expected one argument")
        ours = _ours(flag, value, row, known, command)
        if ours and ours[0].startswith(tuple(f"{each}." for each in _OBJECTS)) and command in known[_base(ours[0])]:
            _note(parts, *ours)
            continue
        foreign = [each for each in ours if each.startswith("--") and command not in known[_base(each)]]
        if foreign and not row.elsewhere:
            raise UsageError(hint(flag, known, command))
        line += [] if foreign else ours
        if row.idle or foreign:
            remarks.append(f"{flag} has no effect here: {row.answer}")
    line += [f"{flag}={json.dumps(given)}" for flag, given in parts.items()]
    return [*line, *argv[end:]], remarks


def _base(flag: str) -> str:
    return flag.partition(".")[0]


def _note(parts: dict[str, dict[str, Any]], flag: str, value: str) -> None:
    """Store the value of `--flag.name VALUE`, which sets one member of an object."""
    base, _, name = flag.partition(".")
    parts.setdefault(base, {})[name.replace("-", "_")] = _read(value)


def _read(text: str) -> Any:
    """Parse the value of a dotted flag as vLLM does: as JSON, else as text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _spelled(flag: str, known: Known) -> str:
    """Replace underscores by hyphens, because vLLM accepts both."""
    hyphened = "--" + flag[2:].replace("_", "-")
    return hyphened if flag.startswith("--") and flag not in foreign_flags() and flag not in known else flag


def _follows(row: Row, left: list[str]) -> str:
    """Take the value of a flag from the remaining arguments; "" for a flag without a value."""
    if left and set(row.becomes) - {""}:
        optional = "" in row.becomes
        if left[0] in row.becomes if optional else not left[0].startswith("-") or left[0][1:].isdecimal():
            return left.pop(0)
    return ""


def _ours(flag: str, value: str, row: Row, known: Known, command: str) -> list[str]:
    if value == "" and "" not in row.becomes:
        raise UsageError(hint(flag, known, command))
    becomes = row.becomes.get(value, row.becomes.get(ANY) if value else None)
    if becomes is None:
        raise UsageError(f"{flag} {value:.60} is not supported: {row.answer}")
    if isinstance(becomes, str):
        return [each.replace("{}", value) for each in becomes.split()]
    try:
        return becomes(value)
    except ValueError as error:
        raise UsageError(f"{flag} {error}") from None


def hint(flag: str, known: Known, command: str) -> str:
    """Return the error message for a foreign flag."""
    answer = foreign_flags()[flag.split(".")[0]].answer
    called = _OURS.match(answer)
    if called is None:
        return f"{flag} is not supported: {answer}"
    name, more = called[0], answer[called.end() :]
    commands = known[_base(name.split()[0])]
    where = "" if command in commands else f" (of `candle-vllm {', '.join(commands)}`)"
    if name == "--max-tokens" and where:
        where += "; clients of a server send max_tokens"
    return f"{flag} is called {name} here{where}{more}"


def lines_of(path: Path, known: Known) -> list[str]:
    """Convert a YAML file to flags, as vLLM's `--config` does: its keys are names of flags without the leading hyphens.

    Raises:
        UsageError: the file is unreadable, or not a mapping of names to values.
    """
    import yaml

    try:
        content = yaml.safe_load(read_small(path))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not YAML: {' '.join(str(error).split())[:200]}") from None
    line: list[str] = []
    for key, value in mapping(content, str(path)).items():
        flag = "--" + str(key).replace("_", "-")
        if flag in ("--config", "--help", "--version"):
            raise UsageError(f"{path}: {str(key)[:60]} can only be set on the command line")
        line += _argument("--m" if flag == "--model-tag" else flag, value, known, f"{path}: {str(key)[:60]}")
    return line


def _argument(flag: str, value: Any, known: Known, where: str) -> list[str]:
    if value is None:
        raise UsageError(f"{where} has no value")
    if isinstance(value, bool):
        off = f"--no-{flag[2:]}"
        if not value and off not in known and off not in foreign_flags():
            raise UsageError(f"{where}: leave it out, because {off} does not exist")
        return [flag if value else off]
    if isinstance(value, list):
        return [flag, *(str(each) for each in value)] if value else []
    return [f"{flag}={json.dumps(value) if isinstance(value, dict) else value}"]
