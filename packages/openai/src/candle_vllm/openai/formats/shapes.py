# SPDX-License-Identifier: MIT
"""Formats of calls for the tables of formats and `elsewhere`, and marks that rows share."""

from __future__ import annotations

import dataclasses

from candle_vllm.openai.formats.channels import Harmony
from candle_vllm.openai.formats.json_calls import JsonCalls
from candle_vllm.openai.formats.named_calls import NamedJson
from candle_vllm.openai.formats.tagged import Tagged


def words(text: str) -> tuple[str, ...]:
    """Split a text into words, for long lists of names."""
    return tuple(text.split())


HERMES = JsonCalls(closers=("</tool_call>",))
QWEN = Tagged(
    name_open="<function=",
    name_end=">",
    key_open="<parameter=",
    key_end=">",
    value_end="</parameter>",
    call_end="</function>",
    closers=("</tool_call>",),
    newlines=True,
)
QWEN_NAMED = dataclasses.replace(QWEN, known_only=True)
MINICPM = Tagged(
    name_open='<function name="',
    name_end='">',
    key_open='<param name="',
    key_end='">',
    value_end="</param>",
    call_end="</function>",
    text_open="<![CDATA[",
    text_end="]]>",
    tight=('<functionname="', '<paramname="'),
)
MINICPM_NAMED = dataclasses.replace(MINICPM, known_only=True)


def _glm(before: str = "", behind: str = "", name_end: str = "\n", *, typed: bool = False) -> Tagged:
    """Return GLM's format, whose tags' names begin with `before` and end with `behind`."""

    def tag(name: str, slash: str = "") -> str:
        return f"<{slash}{before}{name}{behind}>"

    return Tagged(
        name_open="",
        name_end=name_end,
        key_open=tag("arg_key"),
        key_end=tag("arg_key", "/"),
        type_open=tag("arg_type") if typed else "",
        type_end=tag("arg_type", "/") if typed else "",
        value_open=tag("arg_value"),
        value_end=tag("arg_value", "/"),
        call_end=tag("tool_call", "/"),
    )


GLM = _glm()
HORIZON = _glm(before="ifm|", typed=True)
HUNYUAN = (_glm(behind=":opensource", name_end="<tool_sep:opensource>"), _glm(name_end="<tool_sep>"))
BARE_JSON = JsonCalls(known_only=True)
BARE_HERMES = JsonCalls(known_only=True, closers=("</tool_call>",))
FENCED_JSON = JsonCalls(known_only=True, closers=("```",))
NAMED_TAG = NamedJson(before_name=("<function=",), name_end=">", closers=("</function>",))
MISTRAL = (
    JsonCalls(listed=True, id_key="id", closers=("[/TOOL_CALLS]",)),
    NamedJson(name_end="[ARGS]", id_mark="[CALL_ID]"),
)
COHERE_STRAYS = ("<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|START_TEXT|>", "<|END_TEXT|>")
K3_STRAYS = ("<|open|>response<|sep|>", "<|close|>response<|sep|>", "<|close|>message<|sep|>", "<|end_of_msg|>")
SOLAR_STRAYS = ("<|begin|>assistant", "<|content|>", "<|end|>", "<|tool_calls|>", "<|calls|>")
DEEPSEEK_STRAYS = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")
DEEPSEEK = NamedJson(
    before_name=("function<｜tool▁sep｜>",), name_end="\n", fenced=True, closers=("<｜tool▁call▁end｜>",)
)
DEEPSEEK_PLAIN = NamedJson(name_end="<｜tool▁sep｜>", closers=("<｜tool▁call▁end｜>",))


def invokes(section: str, tag: str = "") -> Tagged:  # `section`: the mark after all calls
    return Tagged(
        name_open=f'<{tag}invoke name="',
        name_end='">',
        key_open=f'<{tag}parameter name="',
        key_end='">',
        value_end=f"</{tag}parameter>",
        call_end=f"</{tag}invoke>",
        closers=(section,),
    )


MUSE = Harmony(
    channel="",
    ends=("<|eom|>", "<|eot|>"),
    reasoning=("to=self",),
    people=("self", "user"),
    name_space="",
    body=invokes("</atem:function_calls>", "atem:"),
    body_open="<atem:function_calls>",
)
