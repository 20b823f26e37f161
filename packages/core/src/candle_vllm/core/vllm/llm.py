# SPDX-License-Identifier: MIT
"""LLM: vLLM's class for programs without an event loop, over `InferenceEngine`.

It differs from `InferenceEngine` as vLLM does: in names and outputs, in sampling defaults (the model's own for a call
without parameters, else temperature 1 over the whole vocabulary), and in the default of 16 tokens, also for a chat.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextvars import copy_context
from pathlib import Path
from typing import Any, Self

import numpy as np
from msgspec.structs import asdict, replace

from candle_vllm.core.arguments import ExplainedAttributes, explained, foreign_names
from candle_vllm.core.config import EngineConfig
from candle_vllm.core.engine.outputs import ClassificationOutput as Classification
from candle_vllm.core.engine.outputs import EmbeddingOutput as Embedding
from candle_vllm.core.engine.outputs import GenerationOutput
from candle_vllm.core.engine.requests import LoraChoice, LoRARequest
from candle_vllm.core.engine.step.stream import Bar
from candle_vllm.core.engine_front import FITTED, EngineFront, no_params
from candle_vllm.core.errors import ConfigError, InvalidParameterError
from candle_vllm.core.inference_engine import InferenceEngine
from candle_vllm.core.pooling import BY_TOKEN, PoolingParams
from candle_vllm.core.remote import ReplicatedEngine
from candle_vllm.core.sampling.params import RequestOutputKind, SamplingParams
from candle_vllm.core.text.prompts import Message, Prompt
from candle_vllm.core.vllm.arguments import EngineArgs, translated
from candle_vllm.core.vllm.beam_search import BeamSearchOutput, BeamSearchParams, beam_search
from candle_vllm.core.vllm.outputs import (
    ClassificationOutput,
    ClassificationRequestOutput,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    PoolingOutput,
    PoolingRequestOutput,
    RequestOutput,
    ScoringOutput,
    ScoringRequestOutput,
    request_output,
)


@dataclasses.dataclass(frozen=True)
class Opened:
    """Engine and defaults of an `LLM` or `AsyncLLM`.

    Attributes:
        owned: whether the engine was created here; it is then closed with the `LLM` or `AsyncLLM`.
        pooling: default pooling parameters of a call.
        sampling: sampling parameters of the model's files or in place of them, and overrides.
    """

    engine: EngineFront
    owned: bool
    pooling: PoolingParams
    sampling: Mapping[str, Any]

    @classmethod
    def of(cls, model: str | Path | EngineConfig | EngineFront, arguments: Mapping[str, Any]) -> Self:
        """Create an engine by vLLM's arguments, or wrap an existing engine. Errors are as for `LLM`."""
        if isinstance(model, EngineFront):
            if arguments:
                raise TypeError(f"an existing engine takes no arguments: {', '.join(arguments)}")
            return cls(model, False, PoolingParams(), model.model_info.model_sampling)
        made = translated(model, arguments)
        several = made.config.data_parallel_size > 1
        engine = ReplicatedEngine(made.config) if several else InferenceEngine(made.config)
        if made.quantization is not None and engine.model_info.quantization is None:
            engine.close()
            raise ConfigError(
                f"quantization {made.quantization!r:.60}: the checkpoint is not quantised, and loading does not "
                "quantise with this method: leave it out, or use isq",
                "quantization",
            )
        own = engine.model_info.model_sampling if made.generation is None else made.generation
        return cls(engine, True, made.pooling, {**own, **made.sampling})

    def default_sampling_params(self) -> SamplingParams:
        """Return vLLM's defaults, overridden by `sampling`."""
        return SamplingParams(**self.sampling).filled({})

    def sampling_params(self, given: SamplingParams | None) -> SamplingParams:
        """Fill in vLLM's defaults, for cumulative outputs; raises InvalidParameterError for another type."""
        if given is None:
            return self.default_sampling_params()
        if not isinstance(given, SamplingParams):
            raise no_params(given)
        seed = None if given.seed == -1 else given.seed  # as in vLLM
        return replace(given.filled({}), output_kind=RequestOutputKind.CUMULATIVE, seed=seed)

    def pooling_params(self, given: Any, *, classes: bool = False) -> Any:
        """Fill the parameters of a call, or each of a list, with the default ones; the engine refuses other values.

        Classes have only the default activation.
        """
        if isinstance(given, (list, tuple)):
            return [self.pooling_params(each, classes=classes) for each in given]
        own = PoolingParams(use_activation=self.pooling.use_activation) if classes else self.pooling
        if not isinstance(given, PoolingParams):
            return given or own
        told = {name: value for name, value in asdict(given).items() if value is not None}
        # vLLM has two names for one parameter of vectors: `use_activation` of a call replaces the engine's `normalize`.
        return replace(own, **({"normalize": None} if "use_activation" in told else {}) | told)

    def task_params(self, task: str, given: Any) -> tuple[bool, Any]:
        """Return whether `encode` computes class probabilities for a task, rather than embeddings, and its parameters.

        Raises:
            InvalidParameterError: the task is unknown, or a classifier of tokens is asked for texts, or vice versa.
        """
        if task not in ("embed", "token_embed", "classify", "token_classify"):
            raise InvalidParameterError(
                f"pooling_task must be 'embed', 'classify', 'token_embed' or 'token_classify', not {task!r:.60}; "
                "for pairs of texts use score",
                "pooling_task",
            )
        info, classes, single = self.engine.model_info, task.endswith("classify"), task.startswith("token")
        if "classify" in info.tasks and classes and single != (info.pooling in BY_TOKEN):
            raise InvalidParameterError(f"{info.name} classifies {'texts' if single else 'tokens'}", "pooling_task")
        params = self.pooling_params(given, classes=classes)
        if task != "token_embed":
            return classes, params
        several = isinstance(params, (list, tuple))
        each = [replace(one or PoolingParams(), pooling="all") for one in (params if several else [params])]
        return classes, each if several else each[0]

    def close(self) -> None:
        """Close the engine if it was created here."""
        if self.owned:
            self.engine.close()


class LLM(ExplainedAttributes):
    """Model for offline inference, with vLLM's names.

    Args:
        model: a Hugging Face id, a folder, a `.gguf` file, "demo", an `EngineConfig`, or an engine that its owner
            closes.
        arguments: arguments of vLLM's `LLM`, or fields of `EngineConfig`. LIBRARY_API.md says whether each is
            accepted, translated or refused. `seed` is 0, as in vLLM.

    Raises:
        ConfigError, InvalidParameterError, ModelNotFoundError, ModelLoadError: the arguments or the model are unusable.
        TypeError: an argument has no counterpart here.
    """

    def __init__(self, model: str | Path | EngineConfig | EngineFront, **arguments: Any) -> None:
        self._opened = Opened.of(model, arguments)
        self.engine = self._opened.engine

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs) -> Self:
        """Make an `LLM` from stored arguments."""
        return cls(**vars(engine_args))

    # ---- text --------------------------------------------------------------------------------------------------------

    @explained(SamplingParams=SamplingParams.__struct_fields__)
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: Bar = True,
        lora_request: LoraChoice | Sequence[LoraChoice] = None,
        priority: int | Sequence[int] | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: None = None,
    ) -> list[RequestOutput]:
        """Continue every prompt; arguments and errors are as in `InferenceEngine.generate`, except for these.

        Args:
            sampling_params: None means `get_default_sampling_params()`.
            tokenization_kwargs: may have `add_special_tokens`.
            mm_processor_kwargs: refused: the model's files and the engine's settings define how images are prepared.
        """
        refuse_given("generate", mm_processor_kwargs=mm_processor_kwargs)
        outputs = fitted(
            self.engine.generate,
            prompts,
            self._params(sampling_params),
            use_tqdm=use_tqdm,
            priority=0 if priority is None else priority,
            add_special_tokens=adds_special(tokenization_kwargs),
            lora_request=lora_request,
        )
        return _outputs(outputs, lora_request)

    @explained(SamplingParams=SamplingParams.__struct_fields__)
    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: Bar = True,
        lora_request: LoraChoice | Sequence[LoraChoice] = None,
        priority: int | Sequence[int] | None = None,
        chat_template: str | None = None,
        chat_template_content_format: str = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: None = None,
    ) -> list[RequestOutput]:
        """Answer a conversation, or every conversation of a list; returns a list of outputs in both cases.

        Args:
            messages: messages of one conversation, or a list of conversations.
            chat_template: Jinja source that replaces the model's template.
            chat_template_content_format: "auto", "string" or "openai", without effect: a content always has the form
                that the template reads.
            tokenization_kwargs: refused: a template writes the special tokens itself.

        The other arguments and errors are as in `generate` and `InferenceEngine.chat`.
        """
        refuse_given("chat", mm_processor_kwargs=mm_processor_kwargs)
        refuse_given("chat", tokenization_kwargs=tokenization_kwargs or None)
        if chat_template_content_format not in ("auto", "string", "openai"):
            raise InvalidParameterError(
                f"chat_template_content_format {chat_template_content_format!r:.60}: must be auto, string or openai",
                "chat_template_content_format",
            )
        made = fitted(
            self.engine.chat,
            messages,
            self._params(sampling_params),
            use_tqdm=use_tqdm,
            priority=0 if priority is None else priority,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            chat_template=chat_template,
            chat_template_kwargs=chat_template_kwargs,
            lora_request=lora_request,
        )
        return _outputs(made if isinstance(made, list) else [made], lora_request)

    @explained(BeamSearchParams=BeamSearchParams.__struct_fields__)
    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: BeamSearchParams,
        lora_request: LoraChoice | Sequence[LoraChoice] = None,
        use_tqdm: Bar = False,
        concurrency_limit: int | None = None,
        priority: int | Sequence[int] | None = None,
    ) -> list[BeamSearchOutput]:
        """Find the best continuations of every prompt by beam search. Errors are as in `generate`.

        Args:
            use_tqdm: whether to show a progress bar of steps.
            concurrency_limit: maximum number of prompts that are searched at the same time; None for no limit.
        """
        return beam_search(
            self.engine,
            prompts,
            params,
            use_tqdm=use_tqdm,
            concurrency_limit=concurrency_limit,
            priority=0 if priority is None else priority,
            lora_request=lora_request,
        )

    # ---- vectors and scores ------------------------------------------------------------------------------------------

    @explained(PoolingParams=PoolingParams.__struct_fields__)
    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        use_tqdm: Bar = True,
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        lora_request: LoraChoice | Sequence[LoraChoice] = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
    ) -> list[EmbeddingRequestOutput]:
        """Compute the embedding of every text, also with a model that generates text. Errors are as in `generate`."""
        refuse_given("embed", tokenization_kwargs=tokenization_kwargs or None)
        outputs = self.engine.embed(
            prompts, self._opened.pooling_params(pooling_params), use_tqdm=use_tqdm, lora_request=lora_request
        )
        return [
            EmbeddingRequestOutput(
                each.request_id,
                EmbeddingOutput(_single(each, "token_embed")),
                list(each.prompt_token_ids),
                each.num_cached_tokens,
            )
            for each in outputs
        ]

    @explained(PoolingParams=PoolingParams.__struct_fields__)
    def encode(
        self,
        prompts: Prompt | Sequence[Prompt],
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        *,
        use_tqdm: Bar = True,
        lora_request: LoraChoice | Sequence[LoraChoice] = None,
        pooling_task: str = "embed",
        tokenization_kwargs: Mapping[str, Any] | None = None,
    ) -> list[PoolingRequestOutput[PoolingOutput]]:
        """Compute the pooled output of every text, as numpy arrays.

        Args:
            pooling_task: "embed" for embeddings, "classify" for class probabilities; "token_embed" and "token_classify"
                for the same per token, [tokens, ...].

        Raises:
            InvalidParameterError: the task is unknown or not supported.
        """
        refuse_given("encode", tokenization_kwargs=tokenization_kwargs or None)
        classes, params = self._opened.task_params(pooling_task, pooling_params)
        call = self.engine.classify if classes else self.engine.embed
        return list(map(pooled, call(prompts, params, use_tqdm=use_tqdm, lora_request=lora_request)))

    @explained(PoolingParams=PoolingParams.__struct_fields__)
    def classify(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        use_tqdm: Bar = True,
        lora_request: LoraChoice | Sequence[LoraChoice] = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
    ) -> list[ClassificationRequestOutput]:
        """Compute the class probabilities of every text with a classifier. Errors are as in `generate`."""
        refuse_given("classify", tokenization_kwargs=tokenization_kwargs or None)
        params = self._opened.pooling_params(pooling_params, classes=True)
        return [
            ClassificationRequestOutput(
                each.request_id, ClassificationOutput(_single(each, "token_classify")), list(each.prompt_token_ids)
            )
            for each in self.engine.classify(prompts, params, use_tqdm=use_tqdm, lora_request=lora_request)
        ]

    @explained()
    def score(
        self,
        data_1: str | Sequence[str],
        data_2: str | Sequence[str],
        /,
        *,
        use_tqdm: Bar = True,
        pooling_params: None = None,
        lora_request: LoraChoice = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        chat_template: None = None,
    ) -> list[ScoringRequestOutput]:
        """Score the similarity of texts: one text with one, or with each of a list, or two lists of equal length.

        A cross-encoder reads both texts at once; other models compare their embeddings, see `EngineFront.score`.

        Raises:
            InvalidParameterError: an input is not a text, or the numbers of texts do not match.
            CandleVllmError: as in `generate`.
        """
        refuse_given("score", tokenization_kwargs=tokenization_kwargs or None)
        refuse_given("score", pooling_params=pooling_params, chat_template=chat_template)
        first, second = (
            [each] if isinstance(each, (str, Mapping)) or not isinstance(each, Iterable) else list(each)
            for each in (data_1, data_2)
        )
        if not second or len(first) not in (1, len(second)):
            raise InvalidParameterError(
                f"score takes one text and a list, or lists of equal length, not {len(first)} and {len(second)} texts",
                "data_2",
            )
        first *= len(second) // len(first)
        outputs = self.engine.score(list(zip(first, second, strict=True)), use_tqdm=use_tqdm, lora_request=lora_request)
        return [
            ScoringRequestOutput(str(number), ScoringOutput(each.score), list(each.prompt_token_ids))
            for number, each in enumerate(outputs)
        ]

    # ---- other methods -----------------------------------------------------------------------------------------------

    def get_default_sampling_params(self) -> SamplingParams:
        """Return vLLM's default sampling parameters, overridden by those of the model's files and of the arguments."""
        return self._opened.default_sampling_params()

    def reset_prefix_cache(self) -> bool:
        """Clear the prefix cache; returns True, as vLLM does on success."""
        self.engine.reset_prefix_cache()
        return True

    def sleep(self, level: int = 1, mode: str = "abort") -> None:
        """Release memory; as `InferenceEngine.sleep`."""
        self.engine.sleep(level, mode)

    def wake_up(self, tags: list[str] | None = None) -> bool:
        """Load released memory again, as `InferenceEngine.wake_up`; return whether the whole engine is awake."""
        self.engine.wake_up(tags)
        return not self.engine.is_sleeping

    def get_tokenizer(self) -> LlmTokenizer:
        """Return the model's tokenizer and template."""
        return LlmTokenizer(self.engine)

    def close(self) -> None:
        """Release the model, as deleting the last reference does; an engine that was passed in stays open."""
        self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"LLM({self.engine!r})"

    def _params(
        self, given: SamplingParams | Sequence[SamplingParams] | None
    ) -> SamplingParams | Sequence[SamplingParams]:
        if isinstance(given, (list, tuple)):
            return [self._opened.sampling_params(each) for each in given]
        return self._opened.sampling_params(given)  # pyrefly: ignore[bad-argument-type]  # which refuses it


class Encoding(dict[str, list[Any]]):
    """Result of a call of the tokenizer; its values are also attributes."""

    def __getattr__(self, name: str) -> list[Any]:
        if name not in self:
            raise AttributeError(name)
        return self[name]


class LlmTokenizer:
    """An engine's tokenizer with the common attributes and methods of transformers' tokenizers."""

    def __init__(self, engine: EngineFront) -> None:
        self._engine = engine
        info, conventions = engine.model_info, engine.chat_conventions
        special = conventions.special_tokens
        self.vocab_size = info.vocab_size
        self.chat_template = conventions.chat_template
        self.all_special_tokens, self.all_special_ids = list(special), list(special.values())
        names = (conventions.token_names.get(f"{name}_token", "") for name in ("bos", "eos", "pad", "unk"))
        self.bos_token, self.eos_token, self.pad_token, self.unk_token = (name or None for name in names)
        self.bos_token_id, self.pad_token_id = special.get(self.bos_token or ""), special.get(self.pad_token or "")
        ends = info.eos_token_ids
        self.eos_token_id = special.get(self.eos_token or "", ends[0] if ends else None)

    def __len__(self) -> int:
        return self.vocab_size

    def __await__(self) -> Generator[None, None, Self]:
        """Return the tokenizer to programs that await `AsyncLLM.get_tokenizer`, a coroutine in older versions."""
        yield from ()
        return self

    def __call__(self, text: str | Sequence[str], add_special_tokens: bool = True) -> Encoding:
        """Tokenize a text to `input_ids`, with an `attention_mask` of ones; several texts give a list of each."""
        if isinstance(text, str):
            ids = self.encode(text, add_special_tokens)
            return Encoding(input_ids=ids, attention_mask=[1] * len(ids))
        each = [self(one, add_special_tokens) for one in text]
        return Encoding({name: [made[name] for made in each] for name in ("input_ids", "attention_mask")})

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Tokenize a text."""
        return self._engine.tokenize(text, add_special_tokens)

    def decode(self, token_ids: int | Sequence[int], skip_special_tokens: bool = False) -> str:
        """Decode token ids."""
        ids = [token_ids] if isinstance(token_ids, (int, np.integer)) else list(token_ids)
        return self._engine.detokenize(ids, skip_special_tokens)

    def batch_decode(self, sequences: Sequence[Sequence[int]], skip_special_tokens: bool = False) -> list[str]:
        """Decode each list of token ids."""
        return [self.decode(ids, skip_special_tokens) for ids in sequences]

    @functools.cached_property
    def _vocabulary(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self._engine.token_names(range(len(self)))) if name}

    def get_vocab(self) -> dict[str, int]:
        """Return the id of each token, by its entry in the vocabulary."""
        return self._vocabulary

    def convert_ids_to_tokens(self, ids: int | Sequence[int]) -> Any:
        """Return a token's entry in the vocabulary, or a list of them."""
        names = self._engine.token_names
        return names([ids])[0] if isinstance(ids, (int, np.integer)) else names(ids)

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any:
        """Return the id of an entry in the vocabulary, or a list; for an unknown entry that of `unk_token`, or None."""
        if not isinstance(tokens, str):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        return self._vocabulary.get(tokens, self._vocabulary.get(self.unk_token or ""))

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        tokenize: bool = True,
        add_generation_prompt: bool = False,
        **options: Any,
    ) -> Any:
        """Render a conversation to a prompt's token ids or text; several conversations give a list of them."""
        if conversation and not isinstance(conversation[0], Mapping):
            return [self.apply_chat_template(each, tokenize, add_generation_prompt, **options) for each in conversation]
        text = self._engine.apply_chat_template(conversation, add_generation_prompt=add_generation_prompt, **options)
        return self._engine.tokenize(text, add_special_tokens=False) if tokenize else text


def _outputs(given: Sequence[GenerationOutput], lora_request: LoraChoice | Sequence[LoraChoice]) -> list[RequestOutput]:
    outputs = [request_output(each) for each in given]
    several = isinstance(lora_request, (list, tuple)) and len(lora_request) == len(outputs)
    for place, output in enumerate(outputs):
        own = lora_request[place] if several else lora_request  # type: ignore[index]
        output.lora_request = own if isinstance(own, LoRARequest) else None
    return outputs


def fitted(call: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Call a method of an engine; as in vLLM, sequences end with the context if `max_tokens` exceeds it."""
    context = copy_context()
    context.run(FITTED.set, True)
    return context.run(call, *arguments, **named)


def _single(made: Embedding | Classification, task: str) -> list[float]:
    """Return the vector of an output; refuse one with a vector per token, and name the `task` of `encode` for it."""
    if made.vectors is not None:
        raise InvalidParameterError(f"tokens have a row each: use encode with pooling_task={task!r}", "pooling_task")
    return (made.embedding if isinstance(made, Embedding) else made.probs).tolist()


def adds_special(given: Mapping[str, Any] | None) -> bool:
    options = dict(given or {})
    adds = options.pop("add_special_tokens", True)
    if options or not isinstance(adds, bool):
        raise InvalidParameterError(
            "tokenization_kwargs may only have add_special_tokens, true or false: prompts are never truncated",
            "tokenization_kwargs",
        )
    return adds


def pooled(made: Embedding | Classification) -> PoolingRequestOutput[PoolingOutput]:
    """Convert an output of `embed` or `classify`; several vectors become rows."""
    numbers, cached = (made.embedding, made.num_cached_tokens) if isinstance(made, Embedding) else (made.probs, 0)
    flat = np.array(numbers, np.float32)
    data = PoolingOutput(flat.reshape(made.vectors, -1) if made.vectors else flat)
    return PoolingRequestOutput(made.request_id, data, list(made.prompt_token_ids), cached)


def refuse_given(method: str, **given: object) -> None:
    """Refuse arguments that exist only to be refused with a reason."""
    for name, value in given.items():
        if value is not None:
            said = foreign_names(method).get(name, "it would have no effect here")
            raise InvalidParameterError(f"{method} takes no {name}: {said}", name)
