# SPDX-License-Identifier: MIT
"""Wire types of the messages in Anthropic's requests, and the rules between them (step 2 of a request's life)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import Tag, model_validator

from candle_vllm.openai.anthropic import blocks
from candle_vllm.openai.protocol.fields import WireModel, invalid
from candle_vllm.openai.protocol.messages import all_answered, by_role

_UNANSWERED = "tool_use blocks without a tool_result"


class UserMessage(WireModel):
    """Content from the user, and results of tools."""

    role: Literal["user"]
    content: blocks.UserContent


class AssistantMessage(WireModel):
    """An earlier answer, which may be empty; the last message of a request may be the beginning of the next answer."""

    role: Literal["assistant"]
    content: blocks.AssistantContent


class _TurnConfig(WireModel):
    """Settings that apply from this message on; the effort has no effect, as in `output_config`."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None


class SystemMessage(WireModel):
    """Instructions in the middle of a conversation.

    `clear_at: "next_user_message"` means that they apply until a user message follows.
    """

    role: Literal["system"]
    content: blocks.SystemContent | None = None
    clear_at: Literal["next_user_message", "never"] | None = None
    output_config: _TurnConfig | None = None

    @model_validator(mode="after")
    def _says_something(self) -> SystemMessage:
        if self.content is None and self.output_config is None:
            raise invalid("content", "is required")
        return self


Message = Annotated[
    Annotated[UserMessage, Tag("<user>")]
    | Annotated[AssistantMessage, Tag("<assistant>")]
    | Annotated[SystemMessage, Tag("<system>")],
    by_role("user", "assistant", "system"),
]


def check_history(messages: Sequence[Message]) -> None:
    """Check that each call has exactly one result in the turn after it, and that results precede text.

    Consecutive messages of one role are one turn, and system messages do not end a turn. Ids may be repeated in later
    turns. Raises an error that pydantic reports.
    """
    pending: dict[str, None] = {}
    answered_in: int | None = None  # the first user message after the calls
    for index, message in enumerate(messages):
        if isinstance(message, AssistantMessage):
            if answered_in is not None:
                all_answered(pending, f"messages.{answered_in}.content", _UNANSWERED)
            answered_in = None
            for place, block in _blocks(message, blocks.ToolUseBlock):
                if block.id in pending:
                    raise invalid(
                        f"messages.{index}.content.{place}.id", f"{block.id!r:.80} is already the id of another call"
                    )
                pending[block.id] = None
        elif isinstance(message, UserMessage):
            answered_in = index if answered_in is None else answered_in
            for number, (place, block) in enumerate(_blocks(message, blocks.ToolResultBlock)):
                here = f"messages.{index}.content.{place}"
                if number != place:
                    raise invalid(f"{here}.type", "tool_result must come before the text of its message")
                if block.tool_use_id not in pending:
                    said = f"{block.tool_use_id!r:.80} does not match a tool_use of the previous turn"
                    raise invalid(f"{here}.tool_use_id", said)
                del pending[block.tool_use_id]
    last = len(messages) - 1 if answered_in is None else answered_in
    all_answered(pending, f"messages.{last}.content", _UNANSWERED)


def _blocks(message: UserMessage | AssistantMessage, kind: type[Any]) -> Iterator[tuple[int, Any]]:
    if not isinstance(message.content, str):
        yield from ((place, block) for place, block in enumerate(message.content) if isinstance(block, kind))
