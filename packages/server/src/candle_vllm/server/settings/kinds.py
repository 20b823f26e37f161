"""What a setting may hold: each kind turns text into a value and checks a value that is already typed.

Used before step 1 of a request's life, by the command line, the environment, `.env` and models.yaml alike. Every
refusal is a `ValueError` that says what is allowed; the caller puts the name of the setting before it. Nothing
here imports the engine, so that a mistyped flag is reported at once.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Protocol

from candle_vllm.core.errors import ConfigError

_UNITS = {
    "": 1,
    "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12,
    "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40,
}  # fmt: skip
_SIZE = re.compile(r"([+-]?\d{1,20}(?:\.\d{1,20})?)([kmgtKMGT]?)", re.ASCII)
_NUMBER = re.compile(r"[+-]?(\d{1,20}(\.\d{0,20})?|\.\d{1,20})([eE][+-]?\d{1,2})?", re.ASCII)
_MAX_TEXT = 4096
_MAX_FREE_TEXT = 1 << 20


class UsageError(ConfigError):
    """A command line, environment variable or settings file that cannot be understood."""


def nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean X?)` for the known name that is closest, or an empty text."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]}?)" if close else ""


def mapping(value: Any, where: str) -> Mapping[str, Any]:
    """A section of a settings file; UsageError where it is none."""
    if not isinstance(value, dict):
        raise UsageError(f"{where} must be a mapping of keys to values")
    return value


def known_keys(keys: Iterable[Any], known: Iterable[str], where: str) -> None:
    """UsageError for the first key that is not known, with the nearest one that is."""
    for key in keys:
        if key not in known:
            raise UsageError(f"{where}: unknown key {str(key)[:60]!r}{nearest(str(key), known)}")


class Kind(Protocol):
    """How one sort of value is read and checked."""

    def from_text(self, text: str) -> Any:
        """The value that `text` means; ValueError when it means none."""
        ...

    def check(self, value: Any) -> Any:
        """The value itself when it is allowed; ValueError otherwise."""
        ...


@dataclass(frozen=True)
class Text:
    """A text that is not empty, without control characters."""

    most: int = _MAX_TEXT

    def from_text(self, text: str) -> str:
        return self.check(text)

    def check(self, value: Any) -> str:
        if not isinstance(value, str):
            raise ValueError(f"must be a text, not {value!r:.60}")
        if not value.strip():
            raise ValueError("must not be empty: leave it out or give a value")
        if len(value) > self.most or not value.isprintable():
            raise ValueError(f"must be at most {self.most} printable characters")
        return value


@dataclass(frozen=True)
class FreeText:
    """What a person writes for the model: anything but nothing, line ends and blanks included."""

    most: int = _MAX_FREE_TEXT

    def from_text(self, text: str) -> str:
        return self.check(text)

    def check(self, value: Any) -> str:
        if not isinstance(value, str):
            raise ValueError(f"must be a text, not {value!r:.60}")
        if not 0 < len(value) <= self.most:
            raise ValueError(f"must have 1 to {self.most} characters, not {len(value)}")
        try:
            value.encode()
        except UnicodeEncodeError as error:  # Python's stand-in for a byte of the command line that is not UTF-8
            raise ValueError(f"must be UTF-8: character {error.start + 1} is not") from None
        return value


@dataclass(frozen=True)
class Secret:
    """A key or token: printable ASCII without spaces. It is never repeated in a message."""

    def from_text(self, text: str) -> str:
        return self.check(text)

    def check(self, value: Any) -> str:
        plain = isinstance(value, str) and value.isascii() and value.isprintable() and " " not in value
        if not plain or not 0 < len(value) <= _MAX_TEXT:
            raise ValueError(f"must be 1 to {_MAX_TEXT} printable ASCII characters without spaces")
        return value


@dataclass(frozen=True)
class FilePath:
    """A path of this machine; `~` is the home folder."""

    def from_text(self, text: str) -> Path:
        return self.check(Path(Text().from_text(text)))

    def check(self, value: Any) -> Path:
        if not isinstance(value, Path):
            raise ValueError(f"must be a path, not {value!r:.60}")
        return value.expanduser()


@dataclass(frozen=True)
class Integer:
    """A whole number in a range. Sizes may end in k, m, g, t (powers of 1000) or K, M, G, T (powers of 1024)."""

    low: int
    high: int
    units: bool = True

    def from_text(self, text: str) -> int:
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
            raise ValueError(f"must be between {self.low} and {self.high}, not {value}")
        return value

    def _hint(self) -> str:
        return " (4096, 4k = 4000, 4K = 4096)" if self.units else ""


@dataclass(frozen=True)
class Number:
    """A number in a range; `open_low` and `open_high` leave the ends out."""

    low: float
    high: float
    open_low: bool = False
    open_high: bool = False

    def from_text(self, text: str) -> float:
        if _NUMBER.fullmatch(text.strip()) is None:
            raise ValueError(f"must be a number, not {text!r:.60}")
        return self.check(float(text))

    def check(self, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"must be a number, not {value!r:.60}")
        outside = not self.low <= value <= self.high
        if outside or (self.open_low and value == self.low) or (self.open_high and value == self.high):
            low = "above" if self.open_low else "at least"
            high = "below" if self.open_high else "at most"
            raise ValueError(f"must be {low} {self.low:g} and {high} {self.high:g}, not {value:g}")
        assert math.isfinite(value)
        return float(value)


@dataclass(frozen=True)
class Boolean:
    """true or false."""

    def from_text(self, text: str) -> bool:
        known = {
            "true": True,
            "1": True,
            "yes": True,
            "on": True,
            "false": False,
            "0": False,
            "no": False,
            "off": False,
        }
        if text.strip().lower() not in known:
            raise ValueError(f"must be true or false, not {text!r:.60}")
        return known[text.strip().lower()]

    def check(self, value: Any) -> bool:
        if not isinstance(value, bool):
            raise ValueError(f"must be true or false, not {value!r:.60}")
        return value


@dataclass(frozen=True)
class Choice:
    """One of a few names; `aliases` are other spellings of them."""

    names: tuple[str, ...]
    aliases: Mapping[str, str]

    def from_text(self, text: str) -> str:
        return self.check(self.aliases.get(text.strip().lower(), text.strip().lower()))

    def check(self, value: Any) -> str:
        if value not in self.names:
            hint = nearest(str(value)[:60], self.names)
            raise ValueError(f"must be one of {', '.join(self.names)}, not {value!r:.60}{hint}")
        return value


@dataclass(frozen=True)
class Device:
    """`auto`, `cpu`, `cuda`, `cuda:N`, or N alone for a CUDA device."""

    def from_text(self, text: str) -> str:
        text = text.strip().lower()
        return self.check(f"cuda:{int(text)}" if re.fullmatch(r"\d{1,3}", text, re.ASCII) else text)

    def check(self, value: Any) -> str:
        if not isinstance(value, str) or re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", value, re.ASCII) is None:
            raise ValueError(f"must be one device, auto, cpu, cuda or cuda:N, not {value!r:.60}")
        return value
