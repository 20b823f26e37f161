# SPDX-License-Identifier: MIT
"""One text or more for every format, and the message that it holds. Texts are those that templates and models write."""

# ruff: noqa: E501 - a sample is one text
from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any, NamedTuple

from packages.openai.tests.formats.messages import Parsed, parse, parser

TOOLS: dict[str, dict[str, Any]] = {
    "get_weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "tags": {"type": "array", "items": {"type": "string"}},
        },
        "required": ["city"],
    },
    "f2": {"type": "object", "properties": {"city": {"type": "string"}, "on": {"type": "boolean"}}},
    "now": {"type": "object", "properties": {}},
    "python": {"type": "object", "properties": {"code": {"type": "string"}}},
}
QUOTED = 'New "York"'
ONE = [("get_weather", {"city": QUOTED, "days": 3, "tags": ["a", "</b>"]})]
TWO = [*ONE, ("f2", {"city": "x"})]
ARGS = '{"city": "New \\"York\\"", "days": 3, "tags": ["a", "</b>"]}'
SMALL = '{"city": "x"}'


class Sample(NamedTuple):
    """A text, and what is in it."""

    tools: str  # name of the format
    text: str
    calls: list[tuple[str, dict[str, Any]]]
    content: str = ""
    thoughts: str = ""
    reasoning: str = "think"  # name of the format
    prefilled: bool = False
    ids: tuple[str, ...] = ()


def _json(name_key: str = "name", key: str = "arguments") -> tuple[str, str]:
    return (
        f'{{"{name_key}": "get_weather", "{key}": {ARGS}}}',
        f'{{"{name_key}": "f2", "{key}": {SMALL}}}',
    )


_A, _B = _json()
_QWEN = (
    "<tool_call>\n<function=get_weather>\n<parameter=city>\n" + QUOTED + "\n</parameter>\n<parameter=days>\n3\n"
    '</parameter>\n<parameter=tags>\n["a", "</b>"]\n</parameter>\n</function>\n</tool_call>\n'
    "<tool_call>\n<function=f2>\n<parameter=city>\nx\n</parameter>\n</function>\n</tool_call>"
)
_GLM = (
    f"<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>{QUOTED}</arg_value>\n<arg_key>days</arg_key>\n"
    '<arg_value>3</arg_value>\n<arg_key>tags</arg_key>\n<arg_value>["a", "</b>"]</arg_value>\n</tool_call>\n'
    "<tool_call>f2\n<arg_key>city</arg_key>\n<arg_value>x</arg_value>\n</tool_call>"
)
_DSML = (
    '<｜DSML｜{0}>\n<｜DSML｜invoke name="get_weather">\n<｜DSML｜parameter name="city" string="true">'
    + QUOTED
    + "</｜DSML｜"
    'parameter>\n<｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>\n<｜DSML｜parameter name="tags" '
    'string="false">["a", "</b>"]</｜DSML｜parameter>\n</｜DSML｜invoke>\n<｜DSML｜invoke name="f2">\n<｜DSML｜parameter '
    'name="city" string="true">x</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜{0}>'
)


def _invokes(tag: str) -> str:
    return (
        f'<{tag}invoke name="get_weather">\n<{tag}parameter name="city">{QUOTED}</{tag}parameter>\n<{tag}parameter '
        f'name="days">3</{tag}parameter>\n<{tag}parameter name="tags">["a", "</b>"]</{tag}parameter>\n</{tag}invoke>\n'
        f'<{tag}invoke name="f2">\n<{tag}parameter name="city">x</{tag}parameter>\n</{tag}invoke>\n'
    )


_DSML41 = _DSML.format("calls").replace("｜DSML｜", "｜DSML｜ ")
_HORIZON = (
    f"<ifm|tool_call>get_weather\n<ifm|arg_key>city</ifm|arg_key>\n{{}}<ifm|arg_value>{QUOTED}</ifm|arg_value>\n"
    "<ifm|arg_key>days</ifm|arg_key>\n{}<ifm|arg_value>3</ifm|arg_value>\n<ifm|arg_key>tags</ifm|arg_key>\n{}"
    '<ifm|arg_value>["a", "</b>"]</ifm|arg_value>\n</ifm|tool_call>\n<ifm|tool_call>f2\n<ifm|arg_key>city'
    "</ifm|arg_key>\n<ifm|arg_value>x</ifm|arg_value>\n</ifm|tool_call>"
)


def _plamo(name: str, arguments: str) -> str:
    return (
        f"<|plamo:begin_tool_request:plamo|><|plamo:begin_tool_name:plamo|>{name}<|plamo:end_tool_name:plamo|>"
        f"<|plamo:begin_tool_arguments:plamo|>{arguments}<|plamo:end_tool_arguments:plamo|><|plamo:end_tool_request:plamo|>"
    )


_PYTHON = f"get_weather(city='{QUOTED}', days=3, tags=['a', '</b>'])"
_GEMMA = "call:get_weather{{city:{0}" + QUOTED + "{0},days:3,tags:[{0}a{0},{0}</b>{0}]}}"
_K3 = (
    '<|open|>tools<|sep|><|open|>call tool="get_weather" index="1"<|sep|><|open|>argument key="city" type="string"<|sep|>'
    + QUOTED
    + '<|close|>argument<|sep|><|open|>argument key="days" type="number"<|sep|>3<|close|>argument<|sep|><|open|>argument '
    'key="tags" type="array"<|sep|>["a", "</b>"]<|close|>argument<|sep|><|close|>call<|sep|><|open|>call tool="f2" '
    'index="2"<|sep|><|open|>argument key="city" type="string"<|sep|>x<|close|>argument<|sep|><|close|>call<|sep|>'
    "<|close|>tools<|sep|><|close|>message<|sep|><|end_of_msg|>"
)

_M3 = (
    (
        f'<invoke name="get_weather"><city>{QUOTED}</city><days>3</days><tags><item>a</item><item>//b></item></tags></invoke>\n'
        '<invoke name="f2"><city>x</city><on>true</on></invoke>\n'
    )
    .replace("<", "]<]minimax[>[<")
    .replace("//b>", "</b>")
)

SAMPLES: tuple[Sample, ...] = (
    Sample("json", f"{_A}", ONE),
    Sample("json", f"Here:\n```json\n{_A}\n```", ONE, "Here:"),
    Sample("json", "◁think▷Hm.◁/think▷Ok.", [], "Ok.", "Hm.", "kimi_vl"),
    Sample("json", f"[{_A}, {_B}]", TWO),
    Sample("json", '{"name": "Ann", "age": 3}', [], '{"name": "Ann", "age": 3}'),
    Sample("json", '```json\n{"name": "Ann"}\n```\n', [], '```json\n{"name": "Ann"}\n```\n'),
    Sample("hermes", f"<tool_call>\n{_A}\n</tool_call>\n<tool_call>\n{_B}\n</tool_call>", TWO),
    Sample(
        "hermes",
        f"<think>\nUse <tool_call> or `</think>`?\n</think>\n\nLet me see.\n\n<tool_call>\n{_A}\n</tool_call>",
        ONE,
        "Let me see.",
        "Use <tool_call> or `</think>`?",
    ),
    Sample(
        "hermes",
        'Say `<tool_call>` or\n```\n<tool_call>\n{"name": "now"}\n```\nso.\n',
        [],
        'Say `<tool_call>` or\n```\n<tool_call>\n{"name": "now"}\n```\nso.\n',
    ),
    Sample("hermes", '<tool_call>{"arguments": {}, "name": "now"}</tool_call>', [("now", {})]),
    Sample(
        "hermes",
        '<tool_call>{"name": "python", "arguments": {"code": "</tool_call> \\u00e9 \\\\ {"}}</tool_call>\nDone.',
        [("python", {"code": "</tool_call> é \\ {"})],
        "Done.",
    ),
    Sample("hermes", '<tool_call>{"name": "f2", "arguments": "{\\"city\\": \\"x\\"}"}</tool_call>', TWO[1:]),
    Sample("hermes", '<tool_call>{"name": "now", "arguments": {}}', [("now", {})]),
    Sample("hermes", f"```json\n{_A}\n```\n", ONE),
    Sample(
        "hermes",
        '```json\n{"name": "unknown", "arguments": {}}\n```',
        [],
        '```json\n{"name": "unknown", "arguments": {}}\n```',
    ),
    Sample("hermes", "<tool_call>", [], "<tool_call>"),
    Sample("hermes", 'Not <tool_call> {"a": 1}', [], 'Not <tool_call> {"a": 1}'),
    Sample(
        "hermes",
        "<tool_call>{'name': 'f2', 'arguments': {'city': 'x', 'on': True,}}</tool_call>",
        [("f2", {"city": "x", "on": True})],
    ),
    Sample("qwen3_coder", _QWEN, TWO),
    Sample("qwen3_coder", f"I think.</think>\n\n{_QWEN}", TWO, "", "I think.", prefilled=True),
    Sample("qwen3_coder", _QWEN.removeprefix("<tool_call>\n"), TWO),
    Sample(
        "qwen3_coder",
        "<tool_call>\n<function=python>\n<parameter=code>\n\nx = '</parameter>'\n</function>\n\n</parameter>\n</function>"
        "\n</tool_call>",
        [("python", {"code": "\nx = '</parameter>'\n</function>\n"})],
    ),
    Sample("qwen3_coder", "<tool_call>\n<function=now>\n</function>\n</tool_call>\nOk", [("now", {})], "Ok"),
    Sample(
        "qwen3_coder",
        "<tool_call>\n<function=f2>\n<parameter=on>\nTrue\n<parameter=city>\nx\n</function>\n</tool_call>",
        [("f2", {"on": True, "city": "x"})],
    ),
    Sample(
        "seed_oss",
        f"<seed:think>Hm.</seed:think>{_QWEN}".replace("tool_call>", "seed:tool_call>").replace(
            "</seed:tool", "</seed:tool"
        ),
        TWO,
        "",
        "Hm.",
        "seed_oss",
    ),
    Sample("glm45", f"\n<think>Hm.</think>\n{_GLM}", TWO, "", "Hm."),
    Sample("glm45", _GLM.replace("\n", ""), TWO),
    Sample("glm45", "<tool_call>now</tool_call>", [("now", {})]),
    Sample(
        "mistral",
        f'[TOOL_CALLS][{_A[:-1]}, "id": "call00001"}}, {_B[:-1]}, "id": "call00002"}}]',
        TWO,
        reasoning="mistral",
    ),
    Sample(
        "mistral_v11",
        f"[TOOL_CALLS]get_weather[CALL_ID]call00001[ARGS]{ARGS}[TOOL_CALLS]f2[CALL_ID]call00002[ARGS]{SMALL}",
        TWO,
        reasoning="mistral",
        ids=("call00001", "call00002"),
    ),
    Sample(
        "mistral_v13",
        f"[THINK]Hm.[/THINK]Ok.[TOOL_CALLS]get_weather[ARGS]{ARGS}[TOOL_CALLS]f2{SMALL}",
        TWO,
        "Ok.",
        "Hm.",
        "mistral",
    ),
    Sample("llama3_json", _json(key="parameters")[0], ONE),
    Sample("llama3_json", "<|python_tag|>" + "; ".join(_json(key="parameters")), TWO),
    Sample("llama3_json", f"<function=get_weather>{ARGS}</function>", ONE),
    Sample("llama4_json", f"<|python_start|>Ok.<|python_end|>{_json(key='parameters')[0]}", ONE, "Ok."),
    Sample("llama4_json", _json(key="parameters")[0], ONE),
    Sample("functionary_v31", f"<function=get_weather>{ARGS}</function><function=f2>{SMALL}</function>", TWO),
    Sample("functionary_v32", f"all\nHello.\n>>>get_weather\n{ARGS}>>>f2\n{SMALL}", TWO, "Hello."),
    Sample("functionary_v32", "python\nprint('>')", [("python", {"code": "print('>')"})]),
    Sample("pythonic", f"[{_PYTHON}, f2(city='x')]", TWO),
    Sample("pythonic", f"<|python_start|>[{_PYTHON}, f2(city='x')]<|python_end|>", TWO),
    Sample("pythonic", "[see](there)", [], "[see](there)"),
    Sample("pythonic", '[f2("x", on=true), now()]', [("f2", {"city": "x", "on": True}), ("now", {})]),
    Sample("olmo3", f"<function_calls>{_PYTHON}\nf2(city='x')</function_calls>", TWO),
    Sample("lfm2", f"Ok.<|tool_call_start|>[{_PYTHON}, f2(city='x')]<|tool_call_end|>Fine.", TWO, "Ok.\nFine."),
    Sample(
        "deepseek_v3",
        "Hm.\n</think>\n\n<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
        f"{ARGS}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>f2\n```json\n{SMALL}\n```"
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        TWO,
        "",
        "Hm.",
        prefilled=True,
    ),
    Sample(
        "deepseek_v31",
        f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{ARGS}<｜tool▁call▁end｜><｜tool▁call▁begin｜>"
        f"f2<｜tool▁sep｜>{SMALL}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        TWO,
    ),
    Sample("deepseek_v32", "\n\n" + _DSML.format("function_calls"), TWO),
    Sample("deepseek_v4", _DSML.format("tool_calls"), TWO),
    Sample("phi4_mini_json", f"functools[{_A}, {_B}]", TWO),
    Sample("phi4_mini_json", "Use functools here.", [], "Use functools here."),
    Sample(
        "functiongemma",
        "<start_function_call>" + _GEMMA.format("<escape>") + "<end_function_call><start_function_call>call:f2{city:"
        "<escape>x<escape>}<end_function_call>",
        TWO,
    ),
    Sample(
        "gemma4",
        "<|channel>thought\nHm.<channel|><|tool_call>"
        + _GEMMA.format('<|"|>')
        + '<tool_call|><|tool_call>call:f2{city:<|"|>x<|"|>}<tool_call|>',
        TWO,
        "",
        "Hm.",
        "gemma4",
    ),
    Sample("granite", f"<|tool_call|> [{_A}, {_B}]", TWO),
    Sample("granite_20b", f"<function_call> {_A}\n<function_call> {_B}", TWO),
    Sample(
        "kimi_k2",
        "<think>Hm.</think>Ok.<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0"
        f"<|tool_call_argument_begin|>{ARGS}<|tool_call_end|><|tool_call_begin|>functions.f2:1<|tool_call_argument_begin|>"
        f"{SMALL}<|tool_call_end|><|tool_calls_section_end|>",
        TWO,
        "Ok.",
        "Hm.",
        ids=("functions.get_weather:0", "functions.f2:1"),
    ),
    Sample(
        "kimi_k3",
        f"Hm.<|close|>think<|sep|><|open|>response<|sep|>Ok.<|close|>response<|sep|>{_K3}",
        TWO,
        "Ok.",
        "Hm.",
        "kimi_k3",
        prefilled=True,
    ),
    Sample(
        "minimax_m2",
        f"Hm.\n</think>\n\n\n<minimax:tool_call>\n{_invokes('')}</minimax:tool_call>",
        TWO,
        "",
        "Hm.",
        prefilled=True,
    ),
    Sample(
        "openai",
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather "
        f"<|constrain|>json<|message|>{ARGS}<|call|>",
        ONE,
        "",
        "Hm.",
        "openai",
    ),
    Sample(
        "openai",
        f"<|channel|>commentary<|message|>Ok.<|end|><|start|>assistant to=functions.f2<|channel|>commentary json<|message|>"
        f"{SMALL}<|call|>",
        TWO[1:],
        "Ok.",
        reasoning="openai",
    ),
    Sample("openai", "<|channel|>final<|message|>Hello, 2 < 3!", [], "Hello, 2 < 3!", reasoning="openai"),
    Sample(
        "cohere",
        'Hm.<|END_THINKING|><|START_ACTION|>[\n    {"tool_call_id": "0", "tool_name": "get_weather", "parameters": '
        f'{ARGS}}},\n    {{"tool_call_id": "1", "tool_name": "f2", "parameters": {SMALL}}}\n]<|END_ACTION|>',
        TWO,
        "",
        "Hm.",
        "cohere",
        prefilled=True,
        ids=("0", "1"),
    ),
    Sample(
        "command_r_plus",
        f'Action:\n```json\n[\n    {{"tool_name": "get_weather", "parameters": {ARGS}}},\n    {{"tool_name": "f2", '
        f'"parameters": {SMALL}}}\n]\n```',
        TWO,
    ),
    Sample("tool_calls_json", f"<tool_calls>[{_A}, {_B}]</tool_calls>", TWO),
    Sample("tool_calls_json", f"<tool_calls>\n{_A}\n{_B}\n</tool_calls>", TWO),
    Sample("nemotron_nano", f"<TOOLCALL>[{_A}, {_B}]</TOOLCALL>", TWO),
    Sample(
        "apertus",
        f'<|tools_prefix|>[{{"get_weather": {ARGS}}}, {{"f2": {SMALL}}}]<|tools_suffix|>',
        TWO,
        reasoning="apertus",
    ),
    Sample("internlm", f"Ok.<|action_start|><|plugin|>\n{_json(key='parameters')[0]}<|action_end|>", ONE, "Ok."),
    Sample("gigachat3", f"<|function_call|>{_A}<|message_sep|>\n\n", ONE),
    Sample("longcat", f"<longcat_tool_call>\n{_A}\n</longcat_tool_call>", ONE),
    Sample(
        "minicpm5",
        f'<function name="get_weather"><param name="city">{QUOTED}</param><param name="days">3</param><param name="tags">'
        "['a', '</b>']</param></function>\n<function name=\"f2\"><param name=\"city\">x</param></function>",
        TWO,
    ),
    Sample(
        "minicpm5",
        '<function name="f2"><param name="city"><![CDATA[</param></function>\n]]]></param><param name="on">no</param></function>',
        [("f2", {"city": "</param></function>\n]", "on": False})],
    ),
    Sample("lfm2", "<|tool_call_start|>[f2(city='a\nb \\d')]<|tool_call_end|>", [("f2", {"city": "a\nb \\d"})]),
    Sample(
        "step3",
        "<｜tool_calls_begin｜><｜tool_call_begin｜>function<｜tool_sep｜>"
        + _invokes("steptml:").replace("\n", "")
        + "<｜tool_call_end｜><｜tool_calls_end｜>",
        TWO,
    ),
    Sample(
        "llama3_json", '<|python_tag|>get_weather.call(city="x", days=2)', [("get_weather", {"city": "x", "days": 2})]
    ),
    Sample("llama3_json", "<|python_tag|>\nprint(f2('x'))\n", [("python", {"code": "print(f2('x'))\n"})]),
    Sample("llama3_json", "<|python_tag|>", [], "<|python_tag|>"),
    Sample("functionary_v31", "<|python_tag|>x = 1", [("python", {"code": "x = 1"})]),
    Sample("gigachat3", f"Ok.<|message_sep|>\n\nfunction call<|role_sep|>\n{_A}<|message_sep|>\n\n", ONE, "Ok."),
    Sample(
        "hunyuan_v3",
        "Hm.</think:opensource>Ok.<tool_calls:opensource>\n<tool_call:opensource>get_weather<tool_sep:opensource>\n<arg_key:"
        f"opensource>city</arg_key:opensource>\n<arg_value:opensource>{QUOTED}</arg_value:opensource>\n<arg_key:opensource>"
        "days</arg_key:opensource>\n<arg_value:opensource>3</arg_value:opensource>\n<arg_key:opensource>tags</arg_key:"
        'opensource>\n<arg_value:opensource>["a", "</b>"]</arg_value:opensource>\n</tool_call:opensource>\n<tool_call:'
        "opensource>f2<tool_sep:opensource>\n<arg_key:opensource>city</arg_key:opensource>\n<arg_value:opensource>x"
        "</arg_value:opensource>\n</tool_call:opensource>\n</tool_calls:opensource>",
        TWO,
        "Ok.",
        "Hm.",
        "hunyuan_v3",
        prefilled=True,
    ),
    Sample("hunyuan_v3", "<tool_calls>\n<tool_call>now<tool_sep>\n</tool_call>\n</tool_calls>", [("now", {})]),
    Sample(
        "muse",
        " to=self<|message|>Hm.<|eom|><|start|>assistant to=get_weather<|message|><atem:function_calls>\n"
        f"{_invokes('atem:').split('<atem:invoke name=' + chr(34) + 'f2')[0]}</atem:function_calls><|eom|><|start|>assistant "
        'to=f2<|message|><atem:function_calls>\n<atem:invoke name="f2">\n<atem:parameter name="city">x</atem:parameter>\n'
        "</atem:invoke>\n</atem:function_calls><|eot|>",
        TWO,
        "",
        "Hm.",
        "muse",
    ),
    Sample("muse", " to=user<|message|>2 < 3<|eot|>", [], "2 < 3", reasoning="muse"),
    Sample("muse", " to=f2<|message|>What?<|eot|>", [], "What?", reasoning="muse"),
    Sample(
        "minimax_m3",
        "<mm:think>Hm.</mm:think>\nOk.]<]minimax[>[<tool_call>\n" + _M3 + "]<]minimax[>[</tool_call>",
        [("get_weather", {"city": QUOTED, "days": 3, "tags": ["a", "</b>"]}), ("f2", {"city": "x", "on": True})],
        "Ok.",
        "Hm.",
        "minimax_m3",
    ),
    Sample(
        "minimax_m3",
        "]<]minimax[>[<tool_call>"
        + '<invoke name="g"><a><b>1</b><c></c></a><d><item><e>x</e></item><item><e>2.5</e></item></d></invoke>'.replace(
            "<", "]<]minimax[>[<"
        ).replace("]]<", "]<"),
        [("g", {"a": {"b": 1, "c": ""}, "d": [{"e": "x"}, {"e": 2.5}]})],
    ),
    Sample(
        "tool_calls_json",
        f"Hm.\n[BEGIN FINAL RESPONSE]\nOk.\n[END FINAL RESPONSE]\n<tool_calls>[{_A}, {_B}]</tool_calls>",
        TWO,
        "Ok.",
        "Hm.",
        "apriel",
        prefilled=True,
    ),
    Sample(
        "tool_calls_json",
        f"<think>\nHm.\n</think>\n<answer>\nOk.\n</answer>\n<tool_calls>\n{_A}\n</tool_calls>",
        ONE,
        "Ok.",
        "Hm.",
        "think_answer",
    ),
    Sample("hermes", "Hm.\n</think>\n\n<response>\nOk.</response>", [], "Ok.", "Hm.", "think_response", prefilled=True),
    Sample(
        "granite",
        f"Here is my thought process:\nHm.\nHere is my response:\nOk.\n\n<tool_call>[{_A}, {_B}]",
        TWO,
        "Ok.",
        "Hm.",
        "granite",
    ),
    Sample(
        "solar",
        "<|think|>Hm.<|end|><|begin|>assistant<|tool_calls|><|tool_call:begin|>a1<|tool_call:name|>get_weather<|tool_call:args|>"
        f"{ARGS}<|tool_call:end|><|tool_call:begin|>b2<|tool_call:name|>f2<|tool_call:args|>{SMALL}<|tool_call:end|><|calls|>",
        TWO,
        "",
        "Hm.",
        "solar",
        ids=("a1", "b2"),
    ),
    Sample("solar", "<|think|><|end|><|begin|>assistant<|content|>Hi!<|end|>", [], "Hi!", reasoning="solar"),
    Sample(
        "solar_open2",
        f"<|tool_call:start|>get_weather\n<|tool_arg:start|>city<|tool_arg:value|>{QUOTED}<|tool_arg:end|>\n<|tool_arg:start|>"
        'days<|tool_arg:value|>3<|tool_arg:end|>\n<|tool_arg:start|>tags<|tool_arg:value|>["a", "</b>"]<|tool_arg:end|>\n'
        "<|tool_call:end|><|tool_call:start|>f2\n<|tool_arg:start|>city<|tool_arg:value|>x<|tool_arg:end|>\n<|tool_call:end|>",
        TWO,
    ),
    Sample("dots", f"<dots_function_call>\n{_invokes('')}</dots_function_call>", TWO),
    Sample(
        "inkling",
        "<|content_thinking|>Hm.<|end_message|><|message_model|><|content_text|>Ok.<|end_message|><|message_model|>"
        f'get_weather<|content_invoke_tool_json|>{{"name": "get_weather", "args": {ARGS}}}<|end_message|><|message_model|>f2'
        f'<|content_invoke_tool_json|>{{"name": "f2", "args": {SMALL}}}<|end_message|><|content_model_end_sampling|>',
        TWO,
        "Ok.",
        "Hm.",
        "inkling",
    ),
    Sample(
        "inkling",
        "Hm.<|end_message|><|message_model|><|content_text|>2 < 3",
        [],
        "2 < 3",
        "Hm.",
        "inkling",
        prefilled=True,
    ),
    Sample(
        "inkling",
        f'<|content_invoke_tool_json|>{{"args": {SMALL}, "name": "f2"}}<|end_message|>',
        TWO[1:],
        reasoning="inkling",
    ),
    Sample("deepseek_v41", "Ok.\n\n" + _DSML41, TWO, "Ok."),
    Sample("deepseek_v41", "Hm.\n</think>" + _DSML41, TWO, "", "Hm.", prefilled=True),
    Sample(
        "k2_horizon",
        "Hm.</ifm|think>Ok.<ifm|tool_calls>\n"
        + _HORIZON.format(*[f"<ifm|arg_type>{one}</ifm|arg_type>\n" for one in ("string", "integer", "array")])
        + "</ifm|tool_calls>",
        TWO,
        "Ok.",
        "Hm.",
        "k2_horizon",
        prefilled=True,
    ),
    Sample(
        "k2_horizon", "<ifm|think_fast>Hm.</ifm|think_fast>" + _HORIZON.format("", "", ""), TWO, "", "Hm.", "k2_horizon"
    ),
    Sample("k2_horizon", f"<ifm|tool_calls>\n<ifm|tool_call>{_A}</ifm|tool_call>\n</ifm|tool_calls>", ONE),
    Sample(
        "plamo3",
        "Hm.<|plamo:end_think:plamo|>Ok.<|plamo:begin_tool_requests:plamo|>"
        + _plamo("get_weather", "<|plamo:constrain|>json" + "<|plamo:msg|>" + ARGS)
        + _plamo("f2", "<|plamo:constrain|>json<|plamo:msg|>" + SMALL)
        + "<|plamo:end_tool_requests:plamo|>",
        TWO,
        "Ok.",
        "Hm.",
        "plamo3",
        prefilled=True,
    ),
)


# A text of each format that is read often: about one call, and a few words around it.
_SHORT_TEXTS = {
    "seed_oss": "Ok<seed:tool_call><function=f2><parameter=city>x</parameter></function></seed:tool_call>",
    "glm45": "Ok<tool_call>f2\n<arg_key>city</arg_key>\n<arg_value>x</arg_value>\n</tool_call>",
    "hunyuan_v3": "Ok<tool_call>f2<tool_sep>\n<arg_key>city</arg_key>\n<arg_value>x</arg_value>\n</tool_call>",
    "mistral_v11": "Ok[TOOL_CALLS]f2[CALL_ID]a[ARGS]" + SMALL,
    "mistral_v13": "Ok[TOOL_CALLS]f2[ARGS]" + SMALL,
    "deepseek_v3": f"Ok<｜tool▁call▁begin｜>function<｜tool▁sep｜>f2\n```json\n{SMALL}\n```<｜tool▁call▁end｜>",
    "deepseek_v31": f"Ok<｜tool▁call▁begin｜>f2<｜tool▁sep｜>{SMALL}<｜tool▁call▁end｜>",
    "deepseek_v32": 'Ok<｜DSML｜function_calls><｜DSML｜invoke name="f2"><｜DSML｜parameter name="city" string="true">x'
    "</｜DSML｜parameter></｜DSML｜invoke></｜DSML｜function_calls>",
    "deepseek_v4": 'Ok<｜DSML｜tool_calls><｜DSML｜invoke name="f2"><｜DSML｜parameter name="city" string="true">x'
    "</｜DSML｜parameter></｜DSML｜invoke></｜DSML｜tool_calls>",
    "inkling": "<|content_text|>Ok<|end_message|><|message_model|>f2<|content_invoke_tool_json|>"
    f'{{"name": "f2", "args": {SMALL}}}<|end_message|>',
    "deepseek_v41": 'Ok<｜DSML｜ calls><｜DSML｜ invoke name="f2"><｜DSML｜ parameter name="city" string="true">x'
    "</｜DSML｜ parameter></｜DSML｜ invoke></｜DSML｜ calls>",
    "k2_horizon": "Ok<ifm|tool_call>f2\n<ifm|arg_key>city</ifm|arg_key><ifm|arg_value>x</ifm|arg_value></ifm|tool_call>",
    "plamo3": "Ok" + _plamo("f2", "<|plamo:constrain|>json<|plamo:msg|>" + SMALL),
    "functiongemma": "Ok<start_function_call>call:f2{city:<escape>x<escape>}<end_function_call>",
    "gemma4": 'Ok<|tool_call>call:f2{city:<|"|>x<|"|>}<tool_call|>',
    "kimi_k2": f"Ok<|tool_call_begin|>functions.f2:0<|tool_call_argument_begin|>{SMALL}<|tool_call_end|>",
    "kimi_k3": 'Ok<|open|>tools<|sep|><|open|>call tool="f2"<|sep|><|open|>argument key="city"<|sep|>x<|close|>argument'
    "<|sep|><|close|>call<|sep|><|close|>tools<|sep|>",
    "minimax_m2": 'Ok<minimax:tool_call><invoke name="f2"><parameter name="city">x</parameter></invoke></minimax:tool_call>',
    "minimax_m3": 'Ok]<]minimax[>[<tool_call>]<]minimax[>[<invoke name="f2">]<]minimax[>[<city>x]<]minimax[>[</city>'
    "]<]minimax[>[</invoke>]<]minimax[>[</tool_call>",
    "dots": 'Ok<dots_function_call><invoke name="f2"><parameter name="city">x</parameter></invoke></dots_function_call>',
    "openai": f"<|channel|>final<|message|>Ok<|end|>to=functions.f2<|message|>{SMALL}<|call|>",
    "muse": ' to=user<|message|>Ok<|eom|> to=f2<|message|><atem:function_calls><atem:invoke name="f2"><atem:parameter '
    'name="city">x</atem:parameter></atem:invoke></atem:function_calls><|eot|>',
    "solar": f"Ok<|tool_call:begin|>a<|tool_call:name|>f2<|tool_call:args|>{SMALL}<|tool_call:end|>",
    "solar_open2": "Ok<|tool_call:start|>f2\n<|tool_arg:start|>city<|tool_arg:value|>x<|tool_arg:end|>\n<|tool_call:end|>",
    "cohere": 'Ok<|START_ACTION|>[{"tool_name": "f2", "parameters": {"city": "x"}}]<|END_ACTION|>',
    "command_r_plus": 'Ok\nAction:\n```json\n[{"tool_name": "f2", "parameters": {"city": "x"}}]\n```',
    "apertus": f'Ok<|tools_prefix|>[{{"f2": {SMALL}}}]<|tools_suffix|>',
    "step3": 'Ok<｜tool_call_begin｜>function<｜tool_sep｜><steptml:invoke name="f2"><steptml:parameter name="city">x'
    "</steptml:parameter></steptml:invoke><｜tool_call_end｜>",
    **{
        name: f"Ok{opening}{_B}{closing}"
        for name, opening, closing in (
            ("hermes", "<tool_call>", "</tool_call>"),
            ("mistral", "[TOOL_CALLS][", "]"),
            ("phi4_mini_json", "functools[", "]"),
            ("granite", "<|tool_call|>[", "]"),
            ("granite_20b", "<function_call>", ""),
            ("tool_calls_json", "<tool_calls>[", "]</tool_calls>"),
            ("nemotron_nano", "<TOOLCALL>[", "]</TOOLCALL>"),
            ("internlm", "<|action_start|><|plugin|>", "<|action_end|>"),
            ("gigachat3", "<|function_call|>", "<|message_sep|>"),
            ("longcat", "<longcat_tool_call>", "</longcat_tool_call>"),
            ("llama4_json", "<|python_tag|>", ""),
        )
    },
    "qwen3_coder": "Ok<tool_call><function=f2><parameter=city>x</parameter></function></tool_call>",
    "functionary_v31": f"Ok<function=f2>{SMALL}</function>",
    "functionary_v32": f"all\nOk>>>f2\n{SMALL}",
    "olmo3": "Ok<function_calls>f2(city='x')</function_calls>",
    "lfm2": "Ok<|tool_call_start|>[f2(city='x')]<|tool_call_end|>",
    "minicpm5": 'Ok<function name="f2"><param name="city">x</param></function>',
}
SHORT: tuple[Sample, ...] = (
    *(Sample(name, text, TWO[1:], "Ok") for name, text in _SHORT_TEXTS.items()),
    Sample("json", _B, TWO[1:]),
    Sample("llama3_json", _json(key="parameters")[1], TWO[1:]),
    Sample("pythonic", "[f2(city='x')]", TWO[1:]),
)


def read(sample: Sample, pieces: Iterable[str], whole: bool = True) -> Parsed:
    engine = parser(sample.tools, TOOLS, sample.reasoning, in_reasoning=sample.prefilled)
    return parse(engine, pieces, whole)


def cut(text: str, places: Iterable[int]) -> list[str]:
    """The text in pieces that end at these places."""
    ends = sorted(places)
    return [text[start:end] for start, end in zip([0, *ends], [*ends, len(text)])]


def chunked(sample: Sample, times: int) -> str:
    """What goes wrong in random chunkings of a sample; "" where nothing does."""
    text = sample.text
    expected = read(sample, [text])
    if (expected.content, expected.values) != (sample.content, sample.calls):
        return f"{sample.tools}: {expected}"
    rng = random.Random(sample.tools)
    for _ in range(times):
        places = [rng.randrange(len(text) + 1) for _ in range(rng.randrange(1, 5))]
        if read(sample, cut(text, places)) != expected:
            return f"{sample.tools}, cut at {places}: {read(sample, cut(text, places))}"
    return ""
