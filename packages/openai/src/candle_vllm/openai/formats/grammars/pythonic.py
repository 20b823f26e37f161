"""Grammars of calls written as Python: `Pythonic`."""

from __future__ import annotations

import json
import keyword
import re

from candle_vllm.openai.formats.grammars.context import Block, Context
from candle_vllm.openai.formats.grammars.literals import Notation, Values
from candle_vllm.openai.formats.grammars.schemas import Branch, Root, Tool
from candle_vllm.openai.formats.grammars.texts import string_body
from candle_vllm.openai.formats.grammars.writer import SPACE, Writer, quoted, sequence
from candle_vllm.openai.formats.pythonic import Pythonic

_SPACES = "/[ \\n]{0,4}/"
_WORDS = {None: '"None"', False: '"False"', True: '"True"'}
_KEY = "/[A-Za-z_][A-Za-z0-9_]{0,63}/"
_ESCAPE = r"\\[\"'\\nrt]"
_PLAIN = {'"': r"[^\"\\\x00-\x1f]", "'": r"[^'\\\x00-\x1f]"}
_BARE = r"/[^\"'\\\x00-\x1f]*/"


def pythonic(body: Pythonic, context: Context) -> Block:
    """Calls, in a list or on lines of their own."""
    context.check_names()
    writer = context.writer
    call = writer.rule(" | ".join(_call(context, tool) for tool in context.tools))
    separator = f'"," {SPACE}' if body.listed else '"\\n"'
    calls = sequence(call, f"({separator} {call})*" if context.many else "")
    end = sequence(SPACE, writer.mark(body.closers[0])) if body.closers else ""
    if body.listed:
        return Block("[", sequence(calls, '"]"', end))
    return Block("", sequence(calls, end))


def begun_calls(context: Context) -> tuple[str, str]:
    """Calls of known tools where no mark tells of them, and what begins as they do, which may be text as well."""
    writer = context.writer
    calls = writer.rule(" | ".join(_call(context, tool) for tool in context.tools))
    begun = []
    for tool in context.tools:
        name = writer.rule(quoted(f"{tool.name}("), "[lazy]")
        begun.append(sequence(name, _arguments(context, tool)))
    again = f'("," {SPACE} {calls})*' if context.many else ""
    head = writer.rule(f'{_SPACES} "["', "[lazy]")
    return writer.rule(sequence(head, writer.rule(" | ".join(begun)), again, '"]"')), head


def _call(context: Context, tool: Tool) -> str:
    return sequence(quoted(f"{tool.name}("), _arguments(context, tool))


def _arguments(context: Context, tool: Tool) -> str:
    writer, root = context.writer, context.root(tool)
    for key in root.schema.get("properties", {}):
        if not re.fullmatch(r"[A-Za-z_]\w{0,255}", key) or keyword.iskeyword(key):
            raise root.refused(f"properties: {key!r:.60}", "arguments must have names that Python allows")
    values = Values(writer, root, _notation(writer))
    inside = values.items(root.schema, lambda key: quoted(f"{key}="), lambda known: _other(writer, known))
    return sequence(inside, '")"')


def _other(writer: Writer, known: list[str]) -> str:
    """The name of an argument that the schema does not name."""
    names = " | ".join(map(quoted, known))
    return sequence(writer.terminal(f"{_KEY} & ~({names})" if known else _KEY), '"="')


def _notation(writer: Writer) -> Notation:
    def text(value: str) -> str:
        return writer.terminal(f"{quoted(_double(value))} | {quoted(_single(value))}")

    def free_key(known: list[str]) -> str:
        names = " | ".join(quoted(key) for key in known)
        bare = writer.terminal(f"{_KEY} & ~({names})" if known else _KEY)
        return sequence(writer.terminal(f'"\'" {bare} "\'" | "\\"" {bare} "\\""'), '":"', SPACE)

    return Notation(
        string=lambda root, branch: _string(writer, root, branch),
        text=text,
        key=lambda key: sequence(text(key), '":"', SPACE),
        free_key=free_key,
        words=_WORDS,
        unkeyable=lambda _: False,
    )


def _string(writer: Writer, root: Root, branch: Branch) -> str:
    """A quoted string; what a pattern or a format asks for is written without escapes."""
    if {"pattern", "format"} & branch.schema.keys():
        inner = writer.terminal(f"{string_body(writer, root, branch)} & {_BARE}")
        return writer.terminal(f'"\'" {inner} "\'" | "\\"" {inner} "\\""')
    string_body(writer, root, branch)  # refuses lengths that cannot be
    least, most = branch.schema.get("minLength", 0), branch.schema.get("maxLength", "")
    count = f"{{{least},{most}}}" if least or most != "" else "*"
    forms = [f"{quoted(quote)} /({plain}|{_ESCAPE}){count}/ {quoted(quote)}" for quote, plain in _PLAIN.items()]
    return writer.terminal(" | ".join(forms))


def _double(value: str) -> str:
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\x7f")


def _single(value: str) -> str:
    return "'" + _double(value)[1:-1].replace('\\"', '"').replace("'", "\\'") + "'"
