# SPDX-License-Identifier: MIT
"""Render conversations with a model's chat template (step 3 of a request).

The rules are those of transformers' `apply_chat_template`, so that a template renders here as it does there. Templates
come with model files: they run in a sandbox with limits (`template_sandbox`), and any error in one is a
`ChatTemplateError` of the request that used it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateSyntaxError, meta, nodes
from jinja2.exceptions import TemplateError

from candle_vllm.core.errors import ChatTemplateError, InvalidParameterError, UnsupportedModelError
from candle_vllm.core.setting_kinds import MAX_TEMPLATE
from candle_vllm.core.text.template_limits import MAX_TEXT, Budget, BudgetExceededError, current_budget
from candle_vllm.core.text.template_sandbox import Sandbox

MAX_DEPTH = 64  # levels of lists and objects in the data that a template receives
REASONING = ("reasoning_content", "thinking", "reasoning")  # keys of a message's reasoning
_HALF = re.compile("[\ud800-\udfff]")
_TAG = "CONTINUE_FINAL_MESSAGE_TAG "

Message = Mapping[str, Any]


class ChatTemplate:
    """Chat template of a model: one text, or several by name.

    "tool_use" is used for a request with tools, "rag" for one with documents, if the model has it; otherwise "default".

    Attributes:
        supports_tools: a template reads `tools`, or is named "tool_use".
        source: the template's text, or texts by name.
        roles: roles that the template compares messages with.
        words: every attribute name and string in the template's code, among them the keys that it reads.

    Raises:
        UnsupportedModelError: a template is not a text, is too long, or cannot be compiled.
    """

    def __init__(self, source: str | Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        self.source = source if isinstance(source, str) else dict(source)
        self._sources = {"default": source} if isinstance(source, str) else dict(source)
        self._special_tokens = dict(special_tokens)
        self._templates: dict[str, Any] = {}
        self.supports_tools = "tool_use" in self._sources
        self._reads: dict[str, set[str]] = {}  # variables that each template reads
        self.roles, self.words = set[str](), set[str]()
        sandbox = Sandbox()
        for name, text in self._sources.items():
            self._compile(sandbox, name, text)

    def replaced(self, old: str, new: str) -> ChatTemplate:
        """Return the templates with `new` in place of each `old` in their source."""
        texts = {name: text.replace(old, new) for name, text in self._sources.items()}
        return ChatTemplate(texts["default"] if isinstance(self.source, str) else texts, self._special_tokens)

    @property
    def variables(self) -> set[str]:
        """Variables that the templates read."""
        return set().union(*self._reads.values())

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **kwargs: Any,
    ) -> str:
        """Render the prompt of a conversation.

        Args:
            messages: objects with `role`, `content` and other keys that the template reads; not changed.
            tools: tools in the format of OpenAI's API.
            documents: objects with `title` and `text`.
            add_generation_prompt: end with the text that opens the assistant's answer.
            continue_final_message: leave the last message open, for the model to continue it.
            kwargs: further variables of the template.

        Raises:
            InvalidParameterError: an argument is no JSON data or has the wrong type, or both flags are set.
            ChatTemplateError: the template is missing, refuses or cannot write the conversation, or exceeds a limit.
        """
        if continue_final_message and add_generation_prompt:
            raise InvalidParameterError(
                "continue_final_message and add_generation_prompt exclude each other: set add_generation_prompt to "
                "false to continue the last message",
                "continue_final_message",
            )
        name = self._choose(tools, documents)
        if documents and "documents" not in self._reads[name]:
            raise ChatTemplateError(
                "the model's chat template does not read documents, so the model would not see them: put their text "
                "into a message",
                "documents",
            )
        conversation = _conversation(messages)
        ending = _mark_ending(conversation, self._sources[name]) if continue_final_message else None
        variables = {
            **self._special_tokens,
            **_plain("chat_template_kwargs", kwargs),
            "messages": conversation,
            "tools": None if tools is None else _objects("tools", tools),
            "documents": None if documents is None else _objects("documents", documents),
            "add_generation_prompt": add_generation_prompt,
        }
        text = self._run(name, variables)
        return text if ending is None else _cut_at_tag(text, ending)

    def _compile(self, sandbox: Sandbox, name: str, text: str) -> None:
        if not isinstance(text, str) or len(text) > MAX_TEMPLATE:
            size = f"{len(text)} characters" if isinstance(text, str) else type(text).__name__
            raise UnsupportedModelError(
                f"the chat template {name!r:.60} must be a text of at most {MAX_TEMPLATE} characters, not {size}"
            )
        token = current_budget.set(Budget())
        try:
            tree = sandbox.parse(text)
            self._reads[name] = meta.find_undeclared_variables(tree)
            self._note_words(tree)
            self.supports_tools = self.supports_tools or "tools" in self._reads[name]
            self._templates[name] = sandbox.compile_template(tree)
        except TemplateSyntaxError as error:
            raise UnsupportedModelError(
                f"the chat template {name!r:.60} has an error in line {error.lineno}: {error.message}"
            ) from None
        except (TemplateError, SyntaxError, RecursionError, MemoryError, ValueError, OverflowError) as error:
            raise UnsupportedModelError(
                f"the chat template {name!r:.60} cannot be compiled: {type(error).__name__}: {error}"
            ) from None
        finally:
            current_budget.reset(token)

    def _note_words(self, tree: nodes.Node) -> None:
        left = [tree]
        while left:
            node = left.pop()
            left.extend(node.iter_child_nodes())
            if isinstance(node, nodes.Const) and isinstance(node.value, str):
                self.words.add(node.value)
            elif isinstance(node, nodes.Getattr):
                self.words.add(node.attr)
            elif isinstance(node, nodes.Compare):
                sides = [node.expr, *(each.expr for each in node.ops)]
                if any(map(_is_role, sides)):
                    values = [value for side in sides for value in (side, *side.iter_child_nodes())]
                    self.roles |= {
                        value.value
                        for value in values
                        if isinstance(value, nodes.Const) and isinstance(value.value, str) and value.value != "role"
                    }

    def _choose(self, tools: object, documents: object) -> str:
        for name, wanted in (("tool_use", tools), ("rag", documents)):
            if wanted is not None and name in self._sources:
                return name
        if "default" not in self._sources:
            names = ", ".join(sorted(self._sources)) or "none"
            raise ChatTemplateError(f"the model's chat templates are {names}; this conversation needs 'default'")
        return "default"

    def _run(self, name: str, variables: dict[str, Any]) -> str:
        token = current_budget.set(Budget(len(variables["messages"]) + len(variables["tools"] or ())))
        try:
            pieces, length = [], 0
            for piece in self._templates[name].generate(variables):
                length += len(piece)
                if length > MAX_TEXT:
                    raise BudgetExceededError(f"the prompt has more than {MAX_TEXT} characters")
                pieces.append(piece)
            return _whole_characters("".join(pieces))
        except BudgetExceededError as error:
            raise ChatTemplateError(f"the model's chat template was stopped: {error}", "messages") from None
        except TemplateError as error:
            raise ChatTemplateError(f"the model's chat template refused the messages: {error}", "messages") from None
        except Exception as error:  # any exception is the template's error, never the server's
            reason = f"{type(error).__name__}: {error}"
            raise ChatTemplateError(f"the model's chat template failed: {reason:.500}", "messages") from error
        finally:
            current_budget.reset(token)


def _whole_characters(text: str) -> str:
    """Replace halves of surrogate pairs, which no tokenizer accepts; JSON escapes can contain them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return _HALF.sub("\ufffd", text)
    return text


def _is_role(side: nodes.Node) -> bool:
    """Whether one side of a comparison is a message's role."""
    while isinstance(side, nodes.Filter) and side.node is not None:
        side = side.node
    if isinstance(side, nodes.Getitem):
        return isinstance(side.arg, nodes.Const) and side.arg.value == "role"
    return "role" in (
        side.attr if isinstance(side, nodes.Getattr) else side.name if isinstance(side, nodes.Name) else ""
    )


def _conversation(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Copy messages for the template: plain data, with reasoning as both `reasoning_content` and `thinking`.

    Keys without a value are left out except `content`: some templates test whether it is None.
    """
    if not messages:
        raise InvalidParameterError("messages must hold at least one message", "messages")
    conversation = []
    for message in _objects("messages", messages):
        kept = {key: value for key, value in message.items() if value is not None or key == "content"}
        reasoning = next((kept[key] for key in REASONING if key in kept), None)
        if reasoning is not None:
            kept = {"thinking": reasoning, **kept, "reasoning_content": reasoning}
        conversation.append(kept)
    return conversation


def _objects(name: str, values: object) -> list[dict[str, Any]]:
    plain = _plain(name, values)
    if not isinstance(plain, list) or not all(isinstance(value, dict) for value in plain):
        raise InvalidParameterError(f"{name} must be a list of objects", name)
    return plain


def _plain(name: str, value: Any, depth: int = 0) -> Any:
    """Copy JSON-like data deeply; no object with its own methods reaches a template."""
    if depth > MAX_DEPTH:
        raise InvalidParameterError(f"{name} is nested more than {MAX_DEPTH} deep", name)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping) and not any(isinstance(key, (Mapping, tuple)) for key in value):
        return {_plain(name, key, depth + 1): _plain(name, item, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(name, item, depth + 1) for item in value]
    raise InvalidParameterError(f"{name} must be JSON data with string keys; this {type(value).__name__} is not", name)


def _mark_ending(conversation: list[dict[str, Any]], template: str) -> str:
    """Append a tag to the last message's text; return the text without the tag."""
    last = conversation[-1]
    content = last.get("content")
    if isinstance(content, list):
        block = next((b for b in reversed(content) if isinstance(b, dict) and isinstance(b.get("text"), str)), None)
        if block is not None:
            ending = block["text"]
            block["text"] = ending + _TAG
            return ending
    elif isinstance(content, str) and "content" in template:
        last["content"] = content + _TAG
        return content
    raise ChatTemplateError(
        "continue_final_message needs a last message with text, and a template that writes message contents", "messages"
    )


def _cut_at_tag(text: str, ending: str) -> str:
    tag = _TAG.strip()
    if tag not in text or ending.strip() not in text:
        raise ChatTemplateError(
            "continue_final_message: the model's template does not write the last message as it is, so it cannot be "
            "continued; send the conversation without the flag",
            "continue_final_message",
        )
    place = text.rindex(tag)
    # If the template trims messages, the tag's last space is missing; then trim the text before the tag as well.
    return text[:place] if text[place : place + len(_TAG)] == _TAG else text[:place].rstrip()
