# SPDX-License-Identifier: MIT
"""Check prompts and messages of library callers, and convert them for chat templates (steps 1 and 3)."""

from __future__ import annotations

import json
import operator
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from numbers import Integral
from typing import Any, Required, TypedDict

from candle_vllm.core.arguments import refuse_lost
from candle_vllm.core.errors import ChatTemplateError, InvalidParameterError
from candle_vllm.core.setting_kinds import nearest
from candle_vllm.core.text.chat_template import ChatTemplate
from candle_vllm.core.text.template_needs import TemplateNeeds, TemplateProbe, fit, fit_tools, template_needs
from candle_vllm.core.vision.fetching import ImageAddress
from candle_vllm.core.vision.pictures import part_address, part_picture

Prompt = str | Sequence[int] | Mapping[str, Any]
Message = Mapping[str, Any]


class TextPrompt(TypedDict):
    """A prompt as a text."""

    prompt: str


class TokensPrompt(TypedDict, total=False):
    """A prompt as token ids, with or without its text."""

    prompt_token_ids: Required[Sequence[int]]
    prompt: str


_MESSAGES = 'messages, such as [{"role": "user", "content": "Hello"}]'
ROLES = ("system", "developer", "user", "assistant", "tool")
_CHAT_OPTIONS = (
    "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template", "chat_template_kwargs",
)  # fmt: skip
_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "reasoning", "thinking",
         "refusal", "parsed")  # fmt: skip
_PART_KEYS = ("type", "text", "refusal", "cache_control", "prompt_cache_breakpoint")
_TEXTS = ("text", "input_text", "output_text", "refusal")  # kinds of parts
_PICTURES = ("image", "image_url", "input_image", "image_pil")
_PICTURE_KEYS = (*_PICTURES, *_PART_KEYS[3:], "type", "url", "path", "base64", "detail", "uuid")
_MEDIA = ("image", "video", "audio", "file")
_WITHOUT_CONTENT = ("tool_calls", "function_call", "reasoning_content", "thinking", "reasoning", "refusal")
_OLD = {"function_call": "write tool_calls, with an id", "functions": "pass tools"}
_PROMPT_KEYS = {
    "cache_salt": "it is a field of SamplingParams",
    "multi_modal_data": "the model takes text only",
    "mm_processor_kwargs": "images are preprocessed as the model's files define",
    "prompt_embeds": "a prompt is a text or token ids",
}


def read_prompt(prompt: Any, *, sees: bool = False) -> tuple[str | None, list[int] | None, list[Any]]:
    """Return a prompt's text and its token ids, one of which may be missing, and its images.

    Args:
        prompt: a text, a list of token ids (a numpy array as well), or vLLM's objects with `prompt`, with
            `prompt_token_ids`, or with both, in which case the ids are used.
        sees: the model accepts images: objects may have `multi_modal_data` with `image`, one image or a list.

    Raises:
        InvalidParameterError: the prompt or its `multi_modal_data` has another key or type.
    """
    if isinstance(prompt, str):
        return prompt, None, []
    if not isinstance(prompt, Mapping):
        return None, as_token_ids(prompt), []
    if "role" in prompt:
        raise InvalidParameterError("this is a message of a conversation: use chat", "prompt")
    text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
    known = ("prompt", "prompt_token_ids", *(("multi_modal_data",) if sees else ()))
    for name in prompt:
        if name not in known and prompt[name] is not None:
            said = _PROMPT_KEYS.get(name, "a prompt has prompt or prompt_token_ids")
            raise InvalidParameterError(f"a prompt has no {name!r:.60}: {said}", "prompt")
    if not isinstance(text, (str, type(None))) or (text is None and ids is None):
        raise InvalidParameterError("a prompt that is an object has a text as prompt, or prompt_token_ids", "prompt")
    return text, None if ids is None else as_token_ids(ids), _pictures(prompt.get("multi_modal_data"))


def _pictures(data: Any) -> list[Any]:
    if data is None:
        return []
    if not isinstance(data, Mapping):
        raise InvalidParameterError(f"multi_modal_data must be an object with image, not {_kind(data)}", "prompt")
    other = next((name for name in data if name != "image" and data[name] is not None), None)
    if other is not None:
        raise InvalidParameterError(f"multi_modal_data has {str(other)!r:.60}: only images are supported", "prompt")
    images = data.get("image")
    return [] if images is None else list(images) if isinstance(images, (list, tuple)) else [images]


def as_token_ids(prompt: Any) -> list[int]:
    """Convert a prompt of token ids to a list; any iterable of integers is accepted, such as a numpy array."""
    if type(prompt) in (list, tuple) and set(map(type, prompt)) <= {int}:
        return list(prompt)  # no Python loop over a million ids, which would delay a server's other requests
    try:
        tokens = list(prompt)  # `prompt` may be an iterator
        if isinstance(prompt, (bytes, bytearray, Mapping)) or any(isinstance(token, bool) for token in tokens):
            raise TypeError
        return [operator.index(token) for token in tokens]
    except TypeError:
        raise InvalidParameterError("a prompt is a text or a list of token ids", "prompt") from None


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Return one prompt, or several, as a list."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    if isinstance(prompts, (bytes, bytearray)) or not isinstance(prompts, Iterable):
        raise InvalidParameterError(f"prompts are texts or lists of token ids, not {_kind(prompts)}", "prompts")
    items = list(prompts)
    return [items] if items and all(isinstance(item, Integral) for item in items) else items  # type: ignore[list-item]


def as_conversations(
    messages: Any, template: ChatTemplate | None = None, *, sees: bool = False
) -> tuple[list[list[Message]], bool]:
    """Check conversations; return them, and whether a list of conversations was given rather than one.

    Args:
        template: the chat template, which may accept more roles and keys than OpenAI's API.
        sees: the model accepts images in messages.

    Raises:
        InvalidParameterError: an invalid message; the error begins with its path, `messages[2].content`.
    """
    items = _list_of("messages", messages, _MESSAGES)
    if not items:
        raise _wrong("messages", "must hold at least one message")
    if isinstance(items[0], (str, bytes, Mapping)) or not isinstance(items[0], Iterable):
        return [_conversation("messages", items, template, sees)], False
    return [
        _conversation(f"messages[{place}]", _list_of(f"messages[{place}]", each, _MESSAGES), template, sees)
        for place, each in enumerate(items)
    ], True


def one_conversation(messages: Any, template: ChatTemplate | None = None, *, sees: bool = False) -> list[Message]:
    """Check one conversation, as `as_conversations`."""
    conversations, several = as_conversations(messages, template, sees=sees)
    if several:
        raise InvalidParameterError("messages: must be one conversation, not a list of them", "messages")
    return conversations[0]


def template_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Convert checked messages of OpenAI's API to those that chat templates expect.

    Text parts and a refusal are joined to one text, one per line; with images, or parts that only the template knows,
    they stay parts. A missing content becomes "", and the role developer becomes system. Arguments that are the JSON
    text of an object become that object, and a tool's result gets the function's name. `fit` adapts messages further.
    """
    names: dict[Any, Any] = {}
    made: list[dict[str, Any]] = []
    for message in messages:
        new = dict(message)
        if new["role"] == "developer":
            new["role"] = "system"
        if isinstance(new.get("content"), (list, tuple)) and any(map(_is_picture, new["content"])):
            new["content"] = [_template_part(part) for part in new["content"]]
        texts = _texts(new.get("content"))
        if texts is not None:
            new["content"] = "\n".join(filter(None, (*texts, refusal)) if (refusal := new.get("refusal")) else texts)
        new.pop("refusal", None)
        new.pop("parsed", None)
        if new.get("tool_calls"):
            new["tool_calls"] = [_template_call(call) for call in new["tool_calls"]]
            names |= {call.get("id"): call["function"].get("name") for call in new["tool_calls"]}
        if new["role"] == "tool" and new.get("name") is None and new.get("tool_call_id") in names:
            new["name"] = names[new["tool_call_id"]]
        made.append(new)
    return made


def prompt_texts(
    method: str,
    conversations: Sequence[Sequence[Message]],
    template: ChatTemplate,
    options: Mapping[str, Any],
    within: Mapping[str, Iterable[str]],
    image: str = "",
) -> list[str]:
    """Render the prompts of checked conversations; an image becomes the placeholder of the template or of the model.

    Args:
        method: name of the called method, to which `options` were given.
        within: names of fields by the class that has them, for errors; see `arguments.unknown_name`.
        image: the model's placeholder of an image; see `template_needs.fit`.

    Raises:
        TypeError: an option is unknown, and is not a variable of the template.
        InvalidParameterError: an option is invalid, or `chat_template_kwargs` has the name of an option.
        ChatTemplateError: as in `ChatTemplate.render`, or the template does not read the tools.
    """
    refuse_lost(method, options, (*_CHAT_OPTIONS, "use_tqdm"), template.variables, within)
    variables = options.get("chat_template_kwargs") or {}
    if not isinstance(variables, Mapping) or not all(isinstance(name, str) for name in variables):
        raise InvalidParameterError("chat_template_kwargs must be variables by name", "chat_template_kwargs")
    given = {name: value for name, value in options.items() if not name.startswith("chat_template")}
    twice = variables.keys() & {*given, *_CHAT_OPTIONS, "messages"}
    if twice:
        raise InvalidParameterError(
            f"chat_template_kwargs has {min(twice)!r:.60}, which is an argument of its own", "chat_template_kwargs"
        )
    # `apply_chat_template` returns the prompt, so its caller sees that tools are missing, and may force calls anyway.
    if options.get("tools") and not template.supports_tools and method != "apply_chat_template":
        raise ChatTemplateError("the chat template does not read tools, so the model would not see them", "tools")
    made, needs = [template_messages(each) for each in conversations], needs_of(template)
    for each in made:
        fit(each, needs, image)
    if isinstance(given.get("tools"), (list, tuple)) and all(isinstance(tool, Mapping) for tool in given["tools"]):
        given["tools"] = fit_tools(given["tools"], needs)
    return [template.render(each, **given, **variables) for each in made]


@lru_cache(maxsize=4)
def needs_of(template: ChatTemplate) -> TemplateNeeds:
    """Return `template_needs` of a template; the results of the last four templates are cached."""
    return template_needs(TemplateProbe(template))


def _texts(content: Any) -> list[str] | None:
    """Return the texts of a content; None if it has images, or parts that only the template knows."""
    if content is None:
        return [""]
    if isinstance(content, str):
        return [content]
    parts = [{"text": part} if isinstance(part, str) else part for part in content]
    if not all(part.get("type", "text") in _TEXTS for part in parts):
        return None
    return [part["refusal"] if part.get("type") == "refusal" else part["text"] for part in parts]


def _is_picture(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") in _PICTURES


def _template_part(part: Any) -> dict[str, Any]:
    """Convert a content part of a message with images to a part that templates know."""
    if _is_picture(part):
        return {"type": "image"}
    if isinstance(part, str):
        return {"type": "text", "text": part}
    return {"type": "text", "text": part["text"]} if part.get("type", "text") in _TEXTS[:3] else dict(part)


def pictures_of(conversation: Sequence[Message], place: str = "messages") -> list[object]:
    """Return the images of a checked conversation in order, as `picture_of` accepts them.

    Raises InvalidParameterError for an image part without an image.
    """
    return [part_picture(part, where) for part, where in _picture_parts(conversation, place)]


def addresses_of(conversation: Sequence[Message], place: str = "messages") -> list[ImageAddress]:
    """Return the addresses of a checked conversation's images that have a URL."""
    found = ((part_address(part), where) for part, where in _picture_parts(conversation, place))
    return [ImageAddress(source, where) for source, where in found if source is not None]


def with_files(conversation: Sequence[Message], files: Iterable[bytes]) -> list[Message]:
    """Return a conversation in which `files`, in the order of `addresses_of`, replace the images with a URL."""
    left = iter(files)

    def loaded(part: Any) -> Any:
        found = _is_picture(part) and part_address(part) is not None
        return {"type": "image", "image": next(left)} if found else part

    return [
        {**message, "content": [loaded(part) for part in message["content"]]}
        if isinstance(message.get("content"), (list, tuple))
        else message
        for message in conversation
    ]


def _picture_parts(conversation: Sequence[Message], place: str) -> Iterable[tuple[Mapping[str, Any], str]]:
    return (
        (part, f"{place}[{number}].content[{index}]")
        for number, message in enumerate(conversation)
        if isinstance(message.get("content"), (list, tuple))
        for index, part in enumerate(message["content"])
        if _is_picture(part)
    )


def _template_call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = dict(call.get("function") or {name: call[name] for name in ("name", "arguments") if name in call})
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            value = json.loads(arguments.strip() or "{}", parse_constant=_no_number)
        except (ValueError, RecursionError):
            value = arguments
        function["arguments"] = {} if value is None else value if isinstance(value, dict) else arguments
    named = {name: call[name] for name in call if name not in ("name", "arguments", "index")}
    return {**named, "type": call.get("type") or "function", "function": function}


def _no_number(name: str) -> Any:
    raise ValueError(name)


def _conversation(place: str, messages: list[Any], template: ChatTemplate | None, sees: bool) -> list[Message]:
    if not messages:
        raise _wrong(place, "must hold at least one message")
    for number, message in enumerate(messages):
        _check_message(f"{place}[{number}]", message, template, sees)
    return messages


def _check_message(place: str, message: Any, template: ChatTemplate | None, sees: bool) -> None:
    roles, words = (set[str](), set[str]()) if template is None else (template.roles, template.words)
    if not isinstance(message, Mapping):
        raise _wrong(place, f"must be an object with role and content, not {_kind(message)}")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        said = f"must be a text, not {_kind(role)}" if role else "is missing"
        raise _wrong(f"{place}.role", f"{said}: system, user, assistant or tool")
    if role not in ROLES and role not in roles:
        known = f"the roles are {', '.join(ROLES[:-1])} and {ROLES[-1]}"
        raise _wrong(f"{place}.role", f"{role!r:.60} is no role{nearest(role[:60], ROLES)}; {known}")
    _check_keys(place, message, _KEYS, words, "message")
    if content is None:
        if not any(message.get(name) for name in _WITHOUT_CONTENT):
            raise _wrong(f"{place}.content", "is missing, and there are no tool_calls either")
    elif not isinstance(content, str):
        for number, part in enumerate(_list_of(f"{place}.content", content, "parts, or a text")):
            _check_part(f"{place}.content[{number}]", part, words, sees)
    for number, call in enumerate(_list_of(f"{place}.tool_calls", message.get("tool_calls") or (), "calls")):
        if not isinstance(call, Mapping):
            raise _wrong(f"{place}.tool_calls[{number}]", f"must be an object, not {_kind(call)}")
        if not isinstance(call.get("function") or call, Mapping):
            raise _wrong(f"{place}.tool_calls[{number}].function", f"must be an object, not {_kind(call['function'])}")


def _check_keys(place: str, given: Mapping[Any, Any], known: tuple[str, ...], words: set[str], what: str) -> None:
    """Refuse keys that neither API nor template knows, unless the value is None or [], as clients send answers back."""
    for key, value in given.items():
        if key not in known and key not in words and value is not None and value != []:
            name = str(key)[:60]
            said = _OLD.get(name) or f"neither the API nor the model's chat template has it{nearest(name, known)}"
            raise _wrong(f"{place}.{name}", f"a {what} has no {name!r}: {said}")


def _check_part(place: str, part: Any, words: set[str], sees: bool) -> None:
    if isinstance(part, str):
        return
    if not isinstance(part, Mapping):
        raise _wrong(place, f"must be an object with type and text, not {_kind(part)}")
    kind = part.get("type", "text")
    if sees and _is_picture(part):
        _check_keys(place, part, _PICTURE_KEYS, set(), "part with an image")
        return
    if not isinstance(kind, str) or kind.removeprefix("input_").startswith(_MEDIA):
        raise _wrong(place, f"is of type {kind!r:.60}, but only text {'and images are' if sees else 'is'} supported")
    if kind not in _TEXTS and kind not in words:
        raise _wrong(place, f"is of type {kind!r:.60}: parts are of type 'text'")
    name = "refusal" if kind == "refusal" else "text"
    if kind in _TEXTS and not isinstance(part.get(name), str):
        raise _wrong(f"{place}.{name}", f"must be a text, not {_kind(part.get(name))}")
    _check_keys(place, part, _PART_KEYS, words, "part")


def _list_of(place: str, value: Any, what: str) -> list[Any]:
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise _wrong(place, f"must be a list of {what}, not {_kind(value)}")
    return list(value)


def _kind(value: object) -> str:
    return "None" if value is None else type(value).__name__


def _wrong(place: str, said: str) -> InvalidParameterError:
    return InvalidParameterError(f"{place}: {said}", place)
