# SPDX-License-Identifier: MIT
"""Real chat templates: one conversation gives one prompt through every API, whatever stands in it, and nothing of it is
refused or lost."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from candle_vllm.core.errors import RequestError
from candle_vllm.core.testing import ScriptedEngine
from candle_vllm.core.text.chat_template import ChatTemplate
from candle_vllm.core.text.template_needs import fit_tools, split
from candle_vllm.core.text.tokenizer import ChatConventions
from candle_vllm.openai import OpenAIAdapter, to_json_bytes
from candle_vllm.openai.anthropic import MessagesAdapter
from candle_vllm.openai.ollama.adapter import OllamaAdapter
from candle_vllm.openai.ollama.request import ChatRequest, ollama_parser
from candle_vllm.openai.requests import parse_chat_request, read_chat
from candle_vllm.openai.task import template_messages
from candle_vllm.responses.api.responder import Responder
from candle_vllm.responses.conversation.chat_model import InProcessModel

NAMES = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
COMMON = (
    "openai-gpt-oss-120b", "Qwen3-Coder", "mistralai-Mistral-Nemo-Instruct-2407", "google-gemma-2-2b-it",
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use", "deepseek-ai-DeepSeek-V3.1",
    "mistralai-Ministral-3-14B-Reasoning-2512",
)  # fmt: skip
UNUSABLE = {"fireworks-ai-llama-3-firefunction-v2"}  # wants variables that nobody has
WITHOUT_TOOLS = {"llama-cpp-deepseek-r1"}  # writes a generator as JSON

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

    def messages_body(self, messages: Sequence[Mapping[str, Any]], **fields: Any) -> dict[str, Any]:
        functions = [tool["function"] for tool in self.tools]
        tools = [{"name": f["name"], "description": f["description"], "input_schema": SCHEMA} for f in functions]
        return {"model": "default", "max_tokens": 1 << 12, "messages": messages, "tools": tools, **fields}

    async def messages(self, messages: Sequence[Mapping[str, Any]], **fields: Any) -> Any:
        return plain(await MessagesAdapter(self.adapter).create(self.messages_body(messages, **fields)))

    def responses_body(self, items: Sequence[Mapping[str, Any]], **fields: Any) -> dict[str, Any]:
        tools = [{"type": "function", **tool["function"]} for tool in self.tools]
        return {"input": items, "tools": tools, "store": False, **fields}

    async def responses(self, items: Sequence[Mapping[str, Any]], **fields: Any) -> Any:
        return plain(await Responder(InProcessModel(self.adapter)).create(self.responses_body(items, **fields)))

    def ollama_body(self, messages: Sequence[Mapping[str, Any]], **fields: Any) -> dict[str, Any]:
        return {"model": "m", "messages": messages, "tools": self.tools or None, "stream": False, **fields}

    async def ollama(self, messages: Sequence[Mapping[str, Any]], **fields: Any) -> Any:
        body = ollama_parser(ChatRequest)(self.ollama_body(messages, **fields))
        return plain(await OllamaAdapter(self.adapter).chat(body))


class TemplateEngine(ScriptedEngine):
    """Renders with the model's template, and answers with its script."""

    def __init__(self, model: Model) -> None:
        super().__init__(lambda _prompt: model.script, max_model_len=1 << 17)
        source = model.template.source
        self.chat_conventions = ChatConventions(
            chat_template=source, special_tokens=self.tokenizer.special_tokens, token_names=NAMES
        )
        self.model = model

    def render_messages(self, messages: Any, **options: Any) -> str:
        self.model.prompt = self.model.template.render(messages, **options)
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


SPELLINGS: dict[str, Callable[[Iterable[Said]], list[dict[str, Any]]]] = {
    "chat": as_chat, "messages": as_anthropic, "responses": as_items, "ollama": as_ollama,
}  # fmt: skip
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


@pytest.mark.one_of_each(7)
@pytest.mark.parametrize("name", CONVERSATIONS)
async def test_four_spellings_are_one_prompt(models: list[Model], name: str) -> None:
    said = CONVERSATIONS[name]
    words = {one.text for one in said} | {part for one in said for c in one.calls for part in (c.name, *words_of(c))}
    faults = []
    for model in models:
        prompts = []
        for api, spell in SPELLINGS.items():
            try:
                await getattr(model, api)(spell(said))
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
            True, {}, {"type": "string"}, {"type": ["string", "null"]}, {"type": ["integer", "string"], "title": "T"},
            {"type": "string", "nullable": True}, {"enum": ["a", None]}, {"const": 1}, {"type": "array"},
            {"type": "array", "items": True}, {"items": {"type": ["string", "null"]}}, {"type": "object"},
            {"type": "object", "properties": {"a": True}}, {"type": "object", "additionalProperties": True},
            {"anyOf": [{"type": "string"}, {"type": "null"}]}, {"oneOf": [{"type": ["string", "null"]}, True]},
            {"type": "null"}, {"type": "string", "default": None, "title": "T"},
        )
    ),
    {"type": "object", "properties": {"city": {"$ref": "#/$defs/d"}}, "$defs": {"d": {"type": ["string", "null"]}}},
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
        other = {**FIELDS[message], "content": content}
        yield f"{message} {content!r}", [*FIELDS[:message], other, *FIELDS[message + 1 :]], TOOLS
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


ANSWER = Said("assistant", "Let me look first.", "Where are they?", (LISBON, PORTO))


def written(model: Model) -> str:
    """What the model writes for an answer with everything in it, as its template has it."""
    needs = model.adapter.planner.choice.needs
    tools = [fit_tools(model.tools, needs)] if model.tools and needs else [None]
    said = [HELLO, ANSWER, result(LISBON, "Belem"), result(PORTO, "Ribeira")]
    messages = template_messages(read_chat(parse_chat_request({"messages": as_chat(said)})).messages, needs)
    prompt = model.template.render(messages[:1], tools=tools[0])
    several = [one for one in messages if one["role"] == "assistant"]
    texts = [split(prompt, model.template.render([messages[0], one], tools=tools[0], add_generation_prompt=False)).text
             for one in several]  # fmt: skip
    return "".join(texts)


def ways(text: str) -> Iterator[tuple[str, int]]:
    """Where an answer of this text may be cut off; in the middle of each of its parts, between them, and at its end."""
    for part in ("Where are", "Let me", "find", "Lis", "Porto", "Por"):
        place = text.rfind(part) if part != "find" else text.find(part)
        if place >= 0:
            yield f"in {part}", len(text[: place + len(part)].encode())
    if (place := text.find("Lisbon")) >= 0:
        yield "between calls", len(text[: (text.find("find", place) + text[place:].find("\n") + place) // 2].encode())
    yield "whole", 1 << 12


def answered(calls: Iterable[str], make: Callable[[str], dict[str, Any]]) -> list[dict[str, Any]]:
    return [make(one) for one in calls]


class Back(NamedTuple):
    """An answer as a client sends it back: the texts and calls in it, and the next request."""

    said: list[str]
    calls: int
    history: list[dict[str, Any]]


def of_chat(message: dict[str, Any]) -> Back:
    calls = message.get("tool_calls") or []
    results = [{"role": "tool", "tool_call_id": one["id"], "content": "Belem"} for one in calls]
    said = [message.get("content"), *(one["function"][key] for one in calls for key in FUNCTION)]
    return Back(said, len(calls), [USER, message, *results, MORE])


def of_messages(blocks: list[dict[str, Any]]) -> Back:
    uses = [block for block in blocks if block["type"] == "tool_use"]
    results = [{"type": "tool_result", "tool_use_id": block["id"], "content": "Belem"} for block in uses]
    said = [block["text"] for block in blocks if block["type"] == "text"]
    said += [text for block in uses for text in (block["name"], json.dumps(block["input"]))]
    turns = [{"role": "assistant", "content": blocks}] if blocks else []
    return Back(said, len(uses), [USER, *turns, {"role": "user", "content": [*results, TEXT]}])


def of_responses(items: list[dict[str, Any]]) -> Back:
    calls = [item for item in items if item["type"] == "function_call"]
    results = [{"type": "function_call_output", "call_id": item["call_id"], "output": "Belem"} for item in calls]
    said = [part["text"] for item in items if item["type"] == "message" for part in item["content"]]
    said += [item[key] for item in calls for key in FUNCTION]
    return Back(said, len(calls), [USER, *items, *results, MORE])


def of_ollama(message: dict[str, Any]) -> Back:
    calls = [one["function"] for one in message.get("tool_calls") or ()]
    results = [{"role": "tool", "tool_name": one["name"], "content": "Belem"} for one in calls]
    said = [message["content"], *(text for one in calls for text in (one["name"], json.dumps(one["arguments"])))]
    return Back(said, len(calls), [USER, message, *results, MORE])


async def by_chat(model: Model, most: int) -> Back:
    return of_chat((await model.chat([USER], max_tokens=most))["choices"][0]["message"])


async def by_messages(model: Model, most: int) -> Back:
    return of_messages((await model.messages([USER], max_tokens=most))["content"])


async def by_responses(model: Model, most: int) -> Back:
    return of_responses((await model.responses([USER], max_output_tokens=most))["output"])


async def by_ollama(model: Model, most: int) -> Back:
    return of_ollama((await model.ollama([USER], options={"num_predict": most}))["message"])


async def first(most: int, opened: Awaitable[Any]) -> AsyncIterator[Any]:
    """The first pieces of a stream, which is then aborted: the reader goes away and keeps what came."""
    async with aclosing(await opened) as stream:
        async for piece in stream:
            yield plain(piece)
            most -= 1
            if not most:
                return


async def by_chat_aborted(model: Model, most: int) -> Back:
    request = {"messages": [USER], "tools": model.tools or None, "stream": True}
    content, calls = "", dict[int, dict[str, Any]]()
    async for chunk in first(most, model.adapter.chat_stream(request)):
        delta = chunk["choices"][0]["delta"]
        content += delta.get("content") or ""
        for one in delta.get("tool_calls") or ():
            call = calls.setdefault(one["index"], {"id": one.get("id"), "function": {"name": "", "arguments": ""}})
            for key in FUNCTION:
                call["function"][key] += one["function"].get(key) or ""
    return of_chat({"role": "assistant", "content": content, "tool_calls": list(calls.values()) or None})


async def by_messages_aborted(model: Model, most: int) -> Back:
    """Of a call that has not ended the client keeps what it reads in it, or no input."""
    blocks = dict[int, dict[str, Any]]()
    async for event in first(most, MessagesAdapter(model.adapter).create_stream(model.messages_body([USER]))):
        if event["type"] == "content_block_start":
            blocks[event["index"]] = event["content_block"] | {"json": ""}
        elif event["type"] == "content_block_delta":
            for key, text in event["delta"].items():
                key = "json" if key == "partial_json" else key
                if key != "type":
                    blocks[event["index"]][key] += text
    for block in blocks.values():
        if written := block.pop("json"):
            try:
                block["input"] = json.loads(written)
            except ValueError:
                block["input"] = {}
    return of_messages([block for block in blocks.values() if block.get("text") != ""])


async def by_responses_aborted(model: Model, most: int) -> Back:
    items = dict[int, dict[str, Any]]()
    async for event in first(
        most, Responder(InProcessModel(model.adapter)).create_stream(model.responses_body([USER]))
    ):
        match event["type"]:
            case "response.output_item.added" | "response.output_item.done":
                items[event["output_index"]] = event["item"]
            case "response.content_part.added":
                items[event["output_index"]]["content"].append(event["part"])
            case "response.output_text.delta":
                items[event["output_index"]]["content"][-1]["text"] += event["delta"]
            case "response.function_call_arguments.delta":
                items[event["output_index"]]["arguments"] += event["delta"]
            case _:
                pass
    return of_responses(list(items.values()))


async def by_ollama_aborted(model: Model, most: int) -> Back:
    message: dict[str, Any] = {"role": "assistant", "content": ""}
    body = model.ollama_body([USER]) | {"stream": True}
    async for line in first(most, OllamaAdapter(model.adapter).chat_stream(ollama_parser(ChatRequest)(body))):
        for key, value in line["message"].items():
            if key != "role":
                message[key] = message[key] + value if key in message else value
    return of_ollama(message)


FUNCTION = ("name", "arguments")
USER, MORE = {"role": "user", "content": HELLO.text}, {"role": "user", "content": "Go on."}
TEXT = {"type": "text", "text": "Go on."}
ANSWERS = {"chat": by_chat, "messages": by_messages, "responses": by_responses, "ollama": by_ollama}
ABORTED = {
    "chat": by_chat_aborted, "messages": by_messages_aborted,
    "responses": by_responses_aborted, "ollama": by_ollama_aborted,
}  # fmt: skip
ENDS = [*ANSWERS.items(), *ABORTED.items()]


@pytest.mark.one_of_each(2)
@pytest.mark.parametrize(("api", "answer"), ENDS, ids=[made.__name__ for _, made in ENDS])
async def test_an_answer_that_ended_anywhere_is_taken_back(
    models: list[Model], api: str, answer: Callable[[Model, int], Awaitable[Back]]
) -> None:
    faults, calls = [], 0
    for model in models:
        model.script = written(model)
        for way, most in ways(model.script):
            back = await answer(model, most)
            calls += back.calls
            try:
                await getattr(model, api)(back.history)
            except RequestError as error:
                faults.append((model.name, way, str(error)))
                continue
            words = [word for text in back.said for word in re.findall(r"\w+", text or "")]
            words += ["Belem"] * bool(back.calls) + ["Go on."]
            if lost := [word for word in words if word not in model.prompt]:
                faults.append((model.name, way, f"{lost} of {back.history!r} in {model.prompt!r}"))
        model.script = "ok"
    assert not faults, f"{len(faults)}: " + "\n".join(" | ".join(one) for one in faults)
    assert calls > 4 * len(models)


BROKEN = [
    '{"city": "Lis', '{"city": "Lisbon", "mo', '{"city": "Lisbon", "most": tr', '{"city": "Lisbon",',
    '{"city": ["Lisbon", {"a": ', '{"city": "Lisbon\\u00', '{"city": "Lisbon\\', "[]", '"Lisbon"', "Lisbon",
    '{"city": "Lisbon", "most": NaN}', '{"city": "Lisbon"}{"city": "Porto"}', "{'city': 'Lisbon',}",
    '{"city": "Lisbon\\ud83d"}', "", "null", "{}", "{", "17",
]  # fmt: skip


@pytest.mark.parametrize("api", ["chat", "responses"])
async def test_arguments_that_are_no_object(models: list[Model], api: str) -> None:
    faults = []
    for model in models:
        for arguments in BROKEN:
            broken = Call("callno001", "find_it", arguments)
            said = [HELLO, Said("assistant", "", "", (broken,)), result(broken, "Belem")]
            try:
                await getattr(model, api)(SPELLINGS[api](said))
                words = ["find_it", "Belem", *re.findall("Lisbon|Porto|Lis|17", arguments)]
                lost = [word for word in words if word not in model.prompt]
                fault = f"{lost} in {model.prompt!r}" if lost else ""
            except RequestError as error:
                fault = str(error)
            if fault:
                faults.append((model.name, arguments, fault))
    assert not faults, f"{len(faults)}: " + "\n".join(" | ".join(one) for one in faults)
