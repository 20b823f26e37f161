"""Names of OpenAI's Responses API that have no effect here, and those that are refused."""

from __future__ import annotations

from collections.abc import Mapping

from candle_vllm.openai.protocol.fields import REFUSED_FIELDS, Refusal

MAX_ITEMS = 8192  # of one request
MAX_METADATA = 16
MAX_METADATA_KEY = 64
MAX_METADATA_VALUE = 512
MAX_TEXT = 10 << 20  # characters of one text: the specification's limit

# Accepted, checked, and without effect.
ADVISORY_RESPONSES_FIELDS: Mapping[str, str] = {
    "user": "names the caller's user; the server keeps no per-user state",
    "safety_identifier": "names the caller's user; the server keeps no per-user state",
    "prompt_cache_key": "routes to a warm cache; there is one prefix cache for all",
    "prompt_cache_retention": "bounds the cache's life; blocks stay until memory is needed",
    "prompt_cache_options": "sets cache breakpoints; every full block of every prompt is cached",
    "service_tier": "chooses a price; there is one tier, and answers say `default`",
    "client_metadata": "labels requests for a client's own records",
    "access_programs": "chooses among OpenAI's programs; there are none here",
    "text.verbosity": "a hint that open models are not trained on",
    "reasoning.summary": "asks for a summary of the thoughts; the thoughts themselves are in the answer",
    "reasoning.generate_summary": "the older name of `reasoning.summary`",
    "reasoning.context": "chooses which thoughts the model sees again; its template decides that",
    "reasoning.mode": "chooses a price; there is one mode",
}

_HOSTED = "it belongs to OpenAI's own service"

REFUSED_RESPONSES_FIELDS: Mapping[str, Refusal] = {
    **{
        name: REFUSED_FIELDS[name]
        for name in ("functions", "function_call", "audio", "prediction", "moderation", "web_search_options", "suffix")
    },
    "prompt": Refusal("the server keeps no prompt templates; put the text into instructions and input"),
    "context_management": Refusal("prompts are never compacted; truncation: auto drops the oldest turns", ([],)),
    "image": Refusal("the server takes text only", ({},)),
    "messages": Refusal("it belongs to chat requests; use input"),
    "max_tokens": Refusal("it belongs to chat requests; use max_output_tokens"),
    "max_completion_tokens": Refusal("it belongs to chat requests; use max_output_tokens"),
    "response_format": Refusal("it belongs to chat requests; use text with format"),
    "reasoning_effort": Refusal("it belongs to chat requests; use reasoning with effort"),
    "logprobs": Refusal("use include with message.output_text.logprobs", (False,)),
    "n": Refusal("there is one answer", (1,)),
    "modalities": Refusal("the server makes text only", (["text"],)),
    "generate": Refusal("a request that generates nothing is not served", (True,)),
    "betas": Refusal(_HOSTED, ([],)),
}

REFUSED_COUNT_FIELDS: Mapping[str, Refusal] = {
    **REFUSED_RESPONSES_FIELDS,
    "personality": Refusal("it chooses a style of OpenAI's models; put it into instructions"),
    **dict.fromkeys(
        ("stream", "store", "background", "max_output_tokens", "max_tool_calls", "temperature", "top_p", "include"),
        Refusal("counting generates nothing"),
    ),
}
