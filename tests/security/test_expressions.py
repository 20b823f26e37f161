# SPDX-License-Identifier: MIT
"""Regular expressions take time in proportion to the text, whatever the text is.

`re` holds the interpreter's lock while it searches: an expression that tries every place to the end of the text again
stops all threads and the event loop. The expressions are collected from the syntax trees of all packages, and hostile
texts are made of each one's own structure: what leads to a repeat, what the repeat takes, many times, and then no end.

A text of 1 MB may take 2 s of the processor (`every_case`). The common run tries 64 KB in a sixteenth of that, and sees
whether four times the text takes four times as long, or sixteen times.
"""

from __future__ import annotations

import ast
import functools
import importlib
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from re import _compiler, _constants, _parser  # type: ignore[attr-defined]
from typing import Any, NamedTuple

import pytest

from candle_vllm.openai import json_body
from candle_vllm.openai.formats.channels import _RECIPIENT
from candle_vllm.openai.formats.reader import Markers
from candle_vllm.server.http.auth import origins

ROOT = Path(__file__).parents[2]
CALLS = ("compile", "match", "search", "fullmatch", "split", "sub", "subn", "findall", "finditer")
SMALL, COMMON, LARGE = 2_000, 64_000, 1_000_000  # characters
SECONDS = 2.0  # of the processor, for LARGE
SLOWEST = 3  # hostile texts of an expression that are tried at the larger sizes

NOT_FOREIGN = {
    "core.kernels.cpu_runtime.compiler._moved": "the code of our own kernels",
    "server.settings.options.split_host": "--host, the operator's",
    "server.settings.sources._KUBERNETES": "names of the process's own environment",
    "openai.formats.pythonic._ONE": "finds the strings of a text that _SUM took whole, in which every string ends",
}
"""Expressions that would be slow, and why no foreign text makes them so."""

USED = {
    "core.loading.source._QUANT": "tail",
    "core.shown._ADDRESSES": "search",
    "core.sampling.lark._TOKENS": "to a broken one",
    "core.sampling.unique_tokens._IN_STRING": "match",
    "core.sampling.unique_tokens._COMMA": "match",
    "core.sampling.unique_tokens._LEADS": "match",
    "core.sampling.unique_tokens._OPENS_NEXT": "fullmatch",
    "openai.formats.grammars.custom._TOKENS": "steps",
}
"""How expressions are used where the syntax does not say it; see `WAYS`."""

ESCAPED = ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<" * 40]  # literals, as most expressions are that are made
_EITHER = "|".join(map(re.escape, ESCAPED))
_MARKERS = Markers(ESCAPED[:3])
_HEADER = rf"(?:\s*(?:{_RECIPIENT.pattern}|{re.escape('<|constrain|>')}\s*\w*))*\s*"
MADE: dict[str, tuple[str, list[str | re.Pattern[Any]]]] = {
    "core.assembly.adapters._Fit._module": ("fullmatch", []),  # of families, see `of_tables`
    "core.loading.weights._match": ("fullmatch", []),
    "core.sampling.gbnf._first": ("fullmatch", ["[^a-z]"]),  # a class, for single characters
    "core.sampling.lark.Literals.__init__": ("search", [f"({_EITHER})"]),
    "core.testing.scripted_engine.ByteTokenizer.__init__": ("search", [f"({_EITHER})"]),
    "core.text.detokenizer._State.__init__": ("search", [r"[<\[]"]),
    "openai.formats.channels.Harmony._unended": ("match", [_HEADER]),
    "openai.formats.grammars.custom._class": ("fullmatch", ["[^a-z]"]),  # a set, for single characters
    "openai.formats.reader.Markers.__init__": ("search", [_MARKERS.pattern, _MARKERS._begun or ""]),
    "openai.formats.tagged.Tagged._call": ("fullmatch", []),  # of formats, see `of_tables`
    "openai.formats.tagged._Arguments._key": ("fullmatch", []),
    "openai.json_body._next": ("search", [row[1] for row in json_body._LIMITS]),
    "openai.protocol.fields.spelled": (
        "fullmatch",
        [r"[A-Za-z0-9._:-]{1,128}", r"[a-zA-Z0-9_-]{1,128}", r"[\w.\-:/]{1,256}"],
    ),
    "openai.task.Paths.blamed": ("search", [r"(?<![\w.])max_tokens(?!\w)"]),
    "responses.mcp.server_values.redactor": ("search", [_EITHER]),
    "server.http.auth.origins": ("fullmatch", [origins(["https://*.example.com", "http://localhost:*"])]),
}
"""Expressions that are made when a program runs: how they are used, and some that are made like them."""


class Expression(NamedTuple):
    """An expression and how it is used.

    Attributes:
        name: module and attribute, or module and the text of the call's argument.
        uses: names of `WAYS`.
    """

    name: str
    pattern: re.Pattern[Any]
    uses: frozenset[str]


# -- The expressions of the sources


@functools.cache
def sources() -> dict[str, str]:
    """The text of every module by its name below `candle_vllm`."""
    paths = [path for at in ("packages/*/src", "src") for path in ROOT.glob(f"{at}/candle_vllm/**/*.py")]
    found = {}
    for path in sorted(paths):
        parts = path.with_suffix("").parts[len(path.parts) - path.parts[::-1].index("candle_vllm") :]
        found[".".join(parts)] = path.read_text("utf-8")
    return found


class Tree:
    """A module's nodes, and which node each is in."""

    def __init__(self, name: str) -> None:
        self.body = ast.parse(sources()[name]).body
        self.nodes = [node for statement in self.body for node in ast.walk(statement)]
        self.parents = {child: node for node in self.nodes for child in ast.iter_child_nodes(node)}

    def place(self, node: ast.AST) -> Iterator[str]:
        """Names of the classes and functions around a node, the outermost first."""
        if node in self.parents:
            yield from self.place(self.parents[node])
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.name


tree = functools.cache(Tree)


def of_re(node: ast.AST) -> str:
    """The function of `re` that a node calls, or nothing."""
    func = getattr(node, "func", None)
    if not isinstance(func, ast.Attribute) or not isinstance(func.value, ast.Name) or func.value.id != "re":
        return ""
    return func.attr if func.attr in CALLS else ""


def patterns_in(value: Any) -> Iterator[re.Pattern[Any]]:
    """All expressions in tuples, lists and dicts."""
    if isinstance(value, re.Pattern):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from patterns_in(part)


def evaluated(call: ast.Call, name: str) -> re.Pattern[Any] | None:
    """The expression of a call whose arguments name nothing but what the module has."""
    given = [word.value for word in call.keywords if word.arg == "flags"]
    given += call.args[1 if of_re(call) == "compile" else 4 if of_re(call).startswith("sub") else 2 :]
    code = [compile(ast.Expression(part), name, "eval") for part in (call.args[0], *given)]
    for names in (lambda: {"re": re}, lambda: dict(vars(importlib.import_module(f"candle_vllm.{name}")))):
        try:
            pattern, *flags = (eval(part, names()) for part in code)  # of our own sources
        except NameError:
            continue
        return pattern if isinstance(pattern, re.Pattern) else re.compile(pattern, *flags)
    return None


@functools.cache
def collected() -> tuple[tuple[Expression, ...], frozenset[str]]:
    """All expressions, and the calls whose expression is known only when they run."""
    found: list[Expression] = []
    unknown: set[str] = set()
    attributes: dict[tuple[str, str], list[re.Pattern[Any]]] = {}
    for name, text in sources().items():
        if not re.search(rf"\bre\.(?:{'|'.join(CALLS)})\(", text):
            continue
        top = {
            node: statement
            for statement in tree(name).body
            if isinstance(statement, (ast.Assign, ast.AnnAssign))
            for node in ast.walk(statement)
            if of_re(node) == "compile"
        }
        for node, statement in top.items():
            target = statement.targets[0] if isinstance(statement, ast.Assign) else statement.target
            attributes[name, ast.unparse(target)] = _attribute(name, statement, node)
        for node in tree(name).nodes:
            if not isinstance(node, ast.Call) or not of_re(node) or node in top:
                continue
            place = ".".join([name, *tree(name).place(node)])
            if (pattern := evaluated(node, name)) is None:
                unknown.add(place)
            else:
                use = of_re(node) if of_re(node) in ("match", "fullmatch") else "search"
                found.append(Expression(place, pattern, frozenset({use})))
    used = uses(set(attributes))
    for (module, attribute), patterns in attributes.items():
        name = f"{module}.{attribute}"
        assert patterns, f"{name} has an expression that is not found"
        ways = frozenset({USED[name]}) if name in USED else frozenset(used.get((module, attribute), ()))
        found += [Expression(name, pattern, ways) for pattern in patterns]
    made = {**MADE, **of_tables()}
    for name, (use, some) in made.items():
        found += [Expression(name, re.compile(one), frozenset({use})) for one in some]
    return tuple(found), frozenset(unknown)


def _attribute(name: str, statement: ast.Assign | ast.AnnAssign, call: ast.AST) -> list[re.Pattern[Any]]:
    """What an attribute of a module is; a single expression is made without an import of the module."""
    if statement.value is call and isinstance(call, ast.Call):
        return list(patterns_in(evaluated(call, name)))
    target = statement.targets[0] if isinstance(statement, ast.Assign) else statement.target
    return list(patterns_in(getattr(importlib.import_module(f"candle_vllm.{name}"), ast.unparse(target))))


def of_tables() -> dict[str, tuple[str, list[str | re.Pattern[Any]]]]:
    """Expressions that stand as texts in tables: names of tensors in families, heads in formats of tool calls."""
    names: set[str] = set()
    heads: set[str] = set()
    for name, text in sources().items():
        if name.startswith("core.models.") and r"\." in text:
            parts = {part for node in tree(name).nodes if isinstance(node, ast.JoinedStr) for part in node.values}
            for node in tree(name).nodes:
                values = node.values if isinstance(node, ast.JoinedStr) else [node] if node not in parts else []
                said = "".join(str(value.value) if isinstance(value, ast.Constant) else "0" for value in values)
                names |= {said} if r"\." in said else set()
        if name.startswith("openai.formats.") and "head=" in text:
            words = [node for node in tree(name).nodes if isinstance(node, ast.keyword)]
            given = [word.value for word in words if word.arg in ("head", "name_head")]
            heads |= {str(value.value) for value in given if isinstance(value, ast.Constant) and value.value}
    assert len(names) > 5
    assert len(heads) > 1
    return {
        "core.loading.weights._match": ("fullmatch", [*names]),
        "openai.formats.tagged._Arguments._key": ("fullmatch", [*heads]),
    }


def uses(attributes: set[tuple[str, str]]) -> dict[tuple[str, str], set[str]]:
    """How each attribute of a module that is an expression is used in all modules; `search` where that is not seen."""
    found: dict[tuple[str, str], set[str]] = {}
    public = re.compile(rf"\b(?:{'|'.join(name for _, name in attributes if name[0] != '_')})\b")
    for name, text in sources().items():
        known = {key[1]: key for key in attributes if key[0] == name}
        if not known and not public.search(text):
            continue
        for node in tree(name).nodes:
            if isinstance(node, ast.ImportFrom) and node.module:
                keys = [(node.module.removeprefix("candle_vllm."), one.name) for one in node.names]
                known |= {one.asname or one.name: key for one, key in zip(node.names, keys) if key in attributes}
        for node in tree(name).nodes if known else ():
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in known:
                found.setdefault(known[node.id], set()).update(_use(node, tree(name).parents))
    return found


def _use(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> set[str]:
    parent = parents[node]
    while isinstance(parent, ast.Subscript):
        node, parent = parent, parents[parent]
    if not isinstance(parent, ast.Attribute):
        return {"search"}
    call = parents[parent]
    if parent.attr == "pattern":  # a part of another expression
        return set()
    if parent.attr in ("match", "fullmatch") and isinstance(call, ast.Call):
        return {"at" if len(call.args) > 1 else parent.attr}
    return {"search"}


# -- Hostile texts

CHARACTERS = " \n\ta0Z_-.\"'\\/[](){}<>:;,=#%|*+!@$^&~?`é٣\ud800\x00"
RUNS = [
    *" \na0\"'\\/[({<:,#-.",
    '\\"',
    '"\\',
    "\\/",
    "a ",
    "a\n",
    " \n",
    '",',
    '"a"',
    "/a",
    "[]",
    "{}",
    "()",
    "<>",
    "a.",
    "a:",
    "a=",
    "\r\n",
    "--",
]
ENDS = ("", "\x00", "\n")


class Shape(NamedTuple):
    """A text of any size: `first`, `again` as often as it takes, `last`."""

    first: str
    again: str
    last: str

    def text(self, size: int, pattern: re.Pattern[Any]) -> Any:
        text = self.first + self.again * (max(size - len(self.first), 0) // len(self.again)) + self.last
        return text if isinstance(pattern.pattern, str) else text.encode("utf-8", "surrogatepass")


def shapes(pattern: re.Pattern[Any]) -> list[Shape]:
    """Hostile texts for an expression, made of what its repeats take and of what leads to them."""
    source = pattern.pattern if isinstance(pattern.pattern, str) else pattern.pattern.decode("latin-1")
    parsed = _parser.parse(source, pattern.flags)
    found = dict.fromkeys(Shape("", run, "") for run in RUNS)
    for first, body in repeats(list(parsed), "", parsed.state):
        for again in variants(body, parsed.state):
            for shape in ((first, again), ("", first + again), ("", first), ("", again + "\n")):
                if shape[1]:
                    found |= dict.fromkeys(Shape(*shape, end) for end in ENDS)
    return list(found)


def repeats(nodes: list[Any], first: str, state: Any) -> Iterator[tuple[str, list[Any]]]:
    """Every repeat without a small bound: a text that leads to it, and what is repeated."""
    for op, value in nodes:
        if op in (_constants.MAX_REPEAT, _constants.MIN_REPEAT, _constants.POSSESSIVE_REPEAT):
            _, most, body = value
            if most > 16:
                yield first, list(body)
            yield from repeats(list(body), first, state)
        elif op is _constants.SUBPATTERN:
            yield from repeats(list(value[-1]), first, state)
        elif op is _constants.ATOMIC_GROUP:
            yield from repeats(list(value), first, state)
        elif op in (_constants.ASSERT, _constants.ASSERT_NOT):
            yield from repeats(list(value[1]), first, state)
        elif op is _constants.BRANCH:
            for branch in value[1]:
                yield from repeats(list(branch), first, state)
        elif op is _constants.GROUPREF_EXISTS:
            raise AssertionError("a conditional: teach the test what it takes")
        first += example([(op, value)], state)


def example(nodes: list[Any], state: Any) -> str:
    """A short text that the nodes take, what looks around left out."""
    found = ""
    for op, value in nodes:
        if op in (_constants.MAX_REPEAT, _constants.MIN_REPEAT, _constants.POSSESSIVE_REPEAT):
            found += example(list(value[2]), state) * value[0]
        elif op is _constants.SUBPATTERN:
            found += example(list(value[-1]), state)
        elif op is _constants.ATOMIC_GROUP:
            found += example(list(value), state)
        elif op is _constants.BRANCH:
            found += example(list(value[1][0]), state)
        elif op in (_constants.LITERAL, _constants.NOT_LITERAL, _constants.IN, _constants.ANY):
            found += taken(op, value, state)[0]
    return found


def variants(nodes: list[Any], state: Any) -> list[str]:
    """Texts that the nodes take, which differ in one place each."""
    found: dict[str, None] = {}
    for number, (op, value) in enumerate(nodes):
        before, behind = example(nodes[:number], state), example(nodes[number + 1 :], state)
        if op in (_constants.LITERAL, _constants.NOT_LITERAL, _constants.IN, _constants.ANY):
            own = list(taken(op, value, state))
        elif op is _constants.BRANCH:
            own = [text for branch in value[1] for text in variants(list(branch), state)]
        elif op is _constants.SUBPATTERN:
            own = variants(list(value[-1]), state)
        elif op in (_constants.MAX_REPEAT, _constants.MIN_REPEAT, _constants.POSSESSIVE_REPEAT):
            own = ["", *variants(list(value[2]), state)]
        else:
            own = [""]
        found |= {before + text + behind: None for text in own}
    return [text for text in found if text]


def taken(op: Any, value: Any, state: Any) -> str:
    """Characters of many kinds that a node takes, ten at most."""
    if op is _constants.LITERAL:
        return chr(value)
    kinds = _parser.SubPattern(state, [(op, value)])
    holds = _compiler.compile(kinds, state.flags | re.DOTALL)
    found = [character for character in CHARACTERS if holds.fullmatch(character)]
    if op is _constants.IN and not found:
        found = [chr(one) for kind, one in value if kind is _constants.LITERAL]
        found += [chr(one[0]) for kind, one in value if kind is _constants.RANGE]
    assert found, "no character of a set is known: add one to CHARACTERS"
    return "".join(found[:10])


# -- Trying


class TooLongError(Exception):
    """The processor time of a trial is used up."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Ends what takes more seconds of the processor: `re` looks for signals while it searches."""

    def stop(*_: object) -> None:
        raise TooLongError

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _search(pattern: re.Pattern[Any], text: Any) -> None:
    for _ in pattern.finditer(text):
        pass


def _at(pattern: re.Pattern[Any], text: Any) -> None:
    at = 0
    while at < len(text):
        match = pattern.match(text, at)
        at = max(at + 1, match.end() if match else 0)


def _steps(pattern: re.Pattern[Any], text: Any) -> None:
    at = 0
    while (match := pattern.match(text, at)) and match.end() > at:
        at = match.end()


WAYS: dict[str, Callable[[re.Pattern[Any], Any], object]] = {  # `at`: at every place; `steps`: while it matches
    "fullmatch": lambda pattern, text: pattern.fullmatch(text),
    "match": lambda pattern, text: pattern.match(text),
    "at": _at,
    "steps": _steps,
    "search": _search,
    "to a broken one": lambda pattern, text: any(match.lastgroup == "broken" for match in pattern.finditer(text)),
    "tail": lambda pattern, text: pattern.search(text, max(0, len(text) - 64)),
}


def read(expression: Expression, text: Any) -> None:
    """Reads a text in every way in which the sources use the expression."""
    for use in expression.uses:
        WAYS[use](expression.pattern, text)


def seconds(expression: Expression, shape: Shape, size: int, limit: float) -> float:
    """Processor seconds of a text of a size, the best of some; infinity far beyond the limit.

    Beside others a processor is slower, its own seconds too, so what is above the limit is tried again.
    """
    text, best = shape.text(size, expression.pattern), float("inf")
    for tried in range(6):
        begun = time.process_time()
        try:
            with at_most(4 * limit):
                read(expression, text)
        except TooLongError:
            return best
        best = min(best, time.process_time() - begun)
        if best < limit / 8 or (tried and best <= limit):
            break
    return best


def slowest(expression: Expression) -> list[Shape]:
    """The hostile texts that take longest at a small size, of all that are made for an expression."""
    taken: dict[Shape, float] = {}
    shape = None
    try:
        with at_most(SECONDS / 4):
            for shape in shapes(expression.pattern):
                text = shape.text(SMALL, expression.pattern)
                begun = time.perf_counter()  # to put them in order, where processor time is too coarse
                read(expression, text)
                taken[shape] = time.perf_counter() - begun
            for shape in sorted(taken, key=taken.__getitem__)[
                -4 * SLOWEST :
            ]:  # again: others may have had the processor
                text = shape.text(SMALL, expression.pattern)
                begun = time.perf_counter()
                read(expression, text)
                taken[shape] = min(taken[shape], time.perf_counter() - begun)
    except TooLongError:
        assert shape is not None
        return [shape]
    return sorted(taken, key=taken.__getitem__)[-SLOWEST:]


def fault(expression: Expression, size: int) -> str:
    """A text that an expression reads for too long, or for much longer than a quarter of it; or nothing."""
    limit = SECONDS * size / LARGE
    for shape in slowest(expression):
        spent = seconds(expression, shape, size, limit)
        quarter = seconds(expression, shape, size // 4, limit) if limit / 5 < spent <= limit else spent
        if spent > limit or spent > 10 * max(quarter, limit / 30):
            return (
                f"{expression.name}: {spent:.2f} s for {size} characters, {shape}; {expression.pattern.pattern!r:.200}"
            )
    return ""


def hostile_to(pattern: str, *uses: str) -> str:
    return fault(Expression("a test's", re.compile(pattern, re.DOTALL), frozenset(uses)), COMMON)


def test_what_is_quadratic_is_found() -> None:
    """Expressions as they have been written here and elsewhere."""
    for pattern, use in (
        (r'"(?:\\.|[^"\\])*"', "search"),  # every quote to the end of the text
        (r"^(\w+)\s*(?:\([^)]*\))?\s*:", "match"),  # blanks divided in every way
        (r"(a+)+b", "match"),
        (r"(?:ab|a)*a*c", "fullmatch"),
        (r"x(?=[^:]*:)", "search"),
        (r"\s*,", "at"),
    ):
        assert hostile_to(pattern, use), pattern


def test_what_is_linear_is_left_alone() -> None:
    for pattern, use in (
        (r'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)', "search"),
        (r"^(\w+)\s*+(?:\([^)]*\)\s*+)?:", "match"),
        (r"\s*,", "match"),
    ):
        assert hostile_to(pattern, use) == ""


def test_every_expression_is_collected() -> None:
    """What the tables name is in the sources, and no expression is made anywhere without a row."""
    found, unknown = collected()
    names = {expression.name for expression in found}
    assert len(found) > 180
    assert set(MADE) == unknown
    assert NOT_FOREIGN.keys() | USED.keys() <= names
    assert [expression.name for expression in found if not expression.uses] == []


def test_every_expression_is_linear() -> None:
    found, _ = collected()
    faults = [fault(expression, COMMON) for expression in found if expression.name not in NOT_FOREIGN]
    assert [one for one in faults if one] == []


@pytest.mark.every_case
def test_every_expression_reads_a_megabyte() -> None:
    found, _ = collected()
    faults = [fault(expression, LARGE) for expression in found if expression.name not in NOT_FOREIGN]
    assert [one for one in faults if one] == []
