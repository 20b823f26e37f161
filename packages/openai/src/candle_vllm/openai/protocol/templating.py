# SPDX-License-Identifier: MIT
"""Fields by which messages are rendered to a prompt, and the limit on reasoning (step 3 of a request's life)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from candle_vllm.core.sampling.thoughts import MAX_MESSAGE
from candle_vllm.core.setting_kinds import MAX_TEMPLATE
from candle_vllm.openai.protocol.fields import MAX_DOCUMENTS, MAX_TEMPLATE_KWARGS, WireModel, bounded, invalid
from candle_vllm.openai.task import ThinkingLimit

# Names that the renderer itself sets for a template, so `chat_template_kwargs` must not set them.
_TEMPLATE_ARGUMENTS = frozenset({
    "self", "messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template",
    "tokenize", "template", "conversation",
})  # fmt: skip


Budget = Annotated[int, bounded("thinking_token_budget")]
# Names of the budget: vLLM's first, then llama.cpp's.
_BUDGETS = ("thinking_token_budget", "reasoning_budget", "reasoning_budget_tokens", "thinking_budget_tokens")
_SWITCHES = ("thinking", "enable_thinking")  # names of the thinking switch in templates
_THINKING = (*_SWITCHES, "reasoning_effort", "reasoning_budget_message", *_BUDGETS)


class ThinkingSwitch(WireModel):
    """The thinking switch and the token budget in Anthropic's form."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int, bounded("thinking_token_budget", ge=0)] | None = None

    @model_validator(mode="after")
    def _budget_of_its_kind(self) -> Self:
        if self.budget_tokens is not None and self.type != "enabled":
            raise invalid("budget_tokens", "belongs to the type 'enabled'")
        return self


# Tags in angle brackets are omitted from the paths in error messages.
Thinking = Annotated[
    Annotated[bool, Tag("<switch>")] | Annotated[ThinkingSwitch, Tag("<object>")],
    Discriminator(lambda value: "<object>" if isinstance(value, (dict, ThinkingSwitch)) else "<switch>"),
]


class TemplateFields(WireModel):
    """How messages are rendered to a prompt, and the limit on reasoning. None means absent.

    Attributes:
        chat_template: a template that replaces the model's template, if the operator allows it.
        thinking: template variable with two names, `thinking` and `enable_thinking`; or an object that also has a
            budget.
        thinking_token_budget: maximum number of reasoning tokens; -1 means no limit. The next three fields are aliases.
        reasoning_budget_message: text that is inserted when the budget ends the reasoning.
    """

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    documents: Annotated[list[dict[str, Any]], Field(max_length=MAX_DOCUMENTS, fail_fast=True)] | None = None
    chat_template: Annotated[str, Field(min_length=1, max_length=MAX_TEMPLATE)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    thinking: Thinking | None = None
    enable_thinking: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    thinking_token_budget: Budget | None = None
    reasoning_budget: Budget | None = None
    reasoning_budget_tokens: Budget | None = None
    thinking_budget_tokens: Budget | None = None
    reasoning_budget_message: Annotated[str, Field(max_length=MAX_MESSAGE)] | None = None

    @field_validator("chat_template_kwargs")
    @classmethod
    def _template_names(cls, kwargs: dict[str, Any] | None) -> dict[str, Any] | None:
        check_variables(kwargs or {})
        return kwargs

    def template_kwargs(self) -> dict[str, Any]:
        """Return the variables of the template: `chat_template_kwargs`, and the fields that are variables too.

        Templates use two names for the thinking switch, so both are set. Effort "none" and a budget of 0 also turn it
        off, for templates that only have the switch; other efforts turn it on unless it is set. Contradictions raise an
        error.
        """
        kwargs = dict(self.chat_template_kwargs or {})
        if not self.sets_thinking:
            return kwargs
        for field in _SWITCHES:
            switch = getattr(self, field)
            if isinstance(switch, ThinkingSwitch):
                switch = {"enabled": True, "disabled": False}.get(switch.type)
            for name in _SWITCHES if switch is not None else ():
                _agree(kwargs, field, name, switch)
        limit = self.thinking_limit()
        if limit is not None:
            close_thoughts(kwargs, limit.tokens)
        set_effort(kwargs, self.reasoning_effort, "reasoning_effort")
        return kwargs

    @property
    def sets_thinking(self) -> bool:
        """Whether the request has a field about reasoning."""
        return any(getattr(self, name) is not None for name in _THINKING)

    @property
    def budget_field(self) -> str:
        """Path of the field that sets the budget."""
        return next((name for name in _BUDGETS if getattr(self, name) is not None), "thinking.budget_tokens")

    def thinking_limit(self) -> ThinkingLimit | None:
        """Return the limit on reasoning; raises if budgets contradict each other, or a message has no budget."""
        given = {name: value for name in _BUDGETS if (value := getattr(self, name)) is not None}
        if isinstance(self.thinking, ThinkingSwitch) and self.thinking.budget_tokens is not None:
            given["thinking.budget_tokens"] = self.thinking.budget_tokens
        if not given:
            if self.reasoning_budget_message is not None:
                raise invalid("reasoning_budget_message", "needs thinking_token_budget")
            return None
        (first, tokens), *others = given.items()
        for name, other in others:
            if other != tokens:
                raise invalid(name, f"contradicts {first}; give one of them")
        return ThinkingLimit(tokens, self.reasoning_budget_message)


def check_variables(kwargs: Mapping[str, Any]) -> None:
    """Raise an error for names that cannot be template variables, or for too many; paths are relative to `kwargs`."""
    if len(kwargs) > MAX_TEMPLATE_KWARGS:
        raise invalid("", f"must have at most {MAX_TEMPLATE_KWARGS} entries, not {len(kwargs)}")
    for name in kwargs:
        if not name.isidentifier() or len(name) > 64:
            raise invalid("", f"names template variables; {name!r:.70} cannot be one")
        if name in _TEMPLATE_ARGUMENTS:
            raise invalid(name, "cannot be set here; the server sets it for every prompt")


def set_effort(kwargs: dict[str, Any], effort: str | None, field: str) -> None:
    """Set the reasoning effort of `field`, and the thinking switch by it; raises if a variable contradicts them."""
    if effort is not None:
        _agree(kwargs, field, "reasoning_effort", effort)
    for name in _SWITCHES if effort is not None else ():
        if effort == "none":
            _agree(kwargs, field, name, False)
        else:
            kwargs.setdefault(name, True)


def close_thoughts(kwargs: dict[str, Any], budget: int) -> None:
    """Turn the template's thinking switch off if the budget is 0 and the switch is not set."""
    for name in _SWITCHES if budget == 0 else ():
        kwargs.setdefault(name, False)


def _agree(kwargs: dict[str, Any], field: str, name: str, value: Any) -> None:
    if kwargs.setdefault(name, value) != value:
        raise invalid(field, f"contradicts another setting of the template variable {name!r}")
