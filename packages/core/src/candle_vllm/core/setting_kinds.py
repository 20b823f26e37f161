# SPDX-License-Identifier: MIT
"""Types of settings: one class for each type of value, for the engine's settings and a server's.

`EngineConfig` reads Python values by `taken`. A server reads strings and YAML's numbers by `from_text`, other YAML
values by `check`. An invalid value raises a `ValueError`, whose text is a predicate: the caller writes the setting's
name before it, and for `taken` also the value.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import parse_qs, urlsplit

from candle_vllm.core.errors import with_extra

_UNITS = {
    "": 1,
    "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12,
    "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40,
}  # fmt: skip
_SIZE = re.compile(r"([+-]?\d{1,20}(?:\.\d{1,20})?)([kmgtKMGT]?)", re.ASCII)
_NUMBER = re.compile(r"[+-]?(\d{1,20}(\.\d{0,20})?|\.\d{1,20})([eE][+-]?\d{1,2})?", re.ASCII)
_DEVICE = re.compile(r"auto|cpu|cuda(:(0|[1-9]\d{0,2}))?", re.ASCII)
_DEVICES = re.compile(r"cuda:(0|[1-9]\d{0,2})(,cuda:(0|[1-9]\d{0,2})){1,63}", re.ASCII)
_NUMBERED = re.compile(r"\d{1,3}", re.ASCII)
_REDIS_OPTIONS = frozenset({"ssl_ca_certs", "ssl_certfile", "ssl_keyfile"})
_APPLE = ("metal", "mps")
_NO_METAL = "is Apple's GPU, which is not supported: set cpu, which auto chooses there as well"
_SWITCHES = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}
_BLANKS = re.compile("[\xa0\u1680\u2000-\u200a\u200c\u200d\u202f\u205f\u3000]")
"""Unicode's spaces and joiners, which occur in names of files, and which `str.isprintable` refuses."""
_MAX_TEXT = 4096
MAX_TEMPLATE = 128 << 10  # characters of a chat template; the largest known one has 17 thousand
_MAX_FREE_TEXT = 1 << 20


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ` (did you mean X?)` for the closest known name, or an empty text."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]}?)" if close else ""


def shown_number(value: object) -> str:
    """Format a value for a message; Python refuses to format very long integers, or to make them floats."""
    if isinstance(value, int) and abs(value) >= 10**20:
        return "a number with more than 20 digits"
    return f"{value:g}" if isinstance(value, float) else f"{value!r:.60}"


class Kind(Protocol):
    """Type of a setting, which reads and checks values."""

    def from_text(self, text: str) -> Any:
        """Parse a text, by default one that is the value; raises ValueError for an invalid text."""
        return self.check(text)

    def check(self, value: Any) -> Any:
        """Return the value in its usual form; raises ValueError if it is not allowed."""


class EngineKind(Kind, Protocol):
    """Type of an engine's settings."""

    def taken(self, value: Any) -> Any:
        """Convert a typed value to the engine's form; raises ValueError for an invalid value."""


class Located:
    """Base of the kinds of paths, which in a file may be relative to the file's folder."""

    def beside(self, value: Any, folder: Path) -> Any:
        """Resolve a checked value of a settings file: a relative path is relative to `folder`, the file's folder."""
        return folder / value if isinstance(value, Path) else value


@dataclass(frozen=True)
class Text(Kind):
    """A text; from command lines and files not empty, and without control characters."""

    most: int = _MAX_TEXT

    def taken(self, value: Any) -> str:
        if not isinstance(value, str):
            raise ValueError(f"is not a string (got {type(value).__name__})")
        return value

    def check(self, value: Any) -> str:
        if not isinstance(value, str):
            raise ValueError(f"must be a text, not {value!r:.60}")
        if not value.strip():
            raise ValueError("must not be empty: leave it out or give a value")
        if len(value) > self.most or not _BLANKS.sub("", value).isprintable():
            raise ValueError(f"must be at most {self.most} printable characters")
        return value


@dataclass(frozen=True)
class Hosts(Kind):
    """Hosts, separated by commas, to which clients' URLs may lead; see `targets.check_pattern`."""

    most: int = 512

    def taken(self, value: Any) -> tuple[str, ...]:
        given = [value] if isinstance(value, str) else value
        if not isinstance(given, (list, tuple)) or not all(isinstance(each, str) for each in given):
            raise ValueError("is neither a string nor a list of strings")
        return tuple(host.strip() for each in given for host in self.check(each).split(","))

    def check(self, value: Any) -> str:
        from candle_vllm.core.targets import check_pattern  # imported here: only programs with such hosts need it

        for host in Text(self.most).check(value).split(","):
            check_pattern(host.strip())
        return value


@dataclass(frozen=True)
class RedisUrl(Text):
    """URL of a Redis server, which needs the package redis. Errors do not show it, because it may have a password."""

    def taken(self, value: Any) -> str:
        return self.check(super().taken(value))

    def check(self, value: Any) -> str:
        url = super().check(value)
        expected = "must be redis://[user:password@]host[:port][/db], rediss://... or unix://path"
        try:
            parts = urlsplit(url)
            _ = parts.port
        except ValueError:  # the exception may contain a password with a slash
            raise ValueError(f"{expected}; its host or port is not valid") from None
        is_socket, database = parts.scheme == "unix", parts.path.strip("/")
        if parts.scheme not in ("redis", "rediss", "unix") or not (parts.hostname or is_socket):
            raise ValueError(expected)
        if database and not database.isdecimal() and not is_socket:
            raise ValueError(f"{expected}: the database is a number")
        if unknown := sorted(parse_qs(parts.query, keep_blank_values=True).keys() - _REDIS_OPTIONS):
            options = ", ".join(sorted(_REDIS_OPTIONS))
            raise ValueError(f"has {', '.join(unknown)[:100]}, which cannot be set there; {options} can")
        if importlib.util.find_spec("redis") is None:
            raise ValueError(f"needs the package redis: {with_extra('redis')}")
        return url


@dataclass(frozen=True)
class FreeText(Kind):
    """Text of `least` to `most` characters for the model; it may have line breaks."""

    most: int = _MAX_FREE_TEXT
    least: int = 1

    def check(self, value: Any) -> str:
        if not isinstance(value, str):
            raise ValueError(f"must be a text, not {value!r:.60}")
        if not self.least <= len(value) <= self.most:
            raise ValueError(f"must have {self.least} to {self.most} characters, not {len(value)}")
        try:
            value.encode()
        except UnicodeEncodeError as error:  # a lone surrogate: a non-UTF-8 byte of the command line, or \ud800
            raise ValueError(f"must be UTF-8: character {error.start + 1} is not") from None
        return value


@dataclass(frozen=True)
class Secret(Kind):
    """A key or token: printable ASCII without spaces. It is never repeated in a message."""

    def check(self, value: Any) -> str:
        plain = isinstance(value, str) and value.isascii() and value.isprintable() and " " not in value
        if not plain or not 0 < len(value) <= _MAX_TEXT:
            raise ValueError(f"must be 1 to {_MAX_TEXT} printable ASCII characters without spaces")
        return value


@dataclass(frozen=True)
class FilePath(Located):
    """A path of this machine; in texts `~` is the home folder."""

    def taken(self, value: Any) -> Path:
        if not isinstance(value, (str, Path)) or value == "":
            raise ValueError("is not a path")
        return Path(value)

    def from_text(self, text: str) -> Path:
        return self.check(Path(Text().from_text(text)))

    def check(self, value: Any) -> Path:
        if not isinstance(value, Path):
            raise ValueError(f"must be a path, not {value!r:.60}")
        try:
            return value.expanduser()
        except RuntimeError:
            raise ValueError(f"names the home folder of an unknown user, {value.parts[0]}: write ~/ or ./") from None


@dataclass(frozen=True)
class PathOrName(Text, Located):
    """A path as a text if it exists, otherwise a name, such as an id on Hugging Face."""

    def beside(self, value: str, folder: Path) -> str:
        path = folder / os.path.expanduser(value)
        return str(path) if os.path.exists(path) else value


@dataclass(frozen=True)
class OnOffFolder(Text, Located):
    """`on`, `off`, or a folder. YAML reads the two as Booleans if they have no quotation marks."""

    def check(self, value: Any) -> str:
        return super().check(("off", "on")[value] if isinstance(value, bool) else value)

    def beside(self, value: str, folder: Path) -> str:
        return value if value in ("on", "off") else str(folder / os.path.expanduser(value))


@dataclass(frozen=True)
class TemplateFile(Located):
    """A file with a Jinja template, or the template itself, which has Jinja's braces."""

    def from_text(self, text: str) -> Path | str:
        return self.check(text) if _is_template(text) else FilePath().from_text(text)

    def check(self, value: Any) -> Path | str:
        if not (isinstance(value, str) and _is_template(value)):
            return FilePath().check(value)
        if len(value) > MAX_TEMPLATE:
            raise ValueError(f"has more than {MAX_TEMPLATE} characters")
        return value


def _is_template(text: str) -> bool:
    return "{%" in text or "{{" in text


@dataclass(frozen=True)
class Integer:
    """A whole number in a range. Sizes may end in k, m, g, t (powers of 1000) or K, M, G, T (powers of 1024).

    Only `taken` checks `power_of_two`. With `auto`, the texts "auto" and "-1" mean None; with `whole`, "all" is `high`.
    """

    low: int
    high: int
    units: bool = True
    power_of_two: bool = False
    auto: bool = False
    whole: bool = False

    def taken(self, value: Any) -> int:
        if self.units and isinstance(value, str) and value[:1].isdecimal() and not value[-1:].isdecimal():
            return self.taken(self.from_text(value))  # "8K", as in flags
        if isinstance(value, bool) or not isinstance(value, int) or not self.low <= value <= self.high:
            raise ValueError(f"is not a whole number between {self.low} and {self.high}")
        if self.power_of_two and value & (value - 1):
            raise ValueError(f"is not a power of two: try {min(1 << round(math.log2(value)), self.high)}")
        return value

    def from_text(self, text: str) -> int | None:
        if self.auto and text.strip() in ("auto", "-1"):
            return None
        if self.whole and text.strip() == "all":
            return self.high
        match = _SIZE.fullmatch(text.strip())
        if match is None or (match[2] and not self.units):
            raise ValueError(f"must be a whole number, not {text!r:.60}{self._hint()}")
        value = Decimal(match[1]) * _UNITS[match[2]]
        if value != int(value):
            raise ValueError(f"must be a whole number, not {text!r:.60}")
        return self.check(int(value))

    def check(self, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"must be a whole number, not {value!r:.60}")
        if not self.low <= value <= self.high:
            raise ValueError(f"must be between {self.low} and {self.high}, not {shown_number(value)}")
        return value

    def _hint(self) -> str:
        return " (4096, 4k = 4000, 4K = 4096)" if self.units else ""


@dataclass(frozen=True)
class Seconds(Integer):
    """A time in whole seconds, without the suffixes of sizes: 10m would be ten million seconds, not ten minutes."""

    units: bool = False

    def _hint(self) -> str:
        return " (in seconds: 600 is ten minutes)"


SEED = Integer(-(1 << 63), (1 << 64) - 1)


@dataclass(frozen=True)
class Number:
    """A number in a range; `open_low` and `open_high` exclude its ends, `said` describes it in the error of `taken`."""

    low: float
    high: float
    open_low: bool = False
    open_high: bool = False
    said: str = ""

    def taken(self, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or self._outside(value):
            raise ValueError(f"is not a number {self.said}")
        return float(value)

    def from_text(self, text: str) -> float:
        if _NUMBER.fullmatch(text.strip()) is None:
            raise ValueError(f"must be a number, not {text!r:.60}")
        return self.check(float(text))

    def check(self, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"must be a number, not {value!r:.60}")
        if self._outside(value):
            low = "above" if self.open_low else "at least"
            high = "below" if self.open_high else "at most"
            raise ValueError(f"must be {low} {self.low:g} and {high} {self.high:g}, not {shown_number(value)}")
        assert math.isfinite(value)
        return float(value)

    def _outside(self, value: float) -> bool:
        at_end = (self.open_low and value == self.low) or (self.open_high and value == self.high)
        return at_end or not self.low <= value <= self.high


@dataclass(frozen=True)
class Boolean:
    """true or false."""

    def taken(self, value: Any) -> bool:
        if not isinstance(value, bool):
            raise ValueError("is neither True nor False")
        return value

    def from_text(self, text: str) -> bool:
        if text.strip().lower() not in _SWITCHES:
            raise ValueError(f"must be true or false, not {text!r:.60}")
        return _SWITCHES[text.strip().lower()]

    def check(self, value: Any) -> bool:
        if not isinstance(value, bool):
            raise ValueError(f"must be true or false, not {value!r:.60}")
        return value


@dataclass(frozen=True)
class JsonObject(Located):
    """A JSON object; the code that uses it checks its contents. `kinds`, by key, tells `beside` which are paths."""

    most: int = 1 << 16
    kinds: Mapping[str, Any] = field(default_factory=dict)

    def taken(self, value: Any) -> Mapping[str, Any]:
        if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
            raise ValueError("is not a dict with string keys")
        return dict(value)

    def from_text(self, text: str) -> Mapping[str, Any]:
        if len(text) > self.most:
            raise ValueError(f"must be at most {self.most} characters")
        try:
            return self.check(json.loads(text))
        except (json.JSONDecodeError, RecursionError):
            raise ValueError(f"must be a JSON object, not {text!r:.60}") from None

    def check(self, value: Any) -> Mapping[str, Any]:
        if not isinstance(value, Mapping):
            raise ValueError(f"must be a JSON object, not {value!r:.60}")
        return dict(value)

    def beside(self, value: Any, folder: Path) -> Any:
        kinds = {name: self.kinds.get(name) for name, each in value.items() if isinstance(each, str)}
        paths = {name: kind.beside(value[name], folder) for name, kind in kinds.items() if isinstance(kind, Located)}
        return {**value, **paths}


@dataclass(frozen=True)
class Choice:
    """One of a few names; `aliases` are other spellings, `absent` explains why names of other programs are missing."""

    names: tuple[str, ...]
    aliases: Mapping[str, str] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)

    def taken(self, value: Any) -> str:
        name = self.aliases.get(Text().taken(value), value)
        if name not in self.names:
            why = f": {self.absent[name]}" if name in self.absent else ""
            raise ValueError(f"is not one of {', '.join(self.names)}{why}")
        return name

    def from_text(self, text: str) -> str:
        return self.check(self.aliases.get(text.strip().lower(), text.strip().lower()))

    def check(self, value: Any) -> str:
        if value not in self.names:
            if isinstance(value, str) and value in self.absent:
                raise ValueError(f"must be one of {', '.join(self.names)}: {self.absent[value]}")
            hint = nearest(str(value)[:60], self.names)
            raise ValueError(f"must be one of {', '.join(self.names)}, not {value!r:.60}{hint}")
        return value


@dataclass(frozen=True)
class QuantisedType(Choice):
    """Name of a quantisation type: q4k or Q4K; for `taken` also q4_k. llama.cpp's mixtures (q4_k_m) are not types."""

    def taken(self, value: Any) -> str:
        name = Text().taken(value).strip().lower()
        if name in self.names or (name := name.replace("_k", "k")) in self.names:
            return name
        main = re.sub("_[sml]$", "", name)
        hint = f"; {value!r:.60} is a mixture of types, mostly {main}" if main in self.names else ""
        raise ValueError(f"is not one of {', '.join(self.names)}{hint}")


@dataclass(frozen=True)
class Device:
    """`auto`, `cpu`, `cuda`, `cuda:N` (in texts also N alone); with `several` also a list of GPUs."""

    several: bool = False

    def taken(self, value: Any) -> str:
        kind = _DEVICE if not self.several or "," not in Text().taken(value) else _DEVICES
        if not kind.fullmatch(Text().taken(value)):
            more = ", cuda:N,cuda:M" if self.several else ""
            raise ValueError(_NO_METAL if value.lower() in _APPLE else f"is not one of auto, cpu, cuda, cuda:N{more}")
        return value

    def from_text(self, text: str) -> str:
        parts = [part.strip() for part in text.lower().split(",")]
        return self.check(",".join(f"cuda:{int(part)}" if _NUMBERED.fullmatch(part) else part for part in parts))

    def check(self, value: Any) -> str:
        if self.several and isinstance(value, str) and _DEVICES.fullmatch(value):
            return value
        if isinstance(value, str) and value.lower() in _APPLE:
            raise ValueError(_NO_METAL)
        if not isinstance(value, str) or _DEVICE.fullmatch(value) is None:
            several = ", or several GPUs as cuda:N,cuda:M" if self.several else ""
            raise ValueError(f"must be auto, cpu, cuda or cuda:N{several}, not {value!r:.60}")
        return value
