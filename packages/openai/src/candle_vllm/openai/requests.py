# SPDX-License-Identifier: MIT
"""OpenAI's requests: bytes -> a validated request -> a task and sampling parameters (step 2 of a request's life).

Precedence of sampling values: the request's, then the model's defaults, then those of `SamplingParams`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from candle_vllm.core.sampling.params import SamplingParams, without_cuts
from candle_vllm.openai.json_body import parse_body
from candle_vllm.openai.protocol.chat import ChatCompletionRequest
from candle_vllm.openai.protocol.completions import CompletionRequest
from candle_vllm.openai.protocol.generation import lora_scales, sampling_values
from candle_vllm.openai.protocol.messages import AssistantMessage, SystemMessage, ToolMessage
from candle_vllm.openai.protocol.messages import ImagePart as WireImage
from candle_vllm.openai.protocol.messages import Message as WireMessage
from candle_vllm.openai.remarks import remark
from candle_vllm.openai.task import Call, Message, Part, Paths, Task, TextPart, text_of

COMPLETION_MAX_TOKENS = 16  # OpenAI's default for /v1/completions; conversations have no limit by default
_SAME = {  # fields of a task, and the attributes of a request with the same values
    "choices": "sequences",
    "beam_penalty": "beam_penalty",
    "model": "model",
    "adapter": "lora_path",
    "request_id": "request_id",
}


def parse_chat_request(body: bytes | Mapping[str, Any] | ChatCompletionRequest) -> ChatCompletionRequest:
    """Parse and validate a chat request from a body or an object, unless it is one already; raises `RequestError`."""
    return parse_body(ChatCompletionRequest, body)


def parse_completion_request(body: bytes | Mapping[str, Any] | CompletionRequest) -> CompletionRequest:
    """Parse and validate a completion request, as `parse_chat_request` does a chat request."""
    return parse_body(CompletionRequest, body)


def read_chat(request: ChatCompletionRequest) -> Task:
    """Convert a validated chat request to a task."""
    messages = tuple(_message(message, f"messages.{index}") for index, message in enumerate(request.messages))
    fields = _fields(request) | {"prompt": "messages", "prediction": "prediction.content"}
    fields["thinking_token_budget"] = fields["thoughts"] = request.budget_field
    if request.max_completion_tokens is not None:
        fields["max_tokens"] = "max_completion_tokens"
    return Task(
        messages=messages,
        paths=Paths(fields, [f"tools.{number}.{tool.schema_path}" for number, tool in enumerate(request.tools or ())]),
        tools=request.tool_use(),
        continued=bool(request.continue_final_message),
        opens_answer=request.add_generation_prompt,
        variables=request.template_kwargs(),
        documents=request.documents,
        chat_template=request.chat_template,
        add_special_tokens=bool(request.add_special_tokens),
        thinking=request.thinking_limit() if request.sets_thinking else None,
        show_thoughts=request.include_reasoning is not False,
        echo=text_of(messages[-1]) if request.echo else "",
        tell_counts=request.continuous_usage or bool(request.timings_per_token),
        **_shared(request),
    )


def _shared(request: ChatCompletionRequest | CompletionRequest) -> dict[str, Any]:
    """Return the fields of a task that do not depend on the kind of request."""
    options = request.stream_options
    if options is not None and options.continuous_usage_stats and not options.include_usage:
        remark(["stream_options.continuous_usage_stats has no effect without include_usage: true"])
    return {name: getattr(request, given) for name, given in _SAME.items()} | {
        "form": request.structured(),
        "sampling": _given(request),
        "tell_ids": bool(request.return_token_ids),
        "cut": request.cut("left"),
        "lora": lora_scales(request.lora),
        "priority": request.priority or 0,
    }


def read_completion(request: CompletionRequest) -> Task:
    """Convert a validated completion request to a task."""
    return Task(
        prompts=tuple(request.prompts),
        suffix=request.suffix or "",
        paths=Paths(_fields(request)),
        add_special_tokens=request.add_special_tokens is not False,
        echo_prompts=bool(request.echo),
        scored_only=request.max_tokens == 0,
        tell_counts=request.continuous_usage,
        **_shared(request),
    )


def to_sampling_params(
    request: ChatCompletionRequest | CompletionRequest, defaults: Mapping[str, Any]
) -> SamplingParams:
    """Return the sampling parameters of `request`; see `sampling_params`."""
    task = read_chat(request) if isinstance(request, ChatCompletionRequest) else read_completion(request)
    return sampling_params(task, defaults)


def sampling_params(task: Task, defaults: Mapping[str, Any]) -> SamplingParams:
    """Return the sampling parameters of a task; `defaults` are the model's. Raises `InvalidParameterError`."""
    if task.sampling.get("mirostat"):
        defaults = without_cuts(defaults)
    given: dict[str, Any] = {"max_tokens": COMPLETION_MAX_TOKENS if task.prompts else None, **defaults, **task.sampling}
    if task.echo_prompts:  # an echo with log-probabilities includes the prompt's log-probabilities
        asked = [given[name] for name in ("prompt_logprobs", "logprobs") if given[name] is not None]
        given["prompt_logprobs"] = max(asked, default=None)
        given["continues_prompt"] = True
    if task.form is not None:
        given["structured_outputs"] = task.form
    return SamplingParams(**given)


def _given(request: ChatCompletionRequest | CompletionRequest) -> dict[str, Any]:
    """Return the sampling values of a request, by field of `SamplingParams`."""
    given = sampling_values(request)
    if request.return_progress and request.stream:
        given["prompt_progress"] = True
    if request.logit_bias:
        given["logit_bias"] = {int(token): value for token, value in request.logit_bias.items()}
    if isinstance(request, ChatCompletionRequest):
        limit = request.max_completion_tokens if request.max_completion_tokens is not None else request.max_tokens
        given["logprobs"] = (request.top_logprobs or 0) if request.logprobs else None
        if request.prediction is not None:
            given["prediction"] = request.prediction.text
    else:
        limit = None if request.max_tokens is None else max(request.max_tokens, 1)
        given["logprobs"] = request.logprobs
    given["prompt_logprobs"] = request.prompt_logprobs
    if limit is not None or request.unlimited:
        given["max_tokens"] = limit
    return given


def _fields(request: ChatCompletionRequest | CompletionRequest) -> dict[str, str]:
    """Return the names of the fields that constrain the content (tools, if none does), and that choose adapters."""
    form = "tools" if request.structured() is None else request.structured_field
    return {"structured_outputs": form, "lora_request": "lora" if request.lora else "model"}


def _parts(message: WireMessage, path: str) -> list[Part]:
    content = message.content
    if isinstance(content, str):
        return [TextPart(content)]
    return [
        part.image(f"{path}.content.{index}") if isinstance(part, WireImage) else TextPart(part.text)
        for index, part in enumerate(content or ())
    ]


def _message(message: WireMessage, path: str) -> Message:
    parts, thoughts = _parts(message, path), None
    calls: tuple[Call, ...] = ()
    if isinstance(message, AssistantMessage):
        thoughts = message.thoughts
        calls = tuple(one.called() for one in message.tool_calls or ())
        if message.refusal:
            text = "\n".join(part.text for part in parts if isinstance(part, TextPart))
            parts = [TextPart(each) for each in (text, message.refusal) if each]
    return Message(
        role="system" if isinstance(message, SystemMessage) else message.role,
        parts=tuple(parts),
        thoughts=thoughts,
        calls=calls,
        call_id=message.tool_call_id if isinstance(message, ToolMessage) else None,
        name=message.name,
    )
