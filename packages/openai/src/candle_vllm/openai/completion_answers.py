# SPDX-License-Identifier: MIT
"""Answers of `/v1/completions`: events -> chunks, chunks -> the whole answer (step 10 of a request's life)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from msgspec import UNSET, UnsetType
from msgspec.structs import replace

from candle_vllm.core.engine.outputs import PositionLogprobs
from candle_vllm.openai.chat_answers import AnswerWriter, by_choice, join_token_ids
from candle_vllm.openai.events import Begun, Ended, Event, Progress, Text, Usage
from candle_vllm.openai.logprobs import (
    CompletionLogprobsWriter,
    echoed_logprobs,
    join_completion_logprobs,
    prompt_logprobs,
)
from candle_vllm.openai.protocol import usage as wire
from candle_vllm.openai.protocol.chat import PromptLogprobs
from candle_vllm.openai.protocol.completions import Completion, CompletionChoice, CompletionLogprobs, CompletionRequest


class EchoedPrompt(NamedTuple):
    """One prompt of a request, with the parts that its answer may repeat.

    Attributes:
        text: text of the prompt; empty unless it is echoed.
        first: text of its first token; empty unless it is echoed with log-probabilities.
    """

    text: str
    first: str
    token_ids: tuple[int, ...]


class CompletionWriter(AnswerWriter[Completion]):
    """Writes the chunks of one completion answer; each choice ends with a chunk with its finish reason and no text."""

    _empty = CompletionChoice(index=0, text="")

    def __init__(self, request: CompletionRequest, prompts: Sequence[EchoedPrompt], *, whole: bool = False) -> None:
        super().__init__(Completion, request, whole=whole)
        self._request = request
        self._prompts = prompts
        self._writers: dict[int, CompletionLogprobsWriter | None] = {}
        self._echoes: dict[int, tuple[CompletionLogprobs, bytes]] = {}  # built once per prompt, for all of its choices

    def _written(self, event: Event) -> Completion | None:
        if isinstance(event, Text):
            writer = self._writers[event.choice]
            logprobs = None if writer is None or event.logprobs is None else writer.add(event.logprobs)
            ids = UNSET if event.ids is None else event.ids
            return self._chunk(CompletionChoice(index=event.choice, text=event.text, logprobs=logprobs, token_ids=ids))
        if isinstance(event, Begun):
            return self._first(event)
        if isinstance(event, Ended):
            return self._ended(event)
        assert isinstance(event, (Progress, Usage)), "a completion has no reasoning and no tool calls"
        return self._counts(event)

    def _first(self, event: Begun) -> Completion | None:
        """Return the chunk before a choice's generated text; None if the request asks for no part of the prompt."""
        request, source = self._request, self._prompts[event.prompt]
        self._fields |= event.head._asdict()
        by_id = bool(request.return_tokens_as_token_ids)
        top = len(request.logprob_token_ids) + 1 if request.logprob_token_ids else request.logprobs
        writer = None if request.logprobs is None or top is None else CompletionLogprobsWriter(top, by_id=by_id)
        self._writers[event.choice] = writer
        logprobs: CompletionLogprobs | None = None
        if writer is not None and request.echo:
            logprobs, begun = self._echo(event, request.logprobs or 0)
            writer.skip(len(source.text), begun)
        shown: PromptLogprobs | UnsetType = UNSET
        if request.prompt_logprobs is not None and event.prompt_logprobs is not None:
            shown = prompt_logprobs(event.prompt_logprobs, request.prompt_logprobs)
        if not (request.echo or request.return_token_ids or shown is not UNSET):
            return None
        choice = CompletionChoice(
            index=event.choice,
            text=source.text,
            logprobs=logprobs,
            prompt_token_ids=source.token_ids if request.return_token_ids else UNSET,
            prompt_logprobs=shown,
        )
        return self._chunk(choice)

    def _echo(self, event: Begun, top: int) -> tuple[CompletionLogprobs, bytes]:
        """Return the prompt's log-probabilities, and the bytes of an incomplete last character."""
        if event.prompt not in self._echoes:
            source, given = self._prompts[event.prompt], event.prompt_logprobs
            assert given is not None
            entries: list[PositionLogprobs] = [entry for entry in given if entry is not None]
            first_id = source.token_ids[0] if self._request.return_tokens_as_token_ids else None
            self._echoes[event.prompt] = echoed_logprobs(source.first, entries, source.text, top, first_id)
        return self._echoes[event.prompt]


def join_completion(chunks: Sequence[Completion]) -> Completion:
    """Join chunks to the whole answer; the last chunk has the usage."""
    head, usage = chunks[0], chunks[-1].usage
    assert isinstance(usage, wire.Usage)
    choices = tuple(_join_choice(*parts) for parts in by_choice(chunk.choices for chunk in chunks))
    return replace(head, choices=choices, usage=usage, prompt_progress=UNSET)


def _join_choice(index: int, parts: Sequence[CompletionChoice]) -> CompletionChoice:
    logprobs = [part.logprobs for part in parts if part.logprobs is not None]
    return CompletionChoice(
        index=index,
        text="".join(part.text for part in parts),
        logprobs=join_completion_logprobs(logprobs) if logprobs else None,
        finish_reason=parts[-1].finish_reason,
        stop_reason=parts[-1].stop_reason,
        token_ids=join_token_ids([part.token_ids for part in parts]),
        prompt_token_ids=next((p.prompt_token_ids for p in parts if p.prompt_token_ids is not UNSET), None),
        prompt_logprobs=next((p.prompt_logprobs for p in parts if p.prompt_logprobs is not UNSET), None),
    )
