# SPDX-License-Identifier: MIT
"""Grammars of whole messages that consist of parts with headers: `Harmony`, `Headed` and `Blocks`."""

from __future__ import annotations

from collections.abc import Callable

from candle_vllm.openai.formats.blocks import Blocks
from candle_vllm.openai.formats.channels import Harmony, Headed
from candle_vllm.openai.formats.grammars.schemas import FunctionShape
from candle_vllm.openai.formats.grammars.writer import SPACE, Block, Context, common, quoted, sequence

_THOUGHTS = "{0,8}"  # number of reasoning parts before required calls or a constrained answer
_ROLE = '"assistant"'
_CHANNELS = '("analysis" | "commentary" | "final")'


_Write = Callable[[FunctionShape], Block]


def harmony(flow: Harmony, context: Context, write: _Write, *, required: bool, in_reasoning: bool = False) -> str:
    """Return the grammar of a message whose prompt ends with the role of its first part, or within its reasoning."""
    writer, mark = context.writer, context.writer.mark
    calls = _calls(flow, context, write)
    opened = _rest_of_thoughts(flow, context) if in_reasoning else ""
    if required:
        return sequence(opened, _thoughts(flow, context), calls)
    message, text = mark(flow.message), _text(flow, context)
    if flow.channel:
        part = f"{mark(flow.channel)} {_CHANNELS} {message}"
    else:
        people = " | ".join(quoted(name) for name in flow.people)
        part = f'" to=" ({people}) {message}'
    begun = writer.rule(f"{part} | {message}" if flow.channel else f"({part}) | {message}")
    lead = writer.rule(sequence(begun, writer.until(flow.ends[0], text), _next_part(flow, context)))
    ends = writer.rule(" | ".join(writer.until(end, text) for end in flow.ends))
    main = f"{lead}* ({calls} | {begun} ({text} | {ends}))"
    return f"{opened} {main} | {text}" if opened else main


def harmony_answer(flow: Harmony, context: Context, write: _Write, *, in_reasoning: bool = False) -> str:
    """Return the grammar of reasoning, followed by a constrained answer or by calls."""
    mark = context.writer.mark
    if flow.channel:
        header = f'{mark(flow.channel)} "final" (" "? {mark("<|constrain|>")} "json")? {mark(flow.message)}'
    else:
        header = f"{quoted(f' to={flow.people[-1]}')} {mark(flow.message)}"
    answer = f"{header} @form ({mark(flow.ends[1])})?"
    calls = [_calls(flow, context, write)] if context.tools else []
    opened = _rest_of_thoughts(flow, context) if in_reasoning else ""
    return sequence(opened, _thoughts(flow, context), context.writer.rule(" | ".join([answer, *calls])))


def _calls(flow: Harmony, context: Context, write: _Write) -> str:
    writer, mark = context.writer, context.writer.mark
    call = _named(flow, context) if flow.body is None else _written(flow, context, write)
    between = mark(flow.ends[-1] if flow.channel else flow.ends[0])
    last = writer.rule(" | ".join(dict.fromkeys([mark(flow.ends[-1]), between])))
    return sequence(call, f"({between} {_next_part(flow, context)} {call})*" if context.many else "", last)


def _thoughts(flow: Harmony, context: Context) -> str:
    writer = context.writer
    head = writer.mark(flow.reasoning[0]) if flow.channel else quoted(" " + flow.reasoning[0])
    return writer.rule(sequence(head, writer.mark(flow.message), _rest_of_thoughts(flow, context))) + _THOUGHTS


def _rest_of_thoughts(flow: Harmony, context: Context) -> str:
    """Return a part's text, its end, and the beginning of the next part."""
    return sequence(context.writer.until(flow.ends[0], _text(flow, context)), _next_part(flow, context))


def _next_part(flow: Harmony, context: Context) -> str:
    return sequence(context.writer.mark(flow.start), _ROLE)


def _text(flow: Harmony, context: Context) -> str:
    """Return a part's text, which contains no mark."""
    return context.writer.without("TEXT", [common(flow.start, flow.channel or flow.start, *flow.ends)])


def _named(flow: Harmony, context: Context) -> str:
    writer, mark = context.writer, context.writer.mark
    message = mark(flow.message)
    kind = f'({mark("<|constrain|>")})? "json"'
    behind = writer.rule(f'(" " {kind})? {message}')
    before = writer.rule(f'{mark(flow.channel)} "commentary" (" " {kind})? {message}')
    arguments = [(quoted(tool.name), context.json(tool)) for tool in context.tools]
    channel = writer.rule(" | ".join(f"{name} {behind} {json}" for name, json in arguments))
    role = writer.rule(" | ".join(f"{name} {before} {json}" for name, json in arguments))
    to = quoted(f" to={flow.name_space}")
    return writer.rule(f'{mark(flow.channel)} "commentary" {to} {channel} | {to} {role}')


def _written(flow: Harmony, context: Context, write: _Write) -> str:
    """Return a header with the function's name, and a call in the format `flow.body`."""
    writer = context.writer
    parts = []
    for tool in context.tools:
        block = write(tool)
        head = sequence(quoted(f" to={flow.name_space}{tool.name}"), writer.mark(flow.message))
        parts.append(sequence(head, writer.mark(flow.body_open), SPACE, writer.mark(block.lead), block.rest))
    return writer.rule(" | ".join(parts))


def headed(flow: Headed, context: Context, _write: _Write, *, required: bool, in_reasoning: bool = False) -> str:  # noqa: ARG001
    """Return the grammar of a message whose prompt ends with the mark before its first part; it has no reasoning."""
    calls = _headed_calls(flow, context)
    if required:
        return calls
    answer = quoted(flow.answer + "\n")
    lead = context.writer.rule(f"{answer} {context.writer.until(flow.mark)}")
    return f"{lead}* ({calls} | {answer} TEXT)"


def headed_answer(flow: Headed, context: Context, _write: _Write, *, in_reasoning: bool = False) -> str:  # noqa: ARG001
    """Return the grammar of a constrained answer, or of calls."""
    calls = [_headed_calls(flow, context)] if context.tools else []
    return " | ".join([f'{quoted(flow.answer)} "\\n" @form', *calls])


def _headed_calls(flow: Headed, context: Context) -> str:
    named = [f'{quoted(tool.name)} "\\n" {context.json(tool)}' for tool in context.tools]
    call = context.writer.rule(" | ".join(named))
    return sequence(call, f"({SPACE} {context.writer.mark(flow.mark)} {call})*" if context.many else "")


def blocks(flow: Blocks, context: Context, write: _Write, *, required: bool, in_reasoning: bool = False) -> str:
    """Return the grammar of a message whose prompt ends with the mark before its first block, or in its reasoning."""
    writer, mark = context.writer, context.writer.mark
    calls, text = _block_calls(flow, context, write), _block_text(flow, context)
    opened = sequence(writer.until(flow.ends[0], text), mark(flow.start)) if in_reasoning else ""
    if required:
        return sequence(opened, _block_thoughts(flow, context), calls)
    kind = writer.rule(f"{mark(flow.texts[0])} | {mark(flow.thoughts)}")
    lead = writer.rule(sequence(kind, writer.until(flow.ends[0], text), mark(flow.start)))
    ends = writer.rule(" | ".join(writer.until(end, text) for end in flow.ends))
    main = f"{lead}* ({calls} | {kind} ({text} | {ends}))"
    return f"{opened} {main} | {text}" if opened else main


def blocks_answer(flow: Blocks, context: Context, write: _Write, *, in_reasoning: bool = False) -> str:
    """Return the grammar of reasoning, followed by a constrained answer or by calls."""
    writer, mark = context.writer, context.writer.mark
    opened = writer.until(flow.ends[0], _block_text(flow, context)) if in_reasoning else ""
    answer = f"{mark(flow.texts[0])} @form ({mark(flow.ends[0])})?"
    calls = [_block_calls(flow, context, write)] if context.tools else []
    behind = sequence(opened, mark(flow.start)) if opened else ""
    return sequence(behind, _block_thoughts(flow, context), writer.rule(" | ".join([answer, *calls])))


def _block_calls(flow: Blocks, context: Context, write: _Write) -> str:
    writer, mark = context.writer, context.writer.mark
    blocks = [(tool, write(tool)) for tool in context.tools]
    parts = [sequence(f"({quoted(tool.name)})?", mark(flow.call), mark(one.lead), one.rest) for tool, one in blocks]
    call = writer.rule(" | ".join(parts))
    again = f"({mark(flow.start)} {call})*" if context.many else ""
    return sequence(call, again, f"({mark(flow.ends[1])})?")


def _block_thoughts(flow: Blocks, context: Context) -> str:
    writer, mark = context.writer, context.writer.mark
    text = writer.until(flow.ends[0], _block_text(flow, context))
    return writer.rule(sequence(mark(flow.thoughts), text, mark(flow.start))) + _THOUGHTS


def _block_text(flow: Blocks, context: Context) -> str:
    """Return a block's text, which contains no mark."""
    return context.writer.without("TEXT", [common(flow.start, flow.thoughts, *flow.ends)])
