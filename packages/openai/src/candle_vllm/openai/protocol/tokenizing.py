# SPDX-License-Identifier: MIT
"""Wire types of `/tokenize` and `/detokenize`, in the forms of vLLM and of llama.cpp's server."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Self

import msgspec
from pydantic import Field

from candle_vllm.openai.protocol.fields import MAX_TOOLS, ModelName, Refusal, TokenId, WireModel
from candle_vllm.openai.protocol.messages import Messages
from candle_vllm.openai.protocol.templating import TemplateFields
from candle_vllm.openai.protocol.tools import AnyTool

MAX_DETOKENIZED = 1 << 19  # token ids of one request

_PREPARED = Refusal("images are preprocessed as the model's files define", ({},))


class TokenizeTextRequest(WireModel):
    """A text to tokenize.

    Attributes:
        add_special_tokens: whether to add the special tokens that the model expects around a text; null means yes.
        return_token_strs: whether to return each token's entry in the vocabulary.
    """

    refused_fields: ClassVar[Mapping[str, Refusal]] = {
        "mm_processor_kwargs": _PREPARED,
        "messages": Refusal("a request has a prompt or messages"),
    }

    model: ModelName | None = None
    prompt: str
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class TokenizeChatRequest(TemplateFields):
    """A conversation to tokenize, rendered as for a chat request with the same fields.

    Attributes:
        add_special_tokens: whether to add special tokens to the rendered text; null means no: templates write them.
        return_token_strs: whether to return each token's entry in the vocabulary.
    """

    refused_fields: ClassVar[Mapping[str, Refusal]] = {
        "mm_processor_kwargs": _PREPARED,
        "media_io_kwargs": _PREPARED,
        "prompt": Refusal("a request has a prompt or messages"),
    }

    model: ModelName | None = None
    messages: Messages
    tools: Annotated[list[AnyTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None

    def chat_fields(self) -> dict[str, Any]:
        """Return the validated fields that this request has in common with a chat request."""
        return {name: getattr(self, name) for name in type(self).model_fields if name != "return_token_strs"}


class TokenizeContentRequest(WireModel):
    """A text to tokenize, in llama.cpp's form.

    Attributes:
        add_special: whether to add the special tokens that the model expects around a text; null means no.
        with_pieces: whether to return the text of each token.
    """

    refused_fields: ClassVar[Mapping[str, Refusal]] = {
        "parse_special": Refusal("names of special tokens are always read as these tokens", (True,)),
    }

    model: ModelName | None = None
    content: str
    add_special: bool | None = None
    with_pieces: bool | None = None


TokenizeRequest = TokenizeTextRequest | TokenizeChatRequest | TokenizeContentRequest


class DetokenizeRequest(WireModel):
    """Token ids to convert to text."""

    model: ModelName | None = None
    tokens: Annotated[list[TokenId], Field(max_length=MAX_DETOKENIZED, fail_fast=True)]


class Tokenized(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of a text.

    Attributes:
        count: number of tokens.
        max_model_len: maximum number of tokens of prompt and output together.
        tokens: token ids.
        token_strs: each token's entry in the vocabulary ("Ġthe"), if requested.
    """

    count: int
    max_model_len: int
    tokens: tuple[int, ...]
    token_strs: tuple[str, ...] | None = None


class TokenPiece(msgspec.Struct, frozen=True, kw_only=True):
    """Id and text of a token; or its bytes, if they are not whole characters."""

    id: int
    piece: str | tuple[int, ...]

    @classmethod
    def of(cls, token_id: int, data: bytes) -> Self:
        """Convert the bytes of a token."""
        try:
            return cls(id=token_id, piece=data.decode())
        except UnicodeDecodeError:
            return cls(id=token_id, piece=tuple(data))


class TokenizedContent(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of a text, in llama.cpp's form."""

    tokens: tuple[int | TokenPiece, ...]


class RenderedPrompt(msgspec.Struct, frozen=True, kw_only=True):
    """Conversation rendered by the template, as llama.cpp's `/apply-template` returns it."""

    prompt: str


class Detokenized(msgspec.Struct, frozen=True, kw_only=True):
    """Text of token ids, including the names of special tokens; `content` is llama.cpp's name of the field."""

    prompt: str
    content: str
