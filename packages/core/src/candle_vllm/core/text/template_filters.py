# SPDX-License-Identifier: MIT
"""Filters, tests and functions that chat templates may use (step 3 of a request).

Jinja's own filters and tests first check the size of their arguments. One filter and two functions are transformers'.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from types import GeneratorType
from typing import Any

from jinja2 import filters, tests
from jinja2.exceptions import TemplateError, TemplateRuntimeError

from candle_vllm.core.text import template_limits
from candle_vllm.core.text.template_limits import BudgetExceededError, budget

MAX_LIST = 100_000  # maximum rows or columns of a split list, and maximum entries to sort
MAX_SLOW_TEXT = 1 << 20  # characters, for filters that process a text in Python
_REFUSED_FILTERS = ("pprint", "urlize", "xmlattr", "wordwrap")
_SORTING = ("sort", "unique", "groupby", "dictsort", "min", "max")
_COMPARING = (
    "==", "eq", "equalto", "!=", "ne", ">", "gt", "greaterthan", ">=", "ge", "<", "lt", "lessthan", "<=", "le", "in",
)  # fmt: skip
_SLOW = ("title", "wordcount", "urlencode", "striptags", "list", "batch", "slice", "filesizeformat")
_FIRST = {"center": "width", "round": "precision", "batch": "linecount", "slice": "slices", "trim": "chars"}
_CALENDAR = re.compile(r"(?:%-?[A-Za-z%]|[^%])*")


def raise_exception(message: object) -> None:
    """Let a template refuse a conversation."""
    raise TemplateError(str(message)[:2000])


def strftime_now(pattern: str) -> str:
    """Return the local time in a format of `strftime`; transformers offers this function to templates."""
    if not isinstance(pattern, str) or len(pattern) > 256 or not _CALENDAR.fullmatch(pattern):
        raise TemplateRuntimeError(f"strftime_now cannot take {pattern!r:.60}: use plain fields such as %d %B %Y")
    return datetime.now().strftime(pattern)


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON without Jinja's escaping for HTML; the parameters are those of `json.dumps`."""
    margin = len(indent) if isinstance(indent, str) else indent or 0
    if margin > 64 or any(len(part) > 64 for part in separators or ()):
        raise BudgetExceededError("tojson takes at most 64 characters of indent and separators")
    size = budget().measure(value)
    if margin or separators:
        size += _nodes(value, 1) * (margin + 1)
    budget().spend_text(size, ascii_only=True)
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    budget().spend_value(text)
    return text


def _nodes(value: Any, depth: int) -> int:
    """Return an upper bound of the lines of indented JSON, each multiplied by its depth."""
    if isinstance(value, Mapping):
        parts = list(value.values())
    elif isinstance(value, (list, tuple)):
        parts = list(value)
    else:
        return depth
    return 2 * depth + sum(_nodes(part, depth + 1) for part in parts)


def _check_filter(name: str, value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    values = (*args, *kwargs.values())
    first = args[0] if args else kwargs.get(_FIRST.get(name, ""))
    _check_length(name, value)
    if name in _SORTING:
        template_limits.check_compared(value, *values)
    if name == "center":
        template_limits.check_width(first)
    elif name == "round" and isinstance(first, int) and abs(first) > 100:
        raise BudgetExceededError(f"round to {first} digits is not allowed; at most 100")
    elif name in ("batch", "slice"):
        if isinstance(first, int) and first > MAX_LIST:
            raise BudgetExceededError(f"{name} of {first}; at most {MAX_LIST} is allowed")
    elif name == "indent":
        width = kwargs.get("width", args[0] if args else 4)
        columns = len(width) if isinstance(width, str) else width if isinstance(width, int) else 0
        text = str(value)
        budget().spend_text(len(text) + (text.count("\n") + 1) * max(0, columns))
    elif name == "replace":
        template_limits.check_replace(
            value, *(kwargs.get(key, args[i] if len(args) > i else "") for i, key in enumerate(("old", "new")))
        )
    elif name == "format":
        template_limits.check_percent(str(value), kwargs or args)
    elif name == "trim":
        template_limits.check_needle(first)
    elif name == "int" and isinstance(value, str) and len(value) > template_limits.MAX_INTEGER_BITS // 4:
        if kwargs.get("base", args[1] if len(args) > 1 else 10) != 10:  # Python itself limits decimal digits
            raise BudgetExceededError(f"the int filter is given {len(value)} digits")
    elif name == "sum":
        start = kwargs.get("start", args[1] if len(args) > 1 else 0)
        if not isinstance(start, (int, float)):
            raise BudgetExceededError("the sum filter adds numbers only")
    elif name in ("string", "escape", "e", "forceescape", "urlencode"):
        budget().spend_text(budget().measure(value))


def _check_length(name: str, value: Any) -> None:
    length = len(value) if isinstance(value, (str, list, tuple, dict)) else 0
    if name in _SORTING and length > MAX_LIST:
        raise BudgetExceededError(f"the {name} filter is given {length} entries; at most {MAX_LIST} are allowed")
    if name in _SLOW and isinstance(value, str) and length > MAX_SLOW_TEXT:
        raise BudgetExceededError(
            f"the {name} filter is given {length} characters; at most {MAX_SLOW_TEXT} are allowed"
        )


def _ticking(items: Iterator[Any]) -> Iterator[Any]:
    for item in items:
        budget().check_time()
        yield item


def _joined(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the join filter: a generator, which it accepts, is converted to a list, so that it can be measured."""

    @functools.wraps(original)
    def join(eval_ctx: Any, value: Any, d: str = "", attribute: Any = None) -> Any:
        parts = value if isinstance(value, (str, list, tuple, dict)) else list(_ticking(iter(value)))
        template_limits.check_join(parts, d)
        return original(eval_ctx, parts, d, attribute)

    return join


def _guarded(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    # Jinja passes a marked filter the context, environment or evaluation context first, then the value.
    marked = hasattr(original, "jinja_pass_arg")

    @functools.wraps(original)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        budget().check_time()
        rest = args[1:] if marked else args
        if rest and name in _SORTING and isinstance(rest[0], Iterator):  # unlike an iterator, a list can be measured
            rest = (list(_ticking(rest[0])), *rest[1:])
            args = (*args[: 1 if marked else 0], *rest)
        if rest:
            _check_filter(name, rest[0], rest[1:], kwargs)
        result = original(*args, **kwargs)
        if isinstance(result, GeneratorType):
            return _ticking(result)
        budget().spend_value(result)
        return result

    return guarded


def guarded_tests() -> dict[str, Callable[..., Any]]:
    """Return Jinja's own tests; tests that compare values first check the size of the values."""
    return {name: _measured(test) if name in _COMPARING else test for name, test in tests.TESTS.items()}


def _measured(test: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(test)
    def measured(*values: Any) -> Any:
        template_limits.check_compared(*values)
        return test(*values)

    return measured


def guarded_filters() -> dict[str, Callable[..., Any]]:
    """Return Jinja's own filters with their checks, except `_REFUSED_FILTERS`, and transformers' `tojson`."""
    guarded = {
        name: _guarded(name, _joined(original) if name == "join" else original)
        for name, original in filters.FILTERS.items()
        if name not in _REFUSED_FILTERS
    }
    return guarded | {"tojson": tojson}
