"""The same as `streaming` for `/v1/completions`: pieces -> chunks, chunks -> the whole answer (step 10)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from msgspec import UNSET, UnsetType

from candle_vllm.core.engine.request import FinishReason, PositionLogprobs, TokenOutput
from candle_vllm.openai.logprobs import (
    CompletionLogprobsWriter,
    echoed_logprobs,
    join_completion_logprobs,
    prompt_logprobs,
)
from candle_vllm.openai.protocol.chat import PromptLogprobs
from candle_vllm.openai.protocol.completions import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
)
from candle_vllm.openai.protocol.usage import Usage
from candle_vllm.openai.streaming import (
    Head,
    TokenCounts,
    check_complete,
    check_piece,
    join_token_ids,
    running_usage,
)


class EchoedPrompt(NamedTuple):
    """One prompt of a request, as far as its answer may repeat it.

    Attributes:
        text: the prompt; empty unless it is echoed.
        first: text of its first token; empty unless it is echoed with log-probabilities.
        token_ids: its tokens.
    """

    text: str
    first: str
    token_ids: tuple[int, ...]


class CompletionChunker:
    """The chunks of one completion answer; each choice ends with a chunk that has its finish reason and no text."""

    def __init__(
        self, head: Head, request: CompletionRequest, prompts: Sequence[EchoedPrompt], *, whole: bool = False
    ) -> None:
        self._head = head
        self._request = request
        self._prompts = prompts
        self._usage_last = whole or request.include_usage
        self._counts = TokenCounts()
        self._writers: dict[int, CompletionLogprobsWriter | None] = {}
        self._unfinished = len(prompts) * request.sequences
        # Sequence 0 of a prompt brings the prompt's log-probabilities; the others wait for them where they echo.
        self._awaits_prompt = bool(request.echo) and request.logprobs is not None
        self._prompt_logprobs: dict[int, Sequence[PositionLogprobs | None]] = {}
        self._echoes: dict[int, CompletionLogprobs] = {}  # made once per prompt, for all of its choices
        self._held: dict[int, list[TokenOutput]] = {}

    def add(self, prompt: int, piece: TokenOutput) -> list[Completion]:
        """The chunks that one piece of prompt number `prompt` makes; none when it has nothing to show."""
        check_piece(piece, self._request.structured_field)
        if piece.prompt_logprobs is not None:
            self._prompt_logprobs[prompt] = piece.prompt_logprobs
        elif self._awaits_prompt and prompt not in self._prompt_logprobs:
            self._held.setdefault(prompt, []).append(piece)
            return []
        chunks = self._emit(prompt, piece)
        for held in self._held.pop(prompt, ()):
            chunks.extend(self._emit(prompt, held))
        return chunks

    def end(self) -> list[Completion]:
        """What follows the last piece: the usage, where it was asked for."""
        check_complete(self._unfinished)
        if not self._usage_last:
            return []
        return [Completion(**self._head._asdict(), choices=(), usage=self._counts.usage(final=True))]

    def _emit(self, prompt: int, piece: TokenOutput) -> list[Completion]:
        # max_tokens 0 scores the prompt: the engine must make one token, which is not part of the answer.
        scored_only = self._request.max_tokens == 0
        self._counts.add(prompt, piece, 0 if scored_only else len(piece.token_ids))
        index = prompt * self._request.sequences + piece.index
        chunks = [] if index in self._writers else self._first(prompt, piece, index)
        if not scored_only:
            chunks.extend(self._news(piece, index))
        if piece.finish_reason is not None:
            self._unfinished -= 1
            reason = FinishReason.LENGTH if scored_only else piece.finish_reason
            chunks.append(
                self._chunk(
                    CompletionChoice(
                        index=index,
                        text="",
                        finish_reason=reason.value,
                        stop_reason=None if scored_only else piece.stop_reason,
                        token_ids=() if self._request.return_token_ids else UNSET,
                    )
                )
            )
        return chunks

    def _news(self, piece: TokenOutput, index: int) -> list[Completion]:
        ids = piece.token_ids if self._request.return_token_ids else UNSET
        if not piece.text and not (piece.token_ids and (piece.logprobs is not None or ids is not UNSET)):
            return []
        writer = self._writers[index]
        logprobs = None if writer is None or piece.logprobs is None else writer.add(piece.logprobs)
        return [self._chunk(CompletionChoice(index=index, text=piece.text, logprobs=logprobs, token_ids=ids))]

    def _first(self, prompt: int, piece: TokenOutput, index: int) -> list[Completion]:
        """The chunk before a choice's own text; only where the request asks for something of the prompt."""
        request, source = self._request, self._prompts[prompt]
        writer = None if request.logprobs is None else CompletionLogprobsWriter(request.logprobs)
        self._writers[index] = writer
        logprobs: CompletionLogprobs | None = None
        if writer is not None and request.echo:
            logprobs = self._echo(prompt, request.logprobs or 0)
            writer.skip(len(source.text))
        shown: PromptLogprobs | UnsetType = UNSET
        if request.prompt_logprobs is not None and piece.prompt_logprobs is not None:
            shown = prompt_logprobs(piece.prompt_logprobs, request.prompt_logprobs)
        if not (request.echo or request.return_token_ids or shown is not UNSET):
            return []
        choice = CompletionChoice(
            index=index,
            text=source.text,
            logprobs=logprobs,
            prompt_token_ids=source.token_ids if request.return_token_ids else UNSET,
            prompt_logprobs=shown,
        )
        return [self._chunk(choice)]

    def _echo(self, prompt: int, top: int) -> CompletionLogprobs:
        if prompt not in self._echoes:
            source = self._prompts[prompt]
            entries = [entry for entry in self._prompt_logprobs[prompt] if entry is not None]
            self._echoes[prompt] = echoed_logprobs(source.first, entries, source.text, top)
        return self._echoes[prompt]

    def _chunk(self, choice: CompletionChoice) -> Completion:
        head = self._head
        return Completion(
            id=head.id,
            created=head.created,
            model=head.model,
            system_fingerprint=head.system_fingerprint,
            choices=(choice,),
            usage=running_usage(self._request, self._counts),
        )


def join_completion(chunks: Sequence[Completion]) -> Completion:
    """The whole answer that `chunks`, the last of which has the usage, amount to."""
    head, usage = chunks[0], chunks[-1].usage
    assert isinstance(usage, Usage)
    choices: dict[int, list[CompletionChoice]] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            choices.setdefault(choice.index, []).append(choice)
    return Completion(
        id=head.id,
        created=head.created,
        model=head.model,
        system_fingerprint=head.system_fingerprint,
        choices=tuple(_join_choice(index, choices[index]) for index in sorted(choices)),
        usage=usage,
    )


def _join_choice(index: int, parts: Sequence[CompletionChoice]) -> CompletionChoice:
    logprobs = [part.logprobs for part in parts if part.logprobs is not None]
    return CompletionChoice(
        index=index,
        text="".join(part.text for part in parts),
        logprobs=join_completion_logprobs(logprobs) if logprobs else None,
        finish_reason=parts[-1].finish_reason,
        stop_reason=parts[-1].stop_reason,
        token_ids=join_token_ids([part.token_ids for part in parts]),
        prompt_token_ids=next((p.prompt_token_ids for p in parts if p.prompt_token_ids is not UNSET), UNSET),
        prompt_logprobs=next((p.prompt_logprobs for p in parts if p.prompt_logprobs is not UNSET), UNSET),
    )
