"""Engine outputs -> chunks (step 10), and chunks -> whole answers.

There is one path: a whole answer is the sum of the chunks that a stream would have sent, so the two cannot differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
from msgspec import UNSET, UnsetType

from candle_vllm.core.engine.request import FinishReason, RequestMetrics, TokenOutput
from candle_vllm.core.errors import RequestAbortedError, RequestError
from candle_vllm.openai.conversation import text_of
from candle_vllm.openai.errors import GenerationFailedError
from candle_vllm.openai.logprobs import chat_logprobs, prompt_logprobs
from candle_vllm.openai.protocol.chat import (
    ChatChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    ChunkChoice,
    PromptLogprobs,
)
from candle_vllm.openai.protocol.usage import PromptTokensDetails, Usage

_DEAD_END = "no token may be chosen"  # how the sampler's message begins


class Head(NamedTuple):
    """What every chunk of an answer repeats; `created` is in Unix seconds."""

    id: str
    created: int
    model: str
    system_fingerprint: str


def to_json_bytes(value: msgspec.Struct) -> bytes:
    """An answer, chunk or error as JSON in UTF-8."""
    return msgspec.json.encode(value)


class TokenCounts:
    """Adds up the usage of a request whose prompts are numbered from 0."""

    def __init__(self) -> None:
        self._prompts: dict[int, int] = {}
        self._cached: dict[int, int] = {}
        self._completion = 0
        self._prompt_ms: int | UnsetType = UNSET
        self._completion_ms: int | UnsetType = UNSET

    def add(self, prompt: int, piece: TokenOutput, new_tokens: int) -> None:
        """Takes the counts of one piece."""
        self._prompts[prompt] = piece.num_prompt_tokens
        if piece.index == 0:  # the other sequences share its prompt, and find that in the cache when it is run
            self._cached.setdefault(prompt, piece.num_cached_tokens)
        self._completion += new_tokens
        if piece.metrics is not None:
            self._add_times(piece.metrics)

    def usage(self, *, final: bool) -> Usage:
        """The counts so far; the times only when `final`."""
        prompt = sum(self._prompts.values())
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=self._completion,
            total_tokens=prompt + self._completion,
            prompt_tokens_details=PromptTokensDetails(sum(self._cached.values())),
            prompt_time_costs=self._prompt_ms if final else UNSET,
            completion_time_costs=self._completion_ms if final else UNSET,
        )

    def _add_times(self, times: RequestMetrics) -> None:
        self._prompt_ms = _longer(self._prompt_ms, times.first_scheduled_time, times.first_token_time)
        self._completion_ms = _longer(self._completion_ms, times.first_token_time, times.finished_time)


def _longer(known: int | UnsetType, start: float | None, end: float | None) -> int | UnsetType:
    if start is None or end is None:
        return known
    return max(round((end - start) * 1000), 0 if known is UNSET else known)


def check_piece(piece: TokenOutput) -> None:
    """Raises when the engine gave the sequence up: `RequestError` where the request itself is to blame."""
    if piece.finish_reason is FinishReason.ERROR:
        if _is_the_requests_fault(piece):
            raise RequestError(piece.error or "the request cannot be continued")
        raise GenerationFailedError(piece.error or "the engine gave no reason")
    if piece.finish_reason is FinishReason.ABORT:
        raise RequestAbortedError("The request was aborted before it finished.")


def _is_the_requests_fault(piece: TokenOutput) -> bool:
    """True for a dead end: what the request allows and forbids leaves no token to choose."""
    kind: str | None = getattr(piece, "error_kind", None)
    return kind == "request" if kind is not None else (piece.error or "").startswith(_DEAD_END)


class ChatChunker:
    """The chunks of one chat answer.

    Each choice begins with its role and ends with a chunk that has its finish reason and no text.
    """

    def __init__(
        self, head: Head, request: ChatCompletionRequest, prompt_token_ids: Sequence[int], *, whole: bool = False
    ) -> None:
        self._head = head
        self._request = request
        self._prompt_token_ids = tuple(prompt_token_ids) if request.return_token_ids else UNSET
        self._echo = text_of(request.messages[-1].content) if request.echo else ""
        self._usage_last = whole or request.include_usage
        self._counts = TokenCounts()
        self._started: set[int] = set()
        self._unfinished = request.sequences

    def add(self, prompt: int, piece: TokenOutput) -> list[ChatCompletionChunk]:
        """The chunks that one piece makes; none when it has nothing to show."""
        check_piece(piece)
        self._counts.add(prompt, piece, len(piece.token_ids))
        chunks = [] if piece.index in self._started else self._first(piece)
        ids = piece.token_ids if self._request.return_token_ids else UNSET
        if piece.text or (piece.token_ids and (piece.logprobs is not None or ids is not UNSET)):
            logprobs = None if piece.logprobs is None else chat_logprobs(piece.logprobs)
            delta = ChatDelta(content=piece.text)
            chunks.append(self._chunk(ChunkChoice(index=piece.index, delta=delta, logprobs=logprobs, token_ids=ids)))
        if piece.finish_reason is not None:
            self._unfinished -= 1
            chunks.append(
                self._chunk(
                    ChunkChoice(
                        index=piece.index,
                        delta=ChatDelta(),
                        finish_reason=piece.finish_reason.value,
                        stop_reason=piece.stop_reason,
                        token_ids=() if self._request.return_token_ids else UNSET,
                    )
                )
            )
        return chunks

    def end(self) -> list[ChatCompletionChunk]:
        """What follows the last piece: the usage, where it was asked for."""
        check_complete(self._unfinished)
        if not self._usage_last:
            return []
        return [ChatCompletionChunk(**self._head._asdict(), choices=(), usage=self._counts.usage(final=True))]

    def _first(self, piece: TokenOutput) -> list[ChatCompletionChunk]:
        token_ids = UNSET if self._started else self._prompt_token_ids
        self._started.add(piece.index)
        shown: PromptLogprobs | UnsetType = UNSET
        if piece.prompt_logprobs is not None and self._request.prompt_logprobs is not None:
            shown = prompt_logprobs(piece.prompt_logprobs, self._request.prompt_logprobs)
        role = ChunkChoice(index=piece.index, delta=ChatDelta(role="assistant", content=""))
        first = self._chunk(role, prompt_logprobs=shown, prompt_token_ids=token_ids)
        if not self._echo:
            return [first]
        return [first, self._chunk(ChunkChoice(index=piece.index, delta=ChatDelta(content=self._echo)))]

    def _chunk(self, choice: ChunkChoice, **extras: Any) -> ChatCompletionChunk:
        head = self._head
        return ChatCompletionChunk(
            id=head.id,
            created=head.created,
            model=head.model,
            system_fingerprint=head.system_fingerprint,
            choices=(choice,),
            usage=running_usage(self._request, self._counts),
            **extras,
        )


def running_usage(request: Any, counts: TokenCounts) -> Usage | UnsetType | None:
    """The `usage` of a chunk that is not the last: absent, null, or the counts so far."""
    if request.continuous_usage:
        return counts.usage(final=False)
    return None if request.include_usage else UNSET


def check_complete(unfinished: int) -> None:
    """Raises when the engine's stream ended before its sequences did."""
    if unfinished:
        raise GenerationFailedError(f"the stream ended with {unfinished} sequences unfinished")


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
        message=ChatMessage(content="".join(part.delta.content or "" for part in parts)),
        finish_reason=last.finish_reason,
        logprobs=ChatLogprobs(tuple(entry for part in logprobs for entry in part.content)) if logprobs else None,
        stop_reason=None if last.stop_reason is UNSET else last.stop_reason,
        token_ids=join_token_ids([part.token_ids for part in parts]),
    )


def join_token_ids(parts: Sequence[tuple[int, ...] | UnsetType]) -> tuple[int, ...] | UnsetType:
    """The ids of the parts that have them; absent when none has."""
    known = [ids for ids in parts if ids is not UNSET]
    return tuple(token for ids in known for token in ids) if known else UNSET
