# SPDX-License-Identifier: MIT
"""The engine's log-probabilities -> the three wire forms: chat, the older completions form, vLLM's prompt form."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from candle_vllm.core.engine.outputs import PositionLogprobs, TokenLogprob
from candle_vllm.openai.protocol.chat import (
    ChatLogprobs,
    ChatTokenLogprob,
    PromptLogprob,
    PromptLogprobs,
    TopLogprob,
)
from candle_vllm.openai.protocol.completions import CompletionLogprobs

LOWEST = -9999.0  # stands for minus infinity, which JSON cannot say; OpenAI's choice


def chat_logprobs(entries: Sequence[PositionLogprobs]) -> ChatLogprobs:
    """One wire entry per token."""
    return ChatLogprobs(tuple(_chat_entry(entry) for entry in entries))


def prompt_logprobs(entries: Sequence[PositionLogprobs | None], top: int) -> PromptLogprobs:
    """Per prompt token: the `top` likeliest and the token itself by id; null for the first token."""
    return tuple(None if entry is None else _prompt_entry(entry, top) for entry in entries)


class CompletionLogprobsWriter:
    """Writes the older form for one choice, piece by piece; it remembers how far the text has come."""

    def __init__(self, top: int) -> None:
        self._top = top
        self._offset = 0
        self._decoder = _decoder()

    def add(self, entries: Sequence[PositionLogprobs]) -> CompletionLogprobs:
        """The entries of the next tokens."""
        offsets = []
        for entry in entries:
            offsets.append(self._offset)
            self._offset += len(self._decoder.decode(entry.chosen.bytes))
        return CompletionLogprobs(
            tokens=tuple(_unique_text(entry.chosen) for entry in entries),
            token_logprobs=tuple(_finite(entry.chosen.logprob) for entry in entries),
            top_logprobs=tuple(self._top_entry(entry) for entry in entries),
            text_offset=tuple(offsets),
        )

    def skip(self, characters: int, begun: bytes = b"") -> None:
        """Goes on behind text that another writer has written, the echoed prompt, which ended with `begun`."""
        self._offset += characters
        self._decoder.decode(begun)

    @property
    def begun(self) -> bytes:
        """The beginning of a character that the last tokens hold."""
        return self._decoder.getstate()[0]

    def _top_entry(self, entry: PositionLogprobs) -> dict[str, float]:
        likely = {_unique_text(token): _finite(token.logprob) for token in entry.top[: self._top]}
        return likely | {_unique_text(entry.chosen): _finite(entry.chosen.logprob)}


def echoed_logprobs(
    first: str, entries: Sequence[PositionLogprobs], text: str, top: int
) -> tuple[CompletionLogprobs, bytes]:
    """The echoed prompt `text`: its first token, which has no log-probability, and the others.

    With it comes the beginning of a character that the prompt ends with.
    """
    writer = CompletionLogprobsWriter(top)
    writer.skip(len(first) if text.startswith(first) else 0)
    rest = writer.add(entries)
    echoed = CompletionLogprobs(
        tokens=(first, *rest.tokens),
        token_logprobs=(None, *rest.token_logprobs),
        top_logprobs=(None, *rest.top_logprobs),
        text_offset=(0, *rest.text_offset),
    )
    return echoed, writer.begun


def join_completion_logprobs(parts: Sequence[CompletionLogprobs]) -> CompletionLogprobs:
    """The parts of one choice as one."""
    if len(parts) == 1:
        return parts[0]
    return CompletionLogprobs(
        tokens=tuple(token for part in parts for token in part.tokens),
        token_logprobs=tuple(value for part in parts for value in part.token_logprobs),
        top_logprobs=tuple(entry for part in parts for entry in part.top_logprobs),
        text_offset=tuple(offset for part in parts for offset in part.text_offset),
    )


def _decoder() -> codecs.IncrementalDecoder:
    return codecs.getincrementaldecoder("utf-8")("replace")


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST)


def _unique_text(token: TokenLogprob) -> str:
    """The token's text; tokens that are parts of characters would all read the same, so their bytes are spelt out."""
    try:
        return token.bytes.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.bytes)


def _chat_entry(entry: PositionLogprobs) -> ChatTokenLogprob:
    chosen = entry.chosen
    top = tuple(TopLogprob(token.text, _finite(token.logprob), tuple(token.bytes)) for token in entry.top)
    return ChatTokenLogprob(chosen.text, _finite(chosen.logprob), tuple(chosen.bytes), top)


def _prompt_entry(entry: PositionLogprobs, top: int) -> dict[str, PromptLogprob]:
    tokens = {token.token_id: token for token in (*entry.top[:top], entry.chosen)}
    return {
        str(token_id): PromptLogprob(_finite(token.logprob), token.rank, token.text)
        for token_id, token in tokens.items()
    }
