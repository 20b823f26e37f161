# SPDX-License-Identifier: MIT
"""A budget of thoughts: every spelling of it, what becomes of it for the engine, and what is refused."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from candle_vllm.core.errors import RequestError
from candle_vllm.core.sampling.thoughts import ThoughtBudget
from candle_vllm.core.testing import ScriptedEngine
from candle_vllm.openai import OpenAIAdapter
from candle_vllm.openai.anthropic import MessagesAdapter

THINK = ("<think>", "</think>")
ASK: list[Any] = [{"role": "user", "content": "Why?"}]


def engine(**options: Any) -> ScriptedEngine:
    return ScriptedEngine("Yes.", special_tokens=(*THINK, "<tool_call>", "</tool_call>"), **options)


def asked(body: dict[str, Any], made: ScriptedEngine | None = None, **options: Any) -> ThoughtBudget | None:
    """What the engine is told of thoughts."""
    made = made or engine()
    adapter = OpenAIAdapter(made, **{"reasoning_parser": "qwen3", "tool_parser": "hermes", **options})
    asyncio.run(adapter.chat({"messages": ASK, **body}))
    return made.requests[-1].params.thoughts


@pytest.mark.parametrize(
    "body",
    [
        {"thinking_token_budget": 7},
        {"reasoning_budget": 7},
        {"reasoning_budget_tokens": 7},
        {"thinking_budget_tokens": 7, "thinking_token_budget": 7},
        {"thinking": {"type": "enabled", "budget_tokens": 7}},
    ],
)
def test_every_spelling_is_the_same_budget(body: dict[str, Any]) -> None:
    budget = asked(body)
    assert budget is not None
    assert (budget.tokens, budget.marks["<think>"], budget.opened) == (7, "</think>", None)


def test_no_budget_is_none() -> None:
    assert asked({}) is None
    assert asked({"thinking_token_budget": -1}) is None
    assert asked({"thinking": {"type": "adaptive"}}) is None


def test_nothing_to_think_turns_the_template_s_switch_off() -> None:
    made = engine()
    budget = asked({"reasoning_budget": 0}, made)
    assert budget is not None
    assert budget.tokens == 0
    assert made.template_calls[-1].options["enable_thinking"] is False
    asked({"reasoning_budget": 0, "enable_thinking": True}, made)
    assert made.template_calls[-1].options["enable_thinking"] is True


def test_what_is_said_before_the_answer() -> None:
    budget = asked({"thinking_token_budget": 5})
    assert budget is not None
    assert budget.message == ""
    budget = asked({"thinking_token_budget": 5}, engine(architecture="qwen3"))
    assert budget is not None
    assert budget.message.startswith("\n\nConsidering the limited time by the user")
    budget = asked({"thinking_token_budget": 5, "reasoning_budget_message": "Enough."}, engine(architecture="qwen3"))
    assert budget is not None
    assert budget.message == "Enough."


def test_the_server_s_budget_counts_where_a_request_has_none() -> None:
    options = {"reasoning_budget": 9, "reasoning_budget_message": "Stop."}
    budget = asked({}, **options)
    assert budget is not None
    assert (budget.tokens, budget.message) == (9, "Stop.")
    budget = asked({"thinking_token_budget": 3}, **options)
    assert budget is not None
    assert (budget.tokens, budget.message) == (3, "Stop.")
    assert asked({"thinking_token_budget": -1}, **options) is None
    assert asked({}, reasoning_parser="none", **options) is None


def test_a_call_ends_thoughts_where_the_format_says_so() -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    budget = asked({"thinking_token_budget": 5, "tools": [tool]})
    assert budget is not None
    assert budget.ends == ("\n<tool_call>",)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"thinking_token_budget": -2}, "thinking_token_budget"),
        ({"reasoning_budget": "4"}, "reasoning_budget"),
        ({"thinking_token_budget": 3, "reasoning_budget": 4}, "reasoning_budget"),
        ({"thinking": {"type": "disabled", "budget_tokens": 4}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "enabled", "budget": 4}}, "thinking.budget"),
        ({"thinking": {"type": "on"}}, "thinking.type"),
        ({"reasoning_budget_message": "x" * 5000}, "reasoning_budget_message"),
        ({"reasoning_budget_message": "Enough."}, "reasoning_budget_message"),
    ],
)
def test_wrong_budgets_are_refused_by_name(body: dict[str, Any], field: str) -> None:
    with pytest.raises(RequestError) as caught:
        asked(body)
    assert caught.value.param == field


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"thinking_token_budget": 5}, "thinking_token_budget"),
        ({"reasoning_budget": 5}, "reasoning_budget"),
        ({"thinking": {"type": "enabled", "budget_tokens": 7}}, "thinking.budget_tokens"),
    ],
)
def test_a_budget_without_marks_is_refused(body: dict[str, Any], field: str) -> None:
    with pytest.raises(RequestError, match=f"{field}: it is not supported.*--reasoning-parser") as caught:
        asked(body, reasoning_parser="none")
    assert caught.value.param == field


def test_anthropic_s_budget_limits_thoughts_and_is_no_error_without_them() -> None:
    body = {
        "model": "scripted",
        "max_tokens": 2000,
        "messages": ASK,
        "thinking": {"type": "enabled", "budget_tokens": 1024},
    }
    for parser, tokens in (("qwen3", 1024), ("none", None)):
        made = engine()
        adapter = MessagesAdapter(OpenAIAdapter(made, reasoning_parser=parser))
        asyncio.run(adapter.create(body))
        budget = made.requests[-1].params.thoughts
        assert (None if budget is None else budget.tokens) == tokens
