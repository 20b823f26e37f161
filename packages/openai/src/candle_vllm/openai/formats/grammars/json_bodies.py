# SPDX-License-Identifier: MIT
"""Grammars of calls with JSON arguments: `JsonCalls` and `NamedJson`."""

from __future__ import annotations

from candle_vllm.openai.formats.grammars.schemas import FunctionShape
from candle_vllm.openai.formats.grammars.writer import SPACE, Block, Context, quoted, sequence
from candle_vllm.openai.formats.json_calls import JsonCalls
from candle_vllm.openai.formats.named_calls import NamedJson
from candle_vllm.openai.formats.output import mistral_id

_MISTRAL_ID = "/[A-Za-z0-9]{9}/"
_NUMBER = "/0|[1-9][0-9]{0,2}/"
_FREE_ID = "/[A-Za-z0-9_\\-]{1,40}/"
_FENCE = "```"
_SPACES = "/[ \\n]{0,4}/"


def json_calls(body: JsonCalls, context: Context) -> Block:
    """Return the grammar of JSON objects that are calls."""
    one = _object(body, context)
    again = f'({SPACE} "," {SPACE} {one})*' if context.many else ""
    listed = context.writer.rule(sequence(SPACE, one, again, SPACE, '"]"'))
    end = sequence(SPACE, context.writer.mark(body.closers[0])) if body.closers else ""
    if end and context.form.make_id is mistral_id:
        end = f"({end})?"  # newer templates of Mistral omit the closing mark
    if body.listed and body.fenced:
        return Block(f"{_FENCE}json", sequence(SPACE, '"["', listed, end))
    if body.listed and any(closer.startswith("</") for closer in body.closers):  # MiniMax M1 writes calls on lines
        lines = sequence(one, f"({SPACE} {one})*" if context.many else "")
        return Block("", sequence(context.writer.rule(f'"[" {listed} | {lines}'), end))
    if body.listed:
        return Block("[", sequence(listed, end))
    objects = one
    if context.many and body.known_only:
        objects = context.writer.rule(f'{one} | "[" {listed}')
    elif context.many and not body.closers and context.form.bare is not None:
        objects = context.writer.rule(f'{one} (";" {SPACE} {one})*')
    return Block("", sequence(objects, end))


def _object(body: JsonCalls, context: Context) -> str:
    writer, wants_id = context.writer, bool(body.id_key) and not body.keyed
    parts = []
    for tool in context.tools:
        name = quoted(f'"{tool.name}"')
        if body.keyed:
            parts.append(sequence(quoted(f'"{tool.name}":'), SPACE, context.json(tool)))
        else:
            key = quoted(f'"{body.arguments_key}":')
            parts.append(sequence(name, '","', SPACE, key, SPACE, context.json(tool)))
    call = writer.rule(" | ".join(parts))
    if not body.keyed:
        call = sequence(quoted(f'"{body.name_key}":'), SPACE, call)
    key = quoted(f'"{body.id_key}":')
    first = last = ""
    if wants_id and context.form.make_id is mistral_id:
        last = writer.rule(f'("," {SPACE} {key} {SPACE} "\\"" {_MISTRAL_ID} "\\"")?')
    elif wants_id:  # Cohere's models write the id before the name
        first = writer.rule(f'({key} {SPACE} "\\"" {_NUMBER} "\\"" "," {SPACE})?')
    return writer.rule(sequence('"{"', SPACE, first, call, last, SPACE, '"}"'))


def begun_objects(body: JsonCalls, context: Context) -> tuple[str, str]:
    """Return grammars of calls of known tools without a mark, and of their beginnings, which may also be text."""
    writer, one = context.writer, _object(body, context)
    calls = []
    for tool in context.tools:
        name = quoted(f'"{tool.name}",')
        begun = writer.rule(f'{_SPACES} {name} {_SPACES} /"(arguments|parameters)":/', "[lazy]")
        calls.append(sequence(begun, SPACE, context.json(tool), SPACE, '"}"'))
    call = writer.rule(" | ".join(calls))
    again = f'({SPACE} "," {SPACE} {one})*' if context.many else ""
    head = sequence('"{"', _SPACES, '/("type":[ ]?"function",[ ]?)?/', quoted('"name":'))
    single = writer.rule(sequence(_SPACES, head), "[lazy]")
    listed = writer.rule(sequence(_SPACES, '"["', _SPACES, head), "[lazy]")
    whole = writer.rule(f'{single} {call} | {listed} {sequence(call, again, SPACE)} "]"')
    return whole, writer.rule(f"{single} | {listed}")


def named_json(body: NamedJson, context: Context) -> Block:
    """Return the grammar of names, each followed by its arguments as JSON."""
    context.check_names()
    writer, mark = context.writer, context.writer.mark
    lead = body.before_name[0] if body.before_name else ""
    given_id = _FREE_ID if context.form.make_id is not mistral_id else _MISTRAL_ID
    middle = mark(body.name_end + "".join(body.between))
    if body.id_mark:
        middle = writer.rule(sequence(f"({mark(body.id_mark)} {given_id})?", middle))
    fence = sequence(f'"{_FENCE}json"', SPACE) if body.fenced else ""
    end = sequence(sequence(SPACE, f'"{_FENCE}"') if body.fenced else "", *map(mark, body.closers[: body.closed]))

    def call(tool: FunctionShape) -> str:
        head = quoted(f"{tool.name}:") + " " + _NUMBER if body.counted else quoted(tool.name)
        return sequence(head, middle, fence, context.json(tool))

    rest = sequence(writer.rule(" | ".join(map(call, context.tools))), "" if end == '""' else end)
    before = sequence(given_id, mark(body.id_end)) if body.id_end else ""
    if body.again and context.many:
        rest = sequence(rest, f"({sequence(mark(body.again[0]), before, mark(lead), rest)})*")
    return Block("", sequence(before, mark(lead), rest)) if before else Block(lead, rest)
