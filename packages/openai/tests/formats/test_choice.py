# SPDX-License-Identifier: MIT
"""Which format is chosen for a model: by option, response template, chat template and type, in this order."""

from __future__ import annotations

import time
from typing import Any, cast

import pytest

from candle_vllm.core.errors import ConfigError
from candle_vllm.core.text.chat_template import ChatTemplate
from candle_vllm.core.text.template_needs import TemplateNeeds, TemplateProbe, template_needs
from candle_vllm.openai.formats.choice import choose_layout
from candle_vllm.openai.formats.json_calls import JsonCalls
from candle_vllm.openai.formats.layout import ReasoningFormat, ToolFormat
from candle_vllm.openai.formats.reasoning_table import REASONING_FORMATS
from candle_vllm.openai.formats.table import TOOL_FORMATS, by_name

# What other servers call formats. Those that we do not have are refused: inkling, k2_horizon, gigachat35, and
# minimax_m2_append_think, which puts thoughts into content.
VLLM_TOOLS = (
    "apertus cohere_command3 cohere_command4 deepseek_v3 deepseek_v31 deepseek_v32 deepseek_v4 deepseek_v41 "
    "ernie45 functiongemma "
    "gemma4 gigachat3 glm45 glm47 granite granite-20b-fc granite4 hermes hunyuan_a13b hy_v3 inkling internlm "
    "jamba kimi_k2 "
    "kimi_k3 lfm2 llama3_json llama4_json llama4_pythonic longcat mimo minicpm5 minimax minimax_m2 minimax_m3 mistral "
    "olmo3 openai phi4_mini_json plamo3 k2_horizon poolside_v1 pythonic qwen3_coder qwen3_xml seed_oss "
    "solar_open2 step3 step3p5 xlam"
)
VLLM_REASONING = (
    "cohere_command3 cohere_command4 deepseek_r1 deepseek_v3 deepseek_v4 deepseek_v41 k2_horizon plamo3 ernie45 "
    "gemma4 glm45 glm47 granite holo2 "
    "hunyuan_a13b hy_v3 inkling kimi_k2 kimi_k3 mimo minimax_m2 minimax_m3 mistral nemotron_v3 olmo3 "
    "openai_gptoss poolside_v1 "
    "qwen3 seed_oss step3 step3p5"
)
SGLANG_TOOLS = (
    "apertus2509 cohere_command4 deepseekv3 deepseekv31 deepseekv32 deepseekv4 dots gemma4 gigachat3 glm glm45 glm47 "
    "gpt-oss hermes hunyuan interns1 kimi_k2 kimi_k3 lfm2 ling3 llama3 mimo minicpm5 minimax-m2 minimax-m3 mistral "
    "muse poolside_v1 pythonic qwen qwen25 qwen3_coder spark25 step3 step3p5 trinity"
)
CANDLE_TOOLS = "json mistral qwen qwen_coder llama deepseek glm47_moe pythonic minimax_m2"
HERMES = """{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>
{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}
</tool_call>{% endfor %}<|end|>{% endfor %}{% if tools %}{{ tools | tojson }}{% endif %}
{% if add_generation_prompt %}<|assistant|>{% endif %}"""
QWEN_RESPONSE: dict[str, Any] = {
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "reasoning_content": {"open": "<think>", "close": "</think>"},
        "tool_calls": {"open_pattern": r"\s*<tool_call>", "close": "</tool_call>", "repeats": True, "content": "json"},
        "content": {"close": "<|im_end|>"},
    },
}


def name(row: ToolFormat | ReasoningFormat | None) -> str:
    return row.name if row else "-"


@pytest.mark.parametrize("option", f"{VLLM_TOOLS} {SGLANG_TOOLS} {CANDLE_TOOLS}".split())
def test_names_of_other_servers(option: str) -> None:
    assert choose_layout(tool_parser=option).tools is not None


@pytest.mark.parametrize("option", VLLM_REASONING.split())
def test_reasoning_names_of_other_servers(option: str) -> None:
    assert choose_layout(reasoning_parser=option).reasoning is not None


def test_every_name_is_one_format() -> None:
    for rows in (TOOL_FORMATS, REASONING_FORMATS):
        names = [one for row in rows for one in (row.name, *row.aliases)]
        types = [one.replace("_", "") for row in rows for one in row.model_types]
        assert len(names) == len(set(names))
        assert len(types) == len(set(types))
    assert set(by_name(REASONING_FORMATS)) >= {"think", "deepseek_r1"}


@pytest.mark.parametrize("option", ["none", "passthrough", "OFF"])
def test_off_is_off(option: str) -> None:
    choice = choose_layout(tool_parser=option, reasoning_parser=option, template=HERMES, model_type="qwen3")
    assert (choice.tools, choice.reasoning) == (None, None)
    assert choice.tools_reason == f"tool_parser is {option!r}"


@pytest.mark.parametrize("setting", ["tool_parser", "reasoning_parser"])
def test_an_unknown_name_is_refused_with_those_that_there_are(setting: str) -> None:
    with pytest.raises(
        ConfigError, match=r"'zzz9', which is not a known format; the formats are .* \(and auto, none\)"
    ) as raised:
        choose_layout(**cast(Any, {setting: "zzz9"}))
    assert raised.value.setting == setting
    known = by_name(TOOL_FORMATS) if setting == "tool_parser" else by_name(REASONING_FORMATS)
    assert all(row.name in str(raised.value) for row in known.values())


@pytest.mark.parametrize(
    ("setting", "name", "near"), [("tool_parser", "hermess", "hermes"), ("reasoning_parser", "deepseek", "deepseek_r1")]
)
def test_of_an_unknown_name_the_nearest_are_said(setting: str, name: str, near: str) -> None:
    with pytest.raises(ConfigError, match=rf"which is not a known format; the nearest are .*\b{near}\b") as raised:
        choose_layout(**cast(Any, {setting: name}))
    assert len(str(raised.value)) < 160


def test_what_decides_first() -> None:
    everything: dict[str, Any] = {"response_template": QWEN_RESPONSE, "template": HERMES, "model_type": "mistral"}
    assert name(choose_layout(tool_parser="kimi_k2", **everything).tools) == "kimi_k2"
    choice = choose_layout(tool_parser="auto", **everything)
    assert (name(choice.tools), name(choice.reasoning)) == ("hermes", "think")
    assert choice.tools_reason == choice.reasoning_reason == "the tokenizer's response_template defines it"
    choice = choose_layout(template=HERMES, model_type="mistral")
    assert (name(choice.tools), choice.tools_reason) == ("hermes", "the chat template writes it")
    assert (name(choice.reasoning), choice.reasoning_reason) == ("-", "no sign of reasoning")
    choice = choose_layout(template="{{ messages }}", model_type="gpt-oss")
    assert (name(choice.tools), name(choice.reasoning)) == ("openai", "openai")
    choice = choose_layout(template="{{ messages[0].content }}{{ tools }}", model_type="unheard")
    assert (name(choice.tools), choice.tools_reason) == ("json", "the chat template uses tools, in no known format")
    choice = choose_layout(template="{{ messages[0].content }}", model_type="unheard")
    assert (name(choice.tools), choice.tools_reason) == ("-", "no sign of tools")
    assert choose_layout() == choose_layout(template={})


def test_the_template_for_tools_is_asked() -> None:
    choice = choose_layout(template={"default": "{{ messages[0].content }}", "tool_use": HERMES})
    assert (name(choice.tools), choice.needs and choice.needs.writes_tools) == ("hermes", True)


@pytest.mark.parametrize("kind", ["qwen3moe", "Qwen3_MoE", "qwen3-moe"])
def test_a_model_type_is_known_however_it_is_spelled(kind: str) -> None:
    choice = choose_layout(model_type=kind)
    assert (name(choice.tools), name(choice.reasoning)) == ("hermes", "think")


def test_response_templates() -> None:
    def field(**tool_calls: Any) -> dict[str, Any]:
        return {"fields": {"tool_calls": {"repeats": True, **tool_calls}}}

    qwen35 = field(
        open_pattern=r"\s*<tool_call>\s*<function=(?P<name>[^>\n]+)>",
        close_pattern=r"</function>\s*</tool_call>",
        content="xml-inline",
        content_args={"tag_pattern": r"<parameter=(?P<key>[^>\n]+)>\s*(?P<value>.*?)\s*</parameter>"},
    )
    gemma = field(
        open_pattern=r"<\|tool_call>call:(?P<name>\w+)",
        close="<tool_call|>",
        content="json",
        content_args={"unquoted_keys": True, "string_delims": [['<|"|>', '<|"|>']]},
    )
    assert name(choose_layout(response_template=qwen35).tools) == "qwen3_coder"
    assert name(choose_layout(response_template=gemma).tools) == "gemma4"
    spaced = field(open="\n<tool_call>\n", close="\n</tool_call>", content="json")
    assert name(choose_layout(response_template=spaced).tools) == "hermes"
    function = {"name": "{content.tool_name}", "arguments": "{content.parameters}"}
    own = field(open="[[call]]", close="[[end]]", content="json", transform={"type": "function", "function": function})
    own["fields"]["thinking"] = {"open": "[[hm]]", "close": "[[so]]"}
    choice = choose_layout(response_template=own)
    assert choice.tools is not None
    assert choice.tools.opens == ("[[call]]",)
    assert choice.tools.bodies == (JsonCalls(closers=("[[end]]",), name_key="tool_name", arguments_key="parameters"),)
    assert choice.reasoning is not None
    assert choice.reasoning.pairs == {"[[hm]]": "[[so]]"}


@pytest.mark.parametrize(
    "response",
    [
        7,
        {},
        {"fields": None},
        {"fields": {"tool_calls": []}},
        {"fields": {"tool_calls": {"open": 3, "close": None}}},
        {"fields": {"tool_calls": {"open": "", "content": "json"}}},
        {"fields": {"tool_calls": {"open_pattern": "(a|b)+", "content": "json"}}},
        {"fields": {"tool_calls": {"open": "<x>", "content": "kv-lines"}}},
        {"fields": {"tool_calls": {"open": "<x>", "content": "json", "transform": {"name": "f", "arguments": 1}}}},
    ],
)
def test_a_response_template_that_is_of_no_use(response: Any) -> None:
    choice = choose_layout(response_template=response, template=HERMES)
    assert name(choice.tools) == "hermes"
    assert "; the tokenizer's response_template was not used: " in choice.tools_reason


@pytest.mark.parametrize(
    "template",
    [
        "{% if %}",
        "{{ raise_exception('no') }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{{ b }}{% endfor %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__ }}",
        "{{ tools }}" * 20_000,
    ],
)
def test_a_hostile_template_decides_nothing(template: str) -> None:
    start = time.thread_time()
    choice = choose_layout(template=template, model_type="qwen3")
    assert name(choice.tools) == "hermes"
    assert time.thread_time() - start < 5


def test_what_a_template_needs() -> None:
    def needs(template: str) -> TemplateNeeds:
        return template_needs(TemplateProbe(ChatTemplate(template, {})))

    assert needs(HERMES) == TemplateNeeds(writes_tools=True, image_parts=False)
    said = "{% for m in messages %}{{ m.content }}{{ m.tool_calls[0].function.arguments if m.tool_calls }}{% endfor %}"
    as_text = TemplateNeeds(ignores_tools=True, arguments_as_text=True, parallel_calls=False, image_parts=False)
    assert needs(said) == as_text  # Python would be written
    joined = needs(said.replace("}}{{", "+").replace("if m.tool_calls", "if m.tool_calls else m.content"))
    assert joined.arguments_as_text
    refusing = needs(said.replace("{{ m.tool", "{{ raise_exception('no calls, please') if m.tool_calls }}{{ m.tool"))
    assert refusing == TemplateNeeds(ignores_tools=True, writes_calls=False, image_parts=False)
    # which says nothing of what it is given
    assert needs("{{ bos_token }}") == TemplateNeeds(ignores_tools=True)
    short = HERMES.replace(
        "<tool_call>\n", "{% if c.id|length != 9 %}{{ raise_exception('id') }}{% endif %}<tool_call>"
    )
    assert needs(short).short_ids


@pytest.mark.parametrize(
    ("tail", "reasoning", "is_open"),
    [
        ("<|im_start|>assistant\n<think>\n", "think", True),
        ("<|im_start|>assistant\n<think>", "think", True),
        ("<think>\n\n</think>\n\n", "think", False),
        ("<think></think>", "think", False),
        ("</think>", "think", False),
        ("say <think> please<|end|><|assistant|>", "think", False),
        ("<|im_assistant|>assistant<|im_middle|>◁think▷", "kimi_vl", True),
        ("<|START_THINKING|>", "cohere", True),
        ("<|START_THINKING|><|END_THINKING|>", "cohere", False),
        ("<|open|>think<|sep|>", "kimi_k3", True),
        ("Here are my reasoning steps:\n", "apriel", True),
        ("<|channel>thought\n<channel|>", "gemma4", False),
        ("[THINK]", "think", True),
        ("<|start|>assistant", "openai", False),
    ],
)
def test_whether_a_prompt_leaves_thoughts_open(tail: str, reasoning: str, is_open: bool) -> None:
    assert bool(by_name(REASONING_FORMATS)[reasoning].open_mark(tail)) is is_open


def test_an_answer_to_go_on_with() -> None:
    think = by_name(REASONING_FORMATS)["think"]
    assert think.open_mark("<think>\nFirst I", continued=True)
    assert not think.open_mark("<think>\nFirst I")
    assert not think.open_mark("<think>\nFirst I</think>So", continued=True)
