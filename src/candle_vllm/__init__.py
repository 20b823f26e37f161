# SPDX-License-Identifier: MIT
"""LLM inference in one library: the public names of its four packages, each imported when it is first used.

The packages are `core` (the engine), `openai`, `responses` and `server`; they are distributions of their own, and work
without this file, which then is no package's.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # typing's takes as long to import as all else before a command hears Ctrl+C
if TYPE_CHECKING:
    from pkgutil import extend_path
    from typing import Any

    __path__ = extend_path(__path__, __name__)  # tells type checkers of the four packages

    from candle_vllm.core import (
        LLM,
        AdapterError,
        AdapterInfo,
        AsyncEngineArgs,
        AsyncLLM,
        AsyncLLMEngine,
        BeamSearchParams,
        CandleVllmError,
        ChatTemplateError,
        ClassificationOutput,
        ClassificationRequestOutput,
        CompletionOutput,
        ConfigError,
        EmbeddingOutput,
        EmbeddingRequestOutput,
        EngineArgs,
        EngineConfig,
        EngineDeadError,
        EngineOverloadedError,
        EngineStats,
        FinishReason,
        GenerationOutput,
        GenerationRequest,
        InferenceEngine,
        InvalidFileError,
        InvalidParameterError,
        Logprob,
        LoRARequest,
        ModelInfo,
        ModelLoadError,
        ModelNotFoundError,
        NoMemoryError,
        PoolingParams,
        PoolingRequestOutput,
        PositionLogprobs,
        PromptTooLongError,
        RemoteEngine,
        ReplicatedEngine,
        RequestAbortedError,
        RequestError,
        RequestOutput,
        RequestOutputKind,
        SamplingParams,
        ScoreOutput,
        ScoringRequestOutput,
        StructuredOutputsParams,
        TextPrompt,
        TokenLogprob,
        TokenOutput,
        TokensPrompt,
        UnsupportedModelError,
        WeightsError,
    )
    from candle_vllm.openai import OpenAIAdapter, SyncOpenAIAdapter
    from candle_vllm.responses import ConversationOptions, ConversationResult, McpServerConfig, ResponsesSession
    from candle_vllm.server import Settings, create_app

    __version__: str

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
    "ConversationOptions",
    "ConversationResult",
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
    "McpServerConfig",
    "ModelInfo",
    "ModelLoadError",
    "ModelNotFoundError",
    "NoMemoryError",
    "OpenAIAdapter",
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
    "ResponsesSession",
    "SamplingParams",
    "ScoreOutput",
    "ScoringRequestOutput",
    "Settings",
    "StructuredOutputsParams",
    "SyncOpenAIAdapter",
    "TextPrompt",
    "TokenLogprob",
    "TokenOutput",
    "TokensPrompt",
    "UnsupportedModelError",
    "WeightsError",
    "__version__",
    "create_app",
]

_NOT_OF_CORE = {
    "OpenAIAdapter": "openai",
    "SyncOpenAIAdapter": "openai",
    "ConversationOptions": "responses",
    "ConversationResult": "responses",
    "McpServerConfig": "responses",
    "ResponsesSession": "responses",
    "Settings": "server",
    "create_app": "server",
}

# Packages that are installed from a checkout stand in folders of their own. The list is the module's spec's as well.
__path__ += [
    part
    for part in (os.path.join(folder, __name__) for folder in sys.path if isinstance(folder, str))
    if part not in __path__ and os.path.isdir(part)
]


if not TYPE_CHECKING:  # to which every name would be one

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            from importlib.metadata import version

            return version("candle-vllm")
        if name in __all__:
            from importlib import import_module

            return getattr(import_module(f"{__name__}.{_NOT_OF_CORE.get(name, 'core')}"), name)
        from candle_vllm.core.arguments import missing_name

        raise missing_name(__name__, name, __all__)


def __dir__() -> list[str]:
    return [*__all__]
