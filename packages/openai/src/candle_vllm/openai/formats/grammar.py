# SPDX-License-Identifier: MIT
"""Grammar of the messages with tool calls that a model may write, from a row of `table` (step 2 of a request's life).

In mode "required" a message is reasoning and calls. In mode "auto" it is free text, in which a call must follow the
format after its opening mark. White space is allowed where models usually write it. Calls are written by `grammars`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import singledispatch
from typing import Any, Literal

from candle_vllm.openai.errors import UnsupportedParameterError
from candle_vllm.openai.formats.blocks import Blocks
from candle_vllm.openai.formats.channels import Harmony, Headed
from candle_vllm.openai.formats.gemma import Gemma
from candle_vllm.openai.formats.grammars.bodies import begun_objects, json_calls, named_json, nested, tagged
from candle_vllm.openai.formats.grammars.literals import begun_calls, gemma, pythonic
from candle_vllm.openai.formats.grammars.messages import (
    blocks,
    blocks_answer,
    harmony,
    harmony_answer,
    headed,
    headed_answer,
)
from candle_vllm.openai.formats.grammars.schemas import FunctionShape
from candle_vllm.openai.formats.grammars.writer import SPACE, Block, Context, Writer, quoted, sequence
from candle_vllm.openai.formats.json_calls import JsonCalls
from candle_vllm.openai.formats.layout import Body, ReasoningFormat, ToolFormat
from candle_vllm.openai.formats.named_calls import NamedJson
from candle_vllm.openai.formats.nested import Nested
from candle_vllm.openai.formats.pythonic import Pythonic
from candle_vllm.openai.formats.tagged import Tagged

_LEADING = re.compile(r"\A<\|(begin\|>assistant|message_sep\|>)\Z|\A<(?!.*end)[^/]*tool.?(calls|requests)")
_TRAILING = re.compile("tool.?(calls|requests)|calls.?>|message|end_of")  # strays after all calls; `_LEADING`: before
_NONE = re.compile("(?!)")
_FENCE = "```json"
_WORD = re.compile(r"[\w :]+")  # marks that also occur in text without a call


def tool_grammar(
    form: ToolFormat,
    tools: Sequence[FunctionShape],
    *,
    mode: Literal["required", "auto"],
    parallel: bool,
    reasoning: ReasoningFormat | None,
    in_reasoning: bool,
    special: Mapping[str, int],
    own: Mapping[str, int] | None = None,
    loose: Collection[str] = (),
    always: bool = False,
) -> str | None:
    """Return the grammar of a message, in llguidance's dialect of Lark.

    Args:
        form: the model's tool-call format; the grammar writes calls in its first body.
        tools: tools that may be called; at least one.
        mode: whether a call is required.
        reasoning: the model's reasoning format; reasoning is free text.
        in_reasoning: whether the prompt has already opened the reasoning, with the first pair of marks.
        special: texts of the vocabulary's special tokens -> their ids.
        own: texts of ordinary tokens -> their ids; in mode "required", marks consist of these tokens, so that the next
            prompt, which has the same tokens, finds this answer in the cache.
        loose: tools whose arguments may be any object; in mode "auto", also all tools that are not strict and
            have no grammar.
        always: whether calls are constrained in mode "auto" even if no tool is strict.

    Returns:
        None in mode "auto" if no tool is strict or has a grammar (unless `always`), or if no text begins calls.

    Raises:
        UnsupportedParameterError: a schema requires what the format cannot express.
        InvalidParameterError: a schema is invalid, or constrained decoding does not support it.
    """
    assert tools
    auto = mode == "auto"
    held = [tool for tool in tools if tool.strict or (tool.grammar is not None and tool.name not in loose)]
    if auto and not always and not held:
        return None
    context = Context(
        Writer(special, None if auto else own),
        form,
        tools,
        loose=[tool.name for tool in tools if tool not in held] if auto else loose,
        many=parallel,
    )
    if form.flow is not None:
        flow, call = form.flow, _one_call(form.flow, context)
        for kind, (write, _) in _FLOWS.items():
            if isinstance(flow, kind):
                return context.writer.lark(write(flow, context, call, required=not auto, in_reasoning=in_reasoning))
        return context.writer.lark(_block(flow, context).rest)
    message = _Message(context, reasoning, in_reasoning)
    start = message.lazy() if auto else message.required()
    return start and context.writer.lark(start)


def answer_grammar(
    form: ToolFormat | None,
    tools: Sequence[FunctionShape],
    *,
    parallel: bool,
    reasoning: ReasoningFormat | None,
    in_reasoning: bool,
    special: Mapping[str, int],
    loose: Collection[str] = (),
) -> str | None:
    """Return the grammar of a message that is either calls or text that follows a constraint (`@form` in the grammar).

    The result is None if only reasoning may accompany the constrained text. Arguments are as in `tool_grammar`.
    """
    row = form or ToolFormat("none")
    if reasoning is not None:
        strays, answer = (*row.strays, *reasoning.strays), (*row.answer, *reasoning.answer)
        row = dataclasses.replace(row, strays=tuple(dict.fromkeys(strays)), answer=tuple(dict.fromkeys(answer)))
    context = Context(Writer(special), row, tools, loose=loose, many=parallel)
    flow: Any = row.flow or (reasoning and reasoning.flow)
    for kind, (_, answer) in _FLOWS.items():
        if isinstance(flow, kind):
            return context.writer.lark(answer(flow, context, _one_call(flow, context), in_reasoning=in_reasoning))
    if not row.answer and not tools:
        return None
    return context.writer.lark(_Message(context, reasoning, in_reasoning).answer())


@singledispatch
def _block(body: Any, context: Context) -> Block:
    raise UnsupportedParameterError(
        f"tool_choice: calls of the format {context.form.name!r} cannot be guaranteed ({type(body).__name__}); use "
        "tool_choice 'auto' and tools that are not strict",
        "tool_choice",
    )


_block.register(JsonCalls, json_calls)
_block.register(NamedJson, named_json)
_block.register(Tagged, tagged)
_block.register(Pythonic, pythonic)
_block.register(Gemma, gemma)
_block.register(Nested, nested)


_FLOWS: Mapping[type, tuple[Callable[..., str], Callable[..., str]]] = {
    Harmony: (harmony, harmony_answer),
    Headed: (headed, headed_answer),
    Blocks: (blocks, blocks_answer),
}
"""Formats of messages that are more than text with marks -> grammars of a message, and of one with a constraint."""


def _one_call(flow: Any, context: Context) -> Callable[[FunctionShape], Block]:
    """Return a function that returns the grammar of one call of a tool, in the format of the message's body."""
    return lambda tool: _block(flow.body, dataclasses.replace(context, many=False, tools=[tool]))


class _Message:
    """Grammar of a message that is text with marks."""

    def __init__(self, context: Context, reasoning: ReasoningFormat | None, in_reasoning: bool) -> None:
        self._context = context
        self._writer = context.writer
        self._form = context.form
        self._pairs = reasoning.pairs if reasoning else {}
        self._open_close = next(iter(self._pairs.values())) if in_reasoning and self._pairs else ""

    @property
    def _body(self) -> Body:
        return self._form.bodies[0]

    def required(self) -> str:
        return sequence(self._thoughts(), self._calls(), SPACE)  # many models write a line break after the last call

    def answer(self) -> str:
        """Return an expression of reasoning followed by constrained text, perhaps between marks, or by calls."""
        found = "@form"
        if self._form.answer:
            sides = zip(*self._form.answer, strict=True)
            before, behind = (" | ".join(map(self._writer.mark, dict.fromkeys(side))) for side in sides)
            # No white space: it would be content, which must satisfy the constraint.
            found = sequence(self._strays(_LEADING, space=""), f"({before})? @form ({behind})?")
        calls = [self._calls()] if self._context.tools else []
        return sequence(self._thoughts(SPACE), self._writer.rule(" | ".join([found, *calls])))

    def _calls(self) -> str:
        writer, form = self._writer, self._form
        block = _block(self._body, self._context)
        mark = self._opening()
        closers = getattr(self._body, "closers", ())
        tag = mark.startswith("<") and f"</{mark[1:]}" in closers  # models do not omit such a mark
        if block.lead in form.names and not tag:  # the body begins with the only mark
            mark = ""
        calls = sequence(writer.mark(block.lead), block.rest)
        marked = writer.rule(sequence(writer.mark(mark), SPACE if mark else "", calls))
        many = self._context.many and not any(mark.startswith(closer) for closer in closers)  # "```" and "```json"
        inside = sequence(marked, f"({SPACE} {marked})*" if many else "")
        if form.bare is not None and not tag:
            bare = _block(form.bare, self._context)
            inside = writer.rule(f"{inside} | {sequence(writer.mark(bare.lead), bare.rest)}")
        around = self._strays(_LEADING), SPACE, inside, self._strays(_TRAILING, _LEADING)
        empty = (  # optional empty parts, such as Kimi K3's empty answer before its calls
            f"({SPACE} {writer.mark(begin)} {writer.mark(end)})?" for begin, end in form.answer
        )
        return sequence(*empty, *around)

    def _opening(self) -> str:
        """Return the mark before calls: the first with a special token of the vocabulary, or else the first."""
        known = (mark for mark in self._form.opens if not self._writer.is_text(mark))
        return next(known, next(iter(self._form.opens), ""))

    def _strays(self, these: re.Pattern[str], but: re.Pattern[str] = _NONE, *, space: str = SPACE) -> str:
        marks = [mark for mark in self._form.strays if these.search(mark) and not but.search(mark)]
        return sequence(*(f"({space} {self._writer.mark(mark)})?" for mark in marks)) if marks else ""

    def _thoughts(self, behind: str = "") -> str:
        """Return an expression of reasoning before calls or text; before a fence, no quote may precede its end mark."""
        writer = self._writer
        thought = writer.thought if self._opening().startswith("`") else writer.until
        if self._open_close:
            return sequence(SPACE, thought(self._open_close), behind)
        pairs = [f"{writer.mark(begin)} {thought(end)}" for begin, end in self._pairs.items()]
        return f"({SPACE} {writer.rule(' | '.join(pairs))} {behind})?" if pairs else ""

    def lazy(self) -> str | None:
        """Return an expression of free text in which calls follow the format; None if there is nothing to enforce."""
        writer, form = self._writer, self._form
        found: list[str] = []
        marks: list[str] = []
        if not getattr(self._body, "known_only", False):
            marks = [*(mark for mark in form.opens if not mark.startswith("`")), *form.names]
            block = _block(self._body, self._context)
            found = [part for mark in marks if (part := self._begun(mark, block))]
        fenced, whole, begun = self._unmarked()
        found += [f"{fenced} {whole}"] if fenced else []
        if form.bare is not None:  # after reasoning, the message begins anew
            thoughts = ((begin, writer.thought(end)) for begin, end in self._pairs.items())
            found += [writer.trigger(begin, sequence(thought, whole)) for begin, thought in thoughts]
        if not found and not whole:
            return None
        main = self._text([*found, *self._free("TEXT")], "TEXT")
        rest = main
        if not self._context.many:
            body = writer.without("TEXT", marks)
            rest = self._text([*self._free(body)], body)
            free = self._text([*self._free("TEXT")], "TEXT")
            before = writer.rule(" | ".join(parts)) + "*" if (parts := [*self._free("TEXT")]) else ""
            main = writer.rule(f"{sequence(before, writer.rule(' | '.join(found)), rest)} | {free}") if found else free
        if form.bare is not None:
            main = writer.rule(f"{whole} {rest} | {begun} {main} | {main}")
        return f"{sequence(writer.thought(self._open_close), main)} | TEXT" if self._open_close else main

    def _text(self, parts: Sequence[str], body: str) -> str:
        """Return an expression of text with these parts, up to the message's end, where reasoning may be unclosed."""
        ends = [body, *(self._writer.trigger(begin, "TEXT", body) for begin in self._pairs)]
        lead = self._writer.rule(" | ".join(parts)) + "*" if parts else ""
        return self._writer.rule(sequence(lead, self._writer.rule(" | ".join(ends))))

    def _unmarked(self) -> tuple[str, str, str]:
        """Return expressions of text up to a code fence, unmarked calls, and their beginnings; "" without them."""
        bodies = [self._form.bare, *(body for body in self._form.bodies if getattr(body, "known_only", False))]
        body = next((body for body in bodies if isinstance(body, (JsonCalls, Pythonic))), None)
        fenced = self._form.fenced is not None or _FENCE in self._form.opens
        if body is None or not (self._form.bare or fenced):
            return "", "", ""
        objects = isinstance(body, JsonCalls)
        whole, begun = begun_objects(body, self._context) if objects else begun_calls(self._context)
        fence = self._writer.rule(f"TEXT {quoted(_FENCE)}", "[lazy]") if fenced else ""
        return fence, whole, begun

    def _begun(self, mark: str, block: Block) -> str:
        """Return an expression of text, a mark, and the calls that must follow it."""
        if mark in self._form.names:
            if not block.lead.startswith(mark):
                return ""  # the mark begins another body
            return self._writer.trigger(mark, sequence(self._writer.mark(block.lead[len(mark) :]), block.rest))
        if _WORD.fullmatch(mark):
            return self._writer.trigger(mark, block.rest, lead=block.lead)
        return self._writer.trigger(mark, sequence(SPACE, self._writer.mark(block.lead), block.rest))

    def _free(self, body: str) -> Iterator[str]:
        """Yield expressions of reasoning, and of special tokens without meaning, after text of terminal `body`."""
        fence, _, begun = self._unmarked() if body == "TEXT" else ("", "", "")
        bare = f"({begun})?" if begun and self._form.bare is not None else ""
        for begin, end in self._pairs.items():
            yield self._writer.trigger(begin, sequence(self._writer.thought(end), bare), body)
        if fence:
            yield from (fence, f"{fence} {begun}")
        for mark in self._form.strays:
            if not self._writer.is_text(mark):
                yield self._writer.rule(self._writer.until(mark, body))
