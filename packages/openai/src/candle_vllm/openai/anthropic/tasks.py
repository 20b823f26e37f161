# SPDX-License-Identifier: MIT
"""Anthropic's requests -> tasks, and errors worded as Anthropic's clients expect (step 2 of a request's life)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from candle_vllm.core.errors import InvalidParameterError, PromptTooLongError, RequestError
from candle_vllm.core.sampling.structured import StructuredOutputsParams
from candle_vllm.openai.anthropic.request import CountTokensRequest, MessagesRequest, ThinkingOff
from candle_vllm.openai.anthropic.tools import Tool, ToolNameChoice
from candle_vllm.openai.anthropic.turns import read_turns
from candle_vllm.openai.protocol.tools import function_of, unknown_tool
from candle_vllm.openai.task import Choice, Paths, Task, ThinkingLimit, ToolUse

_FORM = "output_config.format.schema"
_CHOICES = {
    "auto": Choice(),
    "any": Choice("required"),
    "tool": Choice("required"),
    "none": Choice("none"),
}
_PREFILL = "continue_final_message"  # core's name of the field by which the last message begins the answer


class Reading(NamedTuple):
    """A task, and the path of the request's message in which the task's last message begins."""

    task: Task
    last: str

    @contextmanager
    def worded(self) -> Iterator[None]:
        """Context manager that rewords errors about the prompt as Anthropic's clients expect them."""
        try:
            yield
        except RequestError as error:
            text = str(error)
            if _PREFILL in text or error.param == _PREFILL:
                error.param = self.last
                text = (
                    f"{self.last} has role assistant, so the answer would begin with it, but the model's template does "
                    "not write it as it is: end with a user message"
                )
            if isinstance(error, PromptTooLongError) and error.param != "max_tokens":
                text = f"prompt is too long: {text}"  # clients recognise this wording and shorten the prompt
            error.args = (text, *error.args[1:])
            raise


def read_messages(request: MessagesRequest | CountTokensRequest, sampling_defaults: Mapping[str, Any]) -> Reading:
    """Convert a validated request to a task; raises `RequestError`.

    `sampling_defaults` are values, by name in `SamplingParams`, for fields that the request does not set.
    """
    turns, prefilled = read_turns(request.system, request.messages)
    form = _form(request)
    budget = getattr(request.thinking, "budget_tokens", None)
    thinks = None if request.thinking is None else not isinstance(request.thinking, ThinkingOff)
    task = Task(
        messages=tuple(turn.message for turn in turns),
        paths=Paths(
            {"prompt": "messages", "stop": "stop_sequences", "structured_outputs": "tools" if form is None else _FORM},
            [
                f"tools.{number}.input_schema"
                for number, tool in enumerate(request.tools or ())
                if isinstance(tool, Tool)
            ],
        ),
        tools=_tool_use(request),
        form=form,
        sampling=_sampling(request, sampling_defaults) if isinstance(request, MessagesRequest) else {},
        model=request.model,
        continued=prefilled,
        variables={} if thinks is None else {"thinking": thinks, "enable_thinking": thinks},
        # Clients send a budget to every model; it has no effect on a model whose thinking has no marks.
        thinking=None if budget is None else ThinkingLimit(budget, required=False),
        show_thoughts=thinks is not False,
    )
    return Reading(task, turns[-1].source)


def _sampling(request: MessagesRequest, defaults: Mapping[str, Any]) -> dict[str, Any]:
    given = {
        "max_tokens": request.max_tokens,
        "stop": request.stop_sequences or None,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k,
    }
    return {**defaults, **{name: value for name, value in given.items() if value is not None}}


def _form(request: MessagesRequest | CountTokensRequest) -> StructuredOutputsParams | None:
    if request.output_config is None or request.output_config.format is None:
        return None
    try:
        return StructuredOutputsParams(json=request.output_config.format.json_schema)
    except InvalidParameterError as error:
        reason = str(error).removeprefix("structured_outputs: ")
        raise InvalidParameterError(f"{_FORM} cannot be used: {reason}", _FORM) from None


def _tool_use(request: MessagesRequest | CountTokensRequest) -> ToolUse:
    tools = [tool for tool in request.tools or () if isinstance(tool, Tool)]
    functions = [function_of(one.name, one.description, one.input_schema, one.strict) for one in tools]
    given = request.tool_choice
    if given is not None and given.type != "none" and request.tools is None:
        raise InvalidParameterError("tool_choice needs tools: there is nothing to choose from", "tool_choice")
    choice = _CHOICES["auto" if given is None else given.type]
    if isinstance(given, ToolNameChoice):
        choice = choice._replace(named=given.name)
        if functions and given.name not in (names := [function.name for function in functions]):
            raise InvalidParameterError(f"tool_choice.name {unknown_tool(given.name, names)}", "tool_choice.name")
    parallel = not getattr(given, "disable_parallel_tool_use", None)
    return choice.among(functions, [tool.shown() for tool in tools], parallel=parallel)
