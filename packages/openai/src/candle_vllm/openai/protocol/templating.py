"""The fields of a chat request that its template sees (step 3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from candle_vllm.core.text.chat_template import MAX_TEMPLATE
from candle_vllm.openai.protocol.fields import MAX_DOCUMENTS, MAX_TEMPLATE_KWARGS, WireModel, invalid

# Arguments of the template call, which `chat_template_kwargs` must not shadow.
_TEMPLATE_ARGUMENTS = frozenset({
    "self", "messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template",
    "tokenize", "template", "conversation",
})  # fmt: skip


class TemplateFields(WireModel):
    """How the messages become one text. None always means absent.

    Attributes:
        chat_template: a template instead of the model's own; whether that is allowed is up to the adapter.
        thinking: a template variable under two names, `thinking` and `enable_thinking`.
    """

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    documents: Annotated[list[dict[str, Any]], Field(max_length=MAX_DOCUMENTS, fail_fast=True)] | None = None
    chat_template: Annotated[str, Field(min_length=1, max_length=MAX_TEMPLATE)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    thinking: bool | None = None
    enable_thinking: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None

    @field_validator("chat_template_kwargs")
    @classmethod
    def _template_names(cls, kwargs: dict[str, Any] | None) -> dict[str, Any] | None:
        check_variables(kwargs or {})
        return kwargs

    def template_kwargs(self) -> dict[str, Any]:
        """The template's variables: `chat_template_kwargs` and the fields that are variables too.

        Templates know the thinking switch under two names, so both are set; effort "none" turns it off as well,
        for templates that know the switch only. Raises where two of these contradict each other.
        """
        kwargs = dict(self.chat_template_kwargs or {})
        for field in ("thinking", "enable_thinking"):
            switch = getattr(self, field)
            if switch is not None:
                _agree(kwargs, field, "thinking", switch)
                _agree(kwargs, field, "enable_thinking", switch)
        set_effort(kwargs, self.reasoning_effort, "reasoning_effort")
        return kwargs


def check_variables(kwargs: Mapping[str, Any]) -> None:
    """Refuses what cannot be variables of a template; the paths begin below them."""
    if len(kwargs) > MAX_TEMPLATE_KWARGS:
        raise invalid("", f"must have at most {MAX_TEMPLATE_KWARGS} entries, not {len(kwargs)}")
    for name in kwargs:
        if not name.isidentifier() or len(name) > 64:
            raise invalid("", f"names template variables; {name!r:.70} cannot be one")
        if name in _TEMPLATE_ARGUMENTS:
            raise invalid(name, "cannot be set here; it is a part of every call of the template")


def set_effort(kwargs: dict[str, Any], effort: str | None, field: str) -> None:
    """Adds how much the model is to think, which `field` asks for; raises where another variable contradicts it."""
    if effort is not None:
        _agree(kwargs, field, "reasoning_effort", effort)
    if effort == "none":
        _agree(kwargs, field, "thinking", False)
        _agree(kwargs, field, "enable_thinking", False)


def _agree(kwargs: dict[str, Any], field: str, name: str, value: Any) -> None:
    if kwargs.setdefault(name, value) != value:
        raise invalid(field, f"contradicts another setting of the template variable {name!r}")
