# SPDX-License-Identifier: MIT
"""Real chat templates: one conversation gives one prompt through every API, whatever stands in it, and nothing of it is
refused or lost."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from candle_vllm.core.errors import RequestError
from candle_vllm.core.testing import ScriptedEngine
from candle_vllm.core.text.chat_conventions import ChatConventions
from candle_vllm.core.text.chat_template import ChatTemplate
from candle_vllm.core.text.template_needs import fit_tools
from candle_vllm.openai import OpenAIAdapter, to_json_bytes
from candle_vllm.openai.anthropic import MessagesAdapter
from candle_vllm.openai.conversation import template_messages
from candle_vllm.openai.ollama.adapter import OllamaAdapter
from candle_vllm.openai.ollama.request import ChatRequest, ollama_parser
from candle_vllm.openai.requests import parse_chat_request, read_chat
from candle_vllm.responses.api.responder import Responder
from candle_vllm.responses.conversation.chat_model import InProcessModel

NAMES = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
COMMON = (
    "openai-gpt-oss-120b", "Qwen3-Coder", "mistralai-Mistral-Nemo-Instruct-2407", "google-gemma-2-2b-it",
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use", "deepseek-ai-DeepSeek-V3.1",
    "mistralai-Ministral-3-14B-Reasoning-2512",
)  # fmt: skip
UNUSABLE = {"fireworks-ai-llama-3-firefunction-v2"}  # wants variables that nobody has
WITHOUT_TOOLS = {  # refuses them, whatever is said
    "Kimi-K2-Instruct", "Kimi-K2-Thinking", "llama-cpp-deepseek-r1",
}  # fmt: skip

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "description": "c"}, "most": {"type": "integer", "description": "m"}},
    "required": ["city"],
}
TOOLS = [{"type": "function", "function": {"name": "find_it", "description": "Finds.", "parameters": SCHEMA}}]


class Model:
    """A template behind every API; `prompt` is what it wrote last."""

    def __init__(self, file: Path) -> None:
        self.name = file.stem
        self.template = ChatTemplate(file.read_text(encoding="utf-8"), NAMES)
        self.script, self.prompt = "ok", ""
        self.engine = TemplateEngine(self)
        self.adapter = OpenAIAdapter(self.engine)

    @property
    def tools(self) -> list[dict[str, Any]]:
        return [] if self.name in WITHOUT_TOOLS else TOOLS

    async def chat(self, messages: Sequence[Mapping[str, Any]], **fields: Any) -> Any:
        return plain(await self.adapter.chat({"messages": messages, "tools": self.tools or None, **fields}))

    async def messages(self, messages: Sequence[Mapping[str, Any]], **fields: Any) -> Any:
        functions = [tool["function"] for tool in self.tools]
        tools = [{"name": f["name"], "description": f["description"], "input_schema": SCHEMA} for f in functions]
        body = {"model": "default", "max_tokens": 1 << 12, "messages": messages, "tools": tools, **fields}
        return plain(await MessagesAdapter(self.adapter).create(body))

    async def responses(self, items: Sequence[Mapping[str, Any]], **fields: Any) -> Any:
        tools = [{"type": "function", **tool["function"]} for tool in self.tools]
        answering = Responder(InProcessModel(self.adapter))
        return plain(await answering.create({"input": items, "tools": tools, "store": False, **fields}))

    async def ollama(self, messages: Sequence[Mapping[str, Any]], **fields: Any) -> Any:
        body = {"model": "m", "messages": messages, "tools": self.tools or None, "stream": False, **fields}
        return plain(await OllamaAdapter(self.adapter).chat(ollama_parser(ChatRequest)(body)))


class TemplateEngine(ScriptedEngine):
    """Renders with the model's template, and answers with its script."""

    def __init__(self, model: Model) -> None:
        super().__init__(lambda _prompt: model.script, max_model_len=1 << 17)
        source = model.template.source
        self.chat_conventions = ChatConventions(
            chat_template=source, special_tokens=self.tokenizer.special_tokens, token_names=NAMES
        )
        self.model = model

    def apply_chat_template(self, messages: Any, **options: Any) -> str:
        variables = options.pop("chat_template_kwargs", {})
        self.model.prompt = self.model.template.render(messages, **options, **variables)
        return self.model.prompt


def plain(answer: Any) -> Any:
    return json.loads(to_json_bytes(answer))


@pytest.fixture(scope="module", params=["common", pytest.param("every", marks=pytest.mark.every_case)])
def models(request: pytest.FixtureRequest, llama_cpp_models: Path) -> list[Model]:
    files = sorted((llama_cpp_models / "templates").glob("*.jinja"))
    assert len(files) > 60
    wanted = [file for file in files if file.stem not in UNUSABLE and (request.param == "every" or file.stem in COMMON)]
    assert len(wanted) >= len(COMMON)
    return list(map(Model, wanted))


class Call(NamedTuple):
    id: str
    name: str
    arguments: str


class Said(NamedTuple):
    """A message: of an assistant with thoughts and calls, of a tool with the call that it answers."""

    role: str
    text: str
    thoughts: str = ""
    calls: tuple[Call, ...] = ()
    answers: Call | None = None


def call(number: int, **arguments: Any) -> Call:
    return Call(f"callno00{number}", "find_it", json.dumps(arguments))


def result(of: Call, text: str) -> Said:
    return Said("tool", text, answers=of)


def as_chat(said: Iterable[Said]) -> list[dict[str, Any]]:
    made = []
    for one in said:
        message: dict[str, Any] = {"role": one.role, "content": one.text or None if one.calls else one.text}
        if one.thoughts:
            message["reasoning_content"] = one.thoughts
        if one.calls:
            message["tool_calls"] = [
                {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
                for c in one.calls
            ]
        if one.answers:
            message["tool_call_id"] = one.answers.id
        made.append(message)
    return made


def as_anthropic(said: Iterable[Said]) -> list[dict[str, Any]]:
    made = []
    for one in said:
        blocks: list[dict[str, Any]] = []
        if one.thoughts:
            blocks.append({"type": "thinking", "thinking": one.thoughts, "signature": "s"})
        if one.answers:
            blocks.append({"type": "tool_result", "tool_use_id": one.answers.id, "content": one.text})
        elif one.text:
            blocks.append({"type": "text", "text": one.text})
        blocks += [
            {"type": "tool_use", "id": c.id, "name": c.name, "input": json.loads(c.arguments)} for c in one.calls
        ]
        made.append({"role": "user" if one.answers else one.role, "content": blocks})
    return made


def as_items(said: Iterable[Said]) -> list[dict[str, Any]]:
    made = list[dict[str, Any]]()
    for one in said:
        if one.thoughts:
            parts = [{"type": "reasoning_text", "text": one.thoughts}]
            made.append({"type": "reasoning", "summary": [], "content": parts})
        if one.answers:
            made.append({"type": "function_call_output", "call_id": one.answers.id, "output": one.text})
        elif one.text:
            made.append({"role": one.role, "content": one.text})
        made += [
            {"type": "function_call", "call_id": c.id, "name": c.name, "arguments": c.arguments} for c in one.calls
        ]
    return made


def as_ollama(said: Iterable[Said]) -> list[dict[str, Any]]:
    made = []
    for one in said:
        message: dict[str, Any] = {"role": one.role, "content": one.text}
        if one.thoughts:
            message["thinking"] = one.thoughts
        if one.calls:
            message["tool_calls"] = [
                {"id": c.id, "function": {"name": c.name, "arguments": json.loads(c.arguments)}} for c in one.calls
            ]
        if one.answers:
            message["tool_call_id"] = one.answers.id
        made.append(message)
    return made


LISBON, PORTO = call(1, city="Lisbon"), call(2, city="Porto", most=3)
HELLO = Said("user", "Hello there.")
CONVERSATIONS: dict[str, list[Said]] = {
    "plain": [Said("system", "Be kind."), HELLO, Said("assistant", "Good day."), Said("user", "How?")],
    "calls": [
        HELLO,
        Said("assistant", "", "", (LISBON,)),
        result(LISBON, "Belem"),
        Said("assistant", "It is Belem."),
        Said("user", "Thanks."),
    ],
    "text beside calls": [
        Said("system", "Be kind."),
        HELLO,
        Said("assistant", "Let me look.", "Hm.", (LISBON,)),
        result(LISBON, "Belem"),
        Said("assistant", "And here.", "", (PORTO,)),
        result(PORTO, "Ribeira"),
        Said("assistant", "Two of them."),
        Said("user", "Thanks."),
    ],
    "several calls": [
        HELLO,
        Said("assistant", "Both.", "Where?", (LISBON, PORTO)),
        result(LISBON, "Belem"),
        result(PORTO, "Ribeira"),
    ],
    "system messages": [
        Said("system", "Be kind."),
        Said("system", "Be exact."),
        HELLO,
        Said("assistant", "Good day."),
        Said("system", "Be brief."),
        Said("user", "How?"),
        Said("system", "Be quick."),
    ],
    "system behind results": [
        Said("system", "Be kind."),
        HELLO,
        Said("assistant", "", "", (LISBON,)),
        result(LISBON, "Belem"),
        Said("system", "Be brief."),
    ],
    "users in a row": [HELLO, Said("user", "Still there?"), Said("assistant", "Yes."), Said("user", "So?")],
    "a user behind results": [
        HELLO,
        Said("assistant", "", "", (LISBON,)),
        result(LISBON, "Belem"),
        Said("user", "And more?"),
        Said("assistant", "No more."),
        Said("user", "Well."),
    ],
    "system alone": [Said("system", "Be kind.")],
    "an answer first": [Said("assistant", "Good day."), HELLO],
    "ids again": [
        HELLO,
        Said("assistant", "", "", (LISBON,)),
        result(LISBON, "Belem"),
        Said("assistant", "", "", (call(1, city="Porto"),)),
        result(LISBON, "Ribeira"),
    ],
}


@pytest.mark.parametrize("name", CONVERSATIONS)
async def test_four_spellings_are_one_prompt(models: list[Model], name: str) -> None:
    said = CONVERSATIONS[name]
    words = {one.text for one in said} | {part for one in said for c in one.calls for part in (c.name, *words_of(c))}
    faults = []
    for model in models:
        prompts = []
        for ask, spell in (
            (model.chat, as_chat), (model.messages, as_anthropic), (model.responses, as_items), (model.ollama, as_ollama)
        ):  # fmt: skip
            try:
                await ask(spell(said))
            except RequestError as error:
                prompts.append(f"{error}")
                continue
            prompts.append(model.prompt)
        lost = [word for word in words if word not in prompts[0]]
        if lost or len(set(prompts)) > 1:
            faults.append((model.name, lost, list(dict.fromkeys(prompts))))
    assert not faults, "\n\n".join(f"{one[0]} {one[1]}\n" + "\n----\n".join(one[2]) for one in faults)


def words_of(one: Call) -> list[str]:
    return [str(value) for value in json.loads(one.arguments).values()]


FIELDS: list[dict[str, Any]] = [
    {"role": "system", "content": "Be kind.", "name": "ann"},
    {"role": "user", "content": "Hello there.", "name": "ben"},
    {
        "role": "assistant",
        "content": "Let me look.",
        "name": "cid",
        "refusal": None,
        "reasoning_content": "Hm.",
        "tool_calls": [
            {
                "id": "callno001",
                "type": "function",
                "index": 0,
                "function": {"name": "find_it", "arguments": '{"city": "Lisbon"}', "parsed_arguments": None},
            }
        ],
    },
    {"role": "tool", "content": "Belem", "tool_call_id": "callno001", "name": "find_it"},
    {"role": "assistant", "content": "It is Belem.", "reasoning_content": "So.", "tool_calls": None},
    {"role": "user", "content": [{"type": "text", "text": "Thanks.", "cache_control": None}]},
]
OPTIONAL: list[tuple[str | int, ...]] = [
    (0, "name"), (1, "name"), (2, "content"), (2, "name"), (2, "refusal"), (2, "reasoning_content"),
    (2, "tool_calls", 0, "index"), (2, "tool_calls", 0, "function", "parsed_arguments"), (3, "name"),
    (4, "reasoning_content"), (4, "tool_calls"), (5, "content", 0, "cache_control"),
]  # fmt: skip
PARAMETERS: list[Any] = [
    None, {}, {"type": "object"}, {"type": "object", "properties": {}}, {"properties": {"city": {"type": "string"}}},
    *(
        {"type": "object", "properties": {"city": schema}, **more}
        for more in ({}, {"required": ["city"], "additionalProperties": False})
        for schema in (
            True, {}, {"type": "string"}, {"type": ["string", "null"]}, {"type": ["integer", "string"], "description": "x"},
            {"type": "string", "nullable": True}, {"enum": ["a", None]}, {"const": 1}, {"type": "array"},
            {"type": "array", "items": True}, {"type": "array", "items": {"type": ["string", "null"]}}, {"type": "object"},
            {"type": "object", "properties": {"a": True}}, {"type": "object", "additionalProperties": True},
            {"anyOf": [{"type": "string"}, {"type": "null"}]}, {"oneOf": [{"type": ["string", "null"]}, True]},
            {"$ref": "#/$defs/d"}, {"type": "null"}, {"type": "string", "default": None, "title": "T"},
        )
    ),
    {"type": "object", "properties": {"city": {"type": ["string", "null"]}}, "$defs": {"d": True}},
]  # fmt: skip


def changed(value: Any, path: Sequence[str | int], *, null: bool) -> Any:
    """A copy with one field null or left out."""
    copy = json.loads(json.dumps(value))
    at = copy
    for step in path[:-1]:
        at = at[step]
    if null:
        at[path[-1]] = None
    else:
        del at[path[-1]]
    return copy


def wire_cases() -> Iterator[tuple[str, list[dict[str, Any]], list[dict[str, Any]]]]:
    """Conversations and tools, each without a field that is optional."""
    for path in OPTIONAL:
        for null in (False, True):
            yield f"{path} {null}", changed(FIELDS, path, null=null), TOOLS
    for message, content in ((2, ""), (3, ""), (3, []), (4, ""), (1, "")):
        yield (
            f"{message} {content!r}",
            [{**m, "content": content} if n == message else m for n, m in enumerate(FIELDS)],
            TOOLS,
        )
    for schema in PARAMETERS:
        for described in (True, False):
            function = {"name": "find_it", "parameters": schema, "strict": None}
            tool = {"type": "function", "function": {**function, "description": "Finds." if described else None}}
            yield f"{schema} {described}", FIELDS, [tool]
    yield "bare", FIELDS, [{"type": "function", "function": {"name": "find_it"}}]


def by_transformers(model: Model, messages: list[dict[str, Any]], tools: Any) -> str | None:
    source = model.template.source
    try:
        return render_jinja_template(
            [messages], chat_template=source, tools=tools, add_generation_prompt=True, **NAMES
        )[0][0]
    except Exception:
        return None


async def test_fields_that_are_optional_may_be_missing(models: list[Model]) -> None:
    faults, compared = [], 0
    for model in models:
        needs = model.adapter.planner.choice.needs
        assert needs is not None
        for name, messages, tools in wire_cases():
            request = parse_chat_request({"messages": messages, "tools": tools if model.tools else None})
            try:
                prompt = (await model.adapter.apply_template(request)).prompt
            except RequestError as error:
                faults.append((model.name, name, str(error)))
                continue
            task = read_chat(request)
            given, shown = template_messages(task.messages), task.tools.as_template()
            fitting = template_messages(task.messages, needs)
            for said in (text_in(m.get("content")) for m in given):
                if said not in prompt:
                    faults.append((model.name, name, f"{said!r} is lost"))
            if fitting == given and (shown is None or fit_tools(shown, needs) == shown):
                expected = by_transformers(model, given, shown)
                if expected is not None:
                    compared += 1
                    if prompt != expected:
                        faults.append((model.name, name, f"{prompt!r} is not {expected!r}"))
    assert not faults, f"{len(faults)}: " + "\n".join(" | ".join(one) for one in faults)
    assert compared > 50 * len(models) // 2


def text_in(content: Any) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content or ())
