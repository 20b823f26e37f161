# SPDX-License-Identifier: MIT
"""Flags and commands of vLLM, llama.cpp, Ollama and the Rust candle-vllm that differ here, or are not needed.

The table is core's `foreign_names.md`; this module has the functions that its rows name, and translates command lines
and YAML files of flags (before step 1 of a request's life).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from candle_vllm.core.config import MAX_DRAFT
from candle_vllm.core.foreign_names import foreign_tables
from candle_vllm.server.settings.options import UsageError, mapping
from candle_vllm.server.settings.sources import read_yaml

Becomes = str | Callable[[str], list[str]]
ANY = "*"


class Row(NamedTuple):
    """Translation of a foreign flag.

    Attributes:
        answer: text of the message about the flag.
        becomes: arguments for each value: a text, in which `{}` stands for the value and which is empty if the value is
            the default here; or a function, whose ValueError gives the reason for a refusal. The key "" means the flag
            without a value, `ANY` every other value. A value without an entry is refused with the answer.
        idle: whether accepted values that become nothing have no effect, which is logged at startup.
        elsewhere: whether commands without the setting ignore the flag; otherwise they refuse it.
    """

    answer: str
    becomes: Mapping[str, Becomes]
    idle: bool
    elsewhere: bool


def _origins(text: str) -> list[str]:
    """Translate `--allowed-origins '["https://a.example"]'`."""
    return [argument for origin in _json(text, list) for argument in ("--cors-origin", str(origin))]


def _pooler(text: str) -> list[str]:
    """Translate `--pooler-config '{"pooling_type": "MEAN"}'`."""
    if len(given := _json(text, dict)) != 1 or not {"pooling_type", "seq_pooling_type"} & given.keys():
        raise ValueError(f"may have a pooling_type and nothing else, not {text!r:.60}")
    return ["--pooling", str(*given.values()).lower()]


def _cors(text: str) -> list[str]:
    """Translate llama.cpp's `--cors-origins A[,B]`; `localhost` means this machine's own names with any port."""
    names = [f"http://{name}{port}" for name in ("localhost", "127.0.0.1", "[::1]") for port in ("", ":*")]
    given = (names if each == "localhost" else [each] for each in text.split(","))
    return [argument for origins in given for origin in origins for argument in ("--cors-origin", origin)]


_CUDA = re.compile(r"\bcuda(\d+)\b", re.ASCII | re.IGNORECASE)
_GENERATION = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def _generation(text: str) -> list[str]:
    """Translate `--override-generation-config '{"temperature": 0.5}'`."""
    given = _json(text, dict)
    for name, value in given.items():
        if name not in _GENERATION or isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(
                f"{str(name)[:40]!r} is not one of these parameters with a number: {', '.join(_GENERATION)}"
            )
    return [argument for name, value in given.items() for argument in ("--" + name.replace("_", "-"), str(value))]


def _json(text: str, kind: type[Any]) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, kind):
        raise ValueError(f"must be a JSON {'list' if kind is list else 'object'}, not {text!r:.60}")
    return value


def _socket(path: str) -> list[str]:
    return ["--host", f"unix://{os.path.abspath(os.path.expanduser(path))}"]


def _device(text: str) -> list[str]:
    """Translate llama.cpp's device names: CUDA0, none, or several as CUDA0,CUDA1."""
    return ["--device", _CUDA.sub(r"cuda:\1", {"none": "cpu"}.get(text.lower(), text))]


def _drafts(text: str) -> list[str]:
    """Translate llama.cpp's maximum of draft tokens per step; values above `MAX_DRAFT` are clipped."""
    count = min(int(text), MAX_DRAFT) if text.isdecimal() else text
    return ["--speculative-config.num_speculative_tokens", str(count)]


def _images(text: str) -> list[str]:
    """Translate vLLM's `--limit-mm-per-prompt`: a JSON object of counts; those of video and audio must be 0."""
    from candle_vllm.core.vllm.arguments import image_limit  # imported here: it imports the engine

    count = image_limit(_json(text, dict))
    return [] if count is None else ["--max-images", str(count)]


def _adapters(text: str) -> list[str]:
    """Translate `--lora F[,F]`: adapters that apply to requests without adapters, each named after its file."""
    return [argument for path in text.split(",") for argument in _adapter(path, 1.0)]


def _scaled(text: str) -> list[str]:
    """Translate `--lora-scaled F:S[,F:S]`."""
    given = [each.rpartition(":") for each in text.split(",")]
    try:
        return [argument for path, _, scale in given for argument in _adapter(path, float(scale))]
    except ValueError:
        raise ValueError(f"must be FILE:SCALE, not {text!r:.60}") from None


def _adapter(path: str, scale: float) -> list[str]:
    if not path:
        raise ValueError("has an adapter without a file")
    given = {"name": Path(path).stem if path.endswith(".gguf") else Path(path).name, "path": path, "scale": scale}
    return ["--enable-lora", "--lora-modules", json.dumps(given)]


_MADE: Mapping[str, Callable[[str], list[str]]] = {
    made.__name__.removeprefix("_"): made
    for made in (_adapters, _cors, _device, _generation, _drafts, _images, _origins, _pooler, _scaled, _socket)
}
"""The functions that rows of the table name: `@cors` is `_cors`."""

COMMANDS = {row[0]: row[1] for row in foreign_tables()["Commands"]}


@cache
def foreign_flags() -> Mapping[str, Row]:
    """Return the row of each flag; its answer begins with this program's flag if there is an equivalent one."""
    return {
        flag: Row(answer, _becomes(becomes), here == "no effect", here.endswith("or no effect"))
        for flags, becomes, here, answer in foreign_tables()["Flags"]
        for flag in flags.split()
    }


def _becomes(text: str) -> Mapping[str, Becomes]:
    """Parse the translations of each value from a table cell `VALUE: ARGUMENTS; ...`."""
    parts = (part.partition(":") for part in text.split(";") if part)
    found = {value.strip(): arguments.strip() for value, _, arguments in parts}
    return {
        "" if value == "(none)" else value: _MADE[arguments[1:]] if arguments.startswith("@") else arguments
        for value, arguments in found.items()
    }


# ---- translation of a command line -----------------------------------------------------------------------------------


_OURS = re.compile(r"--[\w.-]+(?: [\w:/]+)?(?=[,;]|$)")  # an answer that begins with a flag, and is not a sentence

_OBJECTS = ("--speculative-config", "--mm-processor-kwargs")
"""Flags whose values are objects: `--flag.name VALUE` sets one member."""

Known = Mapping[str, list[str]]
"""The commands of each flag."""


def translated(command: str, argv: Sequence[str], known: Known) -> tuple[list[str], list[str]]:
    """Return the arguments with foreign flags translated, and remarks on flags without effect.

    UsageError, with the reason, if a flag or its value has no translation.
    """
    end = argv.index("--") if "--" in argv else len(argv)
    left, line, remarks = list(argv[:end]), list[str](), list[str]()
    last: list[str] = []  # the translation of --uds, which overrides --host at any position
    parts: dict[str, dict[str, Any]] = {}  # members of object values, by flag
    while left:
        flag, equals, value = left.pop(0).partition("=")
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
        (last if flag == "--uds" else line).extend([] if foreign else ours)
        if (row.idle and not ours) or foreign:
            remarks.append(f"{flag} has no effect here: {row.answer}")
    for flag, given in parts.items():
        if any(each.partition("=")[0] == flag for each in line):
            raise UsageError(f"{flag} and {flag}.{next(iter(given))} are one setting: give one")
        line.append(f"{flag}={json.dumps(given)}")
    return [*line, *last, *argv[end:]], remarks


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
    """Replace underscores by hyphens, because vLLM accepts both; an argument with white space is a text, not a flag."""
    if not flag.startswith("--") or flag in foreign_flags() or flag in known or any(map(str.isspace, flag)):
        return flag
    return "--" + flag[2:].replace("_", "-")


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
    for name in reversed(flag.split(".")[1:]):  # vLLM's `--flag.name VALUE` is `--flag '{"name": VALUE}'`
        value = json.dumps({name: _read(value)})
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

    UsageError if the file is unreadable or not a mapping, or a key or its value cannot be given there.
    """
    line: list[str] = []
    for key, value in mapping(read_yaml(path), str(path)).items():
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
        return [flag, *(json.dumps(each) if isinstance(each, dict) else str(each) for each in value)] if value else []
    return [f"{flag}={json.dumps(value) if isinstance(value, dict) else value}"]
