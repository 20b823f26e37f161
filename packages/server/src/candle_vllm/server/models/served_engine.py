"""What the server needs of an engine, beyond what the adapter does; `InferenceEngine` and `RemoteEngine` have it."""

from __future__ import annotations

from typing import Protocol

from candle_vllm.openai import EngineLike


class ServedEngine(EngineLike, Protocol):
    """An engine that can be served."""

    @property
    def is_alive(self) -> bool: ...

    def close(self) -> None: ...
