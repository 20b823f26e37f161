# SPDX-License-Identifier: MIT
"""Wire types of `/tokenize` and `/detokenize`, as vLLM and as llama.cpp's server have them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import msgspec
from pydantic import Field

from candle_vllm.openai.protocol.fields import MAX_TOOLS, ModelName, Refusal, TokenId, WireModel
from candle_vllm.openai.protocol.messages import Messages
from candle_vllm.openai.protocol.templating import TemplateFields
from candle_vllm.openai.protocol.tools import AnyTool

MAX_DETOKENIZED = 1 << 19  # token ids of one request

_PREPARED = Refusal("images are read as they are, and prepared as the model's files say", ({},))


class TokenizeTextRequest(WireModel):
    """A text to cut into tokens.

    Attributes:
        add_special_tokens: with the tokens that the model wants around every text; None adds them.
        return_token_strs: each token's text as well.
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
    """A conversation to cut into tokens, as a chat request with the same fields would be.

    Attributes:
        add_special_tokens: around what the template writes; None does not, because templates write them themselves.
        return_token_strs: each token's text as well.
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
        """The fields that a chat request has too, checked already each for itself."""
        return {name: getattr(self, name) for name in type(self).model_fields if name != "return_token_strs"}


class TokenizeContentRequest(WireModel):
    """A text to cut into tokens, in llama.cpp's words.

    Attributes:
        add_special: with the tokens that the model wants around every text.
        with_pieces: each token's text as well.
    """

    refused_fields: ClassVar[Mapping[str, Refusal]] = {
        "parse_special": Refusal("the name of a special token is that token wherever it stands", (True,)),
    }

    model: ModelName | None = None
    content: str
    add_special: bool = False
    with_pieces: bool = False


TokenizeRequest = TokenizeTextRequest | TokenizeChatRequest | TokenizeContentRequest


class DetokenizeRequest(WireModel):
    """Token ids whose text is wanted."""

    model: ModelName | None = None
    tokens: Annotated[list[TokenId], Field(max_length=MAX_DETOKENIZED, fail_fast=True)]


class Tokenized(msgspec.Struct, frozen=True, kw_only=True):
    """The tokens of a text.

    Attributes:
        count: how many they are.
        max_model_len: most tokens of prompt and output together.
        tokens: their ids.
        token_strs: their texts, where asked for; U+FFFD where a token's bytes are no complete character.
    """

    count: int
    max_model_len: int
    tokens: tuple[int, ...]
    token_strs: tuple[str, ...] | None = None


class TokenPiece(msgspec.Struct, frozen=True, kw_only=True):
    """A token's id and its text, with U+FFFD for bytes that are no complete character."""

    id: int
    piece: str


class TokenizedContent(msgspec.Struct, frozen=True, kw_only=True):
    """The tokens of a text, in llama.cpp's words."""

    tokens: tuple[int | TokenPiece, ...]


class RenderedPrompt(msgspec.Struct, frozen=True, kw_only=True):
    """The text that a template makes of a conversation, as llama.cpp's `/apply-template` gives it."""

    prompt: str


class Detokenized(msgspec.Struct, frozen=True, kw_only=True):
    """The text of token ids, with the names of special tokens in it; `content` is llama.cpp's name for it."""

    prompt: str
    content: str
