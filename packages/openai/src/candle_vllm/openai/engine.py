# SPDX-License-Identifier: MIT
"""EngineLike: engine methods that `OpenAIAdapter` and servers need, as in `InferenceEngine` and `ScriptedEngine`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeAlias

from candle_vllm.core.engine.outputs import TokenOutput
from candle_vllm.core.engine.stats import EngineStats
from candle_vllm.core.engine.step.request_watchers import RequestWatcher
from candle_vllm.core.engine.step.stream import PushStream
from candle_vllm.core.sampling.params import SamplingParams
from candle_vllm.core.sampling.structured import StructuredOutputsParams
from candle_vllm.core.text.infill import InfillPrompt
from candle_vllm.core.text.tokenizer import ChatConventions
from candle_vllm.core.vision.inputs import ImageInput
from candle_vllm.openai.embedding import EmbeddingEngineLike
from candle_vllm.openai.serving import Uses

TokenStream: TypeAlias = PushStream[TokenOutput]
"""Outputs of one request, with its sequences interleaved; the stream ends when all sequences have finished."""


class EngineLike(EmbeddingEngineLike, Protocol):
    """An engine. `stream` is called in the event loop's thread; methods that only compute are called in any thread."""

    @property
    def chat_conventions(self) -> ChatConventions: ...

    def check_structured_outputs(self, params: StructuredOutputsParams) -> None:
        """Raise `RequestError` if a request with these parameters would fail."""

    def infill(self, prefix: str | Sequence[int], suffix: str) -> InfillPrompt: ...

    def detokenize(self, token_ids: Sequence[int], skip_special_tokens: bool = True, *, whole: bool = True) -> str:
        """Return the text of tokens; if `whole` is false, an incomplete last character is left out."""

    def token_names(self, token_ids: Sequence[int]) -> list[str]: ...

    def token_bytes(self, token_ids: Sequence[int]) -> list[bytes]: ...

    def look(
        self, token_ids: Sequence[int], images: Sequence[object], names: Sequence[str] = (), *, bounded: bool = True
    ) -> tuple[list[int], tuple[ImageInput, ...]]:
        """Return the prompt with its image placeholders expanded, and the preprocessed images."""

    def render_messages(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """Render messages in the form that the template needs; the arguments are those of `ChatTemplate.render`."""

    def stream(
        self,
        prompt: str | Sequence[int] | Mapping[str, Any],
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        add_special_tokens: bool = True,
        watcher: RequestWatcher | None = None,
        lora_request: Uses = (),
    ) -> TokenStream:
        """Validate and submit the request before returning its stream."""

    def stats(self) -> EngineStats: ...
