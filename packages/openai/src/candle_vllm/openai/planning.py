# SPDX-License-Identifier: MIT
"""How the answers of a chat request are parsed and constrained (step 2 of a request's life).

The formats are chosen once per model, from its files. A plan is made for each request after its prompt is rendered. One
constraint covers structured output and tool calls, and allows or skips the reasoning before them.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from msgspec.structs import replace

from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.sampling.structured import StructuredOutputsParams
from candle_vllm.core.sampling.thoughts import ThoughtBudget
from candle_vllm.core.text.chat_template import ChatTemplate
from candle_vllm.core.text.detokenizer import StopMarks
from candle_vllm.core.text.tokenizer import ChatConventions
from candle_vllm.openai.answers import AnswerPlan
from candle_vllm.openai.errors import UnsupportedParameterError
from candle_vllm.openai.formats.choice import Choice, choose_layout
from candle_vllm.openai.formats.elsewhere import COMMON
from candle_vllm.openai.formats.grammar import answer_grammar, tool_grammar
from candle_vllm.openai.formats.layout import CALL, THOUGHTS, Layout, ReasoningFormat, ToolFormat, bind
from candle_vllm.openai.formats.pythonic import Pythonic
from candle_vllm.openai.formats.reader import SPACE
from candle_vllm.openai.formats.reasoning_table import LAST_WORDS
from candle_vllm.openai.protocol.fields import MAX_TOOL_CALLS
from candle_vllm.openai.task import Task, ThinkingLimit, ToolUse

logger = logging.getLogger(__name__)
NO_LIMIT = ThinkingLimit(-1, required=False)
_TAIL = 1 << 14  # characters at a prompt's end that are searched for its last marks


class Planned(NamedTuple):
    """How one request's answers are parsed and constrained, the limit on reasoning, and where stop strings apply."""

    answers: AnswerPlan
    structured: StructuredOutputsParams | None
    thoughts: ThoughtBudget | None = None
    stop_marks: StopMarks | None = None


class AnswerPlanner:
    """Plans the answers of one model; raises ConfigError if a given name of a format is unknown.

    Args:
        conventions: the chat conventions that the model was trained with.
        tool_parser, reasoning_parser: names of formats; None uses the model's own.
        thinking: default for the limit on reasoning and for the message that ends it; a limit below 0 means no limit.

    Attributes:
        choice: the chosen formats, and the reasons for the choice.
    """

    def __init__(
        self,
        conventions: ChatConventions,
        model_type: str,
        *,
        tool_parser: str | None = None,
        reasoning_parser: str | None = None,
        thinking: ThinkingLimit = NO_LIMIT,
    ) -> None:
        self.choice: Choice = choose_layout(
            tool_parser=tool_parser,
            reasoning_parser=reasoning_parser,
            template=conventions.chat_template,
            response_template=conventions.response_template,
            model_type=model_type,
            chat_template=_compiled(conventions),
        )
        tools, reasoning = self.choice.tools, self.choice.reasoning
        logger.debug("tool calls: %s (%s)", tools.name if tools else "none", self.choice.tools_reason)
        logger.debug("reasoning: %s (%s)", reasoning.name if reasoning else "none", self.choice.reasoning_reason)
        self._special, self._marks = conventions.special_tokens, conventions.mark_ids
        self._model_type, self._thinking = model_type, thinking
        frame = tools if tools is not None and tools.flow is not None else None  # also parses answers without calls
        leads = reasoning.pairs if reasoning is not None else {}
        self._bound = {  # keyed by the mark by which the prompt opened the reasoning; "" if it did not
            opening: (bind(Layout(row, tools, COMMON), self._special), bind(Layout(row, frame), self._special))
            for opening, row in {"": reasoning, **{one: reasoning and reasoning.led_by(one) for one in leads}}.items()
        }

    def plan(self, task: Task, prompt: str, *, loose: Collection[str] = ()) -> Planned:
        """Return the plan for a task whose rendered prompt is `prompt`; raises `RequestError`.

        The schemas of tools in `loose` do not constrain their calls.
        """
        tools, reasoning, needs = self.choice.tools, self.choice.reasoning, self.choice.needs
        use, continued = task.tools, task.continued
        if needs is not None and needs.writes_calls and not needs.parallel_calls:
            use = replace(use, parallel=False)  # the model was not trained on messages with several calls
        called = tools if use.mode != "none" else None
        tail = prompt[-_TAIL:]
        opening = "" if reasoning is None else reasoning.open_mark(tail, continued=continued)
        reasoning = reasoning and reasoning.led_by(opening)
        closed = reasoning is not None and tail.rstrip(SPACE).endswith(tuple(reasoning.pairs.values()))
        structured = None
        if task.form is not None or use.tools:
            declined = closed or False in (task.variables.get("enable_thinking"), task.variables.get("thinking"))
            structured = constrain(
                task.form,
                tools,
                use,
                reasoning=None if continued or (declined and not opening) else reasoning,
                in_reasoning=bool(opening),
                special=self._special,
                own=self._marks,
                loose=loose,
                continued=continued,
            )
        with_tools, without = self._bound.get(opening, self._bound[""])
        bound = with_tools if called else without
        thoughts = self._budget(task, reasoning, opening, called)
        if bound.layout == Layout():
            return Planned(AnswerPlan(), structured, thoughts)
        special = [bound.names[token] for token in bound.characters]
        marks = stop_marks(reasoning, tools, [tool.name for tool in use.tools] if called else (), special)
        answers = AnswerPlan(
            bound=bound,
            tools={tool.name: tool.parameters for tool in use.tools} if called else None,
            held=called is not None and structured is not None,
            lazy=structured is not None and use.mode == "auto" and task.form is None,
            forced=structured is not None and use.mode == "required",
            most_calls=MAX_TOOL_CALLS if use.parallel else 1,
            in_reasoning=bool(opening),
            behind_reasoning=closed,
            show_reasoning=task.show_thoughts,
            show_special_tokens=task.sampling.get("skip_special_tokens") is False,
            special_tokens=bool(bound.characters),
        )
        first = opening if not opening or opening in marks.states else THOUGHTS
        return Planned(answers, structured, thoughts, replace(marks, first=first, behind=closed))

    def _budget(
        self, task: Task, reasoning: ReasoningFormat | None, opening: str, called: ToolFormat | None
    ) -> ThoughtBudget | None:
        """Return the limit on reasoning in an answer; `called` is the tool-call format, if calls are possible."""
        limit = self._thinking if task.thinking is None else task.thinking
        if limit.tokens < 0:  # no limit
            return None
        if reasoning is None:
            if not limit.required:
                return None
            raise UnsupportedParameterError(
                "thinking_token_budget: it is not supported, because no reasoning format is known for this model; "
                "start the server with --reasoning-parser and the name of its format",
                "thinking_token_budget",
            )
        ends = tuple(getattr(reasoning.flow, "ends", ()))
        if called is not None and called.ends_thoughts:
            ends += tuple("\n" + mark if called.on_lines else mark for mark in called.opens)
        words = self._thinking.message if limit.message is None else limit.message
        if words is None:
            words = LAST_WORDS.get(self._model_type, "")
        return ThoughtBudget(
            tokens=limit.tokens,
            marks=reasoning.pairs or {reasoning.open: reasoning.close},
            ends=ends,
            opened=opening or None,
            message=words,
        )


def stop_marks(
    reasoning: ReasoningFormat | None, form: ToolFormat | None, tools: Collection[str], special: Collection[str]
) -> StopMarks:
    """Return where stop strings apply: in the text of an answer, not in its reasoning or calls.

    Args:
        form: the model's tool-call format, whose marks begin and end calls.
        tools: names of the tools that may be called; without tools, text in the form of a call is text.
        special: names of the special tokens in marks. Text may contain an opening mark of reasoning that is no special
            token, so such a mark counts only at the beginning of a part (`StopMarks.fresh`).
    """
    flow = (form.flow if form else None) or (reasoning.flow if reasoning else None)
    if flow is not None:
        states, fresh = flow.states(tools)
        return StopMarks(states=states, fresh=fresh)
    pairs = reasoning.pairs if reasoning else {}
    strays = (*(reasoning.strays if reasoning else ()), *(form.strays if form else ()), *pairs.values())
    fresh = {opening: opening for opening in pairs if not any(map(opening.startswith, special))}
    states = {"": {**dict.fromkeys(strays, ""), **{opening: opening for opening in pairs if opening not in fresh}}}
    states |= {opening: {end: ""} for opening, end in pairs.items()}
    if form is None or not tools:
        return StopMarks(states=states, fresh=fresh)
    body = form.bodies[0] if form.bodies else None
    closers, end = getattr(body, "closers", ()), getattr(body, "call_end", "")
    states[""] |= dict.fromkeys((mark for mark in (*closers, end) if mark and not mark.startswith("`")), "")
    opens = dict.fromkeys((mark for one in form.opens for mark in _calling(one, form)), CALL)
    names = dict.fromkeys(form.names, "named")
    states[""] |= {**opens, **names}
    states[CALL] = dict.fromkeys(filter(None, closers or (end,)), "")
    states["named"] = dict.fromkeys((end,) if end else getattr(form.named or body, "closers", ()), "")
    states["unmarked"] = {}
    for opening in pairs if form.ends_thoughts else ():
        states[opening] |= {"\n" + mark if form.on_lines else mark: state for mark, state in (opens | names).items()}
    bare = ("[{}(",) if isinstance(form.bare, Pythonic) else _BARE_OBJECTS if form.bare else ()
    fresh |= dict.fromkeys((begun.replace("{}", name) for begun in bare for name in tools), "unmarked")
    return StopMarks(states=states, fresh=fresh)


_BARE_OBJECTS = tuple(
    f'{listed}{begun}"{{}}"'
    for listed in ("", "[")
    for begun in (
        '{"name": ',
        '{"name":',
        '{\n  "name": ',
        '{"type": "function", "name": ',
        '{"type":"function","name":',
    )
)
"""Beginnings of calls without a mark; {} stands for the tool's name."""


def _calling(mark: str, form: ToolFormat) -> tuple[str, ...]:
    """Return the texts that begin a call by this mark; if it is also a word, the beginning of a body must follow."""
    if form.line_start:
        return (f"{mark} ```json", f"{mark}\n```json")
    return (f"{mark}[",) if mark.isalpha() else (mark,)


def constrain(
    structured: StructuredOutputsParams | None,
    form: ToolFormat | None,
    use: ToolUse,
    *,
    reasoning: ReasoningFormat | None,
    in_reasoning: bool,
    special: Mapping[str, int],
    own: Mapping[str, int] | None = None,
    loose: Collection[str] = (),
    continued: bool = False,
) -> StructuredOutputsParams | None:
    """Return the constraint on an answer's whole text; None if any text is allowed.

    If calls are required, structured output does not apply, because it is about content, which such an answer does not
    have. If the model chooses, the answer is either calls or content that follows `structured`.

    Args:
        structured: constraint on the content, if there is one.
        form: the model's tool-call format, even if no tool is offered; None if it is unknown.
        reasoning: format of the reasoning that may precede the answer; None if no reasoning can.
        in_reasoning: whether the prompt has already opened the reasoning.
        special: special tokens of the vocabulary, by name.
        own: tokens such as `<tool_call>` that are not special tokens, by name.
        loose: names of tools whose schemas do not constrain calls.
        continued: whether the prompt ends within an answer, which the model continues.

    Raises:
        RequestError: the constraint cannot be guaranteed.
    """
    offered = use.tools if form is not None else ()
    if use.mode == "required" and not offered:
        raise UnsupportedParameterError(
            "tool_choice is not supported: no format of tool calls is known for this model; start the server with "
            "--tool-parser and the name of its format",
            "tool_choice",
        )
    shared: dict[str, Any] = {
        "parallel": use.parallel,
        "reasoning": reasoning,
        "in_reasoning": in_reasoning,
        "special": special,
        "loose": loose,
    }
    if structured is not None and use.mode != "required":
        if continued and ((form and form.flow) or (reasoning and reasoning.flow)):
            return structured  # only the content of the message remains to be generated
        around = answer_grammar(form, offered, **shared)
        if around is not None:
            return replace(structured, around=around)
        if reasoning is None:
            return structured
        start = None if in_reasoning else reasoning.open
        return replace(structured, reasoning_start=start, reasoning_end=reasoning.close)
    if form is None or not offered:
        return None
    calls = tool_grammar(
        form,
        offered,
        mode="auto" if use.mode == "auto" else "required",
        own=own,
        always=len(use.shown) > len(use.tools),  # the model sees tools that it may not call
        **shared,
    )
    return None if calls is None else StructuredOutputsParams(grammar=calls)


def _compiled(conventions: ChatConventions) -> ChatTemplate | None:
    if conventions.chat_template is None:
        return None
    try:
        return ChatTemplate(conventions.chat_template, conventions.token_names)
    except UnsupportedModelError:  # the engine does not load such a model either
        return None
