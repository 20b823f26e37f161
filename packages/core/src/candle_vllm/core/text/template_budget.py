# SPDX-License-Identifier: MIT
"""Limits of one rendering of a chat template: processor time and text (step 3 of a request).

Templates are programs in model files. Every loop iteration, macro, operator, filter and call of a sandboxed template
reports here first, so that a rendering that would take too much time or memory ends with a reason.
"""

from __future__ import annotations

import time
from collections.abc import ItemsView, KeysView, Mapping, Sequence, Set, ValuesView
from contextvars import ContextVar

from jinja2.exceptions import TemplateRuntimeError

MAX_SECONDS = 1.0  # of this thread's processor time, so that a busy machine does not fail a good template
MAX_TEXT = 16 << 20  # characters of a single text
MAX_WORK = 512 << 20  # bytes of all texts and lists that a rendering creates
MAX_INTEGER_BITS = 4096
_WIDE = 4  # maximum bytes of a character outside ASCII
_OPAQUE = 64  # characters that are counted for any other object
CONTAINERS = (Mapping, KeysView, ValuesView, ItemsView, list, tuple, set, frozenset)


class BudgetExceededError(TemplateRuntimeError):
    """The rendering exceeded a limit."""


class Budget:
    """Counters of one rendering."""

    __slots__ = ("_deadline", "_work")

    def __init__(self) -> None:
        self._deadline = time.thread_time() + MAX_SECONDS
        self._work = 0

    def check_time(self) -> None:
        """Raise an error if the time is used up."""
        if time.thread_time() > self._deadline:
            raise BudgetExceededError(f"it took more than {MAX_SECONDS:g} s of processor time")

    def spend(self, size: int) -> None:
        """Count `size` bytes of a new text or list, before it is created."""
        self.check_time()
        self._work += size
        if self._work > MAX_WORK:
            raise BudgetExceededError(f"it built more than {MAX_WORK >> 20} MiB of text")

    def spend_text(self, length: int, *, ascii_only: bool = False) -> None:
        """Count a text of `length` characters, before it is created."""
        if length > MAX_TEXT:
            raise BudgetExceededError(f"it would build a text of {length} characters; at most {MAX_TEXT} are allowed")
        self.spend(length if ascii_only else length * _WIDE)

    def spend_value(self, value: object) -> None:
        """Count a value that was just created."""
        if isinstance(value, str):
            self.spend_text(len(value), ascii_only=value.isascii())
        elif isinstance(value, (list, tuple)):
            self.spend(8 * len(value))
        else:
            self.check_time()

    def measure(self, value: object) -> int:
        """Estimate the length of `value` as text, at least half the true length; raise an error above `MAX_TEXT`."""
        return _measure(value, MAX_TEXT, self)


# The current rendering of this thread or task; only `ChatTemplate` sets it.
current_budget: ContextVar[Budget | None] = ContextVar("template budget", default=None)


def budget() -> Budget:
    """Return the counters of the current rendering; new ones without a rendering (while a template is compiled)."""
    return current_budget.get() or Budget()


def _measure(value: object, room: int, spent: Budget) -> int:
    if isinstance(value, str):
        return len(value) + 2
    if isinstance(value, Mapping):
        parts: Sequence[object] | Set[object] = [part for pair in value.items() for part in pair]
    elif isinstance(value, (KeysView, ValuesView, ItemsView)):
        parts = list(value)
    elif isinstance(value, (list, tuple, set, frozenset)):
        parts = value
    else:
        return _OPAQUE
    total = 2
    spent.check_time()
    for part in parts:
        total += _measure(part, room - total, spent) + 2
        if total > room:
            raise BudgetExceededError(f"it would build a text of more than {MAX_TEXT} characters")
    return total
