# SPDX-License-Identifier: MIT
"""How a model was trained to chat, as its files say it; what reads its answers is chosen by this."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from candle_vllm.core.text.tokenizer import ChatTemplateSource, Tokenizer


class ChatConventions(msgspec.Struct, frozen=True, kw_only=True):
    """Texts and tokens that structure a conversation.

    Attributes:
        chat_template: the template in use, several by name, or None.
        special_tokens: name -> id of the tokens that structure a text and are no part of it.
        mark_ids: name -> id of the tokens that a model writes as marks, though they are text.
        token_names: texts of `bos_token`, `eos_token` and so on, for templates.
        response_template: what the tokenizer's configuration says about the form of an answer (transformers 5.13).
    """

    chat_template: ChatTemplateSource | None = None
    special_tokens: Mapping[str, int] = {}
    mark_ids: Mapping[str, int] = {}
    token_names: Mapping[str, str] = {}
    response_template: Mapping[str, Any] | None = None


def chat_conventions(tokenizer: Tokenizer, chat_template: ChatTemplateSource | None) -> ChatConventions:
    """The conventions of a tokenizer, with the template that is used in place of its own."""
    return ChatConventions(
        chat_template=chat_template,
        special_tokens=tokenizer.special_token_ids,
        mark_ids=tokenizer.mark_ids,
        token_names=tokenizer.special_tokens,
        response_template=tokenizer.response_template,
    )
