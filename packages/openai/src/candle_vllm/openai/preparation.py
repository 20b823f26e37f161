# SPDX-License-Identifier: MIT
"""`Task` -> prompt tokens, sampling parameters and plan of the answers (steps 2 and 3 of a request's life).

Rendering a template, tokenizing a long prompt and compiling a grammar would block all streams of an event loop, so
this work runs in other threads (`WorkerThreads`).
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NamedTuple

from msgspec.structs import replace

from candle_vllm.core.errors import ConfigError, InvalidParameterError, RequestError, UnsupportedModelError
from candle_vllm.core.sampling.json_schema import schema_remarks
from candle_vllm.core.sampling.params import SamplingParams
from candle_vllm.core.sampling.structured import StructuredOutputsParams
from candle_vllm.core.text.chat_template import ChatTemplate
from candle_vllm.core.text.prompts import needs_of
from candle_vllm.core.text.template_needs import fit_tools
from candle_vllm.core.vision.fetching import ImageAddress, ImageSources
from candle_vllm.core.vision.inputs import ImageInput
from candle_vllm.core.vision.pictures import pixels_of
from candle_vllm.openai.answers import AnswerPlan
from candle_vllm.openai.completion_answers import EchoedPrompt
from candle_vllm.openai.engine import EngineLike
from candle_vllm.openai.errors import UnsupportedParameterError, no_priority
from candle_vllm.openai.planning import AnswerPlanner
from candle_vllm.openai.protocol.fields import MAX_BEAM_TOKENS, MAX_LOGPROBS, Cut
from candle_vllm.openai.protocol.templating import check_variables
from candle_vllm.openai.remarks import remark
from candle_vllm.openai.requests import sampling_params
from candle_vllm.openai.serving import WorkerThreads, check_length
from candle_vllm.openai.task import MEDIA_MARK, Call, ImagePart, Message, Task, TextPart, images_of, template_messages

MAX_PIXELS = 1 << 28  # pixels of all images of a request: a few bytes can encode an image of the maximum size
_GROUP, _MOST_SPLIT = 16, 4  # tools whose schemas are tried together; refused groups whose tools are tried one by one
_NOT_SHOWN = TextPart("[an image, which this model cannot see]")
_NO_TOOLS = "the chat template does not show tools: the model knows only those that a message describes"
_LOOKED = (
    Message(role="user", parts=(TextPart("?"),)),
    Message(role="assistant", calls=(Call("call_image", "look", "{}"),)),
    Message(role="tool", parts=(ImagePart(""),), call_id="call_image"),
)
Unseen = tuple[Sequence[bytes | ImageAddress], Sequence[str]]

logger = logging.getLogger(__name__)


class PreparedChat(NamedTuple):
    """A conversation, ready to be submitted.

    Attributes:
        params: sampling parameters, with the constraint on answers.
        answers: how answers are parsed.
        text: the prompt as text.
        remarks: warnings to the client about the constraint.
        unseen: images that are not read yet: their files or addresses, and their paths in the request.
        loose: tools whose schemas do not constrain calls, and the reasons.
    """

    prompt: list[int]
    params: SamplingParams
    answers: AnswerPlan
    text: str
    remarks: tuple[str, ...] = ()
    images: tuple[ImageInput, ...] = ()
    unseen: Unseen | None = None
    loose: Mapping[str, str] = MappingProxyType({})


class PreparedPrompts(NamedTuple):
    """A task with prompts, ready to be submitted; `images` and `unseen` as in `PreparedChat`, for the only prompt."""

    prompts: list[EchoedPrompt]
    params: SamplingParams
    images: tuple[ImageInput, ...] = ()
    unseen: Unseen | None = None


class TaskPreparation:
    """Prepares requests for one engine; ConfigError if a template default or a sampling default is invalid.

    `planner` plans the answers to chat requests; `template_defaults` are the `default_chat_template_kwargs` of
    `OpenAIAdapter`, and the other arguments are as there.
    """

    def __init__(
        self, engine: EngineLike, planner: AnswerPlanner, *, allow_priority: bool, allow_chat_template: bool,
        template_defaults: Mapping[str, Any] | None = None, images: ImageSources | None = None,
    ) -> None:  # fmt: skip
        self._template_defaults = dict(template_defaults or {})
        try:
            check_variables(self._template_defaults)
        except ValueError as error:
            raise ConfigError(f"default_chat_template_kwargs: {error}", "default_chat_template_kwargs") from None
        self._images = images or ImageSources()
        self._engine = engine
        self._planner = planner
        self._allow_priority = allow_priority
        self._allow_chat_template = allow_chat_template
        self._defaults = _checked_defaults(engine.model_info.default_sampling)
        self._warned = False  # whether the log says that the template does not show tools

    def chat(self, task: Task, *, bounded: bool = False) -> PreparedChat:
        """Prepare a conversation, without its images, which `see` reads; RequestError names the request's fields.

        With `bounded`, a very long prompt that exceeds the context is refused early. Requests that only count tokens
        are not `bounded`.
        """
        with task.paths.blamed():
            self._check(task)
            params, task = sampling_params(task, self._defaults), task.with_results_in_order()
            task, unseen = self._with_images(task) if images_of(task.messages) else (task, None)
            text = self._render(task)
            if bounded and task.cut is None:
                check_length(self._engine, text)
            loose = dict[str, str]()
            try:
                planned = self._planner.plan(task, text)
            except RequestError:
                if not (loose := self._loose(task, text)):
                    raise
                planned = self._planner.plan(task, text, loose=loose)
            answers, structured, thoughts, marks = planned
            # Templates write special tokens themselves; a request may add more.
            prompt = self._behind(task, text, add_special_tokens=task.add_special_tokens)
            if task.cut is not None:
                prompt = self._cut(task, task.cut, prompt, text=True)
            _check_prompt_logprobs("prompt_logprobs", task.sampling.get("prompt_logprobs"), len(prompt))
            if answers.special_tokens:
                params = replace(params, skip_special_tokens=False)
            marks = marks if params.stop else None
            if structured is not params.structured_outputs or thoughts is not None or marks is not None:
                params = replace(params, structured_outputs=structured, thoughts=thoughts, stop_marks=marks)
            params = self._bounded(task, params, task.choices, len(prompt))
            return PreparedChat(prompt, params, answers, text, unseen=unseen, loose=loose)

    async def see(
        self, task: Task, prepared: PreparedChat, unseen: Unseen, work: WorkerThreads, *, bounded: bool
    ) -> PreparedChat:
        """Read the `unseen` images of a conversation from their sources, and add them to `prepared`.

        `bounded` is as in `chat`. Raises `RequestError`.
        """
        prompt, images = await self._seen(task, prepared.prompt, unseen, work, bounded=bounded)
        return prepared._replace(prompt=prompt, images=images, unseen=None)

    async def see_prompt(self, task: Task, prepared: PreparedPrompts, work: WorkerThreads) -> PreparedPrompts:
        """Read the images of a task's only prompt, as `see` does."""
        if prepared.unseen is None:
            return prepared
        (prompt,) = prepared.prompts
        ids, images = await self._seen(task, prompt.token_ids, prepared.unseen, work)
        return prepared._replace(prompts=[prompt._replace(token_ids=tuple(ids))], images=images, unseen=None)

    async def _seen(
        self, task: Task, prompt: Sequence[int], unseen: Unseen, work: WorkerThreads, *, bounded: bool = True
    ) -> tuple[list[int], tuple[ImageInput, ...]]:
        with task.paths.blamed():
            async with self._images.had(unseen[0]) as files:
                return await work.look(self._look, task, prompt, files, unseen[1], bounded)

    def _look(
        self, task: Task, prompt: Sequence[int], files: Sequence[bytes], names: Sequence[str], bounded: bool
    ) -> tuple[list[int], tuple[ImageInput, ...]]:
        if (total := sum(map(pixels_of, files))) > MAX_PIXELS:
            said = (
                f"{names[0]}: the images of a request have {total} pixels in all, and at most {MAX_PIXELS} are allowed"
            )
            raise InvalidParameterError(said, names[0])
        ids, images = self._engine.look(prompt, files, names, bounded=bounded)
        self._images.keep(images)  # count their memory before the request waits for a thread
        _check_prompt_logprobs("prompt_logprobs", task.sampling.get("prompt_logprobs"), len(ids))
        return ids, images

    def try_picture(self, data: bytes) -> None:
        """Raise `RequestError` if the model cannot read this image file in a tool's result."""
        said = template_messages(_LOOKED, self._planner.choice.needs, self._engine.model_info.image_text)
        prompt = self._engine.tokenize(self._engine.render_messages(said), add_special_tokens=False)
        self._engine.look(prompt, [data], ["the image"])

    def _with_images(self, task: Task) -> tuple[Task, Unseen | None]:
        """Begin to fetch the images of a task, or refuse them; if the model reads text only, a notice replaces those in
        tool results, because an agent cannot remove them."""
        images = images_of(task.messages)
        if "image" in self._engine.model_info.modalities:
            return task, self._begun(task, images)
        given = images_of([one for one in task.messages if one.role != "tool"])
        if given:
            said = f"{given[0].path}: an image cannot be read: {self._engine.model_info.name} takes text only"
            raise UnsupportedParameterError(said, given[0].path)
        remark(["images in results of tools are not shown: the model takes text only"])

        def shown(one: Message) -> Message:
            parts = (_NOT_SHOWN if isinstance(part, ImagePart) else part for part in one.parts)
            return replace(one, parts=tuple(parts)) if one.role == "tool" else one

        return replace(task, messages=tuple(map(shown, task.messages))), None

    def _begun(self, task: Task, images: Sequence[ImagePart]) -> Unseen:
        if task.cut is not None:
            field = "truncate_prompt_tokens"
            raise UnsupportedParameterError(f"{field}: a prompt with images is not truncated: omit it", field)
        if len(images) > (most := self._engine.model_info.max_images):  # before any is fetched
            said = f"{images[most].path}: the prompt has {len(images)} images; at most {most} are allowed (max_images)"
            raise InvalidParameterError(said, images[most].path)
        where = [ImageAddress(image.source, image.path, image.stored) for image in images]
        return [self._images.begin(each) for each in where], [each.path for each in where]

    def _marked(self, prompt: str, images: Sequence[ImagePart]) -> str:
        """Replace the image marks of a text with the model's placeholders for images."""
        info = self._engine.model_info
        if "image" not in info.modalities:
            raise UnsupportedParameterError(
                "images: Multimodal data provided, but model does not support multimodal requests.", "images"
            )
        marks = prompt.count(MEDIA_MARK)
        if marks != len(images):
            raise InvalidParameterError(
                f"images: Failed to tokenize prompt: {len(images)} images, and {MEDIA_MARK} stands in the text {marks} "
                "times: each needs one",
                "images",
            )
        return prompt.replace(MEDIA_MARK, info.image_text)

    def hold(self, task: Task, prepared: PreparedChat) -> PreparedChat:
        """Compile the constraint on the answer, which may take seconds; raises `RequestError`.

        If the schema of a non-strict tool, or a tool's grammar, cannot be enforced, it does not constrain calls.
        """
        with task.paths.blamed():
            asked, form = task.form, prepared.params.structured_outputs
            # With required calls, the answer has no content to constrain, but an invalid constraint is still refused.
            if asked is not None and task.tools.mode == "required":
                self._engine.check_structured_outputs(asked)
            self._check_grammars(task)
            try:
                if form is not None:
                    self._engine.check_structured_outputs(form)
                loose = {**self._without_grammar(task, prepared.text), **prepared.loose}
                return prepared._replace(remarks=_remarks(task, loose))
            except RequestError:
                if asked is not None:
                    self._engine.check_structured_outputs(asked)
                loose = self._loose(task, prepared.text)
                if not loose:
                    raise
            answers, form, *_ = self._planner.plan(task, prepared.text, loose=loose)
            if form is not None:
                self._engine.check_structured_outputs(form)
            params = replace(prepared.params, structured_outputs=form)
            return prepared._replace(params=params, answers=answers, remarks=_remarks(task, loose))

    def _check_grammars(self, task: Task) -> None:
        for tool in task.tools.tools:
            if tool.grammar is None:
                continue
            try:
                self._engine.check_structured_outputs(StructuredOutputsParams(grammar=tool.grammar))
            except RequestError as error:
                field = _path_of(task, tool.name)
                reason = str(error).removeprefix("structured_outputs: ")
                raise InvalidParameterError(f"{field}: {reason}", field) from None

    def _without_grammar(self, task: Task, text: str) -> dict[str, str]:
        """Return the tools whose grammar cannot be enforced in the model's tool-call format, and the reasons."""
        found = dict[str, str]()
        for tool in task.tools.tools:
            try:
                if tool.grammar is not None:
                    self._planner.plan(replace(task, tools=replace(task.tools, tools=(tool,))), text)
            except RequestError as error:
                found[tool.name] = str(error)
        return found

    def _loose(self, task: Task, text: str) -> dict[str, str]:
        """Map the non-strict tools whose schema cannot be enforced to the reasons.

        Groups of tools are tried first, and then each tool of the first `_MOST_SPLIT` refused groups; further refused
        groups are returned whole. If the remaining tools are refused together, all non-strict tools are returned.

        Raises InvalidParameterError if the schema of a strict tool cannot be enforced.
        """
        use, found, split = task.tools, dict[str, str](), 0

        def check(one: Task, loose: Collection[str] = ()) -> None:
            form = self._planner.plan(one, text, loose=loose).structured
            if form is not None:
                self._engine.check_structured_outputs(form)

        free = [tool for tool in use.tools if not tool.strict]
        groups = [[tool] for tool in use.tools if tool.strict]
        groups += [free[start : start + _GROUP] for start in range(0, len(free), _GROUP)]
        for group in groups:  # which grows
            try:
                check(replace(task, tools=replace(use, tools=tuple(group))))
            except RequestError as error:
                if group[0].strict:
                    name = group[0].name
                    field = _path_of(task, name)
                    raise InvalidParameterError(
                        f"{field}: the arguments of the strict tool {name!r} cannot be guaranteed: {error}", field
                    ) from None
                if len(group) > 1 and split < _MOST_SPLIT:
                    split += 1
                    groups += [[tool] for tool in group]
                else:
                    found |= {tool.name: str(error) for tool in group}
        try:
            check(task, found)
        except RequestError as error:
            found = {tool.name: str(error) for tool in free}
        return found

    def prompts(self, task: Task) -> PreparedPrompts:
        """Prepare a task with prompts; RequestError names the request's fields."""
        with task.paths.blamed():
            self._check(task)
            params = sampling_params(task, self._defaults)
            for text in (*task.prompts, task.suffix):
                if not isinstance(text, str):
                    self._check_known(text)
                elif task.cut is None:
                    check_length(self._engine, text)
            if task.suffix:
                filled = [self._engine.infill(prompt, task.suffix) for prompt in task.prompts]
                ends = dict.fromkeys((*(params.stop_token_ids or ()), *filled[0].stop_token_ids))
                params = replace(params, stop_token_ids=tuple(ends))
                prompts = [EchoedPrompt("", "", one.token_ids) for one in filled]
            else:
                given = task.prompts if task.images is None else [self._marked(str(task.prompts[0]), task.images)]
                prompts = [self._prompt(task, prompt) for prompt in given]
            tokens = sum(len(prompt.token_ids) for prompt in prompts)
            _check_prompt_logprobs("prompt_logprobs", task.sampling.get("prompt_logprobs"), tokens)
            if task.echo_prompts:
                _check_prompt_logprobs("logprobs", task.sampling.get("logprobs"), tokens, task.choices)
            shortest = min((len(prompt.token_ids) for prompt in prompts), default=0)
            params = self._bounded(task, params, task.choices * len(prompts), shortest)
            return PreparedPrompts(prompts, params, unseen=self._begun(task, task.images) if task.images else None)

    def _bounded(self, task: Task, params: SamplingParams, sequences: int, prompt: int) -> SamplingParams:
        """Refuse too many log-probabilities or tokens of beams; without `max_tokens`, limit the tokens instead."""
        if task.beam_penalty is not None:
            _check_beams(task, params)
            limit = max(1, MAX_BEAM_TOKENS // sequences)
            if (params.max_tokens or 0) > limit:
                said = f"max_tokens: a beam search for {sequences} answers allows {limit} tokens each"
                raise InvalidParameterError(said, "max_tokens")
            params = replace(params, max_tokens=params.max_tokens or limit)
        if params.logprobs is None:
            return params
        each = sequences * (params.logprobs + 1 + len(params.logprob_token_ids or ()))
        most = max(1, MAX_LOGPROBS // each)
        if params.max_tokens is None:
            fits = self._engine.model_info.max_model_len - prompt <= most
            return params if fits else replace(params, max_tokens=most)
        if params.max_tokens > most:
            raise InvalidParameterError(
                f"logprobs asks for {params.max_tokens * each} log-probabilities of the answer (max_tokens x n x "
                f"(logprobs + 1)) and at most {MAX_LOGPROBS} are allowed: lower max_tokens, n or logprobs",
                "logprobs",
            )
        return params

    def check_form(self, task: Task) -> tuple[str, ...]:
        """Compile the constraint on answers to prompts, which may take seconds; raises `RequestError`.

        Returns:
            Warnings to the client about the constraint.
        """
        with task.paths.blamed():
            if task.form is not None:
                self._engine.check_structured_outputs(task.form)
            return _remarks(task)

    def _check(self, task: Task) -> None:
        """Check the rules that depend on the model and on the options of `OpenAIAdapter`."""
        if task.priority < 0 and not self._allow_priority:
            raise no_priority()
        allowed, vocabulary = task.sampling.get("allowed_token_ids") or (), self._engine.model_info.vocab_size
        if len(allowed) > vocabulary:
            raise InvalidParameterError(
                f"allowed_token_ids has {len(allowed)} entries, but the model's vocabulary has {vocabulary}",
                "allowed_token_ids",
            )

    def _render(self, task: Task) -> str:
        options: dict[str, Any] = {
            "documents": task.documents,
            "add_generation_prompt": not task.continued if task.opens_answer is None else task.opens_answer,
            "continue_final_message": task.continued,
        }
        template = None if task.chat_template is None else self._own_template(task.chat_template)
        needs = self._planner.choice.needs if template is None else needs_of(template)
        if (tools := task.tools.as_template()) is not None:
            options["tools"] = tools if needs is None else fit_tools(tools, needs)
            if needs is not None and needs.ignores_tools:
                remark([_NO_TOOLS])
                if template is None and not self._warned:
                    logger.warning("%s: %s", self._engine.model_info.name, _NO_TOOLS)
                    self._warned = True
        messages = template_messages(task.messages, needs, self._engine.model_info.image_text)
        variables = {**self._template_defaults, **task.variables}
        render = self._engine.render_messages if template is None else template.render
        return render(messages, **options, **variables)

    def _own_template(self, source: str) -> ChatTemplate:
        if not self._allow_chat_template:
            raise UnsupportedParameterError(
                "chat_template is not supported: a template is a program, and this server runs the model's own only, "
                "unless it is started with --trust-request-chat-template",
                "chat_template",
            )
        try:
            return _compiled(source, tuple(self._engine.chat_conventions.token_names.items()))
        except UnsupportedModelError as error:
            raise InvalidParameterError(f"chat_template cannot be used: {error}", "chat_template") from None

    def _prompt(self, task: Task, prompt: str | Sequence[int]) -> EchoedPrompt:
        engine, special = self._engine, task.add_special_tokens
        ids = self._behind(task, prompt, add_special_tokens=special) if isinstance(prompt, str) else prompt
        if task.cut is not None:
            ids = self._cut(task, task.cut, ids, text=isinstance(prompt, str))
        text = first = ""
        if task.echo_prompts:
            whole = task.scored_only  # otherwise the answer may complete the last character of the prompt
            if isinstance(prompt, str) and task.cut is None:
                text = prompt
            else:
                text = engine.detokenize(ids, skip_special_tokens=isinstance(prompt, str), whole=whole)
            scored = task.sampling.get("logprobs") is not None
            first = engine.detokenize(ids[:1], skip_special_tokens=False) if scored else ""
        return EchoedPrompt(text, first, tuple(ids))

    def _cut(self, task: Task, cut: Cut, ids: Sequence[int], *, text: bool) -> list[int]:
        """Truncate a prompt, of a `text` or of given ids, as the task asks."""
        around = self._engine.tokenize("", add_special_tokens=task.add_special_tokens) if text else ()
        return list(cut.of(ids, self._engine.model_info.max_model_len - task.reserve, around))

    def _behind(self, task: Task, text: str, *, add_special_tokens: bool) -> list[int]:
        """Tokenize a prompt behind the tokens of `before`, then without a token that begins sequences but not turns."""
        if not task.before:
            return self._engine.tokenize(text, add_special_tokens=add_special_tokens)
        self._check_known(task.before, "context")
        beginning = self._engine.chat_conventions.token_names.get("bos_token")
        parts = (part for message in task.messages for part in message.parts if isinstance(part, TextPart))
        if beginning and text.count(beginning) == 1 + sum(part.text.count(beginning) for part in parts):
            text = text.removeprefix(beginning)
        return [*task.before, *self._engine.tokenize(text, add_special_tokens=False)]

    def _check_known(self, ids: Sequence[int], field: str = "prompt") -> None:
        """Refuse token ids beyond the vocabulary before they are detokenized."""
        vocabulary = self._engine.model_info.vocab_size
        largest = max(ids, default=0)
        if largest >= vocabulary:
            raise InvalidParameterError(
                f"{field}: token id {largest} is out of vocabulary: the model's ids are 0 to {vocabulary - 1}", field
            )


@lru_cache(maxsize=4)
def _compiled(source: str, token_names: tuple[tuple[str, str], ...]) -> ChatTemplate:
    """Compile a request's template; cached, because clients send the same template with every request."""
    return ChatTemplate(source, dict(token_names))


def _check_prompt_logprobs(field: str, asked: int | None, tokens: int, sequences: int = 1) -> None:
    entries = 0 if asked is None else tokens * sequences * (asked + 1)
    if entries > MAX_LOGPROBS:
        raise InvalidParameterError(
            f"{field} asks for {entries} log-probabilities of {tokens} prompt tokens (tokens x n x (logprobs + 1))"
            f" and at most {MAX_LOGPROBS} are allowed: send shorter prompts, or lower n or {field}",
            field,
        )


# fields that a beam search honours, or does not need because it samples nothing
_WITH_BEAMS = frozenset({"n", "max_tokens", "ignore_eos", "skip_special_tokens", "logprobs", "cache_salt", "seed"})


def _check_beams(task: Task, params: SamplingParams) -> None:
    """Refuse fields that a beam search cannot honour: it ranks answers by the model's own log-probabilities."""
    given, neutral = dict[str, Any](), SamplingParams()
    for name, value in task.sampling.items():
        if name not in _WITH_BEAMS and value != getattr(neutral, name):
            given[name] = value or name == "prompt_logprobs"
    given |= {"suffix": task.suffix, "echo": task.echo or task.echo_prompts, "tools": task.tools.tools}
    given |= {"structured_outputs": task.form or params.structured_outputs, "thoughts": params.thoughts}
    if params.thoughts is not None and task.thinking is None:
        said = "use_beam_search: a beam search cannot limit the reasoning, as this server does (--reasoning-budget)"
        raise UnsupportedParameterError(said, "use_beam_search")
    if field := next((name for name, value in given.items() if value), None):
        said = "not supported with use_beam_search, which ranks answers by the model's own log-probabilities"
        raise UnsupportedParameterError(f"{field}: {said}", field)


def _checked_defaults(defaults: Mapping[str, Any]) -> dict[str, Any]:
    request_only = {"n", "logprobs", "prompt_logprobs", "logit_bias", "structured_outputs", "prediction"}
    request_only |= {"thoughts", "thinking_token_budget", "stop_marks", "continues_prompt", "logprob_token_ids"}
    request_only |= {"prompt_progress"}
    unusable = sorted(name for name in defaults if name in request_only or name not in SamplingParams.__struct_fields__)
    if unusable:
        raise ConfigError(f"default_sampling has names that are no sampling defaults: {', '.join(unusable)}")
    try:
        SamplingParams(**dict[str, Any]({"max_tokens": None, **defaults}))
    except InvalidParameterError as error:
        raise ConfigError(f"the model's default_sampling cannot be used: {error}") from error
    return dict(defaults)


def _path_of(task: Task, name: str) -> str:
    place = next(i for i, shown in enumerate(task.tools.shown) if shown["function"]["name"] == name)
    return task.paths.schemas[place]


def _remarks(task: Task, loose: Mapping[str, str] = MappingProxyType({})) -> tuple[str, ...]:
    """Return warnings about the schemas and grammars of an answer; those of tools in `loose` are not enforced."""
    found = list[str]()
    if task.form is not None and task.form.json is not None:
        found += schema_remarks(task.form.json)
    for tool in task.tools.tools:
        required = task.tools.mode == "required"
        if tool.grammar is not None and tool.name in loose:
            found.append(
                f"the input of {tool.name!r} is not constrained by its grammar, which cannot be guaranteed in a call"
            )
        elif tool.name in loose and required:
            reason = loose[tool.name].removeprefix("structured_outputs: ").removeprefix("tools: ")
            found.append(f"the arguments of {tool.name!r} are not constrained by their schema: {reason}")
        elif tool.name not in loose and (tool.strict or required):
            found += [f"of the parameters of {tool.name!r}: {text}" for text in schema_remarks(tool.parameters)]
    return tuple(found)
