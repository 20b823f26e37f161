# SPDX-License-Identifier: MIT
"""Real chat templates: which formats are chosen for them, and that what they write is read back equal."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from candle_vllm.core.errors import ChatTemplateError
from candle_vllm.core.text.chat_template import ChatTemplate
from candle_vllm.core.text.template_needs import fit, split
from candle_vllm.openai.formats.choice import Choice, choose_layout
from candle_vllm.openai.formats.layout import Layout
from candle_vllm.openai.formats.parser import OutputParser
from packages.openai.tests.formats.messages import parse

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
ENDS = (  # of messages with calls, where those have ends of their own; and what stands behind a message
    "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<｜hy_eos:opensource｜>", "<|eom_id|>", "<|tool_response>",
    "<|call|>", "<|calls|>", "[e~[", "<end_of_sentence>",
)  # fmt: skip

# What the formats of each template are: of calls, and of thoughts.
CHOSEN = {
    "Apertus-8B-Instruct": "apertus apertus",
    "Apriel-1.6-15b-Thinker-fixed": "tool_calls_json apriel",
    "Bielik-11B-v3.0-Instruct": "hermes think",
    "ByteDance-Seed-OSS": "seed_oss seed_oss",
    "Cohere2MoE": "cohere cohere",
    "CohereForAI-c4ai-command-r-plus-tool_use": "command_r_plus -",
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use": "cohere cohere",
    "GLM-4.6": "glm45 think",
    "GLM-4.7-Flash": "glm45 think",
    "GigaChat3-10B-A1.8B": "gigachat3 -",
    "GigaChat3.1-10B-A1.8B": "gigachat3 -",
    "HuggingFaceTB-SmolLM3-3B": "- think",
    "Kimi-K2-Instruct": "kimi_k2 -",
    "Kimi-K2-Thinking": "kimi_k2 think",
    "Kimi-K3": "kimi_k3 kimi_k3",
    "LFM2-8B-A1B": "lfm2 -",
    "LFM2.5-8B-A1B": "lfm2 think",
    "LFM2.5-Instruct": "lfm2 think",
    "MiMo-VL": "hermes -",
    "MiniMax-M1": "tool_calls_json -",
    "MiniMax-M2": "minimax_m2 think",
    "MiniMax-M3": "minimax_m3 minimax_m3",
    "Mistral-Small-3.2-24B-Instruct-2506": "mistral_v11 -",
    "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": "qwen3_coder think",
    "NVIDIA-Nemotron-Nano-v2": "nemotron_nano think",
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use": "hermes -",
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": "hermes -",
    "Qwen-QwQ-32B": "hermes think",
    "Qwen-Qwen2.5-7B-Instruct": "hermes -",
    "Qwen-Qwen3-0.6B": "hermes think",
    "Qwen3-Coder": "qwen3_coder -",
    "Qwen3.5-4B": "qwen3_coder think",
    "Reka-Edge": "hermes think",
    "Spark2.5": "glm45 think",
    "StepFun3.5-Flash": "qwen3_coder think",
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": "deepseek_v3 think",
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": "deepseek_v3 think",
    "deepseek-ai-DeepSeek-V3.1": "deepseek_v31 think",
    "deepseek-ai-DeepSeek-V3.2": "deepseek_v32 think",
    "deepseek-ai-DeepSeek-V4-Flash-0731": "deepseek_v4 think",
    "deepseek-ai-DeepSeek-V4": "deepseek_v4 think",
    "fireworks-ai-llama-3-firefunction-v2": "phi4_mini_json -",
    "google-gemma-2-2b-it": "- -",
    "google-gemma-4-31B-it-interleaved": "gemma4 gemma4",
    "google-gemma-4-31B-it": "gemma4 gemma4",
    "ibm-granite-granite-3.3-2B-Instruct": "granite think_response",
    "ibm-granite-granite-4.0": "hermes -",
    "ibm-granite-granite-4.1": "hermes -",
    "inclusionai-ling-3.0-flash": "glm45 think",
    "llama-cpp-deepseek-r1": "deepseek_v3 think",
    "llama-cpp-rwkv-world": "- think",
    "meetkai-functionary-medium-v3.1": "functionary_v31 -",
    "meetkai-functionary-medium-v3.2": "functionary_v32 -",
    "meta-llama-Llama-3.1-8B-Instruct": "llama3_json -",
    "meta-llama-Llama-3.2-3B-Instruct": "llama3_json -",
    "meta-llama-Llama-3.3-70B-Instruct": "llama3_json -",
    "microsoft-Phi-3.5-mini-instruct": "- -",
    "mistralai-Ministral-3-14B-Reasoning-2512": "mistral_v13 mistral",
    "mistralai-Mistral-Nemo-Instruct-2407": "mistral -",
    "moonshotai-Kimi-K2": "kimi_k2 -",
    "muse-glimmer": "muse muse",
    "openai-gpt-oss-120b": "openai openai",
    "openbmb-MiniCPM5-1B": "minicpm5 think",
    "poolside-Laguna-S-2.1": "glm45 think",
    "poolside-Laguna-XS-2.1": "glm45 think",
    "poolside-Laguna-XS.2": "glm45 think",
    "tencent-Hy3": "hunyuan_v3 hunyuan_v3",
    "unsloth-Apriel-1.5": "tool_calls_json apriel",
    "unsloth-mistral-Devstral-Small-2507": "mistral_v13 -",
    "upstage-Solar-Open-100B": "solar solar",
}

# Templates that write no calls; those of earlier messages are lost.
NO_CALLS = {
    "HuggingFaceTB-SmolLM3-3B": "has no tools",
    "Kimi-K2-Instruct": "changes a list, which no sandbox allows",
    "Kimi-K2-Thinking": "changes a list, which no sandbox allows",
    "LFM2-8B-A1B": "writes nothing but content",
    "LFM2.5-Instruct": "writes nothing but content",
    "fireworks-ai-llama-3-firefunction-v2": "wants variables that nobody has",
    "google-gemma-2-2b-it": "has no tools",
    "ibm-granite-granite-3.3-2B-Instruct": "writes nothing but content",
    "llama-cpp-deepseek-r1": "writes a generator as JSON, which fails in transformers too",
    "llama-cpp-rwkv-world": "has no tools",
    "microsoft-Phi-3.5-mini-instruct": "has no tools",
}

# What templates change, by template and conversation. Whoever makes one of these better takes it out.
LOSSES = {
    ("Apriel-1.6-15b-Thinker-fixed", "reasoning"): "leaves the words out that open the thoughts",
    ("GigaChat3-10B-A1.8B", "parallel"): "writes the first call only",
    ("GigaChat3.1-10B-A1.8B", "parallel"): "writes the first call only",
    ("MiniMax-M3", "nasty"): "leaves null out, and writes 1 and '1' alike, and {} and [] inside of others",
    ("NVIDIA-Nemotron-Nano-v2", "content"): "writes content instead of calls",
    ("Reka-Edge", "content"): "puts a space before content",
    ("deepseek-ai-DeepSeek-R1-Distill-Llama-8B", "content"): "writes content instead of calls",
    ("meta-llama-Llama-3.1-8B-Instruct", "parallel"): "refuses two calls",
    ("meta-llama-Llama-3.2-3B-Instruct", "parallel"): "refuses two calls",
    ("meta-llama-Llama-3.3-70B-Instruct", "parallel"): "refuses two calls",
    ("openai-gpt-oss-120b", "content"): "writes content beside calls as thoughts",
    ("openai-gpt-oss-120b", "parallel"): "writes the first call only",
    ("poolside-Laguna-XS-2.1", "content"): "puts a line break before content",
    ("poolside-Laguna-XS.2", "content"): "puts a line break before content",
}

NASTY: dict[str, Any] = {
    "text": "He said \"hi\"\n\tand 'bye' \\ {x} [y] </tool_call> é漢😀 <|x|>",
    "count": -3,
    "ratio": 2.5,
    "on": True,
    "off": False,
    "nothing": None,
    "deep": {"a": {"b": [1, "2", {"c": []}]}, "e": {}},
    "list": [1, 2.5, "x", None, True],
    "empty": {},
    "none": [],
}
TYPES: dict[str, dict[str, Any]] = {
    "text": {"type": "string"},
    "count": {"type": "integer"},
    "ratio": {"type": "number"},
    "on": {"type": "boolean"},
    "off": {"type": "boolean"},
    "nothing": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    "deep": {"type": "object", "additionalProperties": {}},
    "list": {"type": "array", "items": {}},
    "empty": {"type": "object", "additionalProperties": {"type": "string"}},
    "none": {"type": "array", "items": {"type": "string"}},
    "city": {"type": "string"},
}
SCHEMAS = {
    name: {"type": "object", "properties": {key: {**TYPES[key], "description": "d"} for key in keys}, "required": []}
    for name, keys in {"do_it": list(NASTY), "get_weather": ["city"]}.items()
}
TOOLS = [
    {"type": "function", "function": {"name": name, "description": "d", "parameters": schema}}
    for name, schema in SCHEMAS.items()
]
ASK = {"role": "user", "content": "Hello"}


class Said(NamedTuple):
    """An assistant's message."""

    content: str
    thoughts: str
    calls: list[tuple[str, dict[str, Any]]]


SAID = {
    "nasty": Said("", "", [("do_it", NASTY)]),
    "parallel": Said("", "", [("get_weather", {"city": "Paris"}), ("get_weather", {"city": "Rome"})]),
    "content": Said("Let me look.", "", [("get_weather", {"city": "Paris"})]),
    "reasoning": Said("", "I think so.", [("get_weather", {"city": "Paris"})]),
}


class Model(NamedTuple):
    """A template, and what was chosen for it."""

    name: str
    template: ChatTemplate
    choice: Choice
    seconds: float


@pytest.fixture(scope="module")
def models(llama_cpp_models: Path) -> list[Model]:
    def made() -> Iterator[Model]:
        for file in sorted((llama_cpp_models / "templates").glob("*.jinja")):
            source = file.read_text(encoding="utf-8")
            template = ChatTemplate(source, SPECIAL)
            start = time.thread_time()
            choice = choose_layout(template=source, chat_template=template)
            yield Model(file.stem, template, choice, time.thread_time() - start)

    return list(made())


def test_the_formats_of_real_templates(models: list[Model]) -> None:
    chosen = {
        model.name: " ".join(row.name if row else "-" for row in (model.choice.tools, model.choice.reasoning))
        for model in models
    }
    assert chosen == CHOSEN


def test_choosing_takes_a_moment(models: list[Model]) -> None:
    assert sum(model.seconds for model in models) / len(models) < 0.05


def test_what_real_templates_need(models: list[Model]) -> None:
    needs = {model.name: model.choice.needs for model in models}
    assert {name for name, need in needs.items() if need and not need.writes_calls} == NO_CALLS.keys()
    assert {name for name, need in needs.items() if need and need.arguments_as_text} == {
        "deepseek-ai-DeepSeek-R1-Distill-Llama-8B",
        "meetkai-functionary-medium-v3.2",
    }
    assert {name for name, need in needs.items() if need and need.short_ids} == {
        "Mistral-Small-3.2-24B-Instruct-2506",
        "mistralai-Mistral-Nemo-Instruct-2407",
    }
    single = {name for name, need in needs.items() if need and need.writes_calls and not need.parallel_calls}
    assert single == {name for name, said in LOSSES if said == "parallel"}


def test_each_image_has_a_mark_wherever_results_stand(models: list[Model]) -> None:
    image, words = {"type": "image"}, [{"type": "text", "text": text} for text in ("Left", "Right")]
    calls = [
        {"id": f"callno00{n}", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Rome"}}}
        for n in range(2)
    ]
    one, two = ({"role": "assistant", "content": "", "tool_calls": calls[:count]} for count in (1, 2))

    def result(content: Any, n: int = 0) -> dict[str, Any]:
        return {"role": "tool", "tool_call_id": f"callno00{n}", "name": "get_weather", "content": content}

    more = {"role": "user", "content": [words[0], image, words[1]]}
    conversations = [
        [ASK, one, result([image])],
        [ASK, one, result("mild"), more],
        [ASK, two, result([words[0], image, image]), result([image, words[1]], 1), more],
        [more, one, result([image]), {"role": "assistant", "content": "So."}, ASK],
        [ASK, one, result([image]), one, result([image, words[0]]), {"role": "assistant", "content": "So."}, more],
    ]
    seeing = set[str]()
    for model in models:
        try:
            seen = model.template.render([more], tools=TOOLS).partition("Left")[2].partition("Right")[0].strip()
        except ChatTemplateError:
            continue
        if model.choice.needs is None or not seen or "type" in seen:  # nothing, or the part as JSON or Python
            continue
        seeing.add(model.name)
        seen = seen.removeprefix("<|END_TEXT|>").removesuffix("<|START_TEXT|>")  # Cohere's around texts
        for given in conversations:
            messages = json.loads(json.dumps(given))
            fit(messages, model.choice.needs)
            count = sum(part == image for each in given for part in each["content"])
            text = model.template.render(messages, tools=TOOLS)
            parts = text.replace("'", '"').count('"image"')
            assert (text.count(seen), parts) == (count, 0), (model.name, messages)
    assert {"mistralai-Ministral-3-14B-Reasoning-2512", "google-gemma-4-31B-it", "Qwen3.5-4B"} < seeing


def test_a_template_of_texts_writes_the_placeholders_of_images(models: list[Model]) -> None:
    """Such as Qwen 2.5's, which GGUF files of Qwen2.5-VL have as well."""
    parts = [{"type": "text", "text": "Left"}, {"type": "image"}, {"type": "text", "text": "Right"}]
    texts = {model.name: model for model in models if model.choice.needs and not model.choice.needs.image_parts}
    assert {"Qwen-Qwen2.5-7B-Instruct", "meta-llama-Llama-3.1-8B-Instruct"} < texts.keys()
    assert not {"mistralai-Ministral-3-14B-Reasoning-2512", "google-gemma-4-31B-it", "Qwen3.5-4B"} & texts.keys()
    for model in texts.values():
        messages: list[dict[str, Any]] = [{"role": "user", "content": parts}]
        assert model.choice.needs
        fit(messages, model.choice.needs, "<|image_pad|>")
        for tools in (TOOLS, None):
            try:
                text = model.template.render(messages, tools=tools)
            except ChatTemplateError:
                continue
            assert "Left<|image_pad|>Right" in text, model.name


def test_what_real_templates_write_is_read_back(models: list[Model]) -> None:
    writing = [model for model in models if model.name not in NO_CALLS]
    changed = {(model.name, key): found for model in writing for key in SAID if (found := changes(model, key))}
    assert len(writing) > 50
    assert changed.keys() == LOSSES.keys(), [changed.get(one) for one in changed.keys() ^ LOSSES.keys()]


def changes(model: Model, key: str) -> str:
    """What is not read back as it was said; "" where all is."""
    said = SAID[key]
    prompt = model.template.render([ASK], tools=TOOLS)
    try:
        full = model.template.render([ASK, message(model, said)], tools=TOOLS, add_generation_prompt=False)
    except ChatTemplateError as error:
        return str(error)
    written = split(prompt, full)
    text = written.text
    text = text[: min((text.find(end) for end in ends(model) if end in text), default=len(text))]
    expected = Said(said.content * (said.content in text), said.thoughts * (said.thoughts in text), said.calls)
    choice = model.choice
    opening = choice.reasoning.open_mark(written.head) if choice.reasoning else ""
    layout = Layout(choice.reasoning and choice.reasoning.led_by(opening), choice.tools)
    parser = OutputParser(layout, tools=SCHEMAS, in_reasoning=bool(opening), make_id=str)
    parsed = parse(parser, [text])
    found = Said(parsed.content, parsed.thoughts, parsed.values)
    return "" if found == expected else f"{model.name} wrote {text!r}, which reads {found}"


def message(model: Model, said: Said) -> dict[str, Any]:
    assert model.choice.needs is not None
    as_text = model.choice.needs.arguments_as_text
    form = "functions.{}:{}" if "Kimi" in model.name else "{:.0}callno00{}"
    calls = [
        {
            "id": form.format(name, index),
            "type": "function",
            "function": {"name": name, "arguments": json.dumps(arguments) if as_text else arguments},
        }
        for index, (name, arguments) in enumerate(said.calls)
    ]
    thoughts = {"reasoning_content": said.thoughts} if said.thoughts else {}
    content = None if model.choice.needs.content_forbidden and not said.content else said.content
    return {"role": "assistant", "content": content, "tool_calls": calls, **thoughts}


def ends(model: Model) -> list[str]:
    """What may stand behind a message: what stands behind a plain answer, and what some models end calls with."""
    plain = [ASK, {"role": "assistant", "content": "ANSWER"}]
    answer = model.template.render(plain, tools=TOOLS, add_generation_prompt=False)
    end = answer[answer.rindex("ANSWER") + len("ANSWER") :].strip()
    own = model.choice.tools.strays if model.choice.tools else ()
    return [one for one in (end, *ENDS) if one and one not in own]
