# SPDX-License-Identifier: MIT
"""LLM: vLLM's class for programs without an event loop, over `InferenceEngine`.

It differs from `InferenceEngine` where vLLM does: in names and outputs, in sampling defaults (the model's own if no
parameters were given, otherwise temperature 1 over the whole vocabulary), and in 16 tokens also for a chat.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Self

import numpy as np
from msgspec.structs import replace

from candle_vllm.core.arguments import explained, foreign_names
from candle_vllm.core.config import EngineConfig
from candle_vllm.core.engine.model_info import ModelInfo
from candle_vllm.core.engine.outputs import GenerationOutput
from candle_vllm.core.engine.requests import LoraChoice, LoRARequest
from candle_vllm.core.engine.step.stream import Bar
from candle_vllm.core.engine_front import EngineFront
from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.core.inference_engine import InferenceEngine
from candle_vllm.core.pooling import PoolingParams
from candle_vllm.core.remote import ReplicatedEngine
from candle_vllm.core.sampling.params import RequestOutputKind, SamplingParams
from candle_vllm.core.text.prompts import Message, Prompt
from candle_vllm.core.vllm.arguments import EngineArgs, check_quantization, translated
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

_ABSENT = {
    "llm_engine": "the engine is `engine`, an InferenceEngine: its methods are in LIBRARY_API.md",
    "get_metrics": "what is counted is `engine.stats()`",
    "enqueue": "generate takes all prompts at once; add_request and step are methods of InferenceEngine",
    "enqueue_chat": "chat takes all conversations at once",
    "wait_for_completion": "generate and chat wait",
    "collective_rpc": "there are no workers, and no function of a caller's is run beside the model",
    "apply_model": "no function of a caller's is run on a model",
    "start_profile": "Python's profilers see what a step does",
    "reset_mm_cache": "what pictures come to is kept by their content: none is ever stale",
    "reward": "use classify",
}


class Defaults:
    """What counts where a call of `LLM` or `AsyncLLM` leaves something open.

    Args:
        engine: its model's files say it.
        generation: what counts in the place of what they say; None leaves that.
        sampling: values that count before theirs.
    """

    def __init__(
        self,
        engine: EngineFront,
        generation: Mapping[str, Any] | None = None,
        sampling: Mapping[str, Any] | None = None,
    ) -> None:
        own = engine.model_info.model_sampling if generation is None else generation
        self._values: dict[str, Any] = {**own, **(sampling or {})}

    def sampling_params(self) -> SamplingParams:
        """vLLM's defaults, and those of the model before them."""
        return SamplingParams(**self._values).filled({})

    def filled(self, params: SamplingParams | None) -> SamplingParams:
        """Fill a request's parameters with vLLM's defaults; None becomes `sampling_params()`.

        Raises:
            InvalidParameterError: `params` is no `SamplingParams`.
        """
        if params is None:
            return self.sampling_params()
        if not isinstance(params, SamplingParams):
            said = f"sampling_params must be SamplingParams, not {type(params).__name__}"
            raise InvalidParameterError(said, "sampling_params")
        return replace(params.filled({}), output_kind=RequestOutputKind.CUMULATIVE)


@dataclasses.dataclass(frozen=True)
class Opened:
    """What `LLM` and `AsyncLLM` are made of.

    Attributes:
        owned: the engine was made here, and goes with its holder.
        pooling: how vectors are made where a call does not say it.
    """

    engine: EngineFront
    owned: bool
    pooling: PoolingParams
    defaults: Defaults

    @classmethod
    def of(cls, model: str | Path | EngineConfig | EngineFront, arguments: Mapping[str, Any]) -> Self:
        """An engine by vLLM's arguments, or around one that is there. Errors as of `LLM`."""
        if isinstance(model, EngineFront):
            if arguments:
                raise TypeError(f"an engine that is there takes no arguments: {', '.join(arguments)}")
            return cls(model, False, PoolingParams(), Defaults(model))
        made = translated(model, arguments)
        several = made.config.data_parallel_size > 1
        engine = ReplicatedEngine(made.config) if several else InferenceEngine(made.config)
        check_quantization(made.quantization, engine.model_info.quantization)
        return cls(engine, True, made.pooling, Defaults(engine, made.generation, made.sampling))

    def close(self) -> None:
        """Closes the engine where it was made here."""
        if self.owned:
            self.engine.close()


class LLM:
    """A model for prompts that are there, with vLLM's names.

    Args:
        model: a Hugging Face id, a folder, a `.gguf` file, "demo", an `EngineConfig`, or an engine that is there
            already and stays its owner's.
        arguments: vLLM's arguments of the same class, or fields of `EngineConfig`. LIBRARY_API.md says of each whether
            it is taken, translated or refused. `seed` is 0, as in vLLM.

    Attributes:
        engine: what it runs on.

    Raises:
        ConfigError, ModelNotFoundError, ModelLoadError: the model cannot be served as asked.
        TypeError: an argument has no counterpart here.
    """

    def __init__(self, model: str | Path | EngineConfig | EngineFront, **arguments: Any) -> None:
        self._opened = Opened.of(model, arguments)
        self.engine = self._opened.engine

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs) -> Self:
        """An `LLM` of arguments that were kept."""
        return cls(**vars(engine_args))

    # ---- texts -------------------------------------------------------------------------------------------------------

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
        """Continues every prompt; outputs in the order of the prompts.

        Args:
            prompts: one prompt or a list; a prompt is a text, a list of token ids, or an object with `prompt` or
                `prompt_token_ids`.
            sampling_params: one for all, or one each; None is `get_default_sampling_params()`.
            use_tqdm: show a progress bar on a terminal, or what makes one.
            lora_request: the adapter of all prompts, or one or None for each (`enable_lora`); pairs of adapters and
                scales are a mix of them.
            priority: one for all, or one each; lower runs first.
            tokenization_kwargs: may have `add_special_tokens`.
            mm_processor_kwargs: refused: images are read as they are, and prepared as the model's files say.

        Raises:
            RequestError: a prompt or its parameters are wrong, with its place in a list; nothing has run then.
            CandleVllmError: the engine failed on a request, or was closed meanwhile.
        """
        refuse_given("generate", mm_processor_kwargs=mm_processor_kwargs)
        outputs = self.engine.generate(
            prompts,
            self._params(sampling_params),
            use_tqdm=use_tqdm,
            priority=_priority(priority),
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
        """Answers a conversation, or every one of a list; a list of outputs either way.

        Args:
            messages: the messages of one conversation, or a list of conversations.
            chat_template: Jinja source in the place of the model's.
            chat_template_content_format: "auto" or "string": parts of a content are always joined to one text.
            tokenization_kwargs: refused: a template writes the special tokens itself.

        The other arguments and errors are as of `generate` and of `InferenceEngine.chat`.
        """
        refuse_given("chat", mm_processor_kwargs=mm_processor_kwargs)
        refuse_given("chat", tokenization_kwargs=tokenization_kwargs or None)
        if chat_template_content_format not in ("auto", "string"):
            raise InvalidParameterError(
                f"chat_template_content_format {chat_template_content_format!r:.60}: parts of a content are always "
                'joined to one text, which is "string"',
                "chat_template_content_format",
            )
        made: Any = self.engine.chat(
            messages,  # type: ignore[arg-type]
            self._params(sampling_params),  # type: ignore[arg-type]
            use_tqdm=use_tqdm,
            priority=_priority(priority),
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            chat_template=chat_template,
            chat_template_kwargs=chat_template_kwargs,
            lora_request=lora_request,  # type: ignore[arg-type]
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
        """The best continuations of every prompt that a search of some width finds. Errors as of `generate`.

        Args:
            use_tqdm: show a progress bar of steps.
            concurrency_limit: prompts that are searched for at a time; None is all of them.
        """
        return beam_search(
            self.engine,
            prompts,
            params,
            use_tqdm=use_tqdm,
            concurrency_limit=concurrency_limit,
            priority=_priority(priority),
            lora_request=lora_request,
        )

    # ---- numbers -----------------------------------------------------------------------------------------------------

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
        """The vector of every text. A model that generates text gives vectors as well. Errors as of `generate`."""
        refuse_given("embed", tokenization_kwargs=tokenization_kwargs or None)
        outputs = self.engine.embed(
            prompts, self._pooling_params(pooling_params), use_tqdm=use_tqdm, lora_request=lora_request
        )
        return [
            EmbeddingRequestOutput(
                each.request_id,
                EmbeddingOutput(each.embedding.tolist()),
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
        """The numbers of every text, as arrays of numpy.

        Args:
            pooling_task: "embed" for vectors, "classify" for those of a classifier; "token_embed" and "token_classify"
                for one of each token, [tokens, ...].

        Raises:
            InvalidParameterError: another task.
        """
        refuse_given("embed", tokenization_kwargs=tokenization_kwargs or None)
        if asks_classes(pooling_task, self.engine.model_info):
            refuse_given("encode", pooling_params=pooling_params)
            classes = self.engine.classify(prompts, use_tqdm=use_tqdm, lora_request=lora_request)
            return [
                PoolingRequestOutput(each.request_id, shaped(each.probs, each.vectors), list(each.prompt_token_ids))
                for each in classes
            ]
        params = task_params(self._pooling_params(pooling_params), pooling_task)
        made = self.engine.embed(prompts, params, use_tqdm=use_tqdm, lora_request=lora_request)
        return [
            PoolingRequestOutput(
                each.request_id,
                shaped(each.embedding, each.vectors),
                list(each.prompt_token_ids),
                each.num_cached_tokens,
            )
            for each in made
        ]

    @explained(PoolingParams=PoolingParams.__struct_fields__)
    def classify(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        pooling_params: PoolingParams | None = None,
        use_tqdm: Bar = True,
        lora_request: LoraChoice | Sequence[LoraChoice] = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
    ) -> list[ClassificationRequestOutput]:
        """How likely each class of a classifier is for every text. Errors as of `generate`."""
        refuse_given("classify", tokenization_kwargs=tokenization_kwargs or None)
        return [
            ClassificationRequestOutput(
                each.request_id, ClassificationOutput(each.probs.tolist()), list(each.prompt_token_ids)
            )
            for each in self.engine.classify(prompts, pooling_params, use_tqdm=use_tqdm, lora_request=lora_request)
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
        """How well texts belong together: one with one, one with each of many, or many with as many others.

        A cross-encoder reads both texts at once; of other models it is the cosine of their vectors.

        Raises:
            InvalidParameterError: an input is no text, or there are not as many of one as of the other.
            CandleVllmError: as of `generate`.
        """
        refuse_given("score", tokenization_kwargs=tokenization_kwargs or None)
        refuse_given("score", pooling_params=pooling_params, chat_template=chat_template)
        first = [data_1] if isinstance(data_1, str) else list(data_1)
        second = [data_2] if isinstance(data_2, str) else list(data_2)
        if len(first) == 1:
            first *= len(second)
        if not second or len(first) != len(second):
            raise InvalidParameterError(
                f"score takes one text and any number of others, or as many of both: not {len(first)}, {len(second)}",
                "data_2",
            )
        outputs = self.engine.score(list(zip(first, second, strict=True)), use_tqdm=use_tqdm, lora_request=lora_request)
        return [
            ScoringRequestOutput(str(number), ScoringOutput(each.score), list(each.prompt_token_ids))
            for number, each in enumerate(outputs)
        ]

    # ---- the rest ----------------------------------------------------------------------------------------------------

    def get_default_sampling_params(self) -> SamplingParams:
        """What counts without `sampling_params`: the model's defaults where its files say some, else vLLM's."""
        return self._opened.defaults.sampling_params()

    def reset_prefix_cache(self) -> bool:
        """Forgets what prompts have left in the cache; True, as in vLLM where nothing kept it from that."""
        self.engine.reset_prefix_cache()
        return True

    def sleep(self, level: int = 1, mode: str = "abort") -> None:
        """Gives memory back; as `InferenceEngine.sleep`."""
        self.engine.sleep(level, mode)

    def wake_up(self, tags: list[str] | None = None) -> None:
        """Fills memory again; as `InferenceEngine.wake_up`."""
        self.engine.wake_up(tags)

    def get_tokenizer(self) -> LlmTokenizer:
        """The model's tokenizer and template."""
        return LlmTokenizer(self.engine)

    def close(self) -> None:
        """Lets go of the model and its memory, as dropping the last name of it does."""
        self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"LLM({self.engine!r})"

    if not TYPE_CHECKING:  # to which every name would be one

        def __getattr__(self, name: str) -> NoReturn:
            said = f": {_ABSENT[name]}" if name in _ABSENT else ""
            raise AttributeError(f"LLM has no {name[:60]!r}{said}", name=name, obj=self)

    def _params(
        self, given: SamplingParams | Sequence[SamplingParams] | None
    ) -> SamplingParams | Sequence[SamplingParams]:
        if isinstance(given, (list, tuple)):
            return [self._opened.defaults.filled(each) for each in given]
        return self._opened.defaults.filled(given)  # type: ignore[arg-type]

    def _pooling_params(
        self, given: PoolingParams | Sequence[PoolingParams] | None
    ) -> PoolingParams | Sequence[PoolingParams]:
        return self._opened.pooling if given is None else given


class LlmTokenizer:
    """What programs ask of a tokenizer of transformers', answered by an engine's.

    Args:
        engine: whose it is.
    """

    def __init__(self, engine: EngineFront) -> None:
        self._engine = engine
        info = engine.model_info
        self.vocab_size = info.vocab_size
        self.eos_token_id = info.eos_token_ids[0] if info.eos_token_ids else None

    def __len__(self) -> int:
        return self.vocab_size

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        """Token ids of a text as `input_ids`, and an `attention_mask` of ones."""
        ids = self.encode(text, add_special_tokens)
        return {"input_ids": ids, "attention_mask": [1] * len(ids)}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        return self._engine.tokenize(text, add_special_tokens)

    def decode(self, token_ids: int | Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of token ids."""
        ids = [token_ids] if isinstance(token_ids, int) else list(token_ids)
        return self._engine.detokenize(ids, skip_special_tokens)

    def apply_chat_template(
        self,
        conversation: Sequence[Message],
        tokenize: bool = True,
        add_generation_prompt: bool = False,
        **options: Any,
    ) -> str | list[int]:
        """A conversation as the model's prompt: its token ids, or its text."""
        text = self._engine.apply_chat_template(conversation, add_generation_prompt=add_generation_prompt, **options)
        return self._engine.tokenize(text, add_special_tokens=False) if tokenize else text


def _outputs(given: Sequence[GenerationOutput], lora_request: LoraChoice | Sequence[LoraChoice]) -> list[RequestOutput]:
    outputs = [request_output(each) for each in given]
    several = isinstance(lora_request, (list, tuple)) and len(lora_request) == len(outputs)
    for place, output in enumerate(outputs):
        own = lora_request[place] if several else lora_request  # type: ignore[index]
        output.lora_request = own if isinstance(own, LoRARequest) else None
    return outputs


def _priority(given: int | Sequence[int] | None) -> int | Sequence[int]:
    return 0 if given is None else given


def adds_special(given: Mapping[str, Any] | None) -> bool:
    options = dict(given or {})
    adds = options.pop("add_special_tokens", True)
    if options or not isinstance(adds, bool):
        raise InvalidParameterError(
            "tokenization_kwargs may have add_special_tokens, true or false: a prompt is run whole or refused",
            "tokenization_kwargs",
        )
    return adds


def asks_classes(pooling_task: str, info: ModelInfo) -> bool:
    """Whether `encode` is asked for the classes of a text or of its tokens, and not for vectors.

    Raises:
        InvalidParameterError: for neither, or the model tells no tokens apart, or no texts.
    """
    if pooling_task not in ("embed", "token_embed", "classify", "token_classify"):
        raise InvalidParameterError(
            f"pooling_task {pooling_task!r:.60}: 'embed', 'classify', and of each token 'token_embed' and "
            "'token_classify' can be; scores are asked of pairs, by score",
            "pooling_task",
        )
    classes, single = pooling_task.endswith("classify"), pooling_task.startswith("token")
    if "classify" in info.tasks and classes and single != (info.pooling == "all"):
        raise InvalidParameterError(f"{info.name} tells {'texts' if single else 'tokens'} apart", "pooling_task")
    return classes


def task_params(params: Any, pooling_task: str) -> Any:
    """The parameters of vectors for a task: of "token_embed", a vector of each token."""
    if pooling_task != "token_embed":
        return params
    if isinstance(params, (list, tuple)):
        return [task_params(each, pooling_task) for each in params]
    return replace(params or PoolingParams(), pooling="all")


def shaped(numbers: Any, vectors: int | None) -> PoolingOutput:
    """A vector, or vectors that stand behind each other as rows."""
    flat = np.array(numbers, np.float32)
    return PoolingOutput(flat.reshape(vectors, -1) if vectors else flat)


def refuse_given(method: str, **given: object) -> None:
    """Refuses arguments that are there to be refused with a reason."""
    for name, value in given.items():
        if value is not None:
            said = foreign_names(method).get(name, "there is nothing that it could change here")
            raise InvalidParameterError(f"{method} takes no {name}: {said}", name)
