# SPDX-License-Identifier: MIT
"""What a chat template can write, and how it wants messages: seen in small conversations that are rendered through it,
when a model is loaded."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from candle_vllm.core.errors import ChatTemplateError
from candle_vllm.core.text.chat_template import ChatTemplate

NAME = "find_places"
ARGUMENTS: Mapping[str, Any] = {"city": "Lisbon", "most": 7}
OTHER_ARGUMENTS: Mapping[str, Any] = {"city": "Porto", "most": 9}
THOUGHTS = "Which places are there?"
CONTENT = "Let me look."
RESULT = "Belem"
SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "description": "where"},
        "most": {"type": "integer", "description": "how many"},
    },
    "required": ["city", "most"],
}
_TOOLS = [{"type": "function", "function": {"name": NAME, "description": "Finds places.", "parameters": SCHEMA}}]
_ASK: Mapping[str, Any] = {"role": "user", "content": "Hello."}
_MOST_SECONDS = 1.0  # of processor time for all renderings; real templates need some milliseconds
_MOST_LAST = 64  # characters of what opens an answer
_SHORT_ID = re.compile(r"[A-Za-z0-9]{9}")
_HALF_MARK = re.compile(r"(?:<[^<>\n]*|\[[^\[\]\n]*)\Z")


@dataclasses.dataclass(frozen=True)
class Written:
    """What a template makes of an assistant's message.

    Attributes:
        head: the text before it, as far as a prompt for an answer has it too.
        text: the message, and what the template puts behind it.
    """

    head: str
    text: str


class TemplateProbe:
    """A chat template to be asked.

    A template that takes too long is asked no more, and has then refused.

    Attributes:
        refusal: what the template said when it last failed; "" where it never did.
    """

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template
        self._seconds = 0.0  # of processor time used so far
        self.refusal = ""
        self._prompts = {tools: self._render([_ASK], tools=tools, prompt=True) for tools in (True, False)}

    @property
    def prompt(self) -> str | None:
        """A prompt with a tool in it; None where the template refuses it."""
        return self._prompts[True]

    @property
    def plain_prompt(self) -> str | None:
        """The prompt without tools."""
        return self._prompts[False]

    def calls(
        self,
        arguments: Sequence[Mapping[str, Any]] = (ARGUMENTS,),
        *,
        as_text: bool = False,
        ids: Sequence[str] = ("callno001", "callno002"),
        content: str | None = "",
        thoughts: str | None = None,
    ) -> Written | None:
        """A message that calls the tool once for each of the arguments; None where the template refuses it."""
        message = _calling(arguments, as_text, ids, content)
        if thoughts is not None:
            message["reasoning_content"] = thoughts
        return self._written(message)

    def thinking(self) -> Written | None:
        """A message with thoughts and content."""
        return self._written({"role": "assistant", "content": CONTENT, "reasoning_content": THOUGHTS})

    def result(self, *, as_text: bool, content: str | None) -> str | None:
        """A conversation that ends with a tool's result."""
        call = _calling((ARGUMENTS,), as_text, ("callno001",), content)
        answer = {"role": "tool", "tool_call_id": "callno001", "name": NAME, "content": RESULT}
        return self._render([_ASK, call, answer], tools=True, prompt=True)

    def wants_parts(self) -> bool:
        """Whether a text is written only where it is a part of a content."""
        plain = self._prompts[False]
        if plain is not None and str(_ASK["content"]) in plain:
            return False
        parts = [{"type": "text", "text": _ASK["content"]}]
        written = self._render([{**_ASK, "content": parts}], tools=False, prompt=True)
        return written is not None and str(_ASK["content"]) in written

    def _written(self, message: Mapping[str, Any]) -> Written | None:
        text = self._render([_ASK, message], tools=True, prompt=False)
        return None if text is None else split(self._prompts[True] or "", text)

    def _render(self, messages: Sequence[Mapping[str, Any]], *, tools: bool, prompt: bool) -> str | None:
        if self._seconds > _MOST_SECONDS:
            return None
        start = time.thread_time()
        try:
            return self._template.render(messages, tools=_TOOLS if tools else None, add_generation_prompt=prompt)
        except ChatTemplateError as error:
            self.refusal = str(error)
            return None
        finally:
            self._seconds += time.thread_time() - start


def split(prompt: str, text: str) -> Written:
    """Where in the rendering of a conversation the part begins that a model writes after `prompt`."""
    pairs = enumerate(zip(prompt, text))
    size = next((place for place, (one, other) in pairs if one != other), min(len(prompt), len(text)))
    head = text[:size]
    if size < len(prompt):  # they part within the prompt's last words: not within a mark
        head = _HALF_MARK.sub("", head)
        rest = text[len(head) :]
        last = next((end for end in range(_MOST_LAST, 0, -1) if prompt.endswith(rest[:end])), 0)
        head += rest[:last]  # a prompt that has more in front of its last words, as instructions
    return Written(head, text[len(head) :])


def _calling(
    arguments: Sequence[Mapping[str, Any]], as_text: bool, ids: Sequence[str], content: str | None
) -> dict[str, Any]:
    calls = [
        {
            "id": own,
            "type": "function",
            "function": {"name": NAME, "arguments": json.dumps(given) if as_text else dict(given)},
        }
        for own, given in zip(ids, arguments)
    ]
    message: dict[str, Any] = {"role": "assistant", "tool_calls": calls}
    return message if content is None else {**message, "content": content}


_LONG_ID = "call_0123456789abcdef01234567"
_CITY, _OTHER_CITY = str(ARGUMENTS["city"]), str(OTHER_ARGUMENTS["city"])


@dataclasses.dataclass(frozen=True)
class TemplateNeeds:
    """What a template needs and can do.

    Attributes:
        writes_tools: prompts show the tools that a request offers.
        writes_calls: earlier calls are part of the prompt; where not, the model does not know that it called.
        writes_results: so are their results.
        writes_reasoning: so are the thoughts of a message that ends the conversation with calls.
        arguments_as_text: arguments must be JSON texts; otherwise they must be objects.
        parallel_calls: a message may have several calls.
        content_beside_calls: a message's content is written beside its calls.
        content_required: a message with calls must have a content, if an empty one.
        content_forbidden: a message's calls are written only where its content is null.
        short_ids: ids of calls must have nine letters or digits (Mistral).
        content_as_parts: a content must be a list of parts, if of one text.
        refusal: what the template said to the calls that it does not write; "" where it said nothing.
    """

    writes_tools: bool = False
    writes_calls: bool = False
    writes_results: bool = False
    writes_reasoning: bool = False
    arguments_as_text: bool = False
    parallel_calls: bool = False
    content_beside_calls: bool = False
    content_required: bool = True
    content_forbidden: bool = False
    short_ids: bool = False
    content_as_parts: bool = False
    refusal: str = ""


def template_needs(probe: TemplateProbe) -> TemplateNeeds:
    """Finds out what a template needs; about ten renderings of a small conversation."""
    writes_tools = probe.prompt is not None and probe.plain_prompt is not None and NAME in probe.prompt
    if writes_tools:
        writes_tools = NAME not in (probe.plain_prompt or "")
    as_parts = probe.wants_parts()
    as_text = _as_text(probe)
    if as_text is None:
        bare = probe.calls(content=None)
        if bare is None or _CITY not in bare.text:
            return TemplateNeeds(writes_tools=writes_tools, content_as_parts=as_parts, refusal=probe.refusal)
        return TemplateNeeds(
            writes_tools=writes_tools,
            writes_calls=True,
            content_required=False,
            content_forbidden=True,
            content_as_parts=as_parts,
        )
    two = probe.calls((ARGUMENTS, OTHER_ARGUMENTS), as_text=as_text)
    beside = probe.calls(as_text=as_text, content=CONTENT)
    thinking = probe.calls(as_text=as_text, thoughts=THOUGHTS)
    bare = probe.calls(as_text=as_text, content=None)
    result = probe.result(as_text=as_text, content="")
    return TemplateNeeds(
        writes_tools=writes_tools,
        writes_calls=True,
        writes_results=result is not None and RESULT in result,
        writes_reasoning=thinking is not None and THOUGHTS in thinking.text,
        arguments_as_text=as_text,
        parallel_calls=two is not None and _CITY in two.text and _OTHER_CITY in two.text,
        content_beside_calls=beside is not None and CONTENT in beside.text and _CITY in beside.text,
        content_required=bare is None or _CITY not in bare.text,
        short_ids=probe.calls(as_text=as_text, ids=(_LONG_ID,)) is None,
        content_as_parts=as_parts,
    )


def _as_text(probe: TemplateProbe) -> bool | None:
    """How arguments must be given; None where calls are not written either way."""
    given = probe.calls()
    if given is not None and _CITY in given.text and f"{{'{next(iter(ARGUMENTS))}'" not in given.text:
        return False
    text = probe.calls(as_text=True)
    if text is not None and _CITY in text.text:
        return True
    return False if given is not None and _CITY in given.text else None


def fit(rendered: list[dict[str, Any]], needs: TemplateNeeds) -> None:
    """Changes messages, in place, to what a template needs; what fits already stays."""
    for message in rendered:
        if needs.content_as_parts and isinstance(message.get("content"), str):
            message["content"] = [{"type": "text", "text": message["content"]}]
        if needs.content_forbidden and "tool_calls" in message and not message["content"]:
            message["content"] = None
        if needs.short_ids and "tool_call_id" in message:
            message["tool_call_id"] = short_id(message["tool_call_id"])
        for call in message.get("tool_calls", ()):
            if needs.short_ids:
                call["id"] = short_id(call["id"])
            arguments = call["function"]["arguments"]
            if needs.arguments_as_text and not isinstance(arguments, str):
                call["function"]["arguments"] = json.dumps(arguments, ensure_ascii=False)


def short_id(given: str) -> str:
    """Nine letters and digits for an id: itself where it is so already, else always the same ones."""
    if _SHORT_ID.fullmatch(given):
        return given
    return hashlib.blake2s(given.encode(), digest_size=8).hexdigest()[:9]
