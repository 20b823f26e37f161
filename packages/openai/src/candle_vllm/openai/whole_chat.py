"""The chunks of a chat answer -> the whole answer (step 10)."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import UNSET

from candle_vllm.openai.protocol.chat import (
    ChatChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatLogprobs,
    ChatMessage,
    ChunkChoice,
    FunctionCallOut,
    ToolCallOut,
)
from candle_vllm.openai.protocol.usage import Usage
from candle_vllm.openai.streaming import join_token_ids


def join_chat(chunks: Sequence[ChatCompletionChunk]) -> ChatCompletion:
    """The whole answer that `chunks`, the last of which has the usage, amount to."""
    head, usage = chunks[0], chunks[-1].usage
    assert isinstance(usage, Usage)
    choices: dict[int, list[ChunkChoice]] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            choices.setdefault(choice.index, []).append(choice)
    return ChatCompletion(
        id=head.id,
        created=head.created,
        model=head.model,
        system_fingerprint=head.system_fingerprint,
        choices=tuple(_join_choice(index, choices[index]) for index in sorted(choices)),
        usage=usage,
        prompt_logprobs=next((c.prompt_logprobs for c in chunks if c.prompt_logprobs is not UNSET), UNSET),
        prompt_token_ids=head.prompt_token_ids,
    )


def _join_choice(index: int, parts: Sequence[ChunkChoice]) -> ChatChoice:
    last = parts[-1]
    assert last.finish_reason is not None
    logprobs = [part.logprobs for part in parts if part.logprobs is not None]
    return ChatChoice(
        index=index,
        message=_join_message(parts),
        finish_reason=last.finish_reason,
        logprobs=ChatLogprobs(tuple(entry for part in logprobs for entry in part.content)) if logprobs else None,
        stop_reason=None if last.stop_reason is UNSET else last.stop_reason,
        token_ids=join_token_ids([part.token_ids for part in parts]),
    )


def _join_message(parts: Sequence[ChunkChoice]) -> ChatMessage:
    """The message; content is null where there are only thoughts or calls."""
    content = "".join(part.delta.content or "" for part in parts)
    thoughts = [part.delta.reasoning_content for part in parts if part.delta.reasoning_content is not None]
    calls = _join_calls(parts)
    return ChatMessage(
        content=None if not content and (thoughts or calls) else content,
        reasoning_content="".join(thoughts) if thoughts else UNSET,
        tool_calls=calls or UNSET,
    )


def _join_calls(parts: Sequence[ChunkChoice]) -> tuple[ToolCallOut, ...]:
    ids: list[str] = []
    names: list[str] = []
    arguments: list[list[str]] = []
    for call in (call for part in parts for call in part.delta.tool_calls or ()):
        function = call.function
        if call.id is not None:
            ids.append(call.id)
            names.append((function and function.name) or "")
            arguments.append([])
        if function is not None and function.arguments:
            arguments[call.index].append(function.arguments)
    return tuple(
        ToolCallOut(id=one, function=FunctionCallOut(name, "".join(text)))
        for one, name, text in zip(ids, names, arguments, strict=True)
    )
