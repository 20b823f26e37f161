# SPDX-License-Identifier: MIT
"""The Jinja environment in which chat templates run (step 3 of a request).

Jinja's immutable sandbox prevents a template from reaching into Python. This sandbox also limits time and memory: the
parsed template is rewritten so that every loop iteration, macro body, output, `~`, slice, key and comparison of
variables calls `Limits`. `Sandbox` checks calls and the operators + * ** % by `template_limits`; filters and tests come
from `template_filters`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from candle_vllm.core.text.template_filters import guarded_filters, guarded_tests, raise_exception, strftime_now
from candle_vllm.core.text.template_limits import (
    CONTAINERS,
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
        self.tests = guarded_tests()
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
