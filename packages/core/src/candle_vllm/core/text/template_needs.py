# SPDX-License-Identifier: MIT
"""Find out what a chat template supports, by rendering small conversations when a model is loaded, and adapt messages.

All APIs use the result: messages that a template cannot write are rewritten (`fit`, `fit_tools`), so that texts,
calls and images reach the model, and equal conversations give equal prompts in every API.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import re
import string
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from candle_vllm.core.errors import ChatTemplateError
from candle_vllm.core.text.chat_template import MAX_DEPTH, REASONING, ChatTemplate

INVALID = "INVALID_JSON"
"""Key under which arguments that are no JSON object are kept as text, so that no tool takes them for complete ones."""

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
_BARE_TOOLS = [{"type": "function", "function": {"name": NAME}}]
_BARE_SCHEMA: Mapping[str, Any] = {
    "type": "object", "properties": {"city": {"type": "string"}, "near": {"type": "object"}}
}  # fmt: skip
_ODD_SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "properties": {
        "city": True,
        "most": {"type": ["integer", "null"], "description": "how many"},
        "near": {"description": "what"},
        "kinds": {"type": "array", "items": True, "description": "which"},
        "when": {"anyOf": [{"type": "string"}, True], "description": "when"},
        "none": {"type": "null", "description": "nothing"},
    },
}
_ASK: Mapping[str, Any] = {"role": "user", "content": "Hello."}
_SEEN = [{"type": "text", "text": CONTENT}, {"type": "image"}, {"type": "text", "text": RESULT}]
_MOST_SECONDS = 1.0  # of processor time for all renderings; real templates need some milliseconds
_CUT_ESCAPE = re.compile(r"\\(?:u[0-9a-fA-F]{0,3})?\Z")
_WORD = string.ascii_letters + string.digits + "_.+-"
_MOST_LAST = 64  # maximum characters of the text that opens an answer
_SHORT_ID = re.compile(r"[A-Za-z0-9]{9}")
_HALF_MARK = re.compile(r"(?:<[^<>\n]*|\[[^\[\]\n]*)\Z")
_ELSEWHERE = "[an image, which is in a message of the user]"


@dataclasses.dataclass(frozen=True)
class Written:
    """Rendering of an assistant's message.

    Attributes:
        head: the text before the message: the prompt for an answer, or the part of it that the message shares.
        text: the message, and the template's text after it.
    """

    head: str
    text: str


class TemplateProbe:
    """Chat template that is tested by rendering.

    A template that takes too long is not rendered again; this counts as a refusal.

    `prompt` has a user's message and a tool, `plain_prompt` only the message; None if the template refuses it.
    """

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template
        self._seconds = 0.0  # of processor time used so far
        self.prompt = self._render([_ASK], _TOOLS)
        self.plain_prompt = self._render([_ASK], None)

    def calls(
        self,
        arguments: Sequence[Mapping[str, Any]] = (ARGUMENTS,),
        *,
        as_text: bool = False,
        ids: Sequence[str] = ("callno001", "callno002"),
        content: str | None = "",
        thoughts: str | None = None,
    ) -> Written | None:
        """Render a message with one call for each of the arguments; None if the template refuses it."""
        message = _calling(arguments, as_text, ids, content)
        if thoughts is not None:
            message["reasoning_content"] = thoughts
        return self._written(message)

    def thinking(self) -> Written | None:
        """Render a message with reasoning and content."""
        return self._written({"role": "assistant", "content": CONTENT, "reasoning_content": THOUGHTS})

    def writes(
        self, messages: Sequence[Mapping[str, Any]], *words: str, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> bool:
        """Whether a conversation can be rendered, and its prompt contains these texts."""
        text = self._render(messages, tools)
        return text is not None and all(word in text for word in words)

    def keeps_order(self, messages: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the texts of these messages, which are all different, are rendered in their order.

        A template that collects system messages at the beginning changes the prompt's beginning with each new one, so
        that the prefix cache cannot be used.
        """
        text = self._render(messages, _TOOLS if self.plain_prompt is None else None)
        places = [-1 if text is None else text.find(one["content"]) for one in messages]
        return -1 not in places and places == sorted(places)

    def shows_images(self, messages: Sequence[Mapping[str, Any]]) -> bool:
        """Whether an image of a tool result, the last message, is written like a user's image, or both are left out."""
        tools = None if self.prompt is None else _TOOLS
        mark = self._image_mark(tools) or self._image_mark(None)
        return not mark or self.writes([*messages[:-1], {**messages[-1], "content": _SEEN}], mark, tools=tools)

    def takes_image_parts(self) -> bool:
        """Whether an image part of a user's message is written, in prompts with and without tools."""
        given = ((_TOOLS, self.prompt), (None, self.plain_prompt))
        return all(self._image_mark(tools) for tools, text in given if text is not None)

    def _image_mark(self, tools: Sequence[Mapping[str, Any]] | None) -> str:
        """Return what the template writes for an image part of a user's message; "" for nothing, or for JSON of it."""
        seen, bare = (self._render([{**_ASK, "content": parts}], tools) or "" for parts in (_SEEN, _SEEN[::2]))
        before, _, after = seen.partition(CONTENT)
        same = sum(1 for _ in itertools.takewhile(lambda at: at[0] == at[1], zip(before, bare.partition(CONTENT)[0])))
        mark = after.partition(RESULT)[0].strip() or before[same:].strip()  # some write images before all texts
        return "" if "type" in mark else mark

    def wants_parts(self) -> bool:
        """Whether the template writes texts only if they are parts of a content."""
        if self.plain_prompt is not None and str(_ASK["content"]) in self.plain_prompt:
            return False
        parts = [{"type": "text", "text": _ASK["content"]}]
        return self.writes([{**_ASK, "content": parts}], str(_ASK["content"]))

    def _written(self, message: Mapping[str, Any]) -> Written | None:
        text = self._render([_ASK, message], _TOOLS, prompt=False)
        return None if text is None else split(self.prompt or "", text)

    def _render(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None, *, prompt: bool = True
    ) -> str | None:
        if self._seconds > _MOST_SECONDS:
            return None
        start = time.thread_time()
        try:
            return self._template.render(messages, tools=tools, add_generation_prompt=prompt)
        except ChatTemplateError:
            return None
        finally:
            self._seconds += time.thread_time() - start


def split(prompt: str, text: str) -> Written:
    """Split the rendering of a conversation where the model's answer to `prompt` begins."""
    pairs = enumerate(zip(prompt, text))
    size = next((place for place, (one, other) in pairs if one != other), min(len(prompt), len(text)))
    head = text[:size]
    if size < len(prompt):  # they differ within the prompt's last words; never split within a mark
        head = _HALF_MARK.sub("", head)
        rest = text[len(head) :]
        last = next((end for end in range(_MOST_LAST, 0, -1) if prompt.endswith(rest[:end])), 0)
        head += rest[:last]  # the prompt has more text before its last words, such as instructions
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
    return {"role": "assistant", "content": content, "tool_calls": calls}


_LONG_ID = "call_0123456789abcdef01234567"
_CITY, _OTHER_CITY = str(ARGUMENTS["city"]), str(OTHER_ARGUMENTS["city"])


@dataclasses.dataclass(frozen=True)
class TemplateNeeds:
    """Features of a chat template; `fit` and `fit_tools` rewrite what it does not support.

    Attributes:
        writes_tools: the prompt contains the tools that a request offers.
        ignores_tools: tools never change the prompt, not with a system message either.
        writes_calls: the prompt contains earlier tool calls; otherwise a call becomes text of the assistant's message.
        writes_results: the prompt contains tool results; otherwise a result becomes text of the user's turn.
        image_parts: images may be parts of a content; otherwise the content is a text with the model's placeholders.
        images_in_results: a tool result may have images; otherwise they become parts of a user's message.
        writes_reasoning: the prompt contains the reasoning of a last message that has tool calls.
        arguments_as_text: arguments of a call must be a JSON text; otherwise they must be an object.
        parallel_calls: a message may have several calls; otherwise each call gets its own message, with its result.
        content_beside_calls: a message's content is written beside its calls and reasoning, also in earlier turns;
            otherwise the content becomes a message of its own, or text of another one (`_say`).
        content_forbidden: a message's calls are written only if its content is null.
        short_ids: ids of calls must have nine letters or digits (Mistral).
        content_as_parts: a content must be a list of parts, even for one text.
        writes_system: a first system message is written; otherwise its text begins the first user message.
        system_alone: a system message is written if the conversation has no other message.
        system_behind_results: a first system message is written if a tool result ends the conversation.
        system_anywhere: later system messages are written in place; otherwise they become text of the user, in tags.
        user_behind_results: a user message may follow a tool result; otherwise its text is added to that result.
        user_first: the first message must be a user's; an empty user message is put before an assistant's message.
        roles_in_turn: two user messages with different names must not follow each other.
        empty_answers: an assistant message may be empty; otherwise it is left out.
        bare_tools: tools may lack description and parameters; otherwise empty ones are added.
        bare_schemas: parameters may lack descriptions, objects `additionalProperties`; otherwise empty ones are added.
        odd_schemas: a schema may be `true`, of type null, or of several types; otherwise it is simplified.
    """

    writes_tools: bool = False
    ignores_tools: bool = False
    writes_calls: bool = True
    writes_results: bool = True
    image_parts: bool = True
    images_in_results: bool = True
    writes_reasoning: bool = False
    arguments_as_text: bool = False
    parallel_calls: bool = True
    content_beside_calls: bool = True
    content_forbidden: bool = False
    short_ids: bool = False
    content_as_parts: bool = False
    writes_system: bool = True
    system_alone: bool = True
    system_behind_results: bool = True
    system_anywhere: bool = True
    user_behind_results: bool = True
    user_first: bool = False
    roles_in_turn: bool = False
    empty_answers: bool = True
    bare_tools: bool = True
    bare_schemas: bool = True
    odd_schemas: bool = True


def template_needs(probe: TemplateProbe) -> TemplateNeeds:
    """Find a template's features by at most some 25 renderings of small conversations.

    If a template does not even write a user's message, only its support of tools can be tested.
    """
    as_parts = probe.wants_parts()
    prompts = [text for text in (probe.prompt, probe.plain_prompt) if text is not None]
    if prompts and not as_parts and not any(str(_ASK["content"]) in text for text in prompts):
        return TemplateNeeds(**_of_tools(probe))
    both: dict[str, bool] = {"content_as_parts": as_parts, "image_parts": probe.takes_image_parts()}
    return TemplateNeeds(**both, **_of_roles(probe), **_of_tools(probe), **_of_calls(probe))


def _message(role: str, text: Any) -> dict[str, Any]:
    return {"role": role, "content": text}


def _of_roles(probe: TemplateProbe) -> dict[str, bool]:
    """Test messages without calls."""
    first, late, last = (_message("system", text) for text in ("Be kind.", "Be brief.", "Be exact."))
    answer, more = _message("assistant", CONTENT), _message("user", "Thanks.")
    tools = _TOOLS if probe.plain_prompt is None else None

    def takes(*messages: Mapping[str, Any]) -> bool:
        return probe.writes(messages, *(one["content"] for one in messages), tools=tools)

    return {
        "writes_system": takes(first, _ASK),
        "system_alone": takes(first) and (probe.prompt is None or probe.writes([first], "Be kind.", tools=_TOOLS)),
        "system_anywhere": probe.keeps_order([first, _ASK, late, answer, more, last]),
        "user_first": not takes(answer, more),
        "roles_in_turn": not takes({**_ASK, "name": "Ann"}, {**more, "name": "Ben"}),
        "empty_answers": takes(_ASK, _message("assistant", ""), more),
    }


def _of_tools(probe: TemplateProbe) -> dict[str, bool]:
    """Test tools."""
    shown = probe.prompt is not None and NAME in probe.prompt

    def takes(schema: Mapping[str, Any]) -> bool:
        function = {"name": NAME, "description": "Finds places.", "parameters": schema}
        return probe.writes([_ASK], NAME, tools=[{"type": "function", "function": function}])

    return {
        "writes_tools": shown and probe.plain_prompt is not None and NAME not in probe.plain_prompt,
        "ignores_tools": probe.prompt is not None
        and probe.prompt == probe.plain_prompt
        and not probe.writes([_message("system", "Be kind."), _ASK], NAME, tools=_TOOLS),
        "bare_tools": not shown or probe.writes([_ASK], NAME, tools=_BARE_TOOLS),
        "bare_schemas": not shown or takes(_BARE_SCHEMA),
        "odd_schemas": not shown or takes(_ODD_SCHEMA),
    }


def _of_calls(probe: TemplateProbe) -> dict[str, bool]:
    """Test calls and results."""
    content: str | None = ""
    if (as_text := _as_text(probe, content)) is None:
        content = None
        if (as_text := _as_text(probe, content)) is None:
            result = {"role": "tool", "tool_call_id": "callno001", "name": NAME, "content": RESULT}
            turn = [_ASK, _message("assistant", CONTENT), result]
            shown = probe.writes(turn, CONTENT, RESULT)
            return {"writes_calls": False, "writes_results": shown, "images_in_results": probe.shows_images(turn)}

    thinking = probe.calls(as_text=as_text, content=content, thoughts=THOUGHTS)
    two = probe.calls((ARGUMENTS, OTHER_ARGUMENTS), as_text=as_text, content=content)
    call = _calling((ARGUMENTS,), as_text, ("callno001",), content)
    result = {"role": "tool", "tool_call_id": "callno001", "name": NAME, "content": RESULT}
    system, answer, more = _message("system", "Be kind."), _message("assistant", "There."), _message("user", "Thanks.")
    first, said = {**call, "content": "I call."}, {**call, "content": CONTENT}
    turns = [
        [_ASK, first, result, one, result, answer, more] for one in (said, {**said, "reasoning_content": THOUGHTS})
    ]
    results = probe.writes([_ASK, call, result], RESULT, tools=_TOOLS)
    return {
        "writes_calls": True,
        "writes_results": results,
        "images_in_results": not results or probe.shows_images([_ASK, call, result]),
        "writes_reasoning": thinking is not None and _CITY in thinking.text and THOUGHTS in thinking.text,
        "arguments_as_text": as_text,
        "parallel_calls": two is not None and _CITY in two.text and _OTHER_CITY in two.text,
        "content_beside_calls": all(probe.writes(turn, _CITY, "I call.", CONTENT, tools=_TOOLS) for turn in turns),
        "content_forbidden": content is None,
        "short_ids": probe.calls(as_text=as_text, ids=(_LONG_ID,), content=content) is None,
        "system_behind_results": not results or probe.writes([system, _ASK, call, result], "Be kind.", tools=_TOOLS),
        "user_behind_results": not results or probe.writes([_ASK, call, result, more], RESULT, "Thanks.", tools=_TOOLS),
    }


def _as_text(probe: TemplateProbe, content: str | None) -> bool | None:
    """Whether arguments must be JSON text in a message with this content; None if calls are written in neither form."""
    given = probe.calls(content=content)
    if given is not None and _CITY in given.text and f"{{'{next(iter(ARGUMENTS))}'" not in given.text:
        return False
    text = probe.calls(as_text=True, content=content)
    if text is not None and _CITY in text.text:
        return True
    return False if given is not None and _CITY in given.text else None


def fit_tools(tools: Sequence[Mapping[str, Any]], needs: TemplateNeeds) -> list[dict[str, Any]]:
    """Rewrite tools to a form that the template supports; supported tools are unchanged."""
    made = list[dict[str, Any]]()
    for tool in tools:
        tool = dict(tool)
        if isinstance(tool.get("function"), Mapping):
            function = tool["function"] = dict(tool["function"])
            if not needs.bare_tools:
                function.setdefault("description", "")
                function["parameters"] = dict(function.get("parameters") or {})
                function["parameters"].setdefault("type", "object")
                function["parameters"].setdefault("properties", {})
            if not (needs.odd_schemas and needs.bare_schemas) and isinstance(function.get("parameters"), Mapping):
                function["parameters"] = _simple(function["parameters"], needs)
        made.append(tool)
    return made


def _simple(schema: Any, needs: TemplateNeeds, depth: int = 0) -> Any:
    """Simplify a schema to what macros of templates support, and add the keywords that they require."""
    if not isinstance(schema, Mapping) or depth > MAX_DEPTH:
        return schema if needs.odd_schemas else {}
    made = dict(schema)
    kinds = made.get("type")
    if not needs.odd_schemas and (isinstance(kinds, (list, tuple)) or kinds == "null"):
        named = [kind for kind in (kinds if kinds != "null" else ()) if kind != "null"]
        made["type"] = named[0] if named else "string"
        if kinds == "null" or "null" in kinds:
            made["nullable"] = True
        if len(named) > 1:
            made["description"] = f"{made.get('description') or ''} ({' or '.join(map(str, named))})".lstrip()
    if isinstance(properties := made.get("properties"), Mapping):
        made["properties"] = {name: _simple(each, needs, depth + 1) for name, each in properties.items()}
        for each in made["properties"].values() if not needs.bare_schemas else ():
            if isinstance(each, dict):
                each.setdefault("description", "")
                if each.get("type") == "object":
                    each.setdefault("additionalProperties", {})
    if "items" in made:
        made["items"] = _simple(made["items"], needs, depth + 1)
    for name in ("anyOf", "oneOf", "allOf"):
        if isinstance(made.get(name), (list, tuple)):
            made[name] = [_simple(each, needs, depth + 1) for each in made[name]]
    return made


def fit(rendered: list[dict[str, Any]], needs: TemplateNeeds, image: str = "") -> None:
    """Rewrite messages, in place, to a form that the template supports; contents, calls and images are kept.

    `image` is the model's placeholder of an image, for a template that takes no image parts.

    Consecutive messages of one role become one, except tool results, as in Anthropic's and Ollama's APIs: models expect
    alternating roles. Users of different names stay apart, unless the template needs `roles_in_turn`.
    """
    calls = any(message["role"] == "tool" or message.get("tool_calls") for message in rendered)
    said = [_as_said(message, needs) for message in rendered] if calls else rendered
    late = not needs.system_anywhere and any(message["role"] == "system" for message in said[1:])
    messages = _in_turn(_late_as_user(said) if late else said, needs)
    if calls and not needs.images_in_results:
        messages = _shown_by_users(messages, needs)
    last = messages[-1]["role"] if messages else None
    written = needs.system_alone if last == "system" else needs.system_behind_results if last == "tool" else True
    begun = [messages.pop(0)] if messages and messages[0]["role"] == "system" else []
    if needs.user_first and messages and messages[0]["role"] == "assistant":
        messages.insert(0, _message("user", ""))
    if begun and not (needs.writes_system and written):
        if not messages or messages[0]["role"] != "user":
            messages.insert(0, _message("user", ""))
        messages[0]["content"] = _joined(begun.pop()["content"], messages[0].get("content"), "\n\n")
    rendered[:] = _with_calls([*begun, *messages], needs) if calls else [*begun, *messages]
    for message in rendered if image and not needs.image_parts else ():
        parts = _parts(message.get("content"))
        if any(part.get("type") == "image" for part in parts):
            texts = (image if part.get("type") == "image" else part.get("text", "") for part in parts)
            message["content"] = "".join(texts)
    for message in rendered if needs.content_as_parts else ():
        if isinstance(message.get("content"), str):
            message["content"] = [{"type": "text", "text": message["content"]}]


def _as_said(message: dict[str, Any], needs: TemplateNeeds) -> dict[str, Any]:
    """Convert calls and results to text, if the template does not write them."""
    if message["role"] == "tool" and not needs.writes_results:
        content = _joined("<tool_response>", _joined(message.get("content"), "</tool_response>"))
        return {"role": "user", "content": content}
    if needs.writes_calls or not message.get("tool_calls"):
        return message
    functions = [call["function"] for call in message["tool_calls"]]
    named = [{"name": one.get("name"), "arguments": one.get("arguments")} for one in functions]
    calls = "\n".join(json.dumps(one, ensure_ascii=False) for one in named)
    kept = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**kept, "content": _joined(message.get("content"), calls)}


def _late_as_user(messages: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Convert system messages behind other messages to text of the user."""
    begun = False
    for message in messages:
        begun = begun or message["role"] != "system"
        if begun and message["role"] == "system":
            yield _message("user", _joined("<system>", _joined(message.get("content"), "</system>")))
        else:
            yield message


def _in_turn(messages: Iterable[dict[str, Any]], needs: TemplateNeeds) -> list[dict[str, Any]]:
    """Merge consecutive messages of a role but tool; where needed, drop empty answers, or add texts to results."""
    made = list[dict[str, Any]]()
    for message in messages:
        role, content = message["role"], message.get("content")
        last = made[-1] if made else None
        if role == "assistant" and not needs.empty_answers and not content and not message.get("tool_calls"):
            continue
        alike = last is not None and role == last["role"] and role in ("system", "user", "assistant")
        if last and alike and (role != "user" or needs.roles_in_turn or last.get("name") == message.get("name")):
            made[-1] = _one_of(last, message)
        elif last and last["role"] == "tool" and role == "user" and not needs.user_behind_results:
            made[-1] = {**last, "content": _joined(last.get("content"), content)}
        else:
            made.append(dict(message))
    return made


def _shown_by_users(messages: Iterable[dict[str, Any]], needs: TemplateNeeds) -> list[dict[str, Any]]:
    """Move images of tool results to the next user message or a new one, or to the last if none may follow a result."""
    made, images = list[dict[str, Any]](), list[Any]()
    for message in (*messages, _message("", "")):
        role, content = message["role"], message.get("content")
        if images and role != "tool":
            earlier = () if needs.user_behind_results else (one for one in reversed(made) if one["role"] == "user")
            if (user := next(iter(earlier), None)) is not None:
                user["content"] = _joined(user["content"], images)
            elif role == "user":
                message["content"] = _joined(images, content)
            else:
                made.append(_message("user", images))
            images = []
        parts = _parts(content) if role == "tool" else ()
        if own := [part for part in parts if part.get("type") == "image"]:
            images += own
            message["content"] = "\n".join(part.get("text", _ELSEWHERE) for part in parts)
        made.append(message)
    return made[:-1]


def _one_of(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Merge two messages of one role."""
    made = {**second, **first, "content": _joined(first.get("content"), second.get("content"))}
    thoughts = [one[name] for one in (first, second) for name in REASONING if one.get(name)]
    if thoughts:
        made = {name: value for name, value in made.items() if name not in REASONING}
        made["reasoning_content"] = "\n".join(dict.fromkeys(thoughts))
    calls = [call for one in (first, second) for call in one.get("tool_calls") or ()]
    return {**made, "tool_calls": calls} if calls else made


def _joined(first: Any, second: Any, between: str = "\n") -> Any:
    """Join two contents: to a text, or to a list if one of the two is a list of parts; texts that meet become one."""
    if not isinstance(first, (list, tuple)) and not isinstance(second, (list, tuple)):
        return between.join(filter(None, (first, second)))
    head, tail = _parts(first), _parts(second)
    if head and tail and head[-1].get("type") == tail[0].get("type") == "text":
        head.append({**tail[0], "text": between.join(filter(None, (head.pop()["text"], tail.pop(0)["text"])))})
    return [*head, *tail]


def _parts(content: Any) -> list[Any]:
    """Return a content as parts; callers in Python may put plain texts among them."""
    parts = content if isinstance(content, (list, tuple)) else [content] if content else []
    return [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]


def _with_calls(messages: Sequence[dict[str, Any]], needs: TemplateNeeds) -> list[dict[str, Any]]:
    """Convert calls and their results to the supported form; split messages with calls that it cannot hold."""
    made = list[dict[str, Any]]()
    left = list(reversed(messages))
    while left:
        message = left.pop()
        calls = message.get("tool_calls")
        if calls and message.get("content") and not needs.content_beside_calls:
            _say(message["content"], made, left, needs)
            message = {**message, "content": ""}
        if not calls or len(calls) == 1 or needs.parallel_calls:
            made.append(message)
            continue
        calls = list(calls)
        while calls or (left and left[-1]["role"] == "tool"):  # results keep their order, and so their images
            result = left.pop() if left and left[-1]["role"] == "tool" else None
            wanted = None if result is None else result.get("tool_call_id")
            own = next((n for n, one in enumerate(calls) if result is None or one.get("id") == wanted), None)
            if own is not None:
                made.append({**message, "tool_calls": [calls.pop(own)]})
                message = _message("assistant", "")
            if result is not None:
                made.append(result)
    for message in made:
        if needs.content_forbidden and message.get("tool_calls") and not message.get("content"):
            message["content"] = None
        if needs.short_ids and isinstance(message.get("tool_call_id"), str):
            message["tool_call_id"] = short_id(message["tool_call_id"])
        if message.get("tool_calls"):
            message["tool_calls"] = [_fitting_call(call, needs) for call in message["tool_calls"]]
    return made


def _say(content: Any, made: list[dict[str, Any]], left: list[dict[str, Any]], needs: TemplateNeeds) -> None:
    """Move content of a message with calls to a new one before it; with `roles_in_turn`, to one of the same turn.

    `left` are the messages after this one, in reverse order.
    """
    if needs.roles_in_turn:
        for place in range(len(left) - 1, -1, -1):
            if left[place]["role"] == "assistant" and not left[place].get("tool_calls"):
                left[place] = {**left[place], "content": _joined(content, left[place].get("content"))}
                return
            if left[place]["role"] == "user":
                break
        for place in range(len(made) - 1, -1, -1):
            if made[place]["role"] == "assistant" and not made[place].get("tool_calls"):
                made[place] = {**made[place], "content": _joined(made[place]["content"], content)}
                return
            if made[place]["role"] == "user":
                break
    made.append(_message("assistant", content))


def _fitting_call(call: Mapping[str, Any], needs: TemplateNeeds) -> dict[str, Any]:
    function = call["function"]
    arguments = function.get("arguments")
    if needs.arguments_as_text:
        arguments = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    elif arguments is not None and not isinstance(arguments, Mapping):
        arguments = _as_object(arguments)
    made = {**call, "function": {**function, "arguments": arguments} if arguments is not None else dict(function)}
    if needs.short_ids and isinstance(call.get("id"), str):
        made["id"] = short_id(call["id"])
    return made


def _as_object(arguments: Any) -> dict[str, Any]:
    """Convert arguments to an object: parse a text, also a truncated one; empty: {}; others go under `INVALID`."""
    if isinstance(arguments, str):
        for text in (arguments, *_closed(arguments)):
            try:
                value = json.loads(text, parse_constant=str)
            except (ValueError, RecursionError):
                continue
            if isinstance(value, dict):
                return value
    return {INVALID: arguments} if arguments else {}


def _closed(text: str) -> Iterator[str]:
    """Yield possible completions of a truncated JSON text."""
    closing, quoted, escaped = list[str](), False, False
    for character in text:
        if quoted:
            quoted = escaped or character != '"'
            escaped = character == "\\" and not escaped
        elif character == '"':
            quoted = True
        elif character in "{[":
            closing.append("}" if character == "{" else "]")
        elif character in "}]" and (not closing or closing.pop() != character):
            return
    if not closing:
        return
    ends = "".join(reversed(closing))
    if quoted:
        for begun in (text, _CUT_ESCAPE.sub("", text)):
            yield from (f'{begun}"{ends}', f'{begun}": null{ends}')
        return
    text = text.rstrip()
    yield from (f"{text.removesuffix(',')}{ends}", f"{text} null{ends}", f"{text}: null{ends}")
    begun = text.rstrip(_WORD)
    yield f"{begun}{json.dumps(text[len(begun) :])}{ends}"


def short_id(given: str) -> str:
    """Return an id of nine letters and digits: the id itself if it has this form, otherwise a hash of it."""
    if _SHORT_ID.fullmatch(given):
        return given
    return hashlib.blake2s(given.encode(), digest_size=8).hexdigest()[:9]
