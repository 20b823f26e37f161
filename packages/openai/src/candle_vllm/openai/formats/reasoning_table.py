# SPDX-License-Identifier: MIT
"""The table of reasoning formats: one row for each form in which models generate their reasoning."""

from __future__ import annotations

from collections.abc import Mapping

from candle_vllm.openai.formats.blocks import Blocks
from candle_vllm.openai.formats.channels import Harmony
from candle_vllm.openai.formats.layout import ReasoningFormat
from candle_vllm.openai.formats.shapes import COHERE_STRAYS, K3_STRAYS, MUSE, SOLAR_STRAYS, words

REASONING_FORMATS: tuple[ReasoningFormat, ...] = (
    ReasoningFormat(
        "think",
        others=(("<|think|>", "<|/think|>"), ("<thought>", "</thought>"), ("[THINK]", "[/THINK]")),
        aliases=words(
            "deepseek_r1 deepseek_v3 deepseek_v31 deepseek_v32 deepseek_v4 deepseek_v41 qwen3 qwen3_thinking glm45 "
            "glm47 minimax minimax_m2 kimi kimi_k2 nemotron_v3 nano_v3 step3 step3p5 olmo3 holo2 mimo poolside_v1 "
            "interns1 smollm3"
        ),
        model_types=words(
            "qwen3 qwen3_moe qwen3_next qwen3_vl qwen3_vl_moe qwen3_5 qwen3_5_moe qwen4_exp deepseek_v3 "
            "deepseek_v32 deepseek_v4 deepseek_v41 deepseek_v41_text glm4_moe glm4_moe_lite glm_moe_dsa glm5_next "
            "glm5_next_text minimax_m1 minimax_m2 kimi_k2 nemotron_h step3_text step3p5 olmo3 smollm3"
        ),
    ),
    ReasoningFormat(
        "think_answer",
        strays=("<answer>", "</answer>"),
        answer=(("<answer>", "</answer>"),),
        aliases=words("hunyuan_a13b hunyuan"),
        hints=("<answer></answer>",),
        model_types=words("hunyuan_v1_moe hunyuan_v1_dense"),
    ),
    ReasoningFormat(
        "think_response",
        strays=("<response>", "</response>"),
        answer=(("<response>", "</response>"),),
        aliases=words("ernie45 granite33"),
        hints=("<response></response>",),
        model_types=("ernie4_5_moe",),
    ),
    ReasoningFormat(
        "granite",
        "Here is my thought process:",
        "Here is my response:",
        others=(("Here's my thought process:", "Here's my response:"),),
        aliases=("granite32",),
    ),
    ReasoningFormat("mistral", "[THINK]", "[/THINK]", aliases=("magistral",)),
    ReasoningFormat("kimi_vl", "◁think▷", "◁/think▷", model_types=("kimi_vl",)),
    ReasoningFormat("seed_oss", "<seed:think>", "</seed:think>", model_types=("seed_oss",)),
    ReasoningFormat(
        "hunyuan_v3",
        "<think:opensource>",
        "</think:opensource>",
        others=(("<think>", "</think>"),),
        aliases=("hy_v3",),
        model_types=("hy_v3",),
    ),
    ReasoningFormat("minimax_m3", "<mm:think>", "</mm:think>", model_types=("minimax_m3", "minimax_m3_vl_text")),
    ReasoningFormat(
        "gemma4",
        "<|channel>thought",
        "<channel|>",
        model_types=("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text"),
    ),
    ReasoningFormat(
        "cohere",
        "<|START_THINKING|>",
        "<|END_THINKING|>",
        strays=COHERE_STRAYS,
        answer=(("<|START_RESPONSE|>", "<|END_RESPONSE|>"), ("<|START_TEXT|>", "<|END_TEXT|>")),
        aliases=("command_a", "cohere_command3", "cohere_command4"),
    ),
    ReasoningFormat("apertus", "<|inner_prefix|>", "<|inner_suffix|>", model_types=("apertus",)),
    ReasoningFormat(
        "kimi_k3",
        "<|open|>think<|sep|>",
        "<|close|>think<|sep|>",
        strays=K3_STRAYS,
        answer=(("<|open|>response<|sep|>", "<|close|>response<|sep|>"),),
        model_types=("kimi_k3",),
    ),
    ReasoningFormat(
        "apriel",
        "Here are my reasoning steps:",
        "[BEGIN FINAL RESPONSE]",
        strays=("[END FINAL RESPONSE]",),
        hints=("[BEGIN FINAL RESPONSE]",),
    ),
    ReasoningFormat(
        "solar",
        "<|think|>",
        "<|end|>",
        strays=SOLAR_STRAYS,
        answer=(("<|content|>", "<|end|>"),),
        aliases=("solar_open",),
        model_types=("solar_open",),
    ),
    ReasoningFormat(
        "k2_horizon",
        "<ifm|think>",
        "</ifm|think>",
        others=(("<ifm|think_fast>", "</ifm|think_fast>"), ("<ifm|think_faster>", "</ifm|think_faster>")),
        model_types=("k2_horizon",),
    ),
    ReasoningFormat("plamo3", "<|plamo:begin_think:plamo|>", "<|plamo:end_think:plamo|>", model_types=("plamo3",)),
    ReasoningFormat(
        "openai",
        "<|channel|>analysis<|message|>",
        "<|end|><|start|>assistant<|channel|>final<|message|>",
        flow=Harmony(),
        aliases=("openai_gptoss", "gpt_oss", "harmony"),
        model_types=("gpt_oss",),
    ),
    ReasoningFormat(
        "inkling",
        "<|content_thinking|>",
        "<|end_message|>",
        flow=Blocks(),
        model_types=words("inkling_mm_model inkling_model inkling_text"),
    ),
    ReasoningFormat(
        "muse", "to=self<|message|>", "<|eom|>", flow=MUSE, aliases=("muse_glimmer",), model_types=("muse_glimmer",)
    ),
)

# Text that Qwen's model cards recommend to insert when a budget ends the reasoning.
_QWEN = (
    "\n\nConsidering the limited time by the user, I have to give the solution based on the thinking directly now.\n"
)
LAST_WORDS: Mapping[str, str] = dict.fromkeys(words("qwen3 qwen3_moe qwen3_next qwen3_vl qwen3_vl_moe"), _QWEN)
"""Model type -> text that is inserted before the closing mark when a budget ends the reasoning."""
