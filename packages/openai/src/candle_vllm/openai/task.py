# SPDX-License-Identifier: MIT
"""The `Task` of a request: what the request asks for, independent of any API, and its messages (steps 2 and 3).

Each API validates its requests and converts them to a `Task`, from which prompts, parameters, grammars and plans are
made. Errors found later name fields of the task; `Paths` translates these names to the request's. `template_messages`
converts messages to the dictionaries that chat templates expect.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import msgspec

from candle_vllm.core.errors import InvalidParameterError, RequestError
from candle_vllm.core.sampling.structured import StructuredOutputsParams
from candle_vllm.core.text.template_needs import TemplateNeeds, fit
from candle_vllm.openai.errors import InvalidBodyError
from candle_vllm.openai.formats.json_text import mended
from candle_vllm.openai.json_body import decode_json
from candle_vllm.openai.protocol.fields import Cut


class TextPart(NamedTuple):
    """Text of a message."""

    text: str


class ImagePart(NamedTuple):
    """An image in a message; its bytes are not loaded yet.

    Attributes:
        source: address of the image, a data URL, or the id of a stored file.
        detail: requested level of detail, which has no effect.
        path: path of the image in the request, for errors.
        stored: whether the source is such an id.
    """

    source: str
    detail: str | None = None
    path: str = "messages"
    stored: bool = False


Part = TextPart | ImagePart

MEDIA_MARK = "<__media__>"
"""Stands for an image in a text prompt, whatever the model; llama.cpp uses the same mark."""


class Call(msgspec.Struct, frozen=True):
    """A tool call of an earlier answer; `arguments` is JSON text as the model wrote it, which may be invalid."""

    id: str
    name: str
    arguments: str


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """A message of a conversation.

    Attributes:
        parts: content; without images, its texts are joined by line breaks.
        thoughts, calls: reasoning and tool calls of an assistant message.
        call_id: id of the call that a tool message answers.
        name: name of the participant, or of the function that was called.
    """

    role: Literal["system", "user", "assistant", "tool"]
    parts: tuple[Part, ...] = ()
    thoughts: str | None = None
    calls: tuple[Call, ...] = ()
    call_id: str | None = None
    name: str | None = None


class ToolFunction(msgspec.Struct, frozen=True):
    """A function that the model may call, as parsers and grammars use it.

    Attributes:
        parameters: a JSON schema that has `"type": "object"`; without properties if the request gave no parameters.
        strict: whether the arguments must follow the schema even if the tool choice is `auto`.
        grammar: Lark grammar of the function's only argument, a text; enforced if the format of calls allows it.
    """

    name: str
    description: str | None
    parameters: dict[str, Any]
    strict: bool
    grammar: str | None = None


class ToolUse(msgspec.Struct, frozen=True, kw_only=True):
    """Tools of a request, with the tool choice.

    Attributes:
        tools: the functions that may be called; empty in mode `none`.
        mode: `none`, `auto` (the model chooses) or `required` (at least one call).
        parallel: whether more than one call is allowed.
        named: the one function that must be called, exactly once; the mode is then `required`.
        shown: tools for the chat template: all tools of the request, callable or not; none in mode `none`.
    """

    tools: tuple[ToolFunction, ...] = ()
    mode: Literal["none", "auto", "required"] = "none"
    parallel: bool = True
    named: str | None = None
    shown: tuple[dict[str, Any], ...] = ()

    def as_template(self) -> list[dict[str, Any]] | None:
        """Return the tools as `{"type": "function", "function": {...}}`; None without tools."""
        return list(self.shown) or None


class Choice(NamedTuple):
    """The tool choice of a request.

    Attributes:
        mode: as in `ToolUse`.
        names: names of the tools that may be called; None means all.
        named: the tool that must be called, exactly once.
    """

    mode: Literal["none", "auto", "required"] = "auto"
    names: Collection[str] | None = None
    named: str | None = None

    def freed(self) -> Choice:
        """Return the choice for later turns, without an obligation to call: a model that must call never answers."""
        return self if self.mode == "none" else Choice(names=self.names)

    def among(
        self, functions: Sequence[ToolFunction], shown: Sequence[dict[str, Any]], *, parallel: bool | None
    ) -> ToolUse:
        """Return the tool use of a request with these tools; InvalidParameterError if a call is required without tools.

        If no tool may be called, the template shows no tools, so that the model does not write a call as text.
        """
        names = self.names if self.named is None else (self.named,)
        tools = tuple(one for one in functions if names is None or one.name in names)
        if not tools and self.mode == "required":
            raise InvalidParameterError("tool_choice needs tools: there is nothing to choose from", "tool_choice")
        if not tools or self.mode == "none":
            return ToolUse()
        return ToolUse(
            tools=tools,
            mode=self.mode,
            parallel=parallel is not False and self.named is None,
            named=self.named,
            shown=tuple(shown),
        )


class ThinkingLimit(NamedTuple):
    """Limit on the reasoning of an answer.

    Attributes:
        tokens: maximum number of reasoning tokens; below 0 means no limit.
        message: text inserted when the limit ends the reasoning; None uses the server's or, without one, the model's.
        required: whether the request fails if the markers around the model's reasoning are unknown.
    """

    tokens: int
    message: str | None = None
    required: bool = True


class Paths(NamedTuple):
    """Names of a task's fields in its request, for errors.

    Attributes:
        fields: the request's names of fields that the task or the engine names differently.
        schemas: path of each shown tool's schema.
        words: for some names in `fields`, the text that replaces the name's first occurrence in the message.
    """

    fields: Mapping[str, str]
    schemas: Sequence[str] = ()
    words: Mapping[str, str] = {}

    @contextmanager
    def blamed(self) -> Iterator[None]:
        """Context manager that translates the field that a `RequestError` names to its name in the request."""
        try:
            yield
        except RequestError as error:
            name, text = error.param or "", str(error)
            if name in self.fields:
                error.param = self.fields[name]
                if (word := self.words.get(name)) is None:
                    text = text.replace(f"{name}: ", f"{error.param}: ", 1)
                else:
                    text = re.sub(rf"(?<![\w.]){name}(?!\w)", word, text, count=1)
                error.args = (text, *error.args[1:])
            raise


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """What a request asks for: the next message of a conversation, or continuations of prompts.

    Attributes:
        messages: the conversation; empty if there are `prompts`.
        prompts: texts or token ids, each of which gets `choices` answers.
        images: images of the only prompt, a text with a `MEDIA_MARK` for each; None without images.
        suffix: text after the answers, which fill the gap between prompt and suffix (fill in the middle).
        before: token ids of an earlier prompt and its answer, which precede the prompt (Ollama's `context`).
        tools: the tools that may be called, and the tool choice.
        form: constraint on the content of an answer; None allows any text.
        sampling: values that the request gives, by name in `SamplingParams`.
        choices: number of answers for each prompt.
        beam_penalty: length penalty of the beam search that finds the answers; None samples them.
        model: name of the model in the request; None uses the served model.
        continued: whether the last message is the beginning of the answer.
        opens_answer: vLLM's `add_generation_prompt`; None means True unless the last message is `continued`.
        chat_template: replaces the model's template.
        add_special_tokens: whether special tokens are added to the rendered text or the prompts.
        thinking: limit on the reasoning; None uses the server's limit.
        show_thoughts: whether the reasoning is part of the answer.
        echo: text that every choice begins with.
        echo_prompts: whether every choice repeats its prompt, with log-probabilities if they are requested.
        scored_only: whether prompts are only scored, and nothing is generated.
        tell_ids, tell_counts: whether events have token ids, and whether a `Usage` precedes the events of every output.
        cut: how prompts are truncated; None refuses prompts that are too long.
        reserve: number of output tokens for which a truncated prompt leaves room in the context.
        adapter: LoRA adapter that the request names in a field of its own; `model` contains its name too.
        lora: scales of LoRA adapters by llama.cpp id; None uses the named adapter, or the default scales.
        priority: lower values run first.
    """

    paths: Paths
    messages: tuple[Message, ...] = ()
    prompts: tuple[str | Sequence[int], ...] = ()
    images: tuple[ImagePart, ...] | None = None
    suffix: str = ""
    before: tuple[int, ...] = ()
    tools: ToolUse = ToolUse()
    form: StructuredOutputsParams | None = None
    sampling: Mapping[str, Any] = {}
    choices: int = 1
    beam_penalty: float | None = None
    model: str | None = None
    continued: bool = False
    opens_answer: bool | None = None
    variables: Mapping[str, Any] = {}
    documents: Sequence[Mapping[str, Any]] | None = None
    chat_template: str | None = None
    add_special_tokens: bool = False
    thinking: ThinkingLimit | None = None
    show_thoughts: bool = True
    echo: str = ""
    echo_prompts: bool = False
    scored_only: bool = False
    tell_ids: bool = False
    tell_counts: bool = False
    cut: Cut | None = None
    reserve: int = 1
    lora: Mapping[int, float] | None = None
    adapter: str | None = None
    priority: int = 0
    request_id: str | None = None

    def unlimited(self) -> Task:
        """Return the task with the context as the only limit of its answer."""
        return msgspec.structs.replace(self, sampling={**self.sampling, "max_tokens": None})

    def with_results_in_order(self) -> Task:
        """Return the task with the results of each answer in the order of its calls, then results without a call.

        Most chat templates do not write the ids of calls, so the model can tell the results apart only by their order.
        """
        if all(message.role != "tool" for message in self.messages):
            return self
        # A message's key: the number of the answer whose results it is among (or its own), and its place among these.
        keys, answer, order = list[tuple[int, tuple[int, ...]]](), 0, dict[str | None, tuple[int, ...]]()
        for place, message in enumerate(self.messages):
            answer = answer if message.role == "tool" else place
            order |= {call.id: (place, number) for number, call in enumerate(message.calls)}
            keys.append((answer, order.get(message.call_id, (len(self.messages),) if place > answer else ())))
        places = sorted(range(len(keys)), key=keys.__getitem__)
        return msgspec.structs.replace(self, messages=tuple(self.messages[place] for place in places))


# --- messages for chat templates --------------------------------------------------------------------------------------

_MOST_MENDED = 1 << 16  # characters of call arguments repaired in one conversation; each takes microseconds
_Mend = Callable[[str], str | None]


def template_messages(
    messages: Sequence[Message], needs: TemplateNeeds | None = None, image: str = ""
) -> list[dict[str, Any]]:
    """Return one dictionary per message; call arguments become objects, or stay text if they are no JSON object.

    The content is one string, or a list of parts if there are images. A tool message gets the name of its function,
    because templates may need it and clients omit it. `fit` adapts the messages to what the template `needs`; `image`
    is the model's placeholder of an image.
    """
    left = 0 if needs is None or needs.arguments_as_text else _MOST_MENDED

    def mend(text: str) -> str | None:
        nonlocal left
        if len(text) > left:
            return None
        left -= len(text)
        return mended(text)

    names, rendered = dict[str, str](), list[dict[str, Any]]()
    for message in messages:
        names |= {call.id: call.name for call in message.calls}  # ids may be repeated in later turns
        rendered.append(_template_message(message, names, mend))
    if needs is not None:
        fit(rendered, needs, image)
    return rendered


def text_of(message: Message) -> str:
    """Return the texts of a message, joined by line breaks."""
    return "\n".join(part.text for part in message.parts if isinstance(part, TextPart))


def images_of(messages: Sequence[Message]) -> list[ImagePart]:
    """Return the images of a conversation, in order."""
    return [part for message in messages for part in message.parts if isinstance(part, ImagePart)]


def _content(message: Message) -> str | list[dict[str, str]]:
    if not any(isinstance(part, ImagePart) for part in message.parts):
        return text_of(message)
    return [
        {"type": "image"} if isinstance(part, ImagePart) else {"type": "text", "text": part.text}
        for part in message.parts
    ]


def _template_message(message: Message, names: Mapping[str, str], mend: _Mend) -> dict[str, Any]:
    more = {
        "tool_call_id": message.call_id,
        "name": message.name if message.call_id is None else message.name or names.get(message.call_id),
        "reasoning_content": message.thoughts,
        "tool_calls": [_template_call(call, mend) for call in message.calls] or None,
    }
    return {"role": message.role, "content": _content(message), **{k: v for k, v in more.items() if v is not None}}


def _template_call(call: Call, mend: _Mend) -> dict[str, Any]:
    function = {"name": call.name, "arguments": _arguments(call.arguments, mend)}
    return {"id": call.id, "type": "function", "function": function}


def _arguments(text: str, mend: _Mend) -> dict[str, Any] | str:
    """Return the arguments as an object, repaired if possible, else as text; empty and null mean no arguments."""
    try:
        value = decode_json(text.strip() or "{}")
    except InvalidBodyError:
        made = mend(text)
        value = text if made is None else json.loads(made)
    if value is None:
        return {}
    return value if isinstance(value, dict) else text
