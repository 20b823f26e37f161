"""The engine of candle-vllm: load a model, continue prompts, many at a time.

`InferenceEngine` is imported when it is first used, because torch takes seconds to import and the settings, errors and
request types do not need it.
"""

from typing import TYPE_CHECKING, Any

from candle_vllm.core.config import EngineConfig
from candle_vllm.core.engine.request import (
    CompletionOutput,
    EngineStats,
    FinishReason,
    GenerationOutput,
    GenerationRequest,
    ModelInfo,
    PositionLogprobs,
    TokenLogprob,
    TokenOutput,
)
from candle_vllm.core.errors import (
    CandleVllmError,
    ChatTemplateError,
    ConfigError,
    EngineDeadError,
    EngineOverloadedError,
    InvalidFileError,
    InvalidParameterError,
    ModelLoadError,
    ModelNotFoundError,
    PromptTooLongError,
    RequestAbortedError,
    RequestError,
    UnsupportedModelError,
    WeightsError,
)
from candle_vllm.core.sampling.params import SamplingParams

if TYPE_CHECKING:
    from candle_vllm.core.inference_engine import InferenceEngine

__all__ = [
    "CandleVllmError",
    "ChatTemplateError",
    "CompletionOutput",
    "ConfigError",
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
    "ModelInfo",
    "ModelLoadError",
    "ModelNotFoundError",
    "PositionLogprobs",
    "PromptTooLongError",
    "RequestAbortedError",
    "RequestError",
    "SamplingParams",
    "TokenLogprob",
    "TokenOutput",
    "UnsupportedModelError",
    "WeightsError",
]


def __getattr__(name: str) -> Any:
    if name == "InferenceEngine":
        from candle_vllm.core.inference_engine import InferenceEngine

        return InferenceEngine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
