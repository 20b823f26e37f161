# SPDX-License-Identifier: MIT
"""The engine's log-probabilities -> the three wire forms: chat, OpenAI's older completions form, vLLM's prompt form."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from candle_vllm.core.engine.outputs import PositionLogprobs, TokenLogprob
from candle_vllm.openai.protocol.chat import ChatLogprobs, ChatTokenLogprob, PromptLogprob, PromptLogprobs, TopLogprob
from candle_vllm.openai.protocol.completions import CompletionLogprobs

LOWEST = -9999.0  # replaces minus infinity, which JSON does not have; OpenAI's value


def chat_logprobs(entries: Sequence[PositionLogprobs], *, by_id: bool = False) -> ChatLogprobs:
    """Return one wire entry per token; `by_id` names tokens as vLLM does, `token_id:5`."""

    def shown(token: TokenLogprob) -> tuple[str, float, tuple[int, ...]]:
        return _id_text(token) if by_id else token.text, _finite(token.logprob), tuple(token.bytes)

    tops = (tuple(TopLogprob(*shown(token)) for token in entry.top) for entry in entries)
    return ChatLogprobs(tuple(ChatTokenLogprob(*shown(entry.chosen), top) for entry, top in zip(entries, tops)))


def prompt_logprobs(entries: Sequence[PositionLogprobs | None], top: int) -> PromptLogprobs:
    """Return for each prompt token the `top` likeliest tokens and the token itself, by id; None for the first token."""
    return tuple(None if entry is None else _prompt_entry(entry, top) for entry in entries)


class CompletionLogprobsWriter:
    """Writes the completions form for one choice, part by part, with the offset of each token in the choice's text."""

    def __init__(self, top: int, *, by_id: bool = False) -> None:
        self._top = top
        self._name = _id_text if by_id else _unique_text
        self._offset = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, entries: Sequence[PositionLogprobs]) -> CompletionLogprobs:
        """Return the entries of the next tokens."""
        offsets = []
        for entry in entries:
            first = self._decoder.decode(entry.chosen.bytes[:1])
            replaced = max(len(first) - (not self.begun), 0)  # incomplete characters of the tokens before
            offsets.append(self._offset + replaced)
            self._offset += len(first) + len(self._decoder.decode(entry.chosen.bytes[1:]))
        return CompletionLogprobs(
            tokens=tuple(self._name(entry.chosen) for entry in entries),
            token_logprobs=tuple(_finite(entry.chosen.logprob) for entry in entries),
            top_logprobs=tuple(map(self._top_entry, entries)),
            text_offset=tuple(offsets),
        )

    def skip(self, characters: int, begun: bytes = b"") -> None:
        """Continue after the echoed prompt, which ends with `begun`, the bytes of an incomplete character."""
        self._offset += characters
        self._decoder.decode(begun)

    @property
    def begun(self) -> bytes:
        """Bytes of an incomplete character at the end of the last tokens."""
        return self._decoder.getstate()[0]

    def _top_entry(self, entry: PositionLogprobs) -> dict[str, float]:
        tokens = (entry.chosen, *entry.top[: self._top])  # the token itself is the first entry, as in vLLM's answers
        return {self._name(token): _finite(token.logprob) for token in tokens}


def echoed_logprobs(
    first: str, entries: Sequence[PositionLogprobs], text: str, top: int, first_id: int | None = None
) -> tuple[CompletionLogprobs, bytes]:
    """Return the log-probabilities of the echoed prompt `text`; the first token's is None.

    The second result is the bytes of an incomplete character at the end of the prompt. If `first_id`, the id of the
    first token, is given, tokens are named by their ids.
    """
    writer = CompletionLogprobsWriter(top, by_id=first_id is not None)
    writer.skip(len(first) if text.startswith(first) else 0)
    rest = writer.add(entries)
    echoed = CompletionLogprobs(
        tokens=(first if first_id is None else f"token_id:{first_id}", *rest.tokens),
        token_logprobs=(None, *rest.token_logprobs),
        top_logprobs=(None, *rest.top_logprobs),
        text_offset=(0, *rest.text_offset),
    )
    return echoed, writer.begun


def join_completion_logprobs(parts: Sequence[CompletionLogprobs]) -> CompletionLogprobs:
    """Join the parts of one choice."""
    if len(parts) == 1:
        return parts[0]
    return CompletionLogprobs(
        tokens=tuple(token for part in parts for token in part.tokens),
        token_logprobs=tuple(value for part in parts for value in part.token_logprobs),
        top_logprobs=tuple(entry for part in parts for entry in part.top_logprobs),
        text_offset=tuple(offset for part in parts for offset in part.text_offset),
    )


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST)


def _unique_text(token: TokenLogprob) -> str:
    """Return the token's text, or its bytes if it is a part of a character: the texts of all such tokens are equal."""
    try:
        return token.bytes.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.bytes)


def _id_text(token: TokenLogprob) -> str:
    return f"token_id:{token.token_id}"


def _prompt_entry(entry: PositionLogprobs, top: int) -> dict[str, PromptLogprob]:
    tokens = {token.token_id: token for token in (entry.chosen, *entry.top[:top])}
    return {
        str(token_id): PromptLogprob(_finite(token.logprob), token.rank, token.text)
        for token_id, token in tokens.items()
    }
