# SPDX-License-Identifier: MIT
"""How objects that a library's user meets are written out: short, for a person at a prompt, whatever they hold."""

from __future__ import annotations

import enum
import reprlib
from array import array
from collections.abc import Sequence
from typing import Any, ClassVar

import msgspec

_MOST = 6  # entries that are written out


class _Short(reprlib.Repr):
    """Writes values out: texts without their middle, of lists and vectors the beginning and how many there are."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = 80
        self.maxother = 300
        self.maxdict = self.maxset = self.maxfrozenset = _MOST

    def repr_tuple(self, x: tuple[Any, ...], level: int) -> str:
        if len(x) == 1:
            return f"({self.repr1(x[0], level)},)"
        return f"({self._entries(x, level)})"

    def repr_list(self, x: list[Any], level: int) -> str:
        return f"[{self._entries(x, level)}]"

    def repr_array(self, x: array[Any], level: int) -> str:
        return f"[{self._entries([float(f'{value:.4g}') for value in x[:_MOST]], level, len(x))}]"

    def repr_instance(self, x: object, level: int) -> str:
        return repr(x.value) if isinstance(x, enum.StrEnum) else super().repr_instance(x, level)

    def _entries(self, values: Sequence[Any], level: int, length: int | None = None) -> str:
        length = len(values) if length is None else length
        most = 2 if values and isinstance(values[0], msgspec.Struct) else _MOST
        written = [self.repr1(value, level) for value in values[:most]]
        return ", ".join(written if length <= most else [*written, f"... {length} in all"])


_SHORT = _Short()


class ShownStruct(msgspec.Struct, frozen=True):
    """A base of structs that writes out what differs from the defaults, in a line or two.

    Attributes:
        unshown: fields that are left out always.
    """

    unshown: ClassVar[frozenset[str]] = frozenset()

    def __repr__(self) -> str:
        names, defaults = self.__struct_fields__, self.__struct_defaults__
        needed = [msgspec.NODEFAULT] * (len(names) - len(defaults))
        shown: list[str] = []
        for name, default in zip(names, [*needed, *defaults]):
            value = getattr(self, name)
            plain = type(value) is type(default) and value == default
            if name not in self.unshown and not plain:
                shown.append(f"{name}={_SHORT.repr(value)}")
        return f"{type(self).__name__}({', '.join(shown)})"
