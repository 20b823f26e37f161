# SPDX-License-Identifier: MIT
"""The table of tool formats: one row for each form of calls. `reasoning_table` has the reasoning formats.

`docs/tool-calling.md` shows the table; `packages/openai/tests/formats/samples.py` has an example of each format.
"""

from __future__ import annotations

import dataclasses
from importlib.metadata import entry_points
from typing import TypeVar

from candle_vllm.openai.formats import shapes
from candle_vllm.openai.formats.blocks import Blocks
from candle_vllm.openai.formats.channels import Harmony, Headed
from candle_vllm.openai.formats.gemma import Gemma
from candle_vllm.openai.formats.json_calls import JsonCalls
from candle_vllm.openai.formats.layout import ReasoningFormat, ToolFormat
from candle_vllm.openai.formats.named_calls import NamedJson, RawCode
from candle_vllm.openai.formats.nested import Nested
from candle_vllm.openai.formats.output import mistral_id
from candle_vllm.openai.formats.pythonic import Pythonic
from candle_vllm.openai.formats.tagged import Tagged

_Row = TypeVar("_Row", ToolFormat, ReasoningFormat)


def _dsml(name: str, section: str, *types: str, space: str = "") -> ToolFormat:
    """Return a row of DeepSeek's markup language with `section` around all calls; `name` is also a model type."""
    body = Tagged(
        name_open=f'<｜DSML｜{space}invoke name="',
        name_end='">',
        key_open=f'<｜DSML｜{space}parameter name="',
        key_end=">",
        head=r'(?P<key>[^"]*)"(?: string="(?P<text>true|false)")?',
        value_end=f"</｜DSML｜{space}parameter>",
        call_end=f"</｜DSML｜{space}invoke>",
        closers=(f"</｜DSML｜{space}{section}>",),
    )
    return ToolFormat(
        name,
        opens=(body.closers[0].replace("</", "<"),),
        names=(body.name_open,),
        bodies=(body,),
        named=dataclasses.replace(body, known_only=True),
        ends_thoughts=True,
        model_types=(name, *types),
    )


GEMMA = Gemma(quote='<|"|>', closers=("<tool_call|>",))
TOOL_FORMATS: tuple[ToolFormat, ...] = (
    ToolFormat(
        "json",
        opens=("```json",),
        bodies=(shapes.FENCED_JSON,),
        bare=shapes.BARE_JSON,
        bare_starts="{[",
        aliases=("xlam",),
    ),
    ToolFormat(
        "hermes",
        opens=("<tool_call>",),
        bodies=(shapes.HERMES, shapes.QWEN),
        ends_thoughts=True,
        on_lines=True,
        fenced=shapes.FENCED_JSON,
        bare=shapes.BARE_HERMES,
        bare_starts="{[",
        aliases=shapes.words("qwen qwen2 qwen25 granite4 smollm3 ernie45 exaone4 trinity"),
        model_types=shapes.words(
            "qwen2 qwen2_moe qwen2_vl qwen2_5_vl qwen3 qwen3_moe qwen3_vl qwen3_vl_moe qwen3_next smollm3 "
            "granitemoehybrid granite_hybrid ernie4_5 ernie4_5_moe exaone4 phi yi stablelm"
        ),
    ),
    ToolFormat(  # before Qwen's format, which matches such calls too
        "functionary_v31",
        opens=("<|python_tag|>",),
        names=("<function=",),
        bodies=(shapes.NAMED_TAG, RawCode()),
        aliases=("functionary_v3_llama_3_1",),
    ),
    ToolFormat(
        "qwen3_coder",
        opens=("<tool_call>",),
        names=("<function=",),
        bodies=(shapes.QWEN, shapes.HERMES),
        named=shapes.QWEN_NAMED,
        ends_thoughts=True,
        aliases=shapes.words("qwen_coder qwen3_xml qwen3_5 nemotron_3 step3p5 mimo"),
        model_types=shapes.words("qwen3_5 qwen3_5_moe qwen4_exp nemotron_h nemotron_h_moe step3p5 step35"),
    ),
    ToolFormat(
        "seed_oss",
        opens=("<seed:tool_call>",),
        bodies=(dataclasses.replace(shapes.QWEN, closers=("</seed:tool_call>",)),),
        model_types=("seed_oss",),
    ),
    ToolFormat(
        "glm45",
        opens=("<tool_call>",),
        bodies=(shapes.GLM, shapes.HERMES),
        ends_thoughts=True,
        aliases=shapes.words("glm glm4_moe glm46 glm47 glm47_moe ling3 spark spark25 laguna poolside_v1"),
        model_types=shapes.words("glm4_moe glm4_moe_lite glm_moe_dsa glm4v_moe glm5_next glm5_next_text"),
    ),
    ToolFormat(
        "hunyuan_v3",
        opens=("<tool_call:opensource>", "<tool_call>"),
        bodies=shapes.HUNYUAN,
        strays=("<tool_calls:opensource>", "</tool_calls:opensource>", "<tool_calls>", "</tool_calls>"),
        aliases=("hy_v3",),
        model_types=("hy_v3",),
    ),
    ToolFormat(
        "mistral_v13",
        opens=("[TOOL_CALLS]",),
        bodies=(NamedJson(name_end="[ARGS]"), *shapes.MISTRAL),
        make_id=mistral_id,
        aliases=("devstral", "ministral3", "magistral"),
        model_types=("mistral3", "ministral3"),
    ),
    ToolFormat("mistral_v11", opens=("[TOOL_CALLS]",), bodies=shapes.MISTRAL[::-1], make_id=mistral_id),
    ToolFormat(
        "mistral",
        opens=("[TOOL_CALLS]",),
        bodies=shapes.MISTRAL,
        make_id=mistral_id,
        aliases=("mistral_v3", "mistral_v7"),
        model_types=("mistral", "mixtral"),
    ),
    ToolFormat(
        "llama3_json",
        opens=("<|python_tag|>",),
        names=("<function=",),
        bodies=(
            JsonCalls(arguments_key="parameters"),
            shapes.NAMED_TAG,
            Pythonic(listed=False, known_only=True),
            RawCode(),
        ),
        bare=JsonCalls(known_only=True, arguments_key="parameters"),
        bare_starts="{[",
        aliases=("llama", "llama3"),
        model_types=("llama", "mllama"),
    ),
    ToolFormat(
        "llama4_json",
        opens=("<|python_end|>", "<|python_tag|>"),
        bodies=(JsonCalls(arguments_key="parameters"),),
        bare=JsonCalls(known_only=True, arguments_key="parameters"),
        bare_starts="{[",
        strays=("<|python_start|>",),
    ),
    ToolFormat(
        "functionary_v32",
        flow=Headed(),
        aliases=("functionary_v3_2", "functionary"),
        hints=(">>>${recipient}",),
    ),
    ToolFormat(
        "pythonic",
        opens=("<|python_start|>",),
        bodies=(Pythonic(closers=("<|python_end|>",)),),
        bare=Pythonic(known_only=True),
        bare_starts="[",
        aliases=("llama4", "llama4_pythonic"),
        model_types=("llama4",),
    ),
    ToolFormat(
        "olmo3",
        opens=("<function_calls>",),
        bodies=(Pythonic(listed=False, closers=("</function_calls>",)),),
        model_types=("olmo3",),
    ),
    ToolFormat(
        "lfm2",
        opens=("<|tool_call_start|>",),
        bodies=(Pythonic(closers=("<|tool_call_end|>",)), JsonCalls(closers=("<|tool_call_end|>",))),
        aliases=("lfm25",),
        hints=("<|tool_list_start|>", "List of tools: ["),
        model_types=("lfm2", "lfm2_moe"),
    ),
    ToolFormat(
        "deepseek_v3",
        opens=("<｜tool▁call▁begin｜>",),
        bodies=(shapes.DEEPSEEK, shapes.DEEPSEEK_PLAIN),
        strays=shapes.DEEPSEEK_STRAYS,
        aliases=("deepseek", "deepseek_r1"),
        model_types=("deepseek_v2", "deepseek_v3", "deepseek2"),
    ),
    ToolFormat(
        "deepseek_v31",
        opens=("<｜tool▁call▁begin｜>",),
        bodies=(shapes.DEEPSEEK_PLAIN, shapes.DEEPSEEK),
        ends_thoughts=True,
        strays=shapes.DEEPSEEK_STRAYS,
    ),
    _dsml("deepseek_v32", "function_calls"),
    _dsml("deepseek_v4", "tool_calls"),
    _dsml("deepseek_v41", "calls", "deepseek_v41_text", space=" "),
    ToolFormat(
        "phi4_mini_json",
        opens=("functools",),
        bodies=(JsonCalls(listed=True, offered_only=True),),
        aliases=("phi4_mini", "firefunction"),
        hints=("<|tool|>", "functools["),
        model_types=("phi3", "phi4mm"),
    ),
    ToolFormat(
        "functiongemma",
        opens=("<start_function_call>",),
        bodies=(Gemma(quote="<escape>", closers=("<end_function_call>",)),),
        aliases=("gemma", "gemma3"),
        model_types=("gemma2", "gemma3", "gemma3_text"),
    ),
    ToolFormat(
        "gemma4",
        opens=("<|tool_call>",),
        bodies=(GEMMA,),
        unmarked=dataclasses.replace(GEMMA, known_only=True),
        bare_starts="c:",
        model_types=("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text"),
    ),
    ToolFormat(
        "granite",
        opens=("<|tool_call|>", "<tool_call>"),
        bodies=(JsonCalls(listed=True),),
        strays=("</tool_call>",),
        aliases=("granite3",),
        hints=("<|start_of_role|>available_tools<|end_of_role|>",),
        model_types=("granite", "granitemoe"),
    ),
    ToolFormat("granite_20b", opens=("<function_call>",), bodies=(JsonCalls(),), aliases=("granite-20b-fc",)),
    ToolFormat(
        "kimi_k2",
        opens=("<|tool_call_begin|>",),
        bodies=(
            NamedJson(
                before_name=("functions.",),
                name_end="<|tool_call_argument_begin|>",
                counted=True,
                closers=("<|tool_call_end|>",),
            ),
        ),
        strays=(
            *("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
            *("<|tool_call_section_begin|>", "<|tool_call_section_end|>"),
        ),
        ends_thoughts=True,
        model_types=("kimi_k2", "kimi_k25"),
    ),
    ToolFormat(
        "kimi_k3",
        opens=("<|open|>tools<|sep|>",),
        bodies=(
            Tagged(
                name_open='<|open|>call tool="',
                name_head=r'(?P<name>[^"]*)".*',
                name_end="<|sep|>",
                key_open="<|open|>argument ",
                key_end="<|sep|>",
                head=r'key="(?P<key>[^"]*)"(?: type="(?P<type>\w+)")?',
                value_end="<|close|>argument<|sep|>",
                call_end="<|close|>call<|sep|>",
                closers=("<|close|>tools<|sep|>",),
            ),
        ),
        strays=shapes.K3_STRAYS,
        answer=(("<|open|>response<|sep|>", "<|close|>response<|sep|>"),),
        model_types=("kimi_k3",),
    ),
    ToolFormat(
        "minimax_m2",
        opens=("<minimax:tool_call>",),
        bodies=(shapes.invokes("</minimax:tool_call>"),),
        ends_thoughts=True,
        model_types=("minimax_m2",),
    ),
    ToolFormat(
        "minimax_m3",
        opens=("]<]minimax[>[<tool_call>",),
        bodies=(Nested("]<]minimax[>[", closers=("]<]minimax[>[</tool_call>",)),),
        argument_tags=True,
        model_types=("minimax_m3", "minimax_m3_vl_text"),
    ),
    ToolFormat(
        "dots",
        opens=("<dots_function_call>",),
        bodies=(shapes.invokes("</dots_function_call>"), JsonCalls(closers=("</dots_function_call>",))),
    ),
    ToolFormat("openai", flow=Harmony(), aliases=("gpt_oss", "harmony"), model_types=("gpt_oss",)),
    ToolFormat("inkling", flow=Blocks(), model_types=shapes.words("inkling_mm_model inkling_model inkling_text")),
    ToolFormat("muse", flow=shapes.MUSE, aliases=("muse_glimmer",), model_types=("muse_glimmer",)),
    ToolFormat(
        "solar",
        opens=("<|tool_call:begin|>",),
        bodies=(
            NamedJson(
                id_end="<|tool_call:name|>", name_end="<|tool_call:args|>", closers=("<|tool_call:end|>", "<|calls|>")
            ),
        ),
        strays=shapes.SOLAR_STRAYS,
        answer=(("<|content|>", "<|end|>"),),
        aliases=("solar_open",),
        model_types=("solar_open",),
    ),
    ToolFormat(
        "solar_open2",
        opens=("<|tool_call:start|>",),
        bodies=(
            Tagged(
                name_open="",
                name_end="\n",
                key_open="<|tool_arg:start|>",
                key_end="<|tool_arg:value|>",
                value_end="<|tool_arg:end|>",
                call_end="<|tool_call:end|>",
            ),
        ),
        model_types=("solar_open2",),
    ),
    ToolFormat(
        "cohere",
        opens=("<|START_ACTION|>",),
        bodies=(
            JsonCalls(
                listed=True,
                name_key="tool_name",
                arguments_key="parameters",
                id_key="tool_call_id",
                closers=("<|END_ACTION|>",),
            ),
        ),
        strays=shapes.COHERE_STRAYS,
        answer=(("<|START_RESPONSE|>", "<|END_RESPONSE|>"), ("<|START_TEXT|>", "<|END_TEXT|>")),
        aliases=shapes.words("command_r7b cohere2 command_a cohere_command3 cohere_command4"),
        model_types=("cohere2", "cohere2_moe"),
    ),
    ToolFormat(
        "command_r_plus",
        opens=("Action:",),
        bodies=(
            JsonCalls(
                listed=True,
                fenced=True,
                offered_only=True,
                silent=("directly-answer", "directly_answer"),
                name_key="tool_name",
                arguments_key="parameters",
                closers=("```",),
            ),
        ),
        line_start=True,
        aliases=("command_r",),
        model_types=("cohere", "command_r"),
    ),
    ToolFormat(
        "tool_calls_json",
        opens=("<tool_calls>",),
        bodies=(JsonCalls(listed=True, closers=("</tool_calls>",)),),
        aliases=shapes.words("hunyuan_a13b hunyuan apriel minimax minimax_m1 jamba"),
        model_types=shapes.words("hunyuan_v1_moe hunyuan_v1_dense minimax minimax_m1 jamba"),
    ),
    ToolFormat("nemotron_nano", opens=("<TOOLCALL>",), bodies=(JsonCalls(listed=True, closers=("</TOOLCALL>",)),)),
    ToolFormat(
        "apertus",
        opens=("<|tools_prefix|>",),
        bodies=(JsonCalls(listed=True, keyed=True, closers=("<|tools_suffix|>",)),),
        aliases=("apertus2509",),
        model_types=("apertus",),
    ),
    ToolFormat(
        "internlm",
        opens=("<|action_start|><|plugin|>",),
        bodies=(JsonCalls(arguments_key="parameters", closers=("<|action_end|>",)),),
        aliases=("internlm2", "interns1"),
        model_types=("internlm2", "internlm3", "interns1"),
    ),
    ToolFormat(
        "gigachat3",
        opens=("<|function_call|>", "function call<|role_sep|>"),
        bodies=(JsonCalls(closers=("<|message_sep|>",)),),
        strays=("<|message_sep|>",),
    ),
    ToolFormat(
        "longcat",
        opens=("<longcat_tool_call>",),
        bodies=(JsonCalls(closers=("</longcat_tool_call>",)),),
        model_types=("longcat_flash",),
    ),
    ToolFormat(
        "minicpm5",
        names=('<function name="', '<functionname="'),
        bodies=(shapes.MINICPM,),
        named=shapes.MINICPM_NAMED,
    ),
    ToolFormat(
        "step3",
        opens=("<｜tool_call_begin｜>function<｜tool_sep｜>",),
        bodies=(shapes.invokes("<｜tool_call_end｜>", "steptml:"),),
        strays=("<｜tool_calls_begin｜>", "<｜tool_calls_end｜>"),
        model_types=("step3_text", "step3_vl"),
    ),
    ToolFormat(
        "k2_horizon",
        opens=("<ifm|tool_call>",),
        bodies=(shapes.HORIZON, JsonCalls(closers=("</ifm|tool_call>",))),
        strays=("<ifm|tool_calls>", "</ifm|tool_calls>"),
        model_types=("k2_horizon",),
    ),
    ToolFormat(
        "plamo3",
        opens=("<|plamo:begin_tool_request:plamo|>",),
        bodies=(
            NamedJson(
                before_name=("<|plamo:begin_tool_name:plamo|>",),
                name_end="<|plamo:end_tool_name:plamo|>",
                between=("<|plamo:begin_tool_arguments:plamo|>", "<|plamo:constrain|>json", "<|plamo:msg|>"),
                closers=("<|plamo:end_tool_arguments:plamo|>", "<|plamo:end_tool_request:plamo|>"),
                closed=2,
            ),
        ),
        strays=("<|plamo:begin_tool_requests:plamo|>", "<|plamo:end_tool_requests:plamo|>"),
        ends_thoughts=True,
        model_types=("plamo3",),
    ),
    *(point.load() for point in entry_points(group="candle_vllm.tool_formats")),  # from other installed packages
)


def by_name(rows: tuple[_Row, ...]) -> dict[str, _Row]:
    """Return formats by name and alias; a format's name precedes an equal alias."""
    own = {row.name: row for row in rows}
    return own | {alias: row for row in rows for alias in row.aliases if alias not in own}
