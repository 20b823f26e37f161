"""ServedEngine: the engine of the engine's process, whose pieces go to the parent (steps 4 to 9)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from candle_vllm.core.config import EngineConfig
from candle_vllm.core.engine.encoder_engine import EncoderEngine
from candle_vllm.core.engine.engine import Engine
from candle_vllm.core.engine.request import GenerationRequest
from candle_vllm.core.engine.thread import EngineThread, StepEngine
from candle_vllm.core.errors import EngineDeadError
from candle_vllm.core.inference_engine import InferenceEngine
from candle_vllm.core.pooling.model_pooling import ModelPooling
from candle_vllm.core.remote.outbox import Outbox
from candle_vllm.core.text.chat_template import ChatTemplate
from candle_vllm.core.text.tokenizer import Tokenizer

MAX_SEQUENCES: Final = 1 << 20  # the parent keeps the bound that was configured


class ServingThread(EngineThread):
    """An `EngineThread` whose pieces go to the parent, step by step."""

    def __init__(self, engine: StepEngine, outbox: Outbox) -> None:
        self._outbox = outbox
        super().__init__(engine, MAX_SEQUENCES)

    def _after_step(self) -> None:
        for ticket in self._outbox.flush(self._engine):
            self.abort(ticket)

    def _end(self, error: EngineDeadError) -> None:
        super()._end(error)
        if not self._closing:
            self._outbox.fail(error)


class ServedEngine(InferenceEngine):
    """The engine of this process."""

    def __init__(self, config: EngineConfig, outbox: Outbox) -> None:
        self._outbox = outbox
        super().__init__(config)
        self.thread = self._running_thread()

    @property
    def parts(self) -> tuple[Tokenizer, ChatTemplate | None, ModelPooling | None]:
        """What its model brings besides weights."""
        loaded = self._require()[1]
        return loaded.tokenizer, loaded.template, loaded.pooling

    @property
    def max_step_tokens(self) -> int:
        """Most tokens of one step."""
        return self._require()[0].max_step_tokens

    def prepare(self, request: GenerationRequest) -> Sequence[Any]:
        """See `Engine.prepare`."""
        return self._require()[0].prepare(request)

    def _make_thread(self, engine: Engine | EncoderEngine) -> EngineThread:
        return ServingThread(engine, self._outbox)
