# SPDX-License-Identifier: MIT
"""Chat conventions of a model, from its files; they determine which parser reads its answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from candle_vllm.core.text.tokenizer import ChatTemplateSource, Tokenizer


class ChatConventions(msgspec.Struct, frozen=True, kw_only=True):
    """Template and tokens that structure a conversation.

    Attributes:
        chat_template: the template in use, a dict of templates by name, or None.
        special_tokens: ids by name of the tokens that structure a text and are not part of it.
        mark_ids: ids by name of the tokens in brackets, such as `<tool_call>`, that are part of the text.
        token_names: texts of `bos_token`, `eos_token` and so on, for templates.
        response_template: key of tokenizer_config.json (transformers 5.13): how the model formats an answer; or None.
    """

    chat_template: ChatTemplateSource | None = None
    special_tokens: Mapping[str, int] = {}
    mark_ids: Mapping[str, int] = {}
    token_names: Mapping[str, str] = {}
    response_template: Mapping[str, Any] | None = None


def chat_conventions(tokenizer: Tokenizer, chat_template: ChatTemplateSource | None) -> ChatConventions:
    """Return a tokenizer's conventions, with `chat_template` in place of the tokenizer's own template."""
    return ChatConventions(
        chat_template=chat_template,
        special_tokens=tokenizer.special_token_ids,
        mark_ids=tokenizer.mark_ids,
        token_names=tokenizer.special_tokens,
        response_template=tokenizer.response_template,
    )
