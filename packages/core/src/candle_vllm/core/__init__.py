"""The engine of candle-vllm: load a model, continue prompts, many at a time.

`InferenceEngine` and `RemoteEngine` are imported when they are first used, because what computes takes a while to
import, and the settings, errors and request types do not need it.
"""

from typing import TYPE_CHECKING, Any

from candle_vllm.core.config import EngineConfig
from candle_vllm.core.engine.request import (
    CompletionOutput,
    EmbeddingOutput,
    EngineStats,
    FinishReason,
    GenerationOutput,
    GenerationRequest,
    ModelInfo,
    PositionLogprobs,
    ScoreOutput,
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
    NoMemoryError,
    PromptTooLongError,
    RequestAbortedError,
    RequestError,
    UnsupportedModelError,
    WeightsError,
)
from candle_vllm.core.pooling import PoolingParams
from candle_vllm.core.sampling.params import SamplingParams
from candle_vllm.core.sampling.structured import StructuredOutputsParams

if TYPE_CHECKING:
    from candle_vllm.core.inference_engine import InferenceEngine
    from candle_vllm.core.remote import RemoteEngine

__all__ = [
    "CandleVllmError",
    "ChatTemplateError",
    "CompletionOutput",
    "ConfigError",
    "EmbeddingOutput",
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
    "NoMemoryError",
    "PoolingParams",
    "PositionLogprobs",
    "PromptTooLongError",
    "RemoteEngine",
    "RequestAbortedError",
    "RequestError",
    "SamplingParams",
    "ScoreOutput",
    "StructuredOutputsParams",
    "TokenLogprob",
    "TokenOutput",
    "UnsupportedModelError",
    "WeightsError",
]


if not TYPE_CHECKING:  # to which every name would be one

    def __getattr__(name: str) -> Any:
        if name == "InferenceEngine":
            from candle_vllm.core.inference_engine import InferenceEngine

            return InferenceEngine
        if name == "RemoteEngine":
            from candle_vllm.core.remote import RemoteEngine

            return RemoteEngine
        from candle_vllm.core.arguments import missing_name

        raise missing_name(__name__, name, __all__)


def __dir__() -> list[str]:
    return [*__all__]
