"""Steps 2 and 3 of a request: checked fields -> prompt tokens, sampling parameters, and how answers are read.

Rendering a template, tokenizing a long prompt and compiling a grammar take long enough to hold up every other stream
of an event loop: call these in other threads (`worker_threads`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from msgspec.structs import replace

from candle_vllm.core.errors import ConfigError, InvalidParameterError, RequestError, UnsupportedModelError
from candle_vllm.core.sampling.params import SamplingParams
from candle_vllm.core.sampling.structured import StructuredOutputsParams
from candle_vllm.core.text.chat_template import ChatTemplate
from candle_vllm.openai.answers import AnswerPlan
from candle_vllm.openai.completion_answers import EchoedPrompt
from candle_vllm.openai.conversation import template_messages
from candle_vllm.openai.engine import EngineLike
from candle_vllm.openai.errors import UnsupportedParameterError, no_priority
from candle_vllm.openai.planning import AnswerPlanner, Planned
from candle_vllm.openai.protocol.chat import ChatCompletionRequest
from candle_vllm.openai.protocol.completions import CompletionRequest
from candle_vllm.openai.protocol.fields import MAX_PROMPT_LOGPROBS
from candle_vllm.openai.protocol.tool_use import ToolUse
from candle_vllm.openai.requests import to_sampling_params

_MOST_TRIED = 64  # tools that are tried one by one


class PreparedChat(NamedTuple):
    """A chat request, ready to be submitted.

    Attributes:
        prompt: its tokens.
        params: how they are continued; with the form that answers must have.
        answers: how answers are read.
        text: the prompt as text.
    """

    prompt: list[int]
    params: SamplingParams
    answers: AnswerPlan
    text: str


class PreparedCompletion(NamedTuple):
    """A completion request, ready to be submitted."""

    prompts: list[EchoedPrompt]
    params: SamplingParams


class Preparation:
    """Prepares requests for one engine.

    Args:
        engine: knows tokens, template and vocabulary.
        planner: plans the answers to chat requests.
        allow_priority: whether requests may go before others.
        allow_chat_template: whether requests may bring a template.
    """

    def __init__(
        self, engine: EngineLike, planner: AnswerPlanner, *, allow_priority: bool, allow_chat_template: bool
    ) -> None:
        self._engine = engine
        self._planner = planner
        self._allow_priority = allow_priority
        self._allow_chat_template = allow_chat_template
        self._defaults = _checked_defaults(engine.model_info.default_sampling)

    def chat(self, request: ChatCompletionRequest) -> PreparedChat:
        """Raises `RequestError`, which blames the fields of the request."""
        with blamed_as_spelled(request):
            params = self._params(request)
            use = request.tool_use()
            text = self._render(request, use.as_template())
            answers, structured = self._planned(request, use, text)
            # Templates write the special tokens themselves.
            prompt = self._engine.tokenize(text, add_special_tokens=bool(request.add_special_tokens))
            _check_prompt_logprobs(request, len(prompt))
            if answers.special_tokens:
                params = replace(params, skip_special_tokens=False)
            return PreparedChat(prompt, replace(params, structured_outputs=structured), answers, text)

    def hold(self, request: ChatCompletionRequest, prepared: PreparedChat) -> PreparedChat:
        """The same with a form that was compiled; it may take seconds. Raises `RequestError`.

        Schemas of tools that are not strict are followed where that is possible, and no reason to refuse a request.
        """
        use = request.tool_use()
        with blamed_as_spelled(request):
            asked, form = request.structured(), prepared.params.structured_outputs
            if asked is not None and use.mode == "required":  # there is no content to hold to it, but it must be right
                self._engine.check_structured_outputs(asked)
            try:
                if form is not None:
                    self._engine.check_structured_outputs(form)
                return prepared
            except RequestError:
                if asked is not None:
                    self._engine.check_structured_outputs(asked)
                loose = self._loose(request, use, prepared.text)
                if not loose:
                    raise
            answers, form = self._planner.plan(request, use, prepared.text, loose=loose)
            if form is not None:
                self._engine.check_structured_outputs(form)
            return prepared._replace(params=replace(prepared.params, structured_outputs=form), answers=answers)

    def _planned(self, request: ChatCompletionRequest, use: ToolUse, text: str) -> Planned:
        try:
            return self._planner.plan(request, use, text)
        except RequestError:
            loose = self._loose(request, use, text)
            if not loose:
                raise
            return self._planner.plan(request, use, text, loose=loose)

    def _loose(self, request: ChatCompletionRequest, use: ToolUse, text: str) -> frozenset[str]:
        """Tools that are not strict and whose schemas cannot be guaranteed; all of them, where there are many.

        Raises:
            InvalidParameterError: a strict tool's schema cannot be.
        """
        places = {tool.function.name: number for number, tool in enumerate(request.tools or ())}
        found = set[str]()
        for tool in use.tools:
            if not tool.strict and len(use.tools) > _MOST_TRIED:
                found.add(tool.name)
                continue
            try:
                alone = self._planner.plan(request, replace(use, tools=(tool,)), text).structured
                if alone is not None:
                    self._engine.check_structured_outputs(alone)
            except RequestError as error:
                if tool.strict:
                    field = f"tools.{places[tool.name]}.function.parameters"
                    raise InvalidParameterError(
                        f"{field}: the arguments of the strict tool {tool.name!r} cannot be guaranteed: {error}", field
                    ) from None
                found.add(tool.name)
        return frozenset(found)

    def completion(self, request: CompletionRequest) -> PreparedCompletion:
        """Raises `RequestError`, which blames the fields of the request."""
        with blamed_as_spelled(request):
            params = self._params(request)
            prompts = [self._completion_prompt(request, prompt) for prompt in request.prompts]
            _check_prompt_logprobs(request, sum(len(prompt.token_ids) for prompt in prompts))
            return PreparedCompletion(prompts, params)

    def check_form(self, request: CompletionRequest, form: StructuredOutputsParams) -> None:
        """Compiles the form of a completion's texts; it may take seconds. Raises `RequestError`."""
        with blamed_as_spelled(request):
            self._engine.check_structured_outputs(form)

    def _params(self, request: ChatCompletionRequest | CompletionRequest) -> SamplingParams:
        """The sampling parameters, and the rules that depend on the model and on this adapter."""
        if request.priority and not self._allow_priority:
            raise no_priority()
        vocabulary, allowed = self._engine.model_info.vocab_size, request.allowed_token_ids or ()
        if len(allowed) > vocabulary:
            raise InvalidParameterError(
                f"allowed_token_ids has {len(allowed)} entries, but the model's vocabulary has {vocabulary}",
                "allowed_token_ids",
            )
        return to_sampling_params(request, self._defaults)

    def _render(self, request: ChatCompletionRequest, tools: Sequence[Mapping[str, Any]] | None) -> str:
        continued = bool(request.continue_final_message)
        generation = request.add_generation_prompt
        options: dict[str, Any] = {
            "documents": request.documents,
            "add_generation_prompt": not continued if generation is None else generation,
            "continue_final_message": continued,
            **request.template_kwargs(),
        }
        if tools is not None:
            options["tools"] = tools
        messages = template_messages(request.messages, self._planner.choice.needs)
        if request.chat_template is None:
            return self._engine.apply_chat_template(messages, **options)
        return self._own_template(request.chat_template).render(messages, **options)

    def _own_template(self, source: str) -> ChatTemplate:
        if not self._allow_chat_template:
            raise UnsupportedParameterError(
                "chat_template is not supported: a template is a program, and this server runs the model's own only, "
                "unless it is started with --trust-request-chat-template",
                "chat_template",
            )
        try:
            return ChatTemplate(source, self._engine.chat_conventions.token_names)
        except UnsupportedModelError as error:
            raise InvalidParameterError(f"chat_template cannot be used: {error}", "chat_template") from None

    def _completion_prompt(self, request: CompletionRequest, prompt: str | list[int]) -> EchoedPrompt:
        engine, special = self._engine, request.add_special_tokens is not False
        ids = engine.tokenize(prompt, add_special_tokens=special) if isinstance(prompt, str) else prompt
        self._check_known(ids)
        text = first = ""
        if request.echo:
            text = prompt if isinstance(prompt, str) else engine.detokenize(ids, skip_special_tokens=False)
            first = engine.detokenize(ids[:1], skip_special_tokens=False) if request.logprobs is not None else ""
        return EchoedPrompt(text, first, tuple(ids))

    def _check_known(self, ids: Sequence[int]) -> None:
        """Refuses ids beyond the vocabulary before a detokenizer sees them."""
        vocabulary = self._engine.model_info.vocab_size
        largest = max(ids, default=0)
        if largest >= vocabulary:
            raise InvalidParameterError(
                f"prompt has token id {largest}, but the model's vocabulary ends at {vocabulary - 1}", "prompt"
            )


@contextmanager
def blamed_as_spelled(request: ChatCompletionRequest | CompletionRequest) -> Iterator[None]:
    """The engine blames its own names; a request may spell them in another way."""
    spelled = {"structured_outputs": _structured_field(request)}
    if isinstance(request, ChatCompletionRequest):
        spelled["prompt"] = "messages"
        if request.max_completion_tokens is not None:
            spelled["max_tokens"] = "max_completion_tokens"
    try:
        yield
    except RequestError as error:
        name = error.param or ""
        if name in spelled:
            error.param = spelled[name]
            error.args = (str(error).replace(f"{name}: ", f"{error.param}: ", 1), *error.args[1:])
        raise


def _structured_field(request: ChatCompletionRequest | CompletionRequest) -> str:
    return "tools" if request.structured() is None else request.structured_field


def _check_prompt_logprobs(request: ChatCompletionRequest | CompletionRequest, tokens: int) -> None:
    """Refuses answers that would be made of too many log-probabilities of their `tokens` prompt tokens."""
    asked = {"prompt_logprobs": 0 if request.prompt_logprobs is None else tokens * (request.prompt_logprobs + 1)}
    if isinstance(request, CompletionRequest) and request.echo and request.logprobs is not None:
        asked["logprobs"] = tokens * request.sequences * (request.logprobs + 1)
    for field, entries in asked.items():
        if entries > MAX_PROMPT_LOGPROBS:
            raise InvalidParameterError(
                f"{field} asks for {entries} log-probabilities of {tokens} prompt tokens (tokens x n x (logprobs + 1))"
                f" and at most {MAX_PROMPT_LOGPROBS} are allowed: send shorter prompts, or lower n or {field}",
                field,
            )


def _checked_defaults(defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The model's own sampling values, refused now rather than at every request."""
    request_only = {"n", "logprobs", "prompt_logprobs", "logit_bias", "structured_outputs"}
    unusable = sorted(name for name in defaults if name in request_only or name not in SamplingParams.__struct_fields__)
    if unusable:
        raise ConfigError(f"default_sampling has names that are no sampling defaults: {', '.join(unusable)}")
    try:
        SamplingParams(**{"max_tokens": None, **defaults})
    except InvalidParameterError as error:
        raise ConfigError(f"the model's default_sampling cannot be used: {error}") from error
    return dict(defaults)
