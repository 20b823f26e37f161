# SPDX-License-Identifier: MIT
"""The Jinja environment in which chat templates run (step 3 of a request).

Jinja's immutable sandbox prevents a template from reaching into Python. This sandbox also limits time and memory: the
parsed template is rewritten so that every loop iteration, macro body, output, `~`, slice, key and comparison of
variables calls `Limits`. `Sandbox` checks calls and the operators + * ** % by `template_limits`. Jinja's own
filters and tests first check the size of their arguments; one filter and two functions are transformers'.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from types import GeneratorType
from typing import Any

from jinja2 import filters, nodes, tests
from jinja2.exceptions import SecurityError, TemplateError, TemplateRuntimeError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from candle_vllm.core.text import template_limits
from candle_vllm.core.text.template_limits import (
    CONTAINERS,
    BudgetExceededError,
    budget,
    check_compared,
    check_format,
    check_method,
    check_operator,
)


class Generation(Extension):
    """`{% generation %}`, which marks the assistant's part for training; rendering leaves its contents unchanged."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own declaration)

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Limits(Extension):
    """Functions that the rewritten template calls. A template cannot name an extension, so it cannot replace them."""

    def tick(self, size: int = 0) -> bool:
        """Check the time, count `size` characters of fixed text, and return True, for use in conditions."""
        budget().spend(size)
        return True

    def emit(self, value: Any, size: int) -> Any:
        """Count a text or container that will be written, and `size` characters of fixed text with it."""
        spent = budget()
        spent.spend(size)
        if isinstance(value, str):
            spent.spend_text(len(value), ascii_only=value.isascii())
        elif isinstance(value, CONTAINERS):
            spent.spend_text(spent.measure(value))
        return value

    def concat(self, *values: Any) -> str:
        """Compute `a ~ b`."""
        spent = budget()
        narrow = all(v.isascii() if isinstance(v, str) else isinstance(v, (int, float)) for v in values)
        spent.spend_text(sum(map(spent.measure, values)), ascii_only=narrow)
        return "".join(map(str, values))

    def cut(self, value: Any, start: Any = None, stop: Any = None, step: Any = None) -> Any:
        """Compute `value[start:stop:step]`."""
        piece = value[start:stop:step]
        budget().spend_value(piece)
        return piece

    def compared(self, value: Any) -> Any:
        """Check a value that will be compared or hashed, and return it."""
        check_compared(value)
        return value


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja environment with limits; make templates with `compile_template`."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols, Limits])
        self.filters = guarded_filters()
        self.tests = {name: _measured(test) if name in _COMPARING else test for name, test in tests.TESTS.items()}
        self.globals.pop("lipsum")
        self.globals |= dict[str, Any](
            raise_exception=raise_exception, strftime_now=strftime_now, dict=_make_dict, namespace=TemplateNamespace
        )

    def compile_template(self, tree: nodes.Template) -> Any:
        """Rewrite a parsed tree and return its template."""
        rewritten = _Rewriter().visit(tree)
        rewritten.set_environment(self)
        return self.from_string(rewritten)

    def call(self, context: Context, obj: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        check_method(obj, args, kwargs)
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        check_operator(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def getitem(self, obj: Any, argument: Any) -> Any:
        if isinstance(argument, tuple):
            check_compared(argument)
        return super().getitem(obj, argument)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        if value.__name__ != "format":
            raise SecurityError(f"str.{value.__name__} is not available in chat templates")
        pattern: str = value.__self__

        def format_checked(*args: Any, **kwargs: Any) -> str:
            check_format(pattern, args, kwargs)
            return wrapped(*args, **kwargs)

        return format_checked


class TemplateNamespace(Namespace):
    """Jinja's namespace without contents in its `repr`, and without names that begin with `_` (internals)."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # the signature leaves the name `self` to templates
        self, rest = args[0], args[1:]
        check_compared(*rest)
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<namespace>"


def _check_name(name: object) -> None:
    if not isinstance(name, str) or name.startswith("_"):
        raise SecurityError(f"a namespace cannot have an attribute {name!r:.60}")


def _make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    check_compared(*args)
    return dict(*args, **kwargs)


def _call(name: str, arguments: list[nodes.Expr], lineno: int) -> nodes.Call:
    target = nodes.ExtensionAttribute(Limits.identifier, name)
    return nodes.Call(target, arguments, [], None, None).set_lineno(lineno, override=True)  # type: ignore[return-value]


class _Rewriter(NodeTransformer):
    """Inserts the calls of `Limits` into a parsed template."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, _statement(node.lineno))
        if node.test is not None:
            node.test = nodes.And(_call("tick", [], node.lineno), node.test).set_lineno(node.lineno)
        return node

    def visit_Macro(self, node: nodes.Macro | nodes.CallBlock) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, _statement(node.lineno))
        return node

    visit_CallBlock = visit_Macro

    def visit_Output(self, node: nodes.Output) -> nodes.Node | list[nodes.Node]:
        self.generic_visit(node)
        size = sum(len(part.data) for part in node.nodes if isinstance(part, nodes.TemplateData))
        values = [index for index, part in enumerate(node.nodes) if not isinstance(part, nodes.TemplateData)]
        for index in values:
            node.nodes[index] = _call("emit", [node.nodes[index], nodes.Const(size)], node.lineno)
            size = 0  # the first value has counted the fixed text
        return node if values else [_statement(node.lineno, size), node]

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call("concat", node.nodes, node.lineno)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        bounds = [part or nodes.Const(None) for part in (node.arg.start, node.arg.stop, node.arg.step)]
        return _call("cut", [node.node, *bounds], node.lineno)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        operands = [node.expr, *(operand.expr for operand in node.ops)]
        if sum(not _is_flat(operand) for operand in operands) > 1:  # comparing with a constant is fast
            node.expr = _compared(node.expr)
            for operand in node.ops:
                operand.expr = _compared(operand.expr)
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:
        self.generic_visit(node)
        node.key = _compared(node.key)
        return node


def _is_flat(node: nodes.Expr) -> bool:
    """Whether an expression is a constant, or a list or tuple of constants."""
    items = node.items if isinstance(node, (nodes.List, nodes.Tuple)) else [node]
    return all(isinstance(item, nodes.Const) for item in items)


def _compared(node: nodes.Expr) -> nodes.Expr:
    return node if _is_flat(node) else _call("compared", [node], node.lineno)


def _statement(lineno: int, size: int = 0) -> nodes.Node:
    return nodes.ExprStmt(_call("tick", [nodes.Const(size)], lineno)).set_lineno(lineno)


# ---- filters, tests and functions ------------------------------------------------------------------------------------


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
