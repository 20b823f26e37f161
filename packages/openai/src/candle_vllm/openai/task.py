# SPDX-License-Identifier: MIT
"""What a request asks for, in no API's words (step 2): the contract between the edges that read requests and those who
answer them.

An edge checks what it was sent and makes a `Task` of it; prompts, parameters, grammars and plans are made of that
alone. What turns out to be wrong later is blamed on the fields of the task, and `Paths` says how the request spelt
them.
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
        source: its address, or its data as a data URL.
        detail: what the request says of how closely it is looked at; no effect.
        path: where the request has it, for errors.
        stored: the source is the id of a kept file.
    """

    source: str
    detail: str | None = None
    path: str = "messages"
    stored: bool = False


Part = TextPart | ImagePart

MEDIA_MARK = "<__media__>"
"""What stands for an image in a prompt that is a text, whatever the model's own mark is; llama.cpp's."""


class Call(msgspec.Struct, frozen=True):
    """A call that an earlier answer made; `arguments` are JSON text as the model wrote it, which may be broken."""

    id: str
    name: str
    arguments: str


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """One message.

    Attributes:
        parts: what it says; they stand on lines of their own.
        thoughts, calls: of an assistant.
        call_id: the call that a tool's message answers.
        name: of the participant, or of the function that answers.
    """

    role: Literal["system", "user", "assistant", "tool"]
    parts: tuple[Part, ...] = ()
    thoughts: str | None = None
    calls: tuple[Call, ...] = ()
    call_id: str | None = None
    name: str | None = None


class ToolFunction(msgspec.Struct, frozen=True):
    """A function as parsers and grammars see it.

    Attributes:
        parameters: a JSON schema that has `"type": "object"`; without properties if the request gave no parameters.
        strict: the arguments must follow the schema even where calls are the model's own choice.
        grammar: in Lark, of the text that is the one argument; it is followed where the model's way to write calls lets
            it be guaranteed.
    """

    name: str
    description: str | None
    parameters: dict[str, Any]
    strict: bool
    grammar: str | None = None


class ToolUse(msgspec.Struct, frozen=True, kw_only=True):
    """What a request says about tools.

    Attributes:
        tools: the functions that may be called; none in mode `none`.
        mode: `none`, `auto` (the model chooses) or `required` (at least one call).
        parallel: whether more than one call may be made.
        named: the one function that must be called, exactly once; the mode is `required` then.
        shown: the tools for the chat template, which are all of the request's, also where only some may be called.
    """

    tools: tuple[ToolFunction, ...] = ()
    mode: Literal["none", "auto", "required"] = "none"
    parallel: bool = True
    named: str | None = None
    shown: tuple[dict[str, Any], ...] = ()

    def as_template(self) -> list[dict[str, Any]] | None:
        """OpenAI's form `{"type": "function", "function": {...}}`; None where no tool is to be shown."""
        return list(self.shown) or None


class Choice(NamedTuple):
    """The choice among the tools of a request.

    Attributes:
        mode: as in `ToolUse`.
        names: of those that may be called; None is all.
        named: the one that must be called, exactly once.
    """

    mode: Literal["none", "auto", "required"] = "auto"
    names: Collection[str] | None = None
    named: str | None = None

    def freed(self) -> Choice:
        """For later turns: a model that had to call something would never come to its answer."""
        return self if self.mode == "none" else Choice(names=self.names)

    def among(
        self, functions: Sequence[ToolFunction], shown: Sequence[dict[str, Any]], *, parallel: bool | None
    ) -> ToolUse:
        """What a request with these tools says about them.

        Where none may be called they are not shown either, so that the model does not write a call as text.

        Raises:
            InvalidParameterError: a tool must be called, and the request has no tool.
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
    """How much a model may think.

    Attributes:
        tokens: of all its thoughts.
        message: what it is made to say before it answers, where they end them; None is what its makers have it say.
        required: where the marks of its thoughts are not known, that is an error.
    """

    tokens: int
    message: str | None = None
    required: bool = True


class Cut(NamedTuple):
    """How prompts are made short enough.

    Attributes:
        tokens: that are left at most; -1 is as many as the context takes, with a token for the answer.
        side: where tokens are taken away.
    """

    tokens: int
    side: Literal["left", "right"] = "left"

    def of(self, prompt: Sequence[int], context: int) -> Sequence[int]:
        """The prompt as it is read; raises `InvalidParameterError` where more tokens are left than the context takes.

        Args:
            prompt: its tokens.
            context: tokens of the longest prompt that the model takes.
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
    """How a request spells what a task has, for errors.

    Attributes:
        fields: names of this task and of the engine that the request spells otherwise.
        schemas: the path of each shown tool's schema.
        words: what stands in texts for those of `fields` that no text may have, wherever they stand in it.
    """

    fields: Mapping[str, str]
    schemas: Sequence[str] = ()
    words: Mapping[str, str] = {}

    @contextmanager
    def blamed(self) -> Iterator[None]:
        """Errors that blame one of `fields` come out as the request spells it."""
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
        messages: at least one; or none where there are `prompts`.
        prompts: texts, or ids of tokens, that answers continue as they are.
        images: of the only prompt, a text with `MEDIA_MARK` for each; None where it is not read for marks.
        suffix: what stands behind the answers, which are to fill the gap between prompt and this; "" is nothing.
        before: ids of tokens that stand before the prompt, of an earlier one with its answer.
        tools: those that may be called, and the choice among them.
        form: what the content of an answer must look like; None is any text.
        sampling: values that the request gives, by names of `SamplingParams`.
        choices: how many answers.
        model: None is the served one.
        continued: the last message is the beginning of the answer.
        opens_answer: whether the prompt ends with the beginning of an answer; None is so unless it is `continued`.
        variables: of the chat template.
        documents: for the chat template.
        chat_template: instead of the model's own.
        add_special_tokens: around what the template writes.
        thinking: a limit for thoughts alone; None is the server's.
        show_thoughts: they are part of the answer.
        echo: what every choice begins with.
        echo_prompts: every choice repeats its prompt, with its log-probabilities where there are any.
        scored_only: nothing is added to the prompts.
        tell_ids, tell_counts: events say the ids of tokens, and the counts before every piece.
        cut: how prompts are made short enough; None refuses those that are too long.
        adapter: named beside the model, whose name has it too.
        lora: how much of which adapters is added, by their numbers; None is what the served name means.
        priority: lower runs first.
        request_id: given by the caller.
        paths: the request's names.
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
