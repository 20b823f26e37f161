# SPDX-License-Identifier: MIT
"""TokenizingAdapter: texts and conversations to token ids, and ids to text, without HTTP (steps 2 and 3 of a request).

A conversation is prepared exactly as a chat request with the same fields, so both have the same number of tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
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


def parse_tokenize_request(body: bytes | Mapping[str, Any] | tokenizing.TokenizeRequest) -> tokenizing.TokenizeRequest:
    """Parse and validate a request from a body or an object, unless it is one already; raises `RequestError`."""
    if isinstance(body, tokenizing.TokenizeRequest):
        return body
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


parse_detokenize_request = partial(parse_body, tokenizing.DetokenizeRequest)
"""Arguments and errors are as for `parse_tokenize_request`."""


@dataclass(eq=False, repr=False)
class TokenizingAdapter:
    """Answers tokenize and detokenize requests with the tokenizer of one engine.

    Every method raises `RequestError` for an invalid request.
    """

    engine: EngineLike
    preparation: TaskPreparation
    names: ServedNames
    work: WorkerThreads

    async def tokenize(self, request: tokenizing.TokenizeRequest) -> tokenizing.Tokenized | tokenizing.TokenizedContent:
        """Return the tokens of a text or of a conversation, which may be longer than the model's context."""
        self.names.served(request.model)
        if isinstance(request, tokenizing.TokenizeContentRequest):
            return await self.work.prepare(self._content, request)
        if isinstance(request, tokenizing.TokenizeTextRequest):
            special = request.add_special_tokens is not False
            ids = await self.work.prepare(partial(self.engine.tokenize, add_special_tokens=special), request.prompt)
        else:
            task, prepared = await self.work.prepare(self._chat, request)
            if prepared.unseen is not None:
                prepared = await self.preparation.see(task, prepared, prepared.unseen, self.work, bounded=False)
            ids = prepared.prompt
        return await self.work.prepare(self._tokenized, request, ids)

    async def detokenize(self, request: tokenizing.DetokenizeRequest) -> tokenizing.Detokenized:
        """Return the text of tokens."""
        self.names.served(request.model)
        return await self.work.prepare(self._detokenized, request.tokens)

    def _chat(self, request: tokenizing.TokenizeChatRequest) -> tuple[Task, PreparedChat]:
        task = read_chat(ChatCompletionRequest.model_validate(request.chat_fields()))
        return task, self.preparation.chat(task)

    def _content(self, request: tokenizing.TokenizeContentRequest) -> tokenizing.TokenizedContent:
        ids = self.engine.tokenize(request.content, add_special_tokens=bool(request.add_special))
        if not request.with_pieces:
            return tokenizing.TokenizedContent(tokens=tuple(ids))
        pairs = zip(ids, self.engine.token_bytes(ids), strict=True)
        return tokenizing.TokenizedContent(tokens=tuple(tokenizing.TokenPiece.of(*pair) for pair in pairs))

    def _tokenized(
        self, request: tokenizing.TokenizeTextRequest | tokenizing.TokenizeChatRequest, ids: Sequence[int]
    ) -> tokenizing.Tokenized:
        return tokenizing.Tokenized(
            count=len(ids),
            max_model_len=self.engine.model_info.max_model_len,
            tokens=tuple(ids),
            token_strs=tuple(self.engine.token_names(ids)) if request.return_token_strs else None,
        )

    def _detokenized(self, ids: Sequence[int]) -> tokenizing.Detokenized:
        vocabulary = self.engine.model_info.vocab_size
        for place, token in enumerate(ids):
            if token >= vocabulary:
                raise InvalidParameterError(
                    f"tokens.{place}: {token} is out of vocabulary: the model's ids are 0 to {vocabulary - 1}",
                    f"tokens.{place}",
                )
        text = self.engine.detokenize(ids, skip_special_tokens=False)
        return tokenizing.Detokenized(prompt=text, content=text)
