# SPDX-License-Identifier: MIT
"""ChatTemplate: what transformers renders, and what hostile templates lead to."""

from __future__ import annotations

import copy
import json
import resource
import time
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from candle_vllm.core.errors import ChatTemplateError, InvalidParameterError, UnsupportedModelError
from candle_vllm.core.setting_kinds import MAX_TEMPLATE
from candle_vllm.core.text import template_limits
from candle_vllm.core.text.chat_template import ChatTemplate
from tests.common_run import few

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
HELLO = [{"role": "user", "content": "Hello"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather <now> & \u00e9",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "c"}, "n": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"id": "call00001", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "P", "n": 3}}}
    ],
}
RESULT = {"role": "tool", "tool_call_id": "call00001", "name": "get_weather", "content": '{"t": 20}'}
CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]] | None]] = {
    "plain": (
        [*HELLO, {"role": "assistant", "content": "Hi", "name": None}, {"role": "user", "content": "How?"}],
        None,
    ),
    "system": ([{"role": "system", "content": "Be brief."}, *HELLO], None),
    "tools": (HELLO, [TOOL]),
    "calls": ([*HELLO, CALL, RESULT, {"role": "user", "content": "Thanks"}], [TOOL]),
    "reasoning": ([*HELLO, {"role": "assistant", "reasoning": "Hm.", "content": "Hi"}, *HELLO], None),
}


def render(source: str, **kwargs: Any) -> str:
    return ChatTemplate(source, SPECIAL).render(HELLO, **kwargs)


def by_transformers(source: str, messages: list[dict[str, Any]], **kwargs: Any) -> str | None:
    """What transformers renders, or None where it cannot."""
    messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
    try:
        return render_jinja_template([messages], chat_template=source, **SPECIAL, **kwargs)[0][0]
    except Exception:
        return None


@pytest.fixture(scope="module")
def real_templates(llama_cpp_models: Path) -> dict[str, ChatTemplate]:
    """By the model's name."""
    paths = sorted((llama_cpp_models / "templates").glob("*.jinja"))
    return {path.stem: ChatTemplate(path.read_text("utf-8"), SPECIAL) for path in paths}


@pytest.mark.parametrize("part", few(range(3), 0))
def test_real_templates_render_as_in_transformers(real_templates: dict[str, ChatTemplate], part: int) -> None:
    assert len(real_templates) >= 65
    compared = 0
    for model, template in list(real_templates.items())[part::3]:
        for name, (messages, tools) in CONVERSATIONS.items():
            for prompt in (True, False):
                expected = by_transformers(template.source, messages, tools=tools, add_generation_prompt=prompt)
                if expected is not None:
                    before = copy.deepcopy(messages)
                    got = template.render(messages, tools=tools, add_generation_prompt=prompt)
                    assert got == expected, (model, name)
                    assert messages == before
                    compared += 1
    assert compared >= 200


def test_real_templates_that_take_tools_say_so(real_templates: dict[str, ChatTemplate]) -> None:
    said = {model: template.supports_tools for model, template in real_templates.items()}
    assert said["Qwen-Qwen3-0.6B"]
    assert said["meta-llama-Llama-3.1-8B-Instruct"]
    assert not said["microsoft-Phi-3.5-mini-instruct"]


@pytest.mark.parametrize("content", ["The sky ", "The sky", [{"type": "text", "text": "The sky "}]])
@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{{ m.content if m.content is string else m.content[0].text }}</>{% endfor %}",
        "{% for m in messages %}{{ (m.content if m.content is string else m.content[0].text) | trim }}|{% endfor %}",
    ],
)
def test_the_last_message_is_left_open(source: str, content: Any) -> None:
    messages = [*HELLO, {"role": "assistant", "content": content}]
    got = ChatTemplate(source, SPECIAL).render(messages, add_generation_prompt=False, continue_final_message=True)
    assert got == by_transformers(source, messages, continue_final_message=True)
    assert "The sky" in got
    assert not got.endswith(("</>", "|"))


def test_what_cannot_be_continued() -> None:
    messages = [*HELLO, {"role": "assistant", "content": "x"}]
    flags: dict[str, Any] = {"add_generation_prompt": False, "continue_final_message": True}
    with pytest.raises(InvalidParameterError, match="exclude each other"):
        ChatTemplate("{{ messages }}", {}).render(messages, continue_final_message=True)
    with pytest.raises(ChatTemplateError, match="does not write the last message"):
        ChatTemplate("{{ messages[0].content }}", {}).render(messages, **flags)
    with pytest.raises(ChatTemplateError, match="last message with text"):
        ChatTemplate("{{ messages[0].content }}", {}).render([{"role": "assistant"}], **flags)


def test_named_templates() -> None:
    template = ChatTemplate({"default": "D", "tool_use": "T", "rag": "R{{ documents[0].text }}"}, {})
    assert template.supports_tools
    assert template.render(HELLO) == "D"
    assert template.render(HELLO, tools=[TOOL]) == "T"
    assert template.render(HELLO, documents=[{"title": "t", "text": "x"}]) == "Rx"
    with pytest.raises(ChatTemplateError, match="rag"):
        ChatTemplate({"rag": "R"}, {}).render(HELLO)
    assert not ChatTemplate("{{ messages }}", {}).supports_tools
    assert ChatTemplate("{% if tools %}x{% endif %}", {}).supports_tools


def test_helpers_of_transformers() -> None:
    data = {"b": "<\u00e9>", "a": [1, None]}
    assert render("{{ d | tojson }}", d=data) == json.dumps(data, ensure_ascii=False)
    sorted_json = json.dumps(data, sort_keys=True, indent=2, separators=(",", ":"))
    assert render("{{ d | tojson(true, 2, (',', ':'), true) }}", d=data) == sorted_json
    assert render("{% generation %}{{ 'x' }}{% endgeneration %}") == "x"
    assert render("{% for i in range(9) %}{% if i > 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "012"
    assert render("{{ bos_token }}{{ x }}", x=3, bos_token="<b>") == "<b>3"
    assert render("{{ strftime_now('%Y') }}") == time.strftime("%Y")
    assert render("  {% if true %}\n  x\n{% endif %}\ny") == "  x\ny"
    assert render("{% set n = namespace(a=1) %}{% set n.a = n.a + 1 %}{{ n.a }}{{ dict(b=2) }}") == "2{'b': 2}"
    assert render("{{ 'abc'[1:] ~ [1, 2, 3][:2] ~ '%s-%03d' % ('x', 5) ~ '{:>3}'.format('y') }}") == "bc[1, 2]x-005  y"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ nothing.here }}", "'nothing' is undefined"),
        ("{{ 1 + 'a' }}", "TypeError"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% include 'x' %}", "loader"),
        ("{{ [].append(1) }}", "unsafe"),
        ("{{ messages.clear() }}", "unsafe"),
        ("{% set n = namespace(_a=1) %}", "'_a'"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
    ],
)
def test_failures_say_why(source: str, reason: str) -> None:
    with pytest.raises(ChatTemplateError, match=reason):
        render(source)


@pytest.mark.parametrize(
    "source",
    [
        "{% for %}",
        "{{ x",
        "{{ 'a' | no_such_filter }}",
        "x" * (MAX_TEMPLATE + 1),
        "{{ " + "(" * 5000 + ")" * 5000 + " }}",
    ],
    ids=["tag", "brace", "filter", "long", "deep"],
)
def test_broken_templates_are_refused_at_once(source: str) -> None:
    with pytest.raises(UnsupportedModelError, match="chat template"):
        ChatTemplate(source, {})


def test_wrong_messages() -> None:
    template = ChatTemplate("{{ messages }}", {})
    deep: Any = "x"
    for _ in range(100):
        deep = [deep]
    wrong: Any
    for wrong in ([], ["x"], [{"role": "user", "content": object()}], [{"role": "user", "content": deep}]):
        with pytest.raises(InvalidParameterError):
            template.render(wrong)
    with pytest.raises(InvalidParameterError):
        template.render(HELLO, tools=["x"])  # type: ignore[list-item]


GROW = "{% set n = namespace(s='a', l=['a']) %}{% for i in range(100) %}"
BOMBS = {
    "repeat": "{{ 'a' * 10**9 }}",
    "list": "{{ ([0] * 10**9) | length }}",
    "tilde": GROW + "{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
    "plus": GROW + "{% set n.s = n.s + n.s %}{% endfor %}{{ n.s }}",
    "list plus": GROW + "{% set n.l = n.l + n.l %}{% endfor %}{{ n.l | length }}",
    "block": GROW + "{% set n.s %}{{ n.s }}{{ n.s }}{% endset %}{% endfor %}{{ n.s }}",
    "nested lists": GROW + "{% set n.l = [n.l, n.l] %}{% endfor %}{{ n.l }}",
    "nested lists as JSON": GROW + "{% set n.l = [n.l, n.l] %}{% endfor %}{{ n.l | tojson }}",
    "nested lists joined": GROW + "{% set n.l = [n.l, n.l] %}{% endfor %}{{ n.l | join }}",
    "slices": "{% set n = namespace(l=[]) %}{% set s = 'a' * 10000000 %}{% for i in range(9999) %}"
    "{% set n.l = n.l + [s[i:]] %}{% endfor %}",
    "fixed text": "{% set s %}{% for i in range(100000) %}" + "x" * 100_000 + "{% endfor %}{% endset %}",
    "center": "{{ 'a'.center(10**9) }}",
    "constant center": "{{ 'a' | center(1000000000) }}",
    "filter block": "{% filter center(1000000000) %}a{% endfilter %}",
    "zfill": "{{ '1'.zfill(1000000000) }}",
    "format": "{{ '{:1000000000}'.format('a') }}",
    "format width": "{{ '{:{}}'.format('a', 1000000000) }}",
    "format many": "{% set f = '{:9999}' * 100000 %}{{ f.format(*range(100000)) }}",
    "percent": "{{ '%1000000000d' % 1 }}",
    "percent star": "{{ '%*d' % (1000000000, 1) }}",
    "percent precision": "{{ '%.1000000000f' % 1.5 }}",
    "format filter": "{{ '%1000000000d' | format(1) }}",
    "mapped format": "{{ ['%1000000000d'] | map('format', 1) | list }}",
    "range": "{% for i in range(10**12) %}x{% endfor %}",
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "filtered loops": "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
    "macros": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "callers": "{% macro m() %}{{ caller() }}{{ caller() }}{% endmacro %}"
    + "{% call m() %}" * 40 + "xxxx" + "{% endcall %}" * 40,
    "replace": "{{ ('a' * 1000000) | replace('a', 'b' * 1000) | length }}",
    "replace named": "{{ ('a' * 1000000) | replace(new='b' * 1000, old='a') | length }}",
    "replace method": "{{ ('a' * 1000000).replace('', 'b' * 1000) | length }}",
    "join": "{{ range(100000) | join('x' * 10000) | length }}",
    "join method": "{{ ('x' * 10000).join('a' * 100000) | length }}",
    "power": "{{ 10 ** 1000000000 }}",
    "squares": "{% set n = namespace(n=3) %}{% for i in range(99) %}{% set n.n = n.n * n.n %}{% endfor %}{{ n.n }}",
    "int": "{{ ('f' * 4000000) | int(base=16) // ('f' * 2000001) | int(0, 16) }}",
    "JSON indent": "{{ [1] | tojson(indent=1000000000) }}",
    "indent": "{{ ('\\n' * 1000000) | indent(1000) | length }}",
    "indent text": "{{ ('\\n' * 1000000) | indent(width='x' * 1000) | length }}",
    "batch": "{{ [1] | batch(1000000000, 'x') | list | length }}",
    "slice": "{{ [1] | slice(1000000000) | list | length }}",
    "batch by name": "{{ [1] | batch(fill_with='x', linecount=100000000) | list | length }}",
    "round": "{{ 1 | round(-1000000000) }}",
    "round by name": "{{ 1 | round(method='floor', precision=10000000) }}",
    "sum": "{{ ([[1] * 1000] * 100000) | sum(start=[]) | length }}",
    "sort": "{{ (range(100000) | map('string') | list * 20) | sort | length }}",
    "title": "{{ ('a ' * 5000000) | title | length }}",
    "lipsum": "{{ lipsum(n=100000000) }}",
    "strftime": "{{ strftime_now('%999999999d') }}",
    "translate": "{{ ('a' * 1000000).translate({97: 'b' * 10000}) }}",
    "expandtabs": "{{ '\\t'.expandtabs(1000000000) }}",
    "to_bytes": "{{ (1).to_bytes(1000000000, 'big') }}",
    "strip": "{{ ('a' * 10000000).strip('b' * 1000000 + 'a') }}",
    "rfind": "{{ ('a' * 10000000).rfind('b' + 'a' * 1000000) }}",
    "rsplit by name": "{{ ('a' * 2000000).rsplit(maxsplit=1, sep='ab' + 'a' * 1000000) | length }}",
}  # fmt: skip


@pytest.mark.one_of_each(12)
@pytest.mark.parametrize("name", BOMBS)
def test_bombs_end_soon_and_small(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name != "loops":  # which takes what is given in earnest
        monkeypatch.setattr(template_limits, "MAX_SECONDS", 0.2)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.thread_time()
    with pytest.raises(ChatTemplateError):
        render(BOMBS[name])
    assert time.thread_time() - start < 2.5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 700 << 10  # KiB


def test_a_text_may_be_truncated_to_any_length() -> None:
    assert render("{{ ('ab ' * 20000) | truncate(30000, true) | length }}") == "30000"


def test_a_long_conversation_is_within_the_limits() -> None:
    source = (
        "{% set n = namespace(count=0) %}{% for m in messages %}{% set n.count = n.count + 1 %}"
        "<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}{{ n.count }}"
    )
    messages = [{"role": "user", "content": "\u4e16\u754c hello " * 500}] * 1000
    assert ChatTemplate(source, {}).render(messages).endswith("1000")


@pytest.mark.parametrize(
    ("source", "limit", "unit"),
    [
        ("{% for i in range(99999) %}{{ i }}{% endfor %}" * 2, "MAX_SECONDS", "s of processor time"),
        ("{% for i in range(9999) %}{% set x = 'x' * 1000 %}{% endfor %}.", "MAX_WORK", "MiB of text"),
    ],
)
def test_longer_conversations_and_more_tools_may_take_more(
    source: str, limit: str, unit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template_limits, limit, 0)
    template, one, tool = ChatTemplate(source, {}), {"role": "user", "content": "x"}, {"type": "function"}
    for messages, tools in ([one], None), ([one] * 2, [tool] * 1), ([one], []):
        with pytest.raises(ChatTemplateError, match=f"{unit}; shorten the conversation, or begin a new one"):
            template.render(messages, tools=tools)
    for messages, tools in ([one] * 400, None), ([one] * 40, [tool] * 360):
        assert template.render(messages, tools=tools)
    monkeypatch.setattr(template_limits, "MOST_EACH", 3)
    with pytest.raises(ChatTemplateError, match=unit):
        template.render([one] * 400)


def test_every_operand_of_a_tilde_counts_as_wide_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text of 400,000 characters beyond ASCII takes up to 1.6 MB, wherever it stands in `a ~ b ~ c`."""
    monkeypatch.setattr(template_limits, "MAX_WORK", 1 << 20)
    monkeypatch.setattr(template_limits, "WORK_EACH", 0)
    message = {"role": "user", "content": "\u4e16" * 400_000}
    for source in ("c ~ '' ~ ''", "'' ~ '' ~ c"):
        template = ChatTemplate("{% set c = messages[0].content %}{% set x = " + source + " %}.", {})
        with pytest.raises(ChatTemplateError, match="MiB of text"):
            template.render([message])


def test_documents_that_a_template_would_drop_are_refused() -> None:
    messages, documents = [{"role": "user", "content": "hi"}], [{"title": "a", "text": "b"}]
    plain = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}", {})
    with pytest.raises(ChatTemplateError, match="does not read documents"):
        plain.render(messages, documents=documents)
    assert plain.render(messages, documents=[]) == "hi"
    reading = ChatTemplate("{% for d in documents %}{{ d.text }}{% endfor %}", {})
    assert reading.render(messages, documents=documents) == "b"
