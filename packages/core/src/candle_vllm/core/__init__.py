# SPDX-License-Identifier: MIT
"""The inference engine of candle-vllm: load a model, and generate text or vectors for many prompts at a time.

Engines and the classes of `core.vllm` are imported when they are first used: their modules take long to import, and
settings, errors and request types do not need them.
"""

from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from candle_vllm.core.config import EngineConfig
from candle_vllm.core.engine.model_info import AdapterInfo, ModelInfo
from candle_vllm.core.engine.outputs import (
    ClassificationOutput,
    CompletionOutput,
    EmbeddingOutput,
    FinishReason,
    GenerationOutput,
    PositionLogprobs,
    ScoreOutput,
    TokenLogprob,
    TokenOutput,
)
from candle_vllm.core.engine.requests import GenerationRequest, LoRARequest
from candle_vllm.core.engine.stats import EngineStats
from candle_vllm.core.errors import (
    AdapterError,
    CandleVllmError,
    ChatTemplateError,
    ConfigError,
    EngineDeadError,
    EngineOverloadedError,
    InvalidFileError,
    InvalidParameterError,
    ModelLoadError,
    ModelNotFoundError,
    NoMemoryError,
    PromptTooLongError,
    RequestAbortedError,
    RequestError,
    UnsupportedModelError,
    WeightsError,
)
from candle_vllm.core.pooling import PoolingParams
from candle_vllm.core.sampling.params import RequestOutputKind, SamplingParams
from candle_vllm.core.sampling.structured import StructuredOutputsParams
from candle_vllm.core.text.prompts import TextPrompt, TokensPrompt

if TYPE_CHECKING:
    from candle_vllm.core.inference_engine import InferenceEngine
    from candle_vllm.core.remote import RemoteEngine, ReplicatedEngine
    from candle_vllm.core.vllm.arguments import AsyncEngineArgs, EngineArgs
    from candle_vllm.core.vllm.async_llm import AsyncLLM, AsyncLLMEngine
    from candle_vllm.core.vllm.beam_search import BeamSearchParams
    from candle_vllm.core.vllm.llm import LLM
    from candle_vllm.core.vllm.outputs import (
        ClassificationRequestOutput,
        EmbeddingRequestOutput,
        Logprob,
        PoolingRequestOutput,
        RequestOutput,
        ScoringRequestOutput,
    )

__all__ = [
    "LLM",
    "AdapterError",
    "AdapterInfo",
    "AsyncEngineArgs",
    "AsyncLLM",
    "AsyncLLMEngine",
    "BeamSearchParams",
    "CandleVllmError",
    "ChatTemplateError",
    "ClassificationOutput",
    "ClassificationRequestOutput",
    "CompletionOutput",
    "ConfigError",
    "EmbeddingOutput",
    "EmbeddingRequestOutput",
    "EngineArgs",
    "EngineConfig",
    "EngineDeadError",
    "EngineOverloadedError",
    "EngineStats",
    "FinishReason",
    "GenerationOutput",
    "GenerationRequest",
    "InferenceEngine",
    "InvalidFileError",
    "InvalidParameterError",
    "LoRARequest",
    "Logprob",
    "ModelInfo",
    "ModelLoadError",
    "ModelNotFoundError",
    "NoMemoryError",
    "PoolingParams",
    "PoolingRequestOutput",
    "PositionLogprobs",
    "PromptTooLongError",
    "RemoteEngine",
    "ReplicatedEngine",
    "RequestAbortedError",
    "RequestError",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "ScoreOutput",
    "ScoringRequestOutput",
    "StructuredOutputsParams",
    "TextPrompt",
    "TokenLogprob",
    "TokenOutput",
    "TokensPrompt",
    "UnsupportedModelError",
    "WeightsError",
]


_LATER = MappingProxyType({
    name: module
    for module, names in (
        ("inference_engine", "InferenceEngine"),
        ("remote", "RemoteEngine ReplicatedEngine"),
        ("vllm.llm", "LLM"),
        ("vllm.async_llm", "AsyncLLM AsyncLLMEngine"),
        ("vllm.beam_search", "BeamSearchParams"),
        ("vllm.arguments", "EngineArgs AsyncEngineArgs"),
        ("vllm.outputs", "ClassificationRequestOutput EmbeddingRequestOutput Logprob PoolingRequestOutput "
                         "RequestOutput ScoringRequestOutput"),
    )
    for name in names.split()
})  # fmt: skip

if not TYPE_CHECKING:  # a type checker would accept every name

    def __getattr__(name: str) -> Any:
        if name in _LATER:
            from importlib import import_module

            return getattr(import_module(f"{__name__}.{_LATER[name]}"), name)
        from candle_vllm.core.arguments import missing_name

        raise missing_name(__name__, name, __all__)


def __dir__() -> list[str]:
    return [*__all__]
