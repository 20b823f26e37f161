# SPDX-License-Identifier: MIT
"""What a request asks for, in the form of no API (step 2).

Each API validates its requests and converts them to a `Task`; prompts, parameters, grammars and plans are made from it
alone. Errors that are found later name fields of the task, and `Paths` has their names in the request.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import msgspec

from candle_vllm.core.errors import InvalidParameterError, RequestError
from candle_vllm.core.sampling.structured import StructuredOutputsParams


class TextPart(NamedTuple):
    """Text of a message."""

    text: str


class ImagePart(NamedTuple):
    """An image in a message.

    Attributes:
        source: address of the image, or a data URL.
        detail: requested level of detail; no effect.
        path: path of the image in the request, for errors.
        stored: whether the source is the id of a stored file.
    """

    source: str
    detail: str | None = None
    path: str = "messages"
    stored: bool = False


Part = TextPart | ImagePart

MEDIA_MARK = "<__media__>"
"""Mark of an image in a text prompt, for every model; the same as llama.cpp's."""


class Call(msgspec.Struct, frozen=True):
    """A call in an earlier answer; `arguments` are JSON text as the model wrote it, which may be invalid."""

    id: str
    name: str
    arguments: str


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """A message of a conversation.

    Attributes:
        parts: content; text parts are joined by line breaks.
        thoughts, calls: reasoning and tool calls of an assistant message.
        call_id: the call that a tool message answers.
        name: name of the participant, or of the function that answers.
    """

    role: Literal["system", "user", "assistant", "tool"]
    parts: tuple[Part, ...] = ()
    thoughts: str | None = None
    calls: tuple[Call, ...] = ()
    call_id: str | None = None
    name: str | None = None


class ToolFunction(msgspec.Struct, frozen=True):
    """A function for parsers and grammars.

    Attributes:
        parameters: a JSON schema that has `"type": "object"`; without properties if the request gave no parameters.
        strict: whether the arguments must follow the schema even if the model chooses to call.
        grammar: Lark grammar of the function's only argument, a text; enforced if the format of calls allows it.
    """

    name: str
    description: str | None
    parameters: dict[str, Any]
    strict: bool
    grammar: str | None = None


class ToolUse(msgspec.Struct, frozen=True, kw_only=True):
    """Tools of a request, and how they may be called.

    Attributes:
        tools: the functions that may be called; empty in mode `none`.
        mode: `none`, `auto` (the model chooses) or `required` (at least one call).
        parallel: whether more than one call is allowed.
        named: the one function that must be called, exactly once; the mode is then `required`.
        shown: the tools for the chat template: all tools of the request, even if only some may be called.
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
        """Return the choice for later turns: a model that always has to call a tool would never answer."""
        return self if self.mode == "none" else Choice(names=self.names)

    def among(
        self, functions: Sequence[ToolFunction], shown: Sequence[dict[str, Any]], *, parallel: bool | None
    ) -> ToolUse:
        """Return the tool use of a request with these tools.

        If no tool may be called, the template shows no tools, so that the model does not write a call as text.

        Raises:
            InvalidParameterError: a tool must be called, and the request has no tools.
        """
        if not functions and self.mode == "required":
            raise InvalidParameterError("tool_choice needs tools: there is nothing to choose from", "tool_choice")
        if not functions or self.mode == "none":
            return ToolUse()
        names = self.names if self.named is None else (self.named,)
        return ToolUse(
            tools=tuple(one for one in functions if names is None or one.name in names),
            mode=self.mode,
            parallel=parallel is not False and self.named is None,
            named=self.named,
            shown=tuple(shown),
        )


class ThinkingLimit(NamedTuple):
    """Limit on the reasoning of an answer.

    Attributes:
        tokens: maximum number of reasoning tokens.
        message: text inserted when the limit ends the reasoning; None uses the text that the model's makers recommend.
        required: whether it is an error if the marks of the model's reasoning are unknown.
    """

    tokens: int
    message: str | None = None
    required: bool = True


class Cut(NamedTuple):
    """How prompts are truncated.

    Attributes:
        tokens: maximum number of remaining tokens; -1 for as many as the context takes, less one token for the answer.
        side: side from which tokens are removed.
    """

    tokens: int
    side: Literal["left", "right"] = "left"

    def of(self, prompt: Sequence[int], context: int) -> Sequence[int]:
        """Return the truncated prompt; raises `InvalidParameterError` if `tokens` exceeds the context.

        Args:
            prompt: tokens of the prompt.
            context: maximum number of prompt tokens that the model takes.
        """
        if self.tokens > context:
            raise InvalidParameterError(
                "truncate_prompt_tokens value is greater than max_model_len. Please request a smaller truncation size.",
                "truncate_prompt_tokens",
            )
        most = context if self.tokens < 0 else self.tokens
        if len(prompt) <= most:
            return prompt
        return prompt[len(prompt) - most :] if self.side == "left" else prompt[:most]


class Paths(NamedTuple):
    """Names of a task's fields in its request, for errors.

    Attributes:
        fields: the request's names of fields that the task and the engine call differently.
        schemas: the path of each shown tool's schema.
        words: text that replaces a name in `fields` anywhere in a message, for names that no message may contain.
    """

    fields: Mapping[str, str]
    schemas: Sequence[str] = ()
    words: Mapping[str, str] = {}

    @contextmanager
    def blamed(self) -> Iterator[None]:
        """Context manager that renames `fields` in errors to the names in the request."""
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
    """A conversation to continue, or prompts.

    Attributes:
        messages: at least one message; empty if there are `prompts`.
        prompts: texts or token ids that answers continue.
        images: images of the only prompt, a text with `MEDIA_MARK` for each; None if the text has no marks.
        suffix: text after the answers, which fill the gap between prompt and suffix; "" means no suffix.
        before: token ids that precede the prompt, from an earlier prompt and its answer.
        tools: the tools that may be called, and the tool choice.
        form: constraint on the content of an answer; None allows any text.
        sampling: values that the request gives, by name in `SamplingParams`.
        choices: number of answers for each prompt.
        model: name of the model in the request; None uses the served model.
        continued: whether the last message is the beginning of the answer.
        opens_answer: whether the prompt ends with the beginning of an answer; None means unless it is `continued`.
        variables: variables of the chat template.
        documents: documents for the chat template.
        chat_template: replaces the model's template.
        add_special_tokens: whether special tokens are added to the rendered text or the prompts.
        thinking: limit on the reasoning; None uses the server's.
        show_thoughts: whether the reasoning is part of the answer.
        echo: text that every choice begins with.
        echo_prompts: whether every choice repeats its prompt, with log-probabilities if they are requested.
        scored_only: whether prompts are only scored, and nothing is generated.
        tell_ids, tell_counts: whether events have token ids, and whether counts precede every output.
        cut: how prompts are truncated; None refuses prompts that are too long.
        adapter: adapter that the request names besides the model; `model` contains it too.
        lora: scales of adapters by id; None uses what the served name means.
        priority: lower values run first.
        request_id: id given by the caller.
        paths: names of the fields in the request.
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
    lora: Mapping[int, float] | None = None
    adapter: str | None = None
    priority: int = 0
    request_id: str | None = None
