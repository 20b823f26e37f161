"""Names of Anthropic's that have no effect here, and those that are refused (step 2)."""

from __future__ import annotations

from collections.abc import Mapping

from candle_vllm.openai.protocol.fields import Refusal

# Accepted, checked, and without effect.
ADVISORY_MESSAGES_FIELDS: Mapping[str, str] = {
    "metadata": "names the caller's user; the server keeps no per-user state",
    "service_tier": "chooses a price; there is one tier",
    "speed": "chooses a price; there is one speed",
    "cache_control": "sets cache breakpoints; every full block of every prompt is cached",
    "context_management": "has old parts taken out of the prompt; the model sees what is sent",
    "diagnostics": "asks why a cache was missed; usage says how much was found",
    "inference_geo": "chooses a place; there is one",
    "user_profile_id": "names the caller's user; the server keeps no per-user state",
    "workspace_id": "names the caller's workspace; the server has none",
}

_NO_SERVER_TOOLS = "the server runs no tools; the client does"
_NO_STATE = "the server keeps no conversations"
_HOSTED = "it belongs to Anthropic's own service"

REFUSED_PROMPT_FIELDS: Mapping[str, Refusal] = {
    "mcp_servers": Refusal(_NO_SERVER_TOOLS, ([],)),
    "compaction": Refusal("prompts are never cut"),
    "billing_policy": Refusal(_HOSTED),
    "output_format": Refusal("use output_config with format"),
    "response_format": Refusal("it is OpenAI's; use output_config with format"),
    "functions": Refusal("it is OpenAI's; use tools", ([],)),
    "prompt": Refusal("it belongs to an older API; use messages"),
    "max_completion_tokens": Refusal("it is OpenAI's; use max_tokens"),
    "max_tokens_to_sample": Refusal("it belongs to an older API; use max_tokens"),
    "stop": Refusal("it is OpenAI's; use stop_sequences"),
    "n": Refusal("there is one answer", (1,)),
    "parallel_tool_calls": Refusal("it is OpenAI's; use disable_parallel_tool_use in tool_choice"),
    "reasoning_effort": Refusal("it is OpenAI's; use thinking"),
}

REFUSED_MESSAGES_FIELDS: Mapping[str, Refusal] = {
    **REFUSED_PROMPT_FIELDS,
    "container": Refusal("the server has no containers"),
    "thread": Refusal(_NO_STATE),
    "fallbacks": Refusal("one model is served", ([],)),
    "fallback_credit_token": Refusal(_HOSTED),
}

_NOT_GENERATED = Refusal("counting generates nothing")
REFUSED_COUNT_FIELDS: Mapping[str, Refusal] = {
    **REFUSED_PROMPT_FIELDS,
    **dict.fromkeys(
        ("max_tokens", "stream", "temperature", "top_p", "top_k", "stop_sequences", "metadata", "service_tier"),
        _NOT_GENERATED,
    ),
}
