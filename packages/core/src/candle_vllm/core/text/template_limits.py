# SPDX-License-Identifier: MIT
"""What a chat template may use and do: time, text, operators, formats and methods (step 3 of a request).

Templates are programs in model files. Every loop iteration, macro, filter, call and output of a sandboxed template, and
every operator that can create a large value (+ * ** % ~), reports to the `Budget` of its rendering first, so that a
rendering that would take too much time or memory ends with a reason. Operations that can create a large value from
small ones are measured before they run, because Python cannot interrupt an operation. Of built-in types only the
methods listed here are allowed; the error names any other.
"""

from __future__ import annotations

import re
import string
import time
from collections.abc import ItemsView, Iterator, KeysView, Mapping, Sequence, Set, ValuesView
from contextvars import ContextVar
from typing import Any

from jinja2.exceptions import SecurityError, TemplateRuntimeError

MAX_SECONDS = 1.0  # of this thread's processor time, so that a busy machine does not fail a good template
MAX_TEXT = 16 << 20  # characters of a single text
MAX_WORK = 512 << 20  # bytes of all texts and lists that a rendering creates
SECONDS_EACH, WORK_EACH = 0.02, 1 << 20  # added for each message and tool: templates compare messages
MOST_EACH = 512  # maximum number of messages and tools that add to the limits
MAX_INTEGER_BITS = 4096
_SHORTEN = "shorten the conversation, or begin a new one"
_WIDE = 4  # maximum bytes of a character outside ASCII
_OPAQUE = 64  # characters that are counted for an object that is no text, container or large integer
_ESCAPED = 12  # upper bound of the characters that `repr` or `ascii` writes for one
_REPR_PART = 1 << 16  # characters of a text in a container whose escapes are counted at a time
CONTAINERS = (Mapping, KeysView, ValuesView, ItemsView, list, tuple, set, frozenset)
MAX_WIDTH = 10_000  # maximum width to which text may be padded
MAX_NEEDLE = 1024  # characters of a set to strip, or of a text searched from the right
_PERCENT = re.compile(r"[-+ #0]*+(\*|\d*+)(?:\.(\*|\d*+))?[hlL]?(.?)", re.DOTALL)  # after `%` and a key in brackets
_BRACKETS = re.compile(r"[()]")


class BudgetExceededError(TemplateRuntimeError):
    """The rendering exceeded a limit."""


class Budget:
    """Counters of one rendering; `parts` is the number of messages and tools."""

    __slots__ = ("_deadline", "_most_work", "_seconds", "_work")

    def __init__(self, parts: int = 0) -> None:
        self._seconds = MAX_SECONDS + min(parts, MOST_EACH) * SECONDS_EACH
        self._deadline = time.thread_time() + self._seconds
        self._most_work = MAX_WORK + min(parts, MOST_EACH) * WORK_EACH
        self._work = 0

    def check_time(self) -> None:
        """Raise an error if the time is used up."""
        if time.thread_time() > self._deadline:
            raise BudgetExceededError(f"it took more than {self._seconds:g} s of processor time; {_SHORTEN}")

    def spend(self, size: int) -> None:
        """Count `size` bytes of a new text or list, before it is created."""
        self.check_time()
        self._work += size
        if self._work > self._most_work:
            raise BudgetExceededError(f"it built more than {self._most_work >> 20} MiB of text; {_SHORTEN}")

    def spend_text(self, length: int, *, ascii_only: bool = False) -> None:
        """Count a text of `length` characters, before it is created."""
        if length > MAX_TEXT:
            raise BudgetExceededError(f"it would build a text of {length} characters; at most {MAX_TEXT} are allowed")
        self.spend(length if ascii_only else length * _WIDE)

    def spend_value(self, value: object) -> None:
        """Count a value after its creation."""
        if isinstance(value, str):
            self.spend_text(len(value), ascii_only=value.isascii())
        elif isinstance(value, (list, tuple)):
            self.spend(8 * len(value))
        else:
            self.check_time()

    def measure(self, value: object, *, written: bool = True) -> int:
        """Estimate the length of `value` as text, at least half the true length; refuse a container above `MAX_TEXT`.

        With `written=False`, escapes of characters that cannot be printed are not counted, which is faster.
        """
        return _measure(value, MAX_TEXT, self, escapes=written)


# Counters of the rendering or compilation in this thread or task; only `ChatTemplate` sets them.
current_budget: ContextVar[Budget | None] = ContextVar("template budget", default=None)


def budget() -> Budget:
    """Return the counters of the current rendering or compilation; new ones outside `ChatTemplate`."""
    return current_budget.get() or Budget()


def _measure(value: object, room: int, spent: Budget, *, escapes: bool, inside: bool = False) -> int:
    if isinstance(value, str):
        if not (escapes and inside) or value.isprintable():
            return len(value) + 2
        return sum(len(repr(value[at : at + _REPR_PART])) for at in range(0, len(value), _REPR_PART))
    if isinstance(value, int):
        return max(_OPAQUE, value.bit_length() // 3)
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
        total += _measure(part, room - total, spent, escapes=escapes, inside=True) + 2
        if total > room:
            raise BudgetExceededError(f"it would build a text of more than {MAX_TEXT} characters")
    return total


# --- operators ------------------------------------------------------------------------------------------------------


def check_operator(operator: str, left: Any, right: Any) -> None:
    """Measure `left operator right` for the operators + * ** %."""
    spent = budget()
    spent.check_time()
    if operator == "%" and isinstance(left, str):
        check_percent(left, right)
    elif operator == "**":
        _check_power(left, right)
    elif _is_number(left) and _is_number(right):
        bits = _bits(left) + _bits(right)
        if bits > MAX_INTEGER_BITS:
            raise BudgetExceededError(f"operands of {operator} have {bits} bits together; at most {MAX_INTEGER_BITS}")
    elif operator == "*":
        for value, times in ((left, right), (right, left)):
            if isinstance(value, (str, list, tuple)) and isinstance(times, int):
                _spend(value, len(value) * max(0, times))
    elif isinstance(left, str) and isinstance(right, str):
        spent.spend_text(len(left) + len(right), ascii_only=left.isascii() and right.isascii())
    elif isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
        spent.spend(8 * (len(left) + len(right)))


def _spend(value: object, length: int) -> None:
    if isinstance(value, str):
        budget().spend_text(length, ascii_only=value.isascii())
    else:
        budget().spend(8 * length)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float))


def _bits(value: Any) -> int:
    return value.bit_length() if isinstance(value, int) else 64


def _check_power(base: Any, exponent: Any) -> None:
    if isinstance(base, int) and isinstance(exponent, int) and _bits(base) * abs(exponent) > MAX_INTEGER_BITS:
        raise BudgetExceededError(f"{exponent} as an exponent makes an integer of more than {MAX_INTEGER_BITS} bits")


# --- formatting -----------------------------------------------------------------------------------------------------


def _width(digits: str | None) -> int:
    if digits == "*":
        raise BudgetExceededError("a format takes its width from a value, which is not allowed")
    if digits and (len(digits) > 5 or int(digits) > MAX_WIDTH):
        raise BudgetExceededError(f"a format asks for a width of {digits}; at most {MAX_WIDTH} is allowed")
    return int(digits or 0)


def check_percent(pattern: str, values: Any) -> None:
    """Measure `pattern % values`, whose fields are found as Python finds them."""
    longest, total, at = budget().measure(values), len(pattern), pattern.find("%")
    while at >= 0:
        at, depth = at + 1, int(pattern.startswith("(", at + 1))
        while depth and (bracket := _BRACKETS.search(pattern, at + 1)):
            at, depth = bracket.end() - 1, depth + (1 if bracket[0] == "(" else -1)
        match = _PERCENT.match(pattern, at + (pattern[at : at + 1] == ")"))
        assert match is not None
        escaped = _ESCAPED if match[3] in ("r", "a") else 2
        total += max(_width(match[1]), _width(match[2])) + longest * escaped
        at = pattern.find("%", match.end())
    budget().spend_text(total)


def check_format(pattern: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Measure `pattern.format(*args, **kwargs)`."""
    longest = max(map(budget().measure, (*args, *kwargs.values())), default=0)
    total = len(pattern)
    for _, name, spec, conversion in string.Formatter().parse(pattern):
        if name is None:
            continue
        if "{" in (spec or ""):
            raise BudgetExceededError("a format takes its width from a value, which is not allowed")
        escaped = _ESCAPED if conversion in ("r", "a") else 2
        total += escaped * longest + sum(_width(digits) for digits in re.findall(r"\d+", spec or ""))
    budget().spend_text(total)


# --- methods --------------------------------------------------------------------------------------------------------

# fmt: off
_TEXT_METHODS = frozenset((
    "capitalize", "casefold", "center", "count", "endswith", "find", "format", "index", "isalnum", "isalpha",
    "isascii", "isdecimal", "isdigit", "isidentifier", "islower", "isnumeric", "isprintable", "isspace",
    "istitle", "isupper", "join", "ljust", "lower", "lstrip", "partition", "removeprefix", "removesuffix",
    "replace", "rfind", "rindex", "rjust", "rpartition", "rsplit", "rstrip", "split", "splitlines",
    "startswith", "strip", "striptags", "swapcase", "title", "unescape", "upper", "zfill",
))
# fmt: on
_COMPARING = frozenset(("index", "count", "get", "changed"))
_METHODS: tuple[tuple[type, frozenset[str]], ...] = (
    (str, _TEXT_METHODS),
    (dict, frozenset(("get", "items", "keys", "values", "copy"))),
    (list, frozenset(("index", "count", "copy"))),
    (tuple, frozenset(("index", "count"))),
    (bool, frozenset()),
    (int, frozenset(("bit_length", "is_integer"))),
    (float, frozenset(("is_integer",))),
    (bytes, frozenset()),
)


def check_compared(*values: Any) -> None:
    """Measure values that will be compared or hashed.

    A list that contains another list twice, and so on for a hundred levels, is small, but comparing it takes 2^100
    steps, in one operation that cannot be interrupted.
    """
    for value in values:
        if isinstance(value, CONTAINERS):
            budget().measure(value, written=False)


def check_method(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Measure a call of a built-in method before it is made; refuse a method that is not in `_METHODS`."""
    budget().check_time()
    owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
    if name in _COMPARING:
        check_compared(*args)
        if isinstance(owner, (list, tuple)):
            check_compared(owner)
    for kind, allowed in _METHODS:
        if isinstance(owner, kind):
            if name not in allowed:
                raise SecurityError(f"{kind.__name__}.{name} is not available in chat templates")
            if isinstance(owner, str):
                _check_text_method(owner, name, args, kwargs)
            return


def _check_text_method(owner: str, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    first = args[0] if args else kwargs.get("sep")
    if name == "replace" and len(args) > 1:
        check_replace(owner, first, args[1])
    elif name == "join":
        check_join(first, owner)
    elif name in ("center", "ljust", "rjust", "zfill"):
        check_width(first)
    elif name in ("strip", "lstrip", "rstrip", "rfind", "rindex", "rpartition", "rsplit"):
        check_needle(first)
    if name in ("split", "rsplit"):
        pieces = owner.count(first) if isinstance(first, str) and first else len(owner) // 2
        budget().spend(64 * (pieces + 1))
    elif name == "splitlines":
        budget().spend(64 * len(owner) // 2)
    elif name in ("upper", "lower", "title", "capitalize", "casefold", "swapcase"):
        budget().spend_text(len(owner), ascii_only=owner.isascii())


def check_width(width: object) -> None:
    if isinstance(width, int) and abs(width) > MAX_WIDTH:
        raise BudgetExceededError(f"a text would be padded to {width} characters; at most {MAX_WIDTH} are allowed")


def check_needle(needle: object) -> None:
    if isinstance(needle, str) and len(needle) > MAX_NEEDLE:
        raise BudgetExceededError(f"it seeks or strips a text of {len(needle)} characters; at most {MAX_NEEDLE}")


def check_replace(text: object, old: object, new: object) -> None:
    text, old, new = str(text), str(old), str(new)
    found = text.count(old) if len(new) > len(old) else 0
    budget().spend_text(len(text) + found * max(0, len(new) - len(old)), ascii_only=text.isascii() and new.isascii())


def check_join(parts: object, separator: object) -> None:
    if isinstance(parts, str):
        budget().spend_text(len(parts) * (1 + len(str(separator))))
    elif isinstance(parts, Iterator):
        raise SecurityError("str.join takes no iterator in chat templates: use the filter join, or list before it")
    elif isinstance(parts, CONTAINERS):
        budget().spend_text(sum(map(budget().measure, parts)) + len(parts) * len(str(separator)))
