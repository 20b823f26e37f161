# SPDX-License-Identifier: MIT
"""Flags and commands of vLLM, llama.cpp, Ollama and the Rust candle-vllm that differ here, or are not needed.

The table is core's `foreign_names.md`; this module has the functions that its rows name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from candle_vllm.core.config import MAX_DRAFT
from candle_vllm.core.foreign_names import foreign_tables

Becomes = str | Callable[[str], list[str]]
ANY = "*"


class Row(NamedTuple):
    """Translation of a foreign flag.

    Attributes:
        answer: text of the message about the flag.
        becomes: arguments for each value: a text, in which `{}` stands for the value and which is empty if the value is
            the default here; or a function, whose ValueError gives the reason for a refusal. The key "" means the flag
            without a value, `ANY` every other value. A missing value is refused with the answer.
        idle: whether accepted values have no effect, which is logged at startup.
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
    """Translate llama.cpp's `--cors-origins A[,B]`; `localhost` is any port of this machine's names for itself."""
    names = [f"http://{name}{port}" for name in ("localhost", "127.0.0.1", "[::1]") for port in ("", ":*")]
    given = (names if each == "localhost" else [each] for each in text.split(","))
    return [argument for origins in given for origin in origins for argument in ("--cors-origin", origin)]


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
    return ["--host", f"unix://{Path(path).expanduser().absolute()}"]


def _device(text: str) -> list[str]:
    """Translate llama.cpp's device names: CUDA0, none."""
    name = text.lower()
    return ["--device", f"cuda:{name[4:]}" if name.startswith("cuda") and name[4:].isdecimal() else
            {"none": "cpu"}.get(name, text)]  # fmt: skip


def _drafts(text: str) -> list[str]:
    """Translate llama.cpp's maximum of draft tokens per step; larger values, as for its n-gram methods, are clipped."""
    count = min(int(text), MAX_DRAFT) if text.isdecimal() else text
    return ["--speculative-config.num_speculative_tokens", str(count)]


def _images(text: str) -> list[str]:
    """Translate vLLM's `--limit-mm-per-prompt`: a JSON object of counts; those of video and audio must be 0."""
    try:
        given = json.loads(text)
        counts = {kind: limit.get("count", 0) if isinstance(limit, dict) else limit for kind, limit in given.items()}
    except (ValueError, AttributeError):
        raise ValueError('must be a JSON object of counts, as {"image": 4}') from None
    other = next((kind for kind, count in counts.items() if kind != "image" and count != 0), None)
    if other is not None:
        raise ValueError(f"has {other!r:.40}: images are the only supported input besides text")
    return ["--max-images", str(counts["image"])] if "image" in counts else []


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
        raise ValueError("has no file before the scale")
    given = {"name": Path(path).stem if path.endswith(".gguf") else Path(path).name, "path": path, "scale": scale}
    return ["--enable-lora", "--lora-modules", json.dumps(given)]


_MADE: Mapping[str, Callable[[str], list[str]]] = {
    "adapters": _adapters,
    "cors": _cors,
    "device": _device,
    "generation": _generation,
    "drafts": _drafts,
    "images": _images,
    "origins": _origins,
    "pooler": _pooler,
    "scaled": _scaled,
    "socket": _socket,
}

COMMANDS = {row[0]: row[1] for row in foreign_tables()["Commands"]}


@cache
def foreign_flags() -> Mapping[str, Row]:
    """Return the row of each flag; its answer begins with this program's flag if there is an equivalent one."""
    return dict(told())


def told() -> Iterator[tuple[str, Row]]:
    """Yield every flag of the table with its row."""
    for flags, becomes, here, answer in foreign_tables()["Flags"]:
        row = Row(answer, _becomes(becomes), here == "no effect", here.endswith("or no effect"))
        for flag in flags.split():
            yield flag, row


def _becomes(text: str) -> Mapping[str, Becomes]:
    """Parse the translations of each value from a table cell `VALUE: ARGUMENTS; ...`."""
    parts = (part.partition(":") for part in text.split(";") if part)
    found = {value.strip(): arguments.strip() for value, _, arguments in parts}
    return {
        "" if value == "(none)" else value: _MADE[arguments[1:]] if arguments.startswith("@") else arguments
        for value, arguments in found.items()
    }
