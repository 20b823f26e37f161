"""Engine outputs -> chunks (step 10).

There is one path: a whole answer is the sum of the chunks that a stream would have sent (`whole_chat`), so the two
cannot differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
from msgspec import UNSET, UnsetType

from candle_vllm.core.engine.request import FinishReason, RequestMetrics, TokenOutput
from candle_vllm.core.errors import RequestAbortedError, RequestError
from candle_vllm.openai.answers import AnswerPlan
from candle_vllm.openai.conversation import message_text
from candle_vllm.openai.errors import GenerationFailedError
from candle_vllm.openai.logprobs import chat_logprobs, prompt_logprobs
from candle_vllm.openai.protocol.chat import (
    ChatCompletionChunk,
    ChatCompletionRequest,
    ChatDelta,
    ChunkChoice,
    PromptLogprobs,
)
from candle_vllm.openai.protocol.usage import CompletionTokensDetails, PromptTokensDetails, Usage

_FORM, _IDS = "structured_outputs", "allowed_token_ids"  # how core's messages about these begin
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
        self.reasoning: int | None = None  # tokens of thoughts, where there may be any
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
            completion_tokens_details=UNSET if self.reasoning is None else CompletionTokensDetails(self.reasoning),
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


def check_piece(piece: TokenOutput, form: str | None = None) -> None:
    """Raises when the engine gave the sequence up: `RequestError` where the request itself is to blame.

    `form` is the request's name for what core calls `structured_outputs`.
    """
    if piece.finish_reason is FinishReason.ERROR:
        if _is_the_requests_fault(piece):
            message = piece.error or "the request cannot be continued"
            if form is not None and message.startswith(_FORM):
                raise RequestError(message.replace(_FORM, form, 1), form)
            raise RequestError(message, _IDS if message.startswith(_IDS) else None)
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
        self,
        head: Head,
        request: ChatCompletionRequest,
        prompt_token_ids: Sequence[int],
        plan: AnswerPlan,
        *,
        whole: bool = False,
    ) -> None:
        self._head = head
        self._request = request
        self._readers = [plan.reader() for _ in range(request.sequences)]
        self._may_reason = plan.may_reason
        self._form = request.structured_field if request.structured() is not None else "tools"
        # The official client adds the pieces up: a message of calls alone has no content, not an empty one.
        self._first_content = None if plan.tools else ""
        self._prompt_token_ids = tuple(prompt_token_ids) if request.return_token_ids else UNSET
        self._echo = message_text(request.messages[-1]) if request.echo else ""
        self._usage_last = whole or request.include_usage
        self._counts = TokenCounts()
        self._started: set[int] = set()
        self._unfinished = request.sequences

    def add(self, prompt: int, piece: TokenOutput) -> list[ChatCompletionChunk]:
        """The chunks that one piece makes; none when it has nothing to show."""
        check_piece(piece, self._form)
        reader = self._readers[piece.index]
        deltas = reader.read(piece)
        self._counts.add(prompt, piece, len(piece.token_ids))
        if self._may_reason:
            self._counts.reasoning = sum(one.reasoning_tokens for one in self._readers)
        chunks = [] if piece.index in self._started else self._first(piece)
        chunks += self._news(piece, deltas)
        if piece.finish_reason is not None:
            self._unfinished -= 1
            chunks.append(
                self._chunk(
                    ChunkChoice(
                        index=piece.index,
                        delta=ChatDelta(),
                        finish_reason=reader.finish_reason(piece),
                        stop_reason=piece.stop_reason,
                        token_ids=() if self._request.return_token_ids else UNSET,
                    )
                )
            )
        return chunks

    def _news(self, piece: TokenOutput, deltas: list[ChatDelta]) -> list[ChatCompletionChunk]:
        """One chunk per delta; the first has what there is to say of the tokens, which may be all there is."""
        if self._readers[piece.index].hides:
            piece = msgspec.structs.replace(piece, token_ids=(), logprobs=None)
        ids = piece.token_ids if self._request.return_token_ids else UNSET
        if not deltas and piece.token_ids and (piece.logprobs is not None or ids is not UNSET):
            deltas = [ChatDelta(content="")]
        chunks = []
        for number, delta in enumerate(deltas):
            choice = ChunkChoice(index=piece.index, delta=delta)
            if number == 0:
                logprobs = None if piece.logprobs is None else chat_logprobs(piece.logprobs)
                choice = ChunkChoice(index=piece.index, delta=delta, logprobs=logprobs, token_ids=ids)
            chunks.append(self._chunk(choice))
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
        role = ChunkChoice(index=piece.index, delta=ChatDelta(role="assistant", content=self._first_content))
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


def join_token_ids(parts: Sequence[tuple[int, ...] | UnsetType]) -> tuple[int, ...] | UnsetType:
    """The ids of the parts that have them; absent when none has."""
    known = [ids for ids in parts if ids is not UNSET]
    return tuple(token for ids in known for token in ids) if known else UNSET
