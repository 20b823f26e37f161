# SPDX-License-Identifier: MIT
"""No field that OpenAI or vLLM defines is unknown here: each is honoured, without effect, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import get_type_hints

import pytest
from openai.types import completion_create_params as completion_params
from openai.types.chat import completion_create_params as chat_params
from openai.types.chat.chat_completion_stream_options_param import ChatCompletionStreamOptionsParam

from candle_vllm.openai import ADVISORY_FIELDS, REFUSED_FIELDS, ChatCompletionRequest, CompletionRequest
from candle_vllm.openai.protocol.fields import COMPLETION_REFUSED_FIELDS, WireModel
from candle_vllm.openai.protocol.generation import GUIDED, StreamOptions
from candle_vllm.openai.protocol.structured import StructuredOutputs


def names(text: str) -> list[str]:
    return text.split()


VLLM_SHARED = names("""
    use_beam_search top_k min_p repetition_penalty watermarking length_penalty stop_token_ids
    include_stop_str_in_output ignore_eos min_tokens skip_special_tokens spaces_between_special_tokens
    truncate_prompt_tokens truncation_side prompt_logprobs logprob_token_ids allowed_token_ids bad_words
    add_special_tokens response_format structured_outputs priority request_id session_id
    return_tokens_as_token_ids return_token_ids routed_experts_prompt_start return_token_offsets return_mm_kwargs
    cache_salt kv_transfer_params ec_transfer_params vllm_xargs repetition_detection stream_interval
    thinking_token_budget echo logits_processors
    guided_json guided_regex guided_choice guided_grammar guided_json_object guided_decoding_backend
    guided_whitespace_pattern
""")
VLLM_CHAT = names("""
    include_reasoning add_generation_prompt continue_final_message documents chat_template chat_template_kwargs
    media_io_kwargs mm_processor_kwargs return_prompt_text best_of
""")
VLLM_COMPLETION = ["prompt_embeds", "suffix", "best_of"]
VLLM_STRUCTURED = names("""
    json regex choice grammar json_object structural_tag disable_fallback disable_any_whitespace
    disable_additional_properties whitespace_pattern
""")


def known(kind: type[WireModel]) -> set[str]:
    return kind.wire_names() | set(kind.refused_fields) | set(GUIDED)


@pytest.mark.parametrize(
    ("kind", "official"),
    [
        (ChatCompletionRequest, chat_params.CompletionCreateParamsNonStreaming),
        (ChatCompletionRequest, chat_params.CompletionCreateParamsStreaming),
        (CompletionRequest, completion_params.CompletionCreateParamsNonStreaming),
        (CompletionRequest, completion_params.CompletionCreateParamsStreaming),
        (StreamOptions, ChatCompletionStreamOptionsParam),
    ],
)
def test_openais_fields_are_known(kind: type[WireModel], official: type) -> None:
    fields = {*get_type_hints(official)}
    assert len(fields) > 1
    assert not fields - known(kind)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (ChatCompletionRequest, VLLM_SHARED + VLLM_CHAT),
        (CompletionRequest, VLLM_SHARED + VLLM_COMPLETION),
        (StructuredOutputs, VLLM_STRUCTURED),
    ],
)
def test_vllms_fields_are_known(kind: type[WireModel], fields: list[str]) -> None:
    assert not set(fields) - known(kind)


def test_no_field_is_both_honoured_and_refused() -> None:
    for kind in (ChatCompletionRequest, CompletionRequest):
        assert not kind.wire_names() & set(kind.refused_fields)
    assert ChatCompletionRequest.refused_fields is REFUSED_FIELDS
    assert CompletionRequest.refused_fields is COMPLETION_REFUSED_FIELDS
    assert "parallel_tool_calls" not in ADVISORY_FIELDS


def test_the_readme_lists_what_text_completions_refuse() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    for name, refusal in COMPLETION_REFUSED_FIELDS.items():
        assert f"| `{name}` | {refusal.reason} |" in readme
