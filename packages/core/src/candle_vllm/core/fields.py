# SPDX-License-Identifier: MIT
"""Typed, strict access to values of `config.json` and GGUF metadata. Errors of `Fields` name the file and the key."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError

T = TypeVar("T", int, float, bool, str, list, dict)

MAX_CONFIG_BYTES = 16 << 20
MAX_COUNT = 1 << 24
"""Maximum number of tokens, rows, columns or heads in a config."""

_REQUIRED: Any = object()


class Fields:
    """Typed access to a mapping from a file; every key has the prefix (GGUF keys begin with the architecture)."""

    def __init__(self, values: Mapping[str, Any], path: Path, prefix: str = "") -> None:
        self.values = values
        self.path = path
        self.prefix = prefix

    def __contains__(self, key: str) -> bool:
        return self.values.get(self.prefix + key) is not None

    def get(self, key: str, kind: type[T], default: Any = _REQUIRED) -> T:
        """Return the value of `key`, which must be of `kind` (a finite float); `default` if it is absent or null.

        An int may be stored as 512.0, and a number of GGUF metadata as a list of equal entries, one for each layer.
        """
        value: Any = self.values.get(self.prefix + key)
        if value is None:
            if default is _REQUIRED:
                raise InvalidFileError(f"{self.path}: {self.prefix + key} is missing")
            return default
        value = self._number(key, value, kind)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise InvalidFileError(f"{self.path}: {self.prefix + key} is {value!r:.80}, not a {kind.__name__}")
        return value

    def _number(self, key: str, value: Any, kind: type) -> Any:
        """Convert a stored value to a number of `kind` if possible; return other values unchanged."""
        if kind in (int, float, bool) and hasattr(value, "__len__") and not isinstance(value, (str, dict)):
            layers = list(value)
            if layers and len(layers) == self.values.get(f"{self.prefix}block_count"):
                if any(each != layers[0] for each in layers):
                    said = f"{self.path}: {self.prefix + key} is {value!r:.80}"
                    raise UnsupportedModelError(f"{said}: layers of different sizes are not implemented")
                value = layers[0].item() if hasattr(layers[0], "item") else layers[0]
        if kind is int and isinstance(value, float) and value.is_integer():
            return int(value)  # some exporters write a count as 512.0
        if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            try:
                number = float(value)
            except OverflowError:  # an integer above 1.8e308
                number = math.inf
            if not math.isfinite(number):
                raise InvalidFileError(f"{self.path}: {self.prefix + key} is {value!r:.40}, not a finite number")
            return number
        return value

    def count(self, key: str, default: Any = _REQUIRED, *, most: int = MAX_COUNT) -> int:
        """Return an integer from 1 to `most`; `default`, which is not checked, if the key is absent or null."""
        value = self.get(key, int, default)
        if value is not default and not 0 < value <= most:
            raise InvalidFileError(f"{self.path}: {self.prefix + key} is {value!r:.40}; it must be 1 to {most}")
        return value

    def choice(self, key: str, default: str, *allowed: str) -> str:
        """Return a string that must be one of `allowed`; an absent or null key counts as `default`."""
        value = self.get(key, str, default)
        if value not in allowed:
            raise UnsupportedModelError(
                f"{self.path}: {self.prefix + key} is {value!r}; implemented: {', '.join(allowed)}"
            )
        return value

    def section(self, key: str) -> Fields:
        """Return the fields of a nested mapping, which have no prefix; none if the key is absent or null."""
        return Fields(self.get(key, dict, {}), self.path)

    def with_defaults(self, **values: Any) -> Fields:
        """Return these fields with values for the keys, without the prefix, that are absent or null."""
        given = {key: value for key, value in self.values.items() if value is not None}
        return Fields(given, self.path, self.prefix).with_absent(**values)

    def with_absent(self, **values: Any) -> Fields:
        """Return these fields with values for the keys, without the prefix, that are absent; null stays null."""
        usual = {self.prefix + key: value for key, value in values.items()}
        return Fields({**usual, **self.values}, self.path, self.prefix)

    def token_ids(self, key: str, *, lowest: int = 0) -> tuple[int, ...]:
        """Return one token id, from `lowest` to 2^24, or a list of token ids, as a tuple; () if absent."""
        value = self.values.get(self.prefix + key)
        ids: list[Any] = [] if value is None else value if isinstance(value, list) else [value]
        ids = [int(item) if isinstance(item, float) and item.is_integer() else item for item in ids]
        if not all(type(item) is int and lowest <= item <= MAX_COUNT for item in ids):
            raise InvalidFileError(
                f"{self.path}: {self.prefix + key} is {value!r:.80}, not a token id or a list of them"
            )
        return tuple(ids)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file of at most 16 MiB."""
    value = read_any_json(path)
    if not isinstance(value, dict):
        raise InvalidFileError(f"{path}: must be a JSON object")
    return value


def read_any_json(path: Path) -> object:
    """Read any JSON value from a file of at most 16 MiB."""
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise InvalidFileError(f"{path}: larger than {MAX_CONFIG_BYTES} bytes")
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidFileError(f"{path}: cannot be read as JSON: {error}") from error
