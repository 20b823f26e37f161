# SPDX-License-Identifier: MIT
"""TokenizingAdapter: texts and conversations to token ids, and ids to text, without HTTP (steps 2 and 3 of a request).

A conversation is prepared exactly as a chat request with the same fields, so both have the same number of tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.openai.engine import EngineLike
from candle_vllm.openai.errors import InvalidBodyError
from candle_vllm.openai.json_body import decode_json, parse_body
from candle_vllm.openai.preparation import PreparedChat, TaskPreparation
from candle_vllm.openai.protocol import tokenizing
from candle_vllm.openai.protocol.chat import ChatCompletionRequest
from candle_vllm.openai.requests import parse_chat_request, read_chat
from candle_vllm.openai.serving import ServedNames, WorkerThreads
from candle_vllm.openai.task import Task


def parse_tokenize_request(body: bytes | Mapping[str, Any]) -> tokenizing.TokenizeRequest:
    """Parse and validate a tokenize request from a body or an object; raises `RequestError`."""
    value = decode_json(body) if isinstance(body, bytes) else body
    if not isinstance(value, Mapping):
        raise InvalidBodyError("The body must be one JSON object.")
    if value.get("messages") is None:
        is_llama_server_form = "content" in value and "prompt" not in value
        kind = tokenizing.TokenizeContentRequest if is_llama_server_form else tokenizing.TokenizeTextRequest
        return parse_body(kind, value)
    request = parse_body(tokenizing.TokenizeChatRequest, value)
    parse_chat_request(request.chat_fields())  # checks the rules between fields
    return request


def parse_detokenize_request(body: bytes | Mapping[str, Any]) -> tokenizing.DetokenizeRequest:
    """Parse and validate a detokenize request from a body or an object; raises `RequestError`."""
    return parse_body(tokenizing.DetokenizeRequest, body)


class TokenizingAdapter:
    """Answers tokenize and detokenize requests with the tokenizer of one engine.

    Every method raises `RequestError` for an invalid request.

    Args:
        engine: provides the tokenizer.
        preparation: prepares conversations.
        names: names of the served model.
        work: threads for long texts.
    """

    def __init__(
        self, engine: EngineLike, preparation: TaskPreparation, names: ServedNames, work: WorkerThreads
    ) -> None:
        self._engine = engine
        self._preparation = preparation
        self._names = names
        self._work = work

    async def tokenize(self, request: tokenizing.TokenizeRequest) -> tokenizing.Tokenized | tokenizing.TokenizedContent:
        """Return the tokens of a text or of a conversation, which may be longer than the model's context."""
        self._names.served(request.model)
        if isinstance(request, tokenizing.TokenizeContentRequest):
            return await self._work.prepare(self._content, request)
        if isinstance(request, tokenizing.TokenizeTextRequest):
            ids = await self._work.prepare(self._text, request)
        else:
            task, prepared = await self._work.prepare(self._chat, request)
            if prepared.unseen is not None:
                prepared = await self._preparation.see(task, prepared, prepared.unseen, self._work, bounded=False)
            ids = prepared.prompt
        return await self._work.prepare(self._tokenized, request, ids)

    async def detokenize(self, request: tokenizing.DetokenizeRequest) -> tokenizing.Detokenized:
        """Return the text of tokens."""
        self._names.served(request.model)
        return await self._work.prepare(self._detokenized, request.tokens)

    def _chat(self, request: tokenizing.TokenizeChatRequest) -> tuple[Task, PreparedChat]:
        task = read_chat(ChatCompletionRequest.model_validate(request.chat_fields()))
        return task, self._preparation.chat(task)

    def _text(self, request: tokenizing.TokenizeTextRequest) -> list[int]:
        return self._engine.tokenize(request.prompt, add_special_tokens=request.add_special_tokens is not False)

    def _content(self, request: tokenizing.TokenizeContentRequest) -> tokenizing.TokenizedContent:
        ids = self._engine.tokenize(request.content, add_special_tokens=bool(request.add_special))
        if not request.with_pieces:
            return tokenizing.TokenizedContent(tokens=tuple(ids))
        pairs = zip(ids, self._engine.token_bytes(ids), strict=True)
        return tokenizing.TokenizedContent(tokens=tuple(tokenizing.TokenPiece.of(*pair) for pair in pairs))

    def _tokenized(
        self, request: tokenizing.TokenizeTextRequest | tokenizing.TokenizeChatRequest, ids: Sequence[int]
    ) -> tokenizing.Tokenized:
        return tokenizing.Tokenized(
            count=len(ids),
            max_model_len=self._engine.model_info.max_model_len,
            tokens=tuple(ids),
            token_strs=tuple(self._engine.token_names(ids)) if request.return_token_strs else None,
        )

    def _detokenized(self, ids: Sequence[int]) -> tokenizing.Detokenized:
        vocabulary = self._engine.model_info.vocab_size
        for place, token in enumerate(ids):
            if token >= vocabulary:
                raise InvalidParameterError(
                    f"tokens.{place}: {token} is out of vocabulary: the model's ids are 0 to {vocabulary - 1}",
                    f"tokens.{place}",
                )
        text = self._engine.detokenize(ids, skip_special_tokens=False)
        return tokenizing.Detokenized(prompt=text, content=text)
